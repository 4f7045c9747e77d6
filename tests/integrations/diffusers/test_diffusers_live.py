"""Scales and schedules that change while the styles are mixed, and numbers that the layers cannot hold."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tvbases_diffusers import mix_styles, set_style_scales
from tvbases_hf.errors import ParameterError
from zoo.pipelines import (
    FLUX_MODULES,
    UNET_MODULES,
    added,
    flux_image,
    flux_pipeline,
    style,
    unet_image,
    unet_pipeline,
)
from zoo.style_mixes import assert_adds, assert_same_state, state_of, two, unique


def test_scales_that_a_half_precision_pipeline_cannot_hold_change_nothing() -> None:
    pipe = flux_pipeline(torch.float16)
    mix = mix_styles(pipe, {"a": style(0, FLUX_MODULES), "b": style(1, FLUX_MODULES)})
    layers = dict(pipe.transformer.named_modules())
    before = layers["transformer_blocks.0.attn.to_q"].lora_B["styles"].weight.clone()
    with pytest.raises(ParameterError, match="too large for float16"):
        mix.set_style_scales({"a": 1e7})
    assert mix.scales == {"a": 1.0, "b": 1.0}
    assert torch.equal(layers["transformer_blocks.0.attn.to_q"].lora_B["styles"].weight, before)
    mix.unload()
    with pytest.raises(ParameterError, match="too large for float16"):
        mix_styles(pipe, {"a": style(0, FLUX_MODULES), "b": style(1, FLUX_MODULES)}, scales={"a": 1e7})
    assert not any(hasattr(module, "lora_B") for module in pipe.transformer.modules())


def biased(seed: int, size: float = 1.0) -> dict[str, Tensor]:
    state = style(seed, FLUX_MODULES)
    sizes = {name: len(tensor) for name, tensor in state.items() if name.endswith("lora_B.weight")}
    return state | {name.replace("B.weight", "B.bias"): torch.full((rows,), size) for name, rows in sizes.items()}


def test_biases_that_a_half_precision_pipeline_cannot_hold_change_nothing() -> None:
    pipe = flux_pipeline(torch.float16)
    before = state_of(pipe)
    with pytest.raises(ParameterError, match=r"to_q.lora_B.bias are too large for float16"):
        mix_styles(pipe, {"a": biased(0, size=1e5), "b": biased(1)})
    assert_same_state(pipe, before)
    mix = mix_styles(pipe, {"a": biased(0, size=30.0), "b": biased(1)})
    mixed = state_of(pipe)
    with pytest.raises(ParameterError, match=r"to_q.lora_B.bias are too large for float16"):
        mix.set_style_scales({"a": 3e3})
    assert_same_state(pipe, mixed)


def test_first_factors_that_a_half_precision_pipeline_cannot_hold_are_refused() -> None:
    pipe = flux_pipeline(torch.float16)
    before = state_of(pipe)
    large = {name: tensor * (1e6 if "lora_A" in name else 1e-6) for name, tensor in style(0, FLUX_MODULES).items()}
    with pytest.raises(ParameterError, match=r"to_q.lora_A.weight are too large for float16"):
        mix_styles(pipe, {"a": large, "b": style(1, FLUX_MODULES)})
    assert_same_state(pipe, before)


def test_scales_too_large_for_a_wide_matrix_by_entries_change_nothing() -> None:
    """A matrix of more columns than rows is the first factor, and the identity the second."""
    pipe = flux_pipeline(torch.float16)
    module = "single_transformer_blocks.0.proj_out"
    states = {name: style(seed, {module: FLUX_MODULES[module]}) for seed, name in enumerate("ab")}
    mix = mix_styles(pipe, states, method="magmax")
    before = state_of(pipe)
    with pytest.raises(ParameterError, match="too large for float16"):
        mix.set_style_scales({"a": 1e7})
    assert_same_state(pipe, before)


def test_a_scheduled_scale_that_is_too_large_ends_the_picture_and_leaves_the_scales_given() -> None:
    pipe = flux_pipeline(torch.float16)
    mix = mix_styles(pipe, {"a": style(0, FLUX_MODULES), "b": style(1, FLUX_MODULES)})
    before = added(pipe)
    mix.schedule({"a": [0.5, 1e7]})
    with pytest.raises(ParameterError, match=r"the schedule's scales a 1e\+07 are too large"):
        flux_image(pipe)
    assert all(torch.equal(delta, before[name]) for name, delta in added(pipe).items())


def test_scales_are_live_and_nothing_is_decomposed_again(flux: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    states = two()
    plain = flux_image(flux)
    mix = mix_styles(flux, states)
    first = flux_image(flux)
    monkeypatch.setattr("tvbases_hf.styles.mixing.decompose", None)
    set_style_scales(flux, {"a": 0.25})
    assert mix.scales == {"a": 0.25, "b": 1.0}
    assert_adds(flux, unique(states, {"a": 0.25}))
    set_style_scales(flux, {"a": 0.0, "b": 0.0})
    assert torch.equal(flux_image(flux), plain)
    set_style_scales(flux, {"a": 1.0, "b": 1.0})
    assert torch.equal(flux_image(flux), first), "scales do not wear the factors out"


def test_a_schedule_gives_every_step_its_scales(flux: Any) -> None:
    mix = mix_styles(flux, two())
    constant = flux_image(flux, steps=4)
    seen: list[tuple[int, int]] = []

    def curve(step: int, steps: int) -> float:
        seen.append((step, steps))
        return 1.0

    mix.schedule({"a": curve, "b": 1.0})
    assert torch.equal(flux_image(flux, steps=4), constant)
    assert seen == [(0, 4), (1, 4), (2, 4), (3, 4)]
    mix.schedule({"a": [1.0, 0.0]})
    early = flux_image(flux, steps=4)
    mix.schedule({"a": lambda step, steps: float(step < 2)})
    assert torch.equal(flux_image(flux, steps=4), early), "a list is spread over the steps"
    assert not torch.allclose(early, constant, atol=1e-3)
    assert torch.equal(flux_image(flux, steps=4), early), "the next picture begins at step 0 again"
    mix.schedule(None)
    assert torch.equal(flux_image(flux, steps=4), constant)


def test_a_scheduled_step_is_the_step_of_a_pipeline_with_these_scales(flux: Any) -> None:
    """Against scales that are set by hand from diffusers' own callback."""
    mix = mix_styles(flux, two())
    values = [0.2, 1.5, -0.5]
    mix.schedule({"b": values})
    scheduled = flux_image(flux, steps=3)
    mix.set_style_scales({"b": values[0]})

    def by_hand(pipe: Any, step: int, _: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        mix.set_style_scales({"b": values[min(step + 1, 2)]})
        return kwargs

    assert torch.equal(flux_image(flux, steps=3, callback_on_step_end=by_hand), scheduled)


def test_schedulers_that_do_not_count_are_followed_by_their_timesteps() -> None:
    pipe = unet_pipeline()
    assert not hasattr(pipe.scheduler, "step_index")
    states = {name: style(seed, UNET_MODULES, "unet") for seed, name in enumerate("ab")}
    seen: list[int] = []
    mix_styles(pipe, states).schedule({"a": lambda step, steps: float(seen.append(step) or 1.0)})
    unet_image(pipe, steps=3)
    assert seen == [0, 1, 2], "guidance runs both prompts in one pass here"


@pytest.mark.parametrize(
    ("curve", "message"),
    [("fast", "give a number"), ([], "give a number"), ([1.0, None], "give a number"), (float("nan"), "give a number")],
)
def test_schedules_that_are_no_curves_are_refused(curve: Any, message: str, flux: Any) -> None:
    mix = mix_styles(flux, two())
    with pytest.raises(ParameterError, match=message):
        mix.schedule({"a": curve})
    with pytest.raises(ParameterError, match="which is no style"):
        mix.schedule({"z": 1.0})
    mix.schedule({"a": lambda step, steps: float("nan")})
    with pytest.raises(ParameterError, match="gives nan at step 0"):
        flux_image(flux)


def test_a_schedule_that_is_refused_leaves_the_one_before(flux: Any) -> None:
    mix = mix_styles(flux, two())
    mix.schedule({"a": [0.0, 0.6]})
    scheduled = flux_image(flux)
    with pytest.raises(ParameterError, match="which is no style"):
        mix.schedule({"z": 1.0})
    assert torch.equal(flux_image(flux), scheduled)


def test_numbers_of_numpy_are_scales(flux: Any) -> None:
    given: Any = {"a": np.float32(0.5), "b": np.int64(2)}
    mix = mix_styles(flux, two(), scales=given)
    assert mix.scales == {"a": 0.5, "b": 2.0} and all(type(scale) is float for scale in mix.scales.values())


def test_numbers_beyond_all_floats_are_refused(flux: Any) -> None:
    mix = mix_styles(flux, two())
    with pytest.raises(ParameterError, match="must be a finite number"):
        mix.set_style_scales({"a": 10**400})
    with pytest.raises(ParameterError, match="give a number"):
        mix.schedule({"a": [10**400]})
    mix.schedule({"a": lambda step, steps: 10**400})
    with pytest.raises(ParameterError, match="at step 0; it must be a number"):
        flux_image(flux)


def test_scales_and_schedules_without_names_are_refused(flux: Any) -> None:
    with pytest.raises(ParameterError, match="scales are given by style"):
        mix_styles(flux, two(), scales=[1.0])  # pyright: ignore[reportArgumentType]
    mix = mix_styles(flux, two())
    with pytest.raises(ParameterError, match="scales are given by style"):
        mix.set_style_scales(0.5)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ParameterError, match="schedules are given by style"):
        mix.schedule([1.0, 0.3])  # pyright: ignore[reportArgumentType]
