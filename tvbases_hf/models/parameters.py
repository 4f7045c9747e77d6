"""LoRA on parameters (PEFT's target_parameters): matrices, and stacks of experts, wherever they are stored.

PEFT keeps the factors of all E experts side by side: A [E r, in] expert by expert, B [out, r E] component by component.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..algebra.delta import Delta, Dense, LowRank, Stacked, dense
from ..errors import MismatchError, ParameterError
from ..storage.checkpoint import Checkpoint
from .translation import Part, Region, stored_in

INNER = ".base_layer"


@dataclass(frozen=True)
class Parameter:
    """A parameter [n, m] or [E, n, m] that factors change: its ``name`` in memory, the ``module`` that holds it and the
    ``index`` of it there; ``in_out`` for matrices that are stored as [in, out]."""

    name: str
    module: str
    index: int
    shape: tuple[int, ...]
    in_out: bool

    @property
    def experts(self) -> int:
        return self.shape[0] if len(self.shape) == 3 else 1

    @property
    def factor_shapes(self) -> tuple[int, int]:
        """The columns of A, and the rows of B."""
        rows, columns = self.shape[-2:]
        return (rows, columns) if self.in_out else (columns, rows)

    def change(self, a: Tensor, b: Tensor, scaling: float) -> Stacked:
        """[E, n, m] of stored factors A [E r, in] and B [out, r E]."""
        right = a.reshape(self.experts, -1, a.shape[1])
        left = scaling * b.reshape(b.shape[0], -1, self.experts).permute(2, 0, 1)
        return Stacked(right.mT, left.mT) if self.in_out else Stacked(left, right)

    def factors(self, change: Stacked) -> tuple[Tensor, Tensor]:
        """A and B as PEFT stores them."""
        left, right = (change.right.mT, change.left.mT) if self.in_out else (change.left, change.right)
        return right.reshape(-1, right.shape[2]), left.permute(1, 2, 0).reshape(left.shape[1], -1)


@dataclass(frozen=True)
class Place:
    """Which numbers of a parameter a stored tensor holds."""

    parameter: Parameter
    part: Part
    shape: tuple[int, ...]

    def take(self, change: Stacked) -> Delta:
        """The stored tensor's share of the change of the parameter: of one expert low-rank, of several a stack."""
        inner = self.part.inner
        if self.part.outer is None and inner is None:
            return change if len(self.parameter.shape) == 3 else LowRank(change.left[0], change.right[0])
        spans = None if inner is None or self.part.outer is not None else _spans(inner, self.parameter)
        if spans is not None:
            expert, rows, columns, turned = spans
            low = LowRank(change.left[expert, rows], change.right[expert][:, columns])
            return low.T if turned else low
        out = torch.zeros(self.shape)
        whole = dense(change, torch.float32).reshape(self.parameter.shape)
        self.part.put_outer(out, self.part.take_inner(whole))
        return Dense(out)


def parameters_of(model: nn.Module, targets: Sequence[str]) -> dict[str, Parameter]:
    """The parameters that PEFT would wrap, by the module under which it stores their factors.

    Of several in one module PEFT puts a wrapper around a wrapper, in the order of the parameters, so that the last is
    the outermost.
    """
    found = {}
    for module, held in model.named_modules():
        every = [name for name, _ in held.named_parameters(recurse=False)]
        names = [name for name in every if _is_target(f"{module}.{name}", targets)]
        for place, name in enumerate(names):
            shape = tuple(getattr(held, name).shape)
            in_out = len(shape) == 3 and bool(getattr(held, "is_transposed", False))
            stored = stored_module(module, place, len(names))
            found[stored] = Parameter(f"{module}.{name}", module, every.index(name), shape, in_out)
    return found


def check_factors(label: str, parameter: Parameter, found: Mapping[str, tuple[int, ...]], rank: int, base: str) -> None:
    """MismatchError unless an adapter's factors of a parameter, by part, have the shapes that its rank makes."""
    (columns, rows), size = parameter.factor_shapes, rank * parameter.experts
    if found != {"lora_A": (size, columns), "lora_B": (rows, size)}:
        raise MismatchError(
            f'"{label}": the factors of {parameter.name} are '
            + ", ".join(f"{part} {list(shape)}" for part, shape in found.items())
            + f", where its shape {list(parameter.shape)} in the base ({base}) and adapter_config.json make "
            f"lora_A {[size, columns]}, lora_B {[rows, size]}; give the base it was trained on"
        )


