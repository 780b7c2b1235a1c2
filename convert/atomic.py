"""Files and folders that appear complete or not at all."""

__all__ = ["atomic_files", "atomic_write", "check_writable", "data_name", "write_bytes"]

import contextlib
import filecmp
import glob
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from .errors import CheckpointError


def no_folder(path: Path) -> bool:
    """The rule by which `force` replaces no folder."""
    return False


@contextlib.contextmanager
def atomic_write(
    path: str | os.PathLike[str],
    *,
    size: int,
    folder: bool = False,
    force: bool = False,
    replaceable: Callable[[Path], bool] = no_folder,
) -> Iterator[Path]:
    """A path to write a file to, or with `folder` a folder. It becomes `path` at the end of the block, or vanishes.

    Refused at once if the disk has no room for `size` bytes. Where the system allows it, the file has no name until it is
    complete, so that even a killed process leaves nothing; otherwise, and for folders, the next writer removes what killed
    processes left beside `path`. The content has reached the disk before the last step, one link or rename. Without `force`
    an existing `path` is an error, also if it appears meanwhile. With `force` a file replaces a file, and a folder replaces
    one that is `replaceable`, never any other.
    """
    path = Path(path)
    _remove_abandoned(path)
    check_writable(path, force=force, folder=folder, replaceable=replaceable)
    require_space(path, size)
    with contextlib.ExitStack() as stack:
        unnamed = None if folder else stack.enter_context(_unnamed_file(path.parent))
        new = unnamed or stack.enter_context(_temporary_folder(path)) / "new"
        yield new
        _sync_all(new)
        check_writable(path, force=force, folder=folder, replaceable=replaceable)
        if unnamed and path.exists():  # only a rename replaces, and a rename needs a name
            new = stack.enter_context(_temporary_folder(path)) / "new"
            _link(unnamed, new)
        if folder and path.is_dir():
            path.rename(new.parent / "replaced")
        if new == unnamed or not (folder or force):
            _link_as_new(new, path)
        else:
            new.replace(path)
        _sync(path.parent)


def write_bytes(path: Path, content: bytes | memoryview, *, force: bool = False) -> None:
    """Write a file by `atomic_write`."""
    with atomic_write(path, size=len(content), force=force) as new:
        new.write_bytes(content)


@contextlib.contextmanager
def atomic_files(path: str | os.PathLike[str], *, size: int, force: bool = False) -> Iterator[Path]:
    """As `atomic_write`, for a file that must have its own name while it is written and checked, and may have data beside it.

    The path has the name of `path` in a folder of its own. At the end of the block the data move beside `path`, and then the
    file itself. Data have names of their content by `data_name`, so that a file and data of another never come together,
    whenever a writer is killed. Those of a file that was replaced are removed at last.
    """
    path = Path(path)
    _remove_abandoned(path)
    check_writable(path, force=force)
    require_space(path, size)
    with _temporary_folder(path) as folder:
        new = folder / path.name
        yield new
        pattern = data_name(glob.escape(path.name), 8 * "[0-9a-f]")
        data = [path.parent / file.name for file in folder.glob(pattern)]
        for target in (*data, path):
            _sync(folder / target.name)
            same = target != path and target.is_file() and filecmp.cmp(target, folder / target.name, shallow=False)
            check_writable(target, force=force or same)
        added = [target for target in data if not target.exists()]
        try:
            for target in data:
                (folder / target.name).replace(target)
            new.replace(path) if force else _link_as_new(new, path)
        except BaseException:
            for target in added:
                target.unlink(missing_ok=True)
            raise
        for left in set(path.parent.glob(pattern)) - set(data) if force else ():
            left.unlink()
        _sync(path.parent)


def data_name(name: str, digest: str) -> str:
    """The name of the data beside a file; `digest` has eight hexadecimal digits."""
    return f"{name}.{digest}.data"


def require_space(path: Path, size: int) -> None:
    """Raise CheckpointError if the disk of `path` has no room for `size` bytes."""
    free = shutil.disk_usage(path.parent).free
    if free < size:
        raise CheckpointError(f"{path}: needs {size / 2**20:.0f} MiB and the disk has {free / 2**20:.0f} MiB left")


def check_writable(path: Path, *, force: bool, folder: bool = False, replaceable: Callable[[Path], bool] = no_folder) -> None:
    """Raise CheckpointError if `path` must not be written. `replaceable` tells which folders `force` replaces."""
    if not path.parent.is_dir():
        raise CheckpointError(f"{path}: the folder {path.parent} does not exist")
    if path.is_dir():
        known = replaceable(path)
        if not (force and known):
            remedy = " (replace it with --force or force=True)" if known else "; give a name that is free"
            raise CheckpointError(f"{path}: a folder is in the way{remedy}")
    elif path.exists() and folder:
        raise CheckpointError(f"{path}: a file is in the way of the folder; give a name that is free")
    elif path.exists() and not force:
        raise CheckpointError(f"{path}: exists already (replace it with --force or force=True)")


@contextlib.contextmanager
def _unnamed_file(folder: Path) -> Iterator[Path | None]:
    """A file in this folder that vanishes with the process unless it is linked. None if the system cannot do that."""
    handle = None
    with contextlib.suppress(AttributeError, OSError):  # another system than Linux, or a file system without it
        handle = os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o666)
    try:
        path = Path(f"/proc/self/fd/{handle}")
        yield path if path.exists() else None
    finally:
        if handle is not None:
            os.close(handle)


@contextlib.contextmanager
def _temporary_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path`, removed at the end. While its writer lives, the lock in it is held."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
        lock = FileLock(folder / "lock")
        lock.acquire()
        if (folder / "lock").exists():  # else another writer took it for abandoned before it was locked
            break
        lock.release()
    try:
        yield folder
    except BaseException:
        _remove(folder, settle=0.25)
        raise
    finally:
        lock.release()
        _remove(folder)


def _remove_abandoned(path: Path) -> None:
    """Remove the temporary folders of `path` whose writer is dead. A folder that one was replacing is put back."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.{'?' * 8}.tmp"):
        # Timeout: its writer lives.
        with contextlib.suppress(OSError, Timeout), FileLock(left / "lock", timeout=0):
            if (left / "replaced").exists() and not path.exists():
                (left / "replaced").rename(path)
            _remove(left)


def _remove(folder: Path, *, settle: float = 0.0) -> None:
    """Remove a folder for good: for some moments, the threads of Orbax's failed writer create it again."""
    until = time.monotonic() + settle
    for _ in range(100):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists() and time.monotonic() >= until:
            return
        time.sleep(0.05)


def _link_as_new(new: Path, path: Path) -> None:
    try:
        _link(new, path)  # unlike a rename, fails if another writer was faster
    except FileExistsError:
        raise CheckpointError(f"{path}: appeared while it was being written; the other one is kept") from None
    except OSError:  # a file system without hard links
        new.rename(path)


def _link(new: Path, path: Path) -> None:
    """Give a file a name. Python follows the link in /proc of an unnamed file only with the handle of a folder."""
    if os.link not in os.supports_dir_fd:
        os.link(new, path)
        return
    parent = os.open(path.parent, os.O_RDONLY)
    try:
        os.link(new, path.name, dst_dir_fd=parent, follow_symlinks=True)
    finally:
        os.close(parent)


def _sync_all(path: Path) -> None:
    """Have a file, or a folder with all that is in it, reach the disk."""
    for file in [path, *path.rglob("*")] if path.is_dir() else [path]:
        _sync(file)


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows opens no folders
        return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
