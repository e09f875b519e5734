"""Events and what they cost: golden values, agreement of two accountants, order of costs, refusals, calibration."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penchant.common.errors import InvalidConfig, MissingExtra, PrivacyRefused, UnknownMechanism
from penchant.common.privacy import accounting
from penchant.common.privacy.accounting import Bound, Neighbours, calibrate, epsilon
from penchant.common.privacy.events import Event, Gaussian, PoissonGaussian, decode, encode

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
    assert accounting._dp_accounting_epsilon("pld", (event,), 1e-5, "add/remove") == pytest.approx(pld, rel=5e-4)
    assert accounting._dp_accounting_epsilon("rdp", (event,), 1e-5, "add/remove") == pytest.approx(rdp, rel=5e-4)


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
    pld = accounting._dp_accounting_epsilon("pld", events, 1e-5, neighbours)
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


@pytest.mark.parametrize(
    ("pld", "rdp", "expected"),
    [
        (2.0, 1.9, None),  # RDP cannot be tighter: one of the two is wrong
        (2.0, 1.99, Bound(1.99, "RDP")),  # within the rounding of PLD's grid
        (2.0, 2.5, Bound(2.0, "PLD")),
        (2.0, math.inf, Bound(2.0, "PLD")),
        (math.inf, 2.5, Bound(2.5, "RDP")),
        (math.inf, math.inf, None),
    ],
)
def test_accountants_that_disagree_or_find_no_bound_stop_the_release(
    monkeypatch: pytest.MonkeyPatch, pld: float, rdp: float, expected: Bound | None
) -> None:
    monkeypatch.setattr(accounting, "_dp_accounting_epsilon", lambda which, *_: pld if which == "pld" else rdp)
    if expected is None:
        with pytest.raises(PrivacyRefused):
            epsilon([POISSON], 1e-5)
    else:
        assert epsilon([POISSON], 1e-5) == expected


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
        {"rate": 0.0},
        {"rate": 1.01},
        {"rate": math.nan},
    ],
)
def test_an_event_that_cannot_have_happened_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(InvalidConfig):
        decode({**encode(POISSON), **change})
