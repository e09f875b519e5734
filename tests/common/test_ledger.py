"""The ledger: charged before anything is released, never below what was, and closed to what it does not know."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import itertools
import json
import math
import os
import pickle
import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penchant.common.errors import (
    BudgetExhausted,
    InvalidConfig,
    MalformedData,
    PenchantError,
    PrivacyRefused,
    UnknownMechanism,
)
from penchant.common.privacy import gaussian
from penchant.common.privacy.accounting import Neighbours, epsilon
from penchant.common.privacy.events import Event, Gaussian, PoissonGaussian
from penchant.common.privacy.ledger import _SCHEMA, MOST_TRIES, Entry, Ledger, Receipt

DELTA = 1e-5
ROUND = Gaussian(noise_multiplier=10.0)
SAMPLED = PoissonGaussian(noise_multiplier=4.0, rate=0.1)

plain = st.builds(Gaussian, noise_multiplier=st.sampled_from([3.0, 10.0, 31.0]), count=st.integers(1, 4))


def epsilon_of(*noise: float) -> float:
    """ε of one Gaussian for each of these noise multipliers."""
    return gaussian.epsilon_of(math.sqrt(sum(n**-2 for n in noise)), DELTA)


def filled(path: Path) -> Path:
    """A closed ledger of three charges, two releases and a participation."""
    with Ledger("readers", delta=DELTA, path=path, now_ms=itertools.count(1000).__next__) as ledger:
        for number in (1, 2):
            ledger.released(ledger.charge(number, ROUND, plan="p", cap=1, model="m"), "abc")
        ledger.charge(2, Gaussian(noise_multiplier=5.0), plan="p", cap=1)
        ledger.participate(7, 1, 0, None, plan="p", cap=1)
    return path


def again(path: Path) -> Ledger:
    return Ledger("readers", delta=DELTA, path=path)


# -------------------------------------------------------------------------------------------------------- receipts


def test_a_receipt_is_good_for_one_release_whoever_comes_first() -> None:
    receipt = Ledger("readers", delta=DELTA).charge(1, ROUND)
    assert (receipt.event, receipt.attempt, receipt.entry.number) == (ROUND, 0, 0)

    def spend(_: int) -> bool:
        try:
            receipt.spend()
        except InvalidConfig:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(spend, range(40))) == 1
    with pytest.raises(InvalidConfig, match="one release"):
        receipt.spend()


def test_only_a_ledger_makes_a_receipt() -> None:
    entry = Entry(number=0, kind="charge", round=1, attempt=0, event=ROUND)
    with pytest.raises(TypeError, match="written"):
        Receipt(entry, ROUND, "0" * 64)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    with pytest.raises(InvalidConfig, match="comes from a ledger"):
        Receipt(entry, ROUND, "0" * 64, written=object())


@pytest.mark.parametrize("spent", [False, True])
@pytest.mark.parametrize(
    "twin",
    [copy.copy, copy.deepcopy, pickle.dumps, dataclasses.replace, lambda r: setattr(r, "event", SAMPLED)],
    ids=["copy", "deepcopy", "pickle", "replace", "another event"],
)
def test_a_receipt_has_no_twin(twin: Callable[[Any], object], spent: bool) -> None:
    receipt = Ledger("readers", delta=DELTA).charge(1, ROUND)
    if spent:
        receipt.spend()
    with pytest.raises((InvalidConfig, TypeError, AttributeError)):
        twin(receipt)


def test_a_release_is_written_down_once_and_only_where_it_was_charged() -> None:
    ledger, other = Ledger("readers", delta=DELTA), Ledger("readers", delta=DELTA)
    receipt = ledger.charge(1, ROUND, plan="p", cap=3, model="m")
    ledger.released(receipt, "abc")
    kept = ledger.entries[1]
    assert (kept.kind, kept.round, kept.attempt, kept.plan, kept.model) == ("release", 1, 0, "p", "m")
    assert (kept.event, kept.content) == (None, "abc")
    with pytest.raises(InvalidConfig, match="written down before"):
        ledger.released(receipt, "def")
    other.charge(1, Gaussian(noise_multiplier=1000.0), plan="p", cap=3, model="m")
    with pytest.raises(InvalidConfig, match="another ledger"):
        other.released(receipt, "abc")
    assert (len(ledger.entries), len(other.entries)) == (2, 1)


# ----------------------------------------------------------------------------------------------------- composition


def test_every_charge_composes_whatever_round_it_was_for() -> None:
    ledger = Ledger("readers", delta=DELTA)
    assert ledger.spent().epsilon == 0.0
    for number, noise in enumerate((10.0, 5.0, 2.0), 1):
        ledger.charge(number, Gaussian(noise_multiplier=noise))
    assert ledger.spent().epsilon == pytest.approx(epsilon_of(10, 5, 2), rel=1e-9)
    assert ledger.spent().epsilon > epsilon_of(2)  # what forgetting the first two would give


def test_a_round_run_again_is_charged_again() -> None:
    ledger = Ledger("readers", delta=DELTA)
    assert ledger.attempts(1) == 0
    ledger.charge(1, ROUND)
    once = ledger.spent().epsilon
    ledger.charge(1, ROUND)
    ledger.charge(2, ROUND)
    ledger.charge(1, ROUND, plan="other")  # another plan's round 1 is another round
    assert [(e.round, e.attempt) for e in ledger.entries] == [(1, 0), (1, 1), (2, 0), (1, 0)]
    assert (ledger.attempts(1), ledger.attempts(2), ledger.attempts(3), ledger.attempts(1, "other")) == (2, 1, 0, 1)
    assert ledger.spent().epsilon == pytest.approx(epsilon_of(10, 10, 10, 10), rel=1e-9)
    assert ledger.spent().epsilon > once


def test_what_was_repeated_is_told_for_one_plan_and_for_all() -> None:
    ledger = Ledger("readers", delta=DELTA)
    for _ in range(3):
        ledger.charge(1, ROUND, plan="p")
    for noise in (9.0, 8.0):
        ledger.charge(1, Gaussian(noise_multiplier=noise), plan="q")
    eight, twice = Gaussian(noise_multiplier=8.0), Gaussian(noise_multiplier=10.0, count=2)
    assert ledger.repeated("p") == (twice,)
    assert ledger.repeated("q") == (eight,)
    assert ledger.repeated() == (twice, eight)
    assert ledger.repeated("r") == ()


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


def test_of_a_plan_with_a_cap_the_least_noisy_first_tries_count_and_every_repeat() -> None:
    ledger = Ledger("readers", delta=DELTA)
    for number, noise in enumerate((9.0, 3.0, 7.0, 5.0), 1):
        ledger.charge(number, Gaussian(noise_multiplier=noise), plan="p", cap=2)
    assert ledger.spent().epsilon == pytest.approx(epsilon_of(3, 5), rel=1e-9)
    ledger.charge(1, Gaussian(noise_multiplier=9.0), plan="p", cap=2)
    assert ledger.spent().epsilon == pytest.approx(epsilon_of(3, 5, 9), rel=1e-9)
    ledger.charge(1, Gaussian(noise_multiplier=8.0), plan="q", cap=2)  # another plan has a cap of its own
    assert ledger.spent().epsilon == pytest.approx(epsilon_of(3, 5, 9, 8), rel=1e-9)
    ledger.charge(1, Gaussian(noise_multiplier=6.0), plan="r")
    ledger.charge(2, Gaussian(noise_multiplier=6.0), plan="r")
    assert ledger.spent().epsilon == pytest.approx(epsilon_of(3, 5, 9, 8, 6, 6), rel=1e-9)


def test_a_sampled_round_counts_whatever_cap_is_claimed_for_it() -> None:
    ledger = Ledger("readers", delta=DELTA)
    for number in (1, 2, 3):
        ledger.charge(number, PoissonGaussian(noise_multiplier=4.0, rate=1.0), plan="p", cap=1)
    assert ledger.spent().epsilon == pytest.approx(epsilon_of(4, 4, 4), rel=1e-9)


@pytest.mark.parametrize("cap", [2, None])
def test_what_rounds_would_cost_is_what_they_do_once_charged_and_asking_writes_nothing(cap: int | None) -> None:
    with Ledger("readers", delta=DELTA) as ledger:
        ledger.charge(1, ROUND, plan="p", cap=cap)
        rounds = {n: Gaussian(noise_multiplier=20.0 - n) for n in (1, 2, 3, 4)}  # the first is charged again
        foretold = ledger.after(rounds, plan="p", cap=cap)
        assert len(ledger.entries) == 1
        for number, event in rounds.items():
            ledger.charge(number, event, plan="p", cap=cap)
        assert foretold == ledger.spent()
        assert ledger.after({}, plan="p", cap=cap) == ledger.spent()


def test_a_cap_without_its_plan_is_refused() -> None:
    ledger = Ledger("readers", delta=DELTA)
    with pytest.raises(InvalidConfig, match="digest"):
        ledger.charge(1, ROUND, cap=2)
    assert ledger.entries == ()


tries = st.tuples(
    st.sampled_from(["p", "q", ""]), st.integers(1, 3), st.sampled_from([2.0, 3.0, 5.0, 9.0]), st.integers(1, 2)
)


@settings(max_examples=60)
@given(charges=st.lists(tries, max_size=9))
def test_the_epsilon_never_falls_and_is_that_of_the_worst_profile_that_the_caps_allow(
    charges: list[tuple[str, int, float, int]],
) -> None:
    caps = {"p": 2, "q": 1, "": None}
    ledger, before = Ledger("readers", delta=DELTA), 0.0
    first: dict[str, list[float]] = {"p": [], "q": []}
    always: list[float] = []
    for plan, number, noise, count in charges:
        receipt = ledger.charge(number, Gaussian(noise_multiplier=noise, count=count), plan=plan, cap=caps[plan])
        (always if caps[plan] is None or receipt.attempt else first[plan]).extend([noise] * count)
        worst = max(
            epsilon_of(*always, *p, *q)
            for p in itertools.combinations(first["p"], min(2, len(first["p"])))
            for q in itertools.combinations(first["q"], min(1, len(first["q"])))
        )
        assert ledger.spent().epsilon == pytest.approx(worst, rel=1e-9)
        assert ledger.spent().epsilon >= before * (1 - 1e-12)
        before = ledger.spent().epsilon


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


def test_a_budget_has_room_for_every_round_of_a_plan_whose_cap_it_was_made_for_but_for_no_repeat() -> None:
    ledger = Ledger("readers", delta=DELTA, budget=epsilon_of(10, 10))
    for number in range(1, 6):
        ledger.check(ROUND, plan="p", cap=2, round=number)
        ledger.charge(number, ROUND, plan="p", cap=2)
    with pytest.raises(BudgetExhausted):
        ledger.check(ROUND, plan="p", cap=2, round=5)
    with pytest.raises(BudgetExhausted):
        ledger.charge(5, ROUND, plan="p", cap=2)
    with pytest.raises(BudgetExhausted):
        ledger.check(ROUND)


def test_two_charges_at_once_cannot_share_the_last_of_a_budget() -> None:
    ledger = Ledger("readers", delta=DELTA, budget=epsilon_of(*[10] * 5))

    def charge(number: int) -> bool:
        try:
            ledger.charge(number, ROUND)
        except BudgetExhausted:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(charge, range(40))) == 5
    assert len(ledger.entries) == 5
    assert ledger.verify() == 5


@pytest.mark.parametrize("budget", [0.0, -1.0, math.nan, math.inf])
def test_a_budget_that_would_never_refuse_is_itself_refused(budget: float) -> None:
    with pytest.raises(InvalidConfig, match="budget"):
        Ledger("readers", delta=DELTA, budget=budget)


@pytest.mark.parametrize("delta", [0.0, 1.0, math.nan])
def test_a_senseless_delta_is_refused(delta: float) -> None:
    with pytest.raises(InvalidConfig, match="delta"):
        Ledger("readers", delta=delta)


def test_a_relation_between_neighbours_that_is_not_known_is_refused() -> None:
    with pytest.raises(UnknownMechanism, match="swap"):
        Ledger("readers", delta=DELTA, neighbours="swap")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def test_a_check_reads_no_entry_again(tmp_path: Path) -> None:
    with again(filled(tmp_path / "a.sqlite")) as ledger:
        asked: list[str] = []
        ledger._db.set_trace_callback(asked.append)
        ledger.check(ROUND)
        ledger.attempts(1)
        ledger.spent()
        assert not [query for query in asked if "FROM entries" in query]
        ledger.charge(9, ROUND)
        with again(tmp_path / "a.sqlite") as other:
            other.charge(10, ROUND)
        ledger.check(ROUND)
        ledger.check(ROUND)
        assert [query for query in asked if "FROM entries WHERE" in query] == [  # only what came since, and once
            "SELECT number, record, hash FROM entries WHERE number >= 6 ORDER BY number"
        ]


# --------------------------------------------------------------------------------------------------------- devices


def test_a_device_charges_each_profile_by_itself() -> None:
    ledger = Ledger("phones", delta=DELTA, budget=epsilon_of(10, 10))
    for profile in (1, 1, 2):
        receipt = ledger.participate(profile, 1, 0, ROUND, plan="p")
        assert receipt is not None
        assert receipt.event == ROUND
    assert ledger.spent(1).epsilon == pytest.approx(epsilon_of(10, 10), rel=1e-9)
    assert ledger.spent(2).epsilon == pytest.approx(epsilon_of(10), rel=1e-9)
    assert ledger.spent(3).epsilon == 0.0
    assert ledger.spent() == ledger.spent(1)  # the population spent as much as its worst profile
    with pytest.raises(BudgetExhausted):
        ledger.participate(1, 2, 0, ROUND, plan="p")
    ledger.participate(2, 2, 0, ROUND, plan="p")
    assert (ledger.participations(1), ledger.participations(2), ledger.participations(3)) == (2, 2, 0)


def test_a_profile_takes_part_as_often_as_the_cap_of_the_plan_says_and_not_once_more() -> None:
    ledger = Ledger("phones", delta=DELTA)
    for number in (1, 1):  # the same order again is another participation
        assert ledger.participate(4, number, 0, None, plan="p", cap=2) is None
    with pytest.raises(PrivacyRefused, match="cap of 2"):
        ledger.participate(4, 2, 0, None, plan="p", cap=2)
    ledger.participate(5, 2, 0, None, plan="p", cap=2)
    ledger.participate(4, 1, 0, None, plan="q", cap=2)
    assert (ledger.participations(4), ledger.participations(4, "p"), ledger.participations(4, "q")) == (3, 2, 1)
    assert ledger.spent().epsilon == 0.0  # the noise is the server's, and so is the charge
    assert len(ledger.entries) == 4


def test_further_tries_at_a_round_are_one_participation_where_the_noise_is_the_servers() -> None:
    ledger = Ledger("phones", delta=DELTA)
    for attempt in (0, 1, 3):
        ledger.participate(4, 1, attempt, None, plan="p", cap=1)
    assert (ledger.participations(4, "p"), sorted(ledger.rounds(4, "p"))) == (1, [1])
    for number, attempt in ((2, 0), (1, 3), (1, 2)):  # another round, the same try again, one that was passed over
        with pytest.raises(PrivacyRefused, match="cap of 1"):
            ledger.participate(4, number, attempt, None, plan="p", cap=1)
    for attempt in range(4, 2 + MOST_TRIES):
        ledger.participate(4, 1, attempt, None, plan="p", cap=1)
    assert ledger.further(4, "p") == MOST_TRIES
    with pytest.raises(PrivacyRefused, match="16 further tries"):
        ledger.participate(4, 1, 99, None, plan="p", cap=1)


def test_every_answer_counts_where_the_device_adds_the_noise() -> None:
    ledger = Ledger("phones", delta=DELTA)
    for attempt in (0, 1):
        ledger.participate(4, 1, attempt, ROUND, plan="p", cap=2)
    assert (ledger.participations(4, "p"), sorted(ledger.rounds(4, "p"))) == (2, [1])
    with pytest.raises(PrivacyRefused, match="cap of 2"):
        ledger.participate(4, 1, 2, ROUND, plan="p", cap=2)


def test_what_a_device_sent_is_written_down_under_its_participation() -> None:
    ledger = Ledger("phones", delta=DELTA)
    receipt = ledger.participate(4, 3, 1, ROUND, plan="p")
    assert receipt is not None
    ledger.released(receipt, "abc")
    assert [(e.kind, e.profile, e.round, e.attempt, e.content) for e in ledger.entries] == [
        ("participation", 4, 3, 1, ""),
        ("release", 4, 3, 1, "abc"),
    ]
    assert ledger.events == (ROUND,)


# ------------------------------------------------------------------------------------------------------------ files


def test_a_ledger_opened_again_goes_on_from_what_was_spent(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.sqlite"
    with Ledger("readers", delta=DELTA, path=path, budget=epsilon_of(10)) as ledger:
        ledger.charge(1, ROUND)
        spent, head, entries = ledger.spent(), ledger.head, ledger.entries
    assert [p.name for p in path.parent.iterdir()] == ["a.sqlite"]  # one file, closed
    with Ledger("readers", delta=DELTA, path=path, budget=epsilon_of(10)) as ledger:
        assert (ledger.spent(), ledger.head, ledger.entries) == (spent, head, entries)
        assert [entry.at_ms for entry in ledger.entries] == [entry.at_ms for entry in entries]
        assert ledger.attempts(1) == 1
        with pytest.raises(BudgetExhausted):
            ledger.charge(2, ROUND)


def test_each_commit_is_synced(tmp_path: Path) -> None:
    for ledger in (again(tmp_path / "a.sqlite"), again(tmp_path / "a.sqlite")):  # as it is made, and opened again
        assert ledger._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert ledger._db.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL, https://sqlite.org/pragma.html


entries = st.tuples(st.integers(1, 3), plain | st.just(SAMPLED), st.sampled_from(["", "p"]), st.booleans())


@settings(max_examples=25)
@given(made=st.lists(entries, max_size=6))
def test_whatever_was_written_is_read_back_as_it_was(
    made: list[tuple[int, Event, str, bool]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("ledger") / "a.sqlite"
    memory = Ledger("readers", delta=DELTA)
    with again(path) as ledger:
        for number, event, plan, release in made:
            for each in (memory, ledger):
                receipt = each.charge(number, event, plan=plan)
                each.participate(number, number, 0, event)
                if release:
                    each.released(receipt, "abc")
    with again(path) as ledger:
        assert ledger.entries == memory.entries
        assert ledger.events == memory.events
        assert ledger.repeated() == memory.repeated()
        for number in (1, 2, 3):
            assert ledger.attempts(number, "p") == memory.attempts(number, "p")
            assert ledger.participations(number) == memory.participations(number)
        if all(isinstance(event, Gaussian) for _, event, _, _ in made):  # the others take an accountant seconds
            assert ledger.spent() == memory.spent()
            assert ledger.spent(1) == memory.spent(1)


@pytest.mark.parametrize(
    ("name", "other"),
    [("delta", 1e-6), ("budget", 3.0), ("neighbours", "replace"), ("app_id", "shop"), ("population", "others")],
)
def test_a_file_of_something_else_is_refused_and_the_message_says_what_differs(
    name: str, other: Any, tmp_path: Path
) -> None:
    path = filled(tmp_path / "a.sqlite")
    with pytest.raises(InvalidConfig, match=rf"{name} .*, not {other!r}: ") as caught:
        Ledger(**{"population": "readers", "delta": DELTA, "path": path, name: other})
    assert sum(word in str(caught.value) for word in ("delta", "budget", "neighbours", "app_id", "population")) == 1
    assert len(again(path).entries) == 6


def test_two_ledgers_on_one_file_see_each_others_charges_and_share_a_budget(tmp_path: Path) -> None:
    def opened() -> Ledger:
        return Ledger("readers", delta=DELTA, path=tmp_path / "a.sqlite", budget=epsilon_of(10, 10, 10))

    with opened() as one, opened() as two:
        assert one.charge(1, ROUND).attempt == 0
        assert two.charge(1, ROUND).attempt == 1
        assert one.charge(1, ROUND).attempt == 2
        assert one.head == two.head
        assert one.spent() == two.spent()
        for ledger in (one, two):
            with pytest.raises(BudgetExhausted):
                ledger.charge(2, ROUND)
        assert one.verify() == two.verify() == 3


def test_a_ledger_that_came_in_between_is_not_written_over(tmp_path: Path) -> None:
    path = tmp_path / "a.sqlite"

    def at(point: str) -> None:
        if point == "create:committed":
            with again(path) as other:
                other.charge(1, ROUND)

    with Ledger("readers", delta=DELTA, path=path, at=at) as ledger:
        assert len(ledger.entries) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a.sqlite"]


def test_a_ledger_is_made_where_there_are_no_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    path = filled(tmp_path / "a.sqlite")
    assert len(again(path).entries) == 6
    other = tmp_path / "b.sqlite"

    def at(point: str) -> None:
        if point == "create:committed":
            filled(other)

    with Ledger("readers", delta=DELTA, path=other, at=at) as ledger:
        assert len(ledger.entries) == 6  # not written over here either


def test_to_read_a_ledger_leaves_it_as_it_is(tmp_path: Path) -> None:
    path = filled(tmp_path / "a.sqlite")
    before = path.read_bytes()
    with Ledger.open(path) as ledger:
        assert (ledger.population, ledger.delta, len(ledger.entries), ledger.verify()) == ("readers", DELTA, 6, 6)
        with pytest.raises(InvalidConfig, match="can only be read; nothing may be released"):
            ledger.charge(3, ROUND)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.sqlite"]
    with pytest.raises(InvalidConfig, match="no ledger"):
        Ledger.open(tmp_path / "gone.sqlite")
    assert not (tmp_path / "gone.sqlite").exists()


def test_a_ledger_where_nothing_can_be_written_is_read_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = filled(tmp_path / "a.sqlite")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with Ledger.open(path) as ledger:
        assert [p.name for p in tmp_path.iterdir()] == ["a.sqlite"]  # no log beside it either
        assert ledger.verify() == 6


# ------------------------------------------------------------------------------------------------------- full, failing


def test_a_full_disk_stops_the_charge_and_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.sqlite"
    with again(path) as ledger:
        (pages,) = ledger._db.execute("PRAGMA page_count").fetchone()
        ledger._db.execute(f"PRAGMA max_page_count = {pages + 2}")

        def fill() -> None:
            for number in range(1000):
                ledger.charge(number, ROUND, model="m" * 200)

        with pytest.raises(InvalidConfig, match=r"a\.sqlite: the disk is full; nothing may be released$"):
            fill()
        charged = len(ledger.entries)
        assert 0 < charged == ledger.verify()
        assert ledger.attempts(charged) == 0
        ledger._db.execute("PRAGMA max_page_count = 1000000")
        assert ledger.charge(charged, ROUND).attempt == 0
    assert len(again(path).entries) == charged + 1


def test_a_file_that_became_read_only_stops_the_charge(tmp_path: Path) -> None:
    with again(filled(tmp_path / "a.sqlite")) as ledger:
        ledger._db.execute("PRAGMA query_only = ON")
        with pytest.raises(InvalidConfig, match="can only be read"):
            ledger.charge(5, ROUND)
        ledger.check(ROUND)
        ledger._db.execute("PRAGMA query_only = OFF")
        assert (ledger.charge(5, ROUND).attempt, len(ledger.entries)) == (0, 7)


def test_a_place_that_cannot_be_written_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here")
    with pytest.raises(InvalidConfig, match=r"cannot write .*a\.sqlite: (Not a directory|File exists); take another"):
        again(tmp_path / "file" / "a.sqlite")


def test_a_ledger_that_was_closed_charges_nothing(tmp_path: Path) -> None:
    ledger = again(tmp_path / "a.sqlite")
    ledger.close()
    ledger.close()
    with pytest.raises(InvalidConfig, match="closed"):
        ledger.charge(1, ROUND)


@pytest.mark.parametrize(("point", "n"), [("before", 0), ("inserted", 0), ("counted", 0), ("committed", 1)])
def test_a_charge_that_is_broken_off_counts_once_it_is_in_the_file(point: str, n: int, tmp_path: Path) -> None:
    broken = True

    def at(reached: str) -> None:
        if broken and reached == f"charge:{point}":
            raise KeyboardInterrupt

    with Ledger("readers", delta=DELTA, path=tmp_path / "a.sqlite", at=at) as ledger:
        with pytest.raises(KeyboardInterrupt):
            ledger.charge(1, ROUND)
        assert len(ledger.entries) == ledger.attempts(1) == n
        broken = False
        assert ledger.charge(1, ROUND).attempt == n
        assert ledger.verify() == n + 1


# -------------------------------------------------------------------------------------------------------- tampering


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE entries SET record = '{}' WHERE number = 1",
        "UPDATE entries SET number = 9 WHERE number = 1",
        "DELETE FROM entries WHERE number = 5",
        "DELETE FROM entries",
        "INSERT OR REPLACE INTO entries VALUES (1, '{}', '')",
        "REPLACE INTO entries SELECT number, '{}', hash FROM entries",
        "INSERT INTO entries VALUES (7, '{}', '')",
        "INSERT INTO entries VALUES (-1, '{}', '')",
        "UPDATE header SET record = '{}'",
        "DELETE FROM header",
        "INSERT OR REPLACE INTO header VALUES (1, '{}', '')",
    ],
)
def test_what_is_written_can_be_neither_changed_nor_taken_away(statement: str, tmp_path: Path) -> None:
    path = filled(tmp_path / "a.sqlite")
    db = sqlite3.connect(path)
    with pytest.raises(sqlite3.IntegrityError, match="a ledger only grows"):
        db.execute(statement)
    db.close()
    assert again(path).verify() == 6


def by_hand(path: Path, *statements: str) -> None:
    """What somebody does who can write the file: triggers off, statements, triggers on again."""
    db = sqlite3.connect(path, isolation_level=None)
    for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
        db.execute(f"DROP TRIGGER {name}")
    for statement in statements:
        db.execute(statement)
    for statement in _SCHEMA:
        if statement.startswith("CREATE TRIGGER"):
            db.execute(statement)
    db.close()


QUIETER = "replace(record, '\"noise_multiplier\":10.0', '\"noise_multiplier\":99.0')"


@pytest.mark.parametrize(
    ("statements", "words"),
    [
        ([f"UPDATE entries SET record = {QUIETER} WHERE number = 2"], "entry 2 does not follow"),
        (["UPDATE entries SET record = 7 WHERE number = 2"], "entry 2 does not follow"),
        (["DELETE FROM entries WHERE number = 3"], "entry 3 does not follow"),
        (["DELETE FROM entries WHERE number = 5"], "some are gone"),
        (["DELETE FROM entries"], "some are gone"),
        (["UPDATE entries SET number = number + 1 WHERE number = 5"], "entry 5 does not follow"),
        (["UPDATE header SET record = replace(record, 'null', '99.0')"], "header is not the one"),
        (["DELETE FROM header"], "header or summary is gone"),
        (["UPDATE summary SET entries = 5"], "summary tells of other entries"),
        (["UPDATE summary SET head = 'x'"], "summary tells of other entries"),
        (["DELETE FROM summary"], "header or summary is gone"),
        ([f"UPDATE charges SET record = {QUIETER}"], "not what its entries add up to"),
        (["UPDATE charges SET n = 0"], "not what its entries add up to"),
        (["UPDATE charges SET n = 'many'"], "not what its entries add up to"),
        (["UPDATE charges SET record = 'x' WHERE n = 1"], "not what its entries add up to"),
        (["DELETE FROM charges"], "not what its entries add up to"),
        (["CREATE TABLE more (one)"], "tables or the triggers"),
        (["CREATE TRIGGER more AFTER INSERT ON entries BEGIN SELECT 1; END"], "tables or the triggers"),
    ],
)
def test_a_row_changed_by_hand_is_found_on_opening_and_by_a_ledger_that_is_open(
    statements: list[str], words: str, tmp_path: Path
) -> None:
    path = filled(tmp_path / "a.sqlite")
    with again(path) as ledger:
        assert ledger.verify() == 6
        by_hand(path, *statements)
        with pytest.raises(PrivacyRefused, match=words) as caught:
            ledger.verify()
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(PrivacyRefused, match=words):
        again(path)
    with pytest.raises(PrivacyRefused, match=words):
        Ledger.open(path)


def test_triggers_that_are_gone_are_missed(tmp_path: Path) -> None:
    path = filled(tmp_path / "a.sqlite")
    db = sqlite3.connect(path)
    db.execute("DROP TRIGGER entries_DELETE")
    db.close()
    with pytest.raises(PrivacyRefused, match="triggers that keep it append-only"):
        again(path)


def test_an_open_ledger_that_was_cut_or_rewritten_charges_nothing(tmp_path: Path) -> None:
    with again(filled(tmp_path / "a.sqlite")) as ledger:
        cut(ledger, 4)
        with pytest.raises(PrivacyRefused, match="some are gone"):
            ledger.charge(9, ROUND)
    with again(filled(tmp_path / "b.sqlite")) as ledger:
        records = [json.loads(record) for record, _ in ledger.records()]
        rewrite(tmp_path / "b.sqlite", [*records[:-1], {**records[-1], "profile": 8}])
        with pytest.raises(PrivacyRefused):
            ledger.check(ROUND)


def rewrite(path: Path, records: list[dict[str, Any]]) -> None:
    """A forger's ledger: any records, and all hashes and sums right."""
    hash, rows = "", []
    for record in records:
        text = json.dumps(record, sort_keys=True, separators=(",", ":"))
        hash = hashlib.sha256((hash + text).encode()).hexdigest()
        rows.append((text.replace("'", "''"), hash))
    counted: dict[tuple[Any, ...], int] = {}
    for record in records[1:]:
        if event := record.get("event"):
            repeat, device = record.get("attempt", 0) > 0, record["kind"] == "participation"
            key = {
                "event": {**event, "count": 1},
                "plan": "" if device else record["plan"],
                "cap": None if device else record["cap"],
                "repeat": False if device else repeat,
                "profile": record["profile"],
            }
            counted[json.dumps(key),] = counted.get((json.dumps(key),), 0) + event["count"]
    by_hand(
        path,
        *(f"DELETE FROM {table}" for table in ("header", "entries", "charges")),
        f"INSERT INTO header VALUES (1, '{rows[0][0]}', '{rows[0][1]}')",
        *(f"INSERT INTO entries VALUES ({n}, '{text}', '{hash}')" for n, (text, hash) in enumerate(rows[1:])),
        *(f"INSERT INTO charges VALUES ('{key}', {n})" for (key,), n in counted.items()),
        f"UPDATE summary SET entries = {len(rows) - 1}, head = '{hash}'",
    )


