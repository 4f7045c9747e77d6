"""Linearised models: exact for linear ones, the tangent of others; task vectors add up without interference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from linearised import Linearised
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from tvbases_hf import InPlace, Vectors, fine_tune, grid_search
from tvbases_hf.learning.coefficients import accuracies
from tvbases_hf.learning.data import TaskData

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "vocab_size": 11,
    "num_attention_heads": 2,
}


def mlp(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def bert() -> nn.Module:
    torch.manual_seed(0)
    sizes: dict[str, Any] = SIZES | {"num_labels": 3}
    return BertForSequenceClassification(BertConfig(**sizes)).double().eval()


def moved(model: Linearised, size: float, seed: int = 1) -> Linearised:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.tuned.parameters():
            weight += size * torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
    return model


X = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])


def test_at_the_origin_it_is_the_model() -> None:
    model = mlp()
    expected = model(X)
    assert torch.equal(Linearised(model)(X), expected)
    classifier = bert()
    expected = classifier(input_ids=IDS).logits
    found = Linearised(classifier)(input_ids=IDS)
    assert type(found).__name__ == "SequenceClassifierOutput"
    assert torch.allclose(found.logits, expected, rtol=1e-12, atol=1e-14)  # without fused attention


def test_a_model_linear_in_its_weights_is_itself_everywhere() -> None:
    model = moved(Linearised(nn.Linear(4, 3).double()), 10.0)
    assert torch.allclose(model(X), model.tuned(X), rtol=1e-12)
    other = moved(Linearised(mlp()), 1.0)
    assert not torch.allclose(other(X), other.tuned(X), rtol=0.1)


def test_it_is_f0_plus_the_jacobian_times_the_step() -> None:
    model = moved(Linearised(mlp()), 0.5)
    weights = dict(model.origin.named_parameters())
    jacobian = jacrev(lambda w: functional_call(model.origin, w, (X,)))(weights)
    step = model.task_vector()
    change = sum(torch.tensordot(jacobian[name], step[name], dims=step[name].ndim) for name in weights)
    assert torch.allclose(model(X), model.origin(X) + change, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["mlp", "bert"])
def test_the_change_equals_finite_differences(kind: str) -> None:
    model = Linearised(mlp() if kind == "mlp" else bert())
    ask = lambda m: m(X) if kind == "mlp" else m(input_ids=IDS).logits  # noqa: E731
    start, step = ask(model), 1e-5
    far, near = moved(model, 0.3), {}
    change = ask(far) - start
    direction = far.task_vector()
    for sign in (1, -1):
        weights = {n: w + sign * step * direction[n] for n, w in model.origin.named_parameters()}
        with torch.no_grad():
            near[sign] = ask(lambda *a, w=weights, **k: functional_call(model.origin, w, a, k))
    assert torch.allclose(change, (near[1] - near[-1]) / (2 * step), rtol=1e-6, atol=1e-8)


def test_gradients_reach_theta_only_and_are_those_of_the_linear_model() -> None:
    model = moved(Linearised(mlp()), 0.3)
    model(X).square().sum().backward()
    weights = dict(model.origin.named_parameters())
    jacobian = jacrev(lambda w: functional_call(model.origin, w, (X,)))(weights)
    answers = model(X).detach()
    for name, weight in model.tuned.named_parameters():
        expected = torch.tensordot(2 * answers, jacobian[name].detach(), dims=2)
        assert weight.grad is not None and torch.allclose(weight.grad, expected, rtol=1e-10, atol=1e-12)
    assert all(weight.grad is None for weight in weights.values())


def labelled(name: str, seed: int) -> TaskData:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(60, 4, generator=generator, dtype=torch.float64)
    y = (x @ torch.randn(4, 3, generator=generator, dtype=torch.float64)).argmax(1)
    return TaskData(name, list(zip(x.split(10), y.split(10), strict=True)), lambda m, b: (m(b[0]), b[1]))


def test_tangent_task_vectors_add_up_without_interference_and_others_do_not() -> None:
    tasks = [labelled("a", 1), labelled("b", 2)]
    tangent = [fine_tune(Linearised(mlp()), task, lr=0.03, epochs=5) for task in tasks]
    plain = [fine_tune(mlp(), task, lr=0.03, epochs=5) for task in tasks]
    origin = mlp()
    start = origin(X)

    merged = Linearised(mlp())
    vectors = [model.task_vector() for model in tangent]
    with torch.no_grad():
        for name, weight in merged.tuned.named_parameters():
            weight += sum(0.7 * vector[name] for vector in vectors)
    expected = start + sum(0.7 * (model(X) - start) for model in tangent)
    assert (expected - start).abs().max() > 0.5
    assert torch.allclose(merged(X), expected, rtol=1e-10, atol=1e-10)

    usual = mlp()
    own = dict(origin.named_parameters())
    with torch.no_grad():
        for name, weight in usual.named_parameters():
            weight += sum(0.7 * (dict(model.named_parameters())[name] - own[name]) for model in plain)
    expected = start + sum(0.7 * (model(X) - start) for model in plain)
    assert (usual(X) - expected).abs().max() > 0.05


def test_training_moves_theta_and_learns_the_task() -> None:
    task, model = labelled("a", 1), Linearised(mlp())
    before = {name: weight.clone() for name, weight in model.origin.named_parameters()}
    accuracy = task.accuracy(model)
    fine_tune(model, task, lr=0.03, epochs=5)
    assert task.accuracy(model) > accuracy + 0.2
    assert all(torch.equal(before[name], weight) for name, weight in model.origin.named_parameters())
    assert all(float(vector.norm()) > 0 for vector in model.task_vector().values())


def test_it_can_be_searched_and_evaluated_in_place_by_the_models_own_names() -> None:
    task, tuned = labelled("a", 1), Linearised(mlp())
    fine_tune(tuned, task, lr=0.03, epochs=5)
    vector = tuned.task_vector()
    model = Linearised(mlp())
    assert list(model.state_dict()) == list(mlp().state_dict())
    curve = grid_search(InPlace(model, vector), lambda name: vector[name], accuracies([task]), alphas=[0.0, 0.5, 1.0])
    assert curve.at(1.0)["a"] == task.accuracy(tuned) != curve.at(0.0)["a"]
    assert all(torch.equal(a, b) for a, b in zip(model.tuned.parameters(), model.origin.parameters(), strict=True))
    model.load_state_dict(tuned.state_dict())
    assert torch.equal(model(X), tuned(X))


def test_language_models_are_trained_through_their_readout(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    model.save_pretrained(tmp_path / "base")
    batch = {"input_ids": IDS, "labels": IDS}
    task = TaskData("t", [batch])
    linear = Linearised(model)
    assert torch.allclose(task.loss(linear, batch), model(**batch).loss, rtol=1e-6)
    before = task.loss(linear, batch).item()
    fine_tune(linear, task, lr=1e-2, epochs=20)
    assert task.loss(linear, batch).item() < before - 0.5
    assert linear.config is linear.origin.config and next(linear.parameters()).device.type == "cpu"

    linear.tuned.save_pretrained(tmp_path / "tuned")  # type: ignore[operator]
    vectors = Vectors.open(tmp_path / "base", {"t": tmp_path / "tuned"})
    (delta,) = vectors.deltas("model.embed_tokens.weight")
    expected = linear.task_vector()["model.embed_tokens.weight"]
    assert torch.allclose(delta.block(0, expected.numel()).view_as(expected).float(), expected, atol=1e-7)


class Odd(nn.Module):
    """Answers with more than tensors of floats."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3).double()

    def forward(self, x: Tensor) -> dict[str, Any]:
        logits = self.layer(x)
        return {"logits": logits, "best": logits.detach().argmax(1), "rows": len(x), "cache": object()}


def test_answers_that_are_not_of_floats_stay_what_they_are() -> None:
    model = moved(Linearised(Odd()), 1.0)
    found = model(X)
    assert torch.allclose(found["logits"], model.tuned(X)["logits"])
    assert torch.equal(found["best"], model.origin(X)["best"])
    assert found["rows"] == 5 and found["cache"] is None
    with pytest.raises(AttributeError, match="absent"):
        _ = model.absent
