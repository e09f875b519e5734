"""What share of a person's interest each topic has, with an interval, from no interaction on; and lists that keep it.

    a_t = α g_t + Σⱼ nⱼ p(t|j) + ρ (Σⱼ nⱼ) mean over predicted items i of p(t|i),   nⱼ = oⱼ yⱼ γ^age(j)
    shares ~ Dirichlet(a),   E = a_t / Σ a,   each alone Beta(a_t, Σ a − a_t)
    g_t ∝ Σᵢ popularityᵢ p(t|i)

p(t|i) is public: an item's topics in equal parts, or clusters of what was released. g is post-processing of released
popularity, so it is as private as that is and costs nothing further. All the rest is one person's, on their own
device. What share a topic has in the *population* is data: it is to be had only as a release that the ledger is charged
for, and g is such a one; nothing here counts exact shares of several people.

A list is calibrated when its topics are spread as the person's interest is:

    greedily maximise  (1 − λ) Σ score − λ KL(p ‖ q̃(list)),   q̃ = (1 − s) q + s p

Interactions count in pseudo-counts, so intervals are those of one draw of a share a person; one item of several topics
counts in parts, as if topics were drawn. Topics that a catalogue marks as sensitive never enter.

Sources: Gelman et al. 2013, Bayesian Data Analysis, section 3.4 (Dirichlet and its marginals). Steck 2018, "Calibrated
recommendations", RecSys, sections 3 and 4. Dhillon and Modha 2001, "Concept decompositions for large sparse text data
using clustering" (spherical k-means); Arthur and Vassilvitskii 2007 (its start). Monroe, Colaresi and Quinn 2008,
"Fightin' words", section 3.3 (labels).
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from penchant.common import content
from penchant.common.arrays import AnyFloat, Bool, Float32, Float64, Int64
from penchant.common.catalogue import Catalogue
from penchant.common.errors import InvalidConfig
from penchant.common.interests.profile import InterestProfile
from penchant.common.streams import Streams

SMOOTHING = 0.01
"""s: what of the wanted shares is mixed into a list's before they are compared, so that KL is finite (Steck 2018)."""

USUAL, SURE = 5, 1.96
"""A word can name a cluster if so many items have it, and if it is over-represented by so many standard errors."""

_GRID, _REACH = 4001, 12.0
_ROUNDS = 100
_UNDATED = re.compile(r"\(\d{4}\)\s*$")


@dataclass(frozen=True, eq=False)
class Topics:
    """What items are about.

    Attributes:
        names: of the topics, each once.
        shares: p(t|i), float64[n_items, n_topics]; a row sums to 1, or is zero where nothing is known of the item.
    """

    names: tuple[str, ...]
    shares: Float64

    @classmethod
    def of(cls, catalogue: Catalogue) -> Topics:
        """A catalogue's own topics less the sensitive, an item's in equal parts.

        Raises:
            InvalidConfig: it has none; `clusters` finds some.
        """
        names = tuple(sorted({topic for topics in catalogue.topics for topic in topics} - catalogue.sensitive))
        if not names:
            raise InvalidConfig(f"catalogue {catalogue.name!r} has no topics to share out; use Topics.clusters")
        place = {name: t for t, name in enumerate(names)}
        shares = np.zeros((len(catalogue), len(names)))
        for i, topics in enumerate(catalogue.topics):
            own = sorted({place[topic] for topic in topics if topic in place})
            shares[i, own] = 1.0 / max(len(own), 1)
        return cls(names, shares)

    def without(self, preferences: Preferences) -> Topics:
        """Those that were not refused, as a `Distribution` under these preferences has them."""
        kept = [name not in preferences.refused for name in self.names]
        return Topics(tuple(itertools.compress(self.names, kept)), self.shares[:, kept])

    @classmethod
    def clusters(cls, catalogue: Catalogue, vectors: Float32, n: int = 20, *, seed: int = 0) -> Topics:
        """Groups of released vectors that point the same way, each named by what is usual in it and not elsewhere.

        An item without a vector, or with a sensitive topic, is in none. Names and groups are those of one release.

        Args:
            vectors: float32[n_items, d].
            n: public, at least 2; fewer are found where fewer vectors differ.
            seed: public, of the first centres.
        """
        if len(vectors) != len(catalogue):
            raise InvalidConfig(f"there are {len(vectors)} vectors for a catalogue of {len(catalogue)}")
        if n < 2:
            raise InvalidConfig(f"there must be at least 2 clusters, not {n}")
        length = np.linalg.norm(vectors.astype(np.float64), axis=1)
        items = np.flatnonzero((length > 0) & ~catalogue.is_sensitive)
        rows = vectors[items].astype(np.float64) / length[items, None]
        group, centres = _spherical(rows, n, Streams(seed).get("topic-clusters"))
        shares = np.zeros((len(catalogue), len(centres)))
        shares[items, group] = 1.0
        middle = [int(items[np.argmax(np.where(group == t, rows @ c, -np.inf))]) for t, c in enumerate(centres)]
        return cls(_labels(catalogue, items, group, middle), shares)


