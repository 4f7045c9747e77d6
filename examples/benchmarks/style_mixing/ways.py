"""The ways of mixing two LoRAs that are compared, all of them calls of mix_styles, which takes the scales."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

PLAIN = "plain sum"
DEFAULT = "unique + one copy"  # what mix_styles does when nothing is said
# What has to be done early in the pictures' denoising, where their shapes come about.
EARLY = ("slanted", "outlined", "cat")
RISING, FALLING = (0.4, 1.0, 1.3, 1.3), (1.3, 1.3, 1.0, 0.4)


@dataclass(frozen=True)
class Way:
    """``options`` of mix_styles; ``steps``: one style early, one late; ``blocks``: one in the first half of them."""

    options: Mapping[str, Any] = field(default_factory=dict)
    steps: bool = False
    blocks: bool = False


def _method(name: str, component: str = "full", **options: Any) -> Way:
    return Way({"component": component, "method": name, "method_options": options})


def _unique(**options: Any) -> Way:
    return Way({"component": "unique", **options})


# In the order in which they are asked.
WAYS: dict[str, Way] = {
    PLAIN: Way({"component": "full"}),
    "unique": _unique(threshold=0.85, shared_weight=0.0),
    DEFAULT: _unique(threshold=0.85, shared_weight=1.0),
    "tsv": _method("tsv"),
    "sum, calibrated": _method("task_arithmetic", calibrate="svc"),
    "iso_c, spectrum .5": _method("iso_c", spectrum=0.5),
    "steps": Way({"component": "full"}, steps=True),
    "blocks": Way({"component": "full"}, blocks=True),
    "ties, density .5": _method("ties", density=0.5),
    "regmean_datafree": _method("regmean_datafree"),
    "iso_c": _method("iso_c"),
    "unique, threshold .5": _unique(threshold=0.5, shared_weight=0.0),
    "unique, by pairs": _unique(pool="iterative", shared_weight=0.0),
    "unique, threshold .95": _unique(threshold=0.95, shared_weight=0.0),
    "unique, row spaces": _unique(side="row", shared_weight=0.0),
    "unique, threshold .5 + one copy": _unique(threshold=0.5, shared_weight=1.0),
    "unique by tsv": _method("tsv", "unique"),
    "shared only": Way({"component": "shared"}),
    "iso_cts": _method("iso_cts"),
    "tsv, calibrated": _method("tsv", calibrate="svc"),
    "regmean_datafree, columns": _method("regmean_datafree", side="column"),
    "ties": _method("ties"),
    "consensus": _method("consensus"),
    "top_k": _method("top_k", density=0.2),
    "magmax": _method("magmax"),
    "negmerge": _method("negmerge"),
    "tsv_compress": _method("tsv_compress"),
    "devec_unique": _method("devec_unique"),
    "mean": _method("mean"),
    "unique, threshold .6 + one copy": _unique(threshold=0.6, shared_weight=1.0),
    "unique, threshold .7 + one copy": _unique(threshold=0.7, shared_weight=1.0),
    "unique, threshold .95 + one copy": _unique(threshold=0.95, shared_weight=1.0),
    "unique, rank 4 + one copy": _unique(rank=4, shared_weight=1.0),
    "unique, rank 8 + one copy": _unique(rank=8, shared_weight=1.0),
}
# Of lower thresholds than the default's, with one copy: candidates for the default.
LOWER = tuple(f"unique, threshold {threshold} + one copy" for threshold in (".5", ".6", ".7"))
# Where the mean is the sum of half the scale, only its row at scale 1 says something new.
SAME_AS_PLAIN = ("mean",)


def schedules(first: str, second: str) -> dict[str, list[float]]:
    """The shape early and what it is painted in late; the same of both without such a difference."""
    order = sorted((first, second), key=lambda name: name not in EARLY)
    return {order[0]: list(FALLING), order[1]: list(RISING)}


def by_blocks(file: Any, early: bool) -> dict[str, Tensor]:
    """A LoRA whose change is 1.3 times as large in one half of the blocks and 0.4 times in the other."""
    return {
        name: tensor * (1.3 if _is_early(name) == early else 0.4) if ".lora_B." in name else tensor
        for name, tensor in load_file(file).items()
    }


def _is_early(name: str) -> bool:
    """The double block and the first two single ones."""
    return "single_transformer_blocks" not in name or int(name.split("single_transformer_blocks.")[1].split(".")[0]) < 2
