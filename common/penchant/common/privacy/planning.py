"""Solves a plan for what is missing: noise, ε or the number of rounds, from the other two.

What is planned is one kind of sum, `rounds` times. With unit "user" the server adds noise σC to each; with unit
"interaction" each device trains with noise. How long the noise is beside the signal is known beforehand, without data:

    unit user         σC per coordinate against cohort · C, if everybody drawn sends the same direction: σ / cohort
    unit interaction  σC · √(cohort · steps) against cohort · steps · C, with one interaction in every step of every
                      device, all of one direction: σ / √(cohort · steps)

times √size for the length of the noise in a vector of so many numbers, and over √rounds once all rounds are added up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from penchant.common.errors import InvalidConfig, PrivacyRefused
from penchant.common.privacy import accounting
from penchant.common.privacy.events import Gaussian
from penchant.common.privacy.plan import DeviceNoise, Guarantee, PrivacyPlan, Sampling, SumSpec, expected_cohort

MOST_ROUNDS = 10**5
DIGITS = 5
"""A σ that is solved for is rounded up to so many digits, so that it can be copied from a table."""
UNCHARGED = {
    "user": ("the number of users is public", "a person enrolled m times counts m times (m·μ)"),
    "interaction": ("that a person takes part", "n interactions of one person count n times or more"),
}


@dataclass(frozen=True, kw_only=True)
class NoiseToSignal:
    """Expected length of the noise over that of the signal, were all contributions of one direction; lower is better.

    Attributes:
        size: numbers in the vector.
        per_round: in one round, along one direction.
        vector: in one round, over all `size` numbers.
        over_rounds: as `per_round`, with all rounds added up.
    """

    size: int
    per_round: float
    vector: float
    over_rounds: float


@dataclass(frozen=True, kw_only=True)
class Solved:
    """A plan that keeps what was asked, and what it promises.

    Attributes:
        solved_for: what was missing: "noise_multiplier", "epsilon" or "rounds".
        assumed: choices that were left open and made here, in plain words.
        opinions: ε by the name of each accountant that was asked (`accounting.opinions`).
    """

    plan: PrivacyPlan
    guarantee: Guarantee
    solved_for: Literal["noise_multiplier", "epsilon", "rounds"]
    assumed: tuple[str, ...]
    opinions: dict[str, float]
    noise_to_signal: NoiseToSignal

    @property
    def noise_multiplier(self) -> float:
        """σ of one round's sum, or of one step on the device."""
        device = self.plan.device
        return device.noise_multiplier if device else self.plan.sums[0].noise_multiplier


def solve(
    *,
    users: int,
    delta: float,
    rounds: int | None = None,
    epsilon: float | None = None,
    noise_multiplier: float | None = None,
    cohort: int | None = None,
    max_participations: int | None = None,
    unit: Literal["user", "interaction"] = "user",
    sampling: Sampling | None = None,
    clip: float = 1.0,
    open_fleet: bool = False,
    rate: float = 1.0,
    steps: int = 1,
    size: int = 1,
) -> Solved:
    """The plan with two of `rounds`, `epsilon` and `noise_multiplier` given, solved for the third.

    ε solved for is that of the plan; σ is the smallest that keeps ε, rounded up; rounds are the most that keep ε.

    Args:
        cohort: users expected in a round; None for everybody, or with a cap for as many as it allows.
        max_participations: k; None for every round.
        sampling: None for "poisson" where a smaller cohort and no cap is given with unit user, else "none".
        clip: C, of a contribution or, with unit interaction, of one sample's gradient.
        open_fleet: nobody counts participations, so that k < rounds cannot be claimed.
        rate, steps: of one participation's training, with unit interaction only.
        size: numbers in the vector, for the noise-to-signal.

    Raises:
        InvalidConfig: not exactly two of the three, or a mix that a plan refuses.
        PrivacyRefused: no noise or no accountant reaches what is asked.
        MissingExtra: the plan samples and dp-accounting is not installed.
    """
    if [rounds, epsilon, noise_multiplier].count(None) != 1:
        raise InvalidConfig("give two of rounds, epsilon and noise_multiplier: the third is solved for")
    if noise_multiplier is not None and not 0 < noise_multiplier < math.inf:
        raise InvalidConfig(f"noise_multiplier must be positive and finite, not {noise_multiplier:g}")
    if unit == "user" and (rate != 1.0 or steps != 1):
        raise InvalidConfig("rate and steps are of training on the device: they go with unit interaction")
    if not isinstance(size, int) or size < 1:
        raise InvalidConfig(f"size must be a whole number ≥ 1, not {size}")
    if rounds is None and max_participations is not None:
        raise InvalidConfig("rounds beyond a cap cost nothing, so there is no most: give rounds, or leave the cap out")
    assumed = []
    if sampling is None:
        drawn = unit == "user" and cohort is not None and cohort < users and max_participations is None
        sampling = "poisson" if drawn and not open_fleet else "none"
        assumed.append(f"sampling {sampling}")

    def everybody(rounds: int, cap: int) -> int:
        return min(users, expected_cohort(users, cap, rounds)) if unit == "user" else users

    def plan(sigma: float, rounds: int) -> PrivacyPlan:
        cap = rounds if max_participations is None else max_participations
        device = None
        if unit == "interaction":  # the divisor of its steps is the learner's; no ε depends on it
            device = DeviceNoise(clip_norm=clip, noise_multiplier=sigma, rate=rate, steps=steps, divisor=1.0)
        spec = SumSpec(
            name="update",
            rounds=rounds,
            clip_norm=clip if unit == "user" else math.inf,
            noise_multiplier=sigma if unit == "user" else 0.0,
        )
        return PrivacyPlan(
            unit=unit,
            n_users=users,
            delta=delta,
            sampling=sampling,
            cohort=everybody(rounds, cap) if cohort is None else cohort,
            sums=(spec,),
            max_participations=cap,
            device=device,
            enforced_by="nothing" if open_fleet else "roster and device",
            uncharged=UNCHARGED[unit],
        )

    start = plan(1.0 if noise_multiplier is None else noise_multiplier, 1 if rounds is None else rounds)
    (event,) = start.events()  # one kind of sum, so one kind of event
    solved_for: Literal["noise_multiplier", "epsilon", "rounds"] = "epsilon"
    made = start
    if epsilon is not None and rounds is not None:
        solved_for = "noise_multiplier"
        found = accounting.calibrate(lambda sigma: [replace(event, noise_multiplier=sigma)], epsilon, delta)
        made = plan(_short(found), rounds)
    elif epsilon is not None and noise_multiplier is not None:
        solved_for = "rounds"
        most = accounting.most_rounds(
            lambda n: [replace(event, count=event.count * n)], epsilon, delta, limit=MOST_ROUNDS
        )
        if not 0 < most < MOST_ROUNDS:
            words = "one round costs more than" if most == 0 else f"{MOST_ROUNDS:,} rounds cost less than"
            raise InvalidConfig(f"{words} epsilon {epsilon:g}: give {'more' if most == 0 else 'less'} noise")
        made = plan(noise_multiplier, most)
    guarantee = made.guarantee()
    if guarantee is None or (epsilon is not None and guarantee.epsilon > epsilon):
        raise PrivacyRefused("the plan found does not keep its epsilon")
    if cohort is None:
        assumed.append(f"a cohort of {made.cohort:,}")
    if max_participations is None:
        assumed.append("up to one participation in every round")
    return Solved(
        plan=made,
        guarantee=guarantee,
        solved_for=solved_for,
        assumed=tuple(assumed),
        opinions=accounting.opinions(made.events(), delta, unit=unit),
        noise_to_signal=noise_to_signal(made, size),
    )


