"""Images as a model is given them: opened by Pillow, prepared by the model's own image processor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, MissingExtraError, ParameterError
from .rows import HubImage

PROCESSORS = ("preprocessor_config.json", "processor_config.json")
MODES = {1: "L", 3: "RGB"}


def has_processor(directories: Sequence[Path]) -> bool:
    return bool(_holders(directories))


def image_processor(directories: Sequence[Path], config: Any) -> Any:
    """The first that a directory holds, or else that of the model's type, for the size that the model takes.

    Raises:
        MissingExtraError: no Pillow.
        CheckpointError: one that cannot be read, or a type of model that has none.
    """
    try:
        import PIL  # noqa: F401
        from transformers import AutoImageProcessor
    except ImportError as error:
        raise MissingExtraError(f'images need Pillow ({error}); pip install "tvbases-hf[images]"') from error
    for directory in _holders(directories):
        try:
            return AutoImageProcessor.from_pretrained(str(directory))
        except (OSError, ValueError, KeyError, ImportError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise CheckpointError(f'the image processor in "{directory}" cannot be loaded ({reason})') from error
    return _of_type(config)


def _holders(directories: Sequence[Path]) -> list[Path]:
    return [path for path in directories if any((path / file).is_file() for file in PROCESSORS)]


def _of_type(config: Any) -> Any:
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING

    size = getattr(getattr(config, "vision_config", config), "image_size", None)
    kinds: Any = IMAGE_PROCESSOR_MAPPING.get(type(config), {})
    if not kinds or size is None:
        raise CheckpointError(
            f"there is no {PROCESSORS[0]}, and a {config.model_type} has no size of images of its own; save the "
            "image processor with the model, or give pixel_values in an npz"
        )
    height, width = (size, size) if isinstance(size, int) else size
    square = {"height": height, "width": width}
    return kinds["pil"](size=square, do_resize=True, do_center_crop=False)


def describe(processor: Any) -> str:
    """How a processor of a model's type prepares images, for the user."""
    size, mean, deviation = processor.size, _numbers(processor.image_mean), _numbers(processor.image_std)
    return (
        f"there is no {PROCESSORS[0]}: images are resized to {size['height']} x {size['width']} and normalised with "
        f"mean {mean} and deviation {deviation}, as {type(processor).__name__} does"
    )


def opened(images: Sequence[Any], channels: int, name: str) -> list[Any]:
    """Pillow images, upright, of as many channels as the model takes. ParameterError names one that cannot be read."""
    if channels not in MODES:
        raise ParameterError(f'the data of "{name}": a model of images of {channels} channels; give pixel_values')
    return [_opened(image, MODES[channels], name) for image in images]


def _opened(image: Any, mode: str, name: str) -> Any:
    import numpy as np
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        if isinstance(image, HubImage):
            image = image.open()
        elif isinstance(image, (str, Path)):
            with Image.open(image) as file:
                file.load()
                image = file
        elif not isinstance(image, Image.Image):
            image = Image.fromarray(_with_channels_last(np.asarray(image)))
        return ImageOps.exif_transpose(image).convert(mode)
    except (OSError, UnidentifiedImageError, TypeError, ValueError, SyntaxError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ParameterError(f'the data of "{name}" holds an image that cannot be read: {reason}') from error


def _with_channels_last(array: Any) -> Any:
    if array.dtype != "uint8":
        raise ValueError(f"an array of {array.dtype}; images are uint8, and prepared ones are called pixel_values")
    if array.ndim == 3 and array.shape[-1] not in (1, 3, 4) and array.shape[0] in (1, 3):
        array = array.transpose(1, 2, 0)
    return array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array


def _numbers(values: Sequence[float]) -> str:
    return "/".join(f"{value:.3g}" for value in values)
