"""Plans solved for what is missing: what is asked is kept, nothing is given away, and bad mixes are refused."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from penchant.common.errors import InvalidConfig, PrivacyRefused
from penchant.common.privacy import accounting, gaussian, planning
from penchant.common.privacy.accounting import epsilon
from penchant.common.privacy.plan import PrivacyPlan, expected_cohort
from penchant.common.privacy.planning import NoiseToSignal, Solved, advice, noise_to_signal, solve

MOVIES: dict[str, Any] = {"users": 6040, "delta": 1e-5, "cohort": 100, "rounds": 100}
DEVICE: dict[str, Any] = {"users": 5000, "delta": 1e-5, "unit": "interaction", "steps": 10, "cohort": 50, "rounds": 20}

# --------------------------------------------------------------------------------------------------------- golden


@pytest.mark.parametrize(
    ("change", "expected", "accountant"),
    [  # dp-accounting 0.6.0: PLDAccountant, and for 91.82 the closed form as well
        ({}, 1.187, "PLD"),
        ({"sampling": "none", "max_participations": 100}, 91.82, "GDP"),
        ({"sampling": "none"}, 91.82, "GDP"),
    ],
)
def test_golden_plans_cost_what_dp_accounting_says(change: dict[str, Any], expected: float, accountant: str) -> None:
    solved = solve(**MOVIES, noise_multiplier=1.0, **change)
    assert solved.solved_for == "epsilon"
    assert solved.guarantee.epsilon == pytest.approx(expected, rel=5e-4)
    assert solved.guarantee.accountant == accountant
    assert solve(**MOVIES, noise_multiplier=1.01, **change).guarantee.epsilon != pytest.approx(expected, rel=5e-3)


# ------------------------------------------------------------------------------------------------ what was asked


def cost(solved: Solved, **change: Any) -> float:
    """ε of the solved plan with σ or rounds changed, straight from its events."""
    plan, sigma = solved.plan, change.get("sigma", solved.noise_multiplier)
    if plan.device:
        plan = replace(plan, device=replace(plan.device, noise_multiplier=sigma))
    else:
        plan = replace(plan, sums=(replace(plan.sums[0], noise_multiplier=sigma),))
    if "rounds" in change:
        rounds = change["rounds"]
        plan = replace(plan, sums=(replace(plan.sums[0], rounds=rounds),), max_participations=rounds)
    return epsilon(plan.events(), plan.delta).epsilon


@settings(max_examples=60)
@given(
    target=st.floats(1e-3, 1e3),
    rounds=st.integers(1, 300),
    users=st.integers(1, 10**6),
    share=st.floats(1e-3, 1.0),
    unit=st.sampled_from(["user", "interaction"]),
)
@example(target=1.0, rounds=1, users=1, share=1.0, unit="user")
def test_calibration_never_returns_less_privacy_than_asked_and_hardly_more(
    target: float, rounds: int, users: int, share: float, unit: Any
) -> None:
    cap = max(1, int(share * rounds))
    solved = solve(
        users=users,
        delta=0.1 / users,
        rounds=rounds,
        epsilon=target,
        unit=unit,
        max_participations=cap,
        sampling="none",
    )
    assert solved.solved_for == "noise_multiplier"
    assert solved.guarantee.epsilon == cost(solved) <= target
    assert cost(solved, sigma=solved.noise_multiplier * 0.999) > target


@pytest.mark.parametrize(
    "asked",
    [
        {"users": 50_000, "delta": 1e-6, "rounds": 200, "cohort": 1000, "epsilon": 3.0},
        {"users": 1000, "delta": 1e-5, "rounds": 30, "cohort": 100, "epsilon": 0.3},
        {**DEVICE, "rate": 0.1, "max_participations": 4, "epsilon": 2.0},
    ],
)
def test_calibration_of_sampled_plans_never_returns_less_privacy_than_asked_and_hardly_more(
    asked: dict[str, Any],
) -> None:
    solved = solve(**asked)
    assert solved.guarantee.accountant == "PLD"
    assert solved.guarantee.epsilon == cost(solved) <= asked["epsilon"]
    assert cost(solved, sigma=solved.noise_multiplier * 0.999) > asked["epsilon"]


@settings(max_examples=40)
@given(target=st.floats(1e-2, 20), sigma=st.floats(1.0, 20), unit=st.sampled_from(["user", "interaction"]))
def test_rounds_solved_for_are_the_most_that_keep_epsilon(target: float, sigma: float, unit: Any) -> None:
    asked = {"users": 1000, "delta": 1e-5, "epsilon": target, "noise_multiplier": sigma, "unit": unit}
    if gaussian.epsilon_of(1 / sigma, 1e-5) > target:
        with pytest.raises(InvalidConfig, match="one round costs more"):
            solve(**asked)
        return
    solved = solve(**asked)
    assert solved.solved_for == "rounds"
    assert solved.guarantee.epsilon == cost(solved) <= target < cost(solved, rounds=solved.plan.rounds + 1)


def test_rounds_of_a_sampled_plan_are_the_most_that_keep_epsilon() -> None:
    solved = solve(users=50_000, delta=1e-6, epsilon=3.0, noise_multiplier=1.1, cohort=1000)
    assert cost(solved) <= 3.0 < cost(solved, rounds=solved.plan.rounds + 1)


def test_a_sigma_that_is_solved_for_is_short_enough_to_be_copied_and_still_keeps_epsilon() -> None:
    solved = solve(users=1000, delta=1e-5, rounds=7, epsilon=2.0)
    assert float(f"{solved.noise_multiplier:.5g}") == solved.noise_multiplier
    again = solve(users=1000, delta=1e-5, rounds=7, noise_multiplier=float(f"{solved.noise_multiplier:.5g}"))
    assert again.guarantee.epsilon == solved.guarantee.epsilon <= 2.0


def test_a_plan_that_does_not_keep_its_epsilon_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounting, "calibrate", lambda *_: 0.5)
    with pytest.raises(PrivacyRefused, match="does not keep"):
        solve(users=1000, delta=1e-5, rounds=7, epsilon=2.0)


# ------------------------------------------------------------------------------------------------ what is charged


def test_without_sampling_a_profile_is_charged_for_its_cap_and_for_every_round_without_one() -> None:
    capped = solve(users=1000, delta=1e-5, rounds=40, noise_multiplier=5.0, max_participations=10)
    assert capped.guarantee.epsilon == pytest.approx(gaussian.epsilon_of(math.sqrt(10) / 5, 1e-5), rel=1e-9)
    assert capped.plan.cohort == expected_cohort(1000, 10, 40) == 250
    free = solve(users=1000, delta=1e-5, rounds=40, noise_multiplier=5.0)
    assert free.plan.max_participations == 40
    assert free.guarantee.epsilon == pytest.approx(gaussian.epsilon_of(math.sqrt(40) / 5, 1e-5), rel=1e-9)


def test_what_is_left_open_is_chosen_and_said() -> None:
    base: dict[str, Any] = {"users": 1000, "delta": 1e-5, "rounds": 10, "noise_multiplier": 5.0}
    everybody = solve(**base)
    assert (everybody.plan.sampling, everybody.plan.cohort) == ("none", 1000)
    assert everybody.assumed == ("sampling none", "a cohort of 1,000", "up to one participation in every round")
    some = solve(**base, cohort=100)
    assert (some.plan.sampling, some.plan.rate) == ("poisson", 0.1)
    assert "sampling poisson" in some.assumed
    assert solve(**base, cohort=100, max_participations=10).plan.sampling == "none"
    assert solve(**base, cohort=100, open_fleet=True).plan.sampling == "none"  # no frozen roster to toss coins for
    told = solve(**base, cohort=100, sampling="none", max_participations=10)
    assert told.assumed == ()


def test_in_an_open_fleet_only_every_round_can_be_claimed() -> None:
    solved = solve(users=1000, delta=1e-5, rounds=10, noise_multiplier=5.0, open_fleet=True)
    assert solved.plan.enforced_by == "nothing"
    assert solved.plan.max_participations == 10
    with pytest.raises(InvalidConfig, match="nothing enforces a cap of 3"):
        solve(users=1000, delta=1e-5, rounds=10, noise_multiplier=5.0, open_fleet=True, max_participations=3)


def test_unit_interaction_charges_the_steps_of_every_participation_to_the_device() -> None:
    solved = solve(**DEVICE, noise_multiplier=4.0, max_participations=3)
    assert solved.guarantee.epsilon == pytest.approx(gaussian.epsilon_of(math.sqrt(3 * 10) / 4, 1e-5), rel=1e-9)
    assert solved.guarantee.trust == "own device"
    assert math.isinf(solved.plan.sums[0].clip_norm)
    assert solve(**DEVICE, noise_multiplier=4.0, rate=0.2).opinions.keys() >= {"PLD", "RDP", "PRV (Opacus)"}


# --------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"epsilon": 1.0}, "two of"),
        ({"noise_multiplier": None}, "two of"),
        ({"rounds": None}, "two of"),
        ({"rounds": None, "epsilon": 1.0, "max_participations": 5}, "cap cost nothing"),
        ({"rounds": None, "epsilon": 10.0, "noise_multiplier": 1e9}, "less noise"),
        ({"rounds": None, "epsilon": 1e-3}, "more noise"),
        ({"rounds": 0}, "rounds"),
        ({"delta": 1 / 1000}, "delta"),
        ({"delta": math.nan}, "delta"),
        ({"noise_multiplier": 0.0}, "noise_multiplier"),
        ({"noise_multiplier": math.nan}, "noise_multiplier"),
        ({"noise_multiplier": None, "epsilon": -1.0}, "epsilon"),
        ({"cohort": 0}, "cohort"),
        ({"cohort": 1001}, "cohort"),
        ({"cohort": 600, "max_participations": 5}, "raise max_participations"),
        ({"max_participations": 11}, "max_participations"),
        ({"sampling": "poisson", "max_participations": 5}, "cap"),
        ({"clip": 0.0}, "clip"),
        ({"clip": math.inf}, "clip"),
        ({"rate": 0.5}, "unit interaction"),
        ({"steps": 5}, "unit interaction"),
        ({"unit": "interaction", "rate": 1.5}, "rate"),
        ({"size": 0}, "size"),
    ],
)
def test_what_does_not_go_together_is_refused(change: dict[str, Any], words: str) -> None:
    asked: dict[str, Any] = {"users": 1000, "delta": 1e-5, "rounds": 10, "noise_multiplier": 5.0}
    assert solve(**asked)
    with pytest.raises(InvalidConfig, match=words):
        solve(**{**asked, **change})


# --------------------------------------------------------------------------------------------------- noise-to-signal


def test_noise_to_signal_is_what_noise_and_agreeing_contributions_measure() -> None:
    # 4,000 rounds of 60 numbers: mean length of the noise strays by 0.5 % for fewer than 1 seed in 1e9 (its stddev
    # is 0.09 % of it).
    solved = solve(users=1000, delta=1e-5, rounds=25, noise_multiplier=3.0, cohort=200, sampling="none", size=60)
    clip, random = 0.7, np.random.default_rng(0)
    noise = 3.0 * clip * random.standard_normal((4000, 60))
    direction = np.ones(60) / math.sqrt(60)
    signal = np.linalg.norm(200 * clip * direction)
    length = math.sqrt((noise**2).sum(axis=1).mean())
    expected = solved.noise_to_signal
    assert length / signal == pytest.approx(expected.vector, rel=5e-3)
    assert (noise @ direction).std() / signal == pytest.approx(expected.per_round, rel=0.08)
    assert expected.over_rounds == pytest.approx(expected.per_round / 5)
    assert expected.vector != pytest.approx(noise_to_signal(solved.plan, 59).vector, rel=5e-3)


def test_noise_to_signal_of_devices_adds_the_noise_of_every_step_of_every_device() -> None:
    expected = solve(**DEVICE, noise_multiplier=4.0).noise_to_signal
    assert expected.per_round == pytest.approx(math.sqrt(50 * 10) * 4.0 / (50 * 10))


@pytest.mark.parametrize(
    "asked",
    [
        {"cohort": 50, "epsilon": 2.0},  # coins: a larger share needs more noise, and is still better
        {"cohort": 50, "epsilon": 2.0, "sampling": "none"},
        {"max_participations": 4, "epsilon": 2.0},
        {"epsilon": 2.0},
        {"epsilon": 2.0, "unit": "interaction", "cohort": 100},
        {"epsilon": 2.0, "unit": "interaction"},
    ],
)
def test_advice_is_true(asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    solved = solve(users=1000, delta=1e-5, rounds=20, **asked)
    tried: list[PrivacyPlan] = []

    def seen(plan: PrivacyPlan) -> NoiseToSignal:
        tried.append(plan)
        return noise_to_signal(plan)

    monkeypatch.setattr(planning, "noise_to_signal", seen)
    assert "instead of" in advice(solved)
    (better,) = tried
    assert epsilon(better.events(), 1e-5).epsilon <= solved.guarantee.epsilon * (1 + 1e-9)
    assert noise_to_signal(better).per_round < solved.noise_to_signal.per_round


def test_no_advice_is_given_where_none_is_known() -> None:
    assert advice(solve(users=1000, delta=1e-5, rounds=1, epsilon=2.0)) == ""
    assert advice(solve(users=1000, delta=1e-5, rounds=4, epsilon=2.0, unit="interaction", rate=0.5)) == ""
