"""Images become the arrays that TensorFlow and timm make of them; what Pillow opens becomes RGB or an error that says why."""

import itertools
import struct
import zlib

import colours
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import HERE, TINY, random_weights
from PIL import Image, ImageCms

import mixer_jax
from convert import Checkpoint, CheckpointError
from convert.preprocessing import NAMED_BY_TIMM, PREPROCESSING_NAMES, canonical
from mixer_jax import preprocess
from mixer_jax.preprocess import PREPROCESSINGS, ImageError, load_image, prepare, preprocessing_of

GOLDEN = HERE / "golden" / "preprocess"
KEYS = {"resmall_crop": "tensorflow", "resize_crop": "tensorflow", "squash_224": "tensorflow", "timm_bicubic": "timm"}


def wanted(photograph, key):
    with np.load(GOLDEN / f"{KEYS[key]}_outputs.npz", allow_pickle=False) as data:
        return data[f"{photograph}/{key}"]


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_every_preprocessing_a_checkpoint_can_name_is_there():
    assert tuple(PREPROCESSINGS) == PREPROCESSING_NAMES


@pytest.mark.parametrize("photograph", ["landscape", "portrait_small"])
@pytest.mark.parametrize("key", KEYS)
def test_every_pixel_is_that_of_tensorflow_and_timm(photograph, key):
    image = load_image(GOLDEN / f"{photograph}.png")
    pixels = PREPROCESSINGS[key.removesuffix("_224")].pixels(image, (224, 224))
    golden = wanted(photograph, key)
    assert pixels.dtype == golden.dtype
    assert pixels.tobytes() == golden.tobytes()


with np.load(GOLDEN / "timm_described_outputs.npz", allow_pickle=False) as data:
    DESCRIBED = dict(data)


@pytest.mark.parametrize("key", DESCRIBED)
def test_a_description_gives_the_pixels_and_the_input_of_timm(key):
    photograph, text, size, *of_input = key.split("|")
    assert canonical(text) == text
    preprocessing, golden = preprocessing_of(text, 3), DESCRIBED[key]
    height, width = map(int, size.split("x"))
    pixels = preprocessing.pixels(load_image(GOLDEN / f"{photograph}.png"), (height, width))
    result = preprocessing.scaled(pixels) if of_input else pixels
    assert (result.dtype, result.shape) == (golden.dtype, golden.shape)
    assert result.tobytes() == golden.tobytes()


def test_another_crop_interpolation_or_mode_is_noticed():
    """The comparison above can fail: each change moves at least a tenth of the pixels."""
    key = next(key for key in DESCRIBED if "landscape|timm:bicubic,center=0.9" in key)
    text, image = key.split("|")[1], load_image(GOLDEN / "landscape.png")
    for old, new in (("bicubic", "bilinear"), ("center", "squash"), ("0.9", "0.875"), ("center", "border")):
        other = preprocessing_of(text.replace(old, new, 1)).pixels(image, (40, 40))
        assert (other != DESCRIBED[key]).mean() > 0.1


@pytest.mark.parametrize("name", NAMED_BY_TIMM)
def test_a_description_that_means_a_name_is_that_name(name):
    text = str(NAMED_BY_TIMM[name])
    assert canonical(text) == canonical(name) == name
    assert canonical(text.replace("mean=0.5", "mean=.5/0.50/5e-1").replace(",", ", ")) == name
    assert canonical(text.replace("0.875", "0.9")) == text.replace("0.875", "0.9")
    config, image = TINY, noise(30, 20, 3)
    assert np.array_equal(prepare(image, config, text), prepare(image, config, name))
    by_timm = preprocessing_of(text.replace("0.875", "0.874"))  # another, which is scaled as timm scales
    assert abs(by_timm.scaled(image) - PREPROCESSINGS[name].scaled(image)).max() <= 1e-7  # measured: 6e-8, half an ulp of 1


