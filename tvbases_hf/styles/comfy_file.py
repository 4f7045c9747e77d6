"""A mixed file under the names that ComfyUI and kohya's tools read: those of the model's makers.

Where these have one matrix for several of diffusers' (queries, keys and values), the factors stand side by side in one
pair: the second factor is block-diagonal, and the change exactly the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..errors import ParameterError, did_you_mean
from ..storage.checkpoint import Checkpoint, TensorInfo
from ..storage.tensor_files import TensorFiles
from .families import Family, installed, split_numbers, with_numbers
from .lora_layers import A, B
from .lora_source import METADATA
from .original_names import ORIGINAL
from .places import Place

ONE_FILE = 1 << 60
# Families whose names in ComfyUI are diffusers' own.
SAME_NAMES = ("Stable Diffusion 1 and 2", "SDXL", "Qwen-Image", "Z-Image", "HiDream")
# Families whose tools write underscores, as kohya does; the others' write dots.
UNDERSCORES = ("Stable Diffusion 1 and 2", "SDXL", "Flux.1", "Chroma")

# SDXL's sizes, whose name in diffusers its own converter mistakes.
LABEL_NAMES = {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}


@dataclass(frozen=True)
class Matrix:
    """One matrix of the original model, with diffusers' modules whose rows it has, in order, and how many these are.

    A module that no style changes is None.
    """

    name: str
    members: tuple[tuple[str | None, int], ...]
    underscores: bool
    least_rank: int = 0
    """The rank that lower ones are padded to with zeros."""

    @property
    def first(self) -> str:
        return self.name + (".lora_down.weight" if self.underscores else ".lora_A.weight")

    @property
    def second(self) -> str:
        return self.name + (".lora_up.weight" if self.underscores else ".lora_B.weight")

    def infos(self, stored: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
        present = [name for name, _ in self.members if name is not None]
        a, b = stored[f"{present[0]}.{A}"], stored[f"{present[0]}.{B}"]
        rank = max(self.least_rank, sum(stored[f"{name}.{A}"].shape[0] for name in present))
        rows = sum(rows for _, rows in self.members)
        found = {self.first: TensorInfo((rank, *a.shape[1:]), a.dtype)}
        found[self.second] = TensorInfo((rows, rank, *b.shape[2:]), b.dtype)
        return found | ({f"{self.name}.alpha": TensorInfo((), torch.float32)} if self.underscores else {})

    def tensors(self, stored: Checkpoint) -> dict[str, Tensor]:
        """The factors side by side; an alpha of the rank scales by one."""
        firsts = [stored.read(f"{name}.{A}") for name, _ in self.members if name is not None]
        firsts.append(firsts[0].new_zeros(max(0, self.least_rank - sum(map(len, firsts))), *firsts[0].shape[1:]))
        first = torch.cat(firsts).contiguous()
        found = {self.first: first, self.second: self._second(stored)}
        return found | ({f"{self.name}.alpha": torch.tensor(float(len(first)))} if self.underscores else {})

    def _second(self, stored: Checkpoint) -> Tensor:
        info = self.infos(stored.tensors)[self.second]
        whole = torch.zeros(info.shape, dtype=info.dtype)
        row = column = 0
        for name, rows in self.members:
            if name is not None:
                own = stored.read(f"{name}.{B}")
                whole[row : row + rows, column : column + own.shape[1]] = own
                column += own.shape[1]
            row += rows
        return whole


def comfy_matrices(places: Iterable[Place], family: str | None = None) -> tuple[Matrix, ...]:
    """What a mix of these weights is made of in ComfyUI, for a family by name or the only one that has them.

    Raises ParameterError where no family with names there has all of them, where it is not clear which, and for LoRA
    biases.
    """
    places = list(places)
    biased = [place for place in places if place.has_bias]
    if biased:
        raise ParameterError(
            f"--loader comfy: {len(biased)} of {len(places)} weights have LoRA biases (first: {biased[0].module}), "
            "for which ComfyUI has no name; leave --loader out"
        )
    known = [own for own in installed() if own.name in SAME_NAMES or own.name in ORIGINAL]
    if family is not None and family not in (own.name for own in known):
        near = did_you_mean(family, [own.name for own in known])
        raise ParameterError(f'--family "{family}": its names in ComfyUI are not known here{near}; {_words(known)}')
    names: dict[str, list[str]] = {}
    for place in places:
        names.setdefault(place.component, []).append(place.module)
    fitting = [own for own in known if family in (None, own.name) and own.has_all(names)]
    if not fitting:
        raise ParameterError(
            f"--loader comfy: the {len(places)} weights (first: {places[0].module}) are not those of "
            f"{family or 'a model whose names in ComfyUI are known here'}; leave --loader out. {_words(known)}"
        )
    found = {own.name: _matrices(own, places) for own in fitting}
    first, *others = found
    differing = [name for name in others if found[name] != found[first]]
    if differing:
        raise ParameterError(
            f"--loader comfy: the {len(places)} weights could be those of {' or '.join([first, *differing])}, whose "
            f'names in ComfyUI differ; say which, for example --family "{first}"'
        )
    return found[first]


def _words(known: Iterable[Family]) -> str:
    return f"Known are {', '.join(own.name for own in known)}"


def write_comfy(source: Path, target: Path, matrices: Iterable[Matrix], header: Mapping[str, str]) -> Path:
    """A file in diffusers' names becomes one in ComfyUI's; memory is that of one matrix."""
    stored, matrices = Checkpoint.open(source), tuple(matrices)
    own = {key: text for key, text in header.items() if key != METADATA}  # of diffusers' names
    files = TensorFiles(target.parent, target.stem, all_infos(matrices, stored.tensors), ONE_FILE, own)
    for matrix in matrices:
        for name, tensor in matrix.tensors(stored).items():
            files.write(name, tensor)
    source.unlink()
    return target


def with_equal_ranks(matrices: Iterable[Matrix], stored: Mapping[str, TensorInfo]) -> tuple[Matrix, ...]:
    """All of the highest rank among them."""
    matrices = tuple(matrices)
    highest = max(matrix.infos(stored)[matrix.first].shape[0] for matrix in matrices)
    return tuple(replace(matrix, least_rank=highest) for matrix in matrices)


def all_infos(matrices: Iterable[Matrix], stored: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    return {name: info for matrix in matrices for name, info in matrix.infos(stored).items()}


def _matrices(family: Family, places: list[Place]) -> tuple[Matrix, ...]:
    """Raises ParameterError for modules that have no name."""
    two = any(place.component == "text_encoder_2" for place in places)
    nameless = [place.module for place in places if _named(family, place, two) is None]
    if nameless:
        raise ParameterError(
            f"--loader comfy: {len(nameless)} of {len(places)} modules of {family.name} (first: {nameless[0]}) have no "
            "name in ComfyUI that is known here; leave --loader out"
        )
    stored = {place.name: place for place in places}
    found: dict[str, Matrix] = {}
    for place in places:
        name, modules = _named(family, place, two) or ("", ())
        members = tuple(_member(family, place, module, stored) for module in modules)
        found.setdefault(name, Matrix(name, members, family.name in UNDERSCORES))
    return tuple(found.values())


def _named(family: Family, place: Place, two_texts: bool) -> tuple[str, tuple[str, ...]] | None:
    """The original matrix of a weight and the modules whose rows it has."""
    if place.component != family.component:
        one = "lora_te_" if family.component == "unet" and not two_texts else "lora_te1_"
        prefix = one if place.component == "text_encoder" else "lora_te2_"
        return f"{prefix}text_model_{place.module.removeprefix('text_model.').replace('.', '_')}", (place.module,)
    name, modules = LABEL_NAMES.get(place.module, place.module), (place.module,)
    if family.name in ORIGINAL:
        pattern, numbers = split_numbers(place.module)
        names = ((own, parts) for own, parts in ORIGINAL[family.name].items() if pattern in parts)
        original, parts = next(names, ("", ()))
        if not original:
            return None
        name, modules = with_numbers(original, numbers), tuple(with_numbers(part, numbers) for part in parts)
    return f"lora_unet_{name.replace('.', '_')}" if family.name in UNDERSCORES else f"diffusion_model.{name}", modules


def _member(family: Family, place: Place, module: str, stored: Mapping[str, Place]) -> tuple[str | None, int]:
    """A module that is not there has as many rows for its columns as in the published model."""
    full = f"{place.component}.{module}"
    if full in stored:
        return full, stored[full].shape[0]
    known = family.modules(family.component)
    assert known is not None  # of the component that has the module beside it
    rows, columns = known.shape(module)
    return None, rows * place.shape[1] // columns
