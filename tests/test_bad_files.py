"""Every way a file can be wrong ends in one message that names the file, what was wanted and what was found."""

import io
import json
import os
import struct
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from conftest import TINY, random_weights

import convert
from convert import Checkpoint, CheckpointError, MixerConfig

FORMATS = [".npz", ".safetensors", pytest.param(".pt", marks=pytest.mark.torch), ""]
formats = pytest.mark.parametrize("ending", FORMATS)
KERNEL = "MixerBlock_1/channel_mixing/Dense_0/kernel"


def put(path, arrays):
    """Write arrays as they are, past every check of ours."""
    from convert import containers

    containers.module(containers.for_writing(path)).write(path, arrays, None)
    return path


def without(*names):
    return lambda w: {k: v for k, v in w.items() if not k.startswith(names)}


def changed(name, change):
    return lambda w: w | {name: change(w[name])}


def renamed(old, new):
    return lambda w: {new if k == old else k: v for k, v in w.items()}


def with_value(value):
    def change(array):
        array = array.copy()
        array.flat[3] = value
        return array

    return change


DAMAGE = {
    "missing": (without("pre_head_layer_norm/scale"), r"google layout\n  missing: pre_head_layer_norm/scale"),
    "extra": (lambda w: w | {"cls": w["head/bias"]}, r"unknown: cls"),
    "renamed": (
        renamed("head/bias", "head/offset"),
        r"missing: head/bias\n  unknown: head/offset",
    ),
    "half a head": (without("head/kernel"), r"missing: head/kernel"),
    "rank": (changed("head/bias", lambda a: a[None]), r"head/bias: found \(1, 5\), wanted the axes \(num_classes\)"),
    "rank of the stem": (
        changed("stem/kernel", lambda a: a[0]),
        r"stem/kernel: found \(3, 3, 7\), wanted the axes \(patch_height, patch_width, in_channels, hidden_dim\)",
    ),
    "rank of all kernels": (
        lambda w: {k: v[..., None] if k.endswith("kernel") else v for k, v in w.items()},
        r"head/kernel: found \(7, 5, 1\), wanted the axes|\(14 in all\)",
    ),
    "shape": (changed(KERNEL, lambda a: a[:, 1:]), rf"{KERNEL}: found \(7, 12\), wanted \(7, 13\)"),
    "transposed": (changed(KERNEL, lambda a: a.T), rf"{KERNEL}: found \(13, 7\), wanted \(7, 13\)"),
    "a block in the middle": (
        without("MixerBlock_1/"),
        r"missing: MixerBlock_1/LayerNorm_0/bias, .*, \.\.\. \(12\)",
    ),
    "blocks from the second on": (without("MixerBlock_0/"), r"missing: MixerBlock_0/.* \(12\)"),
    "integers": (changed("head/bias", lambda a: a.astype("int32")), r"41 of float32, 1 of int32 \(head/bias: int32\)"),
    "all integers": (lambda w: {k: v.astype("int64") for k, v in w.items()}, r"42 of int64"),
    "complex": (changed("head/bias", lambda a: a.astype("complex64")), r"\(head/bias: complex64\)"),
    "mixed": (changed("head/bias", lambda a: a.astype("float16")), r"1 of float16 \(head/bias: float16\)"),
    "float64": (
        lambda w: {k: v.astype("float64") for k, v in w.items()},
        r"float64 weights.*: keep them with --dtype float64 or round them with --dtype float32",
    ),
    "a ViT": (
        lambda w: {"cls": w["head/bias"], "Transformer/encoderblock_0/LayerNorm_0/bias": w["head/bias"]},
        r"not a Mixer checkpoint: it looks like a Vision Transformer\n  found: Transformer/.*cls\n  wanted, for example: Mixer",
    ),
    "another network": (lambda w: {"conv/w": w["head/bias"]}, r"no array of a Mixer block is in it"),
}
for value, found in ((np.nan, "1 NaN and 0 infinite"), (np.inf, "0 NaN and 1 infinite")):
    DAMAGE[f"{value}"] = (
        changed(KERNEL, with_value(value)),
        rf"{KERNEL}: {found} values; to load them all the same, say --allow-nonfinite or allow_nonfinite=True",
    )


