"""Fine-tuning alone and jointly: the optimiser's steps, the order of batches, refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from tvbases_hf import fine_tune
from tvbases_hf.errors import ParameterError
from tvbases_hf.learning.data import TaskData
from tvbases_hf.learning.training import interleaved


def readout(model: Any, batch: Any) -> Any:
    return model(batch[0]), batch[1]


def task(name: str, seed: int, batches: int = 4, place: float = 0.0) -> TaskData:
    """The examples of a task lie at ``place``; their labels are linear in what else there is."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(8 * batches, 3, generator=generator)
    y = (x @ torch.randn(3, 2, generator=generator)).argmax(1)
    x = x + place
    return TaskData(name, list(zip(x.split(8), y.split(8), strict=True)), readout)


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))


def test_every_batch_of_every_task_comes_once_in_an_order_that_the_seed_decides() -> None:
    tasks = [task("a", 1, 6), task("b", 2, 3)]
    turns = list(interleaved(tasks, 0))
    for one in tasks:
        assert [batch for owner, batch in turns if owner is one] == list(one.batches)
    order = [owner.name for owner, _ in turns]
    assert order == [owner.name for owner, _ in interleaved(tasks, 0)]
    assert len({"".join(owner.name for owner, _ in interleaved(tasks, seed)) for seed in range(8)}) > 1
    assert order != sorted(order)  # interleaved, not one after another


class Stream:
    """Batches without a length."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Any:
        return iter(self.batches)


def test_one_task_is_trained_as_by_the_plain_loop() -> None:
    one = task("a", 1)
    found = fine_tune(model(), TaskData("a", Stream(list(one.batches)), readout), lr=0.01, epochs=2, warmup=0.25)
    expected = model()
    optimizer = torch.optim.AdamW(expected.parameters(), weight_decay=0.0)
    for step, batch in enumerate([*one.batches, *one.batches]):
        optimizer.param_groups[0]["lr"] = 0.01 * min((step + 1) / 2, (8 - step) / 8)
        optimizer.zero_grad()
        nn.functional.cross_entropy(expected(batch[0]), batch[1]).backward()
        nn.utils.clip_grad_norm_(expected.parameters(), 1.0)
        optimizer.step()
    for a, b in zip(found.parameters(), expected.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)


def test_joint_training_learns_all_tasks_where_each_alone_learns_its_own() -> None:
    tasks = [task("a", 1, 12, place=2.0), task("b", 5, 12, place=-2.0)]
    options: dict[str, Any] = {"lr": 0.03, "epochs": 25}
    joint = fine_tune(model(), tasks, **options)
    alone = [fine_tune(model(), one, **options) for one in tasks]
    mean = lambda m: sum(one.accuracy(m) for one in tasks) / 2  # noqa: E731
    assert mean(joint) > max(mean(m) for m in alone)
    assert all(one.accuracy(own) > 0.85 for one, own in zip(tasks, alone, strict=True))
    assert all(one.accuracy(joint) > 0.8 for one in tasks)


def test_frozen_weights_stay() -> None:
    tuned = model()
    tuned[0].requires_grad_(False)  # type: ignore[index]
    before = tuned[0].weight.clone()  # type: ignore[index]
    fine_tune(tuned, task("a", 1), lr=0.1)
    assert torch.equal(tuned[0].weight, before)  # type: ignore[index]
    assert not torch.equal(tuned[2].weight, model()[2].weight)  # type: ignore[index]


def test_bad_requests_are_refused() -> None:
    one = task("a", 1)
    bad: list[dict[str, Any]] = [{"lr": 0.0}, {"lr": math.nan}, {"epochs": 0}, {"warmup": 2.0}]
    for options in bad:
        with pytest.raises(ParameterError, match="must be positive"):
            fine_tune(model(), one, **options)
    for nothing in ([], [TaskData("a", [], readout)]):
        with pytest.raises(ParameterError, match="nothing to train on"):
            fine_tune(model(), nothing)
    with pytest.raises(ParameterError, match="no weight of the model needs a gradient"):
        fine_tune(model().requires_grad_(False), one)
    broken = TaskData("spam", [(torch.full((2, 3), math.nan), torch.tensor([0, 1]))], readout)
    with pytest.raises(ParameterError, match='the loss of "spam" is nan after 0 steps'):
        fine_tune(model(), broken)
