"""LoRA files of image models (diffusers, kohya, xlabs, BFL names) as low-rank changes by component and module.

The names are translated by diffusers' own converters. These drop some tensors with no more than a line in the log, and
some alphas: what comes out is therefore weighed against what went in, and a file that lost anything is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from .adapter import dora_change
from .adapter_config import LoraOptions
from .checkpoint import Checkpoint
from .delta import Delta, Dense, LowRank, square_norm
from .errors import CheckpointError, MismatchError, MissingExtraError

COMPONENTS = ("transformer", "unet", "text_encoder", "text_encoder_2", "text_encoder_3", "prior")
PREFIXES = tuple(f"{component}." for component in COMPONENTS)
METADATA = "lora_adapter_metadata"
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
    """The changes of a LoRA file: by component (transformer, unet, text_encoder, ...) and module.

    A module's entry is the LowRank change of its weight, alpha / rank inside and counted once, convolutions flattened
    to [out, in * kernel]; ``<module>.bias`` is the Dense change of its bias. Factors are read into float32.

    Args:
        path: a .safetensors file, or one of PyTorch, which is read without running code.
        bases: checkpoints of components, needed for DoRA (magnitudes) only, whose changes are Dora.

    Raises:
        MissingExtraError: diffusers is not installed.
        CheckpointError: damaged, not a LoRA file, of another method, or with tensors that no reading accounts for.
        MismatchError: DoRA without the base of its component.
    """
    _require_diffusers()
    label, file = str(path), Path(path).expanduser()
    if not file.is_file():
        raise CheckpointError(f'"{label}": no such file')
    stored = Checkpoint.open(file, label=label)
    state = {name: _checked(stored, name) for name in stored.tensors}
    options = _options(file, label)
    tensors, alphas = _split(state, label)
    if not all(name.startswith(PREFIXES) for name in tensors):
        before = _weight(tensors, alphas, label)
        tensors, alphas = _translated(state, label)
        _check_conserved(before, _weight(tensors, alphas, label), label)
    found: dict[str, dict[str, Delta]] = {}
    for component in dict.fromkeys(name.partition(".")[0] for name in tensors):
        names = _peft_names(component, [name for name in tensors if name.startswith(f"{component}.")], label)
        parts = _grouped(names, tensors, alphas, label)
        reading = _Reading(f'"{label}": {component}', options.get(component), (bases or {}).get(component))
        found[component] = {}
        for module, own in parts.items():
            found[component] |= reading.changes(module, own)
    return found


def _require_diffusers() -> None:
    try:
        import diffusers  # noqa: F401
        import peft  # noqa: F401  (diffusers' LoRA loaders need it)
    except ImportError as error:
        raise MissingExtraError(
            f'diffusers and PEFT are needed ({error}); pip install "tvbases-hf[diffusers,peft]"'
        ) from error


def _checked(stored: Checkpoint, name: str) -> Tensor:
    """A tensor in float32; NaN, and tensors that belong to another method, are refused by name."""
    for word, method in UNSUPPORTED.items():
        if word in name:
            raise CheckpointError(f'"{stored.label}": {name} is of {method}; not supported, and never left out')
    tensor = stored.read(name)
    if not torch.isfinite(tensor).all():
        raise CheckpointError(f'"{stored.label}": {name} holds NaN or infinite numbers; use an earlier checkpoint')
    return tensor.to(torch.float32)


def _options(file: Path, label: str) -> dict[str, LoraOptions]:
    """What diffusers writes into the file's header: PEFT's configuration of each component."""
    if file.suffix != ".safetensors":
        return {}
    with safe_open(str(file), framework="pt") as handle:
        text = (handle.metadata() or {}).get(METADATA)
    if not text:
        return {}
    try:
        words = json.loads(text)
        parts = {c: {k.removeprefix(f"{c}."): v for k, v in words.items() if k.startswith(f"{c}.")} for c in COMPONENTS}
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f'"{label}": its {METADATA} is damaged: {error}') from error
    return {c: LoraOptions.parse({"peft_type": "LORA"} | own, f"{label}: {c}") for c, own in parts.items() if own}


def _split(state: Mapping[str, Tensor], label: str) -> tuple[Tensors, Alphas]:
    """Tensors, and alphas by the name of the first factor that they scale."""
    tensors = {name: tensor for name, tensor in state.items() if not name.endswith(".alpha")}
    alphas: Alphas = {}
    for name in state.keys() - tensors.keys():
        module = name.removesuffix(".alpha")
        tails = ("", *(f".{part}.weight" for part in (*FIRST, "lora_linear_layer.down")))
        first = next((module + tail for tail in tails if module + tail in tensors), None)
        if first is None or state[name].numel() != 1:
            raise CheckpointError(f'"{label}": {name} scales no factors; the file is incomplete')
        alphas[first] = float(state[name])
    return tensors, alphas


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
        raise CheckpointError(f'"{label}": diffusers cannot translate its names: {str(error).strip()[:300]}') from error
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


def _grouped(
    names: Mapping[str, str], tensors: Tensors, alphas: Alphas, label: str
) -> dict[str, dict[str, Tensor | float]]:
    """The parts of each module, its alpha among them where the file gives one."""
    parts: dict[str, dict[str, Tensor | float]] = {}
    for own, name in names.items():
        match = PART.match(name)
        if match is None:
            raise CheckpointError(f'"{label}": {own} is no part of a LoRA that is known here; not supported')
        parts.setdefault(match["module"], {})[match["part"]] = tensors[own]
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


class _Reading:
    """One component's rules: its options, if the file says them, and its base, if there is one."""

    def __init__(self, label: str, options: LoraOptions | None, base: Checkpoint | None) -> None:
        self.label, self.options, self.base = label, options, base

    def changes(self, module: str, parts: Mapping[str, Any]) -> dict[str, Delta]:
        """The change of a module's weight, and of its bias."""
        missing = [part for part in ("lora_A.weight", "lora_B.weight") if part not in parts]
        if missing:
            raise CheckpointError(f"{self.label}: {module} has no {missing[0]}; the file is incomplete")
        a, b = parts["lora_A.weight"], parts["lora_B.weight"]
        if a.dim() < 2 or b.dim() < 2 or len(a) == 0 or b.shape[1:].numel() != len(a):
            raise CheckpointError(f"{self.label}: the factors of {module} do not fit: {list(b.shape)}, {list(a.shape)}")
        scale = self._scale(module, len(a), parts.get("alpha"))
        low = LowRank(scale * b.reshape(len(b), -1), a.reshape(len(a), -1))
        magnitude = parts.get("lora_magnitude_vector")
        found: dict[str, Delta] = {module: low if magnitude is None else self._dora(module, low, magnitude)}
        if "lora_B.bias" in parts:
            found[f"{module}.bias"] = Dense(scale * parts["lora_B.bias"])
        return found

    def _scale(self, module: str, rank: int, alpha: float | None) -> float:
        if self.options is None:
            return 1.0 if alpha is None else alpha / rank
        if alpha is not None:
            raise CheckpointError(f"{self.label}: gives an alpha twice, as a tensor and as metadata")
        if self.options.rank_of(module) != rank:
            raise CheckpointError(
                f"{self.label}: {module} has rank {rank} but the file's metadata says {self.options.rank_of(module)}"
            )
        return self.options.scaling(module, rank)

    def _dora(self, module: str, low: LowRank, magnitude: Tensor) -> Delta:
        name = f"{module}.weight"
        if self.base is None or name not in self.base.tensors:
            raise MismatchError(
                f"{self.label}: {module} is DoRA, whose change depends on the base's {name}; give the base of this "
                "component (bases=...)"
            )
        base = self.base.read(name)
        if base.numel() != low.shape[0] * low.shape[1] or magnitude.numel() != low.shape[0]:
            raise MismatchError(f"{self.label}: {module} does not fit the base's {name} {list(base.shape)}")
        return dora_change(low, magnitude.reshape(-1), base)
