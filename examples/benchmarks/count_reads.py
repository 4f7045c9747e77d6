"""How many bytes of the models' weights a `tvbases` command reads: `python count_reads.py FILE.json COMMAND...`.

The operating system cannot tell: mapped files are read without a system call, so that rchar of /proc/PID/io does not
hold them, and its read_bytes hold only what was not in the page cache yet. So torch is asked: every operation that
takes a part of a mapped weight as input and does more than view it reads it. What is among the AT_HAND parts read last
is not counted again: it is in the processor's cache, as one piece of the base is for the pieces of all models. The
command runs on one thread, for the mode that listens to operations is of one thread; what it reads does not depend on
their number.
"""

from __future__ import annotations

import json
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tvbases_hf.cli import main
from tvbases_hf.storage.checkpoint import Checkpoint
from tvbases_hf.storage.run import Run, using

AT_HAND = 8


class Reads(TorchDispatchMode):
    """``bytes`` of mapped weights that operations inside the block have read."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self._weights: dict[int, Tensor] = {}  # by address; held, so that no other tensor comes to lie there
        self._at_hand: OrderedDict[tuple[int, int], None] = OrderedDict()

    def __enter__(self) -> Reads:
        self._read = Checkpoint.read

        def read(model: Checkpoint, name: str) -> Tensor:
            tensor = self._read(model, name)
            self._weights.setdefault(_storage(tensor), tensor)
            return tensor

        setattr(Checkpoint, "read", read)  # noqa: B010 (a method in place of a method)
        return super().__enter__()

    def __exit__(self, *failure: Any) -> None:
        setattr(Checkpoint, "read", self._read)  # noqa: B010
        super().__exit__(*failure)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        views = {_storage(leaf) for leaf in tree_leaves(result) if isinstance(leaf, Tensor)}
        for tensor in tree_leaves((args, kwargs)):
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():  # opening a file looks at a byte
                continue
            if (storage := _storage(tensor)) in self._weights and storage not in views:
                self._note(tensor)
        return result

    def _note(self, tensor: Tensor) -> None:
        part = tensor.data_ptr(), tensor.nbytes
        self.bytes += 0 if part in self._at_hand else tensor.nbytes
        self._at_hand[part] = None
        self._at_hand.move_to_end(part)
        if len(self._at_hand) > AT_HAND:
            self._at_hand.popitem(last=False)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


if __name__ == "__main__":
    file = Path(sys.argv[1])
    sys.argv = ["tvbases", *sys.argv[2:]]
    try:
        torch.set_num_threads(1)
        with using(Run(workers=1)), Reads() as reads:
            main()
    except SystemExit as done:
        if done.code:
            raise
    file.write_text(json.dumps({"bytes": reads.bytes}), encoding="utf-8")
