"""``evaluate``, ``negate`` and ``inspect --bounds`` on data of one's own, and what they refuse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from commands.command_line import refused, tvbases
from tvbases_hf import Vectors
from tvbases_hf.learning.batches import Columns
from tvbases_hf.learning.taskfiles import TaskModel
from tvbases_hf.storage.checkpoint import Checkpoint
from zoo.answering import CLASSES, data_file, images, make, save_folder
from zoo.models import tune

TASKS = ("a", "b")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for name in ("clip", "t5", "vit", "whisper"):
        base = make(name, root / name / "base")
        for task in TASKS:
            shutil.copytree(base, root / name / task)
            resave(root / name / task, tune(load_file(base / "model.safetensors"), ord(task), 0.1))
    save_tower(root / "clip", "vision_model.")
    return root


def resave(directory: Path, state: dict[str, torch.Tensor]) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def save_tower(directory: Path, prefix: str) -> None:
    """The images' half of task a, as CLIPVisionModel saves it, now and before transformers 5."""
    tower = {n: t for n, t in load_file(directory / "a" / "model.safetensors").items() if n.startswith("vision_model.")}
    config = json.loads((directory / "a" / "config.json").read_text())["vision_config"]
    for name, strip in (("tower", ""), ("tower5", "vision_model.")):
        (directory / name).mkdir()
        resave(directory / name, {n.removeprefix(strip): t for n, t in tower.items()})
        text = json.dumps({**config, "architectures": ["CLIPVisionModel"]})
        (directory / name / "config.json").write_text(text)


def models(root: Path, name: str) -> list[object]:
    return ["--base", root / name / "base", *(f"--task={task}={root / name / task}" for task in TASKS)]


def sources(root: Path, name: str, tmp_path: Path) -> dict[str, Path]:
    return {task: data_file(name, tmp_path / "data", seed) for seed, task in enumerate(TASKS)}


def answers(directory: Path, source: Path, **how: Any) -> Any:
    loaded = TaskModel.load(Checkpoint.open(directory))
    return loaded.data("t", str(source), Columns(**how)).answers(loaded.model)


@pytest.mark.parametrize("name", ["clip", "t5", "vit", "whisper"])
def test_evaluate_shows_what_each_model_makes_of_the_data(name: str, root: Path, tmp_path: Path) -> None:
    data, report = sources(root, name, tmp_path), tmp_path / "found.json"
    given = [f"--data={task}={source}" for task, source in data.items()]
    base = root / name / "base"
    done = tvbases("evaluate", root / name / "a", "--base", base, *given, "--target=b", "--json", report)
    assert done.code == 0, done.err
    found = json.loads(report.read_text())
    assert found["models"] == ["before", "a"] and found["scorer"] is None
    rows = {(row["task"], row["metric"]): row for row in found["rows"]}
    assert rows["b", "accuracy"]["role"] == "target" and rows["a", "accuracy"]["role"] == "data"
    for task, source in data.items():
        for label, directory in (("before", base), ("a", root / name / "a")):
            expected = answers(directory, source)
            assert rows[task, "accuracy"]["values"][label]["value"] == expected.accuracy
            assert rows[task, "loss"]["values"][label]["value"] == pytest.approx(expected.loss, rel=1e-5)
            error = rows[task, "accuracy"]["values"][label]["stderr"]
            assert (error is None) == (name in ("t5", "whisper"))
    assert ("there is no preprocessor_config.json" in done.err) == (name in ("clip", "vit"))


