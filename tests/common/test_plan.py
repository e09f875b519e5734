"""The plan: a mix that does not belong together cannot be built, and what it charges is what it does."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penchant.common.errors import InvalidConfig, PrivacyRefused, UnknownMechanism
from penchant.common.privacy import gaussian
from penchant.common.privacy.events import Gaussian, PoissonGaussian
from penchant.common.privacy.plan import MAX_USERS, DeviceNoise, PrivacyPlan, QuantileClip, SumSpec

DEVICE = DeviceNoise(clip_norm=0.5, noise_multiplier=2.0, rate=0.1, steps=8, divisor=16.0, min_history=5)
UPDATE = SumSpec(name="update", rounds=10, clip_norm=0.5, noise_multiplier=3.0)
EXACT = SumSpec(name="update", rounds=10, clip_norm=math.inf)

USER = PrivacyPlan(
    unit="user", n_users=1000, delta=1e-5, sampling="none", cohort=100, sums=(UPDATE,), max_participations=4
)
POISSON = replace(USER, sampling="poisson", max_participations=10)
INTERACTION = replace(USER, unit="interaction", sums=(EXACT,), device=DEVICE)
NOTHING = replace(USER, unit="none", sums=(EXACT,))
PLANS = [USER, POISSON, INTERACTION, NOTHING]

# ------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("plan", "change", "names"),
    [
        (USER, {"sums": (EXACT,)}, "noise"),  # unit user without noise
        (USER, {"sums": (UPDATE, EXACT)}, "noise"),
        (USER, {"sums": (replace(UPDATE, clip_norm=math.inf),)}, "clip_norm"),
        (USER, {"device": DEVICE}, "device"),
        (USER, {"unit": "interaction"}, "noise"),
        (USER, {"unit": "none"}, "noise"),  # noise for which nothing is charged
        (INTERACTION, {"device": None}, "device"),
        (INTERACTION, {"unit": "none"}, "device"),
        (INTERACTION, {"unit": "user"}, "noise"),
        (INTERACTION, {"sums": (UPDATE,)}, "noise"),
        (NOTHING, {"device": DEVICE}, "device"),
        (POISSON, {"max_participations": 9}, "cap"),
        (USER, {"cohort": 1001}, "cohort"),
        (USER, {"cohort": 0}, "cohort"),
        (USER, {"cohort": 99.5}, "cohort"),
        (USER, {"n_users": 0}, "n_users"),
        (USER, {"max_participations": 0}, "max_participations"),
        (USER, {"max_participations": 11}, "max_participations"),
        (USER, {"max_participations": math.nan}, "max_participations"),
        (USER, {"sums": ()}, "max_participations"),
        (USER, {"delta": 1 / 1000}, "delta"),  # one over the users: δ this large allows to publish somebody
        (INTERACTION, {"delta": 0.5}, "delta"),
        (USER, {"delta": 0.0}, "delta"),
        (USER, {"delta": math.nan}, "delta"),
    ],
)
def test_a_mix_that_does_not_belong_together_cannot_be_built(
    plan: PrivacyPlan, change: dict[str, Any], names: str
) -> None:
    assert replace(plan) == plan
    with pytest.raises(InvalidConfig, match=names):
        replace(plan, **change)


@pytest.mark.parametrize(
    "change", [{"unit": "device"}, {"unit": "User"}, {"sampling": "shuffle"}, {"sampling": ""}, {"schema_version": 2}]
)
def test_an_unknown_unit_sampler_or_version_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(UnknownMechanism):
        replace(USER, **change)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rounds", 0),
        ("rounds", 1.5),
        ("clip_norm", 0.0),
        ("clip_norm", -1.0),
        ("clip_norm", math.nan),
        ("noise_multiplier", -1.0),
        ("noise_multiplier", math.nan),
        ("noise_multiplier", math.inf),
    ],
)
def test_a_sum_out_of_range_is_refused(field: str, value: float) -> None:
    with pytest.raises(InvalidConfig, match=field):
        replace(UPDATE, **{field: value})  # type: ignore[arg-type]  # what is refused


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("field", ["clip_norm", "noise_multiplier", "divisor", "rate", "steps", "min_history"])
def test_noise_on_the_device_out_of_range_is_refused(field: str, value: float) -> None:
    with pytest.raises(InvalidConfig, match=field):
        replace(DEVICE, **{field: value})  # type: ignore[arg-type]  # what is refused


# --------------------------------------------------------------------------------------------------------- rounds


def test_rounds_ask_for_the_sums_one_after_another_and_no_others_exist() -> None:
    counts = SumSpec(name="counts", rounds=2, clip_norm=1.0, noise_multiplier=5.0)
    plan = replace(USER, sums=(counts, replace(UPDATE, rounds=3)), max_participations=5)
    assert [plan.spec(r).name for r in range(1, 6)] == ["counts"] * 2 + ["update"] * 3
    for number in (0, -1, 6):
        with pytest.raises(InvalidConfig, match="rounds 1 to 5"):
            plan.spec(number)
        with pytest.raises(InvalidConfig):
            plan.event(number)
        with pytest.raises(InvalidConfig):  # also where nothing would be charged
            replace(NOTHING, sums=(replace(EXACT, rounds=5),)).event(number)


def test_the_divisor_is_the_planned_cohort_whoever_comes() -> None:
    assert USER.divisor == 100.0
    assert replace(USER, cohort=1).divisor == 1.0
    assert POISSON.rate == 0.1


# -------------------------------------------------------------------------------------------------------- charges


def test_each_kind_of_plan_is_charged_as_what_it_does() -> None:
    assert USER.event(1) == Gaussian(noise_multiplier=3.0)
    assert POISSON.event(1) == PoissonGaussian(noise_multiplier=3.0, rate=0.1)
    assert replace(POISSON, cohort=1000).event(1) == Gaussian(noise_multiplier=3.0)  # everybody: no amplification
    assert INTERACTION.event(1) is None
    assert INTERACTION.device_event() == PoissonGaussian(noise_multiplier=2.0, rate=0.1, count=8)
    assert NOTHING.event(1) is NOTHING.device_event() is USER.device_event() is None
    assert NOTHING.events() == ()
    assert NOTHING.guarantee() is None


@given(done=st.integers(0, 10), cap=st.integers(1, 10))
def test_without_amplification_a_profile_is_charged_for_as_many_sums_as_it_may_be_in(done: int, cap: int) -> None:
    events = replace(USER, max_participations=cap).events(done)
    assert sum(event.count for event in events) == min(cap, done)
    device = replace(INTERACTION, max_participations=cap).events(done)
    assert sum(event.count for event in device) == 8 * min(cap, done)
    sampled = POISSON.events(done)
    assert sum(event.count for event in sampled) == done


def test_a_capped_profile_is_charged_for_the_least_noisy_sums_it_could_have_been_in() -> None:
    noisy, quiet = replace(UPDATE, rounds=3, noise_multiplier=9.0), replace(UPDATE, rounds=2, noise_multiplier=2.0)
    plan = replace(USER, sums=(noisy, quiet), max_participations=3)
    assert plan.events() == (Gaussian(noise_multiplier=2.0, count=2), Gaussian(noise_multiplier=9.0))
    assert plan.events(3) == (Gaussian(noise_multiplier=9.0, count=3),)  # the quiet ones are not released yet
    assert plan.events(4) == (Gaussian(noise_multiplier=2.0), Gaussian(noise_multiplier=9.0, count=2))


@given(a=st.floats(0.3, 30), b=st.floats(0.3, 30))
def test_two_sums_of_different_noise_compose_as_the_root_of_added_squares(a: float, b: float) -> None:
    sums = tuple(
        SumSpec(name=n, rounds=1, clip_norm=1.0, noise_multiplier=z) for n, z in (("counts", a), ("matrix", b))
    )
    guarantee = replace(USER, sums=sums, max_participations=2).guarantee()
    assert guarantee is not None
    mu = math.sqrt(1 / a**2 + 1 / b**2)
    assert guarantee.epsilon == pytest.approx(gaussian.epsilon_of(mu, 1e-5), rel=1e-6)
    assert guarantee.epsilon != pytest.approx(gaussian.epsilon_of(1 / a + 1 / b, 1e-5), rel=1e-3)


def test_golden_plans_cost_what_dp_accounting_says() -> None:
    # dp-accounting 0.6.0, δ = 1e-5, z = 1, 100 rounds: 91.82 without amplification, 1.187 for coins of 100 in 6,040.
    spec = SumSpec(name="update", rounds=100, clip_norm=1.0, noise_multiplier=1.0)
    plan = replace(USER, n_users=6040, sums=(spec,), max_participations=100)
    assert (plain := plan.guarantee()) is not None
    assert plain.epsilon == pytest.approx(91.82, rel=5e-4)
    assert (sampled := replace(plan, sampling="poisson").guarantee()) is not None
    assert sampled.epsilon == pytest.approx(1.187, rel=5e-4)
    assert (plain.accountant, sampled.accountant) == ("GDP", "PLD")
    assert (capped := replace(plan, max_participations=25).guarantee()) is not None
    assert capped.epsilon == pytest.approx(gaussian.epsilon_of(5.0, 1e-5), rel=1e-6)


def test_the_cost_grows_with_every_round_and_a_replaced_profile_costs_more_than_a_removed_one() -> None:
    costs = [0.0 if (g := POISSON.guarantee(done)) is None else g.epsilon for done in (0, 1, 4, 10)]
    assert costs[0] == 0.0
    assert all(a < b for a, b in itertools.pairwise(costs))
    assert (replaced := POISSON.guarantee(neighbours="replace")) is not None
    assert replaced.epsilon > costs[-1]


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (USER, ["unit user", "add/remove one profile", "none (at most 4 of 10", "GDP", "trust server"]),
        (POISSON, ["poisson over users, rate 0.1", "do not see the draw", "PLD", "trust server"]),
        (INTERACTION, ["unit interaction", "one interaction", "own interactions", "PLD", "trust own device"]),
    ],
)
def test_an_epsilon_is_never_printed_without_what_it_means(plan: PrivacyPlan, words: list[str]) -> None:
    text = str(replace(plan, uncharged=("the head was chosen by hand",)).guarantee())
    for word in ["ε = ", "δ = 1e-05", "not charged: the head was chosen by hand", *words]:
        assert word in text
    assert "not charged: nothing" in str(plan.guarantee())


# ----------------------------------------------------------------------------------------------------------- JSON


@pytest.mark.parametrize("plan", PLANS)
def test_a_plan_comes_back_from_its_json_with_the_same_digest(plan: PrivacyPlan) -> None:
    plan = replace(plan, uncharged=("k-core", "σ chosen by hand"))
    again = PrivacyPlan.from_json(plan.to_json())
    assert again == plan
    assert again.digest == plan.digest
    assert again.to_json() == plan.to_json()


FOLLOWING = QuantileClip(quantile=0.5, noise_multiplier=10.0)


def test_a_plan_with_a_quantile_clip_is_charged_for_its_count_too_and_comes_back_from_json() -> None:
    plan = replace(USER, sums=(replace(UPDATE, quantile=FOLLOWING, row_norm=0.1),))
    both = 1 / math.hypot(1 / UPDATE.noise_multiplier, 1 / FOLLOWING.noise_multiplier)
    assert plan.event(1) == Gaussian(noise_multiplier=both)
    assert both < UPDATE.noise_multiplier
    assert plan.guarantee(1).epsilon > USER.guarantee(1).epsilon  # type: ignore[union-attr]  # both promise something
    assert PrivacyPlan.from_json(plan.to_json()) == plan
    sampled = replace(plan, sampling="poisson", max_participations=plan.rounds)
    assert sampled.event(1) == PoissonGaussian(noise_multiplier=both, rate=0.1)  # one draw of people, one event


@pytest.mark.parametrize("field", ["quantile", "noise_multiplier", "step", "lowest", "highest"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_a_quantile_clip_out_of_range_is_refused(field: str, value: float) -> None:
    with pytest.raises(InvalidConfig, match=field):
        replace(FOLLOWING, **{field: value})


def test_a_bound_that_the_plan_does_not_allow_is_refused_wherever_it_comes_from() -> None:
    spec = replace(UPDATE, quantile=FOLLOWING)
    assert spec.bound({}) == spec.clip_norm
    assert spec.bound({"clip/update": np.array(0.3)}) == 0.3
    assert UPDATE.bound({"clip/update": np.array(0.3)}) == UPDATE.clip_norm  # nothing follows without a quantile
    for bad in (0.0, 1e9, math.nan, -1.0):
        with pytest.raises(PrivacyRefused, match="outside"):
            spec.bound({"clip/update": np.array(bad)})
    with pytest.raises(InvalidConfig, match="unit user"):
        replace(EXACT, quantile=FOLLOWING)
    with pytest.raises(InvalidConfig, match="lowest"):
        replace(UPDATE, quantile=replace(FOLLOWING, lowest=1.0))


def test_a_cap_that_nothing_enforces_is_refused() -> None:
    open_fleet = replace(USER, enforced_by="nothing", max_participations=USER.rounds)
    assert sum(e.count for e in open_fleet.events()) == USER.rounds
    with pytest.raises(InvalidConfig, match="nothing enforces a cap of 4"):
        replace(USER, enforced_by="nothing")
    with pytest.raises(UnknownMechanism):
        replace(USER, enforced_by="hope")  # type: ignore[arg-type]  # what is refused


def test_a_cohort_that_the_cap_cannot_fill_and_a_roster_too_large_for_exact_sums_are_refused() -> None:
    with pytest.raises(InvalidConfig, match="raise max_participations"):
        replace(USER, cohort=USER.n_users)
    assert replace(USER, cohort=50).cohort == 50
    with pytest.raises(InvalidConfig, match="populations"):
        replace(USER, n_users=MAX_USERS + 1, delta=1e-9)


def test_the_digest_changes_with_any_field() -> None:
    changes: dict[str, Any] = {
        "unit": "none",
        "n_users": 1001,
        "delta": 1e-6,
        "sampling": "poisson",
        "cohort": 101,
        "sums": (replace(EXACT, rounds=11),),
        "max_participations": 5,
        "population": "others",
        "enforced_by": "nothing",
        "schedule": 7,
        "task": "f" * 64,
        "uncharged": ("something",),
        "device": replace(DEVICE, min_history=6),
    }
    assert {*changes, "schema_version"} == {f.name for f in fields(PrivacyPlan)}
    base = replace(NOTHING, max_participations=10)
    others = [replace(base, **{name: v}) for name, v in changes.items() if name not in ("unit", "device")]
    others += [INTERACTION, replace(INTERACTION, device=changes["device"]), USER]
    for spec in fields(SumSpec):
        value: Any = {
            "name": "other",
            "rounds": 12,
            "clip_norm": 0.6,
            "noise_multiplier": 3.1,
            "row_norm": 0.1,
            "quantile": FOLLOWING,
        }[spec.name]
        others.append(replace(USER, sums=(replace(UPDATE, **{spec.name: value}),)))
    for part in fields(QuantileClip):
        other: Any = 1.1 * getattr(FOLLOWING, part.name)
        changed = replace(FOLLOWING, **{part.name: other})
        others.append(replace(USER, sums=(replace(UPDATE, quantile=changed),)))
    for part in fields(DeviceNoise):
        bigger: Any = 2 * getattr(DEVICE, part.name)
        others.append(replace(INTERACTION, device=replace(DEVICE, **{part.name: bigger})))
    digests = [plan.digest for plan in (base, *others)]
    assert len(set(digests)) == len(digests)


VERSION_1 = (
    '{"cohort":100,"delta":1e-05,"device":null,"max_participations":4,"n_users":1000,"population":"default",'
    '"sampling":"none","schema_version":1,"sums":[{"clip_norm":0.5,"name":"update","noise_multiplier":3.0,'
    '"rounds":10}],"uncharged":[],"unit":"user"}'
)


def test_a_plan_of_version_1_is_read_for_ever() -> None:
    assert PrivacyPlan.from_json(VERSION_1) == USER


def test_the_canonical_form_is_what_other_implementations_hash() -> None:
    assert USER.to_json() == VERSION_1
    assert USER.digest == "81e69f933cd1f6e04de5dc836ffb5363fdf0c1ee4eeb01034f67f44208dc979b"  # sha256sum of the text


@pytest.mark.parametrize(
    "change",
    [
        {"secure_aggregation": True},  # a field that a later version might add
        {"sums": [{"name": "update", "rounds": 1, "clip_norm": 1.0, "noise_multiplier": 1.0, "weight": 2.0}]},
        {"sums": [{"name": "update"}]},
        {"sums": None},
        {"device": {"clip_norm": 1.0}},
        {"schema_version": 2},
        {"sampling": "shuffle"},
        {"delta": "1e-5"},
    ],
)
def test_json_with_an_unknown_missing_or_malformed_field_is_refused(change: dict[str, Any]) -> None:
    record = json.loads(USER.to_json())
    with pytest.raises(UnknownMechanism):
        PrivacyPlan.from_json(json.dumps({**record, **change}))
    for name in ("unit", "n_users", "delta", "sampling", "cohort", "sums", "max_participations"):
        with pytest.raises(UnknownMechanism):
            PrivacyPlan.from_json(json.dumps({k: v for k, v in record.items() if k != name}))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"plan"', "3", "{}"])
def test_what_is_no_plan_at_all_is_refused(text: str) -> None:
    with pytest.raises(UnknownMechanism):
        PrivacyPlan.from_json(text)


def test_json_that_parses_to_an_impossible_mix_is_refused() -> None:
    with pytest.raises(InvalidConfig, match="delta"):
        PrivacyPlan.from_json(USER.to_json().replace("1e-05", "0.1"))


@pytest.mark.parametrize(("delta", "expected"), [(1e-9, 0.7649), (1e-5, 0.4439)])  # dp-accounting 0.6.0, PLDAccountant
def test_a_guarantee_is_at_the_plans_own_delta(delta: float, expected: float) -> None:
    assert (plain := replace(USER, delta=delta).guarantee()) is not None
    assert plain.epsilon == pytest.approx(gaussian.epsilon_of(2 / 3, delta), rel=1e-6)  # 4 sums with σ = 3
    assert (sampled := replace(POISSON, delta=delta).guarantee()) is not None
    assert sampled.epsilon == pytest.approx(expected, rel=1e-3)
