"""The words that options may be, and what options are when nothing is said: for the library and ``--help`` alike.

Nothing is imported but typing: the command line knows all of this before torch is loaded.
"""

from typing import Literal

# How weights are stored; "auto" is as the inputs are.
Dtype = Literal["auto", "float32", "bfloat16", "float16"]

# Rows of a vocabulary that not all models have.
ExtraRows = Literal["drop", "keep"]

# Shared and unique components (DeVec): what the paper recommends.
Subspace = Literal["chain", "mean", "angles"]
Pool = Literal["joint", "iterative", "pairs"]
Side = Literal["column", "row"]
THRESHOLD = 0.85
RANK = "energy:0.95"

# Styles are mixed by one component of each; a pool of pairs would leave them whole.
StyleComponent = Literal["unique", "shared", "full"]
StylePool = Literal["joint", "iterative"]
# Whose names a mixed file has.
StyleLoader = Literal["diffusers", "comfy"]

# What is negated, how much of the control has to stay, and the alphas that are tried (the papers' protocol). Toxicity
# is what a task does not share with any single other task, so the pool is iterative where a task is forgotten.
Component = Literal["plain", "unique", "reconstructed"]
FORGETTING_POOL: Pool = "iterative"
KEEP = 0.95
ALPHAS = tuple(i / 20 for i in range(21))
# The scales of a merge that are tried: M convex bases are shorter than T task vectors, and a flat spectrum is longer.
SCALES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0)

# What loads an adapter.
Host = Literal["vllm", "llama.cpp", "diffusers", "peft"]

# What an extracted adapter saves whole.
Saved = Literal["all", "norms", "none"]

# What a model of images and texts is given of the name of a class.
TEMPLATE = "a photo of a {}."

# What a plan is made of.
Job = Literal[
    "gram",
    "compress",
    "linear",
    "task_arithmetic",
    "ties",
    "dare",
    "ae_bases",
    "tsv",
    "tsv_compress",
    "devec_unique",
    "iso_c",
]
NUM_BASES = 0.5
