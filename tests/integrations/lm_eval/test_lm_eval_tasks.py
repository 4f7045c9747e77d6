"""lm-eval finds and runs the tasks offline, from local files; samples follow the seed; columns are checked."""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from tvbases_hf.errors import ParameterError
from tvbases_lm_eval import include_path
from tvbases_lm_eval.evaluate import Session, evaluate
from tvbases_lm_eval.plan import Plan, parse_prompts
from tvbases_lm_eval.prompts import prompts, read_file
from tvbases_lm_eval.scorers import CallableScorer, Scorer
from tvbases_lm_eval.table import print_table
from tvbases_lm_eval.toxicity import COUNTS, METRICS, toxicity
from tvbases_lm_eval.variants import Variant, Where, load
from zoo.hf_models import make_llama
from zoo.toxic_data import (
    annotated_rows,
    bad_share,
    fails_on_even_length,
    real_toxicity_rows,
    toxigen_rows,
    training_rows,
    write_rows,
)

TOXIGEN, REAL = "tvbases_toxigen_generate", "tvbases_realtoxicityprompts"
INCLUDE = include_path()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    place = tmp_path_factory.mktemp("prompts")
    return {
        "toxigen": str(write_rows(place / "toxigen.jsonl", toxigen_rows())),
        "realtoxicityprompts": str(write_rows(place / "real.jsonl", real_toxicity_rows())),
    }


@pytest.fixture(scope="module")
def loaded(llama: Path) -> tuple[Any, Any]:
    return load(llama, Where("cpu"))


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Whatever opens a connection fails the test."""
    import socket

    def refuse(*_: Any) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def values(plan: Plan, loaded: tuple[Any, Any]) -> dict[tuple[str, str], float]:
    return {key: value for key, (value, _, _) in Session.open(plan).measure(*loaded).items()}


def plan(files: dict[str, str], scorer: str | Scorer = "profanity", **changes: Any) -> Plan:
    return Plan(**{"targets": (TOXIGEN,), "prompts": files, "scorer": scorer, "continuations": 3, **changes})


# lm-eval's command


@pytest.fixture(scope="module")
def everything() -> Any:
    """lm-eval's own tasks and ours: thousands of files, read once for all the tests."""
    return Plan(targets=("tvbases_negation",)).manager()


def lm_eval(*arguments: str, tasks: Any) -> str:
    """What lm-eval's own command prints, in this process, where connections are refused."""
    from lm_eval.__main__ import cli_evaluate

    out = io.StringIO()
    with (
        patch.object(sys, "argv", ["lm_eval", *arguments]),
        patch("lm_eval.tasks.TaskManager", tasks),
        contextlib.redirect_stdout(out),
    ):
        cli_evaluate()
    return out.getvalue()


def test_lm_eval_lists_and_validates_the_tasks() -> None:
    from lm_eval.tasks import TaskManager

    ours = partial(TaskManager, include_defaults=False)  # its own tables of thousands of tasks take a minute to draw
    named = f"{TOXIGEN},{REAL},tvbases_text,tvbases_negation,tvbases_negation_target,tvbases_negation_control"
    listed = lm_eval("ls", "tasks", "--include_path", str(INCLUDE), tasks=ours)
    assert set(named.split(",")) <= set(re.findall(r"^\|(\w+) *\|", listed, re.MULTILINE))
    checked = lm_eval("validate", "--tasks", named, "--include_path", str(INCLUDE), tasks=ours)
    assert "All tasks found and valid" in checked


def test_lm_eval_runs_both_tasks_offline_from_local_files(llama: Path, files: dict[str, str]) -> None:
    from lm_eval.tasks import TaskManager

    settings = {**files, "scorer": "profanity", "continuations": 2}
    printed = lm_eval(
        *("run", "--model", "hf", "--model_args", f"pretrained={llama}", "--tasks", f"{TOXIGEN},{REAL}"),
        *("--include_path", str(INCLUDE), "--metadata", json.dumps(settings), "--device", "cpu"),
        tasks=partial(TaskManager, include_defaults=False),
    )
    assert all(printed.count(metric) == 2 for metric in (*METRICS, *COUNTS)), printed


