"""Rank-8 LoRAs of a small encoder, really trained for a moment on related tasks, from one seed or from several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

WORDS, LABELS, LENGTH, BATCH = 64, 4, 12, 32


def trained_adapters(
    root: Path, *, one_seed: bool, tasks: int = 3, steps: int = 40, hidden: int = 64
) -> dict[str, Path]:
    """The base as ``root/base`` and one adapter per task beside it, by name."""
    from peft import LoraConfig, get_peft_model
    from transformers import BertModel

    base = _base(root / "base", hidden)
    generator = torch.Generator().manual_seed(1)
    common = torch.randn(WORDS, LABELS, generator=generator)
    head = nn.functional.normalize(torch.randn(LABELS, hidden, generator=generator), dim=1)
    paths = {}
    for task in range(tasks):
        teacher = common + torch.randn(WORDS, LABELS, generator=generator)
        torch.manual_seed(0 if one_seed else 10 + task)
        model: Any = BertModel.from_pretrained(base, add_pooling_layer=False).eval()
        config = LoraConfig(r=8, lora_alpha=16, target_modules=["query", "key", "value", "dense"])
        model = get_peft_model(model, config)
        _train(model, head, teacher, steps, torch.Generator().manual_seed(100 + task))
        paths[f"task{task}"] = root / f"task{task}"
        model.save_pretrained(str(paths[f"task{task}"]))
    return paths


def _base(directory: Path, hidden: int) -> Path:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=WORDS,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(directory)
    return directory


def _train(model: Any, head: Tensor, teacher: Tensor, steps: int, generator: torch.Generator) -> None:
    """The label of a sentence is that of its words' mean score under the teacher."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)
    for _ in range(steps):
        words = torch.randint(0, WORDS, (BATCH, LENGTH), generator=generator)
        labels = teacher[words].mean(1).argmax(1)
        pooled = nn.functional.normalize(model(input_ids=words).last_hidden_state.mean(1), dim=1)
        nn.functional.cross_entropy(20 * pooled @ head.T, labels).backward()
        optimizer.step()
        optimizer.zero_grad()
