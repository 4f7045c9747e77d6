"""A small network that says what is drawn and in which styles, trained on drawn pictures of every set of styles.

Besides the shapes it knows "nothing": noise, pieces of pictures put together, and blends of two, so that a broken mix
is not taken for the shape that it happens to be nearest to.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .drawing import COLOURS, EVERY_STYLE, SHAPES, Scenes, draw, scenes

NOTHING = len(SHAPES)


class Judge(nn.Module):
    """Logits of the contents (the last one is nothing) and of the styles; ``heat`` divides the styles' logits."""

    heat: Tensor

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise((3, 24, 48, 96)):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.SiLU()]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(96 * 16, 192), nn.SiLU())
        self.content, self.styles = nn.Linear(192, NOTHING + 1), nn.Linear(192, len(EVERY_STYLE))
        self.register_buffer("heat", torch.ones(len(EVERY_STYLE)))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        body = self.body(2 * images - 1)
        return self.content(body), self.styles(body) / self.heat


@dataclass(frozen=True)
class Verdict:
    """Of each picture: the content, and the probability of every style [k, styles]."""

    content: Tensor
    styles: Tensor

    def shows(self, style: str) -> Tensor:
        return self.styles[:, EVERY_STYLE.index(style)] > 0.5


@torch.no_grad()
def verdict(judge: Judge, images: Tensor) -> Verdict:
    content, styles = judge(images)
    return Verdict(content.argmax(1), styles.sigmoid())


def sets() -> Iterator[tuple[str, ...]]:
    """Up to three styles at once, and with them the house's."""
    for count in range(4):
        yield from itertools.combinations(EVERY_STYLE, count)


def random_scenes(count: int, seed: int, contents: str) -> Scenes:
    generator = torch.Generator().manual_seed(seed)
    content = torch.randint(len(SHAPES), (count,), generator=generator)
    return scenes(content, torch.randint(len(COLOURS), (count,), generator=generator), seed, contents)


def train_judge(file: Path, steps: int, examples: int, contents: str) -> Judge:
    """From the file if it is there; trained on one set of scenes, its probabilities calibrated on another."""
    judge = Judge()
    if file.is_file():
        judge.load_state_dict(torch.load(file, weights_only=True))
        return judge.eval()
    torch.manual_seed(0)
    judge = Judge()
    seen, listed = random_scenes(examples, 1, contents), list(sets())
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        images, content, truth = _batch(seen, listed, generator)
        said, styles = judge(images)
        real = content != NOTHING
        loss = F.cross_entropy(said, content) + 3 * F.binary_cross_entropy_with_logits(styles[real], truth[real])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    judge.eval()
    judge.heat.copy_(_heat(judge, random_scenes(examples // 4, 2, contents), listed))
    part = file.with_suffix(f".{os.getpid()}")
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(judge.state_dict(), part)
    part.replace(file)
    return judge


def _batch(seen: Scenes, listed: list[tuple[str, ...]], generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Six sets of styles, 16 pictures of each, with the faults of painted ones; and 24 pictures of nothing."""
    images, content, truth = [], [], []
    for number in torch.randint(len(listed), (6,), generator=generator).tolist():
        chosen = torch.randint(len(seen), (16,), generator=generator)
        images.append(draw(seen[chosen], listed[number]))
        content.append(seen.content[chosen])
        truth.append(_truth(listed[number]).expand(16, -1))
    drawn = torch.cat(images)
    nothing = _nothing(drawn, generator)
    drawn = torch.cat([_worn(drawn, generator), nothing])
    wrong = torch.full((len(nothing),), NOTHING)
    truth.append(torch.zeros(len(nothing), len(EVERY_STYLE)))
    return drawn.clamp(0, 1), torch.cat([*content, wrong]), torch.cat(truth)


def _worn(images: Tensor, generator: torch.Generator) -> Tensor:
    """Noise, softness and shifts of colour such as painted pictures have."""
    strength = 0.08 * torch.rand(len(images), 1, 1, 1, generator=generator)
    soft = 0.5 * torch.rand(len(images), 1, 1, 1, generator=generator)
    images = images + soft * (F.avg_pool2d(images, 3, 1, 1, count_include_pad=False) - images)
    tint = 0.06 * torch.randn(len(images), 3, 1, 1, generator=generator)
    return images + tint + strength * torch.randn(images.shape, generator=generator)


def _nothing(images: Tensor, generator: torch.Generator) -> Tensor:
    """8 of noise, 8 whose pieces are shuffled, 8 blends of two pictures."""
    order = torch.randperm(len(images), generator=generator)
    noise = torch.rand(8, 3, 8, 8, generator=generator)
    noise = F.interpolate(noise, size=images.shape[-2:]) + 0.2 * torch.randn(8, *images.shape[1:], generator=generator)
    pieces = F.unfold(images[order[:8]], 8, stride=8)[..., torch.randperm(16, generator=generator)]
    shuffled = F.fold(pieces, images.shape[-2:], 8, stride=8)
    blends = (images[order[8:16]] + images[order[16:24]] + images[order[24:32]]) / 3
    return torch.cat([noise, shuffled, blends])


def _truth(styles: tuple[str, ...]) -> Tensor:
    return torch.tensor([float(name in styles) for name in EVERY_STYLE])


@torch.no_grad()
def _heat(judge: Judge, unseen: Scenes, listed: list[tuple[str, ...]]) -> Tensor:
    """The divisor of each style's logits, of 0.5 to 4, at which its probabilities are likeliest."""
    logits = torch.cat(
        [judge(draw(unseen[torch.arange(i, len(unseen), len(listed))], s))[1] for i, s in enumerate(listed)]
    )
    truth = torch.cat([_truth(s).expand(len(range(i, len(unseen), len(listed))), -1) for i, s in enumerate(listed)])
    tried = torch.logspace(-0.3, 0.6, 31)
    losses = torch.stack(
        [F.binary_cross_entropy_with_logits(logits / t, truth, reduction="none").mean(0) for t in tried]
    )
    return tried[losses.argmin(0)]


def accuracy(judge: Judge, count: int, contents: str) -> dict[str, float]:
    """On scenes that it has not seen: contents and styles right, and the styles' mean error of calibration."""
    unseen, listed = random_scenes(count, 3, contents), list(sets())
    right, wrong, apart = 0, 0.0, torch.zeros(len(EVERY_STYLE))
    for i, styles in enumerate(listed):
        rows = unseen[torch.arange(i, len(unseen), len(listed))]
        found = verdict(judge, draw(rows, styles))
        right += int((found.content == rows.content).sum())
        wrong += float(((found.styles > 0.5) != _truth(styles).bool()).double().mean(1).sum())
        apart += (found.styles - _truth(styles)).sum(0)
    return {"content": right / count, "styles": 1 - wrong / count, "calibration": float(apart.abs().mean() / count)}
