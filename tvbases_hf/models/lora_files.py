"""Changes of weights written as a PEFT LoRA directory that loads without this package."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..algebra.delta import Delta, LowRank, dense, zeros
from ..algebra.dtypes import promoted
from ..algebra.finite import count_not_finite
from ..errors import ParameterError
from ..storage.cards import CARD
from ..storage.checkpoint import Checkpoint, TensorInfo
from ..storage.output import contains_only, write_json
from ..storage.tensor_files import ONE_FILE, TensorFiles, metadata_of
from ..storage.tied import leaf
from ..version import library_version
from .layouts import TRANSPOSED, Layout
from .lora_config import CONFIG_FILE, WEIGHT_FILES
from .lora_parts import BIAS, MAGNITUDE, PREFIX, TIED_BY_PEFT, TOKENS
from .lora_template import Template, owners
from .parameters import Parameter, assembled, stored_module

OUR_FILES = (CONFIG_FILE, WEIGHT_FILES[0], CARD, ".gitattributes")
# In the header of the weights: an adapter that was trained has the same files as one that we wrote.
MARK = "tvbases_hf"
STEM = WEIGHT_FILES[0].removesuffix(".safetensors")
# A row of the base that is scaled by this share is as good as gone: less is left of it than its rounding.
SMALLEST_FACTOR = torch.finfo(torch.float32).eps / 8


def adapter_tensors(
    changes: Mapping[str, Delta], template: Template, base: Checkpoint, dtype: torch.dtype = torch.float32
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the configuration of a PEFT adapter that makes exactly these changes.

    Args:
        changes: by name of the base's tensors: low-rank ones for modules of the template, dense ones for saved modules
            and biases. With a Dora among them all modules become DoRA, which represents any sum of such changes.
        dtype: of the factors; magnitudes and saved modules stay in float32 and in the base's dtype.

    Raises ParameterError for a dense change of a module that no source carries whole, and where PEFT cannot express
    the changes in one adapter.
    """
    of_parameters = {name: delta for name, delta in changes.items() if name in template.parameters}
    factored = {n: delta for n, delta in changes.items() if n not in of_parameters and template.has_factors(n, delta)}
    others = {name: delta for name, delta in changes.items() if name not in factored and name not in of_parameters}
    dora = any(delta.row_scale is not None for delta in factored.values())
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    parameters = _parameter_factors(of_parameters, template, tensors, dtype)
    needed = factored or ({} if parameters else _placeholder(template, others, base))
    needed = needed if dora else {**needed, **_under_biases(template, others, needed, base)}
    for name, delta in needed.items():
        layout = template.layouts[name]
        low, magnitude = _as_dora(delta, base.read(name), layout) if dora else (_low_rank(delta, name), None)
        ranks[layout.module] = max(1, low.rank)
        tensors |= factors(layout, _padded(low), dtype)
        if magnitude is not None:
            shape = (1, -1, *(1 for _ in layout.kernel)) if layout.kind == "conv" else (-1,)
            tensors[f"{PREFIX}{layout.module}.{MAGNITUDE}"] = magnitude.to(torch.float32).reshape(shape)
    words = {} if dora else _lora_biases(others, template, needed, tensors)
    if parameters and (dora or words):
        raise ParameterError(
            f"{next(iter(parameters))} is a parameter, of which PEFT has no DoRA and no bias; write a full checkpoint"
        )
    if dora and (homeless := [n for n in others if n in template.bias_modules and n not in base.stored.tensors]):
        raise ParameterError(
            f"{len(homeless)} LoRA biases are of layers that have no bias in the base (first: {homeless[0]}), and PEFT "
            "has no DoRA with LoRA biases; leave the DoRA out, or the adapter with lora_bias"
        )
    beside = {*template.tokens, *(() if dora else template.bias_modules)}
    trained = {name: delta for name, delta in others.items() if name not in beside}
    words |= _trained_tokens(others, template, base, tensors)
    words |= _saved_tensors(trained, template, base, tensors, ranks)
    return tensors, config_of(template, ranks, dora, words, parameters)


