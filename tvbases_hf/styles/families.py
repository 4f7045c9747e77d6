"""The model families whose LoRAs diffusers loads, and the names of their modules.

The names are those of diffusers' own model classes, built on the meta device: no weight is made. A LoRA file belongs to
the families that have all of its modules; a file whose names no family has would load nowhere.
"""

from __future__ import annotations

import functools
import inspect
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

Shape = tuple[int, int]
LORA_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
# How many blocks of one kind a model has differs within a family and changes no name but the block's number.
DEPTHS = re.compile(r"^n(um)?_?(\w+_)?(layers|blocks)$|^depth$")
FEW = 2
BLOCK = re.compile(r"(?<=blocks|layers)([._])(\d+)(?=[._])|(?<=refiner)([._])(\d+)(?=[._])", re.ASCII)
LOADERS = "diffusers.loaders.lora_pipeline"


class Modules:
    """The modules of one model that can have a LoRA, found by a name with dots or, as kohya writes, underscores."""

    def __init__(self, shapes: Mapping[str, Shape], *, any_depth: bool) -> None:
        """``shapes``: [out, in] by name. ``any_depth``: blocks may have other numbers than those here."""
        self._depth = any_depth
        self._shapes = {self._pattern(name): shape for name, shape in shapes.items()}
        self._flat = {name.replace(".", "_"): name for name in self._shapes}

    def find(self, name: str) -> str | None:
        pattern, numbers = split_numbers(name) if self._depth else (name, [])
        found = pattern if pattern in self._shapes else self._flat.get(pattern)
        return None if found is None else with_numbers(found, numbers)

    def __iter__(self) -> Iterator[str]:
        """The names, with # for the numbers of blocks that may be others."""
        return iter(self._shapes)

    def shape(self, name: str) -> Shape:
        """[out, in] in the published model."""
        return self._shapes[self._pattern(name)]

    def has_ratio(self, name: str, shape: Shape) -> bool:
        """Whether rows to columns are as in the published model, whose width may be another."""
        rows, columns = self._shapes.get(self._pattern(name), (0, 0))
        return rows * shape[1] == columns * shape[0]

    def __contains__(self, name: str) -> bool:
        return self._pattern(name) in self._shapes

    def _pattern(self, name: str) -> str:
        return split_numbers(name)[0] if self._depth else name


def split_numbers(name: str) -> tuple[str, list[str]]:
    """A module's name with # for the numbers of blocks, and these."""
    numbers = [found[2] or found[4] for found in BLOCK.finditer(name)]
    return BLOCK.sub(lambda found: f"{found[1] or found[3]}#", name), numbers


def with_numbers(pattern: str, numbers: Iterable[str]) -> str:
    for number in numbers:
        pattern = pattern.replace("#", number, 1)
    return pattern


@dataclass(frozen=True, eq=False)
class Family:
    """Models that load the same LoRAs.

    ``loader`` is the diffusers class that translates their files (its name, for the table below; None if there is no
    such class), ``models`` the class and the options of each component, beside text encoders; ``ready`` the modules of
    models that exist already.
    """

    name: str
    loader: str | type | None
    models: Mapping[str, tuple[str, Mapping[str, Any]]] = field(default_factory=dict)
    ready: Mapping[str, Modules] = field(default_factory=dict)

    @property
    def mixin(self) -> Any:
        """The class with ``lora_state_dict``; None where the installed diffusers has none."""
        if not isinstance(self.loader, str):
            return self.loader
        from diffusers.loaders import lora_pipeline

        return getattr(lora_pipeline, self.loader, None)

    def modules(self, component: str) -> Modules | None:
        """None for a component that this family loads no LoRAs into."""
        if component in self.ready:
            return self.ready[component]
        if component in self.models:
            return _built(self.name, component)
        return TEXT if component.startswith("text_encoder") and self._loads(component) else None

    def _loads(self, component: str) -> bool:
        return component in (getattr(self.mixin, "_lora_loadable_modules", None) or ())

    @property
    def component(self) -> str:
        """The model that denoises."""
        return next(iter(self.models or self.ready))

    def has_all(self, names: Mapping[str, Iterable[str]]) -> bool:
        """Whether every module is one of this family, by component."""
        known = {component: self.modules(component) for component in names}
        return all(own is not None and all(name in own for name in names[place]) for place, own in known.items())


