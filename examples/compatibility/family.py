"""A base and two fine-tunes on disk, and the numbers that a command should make of them, densely and in float64."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .small import Kind, clear_padding

State = dict[str, Tensor]
TASKS = ("a", "b")
SIZE = 0.05
EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Family:
    """Directories, and what is in them: ``stored`` by the names of the files, ``loaded`` by those of the model.

    Both are by task, "base" included, in float64. ``ignored`` are names that loading the base itself tells as missing
    or unexpected.
    """

    kind: Kind
    base: Path
    tasks: dict[str, Path]
    stored: dict[str, State]
    loaded: dict[str, State]
    ignored: frozenset[str]
    model: PreTrainedModel = field(repr=False)

    def change(self, task: str, name: str) -> Tensor:
        """Of a tensor of the files; infinities that both hold are no change."""
        tuned, own = self.stored[task][name], self.stored["base"][name]
        return torch.where(tuned == own, torch.zeros_like(own), tuned - own)

    def names(self) -> list[str]:
        """The tensors of the files that are not integers."""
        return [name for name, tensor in self.stored["base"].items() if tensor.is_floating_point()]

    def flat(self, task: str) -> Tensor:
        """[d] the task vector."""
        return torch.cat([self.change(task, name).reshape(-1) for name in self.names()])

    def added(self, weights: Mapping[str, float]) -> State:
        """The base plus so much of each task vector, by the names of the model."""
        found = {}
        for name, own in self.loaded["base"].items():
            found[name] = own
            for task, weight in weights.items():
                tuned = self.loaded[task][name]
                found[name] = torch.where(tuned == own, found[name], found[name] + weight * (tuned - own))
        return found

    def matrices(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor of the files as one matrix for every expert; DBRX stores these one below the other."""
        below = self.kind.model_type == "dbrx" and ".experts.mlp." in name
        return tensor.view(*self.kind.experts, -1, tensor.shape[1]) if below else tensor

    def is_stack(self, name: str) -> bool:
        """Whether a tensor of the files is one matrix for every expert of a mixture, by the counts in the config."""
        tensor = self.matrices(name, self.stored["base"][name])
        return tensor.ndim == 3 and len(tensor) in self.kind.experts and not self._is_of(name, Convolution)

    def is_matrix(self, name: str) -> bool:
        tensor = self.stored["base"][name]
        return tensor.ndim == 2 and not (name.endswith("bias") and len(tensor) in self.kind.experts)

    def is_transposed(self, name: str) -> bool:
        """Whether a matrix is stored as [in, out]: those of Conv1D, and experts that say so."""
        if self.kind.model_type == "dbrx":
            return name.endswith("experts.mlp.w2")
        if self.is_stack(name):
            return any(getattr(module, "is_transposed", False) or _is_in_out(module) for module in self.model.modules())
        return self._is_of(name, Conv1D)

    def _owner(self, name: str) -> Any:
        """The module of the model that holds a tensor; None where the file calls it otherwise."""
        modules = dict(self.model.named_modules())
        path = name.rpartition(".")[0]
        return modules.get(path) or modules.get(f"{self.model.base_model_prefix}.{path}")

    def _is_of(self, name: str, kinds: Any) -> bool:
        return isinstance(self._owner(name), kinds)


Convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d)


def _is_in_out(module: nn.Module) -> bool:
    """Experts that are [in, out] and do not say so: bmm(inputs, weight) is what they compute."""
    return type(module).__name__ in ("Llama4TextExperts",)


def make_family(kind: Kind, root: Path) -> Family:
    """Written by save_pretrained and read again; the second fine-tune leaves vectors as they are."""
    paths = {task: root / task for task in ("base", *TASKS)}
    model = kind.make()
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for index, (task, path) in enumerate(paths.items()):
        generator = torch.Generator().manual_seed(index)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                moves = task == "a" or (task == "b" and parameter.ndim > 1)
                parameter.copy_(start[name] + SIZE * noise if moves else start[name])
        clear_padding(model)
        model.save_pretrained(path)
    stored = {task: exact(load_file(path / "model.safetensors")) for task, path in paths.items()}
    loaded, ignored = {}, frozenset()
    own, ignored = load(kind, paths["base"])
    for task, path in paths.items():
        loaded[task] = exact(load(kind, path)[0].state_dict())
    base = paths.pop("base")
    return Family(kind, base, paths, stored, loaded, ignored, own)


def load(kind: Kind, path: Path) -> tuple[PreTrainedModel, frozenset[str]]:
    """The model, and the names that are missing, unexpected, or of another shape."""
    loaded: Any = kind.architecture.from_pretrained(path, output_loading_info=True)
    model, info = loaded
    odd = (str(name) for key in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in info[key])
    return model.eval(), frozenset(odd)


def exact(state: Mapping[str, Tensor]) -> State:
    """Copies, floats as float64."""
    return {name: tensor.double() if tensor.is_floating_point() else tensor.clone() for name, tensor in state.items()}
