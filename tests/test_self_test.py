"""One implementation by itself: every identity holds where it should, fails where it can, and what none of them sees."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
from conftest import GOLDENS, TINY, random_images, random_weights
from einops import rearrange
from sides import checkpoint

from convert import MixerConfig
from mixer_jax import self_test as module
from mixer_jax.self_test import lines, passed, self_test
from mixer_jax.sides import Side

NAMES = ["tokens", "pixels", "hidden units", "channels", "scales", "crops", "head", "classes"]
REFEREE = Side("referee", dtype="float64")
SIDES = ["flax", pytest.param("torch", marks=pytest.mark.torch)]
# As many tokens as channels, and square kernels, so that no fault below is caught by a shape.
CONFIG = MixerConfig(
    patch_size=(4, 4), image_size=(16, 16), num_blocks=3, hidden_dim=16, tokens_mlp_dim=16, channels_mlp_dim=16, num_classes=6
)


def honest(config=CONFIG, dtype="float32"):
    return checkpoint(random_weights(config), config).astype(dtype)


def shares(results):
    return {each.name: each.share for each in results}


def failed(results):
    return {each.name for each in results if each.passed is False}


def in_figures(results):
    return ", ".join(f"{each.name} {each.share:.2g}" for each in results if each.share is not None)


# Honest sides.


@pytest.mark.parametrize(("name", "dtype"), [*((name, "float64") for name in GOLDENS), ("rectangular", "float32")])
@pytest.mark.parametrize("side", SIDES)
def test_every_identity_holds_on_the_golden_checkpoints(side, name, dtype):
    golden = GOLDENS[name]
    results = self_test(checkpoint(golden.weights, golden.config), side=Side(side, dtype=dtype))
    print(f"{side} {dtype} {golden.name}: {in_figures(results)}")
    assert [each.name for each in results] == NAMES
    assert passed(results)
    assert max(each.share for each in results if each.share is not None) > 0.1  # measured: 0.17 to 0.42; not all slack
    missing = {each.name: each.note for each in results if each.passed is None}
    assert missing == ({} if golden.config.num_classes else dict.fromkeys(["head", "classes"], "there is no head"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("side", SIDES)
def test_every_identity_holds_for_half_precision_files(side, dtype):
    """Nothing is rounded on the way: in float64 they hold to the last digits."""
    results = self_test(honest(TINY, dtype), side=Side(side, dtype="float64"))
    assert passed(results)
    assert all(each.difference.largest < 1e-14 * each.difference.scale for each in results)  # 5e-16


@pytest.mark.parametrize("side", SIDES)
def test_every_identity_holds_on_a_side_that_computes_in_bfloat16(side):
    assert passed(self_test(honest(TINY), side=Side(side, dtype="bfloat16")))


@pytest.mark.parametrize("layout", ["flax", "timm", "legacy", "reference"])
def test_every_identity_holds_from_every_layout(layout):
    assert passed(self_test(honest(TINY).to(layout), side=REFEREE))


def test_the_same_seed_gives_the_same_figures():
    first, again, other = (self_test(honest(), side=REFEREE, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_the_tokens_are_put_in_an_order_that_is_not_their_own():
    random = np.random.default_rng(0)
    orders = [module._order(random, 2) for _ in range(20)]
    assert all(order.tolist() == [1, 0] for order in orders)
    assert module._order(random, 1).tolist() == [0]


# What an identity changes must all be changed: a loader that keeps one array of the file's has to be seen.


class Forgetful(Side):
    """Takes the arrays whose names end so from the file, whatever it is given."""

    def open(self, given):
        file, arrays = self.file.to("google").arrays, dict(given.to("google").arrays)
        for name, array in arrays.items():
            old, size = np.asarray(file[name]), array.shape
            if name.endswith(self.ending) and all(a <= b for a, b in zip(size, old.shape)):
                arrays[name] = old[tuple(slice(length) for length in size)].astype(array.dtype)
        return super().open(replace(given.to("google"), arrays=arrays))


def forgetful(file, ending):
    side = Forgetful("referee", dtype="float64")
    object.__setattr__(side, "file", file)
    object.__setattr__(side, "ending", ending)
    return side


NORMS = [f"{norm}/{leaf}" for norm in ("LayerNorm_0", "LayerNorm_1", "pre_head_layer_norm") for leaf in ("scale", "bias")]
OF_THE_STREAM = ["stem/kernel", "stem/bias", *(f"channel_mixing/Dense_1/{leaf}" for leaf in ("kernel", "bias"))]
CHANGED = {
    "tokens": [f"token_mixing/Dense_{i}/kernel" for i in (0, 1)],
    "pixels": ["stem/kernel"],
    "hidden units": [
        f"{mlp}_mixing/{leaf}" for mlp in ("token", "channel") for leaf in ("Dense_0/kernel", "Dense_0/bias", "Dense_1/kernel")
    ],
    "channels": [*NORMS, *OF_THE_STREAM, "channel_mixing/Dense_0/kernel", "head/kernel"],
    "scales": [
        *NORMS,
        *OF_THE_STREAM,
        *(f"{mlp}_mixing/Dense_0/kernel" for mlp in ("token", "channel")),
        "token_mixing/Dense_1/kernel",
        "head/kernel",
    ],
    "head": ["head/kernel", "head/bias"],
    "classes": ["head/kernel", "head/bias"],
}


@pytest.mark.parametrize(("identity", "ending"), [(name, ending) for name, endings in CHANGED.items() for ending in endings])
def test_an_identity_fails_where_one_of_its_arrays_is_not_changed(identity, ending):
    results = self_test(honest(), side=forgetful(honest(), ending), draws=2)
    assert shares(results)[identity] > 1e9  # at least 2.8e13


@pytest.mark.parametrize("endings", [("Dense_0/kernel",), ("Dense_1/kernel",), ("Dense_0/kernel", "Dense_1/kernel")])
def test_crops_fail_with_a_kronecker_product_without_the_permutation(endings):
    file = honest().to("google").arrays

    class Kronecker(Side):
        def open(self, given):
            arrays = dict(given.to("google").arrays)
            for name, array in arrays.items():
                if name.endswith(tuple(f"token_mixing/{ending}" for ending in endings)) and array.shape != file[name].shape:
                    arrays[name] = np.kron(np.eye(4, dtype="float32"), np.asarray(file[name]))
            return super().open(replace(given.to("google"), arrays=arrays))

    assert failed(self_test(honest(), side=Kronecker("referee", dtype="float64"), draws=2)) == {"crops"}


def test_scales_fail_where_epsilon_is_not_scaled():
    class Stubborn(Side):
        def open(self, given):
            return super().open(given.with_metadata(layer_norm_epsilon=1e-6))

    assert failed(self_test(honest(), side=Stubborn("referee", dtype="float64"), draws=2)) == {"scales"}


# Faults of a side. Each takes a checkpoint and returns the run of a side that has it.


class Plant:
    """A tap that knows what came before, and the weights."""

    def __init__(self, fault, given):
        self.fault, self.before = fault, {}
        self.weights, self.epsilon = given.to("google").as_numpy(), given.config.layer_norm_epsilon

    def __call__(self, name, array):
        self.before[name] = array
        return getattr(self, self.fault)(name, array)

    def column_major(self, name, array):
        side = int(np.sqrt(array.shape[1]))
        return rearrange(array, "b (gh gw) c -> b (gw gh) c", gh=side) if name == "stem" else array

    def half_mean(self, name, array):
        normed = self.before.get("pre_head_norm")
        return normed[:, : normed.shape[1] // 2].mean(axis=1) if name == "mean" else array

    def mean_over_channels(self, name, array):
        return rearrange(array, "b n c -> b c n") if name == "pre_head_norm" and array.shape[1] == array.shape[2] else array

    def no_transpose_back(self, name, array):
        square = array.ndim == 3 and array.shape[1] == array.shape[2]
        return rearrange(array, "b c n -> b n c") if name == "blocks/2/token_mixing/dense_1" and square else array

    def norm_over_tokens(self, name, array):
        if name != "blocks/1/token_norm":
            return array
        x = self.before["blocks/0/channel_mixing/sum"]
        scale, bias = (self.weights[f"MixerBlock_1/LayerNorm_0/{leaf}"] for leaf in ("scale", "bias"))
        return (x - x.mean(axis=1, keepdims=True)) / np.sqrt(x.var(axis=1, keepdims=True) + self.epsilon) * scale + bias

    def no_residual(self, name, array):
        return self.before["blocks/1/channel_mixing/dense_1"] if name == "blocks/1/channel_mixing/sum" else array

    def no_block(self, name, array):
        return self.before["blocks/0/channel_mixing/sum"] if name == "blocks/1/channel_mixing/sum" else array


def planted(fault):
    def open(given):
        run = REFEREE.open(given)
        return lambda images, tap: run(images, Plant(fault, given))

    return open


def loaded(change):
    """A side that loads other arrays: `change` gets google's names and returns those that it changes."""

    def open(given):
        canonical = given.to("google")
        weights = canonical.as_numpy()
        return REFEREE.open(replace(canonical, arrays=weights | change(weights)))

    return open


