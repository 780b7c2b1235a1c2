"""A checkpoint's weights as pictures: token-mixing units, stem units, and norms by block (paper, figures 5 to 7)."""

__all__ = ["draw_norms", "draw_stem", "draw_tokens", "save"]

import argparse
import io
import math
import os
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from einops import rearrange
from tqdm import tqdm

from convert import Checkpoint, CheckpointError
from convert.cli import read_asked
from convert.files import check_writable, whole_or_nothing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ENDINGS = (".png", ".pdf", ".svg")
FIRST_BLOCKS = 3
BEYOND = 0.005  # the share of weights beyond the ends of the colour scale, lest one outlier make all others pale
BAD = (255, 215, 0)  # of NaN and infinity: gold

Groups = list[tuple[int, ...]]  # units drawn next to each other, by index


def pairs(units: np.ndarray) -> Groups:
    """Units (n, ...) with their closest inverses, each unit once, one alone where n is odd.

    v is the inverse of w as far as |w/|w| + v/|v|| is small, that is their cosine near -1: how strong a unit is does not
    make it the opposite of another, and without the division weak units would be everybody's. Greedy, best match of all
    first, so units that are each other's closest inverse are always a pair. A zero unit is nobody's inverse and comes
    last. Ties go to the earlier unit.
    """
    rows = units.reshape(len(units), -1).astype(np.float64)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    rows = np.divide(rows, lengths, out=np.zeros_like(rows), where=lengths > 0)
    left, right = np.triu_indices(len(rows), 1)
    zeros = (lengths[left, 0] == 0) | (lengths[right, 0] == 0)
    best_first = np.lexsort(((rows @ rows.T)[left, right], zeros))
    alone, found = set(range(len(rows))), []
    for i, j in zip(left[best_first].tolist(), right[best_first].tolist()):
        if i in alone and j in alone:
            found.append((i, j))
            alone -= {i, j}
    return [*found, *((i,) for i in alone)]


def frequencies(units: np.ndarray) -> np.ndarray:
    """The mean spatial frequency of units (n, h, w, ...), weighted by power, in cycles per step: 0 for a constant unit.

    The mean stays in, at frequency 0: what a unit sums over its whole field is the lowest of its frequencies. Trailing
    axes are added up in power. A zero unit has infinity, which puts it last.
    """
    power = np.abs(np.fft.fft2(units, axes=(1, 2))) ** 2
    power = power.reshape(*power.shape[:3], -1).sum(axis=3)
    radius = np.hypot(np.fft.fftfreq(units.shape[1])[:, None], np.fft.fftfreq(units.shape[2]))
    total = power.sum(axis=(1, 2))
    return np.divide((power * radius).sum(axis=(1, 2)), total, out=np.full(len(units), np.inf), where=total > 0)


def low_first(groups: Groups, values: np.ndarray) -> Groups:
    """Groups by the mean of their units' frequencies, ties as they were."""
    return sorted(groups, key=lambda group: values[list(group)].mean())


def token_units(checkpoint: Checkpoint, block: int) -> np.ndarray:
    """The incoming weights of a block's token-mixing units: (unit, grid height, grid width)."""
    height, width = checkpoint.config.grid
    kernel = checkpoint.to("google").arrays[f"MixerBlock_{block}/token_mixing/Dense_0/kernel"]
    return rearrange(_float64(kernel), "(h w) o -> o h w", h=height, w=width)


def stem_units(checkpoint: Checkpoint) -> np.ndarray:
    """The stem's units as patches: (unit, height, width, channel)."""
    return rearrange(_float64(checkpoint.to("google").arrays["stem/kernel"]), "h w i o -> o h w i")


def draw_tokens(checkpoint: Checkpoint, *, blocks: Sequence[int] | None = None, units: int | None = None) -> "Figure":
    """Token-mixing units of some blocks (None: the first three), each beside its closest inverse, low frequencies first.

    `units` draws that many of a block, after pairing and sorting them all.
    """
    from matplotlib import colormaps
    from matplotlib.colors import Normalize

    chosen = _blocks(checkpoint, blocks if blocks is not None else range(min(FIRST_BLOCKS, checkpoint.sizes["num_blocks"])))
    (height, width), panels = checkpoint.config.grid, []
    for block in chosen:
        weights = token_units(checkpoint, block)
        finite = _finite(weights)
        groups = low_first(pairs(finite), frequencies(finite))
        panels.append((f"block {block}", weights, _first(groups, units)))
    limit, clipped = scale([weights[list(sum(groups, ()))] for _, weights, groups in panels])
    colours = colormaps["RdBu_r"].with_extremes(bad="gold")
    norm = Normalize(-limit, limit)

    def painted(weights: np.ndarray) -> np.ndarray:
        return colours(norm(np.where(np.isfinite(weights), weights, np.nan)), bytes=True)[..., :3]

    count, each = checkpoint.sizes["tokens_mlp_dim"], " in each block" if len(chosen) > 1 else ""
    return _sheet(
        [Panel(title, painted(weights), groups, gap=150) for title, weights, groups in panels],
        heading=f"{_name(checkpoint)}: token-mixing units of {_listed(chosen)}",
        note=f"{_of(units, count)} units{each}, the weights each gives to the {height} x {width} patches of an image. "
        "Every unit beside its closest inverse, low spatial frequencies first." + _bad(weights for _, weights, _ in panels),
        bar=Bar(colours, limit, clipped, "incoming weight"),
    )