def cut(ledger: Ledger, n: int) -> None:
    """Only the first n entries, with everything else as it then was."""
    assert ledger.path is not None
    rewrite(ledger.path, [json.loads(record) for record, _ in ledger.records()[: n + 1]])


def test_entries_cut_off_the_end_are_found_with_a_head_noted_earlier_and_only_then(tmp_path: Path) -> None:
    path = filled(tmp_path / "a.sqlite")
    with again(path) as ledger:
        noted, heads = ledger.head, [hash for _, hash in ledger.records()]
        for head in heads:  # every state there ever was is still in the chain
            assert ledger.verify(head) == 6
        cut(ledger, 4)
    with again(path) as ledger:
        assert ledger.verify() == 4  # whole by itself
        assert ledger.verify(heads[4]) == 4
        with pytest.raises(PrivacyRefused, match="entries are gone"):
            ledger.verify(noted)


def test_a_ledger_forged_from_end_to_end_has_not_the_head_that_was_noted(tmp_path: Path) -> None:
    path = filled(tmp_path / "a.sqlite")
    with again(path) as ledger:
        noted = ledger.head
        records = [json.loads(record) for record, _ in ledger.records()]
    records[1]["event"]["noise_multiplier"] = 99.0
    rewrite(path, records)
    with again(path) as ledger:
        assert ledger.verify() == 6
        with pytest.raises(PrivacyRefused, match="not in the chain"):
            ledger.verify(noted)


