"""One task vector as a basis gives it back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from .delta import dense

if TYPE_CHECKING:
    from .basis import Basis
    from .storage.checkpoint import Checkpoint


class Reconstruction(Mapping[str, Tensor]):
    """tau_hat of one task: a lazy mapping from tensor name to float32 tensor."""

    def __init__(self, basis: Basis, task: str, base: Checkpoint | None) -> None:
        self._basis, self._task, self._base = basis, task, base

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._basis.names:
            raise KeyError(name)
        terms = self._basis.terms(self._task, name, self._base) or [(0.0, self._basis.parts(name)[0])]
        return sum((share * dense(part) for share, part in terms[1:]), terms[0][0] * dense(terms[0][1])).float()

    def __iter__(self) -> Iterator[str]:
        return iter(self._basis.names)

    def __len__(self) -> int:
        return len(self._basis.names)
