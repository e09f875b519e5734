"""A rule that learns nothing, which scores at chance unless the protocol leaks the held-out item.

    score(item) of person u = −(how often the item was drawn as a training negative of u)

With negatives from everything outside the person's training items, the held-out item is drawn as often as any other
unseen item: HR@10 among 99 others is 10 %. Where negatives also avoid the held-out item ("items never touched"), it
is the one unseen item never drawn, and this rule approaches 100 % as rounds go by. The canary draws from
`penchant.common.negatives`, the pool that training uses, so it fails when that pool starts to leak.

Source: the negative sampling of the PFedRec, GPFedRec and FedRAP repositories; measured in docs/metrics.md.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from penchant.common.arrays import Int32, Int64
from penchant.common.errors import InvalidConfig
from penchant.common.interactions import Interactions
from penchant.common.negatives import negatives

Pool = Literal["honest", "leaky"]


def canary_hr(
    train: Interactions,
    targets: Interactions,
    *,
    pool: Pool,
    rounds: int,
    negatives_per_positive: int = 4,
    n_eval_negatives: int = 99,
    seed: int,
    precision: float = 0.002,
    max_repetitions: int = 1000,
) -> tuple[float, float]:
    """HR@10 of the counting rule among sampled unseen items, and its standard error.

    The training draws are repeated until the standard error is at most `precision`. A tie is broken at random, by its
    exact probability. One target a person is looked at: the last, unless it is among their training items.

    Args:
        train: what negatives must avoid.
        targets: what is held out.
        pool: "honest" avoids the training items, "leaky" the held-out items too.
        rounds: of training; each draws `negatives_per_positive` for every training interaction.
        n_eval_negatives: distinct unseen items, other than held-out ones, that the target is ranked among.

    Raises:
        InvalidConfig: an unknown pool; nobody to score; a person with too few unseen items.
    """
    if pool not in ("honest", "leaky"):
        raise InvalidConfig(f"pool must be honest or leaky, not {pool}")
    if not precision > 0 or max_repetitions < 1:
        raise InvalidConfig("precision must be positive and max_repetitions ≥ 1")
    if rounds < 1 or negatives_per_positive < 1 or n_eval_negatives < 10:
        raise InvalidConfig("rounds and negatives_per_positive must be ≥ 1, n_eval_negatives ≥ 10")
    rng = np.random.default_rng(seed)
    people = [
        (own.items, held.items)
        for own, held in zip(train, targets, strict=True)
        if len(own) and len(held) and held.items[-1] not in own.items
    ]
    if not people:
        raise InvalidConfig("nobody has both a history and a target outside it")
    hits: list[float] = []
    while len(hits) < max_repetitions * len(people):
        for own, held in people:
            avoided = own if pool == "honest" else np.concatenate([own, held])
            drawn = negatives(
                avoided, train.n_items, rounds * negatives_per_positive * len(own), int(rng.integers(2**63))
            )
            counts = np.bincount(drawn, minlength=train.n_items).astype(np.int64)
            others = _unseen(own, held, train.n_items, n_eval_negatives, rng)
            hits.append(_in_top_10(int(counts[held[-1]]), counts[others]))
        if len(hits) > 1 and _error(hits) <= precision:
            break
    return float(np.mean(hits)), _error(hits)


def _error(values: list[float]) -> float:
    """Standard error of the mean."""
    return float(np.std(values) / np.sqrt(len(values)))


def _unseen(own: Int32, held: Int32, n_items: int, n: int, rng: np.random.Generator) -> Int32:
    """int32[n], distinct items outside both."""
    left = np.ones(n_items, bool)
    left[own] = left[held] = False
    items = np.flatnonzero(left).astype(np.int32)
    if len(items) < n:
        raise InvalidConfig(f"a person has fewer than {n} unseen items to be ranked among")
    return rng.choice(items, n, replace=False, shuffle=False)


def _in_top_10(drawn: int, others: Int64) -> float:
    """Probability that an item drawn this often is in the top 10, fewest first, when ties are broken at random.

    With b others above and e level, its rank is uniform on b + 1 … b + e + 1.
    """
    above = np.count_nonzero(others < drawn)
    level = np.count_nonzero(others == drawn)
    return float(np.clip((10 - above) / (level + 1), 0.0, 1.0))
