"""The curvature of a task's loss in the weights that task vectors change: the smoothness L of the AE paper's bounds."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import ParameterError
from ..learning.data import TaskData
from ..learning.inplace import Reparametrised, weights_of
from ..storage.run import bar

Terms = Callable[[Any], Iterator[tuple[Tensor, int]]]
"""A loss: for every batch the sum over its examples, and how many these are; the loss is sum / number."""

TOLERANCE = 1e-3
MAX_ITERATIONS = 200


@dataclass(frozen=True)
class TopEigenvalue:
    """The eigenvalue of the largest size, with its sign, and |H v - value v| / |value| for the vector v found.

    Some eigenvalue lies within ``residual`` * |value| of ``value``, and the error of a top one is of the residual's
    square. Not ``converged``: the residual is above the tolerance, so that a larger one may be missed.
    """

    value: float
    residual: float
    iterations: int
    converged: bool


def cross_entropy(data: TaskData) -> Terms:
    """The mean cross-entropy over all examples (or tokens) of a task's data, nats."""

    def terms(model: Any) -> Iterator[tuple[Tensor, int]]:
        changing = model.names if isinstance(model, Reparametrised) else ()
        fixed = data.fixed(model, changing) if changing or not torch.is_grad_enabled() else data
        for batch in fixed.batches:
            logits, labels = fixed.labelled(model, batch)
            logits = logits if logits.dtype == torch.float64 else logits.float()
            yield nn.functional.cross_entropy(logits, labels, reduction="sum"), len(labels)

    return terms


@torch.no_grad()
def mean_loss(model: Any, terms: Terms) -> float:
    """The loss of a model as it is. Raises ParameterError for data without any example."""
    total = count = 0.0
    with _twice_differentiable(model):
        for value, number in terms(model):
            total, count = total + float(value), count + number
    if not count:
        raise ParameterError("the data is empty: it has no loss")
    return total / count


def gradient(model: nn.Module, names: Iterable[str], terms: Terms) -> Tensor:
    """[d] float64: the gradient of the loss in the weights ``names``, one after another."""
    weights = _leaves(model, names)
    leaves = list(weights.values())
    with torch.enable_grad(), _twice_differentiable(model):
        return _mean(
            terms(Reparametrised(model, weights)), lambda value: torch.autograd.grad(value, leaves, **_UNUSED), leaves
        )


def hessian_product(model: nn.Module, names: Iterable[str], terms: Terms, direction: Tensor) -> Tensor:
    """[d] float64: H ``direction`` [d], by differentiating twice, one batch in memory at a time."""
    weights = _leaves(model, names)
    leaves = list(weights.values())
    parts = direction.split([leaf.numel() for leaf in leaves])
    along = [part.reshape(leaf.shape).to(leaf) for part, leaf in zip(parts, leaves, strict=True)]

    def product(value: Tensor) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(value, leaves, create_graph=True, **_UNUSED)
        slope = sum((g * a).sum() for g, a in zip(first, along, strict=True))
        if not (isinstance(slope, Tensor) and slope.requires_grad):  # a loss linear in the weights
            return tuple(torch.zeros_like(leaf) for leaf in leaves)
        return torch.autograd.grad(slope, leaves, **_UNUSED)

    with torch.enable_grad(), _twice_differentiable(model):
        return _mean(terms(Reparametrised(model, weights)), product, leaves)


def top_eigenvalue(
    model: nn.Module,
    names: Iterable[str],
    terms: Terms,
    *,
    tolerance: float = TOLERANCE,
    max_iterations: int = MAX_ITERATIONS,
    seed: int = 0,
) -> TopEigenvalue:
    """The Hessian's eigenvalue of the largest size, by power iteration on Hessian-vector products.

    The Hessian is that of the loss in the weights ``names`` only, where the model is. Power iteration needs about
    log(1 / tolerance) / log(ratio of the two largest) products, so a spectrum without a gap takes long.

    Raises ParameterError for a tolerance or a number of iterations that is not positive, and for a loss without a
    finite second derivative.
    """
    if not (tolerance > 0 and max_iterations > 0):
        raise ParameterError(f"tolerance {tolerance:g} and max_iterations {max_iterations} must be positive")
    wanted = list(names)
    size = sum(weight.numel() for weight in weights_of(model, wanted).values())
    vector = torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    vector /= vector.norm()
    value, residual, iteration = 0.0, 0.0, 0
    with bar("Top eigenvalue", max_iterations, "step") as shown:
        for iteration in range(1, max_iterations + 1):
            product = hessian_product(model, wanted, terms, vector)
            value, length = float(vector @ product), float(product.norm())
            if not torch.isfinite(product).all():
                raise ParameterError("the loss has no finite second derivative here: NaN or infinity in H v")
            residual = float((product - value * vector).norm()) / abs(value) if value else float(length > 0)
            shown.set_postfix(value=f"{value:.4g}", residual=f"{residual:.1e}")
            shown.update()
            if residual <= tolerance:
                return TopEigenvalue(value, residual, iteration, True)
            vector = product / length
    return TopEigenvalue(value, residual, iteration, False)


_UNUSED: dict[str, Any] = {"allow_unused": True, "materialize_grads": True}


def _leaves(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    return {name: weight.detach().requires_grad_() for name, weight in weights_of(model, names).items()}


def _mean(
    terms: Iterator[tuple[Tensor, int]], of: Callable[[Tensor], tuple[Tensor, ...]], leaves: list[Tensor]
) -> Tensor:
    total, count = torch.zeros(sum(leaf.numel() for leaf in leaves), dtype=torch.float64), 0
    for value, number in terms:
        total += torch.cat([part.detach().reshape(-1).to("cpu", torch.float64) for part in of(value)])
        count += number
    if not count:
        raise ParameterError("the data is empty: it has no loss")
    return total / count


@contextlib.contextmanager
def _twice_differentiable(model: Any) -> Iterator[None]:
    """No dropout, and attention without the fused kernels, which cannot be differentiated twice."""
    was_training = model.training
    model.eval()
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        model.train(was_training)
