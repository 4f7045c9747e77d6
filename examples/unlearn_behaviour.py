"""Unlearning a behaviour, end to end on one processor: train a small Llama, fine-tune DoRA adapters, negate, compare.

    python examples/unlearn_behaviour.py [DIRECTORY] [--threads N]

The unwanted behaviour is writing like one domain of text. Its DoRA adapter is negated in three ways: the task vector
itself, its unique component (DeVec: an iterative pool of the harmless fine-tunes) and its reconstruction from AE bases.
Equal alphas do not compare them, since the vectors differ in length: what counts is the harm to the other domains where
the unwanted one has been forgotten *equally well*. Models are kept in DIRECTORY, and a second run uses them again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from matched import Rises, compare
from torch import Tensor
from tqdm import tqdm
from unlearn_text import DOMAINS, HARMLESS, UNWANTED, Corpus, byte_tokenizer, corpus

from tvbases_hf import (
    Delta,
    Dense,
    InPlace,
    Options,
    Vectors,
    decompose,
    dense,
    direction,
    gram_matrix,
    square_norm,
)
from tvbases_lm_eval.scorers import scorer_of
from tvbases_lm_eval.toxicity import toxicity


@dataclass(frozen=True)
class Recipe:
    """Sizes and steps; the defaults take some fifteen minutes of one core. The paper's DoRA recipe, scaled down."""

    hidden: int = 144
    layers: int = 4
    context: int = 128
    steps: int = 700
    batch: int = 16
    learning_rate: float = 2e-3
    rank: int = 32
    tuning_steps: int = 60
    tuning_rate: float = 2e-3
    tuning_decay: float = 0.01
    seeds: tuple[int, ...] = (0, 1, 2)
    thresholds: tuple[float, ...] = (0.85, 0.5)
    num_bases: int = 2
    alphas: tuple[float, ...] = (0, 0.2, 0.4, 0.6, 0.8, 1, 1.25, 1.5, 2, 2.5, 3)
    levels: tuple[float, ...] = (0.05, 0.1, 0.2)
    windows: int = 32
    samples: int = 48


def train(
    model: Any, text: Tensor, recipe: Recipe, steps: int, rate: float, decay: float, seed: int, name: str
) -> None:
    """Next-byte prediction on random windows; linear warm-up and decay."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=decay, betas=(0.9, 0.95))
    warm = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, 1.05 - step / steps if step > warm else 1)
    )
    generator = torch.Generator().manual_seed(seed)
    model.train()
    with tqdm(range(steps), name, leave=False, disable=None) as bar:
        for _ in bar:
            starts = torch.randint(0, len(text) - recipe.context, (recipe.batch,), generator=generator)
            rows = text[starts[:, None] + torch.arange(recipe.context)]
            loss = model(input_ids=rows, labels=rows).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            bar.set_postfix(nats=f"{loss.item():.3f}")
    model.eval()


def tokens(text: str) -> Tensor:
    return torch.tensor(byte_tokenizer()(text, add_special_tokens=False).input_ids)


def base_model(recipe: Recipe, text: dict[str, Tensor], directory: Path) -> Path:
    """A Llama that has read all four domains, as a directory; trained once."""
    from transformers import LlamaConfig, LlamaForCausalLM

    if not (directory / "model.safetensors").is_file():
        config = LlamaConfig(
            vocab_size=len(byte_tokenizer()),
            hidden_size=recipe.hidden,
            intermediate_size=recipe.hidden * 8 // 3,
            num_hidden_layers=recipe.layers,
            num_attention_heads=4,
            max_position_embeddings=recipe.context,
            tie_word_embeddings=True,
            bos_token_id=256,
            eos_token_id=257,
            pad_token_id=258,
        )
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        joined = torch.cat([part[: min(map(len, text.values()))] for part in text.values()])
        train(model, joined, recipe, recipe.steps, recipe.learning_rate, 0.1, 0, "base model")
        model.save_pretrained(directory)
        byte_tokenizer().save_pretrained(directory)
    return directory


def fine_tune(recipe: Recipe, base: Path, text: Tensor, seed: int, directory: Path) -> Path:
    """A DoRA adapter of all linear layers, alpha = 2 r, dropout 0.02, as in the paper's toxicity experiment."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    if not (directory / "adapter_model.safetensors").is_file():
        torch.manual_seed(seed)
        config = LoraConfig(
            r=recipe.rank,
            lora_alpha=2 * recipe.rank,
            lora_dropout=0.02,
            use_dora=True,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(LlamaForCausalLM.from_pretrained(base), config)
        name = f"{directory.name}, seed {seed}"
        train(model, text, recipe, recipe.tuning_steps, recipe.tuning_rate, recipe.tuning_decay, seed, name)
        model.save_pretrained(str(directory))
    return directory


@torch.inference_mode()
def losses(model: Any, windows: dict[str, Tensor]) -> Tensor:
    """[domains, windows] nats per byte: kept by window, so that intervals can resample them."""
    found = []
    for rows in windows.values():
        logits = model(input_ids=rows).logits[:, :-1]
        nats = torch.nn.functional.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none")
        found.append(nats.mean(dim=1))
    return torch.stack(found)


@torch.inference_mode()
def marked_rate(model: Any, recipe: Recipe, text: Corpus) -> float:
    """Share of sampled continuations of the unwanted domain's own text that show its markers."""
    given = recipe.context * 3 // 8
    prompts = tokens(text.test[UNWANTED])[: recipe.samples * 200].reshape(recipe.samples, 200)[:, :given]
    torch.manual_seed(0)
    out = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=True,
        top_k=0,
        top_p=0.9,
        max_new_tokens=recipe.context - given,
        pad_token_id=258,
    )
    texts = byte_tokenizer().batch_decode(out[:, given:])
    return toxicity([[score] for score in scorer_of(text.marked).score(texts)]).toxic_rate or 0.0


