"""What is wrong with a configuration or its models is said in one message before anything is merged or written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command_line import refused, tvbases
from hf_models import Family, make_family, read_state, save_state
from merge_oracle import merge_config, write_config

pytest_plugins = ["hf_fixtures"]

Config = dict[str, Any]
Edit = Callable[[Config], None]


@pytest.fixture
def place(llama: Family, tmp_path: Path) -> Family:
    """Copies of a base and four fine-tunes, to be damaged."""
    shutil.copytree(llama.base.parent, tmp_path / "models")
    root = tmp_path / "models"
    return Family(root / "base", {task: root / path.name for task, path in llama.tasks.items()})


def merge_refused(place: Family, edit: Edit | None = None, *options: str, **parameters: Any) -> str:
    """The message of a merge of these models with a configuration that ``edit`` has spoilt; no progress bars."""
    config = merge_config(place, **{"num_bases": 2, **parameters})
    if edit is not None:
        edit(config)
    root = place.base.parent.parent
    file = write_config(root / "merge.yml", config)
    return refused(root, "mergekit-yaml", file, root / "out", "--quiet", *options)


def text_refused(root: Path, text: str) -> str:
    file = root / "merge.yml"
    file.write_text(text, encoding="utf-8")
    return refused(root, "mergekit-yaml", file, root / "out")


def set_weights(*weights: Any) -> Edit:
    def edit(config: Config) -> None:
        for model, weight in zip(config["models"], weights, strict=True):
            if weight is not None:
                model["parameters"] = {"weight": weight}

    return edit


# The file


def test_a_missing_configuration_is_named(tmp_path: Path) -> None:
    message = refused(tmp_path, "mergekit-yaml", tmp_path / "absent.yml", tmp_path / "out")
    assert "absent.yml" in message and "no such file" in message


@pytest.mark.parametrize("text", ["merge_method: [linear\n", "a: b: c\n", "\tmodels:\n"])
def test_text_that_is_not_yaml_is_refused_with_the_place(text: str, tmp_path: Path) -> None:
    message = text_refused(tmp_path, text)
    assert "is not YAML" in message and "line " in message


@pytest.mark.parametrize("text", ["", "- model: a\n- model: b\n", "just words\n", "42\n"])
def test_yaml_that_is_not_a_mapping_is_refused(text: str, tmp_path: Path) -> None:
    assert "it needs merge_method and models" in text_refused(tmp_path, text)


def test_a_configuration_without_method_or_models_says_which_field_is_missing(tmp_path: Path) -> None:
    assert "merge_method: Field required" in text_refused(tmp_path, "models: [{model: a}]\n")
    assert "models" in text_refused(tmp_path, "merge_method: ae_bases\n")


def test_a_binary_file_is_not_a_configuration(place: Family) -> None:
    root = place.base.parent.parent
    message = refused(root, "mergekit-yaml", place.base / "model.safetensors", root / "out")
    assert "is not YAML" in message


# Names


def test_an_unknown_method_is_refused_with_the_nearest(place: Family) -> None:
    message = merge_refused(place, lambda c: c.update(merge_method="ae_basis"))
    assert "'ae_basis'" in message and "did you mean ae_bases?" in message


def test_an_unknown_parameter_is_refused_with_the_nearest(place: Family) -> None:
    message = merge_refused(place, num_base=2)
    assert "no parameter 'num_base'" in message and "did you mean num_bases?" in message


def test_an_unknown_parameter_of_mergekits_own_methods_is_refused_too(place: Family) -> None:
    def edit(config: Config) -> None:
        config.update(merge_method="ties", parameters={"weight": 1.0, "densitty": 0.5})

    message = merge_refused(place, edit)
    assert "ties has no parameter 'densitty' (did you mean density?)" in message


def test_a_parameter_of_the_whole_merge_under_one_model_is_refused(place: Family) -> None:
    def edit(config: Config) -> None:
        config["models"][1]["parameters"] = {"lambda": 0.5}

    message = merge_refused(place, edit)
    assert str(place.tasks["code"]) in message and "lambda is one value for the whole merge" in message


@pytest.mark.parametrize("where", ["top", "model"])
def test_a_parameter_outside_parameters_is_refused(where: str, place: Family) -> None:
    def edit(config: Config) -> None:
        (config if where == "top" else config["models"][2])["weight"] = 0.5

    message = merge_refused(place, edit)
    assert "weight is a parameter" in message and "put it under parameters" in message
    assert ("models[2]" in message) == (where == "model")


def test_a_misspelt_key_is_refused_with_the_nearest(place: Family) -> None:
    message = merge_refused(place, lambda c: c.update(out_dtyp="bfloat16"))
    assert "'out_dtyp' (did you mean out_dtype?)" in message


def test_a_key_that_belongs_to_another_program_is_let_through(place: Family) -> None:
    """mergekit-multi and model cards add keys of their own, such as a name."""
    root = place.base.parent.parent
    file = write_config(root / "merge.yml", merge_config(place, num_bases=2) | {"name": "my-merge"})
    assert tvbases("mergekit-yaml", file, root / "out", "--quiet").code == 0


@pytest.mark.parametrize("inner", ["slurp", "linear", "ae_bases", "passthrough"])
def test_an_inner_method_that_cannot_take_a_base_is_refused_with_the_known_ones(inner: str, place: Family) -> None:
    message = merge_refused(place, merge=inner)
    assert f"merge: '{inner}'" in message and "task_arithmetic, ties" in message
    assert ("did you mean slerp?" in message) == (inner == "slurp")


@pytest.mark.parametrize(("name", "known"), [("over", "bases or reconstructions"), ("solver", "varpro or adam")])
def test_an_unknown_choice_is_refused_with_the_known_ones(name: str, known: str, place: Family) -> None:
    parameters: Config = {name: "basis"}
    message = merge_refused(place, **parameters)
    assert f"{name}: 'basis'" in message and known in message


# Values


@pytest.mark.parametrize(
    ("num_bases", "reason"),
    [
        (0, "positive number"),
        (-1, "positive number"),
        (1.5, "whole number"),
        (5, "only 4 tasks"),
        (float("nan"), "finite number"),
        (float("inf"), "finite number"),
        ("two", "number"),
    ],
)
def test_a_number_of_bases_that_cannot_be_is_refused(num_bases: Any, reason: str, place: Family) -> None:
    assert reason in merge_refused(place, num_bases=num_bases)


def test_a_parameter_that_is_not_a_number_is_refused_with_its_value(place: Family) -> None:
    message = merge_refused(place, lambda_="strong")
    assert "parameters: lambda: " in message and "valid number" in message and "'strong'" in message
    assert "lambda is nan" in merge_refused(place, lambda_=[0.1, float("nan")])
    message = merge_refused(
        place, set_weights(1.0, [{"filter": "mlp", "value": [0.1, "much"]}, {"value": 1}], 1.0, 1.0)
    )
    assert str(place.tasks["code"]) in message and "weight: " in message and "'much'" in message


def test_an_unknown_dtype_is_refused_with_the_known_ones(place: Family) -> None:
    message = merge_refused(place, lambda c: c.update(out_dtype="bf16"))
    assert "'bf16'" in message and "bfloat16" in message


def test_weight_on_some_models_only_is_refused_with_their_number(place: Family) -> None:
    message = merge_refused(place, set_weights(1.0, None, -0.5, None))
    assert "weight is set for 2 of 4 models" in message


def test_weight_filters_without_catch_all_are_refused(place: Family) -> None:
    filtered = [{"filter": "mlp", "value": 0.5}]
    message = merge_refused(place, set_weights(filtered, filtered, filtered, filtered))
    assert "weight applies to some tensors" in message and "`- value: 1.0`" in message
    assert "mlp" in message


def test_weight_filters_with_a_global_weight_behind_them_are_accepted(place: Family) -> None:
    root = place.base.parent.parent
    config = merge_config(place, num_bases=2, weight=1.0)
    set_weights(*[[{"filter": "mlp", "value": 0.5}]] * 4)(config)
    assert tvbases("mergekit-yaml", write_config(root / "merge.yml", config), root / "out", "--quiet").code == 0


def test_a_parameter_that_the_inner_method_would_ignore_is_refused(place: Family) -> None:
    message = merge_refused(place, merge="model_stock", density=0.5)
    assert "density is not a parameter of merge: model_stock" in message and "filter_wise" in message
    message = merge_refused(place, set_weights(1.0, 1.0, 1.0, -1.0), merge="model_stock")
    assert "weight is not a parameter of merge: model_stock" in message


def test_a_parameter_that_the_inner_method_needs_is_asked_for(place: Family) -> None:
    assert "slerp needs the parameter t" in merge_refused(place, merge="slerp", num_bases=1)


def test_more_vectors_than_the_inner_method_takes_are_refused(place: Family) -> None:
    message = merge_refused(place, merge="slerp", t=0.5)
    assert "slerp cannot take 2 vectors" in message and "num_bases" in message


def test_a_weight_that_mergekits_own_method_needs_is_asked_for(place: Family) -> None:
    def edit(config: Config) -> None:
        config.update(merge_method="ties", parameters={"density": 0.5})

    assert "Missing required parameter weight" in merge_refused(place, edit)


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
    assert "resize_token_embeddings(64)" in message and "tokenizer" in message


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
    root = place.base.parent.parent
    torch.manual_seed(99)
    other = {name: torch.randn_like(tensor) * tensor.std() for name, tensor in read_state(place.base).items()}
    save_state(place.tasks["law"], other, place.base)
    file = write_config(root / "merge.yml", merge_config(place, num_bases=2))
    outcome = tvbases("mergekit-yaml", file, root / "out", "--quiet")
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
    root = place.base.parent.parent
    file = write_config(root / "merge.yml", merge_config(place))
    for arguments, reason in [
        ([], "CONFIG_FILE"),
        ([file], "OUT_PATH"),
        ([file, root / "out", "--no-such-option"], "--no-such-option"),
        ([file, root / "out", "--random-seed", "x"], "'x' is not a valid integer"),
        ([file, root / "out", "--out-shard-size", "5X"], "--out-shard-size"),
    ]:
        assert reason in refused(root, "mergekit-yaml", *arguments)


def test_the_output_must_not_be_one_of_the_models(place: Family) -> None:
    """Even where the model is itself an earlier merge, which may be replaced otherwise."""
    root = place.base.parent.parent
    (place.base / "mergekit_config.yml").write_text("merge_method: linear\n")
    file = write_config(root / "merge.yml", merge_config(place))
    assert "is one of the models" in refused(root, "mergekit-yaml", file, place.base)


@pytest.mark.parametrize("make", ["file", "foreign", "merged_with_more"])
def test_an_output_that_is_not_ours_is_left_alone(make: str, place: Family) -> None:
    root, out = place.base.parent.parent, place.base.parent.parent / "out"
    if make == "file":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / "notes.md").write_text("mine")
        if make == "merged_with_more":
            (out / "mergekit_config.yml").write_text("merge_method: linear\n")
    file = write_config(root / "merge.yml", merge_config(place))
    message = refused(root, "mergekit-yaml", file, out)
    assert ("is a file" if make == "file" else "holds something that this command did not write") in message


def test_a_checkpoint_made_for_the_family_has_the_config_it_needs(llama_base: Path, tmp_path: Path) -> None:
    """The refusals above are not for want of a file in the models that they start from."""
    family = make_family(tmp_path / "m", llama_base, ["a", "b"], seed=0)
    assert json.loads((family.base / "config.json").read_text())["model_type"] == "llama"
    file = write_config(tmp_path / "merge.yml", merge_config(family))
    assert tvbases("mergekit-yaml", file, tmp_path / "out", "--quiet").code == 0
    assert yaml.safe_load((tmp_path / "out" / "mergekit_config.yml").read_text())["merge_method"] == "ae_bases"
