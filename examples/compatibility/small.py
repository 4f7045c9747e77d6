"""A small model of an architecture that transformers has: its own class, every size in its configuration cut."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES, model_type_to_module_name

# Beside those of mergekit: language models, mixtures, encoders and decoders, of images, of speech, of both.
MORE = """
albert aria bamba bart beit big_bird bigbird_pegasus biogpt bitnet blenderbot blip bloom camembert canine
chinese_clip clap clip clipseg codegen convbert convnext convnextv2 ctrl data2vec-text dbrx deberta deberta-v2
deepseek_v2 deepseek_v3 deit dinov2 dinov2_with_registers dinov3_vit electra ernie ernie4_5 ernie4_5_moe esm exaone4
falcon_h1 falcon_mamba flex_olmo fnet funnel git glm gpt_neo gpt_oss gptj granitemoe granitemoeshared groupvit
helium hubert hunyuan_v1_dense idefics2 idefics3 imagegpt internvl jamba jetmoe kimi_k25 lfm2_moe llama4_text llava
llava_next longformer longt5 m2m_100 mamba2 marian mbart megatron-bert ministral minimax mobilebert modernbert mpnet
mpt mt5 mvp nemotron nllb-moe nomic_bert olmo olmo3 olmoe openai-gpt opt owlvit paligemma pegasus persimmon phimoe
pixtral plbart pvt_v2 qwen2_moe qwen3_next rembert resnet roformer rwkv sam seed_oss segformer siglip siglip2
smollm3 smolvlm splinter squeezebert step3p7 swin switch_transformers t5gemma umt5 unispeech videomae vilt vit
vit_mae wav2vec2 wavlm xglm xlm xlm-roberta xlnet xlstm yolos zamba2
"""
MOST_NUMBERS = 1_500_000
VOCABULARY = 64
# What the classes of a model type are looked for in; the first that has one.
TASKS = (
    "SEQ_TO_SEQ_CAUSAL_LM", "CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "MASKED_LM", "IMAGE_CLASSIFICATION",
    "ZERO_SHOT_IMAGE_CLASSIFICATION", "SPEECH_SEQ_2_SEQ", "CTC", "AUDIO_CLASSIFICATION", "VIDEO_CLASSIFICATION",
    "OBJECT_DETECTION", "ZERO_SHOT_OBJECT_DETECTION", "UNIVERSAL_SEGMENTATION", "SEMANTIC_SEGMENTATION",
    "DEPTH_ESTIMATION", "MASK_GENERATION", "VISUAL_QUESTION_ANSWERING", "TEXT_TO_WAVEFORM", "TEXT_TO_SPECTROGRAM",
    "TIME_SERIES_PREDICTION", "SEQUENCE_CLASSIFICATION", "PRETRAINING",
)  # fmt: skip
# What a field gets that has more, by its name: the first pattern that matches it in full.
SIZES = {
    64: r"(\w+_)?vocab(ulary)?_size\w*|codebook_size|n_tokens|\w*num_embeddings",
    4: r"\w*num_(routed_|local_|shared_)?experts|n_routed_experts|moe_num_experts|qk_rope_head_dim"
    r"|\w*state_size|mamba_d_state|mamba_n_groups|\w*conv_kernel_size|\w*num_labels",
    2: r"\w*experts_per_tok\w*|moe_k|moe_topk|moe_top_k|top_k_experts|num_selected_experts"
    r"|(\w+_)?num_(hidden_|encoder_|decoder_|transformer_|mlp_|block_)?(layers|blocks)|n_layers?|num_hidden_groups"
    r"|(en|de)coder_layers|depth|(\w+_)?num(_global)?_key_value_heads|n_kv_heads|num_kv_heads|kv_n_heads",
    8: r"\w*head_dim\w*|d_kv|kv_channels|attention_head_size|d_head|head_size|\w*_head_hidden_size|attention_key_size"
    r"|\w*patch_size|\w*num_queries|num_latents|\w*query_tokens|\w*num_query_\w*|\w*block_size|chunk_size"
    r"|sliding_window|attention_window|\w*window_size|\w*_rank|rank_\w+|\w*_lora_dim",
    48: r"\w*intermediate_size\w*|\w*ffn_dim|d_ff|\w*mlp_dim|(ffn|head)_hidden_size|d_inner|n_inner|ff_dim"
    r"|\w*feed_?forward_(dim|size)|dim_feedforward|hidden_dim",
    32: r"\w*hidden_size\w*|d_model|n_embd|\w*embed_dim|dim|embedding_size|\w*projection_dim\w*|\w*width|output_dim"
    r"|d_embed|\w*hidden_dim\w*|model_dim|\w*_embed_size|conv_dim|\w*feature_size|proj_dim|\w*codevector_dim"
    r"|\w*_channels|\w*image_size",
}
HEADS = re.compile(r"(\w+_)?num_\w*heads|(\w+_)?n_heads?|\w*attention_heads|nheads")
EXPERTS = re.compile(r"\w*num_(local_|routed_|shared_)?experts|n_(routed|shared)_experts")
# What follows from other sizes, and would not fit any more.
DROPPED = ("out_features", "out_indices", "stage_names", "per_layer_config")
POSITIONS = re.compile(
    r"\w*max_position_embeddings|n_positions|n_ctx|max_(target|source)_positions|\w*max_seq_len\w*"
    r"|\w*max_(sequence_)?length|seq_length|context_length"
)
PATTERNS = [*((re.compile(pattern), size) for size, pattern in SIZES.items()), (HEADS, 4), (POSITIONS, 64)]


@dataclass(frozen=True)
class Kind:
    """One row: a model type, and the class that stands for it."""

    model_type: str
    architecture: type[PreTrainedModel]
    config: PreTrainedConfig

    @property
    def experts(self) -> set[int]:
        """How many experts a mixture has, by its configuration; none of a model that is no mixture."""
        values = self.config.to_dict()
        parts = [values, *(part for key, part in values.items() if isinstance(part, dict) and key.endswith("config"))]
        return {
            part[key]
            for part in parts
            for key in map(str, part)
            if EXPERTS.fullmatch(key) and isinstance(part[key], int)
        }

    @property
    def is_causal(self) -> bool:
        """Whether it is a causal language model, which a text is data for."""
        return self.architecture.__name__ == modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(self.model_type)

    def make(self, seed: int = 0) -> PreTrainedModel:
        """The model with seeded random numbers, none of them 0 or 1 throughout."""
        torch.manual_seed(seed)
        model = self.architecture(self.config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.02 * torch.randn_like(parameter)
        clear_padding(model)
        return model.eval()


def clear_padding(model: nn.Module) -> None:
    """The rows of padding are zero, as loading makes them."""
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            module.weight.data[module.padding_idx] = 0


def find(model_type: str) -> Kind:
    """The kind of this type; whatever its classes raise where they cannot be made small."""
    kind = _architecture(model_type)
    assert kind.config_class is not None
    config = shrunk(kind.config_class, OVERRIDES.get(model_type, {}))
    with torch.device("meta"):
        numbers = sum(parameter.numel() for parameter in kind(config).parameters())
    if numbers > MOST_NUMBERS:
        raise ValueError(f"{numbers:,} numbers, with every size that is known cut")
    return Kind(model_type, kind, config)


def model_types() -> list[str]:
    """The rows of the table: all that mergekit knows and transformers has, and MORE."""
    return sorted({name for name in (*mergekit_types(), *MORE.split()) if name in CONFIG_MAPPING_NAMES})


def every_family() -> list[str]:
    """One type of each folder of transformers."""
    families: dict[str, str] = {}
    for name in sorted(CONFIG_MAPPING_NAMES, key=lambda name: (len(name), name)):
        families.setdefault(model_type_to_module_name(name), name)
    return sorted(families.values())


def mergekit_types() -> set[str]:
    """The model types of mergekit's definitions of architectures."""
    found = set()
    for file in resources.files("mergekit._data.architectures").iterdir():
        if file.name.endswith(".json"):
            found.add(json.loads(file.read_text(encoding="utf-8")).get("model_type", ""))
    return found


