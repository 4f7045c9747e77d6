"""An exact add_weighted_adapter: a new adapter whose effect is the weighted sum of others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from tvbases_hf.algebra.delta import Delta
from tvbases_hf.algebra.rank import RankRule
from tvbases_hf.algebra.sums import total
from tvbases_hf.errors import ParameterError
from tvbases_hf.merging.fit import Errors, Limits
from tvbases_hf.models.adapter import Adapter
from tvbases_hf.models.lora_files import Template, adapter_tensors
from tvbases_hf.models.positions import groups_of

from .loaded import DenseAdapter, task_vectors

if TYPE_CHECKING:
    from peft import PeftModel


def add_weighted_adapter(
    model: PeftModel, adapters: Sequence[str], weights: Sequence[float], adapter_name: str, *, rank: int | None = None
) -> float:
    """Add the adapter sum_i w_i adapter_i to the model, next to them; the active adapter stays what it is.

    PEFT's method of this name is exact for plain LoRA only (huggingface/peft issue 3761). This one is exact, at the
    sum of the ranks, for ranks, alphas, rsLoRA, targets, LoRA biases, saved modules and DoRA in any mixture. With DoRA
    among them all modules of the sum are DoRA; a weight stored as [in, out] (Conv1D, embeddings), whose columns DoRA
    scales, then takes factors of full rank.

    Args:
        weights: any finite numbers; negative ones subtract.
        rank: of every module of the sum, which is then the closest of that rank (the row scaling of DoRA aside).

    Returns:
        |sum - adapter| / |sum| over all weights; unless truncated, what rounding costs at most.

    Raises:
        MissingExtraError: PEFT is not installed.
        ParameterError: a name that is unknown or taken, weights that do not fit, a sum that PEFT cannot express.
        CheckpointError: an adapter that is no change of weights (see task_vectors). The model is unchanged then.
    """
    shares = _checked(adapters, weights, rank)
    vectors = task_vectors(model, list(shares))
    if adapter_name in model.peft_config:
        raise ParameterError(f'there is an adapter "{adapter_name}" already; choose another name')
    sources = [source for source in vectors.models.values() if isinstance(source, Adapter)]
    for source in sources:
        if isinstance(source, DenseAdapter):
            raise ParameterError(
                f'"{source.label}": {source.config["peft_type"]} adapter; only LoRA and DoRA are added'
            )
    template = Template.of(sources, sources[0].base_id)
    limits, errors = (
        Limits(None if rank is None else RankRule("absolute", rank)),
        Errors(groups_of(vectors.base.tensors)),
    )
    changes: dict[str, Delta] = {}
    for name in vectors.names:
        inputs = vectors.deltas(name)
        change = total(inputs, list(shares.values()))
        changes[name] = limits.fit(name, change, inputs, vectors.base, template)
        errors.add(name, change, changes[name])
    tensors, config = adapter_tensors(changes, template, vectors.base)
    if config["bias"] != "none":
        raise ParameterError("LoRA biases cannot be added to DoRA in a loaded model: PEFT has no adapter with both")
    _insert(model, adapter_name, tensors, config)
    return errors.relative()["all"]


def _checked(adapters: Sequence[str], weights: Sequence[float], rank: int | None) -> dict[str, float]:
    """The weight of each adapter; those of one that is given twice are added."""
    if not adapters or len(adapters) != len(weights):
        raise ParameterError(f"{len(adapters)} adapters but {len(weights)} weights; give one weight to each")
    for weight in weights:
        if not math.isfinite(weight):
            raise ParameterError(f"weight {weight} is not a finite number")
    if rank is not None and (rank != int(rank) or rank < 1):
        raise ParameterError(f"rank {rank} is not a positive whole number")
    shares: dict[str, float] = {}
    for name, weight in zip(adapters, weights, strict=True):
        shares[name] = shares.get(name, 0.0) + float(weight)
    return shares


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
