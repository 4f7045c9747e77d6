"""What changes become: a checkpoint, one weight in memory at a time, or an adapter, its factors in memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..algebra.delta import Delta, low_parts
from ..errors import ParameterError
from ..models.adapter import Adapter
from ..models.hosts import host_notes
from ..models.lora_files import adapter_tensors, is_adapter_directory, write_adapter
from ..models.lora_template import Template
from ..models.positions import groups_of
from ..models.travel import beside
from ..models.vectors import Vectors
from ..storage.cards import write_card
from ..storage.model import is_edited_model, stream_model
from ..storage.output import check_apart, transaction
from ..storage.run import once, track
from .card import edit_card, model_card
from .changes import Edit, Made
from .fit import Errors, Limits
from .merge import Merge, is_merge, leave_marker

RECIPE_FILE = "mergekit_config.yml"


def write(
    changes: Merge | Edit | Made,
    out: str | Path,
    *,
    as_adapter: bool = False,
    limits: Limits | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """Write the base plus the change, rounded once, or the change as a PEFT adapter of stock LoRA or DoRA; and report.

    Args:
        changes: a merge, an edit, or what a method that learns from data has made.
        limits: of an adapter: its rank and the dtype of its factors (not of an edit's, which is written as it is), and
            what will load it.
        dtype: of a checkpoint; None for each tensor's own.

    Raises:
        ParameterError: an adapter is wanted of full checkpoints, or (of an edit) of a change that has no low rank.
        OutputError: ``out`` is not ours, or the disk is full.
        TvbasesError: whatever a merging method or an input has against a weight. Nothing is written then.
    """
    out, limits = Path(out), limits or Limits()
    if isinstance(changes, Edit):
        check_apart(out, (model.label for model in (changes.base, *changes.models.values())))
        return _edited_adapter(changes, out, limits) if as_adapter else _edited_checkpoint(changes, out, dtype)
    merge = changes if isinstance(changes, Merge) else Merge.of(changes)
    return _merged_adapter(merge, out, limits) if as_adapter else _merged_checkpoint(merge, out, dtype)


def check_adapter(vectors: Vectors, limits: Limits) -> Template:
    """Where the factors of an adapter of these vectors go.

    Raises ParameterError for full checkpoints, and for what the host of ``limits`` cannot load, as far as it is known.
    """
    adapters = {task: model for task, model in vectors.models.items() if isinstance(model, Adapter)}
    others = [task for task in vectors.tasks if task not in adapters]
    if others:
        raise ParameterError(
            f'{len(others)} of {len(vectors)} models are full checkpoints (first: "{others[0]}"), whose change no '
            "adapter holds; write a checkpoint (leave --adapter out)"
        )
    named = {adapter.base_id for adapter in adapters.values()}
    base_id = (named.pop() if len(named) == 1 else "") or vectors.base.label
    template = Template.of(list(adapters.values()), base_id)
    limits.check(list(adapters.values()), template)
    return template


def is_checkpoint_of_ours(directory: Path) -> bool:
    """Whether a checkpoint that ``write`` wrote may be replaced: nothing was put there since."""
    return is_merge(directory) or is_edited_model(directory)


def _merged_checkpoint(merge: Merge, out: Path, dtype: torch.dtype | None) -> dict[str, Any]:
    base = merge.base
    written = base.written(dtype)
    size = sum(info.nbytes for info in written.values())
    with transaction(out, is_checkpoint_of_ours, size, merge.job(dtype)) as work:
        files, reads = beside(base, merge.vectors.models, merge.tokenizer), merge.vectors.stored
        stream_model(base, work, _pieces(merge), dtype=dtype, need=merge.need, reads=reads, beside=files.files)
        stored = dtype or next((written[name].dtype for name in merge.names), torch.float32)
        report = merge.report("checkpoint", out)
        report["warnings"] += files.notes
        return once(lambda: _finish(merge, work, {**report, "dtype": _name(stored)}))


def _merged_adapter(merge: Merge, out: Path, limits: Limits) -> dict[str, Any]:
    base, template = merge.base, check_adapter(merge.vectors, limits)
    changes: dict[str, Delta] = {}
    errors = Errors(groups_of(base.tensors))
    with transaction(out, is_merge) as work:
        for name in track(merge.names, "Merging", lambda n: base.tensors[n].nbytes):
            inputs = merge.inputs(name)
            change = merge.combine(name, inputs)
            changes[name] = limits.fit(name, change, inputs, base, template)
            errors.add(name, change, changes[name])
        tensors, config = limits.finished(*adapter_tensors(changes, template, base, limits.dtype))
        write_adapter(work, tensors, config)
        ranks = Counter(low.rank for low in low_parts(list(changes.values())))
        report = {
            **merge.report("adapter", out),
            "dtype": _name(limits.dtype),
            "rank_rule": str(limits.rank or "all"),
            "ranks": dict(sorted(ranks.items())),
            "error": errors.relative(),
            "loading": host_notes(limits.host, config),
        }
        return once(lambda: _finish(merge, work, report))


def _edited_checkpoint(edit: Edit, out: Path, dtype: torch.dtype | None) -> dict[str, Any]:
    size = sum(info.nbytes for info in edit.base.written(dtype).values())
    with transaction(out, is_checkpoint_of_ours, size) as work:
        stream_model(edit.base, work, _pieces(edit), dtype=dtype, need=edit.need)

        def describe() -> None:
            edit.leave_marker(work)
            _describe(edit, work, adapter=False)

        once(describe)
    return {"out": str(out), "kind": "checkpoint", "edit": edit.note}


def _edited_adapter(edit: Edit, out: Path, limits: Limits) -> dict[str, Any]:
    adapters = [model for model in edit.models.values() if isinstance(model, Adapter)]
    if not adapters or len(adapters) < len(edit.models):
        raise ParameterError(
            "only adapters can be negated as an adapter, and a task here is a full checkpoint; leave --adapter out"
        )
    template = Template.of(adapters, adapters[0].base_id or edit.base.label)
    changes = {name: edit.change(name) for name in edit.names}
    tensors, config = limits.finished(*adapter_tensors(changes, template, edit.base))
    with transaction(out, is_adapter_directory, sum(tensor.nbytes for tensor in tensors.values())) as work:
        write_adapter(work, tensors, config)
        _describe(edit, work, adapter=True)
    return {"out": str(out), "kind": "adapter", "edit": edit.note, "loading": host_notes(limits.host, config)}


def _pieces(changes: Merge | Edit) -> Callable[[str], Iterator[Tensor] | None]:
    names = set(changes.names)
    return lambda name: changes.pieces(name) if name in names else None


def _finish(merge: Merge, work: Path, report: dict[str, Any]) -> dict[str, Any]:
    report["bytes"] = sum(file.stat().st_size for file in work.rglob("*") if file.is_file())
    (work / RECIPE_FILE).write_text(merge.recipe, encoding="utf-8")
    leave_marker(work, report)
    write_card(work, model_card(merge, report))
    return report


def _describe(edit: Edit, work: Path, *, adapter: bool) -> None:
    made_of = [model.label for model in edit.models.values()]
    write_card(work, edit_card(edit.note, edit.base.label, adapter=adapter, made_of=made_of))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
