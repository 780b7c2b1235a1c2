"""The same weights on each row of a mesh, so that images are computed batch by batch, each batch as on one device."""

__all__ = ["Replicas", "run_on_rows"]

import contextlib
import io
import itertools
import json
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import numpy as np

from convert import Checkpoint, CheckpointError, MixerConfig

from ..images import ImageResult, cores, forward_of, run_on_images
from ..labels import Labels
from .processes import count, exchanged, index

Results = Mapping[int, list[ImageResult]]  # by row of the mesh


@dataclass(frozen=True)
class Replicas:
    """Models with the same weights by row of a mesh, those of which this process has devices; `rows` are those of all.

    In a row the widths of the MLPs are split over the mesh's axis model. Nothing is sent between rows, so the outputs for an
    image do not depend on their number.
    """

    models: Mapping[int, Any]
    rows: int

    @classmethod
    def load(cls, checkpoint: Checkpoint, mesh: str | None) -> Self:
        """On the devices of a mesh that `mesh_of` takes. Raises CheckpointError where it does not fit."""
        from ..pretrained import load
        from .placement import Placement, mesh_of

        models = {}
        try:
            grid = mesh_of(mesh).devices
            for row, devices in enumerate(grid):
                if index() in {device.process_index for device in devices}:
                    placement = Placement.checked(mesh_of(f"model={len(devices)}", devices), checkpoint.config)
                    models[row] = load(checkpoint, sharding=placement if len(devices) > 1 else devices[0])
        except ValueError as error:
            raise CheckpointError(str(error)) from None
        return cls(models, len(grid))

    @property
    def config(self) -> MixerConfig:
        return self._any.config

    @property
    def labels(self) -> Labels | None:
        return self._any.labels

    @property
    def preprocessing(self) -> str | None:
        return self._any.preprocessing

    @property
    def _any(self) -> Any:
        return next(iter(self.models.values()))


def run_on_rows(
    model: Any,
    paths: Sequence[str],
    preprocessings: Sequence[str],
    *,
    batch_size: int | None = None,
    threads: int | None = None,
    use_exif: bool = True,
) -> Generator[ImageResult]:
    """The outputs of a Flax or PyTorch model, or of Replicas, for each image under each preprocessing, in their order.

    Replicas take batches in turn, and every process has all results.
    """
    replicas = model if isinstance(model, Replicas) else Replicas({0: model}, 1)
    forwards = {row: forward_of(each) for row, each in replicas.models.items()}
    size = batch_size or next(usual for _, usual in forwards.values())
    options: Any = {"batch_size": size, "threads": max((threads or cores()) // len(forwards), 1), "use_exif": use_exif}
    run = partial(run_on_images, config=replicas.config, preprocessings=preprocessings, **options)
    return _in_turn({row: partial(run, forward) for row, (forward, _) in forwards.items()}, replicas.rows, paths, size)


def _in_turn(runs: Mapping[int, Any], rows: int, paths: Sequence[str], size: int) -> Generator[ImageResult]:
    """Batch k in row k modulo `rows`, by its own of `runs`."""
    batches = [paths[first : first + size] for first in range(0, len(paths), size)]
    with contextlib.ExitStack() as stack:
        lanes = {row: run(paths=list(itertools.chain.from_iterable(batches[row::rows]))) for row, run in runs.items()}
        for lane in lanes.values():
            stack.enter_context(contextlib.closing(lane))
        for first in range(0, len(batches), rows):
            turn = dict(enumerate(batches[first : first + rows]))
            results = {row: list(itertools.islice(lane, len(turn[row]))) for row, lane in lanes.items() if row in turn}
            everyones = _everyones(results)
            yield from itertools.chain.from_iterable(everyones[row] for row in turn)


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
