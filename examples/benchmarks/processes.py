"""Commands as processes of their own: their seconds, and their peaks of memory by the operating system (Linux only)."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from pathlib import Path

SAMPLE_SECONDS = 0.005


def measure(command: list[str], cold: bool = False) -> dict[str, float]:
    """Seconds, and peaks of memory in bytes: anonymous and resident of all processes, anonymous of the largest one.

    Anonymous memory is what was allocated; resident memory counts the pages of mapped files too, which can be dropped
    at any time. ``cold`` drops the page cache before (root only). Raises RuntimeError with what a command that fails
    has said.
    """
    if cold:
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("3")
    started, anonymous, resident, largest = time.perf_counter(), 0, 0, 0
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
        while process.poll() is None:
            usage = [_memory(pid) for pid in _family(process.pid)]
            anonymous = max(anonymous, sum(anon for anon, _ in usage))
            resident = max(resident, sum(rss for _, rss in usage))
            largest = max(largest, *(anon for anon, _ in usage), 0)
            time.sleep(SAMPLE_SECONDS)
        seconds = time.perf_counter() - started
        if process.returncode:
            said.seek(0)
            raise RuntimeError(f"{command} failed:\n{said.read().decode(errors='replace')}")
    return {"seconds": seconds, "anonymous": anonymous, "resident": resident, "process": largest}


def _family(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(each for child in children for each in _family(int(child)))]


def _memory(pid: int) -> tuple[int, int]:
    try:
        lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        return tuple(1024 * int(lines[key].split()[0]) for key in ("RssAnon", "VmRSS"))  # type: ignore[return-value]
    except (OSError, KeyError, ValueError):  # it has ended
        return 0, 0
