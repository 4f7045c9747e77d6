"""Images classified by the names of the classes: the zero-shot head of CLIP, SigLIP and their kin.

The head is made of the model that is asked, by its own tokenizer and tower of text: where that tower's weights change,
the head does.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import ParameterError
from ..models.translation import Translation
from .data import LABELS, fitting
from .inplace import Reparametrised, ask, weight_of

OF_IMAGES = re.compile(r"(^|\.)(vision_model|visual_projection)\.")
# SigLIP was trained on texts of this length only, whose padding it reads as well.
SIGLIP_TOKENS = {"padding": "max_length", "max_length": 64, "truncation": True, "return_attention_mask": False}


@dataclass(frozen=True, eq=False)
class ZeroShot:
    """(logits [n, C], labels [n]) of images: exp(scale) cos(image, class) + bias, as the model itself has them.

    ``texts`` are the tokens [C, L] of the classes' names in each template; the embeddings of several templates are
    normalised, averaged and normalised again (CLIP paper, section 3.1.4). ``head`` [C, d], where it is known.
    """

    texts: Sequence[Mapping[str, Tensor]]
    head: Tensor | None = field(default=None, repr=False)

    @classmethod
    def of_names(cls, model: Any, tokenizer: Any, names: Sequence[str], templates: Sequence[str]) -> ZeroShot:
        """Raises ParameterError for a template without a place for the name."""
        bad = [template for template in templates if template.count("{}") != 1]
        if bad or not templates:
            raise ParameterError(
                f'a template has one {{}} where the name of the class goes, as "a photo of a {{}}."; got {bad[:1]}'
            )
        return cls([_tokens(model, tokenizer, [template.format(name) for name in names]) for template in templates])

    def __call__(self, model: Any, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
        inputs = fitting(model, batch)
        labels = inputs.pop(LABELS, None)
        images = _normalised(ask(model, "get_image_features", **inputs))
        head = self._head(model) if self.head is None else self.head
        scale, bias = weight_of(model, "logit_scale"), weight_of(model, "logit_bias")
        temperature = weight_of(model, "temperature")  # ALIGN's
        logits = images @ head.T.to(images)
        if scale is not None:
            logits = scale.exp() * logits
        elif temperature is not None:
            logits = logits / temperature
        return logits if bias is None else logits + bias, labels

    def fixed(self, model: Any, changing: Iterable[str] = ()) -> ZeroShot:
        """With the head of this model, for as long as none of the weights ``changing`` is one of its text's."""
        asked = model.reparametrised if isinstance(model, Reparametrised) else model
        names = list(changing)
        found = Translation(asked, names) if names else None
        if found and any(not OF_IMAGES.search(name) for stored in names for name in found.parameters(stored)):
            return self
        with torch.no_grad():
            return replace(self, head=self._head(model))

    def _head(self, model: Any) -> Tensor:
        embedded = [_normalised(ask(model, "get_text_features", **fitting(model, text))) for text in self.texts]
        return embedded[0] if len(embedded) == 1 else _unit(torch.stack(embedded).mean(dim=0))


def can_name_images(model: Any) -> bool:
    """Whether a model embeds images and texts, and scales their cosines as CLIP or ALIGN does."""
    embeds = hasattr(model, "get_image_features") and hasattr(model, "get_text_features")
    return embeds and (hasattr(model, "logit_scale") or hasattr(model, "temperature"))


def _tokens(model: Any, tokenizer: Any, texts: list[str]) -> dict[str, Tensor]:
    from inspect import signature

    if "siglip" in str(model.config.model_type):
        how: dict[str, Any] = SIGLIP_TOKENS
    else:
        how = {"padding": True, "truncation": True, "max_length": model.config.text_config.max_position_embeddings}
    known = signature(model.get_text_features).parameters
    return {key: value for key, value in tokenizer(texts, return_tensors="pt", **how).items() if key in known}


def _normalised(features: Any) -> Tensor:
    """[n, d] of length 1; transformers 5 gives the tower's outputs, of which the projection is the pooled one."""
    return _unit(features if isinstance(features, Tensor) else features.pooler_output)


def _unit(features: Tensor) -> Tensor:
    return features / features.norm(dim=-1, keepdim=True)
