"""Synthetic people whose tastes are known, for checking what a learner recovers and for any size of population.

Item i has popularity p_i ∝ rank^(−zipf) and one to three topics, m_ik = 1 / (number of its topics). Topic k shows item
i with probability φ_ki ∝ p_i m_ik. Person u has a taste over topics that moves from a_u to b_u, both Dirichlet:

    taste_u(t) = (1 − drift · t) a_u + drift · t · b_u,   t = interactions so far / interactions in all
    next item ~ Σ_k [(1 − follow) taste_u(t)_k + follow · mean of m_k over the last three items] φ_k,

without replacement; the first item has nothing to follow. `Truth.probabilities` is exactly this law, so nothing scores
better than it in expectation. The strength of an interaction is a Beta draw whose mean `Truth.strengths` gives.

Titles carry a year and topics are public features, so the catalogue looks like any other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from penchant.common.arrays import AnyFloat, Bool, Float32, Float64, Int32, Int64
from penchant.common.catalogue import Catalogue
from penchant.common.errors import InvalidConfig
from penchant.common.interactions import History, Interactions
from penchant.common.streams import Streams
from penchant.simulations.data.dataset import CleaningReport, Dataset

WINDOW = 3
"""How many of the last items the next one may follow."""

_BLOCK_CELLS = 2**25  # of the seen-or-not table that one block of users holds
_TRIES = 12  # draws before the exact law over unseen items is written out
_CONCENTRATION = 0.25  # of the Dirichlet: most of a person's weight lies on three or four topics
_STRENGTH_SHAPE = 10.0
_SPREAD = 0.8  # stddev of the logarithm of a person's number of interactions
_START_MS, _JOINING_MS = 1_420_070_400_000, 3 * 365 * 86_400_000  # people join from 2015 to 2017


@dataclass(frozen=True, kw_only=True)
class Truth:
    """What made the data.

    Attributes:
        start: float32[n_users, n_topics], a_u; rows sum to 1.
        end: float32[n_users, n_topics], b_u; rows sum to 1.
        memberships: float32[n_items, n_topics], m; rows sum to 1.
        popularity: float64[n_items], p; sums to 1.
        shows: float32[n_topics, n_items], φ; rows sum to 1.
        lengths: int64[n_users], interactions in all.
        drift: how far the taste moves, in [0, 1].
        follow: share of a step that follows the last items, in [0, 1].
    """

    start: Float32
    end: Float32
    memberships: Float32
    popularity: Float64
    shows: Float32
    lengths: Int64
    drift: float
    follow: float

    def taste(self, user: int, time: float) -> Float32:
        """float32[n_topics], the taste at `time` in [0, 1] of the person's interactions; sums to 1."""
        moved = self.drift * time
        return np.asarray((1 - moved) * self.start[user] + moved * self.end[user], np.float32)

    def probabilities(self, user: int, history: History | None = None) -> Float32:
        """float32[n_items], of the next item; sums to 1.

        Args:
            user: a position in the data.
            history: the person's first interactions; items in it have probability 0. Without one: the taste half
                way, following nothing and leaving nothing out.
        """
        if history is None:
            return np.asarray(self.taste(user, 0.5) @ self.shows, np.float32)
        weights = self.taste(user, min(1.0, len(history) / self.lengths[user]))
        if len(history):
            recent = self.memberships[history.items[-WINDOW:]].mean(axis=0)
            weights = (1 - self.follow) * weights + self.follow * recent
        law = np.asarray(weights @ self.shows, np.float64)
        law[history.items] = 0.0
        return np.asarray(law / max(law.sum(), 1e-30), np.float32)

    def strengths(self, user: int, time: float = 0.5) -> Float32:
        """float32[n_items], the expected strength of an interaction with each item, from 0.2 to 0.9."""
        taste = self.taste(user, time)
        return np.asarray(0.2 + 0.7 * (self.memberships @ taste) / taste.max(), np.float32)


@dataclass(frozen=True, kw_only=True)
class Synthetic(Dataset):
    """A data set with the truth behind it."""

    truth: Truth


