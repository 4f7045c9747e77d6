"""What a YAML adds up: the vectors of a merge that is a sum of them, so that each can have a scale of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tvbases_hf.errors import ParameterError
from tvbases_hf.methods.sums import normalized
from tvbases_hf.models.vectors import Vectors

from .constructions import chosen
from .methods import BasisMerge, is_plain_sum
from .native import Job, resolve
from .sources import Models


def summands(job: Job) -> tuple[Vectors, float]:
    """(vectors, scale): the merge is scale times their sum.

    Raises ParameterError for a merge that is no such sum: another method than task arithmetic, over bases or not, or
    weights that differ between models or tensors.
    """
    inputs, method = job.inputs, job.method
    bound = resolve(job.config, method, inputs, inputs.vectors.names)
    settings = next(iter(bound.values()), {})
    if any(other != settings for other in bound.values()):
        raise _no_sum("parameters differ between tensors")
    vectors = inputs.vectors
    if isinstance(method, BasisMerge):
        if not is_plain_sum(method.inner(settings)):
            raise _no_sum(f"merge is {settings['merge']}")
        if any(weight is not None for weight in settings["weight"].values()):
            raise _no_sum("models have weights, so their reconstructions are added")
        models = Models(vectors, inputs.models)
        weights = models.solve(method.bases, settings["num_bases"], chosen(method.bases, settings))
        return vectors.mixed(weights, settings["over"]), float(settings["lambda"])
    if not is_plain_sum(method):
        raise _no_sum(f"merge_method is {method.spec.name}")
    return vectors, float(settings["lambda"]) * _weight(settings)


def _weight(settings: Mapping[str, Any]) -> float:
    weights = normalized([float(w) for w in settings["weight"].values()], settings["normalize"])
    if len(set(weights)) > 1:
        raise _no_sum("the models have different weights; give all of them weight 1")
    return weights[0]


def _no_sum(reason: str) -> ParameterError:
    return ParameterError(
        f"--per-basis finds a scale for each vector of a sum, and {reason}; use task_arithmetic, or bases whose merge "
        "is task_arithmetic, or leave --per-basis out"
    )
