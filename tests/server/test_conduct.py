"""Rounds in production go on whatever the transport does, and end where the privacy layer refuses."""

from __future__ import annotations

import gc
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError

from penchant.common.artifacts.sealing import RoundKey, seal
from penchant.common.artifacts.signing import Certificate, Envelope
from penchant.common.privacy.ledger import Ledger
from penchant.common.streams import Streams
from penchant.common.wire import Order
from penchant.server._flower import Sealing, Unanswered, conduct, exchange
from penchant.server.folder import RoundSettings, Settings
from penchant.server.rounds import REFUSALS, RoundRecord, Rounds
from penchant.simulations._flower import LocalGrid
from tests.server.test_rounds import LEARNER, PLAN, N
from tests.server.test_sealing import CERTIFICATE, RELEASE, ROOT

Arrays = dict[str, np.ndarray]
NODES = {0: 1, 1: 2, 2: 3}
"""Places to Flower's numbers: three devices of one person each, of the six that the plan counts."""


class Here:
    """A folder's rounds, kept in memory."""

    key, certificate = RELEASE, CERTIFICATE

    def __init__(self, *, budget: float | None = None, stop_after: int = 4, **settings: Any) -> None:
        self.settings = Settings(
            app_id="films", rounds=RoundSettings(**{"deadline_s": 5.0, "retry_s": 0.001, **settings})
        )
        self.ledger = Ledger("default", delta=1e-5, budget=budget)
        self.stop_after, self.held, self.published = stop_after, "", 0
        self.tries: Counter[int] = Counter()
        self.records: list[RoundRecord] = []
        self.made = self.fresh()

    def fresh(self) -> Rounds:
        return Rounds(
            learner=LEARNER,
            settings={},
            plan=PLAN,
            roster=(1,) * N,
            ledger=self.ledger,
            streams=Streams(1),
            watch=self.watch,
            attempts=lambda number: self.tries[number],
            minimum=self.settings.rounds.minimum,
        )

    def watch(self, phase: str, record: RoundRecord) -> None:
        if phase in ("released", "abandoned"):
            self.tries[record.round] += 1
            self.records.append(record)

    def go_on(self) -> bool:
        return not self.held and self.made.n_left > 0 and len(self.records) < self.stop_after

    def hold(self, why: str) -> None:
        self.held = why

    def nodes(self) -> dict[int, int]:
        return NODES

    def rounds(self) -> Rounds:
        return self.made

    def publish(self) -> None:
        self.published += 1


def sealed(order: Order, total: Arrays) -> RecordDict:
    statement = Envelope.from_bytes(order.round_key.encode())
    certificate = Certificate.read(Envelope.from_bytes(order.certificate.encode()), ROOT.public)
    told = seal(total, statement, RoundKey.read(statement, certificate.public_key))
    return RecordDict({"sealed": ArrayRecord({"sum": Array(np.frombuffer(told, np.uint8))})})


def replied(message: Message, order: Order, total: Arrays) -> Message:
    content = sealed(order, total)
    content["diagnostics"] = MetricRecord({"round": order.round, "attempt": order.attempt, "users": 1})
    return Message(content, reply_to=message)


Way = Callable[[Message, Order, Arrays], Message]


def app(*ways: Way) -> ClientApp:
    """Devices 1, 2, …, each in its way."""
    found = ClientApp()

    @found.train()
    def train(message: Message, context: Context) -> Message:
        order = Order.from_flat(dict(message.content.config_records["order"]))
        place = int(context.node_config["partition-id"])
        total = {"seen": np.bincount([place], minlength=N).astype(np.float32)}
        return ways[place](message, order, total)

    return found


def play(here: Here, grid: LocalGrid) -> Here:
    conduct(grid, here, sleep=lambda seconds: time.sleep(1e-4))
    grid.close()
    return here


def test_rounds_are_run_until_none_is_left_and_each_is_published() -> None:
    here = play(Here(), LocalGrid(app(replied, replied, replied), 3))
    assert [(r.round, r.attempt, r.answered, dict(r.refused)) for r in here.records] == [
        (r, 0, 3, {}) for r in range(1, 5)
    ]
    assert here.published == 1 + 4


def changed(change: Callable[[Arrays], Arrays]) -> Way:
    return lambda message, order, total: replied(message, order, change(total))


def error(code: int) -> Way:
    return lambda message, order, total: Message(Error(code, "why"), reply_to=message)


