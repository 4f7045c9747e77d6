"""Checkpoints read lazily by name: safetensors or PyTorch files, single or sharded, local or on the Hub."""

from __future__ import annotations

import copy
import hashlib
import zipfile
from collections.abc import Callable, Hashable, Iterable, Mapping, Set
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError
from .files import locate, weight_files
from .inputs import Input
from .model_config import read_model_config
from .quantised import QuantisedWeight, numbers_of, quantisation, written_dtype
from .tensors import DTYPES, TensorInfo, check_tensor
from .tied import copies, followers

# Under which names training scripts put a model's weights beside other things.
STATES = ("state_dict", "model_state_dict", "model", "module")
FINGERPRINT_ELEMENTS = 256


class Checkpoint:
    """The tensors of one model: ``tensors`` tells name, shape and dtype; ``read`` maps one tensor at a time.

    Opening reads headers only. A tensor read from safetensors is a view of the mapped file, so it costs page cache
    and not memory of its own; but a weight in ``quantised`` is a copy, dequantised whenever it is read.
    """

    def __init__(
        self,
        label: str,
        tensors: Mapping[str, TensorInfo],
        read: Callable[[str], Tensor],
        path: Path | None = None,
        config: Mapping[str, Any] | None = None,
        quantised: Mapping[str, QuantisedWeight] | None = None,
    ) -> None:
        self.label = label
        self.path = path
        self.config = dict(config or {})
        self.quantised = dict(quantised or {})
        self._read = read
        self._followers: dict[str, str] = {}
        self._made: dict[str, Callable[[], Tensor]] = {}
        self._added: tuple[str, ...] = ()
        self._stored = self
        tied = copies(self.config, _shapes(tensors), self.read)
        self.tensors = {name: info for name, info in tensors.items() if name not in tied}

    @classmethod
    def open(cls, source: str | Path, *, revision: str | None = None, label: str | None = None) -> Checkpoint:
        """Open a directory, a weight file or a Hub id. Messages call it ``label``, by default what was given.

        Raises CheckpointError when there is none, when it is damaged, or when it is something else.
        """
        path = locate(str(source), revision)
        label = label or str(source)
        files, weight_map = weight_files(path, label)
        readers = {file: _open_file(file, label) for file in files}
        _check_overlap(readers, label)
        tensors: dict[str, TensorInfo] = {}
        owner: dict[str, Path] = {}
        for file, reader in readers.items():
            for name, info in reader.tensors.items():
                if weight_map is not None and weight_map.get(name) != file.name:
                    continue
                tensors[name], owner[name] = info, file
        _check_index(weight_map, tensors.keys() | {name for reader in readers.values() for name in reader.tied}, label)
        if not tensors:
            raise CheckpointError(f'"{label}": holds no tensors')
        directory = path if path.is_dir() else path.parent
        own = _unwrapped(tensors)
        config = read_model_config(directory, label)
        named = {name: tensors[stored] for name, stored in own.items()}
        read = lambda name: readers[owner[own[name]]].read(own[name])  # noqa: E731
        logical, quantised = numbers_of(label, named, read, config, quantisation(directory, config))
        return cls(label, logical, read, path, config, quantised)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor], label: str = "state dict") -> Checkpoint:
        """An in-memory model; the tensors are borrowed, not copied."""
        for name, tensor in state.items():
            check_tensor(name, tensor, label)
        infos = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()}
        return cls(label, infos, lambda name: state[name].detach().cpu())

    def read(self, name: str) -> Tensor:
        """The tensor as stored or dequantised, on the CPU. Do not write to it."""
        stored = self._followers.get(name, name)
        made = self._made.get(name) or self._made.get(stored)
        if made is not None:
            return made()
        weight = self.quantised.get(stored)
        return self._read(stored) if weight is None else weight.dequantise()

    def with_outputs(self, wanted: Mapping[str, TensorInfo]) -> Checkpoint:
        """The same model with the output matrices among ``wanted`` that it lacks because they are its embedding."""
        found = followers(self.config, _shapes(self.tensors), _shapes(wanted))
        if not found:
            return self
        untied = copy.copy(self)
        untied.tensors = {**self.tensors, **{name: self.tensors[embedding] for name, embedding in found.items()}}
        untied._followers = {**self._followers, **found}
        return untied

    def with_made(self, made: Mapping[str, tuple[TensorInfo, Callable[[], Tensor]]]) -> Checkpoint:
        """The same model with tensors that are made of its own whenever they are read: of other rows, for example.

        Its fingerprint stays that of what is stored.
        """
        if not made:
            return self
        view = copy.copy(self)
        view.tensors = {**self.tensors, **{name: info for name, (info, _) in made.items()}}
        view._made = {**self._made, **{name: read for name, (_, read) in made.items()}}
        return view

    def with_biases(self, biases: Mapping[str, TensorInfo]) -> Checkpoint:
        """With biases of zeros that its layers lack, which an adapter can change and no checkpoint of it can hold."""
        lacking = {name: info for name, info in biases.items() if name not in self.tensors}
        made = {name: (info, partial(torch.zeros, info.shape, dtype=info.dtype)) for name, info in lacking.items()}
        view = self.with_made(made)
        if lacking:
            view._added = (*self._added, *lacking)
        return view

    def check_storable(self) -> None:
        """CheckpointError where it has biases that no checkpoint of it can hold."""
        if self._added:
            raise CheckpointError(
                f'"{self.label}": {len(self._added)} biases are an adapter\'s (lora_bias), of layers that have none in '
                f"the base (first: {self._added[0]}), so that no checkpoint of it holds them; write an adapter "
                "instead, or leave that one out"
            )

    @property
    def stored(self) -> Checkpoint:
        """The model as it is in its files."""
        return self._stored

    def renamed(self, rename: Callable[[str], str]) -> Checkpoint:
        """The same tensors by other names, as a larger model has them."""
        found, read = copy.copy(self), self._read
        stored = {rename(name): name for name in self.tensors}
        found.tensors = {new: self.tensors[name] for new, name in stored.items()}
        found.quantised = {rename(name): weight for name, weight in self.quantised.items()}
        found._followers = {rename(name): rename(first) for name, first in self._followers.items()}
        found._read = lambda name: read(stored.get(name) or name)
        return found

    def mapped(self, name: str) -> list[Tensor]:
        """What is stored of a tensor, mapped and not dequantised."""
        stored = self._followers.get(name, name)
        weight = self.quantised.get(stored)
        return [self._read(part) for part in ((stored,) if weight is None else weight.parts)]

    def copied(self, name: str) -> int:
        """The bytes that a tensor takes when it has been read, beside the mapped file."""
        weight = self._quantised(name)
        made = self.tensors[name].nbytes if name in self._made else 0
        return made + (0 if weight is None else weight.info.nbytes)

    def _quantised(self, name: str) -> QuantisedWeight | None:
        return self.quantised.get(self._followers.get(name, name))

    def written(self, dtype: torch.dtype | None = None) -> dict[str, TensorInfo]:
        """The tensors as a model made of this one stores them: floats in ``dtype``.

        None is each tensor's own, of dequantised ones the 16-bit float that the configuration declares, else bfloat16.
        Raises CheckpointError; see check_storable.
        """
        self.check_storable()
        own = written_dtype(self.config)
        return {
            name: TensorInfo(info.shape, dtype or (own if self._quantised(name) else info.dtype))
            if info.dtype.is_floating_point
            else info
            for name, info in self.tensors.items()
        }

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.tensors.values())

    def fingerprint(self) -> str:
        """Digest of names, shapes, dtypes and the first numbers of every tensor: tells bases apart cheaply."""
        digest, stored = hashlib.sha256(), self._stored
        for name in sorted(stored.tensors):
            info = stored.tensors[name]
            digest.update(f"{name} {info.dtype} {list(info.shape)}\n".encode())
            for tensor in stored.mapped(name):
                head = tensor.reshape(-1)[:FINGERPRINT_ELEMENTS].contiguous()
                digest.update(head.view(torch.uint8).numpy().tobytes() if head.numel() else b"")
        return digest.hexdigest()[:32]


