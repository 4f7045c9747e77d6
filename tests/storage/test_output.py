"""Outputs: the old one or the new one and never half of either; files that safetensors reads, written in any order."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import math
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from tvbases_hf.errors import OutputError
from tvbases_hf.storage import output
from tvbases_hf.storage.checkpoint import Checkpoint, TensorInfo
from tvbases_hf.storage.output import check_output, contains_only, transaction, write_json
from tvbases_hf.storage.tensor_files import TensorFiles
from zoo.models import read_directory

OURS = "ours.json"
OLD, NEW = {OURS: "old", "a": "old a"}, {OURS: "new", "b": "new b", "sub/c": "new c"}


def is_ours(directory: Path) -> bool:
    return (directory / OURS).is_file() and contains_only(directory, (OURS, "a", "b", "sub"))


def put(directory: Path, content: dict[str, str]) -> None:
    for name, text in content.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text)


def content(directory: Path) -> dict[str, str]:
    return {str(f.relative_to(directory)): f.read_text() for f in directory.rglob("*") if f.is_file()}


def write_new(out: Path) -> None:
    with transaction(out, is_ours) as work:
        put(work, NEW)


def assert_alone(out: Path, expected: dict[str, str] | None) -> None:
    """``out`` is exactly that, and nothing else was left beside it."""
    assert (content(out) if out.exists() else None) == expected
    assert {entry.name for entry in (out.parent.iterdir() if out.parent.exists() else ())} <= {out.name}


# --- what a transaction leaves ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", ["absent", "empty", "ours"])
@pytest.mark.parametrize("exchange", [True, False])
def test_the_new_output_takes_the_place_of_the_old_one(
    tmp_path: Path, before: str, exchange: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "place" / "out"
    out.mkdir(parents=True)
    if before == "absent":
        out.rmdir()
    elif before == "ours":
        put(out, OLD)
    if not exchange:
        monkeypatch.setattr(output, "_exchange", lambda *_: False)
    write_new(out)
    assert_alone(out, NEW)


def test_missing_parents_are_made(tmp_path: Path) -> None:
    write_new(tmp_path / "a" / "b" / "out")
    assert_alone(tmp_path / "a" / "b" / "out", NEW)


@pytest.mark.parametrize("before", [None, OLD])
@pytest.mark.parametrize("error", [RuntimeError("ours"), KeyboardInterrupt(), OSError(errno.EIO, "input/output error")])
def test_an_error_inside_leaves_the_old_output(tmp_path: Path, before: dict[str, str] | None, error: Any) -> None:
    out = tmp_path / "out"
    if before:
        put(out, before)
    with pytest.raises(type(error)), transaction(out, is_ours) as work:
        put(work, NEW)
        raise error
    assert_alone(out, before)


@contextlib.contextmanager
def failing(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, at: int, number: int) -> Iterator[list[int]]:
    """The ``at``-th call of a function of the system fails with this error number."""
    real, calls = getattr(owner, name), [0]

    def call(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == at:
            raise OSError(number, os.strerror(number), str(arguments[0]))
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, call)
        yield calls


@pytest.mark.parametrize("before", [None, {}, OLD])
@pytest.mark.parametrize("exchange", [True, False])
def test_a_rename_that_fails_leaves_the_old_output(
    tmp_path: Path, before: dict[str, str] | None, exchange: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchange:
        monkeypatch.setattr(output, "_exchange", lambda *_: False)
    failures = 0
    for at in range(1, 10):
        out = tmp_path / str(at) / "out"
        if before is not None:
            out.mkdir(parents=True)
            put(out, before)
        with failing(monkeypatch, os, "rename", at, errno.EACCES) as calls:
            try:
                write_new(out)
            except OutputError as error:
                assert str(out) in str(error) and "cannot be written" in str(error)
                failures += 1
                assert_alone(out, before)
                continue
        assert calls[0] < at, "every rename was made to fail once"
        assert_alone(out, NEW)
        break
    assert failures == (0 if exchange and before is not None else 2 if before is not None else 1)


@pytest.mark.parametrize("before", [None, OLD])
def test_a_sync_that_fails_leaves_the_old_output(
    tmp_path: Path, before: dict[str, str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    if before:
        put(out, before)
    with failing(monkeypatch, os, "fsync", 2, errno.EIO), pytest.raises(OSError, match="Input/output"):
        write_new(out)
    assert_alone(out, before)


def write_tensors(out: Path) -> None:
    with transaction(out, is_ours, needed_bytes=100) as work:
        files = TensorFiles(work, "b", {"x": TensorInfo((4, 3), torch.float32), "y": TensorInfo((5,), torch.float16)})
        for row in range(4):
            files.write("x", torch.full((3,), float(row)), 3 * row)
        files.write("y", torch.ones(5, dtype=torch.float16))
        write_json(work / OURS, {"version": "new"})
        (work / "a").write_text("text")


class FullDisk:
    """A file that takes no more than ``room`` writes, counted over all files together."""

    def __init__(self, stream: Any, room: list[int]) -> None:
        self.stream, self.room = stream, room

    def __enter__(self) -> FullDisk:
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, data: Any) -> int:
        self.room[0] -= 1
        if self.room[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.stream.write(data)


@pytest.mark.parametrize("before", [None, OLD])
def test_a_disk_that_fills_at_any_write_leaves_the_old_output(
    tmp_path: Path, before: dict[str, str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import builtins
    import io

    real = builtins.open
    for writes in range(100):
        out = tmp_path / str(writes) / "out"
        if before:
            put(out, before)
        out.parent.mkdir(exist_ok=True)
        room = [writes]

        def fills(file: Any, mode: str = "r", *rest: Any, room: list[int] = room, **options: Any) -> Any:
            stream = real(file, mode, *rest, **options)
            return FullDisk(stream, room) if set(mode) & set("wa+") else stream

        with monkeypatch.context() as patch:
            patch.setattr(builtins, "open", fills)
            patch.setattr(io, "open", fills)  # pathlib's
            try:
                write_tensors(out)
            except OutputError as error:
                assert "is full" in str(error) and "free some space" in str(error)
                assert_alone(out, before)
                continue
        assert {f.name for f in out.iterdir()} == {OURS, "a", "b.safetensors"}
        break
    assert writes >= 8  # a header, four rows, a vector, two texts


def test_a_disk_that_is_too_small_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10**9))
    entered = False
    with (
        pytest.raises(OutputError, match=r"is full: 5 GB are needed, 1 GB are free"),
        transaction(tmp_path / "out", is_ours, 5 * 10**9),
    ):
        entered = True
    assert not entered
    assert_alone(tmp_path / "out", None)
    with transaction(tmp_path / "out", is_ours, 10**9) as work:
        put(work, NEW)
    assert_alone(tmp_path / "out", NEW)


def test_an_input_that_cannot_be_read_inside_is_not_called_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), transaction(tmp_path / "out", is_ours):
        (tmp_path / "no such input").read_text()
    assert_alone(tmp_path / "out", None)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["file", "foreign", "ours and more", "dangling link", "below a file"])
def test_what_this_program_did_not_write_is_left_alone(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    match kind:
        case "file":
            out.write_text("mine")
        case "foreign":
            put(out, {"thesis.txt": "mine"})
        case "ours and more":
            put(out, OLD | {"thesis.txt": "mine"})
        case "dangling link":
            out.symlink_to(tmp_path / "nowhere")
        case "below a file":
            (tmp_path / "file").write_text("mine")
            out = tmp_path / "file" / "out"
    before = content(tmp_path)
    with pytest.raises(OutputError) as caught:
        write_new(out)
    assert str(out) in str(caught.value)
    assert content(tmp_path) == before
    assert out.is_symlink() == (kind == "dangling link")
    with pytest.raises(OutputError):
        check_output(out, is_ours)


def test_a_refusal_names_what_is_in_the_way(tmp_path: Path) -> None:
    put(tmp_path / "out", {"thesis.txt": "mine", "zebra": ""})
    with pytest.raises(OutputError, match=r"2 entries, first: thesis\.txt\); nothing was changed\. Choose another"):
        write_new(tmp_path / "out")


def test_a_link_to_our_output_stays_a_link(tmp_path: Path) -> None:
    put(tmp_path / "disk" / "target", OLD)
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "target")
    write_new(tmp_path / "out")
    assert (tmp_path / "out").is_symlink()
    assert_alone(tmp_path / "disk" / "target", NEW)


# --- leftovers --------------------------------------------------------------------------------------------------------


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def leftover(out: Path, pid: int, host: str = "", name: str = "") -> Path:
    scratch = out.parent / f".{name or out.name}.tvbases-{host or socket.gethostname()}-{pid}-0123abcd"
    put(scratch / out.name, {"half": "written"})
    return scratch


def test_leftovers_of_dead_processes_are_removed(tmp_path: Path) -> None:
    left = leftover(tmp_path / "out", dead_process())
    write_new(tmp_path / "out")
    assert not left.exists()
    assert_alone(tmp_path / "out", NEW)


@pytest.mark.parametrize(
    "owner", ["this process", "a living process", "another host", "another output", "a longer host"]
)
def test_leftovers_that_may_be_in_use_are_kept(tmp_path: Path, owner: str) -> None:
    out = tmp_path / "out"
    match owner:
        case "this process":
            left = leftover(out, os.getpid())
        case "a living process":
            left = leftover(out, os.getppid())
        case "another host":
            left = leftover(out, dead_process(), host="elsewhere")
        case "another output":
            left = leftover(out, dead_process(), name="out2")
        case _:  # node and node-17: the number after our name belongs to the other's
            left = leftover(out, os.getpid(), host=f"{socket.gethostname()}-{dead_process()}")
    write_new(out)
    assert content(left) == {"out/half": "written"}
    assert content(out) == NEW


def test_leftovers_are_removed_before_the_space_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = leftover(tmp_path / "out", dead_process())
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=0 if left.exists() else 10**9))
    with transaction(tmp_path / "out", is_ours, 1000) as work:
        put(work, NEW)
    assert_alone(tmp_path / "out", NEW)


def test_an_output_that_a_killed_run_had_moved_aside_comes_back(tmp_path: Path) -> None:
    out = tmp_path / "out"
    scratch = leftover(out, dead_process())
    put(scratch / ("out" + output.ASIDE), OLD)  # killed after the old one was moved and before the new one was
    with pytest.raises(RuntimeError), transaction(out, is_ours):
        raise RuntimeError
    assert_alone(out, OLD)


def test_names_with_special_characters_are_names(tmp_path: Path) -> None:
    out = tmp_path / "a[1] *?"
    left = leftover(out, dead_process())
    write_new(out)
    assert not left.exists()
    assert_alone(out, NEW)


# --- tensor files -----------------------------------------------------------------------------------------------------

DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.int64,
    torch.int8,
    torch.uint8,
    torch.bool,
)
shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
specs = st.dictionaries(
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12).filter(
        lambda name: name != "__metadata__"
    ),
    st.tuples(shapes, st.sampled_from(DTYPES)),
    min_size=1,
    max_size=6,
)


def filled(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Random bits that are numbers of this dtype."""
    values = torch.randint(0, 2, (math.prod(shape),), generator=torch.Generator().manual_seed(seed)) * 1.5
    return (values + torch.arange(math.prod(shape)) % 7).to(dtype).reshape(shape)


