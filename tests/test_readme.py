"""README and docs: their commands and their Python run, and their tables are those that a benchmark wrote."""

import functools
import http.server
import json
import os
import re
import shlex
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from conftest import GOLDENS, random_weights
from implementations import checkpoint
from PIL import Image
from test_processes import free_address

import convert
import mixer_jax
from convert import MixerConfig, layouts
from convert.published import KNOWN, PUBLISHED
from mixer_jax.commands.parsers import command_line

ROOT = Path(__file__).parent.parent
PAGES = {path.name: path.read_text() for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]}
# A small stand-in for a released file, with the patches and classes of Mixer-B/16.
SMALL = MixerConfig(
    patch_size=(16, 16),
    image_size=(224, 224),
    num_blocks=2,
    hidden_dim=24,
    tokens_mlp_dim=20,
    channels_mlp_dim=28,
    num_classes=1000,
)


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGES[page], re.MULTILINE | re.DOTALL)


def commands(page):
    return [line for block in blocks(page, "bash") for line in block.splitlines() if line.startswith("python ")]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A reader's folder: a weight file, photographs, and two classes of ImageNet's validation images."""
    convert.write(tmp_path / "Mixer-B_16.npz", checkpoint(random_weights(SMALL), SMALL), layout="google")
    random = np.random.default_rng(0)
    photographs = ["cat.jpg", "dog.jpg", "holiday/1.jpg", "imagenet/val/n01440764/1.jpg", "imagenet/val/n01443537/2.jpg"]
    for name in photographs:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (300, 400, 3), np.uint8)).save(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def mirror(tmp_path_factory):
    """A server on loopback with a file of the published size and random weights, and a cache for what comes from it."""
    folder = tmp_path_factory.mktemp("mirror")
    path = folder / PUBLISHED["imagenet1k/Mixer-B_16"].file
    path.parent.mkdir(parents=True)
    np.savez(path, **random_weights(MixerConfig.named("B/16")))

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Handler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        address, cache = f"http://127.0.0.1:{server.server_port}", tmp_path_factory.mktemp("cache")
        yield {"MIXER_JAX_BASE_URL": address, "MIXER_JAX_CACHE": str(cache), "no_proxy": "*"}
        server.shutdown()
        thread.join()


@pytest.fixture
def released(mirror, monkeypatch):
    """Published names are fetched from the mirror."""
    for name, value in mirror.items():
        monkeypatch.setenv(name, value)


WRITTEN = {
    "README.md": {"mixer_b16.pt", "parity.html", "confusion.png", "tokens.png"},
    "converting.md": {"mixer_b16.pt", "mixer", "big.safetensors"},
    "parity.md": {"parity.html"},
    "exporting.md": {"mixer.onnx", "mixer.stablehlo", "mixer.pt2"},
}


@pytest.mark.torch
@pytest.mark.parametrize("page", [pytest.param(page, marks=[pytest.mark.heavy] * (page == "exporting.md")) for page in WRITTEN])
def test_every_command_runs(page, folder, released):
    """In order, as one reads: later ones need what earlier ones wrote."""
    for line in commands(page):
        _, *arguments = shlex.split(line, comments=True)
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
        assert done.stdout, line
    assert WRITTEN[page] <= {path.name for path in folder.iterdir()}


def test_a_command_that_fails_is_noticed(folder):
    """The test of the commands rests on this."""
    command = [sys.executable, "-m", "convert", "inspect", "no-such-file.npz"]
    assert subprocess.run(command, capture_output=True, check=False, env=os.environ | {"PYTHONPATH": str(ROOT)}).returncode == 1


def _make_pets(folder):
    """A folder of classes for training."""
    for i, name in enumerate(["cat.jpg", "dog.jpg"] * 4):
        path = folder / "pets" / name[:3] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((folder / name).read_bytes())


@pytest.mark.filterwarnings("ignore:.*the head for 1000 classes is now zeros for 2")
def test_the_page_on_fine_tuning_runs(folder, capsys):
    pytest.importorskip("grain")  # the extra `train`
    _make_pets(folder)
    (block,) = blocks("fine-tuning.md", "python")
    few = block.replace("warmup_steps=50, total_steps=500", "warmup_steps=1, total_steps=3")
    assert few != block
    scope: dict = {}
    exec(compile(few, "fine-tuning.md", "exec"), scope)
    assert "% of 2 validation images" in capsys.readouterr().out
    assert int(scope["state"].step) == 3
    assert mixer_jax.load("pets.npz").labels == ("cat", "dog")


@pytest.mark.heavy
def test_the_page_on_scaling_runs_in_two_processes(folder):
    """Its commands two by two; and the others are words that a shell and our command line know."""
    pytest.importorskip("grain")
    (block,) = blocks("scaling.md", "bash")
    few = block.replace("--preset small", "--preset small --total-steps 4 --warmup-steps 1 --evaluate-every 2")
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    environment["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
    lines = few.replace(" &", "").splitlines()
    for pair in zip(lines[::2], lines[1::2]):
        address = free_address()
        commands = [[sys.executable, *shlex.split(line.replace("localhost:8476", address))[1:]] for line in pair]
        children = [subprocess.Popen(each, env=environment, stdout=-1, stderr=-1, text=True) for each in commands]
        texts = [child.communicate() for child in children]
        assert [child.returncode for child in children] == [0, 0], texts
    assert [json.loads(line)["image"] for line in texts[0][0].splitlines()] == ["holiday/1.jpg"]
    assert texts[1][0] == ""
    scripts = blocks("scaling.md", "sh")
    assert len(scripts) == 2
    for script in scripts:
        assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
        (line,) = re.findall(r"python -m mixer_jax ([^\n\"]*)", script)
        assert command_line().parse_args(shlex.split(line)).cluster


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore:.*the head for 1000 classes is now zeros for 2")
def test_the_python_runs(folder, released, capsys):
    scope: dict = {}
    for block in [*blocks("README.md", "python"), *blocks("converting.md", "python")]:
        exec(compile(block, "README.md", "exec"), scope)
    printed = capsys.readouterr().out.splitlines()
    assert len([line for line in printed if "%" in line]) == 5  # the best classes of a photograph, by name
    assert (Path(os.environ["MIXER_JAX_CACHE"]) / "imagenet1k" / "Mixer-B_16.npz").stat().st_size == 239_567_448
    assert scope["images"].shape == (2, 224, 224, 3)
    assert mixer_jax.load("pets.safetensors").labels == ("cat", "dog")
    assert scope["state"]["head.weight"].shape == (2, 24)
    assert scope["params"]["params"]["stem"]["kernel"].shape == (16, 16, 3, 24)
    assert scope["checkpoint"].dtype.name == "bfloat16"


@pytest.mark.torch
def test_every_verb_is_a_python_function(folder, released):
    """The table "command, Python": each line runs, and every command of both programs has one."""
    rows = re.findall(r"^\| `python -m (\w+) (\w+)[^|]*\| `(.*)` \|$", PAGES["converting.md"], re.MULTILINE)
    from convert.__main__ import A2B, VERBS
    from mixer_jax.__main__ import VERBS as MIXER_VERBS
    from mixer_jax.training.config import FinetuneConfig

    assert {verb for package, verb, _ in rows if package == "mixer_jax"} == set(MIXER_VERBS)
    assert {verb for package, verb, _ in rows if package == "convert"} - {"npz2torch"} == set(VERBS) - {"convert", *A2B}
    scope: dict = {"model": mixer_jax.load("Mixer-B_16.npz"), "checkpoint": convert.read("Mixer-B_16.npz")}
    _make_pets(folder)
    scope["config"] = FinetuneConfig.of("small", batch_size=4, warmup_steps=1, total_steps=2)
    modules = "convert, convert.download, mixer_jax.pictures.weights, "
    modules += ", ".join(f"mixer_jax.commands.{name}" for name in ("demo", "export", "finetune", "pack", "parity", "publish"))
    exec(f"from pathlib import Path; import {modules}", scope)
    results = {verb: eval(python, scope) for _, verb, python in rows}
    assert len(results["predict"][0].top) == 3
    assert results["compare"].fingerprint == results["inspect"]["fingerprint"]
    assert results["parity"].passed
    assert results["export"].proof.operations == 24
    assert results["finetune"].best_row["validation_images"] == 2
    assert results["pack"] == 8
    assert results["publish"].architecture == "mixer_b16_224"
    assert results["evaluate"].top1.images == 2


def test_the_layout_of_the_contributors_page_is_all_that_is_needed(square, monkeypatch):
    """Its added lines, run in the table's module, convert a golden file both ways."""
    (diff,) = blocks("CONTRIBUTING.md", "diff")
    scope = vars(layouts).copy()
    lines = diff.splitlines()
    assert {line[1:] for line in lines if line[0] in "- "} <= set(Path(layouts.__file__).read_text().splitlines())
    exec("\n".join(line[1:] for line in lines if line[0] in "+ "), scope)
    source = convert.read(GOLDENS["square"].weights_file)
    there = source.to(scope["MINE"])
    assert there.arrays["layer.0.tokens.fc_in.weight"].shape == (6, 16)
    assert not list(convert.identity.differences(there.to("google").arrays, source.arrays))


