"""A profile, event by event: the closed form of the user side, with two memories."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from penchant.common.arrays import Float32
from penchant.common.catalogue import Catalogue
from penchant.common.errors import InvalidConfig
from penchant.common.interactions import History, Interactions
from penchant.common.interests import STILL, Greedy, InterestConfig, InterestProfile
from penchant.common.interests.distribution import Preferences
from penchant.common.interests.exploration import HoldBack
from penchant.common.taste import ItemSide, TasteConfig, Transitions

N_ITEMS, DIM = 40, 6
_random = np.random.default_rng(0)
VECTORS: Float32 = _random.standard_normal((N_ITEMS, DIM)).astype(np.float32)
SIDE = ItemSide(
    VECTORS,
    _random.random(N_ITEMS).astype(np.float32),
    TasteConfig(decay=0.8, popularity=0.3, transition=0.5, transition_decay=0.6),
    Transitions(*_random.standard_normal((2, N_ITEMS, 3)).astype(np.float32)),
)
CATALOGUE = Catalogue(ids=tuple(f"i{k}" for k in range(N_ITEMS)), retired=frozenset({"i7"}))
ITEMS = [3, 12, 5, 12, 30]


def after(items: list[int], config: InterestConfig | None = None, side: ItemSide = SIDE) -> InterestProfile:
    return InterestProfile.of(side, CATALOGUE, History.of(items), config)


def test_with_one_memory_scores_are_those_of_the_closed_form() -> None:
    (expected,) = SIDE.scores(Interactions.of([ITEMS], N_ITEMS))
    found = after(ITEMS, InterestConfig(long=0.8, share=0.0, again=True, dynamics=STILL)).standing().scores
    np.testing.assert_allclose(np.delete(found, 7), np.delete(expected, 7), atol=1e-5)
    (recent,) = dataclasses.replace(SIDE, config=dataclasses.replace(SIDE.config, decay=0.5)).scores(
        Interactions.of([ITEMS], N_ITEMS)
    )
    mixed = InterestConfig(long=0.8, recent=0.5, share=0.25, again=True, dynamics=STILL)
    both = after(ITEMS, mixed).standing().scores
    np.testing.assert_allclose(np.delete(both, 7), np.delete(0.75 * expected + 0.25 * recent, 7), atol=1e-5)


def test_an_event_changes_the_next_list_at_once() -> None:
    profile = after([])
    before = [one.item for one in profile.recommend(5)]
    profile.update(CATALOGUE.index[before[0]])
    now = [one.item for one in profile.recommend(5)]
    assert before[0] not in now
    assert now != before[1:] + now[-1:]


def test_what_a_person_had_or_what_is_retired_is_not_shown() -> None:
    shown = {one.item for one in after(ITEMS).recommend(N_ITEMS)}
    assert shown == set(CATALOGUE.ids) - {"i7"} - {f"i{k}" for k in ITEMS}
    assert {one.item for one in after(ITEMS, InterestConfig(again=True)).recommend(N_ITEMS)} == set(CATALOGUE.ids) - {
        "i7"
    }


def test_a_topic_that_a_person_does_not_want_is_not_shown_whatever_its_score() -> None:
    profile = after(ITEMS)
    best = profile.recommend(3)
    catalogue = Catalogue(
        ids=CATALOGUE.ids,
        retired=CATALOGUE.retired,
        topics=tuple(("war",) if i == best[0].item else () for i in CATALOGUE.ids),
    )
    profile.hide(Preferences(refused=frozenset({"war"})).hidden(catalogue))
    assert [one.item for one in profile.recommend(2)] == [one.item for one in best[1:]]
    profile.update(best[1].position)
    assert best[0].item not in {one.item for one in profile.recommend(N_ITEMS)}
    again = InterestProfile.from_arrays(SIDE, CATALOGUE, None, profile.to_arrays())
    assert best[0].item not in {one.item for one in again.recommend(N_ITEMS)}
    profile.hide(np.zeros(N_ITEMS, np.bool_))
    assert best[0].item in {one.item for one in profile.recommend(N_ITEMS)}
    with pytest.raises(InvalidConfig, match="one value for each of 40 items"):
        profile.hide(np.zeros(3, np.bool_))


def test_what_a_rule_holds_back_is_shown_rather_than_a_shorter_list() -> None:
    profile, rule = after(ITEMS), HoldBack(Greedy(), lists=9)
    for _ in range(6):  # 35 items may be shown, 9 at a time
        found = [one.position for one in profile.recommend(9, policy=rule)]
        assert len(set(found)) == 9
        rule.shown(found)
    assert profile.recommend(0) == []


def test_a_list_is_in_order_of_score_and_ties_in_order_of_position() -> None:
    profile = after(ITEMS)
    scores = profile.standing().scores
    found = [one.position for one in profile.recommend(10)]
    assert found == np.argsort(-scores, kind="stable")[:10].tolist()
    level = ItemSide(np.zeros((N_ITEMS, 2), np.float32), np.zeros(N_ITEMS, np.float32), TasteConfig())
    assert [one.position for one in after([0], side=level).recommend(9)] == [1, 2, 3, 4, 5, 6, 8, 9, 10]


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_parts_sum_to_the_score(share: float) -> None:
    profile = InterestProfile(SIDE, CATALOGUE, InterestConfig(share=share), prior=_random.standard_normal(DIM))
    for item, strength, weight in zip(ITEMS, [1.0, 0.2, 0.0, 0.7, 0.9], [1.0, 0.5, 2.0, 1.0, 0.1], strict=True):
        profile.update(item, strength=strength, weight=weight)
    profile.long.fade(0.3)
    for item in (0, 12, 39):
        parts = profile.attribution(item)
        expected = SIDE.vectors[item] @ profile.taste().mean + profile.standing().rest[item]
        assert parts.total == pytest.approx(expected, abs=1e-5)
        assert len(parts.past) == len(ITEMS)
        assert parts.past[2] == 0.0  # strength 0


def test_a_weak_sign_moves_a_taste_less_and_no_sign_moves_it_away() -> None:
    def score(strength: float) -> float:
        profile = after([], InterestConfig(again=True))
        before = profile.standing().scores[3]
        profile.update(3, strength=strength)
        return float(profile.standing().scores[3] - before)

    assert score(1.0) > score(0.5) > score(0.0)


@pytest.mark.parametrize(
    ("item", "fields"),
    [(-1, {}), (N_ITEMS, {}), (0, {"strength": 1.1}), (0, {"strength": float("nan")}), (0, {"weight": -1.0})],
)
def test_what_is_no_event_is_refused_and_changes_nothing(item: int, fields: dict[str, Any]) -> None:
    profile = after(ITEMS)
    before = profile.standing().scores
    with pytest.raises(InvalidConfig, match=r"item|strength"):
        profile.update(item, **fields)
    assert profile.items == ITEMS
    assert profile.standing().scores is before


def test_a_release_of_another_catalogue_is_refused() -> None:
    with pytest.raises(InvalidConfig, match="40 items, the catalogue 1"):
        InterestProfile(SIDE, Catalogue(ids=("a",)))
    wrong: list[dict[str, Any]] = [{"long": 0.0}, {"recent": 1.1}, {"share": -0.1}]
    for fields in wrong:
        with pytest.raises(InvalidConfig):
            InterestConfig(**fields)
