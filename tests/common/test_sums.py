"""Clip, sum and noise: the three things a promise rests on, for any input that a contribution could hold."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import hypothesis.extra.numpy as hnp
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

from penchant.common.errors import InvalidConfig, MalformedContribution
from penchant.common.privacy.accounting import epsilon
from penchant.common.privacy.events import Gaussian, PoissonGaussian
from penchant.common.privacy.ledger import Ledger, Receipt
from penchant.common.privacy.noise import Noise
from penchant.common.privacy.plan import QuantileClip, SumSpec
from penchant.common.privacy.sums import WITHIN, Clip, PrivateSum, check, clip, grid, norm, on_grid
from penchant.common.streams import Streams

Vector = npt.NDArray[Any]
FALSE_ALARM = 1e-6

shapes = st.sampled_from([(), (0,), (1,), (3,), (2, 2), (0, 5), (7,)])  # 0-d and empty among them
KINDS: list[tuple[Any, st.SearchStrategy[float]]] = [
    (np.float16, st.floats(allow_nan=False, allow_infinity=False, width=16)),
    (np.float32, st.floats(allow_nan=False, allow_infinity=False, width=32)),
    (np.float64, st.floats(-1e150, 1e150)),  # its square stays in float64
    (np.int8, st.integers(-128, 127)),
    (np.int64, st.integers(-(2**62), 2**62)),
]
bounds = st.floats(1e-3, 1e3)


@st.composite
def contributions(draw: st.DrawFn) -> dict[str, Vector]:
    """One to three named arrays of any shape and type, huge and denormal values among them, all of them finite."""
    out = {}
    for name in draw(st.sampled_from(["a", "ab", "abc"])):
        kind, numbers = draw(st.sampled_from(KINDS))
        out[name] = draw(hnp.arrays(kind, draw(shapes), elements=numbers))
    return out


def length(contribution: Mapping[str, Vector]) -> float:
    """The L2 norm by other means than the code's: math.hypot neither over- nor underflows."""
    return math.hypot(*(float(v) for values in contribution.values() for v in np.ravel(values)))


def charged(noise_multiplier: float) -> Receipt:
    return Ledger("test", delta=1e-5).charge(1, Gaussian(noise_multiplier=noise_multiplier))


def private(
    shapes: Mapping[str, tuple[int, ...]], *, clip_norm: float, noise_multiplier: float, **more: Any
) -> PrivateSum:
    spec = SumSpec(name="sum", rounds=1, clip_norm=clip_norm, noise_multiplier=noise_multiplier, **more)
    return PrivateSum(shapes, spec)


def stream(number: int) -> Noise:
    return Noise(Streams(number).key("test"))


def exact(total: PrivateSum) -> Vector:
    """The sum before its noise as one flat vector."""
    return np.concatenate([total._total[name].ravel() for name in sorted(total._total)])


def released(total: PrivateSum, noise: Noise, receipt: Receipt | None = None) -> dict[str, npt.NDArray[np.float64]]:
    return {name: values.astype(np.float64) for name, values in total.release(noise, receipt).items()}


# ----------------------------------------------------------------------------------------------------------- clip


@given(contribution=contributions(), bound=bounds)
@example(contribution={"a": np.full(16, 3e38, np.float32)}, bound=1e-3)  # float32 would lose the factor
@example(contribution={"a": np.full(16, 65504, np.float16), "b": np.array(3e38, np.float32)}, bound=1.0)
@example(contribution={"a": np.full(9, 1e-45, np.float32), "b": np.full(3, 5e-324)}, bound=1e-3)
@example(contribution={"a": np.zeros(4), "b": np.array(0), "c": np.zeros((0, 2), np.int64)}, bound=1.0)
def test_clip_never_exceeds_its_bound(contribution: dict[str, Vector], bound: float) -> None:
    clipped = clip(contribution, bound)
    assert length(clipped) <= bound
    assert {k: v.shape for k, v in clipped.items()} == {k: v.shape for k, v in contribution.items()}
    assert all(v.dtype == np.float32 for v in clipped.values())


