"""Why two implementations differ: what each choice between them does to the logits, measured with the NumPy model alone."""

__all__ = ["Cause", "Explanation", "explain"]

from dataclasses import dataclass

import numpy as np

from convert import MixerConfig

from .comparison import Comparison
from .implementations import Implementation
from .numpy_model import Arithmetic, forward
from .rounding import Rounded, Rounding
from .tolerance import SIMULATION, Deviation, Simulation

NUMERICS = (("GELU", "gelu", ("tanh", "exact")), ("LayerNorm epsilon", "layer_norm_epsilon", (1e-6, 1e-5)))


@dataclass(frozen=True)
class Cause:
    """One choice that can move logits: what `a` and `b` chose, and the effect on the logits.

    `effect` is that choice's part of the gap where the two differ, and what switching it would do where they agree.
    `fraction` is the effect projected on the gap, 1 where it is all of it; None for choices that only change the
    rounding: their direction is random, and the tolerance covers them.
    """

    name: str
    a: str
    b: str
    effect: Deviation
    fraction: float | None

    @property
    def differs(self) -> bool:
        return self.a != self.b


@dataclass(frozen=True)
class Explanation:
    """The gap between two sets of logits, its causes, and what is left of it without the effects of those that differ."""

    gap: Deviation
    causes: list[Cause]
    unexplained: Deviation
    tolerance: Deviation

    @property
    def fraction(self) -> float:
        """The fraction of the tolerance for rounding that the unexplained rest uses."""
        return self.unexplained.fraction_of(self.tolerance)

    @property
    def passed(self) -> bool:
        return self.fraction <= 1


def explain(comparison: Comparison, simulation: Simulation = SIMULATION) -> Explanation:
    """How much of a comparison's gap each choice makes.

    All is computed from the weights of `a`: where those of `b` differ, what they do stays unexplained.
    """
    (checkpoint, checkpoint_b), (images, images_b) = comparison.checkpoints, comparison.images
    weights, gap = checkpoint.to("google").as_numpy(), comparison.outputs[0] - comparison.outputs[1]

    def logits(config: MixerConfig, images: np.ndarray = images, arithmetic: Arithmetic = Arithmetic()) -> np.ndarray:  # noqa: B008
        def hook(name: str, array: np.ndarray) -> np.ndarray:
            simulation.progress(1)
            return array

        return forward(config, weights, images, hook=hook, arithmetic=arithmetic)

    config, config_b = checkpoint.config, checkpoint_b.config
    base = logits(config)
    scale = float(np.abs(base).max())
    causes: list[Cause] = []

    def add(name: str, a: object, b: object, effect: np.ndarray, *, only_rounds: bool = False) -> None:
        projection = float((effect * gap).sum() / (gap * gap).sum()) if gap.any() else 0.0
        causes.append(Cause(name, str(a), str(b), Deviation.of(effect, scale), None if only_rounds else projection))

    # From what `a` computes to what `b` does, one choice after the other, so that the effects add up to the gap.
    reached, reached_config, explained = base, config, np.zeros_like(gap)
    for name, field, values in NUMERICS:
        a, b = getattr(config, field), getattr(config_b, field)
        if a != b:
            reached_config = reached_config.replace(**{field: b})
            before, reached = reached, logits(reached_config)
            effect = before - reached
            explained += effect
        else:
            effect = base - logits(config.replace(**{field: next(value for value in values if value != a)}))
        add(name, a, b, effect)
    if not np.array_equal(images, images_b):
        effect = reached - logits(reached_config, images_b)
        explained += effect
        add("preprocessing", checkpoint.metadata.preprocessing, checkpoint_b.metadata.preprocessing, effect)

    a, b = ("unknown" if each.path else "two-pass" for each in (comparison.a, comparison.b))
    add("variance", a, b, base - logits(config, arithmetic=_FastVariance()), only_rounds=True)
    for name, rounding in (("TF32", Rounding(unit="tf32")), ("bfloat16", Rounding("bfloat16"))):
        effect = base - logits(config, arithmetic=Rounded(rounding, np.random.default_rng(0)))
        a, b = (_uses(name.lower(), implementation) for implementation in (comparison.a, comparison.b))
        add(name, a, b, effect, only_rounds=True)
    unexplained = Deviation.of(gap - explained, scale)
    return Explanation(Deviation.of(gap, scale), causes, unexplained, comparison.logits_tolerance)


def _uses(kind: str, implementation: Implementation) -> str:
    """Whether matmuls or results are in TF32 or bfloat16."""
    units = [name for rounding in implementation.roundings for name in (rounding.dtype, rounding.unit)]
    return "yes" if kind in units else "no"


class _FastVariance(Arithmetic):
    """Variance as E[x²] - E[x]² in float32, as Flax Linen has it by default; everything else as in the NumPy model."""

    def layer_norm(self, x: np.ndarray, scale: np.ndarray, bias: np.ndarray, epsilon: float) -> np.ndarray:
        x32 = x.astype(np.float32)
        mean = x32.mean(axis=-1, keepdims=True)
        variance = np.maximum((x32 * x32).mean(axis=-1, keepdims=True) - mean * mean, 0)
        return (x - mean) / np.sqrt(variance.astype(np.float64) + epsilon) * scale + bias
