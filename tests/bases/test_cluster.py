"""Cluster bases: planted groups are found, opposites parted, and the bases are what the members make of them."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from commands.command_line import inputs, misused, refused, root, tvbases
from oracles.grams import real_gram
from tvbases_hf import Basis, Vectors, gram_matrix
from tvbases_hf.algebra.delta import dense
from tvbases_hf.bases import Clusters, cluster_bases, find_clusters, pca_positive
from tvbases_hf.bases.ae import least_squares_decoder
from tvbases_hf.bases.cluster import cosine_matrix, eigengap
from tvbases_hf.bases.weights import squared_error
from tvbases_hf.basis.clusters import clustered
from tvbases_hf.errors import MissingExtraError, ParameterError
from tvbases_hf.merging.apply import merged
from tvbases_hf.methods.registry import METHODS
from tvbases_hf.storage.checkpoint import Checkpoint
from zoo.hf_models import Family

pytest_plugins = ["zoo.hf_fixtures"]

SHAPES = {"a.weight": (10, 8), "a.bias": (10,)}
EPS = torch.finfo(torch.float32).eps


def planted(sizes: list[int], inside: float = 0.6, across: float = 0.02, signs: list[int] | None = None) -> Tensor:
    """A Gram matrix of groups of unit vectors with these cosines, some of them turned round."""
    labels = torch.tensor([group for group, size in enumerate(sizes) for _ in range(size)])
    gram = torch.where(labels[:, None] == labels, inside, across).double().fill_diagonal_(1.0)
    turn = torch.tensor(signs or [1] * len(labels), dtype=torch.float64)
    return turn[:, None] * gram * turn


def groups(sizes: list[int]) -> tuple[tuple[int, ...], ...]:
    ends = list(itertools.accumulate(sizes))
    return tuple(tuple(range(end - size, end)) for end, size in zip(ends, sizes, strict=True))


def models(columns: Tensor) -> Vectors:
    """Task vectors whose [d, T] columns are given, over a base of ones."""
    base = {name: torch.ones(shape) for name, shape in SHAPES.items()}
    sizes = [tensor.numel() for tensor in base.values()]
    tasks = {}
    for index, column in enumerate(columns.T):
        parts = zip(base.items(), column.split(sizes), strict=True)
        state = {name: tensor + part.reshape(tensor.shape).float() for (name, tensor), part in parts}
        tasks[f"task{index}"] = Checkpoint.from_state_dict(state)
    return Vectors.of_models(Checkpoint.from_state_dict(base), tasks)


@pytest.fixture
def tasks() -> Vectors:
    """Two pairs of similar tasks and a loner."""
    directions = torch.linalg.qr(torch.randn(90, 8, generator=torch.Generator().manual_seed(0))).Q
    shared, own = directions[:, :3], directions[:, 3:]
    pairs = shared[:, [0, 1, 0, 1, 2]]
    return models(0.1 * (pairs + 0.5 * own))


def columns(vectors: Vectors) -> Tensor:
    return torch.cat([torch.stack([dense(d).reshape(-1) for d in vectors.deltas(n)], 1) for n in vectors.names])


# Which tasks belong together


@pytest.mark.parametrize("sizes", [[3, 3], [4, 2, 3], [2, 2, 2, 2], [5, 1, 3]])
@pytest.mark.parametrize("seed", [0, 7])
def test_planted_groups_are_found_with_their_number(sizes: list[int], seed: int) -> None:
    assert find_clusters(planted(sizes), seed=seed).members == groups(sizes)
    flattened = find_clusters(planted(sizes, inside=0.02), len(sizes), seed=seed)
    assert flattened.members != groups(sizes)  # without the groups there is nothing to be found


@given(st.permutations(range(7)))
@settings(max_examples=15, deadline=None)
def test_clusters_do_not_depend_on_the_order_of_the_tasks(order: list[int]) -> None:
    gram = planted([3, 2, 2])
    found = find_clusters(gram[order][:, order])
    assert {frozenset(order[i] for i in group) for group in found.members} == set(map(frozenset, groups([3, 2, 2])))


def test_the_number_of_clusters_is_where_the_laplacian_jumps() -> None:
    similarity = torch.rand(9, 9, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    similarity = ((similarity + similarity.T) / 2).fill_diagonal_(1.0)
    laplacian = torch.diag(similarity.sum(1)) - similarity
    values = torch.linalg.eigvalsh(laplacian).tolist()  # values[i - 1] is the paper's lambda^(i)
    assert eigengap(similarity) == max(range(2, 9), key=lambda i: values[i] - values[i - 1])
    assert [eigengap(torch.ones(n, n).double()) for n in (1, 2)] == [1, 2]


def test_a_cluster_of_opposites_is_split_and_its_mean_does_not_cancel() -> None:
    gram = planted([4, 3], signs=[1, -1, 1, -1, 1, 1, 1])
    together = cluster_bases(gram, 2, split_below=-0.99)
    assert Clusters.of_encoder(together.encoder).members == ((0, 1, 2, 3), (4, 5, 6))
    split = cluster_bases(gram, 2)
    assert Clusters.of_encoder(split.encoder).members == ((0, 2), (1, 3), (4, 5, 6))
    lengths = [(w.encoder.T @ gram @ w.encoder).diagonal().sqrt() for w in (together, split)]
    assert lengths[0][0] < 0.5 < lengths[1][0]


@pytest.mark.parametrize(("count", "expected"), [(1, ((0, 1, 2, 3, 4),)), (5, ((0,), (1,), (2,), (3,), (4,)))])
def test_one_cluster_holds_all_and_t_clusters_one_each(count: int, expected: tuple[tuple[int, ...], ...]) -> None:
    assert find_clusters(planted([2, 3]), count).members == expected


def test_tasks_that_are_zero_or_orthogonal_to_all_are_no_obstacle() -> None:
    gram = torch.block_diag(planted([2, 2], across=0.0), torch.zeros(1, 1), torch.ones(1, 1)).double()
    assert sum(map(len, find_clusters(gram).members)) == 6
    assert cosine_matrix(gram)[4].tolist() == [0, 0, 0, 0, 1, 0]


def test_clusters_of_real_tasks_lose_less_than_random_partitions_of_the_same_sizes() -> None:
    gram = real_gram()
    if gram is None:
        pytest.skip("needs TVBASES_DATA")
    found = cluster_bases(gram)
    generator = torch.Generator().manual_seed(0)
    shuffled = [found.encoder[torch.randperm(len(gram), generator=generator)] for _ in range(100)]
    losses = [squared_error(gram, w @ least_squares_decoder(gram, w)) for w in shuffled]
    assert found.spectral_bound <= found.loss < sorted(losses)[5]


# What the bases are


def test_a_basis_is_the_mean_or_sum_of_its_cluster(tasks: Vectors) -> None:
    gram = gram_matrix(tasks).matrix
    every = columns(tasks)
    cases: tuple[tuple[Any, float], ...] = (("mean", 0.5), ("sum", 1.0))
    for inner, scale in cases:
        weights = cluster_bases(gram, inner=inner)
        assert Clusters.of_encoder(weights.encoder).members == ((0, 2), (1, 3), (4,))
        expected = torch.stack([every[:, [0, 2]].sum(1) * scale, every[:, [1, 3]].sum(1) * scale, every[:, 4]], 1)
        found = columns(tasks.mixed(weights))
        assert torch.allclose(found, expected, rtol=0, atol=8 * EPS * float(every.abs().max()))


@pytest.mark.parametrize("outer", METHODS)
@pytest.mark.parametrize("inner", ["mean", "ties", "top_k", "magmax"])
def test_any_method_merges_within_clusters_and_any_over_them(inner: str, outer: str, tasks: Vectors) -> None:
    vectors = tasks
    clusters = find_clusters(gram_matrix(tasks).matrix)
    bases = clustered(vectors, clusters, inner)
    assert bases.labels == ("task0+task2", "task1+task3", "task4")
    assert torch.equal(bases.encoder, clusters.encoder())
    for name in vectors.names:
        for group, found in zip(clusters.members, bases.deltas(name), strict=True):
            assert torch.equal(dense(found), dense(merged(vectors.selected(group), inner)(name)))
        assert dense(merged(bases, outer)(name)).isfinite().all()


@pytest.mark.parametrize("inner", ["mean", "task_arithmetic", "ties"])
def test_a_task_alone_in_its_cluster_is_kept_as_it_is(inner: str, tasks: Vectors) -> None:
    options: dict[str, Any] = {"density": 1.0} if inner == "ties" else {}
    lonely = clustered(tasks, Clusters(groups([1] * 5)), inner, **options)
    assert torch.equal(columns(lonely), columns(tasks))


def test_a_task_is_forgotten_by_its_clusters_basis(tasks: Vectors) -> None:
    clusters = find_clusters(gram_matrix(tasks).matrix)
    assert [clusters.of_task(index) for index in range(5)] == [0, 1, 0, 1, 2]
    bases = clustered(tasks, clusters)
    forgotten = merged(bases.selected([clusters.of_task(3)]), "task_arithmetic", alpha=-0.5)
    every = columns(tasks)
    found = torch.cat([dense(forgotten(name)).reshape(-1) for name in tasks.names])
    assert torch.allclose(found, -0.25 * (every[:, 1] + every[:, 3]), rtol=0, atol=8 * EPS)


def test_clusters_of_other_tasks_and_no_clusters_are_refused(tasks: Vectors) -> None:
    with pytest.raises(ParameterError, match="clusters are of 3 vectors, but there are 5"):
        clustered(tasks, Clusters(groups([1, 2])))
    with pytest.raises(ParameterError, match="no cluster bases"):
        Clusters.of_encoder(torch.ones(2, 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inner": "median"}, "inner of cluster must be mean or sum.*; got 'median'"),
        ({"split_below": 0.1}, "negative cosine"),
        ({"num_bases": 9}, "num_bases is 9 but there are only 5 tasks"),
    ],
)
def test_bad_options_of_clusters_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        cluster_bases(planted([3, 2]), **options)  # type: ignore[arg-type]


def test_without_scikit_learn_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(MissingExtraError, match=r"tvbases-hf\[cluster\]"):
        cluster_bases(planted([3, 3]))


# PCA with positive shares


def test_pca_positive_is_a_softmax_over_positive_loadings() -> None:
    gram = planted([4, 3])
    weights = pca_positive(gram, 3)
    centring = torch.eye(7).double() - 1 / 7
    vectors = torch.linalg.eigh(centring @ gram @ centring).eigenvectors.flip(1)
    first = vectors[:, 0] * vectors[vectors[:, 0].abs().argmax(), 0].sign()
    expected = torch.where(first > 0, first.exp(), 0 * first)
    assert torch.allclose(weights.encoder[:, 0], expected / expected.sum())
    assert (weights.encoder >= 0).all() and torch.allclose(weights.encoder.sum(0), torch.ones(3).double())
    assert weights.spectral_bound <= weights.loss * (1 + 1e-9)
    assert weights.mean is None


# Basis directories and the command


@pytest.mark.parametrize("method", ["cluster", "pca_positive"])
def test_the_bases_are_stored_and_restored(method: str, tasks: Vectors, tmp_path: Path) -> None:
    basis = Basis.build(tasks, 3, method=method, dtype=torch.float32)
    basis.save_pretrained(tmp_path / "basis")
    back = Basis.from_pretrained(tmp_path / "basis")
    every = columns(tasks)
    found = columns(back.vectors(tasks.base))
    assert torch.allclose(found, every @ back.encoder, rtol=0, atol=8 * EPS * float(every.abs().max()))
    assert back.info.method == method


def test_clusters_merged_by_ties_are_stored_with_a_decoder_fitted_to_them(tasks: Vectors, tmp_path: Path) -> None:
    basis = Basis.build(tasks, method="cluster", inner="ties", density=0.5, dtype=torch.float32)
    basis.save_pretrained(tmp_path / "basis")
    back = Basis.from_pretrained(tmp_path / "basis")
    clusters = find_clusters(gram_matrix(tasks).matrix)
    expected = columns(clustered(tasks, clusters, "ties", density=0.5))
    assert torch.equal(columns(back.vectors(tasks.base)), expected)
    every = columns(tasks)
    fitted = torch.linalg.lstsq(expected, every).solution
    assert torch.allclose(back.decoder, fitted, atol=1e-6)
    missed = every - expected @ fitted
    assert torch.allclose(
        torch.tensor(back.info.task_error).double(), missed.norm(dim=0) / every.norm(dim=0), atol=1e-6
    )
    assert back.info.loss == pytest.approx(float(missed.square().sum() / every.square().sum()), rel=1e-6)


@pytest.mark.parametrize("more", [[], ["--inner", "ties"], ["--num-bases", 2, "--inner", "sum"]])
def test_the_command_compresses_to_clusters(more: list[object], llama: Family, tmp_path: Path) -> None:
    out = tmp_path / "basis"
    done = tvbases("compress", *inputs(llama), "--method", "cluster", "--out", out, *more)
    assert done.code == 0, done.err
    basis = Basis.from_pretrained(out)
    assert basis.info.method == "cluster" and set(basis.tasks) == set(llama.tasks)
    assert "(cluster)" in done.out


def test_the_command_refuses_cluster_options_elsewhere_and_unknown_ones(llama: Family) -> None:
    out = ["--out", root(llama) / "basis"]
    message = refused(root(llama), "compress", *inputs(llama), *out, "--inner", "ties")
    assert "--inner goes with --method cluster" in message
    message = misused(root(llama), "compress", *inputs(llama), *out, "--method", "cluster", "--inner", "tie")
    assert "'tie' is not one of" in message and "'ties'" in message
    message = refused(root(llama), "compress", *inputs(llama), *out, "--method", "cluster", "--split-below", "0.5")
    assert "negative cosine" in message
