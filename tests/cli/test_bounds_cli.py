"""``tvbases inspect --bounds``: data from files, what is printed, and every refusal."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from commands.command_line import refused, tvbases
from tvbases_hf.errors import ParameterError
from tvbases_hf.learning.batches import Columns
from tvbases_hf.learning.rows import read_rows
from tvbases_hf.learning.taskfiles import TaskModel
from tvbases_hf.storage.checkpoint import Checkpoint
from zoo.hf_models import VOCABULARY, WORDS, Family, make_family, make_llama, save_tokenizer

pytest_plugins = ["zoo.hf_fixtures"]


def make_classifier(directory: Path) -> Path:
    from transformers import BertConfig, BertForSequenceClassification

    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    torch.manual_seed(0)
    config = BertConfig(vocab_size=VOCABULARY, max_position_embeddings=64, id2label={0: "good", 1: "bad"}, **sizes)
    BertForSequenceClassification(config).save_pretrained(directory)
    save_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory: pytest.TempPathFactory) -> Family:
    root = tmp_path_factory.mktemp("classifiers")
    return make_family(root, make_classifier(root / "origin"), ["sst", "nli", "qa"], seed=1)


def write_rows(file: Path, count: int = 6) -> Path:
    rows = [{"text": " ".join(WORDS[i : i + 4]), "label": i % 2} for i in range(count)]
    file.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return file


def arguments(family: Family) -> list[object]:
    return ["inspect", "--base", family.base, *(f"--task={task}={path}" for task, path in family.tasks.items())]


def test_both_sides_of_every_theorem_are_printed_and_written(classifiers: Family, tmp_path: Path) -> None:
    file, report = write_rows(tmp_path / "a.jsonl"), tmp_path / "report.json"
    data = [f"--data={task}={file}" for task in ("sst", "qa")]
    done = tvbases(*arguments(classifiers), "--bounds", *data, "-m", 2, "--json", report)
    assert done.code == 0, done.err
    for part in ("C = ", "eps = ", "Theorem 3.5", "Theorem 3.6", "Theorem 3.7", "measured", "bound"):
        assert part in done.out
    found = json.loads(report.read_text())["bounds"]
    assert [c["task"] for c in found["curvatures"]] == ["sst", "qa"]
    assert {s["task"] for s in found["sides"]} == {"sst", "qa"} and len(found["sides"]) == 14
    assert all(math.isfinite(s["measured"]) and s["bound"] > 0 for s in found["sides"])
    assert all(s["holds"] or s["broken"] for s in found["sides"])


def test_a_language_model_needs_text_only(llama: Family, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("sentence\nword1 word2 word3\nword4 word5\n")
    done = tvbases(
        *arguments(llama), "--bounds", f"--data=math={tmp_path / 'a.csv'}", "--text-column", "sentence", "-m", 2
    )
    assert done.code == 0, done.err
    assert "Theorem 3.5" in done.out


def test_the_loss_on_a_file_is_transformers_own(classifiers: Family, llama: Family, tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"word1 word2 word{n}"}) + "\n" for n in range(5)))
    for family, file in ((classifiers, write_rows(tmp_path / "a.jsonl", 5)), (llama, texts)):
        loaded = TaskModel.load(Checkpoint.open(family.base))
        data = loaded.data("t", str(file), Columns(batch_size=5))
        (batch,) = data.batches
        own = loaded.model(**batch).loss
        assert torch.allclose(data.loss(loaded.model, batch), own, rtol=1e-6)
        assert len(loaded.data("t", str(file), Columns(max_rows=3, batch_size=1)).batches) == 3  # type: ignore[arg-type]


def test_padding_of_a_language_model_does_not_count(llama: Family, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"text": "word1 word2 word3 word4"}, {"text": "word5"}]))
    loaded = TaskModel.load(Checkpoint.open(llama.base))
    (batch,) = loaded.data("t", str(tmp_path / "a.json")).batches
    assert (batch["labels"] == -100).sum() == 3


def test_labels_are_numbers_or_the_models_names(classifiers: Family, tmp_path: Path) -> None:
    loaded = TaskModel.load(Checkpoint.open(classifiers.base))
    (tmp_path / "a.csv").write_text("text,label\nword1,bad\nword2,0\nword3,good\n")
    (batch,) = loaded.data("t", str(tmp_path / "a.csv")).batches
    assert batch["labels"].tolist() == [1, 0, 0]
    for bad in ("ugly", "2", "-1", ""):
        (tmp_path / "b.csv").write_text(f"text,label\nword1,0\nword2,{bad}\n")
        with pytest.raises(ParameterError, match=rf'"t", row 2: \'{bad}\' is not a label .* 0 to 1 \(good, bad\)'):
            loaded.data("t", str(tmp_path / "b.csv"))


def test_a_tokenizer_without_padding_gets_one(llama: Family, tmp_path: Path) -> None:
    loaded = TaskModel.load(Checkpoint.open(llama.base))
    loaded.tokenizer.pad_token = None
    (tmp_path / "a.json").write_text(json.dumps([{"text": "word1 word2"}, {"text": "word3"}]))
    batches = list(loaded.data("t", str(tmp_path / "a.json")).batches)
    assert len(batches) == 1 and loaded.tokenizer.pad_token == loaded.tokenizer.eos_token


def test_data_that_cannot_be_read_is_refused(classifiers: Family, tmp_path: Path) -> None:
    good = write_rows(tmp_path / "a.jsonl")
    (tmp_path / "torn.jsonl").write_text('{"text": "a", "label": 0}\n{"text": ')
    (tmp_path / "list.jsonl").write_text("[1]\n")
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "other.csv").write_text("sentence,label\na,0\n")
    (tmp_path / "unlabelled.jsonl").write_text('{"text": "a", "label": 0}\n{"text": "b"}\n')
    (tmp_path / "notes.txt").write_text("a")
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe\xfa")
    for source, reason in (
        ("absent.jsonl", 'the data of "sst": there is no file'),
        ("torn.jsonl", "line 2 is not JSON"),
        ("list.jsonl", "does not hold one JSON object per row"),
        ("empty.jsonl", "has no row"),
        ("other.csv", 'has no "text" in 1 of 1 rows (first: row 1, which has sentence, label)'),
        ("unlabelled.jsonl", 'has no "label" in 1 of 2 rows (first: row 2, which has text)'),
        ("notes.txt", "is none of .jsonl, .json, .csv, .npz"),
        ("bytes.jsonl", "cannot be read"),
    ):
        message = refused(tmp_path, *arguments(classifiers), "--bounds", f"--data=sst={tmp_path / source}")
        assert reason in message, message
    for options, reason in (
        (["--bounds"], "go together"),
        ([f"--data=sst={good}"], "go together"),
        (["--bounds", f"--data=sts={good}"], 'data was given for "sts" (did you mean sst?)'),
        (["--bounds", f"--data=sst={good}", "--alpha=2"], "alpha in [0, 1]"),
        (["--bounds", f"--data=sst={good}", "-m", "9"], "num_bases is 9"),
        (["--bounds", f"--data=sst={good}", "--batch-size=0"], "batch-size must be 1 or more"),
        (["--bounds", f"--data=sst={good}", "--max-rows=0"], "max-rows must be 1 or more"),
    ):
        message = refused(tmp_path, *arguments(classifiers), "--json", tmp_path / "out.json", *options)
        assert reason in message, message


def test_a_data_set_that_is_neither_here_nor_on_the_hub_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def absent(name: str, split: str) -> None:
        raise FileNotFoundError(f"{name} {split} cannot be found")

    monkeypatch.setattr(datasets, "load_dataset", absent)
    with pytest.raises(
        ParameterError, match=r"neither a file nor .*: FileNotFoundError: me/absent test cannot be found"
    ):
        read_rows("sst", "me/absent:test")
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: [{"text": split}])
    assert read_rows("sst", "me/there").values == [{"text": "train"}]


def test_models_that_answer_nothing_are_refused(bert: Family, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl")
    message = refused(tmp_path, *arguments(bert), "--bounds", f"--data=sst={file}")
    assert "is a BertModel, which answers nothing" in message
    headless = make_llama(tmp_path / "headless")
    family = make_family(tmp_path / "family", headless, ["sst", "nli"], seed=1)
    for path in (family.base, *family.tasks.values()):
        from safetensors.torch import load_file, save_file

        state = load_file(path / "model.safetensors")
        del state["lm_head.weight"]
        save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    message = refused(tmp_path, *arguments(family), "--bounds", f"--data=sst={file}")
    assert "lacks 1 weights of a LlamaForCausalLM (first: lm_head.weight)" in message
    config = json.loads((family.base / "config.json").read_text())
    (family.base / "config.json").write_text(
        json.dumps(config | {"model_type": "nonsense", "architectures": ["XForCausalLM"]})
    )
    for path in family.tasks.values():
        (path / "config.json").write_text(json.dumps({"model_type": "nonsense"}))
    message = refused(tmp_path, *arguments(family), "--bounds", f"--data=sst={file}")
    assert "cannot be loaded by transformers" in message
