"""LoRA and DoRA adapters as low-rank task vectors: PEFT directories read exactly, or refused by name."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import Checkpoint, locate
from .delta import Delta, Dense, Dora, LowRank, dense
from .errors import CheckpointError, MismatchError

CONFIG_FILE = "adapter_config.json"
WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."
# Options that change what the factors mean; with any of them on, s B A is not the change of the weight.
UNSUPPORTED = (
    "use_qalora",
    "use_bdlora",
    "kasa_config",
    "monteclora_config",
    "arrow_config",
    "alora_invocation_tokens",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "velora_config",
    "megatron_config",
)
# Initialisations that change the base weights: the factors belong to the changed ones until they are converted.
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")
CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
CONV1D_NAMES = ("c_attn", "c_proj", "c_fc", "q_attn")
FACTOR = re.compile(
    r"^(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:\.(?P<kind>weight|bias))?$"
)


@dataclass(frozen=True)
class LoraModule:
    """Stored names of one module's factors; ``scaling`` is alpha / r, or alpha / sqrt(r) for rsLoRA."""

    module: str
    scaling: float
    rank: int
    parts: Mapping[str, str]

    @property
    def is_embedding(self) -> bool:
        return "lora_embedding_A" in self.parts


@dataclass(frozen=True)
class Layout:
    """How PEFT stores the factors of a weight: ``kind`` linear, conv1d (weight [in, out]), embedding or conv."""

    module: str
    kind: str
    kernel: tuple[int, ...] = ()


