"""The work that `penchant bench` measures, as rows that the engine runs like any other.

w1     unit user: one local epoch, batches of 13 groups, SGD 0.1 on their mean; clip 1, noise multiplier 1 on the sum
w2     unit interaction: the same model by DP-SGD on each device, clip 1 and noise multiplier 1 in each of 13 steps,
       which read an interaction with probability 1/13: in the mean what a person of w1 reads
scale  w1's work for a million people and 20,000 items, and one pass of co-occurrence over everybody

The model is `mlp`: item vectors and biases, a network 64 → 32 → 1, and the person's own vector of 32. A group is one
positive with 4 negatives, clipped as one, so that 13 groups stand for a batch of 64 examples. A step follows a group's
gradient by lr, so lr = 0.1/13 is SGD 0.1 on the mean of a batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from penchant.common import config
from penchant.common.config import did_you_mean
from penchant.common.errors import InvalidConfig
from penchant.common.privacy.plan import DeviceNoise, PrivacyPlan, SumSpec, Unit, task_digest
from penchant.simulations import plans
from penchant.simulations.bench.histories import Shape
from penchant.simulations.plans import Federated
from penchant.simulations.settings import Row, SimulationConfig

NEGATIVES, GROUPS, STEPS = 4, 13, 13
DIM = HIDDEN = 32
MODEL: dict[str, Any] = {"name": "mlp", "dim": DIM, "hidden": HIDDEN}
LOCAL = {"epochs": 1, "batch": GROUPS, "lr": 0.1 / GROUPS, "negatives": NEGATIVES, "fold_in_steps": 0}
SERVER = {"optimizer": "sgd", "lr": 1.0}


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What one benchmark runs.

    Attributes:
        name: a key of `WORKLOADS`.
        unit: of privacy.
        shape: of the histories.
        cohort: people in a round; with unit user in the mean, as each has a coin of their own.
        rounds: how many.
        on_disk: histories stay in files.
        cooccurrence: whether a pass of co-occurrence follows.
    """

    name: str
    unit: Unit
    shape: Shape
    cohort: int
    rounds: int
    on_disk: bool = False
    cooccurrence: bool = False

    def row(self) -> Federated:
        """Learner, settings and plan."""
        return _user(self) if self.unit == "user" else _interaction(self)

    def cooccurrence_row(self) -> Federated:
        """Co-occurrence as `penchant simulate` runs it for so many people at ε = 8."""
        row = Row("co-occurrence", "federated", "cooccurrence", "", "user")
        return plans.federated(row, SimulationConfig(unit="user", epsilon=8.0, delta=self.delta), self.shape.users)

    @property
    def delta(self) -> float:
        return plans.epsilon_and_delta(SimulationConfig(), self.shape.users)[1]

    def examples(self, interactions: int) -> int:
        """Positives and negatives that training on so many interactions reads; with unit interaction in the mean."""
        return interactions * (1 + NEGATIVES)


_ML_1M = Shape(users=6040, items=3706, interactions=1_000_000)
WORKLOADS = {
    "w1": Workload(name="w1", unit="user", shape=_ML_1M, cohort=100, rounds=10),
    "w2": Workload(name="w2", unit="interaction", shape=_ML_1M, cohort=100, rounds=10),
    "scale": Workload(
        name="scale",
        unit="user",
        shape=Shape(users=1_000_000, items=20_000, interactions=50_000_000),
        cohort=10_000,
        rounds=10,
        on_disk=True,
        cooccurrence=True,
    ),
}


def workload(
    name: str,
    *,
    users: int | None = None,
    items: int | None = None,
    cohort: int | None = None,
    rounds: int | None = None,
) -> Workload:
    """A workload, as it is or at another size: with other users the interactions of each stay, with other items all.

    Raises:
        InvalidConfig: no such workload, or a size that it cannot have.
    """
    if name not in WORKLOADS:
        raise InvalidConfig(f"unknown workload {name!r}{did_you_mean(name, WORKLOADS)}")
    made = WORKLOADS[name]
    for option, value in (("users", users), ("items", items), ("cohort", cohort), ("rounds", rounds)):
        if value is not None and value < 1:
            raise InvalidConfig(f"{option} must be a whole number ≥ 1, not {value}")
    n = users or made.shape.users
    shape = Shape(
        users=n, items=items or made.shape.items, interactions=round(made.shape.interactions / made.shape.users * n)
    )
    cohort = cohort or min(made.cohort, n)
    if cohort > n:
        raise InvalidConfig(f"cohort {cohort} is larger than the {n} users: take --cohort {n}")
    return replace(made, shape=shape, cohort=cohort, rounds=rounds or made.rounds)


def _user(work: Workload) -> Federated:
    plan = PrivacyPlan(
        unit="user",
        n_users=work.shape.users,
        delta=work.delta,
        sampling="poisson",
        cohort=work.cohort,
        sums=(SumSpec(name="update", rounds=work.rounds, clip_norm=1.0, noise_multiplier=1.0),),
        max_participations=work.rounds,
    )
    return Federated(learner="fedavg", settings=_settings(), plan=plan)


def _interaction(work: Workload) -> Federated:
    device = DeviceNoise(clip_norm=1.0, noise_multiplier=1.0, rate=1 / STEPS, steps=STEPS, divisor=float(GROUPS))
    settings = {**_settings(), "local": {**LOCAL, "lr": 0.1}, "device": config.encode(device)}
    plan = PrivacyPlan(
        unit="interaction",
        n_users=work.shape.users,
        delta=work.delta,
        sampling="none",
        cohort=work.cohort,
        sums=(SumSpec(name="update", rounds=work.rounds, clip_norm=float("inf")),),
        max_participations=work.rounds,
        device=device,
        task=task_digest("fedavg", settings),
    )
    return Federated(learner="fedavg", settings=settings, plan=plan)


def _settings() -> dict[str, Any]:
    return {"model": MODEL, "local": LOCAL, "server": SERVER}
