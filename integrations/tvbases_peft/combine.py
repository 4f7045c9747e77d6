"""An exact add_weighted_adapter: a new adapter whose effect is the weighted sum of others."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tvbases_hf.algebra.delta import Delta, Dense, dense
from tvbases_hf.algebra.rank import RankRule
from tvbases_hf.algebra.sums import total
from tvbases_hf.errors import ParameterError, did_you_mean
from tvbases_hf.merging.fit import Errors, Limits
from tvbases_hf.models.adapter import Adapter
from tvbases_hf.models.lora_files import adapter_tensors
from tvbases_hf.models.lora_parts import PREFIX, TOKENS
from tvbases_hf.models.lora_template import Template
from tvbases_hf.models.positions import groups_of

from .loaded import method_of, task_vectors, token_wrappers

if TYPE_CHECKING:
    from peft import PeftModel


SUMS = ("svd", "linear", "cat")
# What PEFT calls its methods, and the functions in its merge_utils; "_svd" behind a name means the same here.
SPARSE = ("ties", "dare_ties", "dare_linear", "magnitude_prune")


def add_weighted_adapter(
    model: PeftModel,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str = "svd",
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
    svd_full_matrices: bool = True,
    svd_driver: str | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
    *,
    rank: int | None = None,
) -> float:
    """Add the adapter sum_i w_i adapter_i to the model, next to them; the active adapter stays what it is.

    PEFT's method of this name takes the same arguments, and is exact for plain LoRA only (huggingface/peft issue 3761).
    This one is exact, at the sum of the ranks, for ranks, alphas, rsLoRA, targets, LoRA biases, saved modules, trained
    tokens, parameters and DoRA in any mixture. With DoRA among them all modules of the sum are DoRA; a weight stored as
    [in, out] (Conv1D, embeddings), whose columns DoRA scales, then takes factors of full rank.

    Args:
        weights: any finite numbers; negative ones subtract.
        combination_type: ``svd``, ``linear`` and ``cat`` are that sum, of which PEFT's ``linear`` multiplies sums of
            factors instead. ``ties``, ``dare_ties``, ``dare_linear`` and ``magnitude_prune``, with ``_svd`` behind them
            or without, are PEFT's own functions of the changes of weights, at ``svd_rank``.
        svd_rank: of every module, which is then the closest of that rank (the row scaling of DoRA aside). By default
            sums keep all of theirs, and the others the largest rank of the adapters. ``rank`` is another word for it.
        svd_clamp: None; clamped factors make another change.
        svd_full_matrices, svd_driver: PEFT's, without effect on the result.
        density: the share of numbers that the methods other than sums keep, above 0 and at most 1.
        majority_sign_method: ``total`` or ``frequency``, of TIES.

    Returns:
        |sum - adapter| / |sum| over all weights; unless truncated, what rounding costs at most.

    Raises:
        MissingExtraError: PEFT is not installed.
        ParameterError: a name that is unknown or taken, weights that do not fit, a sum that PEFT cannot express.
        CheckpointError: an adapter that is no change of weights (see task_vectors). The model is unchanged then.
    """
    rank = svd_rank if rank is None else rank
    shares = _checked(adapters, weights, rank)
    if svd_clamp is not None:
        raise ParameterError(f"svd_clamp {svd_clamp} would make another change than the one asked for; leave it out")
    combine = _combination(combination_type, density, majority_sign_method)
    vectors = task_vectors(model, list(shares))
    if adapter_name in model.peft_config:
        raise ParameterError(f'there is an adapter "{adapter_name}" already; choose another name')
    _check_methods(model)
    sources = [source for source in vectors.models.values() if isinstance(source, Adapter)]
    if combine is not None and len(sources) > 1 and rank is None:
        rank = max(1, *(source.rank for source in sources))
    template = Template.of(sources, sources[0].base_id)
    limits = Limits(None if rank is None else RankRule("absolute", rank))
    errors, changes = Errors(groups_of(vectors.base.tensors)), {}
    for name in vectors.names:
        inputs = vectors.deltas(name)
        made = total if combine is None or len(inputs) == 1 else combine
        change = made(inputs, [*shares.values()])
        changes[name] = limits.fit(name, change, inputs, vectors.base, template)
        errors.add(name, change, changes[name])
    tensors, config = adapter_tensors(changes, template, vectors.base)
    if config["bias"] != "none":
        raise ParameterError("LoRA biases cannot be added to DoRA, nor biases of other methods, in a loaded model")
    _leave_tied_tokens(model, tensors, config)
    _take_over_parameters(model, config)
    _insert(model, adapter_name, tensors, config)
    return errors.relative()["all"]


def _combination(kind: str, density: float | None, sign: str) -> Callable[[list[Delta], list[float]], Delta] | None:
    """PEFT's function of the changes of one weight; None for their sum."""
    name = kind.removesuffix("_svd")
    if kind in SUMS:
        return None
    if name not in SPARSE:
        known = [*SUMS, *SPARSE, *(f"{own}_svd" for own in SPARSE)]
        raise ParameterError(f'no combination_type "{kind}"{did_you_mean(kind, known)}; there are {", ".join(known)}')
    if density is None or not 0 < density <= 1:
        raise ParameterError(f"{kind} needs a density above 0 and at most 1, not {density}")
    if sign not in ("total", "frequency"):
        raise ParameterError(f'majority_sign_method must be total or frequency, not "{sign}"')
    from peft.utils import merge_utils

    words = {"majority_sign_method": sign} if name.endswith("ties") else {}

    def combine(inputs: list[Delta], shares: list[float]) -> Delta:
        whole = [dense(delta, torch.float32) for delta in inputs]
        return Dense(getattr(merge_utils, name)(whole, torch.tensor(shares), density=density, **words))

    return combine


def _check_methods(model: Any) -> None:
    for name, held in model.peft_config.items():
        if method_of(held) != "LORA":
            raise ParameterError(
                f'"{name}": {method_of(held)} adapter; only LoRA and DoRA are added in a loaded model, since PEFT '
                "keeps adapters of one method in it. Add the saved adapters: tvbases merge --adapter"
            )


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


def _leave_tied_tokens(model: Any, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Of an output that is tied to the embedding PEFT takes the trained tokens from there."""
    for path, wrapper in token_wrappers(model):
        if wrapper.token_adapter.tied_adapter is not None:
            tensors.pop(f"{PREFIX}{path}.{TOKENS}", None)
            config.get("trainable_token_indices", {}).pop(path, None)


def _take_over_parameters(model: Any, config: dict[str, Any]) -> None:
    """PEFT wants all adapters of a model to name their parameters alike."""
    named = [set(held.target_parameters) for held in model.peft_config.values() if held.target_parameters]
    if named and "target_parameters" in config and all(names == named[0] for names in named):
        config["target_parameters"] = sorted(named[0])


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
