"""Fisher merging (Matena & Raffel, 2022): a mean of models in which each weight counts by its information."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..algebra.delta import dense
from ..algebra.sums import total
from ..errors import ParameterError
from ..merging.changes import Computed
from ..models.vectors import Vectors
from ..storage.run import bar
from .data import TaskData
from .inplace import Reparametrised
from .learned import asking, combined, gradients, moved, paired, task_changes

# Share of the mean information that every weight has at least: where the data says nothing, it is a plain mean.
FLOOR = 1e-6
# Up to so many labels the expectation is a sum over all of them; beyond, labels are drawn from the model.
ALL_LABELS = 32


def fisher(
    vectors: Vectors,
    model: nn.Module,
    data: Sequence[TaskData],
    *,
    at: Vectors | None = None,
    empirical: bool = False,
    samples: int | None = None,
    floor: float = FLOOR,
    seed: int = 0,
) -> Computed:
    """sum_m F_m B_m / sum_m F_m with F_m = sum_i W_e[i, m] F_i, entry by entry (AE paper, Table 5).

    F_i is the diagonal Fisher information of task i's data at theta_0 plus the vector of the task: see task_changes
    for where that is when the vectors are bases, and ``at``. ``floor`` times the mean of all F is added to each F_m, so
    that weights without information take the plain mean. (The authors' code raises the F to 1e-6, which depends on the
    scale of the loss.)

    Holds three copies of the weights in float64 and three in the model's dtype, whatever T and K: both sums are linear
    in F_i, so that they are taken task by task.

    Args:
        empirical: squared gradients at the data's labels instead of the expectation over the model's own.
        samples: labels drawn per example; None takes the exact expectation up to ALL_LABELS labels (one draw beyond,
            and for models of tokens).
        seed: of the labels that are drawn.

    Raises:
        ParameterError: data that does not fit the tasks, without labels if ``empirical``, or of a kind that cannot be
            split into examples.
        MismatchError: the model is not the base.
    """
    if floor <= 0 or (samples is not None and samples < 1):
        raise ParameterError(f"floor must be positive and samples at least 1; got {floor} and {samples}")
    given, shares, points = paired(vectors, data), vectors.data_weights(), task_changes(vectors, at)
    with asking(vectors, model) as weights:
        above = {name: torch.zeros_like(weight, dtype=torch.float64) for name, weight in weights.items()}
        below = {name: torch.zeros_like(weight, dtype=torch.float64) for name, weight in weights.items()}
        with bar("Fisher", len(given), "task") as shown:
            for index, task in given:
                change, row = points[index], shares[index]
                if change is not None:
                    found = diagonal_fisher(
                        model, moved(weights, change), task, empirical=empirical, samples=samples, seed=seed
                    )
                    for name, information in found.items():
                        mixed = dense(combined(vectors.deltas(name), row.tolist())).to(information.device)
                        above[name].addcmul_(information, mixed.reshape(information.shape))
                        below[name].add_(information, alpha=float(row.sum()))
                shown.update()
    mean = float(sum(part.sum() for part in below.values())) / max(1, sum(part.numel() for part in below.values()))
    least = floor * mean / len(vectors) if mean > 0 else 1.0
    tensors = {}
    for name in vectors.names:
        plain = dense(total(vectors.deltas(name))).to(above[name].device).reshape(above[name].shape)
        tensors[name] = ((above.pop(name) + least * plain) / (below.pop(name) + least * len(vectors))).float().cpu()
    return Computed(vectors, "fisher", tensors, {"mean_information": mean, "floor": least, "empirical": empirical})


def diagonal_fisher(
    model: nn.Module,
    leaves: Mapping[str, Tensor],
    task: TaskData,
    *,
    empirical: bool = False,
    samples: int | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Mean over the examples of E_y (d log p(y | x) / d theta)^2, float64, for the model with the weights ``leaves``.

    y has the model's own chances, or is the label if ``empirical``. One backward pass per example and label; of a
    sequence, the log-chances of its tokens are added up before they are squared, which for drawn labels is the sum of
    the tokens' information in expectation.
    """
    generator = torch.Generator().manual_seed(seed)
    asked, task = Reparametrised(model, leaves), task.fixed(model, leaves)
    total = {name: torch.zeros_like(leaf, dtype=torch.float64) for name, leaf in leaves.items()}
    count = 0
    for batch in task.batches:
        part: dict[str, Tensor] = {}  # of one batch, in the gradients' own dtype: the sum over batches is in float64
        for example in examples_of(batch, task.name):
            count += 1
            terms = list(_scores(asked, task, example, empirical, samples, generator))
            for position, (chance, score) in enumerate(terms):
                for name, gradient in gradients(score, leaves, keep=position + 1 < len(terms)):
                    wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
                    if name not in part:
                        part[name] = torch.zeros_like(wide)
                    part[name].addcmul_(wide, wide, value=chance)
        for name, squares in part.items():
            total[name].add_(squares)
    if not count:
        raise ParameterError(f'the data of "{task.name}" is empty')
    return {name: part.div_(count) for name, part in total.items()}


def examples_of(batch: Any, name: str = "a task") -> Iterator[Any]:
    """The examples of a batch as batches of one: a mapping, tuple or list of tensors and lists of equal length.

    Raises ParameterError for another kind of batch.
    """
    parts = list(batch.values()) if isinstance(batch, Mapping) else batch
    sliceable = isinstance(parts, (tuple, list)) and all(_is_column(part) for part in parts)
    lengths = {len(part) for part in parts} if sliceable else set()
    if len(lengths) != 1:
        raise ParameterError(
            f'the batches of "{name}" cannot be split into examples: they are neither a mapping nor a tuple of tensors '
            "and lists of one length; give them as one of these"
        )
    for i in range(lengths.pop()):
        if isinstance(batch, Mapping):
            yield {key: value[i : i + 1] for key, value in batch.items()}
        else:
            yield tuple(part[i : i + 1] for part in batch)


def _is_column(part: Any) -> bool:
    return isinstance(part, (list, tuple)) or (isinstance(part, Tensor) and part.ndim > 0)


def _scores(
    asked: Any, task: TaskData, example: Any, empirical: bool, samples: int | None, generator: torch.Generator
) -> Iterator[tuple[float, Tensor]]:
    """(weight, log p(y | x)) of the labels that stand for the expectation."""
    logits, labels = task.labelled(asked, example) if empirical else (task.logits(asked, example), None)
    logs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=1)
    if not len(logs):
        return
    if labels is not None:
        yield 1.0, logs.gather(1, labels[:, None]).sum()
        return
    chances = logs.detach().exp()
    if samples is None and len(logs) == 1 and logs.shape[1] <= ALL_LABELS:
        yield from ((float(chance), logs[0, label]) for label, chance in enumerate(chances[0]))
        return
    for _ in range(samples or 1):
        drawn = torch.multinomial(chances.cpu(), 1, generator=generator).to(logs.device)
        yield 1 / (samples or 1), logs.gather(1, drawn).sum()
