"""Pictures of weights: planted patterns are read back from the pixels of the written file, and slips of axes are caught."""

import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from command_line import main, process, run
from conftest import GOLDENS, TINY, random_weights
from matplotlib import colormaps
from PIL import Image

import convert
from convert import Checkpoint, CheckpointError, MixerConfig
from mixer_jax.pictures import files
from mixer_jax.pictures import weights as draw

CONFIG = MixerConfig(
    patch_size=(4, 4),
    image_size=(16, 20),
    num_blocks=2,
    hidden_dim=6,
    tokens_mlp_dim=20,  # as many units as tokens: a transposed matrix has the same shape
    channels_mlp_dim=7,
    num_classes=3,
)
TOKEN_KERNEL = "MixerBlock_1/token_mixing/Dense_0/kernel"
LAYOUTS = ["google", "timm", "flax"]
BLOCK_1 = ("--blocks", "1")


def wave(height, width, y, x):
    """A cosine of y and x cycles over a field, and so of frequency hypot(y / height, x / width)."""
    rows, columns = np.mgrid[:height, :width]
    return np.cos(2 * np.pi * (y * rows / height + x * columns / width) + 0.3)


def planted_tokens(seed=0):
    """A token kernel (S, D_S) of nine waves, their weaker inverses and two zero units, shuffled; and the pairs, low first."""
    random, units = np.random.default_rng(seed), []
    for mode in sorted(np.ndindex(3, 3), key=lambda mode: np.hypot(mode[0] / 4, mode[1] / 5)):
        strong = random.uniform(0.5, 1.5) * wave(4, 5, *mode)
        units += [strong, -random.uniform(0.3, 0.8) * strong]
    units = [unit + 0.01 * random.normal(size=unit.shape) for unit in units] + [np.zeros((4, 5))] * 2
    places, kernel = random.permutation(20), np.empty((20, 20), np.float32)
    kernel[:, places] = np.reshape(units, (20, 20)).T
    return kernel, [tuple(sorted(pair)) for pair in places.reshape(-1, 2).tolist()]


def planted_stem(seed=0):
    """A stem kernel (h, w, 3, C) of six waves, each of one colour, shuffled; and the units, low first."""
    random = np.random.default_rng(seed)
    places, kernel = random.permutation(6), np.empty((4, 4, 3, 6), np.float32)
    for mode, place in zip([(0, 0), (0, 1), (1, 1), (0, 2), (1, 2), (2, 2)], places):
        unit = wave(4, 4, *mode)[..., None] * random.uniform(0.2, 1, 3)
        kernel[..., place] = unit + 0.01 * random.normal(size=unit.shape)
    return kernel, places.tolist()


def written(path, layout="google", config=CONFIG, **arrays):
    """A file of random weights with some arrays replaced, `/` in their names as `__`."""
    weights = random_weights(config) | {name.replace("__", "/"): array for name, array in arrays.items()}
    convert.write(path, Checkpoint.from_arrays(weights).with_image_size(config.image_size), layout=layout)
    return path


def command(*arguments):
    """The command line in this process, and the picture it wrote as (h, w, 3)."""
    assert main("draw", *arguments) == 0
    with Image.open(arguments[1]) as image:
        return np.asarray(image.convert("RGB"))


def places(picture, cell, zooms=range(1, 49)):
    """Top, left and zoom of every place where a cell (h, w, 3) stands in a picture, each of its pixels as a square."""
    matches = []
    codes, cell = (part @ np.array([1 << 16, 1 << 8, 1]) for part in (picture.astype(int), cell.astype(int)))
    tops, lefts = np.nonzero(codes == cell[0, 0])
    for zoom in zooms:
        height, width = zoom * cell.shape[0], zoom * cell.shape[1]
        fits = (tops + height <= codes.shape[0]) & (lefts + width <= codes.shape[1])
        ys, xs = tops[fits], lefts[fits]
        for y, x in ((0, -1), (-1, 0), (-1, -1)):
            likely = codes[ys + y % height, xs + x % width] == cell[y, x]
            ys, xs = ys[likely], xs[likely]
        big = cell.repeat(zoom, 0).repeat(zoom, 1)
        for top, left in zip(ys.tolist(), xs.tolist()):
            if np.array_equal(codes[top : top + height, left : left + width], big):
                matches.append((top, left, zoom))
    return matches


