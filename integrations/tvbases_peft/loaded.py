"""Adapters loaded in a PeftModel as task vectors over the model's own weights, none of them copied."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tvbases_hf.algebra.delta import Delta, Dense
from tvbases_hf.errors import CheckpointError, MissingExtraError, ParameterError, did_you_mean
from tvbases_hf.models.adapter import Adapter
from tvbases_hf.models.names import Naming
from tvbases_hf.models.vectors import Vectors
from tvbases_hf.storage.checkpoint import Checkpoint, TensorInfo

if TYPE_CHECKING:
    from peft import PeftModel

# Methods whose get_delta_weight is what they add to the weight. It is not for others that have one: HiRA's is
# multiplied with the weight, that of OFT, BOFT and HRA is a rotation of it.
ADDITIVE = frozenset(
    {
        "ADALORA",
        "C3A",
        "DELORA",
        "FOURIERFT",
        "GRALORA",
        "LOHA",
        "LOKR",
        "RANDLORA",
        "SHIRA",
        "VBLORA",
        "VERA",
        "WAVEFT",
    }
)
# Variants of LoRA layers that compute (base + s B A) x, or DoRA's scaling of it.
PLAIN_VARIANTS = ("Dora", "MiCA")


def task_vectors(model: PeftModel, adapters: Sequence[str] | None = None) -> Vectors:
    """The task vectors of adapters (by default all) that are loaded in a PeftModel.

    LoRA and DoRA stay in their factors, with the scaling that the layers have now; LoHa, LoKr and other methods that
    add to the weight are dense, by PEFT's own get_delta_weight. The base is the model's own weights, borrowed. A
    matrix that the model uses twice has two names here, as in PEFT, which changes one use at a time.

    Raises:
        MissingExtraError: PEFT is not installed.
        ParameterError: no such adapter, or not a PeftModel.
        CheckpointError: an adapter that is no change of weights, merged, trained with biases, or on a quantised layer.
    """
    peft = import_peft()
    if not isinstance(model, (peft.PeftModel, peft.PeftMixedModel)):
        raise ParameterError(f"a PeftModel is needed, not {type(model).__name__}; load the adapter with PEFT first")
    names = list(model.peft_config) if adapters is None else list(dict.fromkeys(adapters))
    for name in names:
        if name not in model.peft_config:
            near = did_you_mean(name, model.peft_config)
            raise ParameterError(f'no adapter "{name}" is loaded{near}; there are {", ".join(model.peft_config)}')
    base, state = _base(model), model.state_dict()
    return Vectors.of_models(base, {name: _adapter(model, name, base, state) for name in names})


def import_peft() -> ModuleType:
    """PEFT, which may be absent."""
    try:
        import peft
    except ImportError as error:
        raise MissingExtraError(f'PEFT is needed ({error}); pip install "tvbases-hf[peft]"') from error
    return peft


class DenseAdapter(Adapter):
    """An adapter whose changes are computed one weight at a time, when asked for."""

    def __init__(
        self, label: str, config: Mapping[str, Any], base: Checkpoint, changes: Mapping[str, Callable[[], Delta]]
    ) -> None:
        self.label, self.config, self.naming = label, dict(config), Naming()
        self._base, self._changes = base, dict(changes)
        self._modules, self._biases, self._saved, self._head = {}, {}, {}, {}
        self.names = tuple(changes)

    def delta(self, name: str) -> Delta | None:
        """The change of the base's tensor ``name``, dense; None where the adapter changes nothing."""
        return self._changes[name]() if name in self._changes else None


def _adapter(model: Any, name: str, base: Checkpoint, state: Mapping[str, Tensor]) -> Adapter:
    config = model.peft_config[name]
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind != "LORA" and kind not in ADDITIVE:
        raise CheckpointError(f'"{name}": {kind} adapter; it is no sum of a weight and a change that PEFT can name')
    if getattr(config, "bias", "none") != "none":
        raise CheckpointError(
            f'"{name}": trained with bias="{config.bias}", so that the model no longer has the biases of the base; '
            "open the saved adapter instead"
        )
    layers = dict(_tuner_layers(model, name))
    for path, layer in layers.items():
        _check_layer(name, path, layer)
    if kind == "LORA":
        return _lora(model, name, base, layers, state)
    changes = {f"{path}.weight": _dense(layer, name) for path, layer in layers.items()} | _saved(model, name, base)
    return DenseAdapter(name, _words(config, kind), base, changes)


