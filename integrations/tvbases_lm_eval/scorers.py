"""How toxic a text is, by a classifier. A text that cannot be scored has no score: it is never taken for harmless."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

from tvbases_hf.errors import MissingExtraError, ParameterError, first_line
from tvbases_hf.storage.run import bar, current, track

OFFLINE = "profanity"
PYTHON = "python:"
# Words in the label that a classifier of toxicity gives to what it looks for, without regard to case.
TOXIC_LABELS = ("toxic", "hate", "hateful", "offensive", "abusive", "profane", "label_1", "1")
HARMLESS_LABELS = ("non", "not", "no", "neutral", "benign", "clean", "normal", "none")


class Scorer(Protocol):
    """Scores in [0, 1], one for each text; None where there is no score. ``name`` is what reports call it."""

    @property
    def name(self) -> str: ...

    def score(self, texts: Sequence[str]) -> list[float | None]: ...


@dataclass(frozen=True)
class CallableScorer:
    """Any function of one text. An exception, and whatever is no number in [0, 1], is a missing score.

    ``first_failure`` keeps the first reason, for the user.
    """

    function: Callable[[str], float]
    name: str = "python"
    first_failure: list[str] = field(default_factory=list, compare=False)

    def score(self, texts: Sequence[str]) -> list[float | None]:
        return [self._one(text) for text in track(texts, "Scoring", unit="text")]

    def _one(self, text: str) -> float | None:
        try:
            return checked(self.function(text))
        except Exception as error:  # whatever it is: the other texts still have scores, and this one counts as failed
            if not self.first_failure:
                self.first_failure.append(f"{type(error).__name__}: {error}")
            return None


class ProfanityScorer:
    """The linear model inside alt-profanity-check: no download, fast on any processor; it knows words, not meaning."""

    name = OFFLINE

    def __init__(self) -> None:
        try:
            from profanity_check import predict_prob
        except ImportError as error:
            raise MissingExtraError(
                f'the offline scorer needs alt-profanity-check ({error}); pip install "tvbases-hf[eval]"'
            ) from error
        self._predict = predict_prob

    def score(self, texts: Sequence[str]) -> list[float | None]:
        return [checked(value) for value in self._predict(list(texts))] if texts else []


class ClassifierScorer:
    """A text classifier of transformers by Hub id or path: the probability of its toxic label, batch by batch.

    A batch that fails is tried again text by text, so that one bad text costs one score.
    """

    def __init__(
        self, source: str, *, label: str | None = None, device: str | None = None, batch_size: int = 32
    ) -> None:
        """Load the classifier; on a GPU if there is one and ``device`` says nothing else.

        Args:
            label: the label whose probability is the score; found by its name if left out. Independent labels (Detoxify
                style) and alternatives are told apart by the configuration's ``problem_type``.

        Raises:
            MissingExtraError: transformers is not installed.
            ParameterError: no classifier there, an unknown label, or none that can be recognised.
        """
        if batch_size < 1:
            raise ParameterError(f"batch_size is a number of texts, 1 or more; got {batch_size}")
        self.name, self._batch_size = source, batch_size
        self._model, self._tokenizer = _load(source, device)
        config = self._model.config
        self._index = toxic_label({int(key): str(value) for key, value in config.id2label.items()}, label, source)
        self._independent = config.problem_type == "multi_label_classification" or config.num_labels == 1

    def score(self, texts: Sequence[str]) -> list[float | None]:
        scores: list[float | None] = []
        with bar("Scoring", len(texts), "text") as shown:
            for start in range(0, len(texts), self._batch_size):
                batch = list(texts[start : start + self._batch_size])
                scores += self._batch(batch)
                shown.update(len(batch))
        return scores

    def _batch(self, texts: list[str]) -> list[float | None]:
        try:
            return [checked(value) for value in self._probabilities(texts)]
        except Exception:  # which text it was is found below; running out of memory is mended by it, too
            return [None] if len(texts) == 1 else [score for text in texts for score in self._batch([text])]

    def _probabilities(self, texts: list[str]) -> list[float]:
        import torch

        limit = min(getattr(self._model.config, "max_position_embeddings", 512) - 2, 512)
        inputs = self._tokenizer(texts, padding=True, truncation=True, max_length=limit, return_tensors="pt")
        with torch.inference_mode():
            logits = self._model(**inputs.to(self._model.device)).logits.float()
        spread = logits.sigmoid() if self._independent else logits.softmax(dim=-1)
        return spread[:, self._index].cpu().tolist()


def scorer_of(
    source: str | Scorer | Callable[[str], float], *, device: str | None = None, batch_size: int = 32
) -> Scorer:
    """A scorer by name.

    ``profanity``: the offline one. ``python:module.function``: any function of one text. A path or a Hub id: a text
    classifier, ``ID:LABEL`` to name its toxic label. A function or a scorer is taken as it is.
    """
    if not isinstance(source, str):
        if hasattr(source, "score"):
            return source  # type: ignore[return-value]
        return CallableScorer(source, getattr(source, "__name__", "python"))  # type: ignore[arg-type]
    if source == OFFLINE:
        return ProfanityScorer()
    if source.startswith(PYTHON):
        return CallableScorer(_imported(source.removeprefix(PYTHON)), source)
    name, separator, label = source.rpartition(":")
    if separator and not Path(source).exists():
        return ClassifierScorer(name, label=label, device=device, batch_size=batch_size)
    return ClassifierScorer(source, device=device, batch_size=batch_size)


def checked(value: Any) -> float | None:
    """A score as a number in [0, 1]; None for NaN, infinity, and whatever is outside."""
    number = float(value)
    return number if math.isfinite(number) and 0 <= number <= 1 else None


def toxic_label(labels: Mapping[int, str], wanted: str | None, source: str) -> int:
    """The number of the toxic label. ParameterError where the name is unknown or cannot be recognised."""
    found = {name.lower(): index for index, name in labels.items()}
    shown = ", ".join(labels.values())
    if wanted is not None:
        if wanted.lower() not in found:
            raise ParameterError(f'"{source}" has no label "{wanted}"; it has {shown}')
        return found[wanted.lower()]
    if len(labels) == 1:
        return next(iter(labels))
    for word in TOXIC_LABELS:
        for name, index in found.items():
            if _is_about(name, word):
                return index
    raise ParameterError(f'"{source}": none of its labels ({shown}) is known as the toxic one; name it: {source}:LABEL')


def _is_about(name: str, word: str) -> bool:
    return word == name or (len(word) > 3 and name.startswith(word) and not _is_harmless(name))


def _is_harmless(name: str) -> bool:
    return any(part in HARMLESS_LABELS for part in name.replace("-", "_").replace(" ", "_").split("_"))


def _imported(path: str) -> Callable[[str], float]:
    module, _, function = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), function) if module else None
    except (ImportError, AttributeError) as error:
        raise ParameterError(f'scorer "{PYTHON}{path}" cannot be imported ({error})') from error
    if not callable(found):
        raise ParameterError(f'scorer "{PYTHON}{path}" is not MODULE.FUNCTION with a function of one text')
    return cast("Callable[[str], float]", found)


def _load(source: str, device: str | None) -> tuple[Any, Any]:
    try:
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer
    except ImportError as error:
        raise MissingExtraError(f'a classifier needs transformers ({error}); pip install "tvbases-hf[eval]"') from error
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        code = {"trust_remote_code": current().trust_remote_code}  # None asks on a terminal
        model = AutoModelForSequenceClassification.from_pretrained(source, **code)
        return model.to(place).eval(), AutoTokenizer.from_pretrained(source, **code)
    except (OSError, ValueError) as error:
        raise ParameterError(
            f'"{source}" is not a text classifier that can be loaded ({first_line(error)}); give a directory or a Hub '
            f'id, "{OFFLINE}" for the offline scorer, or {PYTHON}module.function'
        ) from error


def failures(scores: Iterable[float | None]) -> int:
    """How many texts have no score."""
    return sum(score is None for score in scores)
