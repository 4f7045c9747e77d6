"""Every method and option of PEFT: exact from files and in a loaded model, as checkpoint and as LoRA, or refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from compatibility.peft_table import COLUMNS, EXACT, REFUSED, Made, cell, row
from compatibility.peft_variants import VARIANTS, make_adapter, make_base
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from tvbases_peft.merged import MERGEABLE

FILES, LOADED, ADAPTER, ADDED, PEFTS = COLUMNS
# What no LoRA, or no checkpoint of this base, can hold.
NOT_READ = ["KaSA", "Lily", "Prompt tuning", "aLoRA", "replicated layers"]
NO_CHECKPOINT = ["LoRA, lora_bias where the base has none"]
NO_ADAPTER = ["LN tuning", "Trainable tokens"]


# In every column; of the others, which are read in one way, what a loaded model gives. The example measures all.
FULL = (
    "BD-LoRA", "DoRA", "IA3", "KaSA", "LN tuning", "LoHa", "LoKr, modules_to_save",
    "LoRA, lora_bias where the base has none", "LoRA, target_parameters, a matrix",
    "LoRA, target_parameters, experts [in, out]", "LoRA, target_parameters, stacked experts",
    "LoRA, trainable_token_indices", "LoRA, trainable_token_indices, tied", "OFT", "Prompt tuning", "Trainable tokens",
)  # fmt: skip


@pytest.mark.parametrize("name", sorted(FULL))
def test_a_variant_is_exact_or_refused(name: str, tmp_path: Path) -> None:
    cells = row(VARIANTS[name], tmp_path)
    read = REFUSED if name in NOT_READ else "exact"
    assert cells[FILES] == (REFUSED if name in NO_CHECKPOINT else read)
    assert cells[LOADED] == read
    assert cells[ADAPTER] == (REFUSED if name in NO_ADAPTER else read)
    config = VARIANTS[name].config()
    assert cells[ADDED] == (read if str(config.peft_type.value) == "LORA" else REFUSED)


@pytest.mark.parametrize("name", sorted(set(VARIANTS) - set(FULL)))
def test_a_loaded_adapter_is_read_as_what_it_computes_or_refused(name: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", VARIANTS[name].model)
    make_adapter(tmp_path / "a", base, VARIANTS[name], seed=1)
    cells = cell(COLUMNS[LOADED], Made(tmp_path, VARIANTS[name]))
    assert cells == (REFUSED if name in NOT_READ else "exact")


def test_every_method_of_peft_is_in_the_table() -> None:
    """The rest are prompts, routers over adapters, and states between layers: no change of weights."""
    no_weights = {
        "ADAPTION_PROMPT", "CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING", "POLY", "PREFIX_TUNING", "P_TUNING", "SHADOW",
        "XLORA",
    }  # fmt: skip
    tried = {str(variant.config().peft_type.value) for variant in VARIANTS.values()}
    assert {kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING} <= tried | no_weights
    assert tried >= MERGEABLE and not no_weights & MERGEABLE


def test_peft_itself_is_wrong_where_the_table_says_so(tmp_path: Path) -> None:
    made = Made.of(tmp_path, VARIANTS["rsLoRA"])
    found = COLUMNS[PEFTS](made)
    assert isinstance(found, float) and found > 100 * EXACT
