"""Evaluation: worked cases, intervals that cover what they should, and the labelled 99-negatives protocol."""

from __future__ import annotations

import numpy as np
import pytest

from penchant.common.arrays import Float32, Int64
from penchant.common.errors import InvalidConfig, MalformedScores
from penchant.common.interactions import Interactions
from penchant.simulations.evaluation import (
    Scorer,
    confidence,
    evaluate,
    paired_difference,
    paired_ratio,
    popularity_bucket,
    sampled_metrics,
)

N_ITEMS = 40


class Same:
    """The same scores for everybody."""

    def __init__(self, scores: np.ndarray) -> None:
        self._scores = scores.astype(np.float32)

    def scores(self, histories: Interactions) -> Float32:
        return np.tile(self._scores, (histories.n_users, 1))


class ByHistory:
    """Scores that differ from person to person, as a pure function of the history."""

    def scores(self, histories: Interactions) -> Float32:
        rows = [np.random.default_rng(int(h.items.sum())).permutation(histories.n_items) for h in histories]
        return np.stack(rows).astype(np.float32)


def population(n_users: int = 50, seed: int = 0) -> tuple[Interactions, Interactions]:
    rng = np.random.default_rng(seed)
    picks = [rng.permutation(N_ITEMS).tolist() for _ in range(n_users)]
    return (
        Interactions.of([p[: 1 + u % 12] for u, p in enumerate(picks)], N_ITEMS),
        Interactions.of([p[12 : 12 + u % 4] for u, p in enumerate(picks)], N_ITEMS),
    )


# ---- evaluate


def test_a_worked_case() -> None:
    history = Interactions.of([[0], [1], [2], []], 5)
    targets = Interactions.of([[1], [0, 4], [], [0]], 5)
    scorer: Scorer = Same(np.array([5, 4, 3, 2, 1]))
    out = evaluate(scorer, history, targets, popularity=np.array([6, 2, 0, 0, 0]), ks=(1, 2))
    assert out.users.tolist() == [0, 1, 3]  # the third person has no target
    assert out.per_user["hr@1"].tolist() == [1, 1, 1]
    assert out.per_user["recall@2"].tolist() == [1, 0.5, 1]
    assert out.per_user["precision@2"].tolist() == [0.5, 0.5, 0.5]
    assert out.overall["recall@2"] == pytest.approx(2.5 / 3)
    assert out.overall["coverage@2"] == pytest.approx(3 / 5)  # items 0, 1 and 2 are shown
    head, tail = out.buckets["popularity"]["head"], out.buckets["popularity"]["tail"]
    assert (head["n"], head["hr@1"]) == (2, 1)  # item 0 twice
    assert (tail["n"], tail["hr@1"]) == (1, 0)  # item 4
    assert "middle" in out.buckets["popularity"]  # item 1, a quarter of all interactions
    assert {name: b["n"] for name, b in out.buckets["history"].items()} == {"0": 1, "1-9": 2}
    assert out.buckets["history"]["1-9"]["recall@2"] == 0.75


def test_a_scorer_sees_histories_only_and_the_block_does_not_matter() -> None:
    history, targets = population()
    popularity = history.counts()
    whole = evaluate(ByHistory(), history, targets, popularity=popularity)
    parts = evaluate(ByHistory(), history, targets, popularity=popularity, block=7)
    assert whole.overall == parts.overall
    assert whole.buckets == parts.buckets
    for name, values in whole.per_user.items():
        np.testing.assert_array_equal(values, parts.per_user[name])
    assert set(whole.users.tolist()) == {u for u in range(50) if u % 4}


def test_a_person_whose_targets_are_all_seen_is_not_scored() -> None:
    history = Interactions.of([[0, 1], [0]], 4)
    targets = Interactions.of([[1], [1]], 4)
    out = evaluate(Same(np.arange(4)), history, targets, popularity=history.counts())
    assert out.users.tolist() == [1]
    with pytest.raises(InvalidConfig, match="nobody"):
        evaluate(Same(np.arange(4)), history, history, popularity=history.counts())
    with pytest.raises(InvalidConfig, match="nobody"):
        sampled_metrics(Same(np.arange(4)), history, history, seed=0)


