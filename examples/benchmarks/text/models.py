"""The base and its fine-tunes: full, LoRA and DoRA, each written whole or not at all, and used again by later runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tvbases_demo import encoder, store
from tvbases_demo.encoder import Examples, Problem
from tvbases_hf.learning.data import TaskData
from tvbases_hf.learning.training import fine_tune
from tvbases_hf.storage.output import transaction, write_json

from .settings import Recipe

KINDS = ("full", "lora", "dora")
MARKER = "trained.json"
# Batches of sentences of like length, cut from this many shuffled batches: half the padding, and still random.
BUCKET = 10


def base_model(workdir: Path) -> Path:
    return store.base_model(workdir / "base")


def model_path(workdir: Path, kind: str, seed: int, task: str) -> Path:
    return workdir / "models" / f"{kind}-{seed}" / task


def is_trained(path: Path) -> bool:
    return (path / MARKER).is_file()


def train(workdir: Path, kind: str, seed: int, task: str, problem: Problem, recipe: Recipe) -> nn.Module:
    """Fine-tune the base on a task, write the checkpoint or adapter, and return the model, ready to be asked."""
    torch.manual_seed(seed)
    base, tokenizer = encoder.load(base_model(workdir))
    model, epochs, lr = base, recipe.epochs, recipe.lr
    if kind != "full":
        model, epochs, lr = with_adapter(base, kind, recipe), recipe.lora_epochs, recipe.lora_lr
    data = TaskData(task, list(batches(problem.train, recipe.batch, epochs, seed)), readout_of(problem))
    fine_tune(model, data, lr=lr, seed=seed)
    with transaction(model_path(workdir, kind, seed, task), is_trained) as work:
        if kind == "full":
            encoder.save(model, tokenizer, work)
        else:
            model.save_pretrained(work)  # type: ignore[operator]
        write_json(work / MARKER, {"task": task, "kind": kind, "seed": seed})
    return model


def with_adapter(base: nn.Module, kind: str, recipe: Recipe) -> Any:
    """The base with a fresh adapter on every linear layer; the seed is torch's own."""
    from peft import LoraConfig, get_peft_model

    targets = ["query", "key", "value", "dense"]
    config = LoraConfig(
        r=recipe.rank, lora_alpha=recipe.lora_alpha, target_modules=targets, use_dora=kind == "dora", lora_dropout=0.0
    )
    return get_peft_model(base, config).eval()  # type: ignore[arg-type]


def batches(examples: Examples, batch: int, epochs: int, seed: int) -> Iterator[tuple[list[list[int]], torch.Tensor]]:
    """Shuffled mini-batches of all epochs, of sentences of like length."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        parts = []
        for rows in torch.randperm(len(examples), generator=generator).split(BUCKET * batch):
            ordered = sorted(rows.tolist(), key=lambda row: len(examples.ids[row]))
            parts += [ordered[k : k + batch] for k in range(0, len(ordered), batch)]
        for index in torch.randperm(len(parts), generator=generator).tolist():
            yield [examples.ids[row] for row in parts[index]], examples.labels[parts[index]]


def half_precision() -> torch.autocast:
    """bfloat16 where the processor has it; others would take ten times as long for it as for float32."""
    return torch.autocast("cpu", torch.bfloat16, enabled=torch.ops.mkldnn._is_mkldnn_bf16_supported())


def readout_of(problem: Problem):
    """Logits of the frozen zero-shot head, for one batch of (token ids, labels), in half precision.

    The autocast is entered for every batch, because weights are cast once for as long as it lasts.
    """

    def readout(model: nn.Module, asked: tuple[list[list[int]], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        with half_precision():
            embeddings = encoder.forward(model, asked[0])
        return encoder.logits(embeddings, problem.head), asked[1]

    return readout
