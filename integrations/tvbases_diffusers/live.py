"""How the mix of one weight follows its scales: with the least work that its method allows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tvbases_hf.algebra.core import Core
from tvbases_hf.algebra.delta import LowRank
from tvbases_hf.styles.mixed_file import factors, rounded
from tvbases_hf.styles.mixing import Part, combine

Scales = Mapping[str, float]
# What float32 holds, in size, the rounding of its largest number to these included.
AS_WIDE = (torch.float32, torch.bfloat16, torch.float64)


class Factors:
    """The weights of an adapter in a layer."""

    def __init__(self, layer: Any, adapter: str) -> None:
        self.first, self.second = layer.lora_A[adapter].weight.data, layer.lora_B[adapter].weight.data


class Remade:
    """A weight whose mix is made anew for other scales: of any method."""

    def __init__(self, part: Part, rank: int) -> None:
        """``rank``: that of the adapter, whatever the scales are."""
        self.part, self.rank = part, rank

    @property
    def name(self) -> str:
        return self.part.place.name

    def change(self, scales: Scales) -> LowRank:
        return combine(self.part, scales, keep_zeros=True)

    def factors(self, scales: Scales) -> dict[str, Tensor]:
        """lora_A and lora_B, float32, by their names in a file."""
        return factors(self.part.place, self.change(scales), torch.float32, self.rank)

    def check(self, scales: Scales, dtype: torch.dtype) -> None:
        """ParameterError where the dtype cannot hold a factor that changes with the scales."""
        change = self.change(scales)
        rounded(self.name, change.left, dtype)
        rounded(self.name, change.right, dtype)

    def rewrite(self, layer: Factors, scales: Scales) -> None:
        """Both factors."""
        for weight, tensor in zip((layer.first, layer.second), self.factors(scales).values(), strict=True):
            weight.copy_(tensor)

    def write(self, layer: Factors, scales: Scales, changed: Set[str]) -> None:
        """What is another at these scales than it was, when those of ``changed`` were others."""
        self.rewrite(layer, scales)

    def forget(self) -> None:
        """Drop what is the same at all scales, once the adapter has it."""


class Summed(Remade):
    """Styles side by side: each has columns of its own in the second factor, which hold its scale."""

    def check(self, scales: Scales, dtype: torch.dtype) -> None:
        for style, change in self.part.changes.items():
            rounded(self.name, change.left * scales[style], dtype)

    def write(self, layer: Factors, scales: Scales, changed: Set[str]) -> None:
        start = 0
        for style, change in self.part.changes.items():
            stop = start + change.rank
            if style in changed:
                place = layer.second[:, start:stop]
                place.copy_((change.left * scales[style]).reshape(place.shape))
            start = stop


class Turned(Remade):
    """A method that turns with its matrices: merged in the styles' joint spaces, where the matrices are small.

    The change is L f(M) R^T with L and R of no scale. The factor of the longer side is the same at all scales, and
    kept nowhere but in the adapter, once it is there; the shorter one takes a single product.
    """

    def __init__(self, part: Part, rank: int) -> None:
        super().__init__(part, rank)
        core = Core.of(list(part.changes.values()), [1.0] * len(part.changes))
        rows, columns = part.place.shape
        self.matrices = dict(zip(part.changes, core.matrices, strict=True))
        self.left_moves = rows <= columns
        left, right = _basis(core.left, rows), _basis(core.right, columns)
        self.moving, self.fixed = (left, right) if self.left_moves else (right, left)
        self.made: tuple[dict[str, float], Tensor] | None = None

    def forget(self) -> None:
        """The factor of the longer side."""
        del self.fixed

    def change(self, scales: Scales) -> LowRank:
        moved = self._moved(scales)
        return LowRank(moved, self.fixed.T) if self.left_moves else LowRank(self.fixed, moved.T)

    def check(self, scales: Scales, dtype: torch.dtype) -> None:
        """Of a dtype as wide as float32 by lengths in the merged matrix, which no entry of the product is above."""
        if dtype in AS_WIDE:
            lengths = self._merged(scales).to(torch.float64).norm(dim=0 if self.left_moves else 1)
            rounded(self.name, lengths, dtype)
        else:
            rounded(self.name, self._moved(scales), dtype)

    def rewrite(self, layer: Factors, scales: Scales) -> None:
        self.write(layer, scales, set(self.matrices))

    def write(self, layer: Factors, scales: Scales, changed: Set[str]) -> None:
        moved = self._moved(scales)
        count = moved.shape[1]
        place = layer.second[:, :count] if self.left_moves else layer.first[:count]
        place.copy_((moved if self.left_moves else moved.T).reshape(place.shape))

    def _moved(self, scales: Scales) -> Tensor:
        merged = self._merged(scales)
        return self.moving @ (merged if self.left_moves else merged.T)

    def _merged(self, scales: Scales) -> Tensor:
        """Kept for the scales that were asked last: they are checked before they are written."""
        own = {style: scales[style] for style in self.matrices}
        if self.made is None or self.made[0] != own:
            assert self.part.method is not None
            self.made = own, self.part.method.in_core(self.name, self.matrices, own)
        return self.made[1]


def live(part: Part, scales: Scales, rank: int) -> Remade:
    """The weight as it follows its scales; of a linear method for all that leave out the same styles as these."""
    method = part.method
    if method is None:
        return Summed(part, rank)
    if (terms := method.terms(part.place.name, part.changes, scales)) is not None:
        return Summed(replace(part, changes=terms, method=None), rank)
    return (Turned if method.method.is_equivariant(method.options) else Remade)(part, rank)


def are_finite(modules: Iterable[nn.Module]) -> bool:
    """Whether all weights are, asked once per device: an accelerator's answers are waited for."""
    found: dict[torch.device, list[Tensor]] = {}
    for tensor in (parameter for module in modules for parameter in module.parameters()):
        found.setdefault(tensor.device, []).append(tensor.isfinite().all())
    return all(bool(torch.stack(answers).all()) for answers in found.values())


def _basis(basis: Tensor | None, side: int) -> Tensor:
    return torch.eye(side) if basis is None else basis.to(torch.float32)
