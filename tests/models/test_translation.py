"""The tensors of a checkpoint in the memory of a model: the same numbers, whatever transformers does to their names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tvbases_hf.errors import MismatchError
from tvbases_hf.learning.inplace import InPlace, Reparametrised, weights_of
from tvbases_hf.models.translation import Translation
from zoo.renamed import RENAMED, VISION, make, resave, saved


def random_like(state: dict[str, Tensor], seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(t.shape, generator=generator) for n, t in state.items() if t.is_floating_point()}


@pytest.fixture(params=["fresh", "loaded"])
def origin(request: pytest.FixtureRequest) -> str:
    """A model that was made in memory knows its renaming by its class, a loaded one by what it was loaded from."""
    return request.param


@pytest.mark.parametrize("name", RENAMED)
def test_a_change_by_the_names_of_the_files_is_that_of_the_files(name: str, origin: str, tmp_path: Path) -> None:
    model = make(name)
    disk = saved(model, tmp_path / "base")
    if origin == "loaded":
        model = type(model).from_pretrained(tmp_path / "base")
    assert all(torch.equal(weight, disk[n]) for n, weight in weights_of(model, disk).items())
    before = {n: tensor.clone() for n, tensor in model.state_dict().items()}
    change = random_like(disk)
    with InPlace(model, change).changed(change.__getitem__, 0.5):
        inside = saved(model, tmp_path / "inside")
    assert inside.keys() == disk.keys()
    for n, tensor in inside.items():
        expected = (disk[n].double() + 0.5 * change[n].double()).to(tensor.dtype) if n in change else disk[n]
        assert torch.equal(tensor, expected), n
    assert all(torch.equal(tensor, before[n]) for n, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", RENAMED)
def test_gradients_come_back_to_the_names_of_the_files_and_can_be_differentiated_again(
    name: str, tmp_path: Path
) -> None:
    """sum w p^2 / 2 over the parameters p in memory: gradient w p, Hessian times v is w v, split as the files are."""
    model = make(name)
    disk = saved(model, tmp_path)
    leaves = {n: t.clone().requires_grad_() for n, t in disk.items() if t.is_floating_point()}
    translation, direction = Translation(model, leaves), random_like(disk, 2)
    own = translation.assembled(leaves)
    state = {n: tensor.clone() for n, tensor in model.state_dict().items()}
    assert all(torch.equal(own[n], state[n]) for n in own)
    weights = random_like(own, 3)
    loss = sum((weights[n] * own[n].square()).sum() for n in own) / 2
    slopes = torch.autograd.grad(loss, list(leaves.values()), create_graph=True)  # type: ignore[arg-type]
    along = sum((slope * direction[n]).sum() for n, slope in zip(leaves, slopes, strict=True))
    curved = torch.autograd.grad(along, list(leaves.values()))  # type: ignore[arg-type]
    memory = model.state_dict()
    with torch.no_grad():
        for n in own:
            memory[n].copy_(weights[n])
    split = {n: translation.read(n).detach().clone() for n in leaves}
    for n, slope, product in zip(leaves, slopes, curved, strict=True):
        assert torch.equal(slope, split[n] * disk[n]), n
        assert torch.equal(product, split[n] * direction[n]), n


def test_some_experts_of_a_stack_change_and_the_others_stay(tmp_path: Path) -> None:
    model = make("mixtral")
    disk = saved(model, tmp_path)
    chosen = [n for n in disk if ".experts.1." in n]
    assert len(chosen) == 6
    change = {n: torch.ones_like(disk[n]) for n in chosen}
    with InPlace(model, chosen).changed(change.__getitem__):
        inside = weights_of(model, disk)
        assert all(torch.equal(inside[n], disk[n] + (n in change)) for n in disk)
    ids = torch.arange(8)[None]
    asked = Reparametrised(model, {n: disk[n] + 1 for n in chosen})
    with InPlace(model, chosen).changed(change.__getitem__), torch.no_grad():
        expected = model(ids).logits
    assert torch.equal(asked(ids).logits, expected)


@pytest.mark.parametrize("name", ["vit", "mixtral", "llava"])
def test_the_models_own_names_are_understood_too(name: str) -> None:
    model = make(name)
    own = model.state_dict()
    assert all(torch.equal(weight, own[n]) for n, weight in weights_of(model, own).items())


def older(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As TensorFlow's names were taken over."""
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    ends = {name: ".".join(name.split(".")[-2:]) for name in state}
    return {name.replace(ends[name], old.get(ends[name], ends[name])): tensor for name, tensor in state.items()}


def test_names_of_another_age_and_of_the_trunk_alone_are_understood(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM, ViTConfig, ViTForImageClassification, ViTModel

    text = BertConfig(vocab_size=31, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    cases: list[tuple[Any, Any, Any]] = [
        (BertForMaskedLM(text), BertForMaskedLM, older),
        (ViTModel(ViTConfig(**VISION), add_pooling_layer=False), ViTForImageClassification, dict),
        (make("qwen3 moe").model, type(make("qwen3 moe")), dict),
    ]
    for number, (stored, kind, renamed) in enumerate(cases):
        state = renamed(saved(stored, tmp_path / str(number)))
        loaded = kind.from_pretrained(resave(tmp_path / str(number), state))
        assert all(torch.equal(weight, state[n]) for n, weight in weights_of(loaded, state).items())


def test_a_name_that_is_not_in_the_model_is_refused() -> None:
    with pytest.raises(MismatchError, match=r"1 of 2 weights .*\(first: vit\.ghost; the model has vit\."):
        weights_of(make("vit"), ["classifier.weight", "vit.ghost"])


def test_a_model_that_got_other_modules_is_looked_at_again() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    weights_of(model, ["0.weight"])
    model.append(nn.Linear(2, 3))
    assert weights_of(model, ["1.weight"])["1.weight"].shape == (3, 2)
