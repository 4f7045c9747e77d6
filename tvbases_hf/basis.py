"""The basis artefact: M vectors and a decoder that stand for T task vectors; built lazily, saved, loaded, pushed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelHubMixin
from torch import Tensor

from .bases import BasisWeights, ae_bases, pca_bases, rand_select
from .checkpoint import Checkpoint, TensorInfo, locate
from .delta import BLOCK_NUMBERS, blocks
from .errors import CheckpointError, MismatchError, ParameterError
from .gram import Gram, gram_matrix
from .info import ATOMS_STEM, CONFIG_FILE, BasisInfo, describe, is_basis_directory, model_card
from .linalg import solve_psd
from .model import write_model
from .output import TensorFiles, transaction, write_json
from .progress import track
from .taskvector import TaskVectors

METHODS: dict[str, Callable[..., BasisWeights]] = {"ae": ae_bases, "pca": pca_bases, "rand_select": rand_select}


class Basis(ModelHubMixin, library_name="tvbases-hf", tags=["task-arithmetic", "model-merging"]):
    """M bases of T task vectors.

    ``info`` holds encoder, decoder, errors and where the basis comes from; ``atoms(name)`` the bases' part of one
    tensor. A built basis computes its atoms from the checkpoints when asked; a loaded one maps them from its files.
    """

    def __init__(self, info: BasisInfo, tensors: Mapping[str, TensorInfo], atoms: Callable[[str], Tensor]) -> None:
        """Use ``build`` or ``from_pretrained``. ``tensors`` are the stored ones, [rows, *shape]."""
        self.info = info
        self.tensors = dict(tensors)
        self._atoms = atoms
        self._vectors: TaskVectors | None = None
        self._hub_mixin_config = None  # everything is in basis_config.json; the mixin's own config.json would repeat it

    @classmethod
    def build(
        cls,
        vectors: TaskVectors,
        num_bases: float,
        *,
        method: str = "ae",
        dtype: torch.dtype | None = None,
        gram: Gram | None = None,
        quiet: bool = True,
        **options: Any,
    ) -> Basis:
        """Choose M bases of the task vectors: one pass over the checkpoints for the Gram matrix, then T x T work.

        Args:
            vectors: the task vectors; they must stay readable as long as the basis is.
            num_bases: M, or a fraction of T when below 1.
            method: ``ae``, ``pca`` or ``rand_select``.
            dtype: what the atoms are stored in; None for each base tensor's own.
            gram: from ``gram_matrix(vectors)``, if it has been computed already.
            options: of the method, for example ``balance=False``; see ``ae_bases``.
        """
        if method not in METHODS:
            raise ParameterError(f"unknown method {method!r}; choose one of {', '.join(METHODS)}")
        gram = gram or gram_matrix(vectors, quiet=quiet)
        weights = METHODS[method](gram.matrix, num_bases, **options)
        encoder = stored_encoder(weights)
        info = describe(vectors, gram, weights, options)
        rows = encoder.shape[1]
        tensors = {}
        for name in vectors.names:
            base = vectors.base.tensors[name]
            tensors[name] = TensorInfo((rows, *base.shape), dtype or base.dtype)

        def atoms(name: str) -> Tensor:
            pieces = [encoder.T @ part for part in blocks(vectors.deltas(name))]
            return torch.cat(pieces, dim=1).to(tensors[name].dtype).reshape(tensors[name].shape)

        basis = cls(info, tensors, atoms)
        basis._vectors = vectors
        return basis

    @property
    def tasks(self) -> tuple[str, ...]:
        return self.info.tasks

    @property
    def encoder(self) -> Tensor:
        """[T, M] float64; columns are the tasks' shares in each basis."""
        return torch.tensor(self.info.encoder, dtype=torch.float64)

    @property
    def decoder(self) -> Tensor:
        """[rows, T] float64: tau_hat = atoms^T @ decoder. rows is M, or M + 1 when a mean vector is stored last."""
        return torch.tensor(self.info.decoder, dtype=torch.float64)

    def atoms(self, name: str) -> Tensor:
        """[rows, *shape] the stored vectors' part of tensor ``name``, in their storage dtype."""
        return self._atoms(name)

    def reconstruct(self, task: str) -> Mapping[str, Tensor]:
        """The task vector tau_hat of one task, a lazy mapping from tensor name to float32 tensor."""
        return _Reconstruction(self, self.decoder[:, self.info.index(task)])

    def restore(self, task: str, base: str | Path, out: str | Path, *, alpha: float = 1.0, quiet: bool = True) -> Path:
        """Write the checkpoint theta_0 + alpha * tau_hat of one task; a negative alpha forgets the task.

        Raises:
            MismatchError: ``base`` is not the model this basis was built on.
            OutputError: ``out`` exists and is not ours, or the disk is full.
        """
        column = alpha * self.decoder[:, self.info.index(task)]
        model = Checkpoint.open(base)
        self._check_base(model)

        def change(name: str, start: int, stop: int) -> Tensor | None:
            if name not in self.tensors:
                return None
            return column @ self.atoms(name).reshape(len(column), -1)[:, start:stop].to(torch.float64)

        note = f"{task} restored from a basis of {len(self.tasks)} tasks, alpha {alpha:g}"
        return write_model(model, Path(out), change, note, quiet=quiet)

    def save_pretrained(self, save_directory: str | Path, *, quiet: bool = True, **kwargs: Any) -> str | None:  # type: ignore[override]
        """Write the basis directory as a transaction; ``push_to_hub`` and the rest as in ModelHubMixin."""
        needed = sum(info.nbytes for info in self.tensors.values())
        push, repo_id = kwargs.pop("push_to_hub", False), kwargs.pop("repo_id", None)
        with transaction(save_directory, is_basis_directory, needed) as work:
            self._quiet = quiet
            super().save_pretrained(work)
        if push:
            return self.push_to_hub(repo_id=repo_id or Path(save_directory).name, **kwargs)
        return None

    def _save_pretrained(self, save_directory: Path) -> None:
        files = TensorFiles(save_directory, ATOMS_STEM, self.tensors)
        info = self.info if self._vectors is None else self._write_built(files, self._vectors)
        if self._vectors is None:
            for name in track(list(self.tensors), "Writing", self._quiet, lambda n: self.tensors[n].nbytes):
                files.write(name, self.atoms(name))
        write_json(save_directory / CONFIG_FILE, info.to_json())
        (save_directory / "README.md").write_text(model_card(info), encoding="utf-8")

    _quiet = True

    def _write_built(self, files: TensorFiles, vectors: TaskVectors) -> BasisInfo:
        """Stream the atoms from the checkpoints; return the info with the decoder refitted to what was stored."""
        encoder = stored_encoder(self.info.weights())
        rows, count = encoder.shape[1], len(vectors)
        inner = torch.zeros(rows, rows, dtype=torch.float64)
        cross = torch.zeros(rows, count, dtype=torch.float64)
        cost = lambda name: vectors.base.tensors[name].nbytes * (count + 1)  # noqa: E731
        for name in track(vectors.names, "Writing bases", self._quiet, cost):
            numel, dtype = vectors.base.tensors[name].numel, self.tensors[name].dtype
            start = 0
            for part in blocks(vectors.deltas(name)):
                stored = (encoder.T @ part).to(dtype)
                for row in range(rows):
                    files.write(name, stored[row], row * numel + start)
                rounded = stored.to(torch.float64)
                if not torch.isfinite(rounded).all():
                    raise ParameterError(f"tensor {name}: a basis overflows {dtype}; store it in bfloat16 or float32")
                inner += rounded @ rounded.T
                cross += rounded @ part.T
                start += part.shape[1]
        return self.info.refitted(*refit(inner, cross, self.info.mean is not None))

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | Path, *, revision: str | None = None, cache_dir: str | None = None
    ) -> Basis:
        """Load a basis directory, local or from the Hub; tensors are mapped when they are asked for.

        Raises CheckpointError when there is none, or when it is damaged.
        """
        model_id = str(pretrained_model_name_or_path)
        path = locate(model_id, revision, cache_dir)
        if not (path / CONFIG_FILE).is_file():
            raise CheckpointError(f'"{model_id}": not a basis directory: it has no {CONFIG_FILE}')
        info = BasisInfo.read(path / CONFIG_FILE, model_id)
        stored = Checkpoint.open(path)
        rows = len(info.decoder)
        wrong = [name for name, tensor in stored.tensors.items() if not tensor.shape or tensor.shape[0] != rows]
        if wrong:
            raise CheckpointError(
                f'"{model_id}": {len(wrong)} tensors do not hold the {rows} vectors that {CONFIG_FILE} names '
                f"(first: {wrong[0]})"
            )
        return cls(info, stored.tensors, stored.read)

    def _check_base(self, model: Checkpoint) -> None:
        if model.fingerprint() != self.info.base_fingerprint:
            raise MismatchError(
                f'"{model.label}" is not the model this basis was built on ({self.info.base_id}): '
                "its fingerprint differs; give the same base, in the same dtype"
            )


