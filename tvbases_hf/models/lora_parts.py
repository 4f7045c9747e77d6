"""What the tensors of an adapter file are, by their names: factors of modules, trained tokens, or saved modules."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ..errors import CheckpointError
from ..storage.checkpoint import Checkpoint
from ..storage.tensors import TensorInfo
from .lora_config import CONFIG_FILE, LoraOptions

PREFIX = "base_model.model."
MAGNITUDE = "lora_magnitude_vector"
BIAS = "lora_B.bias"
TOKENS = "token_adapter.trainable_tokens_delta"
# Modules that PEFT can tie to one another when they are saved (peft.utils.constants.EMBEDDING_LAYER_NAMES).
TIED_BY_PEFT = ("embed_tokens", "lm_head")
PAIRS = (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B"))
FACTOR = re.compile(
    r"^(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:\.(?P<kind>weight|bias))?$"
)
# Where a model in memory has the names of its adapters, which PEFT leaves out when it saves one of them.
NAMED = re.compile(
    r"\.(?:lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|modules_to_save|trainable_tokens_delta)"
    r"(\.(?!weight$|bias$)[^.]+)(?=\.|$)"
)


@dataclass(frozen=True)
class Parts:
    """``factors`` {module: {part: stored name}}; ``tokens`` {module: stored name}, whole rows of its weight; ``saved``
    {name: stored name} of other tensors that are carried whole. Modules and names are without PEFT's prefix."""

    factors: dict[str, dict[str, str]] = field(default_factory=dict)
    tokens: dict[str, str] = field(default_factory=dict)
    saved: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, stored: Checkpoint, label: str) -> Parts:
        """Raises CheckpointError for what is not known, tensors without numbers, and two adapters in one file."""
        if not stored.tensors:
            raise CheckpointError(f'"{label}": the adapter holds no tensors')
        _refuse_empty(stored.tensors, label)
        parts = cls()
        for own, stored_name in own_names(stored.tensors, label).items():
            name = own.removeprefix(PREFIX)
            match = FACTOR.match(name)
            if match:
                part = match["part"] + (".bias" if match["kind"] == "bias" else "")
                parts.factors.setdefault(match["module"], {})[part] = stored_name
            elif name.endswith(f".{TOKENS}"):
                parts.tokens[name.removesuffix(f".{TOKENS}")] = stored_name
            elif "lora_" in name:
                raise CheckpointError(f'"{label}": tensor {stored_name} is of a LoRA variant that is not known here')
            else:
                parts.saved[name] = stored_name
        return parts


def own_names(names: Iterable[str], label: str) -> dict[str, str]:
    """{name without the adapter's name in it, as in ``lora_A.default.weight``: name}

    Raises CheckpointError for the names of more than one adapter.
    """
    found: dict[str, str] = {}
    adapters: dict[str, None] = {}
    for name in names:
        match = NAMED.search(name)
        if match:
            adapters[match[1].removeprefix(".")] = None
            own = name[: match.start(1)] + name[match.end(1) :]
            found[own.replace(".modules_to_save.", ".")] = name
        else:
            found[name] = name
    if len(adapters) > 1:
        raise CheckpointError(
            f'"{label}": holds {len(adapters)} adapters ({", ".join(list(adapters)[:5])}); save the one that you mean '
            "alone (save_pretrained(..., selected_adapters=[name]))"
        )
    return found


def _refuse_empty(tensors: Mapping[str, TensorInfo], label: str) -> None:
    """Shards of parallel training that nobody gathered have one dimension, of no numbers on most processes."""
    empty = [name for name, info in tensors.items() if not info.numel and len(info.shape) == 1]
    if empty:
        raise CheckpointError(
            f'"{label}": {len(empty)} of {len(tensors)} tensors hold no numbers (first: {empty[0]}): the training run '
            "saved nothing of them, because their shards (DeepSpeed ZeRO-3, FSDP) were not gathered. Save again with "
            "stage3_gather_16bit_weights_on_model_save or under deepspeed.zero.GatheredParameters"
        )


def check_parts(label: str, module: str, shapes: Mapping[str, tuple[int, ...]], options: LoraOptions) -> None:
    """One complete pair of factors, and nothing that the configuration denies or lacks; else CheckpointError.

    Args:
        shapes: of the module's tensors, by part.
    """
    where = f'"{label}": {module}'
    pair = PAIRS[any("embedding" in part for part in shapes)]
    missing = [part for part in pair if part not in shapes]
    if missing:
        raise CheckpointError(f"{where} has {', '.join(shapes)} but not {missing[0]}; the file is incomplete")
    extra = [part for part in shapes if part not in (*pair, MAGNITUDE, BIAS)]
    if extra:
        raise CheckpointError(f"{where} has {extra[0]}, which no variant that is known here has")
    for part, option, on in ((MAGNITUDE, "use_dora", options.use_dora), (BIAS, "lora_bias", options.lora_bias)):
        if (part in shapes) != on:
            raise CheckpointError(
                f"{where} has {part if part in shapes else f'no {part}'}, but {CONFIG_FILE} says {option}: "
                f"{str(on).lower()}; the two files do not belong together"
            )
    flat = [part for part in pair if len(shapes[part]) < 2]
    if flat:
        raise CheckpointError(f"{where}: {flat[0]} is no matrix (a part of a sharded one?); save the adapter again")
    outputs = shapes[pair[1]][0]
    if shapes.get(BIAS, (outputs,)) != (outputs,):
        raise CheckpointError(f"{where} has {outputs} outputs and a {BIAS} of {list(shapes[BIAS])}; save it again")
    rank, configured = shapes[pair[0]][0], options.rank_of(module)
    if rank < 1 or configured < 1:
        raise CheckpointError(f"{where} has rank 0, so it changes nothing; train or save it again")
    if rank != configured:
        raise CheckpointError(
            f"{where} has rank {rank} but {CONFIG_FILE} says {configured}, so its scaling is unknown; "
            "the two files do not belong together"
        )
