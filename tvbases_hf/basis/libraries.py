"""A library of adapters in a directory, changed and looked at in one call each: what ``tvbases library`` does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import defaults
from ..algebra.rank import RankRule
from ..errors import MismatchError, OutputError, ParameterError
from ..merging.changes import Edit
from ..merging.write import is_checkpoint_of_ours, write
from ..models.hosts import host_notes
from ..models.lora_files import is_adapter_directory
from ..storage.checkpoint import Checkpoint
from ..storage.file_names import check_names
from ..storage.files import home_path
from ..storage.output import check_apart, check_output, preview
from .adapters.task import TaskAdapter
from .basis import Basis
from .compress import compress
from .library.change import add_to_library, remove_from_library
from .library.check import verify_library
from .library.create import METHOD
from .library.foreign import VLORA, ForeignAdapters, ForeignVectors, open_foreign
from .library.inspect import inspect_library
from .library.report import library_report
from .lora import LoraBasis


def add(
    directory: str | Path,
    base: str | Path,
    tasks: Mapping[str, str | Path],
    *,
    budget: float | None = None,
    replace: bool = False,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Add adapters to a library, or begin one with them; the numbers of the tasks that are there stay as they are.

    Args:
        base: the pretrained model, a path or a Hub id.
        tasks: paths or Hub ids of adapters by name.
        budget: of a library that begins: share of the adapters' bytes to keep. One that exists keeps what comes as
            well as what it has.
        replace: a task of the same name gives its place to the new one.

    Raises TvbasesError for whatever cannot be, before anything is written.
    """
    path = Path(directory)
    if not (path.is_dir() and any(path.iterdir())):
        return compress(base, tasks, path, method=METHOD, budget=budget, dry_run=dry_run)
    info = open_library(path).info
    if budget is not None:
        raise ParameterError(
            f'"{directory}" exists: what is added pays the price per byte that it was begun with; leave the budget '
            "out, or compress all adapters again"
        )
    check_apart(path, map(str, (base, *tasks.values())))
    return add_to_library(path, info, base, tasks, again=replace, dry_run=dry_run)


def remove(directory: str | Path, names: Sequence[str], *, dry_run: bool = False) -> dict[str, Any]:
    """Take tasks out of a library; those that stay keep their numbers."""
    return remove_from_library(directory, open_library(directory).info, names, dry_run=dry_run)


def listed(directory: str | Path) -> dict[str, Any]:
    """The tasks of a library, with what each takes and is off by."""
    basis = open_library(directory)
    return library_report(basis.info, Path(directory))


def export(
    directory: str | Path,
    name: str,
    out: str | Path,
    *,
    alpha: float = 1.0,
    rank: str | float | RankRule | None = None,
    equal_rank: bool = False,
    host: defaults.Host | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """One task of a library, or of any basis of adapters, as a LoRA of its own; options as those of ``adapter``."""
    basis = LoraBasis.from_pretrained(directory)
    basis.info.index(name)
    check_output(out, is_adapter_directory)
    check_apart(out, [str(directory)])
    if Path(directory).resolve() in home_path(out).resolve().parents:
        raise OutputError(f'"{out}" is in "{directory}", which is written again as a whole; choose another directory')
    if dry_run:
        return preview(out, None, None)
    adapter = basis.adapter(name, alpha=alpha, rank=rank, equal_rank=equal_rank, host=host)
    adapter.save_pretrained(out)
    size = sum(tensor.nbytes for tensor in adapter.tensors.values())
    error = basis.info.task_error[basis.info.index(name)]
    return {
        "out": str(out),
        "task": name,
        "bytes": size,
        "task_error": error,
        "cut": adapter.cut,
        "loading": host_notes(host, adapter.config),
    }


def verify(
    directory: str | Path, base: str | Path | None = None, tasks: Mapping[str, str | Path] | None = None
) -> dict[str, Any]:
    """Read all of a library and compare it with its checksums, and some tasks with their adapters.

    Raises CheckpointError for the first thing that is not as it was written.
    """
    return verify_library(directory, open_library(directory).info, base, tasks)


def inspect(directory: str | Path) -> dict[str, Any]:
    """What a library holds: near copies, clusters and what they share, and what a byte buys."""
    return inspect_library(directory, open_library(directory).info)


def convert(
    source: str | Path, out: str | Path, base: str | Path | None = None, *, dry_run: bool = False
) -> dict[str, Any]:
    """Every task of a directory of vlora-dev, lorashare or TaskVectorBasis as a LoRA (or a checkpoint) in OUT/TASK.

    Args:
        base: needed for TaskVectorBasis, whose tasks are changes of full checkpoints.

    vlora-dev keeps no alpha: its LoRAs come out with a scaling of 1, which is said.
    """
    found = open_foreign(Path(source))
    check_names(found.tasks, "task")
    ours = is_adapter_directory if isinstance(found, ForeignAdapters) else is_checkpoint_of_ours
    for task in found.tasks:
        check_output(Path(out) / task, ours)
    check_apart(out, [str(source)])
    if dry_run:
        return preview(out, None, None)
    if isinstance(found, ForeignAdapters):
        for task in found.tasks:
            found.read(task)  # before any is written
        for task in found.tasks:
            TaskAdapter(*found.read(task), f"{task} from {Path(source).name}").save_pretrained(Path(out) / task)
    else:
        _write_checkpoints(found, source, out, base)
    known = [] if not (Path(source) / VLORA).is_file() else ["vlora-dev keeps no alpha: the LoRAs have a scaling of 1"]
    return {"out": str(out), "tasks": list(found.tasks), "warnings": known}


def _write_checkpoints(found: ForeignVectors, source: str | Path, out: str | Path, base: str | Path | None) -> None:
    if base is None:
        raise ParameterError(f'"{source}": of TaskVectorBasis, whose tasks are changes of a checkpoint: give its base')
    model = Checkpoint.open(base)
    stored = {name: tuple(info.shape) for name, info in model.tensors.items()}
    odd = [name for name, shape in found.shapes.items() if stored.get(name) != shape]
    if odd:
        raise MismatchError(
            f'"{source}": {len(odd)} of {len(found.shapes)} weights are not in "{model.label}" with the shape that '
            f"they have there (first: {odd[0]}); give the base that the vectors are of, by the names that they have"
        )
    for place, task in enumerate(found.tasks):
        edit = Edit(
            model, tuple(found.shapes), lambda name, place=place: found.read(name)[place], f"{task} of {source}"
        )
        write(edit, Path(out) / task)


def open_library(directory: str | Path) -> LoraBasis:
    """A library in a local directory. ParameterError for another basis, or one on the Hub."""
    path = Path(directory)
    if not path.is_dir():
        raise ParameterError(f'"{directory}": no such directory; a library on the Hub has to be downloaded first')
    basis = Basis.from_pretrained(path)
    if not isinstance(basis, LoraBasis) or basis.info.library is None:
        raise ParameterError(
            f'"{directory}": a basis of method {basis.info.method}, whose tasks depend on each other, and no library; '
            "compress the adapters with --method library"
        )
    return basis
