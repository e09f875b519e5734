"""The closed form of the Gaussian mechanism: golden values, both directions agree, and no input makes it lie."""

from __future__ import annotations

import math

import pytest
from dp_accounting.pld import privacy_loss_mechanism
from hypothesis import example, given
from hypothesis import strategies as st

from penchant.common.errors import InvalidConfig
from penchant.common.privacy.gaussian import delta_of, epsilon_of, mu_of

epsilons = st.floats(1e-3, 1e4)
deltas = st.floats(1e-12, 0.5)


@pytest.mark.parametrize(
    ("mu", "epsilon"),
    # dp-accounting 0.6.0, δ = 1e-5: GaussianDpEvent(1/μ) in PLDAccountant.
    [(0.1, 0.34067), (0.5, 1.99309), (1.0, 4.37718), (3.0, 16.6755), (10.0, 91.8173)],
)
def test_epsilon_matches_golden_values_and_they_would_notice_one_percent(mu: float, epsilon: float) -> None:
    assert epsilon_of(mu, 1e-5) == pytest.approx(epsilon, rel=1e-5)
    assert epsilon_of(0.99 * mu, 1e-5) != pytest.approx(epsilon, rel=5e-3)


# dp-accounting 0.6.0, δ = 1e-5: 1 / gaussian_mechanism.get_sigma_gaussian(ε, δ).
@pytest.mark.parametrize(("epsilon", "mu"), [(1.0, 0.268051), (8.0, 1.666031)])
def test_mu_matches_golden_values_and_they_would_notice_one_percent(epsilon: float, mu: float) -> None:
    assert mu_of(epsilon, 1e-5) == pytest.approx(mu, rel=2e-6)
    assert mu_of(0.99 * epsilon, 1e-5) != pytest.approx(mu, rel=5e-3)


@pytest.mark.parametrize("mu", [0.01, 0.3, 1.0, 4.0, 30.0, 45.0, 200.0])
@pytest.mark.parametrize("place", [-1.0, 0.0, 2.0, 5.0])
def test_delta_is_the_one_that_dp_accounting_computes(mu: float, place: float) -> None:
    epsilon = mu * mu / 2 + place * mu  # `place` standard deviations beyond the mean privacy loss
    if epsilon >= 0:
        theirs = privacy_loss_mechanism.GaussianPrivacyLoss(1 / mu).get_delta_for_epsilon(epsilon)
        assert delta_of(epsilon, mu) == pytest.approx(theirs, rel=1e-8)


@given(epsilon=epsilons, delta=deltas)
@example(epsilon=450.0, delta=1e-12)  # where Φ changes from erfc to its series; once rounded the wrong way
@example(epsilon=1e-3, delta=1e-12)
def test_there_and_back_is_within_the_budget_and_tight(epsilon: float, delta: float) -> None:
    mu = mu_of(epsilon, delta)
    assert delta_of(epsilon, mu) <= delta
    assert delta_of(epsilon, mu * 1.0001) > delta  # a little less noise would break the promise
    assert epsilon * (1 - 1e-6) <= epsilon_of(mu, delta) <= epsilon * (1 + 1e-9)


@given(mu=st.floats(0, 1e150), delta=st.floats(1e-300, 1, exclude_max=True))
@example(mu=1e100, delta=1e-5)  # overflowed once
@example(mu=0.0, delta=1e-5)
def test_epsilon_is_never_negative_nan_or_infinite(mu: float, delta: float) -> None:
    assert 0.0 <= epsilon_of(mu, delta) < math.inf


@given(epsilon=st.floats(0, 1e300), mu=st.floats(0, 1e300))
def test_delta_is_a_probability(epsilon: float, mu: float) -> None:
    assert 0.0 <= delta_of(epsilon, mu) <= 1.0


@given(mu=st.floats(1e-3, 1e3), delta=deltas, factor=st.floats(1.001, 10))
def test_more_noise_or_a_larger_delta_never_costs_more(mu: float, delta: float, factor: float) -> None:
    epsilon = epsilon_of(mu, delta)
    assert epsilon_of(mu * factor, delta) >= epsilon >= epsilon_of(mu, min(delta * factor, 0.9))
    assert mu_of(max(epsilon, 1e-3) * factor, delta) >= mu_of(max(epsilon, 1e-3), delta)


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan, math.inf])
def test_a_senseless_delta_is_refused(delta: float) -> None:
    with pytest.raises(InvalidConfig, match="delta"):
        epsilon_of(1.0, delta)
    with pytest.raises(InvalidConfig, match="delta"):
        mu_of(1.0, delta)


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_a_senseless_mu_or_epsilon_is_refused(value: float) -> None:
    with pytest.raises(InvalidConfig, match="mu"):
        epsilon_of(value, 1e-5)
    with pytest.raises(InvalidConfig, match="epsilon"):
        mu_of(value, 1e-5)


def test_a_budget_too_small_for_any_noise_is_refused_and_not_rounded_to_one() -> None:
    with pytest.raises(InvalidConfig, match="more noise"):
        mu_of(1e-14, 1e-14)
    with pytest.raises(InvalidConfig, match="epsilon"):
        mu_of(0.0, 1e-5)
