"""The merges that are compared, each as an ordinary mergekit YAML, and the vectors that they are made of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tvbases_hf.merging.merge import Merge
from tvbases_mergekit import open_merge

from .settings import Settings
from .workshop import Workshop


@dataclass(frozen=True)
class Method:
    """``name`` as in a YAML, with ``parameters``; ``start`` is where the search for alpha begins."""

    title: str
    name: str
    start: float = 0.4
    parameters: Mapping[str, Any] = field(default_factory=dict)
    of: str = "tvbases"


METHODS: dict[str, Method] = {
    "task_arithmetic": Method("task arithmetic", "task_arithmetic", of="mergekit"),
    "tsv": Method("TSV-Merge", "tsv", 1.0),
    "iso_c": Method("Iso-C", "iso_c", 4.0),
    "iso_cts": Method("Iso-CTS", "iso_cts", 2.5),
    "ties": Method("TIES, density 0.2", "ties", 1.25, {"density": 0.2}, "mergekit"),
    "dare_linear": Method("DARE, density 0.5", "dare_linear", 0.4, {"density": 0.5}, "mergekit"),
    "dare_ties": Method("DARE-TIES, density 0.5", "dare_ties", 0.6, {"density": 0.5}, "mergekit"),
    "della": Method("DELLA, density 0.5", "della", 1.0, {"density": 0.5, "epsilon": 0.15}, "mergekit"),
    "breadcrumbs": Method("Breadcrumbs", "breadcrumbs", 0.4, {"density": 0.9, "gamma": 0.01}, "mergekit"),
    "regmean_rows": Method("data-free RegMean, rows", "regmean_datafree", 1.0, {"side": "row"}),
    "regmean_columns": Method("data-free RegMean, columns", "regmean_datafree", 1.0, {"side": "column"}),
    "regmean_both": Method("data-free RegMean, both", "regmean_datafree", 1.0, {"side": "both"}),
    "spectrum": Method("task arithmetic, spectrum ¼", "task_arithmetic_of_ours", 3.0, {"spectrum": 0.25}),
    "svc": Method("task arithmetic, SVC", "task_arithmetic_of_ours", 1.0, {"calibrate": "svc"}),
    "tsv_spectrum": Method("TSV-Merge, spectrum ¼", "tsv", 2.0, {"spectrum": 0.25}),
    "tsv_compress": Method("TSV-Compress, added", "tsv_compress", 0.4),
    "consensus": Method("Consensus", "consensus", 0.5),
    "magmax": Method("MagMax", "magmax", 0.6),
    "top_k": Method("largest 5 %", "top_k", 2.5),
    "mean": Method("mean", "mean", 4.0),
    "devec_unique": Method("DeVec, unique components", "devec_unique", 0.5),
}
ALL = "all"
# {name: (title, mergekit's name, its parameters)}; num_bases comes from the question
KINDS: dict[str, tuple[str, str, Mapping[str, Any]]] = {
    "balanced": ("balanced bases", "ae_bases", {}),
    "paper": ("bases of the paper", "ae_bases", {"balance": False}),
    "pca": ("PCA", "pca_bases", {}),
    "rand_select": ("RandSelect", "rand_select", {}),
}


def config(workshop: Workshop, question: Mapping[str, Any]) -> dict[str, Any]:
    """The YAML of a question: ``method`` of METHODS, ``kind`` ("all" or of KINDS), ``num_bases``, ``over``, ``seed``.

    There may also be ``count`` (see chosen), ``adapters``, the kind of fine-tune, and ``first``: of the first task.

    M convex bases are shorter than T task vectors by T / M: ``lambda`` takes that out, so that one alpha means the
    same over bases as over all vectors.
    """
    method, kind = METHODS[question["method"]], question["kind"]
    models = [_model(workshop, name, question) for name in chosen(workshop.settings, question.get("count"))]
    head: dict[str, Any] = {"base_model": str(workshop.base), "models": [{"model": model} for model in models]}
    parameters, name = dict(method.parameters), method.name
    if name == "task_arithmetic_of_ours":  # mergekit has a method of the same name, without the last step
        name, parameters = "iso_c", {"calibrate": "none", "spectrum": 1.0} | parameters
    if kind == ALL:
        if method.of == "mergekit":
            head["models"] = [{"model": model, "parameters": {"weight": 1.0}} for model in models]
        return {"merge_method": name, **head, "parameters": {**parameters, "lambda": 1.0}, "dtype": "float32"}
    _, construction, options = KINDS[kind]
    over = question.get("over", "bases")
    longer = len(models) / question["num_bases"] if over == "bases" else 1.0
    parameters |= {"num_bases": question["num_bases"], "merge": name, "over": over, "lambda": longer, **options}
    return {"merge_method": construction, **head, "parameters": parameters, "dtype": "float32"}


def chosen(settings: Settings, count: int | None) -> tuple[str, ...]:
    """The first tasks, and after all of them the text domains; None: all tasks."""
    return settings.tasks if count is None else (*settings.tasks, *settings.domains)[:count]


def _model(workshop: Workshop, name: str, question: Mapping[str, Any]) -> str:
    kind = "text" if name in workshop.settings.domains else question.get("adapters", "lora")
    kind = question.get("first", kind) if name == workshop.settings.tasks[0] else kind
    path = workshop.path(name, question["seed"], kind)
    return str(path) if kind == "full" else f"{workshop.base}+{path}"


def write_config(workshop: Workshop, question: Mapping[str, Any]) -> Path:
    text = yaml.safe_dump(config(workshop, question), sort_keys=False)
    digest = hashlib.sha256(json.dumps(text).encode()).hexdigest()[:10]
    file = workshop.workdir / "configs" / f"{question['method']}-{question['kind']}-{digest}.yml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return file


def opened(workshop: Workshop, question: Mapping[str, Any]) -> Merge:
    """The merge of a question, not yet computed."""
    return open_merge(write_config(workshop, question), workshop.workdir / "nowhere").plan()
