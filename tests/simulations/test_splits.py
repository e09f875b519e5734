"""Splits: nothing is lost, nothing leaks, order stays."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from penchant.common.errors import InvalidConfig
from penchant.common.interactions import Interactions
from penchant.simulations.splits import NAMES, Split, global_time, held_out_users, k_fold_users, leave_last_out, split

N_ITEMS = 30


def population(histories: list[list[tuple[int, int]]]) -> Interactions:
    """People with these (time, item) pairs; each row's strength is unique, so that it can be told from its copies."""
    histories = [sorted(h, key=lambda pair: pair[0]) for h in histories]
    n = sum(map(len, histories))
    return replace(
        Interactions.of([[item for _, item in h] for h in histories], N_ITEMS),
        times=np.array([time for h in histories for time, _ in h], np.int64),
        strengths=(np.arange(n) / max(n, 1)).astype(np.float32),
    )


def populations(*, repeats: bool) -> st.SearchStrategy[Interactions]:
    pair = st.tuples(st.integers(0, 12), st.integers(0, N_ITEMS - 1))
    person = st.lists(pair, max_size=8, unique_by=None if repeats else lambda p: p[1])
    return st.lists(person, min_size=2, max_size=8).map(population)


def pairs(part: Interactions) -> set[tuple[int, int]]:
    return set(zip(part.rows.tolist(), part.items.tolist(), strict=True))


def rows(part: Interactions) -> set[float]:
    return set(part.strengths.tolist())


def leaks(parts: Split) -> bool:
    seen = pairs(parts.history) | pairs(parts.train)
    return bool(pairs(parts.targets) & seen or pairs(parts.validation) & pairs(parts.train))


def try_split(name: str, data: Interactions) -> Split:
    try:
        return split(name, data, seed=3)
    except InvalidConfig:
        assume(False)
        raise


@pytest.mark.parametrize("name", [*NAMES, "2-fold-users:1"])
@given(data=populations(repeats=True))
def test_no_target_is_in_train_or_history_and_no_validation_item_in_train(name: str, data: Interactions) -> None:
    parts = try_split(name, data)
    assert not leaks(parts)
    if len(parts.targets):
        assert leaks(replace(parts, history=data))
        assert leaks(replace(parts, train=data))


@pytest.mark.parametrize("name", [*NAMES, "2-fold-users:1"])
@given(data=populations(repeats=False))
def test_without_repeats_every_interaction_is_in_exactly_one_of_history_and_targets(
    name: str, data: Interactions
) -> None:
    parts = try_split(name, data)
    assert rows(parts.history) | rows(parts.targets) == rows(data)
    assert len(parts.history) + len(parts.targets) == len(data)
    who = np.flatnonzero(parts.participants)
    train, validation = parts.train.select(who), parts.validation.select(who)
    assert rows(train) | rows(validation) == rows(parts.history.select(who))
    assert len(train) + len(validation) == len(parts.history.select(who))


@pytest.mark.parametrize("name", NAMES)
@given(data=populations(repeats=True))
def test_every_part_has_the_same_people_with_rows_in_data_order(name: str, data: Interactions) -> None:
    parts = try_split(name, data)
    for part in (parts.train, parts.validation, parts.history, parts.targets):
        assert (part.n_users, part.n_items) == (data.n_users, data.n_items)
        assert rows(part) <= rows(data)
        assert (np.diff(part.strengths) > 0).all()
        owner = dict(zip(data.strengths.tolist(), data.rows.tolist(), strict=True))
        assert [owner[s] for s in part.strengths.tolist()] == part.rows.tolist()
    assert parts.participants.shape == (data.n_users,)
    assert not len(parts.train.select(np.flatnonzero(~parts.participants)))


@given(data=populations(repeats=True))
def test_global_time_trains_on_nothing_from_the_future(data: Interactions) -> None:
    parts = try_split("global-time", data)
    cut = parts.history.times.max()
    assert (parts.targets.times > cut).all()
    assert (parts.validation.times > parts.train.times.max()).all()
    assert (parts.validation.times <= cut).all()


def test_leave_last_out_takes_the_last_as_target_and_the_one_before_for_validation() -> None:
    parts = leave_last_out(Interactions.of([[1, 2, 3, 4], [5, 6], [], [7, 8, 9]], 10))
    assert [h.items.tolist() for h in parts.train] == [[1, 2], [5, 6], [], [7]]
    assert [h.items.tolist() for h in parts.validation] == [[3], [], [], [8]]
    assert [h.items.tolist() for h in parts.history] == [[1, 2, 3], [5, 6], [], [7, 8]]
    assert [h.items.tolist() for h in parts.targets] == [[4], [], [], [9]]
    assert parts.participants.all()
    assert "2 of 4 users are scored on 2 targets." in parts.notes


def test_a_last_interaction_that_repeats_an_item_is_no_target() -> None:
    parts = leave_last_out(Interactions.of([[1, 2, 3, 1], [1, 2, 3]], 5))
    assert [h.items.tolist() for h in parts.targets] == [[], [3]]
    assert "1 held-out interactions repeat an item and are no targets." in parts.notes


