"""Every way a file can be wrong ends in one message that names the file, what was wanted and what was found."""

import io
import itertools
import json
import os
import struct
import subprocess
import sys
import types
import zipfile

import numpy as np
import pytest
from conftest import TINY, random_weights
from test_convert import ENDINGS, endings, equal, refuse_to_read

import convert
from convert import Checkpoint, CheckpointError, MixerConfig, ReadOptions, atomic
from convert.formats import format_for_writing

KERNEL = "MixerBlock_1/channel_mixing/Dense_0/kernel"


def put(path, arrays):
    """Write arrays as they are, without any check."""
    format_for_writing(path).write(path, arrays, {})
    return path


def without(*names):
    return lambda w: {k: v for k, v in w.items() if not k.startswith(names)}


def changed(name, change):
    return lambda w: w | {name: change(w[name])}


def with_value(value):
    return changed(KERNEL, lambda a: np.concatenate([np.full(3, value, a.dtype), a.ravel()[3:]]).reshape(a.shape))


DAMAGE = {
    "missing": (without("pre_head_layer_norm/scale"), r"google layout\n  missing: pre_head_layer_norm/scale"),
    "extra": (lambda w: w | {"cls": w["head/bias"]}, r"unknown: cls"),
    "renamed": (
        lambda w: without("head/bias")(w) | {"head/offset": w["head/bias"]},
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
    "a block in the middle": (without("MixerBlock_1/"), r"missing: MixerBlock_1/LayerNorm_0/bias, .*, \.\.\. \(12\)"),
    "blocks from the second on": (without("MixerBlock_0/"), r"missing: MixerBlock_0/.* \(12\)"),
    "integers": (changed("head/bias", lambda a: a.astype("int32")), r"41 of float32, 1 of int32 \(head/bias: int32\)"),
    "all integers": (lambda w: {k: v.astype("int64") for k, v in w.items()}, r"42 of int64"),
    "complex": (changed("head/bias", lambda a: a.astype("complex64")), r"\(head/bias: complex64\)"),
    "mixed": (changed("head/bias", lambda a: a.astype("float16")), r"1 of float16 \(head/bias: float16\)"),
    "float64": (
        lambda w: {k: v.astype("float64") for k, v in w.items()},
        r"float64 weights.*: keep them with --dtype float64 or cast them with --dtype float32",
    ),
    "a ViT": (
        lambda w: {"cls": w["head/bias"], "Transformer/encoderblock_0/LayerNorm_0/bias": w["head/bias"]},
        r"not a Mixer checkpoint: it looks like a Vision Transformer\n  found: Transformer/.*cls\n  wanted, for example: Mixer",
    ),
    "another network": (lambda w: {"conv/w": w["head/bias"]}, r"no array of a Mixer block is in it"),
}
for value, count in ((np.nan, "3 NaN and 0 infinite"), (np.inf, "0 NaN and 3 infinite")):
    DAMAGE[f"{value}"] = (
        with_value(value),
        rf"{KERNEL}: {count} values; --allow-nonfinite or ReadOptions\(allow_nonfinite=True\) accepts them",
    )


@pytest.mark.parametrize("ending", [".npz"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_arrays_are_refused(tmp_path, damage, ending):
    change, message = DAMAGE[damage]
    refuse_to_read(put(tmp_path / f"bad{ending}", change(random_weights(TINY))), message)


@endings
@pytest.mark.parametrize("damage", ["missing", "shape", "integers", "float64", "nan"])
def test_damaged_arrays_are_refused_in_every_format(tmp_path, ending, damage):
    test_damaged_arrays_are_refused(tmp_path, damage, ending)


@pytest.mark.parametrize("ending", ENDINGS[:-1])  # Orbax writes no empty tree
def test_a_file_without_arrays_is_refused(tmp_path, ending):
    refuse_to_read(put(tmp_path / f"bad{ending}", {}), "no arrays in it")


@endings
def test_nan_and_infinity_are_loaded_with_the_flag(tmp_path, ending):
    weights = with_value(np.nan)(random_weights(TINY))
    path = put(tmp_path / f"nan{ending}", weights)
    checkpoint = convert.read(path, ReadOptions(allow_nonfinite=True))
    assert np.array_equal(np.asarray(checkpoint.arrays[KERNEL]), weights[KERNEL], equal_nan=True)


def test_a_gmixer_is_refused_by_name(tmp_path):
    weights = Checkpoint.from_arrays(random_weights(TINY)).to("timm").as_numpy()
    for name in [name for name in weights if name.endswith("fc2.weight")]:
        weights[name] = weights[name][:, : weights[name].shape[1] // 2]
    for name in [name for name in weights if "fc1" in name]:
        weights[name] = weights[name][: weights[name].shape[0] // 2 * 2]
    with pytest.raises(CheckpointError, match="a gMixer, not an MLP-Mixer: its MLPs are gated"):
        convert.read(put(tmp_path / "gmixer.npz", weights))


def test_a_known_width_with_another_depth_must_be_confirmed(tmp_path):
    config = MixerConfig.named("B/32", image_size=64, num_classes=3).replace(num_blocks=2)
    path = put(tmp_path / "short.npz", {k: np.zeros(v.shape, "float32") for k, v in random_weights(config).items()})
    message = "found 2 blocks, but Mixer-B, whose widths these are, has 12: is the file complete"
    refuse_to_read(path, rf"{message}.* --depth 2 or ReadOptions\(num_blocks=2\)")
    refuse_to_read(path, "found 2 blocks, wanted 3", num_blocks=3)
    refuse_to_read(path, "not a Mixer-B/32: found num_blocks 2, wanted 12", variant="B/32")
    assert convert.read(path, ReadOptions(num_blocks=2)).config.num_blocks == 2


def test_another_variant_than_the_required_one_and_a_grid_that_does_not_fit_are_refused(square):
    path = square.weights_file
    refuse_to_read(path, r"not a Mixer-S/16: found num_blocks 2, wanted 8; hidden_dim 10, w", variant="S/16")
    message = "image size 25x20 does not fit: the weights are for 16 patches of 5x5 pixels"
    refuse_to_read(path, message, image_size=(25, 20))
    assert convert.read(path, ReadOptions(image_size=(10, 40))).config.grid == (2, 8)


# Files that are no checkpoint at all


def npz_of(name, data):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, data)
    return file.getvalue()


def npy(array, **options):
    file = io.BytesIO()
    np.lib.format.write_array(file, array, **options)
    return file.getvalue()


def too_large(in_directory=False):
    """An .npz whose header promises an array of 4 TiB, or whose directory promises more than the file can hold."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (1 << 40,)})
    data = bytearray(npz_of("stem/kernel.npy", header.getvalue() + b"1234"))
    at = data.rindex(b"PK\x01\x02") + 20
    data[at + 4 : at + 8] = struct.pack("<I", (1 << 31) - 1) if in_directory else data[at + 4 : at + 8]
    return bytes(data)


def safetensors(header):
    """A file with eight bytes of values."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + b"12345678"


def of_a(offsets, shape=(2,), dtype="F32"):
    return safetensors({"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}})


NO_CHECKPOINTS = {
    "empty.npz": (b"", "an empty file"),
    "page.npz": (
        b"\n<!DOCTYPE html><html><body>404</body></html>",
        r"a web page \(HTML or XML\), not a checkpoint: the download did not give the file",
    ),
    "text.npz": (b"not found", "not a checkpoint: neither .npz, .safetensors, .pt, .msgpack nor an Orbax folder"),
    "pickle.pt": (b"\x80\x02}q\x00.", "a bare pickle, which is never loaded"),
    "readme.npz": (npz_of("readme.txt", b"hello"), r"readme.txt: not an array \(.npy\)"),
    "garbage.npz": (npz_of("stem/kernel.npy", b"hello"), "stem/kernel.npy: not an .npy array"),
    "short.npz": (npz_of("a.npy", npy(np.zeros(4))[:-8]), r"a.npy: shape \(4,\) of float64 takes 32 bytes, 24 are there"),
    "long.npz": (npz_of("a.npy", npy(np.zeros(4)) + b"12345678"), r"takes 32 bytes, 40 are there"),
    "bomb.npz": (too_large(), r"shape \(1099511627776,\) of float32 takes 4398046511104 bytes, 4 are there"),
    "bomb2.npz": (too_large(in_directory=True), rf"{(1 << 31) - 1} bytes, more than the file can hold"),
    "length.safetensors": (of_a([0, 4]), r"a has shape \(2,\) in bytes 0 to 4"),
    "negative.safetensors": (of_a([0, -4], [-1]), r"shape \[-1\] in bytes \[0, -4\]"),
    "fraction.safetensors": (of_a([0, 8], [2.0]), r"shape \[2.0\] in bytes"),
    "one offset.safetensors": (of_a([8]), "not enough values to unpack"),
    "texts.safetensors": (of_a(["0", "8"]), "in bytes"),
    "outside.safetensors": (of_a([4, 12]), "a has shape"),
    "dtype.safetensors": (of_a([0, 8], dtype="Q9"), "KeyError: 'Q9'"),
    "no offsets.safetensors": (safetensors({"a": {"dtype": "F32", "shape": [2]}}), "damaged safetensors header"),
    "cut off.safetensors": (of_a([0, 16], [4]), r"bytes announced, the file has"),
    "no JSON.safetensors": (safetensors(b'{["a"]'), "damaged safetensors header"),
    "twice.safetensors": (safetensors(b'{"a":{"dtype":1},"a":{"dt":1}}'), "a name stands twice"),
    "huge.safetensors": (struct.pack("<Q", 1 << 50) + b"{}" * 10, f"a header of {1 << 50} bytes in a file of 28"),
}


@pytest.mark.parametrize("name", NO_CHECKPOINTS)
def test_what_is_no_checkpoint_is_refused_before_memory_is_taken(tmp_path, name):
    data, message = NO_CHECKPOINTS[name]
    (tmp_path / name).write_bytes(data)
    refuse_to_read(tmp_path / name, message)


def test_what_is_not_there_or_no_file_is_refused(tmp_path):
    refuse_to_read(tmp_path / "nowhere.npz", "no such file or folder")
    refuse_to_read(tmp_path, r"a folder in which no checkpoint is found: neither .*, nor steps of one \(7, step_7,")


class Bomb:
    """Makes a folder where it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder / "exploded"),)


def test_an_object_array_is_never_unpickled(tmp_path):
    bomb = npy(np.array([Bomb(tmp_path)], dtype=object), allow_pickle=True)
    (tmp_path / "bomb.npz").write_bytes(npz_of("stem/kernel.npy", bomb))
    message = r"stem/kernel.npy: an object array: loading it would run code .* never loaded"
    refuse_to_read(tmp_path / "bomb.npz", message)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.torch
def test_code_in_a_pt_is_never_run_and_what_is_no_state_dict_is_refused(tmp_path):
    import torch

    for saved, message in (
        ({"stem.proj.weight": Bomb(tmp_path)}, r"torch.load\(weights_only=True\) refuses it, and nothing else is tried"),
        ([torch.ones(2)], "holds a list, not a state_dict"),
        ({"model": {"a": torch.ones(2)}, "epoch": 3}, "no array of a Mixer block is in it\n  found: model/a"),
        ({"head.weight": torch.ones(2, 2).to_sparse()}, "head.weight: a sparse or quantized tensor: save it after to_dense"),
    ):
        torch.save(saved, tmp_path / "w.pt")
        refuse_to_read(tmp_path / "w.pt", rf"{message}[^\x1b]*$")  # no escape codes of a terminal
    assert not (tmp_path / "exploded").exists()


@pytest.mark.torch
def test_a_pt_with_a_flipped_bit_is_refused_though_torch_takes_it(tmp_path):
    import torch

    weights = Checkpoint.from_arrays(random_weights(TINY)).to("timm").as_numpy()
    path, stem = put(tmp_path / "w.pt", weights), weights["stem.proj.weight"]
    data = bytearray(path.read_bytes())
    data[data.index(stem.tobytes()) + 2] ^= 1
    path.write_bytes(data)
    assert not np.array_equal(torch.load(path, weights_only=True)["stem.proj.weight"].numpy(), stem)
    refuse_to_read(path, r"its bytes are not the ones that were written \(CRC-32\)")


def test_two_members_of_one_name_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "twice.npz", "w") as archive:
        archive.writestr("a.npy", npy(np.zeros(4)))
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("a.npy", npy(np.ones(4)))
    refuse_to_read(tmp_path / "twice.npz", "two members of one name: a.npy")


@pytest.mark.parametrize("name", ["../stem/kernel", "/etc/passwd", "C:\\stem"])
def test_member_names_are_names_and_never_paths(tmp_path, name):
    weights = random_weights(TINY) | {name: np.zeros(2, "float32")}
    np.savez(tmp_path / "w.npz", **weights)
    refuse_to_read(tmp_path / "w.npz", "unknown: ")
    assert [path.name for path in tmp_path.iterdir()] == ["w.npz"]


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_of_two_writers_to_one_target_one_wins_whole(tmp_path, force):
    """Started together in two processes; the target is one of the two files, whole, and nothing else is left."""
    weights = [random_weights(TINY.replace(channels_mlp_dim=999), seed) for seed in (0, 1)]
    sources, target = [put(tmp_path / f"{seed}.npz", arrays) for seed, arrays in enumerate(weights)], tmp_path / "target.npz"
    commands = [[sys.executable, "-m", "convert", "npz2timm", source, target, *force] for source in sources]
    processes = [subprocess.Popen(c, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for c in commands]
    errors = "".join(process.communicate()[1] for process in processes)
    assert sorted(process.returncode for process in processes) == ([0, 0] if force else [0, 1]), errors
    assert force or "exists already" in errors or "appeared while it was being written" in errors
    arrays = convert.read(target).to("google").arrays
    assert any(equal(arrays, one) for one in weights)
    assert set(tmp_path.iterdir()) == {*sources, target}


# Targets


@endings
def test_a_target_in_the_way_is_kept_and_the_source_is_never_the_target(tmp_path, square, ending):
    source, target, link = convert.read(square.weights_file), tmp_path / f"w{ending}", tmp_path / f"link{ending}"
    convert.write(target, source)
    before = target.stat().st_mtime_ns
    with pytest.raises(CheckpointError, match=rf"^{target}: .*\(replace it with --force or force=True\)"):
        convert.write(target, source)
    assert target.stat().st_mtime_ns == before
    convert.write(target, source.with_classes(0), force=True)
    assert convert.read(target).sizes["num_classes"] == 0
    assert list(tmp_path.iterdir()) == [target]
    link.symlink_to(target)
    for path in (target, link):
        with pytest.raises(CheckpointError, match=f"^{path}: is the source itself; give another name"):
            convert.write(path, convert.read(target), force=True)


def test_a_folder_in_the_way_is_never_replaced_and_one_that_does_not_exist_is_named(tmp_path, square):
    source = convert.read(square.weights_file)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    (tmp_path / "w.npz").mkdir()
    for name, force in itertools.product(("mine", "w.npz"), (False, True)):
        with pytest.raises(CheckpointError, match=f"^{tmp_path / name}: a folder is in the way; give a name that is free"):
            convert.write(tmp_path / name, source, force=force)
    assert (tmp_path / "mine" / "thesis.tex").exists()
    with pytest.raises(CheckpointError, match=f"the folder {tmp_path / 'no'} does not exist"):
        convert.write(tmp_path / "no" / "w.npz", source)


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)), resource.RLIM_INFINITY))
from convert.__main__ import main
sys.exit(main())
"""


@endings
def test_a_full_disk_leaves_nothing_behind(tmp_path, ending):
    """The kernel refuses the write past a limit on the size of files, as it does on a full disk."""
    source = put(tmp_path / "source.npz", random_weights(TINY.replace(channels_mlp_dim=4096)))
    target = tmp_path / f"w{ending}"
    command = [sys.executable, "-c", LIMITED, "20000", "npz2timm", str(source), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "error: " in done.stderr
    if ending:  # TensorStore's own threads print theirs whatever we do
        assert done.stderr.startswith("error: "), done.stderr
        assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == [source]


def test_a_disk_without_room_is_seen_before_anything_is_written(tmp_path, square, monkeypatch):
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=5000))
    with pytest.raises(CheckpointError, match="needs 0 MiB and the disk has 0 MiB left"):
        convert.write(tmp_path / "w.npz", convert.read(square.weights_file))
    assert not list(tmp_path.iterdir())