@given(contribution=contributions(), bound=bounds)
def test_a_contribution_within_the_bound_comes_back_unchanged_and_any_other_reaches_it(
    contribution: dict[str, Vector], bound: float
) -> None:
    clipped = clip(contribution, bound)
    if length(contribution) <= bound * (1 - 1e-6):
        for name, values in contribution.items():
            np.testing.assert_allclose(clipped[name], values.astype(np.float32), rtol=0, atol=grid(bound))
    elif length(contribution) > bound * (1 + 1e-12):
        assert length(clipped) == pytest.approx(bound, rel=1e-6)


def test_several_arrays_are_clipped_as_one_flat_vector_and_not_each_for_itself() -> None:
    parts = {"scalar": np.array(3.0), "row": np.array([0.0, 4.0]), "empty": np.zeros(0)}
    clipped = clip(parts, 1.0)
    assert clipped["scalar"] == pytest.approx(0.6)
    np.testing.assert_allclose(clipped["row"], [0, 0.8], rtol=1e-6)
    each = {name: clip({name: values}, 1.0)[name] for name, values in parts.items()}
    assert length(each) > 1.4  # what that mistake would let through


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e200])  # 1e200² is not in float64
@pytest.mark.parametrize("bound", [1.0, math.inf])
def test_what_has_no_finite_norm_is_refused_wherever_it_hides(bad: float, bound: float) -> None:
    with pytest.raises(MalformedContribution):
        clip({"a": np.zeros(3), "b": np.array(bad)}, bound)
    with pytest.raises(MalformedContribution):
        norm({"a": np.zeros(3), "b": np.array([[1.0, bad]])})


def test_without_a_bound_what_float32_cannot_hold_is_refused_and_not_made_infinite() -> None:
    np.testing.assert_array_equal(clip({"a": np.array([1e30])}, math.inf)["a"], np.float32(1e30))
    with pytest.raises(MalformedContribution, match="float32"):
        clip({"a": np.array([1e39])}, math.inf)


ANY_FLOAT32 = st.floats(width=32)


@given(people=st.integers(0, 4), levels=st.integers(1, 3), bound=bounds | st.just(math.inf), data=st.data())
def test_people_clipped_at_once_get_what_each_gets_alone(
    people: int, levels: int, bound: float, data: st.DataObject
) -> None:
    row = data.draw(st.none() | st.floats(1e-3, 10))
    numbers = data.draw(st.sampled_from([ANY_FLOAT32, st.floats(-2, 2, width=32)]))
    values = data.draw(hnp.arrays(np.float32, (people, levels), elements=numbers))
    times = data.draw(hnp.arrays(np.int64, (people, levels), elements=st.integers(0, 40)))
    alone, together = Clip(bound, row), Clip(bound, row)
    found = together.repeated(values, times)
    assert found.dtype == np.float32
    for one, count, got in zip(values, times, found, strict=True):
        sent = np.repeat(got, count)
        np.testing.assert_allclose(sent, alone({"a": np.repeat(one, count)})["a"], rtol=2.0**-21, atol=grid(bound))
        assert length({"a": sent}) <= bound
        assert np.array_equal(on_grid(got, bound), got)
    assert (together.n, together.within, together.refused) == (alone.n, alone.within, alone.refused)


def test_people_who_each_send_one_value_get_the_same_bits_at_once_and_alone() -> None:
    times = np.arange(1, 3000)[:, None]
    values = (1 / np.sqrt(times)).astype(np.float32)
    for bound in (1.0, 0.3, math.inf):
        found = Clip(bound).repeated(values, times)
        alone = [Clip(bound)({"a": np.full(n, v)})["a"][0] for (n,), (v,) in zip(times, values, strict=True)]
        assert found[:, 0].tolist() == alone


@pytest.mark.parametrize("bound", [0.0, -1.0, math.nan])
def test_a_senseless_bound_is_refused(bound: float) -> None:
    with pytest.raises(InvalidConfig, match="bound"):
        clip({"a": np.ones(3)}, bound)


# ---------------------------------------------------------------------------------------------------- sensitivity

SHAPES = {"a": (3,), "b": (), "c": (2, 2), "d": (0,)}

people = st.lists(
    st.fixed_dictionaries(
        {
            name: hnp.arrays(np.float32, shape, elements=st.floats(-(2.0**60), 2.0**60, width=32))
            for name, shape in SHAPES.items()
        }
    ),
    min_size=1,
    max_size=5,
)


