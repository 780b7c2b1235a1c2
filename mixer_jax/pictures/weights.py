"""A checkpoint's weights as pictures: token-mixing units, stem units (paper, figures 5 to 7), and magnitudes by block."""

__all__ = ["draw_norms", "draw_stem", "draw_tokens"]

import itertools
import math
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from einops import rearrange
from tqdm import tqdm

from convert import Checkpoint, CheckpointError
from convert.layouts import BIAS, BLOCK_MODULES, GOOGLE, MODULES, WEIGHT
from convert.mapping import Slot, slots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 128
WIDTH, ASPECT = 1500, 1.5  # of all montages of a figure: pixels at most, and width to height about
FIRST_BLOCKS = 3
OUTLIERS = 0.005  # fraction of the weights beyond the ends of the colour scale, so that one does not make all others pale
GOLD = (255, 215, 0)  # of NaN and infinity

Groups = list[tuple[int, ...]]  # units drawn next to each other, by index


def pairs(units: np.ndarray) -> Groups:
    """Units (n, ...) with their closest inverses, each unit once, a single one if n is odd.

    The closest inverse is the unit whose cosine is nearest to -1, whatever its length. Pairing is greedy, the best match
    first, so units that are each other's closest inverse are always a pair. Zero units come last. Ties go to the earlier unit.
    """
    rows = units.reshape(len(units), -1).astype(np.float64)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    rows = np.divide(rows, lengths, out=np.zeros_like(rows), where=lengths > 0)
    left, right = np.triu_indices(len(rows), 1)
    zeros = (lengths[left, 0] == 0) | (lengths[right, 0] == 0)
    best_first = np.lexsort(((rows @ rows.T)[left, right], zeros))
    single, groups = set(range(len(rows))), []
    for i, j in zip(left[best_first].tolist(), right[best_first].tolist()):
        if i in single and j in single:
            groups.append((i, j))
            single -= {i, j}
    return [*groups, *((i,) for i in single)]


def frequencies(units: np.ndarray) -> np.ndarray:
    """The mean spatial frequency of units (n, h, w, ...), weighted by power, in cycles per step; infinity for a zero unit.

    A unit's mean counts as frequency 0. The power of trailing axes is added up.
    """
    power = np.abs(np.fft.fft2(units, axes=(1, 2))) ** 2
    power = power.reshape(*power.shape[:3], -1).sum(axis=3)
    radius = np.hypot(np.fft.fftfreq(units.shape[1])[:, None], np.fft.fftfreq(units.shape[2]))
    total = power.sum(axis=(1, 2))
    return np.divide((power * radius).sum(axis=(1, 2)), total, out=np.full(len(units), np.inf), where=total > 0)


def low_first(groups: Groups, values: np.ndarray) -> Groups:
    """Groups by the mean frequency of their units, ties in their old order."""
    return sorted(groups, key=lambda group: values[list(group)].mean())


def draw_tokens(checkpoint: Checkpoint, *, blocks: Sequence[int] | None = None, units: int | None = None) -> "Figure":
    """The incoming weights of token-mixing units on the grid of patches, low frequencies first, beside their closest inverses.

    `blocks` defaults to the first three. `units` draws that many of a block, after pairing and sorting all of them.
    """
    from matplotlib import colormaps
    from matplotlib.colors import Normalize

    blocks = _checked(checkpoint, blocks if blocks is not None else range(min(FIRST_BLOCKS, checkpoint.sizes["num_blocks"])))
    (height, width), count = checkpoint.config.grid, checkpoint.sizes["tokens_mlp_dim"]
    weights, groups = [], []
    for block in blocks:
        kernel = _kernel(checkpoint, "token_mixing/dense_0", block)
        weights.append(rearrange(kernel, "(h w) o -> o h w", h=height, w=width))
        finite = np.nan_to_num(weights[-1], nan=0, posinf=0, neginf=0)
        groups.append(_first(low_first(pairs(finite), frequencies(finite)), units))
    limit, extend = scale([w[list(sum(g, ()))] for w, g in zip(weights, groups)])
    colours, norm = colormaps["RdBu_r"].with_extremes(bad="gold"), Normalize(-limit, limit)
    cells = [colours(norm(np.where(np.isfinite(w), w, np.nan)), bytes=True)[..., :3] for w in weights]
    each = " of each block" if len(blocks) > 1 else ""
    return _figure(
        [(f"block {block}" if len(blocks) > 1 else "", c, g) for block, c, g in zip(blocks, cells, groups)],
        gap=150,
        title=f"{_name(checkpoint)}: token-mixing units of {_listed(blocks)}",
        note=f"{_of(units, count)} units{each}: the weights of the {height} x {width} patches. Every unit is beside its "
        f"closest inverse, low spatial frequencies first.{_nonfinite(weights)}",
        bar=(norm, colours, extend, "incoming weight"),
    )


