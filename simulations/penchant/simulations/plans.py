"""From a row of a simulation to what runs: a learner by name, its settings, and the plan that decides its guarantee.

One function for each kind of row. What depends on the budget (head, shares, noise, clip) follows from public numbers;
what was chosen by looking at people is said in the plan as not charged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from penchant.common import config
from penchant.common.errors import InvalidConfig
from penchant.common.learners import cooccurrence, registry
from penchant.common.learners.cooccurrence import CooccurrenceConfig
from penchant.common.learners.neural import clips
from penchant.common.learners.neural.models import reads_history
from penchant.common.learners.planned import CHOSEN, PROFILES, PUBLIC_NUMBER, planned, usual_delta
from penchant.common.privacy import accounting, gaussian
from penchant.common.privacy.plan import (
    DeviceNoise,
    PrivacyPlan,
    QuantileClip,
    Sampling,
    SumSpec,
    expected_cohort,
    rounded_up,
    task_digest,
)
from penchant.common.taste import TasteConfig
from penchant.simulations.settings import Row, SimulationConfig, laid_over

UNCHARGED = (
    PUBLIC_NUMBER,
    "accuracy, curves and counts here are exact",
)
START_SHARE = 0.9
"""Of μ², for co-occurrence's sums where FedAvg starts from them."""
COUNT_SHARE = 0.02
"""Of μ², for the counts that steer a clip_quantile."""
BY_HAND = "settings were given by hand, and how they were chosen is not known here"
CHOICES = (
    *("rounds", "local_epochs", "lr", "clip", "clip_quantile", "row_clip", "counts_share"),
    *("freeze", "adapter", "proximal", "settings"),
)
"""What `tuned` speaks of where it is given."""


@dataclass(frozen=True, kw_only=True)
class Federated:
    """What a federated row runs: a learner by name, its settings as plain types, and its plan."""

    learner: str
    settings: Mapping[str, Any]
    plan: PrivacyPlan


def federated(row: Row, settings: SimulationConfig, n_users: int, uncharged: tuple[str, ...] = ()) -> Federated:
    """The learner and plan of a row for a roster of so many users.

    Raises:
        InvalidConfig: cohort > users, δ ≥ 1/n, or another mix that cannot be.
    """
    if (scaled := as_if(settings, n_users)) is not None and row.unit == "user":
        return federated(row, scaled.applied(settings, n_users), n_users, uncharged)
    if settings.cohort is not None and settings.cohort > n_users:
        raise InvalidConfig(f"cohort {settings.cohort} is larger than the {n_users} users: take --cohort {n_users}")
    if row.unit != "none" and settings.delta is not None and settings.delta >= 1 / n_users:
        raise InvalidConfig(f"delta {settings.delta:g} is not below 1/{n_users}: take --delta {usual_delta(n_users):g}")
    chosen: tuple[str, ...] = (CHOSEN,)
    if settings.tuned or any(getattr(settings, name) not in (None, ()) for name in CHOICES):
        chosen = (settings.tuned or BY_HAND, f"other {CHOSEN}")
    uncharged = (*uncharged, *chosen, *UNCHARGED, *((PROFILES,) if row.unit == "user" else ()))
    if row.learner in ("cooccurrence", "als", "strengths"):
        made = _statistics(row, settings, n_users, uncharged)
    elif row.unit == "interaction":
        made = _fedavg_interaction(row, settings, n_users, uncharged)
    else:
        made = _fedavg(row, settings, n_users, uncharged)
    return _with_settings(made, settings.settings)


@dataclass(frozen=True, kw_only=True)
class AsIf:
    """Noise scaled, not data: n people get the noise that n′ people of the same distribution would get at (ε, δ).

    Signal grows with the people and noise does not, so the signal-to-noise of n′ people is that of n people with a
    Gaussian budget of μ n′/n. That budget is real and costs these n people the ε that belongs to it; it adds none of
    what n′ people would teach.

    Attributes:
        users: n′.
        epsilon, delta: of those n′ people; never of the people in the data.
    """

    users: int
    epsilon: float
    delta: float

    def applied(self, settings: SimulationConfig, n_users: int) -> SimulationConfig:
        """The same simulation at what it costs the people in the data, and nothing else scaled."""
        mu = gaussian.mu_of(self.epsilon, self.delta) * self.users / n_users
        return replace(settings, as_if_users=None, epsilon=gaussian.epsilon_of(mu, self.delta), delta=self.delta)

    def note(self, n_users: int, guarantee: object) -> str:
        """A guarantee of the people in the data, with what it imitates before it."""
        return f"{self}; for these {n_users:,} people {guarantee}"

    def __str__(self) -> str:
        return f"noise as for {self.users:,} people at ε = {rounded_up(self.epsilon)}: a research figure"


