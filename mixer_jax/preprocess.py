"""Image -> array, as the evaluations behind the published figures do it, without TensorFlow.

| name | what it does to the pixels | behind |
| --- | --- | --- |
| `resmall_crop` | shorter side to 256 by area, truncated to uint8, centre crop 224 | the published accuracies (big_vision) |
| `resize_crop` | both sides to 256, bilinear, truncated to uint8, centre crop 224 | the paper's other evaluation |
| `squash` | both sides to 224, bilinear, left in float32 | the official fine-tuning code |
| `timm_bicubic` | shorter side to 256, bicubic with antialias, centre crop 224 | timm's `goog` files |
| `timm_bilinear` | the same, bilinear | timm's `miil` files |

The last gives values from 0 to 1 (`x / 255`), all others from -1 to 1 (`x / 127.5 - 1`). Any other evaluation of timm's has a
description, `timm:bicubic,center=0.9,mean=0.485/0.456/0.406,std=0.229/0.224/0.225` (`convert.preprocessing`), which gives
`(x / 255 - mean) / std`. The first three compute in float32
and in the order of TensorFlow's kernels, and give the same pixels, bit for bit, from the same uint8 image. **JPEG decoders
differ**: TensorFlow and Pillow may decode the same file to different uint8 images, which nothing here corrects.

For models of another image size, h x w, the crop is h x w, and the image is first resized to a target 8/7 as large: 8h/7 and
8w/7 are rounded for the official preprocessings, and rounded down for timm's, as their codes do (a description has its own
fraction in place of 7/8). "Shorter side" then means:
scale so that both sides cover the target.
"""

__all__ = ["PREPROCESSINGS", "ImageError", "Preprocessing", "load_image", "prepare", "preprocessing_name", "preprocessing_of"]

import contextlib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np

from convert import CheckpointError, MixerConfig
from convert.config import Size
from convert.preprocessing import NAMED_BY_TIMM, Described, canonical, parsed

if TYPE_CHECKING:
    from PIL.Image import Image

Source = Any  # str | os.PathLike | IO[bytes] | PIL.Image.Image | an array


class ImageError(ValueError):
    """An image that cannot be read or used. The message says why."""


@dataclass(frozen=True)
class Preprocessing:
    """`pixels(image, size)` resizes and crops a uint8 image to values of 0 to 255; `scaled` makes a float32 input of these."""

    pixels: Callable[[np.ndarray, Size], np.ndarray]
    scaled: Callable[[np.ndarray], np.ndarray]

    @property
    def limits(self) -> tuple[float, float]:
        """The least and the greatest value of a model's input."""
        ends = self.scaled(np.array([[0], [255]], np.uint8))
        return float(ends.min()), float(ends.max())


def prepare(
    images: Source | Sequence[Source], model: Any, preprocessing: str | None = None, *, use_exif: bool = True
) -> np.ndarray:
    """One image as a model's float32 input (h, w, c), or a list of images as a batch (b, h, w, c).

    `model` is a Flax or PyTorch model, or a MixerConfig. `preprocessing`, a name or a description, overrides the model's
    own; a MixerConfig has none. The PyTorch model takes `torch.from_numpy(batch).permute(0, 3, 1, 2)`. Images and `use_exif`
    are those of `load_image`. Raises ImageError, naming the image in a list, and ValueError without a known preprocessing.
    """
    chosen = preprocessing_of(preprocessing_name(model, preprocessing))
    config = model if isinstance(model, MixerConfig) else model.config

    def prepared(image: Source) -> np.ndarray:
        pixels = load_image(image, channels=config.in_channels, use_exif=use_exif)
        return chosen.scaled(chosen.pixels(pixels, config.image_size))

    if not isinstance(images, list | tuple):
        return prepared(images)
    batch = np.empty((len(images), *config.image_size, config.in_channels), np.float32)
    for i, image in enumerate(images):
        try:
            batch[i] = prepared(image)
        except ImageError as error:
            where = f"image {i}, {os.fsdecode(image)}" if isinstance(image, str | os.PathLike) else f"image {i}"
            raise ImageError(f"{where}: {error}") from None
    return batch


