"""A device enrols, takes part when its person agreed and the moment allows, and what is spent outlives a forget."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from penchant.client import Client, Conditions, RoundPolicy
from penchant.client import _membership as membership
from penchant.client._membership import Reports
from penchant.client._schema import TOMBSTONE
from penchant.client._transport import Answer, Content, Sum, Task
from penchant.common.artifacts import enrolment
from penchant.common.artifacts.bundle import Bundle
from penchant.common.artifacts.distribution_pb2 import EnrolRequest, EnrolResponse, RevokeRequest, RevokeResponse
from penchant.common.artifacts.sealing import RoundOpener
from penchant.common.artifacts.signing import Certificate
from penchant.common.errors import (
    InvalidConfig,
    PenchantError,
    PrivacyRefused,
    StoreFull,
    Unreachable,
    UntrustedArtifact,
)
from penchant.common.learners import registry
from penchant.common.learners.contract import State
from penchant.common.privacy.plan import PrivacyPlan, SumSpec
from penchant.common.streams import Streams
from penchant.common.wire import Order
from penchant.simulations.plans import federated
from penchant.simulations.settings import SimulationConfig, rows
from tests.certificates import Tls, tls
from tests.client.apps import CATALOGUE, DAY, NOW, Operator

OPERATOR = Operator()
SETTINGS = {"head": 6, "window": 3, "dims": 2}
PLAN = PrivacyPlan(
    unit="user",
    n_users=100,
    delta=1e-5,
    sampling="none",
    cohort=50,
    sums=(SumSpec(name="counts", rounds=4, clip_norm=1.0, noise_multiplier=2.0),),
    max_participations=2,
)
ALWAYS = Conditions(idle=lambda: True, charging=lambda: True, unmetered=lambda: True)


class Registrar:
    """The operator's Enrolment service: takes the token "good" once, and proofs that hold."""

    def __init__(self, authority: Tls) -> None:
        self.keys: list[bytes] = []
        self.plan = PLAN
        self.tokens = {"good", "again"}
        self._server = grpc.server(ThreadPoolExecutor(2))
        methods = {
            "Enrol": grpc.unary_unary_rpc_method_handler(
                self._enrol, EnrolRequest.FromString, EnrolResponse.SerializeToString
            ),
            "Revoke": grpc.unary_unary_rpc_method_handler(
                self._revoke, RevokeRequest.FromString, RevokeResponse.SerializeToString
            ),
        }
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("penchant.v1.Enrolment", methods),))
        credentials = grpc.ssl_server_credentials([(authority.private_key, authority.chain)])
        self.port = self._server.add_secure_port("127.0.0.1:0", credentials)
        self._server.start()

    def stop(self) -> None:
        self._server.stop(0).wait()

    def _enrol(self, asked: EnrolRequest, context: grpc.ServicerContext) -> EnrolResponse:
        try:
            message = enrolment.enrol_message(asked.app_id, asked.population, asked.token)
            enrolment.check_proof(asked.node_key, asked.proof, message)
        except PenchantError:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "")
        if asked.token not in self.tokens:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "")
        self.tokens.discard(asked.token)
        self.keys.append(asked.node_key)
        return EnrolResponse(place=3, plan=self.plan.to_json())

    def _revoke(self, asked: RevokeRequest, context: grpc.ServicerContext) -> RevokeResponse:
        enrolment.check_proof(asked.node_key, asked.proof, enrolment.revoke_message(asked.app_id, asked.population))
        self.keys.remove(asked.node_key)
        return RevokeResponse()


