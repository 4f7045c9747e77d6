"""Changes of weights written as a PEFT LoRA directory that loads without this package."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from .adapter import CONFIG_FILE, PREFIX, WEIGHT_FILES, Adapter, Layout
from .checkpoint import Checkpoint
from .delta import Delta, Dora, LowRank, dense
from .errors import ParameterError
from .output import contains_only, write_json

OUR_FILES = (CONFIG_FILE, "adapter_model*", "README.md", ".gitattributes")


@dataclass(frozen=True)
class Template:
    """What a merged adapter takes over from its sources: where the factors go, and the configuration's words."""

    layouts: dict[str, Layout]
    bias_modules: dict[str, str]
    config: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, adapters: Sequence[Adapter], base_id: str) -> Template:
        """The union of the adapters' modules. A word on which they disagree (the task type) is left out."""
        layouts = {name: layout for a in reversed(adapters) for name in a.names if (layout := a.layout(name))}
        biases = {name: module for a in adapters for name in a.names if (module := a.module_of_bias(name))}
        config: dict[str, Any] = {"base_model_name_or_path": base_id}
        for word in ("task_type", "auto_mapping"):
            values = [adapter.config.get(word) for adapter in adapters]
            if all(value == values[0] for value in values):
                config[word] = values[0]
        return cls(layouts, biases, config)


def adapter_tensors(
    changes: Mapping[str, Delta], template: Template, base: Checkpoint, dtype: torch.dtype = torch.float32
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the configuration of a PEFT adapter that makes exactly these changes.

    Args:
        changes: by name of the base's tensors: low-rank ones for modules of the template, dense ones for saved modules
            and biases. With a Dora among them all modules become DoRA, which represents any sum of such changes.
        dtype: of the factors; magnitudes and saved modules stay in float32 and in the base's dtype.
    """
    factored = {name: delta for name, delta in changes.items() if name in template.layouts}
    others = {name: delta for name, delta in changes.items() if name not in template.layouts}
    dora = any(isinstance(delta, Dora) for delta in factored.values())
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for name, delta in factored.items():
        layout = template.layouts[name]
        low, magnitude = _as_dora(delta, base.read(name)) if dora else (_low_rank(delta, name), None)
        ranks[layout.module] = max(1, low.rank)
        tensors |= _factors(layout, _padded(low), dtype)
        if magnitude is not None:
            tensors[f"{PREFIX}{layout.module}.lora_magnitude_vector"] = magnitude.to(torch.float32)
    saved = _saved_modules(others, template, base, tensors, factored)
    return tensors, _config(template, ranks, dora, saved)


def write_adapter(directory: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """adapter_model.safetensors and adapter_config.json into an existing directory."""
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, directory / WEIGHT_FILES[0], {"format": "pt"}
    )
    write_json(directory / CONFIG_FILE, dict(config))


def is_adapter_directory(directory: Path) -> bool:
    """Whether a directory holds an adapter and nothing else: what a merged adapter may replace."""
    return (directory / CONFIG_FILE).is_file() and contains_only(directory, OUR_FILES)


def _low_rank(delta: Delta, name: str) -> LowRank:
    if not isinstance(delta, LowRank):
        raise ParameterError(f"the change of {name} is not low-rank; truncate it first, or write a full checkpoint")
    return delta


def _as_dora(delta: Delta, base: Tensor) -> tuple[LowRank, Tensor]:
    """Factors L' R and magnitude mu with mu * rows of (W + L' R) / norm = W + change.

    W + diag(d) W + L R = diag(1 + d) (W + diag(1 + d)^-1 L R), whose rows DoRA normalises and scales by mu: exact
    unless a row is scaled to zero.
    """
    if isinstance(delta, Dora):
        factor = 1 + delta.scale
        low = LowRank(delta.low.left / factor[:, None], delta.low.right)
    else:
        assert isinstance(delta, LowRank)
        factor, low = torch.ones(delta.shape[0]), delta
    updated = base.reshape(low.shape).to(torch.float32) + low.left @ low.right
    return low, factor * updated.norm(dim=1)


def _padded(delta: LowRank) -> LowRank:
    """PEFT has no rank 0: a module that does not change gets one component of zeros."""
    if delta.rank:
        return delta
    return LowRank(torch.zeros(delta.shape[0], 1), torch.zeros(1, delta.shape[1]))


def _factors(layout: Layout, delta: LowRank, dtype: torch.dtype) -> dict[str, Tensor]:
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


def _saved_modules(
    others: Mapping[str, Delta],
    template: Template,
    base: Checkpoint,
    tensors: dict[str, Tensor],
    factored: Mapping[str, Delta],
) -> dict[str, Any]:
    """Add LoRA biases and saved modules to ``tensors``; return the words they need in the configuration."""
    words: dict[str, Any] = {}
    if any(name in template.bias_modules for name in others):
        words["lora_bias"] = True
        wanted = {
            template.bias_modules[n]: dense(d, torch.float32) for n, d in others.items() if n in template.bias_modules
        }
        for name, delta in factored.items():
            layout = template.layouts[name]
            size = delta.shape[1] if layout.kind == "conv1d" else delta.shape[0]
            tensors[f"{PREFIX}{layout.module}.lora_B.bias"] = wanted.get(layout.module, torch.zeros(size))
    modules = set()
    for name, delta in others.items():
        if name in template.bias_modules:
            continue
        value = (base.read(name).to(torch.float64) + dense(delta).reshape(base.tensors[name].shape)).to(
            base.tensors[name].dtype
        )
        module, _, leaf = name.rpartition(".")
        if leaf == "bias" and f"{module}.weight" in template.layouts:
            words["bias"] = "all"
            tensors[f"{PREFIX}{module}.base_layer.bias"] = value
        else:
            modules.add(module)
            tensors[f"{PREFIX}{name}"] = value
    for module in modules:  # PEFT loads a saved module whole
        for name in base.tensors:
            if name.rpartition(".")[0] == module and f"{PREFIX}{name}" not in tensors:
                tensors[f"{PREFIX}{name}"] = base.read(name)
    if modules:
        words["modules_to_save"] = sorted(modules)
    return words


def _config(template: Template, ranks: Mapping[str, int], dora: bool, words: Mapping[str, Any]) -> dict[str, Any]:
    """alpha = r everywhere, so that every scaling is 1 and the factors are the change."""
    common = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
    pattern = {module: rank for module, rank in ranks.items() if rank != common}
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
        **words,
    }
