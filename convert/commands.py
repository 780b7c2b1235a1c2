"""The commands as functions for a script or a notebook: they return plain data and print nothing."""

__all__ = ["A2B", "Changes", "Comparison", "Conversion", "compare_files", "convert_file", "inspect_file", "plan_file"]

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from . import mapping
from .atomic import check_writable
from .checkpoint import Checkpoint
from .config import Size
from .errors import CheckpointError
from .formats import format_for_writing, format_of_file
from .hub_folder import mlp_factor
from .identity import ArrayDifference, differences, fingerprint, same_sizes, sha256_of
from .io import ReadOptions, read, usual_layout, write
from .labels import read_labels
from .layouts import ALIASES, GOOGLE, LAYOUTS, Layout, layout_named
from .progress import Progress
from .published import published_file, with_hash

AnyPath = str | os.PathLike[str]

NAMES = sorted({*LAYOUTS, *ALIASES} - {"google"})  # google's files are known as npz here
A2B = {f"{a}2{b}": (layout_named(a).name, layout_named(b).name) for a, b in itertools.permutations(NAMES, 2)}


@dataclass(frozen=True, kw_only=True)
class Changes:
    """What else a conversion changes, in this order.

    `drop_head` ends in features; `num_classes` makes a fresh head of zeros; `classes` selects some, by index or label, in
    their order. `labels` is a file of class names, one a line, to travel with the weights. `image_size` is a new input size
    in pixels, a whole multiple of the old one (paper, Appendix C), or with `resample` any, approximately.
    """

    drop_head: bool = False
    num_classes: int | None = None
    classes: Sequence[int | str] | None = None
    labels: AnyPath | None = None
    image_size: int | Size | None = None
    resample: bool = False

    def apply(self, checkpoint: Checkpoint) -> Checkpoint:
        if self.drop_head:
            checkpoint = checkpoint.without_head()
        if self.num_classes is not None:
            checkpoint = checkpoint.with_classes(self.num_classes)
        if self.classes is not None:
            checkpoint = checkpoint.with_selected_classes(_class_indices(self.classes, checkpoint))
        if self.labels is not None:
            checkpoint = checkpoint.with_metadata(labels=read_labels(self.labels, checkpoint.sizes["num_classes"]))
        if self.image_size is not None:
            checkpoint = checkpoint.resized(self.image_size, resample=self.resample)
        return checkpoint


@dataclass(frozen=True)
class Conversion:
    """A file that was written and read back; `notes` tell how it was read and what the layout's own code makes of it."""

    target: str
    layout: str
    dtype: str
    parameters: int
    arrays: int
    notes: list[str]


@dataclass(frozen=True)
class Comparison:
    """How two files differ: in which arrays, of how many, and in which metadata that matters to logits.

    `fingerprint` is that of both, None where arrays differ.
    """

    differences: list[ArrayDifference]
    arrays: int
    numerics: list[str]
    fingerprint: str | None


