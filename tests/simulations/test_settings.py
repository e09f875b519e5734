"""Settings: an impossible mix is refused in one line that says what to do; rows and plans are what was asked for."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from penchant.common import config
from penchant.common.catalogue import Catalogue
from penchant.common.errors import InvalidConfig
from penchant.common.learners import registry
from penchant.common.learners.neural.models import MF, MODELS, Recipe, Recurrent, reads_history
from penchant.common.learners.planned import CHOSEN, PROFILES
from penchant.common.privacy import gaussian
from penchant.common.privacy.events import Gaussian, PoissonGaussian
from penchant.common.privacy.plan import PrivacyPlan, task_digest
from penchant.common.streams import Streams
from penchant.simulations.plans import (
    BY_HAND,
    UNCHARGED,
    AsIf,
    Federated,
    as_if,
    epsilon_and_delta,
    federated,
)
from penchant.simulations.settings import Row, SimulationConfig, rows

FLOORS = [Row("popularity", "floor"), Row("no-sharing", "floor")]
BASELINES = [Row("item-knn", "not private"), Row("ease", "not private")]
CENTRAL = Row("central", "not private", model="mf")
FEDAVG = Row("fedavg", "federated", "fedavg", "mf", "none")
OPACUS = Row("fedavg+opacus", "federated", "fedavg", "mf", "interaction")
USER_DP = Row("fedavg+user-dp", "federated", "fedavg", "mf", "user")
COOCCURRENCE = Row("co-occurrence", "federated", "cooccurrence", "", "user")
EXACT = replace(COOCCURRENCE, unit="none")
ALS = Row("als", "federated", "als", "", "user")
STRENGTHS = Row("strengths", "federated", "strengths", "", "user")
PRIVATE = [OPACUS, USER_DP, COOCCURRENCE]
BUDGET: dict[str, Any] = {"epsilon": 3.0, "delta": 1e-5}


def named(found: list[Row]) -> list[str]:
    return [row.name for row in found]


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("given", "words"),
    [
        # the budget
        ({"epsilon": 3.0}, "add --delta 1e-5"),
        ({"epsilon": 0.0, "delta": 1e-5}, "epsilon must be positive and finite, not 0"),
        ({"epsilon": -1.0, "delta": 1e-5}, "epsilon must be positive"),
        ({"epsilon": math.nan, "delta": 1e-5}, "epsilon must be positive and finite, not nan"),
        ({"epsilon": math.inf, "delta": 1e-5}, "epsilon must be positive"),
        ({"epsilon": 3.0, "delta": 0.0}, r"delta must be in (0, 1), not 0"),
        ({"epsilon": 3.0, "delta": 1.0}, "delta must be in"),
        ({"epsilon": 3.0, "delta": -1e-5}, "delta must be in"),
        ({"epsilon": 3.0, "delta": math.nan}, "delta must be in"),
        ({"noise_multiplier": 0.0}, "noise_multiplier must be positive"),
        ({"noise_multiplier": math.nan}, "noise_multiplier must be positive"),
        ({**BUDGET, "noise_multiplier": 1.0}, "give one of them"),
        # no unit, no promise
        ({"unit": "none", **BUDGET}, "drop epsilon, or take --unit user"),
        ({"unit": "none", "noise_multiplier": 1.0}, "drop noise_multiplier, or take --unit user"),
        ({"unit": "none", "delta": 1e-5}, "drop delta, or take --unit user"),
        ({"unit": "none", "clip": 1.0}, "drop clip, or take --unit user"),
        ({"unit": "none", "sampling": "poisson"}, "drop --sampling, or take --unit user"),
        # units and models
        *(({"unit": "interaction", "model": m}, "take --model mf or mlp or neumf") for m in MODELS if reads_history(m)),
        ({"unit": "interaction", "learner": "cooccurrence"}, "take --unit user or none"),
        ({"unit": "interaction", "sampling": "poisson"}, "drop --sampling"),
        ({"sampling": "poisson", "max_participations": 3}, "drop one of the two"),
        # a learner without what was asked of it
        ({"unit": "interaction", "learner": "als"}, "learner als protects users: take --unit user or none"),
        ({"learner": "als", "model": "mf"}, "learner als has no model: drop --model"),
        ({"learner": "als", "rounds": 3}, "learner als has no rounds: drop --rounds"),
        ({"learner": "strengths", "model": "mf"}, "learner strengths has no model: drop --model"),
        ({"learner": "cooccurrence", "model": "mf"}, "drop --model, or take --learner fedavg"),
        ({"learner": "cooccurrence", "rounds": 3}, "drop --rounds, or take --learner fedavg"),
        ({"learner": "cooccurrence", "cohort": 3}, "drop --cohort"),
        ({"learner": "cooccurrence", "sampling": "poisson"}, "drop --sampling"),
        ({"learner": "cooccurrence", "max_participations": 1}, "drop --max-participations"),
        ({"learner": "cooccurrence", "local_epochs": 3}, "drop --local-epochs"),
        ({"learner": "cooccurrence", "lr": 0.1}, "drop --lr"),
        ({"learner": "cooccurrence", "clip": 0.1}, "drop --clip"),
        # noise scaled for other people
        ({"as_if_users": 6040}, "take --unit user"),
        ({"as_if_users": 6040, "unit": "none"}, "take --unit user"),
        ({"as_if_users": 6040, "unit": "interaction"}, "take --unit user"),
        ({"as_if_users": 0, "unit": "user"}, "as_if_users must be a whole number ≥ 1"),
        ({"as_if_users": 6040, "unit": "user", "sampling": "poisson"}, "drop --sampling"),
        ({"as_if_users": 6040, "unit": "user", "noise_multiplier": 1.0}, "give one of them"),
        # settings of a learner
        ({"settings": {"head": 3}}, "give --learner"),
        ({"learner": "cooccurrence", "settings": {"noise_stddev": 0.0}}, "settings.noise_stddev follows from"),
        ({"learner": "fedavg", "settings": {"device": {"rate": 0.1}}}, "settings.device follows from the privacy plan"),
        ({"counts_share": 0.2}, "take --learner cooccurrence"),
        ({"counts_share": 1.0, "learner": "cooccurrence"}, "counts_share must be in (0, 1)"),
        # unknown names
        ({"learner": "fedvag"}, "unknown learner 'fedvag'; did you mean 'fedavg'?"),
        ({"learner": "co-occurrence"}, "did you mean 'cooccurrence'?"),
        ({"model": "mff"}, "unknown model 'mff'; did you mean 'mf'?"),
        ({"model": "bert"}, "choose from cnn-lstm, gru, lstm, mf, mlp, neumf, transformer"),
        ({"unit": "users"}, "unknown unit 'users'; did you mean 'user'?"),
        ({"sampling": "poison"}, "unknown sampling 'poison'; did you mean 'poisson'?"),
        ({"engine": "ray"}, "unknown engine 'ray'; choose from flower, local"),
        ({"device": "cuda:0"}, "unknown device 'cuda:0'; did you mean 'cuda'?"),
        # counts and types
        *(({name: 0}, f"{name} must be a whole number ≥ 1, not 0") for name in ("rounds", "cohort", "nodes")),
        *(({name: 2.5}, f"{name} must be a whole number ≥ 1") for name in ("local_epochs", "max_participations")),
        *(({name: -1}, f"{name} must be a whole number ≥ 0, not -1") for name in ("seed", "k_core")),
        *(({name: bad}, f"{name} must be positive") for name in ("lr", "clip") for bad in (0.0, math.nan, math.inf)),
        # what trains and where it starts
        ({"start": "coocurrence"}, "unknown start 'coocurrence'; did you mean 'co-occurrence'?"),
        ({"start": "co-occurrence", "unit": "interaction"}, "unit interaction has no start co-occurrence"),
        ({"start": "co-occurrence", "cohort": 5}, "needs everybody in every round: drop --cohort"),
        ({"start": "co-occurrence", "sampling": "poisson"}, "drop --sampling"),
        ({"start": "co-occurrence", "max_participations": 2}, "drop --max-participations"),
        ({"learner": "cooccurrence", "start": "content"}, "learner cooccurrence has no start: drop --start"),
        ({"learner": "cooccurrence", "freeze": ("item",)}, "learner cooccurrence has no freeze"),
        ({"freeze": ("itm",)}, "mf has no weights 'itm'; did you mean 'item'?"),
        ({"freeze": ("blocks.9",), "model": "transformer"}, "did you mean 'blocks.1'?"),
        ({"freeze": ("user",)}, "user.weight is a person's own"),
        ({"freeze": ("item", "bias")}, "nothing to train"),
        ({"adapter": 33}, "adapter must be at most the size of an item vector, 32, not 33"),
        ({"adapter": 4, "unit": "interaction"}, "unit interaction has no adapter"),
        ({"proximal": 40.0}, "proximal must be ≥ 0 and below 1/lr = 20"),
        ({"proximal": 1.0, "unit": "interaction"}, "unit interaction has no proximal"),
        ({"data": 3}, "data must be text, not 3"),
        ({"split": 3}, "split must be text"),
        ({"rating_scale": (1.0,)}, "rating_scale must be two numbers"),
    ],
)
def test_an_impossible_mix_is_refused_in_one_line_that_says_what_to_do(given: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        SimulationConfig(**given)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "given",
    [
        BUDGET,
        {"delta": 1e-6},
        {"noise_multiplier": 1.0},
        {"unit": "interaction", "model": "neumf", **BUDGET},
        {"unit": "user", "model": "gru", **BUDGET},
        {"unit": "user", "sampling": "poisson", "cohort": 3},
        {"unit": "none", "rounds": 3, "cohort": 3, "lr": 0.1},
        {"learner": "cooccurrence", "unit": "none"},
        {"max_participations": 2},
        {"start": "co-occurrence", "sampling": "none", "model": "gru"},
        {"start": "content", "sampling": "poisson", "cohort": 3},
        {"freeze": ("blocks", "norm.bias"), "model": "transformer"},
        {"freeze": ("item",), "unit": "interaction"},
        {"adapter": 32, "freeze": ("item.down",)},
        {"proximal": 1.0},
    ],
)
def test_a_mix_that_differs_by_little_is_fine(given: dict[str, Any]) -> None:
    assert rows(SimulationConfig(**given))


# ----------------------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, [*FLOORS, *BASELINES, CENTRAL, FEDAVG, OPACUS, USER_DP, COOCCURRENCE]),
        ({"unit": "none"}, [*FLOORS, *BASELINES, CENTRAL, FEDAVG, EXACT]),
        ({"unit": "user"}, [*FLOORS, USER_DP, COOCCURRENCE]),
        ({"unit": "interaction"}, [*FLOORS, OPACUS]),
        ({"learner": "fedavg"}, [*FLOORS, FEDAVG, OPACUS, USER_DP]),
        ({"learner": "fedavg", "unit": "none"}, [*FLOORS, FEDAVG]),
        ({"learner": "cooccurrence"}, [*FLOORS, COOCCURRENCE]),
        ({"learner": "cooccurrence", "unit": "none"}, [*FLOORS, EXACT]),
        ({"learner": "als"}, [*FLOORS, ALS]),
        ({"learner": "als", "unit": "none"}, [*FLOORS, replace(ALS, unit="none")]),
        ({"learner": "strengths"}, [*FLOORS, STRENGTHS]),
        (
            {"model": "gru"},
            [*FLOORS, replace(CENTRAL, model="gru"), replace(FEDAVG, model="gru"), replace(USER_DP, model="gru")],
        ),
        ({"model": "neumf", "unit": "interaction"}, [*FLOORS, replace(OPACUS, model="neumf")]),
        ({"model": "mf"}, [*FLOORS, CENTRAL, FEDAVG, OPACUS, USER_DP]),
        ({"model": "lstm", "unit": "user"}, [*FLOORS, replace(USER_DP, model="lstm")]),
    ],
    ids=lambda v: " ".join(f"{k}={x}" for k, x in v.items()) if isinstance(v, dict) else None,
)
def test_the_rows_are_the_floors_and_what_was_asked_for(given: dict[str, Any], expected: list[Row]) -> None:
    assert rows(SimulationConfig(**given)) == expected


@pytest.mark.parametrize("name", ["data", "rounds", "seed", "nodes", "lr"])
def test_budgets_and_data_do_not_change_which_rows_there_are(name: str) -> None:
    given: dict[str, Any] = {"data": "synthetic", "rounds": 3, "seed": 5, "nodes": 2, "lr": 0.1}
    assert rows(SimulationConfig(**{name: given[name]})) == rows(SimulationConfig())


def test_no_row_is_there_twice_and_each_federated_row_can_be_planned() -> None:
    for model in (None, *MODELS):
        for unit in (None, "user", "interaction", "none"):
            if unit == "interaction" and model is not None and reads_history(model):
                continue
            asked = SimulationConfig(model=model, unit=unit, rounds=2)
            found = rows(asked)
            assert len(set(named(found))) == len(found)
            assert found[:2] == FLOORS
            for row in found:
                if row.kind == "federated":
                    assert federated(row, asked, 50).plan.unit == row.unit


@pytest.mark.parametrize(
    ("recipe", "reads"), [(Recipe(MF, {}), False), (Recipe(partial(Recurrent, kind="gru"), {}), True)]
)
def test_a_row_in_the_models_is_all_that_a_new_model_needs(
    recipe: Recipe, reads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InvalidConfig, match="unknown model 'novel'"):
        SimulationConfig(model="novel")
    monkeypatch.setitem(MODELS, "novel", recipe)
    assert reads_history("novel") is reads
    asked, like = SimulationConfig(model="novel", rounds=2), SimulationConfig(model="gru" if reads else "mf", rounds=2)
    assert rows(asked) == [replace(row, model="novel") if row.model else row for row in rows(like)]
    for row in rows(asked):
        if row.kind == "federated":
            made = federated(row, asked, 50)
            twin = federated(replace(row, model=like.model or ""), like, 50)
            assert made.settings == {**twin.settings, "model": {"name": "novel"}}
            assert registry.build(made.learner, made.settings, Catalogue(ids=("a", "b"))).init(Streams(0))
    if reads:
        with pytest.raises(InvalidConfig, match="take --model mf or mlp or neumf with unit interaction"):
            SimulationConfig(model="novel", unit="interaction")
    else:
        assert SimulationConfig(model="novel", unit="interaction").model == "novel"
        with pytest.raises(InvalidConfig, match="take --model mf or mlp or neumf or novel"):
            SimulationConfig(model="gru", unit="interaction")


# ---------------------------------------------------------------------------------------------------------- plans


@settings(max_examples=200, deadline=None)
@given(
    row=st.sampled_from(PRIVATE),
    epsilon=st.floats(0.05, 30.0),
    delta=st.sampled_from([1e-5, 1e-9]),
    n_users=st.integers(1, 90_000),
    rounds=st.none() | st.integers(1, 60),
    cap=st.none() | st.integers(1, 80),
)
@example(row=OPACUS, epsilon=8.0, delta=1e-5, n_users=610, rounds=None, cap=None)
@example(row=USER_DP, epsilon=1.0, delta=1e-5, n_users=610, rounds=8, cap=3)
@example(row=COOCCURRENCE, epsilon=8.0, delta=1e-5, n_users=2, rounds=None, cap=None)
def test_a_private_row_spends_all_of_the_budget_asked_for_and_never_more(
    row: Row, epsilon: float, delta: float, n_users: int, rounds: int | None, cap: int | None
) -> None:
    if row is COOCCURRENCE:
        asked = SimulationConfig(epsilon=epsilon, delta=delta)
    else:
        asked = SimulationConfig(epsilon=epsilon, delta=delta, rounds=rounds, max_participations=cap)
    plan = federated(row, asked, n_users).plan
    promise = plan.guarantee()
    assert promise is not None
    assert 0.98 * epsilon < promise.epsilon <= epsilon
    assert (promise.delta, promise.unit) == (delta, row.unit)
    less = replace(asked, epsilon=epsilon / 2)
    assert noise(federated(row, less, n_users)) > noise(federated(row, asked, n_users))  # a smaller ε, more noise


def noise(made: Federated) -> float:
    """σ of the device, or of all of the server's sums together."""
    if made.plan.device:
        return made.plan.device.noise_multiplier
    return 1 / math.sqrt(sum(spec.noise_multiplier**-2 for spec in made.plan.sums))


