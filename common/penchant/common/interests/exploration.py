"""Which of the scored items a list shows: the best ones, or some to learn from; and rules that any list can keep to.

    greedy     s                                UCB        s + α √(fᵀ Λ⁻¹ f)
    Thompson   s + √α F L⁻ᵀ z,  z ~ N(0, I)     ε-greedy   at each place with chance ε any item, else the best left

Λ = L Lᵀ. A Thompson draw is a whole taste, one for a list, so that the list is of one mind. Strength 0 is the greedy
list in each of them, and an app sets how far it may go. Rules are policies around a policy, each sound for every length
of list:

    LongTail(Diverse(HoldBack(Thompson(strength=0.1))), head=head(side.popularity))

Source: Thompson 1933, as Chapelle and Li 2011, "An empirical evaluation of Thompson sampling"; Li et al. 2010, "A
contextual-bandit approach to personalized news article recommendation", Algorithm 1; Carbonell and Goldstein 1998,
"The use of MMR, diversity-based reranking".
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Protocol

import numpy as np

from penchant.common.arrays import AnyFloat, Bool, Float32, Float64, Int64
from penchant.common.errors import InvalidConfig
from penchant.common.taste import Posterior

SKETCH = 4
"""Random directions that variances are guessed from, before those of a shortlist are computed."""


@dataclass(frozen=True)
class Standing:
    """What is known of a person at one moment.

    Attributes:
        vectors: F, float32[n_items, d].
        posterior: of the taste; its mean is what `scores` were made with.
        scores: float32[n_items], −∞ for what must not be shown.
        rest: float32[n_items], the part of the scores that is not F · mean: popularity, transitions, context.
    """

    vectors: Float32
    posterior: Posterior
    scores: Float32
    rest: Float32


class Policy(Protocol):
    """Turns what is known into values to rank by."""

    def values(self, standing: Standing, random: np.random.Generator) -> Float32 | Float64:
        """float[n_items]; −∞ where the standing's score is."""
        ...


@dataclass(frozen=True)
class Greedy:
    """The best by score, nothing to learn."""

    def values(self, standing: Standing, random: np.random.Generator) -> Float32:
        return standing.scores


# ------------------------------------------------------------------------------------------------ what explores


@dataclass(frozen=True, kw_only=True)
class Thompson:
    """Scores by one taste drawn from what is believed of it.

    Attributes:
        strength: α in [0, most], of the covariance; 1 is the belief as it stands.
        most: what the app allows.
    """

    strength: float = 0.1
    most: float = 1.0

    def __post_init__(self) -> None:
        _bounded("strength", self.strength, self.most, math.inf)

    def values(self, standing: Standing, random: np.random.Generator) -> Float32:
        moved = math.sqrt(self.strength) * _draws(standing.posterior, 1, random)[:, 0]
        return np.asarray(standing.scores + standing.vectors @ moved.astype(np.float32), np.float32)


@dataclass(frozen=True, kw_only=True)
class UpperBound:
    """UCB: each item by the best it may plausibly be.

    Variances cost d² an item, so they are computed for a shortlist, which a few random directions pick from the whole
    catalogue; what is not on it ranks below it.

    Attributes:
        strength: α in [0, most], in standard deviations of the score.
        most: what the app allows.
        shortlist: items whose variance is computed; lists are no longer than that.
    """

    strength: float = 0.3
    most: float = 1.0
    shortlist: int = 100

    def __post_init__(self) -> None:
        _bounded("strength", self.strength, self.most, math.inf)
        _at_least("shortlist", self.shortlist, 1)

    def values(self, standing: Standing, random: np.random.Generator) -> Float32:
        scores, vectors = standing.scores, standing.vectors
        if not self.strength:
            return scores
        near = np.arange(len(scores))
        if len(scores) > self.shortlist:
            sketch = vectors @ (_draws(standing.posterior, SKETCH, random) / math.sqrt(SKETCH)).astype(np.float32)
            guess = np.sqrt(np.einsum("ij,ij->i", sketch, sketch))  # its square is the variance in expectation
            near = _best(scores + np.float32(self.strength) * guess, self.shortlist)
        if not len(near):
            return scores
        bound = scores[near] + self.strength * np.sqrt(standing.posterior.variance(vectors[near]))
        out = np.minimum(scores, np.float32(bound.min()))
        out[near] = bound
        return out


