"""Full fine-tunes as LoRAs that PEFT loads without this package: what ``tvbases extract`` does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import defaults
from ..algebra.rank import RankRule
from ..errors import ParameterError
from ..models.hosts import check_rank
from ..models.modules import Modules
from ..storage import run
from ..storage.cards import header, hub_id, write_card
from ..storage.checkpoint import Checkpoint
from ..storage.file_names import check_names
from ..storage.json_files import read_json
from ..storage.output import check_apart, check_output, files_in, preview, transaction, write_json
from ..text import code_block, code_span, in_markdown, quoted
from ..version import library_version
from .card import ADAPTER_USE
from .extraction import Extraction, Size, Target, open_fine_tune

MARKER = "tvbases_extract.json"


def extract(
    base: str | Path,
    tasks: Mapping[str, str | Path],
    out: str | Path,
    *,
    rank: str | float | RankRule | None = None,
    budget: float | None = None,
    save: defaults.Saved = "all",
    extra_rows: defaults.ExtraRows | None = None,
    equal_rank: bool = False,
    host: defaults.Host | None = None,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    dry_run: bool = False,
) -> dict[str, Any]:
    """Write ``out/NAME``, a LoRA of its own, for each full fine-tune; and report the errors.

    Args:
        base, tasks: paths or Hub ids; the fine-tunes by name.
        rank: a rank rule for every matrix; or else
        budget: the share of the fine-tune's bytes that its adapter may take: most of the change per byte first.
        save: what is saved whole, since factors do not hold it: ``all`` that changes; ``norms`` and biases; ``none``.
        extra_rows: of vocabularies of other lengths: ``drop`` for the rows of the base (of a longer one the others are
            left, of a shorter one the base's stay); by default, and with ``keep``, longer ones are saved whole, and
            shorter ones refused.
        equal_rank: one rank everywhere, the largest (of a budget: that it affords), padded with zeros.
        host: what will load the adapters; what it cannot read is refused.
        dtype: of all that is written; None for the fine-tune's own.
        device: where decompositions are computed: cpu, cuda, cuda:1.
        dry_run: check everything but the numbers, and report what would be written.

    Returns, by task, the relative errors of the whole change (Frobenius) before and after rounding, the ranks, what is
    saved and what is left. Raises TvbasesError for whatever cannot be; nothing is written then.
    """
    check_output(out, is_extraction)
    check_names(tasks, "task")
    check_apart(out, map(str, (base, *tasks.values())))
    size = Size.of(rank, budget, equal_rank)
    check_rank(host, size.rule)
    if not tasks:
        raise ParameterError("no task given; name at least one, for example --task math=path/to/math")
    opened, place = Checkpoint.open(base), run.find_device(device)
    modules, target = Modules(opened), Target(save, dtype, host)
    jobs = []
    for task, source in tasks.items():
        vectors = open_fine_tune(opened, task, source, place, extra_rows)
        jobs.append(Extraction(task, modules, vectors, vectors.coverage.skipped, target, size))
    notes = [note for job in jobs for note in job.notes()]
    if dry_run:
        infos = [] if size.needs_spectrum else [info for job in jobs for info in job.foreseen().values()]
        sizes = (None, None) if size.needs_spectrum else (len(infos), sum(info.nbytes for info in infos))
        return preview(out, *sizes) | {"warnings": notes}
    with transaction(out, is_extraction, 0, _job(jobs)) as work:
        for job in jobs:
            (work / job.task).mkdir(exist_ok=True)
        plans = [(job, *job.survey(work / job.task)) for job in jobs]
        found = {job.task: job.write(work / job.task, contents, squares) for job, contents, squares in plans}
        report = {"out": str(out), "base": opened.label, "rank_rule": str(size), "save": save, "tasks": found}
        report["loading"] = [f'"{task}": {note}' for task, kept in found.items() for note in kept["loading"]]

        def describe() -> None:
            for task, kept in found.items():
                write_card(work / task, _card(task, opened.label, kept))
            write_json(work / MARKER, {**report, "files": files_in(work)})

        run.once(describe)
    return {**report, "warnings": [*notes, *(note for kept in found.values() for note in kept["notes"])]}


def is_extraction(directory: Path) -> bool:
    """Whether a directory holds extracted adapters and nothing that was put there since."""
    try:
        return set(files_in(directory)) <= {MARKER, *read_json(directory / MARKER)["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _job(jobs: Sequence[Extraction]) -> dict[str, Any]:
    """Whatever decides the output: the same job can go on where a killed one was."""
    first = jobs[0]
    return {
        "extract": {job.task: job.model.fingerprint() for job in jobs},
        "rows": [job.vectors.coverage.rows for job in jobs],
        "base": [first.vectors.base.label, first.vectors.base.fingerprint()],
        "how": [str(first.size), first.size.equal, first.target.save, str(first.target.dtype), first.target.host],
        "version": library_version(),
    }


def _card(task: str, base: str, kept: Mapping[str, Any]) -> str:
    """README.md of one adapter."""
    found = hub_id(base)
    local, base = found is None, found or base
    ranks = list(kept["ranks"])
    rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    lines = [
        *header("peft", base, "adapter", ["lora", "task-arithmetic"]),
        "",
        f"# {in_markdown(task)}, extracted from a full fine-tune",
        "",
        f"A LoRA over {code_span(Path(base).name if local else base)} ({rank}, {', '.join(kept['dtypes'])}), without "
        f"{kept['error']:.3%} of the fine-tune's change, in Frobenius norm.",
        *(["", *(f"* {in_markdown(note)}" for note in kept["notes"])] if kept["notes"] else []),
        "",
        code_block(ADAPTER_USE.format(base=quoted("path/to/the/base" if local else base)), "python"),
        "",
        "The licences of the base model and of the fine-tune apply.",
    ]
    return "\n".join(lines) + "\n"
