"""Orbax folders: items that are trees of zarr arrays, listed by `_METADATA`, and items of JSON.

Read through TensorStore alone, leaf by leaf, and written by Orbax: the item `params`, a tree whose paths are the names split at
"/", and the JSON item `metadata`, which has our metadata under "mixer_jax", and the CRC-32 of each array under "checksums".
"""

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..arrays import Arrays
from ..errors import CheckpointError
from ..prefixes import nested
from . import OUR_KEY, SIGNATURE, Content, is_ours
from .zarr import bytes_inside, checksum, reason, zarr_arrays

LONGEST_JSON = 1 << 25
NO_ARRAYS = {"None", "Dict", "List", "Tuple", "NamedTuple", "scalar", "string"}  # value types of Orbax


def read(path: Path) -> Content:
    path = path.absolute()
    size = bytes_inside(path)
    others: list[str] = []
    specs: dict[str, dict[str, Any]] = {}
    trees = [path] if (path / "_METADATA").is_file() else sorted(item.parent for item in path.glob("*/_METADATA"))
    for tree in trees:
        leaves, more = _leaves(tree)
        prefix = f"{tree.name}/" if len(trees) > 1 else ""
        specs |= {prefix + name: spec for name, spec in leaves.items()}
        others += [prefix + name for name in more]
    if not trees:
        raise CheckpointError("an Orbax folder without a tree of arrays (no _METADATA in it or in an item of it)")
    items = [] if trees == [path] else sorted(item.name for item in path.iterdir() if item.is_dir() and item not in trees)
    entries = _json(path / "metadata" / "metadata") if "metadata" in items else None
    if is_ours(entries):
        items.remove("metadata")
        metadata, checksums = _ours(entries, specs)
        arrays, state = zarr_arrays(specs, size, checksums)
        return Content(arrays, metadata, [*others, *state, *items], verified=True)
    arrays, state = zarr_arrays(specs, size)
    return Content(arrays, None, [*others, *state, *items])


def write(path: Path, arrays: Arrays, metadata: Mapping[str, Any]) -> None:
    try:
        import orbax.checkpoint as ocp
    except ModuleNotFoundError:
        raise ImportError("writing Orbax folders needs Orbax: pip install orbax-checkpoint") from None
    values = {name: np.asarray(array) for name, array in arrays.items()}
    checksums = {name: checksum(array) for name, array in values.items()}
    entries = {OUR_KEY: dict(metadata), "checksums": checksums} | SIGNATURE
    items = ocp.args.Composite(params=ocp.args.StandardSave(nested(values)), metadata=ocp.args.JsonSave(entries))
    own = ocp.multihost.process_index()  # of several processes this one writes, and waits for no other
    alone = ocp.options.MultiprocessingOptions(
        primary_host=own, active_processes={own}, barrier_sync_key_prefix=f"process{own}"
    )
    handler = ocp.CompositeCheckpointHandler(composite_options=ocp.CompositeOptions(multiprocessing_options=alone))
    try:
        with silent_log(), ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
            checkpointer.save(path.absolute(), args=items)
    except Exception as error:  # Orbax and TensorStore raise whatever was underneath
        raise OSError(f"Orbax cannot write it: {reason(error)}") from None


def _leaves(tree: Path) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The TensorStore specs of a tree's arrays by path, "a/b", and the paths of all other leaves."""
    try:
        metadata = _json(tree / "_METADATA")
        leaves = [
            ([str(key["key"]) for key in leaf["key_metadata"]], leaf["value_metadata"])
            for leaf in metadata["tree_metadata"].values()
        ]
        others = ["/".join(keys) for keys, value in leaves if value["skip_deserialize"] or value["value_type"] in NO_ARRAYS]
        zarr3, random_keys = bool(metadata.get("use_zarr3")), _random_keys(tree)
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"a damaged _METADATA ({type(error).__name__}: {error})") from None
    specs: dict[str, dict[str, Any]] = {}
    store = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{tree}/"}}
    for keys, _ in leaves:
        name, stored = "/".join(keys), ".".join(keys)
        if name in specs or {"", ".", ".."} & set(stored.split("/")) or "\0" in stored:
            raise CheckpointError(f"a damaged _METADATA: a leaf called {name!r}, which is no name or stands twice")
        files = {"driver": "file", "path": f"{tree / stored}/"}
        keyed = store | {"path": f"{stored}/"} if (tree / "manifest.ocdbt").exists() else files
        specs[name] = {"driver": "zarr3" if zarr3 else "zarr", "kvstore": keyed}
    others += [name for name in specs if name.replace("/", ".") in random_keys and name not in others]
    return {name: spec for name, spec in specs.items() if name not in set(others)}, others


def _random_keys(tree: Path) -> set[str]:
    """The leaves that were random keys of JAX, with a dot for every "/"."""
    return {
        entry["array_metadata"]["param_name"].replace("/", ".")
        for file in tree.glob("array_metadatas/process_*")
        for entry in _json(file)["array_metadatas"]
        if "random_key_impl" in (entry["array_metadata"].get("ext_metadata") or {})
    }


def _json(file: Path) -> Any:
    try:
        if file.stat().st_size > LONGEST_JSON:
            raise CheckpointError(f"{file.name}: longer than {LONGEST_JSON} bytes")
        return json.loads(file.read_bytes())
    except (ValueError, OSError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{file.name}: damaged or not readable ({type(error).__name__}: {error})") from None


def _ours(entries: Any, names: Mapping[str, Any]) -> tuple[Mapping[str, Any], dict[str, str]]:
    """Our metadata, and the checksums of all names. Raises CheckpointError unless these are the names that were written."""
    try:
        metadata, checksums = entries[OUR_KEY], dict(entries["checksums"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"a damaged item 'metadata' ({type(error).__name__}: {error})") from None
    if wrong := names.keys() ^ checksums.keys():
        raise CheckpointError(f"{min(wrong)}: not what was written (CRC-32): write or copy the folder again")
    return metadata, checksums


@contextlib.contextmanager
def silent_log() -> Iterator[None]:
    """Errors of Orbax as exceptions alone, not in the log as well."""
    log = logging.getLogger("absl")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before
