"""A person's interests on their own device: dynamic, with an intensity, a distribution, and room to explore.

profile.py       InterestProfile: what one person likes, event by event; scores, lists, where a score comes from
dynamics.py      which memory to trust, when a taste has changed, what a moment's categories shift
exploration.py   which of the scored items a list shows: the best, or a few to learn from
strength.py      how strong a sign of interest a rating, a dwell, a count or a kind of event is
intensity.py     how strong an interest is, with its uncertainty, calibrated
distribution.py  what share of somebody's interest each topic has; lists that keep to it; topics that are not wanted
explanations.py  why an item is in a list, in parts that sum to its score and in plain sentences
quantized.py     released tables in one byte a number
"""

from __future__ import annotations

from penchant.common.interests.dynamics import STILL, Drift, Dynamics
from penchant.common.interests.exploration import Greedy, Policy, Standing
from penchant.common.interests.profile import InterestConfig, InterestProfile, Recommendation

__all__ = [
    "STILL",
    "Drift",
    "Dynamics",
    "Greedy",
    "InterestConfig",
    "InterestProfile",
    "Policy",
    "Recommendation",
    "Standing",
]