def private_sum(
    cohort: list[dict[str, Vector]], bound: float, *, prepare: Callable[..., Any] = clip, users: int = 1
) -> Vector:
    """The sum of these people as one flat vector, each on a node of their own. Its noise is the same for neighbours."""
    total = private(SHAPES, clip_norm=bound, noise_multiplier=1.0)
    for contribution in cohort:
        total.add(prepare(contribution, bound), users=users)
    return exact(total)


@given(cohort=people, bound=st.floats(0.01, 10), data=st.data())
def test_one_person_more_or_less_moves_the_sum_by_at_most_the_bound(
    cohort: list[dict[str, Vector]], bound: float, data: st.DataObject
) -> None:
    left_out = data.draw(st.integers(0, len(cohort) - 1))
    neighbour = cohort[:left_out] + cohort[left_out + 1 :]
    moved = np.linalg.norm(private_sum(cohort, bound) - private_sum(neighbour, bound))
    assert moved <= Clip(bound).sensitivity("add/remove") == bound


@given(cohort=people, other=people, bound=st.floats(0.01, 10))
def test_one_person_replaced_moves_the_sum_by_at_most_twice_the_bound(
    cohort: list[dict[str, Vector]], other: list[dict[str, Vector]], bound: float
) -> None:
    moved = np.linalg.norm(private_sum(cohort, bound) - private_sum([*cohort[:-1], other[0]], bound))
    assert moved <= Clip(bound).sensitivity("replace") == 2 * bound


def test_the_charge_for_neighbours_that_replace_one_another_is_for_twice_the_bound() -> None:
    event = Gaussian(noise_multiplier=4.0)
    assert epsilon([event], 1e-5, "replace").epsilon == epsilon([Gaussian(noise_multiplier=2.0)], 1e-5).epsilon
    far = private_sum([{**GOOD, "a": np.full(3, 1e9)}], 1.0) - private_sum([{**GOOD, "a": np.full(3, -1e9)}], 1.0)
    assert np.linalg.norm(far) > 1.99  # and twice the bound is reached


@given(cohort=people, bound=st.floats(0.01, 10), order=st.randoms(use_true_random=False), data=st.data())
def test_the_sum_is_the_same_to_the_last_bit_in_any_order_and_through_any_nodes(
    cohort: list[dict[str, Vector]], bound: float, order: Any, data: st.DataObject
) -> None:
    shuffled = list(cohort)
    order.shuffle(shuffled)
    total = private(SHAPES, clip_norm=bound, noise_multiplier=1.0)
    while shuffled:
        here = [shuffled.pop() for _ in range(data.draw(st.integers(1, len(shuffled))))]
        all_of = [clip(contribution, bound) for contribution in here]
        partial: dict[str, Any] = {n: np.sum([c[n] for c in all_of], axis=0, dtype=np.float64) for n in SHAPES}
        total.add(partial, users=len(here))
    np.testing.assert_array_equal(exact(total), private_sum(cohort, bound))


def test_a_sum_off_the_grid_would_round_and_the_order_would_show() -> None:
    values = np.random.default_rng(0).uniform(-1, 1, 1000)
    assert sum(values) != sum(values[::-1])
    cut = on_grid(values, 1.0)
    assert sum(cut) == sum(cut[::-1])
    assert np.abs(cut - values).max() < 2**-27


@given(contribution=contributions(), bound=bounds, row=st.floats(1e-3, 10))
def test_a_row_clip_holds_every_row_and_the_whole(contribution: dict[str, Vector], bound: float, row: float) -> None:
    clipped = Clip(bound, row)(contribution)
    assert length(clipped) <= bound
    for values in clipped.values():
        for one in values if values.ndim else [values]:
            assert length({"row": np.asarray(one)}) <= row * (1 + 1e-6)


def test_a_row_clip_leaves_the_sensitivity_and_bounds_what_one_node_does_to_one_item() -> None:
    pushed = {"table": np.vstack([[30.0, 40.0], [0.3, 0.4]])}
    np.testing.assert_allclose(Clip(10.0, 1.0)(pushed)["table"], [[0.6, 0.8], [0.3, 0.4]], rtol=1e-6)
    assert Clip(10.0)(pushed)["table"][0, 0] > 5.9  # without it nearly all goes to that item
    total = private({"table": (2, 2)}, clip_norm=10.0, noise_multiplier=0.0, row_norm=1.0)
    total.add(pushed, users=3)  # a node that does not clip its rows
    assert np.linalg.norm(exact(total)[:2]) == pytest.approx(3.0)


