"""Why two sides differ, whether they are equal to the last bit, and what other devices are expected to give.

All of it is measured with the referee, by switching one choice at a time on the checkpoint and the images at hand.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from convert import Checkpoint

from . import precision, referee
from .parity import Report
from .precision import Difference, Precision, Rounded, difference

Weights = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Cause:
    """One choice that can move logits: what either side chose, and what the other choice does to the logits.

    `effect` is its part of the gap where the sides chose differently, and what switching it would do where they chose alike.
    `share` is the part of the gap that points its way, 1 where it is all of it; None for choices that only round, whose
    direction is chance: they are in the budget, not in the sum.
    """

    name: str
    a: str
    b: str
    effect: Difference
    share: float | None

    @property
    def differs(self) -> bool:
        return self.a != self.b


@dataclass(frozen=True)
class Explanation:
    """The gap between two sides' logits, its causes, and what is left of it when those that differ are taken away."""

    gap: Difference
    causes: list[Cause]
    unexplained: Difference
    budget: Difference

    @property
    def share(self) -> float:
        """What the unexplained remainder uses of the budget for rounding."""
        return self.unexplained.over(self.budget)

    @property
    def passed(self) -> bool:
        return self.share <= 1


def explain(
    report: Report,
    checkpoint: Checkpoint,
    images: np.ndarray,
    *,
    other: Checkpoint | None = None,
    other_images: np.ndarray | None = None,
) -> Explanation:
    """How much of a report's gap each choice makes. `other` and `other_images` are the second side's, where they differ.

    Weights are those of `checkpoint`: a second file with other weights leaves a remainder that no choice explains.
    """
    weights = _weights(checkpoint)
    start, end = checkpoint.config, (other or checkpoint).config
    other_images = images if other_images is None else other_images
    gap = report.outputs[0] - report.outputs[1]
    base = before = referee.forward(start, weights, images)
    scale = float(np.abs(base).max())

    def of(effect: np.ndarray) -> Difference:
        return Difference(float(np.abs(effect).max()), float(np.sqrt(np.square(effect).mean())), scale)

    causes, explained = [], np.zeros_like(gap)
    # From what the first side computes to what the second does, one choice after the other, so that effects add up.
    config = start
    for name, entry, alternatives in (
        ("GELU", "gelu", ("tanh", "exact")),
        ("LayerNorm epsilon", "layer_norm_epsilon", (1e-6, 1e-5)),
    ):
        mine, theirs = getattr(start, entry), getattr(end, entry)
        if mine != theirs:
            config = config.replace(**{entry: theirs})
            after = referee.forward(config, weights, images)
            effect, before = before - after, after
            explained += effect
        else:
            switched = start.replace(**{entry: next(value for value in alternatives if value != mine)})
            effect = base - referee.forward(switched, weights, images)
        causes.append(Cause(name, str(mine), str(theirs), of(effect), _share(effect, gap)))
    if not np.array_equal(images, other_images):
        effect = before - referee.forward(config, weights, other_images)
        explained += effect
        mine, theirs = (str(each.metadata.preprocessing) for each in (checkpoint, other or checkpoint))
        causes.append(Cause("preprocessing", mine, theirs, of(effect), _share(effect, gap)))

    a, b = report.a, report.b
    effect = base - referee.forward(start, weights, images, arithmetic=_FastVariance())
    causes.append(Cause("variance", "two passes", "two passes", of(effect), None))
    for name, switched_to, mine, theirs in (
        ("TF32", Precision(unit="tf32"), _tf32(a.precisions), _tf32(b.precisions)),
        ("bfloat16", Precision("bfloat16"), _bfloat16(a.precisions), _bfloat16(b.precisions)),
    ):
        effect = base - referee.forward(start, weights, images, arithmetic=Rounded(switched_to, np.random.default_rng(0)))
        causes.append(Cause(name, mine, theirs, of(effect), None))
    return Explanation(of(gap), causes, of(gap - explained), report.logits_budget)


def _share(effect: np.ndarray, gap: np.ndarray) -> float:
    return float((effect * gap).sum() / (gap * gap).sum()) if gap.any() else 0.0


