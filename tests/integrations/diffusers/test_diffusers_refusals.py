"""LoRA files of image models that diffusers would read in part are refused by name."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders import FluxLoraLoaderMixin
from safetensors.torch import load_file
from torch import Tensor

from tvbases_hf.algebra.delta import dense
from tvbases_hf.errors import CheckpointError, MissingExtraError
from tvbases_hf.styles.diffusers_files import read_lora_file
from zoo.lora_files import FLUX_SHAPES, RANK, SIDE, assert_same, change, factors, kohya, write
from zoo.peft_models import relative

# What diffusers leaves out is refused

EXTRAS: dict[str, tuple[dict[str, Tensor], str]] = {
    "dora": ({"lora_unet_double_blocks_0_img_attn_proj.dora_scale": torch.ones(SIDE)}, "DoRA in kohya's form"),
    "loha": ({"lora_unet_double_blocks_0_img_mlp_2.hada_w1_a": torch.ones(2, 2)}, "LoHa"),
    "lokr": ({"lora_unet_double_blocks_0_img_mlp_2.lokr_w1": torch.ones(2, 2)}, "LoKr"),
    "bias": ({"lora_unet_double_blocks_0_img_attn_proj.diff_b": torch.ones(SIDE)}, "diff_b"),
    "norm": ({"lora_unet_double_blocks_0_norm.diff": torch.ones(SIDE)}, "norm.diff"),
    "control": ({"double_blocks.0.img_attn.norm.query_norm.scale": torch.ones(16)}, "control LoRA"),
    "t5": (
        kohya({"text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q": (8, 8)}),
        r"1 of 7 modules are not of Flux.1, the nearest \(first: text_encoders.t5xxl",
    ),
    "text projection": (kohya({"lora_te1_text_projection": (8, 8)}), r"1 of 7 .*first: lora_te1_text_projection"),
    "alpha without factors": ({"lora_unet_double_blocks_0_img_mlp_2.alpha": torch.tensor(1.0)}, "scales no factors"),
    "half a pair": ({"lora_unet_double_blocks_0_img_mlp_2.lora_up.weight": torch.ones(4, 4)}, "one of two factors"),
    "another model": (kohya({"lora_unet_double_blocks_0_attention_of_tomorrow": (8, 8)}), "cannot translate"),
}


@pytest.mark.parametrize("name", sorted(EXTRAS))
def test_what_diffusers_would_leave_out_is_refused(name: str, tmp_path: Path) -> None:
    extra, message = EXTRAS[name]
    with pytest.raises(CheckpointError, match=message):
        read_lora_file(write(tmp_path, kohya(FLUX_SHAPES) | extra))


def test_diffusers_does_leave_the_alpha_of_the_last_layer_out() -> None:
    """The reason for weighing: the factors come out as if alpha were the rank."""
    state = kohya(FLUX_SHAPES | {"lora_unet_final_layer_linear": (16, SIDE)})
    loaded: Any = FluxLoraLoaderMixin.lora_state_dict(dict(state))
    product = loaded["proj_out.lora_B.weight"].double() @ loaded["proj_out.lora_A.weight"].double()
    assert relative(product, change(state, "lora_unet_final_layer_linear")) > 0.1


@pytest.mark.parametrize("alpha", [float(RANK), 3.0])
def test_the_last_layer_is_read_with_its_alpha(alpha: float, tmp_path: Path) -> None:
    state = kohya({"lora_unet_final_layer_linear": (16, SIDE)}, alpha=alpha)
    found = read_lora_file(write(tmp_path, state))["transformer"]
    assert_same(found, {"proj_out": change(state, "lora_unet_final_layer_linear")})


REFUSED: dict[str, tuple[Callable[[], dict[str, Tensor]], str]] = {
    "a checkpoint": (lambda: {"double_blocks.0.img_attn.qkv.weight": torch.ones(6, 2)}, "would be left out"),
    "bare PEFT names": (
        lambda: {"x.lora_A.weight": torch.ones(2, 4), "x.lora_B.weight": torch.ones(4, 2)}, 
        r"none of its 1 modules is of a model known here .first: x.",
    ),
    "a missing half": (lambda: {"transformer.x.lora_A.weight": torch.ones(2, 4)}, "no lora_B"),
    "factors that do not fit": (
        lambda: {"transformer.x.lora_A.weight": torch.ones(2, 4), "transformer.x.lora_B.weight": torch.ones(4, 3)},
        "do not fit",
    ),
    "an unknown part": (
        lambda: {"transformer.x.lora_A.weight": torch.ones(2, 4), "transformer.x.lora_B.weight": torch.ones(4, 2),
                 "transformer.x.lora_C.weight": torch.ones(2, 2)},
        "lora_C",
    ),
    "some alphas": (
        lambda: {"transformer.x.lora_A.weight": torch.ones(2, 4), "transformer.x.lora_B.weight": torch.ones(4, 2),
                 "transformer.y.lora_A.weight": torch.ones(2, 4), "transformer.y.lora_B.weight": torch.ones(4, 2),
                 "transformer.x.alpha": torch.tensor(1.0)},
        "1 of 2 modules have an alpha",
    ),
    "NaN": (
        lambda: {"transformer.x.lora_A.weight": torch.full((2, 4), float("nan")),
                 "transformer.x.lora_B.weight": torch.ones(4, 2)},
        "NaN",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_file_that_is_no_whole_lora_is_refused(name: str, tmp_path: Path) -> None:
    make, message = REFUSED[name]
    with pytest.raises(CheckpointError, match=message):
        read_lora_file(write(tmp_path, make()))


def test_an_alpha_that_is_given_twice_is_refused(tmp_path: Path) -> None:
    down, up = factors(0, 8, 6)
    state = {"transformer.x.lora_A.weight": down, "transformer.x.lora_B.weight": up}
    state["transformer.x.alpha"] = torch.tensor(1.0)
    with pytest.raises(CheckpointError, match="alpha twice"):
        read_lora_file(write(tmp_path, state, {"transformer.r": 4, "transformer.lora_alpha": 8}))


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "style.safetensors").write_bytes(b"\x00" * 40)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        read_lora_file(tmp_path / "style.safetensors")
    with pytest.raises(CheckpointError, match="no such file"):
        read_lora_file(tmp_path / "absent.safetensors")


@pytest.mark.parametrize("package", ["diffusers", "peft"])
def test_a_missing_package_is_named_with_its_extra(
    package: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=r"tvbases-hf\[diffusers,peft\]"):
        read_lora_file(tmp_path / "style.safetensors")


def test_pickled_files_are_the_same_lora(tmp_path: Path) -> None:
    file = write(tmp_path, kohya(FLUX_SHAPES))
    torch.save(load_file(file), tmp_path / "style.pt")
    found, expected = read_lora_file(tmp_path / "style.pt"), read_lora_file(file)
    assert_same(found["transformer"], {name: dense(delta) for name, delta in expected["transformer"].items()})
