"""Progress bars for long work; silent when asked, and when nobody watches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


def bar(title: str, quiet: bool, total: int) -> tqdm:
    """A bar in bytes."""
    return tqdm(total=total, desc=title, unit="B", unit_scale=True, disable=True if quiet else None, leave=False)


def track(items: Sequence[Item], title: str, quiet: bool, weight: Callable[[Item], int]) -> Iterator[Item]:
    """Yield the items, advancing a bar in bytes by ``weight`` after each."""
    with bar(title, quiet, sum(map(weight, items))) as shown:
        for item in items:
            yield item
            shown.update(weight(item))
