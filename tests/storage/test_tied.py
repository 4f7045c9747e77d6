"""Output matrices that are, or are not, the input embedding: what transformers loads is what is compared and merged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from commands.command_line import tvbases
from tvbases_hf import Vectors
from tvbases_hf.basis import Basis
from tvbases_hf.storage.checkpoint import Checkpoint, TensorInfo
from tvbases_hf.storage.tied import ties
from zoo.models import random_state, save_checkpoint, tune
from zoo.renamed import GROUPED, resave

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
State = dict[str, Tensor]


def tied_llama(directory: Path) -> State:
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**GROUPED, tie_word_embeddings=True)).save_pretrained(directory)
    return load_file(directory / "model.safetensors")


def stored(directory: Path, like: Path, state: State) -> Path:
    directory.mkdir()
    (directory / "config.json").write_bytes((like / "config.json").read_bytes())
    return resave(directory, state)


def logits(directory: Path) -> Tensor:
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64)
        return model(torch.arange(9)[None], use_cache=False).logits


def weights(directory: Path) -> State:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def with_head(state: State, seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    return state | {HEAD: state.get(HEAD, state[EMBEDDING]) + 0.05 * torch.randn(31, 16, generator=generator)}


HAS_HEAD = {  # of the base and of two fine-tunes: who stores a matrix of its own
    "all": (True, True, True),
    "the fine-tunes": (False, True, True),
    "one fine-tune": (False, True, False),
    "the base": (True, False, False),
    "nobody": (False, False, False),
}


@pytest.mark.parametrize("case", HAS_HEAD)
def test_a_merge_is_that_of_the_models_as_they_are_loaded(case: str, tmp_path: Path) -> None:
    plain = tied_llama(tmp_path / "plain")
    states = [plain, tune(plain, 1, 0.1), tune(plain, 2, 0.1)]
    kept = [with_head(s, i) if has else s for i, (s, has) in enumerate(zip(states, HAS_HEAD[case], strict=True))]
    paths = [stored(tmp_path / f"m{i}", tmp_path / "plain", state) for i, state in enumerate(kept)]
    base, first, second = map(weights, paths)
    models = [{"model": str(path), "parameters": {"weight": 1.0}} for path in paths[1:]]
    (tmp_path / "m.yml").write_text(
        json.dumps({"merge_method": "task_arithmetic", "base_model": str(paths[0]), "models": models})
    )
    assert tvbases("merge", tmp_path / "m.yml", tmp_path / "out", "--quiet").code == 0
    found = weights(tmp_path / "out")
    for name, tensor in base.items():
        expected = (first[name] + second[name] - tensor).float().double()
        assert torch.allclose(found[name], expected, rtol=0, atol=1e-7), name
    assert (HEAD in load_file(tmp_path / "out" / "model.safetensors")) == any(HAS_HEAD[case])


def test_a_basis_of_models_with_heads_of_their_own_restores_them_over_a_tied_base(tmp_path: Path) -> None:
    plain = tied_llama(tmp_path / "base")
    tasks = {t: with_head(tune(plain, i), i) for i, t in enumerate("ab")}
    paths = {task: stored(tmp_path / task, tmp_path / "base", state) for task, state in tasks.items()}
    basis = Basis.build(Vectors.open(tmp_path / "base", paths), num_bases=2)
    assert HEAD in basis.names
    basis.save_pretrained(tmp_path / "basis")
    Basis.from_pretrained(tmp_path / "basis").restore("a", tmp_path / "base", tmp_path / "restored")
    assert (logits(tmp_path / "restored") - logits(paths["a"])).abs().max() < 1e-4


TIED = [{"tie_word_embeddings": True}, {"model_type": "gpt2"}, {"text_config": {"tie_word_embeddings": True}}]


@pytest.mark.parametrize("name", ["lm_head", "embed_out", "output", "language_model.lm_head"])
@pytest.mark.parametrize("config", TIED)
def test_a_stored_copy_counts_once_whatever_it_is_called_and_whoever_ties_it(
    name: str, config: dict[str, Any], tmp_path: Path
) -> None:
    state = random_state(0)
    del state[HEAD]
    copy = state | {f"{name}.weight": state[EMBEDDING].clone()}
    assert set(Checkpoint.open(save_checkpoint(tmp_path / "copy", copy, config=config)).tensors) == set(state)
    other = state | {f"{name}.weight": state[EMBEDDING] + 1}
    assert set(Checkpoint.open(save_checkpoint(tmp_path / "other", other, config=config)).tensors) == set(other)
    untied = {"tie_word_embeddings": False}
    assert set(Checkpoint.open(save_checkpoint(tmp_path / "untied", copy, config=untied)).tensors) == set(copy)


def test_an_absent_output_follows_the_embedding_only_where_it_is_tied() -> None:
    state = {name: tensor for name, tensor in random_state(0).items() if name != HEAD}
    info = {HEAD: TensorInfo((50, 16), torch.float32), "model.other.weight": TensorInfo((50, 16), torch.float32)}
    infos = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()}
    tied = Checkpoint("tied", infos, state.__getitem__, None, {"tie_word_embeddings": True})
    follows = tied.with_outputs(info)
    assert set(follows.tensors) == {*state, HEAD}
    assert torch.equal(follows.read(HEAD), state[EMBEDDING])
    assert follows.fingerprint() == tied.fingerprint()
    untied = Checkpoint("untied", infos, state.__getitem__, None, {"tie_word_embeddings": False})
    assert untied.with_outputs(info) is untied
    other = tied.with_outputs({HEAD: TensorInfo((51, 16), torch.float32)})  # as long as its own embedding
    assert other.tensors[HEAD].shape == state[EMBEDDING].shape and torch.equal(other.read(HEAD), state[EMBEDDING])


def test_the_configuration_says_what_is_tied_and_else_its_class_does() -> None:
    assert ties({"tie_word_embeddings": True, "model_type": "llama"}) is True
    assert ties({"tie_word_embeddings": False, "model_type": "gpt2"}) is False
    assert (ties({"model_type": "gpt2"}), ties({"model_type": "llama"})) == (True, False)
    assert ties({"model_type": "small"}) is None
    assert ties({"model_type": "small", "text_config": {"tie_word_embeddings": True}}) is True
