"""``tvbases mix-styles``: LoRA files in, one mixed LoRA file out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from ..errors import ParameterError
from .app import app, console
from .options import Json, Quiet, check_json, parse_dtype, write_report


@app.command(
    "mix-styles",
    epilog="Example: tvbases mix-styles --style anime=a.safetensors --style pixel=b.safetensors --scale pixel=1.2 "
    "--out mixed.safetensors",
)
def mix_styles(
    style: Annotated[
        list[str],
        typer.Option(
            "--style", help="A style's LoRA, in any of diffusers' formats; repeat.", metavar="NAME=PATH_OR_ID"
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="The LoRA file to write.", metavar="FILE")],
    scale: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--scale", help="A style's weight in the mix (1); repeat.", metavar="NAME=NUMBER"),
    ] = None,
    component: Annotated[str, typer.Option(help="unique, shared or full (the plain sum).")] = "unique",
    shared_weight: Annotated[
        float, typer.Option(help="unique: add this much of one copy of what the styles share.")
    ] = 0.0,
    threshold: Annotated[
        float, typer.Option(help="Degree of sharing, 0 to 1, above which a direction is shared.")
    ] = 0.85,
    subspace: Annotated[
        str, typer.Option(help="chain (the paper's), mean (order-free) or angles (two styles).")
    ] = "chain",
    pool: Annotated[
        str, typer.Option(help="joint (shared by all styles) or iterative (by any two of them).")
    ] = "joint",
    side: Annotated[str, typer.Option(help="column (output directions) or row (input directions).")] = "column",
    rank: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="Leading directions of a style that count: energy:0.9, 4, ...; left out: all.", metavar="RULE"
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option("--dtype", help="auto (the styles' own), float32, bfloat16 or float16.")
    ] = "auto",
    report: Annotated[bool, typer.Option("--report", help="Also what is shared by block and by two styles.")] = False,
    grid: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Also a picture: the plain sum against this mix; needs --pipeline.", metavar="PNG"),
    ] = None,
    pipeline: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="The pipeline that draws the picture.", metavar="PATH_OR_ID"),
    ] = None,
    prompt: Annotated[str, typer.Option(help="What the picture shows.")] = "a castle on a hill",
    seeds: Annotated[int, typer.Option(help="How many columns the picture has.")] = 4,
    steps: Annotated[int, typer.Option(help="Denoising steps of the picture.")] = 4,
    device: Annotated[str, typer.Option(help="Where the picture is drawn: cpu, cuda, ...")] = "cpu",
    quiet: Quiet = False,
    json: Json = None,
) -> None:
    """Mix style LoRAs by what is unique to each, so that what they share does not add up. No model is loaded."""
    from ..methods.devec import Options
    from ..models.vectors import parse_tasks
    from ..storage.output import check_output_file
    from ..styles.mixed_file import is_mix, write_mix
    from ..styles.mixing import Recipe, Styles, parse_scales
    from ..styles.report import print_styles
    from .tables import warn

    check_json(json)
    check_output_file(out, is_mix)
    if (grid is None) != (pipeline is None):
        raise ParameterError("--grid and --pipeline go together: the pipeline draws the picture")
    stored = parse_dtype(dtype)
    recipe = Recipe(component, Options(threshold, subspace, pool, side, factored_rank=rank), shared_weight)
    sources = parse_tasks(style)
    scales = parse_scales(tuple(sources), _scales(scale or []))
    how: dict[str, Any] = {"sources": sources, "dtype": stored, "pairs": report or json is not None}
    found = write_mix(Styles.open(sources), recipe, scales, out, **how)
    warn(found["notes"])
    if not quiet:
        print_styles(found, console, blocks=report)
    if grid is not None and pipeline is not None:
        from tvbases_diffusers.grid import draw_grid

        draw_grid(pipeline, sources, recipe, scales, grid, prompt=prompt, seeds=seeds, steps=steps, device=device)
    write_report(json, found)


def _scales(items: list[str]) -> dict[str, float]:
    """``NAME=NUMBER`` arguments; ParameterError for a bad or repeated one."""
    found: dict[str, float] = {}
    for item in items:
        name, _, number = item.partition("=")
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if not name or not math.isfinite(value):
            raise ParameterError(f'--scale "{item}" is not NAME=NUMBER, for example anime=0.8')
        if name in found:
            raise ParameterError(f'two scales for "{name}" ({found[name]:g} and {number}); give one')
        found[name] = value
    return found
