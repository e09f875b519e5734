"""One person's taste as a vector over released item vectors, in closed form, from their own history.

    u = (a FᵀF + Σⱼ oⱼ fⱼ fⱼᵀ + r I)⁻¹ Σⱼ oⱼ fⱼ ,   oⱼ = γ^age(j) ,   score = F u + b · popularity

Every item weighs a little as "not chosen" (a), the person's own items weigh more, the latest most (age 0). It is the
posterior mean of a Bayesian linear model with prior N(0, (a FᵀF + r I)⁻¹). It needs no training, so it is at once right
for a person never seen before, and it is post-processing of what was released: it costs no privacy.

Source: Hu, Koren and Volinsky 2008, "Collaborative filtering for implicit feedback datasets", equation 4, with the
observations weighted by recency.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from penchant.common.arrays import Float32, Float64
from penchant.common.errors import InvalidConfig
from penchant.common.interactions import Interactions


@dataclass(frozen=True, kw_only=True)
class TasteConfig:
    """Public settings of the user side.

    Attributes:
        decay: γ in (0, 1], weight lost with each newer interaction.
        unseen: a ≥ 0, weight of every catalogue item as "not chosen".
        ridge: r > 0, pull towards zero.
        popularity: b ≥ 0, weight of released popularity (in [0, 1]).
    """

    decay: float = 0.8
    unseen: float = 0.015
    ridge: float = 0.01
    popularity: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 < self.decay <= 1.0:
            raise InvalidConfig(f"decay must be in (0, 1], not {self.decay}")
        if not (0.0 <= self.unseen < math.inf and 0.0 <= self.popularity < math.inf and 0.0 < self.ridge < math.inf):
            raise InvalidConfig("unseen and popularity must be finite and ≥ 0, ridge positive and finite")


def tastes(vectors: Float32, histories: Interactions, config: TasteConfig) -> Float64:
    """float64[n_users, d]: the taste vector of each person; zero where the history is empty.

    Args:
        vectors: F, float32[n_items, d].
    """
    f = vectors.astype(np.float64)
    base = config.unseen * (f.T @ f) + config.ridge * np.eye(f.shape[1])
    out = np.zeros((histories.n_users, f.shape[1]))
    for row, history in enumerate(histories):
        if not len(history):
            continue
        own = f[history.items]
        weight = config.decay ** np.arange(len(history) - 1, -1, -1.0)
        out[row] = np.linalg.solve(base + (own.T * weight) @ own, weight @ own)
    return out


def scores(vectors: Float32, popularity: Float32, histories: Interactions, config: TasteConfig) -> Float32:
    """float32[n_users, n_items]: each person's score of every item.

    Args:
        vectors: F, float32[n_items, d].
        popularity: float32[n_items] in [0, 1], released or public.
    """
    out = tastes(vectors, histories, config) @ vectors.T.astype(np.float64)
    if config.popularity:
        out += config.popularity * popularity.astype(np.float64)
    return out.astype(np.float32)  # only now: items alike tie, however the product was split up
