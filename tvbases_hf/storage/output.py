"""Writing as a transaction: a directory appears whole or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import socket
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import OutputError, TeamError
from .cards import CARD, is_untouched
from .files import home_path, local_path
from .inputs import unchanged
from .journal import Journal, is_of, job_key
from .run import current, once
from .system import check_space, sync, sync_tree, writing

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
    place = home_path(out).resolve()  # a link stays, and what it points to is replaced
    with writing(place, needed_bytes), _folders_above(place):
        scratch = once(lambda: _prepare(place, needed_bytes, key))
        work = scratch / place.name  # programs that write there may put the directory's name into a file
        try:
            _check_seen(work)
            if key is not None:
                _JOURNALS[work] = Journal(scratch, key, team.rank)
            with unchanged():
                yield work
            sync_tree(work)
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
        for name in files_in(work := scratch / out.name):  # what is not of tensors is written anew, and counted then
            if not name.endswith(".safetensors"):
                (work / name).unlink()
    else:
        check_space(out.parent, needed_bytes)
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
    out = home_path(out).resolve()
    with writing(out, needed_bytes), _folders_above(out):
        _sweep(out)
        check_space(out.parent, needed_bytes)
        scratch = _scratch(out)
        scratch.mkdir()
        try:
            with unchanged():
                yield scratch / out.name
            sync_tree(scratch)
            (scratch / out.name).replace(out)
            sync(out.parent)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def preview(out: str | Path, tensors: int | None, needed_bytes: int | None) -> dict[str, Any]:
    """The report of a dry run: what would be written to ``out``, which was checked; numbers where they are known.

    Raises OutputError for a disk without that much room.
    """
    place = home_path(out).absolute()
    check_space(place.parent, needed_bytes or 0)
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
    out = home_path(out)
    _check_above(out, "a file")
    if out.is_dir():
        raise OutputError(f'"{out}" is a directory; give the name of a file')
    if out.exists() and not is_ours(out):
        raise OutputError(f'"{out}" exists and this command did not write it; choose another name, or remove it')


def check_output(out: str | Path, is_ours: Callable[[Path], bool]) -> None:
    """Raise OutputError if ``out`` holds anything that this program did not write, or a card that was changed since."""
    out = home_path(out)
    _check_above(out, "a directory")
    if os.path.ismount(out):
        raise OutputError(f'"{out}" is where a file system begins, which cannot be replaced; name a directory in it')
    if out.is_file() or (out.is_symlink() and not out.is_dir()):
        raise OutputError(f'"{out}" is a file; choose a directory that does not exist yet')
    if out.is_dir() and any(out.iterdir()) and not is_ours(out):
        names = sorted(file.name for file in out.iterdir())
        raise OutputError(
            f'"{out}" exists and holds something that this command did not write ({len(names)} entries, first: '
            f"{names[0]}); nothing was changed. Choose another directory, or remove it yourself"
        )
    changed = [card for card in sorted(out.rglob(CARD)) if not is_untouched(card)]
    if changed:
        raise OutputError(
            f'"{changed[0]}" was changed since it was written; nothing was changed. Choose another directory, or move '
            "the file away"
        )


def check_apart(out: str | Path, inputs: Iterable[str]) -> None:
    """Raise OutputError if ``out`` is one of the inputs, paths as they were given: an earlier output may be one."""
    place = home_path(out).resolve()
    for source in inputs:
        found = map(local_path, (source, *source.split("+")))
        if any(path is not None and path.resolve() == place for path in found):
            raise OutputError(f'"{out}" is one of the models that are read; write the result to another directory')


def _check_above(out: Path, what: str) -> None:
    """Raise OutputError for a path that no system takes, or below a file."""
    if "\0" in str(out):
        raise OutputError(f'"{out}" cannot be {what}: it has a NUL character in it')
    with writing(out):
        out.exists()  # the system's own refusal of a name that is too long
        above = next(parent for parent in out.absolute().parents if parent.exists())
    if not above.is_dir():
        raise OutputError(f'"{out}" cannot be {what}: "{above}" is a file itself')


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
    sync(out.parent)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two paths in one step; False where the kernel or the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    at_cwd, exchange = -100, 2
    return renameat2 is not None and renameat2(at_cwd, os.fsencode(a), at_cwd, os.fsencode(b), exchange) == 0


def write_json(file: Path, value: object) -> None:
    """Readable, key order as given, floats exact (Python's shortest round-trip form)."""
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def files_in(directory: Path) -> list[str]:
    """The names of all files below a directory, relative to it: what a marker tells of an output."""
    return sorted(file.relative_to(directory).as_posix() for file in directory.rglob("*") if not file.is_dir())


def contains_only(directory: Path, patterns: Sequence[str]) -> bool:
    """Whether every entry of the directory matches one of the glob patterns."""
    return all(any(entry.match(pattern) for pattern in patterns) for entry in directory.iterdir())
