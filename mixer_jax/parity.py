"""Whether two implementations compute the same from a checkpoint: by how much they differ, where that starts, and why.

    report = compare(convert.read("Mixer-B_16.npz"), images, Side("flax"), Side("torch"))
    report.passed, report.first, report.logits

Each side runs as its users run it, for the logits, and once more under its tap. The referee then goes through the recorded
operations with the side's own input to each of them, which gives every operation's own error; budgets are from
`mixer_jax.precision`, that is from the referee alone.
"""

__all__ = ["Agreement", "Report", "agreement", "compare"]

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from convert import Checkpoint, MixerConfig

from . import precision, referee
from .precision import Budget, Difference, Precision, difference
from .sides import Run, Side

Recorded = dict[str, np.ndarray]


@dataclass(frozen=True)
class Agreement:
    """How far two sets of logits (b, classes) are apart.

    The largest and the root-mean-square difference, the largest magnitude of either, the share of images with the same
    first class and with the same five first classes in any order, and the mean Kullback-Leibler divergence of the softmax, in
    nats, of the second from the first.
    """

    largest: float
    rms: float
    scale: float
    same_class: float
    same_five: float
    divergence: float


def agreement(a: np.ndarray, b: np.ndarray) -> Agreement:
    """Compare logits. Raises ValueError where equality would prove nothing: NaN, or logits without spread.

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
    apart, fives = a - b, [np.sort(np.argsort(-side, axis=1)[:, :5], axis=1) for side in (a, b)]
    p, q = _log_softmax(a), _log_softmax(b)
    return Agreement(
        largest=float(np.abs(apart).max()),
        rms=float(np.sqrt((apart**2).mean())),
        scale=scale,
        same_class=float((a.argmax(axis=1) == b.argmax(axis=1)).mean()),
        same_five=float((fives[0] == fives[1]).all(axis=1).mean()),
        divergence=float((np.exp(p) * (p - q)).sum(axis=1).mean()),
    )


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


@dataclass(frozen=True)
class Operation:
    """One operation: how far the sides have come apart up to it, and what each adds to its own input, with the budgets.

    Differences are relative to the largest magnitude of what the referee computes; `share` is what the side uses of its budget.
    """

    name: str
    growth: float
    growth_budget: float
    local: tuple[float, float]
    local_budget: tuple[float, float]
    share: tuple[float, float]


@dataclass(frozen=True)
class Finding:
    """The first operation outside its budget."""

    side: Side
    operation: str
    error: float
    budget: float

    def __str__(self) -> str:
        return f"{where(self.operation)}, in {self.side}: {self.error:.1e}, budget {self.budget:.1e}"


@dataclass(frozen=True)
class Report:
    """What `compare` found. `shares` are those of the logits' budget: plainly run, and under the tap."""

    a: Side
    b: Side
    logits: Agreement
    logits_budget: Difference
    share: float
    operations: list[Operation]
    first: Finding | None
    outputs: tuple[np.ndarray, np.ndarray] = field(repr=False)

    @property
    def passed(self) -> bool:
        """The logits are within their budget, and every operation of both sides is within its own."""
        return self.share <= 1 and self.first is None


