"""What parity found, in its three forms, and the command as a person runs it."""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace
from xml.etree import ElementTree

import colours
import numpy as np
import pytest
from conftest import GOLDENS, TINY, random_images, random_weights
from PIL import Image
from sides import checkpoint

import convert
from mixer_jax import parity_command
from mixer_jax.__main__ import main
from mixer_jax.parity import Side, compare
from mixer_jax.report import Findings, as_dict, as_html, as_html_of_many, as_text, verdict

SQUARE = GOLDENS["square"].weights_file
REFEREE, FLAX = Side.parsed("referee"), Side("flax")
FAULT = "blocks/1/token_mixing/gelu"


@pytest.fixture(scope="module")
def weights():
    return checkpoint(random_weights(TINY), TINY)


@pytest.fixture(scope="module")
def honest(weights):
    extras = ("explain", "predict")
    return parity_command.findings(weights, random_images(TINY), REFEREE, FLAX, source="w.npz", said="noise", extras=extras)


def tampered(weights, change):
    """A report on a side that has one element of one operation changed."""
    run = FLAX.open(weights)

    def faulty(images, tap):
        def seen(name, array):
            if name == FAULT:
                array = array.copy()
                array[0, 0, 0] = change(array[0, 0, 0])
            return array if tap is None else tap(name, array)

        return run(images, seen)

    return compare(weights, random_images(TINY), REFEREE, FLAX, runs=(None, faulty))


@pytest.fixture(scope="module")
def failed(weights):
    return Findings(tampered(weights, lambda value: value + 0.01), "w.npz")


def said(page):
    """What a page shows first."""
    return re.search(r"<body>\s*<h1 class=\"(\w+)\">(.*?)</h1>", page).groups()


