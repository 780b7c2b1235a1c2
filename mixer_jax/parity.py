"""Whether two sets of logits are the same, in figures."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Agreement:
    """How far two sets of logits are apart: the largest and the root-mean-square difference, the largest magnitude of
    either, and the share of images with the same first class."""

    largest: float
    rms: float
    scale: float
    same_class: float


def agreement(a: np.ndarray, b: np.ndarray) -> Agreement:
    """Compare logits (b, classes). Raises ValueError where equality would prove nothing: NaN, or logits without spread.

    A model with a fresh head gives zeros whatever its other weights are, so two of them always agree.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape or a.ndim != 2 or a.shape[1] < 2:
        raise ValueError(f"logits must be (b, classes), two classes or more, on both sides: found {a.shape} and {b.shape}")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("there are NaN or infinite logits: parity says nothing of them")
    scale = float(max(np.abs(a).max(), np.abs(b).max()))
    if min(a.std(axis=1).max(), b.std(axis=1).max()) <= 1e-6 * scale:
        raise ValueError("the logits of an image are all alike, as after a fresh head: any two models would agree")
    difference = a - b
    return Agreement(
        largest=float(np.abs(difference).max()),
        rms=float(np.sqrt((difference**2).mean())),
        scale=scale,
        same_class=float((a.argmax(axis=1) == b.argmax(axis=1)).mean()),
    )
