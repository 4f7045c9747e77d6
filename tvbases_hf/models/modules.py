"""The modules of a base in memory, as PEFT sees them: which weights LoRA has factors for, and what owns the rest."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from ..errors import ParameterError
from ..storage.checkpoint import Checkpoint
from .adapter import Layout
from .skeleton import skeleton
from .translation import stored_in

# Their kernels use the weights of these modules directly, past any adapter, so that PEFT refuses them.
MAMBA_MODELS = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")
MAMBA_LAYERS = ("conv1d", "out_proj")
NUMBER = re.compile(r"(^|\.)\d+(\.|$)")


@dataclass(frozen=True)
class Home:
    """Where a tensor of the base is in memory: ``parameters``, several where modules share it, by their full names.

    ``layout`` is how LoRA stores a change of it; None where PEFT has no factors for it.
    """

    parameters: tuple[str, ...]
    layout: Layout | None = None

    @property
    def owners(self) -> tuple[str, ...]:
        """The modules that it is a parameter of."""
        return tuple(parameter.rpartition(".")[0] for parameter in self.parameters)


class Modules:
    """The model that transformers makes of a base: ``homes`` of the base's tensors, of those that it keeps whole."""

    def __init__(self, base: Checkpoint) -> None:
        """Raises ParameterError where the configuration names no class of the installed transformers."""
        model = skeleton(base)
        if model is None:
            named = (base.config.get("architectures") or ["no architecture"])[0]
            raise ParameterError(
                f'"{base.label}": which of its weights PEFT has factors for is asked of transformers, and config.json '
                f"names {named}, which the installed one cannot make; give the whole directory of a model that "
                "AutoModel loads, with the transformers that loads it (pip install -U transformers)"
            )
        self._model: Any = model
        self.homes = self._find_homes(base)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Of all modules; those that are used at several places under every name."""
        return tuple(name for name, _ in self._model.named_modules(remove_duplicate=False) if name)

    @property
    def words(self) -> dict[str, Any]:
        """What an adapter's configuration says of the class of model that it is for."""
        kind = type(self._model)
        if kind.__name__.endswith(("ForCausalLM", "LMHeadModel")):
            return {"task_type": "CAUSAL_LM"}
        return {"auto_mapping": {"base_model_class": kind.__name__, "parent_library": kind.__module__}}

    def saved_with(self, wanted: Iterable[str]) -> tuple[list[str], list[str]]:
        """The fewest modules to save so that all ``wanted`` are, and every module that PEFT then saves.

        PEFT saves all modules whose names end like one that is to be saved, wherever they are.
        """
        found = set(wanted)
        fewest = [name for name in sorted(found) if not any(name.startswith(f"{other}.") for other in found)]
        every = [name for name in self.names if any(name.endswith(module) for module in fewest)]
        return fewest, every

    def has_matrices(self, module: str) -> bool:
        """Whether a parameter in it, or in a module inside it, has more than one dimension."""
        return any(parameter.dim() > 1 for parameter in self._model.get_submodule(module).parameters())

    def is_block(self, module: str) -> bool:
        """Whether it is, or is in, one of a row of like modules, and has layers with factors inside.

        Saving it whole would leave no factors of its layers.
        """
        layers = (home.layout.module for home in self.homes.values() if home.layout)
        return bool(NUMBER.search(module)) and any(layer.startswith(f"{module}.") for layer in layers)

    def has_bias(self, module: str) -> bool:
        return getattr(self._model.get_submodule(module), "bias", None) is not None

    def _find_homes(self, base: Checkpoint) -> dict[str, Home]:
        stored = {name: where for name, where in stored_in(self._model, base.tensors).items() if where.is_whole}
        known = {where.parts[0].parameter for where in stored.values()}
        sharing: dict[int, list[str]] = {}
        state: dict[str, Tensor] = self._model.state_dict(keep_vars=True)
        for name, parameter in state.items():
            sharing.setdefault(id(parameter), []).append(name)
        homes = {}
        for name, where in stored.items():
            own = where.parts[0].parameter
            if where.shape == base.tensors[name].shape:
                others = [other for other in sharing[id(state[own])] if other != own and other not in known]
                homes[name] = Home((own, *others), self._layout(own, len(others)))
        return homes

    def _layout(self, parameter: str, shared: int) -> Layout | None:
        module, _, leaf = parameter.rpartition(".")
        kind = _kind(self._model.get_submodule(module)) if leaf == "weight" and not shared else None
        above = self._model.get_submodule(module.rpartition(".")[0])
        model_type = getattr(getattr(self._model, "config", None), "model_type", None)
        refused = model_type in MAMBA_MODELS and module.rpartition(".")[2] in MAMBA_LAYERS
        if kind is None or refused or isinstance(above, nn.MultiheadAttention):
            return None
        return Layout(module, kind, tuple(self._model.get_submodule(module).weight.shape[2:]))


def _kind(module: nn.Module) -> str | None:
    """How PEFT's LoRA of this module stores its factors; embeddings have some, but are better saved whole."""
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return "conv" if module.groups == 1 else None
    return "conv1d" if type(module).__name__ == "Conv1D" else None
