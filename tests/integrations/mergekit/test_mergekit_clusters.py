"""``cluster_bases`` in mergekit: the clusters' means or sums, merged by another method."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from oracles.merge_oracle import (
    added,
    assert_within,
    distance,
    family_vectors,
    merge_config,
    run_ours,
    run_stock,
    write_config,
)
from tvbases_hf.bases import cluster_bases
from tvbases_mergekit.native import merge
from zoo.hf_models import Family, read_state
from zoo.merge_refusals import merge_refused

pytest_plugins = ["zoo.hf_fixtures"]


@pytest.mark.parametrize("inner", ["mean", "sum"])
@pytest.mark.parametrize("num_bases", [None, 2, 3])
def test_the_bases_of_clusters_are_added_to_the_base(
    inner: Any, num_bases: int | None, llama: Family, tmp_path: Path
) -> None:
    vectors = family_vectors(llama)
    encoder = cluster_bases(vectors.gram, num_bases, inner=inner).encoder
    given: dict[str, Any] = {} if num_bases is None else {"num_bases": num_bases}
    config = merge_config(llama, "cluster_bases", inner=inner, lambda_=0.6, **given)
    for run in (run_stock, run_ours):
        merged = run(config, tmp_path / run.__name__)
        assert_within(merged, added(vectors, encoder, 0.6), vectors.rounding(encoder, 0.6))


def test_the_sum_of_all_clusters_sums_is_task_arithmetic(llama: Family, tmp_path: Path) -> None:
    clusters = run_stock(merge_config(llama, "cluster_bases", inner="sum", lambda_=0.3), tmp_path / "clusters")
    plain = merge_config(llama, "task_arithmetic", lambda_=0.3, weight=1.0)
    assert distance(clusters, run_stock(plain, tmp_path / "plain")) < 1e-6


def test_a_merge_of_the_clusters_by_ties_is_the_same_on_changes_of_weights(llama: Family, tmp_path: Path) -> None:
    config = merge_config(llama, "cluster_bases", num_bases=2, merge="ties", density=0.4)
    merged = run_ours(config, tmp_path / "whole")
    file = write_config(tmp_path / "native.yml", config)
    merge(file, tmp_path / "native")
    assert distance(read_state(tmp_path / "native"), merged) < 1e-6


def test_a_negative_weight_forgets_a_tasks_reconstruction(llama: Family, tmp_path: Path) -> None:
    vectors = family_vectors(llama)
    weights = torch.tensor([1.0, -0.5, 0.0, 1.0]).double()
    config = merge_config(llama, "cluster_bases", num_bases=2)
    for model, weight in zip(config["models"], weights.tolist(), strict=True):
        model["parameters"] = {"weight": weight}
    mixing = cluster_bases(vectors.gram, 2).reconstruction * weights
    assert_within(run_stock(config, tmp_path / "out"), added(vectors, mixing), vectors.rounding(mixing))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"inner": "median"}, "inner of cluster must be mean or sum"),
        ({"split_below": 0.2}, "a negative cosine"),
        ({"num_bases": 7}, "num_bases is 7 but there are only 4 tasks"),
        ({"merge": "slerp", "t": 0.5, "num_bases": 1}, "slerp cannot take 2 vectors"),
        ({"merge": "ties", "temperature": 2.0}, "temperature"),
        ({"solver": "adam"}, "solver"),
    ],
)
def test_bad_parameters_are_refused_before_reading(parameters: dict[str, object], message: str, llama: Family) -> None:
    assert message in merge_refused(llama, lambda c: c.update(merge_method="cluster_bases"), **parameters)


def test_without_scikit_learn_the_merge_is_refused_before_reading(
    llama: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    assert "tvbases-hf[cluster]" in merge_refused(llama, lambda c: c.update(merge_method="cluster_bases"))


def test_the_example_leaves_the_number_of_clusters_open() -> None:
    example = Path(__file__).parents[3] / "examples" / "configs" / "cluster_bases.yml"
    assert "num_bases" not in yaml.safe_load(example.read_text())["parameters"]
