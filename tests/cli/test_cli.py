"""The ``tvbases`` command: help, usage, and what a run that succeeds prints and leaves on disk."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer

from commands.command_line import compress, inputs, misused, root, snapshot, tvbases
from oracles.merge_oracle import family_vectors, merge_config, write_config
from tvbases_hf import Basis
from tvbases_hf.cli import app
from tvbases_mergekit.hook import hook_app
from zoo.hf_models import Family, read_state, save_state

pytest_plugins = ["zoo.hf_fixtures"]


def names(program: typer.Typer) -> list[str]:
    return [
        command.name or str(getattr(command.callback, "__name__", "")).replace("_", "-")
        for command in program.registered_commands
    ]


COMMANDS = [[name] for name in names(app)] + [["hook", name] for name in names(hook_app)]


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


@pytest.mark.parametrize("group", [[], ["hook"], ["library"]], ids=["tvbases", "hook", "library"])
def test_lists_of_commands_tell_each_in_whole_sentences(group: list[str]) -> None:
    listed = tvbases(*group, "--help").out.split("Commands:")[1]
    assert "..." not in listed and all(line.endswith(".") for line in listed.strip().splitlines())


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


def test_a_wrong_choice_is_told_in_plain_words(tmp_path: Path) -> None:
    message = misused(tmp_path, "plan", "--base", "b", "--models", 2, "--job", "ae_base")
    assert message.startswith("Invalid value for '--job': 'ae_base' is not one of 'gram', 'compress', ")


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


def test_quiet_success_prints_nothing(pair: Family) -> None:
    file = write_config(root(pair) / "merge.yml", merge_config(pair, num_bases=1))
    for arguments in (
        ["inspect", *inputs(pair), "--quiet"],
        compress(pair, "--quiet"),
        ["mergekit-yaml", file, root(pair) / "out", "--quiet"],
    ):
        outcome = tvbases(*arguments)
        assert (outcome.code, outcome.out, outcome.err) == (0, "", ""), arguments


def test_a_quiet_merge_in_a_process_of_its_own_prints_nothing(pair: Family) -> None:
    """Libraries keep the streams that they find when they are imported; only a new process shows what they say."""
    file = write_config(root(pair) / "merge.yml", merge_config(pair, num_bases=1))
    command = [sys.executable, "-m", "tvbases_hf", "mergekit-yaml", str(file), str(root(pair) / "out"), "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (root(pair) / "out" / "model.safetensors").is_file()


def test_what_a_merge_did_is_reported_by_task(pair: Family) -> None:
    file = write_config(root(pair) / "merge.yml", merge_config(pair, num_bases=1))
    outcome = tvbases("mergekit-yaml", file, root(pair) / "out")
    assert outcome.code == 0
    (line,) = [part for part in outcome.err.splitlines() if "ae_bases:" in part]
    assert "2 task vectors in 1 basis," in line
    assert all(f"{path} 0.50" in line for path in pair.tuned())


def test_json_holds_what_the_report_says(pair: Family) -> None:
    vectors = family_vectors(pair)
    file = root(pair) / "inspect.json"
    assert tvbases("inspect", *inputs(pair), "--quiet", "--json", file).code == 0
    found = json.loads(file.read_text(), parse_constant=pytest.fail)
    norms = vectors.matrix.norm(dim=0)
    assert found["tasks"] == ["math", "code"]
    assert found["norm"] == pytest.approx(norms.tolist(), rel=1e-10)
    cosine = vectors.gram / norms[:, None] / norms
    assert (torch.tensor(found["cosine"], dtype=torch.float64) - cosine).abs().max() < 1e-10
    assert found["warnings"] == []

    assert tvbases(*compress(pair, "-m", 1, "--quiet", "--json", file)).code == 0
    found = json.loads(file.read_text(), parse_constant=pytest.fail)
    mean = vectors.matrix.mean(dim=1)  # one balanced basis is the mean task vector
    fitted = mean[:, None] * (mean @ vectors.matrix / (mean @ mean))
    error = (vectors.matrix - fitted).norm(dim=0) / norms
    assert found["task_error"] == pytest.approx(error.tolist(), rel=1e-5)
    assert found["effective_weights"] == pytest.approx([0.5, 0.5])
    assert found["bytes_of_task_vectors"] == 2 * found["bytes"] == 2 * vectors.matrix.shape[0] * 4


def test_a_compressed_task_comes_back_with_the_error_that_was_reported(pair: Family) -> None:
    assert tvbases(*compress(pair, "-m", 1, "--quiet")).code == 0
    basis = Basis.from_pretrained(root(pair) / "basis")
    vectors = family_vectors(pair)
    for index, task in enumerate(pair.tasks):
        restored = torch.cat([tensor.double().reshape(-1) for tensor in basis.reconstruct(task).values()])
        names = list(basis.reconstruct(task))
        tau = torch.cat([vectors.tau[name][index].reshape(-1) for name in names])
        assert float((restored - tau).norm() / tau.norm()) == pytest.approx(basis.info.task_error[index], rel=1e-5)


def test_a_second_run_replaces_our_own_output_whole(pair: Family) -> None:
    """Files of the first run that the second does not write are gone."""
    file = write_config(root(pair) / "merge.yml", merge_config(pair, num_bases=1))
    out = root(pair) / "out"
    assert tvbases("mergekit-yaml", file, out, "--quiet", "--out-shard-size", "10k").code == 0
    assert len(list(out.glob("*.safetensors"))) > 1
    assert tvbases("mergekit-yaml", file, out, "--quiet").code == 0
    assert [path.name for path in out.glob("model*")] == ["model.safetensors"]
    assert tvbases("mergekit-yaml", file, out, "--quiet", "--no-write-model-card").code == 0
    assert not (out / "README.md").exists()
    assert tvbases("mergekit-yaml", file, out, "--quiet").code == 0

    assert tvbases(*compress(pair, "-m", 2, "--quiet")).code == 0
    first = snapshot(root(pair) / "basis")
    assert tvbases(*compress(pair, "-m", 1, "--quiet")).code == 0
    assert len(Basis.from_pretrained(root(pair) / "basis").info.encoder[0]) == 1
    assert tvbases(*compress(pair, "-m", 2, "--quiet")).code == 0
    assert snapshot(root(pair) / "basis") == first
    assert sorted(path.name for path in root(pair).iterdir()) == ["basis", "merge.yml", "models", "out"]


def test_a_merged_models_files_name_the_directory_that_was_asked_for(pair: Family) -> None:
    config = merge_config(pair, num_bases=1)
    file = write_config(root(pair) / "merge.yml", config)
    out = root(pair) / "my-merge"
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


def test_an_output_that_is_a_link_stays_one(pair: Family) -> None:
    target, link = root(pair) / "elsewhere" / "basis-1", root(pair) / "basis"
    target.mkdir(parents=True)
    link.symlink_to(target)
    for count in (2, 1):
        assert tvbases(*compress(pair, "-m", count, "--quiet")).code == 0
        assert link.is_symlink() and link.resolve() == target
        assert len(Basis.from_pretrained(target).info.encoder[0]) == count
    assert [path.name for path in target.parent.iterdir()] == ["basis-1"]


def test_an_output_may_be_spelt_with_dots(pair: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    (root(pair) / "inside").mkdir()
    monkeypatch.chdir(root(pair) / "inside")
    assert tvbases("compress", *inputs(pair), "--out", "../basis/../basis/.", "--quiet").code == 0
    assert (root(pair) / "basis" / "basis_config.json").is_file()


def test_a_fine_tune_of_another_base_is_compressed_with_a_warning_that_names_it(pair: Family) -> None:
    torch.manual_seed(5)
    other = {name: torch.randn_like(tensor) * tensor.std() for name, tensor in read_state(pair.base).items()}
    save_state(pair.tasks["code"], other, pair.base)
    for arguments in (compress(pair, "--quiet"), ["inspect", *inputs(pair), "--quiet"]):
        outcome = tvbases(*arguments)
        assert (outcome.code, outcome.out) == (0, "")
        (line,) = outcome.err.splitlines()
        assert line.startswith('warning: "code" differs from the base by') and "another base" in line


def test_a_model_given_twice_is_said_once_by_every_command(pair: Family) -> None:
    twice = [*inputs(pair), "--task", f"again={pair.tasks['math']}/"]
    for arguments in (
        ["inspect", *twice],
        ["compress", *twice, "-m", 2, "--out", root(pair) / "basis"],
        ["decompose", *twice, "--out", root(pair) / "parts"],
        ["negate", *twice, "--forget", "code", "--alpha", 0.5, "--out", root(pair) / "clean"],
    ):
        outcome = tvbases(*arguments, "--quiet")
        assert outcome.code == 0, outcome
        assert outcome.err.count("is the same model as") == 1 and 'warning: "again" is the same model' in outcome.err
