"""What a merged model gets beside its weights: the base's files, and the fine-tunes' where all of them agree on others.

Tokens, chat template and settings of the generation belong to what the weights were trained with. A model says
something of them where it has such files: a folder of weights and a configuration, or an adapter, may say nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..storage.checkpoint import Checkpoint
from ..storage.model import side_files_of
from ..storage.side_files import is_chat_template, is_tokenizer_file, own_file, side_files
from ..storage.tokens import read, read_json, tokens_of
from .adapter import Adapter
from .vocabulary import vocabulary_size

Files = Mapping[str, Path | bytes]
Models = Mapping[str, Checkpoint | Adapter]

CONFIG, GENERATION, TOKENIZER_CONFIG, TEMPLATE = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "chat_template",
)
PARTS = ("text_config", "llm_config", "language_config")
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# What savings of one tokenizer differ in, and what does not say how text becomes tokens.
INCIDENTAL: dict[str, tuple[str, ...]] = {
    TOKENIZER_CONFIG: (
        *(TEMPLATE, "transformers_version", "name_or_path", "tokenizer_file", "processor_class", "is_local"),
        *("local_files_only", "padding_side", "truncation_side", "model_max_length", "max_length", "stride"),
        *("truncation_strategy", "pad_to_multiple_of", "pad_token_type_id"),
    ),
    "tokenizer.json": ("truncation", "padding"),
    GENERATION: ("transformers_version", "_from_model_config"),
}


@dataclass(frozen=True)
class Beside:
    """``files`` go beside the weights; ``notes`` say which of them are not the base's, and what was left."""

    files: Files
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Subject:
    """One thing that models may agree on: what files say of it (None: nothing), and how a model's takes its place."""

    name: str
    value: Callable[[Files], Any]
    take: Callable[[dict[str, Path | bytes], Files], dict[str, Path | bytes]]


def beside(base: Checkpoint, models: Models, made: Files | None = None) -> Beside:
    """The files for a model that was merged of these, with as many rows in its vocabulary as ``base`` now has.

    ``made`` are files of a tokenizer, or a chat template, that were made for it: of these nobody is asked.

    Raises CheckpointError for a link out of a model's folder among the files that are taken.
    """
    own = dict(side_files_of(base))
    if made and any(map(is_tokenizer_file, made)):
        return Beside(_sized(_renumbered(_with_made(own, made), own), base))
    if not own:
        return Beside(dict(made or {}))
    said = {task: files for task, model in models.items() if (files := _files(model))}
    files, taken, left = own, [], []
    for subject in SUBJECTS if made is None else [s for s in SUBJECTS if s.name != TEMPLATES]:
        found = {task: value for task, one in said.items() if (value := subject.value(one)) is not None}
        others = [task for task, value in found.items() if value != subject.value(own)]
        donor = _donor(subject, own, said, found, base) if others else None
        if donor:
            files = subject.take(files, said[donor])
            taken.append(subject.name if _agree(found) else f'{subject.name} ("{donor}")')
        elif others and donor is None:
            left.append(f"{subject.name} ({', '.join(others)})")
    notes = [f"as in the fine-tunes, and not as in the base: {', '.join(taken)}"] if taken else []
    notes += [f"as in the base, since the fine-tunes have others and do not agree: {', '.join(left)}"] if left else []
    files = _with_made(files, made) if made else files
    if lost := _without_row(files, vocabulary_size(base)):
        notes.append(f"{len(lost)} tokens of the tokenizer have no row (first: {lost[0]}); do not use them")
    return Beside(_sized(_checked(files, [base, *models.values()]), base), tuple(notes))


def _with_made(files: Files, made: Files) -> dict[str, Path | bytes]:
    """Files with those of a tokenizer in place of the old ones, or with another chat template."""
    whole = any(map(is_tokenizer_file, made))
    kept = {n: f for n, f in files.items() if not is_chat_template(n) and not (whole and is_tokenizer_file(n))}
    return {**_without_template(kept), **made}


