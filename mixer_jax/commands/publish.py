"""A checkpoint as a folder for the Hugging Face hub: what timm, transformers and `load("hf:owner/name")` open.

It is a command of mixer_jax and not of convert because the card says by how much the GELU of timm's own code moves the logits
of these very weights, which the NumPy model measures; convert has no model.
"""

__all__ = ["GeluGap", "Publication", "gelu_gap", "publish"]

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from convert import Checkpoint, CheckpointError, ReadOptions, read
from convert.hub_folder import check_hub_folder, hub_config, push, require_free, write_hub_folder
from convert.identity import fingerprint
from convert.labels import read_labels
from convert.published import HUB

from ..labels import IMAGENETS
from ..parity.numpy_model import forward
from .model_card import CardFacts, evaluation_lines, model_card, run_lines

Source = str | os.PathLike[str]
TANH = 'act_layer=partial(nn.GELU, approximate="tanh")'


@dataclass(frozen=True)
class GeluGap:
    """How far the exact GELU moves the outputs of weights with the tanh one: the largest difference, on an image of noise.

    `std` is the standard deviation of those outputs, logits or features.
    """

    max_abs: float
    std: float


@dataclass(frozen=True)
class Publication:
    """A folder that was written and read back. `gelu_gap` is None for weights with the GELU that timm computes.

    `address` is that of the repository on the hub, None if nothing was uploaded.
    """

    folder: str
    architecture: str
    parameters: int
    dtype: str
    fingerprint: str
    gelu_gap: GeluGap | None
    notes: list[str]
    address: str | None


def publish(
    source: Source,
    folder: Source,
    *,
    licence: str | None = None,
    evaluation: Source | None = None,
    labels: Source | None = None,
    push_to: str | None = None,
    reading: ReadOptions = ReadOptions(),
    force: bool = False,
) -> Publication:
    """Write `folder` with model.safetensors in timm's names, config.json and a model card, and upload it to `push_to` if given.

    `licence` is one of the hub's identifiers, such as "apache-2.0"; `evaluation` is a file of what `evaluate --json` printed,
    `labels` one of class names, one a line. Weights that are `best` or `last` of a run of `finetune` have its settings and
    results in the card. The preprocessing must be one of timm's: `reading` can choose it. `force` replaces an older such
    folder, and what of its files is in `push_to`, which is "owner/name" and made if there is none.

    Raises CheckpointError, before anything is written, for what timm's config cannot express.
    """
    path = Path(folder)
    if licence is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,59}", licence):
        raise CheckpointError(f"licence {licence!r}: give the hub's identifier, such as apache-2.0, cc-by-4.0 or other")
    if push_to is not None:
        require_free(push_to, force=force)
    checkpoint = read(source, reading)
    check_hub_folder(path, checkpoint.source, force=force)
    if labels is not None:
        checkpoint = checkpoint.with_metadata(labels=read_labels(labels, checkpoint.sizes["num_classes"]))
    licence = licence.lower() if licence else None
    identity = fingerprint(checkpoint.arrays, checkpoint.layout)
    tree = hub_config(checkpoint, licence=licence)
    own = _own_preprocessing(source, reading) if reading.preprocessing else None
    gap = gelu_gap(checkpoint) if checkpoint.metadata.gelu == "tanh" else None
    facts = CardFacts(
        name=push_to or path.name,
        pushed=push_to is not None,
        config=checkpoint.config,
        tree=tree,
        licence=licence,
        parameters=checkpoint.num_parameters,
        dtype=checkpoint.dtype.name,
        fingerprint=identity,
        gap=None if gap is None else (gap.max_abs, gap.std),
        preprocessing=str(checkpoint.metadata.preprocessing),
        replaced_preprocessing=own if own != checkpoint.metadata.preprocessing else None,
        training=run_lines(Path(checkpoint.source)),
        evaluation=[] if evaluation is None else evaluation_lines(evaluation, checkpoint, _identity_in_file(source, reading)),
    )
    write_hub_folder(path, checkpoint, card=model_card(facts), licence=licence, force=force)
    address = push(path, push_to) if push_to is not None else None
    what = tree["architecture"], facts.parameters, facts.dtype, facts.fingerprint
    return Publication(str(path), *what, gap, _notes(checkpoint, gap, licence), address)


def _identity_in_file(source: Source, reading: ReadOptions) -> str:
    """The fingerprint before a cast, as `evaluate` has it."""
    checkpoint = read(source, replace(reading, dtype=None, allow_float64=True))
    return fingerprint(checkpoint.arrays, checkpoint.layout)


def _own_preprocessing(source: Source, reading: ReadOptions) -> str | None:
    """That which the file names; None where it names none, or one that is not understood."""
    try:
        return read(source, replace(reading, preprocessing=None)).metadata.preprocessing
    except CheckpointError:
        return None


def gelu_gap(checkpoint: Checkpoint) -> GeluGap:
    """Measured with the NumPy model in float64, on one image of uniform noise."""
    config, weights = checkpoint.config, checkpoint.to("google").as_numpy()
    image = np.random.default_rng(0).uniform(-1, 1, (1, *config.image_size, config.in_channels))
    tanh, exact = (forward(config.replace(gelu=gelu), weights, image) for gelu in ("tanh", "exact"))
    return GeluGap(float(np.abs(tanh - exact).max()), float(tanh.std()))


def _notes(checkpoint: Checkpoint, gap: GeluGap | None, licence: str | None) -> list[str]:
    """What a person should know before others open the folder."""
    classes, notes = checkpoint.config.num_classes, []
    if gap is not None:
        notes.append(
            f"timm and transformers compute the exact GELU unless told {TANH}, which config.json cannot say: logits are off by "
            f"{gap.max_abs:.1e} where their standard deviation is {gap.std:.2g} (measured on these weights); the card says how"
        )
    if not classes:
        notes.append("no head: timm and transformers' AutoModel give features; a classifier needs a new head")
    elif checkpoint.metadata.labels is None:
        presumed = f"timm, transformers and mixer_jax presume those of {IMAGENETS[classes]}" if classes in IMAGENETS else ""
        notes.append(f"no class names in the file: {presumed or 'classes are numbers'}; --labels FILE gives names")
    if checkpoint.dtype != np.float32:
        notes.append(f"{checkpoint.dtype.name} weights, which timm loads into float32")
    if licence is None:
        notes.append("no licence: without one others may not use the weights; --licence gives it")
    return notes


def run(source: str, folder: str, **options: Any) -> None:
    """The command `publish`: print what was written and what a person should know of it."""
    done = publish(source, folder, **options)
    print(
        f"wrote {done.folder}: {done.architecture}, {done.parameters:,} parameters, {done.dtype}, fingerprint "
        f"{done.fingerprint}; read back, every bit equal"
    )
    print("\n".join(done.notes))
    if done.address is not None:
        print(f"uploaded: {done.address}, {HUB}{options['push_to']} for load, hf-hub:{options['push_to']} for timm")
