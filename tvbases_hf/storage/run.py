"""How this process works: alone or as one of several, on how many threads, from the start or from where one was killed.

The command line says it once (``using``); what reads and writes models asks ``current``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from torch import Tensor

Item = TypeVar("Item")
Value = TypeVar("Value")


class Team(Protocol):
    """Processes that do one job together, each a share of the weights; number ``rank`` of ``size``."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    @property
    def local_rank(self) -> int:
        """Its number among those on the same machine."""
        ...

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, on each of them."""
        ...

    def same(self, value: Any) -> Any:
        """The first process's value, on each of them."""
        ...

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes by rank, on each of them."""
        ...


@dataclass(frozen=True)
class Alone:
    rank: int = 0
    size: int = 1
    local_rank: int = 0

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor

    def same(self, value: Any) -> Any:
        return value

    def gather(self, value: Any) -> list[Any]:
        return [value]


@dataclass(frozen=True)
class Run:
    team: Team = field(default_factory=Alone)
    resume: bool = True
    workers: int | None = None
    """Threads per process; None for one per processor."""
    memory: int | None = None
    """Bytes that the work of one process may take beside the program itself; None for no limit."""


_RUN: ContextVar[Run] = ContextVar("run")


def current() -> Run:
    return _RUN.get(Run())


@contextlib.contextmanager
def using(run: Run) -> Iterator[None]:
    token = _RUN.set(run)
    try:
        yield
    finally:
        _RUN.reset(token)


def once(work: Callable[[], Value]) -> Value:
    """What the first process's ``work`` returns or raises, on all of them."""
    team = current().team
    if team.size == 1:
        return work()
    outcome: tuple[Value | None, Exception | None] = (None, None)
    if team.rank == 0:
        try:
            outcome = (work(), None)
        except Exception as error:
            outcome = (None, error)
    value, error = team.same(outcome)
    if error is not None:
        raise error
    return value


def share(items: Sequence[Item], weight: Callable[[Item], int]) -> list[Item]:
    """This process's part of the items: consecutive ones, of about the same weight for all. Depends on nothing else."""
    team = current().team
    return shares(items, weight, team.size)[team.rank]


def shares(items: Sequence[Item], weight: Callable[[Item], int], count: int) -> list[list[Item]]:
    """``count`` consecutive parts; an item belongs to the part that its middle falls into."""
    total, before = sum(map(weight, items)) or 1, 0
    parts: list[list[Item]] = [[] for _ in range(count)]
    for item in items:
        middle = before + weight(item) / 2
        parts[min(count - 1, int(middle * count / total))].append(item)
        before += weight(item)
    return parts
