"""Two styles, and what a pipeline holds of their mix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from zoo.peft_models import relative
from zoo.pipelines import (
    FLUX_MODULES,
    added,
    dense_mixed,
    products,
    style,
)

EXACT = 1e-5


def two(**how: Any) -> dict[str, dict[str, Tensor]]:
    return {name: style(seed, FLUX_MODULES, **how) for seed, name in enumerate("ab")}


def assert_adds(pipe: Any, expected: Mapping[str, Tensor], component: str = "transformer") -> None:
    found = added(pipe, component=component)
    assert set(found) == set(expected)
    for module, delta in found.items():
        assert relative(delta, expected[module]) <= EXACT, module


def unique(states: Mapping[str, Mapping[str, Tensor]], scales: Mapping[str, float] | None = None) -> dict[str, Tensor]:
    """The dense decomposition's mix."""
    numbers = [(scales or {}).get(name, 1.0) for name in states]
    changes = [products(state) for state in states.values()]
    return {
        module: torch.stack([s * u for s, u in zip(numbers, dense_mixed(c[module] for c in changes), strict=True)]).sum(
            0
        )
        for module in changes[0]
    }


def state_of(pipe: Any) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": tensor.clone()
        for name in ("transformer", "unet", "text_encoder")
        if getattr(pipe, name, None) is not None
        for key, tensor in getattr(pipe, name).state_dict().items()
    }


def assert_same_state(pipe: Any, before: Mapping[str, Tensor]) -> None:
    now = state_of(pipe)
    assert list(now) == list(before)
    assert all(torch.equal(now[name], tensor) for name, tensor in before.items())
