"""Every figure beside a peer's of the same run: `python benchmarks/run.py [PART ...] [--quick]`.

Each implementation is a process (worker.py) with the same synthetic weights and images. Before anything is timed, all must
give the same results. Then they run in turns, one at a time. The relative time (x) of a peer is the median over the turns
of its time divided by mixer-jax's in the same turn: lower is faster. Tables go to standard output, figures with their
spread to benchmarks/results/PART.json.
"""

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from devices import synthetic
from measure import CACHE, HERE, PYTHONS, ROOT, Times, Worker, environment, in_turns, machine, run_process, running, show
from worker import FROM_TORCH, PROGRAMS

from convert import Checkpoint, MixerConfig, read, write
from mixer_jax.parity import numpy_model
from mixer_jax.parity.comparison import agreement, noise

# Relative to max abs of the logits. Float32 noise at B/16 is below 1e-6 and tanh against exact GELU 4e-4; bfloat16 has 8 bits.
TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-2}
LOSS_TOLERANCE = 1e-4
QUICK = MixerConfig.named("S/16", image_size=64, num_classes=10).replace(
    num_blocks=3, hidden_dim=128, tokens_mlp_dim=64, channels_mlp_dim=512
)
OVERHEAD = MixerConfig.named("S/16", image_size=32, num_classes=3).replace(  # computes next to nothing
    num_blocks=12, hidden_dim=32, tokens_mlp_dim=8, channels_mlp_dim=64
)
Row = dict[str, Any]


class Unequal(ValueError):
    """Two implementations that do not compute the same."""


@dataclass(frozen=True)
class Settings:
    """Where a run keeps its files, and how thorough it is."""

    folder: Path
    quick: bool
    turns: int | None
    peers: bool
    batches: list[int] | None
    plant: str | None

    def weights(self, config: MixerConfig, name: str) -> str:
        path = self.folder / f"{name.replace('/', '_')}.npz"
        if not path.exists():
            write(path, synthetic(config), layout="google", force=True)
        return str(path)

    def images(self, config: MixerConfig, count: int) -> str:
        path = self.folder / f"images-{config.image_size[0]}-{count}.npy"
        if not path.exists():
            np.save(path, noise(config, count, 1))
        return str(path)

    def model(self) -> tuple[str, MixerConfig]:
        return ("tiny", QUICK) if self.quick else ("B/16", MixerConfig.named("B/16"))

    def environments(self, names: Sequence[str]) -> dict[str, str]:
        """The environment of each implementation that can run here."""
        envs = {n: "latest" if n.endswith("_latest") else "peers" if n in FROM_TORCH else "here" for n in names}
        if not self.peers:  # of the peers' libraries the first environment has PyTorch
            envs = {n: "here" if n == "torch_model" else env for n, env in envs.items()}
        return {n: env for n, env in envs.items() if PYTHONS[env].exists() and (self.peers or env != "peers")}

    def programs(self, weights: str, dtype: str) -> dict[str, str]:
        """Files that `mixer_jax export` makes of the weights. ONNX Runtime has no bfloat16 on a CPU, and takes float16."""
        narrow = "float16" if dtype == "bfloat16" else dtype
        dtypes = {".onnx": narrow, "float32 .onnx": "float32", ".stablehlo": dtype, ".pt2": dtype}
        return {key: str(self.export(weights, key.split()[-1], of)[0]) for key, of in dtypes.items()}

    def export(self, weights: str, ending: str, dtype: str) -> tuple[Path, Row]:
        """An exported program, and the figures of the process that wrote it, none if it was there already."""
        path = self.folder / f"{Path(weights).stem}-{dtype}{ending}"
        command = [sys.executable, "-m", "mixer_jax", "export", weights, path, "--dtype", dtype]
        return path, {} if path.exists() else run_process(command, environment(ROOT))

    def planted(self) -> str:
        """Slightly wrong weights."""
        name, config = self.model()
        path = self.folder / "planted.npz"
        arrays = dict(read(self.weights(config, name)).as_numpy())
        arrays["MixerBlock_1/LayerNorm_0/scale"] = arrays["MixerBlock_1/LayerNorm_0/scale"] * np.float32(1.001)
        write(path, Checkpoint.from_arrays(arrays).with_image_size(config.image_size), layout="google", force=True)
        return str(path)


