"""Style mixing as a block of a modular pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from diffusers.modular_pipelines import ComponentSpec, InputParam, ModularPipelineBlocks, PipelineState
from transformers import CLIPTextModel

from tvbases_hf.errors import ParameterError

from .mixing import ADAPTER, HANDLES, mix_styles

INPUTS = {
    "styles": "By name, a LoRA file in any of diffusers' formats, a state dict or a loaded adapter; empty: none",
    "style_scales": "By style, a number, or a schedule: a list over the steps or a callable of step and steps",
    "style_options": "Further arguments of mix_styles: component, threshold, pool, rank, ...",
}


class MixStylesStep(ModularPipelineBlocks):
    """Put it before the denoising blocks. Styles are decomposed when they change; scales and schedules are live."""

    model_name = "flux"

    @property
    def description(self) -> str:
        return "Mixes style LoRAs by what is unique to each of them"

    @property
    def expected_components(self) -> list[ComponentSpec]:
        """Flux's LoRA loader wants both to be there; the text encoder may be None."""
        return [ComponentSpec("transformer", FluxTransformer2DModel), ComponentSpec("text_encoder", CLIPTextModel)]

    @property
    def inputs(self) -> list[InputParam]:
        return [InputParam(name, default=None, description=text) for name, text in INPUTS.items()]

    @torch.no_grad()
    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        given: Any = self.get_block_state(state)
        styles, scales = dict(given.styles or {}), dict(given.style_scales or {})
        options = dict(given.style_options or {})
        if not styles and (scales or options):
            raise ParameterError("style_scales or style_options without styles; give styles={name: file}")
        numbers = {name: value for name, value in scales.items() if isinstance(value, (int, float))}
        curves = {name: value for name, value in scales.items() if name not in numbers}
        mix = vars(components).get(HANDLES, {}).get(options.get("adapter_name", ADAPTER))
        if mix is not None and not _is_same(vars(mix).get("block_inputs"), styles, options):
            mix.unload()
            mix = None
        if styles:
            if mix is None:
                mix = mix_styles(components, styles, **options)
                vars(mix)["block_inputs"] = styles, options
            mix.set_style_scales({name: numbers.get(name, 1.0) for name in mix.names})
            mix.schedule(curves or None)
        self.set_block_state(state, given)
        return components, state


def _is_same(before: Any, styles: dict[str, Any], options: dict[str, Any]) -> bool:
    """Whether the block was given the same styles the last time; state dicts are the same if they are one object."""
    if before is None or before[1] != options or list(before[0]) != list(styles):
        return False
    pairs = ((before[0][name], source) for name, source in styles.items())
    return all(a is b or (isinstance(a, (str, Path)) and isinstance(b, (str, Path)) and a == b) for a, b in pairs)
