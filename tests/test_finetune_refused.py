"""Whatever is wrong with images, weights, folder or disk: one line that says so, exit code 1, and a run that is still whole."""

import contextlib
import ctypes
import gzip
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import run
from conftest import random_weights
from filelock import FileLock
from PIL import Image
from test_finetune import SCRATCH, image_folder, outcome
from test_training_data import enormous_png

from convert import Checkpoint, MixerConfig, write
from mixer_jax.training.data import open_dataset
from mixer_jax.training.listing import changes, listed
from mixer_jax.training.run_folder import RunFolder

SHORT = ["--total-steps", "4", "--warmup-steps", "1", "--evaluate-every", "2", "--batch-size", "4", "--validation", "0.3"]


def small_checkpoint(path, *, labels=("cat", "dog"), dtype=np.float32):
    sizes = MixerConfig.named("B/16").replace(patch_size=(4, 4), image_size=(8, 8), num_blocks=2, num_classes=2)
    sizes = sizes.replace(hidden_dim=16, tokens_mlp_dim=8, channels_mlp_dim=24)
    weights = {name: array.astype(dtype) for name, array in random_weights(sizes).items()}
    write(path, Checkpoint.from_arrays(weights).with_metadata(labels=labels, num_blocks=2))
    return path


@dataclass(frozen=True)
class Begun:
    """A finished run, with the checkpoint and the images that it began with."""

    checkpoint: Path
    images: Path
    folder: Path

    @property
    def line(self) -> list[Any]:
        return ["finetune", self.checkpoint, self.images, "--run", self.folder, *SHORT]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("begun")
    begun = Begun(small_checkpoint(folder / "start.npz"), image_folder(folder / "images"), folder / "run")
    from command_line import main

    assert main(*begun.line) == 0
    return begun


@pytest.fixture
def begun(finished, tmp_path):
    """A copy of one's own, of a run that goes on with `begun.line`."""
    shutil.copytree(finished.folder.parent, tmp_path / "begun")
    return Begun(*(tmp_path / "begun" / path.name for path in (finished.checkpoint, finished.images, finished.folder)))


