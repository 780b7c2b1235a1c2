"""The command lines as a person runs them: processes, exit codes, what they import, and signals."""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import command_line
import numpy as np
import pytest
from command_line import process
from conftest import GOLDENS, TINY, random_weights
from PIL import Image

import convert
from convert import MixerConfig

SQUARE = GOLDENS["square"].weights_file
NAMES = ["npz", "legacy", "timm", "torch", "reference", "jeonsworld", "flax"]
torch = pytest.mark.torch
main = partial(command_line.main, module="convert")
CONVERT = ("-m", "convert")


def output(capsys, *arguments):
    """What `python -m convert` prints in this process."""
    return command_line.run(capsys, *arguments, module="convert").out


def failed(capsys, *arguments, code=1, module="convert"):
    """The standard error of a command line in this process that fails."""
    return command_line.run(capsys, *arguments, code=code, module=module).err


def loaded(code, *arguments):
    """Which of the heavy modules are in sys.modules after some code has run in a new process."""
    ask = "import sys; print(sorted({'jax', 'torch', 'flax', 'orbax', 'matplotlib'} & set(sys.modules)), file=sys.stderr)"
    return set(eval(process(*arguments, python=("-c", f"{code}\n{ask}"))[1].splitlines()[-1]))


CLI = "import sys; from convert.__main__ import main\ntry: main(sys.argv[1:])\nexcept SystemExit: pass"
MIXER_CLI = CLI.replace("convert", "mixer_jax")


@pytest.mark.parametrize(
    ("code", "arguments"),
    [
        ("import convert", []),
        ("import mixer_jax; mixer_jax.predict, mixer_jax.evaluate", []),
        ("import mixer_jax.parity.numpy_model", []),
        (CLI, ["npz2torch", "--help"]),
        (MIXER_CLI, ["--help"]),
        (MIXER_CLI, ["summary", SQUARE]),
        (CLI, ["inspect", SQUARE]),
        (CLI, ["npz2timm", SQUARE, "OUT.npz"]),
        (CLI, ["npz2flax", SQUARE, "OUT.safetensors"]),
    ],
)
def test_what_needs_no_framework_loads_none(tmp_path, code, arguments):
    assert loaded(code, *(str(argument).replace("OUT", f"{tmp_path}/w") for argument in arguments)) == set()


@torch
def test_pytorch_commands_and_models_never_load_jax(tmp_path):
    assert loaded(CLI, "npz2torch", SQUARE, tmp_path / "w.pt") == {"torch"}
    assert (tmp_path / "w.pt").exists()
    Image.new("RGB", (20, 20)).save(tmp_path / "image.png")
    assert loaded(MIXER_CLI, "predict", SQUARE, tmp_path / "image.png", "--implementation", "torch") == {"torch"}
    assert loaded("import sys; from mixer_jax import torch_pretrained; torch_pretrained.load(sys.argv[1])", SQUARE) == {"torch"}


def test_flax_commands_and_models_never_load_torch(tmp_path):
    assert "torch" not in loaded(CLI, "npz2flax", SQUARE, tmp_path / "w")
    assert (tmp_path / "w").is_dir()
    assert "torch" not in loaded("import sys, mixer_jax; mixer_jax.load(sys.argv[1])", SQUARE)


@pytest.mark.parametrize("ending", [".npz", ".safetensors", pytest.param(".pt", marks=torch), ""])
def test_there_and_back_is_the_same_file(tmp_path, ending):
    there, back = tmp_path / f"there{ending}", tmp_path / "back.npz"
    out, _ = process("npz2torch", SQUARE, there, python=CONVERT)
    assert "1,973 parameters in 30 arrays, timm layout, float32; read back, every bit equal" in out
    assert "tanh GELU, LayerNorm epsilon 1e-06" in out
    assert 'act_layer=partial(nn.GELU, approximate="tanh") makes them equal' in out
    assert main("torch2npz", there, back) == 0
    assert back.read_bytes() == SQUARE.read_bytes()


