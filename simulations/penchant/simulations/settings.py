"""What one simulation is: its data, its rows, its budgets. Everything in it can be published.

`SimulationConfig` is what the command line and config.toml fill in. `rows` turns it into the methods that are compared,
`federated` into the learner, its settings and the privacy plan of one of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from penchant.common import config
from penchant.common.catalogue import Catalogue
from penchant.common.config import did_you_mean
from penchant.common.errors import InvalidConfig
from penchant.common.learners import als, cooccurrence, registry
from penchant.common.learners.cooccurrence import CooccurrenceConfig
from penchant.common.learners.neural import clips
from penchant.common.learners.neural.models import MODELS, reads_history
from penchant.common.privacy import accounting, gaussian
from penchant.common.privacy.plan import (
    DeviceNoise,
    PrivacyPlan,
    QuantileClip,
    Sampling,
    SumSpec,
    Unit,
    expected_cohort,
    rounded_up,
    task_digest,
)
from penchant.common.taste import TasteConfig

LearnerName = Literal["fedavg", "cooccurrence", "als"]
Start = Literal["random", "content", "co-occurrence"]
Kind = Literal["floor", "not private", "federated"]
CHOSEN = "settings were chosen on public MovieLens data"
UNCHARGED = (
    "the number of users is public",
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
PROFILES = "a person enrolled m times counts m times (m·μ)"


@dataclass(frozen=True, kw_only=True)
class SimulationConfig:
    """One simulation. None means: decided by the row (see docs/simulate.md).

    Attributes:
        data, items, rating_scale, skip_bad_rows, k_core: what is loaded; see `data.loaders.load`.
        split: see `splits.split`.
        learner, model, unit: which rows are asked for, beside the floors.
        epsilon, delta: the budget of each private row; both or neither.
        noise_multiplier: instead of epsilon.
        rounds, cohort: of FedAvg rows.
        sampling: "none", or "poisson": a coin for each user, with unit user.
        max_participations: k, rounds in which one profile may take part, with sampling "none".
        local_epochs, lr: of local training.
        clip: of the update (unit user) or of a sample's gradient (unit interaction).
        clip_quantile: with unit user, the clip follows this quantile of updates' norms, from `clip` on; of the budget
            μ², COUNT_SHARE goes to the counts that steer it.
        row_clip: L2 bound on each item's row of an update, before the clip.
        start: where item vectors of FedAvg rows start: "random", "content", or "co-occurrence", whose two sums are then
            the plan's first rounds.
        freeze: weights, or modules of weights, that FedAvg leaves as they start.
        adapter: rank of a map that FedAvg trains in place of item tables; 0 trains the tables.
        proximal: μ of FedProx in local training.
        nodes: Flower nodes that share the users.
        engine: "local", or "flower" for Flower's simulation engine on Ray.
        device: torch device; "auto" takes CUDA where there is one.
        sampled_negatives: also report the 99-sampled-negatives protocol, which does not order methods as full ranking.
        seed: of everything random; results repeat.
        as_if_users: n′: noise as n′ people would get at this ε, a research figure. Noise is scaled, not data, and the
            row's ε is that of the people in the data; see `AsIf`. With unit user only.
        counts_share: of co-occurrence: of μ², for the counts.
        settings: of the learner, laid over what the row decides; checked by the learner's own config.
        tuned: how such settings were chosen, in plain words; listed with what was not charged.
    """

    data: str = "embedded"
    items: str | None = None
    rating_scale: tuple[float, float] | None = None
    skip_bad_rows: bool = False
    k_core: int = 0
    split: str = "leave-last-out"
    learner: str | None = None
    model: str | None = None
    unit: str | None = None
    epsilon: float | None = None
    delta: float | None = None
    noise_multiplier: float | None = None
    rounds: int | None = None
    cohort: int | None = None
    sampling: str | None = None
    max_participations: int | None = None
    local_epochs: int | None = None
    lr: float | None = None
    clip: float | None = None
    clip_quantile: float | None = None
    row_clip: float | None = None
    start: str | None = None
    freeze: tuple[str, ...] = ()
    adapter: int | None = None
    proximal: float | None = None
    nodes: int = 2
    engine: str = "local"
    device: str = "auto"
    sampled_negatives: bool = False
    seed: int = 0
    as_if_users: int | None = None
    counts_share: float | None = None
    settings: Mapping[str, Any] | None = None
    tuned: str | None = None

    def __post_init__(self) -> None:
        for name, known in (
            ("learner", get_args(LearnerName)),
            ("model", MODELS),
            ("unit", get_args(Unit)),
            ("sampling", get_args(Sampling)),
            ("start", get_args(Start)),
            ("engine", ("local", "flower")),
            ("device", ("auto", "cpu", "cuda")),
        ):
            value = getattr(self, name)
            if value is not None and value not in known:
                raise InvalidConfig(f"unknown {name} {value!r}{did_you_mean(value, known)}")
        for name in ("data", "items", "split", "tuned"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise InvalidConfig(f"{name} must be text, not {value!r}")
        if self.rating_scale is not None and len(self.rating_scale) != 2:
            raise InvalidConfig("rating_scale must be two numbers, the lowest and the highest")
        for name in ("rounds", "cohort", "local_epochs", "nodes", "max_participations", "as_if_users"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int) and value >= 1):
                raise InvalidConfig(f"{name} must be a whole number ≥ 1, not {value}")
        for name in ("epsilon", "noise_multiplier", "lr", "clip", "row_clip", "proximal"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InvalidConfig(f"{name} must be positive and finite, not {value:g}")
        for name in ("clip_quantile", "counts_share"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise InvalidConfig(f"{name} must be in (0, 1), not {value:g}")
        if self.delta is not None and not 0 < self.delta < 1:
            raise InvalidConfig(f"delta must be in (0, 1), not {self.delta:g}")
        for name in ("seed", "k_core", "adapter"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int) and value >= 0):
                raise InvalidConfig(f"{name} must be a whole number ≥ 0, not {value}")
        self._check_mix()

    def _check_mix(self) -> None:
        if self.epsilon is not None and self.delta is None:
            raise InvalidConfig("epsilon needs a delta: add --delta 1e-5 (below 1 over the number of users)")
        if self.epsilon is not None and self.noise_multiplier is not None:
            raise InvalidConfig("epsilon and noise_multiplier decide the same thing: give one of them")
        if self.unit == "none":
            for name in ("epsilon", "noise_multiplier", "delta", "clip", "clip_quantile"):
                if getattr(self, name) is not None:
                    raise InvalidConfig(f"unit none promises nothing: drop {name}, or take --unit user")
            if self.sampling == "poisson":
                raise InvalidConfig("unit none has no coins to account for: drop --sampling, or take --unit user")
        if self.unit == "interaction" and self.model is not None and reads_history(self.model):
            others = " or ".join(name for name in MODELS if not reads_history(name))
            raise InvalidConfig(
                f"model {self.model} reads the history, so one interaction enters many samples: take --model {others} "
                "with unit interaction, or --unit user"
            )
        if self.learner in ("cooccurrence", "als"):
            if self.model is not None:
                raise InvalidConfig(f"learner {self.learner} has no model: drop --model, or take --learner fedavg")
            if self.unit == "interaction":
                raise InvalidConfig(f"learner {self.learner} protects users: take --unit user or none")
            for name in (
                "rounds",
                "cohort",
                "sampling",
                "max_participations",
                "local_epochs",
                "lr",
                "clip",
                "clip_quantile",
                "row_clip",
                "start",
                "freeze",
                "adapter",
                "proximal",
            ):
                if getattr(self, name) not in (None, ()):
                    option = "--" + name.replace("_", "-")
                    raise InvalidConfig(
                        f"learner {self.learner} has no {name}: drop {option}, or take --learner fedavg"
                    )
        if self.unit == "interaction" and self.sampling == "poisson":
            raise InvalidConfig("unit interaction samples interactions on the device: drop --sampling")
        if self.unit == "interaction" and self.clip_quantile is not None:
            raise InvalidConfig("unit interaction has a fixed clip of each sample: drop --clip-quantile")
        if self.cohort is not None and self.max_participations is not None and self.unit in (None, "user"):
            raise InvalidConfig("cohort and max_participations decide the same thing with unit user: drop one of them")
        if self.sampling == "poisson" and self.max_participations is not None:
            raise InvalidConfig("poisson sampling has no participation cap: drop one of the two")
        if self.counts_share is not None and self.learner != "cooccurrence":
            raise InvalidConfig("counts_share is of co-occurrence: take --learner cooccurrence")
        if self.as_if_users is not None:
            if self.unit != "user":
                raise InvalidConfig("as_if_users scales the noise on sums over people: take --unit user")
            if self.sampling == "poisson":
                raise InvalidConfig("as_if_users has no scale for coins: drop --sampling")
            if self.noise_multiplier is not None:
                raise InvalidConfig("as_if_users and noise_multiplier decide the same thing: give one of them")
        if self.settings is not None:
            if self.learner is None:
                raise InvalidConfig("settings are of one learner: give --learner")
            if decided := _decided(self.settings):
                raise InvalidConfig(f"settings.{decided} follows from the privacy plan: drop it")
        if self.start == "co-occurrence":
            for name in ("cohort", "sampling", "max_participations"):
                if getattr(self, name) not in (None, "none"):
                    option = "--" + name.replace("_", "-")
                    raise InvalidConfig(f"start co-occurrence needs everybody in every round: drop {option}")
        self._check_learner()

    def _check_learner(self) -> None:
        """Lets the learner refuse what the model does not have, before any work."""
        if not (self.freeze or self.adapter or self.proximal or self.start):
            return
        from penchant.common.learners.neural.fedavg import FedAvg, FedAvgConfig  # which loads Opacus

        model = self.model or "mf"
        asked = {"model": {"name": model}, "local": _local(self, model), **_parts(self)}
        if self.unit == "interaction":
            device = DeviceNoise(clip_norm=1.0, noise_multiplier=1.0, rate=1.0, steps=1, divisor=1.0)
            asked["device"] = config.encode(device)
        FedAvg(Catalogue(ids=("0", "1")), config.decode(FedAvgConfig, asked))


@dataclass(frozen=True)
class Row:
    """One method in the comparison. `learner`, `model` and `unit` are empty for what is not federated."""

    name: str
    kind: Kind
    learner: str = ""
    model: str = ""
    unit: Unit = "none"


def rows(config: SimulationConfig) -> list[Row]:
    """The rows of a run, the two floors first.

    With nothing asked for, every row but als. With a learner, model or unit: the floors and what was asked for, and
    with a model the same model trained centrally beside it. With unit none alone, every row there is without privacy.
    """
    floors = [Row("popularity", "floor"), Row("no-sharing", "floor")]
    asked = (config.learner, config.model, config.unit)
    model = config.model or "mf"
    central = Row("central", "not private", model=model)
    others = [Row("item-knn", "not private"), Row("ease", "not private"), central]
    units: tuple[Unit, ...] = tuple(u for u in get_args(Unit) if config.unit in (None, u))
    if reads_history(model) or config.start == "co-occurrence" or config.adapter or config.proximal:
        units = tuple(u for u in units if u != "interaction")
    names = {"none": "fedavg", "interaction": "fedavg+opacus", "user": "fedavg+user-dp"}
    federated: list[Row] = []
    if config.learner in (None, "fedavg"):
        order: tuple[Unit, ...] = ("none", "interaction", "user")
        federated += [Row(names[u], "federated", "fedavg", model, u) for u in order if u in units]
    if config.learner in (None, "cooccurrence") and config.model is None and config.unit != "interaction":
        unit = config.unit or "user"
        federated.append(Row("co-occurrence", "federated", "cooccurrence", "", unit))  # type: ignore[arg-type]  # one of the units
    if config.learner == "als":  # on request only
        unit = config.unit or "user"
        federated.append(Row("als", "federated", "als", "", unit))  # type: ignore[arg-type]  # one of the units
    if asked == (None, None, None) or asked == (None, None, "none"):
        return [*floors, *others, *federated]
    beside = [central] if config.model is not None and "none" in units else []
    return [*floors, *beside, *federated]


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
        raise InvalidConfig(f"delta {settings.delta:g} is not below 1/{n_users}: take --delta {_delta(n_users):g}")
    chosen: tuple[str, ...] = (CHOSEN,)
    if settings.tuned or any(getattr(settings, name) not in (None, ()) for name in CHOICES):
        chosen = (settings.tuned or BY_HAND, f"other {CHOSEN}")
    uncharged = (*uncharged, *chosen, *UNCHARGED, *((PROFILES,) if row.unit == "user" else ()))
    if row.learner == "cooccurrence":
        made = _cooccurrence(row, settings, n_users, uncharged)
    elif row.learner == "als":
        made = _als(row, settings, n_users, uncharged)
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
        raise InvalidConfig(f"delta {delta:g} is not below 1/{most}: take --delta {_delta(most):g}")
    return AsIf(users=settings.as_if_users, epsilon=epsilon, delta=delta)


def _decided(settings: Mapping[str, Any]) -> str:
    """The path of a setting that the plan decides: which sums there are, and what noise they get; "" if there is none.

    >>> _decided({"transitions": {"window": 2, "noise_stddev": 0.0}})
    'transitions.noise_stddev'
    """
    for name, value in settings.items():
        if name in ("device", "start") and not isinstance(value, Mapping):
            return name
        if name == "device" or name.startswith("noise") or name.endswith("_stddev"):
            return name
        if isinstance(value, Mapping) and (below := _decided(value)):
            return f"{name}.{below}"
    return ""


def _with_settings(made: Federated, settings: Mapping[str, Any] | None) -> Federated:
    """With these settings laid over the learner's own, and the plan bound to them where it binds any.

    Raises:
        InvalidConfig: the learner has no such setting or refuses its value, or the plan has no sum that it is about.
    """
    if settings is None:
        return made
    if "transitions" in settings and "transitions" not in made.settings:
        raise InvalidConfig("settings.transitions is of a sum that this budget has no room for: drop it")
    merged = registry.checked(made.learner, _laid_over(made.settings, settings))
    plan = replace(made.plan, task=task_digest(made.learner, merged)) if made.plan.task else made.plan
    return replace(made, settings=merged, plan=plan)


def _laid_over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Nested tables, those above winning key by key.

    >>> _laid_over({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}})
    {'a': {'b': 3, 'c': 2}}
    """
    out = dict(below)
    for name, value in above.items():
        under = out.get(name)
        both = isinstance(value, Mapping) and isinstance(under, Mapping)
        out[name] = _laid_over(under, value) if both else value  # type: ignore[arg-type]  # both are tables
    return out


