"""Tiny pipelines of diffusers' own classes, random weights, and style LoRAs for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

FLUX_MODULES = {
    "transformer_blocks.0.attn.to_q": (32, 32),
    "transformer_blocks.0.attn.to_out.0": (32, 32),
    "transformer_blocks.0.ff.net.0.proj": (128, 32),
    "single_transformer_blocks.0.attn.to_k": (32, 32),
    "single_transformer_blocks.0.proj_out": (32, 160),
}
ATTENTION = "down_blocks.1.attentions.0.transformer_blocks.0"
UNET_MODULES = {f"{ATTENTION}.attn1.to_q": (32, 32), f"{ATTENTION}.attn2.to_k": (32, 32)}
TEXT = {"text_model.encoder.layers.0.self_attn.q_proj": (32, 32)}
CONV = "down_blocks.0.resnets.0.conv1"


def flux_pipeline(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    parts: dict[str, Any] = {"text_encoder_2": None, "tokenizer": None, "tokenizer_2": None}
    pipe = FluxPipeline(FlowMatchEulerDiscreteScheduler(), vae(), text_encoder(), transformer=transformer, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(dtype)


def unet_pipeline() -> Any:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(32, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=2,
        norm_num_groups=2,
        sample_size=8,
    )
    parts: dict[str, Any] = {"tokenizer": None, "safety_checker": None, "feature_extractor": None}
    parts["scheduler"] = DDIMScheduler(steps_offset=1, clip_sample=False)
    pipe = StableDiffusionPipeline(vae(), text_encoder(), unet=unet, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def vae() -> Any:
    torch.manual_seed(1)
    return AutoencoderKL(block_out_channels=(8,), norm_num_groups=2, latent_channels=4, shift_factor=0.0)


def text_encoder() -> Any:
    torch.manual_seed(2)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    return CLIPTextModel(CLIPTextConfig(vocab_size=64, projection_dim=32, **sizes)).eval()


def flux_image(pipe: Any, steps: int = 2, **more: Any) -> Tensor:
    """The latents of one image."""
    generator = torch.Generator().manual_seed(3)
    dtype = pipe.transformer.dtype
    embeds = torch.randn(1, 4, 32, generator=generator).to(dtype)
    pooled = torch.randn(1, 32, generator=generator).to(dtype)
    out = pipe(
        prompt_embeds=embeds,
        pooled_prompt_embeds=pooled,
        height=16,
        width=16,
        num_inference_steps=steps,
        generator=generator,
        output_type="latent",
        **more,
    )
    return out.images


def unet_image(pipe: Any, steps: int = 2, **more: Any) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    embeds = torch.randn(1, 4, 32, generator=generator)
    how = {"num_inference_steps": steps, "guidance_scale": 2.0, "negative_prompt_embeds": -embeds}
    return pipe(
        prompt_embeds=embeds, height=8, width=8, generator=generator, output_type="latent", **how, **more
    ).images


def style(
    seed: int,
    modules: Mapping[str, tuple[int, int]],
    component: str = "transformer",
    rank: int = 4,
    common: int = 2,
    size: float = 0.3,
) -> dict[str, Tensor]:
    """A LoRA in diffusers' format; the column spaces of all styles have ``common`` directions in common."""
    state = {}
    for number, (module, (rows, columns)) in enumerate(modules.items()):
        shared = torch.randn(rows, common, generator=torch.Generator().manual_seed(1000 + number))
        generator = torch.Generator().manual_seed(100 * seed + number)
        own = torch.randn(rows, rank - common, generator=generator)
        mixing = torch.linalg.qr(torch.randn(rank, rank, generator=generator)).Q
        state[f"{component}.{module}.lora_A.weight"] = size * torch.randn(rank, columns, generator=generator)
        state[f"{component}.{module}.lora_B.weight"] = size * torch.cat([shared, own], dim=1) @ mixing
    return state


def products(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """B A of each module of a LoRA in diffusers' format, float64, flattened."""
    names = [name.removesuffix(".lora_A.weight") for name in state if name.endswith(".lora_A.weight")]
    return {
        name: state[f"{name}.lora_B.weight"].double().flatten(1) @ state[f"{name}.lora_A.weight"].double().flatten(1)
        for name in names
    }


def dense_unique(changes: Iterable[Tensor], threshold: float = 0.85) -> list[Tensor]:
    """Equations 7 to 12 of the paper as they are written, n x n in float64: W - Z Z^T W for each change W."""
    changes = list(changes)
    spaces = []
    for change in changes:
        left, values, _ = torch.linalg.svd(change, full_matrices=False)
        spaces.append(left[:, values > 1e-5 * values[0]])
    chain = torch.eye(len(changes[0]), dtype=torch.float64)
    for space in spaces:
        chain = chain @ space @ space.T
    values, vectors = torch.linalg.eig(chain)
    chosen = vectors[:, values.real > threshold].real
    basis = torch.linalg.qr(chosen).Q if chosen.shape[1] else chosen
    return [change - basis @ (basis.T @ change) for change in changes]


def dense_mixed(changes: Iterable[Tensor], threshold: float = 0.85) -> list[Tensor]:
    """What each change brings into the mix: what is unique to it, and its part of one copy of what is shared, the mean
    weighted by norms (equation 14)."""
    changes = list(changes)
    unique = dense_unique(changes, threshold)
    shared = [change - own for change, own in zip(changes, unique, strict=True)]
    norms = torch.stack([part.norm() for part in shared])
    parts = norms / norms.sum().clamp_min(torch.finfo(torch.float64).tiny)
    return [own + part * rest for own, part, rest in zip(unique, parts, shared, strict=True)]


def added(pipe: Any, adapter: str = "styles", component: str = "transformer") -> dict[str, Tensor]:
    """What PEFT adds to each module's weight with an adapter, float64, flattened."""
    model: nn.Module = getattr(pipe, component)
    layers: list[tuple[str, Any]] = list(model.named_modules())
    return {
        f"{component}.{name}": layer.get_delta_weight(adapter).detach().double().flatten(1)
        for name, layer in layers
        if hasattr(layer, "get_delta_weight") and adapter in layer.scaling
    }
