"""Parity of synthetic models on this CPU, and what other devices are expected to give: tables of the documentation.

    python benchmarks/parity.py [--variants B/16 L/16] [--draws 8]

Measured: one image of noise through the Flax and the PyTorch model, in every dtype that a CPU has. Predicted: the NumPy model
with operands and results rounded as a device's matmul units do; nothing is run on any of them.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from devices import synthetic

from convert import MixerConfig
from mixer_jax.parity.comparison import compare, noise
from mixer_jax.parity.implementations import Implementation
from mixer_jax.parity.predicted_devices import predict_devices
from mixer_jax.parity.tolerance import Deviation, Simulation

RESULTS = Path(__file__).resolve().parent / "results" / "parity.json"
DTYPES = ("float64", "float32", "bfloat16")


def measured(variant: str, draws: int) -> list[dict]:
    config = MixerConfig.named(variant)
    weights, images = synthetic(config), noise(config, 1, 0)
    rows = []
    for dtype in DTYPES:
        flax, torch = (Implementation(name, dtype=dtype) for name in ("flax", "torch"))
        comparison = compare(weights, images, flax, torch, simulation=Simulation(draws))
        row = {"variant": variant, "dtype": dtype, **relative(comparison.logits)}
        row |= {"tolerance": comparison.logits_tolerance.relative, "fraction": comparison.fraction}
        row["worst_operation"] = max(max(operation.fraction) for operation in comparison.operations)
        rows.append(row | {"passed": comparison.passed})
        print(rows[-1], flush=True)
    return rows


def relative(error: Deviation) -> dict[str, float]:
    return {"max_abs": error.max_abs / error.scale, "rms": error.rms / error.scale}


def predicted(variant: str, draws: int) -> list[dict]:
    config, rows = MixerConfig.named(variant), []
    for prediction in predict_devices(synthetic(config), noise(config, 1, 0), Simulation(draws)):
        row = {"variant": variant, "devices": prediction.devices, "setting": prediction.setting}
        rows.append(row | relative(prediction.logits) | {"same_class": prediction.same_class})
        print(rows[-1], flush=True)
    return rows


def tables(results: dict) -> str:
    """What was measured and what is predicted, as two tables in Markdown. Differences are those of the logits."""
    head = "model | computed in | largest difference, relative to max abs | tolerance"
    head += " | fraction of the tolerance, of max abs or rms the larger | the worst operation's fraction of its own"
    lines = [f"| {head} |", "| --- | --- | --- | --- | --- | --- |"]
    for row in results["measured"]:
        figures = f"{row['max_abs']:.1e} | {row['tolerance']:.1e} | {row['fraction']:.0%} | {row['worst_operation']:.0%}"
        lines.append(f"| {row['variant']} | {row['dtype']} | {figures} |")
    variants = list(dict.fromkeys(row["variant"] for row in results["predicted"]))
    lines += ["", "| devices | computed in | " + " | ".join(f"{variant}, predicted" for variant in variants) + " |"]
    lines += ["| --- | --- |" + " --- |" * len(variants)]
    predictions = {(row["devices"], row["setting"], row["variant"]): row for row in results["predicted"]}
    for devices, setting in dict.fromkeys((row["devices"], row["setting"]) for row in results["predicted"]):
        errors = [f"{predictions[devices, setting, variant]['max_abs']:.1e}" for variant in variants]
        lines.append(f"| {devices} | {setting} | " + " | ".join(errors) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", default=["B/16", "L/16"])
    parser.add_argument("--draws", type=int, default=8)
    parser.add_argument("--json", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    results: dict = {"draws": arguments.draws, "images": 1, "numpy": np.__version__, "measured": [], "predicted": []}
    for variant in arguments.variants:
        results["measured"] += measured(variant, arguments.draws)
        results["predicted"] += predicted(variant, arguments.draws)
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    print(tables(results))


if __name__ == "__main__":
    main()
