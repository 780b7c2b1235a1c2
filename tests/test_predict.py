"""Photographs in, classes out, whatever lies among them: as a function and as the command."""

import io
import json
import os
import sys
import threading
from pathlib import Path

import colours
import numpy as np
import pytest
from command_line import process, run
from conftest import GOLDENS, TINY, random_weights
from PIL import Image

import convert
import mixer_jax
from mixer_jax import images
from mixer_jax.commands import predict

NAMES = list(colours.COLOURS)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return colours.checkpoint(tmp_path_factory.mktemp("model") / "colours.npz")


@pytest.fixture
def folder(tmp_path):
    """One image of each colour, named after it."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name in NAMES:
        colours.plain(name).save(folder / f"{name}.png")
    return folder


def command(capfd, *arguments, code=0):
    return run(capfd, "predict", *arguments, code=code)


def as_json(text):
    return [json.loads(line) for line in text.splitlines()]


def best(text):
    """The best class of every image in the lines of --json."""
    return {Path(line["image"]).stem: line["top"][0]["label"] for line in as_json(text) if "top" in line}


def best_classes(capfd, *arguments):
    return best(command(capfd, *arguments, "--json").out)


def test_a_folder_gives_every_image_its_colour_in_sorted_order(model, folder):
    """As a process: nothing on standard error when it is no terminal, and every class is known."""
    out, err = process("predict", model, folder, "--json", "--batch-size", "4")
    assert list(best(out).items()) == [(name, name) for name in sorted(NAMES)]
    assert err == ""


def test_channels_in_another_order_are_caught(folder, capfd):
    arrays = colours.weights()
    arrays["stem/kernel"] = arrays["stem/kernel"][:, :, ::-1]
    convert.write(folder / "swapped.npz", convert.Checkpoint.from_arrays(arrays, metadata={"labels": NAMES}))
    swapped = best_classes(capfd, folder / "swapped.npz", folder)
    assert (swapped["red"], swapped["blue"], swapped["green"]) == ("blue", "red", "green")


def test_text_shows_scores_and_logits_and_says_once_what_scores_are(model, folder, capfd):
    out = command(capfd, model, folder / "red.png", folder / "blue.png", "--top", 2).out
    lines = out.splitlines()
    assert lines[::3][:2] == [f"{folder / 'red.png'}", f"{folder / 'blue.png'}"]
    assert lines[1].split() == ["49.5", "%", "logit", "1.732", "0", "red"]
    assert out.count("softmax scores, not calibrated probabilities") == 1
    assert "ImageNet" not in out


def test_predict_is_a_function_of_a_model_of_either_framework(model, folder, tmp_path):
    """Logits are the model's own for what `prepare` makes, and scores their softmax."""
    flax, *others = colours.models(model)
    logits = np.asarray(flax(mixer_jax.prepare([folder / f"{name}.png" for name in sorted(NAMES)], flax)), np.float64)
    for either in (flax, *others):
        predictions = list(mixer_jax.predict(either, folder, top=99, batch_size=4))
        assert [Path(prediction.path).stem for prediction in predictions] == sorted(NAMES)
        for row, prediction in zip(logits, predictions):
            order = [best.index for best in prediction.top]
            assert sorted(order) == list(range(6))
            assert prediction.top == tuple(sorted(prediction.top, key=lambda best: -best.logit))
            assert [best.label for best in prediction.top] == [NAMES[i] for i in order]
            scores = np.exp(row) / np.exp(row).sum()
            np.testing.assert_allclose([best.logit for best in prediction.top], row[order], atol=2e-6)  # measured: 1e-6
            np.testing.assert_allclose([best.score for best in prediction.top], scores[order], atol=2e-6)
    (tmp_path / "none").mkdir()
    images = [folder / "red.png", tmp_path / "no.png", tmp_path / "none"]
    used, missing, empty = mixer_jax.predict(flax, images, preprocessing="squash", labels="abcdef", top=1)
    assert [(best.index, best.label) for best in used.top] == [(0, "a")]
    assert (missing.error, missing.top) == ("no such file", ())
    assert empty.error.startswith("a folder without images")
    with pytest.raises(TypeError, match="a model is needed, such as mixer_jax.load"):
        mixer_jax.predict(str(model), folder)
    for options, message in (({"preprocessing": "crop"}, "no preprocessing 'crop'"), ({"labels": "ab"}, "2 labels for 6 cl")):
        with pytest.raises(ValueError, match=message):
            mixer_jax.predict(flax, folder, **options)
    for torch_model in others:
        with pytest.raises(ValueError, match="the PyTorch model is in training mode: call model.eval.. first"):
            mixer_jax.predict(torch_model.train(), folder)


