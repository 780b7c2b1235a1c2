"""{name: array} of one layout -> {name: array} of another. Every name and every shape is checked."""

__all__ = ["detect", "from_canonical", "plain", "plan", "respelled", "shapes", "sizes_of", "slots", "to_canonical"]

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

from .arrays import Array, Arrays, item, rearranged, reshaped, stacked
from .errors import CheckpointError
from .layouts import BIAS, BLOCK_MODULES, FOREIGN, GOOGLE, LAYOUTS, MODULES, WEIGHT, Layout

Sizes = dict[str, int]


class Slot(NamedTuple):
    """One array's place in a Mixer, whatever a layout calls it."""

    module: str
    leaf: int  # WEIGHT or BIAS
    block: int | None = None  # None outside the blocks, and where the blocks are an axis


def to_canonical(arrays: Arrays, layout: Layout) -> dict[str, Array]:
    """The weights in google's names and axes, sorted by name as Google's files are."""
    sizes = sizes_of(arrays, layout)
    placed = {slot: reshaped(arrays[name], shape_of(slot, layout, sizes)) for name, slot in slots(layout, sizes).items()}

    def canonical(slot: Slot) -> Array:
        stacked_blocks = placed.get(slot._replace(block=None))
        array = placed[slot] if stacked_blocks is None or slot.block is None else item(stacked_blocks, slot.block)
        return rearranged(array, _axes(layout, slot), _axes(GOOGLE, slot))

    return {name: canonical(slot) for name, slot in sorted(slots(GOOGLE, sizes).items())}


def from_canonical(canonical: Arrays, layout: Layout) -> dict[str, Array]:
    """The weights in another layout, from google's names and axes, in the order of the forward pass."""
    sizes = sizes_of(canonical, GOOGLE)
    placed = {slot: canonical[name] for name, slot in slots(GOOGLE, sizes).items()}

    def array(slot: Slot) -> Array:
        if slot not in placed:
            return stacked([array(slot._replace(block=i)) for i in range(sizes["num_blocks"])])
        return rearranged(placed[slot], _axes(GOOGLE, slot), _axes(layout, slot))

    return {name: array(slot) for name, slot in slots(layout, sizes).items()}


def plan(arrays: Arrays, source: Layout, target: Layout) -> list[tuple[str, str, str]]:
    """What a conversion does to each array: its name in the source and in the target, and its axes in both."""

    def axes(layout: Layout, slot: Slot) -> str:
        return ("l " if layout.stacked and slot.module in BLOCK_MODULES else "") + _axes(layout, slot)

    every_slot = _all_slots(source if target.stacked else target, sizes_of(arrays, source))
    return [(_name(source, x), _name(target, x), f"{axes(source, x)} -> {axes(target, x)}") for x in every_slot]


def detect(names: Collection[str]) -> Layout:
    """The layout whose names these are, or nearly are, whatever separates their parts.

    Raises CheckpointError if no block of a Mixer is among them.
    """
    spelled = [plain(name) for name in names]
    best = max(_spellings(), key=lambda layout: len(_block_names(spelled, _plain_layout(layout))))
    if not _block_names(spelled, _plain_layout(best)):
        examples = [_name(layout, Slot("token_norm", WEIGHT, 0)) for layout in LAYOUTS.values()]
        raise CheckpointError(
            f"not a Mixer checkpoint: {_foreign(names) or 'no array of a Mixer block is in it'}\n"
            f"  found: {_some(names)}\n"
            f"  wanted, for example: {', '.join(examples)}"
        )
    return best


def respelled(arrays: Arrays, layout: Layout) -> dict[str, Array]:
    """The arrays under the layout's own names where theirs differ only in separators or in a level below the leaves."""
    spelled = {plain(name): array for name, array in arrays.items()}
    if len(spelled) < len(arrays):
        twice = Counter(map(plain, arrays)).most_common(1)[0][0]
        raise CheckpointError(f"two arrays that are both {twice}: {_some([name for name in arrays if plain(name) == twice])}")
    counts = _counts(spelled, _plain_layout(layout))
    own = dict(zip(slots(_plain_layout(layout), counts), slots(layout, counts)))
    return {own.get(plain(name), name): array for name, array in arrays.items()}


def plain(name: str) -> str:
    """A name with "/" between all its parts, and without the level below the leaf that an NNX state has."""
    return re.sub(r"/(raw_)?value$", "", name.replace(".", "/"))


