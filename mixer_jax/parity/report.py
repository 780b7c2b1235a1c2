"""The parity report of a checkpoint, and the report as text and as JSON (`html` has it as a page)."""

__all__ = [
    "ParityReport",
    "Table",
    "as_dict",
    "as_lines",
    "as_text",
    "figure",
    "multiple",
    "parity_report",
    "tables",
    "verdict",
]

import json
import math
import os
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from typing import Any

import numpy as np
from tqdm import tqdm

from convert import Checkpoint, CheckpointError, MixerConfig

from ..export.onnx_names import operations_of
from .comparison import Agreement, Comparison, InconclusiveError, compare, num_passes
from .exactness import Exactness, exact
from .explanation import Explanation, explain
from .implementations import Implementation
from .predicted_devices import PREDICTED, DevicePrediction, predict_devices
from .provenance import provenance
from .rounding import LANES
from .tolerance import SIMULATION, Deviation, Simulation

EXTRAS = ("explain", "exact", "predict_devices")


@dataclass(frozen=True)
class ParityReport:
    """A comparison, what its figures depend on, and the extra parts. `source` names the file or files."""

    comparison: Comparison
    source: str
    about: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    explanation: Explanation | None = None
    exactness: Exactness | None = None
    predictions: Sequence[DevicePrediction] | None = None

    @property
    def passed(self) -> bool:
        return self.comparison.passed and (self.exactness is None or self.exactness.passed)

    @property
    def output(self) -> str:
        return "logits" if self.comparison.operations[-1].name == "head" else "features"


def parity_report(
    checkpoint: Checkpoint,
    images: np.ndarray,
    a: Implementation,
    b: Implementation,
    *,
    other: Checkpoint | None = None,
    other_images: np.ndarray | None = None,
    source: str = "these weights",
    images_are: str = "given",
    simulation: Simulation = SIMULATION,
    extras: Collection[str] = (),
) -> ParityReport:
    """Compare two implementations on images (n, h, w, channels), with all that the figures depend on and some of EXTRAS.

    `b` computes from `other` and `other_images`, where they are given. `images_are` says in the report where the images come
    from. Raises CheckpointError where a device is missing, two files take different images, or the logits prove nothing.
    """
    config, draws = checkpoint.config, simulation.draws
    shapes = [(*c.image_size, c.in_channels) for c in (config, (other or checkpoint).config)]
    if shapes[0] != shapes[1]:
        raise CheckpointError(f"{source}: one takes images of {shapes[0]}, the other of {shapes[1]}: no image suits both")
    _require_memory(config, len(images), draws)
    passes = num_passes(a, b, draws) + (6 + (other_images is not None)) * ("explain" in extras)
    passes += len(PREDICTED) * (1 + draws) * ("predict_devices" in extras)
    total = passes * len(operations_of(config))
    with tqdm(total=total, desc="comparing", unit="op", disable=None, delay=2, leave=False) as bar:
        simulation = replace(simulation, progress=bar.update)
        try:
            comparison = compare(checkpoint, images, a, b, other=other, other_images=other_images, simulation=simulation)
        except InconclusiveError as error:
            raise CheckpointError(f"{source}: {error}") from None
        explanation = explain(comparison, simulation) if "explain" in extras else None
        predictions = predict_devices(checkpoint, images, simulation) if "predict_devices" in extras else None
    tolerance = f"{draws} draws, seed {simulation.seed}; at least {LANES} partial sums in a sum over channels"
    about = provenance(comparison, images=f"{len(images)}, {images_are}", tolerance=tolerance)
    return ParityReport(comparison, source, about, explanation, exact(comparison) if "exact" in extras else None, predictions)


