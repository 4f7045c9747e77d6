"""mergekit's merge methods on changes of weights, one kernel each: in factors where the mathematics allows.

``combine`` gives the merged change of one weight; ``pieces`` the same of full checkpoints, with a piece of every model
in memory, where the kernel ``streams``. What to expect of the last bits: a sum of adapters, and whatever tvbases_hf
does itself, is exact up to one rounding, as in Python. What mergekit defines (task arithmetic, TIES, DARE of full
models) is computed in float32 at least and rounded again when it is stored; as mergekit does with ``dtype: float32``,
while without it mergekit computes in the models' own dtype, in bfloat16 too.
"""

from __future__ import annotations

import threading
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from mergekit.common import ModelReference
from mergekit.merge_methods.base import MergeMethod, ParameterScope
from mergekit.merge_methods.generalized_task_arithmetic import GeneralizedTaskArithmeticMerge
from torch import Tensor

from tvbases_hf.algebra.delta import Delta, Dense, dense, work_dtype
from tvbases_hf.algebra.sums import mix, scale
from tvbases_hf.errors import ParameterError
from tvbases_hf.methods.sums import base_share, linear, linear_shares, normalized, task_arithmetic
from tvbases_hf.storage.checkpoint import Checkpoint

from .methods import BasisMerge, is_plain_sum, merge_vectors
from .preflight import check_basis_parameters, check_together
from .registered import RegisteredMerge
from .sources import Models
from .streamed import Pieces, can_stream, streamed, weighted

Settings = Mapping[str, Any]
_DRAWING = threading.Lock()
LINEAR = "linear"


@dataclass(frozen=True)
class Weight:
    """A weight that is merged: its name and shape in the base, and the seed of the whole merge."""

    name: str
    shape: tuple[int, ...]
    seed: int = 0

    @property
    def own_seed(self) -> int:
        """Of what a method draws for this weight: a merge can be repeated, in any order of its weights."""
        return zlib.crc32(f"{self.seed} {self.name}".encode())


class Kernel(ABC):
    """A method on the changes of one weight; ``settings`` hold each of its parameters: one value, or one per change."""

    def prepare(self, settings: Settings) -> None:  # noqa: B027 - most methods need nothing
        """Find once what needs all weights, before the first is merged."""

    @abstractmethod
    def combine(self, deltas: Sequence[Delta], settings: Settings, weight: Weight) -> Delta:
        """What the method adds to the base."""

    def by_rows(self, settings: Settings) -> bool:
        """Whether it needs a block of rows only of a tall matrix."""
        return False

    def streams(self, settings: Settings) -> bool:
        return False

    def pieces(self, vectors: Pieces, settings: Settings, weight: Weight) -> Iterator[Tensor]:
        """The same, flattened, in consecutive pieces of the work's dtype; asked of a kernel that ``streams`` alone."""
        raise NotImplementedError


class Sum(Kernel):
    """Task arithmetic, exact where it is not streamed: low-rank changes stay low-rank."""

    def combine(self, deltas: Sequence[Delta], settings: Settings, weight: Weight) -> Delta:
        return task_arithmetic(deltas, settings["weight"], normalize=settings["normalize"], alpha=settings["lambda"])

    def streams(self, settings: Settings) -> bool:
        return True

    def pieces(self, vectors: Pieces, settings: Settings, weight: Weight) -> Iterator[Tensor]:
        shares = torch.tensor(normalized(settings["weight"], settings["normalize"]), dtype=torch.float64)
        yield from weighted(vectors, shares, settings["lambda"])


@dataclass(frozen=True)
class Whole(Kernel):
    """Any other method of mergekit, by its own code on whole tensors."""

    method: MergeMethod

    def combine(self, deltas: Sequence[Delta], settings: Settings, weight: Weight) -> Delta:
        vectors = [dense(delta, work_dtype(deltas)).reshape(weight.shape) for delta in deltas]
        # What is drawn comes from the one global generator.
        with _DRAWING, torch.random.fork_rng([vectors[0].device] if vectors[0].is_cuda else []):
            torch.manual_seed(weight.own_seed)
            return Dense(merge_vectors(self.method, vectors[0], vectors, settings))

    def streams(self, settings: Settings) -> bool:
        return can_stream(self.method)

    def pieces(self, vectors: Pieces, settings: Settings, weight: Weight) -> Iterator[Tensor]:
        return streamed(self.method, vectors, settings, weight.own_seed)


@dataclass(frozen=True)
class Own(Kernel):
    """A method of tvbases_hf."""

    method: RegisteredMerge
    models: Models | None

    def prepare(self, settings: Settings) -> None:
        self._with_limits(settings)

    def combine(self, deltas: Sequence[Delta], settings: Settings, weight: Weight) -> Delta:
        settings = self._with_limits(settings)
        base = None if self.models is None else self.models.vectors.base
        change = self.method.change(weight.name, weight.shape, deltas, list(settings["weight"]), settings, base)
        return scale(change, settings["lambda"])

    def by_rows(self, settings: Settings) -> bool:
        return self.method.by_rows(settings)

    def _with_limits(self, settings: Settings) -> Settings:
        density = self.method.density(settings)
        if density is None or "limits" in settings:
            return settings
        assert self.models is not None  # over bases the limits are given
        return {**settings, "limits": self.models.limits(density)}


