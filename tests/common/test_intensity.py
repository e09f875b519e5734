"""How strong an interest is: events to strengths, the person's model, its private item terms, its calibration."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from penchant.common.arrays import Arrays, Float32, Float64
from penchant.common.catalogue import Catalogue
from penchant.common.errors import InvalidConfig
from penchant.common.interactions import History
from penchant.common.interests import InterestProfile
from penchant.common.interests import strength as strengths_of
from penchant.common.interests.intensity import (
    RATING_MODEL,
    Calibration,
    Intensities,
    Intensity,
    IntensityConfig,
    ItemTerms,
    increasing,
    outcomes,
    probability,
)
from penchant.common.learners.contract import State
from penchant.common.learners.cooccurrence import CooccurrenceConfig
from penchant.common.learners.newcomers import RIDGE
from penchant.common.learners.strengths import Strengths, StrengthsConfig, automatic, split
from penchant.common.privacy import gaussian, sums
from penchant.common.privacy.sums import Clip
from penchant.common.streams import Streams
from penchant.common.taste import ItemSide, TasteConfig

N_ITEMS, DIM = 30, 5
_random = np.random.default_rng(3)
VECTORS: Float32 = _random.standard_normal((N_ITEMS, DIM)).astype(np.float32)
SIDE = ItemSide(VECTORS, np.ones(N_ITEMS, np.float32), TasteConfig(), content=2)
TERMS = ItemTerms(
    0.6, _random.normal(0, 0.1, N_ITEMS).astype(np.float32), _random.uniform(0, 0.01, N_ITEMS).astype(np.float32)
)
CONFIG = IntensityConfig(person=0.2, learned=0.15, content=0.05, scatter=0.2)
CATALOGUE = Catalogue(ids=tuple(f"i{k}" for k in range(N_ITEMS)), topics=tuple((f"t{k % 3}",) for k in range(N_ITEMS)))
ITEMS = [3, 12, 5, 12, 29]
STRENGTHS = [0.5, 0.9, 0.25, 1.0, 0.75]
HEAD = np.array([0, 3, 5, 7, 12, 29], np.int32)


def learner(**settings: float) -> Strengths:
    return Strengths(CATALOGUE, StrengthsConfig(start=CooccurrenceConfig(head=len(HEAD), dims=3), **settings))  # type: ignore[arg-type]  # fields by name


def begun(**more: np.ndarray) -> State:
    """A state of whom the strengths are asked."""
    return {
        "popularity": np.ones(N_ITEMS, np.float32),
        "head": HEAD,
        "floor": np.array(0.1, np.float32),
        "vectors": VECTORS[:, :3],
        **more,
    }


def history(items: list[int], values: list[float]) -> History:
    return replace(History.of(items), strengths=np.array(values, np.float32))


class TestStrength:
    def test_what_costs_a_person_more_says_more(self) -> None:
        order = ["hide", "skip", "view", "click", "watch", "save", "like", "share", "buy", "repeat"]
        found = [strengths_of.of_event(event) for event in order]
        assert found == sorted(set(found))
        assert found[0] == 0.0
        assert found[-1] == 1.0
        assert set(order) == set(strengths_of.EVENTS)

    def test_an_app_overrides_what_differs(self) -> None:
        table = {**strengths_of.EVENTS, "buy": 0.7, "tip": 0.95}
        assert [strengths_of.of_event(event, table) for event in ("buy", "tip", "click")] == [0.7, 0.95, 0.4]
        assert strengths_of.of_event("buy") == 0.9

    def test_an_unknown_event_is_refused_with_the_nearest(self) -> None:
        with pytest.raises(InvalidConfig, match="did you mean 'click'"):
            strengths_of.of_event("clik")
        for wrong in (1.2, -0.1, math.nan):
            with pytest.raises(InvalidConfig, match="in \\[0, 1\\]"):
                strengths_of.of_event("buy", {"buy": wrong})

    @pytest.mark.parametrize(
        ("of", "numbers"),
        [
            (strengths_of.of_rating, (6, 1, 5)),
            (strengths_of.of_rating, (math.nan, 1, 5)),
            (strengths_of.of_rating, (3, 5, 1)),
            (strengths_of.of_dwell, (-1, 10)),
            (strengths_of.of_dwell, (1, 0)),
            (strengths_of.of_count, (-1,)),
            (strengths_of.of_count, (1, 0)),
        ],
    )
    def test_numbers_outside_their_range_are_refused(
        self, of: Callable[..., float], numbers: tuple[float, ...]
    ) -> None:
        with pytest.raises(InvalidConfig):
            of(*numbers)

    @given(n=st.floats(0, 1e9), more=st.floats(0, 1e6))
    def test_more_is_never_weaker(self, n: float, more: float) -> None:
        for of in (strengths_of.of_count, lambda spent: strengths_of.of_dwell(spent, 3600.0)):
            assert 0 <= of(n) <= of(n + more) <= 1


class TestIntensities:
    def test_it_is_the_posterior_of_the_stated_model(self) -> None:
        # By conditioning the joint Gaussian of all strengths: another road than the normal equations.
        scale = np.array([0.15] * 3 + [0.05] * 2)
        features = VECTORS.astype(np.float64) * scale
        kernel = 0.2**2 + features @ features.T
        own = kernel[np.ix_(ITEMS, ITEMS)] + 0.2**2 * np.eye(len(ITEMS))
        expected = 0.6 + TERMS.terms.astype(np.float64)
        across = kernel[:, ITEMS]
        mean = expected + across @ np.linalg.solve(own, np.array(STRENGTHS) - expected[ITEMS])
        variance = np.diag(kernel - across @ np.linalg.solve(own, across.T)) + TERMS.variances
        found = Intensities(SIDE, TERMS, ITEMS, STRENGTHS, CONFIG).at(list(range(N_ITEMS)))
        np.testing.assert_allclose(found.mean, np.clip(mean, 0, 1), atol=1e-9)
        np.testing.assert_allclose(found.stddev, np.sqrt(variance), atol=1e-9)

    @pytest.mark.parametrize("items", [ITEMS, [12] * 5, sorted(set(ITEMS))])
    def test_own_strengths_are_expected_as_if_nothing_had_been_of_their_item(self, items: list[int]) -> None:
        values = STRENGTHS[: len(items)]
        found = Intensities(SIDE, TERMS, items, values, CONFIG).own()
        for left, item in enumerate(items):
            rest = [k for k in range(len(items)) if items[k] != item]
            without = Intensities(SIDE, TERMS, [items[k] for k in rest], [values[k] for k in rest], CONFIG)
            alone = without.at([item])
            assert found.mean[left] == pytest.approx(alone.mean[0], abs=1e-9)
            assert found.stddev[left] == pytest.approx(alone.stddev[0], abs=1e-9)
        assert not np.allclose(found.mean, Intensities(SIDE, TERMS, items, values, CONFIG).at(items).mean)

    def test_without_a_history_it_is_what_was_released(self) -> None:
        found = Intensities(SIDE, TERMS, [], [], CONFIG).at([0, 7])
        np.testing.assert_allclose(found.mean, 0.6 + TERMS.terms[[0, 7]], atol=1e-6)
        assert len(Intensities(SIDE, TERMS, [], [], CONFIG).own().mean) == 0

    def test_liking_an_item_lifts_those_like_it_and_makes_them_surer(self) -> None:
        side = ItemSide(np.eye(3, dtype=np.float32)[[0, 0, 1]], np.ones(3, np.float32), TasteConfig())
        flat = ItemTerms.flat(0.5, 3)
        config = replace(CONFIG, person=0.0)
        before, after = (Intensities(side, flat, items, [1.0] * len(items), config).at([1, 2]) for items in ([], [0]))
        assert after.mean[0] > before.mean[0] + 0.05
        assert after.stddev[0] < before.stddev[0]
        assert after.mean[1] == before.mean[1]
        assert after.stddev[1] == before.stddev[1]

    def test_without_vectors_it_is_the_rating_model(self) -> None:
        found = Intensities(SIDE, TERMS, ITEMS, STRENGTHS, RATING_MODEL).at([0])
        apart = np.array(STRENGTHS) - 0.6 - TERMS.terms[ITEMS]
        person = apart.sum() / (len(ITEMS) + RATING_MODEL.scatter**2 / RATING_MODEL.person**2)
        assert found.mean[0] == pytest.approx(0.6 + TERMS.terms[0] + person, abs=1e-6)

    def test_it_reads_a_profiles_own_history(self) -> None:
        profile = InterestProfile.of(SIDE, CATALOGUE, history(ITEMS, STRENGTHS))
        found, expected = Intensities.of(profile, TERMS), Intensities(SIDE, TERMS, ITEMS, STRENGTHS)
        np.testing.assert_allclose(found.at([1, 2]).mean, expected.at([1, 2]).mean, atol=1e-6)

    def test_its_probability_is_that_of_a_drawn_strength(self) -> None:
        found = Intensities(SIDE, TERMS, ITEMS, STRENGTHS, CONFIG).at([1])
        spread = math.hypot(float(found.stddev[0]), found.scatter)
        drawn = np.random.default_rng(0).normal(found.mean[0], spread, 40_000)  # s.e. ≤ 0.0025
        assert found.at_least(0.625)[0] == pytest.approx((drawn >= 0.625).mean(), abs=0.01)

    def test_what_does_not_belong_together_is_refused(self) -> None:
        for items, values in (([1, 2], [0.5]), ([1], [1.5]), ([1], [math.nan])):
            with pytest.raises(InvalidConfig):
                Intensities(SIDE, TERMS, items, values)
        with pytest.raises(InvalidConfig):
            Intensities(SIDE, ItemTerms.flat(0.5, N_ITEMS + 1), [1], [0.5])
        for name, wrong in (("person", -1.0), ("learned", math.nan), ("scatter", 0.0)):
            with pytest.raises(InvalidConfig, match=name):
                IntensityConfig(**{name: wrong})


class TestCalibration:
    @given(
        st.lists(st.tuples(st.floats(0, 1), st.floats(0.1, 10)), min_size=1, max_size=12),
    )
    def test_isotonic_regression_satisfies_its_optimality_conditions(self, pairs: list[tuple[float, float]]) -> None:
        # Robertson et al. 1988, theorem 1.3.2: partial sums of w(y − g) are ≥ 0 and end at 0, and each level is the
        # weighted mean of the values it replaces.
        values, weights = np.array(pairs).T
        found = increasing(values, weights)
        assert (np.diff(found) >= -1e-12).all()
        apart = np.cumsum(weights * (values - found))
        assert (apart >= -1e-9).all()
        assert abs(apart[-1]) < 1e-9
        for level in np.unique(found):
            at = np.isclose(found, level)
            assert np.average(values[at], weights=weights[at]) == pytest.approx(level, abs=1e-9)

    def test_a_table_keeps_every_strengths_mean(self) -> None:
        values = np.array([0.1, 0.4, 0.75, 1.0, 0.0])
        table = outcomes(np.array([0.0, 0.3, 0.31, 0.999, 1.0]), values, 4, 5)
        np.testing.assert_allclose(table.sum(axis=1), [1, 2, 0, 2])
        np.testing.assert_allclose((table @ np.linspace(0, 1, 5)), [0.1, 1.15, 0, 1.0])
        assert table[1, 3] == 1.0  # 0.75 is a level of its own

    def test_it_undoes_a_distortion_of_scores(self) -> None:
        random = np.random.default_rng(0)
        truth = random.random(20_000)
        strengths = (random.random(20_000) < truth).astype(float)
        found = Calibration(outcomes(truth**2, strengths, 20, 2))
        at = np.linspace(0.25, 0.95, 8)
        np.testing.assert_allclose(found.strength(at**2), at, atol=0.05)  # at least 500 a bin, s.e. ≤ 0.022
        np.testing.assert_allclose(found.at_least(0.75, at**2), at, atol=0.05)
        assert np.abs(at**2 - at).min() < 0.05 < 0.2 < np.abs(at**2 - at).max()

    def test_few_counts_or_much_noise_leave_a_score_as_it_was(self) -> None:
        at = np.array([0.125, 0.375, 0.625, 0.875])
        before = Intensity(at, np.zeros(4), 0.24).at_least(0.625)  # 0.75 less half a level
        table = np.tile([[10.0, 0, 0, 0, 30.0]], (4, 1))
        for far in (Calibration(np.zeros((4, 5))), Calibration(1e-6 * table), Calibration(table, stddev=1e4)):
            np.testing.assert_allclose(far.strength(at), at, atol=1e-4)
            np.testing.assert_allclose(far.at_least(0.75, at), before, atol=1e-4)
        sure = Calibration(1e6 * table)
        np.testing.assert_allclose(sure.strength(at), 0.75, atol=1e-4)
        np.testing.assert_allclose(sure.at_least(0.75, at), 0.75, atol=1e-4)

    def test_a_bin_is_weighed_against_its_prior_as_its_docstring_says(self) -> None:
        table, stddev = np.array([[10.0, 0.0, 30.0]]), 2.0
        kept = 0.06**2 / (0.06**2 + 0.24**2 / 40 + stddev**2 * (0.75**2 + 0.25**2 + 0.25**2) / 40**2)
        found = Calibration(table, stddev).strength(np.array([0.3]))[0]
        assert found == pytest.approx(0.5 + kept * 0.25)

    def test_a_table_of_noise_alone_stays_in_range_and_in_order(self) -> None:
        found = Calibration(np.random.default_rng(0).normal(0, 5, (20, 5)), stddev=5.0)
        for values in (found.strength(np.linspace(0, 1, 50)), found.at_least(0.75, np.linspace(0, 1, 50))):
            assert ((values >= 0) & (values <= 1)).all()
            assert (np.diff(values) >= 0).all()

    def test_a_long_own_history_outweighs_what_was_released_and_a_short_one_does_not(self) -> None:
        released = Calibration(np.tile([[50.0, 50.0]], (4, 1)))
        few, many = (released.with_own(np.full(n, 0.625), np.ones(n)).strength(np.array([0.625]))[0] for n in (2, 500))
        assert few < 0.6
        assert many > 0.95

    def test_the_probability_model_crosses_one_half_at_its_boundary(self) -> None:
        found = probability(np.array([0.0, 0.625, 1.0]))
        assert found[0] < 0.05
        assert found[1] == 0.5
        assert found[2] > 0.9


class TestPrivateSums:
    @given(
        pairs=st.lists(st.tuples(st.integers(0, N_ITEMS - 1), st.floats(0, 1, width=32)), max_size=40),
        asked=st.sampled_from(["strengths", "outcomes"]),
    )
    @example(pairs=[(int(k), 1.0) for k in HEAD], asked="strengths")
    @example(pairs=[(3, 0.0), (3, 1.0), (3, 0.0)], asked="strengths")
    def test_one_person_is_at_most_one_long(self, pairs: list[tuple[int, float]], asked: str) -> None:
        made = learner()
        terms = {} if asked == "strengths" else asked_of_terms(made)
        one = made.contribution(begun(**terms), history([i for i, _ in pairs], [y for _, y in pairs]), Streams(0))
        assert list(one) == [asked]
        assert sums.norm(one) <= 1.0
        known = pairs if asked == "outcomes" else [i for i, _ in pairs if i in HEAD]
        assert sums.norm(one) > 0.999 if known else sums.norm(one) == 0

    def test_a_corrupt_strength_takes_nothing_else_with_it(self) -> None:
        made = learner()
        for state in (begun(), begun(**asked_of_terms(made))):
            one = made.contribution(state, history([3, 5, 7], [0.5, math.nan, 7.0]), Streams(0))
            clean = made.contribution(state, history([3], [0.5]), Streams(0))
            assert all(np.array_equal(one[name], clean[name]) for name in clean)

    def test_a_device_sends_its_latest_strength_of_each_head_item(self) -> None:
        one = learner().contribution(begun(), history([3, 1, 7, 3], [0.0, 0.3, 0.5, 1.0]), Streams(0))["strengths"]
        raw = np.zeros((len(HEAD), 2))
        raw[1], raw[3] = (1, 1), (1, 0)
        np.testing.assert_allclose(one, raw / np.linalg.norm(raw), atol=1e-6)

    def test_exact_sums_give_weighted_means_and_noise_shrinks_them_as_bayes_says(self) -> None:
        random = np.random.default_rng(1)
        counts = random.uniform(1, 40, len(HEAD))
        likes = random.normal(0, 0.1, len(HEAD))
        offset = 0.1
        total: Arrays = {"strengths": np.stack([counts, 2 * counts * (offset + likes)], axis=1).astype(np.float32)}
        made = learner(shrink=0.0)
        exact = made.apply(begun(), total, 10.0)
        mean = np.average(offset + likes, weights=counts)
        assert float(exact["mean"]) == pytest.approx(0.5 + mean, abs=1e-6)
        np.testing.assert_allclose(exact["terms"][HEAD], offset + likes - mean, atol=1e-5)
        np.testing.assert_allclose(exact["variances"][HEAD], 0, atol=1e-6)
        rest = np.setdiff1d(np.arange(N_ITEMS), HEAD)
        np.testing.assert_allclose(exact["variances"][rest], 0.12**2, rtol=1e-6)
        sigma, spread = 2.0, 0.12
        noisy = learner(shrink=0.0, strengths_stddev=sigma).apply(begun(), total, 10.0)
        # r = b + noise of variance σ²(¼ + offset²)/C², b about what features say: the normal posterior of b
        noise, apart = sigma**2 * (0.25 + mean**2) / counts**2, offset + likes - mean
        kept = spread**2 / (spread**2 + noise)
        features = np.hstack([made.content, np.ones((N_ITEMS, 1))]).astype(np.float64)
        rows = np.vstack([np.sqrt(kept)[:, None] * features[HEAD], math.sqrt(RIDGE) * np.eye(features.shape[1])])
        right = np.concatenate([np.sqrt(kept) * apart, np.zeros(features.shape[1])])
        prior = features @ np.linalg.lstsq(rows, right, rcond=None)[0]
        precision = 1 / spread**2 + 1 / noise
        np.testing.assert_allclose(noisy["variances"][HEAD], 1 / precision, rtol=1e-4)
        expected = (prior[HEAD] / spread**2 + apart / noise) / precision
        np.testing.assert_allclose(noisy["terms"][HEAD], expected, atol=1e-5)
        np.testing.assert_allclose(noisy["terms"][rest], prior[rest], atol=1e-5)
        assert np.abs(noisy["terms"] - exact["terms"]).max() > 0.005

    def test_noise_alone_says_nothing(self) -> None:
        total: Arrays = {"strengths": np.array([[-3.0, 2.0]] * len(HEAD), np.float32)}
        found = learner(strengths_stddev=2.0).apply(begun(), total, 10.0)
        assert float(found["mean"]) == 0.5
        assert not found["terms"].any()

    def test_the_table_counts_each_strength_against_what_the_others_expect(self) -> None:
        made = learner()
        state = begun(**asked_of_terms(made))
        own = history([3, 5, 29], [0.25, 1.0, 0.75])
        person = Intensities(made.item_side(state), made.item_terms(state), own.items, own.strengths)
        raw = outcomes(person.own().mean, own.strengths, 20, 5)
        found = made.contribution(state, own, Streams(0))["outcomes"]
        np.testing.assert_allclose(found, raw / np.linalg.norm(raw), atol=1e-6)

    def test_the_sums_of_a_plan_cost_what_was_asked_for(self) -> None:
        mu = gaussian.mu_of(8.0, 1e-5)
        config, specs = automatic(943, mu)
        assert [spec.name for spec in specs][-2:] == ["strengths", "outcomes"]
        assert all(spec.clip_norm == 1.0 for spec in specs)
        assert sum(spec.noise_multiplier**-2 for spec in specs) == pytest.approx(mu**2)
        assert config.strengths_stddev == specs[-2].noise_multiplier
        assert config.outcomes_stddev == specs[-1].noise_multiplier
        assert all(spec.noise_multiplier == 0 for spec in automatic(943, math.inf)[1])
        with pytest.raises(InvalidConfig):
            split(1.0, 0.6, 0.4)

    def test_a_new_item_is_as_strong_as_its_content_and_as_unsure_as_one_that_nobody_spoke_of(self) -> None:
        ids, topics = ("new", *(f"i{k}" for k in range(300))), (("t1",), *((f"t{k % 3}",) for k in range(300)))
        before = Catalogue(ids=ids[1:], topics=topics[1:])
        terms = np.tile(np.array([-0.2, 0.2, 0.0], np.float32), 100)
        unsure = np.full(300, 0.001, np.float32)
        state = begun(
            mean=np.array(0.5, np.float32), terms=terms, variances=unsure, popularity=np.ones(300, np.float32)
        )
        state = {**state, "vectors": np.ones((300, 2), np.float32)}
        grown = Strengths(Catalogue(ids=ids, topics=topics), StrengthsConfig(start=CooccurrenceConfig(dims=2)))
        found = grown.item_terms(grown.adopt(state, before))
        np.testing.assert_array_equal(found.terms[1:], terms)
        assert found.terms[0] == pytest.approx(0.2, abs=0.05)  # pulled to the mean of all by the ridge
        assert found.variances[0] == pytest.approx(0.12**2)

    def test_a_clip_at_one_cuts_nobody(self) -> None:
        made, clip = learner(), Clip(1.0)
        people = [history(ITEMS, STRENGTHS), history([0, 5], [0.0, 1.0]), history([], [])]
        for one in people:
            clip(made.contribution(begun(), one, Streams(0)))
        assert clip.within == clip.n == 3


def asked_of_terms(made: Strengths) -> dict[str, np.ndarray]:
    """What the round of strengths adds to a state."""
    total: Float64 = np.stack([np.full(len(HEAD), 5.0), np.linspace(-3, 4, len(HEAD))], axis=1)
    after = made.apply(begun(), {"strengths": total}, 10.0)
    return {name: after[name] for name in ("mean", "terms", "variances")}
