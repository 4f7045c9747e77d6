"""Where the tensors of a checkpoint are in a model in memory.

transformers renames weights while it loads them, stacks the experts of a mixture and fuses or splits matrices, and does
the reverse when it saves. That reverse is asked for here, on tensors without numbers: what comes out says of every
stored tensor which numbers of which parameter it is. All of these conversions move numbers and change none.
"""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import MismatchError


@dataclass(frozen=True)
class Region:
    """Some numbers of a contiguous tensor: a strided view of it, or else ``index`` in the flattened tensor."""

    shape: tuple[int, ...]
    stride: tuple[int, ...] = ()
    offset: int = 0
    index: Tensor | None = None

    def take(self, tensor: Tensor) -> Tensor:
        """[*shape] a view where it can be one."""
        if self.index is not None:
            return tensor.reshape(-1)[self.index.to(tensor.device)].reshape(self.shape)
        return tensor.as_strided(self.shape, self.stride, tensor.storage_offset() + self.offset)

    def put(self, tensor: Tensor, values: Tensor) -> None:
        if self.index is not None:
            tensor.view(-1)[self.index.to(tensor.device)] = values.reshape(-1)
        else:
            self.take(tensor).copy_(values.reshape(self.shape))


@dataclass(frozen=True)
class Part:
    """``inner``, numbers of a model's parameter, are ``outer`` of a stored tensor; None is all of it, in its shape."""

    parameter: str
    inner: Region | None = None
    outer: Region | None = None

    @property
    def is_of_rows(self) -> bool:
        """Whether whole rows of a matrix are whole rows of the stored one."""
        return all(
            region is None
            or (len(region.shape) == 2 and region.stride[1:] == (1,) and region.stride[0] == region.shape[1])
            for region in (self.inner, self.outer)
        )

    def take_inner(self, parameter: Tensor) -> Tensor:
        return parameter if self.inner is None else self.inner.take(parameter)

    def put_inner(self, parameter: Tensor, values: Tensor) -> None:
        parameter.copy_(values) if self.inner is None else self.inner.put(parameter, values)

    def take_outer(self, stored: Tensor) -> Tensor:
        return stored if self.outer is None else self.outer.take(stored.contiguous())

    def put_outer(self, stored: Tensor, values: Tensor) -> None:
        stored.copy_(values) if self.outer is None else self.outer.put(stored, values)


@dataclass(frozen=True)
class Stored:
    """A tensor of a checkpoint, and where its numbers are in memory."""

    shape: tuple[int, ...]
    parts: tuple[Part, ...]

    @property
    def is_view(self) -> bool:
        return len(self.parts) == 1 and self.parts[0].outer is None

    @property
    def is_whole(self) -> bool:
        """Whether it is one parameter, all of it and in its shape."""
        return self.is_view and self.parts[0].inner is None


