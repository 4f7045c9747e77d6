"""What the machine does: limits, full and closed places, file systems that cannot do everything, inputs that change."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from mergekit.io.lazy_tensor_loader import LazyTensorLoader
from safetensors.torch import load_file, save_file

from commands.command_line import Outcome, compress, inputs, refused, root, snapshot, tvbases
from oracles.merge_oracle import merge_config, write_config
from tvbases_hf.cli import main
from tvbases_hf.errors import OutputError
from tvbases_hf.storage import output
from tvbases_hf.storage.checkpoint import Checkpoint
from tvbases_hf.storage.output import check_output, transaction
from tvbases_hf.storage.reports import write_report
from zoo.adapter_families import random_adapters
from zoo.hf_models import Family

pytest_plugins = ["zoo.hf_fixtures"]
unix = pytest.mark.skipif(os.name == "nt", reason="Windows has none of these")


def merge(pair: Family) -> list[object]:
    file = write_config(root(pair).with_suffix(".yml"), merge_config(pair, num_bases=1))
    return ["merge", file, root(pair) / "out", "--quiet"]


def negate(pair: Family) -> list[object]:
    return ["negate", *inputs(pair), "--forget", "math", "--alpha", 0.5, "--out", root(pair) / "out"]


def decompose(pair: Family) -> list[object]:
    return ["decompose", *inputs(pair), "--out", root(pair) / "out"]


WRITING = [compress, merge, negate, decompose]
Command = Callable[[Family], list[object]]


# --- limits -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """As under `ulimit -f`."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@unix
@pytest.mark.parametrize("command", WRITING, ids=lambda f: f.__name__)
def test_a_limit_on_the_size_of_files_is_said_and_leaves_nothing(command: Command, pair: Family) -> None:
    arguments = command(pair)
    with files_up_to(10_000):
        assert "`ulimit -f` shows the limit" in refused(root(pair), *arguments)
    assert tvbases(*arguments).code == 0


@unix
def test_so_is_one_that_safetensors_meets(tmp_path: Path) -> None:
    adapters = random_adapters(tmp_path / "models")
    first = next(iter(adapters.tasks))
    arguments = ["negate", *adapters.options(), "--forget", first, "--alpha", 1, "--adapter", "--out", tmp_path / "out"]
    with files_up_to(1000):
        assert "`ulimit -f` shows the limit" in refused(tmp_path, *arguments)
    with files_up_to(100), pytest.raises(OutputError, match="ulimit"):
        write_report(tmp_path / "report.json", {"a": "b" * 100})
    assert not (tmp_path / "report.json").exists()


# --- what is printed to ---------------------------------------------------------------------------------------------


def printing_to(stream: Any, *arguments: object) -> Outcome:
    """The command with this standard output."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["tvbases", *map(str, arguments)])
        with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(said), pytest.raises(SystemExit) as done:
            main()
    return Outcome(int(done.value.code or 0), "", said.getvalue())


@unix
@pytest.mark.parametrize("arguments", [("--help",), ("schema",), ("doctor",), ("--version",)], ids=str)
def test_a_reader_that_has_gone_is_what_the_shell_expects(arguments: tuple[str, ...]) -> None:
    """`tvbases ... | head -1`: 128 + SIGPIPE, and nothing said."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as pipe:
        done = printing_to(pipe, *arguments)
        assert done.err == "" and done.code == 141


@unix
def test_a_pipe_of_the_shell(pair: Family) -> None:
    command = [sys.executable, "-m", "tvbases_hf", "inspect", *map(str, inputs(pair)), "--json", root(pair) / "a.json"]
    done = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert done.stdout is not None and done.stderr is not None
    done.stdout.close()
    assert (done.stderr.read(), done.wait()) == ("", 141)
    assert (root(pair) / "a.json").is_file()  # what was asked for is there


@unix
@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="no such device here")
@pytest.mark.parametrize("arguments", [("--help",), ("schema",), ("doctor",)], ids=str)
def test_a_full_standard_output_is_said_in_one_line(arguments: tuple[str, ...]) -> None:
    with contextlib.suppress(OSError), open("/dev/full", "w", encoding="utf-8") as full:
        done = printing_to(full, *arguments)
    assert done.code == 2 and done.err.startswith("error: ") and done.err.count("\n") == 1
    assert os.strerror(errno.ENOSPC) in done.err


@unix
@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="no such device here")
def test_a_report_into_a_full_device_is_refused_and_the_device_stays() -> None:
    done = tvbases("doctor", "--json", "/dev/full")
    assert (done.code, done.out) == (2, "")
    assert done.err == f'error: "/dev/full" cannot be written: {os.strerror(errno.ENOSPC)}\n'
    assert Path("/dev/full").is_char_device()