def installed() -> tuple[Family, ...]:
    """The families that the installed diffusers has; an older one has fewer."""
    import diffusers

    return tuple(
        family
        for family in FAMILIES
        if family.mixin is not None and all(hasattr(diffusers, name) for name, _ in family.models.values())
    )


def find_family(names: Mapping[str, Iterable[str]], families: Iterable[Family]) -> Family | None:
    """The first family that has every module, by component."""
    return next((family for family in families if family.has_all(names)), None)


def shapes_of(model: nn.Module) -> dict[str, Shape]:
    """[out, in] of each layer that can have a LoRA, convolutions flattened; adapters that are loaded do not count."""
    return {
        name.removesuffix(".base_layer"): layer_shape(layer)
        for name, layer in model.named_modules()
        if isinstance(layer, LORA_LAYERS) and ".lora_" not in name
    }


def layer_shape(layer: Any) -> Shape:
    """Also of quantised layers, whose weights are packed."""
    if hasattr(layer, "in_features"):
        return layer.out_features, layer.in_features
    return layer.weight.shape[0], layer.weight[0].numel()


@functools.cache
def _built(family: str, component: str) -> Modules:
    name, options = next(own for own in FAMILIES if own.name == family).models[component]
    return Modules(shapes_of(build(name, options)), any_depth=component != "unet")


def build(name: str, options: Mapping[str, Any]) -> nn.Module:
    """A model of diffusers' class on the meta device, at its published width and with few blocks of each kind."""
    import diffusers

    model: Any = getattr(diffusers, name)
    defaults = {key: known.default for key, known in inspect.signature(model.__init__).parameters.items()}
    few = {
        key: min(FEW, value)
        for key, value in defaults.items()
        if DEPTHS.match(key) and isinstance(value, int) and "UNet" not in name
    }
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")  # of what diffusers' own classes use
        return model(**few | dict(options))


def _clip() -> Modules:
    """CLIP's text models, the only text encoders that diffusers loads LoRAs into. With and without transformers 4's
    ``text_model.``.
    """
    attention = {f"self_attn.{part}_proj": (1, 1) for part in ("q", "k", "v", "out")}
    layer = attention | {"mlp.fc1": (4, 1), "mlp.fc2": (1, 4)}
    prefixes = ("text_model.", "")
    names = {f"{prefix}encoder.layers.0.{part}": shape for prefix in prefixes for part, shape in layer.items()}
    return Modules(names, any_depth=True)


TEXT = _clip()


def _family(name: str, loader: str, model: str, component: str = "transformer", **options: Any) -> Family:
    return Family(name, f"{loader}LoraLoaderMixin", {component: (model, options)})


