"""Evaluation in place: the right sum inside, bit-identical weights outside."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from torch import Tensor, nn

from tvbases_hf.algebra.delta import LowRank
from tvbases_hf.errors import MismatchError
from tvbases_hf.learning.inplace import InPlace, Reparametrised


@pytest.fixture(params=[torch.float32, torch.bfloat16])
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(request.param)


def bits(model: nn.Module) -> list[Tensor]:
    return [tensor.detach().clone().view(torch.uint8) for tensor in model.state_dict().values()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def change(name: str) -> Tensor | LowRank:
    torch.manual_seed(len(name))
    if name == "0.weight":
        return LowRank(torch.randn(7, 2), torch.randn(2, 5))
    return torch.randn(3, 7) / 3


NAMES = ("0.weight", "2.weight")


def test_inside_the_weights_are_the_sum_rounded_once(model: nn.Module) -> None:
    before = {name: model.state_dict()[name].double() for name in NAMES}
    with InPlace(model, NAMES).changed(change, alpha=0.3) as changed:
        low = change("0.weight")
        assert isinstance(low, LowRank)
        expected = before["0.weight"] + 0.3 * (low.left.double() @ low.right.double())
        found = changed.state_dict()["0.weight"]
        assert torch.equal(found, expected.to(found.dtype))
        assert changed is model


@pytest.mark.parametrize("alpha", [1e-4, 1.0, 1e4])
def test_outside_the_weights_are_bit_identical_where_subtracting_would_not_do(model: nn.Module, alpha: float) -> None:
    before = bits(model)
    place = InPlace(model, NAMES)
    for _ in range(3):
        with place.changed(change, alpha):
            assert not same(bits(model), before)
        assert same(bits(model), before)
    with torch.no_grad():
        for name, weight in place.weights.items():
            added = (1e4 * torch.as_tensor(_dense(name))).to(weight.dtype)
            weight.add_(added).sub_(added)
    assert not same(bits(model), before)


def _dense(name: str) -> Tensor:
    found = change(name)
    return found.left @ found.right if isinstance(found, LowRank) else found


def test_an_exception_inside_and_one_half_way_restore_the_weights(model: nn.Module) -> None:
    before = bits(model)
    place = InPlace(model, NAMES)
    with pytest.raises(ZeroDivisionError), place.changed(change):
        raise ZeroDivisionError

    def broken(name: str) -> Tensor | LowRank:
        if name == NAMES[1]:
            raise KeyError(name)
        return change(name)

    with pytest.raises(KeyError), place.changed(broken):
        pass
    assert same(bits(model), before)


def test_ctrl_c_restores_the_weights_even_while_they_are_being_restored(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background may ignore it
    before = bits(model)
    place = InPlace(model, NAMES)
    with pytest.raises(KeyboardInterrupt), place.changed(change):
        os.kill(os.getpid(), signal.SIGINT)
    assert same(bits(model), before)

    class Interrupting(dict):  # Ctrl-C arrives with the first weight that is put back
        def __getitem__(self, name: str) -> Tensor:
            if armed and name == NAMES[0]:
                os.kill(os.getpid(), signal.SIGINT)
            return super().__getitem__(name)

    armed = False
    monkeypatch.setattr(place, "_originals", Interrupting(place._originals))
    with pytest.raises(KeyboardInterrupt), place.changed(change):
        armed = True
    assert same(bits(model), before)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_names_that_the_model_lacks_are_refused(model: nn.Module) -> None:
    with pytest.raises(MismatchError, match=r"1 of 2 weights .*first: 9\.weight; the model has 0\.weight"):
        InPlace(model, ("0.weight", "9.weight"))


def test_a_change_of_other_rows_is_refused_and_nothing_has_changed(model: nn.Module) -> None:
    before, message = bits(model), r"^2.weight is \[3, 7\] in the model that is measured and \[4, 7\]"
    longer = lambda name: torch.ones(4, 7) if name == "2.weight" else change(name)  # noqa: E731
    with pytest.raises(MismatchError, match=message), InPlace(model, NAMES).changed(longer):
        pass
    assert same(bits(model), before)


def test_weights_that_are_offloaded_are_refused() -> None:
    with pytest.raises(MismatchError, match=r"1 of 1 weights that change are offloaded \(first: weight\)"):
        InPlace(nn.Linear(2, 2, device="meta"), ("weight",))


def test_a_reparametrised_model_answers_with_the_other_weights_and_their_gradient() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    other = torch.randn(2, 4, requires_grad=True)
    asked = Reparametrised(model, {"weight": other})
    x = torch.randn(3, 4)
    answer = asked(x)
    assert torch.allclose(answer, x @ other.T + model.bias)
    answer.sum().backward()
    assert other.grad is not None and model.weight.grad is None
    assert asked.in_features == 4
