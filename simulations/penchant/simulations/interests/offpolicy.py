"""What a policy would have earned, from a log of another one whose chances are known. On synthetic logs only.

    w = π(shown) / μ(shown)      IPS  mean w r      SNIPS  Σ w r / Σ w      DR  mean [ q̂(π) + w (r − q̂(shown)) ]

IPS and DR are unbiased where μ can show whatever π can; SNIPS trades a bias of order 1/n for less variance. DR stays
unbiased however wrong the predictions q̂ are, and varies less the better they are.

A device could log its own chances, but a sum of such logs over people would be one more release, to be charged.

Source: Dudík, Langford and Li 2011, "Doubly robust policy evaluation and learning", equations 1 and 2; Swaminathan and
Joachims 2015, "The self-normalized estimator for counterfactual learning".
"""

from __future__ import annotations

import numpy as np

from penchant.common.arrays import Float64, Int64
from penchant.common.errors import InvalidConfig
from penchant.common.interests.exploration import Policy, Standing


def ips(rewards: Float64, logged: Float64, target: Float64) -> float:
    """Inverse propensity scoring.

    Args:
        rewards: float64[n], what came of each item shown.
        logged: float64[n] in (0, 1], μ: the chance with which it was shown.
        target: float64[n] in [0, 1], π: the chance with which the other policy would have shown it.
    """
    return float((_weights(logged, target) * rewards).mean())


def snips(rewards: Float64, logged: Float64, target: Float64) -> float:
    """Self-normalised; arguments as `ips`. NaN where the target would have shown nothing of the log."""
    weights = _weights(logged, target)
    return float((weights * rewards).sum() / weights.sum()) if weights.any() else float("nan")


def doubly_robust(rewards: Float64, logged: Float64, target: Float64, predicted: Float64, expected: Float64) -> float:
    """Arguments as `ips`, and:

    Args:
        predicted: float64[n], q̂ of the item shown.
        expected: float64[n], Σ over all items of π · q̂ at that moment.
    """
    return float((expected + _weights(logged, target) * (rewards - predicted)).mean())


def chances(policy: Policy, standing: Standing, draws: int, random: np.random.Generator) -> Float64:
    """float64[n_items], how often each item is the first of a list, over so many lists: Monte Carlo."""
    first: Int64 = np.array([np.argmax(policy.values(standing, random)) for _ in range(draws)], np.int64)
    return np.asarray(np.bincount(first, minlength=len(standing.scores)) / draws, np.float64)


def _weights(logged: Float64, target: Float64) -> Float64:
    if not (logged > 0).all():
        raise InvalidConfig("a log holds only what had a chance: every logged propensity must be positive")
    return target / logged
