"""Parity of every device here with every other: `python benchmarks/devices.py [FILE]`, for a report to attach.

Flax on each of cpu, gpu and tpu against PyTorch on each of cpu and gpu, in float32 at each precision and in bfloat16; on a
synthetic B/16 where no file is given. Writes parity-devices.json and parity-devices.html. What is not here is listed as
unproved. Exit code 1 where a pair is outside its budget, or nothing could be run.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path

import numpy as np

from convert import Checkpoint, CheckpointError, MixerConfig, read
from convert.cli import guarded
from convert.files import check_writable, whole_or_nothing
from mixer_jax.parity_command import findings, noise, write_page
from mixer_jax.report import Findings, as_dict, as_html_of_many, verdict
from mixer_jax.sides import Side

DEVICES = {"flax": ("cpu", "gpu", "tpu"), "torch": ("cpu", "gpu")}
SETTINGS = (("float32", "highest"), ("float32", "high"), ("float32", "default"), ("bfloat16", "default"))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", metavar="FILE", help="a checkpoint (default: a synthetic B/16)")
    parser.add_argument("--out", type=Path, default=Path("parity-devices.json"), help="(default: parity-devices.json)")
    parser.add_argument("--count", type=int, default=2, metavar="N", help="images of noise (default: 2)")
    parser.add_argument("--force", action="store_true", help="replace both files")
    arguments = parser.parse_args(argv)
    return guarded(lambda: run(arguments))


def run(arguments: argparse.Namespace) -> None:
    page = arguments.out.with_suffix(".html")
    for path in (arguments.out, page):
        check_writable(path, force=arguments.force)
    checkpoint = read(arguments.source) if arguments.source else synthetic(MixerConfig.named("B/16"))
    found, unproved = every_pair(checkpoint, arguments.count)
    text = json.dumps({"reports": [as_dict(each) for each in found], "unproved": unproved}, indent=1)
    with whole_or_nothing(arguments.out, size=len(text), force=arguments.force) as written:
        written.write_text(text)
    write_page(page, as_html_of_many("Parity of devices", found, unproved), force=arguments.force)
    print(f"written: {arguments.out}, {page}")
    if not found or not all(each.passed for each in found):
        sys.exit(1)


def every_pair(checkpoint: Checkpoint, count: int) -> tuple[list[Findings], list[str]]:
    """What each pair that is here gives, and what stays unproved for want of a device."""
    images, found, unproved = noise(checkpoint.config, count, 0), [], []
    for here, there in itertools.product(DEVICES["flax"], DEVICES["torch"]):
        missing = [absent(name, device) for name, device in (("flax", here), ("torch", there))]
        if any(missing):
            unproved.append(f"flax:{here} against torch:{there}: {'; '.join(filter(None, missing))}")
            print(f"unproved: {unproved[-1]}", flush=True)
            continue
        for dtype, precision in SETTINGS:
            a, b = Side("flax", here, dtype, precision), Side("torch", there, dtype, precision)
            source = Path(checkpoint.source).name
            found.append(findings(checkpoint, images, a, b, source=source, said="of seeded noise, seed 0"))
            print(verdict(found[-1]), flush=True)
    return found, unproved


def absent(name: str, device: str) -> str | None:
    """Why a library has no such device here; None where it has."""
    try:
        Side(name, device).open(synthetic(MixerConfig.named("S/32", image_size=32, num_classes=2).replace(num_blocks=1)))
    except (CheckpointError, ImportError) as error:
        return " ".join(str(error).split())
    return None


def synthetic(config: MixerConfig) -> Checkpoint:
    """Random weights: kernels LeCun normal, scales 1 + 0.1 n, biases 0.1 n."""
    from convert.layouts import GOOGLE
    from convert.mapping import shapes

    random = np.random.default_rng(0)
    entries = ("num_blocks", "num_classes", "in_channels", "hidden_dim", "num_tokens", "tokens_mlp_dim", "channels_mlp_dim")
    sizes = {name: getattr(config, name) for name in entries}
    arrays = {}
    for name, shape in shapes(GOOGLE, sizes | dict(zip(("patch_height", "patch_width"), config.patch_size))).items():
        values = random.standard_normal(shape, dtype=np.float32)
        spread = np.float32(1 / np.sqrt(np.prod(shape[:-1]))) if name.endswith("/kernel") else np.float32(0.1)
        arrays[name] = spread * values + np.float32(name.endswith("/scale"))
    return Checkpoint.from_arrays(arrays, source=f"synthetic {config.variant}").with_image_size(config.image_size)


if __name__ == "__main__":
    sys.exit(main())
