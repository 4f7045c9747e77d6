"""Style mixing with the unique components of style LoRAs: on a small Flux that is trained here, or on FLUX.1 on a GPU.

    python examples/flux_style_mixing.py [--workdir DIR] [--out flux_styles.png] [--json FILE] [--threads 2] [--quick]

trains a FluxTransformer2DModel on scikit-learn's digits, then style LoRAs with PEFT: three go on from one LoRA of
framed digits, so that they share what it had learnt, and one has nothing to do with the others. What was trained is
kept for the next run. Then it mixes them, draws a picture of base, styles and mixes, and has a classifier count, over
200 pictures of each mix, how many digits are right and how many of the mixed styles are there, with 95 % intervals.

    python examples/flux_style_mixing.py --real --style anime=anime.safetensors --style pixel=pixel.safetensors \\
        --prompt "a castle on a hill" --out castle.png

does the same with black-forest-labs/FLUX.1-schnell and your LoRAs: no style, the plain sum, and the unique mix.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

REAL = "black-forest-labs/FLUX.1-schnell"
CACHE = Path.home() / ".cache" / "tvbases-hf" / "flux-digits"
COMMON = "framed"
# The styles that go on from the common one show it too; a name says what its pictures show.
FAMILY = ("thick+framed", "slanted+framed", "striped+framed")
APART = ("lit",)
MIXES: dict[str, tuple[str, ...]] = {
    "two that share": FAMILY[:2],
    "three that share": FAMILY,
    "one of them and another": (FAMILY[0], APART[0]),
    "all four": (*FAMILY, *APART),
}
WAYS: dict[str, dict[str, Any]] = {
    "plain sum": {"component": "full"},
    "unique": {"component": "unique"},
    "unique, by pairs": {"component": "unique", "pool": "iterative"},
    "unique + one copy": {"component": "unique", "shared_weight": 1.0},
}
# The rows of the picture: enough to see what the figures say.
PICTURED = ("base", *FAMILY[:2], "two that share: plain sum", "two that share: unique + one copy")


def interval(values: Tensor) -> tuple[float, float]:
    """A mean and the half width of its 95 % interval."""
    values = values.double()
    return float(values.mean()), 1.96 * float(values.std()) / math.sqrt(len(values))


def score(judge: Any, images: Tensor, labels: Tensor, wanted: Sequence[str]) -> dict[str, Any]:
    """Digits that are right, wanted styles that are there (out of how many), and each style by itself."""
    from flux_digits import STYLES

    with torch.no_grad():
        digit, logits = judge(images)
    there = dict(zip(STYLES, (logits > 0).T, strict=True))
    own = [there[name].double() for name in wanted]
    return {
        "digit": interval((digit.argmax(1) == labels).double()),
        "wanted": len(own),
        "present": interval(torch.stack(own).sum(0)) if own else (0.0, 0.0),
        "ink": float(images.mean()),
        "styles": {name: float(values.double().mean()) for name, values in there.items()},
    }


def shown(names: Sequence[str]) -> list[str]:
    """What a mix of these should show: what each has of its own (all that the common style had is shared)."""
    return list(dict.fromkeys(part for name in names for part in name.split("+") if part != COMMON))


def run_small(given: argparse.Namespace) -> dict[str, Any]:
    from diffusers.utils import logging
    from flux_digits import Plan, draw, train_base, train_judge, train_style

    from tvbases_diffusers import mix_styles

    logging.set_verbosity_error()  # it says of every LoRA that there is none for the absent text encoder
    torch.set_num_threads(given.threads)
    plan = Plan((1, 1), 2, 12, 6, 8, 2, 2) if given.quick else Plan()
    directory = given.workdir / ("quick" if given.quick else "full")
    directory.mkdir(parents=True, exist_ok=True)
    judge, accuracy = train_judge(directory, given.quiet, 20 if given.quick else 1500)
    pipe = train_base(directory, plan, given.quiet)
    common = train_style(directory, pipe, COMMON, [COMMON], plan, given.quiet, None)
    files = {name: train_style(directory, pipe, name, name.split("+"), plan, given.quiet, common) for name in FAMILY}
    files |= {name: train_style(directory, pipe, name, [name], plan, given.quiet, None) for name in APART}
    labels = torch.arange(10).repeat(given.images // 10)
    found: dict[str, Any] = {"judge": accuracy, "images": len(labels), "alone": {}, "mixes": {}}
    rows: dict[str, Tensor] = {}

    def look(title: str, wanted: Sequence[str]) -> dict[str, Any]:
        images = draw(pipe, labels, plan)
        rows[title] = images[:10]
        return score(judge, images, labels, wanted)

    found["alone"]["base"] = look("base", [])
    for name, file in files.items():
        pipe.load_lora_weights(str(file), adapter_name="alone")
        found["alone"][name] = look(name, name.split("+"))
        pipe.unload_lora_weights()
    for title, names in MIXES.items():
        for way, options in WAYS.items():
            mix = mix_styles(pipe, {name: str(files[name]) for name in names}, **options)
            result = look(f"{title}: {way}", shown(names))
            found["mixes"][f"{title}: {way}"] = result | {"shared": mix.report["shared"]["all"]}
            mix.unload()
    paste_rows({title: rows[title] for title in PICTURED}).save(given.out)
    return found


def paste_rows(rows: Mapping[str, Tensor]) -> Any:
    """Each row's digits, enlarged, titles at the left."""
    from PIL import Image

    from tvbases_diffusers.grid import paste

    def picture(image: Tensor) -> Any:
        pixels = (255 * (1 - image[0])).round().byte().numpy()
        return Image.fromarray(pixels).resize((80, 80), Image.Resampling.NEAREST)

    pictures = {title: [picture(image) for image in images] for title, images in rows.items()}
    return paste(pictures, margin=230, letters=20).convert("L")


