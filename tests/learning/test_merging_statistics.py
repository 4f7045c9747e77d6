"""Fisher and RegMean against what is known of linear models, and against one example at a time."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tvbases_hf.algebra.delta import Dense, dense
from tvbases_hf.errors import ParameterError
from tvbases_hf.learning.data import TaskData
from tvbases_hf.learning.fisher import diagonal_fisher, examples_of, fisher
from tvbases_hf.learning.learned import combined, held
from tvbases_hf.learning.regmean import regmean
from tvbases_hf.models.vectors import Vectors
from tvbases_hf.storage.checkpoint import Checkpoint
from zoo.merging_models import NAMES, answers, changes, labelled_data, random_states, unlabelled, vectors_of

EPS = torch.finfo(torch.float32).eps


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype).eval()


def leaves_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone().requires_grad_() for name, tensor in model.state_dict().items()}


# --- RegMean ---


def test_regmean_recovers_the_joint_least_squares_solution_of_a_linear_model() -> None:
    generator = torch.Generator().manual_seed(1)
    model = nn.Linear(6, 4, bias=False).double()
    x = [torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in (30, 20, 9)]
    y = [torch.randn(len(part), 4, generator=generator, dtype=torch.float64) for part in x]
    best = [torch.linalg.lstsq(a, b).solution.T.contiguous() for a, b in zip(x, y, strict=True)]
    vectors = vectors_of(model, [{"weight": weight} for weight in best])
    data = [TaskData(n, [(p, None) for p in a.split(7)], unlabelled) for n, a in zip(NAMES, x, strict=True)]
    found = regmean(vectors, model, data, shrink=1.0)
    joint = torch.linalg.lstsq(torch.cat(x), torch.cat(y)).solution.T
    merged = model.weight.detach() + dense(found.change("weight"))
    # Stored in float32: one rounding of a change whose size is about that of the weights.
    tolerance = 4 * EPS * float(joint.abs().max() + model.weight.detach().abs().max())
    assert torch.allclose(merged, joint, rtol=0, atol=tolerance)
    mean = torch.stack(best).mean(0)
    assert float((mean - joint).abs().max()) > 1e3 * tolerance
    shrunk = model.weight.detach() + dense(regmean(vectors, model, data, shrink=0.5).change("weight"))
    assert not torch.allclose(shrunk, joint, rtol=0, atol=1e3 * tolerance)
    assert found.report == {"solved": 1, "averaged": 0, "layers_without_input": []}


def test_regmean_averages_what_is_no_linear_layer_and_says_so() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.mid, self.idle = nn.Embedding(9, 5), nn.Linear(5, 5), nn.Linear(5, 2)
            self.norm = nn.LayerNorm(5)

        def forward(self, ids: Tensor) -> Tensor:
            return self.norm(self.mid(self.embed(ids)))

    torch.manual_seed(0)
    model = Model()
    task_vectors = vectors_of(model, random_states(model, 2))
    ids = torch.arange(8).reshape(4, 2)
    data = [TaskData(name, [(ids[i : i + 2],)], unlabelled) for i, name in ((0, "math"), (2, "code"))]
    found = regmean(task_vectors, model, data)
    assert found.report == {"solved": 1, "averaged": 6, "layers_without_input": ["idle.weight"]}
    for name in found.names:
        mean = torch.stack([dense(d) for d in task_vectors.deltas(name)]).mean(0)
        assert torch.allclose(dense(found.change(name)), mean, atol=4 * EPS) == (name != "mid.weight")


def test_regmean_leaves_theta_0_where_no_input_goes() -> None:
    model = nn.Linear(4, 3, bias=False)
    vectors = vectors_of(model, random_states(model, 2))
    x = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    x[:, 2] = 0
    found = dense(
        regmean(vectors, model, [TaskData(n, [(x,)], unlabelled) for n in NAMES[:2]], shrink=1.0).change("weight")
    )
    assert float(found[:, 2].abs().max()) == 0 and float(found[:, :2].abs().min()) > 0


def test_padding_does_not_count_in_regmean() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            return self.linear(x)

    def readout(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, None]:
        return model(**batch)[:, 0], None

    torch.manual_seed(0)
    model = Model()
    vectors = vectors_of(model, random_states(model, 2))
    x = torch.randn(4, 5, 3)
    mask = torch.ones(4, 5, dtype=torch.int64)
    mask[:, 3:] = 0
    masked = [TaskData(n, [{"x": x * (i + 1), "attention_mask": mask}], readout) for i, n in enumerate(NAMES[:2])]
    short = [TaskData(n, [{"x": x[:, :3] * (i + 1)}], readout) for i, n in enumerate(NAMES[:2])]
    whole = [TaskData(n, [{"x": x * (i + 1) + i}], readout) for i, n in enumerate(NAMES[:2])]
    found = [dense(regmean(vectors, model, data).change("linear.weight")) for data in (masked, short, whole)]
    assert torch.allclose(found[0], found[1], atol=4 * EPS)
    assert not torch.allclose(found[0], found[2], atol=1e3 * EPS)


# --- Fisher ---


@pytest.mark.parametrize("empirical", [True, False])
def test_the_fisher_diagonal_is_the_mean_of_squared_gradients_of_single_examples(empirical: bool) -> None:
    model, (task, *_) = network(), labelled_data(5, 3, dtype=torch.float64)
    found = diagonal_fisher(model, leaves_of(model), task, empirical=empirical)
    expected = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    count = 0
    for x, y in task.batches:
        for row, label in zip(x, y, strict=True):
            count += 1
            chances = model(row[None]).softmax(1)[0].detach()
            for other in [int(label)] if empirical else range(3):
                model.zero_grad()
                model(row[None]).log_softmax(1)[0, other].backward()
                for name, parameter in model.named_parameters():
                    assert parameter.grad is not None
                    expected[name] += (1.0 if empirical else chances[other]) * parameter.grad**2
    for name, value in expected.items():
        assert torch.allclose(found[name], value / count, rtol=1e-12, atol=0)
    batched = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    for x, y in task.batches:  # a batch's gradient squared is something else
        model.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        for name, parameter in model.named_parameters():
            batched[name] += parameter.grad**2  # type: ignore[operator]
    assert not torch.allclose(found["0.weight"], batched["0.weight"] / 3, rtol=0.2)


def test_labels_drawn_from_the_model_approach_the_expectation() -> None:
    model, (task, *_) = network(), labelled_data(5, 3, dtype=torch.float64)
    exact = diagonal_fisher(model, leaves_of(model), task)["2.bias"]
    drawn = diagonal_fisher(model, leaves_of(model), task, samples=400)["2.bias"]
    # (e_y - p)^2 lies in [0, 1]: 4800 draws have a standard error below 1 / sqrt(4 * 4800)
    assert float((drawn - exact).abs().max()) < 4 / math.sqrt(4 * 4800)
    assert torch.equal(drawn, diagonal_fisher(model, leaves_of(model), task, samples=400)["2.bias"])
    assert not torch.equal(drawn, diagonal_fisher(model, leaves_of(model), task, samples=400, seed=1)["2.bias"])


def test_fisher_merging_with_equal_information_is_the_mean() -> None:
    """Logits without the weights' help: at equal inputs the information of a linear model's bias is p (1 - p)."""

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.weight - self.weight.detach()

    model = Sum()
    task_vectors = vectors_of(model, random_states(model, 3))
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    data = [TaskData(name, [(x,)], unlabelled) for name in NAMES]
    mean = torch.stack([dense(d) for d in task_vectors.deltas("weight")]).mean(0)
    found = dense(fisher(task_vectors, model, data).change("weight"))
    assert torch.allclose(found, mean, rtol=8 * EPS, atol=0)
    other = [TaskData(name, [(x * (1, 4, 9)[i],)], unlabelled) for i, name in enumerate(NAMES)]
    assert not torch.allclose(dense(fisher(task_vectors, model, other).change("weight")), mean, rtol=0.1)


def test_fisher_merging_is_the_weighted_mean_of_the_formula() -> None:
    """Over bases too: F_m = sum_i W_e[i, m] F_i, against dense arithmetic."""
    from tvbases_hf.bases import BasisWeights

    model, data = network(), labelled_data(5, 3, dtype=torch.float64)
    task_vectors = vectors_of(model, random_states(model, 3))
    encoder = torch.tensor([[0.7, 0.1], [0.3, 0.2], [0.0, 0.7]], dtype=torch.float64)
    weights = BasisWeights("ae", encoder, torch.zeros(2, 3, dtype=torch.float64), 0.0, 0.0, 0.0)
    vectors, at = task_vectors.mixed(weights), task_vectors
    found = fisher(vectors, model, data, at=at, floor=1e-12)
    information = []
    for task, tuned in zip(data, task_vectors.models.values(), strict=True):
        state = {name: tuned.read(name) for name in vectors.names}  # type: ignore[union-attr]
        information.append(diagonal_fisher(model, {n: t.clone().requires_grad_() for n, t in state.items()}, task))
    for name in vectors.names:
        per_basis = [sum(float(encoder[i, m]) * information[i][name] for i in range(3)) for m in range(2)]
        deltas = [dense(delta) for delta in vectors.deltas(name)]
        expected = sum(f * d for f, d in zip(per_basis, deltas, strict=True)) / sum(per_basis)  # type: ignore[operator]
        assert torch.allclose(dense(found.change(name)), torch.as_tensor(expected), rtol=1e2 * EPS, atol=1e2 * EPS)
    shifted = changes(fisher(vectors, model, data, floor=1e-12))  # information at what the bases have of each task
    assert not torch.allclose(shifted["0.weight"], dense(found.change("0.weight")), rtol=1e-3)


def test_weights_without_information_take_the_plain_mean() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    task_vectors = vectors_of(model, random_states(model, 2))

    def first_layer(asked: nn.Module, batch: tuple[Tensor, ...]) -> tuple[Tensor, None]:
        return asked(batch[0]) * 0 + batch[0][:, :2], None

    data = [TaskData(name, [(torch.ones(2, 4),)], first_layer) for name in NAMES[:2]]
    found = changes(fisher(task_vectors, model, data))
    for name, value in found.items():
        mean = torch.stack([dense(d) for d in task_vectors.deltas(name)]).mean(0)
        assert torch.allclose(value, mean, rtol=4 * EPS, atol=EPS)


def test_batches_are_split_into_examples_whatever_holds_them() -> None:
    x, ids = torch.arange(6).reshape(3, 2), [[1], [2, 3], [4]]
    assert [tuple(part["x"].shape) for part in examples_of({"x": x, "ids": ids})] == [(1, 2)] * 3
    assert [part[0] for part in examples_of((ids, x))] == [[[1]], [[2, 3]], [[4]]]
    for batch in (x, {"x": x, "y": x[:2]}, {"x": x, "scale": 2.0}, object()):
        with pytest.raises(ParameterError, match='the batches of "spam" cannot be split'):
            list(examples_of(batch, "spam"))


def test_bad_options_are_refused() -> None:
    model, data = network(), labelled_data(5, 3, dtype=torch.float64)
    vectors = vectors_of(model, random_states(model, 3))
    with pytest.raises(ParameterError, match="floor must be positive"):
        fisher(vectors, model, data, floor=0)
    with pytest.raises(ParameterError, match="samples at least 1"):
        fisher(vectors, model, data, samples=0)
    with pytest.raises(ParameterError, match="shrink must lie between 0 and 1, got 2"):
        regmean(vectors, model, data, shrink=2)
    for method in (fisher, regmean):
        with pytest.raises(ParameterError, match="at must hold one vector for each of the 3 tasks"):
            method(vectors, model, data, at=vectors.selected([0]))
        with pytest.raises(ParameterError, match='data of "math" is empty'):
            method(vectors, model, [TaskData("math", [], answers), *data[1:]])


def test_held_vectors_are_read_once_and_stay_what_they_are() -> None:
    model = network()
    plain, count = vectors_of(model, random_states(model, 3)), []

    def read(name: str) -> list:
        count.append(name)
        return plain.deltas(name)

    vectors = held(replace(plain, read=read))
    for _ in range(2):
        for name in plain.names:
            pairs = zip(vectors.deltas(name), plain.deltas(name), strict=True)
            assert all(torch.equal(dense(a), dense(b)) for a, b in pairs)
    assert count == list(plain.names)


def test_vectors_without_weight_are_left_out_of_a_sum() -> None:
    deltas = [Dense(torch.full((2,), float("nan"))), Dense(torch.ones(2)), Dense(torch.full((2,), 3.0))]
    assert dense(combined(deltas, [0.0, 0.5, 0.25])).tolist() == [1.25, 1.25]
    assert dense(combined(deltas[1:], [0.0, 0.0])).tolist() == [0.0, 0.0]


def test_a_linear_layer_stored_in_out_is_solved_like_one_stored_out_in() -> None:
    """GPT-2's Conv1D, the same numbers as a linear layer's, transposed."""
    from transformers.pytorch_utils import Conv1D

    generator = torch.Generator().manual_seed(8)
    linear, conv = torch.nn.Linear(6, 4, bias=False), Conv1D(4, 6)
    torch.nn.init.zeros_(conv.bias)
    states = [torch.randn(4, 6, generator=generator) for _ in range(3)]
    found = []
    for model, turn in ((linear, lambda w: w), (conv, lambda w: w.T.contiguous())):
        model.weight.data.copy_(turn(states[0]))
        bias = {} if model is linear else {"bias": torch.zeros(4)}
        base, *tuned = (Checkpoint.from_state_dict({"weight": turn(state), **bias}) for state in states)
        tasks = Vectors.of_models(base, dict(zip(NAMES, tuned, strict=False)))
        inputs = torch.Generator().manual_seed(9)
        data = [TaskData(name, [(torch.randn(20, 6, generator=inputs),)], unlabelled) for name in NAMES[:2]]
        merge = regmean(tasks, model, data)
        assert merge.report is not None and merge.report["solved"] == 1
        found.append(dense(merge.change("weight")))
    assert torch.allclose(found[1].T, found[0], rtol=0, atol=100 * torch.finfo(torch.float32).eps)