@dataclass(frozen=True, kw_only=True)
class EpsilonGreedy:
    """At each place of a list, with a small chance any item that is left; otherwise the best that is left.

    Attributes:
        chance: ε in [0, most].
        most: what the app allows, at most 1.
        places: leading places that are drawn for; lists are no longer than that.
    """

    chance: float = 0.1
    most: float = 1.0
    places: int = 100

    def __post_init__(self) -> None:
        _bounded("chance", self.chance, self.most, 1.0)
        _at_least("places", self.places, 1)

    def values(self, standing: Standing, random: np.random.Generator) -> Float64:
        shown = standing.scores > -np.inf
        greedy = _best(standing.scores, self.places).tolist()
        anywhere = random.random(len(greedy)) < self.chance
        open_ = np.flatnonzero(shown)
        strays = iter(open_[random.choice(len(open_), len(greedy), replace=False)].tolist() if len(open_) else [])
        best, chosen = iter(greedy), dict[int, None]()  # in order
        for astray in anywhere.tolist():
            source = strays if astray else best
            chosen[next(item for item in source if item not in chosen)] = None
        return _first(standing.scores, list(chosen))

    def propensities(self, standing: Standing, shown: Sequence[int]) -> Float64:
        """float64[len(shown)], the chance of each item at its place, given the items above it; their product is the
        chance of the list.

        Args:
            shown: the list, positions.
        """
        left, out = standing.scores.copy(), np.zeros(len(shown))
        for place, item in enumerate(shown):
            if left[item] == -np.inf:
                break
            best = int(np.argmax(left))
            out[place] = self.chance / np.count_nonzero(left > -np.inf) + (1 - self.chance) * (item == best)
            left[item] = -np.inf
        return out


# ------------------------------------------------------------------------------------------------- rules of lists


class HoldBack:
    """Repeat protection: what the last lists showed is held back while there is anything else.

    Args:
        policy: what ranks the others.
        lists: how many lists back.
    """

    def __init__(self, policy: Policy, *, lists: int = 3) -> None:
        _at_least("lists", lists, 0)
        self.policy = policy
        self._shown: deque[Int64] = deque(maxlen=lists)

    def shown(self, items: Iterable[int]) -> None:
        """A list was shown, positions; what was shown `lists` lists before it may come again."""
        self._shown.append(np.fromiter(items, np.int64))

    def values(self, standing: Standing, random: np.random.Generator) -> Float32 | Float64:
        scores = standing.scores.copy()
        for items in self._shown:
            scores[items] = -np.inf
        return self.policy.values(replace(standing, scores=scores), random)


@dataclass(frozen=True)
class Diverse:
    """MMR: each next item is good and unlike those above it.

        argmax  (1 − λ) value − λ max over the items above of cos(f, f'),   values scaled to [0, 1] over the shortlist

    Attributes:
        policy: what gives the values.
        weight: λ in [0, 1]; 0 leaves the policy's list.
        shortlist: how many of the best are considered.
        places: leading places that are chosen so.
    """

    policy: Policy
    _: KW_ONLY
    weight: float = 0.3
    shortlist: int = 100
    places: int = 20

    def __post_init__(self) -> None:
        _bounded("weight", self.weight, 1.0, 1.0)
        _at_least("shortlist", self.shortlist, 1)
        _at_least("places", self.places, 1)

    def values(self, standing: Standing, random: np.random.Generator) -> Float32 | Float64:
        values = self.policy.values(standing, random)
        near = _best(values, self.shortlist)
        if not self.weight or not len(near):
            return values
        worth = values[near].astype(np.float64)
        worth = (1 - self.weight) * (worth - worth[-1]) / ((worth[0] - worth[-1]) or 1.0)
        f = standing.vectors[near].astype(np.float64)
        f /= np.maximum(np.linalg.norm(f, axis=1, keepdims=True), 1e-12)
        alike = self.weight * (f @ f.T)
        chosen: list[int] = []
        nearest = np.zeros(len(near))
        for place in range(min(self.places, len(near))):
            k = int(np.argmax(worth - nearest))
            chosen.append(k)
            worth[k] = -np.inf
            nearest = np.maximum(nearest, alike[k]) if place else alike[k].copy()
        return _first(values, near[chosen].tolist())


