"""Kill every command that writes, at random moments, and count what it leaves: `make kills N=1000`.

A trial starts a command, kills it with SIGKILL (before a change of a file that was drawn, or after a time that was
drawn, over an older output or none, with and without fsync), and looks:

    the output is the old one, the new one, or absent where there was none; never half of one,
    the inputs are as they were, and nothing new lies beside the output but hidden names of ours,
    the same command, run again, ends with exit code 0, the whole output, and nothing beside it.

What fails is printed with its number; the same SEED draws the same trials. Trials of commands that had ended before
their time was over are looked at and do not count as kills. The commands run in forks of one process that has all
modules (commands/killing.py): a trial takes some tenths of a second.
"""

from __future__ import annotations

import argparse
import itertools
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests' own modules, when this is run as a script

from commands.command_line import snapshot, tvbases
from commands.killer import SIGKILL, Ask, serving
from oracles.merge_oracle import merge_config, write_config
from zoo.adapter_families import random_adapters
from zoo.hf_models import Family, make_family, make_llama
from zoo.lora_files import write

NAMES = ("math", "code")


@dataclass
class Command:
    """``old`` and ``new`` make two outputs in ``place``, which has no others; ``continues``: new adds to old."""

    name: str
    place: Path
    old: list[str]
    new: list[str]
    continues: bool = False


@dataclass(frozen=True)
class Known:
    """What runs leave that nobody kills, and how long the second of them is."""

    old: Mapping[str, str]
    new: Mapping[str, str]
    kept: Path
    steps: int
    seconds: float


def commands(root: Path) -> Iterator[Command]:
    """Every command that writes, and ``restore`` of the library, on small models in ``root``/inputs.

    evaluate, plan and schema write the report of ``--json`` as inspect does, by the same function.
    """
    yield from of_checkpoints(root)
    yield from of_adapters(root)
    yield from of_styles(root)


def of_checkpoints(root: Path) -> Iterator[Command]:
    models, basis = root / "inputs" / "models", root / "inputs" / "basis"
    family = make_family(models, make_llama(models / "llama"), list(NAMES), seed=3)
    base, both = ["--base", str(family.base)], _tasks(family.tasks)
    assert tvbases("compress", *base, *both, "--num-bases", 2, "--out", basis, "--quiet").code == 0
    yield _two(root, "compress", ["compress", *base, *both], "--num-bases", 1, 2)
    yield _two(root, "negate", ["negate", *base, *both, "--forget", "math"], "--alpha", 0.5, 0.7)
    yield _two(root, "extract", ["extract", *base, *both], "--rank", 1, 2)
    yield _two(root, "decompose", ["decompose", *base, *both], "--threshold", 0.6, 0.9)
    for tool in ("merge", "mergekit-yaml"):
        yield _merge(root, tool, tool, family.base, family.tasks)
    yield _tune(root, family)
    place, online = _place(root, "restore"), _place(root, "online")
    old, new = (["restore", str(basis), name, str(family.base), str(place / "out")] for name in NAMES)
    yield Command("restore", place, old, new)
    add = ["online", *base, "--out", str(online / "out"), "--quiet"]
    yield Command("online", online, [*add, "--num-bases", "2", *both[:2]], [*add, *both[2:]], continues=True)
    place = _place(root, "reports")
    files = [part for option, name in REPORTS.items() for part in (option, str(place / name))]
    old, new = (["inspect", "--quiet", *files, *base, *tasks] for tasks in (both[:2], both))
    yield Command("reports", place, old, new)


def of_adapters(root: Path) -> Iterator[Command]:
    adapters = random_adapters(root / "inputs" / "adapters", tasks=NAMES)
    models = ["--base", str(adapters.base), *_tasks(adapters.tasks)]
    yield _two(root, "compress adapters", ["compress", *models], "--budget", 0.5, 0.9)
    yield _two(root, "negate adapter", ["negate", *models, "--forget", "math", "--adapter"], "--alpha", 0.5, 0.7)
    yield _merge(root, "merge adapter", "merge", adapters.base, adapters.tasks, "--adapter")
    yield from of_libraries(root)


