"""A plan for the learners that need a few sums and no training: everybody takes part in each of them, once.

    μ = μ(ε, δ), shared over the sums; head, dimensions and rounds follow from n·μ (`automatic` of each learner)

All of it follows from public numbers: how many people there are and what they may lose.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from penchant.common import config
from penchant.common.config import did_you_mean
from penchant.common.errors import InvalidConfig
from penchant.common.learners import als, cooccurrence, strengths
from penchant.common.learners.als import AlsConfig
from penchant.common.learners.cooccurrence import CooccurrenceConfig
from penchant.common.learners.strengths import StrengthsConfig
from penchant.common.privacy.plan import PrivacyPlan, SumSpec, Unit

PLANNED = ("cooccurrence", "als", "strengths")
CHOSEN = "settings were chosen on public MovieLens data"
PUBLIC_NUMBER = "the number of users is public"
PROFILES = "a person enrolled m times counts m times (m·μ)"


def usual_delta(n_users: int) -> float:
    """δ where none is given: 1e-5, or the power of ten at or below 1/(10 n) for a large roster.

    >>> usual_delta(1_000), usual_delta(1_000_000)
    (1e-05, 1e-07)
    """
    return min(1e-5, 10.0 ** math.floor(math.log10(0.1 / n_users)))


def planned(
    learner: str,
    *,
    n_users: int,
    mu: float,
    delta: float,
    unit: Unit = "user",
    counts_share: float = 0.2,
    population: str = "default",
    uncharged: tuple[str, ...] = (),
) -> tuple[Mapping[str, Any], PrivacyPlan]:
    """The learner's settings as plain types, and its plan.

    Args:
        learner: one of PLANNED.
        mu: the Gaussian budget of all sums together; infinite for exact sums with unit "none".
        counts_share: of μ² for co-occurrence's counts.

    Raises:
        InvalidConfig: another learner, δ ≥ 1/n, or numbers that no plan has.
    """
    made: CooccurrenceConfig | AlsConfig | StrengthsConfig
    sums: tuple[SumSpec, ...]
    if learner == "als":
        made, sums = als.automatic(n_users, mu)
    elif learner == "strengths":
        made, sums = strengths.automatic(n_users, mu)
    elif learner == "cooccurrence":
        made, sums = cooccurrence.automatic(n_users, mu, counts_share=counts_share)
    else:
        raise InvalidConfig(f"no plan follows from n·μ for {learner!r}{did_you_mean(learner, PLANNED)}")
    plan = PrivacyPlan(
        unit=unit,
        n_users=n_users,
        delta=delta,
        sampling="none",
        cohort=n_users,
        sums=sums,
        max_participations=sum(spec.rounds for spec in sums),
        population=population,
        uncharged=uncharged,
    )
    return config.encode(made), plan