def test_the_tables_are_those_that_runs_wrote():
    from chart import readme_table
    from parity import tables

    results = json.loads((ROOT / "benchmarks" / "results" / "parity.json").read_text())
    measured, predicted = tables(results).split("\n\n")
    assert measured in PAGES["parity.md"]
    assert predicted in (ROOT / "benchmarks" / "README.md").read_text()
    in_readme = [line for line in measured.splitlines() if not line.startswith("| L/16")]
    assert "\n".join(in_readme) in PAGES["README.md"]
    assert all(row["passed"] for row in results["measured"])
    assert readme_table(ROOT / "benchmarks" / "results") in PAGES["README.md"]


def test_what_the_pages_mention_is_there():
    assert len(PAGES["README.md"].splitlines()) <= 150
    for page, text in PAGES.items():
        folder = ROOT if (ROOT / page).exists() else ROOT / "docs"
        for name in re.findall(r"\]\(([\w./-]+\.(?:md|png))", text):
            assert (folder / name).is_file(), (page, name)
        for target in re.findall(
            r"make ([a-z][a-z0-9-]+)(?=[\s`]|$)", " ".join(re.findall(r"`[^`]+`|^    .*$", text, re.MULTILINE))
        ):
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), (page, target)
    for name in PUBLISHED:
        folder, _, model = name.partition("/Mixer-")
        assert re.search(rf"`{folder}/Mixer-[^`]*{model.split('_')[1]}", PAGES["README.md"]), name
    for name in re.findall(r"`((?:timm/|hf:timm/)[^`*]+)`", " ".join(PAGES.values())):
        assert name in KNOWN