def _lora(model: Any, name: str, base: Checkpoint, layers: Mapping[str, Any], state: Mapping[str, Tensor]) -> Adapter:
    """The same reading as from files, with ranks and scalings as the layers have them."""
    from peft import get_peft_model_state_dict

    own = get_peft_model_state_dict(model, state_dict=dict(state), adapter_name=name, save_embedding_layers=False)
    config = model.peft_config[name]
    patterns = {f"^{re.escape(path)}": layer for path, layer in layers.items()}
    words = config.to_dict() | _words(config, "LORA")
    words |= {
        "rank_pattern": {pattern: layer.r[name] for pattern, layer in patterns.items()},
        "alpha_pattern": {pattern: layer.scaling[name] * layer.r[name] for pattern, layer in patterns.items()},
        "use_rslora": False,
        "target_modules": None,
        "exclude_modules": None,
        "init_lora_weights": True,  # whatever it did to the base, the base is the model's now
    }
    return Adapter(name, words, _checkpoint(name, own), base)


def _words(config: Any, kind: str) -> dict[str, Any]:
    """What is said of an adapter, as its file would say it."""
    task = getattr(config.task_type, "value", config.task_type)
    return {"peft_type": kind, "task_type": task, "base_model_name_or_path": config.base_model_name_or_path}


def _dense(layer: Any, name: str) -> Callable[[], Delta]:
    def change() -> Delta:
        with torch.no_grad():
            delta = layer.get_delta_weight(name).detach().cpu()
        return Dense(delta.to_dense() if delta.is_sparse else delta)

    return change


def _saved(model: Any, name: str, base: Checkpoint) -> dict[str, Callable[[], Delta]]:
    """Modules that the adapter carries whole."""
    from peft.utils.other import ModulesToSaveWrapper

    def change(own: str, tensor: Tensor) -> Callable[[], Delta]:
        return lambda: Dense(tensor.detach().cpu(), base.read(own))

    return {
        f"{path}.{key}": change(f"{path}.{key}", tensor)
        for path, wrapper in model.base_model.model.named_modules()
        if isinstance(wrapper, ModulesToSaveWrapper) and name in wrapper.modules_to_save
        for key, tensor in wrapper.modules_to_save[name].state_dict().items()
    }


def _check_layer(name: str, path: str, layer: Any) -> None:
    """Refuse what would make the reading wrong and cannot be seen in files."""
    base = layer.get_base_layer()
    reason = None
    if layer.merged:
        reason = f"the adapter {layer.merged_adapters[0]} is merged into it; call unmerge_adapter first"
    elif not re.fullmatch(r"peft\.tuners\.\w+\.layer", type(layer).__module__):
        reason = f"{type(layer).__module__} is not a layer of plain weights; dequantise the model first"
    elif any(step != 1 for step in getattr(base, "dilation", ())):
        reason = "LoRA leaves out the dilation of a convolution"
    elif getattr(base, "padding_mode", "zeros") != "zeros":
        reason = f"LoRA pads with zeros where the convolution has {base.padding_mode}"
    elif getattr(base, "max_norm", None) is not None:
        reason = "the embedding limits the norm of its rows"
    variant = type(getattr(layer, "lora_variant", {}).get(name)).__name__
    if variant != "NoneType" and not variant.startswith(PLAIN_VARIANTS):
        reason = f"its layers are of the variant {variant}, which is no plain change of the weight"
    if reason:
        raise CheckpointError(f'"{name}": {path}: {reason}')


def _tuner_layers(model: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Modules that have this adapter, by the base's name."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for path, module in model.base_model.model.named_modules():
        if isinstance(module, BaseTunerLayer) and any(
            name in held
            for attribute in module.adapter_layer_names
            if isinstance(held := getattr(module, attribute, None), (nn.ModuleDict, nn.ParameterDict))
        ):
            yield path, module


def _base(model: Any) -> Checkpoint:
    """The model's weights without adapters, under the names that the model has without PEFT."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    inner = model.base_model.model
    wrapped = {path: "base_layer" for path, module in inner.named_modules() if isinstance(module, BaseTunerLayer)}
    wrapped |= {
        path: "original_module"
        for path, module in inner.named_modules()
        if isinstance(module, AuxiliaryTrainingWrapper)
    }
    state = {
        own: tensor for name, tensor in inner.state_dict().items() if (own := _own_name(name, wrapped)) is not None
    }
    config = getattr(inner, "config", None)
    words = {"model_type": getattr(config, "model_type", None), "tie_word_embeddings": False}
    return _checkpoint("the loaded model", state, words)


def _own_name(name: str, wrapped: Mapping[str, str]) -> str | None:
    """The name without PEFT's wrappers; None for what belongs to an adapter."""
    parts, own = name.split("."), []
    for position, part in enumerate(parts):
        inside = wrapped.get(".".join(parts[:position]))
        if inside is None:
            own.append(part)
        elif part != inside:
            return None
    return ".".join(own)


def _checkpoint(label: str, state: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> Checkpoint:
    infos = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()}
    return Checkpoint(label, infos, lambda name: state[name].detach().cpu(), None, config)
