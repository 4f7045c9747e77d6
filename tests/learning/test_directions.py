"""What is negated: directions against the dense decomposition."""

from __future__ import annotations

import pytest
import torch

from oracles.merge_oracle import family_vectors
from tvbases_hf import Vectors, ae_bases, gram_matrix
from tvbases_hf.algebra.delta import dense
from tvbases_hf.errors import ParameterError
from tvbases_hf.learning.directions import COMPONENTS, check_component, direction
from tvbases_hf.methods.devec import Options, decompose
from zoo.hf_models import Family

pytest_plugins = ["zoo.hf_fixtures"]


@pytest.fixture(scope="module")
def vectors(llama: Family) -> Vectors:
    return Vectors.open(llama.base, {name: str(path) for name, path in llama.tasks.items()})


def test_the_plain_direction_is_the_task_vector(vectors: Vectors, llama: Family) -> None:
    dense_vectors = family_vectors(llama)
    change = direction(vectors, "code")
    found = torch.cat([dense(change(name)).flatten() for name in dense_vectors.tau])
    torch.testing.assert_close(found, dense_vectors.matrix[:, 1].double(), rtol=1e-6, atol=1e-9)


def test_the_unique_direction_plus_the_shared_part_is_the_task_vector(vectors: Vectors) -> None:
    options = Options(threshold=0.5, pool="iterative", rank="0.25")
    change = direction(vectors, "chat", "unique", options=options)
    moved = 0.0
    for name in vectors.names:
        split = decompose(vectors.deltas(name), options, [2])
        total = dense(change(name)) + dense(split.shared[2])
        torch.testing.assert_close(total, dense(vectors.deltas(name)[2]), rtol=1e-5, atol=1e-8)
        moved += float(dense(split.shared[2]).norm())
    assert moved > 0  # the fine-tunes have a common part, or this would say nothing


def test_the_unique_direction_of_a_large_model_is_the_same(vectors: Vectors, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the dense component does not fit into memory, its shared part is kept and subtracted anew."""
    options = Options(threshold=0.5, pool="iterative", rank="0.25")
    small = direction(vectors, "chat", "unique", options=options)
    monkeypatch.setattr("tvbases_hf.learning.directions.CACHED_BYTES", 0)
    large = direction(vectors, "chat", "unique", options=options)
    for name in vectors.names:
        torch.testing.assert_close(dense(large(name)), dense(small(name)), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("even_errors", [False, True])
def test_the_reconstructed_direction_is_what_ae_bases_give_back(
    even_errors: bool, vectors: Vectors, llama: Family
) -> None:
    dense_vectors = family_vectors(llama)
    weights = ae_bases(gram_matrix(vectors).matrix, 2, even_errors=even_errors)
    change = direction(vectors, "law", "reconstructed", num_bases=2, even_errors=even_errors)
    found = torch.cat([dense(change(name)).flatten() for name in dense_vectors.tau])
    oracle = dense_vectors.matrix.double() @ weights.reconstruction[:, 3]
    torch.testing.assert_close(found, oracle, rtol=1e-5, atol=1e-7)
    assert (found - dense_vectors.matrix[:, 3]).norm() > 0.1 * oracle.norm()  # two bases of four tasks lose something


def test_all_bases_give_the_task_vector_back(vectors: Vectors) -> None:
    change = direction(vectors, "law", "reconstructed", num_bases=4)
    for name in vectors.names[:4]:
        torch.testing.assert_close(dense(change(name)), dense(vectors.deltas(name)[3]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("task", "component", "reason"),
    [
        ("lax", "plain", 'no task "lax" .did you mean law'),
        ("law", "uniqe", "unknown component 'uniqe' .did you mean unique"),
    ],
)
def test_what_nobody_knows_is_named(vectors: Vectors, task: str, component: str, reason: str) -> None:
    with pytest.raises(ParameterError, match=reason):
        direction(vectors, task, component)


def test_components_relative_to_other_tasks_need_some() -> None:
    check_component("plain", 1)
    for component in COMPONENTS[1:]:
        with pytest.raises(ParameterError, match=f"the {component} component is relative to other tasks"):
            check_component(component, 1)
