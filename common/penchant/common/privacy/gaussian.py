"""The Gaussian mechanism in closed form, with nothing but `math`.

A release with sensitivity Δ and noise N(0, (σΔ)²) is exactly μ-GDP with μ = 1/σ; k of them are √Σμᵢ²-GDP; and μ-GDP is
(ε, δ)-DP for exactly the pairs with  δ(ε) = Φ(μ/2 − ε/μ) − e^ε Φ(−μ/2 − ε/μ).

Source: Dong, Roth and Su 2019, https://arxiv.org/abs/1905.02383, Corollary 2.13 and Corollary 3.3; the same curve as
Balle and Wang 2018, https://arxiv.org/abs/1805.06530, Theorem 8.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from penchant.common.errors import InvalidConfig


def delta_of(epsilon: float, mu: float) -> float:
    """δ(ε) of a μ-GDP release; in [0, 1]."""
    if mu == 0.0:
        return 0.0
    a, b = mu / 2 - epsilon / mu, mu / 2 + epsilon / mu
    density = math.exp(-a * a / 2) / math.sqrt(2 * math.pi)  # φ(a) = e^ε φ(b): e^ε alone would overflow at ε = 710
    return max(0.0, _normal_cdf(a) - density * _mills(b))


def epsilon_of(mu: float, delta: float) -> float:
    """The smallest ε ≥ 0 with δ(ε) ≤ δ, rounded up by less than 1e-9 relative; infinite where no float holds it.

    Raises:
        InvalidConfig: μ is negative or not finite, or δ is outside (0, 1).
    """
    if not 0.0 <= mu < math.inf:
        raise InvalidConfig(f"mu must be finite and ≥ 0, not {mu}")
    _check_delta(delta)
    if delta_of(0.0, mu) <= delta:
        return 0.0
    low, high = 0.0, 1.0
    while delta_of(high, mu) > delta:
        low, high = high, high * 2
    return _bisect(low, high, lambda e: delta_of(e, mu) <= delta)


def mu_of(epsilon: float, delta: float) -> float:
    """The largest μ that is (ε, δ)-DP, rounded down, so that it never gives less privacy than asked.

    >>> round(mu_of(1.0, 1e-5), 3), round(mu_of(8.0, 1e-5), 3)
    (0.268, 1.666)

    Raises:
        InvalidConfig: ε is not positive and finite, δ is outside (0, 1), or both are so small that σ would pass 1e12.
    """
    if not 0.0 < epsilon < math.inf:
        raise InvalidConfig(f"epsilon must be positive and finite, not {epsilon}")
    _check_delta(delta)
    if delta_of(epsilon, 1e-12) > delta:
        raise InvalidConfig(f"epsilon {epsilon:g} at delta {delta:g} needs more noise than there is room for")
    high = 1.0
    while delta_of(epsilon, high) <= delta:
        high *= 2
    # 1/μ shrinks as μ grows: search it from above so that rounding up errs towards more noise
    return 1.0 / _bisect(1.0 / high, 1e12, lambda sigma: delta_of(epsilon, 1.0 / sigma) <= delta)


def _bisect(low: float, high: float, good: Callable[[float], bool]) -> float:
    """The smallest good value in (low, high], from above; `good` is monotone and high is good."""
    for _ in range(200):
        middle = math.sqrt(low * high) if low > 0 else high / 2
        if not low < middle < high or high - low <= 1e-12 * high:
            break
        low, high = (low, middle) if good(middle) else (middle, high)
    return high


def _check_delta(delta: float) -> None:
    if not 0.0 < delta < 1.0:
        raise InvalidConfig(f"delta must be in (0, 1), not {delta}")


def _normal_cdf(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2.0))


def _mills(x: float) -> float:
    """Φ(−x)/φ(x) for x ≥ 0, Mills' ratio; far out rounded down, which rounds δ up."""
    if x < 30.0:
        return _normal_cdf(-x) * math.sqrt(2 * math.pi) * math.exp(x * x / 2)
    inverse = 1 / (x * x)  # the asymptotic series; its first omitted term is below 2e-10 here
    return (1 - inverse * (1 - 3 * inverse * (1 - 5 * inverse))) / x
