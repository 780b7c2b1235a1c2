"""Mapping and files: what only moves numbers moves every bit."""

import json
import re
import zipfile

import numpy as np
import pytest
from conftest import TINY, random_weights

import convert
from convert import Checkpoint, CheckpointError, MixerConfig, ReadOptions
from convert.__main__ import main
from convert.arrays import LazyArray
from convert.formats import FORMATS
from convert.layouts import GOOGLE, LAYOUTS
from convert.mapping import shapes
from convert.metadata import add_checksum

ENDINGS = [".npz", ".safetensors", ".msgpack", pytest.param(".pt", marks=pytest.mark.torch), ""]
endings = pytest.mark.parametrize("ending", ENDINGS)
layouts = pytest.mark.parametrize("layout", LAYOUTS)
DTYPES = ("float16", "bfloat16", "float32", "float64")


def saved_by_others(path, weights, metadata=None):
    """A file by the library that most people use for a format, with metadata of theirs."""
    if path.suffix == ".npz":
        np.savez(path, **weights)
    elif path.suffix == ".safetensors":
        from safetensors.numpy import save_file

        save_file(weights, path, metadata)
    elif path.suffix == ".pt":
        import torch

        torch.save({name: torch.from_numpy(array) for name, array in weights.items()}, path)
    elif path.suffix == ".msgpack":
        from flax.serialization import msgpack_serialize
        from flax.traverse_util import unflatten_dict

        path.write_bytes(msgpack_serialize({"params": unflatten_dict(weights, sep="/")}))
    else:
        import orbax.checkpoint as ocp
        from flax.traverse_util import unflatten_dict

        items = {"params": ocp.args.StandardSave(unflatten_dict(weights, sep="/"))}
        items |= {"metadata": ocp.args.JsonSave(metadata)} if metadata else {}
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            checkpointer.save(path, args=ocp.args.Composite(**items))
    return path


def saved_by_big_vision(folder, arrays):
    """As its utils.py does: JAX's array serialization, each leaf in a folder with its path for a name."""
    import jax.numpy as jnp
    from jax.experimental.array_serialization.serialization import GlobalAsyncCheckpointManager

    folder.mkdir(parents=True)
    paths = [str(folder / name.replace("/", "~")) for name in arrays]
    manager = GlobalAsyncCheckpointManager()
    manager.serialize_with_paths([jnp.asarray(array) for array in arrays.values()], paths)
    manager.wait_until_finished()
    return folder


def equal(a, b) -> bool:
    """Same names, dtypes, shapes and bits, whatever the order."""
    pairs = [(np.asarray(a[name]), np.asarray(b[name])) for name in a.keys() & b.keys()]
    same = [x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes() for x, y in pairs]
    return a.keys() == b.keys() and all(same)


def refuse_to_read(path, message, **options) -> None:
    """Reading all of a file must fail with the name of the file and this message."""
    with pytest.raises(CheckpointError, match=f"(?s)^{re.escape(str(path))}: .*{message}"):
        convert.read(path, ReadOptions(**options)).as_numpy()


@endings
def test_a_golden_file_there_and_back_is_the_same_file(tmp_path, golden, ending):
    there, back = tmp_path / f"there{ending}", tmp_path / "back.npz"
    convert.write(there, convert.read(golden.weights_file), layout=convert.usual_layout(there))
    convert.write(back, convert.read(there), layout="google")
    assert back.read_bytes() == golden.weights_file.read_bytes()


@endings
@layouts
def test_every_bit_and_all_metadata_go_through_every_layout_and_format(tmp_path, layout, ending):
    fields = {
        "gelu": "exact",
        "layer_norm_epsilon": 3e-5,
        "image_size": (8, 15),
        "preprocessing": "squash",
        "labels": ("a", "b", "ç", "d, e", "f"),
    }
    path, weights = tmp_path / f"w{ending}", Checkpoint.from_arrays(random_weights(TINY)).with_metadata(**fields)
    for dtype in DTYPES:
        original = weights.astype(dtype)
        convert.write(path, original, layout=layout, force=True)
        back = convert.read(path, ReadOptions(dtype=dtype))
        assert (back.layout.name, back.dtype.name) == (layout, dtype)
        assert equal(back.to("google").arrays, original.arrays)
        assert back.metadata == original.metadata
        assert back.explicit >= fields.keys() - {"gelu"}  # which an .npz leaves out where it is the layout's default
        assert back.config == TINY.replace(gelu="exact", layer_norm_epsilon=3e-5)


