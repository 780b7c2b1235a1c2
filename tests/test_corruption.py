"""A damaged file is an error, or its damage touches neither an array nor what the file says of them."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import mutations
import numpy as np
import pytest
from conftest import random_weights

import convert
from convert import Checkpoint, CheckpointError, MixerConfig
from convert.arrays import same_bytes

TINIEST = MixerConfig(
    patch_size=(1, 1),
    image_size=(1, 2),
    num_blocks=1,
    hidden_dim=2,
    tokens_mlp_dim=1,
    channels_mlp_dim=1,
    num_classes=2,
    in_channels=1,
)
FILES = [".npz", ".safetensors", pytest.param(".pt", marks=pytest.mark.torch)]
LAYOUT = {".npz": "flax", ".safetensors": "timm", ".pt": "timm"}


@pytest.fixture
def original() -> Checkpoint:
    return made()


def is_refused_or_whole(path, original) -> bool:
    """True if refused. Fails where it is read as something else."""
    refusal = None
    try:
        read = convert.read(path, num_blocks=1)
        arrays = read.to("google").as_numpy()
    except CheckpointError as error:
        refusal = str(error)
    if refusal is not None:
        assert refusal.startswith(str(path))
        return True
    assert arrays.keys() == original.arrays.keys()
    assert all(same_bytes(array, original.arrays[name]) for name, array in arrays.items())
    assert read.metadata == original.metadata
    return False


def flips_are_refused_or_harmless(folder, path, original, step: int) -> tuple[int, int]:
    """Flip every `step`-th bit of every file there is; how many were refused, of how many."""
    refused = tried = 0
    files = [path] if path.is_file() else [file for file in sorted(path.rglob("*")) if file.is_file()]
    for file in files:
        whole = file.read_bytes()
        for bit in range(0, 8 * len(whole), step):
            damaged = bytearray(whole)
            damaged[bit // 8] ^= 1 << bit % 8
            file.write_bytes(damaged)
            tried += 1
            refused += is_refused_or_whole(path, original)
        file.write_bytes(whole)
    assert not is_refused_or_whole(path, original)
    return refused, tried


def written(tmp_path, original, ending, layout):
    path = tmp_path / f"w{ending}"
    convert.write(path, original, layout=layout)
    return path


def cuts_are_refused_or_harmless(folder, path, original, step: int) -> tuple[int, int]:
    """Cut every file there is at every `step`-th length; how many were refused, of how many."""
    refused = tried = 0
    for file in [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]:
        whole = file.read_bytes()
        for length in range(0, len(whole), step):
            file.write_bytes(whole[:length])
            tried += 1
            refused += is_refused_or_whole(path, original)
        file.write_bytes(whole)
    return refused, tried


def made() -> Checkpoint:
    """With an epsilon that no layout has, so that losing it would show."""
    weights = Checkpoint.from_arrays(random_weights(TINIEST))
    return weights.with_metadata(layer_norm_epsilon=3e-5, labels=("cat", "dog")).with_image_size((1, 2))


def of_orbax(tmp_path, damage: str, step: int) -> tuple[int, int]:
    """In a process of its own, since Orbax's threads complain on their own of what they were given."""
    code = (
        "import sys, pathlib, test_corruption as t; folder = pathlib.Path(sys.argv[1]); original = t.made()\n"
        "path = t.written(folder, original, '', 'flax')\n"
        f"print(*t.{damage}_are_refused_or_harmless(folder, path, original, step={step}))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    refused, tried = done.stdout.split()
    return int(refused), int(tried)


@pytest.mark.parametrize("ending", FILES)
def test_flipped_bits_are_refused_or_harmless(tmp_path, original, ending):
    path = written(tmp_path, original, ending, LAYOUT[ending])
    refused, tried = flips_are_refused_or_harmless(tmp_path, path, original, step=61 if ending == ".safetensors" else 499)
    assert 0.2 * tried < refused <= tried


def test_flipped_bits_of_an_orbax_folder_are_refused_or_harmless(tmp_path):
    refused, tried = of_orbax(tmp_path, "flips", step=997)
    assert 0.2 * tried < refused < tried  # Orbax keeps notes and copies besides, which nothing needs


@pytest.mark.heavy
@pytest.mark.parametrize("ending", FILES)
def test_every_flipped_bit_is_refused_or_harmless(tmp_path, original, ending):
    path = written(tmp_path, original, ending, LAYOUT[ending])
    refused, tried = flips_are_refused_or_harmless(tmp_path, path, original, step=1)
    print(f"{ending}: {refused} of {tried} flips refused, the others harmless")


@pytest.mark.heavy
def test_every_31st_flipped_bit_of_an_orbax_folder_is_refused_or_harmless(tmp_path):
    """Not every one: restoring a folder takes some twenty milliseconds."""
    refused, tried = of_orbax(tmp_path, "flips", step=31)
    print(f"Orbax: {refused} of {tried} flips refused, the others harmless")


@pytest.mark.parametrize("ending", FILES)
def test_a_file_cut_at_any_length_is_refused(tmp_path, original, ending):
    path = written(tmp_path, original, ending, LAYOUT[ending])
    refused, tried = cuts_are_refused_or_harmless(tmp_path, path, original, step=1)
    assert refused == tried


def test_an_orbax_folder_with_a_file_cut_is_refused_or_whole(tmp_path):
    refused, tried = of_orbax(tmp_path, "cuts", step=41)
    assert 0.2 * tried < refused


def test_flipped_bits_of_a_deflated_npz_are_refused_or_harmless(tmp_path, original):
    np.savez_compressed(tmp_path / "w.npz", **original.arrays)
    plain = Checkpoint.from_arrays(original.arrays)
    flips_are_refused_or_harmless(tmp_path, tmp_path / "w.npz", plain, step=331)


@pytest.mark.parametrize("missing", ["metadata", "params"])
def test_an_orbax_folder_without_a_part_is_refused_or_says_nothing(tmp_path, original, missing):
    path = written(tmp_path, original, "", "flax")
    shutil.rmtree(path / missing)
    if missing == "params":
        with pytest.raises(CheckpointError, match=f"^{path}: "):
            convert.read(path)
    else:
        assert not convert.read(path).stated


# How many of the 20,000 mutations of the whole campaign a format gets; restoring an Orbax folder takes long.
SHARES = {
    "npz": 4500,
    "npz deflated by NumPy": 3500,
    "safetensors": 4500,
    "safetensors of the library": 2500,
    "pt": 4000,
    "orbax": 1000,
}
formats = pytest.mark.parametrize("format", [pytest.param(f, marks=pytest.mark.torch) if f == "pt" else f for f in SHARES])


def nothing_is_wrong(folder, format: str, count: int) -> None:
    if format == "orbax":  # in a process of its own, as above
        command = [sys.executable, mutations.__file__, str(folder), format, str(count)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        counts = json.loads(done.stdout)
    else:
        counts = mutations.campaign(folder, format, count)
    print(f"{format:<27}" + "".join(f"{number:>8,} {outcome}" for outcome, number in counts.items()))
    assert sum(counts.values()) == count
    assert counts["traceback"] == 0
    assert counts["refused"] > 0.3 * count
    assert (counts["wrong"] > 0) == (format == "safetensors of the library")  # it has no checksums


@formats
def test_mutations_are_refused_or_harmless_where_there_are_checksums(tmp_path, format):
    nothing_is_wrong(tmp_path, format, SHARES[format] // 50)


@pytest.mark.heavy
@formats
def test_20_000_mutations_are_refused_or_harmless_where_there_are_checksums(tmp_path, format):
    nothing_is_wrong(tmp_path, format, SHARES[format])


CANNOT, AS_WRITTEN = "cannot be verified: the file has no checksums", "as written, by the file's checksums"


@pytest.mark.parametrize(
    ("ending", "theirs"),
    [
        (".npz", AS_WRITTEN),
        (".safetensors", CANNOT),
        pytest.param(".pt", AS_WRITTEN, marks=pytest.mark.torch),
        ("", CANNOT),
    ],
)
def test_inspect_says_of_every_file_whether_it_can_be_verified(tmp_path, original, capsys, ending, theirs):
    """A zip has its own checksums, whoever wrote it; safetensors and Orbax folders have those that we write."""
    from convert.__main__ import main

    saved_by_others(tmp_path / f"theirs{ending}", original.as_numpy())
    convert.write(tmp_path / f"ours{ending}", original)
    for name, verdict in (("theirs", theirs), ("ours", AS_WRITTEN)):
        assert main(["inspect", str(tmp_path / f"{name}{ending}"), "--image-size", "1x2"]) == 0
        assert f"integrity           {verdict}\n" in capsys.readouterr().out


def saved_by_others(path, weights):
    """With the library that most people use for a format."""
    if path.suffix == ".npz":
        np.savez(path, **weights)
    elif path.suffix == ".safetensors":
        from safetensors.numpy import save_file

        save_file(weights, path)
    elif path.suffix == ".pt":
        import torch

        torch.save({name: torch.from_numpy(array) for name, array in weights.items()}, path)
    else:
        import orbax.checkpoint as ocp
        from flax.traverse_util import unflatten_dict

        tree = ocp.args.StandardSave(unflatten_dict(weights, sep="/"))
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            checkpointer.save(path, args=ocp.args.Composite(params=tree))


def test_an_orbax_folder_with_other_values_is_refused(tmp_path, original):
    """Whole and sound as a folder, with an array, a shape or a name that is not the one that was written."""
    convert.write(tmp_path / "ours", original)
    weights, name = original.as_numpy(), "head/kernel"
    changes = {
        "a bit": {name: (weights[name].view(np.uint32) ^ (np.arange(4).reshape(2, 2) == 3)).astype(np.uint32).view(np.float32)},
        "shape": {name: weights[name].reshape(4)},
        "dtype": {name: weights[name].view(np.int32)},
        "more": {"another/kernel": weights[name]},
    }
    for change, arrays in changes.items():
        shutil.copytree(tmp_path / "ours", tmp_path / change)
        shutil.rmtree(tmp_path / change / "params")
        saved_by_others(tmp_path / "theirs", weights | arrays)
        (tmp_path / "theirs" / "params").rename(tmp_path / change / "params")
        shutil.rmtree(tmp_path / "theirs")
        with pytest.raises(
            CheckpointError, match=rf"^{tmp_path / change}: {next(iter(arrays))}: not what was written \(CRC-32\)"
        ):
            convert.read(tmp_path / change)


@pytest.mark.parametrize(
    ("ending", "name"),
    [(".npz", "mixer_jax"), (".safetensors", "mixer_jax"), (".safetensors", "checksums"), ("", "mixer_jax"), ("", "checksums")],
)
def test_metadata_of_ours_does_not_pass_for_somebody_elses(tmp_path, original, ending, name):
    """One damaged name does not make the numerics and the checksums of a file vanish."""
    path = tmp_path / f"w{ending}"
    convert.write(path, original)
    file = path / "metadata" / "metadata" if path.is_dir() else path
    whole = file.read_bytes()
    file.write_bytes(whole.replace(f'"{name}'.encode(), f'"{name[:-1]}?'.encode(), 1))
    assert file.read_bytes() != whole
    with pytest.raises(CheckpointError, match=f"damaged.*KeyError: '{name}'"):
        convert.read(path)


def test_an_npz_comment_of_zeros_is_not_taken_for_silence(tmp_path, original):
    path = tmp_path / "w.npz"
    convert.write(path, original)
    data = path.read_bytes()
    start = data.rindex(b'{"mixer_jax"')
    path.write_bytes(data[:start] + bytes(len(data) - start))
    with pytest.raises(CheckpointError, match="its zip comment is damaged"):
        convert.read(path)


def test_changed_weights_are_not_held_to_the_files_fingerprint(tmp_path, original, capsys):
    from convert.__main__ import main

    convert.write(tmp_path / "w.safetensors", original)
    assert main(["inspect", str(tmp_path / "w.safetensors"), "--dtype", "float16"]) == 0
    assert "float16" in capsys.readouterr().out
    read = convert.read(tmp_path / "w.safetensors")
    assert read.claimed
    assert read.to("flax").claimed == read.claimed
    for other in (read.astype("float16"), read.without_head(), read.with_selected_classes([1]), read.resized((2, 4))):
        assert other.claimed is None


def test_a_fingerprint_that_is_not_the_arrays_is_refused(tmp_path, original, capsys, monkeypatch):
    """The arrays' checksums could be made anew; the fingerprint would still tell."""
    from convert import checkpoint
    from convert.__main__ import main

    monkeypatch.setattr(checkpoint, "fingerprint_of", lambda digests: "0" * 64)
    convert.write(tmp_path / "w.safetensors", original)
    assert main(["inspect", str(tmp_path / "w.safetensors")]) == 1
    assert "states the fingerprint 0000" in capsys.readouterr().err
