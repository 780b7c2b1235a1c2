"""The command lines as a person runs them: processes, exit codes, what they import, and signals."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import GOLDENS, TINY, random_weights

import convert

SQUARE = GOLDENS["square"].weights_file
NAMES = ["npz", "legacy", "timm", "torch", "reference", "jeonsworld", "flax"]
torch = pytest.mark.torch


def run(*arguments, code=0):
    """Run a Python command line; its standard output, or its standard error if it is to fail."""
    done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr + done.stdout
    assert "Traceback" not in done.stderr
    return done.stderr if code else done.stdout


def loaded(code, *arguments):
    """Which of the heavy modules are in sys.modules after some code has run in a new process."""
    ask = "import sys; print(sorted({'jax', 'torch', 'flax', 'orbax', 'matplotlib'} & set(sys.modules)), file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{ask}", *map(str, arguments)], capture_output=True, text=True, check=True
    )
    return set(eval(done.stderr.splitlines()[-1]))


CLI = "import sys; from convert.__main__ import main\ntry: main(sys.argv[1:])\nexcept SystemExit: pass"


@pytest.mark.parametrize("module", ["convert", "mixer_jax", "mixer_jax.referee"])
def test_importing_a_package_loads_no_framework(module):
    assert loaded(f"import {module}") == set()


def test_help_loads_no_framework():
    assert loaded(CLI, "--help") == set()
    assert loaded(CLI, "npz2torch", "--help") == set()
    assert loaded(CLI.replace("convert", "mixer_jax"), "--help") == set()


def test_inspecting_and_npz_to_npz_load_no_framework(tmp_path):
    assert loaded(CLI, "inspect", SQUARE) == set()
    assert loaded(CLI, "npz2timm", SQUARE, tmp_path / "w.npz") == set()
    assert loaded(CLI, "npz2flax", SQUARE, tmp_path / "w.safetensors") == set()


@torch
def test_npz2torch_never_loads_jax(tmp_path):
    assert loaded(CLI, "npz2torch", SQUARE, tmp_path / "w.pt") == {"torch"}
    assert (tmp_path / "w.pt").exists()


def test_npz2flax_never_loads_torch(tmp_path):
    assert "torch" not in loaded(CLI, "npz2flax", SQUARE, tmp_path / "w")
    assert (tmp_path / "w").is_dir()


def test_the_flax_half_never_loads_torch_and_the_twin_never_jax():
    assert "torch" not in loaded("import sys, mixer_jax; mixer_jax.load(sys.argv[1])", SQUARE)


@torch
def test_the_twin_never_loads_jax():
    assert loaded("import sys; from mixer_jax import torch_model; torch_model.load(sys.argv[1])", SQUARE) == {"torch"}


@pytest.mark.parametrize("ending", [".npz", ".safetensors", pytest.param(".pt", marks=torch), ""])
def test_there_and_back_is_the_same_file(tmp_path, ending):
    there, back = tmp_path / f"there{ending}", tmp_path / "back.npz"
    said = run("-m", "convert", "npz2torch", SQUARE, there)
    assert "1,973 parameters in 30 arrays, timm layout, float32; read back, every bit equal" in said
    assert "tanh GELU, LayerNorm epsilon 1e-06" in said
    assert 'act_layer=partial(nn.GELU, approximate="tanh") makes them equal' in said
    run("-m", "convert", "torch2npz", there, back)
    assert back.read_bytes() == SQUARE.read_bytes()


def main(*arguments):
    """The command line in this process: faster than one of its own, and the same code."""
    from convert.__main__ import main

    before = signal.getsignal(signal.SIGTERM)
    try:
        return main([str(argument) for argument in arguments])
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("target", NAMES)
@pytest.mark.parametrize("source", NAMES)
def test_every_ordered_pair_is_a_command_and_there_and_back_is_the_same_file(tmp_path, golden, source, target):
    if source == target:
        return
    there, back = f"{source}2{target}", f"{target}2{source}"
    convert.write(tmp_path / "in.npz", convert.read(golden.weights_file), layout=source)
    assert main(there, tmp_path / "in.npz", tmp_path / "out.safetensors") == 0
    assert convert.read(tmp_path / "out.safetensors").layout.name == convert.layouts.layout_named(target).name
    assert main(back, tmp_path / "out.safetensors", tmp_path / "back.npz") == 0
    assert (tmp_path / "back.npz").read_bytes() == (tmp_path / "in.npz").read_bytes()


def test_the_verb_goes_without_saying(tmp_path):
    run("-m", "convert", SQUARE, tmp_path / "w.npz", "--to", "jeonsworld")
    assert convert.read(tmp_path / "w.npz").layout.name == "jeonsworld"
    run("-m", "convert", SQUARE, tmp_path / "w.safetensors")
    assert convert.read(tmp_path / "w.safetensors").layout.name == "timm"
    assert "no.npz: no such file" in run("-m", "convert", tmp_path / "no.npz", tmp_path / "x.npz", "--to", "timm", code=1)
    assert "invalid choice" in run("-m", "convert", SQUARE, tmp_path / "x.npz", "--to", "keras", code=2)


def test_a_dry_run_shows_what_becomes_of_each_array_and_writes_nothing(tmp_path):
    said = run("-m", "convert", "npz2torch", SQUARE, tmp_path / "w.pt", "--dry-run").splitlines()
    assert len(said) == 1 + 30
    assert said[0].split() == ["source", "target", "axes", "dtype"]
    (kernel,) = [line for line in said if "blocks.1.mlp_tokens.fc1.weight" in line]
    assert " ".join(kernel.split()).endswith("Dense_0/kernel blocks.1.mlp_tokens.fc1.weight i o -> o i float32")
    rows = json.loads(run("-m", "convert", "npz2flax", SQUARE, tmp_path / "w", "--dry-run", "--json"))
    assert {"source": "stem/bias", "target": "stem/bias", "axes": "o -> o", "dtype": "float32"} in rows
    assert rows[4]["axes"] == "i o -> l i o"
    assert not list(tmp_path.iterdir())


def test_the_head_the_labels_and_the_grid_can_be_changed(tmp_path):
    (tmp_path / "labels.txt").write_text("\n".join("abcdefg"))
    (tmp_path / "some.txt").write_text("f\nb")
    target = tmp_path / "w.safetensors"
    assert main("npz2timm", SQUARE, target, "--labels", tmp_path / "labels.txt") == 0
    assert convert.read(target).metadata.labels == tuple("abcdefg")
    assert main("timm2npz", target, tmp_path / "some.npz", "--classes", tmp_path / "some.txt") == 0
    assert convert.read(tmp_path / "some.npz").metadata.labels == ("f", "b")
    assert main("timm2npz", target, tmp_path / "list.npz", "--classes", "5,1", "--dtype", "bfloat16") == 0
    assert convert.read(tmp_path / "list.npz").metadata.labels == ("f", "b")
    assert main("timm2npz", target, tmp_path / "none.npz", "--drop-head") == 0
    assert convert.read(tmp_path / "none.npz").sizes["num_classes"] == 0
    assert main("timm2npz", target, tmp_path / "zero.npz", "--num-classes", "3") == 0
    assert not np.asarray(convert.read(tmp_path / "zero.npz").arrays["head/kernel"]).any()
    assert main("timm2npz", target, tmp_path / "big.npz", "--resize-to", "40") == 0
    assert convert.read(tmp_path / "big.npz").config.grid == (8, 8)
    assert main("timm2npz", target, tmp_path / "wide.npz", "--resize-to", "20x30") == 1
    assert main("timm2npz", target, tmp_path / "wide.npz", "--resize-to", "20x30", "--resample") == 0
    assert convert.read(tmp_path / "wide.npz").config.grid == (4, 6)
    assert main("timm2npz", target, tmp_path / "x.npz", "--classes", "a,z") == 1
    assert main("timm2npz", target, tmp_path / "x.npz", "--classes", "0,0") == 1
    assert not (tmp_path / "x.npz").exists()


def test_compare_says_whether_and_where(tmp_path):
    legacy = SQUARE.with_name("legacy.npz")
    assert "the same weights: fingerprint " in run("-m", "convert", "compare", SQUARE, legacy)
    weights = GOLDENS["square"].weights
    kernel = "MixerBlock_1/channel_mixing/Dense_0/kernel"
    np.savez(tmp_path / "other.npz", **weights | {kernel: weights[kernel] + np.eye(10, 14, dtype="float32")})
    done = subprocess.run(
        [sys.executable, "-m", "convert", "compare", SQUARE, tmp_path / "other.npz"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert f"{kernel}: values, largest difference 1" in done.stdout
    assert "error: not the same weights: 1 of 30 arrays differ" in done.stderr
    said = run("-m", "convert", "compare", SQUARE, SQUARE.with_name("timm.safetensors"))
    assert "not the same numerics: gelu: tanh against exact" in said


def test_the_wrong_command_is_told_the_right_one(tmp_path):
    assert "is in the google layout, not timm: use npz2flax or --to flax" in run(
        "-m", "convert", "timm2flax", SQUARE, tmp_path / "w.npz", code=1
    )


def test_a_persons_mistakes_are_one_message(tmp_path):
    page = tmp_path / "page.npz"
    page.write_text("<html>404</html>")
    for arguments, code, message in (
        (["npz2torch", page, tmp_path / "w.npz"], 1, f"error: {page}: a web page"),
        (["npz2torch", tmp_path / "no.npz", tmp_path / "w.npz"], 1, "no.npz: no such file or folder"),
        (["npz2torch", SQUARE, page], 1, "page.npz: exists already (replace it with --force"),
        (["npz2torch", SQUARE, tmp_path], 1, "a folder is in the way"),
        (["npz2torch", page, page, "--force"], 1, "a web page"),
        (["npz2torch", SQUARE, tmp_path / "w.h5"], 1, "no format has the ending '.h5'"),
        (["npz2torch", SQUARE, tmp_path / "w.npz", "--variant", "B/16"], 1, "not a Mixer-B/16"),
        (["npz2torch", SQUARE, tmp_path / "w.npz", "--blocks", "9"], 1, "found 2 blocks, wanted 9"),
        (["npz2torch", SQUARE], 2, "the following arguments are required: target"),
        (["npz2rust", SQUARE, tmp_path / "w"], 2, "invalid choice: 'npz2rust'"),
        (["npz2torch", SQUARE, tmp_path / "w.npz", "--image-size", "big"], 2, "'big' is no size: 224 or 224x448"),
        (["npz2torch", SQUARE, tmp_path / "w.npz", "--variant", "B16"], 2, "no variant 'B16'"),
        ([], 2, "the following arguments are required: COMMAND"),
    ):
        assert message in run("-m", "convert", *arguments, code=code)
    assert list(tmp_path.iterdir()) == [page]


def test_the_source_is_never_overwritten(tmp_path):
    source = tmp_path / "w.npz"
    source.write_bytes(SQUARE.read_bytes())
    assert "is the source itself; give another name" in run("-m", "convert", "npz2torch", source, source, "--force", code=1)
    assert source.read_bytes() == SQUARE.read_bytes()


def test_options_of_reading_reach_the_file(tmp_path):
    np.savez(tmp_path / "w.npz", **random_weights(TINY, dtype="float64"))
    said = run("-m", "convert", "npz2flax", tmp_path / "w.npz", tmp_path / "no.npz", code=1)
    assert "float64 weights" in said
    run("-m", "convert", "npz2flax", tmp_path / "w.npz", tmp_path / "f.npz", "--dtype", "float32", "--image-size", "8x15")
    read = convert.read(tmp_path / "f.npz")
    assert (read.dtype.name, read.config.grid) == ("float32", (4, 5))


def test_inspect_says_what_a_file_is(tmp_path):
    convert.write(tmp_path / "w.npz", convert.read(SQUARE).with_metadata(gelu="exact"), layout="flax")
    facts = json.loads(run("-m", "convert", "inspect", tmp_path / "w.npz", "--json"))
    assert facts["layout"] == "flax"
    assert facts["format"] == "npz"
    assert facts["grid"] == "4x4 (assumed, being square), images of 20x20 pixels"
    assert (facts["blocks"], facts["classes"], facts["parameters"]) == (2, 7, 1973)
    assert len(facts["arrays"]) == 18
    kernel = GOLDENS["square"].weights["head/kernel"].astype("float64")
    (head,) = [row for row in facts["arrays"] if row["array"] == "head/kernel"]
    assert (head["shape"], head["norm"]) == ("10x7", f"{np.linalg.norm(kernel):.6g}")
    assert all((row["NaN"], row["infinite"], row["zeros"]) == (0, 0, "0.00%") for row in facts["arrays"])
    assert facts["gelu"] == "exact (the file says so)"
    assert facts["layer_norm_epsilon"] == "1e-06 (flax's default)"
    weights = random_weights(TINY)
    weights["head/bias"][:3] = [np.nan, np.inf, 0]
    np.savez(tmp_path / "odd.npz", **weights)
    odd = json.loads(run("-m", "convert", "inspect", tmp_path / "odd.npz", "--json"))["arrays"]
    (bias,) = [row for row in odd if row["array"] == "head/bias"]
    assert (bias["NaN"], bias["infinite"], bias["zeros"]) == (1, 1, "20.00%")
    said = run("-m", "convert", "inspect", GOLDENS["rectangular"].weights_file)
    assert "unknown: 20 tokens of 2x6 pixels are no square grid" in said


def test_summary_of_a_variant_and_of_a_file():
    said = run("-m", "mixer_jax", "summary", "B/16")
    assert "59,880,472" in said
    assert "25.204" in said
    facts = json.loads(run("-m", "mixer_jax", "summary", "L/16", "--num-classes", "21843", "--json"))
    assert facts["parameters"] == 229_560_243
    assert sum(m["count"] * m["parameters"] for m in facts["modules"]) == 229_560_243
    facts = json.loads(run("-m", "mixer_jax", "summary", SQUARE, "--json"))
    assert facts["parameters"] == sum(array.size for array in GOLDENS["square"].weights.values())
    assert "no variant 'B16': one of S, B, L, H" in run("-m", "mixer_jax", "summary", "B16", code=1)


# A conversion that takes its time, so that it can be interrupted in the middle.
SLOW = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a background job of a shell inherits as ignored
from convert.containers import npz
write = npz.write
def slowly(path, arrays, metadata):
    write(path, arrays, metadata)
    print("writing", flush=True)
    time.sleep(60)
npz.write = slowly
from convert.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("force", [False, True])
def test_an_interrupted_conversion_leaves_nothing_behind(tmp_path, sent, code, force):
    target = tmp_path / "w.npz"
    if force:
        target.write_text("what was there before")
    arguments = ["npz2torch", str(SQUARE), str(target)] + ["--force"] * force
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "writing\n"
    assert [name for name in os.listdir(tmp_path) if not name.endswith(".tmp")] == ["w.npz"] * force
    process.send_signal(sent)
    started = time.monotonic()
    _, said = process.communicate(timeout=30)
    assert time.monotonic() - started < 30
    assert process.returncode == code
    assert "Traceback" not in said
    assert os.listdir(tmp_path) == ["w.npz"] * force
    assert not force or target.read_text() == "what was there before"
