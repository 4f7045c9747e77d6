"""Answers kept beside the results: a run elsewhere goes on from them, and a report has them without asking anything."""

from __future__ import annotations

import gzip
import io
import tarfile
import tempfile
from pathlib import Path

from tvbases_hf.storage.output import file_transaction

FOLDER = Path(__file__).resolve().parents[1] / "answers"


def pack(answers: Path, archive: Path) -> int:
    """Put all answers of a work directory into an archive, whose bytes are the same for the same answers."""
    files = sorted(answers.glob("*/*.json"))
    archive.parent.mkdir(parents=True, exist_ok=True)
    with (
        file_transaction(archive, tarfile.is_tarfile) as part,
        part.open("wb") as stream,
        gzip.GzipFile("", "wb", fileobj=stream, mtime=0) as compressed,
        tarfile.open(fileobj=compressed, mode="w") as tar,
    ):
        for file in files:
            content = file.read_bytes()
            entry = tarfile.TarInfo(file.relative_to(answers).as_posix())
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return len(files)


def unpack(archive: Path, answers: Path) -> int:
    """Put the archive's answers where the work directory has none; how many these were. No archive: none."""
    if not archive.is_file():
        return 0
    answers.mkdir(parents=True, exist_ok=True)
    count = 0
    with tempfile.TemporaryDirectory(dir=answers.parent) as place, tarfile.open(archive) as tar:
        tar.extractall(place, filter="data")
        for file in Path(place).glob("*/*.json"):
            wanted = answers / file.relative_to(place)
            if not wanted.is_file():  # whole or not at all: a run may be cut off
                wanted.parent.mkdir(exist_ok=True)
                file.replace(wanted)
                count += 1
    return count
