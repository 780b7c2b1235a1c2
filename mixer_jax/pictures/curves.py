"""The course of a training run as a picture."""

__all__ = ["draw_curves"]

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.signal import lfilter

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SMOOTHING = 0.98  # decay of the moving average that is drawn over the losses of single steps


def draw_curves(rows: Sequence[Mapping[str, Any]], *, title: str = "") -> "Figure":
    """From the rows of metrics.jsonl: the loss of each step and of each evaluation, and below the validation accuracy."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(8, 6), dpi=110, layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    if steps := [(row["step"], row["loss"]) for row in rows if "loss" in row]:
        at, losses = np.array(steps).T
        above.plot(at, losses, color="0.8", linewidth=0.7)
        above.plot(at, smoothed(losses), color="tab:blue", label="training, smoothed")
    if evaluations := [row for row in rows if "validation_loss" in row]:
        at = [row["step"] for row in evaluations]
        above.plot(at, [row["validation_loss"] for row in evaluations], "o-", color="tab:orange", label="validation")
        right = [row["validation_correct"] / row["validation_images"] for row in evaluations]
        below.plot(at, right, "o-", color="tab:orange")
    above.set(ylabel="loss")
    above.legend()
    below.set(xlabel="step", ylabel="validation images right")
    below.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    figure.suptitle(title, parse_math=False)
    return figure


def smoothed(values: np.ndarray) -> np.ndarray:
    """The exponential moving average up to each value, whose weights add up to 1 from the first value on."""
    total, weight = (lfilter([1 - SMOOTHING], [1, -SMOOTHING], each) for each in (values, np.ones_like(values)))
    return total / weight