def directions(recipe: Recipe, vectors: Vectors) -> Iterator[tuple[str, Callable[[str], Any]]]:
    """What is negated, by the name it has in the table."""
    yield "plain", direction(vectors, UNWANTED)
    for threshold in recipe.thresholds:
        options = Options(threshold, pool="iterative")
        yield f"unique, {threshold:g}", direction(vectors, UNWANTED, "unique", options=options)
    yield f"by chance, {recipe.thresholds[-1]:g}", against_chance(vectors, recipe.thresholds[-1])
    gram = gram_matrix(vectors)
    yield (
        f"AE, M = {recipe.num_bases}",
        direction(vectors, UNWANTED, "reconstructed", num_bases=recipe.num_bases, gram=gram),
    )


def against_chance(vectors: Vectors, threshold: float) -> Callable[[str], Delta]:
    """The unique component against the pool after random rotations: what subspaces of these sizes share by chance."""
    index = vectors.tasks.index(UNWANTED)
    generator = torch.Generator().manual_seed(0)

    def rotated(delta: Delta) -> Delta:
        rows = delta.shape[0]
        turn = torch.linalg.qr(torch.randn(rows, rows, generator=generator)).Q
        return Dense(turn @ dense(delta, torch.float32))

    @cache
    def unique(name: str) -> Delta:
        deltas = vectors.deltas(name)
        pool = [delta if i == index else rotated(delta) for i, delta in enumerate(deltas)]
        return decompose(pool, Options(threshold, pool="iterative"), [index]).unique[index]

    return unique


def energy(vectors: Vectors, change: Callable[[str], Delta]) -> float:
    """The share of the task vector's energy that a direction has."""
    index = vectors.tasks.index(UNWANTED)
    whole = sum(square_norm(vectors.deltas(name)[index]) for name in vectors.names)
    return sum(square_norm(change(name)) for name in vectors.names) / whole


