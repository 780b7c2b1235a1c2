"""`predict` on different JPEG photographs of mixed sizes: decoding alone, computing alone, and both overlapped.

All three run on the same cores, in turns on the same parts of the images, and what is reported is the median over the
parts. Where decoding alone and computing alone each keep every core busy, nothing can overlap them into less than the sum
of their CPU time; that limit is printed beside what was reached. The photographs and the weights are synthetic.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from PIL import Image, __version__

import mixer_jax
from convert import MixerConfig
from mixer_jax.predict import ahead, compiled, cores, decoded, outcomes

SIZES = (
    (500, 375),
    (375, 500),
    (640, 480),
    (333, 500),
    (1024, 768),
    (500, 334),
    (800, 1200),
    (256, 256),
    (1600, 1200),
    (320, 240),
)


def photograph(index: int, path: Path) -> None:
    """Smooth shapes with a texture: about as many bytes a pixel as a camera's JPEG."""
    random = np.random.default_rng(index)
    width, height = (int(side * random.uniform(0.8, 1.2)) for side in SIZES[index % len(SIZES)])
    shapes = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    texture = random.normal(scale=8, size=(height, width, 1))
    Image.fromarray((np.asarray(shapes) + texture).clip(0, 255).astype(np.uint8)).save(path, quality=90)


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def measured(variant: str, paths: list[str], *, parts: int, batch: int, threads: int) -> dict[str, object]:
    model = mixer_jax.MlpMixer(MixerConfig.named(variant), rngs=nnx.Rngs(0))
    model.head.kernel[...] = 0.05 * jax.random.normal(jax.random.key(1), model.head.kernel.shape)  # a fresh head is zeros
    model.eval()
    config, forward = model.config, compiled(model)
    recipes = ["resmall_crop"]
    decode = partial(decoded, recipes=recipes, size=config.image_size, channels=config.in_channels, upright=True)
    noise = np.random.default_rng(0).uniform(-1, 1, (batch, *config.image_size, config.in_channels)).astype(np.float32)

    def decode_alone(part: list[str]) -> None:
        for _ in ahead(decode, part, threads=threads, count=2 * batch):
            pass

    def compute_alone(part: list[str]) -> None:
        before = None
        for _ in range(0, len(part), batch):
            started = forward(noise)
            if before:
                jax.block_until_ready(before)
            before = started
        jax.block_until_ready(before)

    def both(part: list[str]) -> list[np.ndarray]:
        return [o.logits[0] for o in outcomes(forward, config, part, recipes, batch=batch, threads=threads)]

    first = paths[: 2 * batch + 1]
    overlapped, apart = np.stack(both(first)), np.stack([both([path])[0] for path in first])
    np.testing.assert_allclose(overlapped, apart, atol=1e-5)
    assert overlapped.std() > 0.01

    work = {"decode": decode_alone, "compute": compute_alone, "both": both}
    size = -(-len(paths) // parts)
    rounds: list[dict[str, tuple[float, float]]] = []
    for start in range(0, len(paths), size):
        part = paths[start : start + size]
        order = sorted(work) if len(rounds) % 2 else sorted(work, reverse=True)
        rounds.append({name: timed(partial(work[name], part)) for name in order})

    def median(of: Callable[[dict[str, tuple[float, float]]], float]) -> float:
        return statistics.median(map(of, rounds))

    def slower(r: dict[str, tuple[float, float]]) -> float:
        return max(r["decode"][0], r["compute"][0])

    ratios = [r["both"][0] / slower(r) for r in rounds]
    return {
        "variant": variant,
        "images": len(paths),
        "batch": batch,
        "threads": threads,
        "wall_s": {name: sum(r[name][0] for r in rounds) for name in work},
        "cpu_s": {name: sum(r[name][1] for r in rounds) for name in work},
        "ratio_to_slower": statistics.median(ratios),
        "spread": max(ratios) - min(ratios),
        "limit": median(lambda r: max(slower(r), (r["decode"][1] + r["compute"][1]) / cores()) / slower(r)),
        "cpu_to_sum_of_both": median(lambda r: r["both"][1] / (r["decode"][1] + r["compute"][1])),
        "one_after_the_other": median(lambda r: (r["decode"][0] + r["compute"][0]) / slower(r)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="96 images: whether it works")
    parser.add_argument("--count", type=int, default=1000, help="images (default: 1000)")
    parser.add_argument("--variant", default="B/16", help="default: B/16")
    parser.add_argument("--batch", type=int, default=8, help="default: 8")
    parser.add_argument("--threads", type=int, default=cores(), help="that decode (default: one a core)")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    count = 96 if arguments.quick else arguments.count
    with tempfile.TemporaryDirectory() as name:
        files = [Path(name) / f"{i:05}.jpg" for i in range(count)]
        for i, path in enumerate(files):
            photograph(i, path)
        pixels = [Image.open(path).size for path in files]
        mib = sum(path.stat().st_size for path in files) / 2**20
        parts = 3 if arguments.quick else 5
        row = measured(
            arguments.variant, [str(path) for path in files], parts=parts, batch=arguments.batch, threads=arguments.threads
        )
    mean, different = sum(w * h for w, h in pixels) / count / 1e6, len(set(pixels))
    print(f"{count} JPEG photographs, {different} sizes, {mean:.2f} megapixels and {mib / count:.2f} MiB on average")
    wall, cpu = row["wall_s"], row["cpu_s"]
    assert isinstance(wall, dict)
    assert isinstance(cpu, dict)
    for work in ("decode", "compute", "both"):
        print(f"{work:<10}{wall[work]:9.2f} s{count / wall[work]:9.1f} images/s{cpu[work] / wall[work]:7.2f} cores busy")
    print(
        f"both take {row['ratio_to_slower']:.3f} of the slower of the two alone (spread {row['spread']:.3f}); "
        f"limit by CPU time {row['limit']:.3f}, one after the other {row['one_after_the_other']:.3f}; "
        f"their CPU time is {row['cpu_to_sum_of_both']:.3f} of the sum"
    )
    machine = {
        "python": platform.python_version(),
        "jax": jax.__version__,
        "pillow": __version__,
        "cpus": cores(),
        "load": os.getloadavg()[0],
        "device": str(jax.devices()[0]),
    }
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine, "predict": row}, indent=1))


if __name__ == "__main__":
    main()