class Fleet:
    """The server's rounds, in memory: every open round asks this device."""

    def __init__(self) -> None:
        self.tasks: list[Order] = []
        self.openers: list[RoundOpener] = []
        self.answers: list[Answer] = []
        self.state: State = {"popularity": np.zeros(60, np.float32)}
        self.task: tuple[str, Mapping[str, Any]] = ("cooccurrence", SETTINGS)

    def open_round(self, number: int, plan: PrivacyPlan = PLAN, *, serial: int = 1) -> None:
        opener = RoundOpener(
            OPERATOR.release, app_id="films", population="default", plan=plan.digest, round=number, attempt=0
        )
        certificate = Certificate(
            app_id="films",
            public_key=OPERATOR.release.public,
            serial=serial,
            not_before_ms=NOW - DAY,
            not_after_ms=NOW + 365 * DAY,
        ).signed(OPERATOR.root)
        self.openers.append(opener)
        self.tasks.append(
            Order(
                round=number,
                attempt=0,
                plan=plan,
                learner=self.task[0],
                settings=self.task[1],
                users=(0,),
                round_key=opener.statement.to_bytes().decode(),
                certificate=certificate.to_bytes().decode(),
            )
        )

    def join(self) -> int:
        return 11

    def pull(self) -> Task | None:
        return Task(app="films/rounds", kind="train", handle=self.tasks.pop(0)) if self.tasks else None

    def fetch(self, task: Task) -> Content:
        return Content(order=task.handle.to_flat(), state=self.state)

    def reply(self, task: Task, answer: Answer) -> None:
        self.answers.append(answer)

    def heartbeat(self) -> None: ...

    def leave(self) -> None: ...

    def close(self) -> None: ...


class World:
    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        authority = tls()
        self.registrar, self.fleet, self.state = Registrar(authority), Fleet(), tmp_path / "state"
        monkeypatch.setattr(membership, "fleet", lambda app, key: lambda node_id: self.fleet)
        self.bundle = tmp_path / "films.bundle"
        self.app = replace(
            OPERATOR.app,
            fleet="127.0.0.1:1",
            enrolment=f"127.0.0.1:{self.registrar.port}",
            ca=authority.ca.decode(),
            publisher="films/rounds",
        )
        self.sign(PLAN)

    def sign(self, plan: PrivacyPlan, **task: Any) -> None:
        """Ships a bundle whose release is of this plan."""
        promised, model = plan.guarantee(), OPERATOR.model(0)
        assert promised is not None
        offer = OPERATOR.offer(1, model, plan=plan.to_json(), guarantee=asdict(promised), **task)
        Bundle.write(self.bundle, self.app, OPERATOR.root, offer, catalogue=CATALOGUE, model=model)

    def device(self, **options: Any) -> Client:
        given: dict[str, Any] = {"trust": "server", "conditions": ALWAYS, "policy": RoundPolicy(), **options}
        return Client.open(self.state, bundle=self.bundle, now_ms=lambda: NOW, **given)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    made = World(tmp_path, monkeypatch)
    yield made
    made.registrar.stop()


@pytest.fixture
def me(world: World) -> Iterator[Client]:
    with world.device() as client:
        for i in (4, 7, 4, 9):
            client.observe(f"film:{i}", "watch")
        yield client


def test_a_device_takes_part_and_says_what_left(world: World, me: Client) -> None:
    me.enrol("good")
    world.fleet.open_round(1)
    found = me.sync(10)
    assert (found.round, found.reason) == (1, "")
    (answer,) = world.fleet.answers
    assert isinstance(answer, Sum)
    assert isinstance(answer.content, bytes)
    sums = world.fleet.openers[0].open(answer.content)
    assert 0 < sum(float((values**2).sum()) for values in sums.values()) <= 1.0
    privacy = me.privacy()
    (left,) = privacy.left
    assert (left.round, left.sealed, left.plan, left.n_bytes) == (1, True, PLAN.digest, len(answer.content))
    assert "unit user" in left.guarantee
    assert (privacy.participations, privacy.cap, privacy.budget_left) == (1, 2, 1)
    assert "sealed" in privacy.seen_by
    assert me.export()["left"][0]["round"] == 1


