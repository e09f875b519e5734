"""How good a ranking is, person by person: the whole catalogue less what the person has seen, never a sample of it.

Everything follows from the rank of each target among its person's unseen items:

    rank(t) = 1 + unseen non-targets scored ≥ t + targets of the same person placed before t

so a tie with a non-target counts against the target, and a constant score earns nothing. Only the AUC counts a tie
half, as the area under a curve does. Every formula: docs/metrics.md.

Source: Krichene and Rendle, "On Sampled Metrics for Item Recommendation", KDD 2020 (why not a sample); Järvelin and
Kekäläinen 2002 (NDCG).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from penchant.common.arrays import AnyFloat, Bool, Float64, Int32, Int64
from penchant.common.errors import InvalidConfig, MalformedScores
from penchant.common.interactions import Interactions


@dataclass(frozen=True, slots=True)
class Ranks:
    """Where every target stands, for a block of m people and t targets, each person's best target first.

    Attributes:
        rows: int64[t], the person of each target, ascending.
        items: int32[t], the target.
        ranks: int64[t], 1 is best; ascending and distinct within a person.
        misordered: float64[t], unseen non-targets above the target, ties counted half.
        n_targets: int64[m].
        n_unseen: int64[m], items that were ranked, targets included.
    """

    rows: Int64
    items: Int32
    ranks: Int64
    misordered: Float64
    n_targets: Int64
    n_unseen: Int64

    @property
    def places(self) -> Int64:
        """int64[t], 1 for a person's best target, 2 for the next."""
        starts = np.cumsum(self.n_targets) - self.n_targets
        return np.arange(len(self.rows)) - starts[self.rows] + 1

    def mean(self, values: AnyFloat | Bool) -> Float64:
        """float64[m], the mean of a value of each target over a person's targets; NaN without targets."""
        return self.total(values) / np.maximum(self.n_targets, 1)

    def within(self, k: int) -> Bool:
        """bool[t], whether a target is in the top k."""
        if k < 1:
            raise InvalidConfig(f"k must be at least 1, not {k}")
        return self.ranks <= k

    def total(self, values: AnyFloat | Bool) -> Float64:
        """float64[m], the sum of a value of each target over a person's targets; NaN without targets."""
        total = np.bincount(self.rows, values, minlength=len(self.n_targets))
        return np.where(self.n_targets > 0, total, np.nan)