@pytest.mark.parametrize(
    "mistake",
    [
        lambda contribution, bound: contribution,  # not clipped
        lambda contribution, bound: {name: clip({name: v}, bound)[name] for name, v in contribution.items()},
        lambda contribution, bound: {name: 10 * v for name, v in clip(contribution, bound).items()},  # weighted
    ],
)
def test_a_mistake_before_the_sum_breaks_that_bound_and_the_second_clip_mends_it(mistake: Callable[..., Any]) -> None:
    small, large = ({name: np.full(shape, v, np.float32) for name, shape in SHAPES.items()} for v in (0.01, 50.0))
    alone = private_sum([small], 1.0)
    assert np.linalg.norm(private_sum([small, large], 1.0, prepare=mistake, users=1000) - alone) > 1.1
    mended = private_sum([small, large], 1.0, prepare=mistake) - private_sum([small], 1.0, prepare=mistake)
    assert np.linalg.norm(mended) <= 1


@given(partial=people, users=st.integers(1, 1000), bound=bounds)
def test_a_nodes_sum_is_clipped_again_to_its_users_times_the_bound(
    partial: list[dict[str, Vector]], users: int, bound: float
) -> None:
    total = private(SHAPES, clip_norm=bound, noise_multiplier=0.0)
    total.add(partial[0], users=users)
    assert np.linalg.norm(exact(total)) <= users * bound


def test_an_honest_nodes_sum_is_not_touched_by_the_second_clip() -> None:
    total = private({"a": (2,)}, clip_norm=1.0, noise_multiplier=0.0)
    total.add({"a": np.array([3.0, 0.0], np.float32)}, users=3)
    total.add({"a": np.array([0.0, 3.0], np.float32)}, users=2)  # this one says more than two people can
    np.testing.assert_allclose(total.release(stream(0), None)["a"], [3.0, 2.0], rtol=1e-6)


GOOD: dict[str, Vector] = {name: np.ones(shape, np.float32) for name, shape in SHAPES.items()}


@pytest.mark.parametrize(
    "bad",
    [
        {},
        {**GOOD, "e": np.zeros(1, np.float32)},
        {name: v for name, v in GOOD.items() if name != "d"},  # even an empty array must be there
        {**GOOD, "a": np.ones(4, np.float32)},
        {**GOOD, "a": np.ones((3, 1), np.float32)},
        {**GOOD, "b": np.ones(1, np.float32)},
        {**GOOD, "a": np.ones(3, np.int64)},
        {**GOOD, "a": np.ones(3, np.complex64)},
        {**GOOD, "a": np.array(["1", "2", "3"])},
        {**GOOD, "a": np.array([1.0, None, 2.0], object)},
        {**GOOD, "a": np.array([1.0, np.nan, 2.0], np.float32)},
        {**GOOD, "b": np.array(np.inf, np.float32)},
        {**GOOD, "c": np.full((2, 2), -np.inf)},
        {**GOOD, "c": np.full((2, 2), 1e200)},  # finite, but its norm is not
    ],
)
def test_what_the_round_did_not_ask_for_is_refused_and_nothing_of_it_is_added(bad: dict[str, Vector]) -> None:
    check(GOOD, SHAPES)
    total = private(SHAPES, clip_norm=10.0, noise_multiplier=0.0)
    total.add(GOOD, users=1)
    with pytest.raises(MalformedContribution):
        total.add(bad, users=1)
    for name, values in total.release(stream(0), None).items():
        np.testing.assert_array_equal(values, GOOD[name])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_refused_before_anything_is_computed_from_it(bad: float) -> None:
    with pytest.raises(MalformedContribution, match="b: a value is not finite"):
        check({**GOOD, "b": np.array(bad, np.float32)}, SHAPES)


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, ">f4"])
def test_any_floating_point_type_may_be_sent(kind: npt.DTypeLike) -> None:
    total = private({"a": (2,)}, clip_norm=10.0, noise_multiplier=0.0)
    total.add({"a": np.array([1.5, -2.0], kind)}, users=1)
    np.testing.assert_array_equal(total.release(stream(0), None)["a"], [1.5, -2.0])


# ---------------------------------------------------------------------------------------------------------- noise


