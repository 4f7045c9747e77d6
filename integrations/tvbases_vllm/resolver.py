"""vLLM's LoRAResolver over a cache. vLLM is imported only here, when the server loads its plugins."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from tvbases_hf.errors import MissingExtraError
from tvbases_hf.storage.files import without_revision

from .cache import AdapterCache


def make_resolver(cache: AdapterCache, base_models: tuple[str, ...] = ()) -> Any:
    """A resolver of the tasks of a basis.

    Args:
        base_models: what the server calls the basis's base, beside the name in the basis and its last part.

    Raises MissingExtraError where vLLM is not installed.
    """
    try:
        from vllm.lora.request import LoRARequest
        from vllm.lora.resolver import LoRAResolver
    except ImportError as error:
        raise MissingExtraError(f"vLLM is needed ({error}); pip install vllm") from error

    own, _ = without_revision(cache.basis.info.base_id)
    served = {own, Path(own).name, *base_models}

    class BasisResolver(LoRAResolver):
        """A task of the basis by its name; None for any other name, which other resolvers may know."""

        async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
            if base_model_name not in served and Path(base_model_name).name not in served:
                return None
            path = await asyncio.to_thread(cache.path, lora_name)
            if path is None:
                return None
            return LoRARequest(lora_name=lora_name, lora_int_id=cache.number(lora_name), lora_path=str(path))

    return BasisResolver()
