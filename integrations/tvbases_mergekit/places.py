"""What filters and gradients go by: a tensor's name, and where its layer lies between the first and the last."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from mergekit.architecture import ConfiguredModuleArchitecture, arch_info_for_config
from mergekit.architecture.json_definitions import NAME_TO_ARCH
from mergekit.architecture.moe_defs import AfmoeModuleArchitecture, Glm4MoeModuleArchitecture
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration

from tvbases_hf.errors import ParameterError
from tvbases_hf.models.positions import positions_of

Place = tuple[str, float]
KNOWN = NAME_TO_ARCH.keys() | {cls.ARCHITECTURE_NAME for cls in (AfmoeModuleArchitecture, Glm4MoeModuleArchitecture)}


class Nowhere(float):
    """The place of a tensor of no layer: a gradient multiplies by it, and is refused with ``reason``."""

    reason = ""

    def __mul__(self, other: Any) -> float:
        raise ParameterError(self.reason)


def places(config: MergeConfiguration, base: ModelReference, names: Iterable[str]) -> Callable[[str], Place]:
    """By stored name: what mergekit calls a tensor, and its place, 0 in the first layer of its tower and 1 in the last.

    Where mergekit has a definition of the architecture, that is followed: outside of the layers the place is 0 then.
    Otherwise the names tell. ``names`` have to be all of the model's.
    """
    every = list(names)
    known = _known(base) if _goes_by_name(config) else {}
    positions = positions_of(every)
    loose = [name for name in every if name not in known and name not in positions]
    lists = sorted({f".{position.tower.rpartition('.')[2]}." for position in positions.values()})

    def place(name: str) -> Place:
        if name in known:
            return known[name]
        if name in positions:
            return name, positions[name].share
        nowhere = Nowhere(0.0)
        nowhere.reason = (
            f"{name} lies in no layer (as {len(loose)} of {len(every)} tensors of {base}), so a gradient gives it no "
            f"value; give it to the layers: [{{filter: {(lists or ['NAME'])[0]}, value: [...]}}, {{value: ...}}]"
        )
        return name, nowhere

    return place


def _goes_by_name(config: MergeConfiguration) -> bool:
    """Whether any parameter is more than one number, one word or one yes or no."""
    settings = [config.parameters, *(item.parameters for item in config.models or [])]
    return any(not isinstance(value, (float, int, str)) for given in settings for value in (given or {}).values())


def _known(base: ModelReference) -> dict[str, Place]:
    """By mergekit's definition of the architecture; empty where it has none, or cannot use it."""
    try:
        config = base.config()
        architecture = arch_info_for_config(config) if KNOWN.issuperset(config.architectures or ()) else None
        if architecture is None:
            return {}
        found: dict[str, Place] = {}
        for definition in architecture.modules.values():
            module = ConfiguredModuleArchitecture(
                info=definition.architecture, config=config, weight_prefix=definition.weight_prefix
            )
            for t, weight in _weights(module):
                names = (weight.name, *(weight.aliases or ()), *(weight.tied_names or ()))
                found |= {name: (weight.name, t) for name in names if name not in found}
        return found
    except Exception:  # whatever mergekit or transformers have against this model: the names tell then
        return {}


def _weights(module: ConfiguredModuleArchitecture) -> Iterator[tuple[float, Any]]:
    last = module.num_layers() - 1
    yield from ((0.0, weight) for weight in [*module.pre_weights(), *module.post_weights()])
    for index in range(last + 1):
        yield from ((index / last if last else 1.0, weight) for weight in module.layer_weights(index))
