"""Folders that timm, transformers and our own `read` open: weights, config.json and a card, written and uploaded."""

__all__ = ["NEAREST", "check_hub_folder", "hub_config", "mlp_factor", "push", "require_free", "write_hub_folder"]

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from .atomic import atomic_write, check_writable
from .checkpoint import Checkpoint
from .config import VARIANTS
from .errors import CheckpointError, first_line
from .hub_config import CONFIG_FILE, HubConfig
from .io import read, write
from .preprocessing import NAMED_BY_TIMM, parsed
from .published import HUB, HUB_FILE

CARD_FILE = "README.md"
FILES = (HUB_FILE, CONFIG_FILE, CARD_FILE)
ARCHITECTURES = {  # by depth, width and patch; timm's entry points take no other values of these three
    (VARIANTS[letter]["num_blocks"], VARIANTS[letter]["hidden_dim"], (patch, patch)): f"mixer_{letter.lower()}{patch}_224"
    for letter in "SBL"
    for patch in (16, 32)
}
USUAL_RATIO, USUAL_SIZE = [0.5, 4.0], (224, 224)
NEAREST = {  # of timm's interpolations to the preprocessings that they cannot compute, by the mean difference on photographs
    "resmall_crop": "timm:bilinear,center=0.875,mean=0.5,std=0.5",
    "resize_crop": "timm:hamming,squash=0.875,mean=0.5,std=0.5",
    "squash": "timm:hamming,squash=1,mean=0.5,std=0.5",
}
CANNOT_LOG_IN = "log in with `hf auth login` or set HF_TOKEN, and check the name and the connection"


def hub_config(checkpoint: Checkpoint, *, licence: str | None = None) -> dict[str, Any]:
    """The content of config.json. Raises CheckpointError for what timm's config cannot express, with what to do."""
    config, metadata = checkpoint.config, checkpoint.metadata
    sizes = config.num_blocks, config.hidden_dim, config.patch_size
    faults = [] if sizes in ARCHITECTURES else [_unknown_sizes(*sizes)]
    if config.layer_norm_epsilon != 1e-6:
        faults.append(f"timm's Mixers have the LayerNorm epsilon 1e-6, and these weights {config.layer_norm_epsilon:g}")
    if checkpoint.dtype == np.float64:
        faults.append("timm's weights are float32, and these float64: cast them with --dtype float32")
    try:
        data = _data_config(metadata.preprocessing, config.in_channels, checkpoint.origins.get("preprocessing"))
    except CheckpointError as error:
        faults.append(str(error))
    if faults:
        raise CheckpointError(f"{checkpoint.source}: {'; '.join(faults)}")
    ratio = [mlp_factor(width, config.hidden_dim) for width in (config.tokens_mlp_dim, config.channels_mlp_dim)]
    height, width = config.image_size
    arguments: dict[str, Any] = {"mlp_ratio": ratio} if ratio != USUAL_RATIO else {}
    arguments |= {"img_size": height if height == width else [height, width]} if config.image_size != USUAL_SIZE else {}
    arguments |= {"in_chans": config.in_channels} if config.in_channels != 3 else {}
    cfg = {"input_size": [config.in_channels, height, width], "fixed_input_size": True, "pool_size": None} | data
    cfg |= {"num_classes": config.num_classes, "first_conv": "stem.proj", "classifier": "head", "custom_load": False}
    tree = {
        "architecture": ARCHITECTURES[sizes],
        "num_classes": config.num_classes,
        "num_features": config.hidden_dim,
        "global_pool": "avg",
        **({"label_names": list(metadata.labels)} if metadata.labels else {}),
        **({"model_args": arguments} if arguments else {}),
        "pretrained_cfg": cfg | ({"license": licence} if licence else {}),
    }
    HubConfig.of(tree)  # labels, for example, that no terminal should see
    return tree


def mlp_factor(width: int, hidden_dim: int) -> float:
    """The factor that timm multiplies hidden_dim by before it truncates the result to a whole number."""
    ratio = width / hidden_dim
    return ratio if int(ratio * hidden_dim) == width else math.nextafter(ratio, math.inf)


def _unknown_sizes(blocks: int, hidden_dim: int, patch: tuple[int, int]) -> str:
    known = ", ".join(f"{VARIANTS[letter]['num_blocks']} of {VARIANTS[letter]['hidden_dim']} channels" for letter in "SBL")
    found = f"{blocks} blocks of {hidden_dim} channels and patches of {patch[0]}x{patch[1]} pixels"
    return f"timm has no Mixer of {found}: only {known}, each with patches of 16x16 or 32x32 pixels"


