"""How close predicted shares of interest come to what people went on to like, and what calibrated lists cost.

People are dealt into five folds, and each fold's devices get a release made without them. Fold 0 chose the settings
(`choose`; they are the defaults of `DistributionConfig`), folds 1 to 4 are measured. A person's first k interactions
predict the shares of everything from their 21st on, both weighted by strength: the same future for every k and the same
people in every row.

    JS(p, q) = ½ KL(p ‖ (p + q)/2) + ½ KL(q ‖ (p + q)/2)   in bits

Floors: the release's general shares alone, and the raw shares of the k interactions. A future is a sample too: not even
the shares that it was drawn from would bring the divergence to zero.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from penchant.common.arrays import AnyFloat, Float32, Float64, Int32, Int64
from penchant.common.errors import InvalidConfig
from penchant.common.interactions import History
from penchant.common.interests import InterestProfile
from penchant.common.interests.distribution import (
    Distribution,
    DistributionConfig,
    Topics,
    calibrated,
    distribution,
    divergence,
    general,
    jensen_shannon,
    of_profile,
)
from penchant.common.interests.quantized import pack, unpack
from penchant.common.taste import ItemSide
from penchant.simulations.evaluation import Resamples
from penchant.simulations.interests.releases import Release, Table, interval, release

FOLDS = 5
LENGTHS = (0, 1, 5, 20)
FUTURE = 10
"""Fewest interactions after the longest of `LENGTHS` that a person is measured with."""

WEIGHTS = (0.0, 0.3, 0.6)
SHORTLIST, LIST = 100, 10
LAST = 0.2
"""Share of a person's interactions, the last, that lists are measured on."""

GRID = {
    "general": (5.0, 10.0, 20.0, 40.0),
    "keep": (0.95, 0.98, 1.0),
    "predicted": (0.0, 0.5, 1.0, 2.0, 4.0),
    "n_predicted": (50, 100, 200),
}


@dataclass(frozen=True)
class Person:
    """One person and what their device got.

    Attributes:
        made: the release, made without them.
        topics: of its catalogue.
        history: all of theirs, oldest first.
    """

    made: Release
    topics: Topics
    history: History

    def part(self, start: int, stop: int) -> History:
        """Some of their interactions, one after another."""
        h = self.history
        return History(h.items[start:stop], h.times[start:stop], h.strengths[start:stop])

    def profile(self, history: History, side: ItemSide | None = None) -> InterestProfile:
        return InterestProfile.of(side or self.made.side, self.made.catalogue, history)

    def shares(self, history: History) -> Float64:
        """Raw shares of a history, by strength; equal ones where it says nothing."""
        found: Float64 = history.strengths.astype(np.float64) @ self.topics.shares[history.items]
        return found / found.sum() if found.any() else np.full(len(found), 1 / len(found))


def people(data: str, epsilon: float | None, seed: int, folds: Sequence[int], grouped: bool = False) -> list[Person]:
    """Everybody of these folds, with a release of everybody else.

    Args:
        grouped: by clusters of the released vectors in place of the catalogue's topics.
    """
    found: list[Person] = []
    for fold in folds:
        made = release(data, by=f"{FOLDS}-fold-users:{fold}", epsilon=epsilon, seed=seed)
        topics = Topics.clusters(made.catalogue, made.side.vectors) if grouped else Topics.of(made.catalogue)
        them = np.flatnonzero(~made.split.participants).tolist()
        found += [Person(made, topics, made.data.interactions.history(u)) for u in them]
    return found


def with_future(everybody: Sequence[Person]) -> list[Person]:
    """Those with enough interactions for every length of history.

    Raises:
        InvalidConfig: nobody has.
    """
    enough = [person for person in everybody if len(person.history) >= LENGTHS[-1] + FUTURE]
    if not enough:
        raise InvalidConfig(f"nobody has {LENGTHS[-1] + FUTURE} interactions to measure shares with")
    return enough


def choose(*, data: str = "ml-100k", seed: int = 0) -> DistributionConfig:
    """The settings of least mean divergence over all lengths and two releases, exact and ε = 8, for fold 0's people."""
    them = with_future([person for epsilon in (None, 8.0) for person in people(data, epsilon, seed, [0])])
    futures = [person.shares(person.part(LENGTHS[-1], len(person.history))) for person in them]
    pasts = [[person.part(0, k) for k in LENGTHS] for person in them]
    scores = [
        [person.profile(past).standing().scores for past in parts] for person, parts in zip(them, pasts, strict=True)
    ]

    def loss(config: DistributionConfig) -> float:
        found = [
            jensen_shannon(_posterior(person, past, config, score).shares, future)
            for person, future, parts, known in zip(them, futures, pasts, scores, strict=True)
            for past, score in zip(parts, known, strict=True)
        ]
        return float(np.mean(found))

    values = itertools.product(*GRID.values())
    options = [DistributionConfig(general=g, keep=k, predicted=p, n_predicted=int(n)) for g, k, p, n in values]
    return min(options, key=loss)


