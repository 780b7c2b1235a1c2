"""Image -> array, as the evaluations behind the published figures do it, without TensorFlow.

| name | what it does to the pixels | behind |
| --- | --- | --- |
| `resmall_crop` | shorter side to 256 by area, cut to uint8, centre crop 224 | the published accuracies (big_vision) |
| `resize_crop` | both sides to 256, bilinear, cut to uint8, centre crop 224 | the paper's other evaluation |
| `squash` | both sides to 224, bilinear, left in float32 | the official fine-tuning code |
| `timm_bicubic` | shorter side to 256, bicubic with antialias, centre crop 224 | timm's `goog` files |
| `timm_bilinear` | the same, bilinear | timm's `miil` files |

The last takes values from 0 to 1 (`x / 255`), all others from -1 to 1 (`x / 127.5 - 1`). The first three round as
TensorFlow's kernels do, in float32 and in their order of operations, and give the same pixels, bit for bit, from the same
uint8 image. **JPEG decoders differ**: the same file decoded by TensorFlow and by Pillow need not give the same uint8 image,
and nothing here covers that.

For images of another size, h x w, the crop is h x w and what it is cut from is 8/7 as large: each of 8h/7 and 8w/7 rounded
for the official recipes, rounded down for timm's, whose codes do so. On a rectangle "shorter side" means the side that
leaves nothing of that uncovered.
"""

__all__ = ["RECIPES", "ImageError", "Recipe", "picture", "prepare"]

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from convert import MixerConfig
from convert.config import Size

if TYPE_CHECKING:
    from PIL.Image import Image, Resampling

Source = Any  # str | os.PathLike | IO[bytes] | PIL.Image.Image | an array


class ImageError(ValueError):
    """An image that cannot be read or taken. The message says why."""


@dataclass(frozen=True)
class Recipe:
    """`pixels` makes (h, w, c) of 0 to 255 from a uint8 image and a size; then 0 becomes `low`, and 255 becomes 1."""

    pixels: Callable[[np.ndarray, Size], np.ndarray]
    low: float = -1.0

    def scaled(self, pixels: np.ndarray) -> np.ndarray:
        """Pixels of 0 to 255 as the float32 that a model takes."""
        return pixels / np.float32(255 / (1 - self.low)) + np.float32(self.low)


def prepare(
    images: Source | Sequence[Source],
    model: Any,
    preprocessing: str | None = None,
    *,
    upright: bool = True,
) -> np.ndarray:
    """Images as a model takes them, float32: (h, w, c) of one image, (b, h, w, c) of a list of them.

    `model` is a Flax or PyTorch model, whose `config` and `preprocessing` say how, or a MixerConfig, which does not know
    the latter; `preprocessing`, a name of RECIPES, goes before the model's own. The axes are the Flax model's; the PyTorch
    one takes `torch.from_numpy(batch).permute(0, 3, 1, 2)`. An image and `upright` are as in `picture`.

    Raises ImageError, naming the image of a list, where one cannot be read or is no uint8; ValueError where nothing says
    how, or the name is unknown.
    """
    config = model if isinstance(model, MixerConfig) else getattr(model, "config", None)
    if not isinstance(config, MixerConfig):
        raise TypeError(f"prepare(images, model): a model or a MixerConfig is wanted, not {type(model).__name__}")
    name = preprocessing if preprocessing is not None else getattr(model, "preprocessing", None)
    if name is None:
        names = ", ".join(RECIPES)
        raise ValueError(
            f"this {type(model).__name__} does not say how an image becomes its input: say preprocessing=, of {names}"
        )
    recipe = recipe_named(name)

    def prepared(image: Source) -> np.ndarray:
        return recipe.scaled(recipe.pixels(picture(image, channels=config.in_channels, upright=upright), config.image_size))

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