@dataclass(frozen=True, kw_only=True)
class Preferences:
    """What a person said, which holds whatever the numbers say.

    Attributes:
        refused: "not this topic": names of a catalogue's topics, or of clusters as long as these are in use. Items of
            such a topic are not shown, and no distribution or explanation has it.
    """

    refused: frozenset[str] = frozenset()

    def hidden(self, catalogue: Catalogue, topics: Topics | None = None) -> Bool:
        """bool[n_items], which items are of a refused topic; a name that nothing has hides nothing."""
        if not self.refused:
            return np.zeros(len(catalogue), np.bool_)
        found = np.array([not self.refused.isdisjoint(own) for own in catalogue.topics], np.bool_)
        if topics is not None:
            found |= topics.shares[:, [name in self.refused for name in topics.names]].any(axis=1)
        return found


@dataclass(frozen=True, kw_only=True)
class DistributionConfig:
    """Public settings, chosen on ML-100K (docs/interests.md).

    Attributes:
        general: α > 0, how many interactions the general shares g count for.
        keep: γ in (0, 1], of an interaction's count that is left with each newer one.
        predicted: ρ ≥ 0, how much the predicted items count for, as a multiple of the interactions: those of somebody
            of whom nothing is known are only popular ones, which g has already.
        n_predicted: how many of the best-scored items those are.
    """

    general: float = 20.0
    keep: float = 1.0
    predicted: float = 2.0
    n_predicted: int = 100

    def __post_init__(self) -> None:
        if not 0 < self.general < math.inf or not 0 <= self.predicted < math.inf:
            raise InvalidConfig(f"general must be > 0 and predicted ≥ 0, not {self.general} and {self.predicted}")
        if not 0 < self.keep <= 1:
            raise InvalidConfig(f"keep must be in (0, 1], not {self.keep}")
        if self.n_predicted < 1:
            raise InvalidConfig(f"n_predicted must be at least 1, not {self.n_predicted}")


@dataclass(frozen=True, eq=False)
class Distribution:
    """Shares of one person's interest, as a Dirichlet posterior.

    Attributes:
        names: of the topics, in the order of `Topics` less those refused.
        counts: a, float64[n_topics], pseudo-counts.
    """

    names: tuple[str, ...]
    counts: Float64

    @property
    def shares(self) -> Float64:
        """float64[n_topics]: the mean; sums to 1."""
        return _normalised(self.counts)

    def interval(self, level: float = 0.95) -> tuple[Float64, Float64]:
        """float64[n_topics] twice: between these each topic's share lies with probability `level`, in equal tails."""
        if not 0 < level < 1:
            raise InvalidConfig(f"level must be in (0, 1), not {level}")
        low, high = beta_quantiles(self.counts, self.counts.sum() - self.counts, [(1 - level) / 2, (1 + level) / 2])
        return low, high

    def top(self, n: int = 5) -> list[tuple[str, float]]:
        """The n largest shares with their names, largest first."""
        order = np.argsort(-self.counts, kind="stable")[:n]
        return [(self.names[t], float(self.shares[t])) for t in order]


def general(topics: Topics, popularity: Float32) -> Float64:
    """g, float64[n_topics]: shares of everybody's interest by what popularity was released; all items alike if none.

    Args:
        popularity: float32[n_items], released.
    """
    found: Float64 = popularity.astype(np.float64) @ topics.shares
    return _normalised(found if found.any() else topics.shares.sum(axis=0))


def distribution(
    topics: Topics,
    popularity: Float32,
    items: Sequence[int] | npt.NDArray[np.integer],
    said: Sequence[float] | AnyFloat,
    scores: Float32 | None = None,
    *,
    config: DistributionConfig | None = None,
    preferences: Preferences | None = None,
) -> Distribution:
    """One person's shares.

    Args:
        popularity: float32[n_items], released.
        items: their interactions, oldest first, positions in the catalogue.
        said: o y ≥ 0 of each.
        scores: float32[n_items], of what they may like next, −∞ for what must not be shown; None to predict nothing.
    """
    config, preferences = config or DistributionConfig(), preferences or Preferences()
    own = np.asarray(items, np.int64)
    weights = np.asarray(said, np.float64) * config.keep ** np.arange(len(own) - 1, -1, -1.0)
    counts = config.general * general(topics, popularity) + weights @ topics.shares[own]
    kept = np.array([name not in preferences.refused for name in topics.names], np.bool_)
    if scores is not None and config.predicted and weights.any():
        scores = np.where(topics.shares[:, ~kept].any(axis=1), -np.inf, scores)
        best = np.argsort(-scores, kind="stable")[: config.n_predicted]
        shares = _normalised(topics.shares[best[scores[best] > -np.inf]].sum(axis=0))
        counts += config.predicted * weights.sum() * shares
    return Distribution(topics.without(preferences).names, counts[kept])


