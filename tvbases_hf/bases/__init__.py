"""Gram matrix in, encoder and decoder out: one file per published construction."""

from .ae import ae_bases
from .cluster import Clusters, cluster_bases, find_clusters
from .pca import pca_bases, pca_positive
from .random import rand_proj, rand_select
from .weights import BasisWeights

__all__ = [
    "BasisWeights",
    "Clusters",
    "ae_bases",
    "cluster_bases",
    "find_clusters",
    "pca_bases",
    "pca_positive",
    "rand_proj",
    "rand_select",
]
