"""That an exported program computes what the NumPy model does, at several batch sizes, inside the tolerance of parity."""

__all__ = ["BATCHES", "Proof", "prove"]

import math
from dataclasses import dataclass, replace

import numpy as np
from tqdm import tqdm

from convert import Checkpoint, CheckpointError

from ..parity.comparison import InconclusiveError, agreement, compare, noise
from ..parity.implementations import Implementation
from ..parity.numpy_model import Hook, forward
from ..parity.report import Table, figure, multiple
from ..parity.rounding import Rounding
from ..parity.tolerance import MARGIN, Deviation, Simulation, Tolerance, deviation, simulated_logits
from ..parity.tolerance import tolerance as tolerance_of
from .program import Program, wide

BATCHES = (1, 2, 7)
SEED = 0
ROUNDING_OF_NUMPY = (Rounding("float64"),)


@dataclass(frozen=True)
class Proof:
    """The error of a program's output and its tolerance, by batch size; and how many operations were checked by themselves."""

    output: str
    rows: dict[int, tuple[Deviation, Deviation]]
    operations: int = 0

    @property
    def table(self) -> Table:
        lines = [
            (str(batch), figure(error.max_abs), figure(limit.max_abs), figure(error.rms), figure(limit.rms))
            + (multiple(error.fraction_of(limit)),)
            for batch, (error, limit) in self.rows.items()
        ]
        note = f"{self.operations} operations are within their own tolerances" if self.operations else ""
        head = ("batch", "max abs", "tolerance", "rms", "tolerance", "fraction")
        return Table(f"{self.output} against those of the NumPy model in float64, on seeded noise", head, lines, note)


def prove(program: Program, checkpoint: Checkpoint) -> Proof:
    """Run a program of a checkpoint. Raises CheckpointError where it is outside the tolerance, and names the first operation
    that is, if the program names its operations.

    The tolerance is parity's, on as many images as give a thousand outputs: it hardly grows with more.
    """
    facts = program.facts
    checkpoint = checkpoint.without_head() if facts.options.features else checkpoint
    config, images = checkpoint.config, noise(checkpoint.config, max(BATCHES), SEED)
    inputs = images
    if facts.options.uint8:
        inputs = np.random.default_rng(SEED).integers(0, 256, images.shape, np.uint8)
        images = facts.scaled(inputs)
    weights = checkpoint.to("google").as_numpy()
    right = forward(config, weights, images)
    try:
        agreement(right, right)
    except InconclusiveError as why:
        raise CheckpointError(f"{checkpoint.source}: no export of it can be proved: {why}") from None
    few = min(len(images), math.ceil(1000 / right.shape[1]))
    draws, passes = Simulation.draws, (1 + Simulation.draws) * (2 if facts.options.softmax else 1) + 4
    num_operations = 10 * config.num_blocks + (4 if config.num_classes else 3)
    with tqdm(total=passes * num_operations, desc="proving", unit="op", disable=None, delay=2, leave=False) as bar:
        simulation = Simulation(draws, SEED, bar.update)
        named = 0 if program.operations is None else len(program.operations(inputs[:1]))
        roundings = ROUNDING_OF_NUMPY, (Rounding(facts.options.dtype),)
        tolerance = tolerance_of(config, weights, images[:few], *roundings, simulation)
        if named:
            _check_operations(program, checkpoint, images[:few], inputs[:few], tolerance, simulation)
        limit = list(tolerance.accumulated.values())[-1]
        if facts.options.softmax:
            exact, simulated = simulated_logits(config, weights, images[:few], roundings[1][0], simulation)
            # The softmax itself rounds as well.
            scores = _softmax(simulated.astype(wide(facts.options.dtype)))
            limit, right = _largest(scores - _softmax(exact)), _softmax(right)
    rows = {}
    for batch in BATCHES:
        error = deviation(program.run(inputs[:batch]).astype(np.float64), right[:batch])
        rows[batch] = error, replace(limit, scale=error.scale)
        if (used := error.fraction_of(rows[batch][1])) > 1:
            raise CheckpointError(
                f"{program.source}: its {facts.output} at batch {batch} are not those of {checkpoint.source}: they differ by "
                f"{figure(error.max_abs)}, {multiple(used)} the tolerance of {figure(limit.max_abs)}"
            )
    return Proof(facts.output, rows, named)


def _check_operations(
    program: Program,
    checkpoint: Checkpoint,
    images: np.ndarray,
    inputs: np.ndarray,
    tolerance: Tolerance,
    simulation: Simulation,
) -> None:
    """Raise CheckpointError with the first operation of a program that is not within its own tolerance."""
    assert program.operations is not None
    operations = {name: values.astype(np.float64) for name, values in program.operations(inputs).items()}

    def run(_: np.ndarray, hook: Hook | None) -> np.ndarray:
        if hook is not None:
            for name, values in operations.items():
                hook(name, values)
        return list(operations.values())[-1]

    pair = Implementation("numpy", dtype="float64"), Implementation("torch", dtype=program.facts.options.dtype)
    comparison = compare(checkpoint, images, *pair, runs=(None, run), tolerance=tolerance, simulation=simulation)
    if (first := comparison.first) is not None:
        raise CheckpointError(
            f"{program.source}: {first.operation.title} is not that of {checkpoint.source}: error {first.error:.1e}, "
            f"tolerance {first.tolerance:.1e}"
        )


def _largest(errors: np.ndarray) -> Deviation:
    rms = np.sqrt(np.square(errors).mean(axis=(1, 2))).max()
    return Deviation(MARGIN * float(np.abs(errors).max()), MARGIN * float(rms), 1.0)


def _softmax(logits: np.ndarray) -> np.ndarray:
    exponents = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponents / exponents.sum(axis=-1, keepdims=True)
