"""What a TPU v5e and an H100 would be given to run, compiled ahead of time on a machine that has neither.

Our program beside Flax Linen's of the same network (`tests/test_linen.py` holds them equal): temporaries, memory traffic,
the ceiling of the roofline; compile time with depth; bytes through collectives in data-parallel training. Everything is
computed from compiled programs, nothing is measured on a device.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aot import LIBTPU, Job, Program, compile_for

from convert import MixerConfig

MIB, GIGA = 2**20, 1e9
# Makers' figures for one chip: dense bf16 FLOP/s, bytes a second of memory. H100: the SXM one.
CHIPS = {"v5e:2x2": ("TPU v5e", 197e12, 819e9), "h100": ("H100", 989e12, 3.35e12)}
PAPER_TPUV3 = {"S/32": 11489, "B/32": 4208, "S/16": 3994, "B/16": 1384, "L/32": 1314, "L/16": 419, "H/14": 194}
# A group's first program is Linen's, which the others of the group are measured by.
PROGRAMS: dict[str, list[dict[str, dict[str, Any]]]] = {
    "forward": [
        {
            f"Linen{suffix}": {"model": "linen", "param_dtype": stored},
            f"ours{suffix}": {"model": "ours", "param_dtype": stored, "unstacked": True},
            f"ours, stacked{suffix}": {"model": "ours", "param_dtype": stored},
        }
        for stored, suffix in (("bfloat16", ""), ("float32", ", float32 weights"))
    ],
    "train_step": [{"Linen": {"model": "linen"}, "ours": {"model": "ours"}, "ours, remat": {"model": "ours", "remat": True}}],
}
QUICK = {"optimization_level": 9}  # O0: what is exchanged does not hang on how well products are tiled
SHARDED = ("cpu:1", "cpu:2", "cpu:4", "cpu:8", "v5e:4x4", "v5e:16x16")


# Builders: run in the child that compiles.


def forward(devices: Sequence[Any], **options: Any) -> tuple[Any, tuple[Any, ...]]:
    """The jitted function (parameters, images) -> logits, and its abstract arguments."""
    import jax

    function, parameters, images, _ = _network(devices, **options)
    return jax.jit(function), (parameters, images)


def train_step(devices: Sequence[Any], **options: Any) -> tuple[Any, tuple[Any, ...]]:
    """One step of SGD with momentum on the cross-entropy, parameters and optimiser state updated in place."""
    import jax
    import jax.numpy as jnp
    import optax

    function, parameters, images, labels = _network(devices, **options)
    optimizer = optax.sgd(0.03, momentum=0.9)

    def loss(parameters: Any, images: Any, labels: Any) -> Any:
        logits = function(parameters, images).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def step(parameters: Any, state: Any, images: Any, labels: Any) -> Any:
        value, gradients = jax.value_and_grad(loss)(parameters, images, labels)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(parameters, updates), state, value

    whole = jax.tree.leaves(parameters)[0].sharding
    state = jax.tree.map(lambda leaf: _like(leaf, whole), jax.eval_shape(optimizer.init, parameters))
    return jax.jit(step, donate_argnums=(0, 1)), (parameters, state, images, labels)


def _network(
    devices: Sequence[Any],
    *,
    model: str,
    batch: int,
    variant: str = "B/16",
    blocks: int | None = None,
    dtype: str | None = "bfloat16",
    precision: str | None = None,
    param_dtype: str = "float32",
    unstacked: bool = False,
    remat: bool = False,
    data_parallel: bool = False,
) -> tuple[Any, Any, Any, Any]:
    """The function, and its parameters, images and labels as shapes; `batch` is that of one device."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx
    from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

    config = MixerConfig.named(variant)
    config = config.replace(num_blocks=blocks or config.num_blocks)
    whole: Any = SingleDeviceSharding(devices[0])
    split: Any = whole
    if data_parallel:
        mesh = Mesh(np.array(devices), ("data",))
        whole, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
        batch *= len(devices)
    images = jax.ShapeDtypeStruct((batch, *config.image_size, config.in_channels), jnp.float32, sharding=split)
    labels = jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=split)
    if model == "linen":
        from linen_mixer import MlpMixer as Linen

        linen = Linen(config, dtype=dtype, precision=precision)
        function, abstract = linen.apply, jax.eval_shape(linen.init, jax.random.key(0), images)
        abstract = jax.tree.map(lambda leaf: leaf.update(dtype=param_dtype), abstract)
    else:
        from mixer_jax import MlpMixer

        def made() -> MlpMixer:
            numerics: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "precision": precision}
            ours = MlpMixer(config, rngs=nnx.Rngs(0), remat=remat, **numerics)
            return ours.unstacked() if unstacked else ours

        ours = nnx.eval_shape(made)
        graph, abstract = nnx.split(ours)

        def function(parameters: Any, images: Any) -> Any:
            return nnx.merge(graph, parameters)(images)

    return function, jax.tree.map(lambda leaf: _like(leaf, whole), abstract), images, labels


