"""What a stored tensor is to a method of matrices: a matrix, a stack of matrices, or another shape.

Experts of a mixture that are stored in one tensor are matrices one upon the other. A three-dimensional tensor is read
so by its name: kernels of one-dimensional convolutions have three dimensions too, and so have tables of positions.
Kernels of any convolution are other shapes, whose merged change is a mean or a sum, as the TSV paper has it: for every
method, and for full models and adapters alike. DBRX's experts, one below the other in a tensor of two dimensions, are
given in the shape of E matrices.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from .delta import Delta, Dense, dense, matrix_of, reshaped, work_dtype

# gpt-oss, Llama-4, and what transformers 5 and mergekit make of Mixtral and its kin: mlp.experts.down_proj; Aria:
# experts.fc1.weight; Granite-MoE and JetMoE: block_sparse_moe.input_linear.weight, mlp.output_linear.weight; Step-3:
# moe.down_proj.weight.
EXPERTS = re.compile(r"(^|\.)(\w*experts|moe|input_linear|output_linear)\.")
BIAS = re.compile(r"bias$")


def of_experts(name: str) -> bool:
    """Whether a weight is of all experts of a mixture, by its name."""
    return bool(EXPERTS.search(f"{name}.")) and "conv" not in name


def is_stack(name: str, shape: Sequence[int]) -> bool:
    """Whether a weight [E, n, m] is E matrices."""
    return len(shape) == 3 and of_experts(name)


def is_matrix(name: str, shape: Sequence[int]) -> bool:
    """Whether a weight is one matrix: the biases [E, n] of E experts are vectors."""
    return len(shape) == 2 and not (BIAS.search(name) and of_experts(name))


def unstacked(deltas: Sequence[Delta], shape: Sequence[int]) -> list[list[Delta]]:
    """By matrix, the changes of it: views of those that are stored whole.

    One after the other, in the memory of one. Decomposing a whole stack in one call saves what a call costs, not what
    it computes: on one core the loop takes 2.6 times as long for 64 matrices of 32 x 64, 1.06 times for 32 of
    256 x 512, and 0.9 times for 8 of 512 x 768 or 4 of 768 x 2048, as experts of published models are.
    """
    whole = [reshaped(delta, shape, torch.float32) for delta in deltas]
    return [[matrix_of(delta, index) for delta in whole] for index in range(shape[0])]


def stacked(parts: Sequence[Delta]) -> Dense:
    """One change [E, n, m] of those of E matrices; float32 at least."""
    dtype = work_dtype(parts)
    out = torch.empty((len(parts), *parts[0].shape), dtype=dtype, device=parts[0].device)
    for row, part in zip(out, parts, strict=True):
        row.copy_(dense(part, dtype))
    return Dense(out)
