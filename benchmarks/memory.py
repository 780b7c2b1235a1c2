"""Memory of fine-tuning on a TPU v5e and on a 4x4 slice of them, by the compiler's own count: nothing runs on a device.

`python benchmarks/memory.py [--quick] [--json FILE]` compiles a step of the official recipe in bfloat16, with float32 weights
and momentum, sharded in every way. A device's memory is arguments + outputs - outputs that are written over arguments +
temporaries; gradients are among the last. The largest batch is on the line through two compiled ones. What FILE has of the same
versions is not compiled again. `--quick` takes a small model, not optimised.
"""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ahead_of_time import UNOPTIMIZED, Job, compile_for, versions
from chart import markdown

Row = dict[str, Any]


class Sharding(NamedTuple):
    """The first chips of a topology as a mesh, and whether weights are split over data."""

    topology: str
    data: int = 1
    model: int = 1
    split_weights: bool = False

    @property
    def options(self) -> Row:
        mesh = f"data={self.data},model={self.model}"
        return {"chips": self.data * self.model, "mesh": mesh, "split_weights": self.split_weights}


ONE, SPLIT = "one v5e", "data=16, split weights"
SHARDINGS = {
    ONE: Sharding("v5e:2x2"),
    "data=16": Sharding("v5e:4x4", data=16),
    SPLIT: Sharding("v5e:4x4", data=16, split_weights=True),
    "data=4,model=4": Sharding("v5e:4x4", data=4, model=4),
    "data=4,model=4, split weights": Sharding("v5e:4x4", data=4, model=4, split_weights=True),
}
PER_CHIP = 32  # images: on 16 chips a batch of 512, the official one
STEP = 8  # the largest batch is searched among multiples of it on each part of the axis data
V5E = 15.75 * 2**30  # bytes of 16 GiB that a program gets, by the compiler
REFUSED = re.compile(r"temporaries \(([\d.]+)G\) exceeds")  # what the compiler refuses; it accepts some that are beyond V5E
H100 = 0.9 * 84_978_434_048  # the device's memory in h100.txtpb, of which JAX gets 90% if told to
QUICK = {"num_blocks": 2, "hidden_dim": 128, "tokens_mlp_dim": 64, "channels_mlp_dim": 256, "image_size": 64, "num_classes": 8}
WORK = ("variant", "optimizer", "dtype", "remat", "sharding")


def works(sharding: str) -> list[Row]:
    common = {"optimizer": "sgd", "dtype": "bfloat16", "sharding": sharding}
    return [{"variant": variant, "remat": remat} | common for variant in ("H/14", "L/16") for remat in (False, True)]


def batch_of(sharding: str) -> int:
    return PER_CHIP * SHARDINGS[sharding].data * SHARDINGS[sharding].model


def compiled(work: Row, batch: int, sizes: Row | None = None) -> Row:
    """The bytes of a training step on a device, or, where the compiler refuses it, the GiB of its temporaries as "refused"."""
    sharding = SHARDINGS[work["sharding"]]
    options = {name: work[name] for name in WORK[:-1]} | sharding.options | {"batch": batch, "sizes": sizes}
    row = work | {"batch": batch}
    try:
        (program,) = compile_for(sharding.topology, [Job("programs:placed_step", options, UNOPTIMIZED if sizes else None)])
    except RuntimeError as error:
        if not (refused := REFUSED.search(str(error))):
            raise
        row["refused"] = float(refused[1])
    else:
        row |= program.memory | {"temporaries": program.temporaries, "bytes": program.bytes}
    print(*row.values(), flush=True)
    return row


def next_batch(row: Row, step: int) -> int:
    """A batch that about fills a v5e: as if temporaries, but for gradients as large as the momentum, grew with the batch."""
    bytes_an_image = (row["temporaries"] - row["outputs"] / 2) / row["batch"]
    return row["batch"] + max(1, int((V5E - row["bytes"]) / bytes_an_image / step)) * step


def largest(rows: Sequence[Row], step: int, memory: float) -> int:
    """The largest batch, a multiple of `step`, that fits on a line through two batches."""
    first, second = rows
    bytes_an_image = (second["bytes"] - first["bytes"]) / (second["batch"] - first["batch"])
    return int((second["batch"] + (memory - second["bytes"]) / bytes_an_image) / step) * step


