"""What a basis directory says about itself: ``basis_config.json`` and the model card."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, TypeAdapter, ValidationError
from torch import Tensor

from ..bases import BasisWeights
from ..errors import CheckpointError, ParameterError
from ..models.gram import Gram
from ..models.vectors import Vectors
from ..storage.cards import header
from ..storage.files import local_path
from ..storage.json_files import wrong_values
from ..storage.output import contains_only
from ..text import code_span, in_markdown, quoted
from ..version import library_version
from .parts import STRICT, AdapterInfo, LibraryInfo, Matrix, OnlineState, Size, check_ranks, check_sizes

CONFIG_FILE = "basis_config.json"
VECTORS_STEM = "basis"
FORMAT_VERSION = 1
# Of a library, which other versions of this program than those that know it must not take for another basis.
LIBRARY_VERSION = 2
# Of an online basis, where its state is among the options.
ONLINE = "online"
OUR_FILES = (
    CONFIG_FILE,
    f"{VECTORS_STEM}*.safetensors",
    f"{VECTORS_STEM}.safetensors.index.json",
    "adapter_config.json",
    "adapter_model.safetensors",
    "README.md",
    ".gitattributes",
)


@dataclass(frozen=True)
class BasisInfo:
    """The contents of basis_config.json, and its schema. Matrices are lists of float64; errors and bounds are relative.

    ``loss``, ``bound`` and ``spectral_bound`` are shares of the task vectors' total squared norm, before rounding;
    ``task_error`` is |tau_hat - tau| / |tau| per task, after rounding to the stored dtype.
    """

    __pydantic_config__ = STRICT

    method: str
    options: dict[str, Any]
    tasks: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)]
    encoder: Matrix
    decoder: Matrix
    mean: list[float] | None
    loss: float
    bound: float
    spectral_bound: float
    task_error: list[Size]
    gram: Matrix
    base_id: str
    base_fingerprint: Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
    base_norm: Size | None
    ranks: dict[str, list[Annotated[int, Field(ge=0)]]] = field(default_factory=dict)
    """Per weight stored in factors, the rank of each vector's part."""
    adapters: AdapterInfo | None = None
    """Of a basis of adapters."""
    library: LibraryInfo | None = None
    """Of a library of adapters: its vectors are the tasks, and encoder, decoder and gram, which say so, are empty."""
    format_version: int = FORMAT_VERSION
    library_version: str = ""

    @property
    def num_bases(self) -> int:
        return len(self.tasks) if self.library else len(self.encoder[0])

    @property
    def effective_weights(self) -> list[float]:
        """What each task weighs in the sum of the bases."""
        return [1.0 for _ in self.tasks] if self.library else [sum(row) for row in self.encoder]

    def index(self, task: str) -> int:
        """Column of a task; ParameterError names the tasks there are."""
        if task not in self.tasks:
            raise ParameterError(f'no task "{task}" in this basis; it has {", ".join(self.tasks)}')
        return self.tasks.index(task)

    def called(self, tasks: str | Mapping[str, float]) -> str:
        """A task, or several with their weights, in words; ParameterError as ``index``, or where there is none."""
        if isinstance(tasks, str):
            return self.tasks[self.index(tasks)]
        if not tasks:
            raise ParameterError(f"no task is chosen; this basis has {', '.join(self.tasks)}")
        return " + ".join(f"{weight:g} {self.tasks[self.index(task)]}" for task, weight in tasks.items())

    def refitted(self, decoder: Tensor, saved: Tensor) -> BasisInfo:
        """With the decoder fitted to the stored vectors, which takes ``saved`` [T] off the squared norms."""
        norms = torch.tensor(self.gram, dtype=torch.float64).diagonal()
        return replace(self, decoder=decoder.tolist()).with_errors(norms - saved)

    def with_errors(self, lost: Tensor) -> BasisInfo:
        """With the errors of reconstructions that miss ``lost`` [T] of the squared norms."""
        norms = torch.tensor(self.gram, dtype=torch.float64).diagonal()
        return replace(self, task_error=_relative_error(lost, norms))

    def to_json(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key != "library" or value is not None}

    def check(self) -> None:
        """ValueError unless all parts fit each other: tasks with a name each, and as many numbers as they need."""
        count, rows = len(self.tasks), len(self.decoder)
        if twice := [name for name, number in Counter(self.tasks).items() if number > 1]:
            raise ValueError(f"{len(twice)} tasks are named twice (first: {twice[0]})")
        if self.library is not None:
            self._check_library(self.library)
            return
        if not self.encoder or not self.decoder:
            raise ValueError("encoder and decoder are empty, which only those of a library are")
        check_sizes("encoder", self.encoder, count, self.num_bases)
        check_sizes("decoder", self.decoder, self.num_bases + (self.mean is not None), count)
        check_sizes("task_error", self.task_error, count)
        if self.mean is not None:
            check_sizes("mean", self.mean, count)
        check_ranks(self.ranks, rows)
        if self.adapters is not None:
            self.adapters.check(count, rows)
        if (state := self.online) is not None:
            state.check(count, rows)
        if self.gram or state is None:
            check_sizes("gram", self.gram, count, count)

    def _check_library(self, library: LibraryInfo) -> None:
        library.check(len(self.tasks))
        check_sizes("task_error", self.task_error, len(self.tasks))
        if self.encoder or self.decoder or self.gram or self.mean or self.ranks or self.online is not None:
            raise ValueError("encoder, decoder, gram, mean, ranks and online of a library are not empty")
        if self.adapters is None:
            raise ValueError("a library without adapters")
        self.adapters.check(len(self.tasks), None)

    @cached_property
    def online(self) -> OnlineState | None:
        """The state of an online basis. ValueError for anything else under its name."""
        found = self.options.get(ONLINE)
        try:
            return None if found is None else _ONLINE.validate_json(json.dumps(found))
        except ValidationError as error:
            raise ValueError(f"options.{ONLINE}.{wrong_values(error)}") from error

    @classmethod
    def read(cls, file: Path, label: str) -> BasisInfo:
        """Raises CheckpointError when the file is damaged, or of a format that this library does not read."""
        try:
            text = file.read_bytes()
            _check_version(_VERSION.validate_json(text), label)
            info = _SCHEMA.validate_json(text)
            info.check()
            return info
        except ValidationError as error:
            raise CheckpointError(f'"{label}": {CONFIG_FILE} is damaged: {wrong_values(error)}') from error
        except (OSError, ValueError) as error:
            raise CheckpointError(f'"{label}": {CONFIG_FILE} is damaged: {error}') from error


