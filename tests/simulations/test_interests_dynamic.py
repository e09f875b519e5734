"""Prequential figures and planted changes: on streams small enough to count by hand, and on synthetic people."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from penchant.common.arrays import Float32
from penchant.common.catalogue import Catalogue
from penchant.common.interactions import History
from penchant.common.interests import STILL, Dynamics, InterestConfig, InterestProfile
from penchant.common.taste import ItemSide, TasteConfig
from penchant.simulations.interests import dynamic

N_ITEMS = 6
POPULARITY: Float32 = np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.5], np.float32)
BY_POPULARITY = ItemSide(np.zeros((N_ITEMS, 2), np.float32), POPULARITY, TasteConfig(popularity=1.0))
CATALOGUE = Catalogue(ids=tuple(map(str, range(N_ITEMS))))


def popular(seen: list[int]) -> InterestProfile:
    """A profile that lists by popularity, whatever it takes in."""
    return InterestProfile.of(BY_POPULARITY, CATALOGUE, History.of(seen), InterestConfig(dynamics=STILL))


def later(items: list[int], times: list[int]) -> History:
    return History(np.array(items, np.int32), np.array(times, np.int64), np.ones(len(items), np.float32))


def test_each_event_is_ranked_among_what_is_unseen_and_ties_count_against_it() -> None:
    # of [0, 1, …, 5] less 1: 2 is second; then 0 first; then 4 level with 5, after 3
    ranks = dynamic.prequential(popular([1]), later([2, 0, 4], [1, 2, 3]))
    assert ranks.tolist() == [2, 1, 3]


def test_events_of_one_time_are_ranked_before_any_of_them_is_taken_in() -> None:
    ranks = dynamic.prequential(popular([]), later([1, 0, 3], [5, 5, 6]))
    assert ranks.tolist() == [1, 1, 2]  # 1 and 0 among what neither of them is; 3 after 2
    side = dataclasses.replace(BY_POPULARITY, vectors=np.eye(N_ITEMS, dtype=np.float32) + np.float32(1.0))
    one = InterestProfile(side, CATALOGUE, InterestConfig(dynamics=STILL))
    expected = one.standing().scores.copy()
    seen: list[list[float]] = []
    update = one.update

    def watched(item: int, **fields: object) -> None:
        seen.append(one.standing().scores.tolist())
        update(item, **fields)  # type: ignore[arg-type]  # passed on

    one.update = watched  # type: ignore[method-assign]  # to look on
    dynamic.prequential(one, later([5, 4], [7, 7]))
    assert seen[0] == expected.tolist()
    assert len(seen) == 2


def test_a_profile_that_does_not_learn_stays_and_still_ranks_only_what_is_unseen() -> None:
    profile = popular([])
    ranks = dynamic.prequential(profile, later([1, 0, 2], [1, 2, 3]), learns=False)
    assert ranks.tolist() == [2, 1, 1]
    assert profile.items == []


def test_no_later_events_give_no_ranks() -> None:
    assert dynamic.prequential(popular([]), later([], [])).tolist() == []


def test_only_the_method_with_context_tells_its_profiles_the_moment() -> None:
    rows = dynamic.methods(BY_POPULARITY, BY_POPULARITY, InterestConfig())
    assert [name for name, method in rows.items() if method.context] == ["… and context"]
    assert [name for name, method in rows.items() if not method.learns] == [dynamic.FROZEN]
    assert rows["two memories, fixed share"].config.dynamics == STILL
    assert rows["… adaptive share"].config.dynamics.threshold is None
    assert rows["… and drift"].config.dynamics == dataclasses.replace(Dynamics(), context=0.0)


@pytest.fixture(scope="module")
def world() -> dynamic.World:
    return dynamic.World.of(np.random.default_rng(0), n_items=600, n_topics=10)


def test_a_stream_holds_no_item_twice_and_its_topics_are_those_of_its_tastes(world: dynamic.World) -> None:
    random = np.random.default_rng(1)
    first, second = world.taste(random), world.taste(random)
    items = world.stream(random, [first] * 100 + [second] * 100).items
    assert len(set(items.tolist())) == 200
    for part, taste, other in ((items[:60], first, second), (items[100:160], second, first)):
        shares = np.bincount(world.topics[part], minlength=10) / len(part)
        assert np.abs(shares - taste).sum() < np.abs(shares - other).sum()


def test_a_list_of_the_best_topic_fits_wholly_and_one_that_knows_nothing_by_chance(world: dynamic.World) -> None:
    taste = np.full(10, 0.05)
    taste[3] = 0.55
    profile = InterestProfile(world.side, world.catalogue)
    before = dynamic.fit(world, profile, taste)
    for item in np.flatnonzero(world.topics == 3)[:15].tolist():
        profile.update(item)
    assert before < 0.5
    assert dynamic.fit(world, profile, taste) > 0.9


def test_planted_changes_are_found_and_followed_sooner_than_without_drift() -> None:
    table = dynamic.drift_table(people=6, seed=3)
    blind, watched = table.rows[0], table.rows[1]
    found, chance, more = int(watched[2].split()[0]), int(watched[3].split()[0]), watched[7]
    assert found >= 3
    assert chance < found
    assert float(watched[6].split()[0]) > float(blind[6].split()[0]) + 0.03
    assert float(more.split("[")[1].split(",")[0]) > 0.0
    fixed, *adaptive = table.rows[2:]
    for row in adaptive:
        for at, beside in ((5, 8), (6, 9)):  # before and after
            apart = float(row[at].split()[0]) - float(fixed[at].split()[0])
            assert float(row[beside].split()[0]) == pytest.approx(apart, abs=2e-3)
            assert not fixed[beside]


def test_without_a_mark_no_change_is_found_and_nothing_is_gained() -> None:
    never = InterestConfig(dynamics=Dynamics(threshold=1e6))
    row = dynamic.drift_table(people=1, seed=3, config=never).rows[1]
    assert row[1:5] == ["0.00 [0.00, 0.00]", "0 of 1", "0 of 1", ""]
    assert row[7] == "0.000 [0.000, 0.000]"


def test_a_place_helps_those_whose_taste_depends_on_it() -> None:
    table = dynamic.context_table(people=4, seed=3)
    more = [float(row[3].split()[0]) for row in table.rows]
    assert more[0] > 0.05
    assert abs(more[1]) < 0.05


def test_the_table_holds_every_row_and_says_which_does_not_beat_what_comes_before() -> None:
    table = dynamic.table(data="synthetic:users=80,items=100,interactions=15,seed=0")
    assert [row[0] for row in table.rows] == list(dynamic.methods(BY_POPULARITY, BY_POPULARITY, InterestConfig()))
    assert {len(row) for row in table.rows} == {len(table.columns)}
    assert table.rows[0][5] == ""
    assert table.rows[1][4] == ""
    ndcg = {row[0]: float(row[2].split()[0]) for row in table.rows}
    for note in table.notes[2:]:
        said = note.split("“")
        above, below = (ndcg[name.split("”")[0]] for name in said[1:3])
        assert above - below == pytest.approx(float(note.split("NDCG@10 ")[1].split()[0]), abs=2e-3)
    assert dynamic.table(data="synthetic:users=80,items=100,interactions=15,seed=0", part="validation") != table
