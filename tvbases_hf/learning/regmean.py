"""RegMean (Jin et al., 2023): linear layers merged by least squares on what they are given as input."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..algebra.delta import dense
from ..algebra.layout import is_matrix, is_stack, of_experts
from ..algebra.linalg import solve_psd
from ..errors import ParameterError
from ..merging.changes import Computed
from ..models.linear import linear_layers
from ..models.translation import Stored, Translation
from ..models.vectors import Vectors
from ..storage.run import bar
from .data import TaskData
from .expert_inputs import Inputs, expert_inputs
from .inplace import Reparametrised
from .learned import asking, combined, mean_change, moved, paired, task_changes
from .padding import Padding

# What the authors multiply the entries of X^T X beside the diagonal by (their alpha, 0.9 for most models).
SHRINK = 0.9


def regmean(
    vectors: Vectors,
    model: nn.Module,
    data: Sequence[TaskData],
    *,
    at: Vectors | None = None,
    shrink: float = SHRINK,
) -> Computed:
    """(sum_m B_m G_m) (sum_m G_m)^{-1} with G_m = sum_i W_e[i, m] X_i^T X_i per linear layer (AE paper, Table 5).

    X_i [tokens, in] are the layer's inputs when the model at theta_0 plus the vector of task i is asked about the
    task's data: see task_changes for where that is when the vectors are bases, and ``at``. The paper is silent about
    it; with its task models still at hand, ``at`` is the task vectors. Sums over tokens, as in the formula: a task with
    more data counts more. Padding (where a model is given an attention mask, or a decoder labels) does not count.

    Weights of other layers, biases, and layers that no data reaches take the plain mean of the vectors, as the authors
    do; ``report`` counts them. An expert is a layer, also where all experts are one tensor: one without any row is in
    the report with its number. Where the sum of the G_m is singular, directions that no input has stay at theta_0.

    Holds, in float64, X^T X of every linear layer twice and a copy of these layers' weights, whatever T and K.

    Args:
        shrink: factor of the entries of G beside the diagonal, 0 to 1.

    Raises:
        ParameterError: data that does not fit the tasks, or ``shrink`` out of range.
        MismatchError: the model is not the base.
    """
    if not 0 <= shrink <= 1:
        raise ParameterError(f"shrink must lie between 0 and 1, got {shrink}; the authors use 0.9")
    given, shares, points = paired(vectors, data), vectors.data_weights(), task_changes(vectors, at)
    layers, turned = linear_layers(model, vectors.names), set()
    above: dict[str, Tensor] = {}
    below: dict[str, Tensor] = {}
    with asking(vectors, model) as weights, bar("RegMean", len(given), "task") as shown:
        for index, task in given:
            change, row = points[index], shares[index]
            if change is not None:
                for name, inputs in input_products(model, moved(weights, change), layers, task).items():
                    shrunk = shrink * inputs.product + (1 - shrink) * _diagonal(inputs.product)
                    mixed = dense(combined(vectors.deltas(name), row.tolist())).to(shrunk.device)
                    mixed = mixed.reshape(*shrunk.shape[:-2], -1, mixed.shape[-1])
                    _accumulate(above, name, (mixed.mT if inputs.turned else mixed) @ shrunk)
                    _accumulate(below, name, float(row.sum()) * shrunk)
                    turned.update([name] if inputs.turned else [])
            shown.update()
    with_inputs = layers.keys() | expert_weights(model, vectors.names).keys()
    solved, idle = len(below), [name for name in vectors.names if name in with_inputs and name not in below]
    tensors = {}
    for name in vectors.names:
        if name not in below:
            tensors[name] = mean_change(vectors, name).float()
            continue
        product, mean = below.pop(name).cpu(), lambda name=name: mean_change(vectors, name).float()
        found, unseen = _solution(product, above.pop(name).cpu(), name in turned, mean)
        tensors[name] = found.reshape(vectors.base.tensors[name].shape)
        idle += [f"{name}[{expert}]" for expert in unseen]
    report = {"solved": solved, "averaged": len(vectors.names) - solved, "layers_without_input": idle}
    return Computed(vectors, "regmean", tensors, report)


def expert_weights(model: nn.Module, names: Sequence[str]) -> dict[str, Stored]:
    """{stored weight: where it is} for those of ``names`` that the model holds in a parameter of all experts."""
    stored = Translation(model, names).stored
    return {
        name: place
        for name, place in stored.items()
        if all(of_experts(part.parameter) for part in place.parts)
        and (is_stack(name, place.shape) or is_matrix(name, place.shape))
    }


def input_products(
    model: nn.Module, leaves: dict[str, Tensor], layers: dict[str, str], task: TaskData
) -> dict[str, Inputs]:
    """{weight: X^T X of its inputs} that a task's data makes for each of ``layers``, and each expert, that it reaches.

    What a readout computes once for all of the data, as the embeddings of class names, is counted once.
    """
    found: dict[str, Tensor] = {}
    asked, empty = Reparametrised(model, leaves), True
    others = expert_weights(model, [name for name in leaves if name not in layers])
    names = {stored.parts[0].parameter for stored in others.values()}
    parameters = {name: weight for name, weight in asked.weights.items() if name in names}
    padding = Padding(model)
    linear = _watching(model, layers, found, padding)
    with torch.no_grad(), padding.watched(), linear, expert_inputs(model, parameters, padding) as experts:
        readout = task.fixed(asked).readout
        for batch in task.batches:
            readout(asked, batch)
            empty = False
    if empty:
        raise ParameterError(f'the data of "{task.name}" is empty')
    modules = dict(model.named_modules())
    inputs = {name: Inputs(x, not isinstance(modules[layers[name]], nn.Linear)) for name, x in found.items()}
    return inputs | {name: given for name, stored in others.items() if (given := experts.of(stored)) is not None}


@contextlib.contextmanager
def _watching(model: nn.Module, layers: dict[str, str], found: dict[str, Tensor], padding: Padding) -> Iterator[None]:
    def take(weight: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = padding.without(args[0].detach()).to(torch.float64)
            _accumulate(found, weight, rows.T @ rows)

        return hook

    modules = dict(model.named_modules())
    hooks = [modules[layer].register_forward_pre_hook(take(weight)) for weight, layer in layers.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _accumulate(sums: dict[str, Tensor], name: str, part: Tensor) -> None:
    sums[name] = sums[name].add_(part) if name in sums else part


def _diagonal(product: Tensor) -> Tensor:
    """[.., k, k] with zeros beside the diagonal."""
    return torch.diag_embed(product.diagonal(dim1=-2, dim2=-1))


def _solution(product: Tensor, above: Tensor, turned: bool, mean: Callable[[], Tensor]) -> tuple[Tensor, list[int]]:
    """float32 as it is stored, and of E matrices those that no row was sent to, which keep their part of the mean."""
    if product.ndim == 2:
        solution = solve_psd(product, above.T).float()  # [in, out]
        return (solution if turned else solution.T).contiguous(), []
    found = torch.stack([_solution(*pair, turned, mean)[0] for pair in zip(product, above, strict=True)])
    unseen = [expert for expert, part in enumerate(product) if not part.any()]
    if unseen:
        found[unseen] = mean().reshape(found.shape)[unseen]
    return found, unseen
