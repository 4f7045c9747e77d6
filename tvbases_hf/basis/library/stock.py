"""The merged adapter that PEFT loads from a library's directory: the sum of its tasks, cut to a small rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...algebra.delta import LowRank
from ...models.lora_files import adapter_tensors, write_adapter
from ...models.lora_template import Template
from ...storage.checkpoint import Checkpoint
from ..adapters.codec import stock_factors
from ..adapters.lora_vectors import times_alpha
from ..adapters.task import template
from ..info import BasisInfo
from ..parts import AdapterInfo
from .vectors import LibraryVectors

Stock = dict[str, LowRank]
# Columns of the random start beside those that are wanted, and how often it is multiplied with the sum.
EXTRA, STEPS = 8, 3


@dataclass(frozen=True)
class Cut:
    """A sum of factors cut to a rank: what is left, and the squared norms of the whole and of what is lost."""

    change: LowRank
    whole: float
    lost: float


def cut_sum(parts: Sequence[LowRank], rank: int, dtype: torch.dtype) -> Cut:
    """The leading components of a sum of factors, rounded to ``dtype``; exact where the sum's own rank is small."""
    left, right = torch.cat([part.left for part in parts], dim=1), torch.cat([part.right for part in parts])
    if len(right) > min(len(left), right.shape[1]):  # the products of so many factors take more than the matrix
        dense = left @ right
        square = torch.eye(min(dense.shape), dtype=dense.dtype)
        left, right = (square, dense) if len(left) < right.shape[1] else (dense, square)
    whole = float(((left.T @ left).double() * (right @ right.T).double()).sum().clamp_min(0))
    wide = min(rank + EXTRA, *left.shape, right.shape[1])
    generator = torch.Generator().manual_seed(0)
    block = left @ (right @ torch.randn(right.shape[1], wide, generator=generator))
    for _ in range(STEPS):
        block = left @ (right @ (right.T @ (left.T @ torch.linalg.qr(block).Q)))
    basis = torch.linalg.qr(block).Q
    outer, values, inner = torch.linalg.svd((basis.T @ left) @ right, full_matrices=False)
    root = values[:rank].clamp_min(0).sqrt()
    kept = LowRank(((basis @ outer[:, :rank]) * root).to(dtype), (root[:, None] * inner[:rank]).to(dtype))
    stored_left, stored_right = kept.left.double(), kept.right.double()
    cross = ((stored_left.T @ left.double()) * (stored_right @ right.T.double())).sum()
    own = ((stored_left.T @ stored_left) * (stored_right @ stored_right.T)).sum()
    return Cut(kept, whole, max(0.0, whole - 2 * float(cross) + float(own)))


def stock_adapter(
    changes: Mapping[str, LowRank], template: Template, base: Checkpoint, alpha: float, dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and configuration of theta_0 + alpha * (the changes)."""
    tensors, config = adapter_tensors(changes, template, base, dtype)
    return tensors, times_alpha(config, alpha)


def square(change: LowRank) -> float:
    inner, outer = change.left.T @ change.left, change.right @ change.right.T
    return float((inner.double() * outer.double()).sum().clamp_min(0))


def stock_of(source: LibraryVectors) -> Stock:
    """The merged adapter's changes, without its alpha."""
    tensors, found = source.read_stock(), {}
    for name, spec in source.specs.items():
        if any(stored.startswith(f"{spec.prefix}.lora_") for stored in tensors):
            wide = replace(spec, ranks=[min(spec.shape)])
            left, right = stock_factors(tensors.__getitem__, wide)
            found[name] = LowRank(left.to(torch.float32), right.to(torch.float32))
    return found


def merged_with(info: BasisInfo, stock: Stock, changes: Stock, sign: float) -> tuple[Stock, BasisInfo]:
    """The merged adapter with a task more or less, cut to the rank that it has; what it misses adds up."""
    assert info.adapters is not None
    dtype = getattr(torch, info.adapters.dtype)
    found, lost = dict(stock), 0.0
    rank = max((part.left.shape[1] for part in stock.values()), default=1)
    for name, change in changes.items():
        if change.rank:
            parts = [LowRank(sign * change.left, change.right), *([stock[name]] if name in stock else [])]
            cut = cut_sum(parts, rank, dtype)
            found[name] = LowRank(cut.change.left.float(), cut.change.right.float())
            lost += cut.lost
    # What was cut off is orthogonal to what is kept, or nearly: of the whole it is the sine of an angle.
    sine = min(info.adapters.stock_error, 1 - 1e-9)
    before = sine / (1 - sine**2) ** 0.5 * sum(square(part) for part in stock.values()) ** 0.5
    missed, now = before + lost**0.5, sum(square(part) for part in found.values())
    error = missed / (now + missed**2) ** 0.5 if now + missed else 0.0
    return found, replace(info, adapters=replace(info.adapters, stock_error=error))


def write_stock(work: Path, info: BasisInfo, source: LibraryVectors, stock: Stock) -> None:
    adapters: AdapterInfo | None = info.adapters
    assert adapters is not None
    shape: Template = template(adapters, source)
    dtype = getattr(torch, adapters.dtype)
    empty = Checkpoint.from_state_dict({})
    tensors, config = stock_adapter(stock, shape, empty, adapters.alpha, dtype)
    write_adapter(work, tensors, config)