def _architecture(model_type: str) -> type[PreTrainedModel]:
    for table in [*(f"MODEL_FOR_{task}_MAPPING_NAMES" for task in TASKS), "MODEL_MAPPING_NAMES"]:
        name = getattr(modeling_auto, table).get(model_type)
        for one in [name] if isinstance(name, str) else name or []:
            return getattr(transformers, one)
    raise LookupError("no class of a model")


def shrunk(kind: type[PreTrainedConfig], overrides: Mapping[str, Any]) -> PreTrainedConfig:
    """The class's own default configuration with everything small."""
    values = kind().to_dict()
    return kind.from_dict(merge_in(small(values), overrides))


def merge_in(values: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    for key, value in overrides.items():
        inner = values.get(key)
        values[key] = merge_in(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return values


def small(values: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes cut, lists as long as there are layers, and tokens that are in the vocabulary; sub-configurations too."""
    layers = {value for key, value in values.items() if isinstance(value, int) and size_of(str(key)) == 2 and value > 2}
    found = {}
    for key, value in values.items():
        if key in DROPPED:
            continue
        if isinstance(value, dict) and key not in ("id2label", "label2id"):
            value = small(value)
        elif isinstance(value, list) and len(value) in layers:
            value = ends(value)
        elif isinstance(value, int) and not isinstance(value, bool):
            value = cut(str(key), value)
        found[key] = value
    return found


def ends(values: list[Any]) -> list[Any]:
    """Two of them, of two sorts where there are two."""
    other = next((value for value in values if value != values[0]), values[-1])
    return [values[0], other]


def cut(key: str, value: int) -> int:
    if re.search(r"(token|_id|_index)(_id|_index|s_ids)?$", key) and value >= VOCABULARY:
        return VOCABULARY - 1
    size = size_of(key)
    return value if size is None or value <= size else size


def size_of(key: str) -> int | None:
    return next((size for pattern, size in PATTERNS if pattern.fullmatch(key)), None)


SPEECH = {"conv_dim": [16] * 7, "num_conv_pos_embeddings": 16}
STAGES = {"embedding_size": 16, "hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1]}
SWIN = {"embed_dim": 24, "depths": [1, 1, 1, 1]}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16}
LENGTH = {"prediction_length": 4}
# What sizes alone do not tell.
OVERRIDES: dict[str, dict[str, Any]] = {
    "autoformer": LENGTH,
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "convnext": STAGES,
    "convnextv2": STAGES,
    "data2vec-audio": SPEECH,
    "dbrx": {"attn_config": {"rope_theta": 1e4}, "ffn_config": {"hidden_size": 32}},
    "dinov3_convnext": STAGES,
    "donut-swin": SWIN,
    "esm": {"vocab_size": VOCABULARY, "pad_token_id": 1},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 64},
    "flaubert": {"emb_dim": 32, "n_words": VOCABULARY},
    "granitemoehybrid": {**MAMBA, "layer_types": ["mamba", "attention"]},
    "hubert": SPEECH,
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "informer": LENGTH,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "maskformer-swin": SWIN,
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "regnet": STAGES,
    "resnet": STAGES,
    "swin2sr": SWIN,
    "swinv2": SWIN,
    "time_series_transformer": LENGTH,
    "unispeech": SPEECH,
    "unispeech-sat": SPEECH,
    "wav2vec2": SPEECH,
    "wav2vec2-bert": {"vocab_size": VOCABULARY},
    "wavlm": SPEECH,
    "xlm": {"emb_dim": 32, "n_words": VOCABULARY},
}
