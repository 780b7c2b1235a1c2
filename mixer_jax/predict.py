"""Photographs in, classes out: decoding in threads while the model computes."""

__all__ = ["Outcome", "compiled", "compiled_twin", "images_in", "outcomes"]

import argparse
import contextlib
import io
import itertools
import json
import os
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from einops import rearrange
from tqdm import tqdm

from convert import Checkpoint, CheckpointError, MixerConfig
from convert.cli import read_asked, refuse_ignored
from convert.files import check_writable, whole_or_nothing

from . import inference, pretrained
from .labels import Labels, class_names
from .model import MlpMixer
from .preprocess import RECIPES, ImageError, picture, require_pillow

CONVENTION = (
    "shares are a softmax over the logits: a convention, no probability; the released ImageNet-1k Mixers were trained "
    "with a sigmoid loss"
)

NONE_LISTED = "no images: standard input lists none"

Item = TypeVar("Item")
Made = TypeVar("Made")
Results = tuple[Any, Any]  # features and logits of a batch, as arrays of either framework
Forward = Callable[[np.ndarray], Results]


@dataclass(frozen=True)
class Outcome:
    """What became of one image: pixels (h, w, c), features and logits for each recipe asked for, or why there are none."""

    path: str
    pixels: Sequence[np.ndarray] = ()
    features: Sequence[np.ndarray] = ()
    logits: Sequence[np.ndarray] = ()
    error: str | None = None


def outcomes(
    forward: Forward,
    config: MixerConfig,
    paths: Sequence[str],
    recipes: Sequence[str],
    *,
    batch: int,
    threads: int,
    upright: bool = True,
) -> Generator[Outcome]:
    """What the model makes of each image, in their order, prepared by each recipe in turn.

    Every batch has the same shape, so that XLA compiles once. While one is computed the next ones are decoded: two are in
    memory decoded and one being computed, however many images there are.
    """
    decode = partial(decoded, recipes=recipes, size=config.image_size, channels=config.in_channels, upright=upright)
    computing: tuple[list[Outcome], list[Results]] | None = None
    with contextlib.closing(ahead(decode, paths, threads=threads, count=2 * batch)) as ready:
        while chunk := list(itertools.islice(ready, batch)):
            images = np.zeros((len(recipes), batch, *config.image_size, config.in_channels), np.float32)
            for i, outcome in enumerate(chunk):
                for r, pixels in enumerate(outcome.pixels):
                    images[r, i] = RECIPES[recipes[r]].scaled(pixels)
            started = chunk, [forward(inputs) for inputs in images]
            if computing:
                yield from _collected(*computing)
            computing = started
    if computing:
        yield from _collected(*computing)


