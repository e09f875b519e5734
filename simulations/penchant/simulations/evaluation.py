"""Scores a recommender on what people went on to choose, and says how sure the figure is.

A scorer is a function of histories alone, so a person held out of training is scored like any other. Every person with
a target is ranked over the whole catalogue less what they have seen (`penchant.common.metrics`); figures are means over
people, with percentile bootstrap intervals that resample people, and for a comparison resample the same people on both
sides.

Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapters 13 and 16; docs/metrics.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from penchant.common import metrics
from penchant.common.arrays import AnyFloat, Float32, Float64, Int32, Int64
from penchant.common.errors import InvalidConfig
from penchant.common.interactions import Interactions

HEAD, TAIL = 0.2, 0.8
HISTORY_LENGTHS = {"0": 0, "1-9": 1, "10-49": 10, "50-199": 50, "200+": 200}  # name: shortest history in it


class Scorer(Protocol):
    """Anything that can rank the catalogue for people it knows only by their histories."""

    def scores(self, histories: Interactions) -> Float32:
        """float32[histories.n_users, n_items], higher is better; finite or infinite, never NaN."""
        ...


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What one scorer achieved.

    Attributes:
        users: int64[m], positions of the people scored: those with a target outside their history.
        per_user: float64[m] for each metric, such as "ndcg@10".
        overall: the mean over people of each of these, and coverage@k of all their lists together.
        buckets: by "popularity" of the target ("head", "middle", "tail") and by "history" length; then by metric, with
            "n", how many targets or people there are. By popularity the figures are means over targets, each as if it
            were its person's only one; by history they are means over people. Empty buckets are absent.
    """

    users: Int64
    per_user: Mapping[str, Float64]
    overall: Mapping[str, float]
    buckets: Mapping[str, Mapping[str, Mapping[str, float]]]


@dataclass(frozen=True, kw_only=True)
class Interval:
    """An estimate and the interval around it."""

    mean: float
    low: float
    high: float


def evaluate(
    scorer: Scorer,
    history: Interactions,
    targets: Interactions,
    *,
    popularity: Int64,
    ks: Sequence[int] = (10, 20),
    block: int = 256,
) -> Evaluation:
    """Full-ranking metrics of a scorer, for every person with a target.

    Args:
        scorer: sees the histories only.
        history: what people had chosen before; not ranked.
        targets: what they chose next; the same people in the same order.
        popularity: int64[n_items], how often each item was chosen in training. For novelty and the buckets.
        ks: lengths of list to report.
        block: people scored at a time; memory, not results, depends on it.

    Raises:
        InvalidConfig: nobody has a target, or sizes disagree.
        MalformedScores: the scorer gave a NaN or a wrong shape.
    """
    if popularity.shape != (history.n_items,):
        raise InvalidConfig(f"popularity must have {history.n_items} entries, not {popularity.shape}")
    if not ks or min(ks) < 1:
        raise InvalidConfig("ks must hold lengths of at least 1")
    bucket = popularity_bucket(popularity)
    users: list[Int64] = []
    lists: list[Int32] = []
    columns: dict[str, list[Float64]] = {}
    by_target: dict[str, list[Float64]] = {}
    target_buckets: list[Int64] = []
    for scores, seen, wanted, at in _blocks(scorer, history, targets, block):
        ranks = metrics.target_ranks(scores, seen, wanted)
        scored = ranks.n_targets > 0
        shown = metrics.top_k(scores, seen, max(ks))
        users.append(at[scored])
        lists.append(shown[scored])
        for name, values in _per_user(ranks, shown, popularity, ks).items():
            columns.setdefault(name, []).append(values[scored])
        target_buckets.append(bucket[ranks.items])
        for k in ks:
            by_target.setdefault(f"hr@{k}", []).append(ranks.within(k).astype(np.float64))
            by_target.setdefault(f"ndcg@{k}", []).append(metrics.gains(ranks, k))
    if not sum(map(len, users)):
        raise InvalidConfig("nobody has a target outside their history")

    people = np.concatenate(users)
    shown = np.concatenate(lists)
    per_user = {name: np.concatenate(parts) for name, parts in columns.items()}
    per_target = {name: np.concatenate(parts) for name, parts in by_target.items()}
    overall = {name: float(values.mean()) for name, values in per_user.items()}
    for k in ks:
        overall[f"coverage@{k}"] = metrics.coverage(shown[:, :k], history.n_items)
    shortest = np.array(list(HISTORY_LENGTHS.values()))
    lengths = np.searchsorted(shortest, history.lengths[people], side="right") - 1
    return Evaluation(
        users=people,
        per_user=per_user,
        overall=overall,
        buckets={
            "popularity": _means(np.concatenate(target_buckets), ("head", "middle", "tail"), per_target),
            "history": _means(lengths, tuple(HISTORY_LENGTHS), per_user),
        },
    )


