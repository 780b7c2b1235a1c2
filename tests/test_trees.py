"""Trees that trainers write: Flax's msgpack, Orbax, big_vision. What is hostile is refused, in bounded memory."""

import json
import os
import re
import shutil
import struct
import subprocess
import sys

import msgpack
import numpy as np
import pytest
from conftest import TINY, random_weights
from test_convert import equal, refuse_to_read, saved_by_big_vision, saved_by_others

import convert
from convert import Checkpoint, ReadOptions
from convert.formats import FORMATS, zarr
from convert.formats import msgpack as flax_msgpack
from convert.locate import locate

WEIGHTS = random_weights(TINY)


def nested(arrays):
    from flax.traverse_util import unflatten_dict

    return unflatten_dict(arrays, sep="/")


def read_by(format, path):
    content = FORMATS[format].read(path)
    return {name: np.asarray(array) for name, array in content.arrays.items()}, list(content.others)


# msgpack


@pytest.mark.parametrize("chunk", [1 << 30, 64], ids=["whole", "in chunks"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_flax_restores_what_is_written_and_the_other_way_round(tmp_path, monkeypatch, dtype, chunk):
    from flax import serialization

    monkeypatch.setattr(flax_msgpack, "CHUNK", chunk)
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", chunk)
    weights = {name: array.astype(convert.dtypes.as_dtype(dtype)) for name, array in WEIGHTS.items()}
    convert.write(tmp_path / "ours.msgpack", Checkpoint.from_arrays(weights))
    data, tree = (tmp_path / "ours.msgpack").read_bytes(), nested(weights)
    zeros = nested({name: np.zeros_like(array) for name, array in weights.items()})
    for restored in (
        serialization.msgpack_restore(data)["params"],
        serialization.from_bytes({"params": zeros}, data)["params"],
    ):
        assert equal(convert.prefixes.flattened(restored)[0], weights)
    (tmp_path / "theirs.msgpack").write_bytes(serialization.to_bytes({"params": tree}))
    for name in ("ours", "theirs"):
        checkpoint = convert.read(tmp_path / f"{name}.msgpack")
        assert equal(checkpoint.as_numpy(), weights)
        assert checkpoint.verified == (name == "ours")
        kernel = FORMATS["msgpack"].read(tmp_path / f"{name}.msgpack").arrays
        kernel = next(array for path, array in kernel.items() if path.endswith("stem/kernel"))
        assert all(np.array_equal(kernel[i], weights["stem/kernel"][i]) for i in range(2))


def test_a_train_state_is_read_with_its_optimiser_and_counters_apart(tmp_path):
    from flax.serialization import to_bytes

    state = ({"a": np.ones((2, 3), "float32")}, ({}, {"count": np.int32(5), "key": np.zeros(2, "uint32")}), 3, None, [1.5, 1j])
    (tmp_path / "checkpoint_3").write_bytes(to_bytes(state))
    arrays, others = read_by("msgpack", tmp_path / "checkpoint_3")
    assert list(arrays) == ["0/a"]
    assert sorted(others) == ["1/0", "1/1/count", "1/1/key", "2", "3", "4/0", "4/1"]
    packed = {b"a": [np.ones(2), {"b": np.zeros(3)}], 7: 1}
    data = msgpack.packb(packed, default=lambda array: msgpack.ExtType(1, array_bytes(array)), strict_types=True)
    (tmp_path / "checkpoint_3").write_bytes(data)
    assert read_by("msgpack", tmp_path / "checkpoint_3")[0].keys() == {"a/0", "a/1/b"}


def array_bytes(array, shape=None, name=None):
    return msgpack.packb((array.shape if shape is None else shape, name or array.dtype.name, array.tobytes()))


def extension(*arguments, code=1):
    return msgpack.packb({"a": msgpack.ExtType(code, array_bytes(np.ones(2, "float32"), *arguments))})


def deep(levels, ends=b"\x01"):
    return b"\x81\xa1a" * levels + ends


HOSTILE = {
    "text": (b"\x81\xdb\xff\xff\xff\xff", "4294967295 bytes announced at 1"),
    "array": (b"\x81\xa1a\xc9\xff\xff\xff\xff\x01\x93", "4294967295 bytes announced at 3"),
    "list": (b"\x81\xa1a\xdd\xff\xff\xff\xff", "4294967295 bytes announced"),
    "map": (b"\xdf\xff\xff\xff\xff\xa1a", "8589934590 bytes announced at 0"),
    "many": (b"\x81\xa1a\xdd" + struct.pack(">I", 100_001) + b"\xc0" * 100_001, "more than 100000 entries"),
    "depth": (deep(65), "nested more than 64 deep"),
    "more depth": (deep(100_000), "nested more than 64 deep"),
    "depth of lists": (b"\x81\xa1a" + b"\x91" * 100_000 + b"\x01", "nested more than 64 deep"),
    "extension": (extension(code=5), "a: an extension of type 5, which Flax does not write"),
    "timestamp": (b"\x81\xa1a\xd6\xff1234", "a: an extension of type 255"),
    "twice": (b"\x82\xa1a\x01\xa1a\x02", "the key 'a' stands twice in the file"),
    "twice as a number": (b"\x82\xa1b\x81\xa11\x01\xa1b\x01", "the key 'b' stands twice"),
    "twice in a path": (b"\x82\xa3a/b\x01\xa1a\x81\xa1b\x01", "'a/b' twice"),
    "no text": (b"\x81\xa2\xff\xfe\x01", "the text at byte 2 is not UTF-8"),
    "key": (b"\x81\xc0\x01", "no length or index at byte 1"),
    "long key": (b"\x81\xda\x03\xe9" + b"a" * 1001 + b"\x01", "a key of 1001 bytes"),
    "long path": (b"\x81\xda\x03\xe8" + b"a" * 1000 + b"\x81\xa1a\x01", "with a name too long"),
    "no such byte": (b"\x81\xa1a\xc1", "no value of msgpack begins at byte 3"),
    "more": (b"\x81\xa1a\x01\x02", "1 bytes follow after the end"),
    "size": (extension((3,)), r"a: damaged: shape \(3,\) of float32 takes 12 bytes, which are not those that are there"),
    "huge": (extension((1 << 60,)), r"shape \(1152921504606846976,\) of float32 takes"),
    "zero and huge": (extension((0, 1 << 62)), "a: damaged: shape"),
    "negative": (extension((-2,)), "a: damaged: no length or index"),
    "dtype": (extension(None, "object"), "a: damaged: an array of 'object'"),
    "other dtype": (extension(None, "f4,f4"), "a: damaged: an array of 'f4,f4'"),
    "not a tuple": (msgpack.packb({"a": msgpack.ExtType(1, b"\x01\x02\x03")}), "a: damaged: not an array of Flax"),
    "longer inside": (b"\x81\xa1a\xc7\x03\x01\x93\x91\x01\xa1a\x01", "damaged"),
    "no chunks": (
        msgpack.packb({"a": {"__msgpack_chunked_array__": True, "shape": {"0": 1 << 60}, "chunks": {}}}),
        "a: damaged",
    ),
    "nothing": (b"\x81\xa1a\x80", "no arrays in it"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_msgpack_is_refused(tmp_path, name):
    data, message = HOSTILE[name]
    (tmp_path / "w.msgpack").write_bytes(data)
    refuse_to_read(tmp_path / "w.msgpack", message)


def test_msgpack_is_told_from_a_pickle_and_needs_no_ending(tmp_path):
    (tmp_path / "checkpoint_3").write_bytes(b"\x80\x04}\x94.")
    refuse_to_read(tmp_path / "checkpoint_3", "a bare pickle")
    saved_by_others(tmp_path / "w.msgpack", WEIGHTS).rename(tmp_path / "checkpoint_3")
    assert equal(convert.read(tmp_path / "checkpoint_3").as_numpy(), WEIGHTS)


# Orbax


def standard(path, tree):
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)


def plain(zarr3):
    def save(path, tree):
        import orbax.checkpoint as ocp

        ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=zarr3)).save(path, tree)

    return save


def zarr3(path, tree):
    import orbax.checkpoint as ocp

    ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_zarr3=True)).save(path, tree)


