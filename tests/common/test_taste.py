"""The user side: the closed form is the minimum it claims to be, and decay and popularity do what they say."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penchant.common import taste
from penchant.common.arrays import Float32, Float64
from penchant.common.errors import InvalidConfig
from penchant.common.interactions import History, Interactions
from penchant.common.taste import (
    FORGOTTEN,
    ItemSide,
    TasteConfig,
    Transitions,
    attribution,
    declared,
    posterior,
    scores,
    tastes,
    weights,
)

N_ITEMS, DIM = 12, 4
PLAIN = TasteConfig(decay=0.7, unseen=0.02, ridge=0.05)
VECTORS: Float32 = np.random.default_rng(0).standard_normal((N_ITEMS, DIM)).astype(np.float32)
POPULARITY: Float32 = np.random.default_rng(1).random(N_ITEMS).astype(np.float32)
HISTORIES = st.lists(st.integers(0, N_ITEMS - 1), min_size=1, max_size=15)
CONFIGS = st.builds(TasteConfig, decay=st.floats(0.1, 1), unseen=st.floats(0, 0.5), ridge=st.floats(1e-3, 2))


def people(*histories: list[int]) -> Interactions:
    return Interactions.of(histories, N_ITEMS)


def least_squares(history: list[int], config: TasteConfig) -> Float64:
    """The u that minimises  a Σᵢ (0 − fᵢ·u)² + Σⱼ oⱼ (1 − fⱼ·u)² + r ‖u‖²,  one equation to a row."""
    f = VECTORS.astype(np.float64)
    rows = [math.sqrt(config.unseen) * f[i] for i in range(N_ITEMS)]
    targets = [0.0] * N_ITEMS
    for age, item in enumerate(reversed(history)):
        weight = config.decay**age
        if weight < FORGOTTEN:
            continue
        rows.append(math.sqrt(weight) * f[item])
        targets.append(math.sqrt(weight))
    rows += list(math.sqrt(config.ridge) * np.eye(DIM))
    solution: Float64 = np.linalg.lstsq(np.array(rows), np.array(targets + [0.0] * DIM))[0]
    return solution


@given(history=HISTORIES, config=CONFIGS)
def test_a_taste_is_the_minimum_of_its_least_squares(history: list[int], config: TasteConfig) -> None:
    (found,) = tastes(VECTORS, people(history), config)
    np.testing.assert_allclose(found, least_squares(history, config), atol=1e-9)
    other = dataclasses.replace(config, ridge=config.ridge * 1.1)
    assert np.abs(found - least_squares(history, other)).max() > 1e-9


def test_the_most_recent_item_weighs_one_and_each_older_one_less_by_the_decay() -> None:
    f, u = VECTORS.astype(np.float64), tastes(VECTORS, people([3, 3, 8]), PLAIN)[0]
    base = PLAIN.unseen * f.T @ f + PLAIN.ridge * np.eye(DIM)
    for each, right in (((0.49, 0.7, 1.0), True), ((1.0, 0.7, 0.49), False), ((0.343, 0.49, 0.7), False)):
        own = f[[3, 3, 8]]
        solved = np.linalg.solve(base + own.T @ np.diag(each) @ own, np.array(each) @ own)
        assert np.allclose(u, solved, atol=1e-9) == right


@given(history=HISTORIES, data=st.data())
def test_a_decay_of_one_ignores_the_order(history: list[int], data: st.DataObject) -> None:
    shuffled = data.draw(st.permutations(history))
    same = dataclasses.replace(PLAIN, decay=1.0)
    one, two = tastes(VECTORS, people(history, shuffled), same)
    np.testing.assert_allclose(one, two, atol=1e-9)


def test_any_other_decay_sees_the_order() -> None:
    one, two = tastes(VECTORS, people([1, 5], [5, 1]), PLAIN)
    assert np.abs(one - two).max() > 0.01


def test_an_empty_history_has_no_taste_and_scores_are_popularity_alone() -> None:
    config = dataclasses.replace(PLAIN, popularity=0.3)
    histories = people([], [2])
    assert not tastes(VECTORS, histories, config)[0].any()
    np.testing.assert_allclose(scores(VECTORS, POPULARITY, histories, config)[0], 0.3 * POPULARITY, rtol=1e-6)
    assert tastes(VECTORS, histories, config)[1].any()


def test_a_score_is_the_product_with_the_taste_plus_weighted_popularity() -> None:
    config, histories = dataclasses.replace(PLAIN, popularity=0.3), people([1, 2], [4])
    found = scores(VECTORS, POPULARITY, histories, config)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, tastes(VECTORS, histories, config) @ VECTORS.T + 0.3 * POPULARITY, atol=1e-5)
    assert np.abs(scores(VECTORS, POPULARITY, histories, PLAIN) - found).max() > 0.01


@given(history=HISTORIES, weight=st.floats(0.01, 10), levels=st.lists(st.integers(0, 2), min_size=12, max_size=12))
def test_popularity_never_changes_the_order_of_equally_popular_items(
    history: list[int], weight: float, levels: list[int]
) -> None:
    popularity: Float32 = np.array([level / 2 for level in levels], np.float32)
    without = scores(VECTORS, popularity, people(history), PLAIN)[0]
    with_it = scores(VECTORS, popularity, people(history), dataclasses.replace(PLAIN, popularity=weight))[0]
    for level in set(levels):
        items = np.flatnonzero(popularity == np.float32(level / 2))
        ranked = with_it[items[np.argsort(-without[items], kind="stable")]]
        assert (np.diff(ranked) <= 1e-5).all()  # float32 may tie two neighbours, and no more


def test_popularity_does_change_the_order_of_others() -> None:
    popularity = np.eye(1, N_ITEMS, 7, dtype=np.float32)[0]
    plain = scores(VECTORS, popularity, people([1]), PLAIN)[0]
    assert plain.argmax() != 7
    assert scores(VECTORS, popularity, people([1]), dataclasses.replace(PLAIN, popularity=10.0))[0].argmax() == 7


def test_a_person_is_scored_alone_whoever_else_is_asked_about() -> None:
    together = tastes(VECTORS, people([1, 2], [], [9, 9, 4]), PLAIN)
    alone = np.vstack([tastes(VECTORS, people(h), PLAIN) for h in ([1, 2], [], [9, 9, 4])])
    np.testing.assert_array_equal(together, alone)
    assert not np.array_equal(together[0], together[2])


def test_a_catalogue_without_vectors_still_has_scores() -> None:
    none = np.zeros((N_ITEMS, 0), np.float32)
    config = dataclasses.replace(PLAIN, popularity=1.0)
    np.testing.assert_array_equal(scores(none, POPULARITY, people([1], []), config), np.tile(POPULARITY, (2, 1)))


def test_a_very_long_history_is_what_its_last_items_are() -> None:
    long = [i * i % N_ITEMS for i in range(20_000)]
    (found,) = tastes(VECTORS, people(long), PLAIN)
    np.testing.assert_allclose(found, least_squares(long[-100:], PLAIN), atol=1e-9)  # 0.7¹⁰⁰ < 1e-15
    assert np.abs(found - least_squares(long[-5:], PLAIN)).max() > 1e-9


@pytest.mark.parametrize("field", ["decay", "unseen", "ridge", "popularity"])
@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_a_setting_out_of_range_is_refused(field: str, value: float) -> None:
    with pytest.raises(InvalidConfig, match=field):
        TasteConfig(**{field: value})
    assert TasteConfig(**{field: 0.5})


FOLLOWS = Transitions(
    np.random.default_rng(2).standard_normal((N_ITEMS, 3)).astype(np.float32),
    np.random.default_rng(3).standard_normal((N_ITEMS, 3)).astype(np.float32),
)
PRIOR: Float64 = np.random.default_rng(4).standard_normal(DIM)
FULL = TasteConfig(decay=0.7, unseen=0.02, ridge=0.05, popularity=0.3, transition=0.2, transition_decay=0.5)


@given(history=st.lists(st.integers(0, N_ITEMS - 1), max_size=15), item=st.integers(0, N_ITEMS - 1))
def test_an_attribution_sums_to_the_score(history: list[int], item: int) -> None:
    terms = {"transitions": FOLLOWS, "prior": PRIOR}
    score = scores(VECTORS, POPULARITY, people(history), FULL, **terms)[0, item]  # type: ignore[arg-type]  # by name
    found = attribution(item, VECTORS, POPULARITY, History.of(history), FULL, **terms)  # type: ignore[arg-type]  # as above
    assert found.total == pytest.approx(float(score), abs=1e-4)
    assert found.past.shape == found.transition.shape == (len(history),)
    assert found.popularity == pytest.approx(0.3 * POPULARITY[item])
    assert found.total - found.prior != pytest.approx(float(score), abs=1e-6)  # no term is for show


def test_an_attribution_credits_whom_the_taste_came_from() -> None:
    apart = np.eye(N_ITEMS, dtype=np.float32)
    apart[1] = apart[0]  # items 0 and 1 are alike, all others are strangers
    found = attribution(1, apart, POPULARITY, History.of([5, 0, 7]), PLAIN)
    assert found.past.argmax() == 1
    np.testing.assert_allclose(found.past[[0, 2]], 0, atol=1e-9)


@given(history=HISTORIES, config=CONFIGS)
def test_a_posterior_mean_is_the_taste_and_its_variance_shrinks_with_each_interaction(
    history: list[int], config: TasteConfig
) -> None:
    found = posterior(VECTORS, History.of(history), config)
    np.testing.assert_allclose(found.mean, tastes(VECTORS, people(history), config)[0], atol=1e-7)
    variance = found.variance(VECTORS)
    direct = np.einsum("id,de,ie->i", VECTORS, np.linalg.inv(found.precision), VECTORS)
    np.testing.assert_allclose(variance, direct, rtol=1e-6)
    before = posterior(VECTORS, History.of([]), config).variance(VECTORS)
    assert (variance <= before * (1 + 1e-9)).all()
    assert variance[history[-1]] < before[history[-1]]


def test_a_posterior_is_bayes_rule_and_a_wrong_prior_shows() -> None:
    f, history = VECTORS.astype(np.float64), [3, 8, 8]
    precision = PLAIN.unseen * f.T @ f + PLAIN.ridge * np.eye(DIM)
    right, mean = precision @ PRIOR, PRIOR
    for step, item in enumerate(history):  # one at a time, each with what it weighs in the end
        weight = PLAIN.decay ** (len(history) - 1 - step)
        precision = precision + weight * np.outer(f[item], f[item])
        right = right + weight * f[item]
        mean = np.linalg.solve(precision, right)
    found = posterior(VECTORS, History.of(history), PLAIN, PRIOR)
    np.testing.assert_allclose(found.mean, mean, atol=1e-9)
    np.testing.assert_allclose(found.precision, precision, atol=1e-9)
    np.testing.assert_allclose(tastes(VECTORS, people(history), PLAIN, PRIOR)[0], mean, atol=1e-9)
    assert np.abs(posterior(VECTORS, History.of(history), PLAIN).mean - mean).max() > 1e-3


def test_an_empty_history_has_the_priors_taste() -> None:
    np.testing.assert_array_equal(tastes(VECTORS, people([], [2]), PLAIN, PRIOR)[0], PRIOR)
    np.testing.assert_allclose(posterior(VECTORS, History.of([]), PLAIN, PRIOR).mean, PRIOR, atol=1e-9)


def test_the_gram_matrix_is_the_same_in_blocks_as_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taste, "_BLOCK", 7)
    vectors = np.random.default_rng(0).standard_normal((20, 3)).astype(np.float32)
    for n in (0, 7, 20):
        f = vectors[:n].astype(np.float64)
        side = ItemSide(vectors[:n], np.zeros(n, np.float32), TasteConfig())
        np.testing.assert_allclose(side.gram, f.T @ f, rtol=1e-12)


def test_declared_topics_lead_to_items_that_have_them() -> None:
    content = np.zeros((6, 4), np.float32)
    content[[0, 1, 2], 2] = 1.0  # two topics, in columns of their own beside learned ones
    content[[3, 4], 3] = 1.0
    prior = declared(content, np.array([0, 0, 0, 1, 1, 0.0]), strength=0.5)
    got = scores(content, np.zeros(6, np.float32), Interactions.of([[]], 6), PLAIN, prior=prior)[0]
    np.testing.assert_allclose(got, [0, 0, 0, 0.5, 0.5, 0], atol=1e-6)
    assert not declared(content, np.zeros(6)).any()


def test_transitions_add_what_the_last_items_lead_to() -> None:
    history = [4, 9, 2]
    plain, led = (
        scores(VECTORS, POPULARITY, people(history), FULL, transitions=one)[0].astype(np.float64)
        for one in (None, FOLLOWS)
    )
    for ages, right in (((2, 1, 0), True), ((0, 1, 2), False)):
        left = sum(0.5**age * FOLLOWS.leave[item] for age, item in zip(ages, history, strict=True))
        assert np.allclose(led - plain, 0.2 * FOLLOWS.arrive @ left, atol=1e-5) == right


def test_what_is_forgotten_weighs_nothing_and_the_rest_its_decay() -> None:
    found = weights(100, 0.5)
    np.testing.assert_array_equal(found[-30:], 0.5 ** np.arange(29, -1, -1.0))
    assert not found[:70].any()
    long = np.random.default_rng(0).integers(0, N_ITEMS, 400).tolist()
    full = posterior(VECTORS, History.of(long), PLAIN)  # which looks at every weight
    np.testing.assert_allclose(tastes(VECTORS, people(long), PLAIN)[0], full.mean, atol=1e-7)


@pytest.mark.parametrize("field", ["transition", "transition_decay", "unseen", "popularity", "ridge", "decay"])
def test_each_setting_out_of_range_is_refused_by_name(field: str) -> None:
    with pytest.raises(InvalidConfig, match=field):
        TasteConfig(**{field: -0.1})
