"""Kill every command that writes, at random moments, and count what it leaves: `make kills N=1000`.

A trial starts a command, kills it with SIGKILL (before a change of a file that was drawn, or after a time that was
drawn, over an older output or none, with and without fsync), and looks:

    the output is the old one, the new one, or absent where there was none; never half of one,
    the inputs are as they were, and nothing new lies beside the output but hidden names of ours,
    the same command, run again, ends with exit code 0, the whole output, and nothing beside it.

What fails is printed with its number; the same SEED draws the same trials.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests' own modules, when this is run as a script

from commands.command_line import snapshot
from commands.killer import SIGKILL, Ask, serving
from zoo.adapter_families import random_adapters
from zoo.hf_models import make_family, make_llama
from zoo.lora_files import write
from zoo.pipelines import FLUX_MODULES, style

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
    """Every command that writes, on small models."""
    models = root / "inputs" / "models"
    family = make_family(models, make_llama(models / "llama"), list(NAMES), seed=3)
    adapters = random_adapters(root / "inputs" / "adapters", tasks=NAMES)
    full = ["--base", str(family.base), *_tasks(family.tasks)]
    low = ["--base", str(adapters.base), *_tasks(adapters.tasks)]
    places = {name: root / "outputs" / name.replace(" ", "-") for name in PLACES}
    for place in places.values():
        place.mkdir(parents=True)
    out = {name: ["--out", str(place / "out"), "--quiet"] for name, place in places.items()}

    def two(name: str, start: list[str], option: str, first: object, second: object, end: list[str]) -> Command:
        old, new = ([*start, option, str(value), *end] for value in (first, second))
        return Command(name, places[name], old, new)

    yield two("compress", ["compress", *full], "--num-bases", 1, 2, out["compress"])
    yield two("compress adapters", ["compress", *low], "--budget", 0.5, 0.9, out["compress adapters"])
    for name, models in (("negate", full), ("negate adapter", [*low, "--adapter"])):
        yield two(name, ["negate", *models, "--forget", "math"], "--alpha", 0.5, 0.7, out[name])
    yield two("decompose", ["decompose", *full], "--threshold", 0.6, 0.9, out["decompose"])
    for name, tool, base, tasks, more in (
        ("merge", "merge", family.base, family.tasks, []),
        ("merge adapter", "merge", adapters.base, adapters.tasks, ["--adapter"]),
        ("mergekit-yaml", "mergekit-yaml", family.base, family.tasks, []),
    ):
        configs = [_config(root / "inputs" / f"{name}-{weight}.yml", base, tasks, weight) for weight in (0.3, 0.6)]
        old, new = ([tool, config, str(places[name] / "out"), *more, "--quiet"] for config in configs)
        yield Command(name, places[name], old, new)
    online = ["online", *out["online"]]
    first = ["--base", str(family.base), "--num-bases", "2", *_tasks({"math": family.tasks["math"]})]
    second = _tasks({"code": family.tasks["code"]})
    yield Command("online", places["online"], [*online, *first], [*online, *second], continues=True)
    sources = {name: _style(root / "inputs" / name, seed) for seed, name in enumerate("ab")}
    styles = [part for name, file in sources.items() for part in ("--style", f"{name}={file}")]
    yield two("mix-styles", ["mix-styles", *styles], "--scale", "a=1", "a=0.5", out["mix-styles"])
    files = {option: str(places["reports"] / name) for option, name in REPORTS.items()}
    reports = ["inspect", "--layers", "--quiet", *(part for item in files.items() for part in item)]
    yield Command("reports", places["reports"], [*reports, *full[:4]], [*reports, *full])


PLACES = (
    *("compress", "compress adapters", "negate", "negate adapter", "decompose", "merge", "merge adapter"),
    *("mergekit-yaml", "online", "mix-styles", "reports"),
)
REPORTS = {"--json": "a.json", "--html": "a.html", "--plot": "a.png"}


def _tasks(tasks: Mapping[str, Path]) -> list[str]:
    return [part for name, path in tasks.items() for part in ("--task", f"{name}={path}")]


def _config(file: Path, base: Path, tasks: Mapping[str, Path], weight: float) -> str:
    models = [{"model": str(path), "parameters": {"weight": weight}} for path in tasks.values()]
    config = {"merge_method": "task_arithmetic", "base_model": str(base), "models": models, "dtype": "float32"}
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    return str(file)


def _style(directory: Path, seed: int) -> Path:
    directory.mkdir()
    return write(directory, style(seed, FLUX_MODULES))


class Trials:
    def __init__(self, ask: Ask, root: Path, log: Path, chance: random.Random) -> None:
        self.ask, self.root, self.log, self.chance = ask, root, log, chance
        self.commands = list(commands(root))
        self.known = {command.name: self._learn(command) for command in self.commands}
        self.inputs = snapshot(root / "inputs")
        self.seen: Counter[tuple[str, str]] = Counter()

    def _learn(self, command: Command) -> Known:
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
        command, chance = self.commands[number % len(self.commands)], self.chance
        known, over = self.known[command.name], command.continues or chance.random() < 0.5
        self._prepare(command, known, over)
        kill = {"step": chance.randint(1, known.steps)} if chance.random() < 0.5 else None
        kill = kill or {"delay": chance.random() * 1.1 * known.seconds}
        fsync = chance.random() < 0.5
        done = self.ask(arguments=command.new, root=str(command.place), fsync=fsync, **kill)
        what = f"{command.name}, {kill}, {'over an old output' if over else 'fresh'}, fsync {fsync}"
        state = self._state(command, known, over)
        self.seen[command.name, "killed" if done["signal"] == SIGKILL else "ended"] += 1
        self.seen["with fsync" if fsync else "without fsync", state] += 1
        if state.startswith("half"):
            return f"{what}: {state}"
        if done["signal"] is None and done["code"] != 0:
            return f"{what}: exit code {done['code']} without a kill; {self.log.read_text()[-500:]}"
        return self._again(command, known, state, what)

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
        if snapshot(self.root / "inputs") != self.inputs:
            return f"{what}: the inputs have changed"
        if {path.name for path in (self.root / "outputs").iterdir()} != {c.place.name for c in self.commands}:
            return f"{what}: something lies beside the outputs"
        return None


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("number", type=int, nargs="?", default=1000, help="of trials")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tvbases-kills-") as place:
        log = Path(place) / "stderr"
        with serving(log, "all") as ask:
            trials = Trials(ask, Path(place) / "root", log, random.Random(given.seed))
            failures = [said for number in range(given.number) if (said := _trial(trials, number, given.number))]
        tracebacks = log.read_text(errors="replace").count("Traceback")
    _report(trials.seen, given.number, failures, tracebacks)
    return 1 if failures or tracebacks else 0


def _trial(trials: Trials, number: int, total: int) -> str | None:
    said = trials.run(number)
    if said:
        print(f"trial {number}: {said}", flush=True)
    elif number % 100 == 99:
        print(f"{number + 1} of {total}", flush=True)
    return said


def _report(seen: Mapping[tuple[str, str], int], number: int, failures: list[str], tracebacks: int) -> None:
    for name in (*PLACES, "with fsync", "without fsync"):
        counts = ", ".join(f"{count} {what}" for (own, what), count in sorted(seen.items()) if own == name)
        print(f"{name:20} {counts}")
    print(f"{number} trials: {len(failures)} failures, {tracebacks} tracebacks")


if __name__ == "__main__":
    sys.exit(main())
