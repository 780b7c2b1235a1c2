"""{name: array} of one layout -> {name: array} of another. Pure, and strict on both sides."""

__all__ = ["convert", "detect", "from_canonical", "plan", "shapes", "sizes_of", "to_canonical"]

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

from .arrays import Array, Arrays, item, rearranged, reshaped, stacked
from .errors import CheckpointError
from .layouts import BLOCK_MODULES, FOREIGN, GOOGLE, LAYOUTS, MODULES, Layout

Sizes = dict[str, int]


class Slot(NamedTuple):
    """One array's place in a Mixer, whatever a layout calls it."""

    module: str
    leaf: int  # 0 the weight, 1 the bias
    block: int | None = None  # None outside the blocks, and where the blocks are an axis


def convert(arrays: Arrays, source: Layout, target: Layout) -> dict[str, Array]:
    """The same weights in the names and axes of `target`. Raises CheckpointError where a name or a shape does not fit."""
    return from_canonical(to_canonical(arrays, source), target)


def to_canonical(arrays: Arrays, layout: Layout) -> dict[str, Array]:
    """The weights in google's names and axes, sorted by name as Google's files are."""
    sizes = sizes_of(arrays, layout)
    placed = {slot: reshaped(arrays[name], shape_of(slot, layout, sizes)) for name, slot in _names(layout, sizes).items()}

    def array(slot: Slot) -> Array:
        if layout.stacked and slot.block is not None:
            return item(placed[slot._replace(block=None)], slot.block)
        return placed[slot]

    google = _names(GOOGLE, sizes)
    return {name: rearranged(array(google[name]), *_both_axes(layout, GOOGLE, google[name])) for name in sorted(google)}


def from_canonical(canonical: Arrays, layout: Layout) -> dict[str, Array]:
    """The weights in another layout, from google's names and axes, in the order of the forward pass."""
    sizes = sizes_of(canonical, GOOGLE)
    placed = {slot: canonical[name] for name, slot in _names(GOOGLE, sizes).items()}

    def array(slot: Slot) -> Array:
        return rearranged(placed[slot], *_both_axes(GOOGLE, layout, slot))

    def blocks(slot: Slot) -> list[Array]:
        return [array(slot._replace(block=i)) for i in range(sizes["num_blocks"])]

    return {
        name: stacked(blocks(slot)) if layout.stacked and slot.module in BLOCK_MODULES else array(slot)
        for name, slot in _names(layout, sizes).items()
    }


def plan(arrays: Arrays, source: Layout, target: Layout) -> list[tuple[str, str, str]]:
    """What `convert` does to each array of the target: its source's name, its own, and the axes of both."""
    sizes = sizes_of(arrays, source)

    def name(layout: Layout, slot: Slot) -> str:
        return _template(layout, slot) if slot.block is None and slot.module in BLOCK_MODULES else _name(layout, slot)

    rows = []
    for slot in _slots(source if target.stacked else target, sizes):
        before, after = _both_axes(source, target, slot)
        if slot.module in BLOCK_MODULES:
            before, after = "l " * source.stacked + before, "l " * target.stacked + after
        rows.append(
            (name(source, slot), name(target, slot._replace(block=None) if target.stacked else slot), f"{before} -> {after}")
        )
    return rows


def detect(names: Collection[str]) -> Layout:
    """The layout whose names these are, or nearly are. Raises CheckpointError if no block of a Mixer is among them."""
    best = max(_spelt(), key=lambda layout: len(_block_names(names, layout)))
    if not _block_names(names, best):
        what = next((what for what, marks in FOREIGN.items() if any(n.startswith(marks) for n in names)), None)
        raise CheckpointError(
            f"not a Mixer checkpoint: {f'it looks like {what}' if what else 'no array of a Mixer block is in it'}\n"
            f"  found: {_some(names)}\n"
            f"  wanted, for example: {', '.join(_example(layout) for layout in LAYOUTS.values())}"
        )
    return best


def is_block_name(name: str) -> bool:
    """Whether it names an array of a Mixer block in any layout."""
    return any(_block_names([name], layout) for layout in _spelt())


def sizes_of(arrays: Arrays, layout: Layout) -> Sizes:
    """The sizes of the model, read off the arrays. Raises CheckpointError unless every name and every shape fits."""
    sizes: Sizes = {"num_blocks": _num_blocks(arrays, layout), "num_classes": int(_has_head(arrays, layout))}
    wanted = _names(layout, sizes)
    missing, unknown = wanted.keys() - arrays.keys(), arrays.keys() - wanted.keys()
    if missing or unknown:
        lines = [f"not a Mixer checkpoint in the {layout.name} layout"]
        lines += [f"  missing: {_some(missing)}"] if missing else []
        lines += [f"  unknown: {_some(unknown)}"] if unknown else []
        raise CheckpointError("\n".join(lines))

    votes: dict[str, Counter[int]] = defaultdict(Counter)
    wrong = []
    for name, slot in wanted.items():
        axes, shape = _axis_sizes(layout, slot), tuple(arrays[name].shape)
        if "1" in axes and len(axes) != len(shape):  # the axis is absent or repeated: only the rest says something
            axes, shape = [size for size in axes if size != "1"], _without_ones(shape)
        if len(axes) == len(shape):
            for size, length in zip(axes, shape):
                votes[size][length] += 1
        else:
            wrong.append(f"  {name}: found {tuple(arrays[name].shape)}, wanted the axes ({', '.join(axes)})")
    sizes = sizes | {size: votes[size].most_common(1)[0][0] for size in votes if size not in ("1", "num_blocks")}

    for name, slot in wanted.items() if not wrong else ():
        shape, found = shape_of(slot, layout, sizes), tuple(arrays[name].shape)
        loose = "1" in _axis_sizes(layout, slot) and _without_ones(found) == _without_ones(shape)
        if found != shape and not loose:
            wrong.append(f"  {name}: found {found}, wanted {shape}")
    if wrong:
        what = "not a Mixer checkpoint: shapes do not fit"
        if _is_gated(arrays, layout):
            what = "a gMixer, not an MLP-Mixer: its MLPs are gated, the second product takes half of what the first gives"
        raise CheckpointError("\n".join([what, *wrong[:4], *([f"  ... ({len(wrong)} in all)"] if len(wrong) > 4 else [])]))
    return sizes