def write_adapter(directory: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """adapter_model.safetensors and adapter_config.json into an existing directory.

    Raises ParameterError for numbers that are not finite once they are rounded.
    """
    for name, tensor in tensors.items():
        if lost := count_not_finite(tensor):
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise ParameterError(
                f"the adapter: {lost} of {tensor.numel()} numbers of {name} are infinite or NaN as {dtype}; write it "
                "as bfloat16 or float32, or make the change smaller"
            )
    infos = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    files = TensorFiles(directory, STEM, infos, ONE_FILE, {MARK: library_version()})
    for name, tensor in tensors.items():
        files.write(name, tensor)
    write_json(directory / CONFIG_FILE, dict(config))


def is_adapter_directory(directory: Path) -> bool:
    """Whether a directory holds an adapter that we wrote, and nothing else: what a new one may replace."""
    return contains_only(directory, OUR_FILES) and MARK in metadata_of(directory / WEIGHT_FILES[0])


def _placeholder(template: Template, others: Mapping[str, Delta], base: Checkpoint) -> dict[str, Delta]:
    """PEFT refuses an adapter without factors; one module that does not change makes it one."""
    free = [name for name in template.layouts if name not in others]
    if not free:
        raise ParameterError("PEFT has no adapter without low-rank factors; write a full checkpoint")
    return _zeros(base, free[:1])


def _under_biases(
    template: Template, others: Mapping[str, Delta], factored: Mapping[str, Delta], base: Checkpoint
) -> dict[str, Delta]:
    """A LoRA bias needs factors beside it: zeros for the modules that have a bias alone."""
    biased = {module for name, module in template.bias_modules.items() if name in others}
    return _zeros(base, [n for n, own in template.layouts.items() if own.module in biased and n not in factored])


def _zeros(base: Checkpoint, names: Sequence[str]) -> dict[str, Delta]:
    return {n: zeros((base.tensors[n].shape[0], math.prod(base.tensors[n].shape[1:]))) for n in names}


def _low_rank(delta: Delta, name: str) -> LowRank:
    if delta.low is None:
        raise ParameterError(f"the change of {name} is not low-rank; truncate it first, or write a full checkpoint")
    return delta.low


def _as_dora(delta: Delta, base: Tensor, layout: Layout) -> tuple[LowRank, Tensor]:
    """Factors L' R and magnitude mu with mu * rows of (W + L' R) / norm = W + change.

    W + diag(d) W + L R = diag(1 + d) (W + diag(1 + d)^-1 L R), whose rows DoRA normalises and scales by mu: exact, and
    within the rounding of W where a row is scaled to zero. PEFT's rows are the outputs, so a weight that is stored as
    [in, out] takes the norms of its columns; a change that scales its columns is Dense here, and refused.
    """
    low, factor = _low_rank(delta, f"{layout.module}.weight"), torch.ones(())
    if delta.row_scale is not None:
        factor = nonzero(1 + delta.row_scale)
        low = LowRank(low.left / factor[:, None], low.right)
    updated = base.reshape(low.shape) + dense(low, torch.promote_types(low.left.dtype, torch.float32))
    return low, factor * updated.norm(dim=0 if layout.kind in TRANSPOSED else 1)


def nonzero(factor: Tensor) -> Tensor:
    """``factor`` without zeros: DoRA divides by what it scales a row with, so it cannot make a row vanish."""
    floor = torch.full_like(factor, SMALLEST_FACTOR).copysign(factor)
    return torch.where(factor.abs() < SMALLEST_FACTOR, floor, factor)


def _padded(delta: LowRank) -> LowRank:
    """PEFT has no rank 0: a module that does not change gets one component of zeros."""
    if delta.rank:
        return delta
    return LowRank(torch.zeros(delta.shape[0], 1), torch.zeros(1, delta.shape[1]))


def factors(layout: Layout, delta: LowRank, dtype: torch.dtype) -> dict[str, Tensor]:
    prefix = f"{PREFIX}{layout.module}"
    left, right = delta.left.to(dtype), delta.right.to(dtype)
    match layout.kind:
        case "embedding":
            return {f"{prefix}.lora_embedding_A": left.T, f"{prefix}.lora_embedding_B": right.T}
        case "conv1d":
            left, right = right.T, left.T
        case "conv":
            ones = (1,) * len(layout.kernel)
            left = left.reshape(*left.shape, *ones)
            right = right.reshape(len(right), -1, *layout.kernel)
    return {f"{prefix}.lora_A.weight": right, f"{prefix}.lora_B.weight": left}


def _lora_biases(
    others: Mapping[str, Delta], template: Template, factored: Mapping[str, Delta], tensors: dict[str, Tensor]
) -> dict[str, Any]:
    """Add LoRA biases to ``tensors``: PEFT wants one for every module, or none. Embeddings cannot have one."""
    wanted = {
        template.bias_modules[n]: dense(d, torch.float32) for n, d in others.items() if n in template.bias_modules
    }
    if not wanted:
        return {}
    for name, delta in factored.items():
        layout = template.layouts[name]
        if layout.kind == "embedding":
            raise ParameterError(
                f"{next(iter(wanted))} has a LoRA bias and {layout.module} is an embedding; PEFT has no adapter with "
                "both. Write a full checkpoint"
            )
        size = delta.shape[1] if layout.kind == "conv1d" else delta.shape[0]
        tensors[f"{PREFIX}{layout.module}.{BIAS}"] = wanted.get(layout.module, torch.zeros(size))
    return {"lora_bias": True}


def _parameter_factors(
    changes: Mapping[str, Delta], template: Template, tensors: dict[str, Tensor], dtype: torch.dtype
) -> dict[str, int]:
    """Add factors of parameters to ``tensors``; their ranks by the names of the parameters."""
    found, ranks = assembled(template.parameters, changes), {}
    modules: dict[str, list[Parameter]] = {}
    for parameter in sorted(found, key=lambda own: own.index):
        modules.setdefault(parameter.module, []).append(parameter)
    for module, held in modules.items():
        for index, parameter in enumerate(held):
            stack = found[parameter]
            prefix = f"{PREFIX}{template.naming.strip}{stored_module(module, index, len(held))}"
            a, b = parameter.factors(stack)
            tensors |= {f"{prefix}.lora_A.weight": a.to(dtype), f"{prefix}.lora_B.weight": b.to(dtype)}
            ranks[f"{template.naming.strip}{parameter.name}"] = stack.left.shape[2]
    return ranks


def _trained_tokens(
    others: Mapping[str, Delta], template: Template, base: Checkpoint, tensors: dict[str, Tensor]
) -> dict[str, Any]:
    """Add rows of embeddings to ``tensors``, as PEFT has them: the new rows, float32 at least."""
    indices: dict[str, list[int]] = {}
    for name, rows in template.tokens.items():
        if name in others:
            module, own = template.naming.to_adapter(name).removesuffix(".weight"), base.read(name)
            indices[module] = list(rows)
            changed = own[list(rows)].double() + dense(others[name])[list(rows)]
            tensors[f"{PREFIX}{module}.{TOKENS}"] = changed.to(promoted(own.dtype, torch.float32))
    return {"trainable_token_indices": indices} if indices else {}


def _saved_tensors(
    trained: Mapping[str, Delta],
    template: Template,
    base: Checkpoint,
    tensors: dict[str, Tensor],
    ranks: Mapping[str, int],
) -> dict[str, Any]:
    """Add whole tensors to ``tensors``, as biases or as saved modules; return the words for the configuration."""
    names = {name: template.naming.to_adapter(name) for name in base.tensors}
    modules = {template.module_to_save(name) for name in template.head}
    tensors |= {f"{PREFIX}{name}": tensor for name, tensor in template.head.items()}
    words: dict[str, Any] = {}
    for name, delta in trained.items():
        module, _, own = names[name].rpartition(".")
        inner = ".base_layer" if module in ranks else ""
        if own == "bias" and f"{name.rpartition('.')[0]}.weight" not in trained:
            words["bias"] = "all"
        elif module and not inner:
            modules.add(template.module_to_save(names[name]))
        else:
            raise ParameterError(f"PEFT cannot save {name} by itself; write a full checkpoint")
        tensors[f"{PREFIX}{module}{inner}.{own}"] = _sum(base, name, delta)
    for name, output in template.twins.items():
        if name in trained:
            modules.add(template.module_to_save(output))
            tensors[f"{PREFIX}{output}"] = tensors[f"{PREFIX}{names[name]}"]
            words |= {"ensure_weight_tying": True} if {leaf(output), leaf(name)} <= set(TIED_BY_PEFT) else {}
    clash = [module for module in ranks if _is_saved(f"{module}.weight", modules)]
    if clash:
        raise ParameterError(
            f"{clash[0]} has factors and belongs to a module that is saved whole, by PEFT's rule for the ends of "
            "names; write a full checkpoint"
        )
    for name, own in names.items():
        if _is_saved(own, modules):
            tensors.setdefault(f"{PREFIX}{own}", base.read(name))
    return words | ({"modules_to_save": sorted(modules)} if modules else {})


def _is_saved(name: str, modules: set[str]) -> bool:
    """PEFT takes every module whose name ends like a saved one for a saved one, and wants all of its tensors."""
    return any(owner.endswith(saved) for owner in owners(name) for saved in modules)


def _sum(base: Checkpoint, name: str, delta: Delta) -> Tensor:
    info = base.tensors[name]
    return (base.read(name).to(torch.float64) + dense(delta).reshape(info.shape)).to(info.dtype)


def config_of(
    template: Template,
    ranks: Mapping[str, int],
    dora: bool,
    words: Mapping[str, Any],
    parameters: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """alpha = r everywhere, so that every scaling is 1 and the factors are the change."""
    parameters = parameters or {}
    every = {**ranks, **parameters}
    common = Counter(every.values()).most_common(1)[0][0]
    # PEFT matches patterns with the ends of names: anchored, one cannot reach a longer name.
    pattern = {f"^{module}": rank for module, rank in every.items() if rank != common}
    conv1d = any(layout.kind == "conv1d" for layout in template.layouts.values())
    return {
        "peft_type": "LORA",
        **template.config,
        "r": common,
        "lora_alpha": common,
        "rank_pattern": pattern,
        "alpha_pattern": dict(pattern),
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": conv1d,
        "use_rslora": False,
        "use_dora": dora,
        "init_lora_weights": True,
        "inference_mode": True,
        **({"target_parameters": sorted(parameters)} if parameters else {}),
        **words,
    }
