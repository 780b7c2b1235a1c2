"""A file or a folder appears whole or not at all, however its writer ends."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import random_weights
from test_convert import equal

import convert
from convert import Checkpoint, CheckpointError, MixerConfig, ReadOptions, atomic
from convert.atomic import _unnamed_file, atomic_write
from convert.io import is_orbax_target

KINDS = ["file", "named file", "folder"]  # "named": as on a system without unnamed files
kinds = pytest.mark.parametrize("kind", KINDS)


def write(path: Path, kind: str, text: str, *, force: bool = False, meanwhile=lambda: None) -> None:
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        if kind == "named file":
            patch.delattr(os, "O_TMPFILE", raising=False)
        options = {"folder": kind == "folder", "force": force, "replaceable": is_orbax_target}
        new = stack.enter_context(atomic_write(path, size=1, **options))
        if kind == "folder":
            (new / "params").mkdir(parents=True)
            (new / "params" / "_METADATA").write_text(text)
        else:
            new.write_text(text)
        meanwhile()


def content(path: Path) -> str:
    return (path / "params" / "_METADATA" if path.is_dir() else path).read_text()


def leftovers(folder: Path) -> int:
    """How many a killed writer of a file leaves for the next to remove: none where a file can be without a name."""
    with _unnamed_file(folder) as unnamed:
        return unnamed is None


# Writes in a process of its own and stops in the middle, or after that step of putting it in place which is named.
WRITER = """
import pathlib, sys
import convert.atomic, test_atomic
path, kind, force, step = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "True", sys.argv[4]
def stop():
    print("here", flush=True)
    sys.stdin.read()
if step != "writing":
    owner, name = {"link": (convert.atomic, "_link"), "rename": (pathlib.Path, "rename")}[step]
    done = getattr(owner, name)
    setattr(owner, name, lambda *arguments: (done(*arguments), stop()))
