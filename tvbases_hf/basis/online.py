"""An online basis: a directory of at most M vectors that one task after another is added to, each only once.

Every addition writes a new basis directory beside the old one and puts it in its place in one step: a process killed
at any time leaves the old or the new one, whole. Vectors take O(M d) on disk and a block of each in memory, however
many tasks have come; what grows with T are O(M) numbers per task in basis_config.json.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..algebra.blocks import blocks
from ..algebra.delta import Delta
from ..algebra.sums import scale
from ..bases import CONSTRUCTIONS
from ..bases.buffer import LINEAR, METHODS, RUNNING, Buffer, Step, check_budget, follow, next_step
from ..errors import CheckpointError, OutputError, ParameterError, did_you_mean
from ..merging.apply import merged
from ..methods.continual import TIES_SCALING, continual_ties, orthogonal_sum, weight_sum
from ..methods.elementwise import magmax
from ..methods.sparse import TIES_DENSITY
from ..methods.threshold import thresholds
from ..models.names import as_stored, matrices_in
from ..models.vectors import Model, Vectors
from ..options import Option, checked, options_of
from ..storage.cards import write_card
from ..storage.checkpoint import Checkpoint, TensorInfo
from ..storage.output import check_output, transaction, write_json
from ..storage.run import current, track
from ..storage.tensor_files import TensorFiles
from ..version import library_version
from .basis import Basis
from .info import CONFIG_FILE, VECTORS_STEM, BasisInfo, is_basis_directory, model_card
from .info import ONLINE as STATE
from .online_inputs import Changes, changes_of

# By method, its options. The seed, and what the past weighs, an online basis sets itself.
_OWN = ("target_weights", "even_errors", "seed")
ONLINE: dict[str, dict[str, Option]] = {
    **{name: {} for name in METHODS},
    "ae": {name: option for name, option in CONSTRUCTIONS["ae"].options.items() if name not in _OWN},
    "ties": options_of(continual_ties),
    "opcm": options_of(orthogonal_sum),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@dataclass(frozen=True)
class Settings:
    """What never changes: the method and its options, M, what vectors are stored in (None: the base's own), a seed."""

    method: str
    num_bases: int
    dtype: str | None = None
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)