def test_batches_of_any_size_give_the_same_and_compile_one_shape(model, folder):
    forward, usual = images.forward_of(mixer_jax.load(model))
    paths, shapes, logits = [str(folder / f"{name}.png") for name in NAMES], set(), {}
    for size in (1, 4, 6, 50):
        shapes.clear()
        recording = lambda batch: shapes.add(batch.shape) or forward(batch)  # noqa: E731
        results = images.run_on_images(recording, colours.CONFIG, paths, ["squash"], batch_size=size, threads=2)
        logits[size] = [result.logits[0] for result in results]
        assert shapes == {(size, 8, 8, 3)}
        np.testing.assert_allclose(logits[size], logits[1], atol=1e-6)  # measured: 0
        assert np.argmax(logits[size], axis=1).tolist() == list(range(6))
    assert usual == 8


def test_decoding_goes_on_while_the_model_computes(folder, monkeypatch):
    """The computation of the first batch waits for an image of the second to be decoded, which none would be otherwise."""
    event, real = threading.Event(), images.decoded

    def noticing(path, **options):
        if path.endswith("yellow.png"):
            event.set()
        return real(path, **options)

    def forward(batch):
        assert event.wait(timeout=300)
        return np.zeros((len(batch), 3)), np.zeros((len(batch), 6))

    paths = [str(folder / f"{name}.png") for name in (*NAMES[:3], "yellow")]
    monkeypatch.setattr(images, "decoded", noticing)
    assert len(list(images.run_on_images(forward, colours.CONFIG, paths, ["squash"], batch_size=2, threads=1))) == 4


def test_results_wait_in_order_and_never_more_than_asked_for():
    done = []
    for taken, value in enumerate(images.decode_ahead(lambda i: done.append(i) or i, range(100), threads=3, count=5)):
        assert value == taken
        assert len(done) - taken <= 6
    assert sorted(done) == list(range(100))


def test_an_error_in_a_thread_is_raised_and_the_rest_is_not_begun():
    begun = []
    with pytest.raises(ZeroDivisionError):
        list(images.decode_ahead(lambda i: begun.append(i) or 1 / (i - 3), range(1000), threads=2, count=4))
    assert len(begun) < 12


def test_folders_are_searched_to_the_bottom_without_hidden_and_other_files(tmp_path):
    for name in ("b/2.JPG", "b/1.png", "a/z.webp", "top.gif", "b/.hidden.png", ".git/x.png", "b/notes.txt", "b/c.pdf"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    paths = [os.path.relpath(path, tmp_path) for path in images.images_in(tmp_path)]
    assert paths == ["top.gif", "a/z.webp", "b/1.png", "b/2.JPG"]


def test_a_folder_that_cannot_be_listed_is_named(folder, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", path)

    (folder / "closed").mkdir()
    real = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: (refuse if os.fspath(path).endswith("closed") else real)(path))
    paths = images.images_in(folder)
    assert (len(paths), paths[-1]) == (7, str(folder / "closed"))


def test_standard_input_lists_images_by_line_or_by_nul(model, folder, monkeypatch, capfd):
    names = [os.fsencode(folder / f"{name}.png") for name in ("blue", "red")]
    out, _ = process("predict", model, "-", "--json", input=b"\n".join(names) + b"\n")
    assert list(best(out)) == ["blue", "red"]
    for listed in (b"\n".join(names) + b"\n", b"\r\n".join(names), b"\0".join(names) + b"\0"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(listed)))
        assert images.find_images(["-"]) == ([*map(os.fsdecode, names)], [])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n")))
    assert command(capfd, model, "-", code=1).err == "error: no images: standard input lists none\n"


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM"])
def test_an_image_on_standard_input_is_not_a_list(model, format, monkeypatch, capfd):
    image = io.BytesIO()
    colours.plain("red").save(image, format)
    image.seek(0)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(image))
    message = "error: -: standard input must list the names of images, and holds an image: give its name\n"
    assert command(capfd, model, "-", code=1).err == message


