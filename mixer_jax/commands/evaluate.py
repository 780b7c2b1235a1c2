"""Accuracy on a folder that has a folder of images for each class."""

__all__ = ["Accuracy", "ClassResult", "Evaluation", "draw_confusion", "evaluate"]

import contextlib
import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from tqdm import tqdm

from convert import CheckpointError, MixerConfig
from convert.identity import same_sizes
from convert.published import KNOWN, published_file

from ..images import class_folders, forward_of, run_on_images
from ..labels import IMAGENETS, Labels, class_names, imagenet_synsets
from ..preprocess import preprocessing_name
from .draw import check_path, require_matplotlib, save
from .model_options import ModelOptions
from .real_labels import RealLabels, real_labels, require_imagenet

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SYNSET = re.compile(r"n\d{8}")
NORMAL_95 = 1.959963984540054  # 95 % of the standard normal distribution lie within plus or minus this
CELLS = 1000  # rows and columns of the confusion picture at most, about one a pixel


@dataclass(frozen=True)
class Accuracy:
    """`low` and `high` are the 95 % confidence interval of `accuracy` (Wilson 1927)."""

    correct: int
    images: int
    accuracy: float
    low: float
    high: float

    @classmethod
    def of(cls, correct: int, images: int) -> Self:
        accuracy, z2 = correct / images, NORMAL_95**2
        middle = accuracy + z2 / (2 * images)
        half = NORMAL_95 * math.sqrt(accuracy * (1 - accuracy) / images + z2 / (4 * images**2))
        low, high = ((middle + sign * half) / (1 + z2 / images) for sign in (-1, 1))
        return cls(correct, images, accuracy, max(low, 0.0), min(high, 1.0))


@dataclass(frozen=True)
class ClassResult:
    """How many of a class's images have it as the best class and among the best five, and its most frequent wrong class."""

    index: int
    name: str
    images: int
    top1: int
    top5: int
    taken_for: str | None
    taken_for_images: int