def in_reading_order(picture, cells):
    """The cells by number as a reader meets them, with their places: each is exactly once in the picture."""
    placed = {}
    for number, cell in cells.items():
        (placed[number],) = places(picture, cell) or pytest.fail(f"unit {number} is not in the picture")
    return dict(sorted(placed.items(), key=lambda item: item[1]))


def token_cells(kernel, drawn=slice(None)):
    """What token-mixing units look like: red and blue, zero white, 99.5 % of the weights that are drawn within the scale."""
    kernel = kernel.astype(np.float64)
    units = kernel.T.reshape(-1, 4, 5) / np.quantile(np.abs(kernel[:, drawn]), 0.995)
    return {i: colormaps["RdBu_r"]((unit + 1) / 2, bytes=True)[..., :3] for i, unit in enumerate(units)}


def check_tokens(picture):
    """The planted pairs stand side by side, low frequencies first, the zero units last."""
    kernel, (*pairs, zeros) = planted_tokens()
    cells = token_cells(kernel)
    placed = in_reading_order(picture, {i: cells[i] for pair in pairs for i in pair})
    assert list(placed) == [i for pair in pairs for i in pair]
    last = placed[pairs[-1][1]]
    assert [place > last for place in places(picture, cells[zeros[0]], [last[2]])] == [True, True]
    for left, right in pairs:
        (top, start, zoom), (other_top, other_start, other_zoom) = placed[left], placed[right]
        assert (top, zoom) == (other_top, other_zoom)
        assert 1 <= other_start - start - 5 * zoom <= 3, "a pair is adjacent but for a thin gap"
    for (_, before), (after, _) in pairwise(pairs):
        if placed[before][0] == placed[after][0]:
            assert placed[after][1] - placed[before][1] - 5 * placed[after][2] >= 9, "pairs stand apart"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_planted_token_units_are_found_in_the_pixels_and_a_transposed_matrix_is_not(tmp_path, layout):
    kernel = planted_tokens()[0]
    check_tokens(command(written(tmp_path / "w.safetensors", layout, **{TOKEN_KERNEL: kernel}), tmp_path / "a.png", *BLOCK_1))
    transposed = written(tmp_path / "t.safetensors", layout, **{TOKEN_KERNEL: kernel.T})
    with pytest.raises(pytest.fail.Exception, match="is not in the picture"):
        check_tokens(command(transposed, tmp_path / "b.png", *BLOCK_1))


def test_a_wrong_grid_wrong_pairs_and_a_wrong_order_are_caught_by_the_picture(tmp_path, monkeypatch):
    source, pairs = written(tmp_path / "w.npz", **{TOKEN_KERNEL: planted_tokens()[0]}), draw.pairs
    with pytest.raises(pytest.fail.Exception, match="is not in the picture"):
        check_tokens(command(source, tmp_path / "grid.png", *BLOCK_1, "--image-size", "20x16"))
    for name, wrong in (("pairs", lambda units: pairs(np.abs(units))), ("low_first", lambda groups, values: groups[::-1])):
        with monkeypatch.context() as patch:
            patch.setattr(draw, name, wrong)
            with pytest.raises(AssertionError):
                check_tokens(command(source, tmp_path / f"{name}.png", *BLOCK_1))


def stem_pixels(kernel):
    """Weights as bytes, zero grey, 99.5 % of them within the scale."""
    kernel = kernel.astype(np.float64)
    return np.rint(255 * np.clip((kernel / np.quantile(np.abs(kernel), 0.995) + 1) / 2, 0, 1)).astype(np.uint8)


def check_stem(picture):
    kernel, order = planted_stem()
    assert list(in_reading_order(picture, dict(enumerate(np.moveaxis(stem_pixels(kernel), -1, 0))))) == order


@pytest.mark.parametrize("layout", LAYOUTS)
def test_planted_stem_units_are_found_in_the_pixels_in_order(tmp_path, layout):
    source = written(tmp_path / "w.safetensors", layout, stem__kernel=planted_stem()[0])
    check_stem(command(source, tmp_path / "stem.png", "--what", "stem"))


