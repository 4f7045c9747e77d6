"""Expressions of files match what Python's ``re`` says they match, as PEFT uses it; and they come to an end."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tvbases_hf.errors import CheckpointError
from tvbases_hf.models.lora_config import LoraOptions, check_expressions
from tvbases_hf.models.patterns import Patience, PatternError, check_pattern, check_time

# As PEFT's users, unsloth and LLaMA-Factory write them.
KNOWN = (
    r".*\.(q_proj|v_proj)",
    r"^(?!.*visual).*(?:q_proj|k_proj).*",
    r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|up_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:mlp)\.(?:up_proj))",
    r"model\.layers\.([0-9]|1[0-9])\..*",
    r"(.*\.)?(down_proj)$",
    r"(.*\.)?(^model.layers.0.self_attn.q_proj)$",
)
NAMES = (
    "model.layers.0.self_attn.q_proj",
    "model.layers.11.mlp.up_proj",
    "model.visual.blocks.0.attn.q_proj",
    "language_model.model.layers.3.mlp.down_proj",
    "q_proj",
    "",
)
PARTS = st.sampled_from(
    ["a", "b", ".", ".*", "a+", "(a|b)", "[^b]", r"\.", "b?", "(?!b)", "(?:ab)*", "^", "$", "a{2}", r"\b"]
)


@pytest.mark.parametrize("pattern", KNOWN)
@pytest.mark.parametrize("name", NAMES)
def test_known_expressions_match_as_with_re(pattern: str, name: str) -> None:
    assert Patience().fullmatch(pattern, name) == (re.fullmatch(pattern, name) is not None)
    assert Patience().match(pattern, name) == (re.match(pattern, name) is not None)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.lists(PARTS, max_size=6).map("".join), st.text("ab.", max_size=8))
def test_any_expression_matches_as_with_re(pattern: str, name: str) -> None:
    try:
        re.compile(pattern)
    except re.error:
        with pytest.raises(PatternError):
            check_pattern(pattern)
        return
    assert Patience().fullmatch(pattern, name) == (re.fullmatch(pattern, name) is not None)


def test_an_expression_that_takes_too_long_is_given_up_and_named() -> None:
    patience = Patience(0.05)
    with pytest.raises(PatternError, match="takes more than"):
        for length in range(20, 2000, 20):
            patience.fullmatch(r"(x+x+)+y", "x" * length)
            patience.fullmatch(r"(?:(a)|(.))*?\2\1(?:(a)|(.))*?\2\1z", "ab" * length)


def test_an_expression_that_python_itself_would_never_finish_is_not_given_to_a_host() -> None:
    with pytest.raises(PatternError, match="takes more than 3 s"):
        check_time(["(.*)*x"], ["a" * 40], 3)
    check_time(KNOWN, NAMES, 60)


def test_expressions_of_a_configuration_are_tried_before_peft_has_them() -> None:
    check_expressions({"target_modules": ["q_proj"], "rank_pattern": {}}, NAMES, "math")
    check_expressions({"target_modules": KNOWN[0], "rank_pattern": {"q_proj": 4}}, NAMES, "math")
    with pytest.raises(CheckpointError, match=r'"math": adapter_config\.json: .* is not a regular expression'):
        check_expressions({"alpha_pattern": {"(": 4}}, NAMES, "math")


def test_a_pattern_of_layers_means_what_it_means_to_re_and_comes_to_an_end() -> None:
    """PEFT takes the first group for the number of the layer, so that one in the pattern shifts it."""

    def chosen(pattern: str, **words: object) -> LoraOptions:
        config = {"peft_type": "LORA", "target_modules": ["q_proj"], "layers_to_transform": [0, 11], **words}
        return LoraOptions.parse({**config, "layers_pattern": pattern}, "math")

    assert [chosen("layers").is_target(name) for name in NAMES] == [True, False, False, False, True, False]
    assert not chosen("(layers|h)").is_target(NAMES[0])
    slow, endless = chosen(r"(?:(a)|(.))*?\2\1(?:(a)|(.))*?\2\1z"), {"layers_pattern": r"(.*)*x"}
    slow.patience.left = 0.05
    with pytest.raises(CheckpointError, match=r'"math": adapter_config.json: .* takes more than'):
        for length in range(20, 2000, 20):
            slow.is_target(f"{'ab' * length}z.x.q_proj")
    with pytest.raises(CheckpointError, match="is not a regular expression"):
        chosen("(")
    with pytest.raises(CheckpointError, match="takes more than"):
        check_expressions(endless, ["a" * 40], "math", 2)