def epsilon_and_delta(settings: SimulationConfig, n_users: int) -> tuple[float, float]:
    """The budget of a private row: ε = 8 unless given, δ = 1e-5 or less where the roster is large."""
    return settings.epsilon or 8.0, settings.delta or _delta(n_users)


def _delta(n_users: int) -> float:
    """1e-5, or the power of ten at or below 1/(10 n) for a large roster."""
    return min(1e-5, 10.0 ** math.floor(math.log10(0.1 / n_users)))


def _cooccurrence(row: Row, settings: SimulationConfig, n_users: int, uncharged: tuple[str, ...]) -> Federated:
    """Everybody takes part once in each of the two or three sums."""
    epsilon, delta = epsilon_and_delta(settings, n_users)
    mu = math.inf
    if row.unit != "none":
        mu = 1 / settings.noise_multiplier if settings.noise_multiplier else gaussian.mu_of(epsilon, delta)
        mu *= 1 - 1e-9  # dividing it must not round ε up
    learner, sums = cooccurrence.automatic(n_users, mu, counts_share=settings.counts_share or 0.2)
    plan = PrivacyPlan(
        unit=row.unit,
        n_users=n_users,
        delta=delta,
        sampling="none",
        cohort=n_users,
        sums=sums,
        max_participations=len(sums),
        uncharged=uncharged,
    )
    return Federated(learner="cooccurrence", settings=config.encode(learner), plan=plan)


