"""Which files hold a model: local or on the Hub, in one file or in shards, and what a folder holds that is none."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, ParameterError
from .file_names import check_name
from .json_files import read_json
from .side_files import TERMS

INDEX = ".index.json"
# In the loaders' own order: transformers takes the one file first, diffusers the shards.
SHARDS_FIRST = "diffusion_pytorch_model.safetensors"
WEIGHT_FILES = ("model.safetensors", SHARDS_FIRST, "pytorch_model.bin")
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
ADAPTER_CONFIG = "adapter_config.json"
# What is fetched of a repository, at any depth: weights, and whatever may travel with them (see side_files).
WHOLE_SUFFIXES = ("*.safetensors", "*.json", "*.txt", "*.jinja", "*.model", "*.spm", "*.tiktoken", "*.py")
HUB_PATTERNS = [*WHOLE_SUFFIXES, "*tokenizer.model.*", "*bpe.codes", "*prophetnet.tokenizer", "?_*/pytorch_model.bin"]
HUB_PATTERNS += TERMS
# Of the same weights for other programs, or in fewer digits.
HUB_COPIES = [
    "onnx/*",
    "*/onnx/*",
    "openvino/*",
    "*/openvino/*",
    "coreml/*",
    "*.fp16.*",
    "*.fp16-*",
    "fp16/*",
    "*/fp16/*",
]
# Only where a repository has no safetensors.
HUB_PICKLES = ["pytorch_model*.bin", "diffusion_pytorch_model*.bin", "adapter_model.bin"]
HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
HUB = "hf://"
# What transformers and huggingface_hub call the shards of a model; the second number is how many there are.
SHARD = re.compile(r"-\d{5}-of-(\d{5})\.")
# After the @ of hf://owner/name@revision/folder.
REVISION = re.compile(r"(refs/(?:pr|convert)/[^/]+|[^/]+)/?(.*)", re.DOTALL)
SHOWN = 5

# Files of training runs that hold parts of a model, and the command that makes one of them.
PARTS = {
    "zero_to_fp32.py": ("shards of DeepSpeed", "python {run}/zero_to_fp32.py {run} {run}"),
    "*.distcp": (
        "shards of FSDP",
        "python -m torch.distributed.checkpoint.format_utils dcp_to_torch {shards} {run}/pytorch_model.bin",
    ),
    "*_optim_states.pt": ("shards of DeepSpeed", "zero_to_fp32.py of DeepSpeed"),
    "mp_rank_*": ("shards of Megatron", "the converter of the training code"),
}


def home_path(path: str | Path) -> Path:
    """The path that ~ at the beginning stands for. Raises ParameterError for the home of a user that does not exist."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        user = Path(path).parts[0]
        raise ParameterError(f'"{path}": there is no home directory for {user}; write the path in full') from error


def local_path(source: str | Path) -> Path | None:
    """The file or directory of this name, if there is one."""
    try:
        path = home_path(source)
        return path if path.exists() else None
    except (OSError, ValueError):  # too long, or of a user that does not exist: it may still be an id
        return None


def locate(source: str, revision: str | None = None, cache_dir: str | None = None) -> Path:
    """The local path of a directory, a file or a Hub id (downloaded to ``cache_dir``, by default the Hub's own).

    ``hf://owner/name/folder`` is a folder of what the Hub holds. The revision of an id, ``owner/name@revision`` or
    ``hf://owner/name@revision/folder``, goes before ``revision``.
    """
    path = local_path(source)
    if path is not None:
        return path
    repository, named, folder = _hub_parts(source)
    if not HUB_ID.match(repository) or (folder and not source.startswith(HUB)) or ".." in folder.split("/"):
        raise CheckpointError(
            f'"{source}": no such file or directory (a Hub id has the form "owner/name", or "owner/name@revision")'
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    start = f"{folder}/" if folder else ""

    def fetched(patterns: Sequence[str]) -> Path:
        where: dict[str, Any] = {"revision": named or revision, "cache_dir": cache_dir}
        where["allow_patterns"] = [start + pattern for pattern in patterns]
        where["ignore_patterns"] = [start + pattern for pattern in HUB_COPIES]
        return Path(snapshot_download(repository, **where)) / folder

    try:
        inside = fetched(HUB_PATTERNS)
        described = any((inside / name).is_file() for name in ("config.json", ADAPTER_CONFIG))
        if described and not any(inside.glob("*.safetensors")):
            fetched(HUB_PICKLES)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f'"{source}": no such local directory, and the Hub could not give it: {reason} '
            "Check the spelling, your connection, and for private or gated models `hf auth login`."
        ) from error
    if not inside.exists():
        raise CheckpointError(f'"{source}": {repository} is on the Hub, but has no folder {folder}')
    return inside


def locate_named(base: str, source: str) -> Path:
    """The base that ``source`` names itself. Raises CheckpointError, which asks for --base, where it is nowhere."""
    try:
        return locate(base)
    except CheckpointError as error:
        raise CheckpointError(f'"{source}" names a base that is not found; give it with --base ({error})') from error


def _hub_parts(source: str) -> tuple[str, str | None, str]:
    """(owner/name, the revision, the folder) of an id."""
    head, at, tail = source.removeprefix(HUB).partition("@")
    owner, _, rest = head.partition("/")
    name, _, folder = rest.strip("/").partition("/")
    if not at:
        return f"{owner}/{name}", None, folder
    found = REVISION.fullmatch(tail) if source.startswith(HUB) else None
    revision, inside = found.groups() if found else (tail, "")
    return f"{owner}/{name}", revision or None, inside if not folder else f"{folder}/{inside}"


