"""Merging methods without data against dense float64 references, and as laws over bases."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mergekit import merge_methods
from mergekit.merge_methods.base import TensorEntry, TensorGroup
from torch import Tensor

from tvbases_hf import Vectors, ae_bases, gram_matrix
from tvbases_hf.algebra.delta import Dense, LowRank, dense
from tvbases_hf.bases import BasisWeights
from tvbases_hf.errors import ParameterError
from tvbases_hf.merging.apply import merged, model_thresholds
from tvbases_hf.methods.registry import METHODS, find_method
from tvbases_hf.methods.threshold import kept_entries, tensor_thresholds
from tvbases_hf.storage.checkpoint import Checkpoint

# Two weights of very different scale: what is large in one is small in the whole model.
SHAPES = {"a.weight": (12, 9), "a.bias": (12,), "b.weight": (7, 12)}
SCALES = {"a.weight": 0.1, "a.bias": 0.02, "b.weight": 1.0}
EPS = torch.finfo(torch.float32).eps
WEIGHTS = [1.0, 0.5, 2.0, 1.0]


def family(count: int = 4, seed: int = 0) -> Vectors:
    """Fine-tunes whose changes float32 holds exactly, so that references and methods see the same numbers."""
    generator = torch.Generator().manual_seed(seed)
    base = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    models = {
        f"task{i}": Checkpoint.from_state_dict(
            {n: SCALES[n] * torch.randn(shape, generator=generator) for n, shape in SHAPES.items()}
        )
        for i in range(count)
    }
    return Vectors.of_models(Checkpoint.from_state_dict(base), models)


@pytest.fixture
def vectors() -> Vectors:
    return family()


def flat(vectors: Vectors) -> Tensor:
    """[K, d] float64."""
    return torch.cat([torch.stack([dense(d).reshape(-1) for d in vectors.deltas(n)]) for n in vectors.names], dim=1)


def result(vectors: Vectors, method: str, weights: list[float] | None = None, **options: Any) -> Tensor:
    """[d] float64 of the merged change."""
    change = merged(vectors, method, weights, **options)
    return torch.cat([dense(change(name)).reshape(-1) for name in vectors.names])


def by_scope(vectors: Vectors, scope: str, merge: Callable[[Tensor], Tensor]) -> Tensor:
    """``merge`` of [K, d] values at once, or of each weight's by itself."""
    sizes = [math.prod(vectors.base.tensors[name].shape) for name in vectors.names]
    parts = [flat(vectors)] if scope == "model" else flat(vectors).split(sizes, dim=1)
    return torch.cat([merge(part) for part in parts])


def trim(values: Tensor, density: float) -> Tensor:
    """The k largest magnitudes of every row, by sorting."""
    kept = torch.zeros_like(values)
    for row, out in zip(values, kept, strict=True):
        largest = row.abs().argsort(descending=True)[: max(1, int(density * len(row)))]
        out[largest] = row[largest]
    return kept


def dense_ties(values: Tensor, weights: Tensor, density: float, consensus: str) -> Tensor:
    """Entry by entry, as the paper's algorithm 1 is written."""
    kept = trim(values, density)
    merged = torch.zeros(values.shape[1], dtype=torch.float64)
    for p in range(values.shape[1]):
        total = float((weights * kept[:, p]).sum())
        chosen = [t for t in range(len(values)) if kept[t, p] * total > 0]
        if chosen:
            numerator = sum(float(weights[t] * kept[t, p]) for t in chosen)
            merged[p] = numerator / (sum(float(weights[t]) for t in chosen) if consensus == "mean" else 1)
    return merged


def close(found: Tensor, expected: Tensor, terms: int = 8) -> bool:
    return bool(((found - expected).abs() <= terms * EPS * expected.abs().clamp_min(1e-3)).all())


@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize("consensus", ["mean", "sum"])
@pytest.mark.parametrize("density", [0.2, 0.55, 1.0])
def test_ties_is_trim_elect_merge(scope: str, consensus: str, density: float, vectors: Vectors) -> None:
    weights = torch.tensor(WEIGHTS, dtype=torch.float64)
    expected = by_scope(vectors, scope, lambda values: dense_ties(values, weights, density, consensus))
    found = result(vectors, "ties", WEIGHTS, density=density, scope=scope, consensus=consensus)
    assert close(found, expected)
    if density < 1:
        other = by_scope(vectors, "tensor" if scope == "model" else "model", lambda v: trim(v, density).sum(0))
        assert (other != by_scope(vectors, scope, lambda v: trim(v, density).sum(0))).any()  # the scopes do differ