def variance_matches(sample: Vector, stddev: float) -> bool:
    """A two-sided χ² test of the variance about zero; a right one fails it once in 1 / FALSE_ALARM seeds."""
    at = float(stats.chi2.cdf(float(np.sum((sample / stddev) ** 2)), sample.size))
    return FALSE_ALARM / 2 < at < 1 - FALSE_ALARM / 2


def is_normal(sample: Vector, stddev: float) -> bool:
    """A Kolmogorov-Smirnov test against N(0, stddev²), with the same rate of false alarms."""
    return bool(stats.kstest(sample / stddev, "norm").pvalue > FALSE_ALARM)


def independent(a: Vector, b: Vector) -> bool:
    """Whether the correlation of two samples is that of independent ones; wrong once in 1 / FALSE_ALARM seeds."""
    together = float(np.corrcoef(a, b)[0, 1]) * math.sqrt(len(a))
    return bool(abs(together) < stats.norm.isf(FALSE_ALARM / 2))


def pure_noise(*key: int, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Vector]:
    """What a round that nobody answers releases, with C = 2 and σ = 1.5."""
    total = private(shapes, clip_norm=2.0, noise_multiplier=1.5)
    return dict(released(total, Noise(Streams(5).key("noise", *key)), charged(1.5)))


@pytest.mark.parametrize("name", ["flat", "table"])
def test_every_array_gets_noise_of_the_promised_scale_and_a_wrong_one_is_caught(name: str) -> None:
    noise = pure_noise(1, 0, shapes={"flat": (20_000,), "table": (100, 200), "scalar": ()})[name].ravel()
    assert variance_matches(noise, 3.0)
    assert is_normal(noise, 3.0)
    assert not variance_matches(noise, 2.7)  # 0.9 σ
    assert not variance_matches(noise, 3.3)
    assert not is_normal(noise, 2.7)
    assert not is_normal(noise, 3.3)


def test_a_single_number_gets_noise_of_the_promised_scale_too() -> None:
    noise = np.array([pure_noise(r, 0, shapes={"table": (4,), "scalar": ()})["scalar"] for r in range(4000)])
    assert variance_matches(noise, 3.0)
    assert is_normal(noise, 3.0)
    assert not variance_matches(noise, 2.7)
    assert not variance_matches(noise, 3.3)


def test_noise_of_another_shape_but_the_right_variance_is_caught() -> None:
    laplace = np.random.default_rng(0).laplace(scale=3 / math.sqrt(2), size=20_000)
    assert not is_normal(laplace, 3.0)


def test_noise_is_independent_between_arrays_rounds_and_attempts_and_a_reused_stream_is_caught() -> None:
    shapes = {"a": (20_000,), "b": (20_000,)}
    first, next_round, again = (pure_noise(*key, shapes=shapes) for key in ((1, 0), (2, 0), (1, 1)))
    assert independent(first["a"], first["b"])
    for other in (next_round, again):
        assert independent(first["a"], other["a"])
        assert independent(first["a"], other["b"])
        assert variance_matches(other["a"] - first["a"], 3.0 * math.sqrt(2))
    assert not independent(first["a"], pure_noise(1, 0, shapes=shapes)["a"])


def test_noise_does_not_depend_on_who_took_part() -> None:
    empty, full = (private({"a": (50,)}, clip_norm=2.0, noise_multiplier=1.5) for _ in range(2))
    full.add({"a": np.full(50, 0.25, np.float32)}, users=1)
    apart = released(full, stream(3), charged(1.5))["a"] - released(empty, stream(3), charged(1.5))["a"]
    np.testing.assert_allclose(apart, 0.25, atol=3 / 256)  # a step of the noise's grid
    grown = released(empty, stream(4), charged(1.5))["a"]
    assert np.abs(grown).max() < 5.5 * 3  # σC, whether one came or nobody


# -------------------------------------------------------------------------------------------------------- release


def test_a_noised_sum_is_not_released_without_the_receipt_of_its_own_noise() -> None:
    total = private({"a": (2,)}, clip_norm=1.0, noise_multiplier=2.0)
    noise = stream(0)
    with pytest.raises(InvalidConfig, match="receipt"):
        total.release(noise, None)
    with pytest.raises(InvalidConfig, match="receipt"):
        total.release(noise, charged(20.0))  # charged as ten times the noise that would be added
    assert total.release(noise, charged(2.0))["a"].shape == (2,)


