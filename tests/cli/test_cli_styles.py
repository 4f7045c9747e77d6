"""tvbases mix-styles: files in, one file out, or one message and nothing written."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from commands.command_line import misused, refused, tvbases
from tvbases_hf.algebra.delta import dense
from tvbases_hf.errors import ParameterError
from tvbases_hf.styles.diffusers_files import read_lora_file
from tvbases_hf.styles.mixed_file import mix_style_files, read_recipe
from zoo.lora_files import kohya, write
from zoo.peft_models import relative
from zoo.pipelines import FLUX_MODULES, dense_mixed, flux_pipeline, products, style


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """a and b in directories of their own, and a file of notes."""
    for seed, name in enumerate("ab"):
        (tmp_path / name).mkdir()
        write(tmp_path / name, style(seed, FLUX_MODULES))
    (tmp_path / "notes.txt").write_text("not a LoRA")
    return tmp_path


def given(place: Path) -> list[Any]:
    files = [f"{name}={place / name / 'style.safetensors'}" for name in "ab"]
    return ["mix-styles", "--style", files[0], "--style", files[1], "--out", place / "mixed.safetensors"]


def test_the_mixed_file_holds_the_dense_mix_and_the_report_its_shares(place: Path) -> None:
    outcome = tvbases(*given(place), "--scale", "b=1.2", "--report", "--json", place / "report.json")
    assert outcome.code == 0 and outcome.err == ""
    report = json.loads((place / "report.json").read_text())
    changes = [products(style(seed, FLUX_MODULES)) for seed in range(2)]
    for module, delta in read_lora_file(place / "mixed.safetensors")["transformer"].items():
        a, b = dense_mixed([own[f"transformer.{module}"] for own in changes])
        assert relative(dense(delta), a + 1.2 * b) <= 1e-5
    share = report["shared"]["all"]["a"]
    assert 0.1 < share < 0.9
    for words in (f"{share:.1%}", "single_transformer_blocks.0", "a + b", "unique components, threshold 0.85"):
        assert words in outcome.out
    assert report["recipe"]["component"] == "unique" and report["scales"] == {"a": 1.0, "b": 1.2}
    recipe = read_recipe(place / "mixed.safetensors")
    assert recipe is not None and recipe["styles"]["a"]["source"] == str(place / "a" / "style.safetensors")


def test_a_quiet_mix_is_silent_and_may_replace_a_mix(place: Path) -> None:
    for _ in range(2):
        outcome = tvbases(*given(place), "--quiet")
        assert (outcome.code, outcome.out, outcome.err) == (0, "", "")
    assert {path.name for path in place.iterdir()} == {"a", "b", "notes.txt", "mixed.safetensors"}


def test_styles_that_share_nothing_are_said_to_be_mixed_as_they_are(place: Path) -> None:
    for seed, name in enumerate("ab"):
        write(place / name, style(seed, FLUX_MODULES, common=0))
    outcome = tvbases(*given(place))
    assert outcome.code == 0
    assert outcome.err.startswith("warning: the styles share nothing to speak of at threshold 0.85")


def test_the_file_may_have_the_names_of_comfyui(place: Path) -> None:
    from safetensors.torch import load_file

    more = ["--loader", "comfy"]
    assert "say which" in refused(place, *given(place), *more)
    planned = tvbases(*given(place), *more, "--family", "Flux.1", "--dry-run")
    assert planned.code == 0 and not (place / "mixed.safetensors").exists()
    outcome = tvbases(*given(place), *more, "--family", "Flux.1")
    assert outcome.code == 0, outcome.err
    names = {name.partition(".")[0] for name in load_file(place / "mixed.safetensors")}
    assert "lora_unet_double_blocks_0_img_attn_qkv" in names and "lora_unet_single_blocks_0_linear2" in names


def draw_with_a_small_flux(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipeline of no tokenizer, told embeddings, in place of the one that --pipeline names."""
    embeds = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(3))
    said = {"prompt_embeds": embeds, "pooled_prompt_embeds": embeds[:, 0], "height": 16, "width": 16}
    monkeypatch.setattr("tvbases_diffusers.grid.load_pipeline", lambda source, device: flux_pipeline())
    monkeypatch.setattr("tvbases_diffusers.grid.words", lambda prompt: said)