def after(change):
    return lambda given: lambda images, tap: change(REFEREE.open(given)(images, None))


def before(change):
    return lambda given: lambda images, tap: REFEREE.open(given)(change(images), None)


def with_epsilon(change):
    return lambda given: REFEREE.open(given.with_metadata(layer_norm_epsilon=change(given.config.layer_norm_epsilon)))


def shared_norms(w):
    return {name: w[name.replace("LayerNorm_1", "LayerNorm_0")] for name in w if "LayerNorm_1" in name}


def only(ending, change):
    return loaded(lambda w: {name: change(array) for name, array in w.items() if name.endswith(ending)})


def swapped(ending):
    first, second = (f"MixerBlock_{i}/{ending}" for i in (0, 1))
    return loaded(lambda w: {first: w[second], second: w[first]})


def reversed_blocks(w):
    def other(name):
        block, _, rest = name.partition("/")
        return f"MixerBlock_{2 - int(block.removeprefix('MixerBlock_'))}/{rest}"

    return {name: w[other(name)] for name in w if name.startswith("MixerBlock")}


def in_bfloat16(w):
    import ml_dtypes

    return {name: array.astype(ml_dtypes.bfloat16).astype(array.dtype) for name, array in w.items()}


def softmax(logits):
    powers = np.exp(logits)
    return powers / powers.sum(axis=1, keepdims=True)


