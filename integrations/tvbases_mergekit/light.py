"""mergekit's modules without what they load and a merge by tensors does not use.

mergekit imports PEFT, accelerate and networkx, for some of what it does, and names a class of transformers in
annotations; its conversion of names and its inference of architectures import transformers' loader of models. All that
loads the code of models, torch.distributed and torch's compiler, most of what a merge of small models took. It is
loaded when it is used.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

MODEL_CODE = "transformers.modeling_utils"
# Packages that mergekit imports as a whole, for uses of their own; and modules of its own that load model code.
PACKAGES = ("accelerate", "networkx", "peft")
DEFERRED = ("mergekit.architecture.auto", "mergekit.architecture.conversion")


def import_mergekit() -> None:
    """Import mergekit's configuration, methods and tasks. ImportError where it is absent, or another API."""
    if MODEL_CODE in sys.modules or "mergekit.common" in sys.modules:
        return  # nothing is left to be spared
    transformers = importlib.import_module("transformers")
    with _standing_in(*PACKAGES), _standing_in(*DEFERRED, known=False):
        transformers.PreTrainedModel = object  # type: ignore[attr-defined]
        try:
            importlib.import_module("mergekit.common")
        finally:
            del transformers.PreTrainedModel  # type: ignore[attr-defined]
        for name in ("config", "merge_methods", "io.tasks", "merge"):
            importlib.import_module(f"mergekit.{name}")


class _Later(ModuleType):
    """In the place of a module; what is imported from it meanwhile is a function that loads it when it is called."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def later(*arguments: Any, **options: Any) -> Any:
            return getattr(importlib.import_module(self.__name__), name)(*arguments, **options)

        stands_in = sys.modules.get(self.__name__) is self
        return later if stands_in else getattr(importlib.import_module(self.__name__), name)


@contextmanager
def _standing_in(*names: str, known: bool = True) -> Iterator[None]:
    """Modules that are not loaded yet are stood in for inside the block; what has them by then keeps the stand-ins.

    ``known``: they are packages, which others ask for without importing them.
    """
    stand_ins = {name: _Later(name) for name in names if name not in sys.modules}
    for name, module in stand_ins.items():
        module.__spec__ = importlib.util.find_spec(name) if known else None
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        for name in stand_ins:
            del sys.modules[name]
