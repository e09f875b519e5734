"""Rounds in production go on whatever the transport does, and end where the privacy layer refuses."""

from __future__ import annotations

import gc
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
    conduct(grid, here, sleep=lambda seconds: None)
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
    assert [(r.round, r.attempt, r.abandoned) for r in here.records] == [
        (1, 0, "too few answers"),
        (1, 1, "too few answers"),
    ]
    assert not here.ledger.entries
    assert here.made.progress.done == 0


def test_a_round_waits_for_its_minimum_of_devices_before_it_begins() -> None:
    grid, waits = Faulty(), list[float]()
    grid.lists_fail = 3
    here = Here(stop_after=1)
    conduct(grid, here, sleep=waits.append)
    assert waits[:3] == [0.001] * 3
    assert here.records[0].answered == 3


def test_a_silent_round_ends_at_its_deadline_and_is_abandoned() -> None:
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    order = next(iter(exchange_orders()))
    grid = Faulty(silent=True)
    assert list(exchange(grid, [order], 60.0, now=lambda: now[0], sleep=sleep)) == []
    assert 60.0 <= now[0] <= 60.1
    assert order.metadata.ttl == 60.0  # nobody trains on it later


def exchange_orders() -> Iterable[Message]:
    grid = Faulty()  # gives this process the identity that a Message needs
    grid.close()
    for number in (1, 2, 3):
        yield Message(RecordDict({"order": ConfigRecord({})}), dst_node_id=number, message_type="train")


def test_what_the_superlink_says_in_place_of_a_node_is_counted_as_that_nodes() -> None:
    class Gone(Faulty):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            found = list(super().pull_messages(message_ids))
            for message in found:
                if message.metadata.src_node_id == NODES[2]:
                    told = Message(Error(5, "Node Unavailable"), reply_to=message)
                    told.metadata.__dict__["_reply_to_message_id"] = message.metadata.reply_to_message_id
                    told.metadata.__dict__["_src_node_id"] = told.metadata.__dict__["_dst_node_id"] = 99
                    message = told
                yield message

    here = play(Here(stop_after=1), Gone())
    assert [(r.answered, dict(r.refused)) for r in here.records] == [(2, {"unavailable": 1})]


@pytest.mark.parametrize("way", [replied, error(2)])
def test_a_second_reply_to_the_same_order_counts_for_nothing(way: Way) -> None:
    class Twice(LocalGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            return [message for message in super().pull_messages(message_ids) for _ in range(2)]

    here = play(Here(stop_after=1), Twice(app(replied, replied, way), 3))
    answered = 3 if way is replied else 2
    refused = here.records[0].refused
    assert here.records[0].answered == answered
    assert refused["duplicate"] == answered
    assert refused.get("error", 0) == 2 * (3 - answered)
    np.testing.assert_array_equal(here.made.state["seen"], one_each(way))


def one_each(way: Way) -> np.ndarray:
    return play(Here(stop_after=1), LocalGrid(app(replied, replied, way), 3)).made.state["seen"]


def test_orders_after_the_deadline_are_not_sent() -> None:
    now = iter([0.0, 0.0, 61.0, 61.0, 61.0])
    grid = Faulty(silent=True)
    found = list(exchange(grid, exchange_orders(), 60.0, now=lambda: next(now, 61.0), sleep=lambda seconds: None))
    assert found == [Unanswered(2), Unanswered(3)]


def test_answers_are_held_by_nobody_once_they_were_read() -> None:
    grid = Faulty()
    alive: list[int] = []
    seen: list[Any] = []
    for message in exchange(grid, orders_for(grid), 60.0, sleep=lambda seconds: None):
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