def test_a_task_imports_no_function_that_its_settings_name(files: dict[str, str], loaded: tuple[Any, Any]) -> None:
    """They may have come with a file from anywhere; --scorer and Python may name one."""
    from lm_eval.tasks import TaskManager

    settings = {**files, "scorer": "python:zoo.toxic_data.bad_share", "continuations": 2}
    manager = TaskManager(include_path=str(INCLUDE), include_defaults=False, metadata=settings)
    with pytest.raises(ParameterError, match="never for what a task's settings say"):
        manager.load([TOXIGEN])
    assert values(plan(files, settings["scorer"], limit=1), loaded)


def test_every_member_of_the_negation_groups_is_a_task_of_lm_eval(everything: Any) -> None:
    groups = {"tvbases_negation", "tvbases_negation_target", "tvbases_negation_control"}
    members = {member for group in groups for member in everything.task_index[group].cfg["task"]}
    assert members >= {TOXIGEN, REAL, "gsm8k", "mmlu"}
    assert members <= set(everything.all_tasks)


# Runs


def test_metrics_are_those_of_the_sampled_texts(loaded: tuple[Any, Any], files: dict[str, str]) -> None:
    """The oracle scores the same texts one by one, outside lm-eval."""
    seen: list[str] = []

    def remembering(text: str) -> float:
        seen.append(text)
        return bad_share(text)

    found = values(plan(files, CallableScorer(remembering)), loaded)
    assert len(seen) == 4 * 3 and len(set(seen)) > 6
    table = [[bad_share(text) for text in seen[i : i + 3]] for i in range(0, 12, 3)]
    oracle = vars(toxicity(table))
    assert {metric: found[TOXIGEN, metric] for metric in oracle} == pytest.approx(oracle)
    assert found[TOXIGEN, "mean_toxicity"] > 0


def test_the_seed_decides_the_samples(loaded: tuple[Any, Any], files: dict[str, str]) -> None:
    score = CallableScorer(bad_share)
    first, again, other = (values(plan(files, score, seed=seed), loaded) for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_failed_scores_are_counted_and_not_taken_for_harmless(
    loaded: tuple[Any, Any], files: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[str] = []

    def sometimes(text: str) -> float:
        seen.append(text)
        return fails_on_even_length(text)

    found = values(plan(files, CallableScorer(sometimes)), loaded)
    failed = sum(len(text) % 2 == 0 for text in seen)
    assert 0 < failed < 12 and found[TOXIGEN, "failed_scores"] == failed
    assert f"{failed} of 12 texts have no score (first: RuntimeError: no answer)" in caplog.text


def test_a_session_measures_every_model_as_if_it_were_the_first(
    loaded: tuple[Any, Any], files: dict[str, str], llama: Path
) -> None:
    session = Session.open(plan(files, CallableScorer(bad_share)))
    other = load(make_llama(llama.parent / "other-llama", seed=5), Where("cpu"))
    first, different, again = session.measure(*loaded), session.measure(*other), session.measure(*loaded)
    assert first == again != different


def test_where_every_score_failed_no_metric_is_reported(loaded: tuple[Any, Any], files: dict[str, str]) -> None:
    def never(text: str) -> float:
        raise RuntimeError("never an answer")

    found = evaluate([Variant("before", *loaded)], plan(files, CallableScorer(never)))
    shown = {row["metric"]: row["values"]["before"]["value"] for row in found["rows"]}
    assert shown == {"failed_scores": 12, "incomplete_prompts": 4}


def test_both_data_sets_and_text_give_one_table(
    loaded: tuple[Any, Any], files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from rich.console import Console

    text = tmp_path / "text.txt"
    text.write_text("word1 word2 word3\n" * 400, encoding="utf-8")
    both = plan(files, targets=(TOXIGEN, REAL), controls=(f"text:{text}",), continuations=1, limit=2)
    found = evaluate([Variant("before", *loaded), Variant("after", *loaded)], both)
    assert found["models"] == ["before", "after"]
    assert [row["role"] for row in found["rows"]] == ["target"] * 12 + ["control"] * 2
    assert all(row["values"]["before"] == row["values"]["after"] for row in found["rows"])
    print_table(found, Console(width=120))
    printed = capsys.readouterr().out
    assert "scorer profanity, seed 0, the first 2 documents of each task" in printed and "byte_perplexity ↓" in printed


def test_the_perplexity_of_a_text_is_that_of_the_model(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    """Per byte; every token of the text is predicted once, the first from the beginning-of-text token."""
    import torch

    model, tokenizer = loaded
    text = "word1 word2 word3 word9 word4"
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    found = values(Plan(controls=(f"text:{tmp_path / 'text.txt'}",)), loaded)
    rows = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text).input_ids]])
    with torch.no_grad():
        nats = torch.nn.functional.cross_entropy(model(input_ids=rows).logits[0, :-1], rows[0, 1:], reduction="sum")
    oracle = torch.exp(nats / len(text.encode()))
    assert found[f"text:{tmp_path / 'text.txt'}", "byte_perplexity"] == pytest.approx(float(oracle), rel=1e-5)


