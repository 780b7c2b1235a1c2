"""What a fine-tuning run costs beside its bare training step: `python benchmarks/training.py [fed epoch memory] [--quick]`.

`fed`: steps of B/16 on batches that are decoded meanwhile from JPEG photographs, beside steps on one fixed batch, in turns on
the same cores. `epoch`: what one more pass over the images adds to a run, with its evaluation and saved state, beside as
many steps of the compiled function. `memory`: resident memory of a run of 2,000 steps on files. Photographs and weights are
synthetic. Figures go to benchmarks/results/training.json.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from measure import HERE, environment, machine
from PIL import Image
from predict import photograph
from worker import versions

import mixer_jax
from convert import MixerConfig
from mixer_jax.commands.finetune import finetune
from mixer_jax.training.batches import Batch, TrainingBatches
from mixer_jax.training.config import FinetuneConfig
from mixer_jax.training.data import open_dataset
from mixer_jax.training.recipe import Recipe
from mixer_jax.training.step import initial_state, make_train_step

SMALL = "S/8,num_blocks=4,hidden_dim=64,tokens_mlp_dim=32,channels_mlp_dim=128"
Row = dict[str, Any]


def class_folders(folder: Path, count: int, write: Callable[[int, Path], None], ending: str) -> Path:
    for i in range(count):
        path = folder / f"class {i % 4}" / f"{i:05}.{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        write(i, path)
    return folder


def icon(index: int, path: Path) -> None:
    Image.fromarray(np.random.default_rng(index).integers(256, size=(40, 40, 3), dtype=np.uint8)).save(path)


def fed(folder: Path, *, quick: bool) -> Row:
    """The seconds of a step on decoded batches relative to one on a fixed batch: the median of the turns."""
    variant, batch, steps, turns = ("S/32", 8, 3, 2) if quick else ("B/16", 8, 8, 4)
    splits = open_dataset(class_folders(folder, 400 if not quick else 40, photograph, "jpg"))
    model = mixer_jax.MlpMixer(MixerConfig.named(variant, num_classes=4), rngs=nnx.Rngs(0))
    batches = TrainingBatches(dataset=splits.train, batch_size=batch, image_size=model.config.image_size)
    recipe = Recipe()
    step, state = jax.jit(make_train_step(model, recipe), donate_argnums=0), initial_state(model, recipe)
    fixed, key = batches[0], jax.random.key(0)
    state, _ = step(state, fixed.images, fixed.labels, key)
    seconds: dict[str, list[float]] = {"fixed": [], "decoded": []}

    def timed(state: Any, next_batch: Callable[[], Batch]) -> tuple[Any, float]:
        """The mean of steps, after one in which the pipeline starts."""
        for i in range(steps + 1):
            if i == 1:
                jax.block_until_ready(state)
                started = time.perf_counter()
            batch = next_batch()
            state, metrics = step(state, batch.images, batch.labels, key)
            float(metrics["loss"])
        return state, (time.perf_counter() - started) / steps

    for turn in range(turns):
        for name in sorted(seconds, reverse=turn % 2 == 0):
            stream = batches.starting_at(turn * (steps + 1))
            state, time_of_step = timed(state, partial(next, stream) if name == "decoded" else lambda: fixed)
            stream.close()
            seconds[name].append(time_of_step)
    ratios = [decoded / bare for decoded, bare in zip(seconds["decoded"], seconds["fixed"])]
    started, cpu = time.perf_counter(), time.process_time()
    for k in range(4):
        batches[1000 + k]
    alone = {"decode_alone_s": (time.perf_counter() - started) / 4, "decode_alone_cpu_s": (time.process_time() - cpu) / 4}
    medians = {f"{name}_s": statistics.median(values) for name, values in seconds.items()}
    return {"model": variant, "batch": batch, **medians, **alone, "ratio": statistics.median(ratios), "ratios": ratios}


def epoch(folder: Path, *, quick: bool) -> Row:
    """The seconds that one more pass over the images adds to a run, beside those of its steps alone."""
    count, batch = (512, 32) if quick else (8192, 32)
    source = class_folders(folder / "images", count, icon, "png")
    steps = int(count * 0.9) // batch
    seconds = []
    for name, passes in (("to warm up", 1), ("one", 1), ("two", 2)):
        settings = FinetuneConfig.of(
            "small", batch_size=batch, total_steps=passes * steps, warmup_steps=2, evaluate_every=steps, image_size=(32, 32)
        )
        started = time.perf_counter()
        trainer = finetune(None, source, folder / name, config=settings, from_scratch=SMALL)
        seconds.append(time.perf_counter() - started)
    step = jax.jit(make_train_step(trainer.model, settings.recipe), donate_argnums=0)
    batches = TrainingBatches(dataset=trainer.splits.train, batch_size=batch, image_size=(32, 32))
    state, key, fixed = initial_state(trainer.model, settings.recipe), jax.random.key(0), batches[0]
    state, _ = jax.block_until_ready(step(state, fixed.images, fixed.labels, key))
    started = time.perf_counter()
    for _ in range(steps):
        state, _ = step(state, fixed.images, fixed.labels, key)
    jax.block_until_ready(state)
    bare, started = time.perf_counter() - started, time.perf_counter()
    with contextlib.closing(batches.starting_at(0)) as stream:
        for _ in range(steps):
            next(stream)
    decoding = time.perf_counter() - started
    times = {"run_s": seconds[1], "epoch_s": seconds[2] - seconds[1], "bare_steps_s": bare, "decoding_alone_s": decoding}
    return {"model": SMALL, "steps": steps, "batch": batch} | times


def memory(folder: Path, *, quick: bool) -> Row:
    """MiB of resident memory of the command after each tenth of the steps."""
    steps = 200 if quick else 2000
    source = class_folders(folder / "images", 400, icon, "png")
    command = [sys.executable, "-m", "mixer_jax", "finetune", source, "--run", folder / "run", "--from-scratch", SMALL]
    options = {"preset": "small", "image-size": 32, "batch-size": 16, "total-steps": steps, "evaluate-every": steps // 20}
    command += [text for name, value in options.items() for text in (f"--{name}", value)]
    child = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, env=environment())
    metrics, resident = folder / "run" / "metrics.jsonl", {}
    while child.poll() is None:
        step = json.loads(metrics.read_text().splitlines()[-1])["step"] if metrics.exists() and metrics.stat().st_size else 0
        pages = int(Path(f"/proc/{child.pid}/statm").read_text().split()[1])
        resident[10 * step // steps] = pages * os.sysconf("SC_PAGESIZE") / 2**20
        time.sleep(0.2)
    if child.returncode:
        raise RuntimeError("the run failed")
    return {"model": SMALL, "steps": steps, "batch": 16, "mib": [round(resident[tenth]) for tenth in sorted(resident)]}


PARTS = {"fed": fed, "epoch": epoch, "memory": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="small: whether it works")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of training.json")
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - PARTS.keys():
        parser.error(f"no part is called {unknown.pop()}: there are {', '.join(PARTS)}")
    file = arguments.results / "training.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    for name in arguments.parts or PARTS:
        facts = machine() | {"versions": versions()}
        with tempfile.TemporaryDirectory() as folder:
            results[name] = PARTS[name](Path(folder), quick=arguments.quick) | {"machine": facts}
        print(name, json.dumps(results[name], indent=1))
        file.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
