"""The constructions: what turns a Gram matrix into bases, each declared once, by a decorator over a typed function.

Every module of this folder is imported with it, so that a new construction is a new file. What Python's checks, the
YAML, the command line and the guides know of a construction they read here.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any, TypeVar

from torch import Tensor

from ..options import Option, checked, options_of
from .weights import BasisWeights, resolve_num_bases

Function = TypeVar("Function", bound=Callable[..., BasisWeights])


def _anything(**options: Any) -> None:
    """All options go together."""


def _as_many(num_bases: float | None, num_tasks: int) -> tuple[int, int]:
    number = resolve_num_bases(num_bases, num_tasks)
    return number, number


@dataclass(frozen=True)
class Construction:
    """One way from a Gram matrix to bases.

    ``name`` is what Python and the command line call it, ``yaml`` what a mergekit YAML does. ``counts(num_bases,
    num_tasks)``: how few and how many bases may come out. ``has_mean``: a mean vector is stored beside the bases.
    """

    name: str
    yaml: str
    title: str
    paper: str
    function: Callable[..., BasisWeights]
    rule: Callable[..., object] = _anything
    counts: Callable[[float | None, int], tuple[int, int]] = _as_many
    has_mean: bool = False

    @cached_property
    def options(self) -> dict[str, Option]:
        return options_of(self.function)

    @property
    def summary(self) -> str:
        """The first line of the function's docstring."""
        return (inspect.getdoc(self.function) or "").partition("\n")[0]

    @property
    def num_bases(self) -> float | None:
        """How many bases are made where no number is given; None: the construction chooses."""
        return inspect.signature(self.function).parameters["num_bases"].default

    def checked(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """What was given, each option checked by itself, and whether all go together. Raises ParameterError."""
        given = checked(self.name, self.options, options)
        self.rule(**self.complete(given))
        return given

    def complete(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """What was given, and the default of every other option: what is used, and so what is recorded."""
        return {name: option.default for name, option in self.options.items()} | dict(options)

    def solve(self, gram: Tensor, num_bases: float | None = None, **options: Any) -> BasisWeights:
        """Encoder and decoder from the T x T Gram matrix; without a number of bases, as many as ``num_bases`` says."""
        return self.function(gram, self.num_bases if num_bases is None else num_bases, **self.checked(options))


_found: dict[str, Construction] = {}
CONSTRUCTIONS: Mapping[str, Construction] = MappingProxyType(_found)


def construction(name: str, yaml: str, title: str, paper: str, **more: Any) -> Callable[[Function], Function]:
    """Register ``function(gram, num_bases, *, options)``; its options are checked in direct calls as well.

    Args:
        more: ``rule(**options)``, which raises ParameterError for options that do not go together; ``counts`` and
            ``has_mean`` as in Construction.
    """

    def register(function: Function) -> Function:
        found = _found[name] = Construction(name, yaml, title, paper, function, **more)

        @functools.wraps(function)
        def solve(gram: Tensor, *num_bases: Any, **given: Any) -> BasisWeights:
            number = {"num_bases": given.pop("num_bases")} if "num_bases" in given else {}
            return function(gram, *num_bases, **number, **found.checked(given))

        return solve  # type: ignore[return-value]

    return register
