"""Accuracy where the right classes are known; and folders whose classes are not clear are refused, not guessed."""

import json
import sys

import colours
import numpy as np
import pytest
from command_line import process, run
from conftest import TINY, random_weights
from PIL import Image
from scipy.stats import binomtest

import convert
import mixer_jax
from convert import CheckpointError, MixerConfig
from mixer_jax import labels
from mixer_jax.commands import evaluate
from mixer_jax.evaluation import Accuracy, ClassResult, Evaluation
from mixer_jax.pictures.confusion import draw_confusion

NAMES = list(colours.COLOURS)
SYNSETS = {"red": "n01443537", "green": "n02510455", "blue": "n01440764"}  # classes 1, 388 and 0 of ImageNet-1k


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return colours.checkpoint(tmp_path_factory.mktemp("model") / "colours.npz")


def images(folder, each=3, names=None):
    """A folder for each class by colour, with `each` images of that colour."""
    for colour, name in (names or {name: name for name in NAMES}).items():
        (folder / name).mkdir(parents=True)
        for i in range(each):
            colours.plain(colour, (20 + i, 16)).save(folder / name / f"{i}.png")
    return folder


def command(capfd, *arguments, code=0):
    return run(capfd, "evaluate", *arguments, code=code)


def figures(capfd, *arguments):
    return json.loads(command(capfd, *arguments, "--json").out)


def evaluation(true, best, num_classes):
    """An evaluation of these true classes, and the best classes of each image, padded to five."""
    rows = [[*row, *(i for i in range(num_classes) if i not in row)][:5] for row in best]
    names = [f"class $ {i}" for i in range(num_classes)]
    return Evaluation(names, "squash", "label", np.array(true), np.array(rows), {})


def test_accuracy_is_what_was_planted(model, tmp_path):
    """As a process: 18 images, of which two lie in the wrong folder, and one of these has its class among the best five."""
    folder = images(tmp_path / "val")
    colours.plain("magenta").save(folder / "red" / "0.png")  # red comes second
    colours.plain("cyan").save(folder / "red" / "1.png")  # red comes last of six
    out, err = process("evaluate", model, folder, "--json", "--batch-size", "5")
    assert err == ""
    facts = json.loads(out)
    assert [facts["top1"][name] for name in ("correct", "images", "accuracy")] == [16, 18, 16 / 18]
    assert (facts["top5"]["correct"], facts["unreadable"]) == (17, 0)
    assert (facts["preprocessing"], facts["matched_by"]) == ("resmall_crop", "label")
    red, *others = facts["by_class"]
    assert ClassResult(**red) == ClassResult(0, "red", 3, 1, 2, "cyan", 1)
    assert all((row["top1"], row["images"], row["taken_for"]) == (3, 3, None) for row in others)
    assert facts["confusion"] == [[0, 0, 1], [0, 3, 1], [0, 4, 1], *([i, i, 3] for i in range(1, 6))]
    for either in colours.models(model):
        result = mixer_jax.evaluate(either, folder, batch_size=4)
        assert result.as_dict() == {name: facts[name] for name in result.as_dict()}
    with pytest.raises(TypeError, match="a model is needed"):
        mixer_jax.evaluate(str(model), folder)


def test_permuted_labels_drop_accuracy(model, tmp_path, capfd):
    folder, permuted = images(tmp_path / "val"), [NAMES[1], NAMES[0], *NAMES[2:]]
    (tmp_path / "labels.txt").write_text("\n".join(permuted))
    facts = figures(capfd, model, folder, "--labels", tmp_path / "labels.txt")
    assert facts["top1"]["correct"] == 12
    assert (facts["by_class"][0]["taken_for"], facts["by_class"][0]["taken_for_images"]) == ("red", 3)
    assert mixer_jax.evaluate(mixer_jax.load(model), folder, labels=permuted).top1.correct == 12