@formats
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_arrays_are_refused(tmp_path, ending, damage):
    change, message = DAMAGE[damage]
    path = put(tmp_path / f"bad{ending}", change(random_weights(TINY)))
    with pytest.raises(CheckpointError, match=f"(?s)^{path}: .*{message}"):
        read_all(convert.read(path))


@pytest.mark.parametrize("ending", FORMATS[:-1])  # Orbax writes no empty tree
def test_a_file_without_arrays_is_refused(tmp_path, ending):
    with pytest.raises(CheckpointError, match="no arrays in it"):
        convert.read(put(tmp_path / f"bad{ending}", {}))


def read_all(checkpoint):
    for array in checkpoint.arrays.values():
        np.asarray(array)


@formats
def test_nan_and_infinity_are_loaded_with_the_flag(tmp_path, ending):
    weights = changed(KERNEL, with_value(np.nan))(random_weights(TINY))
    path = put(tmp_path / f"nan{ending}", weights)
    read = convert.read(path, allow_nonfinite=True)
    assert np.array_equal(np.asarray(read.arrays[KERNEL]), weights[KERNEL], equal_nan=True)


def test_a_gmixer_is_refused_by_name(tmp_path):
    weights = {k: np.asarray(v) for k, v in Checkpoint.from_arrays(random_weights(TINY)).to("timm").arrays.items()}
    for name in [name for name in weights if name.endswith("fc2.weight")]:
        weights[name] = weights[name][:, : weights[name].shape[1] // 2]
    for name in [name for name in weights if "fc1" in name]:
        weights[name] = weights[name][: weights[name].shape[0] // 2 * 2]
    with pytest.raises(CheckpointError, match="a gMixer, not an MLP-Mixer: its MLPs are gated"):
        convert.read(put(tmp_path / "gmixer.npz", weights))


def widths_of_b(num_blocks):
    config = MixerConfig.named("B/32", image_size=64, num_classes=3).replace(num_blocks=num_blocks)
    return {k: np.zeros((), "float32") + np.zeros(v.shape, "float32") for k, v in random_weights(config).items()}


def test_a_known_width_with_another_depth_is_refused_unless_said(tmp_path):
    path = put(tmp_path / "short.npz", widths_of_b(2))
    wanted = "found 2 blocks, but Mixer-B, whose widths these are, has 12: is the file whole"
    with pytest.raises(CheckpointError, match=f"^{path}: {wanted}.*say --blocks 2 or num_blocks=2"):
        convert.read(path)
    assert convert.read(path, num_blocks=2).config.num_blocks == 2
    with pytest.raises(CheckpointError, match="found 2 blocks, wanted 3"):
        convert.read(path, num_blocks=3)
    with pytest.raises(CheckpointError, match="not a Mixer-B/32: found num_blocks 2, wanted 12"):
        convert.read(path, variant="B/32")


def test_another_variant_than_the_one_asked_for_is_refused(square):
    with pytest.raises(CheckpointError, match=r"google.npz: not a Mixer-S/16: found num_blocks 2, wanted 8; hidden_dim 10, w"):
        convert.read(square.weights_file, variant="S/16")


def test_a_grid_that_does_not_fit_is_refused(square):
    with pytest.raises(CheckpointError, match="image size 25x20 does not fit: the weights are for 16 patches of 5x5 pixels"):
        convert.read(square.weights_file, image_size=(25, 20))
    assert convert.read(square.weights_file, image_size=(10, 40)).config.grid == (2, 8)


# Files that are no checkpoint at all


def test_what_is_not_there_or_no_file_is_refused(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.npz").touch()
    (tmp_path / "page.npz").write_text("\n<!DOCTYPE html><html><body>404</body></html>")
    (tmp_path / "text.npz").write_text("not found")
    (tmp_path / "pickle.pt").write_bytes(b"\x80\x02}q\x00.")
    with zipfile.ZipFile(tmp_path / "nothing.npz", "w"):
        pass
    cases = {
        "nowhere.npz": "no such file or folder",
        "folder": "a folder, and not an Orbax checkpoint",
        "empty.npz": "an empty file",
        "page.npz": r"a web page \(HTML or XML\), not a checkpoint: the download did not give the file",
        "text.npz": "neither .npz, .safetensors, .pt nor an Orbax folder",
        "pickle.pt": "a bare pickle, which is never loaded",
        "nothing.npz": "no arrays in it",
    }
    for name, message in cases.items():
        with pytest.raises(CheckpointError, match=f"^{tmp_path / name}: {message}"):
            convert.read(tmp_path / name)


@pytest.mark.parametrize("ending", FORMATS[:-1])
def test_a_file_cut_short_anywhere_is_refused(tmp_path, ending):
    whole = put(tmp_path / f"whole{ending}", random_weights(TINY)).read_bytes()
    cut = tmp_path / f"cut{ending}"
    for length in [*range(200), *range(200, len(whole), len(whole) // 60), *range(len(whole) - 100, len(whole))]:
        cut.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=f"^{cut}: "):
            read_all(convert.read(cut))


def npz_of(**members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return file.getvalue()


def npy(array, **options):
    file = io.BytesIO()
    np.lib.format.write_array(file, array, **options)
    return file.getvalue()


def test_an_object_array_is_never_unpickled(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    bomb = npy(np.array([Bomb()], dtype=object), allow_pickle=True)
    (tmp_path / "bomb.npz").write_bytes(npz_of(**{"stem/kernel.npy": bomb}))
    with pytest.raises(CheckpointError, match=r"stem/kernel.npy: an object array: loading it would run code .* never loaded"):
        convert.read(tmp_path / "bomb.npz")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.torch
def test_code_in_a_pt_is_never_run(tmp_path):
    import torch

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    torch.save({"stem.proj.weight": Bomb()}, tmp_path / "bomb.pt")
    with pytest.raises(CheckpointError, match=r"torch.load\(weights_only=True\) refuses it, and nothing else is tried"):
        convert.read(tmp_path / "bomb.pt")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.torch
def test_a_pt_that_is_no_state_dict_is_refused(tmp_path):
    import torch

    torch.save([torch.ones(2)], tmp_path / "list.pt")
    torch.save({"model": {"a": torch.ones(2)}, "epoch": 3}, tmp_path / "training.pt")
    with pytest.raises(CheckpointError, match="holds a list, not a state_dict"):
        convert.read(tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="no array of a Mixer block is in it\n  found: model/a"):
        convert.read(tmp_path / "training.pt")


@pytest.mark.torch
def test_a_pt_with_a_flipped_bit_is_refused_though_torch_takes_it(tmp_path):
    import torch

    weights = {k: np.asarray(v) for k, v in Checkpoint.from_arrays(random_weights(TINY)).to("timm").arrays.items()}
    path = put(tmp_path / "w.pt", weights)
    data = bytearray(path.read_bytes())
    data[data.index(weights["stem.proj.weight"].tobytes()) + 2] ^= 1
    path.write_bytes(data)
    flipped = torch.load(path, weights_only=True)["stem.proj.weight"].numpy()
    assert not np.array_equal(flipped, weights["stem.proj.weight"])
    with pytest.raises(CheckpointError, match=r"its bytes are not the ones that were written \(CRC-32\)"):
        convert.read(path)


def test_a_zip_that_is_no_npz_is_refused(tmp_path):
    for name, members, message in (
        ("readme", {"readme.txt": b"hello"}, r"readme.txt: not an array \(.npy\)"),
        ("garbage", {"stem/kernel.npy": b"hello"}, "stem/kernel.npy: not an .npy array"),
        ("short", {"a.npy": npy(np.zeros(4))[:-8]}, r"a.npy: shape \(4,\) of float64 takes 32 bytes, 24 are there"),
        ("long", {"a.npy": npy(np.zeros(4)) + b"12345678"}, r"takes 32 bytes, 40 are there"),
    ):
        (tmp_path / f"{name}.npz").write_bytes(npz_of(**members))
        with pytest.raises(CheckpointError, match=message):
            convert.read(tmp_path / f"{name}.npz")


def test_two_members_of_one_name_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "twice.npz", "w") as archive:
        archive.writestr("a.npy", npy(np.zeros(4)))
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("a.npy", npy(np.ones(4)))
    with pytest.raises(CheckpointError, match="two members of one name: a.npy"):
        convert.read(tmp_path / "twice.npz")


@pytest.mark.parametrize("name", ["../stem/kernel", "/etc/passwd", "C:\\stem"])
def test_member_names_are_names_and_never_paths(tmp_path, name):
    weights = random_weights(TINY) | {name: np.zeros(2, "float32")}
    np.savez(tmp_path / "w.npz", **weights)
    with pytest.raises(CheckpointError, match="unknown: "):
        convert.read(tmp_path / "w.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["w.npz"]


def test_of_two_writers_to_one_target_one_wins_whole(tmp_path):
    """Started together in two processes; the target is one of the two files, whole, and nothing else is left."""
    for seed in (0, 1):
        put(tmp_path / f"{seed}.npz", random_weights(TINY.replace(channels_mlp_dim=999), seed))
    for force in ([], ["--force"]):
        target = tmp_path / "target.npz"
        target.unlink(missing_ok=True)
        commands = [
            [sys.executable, "-m", "convert", "npz2timm", str(tmp_path / f"{seed}.npz"), str(target), *force] for seed in (0, 1)
        ]
        processes = [subprocess.Popen(c, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for c in commands]
        said = [process.communicate()[1] for process in processes]
        codes = sorted(process.returncode for process in processes)
        assert codes == ([0, 0] if force else [0, 1]), said
        if not force:
            assert "exists already" in "".join(said) or "appeared while it was being written" in "".join(said)
        read = convert.read(target).to("google").as_numpy()
        assert any(
            all(np.array_equal(read[k], v) for k, v in random_weights(TINY.replace(channels_mlp_dim=999), s).items())
            for s in (0, 1)
        )
        assert {path.name for path in tmp_path.iterdir()} == {"0.npz", "1.npz", "target.npz"}


def test_a_size_beyond_the_file_is_refused_before_memory_is_taken(tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (1 << 40,)})
    data = bytearray(npz_of(**{"stem/kernel.npy": header.getvalue() + b"1234"}))
    (tmp_path / "bomb.npz").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"shape \(1099511627776,\) of float32 takes 4398046511104 bytes, 4 are there"):
        convert.read(tmp_path / "bomb.npz")
    for size in ((1 << 31) - 1,):  # the directory lies too
        at = data.rindex(b"PK\x01\x02") + 20
        data[at + 4 : at + 8] = struct.pack("<I", size)
        (tmp_path / "liar.npz").write_bytes(data)
        with pytest.raises(CheckpointError, match=rf"claims {size} bytes, more than the file can hold"):
            convert.read(tmp_path / "liar.npz")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, r"a has shape \(2,\) in bytes 0 to 4"),
        ({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}, r"shape \[-1\] in bytes \[0, -4\]"),
        ({"a": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}}, r"shape \[2.0\] in bytes"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [8]}}, "not enough values to unpack"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": ["0", "8"]}}, "in bytes"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}, "a has shape"),
        ({"a": {"dtype": "Q9", "shape": [2], "data_offsets": [0, 8]}}, "KeyError: 'Q9'"),
        ({"a": {"dtype": "F32", "shape": [2]}}, "damaged safetensors header"),
        ({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, r"bytes announced, the file has"),
        (["a"], "damaged safetensors header"),
    ],
)
def test_a_safetensors_header_that_lies_is_refused(tmp_path, header, message):
    text = json.dumps(header).encode()
    if isinstance(header, list):
        text = b"{" + text
    path = tmp_path / "w.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"12345678")
    with pytest.raises(CheckpointError, match=message):
        convert.read(path)


def test_a_huge_safetensors_header_is_refused_before_memory_is_taken(tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 50) + b"{}" * 10)
    with pytest.raises(CheckpointError, match=f"a header of {1 << 50} bytes in a file of 28"):
        convert.read(path)
    path.write_bytes(struct.pack("<Q", 30) + b'{"a":{"dtype":1},"a":{"dt":1}}')
    with pytest.raises(CheckpointError, match="a name stands twice"):
        convert.read(path)


