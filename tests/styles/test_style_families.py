"""Style files of every family that diffusers loads LoRAs for: read by any trainer's names, mixed, and loaded again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from tvbases_hf.algebra.delta import dense
from tvbases_hf.errors import CheckpointError, MismatchError, ParameterError
from tvbases_hf.styles.diffusers_files import open_lora, read_lora_file
from tvbases_hf.styles.families import FAMILIES, Family, installed, shapes_of, with_numbers
from tvbases_hf.styles.mixed_file import mix_style_files, read_recipe
from tvbases_hf.styles.original_names import ORIGINAL
from zoo.families import chosen_modules, family_style, small_model
from zoo.lora_files import change, factors, kohya, write
from zoo.peft_models import relative
from zoo.pipelines import FLUX_MODULES, UNET_MODULES, dense_mixed, products, style

EXACT = 1e-5
SCALES = {"a": 1.0, "b": 0.7}
BY_NAME = {family.name: family for family in FAMILIES}


def written(tmp_path: Path, states: Mapping[str, Mapping[str, Tensor]]) -> dict[str, str]:
    files = {}
    for name, state in states.items():
        (tmp_path / name).mkdir(exist_ok=True)
        files[name] = str(write(tmp_path / name, dict(state)))
    return files


def mixed(tmp_path: Path, states: Mapping[str, Mapping[str, Tensor]], **how: Any) -> Path:
    mix_style_files(written(tmp_path, states), tmp_path / "mixed.safetensors", scales=SCALES, **how)
    return tmp_path / "mixed.safetensors"


def unique_sum(states: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The dense decomposition's mix, by component and module."""
    changes = [products(state) for state in states.values()]
    return {
        module: sum(s * u for s, u in zip(SCALES.values(), dense_mixed([c[module] for c in changes]), strict=True))
        for module in changes[0]
    }  # type: ignore[return-value]


def loaded_changes(model: nn.Module, component: str) -> dict[str, Tensor]:
    """What PEFT adds to each weight, float64, flattened."""
    layers: list[tuple[str, Any]] = list(model.named_modules())
    return {
        f"{component}.{name}": layer.get_delta_weight("mix").detach().double().flatten(1)
        for name, layer in layers
        if hasattr(layer, "get_delta_weight") and "mix" in layer.scaling
    }


def load(model: Any, file: Path, family: Family) -> dict[str, Tensor]:
    """By stock diffusers: the family's own loader reads the file, and the model takes what comes out."""
    unet = {"unet_config": model.config} if family.component == "unet" else {}
    found = family.mixin.lora_state_dict(str(file), **unet)
    state, alphas = found if isinstance(found, tuple) else (found, None)
    alphas = {"network_alphas": alphas} if alphas else {}
    model.load_lora_adapter(dict(state), prefix=family.component, adapter_name="mix", **alphas)
    return loaded_changes(model, family.component)


