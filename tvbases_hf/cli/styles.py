"""``tvbases mix-styles``: LoRA files in, one mixed LoRA file out."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated

import typer

from .. import defaults
from ..errors import ParameterError
from .app import app
from .hub import PushToHub
from .options import (
    Device,
    DryRun,
    Dtype,
    EqualRank,
    Json,
    Quiet,
    Side,
    Subspace,
    Threshold,
    apart,
    file_option,
    parse_dtype,
    parse_numbers,
    parse_values,
    rank_option,
    tell,
)


@app.command(
    "mix-styles",
    epilog="Example: tvbases mix-styles --style anime=a.safetensors --style pixel=b.safetensors --scale pixel=1.2 "
    "--out mixed.safetensors",
)
def mix_styles(
    style: Annotated[
        list[str],
        typer.Option("--style", help="A style's LoRA, from any trainer; repeat.", metavar="NAME=PATH_OR_ID"),
    ],
    out: Annotated[Path, typer.Option("--out", help="The LoRA file to write.", metavar="FILE", callback=apart)],
    scale: Annotated[
        list[str] | None,
        typer.Option("--scale", help="A style's weight in the mix; default: 1; repeat.", metavar="NAME=NUMBER"),
    ] = None,
    component: Annotated[
        defaults.StyleComponent | None,
        typer.Option(
            "--component",
            help="Of each style: what is unique to it, what is shared, or all of it. Default: unique; with "
            "--method: full.",
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option("--method", help="Merge the components with a merging method, such as tsv; default: their sum."),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", help="An option of the method, such as density=0.3; repeat.", metavar="NAME=VALUE"),
    ] = None,
    shared_weight: Annotated[
        float | None,
        typer.Option(
            help="With --component unique: add one copy of what styles share, times this; default: 1, with --method 0."
        ),
    ] = None,
    threshold: Threshold = defaults.THRESHOLD,
    subspace: Subspace = "chain",
    pool: Annotated[
        defaults.StylePool,
        typer.Option("--pool", help="Shared is what all styles share (joint), or any two of them (iterative)."),
    ] = "joint",
    side: Side = "column",
    rank: Annotated[str | None, rank_option("how many leading directions of a style count; default: all.")] = None,
    dtype: Dtype = "auto",
    loader: Annotated[
        defaults.StyleLoader, typer.Option("--loader", help="Whose names the file uses; comfy: ComfyUI's and kohya's.")
    ] = "diffusers",
    family: Annotated[
        str | None, typer.Option(help="With --loader comfy: which model, if several have the styles' modules.")
    ] = None,
    equal_rank: EqualRank = False,
    report: Annotated[
        bool, typer.Option("--report", help="Also show what is shared, block by block and by each two styles.")
    ] = False,
    grid: Annotated[
        Path | None, file_option("Also draw each style, their plain sum and this mix; needs --pipeline.", "PNG")
    ] = None,
    pipeline: Annotated[
        str | None, typer.Option(help="The pipeline that draws the picture.", metavar="PATH_OR_ID")
    ] = None,
    prompt: Annotated[str, typer.Option(help="What the picture shows.")] = "a castle on a hill",
    seeds: Annotated[int, typer.Option(min=1, help="How many columns the picture has.")] = 4,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps of the picture.")] = 4,
    device: Device = "cpu",
    dry_run: DryRun = False,
    quiet: Quiet = False,
    push_to_hub: PushToHub = None,
    json: Json = None,
) -> None:
    """Mix style LoRAs; what they share goes in once. No model is loaded.

    --device is where the picture is drawn.
    """
    from ..models.vectors import parse_tasks
    from ..styles.mixed_file import mix_style_files
    from ..styles.report import print_styles

    if (grid is None) != (pipeline is None):
        raise ParameterError("--grid and --pipeline go together: the pipeline draws the picture")
    styles, scales = parse_tasks(style, "style", "anime=anime.safetensors"), parse_numbers("--scale", scale or ())
    recipe = {"component": component, "shared_weight": shared_weight, "threshold": threshold}
    recipe |= {"subspace": subspace, "pool": pool, "side": side, "rank": rank}
    recipe |= {"method": method, "method_options": parse_values("--option", option or ())}
    how = {"dtype": parse_dtype(dtype), "pairs": report or json is not None, "dry_run": dry_run}
    how |= {"loader": loader, "family": family, "equal_rank": equal_rank}
    draw = None
    if grid is not None and pipeline is not None and not dry_run:
        from tvbases_diffusers.grid import draw_grid, load_pipeline

        picture = {"prompt": prompt, "seeds": seeds, "steps": steps}
        draw = functools.partial(draw_grid, load_pipeline(pipeline, device), styles, grid, **picture)
    found = mix_style_files(styles, out, scales=scales, **recipe, **how)
    if draw is not None:
        draw(scales=scales, **recipe)
    tell(found, functools.partial(print_styles, blocks=report), json)
