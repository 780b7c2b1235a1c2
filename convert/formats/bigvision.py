"""big_vision's folder: a zarr array for each leaf, in a folder named by the leaf's path with "~" for "/". Read only."""

from pathlib import Path

from . import Content
from .zarr import bytes_inside, zarr_arrays


def read(path: Path) -> Content:
    size = bytes_inside(path)
    leaves = {leaf.parent.name: leaf.parent.absolute() for leaf in path.glob("*/.zarray")}
    specs = {
        name.replace("~", "/"): {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{leaf}/"}}
        for name, leaf in sorted(leaves.items())
    }
    arrays, others = zarr_arrays(specs, size)
    return Content(arrays, others=others)