def test_one_target_makes_recall_the_hit_rate_and_the_buckets_add_up() -> None:
    history, targets = population(200)
    one = targets.keep(np.diff(targets.rows, prepend=-1) != 0)
    out = evaluate(ByHistory(), history, one, popularity=history.counts())
    np.testing.assert_array_equal(out.per_user["recall@10"], out.per_user["hr@10"])
    for by in ("popularity", "history"):
        parts = out.buckets[by].values()
        assert sum(b["n"] for b in parts) == len(out.users)
        assert sum(b["n"] * b["ndcg@10"] for b in parts) / len(out.users) == pytest.approx(out.overall["ndcg@10"])
    assert 0.1 < out.overall["hr@10"] < 0.6  # neither nothing nor everything, or the sums would show little


def test_head_middle_and_tail_are_cut_by_share_of_interactions() -> None:
    counts = np.array([15, 20, 10, 5, 50, 0])
    # From the top, the share held before each: item 4 0, item 1 .5, item 0 .7, item 2 .85, item 3 .95.
    assert popularity_bucket(counts).tolist() == [1, 1, 2, 2, 0, 2]
    assert popularity_bucket(np.zeros(3, np.int64)).tolist() == [2, 2, 2]


def test_scores_with_a_nan_or_a_wrong_shape_are_refused() -> None:
    history, targets = population()
    bad = np.arange(N_ITEMS, dtype=np.float64)
    bad[3] = np.nan
    with pytest.raises(MalformedScores, match="NaN"):
        evaluate(Same(bad), history, targets, popularity=history.counts())
    with pytest.raises(MalformedScores, match="shape"):
        evaluate(Same(np.arange(3)), history, targets, popularity=history.counts())


@pytest.mark.parametrize(("popularity", "ks"), [(np.zeros(3, np.int64), (10,)), (None, ()), (None, (0,))])
def test_options_that_cannot_be_meant_are_refused(popularity: Int64 | None, ks: tuple[int, ...]) -> None:
    history, targets = population()
    counts = history.counts() if popularity is None else popularity
    with pytest.raises(InvalidConfig, match=r"popularity|ks"):
        evaluate(ByHistory(), history, targets, popularity=counts, ks=ks)


# ---- intervals


def test_the_interval_is_the_normal_one_for_many_people_and_repeats_for_a_seed() -> None:
    values = np.random.default_rng(0).exponential(size=2000)
    low, high = confidence(values, seed=1)
    error = values.std() / np.sqrt(2000)
    # A bootstrap quantile of 1,000 resamples strays .15 errors for fewer than 1 seed in 100; bounds are twice that.
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.3 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.3 * error)
    assert (low, high) == confidence(values, seed=1)
    assert (low, high) != confidence(values, seed=2)
    assert np.ptp(confidence(values, seed=1, level=0.5)) < (high - low) / 2


def test_95_percent_intervals_cover_the_truth_and_50_percent_ones_do_not() -> None:
    # 200 samples of 60 coins: 95 % intervals cover 175 to 199 times but for 1 seed in 1,000.
    samples = np.random.default_rng(3).random((200, 60)) < 0.3

    def covered(level: float) -> int:
        intervals = [confidence(s.astype(float), seed=i, n_boot=300, level=level) for i, s in enumerate(samples)]
        return sum(low <= 0.3 <= high for low, high in intervals)

    assert 175 <= covered(0.95) <= 199
    assert covered(0.5) < 140


def test_pairing_narrows_the_interval_of_a_difference() -> None:
    rng = np.random.default_rng(4)
    easy = rng.normal(0, 1, 500)  # how easy each person is, for both rows
    a, b = easy + 0.1 + rng.normal(0, 0.1, 500), easy + rng.normal(0, 0.1, 500)
    paired = paired_difference(a, b, seed=0)
    assert paired.mean == pytest.approx(a.mean() - b.mean())
    assert 0 < paired.low < 0.1 < paired.high
    unpaired = paired_difference(a, rng.permutation(b), seed=0)
    assert unpaired.high - unpaired.low > 5 * (paired.high - paired.low)