def block_prefix(name: str) -> str | None:
    """What precedes the name of a block's array in any layout, as it stands in `name`; None if it does not end in one."""
    match = _block_pattern().search(plain(name))
    return None if match is None else name[: match.start(1)]


@cache
def _block_pattern() -> re.Pattern[str]:
    layouts = [_plain_layout(layout) for layout in _spellings()]
    templates = {_template(layout, Slot(module, leaf)) for layout in layouts for module in BLOCK_MODULES for leaf in (0, 1)}
    names = "|".join(re.escape(template).replace(re.escape("{i}"), r"\d+") for template in templates)
    return re.compile(rf"(?:^|/)({names})$")


def _plain_layout(layout: Layout) -> Layout:
    return replace(layout, modules={module: plain(template) for module, template in layout.modules.items()})


def _foreign(names: Collection[str]) -> str | None:
    """Which other network the names belong to, in words."""
    spelled = [plain(name) for name in names]
    found = (network for network, pattern in FOREIGN.items() if any(re.search(pattern, name) for name in spelled))
    return next((f"it looks like {network}" for network in found), None)


def sizes_of(arrays: Arrays, layout: Layout) -> Sizes:
    """The sizes of the model. Raises CheckpointError, listing the faults, unless every name and every shape fits."""
    check_names(arrays, layout)
    sizes = infer_sizes(arrays, layout)
    check_shapes(arrays, layout, sizes)
    return sizes


def check_names(arrays: Arrays, layout: Layout) -> None:
    wanted = slots(layout, _counts(arrays, layout))
    missing, unknown = wanted.keys() - arrays.keys(), arrays.keys() - wanted.keys()
    if missing or unknown:
        other = _foreign(arrays)
        lines = [f"not a Mixer checkpoint{f': {other}' if other else f' in the {layout.name} layout'}"]
        lines += [f"  missing: {_some(missing)}"] if missing else []
        lines += [f"  unknown: {_some(unknown)}"] if unknown else []
        raise CheckpointError("\n".join(lines))


def infer_sizes(arrays: Arrays, layout: Layout) -> Sizes:
    """Each size by vote: the length that most of its axes have. A size without any axis of the right rank is left out."""
    counts = _counts(arrays, layout)
    votes: dict[str, Counter[int]] = defaultdict(Counter)
    for name, slot in slots(layout, counts).items():
        axes, shape = _axis_sizes(layout, slot), tuple(arrays[name].shape)
        if "1" in axes and len(axes) != len(shape):  # the axis is absent or repeated
            axes, shape = [size for size in axes if size != "1"], _without_ones(shape)
        if len(axes) == len(shape):
            for size, length in zip(axes, shape):
                votes[size][length] += 1
    return counts | {size: votes[size].most_common(1)[0][0] for size in votes if size not in ("1", "num_blocks")}


def check_shapes(arrays: Arrays, layout: Layout, sizes: Sizes) -> None:
    wrong = []
    for name, slot in slots(layout, sizes).items():
        axes, shape = _axis_sizes(layout, slot), tuple(arrays[name].shape)
        wanted = tuple(1 if size == "1" else sizes.get(size) for size in axes)
        same_but_for_ones = "1" in axes and _without_ones(shape) == _without_ones(wanted)
        if len(shape) != len(axes) and not same_but_for_ones:
            wrong.append(f"  {name}: found {shape}, wanted the axes ({', '.join(axes)})")
        elif shape != wanted and not same_but_for_ones:
            wrong.append(f"  {name}: found {shape}, wanted {wanted}")
    if wrong:
        what = "not a Mixer checkpoint: shapes do not fit"
        if _is_gated(arrays, layout):
            what = "a gMixer, not an MLP-Mixer: its MLPs are gated, the second matmul takes half of what the first gives"
        raise CheckpointError("\n".join([what, *wrong[:4], *([f"  ... ({len(wrong)} in all)"] if len(wrong) > 4 else [])]))


