"""A Hub that takes what is pushed to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


class FakeHub:
    """``files`` are those of the last upload, ``calls`` the options of every one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from huggingface_hub import HfApi

        self.files: dict[str, bytes] = {}
        self.calls: list[dict[str, Any]] = []
        monkeypatch.setattr(HfApi, "create_repo", lambda _, repo_id, **options: type("Url", (), {"repo_id": repo_id}))
        monkeypatch.setattr(HfApi, "upload_folder", lambda _, **options: self.upload(**options))

    def upload(self, **options: Any) -> str:
        self.calls.append(options)
        self.files = file_bytes(Path(options["folder_path"]))
        return f"https://example.org/{options['repo_id']}"


def file_bytes(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}
