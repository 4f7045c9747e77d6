"""Small adapters of every method and option of PEFT: what to train, and on which small model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig
from torch import nn

ATTENTION = ["q_proj", "v_proj"]
WHERE: dict[str, Any] = {"target_modules": ["q_proj", "up_proj"]}
SIZES: dict[str, Any] = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}


@dataclass(frozen=True)
class Variant:
    """``config`` makes a PeftConfig; ``model`` is a key of MODELS."""

    config: Callable[[], Any]
    model: str = "llama"


def lora(model: str = "llama", **words: Any) -> Variant:
    options: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": ATTENTION} | words
    return Variant(lambda: peft.LoraConfig(**options), model)


def method(config: str, model: str = "llama", **words: Any) -> Variant:
    return Variant(lambda: getattr(peft, config)(**words), model)


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**SIZES))


def _tied() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {**SIZES, "tie_word_embeddings": True}
    return LlamaForCausalLM(LlamaConfig(**sizes))


def _mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=3, num_experts_per_tok=2))


def _gpt_oss() -> nn.Module:
    """Its experts are in one tensor in the file as well, [expert, input, output]."""
    from transformers import GptOssConfig, GptOssForCausalLM

    layers = ["full_attention", "full_attention"]
    return GptOssForCausalLM(
        GptOssConfig(**SIZES, head_dim=8, num_local_experts=3, num_experts_per_tok=2, layer_types=layers)
    )


def _bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    sizes: dict[str, Any] = {name: SIZES[name] for name in list(SIZES)[:5]}
    return BertForMaskedLM(BertConfig(**sizes, max_position_embeddings=16))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "bert": _bert,
    "gpt-oss": _gpt_oss,
    "llama": _llama,
    "mixtral": _mixtral,
    "tied llama": _tied,
}
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
VARIANTS: dict[str, Variant] = {
    "LoRA": lora(),
    "LoRA, alpha and rank patterns": lora(alpha_pattern={"v_proj": 11}, rank_pattern={"q_proj": 2}),
    "LoRA, lora_bias": lora("bert", target_modules=["query", "dense"], lora_bias=True),
    "LoRA, lora_bias where the base has none": lora(lora_bias=True),
    "LoRA, layers_to_transform": lora(layers_to_transform=[1], layers_pattern="layers"),
    "LoRA, modules_to_save": lora(modules_to_save=["lm_head"]),
    "LoRA, embedding": lora(target_modules=["embed_tokens", "q_proj"]),
    "LoRA, mixture of experts": lora("mixtral"),
    "LoRA, target_parameters, a matrix": lora(target_modules=[], target_parameters=["up_proj.weight"]),
    "LoRA, target_parameters, stacked experts": lora("mixtral", target_parameters=EXPERTS),
    "LoRA, target_parameters, experts [in, out]": lora("gpt-oss", target_parameters=EXPERTS),
    "LoRA, trainable_token_indices": lora(trainable_token_indices=[3, 11]),
    "LoRA, trainable_token_indices, tied": lora("tied llama", trainable_token_indices=[3, 11]),
    "rsLoRA": lora(use_rslora=True),
    "DoRA": lora(use_dora=True),
    "MiCA": lora(init_lora_weights="mica"),
    "BD-LoRA": lora(use_bdlora=BdLoraConfig(nblocks=2, target_modules_bd_a=["q_proj"], target_modules_bd_b=["v_proj"])),
    "KaSA": lora(kasa_config=KasaConfig()),
    "MonteCLoRA": lora(monteclora_config=MontecloraConfig()),
    "VeLoRA": lora(velora_config=VeloraConfig(num_groups=2)),
    "aLoRA": lora(alora_invocation_tokens=[3], task_type="CAUSAL_LM"),
    "replicated layers": lora(layer_replication=[(0, 2), (1, 2)]),
    "AdaLoRA": method("AdaLoraConfig", total_step=10, init_r=3, **WHERE),
    "AdaMSS": method("AdamssConfig", **WHERE),
    "BEFT": method("BeftConfig", "bert", target_modules=["query"]),
    "BOFT": method("BOFTConfig", boft_block_size=4, **WHERE),
    "C3A": method("C3AConfig", block_size=8, **WHERE),
    "DEFT": method("DeftConfig", r=2, **WHERE),
    "DeLoRA": method("DeloraConfig", r=2, **WHERE),
    "FourierFT": method("FourierFTConfig", n_frequency=9, **WHERE),
    "FRoD": method("FrodConfig", **WHERE),
    "GLoRA": method("GloraConfig", "bert", target_modules=["query", "intermediate.dense"]),
    "GraLoRA": method("GraloraConfig", r=4, gralora_k=2, **WHERE),
    "HiRA": method("HiraConfig", r=2, **WHERE),
    "HRA": method("HRAConfig", r=2, **WHERE),
    "IA3": method("IA3Config", feedforward_modules=["up_proj"], **WHERE),
    "Lily": method("LilyConfig", r=2, **WHERE),
    "LN tuning": method("LNTuningConfig", target_modules=["input_layernorm"]),
    "LoHa": method("LoHaConfig", r=2, **WHERE),
    "LoKr": method("LoKrConfig", r=2, **WHERE),
    "LoKr, modules_to_save": method("LoKrConfig", r=2, modules_to_save=["lm_head"], **WHERE),
    "MiSS": method("MissConfig", r=4, **WHERE),
    "OFT": method("OFTConfig", oft_block_size=4, **WHERE),
    "OSF": method("OSFConfig", **WHERE),
    "PEANuT": method("PeanutConfig", r=2, **WHERE),
    "Prompt tuning": method("PromptTuningConfig", task_type="CAUSAL_LM", num_virtual_tokens=3),
    "PSOFT": method("PsoftConfig", r=4, **WHERE),
    "PVeRA": method("PveraConfig", r=2, **WHERE),
    "RandLora": method("RandLoraConfig", r=2, **WHERE),
    "RoAd": method("RoadConfig", group_size=4, **WHERE),
    "SHiRA": method("ShiraConfig", r=2, **WHERE),
    "Supertuning": method("SupertuningConfig", **WHERE),
    "TinyLoRA": method("TinyLoraConfig", r=2, **WHERE),
    "Trainable tokens": method("TrainableTokensConfig", target_modules=["embed_tokens"], token_indices=[3, 11]),
    "Uni-LoRA": method("UniLoraConfig", **WHERE),
    "VB-LoRA": method("VBLoRAConfig", r=2, num_vectors=6, vector_length=8, topk=2, **WHERE),
    "VeRA": method("VeraConfig", r=2, **WHERE),
    "WaveFT": method("WaveFTConfig", n_frequency=16, **WHERE),
}


def make_base(directory: Path, model: str) -> Path:
    torch.manual_seed(0)
    base: Any = MODELS[model]()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    base.save_pretrained(directory)
    return directory


def load_base(directory: Path, model: str) -> Any:
    return type(MODELS[model]()).from_pretrained(directory)  # type: ignore[attr-defined]


def make_adapter(directory: Path, base: Path, variant: Variant, seed: int) -> Path:
    """An adapter of which every trained number is random, as PEFT saves it."""
    torch.manual_seed(0)  # what a method draws once, all of its adapters share
    model: Any = peft.get_peft_model(load_base(base, variant.model), variant.config())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(str(directory))
    return directory
