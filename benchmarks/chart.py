"""docs/speed.png and the tables in the documentation, from the figures in benchmarks/results: `python benchmarks/chart.py`."""

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
COLOURS = {"mixer_jax": "#c0392b", "linen": "#2c6fbb"}
NAMES = {
    "mixer_jax": "mixer-jax",
    "linen": "Flax Linen",
    "timm": "timm",
    "torch_eager": "PyTorch",
    "torch_compile": "torch.compile",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
}
FILES = {
    "mixer_jax": "**mixer-jax, `compiled`**",
    "mixer_jax_latest": "mixer-jax with the newest JAX",
    "onnxruntime_file": "`.onnx` in ONNX Runtime, float16 in place of bfloat16",
    "openvino_file": "`.onnx` in OpenVINO",
    "stablehlo_file": "`.stablehlo` in JAX",
    "pt2_file": "`.pt2` in PyTorch",
}
PARTS = {"forward": "forward", "torch": "our PyTorch model, forward", "train": "training step", "start": "file to first logits"}
FIGURES = {
    "relative_time": "relative time of {}",
    "compile_s_relative_to_linen": "compile time with `remat=True` relative to Flax Linen",
    "process_s_relative_to_official": "time relative to `np.load` and Flax Linen",
}
PATHS = {"mixer_jax": "mixer_jax", "linen": "official"}  # from file to first logits
Rows = list[dict[str, Any]]


def load(results: Path, part: str, kind: str = "rows") -> Any:
    return json.loads((results / f"{part}.json").read_text())[kind]


def missed_goals(results: Path, part: str) -> Rows:
    return [goal for goal in load(results, part, "goals") if not goal["reached"]]


def by(rows: Rows, figure: str, key: str = "batch", dtype: str = "float32") -> dict[tuple[str, Any], Any]:
    """A figure by implementation and batch, or by implementation and model."""
    chosen = (row for row in rows if figure in row and row.get("dtype", dtype) == dtype)
    return {(row["implementation"], row[key]): row[figure] for row in chosen}


def markdown(head: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *lines])


def times(relative: dict[tuple[str, Any], float], name: str, places: Any) -> list[str]:
    return [f"{relative[name, place]:.2f}" if (name, place) in relative else "" for place in places]


def readme_table(results: Path) -> str:
    """Relative times of the peers in three rows."""
    forward, train = (by(load(results, part), "relative_time") for part in ("forward", "train"))
    seconds = by(load(results, "start"), "process_s", "model")
    start = {name: f"{seconds[path, 'B/16'] / seconds['mixer_jax', 'B/16']:.2f}" for name, path in PATHS.items()}
    lines = [
        ["forward, batch 1 / 8 / 32", *(" / ".join(times(forward, name, (1, 8, 32))) for name in NAMES)],
        ["training step, batch 8", *("".join(times(train, name, (8,))) for name in NAMES)],
        ["file to first logits", *(start.get(name, "") for name in NAMES)],
    ]
    return markdown(["B/16, float32, two CPU cores: relative time (x), lower is faster", *NAMES.values()], lines)


def table(results: Path) -> str:
    """The forward pass beside its peers at every batch."""
    rows = load(results, "forward")
    relative, fraction = by(rows, "relative_time"), by(rows, "of_fastest_matmul")
    batches = sorted({batch for _, batch in relative})
    lines = [[f"**{NAMES[name]}**" if name == "mixer_jax" else NAMES[name], *times(relative, name, batches)] for name in NAMES]
    lines.append(["*the matmuls alone*", *times(relative, "matmuls", batches)])
    lines.append(["mixer-jax, FLOP/s relative to the fastest matmul", *(f"{fraction['mixer_jax', b]:.0%}" for b in batches)])
    return markdown(["B/16 forward, float32: relative time (x)", *(f"batch {batch}" for batch in batches)], lines)