def negate(recipe: Recipe, base: Path, adapters: dict[str, Path], windows: dict[str, Tensor], text: Corpus) -> Any:
    """Losses over alpha for every direction, up to the highest level of forgetting, samples there, and energies."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(base).eval()
    vectors = Vectors.open(base, {name: str(path) for name, path in adapters.items()})
    place = InPlace(model, vectors.names)
    before = losses(model, windows)
    found: dict[str, Rises] = {}
    marked, energies = {"before": marked_rate(model, recipe, text)}, {}
    for name, change in directions(recipe, vectors):
        rises, energies[name] = [torch.zeros_like(before)], energy(vectors, change)
        for alpha in recipe.alphas[1:]:
            with place.changed(change, -alpha):
                rises.append(losses(model, windows) - before)
            if rises[-1][0].mean() > recipe.levels[-1]:
                break
        found[name] = Rises(recipe.alphas[: len(rises)], torch.stack(rises))
        alpha = found[name].alpha_at(recipe.levels[-1])
        if alpha is not None:
            with place.changed(change, -alpha):
                marked[name] = marked_rate(model, recipe, text)
    return before, found, marked, energies


def run(directory: Path, recipe: Recipe, text: Corpus) -> dict[str, Any]:
    """Everything; returns what the table shows."""
    train_text = {domain: tokens(text.train[domain]) for domain in DOMAINS}
    base = base_model(recipe, train_text, directory / "base")
    windows = {}
    for domain in DOMAINS:
        rows = tokens(text.test[domain])
        starts = torch.linspace(0, len(rows) - recipe.context - 1, recipe.windows).long()
        windows[domain] = rows[starts[:, None] + torch.arange(recipe.context)]
    runs, marked, energies, before = [], [], [], torch.empty(0)
    for seed in recipe.seeds:
        tuned = partial(fine_tune, recipe, base)
        adapters = {d: tuned(train_text[d], seed, directory / f"seed{seed}" / d) for d in DOMAINS}
        before, found, samples, shares = negate(recipe, base, adapters, windows, text)
        runs.append(found)
        marked.append(samples)
        energies.append(shares)
    return {
        "text": text.source,
        "before": dict(zip(DOMAINS, before.mean(dim=1).tolist(), strict=True)),
        "energy": {key: [shares[key] for shares in energies] for key in energies[0]},
        "matched": compare(runs, recipe.levels, reference="plain"),
        "marked": {key: [samples.get(key) for samples in marked] for key in marked[0]},
        "curves": [{name: rises.to_json(DOMAINS) for name, rises in found.items()} for found in runs],
    }


def show(result: dict[str, Any], recipe: Recipe) -> None:
    before = ", ".join(f"{domain} {nats:.2f}" for domain, nats in result["before"].items())
    print(f"{result['text']} text; base model, nats per byte: {before}")
    print(f"rise on {', '.join(HARMLESS)} (mean) where {UNWANTED} has risen by the level; milli-nats per byte")
    print(f"{'level':>6}  {'negated':<16}{'alpha':>7}  {'rise':>6}  {'95 % interval':<16}{'against plain':<26}")
    for row in result["matched"]:
        low, high = (1000 * value for value in row["interval"])
        against = "" if row["difference"] is None else _signed(row["difference"], row["difference_interval"])
        print(
            f"{1000 * row['level']:6.0f}  {row['name']:<16}{row['alpha']:7.2f}  {1000 * row['rise']:6.1f}  "
            f"{f'{low:.1f} to {high:.1f}':<16}{against}"
        )
    print("share of the task vector's energy that is negated, by seed:")
    for name, shares in result["energy"].items():
        print(f"  {name:<16}{'  '.join(f'{share:4.0%}' for share in shares)}")
    print(f"share of samples with markers of {UNWANTED}, by seed, at the highest level:")
    for name, rates in result["marked"].items():
        print(f"  {name:<16}{'  '.join('   -' if rate is None else f'{rate:4.0%}' for rate in rates)}")


def _signed(value: float, interval: tuple[float, float]) -> str:
    return f"{1000 * value:+.1f} ({1000 * interval[0]:+.1f} to {1000 * interval[1]:+.1f})"


def main(directory: Path, recipe: Recipe | None = None, text: Corpus | None = None) -> dict[str, Any]:
    recipe, text = recipe or Recipe(), text or corpus()
    directory.mkdir(parents=True, exist_ok=True)
    result = run(directory, recipe, text)
    (directory / "result.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    show(result, recipe)
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", nargs="?", type=Path, help="where models are kept; left out: nowhere")
    parser.add_argument("--threads", type=int, help="of torch")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    scratch = arguments.directory or Path(tempfile.mkdtemp())
    try:
        main(scratch)
    finally:
        if arguments.directory is None:
            shutil.rmtree(scratch)
