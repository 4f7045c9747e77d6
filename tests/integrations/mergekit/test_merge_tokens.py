"""Models with other tokens than their base: rows by number with --extra-rows, by name with a tokenizer in the YAML."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from commands.command_line import refused, tvbases
from oracles.matrices import EPS
from oracles.merge_oracle import run_ours, run_stock, write_config
from tvbases_hf.errors import MismatchError
from tvbases_hf.storage.tokens import tokens_of
from zoo.adapter_zoo import run_native
from zoo.hf_models import VOCABULARY, WORDS, Family, State, read_state, save_state, save_tokenizer

pytest_plugins = ["zoo.hf_fixtures"]

MATRICES = ("model.embed_tokens.weight", "lm_head.weight")
ROWS, MORE = VOCABULARY, 72
NEW = [f"new{i}" for i in range(MORE - ROWS)]
WEIGHTS = (0.75, 0.5)


@pytest.fixture(scope="module")
def grown(llama: Family, tmp_path_factory: pytest.TempPathFactory) -> Family:
    """A base of 64 rows, a fine-tune of 64 and one of 72, whose new tokens are the last."""
    root = tmp_path_factory.mktemp("grown")
    tasks = {name: shutil.copytree(llama.tasks[name], root / name) for name in ("math", "code")}
    resize(tasks["code"], lambda rows: torch.cat([rows, torch.randn(len(NEW), rows.shape[1])]), [*WORDS, *NEW])
    return Family(Path(shutil.copytree(llama.base, root / "base")), tasks)


@pytest.fixture(scope="module")
def moved(llama: Family, tmp_path_factory: pytest.TempPathFactory) -> Family:
    """Both fine-tunes have new tokens, one in front of the others: they share one of them, and the base has none."""
    root = tmp_path_factory.mktemp("moved")
    tasks = {name: shutil.copytree(llama.tasks[name], root / name) for name in ("math", "code")}
    front = lambda rows: torch.cat([rows[:4], torch.randn(2, rows.shape[1]), rows[4:]])  # noqa: E731
    resize(tasks["math"], front, ["both", "first", *WORDS])
    resize(tasks["code"], lambda rows: torch.cat([rows, torch.randn(2, rows.shape[1])]), [*WORDS, "both", "second"])
    return Family(Path(shutil.copytree(llama.base, root / "base")), tasks)


def resize(model: Path, change: Any, words: list[str]) -> None:
    torch.manual_seed(len(words))
    state = read_state(model)
    save_state(model, state | {name: change(state[name]) for name in MATRICES}, model)
    save_tokenizer(model, words)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"vocab_size": len(words) + 4}))


def config(place: Family, **more: Any) -> dict[str, Any]:
    models = [
        {"model": str(path), "parameters": {"weight": weight}}
        for path, weight in zip(place.tasks.values(), WEIGHTS, strict=True)
    ]
    return {
        "merge_method": "task_arithmetic",
        "base_model": str(place.base),
        "models": models,
        "dtype": "float32",
        **more,
    }


def close(found: Tensor, expected: Tensor) -> bool:
    return bool(((found.double() - expected).abs() <= 8 * EPS * (1 + expected.abs())).all())


@pytest.mark.parametrize("extra_rows", ["drop", "keep"])
def test_extra_rows_are_what_a_dense_computation_gives(extra_rows: str, grown: Family, tmp_path: Path) -> None:
    run_native(config(grown), tmp_path / "out", "--extra-rows", extra_rows)
    merged, base = read_state(tmp_path / "out"), read_state(grown.base)
    math, code = (read_state(path) for path in grown.tasks.values())
    for name, tensor in base.items():
        origin, rows = tensor.double(), len(tensor)
        expected = origin + WEIGHTS[0] * (math[name].double() - origin) + WEIGHTS[1] * (code[name][:rows] - origin)
        if extra_rows == "keep" and name in MATRICES:
            expected = torch.cat([expected, code[name][rows:].double()])
        assert merged[name].shape == expected.shape and close(merged[name], expected)
    loads(tmp_path / "out", MORE if extra_rows == "keep" else ROWS)


def loads(out: Path, rows: int) -> None:
    """transformers finds every weight in its place, and a row for every token."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded: Any = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    model, found = loaded
    assert not any(found.values()), found
    assert model.config.vocab_size == rows == model.get_input_embeddings().weight.shape[0]
    assert max(AutoTokenizer.from_pretrained(out).get_vocab().values()) < rows


def test_a_killed_merge_does_not_go_on_with_other_rows(grown: Family, tmp_path: Path) -> None:
    """What decides the output is part of the job."""
    from tvbases_hf import Vectors
    from tvbases_hf.merging.merge import Merge

    jobs = []
    for extra_rows in ("drop", "keep"):
        vectors = Vectors.open(grown.base, grown.tasks, extra_rows=extra_rows)
        jobs.append(Merge(vectors, lambda n, d: d[0], vectors.names, "m", "").job(None))
    assert jobs[0] != jobs[1]


