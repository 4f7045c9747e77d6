"""A mix of styles as one LoRA file that diffusers loads as it is, written one weight at a time."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from .. import defaults
from ..algebra.delta import LowRank
from ..errors import ParameterError
from ..methods.devec import Options
from ..storage.checkpoint import TensorInfo
from ..storage.files import home_path
from ..storage.json_files import parse_json
from ..storage.output import check_output_file, file_transaction, preview
from ..storage.run import track
from ..storage.tensor_files import ONE_FILE, TensorFiles, metadata_of
from ..version import library_version
from .comfy_file import Matrix, all_infos, comfy_matrices, with_equal_ranks, write_comfy
from .lora_layers import BIAS, A, B
from .lora_source import METADATA, name_styles
from .mixing import Part, Recipe, Styles, bias, combine, recipe_of, split
from .places import Place
from .report import Tally, recipe_words
from .scales import parse_scales

RECIPE = "tvbases_styles"
PICKLES = (".bin", ".ckpt", ".pt", ".pth")


def mix_style_files(
    styles: Mapping[str, str] | Sequence[str],
    out: str | Path,
    *,
    scales: Mapping[str, float] | None = None,
    component: str | None = None,
    method: str | None = None,
    method_options: Mapping[str, Any] | None = None,
    shared_weight: float | None = None,
    threshold: float = defaults.THRESHOLD,
    subspace: defaults.Subspace = "chain",
    pool: defaults.Pool = "joint",
    side: defaults.Side = "column",
    rank: str | float | None = None,
    dtype: torch.dtype | None = None,
    pairs: bool = False,
    loader: defaults.StyleLoader = "diffusers",
    family: str | None = None,
    equal_rank: bool = False,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Mix style LoRAs into one LoRA file, and return the report. No model is loaded.

    Args:
        styles: by name, a file in any of diffusers' formats, a directory or a Hub id each; those of a list are called
            like their files.
        scales: of each style; 1 where none is given.
        component, shared_weight, method, method_options: see Recipe and recipe_of.
        threshold, subspace, pool, side, rank: see Options (rank is that of low-rank changes; None for all directions of
            a style).
        dtype, pairs, loader, family, equal_rank: see write_mix.
        dry_run: check everything and report what would be written.

    Raises ParameterError, CheckpointError, MismatchError or OutputError; nothing is written then.
    """
    check_output_file(out, is_mix)
    _check_suffix(Path(out))
    styles = {name: str(source) for name, source in name_styles(styles).items()}
    options = Options(threshold, subspace, pool, side, factored_rank=rank)
    recipe = recipe_of(component, options, shared_weight, method, method_options)
    numbers = parse_scales(tuple(styles), scales)
    opened = Styles.open(styles)
    if dry_run:
        _, infos, matrices = _plan(opened, recipe, numbers, dtype, loader, family, equal_rank)
        infos = all_infos(matrices, infos) if matrices else infos
        return preview(out, len(infos), sum(info.nbytes for info in infos.values()))
    how: dict[str, Any] = {"dtype": dtype, "pairs": pairs, "loader": loader, "family": family}
    return write_mix(opened, recipe, numbers, Path(out), sources=styles, equal_rank=equal_rank, **how)


