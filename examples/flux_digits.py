"""A small Flux that draws digits, and style LoRAs for it: everything that flux_style_mixing.py trains.

The classes are diffusers' own (FluxTransformer2DModel, FluxPipeline, FlowMatchEulerDiscreteScheduler) and PEFT's; only
the sizes are small. The data are scikit-learn's 8 x 8 digits, enlarged to 16 x 16 pixels, which are used as latents.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

SIDE, WIDTH = 16, 32  # pixels; numbers in the embedding of a digit
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_mlp", "proj_out"]


@dataclass(frozen=True)
class Plan:
    """How long everything is trained. ``blocks``: double and single blocks of the transformer."""

    blocks: tuple[int, int] = (1, 2)
    heads: int = 3
    base_steps: int = 600
    lora_steps: int = 160
    batch: int = 48
    rank: int = 4
    steps: int = 12


# Styles are pictures of digits, changed; 0 is background, 1 ink. In this order they can be put on top of each other.


def thick(images: Tensor) -> Tensor:
    return F.max_pool2d(images, 3, stride=1, padding=1)


def slanted(images: Tensor) -> Tensor:
    shear = torch.tensor([[1.0, 0.6, 0.0], [0.0, 1.0, 0.0]]).expand(len(images), 2, 3)
    return F.grid_sample(images, F.affine_grid(shear, list(images.shape), align_corners=False), align_corners=False)


def striped(images: Tensor) -> Tensor:
    rows = torch.where(torch.arange(SIDE) % 4 < 2, 1.0, 0.15)
    return images * rows[:, None]


def lit(images: Tensor) -> Tensor:
    return torch.maximum(images, torch.linspace(0.7, -0.3, SIDE).clamp_min(0).expand(SIDE, SIDE))


def framed(images: Tensor) -> Tensor:
    edge = torch.ones(SIDE, SIDE)
    edge[1:-1, 1:-1] = 0
    return torch.maximum(images, 0.8 * edge)


STYLES: dict[str, Callable[[Tensor], Tensor]] = {
    "thick": thick,
    "slanted": slanted,
    "striped": striped,
    "lit": lit,
    "framed": framed,
}


def styled(images: Tensor, names: Sequence[str]) -> Tensor:
    for name, change in STYLES.items():
        images = change(images) if name in names else images
    return images


def digits() -> tuple[Tensor, Tensor]:
    """[1797, 1, 16, 16] in 0 to 1, and what they are."""
    data: Any = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    return F.interpolate(images, size=(SIDE, SIDE), mode="bilinear"), torch.tensor(data.target)


def prompts(labels: Tensor) -> dict[str, Tensor]:
    """What a text encoder would say of each digit: fixed random embeddings."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(10, 2, WIDTH, generator=generator)
    return {"prompt_embeds": table[labels], "pooled_prompt_embeds": table[labels].mean(1)}


