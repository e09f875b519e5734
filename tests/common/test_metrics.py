"""Metrics: cases worked by hand first, then agreement with ranx and scikit-learn on random data without ties."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, balanced_accuracy_score, ndcg_score, roc_auc_score

from penchant.common import metrics
from penchant.common.arrays import Float32, Float64
from penchant.common.errors import InvalidConfig, MalformedScores
from penchant.common.interactions import Interactions
from penchant.common.metrics import Ranks, target_ranks

NOBODY: list[list[int]] = [[]]


def ranked(scores: list[float], targets: list[int], history: list[int] | None = None) -> Ranks:
    """One person's ranks."""
    n = len(scores)
    return target_ranks(
        np.array([scores], np.float32), Interactions.of([history or []], n), Interactions.of([targets], n)
    )


def one(values: Float64) -> float:
    assert values.shape == (1,)
    return float(values[0])


# ---- worked by hand


def test_the_best_item_has_rank_1_and_seen_items_take_no_rank() -> None:
    assert ranked([0.9, 0.5, 0.1], [1]).ranks.tolist() == [2]
    assert ranked([0.9, 0.5, 0.1], [1], history=[0]).ranks.tolist() == [1]
    assert ranked([0.9, 0.5, 0.1], [1], history=[0, 0]).n_unseen.tolist() == [2]


def test_a_tie_counts_against_the_target() -> None:
    assert ranked([1.0, 1.0, 1.0, 0.0], [0]).ranks.tolist() == [3]
    assert ranked([1.0, 1.0, 1.0, 0.0], [2]).ranks.tolist() == [3]  # whatever its position
    assert one(metrics.hr(ranked([0.0] * 11, [0]), 10)) == 0.0  # a constant score earns nothing


def test_tied_targets_take_the_places_after_the_tied_others() -> None:
    assert ranked([1.0, 1.0, 1.0, 0.0], [0, 2]).ranks.tolist() == [2, 3]


def test_a_target_in_the_history_is_no_target_and_a_repeat_counts_once() -> None:
    ranks = ranked([0.9, 0.5, 0.1], [0, 1, 1], history=[0])
    assert ranks.items.tolist() == [1]
    assert ranks.n_targets.tolist() == [1]


def test_infinite_scores_rank_below_and_above_all_others_but_never_with_the_seen() -> None:
    low = ranked([-np.inf, 0.0, np.inf, 5.0], [0], history=[3])
    assert low.ranks.tolist() == [3]
    assert ranked([-np.inf, 0.0, np.inf, 5.0], [2], history=[3]).ranks.tolist() == [1]


def test_ndcg_of_worked_cases() -> None:
    three = ranked([5, 4, 3, 2, 1], [0, 2, 3])
    assert three.ranks.tolist() == [1, 3, 4]
    dcg, ideal = 1 + 1 / math.log2(4) + 1 / math.log2(5), 1 + 1 / math.log2(3) + 1 / math.log2(4)
    assert one(metrics.ndcg(three, 5)) == pytest.approx(dcg / ideal)
    assert one(metrics.ndcg(three, 3)) == pytest.approx((1 + 0.5) / ideal)
    assert one(metrics.ndcg(three, 2)) == pytest.approx(1 / (1 + 1 / math.log2(3)))  # the ideal is cut at k too
    assert one(metrics.ndcg(ranked([5, 4, 3], [2]), 2)) == 0.0
    assert one(metrics.ndcg(ranked([5, 4, 3], [0, 1]), 10)) == pytest.approx(1.0)


def test_counting_metrics_of_a_worked_case() -> None:
    ranks = ranked([9, 8, 7, 6, 5, 4], [1, 3, 5])  # ranks 2, 4, 6
    assert one(metrics.hr(ranks, 1)) == 0.0
    assert one(metrics.hr(ranks, 4)) == 1.0
    assert one(metrics.recall(ranks, 4)) == pytest.approx(2 / 3)
    assert one(metrics.precision(ranks, 4)) == pytest.approx(1 / 2)
    assert one(metrics.f1(ranks, 4)) == pytest.approx(2 * (2 / 3) * (1 / 2) / (2 / 3 + 1 / 2))
    assert one(metrics.mrr(ranks, 4)) == pytest.approx(1 / 2)
    assert one(metrics.mrr(ranks, 1)) == 0.0
    assert one(metrics.average_precision(ranks, 4)) == pytest.approx((1 / 2 + 2 / 4) / 3)
    assert one(metrics.average_precision(ranks, 2)) == pytest.approx((1 / 2) / 2)


def test_auc_counts_ties_half_and_leaves_seen_items_out() -> None:
    assert one(metrics.auc(ranked([3, 2, 1, 0], [1]))) == pytest.approx(2 / 3)
    assert one(metrics.auc(ranked([3, 2, 1, 0], [1], history=[0]))) == 1.0
    assert one(metrics.auc(ranked([1, 1, 1, 1], [1]))) == 0.5
    assert one(metrics.auc(ranked([1, 1], [0, 1]))) == 1.0  # no pair to misjudge