def table_of_work(results: Path) -> str:
    """What else is measured, beside peers of the same run."""
    train, overhead, start = ({r["implementation"]: r for r in load(results, p)} for p in ("train", "overhead", "start"))
    start |= {r["implementation"]: r for r in load(results, "start") if r["model"] == "B/16"}
    x = {name: f"{row['relative_time']:.2f}" for name, row in train.items()}
    gib = {name: f"{row['temporaries_bytes'] / 2**30:.2f} GiB" for name, row in train.items() if "temporaries_bytes" in row}
    beside = "with `remat=True` {mixer_jax_remat}, Flax Linen {linen}"
    lines = [["training step, float32, batch 8", "1", f"{beside}, timm {{timm}}".format(**x)]]
    lines.append(["its temporaries", gib["mixer_jax"], beside.format(**gib)])
    seconds = by(load(results, "bfloat16"), "median_s", dtype="bfloat16")
    for batch in (8, 32):
        ratios = {name: seconds[name, batch] / seconds["mixer_jax_latest", batch] for name, at in seconds if at == batch}
        peers = [
            f"{NAMES[n.removesuffix('_latest')]} {ratios[n]:.2f}" for n in ("linen_latest", "torch_eager", "timm", "openvino")
        ]
        lines.append([f"forward, bfloat16, batch {batch}, newest JAX", "1", ", ".join(peers)])
    for dtype in ("float32", "bfloat16"):
        timm = by(load(results, "torch"), "relative_time", dtype=dtype)
        lines.append(
            [f"our PyTorch model, forward, {dtype}, batch 8 / 32", "1", f"timm {' / '.join(times(timm, 'timm', (8, 32)))}"]
        )
    ours, jitted = (f"{1e3 * overhead[name]['median_s']:.2f} ms" for name in ("mixer_jax", "nnx_jit"))
    lines.append(["one call of a tiny model of 12 blocks", ours, f"`nnx.jit` {jitted}"])
    ours, official = (f"{r['process_s']:.1f} s, {r['peak_mib']:.0f} MiB" for r in (start["mixer_jax"], start["official"]))
    lines.append(["file to first logits in a new process", ours, f"`np.load` and Flax Linen {official}"])
    predict = load(results, "predict", "predict")
    work, ratio = f"`predict` on {predict['images']:,} JPEG photographs", f"{predict['ratio_to_slower']:.2f}"
    lines.append([work, f"{predict['wall_s']['both']:.0f} s", f"relative to the slower of decoding and computing {ratio}"])
    return markdown(["work, B/16", "mixer-jax", "beside it: relative time (x) or the same figure"], lines)


def table_of_missed_goals(results: Path) -> str:
    lines = []
    for part in ("forward", "bfloat16", "torch", "train", "depth", "overhead", "start", "cache"):
        for goal in missed_goals(results, part):
            place = f"batch {goal['at']}" if isinstance(goal["at"], int) else goal["at"]
            figure = FIGURES.get(goal["figure"], goal["figure"]).format(NAMES.get(goal["implementation"]))
            work = f"{PARTS.get(part, part)}, {goal['dtype']}, {place}"
            lines.append([work, figure, f"{goal['value']:.2f}", f"{goal['relation']} {goal['target']:.3g}"])
    return markdown(["work", "figure", "measured", "goal"], lines)


def tables_of_exports(results: Path) -> str:
    """Exported programs beside `compiled`, and what writing them takes."""
    rows, columns = load(results, "exported"), {"float32": ("float32",), "bfloat16": ("bfloat16", "float16")}
    batches = sorted({row["batch"] for row in rows})

    def column(figure: str, dtypes: tuple[str, ...]) -> dict[tuple[str, Any], Any]:
        return {key: value for dtype in dtypes for key, value in by(rows, figure, dtype=dtype).items()}

    relative = [column("relative_time", dtypes) for dtypes in columns.values()]
    names = [name for name in FILES if any((name, batches[0]) in column for column in relative)]
    lines = [[FILES[name], *(" / ".join(times(column, name, batches)) for column in relative)] for name in names]
    rates = [column("images_per_s", dtypes) for dtypes in columns.values()]
    ours = (" / ".join(f"{column['mixer_jax', batch]:.1f}" for batch in batches) for column in rates)
    head = [f"B/16 forward, batch {' / '.join(map(str, batches))}: relative time (x)", *columns]
    speed = markdown(head, [*lines, ["*images a second of mixer-jax*", *ours]])
    lines = [
        [row["model"], f"`{row['implementation']}`", f"{row['process_s']:.0f}", f"{row['peak_mib'] / 1024:.1f} GiB"]
        + [f"{row['bytes'] / 1e6:.1f} MB", f"{row['bytes'] / row['bytes_of_weights'] - 1:.3%}"]
        for row in load(results, "export")
    ]
    head = ["model", "file", "seconds", "peak memory", "size", "size beyond the weights"]
    return f"{speed}\n\n{markdown(head, lines)}"


