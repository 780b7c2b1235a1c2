"""Every figure beside a peer's of the same run: `python benchmarks/run.py [PART ...] [--quick]`.

Each side is a process (worker.py) with the same synthetic weights and the same images. Before anything is timed, all sides
of a row must give the same results. Then they run in turns, one at a time; a ratio is the median over the turns of one
side's time by the other's in the same turn, with the least and the most beside it. The tables go to standard output,
the figures to benchmarks/results/PART.json.
"""

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from devices import synthetic

from convert import Checkpoint, MixerConfig, read, write
from mixer_jax import referee
from mixer_jax.parity import agreement
from mixer_jax.parity_command import noise

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RESULTS = HERE / "results"
PYTHONS = {
    "here": Path(sys.executable),
    "latest": ROOT / ".venv-latest" / "bin" / "python",
    "peers": ROOT / ".venv-peers" / "bin" / "python",
}
# Of the largest logit. Float32 noise at B/16 is below 1e-6 of it and tanh against exact GELU 4e-4; bfloat16 has 8 bits.
TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-2}
QUICK = MixerConfig.named("S/16", image_size=64, num_classes=10).replace(
    num_blocks=3, hidden_dim=128, tokens_mlp_dim=64, channels_mlp_dim=512
)
SETTLE = 0.05  # seconds for the threads of the last run to go to sleep


class Unequal(ValueError):
    """Two sides that do not compute the same."""


@dataclass
class Side:
    """A peer in an environment ("here", "latest", "peers"), by the name it has in the tables."""

    peer: str
    env: str = "here"
    job: dict[str, Any] = field(default_factory=dict)
    name: str = ""

    def __post_init__(self) -> None:
        self.name = self.name or self.peer


class Worker:
    """A running side."""

    def __init__(self, side: Side):
        self.side = side
        paths = [HERE, ROOT] if side.env == "peers" else [HERE]
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": os.pathsep.join([*map(str, paths), os.environ.get("PYTHONPATH", "")]).strip(os.pathsep),
        }
        command = [PYTHONS[side.env], HERE / "worker.py", side.peer]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe_or_file(side), env=environment, text=True)
        self.told: dict[str, Any] = {}
        self.versions: dict[str, str] = {}

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self.process.stdin
        assert self.process.stdout
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            self.process.wait()
            raise RuntimeError(f"{self.side.name} ended:\n{''.join(log_of(self.side).read_text().splitlines(True)[-15:])}")
        return json.loads(answer)

    def prepare(self, folder: Path, **job: Any) -> dict[str, np.ndarray]:
        results = folder / f"{self.side.name.replace('/', '-')}.npz"
        answer = self.ask(do="prepare", results=str(results), folder=str(folder), **(job | self.side.job))
        self.told, self.versions = answer["told"], answer["versions"]
        with np.load(results) as arrays:
            return dict(arrays)

    def cpu_seconds(self) -> float:
        """Processor time so far, where the system tells it of another process."""
        try:
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            return float("nan")
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


LOGS = tempfile.TemporaryDirectory(prefix="mixer-bench-")


def log_of(side: Side) -> Path:
    return Path(LOGS.name) / f"{side.name.replace('/', '-')}.log"


def pipe_or_file(side: Side) -> Any:
    return log_of(side).open("a")


@contextlib.contextmanager
def running(sides: Sequence[Side]) -> Iterator[dict[str, Worker]]:
    workers: dict[str, Worker] = {}
    try:
        for side in sides:
            workers[side.name] = Worker(side)
        yield workers
    finally:
        for worker in workers.values():
            worker.close()


@dataclass
class Times:
    """Seconds of every turn, by side; the same of processor time; what idle sides used meanwhile."""

    wall: dict[str, list[float]]
    cpu: dict[str, list[float]]
    idle_share: float

    def ratio(self, a: str, b: str) -> tuple[float, float, float]:
        """a's time by b's: median, least and most over the turns."""
        ratios = [x / y for x, y in zip(self.wall[a], self.wall[b])]
        return statistics.median(ratios), min(ratios), max(ratios)

    def row(self, name: str, **more: Any) -> dict[str, Any]:
        seconds = self.wall[name]
        median = statistics.median(seconds)
        spread = (max(seconds) - min(seconds)) / median
        return {"side": name, "median_s": median, "spread": spread, "cpu_s": statistics.median(self.cpu[name]), **more}