def of_profile(
    profile: InterestProfile,
    topics: Topics,
    *,
    config: DistributionConfig | None = None,
    preferences: Preferences | None = None,
) -> Distribution:
    """As `distribution`, of what a profile has taken in and now predicts."""
    preferences = preferences or Preferences()
    said = np.array(profile.weights) * np.array(profile.strengths)
    scores = np.where(preferences.hidden(profile.catalogue, topics), -np.inf, profile.standing().scores)
    return distribution(
        topics, profile.side.popularity, profile.items, said, scores, config=config, preferences=preferences
    )


def calibrated(
    scores: AnyFloat,
    candidates: npt.NDArray[np.integer],
    shares: Float64,
    target: Float64,
    n: int,
    weight: float,
) -> Int64:
    """A list whose topics are spread as wanted, as far as that is worth its scores: int64[≤ n], in order of choice.

    Args:
        scores: float[n_items]. Those of the candidates are brought to [0, 1], so that λ means the same for every scale.
        candidates: positions to choose from, such as the best hundred; those with a score of −∞ are left out.
        shares: p(t|i), float64[n_items, n_topics].
        target: p, float64[n_topics], sums to 1.
        n: length of the list.
        weight: λ in [0, 1]; at 0 the best by score.
    """
    if not 0 <= weight <= 1:
        raise InvalidConfig(f"weight must be in [0, 1], not {weight}")
    if target.shape != shares.shape[1:]:
        raise InvalidConfig(f"the target has {len(target)} topics, the items {shares.shape[1]}")
    left = np.sort(np.asarray(candidates, np.int64))
    left = left[scores[left] > -np.inf]
    if not len(left):
        return left
    value = scores[left].astype(np.float64)
    value = (value - value.min()) / (float(np.ptp(value)) or 1.0)
    offered, mass = shares[left], np.zeros(len(target))
    chosen: list[int] = []
    for _ in range(min(n, len(left))):
        lists = mass + offered
        gains = (1 - weight) * value - weight * divergence(target, _normalised(lists))
        gains[chosen] = -np.inf
        best = int(np.argmax(gains))
        chosen.append(best)
        mass = lists[best]
    return left[chosen]


def divergence(target: Float64, found: Float64) -> Float64:
    """KL(p ‖ q̃) in nats of wanted shares p, float64[n_topics], from shares q, float64[…, n_topics]; q̃ is smoothed."""
    has = target > 0
    p = target[has]
    smooth = (1 - SMOOTHING) * found[..., has] + SMOOTHING * p
    out: Float64 = (p * np.log(p / smooth)).sum(axis=-1)
    return out


def jensen_shannon(p: Float64, q: Float64) -> float:
    """Divergence of two shares in bits: 0 where they are the same, 1 where nothing is in both.

    Source: Lin 1991, "Divergence measures based on the Shannon entropy", equation 3.14.

    >>> jensen_shannon(np.array([1.0, 0.0]), np.array([0.0, 1.0]))
    1.0
    """
    middle = (p + q) / 2
    total = 0.0
    for side in (p, q):
        has = side > 0
        total += float((side[has] * np.log2(side[has] / middle[has])).sum()) / 2
    return max(total, 0.0)


def beta_quantiles(a: Float64, b: Float64, levels: Sequence[float]) -> Float64:
    """float64[n_levels, n]: quantiles of Beta(aᵢ, bᵢ), to about 1e-3; 0 where a is 0, else 1 where b is 0.

    Sums the density of log(x / (1 − x)), which is smooth where x's own has poles, on a grid of `_REACH` of its standard
    deviations either side, with exponential tails beyond.
    """
    out = np.zeros((len(levels), len(a)))
    out[:, (a > 0) & (b <= 0)] = 1.0
    inside = np.flatnonzero((a > 0) & (b > 0))
    for i in inside:
        spread = math.sqrt(1 / a[i] + 1 / a[i] ** 2 + 1 / b[i] + 1 / b[i] ** 2)
        z = math.log(a[i] / b[i]) + np.linspace(-_REACH, _REACH, _GRID) * spread
        log = -a[i] * np.logaddexp(0, -z) - b[i] * np.logaddexp(0, z)
        density = np.exp(log - log.max())
        cells = (density[1:] + density[:-1]) / 2 * (z[1] - z[0])
        mass = density[0] / a[i] + np.concatenate([[0.0], np.cumsum(cells)])
        at = np.interp(np.asarray(levels) * (mass[-1] + density[-1] / b[i]), mass, z)
        out[:, i] = np.exp(-np.logaddexp(0, -at))
    return out


