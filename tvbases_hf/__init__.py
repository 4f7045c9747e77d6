"""Task-vector bases for Hugging Face models: compress, merge and edit fine-tuned models, exactly."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapter import Adapter
    from .bases import BasisWeights, ae_bases, cluster_bases, pca_bases, pca_positive, rand_proj, rand_select
    from .basis import Basis
    from .bounds import measure_bounds
    from .checkpoint import Checkpoint
    from .coefficients import coordinate_search, grid_search
    from .curve import Curve, normalised_accuracy
    from .delta import Dense, Dora, LowRank, inner
    from .errors import TvbasesError
    from .gram import Gram, gram_matrix
    from .inplace import InPlace
    from .negation import Negation, negate
    from .online import OnlineBasis
    from .shared import decompose
    from .singular import tsv_merge
    from .tangent import Linearised
    from .taskvector import TaskVectors
    from .training import fine_tune

# Names are loaded when they are first used: `tvbases --help` and the start-up hook must not wait for torch.
_HOME = {
    "Adapter": "adapter",
    "Basis": "basis",
    "BasisWeights": "bases",
    "Checkpoint": "checkpoint",
    "Curve": "curve",
    "Dense": "delta",
    "Dora": "delta",
    "Gram": "gram",
    "InPlace": "inplace",
    "Linearised": "tangent",
    "LowRank": "delta",
    "Negation": "negation",
    "OnlineBasis": "online",
    "TaskVectors": "taskvector",
    "TvbasesError": "errors",
    "ae_bases": "bases",
    "cluster_bases": "bases",
    "coordinate_search": "coefficients",
    "decompose": "shared",
    "fine_tune": "training",
    "gram_matrix": "gram",
    "grid_search": "coefficients",
    "inner": "delta",
    "measure_bounds": "bounds",
    "negate": "negation",
    "normalised_accuracy": "curve",
    "pca_bases": "bases",
    "pca_positive": "bases",
    "rand_proj": "bases",
    "rand_select": "bases",
    "tsv_merge": "singular",
}

__all__ = [
    "Adapter",
    "Basis",
    "BasisWeights",
    "Checkpoint",
    "Curve",
    "Dense",
    "Dora",
    "Gram",
    "InPlace",
    "Linearised",
    "LowRank",
    "Negation",
    "OnlineBasis",
    "TaskVectors",
    "TvbasesError",
    "ae_bases",
    "cluster_bases",
    "coordinate_search",
    "decompose",
    "fine_tune",
    "gram_matrix",
    "grid_search",
    "inner",
    "measure_bounds",
    "negate",
    "normalised_accuracy",
    "pca_bases",
    "pca_positive",
    "rand_proj",
    "rand_select",
    "tsv_merge",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module(".version", __name__).library_version()
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