@dataclass(frozen=True)
class Group:
    """Implementations that take turns at a task, the first of them the baseline, and how many turns at each batch."""

    task: str
    names: str
    turns: dict[int, int]
    dtype: str = "float32"


# What is measured, and in the quick run.

ALL = "mixer_jax linen timm torch_eager torch_compile onnxruntime openvino fastest_matmul matmuls"
BFLOAT16 = "mixer_jax linen mixer_jax_latest linen_latest torch_eager timm torch_model openvino fastest_matmul"
CALLS = "mixer_jax nnx_jit linen torch_model"
FILES = " ".join(("mixer_jax", *PROGRAMS))
GROUPS = {
    # All peers at batch 128 would take more than 24 GB, most of it OpenVINO's conversion.
    "forward": [
        Group("forward", ALL, {1: 15, 8: 7, 32: 5}),
        Group("forward", "mixer_jax linen matmuls fastest_matmul", {128: 3}),
    ],
    "bfloat16": [Group("forward", BFLOAT16, {8: 7, 32: 5}, "bfloat16")],
    "torch": [Group("forward", "torch_model timm torch_eager", {1: 15, 8: 7, 32: 5}, dtype) for dtype in TOLERANCE],
    "train": [Group("training", "mixer_jax mixer_jax_remat linen timm", {8: 5})],
    "exported": [
        Group("forward", FILES, {1: 9, 8: 5, 32: 3}),
        Group("forward", f"{FILES} mixer_jax_latest", {1: 9, 8: 5, 32: 3}, "bfloat16"),
    ],
    "depth": [Group("compiling", "mixer_jax/12 linen/12 mixer_jax/24 linen/24 mixer_jax/32 linen/32", {8: 3})],
    "overhead": [Group("calling", CALLS, {1: 15})],
}
QUICK_GROUPS = GROUPS | {
    "forward": [Group("forward", CALLS, {8: 3})],
    "exported": [Group("forward", FILES, {8: 3})],
    "depth": [Group("compiling", "mixer_jax/2 linen/2 mixer_jax/4 linen/4", {8: 1})],
}
# A figure of an implementation, the relation it should have to a target, and the targets by batch or model.
GOALS: dict[str, list[tuple[str, str, str, dict]]] = {
    "forward": [
        ("of_fastest_matmul", "mixer_jax", ">=", {1: 0.8, 8: 0.9, 32: 0.9, 128: 0.9}),
        ("flatness_from_batch_8", "mixer_jax", ">=", {128: 0.95}),
        ("relative_time", "linen", ">=", {8: 1.15, 32: 1.4}),
        ("relative_time", "timm", ">=", {1: 2.0, 8: 2.0, 32: 2.0}),
        ("relative_time", "openvino", ">=", {1: 1.0, 8: 1.0, 32: 1.0}),
        ("relative_time", "onnxruntime", ">=", {1: 1.0, 8: 1.0, 32: 1.0}),
    ],
    "bfloat16": [("relative_time_latest", n, ">=", {8: 1.0, 32: 1.0}) for n in ("torch_eager", "timm", "torch_model")],
    "torch": [("relative_time", "timm", ">=", {1: 1.1, 8: 1.1, 32: 1.1})],
    "train": [
        ("relative_time", "timm", ">=", {8: 1 / 0.75}),
        ("temporaries_bytes_relative_to_linen", "mixer_jax_remat", "<=", {8: 0.35}),
        ("compile_s_relative_to_linen", "mixer_jax_remat", "<=", {8: 0.3}),
    ],
    "depth": [("relative_time", name, "<=", {8: 1.3}) for name in ("mixer_jax/24", "mixer_jax/32")],
    "overhead": [("median_s", "mixer_jax", "<=", {1: 0.0005})],
    "start": [
        ("process_s_relative_to_official", "mixer_jax", "<=", {"B/16": 0.8}),
        ("peak_mib_relative_to_official", "mixer_jax", "<=", {"B/16": 0.75}),
        ("seconds_beyond_numpy", "load", "<=", {"B/16": 0.2}),
        ("seconds_relative_to_numpy", "load", "<=", {"L/16": 1.3}),
    ],
    "cache": [
        ("cache_hits", "mixer_jax, second process", ">=", {"B/16": 1}),
        ("cache_misses", "mixer_jax, second process", "<=", {"B/16": 0}),
    ],
}