def test_ties_of_one_weight_is_mergekits(vectors: Vectors) -> None:
    """Their definitions agree where the scope is the tensor, the consensus the mean, and no entries cancel."""
    ties = next(m for m in merge_methods.registered_methods() if m.spec.name == "ties")
    change = merged(vectors, "ties", WEIGHTS, density=0.3, scope="tensor")
    for name in vectors.names:
        deltas = [dense(delta) for delta in vectors.deltas(name)]
        entries = [TensorEntry(id="base", tensor=torch.zeros_like(deltas[0]), is_base=True)]
        entries += [TensorEntry(id=i, tensor=delta) for i, delta in enumerate(deltas)]
        (theirs,) = ties((TensorGroup(tuple(entries)),), parameters={"weight": WEIGHTS, "density": [0.3] * 4})
        assert close(dense(change(name)), theirs)


def test_where_entries_cancel_ties_elects_no_sign() -> None:
    deltas = [Dense(torch.tensor([1.0, 2.0])), Dense(torch.tensor([-1.0, 1.0]))]
    assert dense(METHODS["ties"].combine(deltas, [1, 1], density=1.0)).tolist() == [0.0, 1.5]


def test_entries_equal_to_the_smallest_kept_are_kept_too() -> None:
    change = METHODS["ties"].combine([Dense(torch.tensor([1.0, -1.0, 0.5, 0.0, 1.0]))], [1], density=0.2)
    assert dense(change).tolist() == [1.0, -1.0, 0.0, 0.0, 1.0]


def test_a_negative_weight_turns_a_vector_round_in_ties() -> None:
    deltas = [Dense(torch.tensor([1.0, -3.0])), Dense(torch.tensor([-1.0, 1.0]))]
    turned = [deltas[0], Dense(-deltas[1].tuned)]
    for consensus in ("mean", "sum"):
        options: dict[str, Any] = {"density": 1.0, "consensus": consensus}
        found, expected = (METHODS["ties"].combine(d, w, **options) for d, w in ((deltas, [1, -1]), (turned, [1, 1])))
        assert torch.equal(dense(found), dense(expected))


@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize("overlap", ["all", "shared"])
def test_top_k_is_the_mean_of_the_trimmed_vectors(scope: str, overlap: str, vectors: Vectors) -> None:
    weights = torch.tensor(WEIGHTS, dtype=torch.float64)[:, None]

    def stitch(values: Tensor) -> Tensor:
        kept = trim(values, 0.3)
        by = (weights * (kept != 0)).sum(0) if overlap == "shared" else weights.sum()
        return torch.nan_to_num((weights * kept).sum(0) / by)

    found = result(vectors, "top_k", WEIGHTS, density=0.3, overlap=overlap, scope=scope)
    assert close(found, by_scope(vectors, scope, stitch))


def test_magmax_takes_each_entry_from_where_it_is_largest(vectors: Vectors) -> None:
    values = flat(vectors) * torch.tensor(WEIGHTS, dtype=torch.float64)[:, None]
    expected = torch.stack([max(column, key=abs) for column in values.T])
    assert close(result(vectors, "magmax", WEIGHTS), expected, 1)


def test_sum_and_mean_stay_in_factors(vectors: Vectors) -> None:
    generator = torch.Generator().manual_seed(3)
    low = [LowRank(torch.randn(6, 2, generator=generator), torch.randn(2, 5, generator=generator)) for _ in range(3)]
    total = torch.stack([dense(part) for part in low]).sum(0)
    for name, expected in (("task_arithmetic", total), ("mean", total / 3)):
        found = METHODS[name].combine(low, [1.0] * 3)
        assert isinstance(found, LowRank)
        assert torch.allclose(dense(found), expected, rtol=0, atol=20 * EPS)
    values = flat(vectors)
    assert close(result(vectors, "mean"), values.mean(0))
    assert close(result(vectors, "task_arithmetic", alpha=0.3), 0.3 * values.sum(0))


# Thresholds


numbers = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False) | st.sampled_from(
    [0.0, -0.0, 1.0, -1.0, 3.0]
)


@given(st.lists(numbers, min_size=1, max_size=60), st.floats(0.01, 1))
@settings(max_examples=200, deadline=None)
def test_the_threshold_is_the_kth_largest_magnitude(values: list[float], density: float) -> None:
    tensor = torch.tensor(values, dtype=torch.float32)
    expected = tensor.abs().sort(descending=True).values[kept_entries(len(values), density) - 1]
    assert tensor_thresholds([Dense(tensor)], density) == [float(expected)]