def _tf32(ways: tuple[Precision, ...]) -> str:
    return "yes" if any(way.unit.startswith("tf32") for way in ways) else "no"


def _bfloat16(ways: tuple[Precision, ...]) -> str:
    return "yes" if any("bfloat16" in (way.dtype, way.unit) for way in ways) else "no"


class _FastVariance(referee.Arithmetic):
    """Variance as E[x²] - E[x]² in float32, as Flax Linen has it by default; all else as the referee has it."""

    def layer_norm(self, x: np.ndarray, scale: np.ndarray, bias: np.ndarray, epsilon: float) -> np.ndarray:
        single = x.astype(np.float32)
        mean = single.mean(axis=-1, keepdims=True)
        variance = np.maximum((single * single).mean(axis=-1, keepdims=True) - mean * mean, 0)
        return (x - mean) / np.sqrt(variance.astype(np.float64) + epsilon) * scale + bias


@dataclass(frozen=True)
class Exactness:
    """Two sides in float64 with their logits rounded to float32: how many are bit-equal, and those that are not.

    `straddling` has image, class and both float64 values of every pair that lies on two sides of a rounding boundary and no
    further apart than rounding in float64 may bring them; `apart` has those that do.
    """

    count: int
    straddling: list[tuple[int, int, float, float]]
    apart: list[tuple[int, int, float, float]]

    @property
    def passed(self) -> bool:
        return not self.apart


def exact(report: Report) -> Exactness:
    """Whether a float64 report's logits are one set of float32 numbers. Raises ValueError unless both sides are float64."""
    for side in (report.a, report.b):
        if side.dtype != "float64":
            raise ValueError(f"exactness is asked of sides in float64, not of {side}: say {side.name}:{side.device}:float64")
    a, b = report.outputs
    unequal = a.astype(np.float32).view(np.uint32) != b.astype(np.float32).view(np.uint32)
    within = np.abs(a - b) <= report.logits_budget.largest

    def listed(which: np.ndarray) -> list[tuple[int, int, float, float]]:
        return [(int(i), int(j), float(a[i, j]), float(b[i, j])) for i, j in np.argwhere(which)]

    return Exactness(a.size, listed(unequal & within), listed(unequal & ~within))


@dataclass(frozen=True)
class Prediction:
    """What a device is expected to give: the logits' largest and root-mean-square error beside the referee's, over images
    and draws, and the share of images whose first class stays."""

    devices: str
    setting: str
    logits: Difference
    same_class: float


# Who computes so, by which setting, and what that is.
_PREDICTED = (
    ("any, A100 and H100 included", 'float32, "highest" (on a CPU always)', Precision()),
    ("A100, H100", 'float32, "high" and "default"', Precision(unit="tf32")),
    ("the same, if operands are cut off", 'float32, "high" and "default"', Precision(unit="tf32_truncated")),
    ("TPU", 'float32, "highest": six bfloat16 passes', Precision(unit="bfloat16_6x")),
    ("TPU", 'float32, "high": three passes', Precision(unit="bfloat16_3x")),
    ("TPU", 'float32, "default": one pass', Precision(unit="bfloat16")),
    ("any", "bfloat16", Precision("bfloat16")),
)


def predictions(checkpoint: Checkpoint, images: np.ndarray, *, draws: int = precision.DRAWS, seed: int = 0) -> list[Prediction]:
    """What each kind of device is expected to give on these weights and images. Nothing is run on any of them."""
    config, weights = checkpoint.config, _weights(checkpoint)
    rows = []
    for devices, setting, how in _PREDICTED:
        right, found = precision.drawn(config, weights, images, how, draws=draws, seed=seed)
        each = [difference(logits, right) for logits in found]
        same = np.mean(found.argmax(axis=2) == right.argmax(axis=1))
        largest, rms = max(d.largest for d in each), float(np.sqrt(np.mean([d.rms**2 for d in each])))
        rows.append(Prediction(devices, setting, Difference(largest, rms, each[0].scale), float(same)))
    return rows


def _weights(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    return {name: np.asarray(array) for name, array in checkpoint.to("google").arrays.items()}
