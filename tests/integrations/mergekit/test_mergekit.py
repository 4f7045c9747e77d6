"""ae_bases and pca_bases in mergekit's own merge of directories, against dense float64 arithmetic on the same files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from oracles.merge_oracle import (
    Vectors,
    added,
    assert_within,
    balanced_reconstruction,
    distance,
    family_vectors,
    merge_config,
    run_ours,
    run_stock,
    sign_elected,
    trimmed,
)
from tvbases_hf.bases import ae_bases, pca_bases
from tvbases_hf.bases.adam import adam_encoder
from zoo.hf_models import Family, State

pytest_plugins = ["zoo.hf_fixtures"]

FAMILIES = ["llama", "llama_sharded", "llama_bf16", "bert", "bert_sharded"]


def run_merge(config: dict[str, Any], out: Path, *options: str) -> State:
    """mergekit's own command; ours for a BertModel, which mergekit 0.1.5 cannot plan (see tvbases_mergekit.mended)."""
    return (run_ours if "bert" in config["base_model"] else run_stock)(config, out, *options)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return request.getfixturevalue(request.param)


def with_weights(config: dict[str, Any], weights: list[float]) -> dict[str, Any]:
    models = [m | {"parameters": {"weight": w}} for m, w in zip(config["models"], weights, strict=True)]
    return config | {"models": models}


def test_default_merge_adds_all_task_vectors_times_m_over_t(family: Family, tmp_path: Path) -> None:
    vectors = family_vectors(family)
    merged = run_merge(merge_config(family, num_bases=2, lambda_=0.4), tmp_path / "out")
    equal = torch.full((vectors.count, 1), 2 / vectors.count, dtype=torch.float64)
    expected, bound = added(vectors, equal, 0.4), vectors.rounding(equal.expand(-1, 4), 0.4)
    assert_within(merged, expected, bound)
    assert distance(merged, vectors.base) > 1e-3  # the merge moved the base by far more than the tolerance


def test_our_command_and_mergekits_own_write_the_same_tensors(llama: Family, tmp_path: Path) -> None:
    config = merge_config(llama, num_bases=2)
    ours, stock = run_ours(config, tmp_path / "ours"), run_stock(config, tmp_path / "stock")
    assert ours.keys() == stock.keys()
    assert all(torch.equal(ours[name], stock[name]) for name in stock)
    names = {file.name for file in (tmp_path / "stock").iterdir()}
    assert {file.name for file in (tmp_path / "ours").iterdir()} == names | {"tvbases_merge.json"}


def test_shards_do_not_change_a_bit(llama: Family, llama_sharded: Family, tmp_path: Path) -> None:
    single = run_merge(merge_config(llama, num_bases=3, balance=False), tmp_path / "single")
    sharded = run_merge(
        merge_config(llama_sharded, num_bases=3, balance=False), tmp_path / "sharded", "--out-shard-size", "8k"
    )
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert all(torch.equal(single[name], sharded[name]) for name in single)


def test_free_bases_weigh_tasks_as_their_encoder_says(family: Family, tmp_path: Path) -> None:
    vectors = family_vectors(family)
    free = ae_bases(vectors.gram, 2, balance=False, seed=5)
    merged = run_merge(merge_config(family, num_bases=2, balance=False, seed=5, lambda_=0.7), tmp_path / "out")
    expected = added(vectors, free.encoder, 0.7)
    assert_within(merged, expected, vectors.rounding(free.encoder, 0.7))
    balanced = added(vectors, torch.full_like(free.encoder, 1 / vectors.count), 0.7)
    assert distance(expected, balanced) > 1e-5  # there is a difference to be found