# Targets


@formats
def test_a_target_in_the_way_is_kept(tmp_path, square, ending):
    source, target = convert.read(square.weights_file), tmp_path / f"w{ending}"
    convert.write(target, source)
    before = target.stat().st_mtime_ns
    with pytest.raises(CheckpointError, match=rf"^{target}: .*\(replace it with --force or force=True\)"):
        convert.write(target, source)
    assert target.stat().st_mtime_ns == before
    convert.write(target, source.with_classes(0), force=True)
    assert convert.read(target).sizes["num_classes"] == 0
    assert [path.name for path in tmp_path.iterdir()] == [target.name]


def test_a_folder_in_the_way_is_never_replaced(tmp_path, square):
    source = convert.read(square.weights_file)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    (tmp_path / "w.npz").mkdir()
    for name in ("mine", "w.npz"):
        for force in (False, True):
            with pytest.raises(CheckpointError, match=f"^{tmp_path / name}: a folder is in the way; give a name that is free"):
                convert.write(tmp_path / name, source, force=force)
    assert (tmp_path / "mine" / "thesis.tex").exists()


@formats
def test_the_source_is_never_the_target(tmp_path, square, ending):
    path = tmp_path / f"w{ending}"
    convert.write(path, convert.read(square.weights_file))
    (tmp_path / f"link{ending}").symlink_to(path)
    for target in (path, tmp_path / f"link{ending}"):
        with pytest.raises(CheckpointError, match=f"^{target}: is the source itself; give another name"):
            convert.write(target, convert.read(path), force=True)