def table(*, data: str = "ml-100k", epsilon: float | None = None, seed: int = 0, grouped: bool = False) -> Table:
    """Divergence of predicted shares from those of the future, by length of history and against both floors.

    Args:
        grouped: by clusters of the released vectors in place of the catalogue's topics.
    """
    them = with_future(people(data, epsilon, seed, range(1, FOLDS), grouped))
    config = DistributionConfig()
    unpredicted = dataclasses.replace(config, predicted=0.0)
    ways: dict[str, Callable[[Person, History, InterestProfile], Float64]] = {
        "general shares alone (floor)": lambda p, _, __: general(p.topics, p.made.side.popularity),
        "own history alone (floor)": lambda p, past, _: p.shares(past),
        "posterior, nothing predicted": lambda p, past, _: _posterior(p, past, unpredicted, None).shares,
        "posterior": lambda p, past, profile: _posterior(p, past, config, profile.standing().scores).shares,
    }
    found = {name: np.zeros((len(LENGTHS), len(them))) for name in ways}
    inside = np.zeros((len(LENGTHS), len(them)))
    for u, person in enumerate(them):
        future = person.shares(person.part(LENGTHS[-1], len(person.history)))
        for at, k in enumerate(LENGTHS):
            past = person.part(0, k)
            profile = person.profile(past)
            for name, way in ways.items():
                found[name][at, u] = jensen_shannon(way(person, past, profile), future)
            low, high = _posterior(person, past, config, profile.standing().scores).interval()
            inside[at, u] = ((low <= future) & (future <= high)).mean()
    by_length = [
        Resamples.of({name: values[at] for name, values in found.items()}, seed=seed) for at in range(len(LENGTHS))
    ]
    *_, posterior = ways
    rows = [[name, *(interval(one.mean(name)) for one in by_length)] for name in ways]
    failed = []
    for floor in list(ways)[:2]:
        differences = [one.difference(posterior, floor) for one in by_length]
        rows.append([f"posterior − {floor.removesuffix(' (floor)')}", *map(interval, differences)])
        failed += [
            f"k = {k} against {floor.removesuffix(' (floor)')}"
            for k, difference in zip(LENGTHS, differences, strict=True)
            if difference.high >= 0
        ]
    coverage = ", ".join(f"{share:.0%} (k = {k})" for k, share in zip(LENGTHS, inside.mean(axis=1), strict=True))
    return Table(
        title="Jensen–Shannon divergence (bits) of predicted topic shares from the later ones, by interactions known",
        columns=["shares from", *(f"k = {k}" for k in LENGTHS)],
        rows=rows,
        notes=[
            f"{data}, {len(them):,} people of folds 1 to {FOLDS - 1} with {LENGTHS[-1] + FUTURE} interactions or more, "
            f"each with a release made without their fold; {_topics(them, grouped)}. {them[0].made.conditions}",
            f"α {config.general:g}, γ {config.keep:g}, ρ {config.predicted:g} over the best {config.n_predicted}: "
            "chosen on fold 0, for an exact release and one of ε = 8 together.",
            "Own history without any interaction is equal shares. Brackets: 95 % over people, the same in every row.",
            f"A topic's later share lies in its 95 % interval for {coverage} of people and topics; it is a sample of a "
            "few dozen items, not the share itself.",
            f"Not shown to beat its floor: {'; '.join(failed)}." if failed else "It beats both floors at every length.",
        ],
    )