@pytest.mark.parametrize("row", PRIVATE, ids=lambda r: r.name)
def test_without_a_budget_a_private_row_takes_epsilon_8_and_a_delta_far_below_one_over_the_users(row: Row) -> None:
    for n_users, delta in ((2, 1e-5), (610, 1e-5), (9_999, 1e-5), (10_001, 1e-6), (1_000_000, 1e-7)):
        promise = federated(row, SimulationConfig(), n_users).plan.guarantee()
        assert promise is not None
        assert 0.98 * 8 < promise.epsilon <= 8
        assert promise.delta == pytest.approx(delta)
        assert promise.delta <= 0.1 / n_users
    assert epsilon_and_delta(SimulationConfig(delta=1e-7), 10) == (8.0, 1e-7)


def test_coins_are_charged_as_coins_and_need_less_noise_than_none() -> None:
    asked = SimulationConfig(epsilon=2.0, delta=1e-5, rounds=10, cohort=30)
    plain = federated(USER_DP, replace(asked, cohort=None), 600).plan  # everybody in every round
    coins = federated(USER_DP, replace(asked, sampling="poisson"), 600).plan
    promise = coins.guarantee()
    assert promise is not None
    assert 0.98 * 2 < promise.epsilon <= 2
    assert coins.sampling == "poisson"
    assert isinstance(coins.event(1), PoissonGaussian)
    assert isinstance(plain.event(1), Gaussian)
    assert coins.max_participations == plain.max_participations == 10
    assert coins.sums[0].noise_multiplier < plain.sums[0].noise_multiplier


