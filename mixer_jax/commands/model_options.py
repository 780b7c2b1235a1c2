"""The model that a command runs on images."""

__all__ = ["ModelOptions"]

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from convert import Checkpoint, CheckpointError, ReadOptions, read
from convert.identity import fingerprint
from convert.labels import read_labels
from convert.preprocessing import unknown_preprocessing

from ..export.formats import is_exported, opened
from ..export.program import Program


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model to run and how. None means the file's own, or the usual."""

    source: str
    reading: ReadOptions
    implementation: str = "flax"
    labels: Path | None = None
    batch_size: int | None = None
    threads: int | None = None
    use_exif: bool = True
    mesh: str | None = None

    def load(self) -> Any:
        """The Flax or PyTorch model, with the labels of these options; on several devices, Replicas. Or an exported program."""
        return self._program() if is_exported(self.source) else self._model(self._checkpoint())

    def load_identified(self) -> tuple[Any, str]:
        """The same, and the fingerprint of the weights as they are in the file."""
        if is_exported(self.source):
            program = self._program()
            return program, program.facts.fingerprint
        checkpoint = self._checkpoint()
        return self._model(checkpoint), fingerprint(checkpoint.arrays, checkpoint.layout)

    def _checkpoint(self) -> Checkpoint:
        """Not cast yet."""
        return read(self.source, replace(self.reading, dtype=None, allow_float64=True))

    def _model(self, checkpoint: Checkpoint) -> Any:
        if self.reading.dtype is not None:
            checkpoint = checkpoint.astype(self.reading.dtype)
        channels, classes = checkpoint.config.in_channels, checkpoint.config.num_classes
        if checkpoint.dtype == np.float64:
            raise CheckpointError(f"{self.source}: images are float32, so the weights must not be float64: use --dtype float32")
        if channels not in (1, 3):
            raise CheckpointError(f"{self.source}: the model takes {channels} channels, and images have 3 or 1")
        if checkpoint.metadata.preprocessing is None:
            raise unknown_preprocessing(self.source, checkpoint.origins.get("preprocessing"))
        if self.labels is not None and classes:
            checkpoint = checkpoint.with_metadata(labels=read_labels(self.labels, classes))
        if self.implementation == "torch":
            from ..torch_pretrained import load as load_torch

            return load_torch(checkpoint)
        import jax

        from ..pretrained import load
        from ..sharding.replicas import Replicas

        return load(checkpoint) if self.mesh is None and jax.device_count() == 1 else Replicas.load(checkpoint, self.mesh)

    def _program(self) -> Program:
        program = opened(self.source)
        changes: dict[str, Any] = {}
        if self.reading.preprocessing is not None:
            changes["preprocessing"] = self.reading.preprocessing
        if self.labels is not None and program.config.num_classes:
            changes["labels"] = tuple(read_labels(self.labels, program.config.num_classes))
        program = program.with_facts(**changes)
        if program.preprocessing is None:
            raise unknown_preprocessing(self.source)
        return program

    def running(self) -> dict[str, Any]:
        """The keywords that `predict` and `evaluate` have in common."""
        return {"batch_size": self.batch_size, "threads": self.threads, "use_exif": self.use_exif}