@dataclass(frozen=True)
class Evaluation:
    """`true` has the class of each image and `best` its five best classes, (images, 5); `names` are those of all classes.

    `matched_by` is how folders were matched to classes; `unreadable` has the error of each image that counts neither way.
    `real_labels` has the right classes of each image by ReaL, none where ReaL has none or was not asked for.
    """

    names: Labels
    preprocessing: str
    matched_by: str
    true: np.ndarray = field(repr=False)
    best: np.ndarray = field(repr=False)
    unreadable: Mapping[str, str]
    real_labels: RealLabels = field(default=(), repr=False)

    @property
    def top1(self) -> Accuracy:
        return Accuracy.of(int((self.best[:, 0] == self.true).sum()), len(self.true))

    @property
    def top5(self) -> Accuracy | None:
        """None for five classes or fewer."""
        correct = (self.best == self.true[:, None]).any(axis=1).sum()
        return Accuracy.of(int(correct), len(self.true)) if len(self.names) > 5 else None

    @property
    def real(self) -> Accuracy | None:
        """How often the best class is one of the image's ReaL labels, over images that have any; None if none has."""
        right = [best in classes for best, classes in zip(self.best[:, 0].tolist(), self.real_labels) if classes]
        return Accuracy.of(sum(right), len(right)) if right else None

    @property
    def confusion(self) -> Counter[tuple[int, int]]:
        """Images by (true class, predicted class)."""
        return Counter(zip(self.true.tolist(), self.best[:, 0].tolist()))

    def confusion_fractions(self, most: int) -> tuple[list[int], np.ndarray]:
        """The classes that occur, and the fraction of a true class's images (row) for each predicted class (column).

        Of more than `most` classes, neighbours have a row and a column in common.
        """
        occurring, places = np.unique(np.stack([self.true, self.best[:, 0]]), return_inverse=True)
        cells = min(len(occurring), most)
        counts = np.zeros((cells, cells))
        np.add.at(counts, tuple(places.reshape(2, -1) * cells // len(occurring)), 1)
        return occurring.tolist(), counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)

    @property
    def by_class(self) -> list[ClassResult]:
        """The classes that have images."""
        results, order = [], np.argsort(self.true, kind="stable")
        indices, starts = np.unique(self.true[order], return_index=True)
        for index, best in zip(indices.tolist(), np.split(self.best[order], starts[1:])):
            top1, top5 = best[:, 0] == index, (best == index).any(axis=1)
            wrong = Counter(sorted(best[~top1, 0].tolist())).most_common(1)  # of equally frequent ones the lower index
            taken_for, images = (self.names[wrong[0][0]], wrong[0][1]) if wrong else (None, 0)
            row = (len(best), int(top1.sum()), int(top5.sum()))
            results.append(ClassResult(index, self.names[index], *row, taken_for, images))
        return results

    def as_dict(self) -> dict[str, Any]:
        """All figures as JSON has them; `confusion` has rows of true class, predicted class and images."""
        return {
            "preprocessing": self.preprocessing,
            "matched_by": self.matched_by,
            "unreadable": len(self.unreadable),
            "top1": asdict(self.top1),
            "top5": asdict(self.top5) if self.top5 else None,
            "real": asdict(self.real) if self.real else None,
            "by_class": [asdict(row) for row in self.by_class],
            "confusion": [[*pair, images] for pair, images in sorted(self.confusion.items())],
        }


def evaluate(
    model: Any,
    folder: str | os.PathLike[str],
    *,
    preprocessing: str | None = None,
    labels: Labels | None = None,
    real: str | os.PathLike[str] | None = None,
    batch_size: int | None = None,
    threads: int | None = None,
    use_exif: bool = False,
) -> Evaluation:
    """The accuracy of a Flax or PyTorch model on a folder with a folder for each class.

    The class folders are named by label, or by ImageNet's synsets, or there is one for each class in sorted order. `real` is
    the file `real.json` of Beyer et al. 2020, for accuracy by ReaL labels as well: these need ImageNet's own validation images,
    found by the number in their names. The other arguments are those of `mixer_jax.predict`; published evaluations ignore EXIF.

    Raises CheckpointError if it is not clear which class a folder is, if no image can be used, and if ReaL labels do not fit.
    """
    preprocessing, config = preprocessing_name(model, preprocessing), model.config
    forward, usual_batch_size = forward_of(model)
    if not config.num_classes:
        raise CheckpointError("the model has no head, so no classes to evaluate")
    labels = class_names(config.num_classes, labels or model.labels)
    folders = class_folders(folder)
    index, matched_by = match_classes(list(folders), config.num_classes, labels, str(folder))
    names = list(labels or map(str, range(config.num_classes)))
    for name, i in index.items():
        names[i] = labels[i] if labels else name
    images = [(path, index[name]) for name, paths in folders.items() for path in paths]
    by_real: RealLabels = [()] * len(images)
    if real is not None:
        require_imagenet(index, config.num_classes, str(folder))
        by_real = real_labels(real, [path for path, _ in images])
    settings: Any = {"batch_size": batch_size or usual_batch_size, "threads": threads, "use_exif": use_exif}
    results = run_on_images(forward, config, [path for path, _ in images], [preprocessing], **settings)
    true, best, right, unreadable = [], [], [], {}
    with contextlib.closing(results):
        each = zip(results, images, by_real)
        for result, (path, i), classes in tqdm(each, total=len(images), desc="images", unit="image", disable=None):
            if result.error is not None:
                unreadable[path] = result.error
            else:
                true.append(i)
                right.append(classes)
                best.append(np.argsort(-result.logits[0].astype(np.float64), kind="stable")[:5])
    if not true:
        path, error = next(iter(unreadable.items()))
        raise CheckpointError(f"{folder}: none of its {len(images)} images could be used, such as {path}: {error}")
    return Evaluation(names, preprocessing, matched_by, np.array(true), np.array(best), unreadable, right)


def match_classes(folders: Sequence[str], num_classes: int, labels: Labels | None, where: str) -> tuple[dict[str, int], str]:
    """The class of each folder, and how they were matched: by label, by synset, or in sorted order.

    Raises CheckpointError if that is not clear: nothing about classes is guessed.
    """

    def unclear(fault: str) -> CheckpointError:
        return CheckpointError(f"{where}: {fault}")

    folders, by_label = sorted(folders), {name: i for i, name in enumerate(labels or ())}
    unlabelled = [name for name in folders if name not in by_label]
    remedy = "give --labels FILE, one name a line in the order of the classes"
    if not unlabelled:
        if repeated := [name for name, count in Counter(labels).items() if count > 1 and name in folders]:
            raise unclear(f"several classes are called {', '.join(repeated)}: give each its own name")
        return {name: by_label[name] for name in folders}, "label"
    if len(unlabelled) < len(folders):
        fault = f"some folders are named like classes, these are not: {_some(unlabelled)}: rename or remove them"
        raise unclear(f"{fault}, or {remedy}")
    if all(SYNSET.fullmatch(name) for name in folders):
        if num_classes not in IMAGENETS:
            known = ", ".join(f"{name} ({count})" for count, name in IMAGENETS.items())
            fault = f"the folders are synsets ({_some(folders)}), which name the classes of {known}, and the model has"
            raise unclear(f"{fault} {num_classes} classes: give --labels FILE, one synset a line in the order of the classes")
        by_synset = {name: i for i, name in enumerate(imagenet_synsets(num_classes))}
        if unknown := [name for name in folders if name not in by_synset]:
            fault = f"{len(unknown)} synsets are not in {IMAGENETS[num_classes]}: {_some(unknown)}"
            raise unclear(f"{fault}: remove these folders")
        return {name: by_synset[name] for name in folders}, "synset"
    if len(folders) != num_classes:
        fault = f"{len(folders)} class folders ({_some(folders)}) for {num_classes} classes"
        raise unclear(f"{fault}: name them by label, or {remedy}")
    if all(name.isdecimal() for name in folders) and folders != (by_number := sorted(folders, key=int)):
        fault = f"the folders are numbers, whose order as text ({_some(folders)}) differs from that as numbers"
        raise unclear(f"{fault} ({_some(by_number)}): {remedy}")
    return {name: i for i, name in enumerate(folders)}, "sorted order"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def run(
    options: ModelOptions,
    folder: str,
    *,
    real: Path | None = None,
    confusion: Path | None = None,
    as_json: bool = False,
    force: bool = False,
) -> None:
    """The command `evaluate`: print accuracies, and draw the confusion of classes."""
    if confusion:
        require_matplotlib()
        check_path(confusion, force=force)
    folders = class_folders(folder)  # its faults before the model's
    if real:
        real_labels(real, [path for paths in folders.values() for path in paths])
    model = options.load()
    evaluation = evaluate(model, folder, real=real, **options.running())
    for path, error in evaluation.unreadable.items():
        print(f"{path}: {error}", file=sys.stderr)
    published = published_accuracy(options.source, model.config, evaluation.matched_by)
    if as_json:
        print(json.dumps({"file": options.source, "folder": folder, "published": published} | evaluation.as_dict()))
    else:
        print("\n".join(_text(evaluation) + published))
    if confusion:
        save(draw_confusion(evaluation, title=Path(options.source).name), confusion, force=force)
    if unreadable := len(evaluation.unreadable):
        total = unreadable + evaluation.top1.images
        raise CheckpointError(f"{unreadable} of {total} images could not be used, named above; they count neither way")


def published_accuracy(source: str, config: MixerConfig, matched_by: str) -> list[str]:
    """What is published of this file or of released files of its sizes, in lines for a person."""
    released = published_file(source)
    files = [released] if released else [KNOWN[name] for name in same_sizes(config)]
    how = "this file is" if released else "its sizes are those of"
    lines, others = [], [file.name for file in files if file.top1 is None]
    for file in (file for file in files if file.top1 is not None):
        accuracy = f"top-1 {file.top1} % on ImageNet's 50,000 validation images, prepared by {file.preprocessing}"
        lines.append(f"published: {how} {file.name}, {accuracy}" + (f" ({file.note})" if file.note else ""))
    if lines and others:
        lines.append(f"  they are also those of {', '.join(others)}, whose accuracy is not known")
    if lines and matched_by != "synset":
        lines.append("  these folders are not ImageNet's, so the two accuracies need not agree")
    return lines


def _text(evaluation: Evaluation) -> list[str]:
    width = max(24, min(48, max(len(row.name) for row in evaluation.by_class)))
    figures = {"top-1": evaluation.top1} | ({"top-5": evaluation.top5} if evaluation.top5 else {})
    lines = [f"{'class':<{width}}{'images':>8}{''.join(f'{name:>10}' for name in figures)}  most often taken for"]
    for row in evaluation.by_class:
        columns = "".join(f"{100 * count / row.images:8.1f} %" for count in (row.top1, row.top5)[: len(figures)])
        taken_for = f"  {row.taken_for} ({row.taken_for_images})" if row.taken_for else ""
        lines.append(f"{row.name[: width - 1]:<{width}}{row.images:>8}{columns}{taken_for}")
    lines.append("")
    for name, top in (figures | ({"ReaL": evaluation.real} if evaluation.real else {})).items():
        interval = f"95 % interval {100 * top.low:.2f} to {100 * top.high:.2f} %"
        left_out = f"; {evaluation.top1.images - top.images} without a ReaL label left out" if name == "ReaL" else ""
        count = f"{top.correct} of {top.images} images{left_out}"
        lines.append(f"{name:<5}  {100 * top.accuracy:.2f} %  ({interval}; {count})")
    return [*lines, f"preprocessing {evaluation.preprocessing}; folders matched to classes by {evaluation.matched_by}"]


def draw_confusion(evaluation: Evaluation, *, title: str = "") -> "Figure":
    """Which classes the images of each class (row) are taken for (column): what is right is on the diagonal."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    occurring, fractions = evaluation.confusion_fractions(CELLS)
    named = len(occurring) <= 60
    size = max(5.0, 2.5 + 0.22 * len(occurring)) if named else 11.0
    figure = Figure(figsize=(size + 1, size), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(fractions, vmin=0, vmax=1, cmap="magma_r", interpolation="nearest")
    figure.colorbar(
        image, ax=axes, label="of the images of the true class", format=PercentFormatter(1, symbol=" %"), fraction=0.045
    )
    top1 = evaluation.top1
    text = f"{100 * top1.accuracy:.1f} % of {top1.images} images right, {len(occurring)} classes"
    axes.set_title(f"{title}: {text}" if title else text, parse_math=False)
    axes.set(xlabel="predicted class", ylabel="true class")
    if named:
        ticks, labels = range(len(occurring)), [evaluation.names[i][:24] for i in occurring]
        axes.set_xticks(ticks, labels, rotation=90, parse_math=False)
        axes.set_yticks(ticks, labels, parse_math=False)
    return figure
