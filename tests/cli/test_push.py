"""`--push-to-hub`: who asks is checked before the work, and what was written is what is uploaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from commands.command_line import compress, refused, root, tvbases
from tvbases_hf.errors import ParameterError
from tvbases_hf.styles.card import mix_card
from zoo.hf_models import Family
from zoo.lora_files import write
from zoo.pipelines import FLUX_MODULES, style
from zoo.planted_adapters import planted_adapters

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


def pushed(api: type[Api], *arguments: object) -> list[str]:
    """The files that a command uploads."""
    done = tvbases(*arguments, "--push-to-hub", "me/it")
    assert done.code == 0 and "uploaded: https://hub/me/it/commit/1" in done.out, done.err
    return api.uploaded["me/it"]


def test_every_command_that_writes_uploads_it(api: type[Api], tmp_path: Path) -> None:
    planted = planted_adapters(tmp_path / "planted", 3)
    (first, path), *others = planted.tasks.items()
    tasks = [word for name, place in others for word in ("--task", f"{name}={place}")]
    base, skills = ["--base", planted.base], tmp_path / "skills"
    made = ["compress", *base, *tasks, "--method", "library", "--out", skills]
    assert "basis_config.json" in pushed(api, *made)
    assert "README.md" in pushed(api, "library", "add", skills, *base, "--task", f"{first}={path}")
    assert "README.md" in pushed(api, "library", "remove", skills, first)
    exported = pushed(api, "library", "export", skills, others[0][0], "--out", tmp_path / "one")
    assert exported == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    parts = pushed(api, "decompose", *base, *tasks, "--out", tmp_path / "parts")
    assert parts == ["README.md", "shared", "tvbases_components.json", "unique"]
    assert "basis_config.json" in pushed(api, "online", *base, *tasks, "-m", 2, "--out", tmp_path / "online")


def test_a_mix_of_styles_is_uploaded_with_a_card(api: type[Api], tmp_path: Path) -> None:
    files = []
    for seed, name in enumerate("ab"):
        (tmp_path / name).mkdir()
        files += ["--style", f"{name}={write(tmp_path / name, style(seed, FLUX_MODULES))}"]
    found = pushed(api, "mix-styles", *files, "--scale", "b=0.5", "--out", tmp_path / "mix.safetensors")
    assert found == ["README.md", "mix.safetensors"] and sorted(file.name for file in tmp_path.iterdir()) == [
        "a", "b", "mix.safetensors",
    ]  # fmt: skip
    card = ModelCard(mix_card(tmp_path / "mix.safetensors"), ignore_metadata_errors=False)
    data: Any = card.data
    assert data.library_name == "diffusers" and "lora" in data.tags and data.base_model is None
    assert "| b | 0.5 |" in card.text and 'weight_name="mix.safetensors"' in card.text
    with pytest.raises(ParameterError, match="not a mix of styles"):
        mix_card(tmp_path / "a" / "style.safetensors")


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