def test_a_grid_draws_the_plain_sum_against_the_mix(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw_with_a_small_flux(monkeypatch)
    grid = place / "grid.png"
    more = ["--grid", grid, "--pipeline", "tiny", "--seeds", 3, "--steps", 1]
    outcome = tvbases(*given(place), *more)
    assert outcome.code == 0, outcome.err
    with Image.open(grid) as picture:
        assert picture.width > 3 * 16 and picture.height > 5 * 16  # no style, two styles, plain sum, mix


def test_the_example_for_a_gpu_draws_every_strength_and_says_that_there_is_no_clip(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    draw_with_a_small_flux(monkeypatch)
    example = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "flux_style_mixing.py"))
    styles = [part for name in "ab" for part in ("--style", f"{name}={place / name / 'style.safetensors'}")]
    more = ["--seeds", "1", "--steps", "1", "--strength", "0.5", "--strength", "1", "--method", "tsv"]
    files = ["--out", str(place / "real.png"), "--comfy", str(place / "comfy.safetensors"), "--family", "Flux.1"]
    example["main"](["--real", *styles, *more, *files, "--clip", str(place / "nothing")])
    assert "no CLIP scores" in capsys.readouterr().err
    assert (place / "comfy.safetensors").is_file()
    with Image.open(place / "real.png") as picture:
        assert picture.height > 7 * 16  # no style, two styles, the plain sum and the mix at two strengths


BAD: dict[str, tuple[Callable[[Path], list[Any]], str]] = {
    "a text file": (lambda p: ["--style", f"c={p / 'notes.txt'}"], "notes.txt"),
    "no such file": (lambda p: ["--style", f"c={p / 'c.safetensors'}"], "no such file"),
    "no name": (lambda p: ["--style", "c.safetensors"], "is not NAME=PATH, for example anime="),
    "one name twice": (lambda p: ["--style", f"a={p / 'b'}"], 'two styles are named "a"'),
    "a scale without a number": (lambda p: ["--scale", "a"], "is not NAME=NUMBER"),
    "a scale in words": (lambda p: ["--scale", "a=strong"], "is not NAME=NUMBER"),
    "a scale twice": (lambda p: ["--scale", "a=1", "--scale", "a=2"], 'two scales for "a"'),
    "a scale for nobody": (lambda p: ["--scale", "aa=1"], "did you mean a?"),
    "a threshold": (lambda p: ["--threshold", "2"], "above 0 and at most 1; got 2"),
    "a rank": (lambda p: ["--rank", "some"], "not a rank rule"),
    "a grid without a pipeline": (lambda p: ["--grid", p / "grid.png"], "go together"),
    "no pipeline": (lambda p: ["--grid", p / "g.png", "--pipeline", p / "nothing"], "diffusers cannot load it"),
    "a report in the mix": (lambda p: ["--json", p / "mixed.safetensors"], "are both"),
    "a directory as output": (lambda p: ["--out", p / "a"], "is a directory"),
    "someone else's file": (lambda p: ["--out", p / "notes.txt"], "this command did not write it"),
    "another style's file": (lambda p: ["--out", p / "a" / "style.safetensors"], "this command did not write it"),
    "below a file": (lambda p: ["--out", p / "notes.txt" / "x.safetensors"], "is a file itself"),
}


@pytest.mark.parametrize("name", sorted(BAD))
def test_bad_input_is_one_message(name: str, place: Path) -> None:
    more, message = BAD[name]
    assert message in refused(place, *given(place), *more(place))


def test_words_that_no_option_knows_are_wrong_usage_and_refused_by_the_library(place: Path) -> None:
    for option, word, known in (
        ("--component", "common", ("unique", "shared", "full")),
        ("--pool", "pairs", ("joint", "iterative")),
        ("--dtype", "half", ("float32", "bfloat16")),
    ):
        message = misused(place, *given(place), option, word)
        assert all(part in message for part in (option, f"'{word}'", *known))
    files = {name: str(place / name) for name in "ab"}
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"component": "common"}, "choose one of unique, shared, full"),
        ({"pool": "pairs"}, "joint or iterative"),
    ]
    for options, reason in wrong:
        with pytest.raises(ParameterError, match=reason):
            mix_style_files(files, place / "mixed.safetensors", **options)


def test_another_architecture_and_keys_left_over_are_one_message(place: Path) -> None:
    (place / "c").mkdir()
    write(place / "c", style(0, {"down_blocks.0.attentions.0.proj_in": (32, 32)}, "unet"))
    message = refused(place, *given(place), "--style", f"c={place / 'c'}")
    assert '"a" changes the transformer, "c" the unet: LoRAs of different models cannot be mixed' in message
    write(place / "c", kohya({"lora_unet_double_blocks_0_attention_of_tomorrow": (8, 8)}))
    assert "cannot translate its names" in refused(place, *given(place), "--style", f"c={place / 'c'}")
    state = style(0, FLUX_MODULES)
    key = "transformer.transformer_blocks.0.attn.to_q.lora_B.weight"
    write(place / "c", state | {key: state[key][:, :3]})
    message = refused(place, *given(place), "--style", f"c={place / 'c'}")
    assert "the factors of transformer_blocks.0.attn.to_q do not fit: [32, 3], [4, 32]" in message


def test_one_style_is_no_mix(place: Path) -> None:
    only = ["mix-styles", "--style", f"a={place / 'a'}", "--out", place / "mixed.safetensors"]
    assert "1 style given; mixing takes two or more" in refused(place, *only)
