"""Accuracy by ReaL labels: several right classes an image, or none; found by the number in the image's name."""

import json

import colours
import numpy as np
import pytest
from command_line import process, run

import mixer_jax
from convert import CheckpointError
from mixer_jax.commands import real_labels
from mixer_jax.evaluation import Accuracy, Evaluation

SYNSETS = {"red": "n01443537", "green": "n02510455", "blue": "n01440764"}  # classes 1, 388 and 0 of ImageNet-1k
IMAGES = {1: "red", 2: "green", 50_000: "blue", 4: "red", 5: "green"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return colours.checkpoint(tmp_path_factory.mktemp("model") / "1k.npz", labels=None, classes=1000, at=[1, 388, 0, 3, 4, 5])


@pytest.fixture
def folder(tmp_path):
    """Five validation images, one of which lies in a wrong folder: the blue one in that of red."""
    for number, colour in IMAGES.items():
        path = tmp_path / "val" / SYNSETS["red" if colour == "blue" else colour] / f"ILSVRC2012_val_{number:08}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        colours.plain(colour).save(path)
    return tmp_path / "val"


def real(path, entries, length=50_000):
    """A real.json with these entries by number; every other image has the label 999."""
    path.write_text(json.dumps([entries.get(number, [999]) for number in range(1, length + 1)]))
    return path


ENTRIES = {1: [7, 1], 2: [7, 999], 50_000: [0], 4: [], 5: [388]}  # right, wrong, right, not counted, right


def command(capfd, *arguments, code=0):
    return run(capfd, "evaluate", *arguments, code=code)


def test_real_accuracy_is_what_was_planted(model, folder, tmp_path):
    """As a process, and by each model: the misplaced image is right by ReaL, and one that its folder calls right is wrong."""
    file = real(tmp_path / "real.json", ENTRIES)
    facts = json.loads(process("evaluate", model, folder, "--real", file, "--json", "--batch-size", "2")[0])
    assert [facts["top1"][name] for name in ("correct", "images")] == [4, 5]
    wanted = Accuracy.of(3, 4)
    assert Accuracy(**facts["real"]) == wanted
    for either in colours.models(model):
        assert mixer_jax.evaluate(either, folder, real=file).real == wanted
    assert mixer_jax.evaluate(either, folder).real is None


def test_text_has_the_interval_and_what_was_left_out(model, folder, tmp_path, capfd):
    out = command(capfd, model, folder, "--real", real(tmp_path / "real.json", ENTRIES)).out
    assert "top-1  80.00 %  (95 % interval 37.55 to 96.38 %; 4 of 5 images)\n" in out
    assert "ReaL   75.00 %  (95 % interval 30.06 to 95.44 %; 3 of 4 images; 1 without a ReaL label left out)\n" in out
    assert "ReaL" not in command(capfd, model, folder).out


def test_labels_stay_with_their_images_where_some_cannot_be_read(model, folder, tmp_path, capfd):
    (folder / SYNSETS["red"] / "ILSVRC2012_val_00000001.JPEG").write_bytes(b"")
    facts = json.loads(command(capfd, model, folder, "--real", real(tmp_path / "real.json", ENTRIES), "--json", code=1).out)
    assert [facts["real"][name] for name in ("correct", "images")] == [2, 3]
    only_unread = real(tmp_path / "one.json", {number: [] for number in IMAGES} | {1: [1]})
    assert json.loads(command(capfd, model, folder, "--real", only_unread, "--json", code=1).out)["real"] is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<html>404</html>", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[" + "9" * 5000 + "]", "is not JSON"),
        (b"\xff\xfe\xff", "is not JSON"),
        (" " * (8 << 20) + "[]", "has more than 8 MiB, too many for ReaL labels"),
        ('{"1": [0]}', "has a dict where ReaL labels are a list of 50,000"),
        (json.dumps([[0]] * 49_999), "has 49999 entries where ReaL labels are a list of 50,000, one entry for each"),
        (json.dumps([[0]] * 49_999 + [[1000]]), "entry 50000 is no list of classes from 0 to 999: .1000.: give the real.json"),
        (json.dumps([[-1]] + [[0]] * 49_999), "entry 1 is no list of classes"),
        (json.dumps([[0], 3] + [[0]] * 49_998), "entry 2 is no list of classes from 0 to 999: 3"),
        (json.dumps([[True]] + [[0]] * 49_999), "entry 1 is no list"),
        (json.dumps([[0.0]] + [[0]] * 49_999), "entry 1 is no list"),
        (json.dumps([["0"]] + [[0]] * 49_999), "entry 1 is no list"),
    ],
    ids=lambda value: value[:12] if isinstance(value, str) else None,
)
def test_other_files_than_real_json_are_refused(text, message, tmp_path):
    (tmp_path / "real.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CheckpointError, match=f"real.json: {message}") as caught:
        real_labels.real_labels(tmp_path / "real.json", ["ILSVRC2012_val_00000001.JPEG"])
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "name",
    ["cat.jpg", "ILSVRC2012_val_00000000.JPEG", "ILSVRC2012_val_00050001.JPEG", "ILSVRC2012_val_1.JPEG", "val_00000001.png"],
)
def test_images_without_a_validation_number_are_refused(name, tmp_path):
    file = real(tmp_path / "real.json", {})
    message = f"folder/{name}: ReaL labels go by the number in a file name, .* and 1 of 2 images are not called so"
    with pytest.raises(CheckpointError, match=message):
        real_labels.real_labels(file, ["folder/ILSVRC2012_val_00000001.JPEG", f"folder/{name}"])


