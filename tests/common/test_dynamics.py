"""How a profile follows its person: shares, drifts, contexts, and a state that can be kept."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from penchant.common.arrays import Float32, Float64
from penchant.common.catalogue import Catalogue
from penchant.common.errors import InvalidConfig, MalformedData
from penchant.common.interests import STILL, Drift, Dynamics, InterestConfig, InterestProfile
from penchant.common.interests.dynamics import Contexts, PageHinkley, Share, loss
from penchant.common.taste import ItemSide, TasteConfig, Transitions

N_TOPICS, N_ITEMS, DIM = 8, 320, 12
_random = np.random.default_rng(0)
TOPICS = np.arange(N_ITEMS) % N_TOPICS
VECTORS: Float32 = (
    _random.standard_normal((N_TOPICS, DIM))[TOPICS] / math.sqrt(DIM)
    + 0.15 * _random.standard_normal((N_ITEMS, DIM)) / math.sqrt(DIM)
).astype(np.float32)
SIDE = ItemSide(
    VECTORS,
    _random.random(N_ITEMS).astype(np.float32),
    TasteConfig(popularity=0.0, transition=0.05, ridge=0.3),
    Transitions(*_random.standard_normal((2, N_ITEMS, 3)).astype(np.float32)),
)
PLAIN = dataclasses.replace(SIDE, transitions=None)
CATALOGUE = Catalogue(ids=tuple(f"i{k}" for k in range(N_ITEMS)), retired=frozenset({"i7"}))


def events(topic: int, n: int, start: int = 0) -> list[int]:
    """n items of a topic, from the start-th on."""
    return list(range(topic, N_ITEMS, N_TOPICS))[start : start + n]


def after(items: list[int], dynamics: Dynamics, side: ItemSide = PLAIN, **fields: Any) -> InterestProfile:
    profile = InterestProfile(side, CATALOGUE, InterestConfig(dynamics=dynamics, **fields))
    for item in items:
        profile.update(item)
    return profile


def in_topic(profile: InterestProfile, topic: int) -> int:
    """How many of the next ten items are of the topic."""
    return sum(int(TOPICS[one.position]) == topic for one in profile.recommend(10))


def test_a_share_goes_to_the_memory_that_foresees_and_is_pulled_back_to_its_start() -> None:
    # two steps by hand: losses (1, 0) at η = 2, α = 0.1 from w₀ = 0.25
    share = Share(0.25)
    share.learn(np.array([1.0, 0.0]), 2.0, 0.1)
    first = 0.25 / (0.25 + 0.75 * math.exp(-2))
    assert share.value == pytest.approx(0.9 * first + 0.1 * 0.25)
    for _ in range(50):
        share.learn(np.array([0.3, 0.3]), 2.0, 0.1)
    assert share.value == pytest.approx(0.25, abs=0.01)


def test_however_hasty_the_share_goes_to_the_better_memory_and_stays_a_share() -> None:
    for start, losses, expected in ((0.6, (0.4, 0.5), 0.0), (0.6, (0.5, 0.4), 1.0), (1.0, (0.4, 0.5), 1.0)):
        share = Share(start)
        share.learn(losses, 1e6, 0.0)
        assert share.value == expected
    profile = after(events(0, 4) + events(1, 4), Dynamics(rate=2000.0), SIDE)
    assert 0 <= profile.share <= 1


def test_a_tracked_share_loses_little_to_the_better_memory_on_either_side_of_a_change() -> None:
    losses = np.array([[0.1, 0.6]] * 100 + [[0.6, 0.1]] * 100)

    def total(rate: float) -> float:
        share, found = Share(0.5), 0.0
        for each in losses:
            found += (1 - share.value) * each[0] + share.value * each[1]
            share.learn(each, rate, 0.05)
        return found

    best = 0.1 * len(losses)  # of whoever knows when to change
    assert total(4.0) < best + 12
    assert total(0.0) > best + 45


def test_without_a_rate_the_share_stays_and_the_scores_are_those_of_a_still_profile() -> None:
    items = events(0, 8) + events(1, 4)
    still, fixed = after(items, STILL, SIDE), after(items, Dynamics(rate=0.0, threshold=None), SIDE)
    np.testing.assert_array_equal(still.standing().scores, fixed.standing().scores)
    assert fixed.share == InterestConfig().share
    assert after(items, Dynamics(rate=3.0), SIDE).share != InterestConfig().share


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_share_of_one_memory_alone_stays_alone(share: float) -> None:
    assert after(events(0, 8) + events(1, 8), Dynamics(rate=5.0), share=share).share == share


def test_an_event_of_no_strength_or_weight_tells_nothing_of_the_memories() -> None:
    profile = after(events(0, 8), Dynamics(rate=3.0))
    before = profile.share
    profile.update(events(3, 1)[0], strength=0.0)
    profile.update(events(3, 1)[0], weight=0.0)
    assert profile.share == before


def test_a_loss_is_none_at_the_top_and_one_at_the_bottom_and_its_scale_does_not_matter() -> None:
    scores = _random.standard_normal((1, 50))
    own = np.array([0.3])
    assert loss(scores, own) == loss(7 * scores, 7 * own)
    assert loss(scores, scores.max(axis=1) + 1) == 0.0
    assert loss(scores, scores.min(axis=1) - 1) == 1.0
    assert loss(np.zeros((1, 50)), np.zeros(1)) == 0.5


def test_page_hinkley_is_the_written_out_test() -> None:
    values = np.random.default_rng(3).random(200) + 0.4 * (np.arange(200) > 120)
    detector = PageHinkley()
    found = next(t for t, v in enumerate(values) if detector.drifted(float(v), 1.0, 0.05, 3.0))
    sums = np.cumsum([v - values[: t + 1].mean() - 0.05 for t, v in enumerate(values)])
    excess = sums - np.minimum(0.0, np.minimum.accumulate(sums))
    assert found == np.flatnonzero(excess > 3.0)[0]
    assert 120 < found < 160


def test_a_change_of_taste_is_marked_once_and_the_list_follows_sooner() -> None:
    items = events(0, 30) + events(4, 9)
    watched = after(items, Dynamics(rate=0.0, threshold=0.5), long=0.98, share=0.0)
    blind = after(items, Dynamics(rate=0.0, threshold=None), long=0.98, share=0.0)
    (drift,) = watched.drifts
    assert 30 <= drift.event <= 34
    assert blind.drifts == []
    assert in_topic(watched, 4) == 10
    assert in_topic(blind, 4) <= 5


def test_a_taste_that_stays_is_no_drift() -> None:
    assert after(events(0, 40), Dynamics(threshold=0.5)).drifts == []


def test_a_drift_carries_the_time_that_its_event_came_with() -> None:
    profile = InterestProfile(PLAIN, CATALOGUE, InterestConfig(dynamics=Dynamics(rate=0.0, threshold=0.5)))
    for k, item in enumerate(events(0, 25) + events(4, 12)):
        profile.update(item, time=1000 * k)
    (drift,) = profile.drifts
    assert drift == Drift(drift.event, 1000 * drift.event)


def at_places(dynamics: Dynamics, side: ItemSide = PLAIN) -> InterestProfile:
    profile = after([], dynamics, side)
    for k in range(30):
        place = "work" if k % 2 else "home"
        profile.update(events(k % 2, 1, k)[0], context={"place": place, "device": "phone"})
    return profile


def test_a_list_leans_to_what_a_person_chooses_in_that_place() -> None:
    profile = at_places(Dynamics(rate=0.0, threshold=None, context=2.0))

    def share(place: str | None) -> float:
        context = None if place is None else {"place": place}
        shown = [int(TOPICS[one.position]) for one in profile.recommend(10, context=context)]
        return float(np.mean([topic == 1 for topic in shown]))

    assert share("work") == 1.0
    assert share("home") == 0.0


def test_a_moment_that_foretells_nothing_is_believed_less_than_one_that_does() -> None:
    random = np.random.default_rng(6)

    def shift(told: bool) -> float:
        profile = after([], Dynamics(threshold=None))
        for k in range(40):
            said = k % 2 if told else int(random.integers(2))
            profile.update(events(k % 2, 1, k // 2)[0], context={"place": "ab"[said]})
        return profile._trust.value

    assert shift(told=True) > 0.6
    assert shift(told=False) < 0.5


def test_a_category_never_met_or_always_the_same_changes_nothing() -> None:
    profile = at_places(Dynamics())
    before = profile.standing().scores
    for context in ({}, {"place": "train"}, {"weather": "rain"}, {"device": "phone"}):
        np.testing.assert_allclose(profile.standing(context).scores, before, atol=1e-6)
    assert np.abs(profile.standing({"place": "home"}).rest - profile.standing().rest).max() > 1e-3
    ignored = at_places(Dynamics(context=0.0))
    np.testing.assert_array_equal(ignored.standing({"place": "home"}).scores, ignored.standing().scores)


def test_only_so_many_categories_are_kept_and_the_longest_unmet_goes_first() -> None:
    kept = Contexts(2)
    for value in ("a", "b", "a", "c"):
        kept.add({"place": value}, np.ones(2), 1.0, keep=0.9, most=2)
    assert list(kept.cells) == [("place", "a"), ("place", "c")]


def test_a_category_counts_half_at_as_many_events_as_are_set() -> None:
    kept = Contexts(1)
    for value in ["a"] * 5 + ["b"] * 5:
        kept.add({"x": value}, np.array([1.0 if value == "a" else 3.0]), 1.0, keep=1.0, most=9)
    assert kept.shifts({"x": "a"}, shrink=5.0)["x"] == pytest.approx([0.5 * (1.0 - 2.0)])


@pytest.mark.parametrize("context", [{"hour": 3}, {3: "hour"}])
def test_a_context_that_is_no_text_is_refused_and_changes_nothing(context: Any) -> None:
    profile = at_places(Dynamics())
    before = profile.to_arrays()
    with pytest.raises(InvalidConfig, match="context"):
        profile.update(0, context=context)
    with pytest.raises(InvalidConfig, match="context"):
        profile.recommend(context=context)
    assert same(profile.to_arrays(), before)


@pytest.mark.parametrize("side", [PLAIN, SIDE])
def test_parts_sum_to_the_score_with_a_moved_share_a_drift_and_a_context(side: ItemSide) -> None:
    settings = InterestConfig(dynamics=Dynamics(rate=2.0, threshold=0.5))
    profile = InterestProfile(side, CATALOGUE, settings, prior=np.random.default_rng(4).standard_normal(DIM))
    for k, item in enumerate(events(0, 25) + events(4, 12)):
        profile.update(item, context={"place": "home" if k % 3 else "work"})
    assert profile.drifts
    assert profile.share != settings.share
    context = {"place": "work", "weather": "rain"}
    scores = profile.standing(context).scores
    for item in (2, 33, 101):
        parts = profile.attribution(item, context=context)
        assert parts.total == pytest.approx(float(scores[item]), abs=1e-5)
        assert set(parts.context) == {"place"}
        assert abs(parts.context["place"]) > 1e-4


def busy(config: InterestConfig, prior: Float64 | None = None) -> InterestProfile:
    profile = InterestProfile(SIDE, CATALOGUE, config, prior=prior)
    for k, item in enumerate(events(0, 25) + events(4, 9)):
        context = {"place": ("home", "work", "茶馆")[k % 3]}
        profile.update(item, strength=0.5 + 0.01 * k, weight=1.5, context=context, time=k if k % 2 else None)
    return profile


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return set(a) == set(b) and all(a[k].dtype == b[k].dtype and np.array_equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("again", [True, False])
def test_a_restored_profile_goes_on_to_the_last_bit(again: bool) -> None:
    config = InterestConfig(again=again, dynamics=Dynamics(rate=2.0, threshold=0.5))
    profile = busy(config, np.random.default_rng(4).standard_normal(DIM))
    assert profile.drifts
    restored = InterestProfile.from_arrays(SIDE, CATALOGUE, config, profile.to_arrays())
    assert same(restored.to_arrays(), profile.to_arrays())
    for one in (profile, restored):
        for item in events(5, 6):
            one.update(item, context={"place": "茶馆"})
    context = {"place": "home"}
    np.testing.assert_array_equal(restored.standing(context).scores, profile.standing(context).scores)
    assert restored.recommend(20, context=context) == profile.recommend(20, context=context)
    assert restored.drifts == profile.drifts
    assert same(restored.to_arrays(), profile.to_arrays())


def test_an_empty_profile_can_be_kept_too() -> None:
    empty = InterestProfile(PLAIN, CATALOGUE)
    restored = InterestProfile.from_arrays(PLAIN, CATALOGUE, None, empty.to_arrays())
    assert same(restored.to_arrays(), empty.to_arrays())


def test_what_is_kept_is_a_copy() -> None:
    profile = busy(InterestConfig())
    kept = profile.to_arrays()
    before = {name: values.copy() for name, values in kept.items()}
    profile.update(1)
    assert same(kept, before)


def test_a_state_of_another_release_catalogue_or_version_is_refused() -> None:
    config = InterestConfig()
    kept = busy(config).to_arrays()
    moved = dataclasses.replace(SIDE, vectors=SIDE.vectors + np.float32(1e-3))
    with pytest.raises(InvalidConfig, match="another release"):
        InterestProfile.from_arrays(moved, CATALOGUE, config, kept)
    renamed = Catalogue(ids=tuple(f"j{k}" for k in range(N_ITEMS)))
    with pytest.raises(InvalidConfig, match="another release"):
        InterestProfile.from_arrays(SIDE, renamed, config, kept)
    for version in ({"schema_version": np.array([2])}, {"schema_version": np.array([[1, 1]])}):
        with pytest.raises(MalformedData, match="version"):
            InterestProfile.from_arrays(SIDE, CATALOGUE, config, kept | version)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("items", np.array([0, N_ITEMS])),
        ("items", np.array([-1] * 34)),
        ("items", np.array([0, 1])),
        ("spread", np.zeros((2, 3, 3))),
        ("spread", np.full((2, DIM, DIM), np.nan)),
        ("pull", np.zeros((2, DIM), np.float32)),
        ("context_names", np.frombuffer(b"[1]", np.uint8)),
        ("context_names", np.frombuffer(b"\xff", np.uint8)),
        ("context_weights", np.zeros(9)),
        ("drifts", np.zeros((3, 1), np.int64)),
        ("unknown", np.zeros(1)),
        ("release", np.zeros((0,), np.float32)),
    ],
)
def test_a_state_that_is_not_what_was_kept_is_refused(name: str, values: Any) -> None:
    kept = busy(InterestConfig()).to_arrays()
    with pytest.raises(MalformedData, match="saved profile"):
        InterestProfile.from_arrays(SIDE, CATALOGUE, None, kept | {name: values})
    if name in kept:
        del kept[name]
        with pytest.raises(MalformedData, match="saved profile"):
            InterestProfile.from_arrays(SIDE, CATALOGUE, None, kept)


@pytest.mark.parametrize(
    "fields",
    [
        {"rate": -1.0},
        {"rate": math.nan},
        {"switch": 1.1},
        {"threshold": 0.0},
        {"slack": -0.1},
        {"fade": 0.0},
        {"shrink": 0.0},
        {"context": math.inf},
        {"categories": 0},
        {"sample": 0},
        {"haste": -1},
    ],
)
def test_settings_out_of_range_are_refused(fields: dict[str, float]) -> None:
    with pytest.raises(InvalidConfig, match=next(iter(fields))):
        Dynamics(**fields)  # type: ignore[arg-type]  # fields by name
