"""Writing as a transaction: a directory appears whole or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import shutil
import socket
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import OutputError, TeamError
from .journal import Journal, is_of, job_key
from .run import current, once

# What an old output is called while the new one takes its place, where the two cannot be exchanged in one step.
ASIDE = "-old"
# By the directory that is being written: what is finished in it.
_JOURNALS: dict[Path, Journal] = {}


@contextlib.contextmanager
def transaction(
    out: str | Path, is_ours: Callable[[Path], bool], needed_bytes: int = 0, job: Mapping[str, Any] | None = None
) -> Iterator[Path]:
    """Yield an empty directory beside ``out`` that takes its place when the block ends, and vanishes if it fails.

    ``out`` may be absent, empty, or something that ``is_ours`` recognises, which is then replaced whole. A process
    killed at any time leaves the old ``out`` or the new one; what it had begun is removed by the next run, or, if that
    run has the same ``job`` (whatever decides the output), found in the directory again: see TensorFiles.finished.
    Of several processes (see run.Team) the first prepares and finishes; all get the same directory.

    Raises:
        OutputError: ``out`` is something else, cannot be written, or the disk is (or gets) full.
        TeamError: another process has stopped.
    """
    key, team, kept = None if job is None else job_key(job), current().team, False
    check_output(out, is_ours)
    place = Path(out).expanduser().resolve()  # a link stays, and what it points to is replaced
    with writing(place, needed_bytes), _folders_above(place):
        scratch = once(lambda: _prepare(place, needed_bytes, key))
        work = scratch / place.name  # programs that write there may put the directory's name into a file
        try:
            _check_seen(work)
            if key is not None:
                _JOURNALS[work] = Journal(scratch, key, team.rank)
            yield work
            _sync_tree(work)
            team.gather(None)  # all have come here
            once(lambda: _take_place(work, place))
        except (KeyboardInterrupt, TeamError):
            kept = key is not None
            raise
        finally:
            _JOURNALS.pop(work, None)
            if team.rank == 0 and not kept:
                shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def _folders_above(out: Path) -> Iterator[None]:
    """The folders that ``out`` is to be in; those that were not there vanish again if the block fails."""
    new = [folder for folder in out.parents if not folder.exists()]
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # another process, or a run that can go on, has put something there
            for folder in new:
                folder.rmdir()
        raise


def _prepare(out: Path, needed_bytes: int, key: str | None) -> Path:
    """The scratch directory: a new one, or that of a killed run of the same job."""
    left = _left_by_killed_runs(out)
    wanted = key is not None and current().resume
    same = [scratch for scratch in left if wanted and is_of(scratch, key or "") and (scratch / out.name).is_dir()]
    for scratch in left:  # first, because what a killed run left takes space too
        if scratch not in same[:1]:
            _put_back(scratch / (out.name + ASIDE), out)
            shutil.rmtree(scratch, ignore_errors=True)
    scratch = _scratch(out)
    if same:
        same[0].rename(scratch)
    else:
        _check_space(out.parent, needed_bytes)
        (scratch / out.name).mkdir(parents=True)
    return scratch


def _check_seen(work: Path) -> None:
    """OutputError unless all processes see the directory that the first one has made."""
    seen = current().team.gather(work.is_dir())
    if not all(seen):
        raise OutputError(
            f'process {seen.index(False)} of {len(seen)} does not see "{work.parent.parent}"; processes on several '
            "machines need an output directory that all of them share"
        )


@contextlib.contextmanager
def file_transaction(out: str | Path, is_ours: Callable[[Path], bool], needed_bytes: int = 0) -> Iterator[Path]:
    """Yield where to write a file that takes the place of ``out`` when the block ends, and vanishes if it fails.

    Raises OutputError as ``transaction`` does.
    """
    check_output_file(out, is_ours)
    out = Path(out).expanduser().resolve()
    with writing(out, needed_bytes), _folders_above(out):
        _sweep(out)
        _check_space(out.parent, needed_bytes)
        scratch = _scratch(out)
        scratch.mkdir()
        try:
            yield scratch / out.name
            _sync_tree(scratch)
            (scratch / out.name).replace(out)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def preview(out: str | Path, tensors: int | None, needed_bytes: int | None) -> dict[str, Any]:
    """The report of a dry run: what would be written to ``out``, which was checked; numbers where they are known.

    Raises OutputError for a disk without that much room.
    """
    place = Path(out).expanduser().absolute()
    _check_space(place.parent, needed_bytes or 0)
    return {"dry_run": True, "out": str(out), "tensors": tensors, "bytes": needed_bytes}


def journal_of(work: Path) -> tuple[Journal | None, str]:
    """What is finished in the directory of a transaction that can be resumed, or in one inside it; and its place there.

    The place is a prefix of the names in the journal: nothing, or ``math/``.
    """
    for directory in (work, *work.parents):
        if directory in _JOURNALS:
            inside = work.relative_to(directory).as_posix()
            return _JOURNALS[directory], "" if inside == "." else f"{inside}/"
    return None, ""


def check_output_file(out: str | Path, is_ours: Callable[[Path], bool]) -> None:
    """Raise OutputError if ``out`` is a directory, or a file that this program did not write."""
    out = Path(out).expanduser()
    above = next(parent for parent in out.absolute().parents if parent.exists())
    if not above.is_dir():
        raise OutputError(f'"{out}" cannot be a file: "{above}" is a file itself')
    if out.is_dir():
        raise OutputError(f'"{out}" is a directory; give the name of a file')
    if out.exists() and not is_ours(out):
        raise OutputError(f'"{out}" exists and this command did not write it; choose another name, or remove it')


def check_output(out: str | Path, is_ours: Callable[[Path], bool]) -> None:
    """Raise OutputError if ``out`` holds anything that this program did not write."""
    out = Path(out).expanduser()
    above = next(parent for parent in out.absolute().parents if parent.exists())
    if not above.is_dir():
        raise OutputError(f'"{out}" cannot be a directory: "{above}" is a file')
    if out.is_file() or (out.is_symlink() and not out.is_dir()):
        raise OutputError(f'"{out}" is a file; choose a directory that does not exist yet')
    if out.is_dir() and any(out.iterdir()) and not is_ours(out):
        names = sorted(file.name for file in out.iterdir())
        raise OutputError(
            f'"{out}" exists and holds something that this command did not write ({len(names)} entries, first: '
            f"{names[0]}); nothing was changed. Choose another directory, or remove it yourself"
        )


@contextlib.contextmanager
def writing(out: Path, needed_bytes: int = 0) -> Iterator[None]:
    """Turn the operating system's refusals to write into OutputErrors."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _disk_full(out.parent, needed_bytes) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            raise OutputError(f'"{out}" cannot be written: {error.strerror} ({error.filename})') from error
        raise