def drawn(page):
    """The plots of a page: growth, then the operations' own errors."""
    growth, local = (ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    return growth, local


def of_class(svg, name):
    return [element for element in svg.iter() if name in element.get("class", "").split()]


def points(element):
    return np.array([[float(number) for number in point.split(",")] for point in element.get("points").split()])


def test_the_verdict_comes_first_in_all_three_forms(honest):
    assert verdict(honest).startswith(
        "yes: referee and flax:cpu:float32:highest compute the same from w.npz; the logits differ"
    )
    assert as_text(honest).splitlines()[0] == verdict(honest)
    assert as_dict(honest)["passed"] is True
    assert as_dict(honest)["verdict"] == verdict(honest)
    assert said(as_html(honest)) == ("yes", verdict(honest))


def test_a_fault_is_a_no_that_names_the_operation_in_all_three_forms(failed):
    line = "no: referee and flax:cpu:float32:highest do not compute the same from w.npz; the first operation outside its "
    assert verdict(failed).startswith(f"{line}budget is block 1, token_mixing, gelu, in flax:cpu:float32:highest: ")
    text = as_text(failed).splitlines()
    assert text[0] == verdict(failed)
    assert re.search(r"block 1 .* [\d.,]+ times  token_mixing, gelu$", "\n".join(text), re.MULTILINE)
    found = json.loads(json.dumps(as_dict(failed), allow_nan=False))
    assert found["passed"] is False
    assert found["first"]["operation"] == FAULT
    assert found["first"]["side"] == "flax:cpu:float32:highest"
    assert found["first"]["text"] in found["verdict"]
    page = as_html(failed)
    assert said(page) == ("no", verdict(failed))
    assert page.index('class="off"') < page.index("<details>")


def test_the_numbers_in_json_are_the_reports(honest, failed):
    for findings in (honest, failed):
        report, found = findings.report, json.loads(json.dumps(as_dict(findings), allow_nan=False))
        assert found["agreement"] == asdict(report.logits)
        assert found["budget"] == asdict(report.logits_budget)
        assert found["share"] == report.share
        assert found["sides"] == [str(report.a), str(report.b)]
        for operation, row in zip(report.operations, found["operations"], strict=True):
            assert row == {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(operation).items()}


def test_the_page_needs_nothing_else(honest, failed):
    for page in (as_html(honest), as_html(failed), as_html_of_many("all", [honest, failed], ["a device"])):
        assert not re.search(r"https?:|//\w|src=|href=|url\(|@import|<script|<link|<iframe", page)
        assert 'name="viewport" content="width=device-width' in page
        assert "prefers-color-scheme: dark" in page


def test_the_growth_is_drawn_on_one_band_of_its_budget(honest):
    growth, local = drawn(as_html(honest))
    (band,), (line,) = of_class(growth, "band"), of_class(growth, "growth")
    operations = honest.report.operations
    assert not of_class(local, "band")
    assert len(points(line)) == len(operations) == len(points(band)) - 2
    # A larger value lies higher, which is a smaller y: the line is inside the band exactly where growth is in its budget.
    inside = points(line)[:, 1] >= points(band)[1:-1, 1]
    assert inside.tolist() == [operation.growth <= operation.growth_budget for operation in operations]
    assert all(inside)
    assert len(of_class(local, "side-a")) == len(of_class(local, "side-b")) == len(operations)
    assert not of_class(growth, "off") + of_class(local, "off") + of_class(growth, "first")


def test_what_leaves_its_budget_is_drawn_so(failed):
    growth, local = drawn(as_html(failed))
    (band,), (line,) = of_class(growth, "band"), of_class(growth, "growth")
    operations = failed.report.operations
    over = [operation.growth > operation.growth_budget for operation in operations]
    assert (points(line)[:, 1] < points(band)[1:-1, 1]).tolist() == over
    assert len(of_class(growth, "off")) == sum(over) > 0
    assert len(of_class(local, "off")) == 1
    assert of_class(growth, "first-label")[0].text == "block 1, token_mixing, gelu"
    (mark,) = of_class(growth, "first")
    assert float(mark.get("x1")) == points(line)[[operation.name for operation in operations].index(FAULT)][0]


def test_one_operation_that_is_not_finite_is_a_no_in_legal_json(weights, failed):
    finite = failed.report
    broken = [replace(op, growth=np.inf, local=(0.0, np.inf), share=(0.0, np.inf)) for op in finite.operations]
    found = Findings(replace(finite, operations=broken), "w.npz")
    row = json.loads(json.dumps(as_dict(found), allow_nan=False))["operations"][0]
    assert (row["growth"], row["local"], row["share"]) == (None, [0.0, None], [0.0, None])
    assert "not finite" in as_text(found)
    growth, _ = drawn(as_html(found))
    assert len(of_class(growth, "off")) == len(broken)


def test_names_of_files_are_text_on_the_page(failed):
    page = as_html(replace(failed, source='<b onload="x">&.npz', about={"<i>": {"<u>": "</dl>"}}))
    assert "&lt;b onload=&quot;x&quot;&gt;&amp;.npz" in page
    assert not re.search("<b |<i>|<u>|</dl></dd>", page)


def test_a_share_above_all_of_the_budget_is_never_told_as_all_of_it(failed):
    def of(share):
        return verdict(Findings(replace(failed.report, share=share, first=None), "w.npz"))

    assert "use 100% of their budget" in of(1.0)
    assert "use 99% of their budget" in of(0.9999)
    assert of(1.0).startswith("yes")
    assert re.search(r"use over 100% of their budget of \S+, though no operation is outside its own", of(1.0001))
    assert "use 2.5 times their budget" in of(2.5)
    assert of(1.0001).startswith("no")


def test_what_else_was_asked_for_is_in_all_three_forms(honest):
    text, page, found = as_text(honest), as_html(honest), as_dict(honest)
    assert found["explanation"]["causes"][0]["name"] == "GELU"
    assert len(found["predictions"]) == 7
    for shown in (text, page):
        assert "unexplained is the gap as it is: within what rounding may leave" in shown
        assert "six bfloat16 passes" in shown
        assert "redicted here, not measured" in shown


def test_the_report_tells_what_its_figures_depend_on(honest, weights):
    about = as_dict(honest)["about"]
    assert about["weights"]["fingerprint"] == convert.identity.fingerprint(weights.arrays, weights.layout)
    assert about["weights"]["numerics"] == "tanh GELU, LayerNorm epsilon 1e-06"
    assert about["input"]["images"] == "2, noise"
    assert about["second side"]["side"] == "flax:cpu:float32:highest"
    assert {"Python", "numpy", "jax", "flax"} <= about["versions"].keys()
    assert "torch" not in about["versions"]
    assert {"system", "processor", "cores"} <= about["machine"].keys()


# The command.


def process(*arguments, code):
    command = [sys.executable, "-m", "mixer_jax", "parity", *map(str, arguments)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout, done.stderr


def command(capsys, *arguments, code):
    """The same in this process: faster, and the same code."""
    try:
        found = main(["parity", *map(str, arguments)])
    except SystemExit as end:
        found = end.code
    out, err = capsys.readouterr()
    assert found == code, out + err
    return err if code else out


def file(path, weights, config=TINY, **numerics):
    convert.write(path, checkpoint(weights, config).with_metadata(**numerics), layout="google")
    return path


@pytest.mark.torch
def test_a_yes_is_exit_code_0_and_flax_against_the_twin_goes_without_saying(tmp_path):
    out, err = process(SQUARE, "--html", tmp_path / "r.html", code=0)
    line = out.splitlines()[0]
    assert line.startswith("yes: flax:cpu:float32:highest and torch:cpu:float32:highest compute the same from google.npz")
    assert said((tmp_path / "r.html").read_text()) == ("yes", line)
    assert "torch.backends.cuda.matmul.fp32_precision ieee" in out
    assert err == ""


def test_a_no_is_exit_code_1_with_the_report_and_no_error(tmp_path):
    """Other weights in the second file, in one bias."""
    wrong = random_weights(TINY)
    wrong["MixerBlock_1/channel_mixing/Dense_0/bias"][3] += 0.01
    right, wrong = file(tmp_path / "right.npz", random_weights(TINY)), file(tmp_path / "wrong.npz", wrong)
    out, err = process(right, wrong, "--a", "referee", "--b", "flax", "--json", code=1)
    found = json.loads(out)
    assert found["first"]["operation"] == "blocks/1/channel_mixing/dense_0"
    assert "do not compute the same from right.npz and wrong.npz; the first" in found["verdict"]
    assert found["about"]["weights"]["fingerprint"] != found["about"]["second weights"]["fingerprint"]
    assert err == ""


@pytest.mark.parametrize(
    ("side", "message"),
    [
        ("keras", "a side's name is one of flax, torch, timm, referee, not 'keras'"),
        ("flax:npu", "a side's device is one of cpu, gpu, tpu, not 'npu'"),
        ("flax:cpu:int8", "a side's dtype is one of"),
        ("flax:cpu:float32:most", "a side's precision is one of highest, high, default, not 'most'"),
        ("flax:cpu:float32:high:x", "a side is NAME[:DEVICE[:DTYPE[:PRECISION]]], not"),
        ("referee:gpu", "the referee computes in float64 on the CPU"),
    ],
)
def test_a_side_that_does_not_exist_is_a_usage_error(capsys, side, message):
    assert message in command(capsys, SQUARE, "--a", side, code=2)


def test_other_usage_errors(capsys, tmp_path):
    assert "fewer than 8 draws say too little" in command(capsys, SQUARE, "--draws", "7", code=2)
    assert "'0' is no whole number of at least 1" in command(capsys, SQUARE, "--count", "0", code=2)
    assert "--exact is asked in float64" in command(capsys, SQUARE, "--exact", "--b", "torch:cpu:bfloat16", code=2)
    for extra in (["--b", "flax"], ["--images", tmp_path], ["--html", tmp_path / "r.html"]):
        assert "--self-test is of one FILE on one side" in command(capsys, SQUARE, "--self-test", *extra, code=2)
    assert "--self-test is of one FILE on one side" in command(capsys, SQUARE, SQUARE, "--self-test", code=2)


def test_a_device_that_is_not_there_is_one_error_line():
    out, err = process(SQUARE, "--a", "flax:gpu", "--b", "referee", code=1)
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("error: JAX finds no gpu here: ")


def test_a_fresh_head_is_refused(capsys, tmp_path):
    weights = random_weights(TINY)
    weights["head/kernel"][:] = weights["head/bias"][:] = 0
    path = file(tmp_path / "w.npz", weights)
    said = command(capsys, path, "--a", "referee", "--b", "flax", code=1)
    assert said == "error: w.npz: the logits of an image are all alike, as after a fresh head: any two models would agree\n"
    assert "w.npz: the logits of an image are all alike" in command(capsys, path, "--self-test", code=1)


def test_weights_that_are_not_finite_are_refused(capsys, tmp_path):
    weights = random_weights(TINY)
    weights["MixerBlock_1/LayerNorm_0/bias"][2] = np.nan
    path = tmp_path / "w.npz"
    np.savez(path, **weights)
    sides = ("--a", "referee", "--b", "flax", "--image-size", "8x15")
    assert "MixerBlock_1/LayerNorm_0/bias: 1 NaN and 0 infinite values" in command(capsys, path, *sides, code=1)
    refused = command(capsys, path, *sides, "--allow-nonfinite", code=1)
    assert refused == "error: w.npz: there are NaN or infinite logits: parity says nothing of them\n"


def test_files_of_different_images_are_refused(capsys, tmp_path):
    other = replace(TINY, image_size=(8, 12))
    paths = file(tmp_path / "a.npz", random_weights(TINY)), file(tmp_path / "b.npz", random_weights(other), other)
    said = command(capsys, *paths, "--a", "referee", "--b", "flax", code=1)
    assert "a.npz and b.npz: one takes images of (8, 15, 3) and the other of (8, 12, 3): no input is common" in said


def test_more_images_than_memory_holds_are_refused_before_anything_runs(capsys, monkeypatch):
    monkeypatch.setattr(parity_command, "_memory", lambda: 1 << 20)
    said = command(capsys, SQUARE, "--a", "referee", "--b", "referee", "--count", "1000", code=1)
    fits = re.fullmatch(r"error: 1000 images need [\d.]+ GiB for .*, and the machine has 0.0: (\d+) at most\n", said).group(1)
    command(capsys, SQUARE, "--a", "referee", "--b", "referee", "--count", fits, code=0)


def test_a_page_is_replaced_only_when_forced(capsys, tmp_path):
    page = tmp_path / "r.html"
    page.write_text("mine")
    arguments = (SQUARE, "--a", "referee", "--b", "referee", "--html", page)
    assert "r.html: exists already (replace it with --force" in command(capsys, *arguments, code=1)
    assert page.read_text() == "mine"
    command(capsys, *arguments, "--force", code=0)
    assert said(page.read_text())[0] == "yes"


def test_images_are_prepared_as_the_file_says(capsys, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("red", "green"):
        colours.plain(name).save(folder / f"{name}.png")
    sides = ("--a", "referee", "--b", "flax", "--images", folder)
    found = command(capsys, SQUARE, *sides, code=0)
    assert "logits of 2 images" in found
    assert "prepared by resmall_crop" in found
    assert "prepared by squash" in command(capsys, SQUARE, *sides, "--preprocess", "squash", code=0)
    (folder / "blue.png").write_text("no image")
    assert "blue.png: no image in a format that Pillow knows" in command(capsys, SQUARE, *sides, code=1)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "a folder without images" in command(capsys, SQUARE, *sides[:-1], empty, code=1)
    silent = file(tmp_path / "silent.npz", random_weights(TINY), preprocessing=None)
    refused = command(capsys, silent, *sides, code=1)
    assert "silent.npz: does not say how an image becomes its input: say --preprocess, one of" in refused


def test_exactly_equal_in_float64_is_said_and_counts(capsys, tmp_path):
    sides = ("--a", "referee", "--b", "flax", "--exact")
    found = json.loads(command(capsys, SQUARE, *sides, "--json", code=0))
    assert found["sides"] == ["referee", "flax:cpu:float64:highest"]
    assert found["exactness"]["passed"] is True
    assert found["exactness"]["count"] == 14
    assert "of 14 bit-equal" in command(capsys, SQUARE, *sides, code=0)


def test_logits_apart_in_float64_are_a_no(honest):
    from mixer_jax.explain import Exactness

    found = replace(honest, exactness=Exactness(10, [(0, 1, 1.0, 1.0)], [(1, 2, 1.0, 1.5), (1, 3, 1.0, 1.5)]))
    assert verdict(found).startswith("no: ")
    assert "in float32 2 of the logits differ by more than a rounding boundary" in verdict(found)
    for shown in (as_text(found), as_html(found)):
        assert "APART: image 1, class 2" in shown
        assert "7 of 10 bit-equal, 1 straddle a rounding boundary, 2 are further apart" in shown


def test_the_self_test_needs_no_second_side(capsys):
    assert "hold" in command(capsys, SQUARE, "--self-test", code=0)
    found = json.loads(command(capsys, SQUARE, "--self-test", "--json", "--a", "flax", code=0))
    assert found["side"] == "flax:cpu:float32:highest"
    assert found["passed"] is True
    assert {identity["passed"] for identity in found["identities"]} <= {True, None}


def test_a_terminal_is_told_what_goes_on_where_that_takes_long(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for stream, patience, wanted in ((Terminal(), 0.0, "running flax ...\n"), (Terminal(), 1e6, ""), (io.StringIO(), 0.0, "")):
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setattr(parity_command, "PATIENCE", patience)
        with parity_command._Stages() as stage:
            stage("running flax")
            if wanted:
                stage._timer.join()
        assert stream.getvalue() == wanted


def test_files_of_other_preprocessing_see_their_own_pixels(capsys, tmp_path):
    """The squash of one file against the crop of the other is a cause, and explains what it does."""
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (60, 90, 3), np.uint8)).save(tmp_path / "image.png")
    source = convert.read(SQUARE)
    for name in ("resmall_crop", "squash"):
        convert.write(tmp_path / f"{name}.safetensors", source.with_metadata(preprocessing=name), layout="google")
    files = [tmp_path / f"{name}.safetensors" for name in ("resmall_crop", "squash")]
    sides = ("--a", "referee", "--b", "flax", "--images", tmp_path / "image.png")
    with pytest.raises(SystemExit, match="1"):
        main(["parity", *map(str, (*files, *sides)), "--explain", "--json"])
    found = json.loads(capsys.readouterr().out)
    causes = {cause["name"]: cause for cause in found["explanation"]["causes"]}
    assert (causes["preprocessing"]["a"], causes["preprocessing"]["b"]) == ("resmall_crop", "squash")
    assert causes["preprocessing"]["share"] > 0.99
    assert found["explanation"]["unexplained"]["largest"] < 1e-5


@pytest.mark.parametrize("over", ["largest", "rms"])
def test_the_verdict_prints_the_figure_that_is_over_its_budget(honest, over):
    """Never "7.6e-07, budget 9.4e-07" of a comparison that failed."""
    budget = honest.report.logits_budget
    figures = {"largest": 0.5 * budget.largest, "rms": 0.5 * budget.rms} | {over: 3 * getattr(budget, over)}
    report = replace(honest.report, logits=replace(honest.report.logits, **figures), share=3.0)
    line = verdict(replace(honest, report=report))
    words = {"largest": "at most", "rms": "in root mean square"}[over]
    assert line.startswith("no: ")
    assert f"differ by {figures[over]:.1e} {words} and use 3 times their budget of {getattr(budget, over):.1e}" in line


@pytest.mark.parametrize(("dtype", "answer"), [("bfloat16", "yes"), ("float64", "no")])
def test_a_verdict_names_a_stated_difference_that_it_cannot_resolve(capsys, tmp_path, dtype, answer):
    """With a first layer so small that both GELUs round to the same in bfloat16."""
    found = convert.read(SQUARE)
    arrays = {n: np.asarray(a) * np.float32(1e-3 if "Dense_0" in n else 1) for n, a in found.arrays.items()}
    for gelu in ("tanh", "exact"):
        convert.write(tmp_path / f"{gelu}.safetensors", replace(found, arrays=arrays).with_metadata(gelu=gelu))
    files = [str(tmp_path / f"{gelu}.safetensors") for gelu in ("tanh", "exact")]
    with contextlib.suppress(SystemExit):  # of a no
        main(["parity", *files, "--a", f"flax:cpu:{dtype}", "--b", f"flax:cpu:{dtype}"])
    line = capsys.readouterr().out.splitlines()[0]
    assert line.startswith(f"{answer}: ")
    unresolved = "; but the files state different numerics, gelu: tanh against exact, which this cannot tell apart"
    assert line.endswith(unresolved) == (answer == "yes")
