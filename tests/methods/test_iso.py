"""Iso-C against the dense singular value decomposition of the sum, and over balanced bases."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tvbases_hf import Vectors, ae_bases, gram_matrix
from tvbases_hf.algebra.delta import Delta, Dense, LowRank, dense
from tvbases_hf.merging.apply import merged
from tvbases_hf.methods.iso import iso_c
from tvbases_hf.storage.checkpoint import Checkpoint

EPS = torch.finfo(torch.float32).eps
ROUNDING = 1e3 * EPS


def gaussian(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def reference(total: Tensor, rank: int) -> Tensor:
    left, values, right = torch.linalg.svd(total.double(), full_matrices=False)
    return values[:rank].mean() * left[:, :rank] @ right[:rank]


def close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).norm() <= ROUNDING * expected.norm())


@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (16, 16)])
def test_all_singular_values_of_the_weighted_sum_become_their_mean(shape: tuple[int, int]) -> None:
    changes, weights = [gaussian(seed, *shape) for seed in range(3)], [1.0, -0.5, 2.0]
    total = sum(weight * change for weight, change in zip(weights, changes, strict=True))
    assert isinstance(total, Tensor)
    found = dense(iso_c([Dense(change) for change in changes], weights))
    assert close(found, reference(total, min(shape)))
    values, before = torch.linalg.svdvals(found), torch.linalg.svdvals(total)
    assert (values - before.mean()).abs().max() <= ROUNDING * before.mean()
    assert before.max() > 2 * before.min()  # they were not equal before


def test_factors_stay_factors_and_agree_with_the_dense_sum() -> None:
    low: list[Delta] = [LowRank(gaussian(seed, 40, 3), gaussian(seed + 9, 3, 30)) for seed in range(4)]
    found, weights = iso_c(low, [1.0, 1.0, 0.5, -1.0]), [1.0, 1.0, 0.5, -1.0]
    assert isinstance(found, LowRank) and found.rank == 12
    total = sum(weight * dense(delta) for weight, delta in zip(weights, low, strict=True))
    assert isinstance(total, Tensor)
    assert close(dense(found), reference(total, 12))
    assert close(dense(found), dense(iso_c([Dense(dense(delta).float()) for delta in low], weights)))


def test_the_nuclear_norm_is_kept() -> None:
    low: list[Delta] = [LowRank(gaussian(seed, 40, 3), gaussian(seed + 9, 3, 30)) for seed in range(2)]
    norm = torch.linalg.svdvals(dense(low[0]) + dense(low[1])).sum()
    assert abs(torch.linalg.svdvals(dense(iso_c(low, [1.0, 1.0]))).sum() - norm) <= ROUNDING * norm


def test_equal_vectors_share_their_directions() -> None:
    delta = LowRank(gaussian(0, 40, 3), gaussian(1, 3, 30))
    assert close(dense(iso_c([delta, delta], [1.0, 1.0])), 2.0 * dense(iso_c([delta], [1.0])))


def test_other_shapes_take_the_weighted_mean() -> None:
    changes = [gaussian(seed, 4, 3, 2, 2) for seed in range(3)]
    found = dense(iso_c([Dense(change) for change in changes], [1.0, -1.0, 2.0]))
    assert close(found, (changes[0].double() - changes[1].double() + 2 * changes[2].double()) / 3)


@pytest.mark.parametrize("num_bases", [1, 2, 3])
def test_over_balanced_bases_it_is_that_of_all_tasks_whatever_their_number(num_bases: int) -> None:
    """What depends on the vectors through their sum alone is exact over balanced bases, up to the scale T / M."""
    base = torch.zeros(24, 16)
    models = {f"task{i}": Checkpoint.from_state_dict({"weight": gaussian(i, 24, 16)}) for i in range(5)}
    tasks = Vectors.of_models(Checkpoint.from_state_dict({"weight": base}), models)
    bases = tasks.mixed(ae_bases(gram_matrix(tasks).matrix, num_bases))
    found = dense(merged(bases, "iso_c", alpha=5 / num_bases)("weight"))
    assert close(found, dense(merged(tasks, "iso_c")("weight")))
