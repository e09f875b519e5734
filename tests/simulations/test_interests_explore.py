"""Exploration on people whose taste is known: the evaluation's own arithmetic, and that exploring pays where it can."""

from __future__ import annotations

import numpy as np
import pytest

from penchant.common.errors import InvalidConfig
from penchant.common.interests import Greedy, InterestProfile
from penchant.common.interests.exploration import EpsilonGreedy, HoldBack, Policy, Thompson, UpperBound
from penchant.common.streams import Streams
from penchant.simulations.evaluation import paired_difference
from penchant.simulations.interests import explore, offpolicy
from penchant.simulations.interests.explore import HELD, LIST, MEMORIES, World, walk

CONFIG = MEMORIES[1]


@pytest.fixture(scope="module")
def world() -> World:
    return World.of(30, seed=7, items=300)


def test_a_new_interest_is_unknown_to_the_histories_and_then_the_strongest(world: World) -> None:
    truth, at = world.data.truth, np.arange(30)
    own = truth.start[at, world.topic] / truth.start.max(axis=1)
    assert own.max() < 0.02
    gained = world.likes[1] - world.likes[0]
    belongs = truth.memberships[:, world.topic].T > 0
    assert (gained[belongs] > 0.2).all()
    assert np.abs(gained[~belongs]).max() < 1e-6
    assert 0.05 <= world.likes.min() < world.likes.max() <= 0.95
    assert (world.likes[1].argmax(axis=1) == (world.likes[1] * world.of_it[world.topic]).argmax(axis=1)).all()


@pytest.mark.parametrize(
    "policy",
    [Greedy(), Thompson(strength=0.05), UpperBound(strength=0.3, shortlist=40), EpsilonGreedy(chance=0.3)],
    ids=lambda policy: type(policy).__name__,
)
def test_many_people_at_once_are_shown_what_each_ones_own_profile_would_show(world: World, policy: Policy) -> None:
    steps, u = 12, 4
    found = walk(world, policy, CONFIG, steps=steps, ignored=0.3, seed=3)
    data, streams = world.data, Streams(3).child("walk")
    profile = InterestProfile.of(world.side, data.catalogue, data.interactions.history(u), CONFIG)
    luck, own, held = streams.get("luck"), streams.get("policy", u), HoldBack(policy, lists=HELD)
    for step in range(steps):
        shown = [one.position for one in profile.recommend(LIST, policy=held, random=own)]
        assert shown == found.lists[u, step].tolist()
        held.shown(shown)
        likes = world.likes[int(step >= round(explore.PLANTED * steps)), u]
        taken = luck.random((30, LIST))[u] < likes[shown]
        assert found.expected[u, step] == pytest.approx(likes[shown].sum())
        for item, yes in zip(shown, taken.tolist(), strict=True):
            profile.update(item, strength=float(yes), weight=1.0 if yes else 0.3)


def test_nothing_does_better_than_the_oracle_and_nothing_shown_comes_again_too_soon(world: World) -> None:
    oracle = walk(world, None, CONFIG, steps=30, ignored=0.0, seed=1)
    for policy in (Greedy(), Thompson(strength=0.05)):
        found = walk(world, policy, CONFIG, steps=30, ignored=0.3, seed=1)
        assert (found.expected.sum(axis=1) <= oracle.expected.sum(axis=1) + 1e-9).all()
        for step in range(30):
            last = found.lists[:, max(0, step - HELD) : step + 1].reshape(30, -1)
            assert all(len(set(row)) == len(row) for row in last.tolist())
    assert (oracle.found <= 3).all()  # it shows the new interest at once; only luck delays the first that is taken


def test_exploring_finds_a_planted_interest_sooner_than_greedy() -> None:
    some = World.of(40, seed=21, items=600)
    greedy, drawn = (
        walk(some, policy, CONFIG, steps=80, ignored=0.3, seed=2).found.astype(np.float64)
        for policy in (Greedy(), Thompson(strength=0.1))
    )
    assert paired_difference(drawn, greedy, seed=0).high < 0


