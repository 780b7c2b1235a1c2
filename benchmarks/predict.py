"""`predict` on different JPEG photographs of mixed sizes: decoding alone, computing alone, and both overlapped.

All three run on the same cores, in turns on the same parts of the images; figures are medians over the parts. If decoding and
computing alone each keep every core busy, both cannot take less than the sum of their CPU time; that limit is printed beside
what was reached. The photographs and the weights are synthetic.
"""

import argparse
import json
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import PIL
from flax import nnx
from measure import machine
from PIL import Image
from worker import timed, versions

import mixer_jax
from convert import MixerConfig
from mixer_jax.images import cores, decode_ahead, decoded, forward_of, run_on_images

WIDTHS = (500, 375, 640, 333, 1024, 500, 800, 256, 1600, 320)
HEIGHTS = (375, 500, 480, 500, 768, 334, 1200, 256, 1200, 240)
PREPROCESSINGS = ["resmall_crop"]
Times = dict[str, tuple[float, float]]  # wall and CPU seconds of each kind of work


def photograph(index: int, path: Path) -> None:
    """Smooth shapes with a texture: about as many bytes a pixel as a camera's JPEG."""
    random = np.random.default_rng(index)
    width, height = (int(lengths[index % 10] * random.uniform(0.8, 1.2)) for lengths in (WIDTHS, HEIGHTS))
    blocks = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    shapes = np.asarray(blocks.resize((width, height), Image.Resampling.BICUBIC))
    texture = random.normal(scale=8, size=(height, width, 1))
    Image.fromarray((shapes + texture).clip(0, 255).astype(np.uint8)).save(path, quality=90)


def measured(variant: str, paths: list[str], *, parts: int, batch: int, threads: int) -> dict[str, Any]:
    model = mixer_jax.MlpMixer(MixerConfig.named(variant), rngs=nnx.Rngs(0))
    model.head.kernel[...] = 0.05 * jax.random.normal(jax.random.key(1), model.head.kernel.shape)  # a fresh head is zeros
    model.eval()
    config, forward = model.config, forward_of(model)[0]
    decode = partial(decoded, preprocessings=PREPROCESSINGS, config=config)
    noise = np.random.default_rng(0).uniform(-1, 1, (batch, *config.image_size, config.in_channels)).astype(np.float32)

    def decode_alone(part: list[str]) -> None:
        for _ in decode_ahead(decode, part, threads=threads, count=2 * batch):
            pass

    def compute_alone(part: list[str]) -> None:
        before = None
        for _ in range(0, len(part), batch):
            started = forward(noise)
            jax.block_until_ready(before)
            before = started
        jax.block_until_ready(before)

    def both(part: list[str]) -> list[np.ndarray]:
        results = run_on_images(forward, config, part, PREPROCESSINGS, batch_size=batch, threads=threads)
        return [result.logits[0] for result in results]

    first = paths[: 2 * batch + 1]
    overlapped, apart = np.stack(both(first)), np.stack([both([path])[0] for path in first])
    np.testing.assert_allclose(overlapped, apart, atol=1e-5)
    assert overlapped.std() > 0.01

    work = {"decode": decode_alone, "compute": compute_alone, "both": both}
    rounds: list[Times] = []
    for part in np.array_split(paths, parts):
        order = sorted(work, reverse=len(rounds) % 2 == 0)
        rounds.append({name: timed(partial(work[name], part.tolist())) for name in order})
    wall, cpu = ({name: np.array([times[name][i] for times in rounds]) for name in work} for i in (0, 1))
    slower, cpu_of_two = np.maximum(wall["decode"], wall["compute"]), cpu["decode"] + cpu["compute"]
    ratios = wall["both"] / slower
    return {
        "variant": variant,
        "images": len(paths),
        "batch": batch,
        "threads": threads,
        "wall_s": {name: wall[name].sum() for name in work},
        "cpu_s": {name: cpu[name].sum() for name in work},
        "ratio_to_slower": statistics.median(ratios),
        "spread": ratios.max() - ratios.min(),
        "limit": statistics.median(np.maximum(slower, cpu_of_two / cores()) / slower),
        "cpu_to_sum_of_both": statistics.median(cpu["both"] / cpu_of_two),
        "one_after_the_other": statistics.median((wall["decode"] + wall["compute"]) / slower),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="96 images: whether it works")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    count, parts = (96, 3) if arguments.quick else (1000, 5)
    with tempfile.TemporaryDirectory() as folder:
        paths = [f"{folder}/{i:05}.jpg" for i in range(count)]
        for i, path in enumerate(paths):
            photograph(i, Path(path))
        row = measured("B/16", paths, parts=parts, batch=8, threads=cores())
    print(json.dumps(row, indent=1))
    if arguments.json:
        facts = machine() | {"versions": versions() | {"pillow": PIL.__version__}}
        arguments.json.write_text(json.dumps({"machine": facts, "predict": row}, indent=1))


if __name__ == "__main__":
    main()