def _donor(
    subject: _Subject, own: Files, said: Mapping[str, Files], found: Mapping[str, Any], base: Checkpoint
) -> str | None:
    """Whose files are taken: that of all where they agree, and of a vocabulary with other rows the fullest that fits.

    Nothing where these are the base's, or where all lack what the base has; None where nobody's can be.
    """
    rows = vocabulary_size(base)
    fitting = [task for task in found if subject.name != TOKENIZER or _fits(said[task], rows)]
    if _agree(found) and fitting:
        return fitting[0] if found[fitting[0]] else ""
    if subject.name != TOKENIZER or rows == vocabulary_size(base.stored):
        return None
    known = {"": own, **{task: said[task] for task in fitting}} if _fits(own, rows) else {t: said[t] for t in fitting}
    return max(known, key=lambda task: len(tokens_of(known[task])), default=None)


def _agree(found: Mapping[str, Any]) -> bool:
    values = list(found.values())
    return all(value == values[0] for value in values)


def _fits(files: Files, rows: int | None) -> bool:
    """Whether every token of a tokenizer has a row."""
    return not _without_row(files, rows)


def _without_row(files: Files, rows: int | None) -> list[str]:
    return [] if rows is None else [token for token, row in tokens_of(files).items() if row >= rows]


def _files(model: Checkpoint | Adapter) -> Files:
    """What lies beside the weights of a model, to be compared; only what is taken is checked."""
    folder = model.directory if isinstance(model, Adapter) else model.path
    return {} if folder is None or not folder.is_dir() else side_files(folder, check=False)


def _checked(files: Files, models: Sequence[Checkpoint | Adapter]) -> dict[str, Path | bytes]:
    folders = [model.directory if isinstance(model, Adapter) else model.path for model in models]
    for file in files.values():
        owner = next((f for f in folders if f is not None and isinstance(file, Path) and file.is_relative_to(f)), None)
        if owner is not None and isinstance(file, Path):
            own_file(owner, file)
    return dict(files)


def _tokenizer(files: Files) -> Any:
    return {name: _comparable(name, file) for name, file in files.items() if is_tokenizer_file(name)} or None


def _comparable(name: str, file: Path | bytes) -> Any:
    content = read_json(file) if name.endswith(".json") else {}
    return {key: value for key, value in content.items() if key not in INCIDENTAL.get(name, ())} or read(file)


def _take_tokenizer(files: dict[str, Path | bytes], donor: Files) -> dict[str, Path | bytes]:
    """The donor's tokenizer, and the code of it; the chat template stays."""
    kept = {name: file for name, file in files.items() if not is_tokenizer_file(name)}
    taken = {name: file for name, file in donor.items() if is_tokenizer_file(name)}
    code = {name: file for name, file in donor.items() if name.endswith(".py") and name not in files}
    config, template = read_json(taken.get(TOKENIZER_CONFIG)), read_json(files.get(TOKENIZER_CONFIG)).get(TEMPLATE)
    if config.get(TEMPLATE) != template:
        taken[TOKENIZER_CONFIG] = _json({**_without(config, TEMPLATE), **({TEMPLATE: template} if template else {})})
    return {**kept, **taken, **code}


def _templates(files: Files) -> Any:
    """{name: template}, wherever they stand; None of a model that says nothing of its tokens either."""
    found: dict[str, Any] = {}
    inside = read_json(files.get(TOKENIZER_CONFIG)).get(TEMPLATE)
    if isinstance(inside, list):
        found |= {str(entry.get("name")): entry.get("template") for entry in inside if isinstance(entry, dict)}
    elif inside:
        found["default"] = inside
    for name in filter(is_chat_template, files):
        text = read(files[name]).decode("utf-8", "replace")
        called = Path(name).stem if "/" in name else "default"
        found[called] = read_json(files[name]).get(TEMPLATE) if name.endswith(".json") else text
    return found if found or any(map(is_tokenizer_file, files)) else None