def judged(part: str, rows: Sequence[Row]) -> list[Row]:
    """Every goal that the rows can decide."""
    goals = []
    for key, name, relation, targets in GOALS.get(part, []):
        for row in (row for row in rows if row["implementation"] == name and key in row):
            place = row["batch"] if row.get("batch") in targets else row["model"]
            if place in targets:
                value, target = row[key], targets[place]
                goal = {"figure": key, "implementation": name, "at": place, "dtype": row.get("dtype", "float32")}
                goal |= {"value": value, "relation": relation, "target": target}
                goals.append(goal | {"reached": value >= target if relation == ">=" else value <= target})
    return goals


# How it is measured.


def require_equal(results: dict[str, dict[str, np.ndarray]], dtype: str, expected: np.ndarray) -> dict[str, Row]:
    """Relative difference of each implementation's logits from the first one's, and of the first rows from the NumPy model's.

    Of training, the losses of three steps are compared. Raises Unequal, naming every implementation that differs.
    """
    what = "losses" if any("losses" in arrays for arrays in results.values()) else "logits"
    outputs = {name: arrays[what] for name, arrays in results.items() if what in arrays}
    differences, tolerance = {}, LOSS_TOLERANCE if what == "losses" else TOLERANCE[dtype]
    for name, output in outputs.items():
        first = next(iter(outputs.values()))
        if what == "logits":
            agreements = agreement(output, first), agreement(output[: len(expected)], expected)
            differences[name] = max(agreed.max_abs / agreed.scale for agreed in agreements)
        elif len(set(output)) == len(output):
            differences[name] = float(np.abs(output / first - 1).max())
        else:
            raise Unequal(f"the loss of {name} stands still: {output}")
    wrong = [f"{name} by {value:.1e}" for name, value in differences.items() if not value <= tolerance]
    if wrong:
        raise Unequal(f"{what} differ by more than {tolerance:.0e} relative to max abs: {', '.join(wrong)}")
    return {name: {"relative_difference": value} for name, value in differences.items()}


def in_groups(settings: Settings, part: str) -> list[Row]:
    """The rows of a part whose implementations take turns."""
    measured: list[Row] = []
    for group in (QUICK_GROUPS if settings.quick else GROUPS)[part]:
        chosen = settings.batches if settings.batches and group.task == "forward" else group.turns
        turns = {batch: count for batch, count in group.turns.items() if batch in chosen}
        if not turns:
            continue
        model, config = ("next-to-nothing", OVERHEAD) if group.task == "calling" else settings.model()
        weights, images = settings.weights(config, model), settings.images(config, max(turns))
        expected = numpy_model.forward(config, read(weights).as_numpy(), np.load(images, mmap_mode="r")[:1])
        planted = {}
        if settings.plant:
            wrong = settings.planted()
            programs = settings.programs(wrong, group.dtype) if settings.plant in PROGRAMS else {}
            planted = {settings.plant: {"weights": wrong, "programs": programs}}
        names = group.names.split()
        programs = settings.programs(weights, group.dtype) if set(names) & set(PROGRAMS) else {}
        with running(group.task, settings.environments(names)) as workers:
            for batch, count in turns.items():
                job = {"weights": weights, "images": images, "batch": batch, "dtype": group.dtype, "programs": programs}
                job |= {"threads": os.cpu_count(), "variant": "S/32" if settings.quick else "B/16"}
                results = {n: w.prepare(settings.folder, **(job | planted.get(n, {}))) for n, w in workers.items()}
                differences = require_equal(results, group.dtype, expected)
                times = in_turns(workers, settings.turns or count, repeat=100 if group.task == "calling" else 1)
                rows = rows_of(group, batch, config, workers, times)
                rows = [row | {"model": model} | differences.get(row["implementation"], {}) for row in rows]
                show(rows, f"{part}, {group.dtype}, {model}, batch {batch} (waiting processes used {times.idle_fraction:.1%})")
                measured += rows
    rows = [row for row in measured if row["implementation"] == "mixer_jax" and row["batch"] >= 8]
    if part == "forward" and len(rows) > 1:
        fractions = [row["of_fastest_matmul"] for row in rows]
        rows[-1]["flatness_from_batch_8"] = min(fractions) / max(fractions)
    return measured


