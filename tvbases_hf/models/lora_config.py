"""What adapter_config.json says: every option of PEFT's LoraConfig is harmless, handled or refused, by name."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from ..errors import CheckpointError
from ..storage.json_files import read_object, wrong_values
from .patterns import PATIENCE, Patience, PatternError, check_pattern, check_time

CONFIG_FILE = "adapter_config.json"
WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")

# These concern training, or say in other words what the names of the stored tensors say.
HARMLESS = frozenset(
    {
        "auto_mapping",
        "corda_config",  # initialisations: what matters is init_lora_weights
        "ensure_weight_tying",  # adapters of tied matrices are refused, whether tied themselves or not
        "eva_config",
        "inference_mode",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "modules_to_save",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
    }
)
HANDLED = frozenset(
    {
        "alpha_pattern",
        "base_model_name_or_path",
        "bias",
        "exclude_modules",
        "fan_in_fan_out",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "lora_bias",
        "peft_type",
        "r",
        "rank_pattern",
        "target_modules",
        "target_parameters",
        "task_type",
        "trainable_token_indices",
        "use_dora",
        "use_rslora",
    }
)
# With any of these on, s B A is not the change of the weight, or not of one weight.
REFUSED = {
    "alora_invocation_tokens": "aLoRA, which acts on some of the tokens",
    "arrow_config": "Arrow, which routes between adapters",
    "kasa_config": "KaSA, which also truncates the base's weights",
    "layer_replication": "replicated layers, which the base does not have",
    "megatron_config": "Megatron's parallel layers",
    "use_qalora": "QA-LoRA, which pools its input",
}
# LoRA whose change only PEFT computes: MonteCLoRA averages experts, BD-LoRA has blocks, VeLoRA projections of its own.
OF_PEFT = ("monteclora_config", "use_bdlora", "velora_config")
# Written by other programs; about training only.
FOREIGN = frozenset({"lora_dtype", "lorap_emb_lr", "lorap_lr_ratio", "merge_weights"})
# Initialisations that subtract s B A from the base: the factors belong to that base until they are converted.
BASE_CHANGING_INITS = ("corda", "loftq", "lora_ga", "olora", "pissa")


class Words(BaseModel):
    """The kinds of what is read of adapter_config.json; the numbers are checked one by one (LoraOptions)."""

    model_config = ConfigDict(strict=True)

    auto_mapping: dict[str, Any] | None = None
    base_model_name_or_path: str | None = None
    bias: str | None = None
    exclude_modules: str | list[str] | None = None
    fan_in_fan_out: bool | None = None
    lora_bias: bool | None = None
    modules_to_save: list[str] | None = None
    target_modules: str | list[str] | None = None
    task_type: str | None = None
    use_dora: bool | None = None
    use_rslora: bool | None = None


@dataclass(frozen=True)
class LoraOptions:
    """The numbers of a LoRA: rank and alpha with their exceptions by pattern, and what else scales or shapes it."""

    rank: int = 8
    alpha: float = 8.0
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    fan_in_fan_out: bool = False
    targets: tuple[str, ...] | str | None = None
    excluded: tuple[str, ...] | str | None = None
    label: str = ""
    """What messages call the adapter."""
    patience: Patience = field(default_factory=Patience, compare=False)
    layers: tuple[int, ...] = ()
    layers_patterns: tuple[str, ...] = ()
    tokens: Mapping[str, tuple[int, ...]] | tuple[int, ...] = ()
    parameters: tuple[str, ...] = ()

    @classmethod
    def parse(cls, config: Mapping[str, Any], label: str) -> LoraOptions:
        """Read the configuration; defaults are PEFT's.

        Raises CheckpointError for another method, an option whose effect is not a plain change of weights or is not
        known, an initialisation that changed the base, and values of the wrong kind.
        """
        _refuse_variants(config, label)
        _check_kinds(config, label)
        try:
            return cls(
                rank=_whole(config.get("r", 8)),
                alpha=_finite(config.get("lora_alpha", 8)),
                rank_pattern={_end(k): _whole(v) for k, v in (config.get("rank_pattern") or {}).items()},
                alpha_pattern={_end(k): _finite(v) for k, v in (config.get("alpha_pattern") or {}).items()},
                use_rslora=bool(config.get("use_rslora")),
                use_dora=bool(config.get("use_dora")),
                lora_bias=bool(config.get("lora_bias")),
                fan_in_fan_out=bool(config.get("fan_in_fan_out")),
                targets=_modules(config.get("target_modules")),
                excluded=_modules(config.get("exclude_modules")),
                label=label,
                layers=_numbers(config.get("layers_to_transform")),
                layers_patterns=tuple(_layer(str(own)) for own in _several(config.get("layers_pattern"))),
                tokens=_tokens(config.get("trainable_token_indices")),
                parameters=tuple(map(str, _several(config.get("target_parameters")))),
            )
        except (TypeError, ValueError, AttributeError, OverflowError) as error:
            raise CheckpointError(f'"{label}": {CONFIG_FILE} is damaged: {error}') from error

    def rank_of(self, module: str) -> int:
        return self._first_match(self.rank_pattern, module, self.rank)

    def scaling(self, module: str, rank: int) -> float:
        """alpha / rank, or alpha / sqrt(rank) for rsLoRA."""
        alpha = self._first_match(self.alpha_pattern, module, self.alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def is_target(self, module: str) -> bool:
        """Whether PEFT would put an adapter on this module; True where the configuration does not say."""
        if (self.targets is None and not self.parameters) or self.targets == "all-linear":
            return not self._matches(self.excluded, module)
        return (
            self._matches(self.targets, module)
            and not self._matches(self.excluded, module)
            and self._is_in_chosen_layer(module)
        )

    def _is_in_chosen_layer(self, module: str) -> bool:
        """PEFT's rule: layers are chosen among modules named by the end of their name, by the first number in it."""
        if not self.layers or isinstance(self.targets, str) or module in (self.targets or ()):
            return True
        patterns = self.layers_patterns or (r".*?\.[^.]*\.(\d+)\.",)
        found = next((groups for pattern in patterns if (groups := self._asked("groups", pattern, module))), None)
        return found is not None and found[0] in map(str, self.layers)

    def tokens_of(self, module: str) -> tuple[int, ...]:
        """The rows of an embedding that were trained; none where the configuration does not say."""
        if not isinstance(self.tokens, Mapping):
            return self.tokens
        return next((rows for name, rows in self.tokens.items() if f".{module}".endswith(f".{name}")), ())

    def _first_match(self, patterns: Mapping[str, Any], module: str, default: Any) -> Any:
        """PEFT's rule: the first pattern that matches the end of the module's name, at a dot."""
        return next((value for pattern, value in patterns.items() if self._asked("match", pattern, module)), default)

    def _matches(self, names: tuple[str, ...] | str | None, module: str) -> bool:
        """PEFT's rule: a string is a regular expression for the whole name, a list holds ends of names."""
        if not names:
            return False
        if isinstance(names, str):
            return self._asked("fullmatch", names, module)
        return any(module == name or module.endswith(f".{name}") for name in names)

    def _asked(self, how: str, pattern: str, module: str) -> Any:
        try:
            return getattr(self.patience, how)(pattern, module)
        except PatternError as error:
            raise CheckpointError(f'"{self.label}": {CONFIG_FILE}: {error}') from error


