"""Both sides of the bounds, measured on checkpoints: dense oracles, networks at their minima, broken assumptions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tvbases_hf import Vectors
from tvbases_hf.bases import ae_bases
from tvbases_hf.errors import MismatchError, ParameterError
from tvbases_hf.theory.bounds import Bounds, measure_bounds
from tvbases_hf.theory.hessian import Terms
from zoo.models import save_checkpoint

TASKS = ("a", "b", "c")


def network(seed: int, width: int = 5) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 2)).double()


def squared_error(x: Tensor, y: Tensor) -> Terms:
    """Mean of 1/2 |f(x) - y|^2, in two batches."""

    def terms(model: Any) -> Iterator[tuple[Tensor, int]]:
        for part in (slice(0, 9), slice(9, None)):
            yield 0.5 * (model(x[part]) - y[part]).square().sum(), len(x[part])

    return terms


def teachers(directory: Path, seed: int, size: float) -> tuple[nn.Module, Vectors, dict[str, Terms]]:
    """A network, and fine-tunes each of which is a minimum of its own task: the targets are its answers."""
    model = network(seed)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_checkpoint(directory / "base", state)
    losses: dict[str, Terms] = {}
    generator = torch.Generator().manual_seed(seed)
    for task in TASKS:
        tuned = {n: t + size * torch.randn(t.shape, generator=generator, dtype=t.dtype) for n, t in state.items()}
        save_checkpoint(directory / task, tuned)
        x = torch.randn(20, 4, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            losses[task] = squared_error(x, torch.func.functional_call(model, tuned, (x,)))
    return model, Vectors.open(directory / "base", {task: directory / task for task in TASKS}), losses


def side(found: Bounds, theorem: str, over: str, task: str) -> Any:
    (only,) = [s for s in found.sides if (s.theorem, s.over, s.task) == (theorem, over, task)]
    return only


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("size", [0.03, 0.3])
def test_no_network_exceeds_a_bound_whose_assumptions_are_true(tmp_path: Path, seed: int, size: float) -> None:
    model, vectors, losses = teachers(tmp_path, seed, size)
    before = [w.detach().clone() for w in model.parameters()]
    found = measure_bounds(model, vectors, losses, 2, tolerance=1e-4, max_iterations=1000)
    certain = [s for s in found.sides if not s.broken]
    assert all(s.holds for s in certain), [s for s in certain if not s.holds]
    assert len(certain) >= 6 and any(s.measured > 0 for s in certain)
    assert all(abs(c.gradient) < 1e-12 and c.top.converged for c in found.curvatures)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert {(s.theorem, s.over) for s in found.sides} == {
        (theorem, over) for theorem in ("3.5", "3.6", "3.7") for over in ("tasks", "bases")
    } | {("B.10", "bases")}
    json.dumps(found.to_json(), allow_nan=False)


def test_both_sides_are_those_of_dense_models(tmp_path: Path) -> None:
    model, vectors, losses = teachers(tmp_path, 0, 0.1)
    found = measure_bounds(model, vectors, losses, 2, tolerance=1e-6, max_iterations=3000, alpha=0.5)
    names = vectors.names
    base = torch.cat([vectors.base.read(n).reshape(-1) for n in names])
    flat = torch.stack(
        [torch.cat([m.read(n).reshape(-1) for n in names]) - base for m in vectors.models.values()],  # type: ignore[union-attr]
        dim=1,
    )
    shapes = [vectors.base.read(n).shape for n in names]

    def loss(theta: Tensor, task: str) -> Tensor:
        parts = dict(zip(names, theta.split([s.numel() for s in shapes]), strict=True))
        weights = {n: p.view(s) for (n, p), s in zip(parts.items(), shapes, strict=True)}
        total = list(losses[task](lambda x: torch.func.functional_call(model, weights, (x,))))
        return sum(value for value, _ in total) / sum(number for _, number in total)  # type: ignore[return-value]

    gram = flat.T @ flat
    c = float(gram.diagonal().max())
    cosine = gram / gram.diagonal().sqrt() / gram.diagonal().sqrt()[:, None]
    epsilon = float((cosine - torch.eye(3)).abs().max())
    basis = ae_bases(gram, 2)
    for index, task in enumerate(TASKS):
        own = base + flat[:, index]
        dense = torch.func.hessian(lambda theta: loss(theta, task))(own)  # noqa: B023
        smoothness = float(torch.linalg.eigvalsh(dense.detach())[-1])
        assert found.curvatures[index].smoothness == pytest.approx(smoothness, rel=1e-6)
        mean = side(found, "3.5", "tasks", task)
        assert mean.measured == pytest.approx(float(loss(base + flat.mean(1), task)), rel=1e-9)  # the own loss is 0
        assert mean.bound == pytest.approx(smoothness * c * (1 + epsilon), rel=1e-6)
        assert side(found, "3.5", "bases", task).measured == pytest.approx(mean.measured, rel=1e-6)  # balanced
        others = [i for i in range(3) if i != index]
        best = max(others, key=lambda i: float(gram[index, i]))
        ood = side(found, "3.6", "tasks", task)
        assert ood.other == TASKS[best]
        assert ood.measured == pytest.approx(float(loss(base + flat[:, best], task)), rel=1e-9)
        assert ood.bound == pytest.approx(smoothness * (c - float(gram[index, best])), rel=1e-6)
        start = float(loss(base, task))
        gaps = [float(loss(base - 0.5 * flat[:, i], task)) - start for i in others]
        assert side(found, "3.7", "tasks", task).measured == pytest.approx(max(gaps), rel=1e-9)
        assert side(found, "3.7", "tasks", task).bound == pytest.approx(smoothness * c * (1.5 + epsilon), rel=1e-6)
        rebuilt = flat @ basis.reconstruction
        forgotten = TASKS.index(side(found, "B.10", "bases", task).other)
        gap = float(loss(base - 0.5 * rebuilt[:, forgotten], task)) - start
        assert side(found, "B.10", "bases", task).measured == pytest.approx(gap, rel=1e-9)
        error = float((rebuilt - flat)[:, forgotten].square().sum())
        expected = smoothness * (c * (2.5 + 2 * epsilon) + error)
        assert side(found, "B.10", "bases", task).bound == pytest.approx(expected, rel=1e-6)
        tail = float(torch.linalg.eigvalsh(gram)[0])
        spectral = side(found, "3.7", "bases", task)
        assert spectral.bound == pytest.approx(smoothness * (c * (2.5 + 2 * epsilon) + tail), rel=1e-6)
        assert "the bases miss the spectral bound" in spectral.broken  # balanced ones do


class Point(nn.Module):
    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = nn.Parameter(x)

    def forward(self) -> Tensor:
        return self.x


def points(directory: Path, *task_vectors: list[float]) -> tuple[nn.Module, Vectors]:
    base = torch.zeros(2, dtype=torch.float64)
    save_checkpoint(directory / "base", {"x": base})
    paths = {}
    for task, vector in zip(TASKS, task_vectors, strict=False):
        paths[task] = save_checkpoint(directory / task, {"x": torch.tensor(vector, dtype=torch.float64)})
    return Point(base), Vectors.open(directory / "base", paths)


def test_a_loss_more_curved_elsewhere_exceeds_the_bound_and_that_is_said(tmp_path: Path) -> None:
    model, vectors = points(tmp_path, [1.0, 0.0], [0.0, 1.0])

    def quartic(model: Any) -> Iterator[tuple[Tensor, int]]:
        apart = model() - torch.tensor([1.0, 0.0], dtype=torch.float64)
        yield 0.01 * apart.square().sum() + apart.square().sum() ** 2, 1

    found = measure_bounds(model, vectors, {"a": quartic}, 1)
    mean = side(found, "3.6", "tasks", "a")
    assert not mean.holds and "B.3: the loss is more curved elsewhere" in mean.broken


def test_a_model_that_is_not_at_its_minimum_is_told(tmp_path: Path) -> None:
    model, vectors = points(tmp_path, [1.0, 0.0], [0.0, 1.0])

    def slope(model: Any) -> Iterator[tuple[Tensor, int]]:
        yield 0.5 * (model() - torch.tensor([2.0, -1.0], dtype=torch.float64)).square().sum(), 1

    found = measure_bounds(model, vectors, {"a": slope}, 1)
    mean = side(found, "3.5", "tasks", "a")
    assert mean.broken == ("B.2: the gradient is not 0",)
    assert mean.linear == pytest.approx(1.0) and found.curvatures[0].gradient == pytest.approx(2**0.5)


def test_sources_that_oppose_the_target_are_told(tmp_path: Path) -> None:
    model, vectors = points(tmp_path, [1.0, 0.0], [0.5, 0.0], [-1.0, 0.1])

    def loss(model: Any) -> Iterator[tuple[Tensor, int]]:
        yield 0.5 * (model() - torch.tensor([1.0, 0.0], dtype=torch.float64)).square().sum(), 1

    found = measure_bounds(model, vectors, {"a": loss}, 1)
    assert "a source opposes the target" in side(found, "3.6", "bases", "a").broken
    assert side(found, "3.6", "tasks", "a").broken == ()


def test_one_task_has_nothing_to_be_merged_with(tmp_path: Path) -> None:
    model, vectors = points(tmp_path, [1.0, 0.0])

    def loss(model: Any) -> Iterator[tuple[Tensor, int]]:
        yield 0.5 * (model() - torch.tensor([1.0, 0.0], dtype=torch.float64)).square().sum(), 1

    found = measure_bounds(model, vectors, {"a": loss}, 1)
    assert [(s.theorem, s.measured) for s in found.sides] == [("3.5", 0.0), ("3.5", 0.0)]


def test_bad_requests_are_refused(tmp_path: Path) -> None:
    model, vectors, losses = teachers(tmp_path, 0, 0.1)
    with pytest.raises(ParameterError, match=r'data was given for "aa" \(did you mean a\?\); the tasks are a, b, c'):
        measure_bounds(model, vectors, {"aa": losses["a"]}, 2)
    with pytest.raises(ParameterError, match="data was given for no task"):
        measure_bounds(model, vectors, {}, 2)
    with pytest.raises(ParameterError, match=r"alpha in \[0, 1\], got 1\.5"):
        measure_bounds(model, vectors, losses, 2, alpha=1.5)
    with pytest.raises(ParameterError, match="num_bases is 9"):
        measure_bounds(model, vectors, losses, 9)
    with pytest.raises(MismatchError, match="not in the model"):
        measure_bounds(nn.Linear(2, 2), vectors, losses, 2)
