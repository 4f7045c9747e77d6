"""Work on many weights at once: some threads, results in order, files read ahead.

torch and the file system work without Python's lock, so threads are enough on one machine. Results come in the order of
the items whatever finishes first: sums of them do not depend on the number of threads.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import ParameterError
from .output import journal_of
from .run import bar, current, share
from .system import readable_size
from .tensor_files import TensorFiles

Item = TypeVar("Item")
Result = TypeVar("Result")

MAX_WORKERS = 8
MADV_WILLNEED = 3
READ_AHEAD = 1 << 28
M_MMAP_THRESHOLD = -3
# Whole tensors, and what their pieces are computed with: pages for these are dear only where pieces are small.
LARGE = 1 << 18


def default_workers() -> int:
    """Threads that help: one per processor that this process may use, up to where the disk is the limit anyway."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MAX_WORKERS, usable)


def each(
    items: Sequence[Item],
    work: Callable[[Item], Result],
    title: str,
    weight: Callable[[Item], int],
    need: Callable[[Item], int] = lambda _: 0,
    reads: Callable[[Item], Iterable[Tensor]] | None = None,
) -> Iterator[tuple[Item, Result]]:
    """Yield (item, ``work(item)``) in order, with a bar in bytes by ``weight``.

    At most ``Run.workers`` items are worked on at a time, fewer where what they ``need`` in bytes is more than
    ``Run.memory``. The first failure ends the rest and is raised in its turn. What the next items will read (mapped
    tensors, from ``reads``) is brought in by the system meanwhile.

    Raises ParameterError, before any work, if one item alone needs more.
    """
    count = max(1, min(current().workers or default_workers(), len(items)))
    gate = Gate(current().memory)
    _check_needs(items, need, gate.budget)
    if gate.budget is not None:
        _give_back_freed()

    ahead = _ReadAhead(items, count, reads)

    def gated(item: Item) -> Result:
        ahead.begin(item)
        with gate.holding(need(item)):
            return work(item)

    with bar(title, sum(map(weight, items))) as shown:
        if count == 1:
            try:
                for item in items:
                    yield item, gated(item)
                    shown.update(weight(item))
            finally:
                ahead.close()
            return
        pool = ThreadPoolExecutor(count, "tvbases", initializer=_alone)
        waiting: deque[tuple[Item, Future[Result]]] = deque((item, pool.submit(gated, item)) for item in items)
        try:
            while waiting:
                item, future = waiting.popleft()
                yield item, future.result()
                shown.update(weight(item))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            ahead.close()


def for_all(items: Sequence[Item], work: Callable[[Item], object]) -> None:
    """``work`` of every item, in any order, without a bar: for what takes a second. The first failure is raised."""
    count = max(1, min(current().workers or default_workers(), len(items)))
    if count == 1:
        for item in items:
            work(item)
        return
    with ThreadPoolExecutor(count, "tvbases", initializer=_alone) as pool:
        for _ in pool.map(work, items):
            pass


def rows(
    items: Sequence[Item],
    work: Callable[[Item], Sequence[float]],
    width: int,
    title: str,
    weight: Callable[[Item], int],
    need: Callable[[Item], int] = lambda _: 0,
    reads: Callable[[Item], Iterable[Tensor]] | None = None,
) -> Tensor:
    """[items, width] float64: a row of numbers for every item, each made by one process and known to all.

    Sums over the rows do not depend on the number of processes or threads.
    """
    team = current().team
    place = {item: index for index, item in enumerate(items)}
    table = torch.zeros(len(items), width, dtype=torch.float64)
    for item, row in each(share(items, weight), work, title, weight, need, reads):
        table[place[item]] = torch.tensor(row, dtype=torch.float64)
    return team.sum(table)


def written(
    files: TensorFiles,
    names: Sequence[str],
    work: Callable[[str], Sequence[float]],
    width: int,
    title: str,
    weight: Callable[[str], int],
    need: Callable[[str], int] = lambda _: 0,
    reads: Callable[[str], Iterable[Tensor]] | None = None,
    tensors: Callable[[str], Sequence[str]] | None = None,
) -> Tensor:
    """The same for ``work`` that writes a tensor, or the ``tensors`` of a name, to files; finished ones are left."""

    def row(name: str) -> Sequence[float]:
        parts = None if tensors is None else tensors(name)
        known = files.finished(name, parts)
        if known is None or len(known) != width:
            known = work(name)
            files.finish(name, known, parts)
        return known

    return rows(names, row, width, title, weight, need, reads)


def remembered(directory: Path, work: Callable[[str], Sequence[float]]) -> Callable[[str], Sequence[float]]:
    """``work`` for ``rows``, of which a killed run of the job that writes ``directory`` has left some results there."""
    journal, place = journal_of(directory)

    def row(name: str) -> Sequence[float]:
        if journal is None:
            return work(name)
        known = journal.entries.get(f"{place}{name} seen")
        if known is not None:
            return known.row
        found = work(name)
        journal.add(f"{place}{name} seen", 0, found)
        return found

    return row


class _ReadAhead:
    """A thread that asks the system for what the item ``distance`` further on reads."""

    def __init__(self, items: Sequence[Item], distance: int, reads: Callable[[Item], Iterable[Tensor]] | None) -> None:
        self._next = dict(zip(items, items[distance:], strict=False)) if reads else {}
        self._reads = reads
        self._pool = ThreadPoolExecutor(1, "tvbases-read") if self._next else None

    def begin(self, item: Any) -> None:
        if self._pool is not None and self._reads is not None and item in self._next:
            following, reads = self._next[item], self._reads
            self._pool.submit(lambda: read_ahead(reads(following)))

    def close(self) -> None:
        """No map is touched afterwards: its file may be cut off then, which ends a process that reads it."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)


def _alone() -> None:
    """The threads share the processors between them: each computes alone."""
    torch.set_num_threads(1)


class Gate:
    """Lets work through as long as what it needs fits a budget."""

    def __init__(self, budget: int | None) -> None:
        self.budget = budget
        self._used = 0
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def holding(self, size: int) -> Iterator[None]:
        with self._changed:
            while self.budget is not None and self._used and self._used + size > self.budget:
                self._changed.wait()
            self._used += size
        try:
            yield
        finally:
            with self._changed:
                self._used -= size
                self._changed.notify_all()


def _check_needs(items: Sequence[Item], need: Callable[[Item], int], budget: int | None) -> None:
    if budget is None or not items:
        return
    largest = max(items, key=need)
    if need(largest) > budget:
        needed, more = readable_size(need(largest)), readable_size(1.05 * need(largest)).replace(" ", "")
        raise ParameterError(
            f"{largest} takes about {needed} of memory with this method, and {readable_size(budget)} are allowed; "
            f"give --memory {more} or more"
        )


def read_ahead(tensors: Iterable[Tensor]) -> None:
    """Ask the system to read mapped tensors that will be needed soon; it does so while we compute. Costs no memory.

    Nothing happens to tensors that are no maps, or where the system has no such call.
    """
    if sys.platform != "linux":
        return
    for tensor in tensors:
        if tensor.device.type == "cpu" and tensor.nbytes:
            start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
            length = min(tensor.data_ptr() + tensor.nbytes - start, READ_AHEAD)
            _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), MADV_WILLNEED)


def _give_back_freed() -> None:
    """Tensors that are freed go back to the system, where glibc allocates: else each thread keeps some of them.

    What is kept so (the largest tensors and the pieces of every thread) would come on top of what the gate counts.
    """
    mallopt = getattr(_libc(), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGE)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
