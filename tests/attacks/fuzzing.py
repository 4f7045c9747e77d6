"""Files damaged and names chosen at random, for as long as is asked: ``make fuzz SECONDS=3600``.

Each input is one file of a workplace, damaged, or names of its tasks or tensors; one command that reads them, run in
this process; and the check that it kept the promise of this package. What breaks it is shrunk by hypothesis, and the
smallest damage is printed.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import multiprocessing
import random
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub
import hypothesis
import hypothesis.errors
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from attacks.names import TASKS, TENSORS, with_tasks, with_tensors
from attacks.strategies import of_json, of_safetensors, of_yaml
from attacks.workplace import Action, Broken, Workplace, actions, held, make_workplace

# By the file that is damaged: the kind of its commands (see workplace.actions).
TARGETS = {
    "base/config.json": "model",
    "math/config.json": "model",
    "base/tokenizer.json": "model",
    "math/tokenizer_config.json": "model",
    "base/generation_config.json": "model",
    "math/model.safetensors": "model",
    "base/model.safetensors": "model",
    "code/model.safetensors.index.json": "model",
    "math-lora/adapter_config.json": "adapter",
    "math-lora/adapter_model.safetensors": "adapter",
    "basis/basis_config.json": "basis",
    "basis/basis.safetensors": "basis",
    "tsv-basis/basis_config.json": "tsv-basis",
    "tsv-basis/basis.safetensors": "tsv-basis",
    "lora-basis/basis_config.json": "lora-basis",
    "lora-basis/adapter_config.json": "lora-basis",
    "lora-basis/adapter_model.safetensors": "lora-basis",
    "online/basis_config.json": "online",
    "online/basis.safetensors": "online",
    "math.safetensors": "style",
    "merge.yml": "yaml",
    "bases.yml": "bases",
    "merges.yml": "yamls",
    "names of tasks": "model",
    "names of tensors": "model",
}
NAMED = {"names of tasks": TASKS, "names of tensors": TENSORS}
STRATEGIES = {".json": of_json, ".safetensors": of_safetensors, ".yml": of_yaml}
# Bytes beyond what the program holds: an input of some kilobytes explains no more.
MEMORY = 6 << 30
ROUND = 50
# Seconds that one process takes inputs.
SEGMENT = 600
# Seconds after which a process that does not even take a signal is ended, with the place where it is.
DEAD = 120


@dataclass
class Figures:
    """What was tried, and what broke the promise: {kind of defect: the smallest input}."""

    inputs: Counter[str] = field(default_factory=Counter)
    codes: Counter[int] = field(default_factory=Counter)
    broken: dict[str, str] = field(default_factory=dict)
    slowest: float = 0.0

    def add(self, other: Figures) -> None:
        self.inputs += other.inputs
        self.codes += other.codes
        self.broken = other.broken | self.broken
        self.slowest = max(self.slowest, other.slowest)

    def __str__(self) -> str:
        kinds = Counter(kind.partition(" in ")[0] for kind in self.broken)
        hangs, outside = kinds.pop("hang", 0), kinds.pop("changed files", 0)
        return (
            f"{sum(self.inputs.values())} inputs in {len(self.inputs)} kinds of files, {self.codes[0]} done, "
            f"{self.codes[2]} refused, the slowest in {self.slowest:.1f} s: {sum(kinds.values())} tracebacks or wrong "
            f"results, {hangs} hangs, {outside} changes of other files"
        )


def _drawn(place: Workplace, target: str) -> st.SearchStrategy[Any]:
    """What hypothesis draws and shrinks: names, or a damaged file and which command reads it."""
    if target in NAMED:
        return NAMED[target]
    file = place / target
    damage = STRATEGIES[file.suffix](file.read_bytes())
    return st.tuples(damage, st.integers(0, len(actions(place)[TARGETS[target]]) - 1))


def _input(place: Workplace, target: str, drawn: Any) -> tuple[dict[str, bytes], Action]:
    """The files that are other than they were, and the command."""
    commands = actions(place)[TARGETS[target]]
    if target == "names of tasks":
        return {}, with_tasks(place, drawn)
    if target == "names of tensors":
        return with_tensors(place, drawn), commands[drawn.command % len(commands)]
    damage, index = drawn
    return {target: damage}, commands[index]


def try_file(place: Workplace, target: str, count: int, figures: Figures, seed: int | None, until: float) -> None:
    """``count`` damages of one file, or names; what breaks the promise is noted once for each kind of defect.

    ``seed`` None is always the same inputs.
    """

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=seed is None,
        suppress_health_check=list(HealthCheck),  # type: ignore[arg-type]
        report_multiple_bugs=False,
        phases=(Phase.generate, Phase.shrink),
        print_blob=False,
    )
    @given(_drawn(place, target))
    def attack(drawn: Any) -> None:
        if time.monotonic() > until:
            return
        files, command = _input(place, target, drawn)
        with _damaged(place, files), _ended(DEAD):
            figures.inputs[target] += 1
            begun = time.monotonic()
            try:
                outcome = held(place, command, "models/online" if TARGETS[target] == "online" else "out")
                figures.codes[outcome.code] += 1
            except Broken as error:
                if error.kind not in figures.broken:
                    raise
            finally:
                figures.slowest = max(figures.slowest, time.monotonic() - begun)

    try:
        (attack if seed is None else hypothesis.seed(seed)(attack))()
    except hypothesis.errors.Flaky as error:  # only a hang can be: where another program took the machine's time
        figures.broken.setdefault("flaky", f"{target}\n{str(error)[:1500]}")
    except Broken as error:
        figures.broken[error.kind] = f"{target}\n{error}\n" + "\n".join(getattr(error, "__notes__", []))[:1500]


@contextlib.contextmanager
def _ended(seconds: float) -> Iterator[None]:
    """The process ends, and says where it was, if it does not even take a signal for so long."""
    faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


class _damaged:
    """These files damaged; whatever was changed besides is put back from a copy of the workplace."""

    def __init__(self, place: Workplace, files: Mapping[str, bytes]) -> None:
        self._place, self._files = place, files

    def __enter__(self) -> None:
        self._content = {name: (self._place / name).read_bytes() for name in self._files}
        for name, damage in self._files.items():
            (self._place / name).write_bytes(damage)

    def __exit__(self, *_: object) -> None:
        place, online = self._place, self._place / "online"
        if any(name.startswith("online/") for name in self._files):  # the command has put a new directory there
            shutil.rmtree(online)
            shutil.copytree(place.root.parent / "kept" / "models" / "online", online)
        for name, content in self._content.items():
            (place / name).write_bytes(content)
        shutil.rmtree(place.out, ignore_errors=True)


def prepared(root: Path) -> Workplace:
    """A workplace, and a copy of it to put things back from. Nothing asks the Hub from now on."""
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    (root / "place").mkdir()
    place = make_workplace(root / "place")
    shutil.copytree(place.root, root / "kept")
    for target in dict(zip(TARGETS.values(), TARGETS, strict=True)).values():  # what takes time once, such as imports
        for command in actions(place)[TARGETS[target]]:
            files = {} if target in NAMED else {target: (place / target).read_bytes()}
            with _damaged(place, files), contextlib.suppress(Broken):
                held(place, command, "models/online" if TARGETS[target] == "online" else "out")
    return place


def fuzz(place: Workplace, seconds: float, seed: int, targets: Iterable[str], say: Callable[[str], None]) -> Figures:
    """Rounds over all targets until the time is over."""
    figures, until = Figures(), time.monotonic() + seconds
    names = list(targets)
    number = seed
    while time.monotonic() < until:
        number += 1
        for target in names:
            known = len(figures.broken)
            try_file(place, target, ROUND, figures, number, until)
            for kind, detail in list(figures.broken.items())[known:]:
                say(f"== {kind}\n{detail}\n")
        say(f"{figures}")
    return figures


def segment(seconds: float, seed: int, targets: Sequence[str]) -> Figures:
    """In a process of its own."""
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as root:
        return fuzz(prepared(Path(root)), seconds, seed, targets, lambda text: print(text, flush=True))


def in_segments(seconds: float, seed: int, targets: Sequence[str]) -> Figures:
    """One process after another, because what libraries keep of every input adds up in an hour."""
    total, left = Figures(), seconds
    while left > 0:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            try:
                total.add(pool.submit(segment, min(left, SEGMENT), seed, targets).result())
            except BrokenProcessPool as error:
                total.broken["the process ended"] = f"seed {seed}: {error}"
        left, seed = left - SEGMENT, seed + 100_000
    return total


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=None, help="default: another one every time; it is printed")
    parser.add_argument("--only", default="", help="targets whose names hold this")
    given = parser.parse_args()
    seed = random.randrange(1 << 30) if given.seed is None else given.seed
    found = in_segments(given.seconds, seed, [target for target in TARGETS if given.only in target])
    print(f"seed {seed}: {found}")
    return 1 if found.broken else 0


if __name__ == "__main__":
    sys.exit(main())
