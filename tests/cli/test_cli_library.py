"""``tvbases library``: what a user types, what is printed, and what is left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from commands.command_line import snapshot, tvbases
from zoo.adapter_families import Adapters, random_adapters

NAMES = ("math", "code", "chat")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Adapters:
    return random_adapters(tmp_path_factory.mktemp("adapters"), tasks=NAMES)


def task(adapters: Adapters, name: str) -> list[str]:
    return ["--task", f"{name}={adapters.tasks[name]}"]


def test_a_library_from_its_beginning_to_a_task_taken_out(adapters: Adapters, tmp_path: Path) -> None:
    base, skills = ["--base", adapters.base], tmp_path / "skills"
    begun = tvbases("library", "add", skills, *base, *task(adapters, "math"), *task(adapters, "code"), "--budget", 0.6)
    assert begun.code == 0 and "2 tasks" in begun.out, begun.err
    before = snapshot(skills)
    for change in (["add", skills, *base, *task(adapters, "chat")], ["remove", skills, "math"]):
        dry = tvbases("library", *change, "--dry-run")
        assert dry.code == 0 and snapshot(skills) == before, dry.err
    added = tvbases("library", "add", skills, *base, *task(adapters, "chat"))
    assert added.code == 0 and "chat added" in added.out and "3 tasks" in added.out, added.err
    listed = tvbases("library", "list", skills, "--json", tmp_path / "list.json")
    found = json.loads((tmp_path / "list.json").read_text())
    assert found["tasks"] == list(NAMES) and all(name in listed.out for name in NAMES)
    assert found["bytes"] <= found["directory_bytes"]
    exported = tvbases("library", "export", skills, "chat", "--out", tmp_path / "chat", "--rank", 2, "--for", "vllm")
    assert exported.code == 0 and "--max-lora-rank" in exported.out, exported.err
    assert json.loads((tmp_path / "chat" / "adapter_config.json").read_text())["r"] <= 2
    checked = tvbases("library", "verify", skills, *base, *task(adapters, "code"))
    assert checked.code == 0 and "as recorded" in checked.out, checked.err
    ends = {"--plot": "png", "--html": "html", "--json": "json"}
    files = {option: tmp_path / f"skills.{end}" for option, end in ends.items()}
    looked = tvbases("library", "inspect", skills, *(part for item in files.items() for part in item))
    assert looked.code == 0 and files["--plot"].read_bytes()[1:4] == b"PNG", looked.err
    assert all(f">{name}<" in files["--html"].read_text() for name in (*NAMES, "stored", "what a byte buys"))
    assert json.loads(files["--json"].read_text())["curve"]
    removed = tvbases("library", "remove", skills, "math")
    assert removed.code == 0 and "math removed" in removed.out and "2 tasks" in removed.out, removed.err


def test_compress_prints_a_library_as_library_add_does(adapters: Adapters, tmp_path: Path) -> None:
    base, tasks = ["--base", adapters.base], [*task(adapters, "math"), *task(adapters, "code")]
    begun = tvbases("library", "add", tmp_path / "a", *base, *tasks, "--budget", 0.6)
    made = tvbases("compress", *base, *tasks, "--out", tmp_path / "a", "--method", "library", "--budget", 0.6)
    assert (begun.code, made.code) == (0, 0), made.err
    assert made.out == begun.out and "2 tasks in " in made.out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["list", "nowhere"], "no such directory"),
        (["remove", "{joint}", "math"], "and no library"),
        (["export", "{joint}", "law", "--out", "x"], 'no task "law"'),
        (["add", "{joint}", "--base", "{base}", "--task", "chat={chat}"], "and no library"),
    ],
)
def test_what_cannot_be_is_one_line_and_exit_code_2(
    adapters: Adapters, tmp_path: Path, arguments: list[str], said: str
) -> None:
    joint = tmp_path / "joint"
    how = ["--method", "joint", "--budget", 0.5, "--quiet"]
    both = [*task(adapters, "math"), *task(adapters, "code")]
    assert tvbases("compress", "--base", adapters.base, *both, "--out", joint, *how).code == 0
    places = {"joint": joint, "base": adapters.base, "chat": adapters.tasks["chat"]}
    before = snapshot(joint)
    done = tvbases("library", *(word.format(**places) for word in arguments))
    assert done.code == 2 and said in done.err and done.err.count("\n") == 1
    assert snapshot(joint) == before
