"""What one person likes, kept up to date on their own device from what was released and what they do.

    long-term and recent, h:   S_h ← γ_h S_h + o f fᵀ,   b_h ← γ_h b_h + o y f      at each event of item vector f
    Λ_h = a FᵀF + r I + S_h,   m_h = Λ_h⁻¹ ((a FᵀF + r I) m₀ + b_h),   m = (1 − w) m_long + w m_recent
    score = F m + b · popularity + λ Σⱼ δ^age(j) leaveⱼ · arriveᵀ

o is how much an event says, y in [0, 1] how strong a sign of interest it is. This is the user side of `taste.py`, event
by event and with two memories; with one of them (w = 0) and y = 1 it is that closed form. An update costs d², a reading
two systems of size d and one product with F; nothing is uploaded, and nothing here reads a clock or a network.

Source: `taste.py`, with forgetting as in recursive least squares (Haykin 2014, Adaptive Filter Theory, chapter 10).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from penchant.common.arrays import Float32, Float64, Int64
from penchant.common.catalogue import Catalogue
from penchant.common.errors import InvalidConfig
from penchant.common.interactions import History
from penchant.common.interests.exploration import Greedy, Policy, Standing
from penchant.common.taste import Attribution, ItemSide, Posterior


@dataclass(frozen=True, kw_only=True)
class InterestConfig:
    """Public settings.

    Attributes:
        long, recent: γ in (0, 1], kept with each newer event.
        share: w in [0, 1], of the recent memory in the taste.
        again: whether what a person had may be recommended again.
    """

    long: float = 0.95
    recent: float = 0.7
    share: float = 0.5
    again: bool = False

    def __post_init__(self) -> None:
        for name in ("long", "recent"):
            if not 0 < getattr(self, name) <= 1:
                raise InvalidConfig(f"{name} must be in (0, 1], not {getattr(self, name)}")
        if not 0 <= self.share <= 1:
            raise InvalidConfig(f"share must be in [0, 1], not {self.share}")


@dataclass(frozen=True)
class Recommendation:
    """One item of a list.

    Attributes:
        item: its identifier.
        position: in the catalogue.
        score: the linear score.
        explored: shown to learn from it: it would not be there by its score alone.
    """

    item: str
    position: int
    score: float
    explored: bool = False


class Memory:
    """Evidence that fades: S and b of one γ, and how much each event still weighs."""

    def __init__(self, d: int, keep: float) -> None:
        self.keep = keep
        self.spread, self.pull = np.zeros((d, d)), np.zeros(d)
        self.faded = 0.0  # log of what an event of weight 1 at the very start would weigh now

    def add(self, f: Float64, strength: float, weight: float) -> None:
        """One event, newer than all others."""
        self.fade(self.keep)
        self.spread += weight * np.outer(f, f)
        self.pull += weight * strength * f

    def fade(self, factor: float) -> None:
        """Every event so far weighs this much less."""
        self.spread *= factor
        self.pull *= factor
        self.faded += math.log(factor)


class InterestProfile:
    """One person's interests. Not for several threads at once.

    Args:
        side: what was released.
        catalogue: of the release.
        prior: m₀, float64[d], such as `taste.declared` gives for topics that a person named; zero if None.
    """

    def __init__(
        self,
        side: ItemSide,
        catalogue: Catalogue,
        config: InterestConfig | None = None,
        *,
        prior: Float64 | None = None,
    ) -> None:
        if len(side.vectors) != len(catalogue):
            raise InvalidConfig(f"the release has {len(side.vectors)} items, the catalogue {len(catalogue)}")
        self.side, self.catalogue, self.config = side, catalogue, config or InterestConfig()
        f, settings = side.vectors.astype(np.float64), side.config
        d = f.shape[1]
        self.base: Float64 = settings.unseen * (f.T @ f) + settings.ridge * np.eye(d)
        self.prior: Float64 = np.zeros(d) if prior is None else np.asarray(prior, np.float64)
        self.long, self.recent = Memory(d, self.config.long), Memory(d, self.config.recent)
        self.items: list[int] = []
        self.strengths: list[float] = []
        self.weights: list[float] = []
        self._faded: list[tuple[float, float]] = []  # of both memories when the event came
        self._follows = np.zeros(0 if side.transitions is None else side.transitions.leave.shape[1])
        self._hidden = np.zeros(len(catalogue), bool)
        self._hidden[catalogue.is_retired] = True
        self._standing: Standing | None = None

    @classmethod
    def of(
        cls, side: ItemSide, catalogue: Catalogue, history: History, config: InterestConfig | None = None
    ) -> InterestProfile:
        """The profile after a history, oldest first; items outside the catalogue are left out."""
        made = cls(side, catalogue, config)
        known = history.known(len(catalogue))
        for item, strength in zip(known.items.tolist(), known.strengths.tolist(), strict=True):
            made.update(item, strength=strength)
        return made

    def update(self, item: int, *, strength: float = 1.0, weight: float = 1.0) -> None:
        """Takes in one event, newer than all before; the next list knows of it.

        Args:
            item: position in the catalogue.
            strength: y in [0, 1], how strong a sign of interest.
            weight: o ≥ 0, how much the event says.

        Raises:
            InvalidConfig: an item outside the catalogue, or numbers outside these ranges.
        """
        if not 0 <= item < len(self.catalogue):
            raise InvalidConfig(f"item {item} is outside the catalogue of {len(self.catalogue)}")
        if not 0 <= strength <= 1 or not 0 <= weight < math.inf:
            raise InvalidConfig(f"strength must be in [0, 1] and weight finite and ≥ 0, not {strength} and {weight}")
        f = self.side.vectors[item].astype(np.float64)
        for memory in (self.long, self.recent):
            memory.add(f, strength, weight)
        self.items.append(item)
        self.strengths.append(strength)
        self.weights.append(weight)
        self._faded.append((self.long.faded, self.recent.faded))
        if self.side.transitions is not None:
            self._follows = self.side.config.transition_decay * self._follows + self.side.transitions.leave[item]
        if not self.config.again:
            self._hidden[item] = True
        self._standing = None

    @property
    def share(self) -> float:
        """w, of the recent memory in the taste."""
        return self.config.share

    def taste(self) -> Posterior:
        """The mixed mean, with the long-term memory's precision: what is uncertain is what was never met."""
        long, recent = self._solved(self.long), self._solved(self.recent)
        return Posterior((1 - self.share) * long + self.share * recent, self.base + self.long.spread)

    def _solved(self, memory: Memory) -> Float64:
        right = self.base @ self.prior + memory.pull
        return np.asarray(np.linalg.solve(self.base + memory.spread, right), np.float64)

    def standing(self) -> Standing:
        """Scores of the whole catalogue now; kept until the next event."""
        if self._standing is None:
            side, taste = self.side, self.taste()
            rest: Float32 = np.float32(side.config.popularity) * side.popularity
            if side.transitions is not None and side.config.transition:
                left = (side.config.transition * self._follows).astype(np.float32)
                rest = (rest + side.transitions.arrive @ left).astype(np.float32)
            scores: Float32 = (side.vectors @ taste.mean.astype(np.float32) + rest).astype(np.float32)
            scores[self._hidden] = -np.inf
            self._standing = Standing(side.vectors, taste, scores, rest)
        return self._standing

    def recommend(
        self, n: int = 10, *, policy: Policy | None = None, random: np.random.Generator | None = None
    ) -> list[Recommendation]:
        """The next n items, best first; fewer where the catalogue has no more.

        Args:
            policy: how a list is chosen; the best by score if None.
            random: what a policy draws from; the system's if None.
        """
        standing, policy = self.standing(), policy or Greedy()
        values = policy.values(standing, random or np.random.default_rng())
        chosen = _top(values, n)
        best = set(_top(standing.scores, n).tolist())
        return [
            Recommendation(self.catalogue.ids[i], i, float(standing.scores[i]), i not in best)
            for i in chosen.tolist()
            if standing.scores[i] > -np.inf
        ]

    def attribution(self, item: int) -> Attribution:
        """Where one item's score comes from, event by event; the parts sum to the score, to float32 rounding."""
        side, f = self.side, self.side.vectors[item].astype(np.float64)
        own = side.vectors[self.items].astype(np.float64)
        past, prior = np.zeros(len(self.items)), 0.0
        said = np.array(self.weights) * np.array(self.strengths)
        for which, (memory, part) in enumerate(((self.long, 1 - self.share), (self.recent, self.share))):
            pull = np.linalg.solve(self.base + memory.spread, f)
            kept = np.exp(memory.faded - np.array([faded[which] for faded in self._faded]))
            past += part * said * kept * (own @ pull)
            prior += part * float(pull @ self.base @ self.prior)
        follows = np.zeros(len(self.items))
        if side.transitions is not None and side.config.transition:
            ages = np.arange(len(self.items) - 1, -1, -1.0)
            each = side.transitions.leave[self.items].astype(np.float64) @ side.transitions.arrive[item]
            follows = side.config.transition * side.config.transition_decay**ages * each
        return Attribution(past, follows, prior, side.config.popularity * float(side.popularity[item]))


def _top(values: Float32 | Float64, n: int) -> Int64:
    """int64[≤ n], positions of the largest, largest first; ties by position."""
    n = min(n, len(values))
    if n < len(values):
        edge = np.partition(values, len(values) - n)[len(values) - n]
        kept = np.flatnonzero(values >= edge)
    else:
        kept = np.arange(len(values))
    found: Int64 = kept[np.argsort(-values[kept], kind="stable")][:n]
    return found
