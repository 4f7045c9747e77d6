"""What mergekit writes is a whole model of finite numbers, or nothing is written and the way out is named."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from compatibility.small import find
from safetensors.torch import load_file

from commands.command_line import refused, root, tvbases
from oracles.merge_oracle import merge_config, run_ours, write_config
from zoo.hf_models import Family, read_state, save_state
from zoo.merge_refusals import merge_refused
from zoo.models import tune
from zoo.renamed import RENAMED, make, resave, saved

pytest_plugins = ["zoo.hf_fixtures"]
# (tensors that mergekit does not write, tensors of the model)
LEFT_OUT = {"vit": (32, 40), "dinov2": (24, 44), "jamba": (9, 36), "llava": (21, 64), "t5": (4, 47)}
# mergekit cannot plan these at all, and of this one no class is public.
UNPLANNED, UNLOADABLE = ("qwen2 vl", "clip"), ("step vision",)


def merge_file(model: Any, directory: Path, **more: Any) -> Path:
    """A merge of one fine-tune of a model."""
    state = saved(model, directory / "base")
    model.config.save_pretrained(directory / "task")
    resave(directory / "task", tune(state, 1))
    models = [{"model": str(directory / "task"), "parameters": {"weight": 1.0}}]
    config = {"merge_method": "task_arithmetic", "base_model": str(directory / "base"), "models": models}
    return write_config(directory / "m.yml", {**config, **more})


@pytest.mark.parametrize("name", LEFT_OUT)
def test_a_merge_that_would_leave_tensors_out_is_refused_and_the_other_command_does_it(
    name: str, tmp_path: Path
) -> None:
    file = merge_file(make(name), tmp_path)
    message = refused(tmp_path, "mergekit-yaml", file, tmp_path / "out", "--quiet")
    lost, total = LEFT_OUT[name]
    assert f'"{tmp_path / "base"}": mergekit would leave out {lost} of {total} tensors' in message
    assert "`tvbases merge`" in message
    assert tvbases("merge", file, tmp_path / "out", "--quiet").code == 0
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == read_state(tmp_path / "base").keys()


def test_rotary_matrices_that_mergekit_would_split_without_the_heads_are_refused(tmp_path: Path) -> None:
    """One fused matrix in the file; in memory three, whose rows transformers permutes head by head."""
    file = merge_file(find("kimi_k25").make(), tmp_path)
    message = refused(tmp_path, "mergekit-yaml", file, tmp_path / "out", "--quiet")
    assert "mergekit would mix up the rows of 12 rotary matrices" in message and "`tvbases merge`" in message
    assert tvbases("merge", file, tmp_path / "out", "--quiet").code == 0


@pytest.mark.parametrize("name", sorted(set(RENAMED) - {*LEFT_OUT, *UNPLANNED, *UNLOADABLE}))
def test_what_is_not_refused_is_loaded_whole(name: str, tmp_path: Path) -> None:
    model = make(name)
    outcome = tvbases("mergekit-yaml", merge_file(model, tmp_path), tmp_path / "out", "--quiet")
    assert outcome.code == 0, outcome.err
    loaded, info = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    tuned = type(model).from_pretrained(tmp_path / "task").state_dict()
    assert all(torch.allclose(tensor, tuned[n], atol=1e-6) for n, tensor in loaded.state_dict().items())


@pytest.mark.parametrize("name", UNPLANNED)
def test_what_mergekit_cannot_plan_is_refused(name: str, tmp_path: Path) -> None:
    message = refused(tmp_path, "mergekit-yaml", merge_file(make(name), tmp_path), tmp_path / "out", "--quiet")
    assert "mergekit cannot plan this merge" in message and message.endswith("`tvbases merge` takes the same YAML")
    assert len(message) < 600


def llama(**options: Any) -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=31, **sizes, **options))


@pytest.mark.parametrize("stored", ["once", "twice"])
def test_a_tied_output_is_not_missed(stored: str, tmp_path: Path) -> None:
    file = merge_file(llama(tie_word_embeddings=True), tmp_path)
    if stored == "twice":
        for folder in ("base", "task"):
            state = read_state(tmp_path / folder)
            resave(tmp_path / folder, {**state, "lm_head.weight": state["model.embed_tokens.weight"].clone()})
    assert tvbases("mergekit-yaml", file, tmp_path / "out", "--quiet").code == 0


def test_buffers_of_older_files_are_not_missed_and_other_tensors_are(tmp_path: Path) -> None:
    """Files of 2023 hold the rotary frequencies, which the model now computes; its biases it does not."""
    file = merge_file(llama(), tmp_path)
    for folder in ("base", "task"):
        state = read_state(tmp_path / folder)
        resave(tmp_path / folder, {**state, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    assert tvbases("mergekit-yaml", file, tmp_path / "out", "--quiet").code == 0
    file = merge_file(llama(attention_bias=True), tmp_path / "biased")
    message = refused(tmp_path, "mergekit-yaml", file, tmp_path / "biased" / "out", "--quiet")
    assert "leave out" in message and "self_attn" in message and ".bias" in message


def test_layers_that_slices_leave_out_are_not_missed(tmp_path: Path) -> None:
    sources = [{"model": str(tmp_path / "task"), "layer_range": [0, 1]}]
    file = merge_file(llama(), tmp_path, merge_method="passthrough", slices=[{"sources": sources}])
    config = {"merge_method": "passthrough", "slices": [{"sources": sources}]}
    assert tvbases("mergekit-yaml", write_config(file, config), tmp_path / "out", "--quiet").code == 0
    assert len(read_state(tmp_path / "out")) == len(read_state(tmp_path / "base")) - 9


@pytest.mark.parametrize("method", ["linear", "ties", "task_arithmetic", "della"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_mergekits_own_methods_write_no_nan(method: str, value: float, place: Family) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    state = read_state(place.tasks["code"])
    state[name][3, 4] = value
    save_state(place.tasks["code"], state, place.base)
    more = {"density": 0.5} if method in ("ties", "della") else {}
    message = merge_refused(place, lambda c: spoil(c, method, more))
    assert f'"{place.tasks["code"]}": tensor {name} holds 1 NaN or infinite' in message


def spoil(config: dict[str, Any], method: str, parameters: dict[str, Any]) -> None:
    config["merge_method"], config["parameters"] = method, parameters
    if method == "linear":
        del config["base_model"]
    for model in config["models"]:
        model["parameters"] = {"weight": 0.5}


def test_a_base_without_a_tokenizer_is_said_in_one_line(place: Family, caplog: pytest.LogCaptureFixture) -> None:
    for file in place.base.glob("tokenizer*"):
        file.unlink()
    file = write_config(place.base.parent / "m.yml", merge_config(place, num_bases=2))
    with caplog.at_level(logging.WARNING):
        outcome = tvbases("mergekit-yaml", file, place.base.parent / "out", "--quiet")
    assert outcome.code == 0
    assert "Traceback" not in outcome.err and "Traceback" not in caplog.text
    (record,) = [r for r in caplog.records if "Failed to copy tokenizer" in r.getMessage()]
    assert record.exc_info is None and "\n" not in record.getMessage()


def test_what_mergekit_does_not_copy_travels_too(place: Family) -> None:
    """Code, processors, more templates and folders; the result is known as a merge, and replaced by the next."""
    beside = {
        "additional_chat_templates/tool_use.jinja": "{{ tools }}",
        "1_Pooling/config.json": "{}",
        "modules.json": '[{"path": "1_Pooling"}]',
        "preprocessor_config.json": "{}",
        "LICENSE": "of the base",
    }
    for name, text in beside.items():
        (place.base / name).parent.mkdir(exist_ok=True)
        (place.base / name).write_text(text)
    (place.base / "id_rsa").write_text("secret")
    out = root(place) / "out"
    for _ in range(2):
        run_ours(merge_config(place, "task_arithmetic", weight=1.0), out)
    assert {name: (out / name).read_text() for name in beside} == beside
    assert not (out / "id_rsa").exists()


def test_a_link_out_of_the_base_is_refused(place: Family) -> None:
    secret = root(place).parent / "secret"
    secret.write_text("secret")
    (place.base / "special_tokens_map.json").symlink_to(secret)
    assert "special_tokens_map.json is a link to" in merge_refused(place)
