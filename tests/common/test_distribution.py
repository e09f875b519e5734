"""What share of a person's interest each topic has, and lists that keep it."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penchant.common import content
from penchant.common.arrays import Float32, Float64
from penchant.common.catalogue import Catalogue
from penchant.common.errors import InvalidConfig, MalformedData
from penchant.common.interactions import History
from penchant.common.interests import InterestProfile
from penchant.common.interests import distribution as d
from penchant.common.interests.distribution import Distribution, DistributionConfig, Preferences, Topics
from penchant.common.interests.quantized import Quantized, pack, unpack
from penchant.common.taste import ItemSide, TasteConfig, Transitions

FILMS = Catalogue(
    ids=("1", "2", "3", "4", "5"),
    titles=("Toy Story (1995)", "Heat (1995)", "Alien (1979)", "Up (2009)", "Nothing known"),
    topics=(("Comedy", "Family"), ("Crime",), ("Horror", "Faith"), ("Family", "Family"), ()),
)
MARKED = dataclasses.replace(FILMS, sensitive=frozenset({"Faith"}))
POPULARITY: Float32 = np.array([1.0, 0.5, 0.25, 0.25, 1.0], np.float32)
ONE = DistributionConfig(general=2.0, keep=0.5, predicted=2.0, n_predicted=2)

# ---------------------------------------------------------------------------------------------------- shares


def test_an_items_topics_share_it_equally_and_nothing_is_shared_of_an_item_without() -> None:
    topics = Topics.of(FILMS)
    assert topics.names == ("Comedy", "Crime", "Faith", "Family", "Horror")
    expected = [[0.5, 0, 0, 0.5, 0], [0, 1, 0, 0, 0], [0, 0, 0.5, 0, 0.5], [0, 0, 0, 1, 0], [0, 0, 0, 0, 0]]
    assert topics.shares.tolist() == expected


def test_shares_are_those_of_the_formula() -> None:
    topics = Topics.of(FILMS)
    # worked out by hand: g = (0.5, 0.5, 0.125, 0.75, 0.125) / 2; items 1 at 0.5 · 0.8 and 0 at 1, 1.4 in all;
    # predicted items 3 and 2
    scores = np.array([-np.inf, -np.inf, 1.0, 2.0, 0.0], np.float32)
    found = d.distribution(topics, POPULARITY, [1, 0], [0.8, 1.0], scores, config=ONE)
    expected = np.array([[0.5, 0.5, 0.125, 0.75, 0.125], [0.5, 0.4, 0, 0.5, 0], [0, 0, 0.7, 1.4, 0.7]]).sum(axis=0)
    np.testing.assert_allclose(found.counts, expected)
    assert found.shares.sum() == pytest.approx(1)
    unknown = d.distribution(topics, POPULARITY, [], [], scores, config=ONE)  # of whom nothing can be predicted
    np.testing.assert_allclose(unknown.shares, d.general(topics, POPULARITY))
    ((name, share),) = found.top(1)
    assert name == "Family"
    assert share == pytest.approx(2.65 / expected.sum())


def test_with_no_interaction_and_nothing_predicted_shares_are_the_general_ones() -> None:
    topics = Topics.of(FILMS)
    found = d.distribution(topics, POPULARITY, [], [])
    np.testing.assert_allclose(found.shares, d.general(topics, POPULARITY))
    np.testing.assert_allclose(d.general(topics, np.zeros(5, np.float32)), np.array([0.5, 1, 0.5, 1.5, 0.5]) / 4)


def test_more_interactions_move_shares_from_the_general_ones_and_narrow_their_intervals() -> None:
    topics = Topics.of(FILMS)
    crime, width = [], []
    for n in (0, 1, 5, 20):
        found = d.distribution(topics, POPULARITY, [1] * n, [1.0] * n)
        low, high = found.interval()
        crime.append(found.shares[1])
        width.append((high - low)[3])  # Family, of which nothing was seen
        assert (low <= found.shares).all()
        assert (found.shares <= high).all()
    assert crime == sorted(crime)
    assert len(set(crime)) == 4
    assert width == sorted(width, reverse=True)


def test_a_profiles_distribution_is_that_of_its_events_and_its_scores() -> None:
    random = np.random.default_rng(3)
    side = ItemSide(random.standard_normal((5, 3)).astype(np.float32), POPULARITY, TasteConfig(popularity=0.1))
    profile = InterestProfile.of(side, FILMS, History.of([1]))
    profile.update(0, strength=0.5, weight=0.6)
    topics = Topics.of(FILMS)
    expected = d.distribution(topics, POPULARITY, [1, 0], [1.0, 0.3], profile.standing().scores)
    np.testing.assert_allclose(d.of_profile(profile, topics).counts, expected.counts)
    refused = Preferences(refused=frozenset({"Family"}))
    found = d.of_profile(profile, topics, preferences=refused, config=DistributionConfig(predicted=2.0))
    assert found.names == ("Comedy", "Crime", "Faith", "Horror")
    unpredicted = d.distribution(topics, POPULARITY, [1, 0], [1.0, 0.3], preferences=refused)
    # what may be shown is items 2 and 4, and of 4 nothing is known: all that is predicted is item 2's
    np.testing.assert_allclose(found.counts - unpredicted.counts, [0, 0, 1.3, 1.3], atol=1e-12)


@given(st.lists(st.tuples(st.floats(1e-3, 500), st.floats(1e-3, 500)), min_size=1, max_size=4))
def test_intervals_are_the_betas(pairs: list[tuple[float, float]]) -> None:
    from scipy.stats import beta

    a, b = np.array(pairs).T
    found = d.beta_quantiles(a, b, [0.025, 0.5, 0.975])
    np.testing.assert_allclose(found, [beta.ppf(q, a, b) for q in (0.025, 0.5, 0.975)], atol=1e-3)


def test_a_topic_without_count_has_no_interval_and_the_only_one_has_all() -> None:
    assert np.array(Distribution(("a", "b"), np.array([0.0, 3.0])).interval()).tolist() == [[0, 1], [0, 1]]


# ---------------------------------------------------------------------------------------------------- what stays out


def test_a_sensitive_topic_is_in_no_distribution_no_feature_and_no_name() -> None:
    topics = Topics.of(MARKED)
    assert "Faith" not in topics.names
    assert topics.shares[2].tolist() == [0, 0, 0, 1]  # the item is all Horror
    assert "Faith" not in MARKED.features
    for rows in (MARKED.content, content.features(MARKED)):
        np.testing.assert_allclose(rows, dataclasses.replace(FILMS, topics=tuple(
            tuple(t for t in own if t != "Faith") for own in FILMS.topics
        )).content, rtol=1e-6)  # fmt: skip
    vectors = np.random.default_rng(0).standard_normal((5, 2)).astype(np.float32)
    clusters = Topics.clusters(MARKED, vectors, 2)
    assert clusters.shares[2].tolist() == [0, 0]
    assert not any("Faith" in name for name in clusters.names)
    assert Topics.clusters(FILMS, vectors, 2).shares[2].sum() == 1


def test_a_refused_topic_is_not_in_the_distribution_and_its_items_are_hidden_whether_sensitive_or_not() -> None:
    no = Preferences(refused=frozenset({"Family", "Faith", "not a topic"}))
    assert no.hidden(MARKED, Topics.of(MARKED)).tolist() == [True, False, True, True, False]
    found = d.distribution(Topics.of(MARKED), POPULARITY, [0], [1.0], preferences=no)
    every = d.distribution(Topics.of(MARKED), POPULARITY, [0], [1.0])
    assert found.names == ("Comedy", "Crime", "Horror")
    np.testing.assert_allclose(found.counts, every.counts[[0, 1, 3]])  # a Dirichlet's own conditional
    assert not Preferences().hidden(MARKED, Topics.of(MARKED)).any()


def test_a_refused_cluster_is_hidden() -> None:
    topics = Topics(("a", "b"), np.array([[1.0, 0], [0, 1.0], [0, 0], [0, 1], [0, 0]]))
    no = Preferences(refused=frozenset({"b"}))
    assert no.hidden(FILMS, topics).tolist() == [False, True, False, True, False]


# ---------------------------------------------------------------------------------------------------- clusters


def planted(n: int = 90) -> tuple[Catalogue, Float32]:
    random = np.random.default_rng(5)
    group = np.arange(n) % 3
    vectors = np.eye(3)[group] * 4 + 0.3 * random.standard_normal((n, 3))
    names = ("Noir", "Musical", "War")
    catalogue = Catalogue(
        ids=tuple(map(str, range(n))),
        titles=tuple(f"The {('night', 'song', 'hill')[g]} {i} (1950)" for i, g in enumerate(group)),
        topics=tuple((names[g], "Drama") for g in group),
        categories={"studio": tuple(("Fox", "", "")[g] for g in group)},
    )
    return catalogue, vectors.astype(np.float32)


def test_clusters_find_planted_groups_and_are_named_by_what_is_usual_only_there() -> None:
    catalogue, vectors = planted()
    found = Topics.clusters(catalogue, vectors, 3)
    for name, members in zip(found.names, found.shares.T, strict=True):
        topic = name.split(", ")[0] if "Fox" not in name else "Noir"
        assert [topic in own for own in catalogue.topics] == members.astype(bool).tolist()
        assert "Drama" not in name  # everywhere
        assert "the" not in name.split(", ")
    assert sorted(itertools.chain(*(name.split(", ") for name in found.names))) == sorted(
        ["Fox", "Noir", "night", "Musical", "song", "War", "hill"]
    )
    again = Topics.clusters(catalogue, vectors, 3)
    assert again.names == found.names
    np.testing.assert_array_equal(again.shares, found.shares)


def test_clusters_of_few_different_vectors_are_as_many_and_no_vector_is_in_none() -> None:
    vectors = np.array([[1, 0], [2, 0], [0, 1], [0, 0], [0, 3]], np.float32)
    found = Topics.clusters(FILMS, vectors, 4)
    assert found.shares.sum(axis=1).tolist() == [1, 1, 1, 0, 1]
    assert found.shares.shape == (5, 2)
    assert len(set(found.names)) == 2
    assert Topics.clusters(FILMS, np.zeros((5, 2), np.float32), 2).names == ()


def test_log_odds_put_a_word_of_one_group_above_a_word_of_all_and_a_rare_one_below_a_usual_one() -> None:
    z = d.over_represented(np.array([[30.0, 2, 40], [0, 0, 40]]))
    assert z[0, 0] > z[0, 1] > z[0, 2]
    assert z[1, 0] < 0
    # by the formula: y 30 of 72, elsewhere 0 of 40, prior (15, 1, 40)
    delta = np.log(45 / (72 + 56 - 45)) - np.log(15 / (40 + 56 - 15))
    assert z[0, 0] == pytest.approx(delta / np.sqrt(1 / 45 + 1 / 15))


# ---------------------------------------------------------------------------------------------------- calibrated lists

SHARES: Float64 = np.eye(2)[[0] * 10 + [1] * 10]
SCORES: Float64 = np.linspace(1, 0, 20)


def test_at_weight_zero_a_list_is_the_best_by_score_and_ties_go_by_position() -> None:
    target = np.array([0.5, 0.5])
    assert d.calibrated(SCORES, np.arange(20), SHARES, target, 5, 0.0).tolist() == [0, 1, 2, 3, 4]
    assert d.calibrated(np.zeros(20), np.arange(19, -1, -1), SHARES, target, 3, 0.0).tolist() == [0, 1, 2]


def test_at_weight_one_a_list_has_the_wanted_shares_and_between_it_pays_with_score() -> None:
    target = np.array([0.7, 0.3])
    found = [d.calibrated(SCORES, np.arange(20), SHARES, target, 10, weight) for weight in (0.0, 0.5, 1.0)]
    assert SHARES[found[2]].mean(axis=0).tolist() == [0.7, 0.3]
    kl = [float(d.divergence(target, SHARES[chosen].mean(axis=0))) for chosen in found]
    paid = [SCORES[chosen].sum() for chosen in found]
    assert kl[0] > kl[1] >= kl[2] == pytest.approx(0, abs=1e-9)
    assert paid[0] > paid[1] >= paid[2]


def test_each_choice_is_the_best_next_one() -> None:
    random = np.random.default_rng(2)
    scores, shares = random.random(12), random.dirichlet(np.ones(3), 12)
    target, weight = np.array([0.2, 0.3, 0.5]), 0.4
    found = d.calibrated(scores, np.arange(12), shares, target, 4, weight).tolist()
    value = (scores - scores.min()) / np.ptp(scores)
    for size in range(4):

        def worth(item: int, size: int = size) -> float:
            chosen = [*found[:size], item]
            return float(
                (1 - weight) * value[chosen].sum() - weight * d.divergence(target, shares[chosen].mean(axis=0))
            )

        assert found[size] == max(set(range(12)) - set(found[:size]), key=worth)


def test_what_must_not_be_shown_is_not_chosen_and_a_short_list_is_short() -> None:
    scores = np.where(np.arange(20) < 17, -np.inf, SCORES)
    assert sorted(d.calibrated(scores, np.arange(20), SHARES, np.array([1.0, 0]), 9, 1.0)) == [17, 18, 19]
    assert not len(d.calibrated(scores, np.arange(5), SHARES, np.array([1.0, 0]), 9, 1.0))


def test_a_list_under_a_refusal_has_no_item_of_that_topic_whatever_is_wanted() -> None:
    no, topics = Preferences(refused=frozenset({"Family"})), Topics.of(FILMS)
    scores = np.where(no.hidden(FILMS), -np.inf, np.array([5.0, 1, 1, 4, 0]))
    target = d.distribution(topics, POPULARITY, [3, 3], [1.0, 1.0], preferences=no).shares
    shares = topics.without(no).shares
    assert sorted(d.calibrated(scores, np.arange(5), shares, target, 5, 0.9)) == [1, 2, 4]
    with pytest.raises(InvalidConfig, match="the target has 4 topics, the items 5"):
        d.calibrated(scores, np.arange(5), topics.shares, target, 5, 0.9)


def test_divergences_are_those_of_scipy() -> None:
    from scipy.spatial.distance import jensenshannon
    from scipy.stats import entropy

    p, q = np.array([0.2, 0.8, 0.0]), np.array([0.5, 0.0, 0.5])
    assert d.jensen_shannon(p, q) == pytest.approx(jensenshannon(p, q, 2) ** 2)
    assert d.jensen_shannon(p, p) == 0
    assert d.divergence(p, q) == pytest.approx(entropy(p, 0.99 * q + 0.01 * p))


def test_what_makes_no_sense_is_refused() -> None:
    wrong: list[dict[str, Any]] = [
        {"general": 0.0}, {"general": float("nan")}, {"keep": 0.0}, {"predicted": -1.0}, {"n_predicted": 0}
    ]  # fmt: skip
    for fields in wrong:
        with pytest.raises(InvalidConfig, match=next(iter(fields))):
            DistributionConfig(**fields)
    with pytest.raises(InvalidConfig, match=r"use Topics\.clusters"):
        Topics.of(Catalogue(ids=("a",)))
    with pytest.raises(InvalidConfig, match="at least 2"):
        Topics.clusters(FILMS, np.ones((5, 2), np.float32), 1)
    with pytest.raises(InvalidConfig, match="4 vectors for a catalogue of 5"):
        Topics.clusters(FILMS, np.ones((4, 2), np.float32))
    with pytest.raises(InvalidConfig, match="weight"):
        d.calibrated(SCORES, np.arange(20), SHARES, np.array([0.5, 0.5]), 5, 1.1)
    with pytest.raises(InvalidConfig, match="3 topics, the items 2"):
        d.calibrated(SCORES, np.arange(20), SHARES, np.ones(3) / 3, 5, 0.5)
    with pytest.raises(InvalidConfig, match="level"):
        Distribution(("a",), np.ones(1)).interval(1.0)


# ---------------------------------------------------------------------------------------------------- one byte a number


@given(st.integers(0, 2**32 - 1), st.sampled_from([1e-20, 1.0, 1e20]))
def test_no_number_is_off_by_more_than_half_a_step_and_the_size_is_a_quarter(seed: int, scale: float) -> None:
    rows = (np.random.default_rng(seed).standard_normal((7, 64)) * scale).astype(np.float32)
    rows[3] = 0
    small = Quantized.of(rows)
    assert (np.abs(small.rows() - rows) <= 0.5001 * small.scales[:, None]).all()
    assert not small.rows()[3].any()
    assert small.n_bytes == rows.nbytes // 4 + 7 * 4


def test_an_item_side_comes_back_with_every_table_close_and_its_settings() -> None:
    random = np.random.default_rng(0)
    tables = [random.standard_normal((5, 8)).astype(np.float32) for _ in range(3)]
    side = ItemSide(tables[0], POPULARITY, TasteConfig(transition=0.4), Transitions(*tables[1:]), content=2)
    back = unpack(pack(side), side)
    assert back.transitions is not None
    pairs = [(back.vectors, tables[0]), (back.transitions.leave, tables[1]), (back.transitions.arrive, tables[2])]
    for found, given_ in pairs:
        assert 0 < np.abs(found - given_).max() < np.abs(given_).max() / 250
    np.testing.assert_array_equal(back.popularity, POPULARITY)
    assert (back.config, back.content) == (side.config, side.content)
    bare = dataclasses.replace(side, transitions=None)
    assert unpack(pack(bare), bare).transitions is None


def test_what_is_no_quantized_table_is_refused() -> None:
    side = ItemSide(np.ones((5, 2), np.float32), POPULARITY, TasteConfig())
    arrays = pack(side)
    wrong = [
        ({"vectors.int8": arrays["vectors.int8"].astype(np.float32)}, "int8"),
        ({"vectors.scales": np.full(5, np.nan, np.float32)}, "finite"),
        ({"vectors.scales": arrays["vectors.scales"][:4]}, "scales"),
        ({"popularity": POPULARITY[:4]}, "5 rows, popularity 4"),
    ]
    for change, words in wrong:
        with pytest.raises(MalformedData, match=words):
            unpack(arrays | change, side)
    with pytest.raises(MalformedData, match=r"lacks 'vectors\.scales'"):
        unpack({name: rows for name, rows in arrays.items() if name != "vectors.scales"}, side)
    with pytest.raises(InvalidConfig, match="finite"):
        Quantized.of(np.full((1, 1), np.inf, np.float32))