def _check_index(weight_map: dict[str, str] | None, found: Set[str], label: str) -> None:
    absent = [name for name in weight_map or () if name not in found]
    if absent:
        raise CheckpointError(
            f'"{label}": {len(absent)} of {len(weight_map or ())} tensors in the shard index are not in their shard '
            f"(first: {absent[0]}); download or copy the checkpoint again"
        )


def _check_overlap(readers: Mapping[Path, _FileReader], label: str) -> None:
    """CheckpointError for a tensor that two shards hold: which of them is the model's cannot be known."""
    owner: dict[str, Path] = {}
    twice = []
    for file, reader in readers.items():
        twice += [(name, owner[name], file) for name in reader.tensors if name in owner]
        owner |= dict.fromkeys(reader.tensors, file)
    if twice:
        name, first, second = twice[0]
        raise CheckpointError(
            f'"{label}": {len(twice)} tensors are in two shards (first: {name}, in {first.name} and {second.name}), '
            "probably of two different savings; remove the files of the older one, or save the checkpoint again"
        )


@dataclass(frozen=True)
class _FileReader:
    tensors: dict[str, TensorInfo]
    read: Callable[[str], Tensor]
    tied: frozenset[str] = frozenset()
    """Further names of the same tensors."""


def _open_file(file: Path, label: str) -> _FileReader:
    before = Input(file, label)
    opened = _open_safetensors(file, label) if file.suffix == ".safetensors" else _open_pickle(file, label)

    def read(name: str) -> Tensor:
        before.now_read()
        return opened.read(name)

    return replace(opened, read=read)


