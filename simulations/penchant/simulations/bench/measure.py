"""Measures one workload: histories made, rounds run by the engine as in any simulation, the clock read after each.

A round lasts from the release before it to its own: the draw, the messages, the people's training, clip, noise,
ledger and the server's step. The first also holds what happens once, so that it counts in `startup_seconds` and, where
more follow, not in the speed.

What of a round does not depend on what anybody did is measured by running the same rounds for as many people without a
single interaction: the draw, the messages, whole-catalogue sums, noise and step.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from penchant.common.arrays import Int64
from penchant.common.errors import PenchantError
from penchant.common.interactions import Interactions
from penchant.server.rounds import RoundRecord, Rounds
from penchant.simulations import engine
from penchant.simulations.bench import histories, machine
from penchant.simulations.bench.workloads import DIM, GROUPS, HIDDEN, NEGATIVES, Workload
from penchant.simulations.engine import Population
from penchant.simulations.plans import Federated

SCHEMA_VERSION = 1
_EMPTY_ROUNDS = 4


@dataclass
class Clock:
    """Hears of every round: how long it was, how many people it drew and how much they had done.

    Attributes:
        lengths: int64[n_users], interactions of each person.
        workers: whether to look at the memory of processes below after each round, while they are there.
        seconds, drawn, interactions: of each round: how long, how many people, and what these had done.
        startup: seconds from the start of the process to the end of round 1.
        rss_mb: peak memory so far with that of workers; 0 without them.

    Raises:
        PenchantError: when called with a round in which a node did not answer.
    """

    lengths: Int64
    workers: bool = False
    seconds: list[float] = field(default_factory=list)
    drawn: list[int] = field(default_factory=list)
    interactions: list[int] = field(default_factory=list)
    startup: float = 0.0
    rss_mb: float = 0.0

    def __post_init__(self) -> None:
        self._before = np.zeros(len(self.lengths), np.int64)
        self._last = time.perf_counter()

    def __call__(self, record: RoundRecord, rounds: Rounds) -> None:
        now = time.perf_counter()
        if record.answered < record.nodes:  # a node that refuses is quick
            raise PenchantError(f"round {record.round} failed on {record.nodes - record.answered} nodes: no speed")
        self.startup = self.startup or machine.seconds_since_start()
        if self.workers:
            self.rss_mb = max(self.rss_mb, machine.peak_rss_mb())
        taken = rounds.progress.participations
        self.seconds.append(now - self._last)
        self.drawn.append(record.drawn)
        self.interactions.append(int(self.lengths[taken > self._before].sum()))
        self._before, self._last = taken.copy(), time.perf_counter()

    @property
    def measured(self) -> slice:
        """The rounds that tell of speed: all but the first, where there are more."""
        return slice(1 if len(self.seconds) > 1 else 0, None)


@dataclass(frozen=True, kw_only=True)
class Where:
    """What runs it: nothing here changes what is learned.

    Attributes:
        engine: "local", or "flower" for Flower's engine on Ray.
        device: torch device.
        nodes: that share the people; 0 for one whose kernels use every core, and else for one a core.
    """

    engine: str = "local"
    device: str = "cpu"
    nodes: int = 0

    def shares(self, row: Federated) -> int:
        """How many nodes share the people of a row."""
        one = row.learner == "fedavg" and self.engine == "local" and self.device == "cpu"
        return self.nodes or (1 if one else machine.cpus())

    def run(self, row: Federated, people: Interactions, seed: int) -> Clock:
        """Every round of a row."""
        clock = Clock(people.lengths, workers=self.engine == "flower")
        engine.run(
            row,
            Population(histories=people, catalogue=histories.catalogue(people.n_items)),
            name="bench",
            seed=seed,
            nodes=self.shares(row),
            engine=self.engine,
            where=self.device,
            after_round=clock,
        )
        return clock


def measure(work: Workload, *, where: Where | None = None, seed: int = 0) -> dict[str, Any]:
    """What `penchant bench --json` prints; docs/bench.md says what each field means."""
    where = where or Where()
    with tempfile.TemporaryDirectory(prefix="penchant-bench-") as folder:
        start = time.perf_counter()
        if work.on_disk:
            people = histories.on_disk(work.shape, seed, Path(folder))
        else:
            people = histories.in_memory(work.shape, seed)
        data_seconds = time.perf_counter() - start
        clock = where.run(work.row(), people, seed)
        extra = _cooccurrence(work, people, where, seed) if work.cooccurrence else None
        rss_mb = max(clock.rss_mb, machine.peak_rss_mb())
        empty = _empty_round_seconds(work, where, seed) if work.unit == "user" and where.engine == "local" else None
        del people
    rounds = clock.measured
    seconds, interactions = clock.seconds[rounds], sum(clock.interactions[rounds])
    examples_per_second = work.examples(interactions) / sum(seconds)
    return {
        "schema_version": SCHEMA_VERSION,
        "workload": work.name,
        "unit": work.unit,
        "users": work.shape.users,
        "items": work.shape.items,
        "interactions": work.shape.interactions,
        "seed": seed,
        "engine": where.engine,
        "device": where.device,
        "nodes": min(where.shares(work.row()), work.shape.users),
        "cohort": work.cohort,
        "rounds": work.rounds,
        "clients": clock.drawn,
        "examples": [work.examples(n) for n in clock.interactions],
        "every_round_seconds": clock.seconds,
        "round_seconds": statistics.median(seconds),
        "empty_round_seconds": empty,
        "clients_per_second": statistics.median(n / s for n, s in zip(clock.drawn[rounds], seconds, strict=True)),
        "examples_per_second": examples_per_second,
        "seconds_per_interaction": sum(seconds) / interactions if interactions else None,
        "cooccurrence": extra,
        "startup_seconds": clock.startup,
        "data_seconds": data_seconds,
        "peak_rss_mb": rss_mb,
        "ceiling": _ceiling(examples_per_second, where.device),
        "cpus": machine.cpus(),
        "threads": _threads(),
        "versions": machine.versions(),
    }


def _cooccurrence(work: Workload, people: Interactions, where: Where, seed: int) -> dict[str, Any]:
    """One pass: all sums that co-occurrence asks of everybody, from the first draw to the released vectors."""
    row = work.cooccurrence_row()
    seconds = sum(where.run(row, people, seed).seconds)
    return {
        "sums": row.plan.rounds,
        "seconds": seconds,
        "seconds_per_interaction": seconds / work.shape.interactions,
        "head": row.settings["head"],
    }


def _empty_round_seconds(work: Workload, where: Where, seed: int) -> float:
    """Of a round in which nobody has a history."""
    nothing = np.zeros(0)
    people = Interactions(
        offsets=np.zeros(work.shape.users + 1, np.int64),
        items=nothing.astype(np.int32),
        times=nothing.astype(np.int64),
        strengths=nothing.astype(np.float32),
        n_items=work.shape.items,
    )
    clock = where.run(replace(work, rounds=_EMPTY_ROUNDS).row(), people, seed)
    return statistics.median(clock.seconds[clock.measured])


def _ceiling(examples_per_second: float, device: str) -> dict[str, float]:
    """Share of the machine's float32 peak that goes into the model's own arithmetic."""
    peak, needed = machine.peak_gflops(device), flop_per_example()
    reached = examples_per_second * needed / 1e9
    return {"flop_per_example": needed, "gflops": reached, "peak_gflops": peak, "share": reached / peak}


def flop_per_example() -> float:
    """What training on one example takes at the least, its part of a full batch included; without clip and noise.

    With item vector v, own vector u and h hidden units: W v, its two gradients and the last layer for each example; and
    W u, its two gradients and the step of the network once a batch, as u and the network stand still within it.
    """
    once = 6 * DIM * HIDDEN + 2 * (2 * DIM * HIDDEN + 2 * HIDDEN + 1) + 2 * DIM
    each = 6 * DIM * HIDDEN + 6 * HIDDEN + 2 * DIM
    return each + once / (GROUPS * (1 + NEGATIVES))


def _threads() -> int:
    import torch

    return torch.get_num_threads()
