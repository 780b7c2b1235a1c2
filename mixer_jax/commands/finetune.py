"""Fine-tuning: a checkpoint and one's own images in, a folder with the trained weights out; or training from scratch."""

__all__ = ["finetune"]

import contextlib
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from convert import Checkpoint, CheckpointError, MixerConfig, ReadOptions, read
from convert.formats.orbax import silent_log
from convert.identity import fingerprint
from convert.preprocessing import unknown_preprocessing

from ..preprocess import ImageError, preprocessing_of
from ..sharding.processes import all_or_none, is_first, require_equal_everywhere, versions
from ..training.batches import grain
from ..training.config import FinetuneConfig
from ..training.data import Dataset, Splits, open_dataset
from ..training.freezing import trainable
from ..training.sources import read_parts

Source = str | os.PathLike[str] | Checkpoint
SIZES = ("num_blocks", "hidden_dim", "tokens_mlp_dim", "channels_mlp_dim")


def finetune(
    checkpoint: Source | None,
    data: str | os.PathLike[str],
    run: str | os.PathLike[str],
    *,
    config: FinetuneConfig | None = None,
    from_scratch: str | None = None,
    reading: ReadOptions | None = None,
    resume: bool = False,
    threads: int | None = None,
    save_seconds: float = 600,
    mesh: str | None = None,
    split_weights: bool = False,
) -> Any:
    """Train on the images of `data`, which `open_dataset` opens, in the folder `run`; returns the `loop.Trainer`, finished.

    The folder gets config.json, metrics.jsonl and metrics.csv, the same as TensorBoard's events, curves.png, confusion.png, and
    as Orbax checkpoints that every command takes `best`, by accuracy on the validation images, and `last`; `states` is for
    going on, saved at each evaluation and otherwise every `save_seconds`. Calling it again with the same arguments goes on
    where the run stopped, to the same bits. `from_scratch` is a variant with random weights in place of a checkpoint: "S/32",
    or "S/4,num_blocks=2,hidden_dim=128".

    All devices are used, on the `mesh` of `sharding.placement.mesh_of` and as `Placement` says; a run goes on on any others. Of
    several processes all call this, and the first writes the folder.

    Raises CheckpointError for data, weights or a folder that do not fit, and where the loss is not finite; ImportError without
    the packages of the extra `train`; `loop.Interrupted` after SIGTERM or Ctrl-C, with the state saved.
    """
    from ..training.loop import Trainer
    from ..training.run_folder import FollowedRun, RunFolder, require_run_or_new

    grain()
    config = config or FinetuneConfig()
    if (checkpoint is None) == (from_scratch is None):
        raise CheckpointError("give a checkpoint, or with from_scratch a variant to begin with random weights, not both")
    with all_or_none():
        if is_first():
            require_run_or_new(Path(run), resume=resume)
        placed = {"mesh": mesh, "split_weights": split_weights}
        model, splits, weights = _opened(checkpoint, data, config, from_scratch, reading or ReadOptions(), placed)
        try:
            trainable(model, config.recipe.train)
        except ValueError as error:
            raise CheckpointError(str(error)) from None
        settings = _settings(config, model, splits, weights)
    for what, values in ({"versions": versions()} | settings).items():
        require_equal_everywhere(what, values)
    try:
        with all_or_none():
            opened = RunFolder(run, settings, splits, resume=resume) if is_first() else FollowedRun(run)
        with contextlib.closing(opened) as folder, silent_log():
            options: dict[str, Any] = {"threads": threads, "save_seconds": save_seconds}
            trainer = Trainer(model=model, splits=splits, config=config, folder=folder, **options)
            trainer.run()
            return trainer
    except OSError as error:
        advice = "what was saved before is still there; with room and permission to write, the same command goes on"
        raise CheckpointError(f"{run}: cannot be written: {error}: {advice}") from None
    except ImageError as error:
        raise CheckpointError(f"{data}: {error}") from None


def run(
    checkpoint: str | None,
    data: str,
    folder: Path,
    changes: Mapping[str, Any],
    *,
    preset: str,
    from_scratch: str | None,
    reading: ReadOptions,
    resume: bool,
    threads: int | None,
    save_minutes: float,
    mesh: str | None = None,
    split_weights: bool = False,
) -> int:
    """The command `finetune`: print how it went. The exit code: 0, or that of a signal."""
    from ..training.loop import Interrupted

    try:
        config = FinetuneConfig.of(preset, **changes)
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    options: dict[str, Any] = {"from_scratch": from_scratch, "reading": reading, "resume": resume, "threads": threads}
    options |= {"save_seconds": 60 * save_minutes, "mesh": mesh, "split_weights": split_weights}
    try:
        trainer = finetune(checkpoint, data, folder, config=config, **options)
    except Interrupted as stop:
        print(f"{folder}: stopped by a signal, state saved; the same command goes on", file=sys.stderr)
        return 128 + stop.number
    best, test = trainer.best_row, trainer.test_accuracy
    print(f"best: step {best['step']}, {best['validation_correct']} of {best['validation_images']} validation images right")
    if test is not None:
        interval = f"95 % interval {100 * test.low:.2f} to {100 * test.high:.2f} %"
        print(f"test: {100 * test.accuracy:.2f} % ({interval}; {test.correct} of {test.images} images), by those weights")
    print(f"{folder / 'best'}: predict, evaluate and convert take it as it is")
    return 0


