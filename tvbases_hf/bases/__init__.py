"""Gram matrix in, encoder and decoder out: one file per published construction."""

import importlib
import pkgutil

from .ae import ae_bases
from .cluster import Clusters, cluster_bases, find_clusters
from .dictionary import dictionary_bases
from .nmf import nmf_bases, pca_nonnegative
from .pca import pca_bases, pca_positive
from .random import rand_select
from .registry import CONSTRUCTIONS, Construction
from .weights import BasisWeights

for _module in pkgutil.iter_modules(__path__):  # each registers its constructions
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = [
    "CONSTRUCTIONS",
    "BasisWeights",
    "Clusters",
    "Construction",
    "ae_bases",
    "cluster_bases",
    "dictionary_bases",
    "find_clusters",
    "nmf_bases",
    "pca_bases",
    "pca_nonnegative",
    "pca_positive",
    "rand_select",
]
