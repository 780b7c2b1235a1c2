"""The parity report in its three forms, and the command as a person runs it."""

import io
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace
from xml.etree import ElementTree

import colours
import faults
import numpy as np
import pytest
from conftest import GOLDENS, TINY, random_images, random_weights
from implementations import checkpoint
from PIL import Image

import convert
from mixer_jax.__main__ import main
from mixer_jax.commands.parity import parity
from mixer_jax.parity import report as report_module
from mixer_jax.parity.comparison import compare
from mixer_jax.parity.exactness import Exactness
from mixer_jax.parity.html import HEIGHT, WIDTH, as_html, as_html_of_many
from mixer_jax.parity.implementations import Implementation
from mixer_jax.parity.report import ParityReport, as_dict, as_text, parity_report, verdict

SQUARE = GOLDENS["square"].weights_file
NUMPY, FLAX = Implementation.parse("numpy"), Implementation("flax")
FAULT = "blocks/1/token_mixing/gelu"


@pytest.fixture(scope="module")
def weights():
    return checkpoint(random_weights(TINY), TINY)


@pytest.fixture(scope="module")
def honest(weights):
    about = {"source": "w.npz", "images_are": "noise"}
    return parity_report(weights, random_images(TINY), NUMPY, FLAX, extras=("explain", "predict_devices"), **about)


@pytest.fixture(scope="module")
def failed(weights):
    """A report on an implementation that has one element of one operation changed."""
    faulty = faults.in_operation(FLAX.open(weights), FAULT, faults.in_one_element(0.01))
    return ParityReport(compare(weights, random_images(TINY), NUMPY, FLAX, runs=(None, faulty)), "w.npz")


def heading(page):
    return re.search(r"<body>\s*<h1 class=\"(\w+)\">(.*?)</h1>", page).groups()


