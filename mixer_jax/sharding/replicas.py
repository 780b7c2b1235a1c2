"""The same weights on each row of a mesh, which compute images row by row, and nothing is sent between rows."""

__all__ = ["Replicas", "run_on_rows"]

import contextlib
import io
import itertools
import json
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from convert import Checkpoint, CheckpointError, MixerConfig

from ..export.program import Program
from ..images import ImageResult, forward_of, run_on_images
from ..labels import Labels
from .processes import count, exchanged, index

Results = dict[int, list[ImageResult]]  # by the first row of the mesh that computed them


@dataclass(frozen=True)
class Replicas:
    """A model on those rows of a mesh of which this process has devices, as one program: `own` of all `rows`.

    In a row the widths of the MLPs are split over the mesh's axis model. Nothing is sent between rows.
    """

    model: Any
    own: range = range(1)
    rows: int = 1

    @classmethod
    def load(cls, checkpoint: Checkpoint, mesh: str | None) -> Self:
        """On the devices of a mesh that `mesh_of` takes. Raises CheckpointError where it does not fit."""
        from ..pretrained import load
        from .placement import Placement, mesh_of

        try:
            grid = mesh_of(mesh).devices
            own = [row for row, devices in enumerate(grid) if index() in {device.process_index for device in devices}]
            devices = grid[own[0] : own[-1] + 1]
            placement = Placement.checked(
                mesh_of(f"data={len(own)},model={grid.shape[1]}", list(devices.flat)), checkpoint.config
            )
        except ValueError as error:
            raise CheckpointError(str(error)) from None
        model = load(checkpoint, sharding=placement if devices.size > 1 else devices.item())
        return cls(model, range(own[0], own[-1] + 1), len(grid))

    @property
    def config(self) -> MixerConfig:
        return self.model.config

    @property
    def labels(self) -> Labels | None:
        return self.model.labels

    @property
    def preprocessing(self) -> str | None:
        return self.model.preprocessing


def run_on_rows(
    model: Any,
    paths: Sequence[str],
    preprocessings: Sequence[str],
    *,
    batch_size: int | None = None,
    threads: int | None = None,
    use_exif: bool = True,
) -> Generator[ImageResult]:
    """The outputs of a model, of Replicas or of an exported Program, for each image under each preprocessing, in their order.

    Every row of Replicas computes `batch_size` images at once, and every process has all results.
    """
    if isinstance(model, Program):
        model.require_preprocessing(preprocessings)
    replicas = model if isinstance(model, Replicas) else Replicas(model)
    forward, usual_batch_size = forward_of(replicas.model)
    size, own = batch_size or usual_batch_size, replicas.own
    turns = [paths[first : first + size * replicas.rows] for first in range(0, len(paths), size * replicas.rows)]
    parts = [turn[size * own.start : size * own.stop] for turn in turns]
    flat = list(itertools.chain.from_iterable(parts))
    options: Any = {"batch_size": size * len(own), "threads": threads, "use_exif": use_exif}
    results = run_on_images(forward, replicas.config, flat, preprocessings, **options)
    return _in_turns(results, [len(part) for part in parts], own.start)


def _in_turns(results: Generator[ImageResult], counts: Sequence[int], row: int) -> Generator[ImageResult]:
    """What all processes have computed, turn by turn, of which this one has so many results."""
    with contextlib.closing(results):
        for number in counts:
            everyones = _everyones({row: list(itertools.islice(results, number))})
            yield from itertools.chain.from_iterable(everyones[each] for each in sorted(everyones))


def _everyones(results: Results) -> Results:
    if count() == 1:
        return results
    return {row: each for content in exchanged(_packed(results)) for row, each in _unpacked(content).items()}


def _packed(results: Results) -> bytes:
    """As an .npz file. Pixels are there only to compare two preprocessings."""
    listed = [(row, result) for row, each in results.items() for result in each]
    readable = [result for _, result in listed if result.error is None]
    names = ["features", "logits"] + (["pixels"] if any(len(result.pixels) > 1 for result in readable) else [])
    arrays = {name: np.array([getattr(result, name) for result in readable]) for name in names}
    facts = json.dumps([[row, result.path, result.error] for row, result in listed]).encode()
    stream = io.BytesIO()
    np.savez(stream, allow_pickle=False, facts=np.frombuffer(facts, np.uint8), **arrays)
    return stream.getvalue()


def _unpacked(content: bytes) -> Results:
    with np.load(io.BytesIO(content), allow_pickle=False) as file:
        arrays = {name: iter(file[name]) for name in file.files if name != "facts"}
        results: dict[int, list[ImageResult]] = {}
        for row, path, error in json.loads(file["facts"].tobytes()):
            outputs = {name: list(next(values)) for name, values in arrays.items()} if error is None else {}
            results.setdefault(row, []).append(ImageResult(path, error=error, **outputs))
    return results