NO_DESCRIPTIONS = {
    "timm": "no preprocessing 'timm': one of resmall_crop, .*, or a description such as timm:bicubic,center=0.9,mean=",
    "timm:bicubic,center=0.9": "or a description such as",
    "timm:random,center=0.9,mean=0,std=1": "interpolation 'random' is none of nearest, bilinear, bicubic, box, ",
    "timm:bicubic,corner=0.9,mean=0,std=1": "crop mode 'corner' is none of center, squash, border",
    "timm:bicubic,center=0,mean=0,std=1": "crop 0 is not from 0.1 to 1",
    "timm:bicubic,center=1.1,mean=0,std=1": "crop 1.1 is not from 0.1 to 1",
    "timm:bicubic,center=nan,mean=0,std=1": "crop nan is not from 0.1",
    "timm:bicubic,center=1/1,mean=0,std=1": "one of its numbers is none",
    "timm:bicubic,center=1,mean=x,std=1": "one of its numbers is none",
    "timm:bicubic,center=1,mean=inf,std=1": "mean inf is not of finite numbers",
    "timm:bicubic,center=1,mean=0,std=1/0/1": "std 1/0/1 is not of numbers above 0",
    "timm:bicubic,center=1,mean=0/1/0,std=1/2": "mean is of 3 channels, std of 2",
}


@pytest.mark.parametrize("text", NO_DESCRIPTIONS)
def test_what_is_no_description_is_refused(text):
    with pytest.raises(CheckpointError, match=f"^no preprocessing '{text}': .*{NO_DESCRIPTIONS[text].split(': ')[-1]}"):
        prepare(noise(9, 9, 3), TINY, text)


def test_mean_and_std_of_three_channels_are_refused_for_grey():
    grey = TINY.replace(in_channels=1)
    with pytest.raises(CheckpointError, match="mean and std are of 3 channels, and the model takes 1"):
        prepare(noise(9, 9), grey, "timm:box,center=1,mean=0.1/0.2/0.3,std=1")
    assert prepare(noise(9, 9), grey, "timm:box,border=1,mean=0.5,std=0.2").shape == (8, 15, 1)


def test_float64_rounding_a_shifted_crop_and_pillows_box_miss_pixels():
    """The comparison above can fail: 0.16 % of values in float64, a third and more otherwise."""
    image, golden = load_image(GOLDEN / "landscape.png"), wanted("landscape", "resmall_crop")
    crop = (slice(16, 240), slice(80, 304))
    exact = scalar_area(image.astype(np.float64), 256, 385, np.float64)[crop]
    assert 0 < (exact.astype(np.uint8) != golden).mean() < 0.01
    ours = preprocess._area(image, (256, 385), crop)
    shifted = preprocess._area(image, (256, 385), (crop[0], slice(81, 305)))
    box = np.asarray(Image.fromarray(image).resize((385, 256), Image.Resampling.BOX))[crop]
    assert (ours.astype(np.uint8) == golden).all()
    assert min((other.astype(np.uint8) != golden).mean() for other in (np.rint(ours), shifted, box)) > 0.3


def scalar_area(image, height, width, dtype=np.float32):
    """TensorFlow's area resize pixel by pixel: rows summed along x, then over y, then scaled; in any precision."""
    ys, xs = dtype(image.shape[0]) / dtype(height), dtype(image.shape[1]) / dtype(width)
    scale = dtype(1 / (float(ys * xs)))

    def parts(i, step, limit):
        low, high = dtype(i) * step, dtype(i + 1) * step
        for v in range(int(np.floor(low)), int(np.ceil(high))):
            start, end = dtype(v), dtype(v + 1)
            within = high - start if end > high else dtype(1)
            yield min(v, limit - 1), (step if end > high else end - low) if start < low else within

    columns = [list(parts(x, xs, image.shape[1])) for x in range(width)]
    result = np.zeros((height, width, image.shape[2]), dtype)
    for y, x in np.ndindex(height, width):
        for row, y_share in parts(y, ys, image.shape[0]):
            across = np.zeros(image.shape[2], dtype)
            for column, x_share in columns[x]:
                across += image[row, column].astype(dtype) * x_share
            result[y, x] += across * y_share
    return result * scale


