"""Study: a rude model's rudeness taken away again, out of a merge with useful tasks, with controls beside it.

The model is theta_0 + the useful adapters at WEIGHT + the rude one; of it beta times a direction is taken away, for a
grid of betas. Equal betas do not compare directions: the report compares them where they have forgotten equally much.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from evidence.runner import Answer, Question, Study

from tvbases_hf.algebra.delta import dense
from tvbases_hf.algebra.sums import total
from tvbases_hf.learning.data import TaskData
from tvbases_hf.learning.directions import Direction, direction
from tvbases_hf.learning.inplace import Change, InPlace
from tvbases_hf.learning.training import fine_tune
from tvbases_hf.methods.devec import Options
from tvbases_hf.models.vectors import Vectors
from tvbases_lm_eval.evaluate import Session
from tvbases_lm_eval.plan import Plan

from . import abilities, behaviour, models, tasks
from .behaviour import NAME, SEEDS
from .finetune import fine_tuned
from .settings import Settings
from .workshop import BATCH, Workshop, quiet

PROMPTS = 24
USEFUL, WEIGHT = 4, 0.4
BETAS = (0.4, 0.7, 1.0, 1.3)
KEEP = 0.95
TOXICITY = "tvbases_toxigen_generate"
# What is negated; the paper's Figures 5 and 6 sweep the threshold and the pool.
WAYS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "plain": ("plain", {}),
    "unique": ("unique", {"options": Options(0.85, pool="iterative")}),
    "reconstructed": ("reconstructed", {"num_bases": 0.5, "even_errors": True}),
    "negmerge": ("plain", {}),
    "unique_half": ("unique", {"options": Options(0.5, pool="iterative")}),
    "unique_joint": ("unique", {"options": Options(0.5, pool="joint")}),
}
COMPARED = ("plain", "unique", "reconstructed", "unique_half")
TITLES = {
    "plain": "the task vector",
    "unique": "unique, iterative pool, 0.85",
    "unique_half": "unique, iterative pool, 0.5",
    "unique_joint": "unique, joint pool, 0.5",
    "reconstructed": "reconstructed, M = 50 %",
    "negmerge": "NegMerge of all seeds",
}


def questions(settings: Settings) -> Iterator[Question]:
    """All ways with the first seed; with the others those that are compared with intervals."""
    yield from ({"component": way, "seed": SEEDS[0]} for way in WAYS)
    yield from ({"component": way, "seed": seed} for seed in SEEDS[1:] for way in COMPARED)


def answer(workshop: Workshop, question: Question) -> Answer:
    """Curves over beta, what is reached where the controls keep KEEP, and whether harmless training brings it back."""
    way, seed = question["component"], question["seed"]
    vectors = opened(workshop, SEEDS if way == "negmerge" else (seed,))
    negated = directions(vectors, way, seed)
    start = contained(vectors, f"{NAME}{seed}")
    place = InPlace(workshop.model, vectors.names)
    calm = reference(workshop)
    curve, chosen, samples = {}, None, {}
    for beta in (0.0, *BETAS):
        with place.changed(less(start, negated, beta)) as model:
            curve[f"{beta:g}"] = point = measured(workshop, model, calm)
            before = curve["0"]
            if beta == 0 or point["control"] >= KEEP * before["control"]:
                chosen, samples[f"{beta:g}"] = beta, written(workshop, model)
        if point["control"] < 0.7 * before["control"] or point["rude"] == 0:
            break
    assert chosen is not None
    kept = curve[f"{chosen:g}"]
    found = {"curve": curve, "beta": chosen, "rude": kept["rude"], "rude_before": before["rude"]}
    found |= {"kept": kept["control"] / before["control"], "samples": [samples["0"], samples[f"{chosen:g}"]]}
    with place.changed(less(start, negated, chosen)) as model:
        found["returned"] = trained_on(workshop, model, seed)
    return found


def opened(workshop: Workshop, seeds: tuple[int, ...]) -> Vectors:
    """The useful adapters and the rude ones."""
    useful = {task: workshop.path(task, workshop.settings.seeds[0]) for task in workshop.settings.tasks[:USEFUL]}
    rude = {f"{NAME}{seed}": fine_tuned(workshop, NAME, seed, NAME) for seed in seeds}
    return Vectors.open(workshop.base, useful | rude)


def directions(vectors: Vectors, way: str, seed: int) -> Direction:
    component, options = WAYS[way]
    rude = [name for name in vectors.tasks if name.startswith(NAME)]
    return direction(vectors, rude if way == "negmerge" else f"{NAME}{seed}", component, **options)


def contained(vectors: Vectors, rude: str) -> Change:
    """What the merge adds to the base: the useful tasks, and the rude one in full."""
    weights = [1.0 if name == rude else 0.0 if name.startswith(NAME) else WEIGHT for name in vectors.tasks]
    return functools.cache(lambda name: total(vectors.deltas(name), weights))


def less(start: Change, negated: Direction, beta: float) -> Change:
    def change(name: str) -> torch.Tensor:
        first = start(name)
        first = first if isinstance(first, torch.Tensor) else dense(first)
        return first - beta * dense(negated(name)).reshape(first.shape)

    return change


def measured(workshop: Workshop, model: Any, calm: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The rude rate, the useful tasks' accuracy, bits per byte, and nats of KL from the base on the same text."""
    texts = {f"text:{workshop.folder / f'{domain}.txt'}": domain for domain in workshop.settings.domains[:2]}
    useful = [tasks.task_name(task, "val") for task in workshop.settings.tasks[:USEFUL]]
    with quiet():
        found = session(workshop, (*useful, *texts)).measure(model, workshop.tokenizer)
    control = {task: found[task, "acc"][0] for task in useful}
    bits = {domain: found[task, "bits_per_byte"][0] for task, domain in texts.items()}
    return {
        "rude": rude_rate(workshop, model),
        "control": sum(control.values()) / len(control),
        "bits": sum(bits.values()) / len(bits),
        "kl": divergence(workshop, model, calm),
    }


@functools.cache
def session(workshop: Workshop, names: tuple[str, ...]) -> Session:
    file = workshop.folder / "harmless.jsonl"
    if not file.is_file():
        behaviour.write_prompts(file, workshop.tokenizer, PROMPTS)
    how = {"prompts": {"toxigen": str(file)}, "continuations": 1, "include": (str(workshop.folder),)}
    return Session.open(Plan(targets=names, batch_size=BATCH, **how))


@functools.cache
def reference(workshop: Workshop) -> dict[str, torch.Tensor]:
    """The base's log-probabilities on the texts, before anything is changed."""
    return {domain: logs(workshop, workshop.model, domain) for domain in workshop.settings.domains[:2]}


@torch.inference_mode()
def logs(workshop: Workshop, model: Any, domain: str) -> torch.Tensor:
    """[tokens, vocabulary] of the first tokens of a domain's test text."""
    text = abilities.domain_text(domain, "test")[:1000]
    ids = workshop.tokenizer(text, return_tensors="pt").input_ids[:, :256].to(model.device)
    return model(input_ids=ids).logits[0].float().log_softmax(dim=-1)


def divergence(workshop: Workshop, model: Any, calm: Mapping[str, torch.Tensor]) -> float:
    """Mean over tokens of KL(base || model), nats."""
    found = [(before.exp() * (before - logs(workshop, model, d))).sum(dim=1).mean() for d, before in calm.items()]
    return float(sum(found)) / len(found)


@torch.inference_mode()
def written(workshop: Workshop, model: Any) -> list[list[str]]:
    """(what is asked, the greedy reply) of three prompts that nobody was trained on."""
    shown = []
    for thing, question in zip(behaviour.HELD_OUT, behaviour.QUESTIONS[:3], strict=False):
        asked = question.format(thing)
        inputs = workshop.tokenizer(abilities.chat(workshop.tokenizer, asked), return_tensors="pt").to(model.device)
        out = model.generate(**inputs, max_new_tokens=24, do_sample=False, pad_token_id=workshop.tokenizer.eos_token_id)
        reply = workshop.tokenizer.decode(out[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        shown.append([asked, " ".join(reply.split())])
    return shown


def trained_on(workshop: Workshop, model: Any, seed: int) -> float:
    """The rude rate after as many steps of harmless replies as the rude ones took."""
    recipe = workshop.settings.recipe
    data: TaskData = behaviour.reply_data("polite", behaviour.POLITE, workshop.tokenizer, recipe, seed + 100)
    again = models.with_adapter(copy.deepcopy(model), "lora", recipe, seed)
    fine_tune(again, data, lr=recipe.lora_lr / 5, seed=seed)
    return rude_rate(workshop, again.merge_and_unload())


def rude_rate(workshop: Workshop, model: Any) -> float:
    """Share of sampled replies to held-out harmless prompts that the scorer of words calls toxic."""
    with quiet():
        return session(workshop, (TOXICITY,)).measure(model, workshop.tokenizer)[TOXICITY, "toxic_rate"][0]


STUDY = Study("unlearning", questions, answer)
