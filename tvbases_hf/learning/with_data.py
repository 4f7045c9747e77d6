"""The merging methods that need data, by name: ``method(vectors, model, data, **options)`` gives Changes to write."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from ..merging.changes import Made
from ..models.vectors import Vectors
from .adamerging import adamerging
from .atlas import atlas
from .data import TaskData
from .devec import devec
from .fisher import fisher
from .localize import localize, stitch
from .regmean import regmean


def localize_and_stitch(vectors: Vectors, model: nn.Module, data: Sequence[TaskData], **options: Any) -> Made:
    """Masks trained and stitched at once; see localize for the options. The result's ``vectors`` are sparse."""
    return replace(stitch(localize(vectors, model, data, **options)), made_of=vectors)


DATA_METHODS: dict[str, Callable[..., Made]] = {
    "fisher": fisher,
    "fisher_empirical": functools.partial(fisher, empirical=True),
    "regmean": regmean,
    "localize": localize_and_stitch,
    "adamerging": adamerging,
    "adamerging_task": functools.partial(adamerging, per="task"),
    "atlas": atlas,
    "devec": devec,
    "atlas_nonnegative": functools.partial(atlas, nonnegative=True),
}
