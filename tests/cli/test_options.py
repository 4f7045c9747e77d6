"""What is true of every command's options: one meaning a word, examples, defaults that are the library's."""

from __future__ import annotations

import inspect
import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

import pytest
import typer.main

from commands.command_line import inputs, root, snapshot, tvbases
from oracles.merge_oracle import merge_config, write_config
from tvbases_hf import defaults
from tvbases_hf.cli import app
from tvbases_hf.cli.planning import PASSES, plan
from tvbases_hf.learning.directions import FORGETTING
from tvbases_hf.merging.extract import extract
from tvbases_hf.methods.devec import Options
from tvbases_hf.styles.mixed_file import mix_style_files
from tvbases_hf.theory.inspection import inspect as examine
from tvbases_hf.version import library_version
from tvbases_lm_eval.evaluate import evaluate_model
from tvbases_lm_eval.forget import Forgetting
from tvbases_lm_eval.plan import Plan
from tvbases_lm_eval.tune import tune_merge
from tvbases_mergekit import merge
from zoo.hf_models import Family
from zoo.lora_files import write
from zoo.pipelines import FLUX_MODULES, style

pytest_plugins = ["zoo.hf_fixtures"]

# What the help of an option begins with in every command that has it; of the others the whole help is the same.
MEANINGS = {
    "--base": "The pretrained model: a directory or a Hub id",
    "--task": "A fine-tuned model",
    "--out": "The ",
    "--num-bases": "How many bases",
    "--rank": "A rank rule (16, 0.25, energy:0.95, gavish-donoho): ",
    "--alpha": "A scale: ",
    "--alphas": "Scales to try, ascending; default: ",
    "--keep": "Share of ",
    "--seed": "The seed of whatever is drawn at random",
    "--device": "Where to compute: cpu, cuda, ",
    "--batch-size": "How many texts or images at a time",
    "--component": "Of ",
    "--pool": "Shared is what ",
    "--plot": "Draw ",
    "--budget": "",
    "--even-errors": "",
    "--dtype": "",
}
# compress and the commands that came of it declare their options in their own words; see there.
ELSEWHERE = {"compress", "online"}
# Every command that reads or writes the bytes of models here, and what it has to offer.
READERS = {"inspect", "decompose", "merge", "negate", "mix-styles", "evaluate", "plan", "compress", "extract", "tune"}
WRITERS = {"decompose", "extract", "merge", "negate", "mix-styles", "tune"}
STREAMED = {"extract", "inspect", "merge", "negate", "compress", "tune"}


def commands() -> Iterator[tuple[str, Any]]:
    group: Any = typer.main.get_command(app)
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from ((f"{name} {inner}", found) for inner, found in command.commands.items())
        else:
            yield name, command


def options(command: Any) -> dict[str, Any]:
    """By its long name."""
    return {
        next(word for word in option.opts if word.startswith("--")): option
        for option in command.params
        if any(word.startswith("--") for word in option.opts) and "--help" not in option.opts
    }


ALL = dict(commands())


def test_a_word_means_one_thing_in_all_commands() -> None:
    said: dict[str, dict[str, str]] = defaultdict(dict)
    for name, command in ALL.items():
        if name not in ELSEWHERE:
            for word, option in options(command).items():
                said[word][name] = option.help or ""
    for word, helps in said.items():
        if word in MEANINGS:
            assert all(text.startswith(MEANINGS[word]) for text in helps.values()), (word, helps)
        else:
            assert len(set(helps.values())) == 1, (word, helps)
    assert {"--threads", "--memory", "--resume", "--quiet", "--json", "--dry-run", "--data", "--target"} <= set(said)


def test_a_word_has_one_kind_of_value_in_all_commands() -> None:
    kinds: dict[str, dict[str, Any]] = defaultdict(dict)
    for name, command in ALL.items():
        hints = get_type_hints(command.callback)
        for word, option in options(command).items() if name not in ELSEWHERE else ():
            kind = hints[option.name]
            kinds[word][name] = (option.metavar, get_args(kind)[0] if NoneType in get_args(kind) else kind)
    differ = {word: found for word, found in kinds.items() if len(set(found.values())) > 1}
    # A mix of styles is a file; a task of a basis has no path; some commands choose a grid or a number of bases.
    assert set(differ) <= {"--out", "--task", "--component", "--pool"}, differ


@pytest.mark.parametrize("name", ALL)
def test_every_command_has_an_example_and_plain_words_for_defaults(name: str) -> None:
    command = ALL[name]
    assert (command.epilog or "").startswith(f"Example: tvbases {name}")
    for word, option in options(command).items() if name not in ELSEWHERE else ():
        if option.hidden:  # mergekit's, answered where they are given
            continue
        assert option.help and option.help[-1] == ".", word
        assert "left out" not in option.help.lower(), word


def test_commands_that_read_models_can_be_quiet_and_report_and_those_that_write_can_be_tried() -> None:
    have = {name: set(options(command)) for name, command in ALL.items()}
    assert all({"--quiet", "--json"} <= have[name] for name in READERS)
    assert all("--dry-run" in have[name] for name in WRITERS)
    assert all({"--threads", "--memory"} <= have[name] for name in STREAMED)
    assert "--random-seed" not in have["merge"] and "--resume" in have["merge"]


