"""What a TPU v5e and an H100 would be given to run, compiled ahead of time on a machine that has neither.

`python benchmarks/ahead_of_time.py [--json FILE]` compiles our programs and Flax Linen's of the same network
(`tests/test_linen.py` holds them equal) and prints the roofline, the compiler's own count of temporaries, compile time by
depth, and the collectives of data-parallel training. Everything is computed, nothing is measured on a device.

`compile_for` starts a process of programs.py, so that nothing else sees the plugin.
"""

import argparse
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from chart import markdown

from convert import MixerConfig

HERE = Path(__file__).resolve().parent
BUILDER_PATHS = [HERE, HERE.parent, HERE.parent / "tests"]
LIBTPU = "libtpu"  # a folder of the environment that nothing else imports from: .ci/install_libtpu.py
CHIPS = {"v5e:2x2": ("TPU v5e", 197e12), "h100": ("H100", 989e12)}  # dense bf16 FLOP/s by their makers; H100: the SXM one
PAPER_TPUV3 = {"S/32": 11489, "B/32": 4208, "S/16": 3994, "B/16": 1384, "L/32": 1314, "L/16": 419, "H/14": 194}
BATCH = 128  # images per chip
# Each program is reported relative to the last of Linen's above it.
PROGRAMS: list[tuple[str, str, dict[str, Any]]] = [
    ("forward", "Flax Linen", {"model": "linen", "param_dtype": "bfloat16"}),
    ("forward", "mixer-jax, unstacked", {"model": "mixer_jax", "param_dtype": "bfloat16", "unstacked": True}),
    ("forward", "mixer-jax", {"model": "mixer_jax", "param_dtype": "bfloat16"}),
    ("forward", "Flax Linen, float32 weights", {"model": "linen"}),
    ("forward", "mixer-jax, unstacked, float32 weights", {"model": "mixer_jax", "unstacked": True}),
    ("forward", "mixer-jax, float32 weights", {"model": "mixer_jax"}),
    ("train_step", "Flax Linen", {"model": "linen"}),
    ("train_step", "mixer-jax", {"model": "mixer_jax"}),
    ("train_step", "mixer-jax, remat", {"model": "mixer_jax", "remat": True}),
]
TRAINING = {"model": "mixer_jax", "batch": 8, "remat": True}
UNOPTIMIZED = {"optimization_level": 9}  # O0: collectives and precision do not depend on how matmuls are tiled
# The text of a compiled program.
MATMUL = re.compile(r'^.* (?:convolution|dot)\(.*$|^.*custom_call_target="[^"]*(?:gemm|matmul|conv).*$', re.MULTILINE)
PRECISION = re.compile(r'operand_precision"?[=:][{\[]([^}\]]*)')
COLLECTIVE = re.compile(
    r"^.* = (.*) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\((?:.*channel_id=(\d+))?", re.M
)


class Job(NamedTuple):
    """What to compile: a builder "module:function" as those of programs.py, its options, and the compiler's."""

    builder: str
    options: dict[str, Any]
    compiler_options: dict[str, Any] | None = None


class Program(NamedTuple):
    """A compiled program: its optimised HLO, its temporaries in bytes, and the CPU seconds of the compilation.

    `memory` has the bytes of "arguments" and "outputs", and of the outputs that are written over arguments, "aliased". All
    bytes are those of one device.
    """

    text: str
    temporaries: int
    compile_cpu_seconds: float
    memory: dict[str, int]

    @property
    def bytes(self) -> int:
        """What a device needs while the program runs."""
        return self.memory["arguments"] + self.memory["outputs"] - self.memory["aliased"] + self.temporaries

    def matmul_precisions(self) -> list[tuple[str, ...]]:
        """The operand precisions of every matmul and convolution in the text; () stands for the default.

        A call to cuDNN gives its bias a precision, too: a third entry.
        """
        precisions = [PRECISION.search(line) for line in MATMUL.findall(self.text)]
        return [tuple(re.findall(r"\w+", match[1].lower())) if match else () for match in precisions]

    def collectives(self) -> dict[str, list[int]]:
        """The numbers that each collective in the text returns, by kind. The body of a loop is in the text once.

        One that runs beside a matmul stands in each of the fusions that it is part of, always with one channel.
        """
        elements: dict[str, list[int]] = {}
        channels: set[str] = set()
        for result, kind, channel in COLLECTIVE.findall(self.text):
            if channel and channel in channels:
                continue
            channels.add(channel)
            sizes = re.findall(r"\w+\[([\d,]*)\]", result)
            elements.setdefault(kind, []).append(sum(prod(map(int, filter(None, size.split(",")))) for size in sizes))
        return elements


def compile_for(target: str, jobs: Sequence[Job], *, python: str = sys.executable) -> list[Program]:
    """Compile for "v5e:2x2" and other TPU topologies, "h100", or "cpu:8" for a CPU that simulates 8 devices."""
    with tempfile.TemporaryDirectory() as folder:
        request, result = Path(folder) / "request.json", Path(folder) / "result.json"
        request.write_text(json.dumps(jobs))
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": os.pathsep.join(map(str, [*BUILDER_PATHS, Path(python).parents[1] / LIBTPU])),
            # libtpu would ask the network what machine this is, and complain.
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_ACCELERATOR_TYPE": "v5litepod-4",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        }
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)  # compilations are measured
        if target.startswith("cpu:"):
            environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={target.removeprefix('cpu:')}"
        command = [python, HERE / "programs.py", target, request, result]
        process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if process.returncode:
            raise RuntimeError(f"compiling for {target} failed:\n{process.stderr[-4000:]}")
        return [Program(*program) for program in json.loads(result.read_text())]


