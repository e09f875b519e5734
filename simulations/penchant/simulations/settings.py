"""What one simulation is: its data, its rows, its budgets. Everything in it can be published.

`SimulationConfig` is what the command line and config.toml fill in. `rows` turns it into the methods that are compared;
`plans.py` turns one of them into a learner, its settings and a privacy plan.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from penchant.common import config
from penchant.common.catalogue import Catalogue
from penchant.common.config import did_you_mean
from penchant.common.errors import InvalidConfig
from penchant.common.learners.neural.models import MODELS, reads_history
from penchant.common.privacy.plan import (
    DeviceNoise,
    Sampling,
    Unit,
)

LearnerName = Literal["fedavg", "cooccurrence", "als", "strengths"]
Start = Literal["random", "content", "co-occurrence"]
Kind = Literal["floor", "not private", "federated"]


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
        if self.learner not in (None, "fedavg"):
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
        from penchant.simulations.plans import local_training, parts  # which needs this module

        model = self.model or "mf"
        asked = {"model": {"name": model}, "local": local_training(self, model), **parts(self)}
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

    With nothing asked for, every row but als and strengths. With a learner, model or unit: the floors and what was
    asked for, and with a model the same model trained centrally beside it. With unit none alone, every row there is
    without privacy.
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
    if config.learner in ("als", "strengths"):  # on request only
        unit = config.unit or "user"
        federated.append(Row(config.learner, "federated", config.learner, "", unit))  # type: ignore[arg-type]  # one of the units
    if asked == (None, None, None) or asked == (None, None, "none"):
        return [*floors, *others, *federated]
    beside = [central] if config.model is not None and "none" in units else []
    return [*floors, *beside, *federated]


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


def laid_over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Nested tables, those above winning key by key.

    >>> laid_over({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}})
    {'a': {'b': 3, 'c': 2}}
    """
    out = dict(below)
    for name, value in above.items():
        under = out.get(name)
        both = isinstance(value, Mapping) and isinstance(under, Mapping)
        out[name] = laid_over(under, value) if both else value  # type: ignore[arg-type]  # both are tables
    return out