def _als(row: Row, settings: SimulationConfig, n_users: int, uncharged: tuple[str, ...]) -> Federated:
    """Everybody takes part once in counts, in the matrix and in each sweep; sizes follow n·μ (`als.automatic`)."""
    epsilon, delta = epsilon_and_delta(settings, n_users)
    if row.unit == "none":
        learner, sums = als.automatic(n_users, math.inf)
    else:
        mu = 1 / settings.noise_multiplier if settings.noise_multiplier else gaussian.mu_of(epsilon, delta)
        learner, sums = als.automatic(n_users, mu * (1 - 1e-9))  # dividing it must not round ε up
    plan = PrivacyPlan(
        unit=row.unit,
        n_users=n_users,
        delta=delta,
        sampling="none",
        cohort=n_users,
        sums=sums,
        max_participations=sum(spec.rounds for spec in sums),
        uncharged=uncharged,
    )
    return Federated(learner="als", settings=config.encode(learner), plan=plan)


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
        "local": _local(settings, row.model),
        "server": server,
        "taste": config.encode(TasteConfig(decay=0.8, popularity=0.5 if warm else 1.0 if private else 0.2)),
        **_parts(settings),
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
        "local": {**_local(settings, row.model), "lr": settings.lr or 0.5},
        "server": {"optimizer": "sgd", "lr": 1.0},
        "taste": config.encode(TasteConfig(decay=0.8, popularity=1.0)),
        **_parts(settings),
        "device": config.encode(made.device),
    }
    bound = replace(made, task=task_digest("fedavg", learner))  # whoever sends orders cannot choose other settings
    return Federated(learner="fedavg", settings=learner, plan=bound)


