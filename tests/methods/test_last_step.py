"""The last step of a merge: calibrated and flattened singular values; and the merge of entries that several need."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tvbases_hf import Vectors, ae_bases, gram_matrix
from tvbases_hf.algebra.delta import Delta, Dense, LowRank, dense
from tvbases_hf.errors import ParameterError
from tvbases_hf.merging.apply import merged
from tvbases_hf.methods.consensus import consensus, negmerge
from tvbases_hf.methods.registry import METHODS, find_method
from tvbases_hf.storage.checkpoint import Checkpoint

ROUNDING = 1e3 * torch.finfo(torch.float32).eps
SHAPE = (24, 16)
NAME = "layers.0.weight"


def gaussian(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


SHAPES = {NAME: SHAPE, "layers.0.bias": (24,), "layers.0.experts.up_proj": (2, 6, 5)}


def family(count: int = 4) -> Vectors:
    models = [{n: gaussian(7 * i + k, *shape) for k, (n, shape) in enumerate(SHAPES.items())} for i in range(count)]
    tuned = {f"task{i}": Checkpoint.from_state_dict(state) for i, state in enumerate(models)}
    base = Checkpoint.from_state_dict({name: torch.zeros(shape) for name, shape in SHAPES.items()})
    return Vectors.of_models(base, tuned)


def close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).norm() <= ROUNDING * expected.norm())


def result(vectors: Vectors, method: str, name: str = NAME, **options: Any) -> Tensor:
    return dense(merged(vectors, method, **options)(name))


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "tsv", "devec_unique"])
def test_a_half_flat_spectrum_keeps_directions_and_nuclear_norm(method: str) -> None:
    tasks = family()
    left, values, right = torch.linalg.svd(result(tasks, method), full_matrices=False)
    expected = values.sqrt() * values.mean() / values.sqrt().mean()
    assert close(result(tasks, method, spectrum=0.5), left * expected @ right)
    assert torch.equal(result(tasks, method, spectrum=1.0), result(tasks, method))
    assert torch.equal(result(tasks, method, "layers.0.bias", spectrum=0.5), result(tasks, method, "layers.0.bias"))


def test_flat_task_arithmetic_is_iso_c_and_iso_c_has_the_same_power() -> None:
    tasks = family()
    for power in (0.0, 0.25, 1.0):
        assert close(result(tasks, "task_arithmetic", spectrum=power), result(tasks, "iso_c", spectrum=power))
    assert close(result(tasks, "iso_c"), result(tasks, "iso_c", spectrum=0.0))
    assert not close(result(tasks, "iso_c"), result(tasks, "iso_c", spectrum=0.25))


def test_experts_have_a_spectrum_each() -> None:
    tasks, name = family(), "layers.0.experts.up_proj"
    plain, flat = result(tasks, "task_arithmetic", name), result(tasks, "task_arithmetic", name, spectrum=0.0)
    for before, after in zip(plain, flat, strict=True):
        values = torch.linalg.svdvals(after)
        assert close(values, torch.linalg.svdvals(before).mean().expand(5))


@pytest.mark.parametrize("num_bases", [1, 2, 3])
def test_half_flat_merges_are_exact_over_balanced_bases(num_bases: int) -> None:
    tasks = family(5)
    bases = tasks.mixed(ae_bases(gram_matrix(tasks).matrix, num_bases))
    expected = result(tasks, "task_arithmetic", spectrum=0.5)
    assert close(result(bases, "task_arithmetic", spectrum=0.5, alpha=5 / num_bases), expected)


def svc_reference(merge: Tensor, tasks: list[Tensor]) -> Tensor:
    """Direction by direction, as the paper writes it."""
    left, values, right = torch.linalg.svd(merge, full_matrices=False)
    kept = []
    for u, s in zip(left.T, values, strict=True):
        responses = [u @ task for task in tasks]
        counts = [max(1.0, float((u @ merge) @ own / own.square().sum())) for own in responses]
        kept.append(float(s) * len(tasks) / sum(counts))
    return left * torch.tensor(kept, dtype=torch.float64) @ right


@pytest.mark.parametrize("method", ["task_arithmetic", "tsv"])
def test_calibration_is_the_papers(method: str) -> None:
    tasks = family()
    deltas, weights = [dense(delta) for delta in tasks.deltas(NAME)], [1.0, 0.5, -1.0, 2.0]
    plain = dense(merged(tasks, method, weights)(NAME))
    expected = svc_reference(plain, [weight * delta for weight, delta in zip(weights, deltas, strict=True)])
    assert close(dense(merged(tasks, method, weights, calibrate="svc")(NAME)), expected)
    assert not torch.allclose(plain, expected, rtol=1e-2)


def test_calibrated_copies_are_one_vector_and_vectors_apart_are_untouched() -> None:
    delta = LowRank(gaussian(0, 24, 3), gaussian(1, 3, 16))
    arithmetic = METHODS["task_arithmetic"]
    found = arithmetic.change(NAME, SHAPE, [delta] * 4, [1.0] * 4, {"calibrate": "svc"})
    assert close(dense(found), dense(delta))
    first, second = torch.zeros(2, *SHAPE)
    first[:8, :8], second[8:16, 8:] = gaussian(2, 8, 8), gaussian(3, 8, 8)
    apart: list[Delta] = [Dense(first), Dense(second)]
    found = arithmetic.change(NAME, SHAPE, apart, [1.0, 1.0], {"calibrate": "svc"})
    assert close(dense(found), (first + second).double())


@pytest.mark.parametrize("steps", [{"calibrate": "svc"}, {"spectrum": 0.5}, {"calibrate": "svc", "spectrum": 0.25}])
@pytest.mark.parametrize("method", ["task_arithmetic", "tsv", "regmean_datafree"])
def test_the_last_step_in_factors_is_the_dense_one(method: str, steps: dict[str, Any]) -> None:
    low: list[Delta] = [LowRank(gaussian(seed, 24, 3), gaussian(seed + 9, 3, 16)) for seed in range(4)]
    whole: list[Delta] = [Dense(dense(delta).float()) for delta in low]
    found = METHODS[method].change(NAME, SHAPE, low, [1.0, 0.5, -1.0, 2.0], steps)
    assert isinstance(found, LowRank)
    assert close(dense(found), dense(METHODS[method].change(NAME, SHAPE, whole, [1.0, 0.5, -1.0, 2.0], steps)))


def test_bad_steps_are_refused_by_name() -> None:
    with pytest.raises(ParameterError, match=r"spectrum of ties .* at least 0 and at most 1; got 2"):
        find_method("ties").checked({"spectrum": 2})
    with pytest.raises(ParameterError, match=r"calibrate of tsv must be none or svc \(did you mean svc\?\); got 'svd'"):
        find_method("tsv").checked({"calibrate": "svd"})


@pytest.mark.parametrize(("mask", "agree"), [(0.4, 2), (1.0, 1), (0.2, 3)])
def test_consensus_keeps_what_matters_to_enough_vectors(mask: float, agree: int) -> None:
    values, weights = [gaussian(seed, 40).double() for seed in range(4)], [1.0, -1.0, 0.5, 2.0]
    expected = torch.zeros(40, dtype=torch.float64)
    for p in range(40):
        entries = [weight * float(value[p]) for weight, value in zip(weights, values, strict=True)]
        needed = [abs(x) >= mask * abs(sum(entries) - x) for x in entries]
        expected[p] = sum(entries) if sum(needed) >= agree else 0.0
    found = dense(consensus([Dense(value.float()) for value in values], weights, mask=mask, agree=agree))
    assert close(found, expected)
    assert 0 < int((found == 0).sum()) < 40


def test_negmerge_is_the_mean_where_all_signs_agree() -> None:
    values, weights = [gaussian(seed, 60).double() for seed in range(3)], [1.0, -1.0, 0.5]
    expected = torch.zeros(60, dtype=torch.float64)
    for p in range(60):
        entries = [weight * float(value[p]) for weight, value in zip(weights, values, strict=True)]
        if len({entry > 0 for entry in entries}) == 1:
            expected[p] = sum(entries) / 3
    found = dense(negmerge([Dense(value.float()) for value in values], weights))
    assert close(found, expected) and 0 < int((found == 0).sum()) < 60