class _Reconstruction(Mapping[str, Tensor]):
    def __init__(self, basis: Basis, column: Tensor) -> None:
        self._basis, self._column = basis, column

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._basis.tensors:
            raise KeyError(name)
        atoms = self._basis.atoms(name)
        flat = atoms.reshape(len(self._column), -1)
        step = max(1, BLOCK_NUMBERS // len(self._column))
        parts = [
            (self._column @ flat[:, s : s + step].to(torch.float64)).float() for s in range(0, flat.shape[1], step)
        ]
        return torch.cat(parts).reshape(atoms.shape[1:]) if parts else flat.new_zeros(atoms.shape[1:])

    def __iter__(self) -> Iterator[str]:
        return iter(self._basis.tensors)

    def __len__(self) -> int:
        return len(self._basis.tensors)


def stored_encoder(weights: BasisWeights) -> Tensor:
    """[T, rows] how the stored vectors are made of the task vectors: the bases, then the mean if there is one."""
    return weights.encoder if weights.mean is None else torch.cat([weights.encoder, weights.mean[:, None]], dim=1)


def refit(inner: Tensor, cross: Tensor, has_mean: bool) -> tuple[Tensor, Tensor]:
    """Decoder [rows, T] of least error for the stored (rounded) vectors, and the squared error it saves per task [T].

    ``inner`` [rows, rows] and ``cross`` [rows, T] are the stored vectors' products with themselves and with the task
    vectors. A mean (last row) is added to every reconstruction as it is; the other rows are fitted to what remains.
    """
    if not has_mean:
        decoder = solve_psd(inner, cross)
    else:
        bases = solve_psd(inner[:-1, :-1], cross[:-1] - inner[:-1, -1:])
        decoder = torch.cat([bases, torch.ones(1, cross.shape[1], dtype=torch.float64)])
    saved = 2 * (decoder * cross).sum(dim=0) - (decoder * (inner @ decoder)).sum(dim=0)
    return decoder, saved
