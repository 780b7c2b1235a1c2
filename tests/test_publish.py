"""A published folder says what timm, transformers and `read` need, is there whole or not at all, and uploaded only when asked.

That timm and transformers compute the same from it is checked where they are installed, by benchmarks/published.py.
"""

import json
import re
import sys
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
from command_line import run
from conftest import HERE, random_weights
from PIL import Image

import convert
import mixer_jax
from convert import Checkpoint, CheckpointError, MixerConfig, ReadOptions, hub_folder, inspect_file, read
from convert.hub_config import HubConfig
from convert.hub_folder import NEAREST, hub_config
from convert.identity import fingerprint
from convert.preprocessing import INTERPOLATIONS, Described, parsed
from mixer_jax.commands.publish import publish
from mixer_jax.evaluation import Evaluation
from mixer_jax.parity.numpy_model import forward
from mixer_jax.preprocess import prepare
from mixer_jax.training.config import FinetuneConfig
from mixer_jax.training.run_folder import CONFIG, KIND, METRICS

SMALL = MixerConfig.named("S/16", image_size=32, num_classes=7).replace(tokens_mlp_dim=5, channels_mlp_dim=6)
LABELS = ["tench", "goldfish", "crane", "crane", "ray", "cock", "hen"]
FOLDER = ["README.md", "config.json", "model.safetensors"]
BORDER = "timm:lanczos,border=0.9,mean=0.485/0.456/0.406,std=0.229/0.224/0.225"


def checkpoint(config=SMALL, *, preprocessing="timm_bicubic", **metadata):
    metadata = {"gelu": config.gelu, "layer_norm_epsilon": config.layer_norm_epsilon} | metadata
    made = Checkpoint.from_arrays(random_weights(config), metadata=metadata | {"preprocessing": preprocessing})
    return made.with_image_size(config.image_size)


@pytest.fixture
def source(tmp_path):
    """Makes a file of weights."""

    def make(made=None, name="small.npz"):
        path = tmp_path / "source" / name
        path.parent.mkdir(exist_ok=True)
        convert.write(path, made or checkpoint(labels=LABELS), force=True)
        return path

    return make


def left_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_config_json_says_what_timm_reads(source, tmp_path):
    publish(source(), tmp_path / "small", licence="Apache-2.0")
    assert left_in(tmp_path / "small") == FOLDER
    assert json.loads((tmp_path / "small" / "config.json").read_text()) == {
        "architecture": "mixer_s16_224",
        "num_classes": 7,
        "num_features": 512,
        "global_pool": "avg",
        "label_names": LABELS,
        "model_args": {"mlp_ratio": [5 / 512, 6 / 512], "img_size": 32},
        "pretrained_cfg": {
            "input_size": [3, 32, 32],
            "fixed_input_size": True,
            "pool_size": None,
            "interpolation": "bicubic",
            "crop_pct": 0.875,
            "crop_mode": "center",
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "num_classes": 7,
            "first_conv": "stem.proj",
            "classifier": "head",
            "custom_load": False,
            "license": "apache-2.0",
        },
    }


