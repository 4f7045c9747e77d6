"""Which folders hold an adapter, and who reads those of other methods than LoRA."""

from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from ..storage.files import INDEX
from ..storage.files import WEIGHT_FILES as CHECKPOINT_FILES
from .lora_config import CONFIG_FILE, WEIGHT_FILES


def is_adapter(path: Path) -> bool:
    """Whether a local directory holds an adapter, or one half of its two files, and not a whole model."""
    return not _has_model(path) and any((path / name).is_file() for name in (CONFIG_FILE, *WEIGHT_FILES))


def adapter_folder(path: Path) -> Path:
    """The one folder in ``path`` that holds an adapter, as in a training run; ``path`` where it is not as clear."""
    if not path.is_dir() or is_adapter(path) or _has_model(path) or any(path.glob("*.safetensors")):
        return path
    folders = [folder for folder in path.iterdir() if folder.is_dir()]
    found = [folder for folder in folders if (folder / CONFIG_FILE).is_file() and is_adapter(folder)]
    return found[0] if len(found) == 1 and not any(map(_has_model, folders)) else path


def _has_model(path: Path) -> bool:
    return any((path / f"{name}{index}").is_file() for name in CHECKPOINT_FILES for index in ("", INDEX))


def host() -> Any:
    """What reads other methods announces itself by an entry point: this package knows no integration by name."""
    (found,) = entry_points(group="tvbases_hf.hosts", name="peft")
    return found.load()
