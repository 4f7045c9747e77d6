"""Merging methods of styles in a pipeline: what the method makes of the dense changes, at all scales."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tvbases_diffusers import mix_styles
from tvbases_hf.algebra.delta import Delta, Dense, dense
from tvbases_hf.errors import ParameterError
from tvbases_hf.methods.registry import METHODS, Method
from zoo.peft_models import relative
from zoo.pipelines import (
    FLUX_MODULES,
    added,
    flux_image,
    products,
)
from zoo.style_mixes import EXACT, assert_adds, assert_same_state, state_of, two


@pytest.mark.parametrize("method", sorted(METHODS))
def test_the_scales_of_a_merging_method_stay_live_and_its_mix_goes_without_a_trace(flux: Any, method: str) -> None:
    """The merge is that of the dense matrices at all scales; most are not linear in them."""
    states, before, picture = two(), state_of(flux), flux_image(flux)
    mix = mix_styles(flux, states, method=method)

    def merged(scales: Mapping[str, float]) -> dict[str, Tensor]:
        return _merged(states, method, scales)

    assert_adds(flux, merged({"a": 1.0, "b": 1.0}))
    mix.set_style_scales({"a": 0.5, "b": -1.0})
    assert_adds(flux, merged({"a": 0.5, "b": -1.0}))
    mix.set_style_scales({"a": 0.0})
    assert_adds(flux, merged({"a": 0.0, "b": -1.0}))
    mix.unload()
    assert_same_state(flux, before)
    assert torch.equal(flux_image(flux), picture)


def test_the_scales_of_a_linear_method_change_without_another_merge(flux: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    states = two()
    mix = mix_styles(flux, states, method="tsv", scales={"a": 0.7})
    monkeypatch.setattr("tvbases_hf.styles.method.StyleMethod.mixed", None)
    for scales in ({"a": 0.5, "b": -1.0}, {"a": 1.3, "b": 0.2}):
        mix.set_style_scales(scales)
        assert_adds(flux, _merged(states, "tsv", scales))
    monkeypatch.undo()
    mix.set_style_scales({"a": 0.0})  # the other's directions are then its own again
    assert_adds(flux, _merged(states, "tsv", {"a": 0.0, "b": 0.2}))
    mix.set_style_scales({"a": 1.0})
    assert_adds(flux, _merged(states, "tsv", {"a": 1.0, "b": 0.2}))


@pytest.mark.parametrize(
    ("method", "options"), [("iso_c", {}), ("iso_cts", {}), ("task_arithmetic", {"calibrate": "svc"})]
)
def test_a_method_that_turns_with_its_matrices_is_merged_in_the_joint_spaces(
    flux: Any, method: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other scales take the small matrices alone, and change one factor of every weight: that of its shorter side."""
    states = two()
    mix = mix_styles(flux, states, method=method, method_options=options)
    before = {name: tensor.clone() for name, tensor in state_of(flux).items() if "lora_" in name}
    for scales in ({"a": 0.5, "b": -1.0}, {"a": 0.0, "b": 0.7}, {"a": 0.0, "b": 0.0}, {"a": 1.3, "b": 0.2}):
        with monkeypatch.context() as during:
            during.setattr("tvbases_diffusers.live.Core", None)
            sizes = _sizes_of_merges(during)
            mix.set_style_scales(scales)
        assert all(size <= 2 * 4 for size in sizes), "of two styles of rank 4"
        if any(scales.values()):
            assert len(sizes) == 2 * len(FLUX_MODULES)
            assert_adds(flux, _merged(states, method, scales, options))
        else:
            assert not any(matrix.any() for matrix in added(flux).values())
    after = {name: tensor for name, tensor in state_of(flux).items() if "lora_" in name}
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert len(changed) == len(after) / 2