def scalar_bilinear(image, height, width):
    def neighbours(i, old, new):
        """The pixels on both sides of the centre of pixel `i`, and the weight of the second."""
        at = (np.float32(i) + np.float32(0.5)) * (np.float32(old) / np.float32(new)) - np.float32(0.5)
        return max(int(np.floor(at)), 0), min(int(np.ceil(at)), old - 1), at - np.floor(at)

    corners, result = image.astype(np.float32), np.zeros((height, width, image.shape[2]), np.float32)
    for y, x in np.ndindex(height, width):
        (top, bottom, v), (left, right, u) = neighbours(y, image.shape[0], height), neighbours(x, image.shape[1], width)
        upper, lower = (corners[row, left] + (corners[row, right] - corners[row, left]) * u for row in (top, bottom))
        result[y, x] = upper + (lower - upper) * v
    return result


SIZES = [((7, 9), (3, 4)), ((5, 4), (8, 11)), ((30, 17), (8, 16)), ((1, 1), (3, 2)), ((64, 3), (5, 6)), ((130, 20), (16, 7))]


@pytest.mark.parametrize(("old", "new"), SIZES)
@pytest.mark.parametrize("channels", [1, 3])
def test_resizing_to_a_crop_is_bit_equal_to_the_same_written_pixel_by_pixel(old, new, channels):
    image, crop = noise(*old, channels), (slice(0, new[0]), slice(1, new[1]))
    assert preprocess._area(image, new, crop).tobytes() == scalar_area(image, *new)[crop].tobytes()
    assert preprocess._bilinear(image, new, crop).tobytes() == scalar_bilinear(image, *new)[crop].tobytes()


@pytest.mark.parametrize("name", PREPROCESSINGS)
def test_an_image_of_the_size_it_is_cut_from_is_only_cropped(name):
    """Rectangles too: 56 x 112 is cut from the middle of 64 x 128."""
    image = noise(64, 128, 3)
    cropped = image if name == "squash" else image[4:60, 8:120]
    assert np.array_equal(PREPROCESSINGS[name].pixels(image, cropped.shape[:2]), cropped)


@pytest.mark.parametrize("name", PREPROCESSINGS)
@pytest.mark.parametrize("size", [(224, 224), (64, 32), (8, 15), (384, 384), (3, 40)])
@pytest.mark.parametrize("shape", [(40, 90, 3), (90, 40, 3), (300, 300, 1), (1, 1, 3)])
def test_every_preprocessing_fills_any_size_from_any_shape(name, size, shape):
    pixels = PREPROCESSINGS[name].pixels(noise(*shape), size)
    assert pixels.shape == (*size, shape[2])
    assert pixels.dtype == (np.float32 if name == "squash" else np.uint8)


@pytest.mark.parametrize("name", ["resmall_crop", "timm_bicubic", "timm_bilinear"])
def test_the_middle_of_a_photograph_stays_in_the_middle_and_in_shape(name):
    """A square in the middle of a wide and a tall photograph is a square in the middle of the crop of any size."""
    wide = np.zeros((80, 160, 3), np.uint8)
    wide[26:54, 66:94] = 255
    for image, size in itertools.product((wide, wide.swapaxes(0, 1)), ((70, 70), (70, 56))):
        pixels = PREPROCESSINGS[name].pixels(image, size)[..., 0] > 127
        ys, xs = np.flatnonzero(pixels.any(axis=1)), np.flatnonzero(pixels.any(axis=0))
        assert abs(len(ys) - len(xs)) <= 1
        assert abs(ys.mean() - (size[0] - 1) / 2) <= 1
        assert abs(xs.mean() - (size[1] - 1) / 2) <= 1


