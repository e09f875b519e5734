"""The ledger: charged before anything is released, never below what was, and closed to what it does not know."""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penchant.common.errors import BudgetExhausted, InvalidConfig, UnknownMechanism
from penchant.common.privacy import gaussian
from penchant.common.privacy.accounting import Neighbours, epsilon
from penchant.common.privacy.events import Event, Gaussian, PoissonGaussian
from penchant.common.privacy.ledger import Entry, Ledger
from penchant.common.privacy.sums import PrivateSum

DELTA = 1e-5
ROUND = Gaussian(noise_multiplier=10.0)
SAMPLED = PoissonGaussian(noise_multiplier=4.0, rate=0.1)

plain = st.builds(Gaussian, noise_multiplier=st.sampled_from([3.0, 10.0, 31.0]), count=st.integers(1, 4))


def test_a_release_needs_the_charge_that_only_the_ledger_makes() -> None:
    ledger = Ledger("readers", delta=DELTA)
    total = PrivateSum({"a": (2,)}, clip_norm=1.0, noise_multiplier=10.0)
    with pytest.raises(InvalidConfig, match="receipt"):
        total.release(np.random.default_rng(0), None)
    assert not ledger.entries
    total.release(np.random.default_rng(0), ledger.charge(1, ROUND))
    assert ledger.entries == (Entry(1, 0, ROUND),)


def test_every_charge_composes_whatever_round_it_was_for() -> None:
    ledger = Ledger("readers", delta=DELTA)
    assert ledger.spent().epsilon == 0.0
    for number, noise in enumerate((10.0, 5.0, 2.0), 1):
        ledger.charge(number, Gaussian(noise_multiplier=noise))
    mu = math.sqrt(1 / 10**2 + 1 / 5**2 + 1 / 2**2)
    assert ledger.spent().epsilon == pytest.approx(gaussian.epsilon_of(mu, DELTA), rel=1e-9)
    assert ledger.spent().epsilon > gaussian.epsilon_of(1 / 2, DELTA)  # what forgetting the first two would give


def test_a_round_run_again_is_charged_again() -> None:
    ledger = Ledger("readers", delta=DELTA)
    assert ledger.attempts(1) == 0
    ledger.charge(1, ROUND)
    once = ledger.spent().epsilon
    ledger.charge(1, ROUND)
    ledger.charge(2, ROUND)
    assert [(e.round, e.attempt) for e in ledger.entries] == [(1, 0), (1, 1), (2, 0)]
    assert (ledger.attempts(1), ledger.attempts(2), ledger.attempts(3)) == (2, 1, 0)
    assert ledger.spent().epsilon == pytest.approx(gaussian.epsilon_of(math.sqrt(3) / 10, DELTA), rel=1e-9)
    assert ledger.spent().epsilon > once


@settings(max_examples=50)
@given(events=st.lists(plain, max_size=8))
def test_the_order_of_charges_and_how_they_are_bundled_change_nothing(events: list[Event]) -> None:
    ledger, other = Ledger("readers", delta=DELTA), Ledger("readers", delta=DELTA)
    for event in events:
        ledger.charge(1, event)
    for event in reversed(events):
        for _ in range(event.count):
            other.charge(1, Gaussian(noise_multiplier=event.noise_multiplier))
    assert ledger.spent().epsilon == pytest.approx(other.spent().epsilon, rel=1e-9)


def test_equal_events_are_merged_and_different_ones_are_not() -> None:
    twice = PoissonGaussian(noise_multiplier=4.0, rate=0.1, count=2)
    others: list[Event] = [PoissonGaussian(noise_multiplier=4.0, rate=0.2), Gaussian(noise_multiplier=4.0)]
    ledger = Ledger("readers", delta=DELTA)
    for event in (SAMPLED, *others, SAMPLED):
        ledger.charge(1, event)
    assert ledger.spent().epsilon == pytest.approx(epsilon([twice, *others], DELTA).epsilon, rel=1e-9)
    assert ledger.spent().epsilon != pytest.approx(epsilon([twice, others[0]], DELTA).epsilon, rel=1e-3)


# --------------------------------------------------------------------------------------------------------- budget


