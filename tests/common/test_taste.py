"""The user side: the closed form is the minimum it claims to be, and decay and popularity do what they say."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penchant.common.arrays import Float32, Float64
from penchant.common.errors import InvalidConfig
from penchant.common.interactions import Interactions
from penchant.common.taste import TasteConfig, scores, tastes

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
    for weights, right in (((0.49, 0.7, 1.0), True), ((1.0, 0.7, 0.49), False), ((0.343, 0.49, 0.7), False)):
        own = f[[3, 3, 8]]
        solved = np.linalg.solve(base + own.T @ np.diag(weights) @ own, np.array(weights) @ own)
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
