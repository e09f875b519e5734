"""Runs the rounds of one federated row on an engine, from wherever it stopped.

Users are dealt to nodes in contiguous shards. A node's random streams are named by the user's place in the whole
roster, so that neither the number of nodes nor the engine changes what anybody draws.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from penchant.client._flower import client_app
from penchant.client.node import Node
from penchant.common import columns
from penchant.common.arrays import Int64
from penchant.common.catalogue import Catalogue
from penchant.common.interactions import Interactions
from penchant.common.learners import registry
from penchant.common.learners.contract import Learner
from penchant.common.privacy.ledger import Ledger
from penchant.common.privacy.plan import PrivacyPlan
from penchant.common.streams import Streams
from penchant.server._flower import AfterRound, server_app
from penchant.server.rounds import Progress, RoundRecord, Rounds
from penchant.simulations._flower import run_flower, run_local
from penchant.simulations.plans import Federated


@dataclass(frozen=True, kw_only=True)
class Population:
    """Who takes part: their training histories, and what there is to recommend.

    Attributes:
        folder: where `save_population` wrote both, if it did. Worker processes map it from there, so that on a cluster
            it must be one that every machine sees under this path.
    """

    histories: Interactions
    catalogue: Catalogue
    folder: Path | None = None


def run(
    row: Federated,
    population: Population,
    *,
    name: str,
    seed: int,
    nodes: int,
    engine: str,
    where: str,
    after_round: AfterRound,
    progress: Progress | None = None,
    ledger: Ledger | None = None,
) -> Rounds:
    """Runs every round that is left.

    Args:
        name: of the row; its streams are called after it.
        where: torch device of the nodes.
        after_round: called after each release, with what a checkpoint needs.
        progress: of an earlier, interrupted run.
        ledger: of the row, with what such a run charged; None keeps one in memory.

    Raises:
        Exception: what a node of this process raised that is no error of ours. A real round goes on without a node that
            fails; here that is a mistake, and figures made without its people would hide it.
    """
    n_users = population.histories.n_users
    roster = shard_sizes(n_users, nodes)
    streams = Streams(seed).child(name)
    plan = row.plan
    learner = registry.build(row.learner, row.settings, population.catalogue, where=where)
    rounds = Rounds(
        learner=learner,
        settings=row.settings,
        plan=plan,
        roster=roster,
        ledger=ledger or Ledger(plan.population, delta=plan.delta),
        streams=streams.child("server"),
        progress=progress,
    )
    failures: list[Exception] = []

    def checked(record: RoundRecord, run: Rounds) -> None:
        if failures:
            raise failures[0]
        after_round(record, run)

    server = server_app(lambda: rounds, checked)
    clients = streams.seed("clients")
    if engine == "local":
        taken = None if progress is None else progress.participations
        runtime = {"where": where, "threads": cores()}
        hosts = {shard: _node(population, plan, roster, shard, clients, runtime, taken) for shard in range(len(roster))}
        run_local(server, client_app(hosts.__getitem__, failures.append), len(roster))
    else:
        with tempfile.TemporaryDirectory(prefix="penchant-", dir=population.folder) as folder:
            if population.folder is None:
                save_population(population, Path(folder))
            counts = Path(folder) / "participations.npy"
            np.save(counts, rounds.progress.participations)
            worker = _WorkerNode(str(population.folder or folder), str(counts), plan, roster, clients, where)
            run_flower(server, client_app(worker), len(roster), gpus=0.5 if where == "cuda" else 0.0)
    return rounds


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def shard_sizes(n_users: int, nodes: int) -> tuple[int, ...]:
    """Users of each node, as even as can be, no node without users.

    >>> shard_sizes(7, 3)
    (3, 2, 2)
    """
    nodes = min(nodes, n_users)
    return tuple(n_users // nodes + (shard < n_users % nodes) for shard in range(nodes))


@dataclass(frozen=True)
class _WorkerNode:
    """Makes a node in a worker process of Flower's engine, from files; only this small object travels."""

    folder: str
    counts: str
    plan: PrivacyPlan
    roster: tuple[int, ...]
    seed: int
    where: str

    def __call__(self, shard: int) -> Node:
        return _worker_node(self, shard)


@lru_cache(maxsize=64)
def _worker_node(spec: _WorkerNode, shard: int) -> Node:
    taken = np.load(spec.counts)
    runtime = {"where": spec.where, "threads": 1}  # of its one core
    return _node(_worker_population(spec.folder), spec.plan, spec.roster, shard, spec.seed, runtime, taken)


@lru_cache(maxsize=1)
def _worker_population(folder: str) -> Population:
    return load_population(Path(folder))


def _node(
    population: Population,
    plan: PrivacyPlan,
    roster: tuple[int, ...],
    shard: int,
    seed: int,
    runtime: Mapping[str, Any],
    taken: Int64 | None,
) -> Node:
    """A node for one shard, with a learner of its own: nodes answer in threads."""
    first = sum(roster[:shard])
    own = slice(first, first + roster[shard])

    def learners(name: str, settings: Mapping[str, Any]) -> Learner:
        return registry.build(name, settings, population.catalogue, **runtime)

    counts = None if taken is None else taken[own].copy()
    histories = population.histories.select(range(own.start, own.stop))  # views
    return Node(histories, learners, Streams(seed), plan=plan, first_user=first, participations=counts)


def save_population(population: Population, folder: Path) -> Population:
    """Writes what workers need to host their shards, and gives the same population, mapped from there."""
    columns.save(replace(population.histories, users=()), folder / "histories")
    (folder / "catalogue.json").write_text(json.dumps(population.catalogue.to_record()), encoding="utf-8")
    return load_population(folder)


def load_population(folder: Path) -> Population:
    """What `save_population` wrote, its columns mapped from the files."""
    catalogue = Catalogue.from_record(json.loads((folder / "catalogue.json").read_text(encoding="utf-8")))
    return Population(histories=columns.load(folder / "histories"), catalogue=catalogue, folder=folder)
