"""What is measured: lm-eval tasks or data of one's own, some of which should change and others stay, and how."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tvbases_hf.errors import ParameterError, did_you_mean
from tvbases_hf.learning.batches import Columns

from .folder import include_path
from .prompts import KINDS, READERS
from .scorers import PYTHON, Scorer, scorer_of

TEXT = "text:"
COLUMNS = Columns()


@dataclass(frozen=True)
class Plan:
    """``targets`` should change, ``controls`` stay: names of ``data``, of lm-eval tasks, or ``text:FILE``, a file's
    perplexity. ``data`` {name: file, folder or data set of the Hub} is measured whether it is named or not, and read as
    ``columns`` says (rows and batch size as here).

    ``prompts`` are files by kind (prompts.KINDS) instead of the Hub's, ``scorer`` what scorer_of takes,
    ``continuations`` the samples of each prompt (None: the task's own), ``limit`` the documents of every task.
    ``include`` are directories of tasks' YAML files beside lm-eval's own.
    """

    targets: tuple[str, ...] = ()
    controls: tuple[str, ...] = ()
    prompts: dict[str, str] = field(default_factory=dict)
    scorer: str | Scorer = "profanity"
    continuations: int | None = None
    limit: int | None = None
    seed: int = 0
    batch_size: int = 16
    data: Mapping[str, str] = field(default_factory=dict)
    columns: Columns = COLUMNS
    include: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names = self.names
        if not names:
            raise ParameterError(
                "nothing to measure; name what should change with --target tvbases_toxigen_generate, and what should "
                "stay with --control gsm8k or --control text:prose.txt, or give data with --data NAME=FILE"
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
        named = (*self.targets, *self.controls)
        return (*named, *(name for name in self.data if name not in named))

    @property
    def benchmarks(self) -> tuple[str, ...]:
        """What lm-eval measures."""
        return tuple(name for name in self.names if name not in self.data)

    def reading(self) -> Columns:
        """How data is read. Raises ParameterError for classes of data that there is not."""
        unknown = [name for name in self.columns.classes if name and name not in self.data]
        if unknown:
            raise ParameterError(
                f'--classes were given for "{unknown[0]}"{did_you_mean(unknown[0], self.data)}, of which there is no '
                f"--data; there is {', '.join(self.data) or 'none'}"
            )
        return replace(self.columns, max_rows=self.limit, batch_size=self.batch_size)

    def forgetting(self, tasks: Iterable[str]) -> Plan:
        """With a target, if there is data of what is forgotten, and all other data as controls."""
        targets = self.targets or tuple(task for task in tasks if task in self.data)
        rest = (name for name in self.data if name not in (*targets, *self.controls))
        return replace(self, targets=targets, controls=(*self.controls, *rest))

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
            for name in self.benchmarks
        ]

    def manager(self) -> Any:
        """lm-eval's TaskManager with our tasks. Raises ParameterError for a task that it does not know."""
        from lm_eval.tasks import TaskManager

        paths: list[str | Path] = [str(include_path()), *self.include]
        ours = TaskManager(include_path=paths, include_defaults=False, metadata=self.metadata)
        if all(name.startswith(TEXT) or name in ours.all_subtasks for name in self.benchmarks):
            return ours  # lm-eval's own thousands of task files take seconds to read
        manager = TaskManager(include_path=paths, metadata=self.metadata)
        for name in self.benchmarks:
            if not name.startswith(TEXT) and name not in manager.all_tasks:
                meant = did_you_mean(name, manager.all_tasks)
                raise ParameterError(f'lm-eval has no task "{name}"{meant}; `lm_eval ls tasks` lists them')
        return manager

    def _check_files(self) -> None:
        """Before a model is loaded: files that are named have to be there."""
        files = [name.removeprefix(TEXT) for name in self.benchmarks if name.startswith(TEXT)]
        missing = [file for file in (*files, *self.prompts.values()) if not Path(file).is_file()]
        if missing:
            raise ParameterError(f"{len(missing)} files are missing (first: {missing[0]})")
        absent = [folder for folder in self.include if not Path(folder).is_dir()]
        if absent:
            raise ParameterError(f'"{absent[0]}" is no directory; --include-path takes one of lm-eval task files')
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
