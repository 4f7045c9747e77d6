"""Every word of a merge's YAML must mean something: what is misspelt, misplaced or out of range is said at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from commands.command_line import refused, root, tvbases
from oracles.merge_oracle import merge_config, write_config
from tvbases_mergekit.yaml_files import KeysOnce
from zoo.hf_models import Family
from zoo.merge_refusals import Config, merge_refused, set_weights, text_refused

pytest_plugins = ["zoo.hf_fixtures"]


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


@pytest.mark.parametrize(
    "text",
    [
        "merge_method: ties\nmodels: [{model: a}]\nparameters:\n  lambda: 0.5\n  density: 0.2\n  lambda: 1.0\n",
        "merge_method: ties\nmodels: [{model: a, parameters: {weight: 1, lambda: 0.5, lambda: 1}}]\n",
        "merge_method: ties\nlambda: 1\nmodels: [{model: a}]\nlambda: 1\n",
    ],
)
def test_a_key_that_is_given_twice_is_said(text: str, tmp_path: Path) -> None:
    message = text_refused(tmp_path, text)
    assert "lambda is given twice" in message and "line " in message


def test_an_anchor_may_be_merged_into_several_mappings(tmp_path: Path) -> None:
    file = tmp_path / "merge.yml"
    file.write_text("a: &a {weight: 1}\nb: {<<: *a, weight: 2}\nc: {<<: *a}\n", encoding="utf-8")
    assert yaml.load(file.read_text(), KeysOnce) == {"a": {"weight": 1}, "b": {"weight": 2}, "c": {"weight": 1}}


def test_a_configuration_without_method_or_models_says_which_field_is_missing(tmp_path: Path) -> None:
    assert "merge_method: Field required" in text_refused(tmp_path, "models: [{model: a}]\n")
    assert "models" in text_refused(tmp_path, "merge_method: ae_bases\n")


def test_a_binary_file_is_not_a_configuration(place: Family) -> None:
    message = refused(root(place), "mergekit-yaml", place.base / "model.safetensors", root(place) / "out")
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
    file = write_config(root(place) / "merge.yml", merge_config(place, num_bases=2) | {"name": "my-merge"})
    assert tvbases("mergekit-yaml", file, root(place) / "out", "--quiet").code == 0


@pytest.mark.parametrize("inner", ["slurp", "linear", "ae_bases", "passthrough"])
def test_an_inner_method_that_cannot_take_a_base_is_refused_with_the_known_ones(inner: str, place: Family) -> None:
    message = merge_refused(place, merge=inner)
    assert f"merge: '{inner}'" in message and "task_arithmetic, ties" in message
    assert ("did you mean slerp?" in message) == (inner == "slurp")


@pytest.mark.parametrize(("name", "known"), [("over", "bases or reconstructions"), ("solver", "varpro or adam")])
def test_an_unknown_choice_is_refused_with_the_known_ones(name: str, known: str, place: Family) -> None:
    parameters: Config = {name: "basis"}
    message = merge_refused(place, **parameters)
    assert f"{name} of " in message and f"must be {known}" in message and "got 'basis'" in message


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
    config = merge_config(place, num_bases=2, weight=1.0)
    set_weights(*[[{"filter": "mlp", "value": 0.5}]] * 4)(config)
    assert (
        tvbases("mergekit-yaml", write_config(root(place) / "merge.yml", config), root(place) / "out", "--quiet").code
        == 0
    )


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
