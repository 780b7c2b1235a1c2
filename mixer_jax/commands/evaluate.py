"""Accuracy on a folder that has a folder of images for each class."""

__all__ = ["evaluate"]

import contextlib
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from convert import CheckpointError, MixerConfig
from convert.identity import same_sizes
from convert.published import KNOWN, published_file

from ..evaluation import Evaluation, RealLabels, best_classes
from ..images import class_folders, summary_of
from ..labels import IMAGENETS, Labels, class_names, imagenet_synsets
from ..pictures.confusion import draw_confusion
from ..pictures.files import check_path, require_matplotlib, save
from ..preprocess import preprocessing_name
from ..sharding.processes import all_or_none, is_first, require_equal_everywhere
from ..sharding.replicas import run_on_rows
from .model_options import ModelOptions
from .real_labels import real_labels, require_imagenet

SYNSET = re.compile(r"n\d{8}")


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
    settings: Any = {"batch_size": batch_size, "threads": threads, "use_exif": use_exif}
    results = run_on_rows(model, [path for path, _ in images], [preprocessing], **settings)
    true, best, right, unreadable = [], [], [], {}
    with contextlib.closing(results):
        each = zip(results, images, by_real)
        for result, (path, i), classes in tqdm(each, total=len(images), desc="images", unit="image", disable=None):
            if result.error is not None:
                unreadable[path] = result.error
            else:
                true.append(i)
                right.append(classes)
                best.append(best_classes(result.logits[0]))
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
    with all_or_none():
        folders = class_folders(folder)  # its faults before the model's
        listed = [path for paths in folders.values() for path in paths]
        if real:
            real_labels(real, listed)
        model, identity = options.load_identified() if as_json else (options.load(), "")
    require_equal_everywhere("list of images", summary_of(listed))
    evaluation = evaluate(model, folder, real=real, **options.running())
    for path, error in evaluation.unreadable.items() if is_first() else ():
        print(f"{path}: {error}", file=sys.stderr)
    published = published_accuracy(options.source, model.config, evaluation.matched_by)
    if as_json:
        about = {"file": options.source, "fingerprint": identity, "folder": folder, "published": published}
        print(json.dumps(about | evaluation.as_dict()))
    else:
        print("\n".join(_text(evaluation) + published))
    with all_or_none():
        if confusion and is_first():
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