def _require_memory(config: MixerConfig, count: int, draws: int) -> None:
    """Every operation's result is kept for both implementations, in float64, and the largest a few times for every draw."""
    tokens, hidden = config.num_tokens, config.hidden_dim
    widest = max(hidden * config.tokens_mlp_dim, tokens * config.channels_mlp_dim, tokens * hidden)
    block = 6 * tokens * hidden + 2 * hidden * config.tokens_mlp_dim + 2 * tokens * config.channels_mlp_dim
    image = 8 * (2 * config.num_blocks * block + 5 * (1 + 2 * draws) * widest)
    if count > (most := _memory() // image):
        raise CheckpointError(
            f"{count} images need {count * image / 2**30:.1f} GiB for the results of all operations, and the machine has "
            f"{_memory() / 2**30:.1f}: at most {most} at once"
        )


def _memory() -> int:
    """Bytes of the machine, where the system tells them."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else sys.maxsize


def verdict(report: ParityReport) -> str:
    """Yes or no, and why, in one sentence."""
    comparison, output, source = report.comparison, report.output, report.source
    # The figure that uses more of its tolerance, so that the figures of the sentence agree with its words.
    logits, limit = comparison.logits, comparison.logits_tolerance
    rms = logits.rms * limit.max_abs > logits.max_abs * limit.rms
    size = f"{logits.rms:.1e} in root mean square" if rms else f"{logits.max_abs:.1e} at most"
    differ = f"the {output} differ by {size}, {_of_tolerance(comparison.fraction)} the tolerance of "
    differ += f"{limit.rms if rms else limit.max_abs:.1e}"
    pair = f"{comparison.a} and {comparison.b}"
    words = "and every operation is within its own" if report.passed else "though every operation is within its own"
    operations = words if len(comparison.operations) > 1 else "and an exported program shows no operation by itself"
    if report.passed:
        yes = f"yes: {pair} compute the same from {source}; {differ}, {operations}"
        metadata, metadata_b = (checkpoint.metadata for checkpoint in comparison.checkpoints)
        differences = "; ".join(metadata.differences(metadata_b, ("gelu", "layer_norm_epsilon")))
        return f"{yes}; but the files' numerics differ, {differences}, which this cannot tell apart" if differences else yes
    no = f"no: {pair} do not compute the same from {source}"
    if comparison.first:
        return f"{no}; the first operation outside its tolerance is {comparison.first}"
    if comparison.fraction > 1:
        return f"{no}; {differ}, {operations}"
    count = len(report.exactness.apart) if report.exactness else 0
    return f"{no}; as float32, {count:,} of the {output} differ by more than float64 rounding explains"


def as_dict(report: ParityReport) -> dict[str, Any]:
    """Everything, for JSON; null where a number is not finite."""
    comparison, explanation, exactness = report.comparison, report.explanation, report.exactness
    entries: dict[str, Any] = {
        "passed": report.passed,
        "verdict": verdict(report),
        "source": report.source,
        "implementations": [str(comparison.a), str(comparison.b)],
        "output": report.output,
        "agreement": asdict(comparison.logits),
        "tolerance": asdict(comparison.logits_tolerance),
        "fraction": comparison.fraction,
        "first": None,
        "operations": [asdict(operation) for operation in comparison.operations],
        "about": report.about,
    }
    if fault := comparison.first:
        where = {"implementation": str(fault.implementation), "operation": fault.operation.name}
        entries["first"] = where | {"error": fault.error, "tolerance": fault.tolerance, "text": str(fault)}
    if explanation:
        causes = [asdict(cause) | {"differs": cause.differs} for cause in explanation.causes]
        entries["explanation"] = asdict(explanation) | {"causes": causes, "fraction": explanation.fraction}
    if exactness:
        entries["exactness"] = asdict(exactness) | {"passed": exactness.passed}
    if report.predictions is not None:
        entries["predictions"] = [asdict(prediction) for prediction in report.predictions]
    return json.loads(json.dumps(entries), parse_constant=lambda not_finite: None)


def as_text(report: ParityReport) -> str:
    """For a terminal, the verdict first."""
    lines = [verdict(report), ""]
    for table in tables(report):
        lines += [*as_lines(table), ""]
    for title, entries in report.about.items():
        lines.append(f"{title}: " + "; ".join(f"{name} {value}" for name, value in entries.items()))
    return "\n".join(lines)


@dataclass(frozen=True)
class Table:
    """The first column is text, and so is the last where `text_last`; the others are numbers.

    `note` is printed below; `highlighted` has the first cells of the rows that stand out.
    """

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    text_last: bool = False
    highlighted: Collection[str] = ()


def tables(report: ParityReport) -> Iterator[Table]:
    """The tables of both text and page; the plots and the table of all operations are the page's alone."""
    comparison, output = report.comparison, report.output
    logits, limit = comparison.logits, comparison.logits_tolerance
    count = len(comparison.outputs[0])
    yield Table(
        f"{output} of {count} {'image' if count == 1 else 'images'}",
        ("", "max abs", "rms"),
        (
            ("difference", *_figures(logits)),
            ("tolerance", *_figures(limit)),
            ("fraction", multiple(logits.max_abs / limit.max_abs), multiple(logits.rms / limit.rms)),
        ),
        f"the same first class on {logits.same_class:.1%} of the images, the same first five on {logits.same_five:.1%}; "
        f"Kullback-Leibler divergence {logits.divergence:.1e} nats; max abs of the {output} {logits.scale:.3g}",
    )
    yield _depth_table(comparison)
    if report.explanation:
        yield _explanation_table(report.explanation)
    if report.exactness:
        yield _exactness_table(report.exactness)
    if report.predictions is not None:
        yield Table(
            "predicted here, not measured on any of these",
            ("devices", "max abs", "rms", "same class", "setting"),
            [(p.devices, *_figures(p.logits), f"{p.same_class:.1%}", p.setting) for p in report.predictions],
            f"differences of the {output} from those of the NumPy model in float64",
            text_last=True,
        )


def _depth_table(comparison: Comparison) -> Table:
    """A row for the stem, for each block, and for each operation after the blocks."""
    rows, highlighted = [], []
    for name, group in groupby(comparison.operations, lambda operation: operation.title.split(", ")[0]):
        operations = list(group)
        end, worst = operations[-1], max(operations, key=lambda operation: max(operation.fraction))
        figures = figure(end.accumulated), figure(end.accumulated_tolerance), multiple(max(worst.fraction))
        rows.append((name, *figures, worst.title.removeprefix(f"{name}, ")))
        highlighted += [name] if max(worst.fraction) > 1 else []
    return Table(
        "over depth, relative to max abs",
        ("after", "difference", "tolerance", "fraction", "worst operation"),
        rows,
        "worst operation: the one in this block that uses most of its own tolerance, given its own input; fraction: how much",
        text_last=True,
        highlighted=highlighted,
    )


def _explanation_table(explanation: Explanation) -> Table:
    rows = [("the gap", *_figures(explanation.gap), "", "")]
    for cause in explanation.causes:
        fraction = "-" if not cause.differs else "rounding" if cause.fraction is None else f"{cause.fraction:.1%}"
        chosen = f"{cause.a} against {cause.b}" if cause.differs else f"{cause.a} in both"
        rows.append((cause.name, *_figures(cause.effect), fraction, chosen))
    used = f"{_of_tolerance(explanation.fraction)} the tolerance"
    rows.append(("unexplained", *_figures(explanation.unexplained), "", used))
    without = "without the choices that differ" if any(cause.differs for cause in explanation.causes) else "itself"
    enough = "within what rounding may leave" if explanation.passed else "MORE THAN ROUNDING MAY LEAVE"
    return Table(
        "why",
        ("choice", "max abs", "rms", "of the gap", "chosen"),
        rows,
        f"unexplained is the gap {without}: {enough}; rows with '-': effect if one implementation switched",
        text_last=True,
    )


def _exactness_table(exactness: Exactness) -> Table:
    equal = exactness.count - len(exactness.straddling) - len(exactness.apart)
    kinds = (("straddles", exactness.straddling), ("APART", exactness.apart))
    hidden = sum(max(0, len(pairs) - 20) for _, pairs in kinds)
    return Table(
        "float64 rounded to float32",
        ("", "a", "b"),
        [(f"{kind}: image {i}, class {k}", f"{a:.17g}", f"{b:.17g}") for kind, pairs in kinds for i, k, a, b in pairs[:20]],
        f"{equal:,} of {exactness.count:,} bit-equal, {len(exactness.straddling):,} straddle a rounding boundary, "
        f"{len(exactness.apart):,} are further apart" + (f"; {hidden:,} not listed" if hidden else ""),
    )


def as_lines(table: Table) -> list[str]:
    """For a terminal."""
    lines = [table.title]
    if table.rows:
        widths = [max(map(len, column)) for column in zip(table.head, *table.rows)]
        for row in (table.head, *table.rows):
            cells = [f"{row[0]:<{widths[0]}}", *(f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:]))]
            if table.text_last:
                cells[-1] = row[-1]
            lines.append(("  " + "  ".join(cells)).rstrip())
    return lines + ([f"  {table.note}"] if table.note else [])


def figure(value: float) -> str:
    return f"{value:.1e}" if math.isfinite(value) else "not finite"


def _figures(deviation: Deviation | Agreement) -> tuple[str, str]:
    return figure(deviation.max_abs), figure(deviation.rms)


def multiple(fraction: float) -> str:
    """A fraction of a tolerance: percent, or how many times as much. More than 100 % is never rounded to 100 %."""
    if not math.isfinite(fraction):
        return "not finite"
    if fraction <= 1.005:
        return f"{math.floor(100 * fraction)}%" if fraction <= 1 else "over 100%"
    return f"{fraction:.3g} times" if fraction < 100 else f"{fraction:,.0f} times"


def _of_tolerance(fraction: float) -> str:
    return multiple(fraction) + (" of" if fraction <= 1.005 else "")