def in_turns(workers: dict[str, Worker], turns: int, warm: int = 1, repeat: int = 1) -> Times:
    """Every worker once a turn, or so many times in a row, one at a time, with a pause in between."""
    wall: dict[str, list[float]] = {name: [] for name in workers}
    cpu: dict[str, list[float]] = {name: [] for name in workers}
    idle = total = 0.0
    for turn in range(-warm, turns):
        for name, worker in workers.items():
            time.sleep(SETTLE)
            others = [other for other in workers.values() if other is not worker]
            before = sum(other.cpu_seconds() for other in others)
            answer = worker.ask(do="run", repeat=repeat)
            if turn < 0:
                continue
            idle += sum(other.cpu_seconds() for other in others) - before
            total += answer["seconds"]
            wall[name].append(answer["seconds"])
            cpu[name].append(answer["cpu"])
    return Times(wall, cpu, idle / total)


# What is compared.


def require_equal(
    results: dict[str, dict[str, np.ndarray]], dtype: str, expected: np.ndarray | None = None
) -> dict[str, float]:
    """Every side's logits against the referee's first rows and the first side's all; the largest difference of each, relative.

    Raises Unequal, naming every side that is off.
    """
    names = list(results)
    first = results[names[0]]["logits"]
    found = {}
    for name in names:
        logits = results[name]["logits"]
        agreed = agreement(logits, first)
        found[name] = agreed.largest / agreed.scale
        if expected is not None:
            agreed = agreement(logits[: len(expected)], expected)
            found[name] = max(found[name], agreed.largest / agreed.scale)
    wrong = [f"{name} by {value:.1e}" for name, value in found.items() if not value <= TOLERANCE[dtype]]
    if wrong:
        raise Unequal(f"logits differ by more than {TOLERANCE[dtype]:.0e} of the largest: {', '.join(wrong)}")
    return found


@dataclass
class Bench:
    """Where a run keeps its files, and how thorough it is."""

    folder: Path
    quick: bool
    turns: int | None
    peers: bool
    batches: list[int] | None = None
    plant: str | None = None

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

    def available(self, sides: Sequence[Side]) -> list[Side]:
        """Those whose environment is there; PyTorch is in the first one, too."""
        kept = []
        for side in sides:
            if side.env == "peers" and not self.peers and side.peer == "twin":
                side.env = "here"
            if side.env == "here" or (PYTHONS[side.env].exists() and (self.peers or side.env != "peers")):
                kept.append(side)
        if self.plant:  # a fault on purpose: this side gets weights of its own
            for side in kept:
                if side.name == self.plant:
                    side.job["weights"] = self.planted()
        return kept

    def planted(self) -> str:
        name, config = self.model()
        path = self.folder / "planted.npz"
        arrays = dict(read(self.weights(config, name)).as_numpy())
        arrays["MixerBlock_1/LayerNorm_0/scale"] = arrays["MixerBlock_1/LayerNorm_0/scale"] * np.float32(1.001)
        write(path, Checkpoint.from_arrays(arrays).with_image_size(config.image_size), layout="google", force=True)
        return str(path)


Rows = list[dict[str, Any]]
Goals = list[dict[str, Any]]


def goal(claim: str, value: float, relation: str, target: float) -> dict[str, Any]:
    reached = value >= target if relation == ">=" else value <= target
    return {"claim": claim, "value": value, "relation": relation, "target": target, "reached": bool(reached)}


