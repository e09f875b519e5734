"""The same run on every engine: by hand, through Flower's apps in this process, and through Flower's engine on Ray."""

from __future__ import annotations

import gc
import math
import socket
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.app.message import Array
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from hypothesis import given, settings
from hypothesis import strategies as st

from penchant.client._flower import client_app
from penchant.client.node import Node
from penchant.common.catalogue import Catalogue
from penchant.common.errors import BudgetExhausted, InvalidConfig, PenchantError
from penchant.common.interactions import Interactions
from penchant.common.learners import registry
from penchant.common.learners.contract import Learner
from penchant.common.privacy import gaussian
from penchant.common.privacy.ledger import Ledger
from penchant.common.privacy.plan import PrivacyPlan, SumSpec
from penchant.common.streams import Streams
from penchant.common.wire import Reply
from penchant.server import _flower as server_side
from penchant.server._flower import AfterRound, server_app
from penchant.server.rounds import RoundRecord, Rounds
from penchant.simulations import engine
from penchant.simulations._flower import LocalGrid, run_flower, run_local
from penchant.simulations.engine import Population, save_population, shard_sizes
from penchant.simulations.plans import Federated

N_USERS, N_ITEMS = 12, 9
CATALOGUE = Catalogue(ids=tuple("abcdefghi"))
PEOPLE = Interactions.of(
    [np.random.default_rng(u).integers(0, N_ITEMS, 1 + u % 7).tolist() for u in range(12)], N_ITEMS
)
SETTINGS = {"head": 6, "window": 3, "dims": 3}

NOISY = PrivacyPlan(
    unit="user",
    n_users=N_USERS,
    delta=1e-5,
    sampling="none",
    cohort=8,
    sums=(
        SumSpec(name="counts", rounds=1, clip_norm=1.0, noise_multiplier=0.5),
        SumSpec(name="matrix", rounds=1, clip_norm=1.0, noise_multiplier=0.3),
    ),
    max_participations=2,
)
EXACT = replace(NOISY, unit="none", sums=tuple(replace(s, noise_multiplier=0.0) for s in NOISY.sums))
LONGER = replace(EXACT, cohort=12, sums=(EXACT.sums[0], replace(EXACT.sums[1], rounds=3)))  # four rounds, cap of two


def rounds(plan: PrivacyPlan, nodes: int = 3, *, ledger: Ledger | None = None) -> Rounds:
    return Rounds(
        learner=registry.build("cooccurrence", SETTINGS, CATALOGUE),
        settings=SETTINGS,
        plan=plan,
        roster=shard_sizes(N_USERS, nodes),
        ledger=ledger or Ledger("default", delta=1e-5),
        streams=Streams(4),
    )


def learners(name: str, options: Mapping[str, Any]) -> Learner:
    return registry.build(name, options, CATALOGUE)


def host(shard: int, nodes: int, plan: PrivacyPlan) -> Node:
    roster = shard_sizes(N_USERS, nodes)
    first = sum(roster[:shard])
    return Node(PEOPLE.select(range(first, first + roster[shard])), learners, Streams(9), plan=plan, first_user=first)


def honest(nodes: int, plan: PrivacyPlan) -> ClientApp:
    """Nodes that are made anew for every message, as in a worker process that never served them before."""
    return client_app(lambda shard: host(shard, nodes, plan))


def play(
    run: Rounds, app: ClientApp | None = None, *, n_nodes: int = 3, after: AfterRound = lambda record, run: None
) -> list[RoundRecord]:
    """The run through both of Flower's apps in this process."""
    server = server_app(lambda: run, after, gather_s=0.0)
    run_local(server, app or honest(n_nodes, run.plan), n_nodes)
    return run.progress.records


