"""What is wrong with the models or the output is said in one message before anything is merged or written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from mergekit.common import ModelReference
from mergekit.options import MergeOptions

from commands.command_line import refused, root, tvbases
from oracles.merge_oracle import merge_config, write_config
from tvbases_hf.errors import ParameterError
from tvbases_hf.merging.merge import leave_marker
from tvbases_hf.storage.checkpoint import Checkpoint
from tvbases_mergekit import preflight
from zoo.adapter_families import random_adapters
from zoo.hf_models import Family, make_family, read_state, save_state
from zoo.merge_refusals import Config, merge_refused

pytest_plugins = ["zoo.hf_fixtures"]


# Models


def test_a_merge_without_base_says_what_a_base_is(place: Family) -> None:
    message = merge_refused(place, lambda c: c.pop("base_model"))
    assert "ae_bases needs base_model" in message


def test_a_model_that_is_not_there_is_named(place: Family) -> None:
    shutil.rmtree(place.tasks["chat"])
    message = merge_refused(place)
    assert str(place.tasks["chat"]) in message and "no such file or directory" in message


def test_a_hub_model_that_cannot_be_had_is_named(place: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = merge_refused(place, lambda c: c["models"][0].update(model="nobody/no-such-model"))
    assert '"nobody/no-such-model"' in message and "Check the spelling, your connection" in message


def test_a_model_named_twice_is_refused_however_it_is_spelt(place: Family) -> None:
    math = str(place.tasks["math"])
    message = merge_refused(place, lambda c: c["models"].append({"model": math}))
    assert f'"{math}" is named twice' in message
    message = merge_refused(place, lambda c: c["models"].append({"model": math + "/"}))
    assert "are the same model" in message
    message = merge_refused(place, lambda c: c["models"].append({"model": str(place.base) + "/"}))
    assert "are the same model" in message
    file = place.tasks["math"] / "model.safetensors"  # which `tvbases merge` takes
    ways = {ModelReference.model_validate(str(path)): (path, None) for path in (file.parent, file)}
    with pytest.raises(ParameterError, match="are the same model"):
        preflight.check_distinct(ways, place.base / "out")


def test_a_directory_without_weights_is_not_a_checkpoint(place: Family) -> None:
    (place.tasks["law"] / "model.safetensors").unlink()
    message = merge_refused(place)
    assert str(place.tasks["law"]) in message and "not a checkpoint" in message and "config.json" in message


def test_weights_without_configuration_are_refused(place: Family) -> None:
    (place.tasks["law"] / "config.json").unlink()
    message = merge_refused(place)
    assert str(place.tasks["law"]) in message and "has no config.json" in message


def test_a_truncated_file_is_named(place: Family) -> None:
    file = place.tasks["code"] / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    message = merge_refused(place)
    assert str(place.tasks["code"]) in message and "model.safetensors is truncated" in message


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n", b"PK\x03\x04" + bytes(100)])
def test_a_file_of_another_kind_is_named(content: bytes, place: Family) -> None:
    (place.base / "model.safetensors").write_bytes(content)
    message = merge_refused(place)
    assert str(place.base) in message and "not a safetensors file" in message


def test_a_missing_shard_is_named(llama_sharded: Family, tmp_path: Path) -> None:
    shutil.copytree(llama_sharded.base.parent, tmp_path / "models")
    place = Family(tmp_path / "models" / "base", {t: tmp_path / "models" / t for t in llama_sharded.tasks})
    shard = sorted(place.tasks["math"].glob("*.safetensors"))[1]
    shard.unlink()
    assert shard.name in merge_refused(place)


def test_a_fine_tune_with_another_vocabulary_is_refused_with_a_way_out(place: Family) -> None:
    state = read_state(place.tasks["chat"])
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = torch.cat([state[name], state[name][:2]])
    save_state(place.tasks["chat"], state, place.base)
    message = merge_refused(place)
    assert str(place.tasks["chat"]) in message
    assert "2 of 21 tensors" in message and "[66, 32] vs [64, 32]" in message
    assert "--extra-rows drop" in message and "tokenizer_source" in message


def test_a_tensor_of_another_shape_is_named(place: Family) -> None:
    state = read_state(place.tasks["chat"])
    state["model.norm.weight"] = torch.ones(40)
    save_state(place.tasks["chat"], state, place.base)
    message = merge_refused(place)
    assert "1 of 21 tensors differ in shape" in message and "model.norm.weight [40] vs [32]" in message


def test_a_model_of_another_architecture_is_refused_with_both_names(place: Family, bert: Family) -> None:
    message = merge_refused(place, lambda c: c["models"][0].update(model=str(bert.base)))
    assert str(bert.base) in message and "a bert model" in message and "is llama" in message


def test_nan_and_infinity_are_found_while_merging_and_nothing_is_left(place: Family) -> None:
    """Only the pass over all numbers can find them; it ends the merge, not only the check before it."""
    for model, name, value in [
        (place.tasks["code"], "model.layers.1.mlp.up_proj.weight", float("nan")),
        (place.base, "lm_head.weight", float("inf")),
    ]:
        state = read_state(model)
        whole = state[name].clone()
        state[name][3, 4] = value
        save_state(model, state, place.base)
        message = merge_refused(place)
        assert f'"{model}": tensor {name} holds 1 NaN or infinite' in message
        save_state(model, state | {name: whole}, place.base)


def test_a_fine_tune_of_another_base_is_merged_with_a_warning_that_names_it(place: Family, llama_base: Path) -> None:
    torch.manual_seed(99)
    other = {name: torch.randn_like(tensor) * tensor.std() for name, tensor in read_state(place.base).items()}
    save_state(place.tasks["law"], other, place.base)
    file = write_config(root(place) / "merge.yml", merge_config(place, num_bases=2))
    outcome = tvbases("mergekit-yaml", file, root(place) / "out", "--quiet")
    assert outcome.code == 0
    (warning,) = outcome.err.strip().splitlines()
    assert f'"{place.tasks["law"]}"' in warning and "another base" in warning


def test_an_adapter_needs_a_directory_to_be_merged_in(place: Family) -> None:
    message = merge_refused(place, lambda c: c["models"][0].update(model=f"{place.base}+{place.tasks['math']}"))
    assert "--lora-merge-cache DIR" in message
    message = merge_refused(
        place, lambda c: c["models"][0].update(model=f"{place.base}+{place.tasks['math']}"), "--lora-merge-cache", "x"
    )
    assert "not a PEFT adapter" in message


def test_which_files_mergekit_reads_is_known_those_of_adapters_too(tmp_path: Path) -> None:
    adapters = random_adapters(tmp_path, tasks=("math",))
    reference = ModelReference.parse(f"{adapters.base}+{adapters.tasks['math']}")
    found = preflight._weights(reference, Checkpoint.open(adapters.base), MergeOptions())
    assert found == [adapters.base / "model.safetensors", adapters.tasks["math"] / "adapter_model.safetensors"]


def test_an_incomplete_model_stops_the_merge_with_mergekits_reason(place: Family) -> None:
    state = read_state(place.tasks["math"])
    del state["model.layers.0.mlp.up_proj.weight"]
    save_state(place.tasks["math"], state, place.base)
    message = merge_refused(place)
    assert "mergekit stopped: " in message and "model.layers.0.mlp.up_proj.weight" in message and "-v" in message


# Slices


def test_slices_with_other_layers_of_other_models_are_refused(place: Family) -> None:
    def edit(config: Config) -> None:
        models = [config["base_model"], *(item["model"] for item in config.pop("models"))]
        ranges = [[0, 1]] * 4 + [[1, 2]]
        sources = [{"model": m, "layer_range": r} for m, r in zip(models, ranges, strict=True)]
        config["slices"] = [{"sources": sources}]

    message = merge_refused(place, edit)
    assert "same layers of all models" in message and "[0, 1] and [1, 2]" in message


def test_a_slice_beyond_the_last_layer_is_refused(place: Family) -> None:
    def edit(config: Config) -> None:
        models = [config["base_model"], *(item["model"] for item in config.pop("models"))]
        config["slices"] = [{"sources": [{"model": m, "layer_range": [0, 3]} for m in models]}]

    assert "model.layers.2" in merge_refused(place, edit)


# The output and the options


def test_missing_or_wrong_arguments_show_the_usage(place: Family) -> None:
    file = write_config(root(place) / "merge.yml", merge_config(place))
    for arguments, reason in [
        ([], "CONFIG_FILE"),
        ([file], "OUT_PATH"),
        ([file, root(place) / "out", "--no-such-option"], "--no-such-option"),
        ([file, root(place) / "out", "--random-seed", "x"], "'x' is not a valid integer"),
        ([file, root(place) / "out", "--out-shard-size", "5X"], "--out-shard-size"),
    ]:
        assert reason in refused(root(place), "mergekit-yaml", *arguments)


def test_the_output_must_not_be_one_of_the_models(place: Family) -> None:
    """Even where the model is itself an earlier merge, which may be replaced otherwise."""
    leave_marker(place.base, {})
    file = write_config(root(place) / "merge.yml", merge_config(place))
    assert "is one of the models" in refused(root(place), "mergekit-yaml", file, place.base)


@pytest.mark.parametrize("make", ["file", "foreign", "merged_by_mergekit", "merged_with_more"])
def test_an_output_that_is_not_ours_is_left_alone(make: str, place: Family) -> None:
    out = root(place) / "out"
    if make == "file":
        out.write_text("mine")
    else:
        out.mkdir()
        if make.startswith("merged"):
            (out / "mergekit_config.yml").write_text("merge_method: linear\n")
        if make == "merged_with_more":
            leave_marker(out, {})
        if make != "merged_by_mergekit":
            (out / "notes.md").write_text("mine")
    file = write_config(root(place) / "merge.yml", merge_config(place))
    message = refused(root(place), "mergekit-yaml", file, out)
    assert ("is a file" if make == "file" else "holds something that this command did not write") in message


def test_a_checkpoint_made_for_the_family_has_the_config_it_needs(llama_base: Path, tmp_path: Path) -> None:
    """The refusals above are not for want of a file in the models that they start from."""
    family = make_family(tmp_path / "m", llama_base, ["a", "b"], seed=0)
    assert json.loads((family.base / "config.json").read_text())["model_type"] == "llama"
    file = write_config(tmp_path / "merge.yml", merge_config(family))
    assert tvbases("mergekit-yaml", file, tmp_path / "out", "--quiet").code == 0
    assert yaml.safe_load((tmp_path / "out" / "mergekit_config.yml").read_text())["merge_method"] == "ae_bases"
