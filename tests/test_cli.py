"""The ``tvbases`` command: what it prints, what it refuses, and what it leaves on disk."""

from __future__ import annotations

import errno
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
import typer
from command_line import refused, snapshot, tvbases
from hf_models import Family, read_state, save_state
from merge_oracle import family_vectors, merge_config, write_config
from safetensors import SafetensorError

from tvbases_hf import Basis
from tvbases_hf.checkpoint import Checkpoint
from tvbases_hf.cli import app
from tvbases_mergekit.hook import hook_app

pytest_plugins = ["hf_fixtures"]


def names(program: typer.Typer) -> list[str]:
    return [
        command.name or str(getattr(command.callback, "__name__", "")).replace("_", "-")
        for command in program.registered_commands
    ]


COMMANDS = [[name] for name in names(app)] + [["hook", name] for name in names(hook_app)]


@pytest.fixture
def place(llama: Family, tmp_path: Path) -> Family:
    """Copies of a base and two fine-tunes, to be damaged."""
    names = ["math", "code"]
    for path in (llama.base, *(llama.tasks[name] for name in names)):
        shutil.copytree(path, tmp_path / "models" / path.name)
    return Family(tmp_path / "models" / "base", {name: tmp_path / "models" / name for name in names})


def inputs(place: Family) -> list[object]:
    tasks = [part for name, path in place.tasks.items() for part in ("--task", f"{name}={path}")]
    return ["--base", place.base, *tasks]


def root(place: Family) -> Path:
    return place.base.parent.parent


def compress(place: Family, *more: object) -> list[object]:
    return ["compress", *inputs(place), "--out", root(place) / "basis", *more]


def compress_refused(place: Family, *more: object) -> str:
    return refused(root(place), *compress(place, *more))


# Help and usage


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_of_every_command_shows_an_example(command: list[str]) -> None:
    outcome = tvbases(*command, "--help")
    assert (outcome.code, outcome.err) == (0, "")
    text = " ".join(outcome.out.replace("│", " ").split())
    assert f"Example: tvbases {' '.join(command)}" in text


def test_help_of_the_program_names_every_command() -> None:
    outcome = tvbases("--help")
    assert outcome.code == 0
    assert {"inspect", "compress", "mergekit-yaml", "doctor", "demo", "hook"} <= {command[0] for command in COMMANDS}
    assert all(command[0] in outcome.out for command in COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["compress", "--base", "b", "--task", "a=b"], "'--out'"),
        (["compress", "--task", "a=b", "--out", "o"], "'--base'"),
        (["inspect", "--base", "b"], "'--task'"),
        (["inspect", "--base", "b", "--task", "a=b", "--taks", "c=d"], "--taks"),
        (["compress", "--base", "b", "--task", "a=b", "--out", "o", "-m", "half"], "--num-bases"),
        (["kompress"], "kompress"),
    ],
)
def test_wrong_usage_is_named_and_exits_with_2(arguments: list[str], reason: str, tmp_path: Path) -> None:
    before = snapshot(tmp_path)
    outcome = tvbases(*arguments)
    assert outcome.code == 2 and outcome.out == ""
    assert reason in " ".join(outcome.err.replace("│", " ").split())
    assert snapshot(tmp_path) == before


