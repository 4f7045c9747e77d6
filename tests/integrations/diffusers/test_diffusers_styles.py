"""Styles mixed in a pipeline: exact, saved as stock diffusers loads them, and gone without a trace."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tvbases_diffusers import mix_styles, set_style_scales, unload_styles
from tvbases_hf.errors import ParameterError
from tvbases_hf.styles.mixed_file import read_recipe
from zoo.lora_files import write
from zoo.peft_models import relative
from zoo.pipelines import (
    CONV,
    FLUX_MODULES,
    TEXT,
    UNET_MODULES,
    added,
    flux_image,
    flux_pipeline,
    products,
    style,
    unet_image,
    unet_pipeline,
)
from zoo.style_mixes import EXACT, assert_adds, assert_same_state, state_of, two, unique


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


def test_a_loader_that_fails_leaves_nothing_behind(flux: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = state_of(flux)
    monkeypatch.setattr("tvbases_diffusers.mixing.StyleMix._check_loaded", lambda self, state: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        mix_styles(flux, two())
    assert_same_state(flux, before)
