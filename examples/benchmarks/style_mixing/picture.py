"""The picture: rows of large tiles, the same noise in each row, a pair of styles in each column."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tvbases_diffusers.grid import paste

from .drawing import draw, scenes
from .settings import FAMILY, Mixed
from .studies import best_scale
from .ways import DEFAULT, PLAIN
from .workshop import Workshop

COLUMNS = (  # a content's number, a colour's and two styles
    (3, 2, "neon", "outlined"),
    (4, 0, "dotted", "sepia"),
    (8, 1, "slanted", "neon"),
    (6, 3, "outlined", "sepia"),
    (7, 4, "slanted", "dotted"),
    (5, 0, "watercolour", "neon"),
    (1, 2, "outlined", "dotted"),
    (2, 3, "neon", "sepia"),
)
TILE = 128


def draw_picture(workshop: Workshop, out: Path) -> None:
    """Content, both styles of the house alone, their plain sum at its best scale, our default as it is, and drawn."""
    settings = workshop.settings
    columns = [column for column in COLUMNS if {*column[2:]} <= {*settings.styles}]
    rows: dict[str, list[Any]] = {"content": [], "style A": [], "style B": []}
    truths: list[Any] = []
    for index, (content, colour, first, second) in enumerate(columns):
        pair = Mixed(FAMILY, first, second)
        prompt = torch.tensor([content]), torch.tensor([colour]), torch.tensor([4000 + index])
        rows["content"].append(_tile(workshop.paint(*prompt)))
        for row, style in (("style A", first), ("style B", second)):
            pipe: Any = workshop.pipe
            pipe.load_lora_weights(str(workshop.lora(FAMILY, style, settings.seeds[0])), adapter_name="alone")
            rows[row].append(_tile(workshop.paint(*prompt)))
            pipe.unload_lora_weights()
        best = best_scale(workshop, FAMILY, PLAIN)
        for way, scale, title in (
            (PLAIN, best, f"plain sum, at its best scale, {best:g}"),
            (DEFAULT, 1.0, "mix-styles"),
        ):
            with workshop.mixed(pair, way, settings.seeds[0], scale):
                rows.setdefault(title, []).append(_tile(workshop.paint(*prompt)))
        drawn = scenes(prompt[0], prompt[1], 4000 + index, settings.contents)
        truths.append(_tile(draw(drawn, pair.styles)))
    sheet = paste({**rows, "drawn: the truth": truths}, margin=190, letters=18)
    sheet.quantize(128).save(out, optimize=True)


def _tile(image: Tensor) -> Any:
    from PIL import Image

    pixels = (255 * image[0]).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(pixels).resize((TILE, TILE), Image.Resampling.BICUBIC)