def _opened(
    source: Source | None,
    data: Any,
    config: FinetuneConfig,
    variant: str | None,
    reading: ReadOptions,
    placed: Mapping[str, Any],
) -> tuple[Any, Splits, str]:
    """The model to begin with, the images, and what identifies the weights. What is read fastest is checked first."""
    from flax import nnx

    from ..model import MlpMixer
    from ..pretrained import load, to_checkpoint

    options: dict[str, Any] = {"validation": config.validation, "seed": config.seed}
    how: dict[str, Any] = {"dropout_rate": config.dropout_rate, "stochastic_depth_rate": config.stochastic_depth_rate}
    how |= {"dtype": config.dtype, "remat": config.remat, "rngs": nnx.Rngs(config.seed)}
    if variant is not None:
        mixer = _scratch_config(variant, config)
        splits = open_dataset(data, **options)
        mixer = mixer.replace(num_classes=len(splits.train.classes), in_channels=splits.train.channels)
        model = MlpMixer(mixer, **how)
        model.labels, model.preprocessing = splits.train.classes, "squash"
        if (sharding := _placement(mixer, config, **placed)) is not None:
            model = load(to_checkpoint(model), sharding=sharding, **how)
        return model, splits, f"random, {variant}"
    options["contents"] = read_parts(data)
    checkpoint = source if isinstance(source, Checkpoint) else read(str(source), reading)
    preprocessing = _training_preprocessing(checkpoint, explicit=reading.preprocessing is not None)
    options["channels"] = checkpoint.config.in_channels
    if options["channels"] not in (1, 3):
        raise CheckpointError(f"{checkpoint.source}: the model takes {options['channels']} channels, and images have 3 or 1")
    if config.keep_head and not checkpoint.metadata.labels:
        raise CheckpointError(f"{checkpoint.source}: has no labels, so its head cannot be kept: leave out keep_head")
    splits = open_dataset(data, classes=checkpoint.metadata.labels if config.keep_head else None, **options)
    identity = fingerprint(checkpoint.arrays, checkpoint.layout)
    if config.image_size not in (None, checkpoint.config.image_size):
        checkpoint = checkpoint.resized(config.image_size, resample=config.resample)
    if not config.keep_head:
        unlabelled = checkpoint.with_metadata(labels=None).without_head()
        checkpoint = unlabelled.with_classes(len(splits.train.classes)).with_metadata(labels=splits.train.classes)
    how["sharding"] = _placement(checkpoint.config, config, **placed)
    return load(checkpoint.with_metadata(preprocessing=preprocessing), **how), splits, identity


def _placement(mixer: MixerConfig, config: FinetuneConfig, *, mesh: str | None, split_weights: bool) -> Any:
    """On all devices; None where there is one, and nothing was asked for."""
    import jax

    from ..sharding.placement import Placement, mesh_of

    if mesh is None and not split_weights and jax.device_count() == 1:
        return None
    if config.cache_features and jax.process_count() > 1:
        raise CheckpointError("cache_features is for one process: leave it out, or train the head in one")
    microbatch = config.batch_size // config.recipe.accumulation
    try:
        return Placement.checked(mesh_of(mesh), mixer, split_weights=split_weights, batch_size=microbatch)
    except ValueError as error:
        raise CheckpointError(str(error)) from None


def _training_preprocessing(checkpoint: Checkpoint, *, explicit: bool) -> str:
    """Officially the whole image is resized, without a crop; where the range of the pixels is another, the checkpoint's own."""
    own = checkpoint.metadata.preprocessing
    if own is None:
        raise unknown_preprocessing(checkpoint.source)
    return own if explicit or preprocessing_of(own).limits != (-1.0, 1.0) else "squash"


def _scratch_config(text: str, config: FinetuneConfig) -> MixerConfig:
    """A variant with other sizes. Its classes and channels are not yet those of the images."""
    name, *changes = text.split(",")
    try:
        sizes = {key: int(value) for key, _, value in (change.partition("=") for change in changes)}
        if unknown := sorted(sizes.keys() - set(SIZES)):
            raise ValueError(f"no size {unknown[0]!r}: one of {', '.join(SIZES)}")
        return MixerConfig.named(name, image_size=config.image_size or (224, 224)).replace(**sizes)
    except ValueError as error:
        raise CheckpointError(f"from_scratch {text!r}: {error}") from None


def _settings(config: FinetuneConfig, model: Any, splits: Splits, weights: str) -> dict[str, dict[str, Any]]:
    """All that decides the result, in groups."""
    return {
        "config": config.as_dict(),
        "model": asdict(model.config) | {"preprocessing": model.preprocessing, "weights": weights},
        "data": {name: _facts(part) for name, part in vars(splits).items() if part is not None},
        "classes": {str(i): name for i, name in enumerate(splits.train.classes)},
    }


def _facts(part: Dataset) -> dict[str, Any]:
    return {"images": len(part), "fingerprint": part.fingerprint}