def test_accuracy_is_balanced_over_the_top_share() -> None:
    scores = [float(x) for x in range(20, 0, -1)]
    assert one(metrics.accuracy(ranked(scores, [0, 9]))) == pytest.approx((1 / 2 + 17 / 18) / 2)  # 2 of 20 said
    assert one(metrics.accuracy(ranked(scores, [9]))) == pytest.approx((0 + 17 / 19) / 2)
    assert one(metrics.accuracy(ranked(scores, [9]), threshold=0.5)) == pytest.approx((1 + 10 / 19) / 2)
    assert one(metrics.accuracy(ranked([5, 4, 3, 2, 1], [0]))) == 1.0  # (1 − 0.9) · 5 + ½ is 1 item, not 0.999…
    with pytest.raises(InvalidConfig, match="threshold"):
        metrics.accuracy(ranked(scores, [9]), threshold=math.nan)


def test_lists_coverage_and_novelty_of_a_worked_case() -> None:
    scores = np.array([[1, 4, 3, 3, 0], [9, 8, 7, 6, 5]], np.float32)
    lists = metrics.top_k(scores, Interactions.of([[0], [0, 1, 2, 3]], 5), 3)
    assert lists.tolist() == [[1, 2, 3], [4, -1, -1]]  # a tie goes to the lower position; −1 fills
    assert metrics.coverage(lists, 5) == pytest.approx(4 / 5)
    counts = np.array([0, 3, 0, 0, 0])
    bits = [-math.log2(4 / 8), -math.log2(1 / 8), -math.log2(1 / 8)]
    np.testing.assert_allclose(metrics.novelty(lists, counts), [sum(bits) / 3, 3.0])


def test_a_person_without_targets_scores_nan_rather_than_zero() -> None:
    ranks = ranked([3, 2, 1], [])
    for metric in (metrics.hr, metrics.ndcg, metrics.recall, metrics.precision, metrics.f1, metrics.mrr):
        assert math.isnan(one(metric(ranks, 2)))
    assert math.isnan(one(metrics.average_precision(ranks, 2)))
    assert math.isnan(one(metrics.auc(ranks)))
    assert math.isnan(one(metrics.accuracy(ranks)))


@pytest.mark.parametrize("bad", [np.array([[0.0, np.nan, 0.0]]), np.zeros((1, 2)), np.zeros((2, 3)), np.zeros(3)])
def test_nan_and_misshapen_scores_are_refused(bad: Float64) -> None:
    empty = Interactions.of(NOBODY, 3)
    integers: Any = np.zeros((1, 3), np.int64)
    with pytest.raises(MalformedScores, match="scores"):
        target_ranks(bad, empty, empty)
    with pytest.raises(MalformedScores, match="floating"):
        target_ranks(integers, empty, empty)


def test_mismatched_people_and_a_list_of_length_zero_are_refused() -> None:
    with pytest.raises(InvalidConfig, match="same people"):
        target_ranks(np.zeros((1, 3)), Interactions.of([[]], 3), Interactions.of([[], []], 3))
    with pytest.raises(InvalidConfig, match="k must be"):
        metrics.hr(ranked([1, 0], [0]), 0)
    with pytest.raises(InvalidConfig, match="k must be"):
        metrics.best(np.zeros((1, 2)), 0)


# ---- properties


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), levels=st.integers(1, 6), k=st.integers(1, 12))
def test_best_is_a_stable_sort_cut_at_k(seed: int, levels: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    values = rng.integers(0, levels, (4, 9)).astype(np.float32)  # mostly ties
    values[rng.random(values.shape) < 0.3] = -np.inf
    expected = np.full((4, k), -1)
    for row, out in zip(values, expected, strict=True):
        order = [j for j in np.argsort(-row, kind="stable") if row[j] > -np.inf][:k]
        out[: len(order)] = order
    np.testing.assert_array_equal(metrics.best(values, k), expected)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), levels=st.integers(1, 6))
def test_ranks_are_those_of_the_worst_order_that_the_scores_allow(seed: int, levels: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, levels, (3, 12)).astype(np.float32)
    history = Interactions.of([rng.choice(12, 3).tolist() for _ in range(3)], 12)
    targets = Interactions.of([rng.choice(12, 4).tolist() for _ in range(3)], 12)
    ranks = target_ranks(scores, history, targets)
    for u in range(3):
        seen, wanted = set(history.history(u).items.tolist()), set(targets.history(u).items.tolist())
        order = [j for _, _, j in sorted((-scores[u, j], j in wanted, j) for j in range(12) if j not in seen)]
        expected = {j: r for r, j in enumerate(order, 1) if j in wanted}
        mine = ranks.rows == u
        assert dict(zip(ranks.items[mine].tolist(), ranks.ranks[mine].tolist(), strict=True)) == expected