class Adapter:
    """One adapter over one base: ``names`` are the base's tensors it changes, ``delta`` gives a change.

    Factors are read when asked for. The base is read for DoRA and for saved modules only.
    """

    def __init__(self, label: str, config: Mapping[str, Any], stored: Checkpoint, base: Checkpoint) -> None:
        """Match every stored tensor to a tensor of the base.

        Raises:
            CheckpointError: a variant that is not a plain change of weights, or factors without their partners.
            MismatchError: a module that the base does not have, or factors of another shape.
        """
        self.label, self.config = label, dict(config)
        self._stored, self._base = stored, base
        _check_config(self.config, label)
        modules, saved = _group(stored, self.config, label)
        self._modules: dict[str, LoraModule] = {}
        self._biases: dict[str, LoraModule] = {}
        for module in modules:
            name = self._find(f"{module.module}.weight")
            self._modules[name] = module
            self._check_shapes(module, name)
            if "lora_B.bias" in module.parts:
                self._biases[self._find(f"{module.module}.bias", f"{label}: lora_bias")] = module
        self._saved = self._match_saved(saved)
        self.names = tuple(dict.fromkeys([*self._modules, *self._biases, *self._saved]))

    @classmethod
    def open(
        cls, source: str | Path, base: Checkpoint, *, revision: str | None = None, label: str | None = None
    ) -> Adapter:
        """Open a PEFT directory or Hub id. Pickled weights are read with ``weights_only`` and never run code."""
        label = label or str(source)
        path = locate(str(source), revision)
        config = read_config(path, label)
        file = next((path / name for name in WEIGHT_FILES if (path / name).is_file()), None)
        if file is None:
            raise CheckpointError(f'"{label}": {CONFIG_FILE} is here but not {WEIGHT_FILES[0]}; copy the weights too')
        return cls(label, config, Checkpoint.open(file, label=label), base)

    @property
    def base_id(self) -> str:
        """The base that the adapter says it was trained on; empty if it says nothing."""
        return str(self.config.get("base_model_name_or_path") or "")

    @property
    def rank(self) -> int:
        """The largest rank of any module."""
        return max((module.rank for module in self._modules.values()), default=0)

    def delta(self, name: str) -> Delta | None:
        """The change of the base's tensor ``name``; None where the adapter changes nothing.

        Convolutions are flattened to [out, in * kernel], as PEFT does.
        """
        if name in self._modules:
            return self._low_rank(self._modules[name], name)
        saved = Dense(self._stored.read(self._saved[name]), self._base.read(name)) if name in self._saved else None
        if name not in self._biases:
            return saved
        module = self._biases[name]
        bias = module.scaling * self._stored.read(module.parts["lora_B.bias"]).to(torch.float32)
        return Dense(bias if saved is None else bias + dense(saved).to(torch.float32))

    def layout(self, name: str) -> Layout | None:
        """How the factors of a weight are stored; None for biases, saved modules and what the adapter lacks."""
        module = self._modules.get(name)
        if module is None:
            return None
        if module.is_embedding:
            return Layout(module.module, "embedding")
        kernel = tuple(self._stored.tensors[module.parts["lora_A"]].shape[2:])
        kind = "conv" if kernel else "conv1d" if self._is_transposed(module) else "linear"
        return Layout(module.module, kind, kernel)

    def module_of_bias(self, name: str) -> str | None:
        """The targeted module whose LoRA bias changes the base's tensor ``name``."""
        return self._biases[name].module if name in self._biases else None

    @property
    def has_dora(self) -> bool:
        return any("lora_magnitude_vector" in module.parts for module in self._modules.values())

    def _low_rank(self, module: LoraModule, name: str) -> Delta:
        first, second = ("lora_embedding_A", "lora_embedding_B") if module.is_embedding else ("lora_A", "lora_B")
        a = self._stored.read(module.parts[first]).to(torch.float32)
        b = self._stored.read(module.parts[second]).to(torch.float32)
        product = LowRank(module.scaling * b.reshape(b.shape[0], -1), a.reshape(a.shape[0], -1))
        if "lora_magnitude_vector" in module.parts:
            magnitude = self._stored.read(module.parts["lora_magnitude_vector"]).to(torch.float32).reshape(-1)
            return self._dora(product, magnitude, name, module)
        return _transposed(product) if self._is_transposed(module) else product

    def _dora(self, product: LowRank, magnitude: Tensor, name: str, module: LoraModule) -> Dora:
        if self._is_transposed(module) or module.is_embedding:
            raise CheckpointError(
                f'"{self.label}": DoRA on {module.module}, whose weight is stored transposed; not supported'
            )
        base = self._base.read(name)
        updated = base.reshape(product.shape).to(torch.float32) + product.left @ product.right
        factor = magnitude / updated.norm(dim=1)
        return Dora(factor - 1, base, LowRank(factor[:, None] * product.left, product.right))

    def _is_transposed(self, module: LoraModule) -> bool:
        """Whether the base stores this weight as [in, out]: embeddings, and the Conv1D layers of GPT-2 and its kin.

        The factors' shapes tell; for square weights PEFT's ``fan_in_fan_out`` does, which PEFT however resets when
        the adapter has ordinary linear layers too, so that the base's kind has a say as well.
        """
        if module.is_embedding:
            return True
        rows = self._stored.tensors[module.parts["lora_B"]].shape[0]
        columns = math.prod(self._stored.tensors[module.parts["lora_A"]].shape[1:])
        if rows != columns:
            shape = self._base.tensors[self._find(f"{module.module}.weight")].shape
            return len(shape) == 2 and shape == (columns, rows)
        is_conv1d = (
            self._base.config.get("model_type") in CONV1D_MODELS and module.module.split(".")[-1] in CONV1D_NAMES
        )
        return bool(self.config.get("fan_in_fan_out")) or is_conv1d

    def _find(self, name: str, what: str | None = None) -> str:
        """The base's name of an adapter's tensor: the same, or the only one with another prefix."""
        if name in self._base.tensors:
            return name
        tail = [own for own in self._base.tensors if own.endswith(f".{name}") or name.endswith(f".{own}")]
        if len(tail) == 1:
            return tail[0]
        raise MismatchError(
            f'"{what or self.label}" changes {name}, which the base ({self._base.label}) '
            f"{'has more than once' if tail else 'does not have'}; give the base that the adapter was trained on"
            + (f" ({self.base_id})" if self.base_id else "")
        )

    def _check_shapes(self, module: LoraModule, name: str) -> None:
        first, second = ("lora_embedding_A", "lora_embedding_B") if module.is_embedding else ("lora_A", "lora_B")
        a, b = (self._stored.tensors[module.parts[part]].shape for part in (first, second))
        rows, columns = b[0], math.prod(a[1:])
        found = (columns, rows) if self._is_transposed(module) else (rows, columns)
        shape = self._base.tensors[name].shape
        flat = (shape[0], math.prod(shape[1:]))
        if found != flat or math.prod(b[1:]) != a[0]:
            raise MismatchError(
                f'"{self.label}": the factors of {module.module} make a change of shape {list(found)} '
                f"but the base's weight ({self._base.label}) is {list(flat)}; give the base it was trained on"
            )

    def _match_saved(self, saved: Mapping[str, str]) -> dict[str, str]:
        """Saved modules and biases, by the base's name. PEFT stores targeted embeddings too: a copy changes nothing."""
        found = {}
        for name, stored in saved.items():
            own = self._find(name.replace(".base_layer.", "."))
            if self._stored.tensors[stored].shape != self._base.tensors[own].shape:
                raise MismatchError(
                    f'"{self.label}": saved module {name} is {list(self._stored.tensors[stored].shape)}, in the base '
                    f"({self._base.label}) it is {list(self._base.tensors[own].shape)}; resize the base first"
                )
            if own not in self._modules:
                found[own] = stored
            elif not torch.equal(self._stored.read(stored), self._base.read(own)):
                raise MismatchError(
                    f'"{self.label}": carries its own copy of {own}, which differs from the base ({self._base.label}); '
                    "give the base that the adapter was trained on"
                )
        return found