def test_the_threshold_of_a_model_is_that_of_all_its_weights_together(vectors: Vectors) -> None:
    values = flat(vectors).float().abs()
    k = kept_entries(values.shape[1], 0.2)
    assert model_thresholds(vectors, 0.2) == values.sort(descending=True).values[:, k - 1].tolist()


def test_low_rank_and_half_precision_changes_have_thresholds_too() -> None:
    low = LowRank(torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0, -4.0]]))
    half = Dense(torch.tensor([[1.5, 1.0], [3.0, 1.0]]).bfloat16(), torch.ones(2, 2).bfloat16())
    assert tensor_thresholds([low, half], 0.5) == [4.0, 0.5]


# Over bases


def one_hot(order: list[int]) -> BasisWeights:
    encoder = torch.eye(len(order), dtype=torch.float64)[:, order]
    return BasisWeights("one-hot", encoder, encoder.T.contiguous(), 0.0, 0.0, 0.0)


@pytest.mark.parametrize("over", ["bases", "reconstructions"])
@pytest.mark.parametrize("method", METHODS)
def test_over_one_hot_bases_every_method_is_its_task_vector_version(method: str, over: str) -> None:
    tasks = family()
    bases = tasks.mixed(one_hot([2, 0, 3, 1]), over)
    expected = result(tasks, method)
    assert torch.allclose(result(bases, method), expected, rtol=0, atol=1e3 * EPS * float(expected.abs().max()))


@pytest.mark.parametrize("method", [name for name in METHODS if name != "magmax"])
def test_no_method_depends_on_the_order_of_the_vectors(method: str, vectors: Vectors) -> None:
    order = [3, 1, 0, 2]
    weights = [WEIGHTS[i] for i in order]
    expected = result(vectors, method, WEIGHTS)
    found = result(vectors.selected(order), method, weights)
    assert torch.allclose(found, expected, rtol=0, atol=1e3 * EPS * float(expected.abs().max()))


@pytest.mark.parametrize("num_bases", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("target", [None, [1.0, 3.0, 0.5, 1.0, 2.0]])
def test_adding_balanced_bases_is_adding_all_task_vectors(num_bases: int, target: list[float] | None) -> None:
    tasks = family(5, seed=1)
    gram = gram_matrix(tasks).matrix
    weights = target or [1.0] * 5
    balanced = tasks.mixed(ae_bases(gram, num_bases, target_weights=target))
    expected = result(tasks, "task_arithmetic", weights)
    found = result(balanced, "task_arithmetic", alpha=sum(weights) / num_bases)
    assert torch.allclose(found, expected, rtol=0, atol=50 * EPS * float(expected.abs().max()))
    if num_bases in (2, 3):
        free = tasks.mixed(ae_bases(gram, num_bases, balance=False, seed=1))
        drifted = result(free, "task_arithmetic", alpha=sum(weights) / num_bases)
        assert float((drifted - expected).abs().max()) > 1e-4 * float(expected.abs().max())


# Refusals


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("tie", {}, r"unknown merging method 'tie' \(did you mean ties\?\)"),
        ("ties", {"densty": 0.1}, r"densty is no option of ties \(did you mean density\?\)"),
        ("mean", {"density": 0.1}, r"density is no option of mean; it has calibrate, spectrum"),
        ("ties", {"density": 0.0}, "above 0 and at most 1; got 0.0"),
        ("ties", {"density": 1.5, "scope": "tensor"}, "above 0 and at most 1; got 1.5"),
        ("top_k", {"scope": "layer"}, "scope of top_k must be model or tensor; got 'layer'"),
        ("top_k", {"overlap": "none"}, "overlap of top_k must be all or shared; got 'none'"),
        ("ties", {"consensus": "count"}, "consensus of ties must be mean or sum; got 'count'"),
        ("mean", {"weights": [1.0]}, "1 weights for 4 vectors"),
    ],
)
def test_bad_options_are_refused_by_name(method: str, options: dict[str, Any], message: str, vectors: Vectors) -> None:
    with pytest.raises(ParameterError, match=message):
        result(vectors, method, **options)


def test_options_are_told_with_their_defaults() -> None:
    last = {"calibrate": "none", "spectrum": 1.0}
    assert find_method("ties").defaults == {"density": 0.2, "consensus": "mean", "scope": "model"} | last
    assert find_method("top_k").defaults == {"density": 0.05, "overlap": "all", "scope": "model"} | last
    assert find_method("tsv").defaults == {"rank": None, "low_rank": True, "orthogonalize": True} | last
    assert find_method("iso_c").defaults == last | {"spectrum": 0.0}