def version_1(path, tree):
    from orbax.checkpoint.experimental import v1

    v1.save(path, tree)


def managed(path, tree):
    import orbax.checkpoint as ocp

    options = ocp.CheckpointManagerOptions(step_prefix="run", step_format_fixed_length=6)
    with ocp.CheckpointManager(path, options=options) as manager:
        for step, values in ((3, {"a": np.zeros(2)}), (12, tree)):
            manager.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(values), about=ocp.args.JsonSave({"x": 1})))


WRITERS = {"standard": standard, "zarr3": zarr3, "files": plain(False), "zarr3 files": plain(True), "v1": version_1}


@pytest.mark.parametrize("writer", [*WRITERS, "manager"])
def test_every_writer_of_orbax_is_read(tmp_path, writer):
    import jax

    tree = {"l": [np.ones(2, "float32"), {"d.o/t": np.zeros((3, 4), "float32")}], "b": np.ones(2).astype("bfloat16"), "e": {}}
    tree |= {"rng": jax.random.key(0)} if writer in ("standard", "manager") else {}
    (WRITERS | {"manager": managed})[writer](tmp_path / "w", tree)
    arrays, others = read_by("orbax", locate(tmp_path / "w"))
    assert equal(arrays, {"l/0": tree["l"][0], "l/1/d.o/t": tree["l"][1]["d.o/t"], "b": tree["b"]})
    assert set(others) == {"e"} | ({"rng"} & tree.keys()) | ({"about"} if writer == "manager" else set())


