"""Models that write, see, hear or compare, as data: they are asked what they mean, however it is batched and stored."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from tvbases_hf import DATA_METHODS, InPlace, Vectors, accuracies, dense, grid_search, merged, summed, write
from tvbases_hf.errors import ParameterError
from tvbases_hf.learning.batches import Columns
from tvbases_hf.learning.data import IGNORED, LABELS, TaskData
from tvbases_hf.learning.fisher import diagonal_fisher
from tvbases_hf.learning.inplace import Reparametrised, weights_of
from tvbases_hf.learning.learned import gradients, moved
from tvbases_hf.learning.regmean import input_products
from tvbases_hf.learning.taskfiles import TaskModel
from tvbases_hf.learning.zeroshot import ZeroShot
from tvbases_hf.merging.changes import Edit
from tvbases_hf.models.linear import linear_layers
from tvbases_hf.storage.checkpoint import Checkpoint
from zoo.answering import ANSWERING, CLASSES, END, NAMING, SEEING, WRITING, data_file, images, make, save_folder
from zoo.models import tune

TASKS = ("a", "b")
KINDS = sorted(ANSWERING)
DECODING = (*WRITING, "whisper")
METHODS: dict[str, dict[str, Any]] = {
    "fisher": {},
    "fisher_empirical": {},
    "regmean": {},
    "localize": {"epochs": 1, "sparsity": 0.05, "lr": 100.0},
    "adamerging": {"steps": 2},
    "atlas": {"epochs": 1},
}


class Family:
    """A base, two fine-tunes of it and data of each."""

    def __init__(self, name: str, root: Path) -> None:
        self.name, self.base = name, make(name, root / "base")
        self.tasks = {task: root / task for task in TASKS}
        for task, path in self.tasks.items():
            shutil.copytree(self.base, path)
            state = tune(load_file(self.base / "model.safetensors"), ord(task), 0.1)
            save_file({n: t.contiguous() for n, t in state.items()}, path / "model.safetensors", {"format": "pt"})
        self.files = {task: data_file(name, root / "data", seed) for seed, task in enumerate(TASKS)}
        self.vectors = Vectors.open(self.base, self.tasks)
        self.loaded = TaskModel.load(self.vectors.base)
        self.data = [self.loaded.data(task, str(file), Columns(batch_size=3)) for task, file in self.files.items()]


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Family] = {}

    def family(name: str) -> Family:
        if name not in made:
            made[name] = Family(name, tmp_path_factory.mktemp(name))
        return made[name]

    return family


def answers(model: Any, task: TaskData) -> Tensor:
    with torch.no_grad():
        return torch.cat([task.logits(model, batch) for batch in task.batches])


def singles(task: TaskData) -> list[dict[str, Tensor]]:
    """Every example alone, without any padding."""
    found = []
    for batch in task.batches:
        for i in range(len(batch[LABELS])):
            row = {key: value[i : i + 1] for key, value in batch.items()}
            if "attention_mask" in row:
                length = int(row["attention_mask"].sum())
                row |= {key: row[key][:, :length] for key in ("input_ids", "attention_mask")}
            if row[LABELS].ndim == 2:
                row[LABELS] = row[LABELS][:, : int((row[LABELS] != IGNORED).sum())]
            found.append(row)
    return found


@pytest.mark.parametrize("name", KINDS)
def test_every_method_finds_weights_and_leaves_the_model_alone(name: str, families: Any) -> None:
    family = families(name)
    before = {n: t.clone() for n, t in family.loaded.model.state_dict().items()}
    for method, options in METHODS.items():
        found = DATA_METHODS[method](family.vectors, family.loaded.model, family.data, **options)
        changes = [dense(found.change(n)) for n in found.names]
        assert all(bool(change.isfinite().all()) for change in changes), method
        assert any(bool(change.any()) for change in changes), method
    assert all(torch.equal(before[n], t) for n, t in family.loaded.model.state_dict().items())


@pytest.mark.parametrize("name", KINDS)
def test_a_model_changed_in_place_answers_as_the_one_that_is_written(name: str, families: Any, tmp_path: Path) -> None:
    family = families(name)
    change = merged(family.vectors, "task_arithmetic", alpha=0.7)
    write(Edit.of(family.vectors, change, "a merge"), tmp_path / "out")
    written = TaskModel.load(Checkpoint.open(tmp_path / "out"))
    for task in family.data:
        own = written.data(task.name, str(family.files[task.name]), Columns(batch_size=3))
        with InPlace(family.loaded.model, family.vectors.names).changed(change) as model:
            torch.testing.assert_close(answers(model, task), answers(written.model, own), rtol=1e-5, atol=1e-5)
        base = answers(family.loaded.model, task)
        assert not torch.allclose(base, answers(written.model, own), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", KINDS)
def test_a_grid_search_measures_what_the_models_own_logits_give(name: str, families: Any) -> None:
    family = families(name)
    place = InPlace(family.loaded.model, family.vectors.names)
    curve = grid_search(place, summed(family.vectors), accuracies(family.data), alphas=(0.0, 0.5), patience=2)
    with place.changed(summed(family.vectors), 0.5) as model:
        for task in family.data:
            right = [
                int(logits.argmax()) == int(label)
                for row in singles(task)
                for logits, label in zip(*(part for part in task.labelled(model, row)), strict=True)
            ]
            assert math.isclose(curve.at(0.5)[task.name], sum(right) / len(right))


@pytest.mark.parametrize("name", [name for name in DECODING if name in KINDS])
def test_the_loss_of_an_encoder_decoder_is_the_models_own_and_padding_changes_nothing(name: str, families: Any) -> None:
    family = families(name)
    model, task = family.loaded.model, family.data[0]
    for batch in task.batches:
        own = model(**batch).loss
        torch.testing.assert_close(task.loss(model, batch), own, rtol=1e-6, atol=0)
        longer = {**batch, LABELS: torch.nn.functional.pad(batch[LABELS], (0, 3), value=IGNORED)}
        if "attention_mask" in batch:
            longer |= {key: torch.nn.functional.pad(batch[key], (0, 2)) for key in ("input_ids", "attention_mask")}
        for measure in (task.loss, task.entropy):
            torch.testing.assert_close(measure(model, longer), measure(model, batch), rtol=1e-5, atol=1e-6)
    alone = torch.cat([task.labelled(model, row)[0] for row in singles(task)])
    torch.testing.assert_close(alone, answers(model, task), rtol=1e-4, atol=1e-5)


def test_what_an_encoder_decoder_is_asked_for_are_its_labels(families: Any) -> None:
    """BART would take the input for the target where it gets none."""
    for name in DECODING:
        family = families(name)
        (batch, *_) = family.data[0].batches
        unlabelled = {key: value for key, value in batch.items() if key != LABELS}
        with pytest.raises(ParameterError, match=r"an encoder-decoder model .* has no labels"):
            family.data[0].entropy(family.loaded.model, unlabelled)
        with pytest.raises(ParameterError, match="no label that counts"):
            family.data[0].loss(family.loaded.model, batch | {LABELS: torch.full_like(batch[LABELS], IGNORED)})


@pytest.mark.parametrize("name", KINDS)
def test_the_information_is_that_of_the_examples_alone(name: str, families: Any) -> None:
    """(d sum log p)^2 of each example, without padding, averaged; of the labels that the data has."""
    family = families(name)
    model, task = family.loaded.model, family.data[0]
    weights = weights_of(model, family.vectors.names)
    leaves = moved(weights, lambda n: torch.zeros_like(weights[n]))
    found = diagonal_fisher(model, leaves, task, empirical=True)
    expected = {n: torch.zeros_like(leaf, dtype=torch.float64) for n, leaf in leaves.items()}
    rows = singles(task)
    for row in rows:
        asked = Reparametrised(model, leaves)
        logits, labels = task.labelled(asked, row)
        for n, slope in gradients(-cross_entropy(logits.double(), labels, reduction="sum"), leaves):
            expected[n] += slope.double() ** 2 / len(rows)
    for n, information in expected.items():
        size = float(information.max())
        assert torch.allclose(found[n], information, rtol=1e-3, atol=1e-5 * size + 1e-12), n


@pytest.mark.parametrize("name", KINDS)
def test_the_inputs_of_layers_are_those_of_the_examples_alone(name: str, families: Any) -> None:
    """X^T X without padding; the names of the classes are read once, however the images are batched."""
    family = families(name)
    model, task = family.loaded.model, family.data[0]
    layers = linear_layers(model, family.vectors.names)
    weights = weights_of(model, family.vectors.names)
    leaves = {n: weight.detach() for n, weight in weights.items()}
    found = {n: inputs.product for n, inputs in input_products(model, leaves, layers, task).items()}
    expected: dict[str, Tensor] = {}
    modules = dict(model.named_modules())
    hooks = [modules[layer].register_forward_pre_hook(_summing(expected, n)) for n, layer in layers.items()]
    readout = task.readout
    with torch.no_grad():
        if isinstance(readout, ZeroShot):
            features = model.get_text_features(input_ids=readout.texts[0]["input_ids"])
            readout = replace(readout, head=torch.nn.functional.normalize(features.pooler_output))
        for row in singles(task):
            readout(model, row)
    for hook in hooks:
        hook.remove()
    of_text = {n for n in found if name == "clip" and n.startswith("text_model")}  # see the next test
    assert found.keys() == expected.keys() and len(found) > 10
    for n in sorted(found.keys() - of_text):
        size = float(expected[n].abs().max())
        assert torch.allclose(found[n], expected[n], rtol=1e-4, atol=1e-5 * size), n


def _summing(found: dict[str, Tensor], name: str) -> Any:
    def hook(module: Any, args: tuple[Tensor, ...]) -> None:
        rows = args[0].detach().reshape(-1, args[0].shape[-1]).double()
        found[name] = found.get(name, 0) + rows.T @ rows

    return hook


def test_padding_of_the_names_of_classes_does_not_count(families: Any) -> None:
    family = families("clip")
    model, task = family.loaded.model, family.data[0]
    layers = {"text": "text_model.encoder.layers.0.mlp.fc1"}
    found = input_products(model, {"logit_scale": model.logit_scale.detach()}, layers, task)["text"].product
    expected: dict[str, Tensor] = {}
    hook = dict(model.named_modules())[layers["text"]].register_forward_pre_hook(_summing(expected, "text"))
    with torch.no_grad():
        for label in CLASSES:
            text = f"a photo of a {label.replace('_', ' ')} ."
            ids = family.loaded.tokenizer(text, return_tensors="pt")["input_ids"]
            model.get_text_features(input_ids=ids)
    hook.remove()
    assert torch.allclose(found, expected["text"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMING)
def test_the_zero_shot_head_gives_the_models_own_logits(name: str, families: Any) -> None:
    family = families(name)
    model, task = family.loaded.model, family.data[0]
    text = task.readout.texts[0]
    for batch in task.batches:
        own = model(pixel_values=batch["pixel_values"], **text).logits_per_image
        torch.testing.assert_close(task.logits(model, batch), own, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(task.fixed(model).logits(model, batch), own, rtol=1e-4, atol=1e-5)
    if name == "siglip":
        assert text["input_ids"].shape[1] == 64  # all of its length, as it was trained


@pytest.mark.parametrize("name", NAMING)
def test_the_zero_shot_head_is_that_of_the_model_that_is_asked(name: str, families: Any) -> None:
    """Also of a model asked with other weights, and with what does not change computed once."""
    family = families(name)
    model, task = family.loaded.model, family.data[0]
    (batch, *_) = task.batches
    tower = [n for n in family.vectors.names if n.startswith("text_model")]
    change = merged(family.vectors, "task_arithmetic", alpha=0.5)
    with torch.no_grad():
        with InPlace(model, tower).changed(change):
            expected = task.logits(model, batch)
        asked = Reparametrised(model, moved(weights_of(model, tower), change))
        torch.testing.assert_close(task.logits(asked, batch), expected, rtol=1e-5, atol=1e-5)
        assert (expected - task.logits(model, batch)).abs().max() > 1e-3
    pictures = [n for n in family.vectors.names if n.startswith("vision_model")]
    assert task.fixed(model, tower).readout.head is None and task.fixed(model, pictures).readout.head is not None


def test_several_templates_are_averaged_as_directions(families: Any) -> None:
    family = families("clip")
    model, templates = family.loaded.model, ["a photo of a {}.", "{} {}".replace("{} ", "a ")]
    task = family.loaded.data("a", str(family.files["a"]), Columns(templates=templates))
    heads = []
    for template in templates:
        texts = [template.format(label.replace("_", " ")) for label in sorted(CLASSES)]
        tokens = family.loaded.tokenizer(texts, padding=True, return_tensors="pt")
        text = {key: tokens[key] for key in ("input_ids", "attention_mask")}
        heads.append(torch.nn.functional.normalize(model.get_text_features(**text).pooler_output))
    head = torch.nn.functional.normalize((heads[0] + heads[1]) / 2)
    (batch,) = task.batches
    image = torch.nn.functional.normalize(model.get_image_features(pixel_values=batch["pixel_values"]).pooler_output)
    torch.testing.assert_close(task.logits(model, batch), model.logit_scale.exp() * image @ head.T)
    with pytest.raises(ParameterError, match=r"has one \{\} where the name of the class goes"):
        family.loaded.data("a", str(family.files["a"]), Columns(templates=["a photo"]))


@pytest.mark.parametrize("name", (*SEEING, *NAMING))
def test_a_folder_an_npz_of_images_and_one_of_pixels_are_one(name: str, families: Any, tmp_path: Path) -> None:
    loaded = families(name).loaded
    folder = save_folder(tmp_path / "images", 2, seed=5)
    arrays = np.concatenate([images(2, 5 + i) for i in range(3)])
    order = sorted(range(3), key=lambda i: CLASSES[i])  # a folder's classes are in the order of their names
    labels = np.repeat([order.index(i) if name in NAMING else i for i in range(3)], 2)
    np.savez(tmp_path / "images.npz", images=arrays, labels=labels)
    pixels = loaded.processor(list(arrays), return_tensors="np", input_data_format="channels_last")["pixel_values"]
    np.savez(tmp_path / "pixels.npz", pixel_values=pixels, labels=labels)
    names = tmp_path / "names.txt"
    names.write_text("\n".join(sorted(CLASSES) if name in NAMING else CLASSES))
    read = Columns(classes={"": str(names)})
    found = [
        loaded.data("t", str(source), read).answers(loaded.model)
        for source in (folder, tmp_path / "images.npz", tmp_path / "pixels.npz")
    ]
    assert all(math.isclose(other.loss, found[0].loss, rel_tol=1e-5) for other in found)
    assert all(other.accuracy == found[0].accuracy and other.count == 6 for other in found)


def test_a_models_own_image_processor_is_used(families: Any, tmp_path: Path) -> None:
    from transformers import ViTImageProcessorPil

    family = families("vit")
    shutil.copytree(family.base, tmp_path / "vit")
    ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=[0.1] * 3, image_std=[2.0] * 3).save_pretrained(
        tmp_path / "vit"
    )
    loaded = TaskModel.load(Checkpoint.open(tmp_path / "vit"))
    (batch,) = loaded.data("t", str(save_folder(tmp_path / "one", 1, seed=1))).batches
    expected = (torch.tensor(images(1, 1)[0]).permute(2, 0, 1).double() / 255 - 0.1) / 2
    row = int((batch["labels"] == 0).nonzero())
    torch.testing.assert_close(batch["pixel_values"][row].double(), expected, rtol=1e-5, atol=1e-6)
    assert loaded.notes() == [] and "resized to 8 x 8 and normalised with mean 0.5" in family.loaded.notes()[0]


def test_a_part_of_a_folder_has_every_class(families: Any, tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "images", 4)
    (batch,) = families("vit").loaded.data("t", str(folder), Columns(max_rows=6)).batches
    assert sorted(batch["labels"].tolist()) == [0, 0, 1, 1, 2, 2]


def test_classes_are_found_by_their_names(families: Any, tmp_path: Path) -> None:
    from zoo.fake_images import ClassLabels

    loaded = families("vit").loaded
    folder = save_folder(tmp_path / "images", 1)
    other = tmp_path / "codes"
    shutil.copytree(folder, other)
    codes = {label: f"n{i}" for i, label in enumerate(CLASSES)}
    for label, code in codes.items():
        (other / label).rename(other / code)
    (tmp_path / "names.json").write_text('{"n2": "Blue square", "n0": "red", "n1": "green"}')
    by_code = loaded.data("t", str(other), Columns(classes={"t": str(tmp_path / "names.json")}))
    (batch,) = by_code.batches
    assert batch["labels"].tolist() == [1, 2, 0]  # of n0, n1, n2: the file's order is that of the outputs
    (batch,) = loaded.data("t", str(folder)).batches
    assert batch["labels"].tolist() == [2, 1, 0]  # of blue_square, green, red: the model's
    rows = ClassLabels(["green", "red", "blue square"], images(3)).rows()
    (batch,) = loaded.data("t", rows).batches
    assert batch["labels"].tolist() == [1, 0, 2]


def test_images_without_classes_do_where_no_labels_are_needed(families: Any, tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "images", 1)
    loose = tmp_path / "loose"
    loose.mkdir()
    for i, file in enumerate(sorted(folder.rglob("*.png"))):
        shutil.copy(file, loose / f"{i}.png")
    loaded = families("vit").loaded
    bare, labelled = loaded.data("t", str(loose)), loaded.data("t", str(folder))
    (a,), (b,) = bare.batches, labelled.batches
    assert torch.equal(bare.entropy(loaded.model, a), labelled.entropy(loaded.model, b))
    with pytest.raises(ParameterError, match='"t" has no labels'):
        bare.accuracy(loaded.model)


def test_targets_are_tokens_up_to_their_end(families: Any, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\na red one,one two\nblue,green\n")
    for name in WRITING:
        (batch,) = families(name).loaded.data("t", str(tmp_path / "a.csv")).batches
        assert batch[LABELS][0, -1] == END and batch[LABELS][1].tolist()[1:] == [END, IGNORED]
    whisper = families("whisper").loaded
    np.savez(tmp_path / "b.npz", input_features=np.zeros((2, 4, 12), "float32"), labels=["one two", "green"])
    (batch,) = whisper.data("t", str(tmp_path / "b.npz")).batches
    assert batch[LABELS][0, -1] == END and batch[LABELS][1].tolist()[1:] == [END, IGNORED]
