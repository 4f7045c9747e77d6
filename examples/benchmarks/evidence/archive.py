"""Answers kept beside the results: a run elsewhere goes on from them, and a report has them without asking anything."""

from __future__ import annotations

import gzip
import io
import tarfile
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
    count = 0
    with tarfile.open(archive) as tar:
        for entry in tar:
            if not (answers / entry.name).is_file():
                tar.extract(entry, answers, filter="data")
                count += 1
    return count