def test_adam_bases_weigh_tasks_as_their_encoder_says(
    bert: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shortened(*arguments: Any) -> tuple[Tensor, Tensor]:
        gram, num_bases, rows, scale, temperature, anneal, _, seed = arguments
        return adam_encoder(gram, num_bases, rows, scale, temperature, anneal, 200, seed)

    monkeypatch.setattr("tvbases_hf.bases.ae.adam_encoder", shortened)
    vectors = family_vectors(bert)
    options: dict[str, Any] = {"solver": "adam", "balance": False, "temperature": 2.0, "seed": 1}
    trained = ae_bases(vectors.gram, 2, **options)
    merged = run_merge(merge_config(bert, num_bases=2, **options), tmp_path / "out")
    expected = added(vectors, trained.encoder)
    assert_within(merged, expected, vectors.rounding(trained.encoder))
    assert distance(expected, added(vectors, ae_bases(vectors.gram, 2, balance=False).encoder)) > 1e-5


def test_sum_of_balanced_reconstructions_is_the_sum_of_the_task_vectors(family: Family, tmp_path: Path) -> None:
    vectors = family_vectors(family)
    merged = run_merge(merge_config(family, num_bases=2, over="reconstructions", lambda_=0.5), tmp_path / "out")
    identity = torch.eye(vectors.count, dtype=torch.float64)
    assert_within(merged, added(vectors, identity, 0.5), vectors.rounding(identity, 0.5))


def test_weights_add_reconstructions_and_negative_ones_forget(family: Family, tmp_path: Path) -> None:
    vectors = family_vectors(family)
    weights = [-0.8, 0.3, 1.0, 0.0][: vectors.count]
    merged = run_merge(with_weights(merge_config(family, num_bases=2, lambda_=0.9), weights), tmp_path / "out")
    mixing = balanced_reconstruction(vectors, 2) * torch.tensor(weights, dtype=torch.float64)
    expected = added(vectors, mixing, 0.9)
    assert_within(merged, expected, vectors.rounding(mixing, 0.9))
    exact = added(vectors, torch.diag(torch.tensor(weights, dtype=torch.float64)), 0.9)
    assert distance(expected, exact) > 1e-4  # two bases cannot hold all tasks: reconstructions are not the originals


def test_pca_bases_are_the_centred_components_without_the_mean(llama: Family, tmp_path: Path) -> None:
    vectors = family_vectors(llama)
    merged = run_merge(merge_config(llama, "pca_bases", num_bases=2, lambda_=1.5), tmp_path / "out")
    encoder = pca_bases(vectors.gram, 2).encoder
    assert_within(merged, added(vectors, encoder, 1.5), vectors.rounding(encoder, 1.5))
    left = torch.linalg.svd(vectors.matrix - vectors.matrix.mean(dim=1, keepdim=True), full_matrices=False)
    bases = vectors.matrix @ encoder
    cosines = (left.U[:, :2] * bases / bases.norm(dim=0)).sum(dim=0)
    assert (cosines.abs() - 1).abs().max() < 1e-9


def test_pca_reconstructions_add_up_to_the_task_vectors(llama: Family, tmp_path: Path) -> None:
    vectors = family_vectors(llama)
    merged = run_merge(merge_config(llama, "pca_bases", num_bases=1, over="reconstructions"), tmp_path / "out")
    identity = torch.eye(vectors.count, dtype=torch.float64)
    assert_within(merged, added(vectors, identity), vectors.rounding(identity))


def ties(bases: Tensor, density: float) -> Tensor:
    return sign_elected(trimmed(bases, density), torch.ones(len(bases)).double(), normalize=True)


def breadcrumbs(bases: Tensor, density: float, gamma: float) -> Tensor:
    """Without the ``gamma`` largest and then without the smallest, so that ``density`` of each vector is left."""
    kept = torch.zeros_like(bases).reshape(len(bases), -1)
    for row, values in zip(kept, bases.reshape(len(bases), -1), strict=True):
        size, keep, top = len(values), int(density * len(values)), int(gamma * len(values))
        order = values.abs().argsort()
        chosen = order[max(0, size - keep - top) :][:keep]
        row[chosen] = values[chosen]
    return kept.sum(dim=0).reshape(bases.shape[1:])


def model_stock(bases: Tensor) -> Tensor:
    """t * mean with t = k cos / (1 + (k - 1) cos), cos the mean cosine of all pairs (Model Stock, equation 3)."""
    flat = bases.reshape(len(bases), -1)
    unit = flat / flat.norm(dim=1, keepdim=True)
    count = len(bases)
    pairs = [(unit[i] @ unit[j]).clamp(-1, 1) for i in range(count) for j in range(i)]
    cosine = torch.stack(pairs).mean()
    return count * cosine / (1 + (count - 1) * cosine) * bases.mean(dim=0)


INNER: dict[str, tuple[dict[str, Any], Any]] = {
    "ties": ({"density": 0.5}, lambda b: ties(b, 0.5)),
    "breadcrumbs": ({"density": 0.6, "gamma": 0.1}, lambda b: breadcrumbs(b, 0.6, 0.1)),
    "model_stock": ({}, model_stock),
}


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_inner_methods_see_bases_as_models(
    inner: str, name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    parameters, dense = INNER[inner]
    family = request.getfixturevalue(name)
    vectors = family_vectors(family)
    encoder = ae_bases(vectors.gram, 2).encoder
    merged = run_merge(merge_config(family, num_bases=2, merge=inner, lambda_=0.6, **parameters), tmp_path / "out")
    changes = {key: dense(bases) for key, bases in vectors.mixed(encoder).items()}
    expected = {key: vectors.base[key] + 0.6 * change for key, change in changes.items()}
    rounding = vectors.rounding(encoder, 0.6)
    # model_stock's angle comes from float32 sums over the whole tensor; the others work on single numbers.
    slack = {k: 1e-4 * c.abs() if inner == "model_stock" else 0 * c for k, c in changes.items()}
    assert_within(merged, expected, {key: rounding[key] + slack[key] for key in rounding})
    assert distance(expected, added(vectors, encoder, 0.6)) > 1e-4  # the inner method is not mere addition


def test_dare_ties_drops_at_random_by_the_seed(llama: Family, tmp_path: Path) -> None:
    """One weight: its drop masks are the first numbers of the generator that --random-seed sets."""
    from mergekit.merge_methods import merge_tensors

    from tvbases_mergekit import register

    register()
    vectors = family_vectors(llama)
    name = "model.layers.0.mlp.up_proj.weight"
    tau = vectors.tau[name]
    models = [vectors.base[name], *(vectors.base[name] + tau)]
    torch.manual_seed(7)
    merged = merge_tensors(
        models, "ae_bases", base_index=0, parameters={"num_bases": 2, "merge": "dare_ties", "density": 0.5}
    )
    flat = tau.reshape(vectors.count, -1)
    bases = torch.tensordot(ae_bases(flat @ flat.T, 2).encoder.T, tau, dims=1)
    torch.manual_seed(7)
    masks = torch.stack([torch.bernoulli(torch.full(basis.shape, 0.5)) for basis in bases]).double()
    kept = torch.stack([b * m * (b.abs().sum() / (b * m).abs().sum()) for b, m in zip(bases, masks, strict=True)])
    expected = sign_elected(kept, torch.ones(2).double(), normalize=False)
    # mergekit draws and rescales in float32.
    assert (merged - vectors.base[name] - expected).abs().max() < 16 * 2**-23 * kept.abs().max()

    config = merge_config(llama, num_bases=2, merge="dare_ties", density=0.5)
    first, again, other = (
        run_merge(config, tmp_path / f"out{i}", "--random-seed", seed) for i, seed in enumerate(["1", "1", "2"])
    )
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert distance(first, other) > 1e-4


def in_ulps(a: Tensor, b: Tensor) -> Tensor:
    """Distance in float32 steps, for numbers of one sign."""
    return (a.view(torch.int32).long() - b.view(torch.int32).long()).abs()


@pytest.mark.parametrize(
    ("inner", "parameters"), [("task_arithmetic", {}), ("ties", {"density": 0.4}), ("breadcrumbs", {"density": 0.8})]
)
def test_as_many_bases_as_models_is_the_inner_method_itself(
    inner: str, parameters: dict[str, Any], llama: Family, tmp_path: Path
) -> None:
    bases = run_merge(merge_config(llama, num_bases=4, merge=inner, lambda_=0.3, **parameters), tmp_path / "bases")
    plain = with_weights(merge_config(llama, inner, lambda_=0.3, **parameters), [1.0] * 4)
    models = run_merge(plain, tmp_path / "models")
    assert bases.keys() == models.keys()
    assert max(int(in_ulps(bases[name], models[name]).max()) for name in models) <= 1


@pytest.mark.parametrize(("num_bases", "family_name"), [(1, "llama"), (3, "llama"), (2, "bert")])
def test_balanced_bases_are_task_arithmetic_with_lambda_times_m_over_t(
    num_bases: int, family_name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    family = request.getfixturevalue(family_name)
    count = len(family.tasks)
    weights = [1.0] * count
    plain = merge_config(family, "task_arithmetic", lambda_=0.8 * num_bases / count)
    expected = run_merge(with_weights(plain, weights), tmp_path / "models")
    balanced = run_merge(merge_config(family, num_bases=num_bases, lambda_=0.8), tmp_path / "balanced")
    assert distance(balanced, expected) < 1e-6
    if num_bases > 1:
        free = run_merge(merge_config(family, num_bases=num_bases, lambda_=0.8, balance=False), tmp_path / "free")
        assert distance(free, expected) > 1e-5


def test_output_is_rounded_once(llama_bf16: Family, tmp_path: Path) -> None:
    """bf16 files, computed in bf16 by mergekit's default: we subtract and add in float32 and round at the end."""
    vectors = family_vectors(llama_bf16)
    equal = torch.full((4, 2), 0.25, dtype=torch.float64)
    expected = added(vectors, equal)
    merged: State = run_merge(merge_config(llama_bf16, dtype=None, num_bases=2), tmp_path / "out")
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    half_step = torch.finfo(torch.bfloat16).eps / 2
    rounding = Vectors(vectors.base, vectors.tau).rounding(equal)
    assert_within(merged, expected, {key: half_step * expected[key].abs() + rounding[key] for key in expected})
