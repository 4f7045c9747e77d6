"""What ``tvbases`` refuses: one message that says what to do, exit code 2, and nothing written."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from commands.command_line import compress, inputs, misused, refused, root, tvbases
from oracles.merge_oracle import merge_config, write_config
from tvbases_hf.storage.checkpoint import Checkpoint
from zoo.hf_models import Family, read_state, save_state

pytest_plugins = ["zoo.hf_fixtures"]


def compress_refused(pair: Family, *more: object) -> str:
    return refused(root(pair), *compress(pair, *more))


def test_two_tasks_of_one_name_are_refused_with_both_paths(pair: Family) -> None:
    message = compress_refused(pair, "--task", f"math={pair.tasks['code']}")
    assert 'two tasks are named "math"' in message
    assert str(pair.tasks["math"]) in message and str(pair.tasks["code"]) in message


def test_the_home_of_a_user_that_does_not_exist_is_said(pair: Family) -> None:
    message = compress_refused(pair, "--out", "~nobody-of-this-name/x")
    assert '"~nobody-of-this-name/x": there is no home directory for ~nobody-of-this-name' in message


@pytest.mark.parametrize("task", ["math", "=path", "math=", " = "])
def test_a_task_that_is_not_name_and_path_is_refused_with_an_example(task: str, pair: Family) -> None:
    message = compress_refused(pair, "--task", task)
    assert f'"{task}" is not NAME=PATH, for example math=path/to/math' in message


@pytest.mark.parametrize(
    ("count", "reason"),
    [
        ("0", "positive number"),
        ("-2", "positive number"),
        ("1.5", "whole number"),
        ("3", "only 2 tasks"),
        ("nan", "positive number"),
        ("inf", "positive number"),
    ],
)
def test_a_number_of_bases_that_cannot_be_is_refused_before_reading(
    count: str, reason: str, pair: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Checkpoint, "read", lambda *_: pytest.fail("a tensor was read"))
    assert reason in compress_refused(pair, "--num-bases", count)


@pytest.mark.parametrize(("option", "known"), [("--method", "pca"), ("--solver", "varpro"), ("--dtype", "bfloat16")])
def test_an_unknown_choice_is_refused_with_the_known_ones_before_reading(
    option: str, known: str, pair: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Checkpoint, "read", lambda *_: pytest.fail("a tensor was read"))
    message = misused(root(pair), *compress(pair, option, "best"))
    assert f"'{option}'" in message and "'best'" in message and known in message


Damage = Callable[[Family], Any]


def replace_tensors(pair: Family, task: str, change: Callable[[dict[str, Any]], Any]) -> None:
    state = read_state(pair.tasks[task])
    change(state)
    save_state(pair.tasks[task], state, pair.base)


DAMAGES: dict[str, tuple[Damage, list[str]]] = {
    "absent": (lambda p: shutil.rmtree(p.tasks["code"]), ["code", "no such file or directory"]),
    "empty": (
        lambda p: (p.tasks["code"] / "model.safetensors").unlink(),
        ["code", "not a checkpoint", "found: config"],
    ),
    "truncated": (
        lambda p: os.truncate(p.tasks["code"] / "model.safetensors", 5000),
        ["code", "model.safetensors is truncated or not a safetensors file", "download or save it again"],
    ),
    "other_kind": (
        lambda p: (p.base / "model.safetensors").write_bytes(b"GGUF" + bytes(500)),
        ["base", "not a safetensors file"],
    ),
    "shape": (
        lambda p: replace_tensors(p, "code", lambda s: s.update({"model.norm.weight": torch.ones(31)})),
        ['"code" (', "1 of 21 tensors", "model.norm.weight [31] vs [32]"],
    ),
    "vocabulary": (
        lambda p: replace_tensors(p, "code", lambda s: s.update({"lm_head.weight": torch.ones(70, 32)})),
        ['"code" (', "the vocabularies differ (70 and 64 tokens)", "--extra-rows drop"],
    ),
    "nan": (
        lambda p: replace_tensors(p, "code", lambda s: s["model.layers.0.mlp.up_proj.weight"].fill_(float("nan"))),
        ["code", "model.layers.0.mlp.up_proj.weight holds 1536 NaN or infinite numbers of 1536"],
    ),
    "infinity": (
        lambda p: replace_tensors(p, "math", lambda s: s["lm_head.weight"][0].fill_(float("inf"))),
        ["math", "lm_head.weight holds 32 NaN or infinite numbers of 2048"],
    ),
    "adapter": (
        lambda p: [
            (p.tasks["code"] / "model.safetensors").rename(p.tasks["code"] / "adapter_model.safetensors"),
            (p.tasks["code"] / "adapter_config.json").write_text("{}"),
        ],
        ["code", "not a known kind of adapter"],
    ),
    "config": (
        lambda p: (p.base / "config.json").write_text("{,}"),
        ["base", "config.json is damaged: it is not JSON"],
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("command", ["compress", "inspect"])
def test_a_model_that_cannot_be_used_is_named_with_the_reason(command: str, damage: str, pair: Family) -> None:
    spoil, reasons = DAMAGES[damage]
    spoil(pair)
    arguments = compress(pair, "--quiet") if command == "compress" else ["inspect", *inputs(pair), "--quiet"]
    message = refused(root(pair), *arguments)
    assert all(reason in message for reason in reasons), message


def test_a_model_of_another_architecture_is_refused(pair: Family, bert: Family) -> None:
    message = compress_refused(pair, "--task", f"bert={bert.base}")
    assert message.startswith(f'"bert" ({bert.base}) is a bert model but the base')


def test_a_hub_model_that_cannot_be_had_says_what_to_check(pair: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = compress_refused(pair, "--task", "hub=nobody/no-such-model")
    assert '"nobody/no-such-model"' in message and "hf auth login" in message


# Outputs


@pytest.mark.parametrize("what", ["file", "foreign", "ours_and_more", "dangling"])
def test_an_output_that_is_not_ours_is_left_alone(what: str, pair: Family) -> None:
    out = root(pair) / "basis"
    if what == "file":
        out.write_text("mine")
    elif what == "dangling":
        out.symlink_to(root(pair) / "nowhere")
    else:
        out.mkdir()
        (out / "thesis.txt").write_text("mine")
        if what == "ours_and_more":
            (out / "basis_config.json").write_text("{}")
    message = compress_refused(pair)
    assert str(out) in message and ("is a file" if what in ("file", "dangling") else "did not write") in message


def test_json_that_cannot_be_written_is_refused_before_the_work(pair: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Checkpoint, "read", lambda *_: pytest.fail("a tensor was read"))
    assert "--json" in compress_refused(pair, "--json", root(pair) / "absent" / "x.json")
    assert "--json" in compress_refused(pair, "--json", root(pair) / "models")


def test_an_output_below_a_file_is_refused_before_the_work(pair: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Checkpoint, "read", lambda *_: pytest.fail("a tensor was read"))
    note = root(pair) / "note"
    note.write_text("mine")
    file = write_config(root(pair) / "merge.yml", merge_config(pair, num_bases=1))
    for arguments in (
        ["compress", *inputs(pair), "--out", note / "a" / "basis"],
        ["mergekit-yaml", file, note / "out"],
    ):
        assert f'"{note}" is a file' in refused(root(pair), *arguments)


def test_a_disk_that_is_too_small_is_said_before_writing(pair: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(root(pair))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    file = write_config(root(pair) / "merge.yml", merge_config(pair, num_bases=1))
    for arguments in (compress(pair, "--quiet"), ["mergekit-yaml", file, root(pair) / "out", "--quiet"]):
        message = refused(root(pair), *arguments)
        assert f'the disk of "{root(pair)}" is full' in message and "78.5 kB are needed, 1 kB are free" in message
        assert "free some space or write to another disk" in message


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is Linux's")
@pytest.mark.parametrize("previous", [False, True])
def test_a_disk_that_fills_while_tensors_are_written_leaves_nothing(
    previous: bool, pair: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel's own refusal, through a file that is always full."""
    from tvbases_hf.storage import tensor_files

    if previous:
        assert tvbases(*compress(pair, "-m", 2, "--quiet")).code == 0
    begin = tensor_files._begin

    def begin_and_fill(headers: dict[Path, bytes], slots: Any) -> None:
        begin(headers, slots)
        for file in headers:
            file.unlink()
            file.symlink_to("/dev/full")

    monkeypatch.setattr(tensor_files, "_begin", begin_and_fill)
    message = compress_refused(pair, "-m", 1, "--quiet")
    assert "is full" in message and "Nothing was left behind" in message


@pytest.mark.parametrize("error", ["safetensors", "python"])
def test_a_disk_that_fills_while_mergekit_writes_leaves_nothing(
    error: str, pair: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    """safetensors puts the system's error into words; Python keeps its number."""

    def fail(*_: Any, **__: Any) -> None:
        if error == "safetensors":
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(
        "safetensors.torch.save_file" if error == "safetensors" else "mergekit.merge.generate_card", fail
    )
    file = write_config(root(pair) / "merge.yml", merge_config(pair, num_bases=1))
    message = refused(root(pair), "mergekit-yaml", file, root(pair) / "out", "--quiet")
    assert f'the disk of "{root(pair)}" is full' in message and "Nothing was left behind" in message


def test_a_memory_limit_is_kept_or_refused(pair: Family) -> None:
    assert "give --memory" in compress_refused(pair, "-m", 1, "--memory", "1MB")
    assert "leave it out" in compress_refused(pair, "--method", "tsv", "--memory", "1GB")
    assert tvbases(*compress(pair, "-m", 1, "--quiet", "--memory", "100MB")).code == 0
