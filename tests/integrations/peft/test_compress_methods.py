"""A basis of adapters of PEFT's other methods and options: exact, or refused by name with a way that works."""

from __future__ import annotations

from pathlib import Path

import pytest
from compatibility.peft_table import Made, logits, relative
from compatibility.peft_variants import VARIANTS

from commands.command_line import refused, tvbases
from oracles.merge_oracle import write_config
from tvbases_hf.basis import LoraBasis

REFUSALS = {
    "BD-LoRA": '"a": LORA adapter, which has no factors',
    "LN tuning": '"a": LN_TUNING adapter, which has no factors',
    "LoRA, target_parameters, stacked experts": '"a": target_parameters of 18 tensors',
    "LoRA, trainable_token_indices": '"a": trainable_token_indices of 1 tensors (first: model.embed_tokens.weight)',
}


def compress(made: Made, *more: object) -> list[object]:
    tasks = [word for name in "ab" for word in ("--task", f"{name}={made.root / name}")]
    return ["compress", "--base", made.base, *tasks, "--out", made.root / "basis", *more]


@pytest.mark.parametrize("name", sorted(REFUSALS))
def test_what_a_basis_cannot_hold_is_refused_before_the_work(name: str, tmp_path: Path) -> None:
    made = Made.of(tmp_path, VARIANTS[name])
    for more in (["--budget", "0.5"], ["--method", "tsv", "--dry-run"]):
        assert refused(tmp_path, *compress(made, *more)).startswith(REFUSALS[name])


def test_the_loras_of_adapters_of_another_method_are_compressed(tmp_path: Path) -> None:
    made = Made.of(tmp_path, VARIANTS["LoHa"])
    assert "tvbases merge --adapter" in refused(tmp_path, *compress(made, "--method", "tsv"))
    expected = logits(made.model("a"))
    for name in "ab":
        config = {
            "merge_method": "task_arithmetic",
            "base_model": str(made.base),
            "models": [{"model": str(tmp_path / name), "parameters": {"weight": 1}}],
        }
        file = write_config(tmp_path / f"{name}.yml", config)
        assert tvbases("merge", file, tmp_path / f"lora-{name}", "--adapter", "--quiet").code == 0
        (tmp_path / name).rename(tmp_path / f"loha-{name}")
        (tmp_path / f"lora-{name}").rename(tmp_path / name)
    assert tvbases(*compress(made, "--method", "tsv", "--rank", "16", "--quiet")).code == 0
    LoraBasis.from_pretrained(tmp_path / "basis").adapter("a").save_pretrained(tmp_path / "again")
    assert relative(logits(made.model("again")), expected) <= 1e-6


def test_saved_modules_are_compressed_exactly(tmp_path: Path) -> None:
    made = Made.of(tmp_path, VARIANTS["LoRA, modules_to_save"])
    assert tvbases(*compress(made, "--method", "tsv", "--rank", "4", "--quiet")).code == 0
    basis = LoraBasis.from_pretrained(tmp_path / "basis")
    basis.adapter("a", base=made.base).save_pretrained(tmp_path / "again")
    assert relative(logits(made.model("again")), logits(made.model("a"))) <= 1e-6
