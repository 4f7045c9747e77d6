"""tsv, tsv_compress and devec_unique as mergekit runs them, against dense float64 arithmetic."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

from commands.command_line import refused
from tvbases_hf.algebra import tall
from tvbases_hf.methods.devec import Options
from tvbases_mergekit import register
from tvbases_mergekit.command import merge
from zoo.hf_models import Family, read_state

pytest_plugins = ("zoo.hf_fixtures",)
LAMBDA = 0.7
# float32 weights, changes of about 1 % of them, a few roundings each.
TOLERANCE = 1e-6


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    register()


def run(
    family: Family, out: Path, method: str, weights: list[float] | None = None, **parameters: object
) -> dict[str, Tensor]:
    """Merge a family by mergekit's own command; the merged tensors."""
    models = [{"model": str(path)} for path in family.tuned()]
    for model, weight in zip(models, weights or [], strict=False):
        model["parameters"] = {"weight": weight}  # type: ignore[assignment]
    config = {
        "merge_method": method,
        "base_model": str(family.base),
        "models": models,
        "parameters": {"lambda": LAMBDA, **parameters},
        "dtype": "float32",
    }
    file = out.parent / f"{out.name}.yml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    merge([str(file), str(out), "--quiet"])
    return read_state(out)


def deltas(family: Family) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    base = {name: tensor.double() for name, tensor in read_state(family.base).items()}
    return base, [{n: t.double() - base[n] for n, t in read_state(path).items()} for path in family.tuned()]


def assert_equal(merged: dict[str, Tensor], base: dict[str, Tensor], change: dict[str, Tensor]) -> None:
    for name, tensor in merged.items():
        expected = base[name] + LAMBDA * change[name]
        assert (tensor.double() - expected).norm() <= TOLERANCE * expected.norm(), name


def dense_tsv(parts: list[Tensor], weights: list[float], kept: int) -> Tensor:
    """Algorithm 1 of the TSV paper with full SVDs."""
    factors = [torch.linalg.svd(part, full_matrices=False) for part in parts]
    left = torch.cat([u[:, :kept] for u, _, _ in factors], 1)
    right = torch.cat([v[:kept].T for _, _, v in factors], 1)
    values = torch.cat([w * s[:kept] for w, (_, s, _) in zip(weights, factors, strict=True)])
    pu, _, qu = torch.linalg.svd(left, full_matrices=False)
    pv, _, qv = torch.linalg.svd(right, full_matrices=False)
    return (pu @ qu * values) @ (pv @ qv).T