def _open_safetensors(file: Path, label: str) -> _FileReader:
    try:
        handle = safe_open(str(file), framework="pt")
        slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f'"{label}": {file.name} is truncated or not a safetensors file ({error}); download or save it again'
        ) from error
    infos = {}
    for name, piece in slices.items():
        if piece.get_dtype() not in DTYPES:
            raise CheckpointError(f'"{label}": tensor {name} has dtype {piece.get_dtype()}, which is not supported')
        infos[name] = TensorInfo(tuple(piece.get_shape()), DTYPES[piece.get_dtype()])
    return _FileReader(infos, handle.get_tensor)


def _open_pickle(file: Path, label: str) -> _FileReader:
    try:
        # Files from before torch 1.6 are no zip archives and cannot be mapped.
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # on damaged bytes, torch's unpickler ends in whatever they lead it to
        raise CheckpointError(
            f'"{label}": {file.name} is damaged or is a pickle that runs code, which is never loaded; '
            "save it as safetensors (model.save_pretrained) and try again"
        ) from error
    state = _state_of(state)
    tensors: dict[str, Tensor] = {}
    tied: set[str] = set()
    seen: set[Hashable] = set()
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            continue
        check_tensor(name, tensor, label)
        storage = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride())
        if storage in seen and tensor.numel():
            tied.add(name)  # the first name stands for all, as in safetensors files
            continue
        seen.add(storage)
        tensors[name] = tensor
    infos = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    return _FileReader(infos, lambda name: tensors[name].detach(), frozenset(tied))


def _shapes(tensors: Mapping[str, TensorInfo]) -> dict[str, tuple[int, ...]]:
    return {name: info.shape for name, info in tensors.items()}


def _state_of(pickled: Any) -> Mapping[str, Any]:
    """The weights among what a training run has put into one file."""
    if not isinstance(pickled, Mapping) or any(isinstance(value, Tensor) for value in pickled.values()):
        return pickled if isinstance(pickled, Mapping) else {}
    inner = (pickled[key] for key in STATES if isinstance(pickled.get(key), Mapping))
    return next(inner, pickled)


def _unwrapped(names: Iterable[str]) -> dict[str, str]:
    """{the model's own name: the stored one}, without what torch.compile and parallel training put around a model."""
    stored = list(names)
    own = [name.replace("_orig_mod.", "") for name in stored]
    if own and all(name.startswith("module.") for name in own):
        own = [name.removeprefix("module.") for name in own]
    return dict(zip(own if len(set(own)) == len(own) else stored, stored, strict=True))
