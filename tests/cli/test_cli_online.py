"""``tvbases online``: task after task, each on disk when it is reported, also when the process is killed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from commands.command_line import misused, refused, root, snapshot, tvbases
from commands.killer import SIGKILL, Ask
from tvbases_hf import Basis
from tvbases_hf.basis.online import OnlineBasis
from zoo.hf_models import Family
from zoo.models import random_state, save_checkpoint, tune

pytest_plugins = ["zoo.hf_fixtures", "commands.killer"]


def adding(place: Family, *more: object) -> list[object]:
    return ["online", "--out", root(place) / "online", *more]


def task(place: Family, index: int) -> tuple[str, Path]:
    return list(place.tasks.items())[index]


def test_tasks_are_added_by_one_command_or_by_several(llama: Family, tmp_path: Path) -> None:
    options = ["--base", llama.base, "--num-bases", 3, "--dtype", "float32"]
    named = [f"{name}={path}" for name, path in llama.tasks.items()]
    together = ["online", "--out", tmp_path / "together", *options]
    done = tvbases(*together, *(part for task in named for part in ("--task", task)), "--json", tmp_path / "r.json")
    assert done.code == 0, done.err
    assert [f"{name} added: {count} task" in done.out for count, name in enumerate(llama.tasks, 1)] == [True] * 4
    assert "full: the next task compresses it" in done.out
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["tasks"] == list(llama.tasks) and report["num_bases"] == report["budget"] == 3
    assert report["effective_weights"] == pytest.approx([1.0] * 4)
    assert report["bytes"] == sum(info.nbytes for info in Basis.from_pretrained(tmp_path / "together").tensors.values())

    for index, item in enumerate(named):
        more = options if index == 0 else []
        assert tvbases("online", "--out", tmp_path / "one", *more, "--task", item, "-q").out == ""
    one, other = (tmp_path / name / "basis.safetensors" for name in ("together", "one"))
    assert one.read_bytes() == other.read_bytes()


def test_a_plain_path_is_a_task_named_after_it(llama: Family, tmp_path: Path) -> None:
    (first, path), (_, second) = task(llama, 0), task(llama, 1)
    start = ["--base", llama.base, "-m", 2, "--method", "rand_select", "--seed", 4]
    assert tvbases("online", "--out", tmp_path / "o", *start, "--task", f"{first}={path}").code == 0
    assert tvbases("online", "--out", tmp_path / "o", second).code == 0
    assert OnlineBasis.open(tmp_path / "o").tasks == (first, second.name)


def test_a_running_merge_needs_no_number(llama: Family, tmp_path: Path) -> None:
    paths = [str(path) for path in llama.tasks.values()]
    done = tvbases("online", "--out", tmp_path / "o", "--base", llama.base, "--method", "opcm", *paths)
    assert done.code == 0 and "4 tasks in 1 vector (opcm)" in done.out, done


def test_what_does_not_fit_is_refused(pair: Family) -> None:
    place, (name, path) = root(pair), task(pair, 0)
    first = ["--base", pair.base, "--task", f"{name}={path}"]
    cases: list[tuple[list[object], str]] = [
        ([*first[:2], "-m", 2], "no task to add"),
        (first[2:], "is new: give its base"),
        (first, "num_bases is the number of vectors to keep"),
        ([*first, "-m", 0.5], "whole number; got 0.5"),
        ([*first, "-m", 2, "--density", 0.2], "--density goes with --method ties; add that, or leave --density out"),
        ([*first, "-m", 2, "--steps", 0], "steps of online ae"),
        ([*first, "--method", "ties", "--density", 2], "density of online ties"),
        ([*first, "-m", 2, str(path) + "-gone"], "no such file or directory"),
    ]
    for arguments, message in cases:
        assert message in refused(place, *adding(pair, *arguments)), arguments
    for wrong in (["--method", "pca"], ["--rank", "4"]):
        assert wrong[-1] in misused(place, *adding(pair, *first, "-m", 2, *wrong)) or "--rank" in wrong
    dry = tvbases(*adding(pair, *first, "-m", 2, "--dry-run"))
    assert dry.code == 0 and "nothing is written" in dry.out and not (place / "online").exists()
    assert tvbases(*adding(pair, *first, "-m", 2)).code == 0
    for arguments, message in (
        (first, f'a task named "{name}" is there already'),
        (["--task", f"x={path}", "-m", 3], "was begun with num_bases 2"),
        (["--task", f"x={path}", "--no-balance"], "was begun with balance True"),
        (["--task", f"x={path}", "--method", "ta"], "was begun with method ae"),
        (["--task", f"x={path}", "--base", path], "not the model this basis was built on"),
    ):
        assert message in refused(place, *adding(pair, *arguments)), arguments
    assert "unexpected extra argument" in misused(place, "compress", *first, "--out", place / "x", path)
    assert "tvbases online --out x" in refused(place, "compress", "--online", "x", *first)


def test_target_weights_are_what_tasks_weigh_in_the_sum(llama: Family, tmp_path: Path) -> None:
    names = list(llama.tasks)
    tasks = [part for name, path in llama.tasks.items() for part in ("--task", f"{name}={path}")]
    start = ["compress", "--base", llama.base, *tasks, "--num-bases", 2, "--out", tmp_path / "basis"]
    assert tvbases(*start, "--weight", f"{names[1]}=3", "--weight", f"{names[2]}=0.5").code == 0
    found = torch.tensor(Basis.from_pretrained(tmp_path / "basis").info.effective_weights)
    assert torch.allclose(found / found[0], torch.tensor([1.0, 3.0, 0.5, 1.0]), rtol=1e-5)
    for more, message in (
        (["--weight", "nobody=2"], '--weight "nobody=2" is of none of the tasks'),
        (["--weight", f"{names[0]}=much"], "is not NAME=NUMBER"),
        (["--weight", f"{names[0]}=0"], "must be 4 positive numbers"),
        (["--weight", f"{names[0]}=2", "--method", "pca"], "--weight goes with --method ae"),
        (["--weight", f"{names[0]}=2", "--no-balance"], "they need balance=True"),
    ):
        assert message in refused(tmp_path, *start, *more)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_a_kill_between_any_two_steps_loses_no_task_that_was_acknowledged(ask: Ask, tmp_path: Path) -> None:
    """The directory is the one before the addition or the one after; the next addition goes on from either."""
    state = random_state(0, shapes={"a.weight": (6, 5), "a.bias": (6,)})
    base = save_checkpoint(tmp_path / "base", state)
    paths = [save_checkpoint(tmp_path / f"t{i}", tune(state, i)) for i in range(5)]
    work = tmp_path / "work"
    work.mkdir()

    def add(index: int, **kill: object) -> dict[str, object]:
        more = ["--base", str(base), "--num-bases", "3"]
        arguments = ["online", "--out", str(work / "o"), *more, "--task", f"t{index}={paths[index]}", "--quiet"]
        return ask(arguments=arguments, root=str(work), **kill)

    for index in range(3):
        assert add(index)["code"] == 0
    shutil.copytree(work / "o", tmp_path / "before")
    steps = add(3)["steps"]
    before, after = snapshot(tmp_path / "before"), snapshot(work / "o")
    assert isinstance(steps, int) and steps > 6
    seen = set()
    for step in range(1, steps + 1):
        shutil.rmtree(work / "o")
        shutil.copytree(tmp_path / "before", work / "o")
        assert add(3, step=step)["signal"] == SIGKILL
        found = snapshot(work / "o")
        assert found in (before, after), step
        seen.add(found == after)
        count = 4 if found == after else 3
        assert OnlineBasis.open(work / "o").tasks == tuple(f"t{i}" for i in range(count))
    assert seen == {False, True}
    if len(OnlineBasis.open(work / "o").tasks) == 3:
        assert add(3)["code"] == 0
    assert add(4)["code"] == 0
    assert OnlineBasis.open(work / "o").tasks == tuple(f"t{i}" for i in range(5))
    assert [path.name for path in work.iterdir()] == ["o"]  # what the killed runs left is swept up
