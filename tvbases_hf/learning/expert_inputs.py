"""What the experts of a mixture are given where their matrices are one parameter, so that no linear layer is called.

Every product that a model computes is seen while it runs; those with a matrix of such a parameter tell whose inputs its
rows are. DBRX has its matrices one below the other, in two dimensions; what is multiplied tells how many there are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..models.translation import Region, Stored
from .padding import Padding

ATEN = torch.ops.aten
# The rows and the matrix among the arguments of a product.
PRODUCTS: Mapping[Any, slice] = {
    ATEN.mm.default: slice(0, 2), ATEN.bmm.default: slice(0, 2),
    ATEN.addmm.default: slice(1, 3), ATEN.baddbmm.default: slice(1, 3),
}  # fmt: skip
# Where transformers' configurations say how experts are computed.
CHOICE = "_experts_implementation"


@dataclass(frozen=True)
class Inputs:
    """X^T X [in, in] float64 of what a weight is given, [E, in, in] for E matrices; zeros where no row was.

    ``turned``: the weight is stored as [in, out].
    """

    product: Tensor
    turned: bool = False


@dataclass
class _Experts:
    """The matrices of one parameter, each of ``size`` numbers, and the sums of their inputs' products."""

    parameter: Tensor
    size: int
    turned: bool
    products: Tensor  # [E, in, in] float64

    def of(self, stored: Stored) -> Inputs | None:
        """The inputs of a tensor of the files; None of one that is no part of these that has all of their inputs."""
        region = stored.parts[0].inner or Region(tuple(self.parameter.shape), self.parameter.stride())
        if not stored.is_view or region.index is not None:
            return None
        if self.parameter.ndim == 2 and stored.is_whole:
            return Inputs(self.products, self.turned)
        count, width = self.products.shape[:2]
        # From one input to the next: the next number of [out, in], the next row of [in, out].
        along = (width, self.size // width if self.turned else 1)
        sides = [side for side in (-1, -2) if (region.shape[side], region.stride[side]) == along]
        if not sides:
            return None
        if len(region.shape) == 2:
            product = self.products[region.offset // self.size]
            return Inputs(product, sides[0] == -2) if product.any() else None
        all_of_them = len(region.shape) == 3 and (region.shape[0], region.stride[0]) == (count, self.size)
        return Inputs(self.products, sides[0] == -2) if all_of_them else None


class ExpertInputs(TorchDispatchMode):
    """Sums the products of the inputs of ``parameters`` while the model is asked with them.

    Padding does not count: experts are given rows that are gathered from the tokens, by numbers that tell which tokens
    they are. A parameter with rows of which this cannot be told has no inputs here.
    """

    def __init__(self, parameters: Mapping[str, Tensor], padding: Padding) -> None:
        super().__init__()
        self._parameters = {t.untyped_storage().data_ptr(): (name, t) for name, t in parameters.items()}
        self._padding = padding
        self._found: dict[str, _Experts] = {}
        self._untold: set[str] = set()
        self._gathered: Tensor | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in PRODUCTS:
            rows, matrix = args[PRODUCTS[func]]
            owner = self._parameters.get(matrix.untyped_storage().data_ptr())
            if owner is not None:
                self._add(*owner, rows, matrix)
        elif func is ATEN.index.Tensor and args[0].ndim == 2 and len(args[1]) == 1:
            self._gather(args[0], args[1][0])
        return func(*args, **(kwargs or {}))

    def of(self, stored: Stored) -> Inputs | None:
        """What a tensor of the files is given; None of what is no expert's, or had no rows."""
        name = stored.parts[0].parameter
        return self._found[name].of(stored) if name in self._found and name not in self._untold else None

    def _gather(self, tokens: Tensor, index: Tensor) -> None:
        real = self._padding.real()
        if real is not None and index.ndim == 1 and len(tokens) % len(real) == 0:  # k rows of every token, or one
            self._gathered = real.to(index.device).repeat_interleave(len(tokens) // len(real))[index]

    def _add(self, name: str, parameter: Tensor, rows: Tensor, matrix: Tensor) -> None:
        """``rows`` [r, in] times ``matrix`` [in, out], a view of the parameter; or [E, r, in] times [E, in, out]."""
        kept = self._without_padding(rows)
        if name not in self._found:
            size = matrix.numel() if parameter.ndim == 2 else parameter[0].numel()
            products = rows.new_zeros(parameter.numel() // size, rows.shape[-1], rows.shape[-1], dtype=torch.float64)
            self._found[name] = _Experts(parameter, size, matrix.stride(-1) == 1, products)
        experts = self._found[name]
        if kept is None or rows.shape[-1] != experts.products.shape[-1]:
            self._untold.add(name)
            return
        kept = kept.to(torch.float64)
        first = (matrix.storage_offset() - parameter.storage_offset()) // experts.size
        target = experts.products if kept.ndim == 3 else experts.products[first]
        target += kept.mT @ kept

    def _without_padding(self, rows: Tensor) -> Tensor | None:
        real, gathered = self._padding.real(), self._gathered
        if real is None:
            return rows
        if rows.ndim == 3:  # each expert is given every token, zeros for those that are others'
            return rows[:, real.to(rows.device)] if rows.shape[1] == len(real) else None
        if gathered is None:
            return None
        if len(rows) != len(gathered):  # gathered for all experts at once, and split
            start = int(rows.storage_offset()) // rows.shape[-1]
            if rows.untyped_storage().nbytes() != len(gathered) * rows.shape[-1] * rows.element_size():
                return None
            gathered = gathered[start : start + len(rows)]
        return rows[gathered]


@contextlib.contextmanager
def expert_inputs(model: nn.Module, parameters: Mapping[str, Tensor], padding: Padding) -> Iterator[ExpertInputs]:
    """What is in ``of`` at the end, of a model that is asked with ``parameters``; nothing is watched without any."""
    found = ExpertInputs(parameters, padding)
    with _expert_by_expert(model), found if parameters else contextlib.nullcontext():
        yield found


@contextlib.contextmanager
def _expert_by_expert(model: nn.Module) -> Iterator[None]:
    """Experts are asked one after the other, as their class has it; some kernels copy their matrices."""
    owners: list[Any] = [module for module in model.modules() if hasattr(getattr(module, "config", None), CHOICE)]
    before = {id(module.config): (module.config, getattr(module.config, CHOICE)) for module in owners}
    try:
        for config, _ in before.values():
            setattr(config, CHOICE, "eager")
        yield
    finally:
        for config, choice in before.values():  # the outer one first, which sets those within, too
            setattr(config, CHOICE, choice)
