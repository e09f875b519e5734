"""The public catalogue: fixed order, features that are public, rows of length 1."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from penchant.common.catalogue import Catalogue, decade
from penchant.common.errors import InvalidConfig

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
