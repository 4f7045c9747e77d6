"""mergekit's merge methods on changes of weights: in factors where the mathematics allows, else one dense weight."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from mergekit.merge_methods.base import MergeMethod, ParameterScope
from mergekit.merge_methods.generalized_task_arithmetic import GeneralizedTaskArithmeticMerge
from torch import Tensor

from tvbases_hf.algebra.delta import Delta, Dense, dense, reshaped, work_dtype
from tvbases_hf.algebra.sums import mix, scale, total
from tvbases_hf.errors import ParameterError
from tvbases_hf.methods.sums import task_arithmetic

from .layerwise import LayerwiseMerge
from .methods import BasisMerge, is_plain_sum, merge_vectors
from .preflight import check_basis_parameters
from .sources import GroupGram
from .streamed import Pieces, can_stream, streamed

Settings = Mapping[str, Any]
_DRAWING = threading.Lock()
LINEAR = "linear"


def check_native(method: MergeMethod, bound: Mapping[str, Settings]) -> None:
    """Raise ParameterError for a method or an inner method which has no form on changes, and for parameters it refuses.

    ``bound`` are the parameters of every tensor.
    """
    own = (BasisMerge, LayerwiseMerge, GeneralizedTaskArithmeticMerge)
    if not isinstance(method, own) and method.spec.name != LINEAR:
        raise ParameterError(not_native(f"merge_method: {method.spec.name}"))
    if isinstance(method, LayerwiseMerge):
        for parameters in bound.values():
            method.check(parameters)
    if isinstance(method, BasisMerge):
        check_basis_parameters(method, bound)
        for parameters in bound.values():
            inner = method.inner(parameters)
            if inner.spec.contract.max_inputs is not None:  # it compares weights as such, not their changes
                raise ParameterError(not_native(f"merge: {inner.spec.name}"))


def not_native(what: str) -> str:
    return f"{what} is not done on changes of weights; `tvbases mergekit-yaml CONFIG OUT` merges whole models with it"


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


def merged_bases(
    method: BasisMerge, deltas: Sequence[Delta], bound: Settings, gram: GroupGram, weight: Weight
) -> Delta:
    """lambda * inner(vectors), the vectors being bases or reconstructions: sums of changes, mixed in their factors."""
    inner, mixing, passed = method.prepare(gram, range(len(deltas)), bound)
    vectors = mix(deltas, mixing)
    return scale(merged(inner, vectors, _complete(inner, passed, len(vectors)), weight), bound["lambda"])


def merged(method: MergeMethod, deltas: Sequence[Delta], settings: Settings, weight: Weight) -> Delta:
    """What a method that needs a base adds to it.

    Args:
        deltas: the changes of one weight.
        settings: every parameter: one value, or one per change in their order.
    """
    match method:
        case LayerwiseMerge():
            # A method for matrices must see that a convolution is none.
            known = [d if len(weight.shape) == 2 else reshaped(d, weight.shape, torch.float32) for d in deltas]
            parts = method.change(known, list(settings["weight"]), settings, weight.name)
            return scale(total([part for _, part in parts], [factor for factor, _ in parts]), settings["lambda"])
        case _ if is_plain_sum(method):
            weights, alpha = settings["weight"], settings["lambda"]
            return task_arithmetic(deltas, weights, normalize=settings["normalize"], alpha=alpha)
        case _:
            vectors = [dense(delta, work_dtype(deltas)).reshape(weight.shape) for delta in deltas]
            # What is drawn comes from the one global generator.
            with _DRAWING, torch.random.fork_rng([vectors[0].device] if vectors[0].is_cuda else []):
                torch.manual_seed(weight.own_seed)
                return Dense(merge_vectors(method, vectors[0], vectors, settings))


def streams(method: MergeMethod, parameters: Settings) -> bool:
    """Whether the method, or the inner one of bases, can do with a piece of every model in memory."""
    return can_stream(method.inner(parameters) if isinstance(method, BasisMerge) else method)


def streamed_bases(
    method: BasisMerge, deltas: Sequence[Dense], bound: Settings, gram: GroupGram, weight: Weight
) -> Iterator[Tensor]:
    """The same as merged_bases for an inner method that can be streamed, in pieces."""
    inner, mixing, passed = method.prepare(gram, range(len(deltas)), bound)
    settings = _complete(inner, passed, mixing.shape[1])
    return streamed(inner, Pieces(deltas, mixing), settings, weight.own_seed, bound["lambda"])


def _complete(method: MergeMethod, given: Settings, count: int) -> dict[str, Any]:
    """Every parameter of the method: as given, else its default."""
    found = {}
    for spec in method.spec.parameters:
        value = given.get(spec.name, spec.default)
        shared = spec.scope == ParameterScope.SHARED
        found[spec.name] = value if shared or isinstance(value, list) else [value] * count
    return found
