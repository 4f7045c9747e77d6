"""Merge methods for mergekit: bases (``ae_bases`` and others), and the methods of tvbases_hf that it lacks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .registration import register

if TYPE_CHECKING:
    import torch

    from tvbases_hf.defaults import ExtraRows, Host
    from tvbases_hf.models.vectors import Vectors

    from .native import Job


def merge(
    config: str | Path,
    out: str | Path,
    *,
    adapter: bool = False,
    rank: str | None = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    extra_rows: ExtraRows | None = None,
    device: str | torch.device = "cpu",
    equal_rank: bool = False,
    host: Host | None = None,
    intermediate_dir: str | Path | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """A mergekit YAML, executed on the changes of weights: no model is built, adapters stay adapters.

    Args:
        adapter: adapters in: write an adapter, cut by the rank rule ``rank`` (None: nothing is cut).
        dtype: None: the YAML's, else the base's own; of an adapter's factors float32.
        seed: of methods that draw at random, such as dare_ties.
        extra_rows: of vocabularies of other lengths: drop (the common rows), keep (those of the longest); None
            refuses them.
        equal_rank: of an adapter: one rank in all modules, padded with zeros.
        host: what will load the adapter (vllm, llama.cpp, diffusers, peft); what it cannot read is refused.
        intermediate_dir: where the merges that have a name are written, of a file with several documents.
        dry_run: check everything and report what would be written.

    Raises:
        MissingExtraError: no mergekit.
        TvbasesError: whatever is wrong with the configuration, its models or the output; nothing is written then.
    """
    register()  # before anything that needs mergekit is imported: its message names the extra
    from .native import Request
    from .native import merge as run

    folder = None if intermediate_dir is None else Path(intermediate_dir)
    request = Request(adapter, rank, dtype, seed, extra_rows, device, dry_run, equal_rank, host, folder)
    return run(Path(config), Path(out), request)


def open_merge(config: str | Path, out: str | Path, **how: Any) -> Job:
    """The merge that ``merge`` would write to ``out``, not yet computed: ``write(job.plan(), out, **job.how)`` does it.

    Takes the arguments of ``merge``, and raises as it does.
    """
    register()
    from .native import Job, Request

    return Job.open(Path(config), Path(out), Request(**how))


def summands(job: Job) -> tuple[Vectors, float]:
    """(vectors, scale) of a merge that is scale times their sum. Raises ParameterError for any other."""
    from .addends import summands as found

    return found(job)


__all__ = ["merge", "open_merge", "register", "summands"]
