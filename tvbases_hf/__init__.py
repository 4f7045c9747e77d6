"""Task-vector bases for Hugging Face models: compress, merge and edit fine-tuned models, exactly."""

# ruff: noqa: I001  one line for every home

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers, which cannot follow the table below; a test compares the two
    from .algebra.delta import Delta as Delta, Dense as Dense, dense as dense
    from .algebra.products import square_norm as square_norm
    from .bases import ae_bases as ae_bases
    from .basis import Basis as Basis, LoraBasis as LoraBasis
    from .basis.online import OnlineBasis as OnlineBasis
    from .cli.planning import plan as plan
    from .errors import TvbasesError as TvbasesError
    from .learning.batches import Columns as Columns
    from .learning.coefficients import (
        accuracies as accuracies,
        coordinate_search as coordinate_search,
        grid_search as grid_search,
        summed as summed,
    )
    from .learning.curve import Curve as Curve
    from .learning.data import TaskData as TaskData, stratified as stratified
    from .learning.directions import direction as direction
    from .learning.inplace import InPlace as InPlace
    from .learning.negation import Negation as Negation, change_of as change_of, negate as negate
    from .learning.rows import read_rows as read_rows
    from .learning.taskfiles import TaskModel as TaskModel
    from .learning.training import fine_tune as fine_tune
    from .learning.with_data import DATA_METHODS as DATA_METHODS
    from .merging.apply import merged as merged
    from .merging.components import write_components as write_components
    from .merging.extract import extract as extract
    from .merging.write import write as write
    from .methods.devec import Options as Options, decompose as decompose
    from .methods.registry import METHODS as METHODS
    from .models.gram import gram_matrix as gram_matrix
    from .models.vectors import Vectors as Vectors
    from .styles.mixed_file import mix_style_files as mix_style_files
    from .theory.inspection import inspect as inspect

# Names are loaded when they are first used: `tvbases --help` and the start-up hook must not wait for torch.
_NAMES = {
    "algebra.delta": "Delta Dense dense",
    "algebra.products": "square_norm",
    "bases": "ae_bases",
    "basis": "Basis LoraBasis",
    "basis.online": "OnlineBasis",
    "cli.planning": "plan",
    "errors": "TvbasesError",
    "learning.batches": "Columns",
    "learning.coefficients": "accuracies coordinate_search grid_search summed",
    "learning.curve": "Curve",
    "learning.data": "TaskData stratified",
    "learning.directions": "direction",
    "learning.inplace": "InPlace",
    "learning.negation": "Negation change_of negate",
    "learning.rows": "read_rows",
    "learning.taskfiles": "TaskModel",
    "learning.training": "fine_tune",
    "learning.with_data": "DATA_METHODS",
    "merging.apply": "merged",
    "merging.components": "write_components",
    "merging.extract": "extract",
    "merging.write": "write",
    "methods.devec": "Options decompose",
    "methods.registry": "METHODS",
    "models.gram": "gram_matrix",
    "models.vectors": "Vectors",
    "styles.mixed_file": "mix_style_files",
    "theory.inspection": "inspect",
}
_HOME = {name: home for home, names in _NAMES.items() for name in names.split()}
__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module(".version", __name__).library_version()
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
