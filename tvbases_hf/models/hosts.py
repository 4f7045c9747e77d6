"""What the programs that load adapters can take, checked on an adapter's configuration: before the work if known."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .. import defaults
from ..algebra.rank import RankRule
from ..errors import ParameterError
from .adapter import Adapter
from .equal_rank import equal_rank
from .lora_template import Template

# vLLM's --max-lora-rank is one of these (vllm.config.lora.MaxLoRARanks).
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class Host:
    """``saved``: the modules that may be saved whole, a regular expression for the whole name; None for any.

    ``patterns``: whether modules may have ranks of their own; ``biases``: the words of the configuration by which an
    adapter may bring some; ``max_rank``: the largest rank; ``beside``: whether it takes what no module has factors of.
    """

    saved: str | None = None
    patterns: bool = True
    dora: bool = True
    biases: tuple[str, ...] = ("bias", "lora_bias")
    max_rank: int | None = None
    beside: bool = False

    def complaints(self, config: Mapping[str, Any]) -> list[str]:
        """What it has against an adapter of this configuration, each with what to do."""
        ranks = all_ranks(config)
        found = []
        if not self.patterns and len(ranks) > 1:
            found.append(f"ranks differ ({ranks[0]} to {ranks[-1]}): add --equal-rank")
        if self.max_rank is not None and ranks[-1] > self.max_rank:
            found.append(f"rank {ranks[-1]} is above {self.max_rank}: give a lower --rank")
        if not self.dora and config.get("use_dora"):
            found.append("it reads no DoRA: write a checkpoint, or train plain LoRA")
        biases = [word for word in ("bias", "lora_bias") if config.get(word) not in (None, False, "none")]
        if not set(biases) <= set(self.biases):
            found.append(f"it reads no biases: {ELSE}")
        if not self.beside:
            found += [f"it reads no {word}: {advice}" for word, advice in BESIDE.items() if config.get(word)]
        allowed = re.compile(".*" if self.saved is None else self.saved)
        modules = [module for module in config.get("modules_to_save") or [] if not allowed.fullmatch(module)]
        if modules:
            found.append(f"{len(modules)} modules that are saved whole are not read (first: {modules[0]}): {ELSE}")
        return found


ELSE = "leave them out (extract --save none), or write a checkpoint"
BESIDE = {
    "target_parameters": "train the layers (target_modules), or write a checkpoint",
    "trainable_token_indices": "leave those adapters out, or write a checkpoint",
}
HOSTS: dict[str, Host] = {
    # Experts of target_parameters are read as if their factors were transposed, or stop the engine (vllm #52198); what
    # is no factor is refused.
    "vllm": Host("classifier|score", dora=False, biases=(), max_rank=VLLM_RANKS[-1]),
    # convert_lora_to_gguf.py reads factors of modules and one alpha, which is divided by the rank of each tensor; norms
    # are converted, but not applied.
    "llama.cpp": Host("", patterns=False, dora=False, biases=()),
    # load_lora_adapter reads factors of modules alone, and swaps adapters of one rank.
    "diffusers": Host("", patterns=False, biases=("lora_bias",)),
    "peft": Host(beside=True),
}


def all_ranks(config: Mapping[str, Any]) -> list[int]:
    """The different ranks of an adapter's modules, ascending."""
    return sorted({config["r"], *(config.get("rank_pattern") or {}).values()})


def check_host(host: defaults.Host | None, config: Mapping[str, Any]) -> None:
    """Raises ParameterError, with what to change, for a configuration that ``host`` cannot load as it is meant."""
    if host is None:
        return
    if host not in HOSTS:
        raise ParameterError(f"unknown host {host!r}; choose one of {', '.join(HOSTS)}")
    if complaints := HOSTS[host].complaints(config):
        raise ParameterError(f"--for {host}: {'; '.join(complaints)}")


def check_rank(host: defaults.Host | None, rule: RankRule | None) -> None:
    """The same for a rank rule alone, before anything is read."""
    fixed = rule is not None and rule.kind == "absolute"
    check_host(host, {"r": int(rule.value) if rule and fixed else 1})


def fitted(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], equal: bool, host: defaults.Host | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An adapter's tensors and configuration as they are written: at one rank if wanted, and such as ``host`` loads."""
    tensors, config = equal_rank(tensors, config) if equal else (dict(tensors), dict(config))
    check_host(host, config)
    return tensors, config


def check_foreseen(
    host: defaults.Host | None, adapters: Sequence[Adapter], template: Template, rule: RankRule | None
) -> None:
    """The same for what is made of ``adapters``, as far as it is known before their numbers are read."""
    check_rank(host, rule)
    biases = {name for name in template.saved if name.endswith(".bias") and f"{name[:-5]}.weight" not in template.saved}
    saved = [*(template.naming.to_adapter(name) for name in template.saved - biases), *template.head]
    words = {
        "use_dora": any(adapter.has_dora for adapter in adapters),
        "lora_bias": bool(template.bias_modules),
        "bias": "all" if biases else "none",
        "target_parameters": sorted(template.parameters),
        "trainable_token_indices": sorted(template.tokens),
        "modules_to_save": sorted({template.module_to_save(name) for name in saved}),
    }
    check_host(host, {"r": 1, **words})


def host_notes(host: defaults.Host | None, config: Mapping[str, Any]) -> list[str]:
    """What a user should know who loads an adapter of this configuration, one line each."""
    ranks = all_ranks(config)
    if host == "vllm":
        return [f"start vLLM with --max-lora-rank {next(rank for rank in VLLM_RANKS if rank >= ranks[-1])}"]
    if host is None and len(ranks) > 1:
        return [
            f"its modules have ranks from {ranks[0]} to {ranks[-1]} (rank_pattern), which llama.cpp ignores and "
            "hot-swapping refuses; --equal-rank pads them"
        ]
    return []