def places_in(base: Checkpoint, parameters: Sequence[Parameter], model: nn.Module | None) -> dict[str, Place]:
    """Where a checkpoint stores parameters, by its own names.

    Args:
        model: of the class that the names of the parameters are from; None where they are those of ``base``.
    """
    named = {parameter.name: parameter for parameter in parameters}
    if model is None:
        own = {name: named[name] for name in base.tensors if name in named}
        return {name: Place(parameter, Part(name), parameter.shape) for name, parameter in own.items()}
    found = {}
    for name, stored in stored_in(model, base.tensors).items():
        first = next((part for part in stored.parts if part.parameter in named), None)
        if first is None:
            continue
        if len(stored.parts) > 1 or stored.shape != base.tensors[name].shape:
            raise MismatchError(f"{name} holds {first.parameter} and others, of which factors cannot be told apart")
        found[name] = Place(named[first.parameter], first, stored.shape)
    return found


def stored_module(module: str, index: int, count: int) -> str:
    """What PEFT calls the wrapper of the parameter ``index`` of the ``count`` that it wraps in one module."""
    return module + INNER * (count - 1 - index)


def assembled(places: Mapping[str, Place], changes: Mapping[str, Delta]) -> dict[Parameter, Stacked]:
    """The changes of parameters of those of the stored tensors: low-rank ones and stacks of them.

    Raises ParameterError for other changes.
    """
    pieces: dict[Parameter, list[list[tuple[slice, slice, LowRank]]]] = {}
    for name, delta in changes.items():
        place = places[name]
        parameter = place.parameter
        by_expert = pieces.setdefault(parameter, [[] for _ in range(parameter.experts)])
        for expert, rows, columns, low in _pieces(name, delta, place):
            by_expert[expert].append((rows, columns, low))
    return {parameter: _stack(parameter, by_expert) for parameter, by_expert in pieces.items()}


def _pieces(name: str, delta: Delta, place: Place) -> list[tuple[int, slice, slice, LowRank]]:
    whole = slice(None)
    if place.part.inner is None and delta.parts is not None:
        return [(expert, whole, whole, low) for expert, low in enumerate(delta.parts)]
    if (low := delta.factors) is not None:
        if place.part.inner is None:
            return [(0, whole, whole, low)]
        spans = None if place.part.outer is not None else _spans(place.part.inner, place.parameter)
        if spans is not None:
            expert, rows, columns, turned = spans
            return [(expert, rows, columns, low.T if turned else low)]
    raise ParameterError(f"the change of {name} has no factors that PEFT could keep; write a full checkpoint")


def _stack(parameter: Parameter, by_expert: Sequence[Sequence[tuple[slice, slice, LowRank]]]) -> Stacked:
    """Each expert's pieces in one pair of factors, a right factor that two share once; padded to one rank."""
    n, m = parameter.shape[-2:]
    pairs = []
    for pieces in by_expert:
        lefts: list[tuple[Tensor, Tensor]] = []
        for rows, columns, low in pieces:
            right = torch.zeros(low.rank, m)
            right[:, columns] = low.right.float()
            known = next((left for left, other in lefts if torch.equal(other, right)), None)
            if known is None:
                known = torch.zeros(n, low.rank)
                lefts.append((known, right))
            known[rows] += low.left.float()
        pairs.append(lefts)
    rank = max(1, *(sum(left.shape[1] for left, _ in lefts) for lefts in pairs))
    stacked = Stacked(torch.zeros(parameter.experts, n, rank), torch.zeros(parameter.experts, rank, m))
    for expert, lefts in enumerate(pairs):
        start = 0
        for left, right in lefts:
            stop = start + left.shape[1]
            stacked.left[expert, :, start:stop], stacked.right[expert, start:stop] = left, right
            start = stop
    return stacked


def _spans(region: Region, parameter: Parameter) -> tuple[int, slice, slice, bool] | None:
    """The expert, the rows and the columns of its matrix that a two-dimensional region is, and whether it is turned."""
    n, m = parameter.shape[-2:]
    if region.index is not None or len(region.shape) != 2:
        return None
    expert, inside = divmod(region.offset, n * m)
    row, column = divmod(inside, m)
    (height, width), (down, right) = region.shape, region.stride
    turned = down < m <= right
    if turned:
        (height, width), (down, right) = (width, height), (right, down)
    if down % m or right >= m or right < 1:
        return None
    rows = slice(row, row + (height - 1) * (down // m) + 1, max(1, down // m))
    return expert, rows, slice(column, column + (width - 1) * right + 1, right), turned


def _is_target(name: str, targets: Sequence[str]) -> bool:
    return any(name == target or name.endswith(f".{target}") for target in targets)