def read_config(path: Path, label: str) -> dict[str, Any]:
    """adapter_config.json; CheckpointError when it is absent, not JSON, or holds values of other kinds."""
    file = path / CONFIG_FILE
    if not file.is_file():
        present = [name for name in WEIGHT_FILES if (path / name).is_file()]
        detail = f"{present[0]} is here but not {CONFIG_FILE}" if present else f"it has no {CONFIG_FILE}"
        inside = sorted(file.parent.name for file in path.glob(f"*/{CONFIG_FILE}"))
        if inside and not present:
            detail += f", but {len(inside)} of its folders have: {', '.join(inside[:5])}; give one of them"
        raise CheckpointError(f'"{label}": not a PEFT adapter: {detail}')
    config = read_object(file, label)
    _check_kinds(config, label)
    return config


def _check_kinds(config: Mapping[str, Any], label: str) -> None:
    try:
        Words.model_validate(dict(config))
    except ValidationError as error:
        raise CheckpointError(f'"{label}": {CONFIG_FILE} is damaged: {wrong_values(error)}') from error


def check_expressions(config: Mapping[str, Any], modules: Iterable[str], label: str, seconds: float = PATIENCE) -> None:
    """CheckpointError where PEFT would look for ever for the modules that a configuration means."""
    whole = [config[key] for key in ("target_modules", "exclude_modules") if isinstance(config.get(key), str)]
    ends = [*(config.get("rank_pattern") or ()), *(config.get("alpha_pattern") or ())]
    try:
        layers = [f"{_layer(str(own))}.*" for own in _several(config.get("layers_pattern"))]
        expressions = [*map(check_pattern, whole), *map(_end, ends), *layers]
        if expressions:
            check_time(expressions, modules, seconds)
    except (PatternError, TypeError) as error:
        raise CheckpointError(f'"{label}": {CONFIG_FILE}: {error}') from error


