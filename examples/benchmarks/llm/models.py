"""The fine-tunes of the base: LoRA, DoRA and full, each written whole or not at all, and used again by later runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tvbases_hf.errors import ParameterError
from tvbases_hf.learning.data import TaskData, fitting
from tvbases_hf.learning.training import fine_tune
from tvbases_hf.storage.output import transaction, write_json

from .prompts import Prompts
from .settings import Recipe

KINDS = ("lora", "dora", "full")
MARKER = "trained.json"
# Prompts of like length make a batch: they are cut from this many shuffled batches.
BUCKET = 10


def model_path(workdir: Path, kind: str, seed: int, task: str) -> Path:
    return workdir / "models" / f"{kind}-{seed}" / task


def is_trained(path: Path) -> bool:
    return (path / MARKER).is_file()


def load(base: Path) -> tuple[Any, Any]:
    """The base and its tokenizer, which pads on the left: the answer is always in the last place.

    On a GPU if there is one, in bfloat16; else in float32, which most processors are faster with.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype).eval().to(place)  # type: ignore[arg-type]
    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return model, tokenizer


def with_adapter(model: nn.Module, kind: str, recipe: Recipe, seed: int) -> Any:
    """The base with a fresh adapter on every linear layer: of one seed, every task's begins with the same A."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.lora_alpha,
        target_modules="all-linear",
        use_dora=kind == "dora",
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config).eval()  # type: ignore[arg-type]


def train(path: Path, base: Path, kind: str, data: TaskData, recipe: Recipe, seed: int, start: int) -> None:
    """Fine-tune the base and write a checkpoint or an adapter.

    ``seed`` orders the data, ``start`` is that of the adapter's first weights.
    """
    model, tokenizer = load(base)
    lr = recipe.full_lr
    if kind != "full":
        model, lr = with_adapter(model, kind, recipe, start), recipe.lora_lr
    fine_tune(model, data, lr=lr, seed=seed)
    with transaction(path, is_trained) as work:
        model.save_pretrained(work)
        if kind == "full":
            tokenizer.save_pretrained(work)
        write_json(work / MARKER, {"data": data.name, "kind": kind, "seed": seed, "start": start})


def task_data(prompts: Prompts, tokenizer: Any, recipe: Recipe, seed: int) -> TaskData:
    """Prompts of which the first token of the right word is asked for. ParameterError where two words begin alike."""
    answers = [tokenizer(f" {word}", add_special_tokens=False).input_ids[0] for word in prompts.words]
    if len(set(answers)) < len(answers):
        raise ParameterError(
            f"two of the words of {prompts.name} ({', '.join(prompts.words)}) begin with the same token"
        )
    rows = [(tokenizer(prompt).input_ids, answers[label]) for prompt, label in prompts.splits["train"]]
    return TaskData(prompts.name, list(batches(rows, tokenizer, recipe, seed)), last_token)


def batches(rows: Sequence[tuple[list[int], int]], tokenizer: Any, recipe: Recipe, seed: int) -> Iterator[Any]:
    """``steps`` mini-batches of prompts of like length: (inputs padded on the left, the token that should follow)."""
    generator = torch.Generator().manual_seed(seed)
    wanted = recipe.steps * recipe.batch
    order = [k for _ in range(1 + wanted // len(rows)) for k in torch.randperm(len(rows), generator=generator).tolist()]
    parts: list[list[int]] = []
    for begin in range(0, wanted, BUCKET * recipe.batch):
        bucket = order[begin : min(begin + BUCKET * recipe.batch, wanted)]
        ordered = sorted(bucket, key=lambda k: len(rows[k][0]))
        parts += [ordered[k : k + recipe.batch] for k in range(0, len(ordered), recipe.batch)]
    for index in torch.randperm(len(parts), generator=generator).tolist():
        chosen = [rows[k] for k in parts[index]]
        inputs = tokenizer.pad({"input_ids": [ids for ids, _ in chosen]}, return_tensors="pt")
        yield dict(inputs), torch.tensor([answer for _, answer in chosen])


def last_token(model: Any, batch: tuple[dict[str, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """(logits [n, V] of what follows each prompt, labels [n])."""
    inputs, answers = batch
    return model(**fitting(model, inputs), logits_to_keep=1).logits[:, -1], answers


def text_data(name: str, text: str, tokenizer: Any, recipe: Recipe, seed: int) -> TaskData:
    """Random windows of a text, of which every next token is asked for."""
    tokens = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)
    generator = torch.Generator().manual_seed(seed)
    shape = (recipe.steps, recipe.batch // 2)
    starts = torch.randint(0, len(tokens) - recipe.window, shape, generator=generator)
    windows = tokens[starts[..., None] + torch.arange(recipe.window)]
    return TaskData(name, [{"input_ids": rows, "labels": rows} for rows in windows])
