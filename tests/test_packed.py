"""Packed images are the dataset they were packed from: names, splits, batches and fingerprints; and every fault is named."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from command_line import process, run
from filelock import FileLock
from PIL import Image
from test_finetune import SCRATCH, config, outcome
from test_training_data import REASONS, batches_of, cifar, class_folders, enormous_png, equal, mnist, picture, table

from convert import CheckpointError
from mixer_jax.commands.finetune import finetune
from mixer_jax.commands.pack import check, pack
from mixer_jax.preprocess import ImageError
from mixer_jax.training.augment import Augmentation
from mixer_jax.training.batches import EvaluationBatches
from mixer_jax.training.data import open_dataset
from mixer_jax.training.loop import Interrupted
from mixer_jax.training.run_folder import RunFolder

VARIED = [Augmentation(), Augmentation(randaugment=15, mixup=0.5)]


def parts_folder(folder):
    for i, part in enumerate(("train", "val", "test")):
        class_folders(folder / part, each=3 + i)
    picture(folder / "train" / "dog" / "größe 1.png", 7)
    return folder


def table_file(folder):
    class_folders(folder)
    return table(folder / "labels.csv", [(f"{name}/{i}.png", name) for i in (3, 0, 2, 1) for name in ("emu", "cat", "dog")])


def cifar_folder(folder):
    cifar(folder)
    (folder / "batches.meta.txt").write_text("\n".join(f"class{i}" for i in range(10)))
    return folder


SOURCES = {
    "class folders": class_folders,
    "train, val and test": parts_folder,
    "table": table_file,
    "cifar": cifar_folder,
    "mnist": mnist,
    "digits": lambda _: "digits",
}


@pytest.fixture(scope="module", params=SOURCES)
def both(request, tmp_path_factory):
    """A source, and the same packed."""
    folder = tmp_path_factory.mktemp("packed")
    source = SOURCES[request.param](folder / "source")
    pack(source, folder / "out", shard_images=5 if request.param in ("class folders", "table") else 100)
    return source, folder / "out"


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    out = tmp_path_factory.mktemp("digits") / "out"
    pack("digits", out, shard_images=500)
    return out


def same(first, second):
    """Whether names, labels, fingerprints and batches of two sources are equal bit for bit."""
    a, b = (vars(open_dataset(source, validation=0.3, seed=4)) for source in (first, second))
    for x, y in zip(a.values(), b.values(), strict=True):
        if x is None or y is None:
            assert x is y
            continue
        if (
            list(x.names) != list(y.names)
            or x.fingerprint != y.fingerprint
            or (x.classes, x.channels) != (y.classes, y.channels)
        ):
            return False
        for options in [{"augmentation": augmentation, "seed": 3} for augmentation in VARIED]:
            streams = (zip(range(3), batches_of(part, **options, threads=2).starting_at(1)) for part in (x, y))
            if not all(equal(p, q) for (_, p), (_, q) in zip(*streams, strict=True)):
                return False
        passes = (EvaluationBatches(dataset=part, batch_size=50, image_size=(6, 5)) for part in (x, y))
        if not all(map(equal, *passes)):
            return False
    return True


def test_what_is_packed_is_the_same_dataset_bit_for_bit(both):
    assert same(*both)


def test_a_pack_is_packed_again_with_other_shards(digits, tmp_path):
    pack(digits, tmp_path / "again", shard_images=70)
    assert same("digits", tmp_path / "again")


def test_another_order_of_the_records_would_be_noticed(tmp_path):
    pack("digits", tmp_path / "out", shard_images=500)
    swap(tmp_path / "out")
    assert not same("digits", tmp_path / "out")


def swap(out):
    """Two shards of one size change places."""
    first, second = (out / f"train-0000{i}-of-00003.array_record" for i in (0, 1))
    assert first.stat().st_size == second.stat().st_size
    first.rename(out / "first")
    second.rename(first)
    (out / "first").rename(second)


def test_records_are_the_files_byte_for_byte(tmp_path):
    folder = class_folders(tmp_path / "pets")
    Image.new("RGB", (30, 20), "red").save(folder / "cat" / "a.jpg", quality=71)
    pack(folder, tmp_path / "out")
    train = open_dataset(tmp_path / "out").train
    for i, name in enumerate(train.names):
        assert train.packed.record(i) == (folder / name).read_bytes()


def test_classes_of_a_head_number_the_classes_of_a_pack(tmp_path):
    pack(class_folders(tmp_path / "pets"), tmp_path / "out")
    classes = ["emu", "owl", "dog", "cat"]
    a, b = (open_dataset(tmp_path / name, classes=classes, channels=1).train for name in ("pets", "out"))
    assert a.labels.tolist() == b.labels.tolist()
    assert a.fingerprint == b.fingerprint
    assert b.image(0).shape == (9, 12, 1)


def test_images_that_cannot_be_read_are_packed_and_named_when_used(tmp_path):
    folder = class_folders(tmp_path / "pets", each=6)
    (folder / "cat" / "1.png").write_bytes(b"")
    (folder / "dog" / "2.png").write_text("not an image")
    (folder / "emu" / "3.png").write_bytes(enormous_png())
    pack(folder, tmp_path / "out")
    listed = []
    for source in (folder, tmp_path / "out"):
        batches = EvaluationBatches(dataset=open_dataset(source, validation=0.01).train, batch_size=8, image_size=(6, 5))
        list(batches)
        listed.append(batches.unreadable)
    assert listed[0] == listed[1]
    assert listed[0].keys() <= REASONS.keys()
    assert same(folder, tmp_path / "out")


@pytest.mark.heavy
@pytest.mark.usefixtures("unoptimised")
def test_a_run_begun_on_the_folder_goes_on_with_the_pack(tmp_path, monkeypatch):
    folder = class_folders(tmp_path / "pets", each=8)
    pack(folder, tmp_path / "out", shard_images=7)
    settings = {"config": config(validation=0.3), "from_scratch": SCRATCH}
    finetune(None, folder, tmp_path / "uninterrupted", **settings)
    add = RunFolder.add

    def interrupted(self, row):
        add(self, row)
        if row["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(RunFolder, "add", interrupted)
    with pytest.raises(Interrupted):
        finetune(None, folder, tmp_path / "run", **settings)
    monkeypatch.undo()
    shutil.rmtree(folder)
    finetune(None, tmp_path / "out", tmp_path / "run", **settings)
    assert outcome(tmp_path / "run") == outcome(tmp_path / "uninterrupted")


def contents(out):
    return {path.name: path.read_bytes() for path in out.iterdir() if not path.name.startswith(".")}


def test_killed_and_run_again_gives_the_same_bytes(tmp_path):
    source = mnist(tmp_path / "mnist", images=1500)
    pack(source, tmp_path / "whole", shard_images=100)
    line = ["pack", str(source), str(tmp_path / "out"), "--shard-images", "100"]
    for shards in (1, 9):
        child = subprocess.Popen([sys.executable, "-m", "mixer_jax", *line], stdout=subprocess.DEVNULL)
        while child.poll() is None and len(list((tmp_path / "out").glob("*.array_record"))) < shards:
            time.sleep(0.001)
        child.kill()
        assert child.wait() == -signal.SIGKILL
        with pytest.raises(CheckpointError, match=r"index.json is missing: the pack is not complete; the same command `pack`"):
            open_dataset(tmp_path / "out")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.array_record")}
    assert 9 <= len(before) < 30
    out, err = process(*line)
    assert out == f"{tmp_path / 'out'}: 1,500 train, 1,500 test images in 30 shards, 3.8 MiB\n"
    assert err == ""
    assert all((tmp_path / "out" / name).stat().st_mtime_ns == time_ns for name, time_ns in before.items())  # not written again
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not (tmp_path / "out" / ".packing.json").exists()


def test_a_source_that_changed_in_between_is_refused(tmp_path):
    folder = class_folders(tmp_path / "pets", each=6)
    out = tmp_path / "out"
    pack(folder, out, shard_images=5)
    (out / "train-00002-of-00004.array_record").unlink()
    complete = contents(out)
    picture(folder / "cat" / "new.png")
    (folder / "emu" / "5.png").unlink()
    (folder / "dog" / "3.png").write_bytes(b"shorter")
    with pytest.raises(CheckpointError) as error:
        pack(folder, out, shard_images=5)
    changed = "1 image added (cat/new.png); 1 image removed (emu/5.png); 1 image of other content (dog/3.png)"
    assert str(error.value) == f"{out}: was begun with other images: {changed}. Restore these, or pack into a new folder"
    with pytest.raises(CheckpointError, match="has 5 images a shard, not 6: --shard-images must be the same"):
        pack(folder, out, shard_images=6)
    assert contents(out) == complete
    class_folders(folder, each=6)
    (folder / "cat" / "new.png").unlink()
    pack(folder, out, shard_images=5)  # the missing shard alone
    assert same(folder, out)


def test_a_folder_that_holds_something_else_is_refused(tmp_path):
    folder = class_folders(tmp_path / "pets")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "index.json").write_text("{}")
    (tmp_path / "file").touch()
    (tmp_path / "locked").mkdir()
    faults = {
        "full": r"holds something else \(notes.txt\): give a new folder",
        "json": "index.json: is not that of packed images of this version: give a new folder",
        "file": "is a file: give a new folder",
        "pets/out": f"is in the folder of the images: give a folder outside of {folder}",
        "locked": "another process is packing into this folder",
    }
    with FileLock(tmp_path / "locked" / ".lock"):
        for name, fault in faults.items():
            with pytest.raises(CheckpointError, match=fault):
                pack(folder, tmp_path / name)
    with pytest.raises(CheckpointError, match="gs://bucket/pets: is an address, and shards are written to a folder"):
        pack(folder, "gs://bucket/pets")
    pack(folder, tmp_path / "locked")  # nothing but a lock is a new folder


def remove(out):
    (out / "train-00001-of-00003.array_record").unlink()


def truncate(out):
    path = out / "test-00000-of-00001.array_record"
    path.write_bytes(path.read_bytes()[:-1])


def damage_the_table(out):
    content = bytearray((out / "train-table.npy").read_bytes())
    content[5000] ^= 1
    (out / "train-table.npy").write_bytes(content)


def change_the_index(**changes):
    def change(out):
        index = json.loads((out / "index.json").read_text())
        (out / "index.json").write_text(json.dumps(index | changes))

    return change


FAULTS = [
    (remove, "{out}: train-00001-of-00003.array_record is missing: the command `pack`"),
    (truncate, "{out}: test-00000-of-00001.array_record is truncated: 131071 bytes of 131072: the command"),
    (damage_the_table, "{out}: train-table.npy is damaged: its CRC-32 is not that in index.json: the command"),
    (lambda out: (out / "train-names.bin").unlink(), "{out}: train-names.bin is missing: the command"),
    (lambda out: (out / "index.json").write_text("{"), "{out}/index.json: is not JSON: Expecting property name"),
    (lambda out: (out / "index.json").unlink(), "{out}/index.json is missing: the pack is not complete; the same command"),
    (change_the_index(parts={}), "{out}/index.json: is damaged (KeyError: 'train')"),
    (change_the_index(parts={"train": {"shards": {"../x": {}}, "tables": {}}}), "{out}/index.json: is damaged (KeyError: 'fi"),
    (
        change_the_index(kind="mixer_jax packed images, version 2"),
        "{out}/index.json: is of kind 'mixer_jax packed images, version 2', and this version reads 'mixer_jax packed images, "
        "version 1': update mixer-jax, or pack the images again",
    ),
]


@pytest.mark.parametrize(("fault", "message"), FAULTS)
def test_a_pack_with_a_fault_is_refused_in_one_line(digits, tmp_path, fault, message, capsys):
    out = tmp_path / "out"
    shutil.copytree(digits, out)
    fault(out)
    with pytest.raises(CheckpointError, match=f"^{re.escape(message.format(out=out))}") as error:
        open_dataset(out)
    err = run(capsys, "pack", out, "--check", code=1).err
    assert err == f"error: {error.value}\n"


def test_a_damaged_image_is_named_and_skipped(digits, tmp_path, capsys):
    assert run(capsys, "pack", digits, "--check").out == f"{digits}: 1,438 train, 359 test images: every one as it was packed\n"
    out = tmp_path / "out"
    shutil.copytree(digits, out)
    path, test = out / "test-00000-of-00001.array_record", open_dataset(out).test
    content = path.read_bytes()
    place = content.index(test.packed.record(7)) + 40
    path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    with pytest.raises(
        ImageError,
        match="^damaged in test-00000-of-00001.array_record: Corrupted Riegeli/records file: chunk data hash mismatch",
    ):
        open_dataset(out).test.image(7)
    swap(out)
    train = open_dataset(out).train
    with pytest.raises(ImageError, match="^damaged in train-00000-of-00003.array_record: its CRC-32 is not that in the table$"):
        train.image(0)
    batches = batches_of(train)
    drawn = {train.names[i] for step in range(20) for i in batches[step].indices}
    assert len(batches.unreadable) > 20  # of two shards
    assert not drawn & batches.unreadable.keys()
    assert all("damaged" in reason for reason in batches.unreadable.values())
    with pytest.raises(CheckpointError, match="holds no packed images"):
        check(tmp_path)
    with pytest.raises(CheckpointError, match=r"1,001 images are damaged: digits/0: damaged .*; \.\.\.: remove these shards"):
        check(out)


def test_no_changed_byte_of_a_shard_gives_another_image(tmp_path):
    out = tmp_path / "out"
    pack(class_folders(tmp_path / "pets"), out)
    (path,) = out.glob("*.array_record")
    expected, content = [open_dataset(out).train.packed.record(i) for i in range(9)], path.read_bytes()
    start, random = content.index(expected[0]), np.random.default_rng(0)
    places = [*range(64), *range(len(content) - 64, len(content)), *random.integers(0, 9000, 40).tolist()]
    places += [start, start + len(expected[0]) - 1, *random.integers(start, start + len(expected[0]), 38).tolist()]
    damaged = 0
    for place in places:
        path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        train = open_dataset(out).train
        for i in (0, 8):
            try:
                assert train.packed.record(i) == expected[i], place
            except ImageError as error:
                damaged += str(error).startswith("damaged in train-00000-of-00001.array_record: ")
    assert damaged >= 40


def test_records_are_read_from_many_threads_with_a_handle_a_shard(digits):
    splits, plain = open_dataset(digits), open_dataset("digits")
    indices = np.random.default_rng(0).integers(len(splits.train), size=3000)
    with ThreadPoolExecutor(8) as pool:
        images = list(pool.map(splits.train.image, indices.tolist()))
    assert all(np.array_equal(image, plain.train.image(i)) for image, i in zip(images, indices))
    handles = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    assert len([name for name in handles if name.startswith(str(digits)) and name.endswith("record")]) == 3


@pytest.fixture
def bucket(digits, tmp_path, monkeypatch):
    """The pack of the digits in fsspec's memory."""
    fsspec = pytest.importorskip("fsspec")
    monkeypatch.setenv("MIXER_JAX_CACHE", str(tmp_path / "cache"))
    files = fsspec.filesystem("memory")
    files.put(str(digits), "/bucket/digits", recursive=True)
    yield files
    files.rm("/bucket", recursive=True)