def synthetic(
    *,
    users: int = 1000,
    items: int = 2000,
    interactions: float = 100.0,
    topics: int = 32,
    zipf: float = 0.8,
    drift: float = 0.5,
    follow: float = 0.6,
    seed: int = 0,
) -> Synthetic:
    """A population and its truth; the same arguments give the same data on every machine.

    Args:
        users: how many people.
        items: how many items, at least `topics`.
        interactions: mean per person, before lengths are kept between 3 and half the items; spread like a log-normal.
        topics: how many topics.
        zipf: exponent of the popularity, 0 for none.
        drift: how far a taste moves over a person's interactions, in [0, 1].
        follow: share of a step that follows the last items, in [0, 1].
        seed: ≥ 0.

    Raises:
        InvalidConfig: an argument is out of its range.
    """
    for name, value, good in (
        ("users", users, users >= 1),
        ("topics", topics, topics >= 1),
        ("items", items, items >= max(topics, 6)),
        ("interactions", interactions, 3 <= interactions <= items / 2),
        ("zipf", zipf, 0 <= zipf < math.inf),
        ("drift", drift, 0 <= drift <= 1),
        ("follow", follow, 0 <= follow <= 1),
        ("seed", seed, seed >= 0),
    ):
        if not good:
            rule = {"items": "at least the topics and 6", "interactions": "from 3 to half the items"}.get(
                name, "in range"
            )
            raise InvalidConfig(f"synthetic: {name} must be {rule}, not {value}")
    streams = Streams(seed).child("synthetic")
    memberships, popularity = _items(items, topics, zipf, streams.get("items"))
    shows = memberships.T * popularity
    people = streams.get("people")
    concentration = np.full(topics, _CONCENTRATION)
    lengths = np.exp(people.normal(math.log(interactions) - _SPREAD**2 / 2, _SPREAD, users)).round().astype(np.int64)
    truth = Truth(
        start=people.dirichlet(concentration, users).astype(np.float32),
        end=people.dirichlet(concentration, users).astype(np.float32),
        memberships=memberships,
        popularity=popularity,
        shows=np.asarray(shows / shows.sum(axis=1, keepdims=True), np.float32),
        lengths=lengths.clip(3, items // 2),
        drift=drift,
        follow=follow,
    )
    size = max(1, _BLOCK_CELLS // items)
    drawn = [
        _walk(truth, np.arange(at, min(at + size, users)), streams.get("walk", at)) for at in range(0, users, size)
    ]
    offsets = np.concatenate([[0], np.cumsum(truth.lengths)]).astype(np.int64)
    sequence = np.concatenate(drawn)
    name = f"synthetic-{users}x{items}"
    data = Interactions(
        offsets=offsets,
        items=sequence,
        times=_times(truth.lengths, offsets, streams.get("times")),
        strengths=_strengths(truth, sequence, offsets, streams.get("strengths")),
        n_items=items,
        users=tuple(f"u{u}" for u in range(users)),
    )
    width = len(str(topics))
    years = streams.get("years").integers(1950, 2020, items)
    catalogue = Catalogue(
        ids=tuple(f"i{i}" for i in range(items)),
        titles=tuple(f"Item {i} ({year})" for i, year in enumerate(years)),
        topics=tuple(tuple(f"Topic {k + 1:0{width}}" for k in np.flatnonzero(row)) for row in memberships),
        name=name,
    )
    report = CleaningReport(rows_read=len(data), items_unused=int((data.counts() == 0).sum()))
    return Synthetic(
        name=name,
        interactions=data,
        catalogue=catalogue,
        cleaning=report,
        terms="Synthetic data drawn by penchant: nobody's, free to use.",
        truth=truth,
    )


def _items(n: int, topics: int, zipf: float, random: np.random.Generator) -> tuple[Float32, Float64]:
    """Memberships and popularity; every topic has an item."""
    belongs = np.zeros((n, topics), np.bool_)
    first = np.concatenate([np.arange(topics), random.integers(0, topics, n - topics)])
    belongs[np.arange(n), first] = True
    for share in (0.5, 0.2):
        more = np.flatnonzero(random.random(n) < share)
        belongs[more, random.integers(0, topics, len(more))] = True
    popularity = (1.0 + random.permutation(n)) ** -zipf
    memberships = (belongs / belongs.sum(axis=1, keepdims=True)).astype(np.float32)
    return memberships, popularity / popularity.sum()


def _walk(truth: Truth, users: Int64, random: np.random.Generator) -> Int32:
    """Items of these people one after another, each person's in order: int32[sum of their lengths].

    All take their j-th step together. A step is drawn from the law over all items and drawn again while the item was
    seen, which is the law over unseen items; after `_TRIES` that law is written out.
    """
    order = np.argsort(-truth.lengths[users], kind="stable")  # whoever still walks is a prefix
    users = users[order]
    lengths = truth.lengths[users]
    n_items = len(truth.memberships)
    steps = np.full((len(users), int(lengths[0])), -1, np.int32)
    seen = np.zeros((len(users), n_items), np.bool_)
    draw = _Draws(truth.shows)
    walking = np.searchsorted(-lengths, -np.arange(lengths[0]), side="left")
    for j, n in enumerate(walking):
        moved = (truth.drift * j / lengths[:n, None]).astype(np.float32)
        weights = (1 - moved) * truth.start[users[:n]] + moved * truth.end[users[:n]]
        if j:
            recent = truth.memberships[steps[:n, max(0, j - WINDOW) : j]].mean(axis=1)
            weights = (1 - truth.follow) * weights + truth.follow * recent
        reach = np.cumsum(weights, axis=1, dtype=np.float64)
        pending = np.arange(n)
        for _ in range(_TRIES):
            picks = draw(reach[pending], random)
            fresh = ~seen[pending, picks]
            steps[pending[fresh], j] = picks[fresh]
            pending = pending[~fresh]
            if not pending.size:
                break
        for part in np.array_split(pending, 1 + pending.size * n_items // _BLOCK_CELLS):
            steps[part, j] = _unseen(weights[part] @ truth.shows, seen[part], random)
        seen[np.arange(n), steps[:n, j]] = True
    back = np.argsort(order)
    steps = steps[back]
    return np.asarray(steps[steps >= 0], np.int32)


class _Draws:
    """Draws items from mixtures of topics in one search: topic k's cumulative law lies between k and k + 1."""

    def __init__(self, shows: Float32) -> None:
        topic, self._item = np.nonzero(shows)
        shares = shows[topic, self._item].astype(np.float64)
        total = np.cumsum(shares)
        last = np.flatnonzero(np.diff(topic, append=len(shows)))
        before = np.concatenate([[0.0], total[last][:-1]])
        self._reach = topic + (total - before[topic]) / (total[last] - before)[topic]

    def __call__(self, reach: Float64, random: np.random.Generator) -> Int64:
        """int64[n], an item for each row of cumulative topic weights, float64[n, n_topics]."""
        topic = (reach[:, :-1] <= random.random((len(reach), 1)) * reach[:, -1:]).sum(axis=1)
        at = np.searchsorted(self._reach, topic + random.random(len(reach)), side="right")
        return np.asarray(self._item[np.minimum(at, len(self._item) - 1)], np.int64)


def _unseen(law: AnyFloat, seen: Bool, random: np.random.Generator) -> Int64:
    """int64[n], an item for each row of `law`, float[n, n_items], among those not seen."""
    reach = np.cumsum((law + 1e-12) * ~seen, axis=1, dtype=np.float64)  # the 1e-12: all of a taste may be seen
    return np.asarray((reach <= random.random((len(law), 1)) * reach[:, -1:]).sum(axis=1), np.int64)


def _times(lengths: Int64, offsets: Int64, random: np.random.Generator) -> Int64:
    """int64[n], UTC ms, rising within a person: sessions a few days apart, a minute or so between their steps."""
    n = int(offsets[-1])
    scale = np.where(random.random(n) < 0.1, 4 * 86_400_000.0, 90_000.0)
    gaps = 1 + (scale * random.exponential(size=n)).astype(np.int64)
    joined = _START_MS + (random.random(len(lengths)) * _JOINING_MS).astype(np.int64)
    total = np.cumsum(gaps)
    before = total[offsets[:-1]] - gaps[offsets[:-1]]
    return np.asarray(np.repeat(joined - before, lengths) + total, np.int64)


def _strengths(truth: Truth, items: Int32, offsets: Int64, random: np.random.Generator) -> Float32:
    """float32[n], a Beta draw about what the person's taste at that moment expects."""
    out = np.empty(len(items), np.float32)
    rows = np.repeat(np.arange(len(truth.lengths)), truth.lengths)
    for at in range(0, len(items), 2**20):  # in parts: the whole is n × n_topics
        part = slice(at, at + 2**20)
        who = rows[part]
        moved = truth.drift * (np.arange(at, at + len(who)) - offsets[who]) / truth.lengths[who]
        taste = (1 - moved[:, None]) * truth.start[who] + moved[:, None] * truth.end[who]
        mean = 0.2 + 0.7 * (truth.memberships[items[part]] * taste).sum(axis=1) / taste.max(axis=1)
        out[part] = random.beta(_STRENGTH_SHAPE * mean, _STRENGTH_SHAPE * (1 - mean))
    return out
