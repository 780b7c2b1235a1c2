"""The best classes of photographs, their features, and what another preprocessing would change."""

__all__ = ["ClassScore", "Prediction", "predict"]

import contextlib
import itertools
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from tqdm import tqdm

from convert import CheckpointError
from convert.atomic import atomic_write, check_writable

from ..export.program import Program
from ..images import NONE_LISTED, ImageResult, find_images, missing, summary_of
from ..labels import Labels, class_names
from ..preprocess import preprocessing_name, preprocessing_of
from ..sharding.processes import all_or_none, is_first, require_equal_everywhere
from ..sharding.replicas import run_on_rows
from .model_options import ModelOptions

Images = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


@dataclass(frozen=True)
class ClassScore:
    """A class with its logit and its softmax score, which is not a calibrated probability."""

    index: int
    label: str | None
    logit: float
    score: float


@dataclass(frozen=True)
class Prediction:
    """The best classes of an image, best first, and the input of the head; or why there are none."""

    path: str
    top: tuple[ClassScore, ...] = ()
    features: np.ndarray | None = field(default=None, repr=False, compare=False)
    error: str | None = None


def predict(
    model: Any,
    images: Images,
    *,
    preprocessing: str | None = None,
    top: int = 5,
    labels: Labels | None = None,
    batch_size: int | None = None,
    threads: int | None = None,
    use_exif: bool = True,
) -> Iterator[Prediction]:
    """The `top` best classes of each image by a Flax or PyTorch model, decoded in threads while the model computes.

    `images` are files and folders, in whose order the predictions come; what cannot be used gets an `error`. `preprocessing`
    and `labels`, a name for each class, default to the model's own, and labels of 1000 classes to ImageNet's. `batch_size`
    images are computed at once (8 on a CPU, else 64); `use_exif` rotates images by their EXIF orientation.
    """
    results = _results(model, images, [preprocessing_name(model, preprocessing)], batch_size, threads, use_exif)
    labels = class_names(model.config.num_classes, labels or model.labels)

    def prediction(result: ImageResult) -> Prediction:
        if result.error is not None:
            return Prediction(result.path, error=result.error)
        best = _best_scores(result.logits[0], top, labels) if model.config.num_classes else ()
        return Prediction(result.path, best, result.features[0])

    return map(prediction, results)


def _results(
    model: Any, images: Images, preprocessings: Sequence[str], batch_size: int | None, threads: int | None, use_exif: bool
) -> Iterator[ImageResult]:
    paths, empty = find_images(os.fspath(image) for image in ([images] if isinstance(images, str | os.PathLike) else images))
    options: Any = {"batch_size": batch_size, "threads": threads, "use_exif": use_exif}
    return itertools.chain(run_on_rows(model, paths, preprocessings, **options), empty)


def _best_scores(logits: np.ndarray, top: int, labels: Labels | None) -> tuple[ClassScore, ...]:
    """Best first; of equal ones the lower index."""
    values = logits.astype(np.float64)
    scores = np.exp(values - values.max())
    scores /= scores.sum()
    best = np.argsort(-values, kind="stable")[:top].tolist()
    return tuple(ClassScore(i, labels[i] if labels else None, round(values[i], 6), round(scores[i], 6)) for i in best)


