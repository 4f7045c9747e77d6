"""A small model of diffusers' own class for every family whose LoRAs diffusers loads; two blocks of each kind."""

from __future__ import annotations

import inspect
import math
import re
import warnings
from collections.abc import Mapping
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from tvbases_hf.styles.families import LORA_LAYERS, Family
from zoo.pipelines import style

# What makes a model small, by the name of the option. Heads of 16 keep rotary dimensions even.
SIZES = {
    2: "num_attention_heads num_heads n_heads nheads num_cross_attention_heads audio_num_attention_heads n_kv_heads "
    "num_kv_heads num_key_value_heads text_num_attention_heads text_num_key_value_heads motion_num_attention_heads "
    "block_num_heads num_layers num_single_layers n_layers num_mmdit_layers num_single_dit_layers num_hidden_layers "
    "num_visual_blocks nlayers approximator_layers",
    1: "num_refiner_layers n_refiner_layers num_text_blocks",
    16: "attention_head_dim cross_attention_head_dim audio_attention_head_dim head_dim audio_in_channels "
    "audio_out_channels in_channels in_visual_dim in_dim out_channels latent_channels out_visual_dim out_dim",
    32: "joint_attention_dim cross_attention_dim audio_cross_attention_dim caption_channels caption_projection_dim "
    "text_embed_dim text_dim cap_feat_dim context_in_dim pooled_projection_dim text_hidden_dim in_text_dim "
    "in_text_dim2 text_in_dim hidden_size dim model_dim image_dim added_kv_proj_dim text_emb_dim adaln_dim "
    "llm_features_dim adaln_lora_dim text_encoder_dim condition_dim time_embed_dim time_dim time_embed_hidden_dim "
    "freq_dim timestep_embed_dim encoder_hidden_states_channels cond_embed_dim encoder_hidden_size "
    "text_embed_2_dim image_embed_dim image_proj_dim approximator_hidden_dim",
    64: "intermediate_size ffn_dim ff_dim text_intermediate_size ffn_hidden_size",
}
SMALL: dict[str, Any] = {name: size for size, names in SIZES.items() for name in names.split()}
SMALL |= dict.fromkeys(("axes_dims_rope", "rope_axes_dim", "axes_dim_rope", "axes_dims"), (4, 4, 8))
UNET: dict[str, Any] = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 8}
UNET |= {"in_channels": 4, "out_channels": 4}
HEADS: dict[str, Any] = UNET | {"num_attention_heads": None, "attention_head_dim": 2}
# What a family's class wants beside that.
OWN: dict[str, dict[str, Any]] = {
    "Stable Diffusion 1 and 2": HEADS
    | {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    },
    "SDXL": HEADS
    | {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 32,
    },
    "AnimateDiff": UNET
    | {
        "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
        "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"),
        "num_attention_heads": 2,
    },
    "HiDream": {"caption_channels": (32, 32), "axes_dims_rope": (8, 8), "max_resolution": (16, 16)},
    "Amused": {
        "micro_cond_encode_dim": 8,
        "micro_cond_embed_dim": 40,
        "vocab_size": 32,
        "codebook_size": 32,
        "in_channels": 32,
        "block_out_channels": 32,
        "num_res_blocks": 1,
    },
    "Wan Animate": {
        "in_channels": 36,
        "motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8},
        "motion_encoder_size": 16,
        "motion_style_dim": 8,
        "motion_dim": 4,
        "motion_encoder_dim": 8,
        "face_encoder_hidden_dim": 16,
        "face_encoder_num_heads": 2,
        "inject_face_latents_blocks": 2,
    },
    "RFD4 Proteina": {"token_dim": 32, "dim_cond": 16, "pair_repr_dim": 16, "tri_mult_c": 16, "t_emb_dim": 16},
    "HunyuanVideo 1.5": {"target_size": 64},
    "ConsisID": {"sample_width": 8, "sample_height": 8},
}


def small_model(family: Family) -> nn.Module:
    """Random weights, in float32 on the CPU."""
    name, options = family.models[family.component]
    model: Any = getattr(diffusers, name)
    known = inspect.signature(model.__init__).parameters
    small = {key: value for key, value in SMALL.items() if key in known}
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model(**dict(options) | small | OWN.get(family.name, {}))


def chosen_modules(model: nn.Module, count: int = 8) -> dict[str, tuple[int, ...]]:
    """The shapes of some weights that can have a LoRA, of as many kinds as there are; by name.

    Of few rows a style of rank 4 spans all, of many the dense decomposition takes long, and PEFT cannot show the change
    of a convolution over time whose kernel is 1.
    """
    kinds: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, LORA_LAYERS) or getattr(layer, "groups", 1) != 1:
            continue
        if layer.weight.dim() == 5 and layer.weight.shape[2:].numel() == 1:
            continue
        if min(layer.weight.shape[:2]) >= 16 and layer.weight.shape[0] <= 400:
            kinds.setdefault(re.sub(r"\d+", "#", name.rpartition("blocks.")[2]), (name, tuple(layer.weight.shape)))
    every = max(1, len(kinds) // count)
    return dict(list(kinds.values())[::every])


def family_style(seed: int, modules: Mapping[str, tuple[int, ...]], component: str) -> dict[str, Tensor]:
    """A LoRA of rank 4 in diffusers' format; of every style two directions are the same."""
    flat = {name: (shape[0], math.prod(shape[1:])) for name, shape in modules.items()}
    state = style(seed, flat, component)
    for name, shape in modules.items():
        if len(shape) > 2:
            first, second = f"{component}.{name}.lora_A.weight", f"{component}.{name}.lora_B.weight"
            state[first] = state[first].reshape(-1, *shape[1:])
            state[second] = state[second].reshape(*state[second].shape, *(1 for _ in shape[2:]))
    return state