def target_ranks(scores: AnyFloat, history: Interactions, targets: Interactions) -> Ranks:
    """Ranks each target among the items that its person has not seen.

    Args:
        scores: float[m, n_items], higher is better. Infinities are allowed.
        history: what the m people have seen; these items are not ranked.
        targets: what they went on to choose. One that is also in the history is no target; a repeat counts once.

    Raises:
        MalformedScores: a NaN, or a shape that does not fit the people and items.
    """
    if targets.n_users != history.n_users or targets.n_items != history.n_items:
        raise InvalidConfig("history and targets must hold the same people and items")
    n_items = history.n_items
    negatives = unseen(scores, history)
    seen = np.unique(_cells(history))
    rows, items = np.divmod(np.setdiff1d(_cells(targets), seen), n_items)
    own = negatives[rows, items]
    negatives[rows, items] = -np.inf

    order = np.lexsort((items, -own, rows))
    rows, items, own = rows[order], items[order], own[order]
    above = np.empty(len(rows), np.int64)
    level = np.empty(len(rows), np.int64)
    for t, (row, score) in enumerate(zip(rows, own, strict=True)):  # a few µs each; a block's copy would cost more
        above[t] = np.count_nonzero(negatives[row] > score)
        level[t] = np.count_nonzero(negatives[row] >= score)

    n_targets = np.bincount(rows, minlength=history.n_users).astype(np.int64)
    placed_before = np.arange(len(rows)) - (np.cumsum(n_targets) - n_targets)[rows]
    return Ranks(
        rows=rows,
        items=items.astype(np.int32),
        ranks=level + placed_before + 1,
        misordered=(above + level) / 2,
        n_targets=n_targets,
        n_unseen=n_items - np.bincount(seen // n_items, minlength=history.n_users).astype(np.int64),
    )


def unseen(scores: AnyFloat, history: Interactions) -> AnyFloat:
    """A copy of the scores with −∞ at every seen item, and nothing but seen items at −∞.

    Raises:
        MalformedScores: a NaN, integers, or a shape other than [history.n_users, history.n_items].
    """
    if scores.shape != (history.n_users, history.n_items):
        raise MalformedScores(f"scores must have shape {(history.n_users, history.n_items)}, not {scores.shape}")
    if not np.issubdtype(scores.dtype, np.floating):
        raise MalformedScores(f"scores must be floating point, not {scores.dtype}")
    out = np.maximum(scores, np.finfo(scores.dtype).min)  # keeps NaN
    if np.isnan(out).any():
        raise MalformedScores("scores hold a NaN")
    out[history.rows, history.items] = -np.inf
    return out


def best(values: AnyFloat, k: int) -> Int32:
    """int32[m, k], columns of the k largest of each row, largest first; a tie goes to the lower column.

    −∞ is never chosen: a row with fewer than k other values ends in −1. The answer does not depend on how a processor
    sorts, as argpartition's does.

    >>> best(np.array([[3.0, 5.0, 5.0, -np.inf]]), 4).tolist()
    [[1, 2, 0, -1]]
    """
    if k < 1:
        raise InvalidConfig(f"k must be at least 1, not {k}")
    m, n = values.shape
    top = min(k, n)
    cut = np.partition(values, n - top, axis=1)[:, n - top, None]  # the k-th largest
    chosen = values > cut
    level = values == cut
    room = top - np.count_nonzero(chosen, axis=1)[:, None]
    chosen |= level & (np.cumsum(level, axis=1, dtype=np.int32) <= room)
    columns = np.nonzero(chosen)[1].reshape(m, top)
    picked = np.take_along_axis(values, columns, axis=1)
    order = np.argsort(-picked, axis=1, kind="stable")
    out = np.full((m, k), -1, np.int32)
    out[:, :top] = np.where(
        np.isneginf(np.take_along_axis(picked, order, 1)), -1, np.take_along_axis(columns, order, 1)
    )
    return out


def top_k(scores: AnyFloat, history: Interactions, k: int) -> Int32:
    """int32[m, k], the list each person would be shown; −1 fills a list once nothing is unseen."""
    return best(unseen(scores, history), k)


def hr(ranks: Ranks, k: int) -> Float64:
    """float64[m], 1 where at least one target is in the top k. NaN without targets, as all that follow."""
    return np.minimum(ranks.total(ranks.within(k)), 1.0)


def recall(ranks: Ranks, k: int) -> Float64:
    """float64[m], hits ÷ number of targets."""
    return ranks.mean(ranks.within(k))


def precision(ranks: Ranks, k: int) -> Float64:
    """float64[m], hits ÷ k."""
    return ranks.total(ranks.within(k)) / k


def f1(ranks: Ranks, k: int) -> Float64:
    """float64[m], harmonic mean of precision and recall, which is 2 hits ÷ (k + number of targets)."""
    return 2.0 * ranks.total(ranks.within(k)) / (k + ranks.n_targets)


def gains(ranks: Ranks, k: int) -> Float64:
    """float64[t], 1 ÷ log₂(rank + 1) of each target within the top k, else 0."""
    out: Float64 = ranks.within(k) / np.log2(ranks.ranks + 1.0)
    return out


def ndcg(ranks: Ranks, k: int) -> Float64:
    """float64[m], the sum of a person's gains, divided by the sum had every target been ranked first."""
    ideal = np.cumsum(1.0 / np.log2(np.arange(2, k + 2)))
    return ranks.total(gains(ranks, k)) / ideal[np.clip(ranks.n_targets, 1, k) - 1]


def mrr(ranks: Ranks, k: int) -> Float64:
    """float64[m], 1 ÷ rank of the best target, 0 when it is below k."""
    return ranks.total((ranks.places == 1) * ranks.within(k) / ranks.ranks)


def average_precision(ranks: Ranks, k: int) -> Float64:
    """float64[m], Σ over hits of the precision at their rank, divided by min(k, number of targets)."""
    return ranks.total(ranks.within(k) * ranks.places / ranks.ranks) / np.clip(ranks.n_targets, 1, k)


def auc(ranks: Ranks) -> Float64:
    """float64[m], share of (target, unseen non-target) pairs in the right order, a tie half; 1 without pairs."""
    pairs = np.maximum(ranks.n_unseen - ranks.n_targets, 1)
    return 1.0 - ranks.mean(ranks.misordered / pairs[ranks.rows])


def accuracy(ranks: Ranks, threshold: float = 0.9) -> Float64:
    """float64[m], balanced accuracy of "interested" said of every item at or above a percentile.

    The percentile of rank r among n unseen items is (n − r + ½) ÷ n, so that the share 1 − threshold of them is said
    to interest. Balanced: the mean of the share of targets and the share of non-targets that are judged rightly (1
    where there is none of them). A score of any scale can be compared, probabilities or not.
    """
    if not 0.0 <= threshold <= 1.0:
        raise InvalidConfig(f"threshold must be in [0, 1], not {threshold}")
    said = np.floor(np.round((1.0 - threshold) * ranks.n_unseen + 0.5, 9))  # (1 − 0.9) · 5 is 0.49999… + 0.5
    said = np.minimum(said, ranks.n_unseen)
    right = ranks.ranks <= said[ranks.rows]
    wrong = (said - ranks.total(right)) / np.maximum(ranks.n_unseen - ranks.n_targets, 1)
    out: Float64 = (ranks.mean(right) + 1.0 - wrong) / 2
    return out


def coverage(lists: Int32, n_items: int) -> float:
    """Share of the catalogue that is in at least one list; −1 is no item."""
    return len(np.unique(lists[lists >= 0])) / n_items


def novelty(lists: Int32, popularity: Int64) -> Float64:
    """float64[m], mean over a list of −log₂ of the item's share of training interactions.

    The share is (count + 1) ÷ (all counts + n_items), so an item nobody chose is finite. 0 for an empty list.
    """
    bits = -np.log2((popularity + 1.0) / (popularity.sum() + len(popularity)))
    shown = lists >= 0
    out: Float64 = np.where(shown, bits[lists], 0.0).sum(axis=1) / np.maximum(shown.sum(axis=1), 1)
    return out


def _cells(interactions: Interactions) -> Int64:
    """int64[n], person and item of each interaction as one number."""
    return interactions.rows.astype(np.int64) * interactions.n_items + interactions.items
