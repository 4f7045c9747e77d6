"""What all tests share."""

from __future__ import annotations

import pytest
import torch

# The tests' tensors are tiny: more threads than this cost more than they bring, most of all on a machine with others.
torch.set_num_threads(1)

# Files that take minutes, which several workers should begin with so as to end together.
LONG = ("test_bench_text.py", "test_benches.py", "test_even_errors.py", "test_ranks.py", "test_demo.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
