"""Tiny models with PEFT adapters whose numbers are all random: nothing in them is zero, so nothing hides."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tvbases_hf.algebra.delta import dense
from tvbases_hf.errors import CheckpointError
from tvbases_hf.models.adapter import Adapter
from tvbases_hf.models.lora_files import adapter_tensors, write_adapter
from tvbases_hf.models.lora_template import Template
from tvbases_hf.storage.checkpoint import Checkpoint

VOCABULARY = 40
IDS = torch.arange(14).reshape(2, 7) * 5 % VOCABULARY
IMAGES = torch.randn(2, 4, 9, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Vision(nn.Module):
    """Convolutions of every kind that LoRA knows, an embedding, and a linear layer; no configuration."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.wide = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=groups)
        self.point = nn.Conv2d(6, 8, 1, bias=False)
        self.line = nn.Conv1d(8, 5, 3, padding=1)
        self.cube = nn.Conv3d(1, 3, 3, padding=1)
        self.table = nn.Embedding(VOCABULARY, 5)
        self.out = nn.Linear(5, 7)

    def forward(self, images: Tensor, ids: Tensor) -> Tensor:
        features = self.point(torch.tanh(self.wide(images)))
        line = torch.tanh(self.line(features.flatten(2))).mean(2)
        cube = self.cube(images[:, None]).mean((2, 3, 4))
        return self.out(line + self.table(ids).mean(1)) + cube.sum(1, keepdim=True)


def llama(**options: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCABULARY}
    sizes |= {"tie_word_embeddings": False} | options
    return LlamaForCausalLM(LlamaConfig(**sizes))


def gpt2(**options: Any) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
    return GPT2LMHeadModel(GPT2Config(**(sizes | options)))


