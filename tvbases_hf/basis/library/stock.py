"""The merged adapter that PEFT loads from a library's directory: the sum of its tasks, cut to a small rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...algebra.delta import LowRank
from ...models.lora_files import adapter_tensors
from ...models.lora_template import Template
from ...storage.checkpoint import Checkpoint
from ..adapters.lora_vectors import times_alpha

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
