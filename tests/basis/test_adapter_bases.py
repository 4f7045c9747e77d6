"""Adapters meet bases: other prefixes, other models, convolutions in groups, matrices that a model uses twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from tvbases_hf.algebra.delta import dense
from tvbases_hf.errors import CheckpointError, MismatchError
from tvbases_hf.models.adapter import Adapter
from tvbases_hf.models.vectors import Vectors
from tvbases_hf.storage.checkpoint import Checkpoint
from zoo.hf_models import save_state
from zoo.peft_models import (
    IDS,
    Case,
    copy,
    edit_config,
    load_adapter,
    load_base,
    make_adapter,
    make_base,
    outputs,
    perturb,
    refusal,
    relative,
    rewrite,
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


# Bases


def test_the_trunk_of_a_model_is_found_behind_its_prefix(lora: Path, base: Path, tmp_path: Path) -> None:
    model: Any = load_base(base, LLAMA)
    model.model.save_pretrained(tmp_path / "trunk")
    whole, trunk = (Adapter.open(lora, Checkpoint.open(path)) for path in (base, tmp_path / "trunk"))
    assert [f"model.{name}" for name in trunk.names] == list(whole.names)
    for name in trunk.names:
        found, expected = trunk.delta(name), whole.delta(f"model.{name}")
        assert found is not None and expected is not None and torch.equal(dense(found), dense(expected))


@pytest.mark.parametrize("options", [{}, {"bias": "all"}, {"modules_to_save": ["pooler"]}], ids=str)
def test_an_adapter_of_the_trunk_is_found_in_the_model_and_written_under_its_own_names(
    options: dict[str, Any], bert_base: Path, tmp_path: Path
) -> None:
    model: Any = load_base(bert_base, BERT)
    model.bert.save_pretrained(tmp_path / "trunk")
    trunk = type(model.bert).from_pretrained
    peft: Any = get_peft_model(trunk(tmp_path / "trunk"), LoraConfig(target_modules=["query"], r=2, **options))
    perturb(peft)
    peft.save_pretrained(str(tmp_path / "a"))
    adapter = Adapter.open(tmp_path / "a", Checkpoint.open(bert_base))
    assert all(name.startswith("bert.") for name in adapter.names)
    again = rewrite(tmp_path / "again", bert_base, adapter)
    with torch.no_grad():
        found, expected = (
            PeftModel.from_pretrained(trunk(tmp_path / "trunk"), str(path)).eval()(IDS).pooler_output
            for path in (again, tmp_path / "a")
        )
    assert relative(found, expected) <= TOLERANCE


def test_a_name_that_may_mean_two_tensors_is_refused(lora: Path, base: Path, tmp_path: Path) -> None:
    state = load_file(base / "model.safetensors")
    twins = {f"{side}.{name}": tensor.clone() for side in ("left", "right") for name, tensor in state.items()}
    message = refusal(lora, save_state(tmp_path / "twins", twins, base), MismatchError)
    assert "may mean 2 tensors" in message and "left." in message


def test_the_base_of_another_architecture_is_refused(lora: Path, base: Path, bert_base: Path) -> None:
    message = refusal(lora, bert_base, MismatchError)
    assert "4 of 4 tensors" in message and "k_proj" in message and str(base) in message


def test_a_saved_module_that_the_base_lacks_and_that_is_not_called_one_is_named(
    bert_base: Path, tmp_path: Path
) -> None:
    case = Case("bert", {"target_modules": ["query"], "task_type": "SEQ_CLS"})
    model: Any = load_base(bert_base, case)
    model.bert.save_pretrained(tmp_path / "trunk")
    adapter = edit_config(make_adapter(tmp_path / "a", bert_base, case), modules_to_save=None)
    message = refusal(adapter, tmp_path / "trunk", MismatchError)
    assert "classifier" in message and "with its head" in message


def test_a_base_of_another_width_is_refused(lora: Path, tmp_path: Path) -> None:
    wide = make_base(tmp_path / "wide", Case("llama", {}, {"hidden_size": 32}))
    message = refusal(lora, wide, MismatchError)
    assert "[8, 16]" in message and "[16, 32]" in message


def test_another_vocabulary_is_refused(base: Path, tmp_path: Path) -> None:
    case = Case("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]})
    adapter = make_adapter(tmp_path / "a", base, case)
    resized = make_base(tmp_path / "resized", Case("llama", {}, {"vocab_size": 48}))
    with pytest.raises(MismatchError, match=r'"a".*lm_head\.weight.*--extra-rows drop'):
        Vectors.open(resized, {"a": adapter})


@pytest.mark.parametrize("extra_rows", ["drop", "keep"])
@pytest.mark.parametrize("rows", [32, 48])
def test_an_output_of_other_rows_in_an_adapter_is_levelled(
    extra_rows: Any, rows: int, base: Path, tmp_path: Path
) -> None:
    """PEFT saves resized matrices whole; beside it a low-rank change of the same matrix, of the base's rows."""
    words: dict[str, Any] = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    long = make_adapter(tmp_path / "a", base, Case("llama", words))
    low = make_adapter(tmp_path / "b", base, Case("llama", {"target_modules": ["lm_head"]}), seed=1)
    file, saved = long / WEIGHTS, "base_model.model.lm_head.weight"
    state = load_file(file)
    grown = torch.cat([state[saved], torch.randn(16, state[saved].shape[1])])[:rows].contiguous()
    save_file({**state, saved: grown}, file)
    vectors = Vectors.open(base, {"a": long, "b": low}, extra_rows=extra_rows)
    own = Checkpoint.open(base).read("lm_head.weight").double()
    factors = {name.rpartition(".lora")[2]: t.double() for name, t in load_file(low / WEIGHTS).items()}
    change = 5 / 3 * factors["_B.weight"] @ factors["_A.weight"]
    count = min(rows, len(own)) if extra_rows == "drop" else max(rows, len(own))
    bottom = torch.cat([own, grown[len(own) :].double()]) if rows > len(own) else own
    tuned = torch.cat([grown.double(), own[rows:]])
    a, b = (dense(delta) for delta in vectors.deltas("lm_head.weight"))
    assert vectors.base.tensors["lm_head.weight"].shape[0] == count
    assert torch.equal(vectors.base.read("lm_head.weight").double(), bottom[:count])
    assert torch.equal(a, (tuned - bottom)[:count])
    assert torch.allclose(b[: len(own)], change[:count], atol=1e-6) and not b[len(own) :].any()


