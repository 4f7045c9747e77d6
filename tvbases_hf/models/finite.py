"""Whether what models hold of a weight is finite: which of them spoils a change is said by name."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..algebra.finite import count_not_finite, is_finite
from ..errors import CheckpointError
from ..storage.checkpoint import Checkpoint


def finite_values(name: str, labels: Sequence[str], values: Sequence[Tensor]) -> list[Tensor]:
    """One weight of several models, finite. An infinity that all of them hold at one place (a mask) is no change: 0.

    Raises CheckpointError for any other infinity and for NaN; the first label, the base's, is blamed first.
    """
    if all(map(is_finite, values)):
        return list(values)
    first = values[0].to(torch.float64)
    masked = torch.isinf(first)
    for other in values[1:]:
        masked &= other.to(torch.float64) == first
    agreed = torch.where(masked, first, torch.zeros_like(first))
    for label, tensor in zip(labels, values, strict=True):
        if bad := count_not_finite(tensor, agreed):
            raise not_finite_in(label, name, bad, tensor.numel())
    return [tensor.to(torch.float64).masked_fill(masked, 0.0).to(tensor.dtype) for tensor in values]


def not_finite_in(label: str, name: str, bad: int, total: int) -> CheckpointError:
    """What to say of a tensor of a model that holds such numbers."""
    return CheckpointError(
        f'"{label}": tensor {name} holds {bad} NaN or infinite numbers of {total}; '
        "the training run diverged or the file is damaged: use an earlier checkpoint"
    )


def read_finite(checkpoint: Checkpoint, name: str) -> Tensor:
    """A stored tensor; CheckpointError for NaN and infinity in it."""
    tensor = checkpoint.read(name)
    if bad := count_not_finite(tensor):
        raise not_finite_in(checkpoint.label, name, bad, tensor.numel())
    return tensor
