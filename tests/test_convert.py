"""Mapping and files: what only moves numbers moves every bit."""

import json
import zipfile

import numpy as np
import pytest
from conftest import TINY, random_weights

import convert
from convert import Checkpoint, CheckpointError, MixerConfig, containers, memory
from convert.arrays import LazyArray
from convert.layouts import LAYOUTS, MODULES

ENDINGS = [".npz", ".safetensors", pytest.param(".pt", marks=pytest.mark.torch), ""]
endings = pytest.mark.parametrize("ending", ENDINGS)
layouts = pytest.mark.parametrize("layout", LAYOUTS)


def saved(path, arrays):
    np.savez(path, **arrays)
    return path


def equal(a, b) -> bool:
    """Same names, dtypes, shapes and bits."""
    assert a.keys() == b.keys()
    pairs = [(np.asarray(a[name]), np.asarray(b[name])) for name in a]
    return all(x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes() for x, y in pairs)


def test_every_column_has_every_module_and_two_leaves_a_kind():
    kinds = {kind for kind, _, _ in MODULES.values()}
    for layout in LAYOUTS.values():
        assert list(layout.modules) == list(MODULES)
        assert layout.leaves.keys() == kinds
        assert all(len(leaves) == 2 for leaves in layout.leaves.values())
        assert len(set(layout.modules.values())) == len(MODULES)


@endings
@layouts
def test_npz_to_any_layout_and_format_and_back_is_the_same_file(tmp_path, golden, layout, ending):
    there, back = tmp_path / f"there{ending}", tmp_path / "back.npz"
    convert.write(there, convert.read(golden.weights_file), layout=layout)
    convert.write(back, convert.read(there), layout="google")
    assert back.read_bytes() == golden.weights_file.read_bytes()


@endings
@layouts
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_every_dtype_goes_through_every_layout_and_format(tmp_path, layout, ending, dtype):
    weights = Checkpoint.from_arrays(random_weights(TINY)).astype(dtype)
    convert.write(tmp_path / f"w{ending}", weights, layout=layout)
    back = convert.read(tmp_path / f"w{ending}", dtype=dtype)
    assert back.dtype.name == dtype
    assert back.layout.name == layout
    assert equal(back.to("google").arrays, weights.arrays)


def test_axes_go_where_the_layouts_say():
    weights = random_weights(TINY)
    timm = Checkpoint.from_arrays(weights).to("timm").arrays
    stem, kernel = weights["stem/kernel"], weights["MixerBlock_1/token_mixing/Dense_0/kernel"]
    assert np.array_equal(timm["stem.proj.weight"], np.moveaxis(stem, (0, 1, 2, 3), (2, 3, 1, 0)))
    assert np.array_equal(timm["blocks.1.mlp_tokens.fc1.weight"], kernel.T)
    flax = Checkpoint.from_arrays(weights).to("flax").arrays
    assert np.array_equal(np.asarray(flax["blocks/token_mixing/dense_0/kernel"])[1], kernel)
    assert flax["blocks/token_mixing/dense_0/kernel"].shape == (3, 20, 11)


def test_blocks_are_ordered_by_number_and_not_by_name():
    config = TINY.replace(num_blocks=12)
    weights = random_weights(config)
    scales = np.asarray(Checkpoint.from_arrays(weights).to("flax").arrays["blocks/token_norm/scale"])
    for i in range(12):
        assert np.array_equal(scales[i], weights[f"MixerBlock_{i}/LayerNorm_0/scale"])


def test_nothing_is_read_before_it_is_asked_for():
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


def test_verbs_change_no_argument():
    weights = random_weights(TINY)
    before = {name: array.copy() for name, array in weights.items()}
    checkpoint = Checkpoint.from_arrays(weights)
    other = checkpoint.astype("bfloat16").with_classes(9).to("flax").with_metadata(gelu="exact", labels=("x",) * 9)
    _ = {name: np.asarray(array) for name, array in other.arrays.items()}
    assert list(weights) == list(before)
    assert equal(weights, before)
    assert checkpoint.metadata.gelu == "tanh"
    assert checkpoint.sizes["num_classes"] == 5


