"""Small models, task vectors and data for the merging methods that need data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tvbases_hf import Vectors
from tvbases_hf.algebra.delta import dense
from tvbases_hf.learning.data import TaskData
from tvbases_hf.storage.checkpoint import Checkpoint

NAMES = ("math", "code", "chat")


def answers(model: Any, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The readout of a plain module: logits of x, and y."""
    return model(batch[0]), batch[1]


def unlabelled(model: Any, batch: tuple[Tensor, ...]) -> tuple[Tensor, None]:
    return model(batch[0]), None


def random_states(model: nn.Module, count: int, size: float = 0.3, seed: int = 0) -> list[dict[str, Tensor]]:
    """State dicts of fine-tunes: every weight moved by normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {n: t + size * torch.randn(t.shape, generator=generator, dtype=t.dtype) for n, t in stored(model).items()}
        for _ in range(count)
    ]


def stored(model: nn.Module) -> dict[str, Tensor]:
    """The state dict as a file holds it: tied weights once."""
    found: dict[int, str] = {}
    state = model.state_dict(keep_vars=True)
    return {n: t.detach() for n, t in state.items() if found.setdefault(id(t), n) == n}


def vectors_of(model: nn.Module, states: Sequence[Mapping[str, Tensor]]) -> Vectors:
    base = Checkpoint.from_state_dict({name: tensor.clone() for name, tensor in stored(model).items()})
    models = {name: Checkpoint.from_state_dict(dict(state)) for name, state in zip(NAMES, states, strict=False)}
    return Vectors.of_models(base, models)


def one_hot(vectors: Vectors) -> Vectors:
    """Bases with M = T and a one-hot encoder: the task vectors by another way."""
    from tvbases_hf.bases import BasisWeights

    identity = torch.eye(len(vectors), dtype=torch.float64)
    return vectors.mixed(BasisWeights("rand_select", identity, identity, 0.0, 0.0, 0.0))


def labelled_data(
    inputs: int, labels: int, sizes: Sequence[int] = (12, 8, 5), batch: int = 4, dtype: torch.dtype = torch.float32
) -> list[TaskData]:
    """Normal inputs and random labels for each task."""
    generator = torch.Generator().manual_seed(7)
    data = []
    for name, size in zip(NAMES, sizes, strict=False):
        x = torch.randn(size, inputs, generator=generator, dtype=dtype)
        y = torch.randint(0, labels, (size,), generator=generator)
        data.append(TaskData(name, list(zip(x.split(batch), y.split(batch), strict=True)), answers))
    return data


def changes(found: Any) -> dict[str, Tensor]:
    return {name: dense(found.change(name)) for name in found.names}


def bits(model: nn.Module) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in model.state_dict().values()]


def unchanged(model: nn.Module, before: Sequence[Tensor]) -> bool:
    """Bit-identical weights, and no gradient left behind."""
    same = all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before, strict=True))
    return same and all(parameter.grad is None for parameter in model.parameters())