class Translation:
    """The tensors ``names`` of a checkpoint, read and written in the memory of a model, by the checkpoint's names."""

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        """Names as the files have them, or as the model has them. Raises MismatchError for names that it lacks."""
        wanted = list(names)
        self._state = _tensors(model.state_dict(keep_vars=True))
        find = _finder(model, self._state)
        found = {name: find(name) for name in wanted}
        missing = [name for name, stored in found.items() if stored is None]
        if missing:
            raise MismatchError(
                f"{len(missing)} of {len(wanted)} weights that change are not in the model (first: {missing[0]}; the "
                f"model has {next(iter(self._state), 'none')}); load the class of model that the base was saved from"
            )
        self.stored: dict[str, Stored] = {name: stored for name, stored in found.items() if stored is not None}
        absent = [name for name in wanted if any(self._state[p].is_meta for p in self.parameters(name))]
        if absent:
            raise MismatchError(
                f"{len(absent)} of {len(wanted)} weights that change are offloaded (first: {absent[0]}), where they "
                "cannot be changed; load the model whole, or write the changed model and evaluate that"
            )

    def parameters(self, name: str) -> list[str]:
        """What the model calls the tensors that hold the numbers of ``name``."""
        return [part.parameter for part in self.stored[name].parts]

    def read(self, name: str) -> Tensor:
        """The model's own numbers, a view of them where there is one, in the shape that is stored."""
        stored = self.stored[name]
        if stored.is_view:
            part = stored.parts[0]
            return part.take_inner(self._state[part.parameter])
        return _gathered(stored, self._state)

    def write(self, name: str, values: Tensor) -> None:
        """Put ``values`` into the model's memory, in whatever order they lie there."""
        for part in self.stored[name].parts:
            part.put_inner(self._state[part.parameter], part.take_outer(values))

    def assembled(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The model's parameters, by its own names, made of stored ``tensors`` and differentiable in them.

        What ``tensors`` does not hold of a parameter are the model's numbers.
        """
        pieces: dict[str, list[tuple[str, Part]]] = {}
        for name in tensors:
            for part in self.stored[name].parts:
                pieces.setdefault(part.parameter, []).append((name, part))
        found = {}
        for parameter, holders in pieces.items():
            (name, part), *others = holders
            if not others and part.inner is None and part.outer is None:
                found[parameter] = tensors[name]
                continue
            start = self._state[parameter].detach().to(tensors[name].dtype)
            parts = [part for _, part in holders]
            found[parameter] = _Scatter.apply(parts, start, *(tensors[name] for name, _ in holders))
        return found


def stored_in(model: nn.Module, names: Iterable[str]) -> dict[str, Stored]:
    """Where the tensors ``names`` of a checkpoint are in the model's memory; those that it lacks are left out."""
    find = _finder(model, _tensors(model.state_dict(keep_vars=True)))
    return {name: stored for name in names if (stored := find(name)) is not None}


def absent_from(model: nn.Module, wanted: Iterable[str], given: Iterable[str]) -> list[str]:
    """Those of the stored tensors ``wanted`` that a parameter of the model would miss if only ``given`` were loaded.

    Parameters that are tied are one, and tensors that the model does not have are not missed.
    """
    state = _tensors(model.state_dict(keep_vars=True))
    find = _finder(model, state)

    def filled(name: str) -> set[int]:
        stored = find(name)
        return set() if stored is None else {id(state[part.parameter]) for part in stored.parts}

    loaded = {parameter for name in given for parameter in filled(name)}
    return [name for name in wanted if not filled(name) <= loaded]


class _Scatter(torch.autograd.Function):
    """Numbers of stored tensors put into a parameter. A permutation: its gradient is the way back."""

    @staticmethod
    def forward(ctx: Any, parts: list[Part], start: Tensor, *stored: Tensor) -> Tensor:
        ctx.parts, ctx.shapes = parts, [tensor.shape for tensor in stored]
        found = start.clone(memory_format=torch.contiguous_format)
        for part, tensor in zip(parts, stored, strict=True):
            part.put_inner(found, part.take_outer(tensor))
        return found

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return None, None, *_Gather.apply(ctx.parts, ctx.shapes, gradient)


class _Gather(torch.autograd.Function):
    """Numbers of a parameter as stored tensors, zero where the parameter does not reach."""

    @staticmethod
    def forward(ctx: Any, parts: list[Part], shapes: list[torch.Size], parameter: Tensor) -> tuple[Tensor, ...]:
        ctx.parts, ctx.start = parts, torch.zeros_like(parameter)
        parameter = parameter.contiguous()
        found = tuple(parameter.new_zeros(shape) for shape in shapes)
        for part, tensor in zip(parts, found, strict=True):
            part.put_outer(tensor, part.take_inner(parameter))
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return None, None, _Scatter.apply(ctx.parts, ctx.start, *gradients)


def _gathered(stored: Stored, state: Mapping[str, Tensor]) -> Tensor:
    found = state[stored.parts[0].parameter].detach().new_empty(stored.shape)
    for part in stored.parts:
        part.put_outer(found, part.take_inner(state[part.parameter].detach()))
    return found


Find = Callable[[str], "Stored | None"]
_KNOWN: weakref.WeakKeyDictionary[nn.Module, tuple[tuple[str, ...], Find]] = weakref.WeakKeyDictionary()


def _finder(model: nn.Module, state: Mapping[str, Tensor]) -> Find:
    """Finds a tensor by its stored name or by the model's own; made once per model, as long as its names stay."""
    names = tuple(state)
    if model not in _KNOWN or _KNOWN[model][0] != names:
        _KNOWN[model] = names, _new_finder(model, {name: tuple(tensor.shape) for name, tensor in state.items()})
    return _KNOWN[model][1]


def _new_finder(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> Find:
    own = {name: Stored(shape, (Part(name),)) for name, shape in shapes.items()}
    transformers = sys.modules.get("transformers")  # who has a model of it has imported it
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return own.get
    layout = _saved_layout(model, shapes)
    canonical = _canonical(model, shapes)
    loaded = {canonical(name): stored for name, stored in layout.items()}
    return lambda name: layout.get(name) or loaded.get(canonical(name)) or own.get(name)


def _canonical(model: Any, shapes: Mapping[str, tuple[int, ...]]) -> Callable[[str], str]:
    """A stored name as the loader reads it: old names renewed, the trunk's prefix put in front or taken away.

    The names of a stored tensor that files of another age or of the trunk alone have are one name then.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping: list[Any] = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    prefix = f"{model.base_model_prefix}."

    def name_of(name: str) -> str:
        renamed = rename_source_key(name, renamings, [])[0]
        target = rename_source_key(renamed, [], converters)[0]
        if target.startswith(prefix) and target.removeprefix(prefix) in shapes:
            return renamed.removeprefix(prefix)
        return prefix + renamed if target not in shapes and prefix + target in shapes else renamed

    return name_of


def _saved_layout(model: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Stored]:
    """What save_pretrained would write, by name, and where it comes from."""
    from transformers.core_model_loading import revert_weight_conversion

    shadows = {name: torch.empty(shape, device="meta").as_subclass(_Shadow) for name, shape in shapes.items()}
    owners = {shadow.untyped_storage()._cdata: name for name, shadow in shadows.items()}
    found, unclear, reached = {}, [], dict.fromkeys(shapes, 0)
    for name, tensor in revert_weight_conversion(model, dict(shadows)).items():
        parts = _parts(tensor, owners, shapes)
        if parts is None:
            unclear.append(name)
            continue
        found[name] = Stored(tuple(tensor.shape), parts)
        for part in parts:
            reached[part.parameter] += math.prod(part.inner.shape if part.inner else shapes[part.parameter])
    if unclear:
        lost = {name: shape for name, shape in shapes.items() if reached[name] < math.prod(shape)}
        found |= _by_index(model, lost, unclear)
    return found


class _Shadow(Tensor):
    """A tensor on no device whose pieces stay views of it, so that they tell where they come from."""

    pieces: tuple[tuple[Tensor, Region], ...] = ()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.contiguous:
            return args[0]
        found: Any = super().__torch_function__(func, types, args, kwargs or {})
        if func is torch.cat:
            dim, start, pieces = args[1] if len(args) > 1 else (kwargs or {}).get("dim", 0), 0, []
            for piece in args[0]:
                pieces.append((piece, _region(found.narrow(dim, start, piece.shape[dim]))))
                start += piece.shape[dim]
            found.pieces = tuple(pieces)
        return found


def _region(view: Tensor) -> Region:
    return Region(tuple(view.shape), view.stride(), int(view.storage_offset()))


def _parts(tensor: Tensor, owners: Mapping[int, str], shapes: Mapping[str, tuple[int, ...]]) -> tuple[Part, ...] | None:
    """None where a piece is no view of a parameter."""
    found = []
    for piece, outer in getattr(tensor, "pieces", ()) or ((tensor, None),):
        parameter = owners.get(piece.untyped_storage()._cdata)
        if parameter is None:
            return None
        whole = tuple(piece.shape) == shapes[parameter] and piece.is_contiguous()
        found.append(Part(parameter, None if whole else _region(piece), outer))
    return tuple(found)


def _by_index(model: Any, shapes: Mapping[str, tuple[int, ...]], names: Iterable[str]) -> dict[str, Stored]:
    """The same for tensors whose numbers are interleaved or permuted: numbers that are their own addresses."""
    from transformers.core_model_loading import revert_weight_conversion

    addresses, starts, end = {}, {}, 0
    for name, shape in shapes.items():
        starts[name], size = end, math.prod(shape)
        addresses[name] = torch.arange(end, end + size).reshape(shape)
        end += size
    reverted = revert_weight_conversion(model, dict(addresses))
    found = {}
    for name in names:
        flat, parts = reverted[name].reshape(-1), []
        for parameter, start in starts.items():
            outer = ((flat >= start) & (flat < start + math.prod(shapes[parameter]))).nonzero().reshape(-1)
            if len(outer):
                shape = (len(outer),)
                parts.append(Part(parameter, Region(shape, index=flat[outer] - start), Region(shape, index=outer)))
        found[name] = Stored(tuple(reverted[name].shape), tuple(parts))
    return found


def _tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