def rows_of(group: Group, batch: int, config: MixerConfig, workers: dict[str, Worker], times: Times) -> list[Row]:
    """A row for each implementation. The baseline is the first, or the first of the same name at another depth."""
    rows, flops = [], batch * config.forward_flops
    for name, worker in workers.items():
        row = {"implementation": name, "batch": batch, "dtype": group.dtype} | times.row(name) | worker.facts
        row["versions"] = worker.versions
        if name == "fastest_matmul":
            row["gflops_per_s"] = row.pop("flops") / row["median_s"] / 1e9
        else:
            prefix = name[: name.find("/") + 1]
            ratios = times.ratios(name, next(other for other in workers if other.startswith(prefix)))
            row |= {"relative_time": statistics.median(ratios), "relative_time_range": [min(ratios), max(ratios)]}
            if "mixer_jax_latest" in workers:
                row["relative_time_latest"] = statistics.median(times.ratios(name, "mixer_jax_latest"))
        if group.task == "forward" and name not in ("fastest_matmul", "matmuls"):
            row |= {"images_per_s": batch / row["median_s"], "gflops_per_s": flops / row["median_s"] / 1e9}
            if "fastest_matmul" in workers:
                work = flops / workers["fastest_matmul"].facts["flops"]
                row["of_fastest_matmul"] = statistics.median(work / ratio for ratio in times.ratios(name, "fastest_matmul"))
        for key in ("compile_s", "temporaries_bytes"):
            if key in row:
                row[f"{key}_relative_to_linen"] = row[key] / workers["linen"].facts[key]
        rows.append(row)
    rows[-1]["idle_fraction"] = times.idle_fraction
    return rows


def first_logits(settings: Settings, name: str, model: str, config: MixerConfig, **variables: str) -> Row:
    """Figures and logits of a new process of first_logits.py."""
    results = settings.folder / "first-logits.npy"
    inputs = settings.weights(config, model), settings.images(config, 1), json.dumps(asdict(config))
    figures = run_process([sys.executable, HERE / "first_logits.py", name, *inputs, results], environment(HERE, **variables))
    return figures | json.loads(results.with_suffix(".json").read_text()) | {"logits": np.load(results)}


def start(settings: Settings) -> list[Row]:
    """From the file to the first logits in a new process, and loading alone."""
    rows: list[Row] = []
    for model, config in [settings.model()] if settings.quick else [(v, MixerConfig.named(v)) for v in ("B/16", "L/16")]:
        names = ("load", "numpy") if model == "L/16" else ("mixer_jax", "official", "load", "numpy", "imports")
        turns = [{name: first_logits(settings, name, model, config) for name in names}]  # which fills the page cache
        if "official" in names:
            weights, images = read(settings.weights(config, model)).as_numpy(), np.load(settings.images(config, 1))
            expected = numpy_model.forward(config, weights, images)
            require_equal({name: turns[0][name] for name in ("mixer_jax", "official")}, "float32", expected)
        for _ in range(settings.turns or (1 if settings.quick else 7)):
            turns.append({name: first_logits(settings, name, model, config) for name in names})
        keys = ("process_s", "cpu_s", "seconds", "peak_mib")
        values = {name: {key: np.array([turn[name][key] for turn in turns[1:]]) for key in keys} for name in names}
        for name, figures in values.items():
            if peer := {"mixer_jax": "official", "load": "numpy"}.get(name):
                relative = {f"{key}_relative_to_{peer}": figures[key] / values[peer][key] for key in keys}
                figures = figures | relative | {f"seconds_beyond_{peer}": figures["seconds"] - values[peer]["seconds"]}
            medians = {key: float(np.median(figure)) for key, figure in figures.items()}
            rows.append({"implementation": name, "model": model} | medians)
    show(rows, "from a file, in a new process")
    return rows