def load_image(source: Source, *, channels: int = 3, use_exif: bool = True) -> np.ndarray:
    """Anything Pillow opens (a path, a file, a PIL image) or a uint8 array -> (h, w, channels) uint8, RGB or grey.

    Arrays are (h, w), (h, w, 1), (h, w, 3) or (h, w, 4). `use_exif` rotates an image by its EXIF orientation, which the
    official decoders ignore. Transparent images are drawn on white; the official decoders drop the alpha channel. Of 16-bit
    images the upper 8 bits are used, as by TensorFlow's PNG decoder, and of an animation the first frame. Colour profiles are
    ignored.
    """
    if channels not in (1, 3):
        raise ImageError(f"a model with {channels} input channels takes no photographs: give it arrays (b, h, w, {channels})")
    if hasattr(source, "__array__") and hasattr(source, "dtype"):
        source = _checked(np.asarray(source))
        if source.shape[2] == channels:
            return source
    pixels = np.asarray(_image(source, "RGB" if channels == 3 else "L", use_exif=use_exif))
    return pixels.reshape(*pixels.shape[:2], channels)


def require_pillow() -> None:
    """Raise ImportError, with what to install, if Pillow is missing."""
    try:
        import PIL  # noqa: F401
    except ModuleNotFoundError:
        raise ImportError("reading images needs Pillow: pip install 'mixer-jax[images]'") from None


def preprocessing_name(model: Any, name: str | None) -> str:
    """The name or description given, or else the model's own. Raises ValueError for neither, or for one it cannot use."""
    config = getattr(model, "config", model)
    if not isinstance(config, MixerConfig):
        raise TypeError(f"a model is needed, such as mixer_jax.load(file) returns, not a {type(model).__name__}")
    name = getattr(model, "preprocessing", None) if name is None else name
    if name is None:
        names = ", ".join(PREPROCESSINGS)
        raise ValueError(f"this {type(model).__name__} has no preprocessing of its own: give preprocessing=, one of {names}")
    preprocessing_of(name, config.in_channels)
    return canonical(name)


def preprocessing_of(text: str, channels: int | None = None) -> Preprocessing:
    """That of a name or a description. Raises ValueError if it is none, or its mean and std are for other channels."""
    how = parsed(canonical(text))
    if isinstance(how, str):
        return PREPROCESSINGS[how]
    if channels is not None and how.channels not in (None, channels):
        raise CheckpointError(
            f"preprocessing {how}: mean and std are of {how.channels} channels, and the model takes {channels}"
        )
    return Preprocessing(partial(_timm, how=how), partial(_normalised, how=how))


def resmall_crop(image: np.ndarray, size: Size) -> np.ndarray:
    sides = np.array(image.shape[:2], np.float32)
    height, width = np.rint(sides * np.max(np.array(_larger(size), np.float32) / sides)).astype(int).tolist()
    return _truncated(_area(image, (height, width), _centre((height, width), size)))


def resize_crop(image: np.ndarray, size: Size) -> np.ndarray:
    larger = _larger(size)
    return _truncated(_bilinear(image, larger, _centre(larger, size)))


def squash(image: np.ndarray, size: Size) -> np.ndarray:
    if image.shape[:2] == size:
        return image.astype(np.float32)  # as it would be, bit for bit
    return _bilinear(image, size, _centre(size, size))


Crop = tuple[slice, slice]
ROWS = 64  # summed at a time, so that they stay in the cache


def _area(image: np.ndarray, size: Size, crop: Crop) -> np.ndarray:
    """The crop of an image resized to `size` by area means: summed along x, then along y, then scaled, in float32."""
    (ys, y_weights, y_scale), (xs, x_weights, x_scale) = (
        _area_terms(old, new, part) for old, new, part in zip(image.shape, size, crop)
    )
    channels, top = image.shape[2], int(ys.min())
    rows = image[top : ys.max() + 1]
    across = np.zeros((len(rows), xs.shape[1] * channels), np.float32)
    for start in range(0, len(rows), ROWS):
        block, total = rows[start : start + ROWS], across[start : start + ROWS]
        for x, weight in zip(xs, x_weights):
            total += block.take(x, axis=1).reshape(total.shape) * np.repeat(weight, channels)
    down = np.zeros((ys.shape[1], across.shape[1]), np.float32)
    for y, weight in zip(ys, y_weights):
        down += across[y - top] * weight[:, None]
    down *= np.float32(1 / float(y_scale * x_scale))
    return down.reshape(ys.shape[1], xs.shape[1], channels)


