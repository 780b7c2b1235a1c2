"""The models against the referee and each other, within budgets; and faults, which must be named."""

import dataclasses

import faults
import numpy as np
import pytest
from conftest import TINY, random_images, random_weights
from sides import checkpoint, of_referee

import convert
from convert import MixerConfig
from mixer_jax import precision, referee
from mixer_jax.explain import exact, explain, predictions
from mixer_jax.parity import agreement, allowed, compare
from mixer_jax.precision import Precision, difference, rounded
from mixer_jax.sides import Side

torch_too = pytest.mark.torch
sides = pytest.mark.parametrize("side", ["flax", pytest.param("torch", marks=torch_too)])
REFEREE = Side.parsed("referee")


# Float64: 1e-12 of each tensor's largest magnitude, on logits and on every intermediate, compiled and one by one.

SMALLER, LARGER = ["S/32", "S/16", "S/8", "B/32", "B/16"], ["L/32", "L/16", "H/14"]  # L/16 takes 6 GiB


@pytest.fixture(scope="module", params=SMALLER + [pytest.param(name, marks=pytest.mark.heavy) for name in LARGER])
def large(request):
    config = MixerConfig.named(request.param)
    weights, images = random_weights(config), random_images(config, 1)
    right: dict[str, np.ndarray] = {}

    def tap(name, array):
        right[name] = array
        return array

    of_referee(weights, images, config, tap)
    return request.param, checkpoint(weights, config), images, right


@sides
def test_float64_is_the_referees_in_every_operation(side, large):
    variant, weights, images, right = large
    run, errors = Side(side, dtype="float64").open(weights), {}

    def tap(name, array):
        errors[name] = difference(array, right[name]).relative
        return array

    eager, compiled = run(images, tap), run(images, None)
    assert errors.keys() == right.keys()
    logits = [difference(found, right["head"]).relative for found in (eager, compiled)]
    print(f"{variant}, {side}: logits {max(logits):.1e}, operations {max(errors.values()):.1e} of their largest")
    assert max(logits) <= 1e-12  # measured: at most 4e-15
    assert max(errors.values()) <= 1e-12  # measured: at most 1e-14


# Within the budget, and not by a mile: between 0.1 and 1 of it.


def honest(report):
    shares = [share for operation in report.operations for share in operation.share]
    print(f"{report.a} against {report.b}: logits {report.share:.2f} of their budget, operations at most {max(shares):.2f}")
    assert report.passed, report.first
    assert report.share >= 0.1
    return report


@torch_too
@pytest.mark.parametrize("variant", ["B/16", pytest.param("L/16", marks=pytest.mark.heavy)])
def test_float32_is_within_its_budget(variant):
    config = MixerConfig.named(variant)
    weights, images = random_weights(config), random_images(config, 1)
    report = honest(compare(checkpoint(weights, config), images, Side("flax"), Side("torch")))
    right = of_referee(weights, images, config)
    limit = precision.budget(config, weights, images, Precision(), Precision("float64")).growth["head"]
    for side, logits in zip((report.a, report.b), report.outputs):
        found = difference(logits, right)
        share = found.over(limit)
        print(f"{variant}, {side} against the referee: {found.relative:.1e} of the largest logit, {share:.2f} of the budget")
        assert 0.1 <= share <= 1


@sides
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_a_side_is_within_the_budget_of_its_dtype(side, dtype):
    config = MixerConfig.named("S/32", image_size=128).replace(num_blocks=4)
    weights, images = random_weights(config), random_images(config)
    honest(compare(checkpoint(weights, config), images, Side(side, dtype=dtype), REFEREE))


@torch_too
def test_goldens_are_within_their_budgets(golden):
    files = checkpoint(golden.weights, golden.config)
    for dtype in ("float32", "float64"):
        report = compare(files, golden.images[:2], Side("flax", dtype=dtype), Side("torch", dtype=dtype))
        assert report.passed, report.first


def test_a_budget_is_deterministic_and_grows_with_what_is_rounded():
    def last(*ways):
        found = precision.budget(faults.CONFIG, faults.WEIGHTS, random_images(faults.CONFIG), *ways)
        return found.growth["head"].largest

    single, double = Precision(), Precision("float64")
    assert last(single, double) == last(single, double)
    order = [
        last(double, double),
        last(single, double),
        last(Precision(unit="tf32"), double),
        last(Precision("bfloat16"), double),
    ]
    assert order == sorted(order)
    assert order[0] * 1e6 < order[1] < order[2] / 100


