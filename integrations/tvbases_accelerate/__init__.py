"""Several processes that share the weights of one job: ``accelerate launch -m tvbases_hf ...``.

    accelerate launch --num_processes 2 --cpu -m tvbases_hf compress --base llama/ --task math=math/ ...

Every process reads and writes its own weights, with ``--device cuda`` on a GPU of its own; what they exchange is small
(a row of numbers per weight, on the CPU), so they talk over gloo whatever the device. Several machines need a file
system that all of them share.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from tvbases_hf.errors import TeamError

Value = TypeVar("Value")


class Processes:
    """The processes that accelerate (or torchrun) has started; see tvbases_hf.storage.run.Team."""

    def __init__(self) -> None:
        self._state = PartialState(cpu=True)

    @property
    def rank(self) -> int:
        return self._state.process_index

    @property
    def size(self) -> int:
        return self._state.num_processes

    @property
    def local_rank(self) -> int:
        return self._state.local_process_index

    def sum(self, tensor: Tensor) -> Tensor:
        def reduce() -> Tensor:
            torch.distributed.all_reduce(tensor)
            return tensor

        return self._together(reduce)

    def same(self, value: Any) -> Any:
        return self._together(lambda: broadcast_object_list([value])[0])

    def gather(self, value: Any) -> list[Any]:
        return self._together(lambda: gather_object([value]))

    def close(self) -> None:
        """Leave the others in peace: without it torch warns at exit."""
        self._state.destroy_process_group()

    def _together(self, work: Callable[[], Value]) -> Value:
        try:
            return work()
        except RuntimeError as error:  # gloo's word for a connection that is gone
            raise TeamError(
                f"process {self.rank} of {self.size} has lost another one, which failed or was killed (see its own "
                "message); nothing was put in place. Run the same command again: it goes on from what is finished"
            ) from error
