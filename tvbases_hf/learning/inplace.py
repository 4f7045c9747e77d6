"""A model with changed weights for a while: nothing but the weights is touched, and afterwards they are as before."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..algebra.delta import Delta, dense
from ..errors import MismatchError

Change = Callable[[str], Delta | Tensor]


class InPlace:
    """Evaluates base + alpha * change in the memory of one model plus a copy of the weights that change.

    The copy is put back, nothing is subtracted: floating-point sums cannot be undone, and the weights have to be
    bit-identical afterwards.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        """``names`` are the weights that will change, as the model's state dict calls them.

        Raises MismatchError for names that it does not have.
        """
        self.model = model
        self.weights = weights_of(model, names)
        self._originals = {name: weight.detach().clone() for name, weight in self.weights.items()}

    @contextlib.contextmanager
    def changed(self, change: Change, alpha: float = 1.0) -> Iterator[nn.Module]:
        """The model at theta_0 + alpha * change(name), each sum in float64 and rounded once.

        On the way out every weight is bit-identical to what it was, after an exception or Ctrl-C too.
        """
        try:
            with torch.no_grad():
                for name, weight in self.weights.items():
                    weight.copy_(self.merged(name, change, alpha))
            yield self.model
        finally:
            # Ctrl-C may come while _uninterrupted is being entered: then begin again, and let it through afterwards.
            waiting, done = None, False
            while not done:
                try:
                    with _uninterrupted(), torch.no_grad():
                        for name, weight in self.weights.items():
                            weight.copy_(self._originals[name])
                        done = True
                except KeyboardInterrupt as interrupt:
                    waiting = interrupt
            if waiting is not None:
                raise waiting

    def merged(self, name: str, change: Change, alpha: float) -> Tensor:
        original, added = self._originals[name], change(name)
        added = added if isinstance(added, Tensor) else dense(added)
        added = added.to(original.device, torch.float64).reshape(original.shape)
        return (original.to(torch.float64) + alpha * added).to(original.dtype)


class Reparametrised:
    """A model asked with other weights, differentiable in them; everything else is the model's own."""

    def __init__(self, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        self.reparametrised, self._weights = model, dict(weights)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return functional_call(self.reparametrised, self._weights, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.reparametrised, name)


def weights_of(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """The model's own tensors by name, to be written to. Raises MismatchError for names that it does not have."""
    wanted = list(names)
    found = model.state_dict(keep_vars=True)
    missing = [name for name in wanted if name not in found]
    if missing:
        raise MismatchError(
            f"{len(missing)} of {len(wanted)} weights that change are not in the model (first: {missing[0]}; the model "
            f"has {next(iter(found), 'none')}); load the class of model that the base was saved from"
        )
    absent = [name for name in wanted if found[name].device.type == "meta"]
    if absent:
        raise MismatchError(
            f"{len(absent)} of {len(wanted)} weights that change are offloaded (first: {absent[0]}), where they cannot "
            "be changed; load the model whole, or write the changed model and evaluate that"
        )
    return {name: found[name] for name in wanted}


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C waits until the end of the block. Only the main thread gets signals, so only there is anything to do."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting: list[tuple[Any, Any]] = []
    previous = signal.signal(signal.SIGINT, lambda number, frame: waiting.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        if waiting and callable(previous):
            previous(*waiting[0])
