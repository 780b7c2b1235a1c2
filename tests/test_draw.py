"""Pictures of weights: planted patterns are read back from the pixels of the written file, and slips of axes are caught."""

import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from conftest import GOLDENS, TINY, random_weights
from matplotlib import colormaps
from PIL import Image

import convert
from convert import Checkpoint, CheckpointError, MixerConfig
from mixer_jax import draw

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


def wave(height, width, y, x):
    """A cosine of y and x cycles over a field, and so of frequency hypot(y / height, x / width)."""
    rows, columns = np.mgrid[:height, :width]
    return np.cos(2 * np.pi * (y * rows / height + x * columns / width) + 0.3)


def planted_tokens(seed=0):
    """A token kernel (S, D_S) of nine waves, their weaker inverses and two zero units, shuffled; and the pairs, low first."""
    random = np.random.default_rng(seed)
    modes = sorted(np.ndindex(3, 3), key=lambda mode: np.hypot(mode[0] / 4, mode[1] / 5))
    units = []
    for mode in modes:
        strong = random.uniform(0.5, 1.5) * wave(4, 5, *mode)
        units += [strong, -random.uniform(0.3, 0.8) * strong]
    units = [unit + 0.01 * random.normal(size=unit.shape) for unit in units] + [np.zeros((4, 5))] * 2
    places = random.permutation(20)
    kernel = np.empty((20, 20), np.float32)
    for unit, place in zip(units, places):
        kernel[:, place] = unit.reshape(-1)
    return kernel, [tuple(sorted(places[i : i + 2].tolist())) for i in range(0, 20, 2)]


def planted_stem(seed=0):
    """A stem kernel (h, w, 3, C) of six waves, each of one colour, shuffled; and the units, low first."""
    random = np.random.default_rng(seed)
    modes = [(0, 0), (0, 1), (1, 1), (0, 2), (1, 2), (2, 2)]
    places = random.permutation(6)
    kernel = np.empty((4, 4, 3, 6), np.float32)
    for mode, place in zip(modes, places):
        unit = wave(4, 4, *mode)[..., None] * random.uniform(0.2, 1, 3)
        kernel[..., place] = unit + 0.01 * random.normal(size=unit.shape)
    return kernel, places.tolist()


def written(path, layout="google", config=CONFIG, **arrays):
    """A file of random weights with some arrays replaced, `/` in their names as `__`."""
    weights = random_weights(config) | {name.replace("__", "/"): array for name, array in arrays.items()}
    checkpoint = Checkpoint.from_arrays(weights).with_image_size(config.image_size)
    convert.write(path, checkpoint, layout=layout)
    return path


def command(*arguments):
    """The command line in this process, and the picture it wrote as (h, w, 3)."""
    from mixer_jax.__main__ import main

    before = signal.getsignal(signal.SIGTERM)
    try:
        assert main(["draw", *map(str, arguments)]) == 0
    finally:
        signal.signal(signal.SIGTERM, before)
    with Image.open(arguments[1]) as image:
        return np.asarray(image.convert("RGB"))


def places(picture, cell, zooms=range(1, 17)):
    """Top, left and zoom of every place where a cell (h, w, 3) stands in a picture, each of its pixels as a square."""
    found = []
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
                found.append((top, left, zoom))
    return found


def in_reading_order(picture, cells):
    """The cells by number as a reader meets them, with their places: each is exactly once in the picture."""
    found = {}
    for number, cell in cells.items():
        (found[number],) = places(picture, cell) or pytest.fail(f"unit {number} is not in the picture")
    return dict(sorted(found.items(), key=lambda item: item[1]))


def token_cells(kernel):
    """What a token-mixing unit looks like: red and blue, zero white, 99.5 % of all weights within the scale."""
    limit = np.quantile(np.abs(kernel), 0.995)
    units = kernel.T.reshape(-1, 4, 5) / limit
    return {i: colormaps["RdBu_r"]((unit + 1) / 2, bytes=True)[..., :3] for i, unit in enumerate(units)}


