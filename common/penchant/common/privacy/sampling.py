"""Who takes part in a round.

`poisson`: one independent coin per user of a frozen roster, the same for every user, no top-up, no replacement, no
first-N; the number drawn varies and may be zero. `none`: as many users as the cohort, drawn evenly from those whose
participation cap has room; no amplification is claimed for it.
"""

from __future__ import annotations

import numpy as np

from penchant.common.arrays import Int64
from penchant.common.privacy.plan import PrivacyPlan


def draw(plan: PrivacyPlan, participations: Int64, coins: np.random.Generator) -> Int64:
    """The users of one round, ascending.

    Args:
        participations: int64[n_users], rounds each user was drawn for so far; changed in place.
        coins: the stream to draw from.
    """
    if plan.sampling == "poisson":
        drawn = np.flatnonzero(coins.random(plan.n_users) < plan.rate)
    else:
        free = np.flatnonzero(participations < plan.max_participations)
        size = min(plan.cohort, len(free))
        drawn = np.sort(coins.choice(free, size, replace=False)) if size < len(free) else free
    participations[drawn] += 1
    return drawn.astype(np.int64)