@pytest.mark.parametrize("name", ["clip", "t5", "vit"])
def test_evaluate_asks_adapters_and_their_basis_as_it_asks_the_merged_model(
    name: str, root: Path, tmp_path: Path
) -> None:
    """PEFT's wrapper names no inputs where an adapter has no task type: its data could not be read."""
    base, adapter, merged = root / name / "base", tmp_path / "lora", tmp_path / "merged"
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    model: Any = peft.get_peft_model(TaskModel.load(Checkpoint.open(base)).model, config)
    model.save_pretrained(str(adapter))
    shutil.copytree(base, merged)
    model.merge_and_unload().save_pretrained(merged)
    source, report = data_file(name, tmp_path / "data"), tmp_path / "found.json"
    expected = answers(merged, source)
    assert answers(base, source).loss != pytest.approx(expected.loss, rel=1e-3)

    compressed = tvbases("compress", "--base", base, f"--task=t={adapter}", "--rank", 2, "--out", tmp_path / "basis")
    assert compressed.code == 0, compressed.err
    for place in (adapter, tmp_path / "basis"):
        done = tvbases("evaluate", place, "--base", base, f"--data=d={source}", "--json", report)
        assert done.code == 0, done.err
        found = json.loads(report.read_text())
        rows = {row["metric"]: row["values"][found["models"][1]] for row in found["rows"]}
        assert rows["accuracy"]["value"] == expected.accuracy
        assert rows["loss"]["value"] == pytest.approx(expected.loss, rel=1e-4)
        assert (rows["accuracy"]["stderr"] is None) == (name == "t5")


def test_a_model_that_is_called_as_the_bases_column_has_one_of_its_own(root: Path, tmp_path: Path) -> None:
    """Both columns showed the model's numbers."""
    base, model, source, report = root / "t5" / "base", tmp_path / "before", data_file("t5", tmp_path), tmp_path / "r"
    shutil.copytree(root / "t5" / "a", model)
    done = tvbases("evaluate", model, "--base", base, f"--data=t={source}", "--json", report)
    assert done.code == 0, done.err
    (loss,) = (row["values"] for row in json.loads(report.read_text())["rows"] if row["metric"] == "loss")
    assert loss["before"]["value"] == pytest.approx(answers(base, source).loss, rel=1e-5)
    assert loss["before (2)"]["value"] == pytest.approx(answers(model, source).loss, rel=1e-5)


@pytest.mark.parametrize("name", ["clip", "t5", "vit"])
def test_negate_takes_the_forgotten_tasks_data_as_target_and_the_rest_as_controls(
    name: str, root: Path, tmp_path: Path
) -> None:
    data, report = sources(root, name, tmp_path), tmp_path / "found.json"
    given = [f"--data={task}={source}" for task, source in data.items()]
    arguments = [*models(root, name), "--forget", "a", *given, "--keep", 0.1, "--alphas", "0.5,1"]
    done = tvbases("negate", *arguments, "--out", tmp_path / "clean", "--json", report)
    assert done.code == 0, done.err
    found = json.loads(report.read_text())
    curve = found["curves"]["plain"]["curve"]
    assert set(curve["metrics"]) == {"target", "b"}
    written = answers(tmp_path / "clean", data["a"]).accuracy
    assert curve["metrics"]["target"][curve["alphas"].index(found["alpha"])] == written


@pytest.mark.parametrize("name", ["clip", "vit", "whisper"])
def test_bounds_are_about_the_losses_on_the_data(name: str, root: Path, tmp_path: Path) -> None:
    data, report = sources(root, name, tmp_path), tmp_path / "found.json"
    given = [f"--data={task}={source}" for task, source in data.items()]
    done = tvbases("inspect", *models(root, name), "--bounds", "-m", 1, *given, "--json", report)
    assert done.code == 0, done.err
    losses = {c["task"]: c["loss"] for c in json.loads(report.read_text())["bounds"]["curvatures"]}
    for task, source in data.items():
        assert losses[task] == pytest.approx(answers(root / name / task, source).loss, rel=1e-4)