SDXL: dict[str, Any] = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
WAN_IMAGE: dict[str, Any] = {"image_dim": 1280, "added_kv_proj_dim": 5120}
HIDREAM: dict[str, Any] = {"patch_size": 2, "caption_channels": (4096, 4096), "llama_layers": (0, 1)}
# Where a file's names do not tell which of two translations is meant, and its shapes neither, it is the earlier one's.
FAMILIES = (
    _family("Stable Diffusion 1 and 2", "StableDiffusion", "UNet2DConditionModel", "unet", cross_attention_dim=768),
    _family("SDXL", "StableDiffusionXL", "UNet2DConditionModel", "unet", **SDXL),
    _family("AnimateDiff", "StableDiffusion", "UNetMotionModel", "unet", cross_attention_dim=768),
    _family("Flux.1", "Flux", "FluxTransformer2DModel", guidance_embeds=True),
    _family("Flux.2", "Flux2", "Flux2Transformer2DModel"),
    _family("Flux.3", "Flux3", "Flux3Transformer2DModel"),
    _family("Stable Diffusion 3", "SD3", "SD3Transformer2DModel", dual_attention_layers=(0,)),
    _family("Qwen-Image", "QwenImage", "QwenImageTransformer2DModel"),
    _family("Qwen-Image 2.1", "QwenImage", "QwenImage21Transformer2DModel"),
    _family("Z-Image", "ZImage", "ZImageTransformer2DModel"),
    _family("Wan", "Wan", "WanTransformer3DModel", **WAN_IMAGE),
    _family("HunyuanVideo", "HunyuanVideo", "HunyuanVideoTransformer3DModel"),
    _family("LTX-Video", "LTXVideo", "LTXVideoTransformer3DModel"),
    _family("LTX-2", "LTX2", "LTX2VideoTransformer3DModel"),
    _family("Chroma", "Flux", "ChromaTransformer2DModel"),
    _family("Lumina 2", "Lumina2", "Lumina2Transformer2DModel"),
    _family("HiDream", "HiDreamImage", "HiDreamImageTransformer2DModel", **HIDREAM),
    _family("AuraFlow", "AuraFlow", "AuraFlowTransformer2DModel"),
    _family("CogView 4", "CogView4", "CogView4Transformer2DModel"),
    _family("Sana", "Sana", "SanaTransformer2DModel"),
    _family("Krea 2", "Krea2", "Krea2Transformer2DModel"),
    _family("Anima", "Anima", "CosmosTransformer3DModel"),
    _family("Ideogram 4", "Ideogram4", "Ideogram4Transformer2DModel"),
    _family("ERNIE-Image", "ErnieImage", "ErnieImageTransformer2DModel"),
    _family("Bria FIBO", "Flux", "BriaFiboTransformer2DModel"),
    _family("Bria FIBO 2", "BriaFibo2", "BriaFibo2Transformer2DModel"),
    _family("Kandinsky 5", "Kandinsky", "Kandinsky5Transformer3DModel"),
    _family("Amused", "Amused", "UVit2DModel"),
    _family("Wan VACE", "Wan", "WanVACETransformer3DModel", vace_layers=(0,), **WAN_IMAGE),
    _family("Wan Animate", "Wan", "WanAnimateTransformer3DModel", num_layers=40, **WAN_IMAGE),
    _family("Wan Animate 2", "Wan", "WanAnimate2Transformer3DModel"),
    _family("ChronoEdit", "Wan", "ChronoEditTransformer3DModel", **WAN_IMAGE),
    _family("AnyFlow", "Wan", "AnyFlowTransformer3DModel", image_dim=1280),
    _family("AnyFlow FAR", "Wan", "AnyFlowFARTransformer3DModel", image_dim=1280),
    _family("SkyReels 2", "SkyReelsV2", "SkyReelsV2Transformer3DModel", image_dim=1280, added_kv_proj_dim=2048),
    _family("Helios", "Helios", "HeliosTransformer3DModel", added_kv_proj_dim=5120),
    _family("HunyuanVideo 1.5", "HunyuanVideo", "HunyuanVideo15Transformer3DModel"),
    _family("FramePack", "HunyuanVideo", "HunyuanVideoFramepackTransformer3DModel", has_image_proj=True),
    _family("CogVideoX", "CogVideoX", "CogVideoXTransformer3DModel"),
    _family("ConsisID", "CogVideoX", "ConsisIDTransformer3DModel"),
    _family("Mochi", "Mochi1", "MochiTransformer3DModel"),
    _family("Sana Video", "Sana", "SanaVideoTransformer3DModel"),
    _family("Cosmos", "Cosmos", "CosmosTransformer3DModel"),
    _family("MiniMax-H3", "MiniMaxH3", "MiniMaxH3Transformer3DModel"),
    _family("ACE-Step", "AceStep", "AceStepTransformer1DModel"),
    _family("RFD4 Proteina", "RFD4Proteina", "RFD4ProteinaTransformer"),
)
