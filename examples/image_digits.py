"""A small ViT and a small CLIP on scikit-learn's digits: inspect, compress, merge, negate on folders of images.

    python examples/image_digits.py [--workdir DIR] [--model vit|clip] [--quick]

Trains a base on upright digits, and fine-tunes on turned, inverted and mirrored ones (CLIP: of images the tower alone,
which is saved alone, as FusionBench publishes its models); then runs the commands that it prints. About a minute for
each of the two on two cores. With models of your own: guides/images.md. Needs scikit-learn and Pillow.
"""

from __future__ import annotations

import argparse
import random
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tvbases_hf import Columns, TaskData, TaskModel, fine_tune, read_rows

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
VIEWS = {
    "upright": lambda image: image,
    "turned": lambda image: np.rot90(image),
    "inverted": lambda image: 255 - image,
    "mirrored": lambda image: image[:, ::-1],
}
TASKS = tuple(VIEWS)[1:]
VISION: dict[str, Any] = {
    "image_size": 8, "patch_size": 2, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4,
}  # fmt: skip
WORDS = ("<pad>", "<unk>", "a", "photo", "of", ".", *NAMES, "<end>")
TEST = 400


@dataclass(frozen=True)
class Training:
    """Epochs of the base and of the fine-tunes, and how many images of each view there are."""

    base: int = 40
    tasks: int = 8
    images: int = 1797


def save_images(directory: Path, count: int) -> None:
    """DIRECTORY/VIEW/train/CLASS/*.png and DIRECTORY/VIEW/test/CLASS/*.png."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.images))[:count]
    for view, turn in VIEWS.items():
        for number, index in enumerate(order):
            split = "test" if number < min(TEST, count // 3) else "train"
            folder = directory / view / split / NAMES[digits.target[index]]
            folder.mkdir(parents=True, exist_ok=True)
            image = turn((digits.images[index] * 255 / 16).astype(np.uint8))
            Image.fromarray(np.ascontiguousarray(image)).save(folder / f"{index}.png")


def make_vit(directory: Path) -> None:
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

    labels = {"id2label": dict(enumerate(NAMES)), "label2id": {name: i for i, name in enumerate(NAMES)}}
    ViTForImageClassification(ViTConfig(**VISION, **labels)).save_pretrained(directory)
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(directory)


def make_clip(directory: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(WORDS)}
    end = len(WORDS) - 1
    text = {
        "vocab_size": len(WORDS), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 16, "bos_token_id": 0, "pad_token_id": 0,
        "eos_token_id": end,
    }  # fmt: skip
    CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=32)).save_pretrained(directory)
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <end>", special_tokens=[("<end>", end)])  # type: ignore[assignment]
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="<end>"
    ).save_pretrained(directory)
    CLIPImageProcessorPil(size={"height": 8, "width": 8}, do_center_crop=False).save_pretrained(directory)


def training_data(loaded: TaskModel, view: str, images: Path) -> TaskData:
    """A folder's images in a random order, prepared once."""
    rows = read_rows(view, str(images / view / "train"))
    shuffled = random.Random(0).sample(list(rows.values), len(rows))
    data = loaded.data(view, replace(rows, values=shuffled), Columns(batch_size=64))
    return replace(data, batches=list(data.batches))


def train(kind: str, directory: Path, images: Path, training: Training) -> None:
    """The base, and one fine-tune of it for every other view."""
    torch.manual_seed(0)
    make_vit(directory / "base") if kind == "vit" else make_clip(directory / "base")
    loaded = TaskModel.load(directory / "base")
    fine_tune(loaded.model, training_data(loaded, "upright", images), lr=2e-3, epochs=training.base)
    loaded.model.save_pretrained(directory / "base")
    for task in TASKS:
        loaded = TaskModel.load(directory / "base")
        trained = loaded.model if kind == "vit" else loaded.model.vision_model
        for weight in loaded.model.parameters():
            weight.requires_grad_(False)
        for weight in trained.parameters():
            weight.requires_grad_(True)
        fine_tune(loaded.model, training_data(loaded, task, images), lr=1e-3, epochs=training.tasks)
        trained.save_pretrained(directory / task)


def commands(directory: Path, images: Path) -> Iterator[list[str]]:
    """What a user types, after ``tvbases``."""
    base = ["--base", str(directory / "base")]
    tasks = [part for task in TASKS for part in ("--task", f"{task}={directory / task}")]
    data = [part for view in VIEWS for part in ("--data", f"{view}={images / view / 'test'}")]
    lines = [f"  - {{model: {directory / task}, parameters: {{weight: 1.0}}}}" for task in TASKS]
    (directory / "merge.yml").write_text(
        f"merge_method: tsv\nbase_model: {directory / 'base'}\nmodels:\n"
        + "\n".join(lines)
        + "\nparameters: {lambda: 0.7}\ndtype: float32\n"
    )
    yield ["inspect", *base, *tasks]
    yield ["compress", *base, *tasks, "--num-bases", "2", "--out", str(directory / "basis")]
    yield ["evaluate", str(directory / "basis"), *data]
    yield ["merge", str(directory / "merge.yml"), str(directory / "merged")]
    yield ["evaluate", str(directory / "merged"), *base, *data]
    yield ["negate", *base, *tasks, "--forget", "inverted", *data, "--out", str(directory / "clean")]


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, help="where models and images stay; default: nowhere")
    parser.add_argument("--model", choices=("vit", "clip"), action="append", help="default: both")
    parser.add_argument("--quick", action="store_true", help="a few images and steps, to see that it runs")
    options = parser.parse_args(given)
    training = Training(1, 1, 60) if options.quick else Training()
    with tempfile.TemporaryDirectory() as scratch:
        workdir = options.workdir or Path(scratch)
        images = workdir / "digits"
        save_images(images, training.images)
        for kind in options.model or ("vit", "clip"):
            train(kind, workdir / kind, images, training)
            for command in commands(workdir / kind, images):
                print("$ tvbases", shlex.join(command), flush=True)
                subprocess.run([sys.executable, "-m", "tvbases_hf", *command], check=True)


if __name__ == "__main__":
    main()
