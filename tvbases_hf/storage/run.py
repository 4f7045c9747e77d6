"""How this process works: alone or as one of several, on how many threads and which device, with or without bars.

The command line says it once (``using``); what reads and writes models asks ``current``. Models are read on the CPU:
Vectors moves the changes of one weight to its device when they are asked for, what is made of them is computed there,
and tensor_files moves it back to write it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from ..errors import ParameterError

# What find_device knows.
DEVICES = ("cpu", "cuda")
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
    trust_remote_code: bool = False
    """Run the code that comes with a model or a tokenizer, where a library loads it."""
    quiet: bool = False
    """No progress bars; there are none either where nobody watches."""


_RUN: ContextVar[Run] = ContextVar("run")
# Of the main thread, for threads that a host starts.
_main = Run()


def current() -> Run:
    return _RUN.get(_main)


@contextlib.contextmanager
def using(run: Run) -> Iterator[None]:
    """The block works so, and threads that start in it do if this is the main thread."""
    global _main
    token, before, is_main = _RUN.set(run), _main, threading.current_thread() is threading.main_thread()
    if is_main:
        _main = run
    try:
        yield
    finally:
        _RUN.reset(token)
        if is_main:
            _main = before


def bar(title: str, total: int | None, unit: str = "B") -> tqdm:
    """A progress bar, by default in bytes; silent when asked, and when nobody watches."""
    quiet = True if current().quiet else None
    return tqdm(total=total, desc=title, unit=unit, unit_scale=unit == "B", disable=quiet, leave=False)


def track(
    items: Sequence[Item], title: str, weight: Callable[[Item], int] = lambda _: 1, unit: str = "B"
) -> Iterator[Item]:
    """Yield the items, advancing a bar by ``weight`` after each."""
    with bar(title, sum(map(weight, items)), unit) as shown:
        for item in items:
            yield item
            shown.update(weight(item))


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


def find_device(name: str) -> torch.device:
    """``cpu``, ``cuda`` or ``cuda:1``. Of several processes on a machine each takes a GPU of its own with ``cuda``.

    Raises ParameterError, with what to do, for a device that is not there.
    """
    kind, _, index = name.partition(":")
    if kind not in DEVICES or (index and not index.isdecimal()) or (kind == "cpu" and index):
        raise ParameterError(f"--device: {name!r} is unknown; choose cpu, cuda, or one of several as cuda:1")
    if kind == "cpu":
        return torch.device(kind)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        built = "" if torch.version.cuda or torch.version.hip else f" (torch {torch.__version__} is built without it)"
        raise ParameterError(
            f"--device {name}: torch sees no CUDA device{built}; leave --device out to compute on the CPU, or install "
            "a torch with CUDA and check that nvidia-smi shows a GPU"
        )
    number = int(index) if index else current().team.local_rank % count
    if number >= count:
        raise ParameterError(f"--device {name}: there are {count} CUDA devices, the first is cuda:0; choose another")
    return torch.device(kind, number)
