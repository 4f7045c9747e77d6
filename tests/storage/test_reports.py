"""Reports, pictures and pages: whole or not at all, and never in the place of a file that is not ours."""

from __future__ import annotations

import errno
import io
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from commands.command_line import compress, inputs, refused, root, snapshot, tvbases
from tvbases_hf.errors import OutputError
from tvbases_hf.learning.curve import Curve
from tvbases_hf.learning.negation import Negation
from tvbases_hf.storage import reports
from tvbases_hf.storage.reports import is_report, write_picture, write_report, write_whole
from tvbases_hf.version import library_version
from zoo.hf_models import Family

pytest_plugins = ["zoo.hf_fixtures"]
PNG = b"\x89PNG\r\n\x1a\n"
# What a user may have at the place of a report, and would miss.
FOREIGN = {
    "model.safetensors": lambda pair: (pair.base / "model.safetensors").read_bytes(),
    "config.json": lambda pair: (pair.base / "config.json").read_bytes(),
    "thesis.html": lambda _: b"<!DOCTYPE html>\n<html><body>mine</body></html>",
    "photo.png": lambda _: picture(),
    "notes": lambda _: b"mine",
}


def picture() -> bytes:
    image = pytest.importorskip("PIL.Image")
    file = io.BytesIO()
    image.new("RGB", (4, 4)).save(file, format="PNG")
    return file.getvalue()


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("option", ["--json", "--html", "--plot"])
def test_a_file_that_we_did_not_write_stays_and_is_named_before_any_work(option: str, name: str, pair: Family) -> None:
    file = root(pair) / name
    file.write_bytes(FOREIGN[name](pair))
    message = refused(root(pair), "inspect", "--base", "nowhere", "--task", "a=b", option, file)
    assert str(file) in message
    assert "did not write it" in message or ("is written as PNG" in message and option == "--plot")


@pytest.mark.parametrize("write", [lambda f: write_report(f, {}), lambda f: write_picture(f, PNG)])
def test_it_stays_too_when_it_came_during_the_work(write: Callable[[Path], None], pair: Family) -> None:
    before = snapshot(root(pair))
    with pytest.raises(OutputError, match="did not write it"):
        write(pair.base / "model.safetensors")
    assert snapshot(root(pair)) == before


def test_what_we_wrote_is_replaced(pair: Family) -> None:
    pytest.importorskip("matplotlib")
    files = {option: root(pair) / name for option, name in (("--json", "a"), ("--html", "b"), ("--plot", "c.png"))}
    options = [part for item in files.items() for part in item]
    assert tvbases("inspect", *inputs(pair), *options).code == 0
    assert all(is_report(file) for file in files.values())
    first = {file: file.read_bytes() for file in files.values()}
    less = inputs(pair)[:4]
    assert tvbases("inspect", *less, *options).code == 0
    assert all(file.read_bytes() != before for file, before in first.items())
    assert tvbases("inspect", *inputs(pair), *options).code == 0
    assert {file: file.read_bytes() for file in files.values()} == first


