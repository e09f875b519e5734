"""The edge of a noised matrix is where its noise ends, and what stands above comes out as it went in."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penchant.common.arrays import Float64
from penchant.common.learners.spectral import edge, symmetric_edge, top, top_symmetric


def noise(size: int, stddev: float, seed: int) -> Float64:
    """float64[size, size], symmetric."""
    upper = np.triu(np.random.default_rng(seed).normal(0, stddev, (size, size)))
    return upper + np.triu(upper, 1).T


def scales(size: int, power: float) -> Float64:
    """Powers of a popularity that falls as 1/rank and is kept above half its mean."""
    popularity = 1 / np.arange(1.0, size + 1)
    popularity /= popularity.mean()
    return np.asarray(np.maximum(popularity, 0.5) ** -power)


@pytest.mark.parametrize("power", [0.0, 0.25, 0.5])
def test_the_largest_value_of_noise_stands_at_the_edge(power: float) -> None:
    # The largest eigenvalue strays from the edge by a share of about K^(−2/3) = 1.6 %; 5 % is 3 of these, and further
    # out the law of Tracy and Widom leaves less than 1 seed in 10⁴.
    v, w = scales(500, power), scales(500, power / 2)
    for seed in range(2):
        largest = np.linalg.eigvalsh(noise(500, 0.3, seed) * v[:, None] * v)[-1]
        assert largest == pytest.approx(symmetric_edge(0.3, v), rel=0.05)
        any_matrix = np.random.default_rng(seed).normal(0, 0.3, (500, 500)) * v[:, None] * w
        assert np.linalg.svd(any_matrix, compute_uv=False)[0] == pytest.approx(edge(0.3, v, w), rel=0.05)
    if power:  # taking all places for equally noisy would be wrong by more than that
        assert symmetric_edge(0.3, np.ones(500)) != pytest.approx(symmetric_edge(0.3, v), rel=0.05)


@given(
    scale=st.lists(st.floats(0.05, 20), min_size=1, max_size=30),
    other=st.lists(st.floats(0.05, 20), min_size=1, max_size=30),
    factor=st.floats(0.1, 10),
)
def test_an_edge_grows_with_the_noise_and_any_scale(scale: list[float], other: list[float], factor: float) -> None:
    v, w = np.array(scale), np.array(other)
    assert symmetric_edge(factor, v) == pytest.approx(factor * symmetric_edge(1.0, v), rel=1e-6)
    assert symmetric_edge(1.0, factor * v) == pytest.approx(factor**2 * symmetric_edge(1.0, v), rel=1e-6)
    assert edge(1.0, v, factor * w) == pytest.approx(factor * edge(1.0, v, w), rel=1e-6)
    assert edge(1.0, v, w) == pytest.approx(edge(1.0, w, v), rel=1e-5)
    assert edge(1.0, v, v) == pytest.approx(symmetric_edge(1.0, v), rel=1e-5)
    larger = v.copy()
    larger[0] *= 1.5
    assert symmetric_edge(1.0, larger) >= symmetric_edge(1.0, v) * (1 - 1e-9)


def test_without_noise_the_edge_is_zero() -> None:
    assert symmetric_edge(0.0, np.ones(5)) == 0.0
    assert edge(0.0, np.ones(5), np.ones(5)) == 0.0


@pytest.mark.parametrize("dims", [1, 3, 8])
def test_the_best_approximation_of_a_rank_comes_back_where_nothing_is_shrunk(dims: int) -> None:
    matrix = np.random.default_rng(0).standard_normal((8, 8))
    u, s, v = np.linalg.svd(matrix)
    left, right = top(matrix, 0.0, dims)
    np.testing.assert_allclose(left @ right.T, (u[:, :dims] * s[:dims]) @ v[:dims], atol=1e-9)
    whole = matrix @ matrix.T
    vectors, kept = top_symmetric(whole, 0.0, dims)
    np.testing.assert_allclose(vectors @ vectors.T, (u[:, :dims] * s[:dims] ** 2) @ u[:, :dims].T, atol=1e-9)
    np.testing.assert_array_equal(kept, 1.0)


def test_values_within_the_edge_are_dropped_and_those_above_are_shrunk() -> None:
    q, _ = np.linalg.qr(np.random.default_rng(1).standard_normal((6, 6)))
    values = np.array([10.0, 5.0, 4.1, 3.9, 0.0, -20.0])
    vectors, left = top_symmetric((q * values) @ q.T, 4.0, 6)
    np.testing.assert_allclose((vectors**2).sum(0), values[:3], rtol=1e-9)
    np.testing.assert_allclose((vectors**2).sum(0) * left**2, values[:3] - 16 / values[:3], rtol=1e-9)
    u, v = top((q * np.abs(values)) @ q.T, 4.0, 6)
    np.testing.assert_allclose(np.linalg.norm(u, axis=0), [20 - 16 / 20, 10 - 1.6, 5 - 3.2, 4.1 - 16 / 4.1], rtol=1e-9)
    np.testing.assert_allclose(np.linalg.norm(v, axis=0), 1.0)


def test_rounding_is_not_taken_for_signal() -> None:
    random = np.random.default_rng(2)
    matrix = 1e3 * random.standard_normal((60, 3)) @ random.standard_normal((3, 60))
    left, right = top(matrix, 0.0, 40)
    assert left.shape == right.shape == (60, 3)
    np.testing.assert_allclose(left @ right.T, matrix, rtol=1e-6, atol=1e-6)
    assert top_symmetric(matrix @ matrix.T, 0.0, 40)[0].shape[1] >= 3


def test_nothing_above_the_edge_gives_no_columns() -> None:
    assert top_symmetric(np.eye(4), 2.0, 4)[0].shape == (4, 0)
    assert [m.shape for m in top(np.eye(4), 2.0, 4)] == [(4, 0), (4, 0)]
    assert top(np.zeros((4, 4)), 0.0, 4)[0].shape == (4, 0)