def draw_stem(checkpoint: Checkpoint, *, units: int | None = None) -> "Figure":
    """The stem's units as RGB patches, low frequencies first; without three channels, every channel in grey."""
    from matplotlib import colormaps
    from matplotlib.colors import Normalize

    weights = rearrange(_kernel(checkpoint, "stem"), "h w i o -> o h w i")
    count, height, width, channels = weights.shape
    finite = np.nan_to_num(weights, nan=0, posinf=0, neginf=0)
    groups = _first(low_first([(i,) for i in range(count)], frequencies(finite)), units)
    limit, extend = scale([weights[list(sum(groups, ()))]])
    cells, nonfinite = np.rint(255 * np.clip((finite / limit + 1) / 2, 0, 1)).astype(np.uint8), ~np.isfinite(weights)
    what = "red, green and blue are the weights of the three channels"
    if channels == 3:
        cells[nonfinite.any(axis=-1)] = GOLD
    else:
        cells = np.repeat(rearrange(cells, "o h w i -> (o i) h w 1"), 3, axis=-1)
        cells[rearrange(nonfinite, "o h w i -> (o i) h w")] = GOLD
        groups = [tuple(range(unit * channels, (unit + 1) * channels)) for (unit,) in groups]
        what = f"{channels} channels side by side" if channels > 1 else "one channel"
    return _figure(
        [("", cells, groups)],
        gap=255,
        title=f"{_name(checkpoint)}: units of the stem",
        note=f"{_of(units, count)} units: the weights of a patch of {height} x {width} pixels; {what}. Low spatial frequencies "
        f"first.{_nonfinite([weights])}",
        bar=(Normalize(-limit, limit), colormaps["gray"], extend, "weight of a pixel (grey = 0)"),
    )