def test_orbax_items_of_arrays_are_told_apart_by_their_names(tmp_path):
    import jax
    import orbax.checkpoint as ocp

    args = {
        "weights": ocp.args.PyTreeSave({"a": np.ones(2), "s": "text", "n": None, "i": 3}),
        "ema": ocp.args.ArraySave(np.ones(3)),
    }
    args |= {"key": ocp.args.JaxRandomKeySave(jax.random.key(0)), "about": ocp.args.JsonSave({"x": 1})}
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(5, args=ocp.args.Composite(**args))
    arrays, others = read_by("orbax", locate(tmp_path))
    assert arrays.keys() == {"weights/a", "ema/checkpoint"}
    assert sorted(others) == ["about", "key", "weights/i", "weights/n", "weights/s"]


def test_items_of_stacked_blocks_are_read_alike_from_memory_and_from_a_temporary_file(tmp_path, monkeypatch):
    convert.write(tmp_path / "w", Checkpoint.from_arrays(WEIGHTS), layout="flax")
    for kept in (1 << 20, 0):
        monkeypatch.setattr(zarr, "KEPT", kept)
        assert equal(convert.read(tmp_path / "w").to("google").as_numpy(), WEIGHTS)


def test_orbax_is_read_without_orbax_and_jax(tmp_path, square):
    convert.write(tmp_path / "w", convert.read(square.weights_file), layout="flax")
    code = "import sys, convert; convert.read(sys.argv[1]).as_numpy(); assert not {'jax', 'orbax', 'flax'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code, tmp_path / "w"], check=True)


# zarr whose metadata lies


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    saved_by_big_vision(folder / "bigvision", {f"params/{name}": array for name, array in WEIGHTS.items()})
    plain(True)(folder / "zarr3", nested(WEIGHTS))
    plain(False)(folder / "files", nested(WEIGHTS))
    standard(folder / "ocdbt", nested(WEIGHTS))
    return folder


def changed(file, change):
    text = file.read_text()
    file.write_text(json.dumps(change(json.loads(text))) if callable(change) else text.replace(*change, 1))
    assert file.read_text() != text


def shard(shape, outer, inner):
    def change(metadata):
        metadata["codecs"][0]["configuration"]["chunk_shape"] = inner
        metadata["chunk_grid"]["configuration"]["chunk_shape"] = outer
        return metadata | {"shape": shape}

    return change


