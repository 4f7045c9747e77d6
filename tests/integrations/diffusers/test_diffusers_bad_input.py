"""What a mix in a pipeline refuses, in one message, with the pipeline as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tvbases_diffusers import mix_styles
from tvbases_hf.errors import CheckpointError, MismatchError, ParameterError, TvbasesError
from zoo.lora_files import kohya, write
from zoo.pipelines import (
    FLUX_MODULES,
    TEXT,
    UNET_MODULES,
    products,
    style,
)
from zoo.style_mixes import assert_adds, assert_same_state, state_of, two


def wrong_shape() -> dict[str, Tensor]:
    return style(0, {"transformer_blocks.0.attn.to_q": (48, 32)})


BAD: dict[str, tuple[Any, type[TvbasesError], str]] = {
    "one style": (lambda path: {"a": two()["a"]}, ParameterError, "1 style given"),
    "another architecture": (
        lambda path: {n: style(i, {"layers.0.mixer": (32, 32)}) for i, n in enumerate("ab")},
        MismatchError,
        "1 of 1 modules do not fit this FluxTransformer2DModel .first: layers.0.mixer is not in it",
    ),
    "other shapes": (lambda path: {"a": wrong_shape(), "b": wrong_shape()}, MismatchError, r"is \[32, 32\] in it and"),
    "a UNet's": (
        lambda path: {n: style(i, UNET_MODULES, "unet") for i, n in enumerate("ab")},
        MismatchError,
        "changes the unet, which FluxPipeline loads no LoRAs into",
    ),
    "two models": (lambda path: {"a": two()["a"], "b": style(0, UNET_MODULES, "unet")}, MismatchError, "different"),
    "two shapes": (lambda path: {"a": two()["a"], "b": wrong_shape()}, MismatchError, "cannot be mixed"),
    "a text file": (lambda path: {"a": two()["a"], "b": str(path / "notes.txt")}, CheckpointError, "notes.txt"),
    "no such file": (lambda path: {"a": two()["a"], "b": str(path / "b.safetensors")}, CheckpointError, "no such file"),
    "keys left over": (
        lambda path: {"a": two()["a"], "b": kohya({"lora_unet_double_blocks_0_of_tomorrow": (8, 8)})},
        CheckpointError,
        "cannot translate its names",
    ),
    "ranks that differ in a module": (
        lambda path: {"a": two()["a"], "b": two()["b"] | {_key("B"): torch.ones(32, 5)}},
        CheckpointError,
        "do not fit",
    ),
    "NaN": (lambda path: {"a": two()["a"], "b": two()["b"] | {_key("B"): torch.full((32, 4), torch.nan)}},
            CheckpointError, "NaN"),
    "DoRA": (lambda path: {"a": two()["a"], "b": two()["b"] | {_dora(): torch.ones(32)}}, CheckpointError, "are DoRA"),
    "DoRA of kohya": (
        lambda path: {"a": two()["a"], "b": two()["b"] | {"transformer.x.dora_scale": torch.ones(32)}},
        CheckpointError, "DoRA in kohya's form",
    ),
    "a second text encoder": (
        lambda path: {"a": two()["a"], "b": two()["b"] | style(0, TEXT, "text_encoder_2")},
        MismatchError,
        "changes the text_encoder_2",
    ),
    "zeros": (
        lambda path: {n: {k: 0 * t for k, t in s.items()} for n, s in two().items()}, ParameterError, "are zero",
    ),
    "an empty state dict": (lambda path: {"a": two()["a"], "b": {}}, CheckpointError, "empty state dict"),
}  # fmt: skip


def _key(part: str) -> str:
    return f"transformer.transformer_blocks.0.attn.to_q.lora_{part}.weight"


def _dora() -> str:
    return "transformer.transformer_blocks.0.attn.to_q.lora_magnitude_vector"


@pytest.mark.parametrize("name", sorted(BAD))
def test_bad_styles_are_one_message_and_the_pipeline_is_unchanged(name: str, flux: Any, tmp_path: Path) -> None:
    make, error, message = BAD[name]
    (tmp_path / "notes.txt").write_text("not a LoRA")
    before = state_of(flux)
    with pytest.raises(error, match=message):
        mix_styles(flux, make(tmp_path))
    assert_same_state(flux, before)
    assert not vars(flux).get("_tvbases_styles")


def test_one_style_twice_is_mixed_once_and_refused_without_a_shared_copy(flux: Any) -> None:
    same = {name: two()["a"] for name in "ab"}
    before = state_of(flux)
    with pytest.raises(ParameterError, match="is empty"):
        mix_styles(flux, same, shared_weight=0.0)
    assert_same_state(flux, before)
    mix_styles(flux, same)
    assert_adds(flux, products(same["a"]))


BAD_WORDS: dict[str, tuple[dict[str, Any], str]] = {
    "component": ({"component": "common"}, "unknown component 'common'"),
    "threshold": ({"threshold": 1.5}, "above 0 and at most 1"),
    "pool": ({"pool": "pairs"}, "leaves every style whole"),
    "unknown pool": ({"pool": "all"}, "pool of a decomposition must be joint or iterative or pairs"),
    "rank": ({"rank": "many"}, "is not a rank rule"),
    "shared weight": ({"shared_weight": float("nan")}, "finite"),
    "shared weight of full": ({"component": "full", "shared_weight": 1.0}, "goes with the unique component"),
    "a scale for nobody": ({"scales": {"aa": 1.0}}, "which is no style"),
    "a scale that is none": ({"scales": {"a": float("inf")}}, "finite number"),
    "a scale in words": ({"scales": {"a": "strong"}}, "finite number"),
    "an adapter called like a part of PEFT": ({"adapter_name": "training"}, "is no name for an adapter"),
    "an adapter with a dot": ({"adapter_name": "a.b"}, "is no name for an adapter"),
    "an adapter without a name": ({"adapter_name": ""}, "is no name for an adapter"),
}


@pytest.mark.parametrize("name", sorted(BAD_WORDS))
def test_bad_values_are_refused_before_anything_happens(name: str, flux: Any) -> None:
    words, message = BAD_WORDS[name]
    before = state_of(flux)
    with pytest.raises(ParameterError, match=message):
        mix_styles(flux, two(), **words)
    assert_same_state(flux, before)


def test_three_styles_have_no_principal_angles(flux: Any) -> None:
    with pytest.raises(ParameterError, match="defined for two styles"):
        mix_styles(flux, two() | {"c": style(3, FLUX_MODULES)}, subspace="angles")


def test_names_that_are_taken_or_ambiguous_are_refused(
    flux: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mix_styles(flux, two())
    with pytest.raises(ParameterError, match='adapter "styles" is loaded already'):
        mix_styles(flux, two())
    mix_styles(flux, two(), adapter_name="more").unload()
    assert flux.get_active_adapters() == ["styles"]
    monkeypatch.chdir(write(tmp_path, two()["a"]).parent)
    (tmp_path / "styles").mkdir()
    with pytest.raises(ParameterError, match="both a loaded adapter and a path"):
        mix_styles(flux, {"x": "styles", "y": two()["b"]}, adapter_name="more")


def test_loaded_adapters_that_are_no_lora_are_refused(flux: Any) -> None:
    from peft import LoKrConfig, inject_adapter_in_model

    inject_adapter_in_model(LoKrConfig(r=2, target_modules=["to_q"]), flux.transformer, adapter_name="kron")
    with pytest.raises(CheckpointError, match="a loaded LOKR adapter; only LoRA is mixed"):
        mix_styles(flux, {"a": "kron", "b": two()["b"]})


def test_things_without_a_lora_loader_are_refused() -> None:
    with pytest.raises(ParameterError, match="has no LoRA loader"):
        mix_styles(torch.nn.Linear(2, 2), two())
