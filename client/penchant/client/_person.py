"""One person on their own device: events in, lists, shares and reasons out. No file, no network, no key.

What is kept of a person is their events and what they said of topics and items. The profile over a release's item
vectors follows from these, and is made anew when the release changes or events are dropped. Where the release is a
network, its scores of the same events order the lists, and the profile says the rest.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import cached_property

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from penchant.client._releases import Installed
from penchant.client._store import Event
from penchant.client._types import Interests, Recommendation, Strengths, TopicShare
from penchant.common.arrays import Bool
from penchant.common.config import did_you_mean
from penchant.common.errors import InvalidConfig, MalformedData
from penchant.common.interactions import History
from penchant.common.interests import InterestConfig, InterestProfile, Policy, strength
from penchant.common.interests import Recommendation as Ranked
from penchant.common.interests.distribution import Distribution, Preferences, Topics, of_profile
from penchant.common.interests.explanations import Explanation, explain


class Person:
    """Not for several threads at once.

    Args:
        installed: the release in use.
        refused: topics that the person refused.
        hidden: items that the person refused.
    """

    def __init__(
        self,
        installed: Installed,
        strengths: Strengths,
        config: InterestConfig | None = None,
        *,
        refused: Iterable[str] = (),
        hidden: Iterable[str] = (),
    ) -> None:
        self.catalogue, self.side, self.network = installed.catalogue, installed.side, installed.network
        self._strengths, self._table = strengths, {**strength.EVENTS, **strengths.events}
        self.refused, self.hidden = set(refused), set(hidden)
        self.profile = InterestProfile(self.side, self.catalogue, config, network=self.network)
        self.n_events = 0
        self._worked: Distribution | None = None
        self.say()

    def strength(self, event: Event) -> float:
        """How strong a sign of interest an event is: what the app said, else its rating, its dwell or its kind.

        Raises:
            InvalidConfig: a kind without a strength, a rating off the scale, a negative dwell.
        """
        if event.strength is not None:
            return event.strength
        if event.rating is not None:
            return strength.of_rating(event.rating, *self._strengths.rating)
        by_kind = strength.of_event(event.kind, self._table)
        if event.dwell_s is None:
            return by_kind
        place, durations = self.catalogue.index.get(event.item), self.catalogue.numbers.get(self._strengths.duration)
        length = np.nan if place is None or durations is None else durations[place]
        return strength.of_dwell(event.dwell_s, length) if length > 0 else by_kind

    def said(self, event: Event) -> float | None:
        """Its strength; None where the app no longer has one for its kind or scale."""
        try:
            return self.strength(event)
        except InvalidConfig:
            return None

    def take(self, event: Event) -> None:
        """One event, newer than all before. One of an item that this catalogue does not have waits for another."""
        self.n_events += 1
        if (place := self.catalogue.index.get(event.item)) is None:
            return
        if (said := self.said(event)) is None:
            return
        self.profile.update(place, strength=said, context=event.context, time=event.at_ms)
        self._worked = None

    def say(self) -> None:
        """Takes what the person refused into the lists."""
        hidden: Bool = Preferences(refused=frozenset(self.refused)).hidden(self.catalogue)
        hidden[[self.catalogue.index[item] for item in self.hidden if item in self.catalogue.index]] = True
        self.profile.hide(hidden)
        self._worked = None

    def recommend(
        self, n: int, context: Mapping[str, str] | None, policy: Policy | None, random: np.random.Generator | None
    ) -> list[Recommendation]:
        found = self.profile.recommend(n, policy=policy, random=random, context=context)
        titles = self.catalogue.titles
        return [Recommendation(one.item, titles[one.position], one.score, one.explored) for one in found]

    def interests(self, n: int) -> Interests:
        """The n largest shares."""
        drifts = tuple(drift.time for drift in self.profile.drifts if drift.time is not None)
        refused = tuple(sorted(self.refused))
        if (found := self._shares) is None:
            return Interests((), self.n_events, refused, drifts)
        low, high = found.interval()
        order = np.argsort(-found.counts, kind="stable")[:n]
        shares = tuple(TopicShare(found.names[t], float(found.shares[t]), float(low[t]), float(high[t])) for t in order)
        return Interests(shares, self.n_events, refused, drifts)

    def explain(self, item: str, context: Mapping[str, str] | None) -> Explanation:
        """Why an item is where it is in this person's lists, or would be.

        Raises:
            InvalidConfig: no such item in the catalogue.
        """
        place = self.place(item)
        score = self.profile.score(place, context=context)
        known = self._topics is not None and self.n_events > 0  # else the shares are everybody's
        return explain(
            Ranked(item, place, score),
            self.profile,
            topics=self._topics if known else None,
            distribution=self._shares if known else None,
            preferences=self._preferences,
            context=context,
        )

    def topic_of(self, item: str) -> str:
        """The topic that "not this topic" means for an item: the one that its explanation names, else its only one.

        Raises:
            InvalidConfig: it has none, or several of which none is named: ask the person which.
        """
        own = self.catalogue.topics[self.place(item)]
        named = own[0] if len(own) == 1 else self.explain(item, None).topic
        if not named:
            raise InvalidConfig(f"say which topic of {item!r} is meant: {', '.join(own) or 'it has none'}")
        return named

    def known_topic(self, topic: str) -> str:
        """
        Raises:
            InvalidConfig: no item has it.
        """
        known = {name for own in self.catalogue.topics for name in own}
        if topic not in known:
            raise InvalidConfig(f"no item has the topic {topic!r}{did_you_mean(topic, known)}")
        return topic

    def place(self, item: str) -> int:
        """Position in the catalogue.

        Raises:
            InvalidConfig: no such item.
        """
        if item not in self.catalogue.index:
            raise InvalidConfig(f"no item {item!r} in the catalogue{did_you_mean(item, self.catalogue.index)}")
        return self.catalogue.index[item]

    @property
    def _shares(self) -> Distribution | None:
        """What share each topic has now, worked out once for each event; None in a catalogue without topics."""
        if self._topics is None:
            return None
        if self._worked is None:
            self._worked = of_profile(self.profile, self._topics, preferences=self._preferences)
        return self._worked

    @property
    def _preferences(self) -> Preferences:
        return Preferences(refused=frozenset(self.refused))

    @cached_property
    def _topics(self) -> Topics | None:
        return Topics.of(self.catalogue) if any(self.catalogue.topics) else None


def history(person: Person, events: Iterable[Event]) -> History:
    """What a learner trains on: the events of items that the catalogue has, oldest first."""
    index = person.catalogue.index
    known = [(event, said) for event in events if event.item in index and (said := person.said(event)) is not None]
    return History(
        np.array([index[event.item] for event, _ in known], np.int32),
        np.array([event.at_ms for event, _ in known], np.int64),
        np.array([said for _, said in known], np.float32),
    )


def kept(person: Person, release: str, store: tuple[int, int]) -> bytes:
    """The profile as bytes.

    Args:
        release: whose vectors it is over.
        store: how many events are kept, and the last one's number.
    """
    record = {"release": release, "store": store, "n_events": person.n_events}
    arrays = {name: np.ascontiguousarray(values) for name, values in person.profile.to_arrays().items()}
    return save(arrays, {"penchant": json.dumps(record)})


def restored(person: Person, data: bytes, release: str, store: tuple[int, int]) -> int:
    """Gives a person the profile that was kept, where it still fits; the number of the last event in it, else 0."""
    try:
        size = int.from_bytes(data[:8], "little")  # a safetensors file begins with the length of its header, in JSON
        record = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["penchant"])
        n, last = record["store"]
        if record["release"] != release or store[0] - n != store[1] - last:  # or events were dropped since
            return 0
        made = InterestProfile.from_arrays(
            person.side, person.catalogue, person.profile.config, load(data), network=person.network
        )
    except (SafetensorError, ValueError, KeyError, TypeError, MalformedData, InvalidConfig):
        return 0  # of another version: the events say it all
    person.profile, person.n_events = made, int(record["n_events"])
    person.say()
    return int(last)