@dataclass(frozen=True)
class OverBases(Kernel):
    """lambda * inner(vectors), the vectors being bases or reconstructions: sums of changes, mixed in their factors."""

    method: BasisMerge
    models: Models

    def prepare(self, settings: Settings) -> None:
        self.method.prepare(self.models, range(len(self.models.ids)), settings)

    def combine(self, deltas: Sequence[Delta], settings: Settings, weight: Weight) -> Delta:
        kernel, mixing, inner = self._inner(settings)
        return scale(kernel.combine(mix(deltas, mixing), inner, weight), settings["lambda"])

    def streams(self, settings: Settings) -> bool:
        return kernel_of(self.method.inner(settings)).streams({})

    def pieces(self, vectors: Pieces, settings: Settings, weight: Weight) -> Iterator[Tensor]:
        kernel, mixing, inner = self._inner(settings)
        for part in kernel.pieces(Pieces(vectors.deltas, mixing), inner, weight):
            yield settings["lambda"] * part

    def _inner(self, settings: Settings) -> tuple[Kernel, Tensor, Settings]:
        inner, mixing, given = self.method.prepare(self.models, range(len(self.models.ids)), settings)
        limits = {"limits": given["limits"]} if "limits" in given else {}
        return kernel_of(inner, self.models), mixing, _complete(inner, given, mixing.shape[1]) | limits


@dataclass(frozen=True)
class Linear(Kernel):
    """The weighted mean of models, as what it adds to ``base``, which may be one of them: ``reference``."""

    base: Checkpoint
    reference: ModelReference

    def combine(self, deltas: Sequence[Delta], settings: Settings, weight: Weight) -> Delta:
        weights, own = self._weights(settings)
        base = self.base.read(weight.name) if self.moves_base(settings) else None
        return linear(deltas, weights, base_weight=own, normalize=settings["normalize"], base=base)

    def streams(self, settings: Settings) -> bool:
        return True

    def pieces(self, vectors: Pieces, settings: Settings, weight: Weight) -> Iterator[Tensor]:
        shares, rest = linear_shares(*self._weights(settings), settings["normalize"])
        read = (delta.base for delta in vectors.deltas if delta.base is not None)
        own = next(read, None)  # of a quantised base every reading is another copy
        whole = Dense(self.base.read(weight.name).to(vectors.device) if own is None else own)
        everyone = torch.tensor([*shares, rest], dtype=torch.float64)
        yield from weighted(Pieces([*vectors.deltas, whole]), everyone, 1.0)

    def moves_base(self, settings: Settings) -> bool:
        """Whether the base itself is scaled, in weights too that no model changes."""
        return base_share(list(settings["weight"].values()), settings["normalize"]) != 0

    def _weights(self, settings: Settings) -> tuple[list[float], float]:
        weights = dict(settings["weight"])
        own = weights.pop(self.reference, 0.0)
        return list(weights.values()), own


def kernel_of(method: MergeMethod, models: Models | None = None) -> Kernel:
    """The kernel of a method that takes a base; ``models`` for those that need whole models."""
    if isinstance(method, BasisMerge):
        assert models is not None
        return OverBases(method, models)
    if isinstance(method, RegisteredMerge):
        return Own(method, models)
    return Sum() if is_plain_sum(method) else Whole(method)


def check_native(method: MergeMethod, bound: Mapping[str, Settings]) -> None:
    """Raise ParameterError for a method or an inner method which has no form on changes, and for parameters it refuses.

    ``bound`` are the parameters of every tensor.
    """
    own = (BasisMerge, RegisteredMerge, GeneralizedTaskArithmeticMerge)
    if not isinstance(method, own) and method.spec.name != LINEAR:
        raise ParameterError(not_native(f"merge_method: {method.spec.name}"))
    for parameters in bound.values():
        check_together(method, parameters)
        if isinstance(method, RegisteredMerge):
            method.check(parameters)
    if isinstance(method, BasisMerge):
        check_basis_parameters(method, bound)
        for parameters in bound.values():
            inner = method.inner(parameters)
            if inner.spec.contract.max_inputs is not None:  # it compares weights as such, not their changes
                raise ParameterError(not_native(f"merge: {inner.spec.name}"))


def not_native(what: str) -> str:
    return f"{what} is not done on changes of weights; `tvbases mergekit-yaml CONFIG OUT` merges whole models with it"


def _complete(method: MergeMethod, given: Settings, count: int) -> dict[str, Any]:
    """Every parameter of the method: as given, else its default."""
    found = {}
    for spec in method.spec.parameters:
        value = given.get(spec.name, spec.default)
        shared = spec.scope == ParameterScope.SHARED
        found[spec.name] = value if shared or isinstance(value, list) else [value] * count
    return found