def check_tokens(picture):
    """The planted pairs stand side by side, low frequencies first, the zero units last."""
    kernel, pairs = planted_tokens()
    cells = token_cells(kernel.astype(np.float64))
    *pairs, zeros = pairs
    found = in_reading_order(picture, {i: cells[i] for pair in pairs for i in pair})
    assert list(found) == [i for pair in pairs for i in pair]
    last = found[pairs[-1][1]]
    assert [place > last for place in places(picture, cells[zeros[0]], [last[2]])] == [True, True]
    for left, right in pairs:
        (top, start, zoom), (other_top, other_start, other_zoom) = found[left], found[right]
        assert (top, zoom) == (other_top, other_zoom)
        assert 1 <= other_start - start - 5 * zoom <= 3, "a pair is adjacent but for a thin gap"
    for (_, before), (after, _) in pairwise(pairs):
        if found[before][0] == found[after][0]:
            assert found[after][1] - found[before][1] - 5 * found[after][2] >= 9, "pairs stand apart"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_planted_token_units_are_found_in_the_pixels_in_order_and_in_pairs(tmp_path, layout):
    source = written(tmp_path / "w.safetensors", layout, **{TOKEN_KERNEL: planted_tokens()[0]})
    check_tokens(command(source, tmp_path / "tokens.png", "--only", "1"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_transposed_token_matrix_is_caught_by_the_picture(tmp_path, layout):
    source = written(tmp_path / "w.safetensors", layout, **{TOKEN_KERNEL: planted_tokens()[0].T})
    picture = command(source, tmp_path / "tokens.png", "--only", "1")
    with pytest.raises(pytest.fail.Exception, match="is not in the picture"):
        check_tokens(picture)


def test_the_grid_of_a_rectangle_read_the_wrong_way_round_is_caught_by_the_picture(tmp_path):
    source = written(tmp_path / "w.npz", **{TOKEN_KERNEL: planted_tokens()[0]})
    picture = command(source, tmp_path / "tokens.png", "--only", "1", "--image-size", "20x16")
    with pytest.raises(pytest.fail.Exception, match="is not in the picture"):
        check_tokens(picture)


def test_the_wrong_order_and_the_wrong_pairs_are_caught_by_the_picture(tmp_path, monkeypatch):
    source = written(tmp_path / "w.npz", **{TOKEN_KERNEL: planted_tokens()[0]})
    honest = draw.pairs
    monkeypatch.setattr(draw, "pairs", lambda units: honest(np.abs(units)))
    with pytest.raises(AssertionError):
        check_tokens(command(source, tmp_path / "pairs.png", "--only", "1"))
    monkeypatch.setattr(draw, "pairs", honest)
    monkeypatch.setattr(draw, "low_first", lambda groups, values: groups[::-1])
    with pytest.raises(AssertionError):
        check_tokens(command(source, tmp_path / "order.png", "--only", "1"))


def check_stem(picture):
    kernel, order = planted_stem()
    limit = np.quantile(np.abs(kernel.astype(np.float64)), 0.995)
    cells = np.rint(255 * np.clip((kernel.astype(np.float64) / limit + 1) / 2, 0, 1)).astype(np.uint8)
    assert list(in_reading_order(picture, {i: cells[..., i] for i in range(6)})) == order


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
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_slip_of_the_stems_axes_is_caught_by_the_picture(tmp_path, layout, slip):
    source = written(tmp_path / "w.safetensors", layout, stem__kernel=slip(planted_stem()[0]))
    picture = command(source, tmp_path / "stem.png", "--what", "stem")
    with pytest.raises(pytest.fail.Exception, match="is not in the picture"):
        check_stem(picture)


@pytest.mark.parametrize("channels", [1, 4])
def test_a_stem_of_other_channels_is_drawn_grey_by_channel(tmp_path, channels):
    config = CONFIG.replace(in_channels=channels)
    source = written(tmp_path / "w.npz", config=config)
    picture = command(source, tmp_path / "stem.png", "--what", "stem", "--units", "2")
    kernel = random_weights(config)["stem/kernel"].astype(np.float64)
    assert "grey" in text_of(draw.draw_stem(convert.read(source)))
    order = sorted(range(6), key=lambda i: draw.frequencies(kernel[None, ..., i])[0])[:2]
    limit = np.quantile(np.abs(kernel[..., order]), 0.995)
    light = np.rint(255 * np.clip((kernel / limit + 1) / 2, 0, 1)).astype(np.uint8)
    cells = {(i, c): light[:, :, [c] * 3, i] for i in order for c in range(channels)}
    assert list(in_reading_order(picture, cells)) == list(cells)


def text_of(figure):
    titles = [axes.get_title("left") for axes in figure.axes]
    return " ".join([figure.get_suptitle(), *(text.get_text() for text in figure.texts), *titles]).replace("\n", " ")


def test_the_title_says_the_file_the_blocks_the_units_and_the_grid(tmp_path):
    folder = tmp_path / "imagenet$1$k"  # which Matplotlib would set as a formula
    folder.mkdir()
    checkpoint = convert.read(written(folder / "w.npz", **{TOKEN_KERNEL: planted_tokens()[0]}))
    figure = draw.draw_tokens(checkpoint)
    assert figure.get_suptitle() == "imagenet$1$k/w.npz: token-mixing units of blocks 0, 1"
    said = text_of(figure)
    assert "All 20 units in each block" in said
    assert "4 x 5 patches" in said
    assert "block 0" in said
    assert "block 1" in said
    some = text_of(draw.draw_tokens(checkpoint, blocks=[1], units=7))
    assert "token-mixing units of block 1" in some
    assert "The first 7 of 20 units" in some
    stem = text_of(draw.draw_stem(checkpoint, units=4))
    assert "w.npz: units of the stem" in stem
    assert "The first 4 of 6 units" in stem
    assert "4 x 4 pixels, red, green and blue" in stem
    draw.save(figure, tmp_path / "formula.png")
    many = draw.draw_tokens(checkpoint, blocks=[0, 1] * 7)
    assert many.get_suptitle().endswith("w.npz: token-mixing units of 14 blocks")
    assert [axes.get_title("left") for axes in many.axes[:-1]] == ["block 0", "block 1"] * 7


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
    source = written(tmp_path / "w.npz", **{TOKEN_KERNEL: kernel})
    picture = command(source, tmp_path / "some.png", "--only", "1", "--units", "5")
    order = [i for pair in pairs for i in pair]
    drawn, others = order[:5], order[5:-2]  # without the zero units, whose colour is everywhere
    limit = np.quantile(np.abs(kernel.astype(np.float64)[:, drawn]), 0.995)
    units = kernel.astype(np.float64).T.reshape(-1, 4, 5) / limit
    cells = {i: colormaps["RdBu_r"]((units[i] + 1) / 2, bytes=True)[..., :3] for i in range(20)}
    assert list(in_reading_order(picture, {i: cells[i] for i in drawn})) == drawn
    assert not any(places(picture, cells[i]) for i in others)


def test_norms_are_those_of_the_arrays():
    weights = random_weights(TINY)
    checkpoint = Checkpoint.from_arrays(weights).to("flax")
    figure = draw.draw_norms(checkpoint)
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    colours = {handle.get_color(): name for handle, name in zip(figure.legends[0].legend_handles, names)}
    modules = {
        "token mixing 1": "token_mixing/Dense_0",
        "token mixing 2": "token_mixing/Dense_1",
        "channel mixing 1": "channel_mixing/Dense_0",
        "channel mixing 2": "channel_mixing/Dense_1",
        "token norm": "LayerNorm_0",
        "channel norm": "LayerNorm_1",
    }
    seen = 0
    for axes, leaf in zip(figure.axes, ("kernel", "bias", "scale")):
        for line in axes.lines:
            name = modules[colours[line.get_color()]]
            expected = [np.sqrt((weights[f"MixerBlock_{i}/{name}/{leaf}"].astype(float) ** 2).sum()) for i in range(3)]
            np.testing.assert_allclose(line.get_ydata(), expected, rtol=1e-12)
            assert line.get_xdata().tolist() == [0, 1, 2]
            seen += 1
    assert seen == 12
    assert "norms of the weights of blocks 0, 1, 2" in text_of(figure)
    assert draw.draw_norms(checkpoint, blocks=[2]).axes[0].lines[0].get_xdata().tolist() == [2]


def test_mutually_closest_inverses_are_a_pair_however_strong_and_odd_ones_stay_alone():
    a, b, c = np.random.default_rng(0).normal(size=(3, 1, 6))  # one row, as a grid of 1 x 6 gives
    assert sorted(draw.pairs(np.stack([a, b, -0.01 * a, c, -7 * b]))) == [(0, 2), (1, 4), (3,)]
    assert draw.pairs(np.stack([0 * a, a, 0 * a, c, -a])) == [(1, 4), (0, 2), (3,)]
    assert draw.pairs(np.zeros((3, 2, 2))) == [(0, 1), (2,)]
    assert draw.pairs(np.ones((1, 2, 2))) == [(0,)]


def test_pairs_and_order_do_not_depend_on_the_order_in_the_file():
    units = np.random.default_rng(0).normal(size=(31, 3, 4))
    shuffled = np.random.default_rng(1).permutation(31)

    def drawn(units, names):
        return [{int(names[i]) for i in group} for group in draw.low_first(draw.pairs(units), draw.frequencies(units))]

    assert drawn(units, np.arange(31)) == drawn(units[shuffled], shuffled)


def test_frequencies_of_known_patterns():
    row = wave(1, 8, 0, 3)
    assert draw.frequencies(row[None]).tolist() == pytest.approx([3 / 8], abs=1e-12)
    board = np.indices((4, 6)).sum(axis=0) % 2 - 0.5
    assert draw.frequencies(np.stack([np.ones((4, 6)), board])).tolist() == pytest.approx([0, np.hypot(0.5, 0.5)], abs=1e-12)
    assert draw.frequencies(np.stack([wave(4, 5, 1, 0), wave(4, 5, 0, 1)])).tolist() == pytest.approx([1 / 4, 1 / 5], abs=1e-12)
    assert draw.frequencies(np.stack([board + 1, np.zeros((4, 6))])).tolist()[1] == np.inf
    colours = np.stack([wave(4, 5, 1, 0), wave(4, 5, 0, 1)], axis=-1)
    assert draw.frequencies(colours[None]).tolist() == pytest.approx([(1 / 4 + 1 / 5) / 2], abs=1e-12)


def test_weights_that_are_not_finite_are_refused_or_drawn_in_yellow(tmp_path):
    kernel, _ = planted_tokens()
    stem = planted_stem()[0]
    kernel[3, 4], stem[0, 1, 2, 3] = np.nan, np.inf
    source = written(tmp_path / "w.npz", **{TOKEN_KERNEL: kernel, "stem__kernel": stem})
    assert "1 NaN and 0 infinite values" in failed(source, tmp_path / "x.png", "--only", "1")
    for what in (["--only", "1"], ["--what", "stem"]):
        picture = command(source, tmp_path / f"{what[1]}.png", *what, "--allow-nonfinite")
        assert len(places(picture, np.uint8([[[255, 215, 0]]]))) > 0
    checkpoint = convert.read(source, allow_nonfinite=True)
    assert "In yellow: 1 that are NaN or infinite" in text_of(draw.draw_stem(checkpoint))
    assert "yellow" not in text_of(draw.draw_tokens(checkpoint, blocks=[0]))


def test_only_the_arrays_that_are_drawn_are_read(tmp_path, monkeypatch):
    config = CONFIG.replace(hidden_dim=64, channels_mlp_dim=256)
    source = written(tmp_path / "w.npz", config=config)
    checkpoint = convert.read(source)
    read, honest = [], convert.files.OpenFile.read

    def counted(file, offset, count, *others):
        read.append(count)
        return honest(file, offset, count, *others)

    monkeypatch.setattr(convert.files.OpenFile, "read", counted)
    draw.draw_tokens(checkpoint, blocks=[1])
    assert 20 * 20 * 4 <= sum(read) < 2 * 20 * 20 * 4
    read.clear()
    draw.draw_norms(checkpoint)
    assert sum(read) > 2 * 64 * 256 * 4


def failed(*arguments, code=1):
    """Standard error of the command as a process that fails."""
    line = [sys.executable, "-m", "mixer_jax", "draw", *map(str, arguments)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr + done.stdout
    assert "Traceback" not in done.stderr
    return done.stderr


def test_the_command_writes_every_format_says_what_and_loads_no_framework(tmp_path):
    source = GOLDENS["features"].weights_file  # a file without a head
    size = "{}x{}".format(*GOLDENS["features"].config.image_size)
    ask = (
        "import sys; from mixer_jax.__main__ import main; code = main(sys.argv[1:]); "
        "print(sorted({'jax', 'torch', 'flax'} & set(sys.modules))); sys.exit(code)"
    )
    for what, ending, start in (("tokens", "png", b"\x89PNG"), ("stem", "svg", b"<?xml"), ("norms", "pdf", b"%PDF")):
        target = tmp_path / f"out.{ending}"
        line = [sys.executable, "-c", ask, "draw", source, target, "--what", what, "--image-size", size]
        done = subprocess.run(list(map(str, line)), capture_output=True, text=True, check=True)
        assert done.stdout.startswith(f"{target}: features/google.npz: ")
        assert done.stdout.endswith("[]\n")
        assert target.read_bytes().startswith(start)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.pdf", "out.png", "out.svg"]


def test_mistakes_are_one_message_and_leave_nothing(tmp_path):
    source = written(tmp_path / "w.npz")
    target = tmp_path / "out.png"
    assert "w.npz: no blocks 2, 12: it has blocks 0 to 1" in failed(source, target, "--only", "1,2,12")
    assert "out.gif: a picture ends in .png, .pdf or .svg" in failed(source, tmp_path / "out.gif")
    assert "out: a picture ends in" in failed(source, tmp_path / "out")
    assert "no.npz: no such file" in failed(tmp_path / "no.npz", target)
    assert "'1,x' is no list of blocks: 0,1,5" in failed(source, target, "--only", "1,x", code=2)
    assert "'0' is no whole number of at least 1" in failed(source, target, "--units", "0", code=2)
    assert "--only chooses blocks, and the stem is in none" in failed(source, target, "--what", "stem", "--only", "0", code=2)
    assert "--units chooses units, and norms are of whole arrays" in failed(
        source, target, "--what", "norms", "--units", "3", code=2
    )
    assert [path.name for path in tmp_path.iterdir()] == ["w.npz"]


def test_nothing_is_replaced_without_force_and_never_the_checkpoint(tmp_path):
    source, target = written(tmp_path / "w.npz"), tmp_path / "out.png"
    target.write_text("kept")
    with pytest.raises(CheckpointError, match="exists already"):
        draw.save(draw.draw_stem(convert.read(source)), target)
    assert "out.png: exists already" in failed(source, target)
    assert target.read_text() == "kept"
    command(source, target, "--force")
    assert target.read_bytes().startswith(b"\x89PNG")
    disguised = source.rename(tmp_path / "w.png")
    assert "w.png: is the checkpoint itself; give another name" in failed(disguised, disguised, "--force")


def test_without_matplotlib_the_message_names_the_extra(tmp_path):
    code = "import sys; sys.modules['matplotlib'] = None; from mixer_jax.__main__ import main; sys.exit(main(sys.argv[1:]))"
    line = [sys.executable, "-c", code, "draw", GOLDENS["square"].weights_file, tmp_path / "x.png"]
    done = subprocess.run(list(map(str, line)), capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "error: drawing needs Matplotlib: pip install 'mixer-jax[images]'\n"


@pytest.mark.heavy
def test_the_picture_of_the_readme_is_made_by_its_command(tmp_path):
    script = Path(__file__).parent.parent / "benchmarks" / "picture.py"
    line = [sys.executable, script, tmp_path / "out.png", "--steps", "2", "--weights", tmp_path / "w.npz"]
    done = subprocess.run(list(map(str, line)), capture_output=True, text=True, check=True)
    assert "accuracy on other crops of the same photographs" in done.stdout
    assert "two-photographs/mixer.npz: token-mixing units of block 0" in done.stdout
    command(tmp_path / "w.npz", tmp_path / "again.png", "--only", "0")
    with Image.open(tmp_path / "out.png") as made, Image.open(tmp_path / "again.png") as again:
        below = slice(75, None)  # the heading, which names the file
        assert np.array_equal(np.asarray(made)[below], np.asarray(again)[below])
