"""Forgetting as far as the controls allow: the rule on known curves, any kind of change, and refusals."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tvbases_hf import Basis, Negation, gram_matrix, negate
from tvbases_hf.algebra.delta import Delta, dense
from tvbases_hf.bases import ae_bases
from tvbases_hf.errors import CheckpointError, OutputError, ParameterError
from tvbases_hf.learning.inplace import InPlace
from tvbases_hf.learning.negation import ALPHAS, change_of
from tvbases_hf.merging.changes import Edit
from tvbases_hf.merging.write import write
from tvbases_hf.methods.devec import Options, decompose
from zoo.models import Models, flat, random_models, read_directory


class Point(nn.Module):
    x: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("x", torch.zeros(1, dtype=torch.float64))


def point() -> InPlace:
    return InPlace(Point(), ["x"])


def one(name: str) -> Tensor:
    return torch.ones(1)


def control(curve: Callable[[float], float]) -> Callable[[nn.Module], dict[str, float]]:
    """The control metric as a function of alpha; the target falls with alpha."""

    def metrics(model: nn.Module) -> dict[str, float]:
        alpha = -float(model.x)  # type: ignore[arg-type]
        return {"toxic": 1 - alpha, "chat": curve(alpha)}

    return metrics


def test_the_largest_alpha_that_keeps_its_share_is_chosen() -> None:
    found = negate(point(), one, control(lambda alpha: 0.8 * (1 - alpha / 4)), "toxic")  # 95 % at alpha = .2
    assert found.alpha == 0.2 and found.kept == pytest.approx(0.95)
    assert found.target_at(0.0) == 1 and found.target_at(found.alpha) == pytest.approx(0.8)
    assert negate(point(), one, control(lambda alpha: 0.8 * (1 - alpha / 4)), "toxic", keep=0.9).alpha == 0.4
    assert found.controls == ("chat",) and "(95.0% kept)" in found.summary()


def test_it_is_the_largest_also_where_the_control_comes_back() -> None:
    dip = control(lambda alpha: 0.5 if 0.2 < alpha < 0.35 else 1.0)
    assert negate(point(), one, dip, "toxic").alpha == 1.0
    assert negate(point(), one, dip, "toxic", patience=1).alpha == 0.2
    late = control(lambda alpha: 0.5 if 0.2 < alpha < 0.9 else 1.0)
    assert negate(point(), one, late, "toxic").alpha == 0.2
    assert negate(point(), one, late, "toxic", patience=None).alpha == 1.0


def test_the_walk_stops_when_the_control_is_lost_and_begins_with_the_model_itself() -> None:
    found = negate(point(), one, control(lambda alpha: 1.0 if alpha < 0.12 else 0.0), "toxic", patience=2)
    assert found.curve.alphas == (0.0, 0.05, 0.1, 0.15, 0.2) == ALPHAS[:5]
    assert negate(point(), one, control(lambda alpha: 1.0), "toxic", alphas=[0.5]).curve.alphas == (0.0, 0.5)


def test_what_to_know_of_a_choice_at_either_end_is_said() -> None:
    nothing = negate(point(), one, control(lambda alpha: float(alpha == 0)), "toxic")
    assert nothing.alpha == 0 and "nothing is forgotten" in nothing.summary()
    everything = negate(point(), one, control(lambda alpha: 1.0), "toxic")
    assert everything.alpha == 1 and "a greater alpha may forget more" in everything.summary()


@pytest.mark.parametrize("slope", [0.0, 0.5])
def test_a_target_that_does_not_fall_is_said_with_its_unit(slope: float) -> None:
    def metrics(model: nn.Module) -> dict[str, float]:
        alpha = -float(model.x)  # type: ignore[arg-type]
        return {"toxic": 0.1 + slope * alpha, "chat": 1.0}

    units = {"toxic": "toxic_rate of generations", "chat": "acc"}
    found = negate(point(), one, metrics, "toxic", units=units)
    assert not found.fell and "the target did not fall" in found.summary()
    assert '"toxic" (toxic_rate of generations) 0.1 ->' in found.summary() and "control (acc) 1 ->" in found.summary()
    assert Negation.from_json(json.loads(json.dumps(found.to_json()))).summary() == found.summary()
    falls = negate(point(), one, control(lambda alpha: 1.0), "toxic")
    assert falls.fell and "did not fall" not in falls.summary()


def test_a_control_that_becomes_nan_is_lost() -> None:
    assert negate(point(), one, control(lambda a: math.nan if a > 0.3 else 1.0), "toxic", patience=None).alpha == 0.3


def test_several_controls_are_one_mean() -> None:
    def metrics(model: nn.Module) -> dict[str, float]:
        alpha = -float(model.x)  # type: ignore[arg-type]
        return {"a": 1 - alpha, "toxic": 0.0, "b": 1.0}

    found = negate(point(), one, metrics, "toxic")
    assert found.controls == ("a", "b") and found.alpha == 0.1 and found.control_at(0.1) == pytest.approx(0.95)


@pytest.mark.parametrize("value", [0.0, -0.5, math.nan])
def test_a_control_that_is_worthless_to_begin_with_is_refused(value: float) -> None:
    with pytest.raises(ParameterError, match=f"control metric of the model itself is {value:g}"):
        negate(point(), one, control(lambda alpha: value), "toxic")


def test_a_control_already_below_its_share_of_what_it_should_be_is_refused() -> None:
    flat_curve = control(lambda alpha: 0.76)
    assert negate(point(), one, flat_curve, "toxic", expected=0.8).alpha == 1  # 95 % to the digit
    place = point()
    with pytest.raises(ParameterError, match=r"is 0\.76, already below 95% of the 0\.81"):
        negate(place, one, flat_curve, "toxic", expected=0.81)
    assert float(place.weights["x"]) == 0


def options_of(changed: dict[str, Any]) -> dict[str, Any]:
    return {"target": "toxic"} | changed


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"keep": 0.0}, "lies in"),
        ({"keep": 1.01}, "lies in"),
        ({"keep": math.nan}, "lies in"),
        ({"alphas": [-0.5]}, "outside what the method knows"),
        ({"target": "toxik"}, r'no metric of the target "toxik" \(did you mean toxic\?\)'),
    ],
)
def test_parameters_outside_their_domain_are_refused(options: dict, reason: str) -> None:
    with pytest.raises(ParameterError, match=reason):
        negate(point(), one, control(lambda alpha: 1.0), **options_of(options))


def test_a_target_without_a_control_is_refused() -> None:
    with pytest.raises(ParameterError, match='data of "toxic" only'):
        negate(point(), one, lambda model: {"toxic": 1.0}, "toxic")


def test_the_result_survives_json() -> None:
    found = negate(point(), one, control(lambda a: math.nan if a > 0.9 else 1.0), "toxic")
    text = json.dumps(found.to_json(), allow_nan=False)
    again = Negation.from_json(json.loads(text))
    assert again.to_json() == found.to_json() and again.alpha == found.alpha
    with pytest.raises(CheckpointError, match="not a negation"):
        Negation.from_json({"target": "a"})


class Weights(nn.Module):
    """A model with the names and weights of a checkpoint."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        self.state = {name: tensor.clone() for name, tensor in state.items()}

    def state_dict(self, *args: object, **kwargs: object) -> dict[str, Tensor]:  # type: ignore[override]
        return self.state


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return random_models(tmp_path_factory.mktemp("models"), 3)


