"""The task of each row of a batch, found by the inputs of the layers, without data (MASS, arXiv 2504.05342)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..algebra.delta import Delta
from ..algebra.rank import RankRule
from ..algebra.svd import SVD, svd
from ..errors import ParameterError
from ..models.linear import linear_layers


@dataclass(frozen=True)
class Router:
    """Which of the tasks a row belongs to: argmin_t |x - V_t V_t^T x| over the inputs x of the layers.

    ``spaces`` are, for each layer, V [T, m, k] float32: the k leading input directions of every task's change of its
    weight. The adapters are trained on inputs of their own tasks, which is what their changes answer to.
    """

    tasks: tuple[str, ...]
    spaces: tuple[tuple[nn.Module, Tensor], ...]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        tasks: Sequence[str],
        names: Sequence[str],
        changes: Callable[[str], Sequence[Delta]],
        rank: str | float | RankRule,
    ) -> Router:
        """``changes`` of a weight [n, m] are those of all tasks; see ``Basis.router``."""
        if hasattr(model, "peft_config"):
            raise ParameterError("the model has adapters already; make the router before basis.attach(model)")
        modules, found = dict(model.named_modules()), []
        for name, layer in linear_layers(model, names).items():
            module = modules[layer]
            parts = [_inputs(svd(delta.low or delta, rank), module) for delta in changes(name)]
            if least := min(part.rank for part in parts):
                found.append((module, torch.stack([part.V[:, :least].float() for part in parts])))
        if not found:
            raise ParameterError("there is no linear layer that all tasks change, so their inputs tell nothing")
        return cls(tuple(tasks), tuple(found))

    def pick(self, model: nn.Module, *given: Any, **inputs: Any) -> list[str]:
        """The task of each row, after one pass of the base over the batch: what ``mixed`` takes.

        Args:
            model: what the router was made of, or that model with the basis attached.
            given, inputs: as the model is called; rows of ``attention_mask`` [rows, tokens] that are 0 do not count.
        """
        return [self.tasks[index] for index in self.residuals(model, *given, **inputs).argmin(dim=1).tolist()]

    def residuals(self, model: nn.Module, *given: Any, **inputs: Any) -> Tensor:
        """[rows, T] float32: |x - V_t V_t^T x|^2 / |x|^2, the mean over the layers of the mean over a row's tokens.

        Raises ParameterError where the pass reaches none of the layers.
        """
        found: list[Tensor] = []
        base = getattr(model, "disable_adapter", contextlib.nullcontext)()
        with torch.no_grad(), base, self._watched(found, inputs.get("attention_mask")):
            model(*given, **inputs)
        if not found:
            raise ParameterError("the pass reached no layer of the router; give the model that it was made of")
        return torch.stack(found).mean(dim=0)

    @contextlib.contextmanager
    def _watched(self, found: list[Tensor], mask: Tensor | None) -> Iterator[None]:
        def take(spaces: Tensor) -> Any:
            def hook(module: nn.Module, given: tuple[Tensor, ...]) -> None:
                found.append(_residuals(given[0], spaces, mask).cpu())

            return hook

        hooks = [module.register_forward_pre_hook(take(spaces)) for module, spaces in self.spaces]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _inputs(part: SVD, module: nn.Module) -> SVD:
    """With the input directions as V: Conv1D stores its weight as [in, out]."""
    return part if isinstance(module, nn.Linear) else part.transposed()


def _residuals(x: Tensor, spaces: Tensor, mask: Tensor | None) -> Tensor:
    """[rows, T] of inputs x [rows, ..., m]."""
    x = x.detach().reshape(len(x), -1, x.shape[-1]).float()
    seen = torch.einsum("rsm,tmk->rstk", x, spaces.to(x.device)).square().sum(dim=-1)
    squares = x.square().sum(dim=-1, keepdim=True)
    left = 1 - seen / squares.clamp_min(torch.finfo(x.dtype).tiny)
    counted = (squares > 0).to(x.dtype)
    if mask is not None and mask.shape == x.shape[:2]:
        counted = counted * mask.to(x.device, x.dtype)[..., None]
    return (left * counted).sum(dim=1) / counted.sum(dim=1).clamp_min(1)
