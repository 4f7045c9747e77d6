"""One task vector as a basis gives it back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from torch import Tensor


class Reconstruction(Mapping[str, Tensor]):
    """tau_hat of one task: a lazy mapping from tensor name to float32 tensor."""

    def __init__(self, names: tuple[str, ...], read: Callable[[str], Tensor]) -> None:
        self._names, self._read = names, read

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
