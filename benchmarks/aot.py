"""Compile for a TPU or an NVIDIA GPU on a machine that has neither, and read what came out.

`compile_for` starts a Python process of its own, so that nothing else sees the plugin, and returns Programs: the text of
the optimised HLO with the compiler's own analyses. The process is given names of builders, `"module:function"`, where
`function(devices, **options)` returns a jitted function and its abstract arguments with their shardings.

XLA's cost analysis counts a loop's body once. `Program.products`, `.memory_traffic` and `.collectives` read the text and
multiply by the trip counts. Nothing here is measured: it is what a device would be given to run.
"""

import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
H100 = HERE / "h100.txtpb"
PATHS = [HERE, HERE.parent, HERE.parent / "tests"]  # where builders are looked up
LIBTPU = "libtpu"  # in the folder of the environment, where only this looks for it: .ci/install_libtpu.py


class AotError(RuntimeError):
    """A program that could not be compiled, or a text that could not be read."""


@dataclass(frozen=True)
class Job:
    """What to compile: a builder "module:function", its options, and the compiler's."""

    builder: str
    options: dict[str, Any]
    compiler_options: dict[str, Any] | None = None


def compile_for(target: str, jobs: Sequence[Job], *, python: str = sys.executable) -> list["Program"]:
    """Compile for "v5e:2x2" and other TPU topologies, "h100", or "cpu:8" for a CPU that simulates 8 devices."""
    with tempfile.TemporaryDirectory() as folder:
        request, answer = Path(folder) / "request.json", Path(folder) / "answer.json"
        request.write_text(json.dumps([vars(job) for job in jobs]))
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": os.pathsep.join(map(str, [*PATHS, Path(python).parents[1] / LIBTPU])),
            # libtpu would ask the network what machine this is, and complain.
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_ACCELERATOR_TYPE": "v5litepod-4",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        }
        if target.startswith("cpu:"):
            environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={target.removeprefix('cpu:')}"
        command = [python, str(HERE / "aot.py"), target, str(request), str(answer)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise AotError(f"compiling for {target} failed:\n{done.stderr[-4000:]}")
        return [Program(**one) for one in json.loads(answer.read_text())]


def _child(target: str, request: str, answer: str) -> None:
    import importlib
    import time

    import jax

    devices = _devices(target)
    answers = []
    for job in json.loads(Path(request).read_text()):
        module, _, function = job["builder"].partition(":")
        jitted, arguments = getattr(importlib.import_module(module), function)(devices, **job["options"])
        lowered = jitted.lower(*arguments)
        started = time.process_time()
        compiled = lowered.compile(job["compiler_options"])
        seconds = time.process_time() - started
        memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
        fields = ("argument", "output", "alias", "temp")
        answers.append(
            {
                "text": compiled.as_text(),
                "cost": {key: cost[key] for key in ("flops", "bytes accessed") if key in cost},
                "memory": {name: getattr(memory, f"{name}_size_in_bytes") for name in fields},
                "compile_cpu_seconds": seconds,
                "jax": jax.__version__,
            }
        )
    Path(answer).write_text(json.dumps(answers))


def _devices(target: str) -> list[Any]:
    import jax
    from jax.experimental import topologies

    if target.startswith("cpu:"):
        return jax.devices()
    if target == "h100":
        described = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=H100.read_text())
    else:
        described = topologies.get_topology_desc(platform="tpu", topology_name=target)
    return list(described.devices)


# The text. An array's type reads `f32[8,196,768]{2,1,0:T(8,128)S(1)}`: dtype, sizes, order of the axes (minor first), the tile
# that sizes are padded to, the memory space (none: HBM; 1: a TPU core's own).
BITS = {"pred": 8, "s4": 4, "u4": 4}
ARRAY = re.compile(r"(pred|[suf]\d+|bf16|c\d+|f8\w+)\[([\d,]*)\](?:\{([\d,]*)(?::([^}]*))?\})?")
NO_TRAFFIC = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"}
NO_COPY = ('"ConcatBitcast"', '"AllocateBuffer"')  # give a name to memory
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")


