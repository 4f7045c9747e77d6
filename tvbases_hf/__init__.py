"""Task-vector bases for Hugging Face models: compress, merge and edit fine-tuned models, exactly."""

from .bases import BasisWeights, ae_bases, pca_bases, rand_proj, rand_select
from .basis import Basis
from .checkpoint import Checkpoint
from .delta import Dense, LowRank, inner
from .errors import TvbasesError
from .gram import Gram, gram_matrix
from .info import library_version
from .taskvector import TaskVectors

__version__ = library_version()

__all__ = [
    "Basis",
    "BasisWeights",
    "Checkpoint",
    "Dense",
    "Gram",
    "LowRank",
    "TaskVectors",
    "TvbasesError",
    "ae_bases",
    "gram_matrix",
    "inner",
    "pca_bases",
    "rand_proj",
    "rand_select",
]
