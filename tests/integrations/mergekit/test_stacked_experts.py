"""Mixtures of experts: packed on disk, or packed by mergekit, merged alike by both commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from oracles.merge_oracle import run_ours
from tvbases_hf.algebra.delta import Delta, Dense, dense
from tvbases_hf.methods.registry import METHODS
from zoo import renamed
from zoo.adapter_zoo import merged_checkpoint

EPS = torch.finfo(torch.float32).eps
TASKS = ("a", "b", "c")
OPTIONS: dict[str, dict[str, Any]] = {
    "tsv": {}, "tsv_compress": {"rank": 3}, "iso_c": {}, "devec_unique": {"rank": 4, "threshold": 0.2},
}  # fmt: skip


def gpt_oss() -> Any:
    config = transformers.GptOssConfig(**renamed.GROUPED, head_dim=8, num_local_experts=3, num_experts_per_tok=2)
    return transformers.GptOssForCausalLM(config)


def models(root: Path, name: str) -> dict[str, dict[str, Tensor]]:
    """Base and fine-tunes, written to ``root``, as they are in the files."""
    states = {}
    for index, task in enumerate(("base", *TASKS)):
        torch.manual_seed(0)
        model = gpt_oss() if name == "gpt oss" else renamed.make(name)
        torch.manual_seed(index)
        if index:
            with torch.no_grad():
                for weight in model.parameters():
                    weight += 0.05 * torch.randn_like(weight)
        states[task] = renamed.saved(model, root / task)
    return states


def recipe(root: Path, method: str) -> dict[str, Any]:
    return {
        "merge_method": method,
        "base_model": str(root / "base"),
        "models": [{"model": str(root / task)} for task in TASKS],
        "parameters": OPTIONS[method],
        "dtype": "float32",
    }


@pytest.mark.parametrize("method", OPTIONS)
@pytest.mark.parametrize("name", ["mixtral", "qwen3 moe"])
def test_what_mergekit_packs_is_merged_as_it_is_stored(tmp_path: Path, name: str, method: str) -> None:
    states = models(tmp_path, name)
    native = merged_checkpoint(recipe(tmp_path, method), tmp_path / "native")
    packed = run_ours(recipe(tmp_path, method), tmp_path / "packed")
    loaded = [transformers.AutoModelForCausalLM.from_pretrained(tmp_path / made) for made in ("native", "packed")]
    found, expected = (model.state_dict() for model in reversed(loaded))
    assert found.keys() == expected.keys() and any("experts" in key for key in found)
    assert native.keys() == states["base"].keys() and len(packed) > 0
    for key, tensor in expected.items():
        assert torch.allclose(found[key], tensor, rtol=0, atol=100 * EPS), key


@pytest.mark.parametrize("method", OPTIONS)
def test_experts_packed_on_disk_are_matrices(tmp_path: Path, method: str) -> None:
    states = models(tmp_path, "gpt oss")
    found = merged_checkpoint(recipe(tmp_path, method), tmp_path / "native")
    name = next(key for key in found if key.endswith("experts.gate_up_proj"))
    for expert in range(3):
        deltas: list[Delta] = [
            Dense((states[task][name][expert] - states["base"][name][expert]).T.contiguous()) for task in TASKS
        ]
        change = dense(METHODS[method].combine(deltas, [1.0] * 3, **OPTIONS[method])).T
        expected = states["base"][name][expert] + change
        assert torch.allclose(found[name][expert].double(), expected, rtol=0, atol=1e3 * EPS)


@pytest.mark.parametrize("method", OPTIONS)
def test_experts_one_below_the_other_are_matrices(tmp_path: Path, method: str) -> None:
    """DBRX stores [E * n, m]; the inputs of w2 are its rows."""
    states = models(tmp_path, "dbrx")
    native = merged_checkpoint(recipe(tmp_path, method), tmp_path / "native")
    stock = run_ours(recipe(tmp_path, method), tmp_path / "packed")
    differ = False
    for name in sorted(key for key in native if "experts.mlp" in key):
        turned, found = name.endswith("w2"), native[name]
        parts = {task: state[name].view(4, 24, 16).double() for task, state in states.items()}
        for expert, own in enumerate(parts["base"]):
            changes = [parts[task][expert] - own for task in TASKS]
            deltas: list[Delta] = [Dense((c.T if turned else c).float().contiguous()) for c in changes]
            change = dense(METHODS[method].combine(deltas, [1.0] * 3, **OPTIONS[method]))
            expected = own + (change.T if turned else change)
            assert torch.allclose(found.view(4, 24, 16)[expert].double(), expected, rtol=0, atol=1e3 * EPS), name
        whole: list[Delta] = [Dense(states[task][name] - states["base"][name]) for task in TASKS]
        as_one = dense(METHODS[method].combine(whole, [1.0] * 3, **OPTIONS[method]))
        differ = differ or not torch.allclose(found - states["base"][name], as_one.float(), atol=1e-3)
        assert torch.equal(stock[name], found)
    assert differ
