"""Whether two implementations compute the same from a checkpoint: by how much they differ, and where that starts.

    comparison = compare(convert.read("Mixer-B_16.npz"), images, Implementation("flax"), Implementation("torch"))
    comparison.passed, comparison.first, comparison.logits

Each implementation runs as its users run it, for the logits, and once more under its hook. The NumPy model then computes every
operation from the implementation's own input to it, which gives the error of that operation alone.
"""

__all__ = ["Agreement", "Comparison", "InconclusiveError", "Operation", "agreement", "compare", "noise", "num_passes"]

import itertools
import math
from collections import defaultdict
from dataclasses import asdict, dataclass, field

import numpy as np

from convert import Checkpoint, MixerConfig

from . import numpy_model
from .implementations import Implementation, Run
from .tolerance import SIMULATION, Deviation, Simulation, Tolerance, Weights, deviation
from .tolerance import tolerance as tolerance_of

Recorded = dict[str, np.ndarray]
NONE = Deviation(0.0, 0.0, 0.0)


class InconclusiveError(ValueError):
    """Logits that are equal, or not, for a reason that has nothing to do with the implementations."""


@dataclass(frozen=True)
class Agreement(Deviation):
    """How far two sets of logits (b, classes) are apart; `scale` is the largest magnitude of either.

    The fraction of images with the same first class, and with the same five first classes in any order; and the mean
    Kullback-Leibler divergence of the softmax, in nats, of the second from the first.
    """

    same_class: float
    same_five: float
    divergence: float


def agreement(a: np.ndarray, b: np.ndarray) -> Agreement:
    """Compare logits. Raises InconclusiveError where equality would prove nothing: NaN, or logits without spread.

    A model with a fresh head gives zeros whatever its other weights are, so two of them always agree.
    """
    from scipy.special import log_softmax

    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape or a.ndim != 2 or a.shape[1] < 2:
        raise InconclusiveError(f"logits must have one shape (b, classes), with two or more classes: {a.shape} and {b.shape}")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise InconclusiveError("there are NaN or infinite logits, which cannot be compared")
    scale = float(max(np.abs(a).max(), np.abs(b).max()))
    if min(a.std(axis=1).max(), b.std(axis=1).max()) <= 1e-6 * scale:
        raise InconclusiveError("all logits of an image are equal, as with a fresh head: any two models would agree")
    top_a, top_b = (np.sort(np.argsort(-logits, axis=1)[:, :5], axis=1) for logits in (a, b))
    p, q = log_softmax(a, axis=1), log_softmax(b, axis=1)
    return Agreement(
        **asdict(Deviation.of(a - b, scale)),
        same_class=float((a.argmax(axis=1) == b.argmax(axis=1)).mean()),
        same_five=float((top_a == top_b).all(axis=1).mean()),
        divergence=max(0.0, float((np.exp(p) * (p - q)).sum(axis=1).mean())),  # below 0 by rounding alone
    )


def noise(config: MixerConfig, count: int, seed: int) -> np.ndarray:
    """Images of uniform noise in [-1, 1], (count, h, w, channels)."""
    shape = (count, *config.image_size, config.in_channels)
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


@dataclass(frozen=True)
class Operation:
    """One operation, and the errors and tolerances of a pair of implementations.

    `accumulated` is how far the two differ after it; `per_operation` is what each gets wrong in it, given its own input. Both
    are relative to max abs of what the NumPy model computes. `fraction` is that of the per-operation tolerance that each uses.
    """

    name: str
    accumulated: float
    accumulated_tolerance: float
    per_operation: tuple[float, float]
    per_operation_tolerance: tuple[float, float]
    fraction: tuple[float, float]

    @property
    def title(self) -> str:
        """ "blocks/3/token_mixing/gelu" as "block 3, token_mixing, gelu"."""
        return self.name.replace("blocks/", "block ").replace("/", ", ")


@dataclass(frozen=True)
class FirstFault:
    """The first operation outside its tolerance, and the implementation that has it."""

    implementation: Implementation
    operation: Operation
    error: float
    tolerance: float

    def __str__(self) -> str:
        return f"{self.operation.title}, in {self.implementation}: error {self.error:.1e}, tolerance {self.tolerance:.1e}"


