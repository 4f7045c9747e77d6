"""What has to be true, in points of accuracy, and the table that says whether it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .markdown import table


@dataclass(frozen=True)
class Claim:
    """``measured`` has to be at least (or ``at_most``) ``needed``, in points."""

    text: str
    measured: float
    needed: float
    at_most: bool = False

    @property
    def holds(self) -> bool:
        return self.measured <= self.needed if self.at_most else self.measured >= self.needed


def verdicts(listed: Sequence[Claim]) -> str:
    """The section "What holds"."""
    rows = [
        [c.text, f"{c.measured:.1f}", f"{'≤' if c.at_most else '≥'} {c.needed:.1f}", "yes" if c.holds else "**no**"]
        for c in listed
    ]
    held = sum(claim.holds for claim in listed)
    return f"## What holds\n\n{held} of {len(listed)}, in points of accuracy.\n\n" + table(
        ["claim", "measured", "needed", "holds"], rows
    )
