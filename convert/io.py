"""read and write: between files and Checkpoints."""

__all__ = ["ReadOptions", "read", "usual_layout", "write"]

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .arrays import Array, Arrays, LazyArray, is_by_item, mapped, read_array, unequal_names
from .atomic import atomic_write
from .checkpoint import Checkpoint
from .config import Gelu, Size, usual_depth
from .errors import CheckpointError
from .formats import Format, format_for_writing, format_of_file, is_orbax
from .hub_config import CONFIG_FILE, OPTION, config_for, configured, is_in_hub_cache
from .identity import sha256_of
from .locate import locate, step_note
from .metadata import Metadata, add_checksum, verify_checksum
from .prefixes import metadata_for
from .published import file_named, is_published, nearest, with_hash


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """How to read a file, where the file leaves something open or is to be overruled.

    `variant` fails unless the checkpoint is, say, "B/16". `num_blocks` confirms a depth that no published Mixer of these
    widths has. `image_size` is the input size in pixels, needed when the patch grid is not square. `gelu`,
    `layer_norm_epsilon` and `preprocessing` override the file's. `dtype` casts the weights, and is needed for float64 unless
    `allow_float64`. `allow_nonfinite` accepts NaN and infinity in the weights. `key` selects one of several sets of weights in
    the file, and `step` one of several checkpoints in a folder.
    """

    variant: str | None = None
    num_blocks: int | None = None
    image_size: int | Size | None = None
    gelu: Gelu | None = None
    layer_norm_epsilon: float | None = None
    preprocessing: str | None = None
    dtype: str | np.dtype | None = None
    allow_float64: bool = False
    allow_nonfinite: bool = False
    key: str | None = None
    step: int | None = None


def read(source: str | os.PathLike[str], options: ReadOptions = ReadOptions()) -> Checkpoint:
    """The checkpoint in a file or an Orbax folder, in any layout and format; values are read when they are needed.

    The name of a published file, "imagenet1k/Mixer-B_16" or "hf:owner/name", is downloaded unless it is in the cache.

    Raises CheckpointError, naming the file and every fault; NaN and infinity are found when their array is read. Warns
    (NumericsAssumed) if the numerics are a guess.
    """
    path = _local(source)
    try:
        checkpoint = _checked(_open(path, options), options)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    checkpoint.warn_of_assumed_numerics(stacklevel=3)
    return checkpoint if options.dtype is None else checkpoint.astype(options.dtype)


def _local(source: str | os.PathLike[str]) -> Path:
    """The path of a source, downloaded first if it is the name of a published file."""
    if isinstance(source, str) and not os.path.exists(source):
        if is_published(source):
            from .download import download  # imports the network's libraries

            return download(source)
        if re.match(r"\w+://", source):
            raise CheckpointError(
                f"{source}: an address, not a file: download it and give its path, or give the name of a published file"
            )
    return Path(source)


def _open(source: Path, options: ReadOptions) -> Checkpoint:
    path = locate(source, options.step)
    if not path.exists():
        known = "" if path.suffix else "; published checkpoints, nearest first:\n  " + "\n  ".join(nearest(str(path)))
        raise CheckpointError(f"no such file or folder{known}")
    content = format_of_file(path).read(path)
    if not content.arrays:
        raise CheckpointError("no arrays in it" + (f", only {', '.join(content.others[:5])}" if content.others else ""))
    metadata = content.metadata if content.metadata is not None else metadata_for(options.key, content.inner)
    fields, arrays = verify_checksum(metadata or {}), _errors_name(content.arrays, path)
    checkpoint = Checkpoint.recognised(arrays, key=options.key, fields=fields, source=str(path), others=content.others)
    checkpoint = replace(checkpoint, verified=content.verified, notes=(*step_note(source, path), *checkpoint.notes))
    if config := config_for(path, source):
        names = ("gelu", "layer_norm_epsilon", "image_size", "preprocessing")
        overridden = {name for name in names if getattr(options, name) is not None}
        try:
            checkpoint = configured(checkpoint, config, overridden)
        except CheckpointError as error:
            remedy = "" if str(error).endswith(OPTION) else f"; if {CONFIG_FILE} is not about these weights, move it away"
            raise CheckpointError(f"{error}{remedy}") from None
    elif is_in_hub_cache(path):
        checkpoint = replace(checkpoint, notes=(*checkpoint.notes, f"no {CONFIG_FILE} lies beside these weights of the hub"))
        if "preprocessing" not in checkpoint.explicit:
            unstated = replace(checkpoint.metadata, preprocessing=None)
            origins = {"preprocessing": f"no {CONFIG_FILE} lies beside these weights of the hub to state it"}
            checkpoint = replace(checkpoint, metadata=unstated, origins={**checkpoint.origins, **origins})
    return _identified(checkpoint, path, options)


def _identified(checkpoint: Checkpoint, path: Path, options: ReadOptions) -> Checkpoint:
    """With the preprocessing of the published file that it is, by its hash, if it does not state its own.

    The file is hashed if that can decide something: it has the name of a published file, which is refused with another
    content, or published files of its sizes differ in their preprocessing.
    """
    named = file_named(path.name)
    decides = options.preprocessing is None and "preprocessing" not in checkpoint.explicit
    if named is None and not (decides and "preprocessing" in checkpoint.origins and path.is_file()):
        return checkpoint
    sha256 = sha256_of(path)
    if named is not None and not sha256.startswith(named.sha256):
        raise CheckpointError(
            f"has the name of a published file whose SHA-256 begins with {named.sha256}, but its own is {sha256}: download it "
            "again, or give it another name if it is another file"
        )
    published = named or with_hash(sha256)
    if published is None or not decides:
        return checkpoint
    identified = checkpoint.with_metadata(preprocessing=published.preprocessing)
    return replace(identified, origins={**checkpoint.origins, "preprocessing": f"{published.name}, by its SHA-256"})


