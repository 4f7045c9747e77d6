"""Many adapters over one base, none of them kept open: what each is called, and where its factors are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NoReturn

import torch

from ...algebra.delta import LowRank, low_parts
from ...algebra.finite import count_not_finite
from ...errors import CheckpointError, ParameterError
from ...models.adapter import Adapter
from ...models.layouts import TRANSPOSED, LoraModule
from ...models.lora_template import Template
from ...models.vectors import Vectors, open_model
from ...storage.checkpoint import Checkpoint
from ...storage.inputs import Input
from ...storage.run import track
from ...storage.slices import Slices
from ..adapters.pool import base_id, check_kinds

# What a library does not hold, and what to do about it.
ELSE = "leave that task out, or compress it with others without --method library"


@dataclass(frozen=True)
class Factors:
    """The low-rank changes of one adapter: of every weight that it changes, read when asked for and not kept.

    ``modules`` tells where the factors are stored, ``slices`` where in the file; of adapters that are no safetensors
    files, ``adapter`` itself is kept.
    """

    task: str
    modules: Mapping[str, LoraModule]
    nbytes: int
    rank: int
    slices: Slices | None = None
    input: Input | None = None
    adapter: Adapter | None = None

    @classmethod
    def of(cls, task: str, adapter: Adapter) -> Factors:
        pairs = {name: module.pair for name, module in adapter.factors.items()}
        nbytes = sum(adapter.tensors[stored].nbytes for pair in pairs.values() for stored in pair)
        how = (dict(adapter.factors), nbytes, adapter.rank)
        if adapter.file is None or adapter.file.suffix != ".safetensors":
            return cls(task, *how, adapter=adapter)
        slices = Slices.open(adapter.file, adapter.label)
        if any(stored not in slices.places for pair in pairs.values() for stored in pair):
            return cls(task, *how, adapter=adapter)  # under names that stand for others
        return cls(task, *how, slices, Input(adapter.file, adapter.label))

    def change(self, name: str) -> LowRank | None:
        """[n, r] @ [r, m], float32, unchecked; None for a weight that the adapter leaves as it is."""
        if name not in self.modules:
            return None
        if self.slices is None or self.input is None:
            assert self.adapter is not None
            delta = self.adapter.delta(name)
            assert delta is not None
            (low,) = low_parts([delta])
            return LowRank(low.left.to(torch.float32), low.right.to(torch.float32))
        module = self.modules[name]
        a, b = (self.slices.read(stored).to(torch.float32) for stored in module.pair)
        self.input.now_read()
        product = module.product(a, b)
        return product.T if module.layout.kind in TRANSPOSED else product

    def refuse(self, name: str) -> NoReturn:
        """CheckpointError for a change whose norm is not finite: the factor that holds NaN or infinity, and how many,
        or that the product is too large."""
        for stored in self.modules[name].pair if self.slices else ():
            assert self.slices is not None
            tensor = self.slices.read(stored)
            if bad := count_not_finite(tensor):
                raise CheckpointError(
                    f'"{self.task}": {stored} holds {bad} NaN or infinite numbers of {tensor.numel()}; the '
                    "training run diverged or the file is damaged: use an earlier checkpoint"
                )
        raise CheckpointError(
            f'"{self.task}": its change of {name} is larger than float32 can hold; the training run diverged, or its '
            "scale is wrong: use an earlier checkpoint"
        )


@dataclass(frozen=True)
class Opened:
    """T adapters by task, the base's weights that they change (in its order), and what their stock LoRA looks like."""

    base: Checkpoint
    factors: tuple[Factors, ...]
    names: tuple[str, ...]
    template: Template
    base_id: str
    dtype: torch.dtype
    warnings: list[str] = field(default_factory=list)

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(one.task for one in self.factors)

    @property
    def nbytes(self) -> int:
        """What the adapters take in their own dtypes."""
        return sum(one.nbytes for one in self.factors)

    @cached_property
    def rank(self) -> int:
        return max(one.rank for one in self.factors)

    def shape(self, name: str) -> tuple[int, int]:
        """[n, m] of a weight's change, convolutions flattened."""
        info = self.base.tensors[name]
        return info.shape[0], info.numel // info.shape[0]

    def changes(self, name: str, members: Sequence[int]) -> LowRank:
        """Of some of the adapters: left [t, n, r] and right [t, r, m], those of lower rank with zeros behind."""
        found = [self.factors[index].change(name) for index in members]
        rank = max((one.rank for one in found if one is not None), default=0)
        rows, columns = self.shape(name)
        left, right = torch.zeros(len(found), rows, rank), torch.zeros(len(found), rank, columns)
        for place, one in enumerate(found):
            if one is not None:
                left[place, :, : one.rank], right[place, : one.rank] = one.left, one.right
        return LowRank(left, right)


