"""Adapters loaded in a PeftModel as task vectors over the model's own weights, none of them copied."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from tvbases_hf.algebra.delta import Delta, Dense
from tvbases_hf.errors import CheckpointError, MissingExtraError, ParameterError, did_you_mean
from tvbases_hf.models.adapter import Adapter
from tvbases_hf.models.lora_parts import PREFIX, TOKENS
from tvbases_hf.models.parameters import INNER, Parameter
from tvbases_hf.models.vectors import Vectors
from tvbases_hf.storage.checkpoint import Checkpoint, TensorInfo

from .merged import MERGEABLE, DenseAdapter, changes_of_layers, layouts_of

if TYPE_CHECKING:
    from peft import PeftModel

# Variants of LoRA layers that compute (base + s B A) x, or DoRA's scaling of it.
PLAIN_VARIANTS = ("Dora", "MiCA")
# Others whose merged weights compute what the layers compute.
OF_PEFT = ("BdLora", "Monteclora", "Velora")


def task_vectors(model: PeftModel, adapters: Sequence[str] | None = None) -> Vectors:
    """The task vectors of adapters (by default all) that are loaded in a PeftModel.

    LoRA and DoRA stay in their factors, with the scaling that the layers have now; of LoHa, LoKr, OFT, IA3 and other
    methods the change is dense: the weights as PEFT merges them, minus what they were. The base is the model's own
    weights, borrowed. A matrix that the model uses twice has two names here, as in PEFT,
    which changes one use at a time.

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


def method_of(config: Any) -> str:
    """The name of the method of a PeftConfig."""
    return str(getattr(config.peft_type, "value", config.peft_type))


def import_peft() -> ModuleType:
    """PEFT, which may be absent."""
    try:
        import peft
    except ImportError as error:
        raise MissingExtraError(f'PEFT is needed ({error}); pip install "tvbases-hf[peft]"') from error
    return peft


def _adapter(model: Any, name: str, base: Checkpoint, state: Mapping[str, Tensor]) -> Adapter:
    config = model.peft_config[name]
    kind = method_of(config)
    if kind != "LORA" and kind not in MERGEABLE:
        raise CheckpointError(f'"{name}": {kind} adapter; it is no change of weights that PEFT can merge')
    if getattr(config, "bias", "none") != "none":
        raise CheckpointError(
            f'"{name}": trained with bias="{config.bias}", so that the model no longer has the biases of the base; '
            "open the saved adapter instead"
        )
    layers = dict(_tuner_layers(model, name))
    for path, layer in layers.items():
        _check_layer(name, path, layer)
    if kind == "LORA" and not any(type(own).__name__.startswith(OF_PEFT) for own in _variants(layers, name)):
        return _lora(model, name, base, layers, state)
    changes = changes_of_layers(layers, name, kind) | _saved(model, name, base)
    return DenseAdapter(_words(config, kind), _stored(model, name, state), base, changes, layouts_of(layers))


def _lora(model: Any, name: str, base: Checkpoint, layers: Mapping[str, Any], state: Mapping[str, Tensor]) -> Adapter:
    """The same reading as from files, with ranks and scalings as the layers have them."""
    config, parameters = model.peft_config[name], _parameters(layers)
    keys = {path: parameters[path].name if path in parameters else path for path in layers}
    patterns = {f"^{re.escape(keys[path])}": layer for path, layer in layers.items()}
    words = config.to_dict() | _words(config, "LORA")
    words |= {
        "rank_pattern": {pattern: layer.r[name] for pattern, layer in patterns.items()},
        "alpha_pattern": {pattern: layer.scaling[name] * layer.r[name] for pattern, layer in patterns.items()},
        "use_rslora": False,
        "target_modules": ".*",
        "target_parameters": [parameter.name for parameter in parameters.values()],
        "exclude_modules": None,
        "trainable_token_indices": {
            path: list(wrapper.token_adapter.token_indices[name])
            for path, wrapper in token_wrappers(model)
            if name in wrapper.token_adapter.token_indices
        },
        "init_lora_weights": True,  # whatever it did to the base, the base is the model's now
    }
    return Adapter(name, words, _stored(model, name, state), base, parameters)


def _parameters(layers: Mapping[str, Any]) -> dict[str, Parameter]:
    """The parameters that have wrappers, by the wrapper's path."""
    found = {}
    for path, layer in layers.items():
        own = getattr(layer, "parameter_name", None)
        if own is not None:
            module = path.removesuffix(INNER * path.count(INNER))
            held, tensor = layer.get_base_layer(), layer.get_param()
            index = [key for key, _ in held.named_parameters(recurse=False)].index(own)
            in_out = tensor.ndim == 3 and bool(getattr(held, "is_transposed", False))
            found[path] = Parameter(f"{module}.{own}", module, index, tuple(tensor.shape), in_out)
    return found


def _stored(model: Any, name: str, state: Mapping[str, Tensor]) -> Checkpoint:
    """The adapter as PEFT would save it."""
    from peft import get_peft_model_state_dict

    own = get_peft_model_state_dict(model, state_dict=dict(state), adapter_name=name, save_embedding_layers=False)
    for path, wrapper in token_wrappers(model):  # an output that is tied to the embedding has its rows
        tied = wrapper.token_adapter.tied_adapter
        if tied is not None and name in tied.trainable_tokens_delta:
            own[f"{PREFIX}{path}.{TOKENS}"] = tied.trainable_tokens_delta[name]
    return _checkpoint(name, own)


def _words(config: Any, kind: str) -> dict[str, Any]:
    """What is said of an adapter, as its file would say it."""
    task = getattr(config.task_type, "value", config.task_type)
    return {"peft_type": kind, "task_type": task, "base_model_name_or_path": config.base_model_name_or_path}


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
    if variant != "NoneType" and not variant.startswith((*PLAIN_VARIANTS, *OF_PEFT)):
        reason = f"its layers are of the variant {variant}, which is no plain change of the weight"
    if reason:
        raise CheckpointError(f'"{name}": {path}: {reason}')


def _variants(layers: Mapping[str, Any], name: str) -> Iterator[Any]:
    """What layers of LoRA compute instead of plain LoRA."""
    return (variant for layer in layers.values() if (variant := getattr(layer, "lora_variant", {}).get(name)))


def _tuner_layers(model: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Modules that have this adapter, by the base's name."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    beside = tuple(f"{path}." for path, _ in token_wrappers(model))  # kept in wrappers of their own beside the layers
    for path, module in model.base_model.model.named_modules():
        if f"{path}.".startswith(beside):
            continue
        if isinstance(module, BaseTunerLayer) and any(
            name in held
            for attribute in module.adapter_layer_names
            if isinstance(held := getattr(module, attribute, None), (nn.ModuleDict, nn.ParameterDict))
        ):
            yield path, module


def token_wrappers(model: Any) -> Iterator[tuple[str, Any]]:
    """Embeddings and outputs of which a LoRA also trains tokens."""
    from peft.utils.other import TrainableTokensWrapper

    for path, module in model.base_model.model.named_modules():
        if isinstance(module, TrainableTokensWrapper):
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
    wrapped |= {path: "token_adapter" for path, _ in token_wrappers(model)}
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
