"""The weights that styles change, checked to be those of one model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ..errors import MismatchError
from .families import find_family, installed
from .lora_layers import LoraLayers

Lora = Mapping[str, LoraLayers]


@dataclass(frozen=True, eq=False)
class Place:
    """One weight that some styles change: ``shape`` flattened, ``kernel`` of a convolution, ranks by style."""

    component: str
    module: str
    shape: tuple[int, int]
    kernel: tuple[int, ...]
    ranks: Mapping[str, int]
    has_bias: bool

    @property
    def name(self) -> str:
        """What the weight is called in a file."""
        return f"{self.component}.{self.module}"

    @property
    def nbytes(self) -> int:
        """Of the factors, in float32."""
        return 4 * sum(self.ranks.values()) * sum(self.shape)


def find_places(loras: Mapping[str, Lora]) -> Iterator[Place]:
    main = {name: {c for c in lora if not c.startswith("text_encoder")} for name, lora in loras.items()}
    first, *others = main
    for other in others:
        if main[first] and main[other] and not main[first] & main[other]:
            raise MismatchError(
                f'"{first}" changes the {_words(main[first])}, "{other}" the {_words(main[other])}: LoRAs of different '
                "models cannot be mixed"
            )
    for component in dict.fromkeys(c for lora in loras.values() for c in lora):
        layers = {name: lora[component] for name, lora in loras.items() if component in lora}
        for module in dict.fromkeys(m for own in layers.values() for m in own.modules):
            yield _place(component, module, {name: own for name, own in layers.items() if module in own})


def _words(components: set[str]) -> str:
    return " and ".join(sorted(components))


def _place(component: str, module: str, layers: Mapping[str, LoraLayers]) -> Place:
    first, *others = layers
    shape, kernel = layers[first].shape(module), layers[first].kernel(module)
    for other in others:
        if (layers[other].shape(module), layers[other].kernel(module)) != (shape, kernel):
            raise MismatchError(
                f'{component}.{module} is {_shape(layers[first], module)} in "{first}" and '
                f'{_shape(layers[other], module)} in "{other}": LoRAs of different models cannot be mixed'
            )
    ranks = {name: own.rank(module) for name, own in layers.items()}
    return Place(component, module, shape, kernel, ranks, any(own.has_bias(module) for own in layers.values()))


def _shape(layers: LoraLayers, module: str) -> str:
    kernel = layers.kernel(module)
    return f"{list(layers.shape(module))}" + (f" with a kernel of {list(kernel)}" if kernel else "")


def check_one_family(loras: Mapping[str, Lora]) -> None:
    """Names alone tell; that shapes agree is seen weight by weight."""
    union: dict[str, dict[str, None]] = {}
    found = None
    for name, lora in loras.items():
        before = found
        for component, layers in lora.items():
            union.setdefault(component, {}).update(dict.fromkeys(layers.modules))
        found = find_family(union, installed())
        if found is None:
            own = find_family({component: layers.modules for component, layers in lora.items()}, installed())
            raise MismatchError(
                f'"{name}" is a LoRA for {own.name if own else "another model"}, those before it are for '
                f"{before.name if before else 'others'}: LoRAs of different models cannot be mixed"
            )