def test_a_noise_multiplier_is_taken_as_it_is() -> None:
    asked = SimulationConfig(noise_multiplier=2.0, rounds=4)
    assert federated(USER_DP, asked, 50).plan.sums[0].noise_multiplier == 2.0
    device = federated(OPACUS, asked, 50).plan.device
    assert device is not None
    assert device.noise_multiplier == 2.0
    both = federated(COOCCURRENCE, asked, 50).plan
    promise = both.guarantee()
    assert promise is not None
    assert promise.epsilon == pytest.approx(gaussian.epsilon_of(1 / 2.0, 1e-5))  # σ of the two sums together


@pytest.mark.parametrize("row", [FEDAVG, EXACT], ids=lambda r: r.name)
def test_without_a_unit_a_plan_has_no_noise_and_no_epsilon(row: Row) -> None:
    made = federated(row, SimulationConfig(unit="none"), 50)
    assert made.plan.unit == "none"
    assert [s.noise_multiplier for s in made.plan.sums] == [0.0] * len(made.plan.sums)
    assert made.plan.device is None
    assert made.plan.guarantee() is None
    assert made.settings.get("noise_stddev", 0.0) == 0.0
    assert noise(federated(replace(row, unit="user"), SimulationConfig(), 50)) > 0


def test_the_sums_of_cooccurrence_share_one_budget_a_fifth_for_the_counts() -> None:
    made = federated(COOCCURRENCE, SimulationConfig(**BUDGET), 610)
    counts, matrix = made.plan.sums
    mu = gaussian.mu_of(3.0, 1e-5)
    assert (counts.name, counts.rounds, matrix.name, matrix.rounds) == ("counts", 1, "matrix", 1)
    assert counts.clip_norm == matrix.clip_norm == 1.0
    assert counts.noise_multiplier**-2 == pytest.approx(0.2 * mu**2)
    assert matrix.noise_multiplier**-2 == pytest.approx(0.8 * mu**2)
    assert made.plan.max_participations == made.plan.rounds == 2
    assert made.settings["noise_stddev"] == matrix.noise_multiplier  # else it shrinks by a wrong edge
    assert made.settings["counts_stddev"] == counts.noise_multiplier
    larger = federated(COOCCURRENCE, SimulationConfig(**BUDGET), 61_000)
    assert [spec.name for spec in larger.plan.sums] == ["counts", "matrix", "transitions"]
    assert sum(spec.noise_multiplier**-2 for spec in larger.plan.sums) == pytest.approx(mu**2)
    assert larger.plan.max_participations == 3
    assert larger.settings["transitions"]["noise_stddev"] == larger.plan.sums[2].noise_multiplier