def bert(**options: Any) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_labels": 3}
    sizes |= {"num_attention_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 16}
    return BertForSequenceClassification(BertConfig(**(sizes | options)))


def roberta(**options: Any) -> nn.Module:
    """Its classifier has layers of its own."""
    from transformers import RobertaConfig, RobertaForSequenceClassification

    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_labels": 3}
    sizes |= {"num_attention_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 16}
    return RobertaForSequenceClassification(RobertaConfig(**(sizes | options)))


def vit(**options: Any) -> nn.Module:
    """Its patches are a convolution."""
    from transformers import ViTConfig, ViTForImageClassification

    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_labels": 3}
    sizes |= {"num_attention_heads": 2, "image_size": 9, "patch_size": 3, "num_channels": 4}
    return ViTForImageClassification(ViTConfig(**(sizes | options)))


MODELS: dict[str, Callable[..., nn.Module]] = {
    "llama": llama,
    "gpt2": gpt2,
    "bert": bert,
    "roberta": roberta,
    "vit": vit,
    "vision": Vision,
}


@dataclass(frozen=True)
class Case:
    """One model and one LoraConfig."""

    model: str
    config: Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)


def make_base(directory: Path, case: Case, seed: int = 0) -> Path:
    """The model of a case as a checkpoint; biases and norms are random too."""
    torch.manual_seed(seed)
    model: Any = MODELS[case.model](**case.options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    directory.mkdir(parents=True, exist_ok=True)
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(directory)
    else:
        save_file(model.state_dict(), directory / "model.safetensors")
    return directory


def load_base(base: Path, case: Case) -> nn.Module:
    """The model as its own library loads it, float32."""
    model: Any = MODELS[case.model](**case.options)
    if hasattr(model, "save_pretrained"):
        return type(model).from_pretrained(base)
    model.load_state_dict(load_file(base / "model.safetensors"))
    return model


def make_adapter(directory: Path, base: Path, case: Case, seed: int = 1, **save: Any) -> Path:
    """An adapter with random factors, magnitudes, biases and saved modules, saved by PEFT."""
    torch.manual_seed(seed)
    model = peft_model(base, case)
    perturb(model)
    model.save_pretrained(str(directory), **save)
    return directory


def make_converted(directory: Path, base: Path, case: Case) -> Path:
    """An adapter whose initialisation (PiSSA, OLoRA) changed the base, converted by PEFT to one of the plain base."""
    model, init = peft_model(base, case), case.config["init_lora_weights"]
    config = model.peft_config["default"]
    config.init_lora_weights = True
    start = directory.with_name(f"{directory.name}-start")
    model.save_pretrained(str(start))
    config.init_lora_weights = init
    perturb(model)
    model.save_pretrained(str(directory), path_initial_model_for_weight_conversion=str(start))
    return directory


def peft_model(base: Path, case: Case) -> Any:
    """A PeftModel with a new adapter called default."""
    options: dict[str, Any] = {"r": 3, "lora_alpha": 5} | dict(case.config)
    model: Any = load_base(base, case)
    return get_peft_model(model, LoraConfig(**options))


def perturb(model: nn.Module, seed: int = 7, size: float = 0.3) -> None:
    """Random numbers for all that is trained: factors anew, magnitudes, biases and saved modules by 10 %."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if any(part in name for part in (".lora_A.", ".lora_B.", ".lora_embedding_")):
                parameter.copy_(size * noise)
            elif "lora_magnitude_vector" in name:
                parameter.mul_(1 + size * noise)
            elif parameter.requires_grad:
                parameter.add_(0.1 * noise)


def load_adapter(base: Path, case: Case, adapter: Path) -> nn.Module:
    """Stock PEFT's own reading of an adapter directory."""
    model: Any = load_base(base, case)
    return PeftModel.from_pretrained(model, str(adapter)).eval()


def outputs(model: nn.Module) -> Tensor:
    """Logits in float64, so that only what was stored in float32 differs."""
    model = model.double().eval()
    with torch.no_grad():
        if any(isinstance(module, Vision) for module in model.modules()):
            return model(IMAGES, IDS)
        config: Any = getattr(model, "config", None)
        return model(IMAGES if config.model_type == "vit" else IDS).logits


def with_deltas(base: Path, case: Case, adapter: Adapter) -> nn.Module:
    """The plain model with base weights + deltas, in float64."""
    model = load_base(base, case).double()
    checkpoint = Checkpoint.open(base)
    state = {name: checkpoint.read(name) for name in checkpoint.tensors}
    for name in adapter.names:
        delta = adapter.delta(name)
        assert delta is not None
        state[name] = state[name].double() + dense(delta).reshape(state[name].shape)
    missing = model.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys
    return model


def rewrite(directory: Path, base: Path, adapter: Adapter) -> Path:
    """Read an adapter and write it again."""
    checkpoint = Checkpoint.open(base)
    changes = {name: delta for name in adapter.names if (delta := adapter.delta(name)) is not None}
    directory.mkdir(parents=True, exist_ok=True)
    write_adapter(directory, *adapter_tensors(changes, Template.of([adapter], str(base)), checkpoint))
    return directory


def edit_config(adapter: Path, **words: Any) -> Path:
    """Change options in adapter_config.json; None removes one."""
    file = adapter / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8")) | words
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}), encoding="utf-8")
    return adapter


def edit_tensors(adapter: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    """Rewrite adapter_model.safetensors."""
    file = adapter / "adapter_model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in change(load_file(file)).items()}, file, {"format": "pt"})
    return adapter


def copy(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


def loaded(root: Path, case: Case, configs: Sequence[dict[str, Any]], names: str = "abcdefgh") -> Any:
    """A model with one random adapter per configuration, loaded by PEFT from files."""
    base = make_base(root / "base", case)
    paths = [
        make_adapter(root / name, base, Case(case.model, config, case.options), seed=i)
        for i, (name, config) in enumerate(zip(names, configs, strict=False))
    ]
    origin: Any = load_base(base, case)
    model: Any = PeftModel.from_pretrained(origin, str(paths[0]), adapter_name=names[0])
    for name, path in zip(names[1:], paths[1:], strict=False):
        model.load_adapter(str(path), adapter_name=name)
    return model


def active(model: Any, name: str) -> Tensor:
    model.set_adapter(name)
    found = outputs(model)
    model.float()
    return found


def relative(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest expected number."""
    return float((found - expected).abs().max() / expected.abs().max())


def refusal(adapter: Path, base: Path, error: type[Exception] = CheckpointError) -> str:
    """The one message; it names the adapter."""
    with pytest.raises(error) as caught:
        Adapter.open(adapter, Checkpoint.open(base), label="mine")
    assert '"mine"' in str(caught.value)
    return str(caught.value)
