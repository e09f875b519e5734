"""Membership inference finds members where nothing protects them, and nobody where nothing was learned."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from penchant.common.arrays import Float32
from penchant.common.catalogue import Catalogue
from penchant.common.errors import InvalidConfig
from penchant.common.interactions import Interactions
from penchant.common.learners.contract import State
from penchant.common.learners.cooccurrence import Cooccurrence, CooccurrenceConfig
from penchant.simulations.audit.membership import Membership, membership, statistics
from penchant.simulations.data.loaders import load
from penchant.simulations.engine import Population
from penchant.simulations.plans import Federated, federated
from penchant.simulations.settings import Row, SimulationConfig

DATA = load("synthetic:users=400,items=300,interactions=20,topics=8,seed=0")
PEOPLE = Population(histories=DATA.interactions, catalogue=DATA.catalogue)
ROWS: dict[str, tuple[Row, dict[str, Any]]] = {
    "fedavg": (Row("row", "federated", "fedavg", "mf", "none"), {"rounds": 8}),
    "co-occurrence": (Row("row", "federated", "cooccurrence", "", "none"), {}),
    "private": (Row("row", "federated", "cooccurrence", "", "user"), {"epsilon": 0.1, "delta": 1e-5}),
}


def made(name: str, **changes: Any) -> Federated:
    row, options = ROWS[name]
    settings = SimulationConfig(learner=row.learner, unit=row.unit, **options)
    return replace(federated(row, settings, PEOPLE.histories.n_users), **changes)


def attacked(name: str, people: Population = PEOPLE) -> Membership:
    return membership(made(name), people, name=name, seed=3, where="cpu", confidence=0.95)


@pytest.mark.parametrize("name", ["fedavg", "co-occurrence"])
def test_an_exact_model_gives_its_members_away(name: str) -> None:
    # By chance the AUC of 200 and 200 has a stddev of 0.029, so 0.65 is 5 of them: fewer than 1 seed in 1e6.
    found = attacked(name)
    assert found.members + found.others == 400
    assert found.auc > 0.65


def test_a_model_under_much_noise_gives_nobody_away() -> None:
    # 5 stddevs of chance, and what ε = 0.1 allows on top: |AUC − ½| ≤ Φ(μ/√2) − ½ = 0.01 with μ = 0.03.
    assert abs(attacked("private").auc - 0.5) < 5 * 0.029 + 0.01


def test_too_few_others_for_a_low_rate_of_false_alarms_are_told() -> None:
    found = attacked("co-occurrence")
    assert not found.tpr.resolved
    assert found.note.startswith(f"{found.others} people are too few")
    enough = replace(found, others=1000, tpr=replace(found.tpr, resolved=True))
    assert enough.note == ""


class Fixed(Cooccurrence):
    """Scores everybody as the state says."""

    def scores(self, state: State, histories: Interactions) -> Float32:
        scores = np.tile(np.asarray(state["scores"], np.float32), (histories.n_users, 1))
        assert all(len(h) == 2 for h in histories)  # the prefix alone
        return scores


def test_the_statistic_is_the_mean_log_of_how_much_better_the_model_ranks_the_last_items() -> None:
    catalogue = Catalogue(ids=tuple("abcdef"))
    learner = Fixed(catalogue, CooccurrenceConfig())
    # items 0 and 1 came first and take no rank; items 2 and 3 are asked for
    target = {"scores": np.array([9, 9, 4, 3, 2, 1])}  # ranks 1 and 2
    reference = {"scores": np.array([0, 0, 1, 3, 2, 4])}  # ranks 4 and 2
    people = Interactions.of([[0, 1, 2, 3]], 6)
    assert statistics(learner, target, reference, people) == pytest.approx([math.log(4) / 2])
    assert statistics(learner, reference, target, people) == pytest.approx([-math.log(4) / 2])
    assert statistics(learner, target, target, people).tolist() == [0.0]
    tied = {"scores": np.zeros(6)}  # everybody in the middle of four: 2.5
    assert statistics(learner, tied, target, people) == pytest.approx([-math.log(2.5**2 / 2) / 2])


def test_the_halves_run_the_rows_own_mechanism(monkeypatch: pytest.MonkeyPatch) -> None:
    from penchant.simulations import engine

    seen, honest = [], engine.run

    def watched(row: Federated, population: Population, **options: Any) -> Any:
        seen.append((row, population, options["name"]))
        return honest(row, population, **options)

    monkeypatch.setattr("penchant.simulations.audit.membership.engine.run", watched)
    attacked("private")
    (one, members, _), (two, others, _) = seen
    assert members.histories.n_users + others.histories.n_users == 400
    assert one.plan.n_users == members.histories.n_users
    for half in (one, two):
        assert half.plan.events() == made("private").plan.events()
        assert half.settings == made("private").settings
    assert len({name for _, _, name in seen}) == 2  # streams of their own


def test_too_few_people_are_refused() -> None:
    few = Population(histories=DATA.interactions.select([0, 1, 2]), catalogue=DATA.catalogue)
    with pytest.raises(InvalidConfig, match="members and others"):
        attacked("co-occurrence", few)
