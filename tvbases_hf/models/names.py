"""Which tensor of the base an adapter's name means: prefixes, tied matrices, and weights that are stored transposed."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..algebra.delta import Delta, reshaped, work_dtype
from ..algebra.layout import is_stack
from ..errors import MismatchError
from ..storage.checkpoint import Checkpoint
from ..storage.tied import EMBEDDINGS, FLAG, embedding_of, is_output, leaf, ties

OUTPUT_CLASS = re.compile(r"CausalLM|LMHead|MaskedLM|ForConditionalGeneration|ForPreTraining|DoubleHeads")
OUTPUT_TASKS = ("CAUSAL_LM", "SEQ_2_SEQ_LM")
# transformers' Conv1D stores its weight as [in, out]; GPT-2 and its kin use it under these names.
CONV1D_MODELS = ("clvp", "decision_transformer", "gpt2", "imagegpt", "openai-gpt")
# DBRX stores the matrices of its experts one below the other, [E * n, m].
ONE_BELOW_THE_OTHER = re.compile(r"experts\.mlp\.(w1|v1|w2)$")
CONV1D_NAMES = ("c_attn", "c_fc", "c_proj", "q_attn")


@dataclass(frozen=True)
class Naming:
    """An adapter's name without ``strip``, or with ``add`` in front, is the base's name. At most one is not empty.

    ``memory`` is {the base's name: what transformers calls that tensor in memory}, where an adapter that was trained
    there means the latter; empty where it means the names of the files.
    """

    strip: str = ""
    add: str = ""
    memory: Mapping[str, str] = field(default_factory=dict, hash=False)

    def to_base(self, name: str) -> str | None:
        if not name.startswith(self.strip):
            return None
        inner = self.add + name[len(self.strip) :]
        return self._files.get(inner, inner)

    def to_adapter(self, name: str) -> str:
        return self.strip + self.memory.get(name, name).removeprefix(self.add)

    @cached_property
    def _files(self) -> dict[str, str]:
        return {inner: own for own, inner in self.memory.items()}

    @classmethod
    def resolve(cls, names: Sequence[str], base: Checkpoint, memory: Mapping[str, str] | None = None) -> Naming:
        """The one way to read all ``names`` (of weights and biases) as tensors of the base.

        A model with a head and its trunk alone differ by a prefix such as ``bert.`` or ``model.``.

        Args:
            memory: what the tensors of the base are called in memory, where ``names`` are those; see names_in_memory.

        Raises MismatchError where no prefix does, or more than one.
        """
        renamed = memory or {}
        own_names = {renamed.get(own, own) for own in base.tensors}
        if all(name in own_names for name in names):
            return cls(memory=renamed)
        first = names[0]
        found = {("", own.removesuffix(first)) for own in own_names if own.endswith(f".{first}")}
        found |= {(first.removesuffix(own), "") for own in own_names if first.endswith(f".{own}")}
        ways = [cls(strip, add, renamed) for strip, add in sorted(found)]
        lacking = {way: [name for name in names if way.to_base(name) not in base.tensors] for way in [cls(), *ways]}
        fitting = [way for way in ways if not lacking[way]]
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            meant = ", ".join(sorted(str(way.to_base(first)) for way in fitting)[:2])
            raise MismatchError(f"{first} may mean {len(fitting)} tensors of the base ({base.label}): {meant}")
        missing = min(lacking.values(), key=len)
        raise MismatchError(
            f"changes {len(missing)} of {len(names)} tensors that the base ({base.label}) does not have "
            f"(first: {missing[0]})"
        )


def count_named(names: Iterable[str], tensors: Collection[str]) -> int:
    """How many of ``names`` are names of these tensors, behind any prefix of theirs or of the names' own."""
    own, ends = set(tensors), {end for name in tensors for end in _ends(name)}
    return sum(name in ends or any(end in own for end in _ends(name)) for name in names)


def _ends(name: str) -> list[str]:
    """The name, and what is left of it after each of its dots but the last."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(max(1, len(parts) - 1))]


def is_tied_away(name: str, base: Checkpoint, config: Mapping[str, Any]) -> bool:
    """Whether ``name`` is an output matrix that the base lacks because it is tied to the input embedding."""
    return is_output(name) and is_tied(base, config)


def is_shared(name: str, base: Checkpoint, config: Mapping[str, Any]) -> bool:
    """Whether the base's tensor ``name`` is a matrix of tokens that the model uses twice."""
    if leaf(name) in EMBEDDINGS:
        return leaf(name) == "shared" or is_tied(base, config)
    shape = base.tensors[name].shape
    vocabulary = (base.config.get("text_config") or base.config).get("vocab_size")
    if not name.endswith(".weight") or len(shape) != 2 or shape[0] != vocabulary:
        return False
    by_name = (other for other, info in base.tensors.items() if leaf(other) in EMBEDDINGS and info.shape == shape)
    return next(by_name, None) is None and is_tied(base, config)  # as many rows, by chance, where another is called so


def twins_of(
    saved: Mapping[str, str], base: Checkpoint, config: Mapping[str, Any], read: Callable[[str], Tensor]
) -> dict[str, str]:
    """{output: embedding} of a tied matrix that an adapter saves alike as both, so that the one matrix changes so."""
    outputs = [name for name in saved if name not in base.tensors and is_tied_away(name, base, config)]
    embeddings = [name for name in saved if leaf(name) in EMBEDDINGS]
    pairs = ((output, embedding) for output in outputs for embedding in embeddings)
    return {output: own for output, own in pairs if torch.equal(read(saved[output]), read(saved[own]))}


def is_tied(base: Checkpoint, config: Mapping[str, Any]) -> bool:
    """Whether the adapter's model has an output matrix that is its input embedding.

    Says yes where nothing tells: then an adapter of the embedding is refused rather than applied to both uses.
    """
    trunk = base.config.get("text_config") or {}
    if base.config.get(FLAG, trunk.get(FLAG)) is False or not _has_output(base, config):
        return False
    shapes = {name: info.shape for name, info in base.tensors.items()}
    outputs = [name for name in shapes if is_output(name) and len(shapes[name]) == 2]
    if not outputs:
        return True
    embedding = embedding_of(shapes[outputs[0]], shapes)
    if embedding is None or ties(base.config) is not None:  # a stored copy of the embedding would not be here
        return False
    return torch.equal(base.read(outputs[0]), base.read(embedding))


def is_conv1d(name: str, base: Checkpoint, fan_in_fan_out: bool) -> bool | None:
    """Whether a two-dimensional weight is stored as [in, out]; None where nothing tells.

    PEFT decides by the layer's class and resets ``fan_in_fan_out`` whenever it is wrong, so that a saved flag is that
    of the last layer only. In the files a bias tells: it is as long as the output. A square weight has to be judged by
    its neighbours of the same kind, which in these models are not all square.
    """
    own = _bias_tells(name, base)
    if own is not None:
        return own
    if leaf(name) in CONV1D_NAMES:
        kin = [n for n in base.tensors if leaf(n) in CONV1D_NAMES and n.endswith(".weight")]
        told = next((told for n in kin if (told := _bias_tells(n, base)) is not None), None)
        if told is not None:
            return told
        if base.config.get("model_type"):
            return base.config["model_type"] in CONV1D_MODELS
    return None if fan_in_fan_out else False


def matrices_in(name: str, base: Checkpoint) -> tuple[int, ...]:
    """The shape of a weight as matrices: [E, n, m] also where E experts' are stored one below the other."""
    shape = base.tensors[name].shape
    experts = (base.config.get("ffn_config") or {}).get("moe_num_experts")
    if len(shape) == 2 and ONE_BELOW_THE_OTHER.search(name) and experts and shape[0] % experts == 0:
        return (experts, shape[0] // experts, shape[1])
    return shape


def as_stored(change: Delta, name: str, base: Checkpoint) -> Delta:
    """A change of a weight whose matrices were taken for it, in the shape of the base's tensor."""
    shape = base.tensors[name].shape
    return change if matrices_in(name, base) == shape else reshaped(change, shape, work_dtype([change]))


def is_transposed(name: str, base: Checkpoint) -> bool:
    """Whether a matrix is stored as [in, out], as no torch.nn.Linear is: GPT-2's Conv1D, and experts in one tensor.

    Of experts gpt-oss, Llama-4 and Aria store [E, in, out], others [E, out, in], DBRX both; the model's width tells,
    where the widths of its experts differ from it.
    """
    shape = matrices_in(name, base)
    if is_stack(name, shape):
        return _experts_tell(name, shape, base)
    return len(shape) == 2 and leaf(name) in CONV1D_NAMES and bool(is_conv1d(name, base, False))


def _experts_tell(name: str, shape: Sequence[int], base: Checkpoint) -> bool:
    config = base.config.get("text_config") or base.config
    width = config.get("hidden_size", config.get("d_model"))
    parent = name.removesuffix(".weight").rpartition(".")[0]
    kin = [own for own in base.tensors if own.startswith(f"{parent}.") and is_stack(own, matrices_in(own, base))]
    for own in [name, *kin]:
        _, rows, columns = matrices_in(own, base)
        if rows != columns and width in (rows, columns):
            gives_width = bool(re.search(r"down|output|fc2|w2", own[len(parent) :]))
            return (width == columns) == gives_width
    return False


def _bias_tells(name: str, base: Checkpoint) -> bool | None:
    shape, bias = base.tensors[name].shape, base.tensors.get(f"{name.removesuffix('.weight')}.bias")
    if bias is None or len(shape) != 2 or shape[0] == shape[1] or bias.shape[0] not in shape:
        return None
    return bias.shape[0] == shape[1]


def _has_output(base: Checkpoint, config: Mapping[str, Any]) -> bool:
    task = config.get("task_type")
    if task:
        return task in OUTPUT_TASKS
    mapping = config.get("auto_mapping") or {}
    classes = [mapping["base_model_class"]] if "base_model_class" in mapping else base.config.get("architectures")
    return not classes or bool(OUTPUT_CLASS.search(str(classes[0])))
