"""Compress fine-tuned models into a basis directory, load it back, restore one task: on four tiny models made here.

    python examples/quickstart.py [DIRECTORY]

With your own models, leave out `make_models` and give their paths or Hub ids.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from tvbases_hf import Basis, Vectors, ae_bases, gram_matrix

TASKS = ("math", "code", "chat", "law")


def make_models(directory: Path) -> None:
    """A random base, and fine-tunes that share one direction and have one of their own."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"embed.weight": (200, 64), "layers.0.weight": (64, 64), "layers.1.weight": (64, 64), "norm.bias": (64,)}
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    common = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for name in ("base", *TASKS):
        own = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
        moved = 0.0 if name == "base" else 0.01
        (directory / name).mkdir(parents=True)
        weights = {key: value + moved * (common[key] + own[key]) for key, value in base.items()}
        save_file(weights, directory / name / "model.safetensors")


def main(directory: Path) -> None:
    make_models(directory)
    vectors = Vectors.open(directory / "base", {task: directory / task for task in TASKS})

    gram = gram_matrix(vectors)
    print("cosine similarities", [[round(value, 2) for value in row] for row in gram.cosine.tolist()])

    # Two bases for four tasks. Balanced: every task weighs the same in the sum of the bases.
    weights = ae_bases(gram.matrix, 2)
    print(f"unexplained energy {weights.loss / weights.total:.1%}, least possible {weights.bound / weights.total:.1%}")
    print("weight of each task in the sum of the bases", [round(w, 3) for w in weights.effective_weights.tolist()])

    Basis.build(vectors, 2, gram=gram).save_pretrained(directory / "basis")
    basis = Basis.from_pretrained(directory / "basis")
    for task, error in zip(basis.tasks, basis.info.task_error, strict=True):
        print(f"{task}: relative error {error:.1%}")
    print("restored", basis.restore("code", base=directory / "base", out=directory / "code-restored").name)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as scratch:
            main(Path(scratch))