def popularity_bucket(popularity: Int64) -> Int64:
    """int64[n_items], 0 head, 1 middle, 2 tail.

    From the most chosen item down, an item is head while those before it hold less than 20 % of the interactions, and
    middle while they hold less than 80 %. An item nobody chose is tail; equal counts go by position.

    >>> popularity_bucket(np.array([0, 1, 6, 3])).tolist()
    [2, 2, 0, 1]
    """
    order = np.argsort(-popularity, kind="stable")
    before = np.cumsum(popularity[order]) - popularity[order]
    share = before / max(int(popularity.sum()), 1)
    out = np.empty(len(popularity), np.int64)
    out[order] = np.searchsorted([HEAD, TAIL], share, side="right")
    out[popularity == 0] = 2
    return out


def sampled_metrics(
    scorer: Scorer,
    history: Interactions,
    targets: Interactions,
    n_negatives: int = 99,
    *,
    seed: int,
    k: int = 10,
    block: int = 256,
) -> dict[str, float]:
    """HR and NDCG of each target among a few random unseen items, only to compare with older tables.

    Every person gets one set of distinct unseen non-targets; each of their targets is ranked alone among these, ties
    against it. Such figures do not order methods as full ranking does, hence their names: "hr@10 (99 sampled
    negatives)".
    """
    rng = np.random.default_rng(seed)
    totals: list[Float64] = []
    for scores, seen, wanted, _ in _blocks(scorer, history, targets, block):
        left = metrics.unseen(scores, seen)
        picks = rng.random(scores.shape)  # drawn row by row, so independent of the block
        picks[np.isneginf(left)] = np.inf
        cells = np.unique(wanted.rows.astype(np.int64) * wanted.n_items + wanted.items)
        rows, items = np.divmod(cells, wanted.n_items)
        valid = ~np.isneginf(left[rows, items])
        rows, items = rows[valid], items[valid]
        picks[rows, items] = np.inf
        sample = metrics.best(-picks, n_negatives)  # −1 where nothing is left to draw
        others = np.where(sample >= 0, np.take_along_axis(left, np.maximum(sample, 0), axis=1), -np.inf)
        rank = 1 + np.count_nonzero(others[rows] >= left[rows, items][:, None], axis=1)
        n = np.bincount(rows, minlength=wanted.n_users)
        hits = np.bincount(rows, rank <= k, minlength=wanted.n_users)
        gain = np.bincount(rows, (rank <= k) / np.log2(rank + 1.0), minlength=wanted.n_users)
        totals.append(np.stack([hits, gain])[:, n > 0] / n[n > 0])
    values = np.concatenate(totals, axis=1) if totals else np.zeros((2, 0))
    if not values.shape[1]:
        raise InvalidConfig("nobody has a target outside their history")
    label = f"@{k} ({n_negatives} sampled negatives)"
    return {name + label: float(row.mean()) for name, row in zip(("hr", "ndcg"), values, strict=True)}


@dataclass(frozen=True)
class Resamples:
    """Percentile bootstrap of several scorers over the same people, and of every comparison between them.

    Attributes:
        means: of each scorer, over seeds and people.
        resampled: float64[n_boot] of each, its mean with people, and seeds where there are several, drawn again.
    """

    means: Mapping[str, float]
    resampled: Mapping[str, Float64]

    @classmethod
    def of(cls, scorers: Mapping[str, AnyFloat], *, n_boot: int = 1000, seed: int) -> Resamples:
        """Draws the people once for all.

        Args:
            scorers: float64[m] each, one a person in the same order; or float64[n_seeds, m], whose seeds are resampled
                too. Those with several seeds have as many, and a seed is resampled as a pair; one with a single seed
                stays as it is. A handful of seeds understates their part of the variance by (n_seeds − 1) ÷ n_seeds.
            n_boot: resamples.
            seed: of the resampling; the same seed gives the same intervals.
        """
        tables = [_table(values) for values in scorers.values()]
        if len({table.shape[1] for table in tables}) > 1:
            raise InvalidConfig("a pair needs the same people on both sides")
        if len({len(table) for table in tables} - {1}) > 1:
            raise InvalidConfig("a pair needs as many seeds on both sides, or one on one of them")
        found = _resampled(tables, n_boot, seed)
        means = [float(table.mean()) for table in tables]
        return cls(dict(zip(scorers, means, strict=True)), dict(zip(scorers, found, strict=True)))

    def mean(self, a: str, level: float = 0.95) -> Interval:
        """Of one scorer."""
        return _interval(self.means[a], self.resampled[a], level)

    def difference(self, a: str, b: str, level: float = 0.95) -> Interval:
        """Mean of a − b over people, the same people resampled on both sides."""
        return _interval(self.means[a] - self.means[b], self.resampled[a] - self.resampled[b], level)

    def ratio(self, a: str, b: str, level: float = 0.95) -> Interval:
        """Mean of a ÷ mean of b. A resample in which b is zero counts as +∞.

        Raises:
            InvalidConfig: b is zero for everybody, so there is no ratio.
        """
        above, below = self.resampled[a], self.resampled[b]
        if not self.means[b]:
            raise InvalidConfig("a ratio needs a denominator that is not zero for everybody")
        ratios = np.divide(above, below, out=np.full(len(above), np.inf), where=below != 0)
        return _interval(self.means[a] / self.means[b], ratios, level)


