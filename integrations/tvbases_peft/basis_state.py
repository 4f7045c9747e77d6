"""What an attached basis remembers: the selected task of each row, and every layer's coefficients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tvbases_hf.errors import ParameterError


@dataclass
class Selection:
    """The task that an attached basis computes: ``rows`` [1], or [batch] while ``mixed``. Table row T is the sum."""

    key: str
    adapter_name: str
    tasks: tuple[str, ...]
    rows: Tensor
    repeat: int = 1

    @property
    def is_mixed(self) -> bool:
        return len(self.rows) > 1

    def spread(self, table: Tensor, like: Tensor, channel: int) -> Tensor:
        """The selected rows of ``table`` [T + 1, K], shaped to multiply ``like`` along its batch and ``channel``."""
        rows = table[self.rows.to(table.device)]
        if self.is_mixed:
            rows = rows.repeat_interleave(self._copies(len(like)), dim=0)
        shape = [len(rows)] + [1] * (like.ndim - 1)
        shape[channel] = table.shape[1]
        return rows.reshape(shape)

    def _copies(self, batch: int) -> int:
        for copies in (1, self.repeat):
            if batch == copies * len(self.rows):
                return copies
        raise ParameterError(self.complaint(batch))

    def complaint(self, batch: int) -> str:
        """What is wrong with a batch of this many rows."""
        several = f" with repeat={self.repeat}" if self.repeat > 1 else ""
        return (
            f"the batch has {batch} rows but mixed() names {len(self.rows)} tasks{several}; give one task per row, and "
            "repeat= for beams or several returned sequences (num_beams, num_return_sequences)"
        )


@dataclass
class Table:
    """[T + 1, K] float32 numbers, kept on the device of whoever asked last."""

    values: Tensor

    def on(self, like: Tensor) -> Tensor:
        """The numbers on the device of ``like``."""
        if self.values.device != like.device:
            self.values = self.values.to(like.device)
        return self.values


@dataclass
class LayerState:
    """What one LoRA layer needs to know: the coefficients, the row scales of DoRA, and what was merged last."""

    selection: Selection
    coefficients: Table
    scales: Table | None = None
    merged: Tensor | None = None


def selections(model: Any) -> list[Selection]:
    """Those of all bases that are attached to the model."""
    found: dict[int, Selection] = {}
    for module in model.modules():
        for variant in getattr(module, "lora_variant", {}).values():
            state = getattr(variant, "state", None)
            if isinstance(state, LayerState):
                found[id(state.selection)] = state.selection
    return list(found.values())


def find(key: str, model: Any, adapter_name: str | None) -> Selection:
    """The one selection of this basis on the model. ParameterError where there is none, or more than one."""
    found = [
        selection
        for selection in selections(model)
        if selection.key == key and adapter_name in (None, selection.adapter_name)
    ]
    if not found:
        raise ParameterError("this basis is not attached to the model (any more); attach it first: basis.attach(model)")
    if len(found) > 1:
        names = ", ".join(selection.adapter_name for selection in found)
        raise ParameterError(f"this basis is attached {len(found)} times ({names}); say which with adapter_name")
    return found[0]


def check_not_merged(model: Any, selection: Selection) -> None:
    """ParameterError where the adapter's weights are in the base's, so that another task would change nothing."""
    for module in model.modules():
        if selection.adapter_name in getattr(module, "merged_adapters", ()):
            raise ParameterError("the adapter is merged into the weights; model.unmerge_adapter() before another task")
