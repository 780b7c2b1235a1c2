"""Photographs as batches for a model: find the files, decode them in threads while the model computes."""

__all__ = [
    "ForwardFunction",
    "ImageResult",
    "class_folders",
    "decode_ahead",
    "find_images",
    "images_in",
    "require_images",
    "run_on_images",
    "summary_of",
]

import contextlib
import hashlib
import io
import itertools
import os
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
from einops import rearrange

from convert import CheckpointError, MixerConfig

from .export.program import Program
from .preprocess import ImageError, load_image, preprocessing_of, require_pillow

NONE_LISTED = "no images: standard input lists none"

Item = TypeVar("Item")
Value = TypeVar("Value")
Outputs = tuple[Any, Any]  # features and logits of a batch
ForwardFunction = Callable[[np.ndarray], Outputs]


@dataclass(frozen=True)
class ImageResult:
    """An image's pixels (h, w, c) of 0 to 255, features and logits, one for each preprocessing; or an error."""

    path: str
    pixels: Sequence[np.ndarray] = ()
    features: Sequence[np.ndarray] = ()
    logits: Sequence[np.ndarray] = ()
    error: str | None = None


def run_on_images(
    forward: ForwardFunction,
    config: MixerConfig,
    paths: Sequence[str],
    preprocessings: Sequence[str],
    *,
    batch_size: int,
    threads: int | None = None,
    use_exif: bool = True,
) -> Generator[ImageResult]:
    """The model's outputs for each image under each preprocessing, in the order of the paths.

    Every batch has the same shape, so that XLA compiles once. While one batch is computed the next are decoded, by one thread
    per core unless `threads` is given: at most two decoded batches wait in memory.
    """
    scaled = [preprocessing_of(name, config.in_channels).scaled for name in preprocessings]
    decode = partial(decoded, preprocessings=preprocessings, config=config, use_exif=use_exif)
    computing: tuple[list[ImageResult], list[Outputs]] | None = None
    with contextlib.closing(decode_ahead(decode, paths, threads=threads or cores(), count=2 * batch_size)) as ready:
        while batch := list(itertools.islice(ready, batch_size)):
            inputs = np.zeros((len(preprocessings), batch_size, *config.image_size, config.in_channels), np.float32)
            for i, result in enumerate(batch):
                for p, pixels in enumerate(result.pixels):
                    inputs[p, i] = scaled[p](pixels)
            started = batch, [forward(images) for images in inputs]
            if computing:
                yield from _completed(*computing)
            computing = started
    if computing:
        yield from _completed(*computing)


def decoded(path: str, *, preprocessings: Sequence[str], config: MixerConfig, use_exif: bool = True) -> ImageResult:
    """An image as each preprocessing resizes and crops it."""
    try:
        image = load_image(path, channels=config.in_channels, use_exif=use_exif)
        return ImageResult(path, [preprocessing_of(name).pixels(image, config.image_size) for name in preprocessings])
    except (ImageError, MemoryError) as error:
        return ImageResult(path, error=str(error) or "needs more memory than there is")


def decode_ahead(function: Callable[[Item], Value], items: Iterable[Item], *, threads: int, count: int) -> Generator[Value]:
    """`map` in threads, in order, with at most `count` results waiting to be taken."""
    waiting: deque[Future[Value]] = deque()
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


def _completed(batch: list[ImageResult], outputs: list[Outputs]) -> Iterator[ImageResult]:
    """The results of a batch, once it has been computed."""
    features, logits = ([np.asarray(array) for array in arrays] for arrays in zip(*outputs))
    for i, result in enumerate(batch):
        if result.error is not None:
            yield result
        elif all(np.isfinite(array[i]).all() for array in logits):
            yield replace(result, features=[array[i] for array in features], logits=[array[i] for array in logits])
        else:
            yield ImageResult(result.path, error="the model gives NaN or infinity for it")


