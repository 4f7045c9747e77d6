"""Tables and numbers in Markdown."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence


def table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """The first column is left-aligned, numbers are right-aligned."""
    lines = [f"| {' | '.join(headers)} |", f"|---|{'---:|' * (len(headers) - 1)}"]
    lines += [f"| {' | '.join(str(cell) for cell in row)} |" for row in rows]
    return "\n".join(lines)


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Mean ± standard deviation; the mean alone of one value, nothing of none."""
    if not values:
        return ""
    found = f"{statistics.mean(values):.{digits}f}"
    return f"{found} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else found


def span(values: Iterable[float]) -> str:
    """0.4, or 0.3–0.5."""
    low, high = min(found := list(values)), max(found)
    return f"{low:g}" if low == high else f"{low:g}–{high:g}"


def megabytes(size: float) -> str:
    return f"{size / 1e6:.0f}"


def standard_error(per_cent: float, count: int) -> float:
    """Of a share of ``count`` sentences, in points."""
    share = per_cent / 100
    return 100 * math.sqrt(share * (1 - share) / count)
