"""Adapters loaded in a PEFT model: read as what PEFT computes, or refused by name."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import peft
import pytest
from peft import LoraConfig, get_peft_model
from torch import nn

from tvbases_hf.algebra.delta import dense
from tvbases_hf.errors import CheckpointError, MissingExtraError, ParameterError
from tvbases_hf.models.adapter import Adapter
from tvbases_hf.models.gram import gram_matrix
from tvbases_hf.models.vectors import Vectors
from tvbases_hf.storage.checkpoint import Checkpoint
from tvbases_peft import add_weighted_adapter, task_vectors
from zoo.peft_models import Case, active, load_base, loaded, make_base, outputs, relative

TOLERANCE = 1e-5
Q = {"target_modules": ["q_proj", "k_proj"]}
LORA = Q | {"r": 3, "lora_alpha": 5}
RSLORA = {"target_modules": ["q_proj", "down_proj"], "r": 4, "use_rslora": True, "alpha_pattern": {"down_proj": 9}}
DORA = {"target_modules": ["q_proj", "v_proj"], "r": 2, "use_dora": True}
BIAS = {"target_modules": ["query", "dense"], "r": 2, "lora_bias": True}


# Reading

READ = {
    "lora, rslora and patterns": (Case("llama", {}), [LORA, RSLORA]),
    "dora": (Case("llama", {}), [DORA, LORA]),
    "modules_to_save": (Case("llama", {}), [LORA | {"modules_to_save": ["lm_head"]}, RSLORA]),
    "lora_bias": (Case("bert", {}), [BIAS, {"target_modules": ["query"]}]),
    "conv1d": (Case("gpt2", {}), [{"target_modules": ["c_attn", "c_proj"]}, {"target_modules": ["c_proj"]}]),
    "tied matrices, one use each": (Case("gpt2", {}), [{"target_modules": ["wte"]}, {"target_modules": ["lm_head"]}]),
    "convolutions": (
        Case("vision", {}),
        [{"target_modules": ["wide", "point", "table"]}, {"target_modules": ["line", "wide"], "use_dora": True}],
    ),
}


@pytest.mark.parametrize("name", sorted(READ))
def test_loaded_adapters_are_read_as_what_peft_computes(name: str, tmp_path: Path) -> None:
    case, configs = READ[name]
    model = loaded(tmp_path, case, configs)
    vectors = task_vectors(model)
    assert vectors.tasks == ("a", "b")
    for task, source in vectors.models.items():
        plain: Any = load_base(tmp_path / "base", case).double()
        for own in source.names:  # type: ignore[union-attr]
            delta = source.delta(own)  # type: ignore[union-attr]
            assert delta is not None
            parameter = untied(plain, own)
            parameter.data = parameter.data + dense(delta).reshape(parameter.shape)
        assert relative(outputs(plain), active(model, task)) <= TOLERANCE


def untied(model: Any, name: str) -> nn.Parameter:
    """The parameter, with numbers of its own."""
    module, _, leaf = name.rpartition(".")
    owner = model.get_submodule(module)
    setattr(owner, leaf, nn.Parameter(getattr(owner, leaf).detach().clone()))
    return getattr(owner, leaf)


def test_the_base_is_borrowed_from_the_model(tmp_path: Path) -> None:
    model = loaded(tmp_path, Case("llama", {}), [LORA, DORA])
    base = task_vectors(model).base
    weight = model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight
    assert base.read("model.layers.0.self_attn.q_proj.weight").data_ptr() == weight.data_ptr()
    assert set(base.tensors) == set(load_base(tmp_path / "base", Case("llama", {})).state_dict())


def test_the_scaling_is_that_of_the_layers_now(tmp_path: Path) -> None:
    model = loaded(tmp_path, Case("llama", {}), [LORA])
    before = gram_matrix(task_vectors(model)).matrix
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("a", 0.5)
    assert relative(gram_matrix(task_vectors(model)).matrix, before / 4) <= 1e-6


def test_a_gram_matrix_of_loaded_adapters_is_that_of_their_files(tmp_path: Path) -> None:
    model = loaded(tmp_path, Case("llama", {}), [LORA, RSLORA, DORA])
    files = Vectors.open(tmp_path / "base", {name: tmp_path / name for name in "abc"})
    assert relative(gram_matrix(task_vectors(model)).matrix, gram_matrix(files).matrix) <= 1e-6


@pytest.mark.parametrize("method", ["PROMPT_TUNING", "LILY"])
def test_methods_that_are_no_change_of_weights_are_refused_by_name(method: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", Case("llama", {}))
    configs: dict[str, Any] = {
        "PROMPT_TUNING": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        "LILY": lambda: peft.LilyConfig(r=2, target_modules=["q_proj"]),
    }
    origin: Any = load_base(base, Case("llama", {}))
    model: Any = get_peft_model(origin, configs[method]())
    with pytest.raises(CheckpointError, match=f"{method} adapter"):
        task_vectors(model)
    model.save_pretrained(str(tmp_path / "a"))
    with pytest.raises(CheckpointError, match=f'"mine": {method} adapter'):
        Adapter.open(tmp_path / "a", Checkpoint.open(base), label="mine")


def test_what_files_do_not_show_is_refused_in_a_loaded_model(tmp_path: Path) -> None:
    class Model(nn.Module):
        def __init__(self, **options: Any) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1, **options)
            self.table = nn.Embedding(5, 3, max_norm=1.0)

    cases: list[tuple[dict[str, Any], list[str], str]] = [
        ({"dilation": 2}, ["conv"], "dilation"),
        ({"padding_mode": "circular"}, ["conv"], "pads with zeros"),
        ({}, ["table"], "limits the norm"),
    ]
    for options, targets, word in cases:
        plain: Any = Model(**options)
        with pytest.raises(CheckpointError, match=word):
            task_vectors(get_peft_model(plain, LoraConfig(target_modules=targets)))


def test_a_merged_adapter_is_refused(tmp_path: Path) -> None:
    model = loaded(tmp_path, Case("llama", {}), [LORA])
    model.merge_adapter()
    with pytest.raises(CheckpointError, match="is merged"):
        task_vectors(model)


def test_an_adapter_with_trained_biases_is_refused(tmp_path: Path) -> None:
    model = loaded(tmp_path, Case("bert", {}), [{"target_modules": ["query"], "bias": "all"}])
    with pytest.raises(CheckpointError, match='bias="all"'):
        task_vectors(model)


def test_a_name_that_is_not_loaded_is_refused_with_the_nearest(tmp_path: Path) -> None:
    model = loaded(tmp_path, Case("llama", {}), [LORA])
    model.load_adapter(str(tmp_path / "a"), adapter_name="maths")
    with pytest.raises(ParameterError, match=r"did you mean maths\?"):
        task_vectors(model, ["math"])
    with pytest.raises(ParameterError, match="PeftModel is needed"):
        task_vectors(load_base(tmp_path / "base", Case("llama", {})))  # type: ignore[arg-type]


def test_a_missing_peft_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtraError, match=r"tvbases-hf\[peft\]"):
        task_vectors(None)  # type: ignore[arg-type]
    with pytest.raises(MissingExtraError, match=r"tvbases-hf\[peft\]"):
        add_weighted_adapter(None, ["a"], [1.0], "b")  # type: ignore[arg-type]
