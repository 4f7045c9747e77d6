"""A data set of the Hub as ``datasets`` gives it: images that are decoded when asked for, labels with names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tvbases_hf.learning.rows import Rows, of_dataset


class ClassLabels:
    """One image of every class, in their order."""

    def __init__(self, names: Sequence[str], arrays: np.ndarray) -> None:
        self.names, self.arrays = list(names), arrays

    def dataset(self) -> Any:
        from datasets import ClassLabel, Dataset, Features, Image

        features = Features({"image": Image(), "label": ClassLabel(names=self.names)})
        from PIL import Image as Pillow

        pictures = [Pillow.fromarray(array) for array in self.arrays]
        return Dataset.from_dict({"image": pictures, "label": list(range(len(pictures)))}, features=features)

    def rows(self, limit: int | None = None) -> Rows:
        return of_dataset(self.dataset(), limit)