WIDE = random_weights(TINY.replace(hidden_dim=520, channels_mlp_dim=1030))  # with arrays that are transposed in stripes


@endings
def test_large_arrays_are_bit_equal_in_every_format(tmp_path, ending):
    source = tmp_path / f"w{ending}"
    convert.write(source, Checkpoint.from_arrays(WIDE), layout="timm")
    assert equal(convert.read(source).to("google").arrays, WIDE)


def test_flax_stacks_blocks_by_number_and_not_by_name():
    weights = random_weights(TINY.replace(num_blocks=12))
    flax = Checkpoint.from_arrays(weights).to("flax").as_numpy()
    for ours, googles in (("token_norm/scale", "LayerNorm_0/scale"), ("token_mixing/dense_0/kernel",) * 2):
        googles = googles.replace("dense", "Dense")
        assert np.array_equal(flax[f"blocks/{ours}"], [weights[f"MixerBlock_{i}/{googles}"] for i in range(12)])


def test_nothing_is_read_before_its_values_are_needed(tmp_path):
    reads = []

    def lazy(name, array):
        def read(index):
            reads.append(name)
            return array if index is None else array[index]

        return LazyArray(array.shape, array.dtype, read)

    weights = {name: lazy(name, array) for name, array in random_weights(TINY).items()}
    flax = Checkpoint.from_arrays(weights).to("timm").to("flax").astype("float16").without_head().require_finite()
    assert flax.sizes["num_classes"] == 0
    assert not reads
    np.asarray(flax.arrays["blocks/channel_norm/bias"])
    assert reads == [f"MixerBlock_{i}/LayerNorm_1/bias" for i in range(3)]


def test_a_file_with_damaged_values_opens_and_the_array_is_refused(tmp_path):
    weights = random_weights(TINY)
    data = bytearray(saved_by_others(tmp_path / "w.npz", weights).read_bytes())
    data[data.index(weights["stem/kernel"].tobytes()) + 5] ^= 1
    (tmp_path / "w.npz").write_bytes(data)
    checkpoint = convert.read(tmp_path / "w.npz")
    with pytest.raises(CheckpointError, match=r"w.npz: stem/kernel.npy: its bytes are not the ones that were written"):
        np.asarray(checkpoint.arrays["stem/kernel"])


def test_verbs_change_no_argument():
    weights = random_weights(TINY)
    before = {name: array.copy() for name, array in weights.items()}
    checkpoint = Checkpoint.from_arrays(weights)
    other = checkpoint.astype("bfloat16").with_classes(9).to("flax").with_metadata(gelu="exact", labels=("x",) * 9)
    _ = other.as_numpy()
    assert list(weights) == list(before)
    assert equal(weights, before)
    assert checkpoint.metadata.gelu == "tanh"
    assert checkpoint.sizes["num_classes"] == 5


def test_deflated_and_fortran_and_big_endian_arrays_are_read(tmp_path):
    weights = random_weights(TINY)
    np.savez_compressed(tmp_path / "deflated.npz", **weights)
    saved_by_others(tmp_path / "fortran.npz", {name: np.asfortranarray(array) for name, array in weights.items()})
    saved_by_others(tmp_path / "big.npz", {name: array.astype(">f4") for name, array in weights.items()})
    for name in ("deflated", "fortran", "big"):
        checkpoint = convert.read(tmp_path / f"{name}.npz")
        assert equal(checkpoint.arrays, weights)
        assert all(np.asarray(array).flags.c_contiguous for array in checkpoint.arrays.values())
        assert equal(checkpoint.to("flax").to("google").arrays, weights)  # reads item by item


@pytest.mark.parametrize(("name", "size"), [("B/16", 239_567_448), pytest.param("L/16", 832_874_440, marks=pytest.mark.heavy)])
def test_a_synthetic_file_of_a_released_size_has_the_released_size(tmp_path, name, size):
    config = MixerConfig.named(name)
    arrays = {
        name: LazyArray(shape, np.dtype("float32"), lambda _, shape=shape: np.zeros(shape, "float32"))
        for name, shape in shapes(GOOGLE, config.sizes).items()
    }
    checkpoint = Checkpoint.from_arrays(arrays)
    assert checkpoint.config == config
    convert.write(tmp_path / "synthetic.npz", checkpoint)
    assert (tmp_path / "synthetic.npz").stat().st_size == size


