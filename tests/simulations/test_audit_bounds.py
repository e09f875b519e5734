"""The lower bounds: below the truth as often as they promise, and equal to what can be worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from penchant.common.arrays import Float64
from penchant.common.errors import InvalidConfig
from penchant.common.privacy import gaussian
from penchant.simulations.audit.bounds import (
    MOST_EPSILON,
    auc,
    epsilon_lower,
    mu_lower,
    one_run,
    one_run_ceiling,
    tpr_at_fpr,
)

AUDITS = 1000
CONFIDENCE = 0.9
# Of 1,000 audits at 90 % at most 100 pass the truth in the mean; more than 155 do for a sound bound in fewer than 1 of
# 1e7 seeds (binomial tail 4e-8).
MOST_ALARMS = 155


def alarms(mu: float, truth: float, m: int = 200) -> tuple[int, int]:
    """How many of AUDITS lower bounds on Gaussian scores pass μ, and ε at δ = 1e-3."""
    rng = np.random.default_rng(5)
    thresholds = (mu / 2, 3.0)
    epsilon = gaussian.epsilon_of(truth, 1e-3)
    by_mu = by_epsilon = 0
    for _ in range(AUDITS):
        joined = rng.random(m) < 0.5
        scores = rng.normal(size=m) + mu * joined
        sides = scores[joined], scores[~joined]
        by_mu += mu_lower(*sides, CONFIDENCE, thresholds=thresholds) > truth
        by_epsilon += epsilon_lower(*sides, 1e-3, CONFIDENCE, thresholds=thresholds) > epsilon
    return by_mu, by_epsilon


@pytest.mark.parametrize("mu", [0.0, 0.3, 1.0, 3.0])
def test_bounds_on_gaussian_scores_pass_the_truth_no_more_often_than_they_promise(mu: float) -> None:
    assert max(alarms(mu, mu)) <= MOST_ALARMS


def test_a_mechanism_that_gives_more_than_its_mu_raises_more_alarms_than_chance_allows() -> None:
    assert alarms(2.0, 1.0, m=400)[0] > 900
    assert alarms(8.0, 1.0, m=400)[1] > 900  # one point of the errors' curve shows less of ε


# Golden values worked out by hand. With δ = 0 the bound is where the binomial's tail is 1 − confidence:
# 1 of 1: q = 0.75 at 0.25; 2 of 2: q² = 0.5625; 2 of 3: 3q² − 2q³ = 0.84375, all at q = ¾, ε = ln 3.
# With m = r = v = 2, δ = 0.01: f(0), f(1), f(2) = 1, 0.9375, 0.5625, the largest slope is 0.375 (i = 1) and
# 0.5625 + 2·2·0.01·0.375 = 0.5775. With m = 4 and two abstentions: 0.5625 + 2·4·0.01·0.375 = 0.5925.
@pytest.mark.parametrize(
    ("correct", "guesses", "m", "delta", "probability"),
    [
        (1, 1, 1, 0.0, 0.75),
        (2, 2, 2, 0.0, 0.5625),
        (2, 3, 3, 0.0, 0.84375),
        (2, 2, 2, 0.01, 0.5775),
        (2, 2, 4, 0.01, 0.5925),
    ],
)
def test_the_bound_of_one_run_is_the_one_worked_out_by_hand(
    correct: int, guesses: int, m: int, delta: float, probability: float
) -> None:
    assert one_run(correct, guesses, m, delta, 1 - probability) == pytest.approx(math.log(3), abs=1e-6)


def alarm_rate(m: int, guesses: int, delta: float, claimed_delta: float, epsilon: float, confidence: float) -> float:
    """The exact probability that `one_run` passes ε, for randomised response that shows each bit with probability δ.

    It is (ε, δ)-DP for each bit; the attacker guesses about what was shown first. Shown: K ~ Bin(m, δ); right: K and
    Bin(r − K, e^ε/(1 + e^ε)).
    """
    right = 1 / (1 + math.exp(-epsilon))
    passing = np.array([one_run(v, guesses, m, claimed_delta, confidence) > epsilon for v in range(guesses + 1)])
    total = 0.0
    for k in range(m + 1):
        shown = min(k, guesses)
        v = np.arange(guesses - shown + 1)
        share = stats.binom.pmf(v, guesses - shown, right)
        total += float(stats.binom.pmf(k, m, delta)) * float(share[passing[shown + v]].sum())
    return total


@pytest.mark.parametrize("epsilon", [0.0, 0.5, 2.0])
@pytest.mark.parametrize(("delta", "guesses"), [(0.0, 60), (0.0, 15), (0.02, 60), (0.02, 15)])
def test_the_bound_of_one_run_holds_for_randomised_response(epsilon: float, delta: float, guesses: int) -> None:
    # Not drawn but summed over all outcomes, so there is no false alarm.
    assert alarm_rate(60, guesses, delta, delta, epsilon, 0.95) <= 0.05 + 1e-9


def test_without_the_term_for_delta_the_bound_of_one_run_would_fail() -> None:
    assert alarm_rate(200, 20, 0.05, 0.0, 0.5, 0.95) > 0.4
    assert alarm_rate(200, 20, 0.05, 0.05, 0.5, 0.95) <= 0.05


@given(
    m=st.integers(1, 300),
    share=st.floats(0, 1),
    delta=st.sampled_from([0.0, 1e-9, 1e-5, 1e-2]),
    confidence=st.sampled_from([0.5, 0.95, 0.999]),
    data=st.data(),
)
def test_more_right_guesses_or_less_confidence_show_no_less_and_nothing_passes_the_ceiling(
    m: int, share: float, delta: float, confidence: float, data: st.DataObject
) -> None:
    guesses = math.ceil(share * m)
    correct = data.draw(st.integers(0, guesses))
    found = one_run(correct, guesses, m, delta, confidence)
    assert 0 <= found <= one_run_ceiling(guesses, m, delta, confidence) + 1e-6 < MOST_EPSILON
    assert found <= one_run(correct, guesses, m, delta, confidence / 2) + 1e-6
    assert found <= one_run(correct, guesses, m, delta / 2, confidence) + 1e-6
    if correct < guesses:
        assert found <= one_run(correct + 1, guesses, m, delta, confidence) + 1e-6


@given(
    scores=st.lists(st.floats(-5, 5), min_size=1, max_size=60),
    coins=st.integers(0),
    shift=st.floats(0, 5),
    confidence=st.sampled_from([0.5, 0.95, 0.999]),
)
def test_scores_further_apart_show_no_less_and_never_more_than_scores_wholly_apart(
    scores: list[float], coins: int, shift: float, confidence: float
) -> None:
    joined = np.array([coins >> i & 1 for i in range(len(scores))], bool)
    inside, outside = np.array(scores)[joined], np.array(scores)[~joined]
    apart = np.full(len(inside), 9.0), np.full(len(outside), -9.0)

    def by_epsilon(inside: Float64, outside: Float64, confidence: float, *, thresholds: tuple[float, ...]) -> float:
        return epsilon_lower(inside, outside, 1e-5, confidence, thresholds=thresholds)

    for lower in (mu_lower, by_epsilon):
        found = lower(inside, outside, confidence, thresholds=(0.0, 1.0))
        further = lower(inside + shift, outside, confidence, thresholds=(0.0, 1.0))
        assert 0 <= found <= further <= lower(*apart, confidence, thresholds=(0.0, 1.0)) < math.inf
        assert found <= lower(inside, outside, confidence / 2, thresholds=(0.0, 1.0))


def test_the_bound_on_mu_with_all_told_apart_is_the_one_worked_out_by_hand() -> None:
    # 100 on each side and no error: Clopper-Pearson at 1 − 0.05/2 is 1 − 0.025^(1/100) = 0.03621669;
    # Φ⁻¹(0.96378331) = 1.7963845 (statistics.NormalDist of Python 3.11), twice that.
    found = mu_lower(np.ones(100), -np.ones(100), 0.95)
    assert found == pytest.approx(2 * 1.7963845, abs=1e-6)
    # ln((1 − 0.01 − 0.03621669)/0.03621669)
    assert epsilon_lower(np.ones(100), -np.ones(100), 0.01, 0.95) == pytest.approx(3.270916, abs=1e-6)


def test_nothing_is_shown_where_there_is_nothing_to_see() -> None:
    nobody, some = np.zeros(0), np.array([1.0, 2.0])
    for inside, outside in ((nobody, some), (some, nobody), (nobody, nobody), (some, some), (-some, some)):
        assert mu_lower(inside, outside, 0.99) == epsilon_lower(inside, outside, 1e-5, 0.99) == 0.0
    assert one_run(0, 0, 10, 1e-5, 0.99) == one_run(0, 10, 10, 1e-5, 0.99) == one_run(0, 0, 0, 0.0, 0.99) == 0.0


def test_what_makes_no_sense_is_refused() -> None:
    one = np.ones(3)
    for confidence in (0.0, 1.0, math.nan):
        with pytest.raises(InvalidConfig):
            mu_lower(one, one, confidence)
        with pytest.raises(InvalidConfig):
            one_run(1, 2, 3, 0.0, confidence)
        with pytest.raises(InvalidConfig):
            tpr_at_fpr(one, one, confidence)
    with pytest.raises(InvalidConfig, match="threshold"):
        mu_lower(one, one, 0.9, thresholds=())
    with pytest.raises(InvalidConfig, match="numbers"):
        epsilon_lower(np.array([math.nan]), one, 1e-5, 0.9)
    for counts in ((3, 2, 4), (1, 5, 4), (-1, 2, 4)):
        with pytest.raises(InvalidConfig):
            one_run(*counts, 0.0, 0.9)
    with pytest.raises(InvalidConfig):
        one_run(1, 2, 3, 1.0, 0.9)
    with pytest.raises(InvalidConfig):
        tpr_at_fpr(np.zeros(0), one, 0.9)


@given(
    inside=st.lists(st.integers(0, 5), min_size=1, max_size=12),
    outside=st.lists(st.integers(0, 5), min_size=1, max_size=12),
)
def test_the_auc_is_the_share_of_pairs_in_the_right_order(inside: list[int], outside: list[int]) -> None:
    pairs = [1.0 if a > b else 0.5 if a == b else 0.0 for a in inside for b in outside]
    assert auc(np.array(inside, float), np.array(outside, float)) == pytest.approx(np.mean(pairs))


def test_the_auc_of_one_side_alone_is_a_half() -> None:
    assert auc(np.zeros(0), np.ones(3)) == 0.5


def test_a_true_positive_rate_is_read_where_few_enough_others_pass() -> None:
    others = np.arange(2000.0)  # two of them, 0.1 %, may pass: the threshold is 1997
    found = tpr_at_fpr(np.array([5000.0, 1998.0, 1997.0, 0.0]), others, 0.95)
    assert found.value == 0.5
    assert found.fpr == 0.001
    assert found.resolved
    tied = tpr_at_fpr(np.ones(4), np.ones(2000), 0.95)  # no threshold parts them
    assert (tied.value, tied.fpr) == (0.0, 0.0)


def test_a_rate_with_too_few_others_says_so_and_lets_none_of_them_pass() -> None:
    found = tpr_at_fpr(np.zeros(10), np.arange(999.0), 0.95)
    assert not found.resolved
    assert found.fpr == 0.0
    # Clopper and Pearson's interval of 0 in 10: 1 − 0.025^(1/10)
    assert (found.low, found.high) == pytest.approx((0.0, 0.308497), abs=1e-6)
    assert tpr_at_fpr(np.zeros(10), np.arange(1000.0), 0.95).resolved