def by_hand(run: Rounds, nodes: int = 3, *, absent: Iterable[int] = ()) -> list[RoundRecord]:
    """The run by calling both sides."""
    hosts = [host(shard, nodes, run.plan) for shard in range(nodes)]
    while run.n_left:
        orders, state = run.open(), run.learner.released(run.state)
        run.close(
            Reply(node=shard, round=order.round, attempt=order.attempt, arrays=hosts[shard].answer(order, state))
            for shard, order in orders.items()
            if shard not in absent
        )
    return run.progress.records


def assert_same(a: Mapping[str, Any], b: Mapping[str, Any]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], atol=1e-5, err_msg=name)


def same(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    try:
        assert_same(a, b)
    except AssertionError:
        return False
    return True


def charged(run: Rounds) -> list[tuple[Any, ...]]:
    """Round, try, event, plan and model of each charge; without the time of day."""
    return [(e.round, e.attempt, e.event, e.plan, e.model) for e in run.ledger.entries if e.kind == "charge"]


# ---------------------------------------------------------------------------------------------------------- equal


@pytest.mark.parametrize("plan", [EXACT, NOISY], ids=["exact", "noisy"])
def test_flowers_apps_do_exactly_what_calling_both_sides_does(plan: PrivacyPlan) -> None:
    manual, flower = rounds(plan), rounds(plan)
    by_hand(manual)
    play(flower)
    assert flower.n_left == 0
    assert "vectors" in flower.state
    for name, values in manual.state.items():
        np.testing.assert_array_equal(flower.state[name], values)
    assert charged(flower) == charged(manual)
    np.testing.assert_array_equal(flower.progress.participations, manual.progress.participations)
    skipped = rounds(plan)
    by_hand(skipped, absent=[1])
    assert not same(skipped.state, manual.state)  # one node left out is seen


@pytest.mark.parametrize("plan", [EXACT, NOISY, replace(NOISY, sampling="poisson")], ids=["exact", "noisy", "poisson"])
def test_the_number_of_nodes_changes_nothing(plan: PrivacyPlan) -> None:
    runs = [rounds(plan, nodes) for nodes in (1, 2, 3, 12)]
    for run in runs:
        play(run, n_nodes=run.n_nodes)
        assert_same(run.state, runs[0].state)
        np.testing.assert_array_equal(run.progress.participations, runs[0].progress.participations)


def test_after_round_sees_every_round_once_released_and_charged() -> None:
    seen: list[tuple[int, int, int]] = []

    def after(record: RoundRecord, run: Rounds) -> None:
        seen.append((record.round, run.progress.done, len(charged(run))))

    play(rounds(NOISY), after=after)
    assert seen == [(1, 1, 1), (2, 2, 2)]


def test_a_run_that_is_done_asks_nobody() -> None:
    run = rounds(EXACT)
    by_hand(run)
    play(run, client_app(lambda shard: pytest.fail("a node was asked")))
    assert len(run.progress.records) == 2


# ----------------------------------------------------------------------------------------------------------- caps


def forgetful(record: RoundRecord, run: Rounds) -> None:
    """A server that does not remember who took part."""
    run.progress.participations[:] = 0


def test_the_device_keeps_its_cap_across_rounds_even_where_the_server_forgets() -> None:
    records = play(rounds(LONGER), after=forgetful)
    assert [record.drawn for record in records] == [12] * 4
    assert [record.answered for record in records] == [3, 3, 0, 0]
    assert [dict(record.refused) for record in records] == [{}, {}, {"refused": 3}, {"refused": 3}]


def test_the_cap_of_one_person_does_not_tire_the_others_of_another_node() -> None:
    run = rounds(replace(LONGER, cohort=1), nodes=12)
    records = play(run, n_nodes=12, after=forgetful)
    assert [record.answered for record in records] == [1, 1, 1, 1]


# ---------------------------------------------------------------------------------------------------------- lost


@pytest.mark.parametrize("error", [PenchantError("no room"), RuntimeError("disk"), KeyError("x")])
def test_a_node_that_fails_is_counted_and_the_round_goes_on_without_it(error: Exception) -> None:
    def node(shard: int) -> Node:
        if shard == 1:
            raise error
        return host(shard, 3, run.plan)

    run, without = rounds(NOISY), rounds(NOISY)
    records = play(run, client_app(node))
    by_hand(without, absent=[1])
    assert [dict(record.refused) for record in records] == [{"refused": 1}] * 2
    assert_same(run.state, without.state)
    assert charged(run) == charged(without)


def test_a_node_that_never_came_counts_as_absent() -> None:
    run, without = rounds(NOISY), rounds(NOISY)
    records = play(run, honest(3, run.plan), n_nodes=2)
    by_hand(without, absent=[2])
    assert [record.answered for record in records] == [2, 2]
    assert_same(run.state, without.state)


def test_two_nodes_that_claim_one_part_of_the_roster_stop_the_run() -> None:
    class Twins(LocalGrid):
        def __init__(self) -> None:
            super().__init__(honest(3, NOISY), 3)
            for context in self._contexts.values():
                context.node_config["partition-id"] = 0

    with pytest.raises(PenchantError, match="3 nodes answered"):
        server_side.enrol(Twins(), 1.0)
    assert server_side.enrol(LocalGrid(honest(3, NOISY), 3), 1.0) == {1: 0, 2: 1, 3: 2}


@pytest.mark.parametrize(
    "answer",
    [
        RecordDict({}),
        RecordDict({"enrolment": MetricRecord({})}),
        RecordDict({"enrolment": MetricRecord({"partition": [0, 1]})}),
        RecordDict({"enrolment": MetricRecord({"partition": math.nan})}),
        RecordDict({"enrolment": MetricRecord({"partition": math.inf})}),
        RecordDict({"enrolment": MetricRecord({"partition": 0.5})}),
        RecordDict({"enrolment": ConfigRecord({"partition": "0"})}),
        RecordDict({"enrolment": ConfigRecord({"partition": 0})}),
        RecordDict({"enrolment": ArrayRecord({"partition": Array(np.zeros(1))})}),
        None,
    ],
)
def test_a_node_whose_enrolment_cannot_be_read_counts_as_absent(
    answer: RecordDict | None, caplog: pytest.LogCaptureFixture
) -> None:
    app, good = ClientApp(), honest(3, NOISY)

    @app.query()
    def enrol(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] != 0:
            return good(message, context)
        return Message(Error(7) if answer is None else answer, reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return good(message, context)

    run, without = rounds(NOISY), rounds(NOISY)
    with caplog.at_level("WARNING", logger="penchant.server"):
        records = play(run, app)
    by_hand(without, absent=[0])
    assert [record.answered for record in records] == [2, 2]
    assert_same(run.state, without.state)
    assert caplog.text.count("does not say which part of the roster") == 1


def test_nobody_at_all_stops_the_run() -> None:
    with pytest.raises(PenchantError, match="0 nodes answered"):
        play(rounds(EXACT), n_nodes=0)


def test_the_start_waits_for_nodes_that_come_late_but_not_for_ever(caplog: pytest.LogCaptureFixture) -> None:
    class Slow(LocalGrid):
        asked = 0

        def get_node_ids(self) -> Iterable[int]:
            self.asked += 1
            return list(super().get_node_ids())[: self.asked - 1]

    late = Slow(honest(2, NOISY), 2)
    server_side.gather(late, 2, wait_s=60.0)
    assert late.asked == 3  # none, one, both
    with caplog.at_level("WARNING", logger="penchant.server"):
        server_side.gather(LocalGrid(honest(2, NOISY), 2), 3, wait_s=0.0)
    assert [vars(record)["n"] for record in caplog.records] == [1]  # of the three, that is not there


def test_a_spent_budget_ends_the_run_before_any_device_is_called() -> None:
    asked = []

    def node(shard: int) -> Node:
        asked.append(shard)
        return host(shard, 3, run.plan)

    budget = gaussian.epsilon_of(1 / 0.5, 1e-5)  # the counts, not the matrix
    run = rounds(replace(NOISY, cohort=12), ledger=Ledger("default", delta=1e-5, budget=budget))
    with pytest.raises(BudgetExhausted):
        play(run, client_app(node))
    assert sorted(asked) == [0, 1, 2]  # the first round's
    assert len(charged(run)) == run.progress.done == 1


# -------------------------------------------------------------------------------------------------------- hostile


def lying(change: Callable[[RecordDict], RecordDict], plan: PrivacyPlan = NOISY) -> ClientApp:
    """An app whose node 0 changes what it sends, and whose others are honest."""
    app, good = ClientApp(), honest(3, plan)

    @app.query()
    def enrol(message: Message, context: Context) -> Message:
        return good(message, context)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        reply = good(message, context)
        return Message(change(reply.content), reply_to=message) if context.node_config["partition-id"] == 0 else reply

    return app


def with_sum(array: Array) -> Callable[[RecordDict], RecordDict]:
    def change(content: RecordDict) -> RecordDict:
        name = next(iter(content.array_records["sum"]))
        return RecordDict({**content, "sum": ArrayRecord({name: array})})

    return change


def npy(data: bytes, stype: str = "numpy.ndarray") -> Array:
    return Array(dtype="float32", shape=(9,), stype=stype, data=data)


def test_diagnostics_that_lie_about_how_many_took_part_change_nothing() -> None:
    def boast(content: RecordDict) -> RecordDict:
        counts = MetricRecord({**content.metric_records["diagnostics"], "users": 10**6, "num-examples": 10**9})
        return RecordDict({**content, "diagnostics": counts})

    run, plain = rounds(NOISY), rounds(NOISY)
    play(run, lying(boast))
    play(plain)
    assert_same(run.state, plain.state)


HEADER = b"\x93NUMPY\x01\x00"

BROKEN: list[tuple[str, Callable[[RecordDict], RecordDict]]] = [
    ("unreadable", lambda content: RecordDict({})),
    ("unreadable", lambda content: RecordDict({"sum": content.array_records["sum"]})),
    ("unreadable", lambda content: RecordDict({**content, "diagnostics": MetricRecord({})})),
    ("unreadable", lambda content: RecordDict({**content, "diagnostics": MetricRecord({"round": [1, 2]})})),
    ("unreadable", with_sum(npy(b""))),
    ("unreadable", with_sum(npy(b"not an array"))),
    ("unreadable", with_sum(npy(HEADER + b"\x10\x00{'descr': '<f4', "))),
    ("unreadable", with_sum(npy(b"x", stype="pickle"))),
    ("malformed", with_sum(Array(np.full(9, np.nan, np.float32)))),
    ("malformed", with_sum(Array(np.zeros(3, np.float32)))),
    ("wrong round", lambda content: RecordDict({**content, "diagnostics": MetricRecord({"round": 7})})),
    ("wrong round", lambda content: RecordDict({**content, "diagnostics": MetricRecord({"round": math.inf})})),
]


@pytest.mark.parametrize(("reason", "change"), BROKEN)
def test_a_broken_message_is_counted_and_is_as_if_it_never_came(
    reason: str, change: Callable[[RecordDict], RecordDict]
) -> None:
    run, without = rounds(NOISY), rounds(NOISY)
    records = play(run, lying(change))
    by_hand(without, absent=[0])
    counted = {key for record in records for key in record.refused}
    assert counted <= {reason, "unreadable", "malformed"}
    assert reason in counted or reason == "wrong round"
    assert all(record.answered == 2 for record in records)
    assert_same(run.state, without.state)


@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=60) | st.binary(max_size=60).map(lambda tail: HEADER + tail))
def test_no_bytes_in_place_of_an_array_bring_the_server_down(data: bytes) -> None:
    run = rounds(replace(EXACT, cohort=12))
    records = play(run, lying(with_sum(npy(data)), run.plan))
    assert [record.answered for record in records] == [2, 2]


