"""Content as numbers: rows of length 1 or zero, the same on every machine, in any language, all from public columns."""

from __future__ import annotations

import dataclasses
import math
import unicodedata
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from sklearn.feature_extraction.text import TfidfVectorizer

from penchant.common.arrays import Float32, Float64, content_digest
from penchant.common.catalogue import Catalogue
from penchant.common.content import ContentConfig, condensed, features, hashed, terms
from penchant.common.errors import InvalidConfig

KINDS = ("labels", "categories", "numbers", "texts", "titles", "vectors")
FILMS = Catalogue(
    ids=("1", "2", "3", "4"),
    titles=("Toy Story (1995)", "Heat (1995)", "Alien (1979)", "Untitled"),
    topics=(("Animation", "Comedy"), ("Drama",), (), ()),
)
RICH = dataclasses.replace(
    FILMS,
    categories={"country": ("us", "us", "uk", ""), "studio": ("Pixar", "", "Fox", "")},
    numbers={"runtime": (81.0, 170.0, 117.0, math.nan)},
    texts={"plot": ("toys come alive", "cops and robbers", "a creature in space", "")},
    vectors={"poster": np.array([[1, 0], [0, 2], [3, 4], [0, 0]], np.float32)},
)


def alone(kind: str, **more: Any) -> ContentConfig:
    """Only this kind counts."""
    weights: dict[str, Any] = {name: float(name == kind) for name in KINDS}
    return ContentConfig(**weights, **more)


def numbers(*values: float, knots: int = 8) -> Float32:
    catalogue = Catalogue(ids=tuple(map(str, range(len(values)))), numbers={"x": values})
    return features(catalogue, alone("numbers", knots=knots))


def cosines(texts: list[str], **options: Any) -> Float64:
    rows = hashed(texts, ContentConfig(**options))
    return rows @ rows.T


# --------------------------------------------------------------------------------------------------- whole rows


@given(
    rows=st.lists(
        st.tuples(
            st.sampled_from(("Heat (1995)", "Heat", "Alien (1979)")),
            st.lists(st.sampled_from(("Drama", "War", "1990s")), max_size=4).map(tuple),
        ),
        max_size=5,
    )
)
def test_titles_and_topics_alone_give_the_rows_they_always_gave_bit_for_bit(
    rows: list[tuple[str, tuple[str, ...]]],
) -> None:
    catalogue = Catalogue(
        ids=tuple(str(i) for i in range(len(rows))), titles=tuple(t for t, _ in rows), topics=tuple(t for _, t in rows)
    )
    found = features(catalogue)
    assert found.dtype == catalogue.content.dtype
    assert found.shape == catalogue.content.shape
    assert found.tobytes() == catalogue.content.tobytes()


WEIGHT = st.sampled_from((0.0, 1e-3, 0.5, 1.0, 7.0))
PAIRS = ((0.0, 0.0), (1e-30, 0.0), (3e38, 3e38))
WORD = st.sampled_from(("", "a", "b b", "東京", "!"))


@given(data=st.data(), n=st.integers(0, 5))
def test_a_row_has_length_one_or_is_zero_whatever_is_known(data: st.DataObject, n: int) -> None:
    def rows(values: st.SearchStrategy[Any]) -> tuple[Any, ...]:
        return tuple(data.draw(st.lists(values, min_size=n, max_size=n)))

    catalogue = Catalogue(
        ids=tuple(str(i) for i in range(n)),
        topics=rows(st.sampled_from(((), ("Drama",)))),
        categories={"c": rows(WORD), "d": rows(WORD)},
        numbers={"x": rows(st.floats(allow_infinity=False)), "y": rows(st.sampled_from((math.nan, 1.0)))},
        texts={"t": rows(WORD)},
        vectors={
            "v": np.array(rows(st.sampled_from(((0.0, 0.0), (1e-30, 0.0), (3e38, 3e38)))), np.float32).reshape(n, 2)
        },
    )
    weights: dict[str, Any] = {name: data.draw(WEIGHT) for name in KINDS}
    found = features(catalogue, ContentConfig(**weights, width=16))
    assert found.dtype == np.float32
    lengths = np.linalg.norm(found.astype(np.float64), axis=1)
    assert np.all((np.abs(lengths - 1) < 1e-6) | (lengths == 0))


