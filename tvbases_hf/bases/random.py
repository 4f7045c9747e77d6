"""The random baseline of the AE paper: a choice of tasks (RandSelect)."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from .ae import PAPER, fitted
from .registry import construction
from .weights import BasisWeights, check_gram, resolve_num_bases


@construction("rand_select", "rand_select", "Some of the task vectors, chosen at random", PAPER)
def rand_select(
    gram: Tensor, num_bases: float = 0.5, *, seed: Annotated[int, Field(description="chooses the tasks")] = 0
) -> BasisWeights:
    """M of the T task vectors, chosen at random (RandSelect).

    A dropped task is reconstructed by least squares from the kept ones; it cannot be negated on its own.
    """
    gram = check_gram(gram)
    num_tasks = len(gram)
    num_bases = resolve_num_bases(num_bases, num_tasks)
    order = torch.randperm(num_tasks, generator=torch.Generator().manual_seed(seed))
    kept = order[:num_bases].sort().values
    encoder = torch.eye(num_tasks, dtype=torch.float64)[:, kept]
    return fitted("rand_select", gram, encoder)