def test_the_ratio_is_of_means_and_a_zero_denominator_is_refused() -> None:
    a, b = np.array([1.0, 0.0, 1.0, 1.0]), np.array([1.0, 1.0, 0.0, 0.0])
    out = paired_ratio(a, b, seed=0)
    assert out.mean == 1.5
    assert out.low < 1.5
    assert out.high == np.inf  # some resamples hold nobody whom b served
    assert paired_ratio(2 * b, b, seed=0, n_boot=50).low == 2.0
    with pytest.raises(InvalidConfig, match="denominator"):
        paired_ratio(a, np.zeros(4), seed=0)


def test_seeds_widen_an_interval_when_they_differ_and_not_when_they_agree() -> None:
    rng = np.random.default_rng(5)
    people = rng.normal(1.0, 0.1, 400)
    same = np.stack([people] * 5)
    apart = same + np.array([-0.2, -0.1, 0.0, 0.1, 0.2])[:, None]
    narrow, repeated, wide = (np.ptp(confidence(v, seed=0)) for v in (people, same, apart))
    assert repeated == pytest.approx(narrow, rel=0.2)
    assert wide > 5 * narrow
    joint = paired_difference(apart, apart - 0.5, seed=0)  # the same five seeds on both sides
    assert joint.low == pytest.approx(0.5)
    one_sided = paired_difference(apart, people, seed=0)  # against a row without noise
    assert one_sided.high - one_sided.low > 0.1
    assert one_sided.mean == pytest.approx(0.0)


def test_sides_that_do_not_match_are_refused() -> None:
    with pytest.raises(InvalidConfig, match="people"):
        paired_difference(np.zeros(3), np.zeros(4), seed=0)
    with pytest.raises(InvalidConfig, match="seeds"):
        paired_difference(np.zeros((2, 3)), np.zeros((3, 3)), seed=0)
    with pytest.raises(InvalidConfig, match="at least one person"):
        confidence(np.zeros(0), seed=0)
    with pytest.raises(InvalidConfig, match="level"):
        confidence(np.zeros(3), seed=0, level=1.0)


# ---- 99 negatives


def test_sampled_metrics_are_labelled_and_near_chance_for_a_scorer_that_knows_nothing() -> None:
    rng = np.random.default_rng(6)
    n_items = 400
    history = Interactions.of([[int(i)] for i in rng.integers(0, 300, 1500)], n_items)
    targets = Interactions.of([[int(i)] for i in rng.integers(300, 400, 1500)], n_items)

    class Random:
        def scores(self, histories: Interactions) -> Float32:
            return rng.random((histories.n_users, n_items), np.float32)

    out = sampled_metrics(Random(), history, targets, seed=0)
    assert set(out) == {"hr@10 (99 sampled negatives)", "ndcg@10 (99 sampled negatives)"}
    assert out["hr@10 (99 sampled negatives)"] == pytest.approx(0.1, abs=0.03)  # 4 standard errors
    assert sampled_metrics(Same(np.arange(n_items)), history, targets, seed=0)["hr@10 (99 sampled negatives)"] > 0.2
    constant = sampled_metrics(Same(np.ones(n_items)), history, targets, seed=0)
    assert constant["hr@10 (99 sampled negatives)"] == 0.0  # ties count against the target


def test_a_sample_of_everything_unseen_is_the_full_ranking_and_the_block_does_not_matter() -> None:
    history, targets = population()
    one = targets.keep(np.diff(targets.rows, prepend=-1) != 0)
    full = evaluate(ByHistory(), history, one, popularity=history.counts()).overall
    every = sampled_metrics(ByHistory(), history, one, 100, seed=0)
    assert every["ndcg@10 (100 sampled negatives)"] == pytest.approx(full["ndcg@10"])
    few = sampled_metrics(ByHistory(), history, targets, 9, seed=0, k=3)
    assert few == sampled_metrics(ByHistory(), history, targets, 9, seed=0, k=3, block=7)
    assert few != sampled_metrics(ByHistory(), history, targets, 9, seed=1, k=3)