Change = Callable[[list[dict[str, Any]]], object]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda r: r[0].update(schema_version=2), UnknownMechanism, "ledger version 2 is unknown"),
        (lambda r: r[1].update(group=3), UnknownMechanism, "unknown fields"),  # one that a later version might add
        (lambda r: r[1].pop("round"), UnknownMechanism, "missing"),
        (lambda r: r[1].update(kind="refund"), UnknownMechanism, "'refund' is unknown"),
        (lambda r: r[1]["event"].update(kind="laplace"), UnknownMechanism, "laplace"),
        (lambda r: r[1]["event"].update(schema_version=2), UnknownMechanism, "version 2"),
        (lambda r: r[1]["event"].update(clip=2.0), UnknownMechanism, "unknown fields"),
        (lambda r: r[1].update(event=None), InvalidConfig, "a charge needs an event"),
        (lambda r: r[3].update(attempt=1), PrivacyRefused, "entry 2 is not the next try"),
        (lambda r: r[5].update(attempt=0), PrivacyRefused, "entry 4 is not the next try"),
        (lambda r: r[4].update(round=3), PrivacyRefused, "entry 3 is a release that was not charged"),
        (lambda r: r[3].update(kind="release", event=None), PrivacyRefused, "entry 2 is a release that was not"),
        (lambda r: r[4].update(number=8), PrivacyRefused, "entry 3 has the number of another"),
    ],
)
def test_what_is_not_understood_or_cannot_have_happened_is_refused_though_every_hash_is_right(
    change: Change, error: type[PenchantError], words: str, tmp_path: Path
) -> None:
    path = filled(tmp_path / "a.sqlite")
    with again(path) as ledger:
        records = [json.loads(record) for record, _ in ledger.records()]
    rewrite(path, records)
    assert again(path).verify() == 6  # the forger knows the trade
    change(records)
    rewrite(path, records)
    with pytest.raises(error, match=words):
        again(path)