def files(folder):
    """{name: bytes} of all below a folder."""
    return {str(path.relative_to(folder)): path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def refused(capture, *line):
    """The one line on standard error of a command that ends with exit code 1."""
    captured = run(capture, *line, code=1)
    lines = [text for text in captured.err.splitlines() if not text.startswith("note: ")]
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("error: ")
    return lines[0]


def no_class_folders(begun):
    shutil.rmtree(begun.images / "cat")
    shutil.move(begun.images / "dog", begun.images.parent / "flat")
    shutil.rmtree(begun.images)
    (begun.images.parent / "flat").rename(begun.images)


def one_class(begun):
    shutil.rmtree(begun.images / "cat")


def an_empty_class(begun):
    (begun.images / "eel").mkdir()


def a_class_twice(begun):
    image_folder(begun.images, classes=("Cat",))


def one_more_class(begun):
    image_folder(begun.images, classes=("eel",))


def an_added_image(begun):
    shutil.copy(begun.images / "cat" / "0.png", begun.images / "dog" / "new.png")


def a_removed_image(begun):
    (begun.images / "cat" / "3.png").unlink()


def other_content(begun):
    Image.new("RGB", (9, 9)).save(begun.images / "dog" / "2.png")
    Image.new("RGB", (9, 9)).save(begun.images / "dog" / "4.png")


def no_readable_image(begun):
    for path in begun.images.rglob("*.png"):
        path.write_bytes(b"")
    no_run(begun)


def none_to_train_on(begun):
    for name in open_dataset(begun.images, validation=0.3).train.names:
        (begun.images / name).write_bytes(b"")
    no_run(begun)


def other_weights(begun):
    small = random_weights(MixerConfig.named("B/16").replace(num_blocks=1, hidden_dim=8, tokens_mlp_dim=4, channels_mlp_dim=6))
    small["head/kernel"] += 1
    write(begun.checkpoint, Checkpoint.from_arrays(small).with_metadata(num_blocks=1), force=True)


def without_labels(begun):
    begun.checkpoint.unlink()
    small_checkpoint(begun.checkpoint, labels=None)


def float64(begun):
    begun.checkpoint.unlink()
    small_checkpoint(begun.checkpoint, dtype=np.float64)


def not_a_checkpoint(begun):
    begun.checkpoint.write_text("no weights")


def of_another_program(begun):
    (begun.folder / "config.json").write_text('{"model": "ViT-B_16"}')


def cut(begun):
    path = begun.folder / "config.json"
    path.write_bytes(path.read_bytes()[:100])


def notes_alone(begun):
    shutil.rmtree(begun.folder)
    begun.folder.mkdir()
    (begun.folder / "notes.txt").write_text("mine")


def a_file(begun):
    shutil.rmtree(begun.folder)
    begun.folder.write_text("mine")


def no_run(begun):
    shutil.rmtree(begun.folder)


def a_damaged_state(begun):
    for path in (begun.folder / "states").rglob("d/*"):
        path.write_bytes(path.read_bytes()[:-20])


def not_finished(begun):
    """As it was when the last evaluation had been saved, and no more."""
    rows = (begun.folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (begun.folder / "metrics.jsonl").write_text("".join(rows[:-1]))


def nothing(begun):
    pass


CASES: dict[str, tuple[Callable[[Begun], object], list[str], str]] = {
    "no class folders": (no_class_folders, [], "images: has no folders in it, and needs one for each class"),
    "one class": (one_class, [], "images: has images of one class, and needs two or more"),
    "an empty class": (an_empty_class, [], "images: no images in the class folders eel: fill or remove them"),
    "a class twice": (a_class_twice, [], "class names that differ in case alone: Cat, cat: rename or merge them"),
    "labels beyond the head": (
        one_more_class,
        ["--keep-head"],
        "1 class of the train images not among the classes of the head: eel: leave it out, or train a new head",
    ),
    "no labels": (without_labels, ["--keep-head"], "has no labels, so its head cannot be kept: leave out keep_head"),
    "an image size": (nothing, ["--image-size", "9"], "9x9"),
    "microbatches": (nothing, ["--accumulation", "3"], "batch_size must be a multiple of the 3 microbatches, not 4"),
    "a setting": (nothing, ["--base-rate", "0.5"], "holds another run: config: base_rate was 0.03 and is 0.5. Go on with the"),
    "another program": (of_another_program, [], "config.json: is not that of a run of fine-tuning: give a new folder"),
    "cut": (cut, [], "config.json: is not JSON"),
    "another folder": (notes_alone, [], "run: exists and is not a run of fine-tuning: give a new folder"),
    "a file": (a_file, [], "run is a file: give a new folder"),
    "no run": (no_run, ["--resume"], "run: no run to resume; without --resume a new one begins there"),
    "added": (an_added_image, [], "holds another run: data: 1 image added (dog/new.png). Go on with the same"),
    "removed": (a_removed_image, [], "holds another run: data: 1 image removed (cat/3.png). Go on with the same"),
    "changed": (other_content, [], "holds another run: data: 2 images of other content (dog/2.png, dog/4.png). Go on"),
    "a class": (
        one_more_class,
        [],
        "data: 6 images added (eel/",
    ),
    "another split": (nothing, ["--seed", "1"], "config: seed was 0 and is 1; data: "),
    "no images": (no_readable_image, [], "none of the validation images can be used, such as cat/"),
    "none to train on": (none_to_train_on, [], "images: 100 images in a row cannot be read: cat/"),
    "other weights": (other_weights, [], "model: "),
    "float64": (float64, [], "cast them into a file: python -m convert convert IN OUT --dtype float32"),
    "no checkpoint": (not_a_checkpoint, [], "start.npz: "),
    "a damaged state": (lambda begun: (not_finished(begun), a_damaged_state(begun)), [], "the state of step 4 "),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_wrong_is_one_line_and_nothing_is_lost(case, begun, capsys):
    change, options, message = CASES[case]
    change(begun)
    before = files(begun.folder.parent)
    line = refused(capsys, *begun.line, *options)
    assert message in line
    after = files(begun.folder.parent)
    assert {name: content for name, content in after.items() if name in before} == before
    assert after.keys() == before.keys() or "run" not in before


def test_the_copy_of_a_run_goes_on(begun, capsys):
    """What is refused above is refused for the change alone."""
    before = files(begun.folder)
    assert "best: step " in run(capsys, *begun.line).out
    assert files(begun.folder) == before


def test_two_runs_at_once(begun, capsys):
    before = files(begun.folder)
    with FileLock(begun.folder / ".lock"):
        assert "run: another process is training in this folder" in refused(capsys, *begun.line)
    assert files(begun.folder) == before


@contextlib.contextmanager
def bound_by_permissions():
    """Take from this thread what lets root write anywhere (CAP_DAC_OVERRIDE); other users have it not."""
    libc, header = ctypes.CDLL(None, use_errno=True), (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3
    before, without = (ctypes.c_uint32 * 6)(), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, before) == libc.capget(header, without) == 0
    without[0] &= ~(1 << 1)
    assert libc.capset(header, without) == 0
    try:
        yield
    finally:
        assert libc.capset(header, before) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="capabilities are Linux's: read-only folders stay untested")
def test_a_read_only_folder(begun, tmp_path, capsys):
    before = files(begun.folder)
    (tmp_path / "theirs").mkdir(mode=0o555)
    (begun.folder).chmod(0o555)
    with bound_by_permissions():
        message = refused(capsys, *begun.line)
        assert f"{begun.folder}: cannot be written: no permission to write in {begun.folder}: give another folder" in message
        message = refused(capsys, *begun.line, "--run", tmp_path / "theirs" / "deep" / "run")
        assert f"cannot be written: no permission to write in {tmp_path / 'theirs'}: give another folder" in message
    assert files(begun.folder) == before
    assert not list((tmp_path / "theirs").iterdir())


def test_images_that_cannot_be_used_are_skipped_and_named(begun, tmp_path, capsys):
    shutil.rmtree(begun.folder)
    Image.new("RGB", (1, 1)).save(begun.images / "cat" / "pixel.png")
    unusable = {"dog/empty.png": b"", "dog/text.png": b"no image", "cat/huge.png": enormous_png()}
    for name, content in unusable.items():
        (begun.images / name).write_bytes(content)
    splits = open_dataset(begun.images, validation=0.3)
    validation = next(name for name in splits.validation.names if "pixel" not in name)
    (begun.images / validation).write_bytes(b"no image")
    captured = run(capsys, *begun.line)
    for name in (*unusable, validation):
        assert captured.out.count(f"not used: {name}: ") == 1, captured.out
    assert "4 images could not be used" in captured.out
    assert "pixel.png" not in captured.out + captured.err
    assert "pixel.png" in " ".join([*splits.train.names, *splits.validation.names])


CHILD = ["digits", "--from-scratch", SCRATCH, "--image-size", "8", "--total-steps", "6", "--warmup-steps", "2"]
CHILD += ["--evaluate-every", "2", "--batch-size", "8"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    from command_line import main

    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert main("finetune", *CHILD, "--run", folder) == 0
    return folder


@pytest.mark.heavy
def test_a_full_disk_while_saving(undisturbed, tmp_path, capsys):
    """The kernel refuses each write past a limit on the size of files, as it does on a full disk."""
    folder = tmp_path / "run"
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    command = [sys.executable, "-m", "mixer_jax", "finetune", *CHILD, "--run", str(folder)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    child = subprocess.Popen(command, env=environment | {"JAX_PLATFORMS": "cpu"}, **pipes)
    while not (folder / "states" / "0").exists() and child.poll() is None:
        time.sleep(0.01)
    resource.prlimit(child.pid, resource.RLIMIT_FSIZE, (5000, 5000))  # enough for the metrics; no weights
    _, err = child.communicate()
    assert child.returncode == 1, err
    assert err.count("\n") == 1, err
    assert err.startswith(f"error: {folder}")
    assert "File too large" in err
    assert "the same command goes on" in err
    assert (folder / "states" / "0").is_dir()
    run(capsys, "finetune", *CHILD, "--run", folder, "--resume")
    assert outcome(folder) == outcome(undisturbed)


def test_a_full_disk_while_a_row_is_written(undisturbed, tmp_path, capsys, monkeypatch):
    folder, add, before = tmp_path / "run", RunFolder.add, resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(self, row):
        if row["step"] == 3:
            size = (folder / "metrics.jsonl").stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, before[1]))  # a part of the row
        try:
            add(self, row)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "add", limited)
        line = refused(capsys, "finetune", *CHILD, "--run", folder)
    assert f"{folder}: cannot be written: [Errno 27] File too large: what was saved before is still there" in line
    run(capsys, "finetune", *CHILD, "--run", folder, "--resume")
    assert outcome(folder) == outcome(undisturbed)


def test_errors_cost_no_time(begun, capsys, monkeypatch):
    """Settings and folder are checked before the images are listed, and these before the weights are read."""
    begun.checkpoint.unlink()
    assert "no such file" in run(capsys, *begun.line, code=1).err
    an_empty_class(begun)
    assert "no images in the class folders eel" in refused(capsys, *begun.line)
    assert "no run to resume" in refused(capsys, *begun.line, "--run", begun.folder.parent / "no", "--resume")
    assert "batch_size must be" in refused(capsys, *begun.line, "--batch-size", "0")


def test_options_may_stand_between_checkpoint_and_data(begun, capsys):
    apart = ["finetune", begun.checkpoint, "--run", begun.folder, begun.images, *SHORT]
    assert "best: step " in run(capsys, *apart).out
    for line, message in {
        ("finetune", begun.images, "--run", "run"): "give CHECKPOINT and DATA, or DATA and --from-scratch",
        (*begun.line, "--from-scratch", "S/32"): "give CHECKPOINT and DATA, or DATA and --from-scratch",
        (*begun.line, "third"): "unrecognized arguments: third",
        (*apart, "--colour", "red"): "unrecognized arguments: ",
    }.items():
        err = run(capsys, *line, code=2).err
        assert message in err
        assert err.startswith("usage: python -m mixer_jax finetune [-h] [CHECKPOINT] DATA --run FOLDER [options]\n")
        assert err.count("\n") == 2


def test_the_help_is_in_groups(capsys):
    with pytest.raises(SystemExit, match="0"):
        run(capsys, "finetune", "--help")
    out = capsys.readouterr().out
    titles = [line for line in out.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert titles[2:] == [
        "run:",
        "data and images:",
        "recipe:",
        "model:",
        "many devices and processes (docs/scaling.md):",
        "reading the checkpoint:",
    ]
    assert out.index("recipe:") < out.index("--base-rate X") < out.index("model:") < out.index("--keep-head")


def test_the_list_of_images(begun):
    splits = open_dataset(begun.images, validation=0.3)
    content = (begun.folder / "images.jsonl.gz").read_bytes()
    assert content == listed(splits)
    rows = [json.loads(line) for line in gzip.decompress(content).splitlines()]
    size = (begun.images / "cat" / "0.png").stat().st_size
    assert [row[1:] for row in rows if row[1] == "cat/0.png"] == [["cat/0.png", "cat", size]]
    assert sorted(row[1] for row in rows) == sorted([*splits.train.names, *splits.validation.names])
    assert changes(content[:-9], splits) == "other images, and the list of those before is damaged"
    digits = open_dataset("digits")
    digits.test.pixels[7, 3, 3] += 1
    assert changes(listed(open_dataset("digits")), digits) == f"1 image of other content ({digits.test.names[7]})"
    assert changes(listed(digits), open_dataset("digits", seed=1)).startswith("1 image of other content")
    assert " images in another part (digits/" in changes(listed(open_dataset("digits")), open_dataset("digits", seed=1))
    before, now = (open_dataset(begun.images, validation=0.3, classes=names) for names in (["cat", "dog"], ["dog", "cat"]))
    assert changes(listed(before), now) == "the same images, with the classes in another order"
