"""`tvbases hook`: plain `mergekit-yaml`, `mergekit-multi` and `mergekit-pytorch` find our merge methods.

mergekit reads no entry points, so the only way in is a start-up file of the interpreter that runs mergekit. It is
written when the user asks for it and never by the installation of the package. What it does is in `_startup.py`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
import re
import site
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import typer

from tvbases_hf.errors import OutputError
from tvbases_hf.text import printable

MODULE = "_tvbases_mergekit_hook"
MODULE_FILE = f"{MODULE}.py"
PTH_FILE = "tvbases_mergekit_hook.pth"
START_FILE = "tvbases_mergekit_hook.start"  # the same stem: Python 3.15+ then ignores the `import` line of the .pth
FILES = (PTH_FILE, START_FILE, MODULE_FILE)  # start-up files first: the order in which they can be removed

# A .pth line that is to run begins with `import`, and what it raises is printed at every start of Python. The `exec`
# makes room for a `try`, for the day somebody deletes the module and leaves the line.
PTH_LINE = rf'import sys; exec("try:\n import {MODULE} as hook; hook.start()\nexcept Exception: pass")' + "\n"
START_LINE = f"{MODULE}:start\n"

State = Literal[
    "installed", "not installed", "installed for another version", "installed for another interpreter", "damaged"
]


@dataclass(frozen=True)
class HookStatus:
    """What `status` found: the state, the site-packages folder it speaks of, our files there, and one sentence."""

    state: State
    where: Path
    files: tuple[Path, ...]
    detail: str


def install(where: Path | None = None) -> list[Path]:
    """Write the start-up files into `where`, by default this interpreter's site-packages; return them.

    Installing again refreshes them. Raises `OutputError`, and leaves nothing behind, if the folder cannot be written.
    """
    where = _site_packages() if where is None else where
    texts = {MODULE_FILE: _module_text(), **_startup_file(sys.version_info)}
    obsolete = [where / name for name in FILES if name not in texts]
    fresh = [where / name for name in texts if not (where / name).exists()]
    try:
        # The module first: a Python that starts in between must not find a start-up file without it.
        for name, text in texts.items():
            _write(where / name, text)
        _delete(obsolete)
    except OSError as error:
        with contextlib.suppress(OSError):
            _delete(reversed(fresh))
        raise OutputError(
            f"{where}: the start-up hook cannot be written here ({error.strerror or error}); install it from a virtual "
            "environment of your own, or use `tvbases mergekit-yaml`, which needs no hook"
        ) from error
    return [where / name for name in texts]


def remove(where: Path | None = None) -> list[Path]:
    """Delete all that `install` wrote, and what Python compiled from it; return the files that are gone."""
    where = _site_packages() if where is None else where
    found = [*_files_in(where), *_compiled_in(where)]
    try:
        _delete(found)
        with contextlib.suppress(OSError):  # the folder is there and not empty, or is not there
            (where / "__pycache__").rmdir()
    except OSError as error:
        raise OutputError(
            f"{where}: the start-up hook cannot be removed ({error.strerror or error}); delete by hand "
            + ", ".join(path.name for path in _files_in(where))
        ) from error
    return found


def status(where: Path | None = None) -> HookStatus:
    """Whether there is a hook in `where`, by default this interpreter's site-packages, or else in another folder."""
    where = _site_packages() if where is None else where
    if files := _files_in(where):
        return _describe(where, files)
    for folder in _startup_folders():
        if files := _files_in(folder):
            detail = f"{folder} belongs to another interpreter, which must also remove it, but this one reads it too"
            return HookStatus("installed for another interpreter", folder, files, detail)
    detail = "only `tvbases mergekit-yaml` and register() know the methods; `tvbases hook install` changes that"
    return HookStatus("not installed", where, (), detail)


def _describe(where: Path, files: tuple[Path, ...]) -> HookStatus:
    missing = [name for name in (MODULE_FILE, *_startup_file(sys.version_info)) if where / name not in files]
    text = _read(where / MODULE_FILE)
    version, interpreter = _parse_stamp(text)
    again = "`tvbases hook install` writes it again"
    if interpreter and interpreter != _interpreter():
        detail = f"written for {interpreter}, this is {_interpreter()}; {again}"
        return HookStatus("installed for another interpreter", where, files, detail)
    if missing:
        detail = f"{', '.join(missing)} missing, so it does nothing; {again}, `tvbases hook remove` deletes the rest"
        return HookStatus("damaged", where, files, detail)
    if text != _module_text():
        detail = f"written by tvbases-hf {version or 'of unknown version'}, this is {_version()}; {again}"
        return HookStatus("installed for another version", where, files, detail)
    detail = "plain mergekit-yaml finds the methods; TVBASES_NO_HOOK=1 switches it off"
    return HookStatus("installed", where, files, detail)