def _area_terms(old: int, new: int, part: slice) -> tuple[np.ndarray, np.ndarray, np.float32]:
    """(terms, new pixels): the old pixels that each new one covers and their weights, and the scale.

    Pixels that cover fewer than the others are padded with weights of 0, which change no sum.
    """
    scale = np.float32(old) / np.float32(new)
    out = np.arange(new)[part]
    low, high = out.astype(np.float32) * scale, (out + 1).astype(np.float32) * scale
    start, end = np.floor(low).astype(int), np.ceil(high).astype(int)
    pixel = start + np.arange((end - start).max())[:, None]
    left, right = pixel.astype(np.float32), (pixel + 1).astype(np.float32)
    inside = np.where(right > high, high - left, np.float32(1))
    weight = np.where(left < low, np.where(right > high, scale, right - low), inside)
    weight[pixel >= end] = 0
    return pixel.clip(0, old - 1), weight, scale


def _bilinear(image: np.ndarray, size: Size, crop: Crop) -> np.ndarray:
    """The crop of an image resized to `size`, interpolated between four neighbours in float32."""
    (top, bottom, y_weight), (left, right, x_weight) = (
        _bilinear_terms(old, new, part.start, part.stop) for old, new, part in zip(image.shape, size, crop)
    )

    def across(rows: np.ndarray) -> np.ndarray:
        near, far = (rows.take(x, axis=1).astype(np.float32) for x in (left, right))
        return near + (far - near) * x_weight[:, None]

    upper, lower = across(image[top]), across(image[bottom])
    return upper + (lower - upper) * y_weight[:, None, None]


