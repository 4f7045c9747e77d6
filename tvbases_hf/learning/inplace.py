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
from ..models.translation import Translation

Change = Callable[[str], Delta | Tensor]


class InPlace:
    """Evaluates base + alpha * change in the memory of one model plus a copy of the weights that change.

    The copy is put back, nothing is subtracted: floating-point sums cannot be undone, and the weights have to be
    bit-identical afterwards.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        """``names`` are the weights that will change, as the base's files call them or the model's state dict does.

        Raises MismatchError for names that the model does not have; see Translation.
        """
        self.model = model
        self._translation = Translation(model, names)
        self.weights = {name: self._translation.read(name) for name in self._translation.stored}
        self._originals = {name: weight.detach().clone() for name, weight in self.weights.items()}

    @contextlib.contextmanager
    def changed(self, change: Change, alpha: float = 1.0) -> Iterator[nn.Module]:
        """The model at theta_0 + alpha * change(name), each sum in float64 and rounded once.

        Raises MismatchError for a change of another shape than the model's weight, as of a vocabulary of other rows.
        On the way out every weight is bit-identical to what it was, after an exception or Ctrl-C too.
        """
        try:
            with torch.no_grad():
                for name in self.weights:
                    self._translation.write(name, self.merged(name, change, alpha))
            yield self.model
        finally:
            # Ctrl-C may come while _uninterrupted is being entered: then begin again, and let it through afterwards.
            waiting, done = None, False
            while not done:
                try:
                    with _uninterrupted(), torch.no_grad():
                        for name in self.weights:
                            self._translation.write(name, self._originals[name])
                        done = True
                except KeyboardInterrupt as interrupt:
                    waiting = interrupt
            if waiting is not None:
                raise waiting

    def merged(self, name: str, change: Change, alpha: float) -> Tensor:
        original, added = self._originals[name], change(name)
        added = added if isinstance(added, Tensor) else dense(added)
        if added.numel() != original.numel():
            raise MismatchError(
                f"{name} is {list(original.shape)} in the model that is measured and {list(added.shape)} in "
                "what changes it: their vocabularies differ; resize the base to these rows first "
                "(model.resize_token_embeddings), or write the merge and measure that (tvbases evaluate)"
            )
        added = added.to(original.device, torch.float64).reshape(original.shape)
        return (original.to(torch.float64) + alpha * added).to(original.dtype)


class Reparametrised:
    """A model asked with other weights, differentiable in them; everything else is the model's own.

    ``weights`` have the names and shapes that the base's files have, or those of the model.
    """

    def __init__(self, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        self.reparametrised, self.names = model, tuple(weights)
        self._weights = Translation(model, weights).assembled(weights)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return functional_call(self.reparametrised, self._weights, args, kwargs)

    def ask(self, method: str, **inputs: Any) -> Any:
        """What another method of the model than ``forward`` answers with these weights."""
        weights = {f"model.{name}": weight for name, weight in self._weights.items()}
        return functional_call(_Method(self.reparametrised, method), weights, kwargs=inputs)

    @property
    def weights(self) -> dict[str, Tensor]:
        """The parameters that it is asked with, by the model's own names."""
        return dict(self._weights)

    def weight(self, name: str) -> Tensor | None:
        """A parameter that it is asked with, by the model's own name; None where there is none."""
        return self._weights.get(name, getattr(self.reparametrised, name, None))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.reparametrised, name)


class _Method(nn.Module):
    """``functional_call`` calls a module; here it calls any method of one."""

    def __init__(self, model: nn.Module, method: str) -> None:
        super().__init__()
        self.model, self.method = model, method

    def forward(self, **inputs: Any) -> Any:
        return getattr(self.model, self.method)(**inputs)


def ask(model: Any, method: str, **inputs: Any) -> Any:
    """A method of a model, or of one with other weights."""
    return model.ask(method, **inputs) if isinstance(model, Reparametrised) else getattr(model, method)(**inputs)


def weight_of(model: Any, name: str) -> Tensor | None:
    """A parameter at a model's top, or what it is asked with instead."""
    return model.weight(name) if isinstance(model, Reparametrised) else getattr(model, name, None)


def weights_of(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """The model's own numbers by stored name, not to be written to. Raises MismatchError; see Translation."""
    found = Translation(model, names)
    return {name: found.read(name) for name in found.stored}


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
