"""Runs ``tvbases`` commands in forked children that are killed with SIGKILL, one request per line of standard input.

Started once, as a process of its own: loading torch and transformers takes seconds, and a child inherits them. Nothing
is computed here before a fork, so that a child has no threads to miss.

A request is {"arguments": [...], "root": DIR} with one of
    "step": n         the child kills itself just before its n-th change of a file or directory below DIR,
    "piece": n        ... in the middle of the n-th piece of a tensor that it writes,
    "swap": "after"   ... when the new output has taken the old one's place, before anything else,
    "delay": seconds  it is killed from outside after that time,
or nothing for a run to its end; "fsync": true has the disk written as users have it.

The answer is {"signal": ..., "code": ..., "steps": ..., "seconds": ...}.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.symlink", "os.link"}
FSYNC = os.fsync
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)  # the signal is on its way


def count_steps(root: str, deadly: int | None) -> Callable[[], int]:
    """Watch this process change files below ``root``; before change number ``deadly`` it dies."""
    steps = 0

    def changes_a_file(event: str, arguments: tuple[Any, ...]) -> bool:
        if not arguments or not isinstance(arguments[0], (str, bytes, os.PathLike)):
            return False
        if event in ("os.remove", "os.rmdir") and arguments[1] != -1:
            return True  # named relative to an open directory, as shutil.rmtree does; nothing else here does
        if not os.path.abspath(os.fsdecode(arguments[0])).startswith(root):
            return False
        return event in CHANGES or (event == "open" and isinstance(arguments[2], int) and bool(arguments[2] & WRITING))

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal steps
        if (event in CHANGES or event == "open") and changes_a_file(event, arguments):
            steps += 1
            if steps == deadly:
                die()

    sys.addaudithook(hook)
    return lambda: steps


def die_in_piece(number: int) -> None:
    from tvbases_hf.storage.tensor_files import TensorFiles

    write, pieces = TensorFiles.write, 0

    def write_half(self: TensorFiles, name: str, values: Any, start: int = 0) -> None:
        nonlocal pieces
        pieces += 1
        if pieces == number:
            write(self, name, values.reshape(-1)[: values.numel() // 2], start)
            die()
        write(self, name, values, start)

    TensorFiles.write = write_half  # type: ignore[method-assign]


def die_after_swap() -> None:
    from tvbases_hf.storage import output

    exchange = output._exchange

    def exchange_and_die(a: Any, b: Any) -> bool:
        if exchange(a, b):
            die()
        return False

    output._exchange = exchange_and_die


def run(request: dict[str, Any]) -> tuple[int, int]:
    """In the child: exit code and number of steps, if it lives to tell."""
    from tvbases_hf.cli import main

    steps = count_steps(request["root"], request.get("step"))
    if request.get("fsync"):
        os.fsync = FSYNC
    if "piece" in request:
        die_in_piece(request["piece"])
    if "swap" in request:
        die_after_swap()
    sys.argv = ["tvbases", *request["arguments"]]
    code: Any = 0
    try:
        main()
    except SystemExit as done:
        code = done.code or 0
    return int(code), steps()


def answer(request: dict[str, Any]) -> dict[str, Any]:
    read_end, write_end = os.pipe()
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        code, steps = 1, 0
        try:
            code, steps = run(request)
        finally:
            os.write(write_end, json.dumps([code, steps]).encode())
            os._exit(0)
    os.close(write_end)
    if "delay" in request:
        time.sleep(request["delay"])
        os.kill(child, signal.SIGKILL)  # at worst a zombie, which keeps its number until it is waited for
    _, status = os.waitpid(child, 0)
    with os.fdopen(read_end, "rb") as pipe:
        code, steps = json.loads(pipe.read() or b"[null, null]")
    killed = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
    return {"signal": killed, "code": code, "steps": steps, "seconds": time.monotonic() - started}


def load_all() -> None:
    """Whatever a command imports when it runs, so that a child begins with its work."""
    import importlib
    import pkgutil

    import matplotlib.backends.backend_agg
    import matplotlib.figure  # noqa: F401

    import tvbases_hf

    for module in pkgutil.walk_packages(tvbases_hf.__path__, "tvbases_hf."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)


def serve() -> None:
    import mergekit.scripts.run_yaml  # noqa: F401
    import torch
    import transformers

    import tvbases_mergekit
    from tvbases_hf import cli  # noqa: F401
    from tvbases_hf.basis import basis  # noqa: F401
    from tvbases_hf.cli import tables as report  # noqa: F401
    from tvbases_mergekit import preflight  # noqa: F401

    if sys.argv[1:] == ["all"]:
        load_all()
    torch.set_num_threads(1)
    os.fsync = lambda *_: None  # a killed process loses nothing that the kernel already has, and disks can be slow
    tvbases_mergekit.register()
    transformers.AutoConfig  # noqa: B018 (loaded when first named)
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    serve()