def forward(bench: Bench, dtype: str, sides: Sequence[Side], batches: dict[int, int]) -> tuple[Rows, dict[str, Any], dict]:
    """Rows of a forward pass by batch, the ceiling of each batch's turns among them; and the times."""
    batches = {batch: turns for batch, turns in batches.items() if batch in (bench.batches or batches)}
    if not batches:
        return [], {}, {}
    name, config = bench.model()
    weights, images = bench.weights(config, name), bench.images(config, max(batches))
    expected = referee.forward(config, read(weights).as_numpy(), np.load(images, mmap_mode="r")[:1])
    rows: Rows = []
    times: dict[int, Times] = {}
    with running(sides) as workers:
        for batch, turns in batches.items():
            job = {"weights": weights, "images": images, "batch": batch, "dtype": dtype, "threads": os.cpu_count()}
            results = {n: worker.prepare(bench.folder, **job) for n, worker in workers.items()}
            off = require_equal({n: result for n, result in results.items() if "logits" in result}, dtype, expected)
            times[batch] = measured = in_turns(workers, bench.turns or turns)
            flops = batch * config.forward_flops
            for n, worker in workers.items():
                row = measured.row(n, batch=batch, dtype=dtype, model=name, versions=worker.versions)
                if n in off or n == "products":
                    ratio, least, most = measured.ratio(n, "ours")
                    row |= {"times_ours": ratio, "times_ours_range": [least, most]}
                if n in off:
                    row |= {"images_per_s": batch / row["median_s"]}
                    row |= {"gflops": flops / row["median_s"] / 1e9, "largest_difference": off[n]}
                    for top in (c for c in workers if c.startswith("ceiling")):
                        by = statistics.median(
                            flops / workers[top].told["flops"] * c / s for c, s in zip(measured.wall[top], measured.wall[n])
                        )
                        row[f"of_{top}"] = by
                if "flops" in worker.told:
                    row |= {"gflops": worker.told["flops"] / row["median_s"] / 1e9, "product": worker.told["product"]}
                if "bytes" in worker.told:
                    row |= {"gb_per_s": worker.told["bytes"] / row["median_s"] / 1e9}
                rows.append(row)
            rows[-1]["idle_share"] = measured.idle_share
            show(rows[-len(workers) :], f"forward {dtype}, {name}, batch {batch} (idle sides used {measured.idle_share:.1%})")
        told = {n: worker.told for n, worker in workers.items()}
    return rows, told, times


def part_forward(bench: Bench) -> tuple[Rows, Goals]:
    sides = [Side("ours"), Side("linen"), Side("timm", "peers"), Side("torch_eager", "peers"), Side("torch_compile", "peers")]
    sides += [Side("onnxruntime", "peers"), Side("openvino", "peers"), Side("ceiling"), Side("bandwidth")]
    sides += [Side("ours", job={"unstack": True}, name="ours-unstacked"), Side("products")]
    if bench.quick:
        sides = [Side("ours"), Side("nnx_jit"), Side("linen"), Side("twin", "peers")]
    batches = {8: 3} if bench.quick else {1: 15, 8: 7, 32: 5}
    rows, _, times = forward(bench, "float32", bench.available(sides), batches)
    goals: Goals = []
    if bench.quick:
        return rows, goals
    # All peers at once would take more than 24 GB, most of it OpenVINO's conversion.
    few = [Side(name) for name in ("ours", "linen", "products", "ceiling")]
    large, _, more = forward(bench, "float32", bench.available(few), {128: 3})
    rows, times = rows + large, times | more
    ours = {row["batch"]: row for row in rows if row["side"] == "ours"}
    for batch, row in ours.items():
        goals.append(goal(f"of the ceiling, batch {batch}", row["of_ceiling"], ">=", 0.8 if batch == 1 else 0.9))
    shares = [row["of_ceiling"] for batch, row in ours.items() if batch >= 8]
    if len(shares) > 1:
        goals.append(goal("flat from 8 to 128: least by most", min(shares) / max(shares), ">=", 0.95))
    least = {"linen": {8: 1.15, 32: 1.4}, "timm": dict.fromkeys(batches, 2.0)}
    least |= {name: dict.fromkeys(batches, 1.0) for name in ("openvino", "onnxruntime")}
    for name, targets in least.items():
        for batch, target in targets.items():
            if batch in times and name in times[batch].wall:
                goals.append(goal(f"{name} by ours, batch {batch}", times[batch].ratio(name, "ours")[0], ">=", target))
    return rows, goals


def part_bfloat16(bench: Bench) -> tuple[Rows, Goals]:
    sides = [Side("ours"), Side("linen"), Side("ours", "latest", name="ours-latest")]
    sides += [Side("linen", "latest", name="linen-latest"), Side("torch_eager", "peers"), Side("timm", "peers")]
    sides += [
        Side("twin", "peers"),
        Side("openvino", "peers"),
        Side("ceiling"),
        Side("ceiling", "latest", name="ceiling-latest"),
    ]
    batches = {1: 2} if bench.quick else {8: 7, 32: 5}
    rows, _, times = forward(bench, "bfloat16", bench.available(sides), batches)
    goals: Goals = []
    for batch in times:
        mine = "ours-latest" if "ours-latest" in times[batch].wall else "ours"
        for name in ("torch_eager", "timm", "twin"):
            if name in times[batch].wall:
                goals.append(goal(f"{name} by {mine}, bf16, batch {batch}", times[batch].ratio(name, mine)[0], ">=", 1.0))
    return rows, goals


