"""LoRA files of image models are what diffusers and PEFT make of them; alpha / rank counts once."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from diffusers.loaders import FluxLoraLoaderMixin, StableDiffusionLoraLoaderMixin
from peft import LoraConfig
from torch import Tensor, nn

from tvbases_hf.algebra.delta import dense
from tvbases_hf.errors import MismatchError
from tvbases_hf.storage.checkpoint import Checkpoint
from tvbases_hf.styles.diffusers_files import read_lora_file
from zoo.lora_files import ALPHA, FLUX_SHAPES, RANK, SIDE, assert_same, change, factors, kohya, write
from zoo.peft_models import perturb, relative


def flux() -> Any:
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 4, 8),
    )


def unet() -> Any:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=2,
        sample_size=8,
    )


def by_peft(model: nn.Module) -> dict[str, Tensor]:
    """What diffusers and PEFT add to each module after loading, float64."""
    layers: list[tuple[str, Any]] = list(model.double().named_modules())
    return {
        name: layer.get_delta_weight("style").detach().flatten(1)
        for name, layer in layers
        if hasattr(layer, "get_delta_weight") and "style" in layer.scaling
    }


@pytest.mark.parametrize("alpha", [ALPHA, 16.0, None], ids=["alpha below rank", "alpha above rank", "no alpha"])
def test_kohya_flux_files_are_read_as_diffusers_loads_them(alpha: float | None, tmp_path: Path) -> None:
    state = kohya(FLUX_SHAPES, alpha)
    model = flux()
    loaded, alphas = FluxLoraLoaderMixin.lora_state_dict(dict(state), return_alphas=True)
    FluxLoraLoaderMixin.load_lora_into_transformer(loaded, alphas, model, adapter_name="style")
    found = read_lora_file(write(tmp_path, state))
    assert set(found) == {"transformer"}
    assert_same(found["transformer"], by_peft(model))


def test_kohya_flux_files_are_scaled_by_alpha_over_rank_once(tmp_path: Path) -> None:
    """Against the definition, not against a converter: queries, keys and values are rows of one matrix."""
    state = kohya(FLUX_SHAPES)
    found = read_lora_file(write(tmp_path, state))["transformer"]
    rows = change(state, "lora_unet_double_blocks_0_img_attn_qkv").split(SIDE)
    for part, expected in zip("qkv", rows, strict=True):
        assert relative(dense(found[f"transformer_blocks.0.attn.to_{part}"]), expected) <= 1e-6
    expected = change(state, "lora_unet_single_blocks_0_linear2")
    assert relative(dense(found["single_transformer_blocks.0.proj_out"]), expected) <= 1e-6


def test_kohya_flux_files_may_hold_single_blocks_and_a_text_encoder(tmp_path: Path) -> None:
    text = {
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj": (8, 8),
        "lora_te1_text_model_encoder_layers_0_self_attn_out_proj": (8, 8),
        "lora_te1_text_model_encoder_layers_0_mlp_fc1": (16, 8),
    }
    state = kohya({"lora_unet_single_blocks_0_linear1": (3 * 3072 + 12288, 4)} | text, rank=2)
    found = read_lora_file(write(tmp_path, state))
    assert set(found) == {"transformer", "text_encoder"}
    parts = change(state, "lora_unet_single_blocks_0_linear1").split([3072, 3072, 3072, 12288])
    names = ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"]
    expected = {f"single_transformer_blocks.0.{name}": part for name, part in zip(names, parts, strict=True)}
    assert_same(found["transformer"], expected)
    layer = "text_model.encoder.layers.0"
    modules = [f"{layer}.self_attn.q_proj", f"{layer}.self_attn.out_proj", f"{layer}.mlp.fc1"]
    assert_same(found["text_encoder"], {m: change(state, name) for m, name in zip(modules, text, strict=True)})


def test_half_precision_factors_count_as_the_numbers_they_hold(tmp_path: Path) -> None:
    half = {name: tensor.to(torch.bfloat16) for name, tensor in kohya(FLUX_SHAPES).items()}
    found = read_lora_file(write(tmp_path, half))["transformer"]
    expected = change(half, "lora_unet_double_blocks_0_img_attn_proj")
    assert relative(dense(found["transformer_blocks.0.attn.to_out.0"]), expected) <= 1e-6


def test_xlabs_flux_files_are_read_as_diffusers_loads_them(tmp_path: Path) -> None:
    state = {}
    for seed, name in enumerate(["qkv_lora1", "qkv_lora2", "proj_lora1", "proj_lora2"]):
        down, up = factors(seed, 3 * SIDE if "qkv" in name else SIDE, SIDE)
        state |= {
            f"double_blocks.0.processor.{name}.down.weight": down,
            f"double_blocks.0.processor.{name}.up.weight": up,
        }
    down, up = factors(9, SIDE, 5 * SIDE)
    state |= {"single_blocks.0.processor.proj_lora.down.weight": down}
    state |= {"single_blocks.0.processor.proj_lora.up.weight": up}
    model = flux()
    loaded, alphas = FluxLoraLoaderMixin.lora_state_dict(dict(state), return_alphas=True)
    FluxLoraLoaderMixin.load_lora_into_transformer(loaded, alphas, model, adapter_name="style")
    found = read_lora_file(write(tmp_path, state))["transformer"]
    assert_same(found, by_peft(model))
    assert relative(dense(found["single_transformer_blocks.0.proj_out"]), up.double() @ down.double()) <= 1e-6


def bfl_names() -> dict[str, tuple[int, int]]:
    """Flux under BFL's own names, as trained with PEFT on their code; the converter wants all blocks."""
    shapes = {"final_layer.linear": (4, 4)}
    for i in range(19):
        for side in ("img", "txt"):
            shapes |= {f"double_blocks.{i}.{side}_{name}": (6, 4) for name in ("mod.lin", "attn.qkv", "attn.proj")}
            shapes |= {f"double_blocks.{i}.{side}_mlp.{layer}": (6, 4) for layer in (0, 2)}
    for i in range(38):
        shapes |= {f"single_blocks.{i}.{name}": (6, 4) for name in ("modulation.lin", "linear2")}
        shapes |= {f"single_blocks.{i}.linear1": (3 * 3072 + 12288, 4)}
    return shapes