def test_a_kind_counts_by_its_weight_and_what_is_missing_takes_nothing_from_the_rest() -> None:
    config = ContentConfig(categories=3.0, texts=0.0, vectors=0.0, numbers=0.0)
    rows = features(RICH, config).astype(np.float64)
    labels, categories = rows[:, :5], rows[:, 5:]
    shares = [[1 / np.sqrt(10), 3 / np.sqrt(10)]] * 3 + [[0, 0]]
    np.testing.assert_allclose(
        np.stack([np.linalg.norm(labels, axis=1), np.linalg.norm(categories, axis=1)], axis=1), shares, atol=1e-6
    )
    # us | uk: country is the first column by name; then Fox | Pixar. Heat has no studio, so its country is all of it.
    two = 3 / np.sqrt(10) / np.sqrt(2)
    expected = [[0, two, 0, two], [0, 3 / np.sqrt(10), 0, 0], [two, 0, two, 0], [0, 0, 0, 0]]
    np.testing.assert_allclose(categories, expected, atol=1e-6)


def test_among_labels_a_year_may_count_more_or_less_than_a_topic() -> None:
    rows = features(FILMS, ContentConfig(years=0.5))
    np.testing.assert_allclose(rows[0], np.array([1, 1, 0, 0, 0.5]) / 1.5, rtol=1e-6)
    assert not features(FILMS, ContentConfig(years=0.0))[2].any()
    both = Catalogue(ids=("1",), titles=("Heat (1995)",), topics=(("1990s", "Drama"),))
    np.testing.assert_allclose(features(both, ContentConfig(years=2.0)), np.array([[2, 1]]) / np.sqrt(5), rtol=1e-6)
    assert features(FILMS, ContentConfig(labels=0.0)).shape == (4, 0)


def test_titles_count_nothing_unless_asked_and_then_without_their_year() -> None:
    films = dataclasses.replace(FILMS, topics=())
    assert features(films).shape == (4, 2)
    rows = features(films, alone("titles"))
    np.testing.assert_allclose(rows, hashed(["Toy Story", "Heat", "Alien", "Untitled"], ContentConfig()), atol=1e-7)


def test_the_rows_of_a_rich_catalogue_are_those_that_every_machine_finds() -> None:
    # Golden: Python 3.12, NumPy 2.4, x86-64. Logarithms, hashes and sums here do not depend on the processor.
    digest = content_digest({"rows": features(RICH, ContentConfig(titles=0.5))})
    assert digest[:16] == "e93bb7492a4fe99a"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(
            (name, bad)
            for name in ("labels", "topics", "years", "texts", "vectors")
            for bad in (-1.0, 1e-7, math.nan, math.inf)
        ),
        ("width", 15),
        ("width", 65_537),
        ("knots", 1),
        ("shortest", 0),
        ("longest", 1),  # less than shortest
    ],
)
def test_an_option_out_of_range_is_named(field: str, value: float) -> None:
    with pytest.raises(InvalidConfig, match=field):
        ContentConfig(**{field: value})  # type: ignore[arg-type]  # fields by name


# -------------------------------------------------------------------------------------- categories, numbers, vectors


def test_more_words_than_the_width_are_hashed_and_the_same_word_still_meets_itself() -> None:
    words = (*(f"w{i}" for i in range(40)), "w7", "")
    catalogue = Catalogue(ids=tuple(map(str, range(42))), categories={"c": words})
    assert features(catalogue, alone("categories", width=64)).shape == (42, 40)
    rows = features(catalogue, alone("categories", width=16))
    assert rows.shape == (42, 16)
    np.testing.assert_array_equal(rows[40], rows[7])
    assert not rows[41].any()
    assert np.all(np.abs(rows[:41]).sum(axis=1) == 1)


