"""Which weights these are: a fingerprint that no layout or format changes, and how two checkpoints differ."""

__all__ = ["ArrayDifference", "differences", "fingerprint", "same_sizes"]

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .arrays import Arrays, as_bytes, contiguous, same_bytes
from .config import MixerConfig
from .layouts import Layout
from .mapping import to_canonical
from .published import PUBLISHED


def fingerprint(arrays: Arrays, layout: Layout) -> str:
    """64 hexadecimal digits that identify weights in any layout: SHA-256 over the names and digests of canonical arrays.

    Reads every array once.
    """
    text = ""
    for name, array in sorted(to_canonical(arrays, layout).items()):
        values = np.asarray(array)
        text += f"{name} {values.dtype.name} {values.shape} {hashlib.sha256(as_bytes(contiguous(values))).hexdigest()}\n"
    return hashlib.sha256(text.encode()).hexdigest()


def same_sizes(config: MixerConfig) -> list[str]:
    """The published files of these sizes. Their content is not known here, so none can be confirmed."""
    sizes = (config.variant, config.num_classes)
    return [name for name, file in PUBLISHED.items() if (file.variant, file.classes) == sizes]


@dataclass(frozen=True)
class ArrayDifference:
    """A canonical array that differs between two checkpoints; `max_abs` is None unless both have it in the same shape."""

    name: str
    what: str
    max_abs: float | None = None


def differences(left: Arrays, right: Arrays) -> Iterator[ArrayDifference]:
    """Every array that is not bit-equal in two sets of canonical arrays, with the largest difference of its values."""
    for name in sorted(left.keys() | right.keys()):
        if name not in left or name not in right:
            yield ArrayDifference(name, "only in the " + ("second" if name not in left else "first"))
        elif left[name].shape != right[name].shape:
            yield ArrayDifference(name, f"shape {left[name].shape} against {right[name].shape}")
        elif not same_bytes(left[name], right[name]):
            x, y = (np.asarray(arrays[name]).astype(np.float64) for arrays in (left, right))
            with np.errstate(invalid="ignore"):
                max_abs = float(np.abs(x - y).max())
            dtypes = left[name].dtype, right[name].dtype
            yield ArrayDifference(name, "values" if dtypes[0] == dtypes[1] else f"{dtypes[0]} against {dtypes[1]}", max_abs)
