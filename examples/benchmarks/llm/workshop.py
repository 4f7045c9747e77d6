"""What every study works with: the base in memory, the tasks as lm-eval has them, and the worth of any change."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from evidence import sources
from evidence.workshop import Workshop as AnyWorkshop

from tvbases_hf import Vectors
from tvbases_hf.learning.coefficients import grid_search
from tvbases_hf.learning.inplace import Change, InPlace
from tvbases_hf.storage import run
from tvbases_lm_eval.evaluate import Measured, Session
from tvbases_lm_eval.plan import Plan

from . import abilities, base, models, tasks
from .prompts import Prompts, prompts_of, shortened
from .settings import ALPHAS, Settings

ACCURACY = "acc"
TRAINING = 2000
BATCH = 8
Values = dict[str, float]


class Workshop(AnyWorkshop):
    """One process's view of the work directory; what is read or computed once is kept.

    ``source`` is "DATA|MODEL": where the tasks come from (see sources.load_tasks) and the base (see base_model).
    """

    settings: Settings

    @functools.cached_property
    def base(self) -> Path:
        return base.base_model(self.workdir, self.source.partition("|")[2] or "auto")

    @functools.cached_property
    def _loaded(self) -> tuple[Any, Any]:
        return models.load(self.base)

    @property
    def model(self) -> Any:
        """The base in float32. Whoever changes its weights puts them back."""
        return self._loaded[0]

    @property
    def tokenizer(self) -> Any:
        return self._loaded[1]

    @functools.cached_property
    def tasks(self) -> dict[str, Prompts]:
        sizes = {"train": TRAINING, "val": self.settings.validation, "test": self.settings.test}
        found = sources.load_tasks(self.settings.tasks, self.source.partition("|")[0])
        return {name: prompts_of(name, task, self._cut, sizes) for name, task in found.items()}

    def _cut(self, text: str) -> str:
        return shortened(text, self.settings.words, self.settings.letters)

    @functools.cached_property
    def key(self) -> str:
        """Digest of all that decides an answer beside the question."""
        told = json.dumps([[p.name, p.words, dict(p.splits)] for p in self.tasks.values()])
        data = hashlib.sha256(told.encode()).hexdigest()[:12]
        return f"{self.settings.digest()}-{data}-{self.base.name}"

    def path(self, task: str, seed: int = 0, kind: str = "lora") -> Path:
        return models.model_path(self.workdir, kind, seed, task)

    @functools.cache  # noqa: B019 - a workshop lives as long as its process
    def vectors(self, seed: int = 0, kind: str = "lora", count: int | None = None) -> Vectors:
        """The task vectors of the first ``count`` tasks; None: of all."""
        return Vectors.open(self.base, {task: self.path(task, seed, kind) for task in self.settings.tasks[:count]})

    @functools.cached_property
    def folder(self) -> Path:
        """The task files, written by whoever needs them first: what is written depends on the key alone."""
        folder = self.workdir / "tasks" / self.key
        if not (folder / "complete").is_file():
            for prompts in self.tasks.values():
                for split in ("val", "test"):
                    tasks.write_choices(folder, prompts, split)
            abilities.write_instructions(folder, self.tokenizer, self.settings.instructions)
            for name in self.settings.domains:
                text = abilities.domain_text(name, "test")[: self.settings.text_bytes]
                (folder / f"{name}.txt").write_text(text, encoding="utf-8")
            (folder / "complete").touch()
        return folder

    @functools.cache  # noqa: B019
    def session(self, names: tuple[str, ...]) -> Session:
        """lm-eval's tasks, loaded once."""
        with quiet():
            return Session.open(Plan(targets=names, include=(str(self.folder),), batch_size=BATCH))

    def measured(self, model: Any, names: Sequence[str]) -> Measured:
        with quiet():
            return self.session(tuple(names)).measure(model, self.tokenizer)

    def accuracies(self, model: Any, split: str, chosen: Sequence[str] | None = None) -> tuple[Values, Values]:
        """Per cent right by task, and its standard error."""
        wanted = {tasks.task_name(task, split): task for task in chosen or self.settings.tasks}
        found = self.measured(model, list(wanted))
        rows = {task: found[name, ACCURACY] for name, task in wanted.items()}
        return {t: 100 * row[0] for t, row in rows.items()}, {t: 100 * (row[1] or 0.0) for t, row in rows.items()}

    def abilities(self, model: Any) -> dict[str, Any]:
        """Per cent of the instructions that are followed, and bits per byte of every text domain."""
        kinds = {tasks.task_name(name): name for name in abilities.INSTRUCTIONS}
        found = self.measured(model, [*kinds, *self.texts])
        followed = {name: 100 * found[task, "exact_match"][0] for task, name in kinds.items()}
        bits = {domain: found[task, "bits_per_byte"][0] for task, domain in self.texts.items()}
        return {"followed": mean(followed), "instructions": followed, "bits": mean(bits), "texts": bits}

    @property
    def texts(self) -> dict[str, str]:
        """{what lm-eval calls a text domain: the domain}."""
        return {f"text:{self.folder / f'{domain}.txt'}": domain for domain in self.settings.domains}

    def bits(self, model: Any) -> Values:
        """Bits per byte of every text domain."""
        found = self.measured(model, list(self.texts))
        return {domain: found[task, "bits_per_byte"][0] for task, domain in self.texts.items()}

    def worth(
        self,
        names: Sequence[str],
        change: Change,
        *,
        start: float = 1.0,
        alpha: float | None = None,
        chosen: Sequence[str] | None = None,
        abilities: bool = False,
    ) -> dict[str, Any]:
        """What theta_0 + alpha * change of the weights ``names`` is worth on the test prompts of the ``chosen`` tasks.

        Without an alpha, at that of the best mean accuracy on their validation prompts, searched from ``start``.
        """
        place, curve = InPlace(self.model, names), {}
        if alpha is None:
            found = grid_search(
                place, change, lambda m: self.accuracies(m, "val", chosen)[0], alphas=ALPHAS, start=start, patience=1
            )
            alpha = found.chosen
            curve = {f"{a:g}": score for a, score in zip(found.alphas, found.scores, strict=True)}
        with place.changed(change, alpha) as model:
            return {"alpha": alpha, "curve": curve, **self.tested(model, chosen, abilities)}

    def tested(self, model: Any, chosen: Sequence[str] | None = None, abilities: bool = False) -> dict[str, Any]:
        """Accuracies on test prompts by task, their mean and its standard error; abilities where they are wanted."""
        values, errors = self.accuracies(model, "test", chosen)
        error = sum(e**2 for e in errors.values()) ** 0.5 / len(errors)
        found = {"accuracy": mean(values), "error": error, "tasks": values, "errors": errors}
        return found | ({"abilities": self.abilities(model)} if abilities else {})


def quiet() -> AbstractContextManager[None]:
    """No bars of single models: those of the studies are enough."""
    return run.using(replace(run.current(), quiet=True))


def mean(values: Mapping[str, float]) -> float:
    return sum(values.values()) / len(values)
