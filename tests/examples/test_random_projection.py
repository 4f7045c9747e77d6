"""RandProj: orthonormal directions that need not be stored, and how little of the task vectors is in them."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from oracles.grams import EPS, error, gram_of, task_matrix
from tvbases_hf.bases import ae_bases

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "benchmarks"))

from text.projection import rand_proj


def test_random_projection_is_orthonormal_and_gives_the_coefficients_of_all_tasks() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = {"a": 50, "b": 7, "c": 200}
    parts = {name: torch.randn(4, size, generator=generator, dtype=torch.float64) for name, size in sizes.items()}
    vectors = torch.cat(list(parts.values()), dim=1).T
    found = rand_proj(parts.items(), 5, seed=3)

    directions = torch.cat([found.columns(name, size) for name, size in sizes.items()])
    tolerance = 1e3 * EPS
    assert torch.allclose(directions.T @ directions, torch.eye(5, dtype=torch.float64), rtol=0, atol=tolerance)
    assert torch.allclose(found.coefficients, directions.T @ vectors, rtol=0, atol=tolerance * float(vectors.norm()))
    rebuilt = torch.cat([found.reconstruct(name, size) for name, size in sizes.items()], dim=1).T
    assert torch.allclose(rebuilt, directions @ directions.T @ vectors, rtol=0, atol=tolerance * float(vectors.norm()))

    backwards = rand_proj(list(parts.items())[::-1], 5, seed=3)
    assert torch.allclose(backwards.coefficients, found.coefficients, rtol=0, atol=tolerance * float(vectors.norm()))
    assert not torch.allclose(rand_proj(parts.items(), 5, seed=4).coefficients, found.coefficients)


def test_random_directions_miss_what_autoencoder_bases_keep() -> None:
    matrix = torch.cat([task_matrix("clustered", 10), torch.zeros(970, 10, dtype=torch.float64)])
    found = rand_proj([("all", matrix.T)], 3)
    missed = error(torch.eye(1000, dtype=torch.float64), torch.eye(1000, dtype=torch.float64))  # 0: the oracle's sanity
    rebuilt = found.reconstruct("all", 1000).T
    random = float((rebuilt - matrix).square().sum() / matrix.square().sum())
    ours = ae_bases(gram_of(matrix), 3)
    assert missed == 0
    assert random > 0.98  # a random 3-dimensional subspace of 1000 dimensions holds 0.3 % of anything
    assert ours.loss / ours.total < 0.1
