"""Streams repeat by name and numbers, and no draw depends on the order of work."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from penchant.common.streams import People, Streams, words


def first(streams: Streams, name: str, *numbers: int) -> float:
    return streams.get(name, *numbers).random()


def test_a_stream_is_the_same_whatever_was_drawn_before_it() -> None:
    streams = Streams(7)
    expected = streams.get("negatives", 3, 41).random(5)
    streams.get("negatives", 3, 40).random(1000)
    streams.get("noise").standard_normal(1000)
    np.testing.assert_array_equal(streams.get("negatives", 3, 41).random(5), expected)
    np.testing.assert_array_equal(Streams(7).get("negatives", 3, 41).random(5), expected)


def test_a_stream_never_changes_between_versions() -> None:
    # Worked out once with NumPy 2.4: another value means that no published run repeats.
    bits = Streams(7).get("negatives", 3, 41).bit_generator.random_raw(2)
    assert np.asarray(bits).tolist() == [4859641827972255076, 9521358599423463810]


def test_another_root_name_or_number_gives_another_stream() -> None:
    calls: list[tuple[str, tuple[int, ...]]] = [
        *((name, ()) for name in ("a", "b", "aa", "", "a 1", "noise")),
        *(("a", (n,)) for n in (0, 1, 2, 2**32 - 1)),
        *(("a", pair) for pair in ((0, 0), (0, 1), (1, 0), (1, 1), (0, 0, 0))),
    ]
    firsts = [first(Streams(root), name, *numbers) for root in (0, 1, 2**200) for name, numbers in calls]
    assert len(set(firsts)) == len(firsts)
    assert first(Streams(1), "a", 2) == first(Streams(1), "a", 2)  # equality can be seen


def test_neighbouring_streams_are_not_correlated() -> None:
    # 20,000 products of two independent normals: their mean strays 0.05 (7 stddevs) for 1 seed in 1e11.
    people = np.array([Streams(1).get("local", 2, user).standard_normal(20_000) for user in range(4)])
    correlation = np.corrcoef(people)
    assert np.abs(correlation - np.eye(4)).max() < 0.05
    shared = people + people[:1]
    assert np.abs(np.corrcoef(shared) - np.eye(4)).max() > 0.05


@pytest.mark.parametrize("number", [-1, 2**32])
def test_a_number_that_could_be_read_as_two_is_refused(number: int) -> None:
    with pytest.raises(ValueError, match="numbers of a stream"):
        Streams(0).get("a", number)
    assert first(Streams(0), "a", 2**32 - 1) != first(Streams(0), "a", 2**32 - 1, 0)


def test_a_negative_root_is_refused() -> None:
    with pytest.raises(ValueError, match="root"):
        Streams(-1)


def test_a_seed_has_63_bits_and_repeats() -> None:
    seeds = [Streams(0).seed("weights", n) for n in range(64)]
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**60  # 64 seeds all below it: 1 in 2¹⁹²
    assert seeds == [Streams(0).seed("weights", n) for n in range(64)]
    assert len(set(seeds)) == 64


def test_a_child_repeats_and_knows_nothing_of_its_siblings_names() -> None:
    child = Streams(3).child("server")
    assert first(child, "noise") == first(Streams(3).child("server"), "noise")
    others = [Streams(3), Streams(3).child("client"), Streams(3).child("server", 1), Streams(4).child("server")]
    assert first(child, "noise") not in [first(other, "noise") for other in others]


def test_streams_of_the_operating_system_never_repeat() -> None:
    assert first(Streams.from_os(), "noise") != first(Streams.from_os(), "noise")
    one = Streams.from_os()
    assert first(one, "noise") != first(one, "noise")  # no root is kept that would give it again
    assert first(one.child("server"), "noise") != first(one.child("server"), "noise")


def test_a_key_repeats_for_its_name_and_root_alone() -> None:
    keys = [Streams(root).key(name, *n) for root in (0, 1, 2**300) for name, n in (("a", ()), ("a", (1,)), ("a1", ()))]
    assert len(set(keys)) == 9
    # HMAC-SHA256, computed with Python's hmac for 32 zero bytes as key and the message "a\x001"
    assert Streams(0).key("a", 1).hex() == "67a33b0444a673e68d8445a113eb115295f0b942bc87023fefa24fb15c7ab9e4"


PEOPLE = np.arange(500)
TAKEN = PEOPLE % 3


@pytest.mark.parametrize("streams", [Streams(7), Streams(7).scope("a", 1), Streams(7).child("b")])
def test_people_s_words_at_once_are_those_of_each_alone(streams: Streams) -> None:
    people = People(streams, "local", (3, 0, PEOPLE, TAKEN))
    alone: Callable[[int], Streams] = people.__call__  # whose words are asked for one by one
    expected = [streams.scope("local", 3, 0, u, u % 3).word("examples") for u in range(500)]
    assert words(people, "examples", 500).tolist() == words(alone, "examples", 500).tolist() == expected
    assert people(41).get("steps").random() == streams.scope("local", 3, 0, 41, 2).get("steps").random()
    assert People(streams, "local", (3, 0, PEOPLE[:0], TAKEN[:0])).words("examples").shape == (0,)


def test_a_word_never_changes_between_versions() -> None:
    # The first 8 bytes of HMAC-SHA256 of "words/local/examples\0" "4" under 7, then SplitMix64 by Python's integers.
    h = int.from_bytes(Streams(7).key("words/local/examples", 4)[:8], "little")
    for number in (3, 0, 41, 2):
        z = (h + (number + 1) * 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        h = z ^ (z >> 31)
    assert Streams(7).scope("local", 3, 0).word("examples", 41, 2) == h == 2763519983348742737


def test_another_root_name_round_try_person_or_count_of_numbers_gives_another_word() -> None:
    every = [
        People(Streams(root), name, (round, attempt, PEOPLE, np.full(500, taken))).words(kind)
        for root in (0, 1, 2**200)
        for name in ("local", "loca", "local/a")
        for kind in ("coins", "a/coins")
        for round in (0, 1, 2**32 - 1)
        for attempt in (0, 1)
        for taken in (0, 1)
    ]
    found = np.concatenate([*every, *(Streams(0).words("local/coins", *[0] * k, PEOPLE) for k in (0, 1, 2))])
    same = 3 * 3 * 2 * 2 * 500  # "local" with "a/coins" is "local/a" with "coins"
    assert len(np.unique(found)) == len(found) - same
    # A bit of 500 words is set 250 times, 11.2 of a standard deviation: 7 of these are passed by 1 seed in 1e11.
    bits = (found[:500, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    assert abs(bits.sum(axis=0).astype(int) - 250).max() < 80


def test_words_of_neighbours_are_no_steps_of_one_another() -> None:
    # SplitMix64 adds one constant at each draw: seeds a few steps apart would draw the same words, a little later.
    step = np.uint64(pow(0x9E3779B97F4A7C15, -1, 2**64))
    found = People(Streams(7), "local", (3, 0, PEOPLE, TAKEN)).words("examples")
    apart = (found[1:] - found[:-1]) * step  # how many steps, mod 2⁶⁴
    assert np.minimum(apart, -apart).min() > 2**40  # 499 differences, and fewer than 1 seed in 10⁴ has such a one
    beside = (found[:-1] + np.uint64(0x9E3779B97F4A7C15) - found[:-1]) * step
    assert np.minimum(beside, -beside).min() == 1


def test_words_of_the_operating_system_never_repeat() -> None:
    people = People(Streams.from_os(), "local", (3, 0, PEOPLE, TAKEN))
    found = np.concatenate([people.words("examples"), people.words("examples")])
    assert len(np.unique(found)) == len(found) == 1000