def assert_changes(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for module, delta in found.items():
        assert relative(delta, expected[module]) <= EXACT, module


@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_a_mixed_file_of_every_family_is_the_dense_mix_in_its_model(name: str, tmp_path: Path) -> None:
    """Of a small model of diffusers' class, whose module names are those of the published one."""
    family = BY_NAME[name]
    assert family in installed()
    model = small_model(family)
    known = family.modules(family.component)
    assert known is not None and [module for module in shapes_of(model) if module not in known] == []
    modules = chosen_modules(model)
    states = {style: family_style(seed, modules, family.component) for seed, style in enumerate("ab")}
    file = mixed(tmp_path, states)
    expected = unique_sum(states)
    assert_changes(load(model, file, family), expected)
    plain = [products(state) for state in states.values()]
    assert any(relative(plain[0][m] + 0.7 * plain[1][m], delta) > 0.1 for m, delta in expected.items())


@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_the_names_of_every_family_are_read_with_underscores_and_alphas(name: str) -> None:
    family = BY_NAME[name]
    known = family.modules(family.component)
    assert known is not None
    module = with_numbers(next(own for own in known if "block" in own or "layers" in own), ["000", "000"])
    flat = f"lora_unet_{module.replace('.', '_')}"
    state = kohya({flat: (8, 4)})
    found = open_lora(state)
    assert set(found) == {family.component} and set(found[family.component]) == {module}
    assert relative(dense(found[family.component][module]), change(state, flat)) <= 1e-6


# Names of other trainers

OTHERS: dict[str, tuple[dict[str, tuple[int, int]], tuple[str, str], dict[str, str]]] = {
    "Qwen-Image": (
        {"lora_unet_transformer_blocks_0_attn_to_q": (32, 32), "lora_unet_transformer_blocks_1_img_mod_1": (192, 32)},
        ("lora_down", "lora_up"),
        {"transformer_blocks.0.attn.to_q": "lora_unet_transformer_blocks_0_attn_to_q",
         "transformer_blocks.1.img_mod.1": "lora_unet_transformer_blocks_1_img_mod_1"},
    ),
    "Wan": (
        {"lora_unet_blocks_0_self_attn_q": (32, 32), "lora_unet_blocks_3_ffn_2": (32, 64)},
        ("lora_down", "lora_up"),
        {"blocks.0.attn1.to_q": "lora_unet_blocks_0_self_attn_q", "blocks.3.ffn.net.2": "lora_unet_blocks_3_ffn_2"},
    ),
    "Wan with dots": (
        {"diffusion_model.blocks.0.ffn.0": (64, 32)}, ("lora_A", "lora_B"),
        {"blocks.0.ffn.net.0.proj": "diffusion_model.blocks.0.ffn.0"},
    ),
    "Flux of SimpleTuner": (
        {"lora_unet_single_transformer_blocks_0_attn_to_q": (32, 32)}, ("lora_down", "lora_up"),
        {"single_transformer_blocks.0.attn.to_q": "lora_unet_single_transformer_blocks_0_attn_to_q"},
    ),
    "Flux in BFL's names, as PEFT saves": (
        {"double_blocks.0.img_attn.proj": (32, 32), "double_blocks.0.img_mlp.0": (128, 32)}, ("lora_A", "lora_B"),
        {"transformer_blocks.0.attn.to_out.0": "double_blocks.0.img_attn.proj",
         "transformer_blocks.0.ff.net.0.proj": "double_blocks.0.img_mlp.0"},
    ),
    "Flux in BFL's names, of ai-toolkit": (
        {"diffusion_model.double_blocks.2.txt_mlp.2": (32, 128)}, ("lora_A", "lora_B"),
        {"transformer_blocks.2.ff_context.net.2": "diffusion_model.double_blocks.2.txt_mlp.2"},
    ),
    "an adapter's name in the keys": (
        {"transformer.transformer_blocks.0.attn.to_q": (32, 32)}, ("lora_A.default", "lora_B.default"),
        {"transformer_blocks.0.attn.to_q": "transformer.transformer_blocks.0.attn.to_q"},
    ),
    "Flux.2, told from Flux.1 by the shape": (
        {"lora_unet_double_blocks_0_img_mlp_0": (6 * 32, 32)}, ("lora_down", "lora_up"),
        {"transformer_blocks.0.ff.linear_in": "lora_unet_double_blocks_0_img_mlp_0"},
    ),
    "HunyuanVideo with alphas": (
        {"lora_unet_double_blocks_0_img_mlp_fc1": (128, 32)}, ("lora_down", "lora_up"),
        {"transformer_blocks.0.ff.net.0.proj": "lora_unet_double_blocks_0_img_mlp_fc1"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(OTHERS))
def test_names_of_other_trainers_are_modules_that_the_model_has(name: str, tmp_path: Path) -> None:
    shapes, (first, second), expected = OTHERS[name]
    state = kohya(shapes, alpha=3.0 if first == "lora_down" else None)
    spelled = {k.replace("lora_down", first).replace("lora_up", second): t for k, t in state.items()}
    found = read_lora_file(write(tmp_path, spelled))
    assert {c: set(own) for c, own in found.items()} == {"transformer": set(expected)}
    for module, own in expected.items():
        assert relative(dense(found["transformer"][module]), change(state, own)) <= 1e-6


def test_names_that_no_model_has_are_refused_with_how_many_and_who_was_asked(tmp_path: Path) -> None:
    """Stable Diffusion 3 by the names of its makers, for which diffusers has no converter."""
    state = kohya({f"lora_unet_joint_blocks_{i}_x_block_attn_qkv": (96, 32) for i in range(3)})
    with pytest.raises(CheckpointError) as error:
        read_lora_file(write(tmp_path, state))
    for part in ("none of its 3 modules", "lora_unet_joint_blocks_0_x_block_attn_qkv", "tried Flux.1, ", "Wan, "):
        assert part in str(error.value)
    assert "\n" not in str(error.value)
    one = style(0, FLUX_MODULES) | style(0, {"transformer_blocks.0.attn.to_qq": (32, 32)})
    with pytest.raises(CheckpointError, match=r"1 of 6 modules are not of Flux\.1, .*attn\.to_qq"):
        read_lora_file(write(tmp_path, one))


def test_a_row_order_that_only_the_converter_knows_is_kept() -> None:
    """MiniMax-H3 as DiffSynth saves it: heads interleaved, which the adapter's name in the keys tells."""
    name = "blocks.0.attn.qkv_proj"
    down, up = factors(0, 3 * 256, 32)
    found = open_lora({f"{name}.lora_A.default.weight": down, f"{name}.lora_B.default.weight": up})["transformer"]
    rows = (up.double() @ down.double()).reshape(2, 3, 128, 32)
    for index, part in enumerate("qkv"):
        own = dense(found[f"transformer_blocks.0.attn.to_{part}"])
        assert relative(own, rows[:, index].reshape(256, 32)) <= 1e-6


# Two models


TWO_MODELS: dict[str, Callable[[], tuple[dict[str, Tensor], dict[str, Tensor], str]]] = {
    "Flux and Wan": lambda: (
        style(0, FLUX_MODULES), style(1, {"blocks.0.attn1.to_q": (32, 32)}),
        "is a LoRA for Wan, those before it are for Flux.1",
    ),
    "Flux and Qwen-Image": lambda: (
        style(0, FLUX_MODULES), style(1, {"transformer_blocks.0.img_mod.1": (192, 32)}),
        "is a LoRA for Qwen-Image, those before it are for Flux.1",
    ),
    "Stable Diffusion and SDXL": lambda: (
        style(0, {"down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": (32, 32)}, "unet"),
        style(1, {"down_blocks.2.attentions.0.transformer_blocks.9.attn1.to_q": (32, 32)}, "unet"), "SDXL",
    ),
    "Flux and a UNet": lambda: (style(0, FLUX_MODULES), style(1, UNET_MODULES, "unet"), "the unet: LoRAs"),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(TWO_MODELS))
def test_styles_of_two_models_are_refused(name: str, tmp_path: Path) -> None:
    a, b, message = TWO_MODELS[name]()
    files = written(tmp_path, {"a": a, "b": b})
    with pytest.raises(MismatchError, match="cannot be mixed") as error:
        mix_style_files(files, tmp_path / "mixed.safetensors")
    assert message in str(error.value)
    assert not (tmp_path / "mixed.safetensors").exists()


def test_styles_of_one_model_may_change_different_modules(tmp_path: Path) -> None:
    names = list(FLUX_MODULES.items())
    states = {"a": style(0, dict(names[:2])), "b": style(1, dict(names[2:]))}
    file = mixed(tmp_path, states)
    changes = {module: SCALES[name] * d for name, state in states.items() for module, d in products(state).items()}
    found = {f"transformer.{m}": dense(d) for m, d in read_lora_file(file)["transformer"].items()}
    assert_changes(found, changes)


# 8-bit floats, lists


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bit_floats_are_the_numbers_they_hold(dtype: torch.dtype, tmp_path: Path) -> None:
    states = {n: {k: t.to(dtype) for k, t in style(seed, FLUX_MODULES).items()} for seed, n in enumerate("ab")}
    plain = {n: {k: t.float() for k, t in state.items()} for n, state in states.items()}
    report = mix_style_files(written(tmp_path, states), tmp_path / "mixed.safetensors", component="full", scales=SCALES)
    assert report["dtype"] == "float16"
    for module, delta in read_lora_file(tmp_path / "mixed.safetensors")["transformer"].items():
        expected = sum(scale * products(plain[name])[f"transformer.{module}"] for name, scale in SCALES.items())
        assert relative(dense(delta), expected) <= 2**-10  # type: ignore[arg-type]


def test_a_list_of_files_is_named_by_the_files(tmp_path: Path) -> None:
    files = []
    for seed, name in enumerate(("anime", "pixel")):
        files.append(str(write(tmp_path, style(seed, FLUX_MODULES)).rename(tmp_path / f"{name}.safetensors")))
    mix_style_files(files, tmp_path / "mixed.safetensors")
    recipe = read_recipe(tmp_path / "mixed.safetensors")
    assert recipe is not None and {n: s["source"] for n, s in recipe["styles"].items()} == dict(
        zip(("anime", "pixel"), files, strict=True)
    )
    with pytest.raises(ParameterError, match='two styles would be called "anime"'):
        mix_style_files([files[0], files[0]], tmp_path / "mixed.safetensors")
    with pytest.raises(ParameterError, match="is one style"):
        mix_style_files(files[0], tmp_path / "mixed.safetensors")


# Names of ComfyUI

COMFY = ["Chroma", "Flux.1", "Flux.2", "HiDream", "HunyuanVideo", "LTX-Video", "Qwen-Image", "SDXL"]
COMFY += ["Stable Diffusion 1 and 2", "Wan", "Z-Image"]
# Enough modules to tell the family, with all that one original matrix holds, or a part of it.
FLUX_BLOCK = [f"transformer_blocks.1.attn.{m}" for m in ("to_q", "to_v", "add_q_proj", "to_out.0")]
CHOSEN = {
    "HunyuanVideo": [*FLUX_BLOCK, "transformer_blocks.0.ff.net.0.proj", "single_transformer_blocks.1.proj_out"],
    "Chroma": [*FLUX_BLOCK, "single_transformer_blocks.0.proj_out"],
    "Flux.1": [*FLUX_BLOCK, "single_transformer_blocks.0.norm.linear", "transformer_blocks.0.norm1.linear"],
    "Flux.2": [*FLUX_BLOCK, "transformer_blocks.0.ff.linear_in", "single_transformer_blocks.0.attn.to_out"],
}


def comfy_modules(family: Family, model: nn.Module) -> dict[str, tuple[int, ...]]:

    layers = dict(model.named_modules())
    if family.name in CHOSEN:
        return {name: tuple(layers[name].weight.shape) for name in CHOSEN[family.name]}  # type: ignore[misc]
    chosen = chosen_modules(model, count=30)
    named = family.name not in ORIGINAL
    return {m: shape for m, shape in chosen.items() if named or m.startswith(("blocks", "transformer_", "single_"))}


@pytest.mark.parametrize("name", COMFY)
def test_a_file_in_names_of_comfyui_is_the_same_mix_in_stock_diffusers(name: str, tmp_path: Path) -> None:
    family = BY_NAME[name]
    model = small_model(family)
    modules = comfy_modules(family, model)
    states = {style: family_style(seed, modules, family.component) for seed, style in enumerate("ab")}
    file = mixed(tmp_path, states, loader="comfy", family=name)
    keys = list(load_file(file))
    assert all(key.startswith(("lora_unet_", "diffusion_model.")) for key in keys)
    with safe_open(str(file), "pt") as handle:
        assert set(handle.metadata()) == {"format", "tvbases_styles"}
    expected = unique_sum(states)
    found = {f"{c}.{m}": dense(d) for c, own in read_lora_file(file).items() for m, d in own.items()}
    assert_changes({m: d for m, d in found.items() if m in expected}, expected)
    assert not any(d.any() for m, d in found.items() if m not in expected), "rows that no style changes"
    loaded = load(model, file, family)
    assert_changes({m: d for m, d in loaded.items() if m in expected}, expected)
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "mixed.safetensors"}


def test_queries_keys_values_and_mlp_of_flux_stand_side_by_side_in_one_matrix(tmp_path: Path) -> None:
    """At the published width, which diffusers' converter has written in it."""
    rows = {"attn.to_q": 3072, "attn.to_k": 3072, "attn.to_v": 3072, "proj_mlp": 12288}
    modules = {f"single_transformer_blocks.3.{name}": (height, 4) for name, height in rows.items()}
    states = {
        name: {f"transformer.{m}.lora_{part}.weight": t for m, shape in modules.items() for part, t in
               zip("AB", factors(10 * seed + len(m), *shape, rank=2), strict=True)}
        for seed, name in enumerate("ab")
    }  # fmt: skip
    file = mixed(tmp_path, states, component="full", loader="comfy", family="Flux.1")
    stored = load_file(file)
    name = "lora_unet_single_blocks_3_linear1"
    assert {key: tuple(t.shape) for key, t in stored.items()} == {
        f"{name}.lora_down.weight": (16, 4), f"{name}.lora_up.weight": (21504, 16), f"{name}.alpha": (),
    }  # fmt: skip
    whole = change({key: tensor.float() for key, tensor in stored.items()}, name).split([3072, 3072, 3072, 12288])
    found = read_lora_file(file)["transformer"]
    for part, own in zip(("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), whole, strict=True):
        module = f"single_transformer_blocks.3.{part}"
        expected = torch.stack([SCALES[n] * products(s)[f"transformer.{module}"] for n, s in states.items()]).sum(0)
        assert relative(own, expected) <= 1e-5 and relative(dense(found[module]), expected) <= 1e-5


def test_text_encoders_and_sizes_of_sdxl_have_names_in_comfyui(tmp_path: Path) -> None:
    text = {"text_model.encoder.layers.3.self_attn.out_proj": (32, 32)}
    unet = {"down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_k": (32, 64), "add_embedding.linear_1": (32, 48)}
    states = {
        name: style(seed, unet, "unet") | style(seed, text, "text_encoder") | style(seed, text, "text_encoder_2")
        for seed, name in enumerate("ab")
    }
    file = mixed(tmp_path, states, loader="comfy")
    assert {key.partition(".")[0] for key in load_file(file)} == {
        "lora_unet_down_blocks_2_attentions_1_transformer_blocks_9_attn2_to_k",
        "lora_unet_label_emb_0_0",
        "lora_te1_text_model_encoder_layers_3_self_attn_out_proj",
        "lora_te2_text_model_encoder_layers_3_self_attn_out_proj",
    }
    found = {f"{c}.{m}": dense(d) for c, own in read_lora_file(file).items() for m, d in own.items()}
    assert_changes(found, unique_sum(states))


NAMELESS: dict[str, tuple[dict[str, Tensor], dict[str, Any], str]] = {
    "several models": (style(0, FLUX_MODULES), {}, r"Flux.1 or HunyuanVideo, whose names .* say which, .*--family"),
    "Mochi": (style(0, {"transformer_blocks.0.norm1.linear": (32, 32), "time_embed.pooler.to_kv": (64, 32)}), {},
              "are not those of a model whose names in ComfyUI are known here"),
    "one module": (style(0, {"norm_out.linear": (32, 32), "context_embedder": (32, 32)}), {"family": "Flux.1"},
                   r"1 of 2 modules of Flux.1 \(first: norm_out.linear\) have no name"),
    "a bias": (style(0, FLUX_MODULES) | {"transformer.transformer_blocks.0.attn.to_q.lora_B.bias": torch.ones(32)}, {},
               "1 of 5 weights have LoRA biases"),
    "an unknown family": (style(0, FLUX_MODULES), {"family": "Flux1"}, "did you mean Flux.1"),
    "another family": (style(0, FLUX_MODULES), {"family": "Wan"}, "are not those of Wan"),
    "an unknown loader": (style(0, FLUX_MODULES), {"loader": "forge"}, "choose one of diffusers, comfy"),
    "a family for diffusers": (style(0, FLUX_MODULES), {"loader": "diffusers", "family": "Wan"}, "goes with the"),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(NAMELESS))
def test_what_comfyui_has_no_name_for_is_refused(name: str, tmp_path: Path) -> None:
    state, how, message = NAMELESS[name]
    with pytest.raises((ParameterError, CheckpointError), match=message):
        mixed(tmp_path, {"a": state, "b": state}, **{"loader": "comfy", "component": "full", **how})
    assert not (tmp_path / "mixed.safetensors").exists()