def run(
    options: ModelOptions,
    images: Sequence[str],
    *,
    top: int | None = None,
    features: Path | None = None,
    against: str | None = None,
    as_json: bool = False,
    force: bool = False,
) -> None:
    """The command `predict`: print every prediction, and write features to a .npy file, NaN for an unreadable image."""
    with all_or_none():
        if features:
            if features.suffix != ".npy":
                raise CheckpointError(f"{features}: features are written as .npy: give a name with that ending")
            check_writable(features, force=force)
        paths, failed = find_images(images)
        total = len(paths) + len(failed)
        failed += missing(paths)
        if not total:
            raise CheckpointError(NONE_LISTED)
        for result in failed:
            _print_error(result, as_json)
        if len(failed) == total:
            raise CheckpointError(f"{total} of {total} could not be used, named above")
        model = options.load()
        classes, reported = model.config.num_classes, {result.path for result in failed}
        if not classes and (not features or top or options.labels):
            raise CheckpointError(
                f"{options.source}: has no head, so no classes: ask for --features OUT.npy, without --top and --labels"
            )
        if features and classes and isinstance(model, Program):
            raise CheckpointError(f"{options.source}: gives {model.facts.output}: export a program with --features for these")
        preprocessings = [preprocessing_name(model, name) for name in ([None, against] if against else [None])]
        report = Report(preprocessings, class_names(classes, model.labels), top or 5, as_json)
    require_equal_everywhere("list of images", summary_of(paths))
    results, shape = _results(model, paths, preprocessings, **options.running()), (len(paths), model.config.hidden_dim)
    hidden, writes = None if is_first() else True, features and is_first()
    with _npy_file(features, shape, force) if features and writes else contextlib.nullcontext() as file:
        for result in tqdm(results, total=len(paths), desc="images", unit="image", disable=hidden):
            if file:
                row = np.full(shape[1], np.nan) if result.error else result.features[0]
                file.write(row.astype("<f4").tobytes())
            if result.error is not None and result.path not in reported:
                failed.append(result)
                _print_error(result, as_json)
            elif result.error is None and classes:
                report.add(result)
    report.end()
    with all_or_none():
        if failed:
            raise CheckpointError(f"{len(failed)} of {total} could not be used, named above")


class Report:
    """Prints the best classes of images, or with two preprocessings what the second would change."""

    def __init__(self, preprocessings: Sequence[str], labels: Labels | None, top: int, as_json: bool):
        self.preprocessings, self.labels, self.top, self.as_json = preprocessings, labels, top, as_json
        self.images = self.changed = 0

    def add(self, result: ImageResult) -> None:
        tops = [_best_scores(logits, self.top, self.labels) for logits in result.logits]
        as_dicts = [[asdict(score) for score in top] for top in tops]
        self.images += 1
        if len(tops) == 1:
            entries: dict[str, Any] = {"top": as_dicts[0]}
            lines = [result.path, *map(_as_text, tops[0])]
        else:
            changed = tops[0][0].index != tops[1][0].index
            self.changed += changed
            pixels, logits = (np.abs(a.astype(np.float64) - b) for a, b in (result.pixels, result.logits))
            entries = {"pixels": {"mean": pixels.mean(), "max": pixels.max()}, "logits": {"max": logits.max()}}
            entries |= {"changed": changed, "top": dict(zip(self.preprocessings, as_dicts))}
            lines = [
                f"{result.path}\n  pixels differ by {pixels.mean():.2f} on average and {pixels.max():.1f} at most, of 255; "
                f"logits by {logits.max():.3f} at most; the best class {'CHANGES' if changed else 'stays'}",
                *(f"  {name:<14}{_as_text(top[0])}" for name, top in zip(self.preprocessings, tops)),
            ]
        tqdm.write(json.dumps({"image": result.path, **entries}) if self.as_json else "\n".join(lines))

    def end(self) -> None:
        if self.as_json or not self.images:
            return
        first, *others = self.preprocessings
        for other in others:
            print(f"\n{other} instead of {first} changes the best class of {self.changed} of {self.images} images")
            limits = [preprocessing_of(name).limits for name in (first, other)]
            if limits[0] != limits[1]:
                ranges = " against ".join(f"{low:.3g} to {high:.3g}" for low, high in limits)
                print(f"the model's input ranges differ as well: {ranges}")
        print("\npercentages are softmax scores, not calibrated probabilities")
        if self.labels is None:
            print("this file has no labels, so classes are numbers: --labels FILE names them, one a line")


def _print_error(result: ImageResult, as_json: bool) -> None:
    if is_first():
        tqdm.write(f"{result.path}: {result.error}", file=sys.stderr)
    if as_json:
        tqdm.write(json.dumps({"image": result.path, "error": result.error}))


def _as_text(best: ClassScore) -> str:
    return f"  {100 * best.score:5.1f} %  logit {best.logit:7.3f}  {best.index:>5}  {best.label or ''}".rstrip()


@contextlib.contextmanager
def _npy_file(path: Path, shape: tuple[int, int], force: bool) -> Iterator[IO[bytes]]:
    """A .npy file of float32 to write the rows to; it appears when all have been written."""
    with atomic_write(path, size=4 * shape[0] * shape[1], force=force) as temporary, open(temporary, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
        yield file