def draw_stem(checkpoint: Checkpoint, *, units: int | None = None) -> "Figure":
    """The stem's units as RGB patches, low frequencies first, zero in mid-grey; without three channels, each in grey."""
    from matplotlib import colormaps

    weights = stem_units(checkpoint)
    count, height, width, channels = weights.shape
    finite = _finite(weights)
    order = _first(low_first([(i,) for i in range(count)], frequencies(finite)), units)
    limit, clipped = scale([weights[list(sum(order, ()))]])
    light = np.rint(255 * np.clip((finite / limit + 1) / 2, 0, 1)).astype(np.uint8)
    wrong = ~np.isfinite(weights)
    if channels == 3:
        light[wrong.any(axis=-1)] = BAD
        cells, groups, what = light, order, "red, green and blue together"
    else:
        cells = np.repeat(rearrange(light, "o h w i -> (o i) h w 1"), 3, axis=-1)
        cells[rearrange(wrong, "o h w i -> (o i) h w")] = BAD
        groups = [tuple(range(unit * channels, (unit + 1) * channels)) for (unit,) in order]
        what = "in grey" if channels == 1 else f"its {channels} channels side by side in grey"
    return _sheet(
        [Panel("", cells, groups, gap=255)],
        heading=f"{_name(checkpoint)}: units of the stem",
        note=f"{_of(units, count)} units, each the weights of a patch of {height} x {width} pixels, {what}. "
        "Low spatial frequencies first." + _bad([weights]),
        bar=Bar(colormaps["gray"], limit, clipped, "weight of a pixel"),
    )


