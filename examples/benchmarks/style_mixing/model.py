"""A small Flux of diffusers' own classes that draws from prompts of a content and a colour, and its LoRAs.

Pictures of 32 x 32 pixels in colour are the latents: 2 x 2 pixels are one latent of 12 numbers, of which the pipeline
packs 2 x 2 into one of 64 tokens. So no autoencoder is needed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.utils import logging
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from .drawing import COLOURS, SHAPES, SIDE

EMBEDDING = 32
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_mlp", "proj_out"]
HEIGHT = 8 * SIDE // 2  # the pixels that FluxPipeline takes a latent for
logging.set_verbosity_error()  # it says of every LoRA that there is none for the absent text encoder


@dataclass(frozen=True)
class Size:
    """Of the transformer: double and single blocks, heads of 32 numbers."""

    double: int = 1
    single: int = 4
    heads: int = 4


@dataclass(frozen=True)
class Training:
    """``examples`` drawn pictures; ``batch`` of them in each of ``steps``, at a one-cycle learning ``rate``."""

    steps: int
    batch: int
    rate: float
    examples: int = 6000


def make_pipeline(size: Size) -> FluxPipeline:
    """With fresh weights."""
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=48,
        num_layers=size.double,
        num_single_layers=size.single,
        attention_head_dim=32,
        num_attention_heads=size.heads,
        joint_attention_dim=EMBEDDING,
        pooled_projection_dim=2 * EMBEDDING,
        axes_dims_rope=(4, 14, 14),
    )
    nothing: Any = None
    parts = {"text_encoder_2": nothing, "tokenizer_2": nothing, "transformer": transformer}
    pipe = FluxPipeline(FlowMatchEulerDiscreteScheduler(), nothing, nothing, nothing, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def prompts(content: Tensor, colour: Tensor) -> dict[str, Tensor]:
    """What text encoders would say of "a red star": two tokens of fixed random embeddings, and both side by side."""
    generator = torch.Generator().manual_seed(0)
    contents = torch.randn(len(SHAPES), EMBEDDING, generator=generator)
    colours = torch.randn(len(COLOURS), EMBEDDING, generator=generator)
    tokens = torch.stack([contents[content], colours[colour]], 1)
    return {"prompt_embeds": tokens, "pooled_prompt_embeds": tokens.flatten(1)}


@torch.no_grad()
def paint(pipe: FluxPipeline, content: Tensor, colour: Tensor, noise: Tensor, steps: int, **more: Any) -> Tensor:
    """[k, 3, 32, 32] pictures in 0 to 1. ``noise`` [k]: seeds, so a picture does not depend on what else is painted."""
    found = []
    for rows in torch.arange(len(content)).split(50):
        start = torch.stack([_noise(int(seed)) for seed in noise[rows]])
        said = prompts(content[rows], colour[rows])
        how: dict[str, Any] = {"height": HEIGHT, "width": HEIGHT, "output_type": "latent", "latents": start, **more}
        made: Any = pipe(**said, num_inference_steps=steps, **how)
        found.append(pictures(made.images))
    return ((torch.cat(found) + 1) / 2).clamp(0, 1)


def _noise(seed: int) -> Tensor:
    return torch.randn(64, 48, generator=torch.Generator().manual_seed(seed))


def tokens(images: Tensor) -> Tensor:
    """[k, 64, 48] of pictures [k, 3, 32, 32]."""
    return FluxPipeline._pack_latents(F.pixel_unshuffle(images, 2), len(images), 12, SIDE // 2, SIDE // 2)


def pictures(packed: Tensor) -> Tensor:
    return F.pixel_shuffle(FluxPipeline._unpack_latents(packed, HEIGHT, HEIGHT, 8), 2)


def train(
    model: Any,
    images: Tensor,
    said: Mapping[str, Tensor],
    how: Training,
    file: Path,
    seed: int,
    report: Callable[[int, float], None] = lambda step, loss: None,
) -> None:
    """Flow matching: from the mixture (1 - s) x + s e predict e - x. Goes on from ``file``, which is then deleted."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=how.rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, how.rate, total_steps=how.steps, pct_start=0.1)
    begun = _resume(file, parameters, optimizer, schedule)
    ids = FluxPipeline._prepare_latent_image_ids(1, SIDE // 4, SIDE // 4, torch.device("cpu"), torch.float32)
    model.train()
    for step in range(begun, how.steps):
        generator = torch.Generator().manual_seed(100_000 * seed + step)
        chosen = torch.randint(len(images), (how.batch,), generator=generator)
        x = tokens(2 * images[chosen] - 1)
        noise = torch.randn(x.shape, generator=generator)
        time = (
            0.5 + torch.randn(how.batch, generator=generator)
        ).sigmoid()  # more of the noise in which shapes come about
        mixed = (1 - time[:, None, None]) * x + time[:, None, None] * noise
        embeds = {
            "encoder_hidden_states": said["prompt_embeds"][chosen],
            "pooled_projections": said["pooled_prompt_embeds"][chosen],
        }
        found = model(hidden_states=mixed, timestep=time, img_ids=ids, txt_ids=torch.zeros(2, 3), **embeds).sample
        loss = F.mse_loss(found, noise - x)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        report(step, float(loss.detach()))
        if (step + 1) % 50 == 0:
            _keep(file, step + 1, parameters, optimizer, schedule)
    file.unlink(missing_ok=True)
    model.eval()


def _keep(file: Path, step: int, parameters: list[Any], optimizer: Any, schedule: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}")
    weights = [p.detach() for p in parameters]
    torch.save([step, weights, optimizer.state_dict(), schedule.state_dict()], part)
    part.replace(file)


def _resume(file: Path, parameters: list[Any], optimizer: Any, schedule: Any) -> int:
    """The step to go on from."""
    if not file.is_file():
        return 0
    step, weights, moments, rates = torch.load(file, weights_only=True)
    for parameter, weight in zip(parameters, weights, strict=True):
        parameter.data.copy_(weight)
    optimizer.load_state_dict(moments)
    schedule.load_state_dict(rates)
    return step


def train_lora(
    pipe: FluxPipeline,
    images: Tensor,
    said: Mapping[str, Tensor],
    how: Training,
    file: Path,
    *,
    rank: int,
    seed: int,
    start: Path | None = None,
) -> None:
    """A LoRA file in diffusers' format, trained with PEFT; with ``start`` from another's factors and fresh ones."""
    model: Any = pipe.transformer
    model.requires_grad_(False)
    torch.manual_seed(seed)
    model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS), adapter_name="own")
    if start is not None:
        known = {name.removeprefix("transformer."): tensor for name, tensor in load_file(start).items()}
        state = get_peft_model_state_dict(model, adapter_name="own")
        set_peft_model_state_dict(model, {n: _begun(t, known[n]) for n, t in state.items()}, adapter_name="own")
    train(model, images, said, how, file.with_suffix(".begun"), seed)
    layers: Any = get_peft_model_state_dict(model, adapter_name="own")
    layers = {key: tensor.detach().clone() for key, tensor in layers.items()}
    part = file.with_name(f"{os.getpid()}-{file.name}")
    FluxPipeline.save_lora_weights(file.parent, transformer_lora_layers=layers, weight_name=part.name)
    part.replace(file)
    pipe.unload_lora_weights()


def _begun(fresh: Tensor, known: Tensor) -> Tensor:
    """A factor of a larger rank whose first directions are known."""
    found = fresh.clone()
    found[: known.shape[0], : known.shape[1]] = known
    return found
