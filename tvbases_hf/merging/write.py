"""What a merge becomes: a checkpoint, one weight in memory at a time, or an adapter, its factors in memory."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch

from ..algebra.delta import Delta, low_parts
from ..errors import ParameterError
from ..models.adapter import Adapter
from ..models.lora_files import Template, adapter_tensors, write_adapter
from ..storage.model import stream_model
from ..storage.output import transaction
from ..storage.run import track
from .card import model_card
from .fit import Errors, Limits
from .merge import Merge, is_merge, leave_marker

RECIPE_FILE = "mergekit_config.yml"


def write_checkpoint_merge(merge: Merge, out: Path, *, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Write the base plus the merged change, rounded once to ``dtype`` (None: each tensor's own), and report.

    Raises:
        OutputError: ``out`` is not ours, or the disk is full.
        TvbasesError: whatever the merging method or an input has against a weight. Nothing is written then.
    """
    base, names = merge.vectors.base, set(merge.names)
    size = sum(info.numel * (dtype.itemsize if dtype else info.dtype.itemsize) for info in base.tensors.values())
    with transaction(out, is_merge, size, merge.job(dtype)) as work:
        changes = lambda name: merge.pieces(name) if name in names else None  # noqa: E731
        stream_model(base, work, changes, dtype=dtype, need=merge.need, reads=merge.vectors.stored)
        stored = dtype or next((base.tensors[name].dtype for name in merge.names), torch.float32)
        report = {**merge.report("checkpoint", out), "dtype": _name(stored)}
        return _finish(merge, work, report)


def write_adapter_merge(merge: Merge, out: Path, limits: Limits | None = None) -> dict[str, Any]:
    """Write the merged change as a PEFT adapter of stock LoRA or DoRA, and report what truncation and rounding cost.

    Raises:
        ParameterError: an input is not an adapter.
        OutputError, TvbasesError: as for a checkpoint.
    """
    limits, base = limits or Limits(), merge.vectors.base
    template = _template(merge)
    changes: dict[str, Delta] = {}
    errors = Errors()
    with transaction(out, is_merge) as work:
        for name in track(merge.names, "Merging", lambda n: base.tensors[n].nbytes):
            inputs = merge.inputs(name)
            change = merge.combine(name, inputs)
            changes[name] = limits.fit(name, change, inputs, base, template)
            errors.add(name, change, changes[name])
        tensors, config = adapter_tensors(changes, template, base, limits.dtype)
        write_adapter(work, tensors, config)
        report = {
            **merge.report("adapter", out),
            "dtype": _name(limits.dtype),
            "rank_rule": str(limits.rank or "all"),
            "ranks": dict(sorted(Counter(low.rank for low in low_parts(list(changes.values()))).items())),
            "error": errors.relative(),
        }
        return _finish(merge, work, report)


def _template(merge: Merge) -> Template:
    adapters = {task: model for task, model in merge.vectors.models.items() if isinstance(model, Adapter)}
    others = [task for task in merge.vectors.tasks if task not in adapters]
    if others:
        raise ParameterError(
            f'{len(others)} of {len(merge.vectors)} models are full checkpoints (first: "{others[0]}"), whose change '
            "no adapter holds; write a checkpoint (leave --adapter out)"
        )
    named = {adapter.base_id for adapter in adapters.values()}
    return Template.of(list(adapters.values()), (named.pop() if len(named) == 1 else "") or merge.vectors.base.label)


def _finish(merge: Merge, work: Path, report: dict[str, Any]) -> dict[str, Any]:
    report["bytes"] = sum(file.stat().st_size for file in work.iterdir())
    (work / RECIPE_FILE).write_text(merge.recipe, encoding="utf-8")
    (work / "README.md").write_text(model_card(merge, report), encoding="utf-8")
    leave_marker(work, report)
    return report


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