def lists(*, data: str = "ml-100k", epsilon: float | None = None, seed: int = 0) -> Table:
    """What calibrated lists gain in shares and cost in ranking, by the weight λ of calibration."""
    them = _with_last(people(data, epsilon, seed, range(1, FOLDS)))
    names = [f"λ = {weight:g}" for weight in WEIGHTS]
    ndcg, kl, later = ({name: np.zeros(len(them)) for name in names} for _ in range(3))
    for u, (person, past, targets) in enumerate(them):
        profile = person.profile(past)
        scores = profile.standing().scores
        target = of_profile(profile, person.topics).shares
        future = person.shares(person.part(len(past), len(person.history)))
        best = np.argsort(-scores, kind="stable")[:SHORTLIST]
        for name, weight in zip(names, WEIGHTS, strict=True):
            shown = calibrated(scores, best, person.topics.shares, target, LIST, weight)
            shares = person.topics.shares[shown].sum(axis=0)
            shares /= shares.sum() or 1.0
            ndcg[name][u] = gain(shown, targets)
            kl[name][u] = divergence(target, shares)
            later[name][u] = jensen_shannon(shares, future)
    measured = [Resamples.of(values, seed=seed) for values in (ndcg, kl, later)]
    first = names[0]

    def cells(name: str) -> list[str]:
        found = [(interval(one.mean(name)), interval(one.difference(name, first))) for one in measured]
        return [name, *(mean if cell == 0 or name != first else "" for pair in found for cell, mean in enumerate(pair))]

    rows = [cells(name) for name in names]
    loses = [name for name in names[1:] if measured[0].difference(name, first).high < 0]
    closer = [name for name in names[1:] if measured[2].difference(name, first).high < 0]
    return Table(
        title=f"Calibrated lists of {LIST} from the best {SHORTLIST}",
        columns=["list", f"NDCG@{LIST}", "− λ = 0", "KL from the person's shares", "− λ = 0", "JS to later", "− λ = 0"],
        rows=rows,
        notes=[
            f"{data}, {len(them):,} people of folds 1 to {FOLDS - 1}; the last fifth of their interactions is what "
            f"they went on to choose, the rest is known. {them[0][0].made.conditions}",
            "KL in nats, from the posterior's mean (which λ aims at); JS in bits, of the list from the last fifth's.",
            f"NDCG is lost at {', '.join(loses)}." if loses else "No loss of NDCG shows at either λ.",
            f"Closer to what came later at {', '.join(closer)}." if closer else "Not closer to what came later.",
        ],
    )


def quantized(*, data: str = "ml-100k", epsilon: float | None = None, seed: int = 0) -> Table:
    """What one byte a number saves of a release, and what lists lose."""
    them = _with_last(people(data, epsilon, seed, range(1, FOLDS)))
    small = {id(made): unpack(pack(made.side), made.side) for made in {id(p.made): p.made for p, _, _ in them}.values()}
    found, same = {"float32": np.zeros(len(them)), "int8": np.zeros(len(them))}, np.zeros(len(them))
    for u, (person, past, targets) in enumerate(them):
        shown = [
            np.array([one.position for one in person.profile(past, side).recommend(LIST)])
            for side in (person.made.side, small[id(person.made)])
        ]
        for values, chosen in zip(found.values(), shown, strict=True):
            values[u] = gain(chosen, targets)
        same[u] = len(np.intersect1d(shown[0], shown[1])) / LIST
    measured = Resamples.of(found, seed=seed)
    side = them[0][0].made.side
    large, little = _size(side), sum(rows.nbytes for rows in pack(side).values())
    lost = measured.difference("int8", "float32")
    return Table(
        title="Released tables with one byte a number",
        columns=["tables", "KiB", f"NDCG@{LIST}", "− float32", f"same items in {LIST}"],
        rows=[
            ["float32", f"{large / 1024:.0f}", interval(measured.mean("float32")), "", "100 %"],
            ["int8", f"{little / 1024:.0f}", interval(measured.mean("int8")), interval(lost, 4), f"{same.mean():.1%}"],
        ],
        notes=[
            f"{data}, {len(them):,} people of folds 1 to {FOLDS - 1}, tested on their last fifth; item vectors and "
            f"both transition tables, popularity left as it is. {them[0][0].made.conditions}",
            "No loss shows." if lost.low <= 0 <= lost.high else "The difference is not by chance.",
        ],
    )


def gain(shown: Int64, targets: Int32) -> float:
    """NDCG of a list as it is: every target counts one, the best list has them first."""
    discount = 1 / np.log2(np.arange(2, LIST + 2))
    hits = np.isin(shown, targets)
    return float((hits * discount[: len(shown)]).sum() / discount[: min(len(targets), LIST)].sum())


def _posterior(person: Person, past: History, config: DistributionConfig, scores: Float32 | None) -> Distribution:
    said: AnyFloat = past.strengths
    return distribution(person.topics, person.made.side.popularity, past.items, said, scores, config=config)


def _with_last(everybody: Sequence[Person]) -> list[tuple[Person, History, Int32]]:
    """People with what is known of them and the new items that they went on to choose, where there are any."""
    found = []
    for person in everybody:
        n = len(person.history)
        past = person.part(0, n - max(1, round(LAST * n)))
        targets = np.setdiff1d(person.history.items[len(past) :], past.items).astype(np.int32)
        if len(past) and len(targets):
            found.append((person, past, targets))
    if not found:
        raise InvalidConfig("nobody has interactions to hold out")
    return found


def _size(side: ItemSide) -> int:
    tables = [side.vectors, side.popularity]
    if side.transitions is not None:
        tables += [side.transitions.leave, side.transitions.arrive]
    return sum(rows.nbytes for rows in tables)


def _topics(them: Sequence[Person], grouped: bool) -> str:
    n = len(them[0].topics.names)
    return f"{n} clusters of the released vectors" if grouped else f"{n} topics of the catalogue"