def _data_config(preprocessing: str | None, channels: int, doubt: str | None) -> dict[str, Any]:
    """timm's words for a preprocessing."""
    if preprocessing is None:
        raise CheckpointError(f"{doubt or 'the file names no preprocessing'}: choose one with --preprocess")
    how = parsed(preprocessing)
    how = NAMED_BY_TIMM.get(how, how) if isinstance(how, str) else how
    if isinstance(how, str):
        copies = ", and timm's own copies of Google's files have timm_bicubic" if how == "resmall_crop" else ""
        raise CheckpointError(
            f"timm's transforms cannot compute the pixels of {how}: choose one of theirs with --preprocess; the nearest is "
            f"{NEAREST[how]}{copies}"
        )
    if how.channels not in (None, channels):
        raise CheckpointError(f"preprocessing {how} is for {how.channels} channels, and the model takes {channels}")
    mean, std = ([*values] * (channels if len(values) == 1 else 1) for values in (how.mean, how.std))
    return {
        "interpolation": how.interpolation,
        "crop_pct": how.crop_pct,
        "crop_mode": how.crop_mode,
        "mean": mean,
        "std": std,
    }


def is_hub_folder(path: Path) -> bool:
    """Whether a folder holds what `write_hub_folder` writes and nothing else."""
    return {entry.name for entry in path.iterdir()} == set(FILES)


def check_hub_folder(folder: Path, source: str, *, force: bool) -> None:
    """Raise CheckpointError if `folder` must not be written, or holds `source` itself."""
    check_writable(folder, force=force, folder=True, replaceable=is_hub_folder)
    if folder.is_dir() and folder.resolve() in (Path(source).resolve(), *Path(source).resolve().parents):
        raise CheckpointError(f"{folder}: holds the source itself; give another name")


def write_hub_folder(
    folder: str | os.PathLike[str], checkpoint: Checkpoint, *, card: str, licence: str | None = None, force: bool = False
) -> dict[str, Any]:
    """Write model.safetensors in timm's names, config.json and the card, README.md; the content of config.json.

    The folder appears when it is complete and `read` finds the same model in it. `force` replaces a folder that holds these
    three files and no others.
    """
    path, tree = Path(folder), hub_config(checkpoint, licence=licence)
    check_hub_folder(path, checkpoint.source, force=force)
    size = checkpoint.num_parameters * checkpoint.dtype.itemsize
    with atomic_write(path, size=size, folder=True, force=force, replaceable=is_hub_folder) as temporary:
        temporary.mkdir()
        write(temporary / HUB_FILE, checkpoint, layout="timm")  # compares every bit
        (temporary / CONFIG_FILE).write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n", "utf-8")
        (temporary / CARD_FILE).write_text(card, "utf-8")
        back = read(temporary)
        kept = back.metadata.labels == checkpoint.metadata.labels and back.config == checkpoint.config
        if not kept or back.metadata.preprocessing != checkpoint.metadata.preprocessing:
            raise CheckpointError(f"{path}: what was written does not read back the same")
    return tree


def _client() -> Any:
    """The module of the hub's client. Raises ImportError, naming the package to install, if it is missing."""
    try:
        import huggingface_hub  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise ImportError("uploading to the hub needs its client: pip install 'mixer-jax[hub]'") from None
    return huggingface_hub


def require_free(repository: str, *, force: bool) -> None:
    """Raise CheckpointError if a file that `push` writes is there and `force` does not replace it, or for an illegal name."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository, re.ASCII):
        raise CheckpointError(f"{repository!r} is not the name of a repository: give owner/name")
    client = _client().HfApi()
    try:
        taken = [] if force else [name for name in FILES if client.file_exists(repository, name)]
    except Exception as error:  # the hub's own, and those of the libraries below it
        raise CheckpointError(f"{HUB}{repository}: cannot be reached ({first_line(error)}); {CANNOT_LOG_IN}") from None
    if taken:
        raise CheckpointError(f"{HUB}{repository}: has {', '.join(taken)} already (replace with --force or force=True)")


def push(folder: Path, repository: str) -> str:
    """Upload what `write_hub_folder` wrote, as one commit, to a repository that is made if there is none; its address."""
    client = _client().HfApi()
    try:
        address = client.create_repo(repository, exist_ok=True)
        client.upload_folder(
            repo_id=repository, folder_path=folder, allow_patterns=list(FILES), commit_message=f"Mixer from {folder.name}"
        )
    except Exception as error:
        raise CheckpointError(
            f"{HUB}{repository}: cannot be uploaded ({first_line(error)}); {folder} is complete: {CANNOT_LOG_IN}, then the "
            "same command with --force uploads it"
        ) from None
    return str(address)
