"""Models of images and texts beside CLIP and SigLIP: asked by the names of the classes, or refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from tvbases_hf.errors import ParameterError
from tvbases_hf.learning.taskfiles import TaskModel
from tvbases_hf.learning.zeroshot import ZeroShot, can_name_images
from zoo.answering import TEXT, VISION, save_folder, save_tokenizer

BLIP: dict[str, Any] = {
    "text_config": {**TEXT, "encoder_hidden_size": VISION["hidden_size"]},
    "vision_config": VISION,
    "projection_dim": 8,
}
MADE: dict[str, Any] = {
    "BlipModel": transformers.BlipConfig(**BLIP),
    "BlipForConditionalGeneration": transformers.BlipConfig(**BLIP),
    "Siglip2Model": transformers.Siglip2Config(
        text_config=TEXT, vision_config={**VISION, "patch_size": 4, "num_patches": 4}
    ),
}


def loaded(name: str, root: Path) -> TaskModel:
    torch.manual_seed(0)
    model = getattr(transformers, name)(MADE[name])
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    model.save_pretrained(root / name)
    save_tokenizer(root / name)
    processor: Any = transformers.BlipImageProcessor(size={"height": 8, "width": 8})
    if "Siglip2" in name:  # any number of patches, with a mask
        processor = transformers.Siglip2ImageProcessor(patch_size=4, max_num_patches=6)
    processor.save_pretrained(root / name)
    return TaskModel.load(root / name)


@pytest.mark.parametrize("name", ["BlipModel", "Siglip2Model"])
def test_the_logits_are_the_models_own(name: str, tmp_path: Path) -> None:
    model = loaded(name, tmp_path)
    task = model.data("images", str(save_folder(tmp_path / "images")))
    readout = task.readout
    assert isinstance(readout, ZeroShot)
    for batch in task.batches:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        own = model.model(**inputs, **readout.texts[0]).logits_per_image
        torch.testing.assert_close(task.logits(model.model, batch), own, rtol=1e-4, atol=1e-5)
        assert own.std() > 1e-4


def test_a_temperature_divides_as_in_align() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.temperature = nn.Parameter(torch.tensor(0.25))

        def get_image_features(self, pixel_values: Tensor) -> Tensor:
            return pixel_values

        def get_text_features(self, input_ids: Tensor) -> Tensor:
            return input_ids.float()

    ids, pixels = torch.tensor([[3, 4], [0, 2]]), torch.tensor([[1.0, 0.0], [0.0, -5.0]])
    model = Model()
    assert can_name_images(model)
    logits, _ = ZeroShot([{"input_ids": ids}])(model, {"pixel_values": pixels})
    torch.testing.assert_close(logits, torch.tensor([[0.6, 0.0], [-0.8, -1.0]]) / 0.25)


def test_a_model_that_describes_images_is_refused(tmp_path: Path) -> None:
    model = loaded("BlipForConditionalGeneration", tmp_path)
    with pytest.raises(ParameterError, match=r"is not what a BlipForConditionalGeneration takes|has no"):
        model.data("images", str(save_folder(tmp_path / "images")))


def test_a_model_that_answers_nan_is_refused(tmp_path: Path) -> None:
    model = loaded("BlipModel", tmp_path)
    model.model.visual_projection.weight.data.zero_()  # no direction, and so no cosine
    with pytest.raises(ParameterError, match='answers NaN to the data of "images"'):
        model.data("images", str(save_folder(tmp_path / "images")))
