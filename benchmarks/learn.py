"""What a Mixer learns, by the library's own `finetune`: `python benchmarks/learn.py [PART ...] [--quick]`.

    fashion     Fashion-MNIST from scratch, and beside it timm's MlpMixer of the same size (learn_timm.py), one after the other
    transfer    pretraining on five classes of Fashion-MNIST, fine-tuning on few images of the other five; against from scratch
    digits      scikit-learn's digits from scratch
    resolution  digits at 8 x 8, then at 16 x 16 through the change of resolution

Every choice was made by accuracy on validation images, which are parts of the training images; each run reads the test images
once, at its end. Intervals of one accuracy are Wilson's, of a mean over seeds Student's, both of 95 %.
"""

import argparse
import contextlib
import json
import math
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from measure import HERE, PYTHONS, ROOT, environment, machine, show
from scipy import stats
from worker import versions

from convert import read
from mixer_jax.commands.finetune import finetune
from mixer_jax.evaluation import Accuracy
from mixer_jax.images import cores
from mixer_jax.pretrained import load
from mixer_jax.training.config import FinetuneConfig
from mixer_jax.training.freezing import named_weights
from mixer_jax.training.loop import Trainer
from mixer_jax.training.sources import Part, read_parts

Row = dict[str, Any]
PACKAGE = "dataset-fashion-mnist"  # Debian's
SEEDS = (0, 1, 2)
PRETRAINED, TUNED = range(5), range(5, 10)  # classes
PER_CLASS = (20, 100, 500)
ADAMW = {"optimizer": "adamw", "weight_decay": 0.05}
FASHION = ADAMW | {"batch_size": 64, "min_area": None, "flip": True, "image_size": (28, 28)}
DIGITS = ADAMW | {"batch_size": 64, "min_area": None, "flip": False, "mixup": 0.3, "randaugment": 3.0, "operations": 1}
AT_8 = {"base_rate": 3e-3, "warmup_steps": 100, "image_size": (8, 8)}
CONFIGS: dict[str, Row] = {  # fields of FinetuneConfig
    "fashion": FASHION | {"mixup": 0.2, "base_rate": 3e-3, "warmup_steps": 400, "total_steps": 9000, "evaluate_every": 1000},
    "pretraining": FASHION | {"base_rate": 2e-3, "warmup_steps": 200, "total_steps": 2400, "evaluate_every": 1200},
    "tuning": FASHION | {"batch_size": 32, "warmup_steps": 50, "total_steps": 400, "evaluate_every": 400, "validation": 0.2},
    "digits": DIGITS | AT_8 | {"total_steps": 1500, "evaluate_every": 1500},
    "small": DIGITS | AT_8 | {"total_steps": 800, "evaluate_every": 800},
    "resolution": DIGITS | {"base_rate": 1e-3, "warmup_steps": 20, "total_steps": 200, "evaluate_every": 200},
}
RATES = {  # base_rate by images a class: the best of three to five, on 5,000 training images that the run did not see
    "fine-tuned": {20: 5e-4, 100: 1e-3, 500: 1e-3},
    "from scratch": {20: 3e-3, 100: 1e-3, 500: 6e-3},
}
MIXERS = {
    "fashion": "S/7,num_blocks=4,hidden_dim=128,tokens_mlp_dim=64,channels_mlp_dim=256",
    "digits": "S/2,num_blocks=2,hidden_dim=128,tokens_mlp_dim=64,channels_mlp_dim=256",
}
QUICK = {"total_steps": 4, "warmup_steps": 1, "evaluate_every": 2, "batch_size": 16}  # in place of a config's
QUICK_MIXER = "S/4,num_blocks=2,hidden_dim=16,tokens_mlp_dim=8,channels_mlp_dim=24"


@dataclass(frozen=True)
class Settings:
    """Where the runs and their images are. The quick run takes digits for Fashion-MNIST, and a few steps."""

    folder: Path
    data: Path
    quick: bool

    def config(self, name: str, **changes: Any) -> FinetuneConfig:
        quick = QUICK | ({} if "image_size" in changes else {"image_size": (8, 8)}) if self.quick else {}
        return FinetuneConfig.of("small", **(CONFIGS[name] | changes | quick))

    def mixer(self, name: str) -> str:
        return QUICK_MIXER if self.quick else MIXERS[name]


@dataclass(frozen=True)
class Run:
    """A finished run, and the time and CPU time of its call of `finetune`."""

    trainer: Trainer
    seconds: float
    cpu_s: float

    @property
    def best(self) -> Path:
        return self.trainer.folder.path / "best"

    @property
    def accuracy(self) -> Accuracy:
        """On the test images, by the best weights."""
        assert self.trainer.test_accuracy
        return self.trainer.test_accuracy

    def row(self) -> Row:
        best, keys = self.trainer.best_row, ("validation_correct", "validation_images")
        parameters = self.trainer.model.config.num_parameters
        figures = {"best_step": best["step"]} | {key: best[key] for key in keys}
        figures |= {"correct": self.accuracy.correct, "images": self.accuracy.images}
        return figures | {"parameters": parameters, "seconds": self.seconds, "cpu_s": self.cpu_s}