def open_factors(base: str | Path | Checkpoint, tasks: Mapping[str, str | Path]) -> Opened:
    """Open every adapter once, check it against the base, and keep what is needed to read it again.

    Raises TvbasesError for what cannot be read, does not fit, or has no place in a library.
    """
    if not tasks:
        raise ParameterError("no task given; name at least one, for example --task math=path/to/math")
    opened = base if isinstance(base, Checkpoint) else Checkpoint.open(base)
    found: list[Factors] = []
    kept: list[Vectors] = []
    seen: set[str] = set()
    dtype, warnings, ids = None, [], set()
    for vectors in _vectors(opened, tasks):
        (task,), (adapter,) = vectors.tasks, vectors.models.values()
        assert isinstance(adapter, Adapter)
        _check_holdable(task, vectors, adapter)
        found.append(Factors.of(task, adapter))
        warnings += vectors.coverage.notes()
        stored = [adapter.tensors[name].dtype for module in adapter.factors.values() for name in module.pair]
        for one in set(stored):
            dtype = one if dtype is None else torch.promote_types(dtype, one)
        own = base_id(vectors)
        if not kept or not seen.issuperset(adapter.names) or own not in ids:
            kept.append(vectors)
            seen |= set(adapter.names)
            ids.add(own)
    label = ids.pop() if len(ids) == 1 else opened.label
    adapters = [model for vectors in kept for model in vectors.models.values() if isinstance(model, Adapter)]
    template = Template.of(adapters, label)
    names = tuple(name for name in opened.tensors if name in seen)
    _check_one_base(opened, names, seen)
    return Opened(opened, tuple(found), names, template, label, dtype or torch.float32, warnings)


def _vectors(base: Checkpoint, tasks: Mapping[str, str | Path]) -> Iterator[Vectors]:
    """One adapter after another, each checked against the base as any other."""
    for task, path in track(list(tasks.items()), "Opening adapters", unit=" adapters"):
        model = open_model(path, base)
        if not isinstance(model, Adapter):
            raise ParameterError(f'"{task}": a library is of adapters, and this is a full checkpoint; {ELSE}')
        vectors = Vectors.of_models(base, {task: model})
        check_kinds(vectors)
        yield vectors


def _check_holdable(task: str, vectors: Vectors, adapter: Adapter) -> None:
    whole = [name for name in vectors.names if name not in adapter.factors]
    for what, names in (
        ("DoRA scales rows of the base", [name for name in adapter.factors if adapter.has_dora]),
        ("saved modules or biases", [*whole, *adapter.head_names]),
    ):
        if names:
            raise ParameterError(
                f'"{task}": {what} ({len(names)} weights, first: {names[0]}), which a library does not hold; {ELSE}'
            )


def _check_one_base(base: Checkpoint, names: Sequence[str], seen: set[str]) -> None:
    if lost := sorted(seen.difference(names)):
        raise ParameterError(
            f"{len(lost)} weights that the adapters change are not stored in the base ({base.label}; first: "
            f"{lost[0]}); a library holds changes of stored weights only"
        )
