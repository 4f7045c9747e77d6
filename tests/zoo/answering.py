"""Small models of every kind that data can ask, with their tokenizers: of texts, images, sound, images and texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor

WORDS = ["a", "photo", "of", ".", "red", "green", "blue", "square", "one", "two", "three", "four"]
VOCABULARY = {word: i for i, word in enumerate(["<pad>", "<s>", "<unk>", "<start>", *WORDS, "</s>"])}
END = VOCABULARY["</s>"]
SPECIAL: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": END}
CLASSES = ("red", "green", "blue_square")
IMAGE = 8

VISION: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": IMAGE, "patch_size": 4,
}  # fmt: skip
TEXT = {**VISION, "vocab_size": len(VOCABULARY), "max_position_embeddings": 64, **SPECIAL}
HALVES: dict[str, Any] = {
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "vocab_size": len(VOCABULARY),
}  # fmt: skip
LABELS = {"id2label": dict(enumerate(CLASSES)), "label2id": {name: i for i, name in enumerate(CLASSES)}}


def _made(name: str, **options: Any) -> Callable[[], Any]:
    kind = getattr(transformers, name)
    return lambda: kind(kind.config_class(**options))


ANSWERING: Mapping[str, Callable[[], Any]] = {
    "t5": _made(
        "T5ForConditionalGeneration", vocab_size=len(VOCABULARY), d_model=16, d_ff=24, d_kv=8, num_layers=2,
        num_heads=2, decoder_start_token_id=0, **SPECIAL,
    ),
    "bart": _made("BartForConditionalGeneration", **HALVES, max_position_embeddings=32, **SPECIAL),
    "whisper": _made(
        "WhisperForConditionalGeneration", **HALVES, num_mel_bins=4, max_source_positions=6, max_target_positions=16,
        decoder_start_token_id=3, suppress_tokens=None, begin_suppress_tokens=None, **SPECIAL,
    ),
    "vit": _made("ViTForImageClassification", **VISION, **LABELS),
    "dinov2": _made("Dinov2ForImageClassification", **VISION, **LABELS),
    "clip": _made("CLIPModel", text_config=TEXT, vision_config=VISION, projection_dim=8),
    "siglip": _made("SiglipModel", text_config=TEXT, vision_config=VISION),
}  # fmt: skip
WRITING, SEEING, NAMING = ("bart", "t5"), ("dinov2", "vit"), ("clip", "siglip")


def make(name: str, directory: Path, seed: int = 0) -> Path:
    """A model with the numbers of a seed, saved with its tokenizer."""
    torch.manual_seed(seed)
    model = ANSWERING[name]()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    model.save_pretrained(directory)
    if name not in SEEING:
        save_tokenizer(directory)
    return directory


def save_tokenizer(directory: Path) -> None:
    """One token per word and the end after them."""
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", END)])  # type: ignore[assignment]
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(directory)


def images(count: int, seed: int = 0) -> np.ndarray:
    """[count, 8, 8, 3] uint8"""
    return np.random.default_rng(seed).integers(0, 256, (count, IMAGE, IMAGE, 3), dtype=np.uint8)


def save_folder(directory: Path, count: int = 2, seed: int = 0) -> Path:
    """``count`` images of each class, in a folder of its name."""
    from PIL import Image

    for i, label in enumerate(CLASSES):
        (directory / label).mkdir(parents=True)
        for j, array in enumerate(images(count, seed + i)):
            Image.fromarray(array).save(directory / label / f"{j}.png")
    return directory


def data_file(name: str, directory: Path, seed: int = 0) -> Path:
    """Data that a model of this name can be asked."""
    generator = np.random.default_rng(seed)
    directory.mkdir(parents=True, exist_ok=True)
    if name in WRITING:
        file = directory / f"{seed}.csv"
        lines = [" ".join(generator.choice(WORDS, n)) for n in (3, 5, 2, 4)]
        answers = [" ".join(generator.choice(WORDS, n)) for n in (2, 1, 4, 3)]
        rows = [f'"{text}","{answer}"' for text, answer in zip(lines, answers, strict=True)]
        file.write_text("text,label\n" + "\n".join(rows) + "\n", encoding="utf-8")
        return file
    if name == "whisper":
        file = directory / f"{seed}.npz"
        labels = np.array([[5, 6, END, -100], [7, END, -100, -100], [4, 5, 6, END]])
        np.savez(file, input_features=generator.standard_normal((3, 4, 12)).astype("float32"), labels=labels)
        return file
    return save_folder(directory / f"images{seed}", seed=10 * seed)


def logits_of(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits
