"""Vectors: bases, reconstructions and task vectors look alike to a method."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tvbases_hf import Basis, Vectors, ae_bases, gram_matrix
from tvbases_hf.algebra.delta import dense
from tvbases_hf.bases import BasisWeights, pca_bases
from tvbases_hf.errors import ParameterError
from tvbases_hf.storage.checkpoint import Checkpoint

SHAPES = {"a.weight": (6, 4), "a.bias": (6,), "b.weight": (3, 6)}
EPS = torch.finfo(torch.float32).eps


@pytest.fixture
def tasks() -> Vectors:
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    models = {
        f"task{i}": Checkpoint.from_state_dict(
            {name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator) for name, tensor in base.items()}
        )
        for i in range(4)
    }
    return Vectors.of_models(Checkpoint.from_state_dict(base), models)


def columns(vectors: Vectors) -> Tensor:
    """[d, K] float64."""
    return torch.cat([torch.stack([dense(d).reshape(-1) for d in vectors.deltas(n)], 1) for n in vectors.names])


@pytest.mark.parametrize("method", [ae_bases, pca_bases])
def test_bases_and_reconstructions_are_the_matrix_products(method: object, tasks: Vectors) -> None:
    weights: BasisWeights = method(gram_matrix(tasks).matrix, 2)  # type: ignore[operator]
    every = columns(tasks)
    bases, back = tasks.mixed(weights), tasks.mixed(weights, "reconstructions")
    tolerance = 8 * EPS * float(every.abs().max())
    assert torch.allclose(columns(bases), every @ weights.encoder, rtol=0, atol=tolerance)
    assert torch.allclose(columns(back), every @ weights.reconstruction, rtol=0, atol=tolerance)
    assert (len(bases), len(back)) == (2, 4)
    assert torch.equal(back.encoder, torch.eye(4, dtype=torch.float64))


@pytest.mark.parametrize("over", ["bases", "reconstructions"])
def test_a_basis_directory_gives_the_vectors_it_was_built_from(over: str, tasks: Vectors, tmp_path: Path) -> None:
    basis = Basis.build(tasks, 2)
    basis.save_pretrained(tmp_path / "basis")
    weights = ae_bases(gram_matrix(tasks).matrix, 2)
    expected = columns(tasks.mixed(weights, over))
    found = Basis.from_pretrained(tmp_path / "basis").vectors(tasks.base, over)
    assert torch.allclose(columns(found), expected, rtol=0, atol=1e2 * EPS * float(expected.abs().max()))
    assert found.tasks == tasks.tasks


def test_data_weights_are_convex_and_of_pca_refused(tasks: Vectors) -> None:
    gram = gram_matrix(tasks).matrix
    weights = tasks.mixed(ae_bases(gram, 2, balance=False)).data_weights()
    assert weights.shape == (4, 2) and (weights >= 0).all()
    assert torch.allclose(weights.sum(0), torch.ones(2, dtype=torch.float64))
    negative = BasisWeights("pca", -torch.ones(4, 1).double(), torch.ones(1, 4).double(), 0.0, 0.0, 0.0)
    with pytest.raises(ParameterError, match=r"1 of 1 vectors .*basis 0.*reconstructions"):
        tasks.mixed(negative).data_weights()


def test_a_selection_keeps_labels_shares_and_changes_together(tasks: Vectors) -> None:
    every = tasks
    kept = every.selected([2, 0])
    assert kept.labels == ("task2", "task0")
    assert torch.equal(kept.encoder, every.encoder[:, [2, 0]])
    assert torch.equal(columns(kept), columns(every)[:, [2, 0]])


def test_an_unknown_over_is_refused(tasks: Vectors) -> None:
    with pytest.raises(ParameterError, match="bases, reconstructions; got 'models'"):
        tasks.mixed(ae_bases(gram_matrix(tasks).matrix, 2), "models")