@settings(max_examples=60, deadline=None)
@given(
    model=st.sampled_from(("mf", "transformer", "cnn-lstm")),
    epsilon=st.floats(0.05, 30.0),
    rounds=st.none() | st.integers(1, 40),
    quantile=st.none() | st.just(0.5),
)
@example(model="mf", epsilon=8.0, rounds=None, quantile=None)
@example(model="mf", epsilon=8.0, rounds=1, quantile=0.5)
def test_a_warm_start_carries_its_charge(
    model: str, epsilon: float, rounds: int | None, quantile: float | None
) -> None:
    asked = SimulationConfig(
        model=model, start="co-occurrence", epsilon=epsilon, delta=1e-5, rounds=rounds, clip_quantile=quantile
    )
    made = federated(replace(USER_DP, model=model), asked, 610)
    plan = made.plan
    counts, matrix, update = plan.sums
    assert (counts.name, matrix.name, update.name) == ("counts", "matrix", "update")
    assert (counts.rounds, matrix.rounds, update.rounds) == (1, 1, rounds or 2)
    # Gaussians of one person add up in μ²: of all sums, not of the updates alone.
    warm = counts.noise_multiplier**-2 + matrix.noise_multiplier**-2
    later = update.rounds * update.charged_multiplier**-2
    promise = plan.guarantee()
    assert promise is not None
    assert promise.epsilon == pytest.approx(gaussian.epsilon_of(math.sqrt(warm + later), 1e-5), rel=1e-6)
    assert 0.98 * epsilon < promise.epsilon <= epsilon
    assert gaussian.epsilon_of(math.sqrt(later), 1e-5) < 0.6 * epsilon  # which is what it would be uncharged
    assert warm == pytest.approx(0.9 * (warm + later))
    assert plan.max_participations == plan.rounds == update.rounds + 2  # everybody is in all of them
    assert plan.cohort == 610
    assert made.settings["cooccurrence"]["noise_stddev"] == matrix.noise_multiplier
    assert registry.build("fedavg", made.settings, Catalogue(ids=("a", "b"))).init(Streams(0)).keys() == {
        "popularity",
        "server/weights",
    }