def test_a_folder_that_does_not_exist_is_named(tmp_path, square):
    with pytest.raises(CheckpointError, match=f"the folder {tmp_path / 'no'} does not exist"):
        convert.write(tmp_path / "no" / "w.npz", convert.read(square.weights_file))


def test_a_target_that_appears_meanwhile_is_kept(tmp_path, square):
    target = tmp_path / "w.npz"
    source = convert.read(square.weights_file)

    def intrude(_):
        target.write_text("somebody else's")

    with pytest.raises(CheckpointError, match="exists already|appeared while it was being written"):
        convert.write(target, source, progress=intrude)
    assert target.read_text() == "somebody else's"
    assert list(tmp_path.iterdir()) == [target]


@formats
def test_a_fault_found_while_writing_leaves_nothing_behind(tmp_path, ending):
    path = put(tmp_path / "nan.npz", changed(KERNEL, with_value(np.nan))(random_weights(TINY)))
    with pytest.raises(CheckpointError, match="1 NaN"):
        convert.write(tmp_path / f"w{ending}", convert.read(path))
    assert list(tmp_path.iterdir()) == [path]


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)), resource.RLIM_INFINITY))
from convert.__main__ import main
sys.exit(main())
"""


@pytest.mark.parametrize("ending", FORMATS)
def test_a_full_disk_leaves_nothing_behind(tmp_path, ending):
    """The kernel refuses the write past a limit on the size of files, as it does on a full disk."""
    source = put(tmp_path / "source.npz", random_weights(TINY.replace(channels_mlp_dim=4096)))
    target = tmp_path / f"w{ending}"
    done = run_limited(20_000, "npz2timm", source, target)
    assert done.returncode == 1, done.stderr
    assert "error: " in done.stderr
    if ending:  # TensorStore's own threads print theirs whatever we do
        assert done.stderr.startswith("error: "), done.stderr
        assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == [source]


def test_a_disk_without_room_is_seen_before_anything_is_written(tmp_path, square, monkeypatch):
    from convert import files

    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: files.shutil._ntuple_diskusage(10**6, 10**6, 5000))
    with pytest.raises(CheckpointError, match="needs 0 MiB and the disk has 0 MiB left"):
        convert.write(tmp_path / "w.npz", convert.read(square.weights_file))
    assert not list(tmp_path.iterdir())


def run_limited(limit, *arguments):
    return subprocess.run(
        [sys.executable, "-c", LIMITED, str(limit), *map(str, arguments)], capture_output=True, text=True, check=False
    )