# Metadata


@layouts
def test_a_file_without_metadata_has_its_layouts_numerics(tmp_path, layout):
    weights = Checkpoint.from_arrays(random_weights(TINY)).to(layout)
    checkpoint = convert.read(saved_by_others(tmp_path / "w.npz", weights.as_numpy()))
    assert checkpoint.metadata.gelu == ("tanh" if layout in ("google", "flax", "legacy") else "exact")
    assert checkpoint.metadata.layer_norm_epsilon == (1e-5 if layout in ("reference", "mmpretrain", "mlx") else 1e-6)
    assert not checkpoint.explicit


def test_an_npz_has_metadata_only_where_it_differs_from_googles(tmp_path, square):
    google = convert.read(square.weights_file)
    for checkpoint, fields in ((google, {}), (google.with_metadata(gelu="exact"), {"gelu": "exact"})):
        convert.write(tmp_path / "w.npz", checkpoint, force=True)
        with zipfile.ZipFile(tmp_path / "w.npz") as archive:
            assert len(archive.namelist()) == 30
            assert json.loads(archive.comment or b"{}").get("mixer_jax", {}) == add_checksum(fields)
            assert bool(archive.comment) == bool(fields)


def is_without_metadata(path):
    """A file of TINY's weights, whose metadata is somebody else's."""
    checkpoint = convert.read(path)
    assert checkpoint.metadata.gelu == "tanh"
    assert not checkpoint.explicit
    assert checkpoint.verified == (path.suffix == ".npz")  # a zip has checksums, whoever wrote it
    return equal(checkpoint.arrays, random_weights(TINY))


def test_another_writers_zip_comment_is_ignored(tmp_path):
    path = saved_by_others(tmp_path / "w.npz", random_weights(TINY))
    for comment in (
        b"trained on a Tuesday",
        b"[1]",
        b'{"other": 1}',
        b'{"crc32": "a sum of theirs"}',
        b'{"weights": {"crc32": "0123abcd"}, "checksums": 3}',
        b"crc32 of the folder: 0123abcd, for mixer_jax",
        b"[" * 60_000,
        b'{"by": "mixer_jax"}',
        "trainé".encode("latin-1"),
    ):
        with zipfile.ZipFile(path, "a") as archive:
            archive.comment = comment
        assert is_without_metadata(path)


@pytest.mark.parametrize("metadata", [{"crc32": "0123abcd"}, {"checksums": "none", "labels": "none"}, {"a": "crc32"}])
def test_another_writers_metadata_is_ignored(tmp_path, metadata):
    for name in ("w.safetensors", "w"):
        assert is_without_metadata(saved_by_others(tmp_path / name, random_weights(TINY), metadata))


def test_too_many_labels_for_a_zip_comment_are_refused(tmp_path):
    labels = tuple(f"a class with a long name, number {i}" for i in range(4000))
    checkpoint = Checkpoint.from_arrays(random_weights(TINY.replace(num_classes=4000))).with_metadata(labels=labels)
    with pytest.raises(CheckpointError, match=r"the labels take \d+ bytes and an .npz has room for 65535: write .safetensors"):
        convert.write(tmp_path / "w.npz", checkpoint)
    assert not list(tmp_path.iterdir())
    convert.write(tmp_path / "w.safetensors", checkpoint)
    assert convert.read(tmp_path / "w.safetensors").metadata.labels == labels


MISTAKES = (
    ({"gelu": "erf"}, "makes no sense: gelu 'erf'"),
    ({"layer_norm_epsilon": -1.0}, "makes no sense: layer_norm_epsilon -1.0"),
    ({"layer_norm_epsilon": "1e-6"}, "makes no sense: layer_norm_epsilon '1e-6'"),
    ({"image_size": [8]}, "makes no sense: image_size"),
    ({"labels": [1, 2, 3, 4, 5]}, "makes no sense: labels"),
    ({"preprocessing": "mystery"}, "makes no sense: preprocessing 'mystery'"),
    ({"gelu": "tanh", "attention": True}, "not understood .*: attention"),
    ({"labels": ["a"]}, "1 labels for 5 classes"),
    ({"image_size": [8, 16]}, "image size 8x16 does not fit: the weights are for 20 patches of 2x3"),
)


