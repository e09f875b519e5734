"""Does a profile that follows its person foresee the next event better than one that stands still?

Prequential (Gama et al. 2013): the release is made of what lies before a cut in time; each later event is ranked among
all items unseen so far and only then taken in. Profiles share nothing after the cut, so people can be taken one by one
and this is still the order of time for everybody. A person's figure is the mean over their events, a row's the mean
over people.

Drift is measured where the truth is known: streams of a person with one taste, or with another one from an event on.

Source: Gama, Sebastião and Rodrigues 2013, "On evaluating stream learning algorithms", Machine Learning 90.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Literal

import numpy as np

from penchant.common import content
from penchant.common.arrays import Float64, Int64
from penchant.common.catalogue import Catalogue
from penchant.common.interactions import History
from penchant.common.interests import STILL, InterestConfig, InterestProfile
from penchant.common.streams import Streams
from penchant.common.taste import ItemSide, TasteConfig
from penchant.simulations.evaluation import Interval, Resamples
from penchant.simulations.interests.releases import Table, interval, release
from penchant.simulations.simulate import FLOOR_TASTE

Contexts = Sequence[Mapping[str, str]]

METRICS = ("HR@10", "NDCG@10", "MRR")
RECENCY, FROZEN = "recency alone", "frozen at the cut"


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row: how a profile is made and whether it goes along.

    Attributes:
        context: whether hour and weekday are given.
    """

    side: ItemSide
    config: InterestConfig
    learns: bool = True
    context: bool = False


def methods(side: ItemSide, floor: ItemSide, config: InterestConfig) -> dict[str, Method]:
    """Every row by name, from the floors to the whole."""
    follows = config.dynamics
    adaptive = replace(follows, threshold=None, context=0.0)
    drifting = replace(follows, context=0.0)
    still = replace(config, dynamics=STILL)
    return {
        RECENCY: Method(side=floor, config=InterestConfig(long=FLOOR_TASTE.decay, share=0.0, dynamics=STILL)),
        FROZEN: Method(side=side, config=still, learns=False),
        "one memory": Method(side=side, config=replace(still, long=side.config.decay, share=0.0)),
        "recent memory alone": Method(side=side, config=replace(still, share=1.0)),
        "two memories, fixed share": Method(side=side, config=still),
        "… adaptive share": Method(side=side, config=replace(config, dynamics=adaptive)),
        "… and drift": Method(side=side, config=replace(config, dynamics=drifting)),
        "… and context": Method(side=side, config=config, context=True),
    }


def moment(time: int) -> dict[str, str]:
    """Quarter of the day and weekday (Monday 0) of a time in UTC ms.

    >>> moment(0)
    {'hour': '0-5', 'weekday': '3'}
    """
    at = datetime.fromtimestamp(time / 1000, UTC)
    start = at.hour // 6 * 6
    return {"hour": f"{start}-{start + 5}", "weekday": str(at.weekday())}


def moments(history: History) -> list[dict[str, str]]:
    """Of each interaction."""
    return [moment(time) for time in history.times.tolist()]


def take(profile: InterestProfile, history: History, contexts: Contexts | None = None) -> InterestProfile:
    """The profile after a history."""
    for k, (item, time) in enumerate(zip(history.items.tolist(), history.times.tolist(), strict=True)):
        profile.update(item, time=time, context=contexts[k] if contexts else None)
    return profile


def prequential(
    profile: InterestProfile, later: History, contexts: Contexts | None = None, *, learns: bool = True
) -> Int64:
    """int64[n], the rank of each later item among those unseen when it came.

    Events of one time are all ranked before any of them is taken in: their order in a file says nothing. A tie of
    score counts against the event.

    Args:
        profile: taken along, unless it does not learn.
        later: items new to the profile, oldest first.
        contexts: of each of them; those of one time share the first one's.
    """
    ranks = np.empty(len(later), np.int64)
    starts = [0, *(np.flatnonzero(np.diff(later.times)) + 1).tolist(), len(later)]
    for a, b in itertools.pairwise(starts):
        if a == b:
            break
        scores = profile.standing(contexts[a] if contexts else None).scores
        others = np.delete(scores, later.items[:b])
        ranks[a:b] = 1 + (others >= scores[later.items[a:b], None]).sum(axis=1)
        if learns:
            now = History(later.items[a:b], later.times[a:b], later.strengths[a:b])
            take(profile, now, contexts[a:b] if contexts else None)
    return ranks


