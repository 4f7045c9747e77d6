"""The names of a LoRA file of any trainer as diffusers' own, by the family that has all of its modules.

Names that are a family's own modules, with dots or underscores, are only respelled. The others are translated by
diffusers' converters, which want particular spellings, and drop some tensors with no more than a line in the log, and
some alphas: what comes out is therefore weighed against what went in, and must be modules that the family has.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor

from ..errors import CheckpointError
from .families import Family, Modules, split_numbers
from .lora_names import ALPHA_SUFFIX, Alphas, Pair, Parts, find_alphas, find_pairs, find_parts, square_of
from .lora_source import PREFIXES
from .original_names import find_original, original_modules

# What trainers write in front of a module of the model that denoises, and of a text encoder.
MODEL_PREFIXES = (
    "base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.", "unet.", "model.",
    "lora_unet_", "lora_transformer_", "lycoris_", "",
)  # fmt: skip
TEXT_PREFIXES = {
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    "text_encoders.clip_l.transformer.": "text_encoder",
    "text_encoders.clip_g.transformer.": "text_encoder_2",
}
KOHYA_TEXT = {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
UNET_NAMES = re.compile(
    r"^unet\.|(down|up)[._]blocks|mid[._]block|(input|output)[._]blocks|middle[._]block|(^|[._])conv_(in|out)"
)
# Both sides are the same float32 numbers, multiplied by alpha / rank; what is lost must show.
CONSERVED = 1e-6
# What diffusers' converters raise for names and shapes that are not theirs.
NOT_THEIRS = (
    ValueError, KeyError, AssertionError, NotImplementedError, AttributeError, IndexError, RuntimeError, TypeError,
)  # fmt: skip

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Translation:
    """A file under diffusers' names: its factors, their names by component and module, and whose names they are."""

    tensors: State
    parts: Parts
    family: Family

    def agreeing(self) -> int:
        """How many modules have as many rows per column as in the published model, whose width may be another."""
        return sum(
            known.has_ratio(module, (len(up), math.prod(down.shape[1:])))
            for component, own in self.parts.items()
            if (known := self.family.modules(component)) is not None
            for module, names in own.items()
            for up, down in [(self.tensors[names["lora_B.weight"]], self.tensors[names["lora_A.weight"]])]
        )


def translate(state: State, families: Iterable[Family], label: str) -> Translation:
    """A file's factors under the names of the family that has its modules; nothing may get lost on the way.

    Families are tried on factors cut to rank 1. Of several with other translations it is the one whose shapes agree
    best, and then the earliest.

    Raises CheckpointError for what is no LoRA, for names that no family has (how many, a sample, which families were
    tried), and for tensors or alphas that the only converter leaves out.
    """
    alphas = find_alphas(state, state, label)
    pairs = find_pairs(state, alphas, label)
    if any(pair.scale(state) < 0 for pair in pairs.values()):
        return translate(_without_signs(state, pairs), families, label)
    tried = [family for family in families if (family.component == "unet") == _is_unet(pairs)]
    outline = _outline(state, pairs)
    best: tuple[int, Callable[[State], Translation | None]] | None = None
    lost: CheckpointError | None = None
    for way in _ways(tried, pairs, label):
        try:
            found = way(outline)
        except CheckpointError as error:
            lost = lost or error
            continue
        agreeing = 0 if found is None else found.agreeing()
        if found is not None and (best is None or agreeing > best[0]):
            best = agreeing, way
            if agreeing == sum(len(own) for own in found.parts.values()):
                break
    translated = best[1](state) if best is not None else None
    if translated is None:
        raise _no_family(pairs, tried, label) or lost or _not_together(pairs, label)
    return translated


def _without_signs(state: State, pairs: Mapping[str, Pair]) -> State:
    """Negative alphas, on which diffusers' converter of kohya's files never ends, as negative second factors."""
    turned = {pair.up: -state[pair.up] for pair in pairs.values() if pair.scale(state) < 0}
    return {**state, **turned, **{name: alpha.abs() for name, alpha in state.items() if name.endswith(ALPHA_SUFFIX)}}