class OnlineBasis:
    """M vectors for any number of tasks, in a basis directory that ``Basis.from_pretrained`` reads as well.

    ``add`` acknowledges a task by returning; from then on it is on disk. Between additions nothing is held in memory.
    """

    def __init__(self, directory: Path, base: Checkpoint, settings: Settings, basis: Basis | None) -> None:
        """Use ``create`` or ``open``."""
        self.directory, self.base, self.settings = directory, base, settings
        self._basis = basis

    @classmethod
    def create(
        cls,
        directory: str | Path,
        base: str | Path | Checkpoint,
        num_bases: float | None = None,
        *,
        method: str = "ae",
        dtype: torch.dtype | None = None,
        seed: int = 0,
        **options: Any,
    ) -> OnlineBasis:
        """A new online basis; its directory appears with the first task.

        Args:
            num_bases: M, how many vectors are kept; 1 for the methods that keep the merged vector alone.
            method: ``ae`` (the paper's Algorithm 1), ``rand_select`` (drop one at random), or a running merge:
                ``ta`` (sum), ``magmax``, ``ties``, ``opcm``.
            dtype: what vectors are stored in; None for each base tensor's own. Every addition rounds to it once.
            options: of the method, see ONLINE.

        Raises OutputError if there is something in the directory already, ParameterError for bad options.
        """
        number = 1 if num_bases is None and method in RUNNING else num_bases
        if method not in ONLINE:
            near = did_you_mean(method, ONLINE)
            raise ParameterError(f"unknown online method {method!r}{near}; choose one of {', '.join(ONLINE)}")
        options = checked(f"online {method}", ONLINE[method], options)
        check_budget(method, number)
        check_output(directory, lambda _: False)
        assert number is not None
        settings = Settings(method, int(number), _dtype_name(dtype), seed, options)
        return cls(Path(directory), _open_base(base), settings, None)

    @classmethod
    def open(cls, directory: str | Path, base: str | Path | Checkpoint | None = None) -> OnlineBasis:
        """Go on with one; ``base`` where it is no longer where it was.

        Raises CheckpointError when there is none or it is damaged, MismatchError for another base.
        """
        basis = Basis.from_pretrained(directory)
        if basis.info.online is None:
            raise CheckpointError(
                f'"{directory}": a basis, but not an online one: tasks cannot be added to it; start one of its own'
            )
        model = _open_base(basis.info.base_id if base is None else base)
        basis.fitting(model)
        weights = [name for name, info in model.tensors.items() if info.dtype.is_floating_point]
        if lost := sorted(set(weights) - set(basis.names)):
            raise CheckpointError(
                f'"{directory}": {len(lost)} of {len(weights)} weights of the base have no vectors (first: {lost[0]}); '
                "the files of the basis are damaged: copy the directory again"
            )
        return cls(Path(directory), model, _settings(basis.info, str(directory)), basis)

    @property
    def tasks(self) -> tuple[str, ...]:
        return self._basis.tasks if self._basis else ()

    @property
    def basis(self) -> Basis:
        """The stored vectors, decoder and errors. ParameterError before the first task."""
        if self._basis is None:
            raise ParameterError(f'"{self.directory}" holds no task yet; add one first')
        return self._basis

    @property
    def buffer(self) -> Buffer:
        """The small matrices, see ``bases.online.Buffer``."""
        return _buffer(self._basis.info) if self._basis else Buffer.empty()

    @property
    def weights(self) -> list[float]:
        """[K] what each vector weighs in the merged one; balanced bases then add up to the sum of all tasks."""
        return self.buffer.weights.tolist()

    @property
    def estimated_errors(self) -> list[float]:
        """[T] |tau_hat - tau| / |tau| if what was lost of a task at different steps is orthogonal.

        Near the truth for fine-tunes, whose task vectors are nearly orthogonal; ``basis.info.task_error`` is what it
        can be at most.
        """
        buffer = self.buffer
        return torch.nan_to_num(buffer.estimates / buffer.norms).tolist()

    @property
    def is_linear(self) -> bool:
        """Whether the vectors are the sums of task vectors that the encoder tells."""
        return self.settings.method in LINEAR

    @property
    def vectors(self) -> Vectors:
        """The stored vectors, as merging methods take them."""
        return self.basis.vectors(self.base)

    def merged(self, method: str = "task_arithmetic", *, alpha: float = 1.0, **options: Any) -> Callable[[str], Delta]:
        """The merged change of each weight, by a method of ``merging.METHODS`` over the stored vectors."""
        return merged(self.vectors, method, self.weights, alpha=alpha, **options)

    def add(self, name: str, model: str | Path | Model | Mapping[str, Tensor]) -> BasisInfo:
        """Add one more task; when this returns it is on disk, and before that the old directory is.

        Args:
            name: the task's, not used before.
            model: a fine-tune or adapter (path, Hub id or opened), or the task vector itself by tensor name.

        Raises:
            ParameterError: a name that is taken.
            MismatchError, CheckpointError: a model that does not fit the base, or holds NaN or infinity.
            OutputError: the disk is full, or another process has added a task meanwhile.
        """
        if not name or name in self.tasks:
            raise ParameterError(f'a task named "{name}" is there already; give every task its own name')
        if current().team.size > 1:
            raise ParameterError("tasks are added to an online basis by one process; start it without accelerate")
        read = changes_of(self.base, name, model)
        before = self.buffer
        step = next_step(
            before, self.settings.method, self.settings.num_bases, self.settings.seed, self.settings.options
        )
        tensors = self._tensors(len(step.weights))
        with transaction(self.directory, is_basis_directory, sum(i.nbytes for i in tensors.values())) as work:
            joint = self._write(work, tensors, step, read)
            info = self._describe(follow(before, step, self.settings.method, joint), (*self.tasks, name))
            write_json(work / CONFIG_FILE, info.to_json())
            write_card(work, model_card(info))
            self._check_unchanged()
        self._basis = Basis.from_pretrained(self.directory)
        return self._basis.info

    def stored_bytes(self, num_tasks: int) -> int:
        """What the vectors take on disk once there are this many tasks."""
        rows = min(num_tasks, self.settings.num_bases)
        return sum(info.nbytes for info in self._tensors(rows).values())

    def _tensors(self, rows: int) -> dict[str, TensorInfo]:
        dtype = DTYPES.get(self.settings.dtype or "")
        return {
            name: TensorInfo((rows, *info.shape), dtype or info.dtype)
            for name, info in self.base.tensors.items()
            if info.dtype.is_floating_point
        }

    def _write(self, work: Path, tensors: Mapping[str, TensorInfo], step: Step, read: Changes) -> Tensor:
        """Write the new vectors, one pass; the Gram matrix of the old ones, the new task's, and the new as stored."""
        files = TensorFiles(work, VECTORS_STEM, tensors)
        known = self.buffer.size + 1
        joint = torch.zeros(known + len(step.weights), known + len(step.weights), dtype=torch.float64)
        update = self._update(tensors, step, read)
        for name in track(list(tensors), "Adding", lambda n: tensors[n].nbytes):
            start, size, dtype = 0, self.base.tensors[name].numel, tensors[name].dtype
            for part in update(name):
                stored = part[known:].to(dtype)
                part[known:] = stored
                if not torch.isfinite(part).all():
                    raise self._overflow(name, part[:known], dtype, read)
                for row, values in enumerate(stored):
                    files.write(name, values, row * size + start)
                joint += part @ part.T
                start += part.shape[1]
        if not torch.isfinite(joint).all():
            raise ParameterError(
                f'"{read.task}": its inner products with the stored vectors overflow float64; make its change smaller'
            )
        return joint

    def _update(
        self, tensors: Mapping[str, TensorInfo], step: Step, read: Changes
    ) -> Callable[[str], Iterator[Tensor]]:
        """Blocks [K + 1 + K', k] of a weight: old vectors, new task vector, new vectors before rounding."""

        def touched(name: str) -> list[Delta]:
            return [*(self._basis.deltas(name) if self._basis else ()), read(name)]

        if step.mixing is not None:
            mixing = step.mixing
            return lambda name: (torch.cat([part, mixing.T @ part]) for part in blocks(touched(name)))
        combine = self._running(lambda: map(touched, track(list(tensors), "Thresholds", lambda _: 1)))
        return lambda name: blocks([*(known := touched(name)), combine(name, known)])

    def _running(self, passes: Callable[[], Iterator[Sequence[Delta]]]) -> Callable[[str, Sequence[Delta]], Delta]:
        """The running merge of a weight's [merged, new], or of [new] alone at first."""
        options, first = self.settings.options, self._basis is None
        match self.settings.method:
            case "magmax":
                return lambda name, known: magmax(known, [1.0] * len(known))
            case "opcm":
                if first:
                    return lambda name, known: known[0]
                return lambda name, known: as_stored(
                    weight_sum(name, matrices_in(name, self.base), known[0], known[1], **options), name, self.base
                )
            case _ if first:
                return lambda name, known: scale(known[0], options.get("scaling", TIES_SCALING))
            case _:
                limits = thresholds(passes, options.get("density", TIES_DENSITY))
                return lambda name, known: continual_ties(known[0], known[1], limits=limits, **options)

    def _describe(self, buffer: Buffer, tasks: tuple[str, ...]) -> BasisInfo:
        total = float(buffer.norms.square().sum()) or 1.0
        safe = torch.where(buffer.norms > 0, buffer.norms, torch.ones_like(buffer.norms))
        small = {name: getattr(buffer, name).tolist() for name in ("weights", "gram", "norms", "estimates")}
        return BasisInfo(
            method=self.settings.method,
            options={STATE: {**asdict(self.settings), **small}},
            tasks=tasks,
            encoder=buffer.encoder.tolist(),
            decoder=buffer.decoder.tolist(),
            mean=None,
            loss=float(buffer.estimates.square().sum()) / total,
            bound=0.0,
            spectral_bound=0.0,
            task_error=(buffer.errors / safe).tolist(),
            gram=[],
            base_id=self.base.label,
            base_fingerprint=self.base.fingerprint(),
            base_norm=None,
            library_version=library_version(),
        )

    def _check_unchanged(self) -> None:
        """OutputError if the directory is no longer what this step began with."""
        file = self.directory / CONFIG_FILE
        tasks = BasisInfo.read(file, str(self.directory)).tasks if file.exists() else ()
        if tasks != self.tasks:
            raise OutputError(
                f'"{self.directory}": another process has added {len(tasks) - len(self.tasks)} tasks since this one '
                "opened it; nothing was changed. Open it again, and add one task at a time"
            )

    def _overflow(self, name: str, known: Tensor, dtype: torch.dtype, read: Changes) -> Exception:
        if torch.isfinite(known).all():
            return ParameterError(f"tensor {name} overflows {dtype}; store the vectors as bfloat16 or float32")
        return read.not_finite(name)