def test_each_no_has_its_reason_and_nothing_leaves(world: World, me: Client) -> None:
    world.fleet.open_round(1)
    assert me.sync(1).reason == "not_enrolled"
    me.enrol("good")
    me.agree("nobody")
    assert me.sync(1).reason == "no_consent"
    me.agree("own device")
    assert me.sync(1).reason == "untrusted_server"
    me.close()
    with world.device(conditions=None) as again:
        again.agree("server")
        assert again.sync(1).reason == "not_idle"
        assert again.privacy().left == ()
    assert world.fleet.answers == []


def test_the_plans_cap_ends_it_also_over_a_restart_and_a_forget(world: World, me: Client) -> None:
    me.enrol("good")
    world.fleet.open_round(1)
    assert me.sync(10).round == 1
    me.close()
    with world.device() as again:
        world.fleet.open_round(2)
        assert again.sync(10).round == 2
        world.fleet.open_round(3)
        assert again.sync(1).reason == "cap_reached"
        receipt = again.forget()
    assert (receipt.kept["participations"], receipt.kept["last_round"]) == (2, 2)
    assert "stays spent" in receipt.lost
    with world.device() as anew:
        assert anew.privacy().left == ()
        assert "2 contributions left before it" in anew.privacy().seen_by
        anew.enrol("again")
        assert anew.sync(1).reason == "cap_reached"
        assert anew.privacy().budget_left == 0
    assert len(world.fleet.answers) == 2
    assert len(set(world.registrar.keys)) == 2  # a new key: nothing ties the two together but this device's ledger


def test_a_round_that_was_charged_and_left_nothing_is_not_told_as_one_that_left(world: World, me: Client) -> None:
    me.enrol("good")
    world.fleet.open_round(1)
    assert me.sync(10).round == 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reports, "append", _full)  # charged, and not written down: so it does not leave
        world.fleet.open_round(2)
        assert me.sync(10).reason == "failed"
    assert len([one for one in world.fleet.answers if isinstance(one, Sum)]) == 1
    said = me.privacy().seen_by
    assert said.startswith("the process that summed each round")
    assert said.endswith("; 1 more round was charged, and nothing left")
    me.close()
    with contextlib.closing(sqlite3.connect(world.state / "store.db", isolation_level=None)) as db:
        db.execute("DELETE FROM records WHERE id = 0")
    with world.device() as again:  # now a report may have been lost
        assert again.privacy().seen_by.endswith("unless the report was lost with a damaged store")
        again.forget()
    with world.device() as anew:
        assert anew.privacy().seen_by.endswith(": at most 2 contributions left before it")
    (world.state / TOMBSTONE).write_bytes(b"?")
    with world.device() as anew:
        assert anew.privacy().seen_by.endswith(": at most 2 contributions left before it")


def _full(journal: Reports, report: object) -> None:
    raise StoreFull("the disk is full")


def test_a_salvage_gives_back_nothing_of_what_was_spent(world: World, me: Client) -> None:
    me.enrol("good")
    world.fleet.open_round(1)
    assert me.sync(10).round == 1
    me.forget()
    with world.device() as again:
        again.enrol("again")
        world.fleet.open_round(2)
        assert again.sync(10).round == 2
        again.observe("film:1", "watch")
    outside = {name: (world.state / name).read_bytes() for name in (membership.LEDGER, membership.PLANS, TOMBSTONE)}
    with contextlib.closing(sqlite3.connect(world.state / "store.db", isolation_level=None)) as db:
        db.execute("DELETE FROM records")  # the place in the roster, every report, the state
    assert Client.salvage(world.state).lost
    assert outside == {name: (world.state / name).read_bytes() for name in outside}
    with world.device() as anew:
        world.registrar.tokens.add("good")
        anew.enrol("good")
        anew.agree("server")
        assert anew.privacy().budget_left == 0
        world.fleet.open_round(3)
        assert anew.sync(1).reason == "cap_reached"
    assert len(world.fleet.answers) == 2