def test_a_receipt_of_a_sampled_round_is_as_good() -> None:
    receipt = Ledger("test", delta=1e-5).charge(1, PoissonGaussian(noise_multiplier=2.0, rate=0.1))
    total = private({"a": (2,)}, clip_norm=1.0, noise_multiplier=2.0)
    assert np.abs(total.release(stream(0), receipt)["a"]).min() > 0


def test_a_sum_without_noise_has_no_receipt() -> None:
    total = private({"a": (2,)}, clip_norm=1.0, noise_multiplier=0.0)
    with pytest.raises(InvalidConfig, match="receipt"):
        total.release(stream(0), charged(1.0))
    np.testing.assert_array_equal(total.release(stream(0), None)["a"], [0, 0])


def test_a_receipt_is_good_for_one_release() -> None:
    total = private({"a": (2,)}, clip_norm=1.0, noise_multiplier=2.0)
    receipt = charged(2.0)
    total.release(stream(0), receipt)
    with pytest.raises(InvalidConfig, match="receipt"):  # the mean of two would have half the noise for one charge
        total.release(stream(1), receipt)
    with pytest.raises(InvalidConfig, match="receipt"):  # nor does it let another learner's sum out
        private({"b": (2,)}, clip_norm=1.0, noise_multiplier=2.0).release(stream(1), receipt)


@pytest.mark.parametrize(
    ("clip_norm", "noise_multiplier"),
    [(0.0, 1.0), (-1.0, 1.0), (math.nan, 1.0), (math.inf, 1.0), (1.0, -1.0), (1.0, math.nan), (1.0, math.inf)],
)
def test_a_sum_whose_noise_cannot_be_scaled_to_its_clip_is_refused(clip_norm: float, noise_multiplier: float) -> None:
    with pytest.raises(InvalidConfig):
        private({"a": (2,)}, clip_norm=clip_norm, noise_multiplier=noise_multiplier)


@settings(max_examples=20)
@given(order=st.permutations(["b", "a", "c"]))
def test_the_order_in_which_arrays_are_named_changes_nothing(order: list[str]) -> None:
    noisy = private(dict.fromkeys(order, (3,)), clip_norm=1.0, noise_multiplier=1.0).release(stream(7), charged(1.0))
    np.testing.assert_allclose([noisy[name] for name in "abc"], stream(7).normal((3, 3)), atol=1 / 256)


# ----------------------------------------------------------------------------------------------- quantile clipping

QUANTILE = QuantileClip(quantile=0.5, noise_multiplier=5.0)


def test_the_count_beside_a_sum_has_its_own_clip_and_noise_and_one_charge_covers_both() -> None:
    spec = SumSpec(name="sum", rounds=1, clip_norm=2.0, noise_multiplier=1.0, quantile=QUANTILE)
    assert spec.charged_multiplier == pytest.approx(1 / math.sqrt(1 + 1 / 25), rel=1e-12)
    counts = []
    for number in range(4000):
        total = PrivateSum({"a": (2,)}, spec)
        total.add({"a": np.zeros(2), WITHIN: np.array(40.0)}, users=3)  # three people cannot count as eighty
        counts.append(total.release(stream(number), charged(spec.charged_multiplier))[WITHIN] - 1.5)
    assert variance_matches(np.array(counts), 2.5)  # σ · ½
    assert not variance_matches(np.array(counts), 2.2)
    with pytest.raises(InvalidConfig, match="receipt"):  # the sum's own noise alone would be too cheap
        PrivateSum({"a": (2,)}, spec).release(stream(0), charged(1.0))


@pytest.mark.parametrize("start", [0.01, 0.3, 3.0, 100.0])
@pytest.mark.parametrize("quantile", [0.2, 0.5, 0.9])
def test_the_bound_converges_to_its_quantile_from_both_sides(start: float, quantile: float) -> None:
    # 200 people with norms 0.1 … 2: after 500 rounds the bound stays within 15 % of the quantile, in every round of the
    # last 40. (Flower 1.41's wrappers move away from it on both sides.)
    norms = np.linspace(0.1, 2.0, 200)
    target = float(np.quantile(norms, quantile))
    rule = QuantileClip(quantile=quantile, noise_multiplier=5.0)
    bound, seen = start, []
    for number in range(500):
        noisy = float(np.sum(norms <= bound) - 100 + stream(number).normal(()) * 2.5)
        bound = rule.next(bound, noisy, 200.0)
        seen.append(bound)
    assert np.abs(np.array(seen[-40:]) / target - 1).max() < 0.15
    wrong = start
    for _ in range(500):
        wrong *= math.exp(rule.step * ((norms <= wrong).mean() - quantile))  # the sign turned round
    assert abs(wrong / target - 1) > 0.9


