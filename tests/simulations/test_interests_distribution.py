"""The tables of predicted shares, calibrated lists and one byte a number, on people with a known truth."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np
import pytest

from penchant.common import metrics
from penchant.common.arrays import Float32
from penchant.common.errors import InvalidConfig
from penchant.common.interactions import Interactions
from penchant.simulations.interests import distribution as d
from penchant.simulations.interests.releases import Table, release

DATA = "synthetic:users=80,items=200,interactions=60,topics=6,drift=0.0"


@pytest.fixture(scope="module", autouse=True)
def _few_releases() -> Iterator[None]:
    """Three folds, and each release made once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(d, "FOLDS", 3)
        patch.setattr(d, "release", functools.cache(release))
        yield


@pytest.fixture(scope="module")
def shares() -> Table:
    return d.table(data=DATA)


def means(row: list[str]) -> list[float]:
    return [float(cell.split(" ")[0]) for cell in row[1:]]


def bounds(cell: str) -> list[float]:
    return [float(end) for end in cell[cell.index("[") + 1 : -1].split(", ")]


def test_what_a_persons_device_got_was_made_without_them_and_folds_are_everybody_once() -> None:
    seen: list[int] = []
    for fold in range(d.FOLDS):
        them = d.people(DATA, None, 0, [fold])
        outside = np.flatnonzero(~them[0].made.split.participants)
        assert not len(them[0].made.split.train.select(outside))
        for user, person in zip(outside.tolist(), them, strict=True):
            np.testing.assert_array_equal(person.history.items, person.made.data.interactions.history(user).items)
        seen += outside.tolist()
    assert sorted(seen) == list(range(80))


def test_the_general_shares_do_not_depend_on_how_much_is_known_so_the_future_is_the_same_for_every_length(
    shares: Table,
) -> None:
    general, *_ = shares.rows
    assert general[0].startswith("general")
    assert len(set(general[1:])) == 1


def test_the_more_is_known_the_closer_the_shares_and_floors_are_beaten_where_they_lack_something(shares: Table) -> None:
    rows = {row[0]: list(row) for row in shares.rows}
    posterior = means(rows["posterior"])
    assert posterior[1:] == sorted(posterior[1:], reverse=True)
    assert posterior[3] < 0.8 * posterior[0]
    for floor, lengths in (("general shares alone", [2, 3]), ("own history alone", [1, 2])):
        for k in lengths:
            assert bounds(rows[f"posterior − {floor}"][1 + k])[1] < 0


def test_a_difference_is_that_of_the_rows_and_what_does_not_beat_its_floor_is_said(shares: Table) -> None:
    rows = {row[0]: list(row) for row in shares.rows}
    for floor in ("general shares alone", "own history alone"):
        expected = np.subtract(means(rows["posterior"]), means(rows[f"{floor} (floor)"]))
        np.testing.assert_allclose(means(rows[f"posterior − {floor}"]), expected, atol=0.0011)
        for k, cell in zip(d.LENGTHS, rows[f"posterior − {floor}"][1:], strict=True):
            said = f"k = {k} against {floor}" in shares.notes[-1]
            assert said or bounds(cell)[1] <= 0
    assert "no ε" in shares.notes[0]


def test_a_private_release_says_its_guarantee_and_groups_of_its_vectors_serve_as_topics() -> None:
    found = d.table(data=DATA, epsilon=8.0, grouped=True)
    for words in (
        "ε = 8 at δ = 1e-05",
        "unit user (add/remove one profile)",
        "sampling none",
        "accountant GDP",
        "not charged",
    ):
        assert words in found.notes[0]
    assert "clusters of the released vectors" in found.notes[0]
    assert found.markdown().count("\n| ") == len(found.rows) + 1


def test_calibration_brings_lists_to_the_persons_shares() -> None:
    found = d.lists(data=DATA)
    assert [row[0] for row in found.rows] == ["λ = 0", "λ = 0.3", "λ = 0.6"]
    assert found.rows[0][2] == ""
    kl = [means([row[0], row[3]])[0] for row in found.rows]
    assert kl == sorted(kl, reverse=True)
    assert bounds(found.rows[2][4])[1] < 0


def test_one_byte_a_number_takes_about_a_quarter_and_shows_nearly_the_same() -> None:
    found = d.quantized(data=DATA)
    large, small = (float(row[1]) for row in found.rows)
    assert small < 0.32 * large
    assert float(found.rows[1][4].rstrip("%")) > 95
    assert found.rows[0][4] == "100 %"


def test_the_gain_of_a_list_is_the_ndcg_of_its_ranking() -> None:
    random = np.random.default_rng(0)
    scores: Float32 = random.random((1, 50)).astype(np.float32)
    for n in (1, 4, 20):
        targets = random.permutation(50)[:n].astype(np.int32)
        ranks = metrics.target_ranks(scores, Interactions.of([[]], 50), Interactions.of([targets.tolist()], 50))
        shown = np.argsort(-scores[0], kind="stable")[:10]
        assert d.gain(shown, targets) == pytest.approx(metrics.ndcg(ranks, 10)[0])


def test_histories_too_short_to_measure_are_refused() -> None:
    with pytest.raises(InvalidConfig, match="nobody has 30 interactions"):
        d.with_future([])
