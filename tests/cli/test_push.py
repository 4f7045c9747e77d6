"""`--push-to-hub`: who asks is checked before the work, and what was written is what is uploaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from commands.command_line import compress, refused, root, tvbases
from zoo.hf_models import Family

pytest_plugins = ["zoo.hf_fixtures"]


class Api:
    """The Hub's client, as far as it is used; ``known`` is somebody, ``full`` takes nothing."""

    known, full = True, False
    uploaded: dict[str, list[str]]

    def whoami(self) -> dict[str, Any]:
        if not self.known:
            raise OSError("Token is required, but no token found.\nSee more.")
        return {"name": "me"}

    def create_repo(self, repository: str, *, exist_ok: bool) -> None:
        assert exist_ok
        if self.full:
            raise OSError("403 Forbidden")

    def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> str:
        type(self).uploaded[repo_id] = sorted(file.name for file in Path(folder_path).iterdir())
        return f"https://hub/{repo_id}/commit/1"


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> type[Api]:
    class Fresh(Api):
        uploaded: dict[str, list[str]] = {}  # noqa: RUF012

    monkeypatch.setattr("huggingface_hub.HfApi", Fresh)
    return Fresh


def test_what_was_written_is_uploaded(pair: Family, api: type[Api]) -> None:
    done = tvbases(*compress(pair, "-m", 1, "--push-to-hub", "me/skills"))
    assert done.code == 0 and "uploaded: https://hub/me/skills/commit/1" in done.out
    assert api.uploaded == {"me/skills": ["README.md", "basis.safetensors", "basis_config.json"]}


def test_a_dry_run_uploads_nothing(pair: Family, api: type[Api]) -> None:
    assert tvbases(*compress(pair, "-m", 1, "--push-to-hub", "me/skills", "--dry-run")).code == 0
    assert api.uploaded == {}


@pytest.mark.parametrize("repository", ["skills", "me/a/b", "", "me/$x"])
def test_what_is_no_repository_is_refused_before_the_work(repository: str, pair: Family, api: type[Api]) -> None:
    message = refused(root(pair), *compress(pair, "--push-to-hub", repository))
    assert "is no repository of the Hub; give OWNER/NAME" in message


def test_whom_the_hub_does_not_know_is_told_before_the_work(pair: Family, api: type[Api]) -> None:
    api.known = False
    message = refused(root(pair), *compress(pair, "--push-to-hub", "me/skills"))
    assert "Token is required, but no token found" in message and "run `hf auth login` first" in message


def test_what_cannot_be_uploaded_is_kept(pair: Family, api: type[Api]) -> None:
    api.full = True
    done = tvbases(*compress(pair, "-m", 1, "--push-to-hub", "me/skills"))
    assert done.code == 2 and "is written, and could not be uploaded to me/skills (403 Forbidden)" in done.err
    assert (root(pair) / "basis" / "basis_config.json").is_file()
