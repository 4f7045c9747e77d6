"""What is read ahead of the work ends with it."""

from __future__ import annotations

import threading
import time

import pytest

from tvbases_hf.storage.parallel import each


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
