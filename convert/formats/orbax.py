"""An Orbax folder: the item `params`, a tree whose paths are the names split at "/", and the JSON item `metadata`.

The latter has our metadata under "mixer_jax", and the CRC-32 of each array under "checksums", since Orbax has none.
"""

import contextlib
import logging
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..arrays import Arrays, as_bytes, contiguous
from ..errors import CheckpointError
from ..prefixes import flattened, nested
from . import OUR_KEY, SIGNATURE, Content, is_ours

try:
    import orbax.checkpoint as ocp
except ModuleNotFoundError:
    raise ImportError("reading and writing Orbax folders needs Orbax: pip install orbax-checkpoint") from None


def read(path: Path) -> Content:
    path = path.absolute()
    if not (path / "params").is_dir():
        raise CheckpointError("an Orbax checkpoint without the item 'params': save the parameters under that name")
    try:
        with _checkpointer() as checkpointer:
            items = {"params": ocp.args.StandardRestore()}
            if (path / "metadata").is_dir():
                items["metadata"] = ocp.args.JsonRestore()
            restored = checkpointer.restore(path, args=ocp.args.Composite(**items))
    except Exception as error:  # Orbax and TensorStore raise whatever was underneath
        raise CheckpointError(f"Orbax cannot restore it: {_reason(error)}") from None
    lazy, others = flattened(restored["params"])
    arrays = {name: np.asarray(array) for name, array in lazy.items()}
    entries = restored.get("metadata")
    if is_ours(entries):
        return Content(arrays, _verified(entries, arrays), others, verified=True)
    return Content(arrays, None, others)


def write(path: Path, arrays: Arrays, metadata: Mapping[str, Any]) -> None:
    values = {name: np.asarray(array) for name, array in arrays.items()}
    checksums = {name: _checksum(array) for name, array in values.items()}
    entries = {OUR_KEY: dict(metadata), "checksums": checksums} | SIGNATURE
    items = ocp.args.Composite(params=ocp.args.StandardSave(nested(values)), metadata=ocp.args.JsonSave(entries))
    try:
        with _checkpointer() as checkpointer:
            checkpointer.save(path.absolute(), args=items)
    except Exception as error:
        raise CheckpointError(f"Orbax cannot write it: {_reason(error)}") from None


def _verified(entries: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Mapping[str, Any]:
    """Our metadata. Raises CheckpointError unless the arrays are the ones that were written with it."""
    try:
        metadata, checksums = entries[OUR_KEY], dict(entries["checksums"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"a damaged item 'metadata' ({type(error).__name__}: {error})") from None
    wrong = [name for name in arrays.keys() | checksums.keys() if name not in arrays or name not in checksums]
    wrong = wrong or [name for name, array in arrays.items() if _checksum(array) != checksums[name]]
    if wrong:
        raise CheckpointError(f"{min(wrong)}: not what was written (CRC-32): write or copy the folder again")
    return metadata


def _checksum(array: np.ndarray) -> str:
    return f"{zlib.crc32(as_bytes(contiguous(array)), zlib.crc32(f'{array.dtype.name} {array.shape}'.encode())):08x}"


@contextlib.contextmanager
def _checkpointer() -> Iterator[ocp.Checkpointer]:
    """A Checkpointer that reports errors by exceptions alone, not in the log as well."""
    log = logging.getLogger("absl")
    before, log.disabled = log.disabled, True
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            yield checkpointer
    finally:
        log.disabled = before


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