def _like(leaf: Any, sharding: Any) -> Any:
    import jax

    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


# Tables: run in the parent.


def chips(target: str, variants: Sequence[str], batch: int, *, python: str) -> list[dict[str, Any]]:
    """Ours against Linen's in bfloat16: the forward pass of each kind of stored weights, a training step of float32 ones."""
    rows = []
    for variant in variants:
        for work, groups in PROGRAMS.items():
            for group in groups:
                jobs = [Job(f"compiled:{work}", options | {"variant": variant, "batch": batch}) for options in group.values()]
                programs = dict(zip(group, (compile_for(target, [job], python=python)[0] for job in jobs)))
                linen, *_ = programs.values()
                for label, program in programs.items():
                    rows.append(_chip(target, MixerConfig.named(variant), work, batch, program, linen))
                    rows[-1] |= {"variant": variant, "program": label}
                    _print_chip(rows[-1])
    return rows


def _chip(target: str, config: MixerConfig, work: str, batch: int, program: Program, linen: Program) -> dict[str, Any]:
    name, flops, bandwidth = CHIPS[target]
    # Backward: two products for each of the forward's, less the gradient of the images.
    needed = config.forward_flops if work == "forward" else 3 * config.forward_flops - config.modules()[0].flops
    row = {
        "chip": name,
        "work": work,
        "batch": batch,
        "temporaries_mib": program.memory["temp"] / MIB,
        "temporaries_of_linen": program.memory["temp"] / max(linen.memory["temp"], 1),
        "needed_gflops_an_image": needed / GIGA,
        "program_gflops_an_image": sum(p.runs * p.flops for p in program.products()) / batch / GIGA,
        "images_a_second_at_peak_flops": flops / needed,
        "compile_cpu_seconds": program.compile_cpu_seconds,
    }
    if target != "h100":
        through = program.memory_traffic()
        everywhere, of_linen = (p.memory_traffic(spaces=None) for p in (program, linen))
        row |= {
            "hbm_mb_an_image": through / batch / 1e6,
            "hbm_of_linen": through / linen.memory_traffic(),
            "accessed_mb_an_image": everywhere / batch / 1e6,
            "accessed_of_linen": everywhere / of_linen,
            "xla_accessed_mb_an_image_loops_once": program.cost["bytes accessed"] / batch / 1e6,
            "images_a_second_at_peak_bandwidth": bandwidth * batch / through,
        }
    return row


def _print_chip(row: dict[str, Any]) -> None:
    line = f"{row['chip']:<8}{row['variant']:<5}{row['work']:<11}{row['program']:<32}"
    line += f"{row['temporaries_mib']:6.0f} MiB of temporaries ({row['temporaries_of_linen']:.2f} of Linen's)"
    ceiling = row["images_a_second_at_peak_flops"]
    if "hbm_mb_an_image" in row:
        line += f"{row['hbm_mb_an_image']:7.1f} MB/image through HBM ({row['hbm_of_linen']:.2f})"
        line += f"{row['accessed_mb_an_image']:7.1f} accessed ({row['accessed_of_linen']:.2f})"
        ceiling = min(ceiling, row["images_a_second_at_peak_bandwidth"])
    print(f"{line}; at most {ceiling:,.0f} images/s", flush=True)


def rooflines() -> list[dict[str, Any]]:
    """Images a second if only the forward pass's products took time, beside what the paper measured on a TPUv3 core."""
    rows = []
    print("images a second at 100 % of peak bf16 FLOP/s (computed)      paper, a TPUv3 core (measured)")
    for variant, measured in PAPER_TPUV3.items():
        per_image = MixerConfig.named(variant).forward_flops
        row = {"variant": variant, "gflops_an_image": per_image / GIGA, "paper_tpuv3_core": measured}
        row |= {name: flops / per_image for name, flops, _ in CHIPS.values()}
        ceilings = "".join(f"  {name} {row[name]:9,.0f}" for name, _, _ in CHIPS.values())
        print(f"{variant:<6}{per_image / GIGA:7.1f} GFLOPs{ceilings}{measured:12,}")
        rows.append(row)
    return rows


def depths(batch: int, *, repeats: int, quick: bool) -> list[dict[str, Any]]:
    """CPU seconds of compiling a training step for v5e; each in a process of its own, interleaved."""
    seconds: dict[int, list[float]] = {12: [], 24: [], 32: []}
    for _ in range(repeats):
        for blocks, found in seconds.items():
            options = {"model": "ours", "batch": batch, "blocks": blocks, "remat": True}
            (program,) = compile_for("v5e:2x2", [Job("compiled:train_step", options, QUICK if quick else None)])
            found.append(program.compile_cpu_seconds)
    rows = []
    for blocks, found in seconds.items():
        rows.append({"blocks": blocks, "compile_cpu_seconds": found, "of_12_blocks": min(found) / min(seconds[12])})
        print(f"compile a training step, {blocks} blocks: {min(found):.1f} s CPU, {rows[-1]['of_12_blocks']:.2f} of 12 blocks")
    return rows