def draw_norms(checkpoint: Checkpoint, *, blocks: Sequence[int] | None = None) -> "Figure":
    """Euclidean norms of every array of the blocks (None: all), by block."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    chosen = _blocks(checkpoint, range(checkpoint.sizes["num_blocks"]) if blocks is None else blocks)
    found = norms(checkpoint, chosen)
    figure = Figure(figsize=(11, 4.4), dpi=DPI, layout="constrained")
    heading = f"{_name(checkpoint)}: norms of the weights of {_listed(chosen)}"
    figure.suptitle(heading, x=0.01, ha="left", size=12, parse_math=False)
    names = list(dict.fromkeys(name.rpartition("/")[0] for name in found))
    lines = {}
    for axes, (title, leaf) in zip(
        figure.subplots(1, 3), (("kernels", "kernel"), ("biases", "bias"), ("LayerNorm scales", "scale"))
    ):
        drawn = {name: found[f"{name}/{leaf}"] for name in names if f"{name}/{leaf}" in found}
        for name, values in drawn.items():
            dashes = "--" if name.startswith("channel") else "-"
            (lines[name],) = axes.plot(chosen, values, dashes, color=f"C{names.index(name)}", marker="o", markersize=4)
        axes.set_title(title, loc="left", size=11)
        axes.set_xlabel("block")
        largest = np.max(np.nan_to_num(list(drawn.values()), posinf=0))
        axes.set_ylim(0, 1.08 * float(largest) or 1)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(lines.values(), lines.keys(), loc="outside right upper", frameon=False)
    figure.axes[0].set_ylabel("Euclidean norm")
    return figure


def norms(checkpoint: Checkpoint, blocks: Sequence[int]) -> dict[str, list[float]]:
    """The Euclidean norm of every array of these blocks, named as in the paper: "token mixing 1/kernel"."""
    modules = {
        "token mixing 1": "token_mixing/Dense_0",
        "token mixing 2": "token_mixing/Dense_1",
        "channel mixing 1": "channel_mixing/Dense_0",
        "channel mixing 2": "channel_mixing/Dense_1",
        "token norm": "LayerNorm_0",
        "channel norm": "LayerNorm_1",
    }
    leaves = {name: ("scale" if "norm" in name else "kernel", "bias") for name in modules}
    arrays = checkpoint.to("google").arrays
    found: dict[str, list[float]] = {f"{name}/{leaf}": [] for name in modules for leaf in leaves[name]}
    for block in tqdm(blocks, desc="reading", unit="block", disable=None, delay=1):
        for name, module in modules.items():
            for leaf in leaves[name]:
                array = _float64(arrays[f"MixerBlock_{block}/{module}/{leaf}"])
                found[f"{name}/{leaf}"].append(float(np.linalg.norm(array)))
    return found


def scale(weights: Sequence[np.ndarray]) -> tuple[float, bool]:
    """One colour scale for all: its end on either side of zero, and whether some weights lie beyond."""
    sizes = np.abs(np.concatenate([w.ravel() for w in weights]))
    sizes = sizes[np.isfinite(sizes)]
    largest = float(sizes.max(initial=0))
    limit = float(np.quantile(sizes, 1 - BEYOND)) if largest else 1.0
    return limit or largest, largest > (limit or largest)


def run(arguments: argparse.Namespace) -> None:
    """The command: `arguments` has source, picture, what, only, units, force and the reading options."""
    if arguments.what == "stem" and arguments.only:
        arguments.usage("--only chooses blocks, and the stem is in none")
    if arguments.what == "norms" and arguments.units:
        arguments.usage("--units chooses units, and norms are of whole arrays")
    _need_matplotlib()
    path = arguments.picture
    check_path(path, source=arguments.source, force=arguments.force)
    checkpoint = read_asked(arguments)
    if arguments.what == "tokens":
        figure = draw_tokens(checkpoint, blocks=arguments.only, units=arguments.units)
    elif arguments.what == "stem":
        figure = draw_stem(checkpoint, units=arguments.units)
    else:
        figure = draw_norms(checkpoint, blocks=arguments.only)
    save(figure, path, force=arguments.force)
    print(f"{path}: {figure.get_suptitle()}")


def check_path(path: Path, *, source: str = "", force: bool = False) -> None:
    """Raise CheckpointError unless a picture of this name can be written."""
    if path.suffix.lower() not in ENDINGS:
        raise CheckpointError(f"{path}: a picture ends in {', '.join(ENDINGS[:-1])} or {ENDINGS[-1]}")
    if path.exists() and os.path.exists(source) and path.samefile(source):
        raise CheckpointError(f"{path}: is the checkpoint itself; give another name")
    check_writable(path, force=force)


def save(figure: "Figure", path: Path, *, force: bool = False) -> None:
    """Write a figure, whole or not at all, in the format that the ending says."""
    check_path(path, force=force)
    kind, content = path.suffix.lower()[1:], io.BytesIO()
    undated = {"png": None, "pdf": {"CreationDate": None}, "svg": {"Date": None}}[kind]
    figure.savefig(content, format=kind, metadata=undated)
    with whole_or_nothing(path, size=content.getbuffer().nbytes, force=force) as written:
        written.write_bytes(content.getbuffer())


def _finite(weights: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(weights), weights, 0)


def _bad(weights: Iterable[np.ndarray]) -> str:
    count = sum(int((~np.isfinite(w)).sum()) for w in weights)
    return f" In yellow: {count} that are NaN or infinite." if count else ""


def _need_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise ImportError("drawing needs Matplotlib: pip install 'mixer-jax[images]'") from None


def _float64(array: object) -> np.ndarray:
    return np.asarray(array).astype(np.float64)


def _blocks(checkpoint: Checkpoint, blocks: Sequence[int]) -> list[int]:
    count = checkpoint.sizes["num_blocks"]
    if wrong := [block for block in blocks if not 0 <= block < count]:
        raise CheckpointError(f"{checkpoint.source}: no {_listed(wrong)}: it has blocks 0 to {count - 1}")
    return list(blocks)


def _listed(blocks: Sequence[int]) -> str:
    if len(blocks) > 12:
        return f"{len(blocks)} blocks"
    return f"block{'s' if len(blocks) > 1 else ''} {', '.join(map(str, blocks))}"


def _name(checkpoint: Checkpoint) -> str:
    """The file and its folder: several published files share a name."""
    return "/".join(Path(os.fsencode(checkpoint.source).decode(errors="replace")).parts[-2:])


def _first(groups: Groups, units: int | None) -> Groups:
    """The groups with the first so many units."""
    kept: Groups = []
    left = sum(map(len, groups)) if units is None else units
    for group in groups:
        if left > 0:
            kept.append(group[:left])
            left -= len(group)
    return kept


def _of(units: int | None, count: int) -> str:
    return f"All {count}" if units is None or units >= count else f"The first {units} of {count}"


DPI = 128  # a power of two, so that sizes in inches are whole pixels again
WIDTH, HEIGHT = 1500, 1000  # what the grids of a sheet have room in, and the proportions they come close to


@dataclass(frozen=True)
class Panel:
    title: str
    cells: np.ndarray  # (n, h, w, 3) uint8
    groups: Groups  # of cells
    gap: int  # its grey


@dataclass(frozen=True)
class Bar:
    colours: object
    limit: float
    clipped: bool
    label: str


def montage(panel: Panel, *, columns: int, zoom: int) -> np.ndarray:
    """Groups in rows of `columns`: thin gaps in a group, wide ones between; every weight is zoom x zoom pixels."""
    _, height, width, _ = panel.cells.shape
    size = max(map(len, panel.groups))
    tall, wide, step = _steps(height, width, size, zoom)
    rows = math.ceil(len(panel.groups) / columns)
    gap = 3 * _thin(zoom)
    picture = np.full((gap + rows * tall, gap + columns * wide, 3), panel.gap, np.uint8)
    for at, group in enumerate(panel.groups):
        for place, index in enumerate(group):
            top, left = gap + at // columns * tall, gap + at % columns * wide + place * step
            cell = panel.cells[index].repeat(zoom, axis=0).repeat(zoom, axis=1)
            picture[top : top + height * zoom, left : left + width * zoom] = cell
    return picture


def _thin(zoom: int) -> int:
    return min(max(1, zoom // 2), 3)


def _steps(height: int, width: int, size: int, zoom: int) -> tuple[int, int, int]:
    """Pixels from group to group, downwards and to the right, and from cell to cell within."""
    thin = _thin(zoom)
    step = width * zoom + thin
    return height * zoom + 3 * thin, size * step + 2 * thin, step


def _sheet(panels: list[Panel], *, heading: str, note: str, bar: Bar) -> "Figure":
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    across = min(len(panels), 3)
    down = math.ceil(len(panels) / across)
    groups, size = max(len(p.groups) for p in panels), max(len(g) for p in panels for g in p.groups)
    _, height, width, _ = panels[0].cells.shape

    def extent(columns: int, zoom: int) -> tuple[int, int]:
        tall, wide, _ = _steps(height, width, size, zoom)
        return across * columns * wide, down * math.ceil(groups / columns) * tall

    def off(columns: int) -> float:
        wide, tall = extent(columns, 8)
        return abs(math.log(wide / tall * HEIGHT / WIDTH)) + 16 * (-groups % columns) / groups  # few places left empty

    columns = min(range(1, groups + 1), key=off)
    fits = [z for z in range(1, 17) if extent(columns, z)[0] <= WIDTH and extent(columns, z)[1] <= HEIGHT]
    zoom = max(fits, default=1)
    pictures = [montage(panel, columns=columns, zoom=zoom) for panel in panels]
    tall, wide = pictures[0].shape[:2]

    margin, between, titles, beside = 28, 40, 34 if panels[0].title else 0, 150
    total_width = max(across * wide + (across - 1) * between + margin + beside, 760, 13 * len(heading) + 2 * margin)
    lines = textwrap.wrap(note, total_width // 9)
    top = 62 + 24 * len(lines)
    total_height = top + down * (titles + tall) + (down - 1) * margin + margin
    figure = Figure(figsize=(total_width / DPI, total_height / DPI), dpi=DPI)

    def place(left: float, above: float, wide: float, tall: float) -> tuple[float, float, float, float]:
        return left / total_width, 1 - (above + tall) / total_height, wide / total_width, tall / total_height

    figure.suptitle(heading, x=margin / total_width, y=1 - 18 / total_height, ha="left", va="top", size=12, parse_math=False)
    text = figure.text(margin / total_width, 1 - 50 / total_height, "\n".join(lines), va="top", size=9, color="0.35")
    text.set_linespacing(1.3)
    for at, (panel, picture) in enumerate(zip(panels, pictures)):
        left, above = margin + at % across * (wide + between), top + titles + at // across * (titles + tall + margin)
        axes = figure.add_axes(place(left, above, picture.shape[1], picture.shape[0]))
        axes.imshow(picture, interpolation="none", aspect="auto")
        axes.set_title(panel.title, loc="left", size=11)
        axes.set_axis_off()
    left = margin + across * wide + (across - 1) * between + 30
    axes = figure.add_axes(place(left, top + titles, 18, max(min(tall, 420), 150)))
    mappable = ScalarMappable(Normalize(-bar.limit, bar.limit), bar.colours)  # type: ignore[arg-type]
    figure.colorbar(mappable, cax=axes, extend="both" if bar.clipped else "neither")
    axes.tick_params(labelsize=8)
    axes.set_ylabel(bar.label, size=9)
    return figure
