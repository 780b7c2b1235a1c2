"""An Orbax folder: the item `params`, a tree whose paths are the names split at "/", and the JSON item `metadata`."""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..arrays import Array
from ..errors import CheckpointError
from ..wrappers import flattened
from . import Content

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
    arrays, others = flattened(restored["params"])
    return Content({name: np.asarray(array) for name, array in arrays.items()}, restored.get("metadata"), others)


def write(path: Path, arrays: Mapping[str, Array], metadata: Mapping[str, Any] | None) -> None:
    tree: dict[str, Any] = {}
    for name, array in arrays.items():
        *folders, leaf = name.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[leaf] = np.asarray(array)
    items = ocp.args.Composite(params=ocp.args.StandardSave(tree), metadata=ocp.args.JsonSave(dict(metadata or {})))
    try:
        with _checkpointer() as checkpointer:
            checkpointer.save(path.absolute(), args=items)
    except Exception as error:
        raise CheckpointError(f"Orbax cannot write it: {_reason(error)}") from None


@contextlib.contextmanager
def _checkpointer() -> Iterator[ocp.Checkpointer]:
    """A Checkpointer that says what is wrong by its exception, and not in the log besides."""
    log = logging.getLogger("absl")
    before, log.disabled = log.disabled, True
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            yield checkpointer
    finally:
        log.disabled = before


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
