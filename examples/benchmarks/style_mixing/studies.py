"""Studies: whether base and LoRAs are what they should be, the best scale of every way, and what is seen at it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from evidence.runner import Answer, Question, Study, known
from torch import Tensor

from .drawing import COLOURS, CONTENTS, EVERY_STYLE, PERSON, SHAPES, draw, scenes
from .judge import accuracy, verdict
from .settings import Mixed, Settings
from .ways import SAME_AS_PLAIN, WAYS, schedules
from .workshop import Workshop

BEST, ONE = "best", "1"
DRAWN = "drawn"


def base_questions(settings: Settings) -> Iterator[Question]:
    yield {"what": "judge"}
    yield {"what": "base"}


def base_answer(workshop: Workshop, question: Question) -> Answer:
    if question["what"] == "judge":
        settings = workshop.settings
        return {**accuracy(workshop.judge, settings.judge_examples // 2, settings.contents)}
    content, colour = _prompts(0, 30 if workshop.settings.needed else 1, None)
    found = verdict(workshop.judge, workshop.paint(content, colour, torch.arange(len(content))))
    numbers = sum(p.numel() for p in workshop.pipe.transformer.parameters())
    styled = (found.styles > 0.5).double().mean(0)
    return {
        "content": float((found.content == content).double().mean()),
        "styles": dict(zip(EVERY_STYLE, styled.tolist(), strict=True)),
        "count": len(content),
        "parameters": numbers,
    }


def lora_questions(settings: Settings) -> Iterator[Question]:
    for seed in settings.seeds:
        yield from ({"family": family, "style": style, "seed": seed} for family, style in settings.loras())


def lora_answer(workshop: Workshop, question: Question) -> Answer:
    """What it shows alone, at scale 1, in pictures of all contents (of the person, its own)."""
    file, style = workshop.lora(question["family"], question["style"], question["seed"]), question["style"]
    person = list(SHAPES).index(PERSON) if style == PERSON else None
    content, colour = _prompts(1, 10 if workshop.settings.needed else 1, person)
    pipe: Any = workshop.pipe
    pipe.load_lora_weights(str(file), adapter_name="alone")
    images = workshop.paint(content, colour, 50_000 + torch.arange(len(content)))
    pipe.unload_lora_weights()
    found = verdict(workshop.judge, images)
    shown: dict[str, float] = dict(zip(EVERY_STYLE, (found.styles > 0.5).double().mean(0).tolist(), strict=True))
    return {
        "content": float((found.content == content).double().mean()),
        "style": shown.get(style, 1.0),
        "styles": shown,
        "count": len(content),
        "bytes": file.stat().st_size,
    }


def screen_questions(settings: Settings) -> Iterator[Question]:
    for way in WAYS:
        groups = [group for group in settings.groups if way in settings.ways_of(group)]
        yield from ({"way": way, "group": group} for group in groups)


def screen_answer(workshop: Workshop, question: Question) -> Answer:
    """Of some pairs of the first seed, at every scale, the share of pictures that show all that is wanted."""
    settings, way = workshop.settings, question["way"]
    counted = {scale: [] for scale in settings.scales}
    for number, pair in enumerate(settings.screen(question["group"])):
        content, colour = _prompts(number, settings.screen_repeats, _person(pair))
        noise = 90_000 + 100 * number + torch.arange(len(content))
        with workshop.mixed(pair, way, settings.seeds[0], 1.0) as mix:
            for scale in settings.scales:
                _set(mix, pair, way, scale)
                seen = _seen(workshop, pair, workshop.paint(content, colour, noise), content)
                counted[scale] += seen["both"]
    return {"both": {str(scale): sum(bits) / len(bits) for scale, bits in counted.items()}}


def final_questions(settings: Settings) -> Iterator[Question]:
    for seed in settings.seeds:
        yield from ({"seed": seed, "way": DRAWN, "scale": ONE, "group": group} for group in settings.groups)
        for way in WAYS:
            if seed != settings.seeds[0] and way not in (*settings.repeated, *SAME_AS_PLAIN):
                continue
            for group in settings.groups:
                if way in settings.ways_of(group):
                    yield {"seed": seed, "way": way, "scale": BEST, "group": group}
                if way in settings.at_one and way in (*settings.ways, *SAME_AS_PLAIN):
                    yield {"seed": seed, "way": way, "scale": ONE, "group": group}


def final_answer(workshop: Workshop, question: Question) -> Answer:
    """Of every picture of every pair whether it shows what is wanted, and its distance to the nearest drawn one."""
    settings, way, group = workshop.settings, question["way"], question["group"]
    scale = best_scale(workshop, group, way) if question["scale"] == BEST else 1.0
    found: dict[str, list[Any]] = {}
    for number, pair in enumerate(settings.pairs(group)):
        content, colour = prompts_of(settings, pair, number)
        noise = 1000 * number + torch.arange(len(content))
        if way == DRAWN:
            images = draw(scenes(content, colour, 5 + number, settings.contents), pair.styles)
        else:
            with workshop.mixed(pair, way, question["seed"], scale) as mix:
                _set(mix, pair, way, scale)
                images = workshop.paint(content, colour, noise)
        own = _seen(workshop, pair, images, content)
        own["distance"] = _distances(workshop, pair, images, content, colour)
        own["apart"] = _apart(images)
        own["pair"] = [number] * len(content)
        for name, values in own.items():
            found[name] = found.get(name, []) + values
    return {"scale": scale, **found}


def best_scale(workshop: Workshop, group: str, way: str) -> float:
    """By the screen; of equally good ones that nearest to 1."""
    answers = known(workshop, SCREEN).of(group=group, way=way)
    rates: dict[str, float] = answers[0]["both"]
    return float(max(rates, key=lambda scale: (rates[scale], -abs(float(scale) - 1))))


def prompts_of(settings: Settings, pair: Mixed, number: int) -> tuple[Tensor, Tensor]:
    """Every content ``repeats`` times in one colour, which goes on from pair to pair; of a person every colour."""
    repeats = settings.repeats
    if _person(pair) is None:
        return _prompts(number, repeats, None)
    return _prompts(number, 5 * repeats // 2, _person(pair))


def _prompts(shift: int, repeats: int, person: int | None) -> tuple[Tensor, Tensor]:
    """Contents and colours; equal prompts follow each other in groups of two."""
    if person is None:
        content = torch.arange(len(CONTENTS)).repeat_interleave(repeats)
        return content, (content + shift + torch.arange(len(content)) % repeats // 2) % len(COLOURS)
    colour = torch.arange(len(COLOURS)).repeat_interleave(2 * repeats)
    return torch.full((len(colour),), person), colour


def _person(pair: Mixed) -> int | None:
    return list(SHAPES).index(PERSON) if pair.first == PERSON else None


def _set(mix: Any, pair: Mixed, way: str, scale: float) -> None:
    """Both styles at the scale, or at as much of it as the steps are to have; where there is no mix, nothing."""
    if mix is None:
        return
    mix.set_style_scales(dict.fromkeys(mix.names, scale))
    if WAYS[way].steps:
        plan = schedules(pair.first, pair.second)
        mix.schedule({name: [scale * part for part in parts] for name, parts in plan.items()})


def _seen(workshop: Workshop, pair: Mixed, images: Tensor, content: Tensor) -> dict[str, list[Any]]:
    """By picture, 1 or 0: is the content right, is every style there, and both at once."""
    found = verdict(workshop.judge, images)
    right = found.content == content
    styles = torch.stack([found.shows(name) for name in pair.wanted], 1)
    return {
        "content": right.int().tolist(),
        "styles": styles.double().mean(1).tolist(),
        "both": (right & styles.all(1)).int().tolist(),
    }


def _distances(workshop: Workshop, pair: Mixed, images: Tensor, content: Tensor, colour: Tensor) -> list[float]:
    """Root mean square over a picture's numbers, to the nearest of 24 that are drawn of the prompt and the styles."""
    found = []
    for image, what, ink in zip(images, content.tolist(), colour.tolist(), strict=True):
        truths = workshop.truths(what, ink, pair.styles)
        found.append(round(float((truths - image).square().mean((1, 2, 3)).min().sqrt()), 5))
    return found


def _apart(images: Tensor) -> list[float]:
    """How far a picture is from the other of the same prompt, one number for each of the two: diversity."""
    if len(images) % 2:
        return [0.0] * len(images)
    halves = images.reshape(-1, 2, *images.shape[1:])
    apart = (halves[:, 0] - halves[:, 1]).square().mean((1, 2, 3)).sqrt()
    return [round(value, 5) for value in apart.repeat_interleave(2).tolist()]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """A mean and the half width of its 95 % interval."""
    numbers = torch.tensor(values, dtype=torch.float64)
    return float(numbers.mean()), 1.96 * float(numbers.std()) / len(values) ** 0.5


BASE = Study("base", base_questions, base_answer)
LORAS = Study("loras", lora_questions, lora_answer)
SCREEN = Study("screen", screen_questions, screen_answer)
FINAL = Study("final", final_questions, final_answer)
