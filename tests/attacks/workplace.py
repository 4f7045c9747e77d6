"""Small models, adapters, bases and merges to be attacked, and a guard that holds every command to the promise."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from markdown_it import MarkdownIt
from safetensors import safe_open
from safetensors.torch import save_file

from commands.command_line import Outcome, tvbases
from tvbases_hf import Basis
from tvbases_hf.basis import LoraBasis
from tvbases_hf.errors import TvbasesError
from tvbases_hf.text import JOINERS, printable
from zoo.adapter_zoo import make_adapter, make_base
from zoo.hf_models import read_state, save_state

# Seconds for one command, which takes a few tenths of one here.
PATIENCE = 30.0
# What a terminal is shown beside characters that can be seen: lines, and the joiners of letters.
SHOWN = f"\n{JOINERS}"
Action = Sequence[object] | Callable[[], object]


class Hang(BaseException):
    """A command that takes longer than its input explains."""


class Broken(AssertionError):
    """The promise broken; ``kind`` tells one defect from another."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(f"{kind}\n{detail}")
        self.kind = kind


@dataclass(frozen=True)
class Workplace:
    """A directory with models to be damaged, and ``out`` beside them, the only place where anything may appear.

    ``base``, fine-tunes ``math`` and ``code`` (in two shards), adapters ``math-lora`` and ``code-lora``, bases of both
    kinds (``basis``, ``lora-basis``), an online basis (``online``), two styles and a YAML of each kind.
    """

    root: Path

    def __truediv__(self, name: str) -> Path:
        return self.root / "models" / name

    @property
    def out(self) -> Path:
        return self.root / "out"

    def tasks(self, *names: str) -> list[object]:
        """--base and --task for these models."""
        tasks = [part for name in names or ("math", "code") for part in ("--task", f"{name}={self / name}")]
        return ["--base", self / "base", *tasks]

    def copied(self, root: Path) -> Workplace:
        """The same models elsewhere: what refers to them by path is written again."""
        shutil.copytree(self.root / "models", root / "models")
        for file in [*root.glob("models/*.yml"), *root.glob("models/*/*_config.json")]:
            text = file.read_text(encoding="utf-8").replace(str(self.root), str(root))
            file.write_text(text, encoding="utf-8")
        return Workplace(root)


def make_workplace(root: Path) -> Workplace:
    place = Workplace(root)
    make_base(place / "base", layers=2, hidden=16, intermediate=24)
    state = read_state(place / "base")
    for seed, (name, sharded) in enumerate({"math": False, "code": True, "chat": False}.items()):
        generator = torch.Generator().manual_seed(seed)
        tuned = {n: t + 0.01 * torch.randn(t.shape, generator=generator) for n, t in state.items()}
        save_state(place / name, tuned, place / "base", sharded=sharded)
        make_adapter(place / f"{name}-lora", place / "base", seed, rank=2, alpha=2.0, layers=2)
        _make_style(place / f"{name}.safetensors", seed)
    _make_bases(place)
    _make_merges(place)
    return place