def test_a_missing_image_is_reported_before_the_model_is_loaded(folder, tmp_path, capfd):
    page = tmp_path / "page.npz"
    page.write_text("<html>404</html>")
    err = command(capfd, page, tmp_path / "no.png", tmp_path / "none.png", code=1).err
    missing = f"{tmp_path / 'no.png'}: no such file\n{tmp_path / 'none.png'}: no such file\n"
    assert err == missing + "error: 2 of 2 could not be used, named above\n"
    err = command(capfd, page, folder / "red.png", tmp_path / "no.png", code=1).err
    assert err.startswith(f"{tmp_path / 'no.png'}: no such file\nerror: {page}: a web page")


def test_names_of_files_need_not_be_utf_8(model, folder):
    """In JSON they can be had back, in text they are shown."""
    name = os.path.join(os.fsencode(folder), b"caf\xe9.png")
    Path(os.fsdecode(name)).write_bytes((folder / "red.png").read_bytes())
    (line,) = as_json(process("predict", model, "-", "--json", input=name)[0])
    assert os.fsencode(line["image"]) == name
    assert line["top"][0]["label"] == "red"
    out, err = process("predict", model, name, folder / os.fsdecode(b"\xff.png"), code=1)
    assert out.startswith(f"{folder}/caf\\udce9.png\n")
    assert f"{folder}/\\udcff.png: no such file\n" in err


def test_unreadable_images_are_named_and_counted_and_the_others_come_out(model, folder, tmp_path, capfd):
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.png").write_text("this is no image")
    Image.new("1", (20_000, 20_000)).save(folder / "bomb.png")
    missing, nothing = tmp_path / "missing.jpg", tmp_path / "nothing"
    nothing.mkdir()
    result = command(capfd, model, folder, missing, nothing, "--json", code=1)
    assert best(result.out) == {name: name for name in NAMES}
    errors = {line["image"]: line["error"] for line in as_json(result.out) if "error" in line}
    for path, message in {
        folder / "empty.jpg": "the file is empty",
        folder / "text.png": "no image in a format that Pillow knows",
        folder / "bomb.png": "cannot be read: Image size (400000000 pixels) exceeds limit",
        missing: "no such file",
        nothing: "a folder without images (files that end in .jpg, .png, ...)",
    }.items():
        assert errors.pop(str(path)).startswith(message)
        assert f"{path}: {message}" in result.err
    assert not errors
    assert result.err.endswith("error: 5 of 11 could not be used, named above\n")
    out, err = process("predict", model, folder / "empty.jpg", code=1)
    assert (out, err) == ("", f"{folder / 'empty.jpg'}: the file is empty\nerror: 1 of 1 could not be used, named above\n")


def test_features_are_those_of_the_model_in_the_order_of_images(model, folder, tmp_path, capfd):
    """An empty and a missing image keep their rows."""
    (folder / "green2.png").write_bytes(b"")
    paths = [folder / "red.png", folder / "green2.png", tmp_path / "no.png", folder / "blue.png"]
    result = command(capfd, model, *paths, "--features", tmp_path / "f.npy", "--batch-size", 3, "--json", code=1)
    rows = np.load(tmp_path / "f.npy", allow_pickle=False)
    assert (rows.shape, rows.dtype) == ((4, 3), np.float32)
    loaded = mixer_jax.load(model)
    features = np.asarray(loaded.features(mixer_jax.prepare([paths[0], paths[3]], loaded)))
    assert np.isnan(rows[1:3]).all()
    np.testing.assert_allclose(rows[[0, 3]], features, atol=1e-6)  # measured: 1.2e-7
    assert abs(rows[0] - rows[3]).max() > 1  # so that a wrong order would be noticed
    assert result.err.count("no.png: no such file") == 1
    assert [line["image"] for line in as_json(result.out)] == [str(paths[i]) for i in (2, 0, 1, 3)]


def test_features_appear_whole_or_not_at_all(model, folder, tmp_path, monkeypatch, capfd):
    def failing(*_):
        raise OSError("the disk went away")

    target = tmp_path / "out" / "f.npy"
    target.parent.mkdir()
    arguments = (model, folder, "--features", target)
    with monkeypatch.context() as patch:
        patch.setattr(predict, "_best_scores", failing)
        assert "error: the disk went away" in command(capfd, *arguments, code=1).err
    assert list(target.parent.iterdir()) == []
    command(capfd, *arguments)
    before = target.read_bytes()
    assert "exists already (replace it with --force" in command(capfd, *arguments, code=1).err
    assert target.read_bytes() == before
    command(capfd, model, folder / "red.png", "--features", target, "--force")
    assert np.load(target).shape == (1, 3)
    wrong = command(capfd, model, folder, "--features", tmp_path / "f.npz", code=1).err
    assert "features are written as .npy: give a name with that ending" in wrong


