"""The demo in miniature: three tasks, few sentences, and a base of random weights."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from tvbases_demo import Settings, store
from tvbases_demo import encoder as enc
from tvbases_demo.encoder import Recipe
from tvbases_demo.tasks import KINDS, make_task

MINIATURE = Settings(
    tasks=("tense", "voice", "sentiment"),
    sizes=(24, 12, 18),
    num_bases=2,
    validation=6,
    paper_seeds=1,
    subsets=2,
    recipe=Recipe(lr=3e-3, epochs=10),
)


def small_base(directory: Path) -> None:
    """A BertModel of random weights where the demo looks for its base: all else is as with the real one."""
    from transformers import BertConfig, BertModel, BertTokenizer

    texts = [t for n in MINIATURE.tasks for split in enc.SPLITS for t, _ in make_task(n, sizes=MINIATURE.sizes)[split]]
    texts += [label for name in MINIATURE.tasks for label in KINDS[name].labels]
    words = sorted({word for text in texts for word in re.findall(r"\w+|[^\w\s]", text.lower())})
    directory.mkdir(parents=True)
    vocabulary = directory / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]) + "\n")
    config = BertConfig(
        vocab_size=len(words) + 5, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    torch.manual_seed(0)
    enc.save(BertModel(config), BertTokenizer(vocab_file=str(vocabulary)), directory)
    (directory / store.MARKER).write_text("{}")
