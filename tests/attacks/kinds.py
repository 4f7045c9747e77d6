"""The attacks that are known, one small generator each: what is done to a workplace, and what must be said of it.

Every command that reads what was damaged must end with exit code 2 and one line that holds ``says``, and must leave
everything as it was; where an attack has code 0 it must be done, and shown as it is. New kinds that are found are added
here, and in bases.py, merges.py, places.py and texts.py.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_file

from attacks.workplace import Action, Workplace

# What it gives back is the commands, where they are not those of a kind.
Spoil = TypeVar("Spoil", bound="Callable[[Workplace], Sequence[Action] | AbstractContextManager[None] | None]")
ATTACKS: dict[str, Attack] = {}
NAN, INFINITY = float("nan"), float("inf")


@dataclass(frozen=True)
class Attack:
    """``commands`` is a kind of workplace.actions, or nothing where ``spoil`` gives them."""

    commands: str
    says: str
    spoil: Callable[[Workplace], Any]
    code: int = 2


def attack(commands: str, says: str, code: int = 2) -> Callable[[Spoil], Spoil]:
    def note(spoil: Spoil) -> Spoil:
        ATTACKS[getattr(spoil, "__name__", "").replace("_", " ")] = Attack(commands, says, spoil, code)
        return spoil

    return note


def edit(file: Path, change: Callable[[Any], object]) -> None:
    data = json.loads(file.read_text(encoding="utf-8"))
    change(data)
    file.write_text(json.dumps(data), encoding="utf-8")


def rewrite(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    state = load_file(file)
    change(state)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, file, {"format": "pt"})


def rewrite_header(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = file.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])


# config.json


@attack("model", "num_hidden_layers: 1e+09")
def a_thousand_million_layers(place: Workplace) -> None:
    """transformers makes a list of as many entries: half a minute and a gigabyte."""
    edit(place / "base/config.json", lambda c: c.update(num_hidden_layers=10**9))


@attack("model", "num_hidden_layers: nan")
def layers_that_are_no_number(place: Workplace) -> None:
    edit(place / "base/config.json", lambda c: c.update(num_hidden_layers=NAN))


@attack("model", "num_attention_heads: inf")
def infinitely_many_heads(place: Workplace) -> None:
    edit(place / "base/config.json", lambda c: c.update(num_attention_heads=INFINITY))


@attack("model", "nested more than 100 deep")
def deep_json(place: Workplace) -> None:
    """Python's reader runs out of its stack."""
    (place / "base/config.json").write_text('{"a":' * 50_000 + "1" + "}" * 50_000)


@attack("model", "a number of 5000 digits")
def a_number_of_5000_digits(place: Workplace) -> None:
    (place / "base/config.json").write_text('{"vocab_size": ' + "9" * 5000 + "}")


@attack("model", "architectures: input should be a valid list")
def a_word_where_a_list_belongs(place: Workplace) -> None:
    edit(place / "base/config.json", lambda c: c.update(architectures="LlamaForCausalLM"))


@attack("model", "damaged")
def half_a_character(place: Workplace) -> None:
    """JSON can spell half of a UTF-16 pair, which no terminal and no file can hold."""
    (place / "base/config.json").write_text('{"model_type": "\\ud800"}')


# Shard indexes


@attack("model", "not a shard index")
def a_shard_outside_of_the_folder(place: Workplace) -> None:
    edit(place / "code/model.safetensors.index.json", lambda c: c["weight_map"].update(x="../base/model.safetensors"))


@attack("model", "cannot be the name of a file")
def a_shard_with_a_name_of_300_characters(place: Workplace) -> None:
    edit(place / "code/model.safetensors.index.json", lambda c: c["weight_map"].update(x="a" * 300 + ".safetensors"))


@attack("model", "not a shard index")
def a_weight_map_that_is_a_list(place: Workplace) -> None:
    edit(place / "code/model.safetensors.index.json", lambda c: c.update(weight_map=["model.safetensors"]))