@pytest.mark.parametrize("method", ["tsv", "iso_c", "ties"])
def test_biases_are_merged_by_the_method_at_all_scales(flux: Any, method: str) -> None:
    """Those of all styles, and of one alone."""
    states, module = two(), "transformer.transformer_blocks.0.attn.to_q"
    for number, state in enumerate(states.values()):
        state[f"{module}.lora_B.bias"] = torch.randn(32, generator=torch.Generator().manual_seed(number))
    mix = mix_styles(flux, states, method=method)
    chosen, adapter = METHODS[method], flux.transformer.transformer_blocks[0].attn.to_q.lora_B["styles"]
    for scales in ({"a": 1.0, "b": 1.0}, {"a": 0.5, "b": -1.0}, {"a": 0.0}, {"a": 0.7}):
        mix.set_style_scales(scales)
        live = [name for name in states if mix.scales[name]]
        biases: list[Delta] = [Dense(states[name][f"{module}.lora_B.bias"]) for name in live]
        options = chosen.defaults | ({"limits": _limits(states, live, method)} if chosen.trims else {})
        wanted = chosen.change("bias", (32,), biases, [mix.scales[name] for name in live], options)
        assert relative(adapter.bias.detach().double(), dense(wanted)) <= EXACT


def _sizes_of_merges(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    found, change = [], Method.change

    def counted(self: Method, name: str, shape: Any, *args: Any, **how: Any) -> Any:
        found.extend(shape)
        return change(self, name, shape, *args, **how)

    monkeypatch.setattr(Method, "change", counted)
    return found


def _merged(
    states: Mapping[str, Mapping[str, Tensor]],
    method: str,
    scales: Mapping[str, float],
    options: Mapping[str, Any] | None = None,
) -> dict[str, Tensor]:
    """What the method makes of full matrices; TIES with the thresholds of the whole model."""
    chosen, live = METHODS[method], [name for name in states if scales[name]]
    dtype = torch.float32 if method == "iso_cts" else torch.float64  # whose rounding noise is no direction
    changes = {name: products(states[name]) for name in live}
    options = chosen.checked(options or {})
    if chosen.of_whole_model(options) is not None:
        options["limits"] = _limits(states, live, method)
    weights = [scales[name] for name in live]
    return {
        module: dense(
            chosen.change(module, m.shape, [Dense(changes[n][module].to(dtype)) for n in live], weights, options)
        )
        for module, m in changes[live[0]].items()
    }


def _limits(states: Mapping[str, Mapping[str, Tensor]], live: list[str], method: str) -> list[float]:
    """The whole model's thresholds, by sorting all entries."""
    density = METHODS[method].of_whole_model(METHODS[method].defaults)
    assert density is not None
    found = []
    for name in live:
        entries = torch.cat([matrix.flatten() for matrix in products(states[name]).values()]).abs().sort().values
        found.append(float(entries[len(entries) - int(density * len(entries))]))
    return found


def test_scales_at_which_no_method_can_decompose_change_nothing(flux: Any) -> None:
    mix = mix_styles(flux, two(), method="iso_c")
    before = state_of(flux)
    with pytest.raises(ParameterError, match=r"no decomposition by iso_c at scales a 1e\+300, b 1; take smaller"):
        mix.set_style_scales({"a": 1e300})
    assert_same_state(flux, before)


@pytest.mark.parametrize("method", ["iso_c", "iso_cts"])
def test_directions_that_are_equally_strong_are_calibrated_alike_in_pipeline_and_file(
    flux: Any, method: str, tmp_path: Path
) -> None:
    """Which directions stand for a flat spectrum is a matter of the form, so that one form is for both."""
    mix = mix_styles(flux, two(), method=method, method_options={"calibrate": "svc"})
    mix.set_style_scales({"a": 0.7})
    found = added(flux)
    mix.save(tmp_path / "mix.safetensors")
    for module, delta in products(load_file(tmp_path / "mix.safetensors")).items():
        assert relative(found[module], delta) <= EXACT
