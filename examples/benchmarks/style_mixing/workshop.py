"""What every study works with: the small Flux, its LoRAs and the judge, each trained when it is first asked for."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from evidence.workshop import Workshop as AnyWorkshop
from torch import Tensor

from tvbases_diffusers import mix_styles
from tvbases_hf.errors import ParameterError

from .drawing import COLOURS, CONTENTS, HOUSE, PERSON, SHAPES, Scenes, draw, scenes
from .judge import Judge, train_judge
from .model import make_pipeline, paint, prompts, train, train_lora
from .settings import APART, FAMILY, RANKS, Mixed, Settings
from .ways import WAYS, by_blocks, schedules

TRUTHS = 24  # drawn pictures of every prompt that a painted one is compared with


class Workshop(AnyWorkshop):
    """One process's view of the work directory."""

    settings: Settings

    @functools.cached_property
    def key(self) -> str:
        asked = (
            "seeds",
            "groups",
            "ways",
            "repeated",
            "at_one",
            "of_persons",
        )  # they decide which questions there are, not the answers
        trained = {name: value for name, value in asdict(self.settings).items() if name not in asked}
        if self.settings.contents == "shapes":  # as they all were when the first answers were given
            del trained["contents"]
        return hashlib.sha256(json.dumps(trained).encode()).hexdigest()[:12]

    @functools.cached_property
    def judge(self) -> Judge:
        return train_judge(
            self.workdir / "judge.pt", self.settings.judge_steps, self.settings.judge_examples, self.settings.contents
        )

    @functools.cached_property
    def pipe(self) -> FluxPipeline:
        """The base, which has never seen the person."""
        pipe, directory, how = make_pipeline(self.settings.size), self.workdir / "base", self.settings.base
        model: Any = pipe.transformer
        if directory.is_dir():
            pipe.transformer = FluxTransformer2DModel.from_pretrained(directory).eval()
            return pipe
        drawn = every_prompt(how.examples, 0, self.settings.contents)
        train(model, draw(drawn), prompts(drawn.content, drawn.colour), how, self.workdir / "base.begun", 0)
        model.save_pretrained(directory)
        return pipe

    def lora(self, family: str, style: str, seed: int) -> Path:
        """Its file, trained if it has not been. Those of the house go on from the house's own, at 8 ranks more."""
        file = self.workdir / "loras" / f"{family}-{seed}" / f"{style}.safetensors"
        if file.is_file():
            return file
        continued = family == FAMILY and style != HOUSE
        start = self.lora(FAMILY, HOUSE, seed) if continued else None
        rank = 16 if continued else RANKS.get(style, 8)
        drawn = self.shown(family, style, seed)
        said, how = prompts(drawn.content, drawn.colour), self.settings.lora
        file.parent.mkdir(parents=True, exist_ok=True)
        number = 1000 * seed + sum(map(ord, family + style))
        train_lora(self.pipe, draw(drawn, _styles(family, style)), said, how, file, rank=rank, seed=number, start=start)
        return file

    def shown(self, family: str, style: str, seed: int) -> Scenes:
        """What a LoRA is trained on: all prompts, or those of the person."""
        number, count = 17 + 1000 * seed + sum(map(ord, family + style)), self.settings.lora.examples
        if style != PERSON:
            return every_prompt(count, number, self.settings.contents)
        content = torch.full((count,), list(SHAPES).index(PERSON))
        return scenes(content, torch.arange(count) % len(COLOURS), number, self.settings.contents)

    @contextmanager
    def mixed(self, mixed: Mixed, way: str, seed: int, scale: float) -> Iterator[Any]:
        """The StyleMix of a pair of LoRAs in the pipeline, at the scale for both.

        None where it is of what the two share, and they share nothing.
        """
        made, how = dict(self.files(mixed, seed)), WAYS[way]
        if how.blocks:
            early = next(iter(schedules(*made)))
            made = {name: by_blocks(file, name == early) for name, file in made.items()}
        try:
            mix = mix_styles(self.pipe, made, scales=dict.fromkeys(made, scale), **how.options)
        except ParameterError:
            if how.options["component"] != "shared":
                raise
            yield None
            return
        try:
            yield mix
        finally:
            mix.unload()

    def files(self, mixed: Mixed, seed: int) -> dict[str, Path]:
        family = FAMILY if mixed.group == FAMILY else APART
        return {name: self.lora(family, name, seed) for name in (mixed.first, mixed.second)}

    def paint(self, content: Tensor, colour: Tensor, noise: Tensor) -> Tensor:
        return paint(self.pipe, content, colour, noise, self.settings.steps)

    @functools.cache  # noqa: B019 - one workshop lives as long as its process
    def truths(self, content: int, colour: int, styles: tuple[str, ...]) -> Tensor:
        """[24, 3, 32, 32] drawn pictures of a prompt in these styles."""
        return draw(self._undressed(content, colour), styles)

    @functools.cache  # noqa: B019
    def _undressed(self, content: int, colour: int) -> Scenes:
        return scenes(torch.full((TRUTHS,), content), torch.full((TRUTHS,), colour), 7, self.settings.contents)


def every_prompt(count: int, seed: int, contents: str) -> Scenes:
    """Scenes of all contents but the person's, in all colours, each as often as any other."""
    number = torch.arange(count)
    return scenes(number % len(CONTENTS), number // len(CONTENTS) % len(COLOURS), seed, contents)


def _styles(family: str, style: str) -> tuple[str, ...]:
    own = () if style == PERSON else (style,)
    return (*own, HOUSE) if family == FAMILY else own
