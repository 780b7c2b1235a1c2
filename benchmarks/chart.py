"""docs/speed.png and the README's tables, from the figures in benchmarks/results: `python benchmarks/chart.py`."""

import argparse
import json
from pathlib import Path

HERE = Path(__file__).resolve().parent
COLOURS = {"ours": "#c0392b", "linen": "#2c6fbb"}
NAMES = {
    "ours": "mixer-jax",
    "linen": "Flax Linen",
    "timm": "timm",
    "torch_eager": "PyTorch",
    "torch_compile": "torch.compile",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
}


def table(results: Path) -> str:
    """The table of the README: the peers' times by ours, above 1 where they take longer."""
    rows = json.loads((results / "forward.json").read_text())["rows"]
    batches = sorted({row["batch"] for row in rows})
    of = {(row["side"], row["batch"]): row for row in rows}
    lines = ["| B/16 forward, float32 | " + " | ".join(f"batch {batch}" for batch in batches) + " |"]
    lines += ["| --- |" + " --- |" * len(batches)]
    shares = [f"{of['ours', batch]['of_ceiling']:.0%}" for batch in batches]
    lines += ["| `mixer_jax.compiled(model)`, of the best large matrix product | " + " | ".join(shares) + " |"]
    for side in NAMES:
        times = [f"{of[side, batch]['times_ours']:.2f}" if (side, batch) in of else "" for batch in batches]
        if side != "ours" and any(times):
            lines.append(f"| {NAMES[side]} | " + " | ".join(times) + " |")
    least = [f"{of['products', batch]['times_ours']:.2f}" for batch in batches]
    lines.append("| *the products alone* | " + " | ".join(least) + " |")
    return "\n".join(lines)


def table_of_work(results: Path) -> str:
    """The second table of the README: what else is measured, beside a peer of the same run."""
    files = {name: json.loads((results / f"{name}.json").read_text()) for name in ("train", "twin", "overhead", "start")}
    train, overhead, start = (
        {row["side"]: row for row in files[name]["rows"] if row.get("model") != "L/16"}
        for name in ("train", "overhead", "start")
    )
    gib = {side: row["temporaries_bytes"] / 2**30 for side, row in train.items() if "temporaries_bytes" in row}
    lines = ["| work, B/16 | mixer-jax | a peer |", "| --- | --- | --- |"]
    for side in ("ours", "ours, remat"):
        peers = [f"{NAMES[peer]} {train[peer]['median_s'] / train[side]['median_s']:.2f}" for peer in ("timm", "linen")]
        memory = f"{gib[side]:.2f} GiB of temporaries, Linen {gib['linen']:.2f}"
        name = "training step, batch 8, " + ("`remat=True`" if side == "ours, remat" else "as it comes")
        lines.append(f"| {name} | 1 | {', '.join(peers)}; {memory} |")
    bfloat16 = json.loads((results / "bfloat16.json").read_text())["rows"]
    of = {(row["side"], row["batch"]): row["median_s"] for row in bfloat16}
    for batch in (8, 32):
        mine = of["ours-latest", batch]
        peers = ("linen-latest", "Linen"), ("torch_eager", "PyTorch"), ("timm", "timm"), ("openvino", "OpenVINO")
        times = ", ".join(f"{name} {of[side, batch] / mine:.2f}" for side, name in peers)
        lines.append(f"| forward, bfloat16, batch {batch}, newest JAX | 1 | {times} |")
    for dtype in ("float32", "bfloat16"):
        of = {row["batch"]: row for row in files["twin"]["rows"] if row["side"] == "timm" and row["dtype"] == dtype}
        times = ", ".join(f"{row['times_ours']:.2f}" for row in of.values())
        batches = ", ".join(map(str, of))
        lines.append(f"| the PyTorch twin, forward, {dtype}, batch {batches} | 1 | timm {times} |")
    ours, jitted = overhead["ours"], overhead["nnx_jit"]
    lines.append(f"| a call of a tiny model of 12 blocks | {ours['ms']:.2f} ms | `nnx.jit` {jitted['ms']:.2f} ms |")
    ours, official = start["ours"], start["official"]
    lines.append(
        f"| file to first logits, new process | {ours['process_s']:.1f} s, {ours['peak_mib']:.0f} MiB "
        f"| `np.load` and Linen {official['process_s']:.1f} s, {official['peak_mib']:.0f} MiB |"
    )
    predict = json.loads((results / "predict.json").read_text())["predict"]
    alone = f"of the slower of decoding and computing alone {predict['ratio_to_slower']:.2f}"
    lines.append(f"| `predict` on {predict['images']:,} JPEG photographs | {predict['wall_s']['both']:.0f} s | {alone} |")
    return "\n".join(lines)


def main() -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--output", type=Path, default=HERE.parent / "docs" / "speed.png")
    arguments = parser.parse_args()
    found = json.loads((arguments.results / "forward.json").read_text())
    rows = [row for row in found["rows"] if row["side"] in NAMES]
    batches = sorted({row["batch"] for row in rows if row["side"] == "timm"})  # the largest has no peers
    figure, panels = plt.subplots(1, len(batches), figsize=(2.6 * len(batches), 2.7), sharey=True, squeeze=False)
    for panel, batch in zip(panels[0], batches):
        of = {row["side"]: row for row in rows if row["batch"] == batch}
        sides = [side for side in NAMES if side in of]
        shares = [100 * of[side]["of_ceiling"] for side in sides]
        panel.barh([NAMES[side] for side in sides], shares, color=[COLOURS.get(side, "#9aa5b1") for side in sides])
        for i, (side, share) in enumerate(zip(sides, shares)):
            panel.text(share - 2, i, f"{of[side]['images_per_s']:.1f}/s", ha="right", va="center", color="white", fontsize=8)
        panel.set(title=f"batch {batch}", xlim=(0, 105))
        panel.axvline(100, color="black", linewidth=0.8)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].invert_yaxis()
    machine = found["machine"]
    figure.supxlabel("model FLOPs, % of the best large matrix product; images a second in the bars", fontsize=9)
    figure.suptitle(f"Mixer-{rows[0]['model']} forward, float32, {machine['threads']} threads", fontsize=10)
    figure.tight_layout()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.output, dpi=150)
    print(f"{table(arguments.results)}\n\n{table_of_work(arguments.results)}")
    print(arguments.output)


if __name__ == "__main__":
    main()
