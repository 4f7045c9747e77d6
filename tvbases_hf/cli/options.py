"""Options that several commands have, each with one meaning, and what is checked before the work.

How a command works (threads, memory, bars, going on with a killed run) is said to the Run here and nowhere else.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import defaults
from ..errors import MissingExtraError, OutputError, ParameterError
from .app import QUIET, SIDE_FILES, console, stamp
from .hub import push_output

REVISION = "tvbases_hf.revision"


def _in_run(context: typer.Context, **how: Any) -> None:
    """The rest of the command works so; only then is anything imported that is not needed to parse."""
    from ..storage.run import current, using

    context.with_resource(using(replace(current(), **how)))


def _quietly(context: typer.Context, quiet: bool) -> bool:
    if quiet:
        context.meta[QUIET] = True
        _in_run(context, quiet=True)
        context.with_resource(_silent())
    return quiet


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    before, console.quiet = console.quiet, True
    try:
        yield
    finally:
        console.quiet = before


def _trusting(context: typer.Context, trust: bool) -> bool:
    if trust:
        _in_run(context, trust_remote_code=True)
    return trust


def _on_threads(context: typer.Context, threads: int | None) -> int | None:
    if threads is not None:
        _in_run(context, workers=threads)
    return threads


def _within_memory(context: typer.Context, memory: str | None) -> str | None:
    if memory is not None:
        _in_run(context, memory=parse_size(memory))
    return memory


def _going_on(context: typer.Context, resume: bool) -> bool:
    if not resume:
        _in_run(context, resume=False)
    return resume


def _writable(context: typer.Context, parameter: typer.CallbackParam, file: Path | None) -> Path | None:
    if file is None:
        return None
    option = f"--{parameter.name}"
    check_file(file, option)
    if parameter.metavar == "PNG" and file.suffix.lower() not in ("", ".png"):
        raise ParameterError(f'{option} "{file}": a picture is written as PNG; call it {file.with_suffix(".png").name}')
    context.meta.setdefault(SIDE_FILES, {})[file] = stamp(file)
    return apart(context, parameter, file)


def apart(context: typer.Context, parameter: typer.CallbackParam, file: Path) -> Path:
    """ParameterError for a file that another option names."""
    option, given = f"--{parameter.name}", context.meta.setdefault("tvbases.files", {})
    other = given.setdefault(os.path.realpath(os.path.expanduser(file)), option)
    if other != option:
        raise ParameterError(f'{other} and {option} are both "{file}"; give each a file of its own')
    return file


def _drawable(context: typer.Context, parameter: typer.CallbackParam, file: Path | None) -> Path | None:
    if file is not None and find_spec("matplotlib") is None:
        raise MissingExtraError(f'--{parameter.name} needs matplotlib; pip install "tvbases-hf[plot]"')
    return _writable(context, parameter, file)


def file_option(help: str, metavar: str = "FILE", draws: bool = False) -> Any:
    """A file that a command writes besides its output; whether it can is known before the work.

    ``draws``: it is, or has in it, a picture of ours, which matplotlib draws.
    """
    return typer.Option(help=help, metavar=metavar, callback=_drawable if draws else _writable)


def _keep_revision(context: typer.Context, revision: str | None) -> str | None:
    context.meta[REVISION] = revision
    return revision


def hub_ids(context: typer.Context, value: Any) -> Any:
    """The ids of a command, with --revision where they name none: it is parsed first, wherever it stands."""
    revision = context.meta.get(REVISION)
    if not revision or not value:
        return value
    from ..storage.files import at_revision

    if isinstance(value, str):
        return at_revision(value, revision)
    named = (item.partition("=") for item in value)
    return [f"{name}{equals}{at_revision(source, revision)}" for name, equals, source in named]


_BASE = typer.Option(
    "--base", help="The pretrained model: a directory or a Hub id.", metavar="PATH_OR_ID", callback=hub_ids
)
_TASK = typer.Option("--task", help="A fine-tuned model; repeat for each.", metavar="NAME=PATH_OR_ID", callback=hub_ids)
Base = Annotated[str, _BASE]
Task = Annotated[list[str], _TASK]
# Of commands that can do without in some of their uses.
OptionalBase = Annotated[str | None, _BASE]
OptionalTask = Annotated[list[str] | None, _TASK]
Revision = Annotated[
    str | None,
    typer.Option(
        "--revision",
        help="The revision of Hub ids that name none themselves; owner/name@revision does.",
        metavar="BRANCH_TAG_OR_COMMIT",
        is_eager=True,
        callback=_keep_revision,
    ),
]
Out = Annotated[Path, typer.Option("--out", help="The directory to write.", metavar="DIR")]
NumBases = Annotated[
    float, typer.Option("--num-bases", "-m", help="How many bases; a number below 1 is a fraction of the tasks.")
]
Seed = Annotated[int, typer.Option("--seed", help="The seed of whatever is drawn at random.")]
Dtype = Annotated[
    defaults.Dtype, typer.Option("--dtype", help="The dtype of the weights; auto: as the models are stored.")
]
Device = Annotated[
    str,
    typer.Option(
        "--device", help="Where to compute: cpu, cuda, or one of several GPUs, such as cuda:1.", metavar="NAME"
    ),
]
ExtraRows = Annotated[
    defaults.ExtraRows | None,
    typer.Option(
        "--extra-rows",
        help="Where vocabularies differ: drop takes the rows they share, keep leaves a row of only one model as it is.",
    ),
]
AdapterOut = Annotated[bool, typer.Option("--adapter", help="From adapters, write an adapter, not a checkpoint.")]
EqualRank = Annotated[
    bool,
    typer.Option(
        "--equal-rank", help="Give every module of an adapter the same rank, padded with zeros; the change is the same."
    ),
]
Host = Annotated[
    defaults.Host | None,
    typer.Option("--for", help="Refuse to write an adapter that this program cannot load, and say what to change."),
]

# Shared and unique components.
Threshold = Annotated[
    float, typer.Option("--threshold", help="Degree of sharing, 0 to 1, above which a direction counts as shared.")
]
Subspace = Annotated[
    defaults.Subspace,
    typer.Option(
        "--subspace",
        help="How shared directions are found: chain (the paper's), mean (in any order), angles (of two tasks).",
    ),
]
Side = Annotated[
    defaults.Side, typer.Option("--side", help="Which directions are compared: column (outputs) or row (inputs).")
]

# How a command works.
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="No progress bars; print nothing but warnings.", callback=_quietly)
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run the Python code that comes with a model when it is loaded; it can do whatever you can.",
        callback=_trusting,
    ),
]
Json = Annotated[Path | None, file_option("Write the report as JSON.")]
PAGE = "Write the report as one HTML page, pictures included, that can be sent to others."
Html = Annotated[Path | None, file_option(PAGE, "HTML")]
DrawnHtml = Annotated[Path | None, file_option(PAGE, "HTML", draws=True)]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        help="How many weights to work on at a time; default: one per processor.",
        min=1,
        callback=_on_threads,
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(
        "--memory",
        help="The most memory that the work may take, besides the program itself; for example 1.5GB.",
        callback=_within_memory,
    ),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume/--no-resume",
        help="Continue where an interrupted run of the same command stopped.",
        callback=_going_on,
    ),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Check models, options and output; say what would be written; write nothing.")
]


def rank_option(of: str) -> Any:
    """``--rank``, a rank rule in every command; only what it is the rank of differs."""
    return typer.Option("--rank", help=f"A rank rule (16, 0.25, energy:0.95, gavish-donoho): {of}", metavar="RULE")


def scale_option(of: str) -> Any:
    """``--alpha``, a scale in every command."""
    return typer.Option("--alpha", help=f"A scale: {of}")


def parse_numbers(option: str, items: Sequence[str]) -> dict[str, float]:
    """``NAME=NUMBER`` arguments; ParameterError for a bad or repeated one."""
    found: dict[str, float] = {}
    for item in items:
        name, _, number = item.partition("=")
        try:
            value = float(number)
        except ValueError:
            value = float("nan")
        if not name or value - value != 0:  # neither NaN nor infinite
            raise ParameterError(f'{option} "{item}" is not NAME=NUMBER, for example anime=0.8')
        if name in found:
            raise ParameterError(f'two {option[2:]}s for "{name}" ({found[name]:g} and {number}); give one')
        found[name] = value
    return found


def parse_values(option: str, items: Sequence[str]) -> dict[str, Any]:
    """``NAME=VALUE`` arguments: numbers, true and false, or else words; ParameterError for a bad or repeated one."""
    found: dict[str, Any] = {}
    for item in items:
        name, _, value = item.partition("=")
        if not name or not value:
            raise ParameterError(f'{option} "{item}" is not NAME=VALUE, for example density=0.3')
        if name in found:
            raise ParameterError(f'two {option[2:]}s for "{name}" ({found[name]} and {value}); give one')
        try:
            found[name.replace("-", "_")] = json.loads(value)
        except ValueError:
            found[name.replace("-", "_")] = value
    return found


def parse_weights(items: Sequence[str], tasks: Iterable[str]) -> list[float]:
    """``NAME=NUMBER`` arguments as one number per task, 1 where none is given."""
    found = dict.fromkeys(tasks, 1.0)
    for name, value in parse_numbers("--weight", items).items():
        if name not in found:
            raise ParameterError(f'--weight "{name}={value:g}" is of none of the tasks ({", ".join(found)})')
        found[name] = value
    return list(found.values())


def parse_dtype(name: str) -> Any:
    """A torch dtype; None for auto."""
    import torch

    check_choice("--dtype", name, defaults.Dtype.__args__)
    return None if name == "auto" else getattr(torch, name)


def check_choice(option: str, value: str, known: Iterable[str]) -> None:
    if value not in known:
        raise ParameterError(f"{option}: {value!r} is unknown; choose one of {', '.join(known)}")


def check_file(file: Path, option: str) -> None:
    """Before any work: OutputError for a file that could not be written after it, or that is not ours to replace."""
    from ..storage.output import check_output_file, writing
    from ..storage.reports import is_report

    with writing(file):
        if file.is_dir() or not file.absolute().parent.is_dir():
            raise OutputError(f'{option} "{file}": not a file in a directory that exists')
    check_output_file(file, is_report)


def parse_size(text: str | None, option: str = "--memory") -> int | None:
    """``1.5GB`` in bytes; ParameterError for anything else."""
    if text is None:
        return None
    found = re.fullmatch(r"\s*([0-9.]+)\s*([kKMGT]?)i?B?\s*", text)
    try:
        size = float(found[1]) * 1000 ** "_KMGT".index(found[2].upper() or "_") if found else 0.0
    except ValueError:
        size = 0.0
    if size <= 0:
        raise ParameterError(f"{option}: {text!r} is no size; for example 800MB, or 1.5GB")
    return int(size)


def tell(
    found: Mapping[str, Any],
    show: Callable[[Any, Any], None],
    json: Path | None,
    html: Path | None = None,
    picture: Callable[[], bytes] | None = None,
) -> None:
    """A command's report: warnings on stderr, tables (not with --quiet), JSON, a page; of a dry run what it would be.

    Then the output is uploaded, where --push-to-hub says so.

    ``picture`` is drawn for the page alone.
    """
    from .tables import print_preview, warn

    warn(found.get("warnings", found.get("notes", ())))
    report(json, found)
    (print_preview if found.get("dry_run") else show)(found, console)
    if html is not None and not found.get("dry_run"):
        page(html, found, [functools.partial(show, found)], picture() if picture else None, title=str(found["out"]))
    push_output(found)


def page(
    file: Path, found: Mapping[str, Any], shows: Sequence[Callable[[Any], None]], picture: bytes | None, **said: str
) -> None:
    """What --html asks for, with the command that was given."""
    from .page import write_page

    command = shlex.join(["tvbases", *sys.argv[1:]])
    write_page(dict(found), shows, picture, file, command=command, **said)


def report(file: Path | None, found: Mapping[str, Any]) -> None:
    """What --json asks for."""
    from ..storage.reports import write_report

    if file is not None:
        write_report(file, found)
