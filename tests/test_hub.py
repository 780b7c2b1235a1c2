"""What config.json says of weights beside it is used and checked; a published file is known by its hash."""

import hashlib
import json
import re
import shutil
from functools import partial

import numpy as np
import pytest
from command_line import run
from conftest import GOLDENS, HERE, random_weights
from PIL import Image

import convert
import mixer_jax
from convert import Checkpoint, CheckpointError, MixerConfig, ReadOptions, inspect_file, read
from convert.config import VARIANTS
from convert.identity import fingerprint
from convert.layouts import TIMM
from convert.mapping import shapes
from convert.published import KNOWN, Published

WEIGHTS = HERE / "golden" / "square" / "timm.safetensors"  # without any metadata
LABELS = ["tench", "goldfish", "crane", "crane", "ray", "cock", "hen"]
SYNSETS = [f"n0144{i}" for i in range(7)]
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
DESCRIPTION = "timm:bicubic,center=0.9,mean=0.485/0.456/0.406,std=0.229/0.224/0.225"
CFG: dict = {
    "input_size": [3, 20, 20],
    "fixed_input_size": True,
    "interpolation": "bicubic",
    "crop_pct": 0.9,
    "num_classes": 1000,
}
CFG |= {"crop_mode": "center", "pool_size": None, "first_conv": "stem.proj", "classifier": "head"} | IMAGENET
ARGUMENTS = {"patch_size": 5, "num_blocks": 2, "embed_dim": 10, "mlp_ratio": [0.6, 1.4], "img_size": None, "drop_rate": 0.1}
CONFIG = {"architecture": "mixer_b16_224", "num_classes": 7, "num_features": 10, "global_pool": "avg"}
CONFIG |= {"model_args": ARGUMENTS, "pretrained_cfg": CFG}
pytestmark = pytest.mark.filterwarnings("ignore::convert.errors.NumericsAssumed")


def changed(config=CONFIG, **changes):
    """A config with other values; `cfg` and `args` change its pretrained_cfg and model_args, None takes a key out."""
    config = {**config, **changes}
    for key, inner in (("pretrained_cfg", config.pop("cfg", {})), ("model_args", config.pop("args", {}))):
        if inner or key in config:
            config[key] = {k: v for k, v in {**(config.get(key) or {}), **inner}.items() if v is not None}
    return {key: value for key, value in config.items() if value is not None}


