"""Convex NMF, non-negative PCA and dictionary learning in Gram space, against the vectors themselves."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch
from torch import Tensor

from oracles.grams import EPS, error, gram_of, loss_tolerance, task_matrix
from tvbases_hf.bases import dictionary_bases, nmf_bases, pca_nonnegative
from tvbases_hf.errors import MissingExtraError


def ding_step(matrix: Tensor, encoder: Tensor, parts: Tensor) -> tuple[Tensor, Tensor]:
    """One step of convex NMF as published: T = matrix, T ~ T encoder parts^T, parts first."""
    products = matrix.T @ matrix
    above, below = (products.abs() + products) / 2, (products.abs() - products) / 2
    inner = encoder.T @ below @ encoder, encoder.T @ above @ encoder
    parts = parts * ((above @ encoder + parts @ inner[0]) / (below @ encoder + parts @ inner[1])).sqrt()
    square = parts.T @ parts
    ratio = (above @ parts + below @ encoder @ square) / (below @ parts + above @ encoder @ square)
    return encoder * ratio.sqrt(), parts


@pytest.mark.parametrize("kind", ["clustered", "opposed"])
def test_nmf_takes_the_published_steps_which_never_raise_the_loss(kind: str) -> None:
    matrix = task_matrix(kind, 6)
    gram = gram_of(matrix)
    one, two = nmf_bases(gram, 3, steps=1), nmf_bases(gram, 3, steps=2)
    encoder, parts = ding_step(matrix / matrix.norm(), one.encoder, one.decoder.T)
    # the product does not depend on how the columns are scaled between the steps
    assert torch.allclose(encoder @ parts.T, two.encoder @ two.decoder, atol=1e-10)
    losses = [nmf_bases(gram, 3, steps=steps).loss for steps in (1, 2, 20, 200)]
    assert all(later <= before + loss_tolerance(gram) for before, later in itertools.pairwise(losses))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("kind", ["independent", "clustered", "opposed", "scaled"])
def test_both_factors_of_nmf_are_non_negative_and_its_bases_convex(kind: str) -> None:
    found = nmf_bases(gram_of(task_matrix(kind, 7)), 3)
    assert found.encoder.min() >= 0 and found.decoder.min() >= 0
    assert torch.allclose(found.encoder.sum(dim=0), torch.ones(3, dtype=torch.float64), atol=1e-12)


def test_nmf_finds_tasks_that_are_non_negative_mixtures_of_few() -> None:
    shares = torch.tensor([[1, 0, 0.5, 0.2, 2], [0, 1, 0.5, 0.9, 1]], dtype=torch.float64)
    matrix = task_matrix("independent", 2) @ shares
    found = nmf_bases(gram_of(matrix), 2, steps=2000)
    assert error(matrix, found.reconstruction) < 1e-4 * float(matrix.square().sum())


def longest(matrix: Tensor) -> float:
    """max |T u| over u >= 0 of length 1: the leading eigenvector of some set of the tasks."""
    best = 0.0
    for size in range(1, matrix.shape[1] + 1):
        for chosen in itertools.combinations(range(matrix.shape[1]), size):
            _, vectors = torch.linalg.eigh(gram_of(matrix[:, chosen]))
            leading = vectors[:, -1] * vectors[:, -1].sum().sign()
            if leading.min() >= 0:
                best = max(best, float((matrix[:, chosen] @ leading).norm()))
    return best


@pytest.mark.parametrize("kind", ["independent", "clustered", "opposed", "scaled"])
def test_non_negative_pca_finds_the_longest_non_negative_mixture(kind: str) -> None:
    matrix = task_matrix(kind, 5)
    found = pca_nonnegative(gram_of(matrix), 2)
    assert found.encoder.min() >= 0
    first, second = (column / column.norm() for column in found.encoder.T)
    assert float((matrix @ first).norm()) == pytest.approx(longest(matrix), rel=1e-6)
    direction = matrix @ first / (matrix @ first).norm()
    left = matrix - torch.outer(direction, direction @ matrix)
    assert float((left @ second).norm()) == pytest.approx(longest(left), rel=1e-6)


def test_non_negative_pca_goes_on_where_nothing_is_left() -> None:
    found = pca_nonnegative(gram_of(task_matrix("low_rank", 6)), 6)
    assert torch.isfinite(found.reconstruction).all() and found.loss < 1e-9 * found.total


@pytest.mark.parametrize("sparsity", [0.05, 0.3])
def test_a_dictionary_restores_each_task_by_least_squares_over_the_few_bases_that_it_uses(sparsity: float) -> None:
    matrix = task_matrix("clustered", 8)
    found = dictionary_bases(gram_of(matrix), 4, sparsity=sparsity)
    bases = matrix @ found.encoder
    for task in range(8):
        used = (found.decoder[:, task] != 0).nonzero()[:, 0]
        wanted = bases[:, used] @ torch.linalg.lstsq(bases[:, used], matrix[:, task]).solution
        assert torch.allclose(bases @ found.decoder[:, task], wanted, atol=1e-7 * float(matrix.norm()))
    assert torch.allclose(found.encoder.abs().sum(dim=0), torch.ones(4, dtype=torch.float64), atol=1e4 * EPS)


def test_a_dictionary_is_sparser_where_that_is_asked_for() -> None:
    gram = gram_of(task_matrix("common_direction", 8))
    used = [int((dictionary_bases(gram, 4, sparsity=s).decoder != 0).sum()) for s in (0.001, 0.1, 0.5)]
    assert used[0] > used[1] > used[2] > 0


def test_zero_task_vectors_have_these_bases_too() -> None:
    for make in (nmf_bases, pca_nonnegative, dictionary_bases):
        found = make(torch.zeros(4, 4), 2)
        assert torch.isfinite(found.reconstruction).all() and found.loss == 0


def test_without_scikit_learn_a_dictionary_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.decomposition", None)
    with pytest.raises(MissingExtraError, match=r"tvbases-hf\[cluster\]"):
        dictionary_bases(torch.eye(4), 2)
