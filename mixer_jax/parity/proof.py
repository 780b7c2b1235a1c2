"""That an exported program computes what the NumPy model does, at several batch sizes, inside the tolerance of parity."""

__all__ = ["BATCHES", "Proof", "prove"]

import math
from dataclasses import dataclass, replace

import numpy as np
from tqdm import tqdm

from convert import Checkpoint, CheckpointError, MixerConfig

from ..export.onnx_names import operations_of
from ..export.program import ExportOptions, Program, wide
from .comparison import InconclusiveError, agreement, compare, noise
from .implementations import Implementation
from .numpy_model import Hook, forward
from .report import Table, figure, multiple
from .rounding import Rounding
from .tolerance import MARGIN, Deviation, Simulation, Tolerance, deviation, simulated_logits
from .tolerance import tolerance as tolerance_of

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
    options = program.facts.options
    checkpoint = checkpoint.without_head() if options.features else checkpoint
    config, weights = checkpoint.config, checkpoint.to("google").as_numpy()
    inputs, images = _inputs(program, config)
    right = forward(config, weights, images)
    try:
        agreement(right, right)
    except InconclusiveError as why:
        raise CheckpointError(f"{checkpoint.source}: no export of it can be proved: {why}") from None
    few = min(len(images), math.ceil(1000 / right.shape[1]))
    num_operations = len(operations_of(config))
    with tqdm(total=_passes(options) * num_operations, desc="proving", unit="op", disable=None, delay=2, leave=False) as bar:
        simulation = Simulation(Simulation.draws, SEED, bar.update)
        rounding = Rounding(options.dtype)
        tolerance = tolerance_of(config, weights, images[:few], ROUNDING_OF_NUMPY, (rounding,), simulation)
        if program.operations is not None:
            _check_operations(program, checkpoint, images[:few], inputs[:few], tolerance, simulation)
        limit = list(tolerance.accumulated.values())[-1]
        if options.softmax:
            exact, simulated = simulated_logits(config, weights, images[:few], rounding, simulation)
            # The softmax itself rounds as well.
            limit = _largest(_softmax(simulated.astype(wide(options.dtype))) - _softmax(exact))
            right = _softmax(right)
    rows = _errors(program, checkpoint, inputs, right, limit)
    return Proof(program.facts.output, rows, 0 if program.operations is None else num_operations)


def _inputs(program: Program, config: MixerConfig) -> tuple[np.ndarray, np.ndarray]:
    """Seeded noise as the program takes it, and the same as the model does."""
    images = noise(config, max(BATCHES), SEED)
    if not program.facts.options.uint8:
        return images, images
    pixels = np.random.default_rng(SEED).integers(0, 256, images.shape, np.uint8)
    return pixels, program.facts.scaled(pixels)


def _passes(options: ExportOptions) -> int:
    """How many forward passes of the NumPy model a proof reports, operation by operation."""
    return (1 + Simulation.draws) * (2 if options.softmax else 1) + 4


def _errors(
    program: Program, checkpoint: Checkpoint, inputs: np.ndarray, right: np.ndarray, limit: Deviation
) -> dict[int, tuple[Deviation, Deviation]]:
    """The error of the output and its limit, by batch size. Raises CheckpointError for the first beyond it."""
    rows = {}
    for batch in BATCHES:
        error = deviation(program.run(inputs[:batch]).astype(np.float64), right[:batch])
        rows[batch] = error, replace(limit, scale=error.scale)
        if (fraction := error.fraction_of(rows[batch][1])) > 1:
            raise CheckpointError(
                f"{program.source}: its {program.facts.output} at batch {batch} are not those of {checkpoint.source}: they "
                f"differ by {figure(error.max_abs)}, {multiple(fraction)} the tolerance of {figure(limit.max_abs)}"
            )
    return rows


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
    if operations.keys() != tolerance.accumulated.keys():
        shown = f"{len(operations)} of its {len(tolerance.accumulated)} operations"
        raise CheckpointError(f"{program.source}: shows {shown}, so they cannot be checked")

    def run(_: np.ndarray, hook: Hook | None) -> np.ndarray:
        if hook is not None:
            for name, values in operations.items():
                hook(name, values)
        return list(operations.values())[-1]

    exported = Implementation("onnx", dtype=program.facts.options.dtype, path=program.source)
    pair = Implementation("numpy", dtype="float64"), exported
    try:
        comparison = compare(checkpoint, images, *pair, runs=(None, run), tolerance=tolerance, simulation=simulation)
    except InconclusiveError as why:
        raise CheckpointError(f"{program.source}: {why}") from None
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