test_atomic.write(path, kind, "new", force=force, meanwhile=stop if step == "writing" else lambda: None)
"""


def stopped_writer(path: Path, kind: str, *, force: bool = False, step: str = "writing") -> subprocess.Popen:
    command = [sys.executable, "-c", WRITER, str(path), kind, str(force), step]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent)
    assert process.stdout.readline() == "here\n"
    return process


def kill(process: subprocess.Popen) -> None:
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL


@kinds
@pytest.mark.parametrize("force", [False, True])
def test_what_a_killed_writer_leaves_is_removed_by_the_next(tmp_path, kind, force):
    target = tmp_path / "w"
    if force:
        write(target, kind, "old")
    kill(stopped_writer(target, kind, force=force))
    left = force + (leftovers(tmp_path) if kind == "file" else 1)
    assert len(os.listdir(tmp_path)) == left
    assert not force or content(target) == "old"
    write(tmp_path / "another", kind, "another")
    assert len(os.listdir(tmp_path)) == 1 + left  # whose leftovers are not its concern
    write(target, kind, "newer", force=force)
    assert sorted(os.listdir(tmp_path)) == ["another", "w"]
    assert content(target) == "newer"


def test_a_killed_replacement_of_a_file_leaves_the_old_one(tmp_path):
    target = tmp_path / "w"
    target.write_text("old")
    kill(stopped_writer(target, "file", force=True, step="link"))
    assert target.read_text() == "old"
    write(target, "file", "newer", force=True)
    assert os.listdir(tmp_path) == ["w"]


def test_a_folder_whose_replacement_was_killed_is_put_back(tmp_path):
    target = tmp_path / "w"
    write(target, "folder", "old")
    kill(stopped_writer(target, "folder", force=True, step="rename"))
    with pytest.raises(CheckpointError, match="a folder is in the way"):
        write(target, "folder", "newer")
    assert os.listdir(tmp_path) == ["w"]
    assert content(target) == "old"


@pytest.mark.parametrize("kind", KINDS[1:])
def test_what_a_living_writer_is_at_is_left_alone(tmp_path, kind):
    target = tmp_path / "w"
    process = stopped_writer(target, kind)
    write(target, kind, "ours")
    assert len(os.listdir(tmp_path)) == 2
    target.rename(tmp_path / "ours")
    process.communicate("go on")
    assert process.returncode == 0
    assert sorted(os.listdir(tmp_path)) == ["ours", "w"]
    assert content(target) == "new"


def test_leftovers_without_a_lock_are_removed(tmp_path):
    """Of a writer that was killed when it had made its folder and no more, and of one killed when it removed it."""
    for name in (".w.abcdefgh.tmp", ".w.ijklmnop.tmp/new/params"):
        (tmp_path / name).mkdir(parents=True)
    write(tmp_path / "w", "folder", "new")
    assert os.listdir(tmp_path) == ["w"]


def test_a_writer_whose_folder_was_removed_before_it_was_locked_still_writes(tmp_path, monkeypatch):
    honest, removed = atomic.tempfile.mkdtemp, []

    def removed_at_once(**arguments):
        folder = honest(**arguments)
        if not removed:
            atomic._remove_abandoned(tmp_path / "w")
            removed.append(folder)
            assert not os.path.exists(folder)
        return folder

    monkeypatch.setattr(atomic.tempfile, "mkdtemp", removed_at_once)
    write(tmp_path / "w", "folder", "new")
    assert removed
    assert os.listdir(tmp_path) == ["w"]


@kinds
def test_a_name_that_a_pattern_could_mistake_is_safe(tmp_path, kind):
    (tmp_path / ".wx.abcdefgh.tmp").mkdir()
    write(tmp_path / "w[x]", kind, "new")
    write(tmp_path / "w?", kind, "new")
    assert (tmp_path / ".wx.abcdefgh.tmp").exists()


@kinds
def test_a_new_file_has_the_permissions_of_any_other(tmp_path, kind):
    target, other = tmp_path / "w", tmp_path / "other"
    before = os.umask(0o027)
    try:
        other.mkdir() if kind == "folder" else other.touch()
        for force in (False, True):
            write(target, kind, "new", force=force)
            assert target.stat().st_mode == other.stat().st_mode
    finally:
        os.umask(before)


@kinds
@pytest.mark.parametrize("force", [False, True])
def test_a_failed_writer_leaves_what_was_there(tmp_path, kind, force):
    target = tmp_path / "w"
    if force:
        write(target, kind, "old")
    with pytest.raises(ZeroDivisionError):
        write(target, kind, "new", force=force, meanwhile=lambda: 1 / 0)
    assert os.listdir(tmp_path) == ["w"] * force
    assert not force or content(target) == "old"


@pytest.mark.parametrize("kind", KINDS[:2])
def test_a_file_that_appears_meanwhile_is_kept(tmp_path, kind, monkeypatch):
    target, checks = tmp_path / "w", iter([lambda *_, **__: None, lambda *_, **__: target.write_text("somebody else's")])
    monkeypatch.setattr(atomic, "check_writable", lambda *a, **k: next(checks)(*a, **k))
    with pytest.raises(CheckpointError, match="w: appeared while it was being written; the other one is kept"):
        write(target, kind, "new")
    assert os.listdir(tmp_path) == ["w"]
    assert target.read_text() == "somebody else's"


def test_a_file_system_without_links_gets_a_renamed_file(tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise PermissionError("no hard links here")

    monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    monkeypatch.setattr(os, "link", refuse)
    write(tmp_path / "w", "file", "new")
    assert os.listdir(tmp_path) == ["w"]
    assert content(tmp_path / "w") == "new"


CONVERSION = """
import sys
from convert import ReadOptions, read, write
source, target = sys.argv[1:]
checkpoint = read(source, ReadOptions(num_blocks=2))
print("here", flush=True)
write(target, checkpoint, force=True)
print("done", flush=True)
"""
LARGER = MixerConfig.named("S/16").replace(num_blocks=2, hidden_dim=500, tokens_mlp_dim=250, channels_mlp_dim=2000)


@pytest.mark.heavy
@pytest.mark.parametrize("ending", [".npz", ".safetensors", pytest.param(".pt", marks=pytest.mark.torch), ""])
def test_thirty_kills_of_a_conversion_leave_nothing_partial_and_nothing_else(tmp_path, ending):
    """At random moments of a conversion, half of them of one that replaces what is there; the last ones after it is done.

    Between the two system calls that replace a file it has a name, so of those only the next write leaves nothing for sure.
    """
    chance, weights = random.Random(ending), [random_weights(LARGER, seed=seed) for seed in (0, 1)]
    old, target = Checkpoint.from_arrays(weights[0]), tmp_path / "to" / f"w{ending}"
    target.parent.mkdir()
    np.savez(tmp_path / "new.npz", **weights[1])
    command = [sys.executable, "-c", CONVERSION, str(tmp_path / "new.npz"), str(target)]

    def started() -> subprocess.Popen:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "here\n"
        return process

    def written() -> int:
        """Which of the two the target has, whole."""
        arrays = convert.read(target, ReadOptions(num_blocks=2)).as_numpy()
        (which,) = [seed for seed in (0, 1) if equal(arrays, weights[seed])]
        return which

    process, begun = started(), time.monotonic()
    assert process.stdout.readline() == "done\n"
    needed, killed = time.monotonic() - begun, 0
    process.communicate()
    assert written() == 1
    for replacing in [False, True] * 15:
        convert.write(target, old, force=True)
        assert os.listdir(target.parent) == [target.name]  # also if the kill before left something
        if not replacing:
            shutil.rmtree(target) if target.is_dir() else target.unlink()
        process = started()
        try:
            process.wait(chance.uniform(0, needed))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            killed += 1
        process.stdout.close()
        left = set(os.listdir(target.parent)) - {target.name}
        assert replacing or not (left and ending) or leftovers(tmp_path)
        if target.exists():
            assert written() == 1 or replacing
        else:  # a folder may be between two renames: the next writer puts it back
            assert not (replacing and ending)
    assert killed >= 20
    convert.write(target, old, force=True)
    assert os.listdir(target.parent) == [target.name]


PAIR = """
import os, pathlib, signal, sys
from convert.atomic import atomic_files, data_name
path, digit, killed = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "killed"
replace = pathlib.Path.replace
def replaced(self, target):
    replace(self, target)
    if killed:
        os.kill(os.getpid(), signal.SIGKILL)