@pytest.fixture
def folder(tmp_path):
    """Makes a folder with weights and a config.json."""

    def make(config=CONFIG, *, weights=WEIGHTS, name="model.safetensors"):
        folder = tmp_path / "repository"
        folder.mkdir(exist_ok=True)
        if isinstance(weights, Checkpoint):
            convert.write(folder / name, weights, force=True)
        else:
            shutil.copyfile(weights, folder / name)
        text = config if isinstance(config, str | bytes) else json.dumps(config)
        (folder / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
        return folder

    return make


OLDER = {"architecture": "mixer_b16_224", **CFG, "num_classes": 7, "model_args": ARGUMENTS, "labels": LABELS}
WRAPPER = changed(model_type="timm_wrapper", num_classes=None, architectures=["TimmWrapperForImageClassification"])
WRAPPER |= {"id2label": {str(i): name for i, name in enumerate(LABELS)}, "label_names": SYNSETS, "initializer_range": 0.02}
FORMS = {
    "timm": changed(label_names=SYNSETS, label_descriptions=dict(zip(SYNSETS, LABELS))),
    "timm, labels in pretrained_cfg": changed(cfg={"label_names": LABELS}),
    "timm, labels with their indices": changed(label_names={str(i): name for i, name in enumerate(LABELS)}),
    "older timm": OLDER,
    "transformers": WRAPPER | {"label2id": {name: i for i, name in enumerate(LABELS) if name != "crane"}},
}


@pytest.mark.parametrize("form", FORMS)
def test_config_json_gives_preprocessing_and_labels(folder, form, capsys):
    path = folder(FORMS[form])
    checkpoint = read(path)
    assert (checkpoint.metadata.preprocessing, checkpoint.metadata.labels) == (DESCRIPTION, tuple(LABELS))
    assert checkpoint.explicit >= {"preprocessing", "labels"}
    assert checkpoint.config == read(WEIGHTS).config
    assert fingerprint(checkpoint.arrays, checkpoint.layout) == fingerprint(read(WEIGHTS).arrays, TIMM)
    assert read(path / "model.safetensors").metadata == checkpoint.metadata
    out = run(capsys, "inspect", path, module="convert").out
    assert re.search(rf"^preprocessing +{re.escape(DESCRIPTION)} \(config.json\)$", out, re.MULTILINE)
    assert re.search(r"^labels +7 \(config.json\)$", out, re.MULTILINE)
    assert re.search(r"^gelu +exact \(timm's default\)$", out, re.MULTILINE)


def test_a_model_sees_the_pixels_that_the_config_describes(folder, tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (33, 40, 3), np.uint8)
    miil = folder(changed(cfg={"mean": [0, 0, 0], "std": [1.0, 1, 1], "interpolation": "bilinear", "crop_pct": 0.875}))
    model = mixer_jax.load(miil)
    assert model.preprocessing == "timm_bilinear"
    assert np.array_equal(mixer_jax.prepare(image, model), mixer_jax.prepare(image, model.config, "timm_bilinear"))
    model = mixer_jax.load(folder(CONFIG))
    resized = Image.fromarray(image).resize((22 * 40 // 33, 22), Image.Resampling.BICUBIC)  # 20 / 0.9, rounded down
    values = np.asarray(resized.crop((3, 1, 23, 21)), np.float32) / np.float32(255)
    wanted = (values - np.array(IMAGENET["mean"], np.float32)) / np.array(IMAGENET["std"], np.float32)
    assert np.array_equal(mixer_jax.prepare(image, model), wanted)
    mixer_jax.save(model, tmp_path / "saved.npz")
    assert read(tmp_path / "saved.npz").metadata.preprocessing == DESCRIPTION


@pytest.mark.parametrize(("act_layer", "gelu"), [("gelu", "exact"), ("gelu_tanh", "tanh")])
def test_act_layer_states_the_numerics(folder, act_layer, gelu, recwarn):
    checkpoint = read(folder(changed(args={"act_layer": act_layer})))
    assert (checkpoint.metadata.gelu, checkpoint.metadata.layer_norm_epsilon) == (gelu, 1e-6)
    assert not recwarn.list
    assert inspect_file(folder(changed(args={"act_layer": act_layer})))["gelu"] == f"{gelu} (config.json)"


def test_what_the_config_does_not_say_stays_as_it_was(folder):
    for config in ({"num_classes": 7}, {"architecture": "mixer_b16_224", "model_args": ARGUMENTS}):
        checkpoint = read(folder(config))
        assert (checkpoint.metadata, checkpoint.origins) == (read(WEIGHTS).metadata, {})
        assert checkpoint.notes == ("model.safetensors taken",)
    note = "config.json beside it is neither timm's nor transformers', and is not used"
    assert read(folder({"learning_rate": 0.1, "mean": [0]})).notes[1:] == (note,)
    unnamed = changed(model_type="timm_wrapper", id2label={str(i): f"LABEL_{i}" for i in range(7)})
    assert read(folder(unnamed)).metadata.labels is None
    some = changed(label_names=SYNSETS, label_descriptions=dict(zip(SYNSETS[1:], LABELS)))
    assert read(folder(some)).metadata.labels == tuple(SYNSETS)


def test_an_input_that_is_not_square_gives_the_image_size(folder):
    rectangular = GOLDENS["rectangular"]
    config, plain = rectangular.config, Checkpoint.from_arrays(rectangular.weights).to("timm")
    path = folder({}, weights=WEIGHTS)
    write_plain(path / "model.safetensors", plain)
    (height, width), c = config.image_size, config.in_channels
    arguments = {"patch_size": list(config.patch_size), "num_blocks": config.num_blocks, "embed_dim": config.hidden_dim}
    arguments["mlp_ratio"] = [width / config.hidden_dim for width in (config.tokens_mlp_dim, config.channels_mlp_dim)]
    for sizes in ({"cfg": {"input_size": [c, height, width]}}, {"args": {"img_size": [height, width], "in_chans": c}}):
        whole = changed(num_classes=config.num_classes, cfg=sizes.get("cfg", {"input_size": None}))
        whole["model_args"] = arguments | sizes.get("args", {})
        (path / "config.json").write_text(json.dumps(whole))
        assert read(path).config.image_size == config.image_size


def write_plain(path, checkpoint):
    """A safetensors file without any metadata."""
    header, content = {}, b""
    for name, array in checkpoint.as_numpy().items():
        end = len(content) + array.nbytes
        header[name] = {"dtype": "F32", "shape": array.shape, "data_offsets": [len(content), end]}
        content += np.ascontiguousarray(array).tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content)


# Refusals


OPTION = "; --preprocess or ReadOptions(preprocessing=...) overrides it"
REFUSED = {  # message: config
    "architecture 'resnet50' is not a Mixer such as mixer_b16_224": changed(architecture="resnet50"),
    "architecture 'gmixer_24_224' is not a Mixer": changed(architecture="gmixer_24_224.ra3_in1k"[:13]),
    "architecture 'resmlp_12_224' is not a Mixer": changed(architecture="resmlp_12_224"),
    "config.json is that of a 'vit' model, not of a Mixer": {"model_type": "vit", "num_classes": 7},
    "num_classes: config.json says 1000, the weights have 7": changed(num_classes=None),
    "num_classes: config.json says 8, the weights have 7": changed(num_classes=8),
    "hidden_dim: config.json says 768, the weights have 10": changed(args={"embed_dim": None}),
    "num_blocks: config.json says 12, the weights have 2": changed(model_args=None),
    "hidden_dim: config.json says 1024, the weights have 10": changed(architecture="mixer_l32_224", model_args=None),
    "patch_height: config.json says 16, the weights have 5": changed(args={"patch_size": 16}),
    "tokens_mlp_dim: config.json says 5, the weights have 6": changed(args={"mlp_ratio": None}),
    "channels_mlp_dim: config.json says 6, the weights have 14": changed(args={"mlp_ratio": 0.6}),
    "in_channels: config.json says 1, the weights have 3": changed(cfg={"input_size": [1, 20, 20]}),
    "config.json: image size 40x40 does not fit: the weights are for 16 patches": changed(args={"img_size": 40}),
    "config.json: image size 20x40 does not fit": changed(cfg={"input_size": [3, 20, 40]}),
    "config.json: 6 labels for 7 classes": changed(label_names=LABELS[:6]),
    "id2label must have the keys 0 to 6": WRAPPER | {"id2label": {str(i + 1): name for i, name in enumerate(LABELS)}},
    "label2id contradicts id2label": WRAPPER | {"label2id": {"tench": 1}},
    "label_names must be names of classes, not 'crane'": changed(label_names="crane"),
    "label_names must be names of classes, not ['a', 1]": changed(label_names=["a", 1]),
    "act_layer must be one of gelu, gelu_tanh, not 'relu'": changed(args={"act_layer": "relu"}),
    "model_args: norm_layer, stem_norm may change what": changed(args={"norm_layer": "rmsnorm", "stem_norm": True}),
    "global_pool must be 'avg', not ''": changed(args={"global_pool": ""}),
    "model_args must be an object, not []": changed(model_args=None) | {"model_args": []},
    "pretrained_cfg must be an object, not 'x'": {"pretrained_cfg": "x"},
    "architecture must be a text, not 5": {"architecture": 5},
    "num_classes must be a whole number, not '7'": changed(num_classes="7"),
    "num_classes must be a whole number, not True": changed(num_classes=True),
    "input_size must be [channels, height, width], not 224": changed(cfg={"input_size": 224}),
    "input_size must be [channels, height, width], not [3, 0, 0]": changed(cfg={"input_size": [3, 0, 0]}),
    "patch_size must be a size in pixels, not [5, 5, 5]": changed(args={"patch_size": [5, 5, 5]}),
    "mlp_ratio must be one or two numbers above 0, not inf": changed(args={"mlp_ratio": float("inf")}),
    "config.json beside it must be an object, not [1, 2]": [1, 2],
    "config.json beside it is not JSON (": '{"architecture": ',
    "config.json beside it is not JSON (maximum recursion": "[" * 100_000,
    "config.json beside it is not JSON ('utf-8' codec can't": b'{"architecture": "\xff"}',
    "config.json beside it is larger than 16 MiB": " " * (1 << 24) + "{}",
}
UNKNOWN_PREPROCESSING = {
    "config.json: interpolation 'random' is none of nearest, bilinear": changed(cfg={"interpolation": "random"}),
    "config.json: crop mode 'corner' is none of center, squash": changed(cfg={"crop_mode": "corner"}),
    "config.json: crop 1.5 is not from 0.1 to 1": changed(cfg={"crop_pct": 1.5}),
    "config.json: does not say mean, std": changed(cfg={"mean": None, "std": None}),
    "config.json: mean must be a list of numbers, not [nan, 0, 0]": changed(cfg={"mean": [float("nan"), 0, 0]}),
    "config.json: std 1/0/1 is not of numbers above 0": changed(cfg={"std": [1, 0, 1]}),
    "config.json: mean is of 2 channels, std of 3": changed(cfg={"mean": [0.1, 0.2]}),
    "config.json: crop_pct must be a number, not '0.9'": changed(cfg={"crop_pct": "0.9"}),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_contradicts_the_weights_or_is_not_understood_is_one_error(folder, message):
    path = folder(REFUSED[message])
    with pytest.raises(CheckpointError, match=f"^{path}: .*{re.escape(message)}") as error:
        read(path)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("message", UNKNOWN_PREPROCESSING)
def test_a_preprocessing_that_is_unknown_needs_an_option(folder, message, capsys):
    path = folder(UNKNOWN_PREPROCESSING[message])
    with pytest.raises(CheckpointError, match=f"{re.escape(message)}.*{re.escape(OPTION)}$"):
        read(path)
    assert read(path, ReadOptions(preprocessing="squash")).metadata.preprocessing == "squash"
    facts = json.loads(run(capsys, "inspect", path, "--preprocess", DESCRIPTION, "--json", module="convert").out)
    assert facts["preprocessing"] == f"{DESCRIPTION} (given as an option)"


def test_options_override_the_config(folder):
    path = folder(changed(args={"act_layer": "gelu", "img_size": 40}))
    with pytest.raises(CheckpointError, match="image size 40x40 does not fit"):
        read(path)
    metadata = read(path, ReadOptions(image_size=(5, 80), gelu="tanh", layer_norm_epsilon=1e-5)).metadata
    assert (metadata.image_size, metadata.gelu, metadata.layer_norm_epsilon) == ((5, 80), "tanh", 1e-5)


OWN: dict = {"gelu": "tanh", "preprocessing": "squash", "labels": list("abcdefg"), "image_size": [20, 20]}
SAID: dict = {"gelu": {"args": {"act_layer": "gelu"}}, "preprocessing": {}, "labels": {"label_names": LABELS}}
SAID |= {"image_size": {"args": {"img_size": [10, 40]}}}


@pytest.mark.parametrize("field", OWN)
def test_metadata_of_the_file_itself_and_the_config_must_agree(folder, field):
    source = Checkpoint.from_arrays(GOLDENS["square"].weights).to("timm")
    silent = changed(cfg=dict.fromkeys([*IMAGENET, "crop_pct", "interpolation"]))
    own = source.with_metadata(gelu="tanh", preprocessing=None, **({field: OWN[field]} if field in ("labels",) else {}))
    own = own.with_metadata(preprocessing="squash") if field == "preprocessing" else own
    assert read(folder(silent, weights=own)).metadata == own.metadata
    told = changed(silent if field != "preprocessing" else CONFIG, **SAID[field])
    with pytest.raises(CheckpointError, match=rf"{field}: config.json says .*, the file itself .*; correct one of them"):
        read(folder(told, weights=own))
    agreeing: dict = {
        "gelu": {"args": {"act_layer": "gelu_tanh"}},
        "labels": {"label_names": list("abcdefg")},
        "image_size": {},
    }
    if field in agreeing:
        assert read(folder(changed(silent, **agreeing[field]), weights=own)).metadata == own.metadata


# Folders


def test_a_hub_cache_of_links_is_read(folder, tmp_path, capsys):
    repository, snapshot = folder(), tmp_path / "models--a--b" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for name in ("model.safetensors", "config.json"):
        (snapshot / name).symlink_to(repository / name)
    assert read(snapshot).metadata == read(snapshot / "model.safetensors").metadata == read(repository).metadata
    (snapshot / "config.json").unlink()
    unstated = read(snapshot / "model.safetensors")
    assert unstated.notes == ("no config.json lies beside these weights of the hub",)
    assert unstated.metadata.preprocessing is None  # never fetched or not there: the layout's default could be wrong


def test_labels_cannot_command_a_terminal(folder):
    with pytest.raises(CheckpointError, match="label_names must be names of classes"):
        read(folder(changed(label_names=["a\n\x1b[31mred"] * 7)))


def test_a_config_of_something_else_can_be_moved_away(folder):
    with pytest.raises(CheckpointError, match="input_size must be .* not 16; if config.json is not about these weights"):
        read(folder({"input_size": 16, "lr": 0.001}))


@pytest.mark.torch
def test_a_pt_under_the_hubs_name_is_read_if_there_is_no_safetensors(folder):
    path = folder(weights=HERE / "golden" / "square" / "jeonsworld.pth", name="pytorch_model.bin")
    assert (read(path).layout.name, read(path).metadata.preprocessing) == ("jeonsworld", DESCRIPTION)
    folder()
    assert read(path).layout.name == "timm"


def test_the_only_file_of_weights_is_read_and_several_are_an_error(folder):
    path = folder(weights=GOLDENS["square"].weights_file, name="mine.npz")
    assert (read(path).layout.name, read(path).metadata.preprocessing) == ("google", DESCRIPTION)
    assert read(path / "mine.npz").metadata.preprocessing == "resmall_crop"  # beside it by chance, for all that is known
    (path / "other.pth").touch()
    with pytest.raises(CheckpointError, match="2 files of weights beside config.json: give the path of one, such as .*npz"):
        read(path)
    with pytest.raises(CheckpointError, match="has no steps"):
        read(path, ReadOptions(step=3))
    for file in ("mine.npz", "other.pth"):
        (path / file).unlink()
    with pytest.raises(CheckpointError, match="a folder in which no checkpoint is found"):
        read(path)


# Published files


@pytest.fixture
def released(monkeypatch):
    """The golden file as a published one of a variant T/5, whose own name and SHA-256 are known."""
    sha256 = hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()[:8]
    sizes = {"num_blocks": 2, "hidden_dim": 10, "tokens_mlp_dim": 6, "channels_mlp_dim": 14}
    file = Published(f"timm/tiny-{sha256}", "T/5", 7, None, 61.5, "a note", "timm", "timm_bilinear", "", sha256, "v1")
    monkeypatch.setitem(VARIANTS, "T", sizes)
    monkeypatch.setitem(KNOWN, file.name, file)
    return file


def test_a_published_file_is_known_by_its_hash_under_any_name(released, tmp_path, capsys):
    for name in (f"tiny-{released.sha256}.pth", "renamed"):
        path = shutil.copyfile(WEIGHTS, tmp_path / name)
        checkpoint = read(path)
        assert checkpoint.metadata.preprocessing == mixer_jax.load(path).preprocessing == "timm_bilinear"
        assert "preprocessing" in checkpoint.explicit
        out = run(capsys, "inspect", path, module="convert").out
        assert re.search(rf"^preprocessing +timm_bilinear \({released.name}, by its SHA-256\)$", out, re.MULTILINE)
        wanted = rf"^published +{released.name}, by its SHA-256; top-1 61.5 % on ImageNet's validation images; a note$"
        assert re.search(wanted, out, re.MULTILINE)
    assert read(path, ReadOptions(preprocessing="squash")).metadata.preprocessing == "squash"


def test_a_published_name_with_another_content_is_refused(released, tmp_path):
    content = bytearray(WEIGHTS.read_bytes())
    content[-1] ^= 1
    for path in (tmp_path / f"tiny-{released.sha256}.pth", tmp_path / "renamed"):
        path.write_bytes(content)
    sha256 = hashlib.sha256(content).hexdigest()
    message = f"has the name of a published file whose SHA-256 begins with {released.sha256}, but its own is {sha256}: download"
    for options in (ReadOptions(), ReadOptions(preprocessing="squash")):
        with pytest.raises(CheckpointError, match=message):
            read(tmp_path / f"tiny-{released.sha256}.pth", options)
    assert read(tmp_path / "renamed").metadata.preprocessing is None


def test_a_file_that_may_be_one_of_several_is_not_fed_any_pixels_silently(released, tmp_path, capsys):
    other = Checkpoint.from_arrays(random_weights(GOLDENS["square"].config.replace(gelu="exact"))).to("timm")
    write_plain(tmp_path / "mine.safetensors", other)
    saved = tmp_path / "image.png"
    Image.new("RGB", (20, 20)).save(saved)
    doubt = "published files of these names and sizes need timm_bilinear, and this one does not say what it needs"
    error = run(capsys, "predict", tmp_path / "mine.safetensors", saved, code=1).err
    assert f"mine.safetensors: {doubt}: choose one with --preprocess, of resmall_crop" in error
    run(capsys, "predict", tmp_path / "mine.safetensors", saved, "--preprocess", "timm_bilinear")
    facts = inspect_file(tmp_path / "mine.safetensors")
    assert facts["preprocessing"] == f"unknown ({doubt})"
    assert re.fullmatch("not known: the SHA-256 [0-9a-f]{64} is that of no file known here", facts["published"])
    done = convert.convert_file(tmp_path / "mine.safetensors", tmp_path / "mine.npz")
    assert f"preprocessing unknown: {doubt}; --preprocess chooses" in done.notes
    assert read(tmp_path / "mine.npz").metadata.preprocessing is None
    convert.write(tmp_path / "orbax", other)
    assert inspect_file(tmp_path / "orbax")["published"] == "not known: a folder has no hash"


CASES = [("B/16", 1000, None), ("B/16", 11_221, None), ("B/16", 21_843, "timm_bicubic"), ("L/16", 1000, "timm_bicubic")]
CASES += [("B/16", 10, "timm_bicubic"), ("B/32", 1000, "timm_bicubic")]


@pytest.mark.parametrize(("variant", "classes", "preprocessing"), CASES)
def test_which_of_timms_files_are_in_doubt(variant, classes, preprocessing):
    """Those that may be MIIL's: arrays of these shapes, which take no memory."""
    config = MixerConfig.named(variant, num_classes=classes)
    zeros = partial(np.broadcast_to, np.float32(0))
    arrays = {name: zeros(shape) for name, shape in shapes(TIMM, config.sizes).items()}
    checkpoint = Checkpoint.from_arrays(arrays)
    assert checkpoint.metadata.preprocessing == preprocessing
    assert ("timm_bilinear" in checkpoint.origins.get("preprocessing", "")) == (preprocessing is None)
    assert checkpoint.to("google").metadata == checkpoint.metadata
    stated = Checkpoint.from_arrays(arrays, metadata={"preprocessing": "timm_bilinear"})
    assert stated.metadata.preprocessing == "timm_bilinear"
