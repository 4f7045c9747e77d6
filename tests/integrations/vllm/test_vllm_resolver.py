"""vLLM's published interface of LoRA resolvers, made again here (vLLM itself needs a GPU), and our resolver in it.

The interface: ``LoRAResolver.resolve_lora(base_model_name, lora_name) -> LoRARequest | None`` (async, abstract),
``LoRAResolverRegistry.register_resolver(name, resolver)``, ``LoRARequest(lora_name, lora_int_id, lora_path)``, and
plugins that are functions without arguments, named in the entry-point group ``vllm.general_plugins``.
"""

from __future__ import annotations

import asyncio
import json
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tvbases_vllm
from tvbases_hf import LoraBasis
from tvbases_hf.basis.compress import compress
from tvbases_hf.errors import MissingExtraError, ParameterError
from tvbases_vllm import AdapterCache, make_resolver, register
from zoo.adapter_families import Adapters, random_adapters

NAMES = ("math", "code", "chat")


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str

    def __post_init__(self) -> None:
        assert self.lora_int_id >= 1 and self.lora_path  # as vLLM checks


class LoRAResolver(ABC):
    @abstractmethod
    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None: ...


@dataclass
class Registry:
    resolvers: dict[str, LoRAResolver] = field(default_factory=dict)

    def register_resolver(self, resolver_name: str, resolver: LoRAResolver) -> None:
        self.resolvers[resolver_name] = resolver


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Registry:
    """vLLM, as far as a resolver sees it."""
    found = Registry()
    parts: dict[str, dict[str, Any]] = {
        "vllm": {},
        "vllm.lora": {},
        "vllm.lora.request": {"LoRARequest": LoRARequest},
        "vllm.lora.resolver": {"LoRAResolver": LoRAResolver, "LoRAResolverRegistry": found},
    }
    for name, contents in parts.items():
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    return found


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Adapters:
    return random_adapters(tmp_path_factory.mktemp("adapters"), tasks=NAMES)


@pytest.fixture(scope="module", params=["library", "joint"])
def directory(request: pytest.FixtureRequest, adapters: Adapters, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("basis") / "basis"
    compress(adapters.base, adapters.tasks, out, method=request.param, budget=0.9)
    return out


def resolve(resolver: Any, base: str, name: str) -> LoRARequest | None:
    return asyncio.run(resolver.resolve_lora(base, name))


def test_a_server_gets_a_task_by_name_and_nothing_for_other_names(
    registry: Registry, adapters: Adapters, directory: Path, tmp_path: Path
) -> None:
    settings = {"TVBASES_VLLM_BASIS": str(directory), "TVBASES_VLLM_CACHE": str(tmp_path / "cache")}
    register({**settings, "TVBASES_VLLM_BASE_MODELS": "org/served", "TVBASES_VLLM_MAX_RANK": "8"})
    resolver = registry.resolvers["tvbases"]
    request = resolve(resolver, "org/served", "code")
    assert request is not None and request.lora_name == "code"
    path = Path(request.lora_path)
    found = load_file(path / "adapter_model.safetensors")
    wanted = LoraBasis.from_pretrained(directory).adapter("code", rank=8, equal_rank=True, host="vllm")
    assert found.keys() == wanted.tensors.keys()
    assert all(torch.equal(found[name], wanted.tensors[name]) for name in found)
    config = json.loads((path / "adapter_config.json").read_text())
    assert config["r"] <= 8 and not config["rank_pattern"]  # what --max-lora-rank allows, and one rank in all modules
    assert resolve(resolver, "org/served", "poetry") is None
    assert resolve(resolver, "org/another", "code") is None
    again = resolve(resolver, "org/served", "code")
    assert again == request
    numbers = {resolve(resolver, "org/served", name).lora_int_id for name in NAMES}  # type: ignore[union-attr]
    assert len(numbers) == len(NAMES)


def test_the_cache_never_holds_more_than_it_may_and_forgets_what_was_used_longest_ago(
    directory: Path, tmp_path: Path
) -> None:
    cache = AdapterCache(LoraBasis.from_pretrained(directory), tmp_path / "cache", size=2)
    places = {name: cache.path(name) for name in ("math", "code")}
    assert cache.path("math") == places["math"]
    cache.path("chat")
    assert places["math"].is_dir() and not places["code"].exists()  # type: ignore[union-attr]
    assert len([entry for entry in (tmp_path / "cache").iterdir() if not entry.name.startswith(".")]) == 2
    back = cache.path("code")
    assert back == places["code"] and back is not None and (back / "adapter_config.json").is_file()


def test_a_directory_of_the_users_own_is_never_replaced(directory: Path, tmp_path: Path) -> None:
    cache = AdapterCache(LoraBasis.from_pretrained(directory), tmp_path / "cache", size=1)
    place = cache.path("math")
    assert place is not None
    (place / "tvbases_vllm.txt").unlink()
    cache.path("code")
    assert place.is_dir()


def test_settings_are_checked_and_no_basis_means_no_resolver(
    registry: Registry, directory: Path, tmp_path: Path
) -> None:
    register({})
    assert not registry.resolvers
    with pytest.raises(ParameterError, match="TVBASES_VLLM_MAX_RANK='x' is no number of 1 or more"):
        register({"TVBASES_VLLM_BASIS": str(directory), "TVBASES_VLLM_MAX_RANK": "x"})
    with pytest.raises(ParameterError, match="at least one adapter"):
        AdapterCache(LoraBasis.from_pretrained(directory), tmp_path, size=0)


def test_without_vllm_the_extra_is_named(directory: Path, tmp_path: Path) -> None:
    cache = AdapterCache(LoraBasis.from_pretrained(directory), tmp_path)
    with pytest.raises(MissingExtraError, match="pip install vllm"):
        make_resolver(cache)


def test_vllm_finds_the_plugin_by_its_entry_point() -> None:
    text = (Path(__file__).parents[3] / "pyproject.toml").read_text(encoding="utf-8")
    assert '[project.entry-points."vllm.general_plugins"]\ntvbases = "tvbases_vllm:register"' in text
    assert tvbases_vllm.register is register


def test_peft_swaps_one_task_for_another_in_place(adapters: Adapters, directory: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
    from transformers import AutoModelForCausalLM

    cache = AdapterCache(LoraBasis.from_pretrained(directory), tmp_path / "cache", max_rank=4)
    ids = torch.arange(12).reshape(2, 6)

    def alone(task: str) -> torch.Tensor:
        model = AutoModelForCausalLM.from_pretrained(adapters.base)
        return PeftModel.from_pretrained(model, str(cache.path(task)))(ids).logits.detach()

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(adapters.base), str(cache.path("math")))
    prepare_model_for_compiled_hotswap(model, target_rank=4)
    places = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    hotswap_adapter(model, str(cache.path("code")), adapter_name="default")
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == places
    assert torch.allclose(model(ids).logits, alone("code"), atol=1e-5)
    assert not torch.allclose(alone("math"), alone("code"), atol=1e-3)