@pytest.mark.parametrize("tower", ["tower", "tower5"])
def test_a_fine_tuned_tower_of_images_is_a_task_of_the_whole_model(tower: str, root: Path, tmp_path: Path) -> None:
    """As FusionBench publishes CLIP's: the tower alone, which stands in for the base's."""
    clip, report = root / "clip", tmp_path / "found.json"
    vectors = Vectors.open(clip / "base", {"tower": clip / tower, "a": clip / "a"})
    for name in vectors.names:
        own, whole = vectors.deltas(name)
        expected = whole.tuned - whole.base if name.startswith("vision_model.") else None  # type: ignore[union-attr]
        found = own.tuned - own.base  # type: ignore[union-attr]
        assert torch.equal(found, torch.zeros_like(found) if expected is None else expected), name
    state = load_file(clip / "base" / "model.safetensors")
    state |= {n: t for n, t in load_file(clip / "a" / "model.safetensors").items() if n.startswith("vision_model.")}
    shutil.copytree(clip / "base", tmp_path / "whole")
    resave(tmp_path / "whole", state)
    source = data_file("clip", tmp_path / "data")
    done = tvbases("evaluate", clip / tower, "--base", clip / "base", f"--data=a={source}", "--json", report)
    assert done.code == 0, done.err
    (loss,) = [
        row["values"][tower]["value"] for row in json.loads(report.read_text())["rows"] if row["metric"] == "loss"
    ]
    assert loss == pytest.approx(answers(tmp_path / "whole", source).loss, rel=1e-5)
    message = refused(tmp_path, "evaluate", clip / tower, f"--data=a={source}")
    assert "is a CLIPVisionModel, which answers nothing" in message


def test_a_tower_of_another_model_is_refused(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "clip" / "tower", tmp_path / "other")
    state = load_file(tmp_path / "other" / "model.safetensors")
    resave(tmp_path / "other", {n.replace("layers.1", "layers.7"): t for n, t in state.items()})
    message = refused(tmp_path, "inspect", "--base", root / "clip" / "base", f"--task=x={tmp_path / 'other'}")
    assert "a clip_vision_model, changes 16 of 39 tensors that the base" in message


def test_names_of_classes_come_from_a_file(root: Path, tmp_path: Path) -> None:
    """In another order they are other labels; each data set may have its own."""
    np.savez(tmp_path / "a.npz", images=images(3), labels=[0, 1, 2])
    (tmp_path / "names.txt").write_text("\n".join(CLASSES))
    (tmp_path / "turned.txt").write_text("\n".join(CLASSES[::-1]))
    losses = []
    for names in ("names.txt", f"a={tmp_path / 'turned.txt'}"):
        file = names if "=" in names else str(tmp_path / names)
        report = tmp_path / "found.json"
        done = tvbases(
            *("evaluate", root / "clip" / "a", f"--data=a={tmp_path / 'a.npz'}", "--classes", file, "--json", report),
            *("--template", "a photo of {}", "--template", "one {}"),
        )
        assert done.code == 0, done.err
        losses.append([r["values"]["a"]["value"] for r in json.loads(report.read_text())["rows"]][1])
    read = {"classes": {"": str(tmp_path / "names.txt")}, "templates": ("a photo of {}", "one {}")}
    assert losses[0] == pytest.approx(answers(root / "clip" / "a", tmp_path / "a.npz", **read).loss, rel=1e-5)
    assert abs(losses[0] - losses[1]) > 1e-3