def figures(ranks: Int64) -> Float64:
    """float64[3, n], HR@10, NDCG@10 and MRR of each event, its item the only target.

    >>> figures(np.array([1, 3, 11])).round(2).tolist()
    [[1.0, 1.0, 0.0], [1.0, 0.5, 0.0], [1.0, 0.33, 0.09]]
    """
    top = ranks <= 10
    return np.stack([top.astype(np.float64), top / np.log2(ranks + 1.0), 1.0 / ranks])


def table(
    *,
    data: str = "ml-100k",
    epsilon: float | None = None,
    seed: int = 0,
    config: InterestConfig | None = None,
    part: Literal["test", "validation"] = "test",
) -> Table:
    """Every row on one data set.

    Args:
        data, epsilon, seed: of the release, which is made of what lies before the validation window.
        config: the defaults if None.
        part: "validation" for choosing settings, given only what lies before it.
    """
    made = release(data, by="global-time", epsilon=epsilon, seed=seed)
    parts = made.split
    before, later = (parts.history, parts.targets) if part == "test" else (parts.train, parts.validation)
    people = np.flatnonzero(later.lengths > 0)
    floor = content.condensed(content.features(made.catalogue))
    nothing = np.zeros(len(made.catalogue), np.float32)
    found: dict[str, Float64] = {}
    drifts = 0
    for name, method in methods(made.side, ItemSide(floor, nothing, FLOOR_TASTE), config or InterestConfig()).items():
        each = np.empty((len(METRICS), len(people)))
        for at, user in enumerate(people.tolist()):
            profile = InterestProfile(method.side, made.catalogue, method.config)
            old, new = before.history(user), later.history(user)
            take(profile, old, moments(old) if method.context else None)
            known = len(profile.drifts)
            ranks = prequential(profile, new, moments(new) if method.context else None, learns=method.learns)
            each[:, at] = figures(ranks).mean(axis=1)
            drifts += (len(profile.drifts) - known) * (name == "… and drift")
        found[name] = each
    resamples = [Resamples.of({name: each[k] for name, each in found.items()}, seed=seed) for k in range(len(METRICS))]
    rows, behind = [], []
    for name in found:
        against = ["" if name == o else interval(resamples[1].difference(name, o)) for o in (FROZEN, RECENCY)]
        rows.append([name, *(interval(resample.mean(name)) for resample in resamples), *against])
    names = list(found)
    floors = [(name, floor) for name in names[2:] for floor in (FROZEN, RECENCY)]
    steps = [("two memories, fixed share", other) for other in ("one memory", "recent memory alone")]
    for name, other in (*floors, *steps, *zip(names[5:], names[4:-1], strict=True)):
        more = resamples[1].difference(name, other)
        if more.low <= 0:
            behind.append(f"“{name}” does not beat “{other}”: NDCG@10 {interval(more)}.")
    exact = "exact sums" if epsilon is None else f"ε = {epsilon:g}"
    return Table(
        f"Dynamic: prequential on {data}, {part} part, {exact}",
        ("profile", *METRICS, "NDCG@10 − frozen", "NDCG@10 − recency alone"),
        rows,
        (
            f"{len(people)} people, {int(later.lengths.sum()):,} events, {drifts} drifts marked; 95 % intervals"
            " resample people, the same on both sides of a difference. Times are UTC.",
            made.conditions,
            *behind,
        ),
    )


