"""Every change of a round's phase is told before anything follows from it, and an abandoned round releases nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from penchant.common.errors import BudgetExhausted, InvalidConfig
from penchant.common.privacy.ledger import Ledger
from penchant.common.streams import Streams
from penchant.server.rounds import Phase, RoundRecord, Rounds
from tests.server.test_rounds import LEARNER, PLAN, ROSTER, answer, charges, play, seen


class Watched:
    """Rounds with everything that they told."""

    def __init__(self, *, stop_at: str = "", minimum: int = 0, budget: float | None = None) -> None:
        self.told: list[tuple[Phase, RoundRecord]] = []
        self.ledger = Ledger("default", delta=1e-5, budget=budget)
        self.stop_at, self.tries = stop_at, 0
        self.rounds = Rounds(
            learner=LEARNER,
            settings={},
            plan=PLAN,
            roster=ROSTER,
            ledger=self.ledger,
            streams=Streams(0),
            watch=self.watch,
            attempts=lambda number: self.tries,
            minimum=minimum,
        )

    def watch(self, phase: Phase, record: RoundRecord) -> None:
        self.told.append((phase, record))
        if phase == self.stop_at:
            raise KeyboardInterrupt

    @property
    def phases(self) -> list[str]:
        return [phase for phase, _ in self.told]


def test_a_round_tells_its_phases_in_order_with_what_is_known_by_then() -> None:
    run = Watched()
    record = play(run.rounds)
    assert run.phases == ["planned", "drawn", "training", "aggregating", "charged", "released"]
    assert [(r.drawn, r.answered) for _, r in run.told] == [(0, 0), (6, 0), (6, 0), (6, 3), (6, 3), (6, 3)]
    assert run.told[-1][1] == record
    assert record.abandoned == ""


@pytest.mark.parametrize("phase", ["planned", "drawn", "training", "aggregating"])
def test_what_stops_a_round_before_its_charge_charges_and_releases_nothing(phase: str) -> None:
    run = Watched(stop_at=phase)
    before = seen(run.rounds)
    with pytest.raises(KeyboardInterrupt):
        play(run.rounds)
    assert charges(run.ledger) == []
    np.testing.assert_array_equal(seen(run.rounds), before)


def test_what_stops_a_round_after_its_charge_leaves_it_charged_and_the_next_try_charges_again() -> None:
    run = Watched(stop_at="charged")
    with pytest.raises(KeyboardInterrupt):
        play(run.rounds)
    assert [(r, a) for r, a, *_ in charges(run.ledger)] == [(1, 0)]
    assert [e.kind for e in run.ledger.entries] == ["charge"]
    assert run.rounds.progress.done == 0
    run.stop_at, run.tries = "", 1
    run.rounds.abandon("killed")
    play(run.rounds)
    assert [(r, a) for r, a, *_ in charges(run.ledger)] == [(1, 0), (1, 1)]


def test_a_round_with_too_few_answers_is_abandoned_uncharged_and_its_late_answers_are_of_another_try() -> None:
    run = Watched(minimum=3)
    first = run.rounds.open()
    record = run.rounds.close([answer(0, first[0])])
    assert (record.abandoned, record.answered, run.phases[-1]) == ("too few answers", 1, "abandoned")
    assert charges(run.ledger) == []
    assert run.rounds.progress.done == 0
    run.tries = 1
    second = run.rounds.open()
    late = answer(1, first[1])
    record = run.rounds.close([late, *(answer(shard, order) for shard, order in second.items())])
    assert (record.answered, dict(record.refused), record.abandoned) == (3, {"wrong round": 1}, "")
    assert run.rounds.progress.done == 1


def test_every_answer_is_read_so_that_one_person_more_pushes_nobody_out() -> None:
    run = Watched(minimum=1)
    orders = run.rounds.open()
    replies = iter([answer(shard, order) for shard, order in orders.items()])
    assert run.rounds.close(replies).answered == len(orders)
    assert list(replies) == []


def test_a_round_can_be_given_up_at_any_point_but_once() -> None:
    run = Watched()
    with pytest.raises(InvalidConfig, match="no round"):
        run.rounds.abandon("too early")
    run.rounds.open()
    assert run.rounds.abandon("transport") == run.told[-1][1]
    with pytest.raises(InvalidConfig, match="no round"):
        run.rounds.abandon("twice")
    with pytest.raises(InvalidConfig, match="no round"):
        run.rounds.close([])
    play(run.rounds)
    with pytest.raises(InvalidConfig, match="no round"):
        run.rounds.abandon("after the release")


def test_a_spent_budget_abandons_before_anybody_is_drawn() -> None:
    run = Watched(budget=0.1)
    with pytest.raises(BudgetExhausted):
        run.rounds.open()
    assert run.phases == ["planned"]
    assert replace(run.rounds.abandon("budget"), seconds=0.0) == RoundRecord(
        round=1, attempt=0, sum="seen", abandoned="budget"
    )
