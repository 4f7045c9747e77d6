"""What vLLM calls when it loads its plugins (entry-point group ``vllm.general_plugins``).

    TVBASES_VLLM_BASIS=skills/ VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve BASE --enable-lora --max-lora-rank 16

Settings are environment variables, as vLLM's own resolvers have them: a plugin has no options.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tvbases_hf.basis import LoraBasis
from tvbases_hf.errors import ParameterError

from .cache import AdapterCache
from .resolver import make_resolver

NAME = "tvbases"
BASIS = "TVBASES_VLLM_BASIS"
CACHE, SIZE, RANK, MODELS = (f"TVBASES_VLLM_{word}" for word in ("CACHE", "CACHE_SIZE", "MAX_RANK", "BASE_MODELS"))


def register(environment: Mapping[str, str] = os.environ) -> None:
    """Give vLLM a resolver of the basis that TVBASES_VLLM_BASIS names; without it nothing happens.

    Raises TvbasesError for a basis that cannot be read, and for settings that are no numbers: the server then says so.
    """
    source = environment.get(BASIS)
    if not source:
        return
    cache = AdapterCache(
        LoraBasis.from_pretrained(source),
        Path(environment.get(CACHE) or tempfile.mkdtemp(prefix="tvbases-vllm-")),
        _number(environment, SIZE, 64),
        _number(environment, RANK, 16),
    )
    models = tuple(name for name in environment.get(MODELS, "").split(",") if name)
    resolver = make_resolver(cache, models)
    from vllm.lora.resolver import LoRAResolverRegistry

    LoRAResolverRegistry.register_resolver(NAME, resolver)


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name) or str(default)
    if not text.isdecimal() or int(text) < 1:
        raise ParameterError(f"{name}={text!r} is no number of 1 or more; for example {name}={default}")
    return int(text)
