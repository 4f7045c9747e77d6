"""An exact add_weighted_adapter: a new adapter whose effect is the weighted sum of others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tvbases_hf.adapter import Adapter
from tvbases_hf.adapter_out import Template, adapter_tensors
from tvbases_hf.delta import Delta, Dora, LowRank, add, square_norm
from tvbases_hf.errors import ParameterError
from tvbases_hf.taskvector import TaskVectors

from .loaded import DenseAdapter, task_vectors

if TYPE_CHECKING:
    from peft import PeftModel


def add_weighted_adapter(
    model: PeftModel, adapters: Sequence[str], weights: Sequence[float], adapter_name: str, *, rank: int | None = None
) -> float:
    """Add the adapter sum_i w_i adapter_i to the model, next to them; the active adapter stays what it is.

    PEFT's method of this name is exact for plain LoRA only (huggingface/peft issue 3761). This one is exact, at the
    sum of the ranks, for ranks, alphas, rsLoRA, targets, LoRA biases, saved modules and DoRA in any mixture. With DoRA
    among them all modules of the sum are DoRA.

    Args:
        weights: any finite numbers; negative ones subtract.
        rank: of every module of the sum, which is then the closest of that rank (the row scaling of DoRA aside).

    Returns:
        |sum - adapter| / |sum| over all weights, 0.0 unless truncated.

    Raises:
        MissingExtraError: PEFT is not installed.
        ParameterError: a name that is unknown or taken, weights that do not fit, a sum that PEFT cannot express.
        CheckpointError: an adapter that is no change of weights (see task_vectors). The model is unchanged then.
    """
    total = _checked(adapters, weights, rank)
    vectors = task_vectors(model, list(total))
    if adapter_name in model.peft_config:
        raise ParameterError(f'there is an adapter "{adapter_name}" already; choose another name')
    sources = [source for source in vectors.models.values() if isinstance(source, Adapter)]
    for source in sources:
        if isinstance(source, DenseAdapter):
            raise ParameterError(
                f'"{source.label}": {source.config["peft_type"]} adapter; only LoRA and DoRA are added'
            )
    changes, error = _sum(vectors, list(total.values()), rank)
    tensors, config = adapter_tensors(changes, Template.of(sources, sources[0].base_id), vectors.base)
    if config["bias"] != "none":
        raise ParameterError("LoRA biases cannot be added to DoRA in a loaded model: PEFT has no adapter with both")
    _insert(model, adapter_name, tensors, config)
    return error


def _checked(adapters: Sequence[str], weights: Sequence[float], rank: int | None) -> dict[str, float]:
    """The weight of each adapter; those of one that is given twice are added."""
    if not adapters or len(adapters) != len(weights):
        raise ParameterError(f"{len(adapters)} adapters but {len(weights)} weights; give one weight to each")
    for weight in weights:
        if not math.isfinite(weight):
            raise ParameterError(f"weight {weight} is not a finite number")
    if rank is not None and (rank != int(rank) or rank < 1):
        raise ParameterError(f"rank {rank} is not a positive whole number")
    total: dict[str, float] = {}
    for name, weight in zip(adapters, weights, strict=True):
        total[name] = total.get(name, 0.0) + float(weight)
    return total


def _sum(vectors: TaskVectors, weights: Sequence[float], rank: int | None) -> tuple[dict[str, Delta], float]:
    changes: dict[str, Delta] = {}
    lost = whole = 0.0
    for name in vectors.names:
        change = add(vectors.deltas(name), weights)
        changes[name] = change
        if rank is not None:
            changes[name], lost_here, whole_here = _truncated(change, rank)
            lost, whole = lost + lost_here, whole + whole_here
    return changes, math.sqrt(lost / whole) if lost else 0.0


def _truncated(change: Delta, rank: int) -> tuple[Delta, float, float]:
    """The change with a low-rank part of at most ``rank``; the squared norms of what that costs and of the change."""
    match change:
        case LowRank() if change.rank > rank:
            return _closest(change, rank)
        case Dora():
            low, lost, _ = _truncated(change.low, rank)
            assert isinstance(low, LowRank)
            return Dora(change.scale, change.base, low), lost, square_norm(change)
        case _:
            return change, 0.0, square_norm(change)


def _closest(delta: LowRank, rank: int) -> tuple[LowRank, float, float]:
    """The closest change of a smaller rank, what it loses and the whole, as squared norms; float64, in factor space.

    left right = Q_l (R_l R_r^T) Q_r^T: the small core is decomposed, and only the kept vectors are multiplied by the
    orthogonal factors, which stay Householder reflections. O((n + m) r^2), about a third of a full factored SVD.
    """
    reflected = [torch.geqrf(factor.to(torch.float64)) for factor in (delta.left, delta.right.T)]
    cores = [packed[: min(packed.shape)].triu() for packed, _ in reflected]
    left, values, right = torch.linalg.svd(cores[0] @ cores[1].T, full_matrices=False)
    kept = (left[:, :rank] * values[:rank], right[:rank].T)
    vectors = []
    for (packed, scales), part in zip(reflected, kept, strict=True):
        padded = torch.zeros(packed.shape[0], part.shape[1], dtype=torch.float64)
        padded[: part.shape[0]] = part
        vectors.append(torch.ormqr(packed, scales, padded).to(delta.left.dtype))
    squares = values.square()
    return LowRank(vectors[0], vectors[1].T), float(squares[rank:].sum()), float(squares.sum())


def _insert(model: Any, name: str, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Add the adapter as PEFT loads one; nothing is left of it where that fails."""
    from peft import LoraConfig, set_peft_model_state_dict

    try:
        words = {key: value for key, value in config.items() if key != "peft_type"}
        model.add_adapter(name, LoraConfig(**words))
        left_out = set_peft_model_state_dict(model, tensors, adapter_name=name).unexpected_keys
        if left_out:
            raise ParameterError(f"PEFT has no place for {len(left_out)} of the sum's tensors (first: {left_out[0]})")
    except Exception:
        if name in model.peft_config:
            model.delete_adapter(name)
        raise
