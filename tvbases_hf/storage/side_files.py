"""What travels with a model's weights: a list of known files, and not whatever lies beside them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import CheckpointError
from .json_files import parse_json
from .tokens import read, read_json

# By the names that transformers and sentencepiece give them; patterns are of one folder.
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*.json",
    "vocab*.txt",
    "*_vocab.json",
    "merges.txt",
    "bpe.codes",
    "dict.txt",
    "*.model",
    "tokenizer.model.*",
    "*.spm",
    "*.tiktoken",
    "prophetnet.tokenizer",
    "normalizer.json",
    "emoji.json",
    "word_shape.json",
    "word_pronunciation.json",
    "byte_maps.json",
    "tekken.json",
)
CHAT_TEMPLATES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja")
CONFIGURATIONS = (
    "config.json",
    "configuration.json",
    "generation_config.json",
    "*processor_config.json",
    "config_sentence_transformers.json",
    "sentence_*_config.json",
    "modules.json",
)
TERMS = ("LICENSE*", "LICENCE*", "COPYING*", "NOTICE*", "USE_POLICY*")
LISTED = (*TOKENIZER, *CHAT_TEMPLATES, *CONFIGURATIONS, *TERMS)
# Of the folders that modules.json of sentence-transformers names: their weights too, which no merge changes.
OF_A_MODULE = (*TOKENIZER, *CHAT_TEMPLATES, *CONFIGURATIONS, "*.safetensors", "pytorch_model.bin")
MODULES = "modules.json"
# Files that name the code of a model, as auto_map: "file.Class", or lists of such.
NAMES_CODE = ("config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json")
CLASS = re.compile(r"[A-Za-z_][\w.]*\.\w+")
RELATIVE_IMPORT = re.compile(r"^\s*from\s+\.([\w.]*)\s+import|^\s*import\s+\.([\w.]+)", re.MULTILINE)


def side_files(directory: Path, check: bool = True) -> dict[str, Path]:
    """{relative name: file} of what a model that is made of the one in ``directory`` gets of it: configurations, the
    tokenizer, chat templates, terms, the folders that modules.json names, and the code that auto_map names.

    Raises CheckpointError for a link that leaves the folder: what it points to would be published with the model.
    Without ``check`` they are to be read only.
    """
    names = {name for pattern in LISTED for name in _matching(directory, pattern)}
    for folder in _modules(directory):
        names |= {f"{folder}/{name}" for pattern in OF_A_MODULE for name in _matching(directory / folder, pattern)}
    names |= set(_code(directory))
    files = {name: directory / name for name in sorted(names)}
    return {name: own_file(directory, file) for name, file in files.items()} if check else files


def is_tokenizer_file(name: str) -> bool:
    """Whether a file says how text becomes tokens; chat templates are apart."""
    return any(PurePosixPath(name).match(pattern) for pattern in TOKENIZER) and "/" not in name


def is_chat_template(name: str) -> bool:
    return any(PurePosixPath(name).match(pattern) for pattern in CHAT_TEMPLATES) and name.count("/") < 2


def put(files: Mapping[str, Path | bytes], directory: Path) -> None:
    """Write the files, copied or as given, into a directory and its folders."""
    for name, content in files.items():
        target = directory / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(read(content))


def _matching(directory: Path, pattern: str) -> Iterator[str]:
    for file in directory.glob(pattern):
        if file.is_file():
            yield file.relative_to(directory).as_posix()


def own_file(directory: Path, file: Path) -> Path:
    """The file, once it is known to be the model's own, or one that the Hub's cache keeps for it."""
    own, target = directory.resolve(), file.resolve()
    blobs = [folder.parent.parent / "blobs" for folder in (own, *own.parents) if folder.parent.name == "snapshots"]
    if not any(target.is_relative_to(place) for place in (own, *blobs)):
        raise CheckpointError(
            f'"{directory}": {file.relative_to(directory)} is a link to {target}, outside of the model, and would be '
            "copied into what is written; put the file itself there, or remove the link"
        )
    return file


def _modules(directory: Path) -> list[str]:
    """The folders that modules.json names. CheckpointError for one outside of the model."""
    try:
        listed = parse_json((directory / MODULES).read_bytes())
        folders = [str(part.get("path") or "") for part in listed]
    except (OSError, ValueError, TypeError, AttributeError):
        return []
    outside = [name for name in folders if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts]
    if outside:
        raise CheckpointError(
            f'"{directory}": {MODULES} names a folder outside of the model ({outside[0]}); correct it'
        )
    return [name for name in dict.fromkeys(folders) if name and (directory / name).is_dir()]


def _code(directory: Path) -> set[str]:
    """The Python files that auto_map names, and those that they import from beside them. Nothing is run."""
    waiting = [name for file in NAMES_CODE for name in _named(read_json(_file(directory / file)).get("auto_map"))]
    found: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name in found or not (directory / name).is_file():
            continue
        found.add(name)
        text = (directory / name).read_text(encoding="utf-8", errors="replace")
        beside = PurePosixPath(name).parent
        waiting += [str(beside / _module_file(a or b)) for a, b in RELATIVE_IMPORT.findall(text) if (a or b).strip(".")]
    return found


def _file(path: Path) -> Path | None:
    return path if path.is_file() else None


def _named(auto_map: Any) -> Iterable[str]:
    """The files of ``auto_map``; a class of another repository, "owner/name--file.Class", is not here."""
    values = auto_map.values() if isinstance(auto_map, Mapping) else ()
    classes = [item for value in values for item in (value if isinstance(value, list) else [value])]
    return [
        _module_file(name.rpartition(".")[0]) for name in classes if isinstance(name, str) and CLASS.fullmatch(name)
    ]


def _module_file(module: str) -> str:
    return module.strip(".").replace(".", "/") + ".py"
