"""How intensities are measured: nothing held out is met before, and figures are what their names say."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import permutations

import numpy as np
import pytest

from penchant.common.errors import InvalidConfig
from penchant.common.interactions import Interactions
from penchant.simulations.data.synthetic import Synthetic, synthetic
from penchant.simulations.interests import intensity
from penchant.simulations.interests.intensity import Predicted, Trial

SMALL = "synthetic:users=60,items=80,interactions=20,topics=8"


@cache
def people() -> Synthetic:
    return synthetic(users=120, items=150, interactions=40, topics=8)


@cache
def tried(epsilon: float | None = None) -> Trial:
    return intensity.trial(people(), epsilon=epsilon, seed=0)


def changed(data: Synthetic, at: np.ndarray) -> Synthetic:
    """The same people with other strengths at these interactions."""
    strengths = data.interactions.strengths.copy()
    strengths[at] = 1 - strengths[at]
    return replace(data, interactions=replace(data.interactions, strengths=strengths))


def by_hand(scores: list[float], strengths: list[float], liked: list[bool], rows: list[int]) -> Trial:
    """A trial of a model that said `scores`."""
    said = Predicted(np.array(scores), np.array(liked, float))
    empty = Interactions.of([], 1)
    held = np.ones(len(rows), np.bool_)
    return Trial(people(), empty, held, np.array(rows), np.array(strengths), None, None, {"": said})


def dcg(gains: list[float]) -> float:
    return float(sum(gain / np.log2(at + 2) for at, gain in enumerate(gains[:10])))


def test_nothing_held_out_reaches_what_foretells_it() -> None:
    made = tried()
    other = intensity.trial(changed(people(), np.flatnonzero(made.held)), epsilon=None, seed=0)
    for name, said in made.said.items():
        np.testing.assert_array_equal(other.said[name].strength, said.strength)
    known = intensity.trial(changed(people(), np.flatnonzero(~made.held)), epsilon=None, seed=0)
    assert np.abs(known.said["linear model"].strength - made.said["linear model"].strength).mean() > 0.05


def test_the_tenths_to_test_and_to_choose_by_are_apart_and_leave_everybody_a_beginning() -> None:
    data = people().interactions
    tested, chosen = intensity.held_out(data, 0)
    assert not (tested & chosen).any()
    assert not (tested | chosen)[data.offsets[:-1]].any()
    assert abs(tested.mean() - 0.1) < 0.02
    assert abs(chosen.mean() - 0.1) < 0.02
    assert (tested != intensity.held_out(data, 1)[0]).any()
    made = intensity.trial(people(), epsilon=None, seed=0, validation=True)
    assert len(made.history) == np.count_nonzero(~tested & ~chosen)
    np.testing.assert_array_equal(made.came, data.strengths[chosen].astype(np.float64))


def test_ties_share_their_gains_as_the_mean_over_every_order() -> None:
    scores, strengths = np.array([0.3, 0.9, 0.3, 0.3]), np.array([1.0, 0.25, 0.5, 0.0])
    gains = (2 ** (4 * strengths) - 1).tolist()
    orders = [dcg([gains[1], *order]) for order in permutations([gains[0], gains[2], gains[3]])]
    expected = np.mean(orders) / dcg(sorted(gains, reverse=True))
    assert intensity.graded_ndcg(scores, strengths) == pytest.approx(expected)
    assert intensity.graded_ndcg(strengths, strengths) == 1.0
    assert np.isnan(intensity.graded_ndcg(scores, np.full(4, 0.5)))


def test_figures_are_what_their_names_say() -> None:
    made = by_hand([0.5, 1.0, 0.25, 0.5], [0.75, 0.75, 0.25, 1.0], [True, False, False, True], [3, 3, 3, 7])
    sums = intensity.figures(made, made.said[""], 4.0)
    found = {name: values[0] for name, values in intensity.read(sums, np.ones((1, 2))).items()}
    assert found["RMSE"] == pytest.approx(np.sqrt((1 + 1 + 0 + 4) / 4))
    assert found["MAE"] == pytest.approx((1 + 1 + 0 + 2) / 4)
    assert found["AUC"] == 1.0  # of the first person; the second has no pair
    assert found["ECE"] == pytest.approx(1 / 4)  # said 0 twice, one of them liked; said 1 twice, both liked
    twice = intensity.read(sums, np.array([[2, 0], [0, 2]]))
    np.testing.assert_allclose(twice["RMSE"], [np.sqrt(2 / 3), 2.0])
    assert np.isnan(twice["AUC"][1])


def test_a_constant_that_is_right_on_average_is_calibrated_and_one_that_is_not_is_not() -> None:
    rows, strengths = [0] * 10, [1.0] * 6 + [0.0] * 4
    for said, error in ((0.6, 0.0), (0.9, 0.3)):
        made = by_hand([0.5] * 10, strengths, [True] * 10, rows)
        sums = intensity.figures(made, Predicted(np.full(10, 0.5), np.full(10, said)), 1.0)
        assert intensity.read(sums, np.ones((1, 1)))["ECE"][0] == pytest.approx(error)


def test_on_known_truth_the_linear_model_beats_both_floors() -> None:
    made = tried()
    truth = intensity._truth(people(), made.held)
    off = {name: float(np.sqrt(((said.strength - truth) ** 2).mean())) for name, said in made.said.items()}
    assert off["linear model"] < 0.9 * min(off["global mean"], off["person's mean"])


def test_tables_name_the_charge_and_what_falls_short_of_a_floor() -> None:
    found = intensity.table(data=SMALL, epsilon=8.0)
    assert all(len(row) == len(found.columns) for row in found.rows)
    notes = " ".join(found.notes)
    for words in ("ε = 8 at δ = 1e-05", "unit user", "trust server", "Not better than the", "probability model"):
        assert words in notes
    assert "nothing is charged" in " ".join(intensity.truths(synthetic=SMALL).notes)
    with pytest.raises(InvalidConfig, match="synthetic"):
        intensity.truths(synthetic="embedded")


def test_a_private_trial_costs_what_was_asked_for_and_sees_noise() -> None:
    exact, private = tried(), tried(1.0)
    assert exact.guarantee is None
    assert private.guarantee is not None
    assert 0.999 < private.guarantee.epsilon <= 1.0
    assert len(private.guarantee.noise_multiplier) >= 4  # counts, pairs, strengths, outcomes
    apart = np.abs(private.said["rating model"].strength - exact.said["rating model"].strength)
    assert apart.mean() > 0.01


def test_the_neural_rows_are_from_another_release_at_the_same_epsilon_and_from_nothing_more() -> None:
    exact, private = tried(), tried(1.0)
    assert private.neural is not None
    assert 0.999 < private.neural.epsilon <= 1.0
    assert private.neural != private.guarantee
    for name in intensity.NEURAL.values():
        assert np.abs(exact.said[name].strength - private.said[name].strength).mean() > 0.01
        assert np.abs(exact.said[name].strength - exact.said["linear model"].strength).mean() > 1e-4


def test_the_picture_is_the_same_each_time() -> None:
    drawn = intensity.reliability(data=SMALL, epsilon=None)
    assert drawn == intensity.reliability(data=SMALL, epsilon=None)
    assert "<svg" in drawn
    assert "calibrated, private sum" in drawn