def picture(source: Source, *, channels: int = 3, upright: bool = True) -> np.ndarray:
    """Anything Pillow opens (a path, a file, a PIL image) or a uint8 array -> (h, w, channels) uint8, RGB or grey.

    Arrays are (h, w), (h, w, 1), (h, w, 3) or (h, w, 4). With `upright` an image is turned as its EXIF orientation says;
    the official decoders ignore that. What is transparent lies on white, as most pages show it; the official decoders
    drop the alpha channel and show whatever colour lies under it. Of 16 bits the upper 8 are taken, as TensorFlow's PNG
    decoder does. Colour profiles are ignored, and of an animation the first frame is taken.
    """
    if channels not in (1, 3):
        raise ImageError(f"models of {channels} channels take no photographs: give the model arrays (b, h, w, {channels})")
    if _is_array(source):
        source = _checked(np.asarray(source))
        if source.shape[2] == channels:
            return source
    pixels = np.asarray(_image(source, "RGB" if channels == 3 else "L", upright=upright))
    return pixels.reshape(*pixels.shape[:2], channels)


def require_pillow() -> None:
    """Raise ImportError, saying what to install, where Pillow is missing."""
    try:
        import PIL  # noqa: F401
    except ModuleNotFoundError:
        raise ImportError("reading images needs Pillow: pip install 'mixer-jax[images]'") from None


def recipe_named(name: str) -> Recipe:
    if name not in RECIPES:
        raise ValueError(f"{name!r} is no preprocessing: one of {', '.join(RECIPES)}")
    return RECIPES[name]


def resmall_crop(image: np.ndarray, size: Size) -> np.ndarray:
    larger = (round(size[0] * 8 / 7), round(size[1] * 8 / 7))
    sides = np.array(image.shape[:2], np.float32)
    height, width = np.rint(sides * np.max(np.array(larger, np.float32) / sides)).astype(int).tolist()
    return _cut(_area(image, (height, width), _centre((height, width), size)))


def resize_crop(image: np.ndarray, size: Size) -> np.ndarray:
    larger = (round(size[0] * 8 / 7), round(size[1] * 8 / 7))
    return _cut(_bilinear(image, larger, _centre(larger, size)))


def squash(image: np.ndarray, size: Size) -> np.ndarray:
    return _bilinear(image, size, _centre(size, size))


def timm_bicubic(image: np.ndarray, size: Size) -> np.ndarray:
    from PIL import Image

    return _timm(image, size, Image.Resampling.BICUBIC)


def timm_bilinear(image: np.ndarray, size: Size) -> np.ndarray:
    from PIL import Image

    return _timm(image, size, Image.Resampling.BILINEAR)


RECIPES = {
    "resmall_crop": Recipe(resmall_crop),
    "resize_crop": Recipe(resize_crop),
    "squash": Recipe(squash),
    "timm_bicubic": Recipe(timm_bicubic),
    "timm_bilinear": Recipe(timm_bilinear, low=0.0),
}

Crop = tuple[slice, slice]
ROWS = 64  # so many are summed at a time, so that they stay in the cache


def _area(image: np.ndarray, size: Size, crop: Crop) -> np.ndarray:
    """The crop of an image resized to `size`, each pixel a mean of what it covers: along x, then y, then scaled, in float32."""
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
    """(terms, new pixels): which old pixels each covers and how much of each, and the scale.

    A pixel that covers fewer has weights of 0, which change no sum.
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
    """The crop of an image resized to `size`, each pixel between its four neighbours, in float32."""
    (top, bottom, y_share), (left, right, x_share) = (
        _bilinear_terms(old, new, part) for old, new, part in zip(image.shape, size, crop)
    )

    def across(rows: np.ndarray) -> np.ndarray:
        near, far = (rows.take(x, axis=1).astype(np.float32) for x in (left, right))
        return near + (far - near) * x_share[:, None]

    upper, lower = across(image[top]), across(image[bottom])
    return upper + (lower - upper) * y_share[:, None, None]


def _bilinear_terms(old: int, new: int, part: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each new pixel the old ones on both sides of its centre, and how far it is towards the second."""
    half = np.float32(0.5)
    at = (np.arange(new)[part].astype(np.float32) + half) * (np.float32(old) / np.float32(new)) - half
    below = np.floor(at)
    return below.astype(int).clip(0), np.ceil(at).astype(int).clip(0, old - 1), at - below


