"""Threads: what is read ahead of the work ends with it, and every item is worked on once."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import pytest

from tvbases_hf.storage import run
from tvbases_hf.storage.parallel import each, for_all


def test_nothing_is_read_ahead_once_the_work_has_ended() -> None:
    """Maps that a thread still touched would end the process if their file were cut off by then."""
    begun, ended = threading.Event(), threading.Event()

    def reads(item: int) -> list:
        begun.set()
        time.sleep(0.3)
        ended.set()
        return []

    def work(item: int) -> int:
        assert begun.wait(10)
        raise ValueError("broken off")

    with pytest.raises(ValueError, match="broken off"):
        list(each([0, 1, 2, 3, 4, 5, 6, 7], work, "work", lambda _: 1, reads=reads))
    assert ended.is_set()


@pytest.mark.parametrize("workers", [1, 3])
def test_work_without_a_bar_is_done_once_for_every_item_and_its_failure_is_raised(workers: int) -> None:
    done: list[int] = []
    with run.using(replace(run.current(), workers=workers)):
        for_all(range(40), done.append)
        assert sorted(done) == list(range(40))
        with pytest.raises(ZeroDivisionError):
            for_all([1, 0, 2], lambda number: 1 / number)
        for_all([], done.append)
