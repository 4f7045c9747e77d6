"""What a merged model gets of its fine-tunes: tokens, chat template and settings, where all of them agree."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from commands.command_line import refused, tvbases
from tvbases_hf import Vectors
from tvbases_hf.models.travel import beside
from tvbases_hf.storage.tokens import tokens_of
from zoo.models import CONFIG, random_state, save_checkpoint, tune

ROWS = 50
Files = Mapping[str, Any]


def words(count: int, *more: str) -> dict[str, Any]:
    """A tokenizer.json of ``count`` words and some that were added."""
    vocabulary = {f"w{row}": row for row in range(count)}
    added = [{"id": count + row, "content": token} for row, token in enumerate(more)]
    return {"model": {"vocab": vocabulary}, "added_tokens": added}


TOKENIZER = {"tokenizer.json": words(46), "tokenizer_config.json": {"eos_token": "</s>"}}
TUNED = {
    "tokenizer.json": words(46, "<|im_end|>"),
    "tokenizer_config.json": {"eos_token": "<|im_end|>"},
    "chat_template.jinja": "{{ messages }}",
    "generation_config.json": {"eos_token_id": 46},
    "config.json": {**CONFIG, "eos_token_id": 46},
}


def make(directory: Path, name: str, files: Files, seed: int = 0, rows: int = ROWS) -> Path:
    state = random_state(0) if seed == 0 else tune(random_state(0), seed)
    for matrix in ("model.embed_tokens.weight", "lm_head.weight"):
        more = torch.full((max(0, rows - ROWS), 16), float(seed + 1))
        state[matrix] = torch.cat([state[matrix][:rows], more])
    path = save_checkpoint(directory / name, state, config={**CONFIG, "vocab_size": rows, "eos_token_id": 2})
    for file, content in files.items():
        (path / file).parent.mkdir(exist_ok=True)
        (path / file).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def merged(directory: Path, base: Files, *tuned: Files) -> tuple[dict[str, bytes], str]:
    """What lies beside the merged weights, and the notes."""
    home = make(directory, "base", base)
    tasks = {f"t{i}": make(directory, f"t{i}", files, i + 1) for i, files in enumerate(tuned)}
    vectors = Vectors.open(home, tasks)
    found = beside(vectors.base, vectors.models)
    read = {name: file if isinstance(file, bytes) else file.read_bytes() for name, file in found.files.items()}
    return read, "; ".join(found.notes)


def test_what_the_fine_tunes_agree_on_is_taken(tmp_path: Path) -> None:
    files, notes = merged(tmp_path, TOKENIZER, TUNED, TUNED)
    assert json.loads(files["tokenizer_config.json"])["eos_token"] == "<|im_end|>"
    assert tokens_of(files)["<|im_end|>"] == 46
    assert files["chat_template.jinja"] == b"{{ messages }}"
    assert json.loads(files["generation_config.json"])["eos_token_id"] == 46
    assert json.loads(files["config.json"])["eos_token_id"] == 46
    assert json.loads(files["config.json"])["vocab_size"] == ROWS
    assert notes == (
        "as in the fine-tunes, and not as in the base: tokenizer, chat template, generation settings, token ids"
    )


def test_where_they_do_not_agree_the_bases_stay_and_are_named(tmp_path: Path) -> None:
    other = {**TUNED, "tokenizer_config.json": {"eos_token": "<|end|>"}, "chat_template.jinja": "{{ other }}"}
    files, notes = merged(tmp_path, TOKENIZER, TUNED, other)
    assert json.loads(files["tokenizer_config.json"])["eos_token"] == "</s>"
    assert "chat_template.jinja" not in files
    assert json.loads(files["config.json"])["eos_token_id"] == 46
    assert "do not agree: tokenizer (t0, t1), chat template (t0, t1)" in notes


def test_one_fine_tune_that_is_as_the_base_is_no_agreement(tmp_path: Path) -> None:
    files, notes = merged(tmp_path, TOKENIZER, TUNED, TOKENIZER)
    assert json.loads(files["tokenizer_config.json"])["eos_token"] == "</s>"
    kinds = ("tokenizer", "chat template", "generation settings", "token ids")
    assert notes.endswith("do not agree: " + ", ".join(f"{kind} (t0)" for kind in kinds))
    assert "as in the fine-tunes" not in notes


def test_models_without_such_files_say_nothing(tmp_path: Path) -> None:
    silent = {"config.json": TUNED["config.json"]}
    files, notes = merged(tmp_path, TOKENIZER, TUNED, silent)
    assert files["chat_template.jinja"] == b"{{ messages }}" and "do not agree" not in notes
    files, notes = merged(tmp_path / "silent", TOKENIZER, {}, {})
    assert json.loads(files["tokenizer_config.json"]) == TOKENIZER["tokenizer_config.json"] and not notes


def test_savings_of_one_tokenizer_agree(tmp_path: Path) -> None:
    """What differs with the version and the trainer does not say how text becomes tokens."""
    padded = {**words(46, "<|im_end|>"), "padding": {"length": 8}}
    saved = {"transformers_version": "5.1", "padding_side": "left", "eos_token": "<|im_end|>"}
    again = {**TUNED, "tokenizer.json": padded, "tokenizer_config.json": saved}
    files, notes = merged(tmp_path, TOKENIZER, TUNED, again)
    assert tokens_of(files)["<|im_end|>"] == 46 and "do not agree" not in notes


@pytest.mark.parametrize("kept", [None, "{{ base }}"])
def test_a_template_within_the_configuration_is_taken_alone(kept: str | None, tmp_path: Path) -> None:
    """The tokenizers differ, their template is the same: written here in one file, there in another."""
    base = {**TOKENIZER, **({"chat_template.jinja": kept} if kept else {})}
    inside = {"eos_token": "<|end|>", "chat_template": "{{ messages }}"}
    other = {**TOKENIZER, "tokenizer_config.json": inside}
    files, _ = merged(tmp_path, base, other, TUNED)
    config = json.loads(files["tokenizer_config.json"])
    assert config == {"eos_token": "</s>", "chat_template": "{{ messages }}"} and "chat_template.jinja" not in files


def test_additional_templates_travel(tmp_path: Path) -> None:
    more = {**TUNED, "additional_chat_templates/tool_use.jinja": "{{ tools }}"}
    files, _ = merged(tmp_path, TOKENIZER, more, more)
    assert files["additional_chat_templates/tool_use.jinja"] == b"{{ tools }}"


def test_a_tokenizer_with_tokens_that_have_no_row_is_not_taken(tmp_path: Path) -> None:
    long = {"tokenizer.json": words(ROWS, "<|extra|>")}
    files, notes = merged(tmp_path, TOKENIZER, long, long)
    assert "<|extra|>" not in tokens_of(files) and "tokenizer (t0, t1)" in notes


def test_a_link_of_a_fine_tune_is_refused_only_where_it_would_be_taken(tmp_path: Path) -> None:
    secret = tmp_path / "secret.jinja"
    secret.write_text("{{ secret }}", encoding="utf-8")
    base = make(tmp_path, "base", TOKENIZER)
    tasks = {name: make(tmp_path, name, TOKENIZER, seed + 1) for seed, name in enumerate("ab")}
    (tasks["a"] / "chat_template.jinja").symlink_to(secret)
    vectors = Vectors.open(base, tasks)
    assert "chat_template.jinja" not in beside(vectors.base, vectors.models).files
    (tasks["b"] / "chat_template.jinja").symlink_to(secret)
    options = [f"--task={name}={path}" for name, path in tasks.items()]
    message = refused(tmp_path, "decompose", "--base", base, *options, "--out", tmp_path / "out")
    assert "chat_template.jinja is a link to" in message


def test_a_negated_model_is_the_base_with_the_files_of_the_base(tmp_path: Path) -> None:
    base, tuned = make(tmp_path, "base", TOKENIZER), make(tmp_path, "a", TUNED, 1)
    out = tmp_path / "out"
    options = ("--forget", "a", "--alpha", "0.5", "--out", out)
    assert tvbases("negate", "--base", base, "--task", f"a={tuned}", *options).code == 0
    assert not (out / "chat_template.jinja").exists()
    assert json.loads((out / "config.json").read_text()) == json.loads((base / "config.json").read_text())


@pytest.mark.parametrize(
    ("extra_rows", "rows", "base_rows", "tokenizer"),
    [("keep", 56, 50, "a"), ("drop", 50, 50, "base"), ("keep", 56, 56, "base"), ("drop", 50, 56, "a")],
)
def test_the_tokenizer_and_the_configuration_are_of_the_rows_written(
    extra_rows: Any, rows: int, base_rows: int, tokenizer: str, tmp_path: Path
) -> None:
    """The model with more rows has a token for each of them; ``b`` is as short as the shorter one."""
    size = {"base": base_rows, "a": 106 - base_rows, "b": 50}
    paths = {
        name: make(tmp_path, name, {"tokenizer.json": {**words(own), "of": name}}, seed, own)
        for seed, (name, own) in enumerate(size.items())
    }
    vectors = Vectors.open(paths.pop("base"), paths, extra_rows=extra_rows)
    found = beside(vectors.base, vectors.models).files
    assert json.loads((tmp_path / tokenizer / "tokenizer.json").read_text())["model"]["vocab"] == tokens_of(found)
    config = found["config.json"]
    text = config.decode() if isinstance(config, bytes) else config.read_text()
    assert json.loads(text)["vocab_size"] == rows == vectors.base.tensors["lm_head.weight"].shape[0]


def test_rows_that_are_other_tokens_in_two_models_are_refused(tmp_path: Path) -> None:
    base = make(tmp_path, "base", {"tokenizer.json": words(ROWS)})
    tasks = {
        name: make(tmp_path, name, {"tokenizer.json": words(ROWS, f"<|{name}|>")}, seed + 1, ROWS + 1)
        for seed, name in enumerate("ab")
    }
    options = [f"--task={name}={path}" for name, path in tasks.items()]
    message = refused(
        tmp_path, "decompose", "--base", base, *options, "--out", tmp_path / "out", "--extra-rows", "keep"
    )
    assert "row 50" in message and "'<|a|>'" in message and "tokenizer_source: union" in message
    assert Vectors.open(base, tasks, extra_rows="drop").base.tensors["lm_head.weight"].shape[0] == ROWS


def test_secrets_and_checkpoints_beside_the_weights_stay_where_they_are(tmp_path: Path) -> None:
    base = make(tmp_path, "base", {**TOKENIZER, "id_rsa": "key", "model.ckpt": "x" * 1000, "notes.txt": "x"})
    tuned = make(tmp_path, "a", TOKENIZER, 1)
    assert tvbases("decompose", "--base", base, "--task", f"a={tuned}", "--out", tmp_path / "out").code == 0
    assert {file.name for file in (tmp_path / "out" / "shared").iterdir()} == {
        "README.md",
        "config.json",
        "model.safetensors",
        *TOKENIZER,
    }
    shutil.rmtree(tmp_path / "out")
    (base / "tokenizer.json").unlink()
    (base / "tokenizer.json").symlink_to("/etc/passwd")
    message = refused(tmp_path, "decompose", "--base", base, "--task", f"a={tuned}", "--out", tmp_path / "out")
    assert "tokenizer.json is a link to /etc/passwd" in message
