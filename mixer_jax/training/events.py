"""Metrics as TensorBoard reads them, written at once: no thread has any left when a process is killed."""

__all__ = ["Events"]

import time
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any


class Events:
    """A new file of events in a folder, from `step` on: what earlier files have of that step and later ones is dropped.

    There is no file before the first event.
    """

    def __init__(self, folder: Path, step: int):
        try:
            import tensorboardX  # noqa: F401
        except ModuleNotFoundError:
            raise ImportError("training needs tensorboardX: pip install 'mixer-jax[train]'") from None
        self._folder, self._step = folder, step

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Values by name; TensorBoard shows those with the same part before the first "/" together."""
        from tensorboardX.summary import scalar

        for name, value in values.items():
            self._write(step, summary=scalar(name, value))

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        if "_writer" in vars(self):
            self._writer.close()

    @cached_property
    def _writer(self) -> Any:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self._folder.mkdir(exist_ok=True)
        writer = EventsWriter(str(self._folder / "events"), filename_suffix=f".{len(list(self._folder.iterdir()))}")
        start = SessionLog(status=SessionLog.START)
        writer.write_event(Event(wall_time=time.time(), step=self._step, session_log=start))
        return writer

    def _write(self, step: int, **content: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._writer.write_event(Event(wall_time=time.time(), step=step, **content))