def test_what_stays_after_a_forget_says_nothing_of_what_was_done(world: World, me: Client) -> None:
    me.enrol("good")
    world.fleet.open_round(1)
    me.sync(10)
    me.forget()
    left = {path.name: path.read_bytes() for path in world.state.rglob("*") if path.is_file()}
    assert not any(word in data for data in left.values() for word in (b"film:", b"watch", b"BEGIN PRIVATE KEY"))
    assert membership.LEDGER in left


def test_forgetting_everything_asks_the_server_to_take_the_device_out(world: World, me: Client) -> None:
    me.enrol("good")
    world.fleet.open_round(1)
    me.sync(10)
    receipt = me.forget(everything=True)
    assert receipt.revoked is True
    assert "budget" in receipt.lost
    assert world.registrar.keys == []
    assert {path.name for path in world.state.rglob("*") if path.is_file()} <= {"store.lock"}


def test_forgetting_does_not_wait_for_a_server_that_is_away(world: World, me: Client) -> None:
    me.enrol("good")
    world.registrar.stop()
    assert me.forget(everything=True).revoked is False


def test_a_token_that_is_not_taken_and_a_server_that_is_away_are_typed(world: World, me: Client) -> None:
    with pytest.raises(UntrustedArtifact, match="token"):
        me.enrol("used up")
    world.registrar.stop()
    with pytest.raises(Unreachable):
        me.enrol("good", deadline_s=1.0)
    assert me.sync(1).reason == "not_enrolled"


def test_an_app_without_rounds_says_so(tmp_path: Path) -> None:
    with Client.open(tmp_path / "s", bundle=OPERATOR.bundle(tmp_path / "a.bundle"), now_ms=lambda: NOW) as me:
        with pytest.raises(InvalidConfig, match="no rounds"):
            me.enrol("good")
        assert not me.start()
        assert me.sync(1).reason == "no_fleet"


def test_withdrawing_stops_the_background(world: World, me: Client) -> None:
    me.enrol("good")
    assert me.start()
    assert not me.start()
    world.fleet.open_round(1)
    until(lambda: bool(me.privacy().left))
    me.agree("nobody")
    world.fleet.open_round(2)
    me.stop()
    assert [one.round for one in me.privacy().left] == [1]
    assert len(world.fleet.answers) == 1


def test_a_plan_of_another_population_is_not_enrolled_under(world: World, me: Client) -> None:
    world.registrar.plan = replace(PLAN, population="others")
    with pytest.raises(PenchantError, match="another population"):
        me.enrol("good")


def test_a_plan_that_nobody_signed_is_not_enrolled_under(world: World, me: Client) -> None:
    world.registrar.plan = replace(PLAN, max_participations=4)
    with pytest.raises(PrivacyRefused, match="signed"):
        me.enrol("good")
    world.fleet.open_round(1, world.registrar.plan)
    assert me.sync(1).reason == "not_enrolled"


