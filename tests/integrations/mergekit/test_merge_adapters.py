"""``tvbases merge --adapter``: exact at the sum of the ranks, cut with a true error, never larger than its factors."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from oracles.matrices import EPS, Largest
from tvbases_hf.algebra.delta import Dense
from tvbases_hf.models.positions import groups_of
from tvbases_hf.storage.checkpoint import Checkpoint
from tvbases_hf.storage.run import Run, using
from tvbases_mergekit.kernels import Whole
from zoo import peft_models
from zoo.adapter_zoo import (
    Zoo,
    adapter_changes,
    config_of,
    make_adapter,
    make_base,
    make_zoo,
    merged_adapter,
    merged_checkpoint,
    relative,
    run_native,
    weighted,
)
from zoo.hf_models import State, read_state
from zoo.peft_models import Case, load_adapter, load_base, outputs

WEIGHTS = [0.7, -0.4, 1.1]
ATTENTION = ["q_proj", "v_proj"]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return make_zoo(tmp_path_factory.mktemp("zoo"))


def addition(base: Path, adapters: dict[Path, float]) -> dict[str, Any]:
    models = [{"model": f"{base}+{path}", "parameters": {"weight": weight}} for path, weight in adapters.items()]
    return {"merge_method": "task_arithmetic", "base_model": str(base), "models": models}


def dora_change(base: State, adapter: Path, scaling: float) -> State:
    """diag(m / |rows of W + s B A|) (W + s B A) - W, written out."""
    stored, found = {n: t.double() for n, t in read_state(adapter).items()}, {}
    for key, b in stored.items():
        if key.endswith("lora_B.weight"):
            module = key.removeprefix("base_model.model.").removesuffix(".lora_B.weight")
            weight = base[f"{module}.weight"].double()
            updated = weight + scaling * b @ stored[key.replace("lora_B", "lora_A")]
            magnitude = stored.get(key.replace("lora_B.weight", "lora_magnitude_vector"))
            factor = torch.ones(len(b)).double() if magnitude is None else magnitude / updated.norm(dim=1)
            found[f"{module}.weight"] = factor[:, None] * updated - weight
    return found


def test_dora_and_lora_add_up_to_one_dora_adapter(tmp_path: Path) -> None:
    dora = Case("llama", {"target_modules": ATTENTION, "use_dora": True})
    lora = Case("llama", {"target_modules": ["q_proj", "o_proj"], "r": 2, "lora_alpha": 3})
    base = peft_models.make_base(tmp_path / "base", dora)
    paths = [
        peft_models.make_adapter(tmp_path / "a", base, dora, seed=1),
        peft_models.make_adapter(tmp_path / "b", base, dora, seed=2),
        peft_models.make_adapter(tmp_path / "c", base, lora, seed=3),
    ]
    state = read_state(base)
    changes = [dora_change(state, path, s) for path, s in zip(paths, [5 / 3, 5 / 3, 3 / 2], strict=True)]
    names = {name for change in changes for name in change}
    expected = {
        name: torch.stack([w * c[name] for w, c in zip(WEIGHTS, changes, strict=True) if name in c]).sum(dim=0)
        for name in names
    }
    config = addition(base, dict(zip(paths, WEIGHTS, strict=True)))
    run_native(config, tmp_path / "out", "--adapter")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text(encoding="utf-8"))["use_dora"]
    assert relative(adapter_changes(base, tmp_path / "out"), expected) < 1e-5
    whole = merged_checkpoint(config, tmp_path / "whole")
    written = {name: whole[name].double() - state[name].double() for name in names}
    assert relative(written, expected) < 1e-5
    logits = outputs(load_base(tmp_path / "whole", dora))
    assert peft_models.relative(outputs(load_adapter(base, dora, tmp_path / "out")), logits) < 1e-5


def test_the_rank_of_a_module_is_the_sum_over_the_adapters_that_have_it(zoo: Zoo, tmp_path: Path) -> None:
    run_native(config_of(zoo, "task_arithmetic", WEIGHTS), tmp_path / "out", "--adapter")
    tensors = read_state(tmp_path / "out")
    ranks = {name.removeprefix("base_model.model.model.layers.1."): t.shape[0] for name, t in tensors.items()}
    expected = {"self_attn.q_proj": 14, "self_attn.o_proj": 6, "mlp.gate_proj": 4, "mlp.down_proj": 12}
    assert {name: ranks[f"{name}.lora_A.weight"] for name in expected} == expected


def test_more_components_than_the_matrix_has_are_folded_without_loss(tmp_path: Path) -> None:
    kinds = {f"task{i}": {"modules": ("self_attn.v_proj",), "rank": 8, "alpha": 8.0, "layers": 1} for i in range(3)}
    small = make_zoo(tmp_path / "zoo", kinds)
    found = merged_adapter(small, config_of(small, "task_arithmetic", WEIGHTS), tmp_path / "out")
    assert relative(found, weighted(small, WEIGHTS)) < 16 * EPS
    stored = read_state(tmp_path / "out")
    assert {t.shape[0] for n, t in stored.items() if "lora_A" in n} == {16}  # v_proj is 16 x 32, the ranks sum to 24


def measured(found: State, expected: State) -> dict[str, float]:
    """|found - expected| / |expected| by layer group and in total."""
    groups = {name: group for name, group in groups_of(expected).items() if expected[name].any()}
    by_group = {
        group: relative(found, {n: expected[n] for n, own in groups.items() if own == group})
        for group in sorted(set(groups.values()))
    }
    return by_group | {"all": relative(found, {name: expected[name] for name in groups})}


def reported(found: Path) -> dict[str, float]:
    return json.loads((found / "tvbases_merge.json").read_text(encoding="utf-8"))["error"]


@pytest.mark.parametrize("options", [("--rank", "3"), ("--rank", "0.25"), ("--dtype", "bfloat16"),
                                     ("--rank", "5", "--dtype", "float16")])  # fmt: skip
def test_the_reported_error_is_that_of_the_files(options: tuple[str, ...], zoo: Zoo, tmp_path: Path) -> None:
    found = merged_adapter(zoo, config_of(zoo, "task_arithmetic", WEIGHTS), tmp_path / "out", *options)
    error = measured(found, weighted(zoo, WEIGHTS))
    assert reported(tmp_path / "out") == pytest.approx(error, rel=1e-3)
    assert error["all"] > 1e-4


def test_the_error_of_exact_adapters_is_zero(zoo: Zoo, tmp_path: Path) -> None:
    for method, parameters in {"task_arithmetic": {}, "tsv": {}, "ae_bases": {"num_bases": 2}}.items():
        weights = None if method == "ae_bases" else WEIGHTS
        run_native(config_of(zoo, method, weights, **parameters), tmp_path / method, "--adapter")
        assert set(reported(tmp_path / method).values()) == {0.0}


def test_truncation_keeps_the_best_components(zoo: Zoo, tmp_path: Path) -> None:
    found = merged_adapter(zoo, config_of(zoo, "task_arithmetic", WEIGHTS), tmp_path / "out", "--rank", "3")
    for name, exact in weighted(zoo, WEIGHTS).items():
        if exact.any():
            least = torch.linalg.svdvals(exact)[3:].square().sum().sqrt()
            assert float((found[name] - exact).norm()) == pytest.approx(float(least), rel=1e-4, abs=1e-6)


def test_an_energy_rule_bounds_the_error(zoo: Zoo, tmp_path: Path) -> None:
    run_native(config_of(zoo, "task_arithmetic", WEIGHTS), tmp_path / "out", "--adapter", "--rank", "energy:0.9")
    assert 0 < reported(tmp_path / "out")["all"] <= 0.1**0.5


@pytest.mark.parametrize("method", ["ties", "dare_ties", "dare_linear", "breadcrumbs"])
def test_sparse_methods_are_cut_to_the_sum_of_the_ranks_and_say_what_is_lost(
    method: str, zoo: Zoo, tmp_path: Path
) -> None:
    config = config_of(zoo, method, WEIGHTS, density=0.5)
    whole = merged_checkpoint(config, tmp_path / "whole")
    exact = {name: whole[name].double() - tensor for name, tensor in zoo.origin.items()}
    found = merged_adapter(zoo, config, tmp_path / "out")
    error = measured(found, exact)
    assert error["all"] > 0.01  # a sparse matrix is not of low rank
    # What the checkpoint rounds away of the change is all that differs.
    assert reported(tmp_path / "out") == pytest.approx(error, rel=1e-4)
    for name, tensor in exact.items():
        if "q_proj" in name:
            least = torch.linalg.svdvals(tensor)[14:].square().sum().sqrt()
            assert float((found[name] - tensor).norm()) == pytest.approx(float(least), rel=1e-3)


def test_printed_and_written_reports_agree(zoo: Zoo, tmp_path: Path) -> None:
    from commands.command_line import tvbases
    from oracles.merge_oracle import write_config

    file = write_config(tmp_path / "c.yml", config_of(zoo, "task_arithmetic", WEIGHTS))
    outcome = tvbases("merge", file, tmp_path / "out", "--adapter", "--rank", "3", "--json", tmp_path / "r.json")
    report = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert report["error"] == reported(tmp_path / "out")
    for error in report["error"].values():
        assert f"{error:.3%}" in outcome.out and f"{error:.3%}" in card
    assert "merge_method: task_arithmetic" in card and "weight: -0.4" in card


def test_rounding_once_beats_merging_one_by_one_through_bfloat16(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", torch.bfloat16)
    made = [make_adapter(tmp_path / f"{seed}", base, seed, alpha=4.0) for seed in (1, 2, 3)]
    exact = {
        name: tensor.double() + sum((change.get(name, torch.zeros(())) for _, change in made), torch.zeros(()))
        for name, tensor in read_state(base).items()
    }
    once = merged_checkpoint(addition(base, {path: 1.0 for path, _ in made}), tmp_path / "once")
    current = base
    for index, (path, _) in enumerate(made):
        run_native(addition(current, {path: 1.0}), tmp_path / f"step{index}")
        current = tmp_path / f"step{index}"
    chained = read_state(current)
    assert all(torch.equal(once[name], tensor.bfloat16()) for name, tensor in exact.items())  # the nearest there is
    assert relative(chained, exact) > 1.3 * relative(once, exact)


LOW_RANK: dict[str, tuple[Any, dict[str, Any]]] = {
    "linear": (WEIGHTS, {}),
    "task_arithmetic": (WEIGHTS, {"normalize": True}),
    "tsv": (WEIGHTS, {}),
    "tsv_compress": (WEIGHTS, {"rank": 2}),
    "devec_unique": (WEIGHTS, {"pool": "iterative", "shared_weight": 0.5, "threshold": 0.2}),
    "ae_bases": (None, {"num_bases": 2, "merge": "tsv"}),
    "pca_bases": (WEIGHTS, {"num_bases": 2, "over": "reconstructions"}),
}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """Large enough for a matrix to be far larger than its factors; nobody reads its full models."""
    root = tmp_path_factory.mktemp("wide")
    base = make_base(root / "base", layers=1, hidden=128, intermediate=192)
    kind: dict[str, Any] = {"modules": ("self_attn.q_proj", "mlp.down_proj"), "layers": 1}
    adapters = {f"{seed}": make_adapter(root / f"{seed}", base, seed, **kind)[0] for seed in (1, 2, 3)}
    return Zoo(base, adapters, {}, {})


@pytest.mark.parametrize("method", LOW_RANK)
@pytest.mark.parametrize("rank", [None, "3"])
def test_low_rank_routes_neither_form_a_matrix_nor_read_the_base(
    method: str, rank: str | None, wide: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, parameters = LOW_RANK[method]
    models = {name: f"{wide.base}+{path}" for name, path in wide.adapters.items()}
    config = config_of(wide, method, weights, models=models, **parameters)
    if method == "linear":
        del config["base_model"]
    read, opened = Checkpoint.read, []

    def recorded(self: Checkpoint, name: str) -> Tensor:
        opened.append(name)
        return read(self, name)

    monkeypatch.setattr(Checkpoint, "read", recorded)
    with Largest() as largest:
        run_native(config, tmp_path / "out", "--adapter", *(["--rank", rank] if rank else []))
    # Factors of the sum, of rank 12; bases in reconstructions share them. The smaller matrix has 128 x 128 numbers.
    assert 0 < largest.numbers <= 192 * 3 * 12 < 128 * 128
    assert all("lora_" in name for name in opened)


@pytest.mark.parametrize("options", [(), ("--adapter",)])
def test_no_model_is_ever_built(
    options: tuple[str, ...], zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **words: Any) -> None:
        raise AssertionError("a module is built")

    monkeypatch.setattr(torch.nn.Module, "__init__", refuse)
    run_native(config_of(zoo, "ties", WEIGHTS, density=0.5), tmp_path / "out", *options)


def test_a_thread_merges_a_checkpoint_one_weight_at_a_time(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged, results = Whole.combine, []

    def watched(*arguments: Any) -> Any:
        assert all(result() is None for result in results)  # the weight before is gone when the next is made
        found = merged(*arguments)
        assert isinstance(found, Dense)
        results.append(weakref.ref(found.tuned))
        return found

    monkeypatch.setattr(Whole, "combine", watched)
    with using(Run(workers=1)):
        run_native(config_of(zoo, "ties", WEIGHTS, density=0.5), tmp_path / "out")
    assert len(results) == 18  # three layers of six modules


def test_a_merge_is_merged_again(zoo: Zoo, tmp_path: Path) -> None:
    """The sum of two adapters is an adapter like any other: adding the third gives the sum of three."""
    two = {name: path for name, path in zoo.adapters.items() if name != "chat"}
    run_native(config_of(zoo, "task_arithmetic", WEIGHTS[:2], models=two), tmp_path / "two", "--adapter")
    models = {"two": tmp_path / "two", "chat": zoo.adapters["chat"]}
    found = merged_adapter(zoo, config_of(zoo, "task_arithmetic", [1.0, WEIGHTS[2]], models=models), tmp_path / "three")
    assert relative(found, weighted(zoo, WEIGHTS)) < 8 * EPS