def compiled(model: MlpMixer) -> Forward:
    """Images (b, h, w, c) -> features and logits, compiled; logits are the features where there is no head."""

    def outputs(model: MlpMixer, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        features = model.features(images)
        return features, features if model.head is None else model.head(features)

    return inference.compiled(model, outputs)


def compiled_twin(source: Checkpoint, *, num_blocks: int | None) -> Forward:
    """The same by the PyTorch twin."""
    import torch

    from . import torch_model

    twin = torch_model.load(source, num_blocks=num_blocks)

    def forward(images: np.ndarray) -> Results:
        with torch.inference_mode():
            features = twin.features(torch.from_numpy(rearrange(images, "b h w c -> b c h w")))
            return features, features if twin.head is None else twin.head(features)

    return forward


def decoded(path: str, *, recipes: Sequence[str], size: tuple[int, int], channels: int, upright: bool) -> Outcome:
    """An image as each recipe cuts it, in values of 0 to 255."""
    try:
        image = picture(path, channels=channels, upright=upright)
        return Outcome(path, [RECIPES[name].pixels(image, size) for name in recipes])
    except (ImageError, MemoryError) as error:
        return Outcome(path, error=str(error) or "needs more memory than there is")


def ahead(function: Callable[[Item], Made], items: Iterable[Item], *, threads: int, count: int) -> Generator[Made]:
    """`map` in threads, in order, with at most `count` results waiting to be taken."""
    waiting: deque[Future[Made]] = deque()
    pool = ThreadPoolExecutor(threads)
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _collected(chunk: list[Outcome], results: list[Results]) -> Iterator[Outcome]:
    """The outcomes of a batch, once it has been computed."""
    features, logits = ([np.asarray(array) for array in arrays] for arrays in zip(*results))
    for i, outcome in enumerate(chunk):
        if outcome.error is None and not all(np.isfinite(array[i]).all() for array in logits):
            yield Outcome(outcome.path, error="the model gives NaN or infinity for it")
        elif outcome.error is None:
            yield replace(outcome, features=[array[i] for array in features], logits=[array[i] for array in logits])
        else:
            yield outcome


def images_asked(names: Iterable[str]) -> tuple[list[str], list[Outcome]]:
    """The files that arguments name: themselves, what is in folders, what standard input lists for `-`; and folders without."""
    paths: list[str] = []
    empty: list[Outcome] = []
    for name in names:
        if name == "-":
            listed = sys.stdin.buffer.read()
            if _is_image(listed):
                raise CheckpointError("-: a list of names is wanted, and standard input holds an image: give the image's name")
            lines = listed.split(b"\0" if b"\0" in listed else b"\n")
            found = images_asked(os.fsdecode(line.removesuffix(b"\r")) for line in lines if line.strip() not in (b"", b"-"))
            paths, empty = paths + found[0], empty + found[1]
        elif os.path.isdir(name):
            inside = images_in(name)
            paths += inside
            empty += [] if inside else [Outcome(name, error="a folder without images (files that end in .jpg, .png, ...)")]
        else:
            paths.append(name)
    return paths, empty


def require_images(names: Iterable[str]) -> list[str]:
    """The files that arguments name. Raises CheckpointError, before anything is loaded, for each that is not there."""
    paths, empty = images_asked(names)
    lost = [*empty, *_missing(paths)]
    if lost:
        raise CheckpointError("\n".join(f"{outcome.path}: {outcome.error}" for outcome in lost))
    if not paths:
        raise CheckpointError(NONE_LISTED)
    return paths


def _missing(paths: Iterable[str]) -> list[Outcome]:
    return [Outcome(path, error="no such file") for path in paths if not os.path.exists(path)]


def _is_image(listed: bytes) -> bool:
    """Whether these bytes are one, and not a list of names."""
    require_pillow()
    from PIL import Image

    try:
        with Image.open(io.BytesIO(listed)):
            return True
    except Exception:  # decoders of what is none raise nearly anything
        return False


def images_in(folder: str | os.PathLike[str]) -> list[str]:
    """The files in a folder and all below that end like an image which Pillow opens, sorted; hidden ones are left out.

    Folders that cannot be listed come last, so that whoever opens them is told why.
    """
    require_pillow()
    from PIL import Image

    endings = {ending for ending, format in Image.registered_extensions().items() if format in Image.OPEN}
    found, seen, lost = [], set(), []
    for root, folders, files in os.walk(folder, followlinks=True, onerror=lambda error: lost.append(error.filename)):
        real = os.path.realpath(root)
        folders[:] = [] if real in seen else sorted(name for name in folders if not name.startswith("."))
        if real not in seen:
            found += [os.path.join(root, name) for name in sorted(files) if not name.startswith(".")]
        seen.add(real)
    return [path for path in found if os.path.splitext(path)[1].lower() in endings] + lost


@dataclass(frozen=True)
class Asked:
    """What a command's arguments say about a model: how to run it and how images are prepared for it."""

    checkpoint: Checkpoint
    forward: Forward
    preprocessing: str


def model_asked(arguments: argparse.Namespace) -> Asked:
    checkpoint = read_asked(arguments)
    if checkpoint.dtype == np.float64:
        raise CheckpointError(
            f"{arguments.source}: images are taken in float32, and so must the weights be: say --dtype float32"
        )
    if checkpoint.config.in_channels not in (1, 3):
        raise CheckpointError(f"{arguments.source}: takes {checkpoint.config.in_channels} channels, and images have 3 or 1")
    name = arguments.preprocess or checkpoint.metadata.preprocessing
    if name is None:
        raise CheckpointError(
            f"{arguments.source}: does not say how an image becomes its input: say --preprocess, one of {', '.join(RECIPES)}"
        )
    if arguments.side == "twin":
        return Asked(checkpoint, compiled_twin(checkpoint, num_blocks=arguments.blocks), name)
    return Asked(checkpoint, compiled(pretrained.load(checkpoint, num_blocks=arguments.blocks)), name)


def speed_asked(arguments: argparse.Namespace) -> dict[str, int]:
    batch = arguments.batch or (8 if jax.default_backend() == "cpu" else 64)  # beyond 8 a CPU's cache overflows
    return {"batch": batch, "threads": arguments.threads or cores()}


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def print_any_name() -> None:
    """From now on: names of files need not be text."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def run(arguments: argparse.Namespace) -> None:
    """The command `predict`."""
    print_any_name()
    if arguments.features:
        if arguments.features.suffix != ".npy":
            raise CheckpointError(f"{arguments.features}: features are written as .npy: give a name that ends so")
        check_writable(arguments.features, force=arguments.force)
    paths, failed = images_asked(arguments.images)
    total = len(paths) + len(failed)
    missing = {outcome.path: outcome for outcome in _missing(paths)}
    failed += [missing[path] for path in paths if path in missing]
    if not total:
        raise CheckpointError(NONE_LISTED)
    for outcome in failed:
        report_failure(outcome, as_json=arguments.json)
    if len(failed) == total:
        raise CheckpointError(f"{total} of {total} could not be used, named above")
    asked = model_asked(arguments)
    config, recipes = asked.checkpoint.config, [asked.preprocessing, *filter(None, [arguments.against])]
    if not config.num_classes and not arguments.features:
        raise CheckpointError(f"{arguments.source}: has no head, so no classes: ask for its features, --features OUT.npy")
    if not config.num_classes:
        refuse_ignored(arguments, ["top", "labels"], f"is of classes, and {arguments.source} has no head; leave it out")
    labels = class_names(config.num_classes, file=arguments.labels, own=asked.checkpoint.metadata.labels)
    report = Report(labels, recipes, top=arguments.top or 5, as_json=arguments.json)

    with contextlib.ExitStack() as stack:
        add_row = (
            stack.enter_context(rows(arguments.features, (len(paths), config.hidden_dim), force=arguments.force))
            if arguments.features and paths
            else None
        )
        stream = outcomes(asked.forward, config, paths, recipes, **speed_asked(arguments), upright=not arguments.ignore_exif)
        stack.enter_context(contextlib.closing(stream))
        for outcome in tqdm(stream, total=len(paths), desc="images", unit="image", disable=None):
            if add_row:
                add_row(outcome.features[0] if outcome.features else None)
            if outcome.error is not None and outcome.path not in missing:
                failed.append(outcome)
                report_failure(outcome, as_json=arguments.json)
            elif outcome.error is None and config.num_classes:
                report.success(outcome)
    report.end()
    if failed:
        raise CheckpointError(f"{len(failed)} of {total} could not be used, named above")


def report_failure(outcome: Outcome, *, as_json: bool) -> None:
    tqdm.write(f"{outcome.path}: {outcome.error}", file=sys.stderr)
    if as_json:
        _print_line({"image": outcome.path, "error": outcome.error})


class Report:
    """What is printed of each image that could be used, and in the end."""

    def __init__(self, labels: Labels | None, recipes: Sequence[str], *, top: int, as_json: bool):
        self.labels, self.recipes, self.top, self.as_json = labels, recipes, top, as_json
        self.count = self.flips = 0

    def success(self, outcome: Outcome) -> None:
        self.count += 1
        tops = [self._top(logits) for logits in outcome.logits]
        if self.as_json and len(tops) == 1:
            _print_line({"image": outcome.path, "top": tops[0]})
        elif len(tops) == 1:
            tqdm.write("\n".join([outcome.path, *map(_as_text, tops[0])]))
        else:
            self._compared(outcome, tops)

    def _compared(self, outcome: Outcome, tops: list[list[dict[str, Any]]]) -> None:
        pixels = np.abs(outcome.pixels[0].astype(np.float64) - outcome.pixels[1])
        logits = np.abs(outcome.logits[0].astype(np.float64) - outcome.logits[1])
        before, after = (top[0] for top in tops)
        flips = before["index"] != after["index"]
        self.flips += flips
        if self.as_json:
            _print_line(
                {
                    "image": outcome.path,
                    "pixels": {"mean": float(pixels.mean()), "largest": float(pixels.max())},
                    "logits": {"largest": float(logits.max())},
                    "flips": flips,
                    "top": dict(zip(self.recipes, tops)),
                }
            )
            return
        tqdm.write(
            f"{outcome.path}\n  pixels differ by {pixels.mean():.2f} on average and {pixels.max():.1f} at most, of 255; "
            f"logits by {logits.max():.3f} at most; the answer {'FLIPS' if flips else 'stays'}"
        )
        for recipe, top in zip(self.recipes, tops):
            tqdm.write(f"  {recipe:<14}{_as_text(top[0])}")

    def end(self) -> None:
        if self.as_json or not self.count:
            return
        if len(self.recipes) == 2:
            print(f"\n{' against '.join(self.recipes)}: the answer flips on {self.flips} of {self.count} images")
            ranges = [f"{RECIPES[name].low:g} to 1" for name in self.recipes]
            if len(set(ranges)) == 2:
                print(f"the model takes their pixels in other ranges, too: {ranges[0]} against {ranges[1]}")
        print(f"\n{CONVENTION}")
        if self.labels is None:
            print("these classes have no names here, only indices: --labels FILE gives them, one a line")

    def _top(self, logits: np.ndarray) -> list[dict[str, Any]]:
        """The best classes, best first; of equal ones the lower index."""
        values = logits.astype(np.float64)
        shares = np.exp(values - values.max())
        shares /= shares.sum()
        best = np.argsort(-values, kind="stable")[: self.top].tolist()
        return [
            {
                "index": i,
                "label": None if self.labels is None else self.labels[i],
                "logit": round(values[i], 6),
                "softmax": round(shares[i], 6),
            }
            for i in best
        ]


def _print_line(entries: dict[str, Any]) -> None:
    tqdm.write(json.dumps(entries), file=sys.stdout)


def _as_text(entry: dict[str, Any]) -> str:
    return f"  {entry['softmax']:6.1%}  logit {entry['logit']:7.3f}  {entry['index']:>5}  {entry['label'] or ''}".rstrip()


@contextlib.contextmanager
def rows(path: Path, shape: tuple[int, int], *, force: bool) -> Iterator[Callable[[np.ndarray | None], None]]:
    """What adds a row to a .npy of float32, NaN for None; the file appears when all have been added."""
    missing = np.full(shape[1], np.nan, "<f4")
    with whole_or_nothing(path, size=4 * shape[0] * shape[1], force=force) as written, open(written, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})

        def add(row: np.ndarray | None) -> None:
            file.write((missing if row is None else row.astype("<f4")).tobytes())

        yield add
