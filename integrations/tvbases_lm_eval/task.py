"""The task classes that the YAML files name; lm-eval builds them, and this module is imported only by it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from lm_eval.api.task import ConfigurableTask

from tvbases_hf.errors import ParameterError
from tvbases_hf.text import printable

from .prompts import KINDS, prompts, read_file, read_hub
from .scorers import OFFLINE, PYTHON, Scorer, failures, scorer_of
from .toxicity import of_prompt

# A text is scored in pieces of about so many characters: without pieces there is no standard error.
PIECE = 4000
logger = logging.getLogger(__name__)


def total(counts: Sequence[float]) -> float:
    """How many there are in all: an aggregation for lm-eval."""
    return float(sum(counts))


class ToxicityTask(ConfigurableTask):
    """k sampled continuations of every prompt, scored together by one classifier when all are there.

    Settings come from ``metadata``: ``scorer`` and ``scorer_device`` (see scorer_of), ``continuations`` (k), and
    ``toxigen`` or ``realtoxicityprompts``, a local file instead of the Hub's data.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        settings = dict(config.get("metadata") or {})
        self._scorer = _scorer(settings.get("scorer", OFFLINE), settings.get("scorer_device"))
        settings["scorer"] = self._scorer.name
        self._settings = settings
        own = {key: value for key, value in config.items() if key != "class"} | {"metadata": settings}
        super().__init__(config=own | {"repeats": _positive(settings.get("continuations", own.get("repeats", 1)))})

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Prompts from a local file if there is one, else from the Hub."""
        kind = self._settings.get("data", "")
        if kind not in KINDS:
            raise ParameterError(f"data of kind {kind!r} are unknown; choose one of {', '.join(KINDS)}")
        file = self._settings.get(kind)
        label = str(file or self.DATASET_PATH)
        rows = read_file(file) if file else read_hub(kind, label, self.DATASET_NAME)
        self.dataset = {"test": datasets.Dataset.from_dict({"text": prompts(kind, rows, label)})}

    def apply_filters(self) -> Any:
        """All continuations of this run's prompts with their scores: pairs (text, score or None)."""
        super().apply_filters()
        instances = self.instances
        texts = [text for instance in instances for text in instance.resps]
        scores = self._scorer.score(texts)
        failed = failures(scores)
        if failed:
            reason = next(iter(getattr(self._scorer, "first_failure", ())), "no number between 0 and 1")
            said = printable(reason)  # an exception may quote the text
            logger.warning("%s: %d of %d texts have no score (first: %s)", self.task_name, failed, len(scores), said)
        pairs = iter(zip(texts, scores, strict=True))
        for instance in instances:
            instance.filtered_resps = {"none": [next(pairs) for _ in instance.resps]}
        return instances

    def process_results(self, doc: Mapping[str, Any], results: Sequence[Any]) -> dict[str, float]:
        """The metrics of one prompt; those that failed scores leave undefined are absent."""
        return of_prompt([score for _, score in results[0]])


class TextTask(ConfigurableTask):
    """Perplexity of the UTF-8 file that ``metadata`` names as ``text``."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config={key: value for key, value in config.items() if key != "class"})

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        file = (self.config.metadata or {}).get("text")
        if not file:
            raise ParameterError('tvbases_text needs a file: --metadata \'{"text": "prose.txt"}\'')
        self.dataset = {"test": datasets.Dataset.from_dict({"text": pieces(file)})}


def pieces(file: str | Path) -> list[str]:
    """A text file in pieces of whole lines. Raises ParameterError for one that cannot be read or is empty."""
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ParameterError(f'"{file}" cannot be read as UTF-8 text ({error})') from error
    found, piece = [], ""
    for line in text.splitlines(keepends=True):
        piece += line
        if len(piece) >= PIECE:
            found, piece = [*found, piece], ""
    found = [part for part in (*found, piece) if part.strip()]
    if not found:
        raise ParameterError(f'"{file}" holds no text')
    return found


def _scorer(source: str | Scorer, device: str | None) -> Scorer:
    """ParameterError for code that a task's file names: that file may come from anywhere."""
    if isinstance(source, str) and source.startswith(PYTHON):
        raise ParameterError(
            f'scorer "{source}": Python functions are imported for `tvbases evaluate --scorer {source}` only, or given '
            "to evaluate_model in Python, and never for what a task's settings say"
        )
    return scorer_of(source, device=device)


def _positive(count: Any) -> int:
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ParameterError(f"continuations is a number of samples, 1 or more; got {count!r}")
    return count
