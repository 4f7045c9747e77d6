"""LoRA files of image models (diffusers, kohya, xlabs, BFL names) as low-rank changes by component and module.

The names are translated by diffusers' own converters. These drop some tensors with no more than a line in the log, and
some alphas: what comes out is therefore weighed against what went in, and a file that lost anything is refused.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..algebra.delta import Delta, LowRank, square_norm
from ..errors import CheckpointError, MissingExtraError
from ..storage.checkpoint import Checkpoint
from .lora_layers import LoraLayers, read_checked
from .lora_source import COMPONENTS, Source, open_source

PREFIXES = tuple(f"{component}." for component in COMPONENTS)
# One of two factors, in any of the formats.
FACTOR = re.compile(
    r"^(?P<module>.+?)(?P<join>[._])(?P<part>lora_down|lora_up|lora_A|lora_B|lora\.down|lora\.up|down|up)\.weight$"
)
FIRST = ("lora_down", "lora_A", "lora.down", "down")
# PEFT's names, into which everything is translated.
PART = re.compile(
    r"^(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_magnitude_vector)(?:\.weight)?$"
)
FLUX = re.compile(
    r"double_blocks|single_blocks|lora_transformer_|lora_unet_(img|txt|time|vector|guidance)_in|final_layer"
)
STABLE_DIFFUSION = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_")
UNSUPPORTED = {
    "dora_scale": "DoRA in kohya's form, which diffusers leaves out",
    "lokr_": "LoKr",
    "hada_": "LoHa",
    ".oft_": "OFT",
    "lora_mid": "LoCon with a third factor",
    "bundle_emb": "embeddings of new tokens",
    "lora_controlnet": "a control LoRA",
    "query_norm.scale": "a control LoRA, which also replaces norms",
}
# Both sides are the same float32 numbers, multiplied by alpha / rank; what is lost must show.
CONSERVED = 1e-6

Tensors = dict[str, Tensor]
Alphas = dict[str, float]


def read_lora_file(path: str | Path, *, bases: Mapping[str, Checkpoint] | None = None) -> dict[str, dict[str, Delta]]:
    """The changes of a LoRA file: by component (transformer, unet, text_encoder, ...) and module; see open_lora."""
    return {component: dict(layers) for component, layers in open_lora(path, bases=bases).items()}


def open_lora(
    source: Source, *, label: str | None = None, bases: Mapping[str, Checkpoint] | None = None
) -> dict[str, LoraLayers]:
    """The layers of a LoRA by component; files in diffusers' own format are read one layer at a time.

    Args:
        source: a .safetensors file, one of PyTorch (read without running code), a directory or Hub id with one file or
            a PEFT adapter in it, or a state dict in any of the formats.
        label: what messages call it; by default the source.
        bases: checkpoints of components, needed for DoRA (magnitudes) only, whose changes are Dora.

    Raises:
        MissingExtraError: diffusers is not installed.
        CheckpointError: damaged, not a LoRA file, of another method, or with tensors that no reading accounts for.
        MismatchError: DoRA without the base of its component, when that layer is read.
    """
    _require_diffusers()
    label = label or ("state dict" if isinstance(source, Mapping) else str(source))
    stored, options = open_source(source, label)
    for name in stored.tensors:
        _refuse_unsupported(name, label)
    names = [name for name in stored.tensors if not name.endswith(".alpha")]
    if names and all(name.startswith(PREFIXES) for name in names):
        alphas = _alphas({name: stored.read(name) for name in stored.tensors.keys() - names}, names, label)
    else:
        stored, alphas = _translated_file(stored)
    found: dict[str, LoraLayers] = {}
    for component in dict.fromkeys(name.partition(".")[0] for name in stored.tensors if name.startswith(PREFIXES)):
        own = [n for n in stored.tensors if n.startswith(f"{component}.") and not n.endswith(".alpha")]
        parts = _grouped(_peft_names(component, own, label), alphas, label)
        place = f'"{label}": {component}'
        found[component] = LoraLayers(place, stored, parts, options.get(component), (bases or {}).get(component))
    return found


def _require_diffusers() -> None:
    try:
        import diffusers  # noqa: F401
        import peft  # noqa: F401  (diffusers' LoRA loaders need it)
    except ImportError as error:
        raise MissingExtraError(
            f'diffusers and PEFT are needed ({error}); pip install "tvbases-hf[diffusers,peft]"'
        ) from error


def _refuse_unsupported(name: str, label: str) -> None:
    for word, method in UNSUPPORTED.items():
        if word in name:
            raise CheckpointError(f'"{label}": {name} is of {method}; not supported, and never left out')


def _split(state: Mapping[str, Tensor], label: str) -> tuple[Tensors, Alphas]:
    """Tensors, and alphas by the name of the first factor that they scale."""
    tensors = {name: tensor for name, tensor in state.items() if not name.endswith(".alpha")}
    return tensors, _alphas({name: state[name] for name in state.keys() - tensors.keys()}, tensors, label)


def _alphas(found: Mapping[str, Tensor], names: Container[str], label: str) -> Alphas:
    alphas: Alphas = {}
    for name, value in found.items():
        module = name.removesuffix(".alpha")
        tails = ("", *(f".{part}.weight" for part in (*FIRST, "lora_linear_layer.down")))
        first = next((module + tail for tail in tails if module + tail in names), None)
        if first is None or value.numel() != 1 or not torch.isfinite(value).all():
            raise CheckpointError(f'"{label}": {name} scales no factors; the file is incomplete')
        alphas[first] = float(value)
    return alphas


def _translated_file(stored: Checkpoint) -> tuple[Checkpoint, Alphas]:
    """A file of another format under diffusers' names; nothing may get lost on the way."""
    state = {name: read_checked(stored, name) for name in stored.tensors}
    before = _weight(*_split(state, stored.label), stored.label)
    tensors, alphas = _translated(state, stored.label)
    _check_conserved(before, _weight(tensors, alphas, stored.label), stored.label)
    return Checkpoint.from_state_dict(tensors, stored.label), alphas


