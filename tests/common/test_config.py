"""Settings to plain types and back: nothing is lost, and nothing unknown is taken for something known."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penchant.common import config
from penchant.common.config import decode, did_you_mean, encode
from penchant.common.errors import InvalidConfig
from penchant.common.learners.cooccurrence import CooccurrenceConfig
from penchant.common.privacy.plan import DeviceNoise, SumSpec
from penchant.common.taste import TasteConfig


@dataclass(frozen=True, kw_only=True)
class Inner:
    depth: int
    name: str = "inner"


@dataclass(frozen=True, kw_only=True)
class Outer:
    inner: Inner
    other: Inner | None = None
    scale: tuple[float, float] | None = None
    size: int = 3

    def __post_init__(self) -> None:
        if self.size < 1:
            raise InvalidConfig("size must be ≥ 1")


inners = st.builds(Inner, depth=st.integers(), name=st.text())


@given(
    outer=st.builds(
        Outer,
        inner=inners,
        other=st.none() | inners,
        scale=st.none() | st.tuples(st.floats(allow_nan=False), st.floats(allow_nan=False)),
        size=st.integers(1, 9),
    )
)
def test_settings_come_back_from_their_json(outer: Outer) -> None:
    plain = json.loads(json.dumps(encode(outer)))
    assert decode(Outer, plain) == outer
    assert None not in plain.values()


@pytest.mark.parametrize(
    "settings",
    [
        CooccurrenceConfig(head=7, window=3, taste=TasteConfig(decay=0.5, popularity=0.3)),
        DeviceNoise(clip_norm=0.5, noise_multiplier=2.0, rate=0.1, steps=8, divisor=16.0),
        SumSpec(name="update", rounds=2, clip_norm=0.1 + 0.2, noise_multiplier=1e-17),
    ],
    ids=lambda s: type(s).__name__,
)
def test_the_settings_of_learners_and_plans_come_back_from_their_json(settings: Any) -> None:
    assert decode(type(settings), json.loads(json.dumps(encode(settings)))) == settings


def test_settings_inside_a_tuple_become_plain_types_too() -> None:
    @dataclass(frozen=True)
    class Many:
        parts: tuple[Inner, ...]

    assert encode(Many((Inner(depth=1), Inner(depth=2)))) == {
        "parts": [{"depth": 1, "name": "inner"}, {"depth": 2, "name": "inner"}]
    }


def test_a_missing_key_takes_its_default_and_one_without_default_is_named() -> None:
    assert decode(Outer, {"inner": {"depth": 1}}) == Outer(inner=Inner(depth=1))
    assert decode(Outer, {"inner": {"depth": 1}, "other": None}) == Outer(inner=Inner(depth=1))
    with pytest.raises(InvalidConfig, match="depth"):
        decode(Outer, {"inner": {}})
    with pytest.raises(InvalidConfig, match=r"Outer.*inner"):
        decode(Outer, {})


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"inner": {"depth": 1}, "siez": 2}, r"'siez'; did you mean 'size'\?"),
        ({"inner": {"depth": 1, "nmae": "x"}}, r"'inner.nmae'; did you mean 'name'\?"),
        ({"inner": {"depth": 1}, "other": {"deep": 1}}, "'other.deep'"),
        ({"inner": {"depth": 1}, "zzz": 1}, "choose from inner, other, scale, size"),
        ({"inner": 3}, "'inner' must be a table"),
        ({"inner": None}, "'inner' must be a table"),
        ({"inner": {"depth": 1}, "other": [1]}, "'other' must be a table"),
        ({"inner": {"depth": 1}, "size": 0}, "size must be"),
        ({"inner": {"depth": 1}, "size": "3"}, "Outer"),
    ],
)
def test_a_key_or_value_that_does_not_fit_is_refused_by_its_full_name(record: dict[str, Any], message: str) -> None:
    assert decode(Outer, {"inner": {"depth": 1}, "size": 2}).size == 2
    with pytest.raises(InvalidConfig, match=message):
        decode(Outer, record)


def test_a_word_near_a_known_one_is_suggested_and_a_far_one_gets_the_list() -> None:
    assert did_you_mean("ease", ["easy", "hard"]) == "; did you mean 'easy'?"
    assert did_you_mean("qqq", ["hard", "easy"]) == "; choose from easy, hard"
    assert config.did_you_mean("x", []) == "; choose from "