def test_the_value_range_belongs_to_the_preprocessing():
    pixels = np.arange(256, dtype=np.uint8)
    for name, preprocessing in PREPROCESSINGS.items():
        expected = pixels / np.float32(255) if name == "timm_bilinear" else pixels / np.float32(127.5) - np.float32(1)
        assert preprocessing.scaled(pixels).dtype == np.float32
        assert preprocessing.scaled(pixels).tobytes() == expected.tobytes()


def test_prepare_makes_one_image_or_a_batch_as_a_model_takes_it(tmp_path):
    image = noise(20, 30, 3)
    path = saved(Image.fromarray(image), tmp_path / "a.png")
    assert prepare is mixer_jax.prepare
    assert prepare(path, TINY.replace(in_channels=1), "squash").shape == (8, 15, 1)
    images = [path, str(path), noise(9, 9, 3, seed=1), Image.open(path)]
    for model in colours.models(Checkpoint.from_arrays(random_weights(TINY)).with_image_size(TINY.image_size)):
        model.preprocessing = None
        with pytest.raises(ValueError, match="MlpMixer has no preprocessing of its own: give preprocessing=, one of .*squash"):
            prepare(image, model)
        for model.preprocessing in PREPROCESSINGS:
            assert np.array_equal(prepare(image, model), prepare(path, TINY, model.preprocessing))
        assert np.array_equal(prepare(image, model, "squash"), prepare(image, TINY, "squash"))
        assert not np.array_equal(prepare(image, model, "squash"), prepare(image, model))
        batch = prepare(images, model)
        assert (batch.shape, batch.dtype) == ((4, 8, 15, 3), np.float32)
        assert all(np.array_equal(row, prepare(image, model)) for row, image in zip(batch, images))
        assert np.array_equal(prepare(tuple(images), model), batch)
        assert prepare([], model).shape == (0, 8, 15, 3)


@pytest.mark.parametrize(
    ("images", "model", "name", "error", "message"),
    [
        (noise(9, 9, 3), TINY, "resmal", ValueError, "no preprocessing 'resmal': one of resmall_crop, resize_crop"),
        (noise(9, 9, 3), TINY, None, ValueError, "this MixerConfig has no preprocessing of its own"),
        (TINY, "cat.jpg", None, TypeError, "a model is needed, such as mixer_jax.load.file. returns, not a str"),
        (noise(9, 9, 3), TINY.replace(in_channels=4), "squash", ImageError, "with 4 input channels takes no photographs: give"),
        ([noise(9, 9, 3), "no.png"], TINY, "squash", ImageError, r"^image 1, no\.png: no such file$"),
        ([np.ones((9, 9, 3))], TINY, "squash", ImageError, "^image 0: an image array must be uint8"),
    ],
)
def test_what_prepare_cannot_use_is_named(images, model, name, error, message):
    with pytest.raises(error, match=message):
        prepare(images, model, name)


STORED = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_90 TRANSVERSE ROTATE_270"  # orientations 2 to 8


@pytest.mark.parametrize(("orientation", "transposed"), list(enumerate([None, *STORED.split()], 1)))
def test_images_are_rotated_by_exif_unless_it_is_ignored(orientation, transposed, tmp_path):
    meant = Image.fromarray(noise(5, 8, 3))
    stored = meant.transpose(Image.Transpose[transposed]) if transposed else meant
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(stored, tmp_path / "turned.png", exif=exif)
    assert np.array_equal(load_image(path), np.asarray(meant))
    assert np.array_equal(load_image(path, use_exif=False), np.asarray(stored))
    assert np.array_equal(load_image(Image.open(path)), np.asarray(meant))


def saved(image, path, **options):
    image.save(path, **options)
    return path


def test_damaged_exif_and_a_colour_profile_change_nothing(tmp_path):
    pixels = noise(4, 6, 3)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    for options in ({"exif": b"Exif\0\0II*\0\xff\xff\xff\x7f"}, {"icc_profile": profile}):
        assert np.array_equal(load_image(saved(Image.fromarray(pixels), tmp_path / "a.png", **options)), pixels)