# Headers of safetensors files


@attack("model", "truncated or not a safetensors file")
def a_header_of_exabytes(place: Workplace) -> None:
    file = place / "math/model.safetensors"
    file.write_bytes(struct.pack("<Q", 2**63) + file.read_bytes()[8:])


@attack("model", "truncated or not a safetensors file")
def a_negative_offset(place: Workplace) -> None:
    rewrite_header(place / "math/model.safetensors", lambda h: h["model.norm.weight"].update(data_offsets=[-64, 0]))


@attack("model", "truncated or not a safetensors file")
def tensors_on_top_of_each_other(place: Workplace) -> None:
    rewrite_header(place / "math/model.safetensors", lambda h: h["model.norm.weight"].update(data_offsets=[0, 64]))


@attack("model", "truncated or not a safetensors file")
def a_dtype_that_does_not_fit_the_bytes(place: Workplace) -> None:
    rewrite_header(place / "math/model.safetensors", lambda h: h["model.norm.weight"].update(dtype="F64"))


@attack("model", "stored as integers")
def numbers_that_are_called_integers(place: Workplace) -> None:
    rewrite_header(place / "math/model.safetensors", lambda h: h["model.norm.weight"].update(dtype="I32"))


@attack("model", "NaN")
def nan_in_a_fine_tune(place: Workplace) -> None:
    rewrite(place / "math/model.safetensors", lambda s: s["model.norm.weight"].fill_(NAN))


@attack("writing", "NaN or infinite numbers")
def nan_in_what_is_written_from(place: Workplace) -> None:
    rewrite(place / "math/model.safetensors", lambda s: s["model.norm.weight"][3:].fill_(NAN))


@attack("writing", "NaN or infinite numbers")
def infinity_in_a_base(place: Workplace) -> None:
    rewrite(place / "base/model.safetensors", lambda s: s["model.layers.1.mlp.up_proj.weight"].fill_(INFINITY))


# adapter_config.json


@attack("adapter", "")
def a_pattern_that_never_ends(place: Workplace) -> None:
    """Python's own engine takes longer for it than the universe is old."""
    edit(place / "math-lora/adapter_config.json", lambda c: c.update(target_modules="(.*)*x"))


@attack("adapter", "not a regular expression")
def a_pattern_that_is_none(place: Workplace) -> None:
    edit(place / "math-lora/adapter_config.json", lambda c: c.update(target_modules="x{1,99999999999}"))


@attack("adapter", "a regular expression of 200000 characters")
def a_pattern_of_200000_characters(place: Workplace) -> None:
    edit(place / "math-lora/adapter_config.json", lambda c: c.update(target_modules="a|" * 100_000))


@attack("adapter", "not a regular expression")
def a_pattern_of_ranks_that_is_none(place: Workplace) -> None:
    edit(place / "math-lora/adapter_config.json", lambda c: c.update(rank_pattern={"a)|(b(": 4}))


@attack("adapter", "use_dora: input should be a valid boolean")
def a_word_for_a_truth_value(place: Workplace) -> None:
    """Every word is true to Python, "false" too."""
    edit(place / "math-lora/adapter_config.json", lambda c: c.update(use_dora="false"))


@attack("adapter", "auto_mapping: input should be a valid dictionary")
def a_number_for_a_mapping(place: Workplace) -> None:
    edit(place / "math-lora/adapter_config.json", lambda c: c.update(auto_mapping=5))


@attack("adapter", "inf is not a finite number")
def an_infinite_alpha(place: Workplace) -> None:
    edit(place / "math-lora/adapter_config.json", lambda c: c.update(lora_alpha=INFINITY))


# LoRA files of image models


@attack("style", "lora_adapter_metadata is damaged")
def deep_json_in_a_header(place: Workplace) -> None:
    words = {"lora_adapter_metadata": "[" * 50_000}
    rewrite_header(place / "math.safetensors", lambda h: h["__metadata__"].update(words))
