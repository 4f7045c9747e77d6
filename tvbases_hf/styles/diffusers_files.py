"""LoRA files of image models (diffusers, kohya, xlabs, BFL names) as low-rank changes by component and module.

Whose LoRA a file is, its names tell: every module must be one that a model family has.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ..algebra.delta import Delta
from ..errors import CheckpointError, MissingExtraError
from ..models.lora_config import LoraOptions
from ..storage.checkpoint import Checkpoint
from .families import Family, find_family, installed
from .lora_layers import LoraLayers, read_checked
from .lora_names import ALPHA_SUFFIX, Parts, find_alphas, find_parts
from .lora_source import PREFIXES, Source, open_source
from .translation import translate

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


def read_lora_file(path: str | Path, *, bases: Mapping[str, Checkpoint] | None = None) -> dict[str, dict[str, Delta]]:
    """The changes of a LoRA file: by component (transformer, unet, text_encoder, ...) and module; see open_lora."""
    return {component: dict(layers) for component, layers in open_lora(path, bases=bases).items()}


def open_lora(
    source: Source,
    *,
    label: str | None = None,
    bases: Mapping[str, Checkpoint] | None = None,
    model: Family | None = None,
) -> dict[str, LoraLayers]:
    """The layers of a LoRA by component; files in diffusers' own format are read one layer at a time.

    Args:
        source: a .safetensors file, one of PyTorch (read without running code), a directory or Hub id with one file or
            a PEFT adapter in it, or a state dict in any of the formats.
        label: what messages call it; by default the source.
        bases: checkpoints of components, needed for DoRA (magnitudes) only, whose changes are Dora.
        model: the model at hand that the LoRA is for. Its names come first, and names that are of no family are then
            left as they are, if they are in diffusers' format, for the caller to check.

    Raises:
        MissingExtraError: diffusers is not installed.
        CheckpointError: damaged, not a LoRA file, of another method, with tensors that no reading accounts for, or
            with modules that no family has.
        MismatchError: DoRA without the base of its component, when that layer is read.
    """
    _require_diffusers()
    label = label or ("state dict" if isinstance(source, Mapping) else str(source))
    stored, options = open_source(source, label)
    for name, info in stored.tensors.items():
        _refuse_unsupported(name, label)
        if not (info.dtype.is_floating_point or name.endswith(ALPHA_SUFFIX)):
            kind = str(info.dtype).removeprefix("torch.")
            raise CheckpointError(
                f'"{label}": {name} holds {kind}, which is no factor without its scale; save it as floats'
            )
    families = (*((model,) if model is not None else ()), *installed())
    parts = _own_parts(stored, label)
    layers = {} if parts is None else _layers(stored, parts, options, bases, label)
    if parts is None or find_family(parts, families) is None:
        try:
            # The ranks and alphas of a configuration go by the file's own names.
            scaled = bool(options) and parts is not None
            state = _scaled(layers) if scaled else {name: read_checked(stored, name) for name in stored.tensors}
            translated = translate(state, families, label)
        except CheckpointError:
            if model is None or parts is None:
                raise
        else:
            stored = Checkpoint.from_state_dict(translated.tensors, label)
            layers = _layers(stored, translated.parts, {} if scaled else options, bases, label)
    return layers


def _own_parts(stored: Checkpoint, label: str) -> Parts | None:
    """The parts of a file in diffusers' own format; None for another format."""
    names = [name for name in stored.tensors if not name.endswith(ALPHA_SUFFIX)]
    if not names or not all(name.startswith(PREFIXES) for name in names):
        return None
    return find_parts(
        names, find_alphas({n: stored.read(n) for n in stored.tensors.keys() - names}, names, label), label
    )


def _layers(
    stored: Checkpoint,
    parts: Parts,
    options: Mapping[str, LoraOptions],
    bases: Mapping[str, Checkpoint] | None,
    label: str,
) -> dict[str, LoraLayers]:
    return {
        component: LoraLayers(
            f'"{label}": {component}', stored, own, options.get(component), (bases or {}).get(component)
        )
        for component, own in parts.items()
    }


def _scaled(layers: Mapping[str, LoraLayers]) -> dict[str, Tensor]:
    return {
        f"{component}.{module}.{part}": tensor
        for component, own in layers.items()
        for module in own.modules
        for part, tensor in own.tensors(module).items()
    }


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