@pytest.mark.parametrize("neighbours", ["add/remove", "replace"])
@pytest.mark.parametrize("event", [ROUND, SAMPLED])
def test_a_budget_refuses_the_charge_that_would_pass_it_and_nothing_is_written(
    event: Event, neighbours: Neighbours
) -> None:
    free = Ledger("readers", delta=DELTA, neighbours=neighbours)
    for number in (1, 2, 3):
        free.charge(number, event)
    ledger = Ledger("readers", delta=DELTA, budget=free.spent().epsilon, neighbours=neighbours)
    for number in (1, 2, 3):
        ledger.check(event)
        ledger.charge(number, event)
    with pytest.raises(BudgetExhausted, match="readers"):
        ledger.check(event)
    with pytest.raises(BudgetExhausted):
        ledger.charge(4, event)
    assert len(ledger.entries) == 3
    assert ledger.spent().epsilon <= free.spent().epsilon


def test_two_charges_at_once_cannot_share_the_last_of_a_budget() -> None:
    budget = gaussian.epsilon_of(math.sqrt(5) / 10, DELTA)  # five rounds
    ledger = Ledger("readers", delta=DELTA, budget=budget)

    def charge(number: int) -> bool:
        try:
            ledger.charge(number, ROUND)
        except BudgetExhausted:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(charge, range(40))) == 5
    assert len(ledger.entries) == 5


@pytest.mark.parametrize("budget", [0.0, -1.0, math.nan, math.inf])
def test_a_budget_that_would_never_refuse_is_itself_refused(budget: float) -> None:
    with pytest.raises(InvalidConfig, match="budget"):
        Ledger("readers", delta=DELTA, budget=budget)


@pytest.mark.parametrize("delta", [0.0, 1.0, math.nan])
def test_a_senseless_delta_is_refused(delta: float) -> None:
    with pytest.raises(InvalidConfig, match="delta"):
        Ledger("readers", delta=delta)


# -------------------------------------------------------------------------------------------------------- records


@given(events=st.lists(plain | st.just(SAMPLED), max_size=6), rounds=st.lists(st.integers(1, 3), max_size=6))
def test_records_come_back_as_they_were_through_json(events: list[Event], rounds: list[int]) -> None:
    ledger, again = Ledger("readers", delta=DELTA), Ledger("readers", delta=DELTA)
    for number, event in zip(rounds, events, strict=False):
        ledger.charge(number, event)
    again.load(json.loads(json.dumps(ledger.to_records())))
    assert again.entries == ledger.entries
    assert [again.attempts(number) for number in (1, 2, 3)] == [ledger.attempts(number) for number in (1, 2, 3)]


def test_a_ledger_read_back_goes_on_from_what_was_spent() -> None:
    ledger = Ledger("readers", delta=DELTA)
    ledger.charge(1, ROUND)
    again = Ledger("readers", delta=DELTA, budget=ledger.spent().epsilon)
    again.load(ledger.to_records())
    assert again.spent() == ledger.spent()
    with pytest.raises(BudgetExhausted):
        again.charge(2, ROUND)


GOOD: dict[str, Any] = {
    "round": 1,
    "attempt": 0,
    "event": {"kind": "gaussian", "schema_version": 1, "noise_multiplier": 10.0, "count": 1},
}


@pytest.mark.parametrize(
    "bad",
    [
        {**GOOD, "event": {**GOOD["event"], "kind": "laplace"}},
        {**GOOD, "event": {**GOOD["event"], "schema_version": 2}},
        {**GOOD, "event": {**GOOD["event"], "clip": 2.0}},
        {**GOOD, "group": 3},  # a field that a later version might add
        {"round": 1, "attempt": 0},
        {"attempt": 0, "event": GOOD["event"]},
    ],
)
def test_a_record_that_is_not_understood_is_refused_and_the_ledger_stays_as_it_was(bad: dict[str, Any]) -> None:
    ledger = Ledger("readers", delta=DELTA)
    ledger.load([GOOD])
    with pytest.raises(UnknownMechanism):
        ledger.load([GOOD, bad])
    assert ledger.entries == (Entry(1, 0, ROUND),)


def test_a_record_written_by_version_1_is_read_for_ever() -> None:
    ledger = Ledger("readers", delta=DELTA)
    ledger.load([GOOD, {**GOOD, "attempt": 1, "event": {**GOOD["event"], "kind": "poisson-gaussian", "rate": 0.5}}])
    assert ledger.events == (ROUND, PoissonGaussian(noise_multiplier=10.0, rate=0.5))
    assert ledger.to_records()[0] == GOOD
