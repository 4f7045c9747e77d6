"""The linear layers of a model in memory that are given the inputs of stored weights."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from torch import nn

from .translation import Translation


def linear_layers(model: nn.Module, names: Sequence[str]) -> dict[str, str]:
    """{stored weight: the linear layer that is given its inputs}, for those of ``names`` that are of linear layers.

    Matrices that the model fuses, or that it holds in pieces, share their inputs: rows of one product.
    """
    translation, modules = Translation(model, names), dict(model.named_modules())
    found = {}
    for name, stored in translation.stored.items():
        layers = [part.parameter.rpartition(".")[0] for part in stored.parts]
        if all(_is_linear(modules.get(layer)) for layer in layers) and all(
            part.parameter.endswith("weight") and part.is_of_rows for part in stored.parts
        ):
            found[name] = layers[0]
    return found


def _is_linear(module: nn.Module | None) -> bool:
    """Conv1D is what transformers calls GPT-2's linear layers, whose weights are [in, out]."""
    pytorch_utils = sys.modules.get("transformers.pytorch_utils")  # who has such a layer has imported it
    return isinstance(module, nn.Linear) or (pytorch_utils is not None and isinstance(module, pytorch_utils.Conv1D))
