"""Memory and time of conversions, each in a process of its own, as `python -m convert` runs them.

Memory is the peak resident set of the child (`ru_maxrss`); what the same conversion takes for a model of a few kilobytes,
which is the imports and little else, is shown apart. Time is the median of interleaved runs, as a ratio to copying the
file. The weights are synthetic.
"""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from convert import Checkpoint, MixerConfig, write
from convert.arrays import LazyArray
from convert.layouts import GOOGLE, layout_named
from convert.mapping import shapes

MIB = 2**20
TINY = MixerConfig.named("S/32", image_size=64, num_classes=2).replace(hidden_dim=8, channels_mlp_dim=8, tokens_mlp_dim=8)
FORMATS = {"npz": ".npz", "safetensors": ".safetensors", "pt": ".pt", "orbax": ""}
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


def synthetic(path: Path, config: MixerConfig, layout: str) -> None:
    """Write a model of ones in a layout."""
    sizes = sizes_of(config)

    def ones(shape: tuple[int, ...]) -> LazyArray:
        return LazyArray(shape, np.dtype("float32"), lambda i: np.ones(shape if i is None else shape[1:], np.float32))

    arrays = {name: ones(shape) for name, shape in shapes(GOOGLE, sizes).items()}
    write(path, Checkpoint.from_arrays(arrays), layout=layout, force=True)


def prepared(path: Path, config: MixerConfig, layout: str) -> None:
    """`synthetic` in another process: what a child inherits counts as its peak, so this one stays small."""
    child = multiprocessing.get_context("spawn").Process(target=synthetic, args=(path, config, layout))
    child.start()
    child.join()
    if child.exitcode:
        raise SystemExit(f"cannot prepare {path}")


def sizes_of(config: MixerConfig) -> dict[str, int]:
    names = ("num_blocks", "num_classes", "in_channels", "hidden_dim", "num_tokens", "tokens_mlp_dim", "channels_mlp_dim")
    patch = {"patch_height": config.patch_size[0], "patch_width": config.patch_size[1]}
    return {name: getattr(config, name) for name in names} | patch


def largest(sizes: dict[str, int], layout: str) -> int:
    return max(4 * int(np.prod(shape)) for shape in shapes(layout_named(layout), sizes).values())


def run(code: str, *arguments: object) -> tuple[float, int]:
    """Seconds and peak bytes of a Python process."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"failed: {arguments}")
    return time.perf_counter() - started, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def memory(folder: Path, blocks: tuple[int, ...]) -> list[dict[str, object]]:
    rows = []
    cases = [
        ("npz", "google", "safetensors", "timm"),
        ("safetensors", "timm", "npz", "google"),
        ("npz", "google", "safetensors", "flax"),
        ("safetensors", "flax", "npz", "google"),
        ("npz", "google", "pt", "timm"),
        ("pt", "timm", "npz", "google"),
        ("npz", "google", "orbax", "flax"),
        ("orbax", "flax", "npz", "google"),
    ]
    for source, source_layout, target, target_layout in cases:
        start, end = folder / f"in{FORMATS[source]}", folder / f"out{FORMATS[target]}"
        command = ("convert", start, end, "--to", target_layout, "--force")
        prepared(start, TINY, source_layout)
        _, base = run(CONVERT, *command)
        for depth in blocks:
            config = MixerConfig.named("B/16").replace(num_blocks=depth)
            prepared(start, config, source_layout)
            sizes, whole = sizes_of(config), 4 * config.num_parameters
            tensor = max(largest(sizes, layout) for layout in (source_layout, target_layout))
            _, peak = run(CONVERT, *command, "--blocks", depth)
            allowed = {"pt": whole + tensor, "orbax": 3 * whole}.get(
                next((name for name in (source, target) if name in ("pt", "orbax")), ""), 3 * tensor + 16 * MIB
            )
            rows.append(
                {
                    "conversion": f"{source} {source_layout} -> {target} {target_layout}",
                    "blocks": depth,
                    "tiny_mib": base / MIB,
                    "beyond_tiny_mib": (peak - base) / MIB,
                    "allowed_mib": allowed / MIB,
                }
            )
    return rows


def timing(folder: Path, variant: str, runs: int) -> list[dict[str, object]]:
    source = folder / "in.npz"
    prepared(source, MixerConfig.named(variant), "google")
    copy = "import shutil, sys; shutil.copyfile(*sys.argv[1:])"
    commands = {
        "copy": (copy, source, folder / "copy.npz"),
        "convert npz -> safetensors, read back": (CONVERT, "npz2timm", source, folder / "ours.safetensors", "--force"),
        "load all, transpose, save (safetensors)": (ALL_AT_ONCE, source, folder / "all.safetensors"),
        "load all, transpose, torch.save": (ALL_AT_ONCE_PT, source, folder / "all.pt"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(runs):
        for name, command in commands.items():
            seconds[name].append(run(*command)[0])
    median = {name: statistics.median(values) for name, values in seconds.items()}
    return [
        {
            "work": f"{variant}: {name}",
            "median_s": median[name],
            "spread": (max(values) - min(values)) / median[name],
            "times_copy": median[name] / median["copy"],
        }
        for name, values in seconds.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="6 blocks, B/16 and one run: whether it works")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        used = memory(folder, (6,) if arguments.quick else (6, 48))
        spent = timing(folder, "B/16" if arguments.quick else "L/16", 1 if arguments.quick else 5)
    for row in used:
        verdict = "within" if row["beyond_tiny_mib"] <= row["allowed_mib"] else "BEYOND"
        print(
            f"{row['conversion']:<44}{row['blocks']:>3} blocks: tiny {row['tiny_mib']:4.0f} MiB + "
            f"{row['beyond_tiny_mib']:6.0f} MiB, {verdict} {row['allowed_mib']:6.0f}"
        )
    for row in spent:
        print(f"{row['work']:<52}{row['median_s']:7.2f} s  {row['times_copy']:5.2f} x copy  (spread {row['spread']:.0%})")
    machine = {"python": platform.python_version(), "numpy": np.__version__, "cpus": os.cpu_count()}
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine, "memory": used, "time": spent}, indent=1))


if __name__ == "__main__":
    main()
