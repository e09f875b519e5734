"""Events and what they cost: golden values, agreement of two accountants, order of costs, refusals, calibration."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, get_args

import dp_accounting
import numpy as np
import pytest
from dp_accounting import pld as dp_pld
from hypothesis import example, given, settings
from hypothesis import strategies as st

from penchant.common.errors import InvalidConfig, MissingExtra, PrivacyRefused, UnknownMechanism
from penchant.common.privacy import accounting, gaussian
from penchant.common.privacy.accounting import (
    GDP,
    OPACUS_PRV,
    OPACUS_RDP,
    PLD,
    PRV_ERROR,
    RDP,
    Accountant,
    Bound,
    Neighbours,
    Pld,
    calibrate,
    epsilon,
    most_rounds,
    opinions,
)
from penchant.common.privacy.events import Event, Gaussian, PoissonGaussian, decode, encode
from penchant.common.privacy.plan import PrivacyPlan, SumSpec

POISSON = PoissonGaussian(noise_multiplier=1.0, rate=100 / 6040, count=100)
PLAIN = Gaussian(noise_multiplier=1.0, count=100)

# ---------------------------------------------------------------------------------------------------------- costs


@pytest.mark.parametrize(
    ("event", "neighbours", "expected", "accountant"),
    [  # dp-accounting 0.6.0, δ = 1e-5: PLDAccountant and, for 91.82, the closed form as well
        (PLAIN, "add/remove", 91.82, "GDP"),
        (POISSON, "add/remove", 1.187, "PLD"),
        (POISSON, "replace", 1.519, "PLD"),
    ],
)
def test_golden_values_hold_and_would_notice_one_percent_of_noise(
    event: Event, neighbours: Neighbours, expected: float, accountant: str
) -> None:
    bound = epsilon([event], 1e-5, neighbours)
    assert bound.epsilon == pytest.approx(expected, rel=5e-4)
    assert bound.accountant == accountant
    less = epsilon([replace(event, noise_multiplier=0.99)], 1e-5, neighbours)
    assert less.epsilon != pytest.approx(expected, rel=5e-3)


@pytest.mark.parametrize(
    ("event", "pld", "rdp"),
    [(PLAIN, 91.82, 96.12), (POISSON, 1.187, 1.616)],  # dp-accounting 0.6.0, δ = 1e-5, add/remove
)
def test_both_accountants_give_their_golden_values_and_rdp_is_the_looser(event: Event, pld: float, rdp: float) -> None:
    assert PLD.epsilon([event], 1e-5, "add/remove") == pytest.approx(pld, rel=5e-4)
    assert RDP.epsilon([event], 1e-5, "add/remove") == pytest.approx(rdp, rel=5e-4)


@pytest.mark.parametrize("neighbours", ["add/remove", "replace"])
@pytest.mark.parametrize(
    "events",
    [
        (Gaussian(noise_multiplier=2.0),),
        (Gaussian(noise_multiplier=4.0, count=7),),
        (Gaussian(noise_multiplier=3.0), Gaussian(noise_multiplier=5.0, count=2)),
    ],
)
def test_the_closed_form_is_what_privacy_loss_distributions_give(
    events: tuple[Event, ...], neighbours: Neighbours
) -> None:
    pld = PLD.epsilon(events, 1e-5, neighbours)
    assert epsilon(events, 1e-5, neighbours).epsilon == pytest.approx(pld, rel=1e-4)
    other: Neighbours = "replace" if neighbours == "add/remove" else "add/remove"
    assert epsilon(events, 1e-5, other).epsilon != pytest.approx(pld, rel=0.1)


@given(
    noise=st.floats(1e-3, 1e6),
    count=st.integers(1, 10**6),
    delta=st.floats(1e-12, 0.5),
    neighbours=st.sampled_from(["add/remove", "replace"]),
    factor=st.floats(1.01, 100),
)
def test_plain_gaussians_cost_less_with_more_noise_and_more_with_more_rounds(
    noise: float, count: int, delta: float, neighbours: Neighbours, factor: float
) -> None:
    def cost(noise: float, count: int) -> float:
        return epsilon([Gaussian(noise_multiplier=noise, count=count)], delta, neighbours).epsilon

    here = cost(noise, count)
    assert 0.0 <= here < math.inf
    assert cost(noise * factor, count) <= here <= cost(noise, count + 1)
    assert here <= epsilon([Gaussian(noise_multiplier=noise, count=count)], delta, "replace").epsilon


@pytest.mark.parametrize("neighbours", ["add/remove", "replace"])
def test_sampled_gaussians_cost_more_with_less_noise_a_higher_rate_or_more_rounds(neighbours: Neighbours) -> None:
    def cost(noise: float, rate: float, count: int) -> float:
        event = PoissonGaussian(noise_multiplier=noise, rate=rate, count=count)
        return epsilon([event], 1e-5, neighbours).epsilon

    by_noise = [cost(z, 0.05, 20) for z in (50.0, 8.0, 3.0, 2.0)]
    by_rate = [cost(3.0, q, 20) for q in (1e-4, 0.01, 0.05, 0.3, 0.9, 1.0)]
    by_count = [cost(3.0, 0.05, k) for k in (1, 5, 20, 400)]
    for costs in (by_noise, by_rate, by_count):
        assert all(math.isfinite(c) and c >= 0 for c in costs)
        assert all(a < b for a, b in itertools.pairwise(costs))


def test_a_rate_of_one_is_no_amplification_and_no_accountant_takes_it_for_some() -> None:
    for neighbours in ("add/remove", "replace"):
        sampled = epsilon([PoissonGaussian(noise_multiplier=2.0, rate=1.0, count=3)], 1e-5, neighbours)
        assert sampled == epsilon([Gaussian(noise_multiplier=2.0, count=3)], 1e-5, neighbours)
    assert epsilon([PoissonGaussian(noise_multiplier=2.0, rate=0.5, count=3)], 1e-5).epsilon < sampled.epsilon


def test_events_of_several_kinds_add_up_in_any_order() -> None:
    few, plain = PoissonGaussian(noise_multiplier=3.0, rate=0.1, count=10), Gaussian(noise_multiplier=4.0)
    both = epsilon([few, plain], 1e-5).epsilon
    assert both == pytest.approx(epsilon([plain, few], 1e-5).epsilon, rel=1e-6)
    assert both > max(epsilon([few], 1e-5).epsilon, epsilon([plain], 1e-5).epsilon)
    assert both < epsilon([few], 1e-5).epsilon + epsilon([plain], 1e-5).epsilon


def test_events_counted_together_cost_what_they_cost_one_by_one() -> None:
    one = PoissonGaussian(noise_multiplier=3.0, rate=0.1)
    together = epsilon([replace(one, count=6)], 1e-5).epsilon
    assert epsilon([one] * 6, 1e-5).epsilon == pytest.approx(together, rel=1e-4)
    assert epsilon([one] * 5, 1e-5).epsilon != pytest.approx(together, rel=1e-2)


def test_nothing_released_costs_nothing() -> None:
    assert epsilon([], 1e-5) == Bound(0.0, "GDP")


# ------------------------------------------------------------------------------------- the contract of accountants


class Contract:
    """What every accountant keeps, for every kind of event that it is valid for."""

    accountant: Accountant
    neighbours: tuple[Neighbours, ...] = ("add/remove", "replace")
    slack = 0.0  # how much it may add to ε by design

    def cost(self, *events: Event, delta: float = 1e-5, neighbours: Neighbours = "add/remove") -> float:
        assert self.accountant.valid(events, neighbours)
        return self.accountant.epsilon(events, delta, neighbours)

    def test_nothing_costs_nothing(self) -> None:
        for neighbours in self.neighbours:
            assert self.cost(neighbours=neighbours) == 0.0

    def test_it_says_for_which_neighbours_it_is_valid(self) -> None:
        valid = [n for n in get_args(Neighbours) if self.accountant.valid([POISSON], n)]
        assert tuple(valid) == self.neighbours

    def test_more_noise_costs_less_and_a_higher_rate_or_more_rounds_cost_more(self) -> None:
        for neighbours in self.neighbours:
            noise = [self.cost(sampled(z, 0.05, 20), neighbours=neighbours) for z in (20.0, 8.0, 3.0, 1.0)]
            rate = [self.cost(sampled(2.0, q, 20), neighbours=neighbours) for q in (0.01, 0.05, 0.3, 0.9)]
            rounds = [self.cost(sampled(2.0, 0.05, k), neighbours=neighbours) for k in (1, 5, 20, 400)]
            for costs in (noise, rate, rounds):
                assert all(math.isfinite(c) and c >= 0 for c in costs)
                assert all(a <= b * (1 + 1e-9) for a, b in itertools.pairwise(costs))
                assert costs[0] < costs[-1] or (costs is rate and self.accountant is GDP)  # GDP leaves the coin out

    def test_a_plan_with_a_higher_cap_costs_more(self) -> None:
        spec = SumSpec(name="update", rounds=32, clip_norm=1.0, noise_multiplier=4.0)
        plan = PrivacyPlan(
            unit="user", n_users=100, delta=1e-5, sampling="none", cohort=3, sums=(spec,), max_participations=1
        )
        costs = [self.cost(*replace(plan, max_participations=k).events()) for k in (1, 2, 8, 32)]
        assert all(a < b for a, b in itertools.pairwise(costs))

    def test_it_is_never_below_the_exact_curve(self) -> None:
        for neighbours in self.neighbours:
            for noise, count, delta in ((0.5, 1, 1e-5), (2.0, 1, 1e-6), (3.0, 20, 1e-3), (10.0, 500, 1e-5)):
                mu = (2.0 if neighbours == "replace" else 1.0) * math.sqrt(count) / noise
                exact = gaussian.epsilon_of(mu, delta)
                event = Gaussian(noise_multiplier=noise, count=count)
                assert self.cost(event, delta=delta, neighbours=neighbours) >= exact * (1 - 1e-6)

    @pytest.mark.parametrize(("noise", "rate"), [(0.7, 0.01), (1.0, 0.1), (2.0, 0.5), (1.0, 0.9)])
    @pytest.mark.parametrize("at", [0.2, 1.0, 3.0])
    def test_it_is_never_below_one_sampled_release_by_quadrature(self, noise: float, rate: float, at: float) -> None:
        delta = max(hockey_stick(noise, rate, at), hockey_stick(noise, rate, at, added=True))
        if delta > 1e-9:  # below, nothing is left of the difference of two floats
            assert self.cost(sampled(noise, rate, 1), delta=delta) >= at * (1 - 1e-4)

    def test_a_smaller_delta_costs_more(self) -> None:
        for neighbours in self.neighbours:
            costs = [
                self.cost(sampled(2.0, 0.1, 30), delta=delta, neighbours=neighbours) for delta in (0.1, 1e-4, 1e-8)
            ]
            assert all(a <= b for a, b in itertools.pairwise(costs))
            assert costs[0] < costs[-1]

    def test_counted_together_is_one_by_one(self) -> None:
        for neighbours in self.neighbours:
            one, together = sampled(3.0, 0.1, 1), self.cost(sampled(3.0, 0.1, 6), neighbours=neighbours)
            by_one = self.cost(*[one] * 6, neighbours=neighbours)
            assert by_one == pytest.approx(together, rel=1e-3, abs=self.slack)
            fewer = self.cost(*[one] * 3, neighbours=neighbours)
            assert fewer < together

    def test_the_order_does_not_matter(self) -> None:
        events: tuple[Event, ...] = (sampled(3.0, 0.1, 10), Gaussian(noise_multiplier=4.0), sampled(2.0, 0.01, 5))
        for neighbours in self.neighbours:
            costs = [self.cost(*order, neighbours=neighbours) for order in itertools.permutations(events)]
            assert max(costs) == pytest.approx(min(costs), rel=1e-6)
            assert max(costs) > self.cost(*events[:2], neighbours=neighbours)


class TestGdp(Contract):
    accountant = GDP

    def test_one_event_is_the_closed_form(self) -> None:
        assert self.cost(Gaussian(noise_multiplier=2.0)) == gaussian.epsilon_of(0.5, 1e-5)


class TestPld(Contract):
    accountant = PLD

    @pytest.mark.parametrize(("noise", "rate"), [(0.7, 0.01), (1.0, 0.1), (2.0, 0.5), (1.0, 0.9)])
    @pytest.mark.parametrize("at", [0.2, 1.0, 3.0])
    def test_it_is_tight_for_one_sampled_release_by_quadrature(self, noise: float, rate: float, at: float) -> None:
        delta = max(hockey_stick(noise, rate, at), hockey_stick(noise, rate, at, added=True))
        if delta > 1e-9:
            assert self.cost(sampled(noise, rate, 1), delta=delta) == pytest.approx(at, rel=1e-3)
            assert self.cost(sampled(noise * 0.99, rate, 1), delta=delta) > at * (1 + 1e-3)

    def test_a_coarser_grid_only_rounds_further_up(self) -> None:
        events = (sampled(1.0, 0.05, 50),)
        costs = [Pld(grid).epsilon(events, 1e-5, "add/remove") for grid in (1e-4, 1e-3, 1e-2)]
        assert costs[0] < costs[1] < costs[2] < costs[0] * 1.1

    @pytest.mark.parametrize(
        "event",
        [
            PoissonGaussian(noise_multiplier=1e-3, rate=0.5, count=3),  # losses to 500,000: 10¹⁰ cells of the fine grid
            PoissonGaussian(noise_multiplier=0.3, rate=0.01, count=10**4),
            PoissonGaussian(noise_multiplier=1.0, rate=1e-12, count=10**9),
            PoissonGaussian(noise_multiplier=1e-200, rate=0.5),
        ],
    )
    def test_work_that_would_not_fit_into_memory_is_declined(self, event: Event) -> None:
        assert not PLD.valid([event], "add/remove")
        assert PLD.valid([POISSON], "add/remove")


class TestRdp(Contract):
    accountant = RDP
    neighbours = ("add/remove",)


class TestOpacusRdp(Contract):
    accountant = OPACUS_RDP
    neighbours = ("add/remove",)


class TestOpacusPrv(Contract):
    accountant = OPACUS_PRV
    neighbours = ("add/remove",)
    slack = 2 * PRV_ERROR

    @pytest.mark.parametrize(("noise", "rate", "count"), [(1.0, 100 / 6040, 100), (2.0, 0.5, 3), (0.5, 0.01, 1000)])
    def test_it_overstates_by_its_error_and_no_more(self, noise: float, rate: float, count: int) -> None:
        pld = PLD.epsilon([sampled(noise, rate, count)], 1e-5, "add/remove")
        assert pld < self.cost(sampled(noise, rate, count)) < pld + 2 * PRV_ERROR

    def test_long_runs_and_long_lists_are_declined(self) -> None:
        assert not self.accountant.valid([sampled(1.0, 0.01, 100_000)], "add/remove")
        assert not self.accountant.valid([sampled(1.0 + i / 50, 0.01, 1) for i in range(9)], "add/remove")


def sampled(noise: float, rate: float, count: int) -> PoissonGaussian:
    return PoissonGaussian(noise_multiplier=noise, rate=rate, count=count)


def hockey_stick(noise: float, rate: float, at: float, added: bool = False) -> float:
    """δ(ε) = ∫ max(0, p − e^ε q) of one sampled Gaussian release, by the trapezoid rule.

    p is the release with the person (drawn with probability `rate`), q the one without, or the other way round.
    """
    x = np.linspace(-15 * noise, 1 + 15 * noise, 400_001)
    without = np.exp(-0.5 * (x / noise) ** 2) / (noise * math.sqrt(2 * math.pi))
    drawn = np.exp(-0.5 * ((x - 1) / noise) ** 2) / (noise * math.sqrt(2 * math.pi))
    having = (1 - rate) * without + rate * drawn
    p, q = (without, having) if added else (having, without)
    return float(np.maximum(0.0, p - math.exp(at) * q).sum() * (x[1] - x[0]))  # both ends are nothing


def test_the_quadrature_gives_the_closed_form_where_nobody_is_sampled() -> None:
    for noise, at in ((1.0, 0.5), (0.7, 3.0), (3.0, 0.2)):
        assert hockey_stick(noise, 1.0, at) == pytest.approx(gaussian.delta_of(at, 1 / noise), rel=1e-6)
        assert hockey_stick(noise, 0.9, at) != pytest.approx(gaussian.delta_of(at, 1 / noise), rel=1e-2)


@settings(max_examples=40)
@given(
    noise=st.floats(1e-3, 1e6),
    rate=st.floats(1e-9, 1.0),
    count=st.integers(1, 10**6),
    delta=st.floats(1e-9, 0.5),
    neighbours=st.sampled_from(["add/remove", "replace"]),
)
@example(noise=1.0, rate=1e-12, count=10**9, delta=1e-5, neighbours="add/remove")  # dp-accounting alone takes minutes
@example(noise=1e-3, rate=0.5, count=3, delta=1e-5, neighbours="add/remove")  # and here more memory than there is
@example(noise=1e200, rate=0.5, count=10**9, delta=1e-5, neighbours="add/remove")  # overflowed once
def test_every_legal_event_has_a_finite_bound_that_its_coin_never_raises(
    noise: float, rate: float, count: int, delta: float, neighbours: Neighbours
) -> None:
    bound = epsilon([PoissonGaussian(noise_multiplier=noise, rate=rate, count=count)], delta, neighbours)
    plain = epsilon([Gaussian(noise_multiplier=noise, count=count)], delta, neighbours)
    assert 0.0 <= bound.epsilon <= plain.epsilon < math.inf


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("delta", [0.0, 1.0, -1.0, math.nan])
@pytest.mark.parametrize("events", [[], [PLAIN], [POISSON]])
def test_a_senseless_delta_is_refused(events: Sequence[Event], delta: float) -> None:
    with pytest.raises(InvalidConfig, match="delta"):
        epsilon(events, delta)


@pytest.mark.parametrize("event", [PLAIN, POISSON])
def test_an_unknown_relation_between_neighbours_is_refused(event: Event) -> None:
    with pytest.raises(UnknownMechanism, match="zero-out"):
        epsilon([event], 1e-5, "zero-out")  # type: ignore[arg-type]  # what is refused


@pytest.mark.parametrize("noise", [1e-200, 1e-160, 5e-324])
def test_noise_too_small_for_any_finite_bound_is_refused(noise: float) -> None:
    with pytest.raises(PrivacyRefused, match="finite"):
        epsilon([Gaussian(noise_multiplier=noise)], 1e-5)


GDP_OF_POISSON = GDP.epsilon([POISSON], 1e-5, "add/remove")


@pytest.mark.parametrize(
    ("pld", "rdp", "expected"),
    [
        (2.0, 1.9, None),  # RDP cannot be tighter: one of the two is wrong
        (2.0, 1.99, Bound(1.99, "RDP")),  # within the rounding of PLD's grid
        (2.0, 2.5, Bound(2.0, "PLD")),
        (2.0, math.inf, Bound(2.0, "PLD")),
        (math.inf, 2.5, Bound(2.5, "RDP")),
        (math.inf, math.inf, Bound(GDP_OF_POISSON, "GDP")),  # without the coin: dear, and still a bound
        (200.0, 250.0, None),  # the coin made it dearer
    ],
)
def test_accountants_that_disagree_stop_the_release_and_else_the_smallest_is_reported(
    monkeypatch: pytest.MonkeyPatch, pld: float, rdp: float, expected: Bound | None
) -> None:
    monkeypatch.setattr(accounting, "_pld_epsilon", lambda *_: pld)
    monkeypatch.setattr(accounting, "_rdp_epsilon", lambda *_: rdp)
    if expected is None:
        with pytest.raises(PrivacyRefused, match="disagree"):
            epsilon([POISSON], 1e-5)
    else:
        assert epsilon([POISSON], 1e-5) == expected


@pytest.mark.parametrize(
    ("prv", "rdp", "agrees"),
    [
        (1.187, 1.6, True),
        (1.197, 1.6, True),
        (1.21, 1.6, True),  # an estimate from above, by up to 2 · 0.01
        (1.30, 1.6, False),  # its lower end lies above PLD: then PLD promises too much
        (1.10, 1.6, False),
        (1.197, 1.1, False),
        (math.inf, math.inf, True),  # nothing said
    ],
)
def test_opacus_is_asked_for_unit_interaction_and_can_stop_a_report_but_is_never_reported(
    monkeypatch: pytest.MonkeyPatch, prv: float, rdp: float, agrees: bool
) -> None:
    monkeypatch.setattr(accounting, "_opacus", lambda which, *_: prv if which == "prv" else rdp)
    assert epsilon([POISSON], 1e-5).accountant == "PLD"  # unit user: not asked
    if agrees:
        assert epsilon([POISSON], 1e-5, unit="interaction").accountant == "PLD"
    else:
        with pytest.raises(PrivacyRefused, match="Opacus"):
            epsilon([POISSON], 1e-5, unit="interaction")


def test_without_opacus_the_others_still_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opacus.accountants", None)
    accounting._opacus.cache_clear()
    assert set(opinions([POISSON], 1e-5, unit="interaction")) == {"PLD", "RDP", "GDP"}


class Laplace:
    """No event of ours."""

    count = 1


def test_a_bad_event_is_refused_before_any_is_composed_where_dp_accounting_keeps_half(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # dp-accounting 0.6.0 checks kinds beforehand and values only as it composes
    half = dp_accounting.ComposedDpEvent([dp_accounting.GaussianDpEvent(1.0), dp_accounting.GaussianDpEvent(-1.0)])
    theirs = dp_pld.PLDAccountant()
    with pytest.raises(ValueError, match="deviation"):
        theirs.compose(half)
    assert theirs.get_epsilon(1e-5) > 4  # the first half stays charged

    def composed(*_: object) -> float:
        raise AssertionError("something was composed")

    monkeypatch.setattr(accounting, "_pld_epsilon", composed)
    monkeypatch.setattr(accounting, "_rdp_epsilon", composed)
    with pytest.raises(UnknownMechanism, match="Laplace"):
        epsilon([POISSON, Laplace()], 1e-5)  # type: ignore[list-item]  # what is refused
    with pytest.raises(InvalidConfig, match="noise_multiplier"):
        epsilon([POISSON, Gaussian(noise_multiplier=-1.0)], 1e-5)
    with pytest.raises(AssertionError, match="composed"):  # shows that the trap works
        epsilon([POISSON], 1e-5)


def test_without_dp_accounting_plain_gaussians_are_charged_and_sampled_ones_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    fresh = PoissonGaussian(noise_multiplier=1.234, rate=0.1)  # not in the cache
    with pytest.raises(MissingExtra, match="pip install"):
        epsilon([fresh], 1e-5)
    assert epsilon([PLAIN], 1e-5).epsilon == pytest.approx(91.82, rel=5e-4)


# ---------------------------------------------------------------------------------------------------- calibration

gaussian_rounds: list[Callable[[float], list[Event]]] = [
    lambda noise: [Gaussian(noise_multiplier=noise)],
    lambda noise: [Gaussian(noise_multiplier=noise, count=50), Gaussian(noise_multiplier=3 * noise)],
]


@pytest.mark.parametrize("neighbours", ["add/remove", "replace"])
@pytest.mark.parametrize("rounds", gaussian_rounds)
@settings(max_examples=30)
@given(target=st.floats(1e-2, 1e3), delta=st.floats(1e-10, 0.1))
def test_the_noise_found_is_enough_and_a_thousandth_less_is_not(
    rounds: Callable[[float], list[Event]], neighbours: Neighbours, target: float, delta: float
) -> None:
    noise = calibrate(rounds, target, delta, neighbours)
    assert epsilon(rounds(noise), delta, neighbours).epsilon <= target
    assert epsilon(rounds(noise * 0.999), delta, neighbours).epsilon > target


@pytest.mark.parametrize(
    ("target", "rate", "count", "neighbours"),
    [(0.2, 0.05, 40, "add/remove"), (1.0, 0.2, 60, "add/remove"), (1.0, 0.1, 30, "replace")],
)
def test_the_noise_found_for_sampled_rounds_is_enough_and_a_thousandth_less_is_not(
    target: float, rate: float, count: int, neighbours: Neighbours
) -> None:
    def rounds(noise: float) -> list[Event]:
        return [PoissonGaussian(noise_multiplier=noise, rate=rate, count=count)]

    noise = calibrate(rounds, target, 1e-5, neighbours)
    assert epsilon(rounds(noise), 1e-5, neighbours).epsilon <= target
    assert epsilon(rounds(noise * 0.999), 1e-5, neighbours).epsilon > target


def test_hard_targets_take_few_evaluations_of_the_fine_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    # each of them takes seconds; before coarse grids searched for where to look, there were about ten
    steps: list[float] = []
    fine = accounting._pld_epsilon

    def seen(events: tuple[Event, ...], delta: float, neighbours: Neighbours, step: float) -> float:
        steps.append(step)
        return fine(events, delta, neighbours, step)

    monkeypatch.setattr(accounting, "_pld_epsilon", seen)
    for target, rate, count in ((50.0, 0.1, 100), (3.0, 0.02, 200)):
        steps.clear()
        noise = calibrate(lambda z, q=rate, n=count: [sampled(z, q, n)], target, 1e-6)  # type: ignore[misc]  # a lambda's default
        assert 1 <= sum(step < 5e-4 for step in steps) <= 2
        assert len(steps) > 4
        assert target * (1 - 5e-3) < epsilon([sampled(noise, rate, count)], 1e-6).epsilon <= target


@pytest.mark.parametrize(
    ("target", "events"),
    [
        (3.0, lambda n: [Gaussian(noise_multiplier=30.0, count=n)]),
        (1.0, lambda n: [PoissonGaussian(noise_multiplier=2.0, rate=0.05, count=n)]),
        (0.5, lambda n: [PoissonGaussian(noise_multiplier=8.0, rate=0.2, count=2 * n)]),
    ],
)
def test_the_most_rounds_fit_and_one_more_does_not(target: float, events: Callable[[int], list[Event]]) -> None:
    found = most_rounds(events, target, 1e-6)
    assert epsilon(events(found), 1e-6).epsilon <= target < epsilon(events(found + 1), 1e-6).epsilon


def test_no_round_and_every_round_are_answers_too() -> None:
    assert most_rounds(lambda n: [Gaussian(noise_multiplier=0.1, count=n)], 1.0, 1e-6) == 0
    assert most_rounds(lambda n: [Gaussian(noise_multiplier=100.0, count=n)], 1.0, 1e-6, limit=7) == 7


@pytest.mark.parametrize("target", [0.0, -1.0, math.nan, math.inf])
def test_a_senseless_target_is_refused(target: float) -> None:
    with pytest.raises(InvalidConfig, match="epsilon"):
        calibrate(gaussian_rounds[0], target, 1e-5)


def test_a_target_that_no_noise_reaches_is_refused() -> None:
    with pytest.raises(PrivacyRefused, match="no noise"):
        calibrate(lambda noise: [PLAIN], 1.0, 1e-5)


# --------------------------------------------------------------------------------------------------------- events


@pytest.mark.parametrize("event", [PLAIN, POISSON, Gaussian(noise_multiplier=0.1 + 0.2)])
def test_an_event_comes_back_from_its_record(event: Event) -> None:
    assert decode(encode(event)) == event


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "laplace"},
        {"kind": None},
        {"schema_version": 2},
        {"schema_version": None},
        {"rate": 0.1},  # of another kind
        {"sensitivity": 2.0},  # one that a later version might add
        {"noise_multiplier": "1"},
    ],
)
def test_an_unknown_kind_version_or_field_is_refused_and_never_guessed(change: dict[str, Any]) -> None:
    record = encode(PLAIN)
    assert decode(record) == PLAIN
    with pytest.raises(UnknownMechanism):
        decode({**record, **change})


def test_a_record_with_a_field_missing_is_refused() -> None:
    record = encode(POISSON)
    for name in ("kind", "schema_version", "noise_multiplier", "rate"):
        with pytest.raises(UnknownMechanism):
            decode({k: v for k, v in record.items() if k != name})


@pytest.mark.parametrize(
    "change",
    [
        {"noise_multiplier": 0.0},
        {"noise_multiplier": -1.0},
        {"noise_multiplier": math.nan},
        {"noise_multiplier": math.inf},
        {"count": 0},
        {"count": 1.5},
        {"count": math.nan},  # passed every comparison once
        {"count": math.inf},
        {"count": 10**400},  # no float holds it
        {"rate": 0.0},
        {"rate": 1.01},
        {"rate": math.nan},
    ],
)
def test_an_event_that_cannot_have_happened_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(InvalidConfig):
        decode({**encode(POISSON), **change})
