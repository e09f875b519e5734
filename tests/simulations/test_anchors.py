"""Figures on public data that must not move: loading, split, evaluation and learner together give what they gave.

The protocol: leave-last-out, full ranking over the catalogue less what was seen, ties in time by file order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from penchant.common.interactions import Interactions
from penchant.simulations import engine
from penchant.simulations.baselines import Ease, Popularity
from penchant.simulations.data.dataset import Dataset
from penchant.simulations.data.loaders import load
from penchant.simulations.engine import Population
from penchant.simulations.evaluation import Evaluation, Interval, Scorer, evaluate, paired_difference
from penchant.simulations.plans import federated
from penchant.simulations.settings import SimulationConfig, rows
from penchant.simulations.simulate import NoSharing, _Released
from penchant.simulations.splits import Split, leave_last_out


def scored(scorer: Scorer, parts: Split) -> Evaluation:
    return evaluate(scorer, parts.history, parts.targets, popularity=parts.train.counts(), ks=(10,))


@pytest.fixture(scope="module")
def ml_100k(require: Callable[[str], None]) -> Split:
    require("recbole")
    return leave_last_out(load("ml-100k").interactions)


@pytest.fixture(scope="module")
def embedded(require: Callable[[str], None]) -> Dataset:
    require("penchant_movielens")
    return load("embedded")


def by_hand(scores: np.ndarray, seen: np.ndarray, targets: np.ndarray) -> float:
    """Mean NDCG@10 in % of one target each, from dense float[m, n_items], bool[m, n_items] and int[m]: a loop."""
    gains = []
    for own, known, target in zip(scores, seen, targets, strict=True):
        better = sum(own[item] >= own[target] for item in range(len(own)) if not known[item] and item != target)
        gains.append(1 / np.log2(better + 2) if better < 10 else 0.0)
    return 100 * float(np.mean(gains))


def dense(interactions: Interactions) -> np.ndarray:
    out = np.zeros((interactions.n_users, interactions.n_items))
    out[interactions.rows, interactions.items] = 1
    return out


def test_ml_100k_gives_the_figures_of_popularity_and_ease(ml_100k: Split) -> None:
    assert ml_100k.train.n_users == 943
    popularity, ease = (100 * scored(kind(ml_100k.train), ml_100k).overall["ndcg@10"] for kind in (Popularity, Ease))
    assert popularity == pytest.approx(4.32, abs=0.05)
    assert ease == pytest.approx(7.27, abs=0.1)
    # the same from the papers' formulas, written out without any of ours but the split
    train, seen = dense(ml_100k.train), dense(ml_100k.history)
    scored_users = ml_100k.targets.rows
    inverse = np.linalg.inv(train.T @ train + 300 * np.eye(train.shape[1]))
    weights = -inverse / np.diag(inverse)
    np.fill_diagonal(weights, 0)
    plain = {"popularity": np.tile(train.sum(axis=0), (943, 1)), "ease": seen @ weights}
    for name, found in (("popularity", popularity), ("ease", ease)):
        others = by_hand(plain[name][scored_users], seen[scored_users] > 0, ml_100k.targets.items)
        assert found == pytest.approx(others, abs=0.02)


def test_an_evaluation_that_forgets_part_of_the_protocol_misses_the_anchor(ml_100k: Split) -> None:
    train, counts = ml_100k.train, ml_100k.train.counts()
    nothing = Interactions.of([[]] * train.n_users, train.n_items)
    short = evaluate(Ease(train), train, ml_100k.targets, popularity=counts, ks=(10,))  # validation item not seen
    again = evaluate(Popularity(train), nothing, ml_100k.targets, popularity=counts, ks=(10,))  # seen items ranked
    assert abs(100 * short.overall["ndcg@10"] - 7.27) > 0.1
    assert abs(100 * again.overall["ndcg@10"] - 4.32) > 0.05


def against_floors(data: Dataset, asked: SimulationConfig) -> dict[str, Interval]:
    """Co-occurrence under three noise seeds less each floor, in NDCG@10, paired over people."""
    parts = leave_last_out(data.interactions)
    people = Population(histories=parts.train, catalogue=data.catalogue)
    row = rows(asked)[-1]
    made = federated(row, asked, parts.train.n_users)
    found = []
    for seed in range(3):
        done = engine.run(
            made,
            people,
            name=row.name,
            seed=seed,
            nodes=2,
            engine="local",
            where="cpu",
            after_round=lambda record, run: None,
        )
        released = _Released(done.learner, done.learner.released(done.state))
        found.append(scored(released, parts).per_user["ndcg@10"])
    floors: dict[str, Scorer] = {"popularity": Popularity(parts.train), "no-sharing": NoSharing(data.catalogue)}
    return {
        name: paired_difference(np.stack(found), scored(floor, parts).per_user["ndcg@10"], seed=0)
        for name, floor in floors.items()
    }


def test_one_private_release_beats_both_floors_on_the_embedded_data_and_without_budget_it_does_not(
    embedded: Dataset,
) -> None:
    asked = SimulationConfig(learner="cooccurrence", unit="user", epsilon=8.0, delta=1e-5)
    for difference in against_floors(embedded, asked).values():
        assert difference.low > 0
    hardly = against_floors(embedded, replace(asked, epsilon=0.05))
    assert hardly["popularity"].low < 0