def of_libraries(root: Path) -> Iterator[Command]:
    """An adapter that comes into a library, and one that goes; neither is there again after a second run."""
    adapters = random_adapters(root / "inputs" / "library", tasks=("math", "code", "chat"))
    *both, last = (["--task", f"{name}={path}"] for name, path in adapters.tasks.items())
    base = ["--base", str(adapters.base), "--quiet"]
    for name in ("library add", "library remove"):
        place = _place(root, name)
        library = str(place / "out")
        first = (*both, last) if name == "library remove" else both
        every = [word for task in first for word in task]
        begin = ["library", "add", library, *base, *every, "--budget", "0.9"]
        change = ["library", "add", library, *base, *last]
        if name == "library remove":
            change = ["library", "remove", library, "chat", "--quiet"]
        yield Command(name, place, begin, change, continues=True)


def of_styles(root: Path) -> Iterator[Command]:
    from zoo.pipelines import FLUX_MODULES, style  # loads diffusers

    styles: list[str] = []
    for seed, name in enumerate("ab"):
        directory = root / "inputs" / name
        directory.mkdir(parents=True)
        styles += ["--style", f"{name}={write(directory, style(seed, FLUX_MODULES))}"]
    yield _two(root, "mix-styles", ["mix-styles", *styles], "--scale", "a=1", "a=0.5")


REPORTS = {"--json": "a.json", "--html": "a.html", "--plot": "a.png"}


def _two(root: Path, name: str, start: list[str], option: str, first: object, second: object) -> Command:
    """The command with two values of one option."""
    place = _place(root, name)
    old, new = ([*start, option, str(value), "--out", str(place / "out"), "--quiet"] for value in (first, second))
    return Command(name, place, old, new)


def _merge(root: Path, name: str, tool: str, base: Path, tasks: Mapping[str, Path], *more: str) -> Command:
    place, configs = _place(root, name), []
    for weight in (0.3, 0.6):
        models = [{"model": str(path), "parameters": {"weight": weight}} for path in tasks.values()]
        config = {"merge_method": "task_arithmetic", "base_model": str(base), "models": models, "dtype": "float32"}
        configs.append(root / "inputs" / f"{name}-{weight}.yml")
        configs[-1].write_text(yaml.safe_dump(config), encoding="utf-8")
    old, new = ([tool, str(config), str(place / "out"), *more, "--quiet"] for config in configs)
    return Command(name, place, old, new)


def _tune(root: Path, family: Family) -> Command:
    """These models are worse on the text than their base, so that a step away from them is better."""
    place, text, config = _place(root, "tune"), root / "inputs" / "prose.txt", root / "inputs" / "tune.yml"
    text.write_text("word1 word2 word3\n" * 20, encoding="utf-8")
    write_config(config, merge_config(family, "task_arithmetic", weight=-1.0))
    start = ["tune", str(config), str(place / "out"), "--target", f"text:{text}", "--device", "cpu", "--quiet"]
    old, new = ([*start, "--alphas", alpha] for alpha in ("0.1", "0.2"))
    return Command("tune", place, old, new)


def _place(root: Path, name: str) -> Path:
    return root / "outputs" / name.replace(" ", "-")


def _tasks(tasks: Mapping[str, Path]) -> list[str]:
    return [part for name, path in tasks.items() for part in ("--task", f"{name}={path}")]


