"""``tvbases merge`` and ``tvbases mergekit-yaml``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from .app import app
from .habits import (
    CopyTokenizer,
    Cuda,
    LazyUnpickle,
    LoraMergeCache,
    LowCpuMemory,
    OutShardSize,
)
from .hub import PushToHub
from .options import (
    AdapterOut,
    Device,
    DryRun,
    Dtype,
    EqualRank,
    ExtraRows,
    Host,
    Html,
    Json,
    Memory,
    Quiet,
    Resume,
    Seed,
    Threads,
    TrustRemoteCode,
    parse_dtype,
    rank_option,
    tell,
)


class MergeCommand(TyperCommand):
    """Its help lists the methods and constructions of the registries, which are read only then."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        from tvbases_mergekit.registration import MERGEKITS

        from ..bases.registry import CONSTRUCTIONS
        from ..methods.registry import METHODS
        from ..methods.spectrum import LastStep
        from ..options import options_of

        methods = [(name, _described(method)) for name, method in METHODS.items() if name not in MERGEKITS]
        bases = [(bases.yaml, bases.summary) for bases in CONSTRUCTIONS.values()]
        with formatter.section(
            "Our values of merge_method and their parameters (tvbases schema has mergekit's as well)"
        ):
            formatter.write_dl(methods)
        with formatter.section("All of these also take, for matrices"):
            formatter.write_dl([(name, _told(option)) for name, option in options_of(LastStep).items()])
        with formatter.section("Over bases, with the parameters of tvbases compress"):
            formatter.write_dl(bases)
        super().format_epilog(ctx, formatter)


def _told(option: Any) -> str:
    return f"{option.help}, default: {'none' if option.default is None else option.default}"


def _described(method: Any) -> str:
    options = [f"{name}: {_told(option)}" for name, option in method.own_options.items()]
    return " ".join([method.summary, *(f"{option};" for option in options)]).rstrip(";")


@app.command(cls=MergeCommand, epilog="Example: tvbases merge merge.yml merged-lora/ --adapter --rank 16")
def merge(
    config: Annotated[Path, typer.Argument(help="A mergekit YAML; models may be adapters.", metavar="CONFIG")],
    out: Annotated[Path, typer.Argument(help="The directory to write.", metavar="OUT")],
    adapter: AdapterOut = False,
    rank: Annotated[str | None, rank_option("what is kept of the merged adapter; default: all of it.")] = None,
    equal_rank: EqualRank = False,
    host: Host = None,
    dtype: Dtype = "auto",
    seed: Seed = 0,
    extra_rows: ExtraRows = None,
    intermediate_dir: Annotated[
        Path | None,
        typer.Option(
            "--intermediate-dir",
            help="Where to write the merges that have a name, if CONFIG holds several documents.",
            metavar="DIR",
        ),
    ] = None,
    device: Device = "cpu",
    threads: Threads = None,
    memory: Memory = None,
    resume: Resume = True,
    dry_run: DryRun = False,
    trust_remote_code: TrustRemoteCode = False,
    quiet: Quiet = False,
    push_to_hub: PushToHub = None,
    json: Json = None,
    html: Html = None,
    cuda: Cuda = False,
    copy_tokenizer: CopyTokenizer = False,
    lazy_unpickle: LazyUnpickle = False,
    low_cpu_memory: LowCpuMemory = False,
    lora_merge_cache: LoraMergeCache = None,
    out_shard_size: OutShardSize = None,
) -> None:
    """Merge as a mergekit YAML says, on the changes of weights. No model is built; adapters stay adapters.

    --dtype auto: what the YAML says, else the base's own; float32 for the factors of adapters.
    """
    from tvbases_mergekit import merge as run

    from .tables import print_merge

    how: dict[str, Any] = {"dtype": parse_dtype(dtype), "seed": seed, "extra_rows": extra_rows}
    how["device"] = "cuda" if cuda and device == "cpu" else device
    how |= {"equal_rank": equal_rank, "host": host, "intermediate_dir": intermediate_dir, "dry_run": dry_run}
    found = run(config, out, adapter=adapter, rank=rank, **how)
    tell(found, print_merge, json, html)


@app.command(
    "mergekit-yaml",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    epilog="Example: tvbases mergekit-yaml merge.yml merged/ --cuda",
)
def mergekit_yaml(context: typer.Context) -> None:
    """Run mergekit-yaml with ae_bases and the others. It takes CONFIG OUT and every option that mergekit has."""
    from tvbases_mergekit.command import merge

    if previewed := merge(context.args):
        from .app import console
        from .tables import print_preview

        print_preview(previewed, console)
