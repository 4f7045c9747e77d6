"""The small Flux that styles are mixed in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from zoo.pipelines import flux_pipeline


@pytest.fixture(scope="module")
def _flux() -> Any:
    return flux_pipeline()


@pytest.fixture
def flux(_flux: Any) -> Iterator[Any]:
    """One pipeline for a file, without adapters at the beginning of a test."""
    yield _flux
    _flux.unload_lora_weights()
    vars(_flux).pop("_tvbases_styles", None)
