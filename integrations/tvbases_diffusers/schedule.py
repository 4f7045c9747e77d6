"""Style scales as functions of the denoising step, through a hook on the model that denoises."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tvbases_hf.errors import ParameterError, did_you_mean
from tvbases_hf.styles.scales import by_style, is_number

Curve = float | Sequence[float] | Callable[[int, int], float]
DENOISERS = ("transformer", "transformer_2", "unet", "prior")


@dataclass(frozen=True)
class Schedule:
    """A curve for each style that has one."""

    curves: Mapping[str, Curve]

    @classmethod
    def parse(cls, names: Sequence[str], curves: Mapping[str, Any]) -> Schedule:
        """Raises ParameterError for unknown styles and for what is no curve."""
        for name, curve in by_style("schedules", curves).items():
            if name not in names:
                near = did_you_mean(name, names)
                raise ParameterError(f'a schedule for "{name}", which is no style{near}; there are {", ".join(names)}')
            if isinstance(curve, (str, bytes)) or not (callable(curve) or _numbers(curve)):
                raise ParameterError(
                    f'the schedule of "{name}" is {curve!r}; give a number, a list of numbers, or a callable of the '
                    "step and the number of steps"
                )
        return cls(dict(curves))

    def at(self, step: int, steps: int) -> dict[str, float]:
        """The scales of one step, 0 to steps - 1; a list is spread evenly over the steps."""
        found = {}
        for name, curve in self.curves.items():
            if callable(curve):
                value = curve(step, steps)
            elif isinstance(curve, Sequence):
                value = curve[min(len(curve) - 1, step * len(curve) // max(1, steps))]
            else:
                value = curve
            if not is_number(value):
                raise ParameterError(f'the schedule of "{name}" gives {value!r} at step {step}; it must be a number')
            found[name] = float(value)
        return found


def attach(pipe: Any, name: str, follow: Callable[[int, int], None]) -> None:
    """Call ``follow`` with the step and the number of steps before each step of the pipeline's denoiser."""
    from diffusers.hooks import HookRegistry, ModelHook

    if not hasattr(pipe, "scheduler"):
        raise ParameterError(f"a schedule follows a pipeline's scheduler, and {type(pipe).__name__} has none")

    class StyleScheduleHook(ModelHook):
        """Runs before every pass; passes of one step, as of guidance, find the scales in place."""

        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
            follow(*current_step(pipe.scheduler, args, kwargs))
            return args, kwargs

    for model in _denoisers(pipe):
        HookRegistry.check_if_exists_or_initialize(model).register_hook(StyleScheduleHook(), _hook_name(name))


def detach(pipe: Any, name: str) -> None:
    from diffusers.hooks import HookRegistry

    for model in _denoisers(pipe):
        registry = HookRegistry.check_if_exists_or_initialize(model)
        if registry.get_hook(_hook_name(name)) is not None:
            registry.remove_hook(_hook_name(name), recurse=False)


def current_step(scheduler: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int, int]:
    """The number of the step that is being computed, and how many there are.

    Most schedulers count (None before their first step); the others hold the timesteps, the model's second argument.
    """
    timesteps = scheduler.timesteps
    if hasattr(scheduler, "step_index"):
        return int(scheduler.step_index or 0), len(timesteps)
    now = kwargs.get("timestep", args[1] if len(args) > 1 else None)
    if now is None:
        raise ParameterError(f"{type(scheduler).__name__} does not tell its step; use another scheduler")
    now = now.reshape(-1)[0] if hasattr(now, "reshape") else now
    return int((timesteps - now).abs().argmin()), len(timesteps)


def _denoisers(pipe: Any) -> list[Any]:
    return [model for name in DENOISERS if (model := getattr(pipe, name, None)) is not None]


def _hook_name(name: str) -> str:
    return f"tvbases_{name}"


def _numbers(curve: Any) -> bool:
    values = list(curve) if isinstance(curve, Sequence) else [curve]
    return bool(values) and all(map(is_number, values))
