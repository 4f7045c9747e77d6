"""Small models whose weights transformers names, stacks or splits otherwise in memory than in files, and others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.models.step3p7.modeling_step3p7 import Step3p7VisionModel

TEXT: dict[str, Any] = {
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}
GROUPED = {**TEXT, "num_key_value_heads": 1}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
EXPERTS = {**GROUPED, "head_dim": 8, "num_experts_per_tok": 2}
ROPE = {"type": "mrope", "mrope_section": [1, 1, 2]}
TOKENS = {"image_token_id": 27, "video_token_id": 28, "vision_start_token_id": 29, "vision_end_token_id": 30}


def _made(name: str, **options: Any) -> Callable[[], Any]:
    kind = getattr(transformers, name)
    return lambda: kind(kind.config_class(**options))


def _step() -> Any:
    kind: Any = Step3p7VisionModel
    return kind(kind.config_class(**VISION))


RENAMED: Mapping[str, Callable[[], Any]] = {
    "vit": _made("ViTForImageClassification", **VISION),
    "dinov2": _made("Dinov2WithRegistersModel", **VISION, use_swiglu_ffn=True),
    "mixtral": _made("MixtralForCausalLM", **GROUPED, num_local_experts=3),
    "qwen3 moe": _made("Qwen3MoeForCausalLM", **EXPERTS, num_experts=3, moe_intermediate_size=8),
    "jamba": _made(
        "JambaForCausalLM", **GROUPED, num_experts=3, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2,
        expert_layer_offset=1, mamba_d_state=4, mamba_dt_rank=4, use_mamba_kernels=False,
    ),
    "qwen2 vl": _made(
        "Qwen2VLForConditionalGeneration", text_config={**GROUPED, "rope_scaling": ROPE}, **TOKENS,
        vision_config={"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2},
    ),
    "qwen2.5 vl": _made(
        "Qwen2_5_VLForConditionalGeneration", text_config={**GROUPED, "rope_scaling": ROPE}, **TOKENS,
        vision_config={
            "depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 16,
            "fullatt_block_indexes": [0],
        },
    ),
    "llava": _made(
        "LlavaForConditionalGeneration",
        text_config={"model_type": "llama", **GROUPED}, vision_config={"model_type": "clip_vision_model", **VISION},
    ),
    "nomic bert": _made("NomicBertModel", **TEXT),  # one fused matrix in the file, three in memory
    "step vision": _step,  # fused, and its rows in another order
    "granite moe": _made("GraniteMoeForCausalLM", **GROUPED, num_local_experts=3),
    "clip": _made("CLIPModel", text_config=TEXT, vision_config=VISION, projection_dim=8),
    "t5": _made("T5ForConditionalGeneration", vocab_size=31, d_model=16, d_ff=24, d_kv=8, num_layers=2, num_heads=2),
    "dbrx": _made(
        "DbrxForCausalLM", d_model=16, n_heads=2, n_layers=1, vocab_size=31, max_seq_len=32,
        attn_config={"rope_theta": 1e4, "clip_qkv": 8.0},
        ffn_config={"ffn_hidden_size": 24, "hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
    ),
    "gpt2": _made("GPT2LMHeadModel", vocab_size=31, n_embd=16, n_layer=2, n_head=2, n_positions=32),
}  # fmt: skip


def make(name: str, seed: int = 0) -> Any:
    """A model by its name, its numbers those of the seed."""
    torch.manual_seed(seed)
    return RENAMED[name]().eval()


def saved(model: Any, directory: Path) -> dict[str, Tensor]:
    """What save_pretrained writes of a model."""
    model.save_pretrained(directory)
    return load_file(directory / "model.safetensors")


def resave(directory: Path, state: Mapping[str, Tensor]) -> Path:
    """Other numbers or names in the file of a model."""
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory
