"""The other sections: negation, online, out of domain, singular vectors, shared components, adapters, bounds."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping

from evidence.markdown import megabytes, span, spread, table
from evidence.runner import Answers

from .. import negation, online, singular
from ..devec import PUBLISHED
from ..kinds import TITLES
from ..settings import Settings
from . import paper

Found = Mapping[str, Answers]


def forgetting(found: Found, settings: Settings) -> str:
    rows = []
    for kind, title in negation.TITLES.items():
        if not (cell := found["negation"].of(kind=kind)):
            continue
        published = paper.NEGATION.get(kind)
        rows.append([
            title,
            spread([a["target"] for a in cell]),
            f"{statistics.mean(a['control'] for a in cell):.1f}",
            span(a["alpha"] for a in cell),
            f"{statistics.mean(a['error'] for a in cell):.2f} ({max(a['error'] for a in cell):.2f})",
            " / ".join(f"{value}" for value in published) if published else "",
        ])  # fmt: skip
    one = found["negation"].of(kind="true")
    before = statistics.mean(a["target_before"] for a in one), statistics.mean(a["control_before"] for a in one)
    headers = ["what is negated", "target ↓", "control", "α", "squared error of τ̂ (largest)", "paper: target / control"]
    return (
        f"Before: target {before[0]:.1f}, control {before[1]:.1f}.\n\n{table(headers, rows)}\n\nOver all tasks and "
        "methods the correlation between the squared error of a task's reconstruction and what is forgotten, as a "
        f"share of what the true vector forgets, is {error_and_forgetting(found):.2f}."
    )


def error_and_forgetting(found: Found) -> float:
    """Pearson's correlation over (method, task), or NaN; RandProj, which forgets nothing, is left out."""
    true = {q["task"]: a["target_before"] - a["target"] for q, a in found["negation"] if q["kind"] == "true"}
    pairs = [
        (a["error"], (a["target_before"] - a["target"]) / true[q["task"]])
        for q, a in found["negation"]
        if q["kind"] not in ("true", "rand_proj") and true[q["task"]] > 0
    ]
    try:
        return statistics.correlation(*zip(*pairs, strict=True))
    except statistics.StatisticsError:  # one of the two is the same everywhere
        return float("nan")


def in_order(found: Found, settings: Settings) -> str:
    rows = []
    for method, title in online.TITLES.items():
        cell = found["online"].of(method=method)
        merges = [[a["accuracy"].get(merge) for a in cell] for merge in online.UNTUNED]
        published = [paper.ONLINE.get((method, merge), "") for merge in online.UNTUNED]
        rows.append([
            title,
            *(spread([v for v in values if v is not None], 2) for values in merges),
            len(cell),
            megabytes(statistics.mean(a["bytes"] for a in cell)),
            *published,
        ])  # fmt: skip
    headers = ["method", "task arithmetic, α 0.3", "TSV-M, α 1", "orders", "MB kept", "paper: TA", "TSV-M"]
    return table(headers, rows)


def unseen(found: Found, settings: Settings) -> str:
    answers = found["ood"]
    kinds = list(dict.fromkeys(q["kind"] for q, _ in answers))
    rows = []
    for kind in kinds:
        cells = [spread([a["accuracy"] for a in answers.of(kind=kind, task=task)]) for task in settings.unseen]
        mean = statistics.mean(a["accuracy"] for a in answers.of(kind=kind))
        rows.append([TITLES[kind], *cells, f"{mean:.1f}", paper.OOD.get(kind, "")])
    zero = [f"{answers.of(task=task)[0]['zero_shot']:.1f}" for task in settings.unseen]
    return table(["aTLAS over", *settings.unseen, "mean", "paper"], [["zero-shot", *zero, "", ""], *rows])


def singular_merge(found: Found, settings: Settings) -> str:
    answers = found["ablation"]
    own = statistics.mean(a["own"] for q, a in found["finetune"] if q["kind"] == "full" and q["task"] in settings.tasks)
    rows = [
        [parts, *_ablated(answers.one(parts=parts, rank=None), own), paper.ABLATION.get(parts, "")]
        for parts in singular.PARTS
    ]
    rows += [
        [f"both, {rank:g} of the components per task", *_ablated(answers.one(parts="both", rank=rank), own), ""]
        for rank in singular.RANKS
    ]
    return table(["TSV-M's parts", "α 1", "best α", "normalised", "paper (normalised)"], rows)


def untuned(found: Found, settings: Settings) -> str:
    answers = found["untuned"]
    alphas = list(dict.fromkeys(q["alpha"] for q, _ in answers))
    rows = [
        [TITLES[kind], *(spread([a["accuracy"] for a in answers.of(kind=kind, alpha=alpha)]) for alpha in alphas)]
        for kind in dict.fromkeys(q["kind"] for q, _ in answers)
    ]
    return table([f"TSV-M over M = {settings.half}", *(f"α {alpha:g}" for alpha in alphas)], rows)


