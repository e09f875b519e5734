"""What a list shows: exploration of a stated strength, and rules that hold for every length of list."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from penchant.common.arrays import Float32
from penchant.common.catalogue import Catalogue
from penchant.common.errors import InvalidConfig
from penchant.common.interactions import History
from penchant.common.interests import Greedy, InterestConfig, InterestProfile, Policy, Standing
from penchant.common.interests.exploration import (
    Diverse,
    EpsilonGreedy,
    HoldBack,
    LongTail,
    Thompson,
    UpperBound,
    head,
)
from penchant.common.taste import ItemSide, Posterior, TasteConfig

N_ITEMS, DIM = 60, 4
_random = np.random.default_rng(5)
VECTORS: Float32 = _random.standard_normal((N_ITEMS, DIM)).astype(np.float32)
_half = _random.standard_normal((DIM, DIM))
BELIEF = Posterior(_random.standard_normal(DIM), _half @ _half.T + 0.5 * np.eye(DIM))
HIDDEN = [4, 31]


def standing(vectors: Float32 = VECTORS, belief: Posterior = BELIEF) -> Standing:
    rest = np.linspace(0, 0.3, len(vectors), dtype=np.float32)
    scores = (vectors @ belief.mean.astype(np.float32) + rest).astype(np.float32)
    scores[HIDDEN] = -np.inf
    return Standing(vectors, belief, scores, rest)


STANDING = standing()


def ranked(policy: Policy, n: int, seed: int = 0, at: Standing = STANDING) -> list[int]:
    values = policy.values(at, np.random.default_rng(seed))
    found: list[int] = np.argsort(-values, kind="stable")[:n].tolist()
    return found


GREEDY = ranked(Greedy(), N_ITEMS - len(HIDDEN))


def every_policy() -> list[Policy]:
    some = Thompson(strength=0.5)
    return [
        Greedy(),
        some,
        UpperBound(strength=1.0, shortlist=20),
        EpsilonGreedy(chance=0.5),
        HoldBack(some),
        Diverse(some),
        LongTail(some, head=head(STANDING.rest), at_least=5),
    ]


@pytest.mark.parametrize("policy", every_policy(), ids=lambda policy: type(policy).__name__)
def test_no_policy_shows_what_must_not_be_shown_or_changes_what_is_known(policy: Policy) -> None:
    before = STANDING.scores.copy()
    for seed in range(20):
        values = policy.values(STANDING, np.random.default_rng(seed))
        assert values.shape == (N_ITEMS,)
        assert np.isneginf(values[HIDDEN]).all()
        assert np.isfinite(np.delete(values, HIDDEN)).all()
    np.testing.assert_array_equal(STANDING.scores, before)
    nothing = dataclasses.replace(STANDING, scores=np.full(N_ITEMS, -np.inf, np.float32))
    assert np.isneginf(policy.values(nothing, np.random.default_rng(0))).all()


@pytest.mark.parametrize(
    "policy",
    [
        Thompson(strength=0.0),
        UpperBound(strength=0.0),
        EpsilonGreedy(chance=0.0),
        HoldBack(Greedy()),
        Diverse(Greedy(), weight=0.0),
        LongTail(Greedy(), head=head(STANDING.rest), at_least=0),
    ],
    ids=lambda policy: type(policy).__name__,
)
def test_strength_zero_is_the_greedy_list(policy: Policy) -> None:
    assert ranked(policy, 20) == GREEDY[:20]


def test_a_thompson_list_is_one_taste_drawn_with_the_stated_covariance() -> None:
    at, draws = np.delete(np.arange(N_ITEMS), HIDDEN), []
    for seed in range(4000):
        moved = Thompson(strength=0.25).values(STANDING, np.random.default_rng(seed))[at] - STANDING.scores[at]
        taste, left, *_ = np.linalg.lstsq(VECTORS[at].astype(np.float64), moved.astype(np.float64), rcond=None)
        assert left < 1e-9  # every item moved by the same taste
        draws.append(taste)
    # each entry's standard error is at most √2 σ² / √4000 = 2.3 % of the largest variance; 6 of them
    expected = 0.25 * np.linalg.inv(BELIEF.precision)
    error = np.abs(np.cov(np.array(draws).T) - expected).max() / np.diag(expected).max()
    assert error < 0.14
    assert np.abs(np.cov(np.array(draws).T) - 2 * expected).max() / np.diag(expected).max() > 0.14


def test_the_upper_bound_adds_standard_deviations_and_its_shortlist_misses_little() -> None:
    deviation = np.sqrt(np.einsum("ij,jk,ik->i", VECTORS, np.linalg.inv(BELIEF.precision), VECTORS))
    exact = STANDING.scores + 0.7 * deviation
    found = UpperBound(strength=0.7).values(STANDING, np.random.default_rng(0))
    np.testing.assert_allclose(found, exact, rtol=1e-5)
    wide = np.random.default_rng(1).standard_normal((3000, DIM)).astype(np.float32)
    big = standing(wide)
    full, short = (UpperBound(strength=0.7, shortlist=n) for n in (3000, 100))
    assert len(set(ranked(full, 10, at=big)) & set(ranked(short, 10, at=big))) >= 9


def test_an_uncertain_item_far_from_the_best_reaches_the_shortlist() -> None:
    vectors = np.zeros((500, DIM), np.float32)
    vectors[:, 0] = np.linspace(1, 2, 500)
    vectors[100] = [0, 0, 0, 3]  # score 0 of the mean, the only one in a direction nobody tried
    belief = Posterior(np.array([1.0, 0, 0, 0]), np.diag([100.0, 100.0, 100.0, 0.1]))
    at = dataclasses.replace(standing(vectors, belief), rest=np.zeros(500, np.float32))
    assert ranked(UpperBound(strength=1.0, shortlist=10), 1, at=at) == [100]
    assert 100 not in ranked(Greedy(), 400, at=at)


def test_epsilon_greedy_propensities_are_how_often_lists_come_up() -> None:
    policy, at = EpsilonGreedy(chance=0.6), standing(VECTORS[:32])
    at.scores[4:] = -np.inf  # four items are left: 24 lists
    lists = Counter(tuple(ranked(policy, 4, seed, at)) for seed in range(12_000))
    chances = {one: float(np.prod(policy.propensities(at, one))) for one in lists}
    assert len(lists) == 24
    assert sum(chances.values()) == pytest.approx(1.0)
    for one, chance in chances.items():
        # 6 standard errors of a share
        assert abs(lists[one] / 12_000 - chance) < 6 * np.sqrt(chance * (1 - chance) / 12_000)
    assert policy.propensities(at, [GREEDY[-1], 31]).tolist()[1] == 0.0  # hidden: never


def test_epsilon_greedy_with_chance_one_ignores_the_scores() -> None:
    first = Counter(ranked(EpsilonGreedy(chance=1.0), 1, seed)[0] for seed in range(3000))
    assert set(first) == set(GREEDY)
    assert max(first.values()) < 110  # 52 expected, 8 standard errors


def test_what_was_shown_is_held_back_for_so_many_lists_and_then_comes_again() -> None:
    policy = HoldBack(Greedy(), lists=2)
    lists = []
    for _ in range(4):
        lists.append(ranked(policy, 5))
        policy.shown(lists[-1])
    assert lists == [GREEDY[:5], GREEDY[5:10], GREEDY[10:15], GREEDY[:5]]
    few = dataclasses.replace(
        STANDING, scores=np.where(np.isin(np.arange(N_ITEMS), GREEDY[:7]), STANDING.scores, -np.inf)
    )
    assert ranked(HoldBack(Greedy(), lists=0), 5, at=few) == GREEDY[:5]
    assert set(ranked(policy, 2, at=few)) == set(GREEDY[5:7])  # all others of the seven were just shown


def likeness(items: list[int]) -> float:
    f = VECTORS[items] / np.linalg.norm(VECTORS[items], axis=1, keepdims=True)
    return float((f @ f.T)[np.triu_indices(len(items), 1)].mean())


def test_mmr_is_that_of_its_definition_and_a_heavier_weight_makes_lists_more_unlike() -> None:
    near, weight = GREEDY[:30], 0.5
    worth = STANDING.scores[near].astype(np.float64)
    worth = (worth - worth.min()) / (worth.max() - worth.min())
    f = VECTORS[near] / np.linalg.norm(VECTORS[near], axis=1, keepdims=True)
    chosen: list[int] = []
    for _ in range(10):
        left = [k for k in range(30) if k not in chosen]
        chosen.append(
            max(left, key=lambda k: (1 - weight) * worth[k] - weight * max((f[k] @ f[c] for c in chosen), default=0.0))
        )
    assert ranked(Diverse(Greedy(), weight=weight, shortlist=30), 10) == [near[k] for k in chosen]
    spread = [likeness(ranked(Diverse(Greedy(), weight=w), 10)) for w in (0.0, 0.3, 0.6, 0.9)]
    assert spread == sorted(spread, reverse=True)
    assert spread[0] > spread[-1] + 0.2


def test_a_list_of_any_length_keeps_the_floor_of_the_tail_and_is_else_the_policys_own() -> None:
    few = np.ones(N_ITEMS, np.bool_)
    few[[GREEDY[-1], GREEDY[-2], GREEDY[-3]]] = False  # the tail is what greedy would show last
    found = ranked(LongTail(Greedy(), head=few, at_least=3, of=10), 20)
    for p in range(1, 21):
        assert (~few[found[:p]]).sum() == min(3 * p // 10, 3)
    assert [item for item in found if few[item]] == GREEDY[:17]
    assert [item for item in found if not few[item]] == [GREEDY[-3], GREEDY[-2], GREEDY[-1]]
    easy = np.zeros(N_ITEMS, np.bool_)
    assert ranked(LongTail(Greedy(), head=easy), 20) == GREEDY[:20]  # where all is tail it changes nothing
    with pytest.raises(InvalidConfig, match="head has 3 items, the catalogue 60"):
        LongTail(Greedy(), head=np.ones(3, np.bool_)).values(STANDING, np.random.default_rng(0))


def test_rules_hold_together() -> None:
    held = HoldBack(Thompson(strength=0.3), lists=1)
    popular = head(STANDING.rest, 0.5)
    policy = LongTail(Diverse(held, weight=0.4), head=popular, at_least=4, of=10)
    before: list[int] = []
    for seed in range(5):
        found = ranked(policy, 10, seed)
        assert (~popular[found]).sum() >= 4
        assert not set(found) & set(before)
        held.shown(before := found)


def test_a_profile_shows_what_a_policy_chose_and_says_what_is_there_to_learn_from() -> None:
    side = ItemSide(VECTORS, np.zeros(N_ITEMS, np.float32), TasteConfig())
    profile = InterestProfile.of(
        side, Catalogue(ids=tuple(f"i{k}" for k in range(N_ITEMS))), History.of([3, 9, 12]), InterestConfig()
    )
    best = {one.item for one in profile.recommend(10)}
    shown = profile.recommend(10, policy=Thompson(strength=0.3), random=np.random.default_rng(1))
    again = profile.recommend(10, policy=Thompson(strength=0.3), random=np.random.default_rng(1))
    assert shown == again
    assert {one.item for one in shown if not one.explored} == {one.item for one in shown} & best
    assert any(one.explored for one in shown)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Thompson(strength=1.5), r"strength must be in \[0, 1\], not 1.5"),
        (lambda: Thompson(strength=0.3, most=0.2), r"strength must be in \[0, 0.2\], not 0.3"),
        (lambda: Thompson(most=float("inf")), "most must be finite"),
        (lambda: UpperBound(strength=float("nan")), "strength must be in"),
        (lambda: UpperBound(shortlist=0), "shortlist must be at least 1"),
        (lambda: EpsilonGreedy(chance=-0.1), "chance must be in"),
        (lambda: EpsilonGreedy(most=2.0), "most must be finite and in"),
        (lambda: Diverse(Greedy(), weight=1.1), "weight must be in"),
        (lambda: LongTail(Greedy(), head=head(STANDING.rest), at_least=11), "at_least must be from 0 to 10"),
        (lambda: HoldBack(Greedy(), lists=-1), "lists must be at least 0"),
        (lambda: head(STANDING.rest, 1.2), "share must be in"),
    ],
)
def test_what_goes_beyond_its_bounds_is_refused(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(InvalidConfig, match=words):
        make()