def without_revision(source: str) -> tuple[str, str | None]:
    """An id and its revision, for those who want them apart; a path as it is."""
    if "@" not in source or local_path(source):
        return source, None
    repository, revision, folder = _hub_parts(source)
    return (repository, revision) if HUB_ID.match(repository) and not folder else (source, None)


def at_revision(source: str, revision: str) -> str:
    """A Hub id with a revision where it names none itself; anything else as it is. Both ids of ``base+adapter``."""
    if local_path(source):
        return source
    parts = source.split("+")
    if len(parts) > 1:
        return "+".join(at_revision(part, revision) for part in parts)
    repository, named, folder = _hub_parts(source)
    if named or not HUB_ID.match(repository) or (folder and not source.startswith(HUB)):
        return source
    inside = f"/{folder}" if folder else ""
    return f"{HUB if source.startswith(HUB) else ''}{repository}@{revision}{inside}"


def weight_files(path: Path, label: str) -> tuple[list[Path], dict[str, str] | None]:
    """The files that hold the weights and, when sharded, the index's map from tensor to file name.

    Raises CheckpointError where there are none, or more than one model; the message says what is there instead.
    """
    if path.is_file():
        return _shards(path, label) if path.name.endswith(INDEX) else ([path], None)
    chosen = _chosen(path)
    if chosen is not None:
        _check_alone(path, chosen, label)
        return _shards(chosen, label) if chosen.name.endswith(INDEX) else ([chosen], None)
    if (path / ADAPTER_CONFIG).is_file():
        raise CheckpointError(f'"{label}": a PEFT adapter where a full checkpoint is needed; give the base model')
    loose = sorted(path.glob("*.safetensors"))
    shards = [file.name for file in loose if (part := SHARD.search(file.name)) and int(part[1]) > 1]
    if shards:  # what is missing would count as unchanged
        raise CheckpointError(
            f'"{label}": {len(shards)} of its shards, and no index that tells whether these are all '
            f"(first: {shards[0]}); download or copy the checkpoint again"
        )
    if len(loose) == 1:
        return loose, None
    raise _no_weights(path, label)


def _chosen(path: Path) -> Path | None:
    """The file or the index that the model's loader takes."""
    for name in WEIGHT_FILES:
        files = [path / name, path / (name + INDEX)]
        found = next((f for f in (reversed(files) if name == SHARDS_FIRST else files) if f.is_file()), None)
        if found is not None:
            return found
    return next(iter(sorted(path.glob(f"*.safetensors{INDEX}"))), None)


def _check_alone(path: Path, chosen: Path, label: str) -> None:
    """Loading a folder that holds both applies the adapter to the model, which is neither of the two."""
    adapter = next((name for name in ADAPTER_FILES if (path / name).is_file()), None)
    if adapter is not None and (path / ADAPTER_CONFIG).is_file():
        raise CheckpointError(
            f'"{label}": holds a model ({chosen.name}) and an adapter ({adapter}), which loaders put on top of it; '
            f"move {ADAPTER_CONFIG} and {adapter} to a folder of their own, and give the folder that you mean"
        )


def _shards(index: Path, label: str) -> tuple[list[Path], dict[str, str]]:
    weight_map = _read_index(index, label)
    files = [index.parent / file for file in dict.fromkeys(weight_map.values())]
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise CheckpointError(
            f'"{label}": {len(absent)} of {len(files)} shards named in {index.name} are absent '
            f"(first: {absent[0]}); download or copy the checkpoint again"
        )
    return files, weight_map


def _read_index(index: Path, label: str) -> dict[str, str]:
    try:
        weight_map = read_json(index)["weight_map"]
        for file in dict.fromkeys(weight_map.values()):
            check_name(file, "shard")
        return dict(weight_map)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f'"{label}": {index.name} is not a shard index: {error}') from error


def _no_weights(path: Path, label: str) -> CheckpointError:
    """What is there instead: parts of a training run, folders that hold models, or other files."""
    found = sorted(file.name for file in path.iterdir())
    start = f'"{label}": not a checkpoint: no model.safetensors, model.safetensors.index.json or pytorch_model.bin'
    for pattern, (kind, command) in PARTS.items():
        part = next(iter(sorted([*path.glob(pattern), *path.glob(f"*/{pattern}")])), None)
        if part is not None:
            merge = command.format(shards=part.parent, run=path)
            return CheckpointError(f"{start}, but {kind} ({part.name}); make one model of them: {merge}")
    inside = {folder.name: kind for folder in sorted(path.iterdir(), key=_by_number) if (kind := _kind(folder))}
    if inside:
        sample = ", ".join(f"{name} ({kind})" for name, kind in list(inside.items())[-SHOWN:])
        return CheckpointError(f"{start} here, but in {len(inside)} of its folders: {sample}; give one of them")
    return CheckpointError(f"{start} (found: {', '.join(found[:SHOWN]) or 'nothing'})")


def _kind(folder: Path) -> str:
    """What a folder holds, in a word; nothing for one that holds no weights."""
    if not folder.is_dir():
        return ""
    if _chosen(folder) is not None:
        return "a model"
    if (folder / ADAPTER_CONFIG).is_file():
        return "an adapter"
    return next((kind for pattern, (kind, _) in PARTS.items() if next(folder.glob(pattern), None)), "")


def _by_number(folder: Path) -> tuple[str, int]:
    """checkpoint-500 before checkpoint-1000."""
    stem, _, number = folder.name.rpartition("-")
    return (stem, int(number)) if number.isdigit() else (folder.name, 0)
