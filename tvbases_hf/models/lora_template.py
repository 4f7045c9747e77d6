"""What a LoRA that is written takes over from its sources: where factors go, and the configuration's words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..algebra.delta import Delta
from ..errors import ParameterError
from ..storage.files import without_revision
from .adapter import Adapter
from .layouts import Layout
from .names import Naming
from .parameters import Place


@dataclass(frozen=True)
class Template:
    """What a merged adapter takes over from its sources: where the factors go, and the configuration's words.

    ``layouts`` and ``bias_modules`` are by name of the base's tensors; the modules in them, and ``naming``, are named
    as in the first source (that has a head). ``saved`` are tensors that some source carries whole; ``head`` those of
    them that the base lacks, by the adapter's name; ``saved_modules`` what the sources call modules that are saved;
    ``tokens`` the rows of embeddings of which only these change; ``parameters`` where the changes of those tensors go
    that hold parameters without a module of their own, such as experts; ``twins`` are embeddings that are saved as the
    output, too, to which they are tied, and what that is called.
    """

    layouts: dict[str, Layout]
    bias_modules: dict[str, str]
    config: dict[str, Any] = field(default_factory=dict)
    saved: frozenset[str] = frozenset()
    naming: Naming = field(default_factory=Naming)
    head: Mapping[str, Tensor] = field(default_factory=dict)
    saved_modules: frozenset[str] = frozenset()
    tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    parameters: Mapping[str, Place] = field(default_factory=dict)
    twins: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, adapters: Sequence[Adapter], base_id: str) -> Template:
        """The union of the adapters' modules. A word on which they disagree (the task type) is left out.

        Raises ParameterError where they bring different heads.
        """
        naming = next((adapter for adapter in adapters if adapter.head_names), adapters[0]).naming

        def renamed(name: str) -> str:
            return naming.to_adapter(name).rpartition(".")[0]

        found = {name: layout for a in reversed(adapters) for name in a.names if (layout := a.layout(name))}
        layouts = {n: Layout(renamed(n), layout.kind, layout.kernel) for n, layout in found.items()}
        biased = [name for a in adapters for name in a.names if a.module_of_bias(name)]
        biases = {name: renamed(f"{name.removesuffix('bias')}weight") for name in biased}
        repository, revision = without_revision(base_id)
        config: dict[str, Any] = {"base_model_name_or_path": repository}
        config |= {"revision": revision} if revision else {}
        for word in ("task_type", "auto_mapping"):
            values = [adapter.config.get(word) for adapter in adapters]
            if all(value == values[0] for value in values):
                config[word] = values[0]
        saved = frozenset(name for adapter in adapters for name in adapter.saved_names)
        modules = frozenset(module for adapter in adapters for module in adapter.config.get("modules_to_save") or ())
        rows = {name: sorted({row for a in adapters for row in a.rows(name)}) for a in adapters for name in a.names}
        tokens = {n: tuple(own) for n, own in rows.items() if own and n not in layouts and n not in saved}
        places = {name: place for a in adapters for name in a.names if (place := a.place(name)) and name not in layouts}
        outputs = {name: a.naming.to_base(output) or output for a in adapters for name, output in a.twins.items()}
        twins = {name: naming.to_adapter(output) for name, output in outputs.items()}
        return cls(layouts, biases, config, saved, naming, _common_head(adapters), modules, tokens, places, twins)

    def has_factors(self, name: str, change: Delta) -> bool:
        """Whether a change goes into factors, not into a saved tensor."""
        return (name in self.layouts or name in self.parameters) and (change.low is not None or name not in self.saved)

    def module_to_save(self, name: str) -> str:
        """The module by which PEFT saves a tensor: the outermost that a source names, else the tensor's own.

        A task type makes PEFT save ``classifier``, and then ``classifier.dense`` within it must not be saved again.
        """
        around = owners(name)
        named = (owner for owner in around if any(f".{owner}".endswith(f".{module}") for module in self.saved_modules))
        return next(named, around[-1] if around else "")


def _common_head(adapters: Sequence[Adapter]) -> dict[str, Tensor]:
    found: dict[str, tuple[str, Tensor]] = {}
    for adapter in adapters:
        for name, tensor in adapter.head.items():
            first, known = found.setdefault(name, (adapter.label, tensor))
            if not torch.equal(known, tensor):
                raise ParameterError(
                    f'"{first}" and "{adapter.label}" each bring a head of their own ({name}), which the base does not '
                    "have, and one adapter has room for one. Take adapters that share it, or a base that has one with "
                    "which all were trained"
                )
    return {name: tensor for name, (_, tensor) in found.items()}


def owners(name: str) -> list[str]:
    """The modules that a tensor is in, the outermost first."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]