@pytest.mark.parametrize(("source", "target"), [(a, b) for a in NAMES for b in NAMES if a != b])
def test_every_ordered_pair_is_a_command_and_there_and_back_is_the_same_file(tmp_path, golden, source, target):
    convert.write(tmp_path / "in.npz", convert.read(golden.weights_file), layout=source)
    assert main(f"{source}2{target}", tmp_path / "in.npz", tmp_path / "out.safetensors") == 0
    assert convert.read(tmp_path / "out.safetensors").layout.name == convert.layouts.layout_named(target).name
    assert main(f"{target}2{source}", tmp_path / "out.safetensors", tmp_path / "back.npz") == 0
    assert (tmp_path / "back.npz").read_bytes() == (tmp_path / "in.npz").read_bytes()


@pytest.mark.parametrize(
    ("line", "target", "layout"),
    [
        ("FILE w.npz --to jeonsworld", "w.npz", "jeonsworld"),
        ("FILE w.safetensors", "w.safetensors", "timm"),
        ("--force FILE w.npz", "w.npz", "google"),
        ("--to=timm FILE w.npz", "w.npz", "timm"),
        ("./inspect w.npz", "w.npz", "google"),
        ("--resize-to 40 FILE w.npz", "w.npz", "google"),
        ("npz2pt w.npz --to torch", "w.npz", "timm"),  # a file of that name
    ],
)
def test_the_verb_convert_may_be_left_out(line, target, layout, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("inspect", "npz2pt"):
        Path(name).write_bytes(SQUARE.read_bytes())
    assert main(*line.replace("FILE", str(SQUARE)).split()) == 0
    assert convert.read(target).layout.name == layout


def test_folders_named_like_verbs_break_none(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for verb in ("inspect", "compare", "download", "convert", "npz2torch", "timm2npz"):
        (tmp_path / verb).mkdir()
    assert main("inspect", SQUARE) == main("compare", SQUARE, SQUARE) == 0
    assert main("npz2torch", SQUARE, "w.npz") == main("convert", "w.npz", "v.npz", "--to", "flax") == 0
    assert "'nothing' is not a published checkpoint" in failed(capsys, "download", "nothing")


@pytest.mark.parametrize("module", ["convert", "mixer_jax"])
def test_every_verbs_usage_begins_with_what_a_person_types(module, capsys):
    program = importlib.import_module(f"{module}.__main__")
    for verb in program.VERBS:
        with pytest.raises(SystemExit):
            program.main([verb, "--help"])
        assert capsys.readouterr().out.startswith(f"usage: python -m {module} {verb} [-h]")
    verb = next(iter(program.VERBS))
    assert process(verb, code=2, python=("-m", module))[1].startswith(f"usage: python -m {module} {verb} [-h]")


USAGE = {  # unknown verbs, options that the command would ignore, and values that make no sense
    "convert npz2pt FILE w.pt": "no command 'npz2pt': did you mean npz2torch?",
    "convert npz2pt FILE w.pt --to torch": "no command 'npz2pt': did you mean npz2torch?",
    "convert google2pytorch FILE w.pt": "no command 'google2pytorch': did you mean npz2torch?",
    "convert pth2jax FILE w.pt": "no command 'pth2jax': did you mean torch2flax?",
    "convert npz2troch FILE w.pt": "no command 'npz2troch': did you mean npz2torch?",
    "convert inspekt FILE": "no command 'inspekt': did you mean inspect?",
    "convert xyzzy": "no command 'xyzzy': the commands are inspect, compare, download, convert and A2B, as in npz2torch; A",
    "mixer_jax predit x": "no command 'predit': did you mean predict? the commands are summary, demo, predict",
    "convert npz2torch FILE w.npz --to flax": "--to: npz2torch names the layout already",
    "convert npz2torch FILE w.npz --resample": "--resample: works only with --resize-to",
    "convert inspect FILE --allow-nonfinite": "--allow-nonfinite: inspect counts NaN and infinity in any file",
    "mixer_jax summary FILE --num-classes 0": "--num-classes: is for a variant, and",
    "mixer_jax summary B/16 --depth 12": "--depth: is for a file, and B/16 is none",
    "mixer_jax summary B/16 --variant B/16 --dtype float32": "--variant, --dtype: is for a file, and B/16 is none",
    "mixer_jax summary B/16 --key ema --allow-nonfinite": "--key, --allow-nonfinite: is for a file, and B/16 is none",
    "mixer_jax summary B/16 --step 3": "--step: is for a file, and B/16 is none",
    "mixer_jax predict FILE x --force": "--force: replaces OUT.npy, and --features does not name one",
    "mixer_jax predict FILE x --against squash --features f.npy": "--features are those of one preprocessing: leave out",
    "mixer_jax predict FILE x --against squash --top 3": "--top: --against shows the best class of each preprocessing; --json",
    "mixer_jax predict FILE x --preprocess crop": "argument --preprocess: no preprocessing 'crop': one of",
    "mixer_jax predict FILE x --top 0": "argument --top: '0' is",
    "mixer_jax predict FILE x --batch-size many": "argument --batch-size: 'many' is",
    "mixer_jax draw FILE x.png --blocks 1,x": "argument --blocks: '1,x' is not a list of blocks such as 0,1-3",
    "mixer_jax draw FILE x.png --blocks 3-1": "argument --blocks: '3-1' is not a list of blocks such as 0,1-3",
    "mixer_jax draw FILE x.png --units 0": "argument --units: '0' is",
    "mixer_jax evaluate FILE x --force": "--force: replaces OUT.png, and --confusion does not name one",
    "mixer_jax parity FILE --images x --count 2": "--count: ",
    "mixer_jax parity FILE --preprocess squash": "--preprocess: ",
    "mixer_jax parity FILE --force": "--force: replaces OUT.html, and --html does not name one",
    "mixer_jax draw FILE x.png --what norms --units 3": "--units: norms are of whole arrays",
    "mixer_jax draw FILE x.png --what stem --blocks 0": "--blocks: the stem is in no block",
    "convert npz2torch FILE w.npz --num-classes -1": "argument --num-classes: '-1' is",
    "convert npz2torch FILE w.npz --resize-to 0": "argument --resize-to: '0' is",
    "convert npz2torch FILE w.npz --image-size big": "argument --image-size: 'big' is",
    "convert npz2torch FILE w.npz --variant B16": "argument --variant: no variant 'B16'",
    "convert npz2torch FILE": "the following arguments are required: target",
    "convert FILE w.npz --to keras": "argument --to: invalid choice: 'keras'",
    "convert inspect FILE --image-size 0x20": "argument --image-size: '0x20' is",
    "convert inspect FILE --depth 0": "argument --depth: '0' is",
    "mixer_jax summary B/16 --num-classes -1": "argument --num-classes: '-1' is",
    "mixer_jax parity FILE --seed -1": "argument --seed: '-1' is",
}
FAULTS = {  # PAGE.npz is a web page, and GIVEN.npz is there already
    "convert npz2torch PAGE.npz w.npz": "error: PAGE.npz: a web page",
    "convert npz2torch no.npz w.npz": "error: no.npz: no such file or folder",
    "convert no.npz w.npz --to timm": "error: no.npz: no such file or folder",
    "convert npz2torch PAGE.npz GIVEN.npz": "GIVEN.npz: exists already (replace it with --force",
    "convert npz2torch FILE .": "a folder is in the way",
    "convert npz2torch PAGE.npz w.h5": "no format has the ending '.h5'",
    "convert npz2torch FILE w.npz --variant B/16": "not a Mixer-B/16",
    "convert npz2torch FILE w.npz --depth 9": "found 2 blocks, wanted 9",
    "convert npz2torch GIVEN.npz GIVEN.npz --force": "is the source itself; give another name",
    "convert timm2flax FILE w.npz": "is in the google layout, not timm: use npz2flax or --to flax",
    "convert npz2timm FILE w.npz --labels latin.txt": "latin.txt: labels must be text in UTF-8, one a line, and byte 7 is not",
    "convert npz2timm FILE w.npz --classes latin.txt": "latin.txt: labels must be text in UTF-8, one a line, and byte 7 is not",
    "convert npz2timm FILE w.npz --labels short.txt": "short.txt: 2 labels in 3 lines for 7 classes",
    f"convert npz2timm FILE w.npz --num-classes {10**15}": "error: not enough memory: Unable to allocate",
}


@pytest.mark.parametrize(
    ("line", "message", "code"),
    [*((line, f"error: {USAGE[line]}", 2) for line in USAGE), *((line, FAULTS[line], 1) for line in FAULTS)],
)
def test_a_wrong_option_or_a_fault_is_one_message_and_writes_nothing(line, message, code, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("PAGE.npz").write_text("<html>404</html>")
    Path("GIVEN.npz").write_bytes(SQUARE.read_bytes())
    Path("latin.txt").write_bytes("blau\ngrün\n".encode("latin-1"))
    Path("short.txt").write_text("a\n\nb\n")
    module, *arguments = line.replace("FILE", str(SQUARE)).split()
    assert message in failed(capsys, *arguments, code=code, module=module)
    assert {path.name for path in tmp_path.iterdir()} == {"PAGE.npz", "GIVEN.npz", "latin.txt", "short.txt"}
    assert Path("GIVEN.npz").read_bytes() == SQUARE.read_bytes()


def test_processes_end_with_1_after_a_fault_and_with_2_after_a_wrong_option(tmp_path):
    assert "no.npz: no such file or folder" in process("inspect", "no.npz", code=1, python=CONVERT)[1]
    assert "the following arguments are required: COMMAND" in process(code=2, python=CONVERT)[1]
    _, error = process("demo", tmp_path / "no.npz", "--folder", tmp_path / "out", code=1)
    assert "no.npz: no such file or folder" in error
    assert error.endswith("no.npz: could not be converted, for the reason above\n")


def test_a_resized_file_says_what_timm_needs(tmp_path, capsys):
    """For the last, timm computes int(ratio * 100), and int(29 / 100 * 100) is 28."""
    config = MixerConfig.named("S/32", num_classes=3).replace(num_blocks=1)
    convert.write(tmp_path / "s.npz", convert.Checkpoint.from_arrays(random_weights(config)))
    for options, wanted in (
        ([], None),
        (["--resize-to", "448"], "timm's own code needs mlp_ratio=(2.0, 4.0), img_size=448 for these weights"),
        (["--resize-to", "224x448", "--resample"], "timm's own code needs mlp_ratio=(0.5, 4.0), img_size=(224, 448) for these"),
    ):
        out = output(capsys, "npz2timm", tmp_path / "s.npz", tmp_path / "w.npz", "--depth", "1", "--force", *options)
        assert "timm's own code needs" not in out if wanted is None else wanted in out.splitlines()[-1]
    resized = (tmp_path / "s.npz", tmp_path / "j.npz", "--depth", "1", "--resize-to", "448")
    assert "mlp_ratio" not in output(capsys, "npz2jeonsworld", *resized)
    odd = config.replace(hidden_dim=100, tokens_mlp_dim=29, channels_mlp_dim=7)
    convert.write(tmp_path / "odd.npz", convert.Checkpoint.from_arrays(random_weights(odd)))
    out = output(capsys, "npz2timm", tmp_path / "odd.npz", tmp_path / "o.npz")
    ratios = re.search(r"mlp_ratio=\((.*), (.*)\)", out).groups()
    assert [int(float(ratio) * 100) for ratio in ratios] == [29, 7]


def test_a_file_without_head_says_that_googles_loader_needs_one(tmp_path, capsys):
    note = "Google's loader stops without head/kernel and head/bias; --num-classes N writes them, as zeros"
    for verb in ("npz2legacy", "convert"):
        assert output(capsys, verb, SQUARE, tmp_path / f"{verb}.npz", "--drop-head").splitlines()[-1] == note
    assert "loader" not in output(capsys, "npz2timm", SQUARE, tmp_path / "timm.npz", "--drop-head")
    assert "loader" not in output(capsys, "convert", SQUARE, tmp_path / "headed.npz")


def test_keys_of_random_numbers_in_an_orbax_tree_are_noted(tmp_path, capsys):
    """A generator of dropout lies beside the weights of many a training run; as a typed key it is not an array of NumPy's."""
    import jax
    import orbax.checkpoint as ocp

    tree = convert.read(SQUARE).as_linen()["params"] | {"rng": jax.random.key(0)}
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(tmp_path / "keys", args=ocp.args.Composite(params=ocp.args.StandardSave(tree)))
    keys, square = (json.loads(output(capsys, "inspect", file, "--json")) for file in (tmp_path / "keys", SQUARE))
    assert keys["also in the file"] == ["rng"]
    assert keys["fingerprint"] == square["fingerprint"]
    assert main("npz2timm", tmp_path / "keys", tmp_path / "w.npz") == 0


def test_parity_looks_for_images_before_it_reads_the_file(tmp_path, capsys):
    (tmp_path / "page.npz").write_text("<html>404</html>")
    (tmp_path / "empty").mkdir()
    images = [tmp_path / "no.png", tmp_path / "empty", SQUARE]
    assert failed(capsys, "parity", tmp_path / "page.npz", "--images", *images, module="mixer_jax").splitlines() == [
        f"error: {tmp_path / 'empty'}: a folder without images (files that end in .jpg, .png, ...)",
        f"{tmp_path / 'no.png'}: no such file",
    ]


def test_a_dry_run_shows_what_becomes_of_each_array_and_writes_nothing(tmp_path, capsys):
    lines = output(capsys, "npz2torch", SQUARE, tmp_path / "w.pt", "--dry-run").splitlines()
    assert len(lines) == 1 + 30
    assert lines[0].split() == ["source", "target", "axes", "dtype"]
    (kernel,) = [line for line in lines if "blocks.1.mlp_tokens.fc1.weight" in line]
    assert " ".join(kernel.split()).endswith("Dense_0/kernel blocks.1.mlp_tokens.fc1.weight i o -> o i float32")
    rows = json.loads(output(capsys, "npz2flax", SQUARE, tmp_path / "w", "--dry-run", "--json"))
    assert {"source": "stem/bias", "target": "stem/bias", "axes": "o -> o", "dtype": "float32"} in rows
    assert rows[4]["axes"] == "i o -> l i o"
    assert not list(tmp_path.iterdir())


def test_the_head_the_labels_and_the_grid_can_be_changed(tmp_path):
    (tmp_path / "labels.txt").write_bytes("\ufeffa\r\n b \r\nc\nd\ne\nf\ng".encode())
    (tmp_path / "some.txt").write_text("f\nb")
    named = tmp_path / "w.safetensors"
    assert main("npz2timm", SQUARE, named, "--labels", tmp_path / "labels.txt") == 0
    assert convert.read(named).metadata.labels == tuple("abcdefg")

    def changed(*options):
        assert main("timm2npz", named, tmp_path / "x.npz", "--force", *options) == 0
        return convert.read(tmp_path / "x.npz")

    assert changed("--classes", tmp_path / "some.txt").metadata.labels == ("f", "b")
    assert changed("--classes", "5,1", "--dtype", "bfloat16").metadata.labels == ("f", "b")
    assert changed("--drop-head").sizes["num_classes"] == 0
    assert not np.asarray(changed("--num-classes", "3").arrays["head/kernel"]).any()
    assert changed("--resize-to", "40").config.grid == (8, 8)
    assert changed("--resize-to", "20x30", "--resample").config.grid == (4, 6)
    assert changed("--dtype", "float16").dtype == np.float16
    for options in (["--resize-to", "20x30"], ["--classes", "a,z"], ["--classes", "0,0"]):
        assert main("timm2npz", named, tmp_path / "y.npz", *options) == 1
    assert not (tmp_path / "y.npz").exists()


def test_compare_says_whether_and_where(tmp_path, capsys):
    weights, kernel = GOLDENS["square"].weights, "MixerBlock_1/channel_mixing/Dense_0/kernel"
    assert "the same weights: fingerprint " in output(capsys, "compare", SQUARE, SQUARE.with_name("legacy.npz"))
    np.savez(tmp_path / "other.npz", **weights | {kernel: weights[kernel] + np.eye(10, 14, dtype="float32")})
    result = command_line.run(capsys, "compare", SQUARE, tmp_path / "other.npz", code=1, module="convert")
    assert f"{kernel}: values, max abs difference 1" in result.out
    assert "error: not the same weights: 1 of 30 arrays differ" in result.err
    out = output(capsys, "compare", SQUARE, SQUARE.with_name("timm.safetensors"))
    assert "not the same numerics: gelu: tanh against exact" in out
    for name, value in (("nan", np.nan), ("inf", np.inf)):
        np.savez(tmp_path / f"{name}.npz", **weights | {"head/bias": np.full(7, value, "float32")})
        assert main("compare", SQUARE, tmp_path / f"{name}.npz", "--allow-nonfinite", "--json") == 1
        strict = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"a bare {name}"))
        assert strict["differences"] == [{"name": "head/bias", "what": "values", "max_abs": name}]


def test_inspect_says_what_a_file_is(tmp_path, capsys):
    def inspected(path):
        return json.loads(output(capsys, "inspect", path, "--json"))

    convert.write(tmp_path / "w.npz", convert.read(SQUARE).with_metadata(gelu="exact"), layout="flax")
    facts = inspected(tmp_path / "w.npz")
    assert (facts["layout"], facts["format"]) == ("flax", "npz")
    assert facts["grid"] == "4x4 (assumed, being square), images of 20x20 pixels"
    assert (facts["blocks"], facts["classes"], facts["parameters"], len(facts["arrays"])) == (2, 7, 1973, 18)
    assert (facts["gelu"], facts["layer_norm_epsilon"]) == ("exact (explicit)", "1e-06 (explicit)")
    overridden = json.loads(output(capsys, "inspect", tmp_path / "w.npz", "--gelu", "tanh", "--json"))
    assert overridden["gelu"] == "tanh (given as an option)"
    (head,) = [row for row in facts["arrays"] if row["array"] == "head/kernel"]
    norm = np.linalg.norm(GOLDENS["square"].weights["head/kernel"].astype("float64"))
    assert (head["shape"], head["norm"]) == ("10x7", f"{norm:.6g}")
    assert all((row["NaN"], row["infinite"], row["zeros"]) == (0, 0, "0.00%") for row in facts["arrays"])
    weights = random_weights(TINY)
    weights["head/bias"][:3] = [np.nan, np.inf, 0]
    np.savez(tmp_path / "odd.npz", **weights)
    (bias,) = [row for row in inspected(tmp_path / "odd.npz")["arrays"] if row["array"] == "head/bias"]
    assert (bias["NaN"], bias["infinite"], bias["zeros"]) == (1, 1, "20.00%")
    assert "unknown: 20 tokens of 2x6 pixels are not a square grid" in inspected(GOLDENS["rectangular"].weights_file)["grid"]


def test_summary_of_a_variant_and_of_a_file(capsys):
    out, _ = process("summary", "B/16")
    assert [part for part in ("59,880,472", "25.204", "2 per multiply-add") if part not in out] == []
    large = json.loads(command_line.run(capsys, "summary", "L/16", "--num-classes", "21843", "--json").out)
    assert large["parameters"] == sum(m["count"] * m["parameters"] for m in large["modules"]) == 229_560_243
    square = json.loads(command_line.run(capsys, "summary", SQUARE, "--json").out)
    assert square["parameters"] == sum(a.size for a in GOLDENS["square"].weights.values())
    for arguments, message in (
        (["B16"], "error: B16: no such file, and no variant 'B16': one of S, B, L, H"),
        (["B/16", "--image-size", "225"], "error: B/16: MixerConfig: image_size 225x225 is not a whole number of 16x16"),
    ):
        assert failed(capsys, "summary", *arguments, module="mixer_jax").startswith(message)


# A conversion that takes its time, so that it can be interrupted in the middle.
SLOW = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a background job of a shell inherits as ignored
from convert.formats import npz
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
    line = [sys.executable, "-c", SLOW, "npz2torch", str(SQUARE), str(target)] + ["--force"] * force
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "writing\n"
    assert [name for name in os.listdir(tmp_path) if not name.endswith(".tmp")] == ["w.npz"] * force
    process.send_signal(sent)
    _, error = process.communicate(timeout=30)  # half of what it would sleep
    assert process.returncode == code
    assert "Traceback" not in error
    assert os.listdir(tmp_path) == ["w.npz"] * force
    assert not force or target.read_text() == "what was there before"