def print_small(found: dict[str, Any]) -> None:
    judge = found["judge"]
    print(f"classifier on digits that it has not seen: digit {judge['digit']:.1%}, style {judge['style']:.1%}")
    print(f"{'':44}  digit right       styles there     frame   shared")
    for title, row in {**found["alone"], **found["mixes"]}.items():
        digit, present = row["digit"], row["present"]
        shares = ", ".join(f"{share:.0%}" for share in row.get("shared", {}).values())
        print(
            f"{title:44}  {digit[0]:.2f} ± {digit[1]:.2f}     {present[0]:.2f} ± {present[1]:.2f} of {row['wanted']}"
            f"  {row['styles'][COMMON]:6.2f}   {shares}"
        )


def run_real(given: argparse.Namespace) -> None:
    from tvbases_diffusers.grid import draw_grid

    styles = dict(style.split("=", 1) for style in given.style)
    scales = dict.fromkeys(styles, given.scale)
    draw_grid(given.pipeline, styles, given.out, scales=scales, prompt=given.prompt, seeds=3, device="cuda")


def main(arguments: Sequence[str] | None = None) -> dict[str, Any] | None:
    parser = argparse.ArgumentParser(description="Mix style LoRAs by what is unique to each.")
    parser.add_argument("--workdir", type=Path, default=CACHE, help="where what was trained is kept")
    parser.add_argument("--out", type=Path, default=Path("flux_styles.png"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--images", type=int, default=200, help="pictures of each mix that are scored")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="train hardly anything, to see that it runs")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.add_argument("--real", action="store_true", help=f"use {REAL} (about 34 GB of downloads) on a GPU")
    parser.add_argument("--pipeline", default=REAL)
    parser.add_argument("--style", action="append", default=[], metavar="NAME=PATH_OR_ID")
    parser.add_argument("--scale", type=float, default=1.0, help="of every style")
    parser.add_argument("--prompt", default="a castle on a hill")
    given = parser.parse_args(arguments)
    if given.real:
        run_real(given)
        return None
    found = run_small(given)
    print_small(found)
    if given.json:
        given.json.write_text(json.dumps(found, indent=2) + "\n")
    return found


if __name__ == "__main__":
    main()