def write_mix(
    styles: Styles,
    recipe: Recipe,
    scales: Mapping[str, float],
    out: Path,
    *,
    parts: Iterable[Part] | None = None,
    sources: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
    pairs: bool = False,
    loader: defaults.StyleLoader = "diffusers",
    family: str | None = None,
    equal_rank: bool = False,
) -> dict[str, Any]:
    """Write the mix, scales inside, and the recipe in the header; return the report.

    Memory is that of one weight, whatever the model, unless ``parts`` are at hand. ``dtype`` None: the narrowest that
    holds the styles' own factors. ``loader`` says whose names the file has: diffusers' or ComfyUI's, which diffusers
    reads as well; ``family`` whose model it is for, where several have all modules and other names.
    ``equal_rank``: one rank in all modules, padded with zeros.

    Raises OutputError for a file that is not ours, and ParameterError if nothing would be mixed or the model has no
    names in ComfyUI; nothing is written.
    """
    _check_suffix(out)
    stored, biased = _stored(styles, dtype), _biased(styles)
    ranks, infos, matrices = _plan(styles, recipe, scales, dtype, loader, family, equal_rank)
    counted = Tally(styles, recipe, pairs)
    header = {RECIPE: json.dumps(recipe_header(recipe, scales, sources)), METADATA: json.dumps(lora_metadata(ranks))}
    with file_transaction(out, is_mix, sum(info.nbytes for info in infos.values())) as file:
        files = TensorFiles(file.parent, file.stem, infos, ONE_FILE, header)
        stream = iter(split(styles, recipe) if parts is None else parts)
        for place in track(styles.places, "Mixing", lambda place: place.nbytes):
            part = next(stream)
            counted.add(part)
            change = combine(part, scales)
            tensors = factors(place, change, torch.float32, ranks[place])
            if place.component in biased:
                tensors[_name(place, BIAS)] = bias(part, scales)
            for name, tensor in tensors.items():
                files.write(name, rounded(name, tensor, stored))
        found = counted.report() | {"scales": dict(scales), "out": str(out), "dtype": str(stored).split(".")[-1]}
        written = file.parent / f"{file.stem}.safetensors"
        if matrices:
            written = write_comfy(written, file.with_name(f"{file.stem}-comfy.safetensors"), matrices, header)
        written.rename(file)
    return found | {"bytes": home_path(out).stat().st_size}


def _check_suffix(out: Path) -> None:
    if out.suffix in PICKLES:
        raise ParameterError(f'"{out}": the mix is a safetensors file, which {out.suffix} is not; name it .safetensors')


def _plan(
    styles: Styles,
    recipe: Recipe,
    scales: Mapping[str, float],
    dtype: torch.dtype | None,
    loader: str,
    family: str | None,
    equal_rank: bool,
) -> tuple[dict[Place, int], dict[str, TensorInfo], tuple[Matrix, ...]]:
    """The rank of each weight, the tensors in diffusers' names, and what they become in ComfyUI's, if in those."""
    matrices = _matrices(styles, loader, family)
    ranks = _ranks(styles, recipe, scales, equal_rank and not matrices)
    infos = _all_infos(styles, ranks, dtype)
    return ranks, infos, with_equal_ranks(matrices, infos) if equal_rank and matrices else matrices


def _matrices(styles: Styles, loader: str, family: str | None) -> tuple[Matrix, ...]:
    """Of ComfyUI; none for diffusers."""
    if loader not in get_args(defaults.StyleLoader):
        raise ParameterError(f"unknown loader {loader!r}; choose one of {', '.join(get_args(defaults.StyleLoader))}")
    if family is not None and loader != "comfy":
        raise ParameterError("family goes with the loader comfy: diffusers' names are those of every family")
    return comfy_matrices(styles.places, family) if loader == "comfy" else ()


def factors(place: Place, change: LowRank, dtype: torch.dtype, rank: int = 1) -> dict[str, Tensor]:
    """lora_A and lora_B of one weight in diffusers' names, with rows of zeros up to ``rank``; PEFT has no rank 0."""
    left, right = change.left, change.right
    if (more := rank - change.rank) > 0:
        left = torch.cat([left, left.new_zeros(len(left), more)], dim=1)
        right = torch.cat([right, right.new_zeros(more, right.shape[1])])
    if place.kernel:
        left = left.reshape(*left.shape, *(1 for _ in place.kernel))
        right = right.reshape(len(right), -1, *place.kernel)
    return {_name(place, A): right.to(dtype).contiguous(), _name(place, B): left.to(dtype).contiguous()}


