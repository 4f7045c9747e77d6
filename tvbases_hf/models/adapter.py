"""LoRA and DoRA adapters as low-rank task vectors: PEFT directories read exactly, or refused by name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..algebra.blocks import is_zero
from ..algebra.delta import Delta, Dense, Dora, LowRank, dense
from ..algebra.finite import count_not_finite
from ..errors import CheckpointError, MismatchError, TvbasesError
from ..storage.checkpoint import Checkpoint, TensorInfo
from ..storage.files import locate
from ..storage.tied import is_token_matrix
from .adapter_files import adapter_folder, host
from .layouts import TRANSPOSED, Layout, LoraModule, find_layout
from .lora_config import CONFIG_FILE, WEIGHT_FILES, LoraOptions, is_lora, read_config
from .lora_parts import BIAS, MAGNITUDE, PAIRS, Parts, check_parts
from .names import Naming, is_shared, is_tied_away, twins_of
from .parameters import Parameter, Place, check_factors, parameters_of, places_in
from .skeleton import check_not_in_parts, names_meant, skeleton


class Adapter:
    """One adapter over one base: ``names`` are the base's tensors it changes, ``delta`` gives a change.

    Factors are read when asked for. The base is read for DoRA and for saved modules only. Two things cannot be seen in
    files and are taken to be PEFT's usual ones: that convolutions pad with zeros and are not dilated, and that
    embeddings do not limit their norm.
    """

    def __init__(
        self,
        label: str,
        config: Mapping[str, Any],
        stored: Checkpoint,
        base: Checkpoint,
        parameters: Mapping[str, Parameter] | None = None,
    ) -> None:
        """Match every stored tensor to a tensor of the base.

        Args:
            parameters: by stored module, those of ``target_parameters``; None to find them in the base's class.

        Raises:
            CheckpointError: a variant that is not a plain change of weights, or two files that do not belong together.
            MismatchError: a module that the base does not have or uses twice, or factors of another shape.
        """
        self.label, self.config = label, dict(config)
        self._stored, self._base = stored, base
        self._options = LoraOptions.parse(self.config, label)
        found = Parts.of(stored, label)
        parts, saved = found.factors, found.saved
        self._places, self._of_parameters = self._find_parameters(parts, parameters)
        for module, own in parts.items():
            shapes = {part: self._shape(name) for part, name in own.items()}
            check_parts(label, module, shapes, self._options)
        weights = [f"{module}.weight" for module in (*parts, *found.tokens)]
        memory = names_meant([*weights, *saved], base)
        self._head = {name: saved.pop(name) for name in self._find_head(saved, memory)} if weights else {}
        check_not_in_parts(label, self._head, base)
        twins = twins_of(saved, base, self.config, self._read)
        saved = {name: stored for name, stored in saved.items() if name not in twins}
        self.naming = self._resolve(weights, list(saved), memory)
        self._twins = {self._name(embedding): output for output, embedding in twins.items()}
        self._modules: dict[str, LoraModule] = {}
        self._biases: dict[str, LoraModule] = {}
        for module, own in parts.items():
            self._add_module(module, own)
        self._saved = self._match_saved(saved)
        self._tokens = self._match_tokens(found.tokens)
        self.names = tuple(dict.fromkeys([*self._modules, *self._biases, *self._saved, *self._tokens, *self._places]))
        self._refuse_shared()

    @classmethod
    def open(
        cls, source: str | Path, base: Checkpoint, *, revision: str | None = None, label: str | None = None
    ) -> Adapter:
        """Open a PEFT directory or Hub id. Pickled weights are read with ``weights_only`` and never run code."""
        label = label or str(source)
        path = adapter_folder(locate(str(source), revision))
        config = read_config(path, label)
        file = next((path / name for name in WEIGHT_FILES if (path / name).is_file()), None)
        if file is None:
            raise CheckpointError(f'"{label}": {CONFIG_FILE} is here but not {WEIGHT_FILES[0]}; copy the weights too')
        stored = Checkpoint.open(file, label=label)
        return cls(label, config, stored, base) if is_lora(config) else host().open_adapter(path, config, stored, base)

    @property
    def base_id(self) -> str:
        """The base that the adapter says it was trained on; empty if it says nothing."""
        return str(self.config.get("base_model_name_or_path") or "")

    @property
    def directory(self) -> Path | None:
        """The folder that it was read from."""
        return None if self._stored.path is None else self._stored.path.parent

    @property
    def rank(self) -> int:
        """The largest rank of any module."""
        return max((self._rank(module) for module in self._modules.values()), default=0)

    @property
    def has_dora(self) -> bool:
        return any(MAGNITUDE in module.parts for module in self._modules.values())

    @property
    def changes_nothing(self) -> bool:
        """Whether it leaves the base as it is, up to rounding, as an adapter does before it is trained."""
        return all(delta is None or is_zero(delta) for delta in map(self.delta, self.names))

    @property
    def factors(self) -> Mapping[str, LoraModule]:
        """Where the factors of every weight that has some are stored."""
        return self._modules

    @property
    def file(self) -> Path | None:
        """The file that it was read from."""
        return self._stored.path

    @property
    def saved_names(self) -> tuple[str, ...]:
        """The base's tensors that the adapter carries whole: ``modules_to_save`` and trained biases."""
        return tuple(self._saved)

    @property
    def saved_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the tensors of ``saved_names``: other than the base's where the vocabularies differ."""
        return {name: self._shape(stored) for name, stored in self._saved.items()}

    @property
    def twins(self) -> Mapping[str, str]:
        """{an embedding of the base: the adapter's name of the output that is tied to it}, saved alike as both."""
        return self._twins

    def saved(self, name: str) -> Tensor:
        """The tensor that the adapter carries for the base's ``name``."""
        return self._read(self._saved[name])

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """What is stored, by stored name."""
        return self._stored.tensors

    @property
    def head_names(self) -> tuple[str, ...]:
        """Tensors of saved modules that the base lacks, a classifier for example, by the adapter's name.

        They are no change of the base, but an adapter that is made of this one keeps them.
        """
        return tuple(self._head)

    @property
    def head(self) -> dict[str, Tensor]:
        """The tensors of ``head_names``."""
        return {name: self._read(stored) for name, stored in self._head.items()}

    def fingerprint(self) -> str:
        """Digest of the configuration, and of names, shapes, dtypes and first numbers of what is stored."""
        config = json.dumps(self.config, sort_keys=True, default=str)
        return hashlib.sha256(f"{config} {self._stored.fingerprint()}".encode()).hexdigest()[:32]

    def delta(self, name: str) -> Delta | None:
        """The change of the base's tensor ``name``; None where the adapter changes nothing.

        Low-rank or Dora for modules with factors, convolutions flattened to [out, in * kernel] as PEFT does; dense for
        biases, saved modules, and DoRA of a weight stored as [in, out], which scales columns and not rows.
        Raises CheckpointError for NaN or infinity.
        """
        if name in self._modules:
            return self._change(self._modules[name], name)
        if name in self._tokens:
            return self._change_of_rows(name)
        if name in self._places:
            return self._change_of_parameter(self._places[name])
        saved = Dense(self.saved(name), self._base.read(name)) if name in self._saved else None
        if name not in self._biases:
            return saved
        module = self._biases[name]
        bias = module.scaling * self._factor(module.parts[BIAS])
        return Dense(bias if saved is None else bias + dense(saved, bias.dtype))

    def place(self, name: str) -> Place | None:
        """Which numbers of a parameter with factors of its own the base's tensor ``name`` holds."""
        return self._places.get(name)

    def rows(self, name: str) -> tuple[int, ...]:
        """Of trained tokens: the rows of the base's tensor ``name`` that change."""
        return self._tokens[name][1] if name in self._tokens else ()

    def layout(self, name: str) -> Layout | None:
        """How the factors of a weight are stored; None for biases, saved modules and what the adapter lacks."""
        return self._modules[name].layout if name in self._modules else None

    @property
    def new_biases(self) -> dict[str, TensorInfo]:
        """LoRA biases of layers that have no bias in the base, by the names that those would have."""
        found = {name: self._shape(module.parts[BIAS]) for name, module in self._biases.items()}
        return {n: TensorInfo(shape, torch.float32) for n, shape in found.items() if n not in self._base.tensors}

    def module_of_bias(self, name: str) -> str | None:
        """The targeted module whose LoRA bias changes the base's tensor ``name``."""
        return self._biases[name].layout.module if name in self._biases else None

    def _change(self, module: LoraModule, name: str) -> Delta:
        a, b = (self._factor(stored) for stored in module.pair)
        product, transposed = module.product(a, b), module.layout.kind in TRANSPOSED
        if MAGNITUDE not in module.parts:
            return product.T if transposed else product
        base = self._base.read(name)
        magnitude = self._factor(module.parts[MAGNITUDE]).reshape(-1)
        change = Dora.of(product, magnitude, base.T if transposed else base)
        if not torch.isfinite(change.row_scale).all():
            raise CheckpointError(f'"{self.label}": {name} plus its factors has rows of zeros, which DoRA divides by')
        return Dense(dense(change, product.left.dtype).T) if transposed else change

    def _change_of_parameter(self, place: Place) -> Delta:
        parts = self._of_parameters[place.parameter.name]
        a, b = (self._factor(parts[part]) for part in PAIRS[0])
        name = place.parameter.name
        return place.take(place.parameter.change(a, b, self._options.scaling(name, self._options.rank_of(name))))

    def _change_of_rows(self, name: str) -> LowRank:
        """What PEFT stores of trained tokens are their new rows, not the change of them."""
        stored, rows = self._tokens[name]
        base = self._base.read(name)
        left = torch.zeros(len(base), len(rows))
        left[list(rows), range(len(rows))] = 1.0
        return LowRank(left, (self._factor(stored).double() - base[list(rows)].double()).to(torch.float32))

    def _factor(self, stored: str) -> Tensor:
        """A stored tensor in float32 at least."""
        tensor = self._read(stored)
        return tensor.to(torch.float32 if tensor.dtype.itemsize < 4 else tensor.dtype)

    def _read(self, stored: str) -> Tensor:
        tensor = self._stored.read(stored)
        if bad := count_not_finite(tensor):
            raise CheckpointError(
                f'"{self.label}": {stored} holds {bad} NaN or infinite numbers of {tensor.numel()}; the training run '
                "diverged or the file is damaged: use an earlier checkpoint"
            )
        return tensor

    def _rank(self, module: LoraModule) -> int:
        return self._stored.tensors[module.pair[0]].shape[0]

    def _shape(self, stored: str) -> tuple[int, ...]:
        return self._stored.tensors[stored].shape

    def _find_parameters(
        self, parts: dict[str, dict[str, str]], parameters: Mapping[str, Parameter] | None
    ) -> tuple[dict[str, Place], dict[str, dict[str, str]]]:
        """The base's tensors that hold parameters with factors, and these, taken out of ``parts``, by parameter."""
        if not self._options.parameters:
            return {}, {}
        model = skeleton(self._base) if parameters is None else None
        if parameters is None and model is None:
            raise CheckpointError(
                f'"{self.label}": uses target_parameters, and transformers has no class that the configuration of '
                f"{self._base.label} names, which would tell where they are; give the base with its config.json"
            )
        known = parameters_of(model, self._options.parameters) if model is not None else dict(parameters or {})
        held = {known[module]: parts.pop(module) for module in list(parts) if module in known}
        for parameter, own in held.items():
            shapes = {part: self._shape(stored) for part, stored in own.items()}
            check_factors(self.label, parameter, shapes, self._options.rank_of(parameter.name), self._base.label)
        places = places_in(self._base, list(held), model)
        missing = {parameter.name for parameter in held} - {place.parameter.name for place in places.values()}
        if missing:
            raise MismatchError(
                f'"{self.label}": changes {len(missing)} parameters that the base ({self._base.label}) does not store '
                f"(first: {min(missing)}); give the base that the adapter was trained on"
            )
        return places, {parameter.name: own for parameter, own in held.items()}

    def _resolve(self, weights: list[str], saved: list[str], memory: Mapping[str, str]) -> Naming:
        """How the adapter's names become the base's. Names of tied outputs, which the base lacks, are refused."""
        saved = [name.replace(".base_layer.", ".") for name in saved]
        for name in (*weights, *saved):
            if name not in self._base.tensors and is_tied_away(name, self._base, self.config):
                raise self._tied(name.removesuffix(".weight"))
            if f"{name.removesuffix('.weight')}.in_proj_weight" in self._base.tensors:
                raise CheckpointError(f'"{self.label}": LoRA on {name}, an nn.MultiheadAttention, is not supported')
        try:
            return Naming.resolve(list(dict.fromkeys([*weights, *saved])), self._base, memory)
        except MismatchError as error:
            trained_on = f" ({self.base_id})" if self.base_id else ""
            raise MismatchError(
                f'"{self.label}": {error}; give the base that the adapter was trained on{trained_on}, with its head'
            ) from error

    def _find_head(self, saved: Iterable[str], memory: Mapping[str, str]) -> list[str]:
        """Names of tensors in ``modules_to_save`` of which the base has none, behind any prefix."""
        modules = self.config.get("modules_to_save") or []
        trunk = [f".{memory.get(own, own)}" for own in self._base.tensors]
        return [
            name
            for name in saved
            if any(f".{module}." in f".{name}" for module in modules)
            and not is_tied_away(name, self._base, self.config)
            and not any(own.endswith(f".{name}") or f".{name}".endswith(own) for own in trunk)
        ]

    def _name(self, name: str) -> str:
        own = self.naming.to_base(name)
        assert own is not None
        return own

    def _add_module(self, module: str, parts: Mapping[str, str]) -> None:
        name = self._name(f"{module}.weight")
        if not self._options.is_target(module):
            raise CheckpointError(
                f'"{self.label}": {module} has factors, but {CONFIG_FILE} does not target it, so that PEFT leaves '
                "them out; the two files do not belong together"
            )
        shapes = {part: self._shape(stored) for part, stored in parts.items()}
        layout = find_layout(self.label, module, name, shapes, self._base, self._options)
        if layout.kind in TRANSPOSED and MAGNITUDE in parts and len(self._base.tensors[name].shape) != 2:
            raise MismatchError(f'"{self.label}": {module} is no matrix in the base ({self._base.label})')
        scaling = self._options.scaling(module, self._options.rank_of(module))
        self._modules[name] = LoraModule(layout, scaling, parts)
        if BIAS in parts:
            self._biases[f"{name.removesuffix('weight')}bias"] = self._modules[name]

    def _match_saved(self, saved: Mapping[str, str]) -> dict[str, str]:
        """Saved modules and biases, by the base's name. PEFT stores targeted embeddings too: a copy changes nothing."""
        found = {}
        for name, stored in saved.items():
            own = self._name(name.replace(".base_layer.", "."))
            if self._shape(stored) != self._base.tensors[own].shape and not self._differs_in_rows(own, stored):
                raise MismatchError(
                    f'"{self.label}": saved module {name} is {list(self._shape(stored))}, in the base '
                    f"({self._base.label}) it is {list(self._base.tensors[own].shape)}; resize the base first"
                )
            if own not in self._modules:
                found[own] = stored
                continue
            copy = self._stored.read(stored)
            if not torch.equal(copy, self._base.read(own).to(copy.dtype)):
                raise MismatchError(
                    f'"{self.label}": carries its own copy of {own}, which differs from the base ({self._base.label}); '
                    "give the base that the adapter was trained on"
                )
        return found

    def _differs_in_rows(self, own: str, stored: str) -> bool:
        """Whether a saved tensor has other rows of tokens than the base's, which ``models.vocabulary`` can level."""
        theirs, ours = self._shape(stored), self._base.tensors[own].shape
        return theirs[1:] == ours[1:] and own not in self._modules and is_token_matrix(own, ours)

    def _match_tokens(self, tokens: Mapping[str, str]) -> dict[str, tuple[str, tuple[int, ...]]]:
        """By the base's name: the stored rows and which they are."""
        found = {}
        for module, stored in tokens.items():
            name, rows = self._name(f"{module}.weight"), self._options.tokens_of(module)
            shape, own = self._base.tensors[name].shape, self._shape(stored)
            if len(shape) != 2 or own != (len(rows), shape[1]) or not all(0 <= row < shape[0] for row in rows):
                raise MismatchError(
                    f'"{self.label}": {len(rows)} trained tokens of {module} ({CONFIG_FILE}: trainable_token_indices), '
                    f"stored as {list(own)}, do not fit the base ({self._base.label}), where it is {list(shape)}"
                )
            if name in self._modules or name in self._saved or len(set(rows)) < len(rows):
                raise CheckpointError(f'"{self.label}": trains tokens of {module} more than once')
            found[name] = (stored, rows)
        return found

    def _refuse_shared(self) -> None:
        for name in self.names:
            alone = name not in self._tokens and name not in self._twins and name in self._base.tensors
            if alone and is_shared(name, self._base, self.config):
                raise self._tied(name.removesuffix(".weight"))

    def _tied(self, module: str) -> TvbasesError:
        return MismatchError(
            f'"{self.label}": changes {module}, whose matrix the model uses twice, as input embedding and as output '
            "(tied); PEFT changes one of the two uses, which no change of the one matrix does. Untie the base "
            "(tie_word_embeddings: false, saved with both matrices) or merge the adapter with PEFT into such a base"
        )