def distances(expected: dict[str, Tensor], names: Sequence[str]) -> Callable[[nn.Module], dict[str, float]]:
    """How far the weights are from the expected ones, as what is left of the target; the control always holds."""

    def metrics(model: nn.Module) -> dict[str, float]:
        state = model.state_dict()
        apart = max(float((state[n].double() - expected[n].double()).abs().max()) for n in names)
        return {"target": apart, "control": 1.0}

    return metrics


def test_task_vectors_reconstructions_and_unique_components_are_all_taken_away(models: Models, tmp_path: Path) -> None:
    vectors = models.vectors()
    weights = ae_bases(gram_matrix(vectors).matrix, 2)
    Basis.build(vectors, 2).save_pretrained(tmp_path / "basis")
    basis = Basis.from_pretrained(tmp_path / "basis")
    plain = vectors
    built = vectors.mixed(weights, "reconstructions")
    stored = basis.vectors(models.base, "reconstructions")

    def unique(name: str) -> Delta:
        return decompose(plain.deltas(name), Options(rank=2)).unique[1]

    oracle = {
        "task": lambda n: models.states["task1"][n].double() - models.base_state[n].double(),
        "stored": lambda n: basis.reconstruct("task1")[n].double(),
        "unique": lambda n: dense(unique(n)),
    }
    for kind, change in (
        ("task", change_of(plain, "task1")),
        ("stored", change_of(stored, "task1")),
        ("unique", unique),
    ):
        expected = {
            n: models.base_state[n].double() - 0.5 * oracle[kind](n).reshape(models.base_state[n].shape)
            for n in plain.names
        }
        place = InPlace(Weights(models.base_state), plain.names)
        found = negate(place, change, distances(expected, plain.names), "target", alphas=[0.5])
        assert found.target_at(0.5) < 2e-7 < found.target_at(0.0), kind  # one float32 rounding of numbers up to 4
        assert all(torch.equal(place.weights[n], models.base_state[n]) for n in plain.names)
    gap = max(float((_dense(change_of(built, "task1")(n)) - oracle["stored"](n)).abs().max()) for n in plain.names)
    assert gap < 1e-6


def _dense(change: Delta | Tensor) -> Tensor:
    return change if isinstance(change, Tensor) else dense(change)


def test_an_unknown_vector_is_named(models: Models) -> None:
    with pytest.raises(
        ParameterError, match=r'no vector "task9" \(did you mean task\d\?\); there are task0, task1, task2'
    ):
        change_of(models.vectors(), "task9")


def test_the_written_model_is_the_one_that_was_measured(models: Models, tmp_path: Path) -> None:
    vectors = models.vectors()
    change, out = change_of(vectors, "task1"), tmp_path / "out"
    write(Edit.of(vectors, change, "task1 forgotten", -0.35), out)
    place = InPlace(Weights(models.base_state), vectors.names)
    with place.changed(change, -0.35) as model:
        written = read_directory(out)
        assert all(torch.equal(written[n], model.state_dict()[n]) for n in vectors.names)
        assert not torch.equal(flat(written), flat(models.base_state))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("precious")
    with pytest.raises(OutputError, match="did not write"):
        write(Edit.of(vectors, change, "", -0.35), tmp_path / "mine")
