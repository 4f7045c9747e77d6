"""Adapters of models that transformers renames in memory, on the checkpoint as it is stored, and back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor

from tvbases_hf.algebra.delta import dense
from tvbases_hf.models.adapter import Adapter
from tvbases_hf.models.names import Naming, is_shared
from tvbases_hf.models.vectors import Vectors
from tvbases_hf.storage.checkpoint import Checkpoint
from zoo.peft_models import perturb, rewrite
from zoo.renamed import GROUPED, RENAMED, VISION, saved

TOLERANCE = 1e-6


def gemma3() -> Any:
    kind = transformers.Gemma3ForConditionalGeneration
    words = {"tie_word_embeddings": False, "mm_tokens_per_image": 4}
    return kind(kind.config_class(text_config={**GROUPED, "head_dim": 8}, vision_config=VISION, **words))  # type: ignore


MODELS = {
    "gemma 3": gemma3,
    "llava": RENAMED["llava"],
    "qwen2 vl": RENAMED["qwen2 vl"],
    "qwen2.5 vl": RENAMED["qwen2.5 vl"],
}
CONFIGS: dict[str, dict[str, Any]] = {
    "language and vision": {"target_modules": r".*\.(q_proj|qkv|fc1|down_proj)"},
    "saved modules": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "dora": {"target_modules": ["q_proj", "v_proj"], "use_dora": True},
}


@dataclass(frozen=True)
class Made:
    """A base and an adapter as transformers and PEFT save them, and PEFT's merge of the two as it is saved."""

    kind: type
    base: Path
    adapter: Path
    stored: dict[str, Tensor]
    merged: dict[str, Tensor]


def make(name: str, config: dict[str, Any], root: Path) -> Made:
    torch.manual_seed(0)
    model = MODELS[name]()
    stored = saved(model, root / "base")
    loaded: Any = get_peft_model(type(model).from_pretrained(root / "base"), LoraConfig(r=3, lora_alpha=5, **config))
    perturb(loaded)
    loaded.save_pretrained(str(root / "adapter"))
    merged = saved(loaded.merge_and_unload(), root / "merged")
    return Made(type(model), root / "base", root / "adapter", stored, merged)


@pytest.mark.parametrize("config", sorted(CONFIGS))
@pytest.mark.parametrize("name", sorted(MODELS))
def test_an_adapter_by_names_in_memory_changes_the_checkpoint_as_peft_does(
    name: str, config: str, tmp_path: Path
) -> None:
    made = make(name, CONFIGS[config], tmp_path)
    adapter = Adapter.open(made.adapter, Checkpoint.open(made.base))
    changed = {n for n, tensor in made.stored.items() if not torch.equal(tensor, made.merged[n])}
    assert changed and set(adapter.names) == changed and not adapter.head_names
    for n in changed:
        delta = adapter.delta(n)
        assert delta is not None
        found = made.stored[n].double() + dense(delta).reshape(made.stored[n].shape)
        assert float((found - made.merged[n]).norm()) <= TOLERANCE * float(made.merged[n].norm())
    again = rewrite(tmp_path / "again", made.base, adapter)
    names = set(load_file(made.adapter / "adapter_model.safetensors"))
    assert set(load_file(again / "adapter_model.safetensors")) == names
    loaded: Any = PeftModel.from_pretrained(made.kind.from_pretrained(made.base), str(again))  # type: ignore[attr-defined]
    for n, tensor in saved(loaded.merge_and_unload(), tmp_path / "reloaded").items():
        assert float((tensor - made.merged[n]).norm()) <= TOLERANCE * float(made.merged[n].norm())


def test_a_basis_of_adapters_by_names_in_memory_keeps_them(tmp_path: Path) -> None:
    from tvbases_hf import Basis, LoraBasis

    made = make("gemma 3", CONFIGS["saved modules"], tmp_path)
    vectors = Vectors.open(made.base, {"one": made.adapter})
    Basis.build(vectors, method="ae", num_bases=1).save_pretrained(tmp_path / "basis")
    basis = Basis.from_pretrained(tmp_path / "basis")
    assert isinstance(basis, LoraBasis)
    basis.adapter("one", base=made.base).save_pretrained(tmp_path / "one")
    names = set(load_file(made.adapter / "adapter_model.safetensors"))
    assert set(load_file(tmp_path / "one" / "adapter_model.safetensors")) == names


@pytest.mark.parametrize("embedding", ["model.embed_tokens", "model.tokens"])
def test_a_layer_with_as_many_outputs_as_there_are_tokens_is_not_the_tied_matrix(embedding: str) -> None:
    """Models of bytes have 256 of both; where no name tells the embedding, whatever may be it counts as tied."""
    names = [f"{embedding}.weight", "model.layers.0.self_attn.q_proj.weight", "model.positions.weight"]
    base = Checkpoint.from_state_dict({name: torch.randn(16, 16) for name in names}, "base")
    base.config |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 16}
    base.config |= {"tie_word_embeddings": True}
    tied = [is_shared(name, base, {"task_type": "CAUSAL_LM"}) for name in names]
    assert tied == ([True, False, False] if embedding.endswith("embed_tokens") else [True, True, True])


def test_names_in_memory_go_to_the_files_and_back_behind_a_prefix() -> None:
    base = Checkpoint.from_state_dict({"text.model.a.weight": torch.ones(1), "vision.b.weight": torch.ones(1)})
    memory = {"text.model.a.weight": "model.text.a.weight", "vision.b.weight": "model.vision.b.weight"}
    for prefix, strip, add in (("", "", ""), ("extra.", "extra.", "")):
        names = [f"{prefix}model.text.a.weight", f"{prefix}model.vision.b.weight"]
        naming = Naming.resolve(names, base, memory)
        assert (naming.strip, naming.add) == (strip, add)
        assert [naming.to_base(name) for name in names] == list(base.tensors)
        assert [naming.to_adapter(name) for name in base.tensors] == names
    trunk = Naming.resolve(["text.a.weight"], base, memory)
    assert trunk.to_base("text.a.weight") == "text.model.a.weight"
    assert trunk.to_adapter("text.model.a.weight") == "text.a.weight"