def rounded(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor of the mix in another dtype. Raises ParameterError for numbers that it cannot hold."""
    lost = int((~(tensor.abs() <= torch.finfo(dtype).max)).sum())  # eight-bit floats would become the largest
    kind = str(dtype).removeprefix("torch.")
    if lost:
        raise ParameterError(
            f"the mix: {lost} of {tensor.numel()} numbers of {name} are too large for {kind}; take bfloat16 or "
            "float32, or smaller scales"
        )
    found = tensor.to(dtype)
    if tensor.any() and not found.float().any():
        raise ParameterError(f"the mix: all numbers of {name} are zero as {kind}; take float32, or larger scales")
    return found


def lora_metadata(ranks: Mapping[Place, int]) -> dict[str, Any]:
    """PEFT's configuration of each component, as diffusers keeps it: alpha = rank everywhere, so that scales are 1."""
    words: dict[str, Any] = {}
    for component in dict.fromkeys(place.component for place in ranks):
        # transformers 5 has no "text_model." in front of a text encoder's names, 4 has; both know the ends.
        text = component.startswith("text_encoder")
        own = {
            place.module.removeprefix("text_model.") if text else place.module: rank
            for place, rank in ranks.items()
            if place.component == component
        }
        common = Counter(own.values()).most_common(1)[0][0]
        pattern = {module if text else f"^{module}": rank for module, rank in own.items() if rank != common}
        config = {
            "r": common,
            "lora_alpha": common,
            "rank_pattern": pattern,
            "alpha_pattern": pattern,
            "target_modules": sorted(own),
            "lora_bias": any(place.has_bias for place in ranks if place.component == component),
        }
        words |= {f"{component}.{key}": value for key, value in config.items()}
    return words


def recipe_header(
    recipe: Recipe, scales: Mapping[str, float], sources: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """What the file says of itself: styles with their scales and sources, the recipe, the library's version."""
    styles = {name: {"scale": scale, "source": (sources or {}).get(name, "")} for name, scale in scales.items()}
    return {"styles": styles, **recipe_words(recipe), "tvbases_hf": library_version()}


def read_recipe(file: str | Path) -> dict[str, Any] | None:
    """The recipe in a file's header; None if there is none."""
    text = metadata_of(home_path(file)).get(RECIPE)
    try:
        return parse_json(text) if text else None
    except ValueError:
        return None


def is_mix(file: Path) -> bool:
    """Whether a file is a mix of styles, which a new one may replace."""
    return read_recipe(file) is not None


def _name(place: Place, part: str) -> str:
    return f"{place.name}.{part}"


def _stored(styles: Styles, dtype: torch.dtype | None) -> torch.dtype:
    if dtype is not None and not dtype.is_floating_point:
        raise ParameterError(f"a mix cannot be stored as {dtype}; take float32, bfloat16 or float16")
    return dtype or (torch.float32 if styles.dtype == torch.float64 else styles.dtype)


def _ranks(styles: Styles, recipe: Recipe, scales: Mapping[str, float], equal: bool = False) -> dict[Place, int]:
    own = {place: max(1, recipe.rank(place, scales)) for place in styles.places}
    return dict.fromkeys(own, max(own.values())) if equal else own


def _biased(styles: Styles) -> set[str]:
    """Components of which some module has a LoRA bias: then all have one in the file."""
    return {place.component for place in styles.places if place.has_bias}


def _all_infos(styles: Styles, ranks: Mapping[Place, int], dtype: torch.dtype | None) -> dict[str, TensorInfo]:
    stored, biased = _stored(styles, dtype), _biased(styles)
    return {name: info for place in styles.places for name, info in _infos(place, ranks[place], stored, biased)}


def _infos(place: Place, rank: int, dtype: torch.dtype, biased: set[str]) -> Iterable[tuple[str, TensorInfo]]:
    rows, columns = place.shape
    kernel = place.kernel
    inputs = columns
    for size in kernel:
        inputs //= size
    yield _name(place, A), TensorInfo((rank, inputs, *kernel), dtype)
    yield _name(place, B), TensorInfo((rows, rank, *(1 for _ in kernel)), dtype)
    if place.component in biased:
        yield _name(place, BIAS), TensorInfo((rows,), dtype)