SEEN = {
    "patches column by column": (planted("column_major"), "tokens"),
    "mean over the first half of the tokens": (planted("half_mean"), "tokens crops"),
    "mean over channels": (planted("mean_over_channels"), "tokens channels crops"),
    "no transpose after token mixing": (planted("no_transpose_back"), "tokens channels crops"),
    "LayerNorm over tokens": (planted("norm_over_tokens"), "crops"),
    "one LayerNorm for both mixings": (loaded(shared_norms), "scales"),
    "a token kernel transposed": (only("0/token_mixing/Dense_0/kernel", lambda w: w.T), "tokens hidden crops"),
    "a channel kernel transposed": (only("1/channel_mixing/Dense_1/kernel", lambda w: w.T), "hidden channels"),
    "second products of two blocks swapped": (swapped("channel_mixing/Dense_1/kernel"), "hidden"),
    "norms of two blocks swapped": (swapped("LayerNorm_0/scale"), "scales"),
    "the stem's height and width swapped": (only("stem/kernel", lambda w: w.swapaxes(0, 1)), "pixels"),
    "colours the other way round": (before(lambda images: images[..., ::-1]), "pixels"),
    "a norm's scale left out": (only("1/LayerNorm_1/scale", np.ones_like), "scales"),
    "an epsilon of its own": (with_epsilon(lambda epsilon: 1e-5), "scales"),
    "the first image for the whole batch": (before(lambda images: images[:1].repeat(len(images), axis=0)), "crops"),
    "probabilities": (after(softmax), "crops head classes"),
    "classes the other way round": (after(lambda logits: logits[:, ::-1]), "classes"),
}
UNSEEN = {
    "the exact GELU": lambda given: REFEREE.open(given.with_metadata(gelu="exact")),
    "blocks in another order": loaded(reversed_blocks),
    "a block left out": planted("no_block"),
    "a residual connection left out": planted("no_residual"),
    "the stem's bias left out": only("stem/bias", np.zeros_like),
    "a norm's bias left out": only("1/LayerNorm_1/bias", np.zeros_like),
    "a hidden bias left out": only("1/channel_mixing/Dense_0/bias", np.zeros_like),
    "the head's bias left out": only("head/bias", np.zeros_like),
    "ten times the epsilon": with_epsilon(lambda epsilon: 10 * epsilon),
    "weights rounded to bfloat16": loaded(in_bfloat16),
}


