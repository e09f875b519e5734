"""Rounds as simulations plan them: nodes and stops change nothing, and seeds change everything."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from penchant.client.node import Node
from penchant.common.content import features
from penchant.common.learners.contract import State
from penchant.common.privacy.ledger import Ledger
from penchant.server.rounds import Progress, RoundRecord, Rounds
from penchant.simulations import engine
from penchant.simulations.data.synthetic import synthetic
from penchant.simulations.engine import Population, load_population, save_population, shard_sizes
from penchant.simulations.plans import Federated, federated
from penchant.simulations.settings import Row, SimulationConfig, rows

N_USERS = 24
DATA = synthetic(users=N_USERS, items=40, interactions=10, topics=8, seed=0)
PEOPLE = Population(histories=DATA.interactions, catalogue=DATA.catalogue)


def planned(unit: str, learner: str = "fedavg", **given: Any) -> tuple[Row, Federated]:
    """The federated row of this unit and learner, as `penchant simulate` would run it."""
    if learner == "fedavg":
        given = {"rounds": 3, "cohort": 16, **given}
    asked = SimulationConfig(unit=unit, learner=learner, **given)
    (row,) = [r for r in rows(asked) if r.kind == "federated"]
    return row, federated(row, asked, N_USERS)


ROWS = {
    "fedavg": planned("none"),
    "fedavg+opacus": planned("interaction"),
    "fedavg+user-dp": planned("user"),
    "fedavg+user-dp, coins": planned("user", sampling="poisson"),
    "fedavg+user-dp, gru": planned("user", model="gru", rounds=1),  # later rounds blow a rounding error up
    "co-occurrence": planned("user", "cooccurrence"),
    "co-occurrence, exact": planned("none", "cooccurrence"),
}
each_row = pytest.mark.parametrize("key", ROWS)


def run(key: str, *, seed: int = 0, nodes: int = 2, where: str = "cpu", name: str = "", **more: Any) -> Rounds:
    row, made = ROWS[key]
    more.setdefault("after_round", lambda record, run: None)
    return engine.run(made, PEOPLE, name=name or row.name, seed=seed, nodes=nodes, engine="local", where=where, **more)


def learned(state: State) -> dict[str, Any]:
    """What a state says, in a form that rounding cannot turn over: eigenvectors have no sign, so F as F Fᵀ."""
    return {k: v @ v.T if k == "vectors" else v for k, v in state.items() if not k.startswith("server/")}


def furthest(a: State, b: State) -> float:
    """The largest difference between two states, over the size of the largest weight beside it."""
    one, two = learned(a), learned(b)
    assert one.keys() == two.keys()
    return max(float(np.abs(np.float64(one[k]) - two[k]).max() / max(1.0, float(np.abs(two[k]).max()))) for k in one)


def same(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


# ---------------------------------------------------------------------------------------------------------- shards


@given(n_users=st.integers(1, 500), nodes=st.integers(1, 600))
def test_everybody_is_on_one_node_and_no_node_is_empty_or_two_people_larger_than_another(
    n_users: int, nodes: int
) -> None:
    sizes = shard_sizes(n_users, nodes)
    assert sum(sizes) == n_users
    assert len(sizes) == min(nodes, n_users)
    assert 1 <= min(sizes) <= max(sizes) <= min(sizes) + 1


def test_a_population_comes_back_from_its_files(tmp_path: Path) -> None:
    save_population(PEOPLE, tmp_path)
    again = load_population(tmp_path)
    assert again.catalogue == PEOPLE.catalogue
    for name in ("offsets", "items", "times", "strengths", "n_items"):
        np.testing.assert_array_equal(getattr(again.histories, name), getattr(PEOPLE.histories, name))
    moved = Population(histories=PEOPLE.histories.select([1, 0]), catalogue=PEOPLE.catalogue)
    save_population(moved, tmp_path)
    assert not np.array_equal(load_population(tmp_path).histories.items, again.histories.items)


def test_a_worker_reads_every_column_of_the_catalogue(tmp_path: Path) -> None:
    n = len(PEOPLE.catalogue)
    rich = replace(
        PEOPLE.catalogue,
        retired=frozenset(PEOPLE.catalogue.ids[:2]),
        categories={"c": ("é",) * n},
        numbers={"n": (math.nan, *(0.1,) * (n - 1))},
        texts={"t": ("在太空",) * n},
        vectors={"v": np.full((n, 3), 1 / 3, np.float32)},
    )
    save_population(Population(histories=PEOPLE.histories, catalogue=rich), tmp_path)
    again = load_population(tmp_path).catalogue
    assert again == rich
    assert again.texts == rich.texts
    assert features(again).tobytes() == features(rich).tobytes()


# ----------------------------------------------------------------------------------------------------------- nodes

TOLERANCE = 1e-5  # of the largest weight; partial sums are float32 and Adam divides by their size


@each_row
def test_the_number_of_nodes_changes_no_weight_with_noise_or_without(key: str) -> None:
    one, two, five = (run(key, nodes=nodes) for nodes in (1, 2, 5))
    assert five.n_nodes == 5
    for other in (two, five):
        # What nobody reads of devices' noise is drawn once for each node's sum: the same law, other draws.
        assert furthest(other.state, one.state) <= TOLERANCE or key == "fedavg+opacus"
        np.testing.assert_array_equal(other.progress.participations, one.progress.participations)
        assert [r.drawn for r in other.progress.records] == [r.drawn for r in one.progress.records]
    assert furthest(run(key, seed=1).state, one.state) > 100 * TOLERANCE or key == "co-occurrence, exact"


def test_a_node_that_named_its_streams_by_its_own_rows_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    class Forgetful(Node):
        def __init__(self, *args: Any, first_user: int, **named: Any) -> None:
            super().__init__(*args, first_user=0, **named)

    honest = run("fedavg", nodes=1).state
    monkeypatch.setattr(engine, "Node", Forgetful)
    assert furthest(run("fedavg", nodes=1).state, honest) == 0
    assert furthest(run("fedavg", nodes=2).state, honest) > 100 * TOLERANCE


# ----------------------------------------------------------------------------------------------------------- seeds


@each_row
def test_a_seed_gives_the_same_weights_to_the_last_bit(key: str) -> None:
    assert same(run(key, nodes=3).state, run(key, nodes=3).state)


@pytest.mark.parametrize("key", ["fedavg", "fedavg+opacus", "fedavg+user-dp", "co-occurrence"])
def test_another_seed_or_another_row_draws_another_noise(key: str) -> None:
    first = run(key).state
    assert not same(run(key, seed=1).state, first)
    assert not same(run(key, name="another row").state, first)


def test_what_is_charged_is_the_plan_round_by_round() -> None:
    for key in ("fedavg+user-dp", "co-occurrence"):
        done, plan = run(key), ROWS[key][1].plan
        promise = plan.guarantee()
        assert promise is not None
        charged = [e for e in done.ledger.entries if e.kind == "charge"]
        assert [e.round for e in charged] == list(range(1, plan.rounds + 1))
        assert {(e.plan, e.attempt) for e in charged} == {(plan.digest, 0)}
        assert done.ledger.spent().epsilon == pytest.approx(promise.epsilon, rel=1e-9)
        assert [e.round for e in done.ledger.entries if e.kind == "release"] == [e.round for e in charged]
    assert run("fedavg").ledger.entries == ()
    assert run("fedavg+opacus").ledger.entries == ()  # the devices' own ledgers hold these


# ------------------------------------------------------------------------------------------------------------ stops


class Stopped(Exception):
    """A stop in the middle of a run."""


@each_row
@pytest.mark.parametrize("at", [1, 2])
def test_a_run_that_stopped_and_went_on_is_the_run_that_never_stopped(key: str, at: int, tmp_path: Path) -> None:
    if ROWS[key][1].plan.rounds < at:
        at = 1
    kept: list[Progress] = []
    plan = ROWS[key][1].plan

    def stop(record: RoundRecord, rounds: Rounds) -> None:
        kept.append(rounds.progress)
        if record.round == at:
            raise Stopped

    path = tmp_path / "ledger.sqlite"
    with Ledger(plan.population, delta=plan.delta, path=path) as ledger, pytest.raises(Stopped):
        run(key, ledger=ledger, after_round=stop)
    progress = kept[-1]
    assert progress.done == at
    heard: list[int] = []
    whole = run(key)
    with Ledger(plan.population, delta=plan.delta, path=path) as ledger:
        after = run(key, progress=progress, ledger=ledger, after_round=lambda r, _: heard.append(r.round))
        assert ledger.entries == whole.ledger.entries
    assert heard == list(range(at + 1, whole.plan.rounds + 1))
    assert same(after.state, whole.state)
    np.testing.assert_array_equal(after.progress.participations, whole.progress.participations)
    if heard:
        assert not same(progress.state, whole.state)


def test_devices_remember_across_a_stop_who_took_part() -> None:
    asked = SimulationConfig(unit="user", learner="fedavg", rounds=2, max_participations=1)
    (row,) = [r for r in rows(asked) if r.kind == "federated"]
    made = federated(row, asked, N_USERS)
    kept: list[Progress] = []

    def play(progress: Progress | None) -> Rounds:
        return engine.run(
            made,
            PEOPLE,
            name=row.name,
            seed=0,
            nodes=2,
            engine="local",
            where="cpu",
            after_round=lambda record, run: kept.append(run.progress),
            progress=progress,
            ledger=ledger(progress),
        )

    def ledger(progress: Progress | None) -> Ledger:
        """With the charges of the rounds that were released."""
        held = Ledger(made.plan.population, delta=made.plan.delta)
        for number in range(1, (progress.done if progress else 0) + 1):
            event = made.plan.event(number)
            assert event is not None
            held.charge(number, event, plan=made.plan.digest, cap=made.plan.charged_cap)
        return held

    assert play(None).progress.participations.tolist() == [1] * N_USERS
    first = kept[0]
    assert play(first).progress.records[-1].answered == 2
    tired = Progress(first.state, np.ones(N_USERS, np.int64), 1, first.records)  # everybody had their turn
    refused = play(tired).progress.records[-1].refused
    assert refused == {"refused": 2}  # both nodes, whatever the server asks


# -------------------------------------------------------------------------------------------------------------- cuda


@pytest.mark.parametrize("key", ["fedavg", "fedavg+opacus", "fedavg+user-dp"])
def test_on_cuda_the_rounds_learn_what_they_learn_on_the_processor(key: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: rounds were run on the processor only")
    assert furthest(run(key, where="cuda").state, run(key).state) <= 1e-3
    assert math.isfinite(furthest(run(key, where="cuda", seed=1).state, run(key).state))


def test_a_node_that_fails_here_ends_the_run_with_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a learner's mistake")

    monkeypatch.setattr(Node, "answer", fails)
    with pytest.raises(ZeroDivisionError, match="mistake"):
        run("fedavg", nodes=2)