def rooflines() -> list[dict[str, Any]]:
    """Images a second if only the matmuls of the forward pass took time, beside what the paper measured."""
    rows: list[dict[str, Any]] = []
    for variant, measured in PAPER_TPUV3.items():
        flops = MixerConfig.named(variant).forward_flops
        rows.append({"variant": variant, "gflops_an_image": flops / 1e9, "paper_tpuv3_core": measured})
        rows[-1] |= {name: peak / flops for name, peak in CHIPS.values()}
    return rows


def chips(target: str, *, python: str = sys.executable) -> list[dict[str, Any]]:
    """Temporaries beside Linen's in bfloat16: the forward pass with each dtype of weights, a training step with float32."""
    rows: list[dict[str, Any]] = []
    for work, label, options in PROGRAMS:
        (program,) = compile_for(target, [Job(f"programs:{work}", options | {"batch": BATCH})], python=python)
        if options["model"] == "linen":
            of_linen = program.temporaries
        row = {"chip": CHIPS[target][0], "work": work, "batch": BATCH, "variant": "B/16", "program": label}
        row["temporaries_mib"] = program.temporaries / 2**20
        row["temporaries_relative_to_linen"] = program.temporaries / max(of_linen, 1)
        rows.append(row | {"compile_cpu_seconds": program.compile_cpu_seconds})
        print(*rows[-1].values(), flush=True)
    return rows


def compile_times() -> list[dict[str, Any]]:
    """CPU seconds of compiling a training step for v5e, each time in a process of its own."""
    seconds: dict[int, list[float]] = {}
    for blocks in 2 * [12, 24, 32]:
        (program,) = compile_for("v5e:2x2", [Job("programs:train_step", TRAINING | {"blocks": blocks})])
        seconds.setdefault(blocks, []).append(program.compile_cpu_seconds)
        print(f"training step of {blocks} blocks: compiled in {program.compile_cpu_seconds:.1f} s of CPU", flush=True)
    return [
        {"blocks": blocks, "compile_cpu_seconds": times, "relative_to_12_blocks": min(times) / min(seconds[12])}
        for blocks, times in seconds.items()
    ]


def data_parallel() -> list[dict[str, Any]]:
    """Collectives in the text of a training step of B/16. All blocks are one loop, whose body is in the text once."""
    rows: list[dict[str, Any]] = []
    for target in ("cpu:1", "cpu:2", "cpu:4", "cpu:8", "v5e:4x4", "v5e:16x16"):
        compiler_options = None if target.startswith("cpu") else UNOPTIMIZED
        job = Job("programs:train_step", TRAINING | {"data_parallel": True}, compiler_options)
        rows.append({"target": target, "collectives": compile_for(target, [job])[0].collectives()})
        print(f"data parallel on {target}: {rows[-1]['collectives'] or 'no collective'}", flush=True)
    return rows


def versions() -> dict[str, str]:
    distributions = importlib.metadata.distributions(path=[*sys.path, str(Path(sys.prefix) / LIBTPU)])
    return {package.name: package.version for package in distributions if package.name in ("jax", "flax", "libtpu")}


def tables(results: dict[str, Any]) -> str:
    """The tables of docs/performance.md: the roofline beside the paper, and temporaries beside Linen's."""
    roofline, programs = results["roofline"], {}
    lines = [[f"{name}, {peak / 1e12:.0f} TFLOP/s", *(f"{r[name]:,.0f}" for r in roofline)] for name, peak in CHIPS.values()]
    lines.append(["*measured in the paper, one TPUv3 core*", *(f"{row['paper_tpuv3_core']:,}" for row in roofline)])
    lines.append(["GFLOPs per image (2 per multiply-add)", *(f"{row['gflops_an_image']:.1f}" for row in roofline)])
    for row in results["chips"]:
        cell = f"{row['temporaries_mib']:,.0f} ({row['temporaries_relative_to_linen']:.2f})"
        program = f"{row['variant']} {row['work'].replace('_', ' ')}: {row['program']}"
        programs.setdefault(program, {})[row["chip"]] = cell
    chips = list(dict.fromkeys(row["chip"] for row in results["chips"]))
    head = ["images/s at 100% of peak bf16 FLOP/s, computed", *(row["variant"] for row in roofline)]
    temporaries = [[program, *(cells.get(chip, "") for chip in chips)] for program, cells in programs.items()]
    second = markdown(["temporaries in MiB (relative to Flax Linen), computed", *chips], temporaries)
    return f"{markdown(head, lines)}\n\n{second}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--h100-python", metavar="PYTHON", help="an interpreter with JAX's CUDA packages: make test-h100")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file")
    arguments = parser.parse_args()
    results: dict[str, Any] = {"kind": "computed from compiled programs, not measured", "versions": versions()}
    results |= {"batch per chip": BATCH, "roofline": rooflines(), "chips": chips("v5e:2x2")}
    if arguments.h100_python:
        results["chips"] += chips("h100", python=arguments.h100_python)
    else:
        print("H100: not compiled; make test-h100 installs what it needs")
    print(tables(results))
    results |= {"compile_time_by_depth": compile_times(), "data_parallel": data_parallel()}
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