def test_the_installed_program_and_the_module_are_the_same_command(tmp_path: Path) -> None:
    program = Path(sys.executable).with_name("tvbases")
    task = f"a={tmp_path / 'absent'}"
    for command in ([str(program)], [sys.executable, "-m", "tvbases_hf"]):
        done = subprocess.run(
            [*command, "inspect", "--base", str(tmp_path / "absent"), "--task", task],
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith('error: "') and "no such file or directory" in done.stderr
        assert len(done.stderr.splitlines()) == 1


# Success


def test_quiet_success_prints_nothing(place: Family) -> None:
    file = write_config(root(place) / "merge.yml", merge_config(place, num_bases=1))
    for arguments in (
        ["inspect", *inputs(place), "--quiet"],
        compress(place, "--quiet"),
        ["mergekit-yaml", file, root(place) / "out", "--quiet"],
    ):
        outcome = tvbases(*arguments)
        assert (outcome.code, outcome.out, outcome.err) == (0, "", ""), arguments


def test_a_quiet_merge_in_a_process_of_its_own_prints_nothing(place: Family) -> None:
    """Libraries keep the streams that they find when they are imported; only a new process shows what they say."""
    file = write_config(root(place) / "merge.yml", merge_config(place, num_bases=1))
    command = [sys.executable, "-m", "tvbases_hf", "mergekit-yaml", str(file), str(root(place) / "out"), "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (root(place) / "out" / "model.safetensors").is_file()


def test_what_a_merge_did_is_reported_by_task(place: Family) -> None:
    file = write_config(root(place) / "merge.yml", merge_config(place, num_bases=1))
    outcome = tvbases("mergekit-yaml", file, root(place) / "out")
    assert outcome.code == 0
    (line,) = [part for part in outcome.err.splitlines() if "ae_bases:" in part]
    assert "2 task vectors in 1 basis," in line
    assert all(f"{path} 0.50" in line for path in place.tuned())


def test_json_holds_what_the_report_says(place: Family) -> None:
    vectors = family_vectors(place)
    file = root(place) / "inspect.json"
    assert tvbases("inspect", *inputs(place), "--quiet", "--json", file).code == 0
    found = json.loads(file.read_text(), parse_constant=pytest.fail)
    norms = vectors.matrix.norm(dim=0)
    assert found["tasks"] == ["math", "code"]
    assert found["norm"] == pytest.approx(norms.tolist(), rel=1e-10)
    cosine = vectors.gram / norms[:, None] / norms
    assert (torch.tensor(found["cosine"], dtype=torch.float64) - cosine).abs().max() < 1e-10
    assert found["warnings"] == []

    assert tvbases(*compress(place, "-m", 1, "--quiet", "--json", file)).code == 0
    found = json.loads(file.read_text(), parse_constant=pytest.fail)
    mean = vectors.matrix.mean(dim=1)  # one balanced basis is the mean task vector
    fitted = mean[:, None] * (mean @ vectors.matrix / (mean @ mean))
    error = (vectors.matrix - fitted).norm(dim=0) / norms
    assert found["task_error"] == pytest.approx(error.tolist(), rel=1e-5)
    assert found["effective_weights"] == pytest.approx([0.5, 0.5])
    assert found["bytes_of_task_vectors"] == 2 * found["bytes"] == 2 * vectors.matrix.shape[0] * 4


def test_a_compressed_task_comes_back_with_the_error_that_was_reported(place: Family) -> None:
    assert tvbases(*compress(place, "-m", 1, "--quiet")).code == 0
    basis = Basis.from_pretrained(root(place) / "basis")
    vectors = family_vectors(place)
    for index, task in enumerate(place.tasks):
        restored = torch.cat([tensor.double().reshape(-1) for tensor in basis.reconstruct(task).values()])
        names = list(basis.reconstruct(task))
        tau = torch.cat([vectors.tau[name][index].reshape(-1) for name in names])
        assert float((restored - tau).norm() / tau.norm()) == pytest.approx(basis.info.task_error[index], rel=1e-5)


def test_a_second_run_replaces_our_own_output_whole(place: Family) -> None:
    """Files of the first run that the second does not write are gone."""
    file = write_config(root(place) / "merge.yml", merge_config(place, num_bases=1))
    out = root(place) / "out"
    assert tvbases("mergekit-yaml", file, out, "--quiet", "--out-shard-size", "10k").code == 0
    assert len(list(out.glob("*.safetensors"))) > 1
    assert tvbases("mergekit-yaml", file, out, "--quiet").code == 0
    assert [path.name for path in out.glob("model*")] == ["model.safetensors"]
    assert tvbases("mergekit-yaml", file, out, "--quiet", "--no-write-model-card").code == 0
    assert not (out / "README.md").exists()
    assert tvbases("mergekit-yaml", file, out, "--quiet").code == 0

    assert tvbases(*compress(place, "-m", 2, "--quiet")).code == 0
    first = snapshot(root(place) / "basis")
    assert tvbases(*compress(place, "-m", 1, "--quiet")).code == 0
    assert len(Basis.from_pretrained(root(place) / "basis").info.encoder[0]) == 1
    assert tvbases(*compress(place, "-m", 2, "--quiet")).code == 0
    assert snapshot(root(place) / "basis") == first
    assert sorted(path.name for path in root(place).iterdir()) == ["basis", "merge.yml", "models", "out"]


def test_a_merged_models_files_name_the_directory_that_was_asked_for(place: Family) -> None:
    config = merge_config(place, num_bases=1)
    file = write_config(root(place) / "merge.yml", config)
    out = root(place) / "my-merge"
    assert tvbases("mergekit-yaml", file, out, "--quiet").code == 0
    assert "# my-merge\n" in (out / "README.md").read_text()
    assert (out / "mergekit_config.yml").read_text() == file.read_text()
    for path in out.iterdir():
        if path.suffix in (".md", ".json", ".yml"):
            assert ".tvbases-" not in path.read_text(), path
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(str(out))
    assert torch.equal(model.model.norm.weight, read_state(out)["model.norm.weight"])
    assert AutoTokenizer.from_pretrained(str(out))("word3")["input_ids"]


def test_an_output_that_is_a_link_stays_one(place: Family) -> None:
    target, link = root(place) / "elsewhere" / "basis-1", root(place) / "basis"
    target.mkdir(parents=True)
    link.symlink_to(target)
    for count in (2, 1):
        assert tvbases(*compress(place, "-m", count, "--quiet")).code == 0
        assert link.is_symlink() and link.resolve() == target
        assert len(Basis.from_pretrained(target).info.encoder[0]) == count
    assert [path.name for path in target.parent.iterdir()] == ["basis-1"]


def test_an_output_may_be_spelt_with_dots(place: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    (root(place) / "inside").mkdir()
    monkeypatch.chdir(root(place) / "inside")
    assert tvbases("compress", *inputs(place), "--out", "../basis/../basis/.", "--quiet").code == 0
    assert (root(place) / "basis" / "basis_config.json").is_file()


def test_a_fine_tune_of_another_base_is_compressed_with_a_warning_that_names_it(place: Family) -> None:
    torch.manual_seed(5)
    other = {name: torch.randn_like(tensor) * tensor.std() for name, tensor in read_state(place.base).items()}
    save_state(place.tasks["code"], other, place.base)
    for arguments in (compress(place, "--quiet"), ["inspect", *inputs(place), "--quiet"]):
        outcome = tvbases(*arguments)
        assert (outcome.code, outcome.out) == (0, "")
        (line,) = outcome.err.splitlines()
        assert line.startswith('warning: "code" differs from the base by') and "another base" in line


# Refusals


def test_two_tasks_of_one_name_are_refused_with_both_paths(place: Family) -> None:
    message = compress_refused(place, "--task", f"math={place.tasks['code']}")
    assert 'two tasks are named "math"' in message
    assert str(place.tasks["math"]) in message and str(place.tasks["code"]) in message


@pytest.mark.parametrize("task", ["math", "=path", "math=", " = "])
def test_a_task_that_is_not_name_and_path_is_refused_with_an_example(task: str, place: Family) -> None:
    message = compress_refused(place, "--task", task)
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
    count: str, reason: str, place: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Checkpoint, "read", lambda *_: pytest.fail("a tensor was read"))
    assert reason in compress_refused(place, "--num-bases", count)


@pytest.mark.parametrize(("option", "known"), [("--method", "pca"), ("--solver", "varpro"), ("--dtype", "bfloat16")])
def test_an_unknown_choice_is_refused_with_the_known_ones_before_reading(
    option: str, known: str, place: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Checkpoint, "read", lambda *_: pytest.fail("a tensor was read"))
    message = compress_refused(place, option, "best")
    assert f"{option}: 'best'" in message and known in message


Damage = Callable[[Family], Any]


def replace_tensors(place: Family, task: str, change: Callable[[dict[str, Any]], Any]) -> None:
    state = read_state(place.tasks[task])
    change(state)
    save_state(place.tasks[task], state, place.base)


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
        ['"code" (', "the vocabularies differ (70 and 64 tokens)", "resize_token_embeddings(64)"],
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
    "config": (lambda p: (p.base / "config.json").write_text("{,}"), ["base", "config.json is not JSON"]),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("command", ["compress", "inspect"])
def test_a_model_that_cannot_be_used_is_named_with_the_reason(command: str, damage: str, place: Family) -> None:
    spoil, reasons = DAMAGES[damage]
    spoil(place)
    arguments = compress(place, "--quiet") if command == "compress" else ["inspect", *inputs(place), "--quiet"]
    message = refused(root(place), *arguments)
    assert all(reason in message for reason in reasons), message


def test_a_model_of_another_architecture_is_refused(place: Family, bert: Family) -> None:
    message = compress_refused(place, "--task", f"bert={bert.base}")
    assert message.startswith(f'"bert" ({bert.base}) is a bert model but the base')


def test_a_hub_model_that_cannot_be_had_says_what_to_check(place: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = compress_refused(place, "--task", "hub=nobody/no-such-model")
    assert '"nobody/no-such-model"' in message and "hf auth login" in message


# Outputs


@pytest.mark.parametrize("what", ["file", "foreign", "ours_and_more", "dangling"])
def test_an_output_that_is_not_ours_is_left_alone(what: str, place: Family) -> None:
    out = root(place) / "basis"
    if what == "file":
        out.write_text("mine")
    elif what == "dangling":
        out.symlink_to(root(place) / "nowhere")
    else:
        out.mkdir()
        (out / "thesis.txt").write_text("mine")
        if what == "ours_and_more":
            (out / "basis_config.json").write_text("{}")
    message = compress_refused(place)
    assert str(out) in message and ("is a file" if what in ("file", "dangling") else "did not write") in message


def test_json_that_cannot_be_written_is_refused_before_the_work(place: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Checkpoint, "read", lambda *_: pytest.fail("a tensor was read"))
    assert "--json" in compress_refused(place, "--json", root(place) / "absent" / "x.json")
    assert "--json" in compress_refused(place, "--json", root(place) / "models")


def test_an_output_below_a_file_is_refused_before_the_work(place: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Checkpoint, "read", lambda *_: pytest.fail("a tensor was read"))
    note = root(place) / "note"
    note.write_text("mine")
    file = write_config(root(place) / "merge.yml", merge_config(place, num_bases=1))
    for arguments in (
        ["compress", *inputs(place), "--out", note / "a" / "basis"],
        ["mergekit-yaml", file, note / "out"],
    ):
        assert f'"{note}" is a file' in refused(root(place), *arguments)


def test_a_disk_that_is_too_small_is_said_before_writing(place: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(root(place))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    file = write_config(root(place) / "merge.yml", merge_config(place, num_bases=1))
    for arguments in (compress(place, "--quiet"), ["mergekit-yaml", file, root(place) / "out", "--quiet"]):
        message = refused(root(place), *arguments)
        assert f'the disk of "{root(place)}" is full' in message and "78.5 kB are needed, 1 kB are free" in message
        assert "free some space or write to another disk" in message


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is Linux's")
@pytest.mark.parametrize("previous", [False, True])
def test_a_disk_that_fills_while_tensors_are_written_leaves_nothing(
    previous: bool, place: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel's own refusal, through a file that is always full."""
    from tvbases_hf import output

    if previous:
        assert tvbases(*compress(place, "-m", 2, "--quiet")).code == 0
    begin = output._begin_file

    def begin_and_fill(file: Path, tensors: Any) -> Any:
        slots = begin(file, tensors)
        file.unlink()
        file.symlink_to("/dev/full")
        return slots

    monkeypatch.setattr(output, "_begin_file", begin_and_fill)
    message = compress_refused(place, "-m", 1, "--quiet")
    assert "is full" in message and "Nothing was left behind" in message


@pytest.mark.parametrize("error", ["safetensors", "python"])
def test_a_disk_that_fills_while_mergekit_writes_leaves_nothing(
    error: str, place: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    """safetensors puts the system's error into words; Python keeps its number."""

    def fail(*_: Any, **__: Any) -> None:
        if error == "safetensors":
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(
        "safetensors.torch.save_file" if error == "safetensors" else "mergekit.merge.generate_card", fail
    )
    file = write_config(root(place) / "merge.yml", merge_config(place, num_bases=1))
    message = refused(root(place), "mergekit-yaml", file, root(place) / "out", "--quiet")
    assert f'the disk of "{root(place)}" is full' in message and "Nothing was left behind" in message
