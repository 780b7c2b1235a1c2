"""docs/speed.png and the README's table, from the figures in benchmarks/results: `python benchmarks/chart.py`."""

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
    rows = [row for row in json.loads((results / "forward.json").read_text())["rows"] if row["side"] in NAMES]
    batches = sorted({row["batch"] for row in rows})
    of = {(row["side"], row["batch"]): row for row in rows}
    lines = ["| B/16 forward, float32 | " + " | ".join(f"batch {batch}" for batch in batches) + " |"]
    lines += ["| --- |" + " --- |" * len(batches)]
    shares = [f"{of['ours', batch]['of_ceiling']:.0%}" for batch in batches]
    lines += ["| `mixer_jax.compiled(model.unstacked())`, of the best large matrix product | " + " | ".join(shares) + " |"]
    for side in NAMES:
        if side != "ours" and all((side, batch) in of for batch in batches):
            times = [f"{of[side, batch]['times_ours']:.2f}" for batch in batches]
            lines.append(f"| {NAMES[side]}, its time by ours | " + " | ".join(times) + " |")
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
    batches = sorted({row["batch"] for row in rows})
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
    print(table(arguments.results))
    print(arguments.output)


if __name__ == "__main__":
    main()
