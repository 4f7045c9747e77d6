"""LoRA biases of layers that have none in the base: an adapter holds them exactly, and no checkpoint can."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from commands.command_line import refused, tvbases
from oracles.merge_oracle import write_config
from tvbases_hf.algebra.delta import dense
from tvbases_hf.basis import Basis, LoraBasis
from tvbases_hf.errors import CheckpointError, ParameterError
from tvbases_hf.models.vectors import Vectors
from tvbases_peft import add_weighted_adapter
from zoo.adapter_families import Adapters, measured_errors, random_adapter, random_adapters
from zoo.peft_models import Case, active, edit_tensors, load_adapter, load_base, loaded, outputs, relative

BIASED: dict[str, Any] = {"target_modules": ["q_proj", "down_proj"], "lora_bias": True}
OTHERS = [BIASED | {"r": 2, "use_rslora": True}, {"target_modules": ["q_proj", "v_proj"]}]
CASE = Case("llama", BIASED | {"task_type": "CAUSAL_LM"})
WEIGHTS = {"math": 0.7, "code": -1.3}
BIAS = "model.layers.0.self_attn.q_proj.bias"


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Adapters:
    return random_adapters(tmp_path_factory.mktemp("biases"), CASE, tuple(WEIGHTS))


def summed(base: Path, paths: dict[Path, float]) -> Tensor:
    """Logits in float64 of the base plus what PEFT's own layers hold: s B A, and the scaled bias of B."""
    expected: Any = load_base(base, CASE).double()
    for path, weight in paths.items():
        adapter: Any = load_adapter(base, CASE, path).double()
        for name, layer in adapter.base_model.model.named_modules():
            if hasattr(layer, "get_delta_weight"):
                own = expected.get_submodule(name)
                own.weight.data += weight * layer.get_delta_weight("default").detach()
                if layer.lora_bias["default"]:
                    zero = torch.zeros(len(own.weight), dtype=torch.float64) if own.bias is None else own.bias.data
                    bias = layer.scaling["default"] * layer.lora_B["default"].bias.detach()
                    own.bias = nn.Parameter(zero + weight * bias)
    return outputs(expected)


def configuration(adapters: Adapters, out: Path, method: str = "task_arithmetic") -> Path:
    models = [{"model": str(adapters.tasks[task]), "parameters": {"weight": w}} for task, w in WEIGHTS.items()]
    return write_config(out, {"merge_method": method, "base_model": str(adapters.base), "models": models})


def test_a_merged_adapter_holds_the_sum_of_the_biases(adapters: Adapters, tmp_path: Path) -> None:
    config = configuration(adapters, tmp_path / "sum.yml")
    assert tvbases("merge", config, tmp_path / "out", "--adapter", "--quiet").code == 0
    found = outputs(load_adapter(adapters.base, CASE, tmp_path / "out"))
    assert relative(found, summed(adapters.base, {adapters.tasks[t]: w for t, w in WEIGHTS.items()})) <= 1e-6


@pytest.mark.parametrize("weights", [[1.0, 0.0, 0.0], [0.8, -1.2, 0.5]], ids=["identity", "sum"])
def test_a_loaded_model_adds_the_biases(weights: list[float], tmp_path: Path) -> None:
    model = loaded(tmp_path, Case("llama", {}), [BIASED, *OTHERS])
    add_weighted_adapter(model, ["a", "b", "c"], weights, "sum")
    expected = summed(tmp_path / "base", {tmp_path / name: w for name, w in zip("abc", weights, strict=True)})
    assert relative(active(model, "sum"), expected) <= 1e-6
    if weights[1] == 0:
        assert relative(active(model, "sum"), active(model, "a")) <= 1e-6


@pytest.mark.parametrize("more", [[], ["--dry-run"]], ids=["writing", "dry run"])
def test_a_checkpoint_of_such_a_merge_is_refused(more: list[str], adapters: Adapters, tmp_path: Path) -> None:
    config = configuration(adapters, tmp_path / "sum.yml")
    message = refused(tmp_path, "merge", config, tmp_path / "out", "--quiet", *more)
    assert "4 biases are an adapter's (lora_bias), of layers that have none in the base (first: model" in message


def test_every_command_that_writes_a_checkpoint_refuses(adapters: Adapters, tmp_path: Path) -> None:
    tasks, two = adapters.options(), ["--num-bases", "2"]
    for arguments in (["decompose", *tasks], ["online", *tasks, *two], ["online", *tasks, *two, "--dry-run"]):
        assert "(lora_bias)" in refused(tmp_path, *arguments, "--out", tmp_path / "out")


def test_beside_a_full_checkpoint_such_an_adapter_is_refused(adapters: Adapters) -> None:
    with pytest.raises(CheckpointError, match=r"\(lora_bias\)"):
        Vectors.open(adapters.base, {"math": adapters.tasks["math"], "full": adapters.base})


def test_a_basis_keeps_the_biases_and_gives_every_task_back(adapters: Adapters, tmp_path: Path) -> None:
    Basis.build(adapters.vectors(), method="tsv", rank=3).save_pretrained(tmp_path / "basis")
    basis = LoraBasis.from_pretrained(tmp_path / "basis")
    assert basis.info.task_error == pytest.approx(measured_errors(basis, adapters.vectors()), rel=1e-5, abs=1e-6)
    assert max(basis.info.task_error) <= 1e-6
    merged = outputs(load_adapter(adapters.base, CASE, tmp_path / "basis"))
    assert relative(merged, summed(adapters.base, dict.fromkeys(adapters.tasks.values(), 1.0))) <= 1e-6
    for task, path in adapters.tasks.items():
        basis.adapter(task, base=adapters.base).save_pretrained(tmp_path / task)
        found = outputs(load_adapter(adapters.base, CASE, tmp_path / task))
        assert relative(found, summed(adapters.base, {path: 1.0})) <= 1e-6
        with pytest.raises(CheckpointError, match=r"\(lora_bias\)"):
            basis.restore(task, adapters.base, tmp_path / "whole")
    again = basis.vectors(adapters.base, over="reconstructions")
    assert BIAS in again.names
    assert relative(dense(again.deltas(BIAS)[0]), dense(adapters.vectors().deltas(BIAS)[0])) <= 1e-6


def test_beside_dora_they_are_refused(adapters: Adapters, tmp_path: Path) -> None:
    dora = random_adapter(tmp_path / "dora", adapters.base, Case("llama", {**OTHERS[1], "use_dora": True}), seed=5)
    config = configuration(Adapters(CASE, adapters.base, {**adapters.tasks, "code": dora}), tmp_path / "sum.yml")
    message = refused(tmp_path, "merge", config, tmp_path / "out", "--adapter")
    assert "4 LoRA biases are of layers that have no bias in the base" in message and "no DoRA" in message
    with pytest.raises(ParameterError, match="no DoRA"):
        model = loaded(tmp_path / "loaded", Case("llama", {}), [BIASED, OTHERS[1] | {"use_dora": True}])
        add_weighted_adapter(model, ["a", "b"], [1.0, 1.0], "sum")


def test_a_bias_of_another_length_is_refused(adapters: Adapters, tmp_path: Path) -> None:
    path = random_adapter(tmp_path / "a", adapters.base, CASE, seed=1)
    stored = f"base_model.model.{BIAS.removesuffix('.bias')}.lora_B.bias"
    edit_tensors(path, lambda own: {**own, stored: own[stored][:-1]})
    with pytest.raises(CheckpointError, match=r"q_proj has 16 outputs and a lora_B.bias of \[15\]"):
        Vectors.open(adapters.base, {"a": path})
