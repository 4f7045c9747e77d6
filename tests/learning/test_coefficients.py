"""The search for coefficients: the optimum of known functions, exact restoration, and refusals."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tvbases_hf import Curve, coordinate_search, grid_search
from tvbases_hf.algebra.delta import Delta, Dense
from tvbases_hf.errors import CheckpointError, OutputError, ParameterError
from tvbases_hf.learning.coefficients import ALPHAS, accuracies, climb, summed
from tvbases_hf.learning.curve import normalised_accuracy
from tvbases_hf.learning.data import TaskData
from tvbases_hf.learning.inplace import InPlace
from tvbases_hf.models.vectors import Vectors
from tvbases_hf.storage.checkpoint import Checkpoint
from zoo.models import random_models


class Point(nn.Module):
    """A model that is nothing but its weights, x [d]."""

    x: Tensor

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.register_buffer("x", x)


def point(size: int = 1) -> InPlace:
    return InPlace(Point(torch.zeros(size, dtype=torch.float64)), ["x"])


def ones(name: str) -> Tensor:
    return torch.ones(1)


def peak_at(best: float, seen: list[float] | None = None) -> Callable[[nn.Module], dict[str, float]]:
    def metrics(model: nn.Module) -> dict[str, float]:
        x = float(model.x[0])  # type: ignore[index]
        if seen is not None:
            seen.append(x)
        return {"task": 1 - (x - best) ** 2}

    return metrics


@pytest.mark.parametrize("best", [0.0, 0.35, 1.0, 1.5, 3.0, 8.0])
def test_the_best_alpha_is_found_beyond_1_too_and_the_walk_stops_when_it_is_past(best: float) -> None:
    seen: list[float] = []
    curve = grid_search(point(), ones, peak_at(best, seen), patience=3)
    assert curve.chosen == best and curve.best == 1.0
    after = [alpha for alpha in ALPHAS if alpha > best]
    assert [x for x in seen if x > best] == after[:3]
    assert list(curve.alphas) == sorted(seen)


def test_one_bad_value_is_no_reason_to_stop_and_patience_1_would() -> None:
    values = {0.0: 0.5, 1.0: 0.4, 2.0: 0.3, 3.0: 0.9, 4.0: 0.8}
    metrics = lambda model: {"task": values[float(model.x[0])]}  # noqa: E731
    assert grid_search(point(), ones, metrics, alphas=list(values)).chosen == 3
    assert grid_search(point(), ones, metrics, alphas=list(values), patience=1).chosen == 0


def test_a_plateau_is_walked_over_and_the_first_of_equals_is_chosen() -> None:
    metrics = lambda model: {"task": 0.7 if 2 <= float(model.x[0]) <= 3 else 0.5}  # noqa: E731
    assert grid_search(point(), ones, metrics, patience=1).chosen == 2.0


def test_nan_is_the_worst_value_and_survives_the_file(tmp_path: Path) -> None:
    metrics = lambda model: {"task": math.nan if float(model.x[0]) > 0.5 else float(model.x[0])}  # noqa: E731
    curve = grid_search(point(), ones, metrics)
    assert curve.chosen == 0.5
    assert math.isnan(curve.at(0.55)["task"])
    curve.save(tmp_path / "curve.json")
    again = Curve.load(tmp_path / "curve.json")
    assert again.to_json() == curve.to_json() and math.isnan(again.at(0.55)["task"])
    assert "NaN" not in (tmp_path / "curve.json").read_text()


def test_with_the_tasks_own_accuracies_normalised_accuracy_decides() -> None:
    values = {0.0: {"a": 0.9, "b": 0.0}, 1.0: {"a": 0.6, "b": 0.2}}  # means .45, .4; normalised .45, .8
    metrics = lambda model: values[float(model.x[0])]  # noqa: E731
    assert grid_search(point(), ones, metrics, alphas=[0, 1]).chosen == 0
    curve = grid_search(point(), ones, metrics, alphas=[0, 1], own={"a": 1.0, "b": 0.2})
    assert curve.chosen == 1 and curve.best == pytest.approx(0.8)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.data())
def test_climbing_with_enough_patience_finds_the_maximum_and_asks_once(scores: list[int], data: st.DataObject) -> None:
    asked: list[int] = []

    def score(index: int) -> float:
        asked.append(index)
        return scores[index]

    start = data.draw(st.integers(0, len(scores) - 1))
    best = climb(score, len(scores), start, patience=len(scores))
    assert scores[best] == max(scores) and len(asked) == len(set(asked)) == len(scores)
    impatient = climb(score, len(scores), start)
    assert scores[impatient] >= scores[start]
    assert all(scores[i] <= scores[impatient] for i in (impatient - 1, impatient + 1) if 0 <= i < len(scores))


def vectors_of(directory: Path, tasks: int) -> Vectors:
    return random_models(directory, tasks).vectors()


def axes(count: int, base: Checkpoint) -> Vectors:
    """Vectors of a Point: the unit vectors of its space."""
    eye = torch.eye(count, dtype=torch.float64)
    names = tuple(f"v{i}" for i in range(count))

    def read(name: str) -> list[Delta]:
        return [Dense(row) for row in eye]

    return Vectors(base, names, names, ("x",), eye, read)


def test_every_vector_gets_its_own_best_coefficient_but_never_a_negative_one(tmp_path: Path) -> None:
    vectors = axes(3, vectors_of(tmp_path, 2).base)
    best = torch.tensor([0.3, 1.4, -0.5], dtype=torch.float64)
    metrics = lambda model: {"task": -float((model.x - best).square().sum())}  # noqa: E731
    place = point(3)
    common = grid_search(place, summed(vectors), metrics)
    assert common.chosen == pytest.approx(0.4)  # the mean
    found = coordinate_search(place, vectors, metrics, common.chosen)
    assert found.alphas == (0.3, 1.4, 0.0)
    assert found.weights == {"v0": 0.3, "v1": 1.4, "v2": 0.0}
    assert found.score > common.best and found.metrics["task"] == found.score
    assert torch.equal(place.weights["x"].detach(), torch.zeros(3, dtype=torch.float64))


def test_the_search_starts_at_the_common_alpha_and_is_never_worse(tmp_path: Path) -> None:
    vectors = axes(2, vectors_of(tmp_path, 2).base)
    noise = torch.Generator().manual_seed(0)
    table: dict[tuple[float, ...], float] = {}

    def metrics(model: nn.Module) -> dict[str, float]:
        key = tuple(model.x.tolist())  # type: ignore[operator]
        return {"task": table.setdefault(key, float(torch.rand((), generator=noise)))}

    found = coordinate_search(point(2), vectors, metrics, 0.37)  # not on the grid
    assert next(iter(table)) == (0.37, 0.37)
    assert found.score >= table[0.37, 0.37] and found.evaluations == len(table)
    assert found.score == table[found.alphas]


def test_the_weights_of_the_tasks_are_those_of_the_encoder(tmp_path: Path) -> None:
    encoder = torch.tensor([[0.5, 0.0], [0.5, 0.25], [0.0, 0.75]], dtype=torch.float64)
    plain = axes(2, vectors_of(tmp_path, 2).base)
    vectors = Vectors(plain.base, ("a", "b", "c"), plain.labels, plain.names, encoder, plain.read)
    metrics = lambda model: {"task": -float((model.x - torch.tensor([1.0, 2.0])).abs().sum())}  # noqa: E731
    found = coordinate_search(point(2), vectors, metrics, 1.5)
    assert found.alphas == (1.0, 2.0)
    assert found.weights == pytest.approx({"a": 0.5, "b": 1.0, "c": 1.5})


def test_the_sum_over_vectors_is_the_dense_sum(tmp_path: Path) -> None:
    models = random_models(tmp_path, 3)
    vectors = models.vectors()
    name = vectors.names[0]
    total = summed(vectors, [0.5, 0.0, 2.0])(name)
    expected = sum(
        c * (s[name].double() - models.base_state[name].double())
        for c, s in zip([0.5, 0.0, 2.0], models.states.values(), strict=True)
    )
    found = total if isinstance(total, Tensor) else total.block(0, math.prod(total.shape)).reshape(total.shape)
    assert torch.allclose(found, torch.as_tensor(expected), rtol=1e-6, atol=1e-9)
    with pytest.raises(ParameterError, match="2 coefficients for 3 vectors"):
        summed(vectors, [1.0, 1.0])


def test_normalised_accuracy_is_the_mean_of_the_quotients() -> None:
    assert normalised_accuracy({"a": 0.5, "b": 0.9}, {"a": 1.0, "b": 0.9, "c": 0.0}) == pytest.approx(0.75)
    with pytest.raises(ParameterError, match=r'1 of 2 tasks have no accuracy of their own .first: "b"'):
        normalised_accuracy({"a": 0.5, "b": 0.9}, {"a": 1.0})
    for bad in (0.0, math.nan):
        with pytest.raises(ParameterError, match='the accuracy of "a"\'s own model'):
            normalised_accuracy({"a": 0.5}, {"a": bad})


def test_what_the_method_does_not_know_is_refused() -> None:
    changing: Callable[[nn.Module], dict[str, float]] = lambda model: {"b" if float(model.x) else "a": 0.0}  # type: ignore  # noqa: E731
    nothing: Callable[[nn.Module], dict[str, float]] = lambda model: {}  # noqa: E731
    for alphas, reason in (
        ([-0.1, 0.5], "1 of 2 alphas are outside what the method knows, 0 to inf .first: -0.1"),
        ([0.5, math.nan], "outside"),
        ([0.5, math.inf], "outside"),
        ([], "at least one number"),
        ([0.5, 0.5], "greater than the one before"),
        ([1.0, 0.5], "greater than the one before"),
    ):
        with pytest.raises(ParameterError, match=reason):
            grid_search(point(), ones, peak_at(1), alphas=alphas)
    with pytest.raises(ParameterError, match=r"0 to 1 .first: 1\.5"):
        grid_search(point(), ones, peak_at(1), alphas=[0.5, 1.5], domain=(0.0, 1.0))
    with pytest.raises(ParameterError, match="patience"):
        grid_search(point(), ones, peak_at(1), patience=0)
    with pytest.raises(ParameterError, match="no metric"):
        grid_search(point(), ones, nothing)
    with pytest.raises(ParameterError, match="NaN at all of 2 alphas"):
        grid_search(point(), ones, lambda model: {"a": math.nan}, alphas=[0.0, 1.0])
    with pytest.raises(ParameterError, match="alpha 1 was measured on b, others on a"):
        grid_search(point(), ones, changing, alphas=[0.0, 1.0])
    with pytest.raises(ParameterError, match="names of their own"):
        accuracies([TaskData("a", []), TaskData("a", [])])


def test_files_that_are_no_curve_are_refused(tmp_path: Path) -> None:
    curve = grid_search(point(), ones, peak_at(1.0))
    with pytest.raises(ParameterError, match="alpha 7 was not measured"):
        curve.at(7)
    good = curve.to_json()
    for bad in ({}, good | {"alphas": None}, good | {"scores": [1.0]}, good | {"chosen": 77.0}, good | {"metrics": 3}):
        with pytest.raises(CheckpointError, match="not a curve"):
            Curve.from_json(bad)
    (tmp_path / "text").write_text("{")
    for name in ("text", "absent"):
        with pytest.raises(CheckpointError, match="cannot be read as a curve"):
            Curve.load(tmp_path / name)
    with pytest.raises(OutputError):
        curve.save(tmp_path / "text" / "below.json")


def bits(model: nn.Module) -> list[Tensor]:
    return [tensor.detach().clone().view(torch.uint8) for tensor in model.state_dict().values()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_exception_in_the_middle_of_a_grid_leaves_every_bit_as_it_was(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)).to(dtype)
    place = InPlace(model, ["0.weight", "1.weight"])
    before, calls = bits(model), 0

    def broken(model: nn.Module) -> dict[str, float]:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise ZeroDivisionError
        return {"task": float(calls)}

    change = lambda name: torch.randn(place.weights[name].shape)  # noqa: E731
    with pytest.raises(ZeroDivisionError):
        grid_search(place, change, broken)
    assert calls == 4 and all(torch.equal(a, b) for a, b in zip(bits(model), before, strict=True))
    grid_search(place, change, lambda model: {"task": 1.0}, alphas=[0.1, 0.3])
    assert all(torch.equal(a, b) for a, b in zip(bits(model), before, strict=True))


INTERRUPTED = """
import signal, torch
from torch import nn
from tvbases_hf.learning.coefficients import grid_search
from tvbases_hf.learning.inplace import InPlace

torch.set_num_threads(1)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 300)).bfloat16()
before = [w.detach().clone() for w in model.parameters()]
change = lambda name: torch.randn(300, 300)
place = InPlace(model, ["0.weight", "1.weight"])
def metrics(model):
    return {"task": float(model(torch.ones(1, 300, dtype=torch.bfloat16)).sum())}
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
print("ready", flush=True)
try:
    while True:
        grid_search(place, change, metrics, patience=100)
except KeyboardInterrupt:
    pass
same = all(torch.equal(a.view(torch.uint8), b.detach().view(torch.uint8)) for a, b in zip(before, model.parameters()))
print("same" if same else "changed", flush=True)
"""


@pytest.mark.skipif(os.name == "nt", reason="Ctrl-C cannot be sent to one process there")
@pytest.mark.parametrize("wait", [0.05, 0.111, 0.173])
def test_a_real_ctrl_c_in_the_middle_of_a_grid_leaves_every_bit_as_it_was(wait: float) -> None:
    process = subprocess.Popen([sys.executable, "-c", INTERRUPTED], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        try:
            process.wait(wait)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60)[0] == "same\n"
    finally:
        process.kill()