# ------------------------------------------------------------------------------------------------------------ ray


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # files and processes that Ray forgets
def test_flowers_engine_on_ray_gives_the_same_states_and_keeps_the_caps(
    require: Callable[[str], None], tmp_path: Path
) -> None:
    require("ray")
    memory = Population(histories=PEOPLE, catalogue=CATALOGUE)
    mapped = save_population(memory, tmp_path)

    def run(where: str, nodes: int, people: Population, row: Federated) -> tuple[list[Mapping[str, Any]], list[int]]:
        states: list[Mapping[str, Any]] = []

        def after(record: RoundRecord, run: Rounds) -> None:
            states.append(run.state)
            forgetful(record, run)

        made = engine.run(row, people, name="ray", seed=3, nodes=nodes, engine=where, where="cpu", after_round=after)
        return states, [record.answered for record in made.progress.records]

    def counted(n_rounds: int) -> Federated:
        sums = (EXACT.sums[0], replace(EXACT.sums[1], rounds=n_rounds - 1))
        return Federated(learner="cooccurrence", settings=SETTINGS, plan=replace(EXACT, cohort=12, sums=sums))

    expected, _ = run("local", 1, memory, counted(2))
    assert not same(expected[1], expected[0])
    states, answered = run("flower", 3, mapped, counted(3))  # workers share the pages of one folder
    assert answered == [3, 3, 0]
    for state, other in zip(states, expected, strict=False):
        assert state.keys() == other.keys()
        assert all(np.array_equal(state[name], other[name]) for name in state)  # exact sums, so to the last bit
    assert sorted(path.name for path in tmp_path.iterdir()) == ["catalogue.json", "histories"]  # no run leaves a file

    mf = {"model": {"name": "mf", "dim": 4}, "local": {"epochs": 2}}
    plan = replace(EXACT, cohort=12, sums=(SumSpec(name="update", rounds=2, clip_norm=0.5),))
    updates = Federated(learner="fedavg", settings=mf, plan=plan)
    expected, _ = run("local", 1, memory, updates)
    states, answered = run("flower", 2, memory, updates)  # from a folder that the run makes and takes away
    assert answered == [2, 2]
    assert not same(expected[1], expected[0])
    for state, other in zip(states, expected, strict=True):
        assert_same(state, other)
    gc.collect()  # or they are found in the next test


