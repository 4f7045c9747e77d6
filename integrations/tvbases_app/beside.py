"""Low-rank changes computed beside the layers of a model: no weight is written, so a slider costs next to nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import linear

from tvbases_hf.learning.inplace import Change

WEIGHT = ".weight"


def can_be_beside(model: nn.Module, names: Iterable[str], change: Change) -> bool:
    """Whether every change is a product of two factors, of a linear layer that the model calls as the files do."""
    modules = dict(model.named_modules())
    for name in names:
        module = modules.get(name.removesuffix(WEIGHT))
        factors = getattr(change(name), "factors", None)
        if type(module) is not nn.Linear or factors is None or tuple(module.weight.shape) != tuple(factors.shape):
            return False
    return True


@contextlib.contextmanager
def beside(model: nn.Module, names: Iterable[str], change: Change) -> Iterator[nn.Module]:
    """Inside, a layer answers W x + B (A x) for its change B A: O(r (n + m)) a token. See can_be_beside."""
    hooks = []
    try:
        for name in names:
            factors: Any = getattr(change(name), "factors", None)
            module = model.get_submodule(name.removesuffix(WEIGHT))
            like = next(module.parameters())
            left, right = factors.left.to(like.device, like.dtype), factors.right.to(like.device, like.dtype)
            hooks.append(module.register_forward_hook(_adding(left, right)))
        yield model
    finally:
        for hook in hooks:
            hook.remove()


def _adding(left: Tensor, right: Tensor) -> Any:
    return lambda _, given, answer: answer + linear(linear(given[0], right), left)
