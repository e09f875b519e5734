"""Who takes part in a round.

    poisson             one independent coin per user of a frozen roster, the same for every user, no top-up, no
                        replacement, no first-N; the number drawn varies and may be zero
    none, unit user     each user's own rounds from a random row of their own: k of the T, drawn evenly, or, where the
                        plan's cohort is less than that gives, a coin in every round until there were k
    none, other units   a cohort of fixed size, drawn evenly from those whose participation cap has room

No amplification is claimed for the last two. With unit user nobody's draw may depend on who else is enrolled: were the
cohort's size fixed, a new profile would push another one out, and the sum would move by 2C where C is charged.
"""

from __future__ import annotations

import numpy as np

from penchant.common.arrays import Bool, Int64
from penchant.common.privacy.noise import Noise
from penchant.common.privacy.plan import PrivacyPlan, expected_cohort
from penchant.common.streams import Streams

_ROWS = 1 << 16  # users whose rows are drawn at once


def draw(plan: PrivacyPlan, round: int, attempt: int, participations: Int64, streams: Streams) -> Int64:
    """The users of one round, ascending.

    Args:
        round: from 1.
        attempt: which try at it, from 0; coins are tossed afresh for each, a user's own rounds stay the same.
        participations: int64[n_users], rounds each user was drawn for so far; changed in place.
        streams: where coins come from.
    """
    if plan.sampling == "poisson":
        coins = Noise(streams.key("cohort", round, attempt)).uniform(plan.n_users)
        drawn = np.flatnonzero(coins < plan.rate)
    elif plan.unit == "user":
        drawn = np.flatnonzero(_own_rounds(plan, round))
    else:
        free = np.flatnonzero(participations < plan.max_participations)
        size = min(plan.cohort, len(free))
        picks = streams.get("cohort", round, attempt)
        drawn = np.sort(picks.choice(free, size, replace=False)) if size < len(free) else free
    participations[drawn] += 1
    return drawn.astype(np.int64)


def _own_rounds(plan: PrivacyPlan, round: int) -> Bool:
    """bool[n_users]: whether this round is one of the user's own.

    Row u holds the draws T·u to T·(u+1) of the stream, so it is the same however many users follow.
    """
    rows, cap = Streams(plan.schedule).get("schedule"), plan.max_participations
    evenly = plan.cohort == expected_cohort(plan.n_users, cap, plan.rounds)
    out = np.empty(plan.n_users, bool)
    for start in range(0, plan.n_users, _ROWS):
        own = rows.random((min(_ROWS, plan.n_users - start), plan.rounds))
        if evenly:
            out[start : start + len(own)] = (own < own[:, [round - 1]]).sum(axis=1) < cap
        else:
            joins = own < plan.rate
            out[start : start + len(own)] = joins[:, round - 1] & (joins[:, : round - 1].sum(axis=1) < cap)
    return out
