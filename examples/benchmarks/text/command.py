"""The command: ask every study, write RESULTS.md and its figures."""

from __future__ import annotations

from . import (
    adapters,
    addition,
    bounds,
    choices,
    devec,
    finetune,
    negation,
    ood,
    online,
    singular,
    with_data,
)
from .runner import Study

STUDIES: tuple[Study, ...] = (
    finetune.STUDY,
    addition.STUDY,
    choices.LOSSES,
    negation.STUDY,
    online.STUDY,
    with_data.STUDY,
    choices.SIZES,
    choices.TEMPERATURE,
    choices.SUBSAMPLES,
    singular.ABLATION,
    singular.COMPRESSION,
    ood.STUDY,
    devec.FRACTIONS,
    devec.GAINS,
    adapters.STUDY,
    bounds.STUDY,
)
