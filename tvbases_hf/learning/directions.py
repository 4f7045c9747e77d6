"""What can be taken away to forget a task: its vector, that vector as bases give it back, or its unique component.

DeVec negates the unique component so that what other tasks share with the unwanted one stays (section 4.3 of the
paper); the AE paper negates the reconstruction (Table 4). All three are changes of weights, read one at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import get_args

from .. import defaults
from ..algebra.delta import Delta
from ..algebra.sums import total
from ..bases import ae_bases
from ..errors import ParameterError, did_you_mean
from ..merging.apply import decomposed, merged
from ..methods.devec import Options
from ..models.gram import Gram, gram_matrix
from ..models.vectors import Vectors

COMPONENTS = get_args(defaults.Component)
# How what is unique to an unwanted task is found: the paper's toxicity protocol.
FORGETTING = Options(pool=defaults.FORGETTING_POOL)
# Directions are asked for once per alpha. Below this they are kept, as dense float32 at the most.
CACHED_BYTES = 2 << 30

Direction = Callable[[str], Delta]


def direction(
    vectors: Vectors,
    task: str | Sequence[str],
    component: str = "plain",
    *,
    options: Options = FORGETTING,
    num_bases: float = defaults.NUM_BASES,
    even_errors: bool = False,
    gram: Gram | None = None,
) -> Direction:
    """The change to negate, one weight at a time: ``direction(...)(name)``.

    Args:
        task: or several fine-tunes of one task, of which those entries count whose sign they agree on (NegMerge).
        component: ``plain``, ``unique`` (needs another task, the pool that it is compared with) or ``reconstructed``.
        options: of the decomposition; by default the paper's toxicity protocol (iterative pool, threshold 0.85).
        num_bases: M of the AE bases, or a fraction of the T tasks; ``gram`` saves a pass if it is known.
        even_errors: of the bases, so that this task is not one of those that least squares gives up; see ae_bases.

    Raises ParameterError for an unknown task or component, for one that needs more tasks, and for another than plain
    of several fine-tunes.
    """
    check_component(component, len(vectors))
    tasks = check_tasks(task, vectors, component)
    if len(tasks) > 1:
        return _agreed(vectors.selected([vectors.tasks.index(name) for name in tasks]))
    index = vectors.tasks.index(tasks[0])
    match component:
        case "plain":
            return lambda name: vectors.deltas(name)[index]
        case "unique":
            return _unique(vectors, index, options)
        case _:
            matrix = (gram or gram_matrix(vectors)).matrix
            weights = ae_bases(matrix, num_bases, even_errors=even_errors)
            column = weights.reconstruction[:, index].tolist()
            return _kept(vectors, lambda name: total(vectors.deltas(name), column))


def check_tasks(task: str | Sequence[str], vectors: Vectors, component: str) -> list[str]:
    """The tasks that are named. ParameterError as ``direction`` raises it."""
    tasks = [task] if isinstance(task, str) else list(task)
    for name in tasks:
        if name not in vectors.tasks:
            raise ParameterError(
                f'no task "{name}"{did_you_mean(name, vectors.tasks)}; there are {", ".join(vectors.tasks)}'
            )
    if len(set(tasks)) < len(tasks) or not tasks:
        raise ParameterError("name at least one task to forget, and each once")
    if len(tasks) > 1 and component != "plain":
        raise ParameterError(
            f"{len(tasks)} fine-tunes are to be forgotten, whose common part is the plain component; name one of them "
            f"for the {component} one"
        )
    return tasks


def check_component(component: str, num_tasks: int) -> None:
    """ParameterError for an unknown component, or one that this number of tasks does not define."""
    if component not in COMPONENTS:
        raise ParameterError(
            f"unknown component {component!r}{did_you_mean(component, COMPONENTS)}; choose one of "
            f"{', '.join(COMPONENTS)}"
        )
    if component != "plain" and num_tasks < 2:
        raise ParameterError(
            f"the {component} component is relative to other tasks, and there is only one; name more fine-tunes of "
            "this base, for example --task chat=path/to/chat, or take component plain"
        )


def _unique(vectors: Vectors, index: int, options: Options) -> Direction:
    """The decomposition is costly and made once: what is kept of a large dense change is its shared part, low-rank."""

    @functools.cache
    def parts(name: str) -> tuple[Delta | None, Delta | None]:
        split = decomposed(vectors, name, options, [index])
        unique = split.unique[index]
        small = unique.low is not None or _fits(vectors)
        return (unique, None) if small else (None, split.shared[index])

    def read(name: str) -> Delta:
        unique, shared = parts(name)
        if unique is not None or shared is None:
            return unique or vectors.deltas(name)[index]
        return total([vectors.deltas(name)[index], shared], [1.0, -1.0])

    return read


def _agreed(runs: Vectors) -> Direction:
    """NegMerge of several fine-tunes of one task."""
    return _kept(runs, merged(runs, "negmerge"))


def _kept(vectors: Vectors, read: Direction) -> Direction:
    return functools.cache(read) if _fits(vectors) else read


def _fits(vectors: Vectors) -> bool:
    return 4 * vectors.numel <= CACHED_BYTES