def is_lora(config: Mapping[str, Any]) -> bool:
    """Whether an adapter is read here; False where only PEFT itself can read its method."""
    return _kind(config) in ("", "LORA") and not any(_is_on(config.get(option)) for option in OF_PEFT)


def _kind(config: Mapping[str, Any]) -> str:
    return str(config.get("peft_type") or "").upper().removeprefix("PEFTTYPE.")


def _refuse_variants(config: Mapping[str, Any], label: str) -> None:
    kind = _kind(config)
    if not is_lora(config) or not kind:
        raise CheckpointError(
            f'"{label}": {kind or "not a known kind of"} adapter where LoRA or DoRA is needed; merge it with PEFT '
            "(merge_and_unload) and give the full checkpoint"
        )
    used = [f"{name} ({REFUSED[name]})" for name in sorted(REFUSED) if _is_on(config.get(name))]
    if used:
        raise CheckpointError(
            f'"{label}": uses {", ".join(used)}, so that s B A is not the change of a weight; '
            "merge it with PEFT (merge_and_unload) where PEFT can, and give the full checkpoint"
        )
    known = HARMLESS | HANDLED | FOREIGN | {*REFUSED, *OF_PEFT}
    unknown = [name for name in config if name not in known and _is_on(config[name])]
    if unknown:
        raise CheckpointError(
            f'"{label}": {CONFIG_FILE} sets {len(unknown)} options that are not known here (first: {unknown[0]}); they '
            f"may change what the factors mean. If they concern training only, remove them from {CONFIG_FILE}"
        )
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(BASE_CHANGING_INITS):
        raise CheckpointError(
            f'"{label}": initialised with {init}, which also changed the base; save it converted '
            "(save_pretrained(..., path_initial_model_for_weight_conversion=...)) and try again"
        )


def _is_on(value: object) -> bool:
    """PEFT turns an empty object into a default configuration, which is on; an empty list or set is off."""
    return value is not None and value is not False and value not in ([], set())


def _whole(value: Any) -> int:
    if isinstance(value, bool) or int(value) != value:
        raise ValueError(f"{value!r} is not a whole number")
    return int(value)


def _finite(value: Any) -> float:
    if isinstance(value, (bool, str)) or not math.isfinite(value):
        raise ValueError(f"{value!r} is not a finite number")
    return float(value)


def _end(pattern: str) -> str:
    """PEFT's expression for a name that ends with the pattern, at a dot. Raises PatternError."""
    return check_pattern(rf"(.*\.)?({check_pattern(pattern)})$")


def _layer(pattern: str) -> str:
    """PEFT's expression for the number of a layer, behind what its ``layers_pattern`` says. Raises PatternError."""
    return check_pattern(rf"(?:^|.*?\.){check_pattern(pattern)}\.(\d+)\.")


def _several(value: Any) -> tuple[Any, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, (str, int)) else tuple(value)


def _numbers(value: Any) -> tuple[int, ...]:
    return tuple(map(_whole, _several(value)))


def _tokens(value: Any) -> Mapping[str, tuple[int, ...]] | tuple[int, ...]:
    return {str(k): _numbers(v) for k, v in value.items()} if isinstance(value, Mapping) else _numbers(value)


def _modules(value: list[str] | str | None) -> tuple[str, ...] | str | None:
    if isinstance(value, str):
        return value if value == "all-linear" else check_pattern(value)
    return None if value is None else tuple(value)
