"""Every block of the README and of the guides runs on small models, in the order of its page.

A YAML block with a title is written to that file, commands run in this process, Python runs in one namespace per page,
and a block called "output" is what the block before it prints. ``text`` is what was measured at its own size: there the
commands are parsed. Links lead to files.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from commands.command_line import COMMANDS, tvbases
from tvbases_hf.cli import app
from tvbases_hf.methods.registry import METHODS
from tvbases_lm_eval import include_path
from zoo.hf_models import WORDS, fine_tunes, make_llama, read_state, save_state

ROOT = Path(__file__).parents[2]
GUIDES = ROOT / "examples" / "guides"
PAGES = {page.name: page for page in [ROOT / "README.md", *sorted(GUIDES.glob("*.md"))]}
BLOCK = re.compile(r'^```(\w*)(?: title="([^"\n]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
# What these pages name is on the Hub, and too large: their commands are parsed, their Python compiled.
OF_THE_HUB = {"images.md", "toxicity_llama.md"}
# Not ours, or tested in another place.
ELSEWHERE = ("pip ", "make ", "accelerate launch ")


@dataclass(frozen=True)
class Block:
    language: str
    title: str
    text: str


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    assert text.count("\n```") == 2 * len(BLOCK.findall(text)), "a fence that is not closed"
    return [Block(*found) for found in BLOCK.findall(text)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with all that the pages name: a Llama, fine-tunes, adapters, styles and data."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    place = tmp_path_factory.mktemp("guides")
    base = make_llama(place / "llama")
    names = ("math", "code", "chat", "law", "toxic")
    for name, state in zip(names, fine_tunes(read_state(base), len(names), seed=0), strict=True):
        save_state(place / name, state, base)
    for seed, (name, dora) in enumerate({"math": False, "code": False, "chat": False, "code-dora": True}.items()):
        torch.manual_seed(seed)
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], use_dora=dora, init_lora_weights=False)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        model.save_pretrained(str(place / (name if dora else f"{name}-lora")))
    words = [" ".join(WORDS[(7 * i + j) % 60] for j in range(6)) for i in range(4)]
    (place / "math.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in words), encoding="utf-8")
    for name in ("prose.txt", "toxic.txt"):
        (place / name).write_text(" ".join(words), encoding="utf-8")
    return place


def save_styles(place: Path) -> Any:
    """LoRAs for a small Flux, and the Flux."""
    pytest.importorskip("diffusers")
    from zoo.pipelines import FLUX_MODULES, flux_pipeline, style

    for seed, names in enumerate((("anime", "a"), ("pixel", "b"))):
        for name in names:
            save_file(style(seed, FLUX_MODULES), place / f"{name}.safetensors")
    return flux_pipeline()


def prepared(page: str, place: Path) -> dict[str, Any]:
    """The names that the Python of a page takes for given; what an earlier page has written."""
    from transformers import AutoTokenizer

    known: dict[str, Any] = {}
    if page in ("README.md", "styles.md", "style_families.md"):
        known["pipe"] = save_styles(place)
    if page == "adapters.md":
        tokenizer = AutoTokenizer.from_pretrained(place / "llama")
        known["batch"] = tokenizer(["word1", "word2", "word3"], return_tensors="pt")
    if page in ("forget.md", "python.md"):
        known["rows"] = dict.fromkeys(("math", "code", "chat", "law"), answered(place / "llama"))
    if page == "evaluate.md":
        shutil.copytree(place / "math", place / "merged")
        tasks = ["--task", f"math={place / 'math'}", "--task", f"code={place / 'code'}"]
        assert tvbases("compress", "--base", place / "llama", *tasks, "-m", 1, "--out", place / "basis").code == 0
    return known


def answered(base: Path) -> list[dict[str, str]]:
    """Rows that the base answers rightly, or there would be nothing to keep."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base)
    texts = ["word1 word2", "word7 word5", "word9 word3"]
    with torch.no_grad():
        best = [int(model(**tokenizer(text, return_tensors="pt")).logits[0, -1, 4:].argmax()) + 4 for text in texts]
    return [{"text": text, "label": tokenizer.decode([word])} for text, word in zip(texts, best, strict=True)]