def test_a_file_without_a_head_gives_features_and_no_classes(folder, tmp_path, capfd):
    convert.write(tmp_path / "body.npz", convert.Checkpoint.from_arrays(colours.weights()).without_head())
    features = (tmp_path / "body.npz", folder, "--features", tmp_path / "f.npy")
    for arguments in (features[:2], (*features, "--top", "3")):
        err = command(capfd, *arguments, code=1).err
        assert "has no head, so no classes: ask for --features OUT.npy, without --top and --labels" in err
    assert not (tmp_path / "f.npy").exists()
    assert command(capfd, *features).out == ""
    assert np.load(tmp_path / "f.npy").shape == (6, 3)
    (prediction,) = mixer_jax.predict(mixer_jax.load(tmp_path / "body.npz"), folder / "red.png")
    assert (prediction.top, prediction.features.shape) == ((), (3,))


def test_against_shows_pixels_logits_and_whether_the_best_class_changes(model, tmp_path, capfd):
    """The middle of this image is red and its sides are blue: cropping keeps the one, squashing both."""
    colours.split("red", "blue").save(tmp_path / "changes.png")
    colours.plain("green", (9, 9)).save(tmp_path / "stays.png")
    arguments = (model, tmp_path / "changes.png", tmp_path / "stays.png", "--against", "squash")
    changes, stays = as_json(command(capfd, *arguments, "--json").out)
    assert (changes["changed"], stays["changed"]) == (True, False)
    assert {name: top[0]["label"] for name, top in changes["top"].items()} == {"resmall_crop": "red", "squash": "blue"}
    assert changes["pixels"]["max"] == 255
    assert (stays["pixels"], stays["logits"]) == ({"mean": 0, "max": 0}, {"max": 0})
    inputs = [mixer_jax.prepare(tmp_path / "changes.png", colours.CONFIG, name) for name in ("resmall_crop", "squash")]
    logits = np.asarray(mixer_jax.load(model)(np.stack(inputs)), np.float64)
    assert changes["logits"]["max"] == pytest.approx(abs(logits[0] - logits[1]).max(), abs=1e-6)  # measured: 0
    assert changes["pixels"]["mean"] == pytest.approx(127.5 * abs(inputs[0] - inputs[1]).mean(), rel=1e-6)

    text = command(capfd, *arguments).out
    assert "of 255; logits by 0.000 at most; the best class stays" in text
    assert "the best class CHANGES" in text
    assert "squash instead of resmall_crop changes the best class of 1 of 2 images" in text
    assert "ranges" not in text
    other = command(capfd, model, tmp_path / "stays.png", "--preprocess", "timm_bilinear", "--against", "squash").out
    assert "the model's input ranges differ as well: 0 to 1 against -1 to 1" in other


def test_preprocessing_is_the_files_own_unless_another_is_given(model, tmp_path, capfd):
    colours.split("red", "blue").save(tmp_path / "split.png")
    assert best_classes(capfd, model, tmp_path / "split.png") == {"split": "red"}
    assert best_classes(capfd, model, tmp_path / "split.png", "--preprocess", "squash") == {"split": "blue"}
    np.savez(tmp_path / "reference.npz", **convert.read(model).to("reference").as_numpy())
    err = command(capfd, tmp_path / "reference.npz", tmp_path / "split.png", code=1).err
    assert "names no preprocessing: choose one with --preprocess, of resmall_crop, resize_crop, squash" in err


