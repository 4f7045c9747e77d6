"""What all tests share."""

from __future__ import annotations

import torch

# The tests' tensors are tiny: more threads than this cost more than they bring, most of all on a machine with others.
torch.set_num_threads(1)
