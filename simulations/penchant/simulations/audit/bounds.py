"""From an attacker's scores to lower bounds on ε, each exceeding the truth with probability at most 1 − confidence.

A canary is in or out by a coin; a test says "in" where its score passes a threshold that was fixed beforehand. With
FPR̄ and FNR̄ upper bounds on its two errors (Clopper and Pearson 1934, from the binomial counts):

    μ ≥ Φ⁻¹(1 − FPR̄) − Φ⁻¹(FNR̄)                                      every μ-GDP mechanism          (`mu_lower`)
    ε ≥ ln((1 − δ − FNR̄)/FPR̄)  and  ε ≥ ln((1 − δ − FPR̄)/FNR̄)        every (ε, δ)-DP mechanism      (`epsilon_lower`)

With T thresholds each of the 2T error bounds is taken at 1 − (1 − confidence)/2T: by the union bound all of them hold
together with the confidence asked for, and so does the largest of what follows from them.

Both count each canary as one independent trial, which holds where each has a direction of its own and the noise is
Gaussian with independent coordinates. `one_run` needs neither: with coins fair and independent, m canaries and r
guesses by anything that sees the output, the number V of right ones of an (ε, δ)-DP mechanism obeys

    P[V ≥ v] ≤ f(v) + 2mδ · max over i ≥ 1 of (f(v − i) − f(v))/i,   f(v) = P[Binomial(r, e^ε/(1 + e^ε)) ≥ v]

It is weaker, above all for a Gaussian, and cannot pass what r right guesses would show (`one_run_ceiling`).

Sources: Dong, Roth and Su 2019, https://arxiv.org/abs/1905.02383, Definition 2.6 (GDP by errors of tests); Nasr et al.
2023, https://arxiv.org/abs/2302.07956, section 4 (μ from the two errors); Kairouz, Oh and Viswanath 2015,
https://arxiv.org/abs/1311.0776, Theorem 2.1 (the two inequalities for (ε, δ)); Steinke, Nasr and Jagielski 2023,
https://arxiv.org/abs/2305.08846, Theorem 5.2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

from penchant.common.errors import InvalidConfig

Scores = npt.NDArray[np.floating[Any]]
MOST_EPSILON = 100.0
"""Where `one_run` stops: no number of canaries that fits a machine shows more."""


@dataclass(frozen=True, kw_only=True)
class Rate:
    """A share with its interval.

    Attributes:
        value: the share counted.
        low, high: Clopper-Pearson, two-sided.
        fpr: the false-positive rate at which it was read; at most the one asked for.
        resolved: whether there were enough negatives for the rate asked for to be more than none at all.
    """

    value: float
    low: float
    high: float
    fpr: float
    resolved: bool


def mu_lower(
    scores_in: Scores, scores_out: Scores, confidence: float, *, thresholds: Sequence[float] = (0.0,)
) -> float:
    """The largest μ ≥ 0 that no μ'-GDP mechanism with μ' < μ can be, at this confidence.

    Args:
        scores_in, scores_out: of canaries that were in and out, one each, independent; higher says "in".
        thresholds: fixed before any score was seen.

    Raises:
        InvalidConfig: confidence outside (0, 1), no threshold, or a score that is NaN.
    """
    errors = _errors(scores_in, scores_out, confidence, thresholds)
    return max(0.0, *(float(stats.norm.isf(fpr) - stats.norm.ppf(fnr)) for fpr, fnr in errors))


def epsilon_lower(
    scores_in: Scores, scores_out: Scores, delta: float, confidence: float, *, thresholds: Sequence[float] = (0.0,)
) -> float:
    """The largest ε ≥ 0 that no (ε', δ)-DP mechanism with ε' < ε can have; arguments and errors as `mu_lower`.

    It reads one point of the errors' curve, so for a Gaussian it is below what `mu_lower` gives.
    """
    found = 0.0
    for fpr, fnr in _errors(scores_in, scores_out, confidence, thresholds):
        for one, other in ((fpr, fnr), (fnr, fpr)):
            if 1 - delta - other > 0:
                found = max(found, math.log((1 - delta - other) / one))
    return found


def one_run(correct: int, guesses: int, m: int, delta: float, confidence: float) -> float:
    """The largest ε ≥ 0 that so many right guesses rule out everything below of.

    Args:
        correct: guesses that were right.
        guesses: r, canaries that were guessed about; the others are abstained from. Fixed before the run.
        m: canaries in all, each in or out by a fair coin of its own.

    Raises:
        InvalidConfig: not 0 ≤ correct ≤ guesses ≤ m, or confidence or δ outside its range.
    """
    _check(confidence)
    if not 0 <= correct <= guesses <= m:
        raise InvalidConfig(f"right guesses, guesses and canaries must not fall: {correct}, {guesses}, {m}")
    if not 0 <= delta < 1:
        raise InvalidConfig(f"delta must be in [0, 1), not {delta}")
    low, high = 0.0, MOST_EPSILON
    if _one_run_probability(correct, guesses, m, low, delta) > 1 - confidence:
        return 0.0
    if _one_run_probability(correct, guesses, m, high, delta) <= 1 - confidence:
        return high
    while high - low > 1e-9:
        middle = (low + high) / 2
        small = _one_run_probability(correct, guesses, m, middle, delta) <= 1 - confidence
        low, high = (middle, high) if small else (low, middle)
    return low


def one_run_ceiling(guesses: int, m: int, delta: float, confidence: float) -> float:
    """What `one_run` gives when every guess is right: the most that these canaries can show."""
    return one_run(guesses, guesses, m, delta, confidence)


def _one_run_probability(v: int, r: int, m: int, epsilon: float, delta: float) -> float:
    """The theorem's bound on P[V ≥ v]."""
    right = 1 / (1 + math.exp(-epsilon))
    tail = float(stats.binom.sf(v - 1, r, right))
    if delta == 0 or v == 0:
        return tail
    below = np.cumsum(stats.binom.pmf(np.arange(v - 1, -1, -1), r, right))  # f(v − i) − f(v) for i = 1 … v
    slope = float((below / np.arange(1, v + 1)).max())  # past i = v nothing is added and i still grows
    return min(1.0, tail + 2 * m * delta * slope)


def auc(scores_in: Scores, scores_out: Scores) -> float:
    """The probability that an "in" scores above an "out", a tie half; ½ where one side is empty."""
    if not len(scores_in) or not len(scores_out):
        return 0.5
    ranks = stats.rankdata(np.concatenate([scores_in, scores_out]))[: len(scores_in)]
    n, m = len(scores_in), len(scores_out)
    return float((ranks.sum() - n * (n + 1) / 2) / (n * m))


def tpr_at_fpr(scores_in: Scores, scores_out: Scores, confidence: float, *, fpr: float = 0.001) -> Rate:
    """The share of "in" above the lowest threshold that at most `fpr` of "out" pass.

    The interval is for that threshold: "in" had no part in choosing it. With fewer than 1/fpr "out" no one of them may
    pass, the true rate of false positives may be far above the one asked for, and `resolved` is False.

    Raises:
        InvalidConfig: confidence or fpr outside (0, 1), or a side that is empty.
    """
    _check(confidence)
    if not 0 < fpr < 1 or not len(scores_in) or not len(scores_out):
        raise InvalidConfig("a rate needs somebody who was in, somebody who was out, and fpr in (0, 1)")
    allowed = math.floor(fpr * len(scores_out) + 1e-9)
    threshold = np.sort(scores_out)[::-1][allowed]  # at most `allowed` lie strictly above it
    hits, n = int((scores_in > threshold).sum()), len(scores_in)
    alpha = (1 - confidence) / 2
    return Rate(
        value=hits / n,
        low=1 - _at_most(n - hits, n, alpha),
        high=_at_most(hits, n, alpha),
        fpr=float((scores_out > threshold).mean()),
        resolved=allowed >= 1,
    )


def rounded_down(bound: float) -> str:
    """A lower bound to two decimals, never above itself.

    >>> rounded_down(5.6079), rounded_down(0.0), rounded_down(12.0)
    ('5.60', '0.00', '12.00')
    """
    return f"{math.floor(bound * 100 + 1e-9) / 100:.2f}"


def _errors(
    scores_in: Scores, scores_out: Scores, confidence: float, thresholds: Sequence[float]
) -> list[tuple[float, float]]:
    """Upper bounds on (FPR, FNR) at each threshold, all of them together at this confidence."""
    _check(confidence)
    if not len(thresholds) or np.isnan(scores_in).any() or np.isnan(scores_out).any():
        raise InvalidConfig("an audit needs a threshold, and scores that are numbers")
    alpha = (1 - confidence) / (2 * len(thresholds))
    return [
        (
            _at_most(int((scores_out > t).sum()), len(scores_out), alpha),
            _at_most(int((scores_in <= t).sum()), len(scores_in), alpha),
        )
        for t in thresholds
    ]


def _at_most(hits: int, n: int, alpha: float) -> float:
    """Clopper and Pearson's upper bound: a rate above it gives so few hits with probability at most α."""
    return 1.0 if hits >= n else float(stats.beta.isf(alpha, hits + 1, n - hits))


def _check(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise InvalidConfig(f"confidence must be in (0, 1), not {confidence}")
