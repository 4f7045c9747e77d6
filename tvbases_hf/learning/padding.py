"""Which positions of what a layer is given are padding: known of the mask that its tower was called with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from .data import IGNORED, LABELS


class Padding:
    """The masks [n, L] of a model's towers while they run, the innermost last.

    A decoder that gets no mask has its padding where the labels are -100. What its cross-attention reads of the
    encoder, which is the very tensor that the encoder gave, has the encoder's.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._encoder, self._decoder = _halves(model)
        self._masks: list[Tensor | None] = []
        self._labels: Tensor | None = None
        self._encoded: tuple[int, Tensor | None] = (0, None)

    def without(self, inputs: Tensor) -> Tensor:
        """[rows, in] of inputs [..., in]: those that are no padding."""
        mask = self._masks[-1] if self._masks else None
        if inputs.data_ptr() == self._encoded[0]:
            mask = self._encoded[1]
        rows = inputs.reshape(-1, inputs.shape[-1])
        if mask is not None and inputs.shape[:-1] in (
            mask.shape,
            (mask.numel(),),
        ):  # a mixture's tokens are in one line
            rows = rows[mask.reshape(-1).to(inputs.device).bool()]
        return rows

    def real(self) -> Tensor | None:
        """[n * L] of the innermost tower: which positions are no padding; None where all count."""
        mask = self._masks[-1] if self._masks else None
        return None if mask is None else mask.reshape(-1).bool()

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        towers = [module for module in self._model.modules() if hasattr(module, "main_input_name")]
        hooks = []
        for module in {id(m): m for m in (self._model, *towers)}.values():
            hooks.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
            hooks.append(module.register_forward_hook(self._leave, always_call=True))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _enter(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if module is self._model:
            self._labels, self._encoded = kwargs.get(LABELS), (0, None)
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 2:
            self._masks.append(mask)
        elif module is self._decoder:
            self._masks.append(None if self._labels is None else self._labels != IGNORED)
        elif module is self._encoder or "pixel_values" in kwargs or not self._masks:
            self._masks.append(None)
        else:
            self._masks.append(self._masks[-1])

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        mask = self._masks.pop()
        states = getattr(output, "last_hidden_state", output[0] if isinstance(output, tuple) and output else None)
        if module is self._encoder and isinstance(states, Tensor):
            self._encoded = states.data_ptr(), mask


def _halves(model: Any) -> tuple[nn.Module | None, nn.Module | None]:
    """The encoder and the decoder of a model that has both."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return None, None
    return model.get_encoder(), model.get_decoder()