def test_deflated_and_fortran_and_big_endian_arrays_are_read(tmp_path):
    weights = random_weights(TINY)
    np.savez_compressed(tmp_path / "deflated.npz", **weights)
    saved(tmp_path / "fortran.npz", {name: np.asfortranarray(array) for name, array in weights.items()})
    saved(tmp_path / "big.npz", {name: array.astype(">f4") for name, array in weights.items()})
    for name in ("deflated", "fortran", "big"):
        read = convert.read(tmp_path / f"{name}.npz")
        assert equal(read.arrays, weights)
        assert all(np.asarray(array).flags.c_contiguous for array in read.arrays.values())
        flax = read.to("flax").to("google")  # reads item by item
        assert equal(flax.arrays, weights)


@pytest.mark.parametrize("name", ["B/16"])
def test_a_synthetic_file_of_a_released_size_has_the_released_size(tmp_path, name):
    has_released_size(tmp_path, name, 239_567_448)


@pytest.mark.heavy
def test_a_synthetic_l16_has_the_released_size(tmp_path):
    has_released_size(tmp_path, "L/16", 832_874_440)


def has_released_size(tmp_path, name, size):
    from convert.layouts import GOOGLE
    from convert.mapping import shapes

    config = MixerConfig.named(name)
    sizes = {k: getattr(config, k) for k in ("num_blocks", "num_classes", "in_channels", "hidden_dim", "num_tokens")}
    sizes |= {k: getattr(config, k) for k in ("tokens_mlp_dim", "channels_mlp_dim")}
    sizes |= {"patch_height": config.patch_size[0], "patch_width": config.patch_size[1]}
    arrays = {
        name: LazyArray(shape, np.dtype("float32"), lambda _, shape=shape: np.zeros(shape, "float32"))
        for name, shape in shapes(GOOGLE, sizes).items()
    }
    checkpoint = Checkpoint.from_arrays(arrays)
    assert checkpoint.config == config
    convert.write(tmp_path / "synthetic.npz", checkpoint)
    assert (tmp_path / "synthetic.npz").stat().st_size == size