@dataclass(frozen=True)
class Comparison:
    """How two implementations differ: what each computed from, `outputs` of it, and the errors beside their tolerances."""

    a: Implementation
    b: Implementation
    logits: Agreement
    logits_tolerance: Deviation
    operations: list[Operation]
    checkpoints: tuple[Checkpoint, Checkpoint] = field(repr=False)
    images: tuple[np.ndarray, np.ndarray] = field(repr=False)
    outputs: tuple[np.ndarray, np.ndarray] = field(repr=False)

    @property
    def fraction(self) -> float:
        """The fraction of the logits' tolerance that they use."""
        return max(self.logits.max_abs / self.logits_tolerance.max_abs, self.logits.rms / self.logits_tolerance.rms)

    @property
    def first(self) -> FirstFault | None:
        for operation in self.operations:
            for i, implementation in enumerate((self.a, self.b)):
                if operation.fraction[i] > 1:
                    error, tolerance = operation.per_operation[i], operation.per_operation_tolerance[i]
                    return FirstFault(implementation, operation, error, tolerance)
        return None

    @property
    def passed(self) -> bool:
        """The logits are within their tolerance, and every operation of both implementations is within its own."""
        return self.fraction <= 1 and self.first is None


def compare(
    checkpoint: Checkpoint,
    images: np.ndarray,
    a: Implementation,
    b: Implementation,
    *,
    other: Checkpoint | None = None,
    other_images: np.ndarray | None = None,
    simulation: Simulation = SIMULATION,
    runs: tuple[Run | None, Run | None] = (None, None),
    tolerance: Tolerance | None = None,
) -> Comparison:
    """Run two implementations on images (n, h, w, channels), as the checkpoint takes them.

    `b` computes from `other` and `other_images`, where they are given; `checkpoint` and `images` are what is right. `runs`
    replaces what is run; `tolerance` is theirs, where that is known already. One whose hook sees nothing is compared by its
    logits alone. Raises InconclusiveError where the logits prove nothing, and what `Implementation.open` raises.
    """
    config, weights, images = checkpoint.config, checkpoint.to("google").as_numpy(), np.asarray(images, np.float64)
    other, images_b = other or checkpoint, images if other_images is None else np.asarray(other_images, np.float64)
    run_a, run_b = runs[0] or a.open(checkpoint), runs[1] or b.open(other)
    outputs = run_a(images, None), run_b(images_b, None)
    logits = agreement(*outputs)
    recorded = _record(run_a, images, simulation), _record(run_b, images_b, simulation)
    if tolerance is None:
        tolerance = tolerance_of(config, weights, images, a.roundings, b.roundings, simulation)
    named = tolerance.accumulated
    if all(recorded):
        errors = [_operation_errors(config, weights, images, results, simulation) for results in recorded]
    else:  # an exported program that names no operations: its output is all that there is
        named = dict([list(named.items())[-1]])
        recorded = dict.fromkeys(named, outputs[0]), dict.fromkeys(named, outputs[1])
        errors = 2 * [dict.fromkeys(named, NONE)]
    operations = []
    for name, limit in named.items():
        error_a, error_b = errors[0][name], errors[1][name]
        limit_a, limit_b = (limits[name] for limits in tolerance.per_operation)
        difference = deviation(recorded[0][name], recorded[1][name]).max_abs
        operation = Operation(
            name,
            accumulated=difference / limit.scale if limit.scale else difference,
            accumulated_tolerance=limit.relative,
            per_operation=(error_a.relative, error_b.relative),
            per_operation_tolerance=(limit_a.relative, limit_b.relative),
            fraction=(error_a.fraction_of(limit_a), error_b.fraction_of(limit_b)),
        )
        operations.append(operation)
    logits_tolerance = list(named.values())[-1]
    return Comparison(a, b, logits, logits_tolerance, operations, (checkpoint, other), (images, images_b), outputs)


def num_passes(a: Implementation, b: Implementation, draws: int) -> int:
    """How many forward passes `compare` reports to a simulation's `progress`, operation by operation."""
    pairs = itertools.product(a.roundings, b.roundings)
    return 4 + sum(1 + draws * (1 if x.simulated == y.simulated else 2) for x, y in pairs)


def _record(run: Run, images: np.ndarray, simulation: Simulation) -> Recorded:
    """The result of every operation of an implementation; no values for one that it does not have."""
    results: Recorded = defaultdict(lambda: np.zeros(0))

    def hook(name: str, array: np.ndarray) -> np.ndarray:
        results[name] = array
        simulation.progress(1)
        return array

    run(images, hook)
    return results


def _operation_errors(
    config: MixerConfig, weights: Weights, images: np.ndarray, recorded: Recorded, simulation: Simulation
) -> dict[str, Deviation]:
    """The error of every operation alone: its recorded result beside what the NumPy model computes from the recorded input."""
    errors: dict[str, Deviation] = {}

    def hook(name: str, right: np.ndarray) -> np.ndarray:
        errors[name] = deviation(recorded[name], right)
        simulation.progress(1)
        return recorded[name] if math.isfinite(errors[name].max_abs) else right

    numpy_model.forward(config, weights, images, hook=hook)
    return errors