def test_a_warm_start_without_a_unit_has_no_noise_and_asks_everybody() -> None:
    made = federated(FEDAVG, SimulationConfig(start="co-occurrence", unit="none", rounds=3), 610)
    assert [(s.name, s.noise_multiplier, s.rounds) for s in made.plan.sums] == [
        ("counts", 0.0, 1),
        ("matrix", 0.0, 1),
        ("update", 0.0, 3),
    ]
    assert made.plan.cohort == 610
    assert made.plan.guarantee() is None


def test_what_trains_after_a_private_warm_start_is_little_unless_it_was_said() -> None:
    def made(unit: Row, **given: Any) -> dict[str, Any]:
        model = given.get("model", "mf")
        return dict(federated(replace(unit, model=model), SimulationConfig(**given), 610).settings)

    warm: dict[str, Any] = {"start": "co-occurrence"}
    few = made(USER_DP, **warm)
    assert (few["adapter"], few["freeze"]) == (4, ["bias", "item.down"])
    assert made(USER_DP, **warm, model="transformer")["freeze"] == ["item", "blocks"]
    assert "freeze" not in made(USER_DP, **warm, adapter=2)
    assert made(USER_DP, **warm, freeze=("bias",))["freeze"] == ["bias"]
    for everything in (made(FEDAVG, **warm), made(USER_DP), made(USER_DP, **warm, adapter=0)):
        assert not everything.keys() & {"adapter", "freeze"}


