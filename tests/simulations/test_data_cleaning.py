"""From checked rows to a data set: order, copies, repeats, k-core, and that the report says so."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penchant.common.errors import InvalidConfig, MalformedData
from penchant.simulations.data.cleaning import Repeats, assemble, core
from penchant.simulations.data.dataset import CleaningReport, Dataset
from penchant.simulations.data.tables import interaction_rows, item_rows, read_text


def dataset(
    log: str, items: str | None = None, *, closed: bool = False, repeats: Repeats = "keep", k_core: int = 0
) -> Dataset:
    rows = interaction_rows(read_text(log.encode(), "log.csv"))
    catalogue = item_rows(read_text(items.encode(), "items.csv")) if items else None
    return assemble("data", rows, catalogue, terms="none", closed=closed, repeats=repeats, k_core=k_core)


def histories(data: Dataset) -> list[list[str]]:
    return [[data.catalogue.ids[int(i)] for i in h.items] for h in data.interactions]


def test_users_come_by_first_appearance_and_rows_by_time_with_ties_in_file_order() -> None:
    data = dataset("user,item,time\nz,c,30\na,b,20\nz,b,10\na,x,20\na,a,20\nz,y,10\n")
    assert data.interactions.users == ("z", "a")
    assert histories(data) == [["b", "y", "c"], ["b", "x", "a"]]
    assert data.interactions.times.tolist() == [10_000, 10_000, 30_000, 20_000, 20_000, 20_000]
    assert data.cleaning.tie_share == pytest.approx(5 / 6)
    assert "83.3% share their time" in "\n".join(data.cleaning.lines())


def test_without_times_the_file_order_is_the_order_and_nothing_is_taken_for_a_copy() -> None:
    data = dataset("user,item\na,3\nb,1\na,2\na,3\n")
    assert histories(data) == [["3", "2", "3"], ["1"]]
    assert (data.cleaning.repeats, data.cleaning.duplicates, data.cleaning.tie_share) == (1, 0, 0.0)
    assert "no times: each person's order is the file's" in data.cleaning.lines()


def test_the_catalogue_has_the_items_files_order_then_items_seen_only_in_use() -> None:
    items = "item,title\n5,five\n1,one\n9,nine\n"
    data = dataset("user,item\na,7\na,1\na,6\n", items)
    assert data.catalogue.ids == ("5", "1", "9", "7", "6")
    assert data.catalogue.titles == ("five", "one", "nine", "7", "6")
    assert (data.cleaning.items_unused, data.cleaning.items_appended) == (2, 2)
    assert data.cleaning.uncharged == ("2 catalogue items taken from the interactions",)
    closed = dataset("user,item\na,7\na,1\na,6\n", items, closed=True)
    assert closed.catalogue.ids == ("5", "1", "9")
    assert histories(closed) == [["1"]]
    assert (closed.cleaning.unknown_items, closed.cleaning.uncharged) == (2, ())
    with pytest.raises(MalformedData, match="no interaction is with an item of the items file"):
        dataset("user,item\na,7\n", items, closed=True)


def test_copies_are_left_out_and_repeats_kept_unless_only_the_last_is_wanted() -> None:
    log = "user,item,time,event\na,1,10,view\na,1,10,view\na,1,10,buy\na,2,15,view\na,1,20,view\nb,1,20,view\n"
    data = dataset(log)
    assert histories(data) == [["1", "1", "2", "1"], ["1"]]
    assert (data.cleaning.duplicates, data.cleaning.repeats, data.cleaning.repeats_dropped) == (1, 2, 0)
    assert data.interactions.event_names == ("buy", "view")
    assert data.interactions.events is not None
    assert data.interactions.events.tolist() == [1, 0, 1, 1, 1]
    last = dataset(log, repeats="last")
    assert histories(last) == [["2", "1"], ["1"]]
    assert last.interactions.times.tolist() == [15_000, 20_000, 20_000]
    assert (last.cleaning.repeats, last.cleaning.repeats_dropped) == (2, 2)


def test_strengths_stay_with_their_rows_through_every_step() -> None:
    log = "user,item,time,strength\nb,1,30,0.5\na,1,20,0.25\nb,2,10,0.75\nb,1,5,1\na,9,1,0\na,2,40,0.125\n"
    assert dataset(log).interactions.strengths.tolist() == [1.0, 0.75, 0.5, 0.0, 0.25, 0.125]
    assert dataset(log, repeats="last").interactions.strengths.tolist() == [0.75, 0.5, 0.0, 0.25, 0.125]
    assert dataset(log, repeats="last", k_core=2).interactions.strengths.tolist() == [0.75, 0.5, 0.25, 0.125]


def test_one_kind_of_event_needs_no_column() -> None:
    assert dataset("user,item\na,1\n").interactions.events is None
    assert dataset("user,item,rating\na,1,4\n").interactions.event_names == ("rate",)


def test_a_k_core_is_repeated_until_stable_and_listed_as_uncharged() -> None:
    # c has two rows but loses item 4 to the core, hence falls; item 3 falls with c; a and b hold each other.
    data = dataset("user,item\nc,3\na,1\na,2\nb,1\nb,2\nc,4\nd,3\nd,4\na,5\n", "item\n9\n1\n2\n3\n4\n5\n", k_core=2)
    assert histories(data) == [["3", "4"], ["1", "2"], ["1", "2"], ["3", "4"]]
    data = dataset("user,item\nc,3\na,1\na,2\nb,1\nb,2\nc,4\nd,3\na,5\n", "item\n9\n1\n2\n3\n4\n5\n", k_core=2)
    assert histories(data) == [["1", "2"], ["1", "2"]]
    assert (data.interactions.users, data.catalogue.ids) == (("a", "b"), ("1", "2"))
    assert (data.cleaning.core_rows, data.cleaning.core_users, data.cleaning.core_items) == (4, 2, 4)
    assert data.cleaning.uncharged == ("k-core 2 survival",)
    with pytest.raises(InvalidConfig, match="k_core=3 leaves nobody"):
        dataset("user,item\na,1\nb,1\n", k_core=3)
    with pytest.raises(InvalidConfig, match="k_core must be"):
        dataset("user,item\na,1\n", k_core=-1)


def test_every_column_follows_its_item_through_appending_and_a_k_core() -> None:
    items = (
        "item,title,genres,category:c,number:n,text:t,vector:v,retired,sensitive\n"
        "1,one,g,c1,1,t1,1 1,yes,g\n2,two,h,c2,2,t2,2 2,yes,h\n3,three,i,c3,3,t3,3 3,no,\n"
    )
    log = "user,item\na,7\na,3\na,1\nb,1\nb,3\nb,7\nb,2\n"
    whole, core_2 = dataset(log, items).catalogue, dataset(log, items, k_core=2).catalogue
    assert whole.ids == ("1", "2", "3", "7")
    assert whole.categories == {"c": ("c1", "c2", "c3", "")}
    assert repr(whole.numbers) == repr({"n": (1.0, 2.0, 3.0, math.nan)})
    assert whole.texts == {"t": ("t1", "t2", "t3", "")}
    assert whole.vectors["v"].tolist() == [[1, 1], [2, 2], [3, 3], [0, 0]]
    assert whole.retired == {"1", "2"}
    assert whole.sensitive == {"g", "h"}
    assert core_2.ids == ("1", "3", "7")
    assert (core_2.titles, core_2.topics) == (("one", "three", "7"), (("g",), ("i",), ()))
    assert core_2.categories == {"c": ("c1", "c3", "")}
    assert repr(core_2.numbers) == repr({"n": (1.0, 3.0, math.nan)})
    assert core_2.texts == {"t": ("t1", "t3", "")}
    assert core_2.vectors["v"].tolist() == [[1, 1], [3, 3], [0, 0]]
    assert core_2.retired == {"1"}
    assert core_2.sensitive == {"g"}


def test_columns_of_either_file_without_a_role_are_reported() -> None:
    data = dataset("user,item,age\na,1,7\n", "item,shelf\n1,A\n")
    assert data.cleaning.ignored_columns == ("age", "shelf")
    assert "columns not used: age, shelf" in data.cleaning.lines()


@given(pairs=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=40), k=st.integers(1, 4))
def test_a_k_core_has_k_of_everything_and_nothing_left_out_could_stay(pairs: Sequence[tuple[int, int]], k: int) -> None:
    users = np.array([u for u, _ in pairs], np.int64)
    items = np.array([i for _, i in pairs], np.int64)
    kept = core(users, items, k)
    for column in (users[kept], items[kept]):
        assert all(np.bincount(column)[column] >= k)
    # the largest core is unique: removing one weak user or item at a time ends in the same place
    alive = np.ones(len(pairs), np.bool_)
    weak = True
    while weak:
        weak = False
        for column in (items, users):
            for value in set(column[alive].tolist()):
                if (column[alive] == value).sum() < k:
                    alive &= column != value
                    weak = True
    assert kept.tolist() == alive.tolist()


def test_the_report_mentions_what_happened_and_nothing_else() -> None:
    assert CleaningReport(rows_read=1200).lines() == ["1,200 rows read"]
    said = "\n".join(
        CleaningReport(
            rows_read=9,
            missing=1,
            malformed=2,
            unknown_items=3,
            duplicates=4,
            repeats=7,
            repeats_dropped=2,
            k_core=5,
            core_rows=6,
            ignored_columns=("age",),
            uncharged=("k-core 5 survival",),
        ).lines()
    )
    for words in (
        "1 skipped: a value is missing",
        "2 skipped: malformed",
        "3 left out: their item",
        "4 left out: same user",
        "5 kept that repeat",
        "2 left out: the same user has the item again",
        "5-core left out 6 rows",
        "columns not used: age",
        "not charged to any privacy budget: k-core 5 survival",
    ):
        assert words in said
