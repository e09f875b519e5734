"""One person's taste as a vector over released item vectors, in closed form, from their own history.

    Λ = a FᵀF + r I + Σⱼ oⱼ fⱼ fⱼᵀ ,   u = Λ⁻¹ ( (a FᵀF + r I) m₀ + Σⱼ oⱼ fⱼ ) ,   oⱼ = γ^age(j)
    score = F u + b · popularity + λ Σⱼ δ^age(j) leave_j · arriveᵀ

Every item weighs a little as "not chosen" (a), the person's own items weigh more, the latest most (age 0). u is the
posterior mean of a Bayesian linear model with prior N(m₀, (a FᵀF + r I)⁻¹) and unit noise, and Λ⁻¹ its covariance; m₀
is zero unless something is known beforehand, such as topics that a person named (`declared`). The last term is what
follows what: transitions released as two tables of factors. Nothing here needs training, so it is at once right for a
person never seen before, and it is post-processing of what was released: it costs no privacy.

The linear score is a sum over the person's interactions and the other terms; `attribution` says which gave how much.

Source: Hu, Koren and Volinsky 2008, "Collaborative filtering for implicit feedback datasets", equation 4 (and section 5
for attributing a score), with the observations weighted by recency; Bishop 2006, Pattern Recognition and Machine
Learning, section 3.3.1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from penchant.common.arrays import Float32, Float64, Int64
from penchant.common.errors import InvalidConfig
from penchant.common.interactions import History, Interactions

FORGOTTEN = 1e-9
"""Weights below this share of the latest interaction's count as nothing."""


