"""Why an item is in a person's list: the interactions that carried its score, and every other term, in plain words.

    score = Σ named past + rest of the past + transition + prior + popularity + context
    share of a part = part ÷ sum of the positive parts

The parts are those of `InterestProfile.attribution`, so an explanation is not a story told afterwards: it is the sum
that ranked the item. Interactions with one item count together. An item with a topic that the catalogue marks as
sensitive, or that the person refused, is never named as a reason; its part is in the rest of the past.

The score of a network (`inference/`) is no sum over the past. There an item's part is a difference: the score, minus
what it would be had the person not chosen that item. Such parts need not sum to anything, and are worded so:

    part(j) = score(history) − score(history without j),    of the latest items, newest first, while there is time

Words are data: `messages/` holds one file for each language with the same keys and placeholders, and nothing is put
together in code but whole sentences.

What an explanation shows stays on the device; whoever sees the screen sees it.

Source: Hu, Koren and Volinsky 2008, "Collaborative filtering for implicit feedback datasets", section 5;
Li, Monroe and Jurafsky 2016, "Understanding neural networks through representation erasure",
https://arxiv.org/abs/1612.08220.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Literal

import numpy as np

from penchant.common.config import did_you_mean
from penchant.common.errors import InvalidConfig
from penchant.common.interests.distribution import Distribution, Preferences, Topics
from penchant.common.interests.profile import InterestProfile, Recommendation

LANGUAGES = ("en", "zh")
MOST = 3
"""How many past interactions are named at most."""

STRONG, SOME = 2 / 3, 1 / 3
"""Intensities from these on are called strong, or some interest."""

MOST_LEFT_OUT = 50
"""Of how many of the latest items a network is asked what it would score without each."""

SURE = 0.25
"""Below this share of its first uncertainty removed, an item is called uncertain."""


@dataclass(frozen=True)
class Reason:
    """A past interaction that carried a score.

    Attributes:
        item, title: what the person chose.
        part: of the score, > 0; with basis "without", what the score would be lower by.
        share: of the positive parts, in (0, 1].
    """

    item: str
    title: str
    part: float
    share: float


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Why one item is where it is.

    Attributes:
        item, title: what is explained.
        score: before any policy; the linear one, or a network's.
        basis: "sum": the parts are terms of the score. "without": reasons are what the score would be lower by without
            each, one at a time, and `rest` is all that is left. "start": of a network that has no history to read; all
            is `rest`.
        reasons: at most three, the largest first.
        rest: what all other past interactions gave together, those that took away included.
        transition: what followed from what was chosen last.
        prior: from what was known beforehand, such as topics that the person named.
        popularity: from being released as popular.
        context: from the moment.
        topic: the item's topic that is largest in the person's distribution; "" where nothing may or can be said.
        topic_share: of the person's interest, in [0, 1]; 0 without a topic.
        intensity: expected strength of interest, in [0, 1]; None where nobody worked it out.
        uncertainty: standard deviation of the taste's part of the score, in units of the score.
        known: share of that part's variance that the history has removed, in [0, 1].
        explored: shown to learn from it.
    """

    item: str
    title: str
    score: float
    reasons: tuple[Reason, ...]
    rest: float
    transition: float
    prior: float
    popularity: float
    context: float
    topic: str
    topic_share: float
    intensity: float | None
    uncertainty: float
    known: float
    explored: bool
    basis: Literal["sum", "without", "start"] = "sum"

    @property
    def total(self) -> float:
        """The sum of all parts: the score, to float32 rounding."""
        named = sum(reason.part for reason in self.reasons)
        return named + self.rest + self.transition + self.prior + self.popularity + self.context

    def sentence(self, language: str = "en") -> str:
        """In plain words.

        Raises:
            InvalidConfig: no such language.
        """
        words = messages(language)
        said = [words[self._because()].format(**self._named())]
        if self.topic:
            said.append(words["topic"].format(topic=self.topic, share=self.topic_share))
        if self.intensity is not None:
            level = "strong" if self.intensity >= STRONG else "some" if self.intensity >= SOME else "slight"
            said.append(words[f"intensity-{level}"].format(intensity=self.intensity))
        if self.known < SURE:
            said.append(words["uncertain"])
        if self.explored:
            said.append(words["explored"])
        return words["between"].join(said)

    def _because(self) -> str:
        """The key of what carried the score: the largest of the past and each other term."""
        if self.basis != "sum":
            return "because-start" if self.basis == "start" else f"without-{len(self.reasons) or 'other'}"
        past = sum(reason.part for reason in self.reasons) + self.rest
        terms = {"transition": self.transition, "prior": self.prior, "popularity": self.popularity}
        terms |= {"context": self.context, "past": past}
        largest = max(terms, key=lambda name: terms[name])
        if terms[largest] <= 0:
            return "because-nothing"
        if largest != "past":
            return f"because-{largest}"
        return f"because-{len(self.reasons)}" if self.reasons else "because-other"

    def _named(self) -> dict[str, str | float]:
        fields: dict[str, str | float] = {}
        for letter, reason in zip("abc", self.reasons, strict=False):
            fields |= {letter: reason.title, f"{letter}_share": reason.share}
        return fields