@pytest.mark.parametrize(
    "slip",
    [
        lambda kernel: kernel.transpose(3, 2, 0, 1).reshape(kernel.shape),  # OIHW bytes called HWIO
        lambda kernel: kernel.reshape(6, 3, 4, 4).transpose(2, 3, 1, 0),  # HWIO bytes called OIHW
        lambda kernel: kernel.transpose(1, 0, 2, 3),  # patches on their side
        lambda kernel: kernel[:, :, ::-1],  # BGR
    ],
)
def test_a_slip_of_the_stems_axes_is_caught_by_the_picture(tmp_path, slip):
    source = written(tmp_path / "w.npz", stem__kernel=slip(planted_stem()[0]))
    picture = command(source, tmp_path / "stem.png", "--what", "stem")
    with pytest.raises(pytest.fail.Exception, match="is not in the picture"):
        check_stem(picture)


@pytest.mark.parametrize("channels", [1, 4])
def test_a_stem_of_other_channels_is_drawn_grey_by_channel(tmp_path, channels):
    config = CONFIG.replace(in_channels=channels)
    source = written(tmp_path / "w.npz", config=config)
    picture = command(source, tmp_path / "stem.png", "--what", "stem", "--units", "2")
    kernel = random_weights(config)["stem/kernel"].astype(np.float64)
    assert ("one channel" if channels == 1 else "4 channels side by side") in text_of(draw.draw_stem(convert.read(source)))
    order = sorted(range(6), key=lambda i: draw.frequencies(kernel[None, ..., i])[0])[:2]
    pixels = dict(zip(order, np.moveaxis(stem_pixels(kernel[..., order]), -1, 0)))
    cells = {(i, c): pixels[i][:, :, [c] * 3] for i in order for c in range(channels)}
    assert list(in_reading_order(picture, cells)) == list(cells)


def text_of(figure):
    """Everything that is written on a figure, with `bar:` before the label of its colour bar."""
    titles = [axes.get_title("left") for axes in figure.axes]
    bars = [f"bar: {axes.get_ylabel()}" for axes in figure.axes if axes.get_ylabel()]
    return " ".join([*(text.get_text() for text in figure.texts), *titles, *bars]).replace("\n", " ")


def test_the_text_names_the_file_the_blocks_the_units_and_the_grid(tmp_path):
    folder = tmp_path / "imagenet$1$k"  # which Matplotlib would set as a formula
    folder.mkdir()
    checkpoint = convert.read(written(folder / "w.npz", **{TOKEN_KERNEL: planted_tokens()[0]}))
    tokens, many = draw.draw_tokens(checkpoint), draw.draw_tokens(checkpoint, blocks=[0, 1] * 7)
    for figure, parts in (
        (tokens, ["imagenet$1$k/w.npz: token-mixing units of blocks 0, 1", "All 20 units of each block", "4 x 5 patches"]),
        (tokens, ["block 0", "block 1", "bar: incoming weight"]),
        (draw.draw_tokens(checkpoint, blocks=[1], units=7), ["units of block 1", "The first 7 of 20 units:"]),
        (draw.draw_stem(checkpoint, units=4), ["w.npz: units of the stem", "The first 4 of 6 units:", "pixels; red, green"]),
        (draw.draw_stem(checkpoint), ["4 x 4 pixels", "bar: weight of a pixel (grey = 0)"]),
        (many, ["token-mixing units of 14 blocks"]),
        (draw.draw_norms(checkpoint), ["w.npz: RMS of the weights", "root mean square"]),
    ):
        assert [part for part in parts if part not in text_of(figure)] == []
    files.save(tokens, tmp_path / "formula.png")
    assert [axes.get_title("left") for axes in many.axes[:14]] == ["block 0", "block 1"] * 7


def test_one_colour_scale_is_centred_on_zero_for_all_blocks():
    checkpoint = Checkpoint.from_arrays(random_weights(TINY)).with_image_size(TINY.image_size)
    *panels, bar = draw.draw_tokens(checkpoint).axes
    low, high = bar.get_ylim()
    kernels = [random_weights(TINY)[f"MixerBlock_{i}/token_mixing/Dense_0/kernel"].astype(float) for i in range(3)]
    assert len(panels) == 3
    assert low == -high
    assert high == np.quantile(np.abs(kernels), 0.995)