def test_a_pack_at_an_address_is_copied_shard_by_shard(digits, bucket, tmp_path, capsys):
    splits = open_dataset("memory://bucket/digits")
    (folder,) = (tmp_path / "cache" / "packed").iterdir()
    assert capsys.readouterr().err == f"memory://bucket/digits: shards are copied to {folder} when first read\n"
    assert not list(folder.glob("*.array_record"))
    splits.test.image(0)
    assert [path.name for path in folder.glob("*.array_record")] == ["test-00000-of-00001.array_record"]
    assert same("digits", "memory://bucket/digits")
    assert contents(folder) == contents(digits)


def test_faults_at_an_address_stop_a_run_and_leave_no_half_copy(bucket, tmp_path):
    shard = "/bucket/digits/test-00000-of-00001.array_record"
    splits, content = open_dataset("memory://bucket/digits"), bucket.cat_file(shard)
    for change, fault in (
        (lambda: bucket.pipe_file(shard, content[:-9]), "131063 bytes of 131072"),
        (lambda: bucket.rm(shard), "is missing"),
    ):
        change()
        with pytest.raises(CheckpointError, match=f"memory://bucket/digits/test-00000-of-00001.array_record:? {fault}"):
            splits.test.image(0)
        assert not list((tmp_path / "cache").rglob("test-*.array_record"))
    bucket.pipe_file(shard, content)
    splits.test.image(0)
    with pytest.raises(CheckpointError, match="memory://nowhere/index.json is missing: it is no folder that `pack` wrote"):
        open_dataset("memory://nowhere")
    with pytest.raises(CheckpointError, match="nosuch://nowhere: cannot be opened: Protocol not known"):
        open_dataset("nosuch://nowhere")


def test_usage_of_the_command(digits, capsys):
    for arguments in (
        (digits,),
        (digits, digits, "--check"),
        (digits, "--check", "--shard-images", "5"),
        ("digits", "x", "--shard-images", "0"),
    ):
        run(capsys, "pack", *arguments, code=2)


def test_an_image_that_changes_or_cannot_be_opened_stops_the_packing(tmp_path, monkeypatch):
    folder = class_folders(tmp_path / "pets")
    (folder / "cat" / "0.png").rename(tmp_path / "elsewhere.png")
    (folder / "cat" / "0.png").symlink_to(tmp_path / "nothing.png")
    with pytest.raises(CheckpointError, match=r"cat/0.png: cannot be packed: .*No such file.* the same command goes on"):
        pack(folder, tmp_path / "out")
    (folder / "cat" / "0.png").unlink()
    shutil.copy(tmp_path / "elsewhere.png", folder / "cat" / "0.png")
    monkeypatch.setattr(Path, "read_bytes", lambda path: b"longer" * 1000)
    with pytest.raises(CheckpointError, match="cat/0.png: changed while it was packed"):
        pack(folder, tmp_path / "new")