def shapes(layout: Layout, sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Every array's name and shape for a model of these sizes."""
    return {name: shape_of(slot, layout, sizes) for name, slot in slots(layout, sizes).items()}


def shape_of(slot: Slot, layout: Layout, sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(1 if size == "1" else sizes[size] for size in _axis_sizes(layout, slot))


def slots(layout: Layout, sizes: Mapping[str, int]) -> dict[str, Slot]:
    """Every array's name in a layout, and its place in a model of these sizes."""
    return {_name(layout, slot): slot for slot in _all_slots(layout, sizes)}


def _all_slots(layout: Layout, sizes: Mapping[str, int]) -> Iterator[Slot]:
    """In the order of the forward pass."""
    blocks = [None] if layout.stacked else range(sizes["num_blocks"])
    places: list[tuple[str, int | None]] = [("stem", None)]
    places += [(module, block) for block in blocks for module in BLOCK_MODULES]
    places += [("pre_head_norm", None)] + ([("head", None)] if sizes["num_classes"] else [])
    return (Slot(module, leaf, block) for module, block in places for leaf in (WEIGHT, BIAS))


def _name(layout: Layout, slot: Slot) -> str:
    return _template(layout, slot).replace("{i}", str(slot.block))


def _template(layout: Layout, slot: Slot) -> str:
    leaf = list(layout.leaves[MODULES[slot.module][0]])[slot.leaf]
    return layout.modules[slot.module].replace("{leaf}", leaf)


def _axes(layout: Layout, slot: Slot) -> str:
    return list(layout.leaves[MODULES[slot.module][0]].values())[slot.leaf]


def _axis_sizes(layout: Layout, slot: Slot) -> list[str]:
    """The name of the size that each axis of an array in a layout has."""
    _, fan_in, units = MODULES[slot.module]
    letters = {"h": "patch_height", "w": "patch_width", "i": fan_in, "o": units, "1": "1"}
    blocks = ["num_blocks"] if layout.stacked and slot.module in BLOCK_MODULES else []
    return blocks + [letters[axis] for axis in _axes(layout, slot).split()]


def _spellings() -> list[Layout]:
    """Every layout, and every other spelling that is read."""
    return [spelling for layout in LAYOUTS.values() for spelling in (layout, *layout.spellings)]


def _block_names(names: Collection[str], layout: Layout) -> list[str]:
    """Those of the names that belong to a block in this layout, whatever the block."""
    templates = {_template(layout, Slot(module, leaf)) for module in BLOCK_MODULES for leaf in (WEIGHT, BIAS)}
    return [name for name in names if _block_of(name, layout)[0] in templates]


def _block_of(name: str, layout: Layout) -> tuple[str, int]:
    """A name with "{i}" in place of the block index, and the index; the name itself and 0 if it has none."""
    start = layout.modules["token_norm"].partition("{i}")[0]
    rest = name.removeprefix(start)
    digits = rest[: len(rest) - len(rest.lstrip("0123456789"))]
    if layout.stacked or not name.startswith(start) or not digits:
        return name, 0
    return f"{start}{{i}}{rest.removeprefix(digits)}", int(digits)


def _counts(arrays: Arrays, layout: Layout) -> Sizes:
    """The two sizes that decide which arrays there are; of the classes only whether there are any.

    Blocks are one more than the highest index: they are never renumbered, so a gap is a missing block.
    """
    has_head = any(_name(layout, Slot("head", leaf)) in arrays for leaf in (WEIGHT, BIAS))
    names = _block_names(arrays, layout)
    if layout.stacked:
        lengths = Counter(arrays[name].shape[0] for name in names if arrays[name].shape)
        blocks = max(lengths.most_common(1)[0][0], 1) if lengths else 1
    else:  # an index beyond the number of arrays cannot be right; the cap keeps the list of missing names finite
        blocks = min(max((_block_of(name, layout)[1] + 1 for name in names), default=1), len(arrays))
    return {"num_blocks": blocks, "num_classes": int(has_head)}


def _is_gated(arrays: Arrays, layout: Layout) -> bool:
    if layout.stacked:
        return False
    first, second = Slot("channel_mixing/dense_0", 0, 0), Slot("channel_mixing/dense_1", 0, 0)
    given = dict(zip(_axes(layout, first).split(), arrays[_name(layout, first)].shape))
    taken = dict(zip(_axes(layout, second).split(), arrays[_name(layout, second)].shape))
    return given.get("o") == 2 * taken.get("i", 0)


def _without_ones(shape: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(length for length in shape if length != 1)


def _some(names: Collection[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:3]) + (f", ... ({len(listed)})" if len(listed) > 3 else "")