def noise_to_signal(plan: PrivacyPlan, size: int = 1) -> NoiseToSignal:
    """What to expect of a plan of one kind of sum, for a vector of `size` numbers."""
    sigma, terms = plan.sums[0].noise_multiplier, float(plan.cohort)
    if plan.device is not None:
        sigma, terms = plan.device.noise_multiplier, math.sqrt(plan.cohort * plan.device.steps)
    one = sigma / terms
    return NoiseToSignal(
        size=size, per_round=one, vector=one * math.sqrt(size), over_rounds=one / math.sqrt(plan.rounds)
    )


def advice(solved: Solved) -> str:
    """A change that keeps ε and lowers a round's noise-to-signal, computed and not guessed; "" where none is known."""
    plan, sigma = solved.plan, solved.noise_multiplier
    cap = plan.max_participations
    room = expected_cohort(plan.n_users, cap, plan.rounds) if _scheduled(plan) else plan.n_users
    cohort = min(2 * plan.cohort, room)
    if cohort > plan.cohort:
        changed, words = replace(plan, cohort=cohort), f"a cohort of {cohort:,}"
        if plan.unit == "user" and plan.sampling == "poisson":  # a larger share is drawn, so more noise is needed
            (event,) = changed.events()
            target = solved.guarantee.epsilon
            sigma = accounting.calibrate(lambda s: [replace(event, noise_multiplier=s)], target, plan.delta)
    elif _scheduled(plan) and cap < plan.rounds and plan.enforced_by != "nothing":
        more = min(2 * cap, plan.rounds)
        cohort, sigma = expected_cohort(plan.n_users, more, plan.rounds), sigma * math.sqrt(more / cap)
        changed = replace(plan, max_participations=more, cohort=cohort)
        words = f"{more} participations and a cohort of {cohort:,}"
    elif cap == plan.rounds > 1 and _unsampled(plan):
        fewer = plan.rounds // 2
        sigma *= math.sqrt(fewer / plan.rounds)
        changed = replace(plan, sums=(replace(plan.sums[0], rounds=fewer),), max_participations=fewer)
        words = f"{fewer:,} rounds"
    else:
        return ""
    changed = _with_noise(changed, _short(sigma))
    now, then = solved.noise_to_signal.per_round, noise_to_signal(changed).per_round
    if then >= now:
        return ""
    return (
        f"with {words} and σ = {_short(sigma):.10g}, ε stays as it is and a round's noise-to-signal becomes {then:.3g} "
        f"instead of {now:.3g}"
    )


def _scheduled(plan: PrivacyPlan) -> bool:
    """Whether each profile has k rounds of its own, which bounds the cohort."""
    return plan.unit == "user" and plan.sampling == "none"


def _unsampled(plan: PrivacyPlan) -> bool:
    return all(isinstance(e, Gaussian) or e.rate == 1.0 for e in plan.events())


def _with_noise(plan: PrivacyPlan, sigma: float) -> PrivacyPlan:
    if plan.device is not None:
        return replace(plan, device=replace(plan.device, noise_multiplier=sigma))
    return replace(plan, sums=(replace(plan.sums[0], noise_multiplier=sigma),))


def _short(sigma: float) -> float:
    """σ rounded up to `DIGITS` digits."""
    unit = 10.0 ** (math.floor(math.log10(sigma)) - DIGITS + 1)
    short = float(f"{math.ceil(sigma / unit) * unit:.{DIGITS}g}")
    return short if short >= sigma else sigma
