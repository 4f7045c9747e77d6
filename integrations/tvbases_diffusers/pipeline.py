"""What a pipeline has and can take: its components, the adapters loaded in it, and their state."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from tvbases_hf.errors import CheckpointError, MismatchError, MissingExtraError, ParameterError
from tvbases_hf.storage.checkpoint import Checkpoint
from tvbases_hf.styles.diffusers_files import open_lora
from tvbases_hf.styles.families import Family, Modules, installed, layer_shape, shapes_of
from tvbases_hf.styles.lora_layers import ALPHA, BIAS, MAGNITUDE, A, B, LoraLayers
from tvbases_hf.styles.lora_source import Source
from tvbases_hf.styles.mixing import Styles
from tvbases_hf.styles.places import Lora, Place

TEXT_PREFIX = "text_model."


def require_loader(pipe: Any) -> None:
    """MissingExtraError without PEFT and diffusers; ParameterError for something that loads no LoRAs."""
    try:
        import diffusers  # noqa: F401
        import peft  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            f'diffusers and PEFT are needed ({error}); pip install "tvbases-hf[diffusers,peft]"'
        ) from error
    loads = getattr(pipe, "_lora_loadable_modules", None) and hasattr(pipe, "load_lora_weights")
    if not loads and not _is_bare(pipe):
        raise ParameterError(
            f"{type(pipe).__name__} has no LoRA loader; give a diffusers pipeline that has one, or its denoising model"
        )


def _is_bare(pipe: Any) -> bool:
    """A model of diffusers without a pipeline, which loads LoRAs itself (``load_lora_adapter``)."""
    return isinstance(pipe, nn.Module) and hasattr(pipe, "load_lora_adapter")


def components(pipe: Any) -> dict[str, nn.Module]:
    """The models that LoRAs can be loaded into, by what files call them."""
    if _is_bare(pipe):
        return {"unet" if "UNet" in type(pipe).__name__ else "transformer": pipe}
    found = {name: getattr(pipe, name, None) for name in pipe._lora_loadable_modules}
    return {name: model for name, model in found.items() if isinstance(model, nn.Module)}


def family_of(pipe: Any) -> Family:
    """What there is of models, and the loader that translates files for them."""
    models = components(pipe)
    ready = {
        component: Modules(shapes_of(model), any_depth=False)
        for component, model in models.items()
        if not component.startswith("text_encoder")
    }
    loader = _loader_of(pipe) if _is_bare(pipe) else type(pipe)
    return Family(type(pipe).__name__, loader, ready=ready)


def _loader_of(model: nn.Module) -> type | None:
    """That of the family whose class this is."""
    kind = type(model).__name__
    return next((own.mixin for own in installed() if kind in (name for name, _ in own.models.values())), None)


def load(pipe: Any, state: dict[str, Any], adapter: str) -> None:
    """Load a state dict in diffusers' format and make it the only active adapter."""
    if _is_bare(pipe):
        pipe.load_lora_adapter(state, prefix=next(iter(components(pipe))), adapter_name=adapter)
    else:
        pipe.load_lora_weights(state, adapter_name=adapter)


def tuner_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers that adapters are loaded in, by the base's name."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield name, module


def layer_of(pipe: Any, place: Place) -> Any:
    """The layer that a weight belongs to. Files write text_model., which transformers 5 does without.

    Raises AttributeError if there is none.
    """
    model = components(pipe)[place.component]
    return model.get_submodule(place.module.removeprefix(_text_prefix(place.component, model)))


def _text_prefix(component: str, model: nn.Module) -> str:
    return TEXT_PREFIX if component.startswith("text_encoder") and not hasattr(model, "text_model") else ""


def adapters(pipe: Any) -> set[str]:
    """The names of all loaded adapters."""
    return {name for model in components(pipe).values() for name in getattr(model, "peft_config", {})}


def is_fused(pipe: Any, adapter: str) -> bool:
    """Whether fuse_lora has added it to the weights."""
    layers = (layer for model in components(pipe).values() for _, layer in tuner_layers(model))
    return any(adapter in getattr(layer, "merged_adapters", ()) for layer in layers)


def open_style(pipe: Any, name: str, source: Source) -> Lora:
    """A style from a file, directory, Hub id or state dict, or the adapter of this name in the pipeline."""
    if not isinstance(source, str) or source not in adapters(pipe):
        return open_lora(source, label=source if isinstance(source, str) else name, model=family_of(pipe))
    if Path(source).exists():
        raise ParameterError(f'"{source}" is both a loaded adapter and a path; rename one, or give the full path')
    return _loaded(pipe, source)