def _take_templates(files: dict[str, Path | bytes], donor: Files) -> dict[str, Path | bytes]:
    taken = {name: file for name, file in donor.items() if is_chat_template(name)}
    inside = read_json(donor.get(TOKENIZER_CONFIG)).get(TEMPLATE)
    files = _without_template({name: file for name, file in files.items() if not is_chat_template(name)})
    if inside:
        taken[TOKENIZER_CONFIG] = _json({**read_json(files.get(TOKENIZER_CONFIG)), TEMPLATE: inside})
    return {**files, **taken}


def _without_template(files: Files) -> dict[str, Path | bytes]:
    config = read_json(files.get(TOKENIZER_CONFIG))
    return {**files, **({TOKENIZER_CONFIG: _json(_without(config, TEMPLATE))} if TEMPLATE in config else {})}


def _generation(files: Files) -> Any:
    if GENERATION in files:
        return _comparable(GENERATION, files[GENERATION])
    return {} if any(map(is_tokenizer_file, files)) else None


def _token_ids(files: Files) -> Any:
    """Of the configuration, and of the language model's within it."""
    config = read_json(files.get(CONFIG))
    parts = {"": config, **{name: config[name] for name in PARTS if isinstance(config.get(name), dict)}}
    found = {(part, key): values[key] for part, values in parts.items() for key in TOKEN_IDS if key in values}
    return found if config else None


def _take_token_ids(files: dict[str, Path | bytes], donor: Files) -> dict[str, Path | bytes]:
    config = read_json(files.get(CONFIG))
    for (part, key), value in _token_ids(donor).items():
        if not part:
            config[key] = value
        elif isinstance(config.get(part), dict):
            config[part] = {**config[part], key: value}
    return {**files, CONFIG: _json(config)}


def _renumbered(files: dict[str, Path | bytes], before: Files) -> dict[str, Path | bytes]:
    """With the ids of begin, end and padding in the configurations as the tokenizer now numbers these tokens."""
    old, new = {row: token for token, row in tokens_of(before).items()}, tokens_of(files)

    def moved(value: Any) -> Any:
        if isinstance(value, list):
            return [moved(one) for one in value]
        return new.get(old.get(value, ""), value) if isinstance(value, int) else value

    found = dict(files)
    for name in (CONFIG, GENERATION):
        config = read_json(files.get(name))
        ids = {key: moved(config[key]) for key in TOKEN_IDS if key in config}
        if any(config[key] != value for key, value in ids.items()):
            found[name] = _json({**config, **ids})
    return found


def _sized(files: dict[str, Path | bytes], base: Checkpoint) -> dict[str, Path | bytes]:
    """With a configuration that says how many rows the vocabulary has, where these are not the base's own."""
    rows, before = vocabulary_size(base), vocabulary_size(base.stored)
    if rows == before or CONFIG not in files:
        return files
    config = read_json(files[CONFIG])
    for part in (config, *(config[name] for name in PARTS if isinstance(config.get(name), dict))):
        if part.get("vocab_size") == before or (part is config and not any(name in config for name in PARTS)):
            part["vocab_size"] = rows
    return {**files, CONFIG: _json(config)}


def _without(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name != key}


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _take_generation(files: dict[str, Path | bytes], donor: Files) -> dict[str, Path | bytes]:
    return {**files, GENERATION: donor[GENERATION]}


TOKENIZER, TEMPLATES = "tokenizer", "chat template"
SUBJECTS = (
    _Subject(TOKENIZER, _tokenizer, _take_tokenizer),
    _Subject(TEMPLATES, _templates, _take_templates),
    _Subject("generation settings", _generation, _take_generation),
    _Subject("token ids", _token_ids, _take_token_ids),
)