def test_a_no_holds_though_it_cannot_be_written_down(world: World, me: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    me.enrol("good")
    assert me.start()
    until(lambda: me._member is not None)

    def full(name: str, value: bytes) -> None:
        raise StoreFull("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(me._store, "put", full)
        with pytest.raises(StoreFull):
            me.agree("nobody")
        world.fleet.open_round(1)
        time.sleep(0.3)
        assert me.sync(1).reason == "no_consent"
    me.stop()
    assert world.fleet.answers == []


def test_a_start_and_a_sync_at_once_make_one_line_that_a_no_reaches(
    world: World, me: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    me.enrol("good")
    made: list[object] = []

    def slow(app: object, key: bytes) -> Callable[[int | None], Fleet]:
        made.append(app)
        time.sleep(0.3)
        return lambda node_id: world.fleet

    monkeypatch.setattr(membership, "fleet", slow)
    threads = [threading.Thread(target=me.start), threading.Thread(target=me.sync, args=(1.0,))]
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    me.agree("nobody")  # while it is made
    for thread in threads:
        thread.join()
    world.fleet.open_round(1)
    time.sleep(0.3)
    me.stop()
    assert len(made) == 1
    assert world.fleet.answers == []


def test_a_start_of_the_app_undoes_no_withdrawal(world: World, me: Client) -> None:
    me.agree("nobody")
    me.close()
    with world.device(trust="server") as again:
        assert again.trust == "nobody"


def test_a_damaged_ledger_keeps_nobody_from_being_forgotten(world: World, me: Client) -> None:
    me.enrol("good")
    world.fleet.open_round(1)
    assert me.sync(10).round == 1
    me.close()
    (world.state / membership.LEDGER).write_bytes(b"no ledger")
    with world.device() as again:
        assert again.sync(1).reason == "failed"
        receipt = again.forget(everything=True)
    assert receipt.key_destroyed
    assert {path.name for path in world.state.rglob("*") if path.is_file()} <= {"store.lock"}


def test_many_enrolments_keep_nobody_from_being_forgotten(world: World, me: Client) -> None:
    member = me._membership()
    for k in range(2, 40):
        member.joined(3, replace(PLAN, max_participations=k, sums=(replace(PLAN.sums[0], rounds=k),)).to_json())
    assert me.forget().key_destroyed
    assert (world.state / membership.PLANS).exists()


def test_the_newest_release_key_that_a_round_showed_is_remembered(world: World, me: Client) -> None:
    me.enrol("good")
    world.fleet.open_round(1, serial=5)
    assert me.sync(10).round == 1
    me.close()
    with world.device() as again:
        world.fleet.open_round(2, serial=1)
        assert again.sync(1).reason == "untrusted_key"


def test_a_budget_below_what_a_round_costs_keeps_the_device_out(world: World) -> None:
    with world.device(policy=RoundPolicy(budget=0.01)) as me:
        me.observe("film:1")
        me.enrol("good")
        world.fleet.open_round(1)
        assert me.sync(1).reason == "budget_exhausted"
    assert world.fleet.answers == []


def until(holds: Callable[[], bool]) -> None:
    for _ in range(200):
        if holds():
            return
        time.sleep(0.05)
    raise AssertionError("not within ten seconds")


def test_a_device_that_trusts_itself_alone_sends_what_its_own_noise_covers(world: World) -> None:
    asked = SimulationConfig(unit="interaction", learner="fedavg", rounds=2, cohort=16, epsilon=8.0, delta=1e-5)
    (row,) = [r for r in rows(asked) if r.name == "fedavg+opacus"]
    made = federated(row, asked, 100)
    learner = registry.build(made.learner, made.settings, CATALOGUE)
    state = learner.released(learner.init(Streams(0)))
    world.sign(made.plan, learner=made.learner, settings=made.settings)
    world.registrar.plan = made.plan
    world.fleet.state, world.fleet.task = state, (made.learner, made.settings)
    with world.device(trust="own device") as me:
        for i in range(40):
            me.observe(f"film:{i}", "watch")
        me.enrol("good")
        world.fleet.open_round(1, made.plan)
        found = me.sync(60)
        assert (found.round, found.reason, found.why) == (1, "", "")
        privacy = me.privacy()
        assert "unit interaction" in privacy.left[0].guarantee
        assert "unit interaction" in privacy.spent
        assert "trust own device" in privacy.spent
    (answer,) = world.fleet.answers
    assert isinstance(answer, Sum)
    assert isinstance(answer.content, bytes)
    sums = world.fleet.openers[0].open(answer.content)
    assert sums.keys() == learner.shapes(state).keys()
    assert all(np.isfinite(values).all() for values in sums.values())
    # Rows of items that the person never met as well: noise is everywhere. It lies on a grid, where one number of some
    # thousand is 0; a whole row of 32 is by chance in fewer than 1 of 1e90 runs.
    assert (sums["item.weight"] != 0).any(axis=1).all()
