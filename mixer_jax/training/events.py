"""Metrics as TensorBoard reads them, written at once: no thread has any left when a process is killed."""

__all__ = ["Events"]

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Events:
    """A new file of events in a folder, from `step` on: what earlier files have of that step and later ones is dropped."""

    def __init__(self, folder: Path, step: int):
        try:
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto.event_pb2 import Event, SessionLog
        except ModuleNotFoundError:
            raise ImportError("training needs tensorboardX: pip install 'mixer-jax[train]'") from None
        folder.mkdir(exist_ok=True)
        self._event = Event
        self._writer = EventsWriter(str(folder / "events"), filename_suffix=f".{len(list(folder.iterdir()))}")
        self._write(step, session_log=SessionLog(status=SessionLog.START))

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Values by name; TensorBoard shows those with the same part before the first "/" together."""
        from tensorboardX.summary import scalar

        for name, value in values.items():
            self._write(step, summary=scalar(name, value))

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()

    def _write(self, step: int, **content: Any) -> None:
        self._writer.write_event(self._event(wall_time=time.time(), step=step, **content))