def test_a_number_is_shared_between_the_knots_beside_it() -> None:
    # knots are the least, the lower median and the greatest: 0, 10, 40; 20 is a third of the way from 10 to 40
    expected = [[1, 0, 0], [0, 1, 0], np.array([0, 2, 1]) / np.sqrt(5), [0, 0, 1]]
    np.testing.assert_allclose(numbers(0, 10, 20, 40, knots=3), np.array(expected), rtol=1e-6)


def test_near_numbers_are_alike_and_far_ones_are_not() -> None:
    values = [*map(float, range(0, 100, 10)), 50.0, 52.0]
    like = (rows := numbers(*values, knots=5)) @ rows.T
    assert like[10, 5] == pytest.approx(1)
    assert like[10, 5] > like[10, 11] > like[10, 8] == 0


@given(
    values=st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=12),
    scale=st.sampled_from((2.0**-20, 2.0, 2.0**20)),
)
def test_a_unit_of_measure_changes_nothing(values: list[float], scale: float) -> None:
    np.testing.assert_allclose(numbers(*values), numbers(*(v * scale for v in values)), atol=1e-6)


def test_one_outlier_does_not_push_the_others_together() -> None:
    calm, wild = (numbers(*map(float, range(20)), last) for last in (20.0, 1e12))
    np.testing.assert_allclose(wild[:15], calm[:15], atol=1e-6)


@given(values=st.lists(st.floats(allow_infinity=False), max_size=8))
@example(values=[1.7e308, -1.7e308])
@example(values=[5e-324, 0.0, 1e-323])
@example(values=[math.nan, math.nan])
def test_any_number_has_a_row_and_an_unknown_one_has_none(values: list[float]) -> None:
    lengths = np.linalg.norm(numbers(*values).astype(np.float64), axis=1)
    np.testing.assert_allclose(lengths, [float(not math.isnan(v)) for v in values], atol=1e-6)


def test_a_given_vector_keeps_its_direction() -> None:
    expected = np.array([[1, 0], [0, 1], [0.6, 0.8], [0, 0]])
    np.testing.assert_allclose(features(RICH, alone("vectors")), expected, rtol=1e-6)


# ------------------------------------------------------------------------------------------------------------ text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        (" —!… ", []),
        ("The STRASSE, the Straße", ["the", "strasse", "the", "strasse"]),
        ("ﬁlm ＡＢＣ １９９５", ["film", "abc", "1995"]),
        ("don't stop", ["don", "t", "stop"]),
        ("Привет, мир", ["привет", "мир"]),
        ("हिन्दी फ़िल्म", ["हिन्दी", "फ़िल्म"]),  # vowel signs belong to their words
        ("太空", ["太空"]),
        ("我", ["我"]),
        ("《太空歌剧》", ["太空", "空歌", "歌剧", "太空歌", "空歌剧"]),
        ("iPhone手机 2代", ["iphone", "手机", "2", "代"]),
        ("ｶﾀｶﾅ", ["カタ", "タカ", "カナ", "カタカ", "タカナ"]),
        ("영화가", ["영화", "화가", "영화가"]),
        ("หนังดี", ["หน", "นั", "ัง", "งด", "ดี", "หนั", "นัง", "ังด", "งดี"]),
    ],
)
def test_a_text_is_words_or_pieces_where_no_space_divides_them(text: str, expected: list[str]) -> None:
    assert terms(text) == [unicodedata.normalize("NFKC", term) for term in expected]


def test_accents_that_are_written_in_two_ways_are_one() -> None:
    assert terms("Cafe\u0301") == terms("Caf\u00e9")


@given(text=st.text(max_size=30))
def test_no_text_breaks_and_terms_have_no_spaces(text: str) -> None:
    assert all(term and not term.isspace() for term in terms(text))
    assert np.isfinite(hashed([text, "a"], ContentConfig(width=16))).all()


TEXTS = [
    "a robber plans one last heist",
    "the last heist of a careful robber",
    "robots fall in love in space",
    "a love story of two cooks",
    "cooks cooks cooks and soup",
]