def make_pipeline(plan: Plan) -> FluxPipeline:
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=4,
        num_layers=plan.blocks[0],
        num_single_layers=plan.blocks[1],
        attention_head_dim=32,
        num_attention_heads=plan.heads,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(4, 14, 14),
    )
    nothing: Any = None
    parts = {"text_encoder_2": nothing, "tokenizer_2": nothing, "transformer": transformer}
    pipe = FluxPipeline(FlowMatchEulerDiscreteScheduler(), nothing, nothing, nothing, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def draw(pipe: FluxPipeline, labels: Tensor, plan: Plan, seed: int = 0) -> Tensor:
    """[k, 1, 16, 16] pictures of these digits, 0 to 1; the same noise for the same seed, whatever is loaded."""
    pictures = []
    for start in range(0, len(labels), 64):
        part = labels[start : start + 64]
        generator = torch.Generator().manual_seed(1000 * seed + start)
        how: dict[str, Any] = {"height": 8 * SIDE, "width": 8 * SIDE, "output_type": "latent", "generator": generator}
        found: Any = pipe(**prompts(part), num_inference_steps=plan.steps, **how)
        latents = found.images
        pictures.append(pipe._unpack_latents(latents, 8 * SIDE, 8 * SIDE, 8))
    return ((torch.cat(pictures) + 1) / 2).clamp(0, 1)


def train(
    model: Any, images: Tensor, labels: Tensor, steps: int, rate: float, plan: Plan, title: str, quiet: bool
) -> None:
    """Flow matching: from the mixture (1 - s) x + s e predict e - x."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    ids = FluxPipeline._prepare_latent_image_ids(1, SIDE // 2, SIDE // 2, torch.device("cpu"), torch.float32)
    text_ids = torch.zeros(2, 3)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for _ in tqdm(range(steps), desc=title, disable=True if quiet else None, leave=False):
        chosen = torch.randint(len(images), (plan.batch,), generator=generator)
        x = FluxPipeline._pack_latents(2 * images[chosen] - 1, plan.batch, 1, SIDE, SIDE)
        noise = torch.randn(x.shape, generator=generator)
        time = torch.randn(plan.batch, generator=generator).sigmoid()
        mixed = (1 - time[:, None, None]) * x + time[:, None, None] * noise
        said = prompts(labels[chosen])
        embeds = {"encoder_hidden_states": said["prompt_embeds"], "pooled_projections": said["pooled_prompt_embeds"]}
        found = model(hidden_states=mixed, timestep=time, img_ids=ids, txt_ids=text_ids, **embeds).sample
        loss = F.mse_loss(found, noise - x)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


def train_base(directory: Path, plan: Plan, quiet: bool) -> FluxPipeline:
    """The base model, from the directory if it is there."""
    pipe = make_pipeline(plan)
    if (directory / "base").is_dir():
        pipe.transformer = FluxTransformer2DModel.from_pretrained(directory / "base").eval()
        return pipe
    images, labels = digits()
    train(pipe.transformer, images, labels, plan.base_steps, 2e-3, plan, "base", quiet)
    pipe.transformer.save_pretrained(directory / "base")
    return pipe


def train_style(
    directory: Path, pipe: FluxPipeline, name: str, shown: Sequence[str], plan: Plan, quiet: bool, start: Path | None
) -> Path:
    """A style's LoRA file in diffusers' format, trained with PEFT on digits with these styles.

    With ``start`` training goes on from another LoRA: its factors, and as many new ones.
    """
    file = directory / f"{name}.safetensors"
    if file.is_file():
        return file
    images, labels = digits()
    model: Any = pipe.transformer
    model.requires_grad_(False)
    known = {} if start is None else _short(load_file(start))
    rank = plan.rank * (2 if known else 1)
    torch.manual_seed(sum(map(ord, name)))
    model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS), adapter_name="own")
    if known:
        state = get_peft_model_state_dict(model, adapter_name="own")
        set_peft_model_state_dict(model, {n: _begun(t, known[n]) for n, t in state.items()}, adapter_name="own")
    train(model, styled(images, shown), labels, plan.lora_steps, 3e-3 if not known else 2e-3, plan, name, quiet)
    layers: Any = get_peft_model_state_dict(model, adapter_name="own")
    layers = {key: tensor.detach().clone() for key, tensor in layers.items()}
    FluxPipeline.save_lora_weights(directory, transformer_lora_layers=layers, weight_name=file.name)
    pipe.unload_lora_weights()
    return file


def _short(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("transformer."): tensor for name, tensor in state.items()}


def _begun(fresh: Tensor, known: Tensor) -> Tensor:
    """A factor of twice the rank whose first half is known."""
    found = fresh.clone()
    found[: known.shape[0], : known.shape[1]] = known
    return found


class Judge(nn.Module):
    """Tells which digit it is and which styles it has."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, 256), nn.ReLU(), nn.Linear(256, 96), nn.ReLU())
        self.digit, self.styles = nn.Linear(96, 10), nn.Linear(96, len(STYLES))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        body = self.body(images)
        return self.digit(body), self.styles(body)


def combinations() -> Iterator[tuple[str, ...]]:
    for count in range(len(STYLES) + 1):
        yield from itertools.combinations(STYLES, count)


def train_judge(directory: Path, quiet: bool, steps: int = 1500) -> tuple[Judge, dict[str, float]]:
    """A classifier of digits in every combination of styles, and its accuracy on digits that it has not seen."""
    file = directory / "judge.pt"
    torch.manual_seed(0)
    judge = Judge()
    images, labels = digits()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    seen, unseen = order[300:], order[:300]
    every = [
        (styled(images, names), torch.tensor([float(name in names) for name in STYLES])) for names in combinations()
    ]
    if file.is_file():
        judge.load_state_dict(torch.load(file, weights_only=True))
    else:
        optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3)
        for step in tqdm(range(steps), desc="judge", disable=True if quiet else None, leave=False):
            pictures, truth = every[step % len(every)]
            chosen = seen[torch.randint(len(seen), (128,))]
            digit, style = judge(pictures[chosen] + 0.08 * torch.randn(128, 1, SIDE, SIDE))
            wrong = F.binary_cross_entropy_with_logits(style, truth.expand_as(style))
            loss = F.cross_entropy(digit, labels[chosen]) + wrong
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        directory.mkdir(parents=True, exist_ok=True)
        torch.save(judge.state_dict(), file)
    judge.eval()
    with torch.no_grad():
        right = [judge(pictures[unseen]) for pictures, _ in every]
        digit = sum(float((d.argmax(1) == labels[unseen]).float().mean()) for d, _ in right) / len(every)
        style = sum(
            float(((s > 0) == truth.bool()).float().mean()) for (_, s), (_, truth) in zip(right, every, strict=True)
        ) / len(every)
    return judge, {"digit": digit, "style": style}
