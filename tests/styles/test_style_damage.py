"""Style files that are damaged, of other numbers than floats, or too large for what is written: refused in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import tvbases_hf.styles.translation as translation
from tvbases_hf.errors import CheckpointError, MismatchError, ParameterError, TvbasesError
from tvbases_hf.storage.checkpoint import Checkpoint
from tvbases_hf.styles.diffusers_files import open_lora, read_lora_file
from tvbases_hf.styles.mixed_file import mix_style_files
from zoo.lora_files import factors, kohya, write
from zoo.peft_models import relative
from zoo.pipelines import products, style

MODULES = {"transformer_blocks.0.attn.to_q": (32, 32), "single_transformer_blocks.0.attn.to_k": (32, 32)}
QUERY = "transformer.transformer_blocks.0.attn.to_q"
FLUX = "lora_unet_double_blocks_0_img_attn_proj"


def pair(directory: Path, *states: dict[str, Tensor]) -> dict[str, str]:
    files = {}
    for name, state in zip("ab", states, strict=True):
        save_file({key: tensor.contiguous() for key, tensor in state.items()}, directory / f"{name}.safetensors")
        files[name] = str(directory / f"{name}.safetensors")
    return files


def two(directory: Path, dtype: torch.dtype = torch.float32) -> dict[str, str]:
    return pair(directory, *({k: t.to(dtype) for k, t in style(seed, MODULES).items()} for seed in range(2)))


# Factors that are none

DAMAGED: dict[str, tuple[Callable[[], dict[str, Tensor]], str]] = {
    "a first factor without dimensions": (
        lambda: kohya({FLUX: (32, 32)}) | {f"{FLUX}.lora_down.weight": torch.tensor(1.0)}, rf"{FLUX} do not fit: .*\[\]"
    ),
    "a second factor of one dimension": (
        lambda: kohya({FLUX: (32, 32)}) | {f"{FLUX}.lora_up.weight": torch.ones(3)}, rf"{FLUX} do not fit: \[3\]"
    ),
    "a kernel in the second factor": (
        lambda: style(0, MODULES) | {f"{QUERY}.lora_A.weight": torch.ones(3, 32, 1, 1),
                                     f"{QUERY}.lora_B.weight": torch.ones(32, 1, 3, 1)}, "do not fit"
    ),
    "a bias of another length": (
        lambda: style(0, MODULES) | {f"{QUERY}.lora_B.bias": torch.ones(7)}, r"32 outputs and a lora_B.bias of \[7\]"
    ),
    "a bias of one number": (
        lambda: style(0, MODULES) | {f"{QUERY}.lora_B.bias": torch.tensor(1.0)}, r"has 32 outputs .* of \[\]"
    ),
    "an infinite alpha": (
        lambda: kohya({FLUX: (32, 32)}) | {f"{FLUX}.alpha": torch.tensor(1e6).half()}, "holds NaN or infinite"
    ),
    "digits of another script": (lambda: style(0, {"transformer_blocks.\u0663.attn.to_q": (8, 8)}), "cannot translate"),
    **{
        f"factors of {dtype}": (
            lambda dtype=dtype: {k: (10 * t).to(dtype) for k, t in style(0, MODULES).items()},
            f"holds {str(dtype).removeprefix('torch.')}, which is no factor without its scale",
        )
        for dtype in (torch.int8, torch.int64, torch.bool)
    },
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(DAMAGED))
def test_what_is_no_pair_of_factors_is_refused(name: str, tmp_path: Path) -> None:
    make, message = DAMAGED[name]
    with pytest.raises(CheckpointError, match=message) as error:
        mix_style_files(pair(tmp_path, make(), style(1, MODULES)), tmp_path / "mixed.safetensors")
    assert "\n" not in str(error.value) and not (tmp_path / "mixed.safetensors").exists()


@pytest.mark.parametrize("alpha", [2, -3])
def test_alphas_may_be_whole_numbers_and_negative(alpha: int) -> None:
    """On negative ones, diffusers' converter of kohya's files never ended; queries, keys and values go through it."""
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    state = kohya({name: (96, 32)}, alpha=None) | {f"{name}.alpha": torch.tensor(alpha)}
    found = open_lora(state)["transformer"]
    parts = [found[f"transformer_blocks.0.attn.to_{part}"].low for part in "qkv"]
    whole = torch.cat([low.left @ low.right for low in parts if low is not None])
    product = state[f"{name}.lora_up.weight"].double() @ state[f"{name}.lora_down.weight"].double()
    assert relative(whole, alpha / 4 * product) <= 1e-6


def test_metadata_that_says_dora_of_plain_factors_is_refused(tmp_path: Path) -> None:
    config = {"transformer.r": 4, "transformer.lora_alpha": 4, "transformer.use_dora": True}
    with pytest.raises(CheckpointError, match=r"says DoRA, but .* has no magnitude"):
        open_lora(write(tmp_path, style(0, MODULES), config))


NO_TENSORS: dict[str, tuple[Callable[[], dict[Any, Any]], str]] = {
    "a word": (lambda: {"x": "y"}, "x is a str and no tensor"),
    "a number for a name": (lambda: {3: torch.ones(2)}, "called 3, which is no text"),
    "sparse": (lambda: {"x": torch.eye(3).to_sparse()}, "sparse_coo"),
    "complex": (lambda: {"x": torch.ones(3, dtype=torch.complex64)}, "complex64"),
    "no numbers": (lambda: {"x": torch.ones(3, device="meta")}, "device meta"),
}


@pytest.mark.parametrize("name", sorted(NO_TENSORS))
def test_what_no_safetensors_file_can_hold_is_refused_from_memory_and_from_pickles(name: str, tmp_path: Path) -> None:
    make, message = NO_TENSORS[name]
    state = {f"{QUERY}.lora_A.weight": torch.ones(2, 4), **make()}
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.from_state_dict(state)
    if name != "a word":  # beside weights, pickles hold what a training run wants to know again
        torch.save(state, tmp_path / "style.pt")
        with pytest.raises(CheckpointError, match=message):
            Checkpoint.open(tmp_path / "style.pt")


def test_one_text_encoder_has_one_name_whoever_wrote_the_file(tmp_path: Path) -> None:
    """transformers 5 leaves text_model. out; as two weights, half of the mix would be lost in loading."""
    short, long = "encoder.layers.0.self_attn.q_proj", "text_model.encoder.layers.0.self_attn.q_proj"
    a, b = style(0, {short: (16, 16)}, "text_encoder"), style(1, {long: (16, 16)}, "text_encoder")
    a = {**style(0, MODULES), **a}
    config = {f"{c}.{k}": 4 for c in ("transformer", "text_encoder") for k in ("r", "lora_alpha")}
    config |= {"text_encoder.alpha_pattern": {f"^{short}": 8}}  # type: ignore[dict-item]
    (tmp_path / "a").mkdir()
    files = {"a": str(write(tmp_path / "a", a, config)), "b": pair(tmp_path, b, b)["b"]}
    mix_style_files(files, tmp_path / "mixed.safetensors", component="full")
    found = read_lora_file(tmp_path / "mixed.safetensors")["text_encoder"]
    assert list(found) == [long]
    low = found[long].low
    assert low is not None
    expected = 2 * products(a)[f"text_encoder.{short}"] + products(b)[f"text_encoder.{long}"]
    assert relative(low.left @ low.right, expected) <= 1e-6
    with pytest.raises(CheckpointError, match="are one factor"):
        open_lora({**a, **b})


def test_a_kernel_is_said_where_shapes_are_alike(tmp_path: Path) -> None:
    one = style(0, MODULES)
    files = pair(tmp_path, one, {key: tensor[:, :, None, None] for key, tensor in one.items()})
    with pytest.raises(MismatchError, match=r'\[32, 32\] in "a" and \[32, 32\] with a kernel of \[1, 1\] in "b"'):
        mix_style_files(files, tmp_path / "mixed.safetensors")


def test_the_configuration_beside_makers_names_is_of_these_names(tmp_path: Path) -> None:
    """PEFT beside Wan's or BFL's own code: a pattern of alphas that names qkv holds for the three parts of it."""
    names = {"double_blocks.0.img_attn.qkv": (96, 32), "double_blocks.0.img_attn.proj": (32, 32)}
    state = style(0, names, "base_model.model")
    save_file(state, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "alpha_pattern": {"img_attn.qkv": 12}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    found = open_lora(tmp_path)["transformer"]
    changes = {module: delta.low.left @ delta.low.right for module, delta in found.items() if delta.low is not None}
    plain = {name.removeprefix("base_model.model."): change for name, change in products(state).items()}
    whole = torch.cat([changes[f"transformer_blocks.0.attn.to_{part}"] for part in "qkv"])
    assert relative(whole, 3 * plain["double_blocks.0.img_attn.qkv"]) <= 1e-6
    assert relative(changes["transformer_blocks.0.attn.to_out.0"], 2 * plain["double_blocks.0.img_attn.proj"]) <= 1e-6


# What is written

TOO_MUCH: dict[str, tuple[torch.dtype, dict[str, Any], str]] = {
    "a scale for float16": (torch.float16, {"scales": {"a": 1e6}}, "numbers of .* are too large for float16"),
    "a scale for float32": (torch.float32, {"scales": {"a": 1e300}}, "numbers of .* are too large for float32"),
    "a scale too small": (torch.float16, {"scales": {"a": 1e-12, "b": 1e-12}}, "all numbers of .* are zero as float16"),
    "eight bits, which end at 448": (
        torch.float32, {"scales": {"a": 1e5}, "dtype": torch.float8_e4m3fn}, "too large for float8_e4m3fn"
    ),
    "whole numbers": (torch.float32, {"dtype": torch.int8}, "cannot be stored as torch.int8"),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(TOO_MUCH))
def test_numbers_that_the_file_cannot_hold_are_refused(name: str, tmp_path: Path) -> None:
    dtype, how, message = TOO_MUCH[name]
    with pytest.raises(ParameterError, match=message):
        mix_style_files(two(tmp_path, dtype), tmp_path / "mixed.safetensors", component="full", **how)
    assert {file.name for file in tmp_path.iterdir()} == {"a.safetensors", "b.safetensors"}


def test_a_mix_is_not_called_a_pickle(tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match=r"name it \.safetensors"):
        mix_style_files(two(tmp_path), tmp_path / "mixed.pt", dry_run=True)


def test_one_rank_holds_in_names_of_comfyui_where_matrices_are_joined(tmp_path: Path) -> None:
    modules = {f"transformer_blocks.0.attn.{part}": (3072, 8) for part in ("to_q", "to_k", "to_out.0")}
    states = [style(seed, modules) for seed in range(2)]
    how: dict[str, Any] = {"component": "full", "loader": "comfy", "family": "Flux.1"}
    mix_style_files(pair(tmp_path, *states), tmp_path / "own.safetensors", **how)
    mix_style_files(pair(tmp_path, *states), tmp_path / "even.safetensors", **how, equal_rank=True)
    found = {name: load_file(tmp_path / f"{name}.safetensors") for name in ("own", "even")}
    ranks = {name: {len(t) for key, t in own.items() if "down" in key} for name, own in found.items()}
    assert ranks == {"own": {8, 16}, "even": {16}}
    for name in ("lora_unet_double_blocks_0_img_attn_qkv", "lora_unet_double_blocks_0_img_attn_proj"):
        changes = [
            float(own[f"{name}.alpha"]) / len(own[f"{name}.lora_down.weight"])
            * (own[f"{name}.lora_up.weight"].double() @ own[f"{name}.lora_down.weight"].double())
            for own in found.values()
        ]  # fmt: skip
        assert relative(changes[1], changes[0]) <= 1e-6


def test_what_lies_around_the_blocks_of_ltx_has_its_makers_names(tmp_path: Path) -> None:
    """Theirs are diffusers' names in the blocks alone; ComfyUI leaves out what it does not know."""
    names = {
        "proj_in": "patchify_proj",
        "time_embed.linear": "adaln_single.linear",
        "time_embed.emb.timestep_embedder.linear_1": "adaln_single.emb.timestep_embedder.linear_1",
        "caption_projection.linear_1": "caption_projection.linear_1",
        "transformer_blocks.1.attn2.to_out.0": "transformer_blocks.1.attn2.to_out.0",
    }
    states = [style(seed, dict.fromkeys(names, (16, 16))) for seed in range(2)]
    mix_style_files(pair(tmp_path, *states), tmp_path / "mixed.safetensors", component="full", loader="comfy")
    stored = load_file(tmp_path / "mixed.safetensors")
    assert {key.partition(".lora_")[0] for key in stored} == {f"diffusion_model.{own}" for own in names.values()}
    found = read_lora_file(tmp_path / "mixed.safetensors")["transformer"]
    assert set(found) == set(names)
    for module, delta in found.items():
        assert delta.low is not None
        expected = sum(products(state)[f"transformer.{module}"] for state in states)
        assert relative(delta.low.left @ delta.low.right, expected) <= 1e-6  # type: ignore[arg-type]


def test_one_block_of_each_kind_is_asked_about_names_that_no_model_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking diffusers' converters for every name of a large model took minutes."""
    asked: list[str] = []
    known = translation._is_known
    monkeypatch.setattr(translation, "_is_known", lambda name, family: asked.append(name) or known(name, family))
    state: dict[str, Tensor] = {}
    for number in range(40):
        down, up = factors(number, 8, 8, rank=1)
        name = f"lora_unet_joint_blocks_{number}_x_block_attn_qkv"
        state |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
    with pytest.raises(TvbasesError, match="none of its 40 modules"):
        open_lora(state)
    assert len(set(asked)) == 1