def test_ties_at_the_end_are_told_and_broken_by_file_order() -> None:
    tied = population([[(0, 1), (1, 2), (1, 3)], [(0, 1), (1, 2), (2, 3)]])
    parts = leave_last_out(tied)
    assert [h.items.tolist() for h in parts.targets] == [[3], [3]]
    assert parts.notes[0].startswith("50.0% of tested users")
    assert leave_last_out(Interactions.of([[1, 2, 3]], 5)).notes[0].startswith("0.0%")


def test_global_time_cuts_once_for_everybody() -> None:
    data = population([[(t, t) for t in range(8)], [(8, 0), (9, 1)], [(1, 3), (9, 3)]])
    parts = global_time(data, test_share=0.25, validation_share=0.25)
    # 12 times 0 1 1 2 3 4 5 6 7 8 9 9: the last quarter begins at 8, the one before at 5
    assert [h.items.tolist() for h in parts.train] == [[0, 1, 2, 3, 4], [], [3]]
    assert [h.items.tolist() for h in parts.validation] == [[5, 6, 7], [], []]
    assert [h.items.tolist() for h in parts.targets] == [[], [0, 1], []]  # the third repeats item 3
    assert parts.participants.tolist() == [True, False, True]
    assert "1 users first come after the cut and are scored with an empty history." in parts.notes


def test_global_time_refuses_data_without_different_times_and_shares_that_leave_no_train() -> None:
    with pytest.raises(InvalidConfig, match="different times"):
        global_time(population([[(5, 1), (5, 2)], [(5, 3)]]))
    with pytest.raises(InvalidConfig, match="nothing to train on"):
        global_time(population([[(0, item) for item in range(9)], [(1, 4)]]))
    with pytest.raises(InvalidConfig, match="less than 1"):
        global_time(population([[(0, 1), (1, 2)]]), test_share=0.5, validation_share=0.5)


def test_held_out_users_give_nothing_to_training_and_are_tested_on_their_last_item() -> None:
    data = Interactions.of([[u, u + 1, u + 2] for u in range(10)], N_ITEMS)
    parts = held_out_users(data, share=0.3, seed=1)
    out = np.flatnonzero(~parts.participants)
    assert len(out) == 3
    assert [h.items.tolist() for h in parts.targets.select(out)] == [[u + 2] for u in out]
    assert [h.items.tolist() for h in parts.history.select(out)] == [[u, u + 1] for u in out]
    assert not len(parts.train.select(out))
    assert not len(parts.validation.select(out))
    inside = np.flatnonzero(parts.participants)
    assert [h.items.tolist() for h in parts.train.select(inside)] == [[u, u + 1] for u in inside]
    assert not len(parts.targets.select(inside))


def test_who_is_held_out_follows_the_seed_alone() -> None:
    data = Interactions.of([[0, 1, 2]] * 200, 3)
    first = held_out_users(data, seed=1).participants
    assert (first == held_out_users(data, seed=1).participants).all()
    assert (first != held_out_users(data, seed=2).participants).any()


@given(n=st.integers(2, 40), k=st.integers(2, 7), seed=st.integers(0, 5))
def test_folds_hold_everybody_out_exactly_once(n: int, k: int, seed: int) -> None:
    assume(k <= n)
    data = Interactions.of([[0, 1, 2]] * n, 3)
    out = np.stack([~k_fold_users(data, k=k, fold=f, seed=seed).participants for f in range(k)])
    assert (out.sum(axis=0) == 1).all()
    assert np.ptp(out.sum(axis=1)) <= 1


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("leave-last-outt", "did you mean 'leave-last-out'?"),
        ("5-fold-users", "did you mean '5-fold-users:0'?"),
        ("random", "choose from 5-fold-users:0, global-time, held-out-users, leave-last-out"),
        ("5-fold-users:5", "fold must be from 0 to 4"),
        ("1-fold-users:0", "folds must be from 2"),
    ],
)
def test_an_unknown_split_is_refused_with_a_hint(name: str, words: str) -> None:
    with pytest.raises(InvalidConfig) as error:
        split(name, Interactions.of([[0]] * 9, 3), seed=0)
    assert words in str(error.value)


@pytest.mark.parametrize("share", [0.0, 1.0, float("nan")])
def test_a_share_that_leaves_nobody_on_one_side_is_refused(share: float) -> None:
    with pytest.raises(InvalidConfig, match="share must be"):
        held_out_users(Interactions.of([[0]] * 9, 3), share=share)
    with pytest.raises(InvalidConfig, match="nobody to train on"):
        held_out_users(Interactions.of([[0]] * 2, 3), share=0.9)


@pytest.mark.parametrize("name", NAMES)
def test_split_knows_every_name_it_lists(name: str) -> None:
    data = population([[(u + t, (u + t) % N_ITEMS) for t in range(5)] for u in range(20)])
    assert split(name, data, seed=0).name == name