def _is_unet(modules: Iterable[str]) -> bool:
    return any(UNET_NAMES.search(module) for module in modules)


def _outline(state: State, pairs: Mapping[str, Pair]) -> State:
    """The file cut to rank 1: names, splits and losses show on it at little cost."""
    first = {pair.down: state[pair.down][:1].clone() for pair in pairs.values()}
    second = {pair.up: state[pair.up][:, :1].clone() for pair in pairs.values()}
    return {**state, **first, **second}


def _ways(
    families: Iterable[Family], pairs: Mapping[str, Pair], label: str
) -> Iterator[Callable[[State], Translation | None]]:
    for family in families:
        yield partial(_spelled_anew, family, pairs, label)
        for spelling in (_as_it_is, _as_kohya, _as_original):
            yield partial(_converted, family, pairs, label, spelling)


def _spelled_anew(family: Family, pairs: Mapping[str, Pair], label: str, state: State) -> Translation | None:
    """Where every name is that of a module of the family."""
    places = {module: find_module(module, family) for module in pairs}
    if None in places.values() or len(set(places.values())) < len(places):
        return None
    tensors: dict[str, Tensor] = {}
    alphas: Alphas = {}
    for module, pair in pairs.items():
        first = f"{places[module]}.lora_A.weight"
        tensors |= {first: state[pair.down], f"{places[module]}.lora_B.weight": state[pair.up]}
        alphas[first] = float(len(state[pair.down])) if pair.alpha is None else pair.alpha
    return Translation(tensors, find_parts(tensors, alphas, label), family)


def find_module(name: str, family: Family) -> str | None:
    """A family's component and module that a name means, diffusers' own or its makers', or None."""
    for prefix, component in (*TEXT_PREFIXES.items(), *((p, family.component) for p in MODEL_PREFIXES)):
        known = family.modules(component) if name.startswith(prefix) else None
        if known is None:
            continue
        rest = name.removeprefix(prefix)
        found = known.find(rest) or (find_original(family.name, rest) if component == family.component else None)
        if found is not None:
            return f"{component}.{found}"
    return None


def _converted(
    family: Family, pairs: Mapping[str, Pair], label: str, spelling: Callable[..., State | None], state: State
) -> Translation | None:
    """What diffusers' converter makes of the file in one spelling; None where its names are not the family's.

    Raises CheckpointError where something got lost.
    """
    spelled = spelling(state, pairs, family)
    if spelled is None:
        return None
    # What every published Stable Diffusion 1, 2 and XL has; only their converters ask.
    unet = {"unet_config": SimpleNamespace(layers_per_block=2)} if family.component == "unet" else {}
    try:
        with _without_a_word():
            found = family.mixin.lora_state_dict(dict(spelled), **unet)
        found, alphas = found if isinstance(found, tuple) else (found, None)
        found = {**found, **{name: torch.as_tensor(alpha) for name, alpha in (alphas or {}).items()}}
        # The Flux converter leaves the component out of the names of the embedders and of the last layers.
        tensors = {n if n.startswith(PREFIXES) else f"{family.component}.{n}": t for n, t in found.items()}
        scales = find_alphas(tensors, tensors, label)
        tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(".alpha")}
        parts = find_parts(tensors, scales, label)
    except (*NOT_THEIRS, CheckpointError):
        return None
    if not parts or not family.has_all(parts):
        return None
    _check_conserved(square_of(state, pairs), square_of(tensors, find_pairs(tensors, scales, label)), label)
    return Translation(tensors, parts, family)


@contextmanager
def _without_a_word() -> Iterator[None]:
    """Converters that are only tried warn of names that are not theirs."""
    from diffusers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _as_it_is(state: State, pairs: Mapping[str, Pair], family: Family) -> State:
    return state