ARGUMENTS = {
    "a published size": (MixerConfig.named("B/32"), {}),
    "a higher resolution": (MixerConfig.named("L/16", image_size=448), {"img_size": 448}),
    "a grid that is not square": (MixerConfig.named("S/16").replace(image_size=(32, 96)), {"img_size": [32, 96]}),
    "grey images": (MixerConfig.named("B/16").replace(in_channels=1), {"in_chans": 1}),
    "another width": (MixerConfig.named("B/16").replace(tokens_mlp_dim=385), {"mlp_ratio": [385 / 768, 4.0]}),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_only_what_differs_from_the_architecture_is_an_argument(name):
    """Arrays of these shapes, which take no memory. What timm makes of the arguments are the sizes of the weights."""
    config, wanted = ARGUMENTS[name]
    arrays = {
        k: np.broadcast_to(np.float32(0), v) for k, v in convert.mapping.shapes(convert.layouts.GOOGLE, config.sizes).items()
    }
    made = Checkpoint.from_arrays(arrays, metadata={"preprocessing": "timm_bicubic"}).with_image_size(config.image_size)
    tree = hub_config(made)
    assert tree.get("model_args", {}) == wanted
    understood = HubConfig.of(json.loads(json.dumps(tree)))
    assert understood.sizes.items() <= made.sizes.items()
    assert understood.image_size == config.image_size
    assert len(tree["pretrained_cfg"]["mean"]) == config.in_channels


def test_a_width_is_what_timm_truncates_to():
    for hidden_dim in (512, 768, 1024):
        assert all(int(hub_folder.mlp_factor(width, hidden_dim) * hidden_dim) == width for width in range(1, 5000))


NON_SQUARE = SMALL.replace(image_size=(32, 64), gelu="exact")
FORMS = {
    "float32": checkpoint(labels=LABELS),
    "bfloat16, not square, exact": checkpoint(NON_SQUARE, preprocessing=BORDER).astype("bfloat16"),
    "no head": checkpoint(SMALL.replace(num_classes=0), preprocessing="timm_bilinear"),
    "grey": checkpoint(SMALL.replace(in_channels=1), preprocessing="timm:box,squash=1,mean=0.5,std=0.5"),
}


@pytest.mark.parametrize("form", FORMS)
def test_what_is_read_back_is_the_same_model(source, tmp_path, form):
    made = FORMS[form]
    done = publish(source(made, "small.safetensors"), tmp_path / "small")
    back = read(tmp_path / "small")
    assert back.config == made.config
    assert (back.metadata.labels, back.metadata.preprocessing) == (made.metadata.labels, made.metadata.preprocessing)
    assert done.fingerprint == fingerprint(back.arrays, back.layout) == fingerprint(made.arrays, made.layout)
    assert back.layout.name == "timm"
    model = mixer_jax.load(tmp_path / "small")
    assert (model.config, model.preprocessing) == (made.config, made.metadata.preprocessing)
    assert inspect_file(tmp_path / "small")["preprocessing"].endswith("(explicit)")


def test_the_card_says_what_timm_computes_without_being_told_the_gelu(source, tmp_path):
    done = publish(source(), tmp_path / "small", licence="apache-2.0")
    made = checkpoint()
    image = np.random.default_rng(0).uniform(-1, 1, (1, 32, 32, 3))
    tanh, exact = (forward(SMALL.replace(gelu=gelu), made.as_numpy(), image) for gelu in ("tanh", "exact"))
    assert done.gelu_gap.max_abs == np.abs(tanh - exact).max() > 1e-6
    card = (tmp_path / "small" / "README.md").read_text()
    assert (
        f"logits are then off by up to {done.gelu_gap.max_abs:.1e}, where their standard deviation is {tanh.std():.2g}" in card
    )
    assert 'tanh = partial(nn.GELU, approximate="tanh")' in card
    assert 'timm.create_model("local-dir:small", pretrained=True, act_layer=tanh)' in card
    assert card.startswith("---\nlibrary_name: timm\npipeline_tag: image-classification\n")
    assert "\nlicense: apache-2.0\n---\n\n# small\n" in card
    assert f"| fingerprint | `{done.fingerprint}`" in card
    assert f"| parameters | {done.parameters:,}, float32 |" in card
    assert "`timm_bicubic`: bicubic interpolation, crop mode center with a crop of 0.875" in card
    for block in re.findall("```python\n(.*?)```", card, re.DOTALL):
        compile(block, "card", "exec")


def test_a_card_of_exact_weights_needs_no_remedy(source, tmp_path):
    done = publish(source(FORMS["bfloat16, not square, exact"], "small.safetensors"), tmp_path / "small")
    card = (tmp_path / "small" / "README.md").read_text()
    assert done.gelu_gap is None
    assert "timm's own code computes the same" in card
    assert "act_layer" not in card
    for block in re.findall("```python\n(.*?)```", card, re.DOTALL):
        compile(block, "card", "exec")


def test_a_chosen_preprocessing_is_told_from_the_weights_own(source, tmp_path):
    file = source(checkpoint(preprocessing="resmall_crop"))
    publish(file, tmp_path / "small", reading=ReadOptions(preprocessing=NEAREST["resmall_crop"]))
    assert read(tmp_path / "small").metadata.preprocessing == NEAREST["resmall_crop"]
    said = "The weights were made for `resmall_crop`, which timm's transforms cannot compute"
    assert said in (tmp_path / "small" / "README.md").read_text()


def test_the_nearest_preprocessing_is_that_of_least_difference():
    """On the golden photographs, and one of them enlarged, as most photographs are larger."""
    photographs = [Image.open(path) for path in sorted((HERE / "golden" / "preprocess").glob("*.png"))]
    photographs.append(photographs[0].resize((1353, 900), Image.Resampling.BICUBIC))
    config = MixerConfig.named("B/16")
    for name, nearest in NEAREST.items():
        right, how = prepare(photographs, config, name), parsed(nearest)
        assert isinstance(how, Described)
        others = {i: str(replace(how, interpolation=i)) for i in INTERPOLATIONS}
        difference = {i: np.abs(prepare(photographs, config, other) - right).mean() for i, other in others.items()}
        assert min(difference, key=difference.__getitem__) == how.interpolation
        assert 127.5 * difference[how.interpolation] < 3  # grey levels; 2.7, 1.2 and 1.1 measured


REFUSED = {
    "timm has no Mixer of 8 blocks of 512 channels and patches of 8x8 pixels: only 8 of 512 channels, 12 of 768": (
        checkpoint(SMALL.replace(patch_size=(8, 8)))
    ),
    "timm has no Mixer of 2 blocks of 24 channels": checkpoint(SMALL.replace(num_blocks=2, hidden_dim=24)),
    "timm's Mixers have the LayerNorm epsilon 1e-6, and these weights 1e-05": checkpoint(
        SMALL.replace(layer_norm_epsilon=1e-5)
    ),
    "timm's transforms cannot compute the pixels of squash: choose one of theirs with --preprocess; the nearest is "
    "timm:hamming,squash=1,mean=0.5,std=0.5": checkpoint(preprocessing="squash"),
    "the file names no preprocessing: choose one with --preprocess": checkpoint(preprocessing=None),
    "is for 3 channels, and the model takes 1": checkpoint(SMALL.replace(in_channels=1), preprocessing=BORDER),
    "label_names must be names of classes": checkpoint(labels=["a\x1b[31m", *LABELS[1:]]),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_timm_cannot_be_told_is_refused(source, tmp_path, message, capsys):
    error = run(capsys, "publish", source(REFUSED[message]), tmp_path / "small", code=1).err
    assert message in error
    assert error.count("\n") == 1
    assert left_in(tmp_path) == ["source"]


def test_float64_weights_are_cast_or_refused(source, tmp_path):
    file = source(checkpoint().astype("float64"))
    with pytest.raises(CheckpointError, match="float64 weights, which no published Mixer has"):
        publish(file, tmp_path / "small")
    with pytest.raises(CheckpointError, match="timm's weights are float32, and these float64: cast them with --dtype float32"):
        publish(file, tmp_path / "small", reading=ReadOptions(dtype="float64"))
    assert publish(file, tmp_path / "small", reading=ReadOptions(dtype="float32")).dtype == "float32"


def test_several_faults_are_one_error(source, tmp_path):
    made = checkpoint(SMALL.replace(num_blocks=2, layer_norm_epsilon=1e-5), preprocessing="squash")
    with pytest.raises(CheckpointError, match="no Mixer of 2 blocks.*; timm's Mixers have the LayerNorm.*; timm's transforms"):
        publish(source(made), tmp_path / "small", reading=ReadOptions(num_blocks=2))


def test_what_a_person_should_know_is_one_line_each(source, tmp_path, capsys):
    lines = run(capsys, "publish", source(checkpoint()), tmp_path / "small").out.splitlines()
    assert lines[0].startswith(f"wrote {tmp_path / 'small'}: mixer_s16_224, ")
    assert lines[0].endswith("; read back, every bit equal")
    assert re.match("timm and transformers compute the exact GELU unless told act_layer=.* off by .*e-0", lines[1])
    assert lines[2:] == [
        "no class names in the file: classes are numbers; --labels FILE gives names",
        "no licence: without one others may not use the weights; --licence gives it",
    ]
    (tmp_path / "names.txt").write_text("\n".join("abcdefg"))
    options = "--labels", tmp_path / "names.txt", "--licence", "mit", "--force"
    assert len(run(capsys, "publish", source(checkpoint()), tmp_path / "small", *options).out.splitlines()) == 2
    assert read(tmp_path / "small").metadata.labels == tuple("abcdefg")
    assert "no head: timm" in publish(source(FORMS["no head"]), tmp_path / "small", force=True).notes[1]
    assert "pipeline_tag: image-feature-extraction" in (tmp_path / "small" / "README.md").read_text()
    assert (
        publish(source(FORMS["bfloat16, not square, exact"], "b.safetensors"), tmp_path / "b").notes[1].startswith("bfloat16")
    )


@pytest.mark.parametrize("licence", ["", "Apache 2.0", "mit\n- x", "https://a.b"])
def test_a_licence_is_an_identifier(source, tmp_path, licence):
    with pytest.raises(CheckpointError, match=r"^licence .*: give the hub's identifier, such as apache-2.0"):
        publish(source(), tmp_path / "small", licence=licence)


# Whole or not at all


def test_an_older_folder_is_replaced_only_with_force(source, tmp_path):
    publish(source(), tmp_path / "small.v1")
    before = (tmp_path / "small.v1" / "model.safetensors").stat().st_ino
    with pytest.raises(CheckpointError, match=r"small.v1: a folder is in the way \(replace it with --force or force=True\)"):
        publish(source(), tmp_path / "small.v1")
    assert (tmp_path / "small.v1" / "model.safetensors").stat().st_ino == before
    publish(source(checkpoint()), tmp_path / "small.v1", force=True)
    assert read(tmp_path / "small.v1").metadata.labels is None
    assert left_in(tmp_path) == ["small.v1", "source"]


def test_a_folder_with_anything_else_in_it_is_never_replaced(source, tmp_path):
    publish(source(), tmp_path / "small")
    (tmp_path / "small" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="a folder is in the way; give a name that is free"):
        publish(source(), tmp_path / "small", force=True)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="a file is in the way of the folder"):
        publish(source(), tmp_path / "file", force=True)
    with pytest.raises(CheckpointError, match="the folder .*missing does not exist"):
        publish(source(), tmp_path / "missing" / "small")


@pytest.mark.parametrize("inside", ["", "model.safetensors"])
def test_the_source_is_never_replaced(source, tmp_path, inside):
    publish(source(), tmp_path / "small")
    with pytest.raises(CheckpointError, match="holds the source itself; give another name"):
        publish(tmp_path / "small" / inside, tmp_path / "small", force=True)


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("failing", ["write", "read"])
def test_a_failure_leaves_what_was_there(source, tmp_path, monkeypatch, older, failing):
    """A full disk while the weights are written, and a folder that does not read back as what was written."""
    if older:
        publish(source(), tmp_path / "small")
    before = (tmp_path / "small" / "README.md").read_text() if older else None
    file = source(checkpoint())
    if failing == "write":
        monkeypatch.setattr(hub_folder, "write", Mock(side_effect=OSError(28, "No space left on device")))
    else:
        monkeypatch.setattr(hub_folder, "read", lambda path: checkpoint(labels=list("abcdefg")))
    with pytest.raises((OSError, CheckpointError), match="No space left|what was written does not read back the same"):
        publish(file, tmp_path / "small", force=True)
    assert left_in(tmp_path) == ["small", "source"][not older :]
    if older:
        assert (tmp_path / "small" / "README.md").read_text() == before


# What the card takes from a run and an evaluation


@pytest.fixture
def trained(tmp_path):
    """A folder as `finetune` leaves it, with small weights of 7 classes."""
    folder = tmp_path / "run"
    folder.mkdir()
    settings = {"kind": KIND, "config": FinetuneConfig().as_dict(), "model": {"weights": "f" * 64}}
    settings |= {"data": {"train": {"images": 1200, "fingerprint": "0"}, "test": {"images": 50, "fingerprint": "1"}}}
    (folder / CONFIG).write_text(json.dumps(settings))
    rows: list[dict] = [{"step": 1, "loss": 0.5}]
    for step, correct, loss in ((1, 8, 0.3), (2, 9, 0.2), (3, 9, 0.4)):
        rows.append({"step": step, "validation_correct": correct, "validation_images": 10, "validation_loss": loss})
    rows.append({"step": 3, "best_step": 2, "test_correct": 45, "test_images": 50, "test_loss": 0.1})
    (folder / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 4, "lo')
    for name in ("best", "last"):
        convert.write(folder / name, checkpoint(labels=LABELS), layout="flax")
    return folder


def test_the_weights_of_a_run_bring_its_results(trained, tmp_path):
    publish(trained / "best", tmp_path / "best")
    card = (tmp_path / "best" / "README.md").read_text()
    assert "- step 2: 90.00 % of 10 validation images right (9)\n" in card
    assert "- once, at the end: 90.00 % of 50 test images right (45)\n" in card
    assert "- images: 1,200 for train, 50 for test\n" in card
    assert '"total_steps":' in card
    publish(trained / "last", tmp_path / "last")
    card = (tmp_path / "last" / "README.md").read_text()
    assert "- step 3: 90.00 % of 10 validation images right (9)\n" in card
    assert "test images" not in card
    metrics = (trained / METRICS).read_text()
    (trained / METRICS).write_text(metrics + '\n{"best_step": 1, "validation_images": 3}\n')
    with pytest.raises(
        CheckpointError, match=r"its config.json or metrics.jsonl is damaged \(KeyError: 'validation_correct'\)"
    ):
        publish(trained / "best", tmp_path / "best", force=True)
    (trained / METRICS).write_text(metrics)
    (trained / CONFIG).write_text('{"kind": "another"}')
    publish(trained / "best", tmp_path / "best", force=True)
    assert "## Training" not in (tmp_path / "best" / "README.md").read_text()


def evaluated(preprocessing="timm_bicubic", **changes):
    true, best = np.array([0, 1, 6]), np.array([[0, 1, 2, 3, 4], [1, 0, 2, 3, 4], [0, 1, 2, 3, 4]])
    names = [f"class {i}" for i in range(7)]
    result = Evaluation(names, preprocessing, "label", true, best, {"a.jpg": "cannot be read"})
    weights = checkpoint()
    about = {
        "file": "run/best",
        "fingerprint": fingerprint(weights.arrays, weights.layout),
        "folder": "pets/val",
        "published": [],
    }
    return about | result.as_dict() | changes


def test_an_evaluation_is_a_table_of_the_card(source, tmp_path):
    (tmp_path / "e.json").write_text(json.dumps(evaluated()))
    publish(source(), tmp_path / "small", evaluation=tmp_path / "e.json")
    card = (tmp_path / "small" / "README.md").read_text()
    assert "Of `best` on `val`, folders matched to classes by label, preprocessing `timm_bicubic`:\n" in card
    assert "| top-1 | 66.67 % | 20.77 to 93.85 % | 2 of 3 |\n| top-5 |" in card
    assert "1 image could not be read" in card
    assert "may differ" not in card
    (tmp_path / "e.json").write_text(json.dumps(evaluated(preprocessing="squash")))
    publish(source(), tmp_path / "small", evaluation=tmp_path / "e.json", force=True)
    assert (
        "has the preprocessing `timm_bicubic`, with which the figures may differ" in (tmp_path / "small/README.md").read_text()
    )


def test_an_evaluation_is_of_the_weights_before_a_cast(source, tmp_path):
    (tmp_path / "e.json").write_text(json.dumps(evaluated()))
    publish(source(), tmp_path / "small", evaluation=tmp_path / "e.json", reading=ReadOptions(dtype="bfloat16"))
    assert "| top-1 | 66.67 %" in (tmp_path / "small" / "README.md").read_text()


EVALUATIONS = {
    "not what `evaluate --json` printed \\(TypeError": [],
    "not what `evaluate --json` printed \\(KeyError: 'top1'\\): python -m mixer_jax evaluate FILE FOLDER --json > e.json": {
        "fingerprint": ""
    },
    "not what `evaluate --json` printed \\(ValueError": evaluated(top1={**evaluated()["top1"], "accuracy": "high"}),
    "is not JSON": "{",
    "of weights with the fingerprint 0123456789abcdef, and these have ": evaluated(fingerprint="0123456789abcdef"),
}


@pytest.mark.parametrize("message", EVALUATIONS)
def test_another_file_is_no_evaluation(source, tmp_path, message):
    content = EVALUATIONS[message]
    (tmp_path / "e.json").write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(CheckpointError, match=f"e.json: {message}"):
        publish(source(), tmp_path / "small", evaluation=tmp_path / "e.json")
    assert left_in(tmp_path) == ["e.json", "source"]


# Uploading


@pytest.fixture
def hub(monkeypatch):
    """Stands in for huggingface_hub, with a hub that has no repositories."""
    module = Mock()
    client = module.HfApi.return_value
    client.file_exists.return_value = False
    client.create_repo.return_value = "https://hub/me/small"
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return client


def test_nothing_is_uploaded_unless_asked_for(hub, source, tmp_path):
    assert publish(source(), tmp_path / "small").address is None
    assert hub.method_calls == []


def test_a_folder_is_uploaded_as_one_commit(hub, source, tmp_path, capsys):
    def upload(*, folder_path, **_):
        assert left_in(folder_path) == FOLDER

    hub.upload_folder.side_effect = upload
    out = run(capsys, "publish", source(), tmp_path / "small", "--push", "me/small").out
    assert out.endswith("uploaded: https://hub/me/small, hf:me/small for load, hf-hub:me/small for timm\n")
    assert [call[0] for call in hub.method_calls] == [*["file_exists"] * 3, "create_repo", "upload_folder"]
    assert hub.upload_folder.call_args.kwargs["repo_id"] == "me/small"
    assert sorted(hub.upload_folder.call_args.kwargs["allow_patterns"]) == FOLDER
    card = (tmp_path / "small" / "README.md").read_text()
    assert 'timm.create_model("hf-hub:me/small", pretrained=True, act_layer=tanh)' in card
    assert 'mixer_jax.load("hf:me/small")' in card


def test_what_is_in_a_repository_is_replaced_only_with_force(hub, source, tmp_path):
    hub.file_exists.side_effect = lambda repository, name: name == "README.md"  # beside somebody's pytorch_model.bin
    with pytest.raises(CheckpointError, match=r"hf:me/small: has README.md already \(replace with --force"):
        publish(source(), tmp_path / "small", push_to="me/small")
    assert left_in(tmp_path) == ["source"]
    assert publish(source(), tmp_path / "small", push_to="me/small", force=True).address == "https://hub/me/small"


def test_a_hub_that_fails_is_one_error_and_the_folder_stays(hub, source, tmp_path):
    hub.upload_folder.side_effect = RuntimeError("401 Client Error\nlong story")
    message = (
        r"^hf:me/small: cannot be uploaded \(401 Client Error\); .*small is complete: log in with .*, then the same command"
    )
    with pytest.raises(CheckpointError, match=message):
        publish(source(), tmp_path / "small", push_to="me/small")
    assert left_in(tmp_path / "small") == FOLDER
    hub.file_exists.side_effect = ConnectionError("no connection")
    with pytest.raises(CheckpointError, match=r"^hf:me/small: cannot be reached \(no connection\); log in"):
        publish(source(), tmp_path / "other", push_to="me/small")
    assert not (tmp_path / "other").exists()


def test_a_missing_client_and_an_illegal_name_are_said_before_anything_is_read(monkeypatch, source, tmp_path):
    with pytest.raises(CheckpointError, match="'small' is not the name of a repository: give owner/name"):
        publish("missing.npz", tmp_path / "small", push_to="small")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"uploading to the hub needs its client: pip install 'mixer-jax\[hub\]'"):
        publish("missing.npz", tmp_path / "small", push_to="me/small")


DEVIATIONS = {
    "timm float64": 2e-12,
    "transformers float32": 2e-6,
    "inputs unequal": 1,
    "processor differs from transform": True,
}
DEVIATIONS |= {"labels": ["LABEL_0"], "gap": 1e-4}


@pytest.mark.parametrize("figure", DEVIATIONS)
def test_the_check_with_timm_notices_each_deviation(figure):
    from published import faults

    said = {"labels": LABELS, "tolerance": 1e-6, "gap": 2e-4}
    result = {"labels": LABELS, "gap": 2e-4, "inputs unequal": 0, "processor differs from transform": False}
    result |= {f"{side} {dtype}": 1e-15 for side in ("timm", "transformers") for dtype in ("float32", "float64")}
    assert faults(said, result) == []
    assert len(faults(said, result | {figure: DEVIATIONS[figure]})) == 1


def test_convert_names_the_program_that_publishes(capsys):
    assert "publish is a command of python -m mixer_jax" in run(capsys, "publish", "a", "b", module="convert", code=2).err