def test_images_are_rotated_by_exif_unless_it_is_ignored(model, tmp_path, monkeypatch, capfd):
    exif, path, loaded = Image.Exif(), tmp_path / "turned.png", mixer_jax.load(model)
    exif[0x0112] = 6
    image = colours.split("red", "blue").resize((96, 192))  # stored on its side: the crop of either is its middle
    image.paste(colours.COLOURS["green"], (0, 0, 96, 60))
    image.save(path, exif=exif)
    features = [next(mixer_jax.predict(loaded, path, use_exif=use)).features for use in (True, False)]
    batch = np.stack([mixer_jax.prepare(path, loaded, use_exif=use) for use in (True, False)])
    np.testing.assert_allclose(features, loaded.features(batch), atol=1e-6)  # measured: 0
    assert abs(features[0] - features[1]).max() > 1e-4  # measured: 7.5e-4
    for options, row in (([], 0), (["--exif"], 0), (["--no-exif"], 1)):
        command(capfd, model, path, "--features", tmp_path / "f.npy", "--force", *options)
        np.testing.assert_allclose(np.load(tmp_path / "f.npy")[0], features[row], atol=1e-6)  # measured: 0


def test_labels_come_from_a_file_the_checkpoint_or_imagenet(model, folder, tmp_path, capfd):
    (tmp_path / "labels.txt").write_bytes("\ufeffrot\r\n grün \r\nblau\ntürkis\nlila\ngelb".encode())
    assert best_classes(capfd, model, folder / "green.png", "--labels", tmp_path / "labels.txt") == {"green": "grün"}
    imagenet = colours.checkpoint(tmp_path / "1k.npz", labels=None, classes=1000, at=[1, 388, 2, 3, 4, 5])
    labels = best_classes(capfd, imagenet, folder / "red.png", folder / "green.png")
    assert labels == {"red": "goldfish", "green": "giant panda"}
    for classes, name in ((21_843, "safe house"), (11_221, "loofah, vegetable sponge, Luffa cylindrica")):
        large = colours.checkpoint(tmp_path / f"{classes}.npz", labels=None, classes=classes, at=[10_000, 1, 2, 3, 4, 5])
        assert best_classes(capfd, large, folder / "red.png") == {"red": name}
    other = colours.checkpoint(tmp_path / "other.npz", labels=None, classes=21_841, at=[21_840, 1, 2, 3, 4, 5])
    out = command(capfd, other, folder / "red.png").out
    assert out.splitlines()[1].split() == ["49.5", "%", "logit", "1.732", "21840"]
    assert "this file has no labels, so classes are numbers: --labels FILE names them, one a line" in out


def test_logits_of_nan_are_an_error_of_their_image(folder, tmp_path, capfd):
    np.savez(tmp_path / "nan.npz", **colours.weights() | {"head/bias": np.full(6, np.nan, np.float32)})
    assert "NaN" in command(capfd, tmp_path / "nan.npz", folder / "red.png", code=1).err
    err = command(capfd, tmp_path / "nan.npz", folder / "red.png", "--allow-nonfinite", code=1).err
    assert f"{folder / 'red.png'}: the model gives NaN or infinity for it\n" in err


def test_models_that_no_image_fits_are_refused(folder, tmp_path, capfd):
    np.savez(tmp_path / "two.npz", **random_weights(TINY.replace(in_channels=2)))
    err = command(capfd, tmp_path / "two.npz", folder, "--image-size", "8x15", code=1).err
    assert "the model takes 2 channels, and images have 3 or 1" in err
    np.savez(tmp_path / "double.npz", **{name: array.astype(np.float64) for name, array in colours.weights().items()})
    err = command(capfd, tmp_path / "double.npz", folder, "--dtype", "float64", code=1).err
    assert "images are float32, so the weights must not be float64: use --dtype float32" in err
    assert command(capfd, tmp_path / "double.npz", folder, "--dtype", "float32").out


def test_a_rectangular_model_and_one_of_one_channel_take_photographs(folder, tmp_path, capfd):
    np.savez(tmp_path / "grey.npz", **random_weights(TINY.replace(in_channels=1)))
    for path, size in ((GOLDENS["rectangular"].weights_file, "10x24"), (tmp_path / "grey.npz", "8x15")):
        assert len(as_json(command(capfd, path, folder, "--json", "--image-size", size, "--top", 1).out)) == 6


@pytest.mark.torch
def test_the_implementation_can_be_pytorch(model, folder, monkeypatch, capfd):
    monkeypatch.setattr(mixer_jax.pretrained, "load", None)
    assert best_classes(capfd, model, folder, "--implementation", "torch") == {name: name for name in NAMES}


def test_predict_says_what_it_needs_without_pillow(model, folder, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert "error: reading images needs Pillow: pip install 'mixer-jax[images]'" in command(capfd, model, folder, code=1).err
