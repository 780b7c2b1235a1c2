"""The folder of a run: its config, its metrics, its states, and the weights that come out of it."""

__all__ = ["FollowedRun", "RunFolder"]

import contextlib
import csv
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from convert import CheckpointError
from convert.atomic import write_bytes

from ..evaluation import Evaluation
from ..pictures.confusion import draw_confusion
from ..pictures.curves import draw_curves
from ..pictures.files import save
from .config import differences
from .data import Splits
from .events import Events
from .listing import changes, listed

KIND = "mixer_jax fine-tuning run, version 1"
CONFIG, IMAGES, METRICS, TABLE = "config.json", "images.jsonl.gz", "metrics.jsonl", "metrics.csv"
CURVES, CONFUSION, EVENTS = "curves.png", "confusion.png", "tensorboard"
Row = dict[str, Any]


class RunFolder:
    """A run's own folder, locked against a second process until `close`.

    `settings` are groups of fields that decide the result; a folder with others is refused, naming what differs, also among
    the images of `splits`. Rows of metrics hold no times, so that a run that was stopped and went on ends with the same file.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        settings: Mapping[str, Mapping[str, Any]],
        splits: Splits,
        *,
        resume: bool = False,
    ):
        self.path = Path(path)
        found = require_run_or_new(self.path, resume=resume)
        self.path.mkdir(exist_ok=True, parents=True)
        self._lock = FileLock(self.path / ".lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise CheckpointError(f"{self.path}: another process is training in this folder") from None
        self.rows: list[Row] = []
        self._events: Events
        wanted = json.loads(json.dumps({"kind": KIND, **settings}))
        try:
            if found:
                self._require_same(wanted, splits)
            else:
                _write(self.path / IMAGES, listed(splits))
                _write(self.path / CONFIG, json.dumps(wanted, indent=2) + "\n")  # last: with it the folder is a run
        except BaseException:
            self._lock.release()
            raise

    def _require_same(self, wanted: Mapping[str, Any], splits: Splits) -> None:
        try:
            before = json.loads((self.path / CONFIG).read_text())
        except ValueError as error:
            raise CheckpointError(f"{self.path / CONFIG}: is not JSON: {error}") from None
        if not isinstance(before, dict) or before.get("kind") != KIND:
            raise CheckpointError(f"{self.path / CONFIG}: is not that of a run of fine-tuning: give a new folder")
        faults = []
        for group, values in wanted.items():
            if group == "data" and before.get(group) != values and (self.path / IMAGES).is_file():
                faults.append(f"data: {changes((self.path / IMAGES).read_bytes(), splits)}")
            elif group != "kind":
                faults += [f"{group}: {text}" for text in differences(before.get(group, {}), values)]
        if faults:
            raise CheckpointError(
                f"{self.path}: holds another run: {'; '.join(faults)}. Go on with the same settings, weights and images, or "
                "give a new folder"
            )

    def keep_until(self, step: int | None) -> None:
        """Take up the metrics of a run that goes on after `step` (None: from the start), and drop those after it."""
        file = self.path / METRICS
        lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
        self.rows = [row for row in map(json.loads, lines) if step is not None and row["step"] <= step]
        _write(file, "".join(map(_line, self.rows)))
        self._events = Events(self.path / EVENTS, 0 if step is None else step + 1)

    def add(self, row: Row, *, last: bool = False) -> None:
        """Append a row of metrics. With the `last` one in metrics.jsonl a run is finished, so all else is written before it."""
        self.rows.append(row)
        values = {name.replace("_", "/", 1): value for name, value in row.items() if name != "step"}
        self._events.add(row["step"], values)
        if last:
            self.flush()
            self.write_table()
        with open(self.path / METRICS, "a", encoding="utf-8") as file:
            file.write(_line(row))

    def flush(self) -> None:
        """Hand all events to the file system: before a state is saved, since none before it is written again."""
        self._events.flush()

    def write_table(self) -> None:
        """All metrics as one CSV table, a row a step."""
        by_step: dict[int, Row] = {}
        for row in self.rows:
            by_step.setdefault(row["step"], {}).update(row)
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        text = io.StringIO()
        table = csv.DictWriter(text, names, lineterminator="\n")
        table.writeheader()
        table.writerows(by_step[step] for step in sorted(by_step))
        _write(self.path / TABLE, text.getvalue())

    def draw(self, confusion: Evaluation | None = None) -> None:
        """The curves of all metrics, and which classes were taken for which."""
        save(draw_curves(self.rows, title=self.path.name), self.path / CURVES, force=True)
        if confusion is not None:
            save(draw_confusion(confusion, title=self.path.name), self.path / CONFUSION, force=True)

    def close(self) -> None:
        with contextlib.suppress(AttributeError, OSError):  # none yet; a full disk, which has been said
            self._events.close()
        self._lock.release()


class FollowedRun:
    """A run's folder in a process that does not write it: the same rows, in memory."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self.rows: list[Row] = []

    def add(self, row: Row, *, last: bool = False) -> None:
        self.rows.append(row)

    def keep_until(self, step: int | None) -> None: ...

    def flush(self) -> None: ...

    def write_table(self) -> None: ...

    def draw(self, confusion: Evaluation | None = None) -> None: ...

    def close(self) -> None: ...


def require_run_or_new(path: Path, *, resume: bool) -> bool:
    """Whether a run is in a folder. Raises CheckpointError for one that holds anything else or cannot be written, and with
    `resume` without a run.
    """
    nearest = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if nearest.is_dir() and not os.access(nearest, os.W_OK, effective_ids=os.access in os.supports_effective_ids):
        raise CheckpointError(f"{path}: cannot be written: no permission to write in {nearest}: give another folder")
    if (path / CONFIG).is_file():
        return True
    if resume:
        raise CheckpointError(f"{path}: no run to resume; without --resume a new one begins there")
    if not nearest.is_dir():
        raise CheckpointError(f"{path}: cannot be a folder: {nearest} is a file: give a new folder")
    if path.exists() and not all(entry.name.startswith(".") or entry.name == IMAGES for entry in path.iterdir()):
        raise CheckpointError(f"{path}: exists and is not a run of fine-tuning: give a new folder")
    return False


def _line(row: Row) -> str:
    return json.dumps(row) + "\n"


def _write(path: Path, text: str | bytes) -> None:
    write_bytes(path, text.encode() if isinstance(text, str) else text, force=True)
