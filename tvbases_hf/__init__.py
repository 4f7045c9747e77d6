"""Task-vector bases for Hugging Face models: compress, merge and edit fine-tuned models, exactly."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .algebra.delta import Dense, Dora, LowRank, inner
    from .bases import BasisWeights, ae_bases, cluster_bases, pca_bases, pca_positive, rand_proj, rand_select
    from .basis import Basis, LoraBasis
    from .basis.online import OnlineBasis
    from .errors import TvbasesError
    from .learning.coefficients import coordinate_search, grid_search
    from .learning.curve import Curve, normalised_accuracy
    from .learning.inplace import InPlace
    from .learning.negation import Negation, negate
    from .learning.tangent import Linearised
    from .learning.training import fine_tune
    from .methods.devec import decompose
    from .methods.tsv import tsv_merge
    from .models.adapter import Adapter
    from .models.gram import Gram, gram_matrix
    from .models.vectors import Vectors
    from .storage.checkpoint import Checkpoint
    from .theory.bounds import measure_bounds

# Names are loaded when they are first used: `tvbases --help` and the start-up hook must not wait for torch.
_HOME = {
    "Adapter": "models.adapter",
    "Basis": "basis",
    "LoraBasis": "basis",
    "BasisWeights": "bases",
    "Checkpoint": "storage.checkpoint",
    "Curve": "learning.curve",
    "Dense": "algebra.delta",
    "Dora": "algebra.delta",
    "Gram": "models.gram",
    "InPlace": "learning.inplace",
    "Linearised": "learning.tangent",
    "LowRank": "algebra.delta",
    "Negation": "learning.negation",
    "OnlineBasis": "basis.online",
    "Vectors": "models.vectors",
    "TvbasesError": "errors",
    "ae_bases": "bases",
    "cluster_bases": "bases",
    "coordinate_search": "learning.coefficients",
    "decompose": "methods.devec",
    "fine_tune": "learning.training",
    "gram_matrix": "models.gram",
    "grid_search": "learning.coefficients",
    "inner": "algebra.delta",
    "measure_bounds": "theory.bounds",
    "negate": "learning.negation",
    "normalised_accuracy": "learning.curve",
    "pca_bases": "bases",
    "pca_positive": "bases",
    "rand_proj": "bases",
    "rand_select": "bases",
    "tsv_merge": "methods.tsv",
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
    "LoraBasis",
    "LowRank",
    "Negation",
    "OnlineBasis",
    "TvbasesError",
    "Vectors",
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
