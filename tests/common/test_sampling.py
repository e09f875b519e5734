"""The sampler is what the ledger says: independent coins of users, or an even draw under a cap that claims nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from penchant.common.privacy.plan import PrivacyPlan, SumSpec, expected_cohort
from penchant.common.privacy.sampling import draw
from penchant.common.streams import Streams

FALSE_ALARM = 1e-6


def plan(sampling: str, n_users: int, cohort: int, rounds: int, cap: int | None = None) -> PrivacyPlan:
    """Sampling "fixed" is a cohort of fixed size, which promises nothing about users."""
    promised = sampling != "fixed"
    return PrivacyPlan(
        unit="user" if promised else "none",
        n_users=n_users,
        delta=1e-9,
        sampling=sampling if promised else "none",  # type: ignore[arg-type]  # from the parameters of a test
        cohort=cohort,
        sums=(SumSpec(name="update", rounds=rounds, clip_norm=1.0, noise_multiplier=1.0 if promised else 0.0),),
        max_participations=cap or rounds,
    )


def own_rounds(n_users: int, cap: int, rounds: int, schedule: int = 0) -> PrivacyPlan:
    """Each user in `cap` rounds of their own."""
    even = plan("none", n_users, expected_cohort(n_users, cap, rounds), rounds, cap)
    return replace(even, schedule=schedule)


def inclusions(p: PrivacyPlan, rounds: int, seed: int = 0) -> np.ndarray:
    """bool[rounds, n_users]: who was drawn in each."""
    counts, drawn = np.zeros(p.n_users, np.int64), np.zeros((rounds, p.n_users), bool)
    for number in range(rounds):
        drawn[number, draw(p, number + 1, 0, counts, Streams(seed))] = True
    np.testing.assert_array_equal(counts, drawn.sum(0))
    return drawn


def is_binomial(counts: np.ndarray, n: int, rate: float) -> bool:
    """χ² of independent counts that should be Binomial(n, rate), spread and mean; wrong once in 1 / FALSE_ALARM seeds.

    n · rate · (1 − rate) ≥ 50 in every use below, where the normal approximation moves that rate by less than half.
    """
    z = (counts - n * rate) / np.sqrt(n * rate * (1 - rate))
    spread = stats.chi2.cdf(float((z**2).sum()), len(z))
    mean = stats.norm.cdf(float(z.sum()) / np.sqrt(len(z)))
    return all(FALSE_ALARM / 4 < p < 1 - FALSE_ALARM / 4 for p in (spread, mean))


# -------------------------------------------------------------------------------------------------------- poisson


def test_poisson_draws_each_user_and_each_cohort_as_binomial_counts() -> None:
    drawn = inclusions(plan("poisson", 400, 80, 600), 600)
    assert is_binomial(drawn.sum(0), 600, 0.2)  # of each user over the rounds
    assert is_binomial(drawn.sum(1), 400, 0.2)  # of each round over the users: the cohort varies


def test_a_fixed_cohort_a_cap_or_another_rate_is_caught_by_the_same_test() -> None:
    fixed = inclusions(plan("fixed", 400, 80, 600), 600)
    assert not is_binomial(fixed.sum(1), 400, 0.2)  # always 80
    capped = inclusions(plan("fixed", 400, 80, 600, cap=120), 600)
    assert not is_binomial(capped.sum(0), 600, 0.2)  # always 120
    assert not is_binomial(inclusions(plan("poisson", 400, 84, 600), 600).sum(0), 600, 0.2)


def test_the_coins_of_two_users_and_of_two_rounds_are_independent() -> None:
    drawn = inclusions(plan("poisson", 400, 80, 600), 600)
    halves = drawn[:, :200].sum(1), drawn[:, 200:].sum(1)
    limit = stats.norm.isf(FALSE_ALARM / 2)
    assert abs(np.corrcoef(*halves)[0, 1]) * np.sqrt(600) < limit
    assert abs(np.corrcoef(drawn[:-1].ravel(), drawn[1:].ravel())[0, 1]) * np.sqrt(599 * 400) < limit
    by_node = np.repeat(drawn[:, ::4], 4, axis=1)  # one coin for each node of four users: the error to notice
    node_halves = by_node[:, :399:2].sum(1), by_node[:, 1::2].sum(1)
    assert abs(np.corrcoef(*node_halves)[0, 1]) * np.sqrt(600) > limit


def test_a_cohort_may_be_empty_and_is_not_topped_up() -> None:
    sizes = inclusions(plan("poisson", 50, 1, 300), 300).sum(1)
    assert sizes.min() == 0  # e⁻¹ of all rounds; that none of 300 is has probability 1e-58
    assert sizes.max() > 1


def test_poisson_has_no_memory_of_who_took_part() -> None:
    p = plan("poisson", 100, 50, 10)
    tired = np.arange(100, dtype=np.int64) * 10**6
    drawn = draw(p, 1, 0, tired.copy(), Streams(3))
    np.testing.assert_array_equal(drawn, draw(p, 1, 0, np.zeros(100, np.int64), Streams(3)))


def test_a_cohort_of_everybody_draws_everybody() -> None:
    for sampling in ("poisson", "none", "fixed"):
        assert inclusions(plan(sampling, 30, 30, 5), 5).all()


# ------------------------------------------------------------------------------------------- rounds of one's own


@settings(max_examples=50)
@given(data=st.data(), n_users=st.integers(1, 30), rounds=st.integers(1, 8), seed=st.integers(0, 99))
def test_without_sampling_everybody_takes_part_in_exactly_k_rounds(
    data: st.DataObject, n_users: int, rounds: int, seed: int
) -> None:
    cap = data.draw(st.integers(1, rounds))
    assert (inclusions(own_rounds(n_users, cap, rounds, seed), rounds).sum(0) == cap).all()


def test_with_a_smaller_cohort_everybody_tosses_coins_of_their_own_up_to_k() -> None:
    free = inclusions(plan("none", 400, 80, 600, cap=600), 600)
    assert is_binomial(free.sum(0), 600, 0.2)  # the cap never bites
    assert is_binomial(free.sum(1), 400, 0.2)
    capped = inclusions(plan("none", 400, 80, 600, cap=122), 600)
    assert capped.sum(0).max() == 122
    for user in range(400):  # the first 122 of the same coins
        np.testing.assert_array_equal(capped[:, user], free[:, user] & (np.cumsum(free[:, user]) <= 122))


def test_with_a_smaller_cohort_a_new_profile_changes_nobody_elses_coins() -> None:
    smaller, larger = (inclusions(plan("none", n, n // 10, 12, cap=6), 12) for n in (200, 400))
    np.testing.assert_array_equal(smaller, larger[:, :200])


def test_a_new_profile_changes_nobody_elses_rounds_and_with_a_fixed_cohort_it_would() -> None:
    smaller, larger = (inclusions(own_rounds(n, 3, 12), 12) for n in (200, 201))
    np.testing.assert_array_equal(smaller, larger[:, :200])
    smaller, larger = (inclusions(plan("fixed", n, 50, 12, cap=3), 12) for n in (200, 201))
    assert (smaller != larger[:, :200]).any()


def test_the_users_of_a_round_are_binomial_and_its_first_user_is_no_likelier_than_its_last() -> None:
    drawn = np.concatenate([inclusions(own_rounds(400, 1, 5, seed), 5)[:1] for seed in range(600)])
    assert is_binomial(drawn.sum(1), 400, 0.2)  # in one round users are independent
    assert is_binomial(drawn.sum(0), 600, 0.2)


def test_a_second_try_at_a_round_asks_the_same_users() -> None:
    p = own_rounds(50, 2, 6)
    one, two = (draw(p, 3, attempt, np.zeros(50, np.int64), Streams(0)) for attempt in (0, 1))
    np.testing.assert_array_equal(one, two)
    poisson = plan("poisson", 50, 25, 6)
    one, two = (draw(poisson, 3, attempt, np.zeros(50, np.int64), Streams(0)) for attempt in (0, 1))
    assert one.tolist() != two.tolist()


def test_rows_drawn_in_pieces_are_the_rows_drawn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = inclusions(own_rounds(40, 2, 5), 5)
    monkeypatch.setattr("penchant.common.privacy.sampling._ROWS", 7)
    np.testing.assert_array_equal(whole, inclusions(own_rounds(40, 2, 5), 5))


# ------------------------------------------------------------------------------------------------- a fixed cohort


@settings(max_examples=50)
@given(data=st.data(), n_users=st.integers(1, 30), rounds=st.integers(1, 8), seed=st.integers(0, 99))
def test_a_round_has_exactly_its_cohort_until_the_cap_leaves_fewer(
    data: st.DataObject, n_users: int, rounds: int, seed: int
) -> None:
    cohort, cap = data.draw(st.integers(1, n_users)), data.draw(st.integers(1, rounds))
    drawn = inclusions(plan("fixed", n_users, cohort, rounds, cap), rounds, seed)
    assert drawn.sum(0).max() <= cap
    free = n_users
    for number in range(rounds):
        assert drawn[number].sum() == min(cohort, free)
        free = int((drawn[: number + 1].sum(0) < cap).sum())


def test_every_user_with_room_is_drawn_equally_often() -> None:
    first = np.zeros(20, np.int64)
    for seed in range(4000):
        first[draw(plan("fixed", 20, 5, 1), 1, 0, np.zeros(20, np.int64), Streams(seed))] += 1
    assert is_binomial(first[:19:2], 4000, 0.25)  # half of the users: all of them together are tied to 20,000


def test_a_user_at_the_cap_is_never_drawn() -> None:
    counts = np.array([2, 0, 1, 2, 0], np.int64)
    drawn = draw(plan("fixed", 5, 5, 4, cap=2), 1, 0, counts, Streams(0))
    assert drawn.tolist() == [1, 2, 4]
    assert counts.tolist() == [2, 1, 2, 2, 1]
    assert draw(plan("fixed", 5, 5, 4, cap=1), 1, 0, counts, Streams(0)).tolist() == []


@pytest.mark.parametrize(
    "p", [plan("poisson", 1000, 100, 1), own_rounds(1000, 1, 10), plan("fixed", 1000, 100, 1)], ids=lambda p: p.unit
)
def test_a_draw_is_ascending_without_repeats_and_the_same_for_the_same_stream(p: PrivacyPlan) -> None:
    one, same, other = (draw(p, 1, 0, np.zeros(1000, np.int64), Streams(s)) for s in (0, 0, 1))
    assert one.dtype == np.int64
    assert (np.diff(one) > 0).all()
    np.testing.assert_array_equal(one, same)
    own = p.unit == "user" and p.sampling == "none"  # these rounds follow from the plan, whatever the stream
    assert (one.tolist() == other.tolist()) == own
    again = draw(replace(p, schedule=1), 1, 0, np.zeros(1000, np.int64), Streams(0))
    assert (one.tolist() != again.tolist()) == own


def test_coins_of_production_do_not_repeat_and_rounds_of_one_s_own_do() -> None:
    nobody = np.zeros(1000, np.int64)
    coins = [draw(plan("poisson", 1000, 500, 1), 1, 0, nobody.copy(), Streams.from_os()).tolist() for _ in range(2)]
    assert coins[0] != coins[1]
    own = [draw(own_rounds(1000, 1, 10), 1, 0, nobody.copy(), Streams.from_os()).tolist() for _ in range(2)]
    assert own[0] == own[1]