def test_what_cannot_be_counted_is_refused_before_the_model_is_loaded(folder, tmp_path, capfd):
    page, empty = tmp_path / "page.npz", real(tmp_path / "empty.json", {number: [] for number in IMAGES})
    page.write_text("<html>404</html>")
    for file, message in (
        (tmp_path / "missing.json", "No such file"),
        (real(tmp_path / "short.json", {}, 10), "has 10 entries"),
        (empty, "has no label for any of the 5 images: give more images, or leave out --real"),
    ):
        assert message in command(capfd, page, folder, "--real", file, code=1).err


def test_real_labels_are_of_imagenet_1k_alone(model, folder, tmp_path, capfd):
    """Of other classes, and of 1000 classes in another order or under other names, they say nothing."""
    file = real(tmp_path / "real.json", ENTRIES)
    large = colours.checkpoint(tmp_path / "21k.npz", labels=None, classes=21_843)
    err = command(capfd, large, folder, "--real", file, code=1).err
    assert err == "error: ReaL labels are for the 1000 classes of ImageNet-1k, and the model has 21843\n"
    synsets = list(mixer_jax.labels.imagenet_synsets())
    (tmp_path / "synsets.txt").write_text("\n".join(synsets))
    arguments = (model, folder, "--real", file, "--json", "--labels")
    assert json.loads(command(capfd, *arguments, tmp_path / "synsets.txt").out)["real"]["correct"] == 3
    (tmp_path / "reversed.txt").write_text("\n".join(synsets[::-1]))
    err = command(capfd, *arguments, tmp_path / "reversed.txt", code=1).err
    assert "ReaL labels need folders called by synset, such as n01440764, and 2 are not, such as n01443537" in err
    for synset, name in (("n01443537", "goldfish"), ("n02510455", "giant panda")):
        (folder / synset).rename(folder / name)
    err = command(capfd, model, folder, "--real", file, code=1).err
    assert "2 are not, such as giant panda: rename them, or leave out --real" in err


def test_real_counts_are_those_of_the_published_example():
    random = np.random.default_rng(0)
    best = np.array([random.permutation(9)[:5] for _ in range(200)])
    labels = [random.choice(9, random.integers(0, 4), replace=False).tolist() for _ in best]
    result = Evaluation([str(i) for i in range(9)], "squash", "synset", best[:, 1], best, {}, labels)
    right = [row[0] in classes for row, classes in zip(best, labels) if classes]
    assert (result.real.correct, result.real.images, result.real.accuracy) == (sum(right), len(right), np.mean(right))
