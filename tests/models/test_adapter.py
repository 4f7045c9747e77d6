"""Adapters of other options and methods, in other files, and damaged ones: read exactly or refused by name."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from shutil import copyfile
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor

from tvbases_hf.algebra.delta import dense
from tvbases_hf.errors import CheckpointError
from tvbases_hf.models.adapter import Adapter
from tvbases_hf.models.lora_config import HANDLED, HARMLESS, OF_PEFT, REFUSED
from tvbases_hf.storage.checkpoint import Checkpoint
from zoo.hf_models import save_state
from zoo.peft_models import (
    Case,
    copy,
    edit_config,
    edit_tensors,
    load_adapter,
    load_base,
    make_adapter,
    make_base,
    outputs,
    peft_model,
    perturb,
    refusal,
    relative,
    with_deltas,
)

TOLERANCE = 1e-5
LLAMA = Case("llama", {"target_modules": ["q_proj", "k_proj"]})
DORA = Case("llama", {"target_modules": ["q_proj", "k_proj"], "use_dora": True})
BERT = Case("bert", {"target_modules": ["query", "value"]})
WEIGHTS = "adapter_model.safetensors"
FIRST = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def base(root: Path) -> Path:
    return make_base(root / "llama", LLAMA)


@pytest.fixture(scope="module")
def lora(root: Path, base: Path) -> Path:
    return make_adapter(root / "lora", base, LLAMA)


@pytest.fixture(scope="module")
def dora(root: Path, base: Path) -> Path:
    return make_adapter(root / "dora", base, DORA)


@pytest.fixture(scope="module")
def bert_base(root: Path) -> Path:
    return make_base(root / "bert", BERT)


# Options


def test_every_option_of_peft_is_classified_once() -> None:
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    assert fields == HARMLESS | HANDLED | set(REFUSED) | set(OF_PEFT)
    assert len(HARMLESS) + len(HANDLED) + len(REFUSED) + len(OF_PEFT) == len(fields)


@pytest.mark.parametrize("option", sorted(REFUSED))
def test_a_variant_that_is_no_change_of_weights_is_refused_by_name(
    option: str, lora: Path, base: Path, tmp_path: Path
) -> None:
    value: Any = {} if option.endswith("config") or option == "use_bdlora" else [1, 2]
    adapter = edit_config(copy(lora, tmp_path / "a"), **{option: True if option == "use_qalora" else value})
    assert option in refusal(adapter, base)


@pytest.mark.parametrize("option", sorted(REFUSED))
def test_an_option_that_is_off_is_not_refused(option: str, lora: Path, base: Path, tmp_path: Path) -> None:
    adapter = edit_config(copy(lora, tmp_path / "a"), **{option: False if option == "use_qalora" else []})
    assert Adapter.open(adapter, Checkpoint.open(base)).names


def test_an_option_that_nobody_knows_is_refused(lora: Path, base: Path, tmp_path: Path) -> None:
    message = refusal(edit_config(copy(lora, tmp_path / "a"), use_nextgen_lora=True, lora_dtype="bf16"), base)
    assert "use_nextgen_lora" in message and "lora_dtype" not in message


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga"])
def test_an_initialisation_that_changed_the_base_is_refused_by_name(
    init: str, lora: Path, base: Path, tmp_path: Path
) -> None:
    message = refusal(edit_config(copy(lora, tmp_path / "a"), init_lora_weights=init), base)
    assert init in message and "path_initial_model_for_weight_conversion" in message


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_adapter_that_peft_converted_is_read_exactly(init: str, base: Path, tmp_path: Path) -> None:
    case = Case("llama", {"target_modules": ["q_proj", "up_proj"], "init_lora_weights": init, "r": 4})
    model = peft_model(base, case)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(str(tmp_path / "start"))
    model.peft_config["default"].init_lora_weights = init
    perturb(model)
    expected = outputs(model)
    model.float().save_pretrained(
        str(tmp_path / "lora"), path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    adapter = Adapter.open(tmp_path / "lora", Checkpoint.open(base))
    assert adapter.rank == 8
    assert relative(outputs(with_deltas(base, case, adapter)), expected) <= TOLERANCE


def other_methods() -> dict[str, Any]:
    from peft import AdaLoraConfig, FourierFTConfig, IA3Config, LoHaConfig, LoKrConfig, VeraConfig

    where: dict[str, Any] = {"target_modules": ["q_proj"]}
    return {
        "LOHA": LoHaConfig(r=2, **where),
        "LOKR": LoKrConfig(r=2, **where),
        "IA3": IA3Config(target_modules=["q_proj", "up_proj"], feedforward_modules=["up_proj"]),
        "ADALORA": AdaLoraConfig(total_step=10, **where),
        "VERA": VeraConfig(r=2, **where),
        "FOURIERFT": FourierFTConfig(n_frequency=5, **where),
    }


@pytest.mark.parametrize("method", ["LOHA", "LOKR", "IA3", "ADALORA", "VERA", "FOURIERFT"])
def test_another_method_on_a_base_that_transformers_cannot_load_is_refused_by_name(
    method: str, base: Path, tmp_path: Path
) -> None:
    model: Any = load_base(base, LLAMA)
    get_peft_model(model, other_methods()[method]).save_pretrained(str(tmp_path / "a"))
    bare = tmp_path / "bare"
    bare.mkdir()
    copyfile(base / "model.safetensors", bare / "model.safetensors")
    message = refusal(tmp_path / "a", bare)
    assert method in message and "merge_and_unload" in message


def real_variants() -> dict[str, tuple[dict[str, Any], str]]:
    from peft.tuners.lora.config import KasaConfig

    return {
        "KaSA": ({"kasa_config": KasaConfig()}, "kasa_config"),
        "aLoRA": ({"alora_invocation_tokens": [3], "task_type": "CAUSAL_LM"}, "alora_invocation_tokens"),
        "replicated layers": ({"layer_replication": [(0, 2), (1, 2)]}, "layer_replication"),
    }


@pytest.mark.parametrize("variant", sorted(real_variants()))
def test_a_variant_saved_by_peft_is_refused_by_name(variant: str, base: Path, tmp_path: Path) -> None:
    options, word = real_variants()[variant]
    adapter = make_adapter(tmp_path / "a", base, Case("llama", {"target_modules": ["q_proj"]} | options))
    assert word in refusal(adapter, base)


# Files


def test_pickled_weights_are_the_same_adapter(lora: Path, base: Path, tmp_path: Path) -> None:
    adapter = copy(lora, tmp_path / "a")
    torch.save(load_file(adapter / WEIGHTS), adapter / "adapter_model.bin")
    (adapter / WEIGHTS).unlink()
    checkpoint = Checkpoint.open(base)
    found, expected = Adapter.open(adapter, checkpoint), Adapter.open(lora, checkpoint)
    assert found.names == expected.names
    for name in found.names:
        one, other = found.delta(name), expected.delta(name)
        assert one is not None and other is not None and torch.equal(dense(one), dense(other))


class Payload:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.file),)


def test_pickled_weights_never_run_code(lora: Path, base: Path, tmp_path: Path) -> None:
    adapter = copy(lora, tmp_path / "a")
    torch.save({"x": Payload(tmp_path / "run")}, adapter / "adapter_model.bin")
    (adapter / WEIGHTS).unlink()
    assert "never loaded" in refusal(adapter, base)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_factors_count_as_the_numbers_they_hold(
    dtype: torch.dtype, dora: Path, base: Path, tmp_path: Path
) -> None:
    adapter = edit_tensors(copy(dora, tmp_path / "a"), lambda old: {n: t.to(dtype) for n, t in old.items()})
    expected = outputs(load_adapter(base, DORA, adapter))
    read = Adapter.open(adapter, Checkpoint.open(base))
    assert relative(outputs(with_deltas(base, DORA, read)), expected) <= TOLERANCE


def test_each_half_of_an_adapter_is_missed_by_name(lora: Path, base: Path, tmp_path: Path) -> None:
    (copy(lora, tmp_path / "config only") / WEIGHTS).unlink()
    (copy(lora, tmp_path / "weights only") / "adapter_config.json").unlink()
    assert f"not {WEIGHTS}" in refusal(tmp_path / "config only", base)
    assert f"{WEIGHTS} is here but not adapter_config.json" in refusal(tmp_path / "weights only", base)


@pytest.mark.parametrize("text", ["{", "[]", '{"peft_type": null}'])
def test_a_damaged_configuration_is_refused(text: str, lora: Path, base: Path, tmp_path: Path) -> None:
    adapter = copy(lora, tmp_path / "a")
    (adapter / "adapter_config.json").write_text(text, encoding="utf-8")
    assert "adapter_config.json is damaged" in (message := refusal(adapter, base)) or "not a known kind" in message


@pytest.mark.parametrize(
    "words",
    [{"r": "x"}, {"r": 2.5}, {"lora_alpha": "16"}, {"lora_alpha": float("nan")}, {"rank_pattern": {"(": 1}}, {"r": []}],
    ids=str,
)
def test_a_number_of_the_wrong_kind_is_refused(words: dict[str, Any], lora: Path, base: Path, tmp_path: Path) -> None:
    assert "adapter_config.json is damaged" in refusal(edit_config(copy(lora, tmp_path / "a"), **words), base)


def test_options_that_are_left_out_have_pefts_defaults(base: Path, tmp_path: Path) -> None:
    case = Case("llama", {"target_modules": ["q_proj"], "r": 8, "lora_alpha": 8})
    adapter = edit_config(make_adapter(tmp_path / "a", base, case), r=None, lora_alpha=None, use_rslora=None)
    read = Adapter.open(adapter, Checkpoint.open(base))
    assert relative(outputs(with_deltas(base, case, read)), outputs(load_adapter(base, case, adapter))) <= TOLERANCE


def without(name: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda old: {own: tensor for own, tensor in old.items() if own != name}


def with_tensor(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda old: old | {name: tensor}


@pytest.mark.parametrize(
    "change, words",
    [
        (without(f"{FIRST}.lora_B.weight"), ["q_proj", "but not lora_B", "incomplete"]),
        (with_tensor(f"{FIRST}.lora_diag", torch.ones(3)), ["lora_diag", "not known"]),
        (with_tensor(f"{FIRST}.lora_A.bias", torch.ones(3)), ["lora_A.bias"]),
        (with_tensor(f"{FIRST}.lora_B.bias", torch.ones(16)), ["lora_bias: false", "do not belong together"]),
        (with_tensor(f"{FIRST}.lora_magnitude_vector", torch.ones(16)), ["use_dora: false", "do not belong together"]),
        (with_tensor(f"{FIRST}.lora_A.weight", torch.ones(0, 16)), ["q_proj", "rank 0"]),
        (with_tensor(f"{FIRST}.lora_A.weight", torch.ones(5, 16)), ["rank 5", "says 3"]),
        (with_tensor(f"{FIRST}.lora_A.weight", torch.ones(48)), ["lora_A", "no matrix"]),
        (lambda _: {}, ["holds no tensors"]),
    ],
    ids=["half a pair", "variant", "bias of A", "bias", "magnitude", "rank 0", "other rank", "shard", "nothing"],
)
def test_a_file_that_does_not_fit_its_configuration_is_refused(
    change: Callable[..., Any], words: list[str], lora: Path, base: Path, tmp_path: Path
) -> None:
    message = refusal(edit_tensors(copy(lora, tmp_path / "a"), change), base)
    assert all(word in message for word in words), message


def test_rank_zero_in_the_configuration_is_refused(lora: Path, base: Path, tmp_path: Path) -> None:
    assert "rank 0" in refusal(edit_config(copy(lora, tmp_path / "a"), r=0), base)


def test_dora_without_magnitudes_is_refused(lora: Path, base: Path, tmp_path: Path) -> None:
    assert "no lora_magnitude_vector" in refusal(edit_config(copy(lora, tmp_path / "a"), use_dora=True), base)


def test_factors_of_a_module_that_is_not_targeted_are_refused(lora: Path, base: Path, tmp_path: Path) -> None:
    assert "does not target it" in refusal(edit_config(copy(lora, tmp_path / "a"), target_modules=["k_proj"]), base)


@pytest.mark.parametrize("part", ["lora_A.weight", "lora_B.weight", "lora_magnitude_vector"])
def test_nan_in_a_factor_is_named_when_it_is_read(part: str, dora: Path, base: Path, tmp_path: Path) -> None:
    def spoil(old: dict[str, Tensor]) -> dict[str, Tensor]:
        old[f"{FIRST}.{part}"].view(-1)[1] = float("nan")
        return old

    adapter = Adapter.open(edit_tensors(copy(dora, tmp_path / "a"), spoil), Checkpoint.open(base), label="mine")
    with pytest.raises(CheckpointError, match=rf'"mine": {FIRST}.{part} holds 1 NaN'):
        adapter.delta("model.layers.0.self_attn.q_proj.weight")


def test_dora_of_a_row_of_zeros_is_refused(dora: Path, base: Path, tmp_path: Path) -> None:
    state = load_file(base / "model.safetensors")
    state["model.layers.0.self_attn.q_proj.weight"][2] = 0
    pruned = save_state(tmp_path / "base", state, base)
    adapter = edit_tensors(copy(dora, tmp_path / "a"), lambda old: old | {f"{FIRST}.lora_B.weight": torch.zeros(16, 3)})
    with pytest.raises(CheckpointError, match="rows of zeros"):
        Adapter.open(adapter, Checkpoint.open(pruned)).delta("model.layers.0.self_attn.q_proj.weight")