def _checked(checkpoint: Checkpoint, options: ReadOptions) -> Checkpoint:
    """The checkpoint under its options, all checks made."""
    depth = options.num_blocks
    if options.variant is not None:
        checkpoint.require_variant(options.variant)
    if depth not in (None, checkpoint.sizes["num_blocks"]):
        raise CheckpointError(f"found {checkpoint.sizes['num_blocks']} blocks, wanted {depth}")
    if depth is not None and usual_depth(checkpoint.sizes) not in (None, depth):
        checkpoint = checkpoint.with_metadata(num_blocks=int(depth))  # is written too, so that one confirmation is enough
    checkpoint.require_depth()
    if checkpoint.dtype == np.float64 and options.dtype is None and not options.allow_float64:
        raise CheckpointError(
            "float64 weights, which no published Mixer has: keep them with --dtype float64 or cast them with --dtype float32; "
            "in Python that is ReadOptions(dtype='float64'), or param_dtype='float64' of load; "
            "for finetune, whose --dtype is another, cast them into a file: python -m convert convert IN OUT --dtype float32"
        )
    if options.image_size is not None:
        checkpoint = checkpoint.with_image_size(options.image_size)
    overriding = {name: getattr(options, name) for name in ("gelu", "layer_norm_epsilon", "preprocessing")}
    checkpoint = checkpoint.with_metadata(**{name: value for name, value in overriding.items() if value is not None})
    return checkpoint if options.allow_nonfinite else checkpoint.require_finite()


def write(
    path: str | os.PathLike[str],
    checkpoint: Checkpoint,
    *,
    layout: str | None = None,
    dtype: str | np.dtype | None = None,
    force: bool = False,
    progress: Callable[[int], object] | None = None,
) -> None:
    """Write a checkpoint in a layout (None: its own); the ending of `path` decides the format.

    Endings: .npz, .safetensors, .pt, .pth, .msgpack, none for an Orbax folder. The file appears complete or not at all: written
    under a temporary name, read back, compared bit by bit, renamed. An existing file is replaced only with `force`, the
    checkpoint's own source never. `progress` is called with the bytes of every array, when it is written and
    when it is compared.
    """
    path = Path(path)
    format = format_for_writing(path)
    if path.exists() and os.path.exists(checkpoint.source) and path.samefile(checkpoint.source):
        raise CheckpointError(f"{path}: is the source itself; give another name")
    checkpoint = checkpoint if layout is None else checkpoint.to(layout)
    checkpoint = checkpoint if dtype is None else checkpoint.astype(dtype)
    size = checkpoint.num_parameters * checkpoint.dtype.itemsize
    omitted = Metadata.default(checkpoint.layout) if format.omits_defaults and checkpoint.layout.numerics_known else None
    below = f"/{checkpoint.layout.below_leaves}" if format.holds_variables and checkpoint.layout.below_leaves else ""
    arrays = {name + below: array for name, array in _reported(checkpoint.arrays, progress).items()}
    metadata = add_checksum(checkpoint.metadata.as_json(beyond=omitted))
    np.empty(31 << 20, np.uint8)  # freed at once: from then on glibc keeps blocks up to this size for the next array
    with atomic_write(path, size=size, folder=format.is_folder, force=force, replaceable=is_orbax_target) as temporary:
        format.write(temporary, arrays, metadata)
        _verify(path, temporary, format, arrays, metadata)


def is_orbax_target(path: Path) -> bool:
    """Whether a folder is one that `write` replaces."""
    return is_orbax(path) and path.suffix in ("", ".orbax")


def _verify(path: Path, temporary: Path, format: Format, arrays: Arrays, metadata: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless the file at `temporary` reads back as what was written."""
    content = format.read(temporary)
    wrong = unequal_names(arrays, content.arrays)
    if wrong or (content.metadata or {}) != metadata:
        raise CheckpointError(f"{path}: what was written does not read back the same: {', '.join(wrong[:3]) or 'metadata'}")


def usual_layout(path: str | os.PathLike[str]) -> str:
    """The layout that other people's code expects in the format that the ending of `path` decides."""
    return format_for_writing(Path(path)).usual_layout


def _errors_name(arrays: Arrays, path: Path) -> Arrays:
    """The arrays, with the name of the file in every error that occurs when values are read."""

    def named(array: Array) -> Array:
        def read(index: int | None) -> np.ndarray:
            try:
                return read_array(array, index)
            except CheckpointError as error:
                raise CheckpointError(f"{path}: {error}") from None

        return LazyArray(array.shape, array.dtype, read, by_item=is_by_item(array))

    return {name: named(array) for name, array in arrays.items()}


def _reported(arrays: Arrays, progress: Callable[[int], object] | None) -> Arrays:
    """The arrays, with `progress` called for the bytes of every read."""

    def report(values: np.ndarray) -> np.ndarray:
        if progress is not None:
            progress(values.nbytes)
        return values

    return {name: mapped(array, report) for name, array in arrays.items()}
