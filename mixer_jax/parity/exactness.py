"""Whether two implementations in float64 give the same float32 logits, to the last bit."""

__all__ = ["Exactness", "exact"]

from dataclasses import dataclass

import numpy as np

from .comparison import Comparison

Pair = tuple[int, int, float, float]  # image, class, and the logit of either implementation


@dataclass(frozen=True)
class Exactness:
    """How many logits there are, and which of them are not equal once rounded to float32.

    `straddling` are those no further apart than rounding in float64 may bring them; `apart` are the others.
    """

    count: int
    straddling: list[Pair]
    apart: list[Pair]

    @property
    def passed(self) -> bool:
        return not self.apart


def exact(comparison: Comparison) -> Exactness:
    """Compare float64 logits as float32 numbers. Raises ValueError unless both implementations are in float64."""
    for i in (comparison.a, comparison.b):
        if i.dtype != "float64":
            raise ValueError(f"exactness is for implementations in float64, not {i}: use {i.name}:{i.device}:float64")
    a, b = comparison.outputs
    unequal = a.astype(np.float32).view(np.uint32) != b.astype(np.float32).view(np.uint32)
    within = np.abs(a - b) <= comparison.logits_tolerance.max_abs

    def pairs(mask: np.ndarray) -> list[Pair]:
        return [(int(i), int(j), float(a[i, j]), float(b[i, j])) for i, j in np.argwhere(mask)]

    return Exactness(a.size, pairs(unequal & within), pairs(unequal & ~within))
