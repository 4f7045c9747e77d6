"""A tiny Llama, adapters of it, and the same models in full. All numbers are few binary digits, so that adding a change
to a weight is exact in float32 and both kinds of model hold the same task vectors to the last bit."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from commands.command_line import Outcome, tvbases
from tvbases_hf.algebra.delta import dense
from tvbases_hf.models.adapter import Adapter
from tvbases_hf.storage.checkpoint import Checkpoint
from zoo.hf_models import VOCABULARY, State, read_state, save_state, save_tokenizer

LAYERS = 3
ATTENTION = ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
PREFIX = "base_model.model."


@dataclass(frozen=True)
class Zoo:
    """``adapters`` and ``full`` are the same models by name, ``tau`` their changes by tensor: [T, *shape], float64."""

    base: Path
    adapters: dict[str, Path]
    full: dict[str, Path]
    tau: State

    @property
    def origin(self) -> State:
        return {name: tensor.double() for name, tensor in read_state(self.base).items()}


def dyadic(generator: torch.Generator, *shape: int, steps: int, unit: float) -> Tensor:
    """Multiples of ``unit``, uniformly from -steps to steps."""
    return torch.randint(-steps, steps + 1, shape, generator=generator).double() * unit


def make_base(
    directory: Path,
    dtype: torch.dtype = torch.float32,
    *,
    layers: int = LAYERS,
    hidden: int = 32,
    intermediate: int = 48,
) -> Path:
    """A Llama whose weights are multiples of 1/128 below 1/2: exact in bfloat16, too."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    model, generator = LlamaForCausalLM(config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = dyadic(generator, *parameter.shape, steps=63, unit=2**-7)
            parameter.copy_(1 + values if "norm" in name else values)
    model.to(dtype).save_pretrained(directory)  # type: ignore[arg-type]
    save_tokenizer(directory)
    return directory


def make_adapter(
    directory: Path,
    base: Path,
    seed: int,
    modules: Sequence[str] = ATTENTION,
    rank: int = 4,
    alpha: float = 2.0,
    layers: int = LAYERS,
    **config: Any,
) -> tuple[Path, State]:
    """A LoRA of random factors, and its changes; alpha / rank must be a power of two, 1/4 at least."""
    generator, state = torch.Generator().manual_seed(seed), read_state(base)
    tensors, changes = {}, {}
    for name in [f"model.layers.{layer}.{module}" for layer in range(layers) for module in modules]:
        rows, columns = state[f"{name}.weight"].shape
        # Multiples of 2^-22: fine enough that no two numbers of a change are equal by chance.
        b = dyadic(generator, rows, rank, steps=100, unit=2**-11)
        a = dyadic(generator, rank, columns, steps=255, unit=2**-11)
        tensors[f"{PREFIX}{name}.lora_A.weight"], tensors[f"{PREFIX}{name}.lora_B.weight"] = a.float(), b.float()
        changes[f"{name}.weight"] = alpha / rank * b @ a
    directory.mkdir(parents=True)
    save_file(tensors, directory / "adapter_model.safetensors", {"format": "pt"})
    words = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": alpha, "lora_dropout": 0.0}
    words |= {"target_modules": [module.split(".")[-1] for module in modules], "bias": "none"}
    text = json.dumps(words | {"base_model_name_or_path": str(base)} | config)
    (directory / "adapter_config.json").write_text(text, encoding="utf-8")
    return directory, changes


# Ranks, scalings and targets differ; the tasks overlap in some modules and not in others.
KINDS: dict[str, dict[str, Any]] = {
    "math": {"modules": ATTENTION + MLP, "rank": 4, "alpha": 4.0},
    "code": {"modules": ATTENTION, "rank": 2, "alpha": 4.0},
    "chat": {"modules": (*ATTENTION[:2], *MLP[1:]), "rank": 8, "alpha": 2.0},
}


def make_zoo(root: Path, kinds: Mapping[str, dict[str, Any]] = KINDS) -> Zoo:
    base = make_base(root / "base")
    origin = {name: tensor.double() for name, tensor in read_state(base).items()}
    adapters, full, changes = {}, {}, []
    for seed, (name, kind) in enumerate(kinds.items(), 1):
        adapters[name], change = make_adapter(root / f"{name}-lora", base, seed, **kind)
        changes.append(change)
        tuned = {key: (tensor + change.get(key, 0)).float() for key, tensor in origin.items()}
        assert all(torch.equal(tuned[key].double(), origin[key] + change.get(key, 0)) for key in tuned)
        full[name] = save_state(root / name, tuned, base)
    tau = {
        key: torch.stack([change.get(key, torch.zeros_like(tensor)) for change in changes])
        for key, tensor in origin.items()
    }
    return Zoo(base, adapters, full, tau)


def config_of(
    zoo: Zoo,
    method: str,
    weights: Sequence[Any] | None = None,
    models: Mapping[str, Path | str] | None = None,
    **parameters: Any,
) -> dict[str, Any]:
    """A mergekit configuration of the adapters, or of other ``models``; ``lambda_`` stands for lambda."""
    entries: list[dict[str, Any]] = [{"model": str(path)} for path in (models or zoo.adapters).values()]
    for entry, weight in zip(entries, weights, strict=True) if weights is not None else []:
        entry["parameters"] = {"weight": weight}
    config: dict[str, Any] = {"merge_method": method, "base_model": str(zoo.base), "models": entries}
    return config | {"parameters": {name.rstrip("_"): value for name, value in parameters.items()}}


def weighted(zoo: Zoo, weights: Sequence[float] | Tensor) -> State:
    """sum_i w_i tau_i by tensor, float64."""
    factors = torch.as_tensor(weights, dtype=torch.float64)
    return {name: torch.tensordot(factors, tau, dims=1) for name, tau in zoo.tau.items()}


def run_native(config: Mapping[str, Any], out: Path, *options: str) -> Outcome:
    """``tvbases merge``; it must succeed."""
    file = out.with_suffix(".yml")
    file.write_text(yaml.safe_dump(dict(config), sort_keys=False), encoding="utf-8")
    outcome = tvbases("merge", file, out, "--quiet", *options)
    assert outcome.code == 0, outcome.err
    return outcome


def merged_checkpoint(config: Mapping[str, Any], out: Path, *options: str) -> State:
    run_native(config, out, *options)
    return read_state(out)


def merged_adapter(zoo: Zoo, config: Mapping[str, Any], out: Path, *options: str) -> State:
    """The changes [*shape], float64, that the written adapter makes."""
    run_native(config, out, "--adapter", *options)
    return adapter_changes(zoo.base, out)


def adapter_changes(base: Path, adapter: Path) -> State:
    opened = Checkpoint.open(base)
    found = Adapter.open(adapter, opened)
    changes = {name: found.delta(name) for name in found.names}
    return {n: dense(d).reshape(opened.tensors[n].shape) for n, d in changes.items() if d is not None}


def relative(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """|found - expected| / |expected| over all tensors; one that ``found`` lacks is zero there."""
    lost = sum(float((found.get(n, torch.zeros(())).double() - t).square().sum()) for n, t in expected.items())
    return (lost / sum(float(t.square().sum()) for t in expected.values())) ** 0.5