@pytest.mark.parametrize("by_rows", [False, True], ids=["whole", "by rows"])
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [1.0, -0.5, 0.0]], ids=["added", "negative"])
def test_tsv_in_mergekit_is_algorithm_1_on_matrices_and_the_mean_elsewhere(
    llama: Family, tmp_path: Path, weights: list[float], by_rows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if by_rows:
        monkeypatch.setattr(tall, "TALL", 1)
        monkeypatch.setattr(tall, "LARGE", 1)
    tasks = len(llama.tasks)
    weights = (weights + [1.0] * tasks)[:tasks]
    merged = run(llama, tmp_path / "merged", "tsv", weights)
    base, changes = deltas(llama)
    expected = {}
    for name in merged:
        parts = [change[name] for change in changes]
        if parts[0].ndim == 2:
            expected[name] = dense_tsv(parts, weights, min(parts[0].shape) // tasks)
        else:
            expected[name] = torch.stack([w * part for w, part in zip(weights, parts, strict=True)]).sum(0) / tasks
    assert_equal(merged, base, expected)


def test_tsv_without_both_steps_is_the_sum(bert: Family, tmp_path: Path) -> None:
    merged = run(bert, tmp_path / "merged", "tsv", low_rank=False, orthogonalize=False)
    base, changes = deltas(bert)
    total = {name: torch.stack([change[name] for change in changes]).sum(0) for name in merged}
    expected = {name: tensor if tensor.ndim == 2 else tensor / len(changes) for name, tensor in total.items()}
    assert_equal(merged, base, expected)


def test_tsv_compress_adds_truncated_models(bert: Family, tmp_path: Path) -> None:
    merged = run(bert, tmp_path / "merged", "tsv_compress", rank=0.25)
    base, changes = deltas(bert)
    expected = {}
    for name in merged:
        total = torch.zeros_like(base[name])
        for change in changes:
            part = change[name]
            if part.ndim == 2:
                u, s, v = torch.linalg.svd(part, full_matrices=False)
                kept = max(1, min(part.shape) // 4)
                part = (u[:, :kept] * s[:kept]) @ v[:kept]
            total += part
        expected[name] = total
    assert_equal(merged, base, expected)


def dense_unique(parts: list[Tensor], rank: int, threshold: float) -> list[Tensor]:
    """Section 3.2 of the DeVec paper with n x n projectors."""
    spaces = [torch.linalg.svd(part, full_matrices=False)[0][:, :rank] for part in parts]
    product = torch.eye(len(parts[0]), dtype=torch.float64)
    for space in spaces:
        product = product @ space @ space.T
    values, vectors = torch.linalg.eig(product)
    chosen = torch.where(values.imag < 0, vectors.imag, vectors.real)[:, values.real > threshold]
    basis = torch.linalg.qr(chosen).Q if chosen.shape[1] else chosen
    return [part - basis @ (basis.T @ part) for part in parts]


def test_devec_unique_leaves_out_what_the_tasks_share(llama: Family, tmp_path: Path) -> None:
    threshold = 0.1  # the family's changes have full rank: four of them share little
    merged = run(llama, tmp_path / "merged", "devec_unique", rank=0.25, threshold=threshold)
    base, changes = deltas(llama)
    expected, touched = {}, 0
    for name in merged:
        parts = [change[name] for change in changes]
        if parts[0].ndim == 2 and min(parts[0].shape) >= 16:
            unique = dense_unique(parts, min(parts[0].shape) // 4, threshold)
            touched += sum((part - own).norm() > 0.01 * part.norm() for part, own in zip(parts, unique, strict=True))
            parts = unique
        expected[name] = torch.stack(parts).sum(0)
    assert touched, "nothing is shared: the test would pass without the method"
    assert_equal(merged, base, expected)


def test_unique_plus_shared_negation_is_whole_negation(llama: Family, tmp_path: Path) -> None:
    """Pool iterative, one target: its unique and its shared part make up its task vector."""
    weights = [-0.8] + [0.0] * (len(llama.tasks) - 1)
    options = {"rank": 0.25, "threshold": 0.4, "pool": "iterative"}
    merged = run(llama, tmp_path / "merged", "devec_unique", weights, **options, shared_weight=-0.8)
    base, changes = deltas(llama)
    assert_equal(merged, base, {name: -0.8 * change for name, change in changes[0].items()})


@pytest.mark.parametrize(
    ("method", "parameter"),
    [
        ("tsv", {"rank": 0}),
        ("tsv_compress", {"rank": "energy:2"}),
        ("devec_unique", {"threshold": 1.5}),
        ("devec_unique", {"threshold": 0}),
        ("devec_unique", {"pool": "all"}),
        ("devec_unique", {"subspace": "row"}),
        ("devec_unique", {"side": "both"}),
        ("devec_unique", {"rank": 0}),
    ],
)
def test_bad_parameters_are_refused_in_one_line(
    method: str, parameter: dict[str, object], bert: Family, tmp_path: Path
) -> None:
    config = {
        "merge_method": method,
        "base_model": str(bert.base),
        "models": [{"model": str(path)} for path in bert.tuned()],
        "parameters": parameter,
    }
    (tmp_path / "merge.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    message = refused(tmp_path, "mergekit-yaml", tmp_path / "merge.yml", tmp_path / "out")
    assert next(iter(parameter)) in message


def test_options_default_to_the_papers_threshold() -> None:
    assert Options().threshold == 0.85
