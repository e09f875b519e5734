"""Synthetic people: the data follow the truth that is handed out with them."""

from __future__ import annotations

import numpy as np
import pytest

from penchant.common.errors import InvalidConfig
from penchant.common.interactions import History
from penchant.simulations.data.synthetic import Synthetic, synthetic


@pytest.fixture(scope="module")
def data() -> Synthetic:
    return synthetic(users=400, items=300, interactions=30, topics=6, drift=0.8, seed=5)


def before_last(history: History) -> History:
    return History(history.items[:-1], history.times[:-1], history.strengths[:-1])


def test_the_same_seed_gives_the_same_people_and_another_does_not() -> None:
    first, again, other = (synthetic(users=30, items=60, interactions=8, topics=4, seed=s) for s in (1, 1, 2))
    assert first.interactions.items.tolist() == again.interactions.items.tolist()
    assert first.interactions.times.tolist() == again.interactions.times.tolist()
    assert first.interactions.strengths.tolist() == again.interactions.strengths.tolist()
    assert first.catalogue.version == again.catalogue.version
    assert first.interactions.items.tolist() != other.interactions.items.tolist()


def test_nobody_has_an_item_twice_and_times_rise(data: Synthetic) -> None:
    for history in data.interactions:
        assert len(set(history.items.tolist())) == len(history)
        assert (np.diff(history.times) > 0).all()
    assert (data.interactions.lengths == data.truth.lengths).all()
    assert data.interactions.lengths.min() >= 3


def test_sizes_titles_and_topics_are_as_asked(data: Synthetic) -> None:
    assert (data.interactions.n_users, len(data.catalogue)) == (400, 300)
    assert data.interactions.lengths.mean() == pytest.approx(30, rel=0.15)  # log-normal: s.e. 1.4
    assert {t for topics in data.catalogue.topics for t in topics} == {f"Topic {k}" for k in range(1, 7)}
    assert data.catalogue.titles[17].startswith("Item 17 (")
    assert any(f.endswith("0s") for f in data.catalogue.features)


def test_probabilities_sum_to_one_and_leave_out_the_history(data: Synthetic) -> None:
    for user in (0, 7, 399):
        history = before_last(data.interactions.history(user))
        law = data.truth.probabilities(user, history)
        assert law.dtype == np.float32
        assert law.sum() == pytest.approx(1, abs=1e-4)
        assert not law[history.items].any()
        assert data.truth.probabilities(user).sum() == pytest.approx(1, abs=1e-4)
        empty = data.truth.probabilities(user, History.of([]))
        assert empty == pytest.approx(data.truth.start[user] @ data.truth.shows, abs=1e-6)


def surprise(data: Synthetic, *, follow: float, drift: float, topics_of: int = 0) -> np.ndarray:
    """−log probability of each last item under a truth with these parameters, one for each user."""
    truth = data.truth
    other = type(truth)(
        start=np.roll(truth.start, topics_of, axis=0),
        end=np.roll(truth.end, topics_of, axis=0),
        memberships=truth.memberships,
        popularity=truth.popularity,
        shows=truth.shows,
        lengths=truth.lengths,
        drift=drift,
        follow=follow,
    )
    out = []
    for user in range(data.interactions.n_users):
        history = data.interactions.history(user)
        out.append(-np.log(other.probabilities(user, before_last(history))[history.items[-1]] + 1e-9))
    return np.array(out)


def standard_errors(losses: np.ndarray) -> float:
    """How many standard errors the mean lies above 0."""
    return float(losses.mean() / losses.std() * np.sqrt(len(losses)))


def test_the_truth_predicts_better_than_any_wrong_one(monkeypatch: pytest.MonkeyPatch) -> None:
    # 3,000 users; each wrong truth is worse by more than 4 standard errors of the paired difference.
    data = synthetic(users=3000, items=300, interactions=12, topics=6, drift=1.0, follow=0.6, seed=5)
    true = surprise(data, follow=0.6, drift=1.0)
    for wrong in (
        surprise(data, follow=0.0, drift=1.0),
        surprise(data, follow=1.0, drift=1.0),
        surprise(data, follow=0.6, drift=0.0),
        surprise(data, follow=0.6, drift=1.0, topics_of=1),
    ):
        assert standard_errors(wrong - true) > 4
    monkeypatch.setattr("penchant.simulations.data.synthetic.WINDOW", 1)
    assert standard_errors(surprise(data, follow=0.6, drift=1.0) - true) > 4


def test_first_items_follow_the_law_exactly_and_a_wrong_exponent_is_caught() -> None:
    # Summed over users, the count of an item first drawn has a mean and variance the truth gives: |z| stays within 4.5
    # for 40 items in all but 1 seed in 3,000.
    data = synthetic(users=20_000, items=40, interactions=3, topics=4, zipf=1.0, seed=3)
    first = np.bincount(data.interactions.items[data.interactions.offsets[:-1]], minlength=40)
    law = data.truth.start @ data.truth.shows
    z = (first - law.sum(axis=0)) / np.sqrt((law * (1 - law)).sum(axis=0))
    assert np.abs(z).max() < 4.5
    flatter = data.truth.shows**0.9
    wrong = data.truth.start @ (flatter / flatter.sum(axis=1, keepdims=True))
    assert np.abs((first - wrong.sum(axis=0)) / np.sqrt((wrong * (1 - wrong)).sum(axis=0))).max() > 6


def test_people_who_have_nearly_everything_still_get_unseen_items() -> None:
    data = synthetic(users=50, items=12, interactions=6, topics=6, zipf=3.0, follow=1.0, seed=1)
    assert all(len(set(h.items.tolist())) == len(h) for h in data.interactions)
    assert data.interactions.lengths.max() == 6


def test_strengths_have_the_mean_the_truth_gives() -> None:
    data = synthetic(users=2000, items=100, interactions=10, topics=4, drift=0.0, seed=2)
    expected = np.concatenate([data.truth.strengths(u)[h.items] for u, h in enumerate(data.interactions)])
    got = data.interactions.strengths
    assert got.min() >= 0
    assert got.max() <= 1
    for low, high in ((0.2, 0.4), (0.4, 0.7), (0.7, 0.91)):
        group = (expected >= low) & (expected < high)
        assert group.sum() > 500
        assert got[group].mean() == pytest.approx(expected[group].mean(), abs=0.025)  # sd 0.15, 500 rows: 3.7 s.e.
    assert np.corrcoef(got, expected)[0, 1] > 0.5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"users": 0}, "users must be"),
        ({"items": 5, "topics": 8}, "items must be at least the topics"),
        ({"items": 50, "interactions": 26}, "interactions must be from 3 to half the items"),
        ({"zipf": float("nan")}, "zipf must be"),
        ({"drift": 1.1}, "drift must be"),
        ({"follow": -0.1}, "follow must be"),
        ({"seed": -1}, "seed must be"),
    ],
)
def test_an_argument_out_of_range_is_named(options: dict[str, float], words: str) -> None:
    with pytest.raises(InvalidConfig, match=words):
        synthetic(**options)  # type: ignore[arg-type]  # floats stand in for ints here


@pytest.mark.slow
def test_fifty_thousand_people_are_feasible() -> None:
    data = synthetic(users=50_000, items=5000, interactions=50, seed=1)
    assert len(data.interactions) > 2_000_000
