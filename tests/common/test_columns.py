"""Populations in folders: what comes back is what was written, in any blocks, and half a population is none."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penchant.common import columns
from penchant.common.columns import ColumnWriter
from penchant.common.errors import InvalidConfig, MalformedData
from penchant.common.interactions import History, Interactions, runs

N_ITEMS = 9
HISTORIES = st.lists(st.lists(st.integers(0, N_ITEMS - 1), max_size=6), max_size=8)
RICH = replace(
    Interactions.of([[3, 1], [], [8, 8, 0], [2]], N_ITEMS),
    users=("ann", "bea", "嘉", ""),
    events=np.array([0, 1, 1, 0, 0, 1], np.uint8),
    event_names=("rate", "view"),
    context={
        "device": np.array(["tv", "", "phone", "tv", "tv", "phone"], object),
        "day": np.array(["7"] * 6, object),
    },
)


def same(a: Interactions, b: Interactions) -> bool:
    """Equal in every column, type and name."""

    def told(people: Interactions) -> dict[str, Any]:
        arrays = {name: getattr(people, name) for name in ("offsets", "items", "times", "strengths", "events")}
        arrays |= {f"context {name}": column for name, column in people.context.items()}
        lists = {name: None if v is None else (v.dtype.str, v.tolist()) for name, v in arrays.items()}
        return lists | {"n_items": people.n_items, "users": people.users, "event_names": people.event_names}

    return told(a) == told(b)


# -------------------------------------------------------------------------------------------------------- in memory


@given(histories=HISTORIES, users=st.data())
def test_selected_people_are_those_asked_for_and_views_where_they_stand_together(
    histories: list[list[int]], users: st.DataObject
) -> None:
    people = Interactions.of(histories, N_ITEMS)
    asked = users.draw(st.lists(st.integers(0, len(histories) - 1), max_size=6) if histories else st.just([]))
    first = users.draw(st.integers(0, len(histories)))
    stretch = list(range(first, users.draw(st.integers(first, len(histories)))))
    for own in (asked, stretch):
        found = people.select(own)
        assert [h.items.tolist() for h in found] == [histories[u] for u in own]
        assert [h.times.tolist() for h in found] == [list(range(len(histories[u]))) for u in own]
    if stretch and sum(map(len, histories)):
        assert people.select(stretch).items.base is not None
        assert np.shares_memory(people.select(stretch).items, people.items) == bool(len(people.select(stretch)))
    assert same(RICH.select([2, 3]), RICH.select([3, 2, 2]).select([1, 0]))  # a view and a copy, every column


@given(lengths=st.lists(st.integers(0, 20), max_size=12), size=st.integers(1, 30))
def test_runs_hold_everybody_once_in_order_and_are_as_long_as_they_may_be(lengths: list[int], size: int) -> None:
    cut = list(runs(np.array(lengths, np.int64), size))
    assert [u for run in cut for u in range(run.start, run.stop)] == list(range(len(lengths)))
    rows = [sum(n + 1 for n in lengths[run]) for run in cut]
    assert all(n <= size or run.stop - run.start == 1 for n, run in zip(rows, cut, strict=True))
    for run in cut[:-1]:  # the next person has no room
        assert sum(n + 1 for n in lengths[run.start : run.stop + 1]) > size


def test_items_outside_a_catalogue_are_left_out_at_either_end() -> None:
    assert History.of([3, -1, 0]).known(4).items.tolist() == [3, 0]
    people = Interactions.of([[3, 4], [-1]], 5)
    assert [h.items.tolist() for h in people.known(4)] == [[3], []]
    assert people.select([0]).known(5).items.tolist() == [3, 4]


# ---------------------------------------------------------------------------------------------------------- folders


@given(histories=HISTORIES, cuts=st.lists(st.integers(0, 8), max_size=3))
def test_a_population_written_in_any_blocks_comes_back_as_it_was(
    histories: list[list[int]], cuts: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    people, folder = Interactions.of(histories, N_ITEMS), tmp_path_factory.mktemp("people")
    edges = [0, *sorted(min(cut, len(histories)) for cut in cuts), len(histories)]
    with ColumnWriter(folder, n_items=N_ITEMS) as writer:
        for first, end in itertools.pairwise(edges):
            writer.add(people.select(range(first, end)))
    assert same(columns.load(folder), people)


def test_names_events_and_context_come_back_in_two_blocks(tmp_path: Path) -> None:
    with ColumnWriter(tmp_path, n_items=N_ITEMS) as writer:
        writer.add(RICH.select([0, 1]))
        writer.add(RICH.select([2, 3]))
    assert same(columns.load(tmp_path), RICH)
    assert not same(columns.load(tmp_path), RICH.select([0, 1, 3, 2]))


def test_columns_are_mapped_from_the_files_and_cannot_be_written(tmp_path: Path) -> None:
    columns.save(RICH, tmp_path)
    found = columns.load(tmp_path)
    for name in ("items", "times", "strengths", "offsets"):
        column = getattr(found.select([1, 2, 3]) if name != "offsets" else found, name)
        whose = column
        while isinstance(whose, np.ndarray) and not isinstance(whose, np.memmap):
            whose = whose.base
        assert isinstance(whose, np.memmap), name
        with pytest.raises(ValueError, match="read-only"):
            column[0] = 0


def test_a_file_is_plain_npy_that_any_reader_reads(tmp_path: Path) -> None:
    columns.save(RICH, tmp_path)
    assert (tmp_path / "items.npy").stat().st_size == 128 + RICH.items.nbytes
    np.testing.assert_array_equal(np.load(tmp_path / "items.npy", allow_pickle=False), RICH.items)


def test_a_writer_that_failed_leaves_what_was_there_and_a_folder_that_says_what_is_wrong_where_nothing_was(
    tmp_path: Path,
) -> None:
    def break_off(folder: Path) -> None:
        with ColumnWriter(folder, n_items=N_ITEMS) as writer:
            writer.add(Interactions.of([[1]], N_ITEMS))
            raise KeyError

    with pytest.raises(KeyError):
        break_off(tmp_path / "new")
    with pytest.raises(MalformedData, match="holds no population, or one that was not finished"):
        columns.load(tmp_path / "new")
    columns.save(RICH, tmp_path / "old")
    kept = columns.load(tmp_path / "old")
    with pytest.raises(KeyError):
        break_off(tmp_path / "old")
    assert same(columns.load(tmp_path / "old"), RICH)
    columns.save(Interactions.of([[1]], N_ITEMS), tmp_path / "old")
    assert len(columns.load(tmp_path / "old")) == 1
    assert same(kept, RICH)  # who reads the old one goes on
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize(
    "other",
    [
        replace(RICH, users=()),
        replace(RICH, events=None),
        replace(RICH, event_names=("view", "rate")),
        replace(RICH, context={"device": RICH.context["device"]}),
    ],
)
def test_people_with_other_columns_are_refused(other: Interactions, tmp_path: Path) -> None:
    def write(*blocks: Interactions) -> None:
        with ColumnWriter(tmp_path, n_items=N_ITEMS) as writer:
            for block in blocks:
                writer.add(block)

    for blocks in ((RICH, other), (other, RICH)):
        with pytest.raises(InvalidConfig, match="same columns"):
            write(*blocks)
    write(other, other)


def about(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "columns.json"
        path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")

    return change


def column(name: str, values: np.ndarray) -> Callable[[Path], None]:
    return lambda folder: np.save(folder / f"{name}.npy", values)


def cut_short(folder: Path) -> None:
    with (folder / "times.npy").open("r+b") as file:
        file.truncate(150)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (shutil.rmtree, "holds no population"),
        (lambda folder: (folder / "columns.json").write_bytes(b"\xff{"), "columns.json: cannot be read"),
        (about(format="somebody's/2"), "columns.json: is not penchant-columns/1"),
        (about(columns=["../../etc/passwd"]), "columns.json: names other columns"),
        (about(columns=["items", "times", "strengths"]), "columns.json: names other columns"),
        (about(context=[]), "columns.json: names other columns"),
        (about(context=[["day", []], ["device", ["tv"]]]), "columns.json: does not fit"),
        (about(context=7), "columns.json: cannot be read"),
        (about(n_items="9"), "columns.json: does not fit"),
        (about(users=["ann"]), "columns.json: does not fit"),
        (about(event_names=None), "columns.json: does not fit"),
        (lambda folder: (folder / "items.npy").unlink(), "items.npy: is missing"),
        (cut_short, "times.npy: is cut short"),
        (lambda folder: (folder / "items.npy").write_bytes(b"not an array"), "items.npy: is cut short"),
        (column("items", np.array([{}] * 6, object)), "items.npy: is cut short or no column"),
        (column("items", RICH.items.astype(np.int64)), "items.npy: is of another type"),
        (column("items", RICH.items[:, None]), "items.npy: is of another type"),
        (column("strengths", RICH.strengths[1:]), "strengths.npy: is not as long"),
        (column("offsets", RICH.offsets - 1), "offsets.npy: does not fit"),
        (column("offsets", RICH.offsets[:-1]), "offsets.npy: does not fit"),
        (column("offsets", np.array([0, 4, 2, 6])), "offsets.npy: does not fit"),
        (column("offsets", np.zeros(0, np.int64)), "offsets.npy: does not fit"),
    ],
)
def test_a_folder_that_is_not_a_whole_population_is_refused_in_one_line(
    change: Callable[[Path], Any], says: str, tmp_path: Path
) -> None:
    folder = tmp_path / "people"
    columns.save(RICH, folder)
    change(folder)
    with pytest.raises(MalformedData, match=says) as caught:
        columns.load(folder)
    assert "\n" not in str(caught.value)