def same(a: Tensor, b: Tensor) -> bool:
    bits = [t.reshape(-1).contiguous().view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)


@settings(deadline=None, max_examples=40)
@given(specs=specs, data=st.data(), shard=st.sampled_from([None, 1, 40, 200, "1KB"]))
def test_files_written_in_any_order_are_what_safetensors_reads(
    specs: dict[str, tuple[tuple[int, ...], torch.dtype]],
    data: st.DataObject,
    shard: int | str | None,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    directory = tmp_path_factory.mktemp("files")
    tensors = {name: filled(*spec, seed) for seed, (name, spec) in enumerate(specs.items())}
    infos = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    files = TensorFiles(directory, "model", infos, shard)
    pieces = []
    for name, tensor in tensors.items():
        cuts = sorted(data.draw(st.lists(st.integers(0, tensor.numel()), max_size=3)))
        ends = [0, *cuts, tensor.numel()]
        pieces += [(name, start, stop) for start, stop in itertools.pairwise(ends)]
    for name, start, stop in data.draw(st.permutations(pieces)):
        files.write(name, tensors[name].reshape(-1)[start:stop], start)

    read = read_directory(directory)
    assert read.keys() == tensors.keys()
    assert all(same(read[name], tensor) for name, tensor in tensors.items())
    names = {file.name for file in directory.glob("*.safetensors")}
    if names != {"model.safetensors"}:
        index = json.loads((directory / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"]) == set(tensors) and set(index["weight_map"].values()) == names
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
        assert all(f"-of-{len(names):05}" in name for name in names)
    opened = Checkpoint.open(directory)
    assert all(same(opened.read(name), tensor) for name, tensor in tensors.items())
    shutil.rmtree(directory)


def test_the_same_tensors_make_the_same_files_whatever_the_order_they_are_named_in(tmp_path: Path) -> None:
    infos = {name: TensorInfo((3,), dtype) for name, dtype in zip("cabd", (*DTYPES[1:4], torch.float32), strict=True)}
    for directory, names in (("1", "abcd"), ("2", "dcba")):
        (tmp_path / directory).mkdir()
        for shard in (None, 8):
            TensorFiles(tmp_path / directory, f"s{shard}", {name: infos[name] for name in names}, shard)
    first, second = ({f.name: f.read_bytes() for f in (tmp_path / d).iterdir()} for d in "12")
    assert first == second and len(first) > 3


def test_every_tensor_starts_at_a_multiple_of_its_width(tmp_path: Path) -> None:
    """torch can map a tensor only from such a place."""
    infos = {f"{'x' * i}{dtype}": TensorInfo((3,), dtype) for i, dtype in enumerate(reversed(DTYPES))}
    files = TensorFiles(tmp_path, "model", infos)
    for name, slot in files._slots.items():
        assert slot.offset % infos[name].dtype.itemsize == 0
    with safe_open(tmp_path / "model.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt"}  # transformers refuses a file without


def test_a_piece_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    files = TensorFiles(tmp_path, "model", {"x": TensorInfo((4,), torch.float32), "y": TensorInfo((4,), torch.float32)})
    files.write("x", torch.ones(4))
    files.write("y", torch.ones(4))
    for values, start in ((torch.ones(5), 0), (torch.ones(2), 3), (torch.ones(4, dtype=torch.float16), 0)):
        with pytest.raises(ValueError, match="do not fit"):
            files.write("x", 2 * values, start)
    assert all(torch.equal(tensor, torch.ones(4)) for tensor in read_directory(tmp_path).values())


def test_tensors_that_are_not_contiguous_are_written_in_their_own_order(tmp_path: Path) -> None:
    matrix = torch.arange(12.0).reshape(3, 4).T
    TensorFiles(tmp_path, "model", {"x": TensorInfo((4, 3), torch.float32)}).write("x", matrix)
    assert torch.equal(read_directory(tmp_path)["x"], matrix)


def test_json_keeps_every_digit(tmp_path: Path) -> None:
    values = {"pi": math.pi, "tiny": 5e-324, "third": 1 / 3, "names": ["α", "数"]}
    write_json(tmp_path / "x.json", values)
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == values
