"""Parity of synthetic models on this CPU, and what other devices are expected to give: the tables of the README.

    python benchmarks/parity.py [--variants B/16 L/16] [--draws 4]

Measured: one image of noise through Flax and the PyTorch twin, in every dtype that a CPU has. Predicted: the referee with
operands and results rounded as a device's units do; nothing is run on any of them.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from devices import synthetic

from convert import MixerConfig
from mixer_jax.explain import predictions
from mixer_jax.parity import compare
from mixer_jax.parity_command import noise
from mixer_jax.sides import Side

RESULTS = Path(__file__).resolve().parent / "results" / "parity.json"
DTYPES = ("float64", "float32", "bfloat16")


def measured(variant: str, draws: int) -> list[dict]:
    config = MixerConfig.named(variant)
    weights, images = synthetic(config), noise(config, 1, 0)
    rows = []
    for dtype in DTYPES:
        report = compare(weights, images, Side("flax", dtype=dtype), Side("torch", dtype=dtype), draws=draws)
        scale, limit = report.logits.scale, report.logits_budget
        rows.append(
            {
                "variant": variant,
                "dtype": dtype,
                "largest": report.logits.largest / scale,
                "rms": report.logits.rms / scale,
                "budget": limit.relative,
                "share": report.share,
                "worst_operation": max(max(operation.share) for operation in report.operations),
                "passed": report.passed,
            }
        )
        print(rows[-1], flush=True)
    return rows


def predicted(variant: str, draws: int) -> list[dict]:
    config = MixerConfig.named(variant)
    rows = []
    for each in predictions(synthetic(config), noise(config, 1, 0), draws=draws):
        scale = each.logits.scale
        rows.append(
            {
                "variant": variant,
                "devices": each.devices,
                "setting": each.setting,
                "largest": each.logits.largest / scale,
                "rms": each.logits.rms / scale,
                "same_class": each.same_class,
            }
        )
    print(*rows, sep="\n", flush=True)
    return rows


def tables(results: dict) -> str:
    """The tables of the README."""
    lines = ["| model | computed in | Flax from the twin, of the largest logit | budget | used | worst operation's use |"]
    lines += ["| --- | --- | --- | --- | --- | --- |"]
    for row in results["measured"]:
        found, budget = f"{row['largest']:.1e}", f"{row['budget']:.1e}"
        lines.append(
            f"| {row['variant']} | {row['dtype']} | {found} | {budget} | {row['share']:.0%} | {row['worst_operation']:.0%} |"
        )
    variants = list(dict.fromkeys(row["variant"] for row in results["predicted"]))
    lines += ["", "| devices | computed in | " + " | ".join(f"{variant}, predicted" for variant in variants) + " |"]
    lines += ["| --- | --- |" + " --- |" * len(variants)]
    found = {(row["devices"], row["setting"], row["variant"]): row for row in results["predicted"]}
    for devices, setting in dict.fromkeys((row["devices"], row["setting"]) for row in results["predicted"]):
        errors = [f"{found[devices, setting, variant]['largest']:.1e}" for variant in variants]
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
