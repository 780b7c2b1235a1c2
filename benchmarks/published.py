"""A published folder opened by timm and by transformers: logits and pixels beside the NumPy model and our preprocessing.

`publish` writes folders of synthetic weights here, and this file under `--opened` opens them in the environment of the peers.
In float64 logits must agree to 1e-12 of the largest, in float32 within the tolerance from simulated rounding; pixels of golden
images must be equal; what timm computes without `act_layer` must be off by what the card says.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
IMAGES = sorted((ROOT / "tests" / "golden" / "preprocess").glob("*.png"))
BORDER = "timm:lanczos,border=0.9,mean=0.485/0.456/0.406,std=0.229/0.224/0.225"
CASES: dict[str, dict[str, Any]] = {  # changes to a variant
    "B/16": {"preprocessing": "timm_bicubic"},
    "S/16 exact GELU": {"gelu": "exact", "preprocessing": "timm_bilinear", "num_classes": 7},
    "S/32 bfloat16, 64x96 pixels": {"image_size": (64, 96), "preprocessing": BORDER, "num_classes": 7, "dtype": "bfloat16"},
    "S/16 no head": {"preprocessing": "timm:bicubic,squash=1,mean=0.5,std=0.5", "num_classes": 0},
    "S/16 other MLPs": {"preprocessing": "timm_bicubic", "tokens_mlp_dim": 100, "channels_mlp_dim": 333},
    "L/16": {"preprocessing": "timm:box,center=0.875,mean=0.5,std=0.5"},
}


def published(name: str, case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Write the folder, and beside it an .npz of what it must give; the tolerance of float32, and what the card says."""
    from devices import synthetic

    from convert import MixerConfig, ReadOptions, read, write
    from mixer_jax.commands.publish import publish
    from mixer_jax.parity.comparison import noise
    from mixer_jax.parity.implementations import Implementation
    from mixer_jax.parity.numpy_model import forward
    from mixer_jax.parity.tolerance import tolerance
    from mixer_jax.preprocess import prepare

    fields = {key: value for key, value in case.items() if key not in ("preprocessing", "dtype")}
    config = MixerConfig.named(name.split()[0]).replace(**fields)
    labels = [f"class {i}" for i in range(7)] if config.num_classes == 7 else None
    checkpoint = synthetic(config).with_metadata(gelu=config.gelu, labels=labels, preprocessing=case["preprocessing"])
    file = folder.with_suffix(".npz")
    write(file, checkpoint, dtype=case.get("dtype"))
    gap = publish(file, folder, licence="apache-2.0").gelu_gap
    file.unlink()
    weights = read(folder, ReadOptions(dtype="float32")).to("google").as_numpy()
    images = np.concatenate([noise(config, 1, seed) for seed in (0, 1)])
    prepared = [prepare(image, config, case["preprocessing"]) for image in IMAGES]
    np.savez(folder.with_suffix(".npz"), images=images, logits=forward(config, weights, images), prepared=np.stack(prepared))
    sides = [Implementation.parse(side).roundings for side in ("timm", "numpy")]
    limits = tolerance(config, weights, images[:1], *sides).accumulated["head" if config.num_classes else "mean"]
    return {"case": name, "labels": labels, "tolerance": limits.relative, "gap": gap and gap.max_abs}


def opened(folder: Path) -> dict[str, Any]:
    """What timm and transformers make of the folder: differences of logits relative to the largest, and of pixels."""
    import timm
    import torch
    import transformers
    from PIL import Image
    from torch import nn

    with np.load(folder.with_suffix(".npz")) as arrays:
        images, right, prepared = (arrays[name] for name in ("images", "logits", "prepared"))
    images, scale = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), np.abs(right).max()
    tanh = {"act_layer": partial(nn.GELU, approximate="tanh")} if "tanh GELU" in (folder / "README.md").read_text() else {}
    name = f"local-dir:{folder}"
    model = timm.create_model(name, pretrained=True, **tanh).eval()
    config = transformers.AutoConfig.from_pretrained(folder)
    config.model_args = {**(config.model_args or {}), **tanh}
    kind = transformers.AutoModelForImageClassification if model.num_classes else transformers.AutoModel
    wrapper = kind.from_pretrained(folder, config=config, dtype=torch.float32).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model.pretrained_cfg))
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    seen = [transform(Image.open(path).convert("RGB")) for path in IMAGES]
    seen_too = [processor(Image.open(path).convert("RGB"))["pixel_values"][0] for path in IMAGES]
    pixels = np.stack([image.permute(1, 2, 0).numpy() for image in seen])
    ours, theirs = (np.rint(255 * (p * model.pretrained_cfg["std"] + model.pretrained_cfg["mean"])) for p in (prepared, pixels))
    result: dict[str, Any] = {
        "pixels unequal": int((ours != theirs).sum()),
        "largest difference of inputs": float(np.abs(prepared - pixels).max()),
        "processor differs from transform": not all(map(torch.equal, seen, seen_too)),
        "labels": list(wrapper.config.id2label.values()) if model.num_classes else None,
    }

    def off(network: Any, dtype: torch.dtype) -> float:
        with torch.inference_mode():
            out = network.to(dtype)(images.to(dtype))
        out = out if isinstance(out, torch.Tensor) else out.logits if model.num_classes else out.pooler_output
        return float(np.abs(out.double().numpy() - right).max() / scale)

    for side, network in (("timm", model), ("transformers", wrapper)):
        result |= {f"{side} float32": off(network, torch.float32), f"{side} float64": off(network, torch.float64)}
    plain = timm.create_model(name, pretrained=True).eval().double()
    with torch.inference_mode():
        result["gap"] = float(np.abs(plain(images[:1].double()).numpy() - right[:1]).max())
    return result | {"versions": {p.__name__: p.__version__ for p in (timm, transformers, torch)}}


def faults(said: dict[str, Any], result: dict[str, Any]) -> list[str]:
    """What is not as it must be."""
    right = {
        "pixels": result["pixels unequal"] == 0,
        "processor": not result["processor differs from transform"],
        "labels": said["labels"] in (None, result["labels"]),
        "gap": abs(result["gap"] - (said["gap"] or 0)) <= 1e-9,
    }
    for side in ("timm", "transformers"):
        right[f"{side} float32"] = result[f"{side} float32"] <= said["tolerance"]
        right[f"{side} float64"] = result[f"{side} float64"] <= 1e-12
    return [name for name, fits in right.items() if not fits]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=[*CASES], help=f"cases to check (default: {', '.join(CASES)})")
    peers = ROOT / ".venv-peers" / "bin" / "python"
    parser.add_argument("--python", type=Path, default=peers, help="Python with timm and transformers (default: .venv-peers)")
    parser.add_argument("--opened", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    if arguments.opened:
        print(json.dumps(opened(arguments.opened)))
        return 0
    rows = []
    for name in arguments.cases:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "mixer"
            said = published(name, CASES[name], folder)
            command = [arguments.python, __file__, "--opened", folder]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        result = json.loads(done.stdout.splitlines()[-1])
        wrong = faults(said, result)
        rows.append({name: value for name, value in (said | result).items() if name != "labels"} | {"wrong": wrong})
        print(json.dumps(rows[-1]), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 1 if any(row["wrong"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