@dataclass(frozen=True, kw_only=True)
class World:
    """A catalogue in which a taste is a share for each topic.

    Attributes:
        side: as if released: an item lies around the direction of its topic.
        topics: int64[n_items].
    """

    side: ItemSide
    catalogue: Catalogue
    topics: Int64

    @classmethod
    def of(cls, random: np.random.Generator, *, n_items: int = 2000, n_topics: int = 20, d: int = 24) -> World:
        topics = np.arange(n_items) % n_topics
        centres = random.standard_normal((n_topics, d)) / np.sqrt(d)
        vectors = (centres[topics] + 0.5 * random.standard_normal((n_items, d)) / np.sqrt(d)).astype(np.float32)
        side = ItemSide(vectors, np.zeros(n_items, np.float32), TasteConfig(ridge=0.3))
        return cls(side=side, catalogue=Catalogue(ids=tuple(map(str, range(n_items)))), topics=topics)

    def taste(self, random: np.random.Generator) -> Float64:
        """float64[n_topics]: most of it on two or three topics, a tenth spread over all."""
        n = int(self.topics.max()) + 1
        return np.asarray(0.9 * random.dirichlet(np.full(n, 0.1)) + 0.1 / n, np.float64)

    def stream(self, random: np.random.Generator, tastes: Sequence[Float64]) -> History:
        """A person's events, one for each taste: its topic drawn from it, its item evenly from what is left of that."""
        left = [random.permutation(np.flatnonzero(self.topics == topic)).tolist() for topic in range(len(tastes[0]))]
        items = []
        for taste in tastes:
            open_ = taste * [bool(topic) for topic in left]
            items.append(left[random.choice(len(open_), p=open_ / open_.sum())].pop())
        return History.of(items)


def fit(world: World, profile: InterestProfile, taste: Float64, context: Mapping[str, str] | None = None) -> float:
    """Mean share of the taste that the next ten items' topics hold, of the most that ten items can: in [0, 1]."""
    shown = [one.position for one in profile.recommend(10, context=context)]
    return float(taste[world.topics[shown]].mean() / taste.max())


def followed(
    world: World,
    profile: InterestProfile,
    stream: History,
    tastes: Sequence[Float64],
    contexts: Contexts | None = None,
) -> Float64:
    """float64[n], how well the list before each event fits the taste that the event comes of."""
    fits = np.empty(len(stream))
    for k, item in enumerate(stream.items.tolist()):
        context = contexts[k] if contexts else None
        fits[k] = fit(world, profile, tastes[k], context)
        profile.update(item, context=context)
    return fits


EVENTS, CHANGE, AFTER = 160, 80, 30
"""Length of a stream, where its taste changes, and how many events after that show how fast lists follow."""


