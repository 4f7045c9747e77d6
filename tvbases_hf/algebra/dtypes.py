"""The dtype in which numbers of several dtypes are worked on."""

from __future__ import annotations

import functools

import torch


def promoted(*dtypes: torch.dtype) -> torch.dtype:
    """The narrowest that holds the numbers of all; eight-bit floats, which torch leaves out, fit into bfloat16."""
    wide = (torch.bfloat16 if dtype.is_floating_point and dtype.itemsize == 1 else dtype for dtype in dtypes)
    return functools.reduce(torch.promote_types, wide)
