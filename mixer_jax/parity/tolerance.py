"""How far two implementations may lie apart: tolerances from simulated rounding, computed from the NumPy model alone.

This is Monte Carlo arithmetic (Parker 1997): the NumPy model runs on, but every result is rounded up or down at random to the
digits that the implementation has, a matmul's operands are rounded as its unit rounds them, and a sum of many terms errs as
one that is rounded after every term. Two correct implementations may differ by as much as two such runs do. No output of an
implementation under test enters.
"""

__all__ = ["Deviation", "Simulation", "Tolerance", "deviation", "simulated_logits", "tolerance"]

import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, field

import numpy as np

from convert import MixerConfig

from . import numpy_model
from .rounding import Kernels, Rounded, Rounding, slices

MARGIN = 2.0  # of a tolerance over the largest draw: what the order of additions inside a unit may add
PER_OPERATION_MARGIN = 3.0  # there are hundreds of operations
Weights = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Simulation:
    """How many runs are simulated, and from which seed; `progress` is called after each operation with how many runs did it."""

    draws: int = 8
    seed: int = 0
    progress: Callable[[int], object] = lambda runs: None


SIMULATION = Simulation()


@dataclass(frozen=True)
class Deviation:
    """The largest and the root-mean-square difference of two arrays, and the largest magnitude of the one that is right."""

    max_abs: float
    rms: float
    scale: float

    @staticmethod
    def of(difference: np.ndarray, scale: float) -> "Deviation":
        return Deviation(float(np.abs(difference).max(initial=0)), float(np.sqrt(np.square(difference).mean())), scale)

    @property
    def relative(self) -> float:
        """The largest difference relative to max abs."""
        return self.max_abs / self.scale if self.scale else self.max_abs

    def fraction_of(self, tolerance: "Deviation") -> float:
        """The fraction of a tolerance that this uses, relative to the scale of each; more than 1 is too much."""
        pairs = (self.max_abs, tolerance.max_abs), (self.rms, tolerance.rms)
        return max(_ratio(error / (self.scale or 1), limit / (tolerance.scale or 1)) for error, limit in pairs)


def _ratio(error: float, limit: float) -> float:
    return 0.0 if error == 0 else error / limit if limit else np.inf


def deviation(values: np.ndarray, right: np.ndarray) -> Deviation:
    """Infinite where shapes differ or a value is not finite."""
    scale = float(np.abs(right).max(initial=0))
    if values.shape != right.shape or not np.isfinite(values).all():
        return Deviation(np.inf, np.inf, scale)
    return Deviation.of(np.subtract(values, right, dtype=np.float64), scale)


@dataclass
class Tolerance:
    """What two implementations may differ by after each operation, and what each may err by in the operation alone."""

    accumulated: dict[str, Deviation] = field(default_factory=dict)
    per_operation: tuple[dict[str, Deviation], dict[str, Deviation]] = field(default_factory=lambda: ({}, {}))


def tolerance(
    config: MixerConfig,
    weights: Weights,
    images: np.ndarray,
    a: Sequence[Rounding],
    b: Sequence[Rounding],
    simulation: Simulation = SIMULATION,
) -> Tolerance:
    """Of two implementations on these weights (google's names) and images (n, h, w, channels).

    Where an implementation may round in one of several ways, the largest, operation by operation.
    """

    def largest(limits: list[dict[str, Deviation]]) -> dict[str, Deviation]:
        return {name: Deviation(*np.max([astuple(limit[name]) for limit in limits], axis=0).tolist()) for name in limits[0]}

    tolerances = [_tolerance(config, weights, images, x, y, simulation) for x, y in itertools.product(a, b)]
    of_a, of_b = (largest([tolerance.per_operation[i] for tolerance in tolerances]) for i in (0, 1))
    return Tolerance(largest([tolerance.accumulated for tolerance in tolerances]), (of_a, of_b))


def _tolerance(
    config: MixerConfig, weights: Weights, images: np.ndarray, a: Rounding, b: Rounding, simulation: Simulation
) -> Tolerance:
    same, draws = a.simulated == b.simulated, simulation.draws
    runs = _runs(a, range(draws), simulation.seed)
    runs += [] if same else _runs(b, range(draws, 2 * draws), simulation.seed)
    neighbours = [(i, (i - 1) % draws) for i in range(draws)]
    # Runs that serve both implementations are compared with each other, each with the one before.
    pairs = neighbours if same else [(i, draws + i) for i in range(draws)]
    result, in_float64 = Tolerance(), Rounding("float64").error_scale

    def hook(name: str, array: np.ndarray) -> np.ndarray:
        exact, *values = np.split(array, 1 + len(runs))
        scale = float(max(exact.max(), -exact.min()))
        max_abs, rms = _largest([(values[i], values[j]) for i, j in pairs], (a.error_scale, b.error_scale), threads, exact)
        result.accumulated[name] = Deviation(MARGIN * max_abs, MARGIN * rms, scale)
        for limits, rounding, own in zip(result.per_operation, (a, b), (runs[:draws], runs[-draws:])):
            errors = [(own[i].error, own[j].error) for i, j in neighbours]
            max_abs, rms = _largest(errors, (rounding.error_scale, in_float64), threads)
            limits[name] = Deviation(PER_OPERATION_MARGIN * max_abs, PER_OPERATION_MARGIN * rms, scale)
        simulation.progress(1 + len(runs))
        return array

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        _run_together(config, weights, images, runs, hook, threads)
    return result


