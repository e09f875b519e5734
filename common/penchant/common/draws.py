"""Draws that a compiled kernel and NumPy make alike: word c of a seed is a pure function of both.

    word(seed, c) = mix(seed + (c + 1) · 0x9e3779b97f4a7c15)  mod 2⁶⁴

So no draw depends on the order of work, and whoever trains a person alone meets the very examples that a cohort's
kernel (`learners/neural/fused/`) meets. These are for order, sampling and negatives, which no guarantee rests on;
noise comes from a cipher (`privacy/noise.py`).

Source: Steele, Lea and Flood 2014, Fast splittable pseudorandom number generators,
https://doi.org/10.1145/2660193.2660195, figure 17 (SplitMix64).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from penchant.common.arrays import Float64, Int64

STEP = 0x9E3779B97F4A7C15
Words = np.ndarray[Any, np.dtype[np.uint64]]


def words(seed: int | Words, counters: Int64 | Words) -> Words:
    """uint64[…], one for each counter.

    Args:
        seed: in [0, 2⁶⁴), one or one for each.
        counters: each ≥ 0.
    """
    z = np.asarray(seed, np.uint64) + (counters.astype(np.uint64) + np.uint64(1)) * np.uint64(STEP)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(z ^ (z >> np.uint64(31)), np.uint64)


def uniform(seed: int, counters: Int64) -> Float64:
    """float64[…] in [0, 1), multiples of 2⁻⁵³."""
    return np.asarray((words(seed, counters) >> np.uint64(11)) * 2.0**-53, np.float64)


def below(seed: int, counters: Int64, n: int | Int64) -> Int64:
    """int64[…] in [0, n), each as likely to n · 2⁻⁵³; n < 2³²."""
    return (uniform(seed, counters) * n).astype(np.int64)


def permutation(seed: int, n: int) -> Int64:
    """int64[n], a uniform order of 0 … n − 1.

    >>> sorted(permutation(7, 5).tolist())
    [0, 1, 2, 3, 4]
    """
    order = list(range(n))
    places = np.arange(n)
    for i, j in zip(range(n - 1, 0, -1), below(seed, places, places + 1)[:0:-1].tolist(), strict=True):
        order[i], order[j] = order[j], order[i]
    return np.array(order, np.int64)


def children(seed: int, n: int) -> list[int]:
    """Seeds of parts that draw apart from each other: the first n words."""
    return [int(word) for word in words(seed, np.arange(n))]
