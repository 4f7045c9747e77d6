"""A sentence encoder with a frozen zero-shot head: fine-tuning changes the encoder and nothing else.

As in the papers' CLIP experiments the classifier is made of text: logits = 20 * cosine between the mean-pooled
sentence embedding and the *base* model's embeddings of the label descriptions. So fine-tunes of one base differ by
their task vectors only, and one merged encoder can be asked about every task.

Nothing here knows where tasks come from: a task is {"labels": [description, ...], "train" | "val" | "test":
[[text, label index], ...]}.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tvbases_hf.errors import MissingExtraError
from tvbases_hf.learning.data import TaskData, stratified

try:
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging as transformers_logging
except ImportError as error:
    raise MissingExtraError(f'transformers is missing ({error}); pip install "tvbases-hf[demo]"') from error

Ids = list[list[int]]
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Recipe:
    """How a fine-tune is made: AdamW without weight decay or dropout, linear warm-up and decay, fixed seed."""

    lr: float = 5e-5
    epochs: int = 1
    batch: int = 16
    warmup: float = 0.1
    clip: float = 1.0
    max_tokens: int = 48
    scale: float = 20.0
    seed: int = 0

    def steps(self, examples: int) -> int:
        return self.epochs * -(-examples // self.batch)


@dataclass(frozen=True)
class Examples:
    """Token ids, one list per sentence, and labels [n] int64."""

    ids: Ids
    labels: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def first(self, n: int) -> Examples:
        return Examples(self.ids[:n], self.labels[:n])


@dataclass(frozen=True)
class Problem:
    """A task made ready for the encoder: the head [labels, dim] float32 and the tokenised splits."""

    head: Tensor
    train: Examples
    val: Examples
    test: Examples


def load(path: str | Path) -> tuple[nn.Module, Any]:
    """(encoder without dropout, tokenizer) of a checkpoint directory, float32."""
    with _quiet():
        return AutoModel.from_pretrained(path, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(path)


def save(model: nn.Module, tokenizer: Any, path: str | Path) -> None:
    """A plain Hugging Face checkpoint directory: config.json, model.safetensors, tokenizer."""
    with _quiet():
        model.save_pretrained(path)  # type: ignore[operator]
        tokenizer.save_pretrained(path)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar of transformers' own for a matter of milliseconds."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def prepare(model: nn.Module, tokenizer: Any, task: Mapping[str, Sequence], max_tokens: int = 48) -> Problem:
    """Tokenise a task, and embed its label descriptions with `model`, which has to be the base."""
    splits = {}
    for name in SPLITS:
        texts = [text for text, _ in task[name]]
        labels = torch.tensor([label for _, label in task[name]])
        splits[name] = Examples(tokenise(tokenizer, texts, max_tokens), labels)
    return Problem(embed(model, tokenise(tokenizer, task["labels"], max_tokens)), **splits)


def tokenise(tokenizer: Any, texts: Sequence[str], max_tokens: int) -> Ids:
    return tokenizer(list(texts), truncation=True, max_length=max_tokens)["input_ids"]


def forward(model: nn.Module, ids: Ids) -> Tensor:
    """Mean-pooled, L2-normalised embeddings [n, dim] of one batch; padding does not count."""
    device = next(model.parameters()).device
    tokens = nn.utils.rnn.pad_sequence([torch.tensor(i) for i in ids], batch_first=True).to(device)
    lengths = torch.tensor([len(i) for i in ids], device=device)
    mask = torch.arange(tokens.shape[1], device=device) < lengths[:, None]
    hidden = model(input_ids=tokens, attention_mask=mask.long()).last_hidden_state.float()
    mean = (hidden * mask[..., None]).sum(1) / lengths[:, None]
    return nn.functional.normalize(mean, dim=1)


@torch.no_grad()
def embed(model: nn.Module, ids: Ids, batch: int = 64) -> Tensor:
    """Embeddings [n, dim] float32 on the CPU, in the order given; sentences of like length share a batch."""
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    parts = [forward(model, [ids[i] for i in order[k : k + batch]]) for k in range(0, len(order), batch)]
    return torch.cat(parts).cpu()[torch.tensor(order).argsort()]


def logits(embeddings: Tensor, head: Tensor, scale: float = 20.0) -> Tensor:
    """scale * cosine [n, labels]; the rows of both have length 1."""
    return scale * embeddings @ head.to(embeddings.device).T


def problem_data(
    name: str, problem: Problem, split: str = "val", *, count: int | None = None, batch: int = 16, seed: int = 0
) -> TaskData:
    """A split of a task for the methods that need data; of ``count`` examples, in which every label has its share.

    A batch is (token ids, labels [n]).
    """
    examples: Examples = getattr(problem, split)
    rows = range(len(examples)) if count is None else stratified(examples.labels.tolist(), count, seed=seed)
    parts = [list(rows[k : k + batch]) for k in range(0, len(rows), batch)]

    def readout(model: nn.Module, asked: tuple[Ids, Tensor]) -> tuple[Tensor, Tensor]:
        scores = logits(forward(model, asked[0]), problem.head)
        return scores, asked[1].to(scores.device)

    return TaskData(name, [([examples.ids[i] for i in part], examples.labels[part]) for part in parts], readout)


def accuracy(model: nn.Module, head: Tensor, examples: Examples) -> float:
    """Per cent of `examples` whose highest logit is the label."""
    return accuracies(model, [(head, examples)])[0]


def accuracies(model: nn.Module, tasks: Sequence[tuple[Tensor, Examples]]) -> list[float]:
    """Per cent correct for each (head, examples). All sentences are embedded together, which pads less."""
    embeddings = embed(model, [ids for _, examples in tasks for ids in examples.ids])
    parts = embeddings.split([len(examples) for _, examples in tasks])
    right = [logits(part, head).argmax(1) == e.labels for part, (head, e) in zip(parts, tasks, strict=True)]
    return [100.0 * r.sum().item() / len(r) for r in right]


def batches(examples: Examples, recipe: Recipe) -> Iterator[tuple[Ids, Tensor]]:
    """Shuffled mini-batches of all epochs, the same for the same seed."""
    generator = torch.Generator().manual_seed(recipe.seed)
    for _ in range(recipe.epochs):
        for rows in torch.randperm(len(examples), generator=generator).split(recipe.batch):
            yield [examples.ids[i] for i in rows.tolist()], examples.labels[rows]


def fine_tune(
    model: nn.Module, head: Tensor, examples: Examples, recipe: Recipe, on_step: Callable[[], object] = lambda: None
) -> nn.Module:
    """Fine-tune `model` in place and return it. `on_step` is called after every update."""
    model.eval()  # no dropout
    total = recipe.steps(len(examples))
    warm = max(1, round(recipe.warmup * total))
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: min((k + 1) / warm, (total - k) / total))
    for ids, labels in batches(examples, recipe):
        scores = logits(forward(model, ids), head, recipe.scale)
        nn.functional.cross_entropy(scores, labels.to(scores.device)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        on_step()
    return model
