"""Matrices with known properties for the tests of the linear algebra, and a record of what an operation allocates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

EPS = torch.finfo(torch.float32).eps


def gaussian(seed: int, *shape: int) -> Tensor:
    """[*shape] independent standard normal numbers, float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthonormal(seed: int, rows: int, columns: int) -> Tensor:
    """[rows, columns] random orthonormal columns, float64."""
    return torch.linalg.qr(gaussian(seed, rows, columns)).Q


def with_spectrum(seed: int, rows: int, columns: int, values: Tensor | Sequence[float]) -> Tensor:
    """[rows, columns] with these singular values (at most min(rows, columns) of them), float64."""
    values = torch.as_tensor(values, dtype=torch.float64)
    return (orthonormal(seed, rows, len(values)) * values) @ orthonormal(seed + 7919, columns, len(values)).T


def with_gap(seed: int, rows: int, columns: int, rank: int, gap: float = 0.1) -> Tensor:
    """Decaying singular values that fall by the factor ``gap`` after the first ``rank``."""
    index = torch.arange(min(rows, columns), dtype=torch.float64)
    values = (1 + index) ** -0.5
    return with_spectrum(seed, rows, columns, torch.where(index < rank, values, gap * values))


def relative(found: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference, relative to what was expected; float64."""
    expected = expected.to(torch.float64)
    return float((found.to(torch.float64) - expected).norm() / expected.norm())


def is_orthonormal(columns: Tensor, tolerance: float = 20 * EPS) -> bool:
    """Whether X^T X is the identity, entry by entry; the default allows for float32 vectors of unit norm."""
    exact = columns.to(torch.float64)
    return bool(((exact.T @ exact - torch.eye(columns.shape[1], dtype=torch.float64)).abs() <= tolerance).all())


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that any operation inside the block returned."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for part in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(part, Tensor):
                bytes_of_floats = 4 if part.dtype == torch.uint8 else 1  # as they are written to a file
                self.numbers = max(self.numbers, part.numel() // bytes_of_floats)
        return result
