"""What the tensors of a LoRA file are called, by format: factors, alphas, and PEFT's parts of each module."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..algebra.delta import LowRank
from ..algebra.products import square_norm
from ..errors import CheckpointError

ALPHA_SUFFIX = ".alpha"
# One of two factors, in any of the formats; PEFT may put an adapter's name behind lora_A.
FACTOR = re.compile(
    r"^(?P<module>.+?)[._]"
    r"(?:(?P<first>lora_down|lora_A(?:\.[^.]+)?|lora\.down|down)|lora_up|lora_B(?:\.[^.]+)?|lora\.up|up)\.weight$"
)
# PEFT's names, into which everything is translated.
PART = re.compile(
    r"^(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_magnitude_vector)(?:\.weight)?$"
)

# A layer of CLIP's text model as transformers 5 calls it, which every other writer calls text_model.encoder.layers.
TEXT_LAYER = re.compile(r"^(?=encoder\.layers\.)")

Alphas = dict[str, float]
# By component and module, the stored names of PEFT's parts and, as "alpha", a number; as "name" what the file calls it.
Parts = dict[str, dict[str, dict[str, Any]]]


@dataclass(frozen=True)
class Pair:
    """The names of a module's two factors, and its alpha where the file gives one."""

    down: str
    up: str
    alpha: float | None

    def scale(self, state: Mapping[str, Tensor]) -> float:
        """alpha / rank; where no alpha is given, trainers and diffusers take the rank for it."""
        return 1.0 if self.alpha is None else self.alpha / max(1, len(state[self.down]))


def find_pairs(state: Mapping[str, Tensor], alphas: Mapping[str, float], label: str) -> dict[str, Pair]:
    """The two factors of each module of a file in any format.

    Raises CheckpointError where a tensor is left over, one of two factors is missing, or there are none at all.
    """
    halves: dict[str, dict[bool, str]] = {}
    for name, tensor in state.items():
        match = FACTOR.match(name)
        if match is None and not name.endswith(ALPHA_SUFFIX) and tensor.any():
            raise CheckpointError(f'"{label}": {name} is no factor of a LoRA and would be left out; not supported')
        if match is None:
            continue
        own = halves.setdefault(match["module"], {})
        if own.setdefault(bool(match["first"]), name) != name:
            raise CheckpointError(
                f'"{label}": {match["module"]} has a factor twice ({name}); give a file of one adapter'
            )
    if not halves:
        raise CheckpointError(f'"{label}": no LoRA file: it has no factors (first tensor: {next(iter(state), "none")})')
    for module, own in halves.items():
        if len(own) < 2:
            raise CheckpointError(f'"{label}": {module} has one of two factors; the file is incomplete')
        down, up = state[own[True]].shape, state[own[False]].shape
        if not factors_fit(down, up):
            raise CheckpointError(f'"{label}": the factors of {module} do not fit: {list(up)}, {list(down)}')
    return {module: Pair(own[True], own[False], alphas.get(own[True])) for module, own in halves.items()}


def factors_fit(down: Sequence[int], up: Sequence[int]) -> bool:
    """Whether the shapes are [rank, in, ...kernel] and [out, rank, ...ones]."""
    return len(down) >= 2 and len(up) >= 2 and down[0] == up[1] > 0 and all(size == 1 for size in up[2:])


def find_alphas(state: Mapping[str, Tensor], names: Iterable[str], label: str) -> Alphas:
    """Alphas by the name of the first factor that they scale. Raises CheckpointError for one that scales none."""
    firsts: dict[str, str] = {}
    for name in names:
        match = FACTOR.match(name)
        if match and match["first"]:
            module = match["module"]
            firsts |= dict.fromkeys((name, module, module.removesuffix(".lora_linear_layer")), name)
    alphas: Alphas = {}
    for name, value in state.items():
        if not name.endswith(ALPHA_SUFFIX):
            continue
        first = firsts.get(name.removesuffix(ALPHA_SUFFIX))
        if first is None:
            raise CheckpointError(f'"{label}": {name} scales no factors; the file is incomplete')
        if value.numel() != 1 or not math.isfinite(value):
            raise CheckpointError(f'"{label}": {name} is no finite number; save the file again')
        alphas[first] = float(value)
    return alphas


def square_of(state: Mapping[str, Tensor], pairs: Mapping[str, Pair]) -> float:
    """The squared norm of all changes in a file, as its format defines them: alpha / rank times up times down."""
    total = 0.0
    for pair in pairs.values():
        up, down = state[pair.up], state[pair.down]
        change = LowRank(up.reshape(len(up), -1), down.reshape(len(down), -1))
        total += pair.scale(state) ** 2 * square_norm(change)
    return total


def find_parts(names: Iterable[str], alphas: Mapping[str, float], label: str) -> Parts:
    """The parts of each module of a file under diffusers' names, older forms of them too.

    Raises CheckpointError for a name that is no part of a LoRA, and where only some modules have an alpha.
    """
    names = list(names)
    found: Parts = {}
    for component in dict.fromkeys(name.partition(".")[0] for name in names):
        own = [name for name in names if name.startswith(f"{component}.")]
        text = component.startswith("text_encoder")
        found[component] = _grouped(_peft_names(component, own, label), alphas, label, text=text)
    return found


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
    names: Mapping[str, str], alphas: Mapping[str, float], label: str, *, text: bool
) -> dict[str, dict[str, Any]]:
    parts: dict[str, dict[str, Any]] = {}
    for own, name in names.items():
        match = PART.match(name)
        if match is None:
            raise CheckpointError(f'"{label}": {own} is no part of a LoRA that is known here; not supported')
        module = TEXT_LAYER.sub("text_model.", match["module"]) if text else match["module"]
        group = parts.setdefault(module, {"name": match["module"]})
        if group.setdefault(match["part"], own) != own:
            raise CheckpointError(f'"{label}": {own} and {group[match["part"]]} are one factor; save the file again')
        if own in alphas:
            group["alpha"] = alphas[own]
    given = sum("alpha" in group for group in parts.values())
    if 0 < given < len(parts):
        raise CheckpointError(
            f'"{label}": {given} of {len(parts)} modules have an alpha; what scales the others is not defined'
        )
    return parts