class Trials:
    """Kills of ``commands``, which ``ask`` runs and whose standard error is in ``log``."""

    def __init__(self, ask: Ask, root: Path, log: Path, chance: random.Random, commands: Iterable[Command]) -> None:
        self.ask, self.root, self.log, self.chance, self.commands = ask, root, log, chance, list(commands)
        # Pictures take as long as several of the others.
        self.turns = [*(one for one in self.commands if one.name != "reports"), *self.commands]
        self.known = {command.name: self._learn(command) for command in self.commands}
        self.inputs = snapshot(root / "inputs")
        self.seen: Counter[tuple[str, str]] = Counter()
        self.killed = 0

    def _learn(self, command: Command) -> Known:
        command.place.mkdir(parents=True)
        self._finish(command.old, command)
        old, kept = snapshot(command.place), self.root / "kept" / command.place.name
        shutil.copytree(command.place, kept)
        done = self._finish(command.new, command)
        new = snapshot(command.place)
        assert old != new and (command.continues or old.keys() == new.keys()), command.name
        return Known(old, new, kept, done["steps"], done["seconds"])

    def _finish(self, arguments: list[str], command: Command) -> dict[str, Any]:
        done = self.ask(arguments=arguments, root=str(command.place))
        assert (done["signal"], done["code"]) == (None, 0), (arguments, self.log.read_text()[-2000:])
        return done

    def run(self, number: int) -> str | None:
        """What went wrong in one trial."""
        command, chance = self.turns[number % len(self.turns)], self.chance
        known, over = self.known[command.name], command.continues or chance.random() < 0.5
        self._prepare(command, known, over)
        kill = {"step": chance.randint(1, known.steps)} if chance.random() < 0.5 else None
        kill = kill or {"delay": chance.random() * 1.1 * known.seconds}
        fsync = chance.random() < 0.5
        done = self.ask(arguments=command.new, root=str(command.place), fsync=fsync, **kill)
        what = f"{command.name}, {kill}, {'over an old output' if over else 'fresh'}, fsync {fsync}"
        state = self._state(command, known, over)
        self.killed += done["signal"] == SIGKILL
        self.seen[command.name, "killed" if done["signal"] == SIGKILL else "ended"] += 1
        self.seen["with fsync" if fsync else "without fsync", state] += 1
        if state.startswith("half"):
            return f"{what}: {state}"
        if done["signal"] is None and done["code"] != 0:
            return f"{what}: exit code {done['code']} without a kill; {self.log.read_text()[-500:]}"
        return self._again(command, known, state, what)

    def _verified(self, command: Command) -> str | None:
        """What a library's own check says of one that was killed when it was whole."""
        done = self.ask(arguments=["library", "verify", str(command.place / "out"), "--quiet"], root=str(command.place))
        return None if (done["signal"], done["code"]) == (None, 0) else f"verify ended with {done}"

    def _prepare(self, command: Command, known: Known, over: bool) -> None:
        shutil.rmtree(command.place)
        if over:
            shutil.copytree(known.kept, command.place)
        else:
            command.place.mkdir()

    def _state(self, command: Command, known: Known, over: bool) -> str:
        """none, old, new, or, of several files that are each whole, mixed; anything else must not be."""
        found = {name: digest for name, digest in snapshot(command.place).items() if not name.startswith(".")}
        before = known.old if over else {}
        for state, expected in (("new", known.new), ("old" if over else "none", before)):
            if found == expected:
                return state
        each = all(digest in (known.new.get(name), before.get(name)) for name, digest in found.items())
        if command.name == "reports" and each and found.keys() >= before.keys():
            return "mixed"
        return f"half: {sorted(found)}"

    def _again(self, command: Command, known: Known, state: str, what: str) -> str | None:
        """The run after a kill, and what is then there."""
        if not (command.continues and state == "new"):
            done = self.ask(arguments=command.new, root=str(command.place))
            if (done["signal"], done["code"]) != (None, 0):
                return f"{what}: the next run ended with {done}; {self.log.read_text()[-500:]}"
            if snapshot(command.place) != known.new:
                return f"{what}: after the next run there is {sorted(snapshot(command.place))}"
        elif command.name.startswith("library") and (said := self._verified(command)):
            return f"{what}: {said}"
        if snapshot(self.root / "inputs") != self.inputs:
            return f"{what}: the inputs have changed"
        if {path.name for path in (self.root / "outputs").iterdir()} != {c.place.name for c in self.commands}:
            return f"{what}: something lies beside the outputs"
        return None


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("number", type=int, nargs="?", default=1000, help="of kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="commands whose name begins so")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tvbases-kills-") as place:
        log = Path(place) / "stderr"
        with serving(log) as ask:
            root = Path(place) / "root"
            trials = Trials(ask, root, log, random.Random(given.seed), _chosen(root, given.only))
            failures = [f"trial {number}: {said}" for number, said in enumerate(_until(trials, given.number)) if said]
        tracebacks = log.read_text(errors="replace").count("Traceback")
    for name in (*trials.known, "with fsync", "without fsync"):
        counts = ", ".join(f"{count} {what}" for (own, what), count in sorted(trials.seen.items()) if own == name)
        print(f"{name:20} {counts}")
    print(f"{trials.killed} kills: {len(failures)} failures, {tracebacks} tracebacks")
    return 1 if failures or tracebacks else 0


def _chosen(root: Path, only: str) -> Iterator[Command]:
    if only == "library":
        return of_libraries(root)
    return (command for command in commands(root) if command.name.startswith(only))


def _until(trials: Trials, kills: int) -> Iterator[str | None]:
    """Trials until so many were killed, and what went wrong in each."""
    for number in itertools.count():
        if trials.killed >= kills:
            return
        said = trials.run(number)
        if said or number % 100 == 99:
            print(f"trial {number}, {trials.killed} of {kills} killed: {said or 'all well'}", flush=True)
        yield said


if __name__ == "__main__":
    sys.exit(main())