def test_the_mark_is_in_every_kind_and_hurts_none(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    write_report(tmp_path / "a.json", {"pi": 3.14, "name": "α"})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {
        "tvbases_report": library_version(),
        "pi": 3.14,
        "name": "α",
    }
    write_picture(tmp_path / "a.png", picture())
    with image.open(tmp_path / "a.png") as opened:
        opened.verify()  # the sums of all chunks
    with image.open(tmp_path / "a.png") as opened:
        assert opened.text == {"tvbases_report": library_version()}
    with image.open(tmp_path / "a.png") as opened, image.open(io.BytesIO(picture())) as same:
        assert opened.tobytes() == same.tobytes()


def test_the_picture_of_a_negation_goes_the_same_way(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from tvbases_lm_eval.plots import plot_negations

    curve = Curve((0.0, 1.0), {"toxic": (0.5, 0.25), "chat": (0.5, 0.75)}, (0.5, 0.75), 1.0)
    negation = Negation("toxic", ("chat",), 0.95, curve)
    plot_negations({"plain": negation.to_json()}, "$toxic$", tmp_path / "curve.png")
    assert is_report(tmp_path / "curve.png") and (tmp_path / "curve.png").read_bytes().startswith(PNG)
    (tmp_path / "mine.png").write_bytes(picture())
    with pytest.raises(OutputError, match="did not write it"):
        plot_negations({"plain": negation.to_json()}, "toxic", tmp_path / "mine.png")


def test_an_empty_file_and_a_new_one_are_written(tmp_path: Path) -> None:
    (tmp_path / "empty.json").touch()
    for name in ("empty.json", "new.json"):
        write_report(tmp_path / name, {"a": 1})
        assert json.loads((tmp_path / name).read_text())["a"] == 1
    assert sorted(file.name for file in tmp_path.iterdir()) == ["empty.json", "new.json"]


@pytest.mark.parametrize("call", ["write_bytes", "fsync", "replace"])
@pytest.mark.parametrize("before", [None, "old"])
def test_a_write_that_fails_leaves_what_was_there(
    call: str, before: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.json"
    if before is not None:
        write_report(file, {"version": before})
    kept = snapshot(tmp_path)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os if call == "fsync" else Path, call, fail)
    with pytest.raises(OutputError, match="is full"):
        write_report(file, {"version": "new"})
    monkeypatch.undo()
    assert snapshot(tmp_path) == kept


@pytest.mark.skipif(os.name == "nt", reason="Windows has no pipes with names in directories")
def test_a_pipe_and_a_device_are_written_and_stay_what_they_are(tmp_path: Path) -> None:
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    write_report(pipe, {"a": 1})
    reader.join()
    assert json.loads(read[0])["a"] == 1 and pipe.is_fifo()
    write_whole("/dev/null", b"gone")
    assert Path("/dev/null").is_char_device()


def test_a_link_to_a_report_stays_a_link(tmp_path: Path) -> None:
    write_report(tmp_path / "there.json", {"a": 1})
    (tmp_path / "link.json").symlink_to(tmp_path / "there.json")
    write_report(tmp_path / "link.json", {"a": 2})
    assert (tmp_path / "link.json").is_symlink() and json.loads((tmp_path / "there.json").read_text())["a"] == 2


def test_two_options_that_name_one_file_are_refused(pair: Family) -> None:
    file = root(pair) / "a.png"
    message = refused(root(pair), "inspect", *inputs(pair), "--plot", file, "--html", file)
    assert "--plot and --html are both" in message or "--html and --plot are both" in message


@pytest.mark.parametrize("name", ["a.pdf", "a.svg", "model.safetensors"])
def test_a_picture_under_the_name_of_another_format_is_refused(name: str, pair: Family) -> None:
    message = refused(root(pair), "inspect", *inputs(pair), "--plot", root(pair) / name)
    assert message.endswith(f"a picture is written as PNG; call it {Path(name).stem}.png")


def test_a_directory_of_weights_is_not_a_report_of_ours(pair: Family) -> None:
    """A basis is ours too, and must not become a report."""
    assert tvbases(*compress(pair, "-m", 1, "--quiet")).code == 0
    for name in ("basis_config.json", "basis.safetensors", "README.md"):
        message = refused(root(pair), "inspect", *inputs(pair), "--json", root(pair) / "basis" / name)
        assert "did not write it" in message


def test_names_that_are_no_unicode_are_kept_in_the_report(tmp_path: Path) -> None:
    """A path of bytes that are not UTF-8, as Python gives it."""
    write_report(tmp_path / "a.json", {"out": "caf\udce9"})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))["out"] == "caf\udce9"


def test_a_curve_is_saved_the_same_way(tmp_path: Path) -> None:
    curve = Curve((0.0, 1.0), {"a": (0.5, 0.75)}, (0.5, 0.75), 1.0)
    (tmp_path / "mine.json").write_text("{}")
    with pytest.raises(OutputError, match="did not write it"):
        curve.save(tmp_path / "mine.json")
    curve.save(tmp_path / "curve.json")
    curve.save(tmp_path / "curve.json")
    assert Curve.load(tmp_path / "curve.json") == curve


def test_the_mark_is_where_it_is_looked_for(tmp_path: Path) -> None:
    for start in (0, reports.START - len(reports.MARK), reports.START):
        (tmp_path / "a").write_bytes(b" " * start + reports.MARK.encode())
        assert is_report(tmp_path / "a") == (start < reports.START)
