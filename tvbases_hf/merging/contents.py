"""What a LoRA of a full fine-tune holds: factors of some rank, biases, modules saved whole; and what it leaves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..algebra.delta import LowRank
from ..errors import ParameterError
from ..models.adapter import Layout
from ..models.lora_files import config_of, factors
from ..models.lora_parts import BIAS, PREFIX, TIED_BY_PEFT
from ..models.lora_template import Template
from ..models.modules import Home, Modules
from ..storage.checkpoint import Checkpoint, TensorInfo
from ..storage.files import without_revision


@dataclass(frozen=True)
class Contents:
    """``layouts`` and ``ranks`` of the weights with factors, ``biases`` and ``saved`` tensors by the base's names.

    What is stored of a bias or a saved tensor is listed by its name in the adapter's file: several where modules share
    it. ``lora_bias``: biases are changes beside the factors, else whole. ``modules`` are the modules to save, ``left``
    the tensors whose change the adapter does not hold, ``tied`` whether PEFT is asked to tie what is saved twice.
    """

    layouts: Mapping[str, Layout]
    ranks: Mapping[str, int]
    biases: Mapping[str, tuple[str, ...]]
    saved: Mapping[str, tuple[str, ...]]
    modules: tuple[str, ...]
    left: tuple[str, ...]
    lora_bias: bool
    tied: bool

    @property
    def names(self) -> tuple[str, ...]:
        """Of the base's tensors that something is stored of."""
        return (*self.layouts, *self.biases, *self.saved)

    def with_rank(self, rank: int) -> Contents:
        """With factors of one rank everywhere."""
        return Contents(**{**vars(self), "ranks": dict.fromkeys(self.ranks, rank)})

    def config(self, base: Checkpoint, words: Mapping[str, Any]) -> dict[str, Any]:
        """adapter_config.json."""
        repository, revision = without_revision(base.label)
        named = {"base_model_name_or_path": repository, **({"revision": revision} if revision else {}), **words}
        ranks = {layout.module: self.ranks[name] for name, layout in self.layouts.items()}
        own: dict[str, Any] = {"modules_to_save": list(self.modules)} if self.modules else {}
        if self.tied:
            own["ensure_weight_tying"] = True
        if self.biases:
            own |= {"lora_bias": True} if self.lora_bias else {"bias": "all"}
        return config_of(Template(dict(self.layouts), {}, named), ranks, False, own)

    def stored(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, TensorInfo]:
        """The tensors of the adapter's file that hold what is stored of a tensor of this shape."""
        if name in self.layouts:
            rank, layout = self.ranks[name], self.layouts[name]
            rows, columns = shape[0], torch.Size(shape[1:]).numel()
            low = LowRank(torch.empty(rows, rank, device="meta"), torch.empty(rank, columns, device="meta"))
            return {key: TensorInfo(tuple(part.shape), dtype) for key, part in factors(layout, low, dtype).items()}
        return dict.fromkeys(self.biases.get(name) or self.saved[name], TensorInfo(shape, dtype))


def contents_of(modules: Modules, ranks: Mapping[str, int], others: Iterable[str], save: str) -> Contents:
    """Where the changes of one fine-tune go.

    Args:
        ranks: of the changed weights that may have factors.
        others: the other tensors that change, and those that have another shape than the base's.
        save: what may be saved whole: ``all``; ``norms``, which are modules without a matrix, and biases; ``none``.

    Raises ParameterError where PEFT has no adapter that could hold anything.
    """
    homes = modules.homes
    wanted, biases, left = _sorted_out(modules, others, save)
    fewest, every = modules.saved_with(wanted)

    def is_saved(parameter: str) -> bool:
        return any(parameter.startswith(f"{module}.") for module in every)

    layouts = {name: layout for name in ranks if (layout := homes[name].layout) and not is_saved(f"{layout.module}.")}
    kept = {name: ranks[name] for name in layouts} or _placeholder(homes, is_saved)
    layouts = {name: layout for name in kept if (layout := homes[name].layout)}
    lora_bias, biased = _biases(modules, layouts, [name for name in biases if not is_saved(homes[name].parameters[0])])
    saved = {
        name: tuple(f"{PREFIX}{parameter}" for parameter in home.parameters if is_saved(parameter))
        for name, home in homes.items()
        if any(map(is_saved, home.parameters))
    }
    shared = [homes[name].owners[0].rpartition(".")[2] for name in saved if len(homes[name].parameters) > 1]
    tied = bool(shared) and all(module in TIED_BY_PEFT for module in shared)
    return Contents(layouts, kept, biased, saved, tuple(fewest), tuple(left), lora_bias, tied)


def _sorted_out(modules: Modules, others: Iterable[str], save: str) -> tuple[set[str], list[str], list[str]]:
    """Modules to save, biases of layers that have factors, and tensors that are left."""
    wanted: set[str] = set()
    biases, left = [], []
    layers = {home.layout.module for home in modules.homes.values() if home.layout}
    for name in others:
        home = modules.homes.get(name)
        if home is None or save == "none" or "" in home.owners:
            left.append(name)
        elif len(home.parameters) == 1 and home.owners[0] in layers and home.parameters[0].endswith(".bias"):
            biases.append(name)
        elif any(modules.is_block(owner) or (save == "norms" and modules.has_matrices(owner)) for owner in home.owners):
            left.append(name)
        else:
            wanted.update(home.owners)
    return wanted, biases, left


def _biases(
    modules: Modules, layouts: Mapping[str, Layout], changed: Iterable[str]
) -> tuple[bool, dict[str, tuple[str, ...]]]:
    """Beside the factors where PEFT can: of every module with factors or of none, and merging wants one in the base."""
    owner = {modules.homes[name].owners[0]: name for name in changed}
    if not owner:
        return False, {}
    names = {home.parameters[0]: name for name, home in modules.homes.items()}
    targets = [layout.module for layout in layouts.values()]
    if set(owner) <= set(targets) and all(f"{module}.bias" in names for module in targets):
        return True, {names[f"{module}.bias"]: (f"{PREFIX}{module}.{BIAS}",) for module in targets}
    inner = dict.fromkeys(targets, ".base_layer")
    return False, {name: (f"{PREFIX}{module}{inner.get(module, '')}.bias",) for module, name in owner.items()}


def _placeholder(homes: Mapping[str, Home], is_saved: Any) -> dict[str, int]:
    """PEFT refuses an adapter without factors; one module that does not change makes it one."""
    free = (name for name, home in homes.items() if home.layout and not is_saved(f"{home.layout.module}."))
    name = next(free, None)
    if name is None:
        raise ParameterError("PEFT has no adapter without low-rank factors, and no layer is left that could have some")
    return {name: 1}
