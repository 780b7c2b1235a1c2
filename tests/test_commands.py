"""The command lines as a person runs them: processes, exit codes, what they import, and signals."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import GOLDENS, TINY, random_weights

import convert
from convert import MixerConfig

ROOT = Path(__file__).parent.parent
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


def test_what_lies_in_the_folder_breaks_no_verb(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for verb in ("inspect", "compare", "download", "convert", "npz2torch", "timm2npz"):
        (tmp_path / verb).mkdir()
    assert "google" in run("-m", "convert", "inspect", SQUARE)
    assert "the same weights" in run("-m", "convert", "compare", SQUARE, SQUARE)
    assert main("npz2torch", SQUARE, "w.npz") == main("convert", "w.npz", "v.npz", "--to", "flax") == 0
    assert main("download", "nothing") == 1
    assert "'nothing' is no published checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("verb", "near"),
    [
        ("npz2pt", "npz2torch"),
        ("google2pytorch", "npz2torch"),
        ("pth2jax", "torch2flax"),
        ("npz2troch", "npz2torch"),
        ("inspekt", "inspect"),
        ("compar", "compare"),
    ],
)
def test_an_unknown_verb_is_told_the_nearest(verb, near, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(verb, SQUARE, "w.pt")
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert f"error: no command {verb!r}: did you mean {near}?" in said
    assert said.count("2") < 12  # and not every pair


def test_an_unknown_verb_is_no_source_for_the_sake_of_an_option(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main("npz2pt", SQUARE, "w.pt", "--to", "torch")
    assert "error: no command 'npz2pt': did you mean npz2torch?" in capsys.readouterr().err
    (tmp_path / "npz2pt").write_bytes(SQUARE.read_bytes())
    assert main("npz2pt", "w.npz", "--to", "torch") == 0  # a file of that name is one


@pytest.mark.parametrize("line", ["--force FILE w.npz", "--to=timm FILE w.npz", "./inspect w.npz", "--resize-to 40 FILE w.npz"])
def test_the_verb_goes_without_saying_before_options_and_paths(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    convert.write(tmp_path / "inspect.npz", convert.read(SQUARE))
    (tmp_path / "inspect.npz").rename(tmp_path / "inspect")
    assert main(*line.replace("FILE", str(SQUARE)).split()) == 0
    assert (tmp_path / "w.npz").exists()


def test_an_unknown_verb_without_a_neighbour_is_told_what_there_is():
    said = run("-m", "convert", "xyzzy", code=2)
    assert said.endswith(
        "error: no command 'xyzzy': the commands are inspect, compare, download, convert and A2B, as in npz2torch; A and B are "
        "of flax, jeonsworld, legacy, npz, reference, timm, torch\n"
    )
    assert "no command 'predit': did you mean predict? the commands are summary, demo, predict" in run(
        "-m", "mixer_jax", "predit", "x", code=2
    )


def test_help_shows_at_a_glance_what_there_is():
    said = " ".join(run("-m", "convert", "--help").split())
    assert "A2B is from layout A to layout B, as in npz2torch; each is one of flax, jeonsworld, legacy, npz, reference" in said
    for row in ("convert to the layout of --to", "npz2torch Google's .npz for PyTorch; A2B", "inspect what a file is"):
        assert row in said


@pytest.mark.parametrize("module", ["convert", "mixer_jax"])
def test_every_verbs_usage_begins_with_what_a_person_types(module, capsys):
    program = importlib.import_module(f"{module}.__main__")
    for verb in program.VERBS:
        with pytest.raises(SystemExit):
            program.main([verb, "--help"])
        assert capsys.readouterr().out.startswith(f"usage: python -m {module} {verb} [-h]")
    verb = program.VERBS[0]
    assert run("-m", module, verb, code=2).startswith(f"usage: python -m {module} {verb} [-h]")


IGNORED = {  # what a person may add to a command that would make nothing of it
    "convert npz2torch FILE w.npz --to flax": "--to: npz2torch says the layout already",
    "convert npz2torch FILE w.npz --resample": "--resample: says how --resize-to goes about it, which is not there",
    "convert inspect FILE --allow-nonfinite": "--allow-nonfinite: inspect counts NaN and infinity in any file",
    "mixer_jax summary FILE --num-classes 1000": "--num-classes: is of a variant, and",
    "mixer_jax summary FILE --num-classes 0": "--num-classes: is of a variant, and",
    "mixer_jax summary B/16 --blocks 12": "--blocks: is of a file, and B/16 is none",
    "mixer_jax summary B/16 --variant B/16 --dtype float32": "--variant, --dtype: is of a file, and B/16 is none",
    "mixer_jax summary B/16 --key ema --allow-nonfinite": "--key, --allow-nonfinite: is of a file, and B/16 is none",
    "mixer_jax demo FILE --validate": "--validate is of training, and",
    "mixer_jax demo --validate --folder x": "--folder: --validate writes nothing",
    "mixer_jax predict FILE x --force": "--force: replaces OUT.npy, and --features does not name one",
    "mixer_jax evaluate FILE x --force": "--force: replaces OUT.png, and --confusion does not name one",
    "mixer_jax parity FILE --images x --count 2": "--count: is of noise, and --images names the images",
    "mixer_jax parity FILE --preprocess squash": "--preprocess: is of images, and noise takes none",
    "mixer_jax parity FILE --force": "--force: replaces OUT.html, and --html does not name one",
    "mixer_jax parity FILE --self-test --explain": "--explain: is of two sides, and --self-test of one",
    "mixer_jax parity FILE --self-test --exact --predict": "--exact, --predict: is of two sides, and --self-test of one",
    "mixer_jax draw FILE x.png --what norms --units 3": "--units chooses units, and norms are of whole arrays",
    "mixer_jax draw FILE x.png --what stem --only 0": "--only chooses blocks, and the stem is in none",
}


@pytest.mark.parametrize("line", IGNORED)
def test_an_option_that_would_be_ignored_is_a_usage_error(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    module, *arguments = line.replace("FILE", str(SQUARE)).split()
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(f"{module}.__main__").main(arguments)
    assert stopped.value.code == 2
    assert f"error: {IGNORED[line]}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_ignored_option_is_a_usage_error_of_the_process(tmp_path):
    said = run("-m", "convert", "npz2torch", SQUARE, tmp_path / "w.npz", "--to", "flax", code=2)
    assert "--to: npz2torch says the layout already; leave out one of them" in said


def test_numbers_that_make_no_sense_are_usage_errors(tmp_path):
    for arguments, message in (
        (["convert", "npz2torch", SQUARE, "w.npz", "--num-classes", "-1"], "'-1' is no whole number of at least 0"),
        (["convert", "npz2torch", SQUARE, "w.npz", "--resize-to", "0"], "'0' is no size: 224 or 224x448, height first"),
        (["convert", "inspect", SQUARE, "--image-size", "0x20"], "'0x20' is no size: 224 or 224x448, height first"),
        (["convert", "inspect", SQUARE, "--blocks", "0"], "'0' is no whole number of at least 1"),
        (["mixer_jax", "summary", "B/16", "--image-size", "0"], "'0' is no size: 224 or 224x448, height first"),
        (["mixer_jax", "summary", "B/16", "--num-classes", "-1"], "'-1' is no whole number of at least 0"),
        (["mixer_jax", "parity", SQUARE, "--seed", "-1"], "'-1' is no whole number of at least 0"),
    ):
        assert f"error: argument {arguments[-2]}: {message}" in run("-m", *arguments, code=2)


def test_an_existing_target_is_refused_before_the_source_is_read(tmp_path):
    (tmp_path / "there.npz").touch()
    (tmp_path / "page.npz").write_text("<html>404</html>")
    said = run("-m", "convert", "npz2torch", tmp_path / "page.npz", tmp_path / "there.npz", code=1)
    assert "there.npz: exists already (replace it with --force" in said
    said = run("-m", "convert", "npz2torch", tmp_path / "page.npz", tmp_path / "w.h5", code=1)
    assert "no format has the ending '.h5'" in said


def test_labels_that_are_no_utf_8_are_told(tmp_path):
    (tmp_path / "latin.txt").write_bytes("blau\ngrün\n".encode("latin-1"))
    for option in ("--labels", "--classes"):
        said = run("-m", "convert", "npz2timm", SQUARE, tmp_path / "w.npz", option, tmp_path / "latin.txt", code=1)
        assert "latin.txt: labels must be text in UTF-8, one a line, and byte 7 is not: save the file as UTF-8\n" in said
    (tmp_path / "short.txt").write_text("a\n\nb\n")
    said = run("-m", "convert", "npz2timm", SQUARE, tmp_path / "w.npz", "--labels", tmp_path / "short.txt", code=1)
    assert "short.txt: 2 labels in 3 lines for 7 classes" in said


def test_both_packages_read_one_and_the_same_labels(tmp_path):
    from mixer_jax.labels import class_names

    (tmp_path / "labels.txt").write_bytes("\ufeffrot\r\n grün \r\nblau".encode())
    assert class_names(3, file=tmp_path / "labels.txt", own=None) == ("rot", "grün", "blau")
    convert.write(tmp_path / "w.npz", convert.read(SQUARE).with_classes(3))
    assert main("npz2timm", tmp_path / "w.npz", tmp_path / "named.npz", "--labels", tmp_path / "labels.txt") == 0
    assert convert.read(tmp_path / "named.npz").metadata.labels == ("rot", "grün", "blau")


def test_memory_that_is_not_there_is_one_message(tmp_path, capsys):
    assert main("npz2timm", SQUARE, tmp_path / "w.npz", "--num-classes", 10**15) == 1
    assert capsys.readouterr().err.startswith("error: not enough memory: Unable to allocate")


def test_the_demo_of_a_missing_file_is_one_message(tmp_path):
    said = run("-m", "mixer_jax", "demo", tmp_path / "no.npz", "--folder", tmp_path / "out", code=1)
    assert said.endswith("no.npz: could not be converted, for the reason above\n")
    assert "no.npz: no such file or folder" in said


def test_summary_tells_a_wrong_size_from_a_wrong_name():
    said = run("-m", "mixer_jax", "summary", "B/16", "--image-size", "225", code=1)
    assert said == "error: B/16: MixerConfig: image_size 225x225 is not a whole number of 16x16 patches\n"


def test_a_resized_file_says_what_timm_must_be_told(tmp_path, capsys):
    config = MixerConfig.named("S/32", num_classes=3).replace(num_blocks=1)
    convert.write(tmp_path / "s.npz", convert.Checkpoint.from_arrays(random_weights(config)))
    for options, wanted in (
        ([], None),
        (["--resize-to", "448"], "timm's own code needs mlp_ratio=(2.0, 4.0), img_size=448 for these weights"),
        (["--resize-to", "224x448", "--resample"], "timm's own code needs mlp_ratio=(0.5, 4.0), img_size=(224, 448) for these"),
    ):
        assert main("npz2timm", tmp_path / "s.npz", tmp_path / "w.npz", "--blocks", "1", "--force", *options) == 0
        said = capsys.readouterr().out
        assert "timm's own code needs" not in said if wanted is None else wanted in said.splitlines()[-1]
    assert main("npz2jeonsworld", tmp_path / "s.npz", tmp_path / "j.npz", "--blocks", "1", "--resize-to", "448") == 0
    assert "mlp_ratio" not in capsys.readouterr().out


def test_factors_that_timm_multiplies_by_give_the_width_back():
    from convert.__main__ import _factor

    assert all(int(_factor(width, hidden) * hidden) == width for hidden in range(1, 300) for width in range(1, 300))
    assert int(29 / 100 * 100) != 29  # so the plain quotient does not


def test_a_file_without_head_says_that_googles_loader_needs_one(tmp_path, capsys):
    for verb in ("npz2legacy", "convert"):
        assert main(verb, SQUARE, tmp_path / f"{verb}.npz", "--drop-head") == 0
        last = capsys.readouterr().out.splitlines()[-1]
        assert last == "Google's loader stops without head/kernel and head/bias; --num-classes N writes them, as zeros"
    assert main("npz2timm", SQUARE, tmp_path / "timm.npz", "--drop-head") == 0
    assert main("convert", SQUARE, tmp_path / "headed.npz") == 0
    assert "loader" not in capsys.readouterr().out


def test_compare_in_json_is_strict(tmp_path):
    weights = GOLDENS["square"].weights
    for name, value in (("nan", np.nan), ("inf", np.inf)):
        np.savez(tmp_path / f"{name}.npz", **weights | {"head/bias": np.full(7, value, "float32")})
        command = [sys.executable, "-m", "convert", "compare", SQUARE, tmp_path / f"{name}.npz", "--allow-nonfinite", "--json"]
        done = subprocess.run(command, capture_output=True, text=True)
        found = json.loads(done.stdout, parse_constant=lambda name: pytest.fail(f"a bare {name}"))
        assert found["differences"] == [{"name": "head/bias", "what": "values", "largest": name}]


def test_keys_of_random_numbers_in_an_orbax_tree_are_told(tmp_path):
    """A generator of dropout lies beside the weights of many a training run; as a typed key it is no array of NumPy's."""
    import jax
    import orbax.checkpoint as ocp

    tree = convert.read(SQUARE).as_linen()["params"] | {"rng": jax.random.key(0)}
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(tmp_path / "keys", args=ocp.args.Composite(params=ocp.args.StandardSave(tree)))
    facts = json.loads(run("-m", "convert", "inspect", tmp_path / "keys", "--json"))
    assert facts["notes"] == ["1 entries are no arrays: rng"]
    assert facts["fingerprint"] == json.loads(run("-m", "convert", "inspect", SQUARE, "--json"))["fingerprint"]
    assert main("npz2timm", tmp_path / "keys", tmp_path / "w.npz") == 0


def test_parity_looks_for_images_before_it_reads_the_file(tmp_path):
    """Of a file that is no checkpoint: what is said first was looked at first."""
    (tmp_path / "page.npz").write_text("<html>404</html>")
    (tmp_path / "empty").mkdir()
    images = [tmp_path / "no.png", tmp_path / "empty", SQUARE]
    said = run("-m", "mixer_jax", "parity", tmp_path / "page.npz", "--images", *images, code=1).splitlines()
    assert said == [
        f"error: {tmp_path / 'empty'}: a folder without images (files that end in .jpg, .png, ...)",
        f"{tmp_path / 'no.png'}: no such file",
    ]


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
        (["npz2rust", SQUARE, tmp_path / "w"], 2, "no command 'npz2rust'"),
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
    assert facts["gelu"] == "exact (stated)"
    assert facts["layer_norm_epsilon"] == "1e-06 (stated)"
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