_SCHEMA = TypeAdapter(BasisInfo)
_ONLINE = TypeAdapter(OnlineState)


@dataclass(frozen=True)
class _Version:
    format_version: int
    library_version: str = "?"


_VERSION = TypeAdapter(_Version)


def _check_version(found: _Version, label: str) -> None:
    if found.format_version > LIBRARY_VERSION:
        raise CheckpointError(
            f'"{label}": basis format {found.format_version} is newer than this library knows ({LIBRARY_VERSION}); '
            "pip install -U tvbases-hf"
        )
    if found.format_version < FORMAT_VERSION:
        raise CheckpointError(
            f'"{label}": basis format {found.format_version}, which tvbases-hf {found.library_version} wrote, is older '
            f"than this library reads ({FORMAT_VERSION}); compress the models again, or restore the tasks with the "
            "version that wrote it"
        )


def basis_schema() -> dict[str, Any]:
    """The JSON schema of basis_config.json."""
    schema = _SCHEMA.json_schema()
    schema["properties"]["options"]["properties"] = {ONLINE: {"$ref": f"#/$defs/{OnlineState.__name__}"}}
    schema["$defs"][OnlineState.__name__] = _ONLINE.json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def describe(
    vectors: Vectors,
    gram: Gram,
    weights: BasisWeights,
    options: Mapping[str, Any],
    ranks: Mapping[str, list[int]] | None = None,
) -> BasisInfo:
    """The info of a basis that has just been chosen, before any rounding."""
    decoder = weights.decoder
    if weights.mean is not None:
        decoder = torch.cat([decoder, torch.ones(1, len(vectors), dtype=torch.float64)])
    residual = weights.reconstruction - torch.eye(len(vectors), dtype=torch.float64)
    squares = (residual * (gram.matrix @ residual)).sum(dim=0)
    total = weights.total or 1.0
    return BasisInfo(
        method=weights.method,
        options=dict(options),
        tasks=vectors.tasks,
        encoder=weights.encoder.tolist(),
        decoder=decoder.tolist(),
        mean=None if weights.mean is None else weights.mean.tolist(),
        loss=weights.loss / total,
        bound=weights.bound / total,
        spectral_bound=weights.spectral_bound / total,
        task_error=_relative_error(squares, gram.matrix.diagonal()),
        gram=gram.matrix.tolist(),
        base_id=vectors.base.label,
        base_fingerprint=vectors.base.fingerprint(),
        base_norm=gram.base_norm,
        ranks=dict(ranks or {}),
        library_version=library_version(),
    )


def is_basis_directory(directory: Path) -> bool:
    """Whether a directory holds a basis and nothing that we did not write."""
    return (directory / CONFIG_FILE).is_file() and contains_only(directory, OUR_FILES)


def _relative_error(squares: Tensor, norms: Tensor) -> list[float]:
    safe = torch.where(norms > 0, norms, torch.ones_like(norms))
    return (squares.clamp_min(0) / safe).sqrt().tolist()


def model_card(info: BasisInfo) -> str:
    """README.md of a basis directory: what it is, the error of each task, how to use it."""
    rows = "\n".join(
        f"| {in_markdown(task)} | {weight:.3f} | {error:.1%} |"
        for task, weight, error in zip(info.tasks, info.effective_weights, info.task_error, strict=True)
    )
    local = local_path(info.base_id) is not None
    head = "\n".join(header("tvbases-hf", info.base_id, "merge", ["task-arithmetic", "model-merging"]))
    shown, first = code_span(Path(info.base_id).name if local else info.base_id), info.tasks[0]
    return f"""{head}

# {info.num_bases} bases of {len(info.tasks)} task vectors

Method {code_span(info.method)} over {shown}. {_loss(info)}

| task | weight in the sum of the bases | relative error of its reconstruction, as stored |
|---|---|---|
{rows}

```python
from tvbases_hf import Basis

basis = Basis.from_pretrained("path/to/this/directory")
basis.restore({quoted(first)}, base="path/to/base", out="path/to/a/model")
```

The licences of the base model and of the fine-tuned models apply.
"""


def _loss(info: BasisInfo) -> str:
    if info.online is not None:
        weights = ", ".join(f"{weight:.4g}" for weight in info.online.weights)
        return (
            "Tasks were added one by one, so errors are\nupper bounds. The merged vector is the sum of the bases with "
            f"weights {weights}."
        )
    return (
        f"The bases\nleave {info.loss:.2%} of the task vectors' energy unexplained; the least possible under the "
        f"method's constraint is\n{info.bound:.2%}."
    )