BV, V3, TREE = "params~head~kernel/.zarray", "head.kernel/zarr.json", "_METADATA"
BLOSC = {"compressor": {"id": "blosc", "cname": "lz4", "clevel": 5, "shuffle": 1, "blocksize": 0}}
TOO_MUCH = r"its metadata announces arrays of \d+ bytes, and there are \d+ in the folder"
LIES = {
    "shape": ("bigvision", BV, lambda m: m | {"shape": [1 << 50, 5]}, TOO_MUCH),
    "shape and chunks": ("bigvision", BV, lambda m: m | {"shape": [1 << 40, 5], "chunks": [1 << 40, 5]}, TOO_MUCH),
    "chunks": (
        "bigvision",
        BV,
        lambda m: m | {"chunks": [1 << 40, 5]},
        r"head/kernel: .* chunks of \(1099511627776, 5\) in an array",
    ),
    "more rows": (
        "bigvision",
        BV,
        lambda m: m | {"shape": [8, 5]},
        r"head/kernel: found \(8, 5\), wanted \(7, 5\)",
    ),
    "codec": ("bigvision", BV, lambda m: m | BLOSC, "head/kernel: compressed with blosc, which neither JAX nor Orbax writes"),
    "dtype": ("bigvision", BV, lambda m: m | {"dtype": "<f8"}, r"1 of float64 \(head/kernel: float64\)"),
    "fields": ("bigvision", BV, lambda m: m | {"dtype": [["a", "<f2"], ["b", "<f2"]]}, "head/kernel: TensorStore cannot"),
    "negative": ("bigvision", BV, lambda m: m | {"shape": [-7, 5]}, "head/kernel: TensorStore cannot open it"),
    "not JSON": ("bigvision", BV, ("{", "["), "head/kernel: TensorStore cannot open it"),
    "zarr3 shape": ("zarr3", V3, shard([1 << 40, 5], [1 << 20, 5], [1 << 20, 5]), TOO_MUCH),
    "zarr3 shard": ("zarr3", V3, shard([7, 5], [7 << 25, 5], [7, 5]), r"chunks of \(234881024, 5\) in an array of \(7, 5\)"),
    "zarr3 pieces": ("zarr3", V3, shard([1 << 15, 1 << 15], [1 << 15, 1 << 15], [1, 1]), TOO_MUCH),
    "path": ("files", TREE, ('{"key": "head"', '{"key": "../../w/head"'), "a leaf called '../../w/head/"),
    "absolute path": ("files", TREE, ('{"key": "head"', '{"key": "/etc"'), "a leaf called '/etc/"),
    "no such leaf": ("ocdbt", TREE, ('{"key": "head"', '{"key": "hand"'), "hand/bias: TensorStore cannot open it"),
    "twice": ("ocdbt", TREE, ('"key": "kernel"', '"key": "bias"'), "which is no name or stands twice"),
    "no list": ("ocdbt", TREE, ("tree_metadata", "tree"), "a damaged _METADATA"),
    "deep": ("ocdbt", TREE, ("{", "[" * 100_000), "_METADATA: damaged or not readable"),
}
LIMITED = """
import json, resource, sys
import convert, tensorstore
resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
for path in sys.argv[1:]:
    try:
        convert.read(path).as_numpy()
        print(json.dumps("read"))
    except convert.CheckpointError as error:
        print(json.dumps(str(error)))
(peak,) = [int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")]  # KiB, of this program alone
assert peak < 1 << 19, peak
"""