@pytest.mark.parametrize("command", ["compress", "negate", "online"])
def test_what_is_a_change_of_the_base_keeps_its_rows(command: str, grown: Family, tmp_path: Path) -> None:
    tasks = [f"--task={name}={path}" for name, path in grown.tasks.items()]
    more = {"compress": [], "negate": ["--forget=code", "--alpha=0.5"], "online": ["--num-bases=2"]}[command]
    words = [command, "--base", grown.base, *tasks, "--out", tmp_path / "out", *more]
    assert "--extra-rows drop" in refused(tmp_path, *words)
    assert "rows of" in refused(tmp_path, *words, "--extra-rows", "keep")
    assert tvbases(*words, "--extra-rows", "drop").code == 0
    if command == "negate":
        merged, base = read_state(tmp_path / "out"), read_state(grown.base)
        code = read_state(grown.tasks["code"])
        for name, tensor in base.items():
            origin = tensor.double()
            assert close(merged[name], origin - 0.5 * (code[name][: len(tensor)] - origin))


SOURCES: dict[str, dict[str, Any]] = {
    "base": {"tokenizer_source": "base"},
    "union": {"tokenizer_source": "union"},
    "model": {"tokenizer_source": "MATH"},
    "parts": {
        "tokenizer": {
            "source": "union",
            "pad_to_multiple_of": 16,
            "tokens": {
                "second": {"source": "CODE", "force": True},
                "added": {"source": {"kind": "model_token", "model": "CODE", "token": "word7"}},
                "none": {"source": {"kind": "zero"}},
            },
        }
    },
}


def named(setting: Any, place: Family) -> Any:
    """The setting with the models' paths."""
    if isinstance(setting, dict):
        return {key: named(value, place) for key, value in setting.items()}
    return str(place.tasks[setting.lower()]) if setting in ("MATH", "CODE") else setting


def by_token(out: Path) -> tuple[dict[str, int], State]:
    return tokens_of({"tokenizer.json": out / "tokenizer.json"}), read_state(out)


@pytest.mark.parametrize("method", ["task_arithmetic", "linear"])
@pytest.mark.parametrize("source", sorted(SOURCES))
def test_rows_are_matched_by_token_as_mergekit_does(source: str, method: str, moved: Family, tmp_path: Path) -> None:
    """Token by token the same numbers as mergekit's own, whose order of the tokens depends on the process."""
    whole = config(moved, merge_method=method, **named(SOURCES[source], moved))
    if method == "linear":
        whole["models"].append({"model": str(moved.base), "parameters": {"weight": 0.25}})
    run_native(whole, tmp_path / "ours")
    run_stock(whole, tmp_path / "theirs")
    (ours, merged), (theirs, expected) = by_token(tmp_path / "ours"), by_token(tmp_path / "theirs")
    assert ours.keys() == theirs.keys() and merged.keys() == expected.keys()
    for name, tensor in expected.items():
        assert merged[name].shape == tensor.shape
        if name not in MATRICES:
            assert close(merged[name], tensor.double())
            continue
        for token, row in theirs.items():
            assert close(merged[name][ours[token]], tensor[row].double()), token
        padding = slice(len(theirs), None)
        assert close(merged[name][padding], tensor[padding].double())
    loads(tmp_path / "ours", len(expected["lm_head.weight"]))


def test_a_union_is_made_in_the_same_order_every_time(moved: Family, tmp_path: Path) -> None:
    whole = config(moved, tokenizer_source="union")
    run_native(whole, tmp_path / "a")
    assert list(by_token(tmp_path / "a")[0])[-3:] == ["both", "first", "second"]
    run_ours(whole, tmp_path / "b")
    (ours, merged), (theirs, other) = by_token(tmp_path / "a"), by_token(tmp_path / "b")
    assert ours == theirs and all(close(merged[name], other[name].double()) for name in other)


def test_our_methods_see_the_same_rows_in_both_commands(moved: Family, tmp_path: Path) -> None:
    """Bases of whole models: the Gram matrix too is that of the rows matched by token."""
    whole = config(moved, merge_method="ae_bases", tokenizer_source="union", parameters={"num_bases": 1})
    run_native(whole, tmp_path / "a")
    run_ours(whole, tmp_path / "b")
    merged, other = read_state(tmp_path / "a"), read_state(tmp_path / "b")
    assert all(close(merged[name], other[name].double()) for name in other)


def test_rows_that_mergekit_cuts_count_in_the_gram_matrix(grown: Family, tmp_path: Path) -> None:
    """The common ones, as with --extra-rows drop; they were left out, and the bases were those of other models."""
    whole = config(grown, merge_method="ae_bases", parameters={"num_bases": 1, "balance": False})
    run_native(whole, tmp_path / "a", "--extra-rows", "drop")
    other = run_ours(whole, tmp_path / "b", "--unsafe-truncate-embeddings")
    merged = read_state(tmp_path / "a")
    assert merged.keys() == other.keys() and len(merged[MATRICES[0]]) == ROWS
    assert all(close(merged[name], other[name].double()) for name in other)