def test_without_privacy_a_transformer_takes_many_small_steps_and_other_models_do_as_ever() -> None:
    def made(model: str, row: Row = FEDAVG, **given: Any) -> Federated:
        return federated(replace(row, model=model), SimulationConfig(**given), 610)

    small = made("transformer", rounds=900)
    assert small.settings["server"] == {"optimizer": "adam", "lr": 0.01, "decay": 0.01}
    assert (small.plan.cohort, small.plan.rounds) == (64, 900)
    assert made("transformer", cohort=80).plan.cohort == 80
    assert federated(replace(FEDAVG, model="transformer"), SimulationConfig(), 50).plan.cohort == 50
    assert made("gru").settings["server"] == {"optimizer": "adam", "lr": 0.03}
    assert made("mf").settings["server"] == {"optimizer": "adam", "lr": 0.05}
    assert made("gru").plan.cohort == made("mf").plan.cohort == 300
    assert made("transformer", USER_DP).settings["server"] == made("mf", USER_DP).settings["server"]


def test_a_clip_follows_what_trains_and_the_step_size_unless_it_was_said() -> None:
    def clip(**given: Any) -> float:
        made = federated(replace(USER_DP, model=given.get("model", "mf")), SimulationConfig(**given), 610)
        return made.plan.sums[-1].clip_norm

    assert clip() == clip(model="gru") == 0.1
    assert clip(start="co-occurrence") == 0.6  # 12.7 · 0.05, to one digit
    assert clip(start="co-occurrence", lr=0.5) == 6.0
    assert clip(model="transformer", freeze=("item",)) == 4.0  # 7.96 · 0.5
    assert clip(start="co-occurrence", clip=0.3) == 0.3


def test_the_head_of_cooccurrence_grows_with_people_and_budget_within_bounds() -> None:
    def head(n_users: int, epsilon: float) -> int:
        made = federated(COOCCURRENCE, SimulationConfig(epsilon=epsilon, delta=1e-9), n_users)
        return int(made.settings["head"])

    assert head(610, 1.0) < head(610, 8.0) < head(6040, 8.0) <= 1600
    assert head(2, 0.1) == 50
    assert head(10_000_000, 8.0) == 1600


def test_all_sums_of_als_share_one_budget_and_sizes_grow_with_people_times_budget() -> None:
    made = federated(ALS, SimulationConfig(**BUDGET), 610)
    counts, matrix, statistics = made.plan.sums
    spent = math.fsum(spec.rounds / spec.noise_multiplier**2 for spec in made.plan.sums)
    assert math.sqrt(spent) == pytest.approx(gaussian.mu_of(3.0, 1e-5))
    assert [spec.clip_norm for spec in made.plan.sums] == [1.0, 1.0, 1.0]
    assert made.plan.max_participations == made.plan.rounds == 2 + statistics.rounds
    assert made.settings["noise_stddev"] == statistics.noise_multiplier
    assert made.settings["start"]["noise_stddev"] == matrix.noise_multiplier
    assert counts.noise_multiplier > matrix.noise_multiplier
    more = federated(ALS, SimulationConfig(**BUDGET), 61_000)
    assert more.plan.sums[2].rounds > statistics.rounds
    assert all(more.settings["start"][size] > made.settings["start"][size] for size in ("head", "dims"))
    exact = federated(replace(ALS, unit="none"), SimulationConfig(), 610)
    assert exact.settings["start"]["noise_stddev"] == exact.settings["noise_stddev"] == 0.0


@pytest.mark.parametrize(
    "row", [FEDAVG, OPACUS, USER_DP, COOCCURRENCE, EXACT, ALS, STRENGTHS], ids=lambda r: f"{r.name} {r.unit}"
)
def test_a_plan_comes_back_from_its_json_and_settings_build_the_learner(row: Row) -> None:
    made = federated(row, SimulationConfig(rounds=None), 50, ("k-core survival",))
    again = PrivacyPlan.from_json(made.plan.to_json())
    assert again == made.plan
    assert again.digest == made.plan.digest
    assert again.uncharged == ("k-core survival", CHOSEN, *UNCHARGED, *((PROFILES,) if again.unit == "user" else ()))
    assert federated(row, SimulationConfig(), 51).plan.digest != made.plan.digest
    plain = json.loads(json.dumps(made.settings))
    learner = registry.build(made.learner, plain, Catalogue(ids=tuple(map(str, range(9)))))
    assert learner.device_noise == made.plan.device