def test_files_with_the_names_of_bfl_are_read(tmp_path: Path) -> None:
    state = {}
    for seed, (name, (rows, columns)) in enumerate(bfl_names().items()):
        a, b = factors(seed, rows, columns, rank=1)
        state |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
    found = read_lora_file(write(tmp_path, state))["transformer"]
    key = "base_model.model.double_blocks.3.txt_attn.qkv.lora_"
    rows = (state[f"{key}B.weight"].double() @ state[f"{key}A.weight"].double()).split(2)
    for part, expected in zip("qkv", rows, strict=True):
        assert relative(dense(found[f"transformer_blocks.3.attn.add_{part}_proj"]), expected) <= 1e-6


# diffusers' own format

DIFFUSERS = {
    "alpha in the metadata": {"r": 4, "lora_alpha": 10},
    "rslora": {"r": 4, "lora_alpha": 10, "use_rslora": True},
    "patterns": {"r": 4, "lora_alpha": 10, "rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_k": 3}},
}


@pytest.mark.parametrize("name", sorted(DIFFUSERS))
def test_files_of_diffusers_are_read_with_the_scaling_in_their_metadata(name: str, tmp_path: Path) -> None:
    from diffusers import FluxPipeline
    from peft import get_peft_model_state_dict

    model = flux()
    config = LoraConfig(target_modules=["to_q", "to_k", "proj_out"], **DIFFUSERS[name])
    model.add_adapter(config, adapter_name="style")
    perturb(model)

    layers: Any = get_peft_model_state_dict(model, adapter_name="style")
    FluxPipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=layers,
        transformer_lora_adapter_metadata={
            key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()
        },
    )
    found = read_lora_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert set(found) == {"transformer"}
    assert_same(found["transformer"], by_peft(model))


def test_files_of_diffusers_without_metadata_have_scale_one_or_their_alphas(tmp_path: Path) -> None:
    down, up = factors(0, 8, 6)
    state = {
        "transformer.transformer_blocks.0.attn.to_q.lora_A.weight": down,
        "transformer.transformer_blocks.0.attn.to_q.lora_B.weight": up,
    }
    product = up.double() @ down.double()
    found = read_lora_file(write(tmp_path, state))["transformer"]["transformer_blocks.0.attn.to_q"]
    assert relative(dense(found), product) <= 1e-6
    state["transformer.transformer_blocks.0.attn.to_q.alpha"] = torch.tensor(ALPHA)
    found = read_lora_file(write(tmp_path, state))["transformer"]["transformer_blocks.0.attn.to_q"]
    assert relative(dense(found), ALPHA / RANK * product) <= 1e-6