def _loaded(pipe: Any, adapter: str) -> Lora:
    """An adapter's own factors at alpha / rank, whatever weight set_adapters has given it."""
    found: dict[str, LoraLayers] = {}
    for component, model in components(pipe).items():
        config = getattr(model, "peft_config", {}).get(adapter)
        if config is None:
            continue
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if kind != "LORA":
            raise CheckpointError(f'"{adapter}": a loaded {kind} adapter; only LoRA is mixed')
        state: dict[str, Any] = {}
        parts: dict[str, dict[str, Any]] = {}
        for module, layer in tuner_layers(model):
            if adapter in getattr(layer, "lora_A", {}):
                tensors = _tensors(layer, adapter)
                module = _text_prefix(component, model) + module
                state |= {f"{module}.{part}": tensor for part, tensor in tensors.items()}
                root = math.sqrt(layer.r[adapter]) if config.use_rslora else 1.0
                alpha = {ALPHA: float(layer.lora_alpha[adapter]) * root}
                parts[module] = {part: f"{module}.{part}" for part in tensors} | alpha
        label = f'"{adapter}": {component}'
        found[component] = LoraLayers(label, Checkpoint.from_state_dict(state, adapter), parts)
    return found


def _tensors(layer: Any, adapter: str) -> dict[str, Any]:
    found = {A: layer.lora_A[adapter].weight, B: layer.lora_B[adapter].weight}
    if layer.lora_B[adapter].bias is not None:
        found[BIAS] = layer.lora_B[adapter].bias
    if adapter in getattr(layer, "lora_magnitude_vector", {}):
        found[MAGNITUDE] = layer.lora_magnitude_vector[adapter].weight
    return {name: tensor.detach() for name, tensor in found.items()}


def check_fits(pipe: Any, styles: Styles) -> None:
    """MismatchError for styles of another architecture: components, modules or shapes that the pipeline lacks."""
    models = components(pipe)
    unknown = [component for component in styles.components if component not in models]
    if unknown:
        owners = [name for name, lora in styles.loras.items() if unknown[0] in lora]
        raise MismatchError(
            f'"{owners[0]}" changes the {unknown[0]}, which {type(pipe).__name__} loads no LoRAs into (it takes '
            f"{', '.join(models)}); it is for another model, or this part must be removed from the file first"
        )
    wrong = [(place, reason) for place in styles.places if (reason := _misfit(pipe, place))]
    if wrong:
        place, reason = wrong[0]
        raise MismatchError(
            f'"{next(iter(place.ranks))}": {len(wrong)} of {len(styles.places)} modules do not fit this '
            f"{type(models[place.component]).__name__} (first: {place.module} {reason}); it is for another model"
        )


def _misfit(pipe: Any, place: Place) -> str | None:
    try:
        layer = layer_of(pipe, place)
    except AttributeError:
        return "is not in it"
    layer = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
    if not hasattr(layer, "in_features") and (not hasattr(layer, "weight") or layer.weight.dim() < 2):
        return f"is a {type(layer).__name__}"
    shape = layer_shape(layer)
    return None if shape == place.shape else f"is {list(shape)} in it and {list(place.shape)} in the file"


@dataclass(frozen=True)
class AdapterState:
    """Which adapters are active in which layer, and how strongly: what unloading gives back."""

    layers: dict[tuple[str, str], tuple[list[str], dict[str, float], bool]]

    @classmethod
    def of(cls, pipe: Any) -> AdapterState:
        return cls(
            {
                (component, name): (list(layer.active_adapters), dict(layer.scaling), layer.disable_adapters)
                for component, model in components(pipe).items()
                for name, layer in tuner_layers(model)
            }
        )

    def without(self, adapter: str, before: AdapterState) -> AdapterState:
        """The same, had the adapter never been there: where it alone is active, those of ``before`` are."""
        found = {}
        for layer, (active, scaling, disabled) in self.layers.items():
            others = [own for own in active if own != adapter]
            if active == [adapter]:
                others = before.layers.get(layer, ([], {}, False))[0]
            found[layer] = (others, scaling, disabled)
        return AdapterState(found)

    def give_back(self, pipe: Any) -> None:
        """For the layers and adapters that are still there."""
        for component, model in components(pipe).items():
            for name, layer in tuner_layers(model):
                if (component, name) not in self.layers:
                    continue
                active, scaling, disabled = self.layers[component, name]
                layer.set_adapter([adapter for adapter in active if adapter in layer.scaling])
                layer.scaling.update({a: scale for a, scale in scaling.items() if a in layer.scaling})
                layer.enable_adapters(enabled=not disabled)


def remove(pipe: Any, adapter: str, before: AdapterState) -> None:
    """Take an adapter out, with PEFT's layers too if they hold nothing else."""
    if adapters(pipe) == {adapter}:
        pipe.unload_lora() if _is_bare(pipe) else pipe.unload_lora_weights()
    elif adapter in adapters(pipe):
        pipe.delete_adapters(adapter)
    before.give_back(pipe)