def _largest(
    pairs: Sequence[tuple[np.ndarray, np.ndarray]],
    scales: tuple[float, float],
    threads: ThreadPoolExecutor,
    *exact: np.ndarray,
) -> tuple[float, float]:
    """The largest difference, and root mean square, of any pair of errors times `scales`; with `exact`, of values less it."""

    def figures(pair: tuple[np.ndarray, np.ndarray]) -> tuple[float, float]:
        max_abs = squares = 0.0
        for x, y, *right in slices(*pair, *exact):
            x, y = (x - right[0], y - right[0]) if right else (x, y)
            difference = x * scales[0] - y * scales[1]
            max_abs = max(max_abs, float(difference.max()), -float(difference.min()))
            squares += float(np.einsum("i,i->", difference, difference))
        return max_abs, float(np.sqrt(squares / pair[0].size))

    max_abs, rms = np.max(list(threads.map(figures, pairs)), axis=0).tolist()
    return max_abs, rms


def simulated_logits(
    config: MixerConfig, weights: Weights, images: np.ndarray, rounding: Rounding, simulation: Simulation
) -> tuple[np.ndarray, np.ndarray]:
    """The NumPy model's logits (n, classes), and those of simulated runs (draws, n, classes)."""

    def hook(name: str, array: np.ndarray) -> np.ndarray:
        simulation.progress(1 + simulation.draws)
        return array

    runs = _runs(rounding, range(simulation.draws), simulation.seed)
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        exact, *simulated = np.split(_run_together(config, weights, images, runs, hook, threads), 1 + simulation.draws)
    return exact, np.stack(simulated)


def _runs(rounding: Rounding, numbers: range, seed: int) -> list[Rounded]:
    kernels = Kernels()
    return [Rounded(rounding, np.random.default_rng((seed, number)), kernels) for number in numbers]


def _run_together(
    config: MixerConfig,
    weights: Weights,
    images: np.ndarray,
    runs: Sequence[Rounded],
    hook: numpy_model.Hook,
    threads: ThreadPoolExecutor,
) -> np.ndarray:
    """The NumPy model on the images, then each of the runs on the same, in one batch."""
    batch = np.tile(np.asarray(images, np.float64), (1 + len(runs), 1, 1, 1))
    together = _Together([numpy_model.Arithmetic(), *runs], threads)
    return numpy_model.forward(config, weights, batch, hook=hook, arithmetic=together)


class _Together(numpy_model.Arithmetic):
    """Several arithmetics at once, each on an equal part of the batch, in threads."""

    def __init__(self, arithmetics: Sequence[numpy_model.Arithmetic], threads: ThreadPoolExecutor):
        self._arithmetics, self._threads = arithmetics, threads

    def matmul(self, x: np.ndarray, kernel: np.ndarray, bias: np.ndarray, exact: np.ndarray | None = None) -> np.ndarray:
        if exact is None:  # one matmul for all, outside the threads: it uses all cores, and several at once would wait
            exact = (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], -1)
        return self._map(lambda a, x, exact: a.matmul(x, kernel, bias, exact), x, exact)

    def head(self, x: np.ndarray, kernel: np.ndarray, bias: np.ndarray) -> np.ndarray:
        return self._map(lambda a, x: a.head(x, kernel, bias), x)

    def layer_norm(self, x: np.ndarray, scale: np.ndarray, bias: np.ndarray, epsilon: float) -> np.ndarray:
        return self._map(lambda a, x: a.layer_norm(x, scale, bias, epsilon), x)

    def gelu(self, x: np.ndarray, form: str) -> np.ndarray:
        return self._map(lambda a, x: a.gelu(x, form), x)

    def add(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return self._map(lambda a, x, y: a.add(x, y), x, y)

    def mean(self, x: np.ndarray) -> np.ndarray:
        return self._map(lambda a, x: a.mean(x), x)

    def _map(self, operation: Callable[..., np.ndarray], *inputs: np.ndarray) -> np.ndarray:
        parts = [np.split(x, len(self._arithmetics)) for x in inputs]
        return np.concatenate(list(self._threads.map(operation, self._arithmetics, *parts)))