def data_parallel(targets: Sequence[str], batch: int) -> list[dict[str, Any]]:
    """What a training step exchanges. The algorithm needs every gradient and the loss, once; how wide, is the compiler's."""
    rows = []
    needed = MixerConfig.named("B/16").num_parameters + 1
    for target in targets:
        options = {"model": "ours", "batch": batch, "remat": True, "data_parallel": True}
        quick = None if target.startswith("cpu") else QUICK
        (program,) = compile_for(target, [Job("compiled:train_step", options, quick)])
        found = program.collectives()
        elements, moved = (sum(getattr(e, name) for e in found.values()) for name in ("elements", "bytes"))
        kinds = {kind: vars(exchange) for kind, exchange in found.items()}
        row = {"target": target, "collectives": kinds, "elements": elements, "bytes": moved}
        rows.append(row | {"elements_of_needed": elements / needed, "bytes_of_needed_in_float32": moved / (4 * needed)})
        print(
            f"data parallel on {target:<10} {elements:>11,} numbers exchanged, {elements / needed:.4f} of gradients and loss; "
            f"{moved / 1e6:.1f} MB, {moved / (4 * needed):.4f} of them in float32; "
            + (", ".join(f"{e.runs} {kind}" for kind, e in found.items()) or "no collective"),
            flush=True,
        )
    return rows


def tables(results: dict[str, Any]) -> str:
    """The tables of the README: the roofline beside the paper, and programs beside Linen's."""
    lines = ["| images a second at 100 % of peak bf16 FLOP/s, computed | " + " | ".join(PAPER_TPUV3) + " |"]
    lines += ["| --- |" + " --- |" * len(PAPER_TPUV3)]
    for name, flops, _ in CHIPS.values():
        ceilings = " | ".join(f"{row[name]:,.0f}" for row in results["roofline"])
        lines.append(f"| {name}, {flops / 1e12:.0f} TFLOP/s | {ceilings} |")
    measured = " | ".join(f"{row['paper_tpuv3_core']:,}" for row in results["roofline"])
    lines.append(f"| *measured in the paper, a TPUv3 core* | {measured} |")
    gflops = " | ".join(f"{row['gflops_an_image']:.1f}" for row in results["roofline"])
    lines += [f"| GFLOPs an image | {gflops} |", ""]
    lines += ["| B/16, bfloat16, batch 128 | chip | temporaries, MiB | through HBM, MB an image | accessed, MB an image |"]
    lines += ["| --- | --- | --- | --- | --- |"]
    for row in results["chips"]:
        cells = [f"{row['temporaries_mib']:.0f} ({row['temporaries_of_linen']:.2f})"]
        for what in ("hbm", "accessed"):
            known = f"{what}_mb_an_image" in row
            cells.append(f"{row[f'{what}_mb_an_image']:.1f} ({row[f'{what}_of_linen']:.2f})" if known else "")
        work = row["work"].replace("_", " ")
        lines.append(f"| {work}: {row['program']} | {row['chip']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch", type=int, default=128, help="images a chip (default: 128)")
    parser.add_argument("--variants", nargs="+", default=["B/16"], metavar="NAME")
    parser.add_argument("--only", nargs="+", choices=("chips", "depth", "parallel"), default=("chips", "depth", "parallel"))
    parser.add_argument("--repeats", type=int, default=2, help="of each compilation that is timed (default: 2)")
    parser.add_argument("--quick", action="store_true", help="time compilation with depth at the lowest optimisation level")
    parser.add_argument("--h100-python", metavar="PYTHON", help="one with JAX's CUDA packages, which make test-h100 installs")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    print("Compiled ahead of time and read, not measured on a device.\n")
    results: dict[str, Any] = {"kind": "computed from compiled programs, not measured", "versions": versions()}
    results |= {"batch a chip": arguments.batch, "quick": arguments.quick}
    if "chips" in arguments.only:
        results["roofline"] = rooflines()
        print()
        results["chips"] = chips("v5e:2x2", arguments.variants, arguments.batch, python=sys.executable)
        if arguments.h100_python:
            results["chips"] += chips("h100", arguments.variants, arguments.batch, python=arguments.h100_python)
        else:
            print("H100: not compiled; make test-h100 installs what it needs")
        print()
    if "depth" in arguments.only:
        results["compile_time_with_depth"] = depths(8, repeats=arguments.repeats, quick=arguments.quick)
        print()
    if "parallel" in arguments.only:
        results["data_parallel"] = data_parallel(SHARDED, 8)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
        if {"chips", "roofline"} <= results.keys():
            print(tables(results))


def versions() -> dict[str, str]:
    import importlib.metadata

    found = importlib.metadata.distributions(path=[*sys.path, str(Path(sys.prefix) / LIBTPU)])
    return {d.name: d.version for d in found if d.name in ("jax", "flax", "libtpu")}


if __name__ == "__main__":
    main()