def trained(settings: Settings, name: str, data: str | Path, config: FinetuneConfig, start: str | Path) -> Run:
    """A run in a folder of this name, from a checkpoint, or where `start` is a variant from scratch."""
    how: Row = {"from_scratch": start} if isinstance(start, str) else {}
    cpu, started = time.process_time(), time.perf_counter()
    trainer = finetune(None if how else start, data, settings.folder / name, config=config, **how)
    return Run(trainer, time.perf_counter() - started, time.process_time() - cpu)


def with_interval(row: Row) -> Row:
    """A row of images that are right with the accuracy and its interval."""
    accuracy = Accuracy.of(row["correct"], row["images"])
    return row | {"accuracy": accuracy.accuracy, "interval": [accuracy.low, accuracy.high]}


def mean_and_interval(values: list[float]) -> tuple[float, float | None]:
    """The mean, and half the length of its interval, None for one value."""
    if len(values) < 2:
        return values[0], None
    return statistics.mean(values), stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))


def write_images(folder: Path, parts: dict[str, Part], classes: range, chosen: np.ndarray | None = None) -> Path:
    """These classes, numbered from 0, as the idx files of MNIST; of the training images those chosen."""
    folder.mkdir()
    for name, prefix in (("train", "train"), ("test", "t10k")):
        pixels, labels = parts[name].pixels, np.asarray(parts[name].labels)
        assert pixels is not None
        at = np.flatnonzero(np.isin(labels, classes)) if chosen is None or name == "test" else chosen
        for kind, array in (("images", pixels[at, ..., 0]), ("labels", (labels[at] - classes[0]).astype(np.uint8))):
            header = struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape)
            (folder / f"{prefix}-{kind}-idx{array.ndim}-ubyte").write_bytes(header + array.tobytes())
    return folder


def few(labels: np.ndarray, classes: range, count: int, seed: int) -> np.ndarray:
    """Indices of so many images of each class."""
    random = np.random.default_rng(seed)
    return np.concatenate([random.permutation(np.flatnonzero(labels == each))[:count] for each in classes])


def fashion(settings: Settings) -> list[Row]:
    config = settings.config("fashion")
    ours = trained(settings, "fashion", settings.data, config, settings.mixer("fashion"))
    rows = [{"implementation": "mixer_jax"} | with_interval(ours.row())]
    if PYTHONS["peers"].exists():
        rows.append({"implementation": "timm"} | with_interval(timm(settings.folder, ours.trainer)))
    else:
        print(f"timm: not run, as there is no {PYTHONS['peers'].relative_to(ROOT)}: make bench sets it up", file=sys.stderr)
    return rows


def timm(folder: Path, ours: Trainer) -> Row:
    """The same for timm's model: the same split, settings and threads."""
    job, images = folder / "timm.json", folder / "timm.npz"
    settings = ours.config.as_dict() | {"threads": cores()}
    job.write_text(json.dumps({"settings": settings, "sizes": asdict(ours.model.config)}))
    parts = vars(ours.splits)
    labels = {f"{name}_labels": part.labels for name, part in parts.items()}
    np.savez(images, **{name: part.pixels for name, part in parts.items()}, **labels)
    command = [PYTHONS["peers"], HERE / "learn_timm.py", job, images]
    env = environment(OMP_WAIT_POLICY="PASSIVE")  # threads that spin would take the cores from the loader's processes
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=env)
    return json.loads(process.stdout.splitlines()[-1])


def transfer(settings: Settings) -> list[Row]:
    parts = read_parts(settings.data)[0]
    pretraining = write_images(settings.folder / "first-five", parts, PRETRAINED)
    pretrained = trained(settings, "pretraining", pretraining, settings.config("pretraining"), settings.mixer("fashion"))
    rows = [{"start": "pretraining"} | with_interval(pretrained.row())]
    starts = {"fine-tuned": pretrained.best, "from scratch": settings.mixer("fashion")}
    for count in PER_CLASS[:1] if settings.quick else PER_CLASS:
        accuracies: dict[str, list[float]] = {start: [] for start in starts}
        for seed in SEEDS[:1] if settings.quick else SEEDS:
            chosen = few(np.asarray(parts["train"].labels), TUNED, count, seed)
            data = write_images(settings.folder / f"few-{count}-{seed}", parts, TUNED, chosen)
            for start, source in starts.items():
                config = settings.config("tuning", seed=seed, base_rate=RATES[start][count])
                run = trained(settings, f"{start}-{count}-{seed}", data, config, source)
                accuracies[start].append(run.accuracy.accuracy)
        for start, values in accuracies.items():
            mean, half = mean_and_interval(values)
            row = {"start": start, "per_class": count, "accuracies": values, "accuracy": mean, "half_interval": half}
            rows.append(row | {"base_rate": RATES[start][count], "images": run.accuracy.images})
    return rows


