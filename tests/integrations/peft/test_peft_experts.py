"""Experts that are one parameter in memory and many tensors in the file: adapters of some, and saved routers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from compatibility.peft_table import WEIGHTS, Made, logits, relative, summed
from compatibility.peft_variants import load_base, lora, make_adapter, make_base

from commands.command_line import refused, tvbases
from oracles.merge_oracle import write_config

PAIRS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "other parameters of one module": (
        {"target_modules": [], "target_parameters": ["experts.down_proj"], "use_rslora": True},
        {"target_modules": [], "target_parameters": ["experts.gate_up_proj"], "r": 2},
    ),
    "all parameters and one": (
        {"target_parameters": ["experts.down_proj", "experts.gate_up_proj"]},
        {"target_modules": [], "target_parameters": ["experts.down_proj"]},
    ),
    "a saved router": ({"modules_to_save": ["gate"]}, {"target_modules": ["o_proj"]}),
    "a saved router and its factors": ({"modules_to_save": ["gate"]}, {"target_parameters": ["gate.weight"]}),
}


def made(root: Path, first: dict[str, Any], second: dict[str, Any]) -> Made:
    base = make_base(root / "base", "mixtral")
    for seed, (name, words) in enumerate(zip("ab", (first, second), strict=True), start=1):
        make_adapter(root / name, base, lora("mixtral", **words), seed)
    return Made(root, lora("mixtral"))


def configuration(root: Path) -> Path:
    weighted = zip("ab", WEIGHTS, strict=True)
    models = [{"model": str(root / name), "parameters": {"weight": weight}} for name, weight in weighted]
    config = {"merge_method": "task_arithmetic", "base_model": str(root / "base"), "models": models}
    return write_config(root / "sum.yml", config)


@pytest.mark.parametrize("name", sorted(PAIRS))
def test_a_sum_is_what_peft_merges(name: str, tmp_path: Path) -> None:
    pair = made(tmp_path, *PAIRS[name])
    config, expected = configuration(tmp_path), logits(summed(pair))
    assert tvbases("merge", config, tmp_path / "out", "--quiet").code == 0
    assert relative(logits(load_base(tmp_path / "out", "mixtral")), expected) <= 1e-6
    told = tvbases("merge", config, tmp_path / "sum", "--adapter", "--quiet")
    if told.code:  # one module cannot be saved and have factors
        assert name == "a saved router and its factors" and "write a full checkpoint" in told.err
    else:
        assert relative(logits(pair.model("sum")), expected) <= 1e-6


def test_experts_that_are_saved_whole_are_refused(tmp_path: Path) -> None:
    """As a head that the base lacks they would be left out of a checkpoint, and not weighted in an adapter."""
    made(tmp_path, {"modules_to_save": ["experts"]}, {})
    for more in ([], ["--adapter"]):
        message = refused(tmp_path, "merge", configuration(tmp_path), tmp_path / "out", *more)
        assert "saves 4 tensors whole that the base" in message and "stores in parts" in message
