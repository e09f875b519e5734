"""Membership inference: what a released model gives away about who it was trained on.

Half of the people, by a coin each, are members: the row is run again on them alone, and on the others for a reference.
An attacker who holds one person's history and both released models asks how much better the one ranks the person's
last interactions, given those before, than the other:

    statistic = mean over the last interactions of  ln(rank under the reference) − ln(rank under the model)

Trained on a person, a model ranks what they did higher; the reference takes away what is easy to guess for anybody.
That everybody is in exactly one of the two, and the attacker knows it, is more than a real attacker has.

Unlike a canary's bound this is no bound on ε: it tells how this attack fares against these people. TPR at a low FPR is
what counts, as an attack that is sure of a few is worse than one that is slightly right about all.

Sources: Shokri et al. 2017, https://arxiv.org/abs/1610.05820; Carlini et al. 2022, https://arxiv.org/abs/2112.03570,
sections III-A (TPR at low FPR) and V (difficulty taken from models without the example); Zhang et al. 2021,
https://arxiv.org/abs/2109.08045 (recommenders).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from penchant.common.arrays import Bool, Float32, Float64, Int32
from penchant.common.errors import InvalidConfig
from penchant.common.interactions import Interactions
from penchant.common.learners.contract import Learner, State
from penchant.common.privacy.plan import PrivacyPlan, expected_cohort
from penchant.common.streams import Streams
from penchant.simulations import engine
from penchant.simulations.audit import bounds
from penchant.simulations.engine import Population
from penchant.simulations.plans import Federated

LAST = 5
"""Interactions at a history's end that are looked at; of a shorter one, half."""
FPR = 0.001
_BLOCK = 512  # people scored at once


@dataclass(frozen=True, kw_only=True)
class Membership:
    """How the attack fared.

    Attributes:
        members, others: people it was tried on; those with fewer than two interactions are left out.
        auc: probability that a member scores above another; ½ is chance.
        tpr: share of members found where at most 0.1 % of the others are taken for one, with its interval.
    """

    members: int
    others: int
    auc: float
    tpr: bounds.Rate

    @property
    def note(self) -> str:
        """What is missing for the rate to mean what it says; "" where nothing is."""
        if self.tpr.resolved:
            return ""
        return f"{self.others} people are too few to tell a false-positive rate of 0.1 %: it takes 1,000 or more"


def membership(
    row: Federated, population: Population, *, name: str, seed: int, where: str, confidence: float
) -> Membership:
    """Runs the row twice, on either half of the people, and attacks the first.

    Raises:
        InvalidConfig: a half that is too small, or nobody with two interactions in one.
    """
    people = population.histories
    coins = Streams(seed).get("members").random(people.n_users) < 0.5
    if not 2 <= coins.sum() <= people.n_users - 2:
        raise InvalidConfig(f"{people.n_users} people cannot be split into members and others: take more data")

    def released(half: Bool, part: str) -> tuple[Learner, State]:
        own = np.flatnonzero(half)
        some = replace(row, plan=_for_fewer(row.plan, len(own)))
        here = Population(histories=people.select(own), catalogue=population.catalogue)
        found = engine.run(
            some,
            here,
            name=f"{name}/{part}",
            seed=seed,
            nodes=1,
            engine="local",
            where=where,
            after_round=lambda record, rounds: None,
        )
        return found.learner, found.learner.released(found.state)

    learner, model = released(coins, "members")
    _, reference = released(~coins, "others")
    tried = np.flatnonzero(people.lengths >= 2)
    scores = statistics(learner, model, reference, people.select(tried))
    member = coins[tried]
    if not 0 < member.sum() < len(member):
        raise InvalidConfig("membership needs people with two interactions in both halves: take more data")
    inside, outside = scores[member], scores[~member]
    return Membership(
        members=len(inside),
        others=len(outside),
        auc=bounds.auc(inside, outside),
        tpr=bounds.tpr_at_fpr(inside, outside, confidence, fpr=FPR),
    )


def statistics(learner: Learner, model: State, reference: State, people: Interactions) -> Float64:
    """float64[n_users], higher for whom the model was trained on and the reference was not; two interactions each."""
    out = np.zeros(people.n_users)
    for start in range(0, people.n_users, _BLOCK):
        some = people.select(np.arange(start, min(start + _BLOCK, people.n_users)))
        last = np.minimum(LAST, some.lengths // 2)
        at = np.arange(len(some)) - some.offsets[some.rows]
        prefix = some.keep(at < (some.lengths - last)[some.rows])
        target, other = learner.scores(model, prefix), learner.scores(reference, prefix)
        for person in range(some.n_users):
            seen, items = prefix.history(person).items, some.history(person).items[-int(last[person]) :]
            ranks = [_ranks(scores[person], seen, items) for scores in (target, other)]
            out[start + person] = float(np.mean(np.log(ranks[1]) - np.log(ranks[0])))
    return out


def _ranks(scores: Float32, seen: Int32, items: Int32) -> Float64:
    """float64[n]: rank of each item among those that were not seen before, a tie in the middle."""
    free = np.ones(len(scores), bool)
    free[seen] = False
    rest = np.sort(scores[free])
    below = np.searchsorted(rest, scores[items], side="left")
    upto = np.searchsorted(rest, scores[items], side="right")
    return np.maximum(1.0, len(rest) - (below + upto) / 2 + 0.5)


def _for_fewer(plan: PrivacyPlan, n_users: int) -> PrivacyPlan:
    """The same mechanism for fewer people: its noise, clip, cap and rate."""
    cohort = max(1, min(n_users, round(plan.rate * n_users)))
    if plan.unit == "user" and plan.sampling == "none":
        most = expected_cohort(n_users, plan.max_participations, plan.rounds)
        evenly = plan.cohort == expected_cohort(plan.n_users, plan.max_participations, plan.rounds)
        cohort = most if evenly else min(cohort, most)
    return replace(plan, n_users=n_users, cohort=cohort)