def cache(settings: Settings) -> list[Row]:
    """The second process with JAX's persistent compilation cache."""
    model, config = settings.model()
    with tempfile.TemporaryDirectory(dir=settings.folder) as folder:
        limits = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
        processes = [first_logits(settings, "mixer_jax", model, config, **{CACHE: folder}, **limits) for _ in range(2)]
    if not np.array_equal(*(process.pop("logits") for process in processes)):
        raise Unequal("the second process does not give the logits of the first")
    names = [{"implementation": f"mixer_jax, {which} process", "model": model} for which in ("first", "second")]
    rows = [name | process for name, process in zip(names, processes)]
    show(rows, "start with a persistent compilation cache")
    return rows


def export(settings: Settings) -> list[Row]:
    """Writing and proving of exported programs, each in a new process."""
    rows: list[Row] = []
    for model, config in [settings.model()] if settings.quick else [(v, MixerConfig.named(v)) for v in ("B/16", "L/16")]:
        weights = settings.weights(config, model)
        for ending in (".onnx", ".stablehlo", ".pt2"):
            with tempfile.TemporaryDirectory(dir=settings.folder) as folder:
                path, figures = replace(settings, folder=Path(folder)).export(weights, ending, "float32")
                sizes = {"bytes": path.stat().st_size, "bytes_of_weights": 4 * config.num_parameters}
                rows.append({"implementation": ending, "model": model} | figures | sizes)
    show(rows, "export, with its proof, in a new process")
    return rows


PARTS: dict[str, Callable[[Settings], list[Row]]] = {part: partial(in_groups, part=part) for part in GROUPS}
PARTS |= {"start": start, "cache": cache, "export": export}
IN_QUICK = ("forward", "train", "start", "exported")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="use a small model and few turns: check that all agree")
    parser.add_argument("--without-peers", action="store_true", help="run only what the first environment has")
    parser.add_argument("--batches", type=int, nargs="+", metavar="N", help="batches of the forward pass (default: by part)")
    parser.add_argument("--turns", type=int, metavar="N", help="turns per implementation (default: by part and batch)")
    default = "benchmarks/results, with --quick build/bench-quick"
    parser.add_argument("--results", type=Path, metavar="FOLDER", help=f"write the JSON files here (default: {default})")
    parser.add_argument("--folder", type=Path, help="keep weights and images here for the next run")
    parser.add_argument("--plant", metavar="NAME", help="give this implementation slightly wrong weights: the run must fail")
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"no part is called {', '.join(sorted(unknown))}: there are {', '.join(PARTS)}")
    results = arguments.results or (ROOT / "build" / "bench-quick" if arguments.quick else HERE / "results")
    results.mkdir(parents=True, exist_ok=True)
    facts = machine() | {"quick": arguments.quick}
    print(f"{facts['device']}, {facts['threads']} threads, load {facts['load_before']:.1f}")
    missed = 0
    with contextlib.ExitStack() as stack:
        folder = arguments.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        peers = not (arguments.without_peers or arguments.quick)
        settings = Settings(folder, arguments.quick, arguments.turns, peers, arguments.batches, arguments.plant)
        for name in arguments.parts or (IN_QUICK if arguments.quick else PARTS):
            try:
                rows = PARTS[name](settings)
            except Unequal as error:
                print(f"error: {name}: {error}", file=sys.stderr)
                return 1
            goals = [] if arguments.quick else judged(name, rows)
            if goals:
                show(goals, f"goals of {name}")
            missed += sum(not goal["reached"] for goal in goals)
            text = json.dumps({"machine": facts, "rows": rows, "goals": goals}, indent=1)
            (results / f"{name}.json").write_text(text + "\n")
    print(f"\n{missed} goals missed" if missed else "")
    return 0


if __name__ == "__main__":
    sys.exit(main())