def plots(page):
    """Of a page: accumulated differences, then the operations' own errors."""
    accumulated, per_operation = (ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    return accumulated, per_operation


def of_class(svg, name):
    return [element for element in svg.iter() if name in element.get("class", "").split()]


def points(element):
    return np.array([[float(number) for number in point.split(",")] for point in element.get("points").split()])


def strict_json(report):
    return json.loads(json.dumps(as_dict(report), allow_nan=False))


def test_the_verdict_comes_first_in_all_three_forms(honest):
    assert verdict(honest).startswith("yes: numpy and flax:cpu:float32:highest compute the same from w.npz; the logits differ")
    assert as_text(honest).splitlines()[0] == verdict(honest)
    assert (as_dict(honest)["passed"], as_dict(honest)["verdict"]) == (True, verdict(honest))
    assert heading(as_html(honest)) == ("yes", verdict(honest))


def test_a_fault_is_a_no_that_names_the_operation_in_all_three_forms(failed):
    line = "no: numpy and flax:cpu:float32:highest do not compute the same from w.npz; the first operation outside its "
    assert verdict(failed).startswith(f"{line}tolerance is block 1, token_mixing, gelu, in flax:cpu:float32:highest: error ")
    text = as_text(failed)
    assert text.splitlines()[0] == verdict(failed)
    assert re.search(r"block 1 .* [\d.,]+ times  token_mixing, gelu$", text, re.MULTILINE)
    entries = strict_json(failed)
    assert entries["passed"] is False
    assert (entries["first"]["operation"], entries["first"]["implementation"]) == (FAULT, "flax:cpu:float32:highest")
    assert entries["first"]["text"] in entries["verdict"]
    page = as_html(failed)
    assert heading(page) == ("no", verdict(failed))
    assert page.index('class="off"') < page.index("<details>")


def test_the_numbers_in_json_are_the_comparisons(honest, failed):
    for report in (honest, failed):
        comparison, entries = report.comparison, strict_json(report)
        assert entries["agreement"] == asdict(comparison.logits)
        assert entries["tolerance"] == asdict(comparison.logits_tolerance)
        assert entries["fraction"] == comparison.fraction
        assert entries["implementations"] == [str(comparison.a), str(comparison.b)]
        assert entries["operations"] == json.loads(json.dumps([asdict(operation) for operation in comparison.operations]))


def test_the_page_needs_nothing_else(honest, failed):
    for page in (as_html(honest), as_html(failed), as_html_of_many("all", [honest, failed], ["a device"])):
        assert not re.search(r"https?:|//\w|src=|href=|url\(|@import|<script|<link|<iframe", page)
        assert 'name="viewport" content="width=device-width' in page
        assert "prefers-color-scheme: dark" in page


def test_the_plots_have_titles_and_no_text_leaves_them_on_a_phone(failed):
    """At the sizes of text on a narrow screen, with wide letters: 0.62 of the size each."""
    page = as_html(failed)
    assert "white-space: nowrap" not in page  # tables wrap
    for plot, y_title in zip(plots(page), ("relative error", "fraction of the tolerance"), strict=True):
        titles = of_class(plot, "title")
        assert [title.text for title in titles] == ["operation, in the order of the forward pass", y_title]
        for text in plot.iter("text"):
            classes = text.get("class", "").split()
            length = 0.62 * len(text.text) * (17 if {"title", "first-label"} & {*classes} else 22)
            if text in titles:
                assert length <= (WIDTH if text is titles[0] else HEIGHT)
            else:
                start = float(text.get("x")) - (length if "end" in classes else 0)
                assert 0 <= start <= WIDTH - length, text.text


@pytest.mark.parametrize("name", ["honest", "failed"])
def test_what_is_inside_and_outside_of_its_tolerance_is_drawn_so(request, name):
    comparison = request.getfixturevalue(name).comparison
    accumulated, per_operation = plots(as_html(request.getfixturevalue(name)))
    (band,), (line,), operations = of_class(accumulated, "band"), of_class(accumulated, "difference"), comparison.operations
    assert not of_class(per_operation, "band")
    assert len(points(line)) == len(operations) == len(points(band)) - 2
    # A larger value lies higher, which is a smaller y: the line leaves the band exactly where it leaves the tolerance.
    outside = [operation.accumulated > operation.accumulated_tolerance for operation in operations]
    assert (points(line)[:, 1] < points(band)[1:-1, 1]).tolist() == outside
    assert any(outside) == (name == "failed")
    assert len(of_class(accumulated, "off")) == sum(outside)
    assert len(of_class(per_operation, "off")) == (name == "failed")
    marks = [float(mark.get("x1")) for mark in of_class(accumulated, "first")]
    if name == "honest":
        assert len(of_class(per_operation, "of-a")) == len(of_class(per_operation, "of-b")) == len(operations)
        assert marks == []
    else:
        assert of_class(accumulated, "first-label")[0].text == "block 1, token_mixing, gelu"
        assert marks == [points(line)[[operation.name for operation in operations].index(FAULT)][0]]


def test_an_operation_that_is_not_finite_is_legal_json(failed):
    not_finite = {"accumulated": np.inf, "per_operation": (0.0, np.inf), "fraction": (0.0, np.inf)}
    broken = [replace(operation, **not_finite) for operation in failed.comparison.operations]
    report = ParityReport(replace(failed.comparison, operations=broken), "w.npz")
    row, first = strict_json(report)["operations"][0], strict_json(report)["first"]
    assert (first["operation"], first["error"]) == ("stem", None)
    assert (row["accumulated"], row["per_operation"], row["fraction"]) == (None, [0.0, None], [0.0, None])
    assert "not finite" in as_text(report)
    assert len(of_class(plots(as_html(report))[0], "off")) == len(broken)


def test_names_of_files_are_text_on_the_page(failed):
    page = as_html(replace(failed, source='<b onload="x">&.npz', about={"<i>": {"<u>": "</dl>"}}))
    assert "&lt;b onload=&quot;x&quot;&gt;&amp;.npz" in page
    assert not re.search("<b |<i>|<u>|</dl></dd>", page)


@pytest.mark.parametrize(
    ("fraction", "answer", "words"),
    [
        (0.9999, "yes", "99% of the tolerance"),
        (1.0, "yes", "100% of the tolerance"),
        (1.0001, "no", r"over 100% of the tolerance of \S+, though every operation is within its own"),
        (2.5, "no", "2.5 times the tolerance"),
    ],
)
def test_more_than_the_tolerance_is_never_rounded_to_all_of_it(honest, fraction, answer, words):
    logits = replace(honest.comparison.logits, max_abs=fraction * honest.comparison.logits_tolerance.max_abs)
    line = verdict(replace(honest, comparison=replace(honest.comparison, logits=logits)))
    assert line.startswith(answer)
    assert re.search(words, line)


@pytest.mark.parametrize("figure", ["max_abs", "rms"])
def test_the_verdict_prints_the_figure_that_is_over_its_tolerance(honest, figure):
    """Never "7.6e-07, tolerance 9.4e-07" of a comparison that failed."""
    limit = honest.comparison.logits_tolerance
    figures = {"max_abs": 0.5 * limit.max_abs, "rms": 0.5 * limit.rms} | {figure: 3 * getattr(limit, figure)}
    comparison = replace(honest.comparison, logits=replace(honest.comparison.logits, **figures))
    words = {"max_abs": "at most", "rms": "in root mean square"}[figure]
    wanted = f"differ by {figures[figure]:.1e} {words}, 3 times the tolerance of {getattr(limit, figure):.1e}"
    assert wanted in verdict(replace(honest, comparison=comparison))


def test_the_extra_parts_are_in_all_three_forms(honest):
    entries = as_dict(honest)
    assert entries["explanation"]["causes"][0]["name"] == "GELU"
    assert len(entries["predictions"]) == 7
    for form in (as_text(honest), as_html(honest)):
        assert "unexplained is the gap itself: within what rounding may leave; rows with " in form
        assert "six bfloat16 passes" in form
        assert "redicted here, not measured" in form


def test_logits_apart_in_float64_are_a_no(honest):
    report = replace(honest, exactness=Exactness(10, [(0, 1, 1.0, 1.0)], [(1, 2, 1.0, 1.5), (1, 3, 1.0, 1.5)]))
    assert verdict(report).startswith("no: ")
    assert "as float32, 2 of the logits differ by more than float64 rounding explains" in verdict(report)
    for form in (as_text(report), as_html(report)):
        assert "APART: image 1, class 2" in form
        assert "7 of 10 bit-equal, 1 straddle a rounding boundary, 2 are further apart" in form
    equal = as_text(replace(honest, exactness=Exactness(10, [], []))).splitlines()
    assert equal[equal.index("float64 rounded to float32") + 1].startswith("  10 of 10 bit-equal")  # no header over no rows


def test_the_report_tells_what_its_figures_depend_on(honest, weights):
    about = as_dict(honest)["about"]
    assert about["weights"]["fingerprint"] == convert.identity.fingerprint(weights.arrays, weights.layout)
    assert about["weights"]["numerics"] == "tanh GELU, LayerNorm epsilon 1e-06"
    assert about["weights"]["model"] == "a Mixer of no published size, 5 classes"
    assert about["input"]["images"] == "2, noise"
    assert about["b"]["implementation"] == "flax:cpu:float32:highest"
    assert {"Python", "numpy", "jax", "flax"} <= about["versions"].keys()
    assert "torch" not in about["versions"]
    assert {"system", "processor", "cores"} <= about["machine"].keys()


@pytest.mark.parametrize(("terminal", "delay", "shown"), [(True, 0, True), (True, 1e6, False), (False, 0, False)])
def test_a_terminal_is_told_how_far_it_is_where_that_takes_long(monkeypatch, weights, terminal, delay, shown):
    bars, stream = [], io.StringIO()
    stream.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", stream)
    tqdm = report_module.tqdm
    monkeypatch.setattr(report_module, "tqdm", lambda **options: bars.append(tqdm(**options | {"delay": delay})) or bars[0])
    parity_report(weights, random_images(TINY), NUMPY, NUMPY, extras=("explain", "predict_devices"))
    assert ("comparing" in stream.getvalue()) == shown
    if terminal:
        assert bars[0].n == bars[0].total


# The command.


def process(*arguments, code):
    command = [sys.executable, "-m", "mixer_jax", "parity", *map(str, arguments)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout, done.stderr


@pytest.fixture
def command(capsys):
    """The same in this process: faster, and the same code."""

    def run(*arguments, code):
        try:
            result = main(["parity", *map(str, arguments)])
        except SystemExit as end:
            result = end.code
        out, err = capsys.readouterr()
        assert result == code, out + err
        return out or err

    return run


IN_FLOAT32 = ("--a", "numpy", "--b", "flax")


def file(path, weights, config=TINY, **numerics):
    convert.write(path, checkpoint(weights, config).with_metadata(**numerics), layout="google")
    return path


@pytest.mark.torch
def test_a_yes_is_exit_code_0_and_flax_against_pytorch_is_the_default(tmp_path):
    out, err = process(SQUARE, "--html", tmp_path / "r.html", code=0)
    line = out.splitlines()[0]
    assert line.startswith("yes: flax:cpu:float32:highest and torch:cpu:float32:highest compute the same from google.npz")
    assert heading((tmp_path / "r.html").read_text()) == ("yes", line)
    assert "logits of 1 image\n" in out
    assert "torch.backends.cuda.matmul.fp32_precision ieee" in out
    assert err == ""


def test_a_no_is_exit_code_1_with_the_report_and_no_error(tmp_path):
    """Other weights in the second file, in one bias."""
    wrong = random_weights(TINY)
    wrong["MixerBlock_1/channel_mixing/Dense_0/bias"][3] += 0.01
    right, wrong = file(tmp_path / "right.npz", random_weights(TINY)), file(tmp_path / "wrong.npz", wrong)
    out, err = process(right, wrong, *IN_FLOAT32, "--json", code=1)
    entries = json.loads(out)
    assert entries["first"]["operation"] == "blocks/1/channel_mixing/dense_0"
    assert "do not compute the same from right.npz and wrong.npz; the first" in entries["verdict"]
    assert entries["about"]["weights"]["fingerprint"] != entries["about"]["weights of b"]["fingerprint"]
    assert err == ""


def test_the_function_takes_keywords_and_returns_the_report():
    report = parity(SQUARE, a="numpy", b="flax", count=2, exact=True)
    assert report.passed
    assert report.exactness.count == 14
    with pytest.raises(ValueError, match="an exact comparison is in float64, and flax:cpu:float32:highest is not"):
        parity(SQUARE, a="numpy", b=FLAX, exact=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--a", "keras"), "'keras' is not a name of an implementation: flax, torch, timm, numpy"),
        (("--draws", "7"), "argument --draws: '7' is"),
        (("--count", "0"), "argument --count: '0' is"),
        (("--exact", "--b", "torch:cpu:bfloat16"), "and torch:cpu:bfloat16:highest is not: leave its dtype out"),
    ],
)
def test_usage_errors(command, arguments, message):
    assert message in command(SQUARE, *arguments, code=2)


def test_a_device_that_is_not_there_is_one_error_line():
    out, err = process(SQUARE, "--a", "flax:gpu", "--b", "numpy", code=1)
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("error: JAX finds no gpu here: ")


def test_a_fresh_head_is_refused(command, tmp_path):
    zeros = {name: 0 * array if name.startswith("head/") else array for name, array in random_weights(TINY).items()}
    error = command(file(tmp_path / "w.npz", zeros), *IN_FLOAT32, code=1)
    assert error == "error: w.npz: all logits of an image are equal, as with a fresh head: any two models would agree\n"


def test_weights_that_are_not_finite_are_refused(command, tmp_path):
    weights = random_weights(TINY)
    weights["MixerBlock_1/LayerNorm_0/bias"][2] = np.nan
    np.savez(tmp_path / "w.npz", **weights)
    arguments = (tmp_path / "w.npz", *IN_FLOAT32, "--image-size", "8x15")
    assert "MixerBlock_1/LayerNorm_0/bias: 1 NaN and 0 infinite values" in command(*arguments, code=1)
    error = command(*arguments, "--allow-nonfinite", code=1)
    assert error == "error: w.npz: there are NaN or infinite logits, which cannot be compared\n"


def test_files_of_different_images_are_refused(command, tmp_path):
    other = replace(TINY, image_size=(8, 12))
    paths = file(tmp_path / "a.npz", random_weights(TINY)), file(tmp_path / "b.npz", random_weights(other), other)
    wanted = "a.npz and b.npz: one takes images of (8, 15, 3), the other of (8, 12, 3): no image suits both"
    assert wanted in command(*paths, *IN_FLOAT32, code=1)


def test_more_images_than_memory_holds_are_refused_before_anything_runs(command, monkeypatch):
    monkeypatch.setattr(report_module, "_memory", lambda: 1 << 20)
    error = command(SQUARE, "--a", "numpy", "--b", "numpy", "--count", "1000", code=1)
    most = re.fullmatch(r"error: 1000 images need [\d.]+ GiB for .*, and the machine has 0.0: at most (\d+) at once\n", error)
    command(SQUARE, "--a", "numpy", "--b", "numpy", "--count", most.group(1), code=0)


def test_a_page_is_replaced_only_when_forced(command, tmp_path):
    page = tmp_path / "r.html"
    page.write_text("mine")
    arguments = (SQUARE, "--a", "numpy", "--b", "numpy", "--html", page)
    assert "r.html: exists already (replace it with --force" in command(*arguments, code=1)
    assert page.read_text() == "mine"
    command(*arguments, "--force", code=0)
    assert heading(page.read_text())[0] == "yes"


def test_images_are_preprocessed_as_the_file_says(command, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("red", "green"):
        colours.plain(name).save(folder / f"{name}.png")
    arguments = (*IN_FLOAT32, "--images", folder)
    text = command(SQUARE, *arguments, code=0)
    assert "logits of 2 images" in text
    assert "preprocessed by resmall_crop" in text
    assert "preprocessed by squash" in command(SQUARE, *arguments, "--preprocess", "squash", code=0)
    (folder / "blue.png").write_text("no image")
    assert "blue.png: " in command(SQUARE, *arguments, code=1)
    silent = file(tmp_path / "silent.npz", random_weights(TINY), preprocessing=None)
    (folder / "blue.png").unlink()
    error = command(silent, *arguments, code=1)
    assert "silent.npz: names no preprocessing: choose one with --preprocess, of resmall_crop, " in error


def test_files_of_other_preprocessing_see_their_own_pixels(command, tmp_path):
    """The squash of one file against the crop of the other is a cause, and explains what it does."""
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    files = [tmp_path / f"{name}.safetensors" for name in ("resmall_crop", "squash")]
    for path in files:
        convert.write(path, convert.read(SQUARE).with_metadata(preprocessing=path.stem), layout="google")
    out = command(*files, *IN_FLOAT32, "--images", tmp_path / "image.png", "--explain", "--json", code=1)
    entries = json.loads(out)
    (cause,) = (cause for cause in entries["explanation"]["causes"] if cause["name"] == "preprocessing")
    assert (cause["a"], cause["b"]) == ("resmall_crop", "squash")
    assert cause["fraction"] > 0.99
    assert entries["explanation"]["unexplained"]["max_abs"] < 1e-5
    assert entries["about"]["input"]["images"] == "1, preprocessed by resmall_crop; for b preprocessed by squash"


@pytest.mark.parametrize(("dtype", "answer"), [("bfloat16", "yes"), ("float64", "no")])
def test_a_verdict_names_a_difference_of_metadata_that_it_cannot_resolve(command, tmp_path, dtype, answer):
    """With a first layer so small that both GELUs round to the same in bfloat16."""
    small = {name: array * np.float32(1e-3 if "Dense_0" in name else 1) for name, array in random_weights(TINY).items()}
    files = [file(tmp_path / f"{gelu}.safetensors", small, gelu=gelu) for gelu in ("tanh", "exact")]
    arguments = (*files, "--a", f"flax:cpu:{dtype}", "--b", f"flax:cpu:{dtype}")
    line = command(*arguments, code=0 if answer == "yes" else 1).splitlines()[0]
    assert line.startswith(f"{answer}: ")
    unresolved = "; but the files' numerics differ, gelu: tanh against exact, which this cannot tell apart"
    assert line.endswith(unresolved) == (answer == "yes")
