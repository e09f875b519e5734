"""The public catalogue: fixed order, features that are public, rows of length 1."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from penchant.common.catalogue import Catalogue, decade
from penchant.common.errors import InvalidConfig, MalformedData

WORDS = st.sampled_from(("Drama", "Comedy", "1990s", "Ünï", "a b"))
TITLES = st.sampled_from(("Heat (1995)", "Heat", "(2001)", "Alien (1979) ", "1984 (x)"))
ROWS = st.lists(st.tuples(TITLES, st.lists(WORDS, max_size=4).map(tuple)), max_size=6)
FILMS = Catalogue(
    ids=("1", "2", "3"),
    titles=("Toy Story (1995)", "Heat (1995)", "Alien (1979)"),
    topics=(("Animation", "Comedy"), ("Drama",), ()),
)


def test_every_topic_and_decade_is_a_feature_and_a_column_says_who_has_it() -> None:
    assert FILMS.features == ("Animation", "Comedy", "Drama", "1970s", "1990s")
    has = [[1, 1, 0, 0, 1], [0, 0, 1, 0, 1], [0, 0, 0, 1, 0]]
    np.testing.assert_allclose(FILMS.content, np.array(has) / np.sqrt([[3], [2], [1]]), rtol=1e-6)
    assert FILMS.content.dtype == np.float32


@given(rows=ROWS)
@example(rows=[("Heat (1995)", ("1990s",)), ("Heat", ("Drama", "Drama"))])  # a topic twice, and one named as a decade
def test_a_row_has_length_one_or_nothing_public_is_known_of_the_item(rows: list[tuple[str, tuple[str, ...]]]) -> None:
    catalogue = Catalogue(
        ids=tuple(str(i) for i in range(len(rows))), titles=tuple(t for t, _ in rows), topics=tuple(t for _, t in rows)
    )
    known = [bool(topics or decade(title)) for title, topics in rows]
    lengths = np.linalg.norm(catalogue.content.astype(np.float64), axis=1)
    np.testing.assert_allclose(lengths, np.array(known, float), atol=1e-6)
    assert catalogue.content.shape == (len(rows), len(catalogue.features))
    assert len(set(catalogue.features)) == len(catalogue.features)
    for row, (title, topics) in zip(catalogue.content, rows, strict=True):
        named = {name for name, value in zip(catalogue.features, row, strict=True) if value}
        assert named == {*topics, decade(title)} - {""}


@pytest.mark.parametrize(
    ("title", "expected"),
    [("Heat (1995)", "1990s"), ("Heat (2000) ", "2000s"), ("Heat (1995) cut", ""), ("1984", ""), ("Heat (95)", "")],
)
def test_a_decade_is_read_only_from_a_year_that_ends_the_title(title: str, expected: str) -> None:
    assert decade(title) == expected


def test_positions_and_identifiers_are_each_others_inverse() -> None:
    assert len(FILMS) == 3
    assert [FILMS.ids[FILMS.index[item]] for item in ("3", "1")] == ["3", "1"]
    assert "4" not in FILMS.index


@pytest.mark.parametrize(
    "change",
    [
        {"ids": ("1", "2", "4")},
        {"ids": ("2", "1", "3")},
        {"titles": ("Toy Story (1995)", "Heat (1995)", "Aliens (1986)")},
        {"topics": (("Animation",), ("Comedy", "Drama"), ())},
    ],
)
def test_the_version_changes_with_any_item_title_topic_or_place(change: dict[str, tuple[str, ...]]) -> None:
    assert dataclasses.replace(FILMS).version == FILMS.version
    assert len(FILMS.version) == 16
    assert dataclasses.replace(FILMS, **change).version != FILMS.version  # type: ignore[arg-type]  # fields by name


def test_the_version_is_that_of_what_is_in_it_not_of_its_name() -> None:
    assert dataclasses.replace(FILMS, name="other").version == FILMS.version


def test_titles_default_to_identifiers_and_topics_to_none() -> None:
    bare = Catalogue(ids=("a", "b"))
    assert bare.titles == ("a", "b")
    assert bare.topics == ((), ())
    assert bare.content.shape == (2, 0)


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"ids": ("a", "a")}, "unique"),
        ({"ids": ("a", "b"), "titles": ("A",)}, "titles"),
        ({"ids": ("a",), "topics": ((), ())}, "topics"),
    ],
)
def test_columns_that_disagree_and_identifiers_that_repeat_are_refused(
    fields: dict[str, tuple[str, ...]], word: str
) -> None:
    with pytest.raises(InvalidConfig, match=word):
        Catalogue(**fields)  # type: ignore[arg-type]  # fields by name


def test_a_sensitive_topic_is_no_feature_and_is_part_of_record_and_version_only_where_there_is_one() -> None:
    marked = dataclasses.replace(FILMS, sensitive=frozenset({"Drama"}))
    assert marked.features == ("Animation", "Comedy", "1970s", "1990s")
    assert marked.content.shape == (3, 4)
    assert marked.is_sensitive.tolist() == [False, True, False]
    assert marked.version != FILMS.version
    assert marked != FILMS
    assert marked.to_record()["sensitive"] == ["Drama"]
    assert "sensitive" not in FILMS.to_record()
    assert Catalogue.from_record(json.loads(json.dumps(marked.to_record()))).sensitive == {"Drama"}
    with pytest.raises(InvalidConfig, match="'drama' is no topic; did you mean 'Drama'"):
        dataclasses.replace(FILMS, sensitive=frozenset({"drama"}))


# ---------------------------------------------------------------------------------------------------- typed columns

RICH = dataclasses.replace(
    FILMS,
    categories={"studio": ("Pixar", "", "Fox")},
    numbers={"runtime": (81, math.nan, 117.5)},
    texts={"plot": ("玩具 come alive", "", "in space")},
    vectors={"poster": np.array([[1, 2], [0, 0], [3, -4]], np.float32)},
    retired=frozenset({"2"}),
)


def test_the_version_of_a_catalogue_without_typed_columns_is_the_one_that_was_released() -> None:
    # worked out with the revision before there were typed columns; released manifests carry it
    assert FILMS.version == "4a9d0f490377e24d"
    assert dataclasses.replace(FILMS, retired=frozenset({"2"})).version == "e0bea39f64994bb2"


@pytest.mark.parametrize(
    "change",
    [
        {"categories": {"studio": ("Pixar", "Fox", "")}},
        {"categories": {"maker": ("Pixar", "", "Fox")}},
        {"categories": {}, "texts": {"plot": RICH.texts["plot"], "studio": ("Pixar", "", "Fox")}},
        {"numbers": {"runtime": (81, 0.0, 117.5)}},
        {"texts": {"plot": ("玩具 come alive", "in space", "")}},
        {"vectors": {"poster": np.array([[1, 2], [0, 0], [3, 4]], np.float32)}},
        {"vectors": {"poster": np.array([[1], [2], [0]], np.float32)}},
    ],
)
def test_the_version_changes_with_any_value_name_or_kind_of_a_column(change: dict[str, Any]) -> None:
    changed = dataclasses.replace(RICH, **change)
    assert changed.version != RICH.version
    assert changed != RICH
    assert dataclasses.replace(RICH, name="other").version == RICH.version


def test_equal_catalogues_are_equal_unknown_numbers_and_arrays_included() -> None:
    again = dataclasses.replace(RICH, numbers={"runtime": (81.0, -math.nan, 117.5)})
    assert again == RICH
    assert hash(again) == hash(RICH)
    assert RICH != "a catalogue"
    zero = dataclasses.replace(FILMS, numbers={"x": (0.0, 1, 2)})
    assert dataclasses.replace(FILMS, numbers={"x": (-0.0, 1, 2)}) == zero


def test_columns_are_copies_that_nobody_can_write_to() -> None:
    given = {"poster": np.ones((3, 2), np.float32)}
    catalogue = dataclasses.replace(FILMS, vectors=given)
    given["poster"][0] = 9
    given["more"] = given["poster"]
    assert catalogue.vectors["poster"].tolist() == [[1, 1]] * 3
    assert list(catalogue.vectors) == ["poster"]
    with pytest.raises(ValueError, match="read-only"):
        catalogue.vectors["poster"][0] = 9


def test_labels_do_not_move_when_columns_are_added() -> None:
    assert RICH.features == FILMS.features
    np.testing.assert_array_equal(RICH.content, FILMS.content)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"categories": {"studio": ("a", "b")}}, "categories 'studio' needs a name and as many values as ids"),
        ({"texts": {"": ("a", "b", "c")}}, "texts '' needs a name"),
        ({"categories": {"studio": ("a", "b", 3)}}, "'studio' must be text"),
        ({"texts": {"plot": ("a", None, "c")}}, "'plot' must be text"),
        ({"numbers": {"runtime": (1, "long", 3)}}, "'runtime' must be numbers"),
        ({"numbers": {"runtime": (1, math.inf, 3)}}, "'runtime' must be finite"),
        ({"vectors": {"poster": np.zeros((2, 4))}}, "as many values as ids"),
        ({"vectors": {"poster": np.zeros(3)}}, r"must be float32\[n, d\]"),
        ({"vectors": {"poster": np.zeros((3, 0))}}, r"must be float32\[n, d\]"),
        ({"vectors": {"poster": [[1], [2, 3], [4]]}}, "must be rows of numbers"),
        ({"vectors": {"poster": np.array([[math.nan], [0], [0]])}}, "must be finite; give an item without"),
        ({"vectors": {"poster": np.array([[1e39], [0], [0]])}}, "must be finite"),
    ],
)
def test_a_column_that_is_not_what_its_kind_says_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidConfig, match=words) as error:
        dataclasses.replace(FILMS, **fields)
    assert "\n" not in str(error.value)


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)


@given(data=st.data(), n=st.integers(0, 4))
def test_a_record_gives_back_every_field(data: st.DataObject, n: int) -> None:
    def column(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        rows = st.lists(values, min_size=n, max_size=n).map(tuple)
        return st.dictionaries(st.text("abc", min_size=1, max_size=2), rows, max_size=2)

    ids = tuple(f"i{i}" for i in range(n))
    pairs = st.lists(st.tuples(st.floats(width=32, allow_nan=False, allow_infinity=False), st.just(0.5)), min_size=n)
    catalogue = Catalogue(
        ids=ids,
        titles=data.draw(st.lists(TEXT, min_size=n, max_size=n).map(tuple)),
        topics=data.draw(st.lists(st.lists(TEXT, max_size=2).map(tuple), min_size=n, max_size=n).map(tuple)),
        retired=data.draw(st.frozensets(st.sampled_from(ids))) if n else frozenset(),
        name="films",
        categories=data.draw(column(TEXT)),
        numbers=data.draw(column(st.floats(allow_infinity=False))),
        texts=data.draw(column(TEXT)),
        vectors={"v": np.array(data.draw(pairs)[:n], np.float32).reshape(n, 2)},
    )
    again = Catalogue.from_record(json.loads(json.dumps(catalogue.to_record(), allow_nan=False)))
    assert again == catalogue
    for field in ("ids", "titles", "topics", "retired", "name", "categories", "texts"):
        assert getattr(again, field) == getattr(catalogue, field)
    assert repr(again.numbers) == repr(catalogue.numbers)  # NaN is not equal to itself
    np.testing.assert_array_equal(again.vectors["v"], catalogue.vectors["v"])


def test_every_field_of_a_catalogue_is_in_its_record() -> None:
    every = dataclasses.replace(RICH, sensitive=frozenset({"Drama"}))
    assert set(every.to_record()) == {field.name for field in dataclasses.fields(Catalogue)}


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"tags": {"1": ["slow"]}}, MalformedData, "unknown field 'tags'"),
        ({"ids": 3}, MalformedData, "not a catalogue record"),
        ({"vectors": {"poster": {"width": 3, "float32": "AAAA"}}}, MalformedData, "not a catalogue record"),
        ({"vectors": {"poster": {"width": 1, "float32": "é"}}}, MalformedData, "not a catalogue record"),
        ({"texts": ["plot"]}, MalformedData, "not a catalogue record"),
        ({"retired": ["9"]}, InvalidConfig, "retired item '9'"),
    ],
)
def test_a_record_that_is_not_one_is_refused(change: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        Catalogue.from_record({**RICH.to_record(), **change})
    with pytest.raises(MalformedData, match="KeyError: 'ids'"):
        Catalogue.from_record({"name": "films"})