def test_a_walk_is_the_same_again_and_another_seed_is_other_luck(world: World) -> None:
    first, again, other = (walk(world, Thompson(), CONFIG, steps=8, ignored=0.3, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.lists, again.lists)
    assert (first.lists != other.lists).any()


# ----------------------------------------------------------------------------------------------------- off-policy


def log_of(n: int, seed: int) -> tuple[np.ndarray, ...]:
    """A log of two items whose target would show the other one more; the predictions are wrong on purpose."""
    random = np.random.default_rng(seed)
    logging, target, liked = np.array([0.8, 0.2]), np.array([0.3, 0.7]), np.array([0.2, 0.6])
    shown = (random.random(n) < logging[1]).astype(int)
    rewards = (random.random(n) < liked[shown]).astype(np.float64)
    wrong = np.array([0.5, 0.5])
    return rewards, logging[shown], target[shown], wrong[shown], np.full(n, target @ wrong)


def test_estimates_from_a_log_are_unbiased_and_the_logs_own_mean_is_not() -> None:
    truth = 0.3 * 0.2 + 0.7 * 0.6
    logs = [log_of(400, seed) for seed in range(400)]
    for estimate in (
        [offpolicy.ips(*log[:3]) for log in logs],
        [offpolicy.doubly_robust(*log) for log in logs],
        [offpolicy.snips(*log[:3]) for log in logs],  # its bias, of order 1/400, is far below this error
    ):
        assert abs(np.mean(estimate) - truth) < 4 * np.std(estimate) / np.sqrt(400) < 0.02
    assert abs(np.mean([log[0].mean() for log in logs]) - truth) > 0.15


def test_right_predictions_make_the_doubly_robust_estimate_vary_less() -> None:
    liked, target = np.array([0.2, 0.6]), np.array([0.3, 0.7])
    plain, robust = [], []
    for seed in range(200):
        rewards, logged, other, _, _ = log_of(300, seed)
        right = np.where(other == target[1], liked[1], liked[0])
        plain.append(offpolicy.ips(rewards, logged, other))
        robust.append(offpolicy.doubly_robust(rewards, logged, other, right, np.full(300, target @ liked)))
    assert np.std(robust) < 0.9 * np.std(plain)


def test_a_log_of_what_had_no_chance_is_refused_and_one_the_target_never_shows_has_no_snips() -> None:
    one, zero = np.ones(3), np.zeros(3)
    with pytest.raises(InvalidConfig, match="every logged propensity must be positive"):
        offpolicy.ips(one, zero, one)
    assert np.isnan(offpolicy.snips(one, one, zero))
    assert offpolicy.ips(one, one, zero) == 0.0


def test_monte_carlo_chances_are_those_that_epsilon_greedy_states(world: World) -> None:
    side, data = world.side, world.data
    standing = InterestProfile.of(side, data.catalogue, data.interactions.history(0), CONFIG).standing()
    policy = EpsilonGreedy(chance=0.4, places=1)
    found = offpolicy.chances(policy, standing, 3000, np.random.default_rng(0))
    best = int(np.argmax(standing.scores))
    assert found[best] == pytest.approx(policy.propensities(standing, [best])[0], abs=0.055)  # 6 standard errors


def test_the_table_compares_every_policy_with_greedy_and_says_what_the_log_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(explore, "ITEMS", 120)
    monkeypatch.setattr(explore, "COMPARED", {0.3: explore.COMPARED[0.3]})
    monkeypatch.setattr(explore, "MEMORIES", MEMORIES[:1])
    monkeypatch.setattr(explore, "STRENGTHS", {name: some[:1] for name, some in explore.STRENGTHS.items()})
    found = explore.table(people=4, seeds=2, steps=8)
    assert [row[0] for row in found.rows] == [
        f"{name}, ignored 0.3" for name in ("greedy", "ε-greedy", "UCB", "Thompson", "Thompson, MMR, tail")
    ]
    assert all(len(row) == len(found.columns) for row in found.rows)
    assert all("[" in row[4] for row in found.rows[1:])
    assert "4 people × 2 seeds" in found.notes[0]
    assert "doubly robust" in found.notes[-1]