def test_who_does_not_answer_counts_as_half_within() -> None:
    assert QUANTILE.next(1.0, 0.0, 100.0) == 1.0
    assert QUANTILE.next(1.0, -50.0, 100.0) == pytest.approx(math.exp(0.1))
    assert QUANTILE.next(1.0, 50.0, 100.0) == pytest.approx(math.exp(-0.1))
    assert QUANTILE.next(1.0, 1e9, 100.0) == QUANTILE.next(1.0, 50.0, 100.0)


def test_a_clip_counts_who_was_within_before_it() -> None:
    clips = Clip(1.0)
    for value in (0.5, 1.0, 1.5, 0.0):
        clips({"a": np.array([value])})
    assert (clips.n, clips.within) == (4, 3)


# ------------------------------------------------------------------------------------------ what mutants got past once


def test_noise_is_scaled_to_the_clip_of_the_round_and_not_to_the_plans_first() -> None:
    quantile = QuantileClip(quantile=0.5, noise_multiplier=5.0)
    spec = SumSpec(name="sum", rounds=1, clip_norm=2.0, noise_multiplier=1.5, quantile=quantile)
    moved = PrivateSum({"a": (20_000,)}, spec, clip_norm=6.0)
    noise = released(moved, stream(1), charged(spec.charged_multiplier))["a"]
    assert variance_matches(noise, 9.0)
    assert not variance_matches(noise, 3.0)


def test_what_a_node_sends_off_the_grid_is_cut_before_it_is_added() -> None:
    values = np.random.default_rng(0).uniform(-1, 1, 1000)
    sums = []
    for order in (values, values[::-1]):
        total = private({"a": ()}, clip_norm=1.0, noise_multiplier=1.0)
        for value in order:
            total.add({"a": np.array(value)}, users=1)
        sums.append(float(exact(total)[0]))
    assert sums[0] == sums[1] == float(on_grid(values, 1.0).sum())
    assert sum(values) != sum(values[::-1])  # as it would be without the grid
    assert sum(values.astype(np.float32)) != sum(values[::-1].astype(np.float32))  # and in single precision


def test_a_receipt_of_another_event_or_of_a_participation_is_refused() -> None:
    ledger, spec = Ledger("test", delta=1e-5), SumSpec(name="sum", rounds=1, clip_norm=1.0, noise_multiplier=2.0)
    event = Gaussian(noise_multiplier=2.0)
    cheap = PoissonGaussian(noise_multiplier=2.0, rate=1e-6)
    taken = ledger.participate(0, 1, 0, event)
    for receipt in (ledger.charge(1, cheap), taken):
        with pytest.raises(InvalidConfig, match="not of the charge"):
            PrivateSum({"a": (2,)}, spec, event=event).release(stream(0), receipt)
    PrivateSum({"a": (2,)}, spec, event=event).release(stream(0), ledger.charge(2, event))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e200])
def test_what_cannot_be_bounded_counts_as_zeros_and_is_counted(bad: float) -> None:
    clips = Clip(1.0)
    found = clips({"a": np.array([bad, 1.0]), "b": np.zeros((2, 3))})
    assert not any(values.any() for values in found.values())
    assert {name: values.shape for name, values in found.items()} == {"a": (2,), "b": (2, 3)}
    assert (clips.n, clips.within, clips.refused) == (1, 0, 1)


def test_one_more_of_many_alike_people_on_a_node_moves_the_sum_by_the_bound() -> None:
    # Their summed norm may round to above its bound; were it then scaled, the whole node's sum would jump.
    one = clip({"a": np.full(3, 1 / math.sqrt(3), np.float32)}, 1.0)["a"].astype(np.float64)
    for people in (2**20 - 1, 2**20, 2**24 - 1):
        pair = []
        for n in (people - 1, people):
            total = private({"a": (3,)}, clip_norm=1.0, noise_multiplier=1.0)
            total.add({"a": n * one}, users=people)
            pair.append(exact(total))
        assert np.linalg.norm(pair[1] - pair[0]) <= 1
