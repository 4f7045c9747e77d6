"""Task-vector matrices of known kinds, d x T in float64, for tests that need no models."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from torch import Tensor

EPS = torch.finfo(torch.float64).eps
REPOSITORY = Path(__file__).resolve().parents[2]

# The kinds that ``task_matrix`` makes, each with the property that its name says.
KINDS = (
    "independent",
    "nearly_orthogonal",
    "clustered",
    "low_rank",
    "common_direction",
    "opposed",
    "scaled",
    "badly_scaled",
)


def task_matrix(kind: str, num_tasks: int, seed: int = 0) -> Tensor:
    """[3T, T] columns are task vectors."""
    generator = torch.Generator().manual_seed(seed)
    rows = 3 * num_tasks

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    match kind:
        case "independent":
            return normal(rows, num_tasks)
        case "nearly_orthogonal":
            norms = 1 + 0.1 * torch.rand(num_tasks, generator=generator, dtype=torch.float64)
            return torch.linalg.qr(normal(rows, num_tasks)).Q * norms + 0.01 * normal(rows, num_tasks) / rows**0.5
        case "clustered":
            clusters = max(2, num_tasks // 5)
            return normal(rows, clusters)[:, torch.arange(num_tasks) % clusters] + 0.3 * normal(rows, num_tasks)
        case "low_rank":
            rank = max(1, num_tasks // 3)
            return normal(rows, rank) @ normal(rank, num_tasks)
        case "common_direction":
            return 3 * normal(rows, 1) + normal(rows, num_tasks)
        case "opposed":
            signs = 1.0 - 2 * (torch.arange(num_tasks) % 2)
            return 3 * normal(rows, 1) * signs + normal(rows, num_tasks)
        case "scaled":
            return normal(rows, num_tasks) * torch.logspace(-0.5, 0.5, num_tasks, dtype=torch.float64)
        case "badly_scaled":
            return normal(rows, num_tasks) * torch.logspace(-3, 3, num_tasks, dtype=torch.float64)
    raise ValueError(kind)


def gram_of(matrix: Tensor) -> Tensor:
    """[T, T] inner products of the columns."""
    return matrix.T @ matrix


def real_gram() -> Tensor | None:
    """The 12 x 12 Gram matrix of real fine-tunes, where the data lie beside the repository or in TVBASES_DATA."""
    folder = os.environ.get("TVBASES_DATA")
    found = [Path(folder)] if folder else [file.parent for file in REPOSITORY.parent.glob("*/data/gram12.json")]
    file = found[0] / "gram12.json" if found else None
    if file is None or not file.is_file():
        return None
    return torch.tensor(json.loads(file.read_text(encoding="utf-8"))["G"], dtype=torch.float64)


def fine_tunes_gram() -> Tensor:
    """The real Gram matrix, or one like it: twelve tasks of about equal length, five of them a little alike."""
    real = real_gram()
    if real is not None:
        return real
    cosines = torch.full((12, 12), 0.008, dtype=torch.float64)
    alike = torch.tensor([0, 1, 2, 10, 11])
    cosines[alike[:, None], alike] = torch.tensor(
        [
            [0, 0.07, 0.11, 0.14, 0.08],
            [0.07, 0, 0.07, 0.07, 0.04],
            [0.11, 0.07, 0, 0.27, 0.25],
            [0.14, 0.07, 0.27, 0, 0.19],
            [0.08, 0.04, 0.25, 0.19, 0],
        ],
        dtype=torch.float64,
    )
    cosines.fill_diagonal_(1)
    norms = 1.8 + 0.02 * torch.tensor([0, -2, 0, -1, 5, 1, 3, -18, 0, 12, -1, 1], dtype=torch.float64)
    return cosines * torch.outer(norms, norms)


def root(gram: Tensor) -> Tensor:
    """[T, T] vectors that have this Gram matrix, so that oracles can work on vectors and not on G."""
    values, vectors = torch.linalg.eigh(gram)
    return values.clamp_min(0).sqrt()[:, None] * vectors.T


def tail(matrix: Tensor, kept: int) -> float:
    """Squared error of the best approximation of these columns by ``kept`` directions (Eckart-Young)."""
    return float(torch.linalg.svdvals(matrix)[kept:].square().sum())


def without_direction(matrix: Tensor, weights: Tensor) -> Tensor:
    """The columns with the direction of their weighted sum projected out."""
    direction = matrix @ weights
    direction = direction / direction.norm()
    return matrix - torch.outer(direction, direction @ matrix)


def error(matrix: Tensor, reconstruction: Tensor, scale: Tensor | None = None) -> float:
    """Sum over tasks of scale_i |T R_i - T_i|^2, from the vectors themselves."""
    squares = (matrix @ reconstruction - matrix).square().sum(dim=0)
    return float((squares if scale is None else squares * scale).sum())


def loss_tolerance(gram: Tensor) -> float:
    """Rounding of Tr(E^T G E): T^2 products of G's entries with those of E, whose decoder reaches about a hundred."""
    return 100 * EPS * len(gram) * float(gram.trace())
