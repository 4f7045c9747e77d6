"""Which base an adapter was trained on, by what it is called: Hub ids, folders, the Hub's cache, quantised copies."""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import CheckpointError
from ..storage.checkpoint import Checkpoint
from ..storage.files import HUB_ID, local_path, without_revision

CACHED = re.compile(r"(?:^|/)models--([^/]+?)--([^/]+)")
SNAPSHOT = re.compile(r"/snapshots/[0-9a-f]{7,40}/?$")
# What is put behind the name of a model that is stored in fewer bits: its numbers are those of the model, rounded.
QUANTISED = re.compile(
    r"[-_.]((unsloth|bnb|gptq|awq|hqq|aqlm|quanto|eetq|torchao|fp8|nf4|int[48]|w[48]a(8|16)|[48][-_]?bits?|g\d+|dynamic"
    r"|quantized|marlin)[-_.]?)+$",
    re.IGNORECASE,
)
PUBLISHER = re.compile(r"^meta-(?=llama)", re.IGNORECASE)  # meta-llama/Llama-3.1-8B is also Meta-Llama-3.1-8B


def model_name(source: str) -> str:
    """What a model is called, wherever it is kept and in whatever format: the last part of its name, in lower case."""
    path = SNAPSHOT.sub("", without_revision(source)[0].replace("\\", "/").rstrip("/"))
    cached = CACHED.search(path)
    last = cached[2] if cached else path.rsplit("/", 1)[-1]
    return (PUBLISHER.sub("", QUANTISED.sub("", last)) or last).lower()


def is_named(source: str) -> bool:
    """Whether a model's source says which model of the Hub it is: an id, or a place in the Hub's cache."""
    return bool(CACHED.search(source)) or (bool(HUB_ID.match(without_revision(source)[0])) and not _is_there(source))


def other_base(named: str, base: Checkpoint) -> str:
    """Why ``base`` is not the model that is called ``named``; empty where it may be."""
    given = next((name for name in (base.label, str(base.path or "")) if is_named(name)), "")
    if is_named(named) and given:
        return "" if model_name(named) == model_name(given) else f"the base given is {given}"
    if not _is_there(named) or base.path is None or Path(named).expanduser().resolve() == base.path.resolve():
        return ""
    try:
        origin = Checkpoint.open(Path(named).expanduser())
        same = origin.fingerprint() == base.fingerprint()
    except (CheckpointError, OSError):
        return ""
    return "" if same or origin.quantised or base.quantised else f"the base given ({base.label}) has other weights"


def _is_there(source: str) -> bool:
    path = local_path(source) if source else None
    return path is not None and path.is_dir()