@pytest.mark.parametrize(("metadata", "message"), MISTAKES)
def test_metadata_that_makes_no_sense_is_refused(tmp_path, metadata, message):
    path = saved_by_others(tmp_path / "w.npz", random_weights(TINY))
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = json.dumps({"mixer_jax": add_checksum(metadata)}).encode()
    with pytest.raises(CheckpointError, match=message):
        _ = convert.read(path).config


# Dtypes and heads


def test_another_class_count_is_a_fresh_zero_head():
    weights = Checkpoint.from_arrays(random_weights(TINY))
    other = weights.with_classes(9)
    assert other.arrays["head/kernel"].shape == (7, 9)
    assert not np.asarray(other.arrays["head/kernel"]).any()
    assert equal(other.without_head().arrays, weights.without_head().arrays)
    assert weights.with_classes(5) is weights
    assert weights.with_classes(0).sizes["num_classes"] == 0


def test_rounding_is_to_nearest_even_and_never_to_infinity():
    weights = random_weights(TINY)
    weights["head/bias"][:] = [1 + 2**-8, 1 + 3 * 2**-8, 0, -1.5, 3e38]
    rounded = np.asarray(Checkpoint.from_arrays(weights).astype("bf16").arrays["head/bias"]).astype("float32")
    assert rounded[:4].tolist() == [1, 1 + 2**-6, 0, -1.5]
    weights["head/bias"][0] = 1e5
    half = Checkpoint.from_arrays(weights).astype("float16")
    with pytest.raises(CheckpointError, match="head/bias: too large for float16, some values would become infinite"):
        np.asarray(half.arrays["head/bias"])


# Other people's code


@pytest.mark.torch
def test_the_safetensors_library_reads_what_is_written_and_the_reverse(tmp_path, square):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    for dtype in ("float32", "bfloat16", "float16"):
        weights = convert.read(square.weights_file).astype(dtype).to("timm")
        convert.write(ours, weights, force=True)
        save_file(load_file(ours), theirs)
        assert equal(convert.read(theirs).arrays, weights.arrays)
        with safe_open(ours, "np") as file:
            assert file.metadata()["format"] == "pt"


@pytest.mark.torch
def test_torch_loads_what_is_written_strictly_and_keeps_the_metadata(tmp_path, square):
    import torch

    from mixer_jax.torch_model import MlpMixer

    convert.write(tmp_path / "w.pt", convert.read(square.weights_file), layout="timm")
    state = torch.load(tmp_path / "w.pt", weights_only=True)
    assert state._metadata["mixer_jax"]["gelu"] == "tanh"
    MlpMixer(square.config).load_state_dict(state, strict=True)


@pytest.mark.torch
def test_tensors_of_a_pt_have_their_own_values(tmp_path):
    """Of equal size, shared, strided, a part of another, empty; and beside a storage that no array of the file uses."""
    import torch

    base = torch.arange(24.0).reshape(4, 6)
    state = {"a": base, "b": base + 100, "shared": base, "strided": base.T, "row": base[2], "empty": torch.ones(0, 2)}
    state |= {"half": base.to(torch.bfloat16), "parameter": torch.nn.Parameter(base + 300)}
    torch.save({"list": [torch.full((4, 6), 5.0)]} | state, tmp_path / "w.pt")
    arrays = dict(FORMATS["pt"].read(tmp_path / "w.pt").arrays)
    assert np.array_equal(np.asarray(arrays.pop("list/0")), np.full((4, 6), 5.0))
    assert arrays.keys() == state.keys()
    for name, array in arrays.items():
        assert np.array_equal(np.asarray(array).astype(np.float32), state[name].detach().float().numpy())
        if array.shape[0]:
            assert np.array_equal(array[0].astype(np.float32), state[name][0].detach().float().numpy())


# Writing


