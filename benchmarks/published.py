"""A published folder opened by timm and by transformers: logits and pixels beside the NumPy model and our preprocessing.

`publish` writes folders of synthetic weights here, and the Python of their cards opens them in the environment of the peers.
In float64 logits must agree to 1e-12 of the largest, in float32 within the tolerance from simulated rounding; the inputs made
of golden images must be equal; what timm computes without `act_layer` must be off by what the card says. One folder is also
uploaded to a hub on loopback by the hub's own client, and opened from there.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
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
UPLOADED = "S/16 exact GELU"  # to a hub on loopback as well


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
    roundings = [Implementation.parse(name).roundings for name in ("timm", "numpy")]
    limits = tolerance(config, weights, images[:1], *roundings).accumulated["head" if config.num_classes else "mean"]
    return {"case": name, "labels": labels, "tolerance": limits.relative, "gap": gap and gap.max_abs}


def opened(folder: Path) -> dict[str, Any]:
    """What the Python of the card makes of the folder: differences of logits relative to the largest, and of pixels."""
    import timm
    import torch
    import transformers
    from PIL import Image

    with np.load(folder.with_suffix(".npz")) as arrays:
        images, right, prepared = (arrays[name] for name in ("images", "logits", "prepared"))
    images, scale = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), np.abs(right).max()
    os.chdir(folder.parent)
    with_timm, with_transformers = scopes(folder)
    model, wrapper = with_timm["model"], with_transformers["model"].eval()
    photographs = [Image.open(path).convert("RGB") for path in IMAGES]
    seen = [with_timm["transform"](photograph) for photograph in photographs]
    seen_too = [with_transformers["processor"](photograph)["pixel_values"][0] for photograph in photographs]
    pixels = np.stack([image.permute(1, 2, 0).numpy() for image in seen])
    result: dict[str, Any] = {
        "inputs unequal": int((prepared != pixels).sum()),
        "processor differs from transform": not all(map(torch.equal, seen, seen_too)),
        "labels": list(wrapper.config.id2label.values()) if model.num_classes else None,
    }

    def off(network: Any, dtype: torch.dtype) -> float:
        with torch.inference_mode():
            out = network.to(dtype)(images.to(dtype))
        out = out if isinstance(out, torch.Tensor) else out.logits if model.num_classes else out.pooler_output
        return float(np.abs(out.double().numpy() - right).max() / scale)

    for library, network in (("timm", model), ("transformers", wrapper)):
        result |= {f"{library} float32": off(network, torch.float32), f"{library} float64": off(network, torch.float64)}
    plain = timm.create_model(f"local-dir:{folder}", pretrained=True).eval().double()
    with torch.inference_mode():
        result["gap"] = float(np.abs(plain(images[:1].double()).numpy() - right[:1]).max())
    return result | {"versions": {p.__name__: p.__version__ for p in (timm, transformers, torch)}}


def scopes(folder: Path) -> list[dict[str, Any]]:
    """What the first two blocks of Python in the card, timm's and transformers', leave behind."""
    found: list[dict[str, Any]] = [{}, {}]
    blocks = re.findall("```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    for block, scope in zip(blocks, found):
        exec(block, scope)
    return found


def uploaded(folder: Path) -> dict[str, Any]:
    """Upload the folder to a hub on loopback by the hub's own client, and open it from there by all three."""
    from loopback_hub import loopback_hub

    with loopback_hub() as server, tempfile.TemporaryDirectory() as home:
        os.environ |= {"HF_ENDPOINT": server.url, "HF_HOME": home, "HF_TOKEN": "hf_none", "no_proxy": "*"}
        os.environ["HF_HUB_DISABLE_XET"] = "1"
        import timm
        import torch
        import transformers

        from convert import CheckpointError, read
        from convert.hub_folder import push, require_free

        require_free("me/mixer", force=False)
        before = len(server.repositories)
        address = push(folder, "me/mixer")
        try:
            require_free("me/mixer", force=False)
            refused = False
        except CheckpointError as error:
            refused = "has model.safetensors, config.json, README.md already" in str(error)
        state = timm.create_model("hf-hub:me/mixer", pretrained=True).state_dict()
        wrapper = transformers.AutoModelForImageClassification.from_pretrained("me/mixer", dtype=torch.float32).timm_model
        back, local = read("hf:me/mixer"), read(folder)
        same = {
            "repository made by the upload alone": not before and address == f"{server.url}/me/mixer",
            "files": server.repositories["me/mixer"] == {path.name: path.read_bytes() for path in folder.iterdir()},
            "second upload refused": refused,
            "read": back.metadata == local.metadata and back.config == local.config,
            "timm": all(torch.equal(state[name], array.float()) for name, array in back.as_torch().items()),
            "transformers": all(torch.equal(state[name], array) for name, array in wrapper.state_dict().items()),
        }
    return {"case": "upload", "wrong": [name for name, right in same.items() if not right]}


def faults(said: dict[str, Any], result: dict[str, Any]) -> list[str]:
    """What is not as it must be."""
    right = {
        "inputs": result["inputs unequal"] == 0,
        "processor": not result["processor differs from transform"],
        "labels": said["labels"] in (None, result["labels"]),
        "gap": abs(result["gap"] - (said["gap"] or 0)) <= 1e-9,
    }
    for library in ("timm", "transformers"):
        right[f"{library} float32"] = result[f"{library} float32"] <= said["tolerance"]
        right[f"{library} float64"] = result[f"{library} float64"] <= 1e-12
    return [name for name, fits in right.items() if not fits]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=[*CASES], help=f"cases to check (default: {', '.join(CASES)})")
    peers = ROOT / ".venv-peers" / "bin" / "python"
    parser.add_argument("--python", type=Path, default=peers, help="Python with timm and transformers (default: .venv-peers)")
    for step in ("--opened", "--uploaded"):
        parser.add_argument(step, type=Path, metavar="FOLDER", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    if arguments.opened or arguments.uploaded:
        print(json.dumps(opened(arguments.opened) if arguments.opened else uploaded(arguments.uploaded)))
        return 0

    def in_peers(step: str, folder: Path) -> dict[str, Any]:
        command = [arguments.python, __file__, step, folder]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
        return json.loads(done.stdout.splitlines()[-1])

    rows = []
    for name in arguments.cases:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "mixer"
            said = published(name, CASES[name], folder)
            result = in_peers("--opened", folder)
            if name == UPLOADED:
                rows.append(in_peers("--uploaded", folder))
                print(json.dumps(rows[-1]), flush=True)
        wrong = faults(said, result)
        rows.append({name: value for name, value in (said | result).items() if name != "labels"} | {"wrong": wrong})
        print(json.dumps(rows[-1]), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 1 if any(row["wrong"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
