"""One adapter with weight 1 is that adapter: in a loaded model, and through ``tvbases merge``, for every variant.

PEFT's own add_weighted_adapter is asked for the same, and is wrong where the table says so.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel

from commands.command_line import refused
from oracles.merge_oracle import write_config
from tvbases_hf.errors import CheckpointError
from tvbases_peft import add_weighted_adapter
from zoo.adapter_zoo import run_native
from zoo.peft_models import (
    Case,
    active,
    load_adapter,
    load_base,
    make_adapter,
    make_base,
    make_converted,
    outputs,
    peft_model,
    perturb,
    relative,
)

TOLERANCE = 1e-5
WRONG = 1e-3  # a hundred times as much
ATTENTION = ["q_proj", "v_proj"]


@dataclass(frozen=True)
class Variant:
    """``peft_is_right``: whether PEFT's linear combination of one adapter is that adapter."""

    model: str
    config: Mapping[str, Any]
    peft_is_right: bool = True

    @property
    def case(self) -> Case:
        return Case(self.model, self.config)


LLAMA = {"target_modules": ATTENTION}
GPT2 = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
VARIANTS = {
    "plain": Variant("llama", {"target_modules": [*ATTENTION, "down_proj"]}),
    "rslora": Variant("llama", LLAMA | {"use_rslora": True}, peft_is_right=False),
    "lora_bias": Variant("bert", {"target_modules": ["query", "dense"], "lora_bias": True}, peft_is_right=False),
    "alpha_pattern": Variant("llama", LLAMA | {"alpha_pattern": {"v_proj": 11, "layers.1.self_attn.q_proj": 2}}),
    "rank_pattern": Variant("llama", LLAMA | {"rank_pattern": {"layers.0.self_attn.q_proj": 5}}),
    "fan_in_fan_out": Variant("gpt2", GPT2),
    "convolution": Variant("vit", {"target_modules": ["projection", "value"]}),
    "embedding": Variant("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "modules_to_save": Variant("llama", LLAMA | {"modules_to_save": ["lm_head"]}, peft_is_right=False),
    "layers_to_transform": Variant("llama", LLAMA | {"layers_to_transform": [1], "layers_pattern": "layers"}),
    "pissa, converted": Variant("llama", LLAMA | {"init_lora_weights": "pissa", "r": 4}),
    "olora, converted": Variant("llama", LLAMA | {"init_lora_weights": "olora", "r": 4}),
    "dora": Variant("llama", LLAMA | {"use_dora": True}, peft_is_right=False),
    "dora, rslora": Variant("llama", LLAMA | {"use_dora": True, "use_rslora": True}, peft_is_right=False),
    "dora, fan_in_fan_out": Variant("gpt2", GPT2 | {"use_dora": True}, peft_is_right=False),
    "dora, convolution": Variant("vit", {"target_modules": ["projection"], "use_dora": True}, peft_is_right=False),
    "dora, embedding": Variant(
        "llama", {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True}, peft_is_right=False
    ),
}


def addition(base: Path, adapter: Path) -> dict[str, Any]:
    models = [{"model": f"{base}+{adapter}", "parameters": {"weight": 1.0}}]
    return {"merge_method": "task_arithmetic", "base_model": str(base), "models": models}


def on_disk(root: Path, variant: Variant) -> tuple[Path, Path]:
    """The base and the adapter."""
    base = make_base(root / "base", variant.case)
    make = make_converted if "init_lora_weights" in variant.config else make_adapter
    return base, make(root / "adapter", base, variant.case)


@pytest.mark.parametrize("name", VARIANTS)
def test_one_adapter_of_weight_one_is_that_adapter(name: str, tmp_path: Path) -> None:
    variant = VARIANTS[name]
    base, adapter = on_disk(tmp_path, variant)
    expected = outputs(load_adapter(base, variant.case, adapter))
    assert relative(outputs(load_base(base, variant.case)), expected) > WRONG  # the adapter does something

    run_native(addition(base, adapter), tmp_path / "lora", "--adapter")
    assert relative(outputs(load_adapter(base, variant.case, tmp_path / "lora")), expected) <= TOLERANCE
    run_native(addition(base, adapter), tmp_path / "whole")
    assert relative(outputs(load_base(tmp_path / "whole", variant.case)), expected) <= TOLERANCE

    plain: Any = load_base(base, variant.case)
    model: Any = PeftModel.from_pretrained(plain, str(adapter), adapter_name="one")
    add_weighted_adapter(model, ["one"], [1.0], "ours")
    assert relative(active(model, "ours"), expected) <= TOLERANCE
    model.add_weighted_adapter(["one"], [1.0], "theirs", combination_type="linear")
    error = relative(active(model, "theirs"), expected)
    assert error <= TOLERANCE if variant.peft_is_right else error > WRONG


@pytest.mark.parametrize("how", ["all", "lora_only"])
def test_trained_biases_stay_and_peft_has_no_sum_of_them(how: str, tmp_path: Path) -> None:
    """A loaded model no longer has the base's biases, so that only the files tell what was trained."""
    case = Case("bert", {"target_modules": ["query"], "bias": how})
    base, adapter = make_base(tmp_path / "base", case), tmp_path / "adapter"
    expected = outputs(load_adapter(base, case, make_adapter(adapter, base, case)))
    run_native(addition(base, adapter), tmp_path / "lora", "--adapter")
    assert relative(outputs(load_adapter(base, case, tmp_path / "lora")), expected) <= TOLERANCE
    run_native(addition(base, adapter), tmp_path / "whole")
    assert relative(outputs(load_base(tmp_path / "whole", case)), expected) <= TOLERANCE
    plain: Any = load_base(base, case)
    model: Any = PeftModel.from_pretrained(plain, str(adapter), adapter_name="one")
    with pytest.raises(ValueError, match="bias"):
        model.add_weighted_adapter(["one"], [1.0], "theirs", combination_type="linear")
    with pytest.raises(CheckpointError, match="open the saved adapter instead"):
        add_weighted_adapter(model, ["one"], [1.0], "ours")


def test_kasa_is_refused_by_name_where_peft_gives_another_adapter(tmp_path: Path) -> None:
    from peft.tuners.lora.config import KasaConfig

    case = Case("llama", LLAMA | {"kasa_config": KasaConfig()})
    base = make_base(tmp_path / "base", case)
    model = peft_model(base, case)
    perturb(model)
    model.save_pretrained(str(tmp_path / "adapter"))
    file = write_config(tmp_path / "merge.yml", addition(base, tmp_path / "adapter"))
    for options in ([], ["--adapter"]):
        message = refused(tmp_path, "merge", file, tmp_path / "out", "--quiet", *options)
        assert "kasa_config (KaSA, which also truncates the base's weights)" in message
    model.add_weighted_adapter(["default"], [1.0], "theirs", combination_type="linear")
    assert relative(active(model, "theirs"), active(model, "default")) > WRONG
    names = set(model.peft_config)
    with pytest.raises(CheckpointError, match="KasaLinearVariant"):
        add_weighted_adapter(model, ["default"], [1.0], "ours")
    assert set(model.peft_config) == names


def test_a_weight_that_dora_scales_by_columns_is_cut_only_when_asked(tmp_path: Path) -> None:
    """Factors of full rank hold it; the error of a smaller rank is told."""
    variant = VARIANTS["dora, fan_in_fan_out"]
    base, adapter = on_disk(tmp_path, variant)
    report = tmp_path / "report.json"
    errors = []
    for options in ([], ["--rank", "4"]):
        run_native(addition(base, adapter), tmp_path / "out", "--adapter", "--json", str(report), *options)
        errors.append(json.loads(report.read_text(encoding="utf-8"))["error"]["all"])
        shutil.rmtree(tmp_path / "out")
    assert errors[0] <= 1e-7 and errors[1] > WRONG
