"""A damaged file is an error, or its damage touches neither an array nor the metadata."""

import json
import shutil
import subprocess
import sys

import mutations
import numpy as np
import pytest
from test_convert import refuse_to_read, saved_by_others

import convert

param, torch, heavy = pytest.param, pytest.mark.torch, pytest.mark.heavy


@pytest.fixture
def original() -> convert.Checkpoint:
    return mutations.original()


# How many mutations of each file a format gets; an Orbax folder has some fifteen, and restoring it takes long.
CAMPAIGN = {"npz": 4500, "npz deflated by NumPy": 3500, "safetensors": 4500, "safetensors of the library": 2500}
CAMPAIGN |= {"pt": 4000, "msgpack": 4500, "orbax": 70}
CASES = [(format, "mutated", max(count // 50, 4)) for format, count in CAMPAIGN.items()]
CASES += [("npz", "flipped", 499), ("npz deflated by NumPy", "flipped", 331), ("safetensors", "flipped", 61)]
CASES += [("pt", "flipped", 499), ("msgpack", "flipped", 61), ("orbax", "flipped", 997)]
CASES += [("npz", "cut", 5), ("safetensors", "cut", 1), ("msgpack", "cut", 3), ("pt", "cut", 5), ("orbax", "cut", 97)]
# Written by others, where the format has no checksums: what is not refused may be wrong, and is never called verified.
UNVERIFIED = ("safetensors of the library", "msgpack of Flax", "orbax of others", "bigvision")
CASES += [("msgpack of Flax", "flipped", 61), ("orbax of others", "flipped", 997), ("bigvision", "flipped", 397)]
CASES += [("msgpack of Flax", "cut", 3), ("msgpack of Flax", "mutated", 45)]
HEAVY = [(format, "mutated", count) for format, count in CAMPAIGN.items()]
HEAVY += [(format, "flipped", 31 if format == "orbax" else 1) for format in ("npz", "safetensors", "msgpack", "pt", "orbax")]
HEAVY += [("msgpack of Flax", "flipped", 1), ("orbax of others", "flipped", 31), ("bigvision", "flipped", 5)]
HEAVY += [("msgpack of Flax", "mutated", 2500), ("orbax of others", "mutated", 70), ("bigvision", "mutated", 20)]
HEAVY += [("npz", "cut", 1), ("msgpack", "cut", 1), ("msgpack of Flax", "cut", 1), ("pt", "cut", 1), ("orbax", "cut", 41)]


@pytest.mark.parametrize(
    ("format", "kind", "amount"),
    [param(*case, marks=[torch] * (case[0] == "pt")) for case in CASES]
    + [param(*case, marks=[heavy, *[torch] * (case[0] == "pt")]) for case in HEAVY],
)
def test_damage_is_refused_or_harmless_where_there_are_checksums(tmp_path, format, kind, amount):
    """Bits flipped and lengths cut, every `amount`-th of them, or so many random mutations of every file."""
    if mutations.FORMATS[format][1] == "":
        command = [sys.executable, mutations.__file__, tmp_path, format, kind, str(amount)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        counts = json.loads(done.stdout)
    else:
        counts = mutations.campaign(tmp_path, format, kind, amount)
    print(f"{format:<27}{kind:<8}" + "".join(f"{number:>8,} {outcome}" for outcome, number in counts.items()))
    tried = sum(counts.values())
    assert tried > 40
    assert counts["traceback"] == 0
    if format in UNVERIFIED:
        assert counts["wrong"] > 0 or kind == "cut" or format not in ("safetensors of the library", "msgpack of Flax")
        return
    assert counts["wrong"] == 0
    assert counts["refused"] > (0.2 if format == "orbax" or kind == "flipped" else 0.3) * tried
    assert counts["refused"] == tried or kind != "cut" or format == "orbax"  # which keeps copies that nothing needs


@pytest.mark.parametrize("missing", ["metadata", "params"])
def test_an_orbax_folder_without_a_part_is_refused_or_has_no_metadata(tmp_path, original, missing):
    path = tmp_path / "w"
    convert.write(path, original, layout="flax")
    shutil.rmtree(path / missing)
    if missing == "params":
        refuse_to_read(path, "")
    else:
        assert not convert.read(path).explicit


CANNOT, AS_WRITTEN = (
    "cannot be verified: the file has no checksums, so a flipped bit would be a wrong weight",
    "as written, by the file's checksums",
)


@pytest.mark.parametrize(
    ("ending", "theirs"),
    [(".npz", AS_WRITTEN), (".safetensors", CANNOT), (".msgpack", CANNOT), param(".pt", AS_WRITTEN, marks=torch), ("", CANNOT)],
)
def test_inspect_says_of_every_file_whether_it_can_be_verified(tmp_path, original, capsys, ending, theirs):
    """A zip has its own checksums, whoever wrote it; the other formats have those that we write."""
    from convert.__main__ import main

    saved_by_others(tmp_path / f"theirs{ending}", original.as_numpy())
    convert.write(tmp_path / f"ours{ending}", original)
    for name, verdict in (("theirs", theirs), ("ours", AS_WRITTEN)):
        assert main(["inspect", str(tmp_path / f"{name}{ending}"), "--image-size", "1x2"]) == 0
        assert f"integrity           {verdict}\n" in capsys.readouterr().out


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
    messages = {"shape": r"head/kernel: found \(4,\), wanted the axes", "dtype": r"1 of int32 \(head/kernel: int32\)"}
    for change, arrays in changes.items():
        shutil.copytree(tmp_path / "ours", tmp_path / change)
        shutil.rmtree(tmp_path / change / "params")
        saved_by_others(tmp_path / "theirs", weights | arrays)
        (tmp_path / "theirs" / "params").rename(tmp_path / change / "params")
        shutil.rmtree(tmp_path / "theirs")
        written = rf"{next(iter(arrays))}: not what was written \(CRC-32\)"
        refuse_to_read(tmp_path / change, messages.get(change, written))


@pytest.mark.parametrize(
    ("ending", "name"),
    [(".npz", "mixer_jax")]
    + [(ending, name) for ending in (".safetensors", ".msgpack", "") for name in ("mixer_jax", "checksums")],
)
def test_metadata_of_ours_does_not_pass_for_somebody_elses(tmp_path, original, ending, name):
    """One damaged name does not make the numerics and the checksums of a file vanish."""
    path = tmp_path / f"w{ending}"
    convert.write(path, original)
    file = path / "metadata" / "metadata" if path.is_dir() else path
    whole = file.read_bytes()
    mark = "" if ending == ".msgpack" else '"'
    file.write_bytes(whole.replace(f"{mark}{name}".encode(), f"{mark}{name[:-1]}?".encode(), 1))
    assert file.read_bytes() != whole
    refuse_to_read(path, f"damaged.*KeyError: '{name}'")


def test_an_npz_comment_of_zeros_is_not_taken_for_silence(tmp_path, original):
    path = tmp_path / "w.npz"
    convert.write(path, original)
    data = path.read_bytes()
    start = data.rindex(b'{"mixer_jax"')
    path.write_bytes(data[:start] + bytes(len(data) - start))
    refuse_to_read(path, "its zip comment is damaged")
