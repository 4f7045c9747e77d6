"""Gram matrix in, encoder and decoder out: one file per published construction."""

from .ae import ae_bases
from .pca import pca_bases
from .random import rand_proj, rand_select
from .weights import BasisWeights

__all__ = ["BasisWeights", "ae_bases", "pca_bases", "rand_proj", "rand_select"]