def _open_base(base: str | Path | Checkpoint) -> Checkpoint:
    return base if isinstance(base, Checkpoint) else Checkpoint.open(base)


def _buffer(info: BasisInfo) -> Buffer:
    state = info.online
    assert state is not None

    def matrix(value: Any) -> Tensor:
        return torch.tensor(value, dtype=torch.float64)

    weights, gram, norms, estimates = map(matrix, (state.weights, state.gram, state.norms, state.estimates))
    errors = matrix(info.task_error) * torch.where(norms > 0, norms, torch.ones_like(norms))
    return Buffer(matrix(info.encoder), matrix(info.decoder), weights, gram, norms, errors, estimates)


def _settings(info: BasisInfo, label: str) -> Settings:
    """Raises CheckpointError for a method that is none, and for what it cannot take."""
    state = info.online
    assert state is not None
    try:
        if state.method not in ONLINE:
            raise ParameterError(f"unknown method {state.method!r}{did_you_mean(state.method, ONLINE)}")
        check_budget(state.method, state.num_bases)
        options = checked(f"online {state.method}", ONLINE[state.method], state.options)
    except ParameterError as error:
        raise CheckpointError(f'"{label}": the state of the online basis is damaged: {error}') from error
    return Settings(state.method, state.num_bases, state.dtype, state.seed, options)


def _dtype_name(dtype: torch.dtype | None) -> str | None:
    if dtype is None:
        return None
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ParameterError(f"vectors are stored in {', '.join(DTYPES)}; got {name}")
    return name