@pytest.fixture
def registry() -> Iterator[None]:
    """A page may declare a method; the others do not know it."""
    before = dict(METHODS)
    yield
    METHODS._found = before


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("page", sorted(set(PAGES) - OF_THE_HUB))
def test_every_block_runs(page: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for entry in models.iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    names, variables, printed = prepared(page, tmp_path), dict[str, str](), ""
    monkeypatch.chdir(tmp_path)
    for block in blocks(PAGES[page]):
        match block.language:
            case "yaml" if block.title:
                (tmp_path / block.title).write_text(block.text, encoding="utf-8")
            case "bash":
                printed = "".join(map(run, commands(block.text, variables)))
            case "python":
                said = io.StringIO()
                with contextlib.redirect_stdout(said):
                    exec(compile(block.text, page, "exec"), names)
                printed = said.getvalue()
            case "text" if block.title == "output":
                assert printed == block.text
            case "text" | "json" | "":
                parse_all(block.text)
            case other:
                pytest.fail(f"nothing is known to do with a block of {other!r}")


@pytest.mark.parametrize("page", sorted(OF_THE_HUB))
def test_every_block_of_a_page_about_large_models_is_well_formed(page: str) -> None:
    variables: dict[str, str] = {}
    for block in blocks(PAGES[page]):
        if block.language == "bash":
            for command in commands(block.text, variables):
                parse(command)
        elif block.language == "python":
            ast.parse(block.text)
        else:
            parse_all(block.text)


def commands(text: str, known: dict[str, str]) -> list[str]:
    """One line each: continued ones joined, variables put in, which later blocks know too, comments left out."""
    found = []
    for line in re.sub(r" *\\\n +", " ", text).splitlines():
        if match := re.fullmatch(r'([A-Z]+)="?([^"]*)"?(?: +#.*)?', line):
            known[match[1]] = match[2]
        elif shlex.split(line, comments=True):
            found.append(Template(line.replace("$(", "$$(")).substitute(known))
    return found


def run(command: str) -> str:
    """What a command prints; of another program only what concerns us is looked at."""
    if command.startswith(ELSEWHERE):
        return ""
    program, *arguments = shlex.split(command, comments=True)
    if program == "python":
        assert (ROOT / arguments[0]).is_file()
        return ""
    if program == "lm_eval":
        said = (file.read_text(encoding="utf-8") for file in Path(include_path()).rglob("*.yaml"))
        known = {task for text in said for task in re.findall(r"^task: (\S+)$", text, re.MULTILINE)}
        assert set(arguments[arguments.index("--tasks") + 1].split(",")) <= known
        return ""
    assert program == "tvbases", command
    if arguments[0] == "app":  # it runs until it is ended
        parse(command)
        return ""
    done = tvbases(*arguments)
    helpless = done.code == 2 and arguments[0] == "tune" and "do not merge these" in done.err
    assert done.code == 0 or helpless, f"{command}\n{done.err}"
    return done.out


def parse(command: str) -> None:
    if not command.startswith("tvbases "):
        return
    name, *arguments = shlex.split(command, comments=True)[1:]
    COMMANDS(app).commands[name].make_context(name, arguments)  # type: ignore[attr-defined]


def parse_all(text: str) -> None:
    """The commands that stand in what was printed; a placeholder is no argument."""
    for command in re.findall(r"^\$ (tvbases .*)$", re.sub(r" *\\\n +", " ", text), re.MULTILINE):
        parse(command.removesuffix(" ..."))


@pytest.mark.parametrize("page", sorted(PAGES))
def test_links_lead_to_files(page: str) -> None:
    here = PAGES[page]
    for target in re.findall(r"\]\(([^)\s]+)\)", here.read_text(encoding="utf-8")):
        file, _, anchor = target.partition("#")
        if file and "://" not in file:
            assert (here.parent / file).exists(), target
        elif anchor and not file:
            assert f"\n## {anchor.replace('-', ' ').capitalize()}\n" in here.read_text(encoding="utf-8"), target


def test_the_readme_is_short_and_names_every_guide() -> None:
    text = PAGES["README.md"].read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    inside = {"toxicity_llama.md", "style_families.md"}  # linked by the guides themselves
    assert all(f"guides/{page})" in text for page in set(PAGES) - inside - {"README.md"})


def test_the_python_of_the_guide_to_images_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from zoo.answering import make, save_folder

    base = make("clip", tmp_path / "clip" / "base")
    for state, task in zip(fine_tunes(read_state(base), 3, seed=0), ("turned", "inverted", "mirrored"), strict=True):
        save_state(tmp_path / "clip" / task, state, base)
        save_folder(tmp_path / "digits" / task / "train")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    python: Callable[[str], None] = lambda text: exec(compile(text, "images.md", "exec"), names)  # noqa: E731
    for block in blocks(PAGES["images.md"]):
        if block.language == "python":
            python(block.text)
    assert (tmp_path / "regmean" / "model.safetensors").is_file()
