"""One object that decides the guarantee: who is drawn, what is clipped, how much noise, what is charged.

Sampler, clip, divisor, σ, rounds, participation cap and accounting events come from one frozen, public,
data-independent plan, so that a mix that does not belong together cannot be built.

Units, never mixed:
    user         adding or removing one enrolled profile changes what is released by at most (ε, δ);
    interaction  adding or removing one interaction of one person changes what that device sends by at most (ε, δ);
    none         nothing is promised and every number is exact.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, cast

from penchant.common.errors import InvalidConfig, PrivacyRefused, UnknownMechanism
from penchant.common.privacy import accounting
from penchant.common.privacy.accounting import Neighbours
from penchant.common.privacy.events import Event, Gaussian, PoissonGaussian

SCHEMA_VERSION = 1
MAX_USERS = 1 << 24
"""Of one population with unit "user": up to there its sums are exact in float64 (`sums.py`)."""
Unit = Literal["user", "interaction", "none"]
Sampling = Literal["poisson", "none"]


@dataclass(frozen=True, kw_only=True)
class QuantileClip:
    """A bound that follows a quantile of contributions' norms, from noisy counts of how many were within it.

    Each contribution carries one more number, +½ where its norm was within C and −½ where not; the round releases their
    noised sum b̃, and C ← C · exp(−η (½ + b̃/divisor − γ)). Whoever is drawn and does not answer adds nothing, and so
    counts as half within. C moves towards the quantile from below and from above.

    Attributes:
        quantile: γ in (0, 1), share of contributions that should be within the bound.
        noise_multiplier: σ of that count, over its sensitivity of ½; positive, finite.
        step: η > 0.
        lowest, highest: what C is kept within.

    Source: Andrew et al. 2021, https://arxiv.org/abs/1905.03871, Algorithm 1.
    """

    quantile: float
    noise_multiplier: float
    step: float = 0.2
    lowest: float = 1e-6
    highest: float = 1e6

    def __post_init__(self) -> None:
        if not 0 < self.quantile < 1:
            raise InvalidConfig(f"quantile must be in (0, 1), not {self.quantile}")
        for name in ("noise_multiplier", "step", "lowest", "highest"):
            if not 0 < getattr(self, name) < math.inf:
                raise InvalidConfig(f"{name} must be positive and finite, not {getattr(self, name)}")
        if not self.lowest < self.highest:
            raise InvalidConfig("lowest must be below highest")

    def next(self, clip_norm: float, noisy_sum: float, divisor: float) -> float:
        """C of the next round, from the noised sum of this one's ±½."""
        within = min(1.0, max(0.0, 0.5 + noisy_sum / divisor))
        return min(self.highest, max(self.lowest, clip_norm * math.exp(-self.step * (within - self.quantile))))


@dataclass(frozen=True, kw_only=True)
class SumSpec:
    """One kind of sum that the rounds ask for.

    Attributes:
        name: what the learner calls it, such as "counts" or "update".
        rounds: how many rounds ask for it, one after another; ≥ 1.
        clip_norm: C, L2 bound on one person's contribution; infinite only with unit "none". With `quantile` the first
            round's.
        noise_multiplier: σ on the server's sum; positive with unit "user", else 0.
        row_norm: L2 bound on each row of a contribution's arrays, applied before C; it costs no privacy and bounds what
            one person can do to one item.
        quantile: how C adapts, at the cost of its own noisy count; with unit "user" only.
    """

    name: str
    rounds: int
    clip_norm: float
    noise_multiplier: float = 0.0
    row_norm: float | None = None
    quantile: QuantileClip | None = None

    def __post_init__(self) -> None:
        _check_whole(rounds=self.rounds)
        if not self.clip_norm > 0:
            raise InvalidConfig(f"clip_norm must be positive, not {self.clip_norm}")
        if not 0.0 <= self.noise_multiplier < math.inf:
            raise InvalidConfig(f"noise_multiplier must be finite and ≥ 0, not {self.noise_multiplier}")
        if self.row_norm is not None and not 0 < self.row_norm < math.inf:
            raise InvalidConfig(f"row_norm must be positive and finite, not {self.row_norm}")
        if self.quantile is not None:
            if not self.noise_multiplier > 0:
                raise InvalidConfig(f"sum {self.name}: a quantile clip needs noise on the sum: give unit user")
            if not self.quantile.lowest <= self.clip_norm <= self.quantile.highest:
                raise InvalidConfig("clip_norm must be between the quantile clip's lowest and highest")

    def bound(self, state: Mapping[str, Any]) -> float:
        """C of the round that starts from this state, where a quantile's C is kept under `clip/NAME`.

        Raises:
            PrivacyRefused: the state's C is outside what the plan allows.
        """
        if self.quantile is None:
            return self.clip_norm
        now = float(state.get(self.clip_key, self.clip_norm))
        if not self.quantile.lowest <= now <= self.quantile.highest:  # also refuses NaN
            raise PrivacyRefused(f"sum {self.name}: the state's clip_norm is outside the plan's lowest and highest")
        return now

    @property
    def clip_key(self) -> str:
        """Where a state keeps this sum's C."""
        return f"clip/{self.name}"

    @property
    def charged_multiplier(self) -> float:
        """σ of one round's whole release: the sum and, with a quantile, the count beside it, as one Gaussian vector.

        Both read the same draw of people, so they are one event: 1/σ² = 1/σ_sum² + 1/σ_count².
        """
        if self.quantile is None:
            return self.noise_multiplier
        return 1 / math.hypot(1 / self.noise_multiplier, 1 / self.quantile.noise_multiplier)


