"""Compact columns: the tuple of their values in every way that a reader can tell, and found by no hash alone."""

from __future__ import annotations

import pickle
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from penchant.common import compact
from penchant.common.compact import Column, Places, Shared, Strings

TEXTS = st.lists(st.text(max_size=4), max_size=9)
HASHES: list[Callable[[bytes], int]] = [zlib.crc32, len, lambda text: 7, lambda text: (1 << 32) - 1]
"""The one in use, and some that give the same for different strings."""


def hashed(monkeypatch: pytest.MonkeyPatch, by: Callable[[bytes], int]) -> None:
    monkeypatch.setattr(compact, "_hash", by)


@given(values=TEXTS, block=st.integers(1, 4))
@example(values=[""], block=1)
@example(values=["", "", "ÿ", "\x00", '","', "\U0010ffff"], block=2)
def test_strings_are_the_tuple_of_their_values(values: list[str], block: int) -> None:
    whole = tuple(values)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compact, "_BLOCK", block)
        found = Strings.of(values)
        same_as_the_tuple(found, whole)
        assert Strings(found.text) == found == pickle.loads(pickle.dumps(found))
        assert Strings.of(found) is found
        assert found != (*whole, "")
        assert found != list(values)


@given(values=st.lists(st.lists(st.text(max_size=2), max_size=2).map(tuple), max_size=9))
def test_shared_values_are_the_tuple_of_them_and_each_is_kept_once(values: list[tuple[str, ...]]) -> None:
    found = Shared.of(values)
    same_as_the_tuple(found, tuple(values))
    assert len(set(found.values)) == len(found.values)
    assert set(found.values) == set(values)
    assert Shared(found.values, found.codes) == found == pickle.loads(pickle.dumps(found))
    with pytest.raises(ValueError, match="read-only"):
        found.codes[:] = 0


def same_as_the_tuple(found: Column[Any], whole: tuple[object, ...]) -> None:
    n = len(whole)
    assert len(found) == n
    assert found == whole
    assert whole == found
    assert hash(found) == hash(whole)
    assert tuple(found) == whole
    assert [found[i] for i in range(-n, n)] == [*whole, *whole]
    assert [found[np.int64(i)] for i in range(n)] == list(whole)
    for cut in (slice(None), slice(1, 3), slice(None, None, -2), slice(-2, 99)):
        assert found[cut] == whole[cut]
    for outside in (n, -n - 1):
        with pytest.raises(IndexError):
            found[outside]
    with pytest.raises(TypeError):
        found["0"]  # type: ignore[call-overload]  # as for a tuple


@pytest.mark.parametrize("by", HASHES)
@given(values=st.lists(st.text(max_size=4), max_size=9, unique=True), others=TEXTS)
@example(values=["b", "a", "ab"], others=["", "ba", "\ud800"])  # half a character is no string's, and no error
def test_what_is_there_is_found_and_nothing_else_though_hashes_be_equal(
    by: Callable[[bytes], int], values: list[str], others: list[str]
) -> None:
    expected = {value: i for i, value in enumerate(values)}
    with pytest.MonkeyPatch.context() as patch:
        hashed(patch, by)
        places = Places(Strings.of(values))
        assert places == expected
        assert list(places) == values
        assert [places.get(other) for other in others] == [expected.get(other) for other in others]
        assert None not in places
        with pytest.raises(KeyError):
            places["no such string"]


@pytest.mark.parametrize("by", HASHES)
@given(values=TEXTS)
@example(values=["a", "b", "b"])
@example(values=["b", "a", "b"])
def test_a_string_that_is_there_twice_is_told_from_two_of_one_hash(
    by: Callable[[bytes], int], values: list[str]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        hashed(patch, by)
        found = Strings.of(values)
        assert found.are_unique == (len(set(values)) == len(values))
        assert [found.find(value) for value in values] == [values.index(value) for value in values]


def test_the_hash_is_the_same_in_every_process() -> None:
    # the check value of CRC-32/ISO-HDLC: https://reveng.sourceforge.io/crc-catalogue/17plus.htm
    assert [hex(key) for key in Strings.of(["123456789"]).keys.tolist()] == ["0xcbf4392600000000"]


@pytest.mark.parametrize(("values", "error"), [(["a", "\udcff"], ValueError), (["a", 3], TypeError), (3, TypeError)])
def test_half_a_character_and_what_is_no_string_are_refused(values: list[str], error: type[Exception]) -> None:
    with pytest.raises(error):
        Strings.of(values)