def convert_file(
    source: AnyPath,
    target: AnyPath,
    *,
    layout: str | None = None,
    source_layout: str | None = None,
    reading: ReadOptions = ReadOptions(),
    changes: Changes = Changes(),
    force: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """Write a checkpoint in another layout (None: the usual one of the format), in the format of the ending of `target`.

    `source_layout` fails unless the source is in that layout. `force` replaces an existing target.
    """
    format = format_for_writing(Path(target))
    check_writable(Path(target), force=force, folder=format.is_folder)  # before anything is read
    end = layout_named(layout or usual_layout(target))
    checkpoint = _changed(source, end, source_layout, reading, changes).to(end)
    total, done = 2 * checkpoint.num_parameters * checkpoint.dtype.itemsize, 0  # written, then compared

    def count(size: int) -> None:
        nonlocal done
        done += size
        if progress is not None:
            progress(done, total)

    write(target, checkpoint, force=force, progress=count)
    facts = end.name, checkpoint.dtype.name, checkpoint.num_parameters, len(checkpoint.arrays)
    return Conversion(str(target), *facts, _notes(checkpoint))


def plan_file(
    source: AnyPath,
    *,
    layout: str,
    source_layout: str | None = None,
    reading: ReadOptions = ReadOptions(),
    changes: Changes = Changes(),
) -> list[dict[str, str]]:
    """What `convert_file` does to each array: its name in source and target, its axes in both, its dtype."""
    end = layout_named(layout)
    start = _changed(source, end, source_layout, reading, changes)
    rows = mapping.plan(start.arrays, start.layout, end)
    return [{"source": old, "target": new, "axes": axes, "dtype": start.dtype.name} for old, new, axes in rows]


def inspect_file(source: AnyPath, *, reading: ReadOptions = ReadOptions()) -> dict[str, Any]:
    """What a checkpoint is; "arrays" has a row for each array. Reads all of it, NaN and infinity too."""
    checkpoint = read(source, replace(reading, allow_float64=True, allow_nonfinite=True))
    metadata, sizes = checkpoint.metadata, checkpoint.sizes
    arrays = [{"array": name} | _statistics(np.asarray(array)) for name, array in checkpoint.arrays.items()]
    nan, infinite = (sum(row[kind] for row in arrays) for kind in ("NaN", "infinite"))

    def origin(field: str) -> str:
        if getattr(reading, field, None) is not None:
            return "given as an option"
        default = "explicit" if field in checkpoint.explicit else f"{checkpoint.layout.name}'s default"
        return checkpoint.origins.get(field, default)

    return {
        "layout": checkpoint.layout.name,
        "format": format_of_file(Path(checkpoint.source)).name,
        **_variant_and_grid(checkpoint),
        "patch": f"{sizes['patch_height']}x{sizes['patch_width']} pixels of {sizes['in_channels']} channels",
        "tokens": sizes["num_tokens"],
        "blocks": sizes["num_blocks"],
        "hidden_dim": sizes["hidden_dim"],
        "tokens_mlp_dim": sizes["tokens_mlp_dim"],
        "channels_mlp_dim": sizes["channels_mlp_dim"],
        "classes": sizes["num_classes"] or "none: no head",
        "labels": f"{len(metadata.labels)} ({origin('labels')})" if metadata.labels else "none",
        "dtype": checkpoint.dtype.name,
        "parameters": checkpoint.num_parameters,
        "nonfinite": f"{nan} NaN, {infinite} infinite" if nan or infinite else "none",
        "gelu": f"{metadata.gelu} ({origin('gelu')})",
        "layer_norm_epsilon": f"{metadata.layer_norm_epsilon:g} ({origin('layer_norm_epsilon')})",
        "preprocessing": f"{metadata.preprocessing or 'unknown'} ({origin('preprocessing')})",
        "integrity": "as written, by the file's checksums"
        if checkpoint.verified
        else "cannot be verified: the file has no checksums, so a flipped bit would be a wrong weight",
        "published": _published(source, checkpoint),
        "fingerprint": fingerprint(checkpoint.arrays, checkpoint.layout),
        "also in the file": list(checkpoint.beside) or "nothing",
        "notes": list(checkpoint.notes) or "none",
        "arrays": arrays,
    }


def compare_files(first: AnyPath, second: AnyPath, *, reading: ReadOptions = ReadOptions()) -> Comparison:
    """Which arrays of two checkpoints, in any layouts and formats, are not bit-equal, and which of their numerics differ."""
    checkpoints = read(first, reading), read(second, reading)
    left, right = (mapping.to_canonical(checkpoint.arrays, checkpoint.layout) for checkpoint in checkpoints)
    unequal = list(differences(left, right))
    fields = ("gelu", "layer_norm_epsilon", "image_size", "preprocessing")
    numerics = checkpoints[0].metadata.differences(checkpoints[1].metadata, fields)
    return Comparison(unequal, len(left.keys() | right.keys()), numerics, None if unequal else fingerprint(left, GOOGLE))


def _changed(source: AnyPath, end: Layout, source_layout: str | None, reading: ReadOptions, changes: Changes) -> Checkpoint:
    """The changed checkpoint, in its own layout."""
    checkpoint = read(source, reading)
    if source_layout and checkpoint.layout != layout_named(source_layout):
        verbs = [verb for verb, pair in A2B.items() if pair == (checkpoint.layout.name, end.name)]
        raise CheckpointError(
            f"{source}: is in the {checkpoint.layout.name} layout, not {source_layout}: use "
            + " or ".join([*verbs[:2], f"--to {end.name}"])
        )
    return changes.apply(checkpoint)


def _class_indices(classes: Sequence[int | str], checkpoint: Checkpoint) -> list[int]:
    """Classes given by index, as a number or in digits, or by label."""
    labels, last = checkpoint.metadata.labels, checkpoint.sizes["num_classes"] - 1
    known: dict[int | str, int] = {label: index for index, label in enumerate(labels or ())}
    unknown = [item for item in classes if item not in known and not str(item).isdecimal()]
    if unknown:
        remedy = f"indices from 0 to {last}"
        remedy = f"give {remedy} or labels of the file" if labels else f"this file has no labels, so give {remedy}"
        raise CheckpointError(f"no class {unknown[0]!r}: {remedy}")
    ambiguous = [item for item in classes if item in known and (labels or ()).count(str(item)) > 1]
    if ambiguous:
        raise CheckpointError(f"several classes are called {ambiguous[0]!r}: give their indices, from 0 to {last}")
    return [known[item] if item in known else int(item) for item in classes]


def _notes(checkpoint: Checkpoint) -> list[str]:
    """What a user should know of a file in this layout."""
    layout, metadata = checkpoint.layout, checkpoint.metadata
    notes = [
        *(f"note: {note}" for note in checkpoint.notes),
        *([f"also in the file, and not converted: {', '.join(checkpoint.beside)}"] if checkpoint.beside else []),
        f"numerics: {metadata.gelu} GELU, LayerNorm epsilon {metadata.layer_norm_epsilon:g}; mixer_jax finds them in the file",
    ]
    if metadata.preprocessing is None and "preprocessing" in checkpoint.origins:
        notes.append(f"preprocessing unknown: {checkpoint.origins['preprocessing']}; --preprocess chooses")
    if metadata.gelu != layout.gelu:
        remedy = layout.tanh_remedy if metadata.gelu == "tanh" else ""
        notes.append(
            f"{layout.name}'s own code computes the {layout.gelu} GELU: logits would be off, of B/16 by about 5e-4 of their "
            "spread" + (f"; {remedy} makes them equal" if remedy else "")
        )
    if metadata.layer_norm_epsilon != layout.layer_norm_epsilon:
        notes.append(
            f"{layout.name}'s own code has the epsilon {layout.layer_norm_epsilon:g}: logits would be off, of B/16 by about "
            f"1e-5 of their spread; its LayerNorms with eps={metadata.layer_norm_epsilon:g} make them equal"
        )
    if layout.size_arguments and (arguments := _timm_arguments(checkpoint)):
        notes.append(f"{layout.name}'s own code needs {layout.size_arguments.format(**arguments)} for these weights")
    if layout.note_without_head and not checkpoint.sizes["num_classes"]:
        notes.append(layout.note_without_head)
    return notes


def _timm_arguments(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The widths as factors of hidden_dim, and the image size; None where they are timm's defaults."""
    try:
        config = checkpoint.config
    except CheckpointError:  # the grid is unknown
        return None
    ratio = tuple(mlp_factor(width, config.hidden_dim) for width in (config.tokens_mlp_dim, config.channels_mlp_dim))
    if (ratio, config.image_size) == ((0.5, 4.0), (224, 224)):
        return None
    height, width = config.image_size
    return {"mlp_ratio": ratio, "image_size": height if height == width else (height, width)}


def _published(source: AnyPath, checkpoint: Checkpoint) -> str:
    """Which published file it is: by its hash, or else by the name that it was downloaded with, if that is so."""
    file = Path(checkpoint.source)
    sha256 = sha256_of(file) if file.is_file() else None
    by_hash, by_name = with_hash(sha256 or "none"), published_file(str(source))
    if not (published := by_hash or by_name):
        return "not known: " + (f"the SHA-256 {sha256} is that of no file known here" if sha256 else "a folder has no hash")
    top1 = f"top-1 {published.top1} % on ImageNet's validation images" if published.top1 else ""
    copy = f"the weights of {published.copy_of}" if published.copy_of else ""
    how = "by its SHA-256" if by_hash else "by the name it was given with, which says nothing of its content"
    return "; ".join(filter(None, (f"{published.name}, {how}", copy, top1, published.note)))


def _variant_and_grid(checkpoint: Checkpoint) -> dict[str, Any]:
    unnamed, unpublished = "none of the published ones", "none of the published files"
    try:
        config = checkpoint.config
    except CheckpointError as error:
        return {"variant": unnamed, "sizes match": unpublished, "grid": f"unknown: {error}"}
    (rows, columns), (height, width) = config.grid, config.image_size
    origin = "explicit" if checkpoint.metadata.image_size else "assumed, being square"
    return {
        "variant": config.variant or unnamed,
        "sizes match": same_sizes(config) or unpublished,
        "grid": f"{rows}x{columns} ({origin}), images of {height}x{width} pixels",
    }


def _statistics(array: np.ndarray) -> dict[str, Any]:
    values = array.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        norm = f"{np.sqrt((values**2).sum()):.6g}"
    return {
        "shape": "x".join(map(str, values.shape)),
        "norm": norm,
        "zeros": f"{(values == 0).mean():.2%}",
        "NaN": int(np.isnan(values).sum()),
        "infinite": int(np.isinf(values).sum()),
    }