def explain(
    recommendation: Recommendation,
    profile: InterestProfile,
    *,
    topics: Topics | None = None,
    distribution: Distribution | None = None,
    preferences: Preferences | None = None,
    intensity: float | None = None,
    context: Mapping[str, str] | None = None,
    deadline_s: float = 0.2,
    clock: Callable[[], float] = time.monotonic,
) -> Explanation:
    """Why a profile recommends an item now.

    Args:
        context: the categories of the moment that the list was made with.
        topics, distribution: what items are about and what share each topic has; None of either names no topic.
        intensity: expected strength of interest in this item, in [0, 1], where it was worked out.
        deadline_s: after which a network is asked no further what it would score without an item; by `clock`.
    """
    if intensity is not None and not 0 <= intensity <= 1:
        raise InvalidConfig(f"intensity must be in [0, 1], not {intensity}")
    catalogue, item = profile.catalogue, recommendation.position
    preferences = preferences or Preferences()
    basis: Literal["sum", "without", "start"] = "sum"
    past: dict[int, float] = {}
    transition = prior = popularity = moment = 0.0
    if profile.network is None:
        parts = profile.attribution(item, context=context)
        for own, part in zip(profile.items, parts.past.tolist(), strict=True):
            past[own] = past.get(own, 0.0) + part
        transition, moment = float(parts.transition.sum()), float(sum(parts.context.values()))
        prior, popularity, all_past = parts.prior, parts.popularity, float(parts.past.sum())
    else:
        basis, all_past = "without" if len(profile.read) else "start", recommendation.score
        past = without(profile, item, until=clock() + deadline_s, clock=clock)
    unnamed = catalogue.is_sensitive | preferences.hidden(catalogue, topics)
    positive = sum(max(part, 0.0) for part in (*past.values(), transition, prior, popularity, moment))
    named = sorted((own for own, part in past.items() if part > 0 and not unnamed[own]), key=lambda own: -past[own])
    reasons = tuple(
        Reason(catalogue.ids[own], catalogue.titles[own], past[own], past[own] / positive) for own in named[:MOST]
    )
    topic, share = _topic(item, topics, distribution, catalogue.sensitive | preferences.refused)
    f = profile.side.vectors[item].astype(np.float64)
    variance = float(f @ np.linalg.solve(profile.taste().precision, f))
    believed = profile.standing(context).posterior  # of a network: in units of its scores
    before = float(f @ np.linalg.solve(profile.base, f))
    return Explanation(
        item=catalogue.ids[item],
        title=catalogue.titles[item],
        score=recommendation.score,
        reasons=reasons,
        rest=all_past - sum(reason.part for reason in reasons),
        transition=transition,
        prior=prior,
        popularity=popularity,
        context=moment,
        topic=topic,
        topic_share=share,
        intensity=intensity,
        uncertainty=float(believed.variance(profile.side.vectors[item][None])[0]) ** 0.5,
        known=min(max(1 - variance / before, 0.0), 1.0) if before > 0 else 0.0,
        explored=recommendation.explored,
        basis=basis,
    )


def without(profile: InterestProfile, item: int, *, until: float, clock: Callable[[], float]) -> dict[int, float]:
    """By own item, the newest first: how much lower this item would score had the person not chosen that one.

    Args:
        profile: one with a network. It keeps what it worked out, so that the next item of a list costs little.
        until: when by `clock` to stop; one item is looked at in any case.
    """
    assert profile.network is not None
    score, out = profile.score(item), dict[int, float]()
    for own in dict.fromkeys(profile.read[::-1].tolist()):
        if len(out) == MOST_LEFT_OUT or (out and clock() >= until):
            break
        out[own] = score - profile.network.score_of(profile.reading(own), item)
    return out


def _topic(
    item: int, topics: Topics | None, distribution: Distribution | None, unsaid: frozenset[str]
) -> tuple[str, float]:
    """The item's topic of the largest share, and that share; "" and 0 where there is none."""
    if topics is None or distribution is None:
        return "", 0.0
    shares = dict(zip(distribution.names, distribution.shares.tolist(), strict=True))
    own = [topics.names[t] for t in np.flatnonzero(topics.shares[item])]
    said = [name for name in own if name in shares and name not in unsaid]
    best = max(said, key=lambda name: shares[name], default="")
    return best, shares.get(best, 0.0)


@functools.cache
def messages(language: str, package: str = "penchant.common.interests") -> Mapping[str, str]:
    """A language's sentences by key.

    Args:
        package: beside whose modules they lie, in `messages/`.

    Raises:
        InvalidConfig: no such language.
    """
    if language not in LANGUAGES:
        raise InvalidConfig(f"no language {language!r}{did_you_mean(language, LANGUAGES)}")
    file = resources.files(package) / "messages" / f"{language}.json"
    found: Mapping[str, str] = json.loads(file.read_text(encoding="utf-8"))
    return found
