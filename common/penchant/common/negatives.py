"""The items that a training step may call uninteresting: every item outside a person's own training items.

Held-out items belong to this pool. Leaving them out ("everything the person never touched") makes the held-out item the
one unseen item that training never pushes down, so that a rule which learns nothing finds it; several published
federated results rest on that leak, and `penchant.simulations.canary` measures it through the function below.

Rule: who has at most half of the catalogue draws from all of it, and again while an own item comes. Who has more draws
a rank among the allowed items and steps over the own ones at or below it. A compiled kernel does the same, draw for
draw (`draws.py`).
(Interaction-level privacy draws from the whole public catalogue instead, hits allowed: the pool must not depend on
another interaction of the same person.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from penchant.common import draws
from penchant.common.arrays import Int32
from penchant.common.errors import InvalidConfig


def negatives(train_items: Int32 | Sequence[int], n_items: int, shape: int | tuple[int, ...], seed: int) -> Int32:
    """Items drawn uniformly, with replacement, from the catalogue less the person's training items.

    Args:
        train_items: int32[n], positions in the catalogue; any order, repeats allowed. Never held-out items.
        n_items: size of the catalogue.
        shape: of the result.
        seed: of the draws, in [0, 2⁶⁴).

    Raises:
        InvalidConfig: an item outside the catalogue, or no item left to draw.

    >>> sorted(set(negatives([0, 2, 2], 5, 100, seed=0).tolist()))
    [1, 3, 4]
    """
    own = np.unique(np.asarray(train_items, np.int64))
    if len(own) and (own[0] < 0 or own[-1] >= n_items):
        raise InvalidConfig("negatives: a training item is outside the catalogue")
    if len(own) >= n_items:
        raise InvalidConfig("negatives: no item is left outside the training items")
    size = math.prod(shape) if isinstance(shape, tuple) else shape
    if 2 * len(own) > n_items:
        ranks = draws.below(seed, np.arange(size), n_items - len(own))
        steps = np.searchsorted(own - np.arange(len(own)), ranks, side="right")
        return (ranks + steps).astype(np.int32).reshape(shape)
    out, open_places, tried = np.empty(size, np.int32), np.arange(size), 0
    while len(open_places):
        drawn = draws.below(seed, open_places + tried * size, n_items)
        out[open_places] = drawn
        open_places, tried = open_places[np.isin(drawn, own)], tried + 1
    return out.reshape(shape)