def _as_kohya(state: State, pairs: Mapping[str, Pair], family: Family) -> State | None:
    """``lora_unet_`` and underscores; alpha / rank in the second factor."""
    spelled: dict[str, Tensor] = {}
    for module, pair in pairs.items():
        component, rest = _stem(module)
        name = f"{KOHYA_TEXT.get(component, 'lora_unet_')}{rest.replace('.', '_')}"
        spelled[f"{name}.lora_down.weight"] = state[pair.down]
        spelled[f"{name}.lora_up.weight"] = state[pair.up] * pair.scale(state)
        spelled[f"{name}.alpha"] = torch.tensor(float(len(state[pair.down])))
    return spelled


def _as_original(state: State, pairs: Mapping[str, Pair], family: Family) -> State | None:
    """``diffusion_model.`` and dots; alpha / rank in the second factor."""
    spelled: dict[str, Tensor] = {}
    original: Modules | None = original_modules(family.name)
    for module, pair in pairs.items():
        component, rest = _stem(module)
        if component:
            return None
        name = (original.find(rest) if original is not None else None) or rest
        spelled[f"diffusion_model.{name}.lora_A.weight"] = state[pair.down]
        spelled[f"diffusion_model.{name}.lora_B.weight"] = state[pair.up] * pair.scale(state)
    return spelled


def _stem(module: str) -> tuple[str, str]:
    """The text encoder, if it is one's, and the name without what stands in front."""
    for prefix, component in TEXT_PREFIXES.items():
        if module.startswith(prefix):
            return component, module.removeprefix(prefix)
    return "", module.removeprefix(next(prefix for prefix in MODEL_PREFIXES if module.startswith(prefix)))


def _check_conserved(before: float, after: float, label: str) -> None:
    """Splitting rows and renaming keep the squared norm: anything dropped, or scaled twice or not at all, shows."""
    if abs(after - before) > CONSERVED * before:
        raise CheckpointError(
            f'"{label}": diffusers makes {before:.6g}, the squared norm of its changes, {after:.6g} (an alpha or a '
            "module of a kind that its converter leaves out); convert the file with the program that made it"
        )


def _no_family(pairs: Mapping[str, Pair], tried: list[Family], label: str) -> CheckpointError | None:
    """How many names are of no module, by the family that has most of them; None where it has all."""
    missing = {family.name: _unknown(pairs, family) for family in tried}
    nearest = min(missing, key=lambda name: len(missing[name]))
    names = missing[nearest]
    if not names:
        return None
    fit = f"{len(names)} of {len(pairs)} modules are not of {nearest}, the nearest"
    fit = f"none of its {len(pairs)} modules is of a model known here" if len(names) == len(pairs) else fit
    return CheckpointError(
        f'"{label}": cannot translate its names to those of a model: {fit} (first: {names[0]}). Convert the file with '
        f"the program that made it, or update diffusers; tried {', '.join(missing)}"
    )


def _unknown(names: Iterable[str], family: Family) -> list[str]:
    """Blocks of one kind have one answer; those of a UNet are not alike."""
    kinds = {name: name if family.component == "unet" else split_numbers(name)[0] for name in names}
    known = {kind: _is_known(name, family) for kind, name in {kind: name for name, kind in kinds.items()}.items()}
    return [name for name, kind in kinds.items() if not known[kind]]


def _not_together(pairs: Mapping[str, Pair], label: str) -> CheckpointError:
    return CheckpointError(
        f'"{label}": diffusers translates its {len(pairs)} names one by one, as {next(iter(pairs))}, but not together; '
        "modules that its converter wants are missing"
    )


def _is_known(name: str, family: Family) -> bool:
    """Whether a name alone would be translated."""
    if find_module(name, family) is not None:
        return True
    state = {f"{name}.lora_down.weight": torch.ones(1, 12), f"{name}.lora_up.weight": torch.ones(12, 1)}
    down, up = state
    ways = (_converted(family, {name: Pair(down, up, None)}, name, how, state) for how in (_as_kohya, _as_original))
    try:
        return any(found is not None for found in ways)
    except CheckpointError:
        return True  # known, and lost in part
