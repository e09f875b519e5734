"""What passes between server and node: it comes back as it was, old forms stay readable, anything else is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penchant.common.errors import InvalidConfig, MalformedContribution, UnknownMechanism
from penchant.common.privacy.plan import DeviceNoise, PrivacyPlan, SumSpec
from penchant.common.wire import Order, Reply

PLAN = PrivacyPlan(
    unit="user",
    n_users=1000,
    delta=1e-5,
    sampling="none",
    cohort=100,
    sums=(SumSpec(name="update", rounds=10, clip_norm=0.5, noise_multiplier=3.0),),
    max_participations=4,
)
ORDER = Order(round=3, attempt=1, plan=PLAN, learner="fedavg", settings={"model": {"name": "mf"}}, users=(0, 7))

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@given(
    round=st.integers(0, 2**32 - 1),
    attempt=st.integers(0, 2**32 - 1),
    users=st.lists(st.integers(0, 2**32 - 1), max_size=9),
    settings=st.dictionaries(st.text(), json_values, max_size=4),
)
def test_an_order_comes_back_from_its_flat_form(
    round: int, attempt: int, users: list[int], settings: dict[str, Any]
) -> None:
    order = replace(ORDER, round=round, attempt=attempt, users=tuple(users), settings=settings)
    flat = order.to_flat()
    assert Order.from_flat(flat) == order
    assert all(isinstance(value, str | int) for value in flat.values())  # what any transport can carry


def test_an_order_carries_what_to_seal_with_and_one_without_is_as_it_always_was() -> None:
    sealed = replace(ORDER, round_key="{}", certificate='{"a":1}')
    assert Order.from_flat(sealed.to_flat()) == sealed
    assert ORDER.to_flat().keys() == {"schema_version", "round", "attempt", "plan", "learner", "settings", "users"}
    with pytest.raises(UnknownMechanism, match="malformed"):
        Order.from_flat({**sealed.to_flat(), "round_key": 7})


def test_noise_on_the_device_travels_with_the_plan() -> None:
    device = DeviceNoise(clip_norm=0.5, noise_multiplier=2.0, rate=0.1, steps=8, divisor=16.0)
    plan = replace(PLAN, unit="interaction", sums=(SumSpec(name="update", rounds=10, clip_norm=1.0),), device=device)
    assert Order.from_flat(replace(ORDER, plan=plan).to_flat()).plan.device == device


def test_an_order_of_version_1_is_read_for_ever() -> None:
    flat = {
        "schema_version": 1,
        "round": 3,
        "attempt": 1,
        "plan": '{"cohort":100,"delta":1e-05,"device":null,"max_participations":4,"n_users":1000,'
        '"population":"default","sampling":"none","schema_version":1,"sums":[{"clip_norm":0.5,"name":"update",'
        '"noise_multiplier":3.0,"rounds":10}],"uncharged":[],"unit":"user"}',
        "learner": "fedavg",
        "settings": '{"model": {"name": "mf"}}',
        "users": "[0, 7]",
    }
    assert Order.from_flat(flat) == ORDER


@pytest.mark.parametrize(
    "change",
    [
        {"schema_version": 2},
        {"schema_version": None},
        {"priority": 1},  # a field that a later version might add
        {"round": "three"},
        {"round": -1},
        {"round": 1.5},
        {"attempt": 2**32},  # a stream would read it as two numbers
        {"attempt": True},
        {"learner": 3},
        {"settings": "[]"},
        {"settings": "{"},
        {"users": '"12"'},
        {"users": "{}"},
        {"users": "[1.0]"},
        {"users": '["1"]'},
        {"users": "[-1]"},
        {"users": "[true]"},
        {"users": None},
        {"plan": "{}"},
        {"plan": None},
        {"plan": PLAN.to_json().replace("none", "shuffle")},
    ],
)
def test_an_order_that_is_not_understood_is_refused(change: dict[str, Any]) -> None:
    flat = ORDER.to_flat()
    assert Order.from_flat(flat) == ORDER
    with pytest.raises(UnknownMechanism):
        Order.from_flat({**flat, **change})


@pytest.mark.parametrize("name", sorted(ORDER.to_flat()))
def test_an_order_with_a_field_missing_is_refused(name: str) -> None:
    flat = ORDER.to_flat()
    del flat[name]
    with pytest.raises(UnknownMechanism):
        Order.from_flat(flat)


def test_an_order_whose_plan_promises_the_impossible_is_refused() -> None:
    record = {**json.loads(PLAN.to_json()), "delta": 0.5}
    with pytest.raises(InvalidConfig, match="delta"):
        Order.from_flat({**ORDER.to_flat(), "plan": json.dumps(record)})


def test_a_reply_gives_its_sum_or_says_in_a_word_why_there_is_none() -> None:
    arrays = {"a": np.ones(2, np.float32)}
    assert Reply(node=0, round=1, attempt=0, arrays=arrays).contribution() is arrays
    with pytest.raises(MalformedContribution, match="no answer"):
        Reply(node=0, round=1, attempt=0, arrays=None).contribution()
    with pytest.raises(MalformedContribution, match="asleep"):
        Reply(node=0, round=1, attempt=0, arrays=None, failure="asleep").contribution()
