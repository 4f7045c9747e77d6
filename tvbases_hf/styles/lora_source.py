"""Where the tensors of a LoRA of an image model come from: a file, a directory, a Hub id or a state dict."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from ..errors import CheckpointError, ParameterError
from ..models.lora_config import CONFIG_FILE, WEIGHT_FILES, LoraOptions, read_config
from ..models.lora_parts import PREFIX, own_names
from ..storage.checkpoint import Checkpoint
from ..storage.files import locate
from ..storage.json_files import parse_json

Source = str | Path | Mapping[str, Tensor]
Options = dict[str, LoraOptions]

COMPONENTS = ("transformer", "unet", "text_encoder", "text_encoder_2", "text_encoder_3", "prior", "connectors")
PREFIXES = tuple(f"{component}." for component in COMPONENTS)
METADATA = "lora_adapter_metadata"
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
# Names that say nothing of the style in the file.
ANY_FILES = (DIFFUSERS_FILE, *WEIGHT_FILES)
UNET_BLOCK = re.compile(r"^(down_blocks|mid_block|up_blocks)\.")


def open_source(source: Source, label: str) -> tuple[Checkpoint, Options]:
    """The stored tensors, by the names they have, and PEFT's options per component where the source gives them.

    Raises CheckpointError if there is nothing, several files, several adapters, or something that is no checkpoint.
    """
    stored, options = _open(source, label)
    if not all(name.startswith(PREFIXES) for name in stored.tensors):
        return stored, options  # some converters of diffusers go by the adapter's name
    names = own_names(stored.tensors, label)
    if all(name == own for own, name in names.items()):
        return stored, options
    infos = {own: stored.tensors[name] for own, name in names.items()}
    return Checkpoint(label, infos, lambda own: stored.read(names[own]), stored.path), options


def _open(source: Source, label: str) -> tuple[Checkpoint, Options]:
    if isinstance(source, Mapping):
        if not source:
            raise CheckpointError(f'"{label}": an empty state dict')
        return Checkpoint.from_state_dict(source, label), {}
    path = locate(str(source))
    if path.is_file():
        return Checkpoint.open(path, label=label), _options(path, label)
    if (path / CONFIG_FILE).is_file():
        return _peft_directory(path, label)
    file = _only_file(path, label)
    return Checkpoint.open(file, label=label), _options(file, label)


def _only_file(directory: Path, label: str) -> Path:
    if (directory / DIFFUSERS_FILE).is_file():
        return directory / DIFFUSERS_FILE
    files = sorted(directory.glob("*.safetensors"))
    if len(files) != 1:
        found = ", ".join(file.name for file in files[:5]) or "none"
        raise CheckpointError(f'"{label}": {len(files)} .safetensors files ({found}); give the path of one file')
    return files[0]


def _options(file: Path, label: str) -> Options:
    """What diffusers writes into the file's header: PEFT's configuration of each component."""
    if file.suffix != ".safetensors":
        return {}
    with safe_open(str(file), framework="pt") as handle:
        text = (handle.metadata() or {}).get(METADATA)
    if not text:
        return {}
    try:
        words = parse_json(text)
        parts = {c: {k.removeprefix(f"{c}."): v for k, v in words.items() if k.startswith(f"{c}.")} for c in COMPONENTS}
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f'"{label}": its {METADATA} is damaged: {error}') from error
    return {c: LoraOptions.parse({"peft_type": "LORA"} | own, f"{label}: {c}") for c, own in parts.items() if own}


def _peft_directory(path: Path, label: str) -> tuple[Checkpoint, Options]:
    """A PEFT adapter under diffusers' names. It does not say which component it is of, except by class or blocks."""
    config = read_config(path, label)
    file = next((path / name for name in WEIGHT_FILES if (path / name).is_file()), None)
    if file is None:
        raise CheckpointError(f'"{label}": {CONFIG_FILE} is here but not {WEIGHT_FILES[0]}; copy the weights too')
    stored = Checkpoint.open(file, label=label)
    names = {name.removeprefix(PREFIX): name for name in stored.tensors}
    component = _component(config, list(names), label)
    infos = {f"{component}.{own}": stored.tensors[name] for own, name in names.items()}
    renamed = Checkpoint(label, infos, lambda name: stored.read(names[name.removeprefix(f"{component}.")]), path)
    return renamed, {component: LoraOptions.parse(config, label)}


def _component(config: Mapping[str, Any], names: list[str], label: str) -> str:
    made_of = str((config.get("auto_mapping") or {}).get("base_model_class") or "")
    if "TextModel" in made_of or "T5" in made_of:
        raise CheckpointError(f'"{label}": a PEFT adapter of a text encoder ({made_of}), which does not say of which')
    return "unet" if "UNet" in made_of or any(UNET_BLOCK.match(name) for name in names) else "transformer"


def name_styles(sources: Mapping[str, Source] | Sequence[Source]) -> dict[str, Source]:
    """Styles by name; those of a list are called like their files, or like the folder where all files have one name.

    Raises ParameterError where two would have one name.
    """
    if isinstance(sources, Mapping):
        return dict(sources)
    if isinstance(sources, (str, Path)):
        raise ParameterError(f'"{sources}" is one style; give a list of them, or a dictionary by name')
    named: dict[str, Source] = {}
    for number, source in enumerate(sources, start=1):
        name = f"style {number}" if isinstance(source, Mapping) else _file_name(Path(source))
        if name in named:
            raise ParameterError(f'two styles would be called "{name}"; give them as a dictionary, by name')
        named[name] = source
    return named


def _file_name(path: Path) -> str:
    return path.absolute().parent.name if path.name in ANY_FILES else path.stem if path.suffix else path.name
