"""Noise: as random as its key, Gaussian to the tail, and on a grid that tells nothing of the sum below it."""

from __future__ import annotations

import multiprocessing
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scipy import stats

from penchant.common.errors import InvalidConfig, PrivacyRefused
from penchant.common.privacy import noise as module
from penchant.common.privacy.noise import Noise, grid, self_test
from penchant.common.streams import Streams

KEY = bytes(range(32))
FALSE_ALARM = 1e-7  # of each statistical test, over keys; the keys here are fixed, so a failure is a change of code


def normals(size: int, key: bytes = KEY) -> npt.NDArray[np.float64]:
    return Noise(key).normal((size,))


# -------------------------------------------------------------------------------------------------------- keys


def test_a_key_gives_one_stream_and_another_key_another() -> None:
    np.testing.assert_array_equal(normals(1000), normals(1000))
    other = normals(1000, bytes(32))
    assert not np.isin(normals(1000), other).any()
    np.testing.assert_array_equal(Noise(KEY).uniform(9), Noise(KEY).uniform(9))


@pytest.mark.parametrize("size", [0, 16, 31, 33])
def test_a_key_of_another_length_is_refused(size: int) -> None:
    with pytest.raises(InvalidConfig, match="32 bytes"):
        Noise(bytes(size))


def test_the_stream_is_nist_s_cipher() -> None:
    # AES-256 under this key of block 0 and 1, computed with the openssl command line:
    # printf '\0%.0s' {1..32} | openssl enc -aes-256-ctr -K 000102…1f -iv 00…0
    words = Noise(KEY)._words(4)
    assert words.astype("<u8").tobytes().hex() == "f29000b62a499fd0a9f39a6add2e7780f05d76ae4ab99fe5a6f69b3148c2363d"


def _from_os(_: int) -> bytes:
    return Noise.from_os().uniform(8).tobytes()


def test_no_two_streams_of_the_operating_system_are_alike_in_one_process_or_in_many() -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        found = [_from_os(0), _from_os(0), *pool.map(_from_os, range(4), chunksize=1)]
    assert len(set(found)) == len(found)


def test_keys_of_the_operating_system_do_not_repeat_and_seeded_ones_do() -> None:
    seeded, production = Streams(3), Streams.from_os()
    assert seeded.key("noise", 1, 0) == Streams(3).key("noise", 1, 0)
    assert production.key("noise", 1, 0) != production.key("noise", 1, 0)
    assert production.child("server").get("a").random() != production.child("server").get("a").random()


@given(numbers=st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=2, unique=True, max_size=6))
def test_every_round_and_try_has_a_key_of_its_own(numbers: list[tuple[int, int]]) -> None:
    keys = [Streams(5).key("noise", *pair) for pair in numbers]
    keys += [Streams(5).key("cohort", *pair) for pair in numbers]
    assert len(set(keys)) == len(keys)
    assert all(len(key) == 32 for key in keys)


# ---------------------------------------------------------------------------------------------------- Gaussian


def ks_rejects(values: npt.NDArray[np.float64], stddev: float = 1.0) -> bool:
    return bool(stats.kstest(values / stddev, "norm").pvalue < FALSE_ALARM)


@pytest.mark.parametrize("size", [0, 1, 7, (1 << 14) - 1, 1 << 14, (1 << 14) + 1])
def test_normal_has_the_shape_asked_for(size: int) -> None:
    assert Noise(KEY).normal((size,)).shape == (size,)
    assert Noise(KEY).normal((2, size)).shape == (2, size)
    assert Noise(KEY).normal().shape == ()


def test_draws_are_standard_normal_and_a_wrong_scale_is_caught() -> None:
    values = normals(400_000)
    assert not ks_rejects(values)
    assert ks_rejects(values, 1.03)
    assert ks_rejects(values + 0.02)


def test_cells_around_every_layer_s_edge_hold_their_share() -> None:
    # A ziggurat that is wrong is wrong where its layers meet. χ² over cells cut at all 256 edges, both signs.
    values, (edges, _, _) = normals(2_000_000), module.ziggurat()
    cuts = np.unique(np.concatenate([[-np.inf], -edges[1:], edges[1:], [np.inf]]))
    counts = np.histogram(values, cuts)[0]
    expected = np.diff(stats.norm.cdf(cuts)) * len(values)
    assert stats.chisquare(counts, expected).pvalue > FALSE_ALARM
    moved = np.histogram(np.where(np.abs(values) > edges[128], values * 1.003, values), cuts)[0]
    assert stats.chisquare(moved, expected).pvalue < FALSE_ALARM


def test_the_tail_is_the_gaussian_s() -> None:
    values, start = normals(6_000_000), module.ziggurat()[0][1]
    tail = np.abs(values)[np.abs(values) > start]
    expected = 2 * stats.norm.sf(start) * len(values)  # about 1,550
    assert abs(len(tail) - expected) < 5.4 * np.sqrt(expected)
    assert stats.kstest(tail, lambda x: 1 - stats.norm.sf(x) / stats.norm.sf(start)).pvalue > FALSE_ALARM
    assert (values[np.abs(values) > start] > 0).mean() == pytest.approx(0.5, abs=5.4 / (2 * np.sqrt(len(tail))))


