"""Some tasks of a basis of adapters as a basis of their own, in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from ...algebra.delta import Delta, low_parts
from ...algebra.sums import total
from ...errors import ParameterError
from ...storage.checkpoint import Checkpoint
from ..info import FORMAT_VERSION, BasisInfo
from .codec import Spec, store
from .lora_vectors import LoraVectors, assemble
from .task import StockSource, template

NO_OVERLAP = {"input": 0.0, "output": 0.0, "input_by_chance": 0.0, "output_by_chance": 0.0}


def some_tasks(
    info: BasisInfo,
    source: StockSource,
    tasks: Sequence[str],
    terms: Callable[[str, str], list[tuple[float, Delta]]],
) -> tuple[BasisInfo, LoraVectors]:
    """Every task by itself, its factors beside the others'; ``terms(task, name)`` are its part of a weight.

    Raises ParameterError for no task or one that is not there, and for changes that are not low-rank.
    """
    places = [info.index(task) for task in tasks]
    if not places or len(set(places)) < len(places):
        raise ParameterError(f"name one task or more, each once; got {', '.join(map(str, tasks)) or 'none'}")
    if source.whole or source.scaled:
        raise ParameterError(
            f"the adapters change {len(source.whole) + len(source.scaled)} weights in other ways than by factors "
            f"(first: {(*source.whole, *source.scaled)[0]}); use adapter(task, base=...) or restore"
        )
    assert info.adapters is not None
    own, specs, stored = info.adapters, {}, {}
    dtype = getattr(torch, own.dtype)
    for name, spec in source.specs.items():
        parts = []
        for task in tasks:
            found = terms(task, name)
            parts += low_parts([total([delta for _, delta in found], [share for share, _ in found])] if found else [])
        if len(parts) < len(tasks):
            continue
        ranks = [part.rank for part in parts]
        specs[name] = Spec(spec.module, spec.kind, list(spec.kernel), list(spec.shape), ranks)
        stored[name] = store(parts, "", torch.ones(spec.shape[0], dtype=torch.float64), dtype)
    weights = torch.ones(len(tasks), dtype=torch.float64)
    empty = Checkpoint.from_state_dict({})
    vectors = assemble(stored, specs, {}, template(own, source), empty, own.alpha, weights)
    return _info_of(info, places, specs), vectors


def _info_of(info: BasisInfo, places: Sequence[int], specs: dict[str, Spec]) -> BasisInfo:
    assert info.adapters is not None
    one = torch.eye(len(places), dtype=torch.float64).tolist()
    errors = [info.task_error[place] for place in places]
    adapters = replace(
        info.adapters,
        modules=specs,
        error_before_rounding=errors,
        truncation_error=errors,
        candidates={},
        stock_error=0.0,
        overlap=NO_OVERLAP,
    )
    return replace(
        info,
        method="tsv",
        options={},
        tasks=tuple(info.tasks[place] for place in places),
        encoder=one,
        decoder=one,
        mean=None,
        task_error=errors,
        gram=[[info.gram[a][b] for b in places] for a in places] if info.gram else torch.eye(len(places)).tolist(),
        ranks={},
        adapters=adapters,
        library=None,
        format_version=FORMAT_VERSION,
    )
