"""What adapters of any method change in a layer: its weights after PEFT's own merge, minus those before."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tvbases_hf.algebra.delta import Delta, Dense
from tvbases_hf.errors import CheckpointError
from tvbases_hf.models.adapter import Adapter
from tvbases_hf.models.layouts import Layout
from tvbases_hf.models.names import Naming
from tvbases_hf.storage.checkpoint import Checkpoint

# Methods whose merged weights compute what their layers compute; tests hold each of them to that. Others change more
# than weights (prompts, routers, states between layers), or have no merge.
MERGEABLE = frozenset(
    {
        "ADALORA",
        "ADAMSS",
        "BEFT",
        "BOFT",
        "C3A",
        "DEFT",
        "DELORA",
        "FOURIERFT",
        "FROD",
        "GLORA",
        "GRALORA",
        "HIRA",
        "HRA",
        "IA3",
        "LN_TUNING",
        "LOHA",
        "LOKR",
        "MISS",
        "OFT",
        "OSF",
        "PEANUT",
        "PSOFT",
        "PVERA",
        "RANDLORA",
        "ROAD",
        "SHIRA",
        "SUPERTUNING",
        "TINYLORA",
        "TRAINABLE_TOKENS",
        "UNILORA",
        "VBLORA",
        "VERA",
        "WAVEFT",
    }
)
# How PEFT's LoRA stores the factors of layers by their class; a Linear may be of any class.
KINDS = {"Conv1D": "conv1d", "Conv2d": "conv", "Conv3d": "conv"}
# Those of them that change the biases of layers too.
WITH_BIASES = frozenset({"BEFT", "GLORA", "IA3", "LN_TUNING", "ROAD"})


class DenseAdapter(Adapter):
    """An adapter whose changes are computed one layer at a time, when asked for."""

    def __init__(
        self,
        config: Mapping[str, Any],
        stored: Checkpoint,
        base: Checkpoint,
        changes: Mapping[str, Callable[[], Delta]],
        layouts: Mapping[str, Layout],
        naming: Naming | None = None,
    ) -> None:
        """``layouts`` are where a LoRA could have factors for the changes of weights, by the base's names."""
        self.label, self.config, self.naming = stored.label, dict(config), naming or Naming()
        self._layouts = dict(layouts)
        self._stored, self._base, self._changes = stored, base, dict(changes)
        self._modules, self._biases, self._saved, self._head = {}, {}, {}, {}
        self._tokens, self._places, self._twins = {}, {}, {}
        self.names = tuple(changes)

    def delta(self, name: str) -> Delta | None:
        """The change of the base's tensor ``name``, dense; None where the adapter changes nothing."""
        return self._changes[name]() if name in self._changes else None

    def layout(self, name: str) -> Layout | None:
        """Where a LoRA that makes the same change would have its factors."""
        return self._layouts.get(name)


def layouts_of(layers: Mapping[str, Any]) -> dict[str, Layout]:
    """How a LoRA would store factors of the weights of layers, by the base's names; others have none."""
    found = {}
    for path, layer in layers.items():
        base = layer.get_base_layer()
        kind = KINDS.get(type(base).__name__)
        if kind == "conv":
            found[f"{path}.weight"] = Layout(path, kind, tuple(base.kernel_size))
        elif kind == "conv1d" or isinstance(base, nn.Linear):
            found[f"{path}.weight"] = Layout(path, kind or "linear")
    return found


def changes_of_layers(layers: Mapping[str, Any], name: str, kind: str) -> dict[str, Callable[[], Delta]]:
    """The changes of the parameters of layers that hold the adapter ``name``, by the base's names.

    Raises CheckpointError where PEFT cannot merge a layer; the first of them is tried.
    """
    found: dict[str, Callable[[], Delta]] = {}
    for path, layer in layers.items():
        if not found:
            _changed(layer, name, kind)
        for own in dict(_parameters(layer)):
            if own != "bias" or kind in WITH_BIASES:
                found[f"{path}.{own}"] = _change(layer, name, kind, own)
    return found


def _change(layer: Any, name: str, kind: str, own: str) -> Callable[[], Delta]:
    return lambda: Dense(_changed(layer, name, kind)[own])


def _parameters(layer: Any) -> Iterator[tuple[str, Tensor]]:
    """Of a layer below its adapters: what a merge can change."""
    return layer.get_base_layer().named_parameters(recurse=False)


def _changed(layer: Any, name: str, kind: str) -> dict[str, Tensor]:
    """The change of every parameter of one layer, from a copy in float64, or as it is where PEFT's code needs that."""
    try:
        try:
            return _merged(copy.deepcopy(layer).double(), name)
        except RuntimeError:  # float32 is written into the code of some methods
            return _merged(copy.deepcopy(layer), name)
    except Exception as error:  # whatever a method has against it
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise CheckpointError(f'"{name}": {kind} adapter, which PEFT cannot merge: {reason}') from error


@torch.no_grad()
def _merged(layer: Any, name: str) -> dict[str, Tensor]:
    layer.eval()
    before = {own: tensor.detach().clone() for own, tensor in _parameters(layer)}
    layer.merge(adapter_names=[name])
    after = dict(_parameters(layer))
    return {own: (after[own].double() - tensor.double()).cpu() for own, tensor in before.items()}