@endings
@layouts
def test_numerics_grid_preprocessing_and_labels_travel(tmp_path, ending, layout):
    said = {
        "gelu": "exact",
        "layer_norm_epsilon": 3e-5,
        "image_size": (8, 15),
        "preprocessing": "squash",
        "labels": ("a", "b", "ç", "d, e", "f"),
    }
    original = Checkpoint.from_arrays(random_weights(TINY)).with_metadata(**said)
    convert.write(tmp_path / f"w{ending}", original, layout=layout)
    back = convert.read(tmp_path / f"w{ending}")
    assert back.metadata == original.metadata
    assert back.stated >= said.keys() - {"gelu"}  # which an .npz leaves out where its layout's default says it
    assert back.config == TINY.replace(gelu="exact", layer_norm_epsilon=3e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_file_that_says_nothing_has_its_layouts_numerics(tmp_path, layout):
    weights = Checkpoint.from_arrays(random_weights(TINY)).to(layout)
    saved(tmp_path / "w.npz", {name: np.asarray(array) for name, array in weights.arrays.items()})
    read = convert.read(tmp_path / "w.npz")
    assert read.metadata.gelu == ("tanh" if layout in ("google", "flax", "legacy") else "exact")
    assert read.metadata.layer_norm_epsilon == (1e-5 if layout == "reference" else 1e-6)
    assert not read.stated


def test_an_npz_speaks_only_where_it_differs_from_googles(tmp_path, square):
    google = convert.read(square.weights_file)
    convert.write(tmp_path / "quiet.npz", google)
    convert.write(tmp_path / "loud.npz", google.with_metadata(gelu="exact"))
    with zipfile.ZipFile(tmp_path / "quiet.npz") as archive:
        assert archive.comment == b""
    with zipfile.ZipFile(tmp_path / "loud.npz") as archive:
        said = json.loads(archive.comment)["mixer_jax"]
    assert said.pop("crc32")
    assert said == {"gelu": "exact"}
    with np.load(tmp_path / "loud.npz") as data:
        assert len(data.files) == 30


def test_a_zip_comment_of_somebody_elses_is_left_alone(tmp_path):
    path = saved(tmp_path / "w.npz", random_weights(TINY))
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
        read = convert.read(path)
        assert read.metadata.gelu == "tanh"
        assert not read.stated
        assert equal(read.arrays, random_weights(TINY))


@pytest.mark.parametrize(
    "theirs", [{"crc32": "0123abcd"}, {"checksums": "none"}, {"checksums": "{}", "fingerprint": "x"}, {"a": "crc32"}]
)
def test_safetensors_metadata_of_somebody_elses_is_left_alone(tmp_path, theirs):
    from safetensors.numpy import save_file

    save_file(random_weights(TINY), tmp_path / "w.safetensors", metadata=theirs)
    read = convert.read(tmp_path / "w.safetensors")
    assert not read.stated
    assert not read.verified
    assert read.claimed is None
    assert equal(read.arrays, random_weights(TINY))


def test_orbax_metadata_of_somebody_elses_is_left_alone(tmp_path):
    theirs = {"crc32": "0123abcd", "checksums": [], "step": 3, "labels": "none"}
    read = convert.read(orbax_folder(tmp_path / "w", random_weights(TINY), theirs))
    assert not read.stated
    assert not read.verified
    assert equal(read.arrays, random_weights(TINY))


def test_an_orbax_folder_from_before_there_were_checksums_keeps_its_numerics(tmp_path):
    said = containers.sealed(Checkpoint.from_arrays(random_weights(TINY)).with_metadata(gelu="exact").metadata.said())
    read = convert.read(orbax_folder(tmp_path / "w", random_weights(TINY), said))
    assert read.metadata.gelu == "exact"
    assert not read.verified


def orbax_folder(path, weights, said):
    import orbax.checkpoint as ocp
    from flax.traverse_util import unflatten_dict

    items = {"params": ocp.args.StandardSave(unflatten_dict(weights, sep="/")), "metadata": ocp.args.JsonSave(said)}
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(path, args=ocp.args.Composite(**items))
    return path


def test_too_many_labels_for_a_zip_comment_are_refused(tmp_path):
    config = TINY.replace(num_classes=4000)
    labels = tuple(f"a class with a long name, number {i}" for i in range(4000))
    checkpoint = Checkpoint.from_arrays(random_weights(config)).with_metadata(labels=labels)
    with pytest.raises(CheckpointError, match=r"the labels take \d+ bytes and an .npz has room for 65535: write .safetensors"):
        convert.write(tmp_path / "w.npz", checkpoint)
    assert not list(tmp_path.iterdir())
    convert.write(tmp_path / "w.safetensors", checkpoint)
    assert convert.read(tmp_path / "w.safetensors").metadata.labels == labels


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"gelu": "erf"}, "makes no sense: gelu 'erf'"),
        ({"layer_norm_epsilon": -1.0}, "makes no sense: layer_norm_epsilon -1.0"),
        ({"layer_norm_epsilon": "1e-6"}, "makes no sense: layer_norm_epsilon '1e-6'"),
        ({"image_size": [8]}, "makes no sense: image_size"),
        ({"labels": [1, 2, 3, 4, 5]}, "makes no sense: labels"),
        ({"preprocessing": "mystery"}, "makes no sense: preprocessing 'mystery'"),
        ({"gelu": "tanh", "attention": True}, "not understood .*: attention"),
        ({"labels": ["a"]}, "1 labels for 5 classes"),
        ({"image_size": [8, 16]}, None),  # found when the grid is needed
    ],
)
def test_metadata_that_makes_no_sense_is_refused(tmp_path, said, message):
    path = saved(tmp_path / "w.npz", random_weights(TINY))
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = json.dumps({"mixer_jax": said}).encode()
    if message is None:
        with pytest.raises(CheckpointError, match="image size 8x16 does not fit: the weights are for 20 patches of 2x3"):
            _ = convert.read(path).config
    else:
        with pytest.raises(CheckpointError, match=message):
            convert.read(path)


