"""Mixes of two or more style LoRAs as pictures: on FLUX.1 on a GPU, or on a small Flux that is trained here.

    python examples/flux_style_mixing.py --real --style anime=anime.safetensors --style pixel=pixel.safetensors \\
        --prompt "a castle on a hill" --out castle.png [--method tsv] [--comfy mixed.safetensors]

draws no style, every style alone, the plain sum and the mix, the last two at several strengths, since a way that makes
everything weaker can look better for that alone. With a CLIP model of transformers it also prints how well every row's
pictures agree with the prompt. --pipeline takes FLUX.1-schnell (the default), black-forest-labs/FLUX.2-klein-4B,
Qwen/Qwen-Image or whatever else has a LoRA loader; --comfy writes the mix as ComfyUI loads it.

It costs 34 GB of downloads and as much memory of a GPU in bfloat16 (FLUX.1-schnell), and with two styles, three
strengths and three seeds 27 pictures of 4 steps. Without --real it is examples/benchmarks/bench_styles.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

REAL = "black-forest-labs/FLUX.1-schnell"
CLIP = "openai/clip-vit-base-patch32"


def run_real(given: argparse.Namespace) -> dict[str, float]:
    """The CLIP score of every row, by its title; none without a CLIP model."""
    from tvbases_diffusers.grid import draw_grid
    from tvbases_hf import mix_style_files

    styles = dict(style.split("=", 1) for style in given.style)
    way: dict[str, Any] = {"method": given.method, "component": given.component}
    how = {"prompt": given.prompt, "seeds": given.seeds, "steps": given.steps, "device": given.device}
    rows = draw_grid(given.pipeline, styles, given.out, strengths=given.strength or (0.6, 0.8, 1.0), **way, **how)
    if given.comfy is not None:
        mix_style_files(styles, given.comfy, loader="comfy", family=given.family, **way)
    scores = clip_scores(rows, given.prompt, given.clip)
    for title, score in scores.items():
        print(f"{title:32} {score:.3f}")
    return scores


@torch.no_grad()
def clip_scores(rows: Mapping[str, Sequence[Any]], prompt: str, source: str) -> dict[str, float]:
    """The mean cosine of every row's pictures and the prompt; empty, with a word why, where CLIP cannot be had."""
    from transformers import CLIPModel, CLIPProcessor

    try:
        model, processor = CLIPModel.from_pretrained(source).eval(), CLIPProcessor.from_pretrained(source)
    except (OSError, ValueError) as error:
        print(f"no CLIP scores: {str(error).splitlines()[0]}", file=sys.stderr)
        return {}
    found = {}
    for title, pictures in rows.items():
        given: Any = processor(text=[prompt], images=list(pictures), return_tensors="pt", padding=True)
        said: Any = model(**given)
        images, text = said.image_embeds, said.text_embeds
        found[title] = float(torch.nn.functional.cosine_similarity(images, text).mean())
    return found


def main(arguments: Sequence[str] | None = None) -> Any:
    arguments = sys.argv[1:] if arguments is None else arguments
    if "--real" not in arguments and not {"-h", "--help"} & set(arguments):
        sys.path.insert(0, str(Path(__file__).resolve().parent / "benchmarks"))
        from style_mixing.command import main as small

        return small(arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", action="store_true", help="your LoRAs, on a GPU")
    parser.add_argument("--pipeline", default=REAL, help=f"default: {REAL}")
    parser.add_argument("--style", action="append", required=True, metavar="NAME=PATH_OR_ID", help="repeat")
    parser.add_argument("--method", help="a merging method in place of the sum")
    parser.add_argument("--component", choices=["unique", "shared", "full"])
    parser.add_argument("--strength", type=float, action="append", help="repeat; default: 0.6, 0.8 and 1")
    parser.add_argument("--prompt", default="a castle on a hill")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--clip", default=CLIP, metavar="PATH_OR_ID", help=f"default: {CLIP}")
    parser.add_argument("--out", type=Path, default=Path("flux_styles.png"))
    parser.add_argument("--comfy", type=Path, metavar="FILE", help="also the mix, as ComfyUI loads it")
    parser.add_argument(
        "--family", help="--comfy: whose styles these are, where their names leave it open: Flux.1, ..."
    )
    return run_real(parser.parse_args(arguments))


if __name__ == "__main__":
    main()
