"""The canary: a rule that learns nothing scores at chance from the honest pool, and far above it from the leaky one."""

from __future__ import annotations

import numpy as np
import pytest

from penchant.common.errors import InvalidConfig
from penchant.common.interactions import Interactions
from penchant.common.negatives import negatives
from penchant.simulations import canary
from penchant.simulations.canary import canary_hr


def population(n_users: int = 400, n_items: int = 250) -> tuple[Interactions, Interactions]:
    """Four training items and one held out each, drawn from popular and unpopular items alike."""
    rng = np.random.default_rng(0)
    share = 1.0 / np.arange(1, n_items + 1)
    picks = [rng.choice(n_items, 5, replace=False, p=share / share.sum()).tolist() for _ in range(n_users)]
    return Interactions.of([p[:4] for p in picks], n_items), Interactions.of([p[4:] for p in picks], n_items)


@pytest.mark.parametrize("rounds", [1, 20])
def test_counting_honest_negatives_scores_at_chance(rounds: int) -> None:
    hr, error = canary_hr(*population(), pool="honest", rounds=rounds, seed=1)
    assert error <= 0.002
    assert hr == pytest.approx(0.10, abs=0.01)  # five standard errors


def test_counting_leaky_negatives_finds_the_held_out_item() -> None:
    train, targets = population()
    few, _ = canary_hr(train, targets, pool="leaky", rounds=1, seed=1)
    many, error = canary_hr(train, targets, pool="leaky", rounds=100, seed=1)
    assert error <= 0.002
    assert many > 0.3
    assert few < many
    assert few > 0.1 + 0.005  # one round is enough to see it


def test_the_canary_notices_when_the_shared_pool_starts_to_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    train, targets = population(100)
    held = iter([t for h in targets for t in h.items.tolist()] * 1000)

    def leaks(own: np.ndarray, n_items: int, shape: int, seed: int) -> np.ndarray:
        return negatives(np.append(own, next(held)).astype(np.int32), n_items, shape, seed)

    monkeypatch.setattr(canary, "negatives", leaks)
    assert canary_hr(train, targets, pool="honest", rounds=100, seed=1)[0] > 0.3


@pytest.mark.parametrize(
    ("drawn", "others", "expected"),
    [
        (3, [1] * 9 + [5] * 90, 1.0),  # nine were drawn less often
        (3, [1] * 10 + [5] * 89, 0.0),
        (0, [0] * 99, 0.1),  # all level: 10 places for 100
        (3, [1] * 8 + [3] * 3 + [5] * 88, 0.5),  # 2 places for 4
    ],
)
def test_the_chance_of_the_top_ten_under_ties_is_exact(drawn: int, others: list[int], expected: float) -> None:
    assert canary._in_top_10(drawn, np.array(others)) == pytest.approx(expected)


def test_a_case_that_cannot_be_scored_is_refused() -> None:
    train, targets = population(5)
    with pytest.raises(InvalidConfig, match="pool"):
        canary_hr(train, targets, pool="open", rounds=1, seed=0)  # type: ignore[arg-type]  # what is refused
    with pytest.raises(InvalidConfig, match="rounds"):
        canary_hr(train, targets, pool="honest", rounds=0, seed=0)
    with pytest.raises(InvalidConfig, match="nobody"):
        canary_hr(train, train, pool="honest", rounds=1, seed=0)
    with pytest.raises(InvalidConfig, match="fewer than 99"):
        canary_hr(Interactions.of([[0]], 50), Interactions.of([[1]], 50), pool="honest", rounds=1, seed=0)
    with pytest.raises(InvalidConfig, match="precision"):
        canary_hr(train, targets, pool="honest", rounds=1, seed=0, precision=0)
