"""The tvbases command as several processes, one of which may be killed in the middle.

Run as a script, this file is one of them: its arguments are those of the command, and in KILLED_AT the number of the
piece of a tensor at which the process with number KILLED_RANK kills itself with SIGKILL.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

SECONDS = 120


@dataclass(frozen=True)
class Outcome:
    code: int
    said: str
    """Its output and messages."""


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def launch(
    arguments: list[str],
    size: int = 2,
    *,
    killed: tuple[int, int] | None = None,
    envs: list[dict[str, str]] | None = None,
) -> list[Outcome]:
    """Run the command as ``size`` processes, with the environment that accelerate gives them."""
    port = free_port()
    processes = []
    for rank in range(size):
        env = os.environ | {"OMP_NUM_THREADS": "1", **(envs[rank] if envs else {})}
        if size > 1:
            env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
        if killed is not None:
            env |= {"KILLED_RANK": str(killed[0]), "KILLED_AT": str(killed[1])}
        command = [sys.executable, __file__, *arguments]
        processes.append(
            subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    try:
        return [
            Outcome(process.returncode, said)
            for process in processes
            for said in [process.communicate(timeout=SECONDS)[0]]
        ]
    finally:
        for process in processes:
            process.kill()


def main() -> None:
    from tvbases_hf.cli import main as command
    from tvbases_hf.storage.tensor_files import TensorFiles

    if os.environ.get("RANK", "0") == os.environ.get("KILLED_RANK"):
        write, pieces = TensorFiles.write, 0

        def write_and_die(self: TensorFiles, name: str, values: Any, start: int = 0) -> None:
            nonlocal pieces
            pieces += 1
            if pieces == int(os.environ["KILLED_AT"]):
                os.kill(os.getpid(), signal.SIGKILL)
            write(self, name, values, start)

        TensorFiles.write = write_and_die  # type: ignore[method-assign]
    command()


if __name__ == "__main__":
    main()
