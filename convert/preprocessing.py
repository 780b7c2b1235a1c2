"""The names of preprocessings, and the text that describes any of timm's: how an image becomes an array, without its pixels.

A described one is `timm:bicubic,center=0.9,mean=0.485/0.456/0.406,std=0.229/0.224/0.225`: timm's interpolation, its crop mode
with the crop's fraction of the resized image, and mean and standard deviation of values from 0 to 1, one for all channels or
one for each. A description that means the same as a name is that name.
"""

__all__ = ["PREPROCESSING_NAMES", "Described", "canonical", "parsed"]

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from .errors import CheckpointError

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
CROP_MODES = ("center", "squash", "border")
EXAMPLE = "timm:bicubic,center=0.9,mean=0.485/0.456/0.406,std=0.229/0.224/0.225"
FORM = re.compile(r"timm:(\w+),(\w+)=([^,]+),mean=([^,]+),std=([^,]+)")


def _number(value: float) -> str:
    return repr(float(value)).removesuffix(".0")


def _text(values: Sequence[float]) -> str:
    return "/".join(map(_number, values))


@dataclass(frozen=True)
class Described:
    """What timm's evaluation does to an image.

    The image is resized with `interpolation` to the model's size divided by `crop_pct` and rounded down, then cropped in the
    middle. `crop_mode` "center" scales until both sides cover that size, "border" until both fit in it, filling up with the
    mean colour, and "squash" scales each side by itself. Then values are divided by 255, less `mean`, divided by `std`.
    Construction checks all of it (CheckpointError).
    """

    interpolation: str
    crop_mode: str
    crop_pct: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            values = getattr(self, name)
            object.__setattr__(self, name, values[:1] if len(set(values)) == 1 else values)
        faults = {
            f"interpolation {self.interpolation!r} is none of {', '.join(INTERPOLATIONS)}": self.interpolation
            in INTERPOLATIONS,
            f"crop mode {self.crop_mode!r} is none of {', '.join(CROP_MODES)}": self.crop_mode in CROP_MODES,
            f"crop {self.crop_pct:g} is not from 0.1 to 1": 0.1 <= self.crop_pct <= 1,
            f"mean {_text(self.mean)} is not of finite numbers": bool(self.mean) and all(map(math.isfinite, self.mean)),
            f"std {_text(self.std)} is not of numbers above 0.001": bool(self.std)
            and all(1e-3 < s < math.inf for s in self.std),
            f"mean is of {len(self.mean)} channels, std of {len(self.std)}": len({len(self.mean), len(self.std)} - {1}) < 2,
        }
        if wrong := [fault for fault, right in faults.items() if not right]:
            raise CheckpointError("; ".join(wrong))

    @property
    def channels(self) -> int | None:
        """How many channels an image must have; None for any number."""
        count = max(len(self.mean), len(self.std))
        return None if count == 1 else count

    def __str__(self) -> str:
        crop = f"{self.crop_mode}={_number(self.crop_pct)}"
        return f"timm:{self.interpolation},{crop},mean={_text(self.mean)},std={_text(self.std)}"


NAMED_BY_TIMM = {  # names of what can be described as well
    "timm_bicubic": Described("bicubic", "center", 0.875, (0.5,), (0.5,)),
    "timm_bilinear": Described("bilinear", "center", 0.875, (0.0,), (1.0,)),
}
PREPROCESSING_NAMES = ("resmall_crop", "resize_crop", "squash", *NAMED_BY_TIMM)


def unknown_preprocessing(source: str, why: str | None = None) -> CheckpointError:
    """The error for weights, or a program, of unknown preprocessing; `why` is more than that the file names none."""
    names = ", ".join(PREPROCESSING_NAMES)
    return CheckpointError(f"{source}: {why or 'names no preprocessing'}: choose one with --preprocess, of {names}")


def canonical(text: str) -> str:
    """The one text of a preprocessing: a name, or a description in its fixed form. Raises CheckpointError for anything else."""
    preprocessing = parsed(text)
    if isinstance(preprocessing, str):
        return preprocessing
    return next((name for name, named in NAMED_BY_TIMM.items() if named == preprocessing), str(preprocessing))


def parsed(text: str) -> "str | Described":
    """A name as it is, or what a description says. Raises CheckpointError for anything else."""
    if text in PREPROCESSING_NAMES:
        return text
    known = f"one of {', '.join(PREPROCESSING_NAMES)}, or a description such as {EXAMPLE}"
    form = FORM.fullmatch(re.sub(r"\s", "", text))
    if form is None:
        raise CheckpointError(f"no preprocessing {text!r}: {known}")
    interpolation, mode, *numbers = form.groups()
    try:
        crop, mean, std = (tuple(map(float, number.split("/"))) for number in numbers)
        (crop_pct,) = crop
    except ValueError:
        raise CheckpointError(f"no preprocessing {text!r}: one of its numbers is none; {known}") from None
    try:
        return Described(interpolation, mode, crop_pct, mean, std)
    except CheckpointError as error:
        raise CheckpointError(f"no preprocessing {text!r}: {error}") from None
