"""Memory and time of conversions, each in a process of its own, as `python -m convert` runs them.

Memory is the peak resident set of the child (`ru_maxrss`) beyond that of the same conversion of a model of a few kilobytes,
which is the imports and little else. Time is the median of interleaved runs, as a ratio to copying the file. The weights are
synthetic.
"""

import argparse
import json
import multiprocessing
import shutil
import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from measure import machine, run_process, show
from worker import versions

from convert import Checkpoint, MixerConfig, write
from convert.arrays import LazyArray
from convert.layouts import GOOGLE
from convert.mapping import shapes

TINY = MixerConfig.named("S/32", image_size=64, num_classes=2).replace(hidden_dim=8, channels_mlp_dim=8, tokens_mlp_dim=8)
ENDINGS = {"npz google": ".npz", "safetensors timm": ".safetensors", "safetensors flax": ".safetensors", "pt timm": ".pt"}
ENDINGS |= {"orbax flax": "", "orbax google": "", "msgpack google": ".msgpack"}
BIG_VISION = "bigvision google"  # which is only read
CONVERT = "from convert.__main__ import main; import sys; sys.exit(main(sys.argv[1:]))"
# What a converter without laziness does, in NumPy alone: every array in memory, transposed, then saved.
ALL_AT_ONCE = """
import sys
import numpy as np
from safetensors.numpy import save_file
with np.load(sys.argv[1]) as data:
    arrays = {k: np.ascontiguousarray(v.T) if v.ndim == 2 else np.ascontiguousarray(v) for k, v in data.items()}
save_file(arrays, sys.argv[2])
"""
# The same computation with PyTorch's file format, which is what people do today.
ALL_AT_ONCE_PT = ALL_AT_ONCE.replace("from safetensors.numpy import save_file", "import torch").replace(
    "save_file(arrays, sys.argv[2])", "torch.save({k: torch.from_numpy(v) for k, v in arrays.items()}, sys.argv[2])"
)


def prepare(path: Path, config: MixerConfig, layout: str) -> None:
    """Write a model of noise in another process: what a child inherits counts as its peak, so this one stays small."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        pool.submit(write_noise, path, config, layout).result()


def write_noise(path: Path, config: MixerConfig, layout: str) -> None:
    def noise(shape: tuple[int, ...]) -> LazyArray:
        def values(index: int | None) -> np.ndarray:  # the same whenever it is read
            array = np.random.default_rng(0).random(shape, np.float32)
            return array if index is None else array[index]

        return LazyArray(shape, np.dtype("float32"), values)

    arrays = {name: noise(shape) for name, shape in shapes(GOOGLE, config.sizes).items()}
    if path.name.startswith("checkpoint.bv"):
        write_big_vision(path, arrays)
    else:
        write(path, Checkpoint.from_arrays(arrays), layout=layout, force=True)


def write_big_vision(path: Path, arrays: dict[str, LazyArray]) -> None:
    """As JAX's serialization of arrays does for it: one chunk each, compressed."""
    import tensorstore

    shutil.rmtree(path, ignore_errors=True)
    for name, array in arrays.items():
        file = path / f"params/{name}".replace("/", "~")
        metadata = {"shape": array.shape, "chunks": array.shape, "dtype": "<f4", "compressor": {"id": "zstd", "level": 1}}
        spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": str(file)}, "metadata": metadata, "create": True}
        tensorstore.open(spec).result().write(np.asarray(array)).result()


def run(code: str, *arguments: object) -> dict[str, float]:
    return run_process([sys.executable, "-c", code, *arguments])


def memory(folder: Path, depths: tuple[int, ...]) -> list[dict[str, Any]]:
    rows = []
    pairs = [("npz google", other) for other in list(ENDINGS)[1:]]
    for source, target in [*(pair for pair in pairs for pair in (pair, pair[::-1])), (BIG_VISION, "npz google")]:
        start = folder / ("checkpoint.bv-000000001" if source == BIG_VISION else f"in{ENDINGS[source]}")
        end = folder / f"out{ENDINGS[target]}"
        layouts = source.split()[1], target.split()[1]
        command = ("convert", start, end, "--to", layouts[1], "--force")
        prepare(start, TINY, layouts[0])
        tiny = run(CONVERT, *command)["peak_mib"]
        for depth in depths:
            config = MixerConfig.named("B/16").replace(num_blocks=depth)
            prepare(start, config, layouts[0])
            peak = run(CONVERT, *command, "--depth", depth)["peak_mib"]
            model, arrays = 4 * config.num_parameters / 2**20, shapes(GOOGLE, config.sizes).values()
            largest = 4 * max(int(np.prod(shape)) for shape in arrays) / 2**20  # stacked blocks are read one by one
            allowed = 3 * largest + 16
            if source == "pt timm":
                allowed += model  # torch.load maps the file
            elif target == "pt timm":
                allowed += 2 * model  # torch.save holds all tensors, and the file is mapped when it is read back
            elif target.startswith("orbax"):
                allowed += 3 * model  # Orbax holds all weights, and writes several at once
            elif "orbax" in source or source == BIG_VISION:
                allowed += 96  # what TensorStore's threads keep
                if source == "orbax flax":  # a leaf is one chunk: it is there as stored and decoded, and kept for its items
                    allowed += 2 * depth * largest + 128
            figures = {"tiny_mib": tiny, "beyond_tiny_mib": peak - tiny, "allowed_mib": allowed}
            verdict = "within" if peak - tiny <= allowed else "BEYOND"
            rows.append({"conversion": f"{source} -> {target}", "blocks": depth, **figures, "verdict": verdict})
    return rows


def timing(folder: Path, variant: str, runs: int) -> list[dict[str, Any]]:
    source = folder / "in.npz"
    prepare(source, MixerConfig.named(variant), "google")
    commands = {
        "copy": ("import shutil, sys; shutil.copyfile(*sys.argv[1:])", source, folder / "copy.npz"),
        "convert npz -> safetensors, read back": (CONVERT, "npz2timm", source, folder / "ours.safetensors", "--force"),
        "load all, transpose, save (safetensors)": (ALL_AT_ONCE, source, folder / "all.safetensors"),
        "load all, transpose, torch.save": (ALL_AT_ONCE_PT, source, folder / "all.pt"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(runs):
        for name, command in commands.items():
            seconds[name].append(run(*command)["process_s"])
    rows = []
    for name, values in seconds.items():
        median, copy = statistics.median(values), statistics.median(seconds["copy"])
        figures = {"median_s": median, "spread": (max(values) - min(values)) / median, "times_copy": median / copy}
        rows.append({"work": f"{variant}: {name}", **figures})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="6 blocks, B/16 and one run: whether it works")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        used = memory(Path(name), (6,) if arguments.quick else (6, 48))
        spent = timing(Path(name), "B/16" if arguments.quick else "L/16", 1 if arguments.quick else 5)
    show(used, "peak memory beyond that of a tiny model's conversion")
    show(spent, "time")
    if arguments.json:
        facts = machine() | {"versions": versions()}
        arguments.json.write_text(json.dumps({"machine": facts, "memory": used, "time": spent}, indent=1))


if __name__ == "__main__":
    main()
