"""Parity of every device here with every other: `python benchmarks/devices.py [FILE]`, for a report to attach.

Flax on each of cpu, gpu and tpu against PyTorch on each of cpu and gpu, in float32 at each precision and in bfloat16; on a
synthetic B/16 where no file is given. Writes parity-devices.json and parity-devices.html. Devices that are not here are listed
as unproved. Exit code 1 where a pair is outside its tolerance, or nothing could be run.
"""

import argparse
import dataclasses
import itertools
import json
import sys
from pathlib import Path

import numpy as np

from convert import Checkpoint, CheckpointError, MixerConfig, read
from convert.atomic import check_writable, write_bytes
from convert.cli import run_guarded
from mixer_jax.parity.comparison import noise
from mixer_jax.parity.html import as_html_of_many
from mixer_jax.parity.implementations import Implementation
from mixer_jax.parity.report import ParityReport, as_dict, parity_report, verdict

DEVICES = {"flax": ("cpu", "gpu", "tpu"), "torch": ("cpu", "gpu")}
SETTINGS = (("float32", "highest"), ("float32", "high"), ("float32", "default"), ("bfloat16", "default"))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", metavar="FILE", help="a checkpoint (default: a synthetic B/16)")
    parser.add_argument("--out", type=Path, default=Path("parity-devices.json"), help="(default: parity-devices.json)")
    parser.add_argument("--count", type=int, default=2, metavar="N", help="images of noise (default: 2)")
    parser.add_argument("--force", action="store_true", help="replace both files")
    arguments = parser.parse_args(argv)
    return run_guarded(lambda: run(arguments))


def run(arguments: argparse.Namespace) -> None:
    page = arguments.out.with_suffix(".html")
    for path in (arguments.out, page):
        check_writable(path, force=arguments.force)
    checkpoint = read(arguments.source) if arguments.source else synthetic(MixerConfig.named("B/16"))
    reports, unproved = every_pair(checkpoint, arguments.count)
    text = json.dumps({"reports": [as_dict(report) for report in reports], "unproved": unproved}, indent=1)
    write_bytes(arguments.out, text.encode(), force=arguments.force)
    write_bytes(page, as_html_of_many("Parity of devices", reports, unproved).encode(), force=arguments.force)
    print(f"written: {arguments.out}, {page}")
    if not reports or not all(report.passed for report in reports):
        sys.exit(1)


def every_pair(checkpoint: Checkpoint, count: int) -> tuple[list[ParityReport], list[str]]:
    """A report of each pair of devices that is here, and what stays unproved for want of a device."""
    images, reports, unproved = noise(checkpoint.config, count, 0), [], []
    for here, there in itertools.product(DEVICES["flax"], DEVICES["torch"]):
        missing = [absent(name, device) for name, device in (("flax", here), ("torch", there))]
        if any(missing):
            unproved.append(f"flax:{here} against torch:{there}: {'; '.join(filter(None, missing))}")
            print(f"unproved: {unproved[-1]}", flush=True)
            continue
        for dtype, precision in SETTINGS:
            a, b = Implementation("flax", here, dtype, precision), Implementation("torch", there, dtype, precision)
            source = Path(checkpoint.source).name
            reports.append(parity_report(checkpoint, images, a, b, source=source, images_are="of seeded noise, seed 0"))
            print(verdict(reports[-1]), flush=True)
    return reports, unproved


def absent(name: str, device: str) -> str | None:
    """Why a library has no such device here; None where it has."""
    config = MixerConfig.named("S/32", image_size=32, num_classes=2).replace(num_blocks=1)
    try:
        Implementation(name, device).open(synthetic(config))
    except (CheckpointError, ImportError) as error:
        return " ".join(str(error).split())
    return None


def synthetic(config: MixerConfig) -> Checkpoint:
    """Random weights: kernels LeCun normal, scales 1 + 0.1 n, biases 0.1 n."""
    from convert.config import usual_depth
    from convert.layouts import GOOGLE
    from convert.mapping import shapes

    sizes = dataclasses.asdict(config) | {"num_tokens": config.num_tokens}
    sizes |= dict(zip(("patch_height", "patch_width"), config.patch_size))
    random, arrays = np.random.default_rng(0), {}
    for name, shape in shapes(GOOGLE, sizes).items():
        values = random.standard_normal(shape, dtype=np.float32)
        spread = np.float32(1 / np.sqrt(np.prod(shape[:-1]))) if name.endswith("/kernel") else np.float32(0.1)
        arrays[name] = spread * values + np.float32(name.endswith("/scale"))
    checkpoint = Checkpoint.from_arrays(arrays, source=f"synthetic {config.variant}").with_image_size(config.image_size)
    usual = usual_depth(sizes) in (None, config.num_blocks)
    return checkpoint if usual else checkpoint.with_metadata(num_blocks=config.num_blocks)


if __name__ == "__main__":
    sys.exit(main())