def test_what_cannot_be_asked_is_refused_in_one_line(root: Path, tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "images", 1)
    save_folder(tmp_path / "splits" / "test", 1)
    shutil.copytree(folder, tmp_path / "torn")
    (tmp_path / "torn" / "red" / "0.png").write_bytes(b"no image")
    shutil.copytree(folder, tmp_path / "mixed")
    shutil.copy(folder / "red" / "0.png", tmp_path / "mixed")
    (tmp_path / "empty").mkdir()
    (tmp_path / "sound.csv").write_text("audio,label\na.wav,one\n")
    (tmp_path / "two.txt").write_text("red\ngreen\n")
    (tmp_path / "twice.txt").write_text("red\nRed\n")
    (tmp_path / "other.txt").write_text("red\ngreen\nyellow\n")
    arrays: dict[str, dict[str, Any]] = {
        "plain": {"images": images(2), "labels": [0, 1]},
        "large": {"pixel_values": np.zeros((1, 3, 16, 16), "float32"), "labels": [0]},
        "floats": {"images": images(2) / 255, "labels": [0, 1]},
        "uneven": {"images": images(2), "labels": [0]},
        "short": {"input_features": np.zeros((1, 4, 10), "float32"), "labels": [[4]]},
        "outside": {"input_features": np.zeros((1, 4, 12), "float32"), "labels": [[400]]},
    }
    for name, held in arrays.items():
        np.savez(tmp_path / f"{name}.npz", **held)
    (tmp_path / "broken.npz").write_bytes(b"PK no archive")
    cases: list[tuple[str, str, list[object], str]] = [
        ("vit", "splits", [], "holds splits (test), not classes"),
        ("vit", "torn", [], "holds an image that cannot be read: cannot identify image file"),
        ("vit", "mixed", [], "holds 1 images (first: 0.png) beside its folders"),
        ("vit", "empty", [], "has no row"),
        ("vit", "sound.csv", [], 'has no "image" in 1 of 1 rows'),
        ("vit", "large.npz", [], "is not what a ViTForImageClassification takes"),
        ("vit", "floats.npz", [], "images are uint8, and prepared ones are called pixel_values"),
        ("vit", "uneven.npz", [], "are not of one length (images 2, labels 1)"),
        ("vit", "broken.npz", [], "cannot be read as arrays"),
        ("vit", "images", ["--classes", tmp_path / "two.txt"], "2 names of classes for a model of 3 classes"),
        ("vit", "images", ["--classes", tmp_path / "other.txt"], "'blue_square' is not a label of this model"),
        ("vit", "images", ["--classes", f"b={tmp_path / 'two.txt'}"], '--classes were given for "b"'),
        (
            "vit",
            "images",
            ["--target", f"text:{tmp_path / 'two.txt'}"],
            "is not --data, and lm-eval's tasks",
        ),
        ("clip", "plain.npz", [], "does not name its classes"),
        ("clip", "images", ["--classes", tmp_path / "two.txt"], "'blue_square' is not a label"),
        ("clip", "images", ["--classes", tmp_path / "twice.txt"], 'holds "red" twice'),
        ("clip", "images", ["--classes", tmp_path / "absent.txt"], "cannot be read"),
        ("clip", "images", ["--template", "a photo"], "a template has one {}"),
        ("whisper", "sound.csv", [], "hears sound, which is not read from files"),
        ("whisper", "short.npz", [], "is not what a WhisperForConditionalGeneration takes"),
        ("whisper", "outside.npz", [], "row 1: labels are a list of tokens, 0 to 16 or -100; got [400]"),
    ]
    for name, source, options, reason in cases:
        given = ["evaluate", root / name / "a", f"--data=a={tmp_path / source}", *options]
        message = refused(tmp_path, *given, "--json", tmp_path / "found.json")
        assert reason in message, message
    given = [*models(root, "vit"), "--forget", "a", f"--data=a={folder}", "--out", tmp_path / "out"]
    assert "choosing alpha needs a control" in refused(tmp_path, "negate", *given)


def test_a_model_of_texts_and_images_without_its_tokenizer_is_refused(root: Path, tmp_path: Path) -> None:
    """transformers makes an empty one then, to which all names are one."""
    shutil.copytree(root / "clip" / "a", tmp_path / "bare")
    for file in (tmp_path / "bare").glob("tokenizer*"):
        file.unlink()
    folder = save_folder(tmp_path / "images", 1)
    assert "holds no tokenizer" in refused(tmp_path, "evaluate", tmp_path / "bare", f"--data=a={folder}")
    done = tvbases("evaluate", tmp_path / "bare", "--base", root / "clip" / "base", f"--data=a={folder}")
    assert done.code == 0, done.err  # the base's
