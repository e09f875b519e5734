"""Low-rank parts of a noised matrix: where its noise ends, and what is left above.

With noise of variance σ² vᵢ wⱼ at place (i, j), the values of the noise alone fill [0, t] (singular values) or [−t, t]
(eigenvalues of a symmetric matrix, w = v) as the matrix grows:

    symmetric     t  = min over p > max v of  σ p √(Σᵢ vᵢ/(p − vᵢ))
    any           t² = min over p > max v of  σ² p q Σᵢ vᵢ/(p − vᵢ),   q > max w with Σⱼ wⱼ/(q − wⱼ) = Σᵢ vᵢ/(p − vᵢ)

For v = w = 1 that is 2σ√K, Wigner's edge. Values above are kept and shrunk, l → l − t²/l.

Derivation: the resolvent's diagonal solves gᵢ = 1/(z − vᵢ G), G = σ² Σ vᵢ gᵢ; put p = z/G, solve for z(p); the spectrum
ends where dz/dp = 0. Sources: Ajanki, Erdős and Krüger 2017, Universality for general Wigner-type matrices,
https://arxiv.org/abs/1506.05098 (the equation); Benaych-Georges and Nadakuditi 2011, https://arxiv.org/abs/0910.2120,
and 2012, https://arxiv.org/abs/1103.2221 (shrinking, for eigenvalues and for singular values: the signal θ behind
l = θ + t²/(4θ) is near l − t²/(4l) and the overlap of its vector is 1 − t²/(4θ²); l − t²/l discounts for both).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from penchant.common.arrays import AnyFloat, Float64

NOTHING, ROUNDING = 1e-9, 1e-6
"""Eigenvalues below this are rounding, and singular values below this share of the largest."""


def symmetric_edge(stddev: float, scale: AnyFloat) -> float:
    """t of a symmetric matrix whose noise at (i, j) has the standard deviation `stddev` · scaleᵢ · scaleⱼ.

    >>> round(symmetric_edge(0.5, np.ones(100)), 6)  # 2 σ √K
    10.0
    """
    v = np.asarray(scale, np.float64) ** 2
    return stddev * _least(lambda p: p * math.sqrt(_sum(v, p)), v)


def edge(stddev: float, left: AnyFloat, right: AnyFloat) -> float:
    """t of a matrix whose noise at (i, j) has the standard deviation `stddev` · leftᵢ · rightⱼ.

    >>> round(edge(0.5, np.ones(100), np.ones(100)), 6)
    10.0
    """
    v, w = np.asarray(left, np.float64) ** 2, np.asarray(right, np.float64) ** 2
    return stddev * _least(lambda p: math.sqrt(p * _partner(w, _sum(v, p)) * _sum(v, p)), v)


def top_symmetric(matrix: Float64, edge: float, dims: int) -> tuple[Float64, Float64]:
    """Q√l of the largest eigenvalues above the edge, float64[K, ≤ dims], and what shrinking leaves of each column.

    The second is √(1 − t²/l²), in (0, 1].
    """
    values, basis = np.linalg.eigh(matrix)
    values, basis = values[::-1][:dims], basis[:, ::-1][:, :dims]
    kept = values > max(edge, NOTHING)
    values = values[kept]
    return np.asarray(basis[:, kept] * np.sqrt(values)), np.sqrt(1 - (edge / values) ** 2)


def top(matrix: Float64, edge: float, dims: int) -> tuple[Float64, Float64]:
    """U s and V of the largest singular values above the edge, shrunk: float64[K, ≤ dims] each."""
    squares, right = np.linalg.eigh(matrix.T @ matrix)
    values = np.sqrt(np.maximum(squares[::-1][:dims], 0.0))
    kept = values > max(edge, ROUNDING * values[0] if len(values) else 0.0)  # a square root of what eigh rounds
    values, right = values[kept], right[:, ::-1][:, :dims][:, kept]
    return np.asarray(matrix @ right * (1 - (edge / values) ** 2)), np.asarray(right)


def _sum(v: Float64, p: float) -> float:
    return float((v / (p - v)).sum())


def _partner(w: Float64, total: float) -> float:
    """q > max w with Σ w/(q − w) = total > 0."""
    high = float(w.max())
    low, top = high, high + float(w.sum()) / total  # at the top no term is above w/(q − max w)
    for _ in range(100):
        middle = (low + top) / 2
        if middle <= high or _sum(w, middle) > total:
            low = middle
        else:
            top = middle
    return top


def _least(f: Callable[[float], float], v: Float64) -> float:
    """The smallest f(p) over p > max v, by golden section on log(p − max v)."""
    high, ratio = float(v.max(initial=0.0)), (math.sqrt(5) - 1) / 2
    if high == 0.0:
        return 0.0

    def at(x: float) -> float:
        return f(high + math.exp(x))

    low, top = math.log(high) - 12.0, math.log(high * len(v)) + 12.0
    for _ in range(90):
        a, b = top - ratio * (top - low), low + ratio * (top - low)
        low, top = (low, b) if at(a) < at(b) else (a, top)
    return at((low + top) / 2)