def test_units_limits_what_is_drawn_to_the_lowest_frequencies(tmp_path):
    kernel, pairs = planted_tokens()
    picture = command(written(tmp_path / "w.npz", **{TOKEN_KERNEL: kernel}), tmp_path / "some.png", *BLOCK_1, "--units", "5")
    order = [i for pair in pairs for i in pair]
    drawn, others = order[:5], order[5:-2]  # without the zero units, whose colour is everywhere
    cells = token_cells(kernel, drawn)
    assert list(in_reading_order(picture, {i: cells[i] for i in drawn})) == drawn
    assert not any(places(picture, cells[i]) for i in others)


def test_norms_are_the_root_mean_squares_of_the_arrays():
    weights = random_weights(TINY)
    checkpoint = Checkpoint.from_arrays(weights).to("flax")
    figure = draw.draw_norms(checkpoint)
    (legend,) = figure.legends
    colours = {handle.get_color(): text.get_text() for handle, text in zip(legend.legend_handles, legend.get_texts())}
    modules = {f"{m} mixing dense {i}": f"{m}_mixing/Dense_{i}" for m in ("token", "channel") for i in (0, 1)}
    modules |= {"token norm": "LayerNorm_0", "channel norm": "LayerNorm_1"}
    drawn = set()
    for axes, leaf in zip(figure.axes, ("kernel", "bias", "scale")):
        for line in axes.lines:
            name = f"{modules[colours[line.get_color()]]}/{leaf}"
            expected = [np.sqrt((weights[f"MixerBlock_{i}/{name}"].astype(float) ** 2).mean()) for i in range(3)]
            np.testing.assert_allclose(line.get_ydata(), expected, rtol=1e-12)
            assert line.get_xdata().tolist() == [0, 1, 2]
            drawn.add(name)
    assert len(drawn) == 12
    assert draw.draw_norms(checkpoint, blocks=[2]).axes[0].lines[0].get_xdata().tolist() == [2]


def test_mutually_closest_inverses_are_a_pair_however_strong_and_odd_ones_stay_alone():
    a, b, c = np.random.default_rng(0).normal(size=(3, 1, 6))  # one row, as a grid of 1 x 6 gives
    assert sorted(draw.pairs(np.stack([a, b, -0.01 * a, c, -7 * b]))) == [(0, 2), (1, 4), (3,)]
    assert draw.pairs(np.stack([0 * a, a, 0 * a, c, -a])) == [(1, 4), (0, 2), (3,)]
    assert draw.pairs(np.zeros((3, 2, 2))) == [(0, 1), (2,)]
    assert draw.pairs(np.ones((1, 2, 2))) == [(0,)]


def test_frequencies_of_known_patterns():
    board = np.indices((4, 6)).sum(axis=0) % 2 - 0.5
    colours = np.stack([wave(4, 5, 1, 0), wave(4, 5, 0, 1)], axis=-1)
    for units, wanted in (
        (wave(1, 8, 0, 3)[None], [3 / 8]),
        ([np.ones((4, 6)), board, np.zeros((4, 6))], [0, np.hypot(0.5, 0.5), np.inf]),
        (np.moveaxis(colours, -1, 0), [1 / 4, 1 / 5]),
        (colours[None], [(1 / 4 + 1 / 5) / 2]),
    ):
        assert draw.frequencies(np.asarray(units)).tolist() == pytest.approx(wanted, abs=1e-12)


def test_weights_that_are_not_finite_are_refused_or_drawn_in_gold(tmp_path, capfd):
    kernel, stem = planted_tokens()[0], planted_stem()[0]
    kernel[3, 4], stem[0, 1, 2, 3] = np.nan, np.inf
    source = written(tmp_path / "w.npz", **{TOKEN_KERNEL: kernel, "stem__kernel": stem})
    assert "1 NaN and 0 infinite values" in run(capfd, "draw", source, tmp_path / "x.png", *BLOCK_1, code=1).err
    for what in (BLOCK_1, ("--what", "stem")):
        picture = command(source, tmp_path / f"{what[1]}.png", *what, "--allow-nonfinite")
        assert len(places(picture, np.uint8([[[255, 215, 0]]]))) > 0
    checkpoint = convert.read(source, convert.ReadOptions(allow_nonfinite=True))
    assert "In gold: 1 that are NaN or infinite" in text_of(draw.draw_stem(checkpoint))
    assert "gold" not in text_of(draw.draw_tokens(checkpoint, blocks=[0]))