class Results:
    """What is compiled, in a file that is written after each program."""

    def __init__(self, path: Path | None):
        self.path = path
        self.figures: Row = {"kind": "computed by the compiler, not run on a device", "versions": versions()}
        self.figures |= {"rows": [], "largest": []}
        if path and path.exists() and (known := json.loads(path.read_text()))["versions"] == versions():
            self.figures["rows"] = known["rows"]

    def row(self, work: Row, batch: int, sizes: Row | None = None) -> Row:
        wanted = work | {"batch": batch}
        for row in self.figures["rows"]:
            if wanted.items() <= row.items():
                return row
        self.figures["rows"].append(compiled(work, batch, sizes))
        self.write()
        return self.figures["rows"][-1]

    def largest(self, work: Row) -> None:
        first, step = self.row(work, batch_of(work["sharding"])), STEP * SHARDINGS[work["sharding"]].data
        batch = next_batch(first, step)
        while "refused" in (second := self.row(work, batch)):
            batch = first["batch"] + (batch - first["batch"]) // step // 2 * step
        rows = [first, second]
        figures = {"batch": largest(rows, step, V5E), "compiled": [row["batch"] for row in rows]}
        if work["sharding"] == ONE:
            figures["h100"] = largest(rows, step, H100)
        self.figures["largest"].append(work | figures)
        self.write()

    def write(self) -> None:
        if self.path:
            self.path.write_text(json.dumps(self.figures, indent=1) + "\n")


def tables(figures: Row) -> str:
    """The tables of docs/performance.md: the memory of a device at 32 images a chip, and the largest batches."""
    names = list(SHARDINGS)
    memory: dict[str, list[str]] = {}
    for row in figures["rows"]:
        if row["batch"] == batch_of(row["sharding"]):
            state = f"{(row['bytes'] - row['temporaries']) / 2**30:.2f} + " if "bytes" in row else ""
            total = f"{row['temporaries'] / 2**30:.2f}" if "bytes" in row else f"refused: {row['refused']:.2f}"
            cells = memory.setdefault(label(row, OPTIMIZERS[row["optimizer"]]), [""] * len(names))
            cells[names.index(row["sharding"])] = state + total
            if row["optimizer"] == "sgd":  # one more array for each weight, in its dtype and sharding
                cells = memory.setdefault(f"{row['variant']}: AdamW adds to the state", [""] * len(names))
                cells[names.index(row["sharding"])] = f"{row['outputs'] / 2 / 2**30:.2f}"
    batches: dict[str, list[str]] = {}
    for row in figures["largest"]:
        batches.setdefault(label(row), []).extend([str(row["batch"]), *([str(row["h100"])] if "h100" in row else [])])
    head = ["GiB on each device, state + temporaries: computed by the compiler, not run on a device", *names]
    first = markdown(head, [[name, *memory[name]] for name in sorted(memory)])
    head = [
        "largest batch: computed by the compiler, not run on a device",
        ONE,
        "one H100, from the v5e's figures",
        f"16 v5e, {SPLIT}",
    ]
    return first + "\n\n" + markdown(head, [[name, *batches[name]] for name in sorted(batches)])


OPTIMIZERS = {"sgd": "SGD", "adamw": "AdamW"}


def label(row: Row, *more: str) -> str:
    return ", ".join([row["variant"], *more, *["remat"] * row["remat"]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="compile two programs of a small model")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file, and go on where it ends")
    arguments = parser.parse_args()
    results = Results(arguments.json)
    if arguments.quick:
        small = {"variant": "S/32", "optimizer": "sgd", "dtype": "bfloat16", "remat": True}
        for sharding in (ONE, "data=4,model=4, split weights"):
            results.row(small | {"sharding": sharding}, 512, QUICK)
    else:
        for sharding in (SPLIT, *SHARDINGS):
            for work in works(sharding):
                results.row(work, batch_of(sharding))
        for sharding in (ONE, SPLIT):
            for work in works(sharding):
                results.largest(work)
        results.row(works(ONE)[1] | {"optimizer": "adamw"}, batch_of(ONE))
    results.write()
    print(tables(results.figures))


if __name__ == "__main__":
    main()
