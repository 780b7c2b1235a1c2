"""Which weights these are: a fingerprint that no layout or format changes, and how two checkpoints differ."""

__all__ = ["ArrayDifference", "differences", "fingerprint", "same_sizes", "sha256_of"]

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .arrays import Arrays, as_bytes, contiguous, same_bytes
from .config import MixerConfig
from .layouts import Layout
from .mapping import to_canonical
from .published import of_sizes


def fingerprint(arrays: Arrays, layout: Layout) -> str:
    """64 hexadecimal digits that identify weights in any layout: SHA-256 over the names and digests of canonical arrays.

    Reads every array once.
    """
    text = ""
    for name, array in sorted(to_canonical(arrays, layout).items()):
        values = np.asarray(array)
        text += f"{name} {values.dtype.name} {values.shape} {hashlib.sha256(as_bytes(contiguous(values))).hexdigest()}\n"
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_of(path: Path) -> str:
    """64 hexadecimal digits that identify a file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def same_sizes(config: MixerConfig) -> list[str]:
    """The published files of these sizes, without copies of others."""
    return [file.name for file in of_sizes(config.sizes) if not file.copy_of]


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