def test_a_copy_of_another_base_in_the_adapter_is_refused(base: Path, tmp_path: Path) -> None:
    case = Case("llama", {"target_modules": ["embed_tokens"]})
    adapter = make_adapter(tmp_path / "a", base, case)
    other = make_base(tmp_path / "other", case, seed=5)
    assert "its own copy of model.embed_tokens.weight" in refusal(adapter, other, MismatchError)


def test_adapters_of_different_bases_are_not_added(lora: Path, base: Path, tmp_path: Path) -> None:
    other = edit_config(copy(lora, tmp_path / "b"), base_model_name_or_path="someone/mistral")
    with pytest.raises(MismatchError, match=r"different bases.*someone/mistral"):
        Vectors.open(base, {"a": lora, "b": other})


def test_a_checkpoint_has_no_lora_bias_without_a_bias_in_the_base(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "a", base, Case("llama", {"target_modules": ["q_proj"], "lora_bias": True}))
    with pytest.raises(CheckpointError, match=r"lora_bias.*first: model.layers.0.self_attn.q_proj.bias"):
        Vectors.open(base, {"mine": adapter}).base.written()


def test_fan_in_fan_out_of_a_square_weight_that_nothing_confirms_is_refused(
    lora: Path, base: Path, tmp_path: Path
) -> None:
    message = refusal(edit_config(copy(lora, tmp_path / "a"), fan_in_fan_out=True), base)
    assert "fan_in_fan_out" in message and "q_proj" in message


