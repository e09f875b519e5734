"""Which of the scored items a list shows: the best ones, or some to learn from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from penchant.common.arrays import Float32, Float64
from penchant.common.taste import Posterior


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
