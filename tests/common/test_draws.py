"""Draws that depend on seed and counter alone."""

from __future__ import annotations

import numpy as np

from penchant.common import draws


def test_words_are_those_of_splitmix64() -> None:
    # The first three outputs of Java's SplittableRandom with this seed, as in the paper's own test program.
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert draws.words(1234567, np.arange(3)).tolist() == known


def test_a_word_does_not_depend_on_what_else_is_drawn() -> None:
    every = draws.words(2**64 - 1, np.arange(100))
    assert draws.words(2**64 - 1, np.array([41])).tolist() == [every[41]]
    assert len(set(every.tolist())) == 100


def test_numbers_below_n_are_uniform_and_never_n() -> None:
    n = 60_000
    found = np.bincount(draws.below(5, np.arange(n), 6), minlength=6)
    assert len(found) == 6
    assert ((found - n / 6) ** 2 / (n / 6)).sum() < 30  # χ² of 5 degrees exceeds 30 for 1 seed in 70,000
    top = np.array([2**53 - 1]) * 2.0**-53
    assert all((top * k).astype(np.int64) == k - 1 for k in (1, 2, 3, 2**16 + 1, 2**31, 2**32 - 1))


def test_every_order_of_three_is_as_likely() -> None:
    n = 12_000
    found = [tuple(draws.permutation(seed, 3).tolist()) for seed in draws.children(3, n)]
    counts = np.array([found.count(order) for order in sorted(set(found))])
    assert len(counts) == 6
    assert ((counts - n / 6) ** 2 / (n / 6)).sum() < 30  # as above
    assert draws.permutation(9, 0).tolist() == []
