"""One implementation of a task, in a process of its own, that answers one request per line on standard input.

`python worker.py TASK NAME` answers {"do": "prepare", ...} with facts and versions once its results are written, and
{"do": "run", "repeat": n} with the seconds of one run, the mean of n in a row. It runs in whatever environment has the
implementation (jax_tasks.py, torch_tasks.py, program_tasks.py); between requests it waits for input.
"""

import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

Job = dict[str, Any]
Call = Callable[[], Any]  # one run, finished when it returns
Prepared = tuple[Call, dict[str, np.ndarray], dict[str, Any]]  # the run, its results, facts about it
PACKAGES = ("jax", "flax", "torch", "timm", "onnxruntime", "openvino", "numpy")
PROGRAMS = ("onnxruntime_file", "openvino_file", "stablehlo_file", "pt2_file")  # that `mixer_jax export` wrote
FROM_TORCH = ("torch_model", "timm", "torch_eager", "torch_compile", "onnxruntime", "openvino")
MOMENTUM, RATE = 0.9, 1e-3


def images_of(job: Job) -> np.ndarray:
    return np.load(job["images"], mmap_mode="r")[: job["batch"]].copy()


def labels_of(job: Job) -> np.ndarray:
    return np.arange(job["batch"], dtype=np.int32)


def timed(call: Call, repeat: int = 1) -> tuple[float, float]:
    """Seconds and CPU seconds of one run, the mean of several in a row."""
    cpu, started = time.process_time(), time.perf_counter()
    for _ in range(repeat):
        call()
    return (time.perf_counter() - started) / repeat, (time.process_time() - cpu) / repeat


def versions() -> dict[str, str]:
    imported = {name: importlib.metadata.version(name) for name in PACKAGES if name in sys.modules}
    return {"python": platform.python_version()} | imported


def main(task: str, name: str) -> None:
    # Whatever a library prints goes to standard error: standard output carries answers alone.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    name, _, blocks = name.partition("/")
    module = "torch_tasks" if name in FROM_TORCH else "program_tasks" if name in PROGRAMS else "jax_tasks"
    tasks = importlib.import_module(module).TASKS
    call = None
    for line in sys.stdin:
        job = json.loads(line)
        if job["do"] == "prepare":
            call = None  # what the last job held is freed first
            call, results, facts = tasks[task][name](job | {"blocks": int(blocks or 0)})
            np.savez(job["results"], **results)
            answer = {"facts": facts, "versions": versions()}
        else:
            answer = dict(zip(("seconds", "cpu"), timed(call, job["repeat"])))
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
