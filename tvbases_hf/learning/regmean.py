"""RegMean (Jin et al., 2023): linear layers merged by least squares on what they are given as input."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..algebra.delta import dense
from ..algebra.linalg import solve_psd
from ..errors import ParameterError
from ..merging.changes import Computed
from ..models.translation import Translation
from ..models.vectors import Vectors
from ..storage.run import bar
from .data import TaskData
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
    do; ``report`` counts them. Where the sum of the G_m is singular, directions that no input has stay at theta_0.

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
    layers, modules = linear_layers(model, vectors.names), dict(model.named_modules())
    turned = {name for name, layer in layers.items() if not isinstance(modules[layer], nn.Linear)}
    above: dict[str, Tensor] = {}
    below: dict[str, Tensor] = {}
    with asking(vectors, model) as weights, bar("RegMean", len(given), "task") as shown:
        for index, task in given:
            change, row = points[index], shares[index]
            if change is not None:
                products = input_products(model, moved(weights, change), layers, task)
                for name, product in products.items():
                    shrunk = shrink * product + (1 - shrink) * product.diag().diag()
                    mixed = dense(combined(vectors.deltas(name), row.tolist())).to(shrunk.device)
                    mixed = mixed.T if name in turned else mixed
                    _accumulate(above, name, mixed @ shrunk)
                    _accumulate(below, name, float(row.sum()) * shrunk)
            shown.update()
    solved = tuple(name for name in vectors.names if name in below)
    tensors = {name: mean_change(vectors, name).float() for name in vectors.names if name not in below}
    for name in solved:
        solution = solve_psd(below.pop(name).cpu(), above.pop(name).cpu().T).float()  # [in, out]
        tensors[name] = (solution if name in turned else solution.T).contiguous()
    unseen = [name for name in layers if name not in solved]
    report = {"solved": len(solved), "averaged": len(vectors.names) - len(solved), "layers_without_input": unseen}
    return Computed(vectors, "regmean", {name: tensors[name] for name in vectors.names}, report)


def linear_layers(model: nn.Module, names: Sequence[str]) -> dict[str, str]:
    """{stored weight: the linear layer that is given its inputs}, for those of ``names`` that are of linear layers.

    Matrices that the model fuses, or that it holds in pieces, share their inputs: rows of one product.
    """
    translation, modules = Translation(model, names), dict(model.named_modules())
    found = {}
    for name, stored in translation.stored.items():
        layers = [part.parameter.rpartition(".")[0] for part in stored.parts]
        if all(_is_linear(modules.get(layer)) for layer in layers) and all(
            part.parameter.endswith("weight") and part.is_of_rows for part in stored.parts
        ):
            found[name] = layers[0]
    return found


def _is_linear(module: nn.Module | None) -> bool:
    """Conv1D is what transformers calls GPT-2's linear layers, whose weights are [in, out]."""
    pytorch_utils = sys.modules.get("transformers.pytorch_utils")  # who has such a layer has imported it
    return isinstance(module, nn.Linear) or (pytorch_utils is not None and isinstance(module, pytorch_utils.Conv1D))


def input_products(
    model: nn.Module, leaves: dict[str, Tensor], layers: dict[str, str], task: TaskData
) -> dict[str, Tensor]:
    """{weight: X^T X [in, in] float64} of the inputs that a task's data makes for each layer that it reaches.

    What a readout computes once for all of the data, as the embeddings of class names, is counted once.
    """
    found: dict[str, Tensor] = {}
    asked, empty = Reparametrised(model, leaves), True
    with torch.no_grad(), _watching(model, layers, found):
        readout = task.fixed(asked).readout
        for batch in task.batches:
            readout(asked, batch)
            empty = False
    if empty:
        raise ParameterError(f'the data of "{task.name}" is empty')
    return found


@contextlib.contextmanager
def _watching(model: nn.Module, layers: dict[str, str], found: dict[str, Tensor]) -> Iterator[None]:
    padding = Padding(model)

    def take(weight: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = padding.without(args[0].detach()).to(torch.float64)
            _accumulate(found, weight, rows.T @ rows)

        return hook

    modules = dict(model.named_modules())
    hooks = [modules[layer].register_forward_pre_hook(take(weight)) for weight, layer in layers.items()]
    try:
        with padding.watched():
            yield
    finally:
        for hook in hooks:
            hook.remove()


def _accumulate(sums: dict[str, Tensor], name: str, part: Tensor) -> None:
    sums[name] = sums[name].add_(part) if name in sums else part