@dataclass(frozen=True, kw_only=True)
class TasteConfig:
    """Public settings of the user side.

    Attributes:
        decay: γ in (0, 1], weight kept with each newer interaction.
        unseen: a ≥ 0, weight of every catalogue item as "not chosen".
        ridge: r > 0, pull towards the prior mean.
        popularity: b ≥ 0, weight of released popularity (in [0, 1]).
        transition: λ ≥ 0, weight of what follows what, where that was released.
        transition_decay: δ in (0, 1], like γ, for transitions.
    """

    decay: float = 0.8
    unseen: float = 0.015
    ridge: float = 0.01
    popularity: float = 0.0
    transition: float = 0.0
    transition_decay: float = 0.6

    def __post_init__(self) -> None:
        for name in ("decay", "transition_decay"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise InvalidConfig(f"{name} must be in (0, 1], not {getattr(self, name)}")
        for name in ("unseen", "popularity", "transition"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise InvalidConfig(f"{name} must be finite and ≥ 0, not {getattr(self, name)}")
        if not 0.0 < self.ridge < math.inf:
            raise InvalidConfig(f"ridge must be positive and finite, not {self.ridge}")


@dataclass(frozen=True)
class Transitions:
    """What follows what, as released: after item j, item i by leaveⱼ · arriveᵢ.

    Attributes:
        leave, arrive: float32[n_items, k].
    """

    leave: Float32
    arrive: Float32


_BLOCK = 1 << 14  # items


@dataclass(frozen=True)
class ItemSide:
    """What a device needs of a release to score by its taste: the same for everybody.

    Attributes:
        vectors: F, float32[n_items, d], learned and public columns side by side.
        popularity: float32[n_items] in [0, 1].
        config: how a taste is made of a history.
        transitions: what follows what, where that was released.
        content: how many of the last columns of `vectors` are public features.
    """

    vectors: Float32
    popularity: Float32
    config: TasteConfig
    transitions: Transitions | None = None
    content: int = 0

    @cached_property
    def gram(self) -> Float64:
        """FᵀF, float64[d, d]; worked out block by block, as F in float64 is twice the release."""
        found = np.zeros((self.vectors.shape[1],) * 2)
        for start in range(0, len(self.vectors), _BLOCK):
            f = self.vectors[start : start + _BLOCK].astype(np.float64)
            found += f.T @ f
        return found

    @cached_property
    def order(self) -> Int64:
        """int64[n_items], positions by popularity, the most popular first."""
        return np.argsort(-self.popularity, kind="stable")

    def scores(self, histories: Interactions) -> Float32:
        """As the function below."""
        return scores(self.vectors, self.popularity, histories, self.config, transitions=self.transitions)


@dataclass(frozen=True)
class Posterior:
    """What is known of one person's taste.

    Attributes:
        mean: float64[d].
        precision: float64[d, d], Λ; its inverse is the covariance.
    """

    mean: Float64
    precision: Float64

    def variance(self, vectors: Float32) -> Float64:
        """float64[n]: fᵀ Λ⁻¹ f for each of n vectors, in squared units of the score."""
        lower = np.linalg.cholesky(self.precision)
        half = np.linalg.solve(lower, vectors.astype(np.float64).T)
        found: Float64 = (half * half).sum(axis=0)
        return found


@dataclass(frozen=True)
class Attribution:
    """Where one item's linear score comes from.

    Attributes:
        past: float64[n], what each interaction of the history gave through the taste.
        transition: float64[n], what each gave as something that the item follows.
        prior, popularity: what was known before any interaction.
        context: what the moment gave, by name of its category.
    """

    past: Float64
    transition: Float64
    prior: float
    popularity: float
    context: Mapping[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        """The score."""
        known = self.prior + self.popularity + sum(self.context.values())
        return float(self.past.sum() + self.transition.sum()) + known


def weights(n: int, decay: float) -> Float64:
    """float64[n]: decay^age of n interactions, oldest first; 0 where that is `FORGOTTEN`.

    >>> weights(3, 0.5).tolist()
    [0.25, 0.5, 1.0]
    """
    out = decay ** np.arange(n - 1, -1, -1.0)
    out[out < FORGOTTEN] = 0.0
    return np.asarray(out, np.float64)


def declared(content: Float64 | Float32, topics: Float64 | Float32, strength: float = 1.0) -> Float64:
    """float64[d], a prior mean that points to items with these features.

    Args:
        content: float[n_items, d], the vectors' own columns that a statement is about, zeros in all others.
        topics: float[n_items], how well each item fits what the person said, in [0, 1].
        strength: expected score of an item that fits best.
    """
    towards = np.asarray(content, np.float64).T @ np.asarray(topics, np.float64)
    reach = float(np.max(np.asarray(content, np.float64) @ towards, initial=0.0))
    return np.asarray(towards * (strength / reach) if reach > 0 else np.zeros_like(towards))


def posterior(vectors: Float32, history: History, config: TasteConfig, prior: Float64 | None = None) -> Posterior:
    """What a history tells of a person's taste.

    Args:
        vectors: F, float32[n_items, d].
        prior: m₀, float64[d]; zero if None.
    """
    f = vectors.astype(np.float64)
    base = _base(f, config)
    weight = weights(len(history), config.decay)
    own = f[history.items]
    precision = base + (own.T * weight) @ own
    right = weight @ own if prior is None else base @ prior + weight @ own
    return Posterior(np.asarray(np.linalg.solve(precision, right), np.float64), precision)


def tastes(vectors: Float32, histories: Interactions, config: TasteConfig, prior: Float64 | None = None) -> Float64:
    """float64[n_users, d]: each person's posterior mean; the prior's where the history is empty.

    Args:
        vectors: F, float32[n_items, d].
        prior: m₀, float64[d]; zero if None.
    """
    f = vectors.astype(np.float64)
    base = _base(f, config)
    start = np.zeros(f.shape[1]) if prior is None else prior
    pull = base @ start
    out = np.tile(start, (histories.n_users, 1))
    reach = _reach(config.decay)
    for row, history in enumerate(histories):
        if not len(history):
            continue
        own = f[history.items[-reach:]]
        weight = weights(len(own), config.decay)
        out[row] = np.linalg.solve(base + (own.T * weight) @ own, pull + weight @ own)
    return out


def scores(
    vectors: Float32,
    popularity: Float32,
    histories: Interactions,
    config: TasteConfig,
    *,
    transitions: Transitions | None = None,
    prior: Float64 | None = None,
) -> Float32:
    """float32[n_users, n_items]: each person's score of every item.

    Args:
        vectors: F, float32[n_items, d].
        popularity: float32[n_items] in [0, 1], released or public.
        prior: m₀, float64[d]; zero if None.
    """
    out = tastes(vectors, histories, config, prior) @ vectors.T.astype(np.float64)
    if config.popularity:
        out += config.popularity * popularity.astype(np.float64)
    if transitions is not None and config.transition:
        left = np.zeros((histories.n_users, transitions.leave.shape[1]))
        reach = _reach(config.transition_decay)
        for row, history in enumerate(histories):
            recent = history.items[-reach:]
            left[row] = weights(len(recent), config.transition_decay) @ transitions.leave[recent]
        out += (config.transition * left) @ transitions.arrive.T.astype(np.float64)
    return out.astype(np.float32)  # only now: items alike tie, however the product was split up


def attribution(
    item: int,
    vectors: Float32,
    popularity: Float32,
    history: History,
    config: TasteConfig,
    *,
    transitions: Transitions | None = None,
    prior: Float64 | None = None,
) -> Attribution:
    """Where the score of one item comes from; the parts sum to it.

    Args:
        item: a position in the catalogue.
    """
    f = vectors.astype(np.float64)
    base = _base(f, config)
    weight = weights(len(history), config.decay)
    own = f[history.items]
    pull = np.linalg.solve(base + (own.T * weight) @ own, f[item])  # Λ⁻¹ fᵢ
    follows = np.zeros(len(history))
    if transitions is not None and config.transition:
        each = transitions.leave[history.items].astype(np.float64) @ transitions.arrive[item].astype(np.float64)
        follows = config.transition * weights(len(history), config.transition_decay) * each
    return Attribution(
        past=weight * (own @ pull),
        transition=follows,
        prior=0.0 if prior is None else float(pull @ base @ prior),
        popularity=config.popularity * float(popularity[item]),
    )


def _base(f: Float64, config: TasteConfig) -> Float64:
    """float64[d, d]: the prior's precision."""
    return np.asarray(config.unseen * (f.T @ f) + config.ridge * np.eye(f.shape[1]))


def _reach(decay: float) -> int:
    """How many of the latest interactions weigh anything."""
    return 2**31 if decay == 1.0 else 1 + math.floor(math.log(FORGOTTEN) / math.log(decay))
