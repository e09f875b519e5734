"""Sealed rounds on the server: opened with this round's key alone, and what cannot be opened stops nothing."""

from __future__ import annotations

import gc
from collections.abc import Callable

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from penchant.common.arrays import read_npy
from penchant.common.artifacts.sealing import RoundKey, RoundOpener, seal
from penchant.common.artifacts.signing import Certificate, Envelope, SigningKey
from penchant.common.wire import Order, Reply
from penchant.server._flower import Sealing, server_app
from penchant.server.rounds import Rounds
from penchant.simulations._flower import run_local
from tests.system.fleet_app import N_USERS, host, new_rounds

ROOT, RELEASE = SigningKey.generate(), SigningKey.generate()
CERTIFICATE = Certificate(
    app_id="films", public_key=RELEASE.public, serial=1, not_before_ms=0, not_after_ms=1 << 50
).signed(ROOT)
SEALING = Sealing(app_id="films", key=RELEASE, certificate=CERTIFICATE)
Answer = Callable[[Order, dict[str, np.ndarray]], RecordDict]
heard: list[Order] = []


def sealed(order: Order, total: dict[str, np.ndarray]) -> RecordDict:
    statement = Envelope.from_bytes(order.round_key.encode())
    certificate = Certificate.read(Envelope.from_bytes(order.certificate.encode()), ROOT.public)
    told = seal(total, statement, RoundKey.read(statement, certificate.public_key))
    return RecordDict({"sealed": ArrayRecord({"sum": Array(np.frombuffer(told, np.uint8))})})


def plain(order: Order, total: dict[str, np.ndarray]) -> RecordDict:
    return RecordDict({"sum": ArrayRecord({name: Array(values) for name, values in total.items()})})


def changed(order: Order, total: dict[str, np.ndarray]) -> RecordDict:
    data = bytearray(read_npy(sealed(order, total).array_records["sealed"]["sum"].data).tobytes())
    data[-1] ^= 1
    return RecordDict({"sealed": ArrayRecord({"sum": Array(np.frombuffer(bytes(data), np.uint8))})})


def for_the_first_round(order: Order, total: dict[str, np.ndarray]) -> RecordDict:
    return sealed(heard[0], total)


def short(order: Order, total: dict[str, np.ndarray]) -> RecordDict:
    return RecordDict({"sealed": ArrayRecord({"sum": Array(np.zeros(3, np.uint8))})})


def nodes(*ways: Answer) -> ClientApp:
    """Three devices, the first honest and the others each in a way of its own."""
    app = ClientApp()

    @app.query()
    def enrol(message: Message, context: Context) -> Message:
        here = MetricRecord({"partition": int(context.node_config["partition-id"])})
        return Message(RecordDict({"enrolment": here}), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        place = int(context.node_config["partition-id"])
        order = Order.from_flat(dict(message.content.config_records["order"]))
        heard.append(order)
        state = {name: read_npy(v.data) for name, v in message.content.array_records["state"].items()}
        total = dict(host(place).answer(order, state))
        content = (sealed, *ways)[place](order, total)
        content["diagnostics"] = MetricRecord({"round": order.round, "attempt": order.attempt, "users": 1})
        return Message(content, reply_to=message)

    return app


def play(run: Rounds, app: ClientApp, sealing: Sealing | None = SEALING) -> Rounds:
    heard.clear()
    run_local(server_app(lambda: run, lambda record, run: None, gather_s=0.0, sealing=sealing), app, N_USERS)
    return run


def by_hand(*places: int) -> Rounds:
    run = new_rounds()
    hosts = [host(place) for place in range(N_USERS)]
    while run.n_left:
        orders, state = run.open(), run.learner.released(run.state)
        run.close(
            Reply(node=u, round=o.round, attempt=o.attempt, arrays=hosts[u].answer(o, state))
            for u, o in orders.items()
            if u in places
        )
    return run


def test_sealed_rounds_release_what_unsealed_ones_do() -> None:
    run = play(new_rounds(), nodes(sealed, sealed))
    assert [record.answered for record in run.progress.records] == [N_USERS, N_USERS]
    expected = by_hand(0, 1, 2).state
    for name in expected:
        np.testing.assert_array_equal(run.state[name], expected[name], err_msg=name)


@pytest.mark.parametrize(
    ("way", "why"), [(plain, "unsealed"), (changed, "sealed for another round"), (short, "sealed for another round")]
)
def test_an_answer_that_cannot_be_opened_is_left_out_and_the_round_goes_on(way: Answer, why: str) -> None:
    run = play(new_rounds(), nodes(sealed, way))
    assert [(r.answered, dict(r.refused)) for r in run.progress.records] == [(2, {why: 1})] * 2
    expected = by_hand(0, 1).state
    for name in expected:
        np.testing.assert_array_equal(run.state[name], expected[name], err_msg=name)


def test_what_was_sealed_for_an_earlier_round_opens_in_no_later_one() -> None:
    run = play(new_rounds(), nodes(sealed, for_the_first_round))
    assert [record.answered for record in run.progress.records] == [3, 2]


def openers() -> list[RoundOpener]:
    """Every one in this process that something still holds."""
    gc.collect()
    return [found for found in gc.get_objects() if type(found) is RoundOpener]


def test_a_round_has_a_key_of_its_own_and_nothing_keeps_it_afterwards() -> None:
    others = openers()  # of other tests, in this process
    play(new_rounds(), nodes(sealed, sealed))
    keys = {Envelope.from_bytes(order.round_key.encode()).sha256 for order in heard}
    assert len(keys) == 2  # one a round, whichever node
    assert not [found for found in openers() if all(found is not other for other in others)]


def test_a_server_that_seals_nothing_sends_orders_without_a_key() -> None:
    play(new_rounds(), nodes(plain, plain), sealing=None)
    assert {order.round_key for order in heard} == {""}