def part_twin(bench: Bench) -> tuple[Rows, Goals]:
    rows, goals = [], []
    for dtype in ("float32", "bfloat16"):
        sides = bench.available([Side("twin", "peers", name="ours"), Side("timm", "peers"), Side("torch_eager", "peers")])
        batches = {1: 2} if bench.quick else {1: 15, 8: 7, 32: 5}
        more, _, times = forward(bench, dtype, sides, batches)
        rows += more
        for batch in times:
            if "timm" in times[batch].wall:
                goals.append(goal(f"timm by twin, {dtype}, batch {batch}", times[batch].ratio("timm", "ours")[0], ">=", 1.1))
    return rows, goals


def part_train(bench: Bench) -> tuple[Rows, Goals]:
    name, config = bench.model()
    batch = 8
    sides = [Side("ours_training", job={"remat": remat}, name="ours, remat" if remat else "ours") for remat in (False, True)]
    sides += [Side("linen_training", name="linen"), Side("timm_training", "peers", name="timm")]
    sides = bench.available(sides)
    job = {"weights": bench.weights(config, name), "images": bench.images(config, batch), "batch": batch, "dtype": "float32"}
    with running(sides) as workers:
        losses = {n: worker.prepare(bench.folder, **job)["losses"] for n, worker in workers.items()}
        off = {n: float(np.abs(values / losses["ours"] - 1).max()) for n, values in losses.items()}
        if len(set(losses["ours"])) < 3 or not max(off.values()) <= 1e-4:
            raise Unequal(f"losses of three steps differ by more than 1e-4 or stand still: {losses}")
        times = in_turns(workers, bench.turns or (2 if bench.quick else 5))
        rows = [
            times.row(
                n, batch=batch, model=name, times_ours=times.ratio(n, "ours")[0], largest_difference=off[n], **worker.told
            )
            for n, worker in workers.items()
        ]
        rows = [row | {"versions": worker.versions} for row, worker in zip(rows, workers.values())]
        mine, theirs = workers["ours, remat"].told, workers["linen"].told
    show(rows, f"training step, {name}, batch {batch}")
    if bench.quick:
        return rows, []
    goals = [goal("ours by timm's time", times.ratio("ours", "timm")[0], "<=", 0.75)] if "timm" in times.wall else []
    goals.append(
        goal("temporaries with remat by unrolled", mine["temporaries_bytes"] / theirs["temporaries_bytes"], "<=", 0.35)
    )
    goals.append(goal("compile time with remat by unrolled", mine["compile_s"] / theirs["compile_s"], "<=", 0.3))
    return rows, goals


def part_depth(bench: Bench) -> tuple[Rows, Goals]:
    depths = (2, 4) if bench.quick else (12, 24, 32)
    sides = [Side(f"{who}_compiling", job={"blocks": n}, name=f"{who}/{n}") for n in depths for who in ("ours", "linen")]
    with running(sides) as workers:
        for worker in workers.values():
            worker.prepare(bench.folder, variant="S/32" if bench.quick else "B/16", batch=8)
        times = in_turns(workers, bench.turns or (1 if bench.quick else 3))
        rows = [
            times.row(
                n, blocks=depth, versions=workers[n].versions, times_shallow=times.ratio(n, f"{n.split('/')[0]}/{depths[0]}")[0]
            )
            for n, depth in ((side.name, side.job["blocks"]) for side in sides)
        ]
    show(rows, "compile time of a training step by depth")
    goals = [
        goal(f"compile, {n} blocks by {depths[0]}", times.ratio(f"ours/{n}", f"ours/{depths[0]}")[0], "<=", 1.3)
        for n in depths[1:]
    ]
    return rows, [] if bench.quick else goals