def test_a_device_that_may_round_in_two_ways_has_the_larger_budget():
    images = random_images(faults.CONFIG)
    both = allowed(faults.CONFIG, faults.WEIGHTS, images, Side("flax", "gpu", precision="default"), REFEREE)
    each = [
        precision.budget(faults.CONFIG, faults.WEIGHTS, images, Precision(unit=unit), Precision("float64"))
        for unit in ("tf32", "tf32_truncated")
    ]
    assert both.growth["head"].largest == max(budget.growth["head"].largest for budget in each)


# How numbers are rounded.


def test_rounding_to_nearest_is_that_of_the_types():
    import ml_dtypes

    values = np.random.default_rng(0).normal(size=10_000) * 2.0 ** np.random.default_rng(1).integers(-60, 60, 10_000)
    values = np.concatenate([values, -values, [0.0, -0.0, np.inf, -np.inf, 1.0, 1 + 2.0**-9, 1 + 3 * 2.0**-9]])
    for bits, kind in ((24, np.float32), (8, ml_dtypes.bfloat16)):
        wanted = values.astype(kind).astype(np.float64) if bits == 24 else values.astype(np.float32).astype(kind)
        source = values if bits == 24 else values.astype(np.float32).astype(np.float64)
        assert np.array_equal(rounded(source, bits), wanted.astype(np.float64))


def test_truncation_goes_towards_zero_and_random_rounding_is_fair():
    x = np.full(200_000, 1 + 0.25 * 2.0**-10)
    assert set(rounded(x, 11, "truncate")) == {1.0}
    assert set(rounded(-x, 11, "truncate")) == {-1.0}
    drawn = rounded(x, 11, "random", np.random.default_rng(0))
    assert set(drawn) == {1.0, 1 + 2.0**-10}
    assert abs((drawn > 1).mean() - 0.25) < 0.005
    with pytest.raises(ValueError, match="random rounding needs a generator"):
        rounded(x, 11, "random")


# An operand's relative error has a root mean square of 0.425 times half of its last place; a product has two operands.
OF_BFLOAT16 = 0.425 * 2.0**-8


@pytest.mark.parametrize(
    ("unit", "expected"),
    [
        ("tf32", 2**0.5 * 0.425 * 2.0**-11),
        ("bfloat16", 2**0.5 * OF_BFLOAT16),
        ("bfloat16_3x", 3**0.5 * OF_BFLOAT16**2),  # both thirds and the product of both seconds are left out
        ("bfloat16_6x", 2**0.5 * OF_BFLOAT16**3),  # the products of a second and a third
    ],
)
def test_units_err_as_their_passes_do(unit, expected):
    random = np.random.default_rng(0)
    x, kernel = (random.normal(size=shape).astype(np.float32).astype(np.float64) for shape in ((40, 300), (300, 50)))
    right = x @ kernel
    found = np.sqrt(
        np.square(precision._times(precision._operand(x, unit), precision._operand(kernel, unit)) - right).mean()
        / np.square(right).mean()
    )
    print(f"{unit}: {found:.1e}, expected {expected:.1e}")
    assert expected / 1.5 < found < expected * 1.5


# Sabotage: a hundred random faults. All are refused, and the operation that has the fault is named.


@torch_too
def test_a_random_fault_is_refused_and_named():
    config, weights, images = faults.CONFIG, faults.WEIGHTS, random_images(faults.CONFIG)
    honest_sides = {name: Side(name) for name in ("flax", "torch")}
    budget = allowed(config, weights, images, *honest_sides.values())
    files, named, seen = checkpoint(weights, config), 0, set()
    for seed in range(100):
        fault = faults.drawn(np.random.default_rng(seed))
        other = honest_sides["torch" if fault.side.name == "flax" else "flax"]
        report = compare(files, images, fault.side, other, runs=(fault.run, faults.honest(other)), budget=budget)
        assert not report.passed, fault
        right = report.first is not None and (report.first.side, report.first.operation) == (fault.side, fault.operation)
        named += right
        seen.add((fault.family, fault.side.name))
        if not right:
            print(f"{fault.family}, {fault.what}: {fault.operation}, not {report.first}")
    print(f"{named} of 100 faults named")
    assert named >= 95  # measured: 100
    assert len(seen) == 2 * len(faults.FAMILIES)
    assert compare(files, images, *honest_sides.values(), budget=budget).passed


# Why.


