"""Styles mixed in a pipeline: exact, live, saved as stock diffusers loads them, and gone without a trace."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tvbases_diffusers import mix_styles, set_style_scales, unload_styles
from tvbases_hf.algebra.delta import Delta, Dense, dense
from tvbases_hf.errors import CheckpointError, MismatchError, ParameterError, TvbasesError
from tvbases_hf.methods.registry import METHODS, Method
from tvbases_hf.styles.mixed_file import read_recipe
from zoo.lora_files import kohya, write
from zoo.peft_models import relative
from zoo.pipelines import (
    CONV,
    FLUX_MODULES,
    TEXT,
    UNET_MODULES,
    added,
    dense_mixed,
    flux_image,
    flux_pipeline,
    products,
    style,
    unet_image,
    unet_pipeline,
)

EXACT = 1e-5


@pytest.fixture(scope="module")
def flux() -> Any:
    return flux_pipeline()


@pytest.fixture(autouse=True)
def _clean(flux: Any) -> Iterator[None]:
    yield
    flux.unload_lora_weights()
    vars(flux).pop("_tvbases_styles", None)


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


# What is loaded


def test_the_adapter_is_the_dense_mix_and_changes_the_picture(flux: Any) -> None:
    plain = flux_image(flux)
    states = two()
    mix = mix_styles(flux, states, scales={"b": 1.2})
    assert_adds(flux, unique(states, {"b": 1.2}))
    assert flux.get_active_adapters() == ["styles"]
    assert float((flux_image(flux) - plain).norm()) > 0.1
    assert 0.1 < mix.report["shared"]["all"]["a"] < 0.9


def test_full_is_what_set_adapters_adds_up_and_unique_is_not(flux: Any) -> None:
    states = two()
    for name, state in states.items():
        flux.load_lora_weights(dict(state), adapter_name=name)
    flux.set_adapters(["a", "b"], [1.0, 0.5])
    vanilla = flux_image(flux)
    mix = mix_styles(flux, states, "full", scales={"b": 0.5})
    full = flux_image(flux)
    mix.unload()
    mix_styles(flux, states, scales={"b": 0.5})
    assert torch.allclose(full, vanilla, atol=1e-4)
    assert not torch.allclose(flux_image(flux), vanilla, atol=1e-2)


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


def test_adapters_that_are_loaded_are_styles_at_their_own_strength(flux: Any) -> None:
    states = two()
    for name, state in states.items():
        flux.load_lora_weights(dict(state), adapter_name=name)
    flux.set_adapters(["a"], [0.3])
    before, picture = state_of(flux), flux_image(flux)
    mix_styles(flux, {"first": "a", "second": states["b"]})
    assert_adds(flux, unique(states))
    unload_styles(flux)
    assert_same_state(flux, before)
    assert flux.get_active_adapters() == ["a"] and torch.equal(flux_image(flux), picture)


def test_rslora_and_alphas_of_loaded_adapters_count_once(flux: Any) -> None:
    from peft import LoraConfig

    config = LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=["to_q"], init_lora_weights=False)
    flux.transformer.add_adapter(config, adapter_name="a")
    own = added(flux, "a")
    mix_styles(flux, {"a": "a", "b": two()["b"]}, "full", scales={"b": 0.0})
    found = added(flux)
    for module, delta in own.items():
        assert relative(found[module], delta) <= EXACT


def test_half_precision_pipelines_hold_the_rounded_mix() -> None:
    pipe = flux_pipeline(torch.bfloat16)
    states = two()
    mix = mix_styles(pipe, states)
    found, expected = added(pipe), unique(states)
    assert all(relative(found[module], delta) <= 2**-7 for module, delta in expected.items())
    mix.set_style_scales({"a": 0.0})
    mix.set_style_scales({"a": 1.0})
    assert all(torch.equal(a, b) for a, b in zip(added(pipe).values(), found.values(), strict=True)), "no drift"


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


def test_a_unet_takes_styles_with_convolutions_and_its_text_encoder(tmp_path: Path) -> None:
    pipe = unet_pipeline()
    before, plain = state_of(pipe), unet_image(pipe)
    states = {}
    for seed, name in enumerate("ab"):
        conv = style(seed, {CONV: (32, 32 * 9)}, "unet")
        conv = {n: t.reshape(*t.shape[:1], -1, *((3, 3) if "lora_A" in n else (1, 1))) for n, t in conv.items()}
        states[name] = style(seed, UNET_MODULES, "unet") | conv | style(seed, TEXT, "text_encoder")
    mix = mix_styles(pipe, states)
    expected = unique(states)
    assert_adds(pipe, {m: d for m, d in expected.items() if m.startswith("unet.")}, "unet")
    text = added(pipe, component="text_encoder")
    assert relative(next(iter(text.values())), expected[f"text_encoder.{next(iter(TEXT))}"]) <= EXACT
    assert float((unet_image(pipe) - plain).norm()) > 0.1
    mix.save(tmp_path / "mix.safetensors")
    mix.unload()
    assert_same_state(pipe, before)
    assert torch.equal(unet_image(pipe), plain)
    pipe.load_lora_weights(tmp_path / "mix.safetensors", adapter_name="styles")
    assert_adds(pipe, {m: d for m, d in expected.items() if m.startswith("unet.")}, "unet")
    text = added(pipe, component="text_encoder")
    assert relative(next(iter(text.values())), expected[f"text_encoder.{next(iter(TEXT))}"]) <= EXACT


def test_flux2_takes_styles() -> None:
    from diffusers import Flux2Pipeline, Flux2Transformer2DModel

    sizes: Any = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
    transformer = Flux2Transformer2DModel(in_channels=16, joint_attention_dim=32, axes_dims_rope=(4, 4, 4, 4), **sizes)
    nothing: Any = None
    pipe = Flux2Pipeline(nothing, nothing, nothing, nothing, transformer)
    modules = {"transformer_blocks.0.attn.to_q": (32, 32)}
    states = {name: style(seed, modules) for seed, name in enumerate("ab")}
    before = {name: tensor.clone() for name, tensor in transformer.state_dict().items()}
    mix = mix_styles(pipe, states)
    assert_adds(pipe, unique(states))
    mix.unload()
    assert list(before) == list(transformer.state_dict())


def test_a_bare_transformer_takes_styles_in_any_names_and_gives_them_back(tmp_path: Path) -> None:
    transformer = flux_pipeline().transformer
    before = {name: tensor.clone() for name, tensor in transformer.state_dict().items()}
    states = two()
    files = []
    for name, state in states.items():
        spelled = {k.replace("transformer.", "diffusion_model.", 1): t for k, t in state.items()}
        files.append(write(tmp_path, spelled).rename(tmp_path / f"{name}.safetensors"))
    mix = mix_styles(transformer, files, scales={"b": 0.5})
    assert mix.names == ("a", "b")
    holder = SimpleNamespace(transformer=transformer)
    assert_adds(holder, unique(states, {"b": 0.5}))
    set_style_scales(transformer, {"b": 2.0})
    assert_adds(holder, unique(states, {"b": 2.0}))
    with pytest.raises(ParameterError, match="has none"):
        mix.schedule({"a": [1.0, 0.0]})
    mix.save(tmp_path / "mix.safetensors")
    mix.unload()
    assert list(before) == list(transformer.state_dict())
    assert all(torch.equal(transformer.state_dict()[name], tensor) for name, tensor in before.items())
    transformer.load_lora_adapter(tmp_path / "mix.safetensors", adapter_name="styles")
    assert_adds(holder, unique(states, {"b": 2.0}))


def test_adapters_of_a_bare_unet_are_styles_and_come_back() -> None:
    unet = unet_pipeline().unet
    states = {name: style(seed, UNET_MODULES, "unet") for seed, name in enumerate("ab")}
    unet.load_lora_adapter(dict(states["a"]), prefix="unet", adapter_name="loaded")
    mix = mix_styles(unet, {"a": "loaded", "b": states["b"]})
    assert_adds(SimpleNamespace(unet=unet), unique(states), "unet")
    mix.unload()
    assert unet.active_adapters() == ["loaded"]


# Live


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


def test_unload_restores_the_pipeline_bit_for_bit(flux: Any) -> None:
    before, plain = state_of(flux), flux_image(flux)
    modules = [type(module) for module in flux.transformer.modules()]
    mix = mix_styles(flux, two())
    mix.schedule({"a": [1.0, 0.0]})
    flux_image(flux)
    mix.unload()
    mix.unload()
    assert_same_state(flux, before)
    assert [type(module) for module in flux.transformer.modules()] == modules
    assert torch.equal(flux_image(flux), plain)
    with pytest.raises(ParameterError, match="was unloaded"):
        mix.set_style_scales({"a": 1.0})
    with pytest.raises(ParameterError, match="no styles are mixed"):
        set_style_scales(flux, {"a": 1.0})


def test_saved_mixes_load_in_stock_diffusers_with_their_recipe(flux: Any, tmp_path: Path) -> None:
    states = two() | {"c": style(5, {"context_embedder": (32, 32)})}
    mix = mix_styles(flux, states, scales={"a": 0.5})
    wanted, picture = added(flux), flux_image(flux)
    mix.save(tmp_path / "mix.safetensors")
    mix.unload()
    flux.load_lora_weights(str(tmp_path / "mix.safetensors"), adapter_name="styles")
    assert_adds(flux, wanted)
    assert torch.allclose(flux_image(flux), picture, atol=1e-4)
    recipe = read_recipe(tmp_path / "mix.safetensors")
    assert recipe is not None and recipe["styles"]["a"] == {"scale": 0.5, "source": "state dict"}


# Schedules


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


# The modular block


def test_the_modular_block_mixes_once_and_follows_its_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.modular_pipelines import SequentialPipelineBlocks
    from diffusers.modular_pipelines.flux.modular_blocks_flux import FluxCoreDenoiseStep

    from tvbases_diffusers import MixStylesStep

    blocks: Any = SequentialPipelineBlocks.from_blocks_dict(
        {"styles": MixStylesStep(), "denoise": FluxCoreDenoiseStep()}
    )
    pipe = blocks.init_pipeline()
    whole = flux_pipeline()
    pipe.update_components(transformer=whole.transformer, scheduler=whole.scheduler, text_encoder=whole.text_encoder)
    embeds = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(3))
    sizes: dict[str, Any] = {"height": 16, "width": 16, "num_inference_steps": 2, "output": "latents"}

    def image(**inputs: Any) -> Tensor:
        generator = torch.Generator().manual_seed(3)
        return pipe(prompt_embeds=embeds, pooled_prompt_embeds=embeds[:, 0], generator=generator, **sizes, **inputs)

    plain = image()
    states = two()
    assert not torch.allclose(image(styles=states, style_scales={"b": 0.5}), plain, atol=1e-2)
    assert_adds(pipe, unique(states, {"b": 0.5}))
    monkeypatch.setattr("tvbases_hf.styles.mixing.decompose", None)
    image(styles=states, style_scales={"a": 2.0, "b": [1.0, 0.0]})
    assert_adds(pipe, unique(states, {"a": 2.0, "b": 0.0}))
    monkeypatch.undo()
    image(styles=states, style_options={"component": "full"})
    assert_adds(pipe, {m: sum(products(s)[m] for s in states.values()) for m in products(states["a"])})  # type: ignore[misc]
    assert torch.equal(image(), plain) and added(pipe) == {}
    with pytest.raises(ParameterError, match="without styles"):
        image(style_scales={"a": 1.0})


# Bad input


def wrong_shape() -> dict[str, Tensor]:
    return style(0, {"transformer_blocks.0.attn.to_q": (48, 32)})


BAD: dict[str, tuple[Any, type[TvbasesError], str]] = {
    "one style": (lambda path: {"a": two()["a"]}, ParameterError, "1 style given"),
    "another architecture": (
        lambda path: {n: style(i, {"layers.0.mixer": (32, 32)}) for i, n in enumerate("ab")},
        MismatchError,
        "1 of 1 modules do not fit this FluxTransformer2DModel .first: layers.0.mixer is not in it",
    ),
    "other shapes": (lambda path: {"a": wrong_shape(), "b": wrong_shape()}, MismatchError, r"is \[32, 32\] in it and"),
    "a UNet's": (
        lambda path: {n: style(i, UNET_MODULES, "unet") for i, n in enumerate("ab")},
        MismatchError,
        "changes the unet, which FluxPipeline loads no LoRAs into",
    ),
    "two models": (lambda path: {"a": two()["a"], "b": style(0, UNET_MODULES, "unet")}, MismatchError, "different"),
    "two shapes": (lambda path: {"a": two()["a"], "b": wrong_shape()}, MismatchError, "cannot be mixed"),
    "a text file": (lambda path: {"a": two()["a"], "b": str(path / "notes.txt")}, CheckpointError, "notes.txt"),
    "no such file": (lambda path: {"a": two()["a"], "b": str(path / "b.safetensors")}, CheckpointError, "no such file"),
    "keys left over": (
        lambda path: {"a": two()["a"], "b": kohya({"lora_unet_double_blocks_0_of_tomorrow": (8, 8)})},
        CheckpointError,
        "cannot translate its names",
    ),
    "ranks that differ in a module": (
        lambda path: {"a": two()["a"], "b": two()["b"] | {_key("B"): torch.ones(32, 5)}},
        CheckpointError,
        "do not fit",
    ),
    "NaN": (lambda path: {"a": two()["a"], "b": two()["b"] | {_key("B"): torch.full((32, 4), torch.nan)}},
            CheckpointError, "NaN"),
    "DoRA": (lambda path: {"a": two()["a"], "b": two()["b"] | {_dora(): torch.ones(32)}}, CheckpointError, "are DoRA"),
    "DoRA of kohya": (
        lambda path: {"a": two()["a"], "b": two()["b"] | {"transformer.x.dora_scale": torch.ones(32)}},
        CheckpointError, "DoRA in kohya's form",
    ),
    "a second text encoder": (
        lambda path: {"a": two()["a"], "b": two()["b"] | style(0, TEXT, "text_encoder_2")},
        MismatchError,
        "changes the text_encoder_2",
    ),
    "zeros": (
        lambda path: {n: {k: 0 * t for k, t in s.items()} for n, s in two().items()}, ParameterError, "are zero",
    ),
    "an empty state dict": (lambda path: {"a": two()["a"], "b": {}}, CheckpointError, "empty state dict"),
}  # fmt: skip


def _key(part: str) -> str:
    return f"transformer.transformer_blocks.0.attn.to_q.lora_{part}.weight"


def _dora() -> str:
    return "transformer.transformer_blocks.0.attn.to_q.lora_magnitude_vector"


@pytest.mark.parametrize("name", sorted(BAD))
def test_bad_styles_are_one_message_and_the_pipeline_is_unchanged(name: str, flux: Any, tmp_path: Path) -> None:
    make, error, message = BAD[name]
    (tmp_path / "notes.txt").write_text("not a LoRA")
    before = state_of(flux)
    with pytest.raises(error, match=message):
        mix_styles(flux, make(tmp_path))
    assert_same_state(flux, before)
    assert not vars(flux).get("_tvbases_styles")


def test_one_style_twice_is_mixed_once_and_refused_without_a_shared_copy(flux: Any) -> None:
    same = {name: two()["a"] for name in "ab"}
    before = state_of(flux)
    with pytest.raises(ParameterError, match="is empty"):
        mix_styles(flux, same, shared_weight=0.0)
    assert_same_state(flux, before)
    mix_styles(flux, same)
    assert_adds(flux, products(same["a"]))


BAD_WORDS: dict[str, tuple[dict[str, Any], str]] = {
    "component": ({"component": "common"}, "unknown component 'common'"),
    "threshold": ({"threshold": 1.5}, "above 0 and at most 1"),
    "pool": ({"pool": "pairs"}, "leaves every style whole"),
    "unknown pool": ({"pool": "all"}, "pool of a decomposition must be joint or iterative or pairs"),
    "rank": ({"rank": "many"}, "is not a rank rule"),
    "shared weight": ({"shared_weight": float("nan")}, "finite"),
    "shared weight of full": ({"component": "full", "shared_weight": 1.0}, "goes with the unique component"),
    "a scale for nobody": ({"scales": {"aa": 1.0}}, "which is no style"),
    "a scale that is none": ({"scales": {"a": float("inf")}}, "finite number"),
    "a scale in words": ({"scales": {"a": "strong"}}, "finite number"),
    "an adapter called like a part of PEFT": ({"adapter_name": "training"}, "is no name for an adapter"),
    "an adapter with a dot": ({"adapter_name": "a.b"}, "is no name for an adapter"),
    "an adapter without a name": ({"adapter_name": ""}, "is no name for an adapter"),
}


@pytest.mark.parametrize("name", sorted(BAD_WORDS))
def test_bad_values_are_refused_before_anything_happens(name: str, flux: Any) -> None:
    words, message = BAD_WORDS[name]
    before = state_of(flux)
    with pytest.raises(ParameterError, match=message):
        mix_styles(flux, two(), **words)
    assert_same_state(flux, before)


def test_three_styles_have_no_principal_angles(flux: Any) -> None:
    with pytest.raises(ParameterError, match="defined for two styles"):
        mix_styles(flux, two() | {"c": style(3, FLUX_MODULES)}, subspace="angles")


def test_names_that_are_taken_or_ambiguous_are_refused(
    flux: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mix_styles(flux, two())
    with pytest.raises(ParameterError, match='adapter "styles" is loaded already'):
        mix_styles(flux, two())
    mix_styles(flux, two(), adapter_name="more").unload()
    assert flux.get_active_adapters() == ["styles"]
    monkeypatch.chdir(write(tmp_path, two()["a"]).parent)
    (tmp_path / "styles").mkdir()
    with pytest.raises(ParameterError, match="both a loaded adapter and a path"):
        mix_styles(flux, {"x": "styles", "y": two()["b"]}, adapter_name="more")


def test_loaded_adapters_that_are_no_lora_are_refused(flux: Any) -> None:
    from peft import LoKrConfig, inject_adapter_in_model

    inject_adapter_in_model(LoKrConfig(r=2, target_modules=["to_q"]), flux.transformer, adapter_name="kron")
    with pytest.raises(CheckpointError, match="a loaded LOKR adapter; only LoRA is mixed"):
        mix_styles(flux, {"a": "kron", "b": two()["b"]})


def test_things_without_a_lora_loader_are_refused() -> None:
    with pytest.raises(ParameterError, match="has no LoRA loader"):
        mix_styles(torch.nn.Linear(2, 2), two())


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


def test_a_mix_that_the_pipeline_unloaded_is_gone_with_its_schedule(flux: Any) -> None:
    plain = flux_image(flux)
    mix = mix_styles(flux, two())
    mix.schedule({"a": [0.0, 1.0]})
    flux.unload_lora_weights()
    assert torch.equal(flux_image(flux), plain)
    assert not mix.is_loaded
    with pytest.raises(ParameterError, match="was unloaded; call mix_styles again"):
        mix.set_style_scales({"a": 0.5})
    mix_styles(flux, two()).unload()
    mix.unload()
    assert torch.equal(flux_image(flux), plain)


def test_a_mix_that_is_fused_into_the_weights_takes_no_scales(flux: Any) -> None:
    """The picture would not change, and the weights would keep what unloading leaves in them."""
    plain = flux_image(flux)
    mix = mix_styles(flux, two())
    flux.fuse_lora()
    for change in (lambda: mix.set_style_scales({"a": 0.0}), lambda: mix.schedule({"a": [0.0]}), mix.unload):
        with pytest.raises(ParameterError, match="is fused into the weights; call unfuse_lora first"):
            change()
    flux.unfuse_lora()
    mix.schedule({"a": [0.0]})
    flux.fuse_lora()
    with pytest.raises(ParameterError, match="is fused into the weights"):
        flux_image(flux)
    flux.unfuse_lora()
    mix.unload()
    assert relative(flux_image(flux), plain) <= EXACT


def test_scales_and_schedules_without_names_are_refused(flux: Any) -> None:
    with pytest.raises(ParameterError, match="scales are given by style"):
        mix_styles(flux, two(), scales=[1.0])  # pyright: ignore[reportArgumentType]
    mix = mix_styles(flux, two())
    with pytest.raises(ParameterError, match="scales are given by style"):
        mix.set_style_scales(0.5)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ParameterError, match="schedules are given by style"):
        mix.schedule([1.0, 0.3])  # pyright: ignore[reportArgumentType]


def test_scales_at_which_no_method_can_decompose_change_nothing(flux: Any) -> None:
    mix = mix_styles(flux, two(), method="iso_c")
    before = state_of(flux)
    with pytest.raises(ParameterError, match=r"no decomposition by iso_c at scales a 1e\+300, b 1; take smaller"):
        mix.set_style_scales({"a": 1e300})
    assert_same_state(flux, before)


@pytest.mark.parametrize("first", ["styles", "more"])
def test_mixes_are_unloaded_in_any_order(flux: Any, first: str) -> None:
    flux.load_lora_weights(style(5, FLUX_MODULES), adapter_name="own")
    flux.set_adapters("own", 0.7)
    before = flux_image(flux)
    mixes = {"styles": mix_styles(flux, two()), "more": mix_styles(flux, two(size=0.2), adapter_name="more")}
    second = flux_image(flux)
    mixes.pop(first).unload()
    if first == "styles":
        assert torch.equal(flux_image(flux), second)
    mixes.popitem()[1].unload()
    assert flux.get_active_adapters() == ["own"]
    assert torch.equal(flux_image(flux), before)


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


def test_a_loader_that_fails_leaves_nothing_behind(flux: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = state_of(flux)
    monkeypatch.setattr("tvbases_diffusers.mixing.StyleMix._check_loaded", lambda self, state: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        mix_styles(flux, two())
    assert_same_state(flux, before)
