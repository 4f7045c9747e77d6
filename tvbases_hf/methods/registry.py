"""Merging methods, each declared once: a typed function from the K changes of one weight to one change.

    @method("top_k", title="Top-k", source="https://arxiv.org/abs/...")
    def top_k(deltas, weights, *, density: Annotated[float, Field(gt=0, le=1, description="...")] = 0.05) -> Delta:
        '''The mean of the largest entries of the vectors.'''

Whatever file of this package holds such a function is found at the first look-up: no list names the methods. What the
signature says is what Python, ``tvbases``, mergekit's YAML, its JSON schema and the guides' table know of the method.
"""

from __future__ import annotations

import importlib
import inspect
import math
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal, ParamSpec, TypeVar

import torch
from pydantic import Field

from ..algebra.delta import Delta, reshaped, work_dtype
from ..algebra.layout import is_matrix, is_stack, stacked, unstacked
from ..errors import ParameterError, did_you_mean
from ..options import Option, checked, options_of
from .spectrum import LastStep

SCOPE = Option(
    "scope",
    Annotated[Literal["model", "tensor"], Field(description="whose largest entries are kept")],
    "model",
)
P = ParamSpec("P")
D = TypeVar("D", bound=Delta)


@dataclass(frozen=True)
class Method:
    """``combine(deltas, weights, **options)`` merges the K changes of one weight into one.

    ``of_matrices``: it treats matrices otherwise than other shapes. ``sum_only``: given the weights, the result depends
    on the vectors through their weighted sum alone, so that it is the same over balanced bases, up to the scale.
    ``by_rows``: of large matrices that are tall (algebra.tall) it never holds one as a whole.
    ``in_turn``: of low-rank changes it makes factors that are those of every vector in turn, the left ones times the
    vector's weight, so that while no weight is zero the result is linear in them.
    ``equivariant``: of the changes L M_k R^T, L and R with orthonormal columns, it makes L f(M_k) R^T, however large
    the matrices M_k are.
    """

    name: str
    title: str
    source: str
    combine: Callable[..., Delta]
    of_matrices: bool = False
    sum_only: bool = False
    by_rows: bool = False
    in_turn: bool = False
    equivariant: bool = False

    @property
    def summary(self) -> str:
        """The first line of the function's docstring."""
        return (inspect.getdoc(self.combine) or "").partition("\n")[0]

    @cached_property
    def trims(self) -> bool:
        """Whether it keeps the largest entries, of one weight or of the whole model: it takes their ``limits``."""
        return "limits" in inspect.signature(self.combine).parameters

    @cached_property
    def has_side(self) -> bool:
        """Whether it takes the columns of a matrix for other than its rows."""
        return "side" in inspect.signature(self.combine).parameters

    @property
    def own_options(self) -> dict[str, Option]:
        """What may be set of this method."""
        return options_of(self.combine) | ({SCOPE.name: SCOPE} if self.trims else {})

    @property
    def options(self) -> dict[str, Option]:
        """What may be set, the last step included that every merge may have."""
        return self.own_options | {k: step for k, step in options_of(LastStep).items() if k not in self.own_options}

    @property
    def defaults(self) -> dict[str, Any]:
        return {name: option.default for name, option in self.options.items()}

    def checked(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The options as they are used; ParameterError for one that the method does not have, or a bad value."""
        return checked(self.name, self.options, given)

    def of_whole_model(self, options: Mapping[str, Any]) -> float | None:
        """The share of entries to keep, where the thresholds are those of the whole model; else None."""
        complete = self.defaults | dict(options)
        return complete["density"] if self.trims and complete[SCOPE.name] == "model" else None

    def is_by_rows(self, options: Mapping[str, Any]) -> bool:
        """Whether it is with these options; a last step needs the whole."""
        return self.by_rows and not self._last_step(self.checked(options)).changes

    def change(
        self,
        name: str,
        shape: Sequence[int],
        deltas: Sequence[Delta],
        weights: Sequence[float],
        options: Mapping[str, Any],
        *,
        transposed: bool = False,
    ) -> Delta:
        """The merged change of the weight ``name``, [*shape] in the model; ``options`` as checked, and ``limits``.

        To a method of matrices experts in one tensor [E, n, m] are E matrices. ``transposed``: a matrix is stored as
        [in, out], so that its rows are what another's columns are.
        """
        last = self._last_step(options)
        if (self.of_matrices or last.changes) and is_stack(name, shape):
            experts = unstacked(deltas, shape)
            return stacked([self._of_matrix(name, part, weights, options, last, transposed) for part in experts])
        if is_matrix(name, shape):
            return self._of_matrix(name, deltas, weights, options, last, transposed)
        if self.of_matrices:  # the factors of a convolution look like a matrix
            flat = (math.prod(shape),) if len(shape) == 2 else shape
            whole = [reshaped(delta, flat, torch.float32) for delta in deltas]
            return reshaped(self._combined(name, whole, weights, options), shape, work_dtype(whole))
        return self._combined(name, deltas, weights, options)

    def is_linear(self, options: Mapping[str, Any]) -> bool:
        """Whether ``in_turn`` holds with these options."""
        return self.in_turn and not self._last_step(options).changes

    def is_equivariant(self, options: Mapping[str, Any]) -> bool:
        """Whether ``equivariant`` holds with these options.

        Calibration asks about single directions, and a flat spectrum has none of its own: which ones are found depends
        on how the changes are stored.
        """
        return self.equivariant and not (self.of_matrices and self._last_step(options).calibrate != "none")

    def _last_step(self, options: Mapping[str, Any]) -> LastStep:
        return LastStep(**{k: options[k] for k in options_of(LastStep) if k in options and k not in self.own_options})

    def _of_matrix(
        self,
        name: str,
        deltas: Sequence[Delta],
        weights: Sequence[float],
        options: Mapping[str, Any],
        last: LastStep,
        transposed: bool,
    ) -> Delta:
        merged = self._combined(name, deltas, weights, options, transposed)
        return last(merged, deltas, weights) if last.changes else merged

    def _combined(
        self,
        name: str,
        deltas: Sequence[Delta],
        weights: Sequence[float],
        options: Mapping[str, Any],
        transposed: bool = False,
    ) -> Delta:
        if transposed and self.has_side:
            side = options.get("side", self.own_options["side"].default)
            options = {**options, "side": {"row": "column", "column": "row"}.get(side, side)}
        given = {key: options[key] for key in ("limits", *options_of(self.combine)) if key in options}
        try:
            return self.combine(deltas, weights, **given)
        except ParameterError as error:
            raise type(error)(f"{self.name}, {name}: {error}") from error


class Methods(Mapping[str, Method]):
    """All methods by name, in alphabetical order."""

    def __init__(self) -> None:
        self._found: dict[str, Method] = {}
        self._complete = False

    def add(self, method: Method) -> None:
        if method.name in self._found:
            raise ValueError(f"two merging methods are called {method.name}")
        self._found[method.name] = method

    def __getitem__(self, name: str) -> Method:
        return self._all()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._all()))

    def __len__(self) -> int:
        return len(self._all())

    def _all(self) -> dict[str, Method]:
        if not self._complete:
            package = importlib.import_module(__package__ or "")
            for module in pkgutil.iter_modules(package.__path__, f"{__package__}."):
                importlib.import_module(module.name)
            self._complete = True
        return self._found


METHODS = Methods()


def method(
    name: str,
    *,
    title: str,
    source: str = "",
    of_matrices: bool = False,
    sum_only: bool = False,
    by_rows: bool = False,
    in_turn: bool = False,
    equivariant: bool = False,
) -> Callable[[Callable[P, D]], Callable[P, D]]:
    """Declare a function to be the merging method ``name``; ``title`` and ``source`` (an address) are for readers."""

    def declare(function: Callable[P, D]) -> Callable[P, D]:
        METHODS.add(Method(name, title, source, function, of_matrices, sum_only, by_rows, in_turn, equivariant))
        return function

    return declare


def find_method(name: str) -> Method:
    """ParameterError with the nearest known name."""
    if name not in METHODS:
        raise ParameterError(
            f"unknown merging method {name!r}{did_you_mean(name, METHODS)}; known: {', '.join(METHODS)}"
        )
    return METHODS[name]
