"""Labelled images: what is opened as what, what is refused, and batches that depend on the seed and their number alone."""

import contextlib
import gzip
import hashlib
import os
import pickle
import random
import struct
import subprocess
import sys
import threading
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.stats import binomtest, chi2_contingency

import mixer_jax
from convert import CheckpointError, MixerConfig
from mixer_jax.commands.finetune import finetune
from mixer_jax.preprocess import ImageError, squash
from mixer_jax.training.augment import OPERATIONS, Augmentation, _operation, random_crop
from mixer_jax.training.batches import EvaluationBatches, TrainingBatches
from mixer_jax.training.data import Dataset, open_dataset

GOLDEN = Path(__file__).parent / "golden"
NAMES = ["cat", "dog", "emu"]
PLAIN = Augmentation(min_area=None, flip=False)
SIZE = (6, 5)


def picture(path, number=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (9, 12, 3), np.uint8)
    Image.fromarray(pixels).save(path)


def class_folders(folder, each=4, names=NAMES):
    for c, name in enumerate(names):
        for i in range(each):
            picture(folder / name / f"{i}.png", 100 * c + i)
    return folder


def table(path, rows, header=True):
    separator = "\t" if path.suffix == ".tsv" else ","
    lines = ([separator.join(["path", "label"])] if header else []) + [separator.join(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def idx(path, array):
    content = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def mnist(folder, images=30, labels=None, ending=""):
    folder.mkdir()
    rng = np.random.default_rng(0)
    for prefix in ("train", "t10k"):
        idx(folder / f"{prefix}-images-idx3-ubyte{ending}", rng.integers(0, 256, (images, 5, 4), np.uint8))
        classes = np.arange(images if labels is None else labels, dtype=np.uint8) % 3
        idx(folder / f"{prefix}-labels-idx1-ubyte{ending}", classes)
    return folder


def cifar(folder, classes=10):
    """Records as the binary version has them, and their pixels (n, h, w, c) and labels."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    files = [f"data_batch_{i}.bin" for i in range(1, 6)] if classes == 10 else ["train.bin"]
    pixels, labels = [], []
    for name in [*files, "test_batch.bin" if classes == 10 else "test.bin"]:
        images, fine = rng.integers(0, 256, (40, 32, 32, 3), np.uint8), rng.permutation(40) % min(classes, 20)
        coarse = [] if classes == 10 else [fine[:, None] // 5]
        planes = images.transpose(0, 3, 1, 2).reshape(40, -1)
        np.hstack([*coarse, fine[:, None], planes]).astype(np.uint8).tofile(folder / name)
        pixels.append(images)
        labels.append(fine)
    return np.concatenate(pixels), np.concatenate(labels)


def everything(dataset):
    return {name: (dataset.classes[label], dataset.image(i).tobytes()) for i, (name, label) in enumerate(contents(dataset))}


def contents(dataset):
    return list(zip(dataset.names, dataset.labels.tolist()))


def batches_of(dataset, **options):
    return TrainingBatches(**{"dataset": dataset, "batch_size": 4, "image_size": SIZE} | options)


def equal(first, second):
    return all(np.array_equal(getattr(first, name), getattr(second, name)) for name in vars(first))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return class_folders(tmp_path_factory.mktemp("images") / "pets")


@pytest.fixture(scope="module")
def dataset(folder):
    return open_dataset(folder).train


def test_class_folders_are_split_by_seed_with_every_class_in_both_parts(folder):
    splits = open_dataset(folder, validation=0.3, seed=1)
    assert (splits.train.classes, splits.train.channels, splits.test) == (tuple(NAMES), 3, None)
    assert np.bincount(splits.train.labels).tolist() == [3, 3, 3]
    assert np.bincount(splits.validation.labels).tolist() == [1, 1, 1]
    both = contents(splits.train) + contents(splits.validation)
    assert sorted(both) == [(f"{name}/{i}.png", c) for c, name in enumerate(NAMES) for i in range(4)]
    for i, name in enumerate(splits.train.names):
        assert np.array_equal(splits.train.image(i), np.asarray(Image.open(folder / name)))
    kept = {tuple(open_dataset(folder, seed=seed).validation.names) for seed in range(6)}
    assert len(kept) > 1  # the seed chooses


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_a_table_is_the_same_dataset_as_the_folder_in_any_order_of_its_rows(folder, suffix):
    rows = [(f"{name}/{i}.png", name) for name in NAMES for i in range(4)]
    expected = open_dataset(folder)
    for header in (True, False):
        random.Random(suffix).shuffle(rows)
        splits = open_dataset(table(folder / f"labels{suffix}", rows, header))
        assert everything(splits.train) == everything(expected.train)
        assert contents(splits.validation) == contents(expected.validation)
        assert splits.train.fingerprint == expected.train.fingerprint
    (folder / "wide.csv").write_text("\ufeffid,Label,PATH\n7,a,cat/0.png\n8,b,dog/1.png\n9,b,./emu/2.png\n", encoding="utf-8")
    wide = open_dataset(folder / "wide.csv", channels=1)
    labels = dict(contents(wide.train) + contents(wide.validation))
    assert labels == {"cat/0.png": 0, "dog/1.png": 1, "emu/2.png": 1}
    assert wide.train.image(0).shape == (9, 12, 1)


def test_an_added_image_leaves_most_others_where_they_are(tmp_path):
    folder = class_folders(tmp_path / "a", each=20, names=NAMES[:2])
    before = set(open_dataset(folder).validation.names)
    picture(folder / "cat" / "another.png")
    assert len(before & set(open_dataset(folder).validation.names)) >= len(before) - 1


def test_train_val_and_test_folders_are_kept_apart(tmp_path):
    for part in ("train", "val", "test"):
        class_folders(tmp_path / part)
    splits = open_dataset(tmp_path)
    for part in ("train", "validation", "test"):
        names = getattr(splits, part).names
        assert len(names) == 12
        assert all(name.startswith(part[:3]) for name in names)
    class_folders(tmp_path / "vehicles", names=["car", "train"])  # a class of that name
    assert open_dataset(tmp_path / "vehicles").train.classes == ("car", "train")


def test_classes_are_numbered_as_the_head_is(folder, tmp_path):
    splits = open_dataset(folder, classes=["emu", "owl", "dog", "cat"])
    assert {name.partition("/")[0]: label for name, label in contents(splits.train)} == {"cat": 3, "dog": 2, "emu": 0}
    numbers = class_folders(tmp_path, names=["10", "9", "1"])
    assert open_dataset(numbers).train.classes == ("1", "9", "10")


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_mnist_files_are_read(tmp_path, ending):
    splits = open_dataset(mnist(tmp_path / "mnist", ending=ending))
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (27, 3, 30)
    assert (splits.test.classes, splits.test.channels) == (("0", "1", "2"), 1)
    rng = np.random.default_rng(0)
    _, images = (rng.integers(0, 256, (30, 5, 4), np.uint8) for _ in range(2))
    assert np.array_equal(splits.test.pixels[..., 0], images)
    assert splits.test.labels.tolist() == [0, 1, 2] * 10
    coloured = open_dataset(tmp_path / "mnist", channels=3).test.image(1)
    assert np.array_equal(coloured, np.repeat(images[1][..., None], 3, axis=2))


@pytest.mark.parametrize("classes", [10, 100])
def test_cifars_binary_files_are_read(tmp_path, classes):
    pixels, labels = cifar(tmp_path / "cifar", classes)
    splits = open_dataset(tmp_path / "cifar")
    assert np.array_equal(splits.test.pixels, pixels[-40:])
    assert np.array_equal(splits.test.labels, labels[-40:])
    for part in (splits.train, splits.validation):
        at = [int(name.removeprefix("train/")) for name in part.names]
        assert np.array_equal(part.pixels, pixels[at])
        assert np.array_equal(part.labels, labels[at])
    listed = "batches.meta.txt" if classes == 10 else "fine_label_names.txt"
    (tmp_path / "cifar" / listed).write_text("\n".join(f"class{i}" for i in range(classes)) + "\n\n")
    assert open_dataset(tmp_path / "cifar").train.classes[7] == "class7"


def test_digits_come_with_a_test_part():
    splits = open_dataset("digits")
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (1295, 143, 359)
    assert splits.test.image(0).shape == (8, 8, 1)
    assert splits.test.pixels.max() == 255


def test_the_fingerprint_notices_what_changed(folder, tmp_path):
    copy = class_folders(tmp_path / "pets")
    first = open_dataset(copy).train.fingerprint
    assert first == open_dataset(folder).train.fingerprint  # wherever it lies
    name = open_dataset(copy).train.names[0]
    Image.new("RGB", (99, 99)).save(copy / name)
    assert open_dataset(copy).train.fingerprint != first
    digits = open_dataset("digits").train
    changed = digits.pixels.copy()
    changed[5, 0, 0] += 1
    assert replace(digits, pixels=changed).fingerprint != digits.fingerprint
    assert replace(digits, labels=digits.labels[::-1]).fingerprint != digits.fingerprint
    assert replace(digits, pixels=digits.pixels.copy()).fingerprint == digits.fingerprint


@pytest.mark.parametrize("augmentation", [Augmentation(), Augmentation(randaugment=15, mixup=0.5)])
def test_a_batch_is_a_function_of_seed_and_number_alone(dataset, augmentation):
    one = batches_of(dataset, seed=3, augmentation=augmentation, threads=1)
    expected = [one[step] for step in range(9)]
    for threads in (1, 2, 5):
        many = batches_of(dataset, seed=3, augmentation=augmentation, threads=threads)
        for start in (0, 4):
            assert all(map(equal, many.starting_at(start), expected[start:]))
    assert not equal(expected[0], batches_of(dataset, seed=4, augmentation=augmentation)[0])
    assert not equal(expected[0], expected[1])


def test_another_process_draws_the_same_batches(folder, dataset):
    code = f"""if True:
        import hashlib
        from mixer_jax.training.batches import TrainingBatches
        from mixer_jax.training.data import open_dataset
        batches = TrainingBatches(dataset=open_dataset({str(folder)!r}).train, batch_size=4, image_size=(6, 5), seed=3)
        for step, batch in zip((7, 8), batches.starting_at(7)):
            print(hashlib.sha256(batch.images.tobytes() + batch.labels.tobytes()).hexdigest())
    """
    environment = os.environ | {"PYTHONHASHSEED": "5", "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    here = [batches_of(dataset, seed=3)[step] for step in (7, 8)]
    assert done.stdout.split() == [
        hashlib.sha256(batch.images.tobytes() + batch.labels.tobytes()).hexdigest() for batch in here
    ]
    assert done.stderr == ""


def test_every_epoch_has_every_image_once_in_another_order(dataset):
    batches = batches_of(dataset, augmentation=PLAIN)  # 9 images in batches of 4: an epoch ends within a batch
    drawn = np.concatenate([batches[step].indices for step in range(9)]).reshape(4, 9)
    assert (np.sort(drawn) == np.arange(9)).all()
    assert len({tuple(epoch) for epoch in drawn}) > 1
    batch = batches[0]
    assert np.array_equal(batch.labels, dataset.labels[batch.indices])
    assert (batch.mask == 1).all()


@pytest.mark.parametrize("preprocessing", ["squash", "timm_bilinear"])
def test_pixels_are_scaled_as_the_model_expects_them(dataset, preprocessing):
    batch = batches_of(dataset, augmentation=PLAIN, preprocessing=preprocessing)[0]
    images = np.stack([squash(dataset.image(i), SIZE) for i in batch.indices])
    expected = images / np.float32(255) if preprocessing == "timm_bilinear" else images / np.float32(127.5) - 1
    assert batch.images.dtype == np.float32
    np.testing.assert_array_equal(batch.images, expected)


def test_images_are_decoded_while_a_batch_is_used():
    enough = threading.Event()

    class Watched(Dataset):
        def image(self, index):
            read.append(index)
            if len(read) > 8:
                enough.set()
            return super().image(index)

    read = []
    digits = open_dataset("digits").train
    batches = batches_of(Watched(digits.classes, digits.names, digits.labels, 1, pixels=digits.pixels), threads=2)
    stream = batches.starting_at(0)
    next(stream)
    assert enough.wait(30)  # the second batch and some of the third, that nobody asked for yet
    stream.close()


@pytest.fixture
def damaged(tmp_path):
    folder = class_folders(tmp_path / "pets", each=6)
    (folder / "cat" / "1.png").write_bytes(b"")
    (folder / "dog" / "2.png").write_text("not an image")
    (folder / "emu" / "3.png").write_bytes(enormous_png())
    splits = open_dataset(folder)
    every = np.arange(len(splits.train))
    return splits.train.subset(every)


def enormous_png(width=40_000, height=40_000):
    """A PNG of 1.6 thousand million pixels, in a hundred bytes."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


REASONS = {
    "cat/1.png": "the file is empty",
    "dog/2.png": "no image in a format that Pillow knows",
    "emu/3.png": "cannot be read: Image size (1600000000 pixels) exceeds limit of 178956970 pixels",
}


def test_unreadable_images_are_named_and_replaced_the_same_way_each_time(damaged):
    bad = {name: reason for name, reason in REASONS.items() if name in damaged.names}
    assert bad
    one, many = (batches_of(damaged, threads=threads) for threads in (1, 3))
    expected = [one[step] for step in range(12)]
    assert all(map(equal, many.starting_at(0), expected))
    for unreadable in (one.unreadable, many.unreadable):
        assert unreadable.keys() == bad.keys()
        assert all(unreadable[name].startswith(reason) for name, reason in bad.items())
    drawn = {damaged.names[i] for batch in expected for i in batch.indices}
    assert drawn == set(damaged.names) - bad.keys()
    with pytest.raises(
        ImageError, match=r"(cat/1|dog/2|emu/3).png: (the file is empty|no image in|cannot be read: Image size)"
    ):
        list(zip(range(12), batches_of(damaged, on_unreadable="raise").starting_at(0)))


def test_a_dataset_without_a_readable_image_stops(damaged):
    bad = damaged.subset(np.array([i for i, name in enumerate(damaged.names) if name in REASONS]))
    with pytest.raises(ImageError, match="100 images in a row cannot be read: cat/1.png: the file is empty|dog/2|emu/3"):
        batches_of(bad)[0]


def test_evaluation_has_every_image_once_and_nothing_in_the_padding(damaged, tmp_path):
    config = MixerConfig.named("S/32", image_size=32)
    batches = EvaluationBatches(dataset=damaged, batch_size=4, image_size=(32, 32), preprocessing="resmall_crop", threads=3)
    seen = list(batches)
    assert len(seen) == len(batches) == -(-len(damaged) // 4)
    indices, mask = (np.concatenate([getattr(batch, name) for batch in seen]) for name in ("indices", "mask"))
    padding = -len(damaged) % 4
    assert padding
    assert indices.tolist() == [*range(len(damaged)), *[-1] * padding]
    assert mask.tolist() == [float(damaged.names[i] not in REASONS) for i in range(len(damaged))] + [0.0] * padding
    assert batches.unreadable.keys() == REASONS.keys() & set(damaged.names)
    images, labels = (np.concatenate([getattr(batch, name) for batch in seen]) for name in ("images", "labels"))
    assert not images[mask == 0].any()
    for i in np.flatnonzero(mask):
        path = Path(damaged.root) / damaged.names[i]
        assert np.array_equal(images[i], mixer_jax.prepare(path, config, "resmall_crop"))
        assert labels[i] == damaged.labels[i]


def crops(sample, size, count=20_000):
    """Top, left, height and width of random crops, (count, 4)."""
    rng = np.random.default_rng(1)
    drawn = [sample(*size, rng) for _ in range(count)]
    return np.array([(y.start, x.start, y.stop - y.start, x.stop - x.start) for y, x in drawn])


def p_value(ours, theirs, size):
    """Chi-squared test of two samples of crops: of offsets and sides exactly, or of 8 ranges of each for large images."""
    coarse = np.maximum(np.array([*size, *size]) // 8, 1) if max(size) > 9 else 1
    both = np.concatenate([ours, theirs])
    ends = both[:, :2] + both[:, 2:] == size  # whether the crop touches the lower and the right edge
    _, cells = np.unique(np.column_stack([both // coarse, ends]), axis=0, return_inverse=True)
    counts = np.stack([np.bincount(part, minlength=cells.max() + 1) for part in np.split(cells, [len(ours)])])
    rare = counts.sum(axis=0) < 20
    counts = np.column_stack([counts[:, ~rare], counts[:, rare].sum(axis=1)])
    return chi2_contingency(counts[:, counts.any(axis=0)]).pvalue


SIZES = [(24, 36), (9, 5), (3, 40)]


@pytest.fixture(scope="module")
def official():
    """20,000 crops of each size by TensorFlow 2.21.0's `tf.image.sample_distorted_bounding_box`."""
    with np.load(GOLDEN / "crops" / "tensorflow.npz") as data:
        return {size: data["{}x{}".format(*size)].astype(int) for size in SIZES}


@pytest.mark.parametrize("size", SIZES)
def test_crops_are_distributed_as_tensorflows(official, size):
    assert p_value(crops(random_crop, size), official[size], size) > 0.01


def by_area(height, width, rng):
    """torchvision's rule: area and the logarithm of the ratio are uniform."""
    for _ in range(100):
        area, ratio = height * width * rng.uniform(0.05, 1), np.exp(rng.uniform(np.log(0.75), np.log(1.33)))
        h, w = round((area / ratio) ** 0.5), round((area * ratio) ** 0.5)
        if 0 < h <= height and 0 < w <= width:
            top, left = int(rng.integers(max(height - h, 1))), int(rng.integers(max(width - w, 1)))
            return slice(top, top + h), slice(left, left + w)
    return slice(0, height), slice(0, width)


def inclusive(height, width, rng):
    """With the last offsets, which TensorFlow never uses."""
    y, x = random_crop(height, width, rng)
    h, w = y.stop - y.start, x.stop - x.start
    top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
    return slice(top, top + h), slice(left, left + w)


def larger(height, width, rng):
    """The area of 0.08 that other recipes use."""
    return random_crop(height, width, rng, min_area=0.08)


@pytest.mark.parametrize("rule", [by_area, inclusive, larger])
def test_another_rule_for_crops_would_be_noticed(official, rule):
    assert p_value(crops(rule, (24, 36)), official[24, 36], (24, 36)) < 1e-6


def test_half_of_the_images_are_flipped():
    image = np.arange(2, dtype=np.uint8).reshape(1, 2, 1)
    rng, augmentation = np.random.default_rng(0), Augmentation(min_area=None)
    flipped = sum(int(augmentation.varied(image, (1, 2), rng)[0, 0, 0]) for _ in range(4000))
    assert binomtest(flipped, 4000).pvalue > 0.01


def test_a_varied_image_is_a_crop_resized(dataset):
    rng, again = np.random.default_rng(5), np.random.default_rng(5)
    for _ in range(20):
        varied = Augmentation(flip=False).varied(dataset.image(0), SIZE, rng)
        expected = squash(dataset.image(0)[random_crop(9, 12, again)], SIZE)
        assert np.array_equal(varied, expected)


def test_one_pixel_is_an_image():
    one = np.full((1, 1, 3), 7, np.uint8)
    assert (Augmentation(flip=False).varied(one, SIZE, np.random.default_rng(0)) == 7).all()


def test_mixup_mixes_images_and_labels_in_one_proportion(dataset):
    plain = batches_of(dataset, augmentation=PLAIN)[5]
    batch = batches_of(dataset, augmentation=replace(PLAIN, mixup=0.5))[5]
    one_hot = np.eye(3, dtype=np.float32)[plain.labels]
    difference = plain.images - plain.images[::-1]
    share = ((batch.images - plain.images[::-1]) * difference).sum() / (difference**2).sum()
    assert 0 < share < 1
    np.testing.assert_allclose(batch.images, share * plain.images + (1 - share) * plain.images[::-1], atol=1e-6)
    np.testing.assert_allclose(batch.labels, share * one_hot + (1 - share) * one_hot[::-1], atol=1e-6)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_of_randaugment_keep_the_shape_and_change_the_image(name, channels):
    rng = np.random.default_rng(3)
    pixels = rng.integers(20, 200, (56, 40, channels), np.uint8)
    image = Image.fromarray(pixels.squeeze(2) if channels == 1 else pixels)
    idle = {("Color", 1): (0.4, 1.5, 3.0), ("solarize", channels): (1.5, 3.0), ("posterize", channels): (3.0,)}

    def moved(left):
        return np.pad(pixels, ((0, 0), (0, left), (0, 0)), constant_values=128)[:, left:]

    expected = {
        "invert": lambda level: 255 - pixels,
        "solarize_add": lambda level: np.where(pixels < 128, np.minimum(pixels.astype(int) + int(110 * level), 255), pixels),
        "Brightness": lambda level: (pixels * (0.1 + 1.8 * level)).clip(0, 255).astype(np.uint8),
        "translate_x": lambda level: moved(round(level * 40 * 100 / 224)),
    }
    assert np.asarray(_operation(image.copy(), name, 0.0, 1, rng)).reshape(pixels.shape).dtype == np.uint8
    for level in (0.4, 1.5, 3.0):
        result = np.asarray(_operation(image.copy(), name, level, 1, rng)).reshape(pixels.shape)
        assert result.dtype == np.uint8
        assert np.array_equal(result, pixels) == (level in idle.get((name, channels), ()))
        if name in expected:
            assert np.abs(result.astype(int) - expected[name](level)).max() <= 1, level


def test_augmentation_is_checked():
    with pytest.raises(
        ValueError, match="min_area must be None or above 0 and at most 1, not 0; mixup must be at least 0, not -1"
    ):
        Augmentation(min_area=0, mixup=-1)
    with pytest.raises(ValueError, match="from 0 to 30, not 31; operations must be a whole number of at least 1, not 0.5"):
        Augmentation(randaugment=31, operations=0.5)


def remove(path):
    path.unlink()
    return path.parent


def refused(tmp_path):
    """A source that is refused, and what is said of it, by name."""
    pets = class_folders(tmp_path / "pets")
    yield "nothing", tmp_path / "absent", "absent: no such file or folder"
    picture(tmp_path / "flat" / "a.png")
    yield "no class folders", tmp_path / "flat", "flat: has no folders in it, and needs one for each class"
    yield "a file", tmp_path / "flat" / "a.png", "a.png: neither a folder nor a .csv or .tsv file"
    yield "one class", class_folders(tmp_path / "one", names=["cat"]), "one: has images of one class, and needs two or more"
    (class_folders(tmp_path / "empty") / "fox").mkdir()
    yield "an empty class", tmp_path / "empty", "empty: no images in the class folders fox: fill or remove them"
    twice = class_folders(tmp_path / "twice", names=["cat", "Cat", "dog"])
    yield "case", twice, "twice: class names that differ in case alone: Cat, cat: rename or merge them"
    yield "single images", class_folders(tmp_path / "few", each=1), "few: one image a class leaves none for validation"
    for part in ("train", "val", "extra"):
        class_folders(tmp_path / "unclear" / part)
    yield "parts", tmp_path / "unclear", "its folders are not clear (extra, train, val): leave train, and one each of val"
    class_folders(tmp_path / "more" / "train")
    class_folders(tmp_path / "more" / "test", names=["cat", "gnu"])
    yield (
        "a class in the test alone",
        tmp_path / "more",
        "1 class of the test images not among the classes to train on: gnu: leave it out, or add images to train on",
    )
    rows = [("cat/0.png", "a"), ("dog/0.png", "b"), ("cat/9.png", "a"), ("emu/1.png", "")]
    advice = ". each line is a path, relative to this file, and a label; a header names these columns path and label"
    yield "rows", table(pets / "x.csv", rows), "x.csv: line 5: no label; line 4: no file cat/9.png" + advice
    yield "no rows", table(pets / "y.csv", []), "y.csv: lists no images" + advice
    yield "repeated", table(pets / "z.csv", [*rows[:2], rows[0]]), "z.csv: cat/0.png is listed 2 times" + advice
    (pets / "c.csv").write_text("path,class\ncat/0.png,a\n")
    yield "a column", pets / "c.csv", "c.csv: no column label; its header is path, class"
    (pets / "d.tsv").write_text("cat/0.png,a\n")
    yield "a comma", pets / "d.tsv", "d.tsv: line 1: 1 columns, not 2" + advice
    (pets / "e.csv").write_bytes("cat/0.png,für\n".encode("latin1"))
    yield "an encoding", pets / "e.csv", "e.csv: is not a table in UTF-8"
    images = mnist(tmp_path / "unequal", labels=29)
    yield "labels", images, "unequal: 30 images and 29 labels in train: download them again"
    for ending in ("", ".gz"):
        cut = mnist(tmp_path / f"cut{ending}", ending=ending) / f"train-images-idx3-ubyte{ending}"
        content = cut.read_bytes()
        cut.write_bytes(content[:-50])
        yield f"a truncated file{ending}", cut.parent, f"train-images-idx3-ubyte{ending}: "
        cut.write_bytes(gzip.compress(b"\0\0\x08\3" + b"\xff" * 12) if ending else content[:4] + b"\xff" * 12 + content[16:])
        yield f"a false header{ending}", cut.parent, "its header says (4294967295, 4294967295, 4294967295), 79228"
        cut.write_bytes(b"<html>")
        yield f"no idx file{ending}", cut.parent, f"train-images-idx3-ubyte{ending}: "
    lonely = remove(mnist(tmp_path / "lonely") / "train-labels-idx1-ubyte")
    yield "no labels", lonely, "lonely: no file train-labels-idx1-ubyte or .gz"
    cifar(tmp_path / "gap")
    yield "a missing file", remove(tmp_path / "gap" / "data_batch_3.bin"), "CIFAR's files data_batch_3.bin are missing"
    cifar(tmp_path / "short")
    with open(tmp_path / "short" / "test_batch.bin", "ab") as file:
        file.write(b"x")
    yield "records", tmp_path / "short", "test_batch.bin: 122921 bytes are not records of 3073 bytes: download it again"


def test_what_is_not_clear_is_refused_in_one_line(tmp_path):
    for name, source, message in refused(tmp_path):
        with pytest.raises(CheckpointError) as caught:
            open_dataset(source)
        text = str(caught.value)
        assert message in text, name
        assert str(source) in text, name
        assert "\n" not in text, name


def test_labels_beyond_the_head_are_refused(folder, tmp_path):
    with pytest.raises(CheckpointError, match="1 class of the train images not among the classes of the head: emu"):
        open_dataset(folder, classes=["cat", "dog"])
    with pytest.raises(CheckpointError, match="several classes of the head are called dog: give each its own name"):
        open_dataset(folder, classes=["cat", "dog", "emu", "dog"])
    with pytest.raises(CheckpointError, match="label 2 is beyond the 2 classes of the head"):
        open_dataset(mnist(tmp_path / "mnist"), classes=["zero", "one"])


@pytest.mark.parametrize("names", [["data_batch_1", "batches.meta"], ["train", "test", "meta"]])
def test_pickles_are_refused_and_not_opened(tmp_path, names):
    class Planted:
        def __reduce__(self):
            return Path.touch, (tmp_path / "opened",)

    for name in names:
        (tmp_path / name).write_bytes(pickle.dumps(Planted()))
    with pytest.raises(CheckpointError, match="holds CIFAR as pickles, which can run any code .* download the binary version"):
        open_dataset(tmp_path)
    assert not (tmp_path / "opened").exists()


def test_grain_is_asked_for_by_the_name_of_the_extra(folder, dataset, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    for call in (lambda: batches_of(dataset), lambda: finetune(None, folder, tmp_path / "run", from_scratch="S/32")):
        with pytest.raises(ImportError, match=r"training needs grain: pip install 'mixer-jax\[train\]'"):
            call()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("threads", [1, 3, 7])
def test_batches_are_the_same_whatever_shares_of_them_the_threads_decode(dataset, threads):
    """Also where there are more threads than images in a batch."""
    wanted, batches = batches_of(dataset), batches_of(dataset, threads=threads)
    with contextlib.closing(batches.starting_at(3)) as stream:
        for k, batch in zip((3, 4, 5), stream):
            assert all(np.array_equal(a, b) for a, b in zip(vars(batch).values(), vars(wanted[k]).values(), strict=True))
    empty = EvaluationBatches(dataset=dataset, batch_size=4, image_size=SIZE, rows=np.arange(0), threads=threads)
    assert not any(batch.mask.any() for batch in empty)


def test_options_are_checked(folder, dataset):
    with pytest.raises(ValueError, match="validation must be above 0 and below 1, not 1"):
        open_dataset(folder, validation=1)
    with pytest.raises(ValueError, match="seed from 0 to"):
        batches_of(dataset, seed=-1)