def confidence(values: AnyFloat, *, n_boot: int = 1000, seed: int, level: float = 0.95) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean; arguments as `Resamples.of`, `level` the share of means inside."""
    found = Resamples.of({"": values}, n_boot=n_boot, seed=seed).mean("", level)
    return found.low, found.high


def paired_difference(a: AnyFloat, b: AnyFloat, *, n_boot: int = 1000, seed: int, level: float = 0.95) -> Interval:
    """Mean of a − b over people; see `Resamples`."""
    return Resamples.of({"a": a, "b": b}, n_boot=n_boot, seed=seed).difference("a", "b", level)


def paired_ratio(a: AnyFloat, b: AnyFloat, *, n_boot: int = 1000, seed: int, level: float = 0.95) -> Interval:
    """Mean of a ÷ mean of b; see `Resamples`."""
    return Resamples.of({"a": a, "b": b}, n_boot=n_boot, seed=seed).ratio("a", "b", level)


def _blocks(
    scorer: Scorer, history: Interactions, targets: Interactions, block: int
) -> Iterator[tuple[Float32, Interactions, Interactions, Int64]]:
    """Scores, histories, targets and positions of the people with any target, a block at a time."""
    if targets.n_users != history.n_users or targets.n_items != history.n_items:
        raise InvalidConfig("history and targets must hold the same people and items")
    users = np.flatnonzero(targets.lengths > 0)
    for start in range(0, len(users), block):
        at = users[start : start + block]
        seen = history.select(at)
        yield scorer.scores(seen), seen, targets.select(at), at


def _per_user(ranks: metrics.Ranks, shown: Int32, popularity: Int64, ks: Sequence[int]) -> dict[str, Float64]:
    out: dict[str, Float64] = {}
    for k in ks:
        out[f"hr@{k}"] = metrics.hr(ranks, k)
        out[f"ndcg@{k}"] = metrics.ndcg(ranks, k)
        out[f"recall@{k}"] = metrics.recall(ranks, k)
        out[f"precision@{k}"] = metrics.precision(ranks, k)
        out[f"f1@{k}"] = metrics.f1(ranks, k)
        out[f"mrr@{k}"] = metrics.mrr(ranks, k)
        out[f"map@{k}"] = metrics.average_precision(ranks, k)
        out[f"novelty@{k}"] = metrics.novelty(shown[:, :k], popularity)
    return out | {"auc": metrics.auc(ranks), "accuracy": metrics.accuracy(ranks)}


def _means(bucket: Int64, names: Sequence[str], columns: Mapping[str, Float64]) -> dict[str, dict[str, float]]:
    out = {}
    for b, name in enumerate(names):
        mine = bucket == b
        if mine.any():
            means = {metric: float(values[mine].mean()) for metric, values in columns.items()}
            out[name] = {"n": float(mine.sum()), **means}
    return out


def _table(values: AnyFloat) -> Float64:
    """float64[n_seeds, m]."""
    table = np.atleast_2d(np.asarray(values, np.float64))
    if table.ndim != 2 or not table.size:
        raise InvalidConfig("values must be [m] or [n_seeds, m], with at least one person")
    return table


def _resampled(tables: Sequence[Float64], n_boot: int, seed: int) -> list[Float64]:
    """float64[n_boot] a table: its mean with people, and seeds where there are several, drawn with replacement."""
    rng = np.random.default_rng(seed)
    m = tables[0].shape[1]
    n_seeds = max(len(table) for table in tables)
    seed_weights = rng.multinomial(n_seeds, np.full(n_seeds, 1 / n_seeds), n_boot) / n_seeds
    out = [np.empty(n_boot) for _ in tables]
    for start in range(0, n_boot, 100):  # 100 rows of counts at a time, so that memory stays small
        rows = slice(start, min(start + 100, n_boot))
        people = rng.multinomial(m, np.full(m, 1 / m), rows.stop - rows.start) / m
        for mean, table in zip(out, tables, strict=True):
            weights = seed_weights[rows] if len(table) > 1 else 1.0
            mean[rows] = ((people @ table.T) * weights).sum(axis=1)
    return out


def _interval(mean: float, resampled: Float64, level: float) -> Interval:
    if not 0.0 < level < 1.0:
        raise InvalidConfig(f"level must be in (0, 1), not {level}")
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2], method="nearest")
    return Interval(mean=mean, low=float(low), high=float(high))