pathlib.Path.replace = replaced
with atomic_files(path, size=1, force=True) as new:
    name = data_name(path.name, 8 * digit)
    (new.parent / name).write_text(digit)
    new.write_text(name)
"""


def test_a_file_never_meets_the_data_of_another(tmp_path):
    """Not even if the writer of another is killed when its data are there and the file itself is not."""
    path = tmp_path / "w.onnx"
    for digit, how, left in (("a", "", "a"), ("b", "killed", "a"), ("c", "", "c")):
        done = subprocess.run([sys.executable, "-c", PAIR, path, digit, how], check=False)
        assert done.returncode == (-signal.SIGKILL if how else 0)
        assert (tmp_path / path.read_text()).read_text() == left
    assert sorted(file.name for file in tmp_path.iterdir()) == ["w.onnx", "w.onnx.cccccccc.data"]


def test_the_data_of_a_file_outlive_a_failed_replacement_by_the_same(tmp_path, monkeypatch):
    path = tmp_path / "w.onnx"

    def write():
        with atomic.atomic_files(path, size=1, force=True) as new:
            (new.parent / atomic.data_name(path.name, 8 * "a")).write_text("data")
            new.write_text("file")

    write()
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda self, target: replace(self, target) if target != path else None / 0)
    with pytest.raises(TypeError):
        write()
    assert sorted(file.read_text() for file in tmp_path.iterdir()) == ["data", "file"]