def _timm(image: np.ndarray, size: Size, filter: "Resampling") -> np.ndarray:
    from PIL import Image

    (h, w), (larger_h, larger_w) = image.shape[:2], (size[0] * 8 // 7, size[1] * 8 // 7)
    if larger_h != larger_w:
        shrink = min(h / larger_h, w / larger_w)
        height, width = round(h / shrink), round(w / shrink)
    else:
        height, width = (larger_h * side // min(h, w) for side in (h, w))
    if height * width > (Image.MAX_IMAGE_PIXELS or np.inf):
        raise ImageError(f"{w}x{h} pixels would become {width}x{height} before they are cropped: crop it first")
    resized = Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image).resize((width, height), filter)
    top, left = round((height - size[0]) / 2), round((width - size[1]) / 2)
    cropped = np.asarray(resized.crop((left, top, left + size[1], top + size[0])))
    return cropped.reshape(*size, image.shape[2])


def _centre(size: Size, crop: Size) -> Crop:
    top, left = (size[0] - crop[0]) // 2, (size[1] - crop[1]) // 2
    return slice(top, top + crop[0]), slice(left, left + crop[1])


def _cut(pixels: np.ndarray) -> np.ndarray:
    """Floats as uint8, not rounded: TensorFlow's cast."""
    return pixels.clip(0, 255).astype(np.uint8)


def _is_array(source: Source) -> bool:
    return hasattr(source, "__array__") and hasattr(source, "dtype")


def _checked(array: np.ndarray) -> np.ndarray:
    """As (h, w, channels) uint8, or ImageError."""
    found = f"an image array must be uint8 (h, w, 3) or (h, w), not {array.dtype.name} {array.shape}"
    if array.ndim == 4:
        raise ImageError(f"{found}: give one image at a time, images[i]")
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or 0 in array.shape or array.shape[2] not in (1, 3, 4):
        first = array.ndim == 3 and array.shape[0] in (1, 3, 4) and 0 not in array.shape
        raise ImageError(f"{found}" + (": the channels come last, use image.transpose(1, 2, 0)" if first else ""))
    if array.dtype.kind == "f" or array.dtype.name == "bfloat16":
        raise ImageError(
            f"{found}: floats have no range of their own; for 0 to 1 use (255 * image).round().astype('uint8'), "
            "and what is in the model's range already goes to the model as it is"
        )
    if array.dtype == np.uint16:
        raise ImageError(f"{found}: for 16 bits use (image >> 8).astype('uint8')")
    if array.dtype != np.uint8:
        raise ImageError(f"{found}: if its values are from 0 to 255 use image.astype('uint8')")
    return array


def _image(source: Source, mode: str, *, upright: bool) -> "Image":
    """A PIL image in a mode. Whatever goes wrong on the way is an ImageError that says what."""
    require_pillow()
    from PIL import Image, ImageOps, UnidentifiedImageError

    if isinstance(source, np.ndarray):
        return _converted(Image.fromarray(source.squeeze(2) if source.shape[2] == 1 else source), mode)
    with contextlib.ExitStack() as stack:
        try:
            image = source if isinstance(source, Image.Image) else stack.enter_context(Image.open(source))
            image.load()
            if upright:
                with contextlib.suppress(Exception):  # damaged EXIF says nothing
                    image = ImageOps.exif_transpose(image)
            return _converted(image, mode)
        except ImageError:
            raise
        except FileNotFoundError:
            raise ImageError("no such file") from None
        except UnidentifiedImageError:
            raise ImageError("the file is empty" if _is_empty(source) else "no image in a format that Pillow knows") from None
        except Exception as error:  # decoders of damaged files raise nearly anything
            raise ImageError(f"cannot be read: {str(error) or type(error).__name__}") from None


def _is_empty(source: str | os.PathLike[str] | IO[bytes]) -> bool:
    return isinstance(source, (str, os.PathLike)) and os.path.getsize(source) == 0


def _converted(image: "Image", mode: str) -> "Image":
    from PIL import Image

    if image.mode in ("I", "F"):
        raise ImageError(f"pixels of 32 bits (mode {image.mode}) have no range of their own: save it with 8 or 16 bits")
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert(mode)
