"""The basis artefact: vectors and a decoder that stand for T task vectors; built lazily, saved, loaded, pushed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from huggingface_hub import ModelHubMixin
from torch import Tensor, nn

from .. import defaults
from ..algebra.blocks import pieces
from ..algebra.delta import Delta, dense
from ..algebra.rank import RankRule
from ..algebra.sums import total
from ..errors import CheckpointError, MismatchError, ParameterError
from ..merging.changes import Edit
from ..merging.write import write
from ..models.gram import Gram
from ..models.vectors import Vectors, basis_labels, check_over
from ..storage.cards import write_card
from ..storage.checkpoint import Checkpoint, TensorInfo
from ..storage.files import locate
from ..storage.output import transaction, write_json
from ..storage.run import once
from .build import build
from .info import CONFIG_FILE, BasisInfo, is_basis_directory, model_card
from .masks import METHOD as MASKS
from .masks import StoredMasks
from .reconstruction import Reconstruction
from .request import Request
from .router import Router
from .sources import StoredVectors, VectorSource

if TYPE_CHECKING:
    from typing_extensions import Self


class Basis(ModelHubMixin, library_name="tvbases-hf", tags=["task-arithmetic", "model-merging"]):
    """M bases of T task vectors, or the T task vectors truncated (method ``tsv``).

    ``info`` holds encoder, decoder, errors and where the basis comes from; ``deltas(name)`` the stored vectors' part of
    one weight. A built basis computes them from the checkpoints when asked; a loaded one maps them from its files.
    """

    def __init__(self, info: BasisInfo, source: VectorSource) -> None:
        """Use ``build`` or ``from_pretrained``."""
        self.info = info
        self._source = source
        self._hub_mixin_config = None  # everything is in basis_config.json; the mixin's own config.json would repeat it

    @classmethod
    def build(
        cls,
        vectors: Vectors,
        num_bases: float | None = None,
        *,
        method: str | None = None,
        budget: float | None = None,
        rank: str | float | RankRule | None = None,
        alpha: float = 1.0,
        dtype: torch.dtype | None = None,
        gram: Gram | None = None,
        equal_rank: bool = False,
        host: defaults.Host | None = None,
        **options: Any,
    ) -> Self:
        """M bases of the task vectors, or the task vectors truncated; of adapters a LoraBasis.

        One pass over the models for the Gram matrix, then T x T work; ``tsv`` and adapters take their singular values.

        Args:
            vectors: the task vectors; they must stay readable as long as the basis is.
            num_bases: M, or a fraction of T when below 1; None for half of them (``cluster`` chooses).
            method: ``ae``, ``pca``, ``cluster``, ``nmf``, ``rand_select`` and others (see CONSTRUCTIONS), ``tsv``
                (every task truncated) or ``masks`` (one bit an entry for each task over one vector);
                of adapters also ``joint`` (shared factors), but not ``pca``. None: see Request.
            budget, rank, alpha: see Request; neither budget nor rank of ``tsv`` is 1/T of min(n, m), which stores T
                tasks in about one's bytes.
            dtype: what the vectors are stored in; None for each base tensor's own (adapters: theirs).
            gram: from ``gram_matrix(vectors)``, if it has been computed already.
            equal_rank, host: of adapters, see Request.
            options: of the method, for example ``balance=False``; see ``ae_bases``. Adapters have ``normalize``, true
                by default. ``inner`` of ``cluster`` may also be a merging method, followed by its options.

        Raises ParameterError for an unknown method or option, a bad value, and what does not go together.
        """
        request = Request(method, num_bases, budget, rank, alpha, options, equal_rank, host)
        return cls._of(*build(vectors, request, dtype=dtype, gram=gram))

    @property
    def tasks(self) -> tuple[str, ...]:
        return self.info.tasks

    @property
    def encoder(self) -> Tensor:
        """[T, M] float64; columns are the tasks' shares in each basis."""
        return _matrix(self.info, self.info.encoder)

    @property
    def decoder(self) -> Tensor:
        """[rows, T] float64: tau_hat = vectors @ decoder. rows is M, or M + 1 when a mean vector is stored last."""
        return _matrix(self.info, self.info.decoder)

    @property
    def names(self) -> tuple[str, ...]:
        """The weights that the basis covers."""
        return self._source.names

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """What is stored, by stored name."""
        return self._source.tensors

    def deltas(self, name: str) -> list[Delta]:
        """One delta per stored vector: its part of the weight ``name``, in the storage dtype."""
        return self._source.deltas(name)

    def reconstruct(self, task: str, *, base: str | Path | None = None) -> Mapping[str, Tensor]:
        """The task vector tau_hat of one task, a lazy mapping from tensor name to float32 tensor; base: for DoRA."""
        self.info.index(task)
        model = self._base(base)

        def read(name: str) -> Tensor:
            terms = self.terms(task, name, model) or [(0.0, self.deltas(name)[0])]
            return sum((share * dense(part) for share, part in terms[1:]), terms[0][0] * dense(terms[0][1])).float()

        return Reconstruction(self.names, read)

    def vectors(self, base: str | Path | Checkpoint, over: str = "bases") -> Vectors:
        """The vectors that are stored, or the reconstructions from them, for any merging method.

        Raises MismatchError if ``base`` is not the model that the basis was built on.
        """
        check_over(over)
        model = self.fitting(base if isinstance(base, Checkpoint) else Checkpoint.open(base))
        num_tasks, num_bases = self.encoder.shape
        covered = set(self.names)
        names = tuple(name for name in model.tensors if name in covered)
        if over == "bases":
            read = lambda name: self.deltas(name)[:num_bases]  # noqa: E731
            return Vectors(model, self.tasks, basis_labels(num_bases), names, self.encoder, read)
        identity = torch.eye(num_tasks, dtype=torch.float64)
        return Vectors(model, self.tasks, self.tasks, names, identity, lambda n: self.reconstructions(n, model))

    def router(
        self, model: nn.Module, *, rank: str | float | RankRule = defaults.RANK, base: str | Path | None = None
    ) -> Router:
        """What finds the task of each row of a batch that does not say it; see Router. ``base``: for DoRA.

        Args:
            model: the base in memory, as it is before ``attach``; the router goes on working after that.
            rank: how many input directions of a weight are compared: what this rule keeps of the task that needs least.

        Raises ParameterError for a model that has adapters already, or has no layer that all tasks change.
        """
        found = self._base(base)
        return Router.of(model, self.tasks, self.names, lambda name: self.reconstructions(name, found), rank)

    def terms(self, task: str, name: str, base: Checkpoint | None = None) -> list[tuple[float, Delta]]:
        """tau_hat's part of one weight as a sum of multiples of deltas; ``base`` as in VectorSource.own."""
        return self._terms(self.info.index(task), name, self.deltas(name), base)

    def weighted(
        self, tasks: str | Mapping[str, float], name: str, base: Checkpoint | None = None
    ) -> list[tuple[float, Delta]]:
        """The same of one task, or of the sum of several times their weights."""
        weights = {tasks: 1.0} if isinstance(tasks, str) else tasks
        return [(w * share, part) for task, w in weights.items() for share, part in self.terms(task, name, base) if w]

    def reconstructions(self, name: str, base: Checkpoint | None = None) -> list[Delta]:
        """[T] tau_hat's part of one weight for every task, in factors where the vectors are; ``base`` as above."""
        parts = self.deltas(name)
        every = [self._terms(index, name, parts, base) or [(0.0, parts[0])] for index in range(len(self.tasks))]
        return [total([delta for _, delta in terms], [share for share, _ in terms]) for terms in every]

    def _terms(
        self, index: int, name: str, parts: Sequence[Delta], base: Checkpoint | None
    ) -> list[tuple[float, Delta]]:
        shares = self.decoder[:, index].tolist()
        shared = [(share, part) for share, part in zip(shares, parts, strict=bool(parts)) if share]
        return shared + [(1.0, part) for part in self._source.own(name, index, base)]

    def restore(
        self, task: str | Mapping[str, float], base: str | Path, out: str | Path, *, alpha: float = 1.0
    ) -> Path:
        """Write the checkpoint theta_0 + alpha * tau_hat of one task; a negative alpha forgets the task.

        ``task`` may also be weights by task: theta_0 + alpha * sum_t w_t tau_hat_t.

        Raises:
            MismatchError: ``base`` is not the model this basis was built on.
            OutputError: ``out`` exists and is not ours, or the disk is full.
        """
        label = self.info.called(task)
        model = self._base(base)
        assert model is not None

        def terms(name: str) -> list[tuple[float, Delta]]:
            return self.weighted(task, name, model) or [(0.0, self.deltas(name)[0])]

        def read(name: str) -> Delta:
            return total([delta for _, delta in terms(name)], [share for share, _ in terms(name)])

        def stream(name: str) -> Iterator[Tensor]:
            parts = (pieces(delta, alpha * share) for share, delta in terms(name))
            return (torch.stack(found).sum(dim=0) for found in zip(*parts, strict=True))

        note = f"{label} restored from a basis of {len(self.tasks)} tasks, alpha {alpha:g}"
        write(Edit(model, self.names, read, note, alpha, stream=stream), out)
        return Path(out)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> str | None:  # type: ignore[override]
        """Write the basis directory as a transaction; ``push_to_hub`` and the rest as in ModelHubMixin."""
        needed = sum(info.nbytes for info in self.tensors.values())
        push, repo_id = kwargs.pop("push_to_hub", False), kwargs.pop("repo_id", None)
        stored = {name: [str(info.dtype), *info.shape] for name, info in self.tensors.items()}
        job = {"info": self.info.to_json(), "tensors": stored}  # the Gram matrix in it tells the models apart
        with transaction(save_directory, is_basis_directory, needed, job) as work:
            super().save_pretrained(work)
        if push:
            return self.push_to_hub(repo_id=repo_id or Path(save_directory).name, **kwargs)
        return None

    def _save_pretrained(self, save_directory: Path) -> None:
        info = self._source.write(save_directory, self.info)

        def describe() -> None:
            write_json(save_directory / CONFIG_FILE, info.to_json())
            write_card(save_directory, self._card(info))

        once(describe)

    def _card(self, info: BasisInfo) -> str:
        return model_card(info)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | Path, *, revision: str | None = None, cache_dir: str | None = None
    ) -> Self:
        """Load a basis directory, local or from the Hub; tensors are mapped when they are asked for.

        Raises CheckpointError when there is none, or when it is damaged.
        """
        model_id = str(pretrained_model_name_or_path)
        path = locate(model_id, revision, cache_dir)
        if not (path / CONFIG_FILE).is_file():
            raise CheckpointError(f'"{model_id}": not a basis directory: it has no {CONFIG_FILE}')
        info = BasisInfo.read(path / CONFIG_FILE, model_id)
        return cls._of(info, cls._kind_of(info, model_id)._opened(path, info, model_id))

    @classmethod
    def _opened(cls, path: Path, info: BasisInfo, label: str) -> VectorSource:
        if info.method == MASKS:
            return StoredMasks.open(path, info, label)
        source = StoredVectors(Checkpoint.open(path), info.ranks, len(info.decoder))
        source.check(label)
        return source

    @classmethod
    def _of(cls, info: BasisInfo, source: VectorSource) -> Self:
        return cast("Self", cls._kind_of(info, "these models")(info, source))

    @classmethod
    def _kind_of(cls, info: BasisInfo, label: str) -> type[Basis]:
        """LoraBasis (which ``tvbases_hf.basis`` imports) for adapters; ParameterError where that was not asked for."""
        kind = next((kind for kind in Basis.__subclasses__() if kind.holds(info)), Basis)
        if not issubclass(kind, cls):
            raise ParameterError(f'"{label}": a basis of full checkpoints, not of adapters; use Basis')
        return kind

    @classmethod
    def holds(cls, info: BasisInfo) -> bool:
        """Whether a basis with this ``info`` is of this class."""
        return info.adapters is None

    def _base(self, base: str | Path | None) -> Checkpoint | None:
        return None if base is None else self.fitting(Checkpoint.open(base))

    def fitting(self, model: Checkpoint) -> Checkpoint:
        """The base, once it is known to be the one; MismatchError for another, or for vectors of other shapes."""
        self.check_base(model)
        model = self._with_outputs(model)
        for name in self.names:
            shape, own = self._source.shape(name), model.tensors.get(name)
            if own is None or (own.shape[:1], own.numel) != (shape[:1], math.prod(shape)):
                held = f"is {list(own.shape)}" if own else "does not exist"
                raise MismatchError(
                    f'"{model.label}": {name} {held} there, but the basis holds changes of shape {list(shape)}; the '
                    "files of the basis do not belong together: copy or download it again"
                )
        return model

    def _with_outputs(self, model: Checkpoint) -> Checkpoint:
        """The base with the output matrix that a task has of its own, where in the base it is the embedding."""
        absent = [name for name in self.names if name not in model.tensors]
        return model.with_outputs({name: TensorInfo(self._source.shape(name), torch.float32) for name in absent})

    def check_base(self, model: Checkpoint) -> None:
        """MismatchError unless ``model`` is the one that this basis was built on."""
        if model.fingerprint() != self.info.base_fingerprint:
            raise MismatchError(
                f'"{model.label}" is not the model this basis was built on ({self.info.base_id}): '
                "its fingerprint differs; give the same base, in the same dtype"
            )


def _matrix(info: BasisInfo, rows: list[list[float]]) -> Tensor:
    """A stored matrix, float64; a library leaves out those that say that every vector is a task."""
    one = torch.eye(len(info.tasks), dtype=torch.float64)
    return one if info.library else torch.tensor(rows, dtype=torch.float64)