def part_overhead(bench: Bench) -> tuple[Rows, Goals]:
    """Calls of a 12-block model that computes next to nothing."""
    config = MixerConfig.named("S/16", image_size=32, num_classes=3).replace(
        num_blocks=12, hidden_dim=32, tokens_mlp_dim=8, channels_mlp_dim=64
    )
    weights, images = bench.weights(config, "next-to-nothing"), bench.images(config, 1)
    sides = bench.available([Side("ours"), Side("nnx_jit"), Side("linen"), Side("twin", "peers")])
    with running(sides) as workers:
        job = {"weights": weights, "images": images, "batch": 1, "dtype": "float32"}
        results = {n: worker.prepare(bench.folder, **job) for n, worker in workers.items()}
        require_equal(results, "float32", referee.forward(config, read(weights).as_numpy(), np.load(images)))
        times = in_turns(workers, bench.turns or 15, repeat=100)
        rows = [
            times.row(
                n, ms=1e3 * statistics.median(times.wall[n]), times_ours=times.ratio(n, "ours")[0], versions=workers[n].versions
            )
            for n in workers
        ]
    show(rows, "one of 100 calls of a tiny model")
    return rows, [] if bench.quick else [goal("milliseconds a call", rows[0]["ms"], "<=", 0.5)]


def process(side: str, weights: str, images: str, results: Path, **environment: str) -> dict[str, Any]:
    """A new process of first_logits.py: seconds from start to end, what it says, and its peak memory."""
    paths = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]).strip(os.pathsep)
    said = results.with_suffix(".json")
    started = time.perf_counter()
    with said.open("w") as output, log_of(Side(side)).open("a") as log:
        child = subprocess.Popen(
            [sys.executable, HERE / "first_logits.py", side, weights, images, results],
            stdout=output,
            stderr=log,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": paths} | environment,
        )
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - started
    if child.returncode:
        raise RuntimeError(f"{side} failed:\n{log_of(Side(side)).read_text()[-2000:]}")
    mib = usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    return {"process_s": seconds, "cpu_s": usage.ru_utime + usage.ru_stime, "peak_mib": mib, **json.loads(said.read_text())}


def part_start(bench: Bench) -> tuple[Rows, Goals]:
    """From the file to the first logits in a new process, and loading alone."""
    rows, goals = [], []
    turns = bench.turns or (1 if bench.quick else 7)
    variants = {"tiny": QUICK} if bench.quick else {v: MixerConfig.named(v) for v in ("B/16", "L/16")}
    for name, config in variants.items():
        weights, images = bench.weights(config, name), bench.images(config, 1)
        sides = ("ours", "official", "load", "numpy", "imports") if name != "L/16" else ("load", "numpy")
        found: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
        logits = {}
        for turn in range(-1, turns):  # the first only fills the page cache
            for side in sides:
                measured = process(side, weights, images, bench.folder / f"first-{side}.npy")
                logits[side] = {"logits": np.load(bench.folder / f"first-{side}.npy")}
                if turn >= 0:
                    found[side].append(measured)
            if turn < 0 and "ours" in sides:
                expected = referee.forward(config, read(weights).as_numpy(), np.load(images))
                require_equal({side: logits[side] for side in ("ours", "official")}, "float32", expected)
        median = {
            side: {k: statistics.median(m[k] for m in ms) for k in ("process_s", "cpu_s", "seconds", "peak_mib")}
            for side, ms in found.items()
        }
        rows += [{"side": side, "model": name, **median[side]} for side in sides]

        def paired(key: str, a: str, b: str, found: dict[str, list] = found) -> float:
            return statistics.median(x[key] / y[key] for x, y in zip(found[a], found[b]))

        if name == "B/16":
            goals.append(goal("file to first logits by official, time", paired("process_s", "ours", "official"), "<=", 0.8))
            goals.append(goal("file to first logits by official, memory", paired("peak_mib", "ours", "official"), "<=", 0.75))
            beyond = statistics.median(x["seconds"] - y["seconds"] for x, y in zip(found["load"], found["numpy"]))
            goals.append(goal("load beyond np.load of all arrays, B/16, s", beyond, "<=", 0.2))
        if name == "L/16":
            goals.append(goal("load by np.load of all arrays, L/16", paired("seconds", "load", "numpy"), "<=", 1.3))
    show(rows, "from a file, in a new process")
    return rows, goals


