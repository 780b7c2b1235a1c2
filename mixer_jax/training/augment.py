"""How training images vary: the random crop and flip of the official fine-tuning, RandAugment, mixup."""

__all__ = ["OFFICIAL", "Augmentation", "mixed", "random_crop"]

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from convert.config import Size

from ..preprocess import squash

if TYPE_CHECKING:
    from PIL.Image import Image

ATTEMPTS = 100
RATIOS = 0.75, 1.33  # width to height
OPERATIONS = (
    *("autocontrast", "equalize", "invert", "rotate", "posterize", "solarize", "Color", "Contrast", "Brightness"),
    *("Sharpness", "shear_x", "shear_y", "translate_x", "translate_y", "cutout", "solarize_add"),
)
GREY = 128  # fills what an operation of RandAugment leaves empty


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """How an image varies each time that it is drawn. The defaults are those of the official fine-tuning.

    `min_area` is the smallest area of a random crop as a fraction of the image's, None for no crop; the crop is resized to the
    model's size without keeping its shape. `flip` mirrors half of the images. `randaugment` is the magnitude, 0 to 30, of
    `operations` random operations (the Mixer paper pre-trains with 15), None for none. `mixup` is alpha of mixup, 0 for none.
    """

    min_area: float | None = 0.05
    flip: bool = True
    randaugment: float | None = None
    operations: int = 2
    mixup: float = 0.0

    def __post_init__(self) -> None:
        rules = {
            "min_area must be None or above 0 and at most 1": self.min_area is None or 0 < self.min_area <= 1,
            "randaugment must be None or from 0 to 30": self.randaugment is None or 0 <= self.randaugment <= 30,
            "operations must be a whole number of at least 1": isinstance(self.operations, int) and self.operations >= 1,
            "mixup must be at least 0": 0 <= self.mixup < math.inf,
        }
        faults = [f"{rule}, not {getattr(self, rule.split()[0])!r}" for rule, holds in rules.items() if not holds]
        if faults:
            raise ValueError("Augmentation: " + "; ".join(faults))

    def varied(self, image: np.ndarray, size: Size, rng: np.random.Generator) -> np.ndarray:
        """A uint8 image (h, w, c) as a random variant of `size`: float32, 0 to 255."""
        if self.min_area is not None:
            image = image[random_crop(image.shape[0], image.shape[1], rng, min_area=self.min_area)]
        pixels = squash(image, size)
        if self.flip and rng.random() > 0.5:
            pixels = pixels[:, ::-1]
        if self.randaugment is not None:
            pixels = _randaugment(pixels, self.randaugment / 10, self.operations, rng)
        return pixels


OFFICIAL = Augmentation()


def random_crop(height: int, width: int, rng: np.random.Generator, *, min_area: float = 0.05) -> tuple[slice, slice]:
    """Rows and columns of a random part of an image, distributed as by `tf.image.sample_distorted_bounding_box`.

    The ratio of its sides is uniform, and then its height among those whose area is from `min_area` to all of the image. The
    last row and column to start at are never used, as there. After 100 failures it is the whole image.
    """
    smallest = float(np.float32(min_area) * width * height)  # as there, where an area can equal it
    for _ in range(ATTEMPTS):
        ratio = rng.uniform(*RATIOS)
        tallest = round(math.sqrt(width * height / ratio))
        if round(tallest * ratio) > width:
            tallest = int((width + 0.5 - 1e-7) / ratio)
            tallest -= round(tallest * ratio) > width
        tallest = min(tallest, height)
        h = min(round(math.sqrt(smallest / ratio)), tallest)
        h += int(rng.integers(tallest - h + 1))
        h += h * round(h * ratio) < smallest
        h -= h * round(h * ratio) > width * height
        w = round(h * ratio)
        if h * w >= max(smallest, 1) and h <= height and w <= width:
            top, left = int(rng.integers(max(height - h, 1))), int(rng.integers(max(width - w, 1)))
            return slice(top, top + h), slice(left, left + w)
    return slice(0, height), slice(0, width)


def mixed(images: np.ndarray, labels: np.ndarray, alpha: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Images (b, h, w, c) and labels (b, classes), each mixed with those of the reversed batch in one proportion (mixup)."""
    share = np.float32(rng.beta(alpha, alpha))
    images, labels = (share * part + (1 - share) * part[::-1] for part in (images, labels))
    return images, labels


def _randaugment(pixels: np.ndarray, level: float, operations: int, rng: np.random.Generator) -> np.ndarray:
    """Random operations on an image of 0 to 255, truncated to uint8, one after the other; magnitude 10 is level 1.

    Operations and magnitudes are those of the pre-training code (big_vision), computed by Pillow. There shifts and cut-outs are
    in pixels of a 224 x 224 image; here they are the same part of any image.
    """
    from PIL import Image

    image = Image.fromarray(pixels.squeeze(2).astype(np.uint8) if pixels.shape[2] == 1 else pixels.astype(np.uint8))
    for _ in range(operations):
        name, sign = OPERATIONS[rng.integers(len(OPERATIONS))], -1 if rng.random() < 0.5 else 1
        image = _operation(image, name, level, sign, rng)
    return np.asarray(image, np.float32).reshape(pixels.shape)


def _operation(image: "Image", name: str, level: float, sign: int, rng: np.random.Generator) -> "Image":
    from PIL import ImageEnhance, ImageOps
    from PIL.Image import Transform

    grey: Any = (GREY,) * len(image.getbands())
    width, height = image.size
    matrices = {
        "shear_x": (1, sign * 0.3 * level, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, sign * 0.3 * level, 1, 0),
        "translate_x": (1, 0, sign * level * width * 100 / 224, 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, sign * level * height * 100 / 224),
    }
    match name:
        case "autocontrast" | "equalize" | "invert":
            return getattr(ImageOps, name)(image)
        case "Color" | "Contrast" | "Brightness" | "Sharpness":
            return getattr(ImageEnhance, name)(image).enhance(0.1 + 1.8 * level)
        case "rotate":
            return image.rotate(sign * 30 * level, fillcolor=grey)
        case "posterize":
            return ImageOps.posterize(image, min(max(int(4 * level), 1), 8))
        case "solarize":
            return ImageOps.solarize(image, int(256 * level))
        case "solarize_add":
            added = int(110 * level)
            return image.point([min(i + added, 255) if i < GREY else i for i in range(256)] * len(grey))
        case "cutout":
            x, y = int(rng.integers(width)), int(rng.integers(height))
            across, down = int(level * width * 40 / 224), int(level * height * 40 / 224)
            image.paste(grey, (max(x - across, 0), max(y - down, 0), x + across, y + down))
            return image
    return image.transform(image.size, Transform.AFFINE, matrices[name], fillcolor=grey)