def _normalised(values: Float64) -> Float64:
    """Rows that sum to 1; those of zeros stay."""
    total = values.sum(axis=-1, keepdims=True)
    return np.asarray(values / np.where(total > 0, total, 1.0), np.float64)


def _spherical(rows: Float64, n: int, random: np.random.Generator) -> tuple[Int64, Float64]:
    """Groups of unit rows, int64[m], and their centres, float64[≤ n, d]; every group has a row."""
    centres = rows[:0]
    nearest = np.ones(len(rows))
    while len(centres) < n and (nearest > 1e-9).any():  # k-means++: far from every centre so far
        new = rows[random.choice(len(rows), p=nearest / nearest.sum())]
        centres = np.vstack([centres, new])
        nearest = np.maximum(np.minimum(nearest, 1 - rows @ new), 0.0)
    group = np.full(len(rows), -1)
    for _ in range(_ROUNDS):
        new_group = np.argmax(rows @ centres.T, axis=1) if len(centres) else group
        if (new_group == group).all():
            break
        group = new_group
        kept = np.unique(group)
        sums = np.stack([rows[group == t].sum(axis=0) for t in kept])
        group = np.searchsorted(kept, group)
        centres = sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12)
    return group.astype(np.int64), centres


def _labels(catalogue: Catalogue, items: Int64, group: Int64, middle: Sequence[int]) -> tuple[str, ...]:
    """A name for each group: its three most over-represented words, more where two groups share them.

    A group that has none is named by the title of its middle item.
    """
    words = [_words(catalogue, i) for i in items.tolist()]
    usual = Counter(word for own in words for word in own)
    place = {word: w for w, word in enumerate(sorted(word for word, times in usual.items() if times >= USUAL))}
    counts = np.zeros((len(middle), len(place)))
    for t, own in zip(group.tolist(), words, strict=True):
        counts[t, [place[word] for word in own if word in place]] += 1
    listed, z = list(place), over_represented(counts)
    names: list[str] = []
    for t, item in enumerate(middle):
        order = [listed[w] for w in np.argsort(-z[t], kind="stable") if z[t, w] > SURE] or [catalogue.titles[item]]
        options = [", ".join(order[:size]) for size in range(min(3, len(order)), len(order) + 1)]
        names.append(next((name for name in options if name not in names), f"{options[-1]} ({t + 1})"))
    return tuple(names)


def _words(catalogue: Catalogue, item: int) -> set[str]:
    """Topics but the sensitive, category words and words of the title, its year left out."""
    topics = set(catalogue.topics[item]) - catalogue.sensitive
    categories = {column[item] for column in catalogue.categories.values()} - {""}
    title = _UNDATED.sub("", catalogue.titles[item])
    return topics | categories | set(content.terms(title))


def over_represented(counts: Float64) -> Float64:
    """float64[n_groups, n_words]: by how many standard errors a word's log-odds are higher in a group than elsewhere.

        δ = log (y + a)/(n + A − y − a) − log (y' + a)/(n' + A − y' − a),   z = δ / √(1/(y + a) + 1/(y' + a))

    y of n words are the word in the group, y' of n' elsewhere; a, the prior, are the word's counts over all groups, A
    in sum, scaled to one group of average size.

    Args:
        counts: float64[n_groups, n_words].
    """
    total = counts.sum(axis=0)
    prior = total / max(len(counts), 1)
    elsewhere = total - counts
    inside, outside = counts + prior, elsewhere + prior
    rest = counts.sum(axis=1, keepdims=True) + prior.sum() - inside
    rest_outside = elsewhere.sum(axis=1, keepdims=True) + prior.sum() - outside
    with np.errstate(divide="ignore", invalid="ignore"):
        log_odds = np.log(inside / rest) - np.log(outside / rest_outside)
        z = log_odds / np.sqrt(1 / inside + 1 / outside)
    return np.asarray(np.nan_to_num(z, nan=0.0, posinf=0.0, neginf=0.0), np.float64)