def test_another_class_count_is_a_fresh_zero_head_and_said(tmp_path):
    path = saved(tmp_path / "w.npz", random_weights(TINY))
    with pytest.warns(UserWarning, match=r"w.npz: the head for 5 classes is now zeros for 9"):
        read = convert.read(path, num_classes=9)
    assert read.arrays["head/kernel"].shape == (7, 9)
    assert not np.asarray(read.arrays["head/kernel"]).any()
    rest = {name: array for name, array in read.arrays.items() if not name.startswith("head")}
    assert equal(rest, {name: array for name, array in random_weights(TINY).items() if not name.startswith("head")})
    assert convert.read(path, num_classes=5).arrays.keys() == random_weights(TINY).keys()
    assert convert.read(path, num_classes=0).sizes["num_classes"] == 0


def test_rounding_is_to_nearest_even_and_never_to_infinity():
    weights = random_weights(TINY)
    weights["head/bias"][:] = [1 + 2**-8, 1 + 3 * 2**-8, 0, -1.5, 3e38]
    rounded = np.asarray(Checkpoint.from_arrays(weights).astype("bfloat16").arrays["head/bias"]).astype("float32")
    assert rounded[:4].tolist() == [1, 1 + 2**-6, 0, -1.5]
    weights["head/bias"][0] = 1e5
    half = Checkpoint.from_arrays(weights).astype("float16")
    with pytest.raises(CheckpointError, match="head/bias: too large for float16, some values would become infinite"):
        np.asarray(half.arrays["head/bias"])


@pytest.mark.torch
def test_the_safetensors_library_reads_what_is_written_and_the_reverse(tmp_path, square):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    for dtype in ("float32", "bfloat16", "float16"):
        weights = convert.read(square.weights_file).astype(dtype).to("timm")
        convert.write(tmp_path / f"{dtype}.safetensors", weights)
        theirs = load_file(tmp_path / f"{dtype}.safetensors")
        save_file(theirs, tmp_path / f"theirs-{dtype}.safetensors")
        assert equal(convert.read(tmp_path / f"theirs-{dtype}.safetensors").arrays, weights.arrays)
        with safe_open(tmp_path / f"{dtype}.safetensors", "np") as file:
            assert file.metadata()["format"] == "pt"


@pytest.mark.torch
def test_torch_loads_what_is_written_strictly_and_keeps_the_metadata(tmp_path, square):
    import torch

    from mixer_jax.torch_model import MlpMixer

    convert.write(tmp_path / "w.pt", convert.read(square.weights_file), layout="timm")
    state = torch.load(tmp_path / "w.pt", weights_only=True)
    assert state._metadata["mixer_jax"]["gelu"] == "tanh"
    MlpMixer(square.config).load_state_dict(state, strict=True)


def test_in_memory_arrays_of_any_layout_are_recognised():
    weights = Checkpoint.from_arrays(random_weights(TINY))
    for layout in LAYOUTS:
        arrays = {name: np.asarray(array) for name, array in weights.to(layout).arrays.items()}
        assert Checkpoint.from_arrays(arrays).layout.name == layout


def test_an_ending_of_no_format_is_refused(tmp_path, square):
    with pytest.raises(
        CheckpointError, match=r"no format has the ending '.h5': .npz, .safetensors, .pt, .pth, .orbax, or none"
    ):
        convert.write(tmp_path / "w.h5", convert.read(square.weights_file))


def test_what_does_not_read_back_the_same_is_not_kept(tmp_path, square, monkeypatch):
    from convert.containers import npz

    def careless(path, arrays, metadata, write=npz.write):
        write(path, {name: np.asarray(array) + (name == "head/bias") for name, array in arrays.items()}, metadata)

    monkeypatch.setattr(npz, "write", careless)
    with pytest.raises(CheckpointError, match="what was written does not read back the same: head/bias"):
        convert.write(tmp_path / "w.npz", convert.read(square.weights_file))
    assert not list(tmp_path.iterdir())