@dataclass(frozen=True, kw_only=True)
class DeviceNoise:
    """DP-SGD on the device, with unit "interaction". Every field is a public constant.

    Attributes:
        clip_norm: L2 bound on the gradient of one sample (one positive with its negatives).
        noise_multiplier: σ of one step, over clip_norm.
        rate: probability with which a step takes each interaction.
        steps: of one round, whatever the history's length.
        divisor: what a step's noisy sum is divided by.
        min_history: m; the first m − 1 interactions never take part, so that a device with fewer sends noise only and
            one interaction more still adds one sample.
    """

    clip_norm: float
    noise_multiplier: float
    rate: float
    steps: int
    divisor: float
    min_history: int = 1

    def __post_init__(self) -> None:
        for name in ("clip_norm", "noise_multiplier", "divisor"):
            if not 0 < getattr(self, name) < math.inf:
                raise InvalidConfig(f"{name} must be positive and finite, not {getattr(self, name)}")
        if not 0 < self.rate <= 1:
            raise InvalidConfig(f"rate must be in (0, 1], not {self.rate}")
        _check_whole(steps=self.steps, min_history=self.min_history)


def rounded_up(epsilon: float) -> str:
    """An ε to three digits, never below itself: it is an upper bound.

    >>> rounded_up(8.004), rounded_up(8.0), rounded_up(1.187)
    ('8.01', '8', '1.19')
    """
    if epsilon <= 0:
        return "0"
    unit = 10.0 ** (math.floor(math.log10(epsilon)) - 2)
    return f"{math.ceil(epsilon / unit - 1e-9) * unit:.10g}"


@dataclass(frozen=True, kw_only=True)
class Guarantee:
    """An ε with everything without which it means nothing; its text always carries all of it."""

    unit: Unit
    epsilon: float
    delta: float
    neighbours: str
    sampler: str
    accountant: str
    noise_multiplier: tuple[float, ...]
    clip: tuple[float, ...]
    trust: str
    uncharged: tuple[str, ...]

    def __str__(self) -> str:
        left_out = "; ".join(self.uncharged) or "nothing"
        return (
            f"ε = {rounded_up(self.epsilon)} at δ = {self.delta:g}, unit {self.unit} ({self.neighbours}), "
            f"sampling {self.sampler}, accountant {self.accountant}, trust {self.trust}, not charged: {left_out}"
        )