def _make_style(file: Path, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    module = "transformer.transformer_blocks.0.attn.to_q"
    shapes = {f"{module}.lora_A.weight": (2, 16), f"{module}.lora_B.weight": (16, 2)}
    words = {"transformer.r": 2, "transformer.lora_alpha": 2, "transformer.target_modules": ["to_q"]}
    header = {"format": "pt", "lora_adapter_metadata": json.dumps(words)}
    save_file({name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}, file, header)


def _make_bases(place: Workplace) -> None:
    for arguments in (
        ["compress", *place.tasks(), "-m", "1", "--out", place / "basis"],
        ["compress", *place.tasks(), "--method", "tsv", "--out", place / "tsv-basis"],
        ["compress", *place.tasks("math-lora", "code-lora"), "--budget", "0.9", "--out", place / "lora-basis"],
        ["online", *place.tasks(), "-m", "2", "--out", place / "online"],
    ):
        outcome = tvbases(*arguments, "--quiet")
        assert outcome.code == 0, outcome


def _make_merges(place: Workplace) -> None:
    for name, models, method, parameters in (
        ("merge", ("math", "code"), "ties", {"density": 0.5, "weight": 1.0, "lambda": 0.5}),
        ("bases", ("math", "code"), "ae_bases", {"num_bases": 1, "merge": "task_arithmetic", "lambda": 0.4}),
        ("adapters", ("math-lora", "code-lora"), "task_arithmetic", {"weight": 1.0}),
    ):
        listed = [{"model": str(place / model)} for model in models]
        config = {"merge_method": method, "base_model": str(place / "base"), "models": listed, "parameters": parameters}
        (place / f"{name}.yml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    first, second = ((place / name).read_text(encoding="utf-8") for name in ("merge.yml", "adapters.yml"))
    second = second.replace(str(place / "code-lora"), "first")
    (place / "merges.yml").write_text(f"name: first\n{first}---\n{second}", encoding="utf-8")


# The guard


def held(place: Workplace, action: Action, changes: str = "out") -> Outcome:
    """What a command, or a function of the library, does; Broken where it does not keep the promise.

    With exit code 0 only ``changes``, below the workplace, may be new or other than before; else nothing but finished
    merges of a file that holds several.
    """
    before = _listing(place.root)
    try:
        with _within(PATIENCE):
            outcome = tvbases(*action) if isinstance(action, Sequence) else _called(action)
    except Hang as error:
        raise Broken("hang", f"{_shown(action)}\n{_last_frames(error)}") from None
    except Exception as error:
        kind = f"{type(error).__name__} in {_own_frame(error)}"
        raise Broken(kind, f"{_shown(action)}\n{_last_frames(error)}") from None
    _check_outcome(outcome, action)
    changed = {path for path, about in before.items() ^ _listing(place.root).items()}
    allowed = str(place.root / changes)
    wrong = [path for path in changed if not (path == allowed or path.startswith(allowed + "/"))]
    if outcome.code:  # of several merges those that were made before stay, each whole
        parts = str(place.out / "parts")
        wrong = [path for path in changed if not (path == str(place.out) or f"{path}/".startswith(f"{parts}/"))]
    if wrong:
        raise Broken(
            "changed files", f"{_shown(action)}: exit {outcome.code}, {len(wrong)} changed: {sorted(wrong)[:5]}"
        )
    if outcome.code == 0:
        _check_finite(place.root / changes, action)
        _check_markup(place.root / changes, action)
    return outcome


def _called(action: Callable[[], object]) -> Outcome:
    try:
        action()
    except TvbasesError as error:
        return Outcome(2, "", f"error: {printable(error)}\n")
    return Outcome(0, "", "")


def _check_outcome(outcome: Outcome, action: Action) -> None:
    if outcome.code not in (0, 2):
        raise Broken(f"exit code {outcome.code}", f"{_shown(action)}: {outcome}")
    hidden = sorted({c for c in outcome.out + outcome.err if c not in SHOWN and not c.isprintable()})
    if hidden:
        raise Broken("control characters", f"{_shown(action)}: {hidden}: {(outcome.out + outcome.err)[:2000]!a}")
    lines = outcome.err.strip("\n").split("\n")
    if outcome.code == 2 and (len(lines) != 1 or not lines[0].startswith("error: ")):
        raise Broken("more than one line", f"{_shown(action)}: {outcome.err[:2000]}")


def _check_finite(out: Path, action: Action) -> None:
    for file in sorted(out.rglob("*.safetensors")) if out.is_dir() else []:
        with safe_open(file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118
                tensor = stored.get_tensor(name)
                if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
                    raise Broken("NaN written", f"{_shown(action)}: {name} in {file}")


def _check_markup(out: Path, action: Action) -> None:
    for file in [*out.rglob("*.md"), *out.rglob("*.html")] if out.is_dir() else []:
        text = file.read_text(encoding="utf-8")
        text = MarkdownIt("commonmark").render(text) if file.suffix == ".md" else text
        if any(attack in text for attack in ("<script>alert", "<img src=x", 'href="javascript')):
            raise Broken("markup in a page", f"{_shown(action)}: {file}")


def _listing(root: Path) -> dict[str, tuple[int, ...]]:
    """Everything beside and below the workplace that a command could have touched."""
    return {
        str(path): (about.st_mode, about.st_size, about.st_mtime_ns, about.st_ino)
        if path.is_file()
        else (about.st_mode,)
        for path in [*root.parent.iterdir(), *root.rglob("*")]
        for about in [path.lstat()]
    }


@contextlib.contextmanager
def _within(seconds: float) -> Iterator[None]:
    """Raises Hang in the main thread after so long; elsewhere there is nothing that could."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _own_frame(error: BaseException) -> str:
    """The last place in this package where the error came through."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "/tvbases_" in frame.filename]
    return f"{Path(own[-1].filename).name}:{own[-1].name}" if own else "?"


def _last_frames(error: BaseException) -> str:
    lines = traceback.format_exception(type(error), error, error.__traceback__)
    return "".join(lines)[-3000:]


def _shown(action: Action) -> str:
    return " ".join(map(str, action)) if isinstance(action, Sequence) else getattr(action, "__name__", str(action))


# What can be done with each kind of file


def restores(place: Workplace, basis: str) -> Callable[[], object]:
    """Load a basis and write one task of it as a checkpoint."""

    def restore() -> None:
        found = Basis.from_pretrained(place / basis)
        found.restore(found.tasks[0], place / "base", place.out)

    return restore


def extracts(place: Workplace, basis: str) -> Callable[[], object]:
    """Load a basis of adapters, write one task as an adapter, and the basis again."""

    def extract() -> None:
        found = LoraBasis.from_pretrained(place / basis)
        found.adapter(found.tasks[0]).save_pretrained(place.out / "task")
        found.save_pretrained(place.out / "basis")

    return extract


def actions(place: Workplace) -> dict[str, list[Action]]:
    """By kind of file: the commands that read it."""
    adapters = place.tasks("math-lora", "code-lora")
    merge = ["merge", place / "merge.yml", place.out, "--quiet"]
    writing: list[Action] = [
        ["decompose", *place.tasks(), "--out", place.out, "--quiet"],
        ["negate", *place.tasks(), "--forget", "math", "--alpha", "0.5", "--out", place.out, "--quiet"],
        merge,
    ]
    return {
        "model": [
            ["inspect", *place.tasks(), "--quiet"],
            ["compress", *place.tasks(), "-m", "1", "--out", place.out, "--quiet"],
            *writing,
            ["plan", "--base", place / "base", "--models", "2", "--bandwidth", "1GB", "--quiet"],
        ],
        "writing": writing,
        "adapter": [
            ["inspect", *adapters, "--quiet"],
            ["compress", *adapters, "--budget", "0.9", "--out", place.out, "--quiet"],
            ["merge", place / "adapters.yml", place.out, "--adapter", "--quiet"],
            ["merge", place / "adapters.yml", place.out, "--quiet"],
        ],
        "basis": [restores(place, "basis")],
        "tsv-basis": [restores(place, "tsv-basis")],
        "lora-basis": [restores(place, "lora-basis"), extracts(place, "lora-basis")],
        "online": [
            ["online", "--base", place / "base", "--task", f"chat={place / 'chat'}", "--out", place / "online", "-q"]
        ],
        "style": [
            ["mix-styles", "--style", f"a={place / 'math.safetensors'}", "--style", f"b={place / 'code.safetensors'}",
             "--out", place.out / "mix.safetensors", "--quiet"],
        ],
        "bases": [["merge", place / "bases.yml", place.out, "--quiet"]],
        "yamls": [
            ["merge", place / "merges.yml", place.out, "--quiet"],
            ["mergekit-yaml", place / "merges.yml", place.out, "--dry-run", "--quiet"],
            ["merge", place / "merges.yml", place.out / "merged", "--intermediate-dir", place.out / "parts", "--quiet"],
        ],
        "yaml": [merge, ["mergekit-yaml", place / "merge.yml", place.out, "--dry-run", "--quiet"]],
    }  # fmt: skip
