"""Task-vector bases for Hugging Face models: compress, merge and edit fine-tuned models, exactly."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapters.adapter import Adapter
    from .bases import BasisWeights, ae_bases, cluster_bases, pca_bases, pca_positive, rand_proj, rand_select
    from .basis import Basis
    from .delta import Dense, Dora, LowRank, inner
    from .errors import TvbasesError
    from .evaluation.coefficients import coordinate_search, grid_search
    from .evaluation.curve import Curve, normalised_accuracy
    from .evaluation.inplace import InPlace
    from .evaluation.negation import Negation, negate
    from .evaluation.tangent import Linearised
    from .evaluation.training import fine_tune
    from .gram import Gram, gram_matrix
    from .online import OnlineBasis
    from .shared import decompose
    from .singular import tsv_merge
    from .storage.checkpoint import Checkpoint
    from .taskvector import TaskVectors
    from .theory.bounds import measure_bounds

# Names are loaded when they are first used: `tvbases --help` and the start-up hook must not wait for torch.
_HOME = {
    "Adapter": "adapters.adapter",
    "Basis": "basis",
    "BasisWeights": "bases",
    "Checkpoint": "storage.checkpoint",
    "Curve": "evaluation.curve",
    "Dense": "delta",
    "Dora": "delta",
    "Gram": "gram",
    "InPlace": "evaluation.inplace",
    "Linearised": "evaluation.tangent",
    "LowRank": "delta",
    "Negation": "evaluation.negation",
    "OnlineBasis": "online",
    "TaskVectors": "taskvector",
    "TvbasesError": "errors",
    "ae_bases": "bases",
    "cluster_bases": "bases",
    "coordinate_search": "evaluation.coefficients",
    "decompose": "shared",
    "fine_tune": "evaluation.training",
    "gram_matrix": "gram",
    "grid_search": "evaluation.coefficients",
    "inner": "delta",
    "measure_bounds": "theory.bounds",
    "negate": "evaluation.negation",
    "normalised_accuracy": "evaluation.curve",
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