def compare(
    checkpoint: Checkpoint,
    images: np.ndarray,
    a: Side,
    b: Side,
    *,
    other: Checkpoint | None = None,
    other_images: np.ndarray | None = None,
    draws: int = precision.DRAWS,
    seed: int = 0,
    runs: tuple[Run | None, Run | None] = (None, None),
    budget: Budget | None = None,
) -> Report:
    """Run two sides on images (n, h, w, channels), as the checkpoint takes them, and say where they part and by how much.

    `other` and `other_images` are the second side's, where they are not the same: right is what `checkpoint` says of `images`.
    `runs` replaces what a side runs; `budget` is what `allowed` says of the same, where that is known already. Raises
    ValueError where logits prove nothing, and what `Side.open` raises.
    """
    config = checkpoint.config
    weights = {name: np.asarray(array) for name, array in checkpoint.to("google").arrays.items()}
    sides, images = (a, b), np.asarray(images, np.float64)
    inputs = (images, images if other_images is None else np.asarray(other_images, np.float64))
    opened = [
        run or side.open(source) for run, side, source in zip(runs, sides, (checkpoint, other or checkpoint), strict=True)
    ]
    outputs = [run(seen, None) for run, seen in zip(opened, inputs)]
    found = agreement(*outputs)
    recorded = [_recorded(run, seen) for run, seen in zip(opened, inputs)]
    budget = budget or allowed(config, weights, images, a, b, draws=draws, seed=seed)
    local = [_local(config, weights, images, each) for each in recorded]

    last = next(reversed(budget.growth))
    operations = []
    for name, grown in budget.growth.items():
        apart = difference(*(each.get(name, np.zeros(0)) for each in recorded))
        errors, budgets = [each.get(name) for each in local], [each[name] for each in budget.local]
        operations.append(
            Operation(
                name,
                growth=apart.largest / grown.scale if grown.scale else apart.largest,
                growth_budget=grown.relative,
                local=_pair(0.0 if error is None else error.relative for error in errors),
                local_budget=_pair(each.relative for each in budgets),
                share=_pair(0.0 if error is None else error.over(each) for error, each in zip(errors, budgets)),
            )
        )
    first = next(
        (
            Finding(side, op.name, op.local[i], op.local_budget[i])
            for op in operations
            for i, side in enumerate(sides)
            if op.share[i] > 1
        ),
        None,
    )
    limit = budget.growth[last]
    share = max(found.largest / limit.largest, found.rms / limit.rms)
    return Report(a, b, found, limit, share, operations, first, (outputs[0], outputs[1]))


def allowed(
    config: MixerConfig,
    weights: Mapping[str, np.ndarray],
    images: np.ndarray,
    a: Side,
    b: Side,
    *,
    draws: int = precision.DRAWS,
    seed: int = 0,
) -> Budget:
    """The budget of two sides; the larger, operation by operation, where a device may round in several ways."""
    ways: list[tuple[Precision, Precision]] = list(itertools.product(a.precisions, b.precisions))
    budgets = [precision.budget(config, weights, images, *way, draws=draws, seed=seed) for way in ways]
    return Budget(
        _larger([each.growth for each in budgets]),
        (_larger([each.local[0] for each in budgets]), _larger([each.local[1] for each in budgets])),
    )


def _larger(budgets: list[dict[str, Difference]]) -> dict[str, Difference]:
    return {
        name: Difference(*(max(getattr(each[name], entry) for each in budgets) for entry in ("largest", "rms", "scale")))
        for name in budgets[0]
    }


def where(operation: str) -> str:
    """ "blocks/3/token_mixing/gelu" as "block 3, token_mixing, gelu"."""
    return operation.replace("blocks/", "block ").replace("/", ", ")


def _pair(values: Iterable[float]) -> tuple[float, float]:
    first, second = values
    return first, second


def _recorded(run: Run, images: np.ndarray) -> Recorded:
    """What every operation of a side gives."""
    seen: Recorded = {}

    def tap(name: str, array: np.ndarray) -> np.ndarray:
        seen[name] = array
        return array

    run(images, tap)
    return seen


def _local(
    config: MixerConfig, weights: Mapping[str, np.ndarray], images: np.ndarray, recorded: Recorded
) -> dict[str, Difference]:
    """Every operation's own error: what the referee makes of the side's input to it, beside what the side made."""
    errors: dict[str, Difference] = {}

    def tap(name: str, right: np.ndarray) -> np.ndarray:
        found = recorded.get(name, np.zeros(0))
        errors[name] = difference(found, right)
        return found if math.isfinite(errors[name].largest) else right

    referee.forward(config, weights, images, tap=tap)
    return errors