@dataclass(frozen=True)
class LongTail:
    """A floor for what is rarely shown: of any leading p items, at least ⌊p · at_least / of⌋ are not of the head.

    Attributes:
        policy: what ranks within head and tail.
        head: bool[n_items], as `head` finds it.
        at_least, of: m of n items.
        places: leading places that the floor holds for.
    """

    policy: Policy
    _: KW_ONLY
    head: Bool
    at_least: int = 2
    of: int = 10
    places: int = 20

    def __post_init__(self) -> None:
        _at_least("of", self.of, 1)
        _at_least("places", self.places, 1)
        if not 0 <= self.at_least <= self.of:
            raise InvalidConfig(f"at_least must be from 0 to {self.of}, not {self.at_least}")

    def values(self, standing: Standing, random: np.random.Generator) -> Float32 | Float64:
        values = self.policy.values(standing, random)
        if len(self.head) != len(values):
            raise InvalidConfig(f"head has {len(self.head)} items, the catalogue {len(values)}")
        tail = _best(np.where(self.head, -np.inf, values), self.places).tolist()
        best = _best(values, self.places).tolist()
        chosen = dict[int, None]()
        n_tail = 0
        for p in range(1, len(best) + 1):
            source = best if n_tail >= p * self.at_least // self.of else [*tail, *best]  # best: the tail may run out
            item = next(item for item in source if item not in chosen)
            chosen[item] = None
            n_tail += not self.head[item]
        return _first(values, list(chosen))


def head(popularity: Float32, share: float = 0.1) -> Bool:
    """bool[n_items]: this share of the items, by released popularity; at least one. Ties go by position.

    >>> head(np.array([0.1, 0.9, 0.2, 0.4], np.float32), 0.5).tolist()
    [False, True, False, True]
    """
    _bounded("share", share, 1.0, 1.0)
    out = np.zeros(len(popularity), np.bool_)
    out[np.argsort(-popularity, kind="stable")[: max(1, round(share * len(popularity)))]] = True
    return out


def _draws(posterior: Posterior, n: int, random: np.random.Generator) -> Float64:
    """float64[d, n], draws from N(0, Λ⁻¹)."""
    lower = np.linalg.cholesky(posterior.precision)
    return np.asarray(np.linalg.solve(lower.T, random.standard_normal((len(lower), n))), np.float64)


def _best(values: AnyFloat, n: int) -> Int64:
    """int64[≤ n], positions of the largest, largest first, ties by position; none that is −∞."""
    edge = np.partition(values, max(len(values) - n, 0))[max(len(values) - n, 0)]
    kept = np.flatnonzero(values >= edge if edge > -np.inf else values > -np.inf)
    return np.asarray(kept[np.argsort(-values[kept], kind="stable")][:n], np.int64)


def _first(values: AnyFloat, ranked: Sequence[int]) -> Float64:
    """The values with these items above all others in this order, as far apart together as the best so many were."""
    out = values.astype(np.float64)
    if ranked:
        edges = len(out) - len(ranked), len(out) - 1
        low, high = np.partition(out, edges)[list(edges)].tolist()
        step = (high - low) / len(ranked) or 1.0
        out[list(ranked)] = high + step * np.arange(len(ranked), 0, -1)
    return out


def _bounded(name: str, value: float, most: float, limit: float) -> None:
    if not 0 <= most <= limit or most == math.inf:
        raise InvalidConfig(f"most must be finite and in [0, {limit:g}], not {most}")
    if not 0 <= value <= most:  # also refuses NaN
        raise InvalidConfig(f"{name} must be in [0, {most:g}], not {value}")


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise InvalidConfig(f"{name} must be at least {least}, not {value}")
