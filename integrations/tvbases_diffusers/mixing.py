"""mix_styles: several style LoRAs as one adapter of a pipeline, with a scale for each that stays live."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tvbases_hf.defaults import StyleLoader
from tvbases_hf.errors import CheckpointError, MismatchError, ParameterError
from tvbases_hf.methods.devec import THRESHOLD, Options, Pool, Side, Subspace
from tvbases_hf.storage.parallel import for_all
from tvbases_hf.storage.run import track
from tvbases_hf.styles.lora_layers import BIAS, A, B
from tvbases_hf.styles.lora_source import Source, name_styles
from tvbases_hf.styles.mixed_file import rounded, write_mix
from tvbases_hf.styles.mixing import Part, Recipe, Styles, bias, recipe_of, split
from tvbases_hf.styles.report import Tally
from tvbases_hf.styles.scales import by_style, parse_scales

from .live import Factors, Remade, are_finite, live
from .pipeline import (
    AdapterState,
    adapters,
    check_fits,
    is_fused,
    layer_of,
    load,
    open_style,
    remove,
    require_loader,
)
from .schedule import Schedule, attach, detach

ADAPTER = "styles"
HANDLES = "_tvbases_styles"


def mix_styles(
    pipe: Any,
    styles: Mapping[str, Source] | Sequence[Source],
    component: str | None = None,
    *,
    method: str | None = None,
    method_options: Mapping[str, Any] | None = None,
    scales: Mapping[str, float] | None = None,
    threshold: float = THRESHOLD,
    subspace: Subspace = "chain",
    pool: Pool = "joint",
    side: Side = "column",
    rank: str | float | None = None,
    shared_weight: float | None = None,
    adapter_name: str = ADAPTER,
) -> StyleMix:
    """Mix style LoRAs into one adapter of the pipeline and make it the active one.

    Args:
        pipe: any diffusers pipeline with a LoRA loader, or a transformer or UNet without one.
        styles: by name, a LoRA file in any of diffusers' formats, a directory, a Hub id, a state dict, or the name of
            an adapter that is loaded (it stays loaded, and inactive). Those of a list are called like their files.
        component: ``unique`` (the default without a method) takes what the styles share out of each, ``shared`` takes
            only that, ``full`` (the default with one) is the whole style.
        method, method_options: the merging method that makes one change of the components, a name in METHODS with its
            options; None adds them up.
        scales: of each style; 1 where none is given. ``StyleMix.set_style_scales`` changes them later.
        threshold, subspace, pool, side: see tvbases_hf.methods.devec.Options.
        rank: a rank rule for the directions of a style that count (``energy:0.9``, 4, ...); None for all.
        shared_weight: with ``unique``, how much of one copy of what the styles share is added; None: all of it, but
            none for a method.

    Raises:
        MissingExtraError, ParameterError, CheckpointError, MismatchError: each with what to do; the pipeline is then
        what it was.
    """
    require_loader(pipe)
    styles = name_styles(styles)
    options = Options(threshold, subspace, pool, side, factored_rank=rank)
    recipe = recipe_of(component, options, shared_weight, method, method_options)
    # PEFT keeps adapters in a ModuleDict, whose own attributes and dots are no names.
    if not adapter_name or "." in adapter_name or hasattr(torch.nn.ModuleDict(), adapter_name):
        raise ParameterError(f'"{adapter_name}" is no name for an adapter: PEFT cannot have one; give another')
    if adapter_name in adapters(pipe):
        raise ParameterError(f'an adapter "{adapter_name}" is loaded already; unload it, or give adapter_name')
    opened = Styles({name: open_style(pipe, name, source) for name, source in styles.items()})
    numbers = parse_scales(opened.names, scales)
    check_fits(pipe, opened)
    counted, parts, stream = Tally(opened, recipe), [], split(opened, recipe)
    for _ in track(opened.places, "Mixing", lambda place: place.nbytes):
        part = next(stream)
        counted.add(part)
        parts.append(part)
    report = counted.report()
    sources = {name: source if isinstance(source, (str, Path)) else "state dict" for name, source in styles.items()}
    mix = StyleMix(pipe, opened, recipe, parts, numbers, report, adapter_name, {n: str(s) for n, s in sources.items()})
    vars(pipe).setdefault(HANDLES, {})[adapter_name] = mix
    return mix


def set_style_scales(pipe: Any, scales: Mapping[str, float], adapter_name: str = ADAPTER) -> None:
    """Change the scales of styles that are mixed in the pipeline; the others keep theirs."""
    _handle(pipe, adapter_name).set_style_scales(scales)


def unload_styles(pipe: Any, adapter_name: str = ADAPTER) -> None:
    """Take the mix out; the pipeline is then what it was before."""
    _handle(pipe, adapter_name).unload()


def _handle(pipe: Any, adapter_name: str) -> StyleMix:
    found = vars(pipe).get(HANDLES, {})
    if adapter_name not in found:
        raise ParameterError(f'no styles are mixed as "{adapter_name}" in this pipeline; call mix_styles first')
    return found[adapter_name]


class StyleMix:
    """Styles that are mixed in a pipeline. ``report`` says how much of each is shared; ``scales`` what holds now."""

    def __init__(
        self,
        pipe: Any,
        styles: Styles,
        recipe: Recipe,
        parts: list[Part],
        scales: dict[str, float],
        report: dict[str, Any],
        adapter_name: str,
        sources: dict[str, str],
    ) -> None:
        """Load the adapter. Nothing is left of it where that fails."""
        self.recipe, self.report, self.adapter_name, self.sources = recipe, report, adapter_name, sources
        self._pipe, self._styles, self._parts = pipe, styles, parts
        self._scales, self._written, self._schedule = dict(scales), dict(scales), None
        self._weights, self._there, self._remade = list[Remade](), frozenset[str](), False
        self._before = AdapterState.of(pipe)
        try:
            state = self._state()
            load(pipe, state, adapter_name)
            self._check_loaded(state)
            del state
            self._check_fits(scales)
            pipe.set_adapters(adapter_name)
            self._remade = False
            for weight in self._weights:
                weight.forget()
        except Exception:
            remove(pipe, adapter_name, self._before)
            raise

    @property
    def names(self) -> tuple[str, ...]:
        return self._styles.names

    @property
    def scales(self) -> dict[str, float]:
        """What was given; a schedule may have other numbers at work."""
        return dict(self._scales)

    @property
    def is_loaded(self) -> bool:
        return self._is_known and self.adapter_name in adapters(self._pipe)

    @property
    def _is_known(self) -> bool:
        """Not unloaded here; the pipeline itself may have unloaded the adapter."""
        return vars(self._pipe).get(HANDLES, {}).get(self.adapter_name) is self

    def set_style_scales(self, scales: Mapping[str, float]) -> None:
        """Change the scales of some styles; nothing is decomposed again, but by a method. Ends a schedule."""
        self._require_loaded()
        wanted = parse_scales(self.names, self._scales | by_style("scales", scales))
        self._check_fits(wanted)
        self._scales = wanted
        self.schedule(None)

    def schedule(self, scales: Mapping[str, Any] | None) -> None:
        """Scales as functions of the denoising step, from the next image on; None ends it.

        Args:
            scales: by style, a number; a list, which is spread evenly over the steps; or a callable of the step's
                number and the number of steps. Styles that are not named keep their scale.
        """
        self._require_loaded()
        parsed = None if scales is None else Schedule.parse(self.names, scales)
        detach(self._pipe, self.adapter_name)
        self._schedule = parsed
        if parsed is not None:
            attach(self._pipe, self.adapter_name, self._follow)
        self._write(self._scales)

    def save(
        self,
        path: str | Path,
        *,
        dtype: torch.dtype | None = None,
        loader: StyleLoader = "diffusers",
        family: str | None = None,
    ) -> dict[str, Any]:
        """Write the mix, at the scales given, as a LoRA file that the loader reads, its recipe in the header."""
        how: dict[str, Any] = {"parts": self._parts, "sources": self.sources, "dtype": dtype}
        how |= {"loader": loader, "family": family}
        return write_mix(self._styles, self.recipe, self._scales, Path(path), **how)

    def unload(self) -> None:
        """Take the adapter out; adapters that were active before are active again. Twice is once.

        Raises ParameterError while it is fused into the weights, out of which nothing would take it.

        A mix that came later stays as it is, and gives back, in its turn, what was before both.
        """
        if not self._is_known:
            return
        self._require_apart()
        detach(self._pipe, self.adapter_name)
        if self.is_loaded:
            self._give_back()
        del vars(self._pipe)[HANDLES][self.adapter_name]

    def _give_back(self) -> None:
        mixes = list(vars(self._pipe)[HANDLES].values())
        later, left = mixes[mixes.index(self) + 1 :], self._before
        if later:
            left = AdapterState.of(self._pipe).without(self.adapter_name, self._before)
        for mix in later:
            mix._before = mix._before.without(self.adapter_name, self._before)
        remove(self._pipe, self.adapter_name, left)

    def _state(self) -> dict[str, torch.Tensor]:
        biased = {part.place.component for part in self._parts if part.place.has_bias}
        state = {}
        for weight, part in self._pairs(self._scales):
            state |= weight.factors(self._scales)
            if part.place.component in biased:
                state[f"{weight.name}.lora_B.bias"] = bias(part, self._scales)
        return state

    def _check_loaded(self, state: Mapping[str, torch.Tensor]) -> None:
        """diffusers leaves out, with a line in the log, what it finds no place for.

        Raises ParameterError for numbers that the layers' dtype cannot hold.
        """
        for weight in self._live(self._scales):
            layer, name = layer_of(self._pipe, weight.part.place), weight.name
            if self.adapter_name not in getattr(layer, "lora_B", {}) or layer.r[self.adapter_name] != weight.rank:
                raise MismatchError(f"{type(self._pipe).__name__} did not load {name}")
            first, second = layer.lora_A[self.adapter_name], layer.lora_B[self.adapter_name]
            loaded = {A: first.weight, B: second.weight} | ({} if second.bias is None else {BIAS: second.bias})
            for part, found in loaded.items():
                wanted = rounded(f"{name}.{part}", state[f"{name}.{part}"], found.dtype).to(found)
                if layer.scaling[self.adapter_name] != 1 or not torch.equal(found, wanted):
                    raise CheckpointError(f"diffusers changed {name} while loading it")

    def _check_fits(self, scales: Mapping[str, float]) -> None:
        """ParameterError for scales at which the layers' dtype cannot hold a factor or a bias; nothing is changed."""
        for_all(self._pairs(scales), lambda pair: self._check_one(*pair, scales))

    def _check_one(self, weight: Remade, part: Part, scales: Mapping[str, float]) -> None:
        second = layer_of(self._pipe, part.place).lora_B[self.adapter_name]
        weight.check(scales, second.weight.dtype)
        if part.biases and second.bias is not None:
            rounded(f"{weight.name}.{BIAS}", bias(part, scales), second.bias.dtype)

    def _pairs(self, scales: Mapping[str, float]) -> list[tuple[Remade, Part]]:
        return list(zip(self._live(scales), self._parts, strict=True))

    def _live(self, scales: Mapping[str, float]) -> list[Remade]:
        """The weights as they follow their scales; of a linear method others where other styles are left out, by 0."""
        there, method = frozenset(name for name in self.names if scales[name] != 0), self.recipe.method
        if not self._weights or (method is not None and method.is_linear and there != self._there):
            self._weights = [live(part, scales, self.recipe.rank(part.place)) for part in self._parts]
            self._there, self._remade = there, True
        return self._weights

    def _follow(self, step: int, steps: int) -> None:
        """Write the scales of a step. Raises ParameterError, with the scales given in place, for numbers too large.

        Nothing where the pipeline itself has unloaded the adapter.
        """
        if self._schedule is None or not self.is_loaded:
            return
        self._require_apart()
        now = self._schedule.at(step, steps)
        scales = {**self._scales, **now}
        if scales == self._written:
            return
        self._write(scales)
        layers = [layer_of(self._pipe, part.place) for part in self._parts]
        if not are_finite(own[self.adapter_name] for layer in layers for own in (layer.lora_A, layer.lora_B)):
            self._write(self._scales)
            words = ", ".join(f"{name} {scale:g}" for name, scale in now.items())
            raise ParameterError(f"the schedule's scales {words} are too large for the pipeline's dtype; take smaller")

    def _write(self, scales: Mapping[str, float]) -> None:
        """Put scales into the factors, of the styles whose scale is another than before."""
        changed = {name for name in self.names if scales[name] != self._written[name]}
        if changed:
            both, remade = self._pairs(scales), self._remade
            for_all(both, lambda pair: self._write_one(*pair, scales, changed, remade))
            self._written, self._remade = dict(scales), False

    def _write_one(
        self, weight: Remade, part: Part, scales: Mapping[str, float], changed: set[str], remade: bool
    ) -> None:
        layer = layer_of(self._pipe, part.place)
        second = layer.lora_B[self.adapter_name]
        if second.weight.is_meta:
            raise ParameterError("the weights are offloaded to nowhere; set the scales before sequential offloading")
        where = Factors(layer, self.adapter_name)
        weight.rewrite(where, scales) if remade else weight.write(where, scales, changed)
        if changed & part.biases.keys() and second.bias is not None:
            second.bias.data.copy_(bias(part, scales))

    def _require_loaded(self) -> None:
        if not self.is_loaded:
            raise ParameterError(f'the mix "{self.adapter_name}" was unloaded; call mix_styles again')
        self._require_apart()

    def _require_apart(self) -> None:
        """ParameterError while fuse_lora has added the adapter to the weights, which follow no scale then."""
        if is_fused(self._pipe, self.adapter_name):
            raise ParameterError(f'the mix "{self.adapter_name}" is fused into the weights; call unfuse_lora first')
