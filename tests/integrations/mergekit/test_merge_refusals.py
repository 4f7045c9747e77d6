"""What ``tvbases merge`` cannot do, or not with these files, is one message and exit code 2, and nothing is written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from commands.command_line import misused, refused, snapshot, tvbases
from oracles.merge_oracle import write_config
from zoo.adapter_zoo import Zoo, config_of, make_base, make_zoo, run_native
from zoo.hf_models import read_state, save_state
from zoo.peft_models import edit_config, edit_tensors

Config = dict[str, Any]
Edit = Callable[[Config, Zoo], object]
WEIGHTS = [0.7, -0.4, 1.1]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return make_zoo(tmp_path_factory.mktemp("zoo"))


@pytest.fixture
def zoo(original: Zoo, tmp_path: Path) -> Zoo:
    """Copies of the base, the adapters and the full models, to be damaged."""
    shutil.copytree(original.base.parent, tmp_path, dirs_exist_ok=True)
    for path in original.adapters:
        edit_config(tmp_path / f"{path}-lora", base_model_name_or_path=str(tmp_path / "base"))
    adapters = {name: tmp_path / path.name for name, path in original.adapters.items()}
    full = {name: tmp_path / path.name for name, path in original.full.items()}
    return Zoo(tmp_path / "base", adapters, full, original.tau)


def merge_refused(zoo: Zoo, config: Config, *options: object) -> str:
    root = zoo.base.parent
    return refused(root, "merge", write_config(root / "merge.yml", config), root / "out", "--quiet", *options)


def set_models(*models: Any) -> Edit:
    return lambda config, zoo: config.update(models=[{"model": str(model)} for model in models])


def only(config: Config, zoo: Zoo) -> None:
    config["models"] = [{"model": str(zoo.base)}]


def on_another_base(config: Config, zoo: Zoo) -> None:
    config["models"][1]["model"] = f"{zoo.full['math']}+{zoo.adapters['code']}"


def twice(config: Config, zoo: Zoo) -> None:
    config["models"][1]["model"] = config["models"][0]["model"]


def two_spellings(config: Config, zoo: Zoo) -> None:
    config["models"][1]["model"] = f"{zoo.base}+{zoo.adapters['math']}"


def base_below_adapter(config: Config, zoo: Zoo) -> None:
    config["base_model"] = f"{zoo.base}+{zoo.adapters['math']}"


def slices(config: Config, zoo: Zoo) -> None:
    sources = [{"model": str(path), "layer_range": [0, 3]} for path in (zoo.base, *zoo.full.values())]
    del config["models"]
    config["slices"] = [{"sources": sources}]


def another_method(config: Config, zoo: Zoo) -> None:
    config["merge_method"] = "model_stock"
    for model in config["models"]:
        del model["parameters"]


MISTAKES: dict[str, tuple[Edit, list[str]]] = {
    "slices": (slices, ["slices", "tvbases mergekit-yaml CONFIG OUT"]),
    "another method": (another_method, ["merge_method: model_stock is not done on changes", "mergekit-yaml"]),
    "unknown method": (lambda c, z: c.update(merge_method="tis"), ["unknown merge_method 'tis'", "mean ties?"]),
    "unknown parameter": (lambda c, z: c.update(parameters={"lamda": 1}), ["no parameter 'lamda'", "mean lambda?"]),
    "infinite parameter": (lambda c, z: c.update(parameters={"lambda": float("inf")}), ["lambda is inf"]),
    "no weight": (lambda c, z: c["models"][0].pop("parameters"), ["Missing required parameter weight"]),
    "no base": (lambda c, z: c.pop("base_model"), ["task_arithmetic needs base_model"]),
    "base with adapter": (base_below_adapter, ["a base_model with an adapter", "tvbases mergekit-yaml"]),
    "adapter as base": (lambda c, z: c.update(base_model=str(z.adapters["math"])), ["where a base is needed"]),
    "only the base": (only, ["no model is named besides the base"]),
    "another base": (on_another_base, ["the adapter is on", "but the base of this merge is"]),
    "named twice": (twice, ["is named twice"]),
    "two spellings": (two_spellings, ["are the same model"]),
    "no such model": (set_models("nowhere"), ['"nowhere": no such file or directory']),
    "unknown dtype": (lambda c, z: c.update(dtype="float12"), ["unknown dtype 'float12'"]),
    "integer dtype": (lambda c, z: c.update(out_dtype="int64"), ["weights cannot be stored as int64"]),
}


# Of a whole model, as the tokenizers of these are absent, and of an adapter.
TOKENS: dict[str, tuple[Edit, list[str]]] = {
    "tokenizer": (lambda c, z: c.update(tokenizer={"source": "union"}), ["the tokenizers of these models", "beside"]),
    "tokenizer_source": (lambda c, z: c.update(tokenizer_source="base"), ["leave tokenizer_source out"]),
    "chat_template": (lambda c, z: c.update(chat_template="nonsense"), ["chat_template: Invalid", "give auto"]),
}


@pytest.mark.parametrize("key", sorted(TOKENS))
def test_tokens_that_cannot_be_had_are_said(key: str, zoo: Zoo) -> None:
    config = config_of(zoo, "task_arithmetic", WEIGHTS)
    edit, words = TOKENS[key]
    edit(config, zoo)
    for file in zoo.base.glob("tokenizer*"):
        file.unlink()
    message = merge_refused(zoo, config)
    assert all(word in message for word in words), message
    assert f"{key} is of a whole model, which an adapter is not" in merge_refused(zoo, config, "--adapter")


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("options", [(), ("--adapter",)], ids=["checkpoint", "adapter"])
def test_a_mistake_in_the_configuration_is_one_message(mistake: str, options: tuple[str, ...], zoo: Zoo) -> None:
    config = config_of(zoo, "task_arithmetic", WEIGHTS)
    edit, words = MISTAKES[mistake]
    edit(config, zoo)
    message = merge_refused(zoo, config, *options)
    assert all(word in message for word in words), message


def bases(**parameters: Any) -> tuple[str, dict[str, Any]]:
    return "ae_bases", parameters


METHODS: dict[str, tuple[tuple[str, dict[str, Any]], list[str]]] = {
    "too many bases": (bases(num_bases=4), ["num_bases is 4 but there are only 3 tasks"]),
    "unknown inner method": (bases(merge="tis"), ["merge: 'tis' is not a method that takes a base"]),
    "inner method of two models": (bases(merge="nearswap", num_bases=1, t=0.1), ["merge: nearswap", "mergekit-yaml"]),
    "parameter of another inner method": (bases(select_topk=0.5), ["select_topk is not a parameter of merge"]),
    "unknown solver": (bases(solver="newton"), ["solver of ae must be varpro or adam; got 'newton'"]),
    "bad rank": (("tsv", {"rank": -3}), ["rank", "-3", "is not a rank rule"]),
    "bad threshold": (("devec_unique", {"threshold": 1.5}), ["threshold", "above 0 and at most 1; got 1.5"]),
}


@pytest.mark.parametrize("mistake", METHODS)
def test_a_value_that_a_method_refuses_is_one_message(mistake: str, zoo: Zoo) -> None:
    (method, parameters), words = METHODS[mistake]
    message = merge_refused(zoo, config_of(zoo, method, **parameters), "--adapter")
    assert all(word in message for word in words), message


def test_weights_that_cancel_have_no_mean(zoo: Zoo) -> None:
    config = config_of(zoo, "linear", models={n: f"{zoo.base}+{p}" for n, p in zoo.adapters.items()}, weight=0.0)
    del config["base_model"]
    assert "the weights of linear sum to 0" in merge_refused(zoo, config, "--adapter")


def test_an_adapter_cannot_scale_the_base(zoo: Zoo) -> None:
    config = config_of(zoo, "linear", WEIGHTS, normalize=False)
    config["parameters"]["weight"] = 0.0  # of the base, which linear takes for a model
    message = merge_refused(zoo, config, "--adapter")
    assert "also scales the base, which an adapter cannot do" in message
    run_native(config, zoo.base.parent / "out")  # a checkpoint can


def test_adapters_on_two_models_have_no_common_base(zoo: Zoo) -> None:
    models = {"math": f"{zoo.base}+{zoo.adapters['math']}", "code": f"{zoo.full['math']}+{zoo.adapters['code']}"}
    config = config_of(zoo, "linear", models=models, weight=1.0)
    del config["base_model"]
    assert "but the base of this merge is" in merge_refused(zoo, config)


@pytest.mark.parametrize(("options", "word"), [
    (("--rank", "4"), "--rank is that of a merged adapter"),
    (("--adapter", "--rank", "many"), "'many' is not a rank rule"),
    (("--json", "/nowhere/r.json"), "not a file in a directory that exists"),
])  # fmt: skip
def test_a_mistake_in_the_options_is_one_message(options: tuple[str, ...], word: str, zoo: Zoo) -> None:
    assert word in merge_refused(zoo, config_of(zoo, "task_arithmetic", WEIGHTS), *options)


def test_a_dtype_that_is_none_of_the_choices_is_wrong_usage(zoo: Zoo) -> None:
    root = zoo.base.parent
    file = write_config(root / "merge.yml", config_of(zoo, "task_arithmetic", WEIGHTS))
    said = misused(root, "merge", file, root / "out", "--dtype", "int8")
    assert "'int8' is not one of 'auto', 'float32', 'bfloat16', 'float16'" in said


def test_a_full_checkpoint_does_not_become_an_adapter(zoo: Zoo) -> None:
    models = zoo.adapters | {"law": zoo.full["chat"]}
    message = merge_refused(zoo, config_of(zoo, "task_arithmetic", [1.0] * 4, models=models), "--adapter")
    assert "1 of 4 models are full checkpoints" in message and "leave --adapter out" in message


def test_adapters_that_name_different_bases_are_refused(zoo: Zoo) -> None:
    edit_config(zoo.adapters["code"], base_model_name_or_path="someone/another-model")
    message = merge_refused(zoo, config_of(zoo, "task_arithmetic", WEIGHTS), "--adapter")
    assert "trained on different bases" in message and "someone/another-model" in message


def test_factors_of_another_shape_are_refused(zoo: Zoo) -> None:
    shutil.rmtree(zoo.base)
    make_base(zoo.base, hidden=64)
    message = merge_refused(zoo, config_of(zoo, "task_arithmetic", WEIGHTS))
    assert "make a change of shape [32, " in message and "it was trained on" in message


@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_nan_in_an_adapter_names_it(factor: str, zoo: Zoo) -> None:
    name = f"base_model.model.model.layers.1.self_attn.q_proj.{factor}.weight"
    edit_tensors(zoo.adapters["code"], lambda tensors: tensors | {name: tensors[name] * torch.nan})
    for method in ("task_arithmetic", "ties", "tsv"):
        message = merge_refused(zoo, config_of(zoo, method, WEIGHTS), "--adapter")
        assert str(zoo.adapters["code"]) in message
        assert f"{name} holds" in message and "NaN or infinite" in message


def test_infinity_in_the_base_names_it(zoo: Zoo) -> None:
    state = read_state(zoo.full["math"])
    state["model.norm.weight"][3] = torch.inf
    save_state(zoo.full["math"], state, zoo.base)
    message = merge_refused(zoo, config_of(zoo, "task_arithmetic", WEIGHTS, models=zoo.full))
    assert f'"{zoo.full["math"]}": tensor model.norm.weight holds 1 NaN or infinite numbers' in message


def test_a_quantised_base_is_refused(zoo: Zoo) -> None:
    state = read_state(zoo.base)
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file(state | {name: state[name].to(torch.int8)}, zoo.base / "model.safetensors", {"format": "pt"})
    message = merge_refused(zoo, config_of(zoo, "task_arithmetic", WEIGHTS))
    assert f"{name} is quantised (an unknown format, int8 [32, 32])" in message and "dequantize()" in message


def test_a_weight_that_fills_the_space_stops_the_merge_and_leaves_nothing(zoo: Zoo) -> None:
    def fill(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        prefix = "base_model.model.model.layers.2.self_attn.v_proj"
        return tensors | {f"{prefix}.lora_A.weight": torch.eye(16, 32), f"{prefix}.lora_B.weight": torch.eye(16)}

    edit_tensors(zoo.adapters["code"], fill)
    edit_config(zoo.adapters["code"], rank_pattern={"layers.2.self_attn.v_proj": 16})
    message = merge_refused(zoo, config_of(zoo, "devec_unique", WEIGHTS))
    assert "devec_unique, model.layers.2.self_attn.v_proj.weight" in message and "span all 16 directions" in message


# The output


@pytest.mark.parametrize("options", [(), ("--adapter",)], ids=["checkpoint", "adapter"])
def test_an_output_that_is_not_ours_is_left_alone(options: tuple[str, ...], zoo: Zoo) -> None:
    """Not even an adapter that somebody trained, which looks like one of ours."""
    root = zoo.base.parent
    for name, mine in {"trained": zoo.adapters["math"], "whole": zoo.full["math"]}.items():
        shutil.copytree(mine, root / name)
        file = write_config(root / "merge.yml", config_of(zoo, "task_arithmetic", WEIGHTS))
        message = refused(root, "merge", file, root / name, *options)
        assert "did not write" in message


def test_the_output_must_not_be_one_of_the_models(zoo: Zoo) -> None:
    root = zoo.base.parent
    run_native(config_of(zoo, "task_arithmetic", WEIGHTS), root / "merged", "--adapter")
    config = config_of(zoo, "task_arithmetic", [*WEIGHTS, 1.0], models=zoo.adapters | {"merged": root / "merged"})
    message = refused(root, "merge", write_config(root / "merge.yml", config), root / "merged", "--adapter")
    assert "is one of the models of this merge" in message


def test_an_earlier_merge_is_replaced_unless_something_was_added(zoo: Zoo) -> None:
    root, config = zoo.base.parent, config_of(zoo, "task_arithmetic", WEIGHTS)
    run_native(config, root / "out", "--adapter")
    run_native(config, root / "out")
    assert (root / "out" / "config.json").is_file() and not (root / "out" / "adapter_config.json").exists()
    (root / "out" / "notes.txt").write_text("mine", encoding="utf-8")
    assert "did not write" in merge_refused(zoo, config)


def test_a_full_disk_is_one_message_and_leaves_nothing(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    from tvbases_hf.merging import write

    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(write, "write_adapter", full)
    assert "the disk of" in merge_refused(zoo, config_of(zoo, "task_arithmetic", WEIGHTS), "--adapter")


KILLED = """
import os, signal, sys
from tvbases_hf import cli
from tvbases_hf.merging import write

def die(*arguments, **words):
    real(*arguments, **words)
    os.kill(os.getpid(), signal.SIGKILL)

real = getattr(write, sys.argv[1])
setattr(write, sys.argv[1], die)
sys.argv = ["tvbases", *sys.argv[2:]]
cli.main()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs SIGKILL")
def test_a_killed_merge_leaves_the_old_output_and_the_next_run_cleans_up(zoo: Zoo) -> None:
    root, config = zoo.base.parent, config_of(zoo, "task_arithmetic", WEIGHTS)
    run_native(config, root / "out", "--adapter")
    before = snapshot(root / "out")
    command = ["merge", str(root / "out.yml"), str(root / "out"), "--adapter", "--rank", "2", "--quiet"]
    killed = subprocess.run([sys.executable, "-c", KILLED, "write_adapter", *command], capture_output=True, check=False)
    assert killed.returncode == -9, killed.stderr
    assert snapshot(root / "out") == before
    assert list(root.glob(".out.tvbases-*"))  # what it had begun
    assert tvbases(*command).code == 0
    assert snapshot(root / "out") != before and not list(root.glob(".out.tvbases-*"))
    assert json.loads((root / "out" / "adapter_config.json").read_text(encoding="utf-8"))["r"] == 2