def _local(settings: SimulationConfig, model: str) -> dict[str, Any]:
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
        case "neumf":
            return replace(settings, adapter=4)
        case "transformer":  # whose untrained blocks let the latest item through
            return replace(settings, freeze=("item", "blocks"))
        case _:
            return replace(settings, freeze=("item",))


def _parts(settings: SimulationConfig) -> dict[str, Any]:
    """What of the model trains and where it starts, as far as it was asked for: fields of `FedAvgConfig`."""
    asked = {"start": settings.start, "freeze": [*settings.freeze], "adapter": settings.adapter}
    return {name: value for name, value in asked.items() if value}


@dataclass(frozen=True, kw_only=True)
class Range:
    """One public setting that `penchant sweep` may choose.

    Attributes:
        name: a field of SimulationConfig, or `settings.` and the path of a learner's own setting.
        low, high: its ends; both whole numbers, or neither.
        log: whether it is drawn evenly on a logarithmic scale.
        units: with which of them it means anything.
    """

    name: str
    low: float
    high: float
    log: bool = False
    units: tuple[Unit, ...] = ("user", "none")

    def applied(self, settings: SimulationConfig, value: float) -> SimulationConfig:
        """The simulation with this value of the setting."""
        first, *path = self.name.split(".")
        table: Any = value
        if not path:
            return replace(settings, **{first: table})
        for key in reversed(path):
            table = {key: table}
        return replace(settings, settings=_laid_over(settings.settings or {}, table))


