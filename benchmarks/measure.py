"""Processes that take turns and are timed."""

import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PYTHONS = {
    "here": Path(sys.executable),
    "latest": ROOT / ".venv-latest" / "bin" / "python",
    "peers": ROOT / ".venv-peers" / "bin" / "python",
}
CACHE = "JAX_COMPILATION_CACHE_DIR"  # not inherited: compilations are measured
PAUSE = 0.05  # seconds for the threads of the last run to go to sleep


@dataclass
class Worker:
    """A running process of worker.py: an implementation of a task, by its name in the tables.

    A name ends in "_latest" for the newest JAX, and in "/12" for a model of 12 blocks.
    """

    name: str
    process: Any
    facts: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def request(self, **request: Any) -> dict[str, Any]:
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        if answer := self.process.stdout.readline():
            return json.loads(answer)
        raise RuntimeError(f"the process of {self.name} ended")

    def prepare(self, folder: Path, **job: Any) -> dict[str, np.ndarray]:
        """Its results, before anything is timed."""
        results = folder / f"{self.name.replace('/', '-')}.npz"
        answer = self.request(do="prepare", results=str(results), folder=str(folder), **job)
        self.facts, self.versions = answer["facts"], answer["versions"]
        with np.load(results) as arrays:
            return dict(arrays)

    def cpu_seconds(self) -> float:
        """CPU time so far; NaN where the system does not tell it of another process."""
        try:
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            return float("nan")
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def environment(*paths: Path, **variables: str) -> dict[str, str]:
    search = os.pathsep.join([*map(str, paths), os.environ.get("PYTHONPATH", "")]).strip(os.pathsep)
    inherited = {name: value for name, value in os.environ.items() if name != CACHE}
    return inherited | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": search} | variables


@contextlib.contextmanager
def running(task: str, envs: dict[str, str]) -> Iterator[dict[str, Worker]]:
    """A worker for each name, in its environment."""
    with contextlib.ExitStack() as stack:
        workers = {}
        for name, env in envs.items():
            command = [PYTHONS[env], HERE / "worker.py", task, name.removesuffix("_latest")]
            variables = environment(HERE, *([ROOT] if env == "peers" else []))
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=variables, text=True)
            workers[name] = Worker(name, stack.enter_context(process))
        yield workers


@dataclass
class Times:
    """Seconds and CPU seconds of every turn, by peer; the fraction of CPU time that waiting peers used meanwhile."""

    wall: dict[str, list[float]]
    cpu: dict[str, list[float]]
    idle_fraction: float

    def ratios(self, a: str, b: str) -> list[float]:
        """The time of a relative to that of b in the same turn."""
        return [x / y for x, y in zip(self.wall[a], self.wall[b])]

    def row(self, name: str) -> dict[str, Any]:
        seconds = self.wall[name]
        median = statistics.median(seconds)
        spread = (max(seconds) - min(seconds)) / median
        return {"median_s": median, "spread": spread, "cpu_s": statistics.median(self.cpu[name])}


def in_turns(workers: dict[str, Worker], turns: int, *, repeat: int = 1) -> Times:
    """Each worker once per turn (`repeat` times in a row), one at a time with a pause in between, after a turn to warm up."""
    times = Times({name: [] for name in workers}, {name: [] for name in workers}, 0.0)
    for turn in range(-1, turns):
        for name, worker in workers.items():
            time.sleep(PAUSE)
            others = [other for other in workers.values() if other is not worker]
            before = sum(other.cpu_seconds() for other in others)
            answer = worker.request(do="run", repeat=repeat)
            if turn >= 0:
                times.idle_fraction += sum(other.cpu_seconds() for other in others) - before
                times.wall[name].append(answer["seconds"])
                times.cpu[name].append(answer["cpu"])
    times.idle_fraction /= sum(map(sum, times.wall.values()))
    return times


def run_process(command: Sequence[object], env: dict[str, str] | None = None) -> dict[str, float]:
    """Wall and CPU seconds of a process, and its peak memory, which is at least the peak of this process."""
    started = time.perf_counter()
    child = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, env=env)
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - started
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise RuntimeError(f"failed: {' '.join(map(str, command))}")
    mib = usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    return {"process_s": seconds, "cpu_s": usage.ru_utime + usage.ru_stime, "peak_mib": mib}


def show(rows: list[dict[str, Any]], title: str) -> None:
    print(f"\n{title}")
    for row in rows:
        figures = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in row.items()}
        print("  " + ", ".join(f"{key} {figure}" for key, figure in figures.items() if not isinstance(figure, dict | list)))
    sys.stdout.flush()


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    names = [line for line in (info.read_text().splitlines() if info.exists() else []) if line.startswith("model name")]
    return {
        "device": f"CPU ({names[0].split(':')[1].strip() if names else platform.processor()})",
        "threads": os.cpu_count(),
        "platform": platform.platform(),
        "load_before": os.getloadavg()[0],
    }