def forward_of(model: Any) -> tuple[ForwardFunction, int]:
    """Images (b, h, w, c) -> features and logits by a model or an exported program, and the usual batch size on its device.

    Without a head the logits are the features. Beyond 8 images the activations of a Mixer-B/16 leave a CPU's cache.
    """
    if isinstance(model, Program):
        return model.forward, 8
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(model, torch.nn.Module):
        from .inference import compiled

        device, placement = next(iter(model.stem.kernel[...].devices())), model.placement
        usual_batch_size = 8 if device.platform == "cpu" else 64
        if placement is None:
            return compiled(model, _outputs), usual_batch_size
        placed = compiled(model, lambda model, images: placement.gathered(_outputs(model, images)))
        return lambda images: placed(placement.put(images)), usual_batch_size
    if model.training:
        raise ValueError("the PyTorch model is in training mode: call model.eval() first")
    weight = model.stem.proj.weight

    def forward(images: np.ndarray) -> Outputs:
        with torch.inference_mode():
            pixels = torch.from_numpy(rearrange(images, "b h w c -> b c h w")).to(weight.device)
            features, logits = _outputs(model, pixels)
            return features.float().cpu(), logits.float().cpu()

    return forward, 8 if weight.device.type == "cpu" else 64


def _outputs(model: Any, images: Any) -> Outputs:
    features = model.features(images)
    return features, features if model.head is None else model.head(features)


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def find_images(names: Iterable[str]) -> tuple[list[str], list[ImageResult]]:
    """Image files by name: files, those in folders, and those that standard input lists for `-`; and folders without any."""
    paths: list[str] = []
    empty: list[ImageResult] = []
    for name in names:
        if name == "-":
            listed = find_images(_listed(sys.stdin.buffer.read()))
            paths, empty = paths + listed[0], empty + listed[1]
        elif os.path.isdir(name):
            inside = images_in(name)
            paths += inside
            empty += [] if inside else [ImageResult(name, error="a folder without images (files that end in .jpg, .png, ...)")]
        else:
            paths.append(name)
    return paths, empty


def require_images(names: Iterable[str]) -> list[str]:
    """The image files that names stand for. Raises CheckpointError with every missing file and empty folder."""
    paths, empty = find_images(names)
    if failed := [*empty, *missing(paths)]:
        raise CheckpointError("\n".join(f"{result.path}: {result.error}" for result in failed))
    if not paths:
        raise CheckpointError(NONE_LISTED)
    return paths


def missing(paths: Iterable[str]) -> list[ImageResult]:
    return [ImageResult(path, error="no such file") for path in paths if not os.path.exists(path)]


def _listed(content: bytes) -> Iterator[str]:
    """The names in a list, one a line or separated by NUL."""
    require_pillow()
    from PIL import Image

    try:
        Image.open(io.BytesIO(content)).close()
    except Exception:  # decoders of anything else raise nearly anything
        lines = content.split(b"\0" if b"\0" in content else b"\n")
        return (os.fsdecode(line.removesuffix(b"\r")) for line in lines if line.strip() not in (b"", b"-"))
    raise CheckpointError("-: standard input must list the names of images, and holds an image: give its name")


def images_in(folder: str | os.PathLike[str]) -> list[str]:
    """The files in a folder and its subfolders whose ending is that of an image, sorted, without hidden ones.

    Folders that cannot be listed come last, so that opening them tells why.
    """
    require_pillow()
    from PIL import Image

    endings = {ending for ending, format in Image.registered_extensions().items() if format in Image.OPEN}
    paths, visited, unlisted = [], set(), []
    for root, folders, files in os.walk(folder, followlinks=True, onerror=lambda error: unlisted.append(error.filename)):
        real = os.path.realpath(root)
        folders[:] = [] if real in visited else sorted(name for name in folders if not name.startswith("."))
        if real not in visited:
            paths += [os.path.join(root, name) for name in sorted(files) if not name.startswith(".")]
        visited.add(real)
    return [path for path in paths if os.path.splitext(path)[1].lower() in endings] + unlisted


def summary_of(paths: Sequence[str]) -> dict[str, Any]:
    """What tells whether two lists of images are the same."""
    return {"number of images": len(paths), "sha256": hashlib.sha256(b"\0".join(map(os.fsencode, paths))).hexdigest()}


def class_folders(folder: str | os.PathLike[str]) -> dict[str, list[str]]:
    """The images in each class folder of a folder, sorted. Raises CheckpointError if there are none."""
    if not os.path.isdir(folder):
        raise CheckpointError(f"{folder}: no such folder")
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise CheckpointError(f"{folder}: has no folders in it, and needs one for each class")
    folders = {name: images_in(os.path.join(folder, name)) for name in names}
    if not any(folders.values()):
        raise CheckpointError(f"{folder}: no images in its {len(names)} folders")
    return folders
