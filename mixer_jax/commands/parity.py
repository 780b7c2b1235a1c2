"""Whether two implementations compute the same from a file."""

__all__ = ["parity"]

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from convert import Checkpoint, CheckpointError, ReadOptions, read
from convert.atomic import check_writable, write_bytes
from convert.preprocessing import unknown_preprocessing

from ..export.program import Facts
from ..images import require_images
from ..parity.comparison import noise
from ..parity.html import as_html
from ..parity.implementations import Implementation
from ..parity.programs import facts_of
from ..parity.report import EXTRAS, ParityReport, parity_report
from ..parity.tolerance import Simulation
from ..sharding.processes import is_first


def parity(
    source: str | os.PathLike[str],
    *,
    other: str | os.PathLike[str] | None = None,
    a: Implementation | str = "flax",
    b: Implementation | str = "torch",
    images: Sequence[str] | None = None,
    count: int = 1,
    seed: int = 0,
    draws: int = Simulation.draws,
    explain: bool = False,
    exact: bool = False,
    predict_devices: bool = False,
    html: Path | None = None,
    force: bool = False,
    reading: ReadOptions = ReadOptions(),
    mesh: str | None = None,
) -> ParityReport:
    """Compare `a` on a file with `b` on `other`, or on the same file; `a` and `b` may be written as "torch:gpu:bfloat16".

    The input is `images`, preprocessed as each file's metadata or `reading` names it, or else `count` images of noise, of whole
    pixels where `a` or `b` is a program that takes these.
    `explain`, `exact` (float64 only) and `predict_devices` add parts to the report; `html` is a page to write. The Flax model
    computes on a `mesh` such as "data=2,model=4", where it is given; of several processes all call this.
    """
    if html:
        check_writable(html, force=force)
    a, b = (implementation_of(i, exact=exact) for i in (a, b))
    a, b = (replace(i, mesh=mesh) if i.name == "flax" else i for i in (a, b))
    paths = require_images(images) if images else []
    checkpoint = read(source, reading)
    second = None if other is None else read(other, reading)
    if paths:
        pixels, images_are = _preprocessed(paths, checkpoint)
        pixels_b, images_b_are = _preprocessed(paths, second) if second else (None, images_are)
        images_are = images_are if images_are == images_b_are else f"{images_are}; for b {images_b_are}"
    else:
        pixels, pixels_b, images_are = noise(checkpoint.config, count, seed), None, f"of seeded noise, seed {seed}"
    if (program := _of_pixels(a, b)) is not None:
        for prepared in (checkpoint, *([second] if second else [])) if paths else ():
            _require_scaling(program, prepared)
        pixels = program.scaled(program.pixels(pixels))
        pixels_b = None if pixels_b is None else program.scaled(program.pixels(pixels_b))
        images_are = f"{images_are}, rounded to whole pixels"
    report = parity_report(
        checkpoint,
        pixels,
        a,
        b,
        other=second,
        other_images=pixels_b,
        source=" and ".join(Path(path).name for path in (source, other) if path is not None),
        images_are=images_are,
        simulation=Simulation(draws, seed),
        extras=[name for name, wanted in zip(EXTRAS, (explain, exact, predict_devices)) if wanted],
    )
    if html and is_first():
        write_bytes(html, as_html(report).encode(), force=force)
    return report


def _require_scaling(program: Facts, checkpoint: Checkpoint) -> None:
    """Raise CheckpointError unless the images of a checkpoint are scaled as inside a program of pixels."""
    own = replace(program, preprocessing=checkpoint.metadata.preprocessing)
    if str(own.scaling()) != str(program.scaling()):
        raise CheckpointError(
            f"{checkpoint.source}: its images are scaled as by {own.preprocessing}, and inside the program as by "
            f"{program.preprocessing}: leave the images out, or choose one with --preprocess"
        )


def _of_pixels(*implementations: Implementation) -> Facts | None:
    """Of those that are programs of uint8 pixels, what the first says. Raises CheckpointError if they scale differently."""
    programs = [facts_of(each.name, each.path) for each in implementations if each.path is not None]
    of_pixels = [facts for facts in programs if facts is not None and facts.options.uint8]
    if len({str(facts.scaling()) for facts in of_pixels}) > 1:
        raise CheckpointError("the two programs scale pixels differently, so no images are whole pixels to both")
    return of_pixels[0] if of_pixels else None


def implementation_of(implementation: Implementation | str, *, exact: bool) -> Implementation:
    """Of its text; one that leaves the dtype open computes in float32, or for `exact` in float64. Raises ValueError."""
    if isinstance(implementation, str):
        implementation = Implementation.parse(implementation, dtype="float64" if exact else "float32")
    if exact and implementation.dtype != "float64":
        raise ValueError(f"an exact comparison is in float64, and {implementation} is not: leave its dtype out")
    return implementation


def _preprocessed(paths: Sequence[str], checkpoint: Checkpoint) -> tuple[np.ndarray, str]:
    """The images as the checkpoint takes them, and how they were preprocessed."""
    from ..preprocess import ImageError, prepare

    preprocessing = checkpoint.metadata.preprocessing
    if preprocessing is None:
        raise unknown_preprocessing(checkpoint.source)
    images = []
    for path in paths:
        try:
            images.append(prepare(path, checkpoint.config, preprocessing))
        except ImageError as error:
            raise CheckpointError(f"{path}: {error}") from None
    return np.stack(images), f"preprocessed by {preprocessing}"