def shapes(layout: Layout, sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Every array's name and shape for a model of these sizes."""
    return {name: shape_of(slot, layout, sizes) for name, slot in _names(layout, sizes).items()}


def shape_of(slot: Slot, layout: Layout, sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(1 if size == "1" else sizes[size] for size in _axis_sizes(layout, slot))


def _spelt() -> list[Layout]:
    """Every layout, and every other spelling that is read."""
    return [spelling for layout in LAYOUTS.values() for spelling in (layout, *layout.spellings)]


def _names(layout: Layout, sizes: Mapping[str, int]) -> dict[str, Slot]:
    return {name: slot for slot in _slots(layout, sizes) for name in [_name(layout, slot)]}


def _slots(layout: Layout, sizes: Mapping[str, int]) -> Iterator[Slot]:
    blocks = [None] if layout.stacked else range(sizes["num_blocks"])
    yield from (Slot("stem", leaf) for leaf in (0, 1))
    yield from (Slot(module, leaf, block) for block in blocks for module in BLOCK_MODULES for leaf in (0, 1))
    yield from (Slot("pre_head_norm", leaf) for leaf in (0, 1))
    if sizes["num_classes"]:
        yield from (Slot("head", leaf) for leaf in (0, 1))


def _name(layout: Layout, slot: Slot) -> str:
    return _template(layout, slot).replace("{i}", str(slot.block))


def _template(layout: Layout, slot: Slot) -> str:
    leaf = list(layout.leaves[MODULES[slot.module][0]])[slot.leaf]
    return layout.modules[slot.module].replace("{leaf}", leaf)


def _axes(layout: Layout, slot: Slot) -> str:
    return list(layout.leaves[MODULES[slot.module][0]].values())[slot.leaf]


def _both_axes(source: Layout, target: Layout, slot: Slot) -> tuple[str, str]:
    return _axes(source, slot), _axes(target, slot)


def _axis_sizes(layout: Layout, slot: Slot) -> list[str]:
    """Which size each axis of an array has, as it lies in the layout."""
    _, fan_in, units = MODULES[slot.module]
    letters = {"h": "patch_height", "w": "patch_width", "i": fan_in, "o": units, "1": "1"}
    blocks = ["num_blocks"] if layout.stacked and slot.module in BLOCK_MODULES else []
    return blocks + [letters[axis] for axis in _axes(layout, slot).split()]


def _block_names(names: Collection[str], layout: Layout) -> list[str]:
    """Those of the names that belong to a block in this layout, whatever the block."""
    templates = {_template(layout, Slot(module, leaf)) for module in BLOCK_MODULES for leaf in (0, 1)}
    if layout.stacked:
        return [name for name in names if name in templates]
    return [name for name in names if (cut := _cut(name, layout)) and f"{cut[0]}{{i}}{cut[2]}" in templates]


def _cut(name: str, layout: Layout) -> tuple[str, int, str] | None:
    """A name as what stands before the block index, the index, and what follows."""
    before = layout.modules["token_norm"].partition("{i}")[0]
    digits = ""
    if name.startswith(before):
        rest = name[len(before) :]
        digits = rest[: len(rest) - len(rest.lstrip("0123456789"))]
    return (before, int(digits), name[len(before) + len(digits) :]) if digits else None


def _num_blocks(arrays: Arrays, layout: Layout) -> int:
    """One more than the highest block index: blocks are never renumbered, so a gap is a missing block."""
    names = _block_names(arrays, layout)
    if not layout.stacked:
        # An index beyond the number of arrays cannot be right; the cap keeps the list of missing names finite.
        return min(max((cut[1] + 1 for name in names if (cut := _cut(name, layout))), default=1), len(arrays))
    lengths = Counter(arrays[name].shape[0] for name in names if arrays[name].shape)
    return max(lengths.most_common(1)[0][0], 1) if lengths else 1


def _has_head(arrays: Arrays, layout: Layout) -> bool:
    return any(_name(layout, Slot("head", leaf)) in arrays for leaf in (0, 1))


def _is_gated(arrays: Arrays, layout: Layout) -> bool:
    if layout.stacked:
        return False
    first, second = Slot("channel_mixing/dense_0", 0, 0), Slot("channel_mixing/dense_1", 0, 0)
    given = dict(zip(_axes(layout, first).split(), arrays[_name(layout, first)].shape))
    taken = dict(zip(_axes(layout, second).split(), arrays[_name(layout, second)].shape))
    return given.get("o") == 2 * taken.get("i", 0)


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(length for length in shape if length != 1)


def _example(layout: Layout) -> str:
    return _name(layout, Slot("token_norm", 0, 0))


def _some(names: Collection[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:3]) + (f", ... ({len(listed)})" if len(listed) > 3 else "")