def test_text_has_a_row_for_each_class_and_intervals(model, tmp_path, capfd):
    folder = images(tmp_path / "val")
    colours.plain("cyan").save(folder / "red" / "1.png")
    out = command(capfd, model, folder).out
    assert "top-1  94.44 %  (95 % interval 74.24 to 99.01 %; 17 of 18 images)\ntop-5  94.44 %" in out
    assert "preprocessing resmall_crop; folders matched to classes by label" in out
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.split()}
    assert rows["red"] == ["3", "66.7", "%", "66.7", "%", "cyan", "(1)"]
    assert rows["blue"] == ["3", "100.0", "%", "100.0", "%"]
    assert "published" not in out


@pytest.mark.parametrize(("correct", "count"), [(0, 5), (8, 10), (5, 5), (38_220, 50_000), (1, 1)])
def test_the_interval_is_wilsons_and_not_the_normal_approximation(correct, count):
    accuracy, wanted = Accuracy.of(correct, count), binomtest(correct, count).proportion_ci(method="wilson")
    assert (accuracy.low, accuracy.high) == pytest.approx((wanted.low, wanted.high), abs=1e-12)  # measured: 1e-16
    normal = correct / count - 1.96 * np.sqrt(correct / count * (1 - correct / count) / count)
    assert count > 10_000 or abs(normal - accuracy.low) > 0.05 or correct == 0


def test_unreadable_images_count_neither_way(model, tmp_path, capfd):
    folder = images(tmp_path / "val")
    (folder / "red" / "0.png").write_bytes(b"")
    (folder / "red" / "notes.txt").write_text("no image, and not counted as one")
    result = command(capfd, model, folder, "--json", code=1)
    assert f"{folder / 'red' / '0.png'}: the file is empty\n" in result.err
    assert "error: 1 of 18 images could not be used, named above; they count neither way" in result.err
    facts = json.loads(result.out)
    assert (facts["top1"]["correct"], facts["top1"]["images"], facts["unreadable"]) == (17, 17, 1)


def test_folders_are_matched_by_label_in_sorted_order_or_by_synset(model, tmp_path, capfd):
    nameless = colours.checkpoint(tmp_path / "m.npz", labels=None)
    imagenet = colours.checkpoint(tmp_path / "1k.npz", labels=None, classes=1000, at=[1, 388, 0, 3, 4, 5])
    for file, names, matched_by, rows in (
        (model, {"yellow": "yellow", "green": "green"}, "label", [(1, "green"), (5, "yellow")]),
        (nameless, dict(zip(NAMES, "abcdef")), "sorted order", list(enumerate("abcdef"))),
        (imagenet, SYNSETS, "synset", [(0, "tench"), (1, "goldfish"), (388, "giant panda")]),
    ):
        facts = figures(capfd, file, images(tmp_path / matched_by, names=names))
        assert (facts["top1"]["accuracy"], facts["matched_by"]) == (1, matched_by)
        assert [(row["index"], row["name"]) for row in facts["by_class"]] == rows
    other = colours.checkpoint(tmp_path / "other.npz", labels=None, classes=1000, at=[0, 1, 2, 3, 4, 5])
    assert figures(capfd, other, tmp_path / "synset")["top1"]["correct"] == 0


def test_folders_of_very_many_classes_are_matched():
    names = [f"class {i}" for i in range(21_844)]
    for num_classes in labels.IMAGENETS:
        synsets = labels.imagenet_synsets(num_classes)
        by_synset = {name: i for i, name in enumerate(synsets)}
        assert evaluate.match_classes(synsets[::-1], num_classes, None, "val") == (by_synset, "synset")
    assert evaluate.match_classes(names, len(names), names, "val")[0] == {name: i for i, name in enumerate(names)}
    assert evaluate.match_classes([f"{i:02}" for i in range(12)], 12, None, "val")[0]["10"] == 10


