"""Which classes are taken for which, as a picture."""

__all__ = ["draw_confusion"]

from typing import TYPE_CHECKING

from ..evaluation import Evaluation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CELLS = 1000  # rows and columns at most, about one a pixel


def draw_confusion(evaluation: Evaluation, *, title: str = "") -> "Figure":
    """Which classes the images of each class (row) are taken for (column): what is right is on the diagonal."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    occurring, fractions = evaluation.confusion_fractions(CELLS)
    named = len(occurring) <= 60
    size = max(5.0, 2.5 + 0.22 * len(occurring)) if named else 11.0
    figure = Figure(figsize=(size + 1, size), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(fractions, vmin=0, vmax=1, cmap="magma_r", interpolation="nearest")
    figure.colorbar(
        image, ax=axes, label="of the images of the true class", format=PercentFormatter(1, symbol=" %"), fraction=0.045
    )
    top1 = evaluation.top1
    text = f"{100 * top1.accuracy:.1f} % of {top1.images} images right, {len(occurring)} classes"
    axes.set_title(f"{title}: {text}" if title else text, parse_math=False)
    axes.set(xlabel="predicted class", ylabel="true class")
    if named:
        ticks, labels = range(len(occurring)), [evaluation.names[i][:24] for i in occurring]
        axes.set_xticks(ticks, labels, rotation=90, parse_math=False)
        axes.set_yticks(ticks, labels, parse_math=False)
    return figure