def test_a_larger_score_for_a_target_never_lowers_a_metric() -> None:
    scores, history, targets = random_case(np.random.default_rng(5), n_users=30)
    before = target_ranks(scores, history, targets)
    raised = scores.copy()
    raised[before.rows, before.items] += 0.3
    after = target_ranks(raised, history, targets)
    for metric in (metrics.hr, metrics.ndcg, metrics.recall, metrics.mrr, metrics.average_precision):
        assert (metric(after, 10) >= metric(before, 10)).all()
        assert metric(after, 10).mean() > metric(before, 10).mean()
    assert (metrics.auc(after) >= metrics.auc(before)).all()


# ---- against others


def random_case(
    rng: np.random.Generator, n_users: int = 40, n_items: int = 60
) -> tuple[Float32, Interactions, Interactions]:
    """Distinct scores, and 1 to 14 targets a person outside a history of 8."""
    scores = np.stack([rng.permutation(n_items) for _ in range(n_users)]).astype(np.float32) / np.float32(n_items)
    picks = [rng.permutation(n_items) for _ in range(n_users)]
    history = Interactions.of([p[:8].tolist() for p in picks], n_items)
    return scores, history, Interactions.of([p[8 : 9 + u % 14].tolist() for u, p in enumerate(picks)], n_items)


def truth(scores: Float32, history: Interactions, targets: Interactions) -> list[tuple[np.ndarray, Float32]]:
    """For each person, label and score of every unseen item."""
    out = []
    for u in range(history.n_users):
        left = np.setdiff1d(np.arange(history.n_items), history.history(u).items)
        out.append((np.isin(left, targets.history(u).items).astype(int), scores[u, left]))
    return out


def test_scikit_learn_agrees_on_auc_accuracy_ndcg_and_average_precision() -> None:
    case = random_case(np.random.default_rng(7))
    ranks = target_ranks(*case)
    people = truth(*case)
    np.testing.assert_allclose(metrics.auc(ranks), [roc_auc_score(y, s) for y, s in people])
    for k in (5, 10):
        np.testing.assert_allclose(metrics.ndcg(ranks, k), [ndcg_score([y], [s], k=k) for y, s in people])
    np.testing.assert_allclose(metrics.average_precision(ranks, 60), [average_precision_score(y, s) for y, s in people])
    for t in (0.5, 0.9):
        said = [(np.argsort(np.argsort(s)) + 0.5) / len(s) >= t for _, s in people]
        expected = [balanced_accuracy_score(y, p) for (y, _), p in zip(people, said, strict=True)]
        np.testing.assert_allclose(metrics.accuracy(ranks, t), expected)


def test_scikit_learn_agrees_that_a_tied_pair_is_half_right() -> None:
    scores, history, targets = random_case(np.random.default_rng(8))
    coarse = np.round(scores * 6).astype(np.float32)
    expected = [roc_auc_score(y, s) for y, s in truth(coarse, history, targets)]
    np.testing.assert_allclose(metrics.auc(target_ranks(coarse, history, targets)), expected)


RANX = """
import json, sys
from ranx import Qrels, Run, evaluate
qrels, run, names = json.load(sys.stdin)
out = evaluate(Qrels(qrels), Run(run), names, return_mean=False)
json.dump({name: list(map(float, values)) for name, values in out.items()}, sys.stdout)
"""


def test_ranx_agrees_on_every_list_metric() -> None:
    case = random_case(np.random.default_rng(9))
    ranks = target_ranks(*case)
    qrels, run = {}, {}
    for u, (labels, scores) in enumerate(truth(*case)):
        qrels[f"{u:02}"] = {str(j): 1 for j in np.flatnonzero(labels)}
        run[f"{u:02}"] = {str(j): float(s) for j, s in enumerate(scores)}
    ours: dict[str, Callable[[Ranks, int], Float64]] = {
        "hit_rate": metrics.hr,
        "ndcg": metrics.ndcg,
        "recall": metrics.recall,
        "precision": metrics.precision,
        "f1": metrics.f1,
        "mrr": metrics.mrr,
        "map": metrics.average_precision,
    }
    names = [f"{name}@{k}" for name in ours for k in (3, 10)]
    done = subprocess.run(
        [sys.executable, "-c", RANX],
        input=json.dumps([qrels, run, names]),
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"NUMBA_DISABLE_JIT": "1"},  # compiling would take longer than everything else here
    )
    theirs = json.loads(done.stdout)
    for name, metric in ours.items():
        for k in (3, 10):
            expected = np.array(theirs[f"{name}@{k}"])
            if name == "map":  # ranx divides by the number of targets, we by what k can hold of them
                expected *= ranks.n_targets / np.minimum(ranks.n_targets, k)
            np.testing.assert_allclose(metric(ranks, k), expected, err_msg=f"{name}@{k}")