@dataclass(frozen=True)
class Array:
    dtype: str
    sizes: tuple[int, ...]
    stored: tuple[int, ...]  # sizes padded to the tile
    space: int

    @property
    def elements(self) -> int:
        return math.prod(self.sizes)

    @property
    def bits(self) -> int:
        return BITS.get(self.dtype) or int(re.search(r"\d+", self.dtype)[0])  # type: ignore[index]

    @property
    def bytes(self) -> int:
        return -(-self.elements * self.bits // 8)

    @property
    def stored_bytes(self) -> int:
        return -(-math.prod(self.stored) * self.bits // 8)


def arrays_of(text: str) -> list[Array]:
    """The arrays of a type, which may be a tuple."""
    found = []
    for dtype, sizes, order, rest in ARRAY.findall(text):
        shape = tuple(map(int, sizes.split(","))) if sizes else ()
        tile = re.match(r"T\(([\d,]+)\)", rest)
        space = re.search(r"S\((\d+)\)", rest)
        stored = _padded(shape, order, tuple(map(int, tile[1].split(",")))) if tile else shape
        found.append(Array(dtype, shape, stored, int(space[1]) if space else 0))
    return found


def _padded(sizes: tuple[int, ...], order: str, tile: tuple[int, ...]) -> tuple[int, ...]:
    minor_first = [sizes[int(axis)] for axis in order.split(",")] if order else []
    minor_first += [1] * (len(tile) - len(minor_first))
    for i, unit in enumerate(reversed(tile)):
        minor_first[i] = -(-minor_first[i] // unit) * unit
    return tuple(minor_first)


@dataclass(frozen=True)
class Instruction:
    name: str
    opcode: str
    type: str
    operands: tuple[str, ...]
    inside: str  # what stands between the brackets: the operands, or a parameter's number, or a constant's value
    attributes: str
    is_root: bool

    @cached_property
    def arrays(self) -> list[Array]:
        return arrays_of(self.type)

    def attribute(self, name: str) -> str | None:
        found = re.search(rf"\b{name}=(\{{[^}}]*\}}|[^,\s]+)", self.attributes)
        return found[1] if found else None

    def called(self, name: str) -> str:
        found = self.attribute(name)
        if found is None:
            raise AotError(f"{self.opcode} {self.name} has no {name}")
        return found.lstrip("%")


Computation = dict[str, Instruction]


@dataclass(frozen=True)
class Product:
    """A matrix product or convolution: how often it runs, FLOPs of one run, and what decides its precision."""

    name: str
    opcode: str
    runs: int
    flops: int
    precision: tuple[str, ...]
    operand_dtypes: tuple[str, ...]
    window: str | None


@dataclass(frozen=True)
class Exchange:
    """How many collectives of a kind run, and what goes through them."""

    runs: int
    elements: int
    bytes: int


@dataclass(frozen=True)
class Program:
    """A compiled program: its text, XLA's cost and memory analysis, CPU seconds of the compilation."""

    text: str
    cost: dict[str, float]
    memory: dict[str, int]
    compile_cpu_seconds: float
    jax: str

    @cached_property
    def _parsed(self) -> tuple[dict[str, Computation], str]:
        return parse(self.text)

    @property
    def computations(self) -> dict[str, Computation]:
        return self._parsed[0]

    def steps(self) -> Iterator[tuple[int, Computation, Instruction]]:
        """Every instruction that is run by itself, and how often: those of the entry and of loops, not those fused."""
        yield from self._steps(self._parsed[1], 1)

    def _steps(self, name: str, runs: int) -> Iterator[tuple[int, Computation, Instruction]]:
        computation = self.computations[name]
        for instruction in computation.values():
            if instruction.opcode == "while":
                trips = trip_count(self.computations, computation, instruction)
                yield from self._steps(instruction.called("body"), runs * trips)
            elif instruction.opcode == "conditional":
                raise AotError(f"{instruction.name}: which branch of a conditional runs is not known")
            elif instruction.opcode == "call":
                yield from self._steps(instruction.called("to_apply"), runs)
            else:
                yield runs, computation, instruction

    def products(self) -> list[Product]:
        """All products, fused ones too."""
        found: list[Product] = []
        for runs, computation, instruction in self.steps():
            self._products(runs, computation, instruction, found)
        return found

    def _products(self, runs: int, computation: Computation, instruction: Instruction, found: list[Product]) -> None:
        if instruction.opcode in ("convolution", "dot"):
            found.append(_product(runs, computation, instruction))
        elif re.search(r"gemm|matmul|conv", instruction.attribute("custom_call_target") or ""):
            found.append(_library_product(runs, computation, instruction))
        elif instruction.opcode in ("fusion", "async-start"):
            inner = self.computations[instruction.called("calls")]
            for one in inner.values():
                self._products(runs, inner, one, found)

    def memory_traffic(self, *, spaces: Sequence[int] | None = (0,), multiply: bool = True) -> int:
        """Bytes that instructions read and write, padding included, in some memory spaces (None: all); with loops once
        unless `multiply`. Of an array that is only sliced, or updated in place, only that part counts."""
        counts = {}
        for runs, computation, instruction in self.steps():
            if instruction.opcode in NO_TRAFFIC or instruction.opcode.endswith("-done"):
                continue
            counts[id(instruction)] = (runs if multiply else 1) * self._bytes(computation, instruction, spaces)
        return sum(counts.values())

    def _bytes(self, computation: Computation, instruction: Instruction, spaces: Sequence[int] | None) -> int:
        def counted(arrays: list[Array]) -> int:
            return sum(a.stored_bytes for a in arrays if spaces is None or a.space in spaces)

        operands = [computation[name] for name in instruction.operands]
        if instruction.opcode in ("fusion", "async-start"):
            inner = self.computations[instruction.called("calls")]
            read = 0
            for i, operand in enumerate(operands):
                whole = counted(operand.arrays)
                read += min(whole, self._read_of_parameter(inner, i)) if whole else 0
            return read + self._written(inner, instruction, spaces)
        if instruction.opcode in ("dynamic-slice", "slice", "gather", "slice-start", "dynamic-slice-start"):
            # An asynchronous one gives a tuple: its operand, the slice, and what tells that it is done.
            part = instruction.arrays[1 if instruction.opcode.endswith("-start") else 0]
            return (part.stored_bytes if counted(operands[0].arrays) else 0) + counted([part])
        if instruction.opcode == "custom-call" and instruction.attribute("custom_call_target") in NO_COPY:
            return 0
        if instruction.opcode == "dynamic-update-slice":
            part = operands[1].arrays[0]
            return counted([part]) + (part.stored_bytes if counted(instruction.arrays) else 0)
        outputs = instruction.arrays[:1] if instruction.opcode.endswith("-start") else instruction.arrays
        return sum(counted(o.arrays) for o in operands) + counted(outputs)

    def _read_of_parameter(self, computation: Computation, index: int) -> int:
        """Bytes of a fusion's operand that it reads: those of slices, if it does nothing else with it."""
        parameter = next(i for i in computation.values() if i.opcode == "parameter" and int(i.inside) == index)
        return self._read_of(computation, parameter)

    def _read_of(self, computation: Computation, value: Instruction) -> int:
        whole, total = sum(a.stored_bytes for a in value.arrays), 0
        for user in computation.values():
            for position, name in enumerate(user.operands):
                if name != value.name:
                    continue
                if user.opcode in ("slice", "dynamic-slice", "gather") and position == 0:
                    total += user.arrays[0].stored_bytes
                elif user.opcode == "dynamic-update-slice" and position == 0:
                    total += 0
                elif user.opcode == "bitcast":
                    total += self._read_of(computation, user)
                elif user.opcode == "fusion":
                    total += self._read_of_parameter(self.computations[user.called("calls")], position)
                else:
                    total += whole
        return min(total, whole)

    def _written(self, inner: Computation, instruction: Instruction, spaces: Sequence[int] | None) -> int:
        root = next(i for i in inner.values() if i.is_root)
        parts = [inner[name] for name in root.operands] if root.opcode == "tuple" else [root]
        total = 0
        for part, array in zip(parts, instruction.arrays):
            if spaces is None or array.space in spaces:
                total += min(array.stored_bytes, self._written_by(inner, part))
        return total

    def _written_by(self, computation: Computation, part: Instruction) -> int:
        if part.opcode == "bitcast":
            return self._written_by(computation, computation[part.operands[0]])
        if part.opcode == "dynamic-update-slice":
            return computation[part.operands[1]].arrays[0].stored_bytes
        if part.opcode == "fusion" and len(part.arrays) == 1:
            inner = self.computations[part.called("calls")]
            return self._written_by(inner, next(i for i in inner.values() if i.is_root))
        return sum(a.stored_bytes for a in part.arrays)

    def collectives(self) -> dict[str, "Exchange"]:
        """What is exchanged between devices, by kind; of an all-gather what comes out, of all others what goes in."""
        found: dict[str, Exchange] = {}
        for runs, computation, instruction in self.steps():
            opcode = instruction.opcode.removesuffix("-start")
            if opcode == "async":  # the collective is in the computation it calls
                inner = self.computations[instruction.called("calls")]
                kinds = [i for i in inner.values() if i.opcode in COLLECTIVES]
                instruction, computation = (kinds[0], inner) if kinds else (instruction, computation)
                opcode = instruction.opcode
            if opcode not in COLLECTIVES:
                continue
            operands = [a for name in instruction.operands for a in computation[name].arrays]
            moved = operands if opcode != "all-gather" else instruction.arrays[-1:]
            before = found.get(opcode, Exchange(0, 0, 0))
            found[opcode] = Exchange(
                before.runs + runs,
                before.elements + runs * sum(a.elements for a in moved),
                before.bytes + runs * sum(a.bytes for a in moved),
            )
        return found


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """Computations by name, and the entry's name."""
    computations: dict[str, Computation] = {}
    entry, current = None, None
    for line in text.splitlines():
        if current is None:
            header = re.match(r"(ENTRY )?%?([^\s(]+) \(.*\{$", line)
            if header:
                current = computations.setdefault(header[2], {})
                entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            current = None
        elif " = " in line:
            instruction = _instruction(line.strip())
            current[instruction.name] = instruction
    if entry is None:
        raise AotError("this is no text of an HLO module: there is no entry")
    return computations, entry


def _instruction(line: str) -> Instruction:
    is_root = line.startswith("ROOT ")
    name, _, rest = line.removeprefix("ROOT ").partition(" = ")
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    type_, rest = rest[:end], rest[end:].lstrip()
    opened = rest.index("(")
    closed = _closing(rest, opened)
    inside = rest[opened + 1 : closed]
    operands = tuple(re.findall(r"%([^\s,(){}]+)", inside))
    return Instruction(name.lstrip("%"), rest[:opened], type_, operands, inside, rest[closed + 1 :], is_root)


def _closing(text: str, start: int) -> int:
    depth = 0
    for i in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if depth == 0:
            return i
    raise AotError(f"a bracket stays open: {text[:80]}")


def trip_count(computations: dict[str, Computation], computation: Computation, loop: Instruction) -> int:
    """How often a while loop runs, from a counter that the body adds a constant to and the condition compares."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
        return int(known[1])
    condition, body = (computations[loop.called(name)] for name in ("condition", "body"))
    root = next(i for i in condition.values() if i.is_root)
    if root.opcode == "fusion":  # a comparison by itself
        inner = computations[root.called("calls")]
        numbered = {i.name: root.operands[int(i.inside)] for i in inner.values() if i.opcode == "parameter"}
        compare = next(i for i in inner.values() if i.is_root)
        operands = [numbered.get(name, name) for name in compare.operands]
        constants = condition | {i.name: i for i in inner.values() if i.opcode == "constant"}
    else:
        compare, operands, constants = root, list(root.operands), condition
    if compare.opcode != "compare" or compare.attribute("direction") != "LT":
        raise AotError(f"{loop.name}: its condition is not counter < constant")
    index = int(constants[operands[0]].attribute("index") or -1)
    limit = _constant(constants, operands[1])
    (start_tuple,) = loop.operands
    start = _constant(computation, computation[start_tuple].operands[index])
    stepped = _source(body, next(i for i in body.values() if i.is_root).operands[index])
    if stepped.opcode != "add" or _source(body, stepped.operands[0]).attribute("index") != str(index):
        raise AotError(f"{loop.name}: its counter is not counter + constant")
    step = _constant(body, stepped.operands[1])
    return -(-(limit - start) // step)


def _source(computation: Computation, name: str) -> Instruction:
    """What is copied, perhaps several times, to give this."""
    instruction = computation[name]
    while instruction.opcode in ("copy", "bitcast"):
        instruction = computation[instruction.operands[0]]
    return instruction


def _constant(computation: Computation, name: str) -> int:
    instruction = _source(computation, name)
    if instruction.opcode != "constant":
        raise AotError(f"{name} is not a constant")
    return int(instruction.inside)


def _product(runs: int, computation: Computation, instruction: Instruction) -> Product:
    left, right = (computation[name].arrays[0] for name in instruction.operands)
    out = instruction.arrays[0]
    if instruction.opcode == "dot":
        summed = _numbers(instruction.attribute("lhs_contracting_dims"))
        flops = 2 * out.elements * math.prod(left.sizes[i] for i in summed)
    else:
        labels = (instruction.attribute("dim_labels") or "").split("_")[1].split("->")[0]
        flops = 2 * out.elements * right.elements // right.sizes[labels.index("o")]
    precision = tuple((instruction.attribute("operand_precision") or "{}").strip("{}").split(","))
    return Product(
        instruction.name,
        instruction.opcode,
        runs,
        flops,
        tuple(p for p in precision if p),
        (left.dtype, right.dtype),
        instruction.attribute("window"),
    )


def _library_product(runs: int, computation: Computation, instruction: Instruction) -> Product:
    """A call into cuBLAS or cuDNN, whose backend_config says what is summed and how precisely."""
    left, right = (computation[name].arrays[0] for name in instruction.operands[:2])
    out = instruction.arrays[0]
    attributes = instruction.attributes
    summed = re.search(r'"lhs_contracting_dimensions":\[([\d",]*)\]', attributes)
    if summed:
        flops = 2 * out.elements * math.prod(left.sizes[i] for i in _numbers(summed[1]))
    else:
        labels = (instruction.attribute("dim_labels") or "").split("_")[1].split("->")[0]
        flops = 2 * out.elements * right.elements // right.sizes[labels.index("o")]
    precision = re.search(r'"operand_precision":\[([^\]]*)\]', attributes)
    spelled = instruction.attribute("operand_precision")
    names = re.findall(r"\w+", (precision[1] if precision else "") or spelled or "")
    target = instruction.attribute("custom_call_target") or ""
    return Product(
        instruction.name,
        target.strip('"'),
        runs,
        flops,
        tuple(name.lower() for name in names),
        (left.dtype, right.dtype),
        instruction.attribute("window"),
    )


def _numbers(text: str | None) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text or "")]


if __name__ == "__main__":
    _child(*sys.argv[1:])