@pytest.mark.ray
def test_a_ray_address_where_nothing_listens_is_refused_in_one_line(
    require: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    require("ray")
    with socket.socket() as taken:  # bound, and nobody listens
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(InvalidConfig, match=r"RAY_ADDRESS=127\.0\.0\.1:\d+: start it there"):
            run_flower(ServerApp(), ClientApp(), 1)


def test_people_mapped_from_a_folder_are_hosted_without_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hosted: list[Interactions] = []

    class Watched(Node):
        def __init__(self, histories: Interactions, *args: Any, **named: Any) -> None:
            hosted.append(histories)
            super().__init__(histories, *args, **named)

    monkeypatch.setattr(engine, "Node", Watched)
    memory = Population(histories=PEOPLE, catalogue=CATALOGUE)
    mapped = save_population(memory, tmp_path)
    row = Federated(learner="cooccurrence", settings=SETTINGS, plan=NOISY)
    runs = [
        engine.run(row, people, name="a", seed=3, nodes=3, engine="local", where="cpu", after_round=lambda *_: None)
        for people in (memory, mapped)
    ]
    assert all(np.array_equal(runs[0].state[name], runs[1].state[name]) for name in runs[0].state)
    assert len(hosted) == 6
    for people, whole in zip(hosted, [PEOPLE] * 3 + [mapped.histories] * 3, strict=True):
        assert np.shares_memory(people.items, whole.items)
        assert np.shares_memory(people.strengths, whole.strengths)
