"""Defects of mergekit 0.1.5: two end a merge that has nothing wrong with it, two let NaN through, one is tracebacks.

And one: the tokens of a union are numbered otherwise in every process.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import transformers
from mergekit import card
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import GatherTensors
from mergekit.io.tensor_writer import TensorWriter
from mergekit.plan import MergePlanner
from mergekit.tokenizer import build
from torch import Tensor

from tvbases_hf.algebra.finite import count_not_finite
from tvbases_hf.errors import ParameterError
from tvbases_hf.models.finite import finite_values

from .configuration import all_models, one_line

LOG = logging.getLogger("tvbases_mergekit")
# Where mergekit logs what it goes on without, such as a tokenizer that the base does not have.
TRACED = ("mergekit.merge", "mergekit.architecture.auto", "mergekit.tokenizer.build")


@contextlib.contextmanager
def mended_mergekit() -> Iterator[None]:
    """mergekit without these defects, in this process and for this block."""
    ask, plan_tensor, save_tensor = card.is_hf, MergePlanner.plan_tensor, TensorWriter.save_tensor
    gather = GatherTensors.execute

    def is_hf(path: str) -> bool:
        """The model card's question whether a path is on the Hub, which it also asks about local directories."""
        if Path(path).exists():
            return False
        try:
            return ask(path)
        except Exception as error:  # whatever the HTTP library raises: the card then has no link, and says so
            LOG.warning("model card without a link to %s: %s", path, error)
            return False

    def plan_optional_tensor(self: Any, weight: Any, weights_in: list[Any], *args: Any, **kwargs: Any) -> None:
        """The planner adds the aliases of an optional weight, a tuple, to a list: no BertModel can be merged."""
        if weight.optional:
            weights_in = [w.model_copy(update={"aliases": _Names(w.aliases)}) if w.aliases else w for w in weights_in]
        plan_tensor(self, weight, weights_in, *args, **kwargs)

    def gather_finite(self: Any, **kwargs: Any) -> dict[Any, Tensor]:
        """mergekit's own methods take NaN for a number; some, which trim, even leave it out of what they write."""
        found = gather(self, **kwargs)
        if found:
            names = {weight.name for weight in self.weight_info.values()}
            finite_values(min(names), [str(model) for model in found], list(found.values()))
        return found

    def save_finite_tensor(self: Any, name: str, tensor: Tensor, *args: Any, **kwargs: Any) -> None:
        """The writer stores whatever a method gives it, and what overflows when it is rounded."""
        if lost := count_not_finite(tensor):
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise ParameterError(
                f"the merged tensor {name}: {lost} of {tensor.numel()} numbers are infinite or NaN as {dtype}; set "
                "out_dtype to bfloat16 or float32, or look for NaN in the models with `tvbases inspect`"
            )
        save_tensor(self, name, tensor, *args, **kwargs)

    with (
        patch.object(card, "is_hf", is_hf),
        patch.object(MergePlanner, "plan_tensor", plan_optional_tensor),
        patch.object(GatherTensors, "execute", gather_finite),
        patch.object(TensorWriter, "save_tensor", save_finite_tensor),
        tokens_in_order(),
    ):
        yield


@contextlib.contextmanager
def tokens_in_order() -> Iterator[None]:
    """Tokenizers are put together in the order of the file, their tokens too: not in that of a set or a hash table.

    And without a bar, which mergekit shows whatever it is told.
    """
    ask = transformers.PreTrainedTokenizerFast.get_vocab

    def get_vocab(self: Any) -> dict[str, int]:
        return dict(sorted(ask(self).items(), key=lambda entry: entry[1]))

    with (
        _without_tracebacks(),
        patch.object(transformers.PreTrainedTokenizerFast, "get_vocab", get_vocab),
        patch.object(MergeConfiguration, "referenced_models", all_models),
        patch.object(build, "tqdm", SimpleNamespace(tqdm=lambda items, **_: items)),
    ):
        yield


@contextlib.contextmanager
def _without_tracebacks() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in TRACED]
    for logger in loggers:
        logger.addFilter(_in_one_line)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(_in_one_line)


def _in_one_line(record: logging.LogRecord) -> bool:
    """The reason in place of the traceback, and reasons of several lines in one."""
    if record.exc_info and record.exc_info[1] is not None:
        record.msg, record.args = f"{record.getMessage()} ({one_line(record.exc_info[1])})", ()
        record.exc_info = record.exc_text = None
    elif isinstance(record.msg, Exception):
        record.msg = one_line(record.msg)
    return True


class _Names(tuple[str, ...]):
    """A tuple that can be added to a list."""

    def __radd__(self, other: list[str]) -> list[str]:
        return [*other, *self]
