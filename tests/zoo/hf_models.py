"""Tiny Hugging Face models on disk, as mergekit reads them: Llama and BERT with a tokenizer, and fine-tunes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import load_file, save_file
from torch import Tensor

WORDS = [f"word{i}" for i in range(60)]
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]
VOCABULARY = len(SPECIAL) + len(WORDS)
SHARD = "16KB"
MODEL_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")

State = dict[str, Tensor]


@dataclass(frozen=True)
class Family:
    """A base and its fine-tunes, as directories with single files or shards."""

    base: Path
    tasks: dict[str, Path]

    def tuned(self) -> list[Path]:
        return list(self.tasks.values())


def make_llama(directory: Path, *, seed: int = 0) -> Path:
    """A two-layer Llama with grouped queries and an output matrix of its own."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(directory)
    save_tokenizer(directory)
    return directory


def make_bert(directory: Path, *, seed: int = 1) -> Path:
    """A two-layer BERT encoder with biases, layer norms and a pooler."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    torch.manual_seed(seed)
    BertModel(config).save_pretrained(directory)
    save_tokenizer(directory)
    return directory


def save_tokenizer(directory: Path, words: Sequence[str] = WORDS) -> None:
    """A word-level tokenizer; without one mergekit logs a traceback at the end of every merge."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(directory)


def fine_tunes(base: State, count: int, *, seed: int, size: float = 0.01, shared: float = 0.5) -> list[State]:
    """States that differ from the base by ``size`` of each tensor's norm, and partly in a common direction."""
    generator = torch.Generator().manual_seed(seed)

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float64)

    common = {name: noise(tensor) for name, tensor in base.items()}
    states = []
    for index in range(count):
        state = {}
        for name, tensor in base.items():
            if not tensor.is_floating_point():
                state[name] = tensor.clone()
                continue
            step = shared * common[name] + (1 + 0.2 * index) * noise(tensor)
            scale = size * max(float(tensor.double().norm()), 1.0) / step.norm()
            state[name] = (tensor.double() + (1 + 0.3 * index) * scale * step).to(tensor.dtype)
        states.append(state)
    return states


def save_state(directory: Path, state: Mapping[str, Tensor], like: Path, *, sharded: bool = False) -> Path:
    """Write a checkpoint with the configuration and tokenizer of ``like``."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in MODEL_FILES:
        if (like / name).is_file() and like != directory:
            shutil.copyfile(like / name, directory / name)
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    if not sharded:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return directory
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=SHARD)
    assert split.is_sharded
    for file, names in split.filename_to_tensors.items():
        save_file({name: tensors[name] for name in names}, directory / file, metadata={"format": "pt"})
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return directory


def make_family(
    root: Path,
    base: Path,
    tasks: Sequence[str],
    *,
    seed: int,
    sharded: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Family:
    """The base and its fine-tunes below ``root``, all in one dtype and layout."""
    origin = {name: tensor.to(dtype) for name, tensor in read_state(base).items()}
    saved = save_state(root / "base", origin, base, sharded=sharded)
    states = fine_tunes(origin, len(tasks), seed=seed)
    tuned = {
        task: save_state(root / task, state, base, sharded=sharded) for task, state in zip(tasks, states, strict=True)
    }
    return Family(saved, tuned)


def read_state(directory: Path) -> State:
    """All tensors of a checkpoint, whatever its shards."""
    state: State = {}
    for file in sorted(directory.glob("*.safetensors")):
        state |= load_file(file)
    return state
