"""Why an item is in a list: parts that sum to its score, in words that name nothing they must not."""

from __future__ import annotations

import dataclasses
import string

import numpy as np
import pytest

from penchant.common.arrays import Float32, Int64
from penchant.common.catalogue import Catalogue
from penchant.common.errors import InvalidConfig
from penchant.common.inference.scorer import Scorer
from penchant.common.interactions import History
from penchant.common.interests import InterestConfig, InterestProfile, Recommendation
from penchant.common.interests import distribution as distributions
from penchant.common.interests.distribution import Preferences, Topics
from penchant.common.interests.explanations import LANGUAGES, MOST, Explanation, explain, messages
from penchant.common.taste import ItemSide, TasteConfig, Transitions

N_ITEMS, DIM = 40, 6
_random = np.random.default_rng(0)
VECTORS: Float32 = np.abs(_random.standard_normal((N_ITEMS, DIM))).astype(np.float32)
SIDE = ItemSide(
    VECTORS,
    _random.random(N_ITEMS).astype(np.float32),
    TasteConfig(decay=0.8, popularity=0.3, transition=0.5),
    Transitions(*_random.standard_normal((2, N_ITEMS, 3)).astype(np.float32)),
)
PLAIN = dataclasses.replace(SIDE, config=TasteConfig(), transitions=None)
TOPICS = ("Comedy", "Crime", "Faith", "Noir")
CATALOGUE = Catalogue(
    ids=tuple(f"i{k}" for k in range(N_ITEMS)),
    titles=tuple(f"Film {k}" for k in range(N_ITEMS)),
    topics=tuple((TOPICS[k % 4], TOPICS[(k // 4) % 4]) for k in range(N_ITEMS)),
)
ITEMS = [3, 12, 5, 12, 30, 9]


def after(items: list[int], catalogue: Catalogue = CATALOGUE, side: ItemSide = SIDE) -> InterestProfile:
    return InterestProfile.of(side, catalogue, History.of(items), InterestConfig(share=0.0))


def explained(profile: InterestProfile, preferences: Preferences | None = None, n: int = 10) -> list[Explanation]:
    topics = Topics.of(profile.catalogue)
    shares = distributions.of_profile(profile, topics, preferences=preferences)
    return [
        explain(one, profile, topics=topics, distribution=shares, preferences=preferences, intensity=0.8)
        for one in profile.recommend(n)
    ]


def test_parts_of_every_explanation_sum_to_its_score() -> None:
    profile = InterestProfile(SIDE, CATALOGUE, prior=_random.standard_normal(DIM))
    for item, strength in zip(ITEMS, [1.0, 0.4, 0.0, 1.0, 0.7, 0.9], strict=True):
        profile.update(item, strength=strength)
    for found in explained(profile, n=N_ITEMS):
        assert found.total == pytest.approx(found.score, abs=1e-5)
        assert found.prior != 0
        assert found.transition != 0
        assert found.context == 0


def test_parts_sum_to_a_score_that_the_moment_shifted_too() -> None:
    profile = InterestProfile(SIDE, CATALOGUE)
    for k, item in enumerate([*ITEMS, *ITEMS[::-1]]):
        profile.update(item, context={"place": "home" if k % 2 else "work"})
    for one in profile.recommend(5, context={"place": "home"}):
        found = explain(one, profile, context={"place": "home"})
        assert found.total == pytest.approx(one.score, abs=1e-5)
        assert found.context != 0
        assert explain(one, profile).context == 0


def test_reasons_are_the_interactions_that_gave_most_each_item_once_and_shares_are_of_what_was_positive() -> None:
    profile = after(ITEMS, side=PLAIN)
    (one, *_) = profile.recommend(1)
    parts = profile.attribution(one.position)
    by_item: dict[int, float] = {}
    for own, part in zip(ITEMS, parts.past, strict=True):
        by_item[own] = by_item.get(own, 0.0) + part
    largest = sorted(by_item, key=lambda own: -by_item[own])[:MOST]
    found = explain(one, profile)
    assert [reason.item for reason in found.reasons] == [f"i{own}" for own in largest]
    assert [reason.part for reason in found.reasons] == pytest.approx([by_item[own] for own in largest])
    positive = sum(part for part in by_item.values() if part > 0)
    assert [reason.share for reason in found.reasons] == pytest.approx([by_item[own] / positive for own in largest])


def test_an_item_of_a_sensitive_topic_is_never_a_reason_and_its_topic_never_named_though_its_part_is_counted() -> None:
    marked = dataclasses.replace(CATALOGUE, sensitive=frozenset({"Faith"}))
    items = list(range(12))
    open_, closed = explained(after(items)), explained(after(items, marked))
    faith = {f"i{k}" for k in range(N_ITEMS) if "Faith" in CATALOGUE.topics[k]}
    named = {reason.item for found in open_ for reason in found.reasons}
    assert named & faith
    assert any(found.topic == "Faith" for found in open_)
    for found in closed:
        assert not {reason.item for reason in found.reasons} & faith
        assert found.topic != "Faith"
        assert all("Faith" not in found.sentence(language) for language in LANGUAGES)
        assert found.total == pytest.approx(found.score, abs=1e-5)
    # topics of a catalogue before it was marked do not help
    profile, topics = after(items, marked), Topics.of(CATALOGUE)
    shares = distributions.of_profile(profile, topics)
    assert all(
        explain(one, profile, topics=topics, distribution=shares).topic != "Faith" for one in profile.recommend(20)
    )


def test_a_refused_topic_is_not_named_and_its_items_are_no_reasons() -> None:
    no = Preferences(refused=frozenset({"Noir"}))
    noir = {f"i{k}" for k in range(N_ITEMS) if "Noir" in CATALOGUE.topics[k]}
    profile = after(list(range(12)))
    assert {reason.item for found in explained(profile) for reason in found.reasons} & noir
    for found in explained(profile, no, n=20):
        assert not {reason.item for reason in found.reasons} & noir
        assert found.topic != "Noir"


def test_the_topic_is_the_items_own_that_the_person_likes_most() -> None:
    profile = after([0, 16, 32])  # Comedy
    for found in explained(profile, n=20):
        own = CATALOGUE.topics[CATALOGUE.index[found.item]]
        shares = dict(distributions.of_profile(profile, Topics.of(CATALOGUE)).top(4))
        assert found.topic in own
        assert found.topic_share == max(shares[name] for name in own)


def test_what_was_seen_makes_things_like_it_less_uncertain() -> None:
    item = Recommendation("i20", 20, 0.0)
    nothing, something = explain(item, after([])), explain(item, after([20, 20]))
    assert nothing.known == pytest.approx(0)
    assert something.known > 0.5
    assert something.uncertainty < nothing.uncertainty
    assert messages("en")["uncertain"] in nothing.sentence()
    assert messages("en")["uncertain"] not in something.sentence()


# ---------------------------------------------------------------------------------------------------- words

REST = Explanation(
    item="i1", title="Heat", score=0.0, reasons=(), rest=0.0, transition=0.0, prior=0.0, popularity=0.0, context=0.0,
    topic="", topic_share=0.0, intensity=None, uncertainty=0.1, known=1.0, explored=False,
)  # fmt: skip


def test_both_languages_have_every_key_with_the_same_placeholders() -> None:
    def fields(sentence: str) -> set[tuple[str, str]]:
        return {(name, spec or "") for _, name, spec, _ in string.Formatter().parse(sentence) if name is not None}

    first, *others = (messages(language) for language in LANGUAGES)
    for other in others:
        assert list(other) == list(first)
        for key in first:
            assert fields(other[key]) == fields(first[key]), key
            assert other[key] != first[key] or not first[key].strip()
    assert fields(first["because-2"]) == {("a", ""), ("a_share", ".0%"), ("b", ""), ("b_share", ".0%")}


def test_a_sentence_says_each_thing_once_in_both_languages() -> None:
    profile = after(ITEMS, side=PLAIN)
    (one, *_) = explained(profile, n=1)
    full = dataclasses.replace(one, known=0.1, explored=True)
    assert full.sentence().startswith(f"Because you chose {one.reasons[0].title} ({one.reasons[0].share:.0%}), ")
    assert f"Its topic {one.topic} is {one.topic_share:.0%} of your interest." in full.sentence()
    assert "a lot (80%)" in full.sentence()
    assert full.sentence().endswith("not only by its score.")
    assert full.sentence("zh").startswith(f"因为你选过“{one.reasons[0].title}”")
    assert full.sentence("zh").count("。") == full.sentence().count(". ") + 1 == 5
    for language in LANGUAGES:
        assert "{" not in full.sentence(language)


@pytest.mark.parametrize(
    ("parts", "key"),
    [
        ({"popularity": 0.3, "rest": 0.2}, "because-popularity"),
        ({"prior": 0.3, "popularity": 0.2}, "because-prior"),
        ({"transition": 0.3, "prior": 0.2}, "because-transition"),
        ({"context": 0.3, "transition": 0.2}, "because-context"),
        ({"rest": 0.3, "context": 0.2}, "because-other"),
        ({"rest": -0.3}, "because-nothing"),
        ({}, "because-nothing"),
    ],
)
def test_without_a_reason_that_may_be_named_the_largest_term_is_said(parts: dict[str, float], key: str) -> None:
    for language in LANGUAGES:
        assert dataclasses.replace(REST, **parts).sentence(language) == messages(language)[key]  # type: ignore[arg-type]  # fields by name


@pytest.mark.parametrize(("intensity", "level"), [(0.9, "strong"), (0.5, "some"), (0.1, "slight")])
def test_intensity_is_said_in_three_steps(intensity: float, level: str) -> None:
    said = dataclasses.replace(REST, intensity=intensity).sentence()
    assert messages("en")[f"intensity-{level}"].format(intensity=intensity) in said


def test_a_title_is_never_read_as_a_pattern() -> None:
    catalogue = dataclasses.replace(CATALOGUE, titles=("{a.__class__} {0}",) * N_ITEMS)
    (one, *_) = explained(after(ITEMS, catalogue, PLAIN), n=1)
    assert "{a.__class__} {0}" in one.sentence()


def test_what_is_no_language_or_intensity_is_refused() -> None:
    with pytest.raises(InvalidConfig, match="no language 'fr'; choose from en, zh"):
        REST.sentence("fr")
    with pytest.raises(InvalidConfig, match="intensity"):
        explain(Recommendation("i1", 1, 0.0), after([]), intensity=1.5)


# ------------------------------------------------------------------------------------------------------ networks


class Network(Scorer):
    """Scores item 1 by 3 once, if item 9 was read, by 2 if 5 was, by −1 for each 12; all others by their place."""

    n_items = N_ITEMS
    vectors = VECTORS

    nobody = np.arange(N_ITEMS, dtype=np.float32)

    def person(self, history: Int64) -> Float32:
        out = -np.arange(N_ITEMS, dtype=np.float32)
        out[1] = 3 * (9 in history) + 2 * (5 in history) - np.count_nonzero(history == 12)
        return out

    def scores_of(self, person: Float32) -> Float32:
        return person

    def score_of(self, person: Float32, item: int) -> float:
        return float(person[item])


def by_network(items: list[int], catalogue: Catalogue = CATALOGUE, *, deadline_s: float = 1.0) -> Explanation:
    network = Network()
    profile = InterestProfile(network.side, catalogue, network=network)
    for item in items:
        profile.update(item)
    clock = iter(range(100)).__next__  # one second for each look
    return explain(Recommendation("i1", 1, profile.score(1)), profile, deadline_s=deadline_s, clock=clock)


def test_a_networks_reasons_are_what_the_score_would_lose_without_each() -> None:
    one = by_network(ITEMS, deadline_s=100)
    assert one.basis == "without"
    assert one.score == 3
    assert [(reason.item, reason.part, reason.share) for reason in one.reasons] == [("i9", 3, 0.6), ("i5", 2, 0.4)]
    assert one.total == one.score
    assert one.sentence().startswith("It would score lower if you had not chosen Film 9, or not Film 5.")
    assert "%" not in one.sentence()  # a difference is no share of a whole


def test_a_network_is_asked_of_the_newest_first_and_no_longer_than_it_may() -> None:
    assert [reason.item for reason in by_network(ITEMS, deadline_s=1).reasons] == ["i9"]
    assert [reason.item for reason in by_network([9, 3], deadline_s=0).reasons] == []  # one is looked at in any case
    assert [reason.item for reason in by_network([3, 9], deadline_s=0).reasons] == ["i9"]
    assert [reason.item for reason in by_network([9, *range(13, 38), *range(13, 38)], deadline_s=90).reasons] == ["i9"]


def test_a_network_names_nothing_sensitive_or_refused_and_no_reason_that_is_none() -> None:
    sensitive = dataclasses.replace(CATALOGUE, sensitive=frozenset({CATALOGUE.topics[9][0]}))
    assert "i9" not in {reason.item for reason in by_network(ITEMS, sensitive, deadline_s=100).reasons}
    for items in ([12, 12], [3]):
        one = by_network(items, deadline_s=100)
        assert one.reasons == ()
        assert one.sentence().startswith(messages("en")["without-other"])


def test_before_a_history_a_network_says_that_it_knows_nothing() -> None:
    one = by_network([])
    assert (one.basis, one.score, one.reasons) == ("start", 1.0, ())
    assert one.sentence().startswith(messages("en")["because-start"])
