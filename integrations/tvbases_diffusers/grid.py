"""A picture grid: every style alone, and the plain sum of styles against their mix, for several seeds."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tvbases_hf.errors import CheckpointError, MissingExtraError, ParameterError
from tvbases_hf.storage.reports import write_picture
from tvbases_hf.text import wrapped

from .mixing import mix_styles

GAP, MARGIN = 8, 120


def draw_grid(
    source: Any,
    styles: Mapping[str, Any],
    out: Path,
    *,
    component: str | None = None,
    shared_weight: float | None = None,
    method: str | None = None,
    method_options: Mapping[str, Any] | None = None,
    prompt: str = "a castle on a hill",
    seeds: int = 4,
    steps: int = 4,
    device: str = "cpu",
    scales: Mapping[str, float] | None = None,
    strengths: Sequence[float] = (1.0,),
    **recipe: Any,
) -> dict[str, list[Any]]:
    """Rows: no style, each style alone, the plain sum, the mix. Columns: seeds, the same noise in each row.

    Args:
        source: a pipeline, or what load_pipeline takes.
        strengths: the plain sum and the mix get a row for each, all scales times it, to compare them at the best of
            each.
        recipe: what else mix_styles takes: threshold, subspace, pool, side, rank.

    Returns the pictures by row. Raises ParameterError for no seeds, steps or strengths, CheckpointError for a pipeline
    that cannot be loaded.
    """
    if seeds < 1 or steps < 1 or not strengths:
        raise ParameterError(f"{seeds} seeds, {steps} steps, {len(strengths)} strengths; all must be at least 1")
    pipe = load_pipeline(source, device) if isinstance(source, str) else source
    rows = {"no style": _pictures(pipe, prompt, seeds, steps)}
    mixed: dict[str, Any] = {"component": component, "shared_weight": shared_weight, "method": method}
    mixed["method_options"] = method_options
    for title, way in (("plain sum", {"component": "full"}), (f"{method or component or 'unique'} mix", mixed)):
        mix = mix_styles(pipe, styles, scales=scales, **way, **recipe)
        own = mix.scales
        if title == "plain sum":
            for name in mix.names:
                mix.set_style_scales({**dict.fromkeys(own, 0.0), name: own[name]})
                rows[name] = _pictures(pipe, prompt, seeds, steps)
        for strength in strengths:
            mix.set_style_scales({name: strength * scale for name, scale in own.items()})
            row = title if len(strengths) == 1 else f"{title} x {strength:g}"
            rows[row] = _pictures(pipe, prompt, seeds, steps)
        mix.unload()
    drawn = io.BytesIO()
    paste(rows).save(drawn, format="PNG")
    write_picture(out, drawn.getvalue())
    return rows


def load_pipeline(source: str, device: str) -> Any:
    """A pipeline in bfloat16 where there is an accelerator, else in float32.

    Raises MissingExtraError without diffusers, CheckpointError for one that cannot be loaded.
    """
    try:
        from diffusers import DiffusionPipeline
    except ImportError as error:
        raise MissingExtraError(
            f'--pipeline needs diffusers and PEFT ({error}); pip install "tvbases-hf[diffusers,peft]"'
        ) from error
    try:
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        return DiffusionPipeline.from_pretrained(source, torch_dtype=dtype).to(device)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f'--pipeline "{source}": diffusers cannot load it: {reason}') from error


def words(prompt: str) -> dict[str, Any]:
    """What the pipeline is told."""
    return {"prompt": prompt}


def _pictures(pipe: Any, prompt: str, seeds: int, steps: int) -> list[Any]:
    return [
        pipe(**words(prompt), num_inference_steps=steps, generator=torch.Generator("cpu").manual_seed(seed)).images[0]
        for seed in range(seeds)
    ]


def paste(rows: Mapping[str, Sequence[Any]], margin: int = MARGIN, letters: int = 14) -> Any:
    """One picture of rows with titles at their left, in lines that fit; all pictures have one size."""
    from PIL import Image, ImageDraw, ImageFont

    width, height = next(iter(rows.values()))[0].size
    columns = max(len(row) for row in rows.values())
    sheet = Image.new("RGB", (margin + columns * (width + GAP), len(rows) * (height + GAP)), "white")
    pen = ImageDraw.Draw(sheet)
    for y, (title, row) in enumerate(rows.items()):
        lines = "\n".join(wrapped(title, int(1.8 * (margin - 2 * GAP) / letters)))
        place = (GAP, y * (height + GAP) + height // 2)
        pen.text(place, lines, fill="black", anchor="lm", font=ImageFont.load_default(letters))
        for x, picture in enumerate(row):
            sheet.paste(picture.convert("RGB"), (margin + x * (width + GAP), y * (height + GAP)))
    return sheet