@torch_too
def test_the_gap_to_timms_numerics_is_the_gelu(square):
    google, timm = (convert.read(square.weights_file.with_name(name)) for name in ("google.npz", "timm.safetensors"))
    report = compare(google, square.images, Side("flax"), Side("torch"), other=timm)
    assert not report.passed
    assert str(report.first).startswith("block 0, token_mixing, gelu, in torch:cpu:float32:highest: ")
    found = explain(report, google, square.images, other=timm)
    gelu = next(cause for cause in found.causes if cause.name == "GELU")
    print(f"GELU: {gelu.share:.2%} of a gap of {found.gap.largest:.1e}, {found.share:.2f} of the budget unexplained")
    assert gelu.differs
    assert gelu.share >= 0.95  # measured: 99.96 %
    assert found.passed
    assert [cause.name for cause in found.causes if cause.differs] == ["GELU"]


@torch_too
def test_every_choice_that_differs_is_taken_away(square):
    google = convert.read(square.weights_file)
    other = convert.read(square.weights_file, gelu="exact", layer_norm_epsilon=1e-5)
    brighter = square.images * 0.98 + 0.02
    report = compare(google, square.images, Side("flax"), Side("torch"), other=other, other_images=brighter)
    found = explain(report, google, square.images, other=other, other_images=brighter)
    assert [cause.name for cause in found.causes if cause.differs or cause.name == "preprocessing"] == [
        "GELU",
        "LayerNorm epsilon",
        "preprocessing",
    ]
    assert found.passed
    assert not explain(report, google, square.images, other=other).passed  # the images' part is missing


@torch_too
def test_one_corrupted_weight_is_unexplained(square):
    google = convert.read(square.weights_file)
    weights = {name: np.array(array) for name, array in square.weights.items()}
    weights["MixerBlock_1/channel_mixing/Dense_0/kernel"][3, 4] *= 1.01
    report = compare(google, square.images, Side("flax"), Side("torch"), other=checkpoint(weights, square.config))
    found = explain(report, google, square.images)
    print(f"unexplained: {found.unexplained.largest:.1e}, {found.share:.1f} times the budget")
    assert not found.passed
    assert str(report.first).startswith("block 1, channel_mixing, dense_0, in torch")


# To the last bit.


@torch_too
def test_float64_sides_are_one_set_of_float32_logits(square):
    files = convert.read(square.weights_file)
    report = compare(files, square.images, *(Side(name, dtype="float64") for name in ("flax", "torch")))
    found = exact(report)
    print(f"{found.count - len(found.straddling)} of {found.count} logits bit-equal in float32")
    assert found.passed
    assert found.count == 63
    a, b = (logits.copy() for logits in report.outputs)
    boundary = float(np.float32(1)) + 2.0**-24  # half way between two float32 values
    straddling, apart = a.copy(), b.copy()
    a[0, 0], straddling[0, 0] = boundary - 2e-16, boundary + 2e-16
    found = exact(dataclasses.replace(report, outputs=(a, straddling)))
    assert found.passed
    assert (0, 0) in [pair[:2] for pair in found.straddling]
    apart[2, 3] += 1e-6
    found = exact(dataclasses.replace(report, outputs=(report.outputs[0], apart)))
    assert not found.passed
    assert [pair[:2] for pair in found.apart if pair[:2] == (2, 3)] == [(2, 3)]


def test_exactness_is_asked_in_float64_only(square):
    report = compare(convert.read(square.weights_file), square.images[:1], Side("flax"), REFEREE)
    with pytest.raises(ValueError, match="asked of sides in float64, not of flax:cpu:float32:highest: say flax:cpu:float64"):
        exact(report)


# What other devices are expected to give.


def test_predictions_order_the_devices_as_their_digits_do():
    weights = random_weights(TINY)
    rows = predictions(checkpoint(weights, TINY), random_images(TINY))
    error = {row.setting: row.logits.rms for row in rows}
    six, three, one = (row.logits.rms for row in rows if row.devices == "TPU")
    assert six < three < one
    assert len(rows) == 7
    assert len(error) == 6  # TF32 twice
    assert all(0 <= row.same_class <= 1 for row in rows)


# Sides as they are written, and what cannot be compared.


def test_sides_are_read_as_they_are_written():
    assert Side.parsed("flax") == Side("flax", "cpu", "float32", "highest")
    assert Side.parsed("torch:gpu:bfloat16:default") == Side("torch", "gpu", "bfloat16", "default")
    assert str(Side.parsed("flax:tpu")) == "flax:tpu:float32:highest"
    assert str(REFEREE) == "referee"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("jax", "a side's name is one of flax, torch, timm, referee, not 'jax'"),
        ("flax:cuda", "a side's device is one of cpu, gpu, tpu, not 'cuda'"),
        ("flax:cpu:int8", "a side's dtype is one of"),
        ("flax:cpu:float32:best", "a side's precision is one of highest, high, default, not 'best'"),
        ("flax:cpu:float32:high:now", "a side is NAME"),
        ("referee:cpu:float32", "the referee computes in float64 on the CPU"),
    ],
)
def test_a_side_that_is_none_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        Side.parsed(text)


