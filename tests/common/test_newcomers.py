"""New items get the numbers that their public features predict, and nobody else's change."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from penchant.common.learners.newcomers import from_content, grown

CONTENT = np.eye(3, dtype=np.float32)[[0, 0, 0, 1, 1, 2, 0, 1, 2]]
KNOWN = np.array([True] * 6 + [False] * 3)


def test_a_newcomer_gets_its_kinds_mean_as_the_pull_vanishes() -> None:
    values = np.array([[1.0], [2.0], [3.0], [10.0], [20.0], [7.0], [99.0], [99.0], [99.0]], np.float32)
    found = from_content(values, KNOWN, CONTENT, ridge=1e-6)
    np.testing.assert_allclose(found[:, 0], [1, 2, 3, 10, 20, 7, 2, 15, 7], rtol=1e-4)  # what stood there is not read


def test_a_strong_pull_leaves_nothing_of_what_was_learned() -> None:
    values = np.full((9, 2), 5.0, np.float32)
    found = from_content(values, KNOWN, CONTENT, ridge=1e9)
    assert np.abs(found[6:]).max() < 1e-6
    np.testing.assert_array_equal(found[:6], 5.0)


def test_an_item_without_features_gets_the_average() -> None:
    content = np.zeros((5, 0), np.float32)
    values = np.array([2.0, 4.0, 6.0, 0.0, 0.0], np.float32)
    found = from_content(values, np.array([True, True, True, False, False]), content, ridge=1e-9)
    np.testing.assert_allclose(found, [2, 4, 6, 4, 4], rtol=1e-5)


def test_with_nobody_or_everybody_known_nothing_changes() -> None:
    values = np.arange(9, dtype=np.float32)
    for known in (np.zeros(9, np.bool_), np.ones(9, np.bool_)):
        np.testing.assert_array_equal(from_content(values, known, CONTENT), values)


@given(place=st.permutations(range(7)).map(lambda p: np.array(p[:4])))
def test_rows_move_to_their_places_and_the_rest_is_zero(place: np.ndarray) -> None:
    values = np.arange(8.0).reshape(4, 2) + 1
    moved, known = grown(values, place, 7)
    np.testing.assert_array_equal(moved[place], values)
    assert not moved[~known].any()
    assert set(np.flatnonzero(known)) == set(place.tolist())