def with_fault(open_):
    class Faulty(Side):
        def open(self, given):
            return open_(given)

    return Faulty("referee", dtype="float64")


def off_by(open_):
    """How far a fault moves the logits, of the largest."""
    images = random_images(CONFIG, dtype="float64")
    found, right = (opener(honest())(images, None) for opener in (open_, REFEREE.open))
    return np.abs(found - right).max() / np.abs(right).max()


@pytest.mark.parametrize("fault", SEEN)
def test_a_fault_of_a_side_is_seen_by_these_identities(fault):
    open_, expected = SEEN[fault]
    results = self_test(honest(), side=with_fault(open_), draws=4)
    print(f"{fault:<40}" + "".join(f"{each.name if each.passed is False else '-':>14}" for each in results))
    assert failed(results) == {name for name in NAMES if name.split()[0] in expected.split()}
    assert not passed(results)


def test_a_side_that_computes_in_float32_where_float64_is_said_is_seen():
    results = self_test(honest(), side=with_fault(Side("flax").open))
    assert failed(results) >= {"tokens", "pixels", "hidden units", "channels", "crops"}


@pytest.mark.parametrize("fault", UNSEEN)
def test_a_fault_that_gives_another_mixer_is_seen_by_none(fault):
    """What the module says of its limits; the logits are wrong all the same."""
    assert off_by(UNSEEN[fault]) > 1e-7  # at least 1.1e-5, by ten times the epsilon; honest runs differ by 1e-15
    assert passed(self_test(honest(), side=with_fault(UNSEEN[fault]), draws=4))


def test_a_file_read_wrongly_to_begin_with_is_not_seen():
    weights = random_weights(CONFIG)
    weights["MixerBlock_1/channel_mixing/Dense_0/kernel"] = weights["MixerBlock_1/channel_mixing/Dense_0/kernel"].T
    assert passed(self_test(checkpoint(weights, CONFIG), side=REFEREE))


def test_the_last_bias_of_token_mixing_has_no_influence_on_logits():
    assert off_by(only("token_mixing/Dense_1/bias", lambda b: b + 1)) < 1e-14  # 3e-16
    assert off_by(only("token_mixing/Dense_0/bias", lambda b: b + 1)) > 1e-3  # 0.28


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", SIDES)
def test_a_fault_of_a_real_side_is_seen(name, dtype):
    class Faulty(Side):
        def open(self, given):
            run = super().open(given)
            columns = np.arange(given.config.num_tokens).reshape(given.config.grid).T.ravel()
            return lambda images, tap: run(module.rearranged(images, given.config, tokens=columns), tap)

    class Misloaded(Side):
        def open(self, given):
            weights = given.to("google").as_numpy()
            name = "MixerBlock_2/token_mixing/Dense_1/kernel"
            return super().open(replace(given.to("google"), arrays=weights | {name: weights[name].T}))

    assert failed(self_test(honest(), side=Faulty(name, dtype=dtype), draws=4)) == {"tokens"}
    assert failed(self_test(honest(), side=Misloaded(name, dtype=dtype), draws=4)) == {"tokens", "hidden units", "crops"}


