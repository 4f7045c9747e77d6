"""What sharing brings on adapters that were really trained, and what the tool says where it brings nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from tvbases_hf.basis import Basis
from tvbases_hf.basis.adapters.verdict import root_mean_square, verdict
from tvbases_hf.models.vectors import Vectors
from zoo.adapter_families import mean_square, measured_errors, stored_bytes, truncated_errors
from zoo.trained_adapters import trained_adapters


@pytest.fixture(scope="module")
def one_seed(tmp_path_factory: pytest.TempPathFactory) -> Vectors:
    root = tmp_path_factory.mktemp("one-seed")
    return Vectors.open(root / "base", trained_adapters(root, one_seed=True))


@pytest.fixture(scope="module")
def many_seeds(tmp_path_factory: pytest.TempPathFactory) -> Vectors:
    root = tmp_path_factory.mktemp("many-seeds")
    return Vectors.open(root / "base", trained_adapters(root, one_seed=False))


@pytest.mark.parametrize("budget", [0.75, 0.5])
def test_from_one_seed_sharing_has_a_lower_mean_error_than_truncation_at_the_same_bytes(
    budget: float, one_seed: Vectors, tmp_path: Path
) -> None:
    basis = Basis.build(one_seed, method="joint", budget=budget)
    basis.save_pretrained(tmp_path / "basis")
    errors = measured_errors(basis, one_seed)
    trivial = truncated_errors(one_seed, stored_bytes(tmp_path / "basis") / 4)
    assert basis.info.method == "joint"
    assert mean_square(errors) < 0.8 * mean_square(trivial)
    assert sum(errors) < sum(trivial)


def test_from_one_seed_the_tool_says_that_the_a_matrices_are_shared(one_seed: Vectors) -> None:
    basis = Basis.build(one_seed, budget=0.5)
    assert basis.info.adapters is not None
    assert basis.info.adapters.overlap["input"] > 0.8
    said = " ".join(verdict(basis.info))
    assert "Runs from one seed" in said and "No method beats" not in said


@pytest.mark.parametrize("budget", [0.75, 0.5])
def test_from_different_seeds_the_tool_says_that_sharing_brings_little(budget: float, many_seeds: Vectors) -> None:
    basis = Basis.build(many_seeds, budget=budget)
    assert basis.info.adapters is not None
    shared = basis.info.adapters.overlap
    assert shared["input"] < 2 * shared["input_by_chance"]
    trivial = root_mean_square(basis.info.adapters.truncation_error)
    assert root_mean_square(basis.info.task_error) >= 0.8 * trivial
    said = " ".join(verdict(basis.info))
    assert "No method beats truncating each adapter alone" in said and "Runs from different seeds" in said