def drift_table(*, people: int = 200, seed: int = 0, config: InterestConfig | None = None) -> Table:
    """Delay, false alarms and how fast lists follow, on streams with and without one planted change of taste.

    Args:
        people: streams of each kind.
        config: the defaults if None.
    """
    config = config or InterestConfig()
    random = Streams(seed).get("interests-drift")
    world = World.of(random)
    steady, changed = [], []
    for _ in range(people):
        first, second = world.taste(random), world.taste(random)
        steady.append(world.stream(random, [first] * EVENTS))
        tastes = [first] * CHANGE + [second] * (EVENTS - CHANGE)
        changed.append((world.stream(random, tastes), tastes))
    drift = replace(config.dynamics, context=0.0)
    without = replace(drift, threshold=None)
    one = replace(config, share=0.0)
    rows, gains, marks = [], {}, {}
    fixed = "both memories, fixed share"
    kinds = {
        "long-term memory": replace(one, dynamics=replace(without, rate=0.0)),
        "long-term memory, drift": replace(one, dynamics=replace(drift, rate=0.0)),
        fixed: replace(config, dynamics=replace(without, rate=0.0)),
        "both memories, adaptive share": replace(config, dynamics=without),
        "both memories, adaptive share, drift": replace(config, dynamics=drift),
    }
    for name, each in kinds.items():
        false = np.empty(people)
        first_mark, by_chance = np.full(people, np.nan), np.full(people, np.nan)
        gain = np.empty((2, people))
        for k in range(people):
            profile = take(InterestProfile(world.side, world.catalogue, each), steady[k])
            false[k], by_chance[k] = 1000 / EVENTS * len(profile.drifts), _delay(profile)
            profile = InterestProfile(world.side, world.catalogue, each)
            fits = followed(world, profile, *changed[k])
            gain[:, k] = fits[CHANGE - AFTER : CHANGE].mean(), fits[CHANGE : CHANGE + AFTER].mean()
            first_mark[k] = _delay(profile)
        gains[name], marks[name] = gain, (false, first_mark, by_chance)
    for name, (before, after) in gains.items():
        without_drift = name.removesuffix(", drift")
        false, first_mark, by_chance = marks[name]
        found = first_mark[~np.isnan(first_mark)]
        more = "" if name == without_drift else interval(_mean(after - gains[without_drift][1], seed))
        alarms = [""] * 4
        if more:
            delay = interval(_mean(found, seed), 1) if len(found) else ""
            chance = f"{np.count_nonzero(~np.isnan(by_chance))} of {people}"
            alarms = [interval(_mean(false, seed), 2), f"{len(found)} of {people}", chance, delay]
        beside = ["", ""]
        if name.startswith("both") and name != fixed:
            beside = [interval(_mean(own - other, seed)) for own, other in zip(gains[name], gains[fixed], strict=True)]
        rows.append([name, *alarms, *(interval(_mean(each, seed)) for each in (before, after)), more, *beside])
    return Table(
        f"Drift: {people} synthetic streams with a planted change of taste, {people} without",
        (
            "profile",
            "false alarms per 1,000 events",
            f"changes found within {AFTER} events",
            "marked by chance",
            "delay, events",
            f"fit, {AFTER} events before",
            f"fit, {AFTER} events after",
            "after, more than without drift",
            "before, more than a fixed share",
            "after, more than a fixed share",
        ),
        rows,
        (
            f"Streams of {EVENTS} events; the change comes after {CHANGE}. Delay is that of changes found, from the"
            " first event of the new taste. Marked by chance: streams without a change, in the same events. Fit: share"
            " of the taste that the topics of the next ten items hold, of the most that ten items can. 95 % intervals"
            " resample people, the same on both sides of a difference.",
        ),
    )


def _delay(profile: InterestProfile) -> float:
    """Events from the change to the first mark, at most AFTER; NaN without one."""
    delays = [drift.event - CHANGE + 1 for drift in profile.drifts]
    return next((float(delay) for delay in delays if 0 < delay <= AFTER), np.nan)


def context_table(*, people: int = 200, seed: int = 0, config: InterestConfig | None = None) -> Table:
    """What a place shifts, for people whose taste depends on it and for people whose taste does not."""
    config = config or InterestConfig()
    random = Streams(seed).get("interests-context")
    world = World.of(random)
    rows = []
    for kind in ("two places, a taste each", "two places, one taste"):
        figure = np.empty((2, people))
        for k in range(people):
            home, work = world.taste(random), world.taste(random)
            away = random.random(EVENTS) < 0.5
            there = work if kind.endswith("each") else home
            tastes = [there if at else home for at in away]
            stream = world.stream(random, tastes)
            places = [{"place": "work" if at else "home"} for at in away]
            for row, contexts in enumerate((None, places)):
                profile = InterestProfile(world.side, world.catalogue, config)
                figure[row, k] = followed(world, profile, stream, tastes, contexts)[CHANGE:].mean()
        without, given = figure
        rows.append([kind, *(interval(_mean(each, seed)) for each in (without, given, given - without))])
    return Table(
        f"Context: {people} synthetic people of each kind, at either place half the time",
        ("people", "fit, no context", "fit, place given", "difference"),
        rows,
        (f"Over the last {EVENTS - CHANGE} of {EVENTS} events. 95 % intervals resample people.",),
    )


def _mean(values: Float64, seed: int) -> Interval:
    return Resamples.of({"": values}, seed=seed).mean("")