# What is not run is said, and what proves nothing is refused.


def test_a_model_too_large_for_crops_is_said_to_be_not_run(monkeypatch):
    monkeypatch.setattr(module, "LARGEST", 1000)
    results = self_test(honest(TINY), side=REFEREE)
    crops, parameters = results[NAMES.index("crops")], TINY.replace(image_size=(16, 30), tokens_mlp_dim=44).num_parameters
    assert (crops.passed, crops.share, crops.difference, crops.budget) == (None, None, None, None)
    assert crops.note == f"the model for 16x30 pixels has {parameters:,} parameters, more than 1,000"
    assert passed(results)
    assert "crops         not run: the model for 16x30" in lines(results)
    assert lines(results).endswith("7 of 7 hold; not run: 1")


def test_one_token_of_one_value_is_said_to_be_not_run():
    config = TINY.replace(patch_size=(1, 1), image_size=(1, 1), in_channels=1, tokens_mlp_dim=1, channels_mlp_dim=1)
    notes = {each.name: each.note for each in self_test(honest(config), side=REFEREE) if each.passed is None}
    assert notes == {
        "tokens": "there is one token",
        "pixels": "a patch is one value",
        "hidden units": "every MLP has one hidden unit",
    }


def test_nothing_run_is_nothing_passed():
    ran = self_test(honest(), side=REFEREE, draws=2)
    assert passed(ran)
    assert not passed([replace(each, passed=None) for each in ran])
    assert not passed([])


def test_logits_without_spread_are_refused():
    with pytest.raises(ValueError, match="the logits of an image are all alike, as after a fresh head"):
        self_test(honest().with_classes(9), side=REFEREE)


def test_logits_that_are_not_finite_are_refused():
    weights = random_weights(CONFIG)
    weights["head/bias"][1] = np.nan
    with pytest.raises(ValueError, match="NaN or infinite logits"):
        self_test(checkpoint(weights, CONFIG), side=REFEREE)


def test_a_side_that_is_not_finite_on_changed_weights_fails():
    calls = []

    class Sometimes(Side):
        def open(self, given):
            calls.append(given)
            run = super().open(given)
            return lambda images, tap: run(images, tap) * (1 if len(calls) == 1 else np.nan)

    assert failed(self_test(honest(), side=Sometimes("referee", dtype="float64"), draws=2)) == set(NAMES)


def test_the_table_names_what_fails_and_why():
    text = lines(self_test(honest(), side=with_fault(SEEN["classes the other way round"][0]), draws=2))
    print(text)
    table = text.splitlines()
    assert table[0].split() == ["identity", "difference", "budget", "share"]
    assert table[1].startswith("tokens ")
    assert table[1].endswith(" holds")
    assert table[-2].endswith("FAILS: some classes in another order give those logits in that order")
    assert table[-1] == "7 of 8 hold"


def test_results_go_into_json_as_they_are():
    results = self_test(checkpoint(GOLDENS["features"].weights, GOLDENS["features"].config), side=REFEREE, draws=2)
    back = json.loads(json.dumps([asdict(each) for each in results]))
    assert [each["name"] for each in back] == NAMES
    assert back[0]["difference"].keys() == {"largest", "rms", "scale"}
    assert back[0]["passed"] is True
    assert (back[-1]["passed"], back[-1]["difference"], back[-1]["note"]) == (None, None, "there is no head")