def _disk_full(directory: Path, needed_bytes: int) -> OutputError:
    free = readable_size(_free_bytes(directory))
    need = f"{readable_size(needed_bytes)} are needed, " if needed_bytes else ""
    return OutputError(
        f'the disk of "{directory}" is full: {need}{free} are free. Nothing was left behind; '
        "free some space or write to another disk"
    )


def readable_size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _check_space(directory: Path, needed_bytes: int) -> None:
    if needed_bytes > _free_bytes(directory):
        raise _disk_full(directory, needed_bytes)


def _free_bytes(directory: Path) -> int:
    while not directory.exists():
        directory = directory.parent
    return shutil.disk_usage(directory).free


def _scratch(out: Path) -> Path:
    return out.parent / f".{out.name}.tvbases-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"


def _sweep(out: Path) -> None:
    """Remove what killed runs on this host left beside ``out``; a running process keeps its own."""
    for left in _left_by_killed_runs(out):
        _put_back(left / (out.name + ASIDE), out)
        shutil.rmtree(left, ignore_errors=True)


def _left_by_killed_runs(out: Path) -> list[Path]:
    prefix, found = f".{out.name}.tvbases-{socket.gethostname()}-", []
    for left in sorted(out.parent.iterdir()):
        pid, _, rest = left.name.removeprefix(prefix).partition("-")
        if left.name.startswith(prefix) and pid.isdigit() and "-" not in rest and not _is_alive(int(pid)):
            found.append(left)
    return found


def _put_back(aside: Path, out: Path) -> None:
    """Return what was moved aside for something new that did not come."""
    if aside.exists() and not out.exists():
        aside.rename(out)


def _is_alive(pid: int) -> bool:
    if os.name == "nt":
        return True  # Windows has no harmless signal to ask with: leave the directory to the user
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sync_tree(directory: Path) -> None:
    for path in [*directory.rglob("*"), directory]:
        if os.name == "nt" and path.is_dir():
            continue
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _take_place(work: Path, out: Path) -> None:
    """Put ``work`` where ``out`` is, atomically where the system can exchange two directories (Linux)."""
    if not out.exists():
        work.rename(out)
    elif not _exchange(work, out):
        aside = work.with_name(out.name + ASIDE)
        out.rename(aside)
        try:
            work.rename(out)
        finally:
            _put_back(aside, out)
    if os.name != "nt":
        descriptor = os.open(out.parent, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two paths in one step; False where the kernel or the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    at_cwd, exchange = -100, 2
    return renameat2 is not None and renameat2(at_cwd, os.fsencode(a), at_cwd, os.fsencode(b), exchange) == 0


def write_json(file: Path, value: object) -> None:
    """Readable, key order as given, floats exact (Python's shortest round-trip form)."""
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def contains_only(directory: Path, patterns: Sequence[str]) -> bool:
    """Whether every entry of the directory matches one of the glob patterns."""
    return all(any(entry.match(pattern) for pattern in patterns) for entry in directory.iterdir())
