"""A process that runs commands in forked children and kills them; see killing.py."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest

SIGKILL = 9


class Ask(Protocol):
    def __call__(self, **request: Any) -> dict[str, Any]: ...


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    """Run a command in a process that may be killed; see killing.py."""
    with serving(tmp_path_factory.mktemp("killing") / "stderr") as request:
        yield request


@contextlib.contextmanager
def serving(log: Path) -> Iterator[Ask]:
    """That process; what it and its children say on standard error is in ``log``."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    with log.open("ab") as stderr:
        server = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("killing.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=environment,
        )
    assert server.stdin is not None and server.stdout is not None
    assert server.stdout.readline() == '"ready"\n', log.read_text()

    def request(**content: Any) -> dict[str, Any]:
        assert server.stdin is not None and server.stdout is not None
        server.stdin.write(json.dumps(content) + "\n")
        server.stdin.flush()
        return json.loads(server.stdout.readline())

    yield request
    server.stdin.close()
    server.wait()