def test_the_cap_is_the_one_asked_for_and_never_past_the_rounds() -> None:
    def cap(row: Row, **given: Any) -> int:
        return federated(row, SimulationConfig(**given), 100).plan.max_participations

    assert cap(USER_DP, rounds=6) == 6
    assert cap(USER_DP, rounds=6, max_participations=2) == 2
    assert cap(USER_DP, rounds=6, max_participations=9) == 6
    assert cap(USER_DP, rounds=6, sampling="poisson") == 6
    assert cap(OPACUS) == 3  # 10 rounds of 24 spread over 100
    assert cap(OPACUS, max_participations=1) == 1
    fewer, more = (
        federated(USER_DP, SimulationConfig(rounds=6, max_participations=k), 100).plan.sums[0].noise_multiplier
        for k in (2, 6)
    )
    assert fewer == pytest.approx(more * math.sqrt(2 / 6), rel=1e-3)  # what a cap is for


@pytest.mark.parametrize("row", [FEDAVG, OPACUS, USER_DP, COOCCURRENCE], ids=lambda r: r.name)
def test_a_cohort_larger_than_the_roster_is_refused_with_one_that_fits(row: Row) -> None:
    asked = SimulationConfig(cohort=41)
    with pytest.raises(InvalidConfig, match=r"cohort 41 is larger than the 40 users: take --cohort 40$"):
        federated(row, asked, 40)
    assert federated(row, asked, 41).plan.n_users == 41


@pytest.mark.parametrize("row", PRIVATE, ids=lambda r: r.name)
def test_a_delta_that_allows_to_publish_somebody_is_refused_with_one_that_does_not(row: Row) -> None:
    asked = SimulationConfig(epsilon=3.0, delta=0.01)
    with pytest.raises(InvalidConfig, match=r"delta 0.01 is not below 1/100: take --delta 1e-05$"):
        federated(row, asked, 100)
    assert federated(row, asked, 99).plan.delta == 0.01
    federated(FEDAVG, asked, 100)  # promises nothing


def test_settings_come_back_from_a_file() -> None:
    asked = SimulationConfig(
        rating_scale=(1.0, 5.0), model="mf", epsilon=3.0, delta=1e-5, lr=0.1, skip_bad_rows=True, freeze=("item",)
    )
    assert config.decode(SimulationConfig, json.loads(json.dumps(config.encode(asked)))) == asked
    with pytest.raises(InvalidConfig, match=r"unknown key 'epslion'; did you mean 'epsilon'"):
        config.decode(SimulationConfig, {"epslion": 3.0})
    with pytest.raises(InvalidConfig, match="SimulationConfig"):
        config.decode(SimulationConfig, {"epsilon": "much"})


# ----------------------------------------------------------------------------------- noise scaled for other people


AS_IF = SimulationConfig(unit="user", as_if_users=6040, **BUDGET)
HERE = replace(AS_IF, as_if_users=None)


@pytest.mark.parametrize("row", [COOCCURRENCE, USER_DP, replace(USER_DP, model="gru")], ids=lambda row: row.model)
def test_noise_as_for_other_people_is_theirs_over_how_many_more_they_are_and_epsilon_is_what_that_costs_here(
    row: Row,
) -> None:
    scaled = federated(row, AS_IF, 943)
    assert noise(scaled) * 6040 / 943 == pytest.approx(noise(federated(row, HERE, 943)), rel=1e-6)
    promise = scaled.plan.guarantee()
    assert promise is not None
    mu = gaussian.mu_of(3.0, 1e-5) * 6040 / 943
    assert promise.epsilon == pytest.approx(gaussian.epsilon_of(mu, 1e-5), rel=1e-6)
    assert promise.epsilon > 25  # these 943 people have nothing like ε = 3, and are told so


def test_a_head_as_for_other_people_is_as_long_as_theirs() -> None:
    many = federated(COOCCURRENCE, replace(HERE, delta=1e-5), 6040).settings
    assert federated(COOCCURRENCE, AS_IF, 943).settings["head"] == many["head"]


def test_what_is_imitated_is_said_before_the_whole_guarantee_of_the_people_in_the_data() -> None:
    scaled, promise = as_if(AS_IF, 943), federated(COOCCURRENCE, AS_IF, 943).plan.guarantee()
    assert scaled == AsIf(users=6040, epsilon=3.0, delta=1e-5)
    assert scaled is not None
    words = scaled.note(943, promise)
    assert words.startswith("noise as for 6,040 people at ε = 3: a research figure; for these 943 people ε = 2")
    assert words.endswith(str(promise))
    assert as_if(HERE, 943) is None