@lru_cache(maxsize=512)  # of small images, half of the time
def _bilinear_terms(old: int, new: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each new pixel the old ones on both sides of its centre, and the weight of the second."""
    half = np.float32(0.5)
    at = (np.arange(start, stop).astype(np.float32) + half) * (np.float32(old) / np.float32(new)) - half
    below = np.floor(at)
    return below.astype(int).clip(0), np.ceil(at).astype(int).clip(0, old - 1), at - below


def _timm(image: np.ndarray, size: Size, how: Described) -> np.ndarray:
    from PIL import Image

    h, w = image.shape[:2]
    target_h, target_w = (math.floor(side / how.crop_pct) for side in size)
    if how.crop_mode == "squash":
        height, width = target_h, target_w
    elif how.crop_mode == "center" and target_h == target_w:
        height, width = (target_h * length // min(h, w) for length in (h, w))
    else:
        shrink = (max if how.crop_mode == "border" else min)(h / target_h, w / target_w)
        height, width = round(h / shrink), round(w / shrink)
    if not 0 < height * width <= (Image.MAX_IMAGE_PIXELS or np.inf):
        raise ImageError(f"{w}x{h} pixels would become {width}x{height} before they are cropped: crop it first")
    resized = _pil_image(image).resize((width, height), Image.Resampling[how.interpolation.upper()])
    pixels = np.asarray(resized).reshape(height, width, -1)
    if how.crop_mode == "border":
        pixels = _padded(pixels, size, [round(255 * value) for value in how.mean])
    top, left = (round((old - new) / 2) for old, new in zip(pixels.shape, size))
    return pixels[top : top + size[0], left : left + size[1]].copy()


def _padded(pixels: np.ndarray, size: Size, colour: Sequence[int]) -> np.ndarray:
    """At least of `size`, with the image in the middle."""
    h, w, channels = pixels.shape
    canvas = np.full((max(h, size[0]), max(w, size[1]), channels), np.clip(colour, 0, 255), np.uint8)
    top, left = ((new - old) // 2 for new, old in zip(canvas.shape, (h, w)))
    canvas[top : top + h, left : left + w] = pixels
    return canvas


def _between(low: float, pixels: np.ndarray) -> np.ndarray:
    """Pixels of 0 to 255 as values from `low` to 1."""
    return pixels / np.float32(255 / (1 - low)) + np.float32(low)


def _normalised(pixels: np.ndarray, how: Described) -> np.ndarray:
    return (pixels / np.float32(255) - np.array(how.mean, np.float32)) / np.array(how.std, np.float32)


PREPROCESSINGS = {
    "resmall_crop": Preprocessing(resmall_crop, partial(_between, -1)),
    "resize_crop": Preprocessing(resize_crop, partial(_between, -1)),
    "squash": Preprocessing(squash, partial(_between, -1)),
    "timm_bicubic": Preprocessing(partial(_timm, how=NAMED_BY_TIMM["timm_bicubic"]), partial(_between, -1)),
    "timm_bilinear": Preprocessing(partial(_timm, how=NAMED_BY_TIMM["timm_bilinear"]), partial(_between, 0)),
}


def _larger(size: Size) -> Size:
    return round(size[0] * 8 / 7), round(size[1] * 8 / 7)


def _centre(size: Size, crop: Size) -> Crop:
    top, left = (size[0] - crop[0]) // 2, (size[1] - crop[1]) // 2
    return slice(top, top + crop[0]), slice(left, left + crop[1])


def _truncated(pixels: np.ndarray) -> np.ndarray:
    """Floats as uint8 without rounding: TensorFlow's cast."""
    return pixels.clip(0, 255).astype(np.uint8)


def _checked(array: np.ndarray) -> np.ndarray:
    """As (h, w, channels) uint8, or ImageError."""
    wrong = f"an image array must be uint8 (h, w, 3) or (h, w), not {array.dtype.name} {array.shape}"
    if array.ndim == 4:
        raise ImageError(f"{wrong}: give one image, images[i], or a list of them")
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or 0 in array.shape or array.shape[2] not in (1, 3, 4):
        first = array.ndim == 3 and array.shape[0] in (1, 3, 4) and 0 not in array.shape
        raise ImageError(f"{wrong}" + (": the channels come last, use image.transpose(1, 2, 0)" if first else ""))
    if array.dtype.kind == "f" or array.dtype.name == "bfloat16":
        raise ImageError(
            f"{wrong}: floats have no fixed range; for 0 to 1 use (255 * image).round().astype('uint8'); "
            "give an array that is already in the model's range to the model itself"
        )
    if array.dtype == np.uint16:
        raise ImageError(f"{wrong}: for 16 bits use (image >> 8).astype('uint8')")
    if array.dtype != np.uint8:
        raise ImageError(f"{wrong}: if its values are from 0 to 255 use image.astype('uint8')")
    return array


def _image(source: Source, mode: str, *, use_exif: bool) -> "Image":
    """A PIL image in a mode. Every failure is an ImageError."""
    require_pillow()
    from PIL import Image, ImageOps, UnidentifiedImageError

    if isinstance(source, np.ndarray):
        return _converted(_pil_image(source), mode)
    with contextlib.ExitStack() as stack:
        try:
            image = source if isinstance(source, Image.Image) else stack.enter_context(Image.open(source))
            image.load()
            if use_exif:
                with contextlib.suppress(Exception):  # damaged EXIF is ignored
                    image = ImageOps.exif_transpose(image)
            return _converted(image, mode)
        except ImageError:
            raise
        except FileNotFoundError:
            raise ImageError("no such file") from None
        except UnidentifiedImageError:
            empty = isinstance(source, str | os.PathLike) and os.path.getsize(source) == 0
            raise ImageError("the file is empty" if empty else "no image in a format that Pillow knows") from None
        except Exception as error:  # decoders of damaged files raise nearly anything
            raise ImageError(f"cannot be read: {str(error) or type(error).__name__}") from None


def _pil_image(array: np.ndarray) -> "Image":
    from PIL import Image

    return Image.fromarray(array.squeeze(2) if array.shape[2] == 1 else array)


def _converted(image: "Image", mode: str) -> "Image":
    from PIL import Image

    if image.mode in ("I", "F"):
        raise ImageError(f"32-bit pixels (mode {image.mode}) have no fixed range: save it with 8 or 16 bits")
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert(mode)
