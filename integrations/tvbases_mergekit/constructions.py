"""The constructions of bases as a YAML has them: their options as mergekit declares parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Optional, get_origin

from mergekit.merge_methods.base import ParameterScope, ParameterSpec

from tvbases_hf.bases.registry import Construction
from tvbases_hf.options import Option

from .registered import parameter

# mergekit's methods have a ``normalize`` too, which reaches them through the bases.
RENAMED = {"normalize": "normalize_tasks"}
VALUES = (float, int, bool, str)


def yaml_options(bases: Construction) -> dict[str, Option]:
    """By their names in a YAML, which holds numbers, booleans and words: not weights by task."""
    fitting = [o for o in bases.options.values() if all(k in VALUES or get_origin(k) is Literal for k in o.kinds)]
    return {RENAMED.get(option.name, option.name): option for option in fitting}


def parameters_of(bases: Construction) -> tuple[ParameterSpec, ...]:
    """Of a construction that chooses their number itself, ``num_bases`` may be left out."""
    kind = Optional[float] if bases.num_bases is None else float  # noqa: UP045 (for pydantic on Python 3.10)
    about = "how many; below 1 a fraction of the models"
    number = ParameterSpec("num_bases", kind, ParameterScope.SHARED, default=bases.num_bases, description=about)
    return (number, *(parameter(option, name) for name, option in yaml_options(bases).items()))


def chosen(bases: Construction, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The construction's options among the parameters of a merge, checked. Raises ParameterError for bad ones."""
    return bases.checked({option.name: parameters[name] for name, option in yaml_options(bases).items()})