def as_if(settings: SimulationConfig, n_users: int) -> AsIf | None:
    """Whom the noise is scaled for; None where it is as the ε says.

    Raises:
        InvalidConfig: δ ≥ 1/n′.
    """
    if settings.as_if_users is None:
        return None
    most = max(n_users, settings.as_if_users)
    epsilon, delta = epsilon_and_delta(settings, most)
    if delta >= 1 / most:
        raise InvalidConfig(f"delta {delta:g} is not below 1/{most}: take --delta {usual_delta(most):g}")
    return AsIf(users=settings.as_if_users, epsilon=epsilon, delta=delta)


def _with_settings(made: Federated, settings: Mapping[str, Any] | None) -> Federated:
    """With these settings laid over the learner's own, and the plan bound to them where it binds any.

    Raises:
        InvalidConfig: the learner has no such setting or refuses its value, or the plan has no sum that it is about.
    """
    if settings is None:
        return made
    if "transitions" in settings and "transitions" not in made.settings:
        raise InvalidConfig("settings.transitions is of a sum that this budget has no room for: drop it")
    merged = registry.checked(made.learner, laid_over(made.settings, settings))
    plan = replace(made.plan, task=task_digest(made.learner, merged)) if made.plan.task else made.plan
    return replace(made, settings=merged, plan=plan)


def epsilon_and_delta(settings: SimulationConfig, n_users: int) -> tuple[float, float]:
    """The budget of a private row: ε = 8 unless given, δ = 1e-5 or less where the roster is large."""
    return settings.epsilon or 8.0, settings.delta or usual_delta(n_users)


def _statistics(row: Row, settings: SimulationConfig, n_users: int, uncharged: tuple[str, ...]) -> Federated:
    """Co-occurrence, als and strengths: everybody takes part in each of a few sums, and sizes follow from n·μ."""
    epsilon, delta = epsilon_and_delta(settings, n_users)
    mu = math.inf
    if row.unit != "none":
        mu = 1 / settings.noise_multiplier if settings.noise_multiplier else gaussian.mu_of(epsilon, delta)
        mu *= 1 - 1e-9  # dividing it must not round ε up
    learner, plan = planned(
        row.learner,
        n_users=n_users,
        mu=mu,
        delta=delta,
        unit=row.unit,
        counts_share=settings.counts_share or 0.2,
        uncharged=uncharged,
    )
    return Federated(learner=row.learner, settings=learner, plan=plan)


def _warm_start(sigma: float, updates: int, n_users: int) -> tuple[CooccurrenceConfig, tuple[SumSpec, ...]]:
    """Co-occurrence before so many updates with noise σ: START_SHARE of the μ² of all of them together."""
    mu = math.sqrt(START_SHARE / (1 - START_SHARE) * updates) / sigma if sigma else math.inf
    return cooccurrence.automatic(n_users, mu, most_transitions=0.0)


def _fedavg(row: Row, settings: SimulationConfig, n_users: int, uncharged: tuple[str, ...]) -> Federated:
    epsilon, delta = epsilon_and_delta(settings, n_users)
    private = row.unit == "user"
    warm = cooccurrence.split(math.inf) if settings.start == "co-occurrence" else ()
    updates = settings.rounds or (20 if not private else 2 if warm else 4)
    rounds = len(warm) + updates
    usual = 64 if row.model == "transformer" else 300  # people in a round; many small steps suit attention
    cohort = settings.cohort or (n_users if private or warm else min(n_users, usual))
    sampling: Sampling = "poisson" if settings.sampling == "poisson" and private else "none"
    cap = min(settings.max_participations or rounds, rounds)
    if private and sampling == "none":  # each profile has k rounds of its own, and the cohort follows
        if settings.cohort is not None:
            cap = math.ceil(rounds * settings.cohort / n_users)
        cohort = expected_cohort(n_users, cap, rounds)
    if private:
        settings = _with_parts(settings, row.model)
    trains = clips.part(settings.adapter or 0, settings.freeze)
    clip = math.inf
    if private:
        clip = settings.clip or (0.1 if trains == "all" else clips.preset(row.model, trains, _lr(settings, row.model)))

    def plan(sigma: float) -> PrivacyPlan:
        spec = SumSpec(
            name="update", rounds=updates, clip_norm=clip, noise_multiplier=sigma, row_norm=settings.row_clip
        )
        if private and settings.clip_quantile is not None:
            count = QuantileClip(quantile=settings.clip_quantile, noise_multiplier=sigma / math.sqrt(COUNT_SHARE))
            spec = replace(spec, noise_multiplier=sigma / math.sqrt(1 - COUNT_SHARE), quantile=count)
        return PrivacyPlan(
            unit=row.unit,
            n_users=n_users,
            delta=delta,
            sampling=sampling,
            cohort=cohort,
            sums=(*_warm_start(sigma, updates, n_users)[1], spec) if warm else (spec,),
            max_participations=cap,
            uncharged=uncharged,
        )

    reads = reads_history(row.model)
    sigma = 0.0
    if private:
        sigma = settings.noise_multiplier or accounting.calibrate(lambda s: plan(s).events(), epsilon, delta)
    server = {"optimizer": "adam", "lr": 0.03 if reads else 0.05}
    if row.model == "transformer":
        server = {"optimizer": "adam", "lr": 0.01, "decay": 0.01}
    if private:  # a row of a table moves with the few who have the item, everything else with everybody
        few = 0.2 if reads else 1.0
        server = {"optimizer": "sgd", "lr": few if trains != "all" else 20.0 if warm else 200.0}
    learner = {
        "model": {"name": row.model},
        "local": local_training(settings, row.model),
        "server": server,
        "taste": config.encode(TasteConfig(decay=0.8, popularity=0.5 if warm else 1.0 if private else 0.2)),
        **parts(settings),
    }
    if warm:
        learner["cooccurrence"] = config.encode(_warm_start(sigma, updates, n_users)[0])
    return Federated(learner="fedavg", settings=learner, plan=plan(sigma))


