"""Output matrices that are the input embedding, as transformers ties them when it loads a model.

A stored output matrix is the model's own unless it equals the embedding, whatever the configuration says; one that is
absent follows the embedding where the configuration, or its class by default, ties the two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# Matrices that models use twice, as input embedding and as output; the last part of the module's name.
EMBEDDINGS = (
    "shared",
    "embed_tokens",
    "wte",
    "embed_in",
    "word_embeddings",
    "tokens_embed",
    "tok_embeddings",
    "embeddings",
)
OUTPUTS = ("lm_head", "embed_out", "decoder", "output", "proj_out", "output_layer", "output_projection", "unembed")
# Input embeddings, tied to an output or not.
INPUTS = (*EMBEDDINGS, "token_embedding")
FLAG = "tie_word_embeddings"


def leaf(name: str) -> str:
    """The last part of the name of the module that holds a tensor."""
    return name.rpartition(".")[0].rpartition(".")[2]


def is_output(name: str) -> bool:
    """Whether the name is that of an output matrix."""
    return name.endswith(".weight") and leaf(name) in OUTPUTS


def is_token_matrix(name: str, shape: Sequence[int]) -> bool:
    """Whether a tensor is a matrix with a row for every token, by its name."""
    return len(shape) == 2 and (is_output(name) or (name.endswith(".weight") and leaf(name) in INPUTS))


def embedding_of(
    shape: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]], *, any_rows: bool = False
) -> str | None:
    """The input embedding that an output matrix of this shape, or with other rows, may be tied to."""
    first = int(any_rows)
    found = [
        name
        for name, own in shapes.items()
        if own[first:] == shape[first:] and len(own) == len(shape) == 2 and name.endswith(".weight")
    ]
    return next((name for word in EMBEDDINGS for name in found if leaf(name) == word), None)


def copies(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], Tensor]) -> set[str]:
    """Stored output matrices that loading makes one with the embedding, since they equal it."""
    found = set()
    if not config or config.get(FLAG) is False:
        return found
    for name in filter(is_output, shapes):
        embedding = embedding_of(shapes[name], shapes)
        if embedding is None:
            continue
        if torch.equal(read(name), read(embedding)) and ties(config):
            found.add(name)
    return found


def followers(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]
) -> dict[str, str]:
    """{output matrix: its embedding} of those ``wanted`` that the model lacks because they are its embedding.

    The rows of an embedding are the model's own: another vocabulary may have more or fewer.
    """
    absent = [name for name in wanted if is_output(name) and name not in shapes]
    found = {name: embedding for name in absent if (embedding := embedding_of(wanted[name], shapes, any_rows=True))}
    return found if found and ties(config) else {}


def ties(config: Mapping[str, Any]) -> bool | None:
    """Whether transformers ties the matrices of a model of this configuration; None where nothing tells.

    The configuration says it, or the class of the configuration by default, of the transformers that is installed.
    """
    if isinstance(config.get(FLAG), bool):
        return config[FLAG]
    own = (config.get("text_config") or {}).get(FLAG)
    try:
        from transformers import CONFIG_MAPPING

        made = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
        return bool(getattr(made, FLAG, False))
    except Exception:  # not installed, another kind of model, or values that the class refuses
        return own