@pytest.mark.parametrize(
    ("folders", "num_classes", "own", "message"),
    [
        (["a", "b"], 3, None, r"val: 2 class folders \(a, b\) for 3 classes: name them by label, or give --labels FILE, one"),
        (list("abcd"), 3, ["x", "y", "z"], r"4 class folders \(a, b, c, ...\) for 3 classes"),
        (["a", "b", "x"], 3, ["x", "y", "z"], "some folders are named like classes, these are not: a, b: rename or remove"),
        (["x"], 3, ["x", "y", "x"], "several classes are called x: give each its own name"),
        ([*map(str, range(12))], 12, None, r"numbers, whose order as text \(0, 1, 10, ...\) differs from .* \(0, 1, 2, ...\)"),
        (
            ["n01440764"],
            50,
            None,
            r"synsets .n01440764., which name the classes of ImageNet-1k .1000., .* and the model has 50 c",
        ),
        (["n04399382"], 21_843, None, "1 synsets are not in ImageNet-21k: n04399382: remove these folders"),
        (["n00004475"], 11_221, None, "1 synsets are not in ImageNet-21K-P: n00004475"),
        (["n01440764", "n99999999"], 1000, None, "1 synsets are not in ImageNet-1k: n99999999"),
    ],
)
def test_folders_whose_classes_are_not_clear_are_refused(folders, num_classes, own, message):
    with pytest.raises(CheckpointError, match=message):
        evaluate.match_classes(folders, num_classes, own, "val")


def test_what_cannot_be_evaluated_is_refused_before_the_model_is_loaded_where_possible(model, tmp_path, monkeypatch, capfd):
    def error(*arguments):
        return command(capfd, *arguments, code=1).err

    page, bare = tmp_path / "page.npz", tmp_path / "bare"
    page.write_text("<html>404</html>")
    (bare / "red").mkdir(parents=True)
    assert "no such folder" in error(page, tmp_path / "missing")
    assert "has no folders in it, and needs one for each class" in error(page, bare / "red")
    assert "no images in its 1 folders" in error(page, bare)
    assert "a picture ends in .png, .pdf or .svg" in error(page, bare, "--confusion", tmp_path / "c.gif")
    (bare / "red" / "a.png").write_bytes(b"")
    assert "none of its 1 images could be used, such as " in error(model, bare)
    convert.write(tmp_path / "body.npz", convert.Checkpoint.from_arrays(colours.weights()).without_head())
    assert "has no head, so no classes to evaluate" in error(tmp_path / "body.npz", bare)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    message = "error: drawing needs Matplotlib: pip install 'mixer-jax[images]'\n"
    assert error(page, bare, "--confusion", tmp_path / "c.png") == message


def test_the_confusion_picture_is_written_once(model, tmp_path, capfd):
    folder, target = images(tmp_path / "val", each=1), tmp_path / "confusion.png"
    command(capfd, model, folder, "--confusion", target)
    with Image.open(target) as picture:
        assert min(picture.size) > 400
    assert "exists already" in command(capfd, model, folder, "--confusion", target, code=1).err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["confusion.png", "val"]
    command(capfd, model, folder, "--confusion", target, "--force")


def test_the_picture_is_drawn_from_the_same_counts():
    """Fractions by row, over the classes that occur: a transposed matrix would show others."""
    result = evaluation([2, 2, 2, 2, 7], [[2], [7], [7], [7], [7]], 9)
    axes, bar = draw_confusion(result, title="m.npz").axes
    assert np.array_equal(axes.images[0].get_array(), [[0.25, 0.75], [0, 1]])
    assert axes.images[0].origin == "upper"  # the first row is at the top
    assert axes.get_title() == "m.npz: 40.0 % of 5 images right, 2 classes"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted class", "true class")
    assert [text.get_text() for text in axes.get_yticklabels()] == ["class $ 2", "class $ 7"]
    assert bar.get_ylabel() == "of the images of the true class"
    many = draw_confusion(evaluation(range(70), [[i] for i in range(70)], 100)).axes[0]
    assert np.array_equal(many.images[0].get_array(), np.eye(70))


