"""Shared and unique components of whole models, written as checkpoints."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..algebra.delta import Delta, dense
from ..algebra.finite import count_not_finite
from ..algebra.products import square_norm
from ..methods.devec import Decomposition, Options
from ..models.positions import groups_of, in_order
from ..models.travel import Files, beside
from ..models.vectors import Vectors
from ..storage.cards import CARD, header, write_card
from ..storage.checkpoint import Checkpoint
from ..storage.file_names import check_names
from ..storage.model import copy_side_files, not_stored
from ..storage.output import check_apart, check_output, files_in, preview, transaction, write_json
from ..storage.run import track
from ..storage.tensor_files import TensorFiles
from ..text import code_span, in_markdown
from .apply import decomposed
from .card import edit_card

MARKER = "tvbases_components.json"
SHARED = "shared"


def write_components(vectors: Vectors, options: Options, out: Path, *, dry_run: bool = False) -> dict[str, Any]:
    """Write ``out/unique/TASK`` and ``out/shared``: the base plus each unique component, and plus the shared one.

    Tensors that are not matrices count as unique; experts in one tensor are matrices, one by one.

    Returns, per layer group and task, the share of the task vector's energy that is shared; of a dry run, what would
    be written.

    Raises ParameterError for a task whose name cannot be that of a directory, and OutputError for an output that is
    not ours or a full disk.
    """
    check_names(vectors.tasks, "task")
    base = vectors.base
    check_apart(out, (model.label for model in (base, *vectors.models.values())))
    tensors = base.written()
    size = sum(info.nbytes for info in tensors.values())
    copies = [f"unique/{task}" for task in vectors.tasks] + [SHARED]
    side = beside(base, vectors.models)
    if dry_run:
        check_output(out, is_components)
        return preview(out, len(base.tensors) * len(copies), size * len(copies))
    groups = groups_of(base.tensors)
    energy: dict[str, Tensor] = {}
    with transaction(out, is_components, size * len(copies)) as work:
        files = {copy: _begin(base, side.files, work / copy) for copy in copies}
        for name in track(list(base.tensors), "Decomposing", lambda n: base.tensors[n].nbytes):
            if name in vectors.names:
                deltas = vectors.deltas(name)
                split = decomposed(vectors, name, options)
                changes = dict(zip(copies, [*split.unique, split.combined], strict=True))
                table = energy.setdefault(groups[name], torch.zeros(2, len(vectors), dtype=torch.float64))
                table += _energies(split, deltas)
            else:
                changes = dict.fromkeys(copies)
            tensor, dtype = base.read(name), tensors[name].dtype
            for copy, change in changes.items():
                files[copy].write(name, _edited(base.label, name, tensor, change, dtype))
        found: dict[str, Any] = {
            "options": vars(options),
            "tasks": list(vectors.tasks),
            "shared_energy": _shares(energy),
        }
        for copy in copies:
            made_of = [model.label for model in vectors.models.values()]
            write_card(work / copy, edit_card(_title(copy), base.label, adapter=False, made_of=made_of))
        write_json(work / MARKER, {**found, "files": sorted({*files_in(work), CARD})})
        write_card(work, _card(base.label, copies, found["shared_energy"]["all"], vectors.tasks))
    found |= {"out": str(out)}
    return {**found, "warnings": list(side.notes)} if side.notes else found


def _title(copy: str) -> str:
    """What is added to the base in ``unique/TASK`` or in ``shared``."""
    task = copy.partition("/")[2]
    return f"What is unique to {task}" if task else "What the tasks share"


def _card(base: str, copies: Sequence[str], shares: Sequence[float], tasks: Sequence[str]) -> str:
    """README.md of all of them."""
    rows = (f"| {in_markdown(task)} | {share:.1%} |" for task, share in zip(tasks, shares, strict=True))
    lines = [
        *header("transformers", base, "finetune", ["task-arithmetic"]),
        "",
        f"# {len(tasks)} tasks, what is unique to each and what they share",
        "",
        "Each of these directories is a model: " + ", ".join(map(code_span, copies)) + ".",
        "",
        "| task | share of its energy that is shared |",
        "|---|---|",
        *rows,
        "",
        "The licences of the base model and of the fine-tuned models apply.",
    ]
    return "\n".join(lines) + "\n"


def is_components(directory: Path) -> bool:
    """Whether a directory holds components and nothing that was put there since."""
    try:
        written = json.loads((directory / MARKER).read_text(encoding="utf-8"))["files"]
        return set(files_in(directory)) <= {MARKER, *written}
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _begin(base: Checkpoint, files: Files, directory: Path) -> TensorFiles:
    directory.mkdir(parents=True)
    copy_side_files(files, directory)
    return TensorFiles(directory, "model", base.written())


def _edited(label: str, name: str, tensor: Tensor, change: Delta | None, dtype: torch.dtype) -> Tensor:
    edited = tensor if change is None else tensor.to(change.device, torch.float64) + dense(change)
    edited = edited.to(dtype)
    if lost := count_not_finite(edited, tensor):
        raise not_stored(label, name, tensor, lost, dtype)
    return edited


def _energies(split: Decomposition, deltas: list[Delta]) -> Tensor:
    rows = [[square_norm(part) for part in split.shared], [square_norm(delta) for delta in deltas]]
    return torch.tensor(rows, dtype=torch.float64)


def _shares(energy: dict[str, Tensor]) -> dict[str, list[float]]:
    """Share of shared energy per group and task, and over all groups."""
    total = sum(energy.values(), torch.zeros_like(next(iter(energy.values()))))
    tables = {**in_order(energy), "all": total}
    return {group: (table[0] / table[1].clamp_min(1e-300)).tolist() for group, table in tables.items()}
