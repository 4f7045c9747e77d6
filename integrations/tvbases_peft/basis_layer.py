"""How one LoRA layer computes and merges the selected task of a basis."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn

from tvbases_hf.errors import ParameterError

if TYPE_CHECKING:
    from .basis_state import LayerState


class BasisVariant(LoraVariant):
    """PEFT calls these instead of its own arithmetic for the adapter; ``module`` is the LoRA layer."""

    def __init__(self, state: LayerState) -> None:
        self.state = state

    def supports_lora_conversion(self) -> bool:
        return False

    def forward(self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """result + lora_B(c * lora_A(x)) * scaling, and d * (W x) for DoRA; c and d are the task's, or each row's."""
        scaling = module.scaling[active_adapter]
        dropout = module.lora_dropout[active_adapter]
        if active_adapter in getattr(module, "lora_embedding_A", {}):
            inner = module._embed(x, module.lora_embedding_A[active_adapter].T)
            scale = module._get_embed_scale() if hasattr(module, "_get_embed_scale") else None
            added = self._scaled(inner, -1) @ module.lora_embedding_B[active_adapter].T * scaling
            added = added if scale is None else added * scale.to(added.dtype)
        else:
            inner = module.lora_A[active_adapter](dropout(x))
            added = module.lora_B[active_adapter](self._scaled(inner, _channel(module))) * scaling
        if self.state.scales is not None:
            added = added + self._rows(module, active_adapter, x, result)
        return result + added

    def merge_safe(self, module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        self.state.merged = self._selected()
        return self._with(module, active_adapter, orig_weight)

    def merge_unsafe(self, module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        self.state.merged = self._selected()
        orig_weight.data = self._with(module, active_adapter, orig_weight.data)

    def unmerge(self, module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        change = self._delta(module, active_adapter)
        factor = self._factor(orig_weight)
        weight = orig_weight.data - change.to(orig_weight.dtype)
        return weight if factor is None else (weight / factor).to(weight.dtype)

    def _scaled(self, inner: Tensor, channel: int) -> Tensor:
        table = self.state.coefficients.on(inner)
        return inner * self.state.selection.spread(table, inner, channel).to(inner.dtype)

    def _rows(self, module: Any, active_adapter: str, x: Tensor, result: Tensor) -> Tensor:
        """d * (W x): the base layer's output without its bias, scaled row by row of W."""
        assert self.state.scales is not None
        base = module.get_base_layer()
        pristine = module.active_adapters[0] == active_adapter  # nothing has been added to the result yet
        output, channel = result if pristine else module.base_layer(x.to(base.weight.dtype)), _channel(module)
        if base.bias is not None:
            shape = [1] * output.ndim
            shape[channel] = -1
            output = output - base.bias.reshape(shape)
        table = self.state.scales.on(output)
        return output * self.state.selection.spread(table, output, channel).to(output.dtype)

    def _selected(self) -> Tensor:
        if self.state.selection.is_mixed:
            raise ParameterError("rows of different tasks cannot be merged into one weight; merge outside of mixed()")
        return self.state.selection.rows

    def _with(self, module: Any, active_adapter: str, weight: Tensor) -> Tensor:
        factor = self._factor(weight)
        if factor is not None and module.merged_adapters:
            raise ParameterError("a basis of DoRA adapters scales the base's rows: merge it before other adapters")
        scaled = weight if factor is None else weight * factor
        return (scaled + self._delta(module, active_adapter)).to(weight.dtype)

    def _delta(self, module: Any, active_adapter: str) -> Tensor:
        """PEFT's own product of the factors, with the rank dimension scaled for the merged task."""
        embedding = active_adapter in getattr(module, "lora_embedding_A", {})
        factor = module.lora_embedding_A[active_adapter] if embedding else module.lora_A[active_adapter].weight
        kept = factor.data
        assert self.state.merged is not None
        row = self.state.coefficients.on(kept)[int(self.state.merged[0])]
        try:
            factor.data = (kept * row.reshape(-1, *[1] * (kept.ndim - 1))).to(kept.dtype)
            return module.get_delta_weight(active_adapter)
        finally:
            factor.data = kept

    def _factor(self, weight: Tensor) -> Tensor | None:
        """1 + d, shaped to multiply the rows of the weight."""
        if self.state.scales is None:
            return None
        assert self.state.merged is not None
        row = self.state.scales.on(weight)[int(self.state.merged[0])]
        return (1 + row).reshape(-1, *[1] * (weight.ndim - 1))


def _channel(module: Any) -> int:
    """The dimension of the channels in a layer's output."""
    return 1 if isinstance(module.get_base_layer(), (nn.Conv1d, nn.Conv2d, nn.Conv3d)) else -1
