"""What a page quotes of models that train for minutes is worded as the commands word it today.

The commands run on small models of the same names; every word that the page quotes must be printed. Numbers, which are
those of the trained models, count as one word.
"""

from __future__ import annotations

import re
import runpy
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from commands.command_line import tvbases
from zoo.hf_models import fine_tunes, make_llama, read_state, save_state

ROOT = Path(__file__).parents[2]
QUOTED = re.compile(r"^```text\n(\$ tvbases .*?)^```$", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"-?\d[\d.,]*(?:%| [kMG]?B\b)?")
SAME_START = "same"


def words(text: str) -> Counter[str]:
    """Left out are frames, semicolons and what width and digits decide: spaces, numbers, where a line ends."""
    return Counter(NUMBER.sub("#", re.sub(r"[\u2500-\u257f;]", " ", text)).split())


def quotations(page: str) -> list[tuple[list[str], str]]:
    """Commands and what is printed below each, in the order of the page."""
    text = "".join(QUOTED.findall((ROOT / "examples" / "guides" / page).read_text(encoding="utf-8")))
    found = re.findall(r"^\$ tvbases (.*)\n((?:(?!\$ ).*\n)*)", re.sub(r" *\\\n +", " ", text), re.MULTILINE)
    return [(command.split(), printed) for command, printed in found]


def check(command: list[str], quoted: str, printed: str) -> None:
    missing = words(quoted) - words(printed)
    assert not missing, f"{' '.join(command)}\nquoted, not printed: {sorted(missing)}\n{printed}"


def trained_apart(place: Path) -> None:
    """The demo's base and eight fine-tunes, by name."""
    base = make_llama(place / "base")
    names = ("tense", "voice", "number", "negation", "certainty", "question", "sentiment", "quantity")
    for name, state in zip(names, fine_tunes(read_state(base), len(names), seed=0, shared=0.0), strict=True):
        save_state(place / name, state, base)


def trained_from_one_seed(place: Path) -> None:
    """Rank-8 LoRAs that share their A matrices, nearly."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = make_llama(place / "base")
    for seed, name in enumerate(("tense", "negation", "question", "sentiment")):
        torch.manual_seed(0)
        config = LoraConfig(r=8, target_modules=["q_proj", "v_proj"])
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        torch.manual_seed(seed)
        for parameter_name, weight in model.named_parameters():
            if "lora_" in parameter_name:
                weight.data += (0.01 if "lora_A" in parameter_name else 0.1) * torch.randn_like(weight)
        model.save_pretrained(str(place / SAME_START / name))


def trained_on_digits(place: Path) -> None:
    """The ViT, the images and the YAML of the example, whose commands are those of the page."""
    example = runpy.run_path(str(ROOT / "examples" / "image_digits.py"))
    directory, images = Path("vit"), Path("digits")
    example["save_images"](place / images, 60)
    example["make_vit"](place / directory / "base")
    base = place / directory / "base"
    for task, state in zip(example["TASKS"], fine_tunes(read_state(base), 3, seed=0, shared=0.1), strict=True):
        save_state(place / directory / task, state, base)
    asked = [command for command, _ in quotations("images.md")]
    assert list(example["commands"](directory, images)) == asked


@pytest.mark.parametrize(
    ("page", "make"),
    [("online.md", trained_apart), ("adapters.md", trained_from_one_seed), ("images.md", trained_on_digits)],
)
def test_what_a_page_quotes_is_what_is_printed(
    page: str, make: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path)
    quoted = quotations(page)
    assert quoted
    for command, printed in quoted:
        done = tvbases(*command)
        assert done.code == 0, done.err
        check(command, printed, done.out)


def test_a_word_that_is_not_printed_is_found() -> None:
    with pytest.raises(AssertionError, match="restored"):
        check(["inspect"], "┃ task ┃ restored 12.3% ┃\n", "┃ task ┃ 9.1% ┃\n")
    check(["inspect"], "skills: 4 vectors, 363 MB", "skills: 4 vectors,\n 10 kB")