# --- file systems -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS], ids=errno.errorcode.get)
def test_a_file_system_that_cannot_sync_is_written(number: int, pair: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    def cannot(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", cannot)
    assert tvbases(*compress(pair, "-m", 1, "--json", root(pair) / "a.json")).code == 0


@pytest.mark.parametrize("command", WRITING, ids=lambda f: f.__name__)
@pytest.mark.parametrize("number", [errno.EIO, errno.EROFS], ids=errno.errorcode.get)
def test_a_disk_that_breaks_is_one_line(
    number: int, command: Command, pair: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", broken)
    assert os.strerror(number) in refused(root(pair), *command(pair))


@pytest.mark.parametrize("number", [errno.EBUSY, errno.EXDEV], ids=errno.errorcode.get)
def test_an_output_where_another_file_system_begins_is_refused(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a volume of a container; where the system does not tell, the renaming does."""
    out = tmp_path / "out"
    out.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(os.path, "ismount", lambda path: Path(path) == out)
        with pytest.raises(OutputError, match="where a file system begins"):
            check_output(out, lambda _: True)

    def cannot(*_: Any) -> None:
        raise OSError(number, os.strerror(number), str(out))

    monkeypatch.setattr(output, "_exchange", lambda *_: False)
    monkeypatch.setattr(os, "rename", cannot)
    with pytest.raises(OutputError, match="cannot be written"), transaction(out, lambda _: True) as work:
        (work / "a").touch()
    assert snapshot(tmp_path) == {"out": "directory"}


# --- inputs -----------------------------------------------------------------------------------------------------------


def touched(file: Path) -> None:
    os.utime(file, ns=(0, 0))


def longer(file: Path) -> None:
    with file.open("ab") as stream:
        stream.write(b" ")


@pytest.mark.parametrize("change", [touched, longer])
@pytest.mark.parametrize(
    "command", [*WRITING, lambda pair: ["inspect", *inputs(pair)]], ids=[*map(str, range(len(WRITING))), "inspect"]
)
def test_an_input_that_changes_while_it_is_read_is_said(
    command: Command, change: Callable[[Path], None], pair: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, read, arguments = pair.tasks["code"] / "model.safetensors", Checkpoint.read, command(pair)
    changed: list[Path] = []

    def read_and_change(self: Checkpoint, name: str) -> Any:
        found = read(self, name)
        if self.label == str(pair.tasks["code"]) and not changed:
            changed.append(file)
            change(file)
        return found

    before = set(snapshot(root(pair)))
    monkeypatch.setattr(Checkpoint, "read", read_and_change)
    done = tvbases(*arguments)
    assert changed and done.code == 2 and "Traceback" not in done.err
    assert f'{pair.tasks["code"]}": model.safetensors was written to while it was read' in done.err
    assert set(snapshot(root(pair))) == before
    monkeypatch.undo()
    if change is touched:
        assert tvbases(*arguments).code == 0  # also while what was opened before is still at hand


@pytest.mark.parametrize("change", [touched, longer])
def test_so_is_one_that_mergekit_reads_itself(
    change: Callable[[Path], None], pair: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = merge_config(pair, "task_arithmetic", weight=1.0)
    arguments = ["mergekit-yaml", write_config(root(pair) / "merge.yml", config), root(pair) / "out", "--quiet"]
    read, changed = LazyTensorLoader.get_tensor, list[Path]()

    def read_and_change(self: LazyTensorLoader, *args: Any, **options: Any) -> Any:
        if Path(self.index.base_path) == pair.tasks["code"] and not changed:
            changed.append(pair.tasks["code"] / "model.safetensors")
            change(changed[0])
        return read(self, *args, **options)

    before = set(snapshot(root(pair)))
    monkeypatch.setattr(LazyTensorLoader, "get_tensor", read_and_change)
    done = tvbases(*arguments)
    assert changed and done.code == 2 and set(snapshot(root(pair))) == before
    assert f'{pair.tasks["code"]}": model.safetensors was written to while it was read' in done.err


def test_mergekit_yaml_reads_a_model_that_was_replaced_since_the_last_merge(pair: Family) -> None:
    """Twice in one process, in which mergekit keeps the files that it has opened."""
    config = merge_config(pair, "task_arithmetic", weight=1.0)
    file, code = write_config(root(pair) / "merge.yml", config), pair.tasks["code"] / "model.safetensors"
    written = []
    for _ in range(2):
        assert tvbases("mergekit-yaml", file, root(pair) / "out", "--quiet").code == 0
        written.append(load_file(root(pair) / "out" / "model.safetensors"))
        tuned = {name: tensor + 1 for name, tensor in load_file(code).items()}
        save_file(tuned, code.with_suffix(".new"), {"format": "pt"})
        code.with_suffix(".new").replace(code)
    for name, tensor in written[0].items():
        torch.testing.assert_close(written[1][name], tensor + 1, rtol=0, atol=1e-6)


def test_an_input_that_another_file_replaces_is_read_to_its_end(pair: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    file, read = pair.tasks["code"] / "model.safetensors", Checkpoint.read
    assert tvbases(*negate(pair)).code == 0
    expected, replaced = snapshot(root(pair) / "out"), list[Path]()

    def read_and_replace(self: Checkpoint, name: str) -> Any:
        found = read(self, name)
        if not replaced:
            replaced.append(file.with_suffix(".new"))
            replaced[0].write_bytes(b"something else")
            replaced[0].replace(file)
        return found

    monkeypatch.setattr(Checkpoint, "read", read_and_replace)
    assert tvbases(*negate(pair), "--threads", 1).code == 0 and replaced
    assert snapshot(root(pair) / "out") == expected