def _translated(state: Mapping[str, Tensor], label: str) -> tuple[Tensors, Alphas]:
    """diffusers' names, and the alphas that are not in the factors yet."""
    from diffusers.loaders import FluxLoraLoaderMixin, StableDiffusionXLLoraLoaderMixin

    flux: Any = FluxLoraLoaderMixin
    stable: Any = StableDiffusionXLLoraLoaderMixin
    try:
        if any(FLUX.search(name) for name in state):
            found, alphas = flux.lora_state_dict(dict(state), return_alphas=True)
        elif all(name.startswith(STABLE_DIFFUSION) for name in state):
            blocks = SimpleNamespace(layers_per_block=2)  # of every published SD 1, SD 2 and SDXL
            found, alphas = stable.lora_state_dict(dict(state), unet_config=blocks)
        else:
            raise ValueError(f"{next(iter(state))} belongs to no format that is known here")
    except (ValueError, KeyError, AssertionError, NotImplementedError, AttributeError, IndexError) as error:
        raise CheckpointError(
            f'"{label}": diffusers cannot translate its names: {" ".join(str(error).split())[:300]}'
        ) from error
    everything = {**found, **{name: torch.as_tensor(alpha) for name, alpha in (alphas or {}).items()}}
    # The Flux converter leaves the component out of the names of the embedders and of the last layers.
    return _split({n if n.startswith(PREFIXES) else f"transformer.{n}": t for n, t in everything.items()}, label)


def _weight(tensors: Tensors, alphas: Alphas, label: str) -> float:
    """The squared norm of all changes in a file, as its format defines them: alpha / rank times up times down."""
    pairs: dict[str, dict[bool, str]] = {}
    for name, tensor in tensors.items():
        match = FACTOR.match(name)
        if match:
            pairs.setdefault(match["module"], {})[match["part"] in FIRST] = name
        elif tensor.any():
            raise CheckpointError(f'"{label}": {name} is no factor of a LoRA and would be left out; not supported')
    if not pairs:
        raise CheckpointError(
            f'"{label}": no LoRA file: it has no factors (first tensor: {next(iter(tensors), "none")})'
        )
    total = 0.0
    for module, pair in pairs.items():
        if len(pair) < 2:
            raise CheckpointError(f'"{label}": {module} has one of two factors; the file is incomplete')
        down, up = tensors[pair[True]], tensors[pair[False]]
        scale = alphas.get(pair[True], float(len(down))) / max(1, len(down))
        total += scale**2 * square_norm(LowRank(up.reshape(len(up), -1), down.reshape(len(down), -1)))
    return total


def _check_conserved(before: float, after: float, label: str) -> None:
    """Splitting rows and renaming keep the squared norm: anything dropped, or scaled twice or not at all, shows."""
    if abs(after - before) > CONSERVED * before:
        raise CheckpointError(
            f'"{label}": diffusers makes {before:.6g}, the squared norm of its changes, {after:.6g} (an alpha or a '
            "module of a kind that its converter leaves out); convert the file with the program that made it"
        )


def _peft_names(component: str, names: list[str], label: str) -> dict[str, str]:
    """PEFT's names, without the component, of a component's tensors."""
    from diffusers.utils import state_dict_utils

    short: dict[Any, Any] = {name.removeprefix(f"{component}."): name for name in names}
    plain = {n.replace(".lora_down.", ".lora_A.").replace(".lora_up.", ".lora_B."): own for n, own in short.items()}
    if all(PART.match(name) for name in plain):
        return {own: name for name, own in plain.items()}
    try:
        if component.startswith("text_encoder"):
            short = state_dict_utils.convert_state_dict_to_peft(state_dict_utils.convert_state_dict_to_diffusers(short))
        else:
            short = state_dict_utils.convert_unet_state_dict_to_peft(short)
    except ValueError as error:
        raise CheckpointError(f'"{label}": diffusers cannot translate the names of {component}: {error}') from error
    if len(short) < len(names):
        raise CheckpointError(f'"{label}": two tensors of {component} have one name in diffusers')
    return {own: name for name, own in short.items()}


def _grouped(names: Mapping[str, str], alphas: Alphas, label: str) -> dict[str, dict[str, str | float]]:
    """The stored names of each module's parts, and its alpha where the file gives one."""
    parts: dict[str, dict[str, str | float]] = {}
    for own, name in names.items():
        match = PART.match(name)
        if match is None:
            raise CheckpointError(f'"{label}": {own} is no part of a LoRA that is known here; not supported')
        parts.setdefault(match["module"], {})[match["part"]] = own
        if own in alphas:
            parts[match["module"]]["alpha"] = alphas[own]
    given = _count(parts.values(), "alpha")
    if 0 < given < len(parts):
        raise CheckpointError(
            f'"{label}": {given} of {len(parts)} modules have an alpha; what scales the others is not defined'
        )
    return parts


def _count(groups: Iterable[Mapping[str, Any]], part: str) -> int:
    return sum(part in group for group in groups)
