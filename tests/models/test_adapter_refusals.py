"""Adapters that cannot be used: one message from every command that reads adapters, exit code 2, nothing written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from commands.command_line import refused
from oracles.merge_oracle import write_config
from zoo.adapter_families import LLAMA, Adapters, random_adapters
from zoo.peft_models import edit_config, edit_tensors, make_base

WEIGHTS = "adapter_model.safetensors"
MODULE = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("adapters")
    random_adapters(root, tasks=("math", "code"))
    return root


@pytest.fixture
def adapters(original: Path, tmp_path: Path) -> Adapters:
    """Copies to be damaged; they name their base by a path that every copy agrees on."""
    root = tmp_path / "models"
    shutil.copytree(original, root)
    return Adapters(LLAMA, root / "base", {task: root / task for task in ("math", "code")})


class Payload:
    """A pickle that makes a directory when it is loaded."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.directory),)


def on_another_base(adapters: Adapters) -> None:
    edit_config(adapters.tasks["code"], base_model_name_or_path="someone/mistral")


def without_a_module(adapters: Adapters) -> None:
    shutil.rmtree(adapters.base)
    make_base(adapters.base, replace(LLAMA, options={"num_hidden_layers": 1}))


def of_other_shapes(adapters: Adapters) -> None:
    shutil.rmtree(adapters.base)
    make_base(adapters.base, replace(LLAMA, options={"hidden_size": 32}))


def without_weights(adapters: Adapters) -> None:
    (adapters.tasks["code"] / WEIGHTS).unlink()


def without_config(adapters: Adapters) -> None:
    (adapters.tasks["code"] / "adapter_config.json").unlink()


def pickled_code(adapters: Adapters) -> None:
    adapter = adapters.tasks["code"]
    tensors: dict[str, object] = {**load_file(adapter / WEIGHTS), "payload": Payload(adapters.base.parent / "run")}
    torch.save(tensors, adapter / "adapter_model.bin")
    (adapter / WEIGHTS).unlink()


def configured_rank_zero(adapters: Adapters) -> None:
    edit_config(adapters.tasks["code"], r=0)


def stored_rank_zero(adapters: Adapters) -> None:
    def empty(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        factors = {f"{MODULE}.lora_A.weight": torch.ones(0, 16), f"{MODULE}.lora_B.weight": torch.ones(16, 0)}
        return tensors | factors

    edit_tensors(adapters.tasks["code"], empty)


def of_more_tokens(adapters: Adapters) -> None:
    """Factors of an embedding that was made longer before the training."""
    embedding = "base_model.model.model.embed_tokens.lora_embedding_"

    def longer(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return tensors | {f"{embedding}A": torch.ones(3, 72), f"{embedding}B": torch.ones(16, 3)}

    edit_tensors(adapters.tasks["code"], longer)
    edit_config(adapters.tasks["code"], target_modules=["q_proj", "down_proj", "embed_tokens"])


BAD: dict[str, tuple[Callable[[Adapters], None], list[str]]] = {
    "different bases": (on_another_base, ["trained on different bases", "someone/mistral", "base_model_name_or_path"]),
    "a module that the base lacks": (without_a_module, ["4 of 8 tensors that the base", "does not have", "layers.1."]),
    "other shapes": (of_other_shapes, ["make a change of shape [", "give the base it was trained on"]),
    "more tokens": (of_more_tokens, ["embed_tokens make a change of shape [72, 16]", "resize_token_embeddings(72)"]),
    "no weights": (without_weights, ["code", f"adapter_config.json is here but not {WEIGHTS}; copy the weights too"]),
    "no configuration": (without_config, ["code", f"{WEIGHTS} is here but not adapter_config.json"]),
    "a pickle that runs code": (pickled_code, ["code", "adapter_model.bin", "never loaded"]),
    "rank 0 configured": (configured_rank_zero, ["code", "rank 0", "train or save it again"]),
    "rank 0 stored": (stored_rank_zero, ["code", "q_proj has rank 0", "train or save it again"]),
}
COMMANDS = ["compress", "merge", "merge --adapter", "merge by path"]


def command_line(command: str, adapters: Adapters, root: Path) -> list[object]:
    if command == "compress":
        return ["compress", *adapters.options(), "--out", root / "out", "--quiet"]
    own = "" if command == "merge by path" else f"{adapters.base}+"
    models = [{"model": f"{own}{path}", "parameters": {"weight": 1.0}} for path in adapters.tasks.values()]
    config = {"merge_method": "task_arithmetic", "base_model": str(adapters.base), "models": models}
    file = write_config(root / "merge.yml", config)
    return ["merge", file, root / "out", "--quiet", *(["--adapter"] if command == "merge --adapter" else [])]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("mistake", BAD)
def test_a_bad_adapter_is_one_message_and_nothing_is_written(
    mistake: str, command: str, adapters: Adapters, tmp_path: Path
) -> None:
    damage, words = BAD[mistake]
    damage(adapters)
    message = refused(tmp_path, *command_line(command, adapters, tmp_path))
    assert all(word in message for word in words), message
