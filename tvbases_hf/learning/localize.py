"""Localize-and-Stitch (He et al., 2024): a trained mask per vector, and the mean of the vectors where masks overlap."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..algebra.delta import Delta, Dense, dense
from ..algebra.sums import total
from ..errors import ParameterError
from ..models.vectors import Vectors
from ..storage.run import bar
from .data import TaskData
from .inplace import Reparametrised
from .learned import asking, gradients, moved, paired
from .masked import Csr, MaskedVectors

# The authors' settings for language models. Their step is as long as it is because gradients in S are products of two
# small numbers; the AE paper prints it as 1e-7, its code and the authors' have 1e7.
SPARSITY = 1e-5
BIAS = 3.0
STEP = 1e7
EPOCHS = 10


def localize(
    vectors: Vectors,
    model: nn.Module,
    data: Sequence[TaskData],
    *,
    sparsity: float = SPARSITY,
    bias: float = BIAS,
    lr: float = STEP,
    l1: float = 0.0,
    epochs: int = EPOCHS,
) -> MaskedVectors:
    """S_m = argmin sum_i W_e[i, m] L_i(theta_0 + sigmoid(S) * B_m) + l1 |sigmoid(S)|_1, rounded (AE paper, equation 9).

    Plain gradient descent over all of the data, as the authors have it: only its steps are longer where more is to be
    gained, which is what makes the mask sparse. L_i is the mean over the batches. Kept is where sigmoid(S) > 1/2.

    Holds, for one vector at a time, five tensors of the size of the weights, and the sparse vectors.

    Args:
        sparsity: share of the numbers, the largest of the vector, that the mask starts with: S = ``bias`` there and
            -``bias`` elsewhere.
        lr: step of the descent, for gradients of the loss in nats.
        l1: in nats per number. (The authors' code adds its penalty after the step, so its strength of 1 is 1 / lr here,
            and turns its sign where S > 0: it makes masks more decided, this one smaller as the formula says.)

    Raises:
        ParameterError: data that does not fit the tasks, has no labels or is empty, or an option out of range.
        MismatchError: the model is not the base.
    """
    if not 0 <= sparsity <= 1 or bias <= 0 or lr <= 0 or l1 < 0 or epochs < 0:
        raise ParameterError(
            "sparsity must lie between 0 and 1, bias and lr be positive, l1 and epochs not negative; got "
            f"{sparsity}, {bias}, {lr}, {l1} and {epochs}"
        )
    given, shares = paired(vectors, data), vectors.data_weights()
    found = []
    with (
        asking(vectors, model) as weights,
        bar("Masks", len(vectors) * epochs, "epoch") as shown,
    ):
        for m in range(len(vectors)):
            vector = {
                name: dense(vectors.deltas(name)[m], torch.float32).reshape(weight.shape).to(weight.device)
                for name, weight in weights.items()
            }
            mask = _start(vector, sparsity, bias)
            mixture = [(float(shares[i, m]), task) for i, task in given if shares[i, m] > 0]
            for _ in range(epochs):
                slopes = loss_gradient(model, moved(weights, _masked(vector, mask)), mixture)
                for name, logits in mask.items():
                    chance = logits.sigmoid()
                    slope = slopes.pop(name) * vector[name] + l1 if name in slopes else l1
                    logits.sub_(lr * slope * chance * (1 - chance))
                shown.update()
            found.append({name: Csr.masked(vector[name], mask[name] > 0) for name in vectors.names})
    return MaskedVectors(vectors.labels, tuple(found))


def loss_gradient(
    model: nn.Module, leaves: Mapping[str, Tensor], mixture: Sequence[tuple[float, TaskData]]
) -> dict[str, Tensor]:
    """Gradient in the weights of sum_i w_i L_i, where L_i is the mean loss over the batches of a task; float32."""
    total: dict[str, Tensor] = {}
    asked = Reparametrised(model, leaves)
    for weight, task in mixture:
        task, batches = task.fixed(model, leaves), list(task.batches)
        if not batches:
            raise ParameterError(f'the data of "{task.name}" is empty')
        for batch in batches:
            for name, gradient in gradients(task.loss(asked, batch) * (weight / len(batches)), leaves):
                part = gradient.to(torch.float32)
                total[name] = total[name].add_(part) if name in total else part
    return total


@dataclass(frozen=True)
class Stitched:
    """sum_k w_k B_k / sum_k w_k over the vectors whose mask holds the number; only they, sparse, are held."""

    vectors: MaskedVectors
    weights: tuple[float, ...]
    made_of: Vectors | None = None
    method: str = "localize"

    @property
    def names(self) -> tuple[str, ...]:
        return self.vectors.names

    def change(self, name: str) -> Delta:
        parts = [vector[name] for vector in self.vectors.parts]
        above = torch.zeros(parts[0].shape, dtype=torch.float64).reshape(-1)
        below = torch.zeros_like(above)
        for part, weight in zip(parts, self.weights, strict=True):
            positions = part.positions()
            above[positions] += weight * part.values.to(torch.float64)
            below[positions] += weight
        mean = torch.where(below > 0, above / below.where(below > 0, 1.0), above)
        return Dense(mean.to(torch.float32).reshape(parts[0].shape))


def stitch(vectors: MaskedVectors, weights: Sequence[float] | None = None) -> Stitched:
    """The mean of the masked vectors where their masks overlap. ``weights``: such as the number of tasks of each.

    Raises ParameterError for weights that are not positive, or not one per vector.
    """
    given = [1.0] * len(vectors.labels) if weights is None else list(weights)
    if len(given) != len(vectors.labels) or min(given) <= 0:
        raise ParameterError(f"give one positive weight for each of the {len(vectors.labels)} vectors; got {given}")
    return Stitched(vectors, tuple(given))


def share_masks(masked: MaskedVectors, vectors: Vectors, clusters: Sequence[Sequence[int]]) -> MaskedVectors:
    """One sparse vector per cluster: the mean of its ``vectors`` under the rounded mean of their masks.

    As the clustering paper shares masks. A number is kept that more than half of the cluster's masks hold (a half
    rounds to even, which is 0). The vectors are needed again: a member may lack a number that the shared mask keeps.
    """
    _check_clusters(clusters, len(masked.labels))
    parts = []
    for cluster in clusters:
        part = {}
        for name in masked.names:
            share = torch.stack([masked.parts[k][name].mask() for k in cluster]).to(torch.float32).mean(dim=0)
            deltas = vectors.deltas(name)
            mean = dense(total([deltas[k] for k in cluster], [1 / len(cluster)] * len(cluster)), torch.float32)
            part[name] = Csr.masked(mean.reshape(share.shape), share.round().bool())
        parts.append(part)
    labels = tuple(" + ".join(masked.labels[k] for k in cluster) for cluster in clusters)
    return MaskedVectors(labels, tuple(parts))


def stitch_twice(masked: MaskedVectors, clusters: Sequence[Sequence[int]]) -> Stitched:
    """Masks divided by their number in the cluster and rounded, then stitched over all vectors (clustering paper).

    As the paper has it, 1/2 and less round to 0: within a cluster a number is kept where one mask alone holds it.
    """
    _check_clusters(clusters, len(masked.labels))
    parts = list(masked.parts)
    for cluster in clusters:
        for name in masked.names:
            count = sum((masked.parts[k][name].mask().to(torch.int32) for k in cluster), torch.tensor(0))
            for k in cluster:
                csr = masked.parts[k][name]
                alone = csr.mask() & (count == 1)
                parts[k] = {**parts[k], name: Csr.masked(csr.dense(), alone)}
    return stitch(MaskedVectors(masked.labels, tuple(parts)))


def _start(vector: Mapping[str, Tensor], sparsity: float, bias: float) -> dict[str, Tensor]:
    """S: ``bias`` at the largest numbers of all weights together, -``bias`` at the others."""
    total = sum(part.numel() for part in vector.values())
    count = round(sparsity * total)
    largest = [part.abs().reshape(-1).topk(min(count, part.numel())).values for part in vector.values()]
    least = float(torch.cat(largest).topk(count).values[-1]) if count else float("inf")
    return {name: torch.where(part.abs() >= least, bias, -bias).to(part) for name, part in vector.items()}


def _masked(vector: Mapping[str, Tensor], mask: Mapping[str, Tensor]) -> Callable[[str], Tensor]:
    return lambda name: mask[name].sigmoid() * vector[name]


def _check_clusters(clusters: Sequence[Sequence[int]], count: int) -> None:
    members = sorted(k for cluster in clusters for k in cluster)
    if members != list(range(count)) or not all(clusters):
        raise ParameterError(f"clusters must hold each of the {count} vectors once; got {[list(c) for c in clusters]}")