def test_grey_palette_bilevel_and_cmyk_become_rgb_and_colour_becomes_grey(tmp_path):
    grey = noise(4, 6)
    palette = Image.fromarray(noise(4, 6, 3) // 128 * 255).quantize(8)
    ink, red = Image.new("CMYK", (6, 4), (0, 255, 255, 0)), Image.new("RGB", (6, 4), (255, 0, 0))
    for name, image, expected in (
        ("l.png", Image.fromarray(grey), np.stack([grey] * 3, axis=-1)),
        ("p.png", palette, np.asarray(palette.convert("RGB"))),
        ("1.png", Image.fromarray(grey > 127), np.stack([(grey > 127) * 255] * 3, axis=-1)),
        ("c.tif", ink, np.asarray(red)),
    ):
        assert np.array_equal(load_image(saved(image, tmp_path / name)), expected)
    assert abs(load_image(saved(ink, tmp_path / "c.jpg")).astype(int) - (255, 0, 0)).max() <= 3  # measured: 0
    for source in (saved(red, tmp_path / "r.png"), np.asarray(red)):
        assert np.array_equal(load_image(source, channels=1), np.full((4, 6, 1), 76))  # 0.299 * 255


def test_what_is_transparent_lies_on_white_and_what_is_not_keeps_its_pixels(tmp_path):
    colour = noise(4, 6, 3)
    alpha = np.full((4, 6), 255, np.uint8)
    alpha[0], alpha[1] = 0, 128
    rgba = Image.fromarray(np.dstack([colour, alpha]))
    pixels = load_image(saved(rgba, tmp_path / "a.png"))
    assert (pixels[0] == 255).all()
    mixed = (colour[1].astype(float) * 128 + 255 * 127) / 255
    assert abs(pixels[1] - mixed).max() <= 1  # measured: 0.5, rounding
    assert np.array_equal(pixels[2:], colour[2:])
    assert np.array_equal(pixels, load_image(np.asarray(rgba)))
    assert not np.array_equal(pixels, np.asarray(rgba.convert("RGB")))  # dropping alpha is something else

    grey = Image.fromarray(np.dstack([colour[..., 0], alpha]))
    assert grey.mode == "LA"
    assert (load_image(saved(grey, tmp_path / "la.png"))[0] == 255).all()
    palette = Image.fromarray(np.array([[0, 1, 1]], np.uint8)).convert("P")
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.save(tmp_path / "p.png", transparency=0)
    assert load_image(tmp_path / "p.png").tolist() == [[[255, 255, 255], [200, 100, 50], [200, 100, 50]]]


def test_sixteen_bits_keep_their_upper_eight(tmp_path):
    values = np.array([[0, 255, 256, 0x1234, 0xFFFF]], np.uint16)
    upper = np.array([[0, 0, 1, 0x12, 0xFF]])
    for name in ("a.png", "a.tif"):
        assert load_image(saved(Image.fromarray(values), tmp_path / name))[..., 0].tolist() == upper.tolist()
    (tmp_path / "rgb.png").write_bytes(png_of_16_bits(np.stack([values] * 3, axis=-1)))
    assert load_image(tmp_path / "rgb.png")[..., 1].tolist() == upper.tolist()


def png_of_16_bits(values):
    """RGB, which Pillow reads and does not write."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_modes_without_a_fixed_range_are_refused(tmp_path):
    floats = Image.fromarray(np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4))
    for mode, image in (("F", floats), ("I", Image.fromarray(np.arange(12, dtype=np.int32).reshape(3, 4)))):
        with pytest.raises(ImageError, match=rf"32-bit pixels \(mode {mode}\) have no fixed range: save it with 8 or 16 bits"):
            load_image(saved(image, tmp_path / f"{mode}.tif"))


def test_arrays_are_used_without_a_copy_and_grey_ones_become_rgb():
    colour = noise(4, 6, 3)
    assert load_image(colour) is colour
    assert np.array_equal(load_image(jnp.asarray(colour)), colour)
    for grey in (colour[..., 0], colour[..., :1]):
        assert np.array_equal(load_image(grey), np.stack([colour[..., 0]] * 3, axis=-1))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 6, 3), np.float32), r"not float32 \(4, 6, 3\): floats have no fixed range; for 0 to 1 use \(255"),
        (jnp.zeros((4, 6, 3), jnp.bfloat16), "not bfloat16 .* floats have no fixed range"),
        (np.zeros((4, 6), np.uint16), r"not uint16 \(4, 6\): for 16 bits use \(image >> 8\)"),
        (np.zeros((4, 6, 3), np.int64), r"not int64 .* if its values are from 0 to 255 use image.astype\('uint8'\)"),
        (np.zeros((3, 4, 6), np.uint8), r"the channels come last, use image.transpose\(1, 2, 0\)"),
        (np.zeros((2, 4, 6, 3), np.uint8), r"give one image, images\[i\], or a list of them"),
        (np.zeros((5, 6, 2), np.uint8), r"an image array must be uint8 \(h, w, 3\) or \(h, w\), not uint8 \(5, 6, 2\)$"),
        (np.zeros((0, 6, 3), np.uint8), r"not uint8 \(0, 6, 3\)$"),
        (np.zeros(6, np.uint8), r"not uint8 \(6,\)$"),
    ],
)
def test_other_arrays_are_errors_that_say_what_to_do(array, message):
    with pytest.raises(ImageError, match=message):
        load_image(array)


def test_damaged_and_other_files_are_errors_that_say_why(tmp_path):
    whole = saved(Image.fromarray(noise(64, 64, 3)), tmp_path / "whole.jpg").read_bytes()
    for content, message in (
        (whole[: len(whole) // 2], "cannot be read: image file is truncated"),
        (b"", "the file is empty"),
        (b"this is no image", "no image in a format that Pillow knows"),
    ):
        (tmp_path / "a.jpg").write_bytes(content)
        with pytest.raises(ImageError, match=message):
            load_image(tmp_path / "a.jpg")
    for name, message in (("missing.jpg", "no such file"), (".", "cannot be read: .*directory")):
        with pytest.raises(ImageError, match=message):
            load_image(tmp_path / name)


def test_every_truncation_of_a_file_is_an_image_error_or_the_image(tmp_path):
    """No other exception comes out of Pillow's decoders; PNG, GIF, WebP, TIFF and JPEG, cut at 40 places each."""
    refused = 0
    for ending in ("png", "gif", "webp", "tif", "jpg"):
        whole = saved(Image.fromarray(noise(16, 16, 3)), tmp_path / f"whole.{ending}").read_bytes()
        for at in np.linspace(0, len(whole) - 1, 40).astype(int):
            (tmp_path / "cut").write_bytes(whole[:at])
            try:
                assert load_image(tmp_path / "cut").shape == (16, 16, 3)
            except ImageError:
                refused += 1
    assert refused > 150


def test_images_that_are_too_large_are_refused_before_they_are_decoded_or_resized(tmp_path, monkeypatch):
    strip = np.zeros((1, 20_000, 3), np.uint8)
    assert PREPROCESSINGS["resmall_crop"].pixels(strip, (224, 224)).shape == (224, 224, 3)
    with pytest.raises(ImageError, match="20000x1 pixels would become 5120000x256 before they are cropped: crop it first"):
        PREPROCESSINGS["timm_bicubic"].pixels(strip, (224, 224))
    saved(Image.new("1", (300, 300)), tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40_000)
    with pytest.raises(ImageError, match=r"cannot be read: Image size \(90000 pixels\) exceeds limit of 80000 pixels"):
        load_image(tmp_path / "bomb.png")