def test_figures_of_imagenet_21k_need_no_matrix_of_all_pairs_of_classes():
    """Which would take 3.8 GB."""
    true = np.arange(0, 21_843, 211)
    result = evaluation(true, [[i // 2] for i in true.tolist()], 21_843)
    assert len(result.by_class) == 104
    assert result.by_class[1] == ClassResult(211, "class $ 211", 1, 0, 0, "class $ 105", 1)
    occurring, fractions = result.confusion_fractions(50)
    assert len(occurring) > fractions.shape[0] == fractions.shape[1] == 50
    assert np.allclose(fractions.sum(axis=1)[fractions.any(axis=1)], 1)


def test_counts_are_those_of_a_matrix_of_all_pairs():
    random, classes = np.random.default_rng(0), 9
    true, matrix = random.integers(0, classes, 300), np.zeros((classes, classes), int)
    best = np.array([random.permutation(classes)[:5] for _ in true])
    np.add.at(matrix, (true, best[:, 0]), 1)
    result = evaluation(true, best.tolist(), classes)
    assert (result.top1.correct, result.top5.correct) == (matrix.trace(), (best == true[:, None]).sum())
    assert {pair: int(matrix[pair]) for pair in zip(*(i.tolist() for i in matrix.nonzero()))} == dict(result.confusion)
    fractions = result.confusion_fractions(99)[1]
    np.testing.assert_array_equal(fractions, matrix / matrix.sum(axis=1, keepdims=True))
    for row, counts in zip(result.by_class, matrix):
        assert (row.images, row.top1) == (counts.sum(), counts[row.index])
        assert row.top5 == (best[true == row.index] == row.index).sum()
        counts[row.index] = 0
        assert (row.taken_for, row.taken_for_images) == (f"class $ {counts.argmax()}", counts.max())


def test_published_accuracy_stands_beside_a_file_of_that_size():
    def lines(source, variant, classes, matched_by="synset"):
        return "\n".join(evaluate.published_accuracy(source, MixerConfig.named(variant, num_classes=classes), matched_by))

    known = lines("my.npz", "B/16", 1000)
    assert "its sizes are those of imagenet1k/Mixer-B_16, top-1 76.44 % on ImageNet's 50,000 validation images" in known
    assert "prepared by resmall_crop" in known
    assert "they are also those of gsam/Mixer-B_16, whose accuracy is not known" in known
    assert (
        "sam/Mixer-B_16, top-1 77.36 % on ImageNet's 50,000 validation images, prepared by resmall_crop (Google does" in known
    )
    assert "timm/mixer_b16_224_miil-9229a591, top-1 82.314 %" in known
    assert known.count("prepared by timm_bilinear") == 1
    named = lines("imagenet1k/Mixer-L_16", "L/16", 1000)
    assert named.startswith("published: this file is imagenet1k/Mixer-L_16, top-1 71.76 %")
    assert "also" not in named
    hub = "hf:timm/mixer_b16_224.goog_in21k_ft_in1k"
    assert f"this file is {hub}, top-1 76.6 %" in lines(hub, "B/16", 1000)
    assert lines("my.npz", "B/16", 10) == lines("my.npz", "S/16", 1000) == lines("my.npz", "B/16", 21_843) == ""
    assert "these folders are not ImageNet's" in lines("my.npz", "B/16", 1000, "label")


def test_exif_is_ignored_as_in_published_evaluations_unless_asked_for(model, tmp_path, capfd, monkeypatch):
    folder, values, real = images(tmp_path / "val", each=1), [], evaluate.run_on_rows
    recording = lambda *a, **options: values.append(options["use_exif"]) or real(*a, **options)  # noqa: E731
    monkeypatch.setattr(evaluate, "run_on_rows", recording)
    for option in ([], ["--exif"]):
        command(capfd, model, folder, *option)
    assert values == [False, True]


def test_five_classes_or_fewer_have_no_top_5(tmp_path, capfd):
    np.savez(tmp_path / "five.npz", **random_weights(TINY))
    arguments = (tmp_path / "five.npz", images(tmp_path / "val", each=1, names=dict(zip(NAMES[:5], "abcde"))))
    assert figures(capfd, *arguments, "--image-size", "8x15")["top5"] is None
    assert "top-5  " not in command(capfd, *arguments, "--image-size", "8x15").out