def draw_norms(checkpoint: Checkpoint, *, blocks: Sequence[int] | None = None) -> "Figure":
    """The root mean square of every array of the blocks (None: all), by block."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    blocks = _checked(checkpoint, range(checkpoint.sizes["num_blocks"]) if blocks is None else blocks)
    values = rms_by_block(checkpoint, blocks)
    figure = Figure(figsize=(11, 4.4), dpi=DPI, layout="constrained")
    figure.suptitle(f"{_name(checkpoint)}: RMS of the weights", x=0.01, ha="left", size=12, parse_math=False)
    mlps, layer_norms = ([m for m in BLOCK_MODULES if (MODULES[m][0] == "norm") == norm] for norm in (False, True))
    panels = {"kernels": (mlps, WEIGHT), "biases": (BLOCK_MODULES, BIAS), "LayerNorm scales": (layer_norms, WEIGHT)}
    lines = {}
    for axes, (title, (modules, leaf)) in zip(figure.subplots(1, 3), panels.items()):
        for module in modules:
            style = {"color": f"C{BLOCK_MODULES.index(module)}", "linestyle": "--" if module.startswith("channel") else "-"}
            (lines[module],) = axes.plot(blocks, values[module, leaf], marker="o", markersize=4, **style)
        largest = np.max(np.nan_to_num([values[module, leaf] for module in modules], posinf=0))
        axes.set_ylim(0, 1.08 * float(largest) or 1)
        axes.set_title(title, loc="left", size=11)
        axes.set_xlabel("block")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    names = [module.replace("_", " ").replace("/", " ") for module in lines]
    figure.legend(lines.values(), names, loc="outside right upper", frameon=False)
    figure.axes[0].set_ylabel("root mean square")
    return figure


def rms_by_block(checkpoint: Checkpoint, blocks: Sequence[int]) -> dict[tuple[str, int], list[float]]:
    """The root mean square of every array of these blocks, by module and leaf (WEIGHT or BIAS)."""
    values: dict[tuple[str, int], list[float]] = {(module, leaf): [] for module in BLOCK_MODULES for leaf in (WEIGHT, BIAS)}
    names = {slot: name for name, slot in slots(GOOGLE, checkpoint.sizes).items()}
    arrays = checkpoint.to(GOOGLE).arrays
    for block in tqdm(blocks, desc="reading", unit="block", disable=None, delay=1):
        for module, leaf in values:
            array = np.asarray(arrays[names[Slot(module, leaf, block)]]).astype(np.float64)
            values[module, leaf].append(float(np.sqrt(np.mean(array**2))))
    return values


def scale(weights: Sequence[np.ndarray]) -> tuple[float, str]:
    """The end of one colour scale for all weights, which is centred on zero, and which ends of its bar have weights beyond."""
    sizes = np.abs(np.concatenate([w.ravel() for w in weights]))
    sizes = sizes[np.isfinite(sizes)]
    largest = float(sizes.max(initial=0))
    limit = (float(np.quantile(sizes, 1 - OUTLIERS)) or largest) if largest else 1.0
    return limit, "both" if largest > limit else "neither"


def montage(cells: np.ndarray, groups: Groups, *, columns: int, zoom: int, gap: int) -> np.ndarray:
    """Groups of cells (n, h, w, 3) in rows of `columns`: every weight is zoom x zoom pixels, gaps have the grey `gap`.

    Gaps are 1 to 3 pixels within a group and three times as wide between groups.
    """
    _, height, width, _ = cells.shape
    thin, rows = min(max(1, zoom // 2), 3), math.ceil(len(groups) / columns)
    step = width * zoom + thin
    tall, wide = height * zoom + 3 * thin, max(map(len, groups)) * step + 2 * thin
    picture = np.full((rows * tall + 3 * thin, columns * wide + 3 * thin, 3), gap, np.uint8)
    for place, group in enumerate(groups):
        for i, index in enumerate(group):
            top, left = 3 * thin + place // columns * tall, 3 * thin + place % columns * wide + i * step
            cell = cells[index].repeat(zoom, axis=0).repeat(zoom, axis=1)
            picture[top : top + height * zoom, left : left + width * zoom] = cell
    return picture


def _figure(
    panels: Sequence[tuple[str, np.ndarray, Groups]], *, gap: int, title: str, note: str, bar: tuple[Any, Any, str, str]
) -> "Figure":
    """A montage of each panel's groups of cells, three side by side, pixel by pixel, and a colour bar."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

    across = min(len(panels), 3)
    down = math.ceil(len(panels) / across)
    _, height, width, _ = panels[0][1].shape
    count, size = max(len(groups) for *_, groups in panels), max(len(group) for *_, groups in panels for group in groups)
    tall, wide = height + 2, size * (width + 1)  # of a group with its gaps, in weights, about

    def cost(columns: int) -> float:
        """Of proportions other than ASPECT, and of places without a group in the last row."""
        ratio = across * columns * wide / (down * math.ceil(count / columns) * tall)
        return abs(math.log(ratio / ASPECT)) + 8 * (-count % columns) / count

    columns = min(range(1, count + 1), key=cost)
    zoom = min(WIDTH // (across * columns * wide), int(WIDTH / ASPECT) // (down * math.ceil(count / columns) * tall), 48)
    pictures = [montage(cells, groups, columns=columns, zoom=max(zoom, 1), gap=gap) for _, cells, groups in panels]
    tall, wide = pictures[0].shape[:2]

    pixels = np.array([max(across * wide + 200, 640), down * tall + 200])
    figure = Figure(figsize=(pixels[0] / DPI, pixels[1] / DPI), dpi=DPI)
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.08)
    figure.suptitle(textwrap.fill(title, pixels[0] // 13), x=0.01, ha="left", size=12, parse_math=False)
    figure.supxlabel(textwrap.fill(note, pixels[0] // 9), x=0.01, ha="left", size=9, color="0.35")
    grid = figure.subplots(down, across, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, (name, *_), picture in zip(grid.flat, panels, pictures):
        axes.imshow(picture, interpolation="nearest", aspect="auto")
        axes.set_title(name, loc="left", size=11)
    norm, colours, extend, label = bar
    figure.colorbar(ScalarMappable(norm, colours), ax=grid, extend=extend, label=label, aspect=30)
    figure.draw_without_rendering()
    spare = grid[0, 0].get_window_extent().size - (wide, tall)  # what the layout gives a panel, less its montage
    pixels = np.maximum(np.rint(pixels - spare * (across, down)), (640, 1))
    figure.set_size_inches(pixels / DPI)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for axes, picture in zip(grid.flat, pictures):  # whole pixels, where the layout put them
        tall, wide, _ = picture.shape
        left, bottom = np.rint(axes.get_position().corners()[1] * pixels).astype(int) - (0, tall)
        axes.set_position((left / pixels[0], bottom / pixels[1], wide / pixels[0], tall / pixels[1]))
    return figure


def _kernel(checkpoint: Checkpoint, module: str, block: int | None = None) -> np.ndarray:
    return np.asarray(checkpoint.canonical_array(module, WEIGHT, block)).astype(np.float64)


def _nonfinite(weights: Sequence[np.ndarray]) -> str:
    count = sum(int((~np.isfinite(w)).sum()) for w in weights)
    return f" In gold: {count} that are NaN or infinite." if count else ""


def _checked(checkpoint: Checkpoint, blocks: Sequence[int]) -> list[int]:
    count = checkpoint.sizes["num_blocks"]
    if wrong := [block for block in blocks if not 0 <= block < count]:
        raise CheckpointError(f"{checkpoint.source}: no {_listed(wrong)}: it has blocks 0 to {count - 1}")
    return list(blocks)


def _listed(blocks: Sequence[int]) -> str:
    few = f"block{'s' if len(blocks) > 1 else ''} {', '.join(map(str, blocks))}"
    return few if len(blocks) <= 12 else f"{len(blocks)} blocks"


def _name(checkpoint: Checkpoint) -> str:
    """The file and its folder: several published files share a name."""
    return "/".join(Path(os.fsencode(checkpoint.source).decode(errors="replace")).parts[-2:])


def _first(groups: Groups, units: int | None) -> Groups:
    """The groups with the first `units` units."""
    starts = itertools.accumulate(map(len, groups), initial=0)
    return groups if units is None else [group[: units - start] for group, start in zip(groups, starts) if start < units]


def _of(units: int | None, count: int) -> str:
    return f"All {count}" if units is None or units >= count else f"The first {units} of {count}"