def _startup_file(version: Sequence[object]) -> dict[str, str]:
    """Name and text of the start-up file for a Python version: always one file, so that nothing runs twice.

    Python 3.15 brings .start files (PEP 829), and later versions ignore, then warn of, `import` lines in .pth files.
    """
    return {START_FILE: START_LINE} if tuple(version[:2]) >= (3, 15) else {PTH_FILE: PTH_LINE}


def _site_packages() -> Path:
    """Where this interpreter installs packages; an error if it does not read start-up files there."""
    where = Path(sysconfig.get_path("purelib"))
    if not any(_same(where, folder) for folder in _startup_folders()):
        raise OutputError(
            f"{where}: {sys.executable} installs packages here but reads no start-up files from it, so a hook would do "
            "nothing; use `tvbases mergekit-yaml`, which needs none"
        )
    return where


def _startup_folders() -> list[Path]:
    """Every folder whose start-up files this interpreter reads."""
    user = [site.getusersitepackages()] if site.ENABLE_USER_SITE else []
    return [Path(folder) for folder in (*site.getsitepackages(), *user)]


def _same(a: Path, b: Path) -> bool:
    return os.path.normcase(os.path.realpath(a)) == os.path.normcase(os.path.realpath(b))


def _files_in(where: Path) -> tuple[Path, ...]:
    return tuple(path for path in (where / name for name in FILES) if path.is_file())


def _compiled_in(where: Path) -> Iterator[Path]:
    yield from (where / "__pycache__").glob(f"{MODULE}.*.pyc")
    with contextlib.suppress(NotImplementedError):  # an interpreter that caches nothing
        elsewhere = Path(importlib.util.cache_from_source(str(where / MODULE_FILE)))  # PYTHONPYCACHEPREFIX
        if elsewhere.parent != where / "__pycache__" and elsewhere.is_file():
            yield elsewhere


def _module_text() -> str:
    """The start-up module as this version of the package, run by this interpreter, writes it."""
    source = Path(__file__).with_name("_startup.py").read_text(encoding="utf-8")
    return f"# tvbases-hf {_version()} for {_interpreter()}\n{source}"


def _parse_stamp(text: str) -> tuple[str, str]:
    """Version and interpreter from the first line of an installed module; empty strings if it has no such line."""
    match = re.match(r"# tvbases-hf (\S+) for (.+)\n", text)
    return (match[1], match[2]) if match else ("", "")


def _version() -> str:
    try:
        return metadata.version("tvbases-hf")
    except metadata.PackageNotFoundError:  # run from a source tree
        return "unknown"


def _interpreter() -> str:
    prefix = ascii(os.path.realpath(sys.prefix))
    return f"{platform.python_implementation()} {sys.version_info[0]}.{sys.version_info[1]} in {prefix}"


def _read(path: Path) -> str:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return path.read_text(encoding="utf-8")
    return ""


def _write(path: Path, text: str) -> None:
    """Replace the file in one step: any Python that starts meanwhile reads the old one or the new one."""
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        draft.write_text(text, encoding="utf-8", newline="\n")
        draft.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise


def _delete(paths: Iterator[Path] | Sequence[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def _say(text: str, err: bool = False) -> None:
    typer.echo(printable(text), err=err)


hook_app = typer.Typer(
    name="hook",
    no_args_is_help=True,
    help="Let mergekit's own commands find our methods. These are mergekit-yaml, mergekit-multi and mergekit-pytorch.",
)


@hook_app.command("install", epilog="Example: tvbases hook install && mergekit-yaml merge.yml out/")
def install_command() -> None:
    """Write the start-up hook, or refresh it. It goes into the site-packages of this Python.

    From then on mergekit's own commands know ae_bases and the others.
    The hook acts when mergekit is asked for a method that it lacks,
    and never with TVBASES_NO_HOOK=1 in the environment.
    """
    for path in install():
        _say(f"wrote {path}")
    _say("mergekit-yaml, mergekit-multi and mergekit-pytorch of this environment now find the methods.")
    if importlib.util.find_spec("mergekit") is None:
        _say(f"mergekit is not installed for {sys.executable}: the hook waits for it.", err=True)


@hook_app.command("status", epilog="Example: tvbases hook status")
def status_command() -> None:
    """Say whether the hook is installed, and where. Also whether it fits this version and this interpreter."""
    found = status()
    _say(f"{found.state}: {found.where}")
    for path in found.files:
        _say(f"  {path.name}")
    _say(found.detail)
    if os.environ.get("TVBASES_NO_HOOK", "") not in ("", "0"):
        _say("TVBASES_NO_HOOK is set: the hook does nothing in this shell.")


@hook_app.command("remove", epilog="Example: tvbases hook remove")
def remove_command() -> None:
    """Delete the hook and everything that came with it. Do this before you uninstall the package."""
    gone = remove()
    for path in gone:
        _say(f"deleted {path}")
    left = status()
    if left.files:
        _say(f"{left.state}: {left.where}; {left.detail}", err=True)
    elif not gone:
        _say(f"nothing to remove in {left.where}")
