"""The negative pool: uniform over everything outside the training items, held-out items included."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penchant.common.errors import InvalidConfig
from penchant.common.negatives import negatives


@given(n_items=st.integers(2, 40), data=st.data())
def test_a_draw_is_never_a_training_item_and_reaches_every_other(n_items: int, data: st.DataObject) -> None:
    own = data.draw(st.lists(st.integers(0, n_items - 1), max_size=60).filter(lambda x: len(set(x)) < n_items))
    drawn = negatives(own, n_items, 2000, seed=0)
    # The rarest of 40 items is missed by 2,000 draws with probability 1e-22.
    assert set(drawn.tolist()) == set(range(n_items)) - set(own)


def test_draws_are_uniform_and_a_skewed_pool_is_caught() -> None:
    own, n_items, n = [0, 3, 4, 9], 10, 60_000
    drawn = negatives(own, n_items, n, seed=1)
    expected = n / 6
    # χ² with 5 degrees of freedom exceeds 30 for 1 seed in 70,000.
    assert _chi_squared(np.bincount(drawn, minlength=n_items)[[1, 2, 5, 6, 7, 8]], expected) < 30
    shifted = np.arange(n_items)[np.random.default_rng(1).integers(0, n_items, n)]  # draws, then steps over by one
    skewed = np.bincount(np.where(np.isin(shifted, own), (shifted + 1) % n_items, shifted), minlength=n_items)
    assert _chi_squared(skewed[[1, 2, 5, 6, 7, 8]], expected) > 30


def test_the_result_has_the_shape_asked_for_and_repeats_for_a_seed() -> None:
    a = negatives([1, 1], 5, (3, 4), seed=2)
    assert a.shape == (3, 4)
    assert a.dtype == np.int32
    np.testing.assert_array_equal(a, negatives([1], 5, (3, 4), seed=2))
    assert not np.array_equal(a, negatives([1], 5, (3, 4), seed=3))


@pytest.mark.parametrize("own", [[0, 1, 2], [3], [-1]])
def test_an_empty_pool_or_an_item_outside_the_catalogue_is_refused(own: list[int]) -> None:
    with pytest.raises(InvalidConfig, match="negatives"):
        negatives(own, 3, 1, seed=0)


def _chi_squared(counts: np.ndarray, expected: float) -> float:
    return float(((counts - expected) ** 2 / expected).sum())
