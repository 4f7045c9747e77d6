"""The scale of a merge by what it is worth: the best for the targets, within what the controls allow, or none."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import nn

from tvbases_hf.errors import CheckpointError, ParameterError
from tvbases_hf.learning.inplace import InPlace
from tvbases_hf.learning.tuning import Tuning, tune

GRID = tuple(i / 4 for i in range(1, 13))


class Asked:
    """Metrics of the scale that a model of one weight has, and how often they were asked for."""

    def __init__(self, **curves: Callable[[float], float]) -> None:
        self.curves, self.scales = curves, []
        self.model = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(self.model.weight)

    def __call__(self, model: nn.Module) -> Mapping[str, float]:
        scale = model.weight.item()  # type: ignore[operator]
        self.scales.append(scale)
        return {task: curve(scale) for task, curve in self.curves.items()}

    def tune(self, *targets: str, **how) -> Tuning:
        place = InPlace(self.model, ["weight"])
        return tune(place, lambda name: torch.ones(1, 1), self, targets, **{"alphas": GRID, **how})


def hill(top: float, width: float = 1.0) -> Callable[[float], float]:
    return lambda scale: 2 - ((scale - top) / width) ** 2


@pytest.mark.parametrize("top", [0.25, 0.5, 1.0, 2.25, 3.0])
@pytest.mark.parametrize("start", [0.25, 1.0, 3.0])
def test_the_best_mean_of_the_targets_is_found_from_anywhere(top: float, start: float) -> None:
    asked = Asked(a=hill(top), b=hill(top, 2.0))
    found = asked.tune("a", "b", start=start)
    assert found.alpha == top and found.helps
    assert len(asked.scales) == len(set(asked.scales))  # none is measured twice
    assert found.curve.alphas[0] == 0 and asked.model.weight.item() == 0


def test_a_control_bounds_the_scale() -> None:
    asked = Asked(a=hill(2.0), safe=lambda scale: 1 - scale / 20, sure=lambda scale: 5.0)
    assert asked.tune("a").alpha == 1.0 and asked.tune("a").controls == ("safe", "sure")
    assert asked.tune("a", keep=0.9).alpha == 2.0
    assert asked.tune("a", keep=0.975).alpha == 0.5
    assert asked.tune("a", keep=0.9).lost(1.25) == () and asked.tune("a").lost(1.25) == ("safe",)


def test_a_scale_that_helps_all_targets_is_better_than_a_higher_mean() -> None:
    asked = Asked(a=hill(3.0), b=hill(0.5))
    found = asked.tune("a", "b")
    assert not found.worse(found.alpha) and found.worse(2.0) == ("b",)
    assert found.curve.at(1.75)["a"] > found.curve.at(found.alpha)["a"]


def test_where_nothing_helps_every_scale_was_measured_and_the_reason_is_said() -> None:
    asked = Asked(a=hill(2.0), b=lambda scale: 1 - scale, safe=lambda scale: 1.0)
    found = asked.tune("a", "b")
    assert not found.helps and found.alpha == 0
    assert found.curve.alphas == (0.0, *GRID)
    assert found.summary().startswith("do not merge these: none of 12 alphas from 0.25 to 3 is better")
    assert '"b" is no better than the base\'s' in found.summary() and '"a"' not in found.summary()
    lost = Asked(a=hill(2.0), safe=lambda scale: 1 - scale).tune("a")
    assert not lost.helps and 'of "safe" less than 95% is left' in lost.summary()


def test_what_was_found_is_said_and_kept() -> None:
    found = Asked(a=hill(1.0), safe=lambda scale: 1 - scale / 100).tune("a")
    assert found.summary() == "alpha 1: mean of the targets 1 -> 2, controls at least 99.0% kept"
    assert "the grid ends here" in Asked(a=lambda scale: scale).tune("a").summary()
    assert Tuning.from_json(json.loads(json.dumps(found.to_json()))) == found
    with pytest.raises(CheckpointError, match="not a tuning"):
        Tuning.from_json({"targets": ["a"]})


def test_a_metric_that_is_nan_is_no_help() -> None:
    found = Asked(a=lambda scale: float("nan") if scale > 1 else scale).tune("a")
    assert found.alpha == 1.0


def test_bad_questions_are_refused() -> None:
    asked = Asked(a=hill(1.0), safe=lambda scale: 0.0)
    for how, message in (
        ({"keep": 0.0}, r"lies in \(0, 1\]; got 0"),
        ({"alphas": (-1.0,)}, "outside what the method knows"),
        ({}, 'the control "safe" is 0 for the base itself'),
    ):
        with pytest.raises(ParameterError, match=message):
            asked.tune("a", **how)
    with pytest.raises(ParameterError, match=r'no metric of the target "as".*did you mean'):
        asked.tune("as")