def test_only_the_arrays_that_are_drawn_are_read(tmp_path, monkeypatch):
    config = CONFIG.replace(hidden_dim=64, channels_mlp_dim=256)
    checkpoint = convert.read(written(tmp_path / "w.npz", config=config))
    read, honest = [], convert.byte_ranges.OpenFile.read
    counted = lambda file, offset, count, *others: read.append(count) or honest(file, offset, count, *others)  # noqa: E731
    monkeypatch.setattr(convert.byte_ranges.OpenFile, "read", counted)
    draw.draw_tokens(checkpoint, blocks=[1])
    assert 20 * 20 * 4 <= sum(read) < 2 * 20 * 20 * 4
    read.clear()
    draw.draw_norms(checkpoint)
    assert sum(read) > 2 * 64 * 256 * 4


def test_the_command_writes_every_format_says_what_and_loads_no_framework(tmp_path):
    source, size = GOLDENS["features"].weights_file, "{}x{}".format(*GOLDENS["features"].config.image_size)  # without a head
    ask = (
        "import sys; from mixer_jax.__main__ import main; code = main(sys.argv[1:]); "
        "print(sorted({'jax', 'torch', 'flax'} & set(sys.modules))); sys.exit(code)"
    )
    for what, ending, start in (("tokens", "png", b"\x89PNG"), ("stem", "svg", b"<?xml"), ("norms", "pdf", b"%PDF")):
        target = tmp_path / f"out.{ending}"
        out, _ = process("draw", source, target, "--what", what, "--image-size", size, python=("-c", ask))
        assert out.startswith(f"{target}: features/google.npz: ")
        assert out.endswith("[]\n")
        assert target.read_bytes().startswith(start)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.pdf", "out.png", "out.svg"]


def test_faults_are_one_message_and_leave_nothing(tmp_path, capsys, monkeypatch):
    source, target = written(tmp_path / "w.npz"), tmp_path / "out.png"
    for path, options, message in (
        (target, ["--blocks", "1,2-4,12"], "w.npz: no blocks 2, 3, 4, 12: it has blocks 0 to 1"),
        (tmp_path / "out.gif", [], "out.gif: a picture ends in .png, .pdf or .svg"),
    ):
        assert message in run(capsys, "draw", source, path, *options, code=1).err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    error = run(capsys, "draw", source, target, code=1).err
    assert error == "error: drawing needs Matplotlib: pip install 'mixer-jax[images]'\n"
    assert [path.name for path in tmp_path.iterdir()] == ["w.npz"]


def test_nothing_is_replaced_without_force_and_never_the_checkpoint(tmp_path, capfd):
    source, target = written(tmp_path / "w.npz"), tmp_path / "out.png"
    target.write_text("kept")
    with pytest.raises(CheckpointError, match="exists already"):
        files.save(draw.draw_stem(convert.read(source)), target)
    assert "out.png: exists already" in run(capfd, "draw", source, target, code=1).err
    assert target.read_text() == "kept"
    command(source, target, "--force")
    assert target.read_bytes().startswith(b"\x89PNG")
    disguised = source.rename(tmp_path / "w.png")
    error = run(capfd, "draw", disguised, disguised, "--force", code=1).err
    assert "w.png: is the checkpoint itself; give another name" in error


@pytest.mark.heavy
def test_the_picture_of_the_readme_is_made_by_its_command(tmp_path):
    script = Path(__file__).parent.parent / "benchmarks" / "picture.py"
    out, _ = process(tmp_path / "out.png", "--steps", "2", "--weights", tmp_path / "w.npz", python=(script,))
    assert "accuracy on other crops of the same photographs" in out
    assert "two-photographs/mixer.npz: token-mixing units of block 0" in out
    again = command(tmp_path / "w.npz", tmp_path / "again.png", "--blocks", "0")
    with Image.open(tmp_path / "out.png") as image:
        assert np.array_equal(np.asarray(image.convert("RGB"))[75:], again[75:])  # without the title, which names the file
