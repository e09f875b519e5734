"""Baselines: against the plain formulas, both forms of EASE against each other, and fold-in of unknown people."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest

from penchant.common.arrays import Float64
from penchant.common.errors import InvalidConfig
from penchant.common.interactions import Interactions
from penchant.simulations.baselines import Ease, ItemKnn, Popularity
from penchant.simulations.evaluation import Scorer, evaluate


def random_people(n_users: int, n_items: int, mean: int, seed: int = 0) -> Interactions:
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.poisson(mean, n_users), 1, n_items)
    share = 1.0 / np.arange(2, n_items + 2)
    picks = [rng.choice(n_items, n, replace=False, p=share / share.sum()).tolist() for n in lengths]
    return Interactions.of(picks, n_items)


def dense(people: Interactions) -> Float64:
    x = np.zeros((people.n_users, people.n_items))
    x[people.rows, people.items] = 1.0
    return x


def padded(people: Interactions, n: int) -> Interactions:
    """The same data with n empty people more, which no Gram matrix can tell apart."""
    return Interactions.of([h.items.tolist() for h in people] + [[]] * n, people.n_items)


def test_popularity_counts_people_and_is_the_same_for_everybody() -> None:
    scores = Popularity(Interactions.of([[0, 2, 2], [2]], 4)).scores(Interactions.of([[], [1]], 4))
    assert scores.tolist() == [[1, 0, 2, 0]] * 2
    assert scores.dtype == np.float32


@pytest.mark.parametrize(("k", "shrink"), [(3, 0.0), (100, 2.0)])
def test_item_knn_is_the_plain_formula(k: int, shrink: float) -> None:
    train, held_out = random_people(30, 25, 6), random_people(10, 25, 4, seed=1)
    x = dense(train).astype(np.float32)  # rounded as the code rounds, so that equal similarities stay equal
    both = x.T @ x
    size = np.sqrt(np.diag(both))
    similar = both / np.maximum(size[:, None] * size + np.float32(shrink), 1e-12)
    np.fill_diagonal(similar, 0.0)
    uncut = dense(held_out) @ similar
    for j in range(25):
        similar[np.argsort(-similar[:, j], kind="stable")[k:], j] = 0.0
    out = ItemKnn(train, k=k, shrink=shrink).scores(held_out)
    assert out.dtype == np.float32
    np.testing.assert_allclose(out, dense(held_out) @ similar, atol=1e-5)
    assert (np.abs(out - uncut).max() > 0.1) == (k < 24)  # the cut tells


def test_item_knn_and_ease_of_a_large_catalogue_never_hold_items_by_items() -> None:
    n_items = 6000  # its square is 144 MB
    people = random_people(60, n_items, 20)
    for fit in (ItemKnn, Ease):
        tracemalloc.start()
        fit(people).scores(people.select([0, 1]))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert 1e6 < peak < 100e6


@pytest.mark.parametrize("l2", [0.5, 300.0])
@pytest.mark.parametrize("n_users", [20, 80])  # dual, primal
def test_ease_is_its_closed_form(l2: float, n_users: int) -> None:
    train, held_out = random_people(n_users, 50, 8), random_people(10, 50, 4, seed=1)
    x = dense(train)
    p = np.linalg.inv(x.T @ x + l2 * np.eye(50))
    b = np.eye(50) - p / np.diag(p)
    np.testing.assert_allclose(np.diag(b), 0.0, atol=1e-12)
    scores = Ease(train, l2=l2).scores(held_out)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, dense(held_out) @ b, atol=1e-4)
    wrong = Ease(train, l2=1.1 * l2).scores(held_out)
    assert np.abs(wrong - dense(held_out) @ b).max() > 1e-3


def test_primal_and_dual_ease_agree() -> None:
    train, held_out = random_people(150, 200, 25), random_people(20, 200, 10, seed=1)
    dual = Ease(train, l2=50.0).scores(held_out)
    primal = Ease(padded(train, 100), l2=50.0).scores(held_out)
    np.testing.assert_allclose(dual, primal, atol=1e-4)
    assert np.ptp(dual) > 0.1  # not all near zero


def test_ease_gives_an_item_no_score_for_being_in_the_history() -> None:
    for extra in (0, 100):
        alone = Ease(padded(random_people(30, 50, 8), extra)).scores(Interactions.of([[j] for j in range(50)], 50))
        np.testing.assert_allclose(np.diag(alone), 0.0, atol=1e-6)
        assert np.abs(alone).max() > 1e-3


@pytest.mark.parametrize("fit", [Popularity, ItemKnn, Ease])
def test_a_repeat_changes_nothing_and_an_unknown_person_is_scored(fit: Callable[[Interactions], Scorer]) -> None:
    train = random_people(30, 50, 8)
    once, twice = Interactions.of([[3, 7], []], 50), Interactions.of([[7, 3, 3], []], 50)
    repeated = Interactions.of([h.items.tolist() * 2 for h in train], 50)
    scores = fit(train).scores(once)
    assert scores.shape == (2, 50)
    assert np.isfinite(scores).all()
    np.testing.assert_array_equal(scores, fit(train).scores(twice))
    np.testing.assert_array_equal(scores, fit(repeated).scores(once))


def test_neighbours_and_ease_find_a_planted_taste_that_popularity_cannot() -> None:
    rng = np.random.default_rng(0)
    picks = [(rng.permutation(20)[:8] + 20 * (u % 5)).tolist() for u in range(100)]  # five groups of 20 items
    train = Interactions.of([p[:7] for p in picks[:80]], 100)
    history = Interactions.of([p[:7] for p in picks[80:]], 100)  # none of these people was in training
    targets = Interactions.of([p[7:] for p in picks[80:]], 100)

    def hr(scorer: Scorer) -> float:
        return evaluate(scorer, history, targets, popularity=train.counts(), ks=(13,)).overall["hr@13"]

    assert hr(ItemKnn(train)) == 1.0  # 13 of the group's 20 items are unseen
    assert hr(Ease(train, l2=10.0)) == 1.0
    assert hr(Popularity(train)) < 0.6


def test_options_out_of_range_are_refused() -> None:
    train = random_people(5, 6, 2)
    for l2 in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(InvalidConfig, match="l2"):
            Ease(train, l2=l2)
    with pytest.raises(InvalidConfig, match="ItemKnn"):
        ItemKnn(train, k=0)
    with pytest.raises(InvalidConfig, match="ItemKnn"):
        ItemKnn(train, shrink=-1.0)