def without(part: str) -> Way:
    def way(message: Message, order: Order, total: Arrays) -> Message:
        content = sealed(order, total)
        content["diagnostics"] = MetricRecord({"round": order.round, "attempt": order.attempt})
        del content[part]
        return Message(content, reply_to=message)

    return way


def another(**fields: int) -> Way:
    def way(message: Message, order: Order, total: Arrays) -> Message:
        content = sealed(order, total)
        content["diagnostics"] = MetricRecord({"round": order.round, "attempt": order.attempt, **fields})
        return Message(content, reply_to=message)

    return way


FAULTS: dict[str, tuple[Way, str]] = {
    "wrong keys": (changed(lambda total: {"other": total["seen"]}), "malformed"),
    "a key too many": (changed(lambda total: {**total, "other": total["seen"]}), "malformed"),
    "nothing": (changed(lambda total: {}), "malformed"),
    "wrong shape": (changed(lambda total: {"seen": np.zeros(N + 1, np.float32)}), "malformed"),
    "wrong dtype": (changed(lambda total: {"seen": np.zeros(N, np.int64)}), "malformed"),
    "NaN": (changed(lambda total: {"seen": np.full(N, np.nan, np.float32)}), "malformed"),
    "infinite": (changed(lambda total: {"seen": np.full(N, np.inf, np.float32)}), "malformed"),
    "oversized": (changed(lambda total: {"seen": np.zeros(1 << 20, np.float32)}), "malformed"),
    "of another round": (another(round=99), "wrong round"),
    "of an earlier try": (another(attempt=7), "wrong round"),
    "without its sum": (without("sealed"), "unsealed"),
    "without its round": (without("diagnostics"), "unreadable"),
    "of a device that refuses": (error(1000), "refused"),
    "of a device that is gone": (error(5), "unavailable"),
    "of one whose objects are lost": (error(3), "lost"),
    "of an app that raised": (error(2), "error"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_reply_that_is_wrong_is_counted_by_reason_and_changes_neither_noise_nor_divisor(fault: str) -> None:
    way, why = FAULTS[fault]
    assert why in REFUSALS
    here = play(Here(stop_after=1), LocalGrid(app(replied, replied, way), 3))
    assert [(r.answered, dict(r.refused), r.abandoned) for r in here.records] == [(2, {why: 1}, "")]
    two = play(Here(stop_after=1), LocalGrid(app(replied, replied, error(2)), 3))
    np.testing.assert_array_equal(here.made.state["seen"], two.made.state["seen"])
    assert LEARNER.divisor == PLAN.cohort


class Faulty(LocalGrid):
    """A grid whose calls fail as Flower's do."""

    def __init__(self, *, spoiled: tuple[int, ...] = (), pulls_fail: int = 0, silent: bool = False) -> None:
        super().__init__(app(replied, replied, replied), 3)
        self.spoiled, self.pulls_fail, self.silent, self.lists_fail = spoiled, pulls_fail, silent, 0
        self.at_once = 0

    def get_node_ids(self) -> Iterable[int]:
        self.lists_fail -= 1
        if self.lists_fail >= 0:
            raise OSError("no answer")
        return super().get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        batch = list(messages)
        self.at_once = max(self.at_once, len(batch))
        if batch[0].metadata.dst_node_id in self.spoiled:
            raise ObjectPushError("abc", 1, "session")
        return super().push_messages(batch)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        self.pulls_fail -= 1
        if self.pulls_fail >= 0:
            raise OSError("no answer")
        return [] if self.silent else super().pull_messages(message_ids)


def test_a_node_that_spoils_the_objects_of_its_message_spoils_no_other() -> None:
    here = play(Here(stop_after=2), grid := Faulty(spoiled=(2,)))
    assert [(r.answered, dict(r.refused)) for r in here.records] == [(2, {"unsent": 1})] * 2
    assert grid.at_once == 1


def test_a_server_that_fails_for_a_while_delays_a_round_and_ends_none() -> None:
    here = play(Here(stop_after=2), Faulty(pulls_fail=5))
    assert [(r.answered, r.abandoned) for r in here.records] == [(3, ""), (3, "")]


def test_a_round_that_nobody_could_be_asked_for_is_abandoned_uncharged_and_tried_again() -> None:
    here = play(Here(stop_after=2), Faulty(spoiled=(1, 2, 3)))
    found = [(r.round, r.attempt, r.abandoned) for r in here.records]
    assert found == [(1, 0, "too few answers"), (1, 1, "too few answers")]
    assert not here.ledger.entries
    assert here.made.progress.done == 0


def test_a_round_waits_for_its_minimum_of_devices_before_it_begins() -> None:
    grid, waits = Faulty(), list[float]()
    grid.lists_fail = 3
    here = Here(stop_after=1)
    conduct(grid, here, sleep=waits.append)
    assert waits[:3] == [0.001] * 3
    assert here.records[0].answered == 3


class Clock:
    """Goes on only where somebody waits."""

    def __init__(self) -> None:
        self.s = 0.0

    def now(self) -> float:
        return self.s

    def sleep(self, seconds: float) -> None:
        self.s += max(seconds, 1e-3)
        time.sleep(1e-4)


def sent_by(grid: LocalGrid, orders: list[Message], clock: Clock, **more: Any) -> list[Message | Unanswered]:
    return list(exchange(grid, orders, 60.0, now=clock.now, sleep=clock.sleep, **more))


def test_a_silent_round_ends_at_its_deadline_and_no_order_outlives_it() -> None:
    grid, clock = Faulty(silent=True), Clock()
    orders = orders_for(grid)
    assert sent_by(grid, orders, clock) == []
    assert 60.0 <= clock.s <= 60.1
    assert {order.metadata.ttl for order in orders} == {60.0}  # nobody trains on it later


class Coming(Faulty):
    """Devices connect one after another, `every` lookings apart."""

    def __init__(self, every: int, clock: Clock) -> None:
        super().__init__()
        self.looks, self.every, self.clock = 0, every, clock
        self.asked: list[tuple[int, float]] = []

    def get_node_ids(self) -> Iterable[int]:
        self.looks += 1
        return list(super().get_node_ids())[: self.looks // self.every]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        batch = list(messages)
        self.asked += [(message.metadata.dst_node_id, self.clock.s) for message in batch]
        return super().push_messages(batch)


def test_an_order_is_sent_when_its_device_connects_and_none_before_the_minimum_of_drawn_ones_has() -> None:
    clock = Clock()
    grid = Coming(3, clock)
    found = sent_by(grid, orders_for(grid), clock, minimum=2)
    assert [isinstance(one, Message) for one in found] == [True] * 3
    (first, at), (second, then), (third, later) = grid.asked
    assert [first, second, third] == [1, 2, 3]
    assert at == then < later


def test_no_device_spends_a_try_on_a_round_that_too_few_can_be_asked_for() -> None:
    clock = Clock()
    grid = Coming(10**6, clock)
    assert sent_by(grid, orders_for(grid), clock, minimum=1) == [Unanswered(n, "unavailable") for n in (1, 2, 3)]
    assert grid.asked == []


def test_an_answer_in_the_name_of_another_device_is_not_read() -> None:
    class Lying(Faulty):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            found = list(super().pull_messages(message_ids))
            for message in found:
                if message.metadata.src_node_id == 2:
                    message.metadata.__dict__["_src_node_id"] = 3
            return found

    here = play(Here(stop_after=1), Lying())
    assert [(r.answered, dict(r.refused)) for r in here.records] == [(2, {"unreadable": 1})]


def test_answers_are_held_by_nobody_once_they_were_read() -> None:
    grid = Faulty()
    alive: list[int] = []
    seen: list[Any] = []
    for message in exchange(grid, orders_for(grid), 60.0, sleep=lambda seconds: time.sleep(1e-3)):
        seen.append(weakref.ref(message))
        del message
        gc.collect()
        alive.append(sum(one() is not None for one in seen))
    assert len(seen) == 3
    assert max(alive) <= 1


def orders_for(grid: Faulty) -> list[Message]:
    orders = Here().made.open()
    sealing = Sealing(app_id="films", key=RELEASE, certificate=CERTIFICATE)
    opener = sealing.opener(next(iter(orders.values())))
    return [
        Message(
            RecordDict({"order": ConfigRecord(dict(sealing.ask(orders[place], opener).to_flat()))}),
            dst_node_id=number,
            message_type="train",
        )
        for place, number in NODES.items()
    ]


def test_a_spent_budget_holds_the_rounds_and_says_so() -> None:
    here = play(Here(budget=0.1), LocalGrid(app(replied, replied, replied), 3))
    assert "budget" in here.held
    assert [(r.drawn, r.abandoned) for r in here.records] == [(0, "refused for privacy")]


def test_what_our_own_files_refuse_ends_the_process_and_not_in_silence() -> None:
    class Broken(Here):
        def rounds(self) -> Rounds:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        play(Broken(), LocalGrid(app(replied, replied, replied), 3))
