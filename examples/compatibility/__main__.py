"""Write COMPATIBILITY.md: ``make compatibility``, or some rows with ARGS="--types llama,bert"."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from pathlib import Path

PAGE = Path(__file__).parent / "COMPATIBILITY.md"


def main() -> int:
    parser = argparse.ArgumentParser(prog="compatibility", description=__doc__)
    parser.add_argument("--types", help="Only these model types, separated by commas; printed.")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="Processes.")
    parser.add_argument("--all", action="store_true", help="One model type of every family in transformers; printed.")
    given = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")

    from .small import every_family, model_types
    from .table import defects, page, row

    names = given.types.split(",") if given.types else every_family() if given.all else model_types()
    with multiprocessing.get_context("spawn").Pool(given.jobs) as pool:
        rows = []
        for one in pool.imap(row, names):
            rows.append(one)
            odd = [f"{column}: {cell.verdict}" for column, cell in (one.cells or {}).items() if cell.reason]
            print(one.model_type, "-" if one.cells is None else ", ".join(odd) or "right", file=sys.stderr, flush=True)
    if given.types or given.all:
        print(page(rows))
    else:
        PAGE.write_text(page(rows), encoding="utf-8")
    found = defects(rows)
    print("\n".join(found), file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