def _fedavg_interaction(row: Row, settings: SimulationConfig, n_users: int, uncharged: tuple[str, ...]) -> Federated:
    """A small budget: 10 rounds of 24 devices, 2 steps each. A profile takes part in k rounds, spread evenly.

    Each step reads the whole history (rate 1): with so few steps, drawing samples would save less noise than it loses
    signal.
    """
    epsilon, delta = epsilon_and_delta(settings, n_users)
    rounds, cohort = settings.rounds or 10, settings.cohort or min(n_users, 24)
    cap = min(settings.max_participations or math.ceil(rounds * cohort / n_users), rounds)
    rate, steps = 1.0, 2

    def plan(sigma: float) -> PrivacyPlan:
        return PrivacyPlan(
            unit="interaction",
            n_users=n_users,
            delta=delta,
            sampling="none",
            cohort=cohort,
            sums=(SumSpec(name="update", rounds=rounds, clip_norm=math.inf, row_norm=settings.row_clip),),
            max_participations=cap,
            device=DeviceNoise(
                clip_norm=settings.clip or 0.25,
                noise_multiplier=sigma,
                rate=rate,
                steps=steps,
                divisor=16.0,
            ),
            uncharged=uncharged,
        )

    sigma = settings.noise_multiplier or accounting.calibrate(lambda s: plan(s).events(), epsilon, delta)
    made = plan(sigma)
    learner = {
        "model": {"name": row.model},
        "local": {**local_training(settings, row.model), "lr": settings.lr or 0.5},
        "server": {"optimizer": "sgd", "lr": 1.0},
        "taste": config.encode(TasteConfig(decay=0.8, popularity=1.0)),
        **parts(settings),
        "device": config.encode(made.device),
    }
    bound = replace(made, task=task_digest("fedavg", learner))  # whoever sends orders cannot choose other settings
    return Federated(learner="fedavg", settings=learner, plan=bound)


def local_training(settings: SimulationConfig, model: str) -> dict[str, Any]:
    """Fields of `LocalTraining`, as far as they are not its defaults."""
    local: dict[str, Any] = {"epochs": settings.local_epochs or 1, "lr": _lr(settings, model)}
    return local | ({"proximal": settings.proximal} if settings.proximal else {})


def _lr(settings: SimulationConfig, model: str) -> float:
    return settings.lr or (0.5 if reads_history(model) else 0.05)


def _with_parts(settings: SimulationConfig, model: str) -> SimulationConfig:
    """What trains after a start from co-occurrence, unless it was said: few numbers, so that noise spares the start."""
    if settings.start != "co-occurrence" or settings.freeze or settings.adapter is not None:
        return settings
    match model:
        case "mf":
            return replace(settings, adapter=4, freeze=("bias", "item.down"))
        case "mlp" | "neumf":
            return replace(settings, adapter=4)
        case "transformer":  # whose untrained blocks let the latest item through
            return replace(settings, freeze=("item", "blocks"))
        case _:
            return replace(settings, freeze=("item",))


def parts(settings: SimulationConfig) -> dict[str, Any]:
    """What of the model trains and where it starts, as far as it was asked for: fields of `FedAvgConfig`."""
    asked = {"start": settings.start, "freeze": [*settings.freeze], "adapter": settings.adapter}
    return {name: value for name, value in asked.items() if value}
