"""A device to test with where there is no GPU: CPU tensors that claim to be elsewhere, and are as strict about it.

Inside ``fake_device()`` ``tensor.to(ELSEWHERE)`` gives a tensor whose device is ELSEWHERE; so do factories with that
device. As on a GPU, an operation of tensors here and there fails, except with one number from the CPU, indices from the
CPU, and copies. Results are those of the CPU, bit for bit. ELSEWHERE is a device that every torch has a name for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

ELSEWHERE = torch.device("lazy", 0)
COPIES = ("_to_copy", "copy_")
INDEXED = ("index", "index_put_", "index_put")


class Elsewhere(Tensor):
    """``here``: the numbers, on the CPU."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> Elsewhere:
        made = Tensor._make_wrapper_subclass(
            cls,
            here.shape,
            here.stride(),
            here.storage_offset(),
            dtype=here.dtype,
            device=ELSEWHERE,
            dispatch_sizes_strides_policy="sizes",  # asked of ``here``: unsqueeze_ changes them
        )
        made.here = here
        return made

    def data_ptr(self) -> int:
        return self.here.data_ptr()

    def tolist(self) -> Any:
        return self.here.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class Device(TorchDispatchMode):
    """``here`` and ``there``: the most numbers that an operation of each name has made on the CPU, and elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.here: Counter[str] = Counter()
        self.there: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = run(func, args, kwargs or {})
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                made = self.there if isinstance(leaf, Elsewhere) else self.here
                made[_name(func)] = max(made[_name(func)], _here(leaf).numel())
        return result


@contextmanager
def fake_device() -> Iterator[Device]:
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=...) makes it on the CPU, and moves it
    try:
        # mergekit switches autocast off, which knows real devices only.
        with patch.object(torch, "autocast", lambda *given, **more: nullcontext()), Device() as device:
            yield device
    finally:
        torch._C._set_only_lift_cpu_tensors(before)


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    away = [leaf for leaf in given if isinstance(leaf, Elsewhere)]
    name, wanted = _name(func), kwargs.get("device")
    if name not in COPIES:
        home = [leaf for leaf in given if not isinstance(leaf, Elsewhere) and leaf.dim() > 0]
        home = [leaf for leaf in home if leaf.is_floating_point() or name not in INDEXED]
        if away and home:
            shapes = [tuple(_here(leaf).shape) for leaf in given]
            raise RuntimeError(f"{func}: tensors on {ELSEWHERE} and on the CPU: {shapes}")
    plain_args, plain = tree_map_only(Elsewhere, lambda t: t.here, (args, kwargs))
    if wanted is not None:
        plain["device"] = torch.device("cpu")
    result = func(*plain_args, **plain)
    if name == "copy_" or (name.endswith("_") and not name.startswith("_")):
        return args[0]
    goes = torch.device(wanted).type == ELSEWHERE.type if wanted is not None else bool(away)
    return tree_map_only(Tensor, Elsewhere, result) if goes else result


def _here(tensor: Tensor) -> Tensor:
    return tensor.here if isinstance(tensor, Elsewhere) else tensor


def _name(func: Any) -> str:
    return func.overloadpacket.__name__