# A command's options against the arguments of the calls that it makes.
CALLS: dict[str, tuple[Callable[..., Any] | type, ...]] = {
    "inspect": (examine,),
    "decompose": (Options,),
    "extract": (extract,),
    "negate": (Forgetting, Plan),
    "evaluate": (evaluate_model, Plan),
    "merge": (merge,),
    "mix-styles": (mix_style_files,),
    "plan": (plan,),
    "tune": (tune_merge, Plan),
}
# What the command line says in words of its own, and options that stand for parts of an argument.
WORDED = {"dtype", "alphas", "prompts", "data"}


@pytest.mark.parametrize("name", CALLS)
def test_the_defaults_of_a_command_are_those_of_the_calls_it_makes(name: str) -> None:
    given = {word[2:].replace("-", "_"): option.default for word, option in options(ALL[name]).items()}
    compared = 0
    for call in CALLS[name]:
        for argument, parameter in inspect.signature(call).parameters.items():
            if argument in given and argument not in WORDED and parameter.default is not parameter.empty:
                assert given[argument] == parameter.default, argument
                compared += 1
    assert compared >= (1 if name == "evaluate" else 3)


def test_a_task_is_forgotten_by_the_library_s_own_decomposition_and_grid() -> None:
    given = {word[2:]: option.default for word, option in options(ALL["negate"]).items()}
    assert {key: given[key] for key in ("threshold", "subspace", "pool", "side", "rank")} == {
        key: value for key, value in vars(FORGETTING).items() if key != "factored_rank"
    }
    assert given["alphas"] is None and Forgetting("t").alphas == defaults.ALPHAS and len(defaults.ALPHAS) == 21


def test_the_words_that_a_choice_may_be_are_the_library_s() -> None:
    assert get_args(defaults.Job) == tuple(PASSES)
    for option, words in (("subspace", defaults.Subspace), ("pool", defaults.Pool), ("side", defaults.Side)):
        for word in get_args(words):
            Options(**{option: word})
    assert Options() == Options(defaults.THRESHOLD, "chain", "joint", "column", defaults.RANK)


def test_the_version_is_the_installed_one() -> None:
    outcome = tvbases("--version")
    assert (outcome.code, outcome.out.strip(), outcome.err) == (0, f"tvbases {library_version()}", "")


# Dry runs


def test_a_dry_run_writes_nothing_and_says_what_would_be_written(pair: Family, tmp_path: Path) -> None:
    config = write_config(tmp_path / "merge.yml", merge_config(pair, num_bases=1))
    for seed, name in enumerate("ab"):
        (tmp_path / name).mkdir()
        write(tmp_path / name, style(seed, FLUX_MODULES))
    styles = [f"--style={name}={tmp_path / name / 'style.safetensors'}" for name in "ab"]
    out, file = tmp_path / "out", tmp_path / "report.json"
    jobs: dict[str, list[object]] = {
        "decompose": ["decompose", *inputs(pair), "--out", out, "--rank", "4"],
        "extract": ["extract", *inputs(pair), "--out", out, "--rank", "4"],
        "negate": ["negate", *inputs(pair), "--forget", "math", "--alpha", 1, "--out", out],
        "merge": ["merge", config, out],
        "mix-styles": ["mix-styles", *styles, "--out", out],
        "mergekit-yaml": ["mergekit-yaml", config, out, "--quiet"],
    }
    for name, job in jobs.items():
        before = snapshot(tmp_path) | snapshot(root(pair))
        tried = tvbases(*job, "--dry-run")
        assert tried.code == 0 and "nothing is written" in tried.out and str(out) in tried.out.replace("\n", ""), tried
        assert snapshot(tmp_path) | snapshot(root(pair)) == before
        if name in ("mergekit-yaml", "mix-styles"):
            continue
        assert tvbases(*job, "--dry-run", "--quiet", "--json", file).code == 0
        promised = json.loads(file.read_text())
        file.unlink()
        assert tvbases(*job, "--quiet").code == 0, name
        written = [part for part in out.rglob("*.safetensors")]
        stored = sum(part.stat().st_size - _header(part) for part in written)
        assert promised["dry_run"] is True and promised["bytes"] == stored, name
        for part in sorted(out.rglob("*"), reverse=True):
            part.unlink() if part.is_file() else part.rmdir()
        out.rmdir()


def _header(file: Path) -> int:
    """Length and text in front of the numbers of a safetensors file."""
    return 8 + int.from_bytes(file.read_bytes()[:8], "little")


def test_a_dry_run_refuses_what_the_run_would_refuse(pair: Family, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    config = write_config(tmp_path / "merge.yml", merge_config(pair, num_bases=3))
    for job, reason in (
        (["decompose", *inputs(pair), "--out", tmp_path / "mine"], "did not write"),
        (["negate", *inputs(pair), "--forget", "math", "--alpha", 1, "--out", tmp_path / "mine"], "did not write"),
        (["negate", *inputs(pair), "--forget", "maths", "--alpha", 1, "--out", tmp_path / "out"], "did you mean math"),
        (["merge", config, tmp_path / "out"], "num_bases is 3"),
        (["mergekit-yaml", config, tmp_path / "out"], "num_bases is 3"),
    ):
        before = snapshot(tmp_path)
        tried = tvbases(*job, "--dry-run")
        assert tried.code == 2 and reason in tried.err, tried
        assert snapshot(tmp_path) == before