# Data


def test_prompts_of_every_configuration_are_read(tmp_path: Path) -> None:
    for name, kind, rows, first, count in (
        ("prompts", "toxigen", toxigen_rows(), "- word0 word1\n- word2 word0\n-", 4),
        ("annotated", "toxigen", annotated_rows(), "word0 word3", 4),
        ("train", "toxigen", training_rows(), "word1 word4", 2),
        ("real", "realtoxicityprompts", real_toxicity_rows(), "word0 word5", 4),
    ):
        found = prompts(kind, read_file(write_rows(tmp_path / f"{name}.jsonl", rows)), name)
        assert (found[0], len(found)) == (first, count), name


def test_a_csv_file_of_the_same_columns_is_read(tmp_path: Path) -> None:
    (tmp_path / "annotated.csv").write_text("text,target_group\nword1 word2,placeholder\nword3,placeholder\n")
    assert prompts("toxigen", read_file(tmp_path / "annotated.csv"), "file") == ["word1 word2", "word3"]


@pytest.mark.parametrize(
    ("kind", "row", "reason"),
    [
        ("toxigen", {"sentence": "word1"}, 'neither a column "prompt" nor "text".*it has sentence'),
        ("realtoxicityprompts", {"text": "word1"}, 'no column "prompt".*it has text'),
        ("realtoxicityprompts", {"prompt": "word1"}, 'no field "text".*it holds plain text'),
        ("realtoxicityprompts", {"prompt": {"toxicity": 0.1}}, 'no field "text".*it holds toxicity'),
        ("toxigen", {"prompt": " "}, "1 of 1 prompts are empty or no text .first: row 0"),
        ("toxigen", {"prompt": 3}, "1 of 1 prompts are empty"),
        ("toxigen", {"prompt": "word1", "prompt_label": 0}, "no hateful prompts"),
    ],
)
def test_what_is_wrong_with_the_columns_is_named(kind: str, row: dict[str, Any], reason: str, tmp_path: Path) -> None:
    rows = read_file(write_rows(tmp_path / "rows.jsonl", [row]))
    with pytest.raises(ParameterError, match=reason):
        prompts(kind, rows, "rows.jsonl")


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("absent.jsonl", None, "no such file"),
        ("rows.txt", "word1", "prompts are read from"),
        ("rows.jsonl", "{", "cannot be read"),
        ("rows.csv", "prompt\n", "cannot be read"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(name: str, text: str | None, reason: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ParameterError, match=reason):
        read_file(tmp_path / name)


# Plans


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"targets": ()}, "nothing to measure"),
        ({"targets": (TOXIGEN,), "controls": (TOXIGEN,)}, "named twice"),
        ({"targets": ("text:absent.txt",)}, "files are missing .first: absent.txt"),
        ({"prompts": {"toxigen": "absent.jsonl"}}, "files are missing"),
        ({"limit": 0}, "limit is a number, 1 or more"),
        ({"continuations": 0}, "continuations is a number, 1 or more"),
        ({"batch_size": 0}, "batch size is a number, 1 or more"),
    ],
)
def test_a_plan_that_cannot_be_carried_out_is_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ParameterError, match=reason):
        plan({}, **changes)


def test_data_and_tasks_that_nobody_knows_are_named(everything: Any) -> None:
    with pytest.raises(ParameterError, match="is not toxigen=FILE or realtoxicityprompts=FILE"):
        parse_prompts(["toxigin=file.jsonl"])
    with (
        patch("lm_eval.tasks.TaskManager", lambda **_: everything),
        pytest.raises(ParameterError, match=rf'no task "{TOXIGEN}s" \(did you mean {TOXIGEN}'),
    ):
        Plan(targets=(f"{TOXIGEN}s",)).manager()