def test_draws_do_not_depend_on_their_neighbours_the_block_before_or_another_round() -> None:
    values = normals(1 << 19)
    other = normals(1 << 19, Streams(0).key("noise", 2, 0))
    for lag in (1, 2, 1 << 14):
        assert abs(np.mean(values[lag:] * values[:-lag])) < 5.4 / np.sqrt(len(values) - lag)
    assert abs(np.mean(values * other)) < 5.4 / np.sqrt(len(values))
    assert abs(np.mean(np.abs(values[1:]) * np.abs(values[:-1])) - 2 / np.pi) < 5.4 / np.sqrt(len(values))


def test_coins_are_uniform_on_their_grid() -> None:
    coins = Noise(KEY).uniform(400_000)
    assert ((coins >= 0) & (coins < 1)).all()
    np.testing.assert_array_equal(coins * 2**53, np.rint(coins * 2**53))
    assert stats.kstest(coins, "uniform").pvalue > FALSE_ALARM


# ------------------------------------------------------------------------------------------------ floating point

stddevs = st.floats(1e-12, 1e12)


def on_grid(values: npt.NDArray[Any], step: float) -> bool:
    return bool((np.rint(values / step) * step == values).all())


@given(stddev=stddevs)
@example(stddev=1.0)
@example(stddev=np.nextafter(1.0, 0))
@example(stddev=256.0)
def test_the_grid_is_a_power_of_two_well_below_the_noise(stddev: float) -> None:
    assert stddev / 512 < grid(stddev) <= stddev / 256
    assert np.frexp(grid(stddev))[0] == 0.5


@given(stddev=stddevs, total=st.lists(st.floats(-1e6, 1e6), max_size=20))
def test_whatever_the_sum_the_release_lies_on_the_grid_of_its_noise(stddev: float, total: list[float]) -> None:
    values = np.array(total) * stddev
    noised = Noise(KEY).add(values, stddev)
    assert on_grid(noised, grid(stddev))
    assert np.abs(noised - values).max(initial=0) < 7 * stddev


def test_low_bits_that_give_a_plain_sum_away_are_gone() -> None:
    # Below 1, plain float noise is on a finer lattice than 1 + noise is: the sum shows in the bits.
    draws = normals(2000) / 8
    plain = [np.all((s + draws) * 2**52 == np.rint((s + draws) * 2**52)) for s in (0.0, 4.0)]
    assert plain == [False, True]
    assert all(on_grid(Noise(KEY).add(np.full(2000, s), 1 / 8), grid(1 / 8)) for s in (0.0, 4.0))


def test_the_sum_is_not_lost_beside_its_grid() -> None:
    # k·g + r with r below the grid: the mean of many releases is the sum, to 5.4 standard errors.
    total = np.full(1 << 18, 1000.0 + 0.4 * grid(1.0))
    noised = Noise(KEY).add(total, 1.0)
    assert abs(noised.mean() - total[0]) < 5.4 / np.sqrt(len(total))
    assert not ks_rejects(noised - total[0])


def test_a_sum_too_large_for_its_noise_is_refused_and_does_not_go_out_unprotected() -> None:
    with pytest.raises(InvalidConfig, match="too large for its noise"):
        Noise(KEY).add(np.array([1.0, 1e16]), 1.0)
    with pytest.raises(InvalidConfig, match="too large for its noise"):
        Noise(KEY).add(np.array([np.nan]), 1.0)


@pytest.mark.parametrize("stddev", [0.0, -1.0, np.nan, np.inf, 1e-300])
def test_a_stddev_that_makes_no_noise_is_refused(stddev: float) -> None:
    with pytest.raises(InvalidConfig, match="stddev"):
        Noise(KEY).add(np.zeros(2), stddev)


# ----------------------------------------------------------------------------------------------------- self-test


def test_the_self_test_passes_here() -> None:
    self_test()


def test_a_cipher_that_is_not_the_cipher_fails_the_self_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_NIST_CIPHER", "00" * 16)
    with pytest.raises(PrivacyRefused, match="test vector"):
        self_test()


def _drawn(seed: int, shape: tuple[int, ...]) -> npt.NDArray[np.float64]:
    return np.random.default_rng(seed).standard_normal(shape)


@pytest.mark.parametrize(
    "broken",
    [
        lambda self, shape=(): np.zeros(shape),
        lambda self, shape=(): self.uniform(*shape) * 12**0.5 - 3**0.5,
        lambda self, shape=(): 0.9 * _drawn(int(self.uniform(1)[0] * 2**32), shape),
        lambda self, shape=(): _drawn(0, shape),
    ],
    ids=["none", "uniform", "too little", "the same each time"],
)
def test_noise_that_is_not_noise_fails_the_self_test(broken: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Noise, "normal", broken)
    with pytest.raises(PrivacyRefused, match="not Gaussian"):
        self_test()