def test_an_ending_of_no_format_is_refused(tmp_path, square):
    message = r"no format has the ending '.h5': use .npz, .safetensors, .pt, .pth, .msgpack, .orbax, or none"
    with pytest.raises(CheckpointError, match=message):
        convert.write(tmp_path / "w.h5", convert.read(square.weights_file))


@pytest.mark.parametrize("place", [0, 70_000, -1])
def test_one_bit_that_does_not_read_back_is_noticed_and_nothing_kept(tmp_path, monkeypatch, place):
    from convert.formats import npz

    wrong = "MixerBlock_0/channel_mixing/Dense_1/kernel"

    def careless(path, arrays, metadata, write=npz.write):
        arrays = {name: np.array(array) for name, array in arrays.items()}
        arrays[wrong].reshape(-1).view(np.uint32)[place] ^= 1
        write(path, arrays, metadata)

    monkeypatch.setattr(npz, "write", careless)
    with pytest.raises(CheckpointError, match=f"does not read back the same: {wrong}$"):
        convert.write(tmp_path / "w.npz", Checkpoint.from_arrays(WIDE))
    assert not list(tmp_path.iterdir())


# The commands as functions


def test_a_notebook_converts_inspects_and_compares(tmp_path, square):
    target, calls = tmp_path / "w.safetensors", []
    changes = convert.Changes(classes=["4", 0], image_size=40)
    done = convert.convert_file(square.weights_file, target, changes=changes, progress=lambda *call: calls.append(call))
    assert (done.target, done.layout, done.dtype, done.arrays) == (str(target), "timm", "float32", 30)
    assert calls[-1] == (8 * done.parameters, 8 * done.parameters)  # four bytes each, written and compared
    assert any("act_layer" in note for note in done.notes)
    facts = convert.inspect_file(target)
    assert (facts["classes"], facts["tokens"], facts["nonfinite"], len(facts["arrays"])) == (2, 64, "none", 30)
    result = convert.compare_files(square.weights_file, target)
    assert result.fingerprint is None
    assert {d.name.split("/")[0] for d in result.differences} == {"head", "MixerBlock_0", "MixerBlock_1"}
    assert convert.compare_files(target, target).fingerprint == facts["fingerprint"]


@pytest.mark.parametrize(
    ("labels", "message"),
    [(None, "this file has no labels, so give indices from 0 to 6"), (tuple("abcdefg"), "or labels of the file")],
)
def test_classes_that_a_file_does_not_have_are_refused(tmp_path, square, labels, message):
    convert.write(tmp_path / "w.npz", convert.read(square.weights_file).with_metadata(labels=labels))
    with pytest.raises(CheckpointError, match=f"^no class 'tabby': .*{message}"):
        convert.convert_file(tmp_path / "w.npz", tmp_path / "x.npz", changes=convert.Changes(classes=["tabby"]))


def test_inspect_lists_arrays_only_where_they_are_wanted(square, capsys):
    from convert.__main__ import main

    for options, dtype in (([], "float32"), (["--arrays", "--dtype", "bf16"], "bfloat16")):
        assert main(["inspect", str(square.weights_file), *options]) == 0
        text = capsys.readouterr().out
        assert "sizes match         none of the published files\n" in text
        assert f"dtype               {dtype}\n" in text
        assert ("\npre_head_layer_norm/scale" in text) == bool(options)


def test_a_target_or_a_label_that_cannot_be_meant_is_refused_first(tmp_path, square, capsys):
    (tmp_path / "taken").write_text("")
    with pytest.raises(CheckpointError, match="taken: a file is in the way of the folder; give a name that is free"):
        convert.convert_file(square.weights_file, tmp_path / "taken", force=True)
    assert main(["npz2timm", str(square.weights_file), str(tmp_path / "w.xyz"), "--dry-run"]) == 1
    assert "no format has the ending '.xyz'" in capsys.readouterr().err
    (tmp_path / "labels.txt").write_text("crane\ncrane\na\nb\nc\nd\ne\n")
    convert.convert_file(square.weights_file, tmp_path / "w.npz", changes=convert.Changes(labels=tmp_path / "labels.txt"))
    with pytest.raises(CheckpointError, match="several classes are called 'crane': give their indices, from 0 to 6"):
        convert.convert_file(tmp_path / "w.npz", tmp_path / "v.npz", changes=convert.Changes(classes=["crane"]))