_TASTE = (
    Range(name="settings.taste.decay", low=0.3, high=1.0),
    Range(name="settings.taste.popularity", low=0.01, high=10.0, log=True),
)
SPACES: Mapping[str, tuple[Range, ...]] = {
    "cooccurrence": (
        Range(name="settings.head", low=50, high=2000, log=True),
        Range(name="settings.dims", low=2, high=64, log=True),
        Range(name="settings.window", low=1, high=50, log=True),
        Range(name="settings.whiten", low=0.0, high=0.6),
        Range(name="settings.even", low=0.0, high=1.0),
        Range(name="settings.content", low=0.0, high=2.0),
        Range(name="counts_share", low=0.02, high=0.5, log=True, units=("user",)),
        *_TASTE,
    ),
    "fedavg": (
        Range(name="rounds", low=1, high=40, log=True),
        Range(name="local_epochs", low=1, high=4),
        Range(name="lr", low=1e-3, high=2.0, log=True),
        Range(name="clip", low=0.01, high=2.0, log=True, units=("user",)),
        Range(name="settings.server.lr", low=1.0, high=2000.0, log=True, units=("user",)),
        Range(name="settings.server.lr", low=3e-3, high=0.3, log=True, units=("none",)),
        *_TASTE,
    ),
}
"""What may be chosen of each learner; all of it is public, and none of it decides ε."""