@dataclass(frozen=True, kw_only=True)
class PrivacyPlan:
    """What decides the guarantee. Every field is public.

    Attributes:
        unit: whose presence is protected.
        n_users: size of the frozen roster.
        delta: δ < 1/n_users.
        sampling: "poisson" draws each user by a coin of its own; "none" claims no amplification.
        cohort: users expected in a round; the divisor of every sum, whoever answers. With unit user and sampling
            "none" at most what k allows (`expected_cohort`).
        sums: what the rounds ask for, in order.
        max_participations: k, rounds in which one profile may take part; enforced when the cohort is drawn, and by
            the node. With unit user and sampling "none" each profile takes part in k rounds of its own.
        device: DP-SGD on the device, with unit "interaction" only.
        enforced_by: who holds every profile to k: "roster and device", or "nothing", as in a fleet where nobody counts
            participations; then only k = rounds can be claimed.
        schedule: root of the rows from which each profile's rounds are drawn with unit user and sampling "none"; no
            secret, since no amplification is claimed.
        task: digest of learner and settings (`task_digest`); a node refuses any other. "" leaves them open, which is
            for unit user and none, where a device's bound does not rest on them.
        population: whose ledger is charged.
        uncharged: choices that looked at data and were not charged, in plain words.
    """

    unit: Unit
    n_users: int
    delta: float
    sampling: Sampling
    cohort: int
    sums: tuple[SumSpec, ...]
    max_participations: int
    device: DeviceNoise | None = None
    enforced_by: Literal["roster and device", "nothing"] = "roster and device"
    schedule: int = 0
    task: str = ""
    population: str = "default"
    uncharged: tuple[str, ...] = ()
    schema_version: int = field(default=SCHEMA_VERSION)

    def __post_init__(self) -> None:
        if self.unit not in ("user", "interaction", "none") or self.sampling not in ("poisson", "none"):
            raise UnknownMechanism(f"unit {self.unit!r} with sampling {self.sampling!r} is unknown")
        if self.schema_version != SCHEMA_VERSION:
            raise UnknownMechanism(f"plan version {self.schema_version} is unknown here; update penchant")
        _check_whole(n_users=self.n_users, cohort=self.cohort, max_participations=self.max_participations)
        if self.cohort > self.n_users:
            raise InvalidConfig(f"cohort must be between 1 and the {self.n_users} users, not {self.cohort}")
        if self.unit != "none" and not 0 < self.delta < 1 / self.n_users:
            raise InvalidConfig(f"delta must be below 1/{self.n_users} (one over the users), not {self.delta:g}")
        if not self.sums or self.max_participations > self.rounds:
            raise InvalidConfig(f"max_participations must be between 1 and the {self.rounds} rounds")
        if self.sampling == "poisson" and self.max_participations != self.rounds:
            raise InvalidConfig("poisson sampling has no participation cap: a cap would bend its coins")
        if self.enforced_by not in ("roster and device", "nothing"):
            raise UnknownMechanism(f"enforced_by {self.enforced_by!r} is unknown; update penchant")
        if self.enforced_by == "nothing" and self.max_participations != self.rounds:
            raise InvalidConfig(
                f"nothing enforces a cap of {self.max_participations}: plan max_participations = {self.rounds} rounds, "
                "or have roster and devices count"
            )
        if not isinstance(self.schedule, int) or self.schedule < 0:
            raise InvalidConfig(f"schedule must be a whole number ≥ 0, not {self.schedule}")
        if self.unit == "user" and self.n_users > MAX_USERS:
            raise InvalidConfig(f"exact sums hold up to {MAX_USERS} users: split the roster into populations")
        if self.unit == "user" and self.sampling == "none":
            most = expected_cohort(self.n_users, self.max_participations, self.rounds)
            if self.cohort > most:
                raise InvalidConfig(
                    f"{self.max_participations} of {self.rounds} rounds per profile make {most} users a round, not "
                    f"{self.cohort}: raise max_participations or take cohort {most}"
                )
        for spec in self.sums:
            if (self.unit == "user") != (spec.noise_multiplier > 0):
                raise InvalidConfig(f"sum {spec.name}: the server adds noise with unit user, and only then")
            if self.unit == "user" and not math.isfinite(spec.clip_norm):
                raise InvalidConfig(f"sum {spec.name}: unit user needs a finite clip_norm")
        if (self.unit == "interaction") != (self.device is not None):
            raise InvalidConfig("unit interaction needs device noise, and only that unit has it")

    @property
    def rounds(self) -> int:
        return sum(spec.rounds for spec in self.sums)

    @property
    def charged_cap(self) -> int | None:
        """k, where the ledger may count only k of this plan's sums for one profile; None where every one counts."""
        return self.max_participations if self.sampling == "none" else None

    @property
    def divisor(self) -> float:
        """What every sum is divided by: the cohort that the plan expects, never the one that came."""
        return float(self.cohort)

    @property
    def rate(self) -> float:
        """q, the probability of each user's coin."""
        return self.cohort / self.n_users

    def spec(self, round: int) -> SumSpec:
        """The sum that this round (from 1) asks for.

        Raises:
            InvalidConfig: the plan has no such round.
        """
        left = round
        for spec in self.sums:
            if 1 <= left <= spec.rounds:
                return spec
            left -= spec.rounds
        raise InvalidConfig(f"the plan has rounds 1 to {self.rounds}, no round {round}")

    def event(self, round: int) -> Event | None:
        """What the server's release of this round is charged as; None where the server promises nothing."""
        spec = self.spec(round)
        if self.unit != "user":
            return None
        if self.sampling == "poisson" and self.rate < 1:
            return PoissonGaussian(noise_multiplier=spec.charged_multiplier, rate=self.rate)
        return Gaussian(noise_multiplier=spec.charged_multiplier)

    def device_event(self) -> PoissonGaussian | None:
        """What one participation is charged as in the ledger of the device."""
        if self.device is None:
            return None
        return PoissonGaussian(
            noise_multiplier=self.device.noise_multiplier, rate=self.device.rate, count=self.device.steps
        )

    def events(self, rounds: int | None = None) -> tuple[Event, ...]:
        """Everything one unit is charged for over the first `rounds` rounds (all of them if None).

        Without amplification one profile is in at most k sums, so the k least noisy ones bound its cost.
        """
        done = self.rounds if rounds is None else rounds
        times = min(self.max_participations, done)
        if times == 0:
            return ()
        if (one := self.device_event()) is not None:
            return (replace(one, count=one.count * times),)
        released = [event for r in range(1, done + 1) if (event := self.event(r)) is not None]
        worst = sorted(released, key=lambda e: e.noise_multiplier)[:times]
        counts: dict[Event, int] = {}
        for event in worst:
            counts[event] = counts.get(event, 0) + 1
        return tuple(replace(event, count=n) for event, n in counts.items())

    def guarantee(
        self, rounds: int | None = None, neighbours: Neighbours = "add/remove", repeated: Sequence[Event] = ()
    ) -> Guarantee | None:
        """What holds after so many rounds (all of them if None); None with unit "none".

        Args:
            repeated: releases of rounds that had to be run again, which the plan does not know of.

        Raises:
            PrivacyRefused: no accountant gives a bound.
            MissingExtra: the plan samples and dp-accounting is not installed.
        """
        if self.unit == "none":
            return None
        bound = accounting.epsilon((*self.events(rounds), *repeated), self.delta, neighbours, self.unit)
        noise, clips = (
            ((self.device.noise_multiplier,), (self.device.clip_norm,))
            if self.device
            else (tuple(s.charged_multiplier for s in self.sums), tuple(s.clip_norm for s in self.sums))
        )
        return Guarantee(
            unit=self.unit,
            epsilon=bound.epsilon,
            delta=self.delta,
            neighbours=f"{neighbours} one {'profile' if self.unit == 'user' else 'interaction'}",
            sampler=self._sampler_words(),
            accountant=bound.accountant,
            noise_multiplier=noise,
            clip=clips,
            trust="server" if self.unit == "user" else "own device",
            uncharged=self.uncharged,
        )

    def _sampler_words(self) -> str:
        if self.device is not None:
            if self.device.rate == 1:
                return f"none: each of {self.device.steps} steps reads every interaction"
            return f"poisson over own interactions, rate {self.device.rate:g}"
        if self.sampling == "poisson":
            return f"poisson over users, rate {self.rate:.4g}, holds against those who do not see the draw"
        return f"none (at most {self.max_participations} of {self.rounds} sums per profile)"

    def to_json(self) -> str:
        """The plan as canonical JSON: sorted keys, no spaces; what is hashed and sent.

        A field added after the first release is left out at its default, so that older plans keep their digest.
        """
        return self._json

    @cached_property
    def _json(self) -> str:
        fields = _without(asdict(self), _ADDED)
        fields["sums"] = [_without(spec, _ADDED_TO_SUMS) for spec in fields["sums"]]
        for spec in fields["sums"]:
            if spec["clip_norm"] == math.inf:  # JSON has no infinity
                spec["clip_norm"] = None
        return json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON, in hex."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @classmethod
    def from_json(cls, text: str) -> PrivacyPlan:
        """The plan of such JSON.

        Raises:
            UnknownMechanism: a field or value that this version does not know.
        """
        try:
            fields = cast("dict[str, Any]", json.loads(text))
            sums = cast("Sequence[dict[str, Any]]", fields["sums"])
            fields["sums"] = tuple(_sum_spec(s) for s in sums)
            if fields.get("device") is not None:
                fields["device"] = DeviceNoise(**fields["device"])
            fields["uncharged"] = tuple(fields.get("uncharged", ()))
            return cls(**fields)
        except (TypeError, KeyError, ValueError):
            raise UnknownMechanism("plan has missing or unknown fields; update penchant") from None


_ADDED = {"enforced_by": "roster and device", "schedule": 0, "task": ""}
_ADDED_TO_SUMS = {"row_norm": None, "quantile": None}


def _without(fields: dict[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in defaults or value != defaults[name]}


def _sum_spec(fields: dict[str, Any]) -> SumSpec:
    clip_norm = math.inf if fields["clip_norm"] is None else fields["clip_norm"]
    quantile = None if fields.get("quantile") is None else QuantileClip(**fields["quantile"])
    return SumSpec(**{**fields, "clip_norm": clip_norm, "quantile": quantile})


def task_digest(learner: str, settings: Mapping[str, Any]) -> str:
    """SHA-256, in hex, of a learner's name and settings as canonical JSON."""
    text = json.dumps({"learner": learner, "settings": settings}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def expected_cohort(n_users: int, cap: int, rounds: int) -> int:
    """Users in a round, in the mean, when each takes part in `cap` rounds of their own: at least 1."""
    return max(1, round(n_users * cap / rounds))


def _check_whole(**counts: int) -> None:
    for name, value in counts.items():
        if not isinstance(value, int) or value < 1:
            raise InvalidConfig(f"{name} must be a whole number ≥ 1, not {value}")
