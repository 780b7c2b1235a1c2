"""A million tiny images in a pack: seconds to open, memory, and random reads beside a folder of the same files.

First a folder and its pack must be the same dataset. Opening is measured in a process of its own, which has imported
everything before. Reads take turns on the same indices, with the files in the system's cache; figures are medians over rounds.
"""

import argparse
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from measure import machine
from worker import versions

from mixer_jax.commands.pack import pack
from mixer_jax.training.data import Dataset, open_dataset
from mixer_jax.training.sources import Part

HERE = Path(__file__).parent
CLASSES, SIDE, ROUNDS = 1000, 8, 5


def images(count: int) -> Part:
    """Noise of 8 x 8 pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, SIDE, SIDE, 3), np.uint8)
    names = [f"{i % CLASSES:03}/{i:07}.png" for i in range(count)]
    return Part(names, [name[:3] for name in names], pixels=pixels)


def resident() -> dict[str, float]:
    """MiB in memory, all of it and without what is mapped from files; and the most so far."""
    status = Path("/proc/self/status").read_text()
    kinds = {"mib": "VmRSS", "anonymous_mib": "RssAnon", "peak_mib": "VmHWM"}
    return {name: int(re.search(rf"{kind}:\s+(\d+)", status)[1]) / 1024 for name, kind in kinds.items()}


def opened(folder: Path, reads: int) -> dict[str, Any]:
    """Seconds and memory of opening a pack and of random reads, in this process."""
    import grain  # noqa: F401

    before, started = resident(), time.perf_counter()
    train = open_dataset(folder).train
    seconds, after = time.perf_counter() - started, resident()
    indices = random.Random(0).choices(range(len(train)), k=reads)
    started = time.perf_counter()
    for index in indices:
        train.image(index)
    rate = {"images_a_second": reads / (time.perf_counter() - started)}
    return {"seconds": seconds, "before": before, "opened": after, "read": resident() | rate}


def million(folder: Path, count: int, reads: int) -> dict[str, Any]:
    started = time.perf_counter()
    index = pack("generated", folder / "million", contents=({"train": images(count)}, None))
    seconds = time.perf_counter() - started
    shards = index["parts"]["train"]["shards"]
    command = [sys.executable, __file__, "--open", folder / "million", "--reads", str(reads)]
    child = subprocess.run(command, check=True, capture_output=True, text=True)
    size = sum(entry["bytes"] for entry in shards.values()) / 2**20
    return {
        "packed_images": count,
        "reads": reads,
        "shards": len(shards),
        "shards_mib": size,
        "pack_seconds": seconds,
    } | json.loads(child.stdout)


def beside_a_folder(folder: Path, count: int, reads: int) -> dict[str, Any]:
    """Images a second of the pack and of the folder that it was packed from."""
    part = images(count)
    for label in set(part.labels):
        (folder / "files" / label).mkdir(parents=True)
    for name, pixels in zip(part.names, part.pixels):
        PIL.Image.fromarray(pixels).save(folder / "files" / name)
    pack(folder / "files", folder / "packed")
    seconds, trains = {}, {}
    for name in ("files", "packed"):
        started = time.perf_counter()
        trains[name] = open_dataset(folder / name).train
        seconds[f"open_{name}_seconds"] = time.perf_counter() - started
    files, packed = trains["files"], trains["packed"]
    assert files.fingerprint == packed.fingerprint
    kinds: dict[str, Callable[[Dataset, int], Any]] = {
        "decoded": Dataset.image,
        "bytes": lambda train, i: train.packed.record(i) if train.packed else Path(train.root, train.names[i]).read_bytes(),
    }
    rates: dict[str, list[float]] = {}
    for round_ in range(ROUNDS):
        indices = random.Random(round_).choices(range(len(files)), k=reads // ROUNDS)
        for kind, read in kinds.items():
            assert all(np.array_equal(read(files, i), read(packed, i)) for i in indices[:100])
            for name, train in trains.items():
                started = time.perf_counter()
                for index in indices:
                    read(train, index)
                rates.setdefault(f"{kind}_{name}", []).append(len(indices) / (time.perf_counter() - started))
    ratios = {
        f"{kind}_packed_to_files": statistics.median(np.divide(rates[f"{kind}_packed"], rates[f"{kind}_files"]))
        for kind in kinds
    }
    return {"images": count} | seconds | {name: statistics.median(values) for name, values in rates.items()} | ratios


def table(results: dict[str, Any]) -> str:
    """The figures for docs/packing.md."""
    one, two = results["million"], results["folder"]
    mib = [f"{one[moment]['anonymous_mib']:.0f}" for moment in ("before", "opened", "read")]
    opened = [f"{two[f'open_{name}_seconds']:.1f} s" for name in ("files", "packed")]

    def rates(kind: str) -> str:
        return f"{two[f'{kind}_files']:,.0f}, {two[f'{kind}_packed']:,.0f}, {two[f'{kind}_packed_to_files']:.2f}"

    rows = {
        f"{one['packed_images']:,} images packed, as {one['shards']} shards": f"{one['pack_seconds']:.0f} s",
        "opened, with a tenth of each class for validation": f"{one['seconds']:.1f} s",
        f"memory before, opened, after {one['reads']:,} random reads": f"{mib[0]}, {mib[1]}, {mib[2]} MiB",
        f"{two['images']:,} images opened: folder, pack": ", ".join(opened),
        "their files read a second: folder, pack, ratio": rates("bytes"),
        "the same decoded": rates("decoded"),
    }
    return "\n".join(
        ["| 8 x 8 pixels, one thread | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items())]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few images: whether it works")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of packed.json")
    parser.add_argument("--reads", type=int, default=20_000, help="random reads (default: 20,000)")
    parser.add_argument("--open", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.open:
        print(json.dumps(opened(arguments.open, arguments.reads)))
        return
    results: dict[str, Any] = {"machine": machine() | {"versions": versions() | {"pillow": PIL.__version__}}}
    with tempfile.TemporaryDirectory() as folder:
        results["million"] = million(Path(folder), 4_500 if arguments.quick else 1_000_000, arguments.reads)
        results["folder"] = beside_a_folder(Path(folder), 2_500 if arguments.quick else 100_000, arguments.reads)
    (arguments.results / "packed.json").write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