def wide() -> dict[str, np.ndarray]:
    """Weights with arrays of two MiB, which take memory that was used before and are compared in many pieces."""
    return random_weights(TINY.replace(hidden_dim=520, channels_mlp_dim=1030))


@endings
def test_large_arrays_are_bit_equal_in_every_format(tmp_path, ending):
    weights, source = wide(), tmp_path / f"w{ending}"
    convert.write(source, Checkpoint.from_arrays(weights), layout="timm")
    convert.write(tmp_path / "back.npz", convert.read(source, num_blocks=TINY.num_blocks), layout="google")
    with np.load(tmp_path / "back.npz") as back:
        assert equal(dict(back), weights)


@pytest.mark.parametrize("place", [0, 70_000, -1])
def test_a_bit_that_reads_back_otherwise_is_seen_wherever_it_is(tmp_path, monkeypatch, place):
    """In the first piece of a large array, in a later one and in the last."""
    from convert.containers import npz

    wrong = "MixerBlock_0/channel_mixing/Dense_1/kernel"

    def careless(path, arrays, metadata, write=npz.write):
        arrays = {name: np.array(array) for name, array in arrays.items()}
        arrays[wrong].reshape(-1).view(np.uint32)[place] ^= 1
        write(path, arrays, metadata)

    monkeypatch.setattr(npz, "write", careless)
    with pytest.raises(CheckpointError, match=f"does not read back the same: {wrong}$"):
        convert.write(tmp_path / "w.npz", Checkpoint.from_arrays(wide()))
    assert not list(tmp_path.iterdir())


def test_memory_is_used_again_only_when_no_view_of_it_is_left():
    size = 3 << 20
    with memory.reused():
        first = memory.empty((3, 1 << 20))
        first[...] = 7
        view, address = first.T[1:, 2], first.ctypes.data
        del first
        second = memory.empty(size // 4, np.float32)
        second[...] = 1
        assert second.ctypes.data != address
        assert (view == 7).all()
        del view
        third = memory.empty(size)
        assert third.ctypes.data == address
        del second, third
        assert memory._spare
        assert memory.empty(2 * size).size == 2 * size
    assert not memory._spare
    kept = memory.empty(size)
    del kept
    assert not memory._spare


@pytest.mark.torch
@pytest.mark.parametrize("hidden", [False, True])
def test_tensors_of_a_pt_are_told_apart_by_their_place(tmp_path, hidden):
    """Of equal size, shared, strided, a part of another, empty; and with a storage that no array of the file uses."""
    import torch

    base = torch.arange(24.0).reshape(4, 6)
    state = {"hidden": [torch.full((4, 6), 5.0)]} if hidden else {}
    state |= {"a": base, "b": base + 100, "shared": base, "strided": base.T, "row": base[2], "empty": torch.ones(0, 2)}
    state |= {"half": base.to(torch.bfloat16), "c": base + 200, "parameter": torch.nn.Parameter(base + 300)}
    torch.save(state, tmp_path / "w.pt")
    arrays = containers.module("pt").read(tmp_path / "w.pt").arrays
    assert arrays.keys() == state.keys() - {"hidden"}
    for name, array in arrays.items():
        assert np.array_equal(np.asarray(array).astype(np.float32), state[name].detach().float().numpy())
        if array.shape[0]:
            assert np.array_equal(array[0].astype(np.float32), state[name][0].detach().float().numpy())
    mapped = {name for name, array in arrays.items() if hasattr(array, "tensor")}
    assert mapped == (set(arrays) if hidden else {"strided", "empty"})


def test_a_header_alone_says_shapes(tmp_path):
    """Opening reads headers: a file whose data is damaged opens, and says so when the array is read."""
    path = saved(tmp_path / "w.npz", random_weights(TINY))
    data = bytearray(path.read_bytes())
    wanted = random_weights(TINY)["stem/kernel"].tobytes()
    data[data.index(wanted) + 5] ^= 1
    path.write_bytes(data)
    checkpoint = convert.read(path)
    with pytest.raises(CheckpointError, match=r"w.npz: stem/kernel.npy: its bytes are not the ones that were written"):
        np.asarray(checkpoint.arrays["stem/kernel"])