def test_what_plain_mergekit_does_to_rows_is_not_guessed(moved: Family, tmp_path: Path) -> None:
    whole = config(moved, merge_method="ae_bases", tokenizer_source="union", parameters={"num_bases": 1})
    with pytest.raises(MismatchError, match=r"2 tensors differ in shape.*lm_head.weight.*`tvbases mergekit-yaml`"):
        run_stock(whole, tmp_path / "out")


def test_token_ids_follow_the_tokenizer(moved: Family, tmp_path: Path) -> None:
    """A tokenizer that numbers the end of a text otherwise than the base."""
    own = tmp_path / "own"
    shutil.copytree(moved.tasks["math"], own)
    tokenizer = json.loads((own / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] |= {"</s>": 3, "<pad>": 2}
    for token in tokenizer["added_tokens"]:
        token["id"] = tokenizer["model"]["vocab"][token["content"]]
    (own / "tokenizer.json").write_text(json.dumps(tokenizer))
    place = Family(moved.base, {"own": own, "code": moved.tasks["code"]})
    assert json.loads((moved.base / "config.json").read_text())["eos_token_id"] == 2
    run_native(config(place, tokenizer_source=str(own)), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == 3


TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.mark.parametrize(("asked", "expected"), [("auto", TEMPLATE), ("chatml", "<|im_start|>"), (TEMPLATE, TEMPLATE)])
@pytest.mark.parametrize("more", [{}, {"tokenizer_source": "union"}], ids=["alone", "with tokens"])
def test_the_chat_template_of_the_yaml_is_written(
    asked: str, expected: str, more: Mapping[str, Any], llama: Family, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    tasks = {name: shutil.copytree(llama.tasks[name], tmp_path / name) for name in ("math", "code")}
    for task, text in zip(tasks, (TEMPLATE, TEMPLATE), strict=True):
        (tasks[task] / "chat_template.jinja").write_text(text)
    run_native(config(Family(llama.base, tasks), chat_template=asked, **more), tmp_path / "out")
    assert expected in AutoTokenizer.from_pretrained(tmp_path / "out").chat_template


def test_tokens_and_template_that_the_fine_tunes_agree_on_are_written(llama: Family, tmp_path: Path) -> None:
    """A base without a chat template; fine-tunes with one, a token in an unused row, and their own end of a text."""
    base = Path(shutil.copytree(llama.base, tmp_path / "base"))
    tasks = {name: Path(shutil.copytree(llama.tasks[name], tmp_path / name)) for name in ("math", "code")}
    for model in (base, *tasks.values()):
        save_tokenizer(model, WORDS[:-1])
    for model in tasks.values():
        save_tokenizer(model, [*WORDS[:-1], "<|im_end|>"])
        settings = json.loads((model / "tokenizer_config.json").read_text()) | {"eos_token": "<|im_end|>"}
        (model / "tokenizer_config.json").write_text(json.dumps(settings))
        (model / "chat_template.jinja").write_text(TEMPLATE)
        (model / "config.json").write_text((model / "config.json").read_text().replace('_id": 2', '_id": 63'))
    file = write_config(tmp_path / "merge.yml", config(Family(base, tasks)))
    outcome = tvbases("merge", file, tmp_path / "out")
    assert "as in the fine-tunes, and not as in the base: tokenizer, chat template, token ids" in outcome.err
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (tokenizer.eos_token, tokenizer.eos_token_id, tokenizer.chat_template) == ("<|im_end|>", 63, TEMPLATE)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == 63
    loads(tmp_path / "out", VOCABULARY)
    assert not tvbases("merge", file, tmp_path / "out").code  # the folder is known as a merge, and replaced


MISTAKES: dict[str, tuple[dict[str, Any], list[str], list[str]]] = {
    "both": ({"tokenizer_source": "union"}, ["--extra-rows", "keep"], ["leave --extra-rows out"]),
    "an adapter out": ({"tokenizer_source": "union"}, ["--adapter"], ["tokenizer_source is of a whole model"]),
    "an unknown token": (
        {"tokenizer": {"tokens": {"x": {"source": {"kind": "model_token", "model": "CODE", "token": "no"}}}}},
        [],
        ["cannot match the rows", "'no'"],
    ),
}


@pytest.mark.parametrize("mistake", sorted(MISTAKES))
def test_what_cannot_be_matched_is_refused(mistake: str, moved: Family, tmp_path: Path) -> None:
    more, options, words = MISTAKES[mistake]
    file = write_config(tmp_path / "merge.yml", config(moved, **named(more, moved)))
    message = refused(tmp_path, "merge", file, tmp_path / "out", "--quiet", *options)
    assert all(word in message for word in words), message