def test_an_older_form_of_diffusers_is_read(tmp_path: Path) -> None:
    block = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
    down, up = factors(0, 16, 16)
    state = {
        f"unet.{block}.processor.to_out_lora.down.weight": down,
        f"unet.{block}.processor.to_out_lora.up.weight": up,
    }
    found = read_lora_file(write(tmp_path, state))["unet"]
    assert_same(found, {f"{block}.to_out.0": up.double() @ down.double()})


def test_biases_of_factors_are_changes_of_biases(tmp_path: Path) -> None:
    down, up = factors(0, 8, 6)
    state = {"transformer.proj_out.lora_A.weight": down, "transformer.proj_out.lora_B.weight": up}
    state["transformer.proj_out.lora_B.bias"] = torch.arange(8.0)
    found = read_lora_file(write(tmp_path, state, {"transformer.r": 4, "transformer.lora_alpha": 8}))["transformer"]
    assert torch.equal(dense(found["proj_out.bias"]), 2 * torch.arange(8.0, dtype=torch.float64))


def test_dora_needs_the_base_and_is_then_exact(tmp_path: Path) -> None:
    down, up = factors(0, 8, 6)
    magnitude, weight = torch.rand(8) + 1, torch.randn(8, 6)
    state = {
        "transformer.proj_out.lora_A.weight": down,
        "transformer.proj_out.lora_B.weight": up,
        "transformer.proj_out.lora_magnitude_vector": magnitude,
    }
    file = write(tmp_path, state)
    with pytest.raises(MismatchError, match="proj_out is DoRA"):
        read_lora_file(file)
    base = Checkpoint.from_state_dict({"proj_out.weight": weight})
    found = read_lora_file(file, bases={"transformer": base})["transformer"]["proj_out"]
    updated = weight.double() + up.double() @ down.double()
    expected = magnitude.double()[:, None] * updated / updated.norm(dim=1, keepdim=True) - weight.double()
    assert relative(dense(found), expected) <= 1e-6


# Stable Diffusion

UNET_SHAPES = {
    "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q": (16, 16),
    "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k": (16, 8),
    "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_out_0": (16, 16),
    "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_ff_net_2": (16, 64),
}


def test_kohya_stable_diffusion_files_are_read_as_diffusers_loads_them(tmp_path: Path) -> None:
    state = kohya(UNET_SHAPES, step=0)
    found = read_lora_file(write(tmp_path, state))
    assert set(found) == {"unet"}
    assert_same(found["unet"], by_peft(load_stable_diffusion(state)))


def test_diffusers_gives_attention_the_alpha_of_other_modules() -> None:
    """Where the alphas differ, PEFT is given patterns that match no attention module; ours goes by the definition."""
    state = kohya(UNET_SHAPES)
    name = "down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    loaded = by_peft(load_stable_diffusion(state))["down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"]
    assert relative(loaded, change(state, f"lora_unet_{name}")) > 0.1


def load_stable_diffusion(state: dict[str, Tensor]) -> nn.Module:
    model, mixin = unet(), cast(Any, StableDiffusionLoraLoaderMixin)
    loaded, alphas = mixin.lora_state_dict(dict(state))
    mixin.load_lora_into_unet(loaded, alphas, model, adapter_name="style")
    return model


def test_kohya_stable_diffusion_files_are_scaled_by_alpha_over_rank_once(tmp_path: Path) -> None:
    """Convolutions and both text encoders among them, each module by its own alpha."""
    names = {
        "lora_unet_down_blocks_0_resnets_0_conv1": "unet down_blocks.0.resnets.0.conv1",
        "lora_unet_mid_block_attentions_0_proj_in": "unet mid_block.attentions.0.proj_in",
        "lora_te1_text_model_encoder_layers_0_self_attn_out_proj": (
            "text_encoder text_model.encoder.layers.0.self_attn.out_proj"
        ),
        "lora_te1_text_model_encoder_layers_0_mlp_fc2": "text_encoder text_model.encoder.layers.0.mlp.fc2",
        "lora_te2_text_model_encoder_layers_3_self_attn_out_proj": (
            "text_encoder_2 text_model.encoder.layers.3.self_attn.out_proj"
        ),
    }
    state = kohya(dict.fromkeys(names, (8, 8)))
    first = next(iter(names))
    state[f"{first}.lora_down.weight"] = torch.randn(RANK, 8, 3, 3)
    state[f"{first}.lora_up.weight"] = torch.randn(8, RANK, 1, 1)
    found = read_lora_file(write(tmp_path, state))
    assert {f"{component} {module}" for component, own in found.items() for module in own} == set(names.values())
    for name, place in names.items():
        component, module = place.split()
        assert relative(dense(found[component][module]), change(state, name)) <= 1e-6