# -------------------------------------------------------------------------------------------------------- torn files


@pytest.mark.parametrize(
    "fault",
    [
        lambda content: b"",
        lambda content: content[:10],
        lambda content: b"\xff" * len(content),
        lambda content: b"not a ledger at all, but words\n" * 300,
    ],
    ids=["empty", "start", "noise", "words"],
)
def test_what_is_no_ledger_is_refused_and_left_as_it_is(fault: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = filled(tmp_path / "a.sqlite")
    torn = fault(path.read_bytes())
    path.write_bytes(torn)
    for opened in (again, Ledger.open):
        with pytest.raises(MalformedData, match=r"a\.sqlite is .* restore it from a copy$"):
            opened(path)
    assert path.read_bytes() == torn


def test_another_programs_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.sqlite"
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE entries (number, record, hash)")
    db.close()
    with pytest.raises(MalformedData, match="no ledger"):
        again(path)


def test_a_log_whose_ledger_is_gone_is_not_taken_for_a_new_ledgers(tmp_path: Path) -> None:
    (tmp_path / "a.sqlite-wal").write_bytes(b"charges that were not moved over yet")
    with pytest.raises(MalformedData, match=r"a\.sqlite is gone but its log a\.sqlite-wal is here"):
        again(tmp_path / "a.sqlite")
    assert [p.name for p in tmp_path.iterdir()] == ["a.sqlite-wal"]


def test_a_ledger_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    whole = filled(tmp_path / "a.sqlite").read_bytes()
    for size in range(1, len(whole), 509):
        path = tmp_path / f"{size}.sqlite"
        path.write_bytes(whole[:size])
        with pytest.raises(PenchantError) as caught:
            again(path)
        assert isinstance(caught.value, MalformedData | PrivacyRefused)


def places(content: bytes, entry: str) -> Iterator[int]:
    start = content.index(entry.encode())
    yield from range(start, start + len(entry))


@pytest.mark.parametrize("bit", [0, 5, 7])  # the last makes what is no UTF-8
def test_a_bit_that_turned_over_anywhere_in_an_entry_breaks_the_chain(bit: int, tmp_path: Path) -> None:
    path = filled(tmp_path / "a.sqlite")
    whole = path.read_bytes()
    with again(path) as ledger:
        records = ledger.records()
    for record, hash in (records[0], records[1], records[4], records[6]):
        for place in [*list(places(whole, record))[::17], next(places(whole, hash))]:
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
            with pytest.raises(PrivacyRefused):
                again(path)
    path.write_bytes(whole)
    assert again(path).verify() == 6


def test_a_bit_that_turned_over_anywhere_in_the_file_is_found_or_changes_nothing(tmp_path: Path) -> None:
    path = filled(tmp_path / "a.sqlite")
    whole = path.read_bytes()
    found: list[str] = []
    before = Ledger.open(path).records()
    for place in [*range(100), *range(100, len(whole), 83)]:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        try:
            with Ledger.open(path) as ledger:
                assert ledger.records() == before
        except PenchantError as error:
            found.append(str(error))
    assert len(found) > 20
    assert "\n" not in "".join(found)


# ----------------------------------------------------------------------------------------------------------- format

HEADER = (
    '{"app_id":"","budget":null,"created":1000,"delta":1e-05,"neighbours":"add/remove","population":"readers",'
    '"schema_version":1}'
)
FIRST = (
    '{"at_ms":1001,"attempt":0,"cap":1,"content":"","event":{"count":1,"kind":"gaussian","noise_multiplier":10.0,'
    '"schema_version":1},"kind":"charge","model":"m","number":0,"plan":"p","profile":null,"round":1}'
)
# printf '%s' "$HEADER" | sha256sum, and then printf '%s%s' "$THAT" "$FIRST" | sha256sum, with coreutils 9.1
HEADER_HASH = "503904ab601b7fdc6a08e82319260edb418e391115231de3ce044c5885ac980e"
FIRST_HASH = "5b068d1247e84b2bfdde42772fcc42fba6f3e8c257c3130e19745739e463baf1"


def test_version_1_is_written_as_it_always_was(tmp_path: Path) -> None:
    with again(filled(tmp_path / "a.sqlite")) as ledger:
        assert ledger.records()[:2] == [(HEADER, HEADER_HASH), (FIRST, FIRST_HASH)]
        assert ledger.entries[0] == Entry(
            number=0, kind="charge", round=1, attempt=0, event=ROUND, plan="p", cap=1, model="m", at_ms=1001
        )


def test_the_records_are_enough_to_verify_a_ledger_elsewhere(tmp_path: Path) -> None:
    with again(filled(tmp_path / "a.sqlite")) as ledger:
        before = ""
        for record, hash in ledger.records():
            assert hashlib.sha256((before + record).encode()).hexdigest() == hash
            before = hash
        assert before == ledger.head