def test_a_delta_that_the_imitated_people_could_not_have_is_refused() -> None:
    with pytest.raises(InvalidConfig, match="not below 1/200000: take --delta 1e-07"):
        federated(COOCCURRENCE, replace(AS_IF, as_if_users=200_000), 943)


# ------------------------------------------------------------------------------------------ settings of a learner


def test_given_settings_lie_over_the_rows_own_and_reach_the_plan_that_binds_a_device() -> None:
    given = SimulationConfig(learner="fedavg", unit="interaction", settings={"local": {"lr": 0.125}}, **BUDGET)
    made, plain = federated(OPACUS, given, 100), federated(OPACUS, replace(given, settings=None), 100)
    assert made.settings["local"]["lr"] == 0.125
    assert made.settings["local"]["epochs"] == plain.settings["local"]["epochs"]
    assert made.settings["device"] == plain.settings["device"]
    assert made.plan.task == task_digest("fedavg", made.settings) != plain.plan.task


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"windw": 3}, "did you mean 'window'?"),
        ({"window": 0}, "window and dims ≥ 1"),
        ({"taste": 3}, "'taste' must be a table"),
        ({"taste": {"decay": 2.0}}, "decay must be in"),
    ],
)
def test_a_setting_that_the_learner_lacks_or_refuses_is_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        federated(COOCCURRENCE, SimulationConfig(learner="cooccurrence", settings=given), 100)
    assert words in str(caught.value)


def test_how_settings_were_chosen_stands_beside_every_epsilon_and_so_does_not_knowing_it() -> None:
    def uncharged(**given: Any) -> tuple[str, ...]:
        return federated(COOCCURRENCE, SimulationConfig(learner="cooccurrence", **given), 100).plan.uncharged

    assert BY_HAND in uncharged(settings={"window": 5})
    tuned = "settings were tuned on somebody"
    assert tuned in uncharged(settings={"window": 5}, tuned=tuned)
    assert BY_HAND not in uncharged(settings={"window": 5}, tuned=tuned)
    assert tuned in uncharged(tuned=tuned)
    assert not {tuned, BY_HAND} & set(uncharged())
    assert CHOSEN in uncharged()
    for chosen in ({"settings": {"window": 5}}, {"counts_share": 0.3}, {"tuned": tuned}):
        assert CHOSEN not in uncharged(**chosen)
        assert f"other {CHOSEN}" in uncharged(**chosen)
    assert BY_HAND in uncharged(counts_share=0.3)


@pytest.mark.parametrize(
    ("learner", "settings", "path"),
    [
        ("cooccurrence", {"counts_stddev": 0.0}, "counts_stddev"),
        ("cooccurrence", {"transitions": {"noise_stddev": 0.0}}, "transitions.noise_stddev"),
        ("als", {"start": {"noise_stddev": 0.0}}, "start.noise_stddev"),
        ("strengths", {"outcomes_stddev": 0.0}, "outcomes_stddev"),
        ("fedavg", {"start": "co-occurrence"}, "start"),
        ("fedavg", {"device": {"clip_norm": 1.0}}, "device"),
    ],
)
def test_a_setting_that_the_plan_decides_is_refused_however_deep(
    learner: str, settings: dict[str, Any], path: str
) -> None:
    with pytest.raises(InvalidConfig, match=f"settings.{path} follows from the privacy plan"):
        SimulationConfig(learner=learner, settings=settings)


def test_settings_of_a_sum_that_the_plan_has_not_are_refused() -> None:
    given = SimulationConfig(learner="cooccurrence", settings={"transitions": {"window": 2}}, **BUDGET)
    with pytest.raises(InvalidConfig, match=r"settings\.transitions is of a sum"):
        federated(COOCCURRENCE, given, 60)
    made = federated(COOCCURRENCE, given, 61_000)
    assert made.settings["transitions"]["window"] == 2
    assert made.settings["transitions"]["noise_stddev"] == made.plan.sums[2].noise_multiplier


def test_the_counts_share_divides_the_budget_and_leaves_epsilon_as_it_was() -> None:
    given = SimulationConfig(learner="cooccurrence", counts_share=0.4, **BUDGET)
    counts, matrix = federated(COOCCURRENCE, given, 100).plan.sums
    assert (matrix.noise_multiplier / counts.noise_multiplier) ** 2 == pytest.approx(0.4 / 0.6)
    promise = federated(COOCCURRENCE, given, 100).plan.guarantee()
    assert promise is not None
    assert 2.99 < promise.epsilon <= 3.0