def tables_of_learning(results: Path) -> str:
    """What learn.py measured, in three tables."""
    fashion, transfer, digits, resolution = (
        load(results, "learn", part)["rows"] for part in ("fashion", "transfer", "digits", "resolution")
    )
    lines = [
        [NAMES[row["implementation"]], *accuracy(row), f"{row['seconds'] / 60:.1f}", f"{row['cpu_s'] / 60:.1f}"]
        for row in fashion
    ]
    from_scratch = markdown(["Fashion-MNIST", "test accuracy", "95 % interval", "minutes", "CPU minutes"], lines)
    means = {(row["start"], row.get("per_class")): row for row in transfer}
    lines = []
    for count in [count for start, count in means if start == "fine-tuned"]:
        pair = (means[start, count] for start in ("fine-tuned", "from scratch"))
        lines.append([f"{count}", *(f"{row['accuracy']:.1%} ± {100 * row['half_interval']:.1f}" for row in pair)])
    transferred = markdown(["images a class", "fine-tuned", "from scratch"], lines)
    steps = digits[0]["steps"]
    lines = [
        [f"8 x 8, from scratch, {steps} steps, seed {row['seed']}", *accuracy(row), f"{row['seconds']:.0f}"] for row in digits
    ]
    for row in resolution:
        work = f"{row['image_size']} x {row['image_size']}, {row['start']}, {row['steps']} steps"
        lines.append([work, *accuracy(row), f"{row['seconds']:.0f}" if "seconds" in row else ""])
    return "\n\n".join([from_scratch, transferred, markdown(["digits", "test accuracy", "95 % interval", "seconds"], lines)])


def accuracy(row: dict[str, Any]) -> list[str]:
    low, high = row["interval"]
    return [f"{row['accuracy']:.1%}", f"{low:.1%} to {high:.1%}"]


def draw(results: Path, output: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = load(results, "forward")
    fractions, rates = by(rows, "of_fastest_matmul"), by(rows, "images_per_s")
    batches = sorted(batch for name, batch in rates if name == "timm")  # the largest has no peers
    figure, panels = plt.subplots(1, len(batches), figsize=(2.6 * len(batches), 2.7), sharey=True, squeeze=False)
    for panel, batch in zip(panels[0], batches):
        names = [name for name in NAMES if (name, batch) in rates]
        percent = [100 * fractions[name, batch] for name in names]
        panel.barh([NAMES[name] for name in names], percent, color=[COLOURS.get(name, "#9aa5b1") for name in names])
        for i, name in enumerate(names):
            text = f"{rates[name, batch]:.1f}/s"
            panel.text(percent[i] - 2, i, text, ha="right", va="center", color="white", fontsize=8)
        panel.set(title=f"batch {batch}", xlim=(0, 105))
        panel.axvline(100, color="black", linewidth=0.8)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].invert_yaxis()
    figure.supxlabel("model FLOP/s, % of the fastest large matmul; in the bars: images/s", fontsize=9)
    threads = load(results, "forward", "machine")["threads"]
    figure.suptitle(f"Mixer-{rows[0]['model']} forward, float32, {threads} threads: longer is faster", fontsize=10)
    figure.tight_layout()
    figure.savefig(output, dpi=150)


def main() -> None:
    draw(HERE / "results", HERE.parent / "docs" / "speed.png")
    for write in (readme_table, table, table_of_work, table_of_missed_goals, tables_of_exports, tables_of_learning):
        print(f"{write(HERE / 'results')}\n")


if __name__ == "__main__":
    main()