def test_zarr_metadata_that_lies_is_refused_before_memory_is_taken(tmp_path, saved):
    """In a process of less memory than any of the lies asks for, where TensorStore would end it."""
    for name, (writer, file, change, _) in LIES.items():
        shutil.copytree(saved / writer, tmp_path / name)
        changed(tmp_path / name / file, change)
    done = subprocess.run([sys.executable, "-c", LIMITED, *(tmp_path / name for name in LIES)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for (name, (*_, message)), result in zip(LIES.items(), map(json.loads, done.stdout.splitlines()), strict=True):
        assert re.match(f"(?s){re.escape(str(tmp_path / name))}: .*({message})", result), f"{name}: {result}"


@pytest.mark.parametrize(("writer", "chunk"), [("bigvision", "params~head~kernel/0.0"), ("zarr3", "head.kernel/c/0/0")])
def test_a_chunk_that_is_missing_is_not_zero(tmp_path, saved, writer, chunk):
    shutil.copytree(saved / writer, tmp_path / "w")
    (tmp_path / "w" / chunk).unlink()
    refuse_to_read(tmp_path / "w", r"head/kernel: TensorStore cannot read it: .*is missing")


@pytest.mark.parametrize("writer", ["bigvision", "ocdbt"])
def test_links_stay_in_the_folder(tmp_path, saved, writer):
    shutil.copytree(saved / writer, tmp_path / "w")
    first = min(path for path in (tmp_path / "w").rglob("*") if path.is_file())
    shutil.copy(first, tmp_path / "outside")
    first.rename(tmp_path / "w" / "inside")
    first.symlink_to(tmp_path / "w" / "inside")
    assert equal(convert.read(tmp_path / "w").as_numpy(), WEIGHTS)
    (tmp_path / "link").symlink_to(tmp_path / "w")
    assert equal(convert.read(tmp_path / "link").as_numpy(), WEIGHTS)
    for target in (tmp_path / "outside", "nowhere", first):
        first.unlink()
        first.symlink_to(target)
        refuse_to_read(tmp_path / "w", "a link that leads out of the folder: copy what it points to")
    first.unlink()
    os.mkfifo(first)
    refuse_to_read(tmp_path / "w", f"{first.name}: neither a file nor a folder")


# Steps and pointers


def runs(folder):
    """Folders of three checkpoints each, of which step 12 is the newest and has WEIGHTS."""
    older = {name: array + 1 for name, array in WEIGHTS.items()}
    for step, weights in ((3, older), (7, older), (12, WEIGHTS)):
        saved_by_others(folder / "w.msgpack", weights).rename(folder / "files" / f"checkpoint_{step}")
        saved_by_others(folder / "orbax" / f"{step:06}", weights)
        saved_by_big_vision(folder / "bigvision" / f"checkpoint.bv-{step:09}", weights)
    (folder / "bigvision" / "checkpoint.bv-LAST").write_text("000000012")
    (folder / "files" / "notes_99").write_text("no checkpoint")
    (folder / "orbax" / "000099.orbax-checkpoint-tmp").mkdir()
    (folder / "orbax" / "000100.orbax-checkpoint-tmp-17").mkdir()
    return older


def test_the_newest_step_is_taken_or_the_one_that_is_wanted(tmp_path):
    for kind in ("files", "orbax", "bigvision"):
        (tmp_path / kind).mkdir()
    older = runs(tmp_path)
    for folder, name in (("files", "checkpoint_12"), ("orbax", "000012"), ("bigvision", "checkpoint.bv-000000012")):
        newest = convert.read(tmp_path / folder)
        assert equal(newest.as_numpy(), WEIGHTS)
        assert newest.notes[0] == f"{name} taken, of the steps 3, 7, 12"
        assert newest.source == str(tmp_path / folder / name)
        assert equal(convert.read(tmp_path / folder, ReadOptions(step=7)).as_numpy(), older)
        refuse_to_read(tmp_path / folder, "no step 8: found 3, 7, 12", step=8)
        refuse_to_read(tmp_path / folder / name, "has no steps, so --step 7 selects nothing", step=7)
    (tmp_path / "files" / "ema-12").write_bytes((tmp_path / "files" / "checkpoint_3").read_bytes())
    refuse_to_read(
        tmp_path / "files", "checkpoints of several kinds, such as checkpoint_7, ema-12: give the path of one of them"
    )
    pointer = tmp_path / "bigvision" / "checkpoint.bv-LAST"
    for content in ("000000007\n", "checkpoint.bv-000000007"):
        pointer.write_text(content)
        for path in (pointer, tmp_path / "bigvision", tmp_path / "bigvision" / "checkpoint.bv"):
            assert equal(convert.read(path).as_numpy(), older)
        assert equal(convert.read(pointer, ReadOptions(step=12)).as_numpy(), WEIGHTS)
    for content in (
        "../..",
        "/etc",
        "..",
        ".",
        "",
        "000000099",
        "a\0b",
        "7" * 5000,
        "LAST",
        "\xff",
        "../bigvision/checkpoint.bv-000000007",
    ):
        pointer.write_text(content)
        for path in (pointer, tmp_path / "bigvision") if len(content) < 200 else (tmp_path / "bigvision",):
            refuse_to_read(path, "checkpoint.bv-LAST: must hold the name or the step of a checkpoint beside it, not '")


def test_a_file_that_exists_is_read_whatever_pointer_lies_beside_it(tmp_path):
    np.savez(tmp_path / "other.npz", **random_weights(TINY, seed=3))
    for name in ("w.npz", "model-LAST", f"{'n' * 251}.npz"):  # the last is as long as a name can be
        with open(tmp_path / name, "wb") as file:
            np.savez(file, **WEIGHTS)
    (tmp_path / "w.npz-LAST").write_text("other.npz")
    for name in ("w.npz", "model-LAST", f"{'n' * 251}.npz"):
        checkpoint = convert.read(tmp_path / name)
        assert equal(checkpoint.as_numpy(), WEIGHTS)
        assert checkpoint.notes == ()