def is_adapter(source: str | Path) -> bool:
    """Whether a local directory is a PEFT adapter."""
    return (Path(source).expanduser() / CONFIG_FILE).is_file()


def read_config(path: Path, label: str) -> dict[str, Any]:
    """adapter_config.json; CheckpointError when it is absent or not JSON."""
    file = path / CONFIG_FILE
    if not file.is_file():
        present = [name for name in WEIGHT_FILES if (path / name).is_file()]
        detail = f"{present[0]} is here but not {CONFIG_FILE}" if present else f"it has no {CONFIG_FILE}"
        raise CheckpointError(f'"{label}": not a PEFT adapter: {detail}')
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("not an object")
        return config
    except ValueError as error:
        raise CheckpointError(f'"{label}": {CONFIG_FILE} is damaged: {error}') from error


def _check_config(config: Mapping[str, Any], label: str) -> None:
    kind = str(config.get("peft_type", "")).upper()
    if kind != "LORA":
        raise CheckpointError(
            f'"{label}": {kind or "not a known kind of"} adapter; only LoRA and DoRA are plain changes of weights'
        )
    used = [name for name in UNSUPPORTED if config.get(name)]
    if used:
        raise CheckpointError(
            f'"{label}": uses {", ".join(used)}, which changes more than the weights by s B A; '
            "merge it with PEFT (merge_and_unload) and give the full checkpoint"
        )
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(BASE_CHANGING_INITS):
        raise CheckpointError(
            f'"{label}": initialised with {init}, which also changed the base; save it converted '
            "(save_pretrained(..., path_initial_model_for_weight_conversion=...)) and try again"
        )


def _group(stored: Checkpoint, config: Mapping[str, Any], label: str) -> tuple[list[LoraModule], dict[str, str]]:
    """Modules with factors, and other saved tensors by module name. Anything unknown is refused."""
    parts: dict[str, dict[str, str]] = {}
    saved: dict[str, str] = {}
    for stored_name in stored.tensors:
        name = stored_name.removeprefix(PREFIX)
        match = FACTOR.match(name)
        if match:
            part = match["part"] + (".bias" if match["kind"] == "bias" else "")
            parts.setdefault(match["module"], {})[part] = stored_name
        elif "lora_" in name:
            raise CheckpointError(f'"{label}": tensor {stored_name} is of a LoRA variant that is not known here')
        else:
            saved[name] = stored_name
    modules = [_module(name, found, stored, config, label) for name, found in parts.items()]
    if not modules and not saved:
        raise CheckpointError(f'"{label}": the adapter holds no tensors')
    return modules, saved


def _module(
    name: str, parts: Mapping[str, str], stored: Checkpoint, config: Mapping[str, Any], label: str
) -> LoraModule:
    pair = ("lora_embedding_A", "lora_embedding_B") if "lora_embedding_A" in parts else ("lora_A", "lora_B")
    missing = [part for part in pair if part not in parts]
    if missing:
        raise CheckpointError(f'"{label}": {name} has {", ".join(parts)} but not {missing[0]}; the file is incomplete')
    rank = stored.tensors[parts[pair[0]]].shape[0]
    configured = int(_pattern(config.get("rank_pattern"), name, config.get("r", 0)))
    if rank == 0 or configured == 0:
        raise CheckpointError(f'"{label}": {name} has rank 0, so it changes nothing; train or save it again')
    if rank != configured:
        raise CheckpointError(
            f'"{label}": {name} has rank {rank} but {CONFIG_FILE} says {configured}, so its scaling is unknown; '
            "the two files do not belong together"
        )
    alpha = float(_pattern(config.get("alpha_pattern"), name, config.get("lora_alpha", rank)))
    scaling = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return LoraModule(name, scaling, rank, parts)


def _pattern(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that matches the end of the module's name, at a dot."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def _transposed(delta: LowRank) -> LowRank:
    return LowRank(delta.right.T, delta.left.T)
