"""Which file or folder of a source is the checkpoint: the newest step of a run, what a pointer names, a hub folder's file."""

__all__ = ["locate", "step_note"]

import os
import re
from pathlib import Path

from .errors import CheckpointError
from .formats import is_msgpack, is_orbax
from .hub_config import weights_in

POINTER = "-LAST"  # the end of the name of big_vision's file that says which step is the last
LONGEST_NAME = 200  # bytes
UNFINISHED = ".orbax-checkpoint-tmp"


def locate(path: Path, step: int | None = None) -> Path:
    """The file or folder of one checkpoint. `step` selects one of several in a folder; without it, the newest is taken.

    Raises CheckpointError for a step that is not there, naming those that are, and for a pointer that leads elsewhere than to
    what lies beside it.
    """
    pointer = path if path.exists() else Path(f"{path}{POINTER}")
    if pointer.name.endswith(POINTER) and _is_pointer(pointer):
        return locate(path.parent, step) if step is not None else _pointed(pointer)
    steps = {} if not path.is_dir() or is_orbax(path) else _steps(path)
    if not steps:
        if step is not None:
            raise CheckpointError(f"has no steps, so --step {step} selects nothing")
        return weights_in(path) or path
    series = {re.sub("[0-9]+$", "", found.name): found.name for names in steps.values() for found in names}
    if len(series) > 1:
        names = ", ".join(sorted(series.values()))
        raise CheckpointError(f"checkpoints of several kinds, such as {names}: give the path of one of them")
    if step is None:
        pointers = sorted(file for file in path.glob(f"*{POINTER}") if file.is_file())
        if len(pointers) == 1:
            return _pointed(pointers[0])
        step = max(steps)
    if step not in steps:
        raise CheckpointError(f"no step {step}: found {_listed(steps)}")
    if len(steps[step]) > 1:
        names = ", ".join(sorted(found.name for found in steps[step]))
        raise CheckpointError(f"several checkpoints of step {step}, {names}: give the path of one of them")
    return steps[step][0]


def step_note(source: Path, path: Path) -> tuple[str, ...]:
    """What to tell the user if `path` was taken in place of `source`."""
    if path == source:
        return ()
    steps = _steps(path.parent)
    return (f"{path.name} taken" + (f", of the steps {_listed(steps)}" if steps else ""),)


def _steps(folder: Path) -> dict[int, list[Path]]:
    """The checkpoints in a folder by their step: the number at the end of the name, alone or after "_" or "-"."""
    steps: dict[int, list[Path]] = {}
    for entry in sorted(folder.iterdir()):
        number = re.fullmatch(r"(?:.*[_-])?([0-9]{1,18})", entry.name)
        if number and UNFINISHED not in entry.name and _is_checkpoint(entry):
            steps.setdefault(int(number[1]), []).append(entry)
    return steps


def _is_checkpoint(path: Path) -> bool:
    """Whether a file or folder with a step in its name is one, of a format that trainers number so."""
    if path.is_dir():
        return is_orbax(path) or any(path.glob("*/_METADATA")) or any(path.glob("*/.zarray"))
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return is_msgpack(file.read(1))


def _is_pointer(path: Path) -> bool:
    """Whether a file is as short as one with a name in it; a checkpoint is longer."""
    return path.is_file() and path.stat().st_size <= LONGEST_NAME


def _pointed(pointer: Path) -> Path:
    """What lies beside a pointer and has the name of its content, or its own with the content for "LAST"."""
    with open(pointer, "rb") as file:
        content = file.read(LONGEST_NAME + 1)
    name = content.decode("ascii", "replace").strip()
    if len(content) <= LONGEST_NAME and re.fullmatch(r"[\w.-]*\w", name, re.ASCII):
        for sibling in (pointer.with_name(f"{pointer.name.removesuffix('LAST')}{name}"), pointer.with_name(name)):
            if os.path.exists(sibling) and sibling != pointer:
                return sibling
    raise CheckpointError(f"{pointer.name}: must hold the name or the step of a checkpoint beside it, not {name[:60]!r}")


def _listed(steps: dict[int, list[Path]]) -> str:
    numbers = sorted(steps)
    return ", ".join(map(str, numbers)) if len(numbers) <= 20 else f"{len(numbers)}, from {numbers[0]} to {numbers[-1]}"