@pytest.mark.parametrize("how", [("float33", "float32"), ("tf32", "float32"), ("float32", "bfloat16_2x")])
def test_a_precision_that_is_none_is_refused(how):
    with pytest.raises(ValueError, match="no such precision"):
        Precision(*how)


def test_a_side_whose_operation_has_another_shape_is_refused_there():
    honest_run = faults.honest(Side("flax"))

    def run(images, tap):
        def faulty(name, array):
            return tap(name, array[:, :5] if name == "blocks/1/channel_norm" else array)

        return honest_run(images, tap and (lambda name, array: (faulty(name, array), array)[1]))

    files = checkpoint(faults.WEIGHTS, faults.CONFIG)
    report = compare(files, random_images(faults.CONFIG), Side("flax"), REFEREE, runs=(run, None))
    assert report.first is not None
    assert (report.first.operation, report.first.error) == ("blocks/1/channel_norm", np.inf)


def test_a_tap_that_changes_nothing_changes_nothing():
    run, images = faults.honest(Side("flax")), random_images(faults.CONFIG)
    tapped = run(images, lambda name, array: array.copy())
    assert difference(tapped, run(images, None)).relative < 1e-6


def test_logits_without_spread_are_no_parity():
    """A fresh zero head makes any two models agree."""
    zeros = faults.WEIGHTS | {"head/kernel": np.zeros((16, 16), "float32"), "head/bias": np.zeros(16, "float32")}
    with pytest.raises(ValueError, match="the logits of an image are all alike, as after a fresh head"):
        compare(checkpoint(zeros, faults.CONFIG), random_images(faults.CONFIG), Side("flax"), REFEREE)
    spread = np.random.default_rng(0).normal(size=(2, 16))
    with pytest.raises(ValueError, match="all alike"):
        agreement(spread, np.full((2, 16), 3.0))  # one side without spread is enough


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_no_parity(value):
    logits = np.random.default_rng(0).normal(size=(2, 5))
    with pytest.raises(ValueError, match="NaN or infinite logits"):
        agreement(logits, np.where(logits > 1, value, logits))


def test_logits_of_different_shapes_are_no_parity():
    with pytest.raises(ValueError, match=r"found \(2, 5\) and \(2, 4\)"):
        agreement(np.zeros((2, 5)), np.zeros((2, 4)))
    with pytest.raises(ValueError, match="two classes or more"):
        agreement(np.zeros((2, 1)), np.zeros((2, 1)))


def test_agreement_counts_what_it_says():
    a = np.array([[1.0, 2.0, -4.0, 0, 5, 6, 7], [3.0, 0.0, 1.0, 0, 0, 0, -1]])
    b = np.array([[1.0, 2.5, -4.0, 0, 5, 6, 7], [0.0, 0.0, 1.0, 0, 0, 0, 9]])
    found = agreement(a, b)
    assert (found.largest, found.scale, found.same_class, found.same_five) == (10.0, 9.0, 0.5, 0.5)
    assert found.rms == pytest.approx(np.sqrt((0.25 + 9 + 100) / 14))
    p, q = (np.exp(side) / np.exp(side).sum(axis=1, keepdims=True) for side in (a, b))
    assert found.divergence == pytest.approx((p * np.log(p / q)).sum(axis=1).mean())
    assert agreement(a, a).divergence == 0


def test_the_referees_arithmetic_is_what_its_operations_say():
    """A difference planted in one operation of the arithmetic shows in its name and not before."""

    class Wrong(referee.Arithmetic):
        def mean(self, x):
            return super().mean(x) * 1.001

    seen: list[dict[str, np.ndarray]] = [{}, {}]
    for values, arithmetic in zip(seen, (referee.Arithmetic(), Wrong())):
        referee.forward(
            faults.CONFIG,
            faults.WEIGHTS,
            random_images(faults.CONFIG),
            tap=lambda name, array, values=values: values.setdefault(name, array),
            arithmetic=arithmetic,
        )
    differing = [name for name in seen[0] if not np.array_equal(seen[0][name], seen[1][name])]
    assert differing == ["mean", "head"]
