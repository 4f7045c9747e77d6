"""One of several processes, when accelerate or torchrun started it: the first one talks to the user."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from ..errors import MissingExtraError, TvbasesError


@contextlib.contextmanager
def team() -> Iterator[None]:
    """Join the processes that were started together, if there are any."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield
        return
    try:
        from tvbases_accelerate import Processes
    except ImportError as error:
        raise MissingExtraError(f'accelerate is missing ({error}); pip install "tvbases-hf[accelerate]"') from error
    from ..storage.run import Run, using

    processes = Processes()
    try:
        with using(Run(processes)), _silent(processes.rank > 0):
            yield
    except TvbasesError as error:
        raise type(error)(f"[process {processes.rank} of {processes.size}] {error}") from error
    finally:
        processes.close()


@contextlib.contextmanager
def _silent(silent: bool) -> Iterator[None]:
    """What a process other than the first would say, the first says too; only failures are its own."""
    with contextlib.ExitStack() as stack:
        if silent:
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        yield
