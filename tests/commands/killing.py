"""Runs ``tvbases`` commands in forked children that are killed with SIGKILL, one request per line of standard input.

Started once, as a process of its own: loading torch and transformers takes seconds, and a child inherits them. Nothing
is computed here before a fork, so that a child has no threads to miss.

A request is {"arguments": [...], "root": DIR} with one of
    "step": n         the child kills itself just before its n-th change of a file or directory below DIR,
    "piece": n        ... in the middle of the n-th piece of a tensor that it writes,
    "swap": "after"   ... when the new output has taken the old one's place, before anything else,
    "delay": seconds  it is killed from outside after that time,
or nothing for a run to its end; "fsync": true has the disk written as users have it.

The answer is {"signal": ..., "code": ..., "steps": ..., "seconds": ...}. What a child had to import, the next has.

``["restore", BASIS, TASK, BASE, OUT]``, which is no command, is that function of the library.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
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
    code: Any = 0
    try:
        if request["arguments"][0] == "restore":
            restore(*request["arguments"][1:])
        else:
            sys.argv = ["tvbases", *request["arguments"]]
            main()
    except SystemExit as done:
        code = done.code or 0
    return int(code), steps()


def restore(directory: str, task: str, base: str, out: str) -> None:
    from tvbases_hf import Basis

    Basis.from_pretrained(directory).restore(task, base, out)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    read_end, write_end = os.pipe()
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        code, steps, loaded = 1, 0, set(sys.modules)
        try:
            code, steps = run(request)
        finally:
            os.write(write_end, json.dumps([code, steps, sorted(set(sys.modules) - loaded)]).encode())
            os._exit(0)
    os.close(write_end)
    if "delay" in request:
        time.sleep(request["delay"])
        os.kill(child, signal.SIGKILL)  # at worst a zombie, which keeps its number until it is waited for
    code, steps, imported = None, None, []
    with os.fdopen(read_end, "rb") as pipe, contextlib.suppress(ValueError):  # killed before, or while it told
        code, steps, imported = json.loads(pipe.read())
    _, status = os.waitpid(child, 0)
    killed = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
    seconds = time.monotonic() - started
    for name in imported:
        with contextlib.suppress(Exception):  # modules that a package makes of itself
            importlib.import_module(name)
    return {"signal": killed, "code": code, "steps": steps, "seconds": seconds}


def serve() -> None:
    import mergekit.scripts.run_yaml  # noqa: F401
    import torch
    import transformers
    import typer.main
    from transformers import conversion_mapping

    import tvbases_mergekit
    from tvbases_hf import cli
    from tvbases_hf.basis import basis  # noqa: F401
    from tvbases_hf.cli import tables as report  # noqa: F401
    from tvbases_mergekit import preflight  # noqa: F401

    torch.set_num_threads(1)
    os.fsync = lambda *_: None  # a killed process loses nothing that the kernel already has, and disks can be slow
    tvbases_mergekit.register()
    transformers.AutoConfig  # noqa: B018 (loaded when first named)
    # What every child would make anew, and does not change: thousands of patterns, and the options of all commands.
    conversion_mapping.get_checkpoint_conversion_mapping("llama")
    typer.main.get_command = functools.cache(typer.main.get_command)
    typer.main.get_command(cli.app)
    gc.freeze()  # a child that collects garbage would touch, and so copy, all of this
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    serve()