def digits(settings: Settings) -> list[Row]:
    rows = []
    for seed in SEEDS[:1] if settings.quick else SEEDS:
        run = trained(settings, f"digits-{seed}", "digits", settings.config("digits", seed=seed), settings.mixer("digits"))
        rows.append({"seed": seed, "steps": run.trainer.config.recipe.total_steps} | with_interval(run.row()))
    return rows


def resolution(settings: Settings) -> list[Row]:
    """The same number of steps from the weights of 8 x 8, whose token mixing is expanded, and from scratch."""
    mixer, before = settings.mixer("digits"), settings.config("small")
    small = trained(settings, "small", "digits", before, mixer)
    tuned = trained(settings, "large", "digits", settings.config("resolution", image_size=(16, 16), keep_head=True), small.best)
    scratch_config = settings.config("resolution", image_size=(16, 16), base_rate=before.recipe.base_rate)
    scratch = trained(settings, "large-scratch", "digits", scratch_config, mixer)
    weights = named_weights(load(read(small.best).resized((16, 16))))
    expanded = vars(tuned.trainer.evaluated(weights, "test")[0].top1)
    return [
        {"start": "from scratch", "image_size": 8, "steps": before.recipe.total_steps} | with_interval(small.row()),
        {"start": "expanded", "image_size": 16, "steps": 0} | with_interval(expanded),
        {"start": "expanded", "image_size": 16, "steps": tuned.trainer.config.recipe.total_steps} | with_interval(tuned.row()),
        {"start": "from scratch", "image_size": 16, "steps": scratch_config.recipe.total_steps} | with_interval(scratch.row()),
    ]


PARTS: dict[str, Callable[[Settings], list[Row]]] = {
    "fashion": fashion,
    "transfer": transfer,
    "digits": digits,
    "resolution": resolution,
}


def judged(part: str, rows: list[Row]) -> list[Row]:
    """Every goal that the rows can decide."""
    goals: list[tuple[str, float, str, float]] = []
    if part == "fashion":
        ours, *peers = rows
        goals.append(("accuracy", ours["accuracy"], ">=", 0.91))
        goals += [("accuracy, to timm's interval", ours["accuracy"], ">=", timm["interval"][0]) for timm in peers]
    elif part == "digits":
        goals.append(("mean accuracy", statistics.mean(row["accuracy"] for row in rows), ">=", 0.985))
        goals.append(("longest run, seconds", max(row["seconds"] for row in rows), "<=", 60))
    reached = {">=": float.__ge__, "<=": float.__le__}
    keys = ("figure", "value", "relation", "target")
    return [dict(zip(keys, goal)) | {"reached": reached[goal[2]](float(goal[1]), float(goal[3]))} for goal in goals]


def figures(settings: Settings, part: str) -> Row:
    """All of a part: rows and goals, beside what they were measured with."""
    facts = machine() | {"quick": settings.quick}
    rows = PARTS[part](settings)
    goals = judged(part, rows)
    show(rows, part)
    show(goals, f"goals of {part}")
    names = {"transfer": ("pretraining", "tuning"), "resolution": ("small", "resolution")}.get(part, (part,))
    configs = {name: settings.config(name).as_dict() for name in names}
    mixer = settings.mixer("fashion" if part in ("fashion", "transfer") else "digits")
    return {"machine": facts, "versions": versions(), "mixer": mixer, "configs": configs, "rows": rows, "goals": goals}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="take a few steps on digits: whether it works")
    help_data = f"folder of Fashion-MNIST's idx files (default: %(default)s, of Debian's package {PACKAGE})"
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"), help=help_data)
    default = "benchmarks/results/learn.json, with --quick build/bench-quick/learn.json"
    parser.add_argument("--json", type=Path, help=f"write the figures here; parts not run keep theirs (default: {default})")
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"no part is called {', '.join(sorted(unknown))}: there are {', '.join(PARTS)}")
    parts = arguments.parts or list(PARTS)
    if not arguments.quick and not arguments.data.is_dir() and {"fashion", "transfer"} & set(parts):
        print(f"error: no folder {arguments.data}: apt install {PACKAGE}, or name another with --data", file=sys.stderr)
        return 1
    results = arguments.json or (ROOT / "build" / "bench-quick" if arguments.quick else HERE / "results") / "learn.json"
    results.parent.mkdir(parents=True, exist_ok=True)
    for part in parts:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
            data = arguments.data
            if arguments.quick:
                data = write_images(Path(folder, "digits"), read_parts("digits")[0], range(10))
            figured = figures(Settings(Path(folder), data, arguments.quick), part)
        known = json.loads(results.read_text()) if results.exists() else {}
        results.write_text(json.dumps(known | {part: figured}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
