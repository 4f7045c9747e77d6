"""What is measured: lm-eval tasks that should change and others that should stay, and how."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tvbases_hf.errors import ParameterError, did_you_mean

from .folder import include_path
from .prompts import KINDS, READERS
from .scorers import PYTHON, Scorer, scorer_of

TEXT = "text:"


@dataclass(frozen=True)
class Plan:
    """``targets`` should change, ``controls`` stay: names of lm-eval tasks, or ``text:FILE``, a file's perplexity.

    ``prompts`` are files by kind (prompts.KINDS) instead of the Hub's, ``scorer`` what scorer_of takes,
    ``continuations`` the samples of each prompt (None: the task's own), ``limit`` the documents of every task.
    """

    targets: tuple[str, ...] = ()
    controls: tuple[str, ...] = ()
    prompts: dict[str, str] = field(default_factory=dict)
    scorer: str | Scorer = "profanity"
    continuations: int | None = None
    limit: int | None = None
    seed: int = 0
    batch_size: int = 16

    def __post_init__(self) -> None:
        names = self.names
        if not names:
            raise ParameterError(
                "nothing to measure; name what should change with --target tvbases_toxigen_generate, and what should "
                "stay with --control gsm8k or --control text:prose.txt"
            )
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ParameterError(f"{len(twice)} tasks are named twice (first: {twice[0]}); target and control differ")
        for name, value in (
            ("limit", self.limit),
            ("continuations", self.continuations),
            ("batch size", self.batch_size),
        ):
            if value is not None and value < 1:
                raise ParameterError(f"{name} is a number, 1 or more; got {value}")
        self._check_files()

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.targets, *self.controls)

    @property
    def metadata(self) -> dict[str, Any]:
        """What the task classes read."""
        scorer = self.scorer
        if isinstance(scorer, str) and scorer.startswith(PYTHON):
            scorer = scorer_of(scorer)  # a task's file, which has the same words, may not import anything
        found: dict[str, Any] = {**self.prompts, "scorer": scorer}
        return found if self.continuations is None else found | {"continuations": self.continuations}

    def requests(self) -> list[str | dict[str, Any]]:
        """The tasks as lm-eval takes them: names, and inline ones for text files."""
        from .task import TextTask

        metrics = [
            {"metric": "byte_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False},
            {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False},
        ]
        text = {"class": TextTask, "output_type": "loglikelihood_rolling", "test_split": "test", "metric_list": metrics}
        text |= {"doc_to_text": "", "doc_to_target": "{{text}}"}
        return [
            {**text, "task": name, "metadata": {"text": name.removeprefix(TEXT)}} if name.startswith(TEXT) else name
            for name in self.names
        ]

    def manager(self) -> Any:
        """lm-eval's TaskManager with our tasks. Raises ParameterError for a task that it does not know."""
        from lm_eval.tasks import TaskManager

        ours = TaskManager(include_path=str(include_path()), include_defaults=False, metadata=self.metadata)
        if all(name.startswith(TEXT) or name in ours.all_subtasks for name in self.names):
            return ours  # lm-eval's own thousands of task files take seconds to read
        manager = TaskManager(include_path=str(include_path()), metadata=self.metadata)
        for name in self.names:
            if not name.startswith(TEXT) and name not in manager.all_tasks:
                raise ParameterError(f'lm-eval has no task "{name}"{did_you_mean(name, manager.all_tasks)}')
        return manager

    def _check_files(self) -> None:
        """Before a model is loaded: files that are named have to be there."""
        files = [name.removeprefix(TEXT) for name in self.names if name.startswith(TEXT)]
        missing = [file for file in (*files, *self.prompts.values()) if not Path(file).is_file()]
        if missing:
            raise ParameterError(f"{len(missing)} files are missing (first: {missing[0]})")
        kinds = [file for file in self.prompts.values() if Path(file).suffix.lower() not in READERS]
        if kinds:
            raise ParameterError(f'"{kinds[0]}": prompts are read from {", ".join(READERS)}')


def parse_prompts(items: Iterable[str]) -> dict[str, str]:
    """``KIND=FILE`` arguments; ParameterError for an unknown kind."""
    return dict(_parse(item) for item in items)


def _parse(item: str) -> tuple[str, str]:
    name, separator, file = item.partition("=")
    if not separator or name not in KINDS or not file:
        raise ParameterError(f'"{item}" is not {" or ".join(f"{kind}=FILE" for kind in KINDS)}')
    return name, file