def _ablated(answer: dict, own: float) -> Iterator[str]:
    yield f"{answer['at_one']:.1f}"
    yield f"{answer['accuracy']:.1f} (α {answer['alpha']:g})"
    yield f"{100 * answer['accuracy'] / own:.1f}"


def singular_compression(found: Found, settings: Settings) -> str:
    first = settings.seeds[0]
    own = [
        a["own"]
        for q, a in found["finetune"]
        if (q["kind"], q["seed"]) == ("full", first) and q["task"] in settings.tasks
    ]
    rows = [["whole task vectors", "100 %", f"{statistics.mean(own):.1f}", "100"]]
    for question, answer in sorted(found["compression"], key=lambda pair: -pair[1]["share"]):
        name = question["rule"] or f"budget {question['budget']:g}"
        normalised = 100 * answer["accuracy"] / statistics.mean(own)
        rows.append([name, f"{100 * answer['share']:.1f} %", f"{answer['accuracy']:.1f}", f"{normalised:.1f}"])
    return table(["rank rule", "of the matrices' bytes", "own accuracy", "normalised"], rows)


def shared(found: Found, settings: Settings) -> str:
    rows = []
    for question, answer in found["fractions"]:
        name = "LoRA, its own rank" if question["kind"] == "lora" else question["rule"]
        cells = [f"{100 * answer['shared'][t]:.1f} ({100 * answer['chance'][t]:.1f})" for t in answer["shared"]]
        rows.append([name, f"{answer['rank']} of {answer['rows']}", *cells])
    thresholds = list(found["fractions"].found[0][1]["shared"])
    return table(["rank rule", "mean rank", *(f"threshold {t}" for t in thresholds)], rows)


def shared_gain(found: Found, settings: Settings) -> str:
    rows = []
    for question, answer in found["gains"]:
        title = {"task_arithmetic": "task arithmetic", "adamerging": "AdaMerging"}[question["method"]]
        added = "" if question["components"] == "none" else f"{question['rank']}, threshold {question['threshold']}"
        cell = question["method"], question["components"]
        published = "another protocol" if cell == ("task_arithmetic", "shared") else paper.DEVEC[cell]
        rows.append([title, added or "vectors alone", f"{answer['accuracy']:.1f}", published])
    return table(["method", "with the shared components of pairs", "accuracy", "paper"], rows)


def trained_coefficients(found: Found, settings: Settings) -> str:
    """All tasks beside the paper's figures, then unseen tasks, vectors left out, and the sweeps."""
    rows = []
    for question, answer in found["devec_trained"]:
        pairs = question["components"] == "pairs"
        added = f"{question['rank']}, threshold {question['threshold']}" if pairs else "vectors alone"
        asked, accuracy, published = "all tasks", answer["accuracy"], ""
        if question["task"]:
            asked = f"{question['task']}, unseen"
        elif question["left_out"]:
            asked, accuracy = f"{question['left_out']}, its vector left out", answer["own"]
        elif not pairs or (question["rank"], question["threshold"]) == PUBLISHED:
            published = f"{paper.DEVEC['task_arithmetic', 'shared' if pairs else 'none']:.1f}"
        rows.append([asked, added, f"{accuracy:.1f}", published])
    return table(["accuracy on", "with the shared components of pairs", "measured", "paper"], rows)


def adapter_bases(found: Found, settings: Settings) -> str:
    rows = []
    for question, answer in found["adapters"]:
        budget = "the adapters" if question["budget"] is None else f"{question['budget']:.0%}, {question['method']}"
        rows.append([
            f"{question['kind'].replace('lora', 'LoRA').replace('dora', 'DoRA')}, {budget}",
            answer["chosen"],
            f"{answer['bytes'] / 1e6:.2f}",
            f"{answer['error']:.4f}",
            f"{answer['own']:.1f}",
            f"{answer['merged']:.1f} (α {answer['alpha']:g})",
        ])  # fmt: skip
    return table(["adapters", "kept as", "MB", "squared error", "own accuracy", "merged"], rows)


def theory(found: Found, settings: Settings) -> str:
    rows = []
    for question, answer in found["bounds"]:
        for side in answer["sides"]:
            ratio = side["measured"] / side["bound"] if side["bound"] else float("nan")
            rows.append([
                question["task"],
                f"{side['theorem']}, {side['over']}",
                f"{side['measured']:.3g}",
                f"{side['bound']:.3g}",
                f"{ratio:.2g}",
                "yes" if side["holds"] else "**no**",
                ", ".join(side["broken"]) or "",
            ])  # fmt: skip
    return table(["task", "theorem", "loss", "bound", "loss / bound", "holds", "assumptions that do not"], rows)
