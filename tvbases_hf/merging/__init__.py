"""Merging: a method takes the changes of one weight, and its parameters, and returns one change.

It does not know whether the changes are task vectors, bases or reconstructions. Low-rank changes stay in their factors
wherever the mathematics allows; what they become is written as a checkpoint, or as an adapter if all inputs are ones.
Methods that need data (``DATA_METHODS``) take all vectors and a model, and give a change per weight.
"""

from .addition import linear, task_arithmetic
from .learned import as_merge, write_merged
from .merge import Merge, is_merge
from .methods import METHODS, find_method, merged
from .with_data import DATA_METHODS
from .write import write_adapter_merge, write_checkpoint_merge

__all__ = [
    "DATA_METHODS",
    "METHODS",
    "Merge",
    "as_merge",
    "find_method",
    "is_merge",
    "linear",
    "merged",
    "task_arithmetic",
    "write_adapter_merge",
    "write_checkpoint_merge",
    "write_merged",
]