def test_without_collisions_cosines_are_those_of_scikit_learn_tf_idf() -> None:
    other = TfidfVectorizer(sublinear_tf=True, token_pattern=r"(?u)\b\w+\b")  # its idf is smooth by default
    exact = other.fit_transform(TEXTS)
    np.testing.assert_allclose(cosines(TEXTS, width=65_536), (exact @ exact.T).toarray(), atol=1e-6)


def test_collisions_cancel_on_average_because_they_have_signs() -> None:
    # 400 texts of 20 words each, no word twice: true cosines are 0. A mean of 79,800 pairs, each about 1/√width.
    texts = [" ".join(f"w{i}x{j}" for j in range(20)) for i in range(400)]
    pairs = cosines(texts, width=64)[np.triu_indices(400, 1)]
    assert abs(pairs.mean()) < 0.01
    assert pairs.std() == pytest.approx(1 / 8, rel=0.05)
    rows = np.abs(hashed(texts, ContentConfig(width=64)))  # without signs
    assert (rows @ rows.T)[np.triu_indices(400, 1)].mean() > 0.1


ENGLISH = [
    "A retired detective hunts a serial killer in the city.",
    "The detective must find the killer before the city panics.",
    "A young chef opens a small restaurant by the sea.",
    "In a restaurant by the sea, a chef learns to cook again.",
]
CHINESE = [
    "退休侦探在城市里追捕连环杀手。",
    "侦探必须在城市恐慌之前找到杀手。",
    "年轻厨师在海边开了一家小餐馆。",
    "在海边的餐馆里，一位厨师重新学习做菜。",
]


@pytest.mark.parametrize("texts", [ENGLISH, CHINESE], ids=["English", "Chinese"])
def test_texts_about_the_same_are_nearer_in_either_language(texts: list[str]) -> None:
    like = cosines(texts)
    assert min(like[0, 1], like[2, 3]) > max(like[0, 2], like[0, 3], like[1, 2], like[1, 3]) + 0.05


def test_a_mixed_catalogue_keeps_its_languages_apart() -> None:
    like = cosines([*ENGLISH, *CHINESE], width=4096)
    assert np.abs(like[:4, 4:]).max() < 0.05


def test_the_order_in_which_columns_are_given_is_no_matter() -> None:
    backwards = dataclasses.replace(RICH, categories=dict(reversed(list(RICH.categories.items()))))
    assert features(backwards).tobytes() == features(RICH).tobytes()
    assert backwards.version == RICH.version


def test_every_column_of_a_kind_is_used() -> None:
    two = dataclasses.replace(RICH, texts={**RICH.texts, "hook": ("", "", "", "no one can hear you")})
    rows = features(two, alone("texts", width=32))
    assert rows.shape == (4, 64)
    assert rows[3, :32].any()  # hook comes before plot
    assert not rows[3, 32:].any()


def test_few_columns_stay_as_they_are_and_many_keep_their_inner_products() -> None:
    few = np.random.default_rng(0).standard_normal((20, 5)).astype(np.float32)
    assert condensed(few, 5) is few
    hidden = np.random.default_rng(1).standard_normal((40, 6)) @ np.random.default_rng(2).standard_normal((6, 30))
    rows = (hidden / np.linalg.norm(hidden, axis=1, keepdims=True)).astype(np.float32)
    found = condensed(rows, 6)  # as many as the rows really have
    assert found.shape == (40, 6)
    np.testing.assert_allclose(found @ found.T, rows @ rows.T, atol=1e-5)
    assert np.abs(condensed(rows, 5) @ condensed(rows, 5).T - rows @ rows.T).max() > 1e-3
    assert np.linalg.norm(condensed(rows, 3), axis=1).max() <= 1 + 1e-6
    wide = np.hstack([rows, np.zeros((40, 200), np.float32)])  # more columns than items
    np.testing.assert_allclose(condensed(wide, 6) @ condensed(wide, 6).T, rows @ rows.T, atol=1e-5)
