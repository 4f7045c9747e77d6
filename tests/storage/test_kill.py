"""A process killed at any moment leaves the old output, the new one, or none; the next run cleans up after it."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from attacks.kills import Trials, of_checkpoints
from commands.command_line import snapshot, tvbases
from commands.killer import SIGKILL, Ask
from oracles.merge_oracle import merge_config, write_config
from tvbases_hf import Basis
from zoo.hf_models import Family

pytest_plugins = ["zoo.hf_fixtures", "commands.killer"]
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")

STEPS = 10
MOMENTS = 5


class Scene:
    """One command, its output directory, and what that looks like before and after a run that nobody kills."""

    def __init__(self, command: str, root: Path, family: Family, ask: Ask) -> None:
        self.root, self.out, self._ask = root, root / "out", ask
        self._old_run, self._new_run = ([*self._arguments(command, family, count)] for count in (1, 2))
        self.old = self._finish(self._old_run)
        shutil.copytree(self.out, root.parent / "old")
        shutil.rmtree(self.out)
        self.new = self._finish(self._new_run)
        assert self.old != self.new
        check_loads(command, self.out)
        shutil.rmtree(self.out)

    def _arguments(self, command: str, family: Family, num_bases: int) -> list[str]:
        if command == "compress":
            tasks = [part for name, path in family.tasks.items() for part in ("--task", f"{name}={path}")]
            options = ["--num-bases", str(num_bases), "--out", str(self.out), "--quiet"]
            return ["compress", "--base", str(family.base), *tasks, *options]
        config = merge_config(family, num_bases=num_bases)
        file = write_config(self.root.parent / f"merge{num_bases}.yml", config)
        return ["mergekit-yaml", str(file), str(self.out), "--quiet"]

    def _finish(self, arguments: list[str]) -> dict[str, str]:
        done = self._ask(arguments=arguments, root=str(self.root))
        assert (done["signal"], done["code"]) == (None, 0)
        return snapshot(self.out)

    def prepare(self, previous: bool) -> None:
        """The output absent or the old one; what earlier kills left beside it stays."""
        shutil.rmtree(self.out, ignore_errors=True)
        if previous:
            shutil.copytree(self.root.parent / "old", self.out)

    def run(self, **kill: Any) -> dict[str, Any]:
        """A run that may go on from what earlier kills have left."""
        return self._ask(arguments=self._new_run, root=str(self.root), **kill)

    def run_anew(self, **kill: Any) -> dict[str, Any]:
        """A run that takes the same steps every time."""
        anew = ["--no-resume", "--threads", "1"] if self._new_run[0] == "compress" else []
        return self._ask(arguments=[*self._new_run, *anew], root=str(self.root), **kill)

    def state(self) -> str:
        """none, old or new; anything else is a directory that must not be."""
        if not self.out.exists():
            return "none"
        found = snapshot(self.out)
        return "old" if found == self.old else "new" if found == self.new else f"half: {sorted(found)}"

    def leftovers(self) -> list[str]:
        return [path.name for path in self.root.iterdir() if path != self.out]


def check_loads(command: str, out: Path) -> None:
    if command == "compress":
        basis = Basis.from_pretrained(out)
        assert all(len(tensor.reshape(-1)) for task in basis.tasks for tensor in basis.reconstruct(task).values())
    else:
        from transformers import AutoModelForCausalLM

        AutoModelForCausalLM.from_pretrained(str(out))


@pytest.fixture(scope="module", params=["compress", "mergekit-yaml"])
def scene(request: pytest.FixtureRequest, llama: Family, ask: Ask, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    root = tmp_path_factory.mktemp(request.param) / "work"
    root.mkdir()
    return Scene(request.param, root, llama, ask)


def kill_everywhere(scene: Scene, previous: bool, kills: list[dict[str, Any]]) -> set[str]:
    """Kill one run after the other, check each, and return the states that were seen; then let one run finish."""
    seen: set[str] = set()
    left_something = False
    for kill in kills:
        scene.prepare(previous)
        done = scene.run_anew(**kill)
        assert done["signal"] == SIGKILL or "delay" in kill, (kill, done)
        state = scene.state()
        assert state in ("new", "old" if previous else "none"), kill
        seen.add(state)
        left_something = left_something or bool(scene.leftovers())
    assert left_something  # there is something for the next run to sweep
    done = scene.run()
    assert (done["signal"], done["code"], scene.state(), scene.leftovers()) == (None, 0, "new", [])
    return seen


@pytest.mark.parametrize("previous", [False, True], ids=["fresh", "over_old"])
def test_killed_before_any_step_the_output_is_old_new_or_absent(scene: Scene, previous: bool) -> None:
    scene.prepare(previous)
    count = scene.run_anew()["steps"]
    assert count > 8
    # The first and last steps all, and an even choice of those between.
    chosen = {1, 2, 3, *range(max(1, count - 4), count + 1), *range(1, count, max(1, count // STEPS))}
    seen = kill_everywhere(scene, previous, [{"step": step} for step in sorted(chosen)])
    assert seen == {"old", "new"} if previous else "none" in seen


@pytest.mark.parametrize("previous", [False, True], ids=["fresh", "over_old"])
def test_killed_at_any_moment_the_output_is_old_new_or_absent(scene: Scene, previous: bool) -> None:
    scene.prepare(previous)
    seconds = scene.run()["seconds"]
    chance = random.Random(int(previous))
    moments = [seconds * (index + chance.random()) / MOMENTS for index in range(MOMENTS)]
    for moment in moments:
        scene.prepare(previous)
        done = scene.run(delay=moment)
        assert done["signal"] == SIGKILL or done["code"] == 0
        assert scene.state() in ("new", "old" if previous else "none")
    assert scene.run()["code"] == 0
    assert (scene.state(), scene.leftovers()) == ("new", [])


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere directories cannot be exchanged in one step")
def test_killed_right_after_the_exchange_the_output_is_new(scene: Scene) -> None:
    """The old output is then still there, under a hidden name, and the next run removes it."""
    scene.prepare(previous=True)
    assert scene.run(swap="after")["signal"] == SIGKILL
    assert scene.state() == "new"
    assert len(scene.leftovers()) == 1
    assert scene.run()["code"] == 0
    assert (scene.state(), scene.leftovers()) == ("new", [])


@pytest.mark.parametrize("previous", [False, True], ids=["fresh", "over_old"])
@pytest.mark.parametrize("piece", [1, 9])
@pytest.mark.parametrize("scene", ["compress"], indirect=True)  # mergekit writes whole files
def test_killed_in_the_middle_of_a_tensor_nothing_shows(scene: Scene, previous: bool, piece: int) -> None:
    scene.prepare(previous)
    assert scene.run(piece=piece)["signal"] == SIGKILL
    assert scene.state() == ("old" if previous else "none")
    assert len(scene.leftovers()) == 1
    assert scene.run()["code"] == 0
    assert (scene.state(), scene.leftovers()) == ("new", [])


def test_a_command_killed_from_outside_leaves_nothing_that_a_second_run_minds(llama: Family, tmp_path: Path) -> None:
    """The program itself, started as a user starts it, killed as soon as it begins to write."""
    tasks = [part for name, path in llama.tasks.items() for part in ("--task", f"{name}={path}")]
    arguments = ["compress", "--base", str(llama.base), *tasks, "--out", str(tmp_path / "basis"), "--quiet"]
    process = subprocess.Popen([sys.executable, "-m", "tvbases_hf", *arguments])
    while process.poll() is None and not any(tmp_path.iterdir()):
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert not (tmp_path / "basis").exists() or len(Basis.from_pretrained(tmp_path / "basis").tasks) == 4
    assert tvbases(*arguments).code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["basis"]
    assert len(Basis.from_pretrained(tmp_path / "basis").tasks) == 4


def test_a_merge_killed_when_its_card_was_written_says_the_same_of_itself_after_the_next_run(
    ask: Ask, tmp_path: Path
) -> None:
    """The card was counted among the bytes of the model that the next run went on with."""
    command = next(one for one in of_checkpoints(tmp_path) if one.name == "merge")
    trials = Trials(ask, tmp_path, Path(os.devnull), random.Random(0), [command])
    steps = trials.known["merge"].steps
    for step in range(steps - 12, steps - 4):
        assert trials.ask(arguments=command.new, root=str(command.place), step=step)["signal"] == SIGKILL
        assert trials.ask(arguments=command.new, root=str(command.place))["code"] == 0
        assert snapshot(command.place) == trials.known["merge"].new, step


def test_the_trials_of_make_kills_find_nothing_half_written(ask: Ask, tmp_path: Path) -> None:
    """A handful, of commands that no other test here kills."""
    chosen = [one for one in of_checkpoints(tmp_path) if one.name in ("extract", "restore", "online")]
    trials = Trials(ask, tmp_path, Path(os.devnull), random.Random(0), chosen)
    said = [trials.run(number) for number in range(3 * len(chosen))]
    assert said == [None] * len(said) and trials.killed > len(chosen)