def part_cache(bench: Bench) -> tuple[Rows, Goals]:
    """The second process with JAX's persistent compilation cache."""
    name, config = bench.model()
    weights, images = bench.weights(config, name), bench.images(config, 1)
    rows, logits = [], []
    with tempfile.TemporaryDirectory(dir=bench.folder) as cache:
        settings = {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        settings["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
        for start in ("first", "second"):
            results = bench.folder / f"cache-{start}.npy"
            measured = process("ours", weights, images, results, **settings)
            counts = {key: measured["cache"].get(key, 0) for key in ("cache_hits", "cache_misses")}
            rows.append({"side": start, "model": name, **{k: v for k, v in measured.items() if k != "cache"}, **counts})
            logits.append(np.load(results))
    if not np.array_equal(*logits):
        raise Unequal("the second start does not give the first one's logits")
    show(rows, "start with a persistent compilation cache")
    second = rows[1]
    return rows, [
        goal("second start: cache hits", second["cache_hits"], ">=", 1),
        goal("second start: compilations", second["cache_misses"], "<=", 0),
    ]


PARTS: dict[str, Callable[[Bench], tuple[Rows, Goals]]] = {
    name.removeprefix("part_"): function for name, function in list(globals().items()) if name.startswith("part_")
}
IN_QUICK = ("forward", "train", "start")
COLUMNS = ("side", "batch", "model", "median_s", "spread", "cpu_s", "times_ours", "times_shallow", "gflops", "of_ceiling")
COLUMNS += ("of_ceiling-latest", "images_per_s", "gb_per_s", "ms", "temporaries_bytes", "compile_s", "process_s", "seconds")
COLUMNS += ("peak_mib", "cache_hits", "cache_misses", "largest_difference")


def show(rows: Rows, title: str) -> None:
    columns = [column for column in COLUMNS if any(column in row for row in rows)]
    table = [columns] + [[cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in table) for i in range(len(columns))]
    print(f"\n{title}")
    for line in table:
        print("  " + "  ".join(text.ljust(w) if i == 0 else text.rjust(w) for i, (text, w) in enumerate(zip(line, widths))))
    sys.stdout.flush()


def cell(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.1e}" if 0 < abs(value) < 1e-4 else f"{value:.4g}"


def machine() -> dict[str, Any]:
    names = [line.split(":")[1].strip() for line in lines(Path("/proc/cpuinfo")) if line.startswith("model name")]
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "device": f"CPU ({names[0] if names else platform.processor()})",
        "threads": os.cpu_count(),
        "platform": platform.platform(),
        "load_before": load,
    }


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="a small model, one or two turns: whether all sides agree")
    parser.add_argument("--without-peers", action="store_true", help="only what the first environment has")
    parser.add_argument("--batches", type=int, nargs="+", help="of the forward pass (default: by part)")
    parser.add_argument("--turns", type=int, help="how often each side runs (default: by part and batch)")
    parser.add_argument(
        "--results", type=Path, help="folder for the JSON (default: benchmarks/results; build/bench-quick if quick)"
    )
    parser.add_argument("--folder", type=Path, help="keep weights and images here for the next run")
    parser.add_argument("--plant", metavar="SIDE", help="give this side slightly wrong weights: the run must fail")
    arguments = parser.parse_args()
    unknown = set(arguments.parts) - set(PARTS)
    if unknown:
        parser.error(f"no part is called {', '.join(sorted(unknown))}: there are {', '.join(PARTS)}")
    results = arguments.results or (ROOT / "build" / "bench-quick" if arguments.quick else RESULTS)
    results.mkdir(parents=True, exist_ok=True)
    facts = machine()
    print(f"{facts['device']}, {facts['threads']} threads, load {facts['load_before']:.1f}")
    missed = 0
    with contextlib.ExitStack() as stack:
        folder = arguments.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        bench = Bench(
            folder,
            arguments.quick,
            arguments.turns,
            not (arguments.without_peers or arguments.quick),
            arguments.batches,
            arguments.plant,
        )
        for name in arguments.parts or (IN_QUICK if bench.quick else PARTS):
            try:
                rows, goals = PARTS[name](bench)
            except Unequal as error:
                print(f"error: {name}: {error}", file=sys.stderr)
                return 1
            for one in goals:
                verdict = "reached" if one["reached"] else "MISSED"
                print(f"  {verdict:<8} {one['claim']}: {one['value']:.3g} {one['relation']} {one['target']:g}")
            missed += sum(not one["reached"] for one in goals)
            written = {"machine": facts | {"quick": bench.quick}, "rows": rows, "goals": goals}
            (results / f"{name}.json").write_text(json.dumps(written, indent=1) + "\n")
    print(f"\n{missed} goals missed" if missed else "")
    return 0


if __name__ == "__main__":
    sys.exit(main())