def test_a_square_conv1d_is_known_by_its_neighbours_without_a_configuration(tmp_path: Path) -> None:
    case = Case("gpt2", {"target_modules": ["attn.c_proj"]})
    base = make_base(tmp_path / "base", case)
    adapter = edit_config(make_adapter(tmp_path / "a", base, case), fan_in_fan_out=False)
    expected = outputs(load_adapter(base, case, adapter))
    bare = Checkpoint.open(copy(base, tmp_path / "bare") / "model.safetensors")
    bare.config.clear()
    assert relative(outputs(with_deltas(base, case, Adapter.open(adapter, bare))), expected) <= TOLERANCE


@pytest.mark.parametrize("groups", [2])
def test_convolutions_in_groups_are_refused_by_name(groups: int, tmp_path: Path) -> None:
    case = Case("vision", {"target_modules": ["wide"], "r": 4}, {"groups": groups})
    base = make_base(tmp_path / "base", case)
    adapter = make_adapter(tmp_path / "a", base, case)
    assert f"convolution in {groups} groups" in refusal(adapter, base)


def test_multihead_attention_is_refused_by_name(tmp_path: Path) -> None:
    state = {"attn.in_proj_weight": torch.zeros(12, 4), "attn.out_proj.weight": torch.zeros(4, 4)}
    factors = {"attn.lora_A.weight": torch.ones(2, 4), "attn.lora_B.weight": torch.ones(12, 2)}
    with pytest.raises(CheckpointError, match="MultiheadAttention"):
        Adapter(
            "mine",
            {"peft_type": "LORA", "r": 2},
            Checkpoint.from_state_dict(factors),
            Checkpoint.from_state_dict(state),
        )


# Tied matrices

TIED = {
    "input": ("gpt2", {"target_modules": ["wte", "c_attn"]}, {}),
    "output": ("gpt2", {"target_modules": ["lm_head", "c_attn"]}, {}),
    "saved input": ("gpt2", {"target_modules": ["c_attn"], "modules_to_save": ["wte"]}, {}),
    "saved output": ("gpt2", {"target_modules": ["c_attn"], "modules_to_save": ["lm_head"]}, {}),
    "tied adapters": (
        "llama",
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True, "task_type": "CAUSAL_LM"},
        {"tie_word_embeddings": True},
    ),
}


@pytest.mark.parametrize("name", sorted(TIED))
@pytest.mark.parametrize("says", [True, None], ids=["base says tied", "base says nothing"])
def test_an_adapter_of_a_tied_matrix_is_refused(name: str, says: bool | None, tmp_path: Path) -> None:
    case = Case(*TIED[name])
    base = make_base(tmp_path / "base", case)
    adapter = make_adapter(tmp_path / "a", base, case)
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    assert config["tie_word_embeddings"] is True
    if says is None:
        del config["tie_word_embeddings"]
        (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert "(tied)" in refusal(adapter, base, MismatchError)


def test_a_change_of_a_tied_matrix_is_not_what_peft_computes(tmp_path: Path) -> None:
    """The reason for refusing: applied to the matrix, the change reaches the output too."""
    case = Case("gpt2", {"target_modules": ["wte"]})
    base = make_base(tmp_path / "base", case)
    model: Any = load_adapter(base, case, make_adapter(tmp_path / "a", base, case))
    expected = outputs(model)
    merged: Any = load_base(base, case).double()
    merged.transformer.wte.weight.data += model.base_model.model.transformer.wte.get_delta_weight("default")
    assert relative(outputs(merged), expected) > 1e-2


@pytest.mark.parametrize(
    "case",
    [
        Case("gpt2", {"target_modules": ["wpe", "c_attn"], "task_type": "CAUSAL_LM"}),
        Case("bert", {"target_modules": ["word_embeddings"], "task_type": "FEATURE_EXTRACTION"}),
    ],
    ids=["positions of a tied model", "a model without an output matrix"],
)
def test_embeddings_that_are_used_once_are_read_in_models_that_may_tie(case: Case, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", case)
    adapter = make_adapter(tmp_path / "a", base, case)
    read = Adapter.open(adapter, Checkpoint.open(base))
    assert relative(outputs(with_deltas(base, case, read)), outputs(load_adapter(base, case, adapter))) <= TOLERANCE
