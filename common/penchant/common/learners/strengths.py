"""How strongly items are liked, and what a score is worth: two private sums after those of co-occurrence.

First the sums of `cooccurrence.py`, which choose the head and give the vectors. Then, once each:

    strengths   at each of a person's n different head items, latest strength y:  s (1, d),  d = 2 (y − midpoint),
                with s = 1/√Σ(1 + d²):  length 1, where there is any
    outcomes    counts of (score bin × strength level) over the person's own history, each strength against what
                `interests/intensity.py` expects of it from the others; scaled to length 1

So the clip at C = 1 never bites an honest device. With C and D the two noised columns, of noise stddev σ each:

    μ = midpoint + ½ ΣD/ΣC,    rᵢ = ½Dᵢ/Cᵢ − (μ − midpoint),    gᵢ = C² / (C² + λC + σ² (¼ + (μ − midpoint)²)/τ²)
    bᵢ = mᵢ + gᵢ (rᵢ − mᵢ),    var bᵢ = τ² (1 − gᵢ)             and g = 0 where C ≤ 0

which is the mean and the variance of bᵢ ~ N(mᵢ, τ²) given rᵢ, with λ for the scatter of one strength over τ². mᵢ is
what public features say of an item, by ridge regression of r on them with weights g; an item outside the head has no
more than that. People who rate much weigh less each (s falls as 1/√n): means are over people rather than events. The
counts of outcomes are released as they are; isotonic regression over them is the reader's.

Privacy: adding or removing a person moves each sum by at most 1; with σ = 1/(μ√share) for each, all sums together are
exactly μ-GDP (`split`). Midpoint, bins, levels and every setting are public beforehand. An interaction whose strength
is not in [0, 1] is left out.

Sources: Dong et al. 2019, https://arxiv.org/abs/1905.02383 (composition); Bell and Koren 2007, "Scalable Collaborative
Filtering with Jointly Derived Neighborhood Interpolation Weights", section 3 (shrunk item terms).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from penchant.common.arrays import Arrays, Bool, Float32, Float64, Int64
from penchant.common.catalogue import Catalogue
from penchant.common.errors import InvalidConfig
from penchant.common.interactions import History, Interactions
from penchant.common.interests.correction import Correction
from penchant.common.interests.intensity import Calibration, Intensities, IntensityConfig, ItemTerms, outcomes
from penchant.common.learners import cooccurrence, newcomers
from penchant.common.learners.contract import Randoms, State
from penchant.common.learners.cooccurrence import Continued, CooccurrenceConfig
from penchant.common.privacy.plan import SumSpec
from penchant.common.privacy.sums import Clip, Shapes
from penchant.common.streams import Streams


@dataclass(frozen=True, kw_only=True)
class StrengthsConfig:
    """Public settings, fixed before anybody takes part.

    Attributes:
        start: of the sums before, which choose the head and the vectors.
        midpoint: strength from which deviations are sent, in [0, 1].
        shrink: λ ≥ 0, pull of an item's term towards zero, in units of the first column.
        spread: τ > 0, stddev of item terms about what features say, in units of strength.
        bins, levels: of the table of outcomes; ≥ 1 and ≥ 2.
        model: of the expectation that a strength is held against.
        strengths_stddev, outcomes_stddev: of the two sums, known from the plan. 0 without noise.
    """

    start: CooccurrenceConfig = field(default_factory=CooccurrenceConfig)
    midpoint: float = 0.5
    shrink: float = 0.1
    spread: float = 0.12
    bins: int = 20
    levels: int = 5
    model: IntensityConfig = field(default_factory=IntensityConfig)
    strengths_stddev: float = 0.0
    outcomes_stddev: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.midpoint <= 1:
            raise InvalidConfig(f"midpoint must be in [0, 1], not {self.midpoint}")
        if self.bins < 1 or self.levels < 2:
            raise InvalidConfig("bins must be ≥ 1 and levels ≥ 2")
        if not 0 < self.spread < math.inf:
            raise InvalidConfig(f"spread must be positive and finite, not {self.spread}")
        for name in ("shrink", "strengths_stddev", "outcomes_stddev"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InvalidConfig(f"{name} must be finite and ≥ 0, not {getattr(self, name)}")


def split(mu: float, strengths_share: float = 0.3, outcomes_share: float = 0.05) -> tuple[float, SumSpec, SumSpec]:
    """μ that is left for co-occurrence's sums, and the two sums after them, of a plan with Gaussian budget μ.

    Args:
        mu: infinite is no noise.
        strengths_share, outcomes_share: of μ²; chosen on the validation ratings of MovieLens-100K at ε = 8.
    """
    left = 1 - strengths_share - outcomes_share
    if not (mu > 0 and min(strengths_share, outcomes_share, left) > 0):
        raise InvalidConfig("mu must be positive, and the shares positive with a sum below 1")
    strengths, table = (
        SumSpec(name=name, rounds=1, clip_norm=1.0, noise_multiplier=1 / (mu * math.sqrt(share)))
        for name, share in (("strengths", strengths_share), ("outcomes", outcomes_share))
    )
    return mu * math.sqrt(left), strengths, table


def automatic(n_users: int, mu: float) -> tuple[StrengthsConfig, tuple[SumSpec, ...]]:
    """Settings and sums for so many people and a Gaussian budget μ; infinite μ is no noise. It reads public numbers."""
    left, strengths, table = split(mu)
    start, before = cooccurrence.automatic(n_users, left)
    config = StrengthsConfig(
        start=start, strengths_stddev=strengths.noise_multiplier, outcomes_stddev=table.noise_multiplier
    )
    return config, (*before, strengths, table)


class Strengths(Continued):
    """Co-occurrence's rounds, then one for strengths and one for outcomes."""

    name = "strengths"

    def __init__(self, catalogue: Catalogue, config: StrengthsConfig) -> None:
        super().__init__(catalogue, config.start)
        self.config = config

    def shapes(self, state: State) -> Shapes:
        match self._asked(state):
            case "strengths":
                return {"strengths": (len(state["head"]), 2)}
            case "outcomes":
                return {"outcomes": (self.config.bins, self.config.levels)}
        return self.start.shapes(state)

    def _asked(self, state: State) -> str:
        begun = "vectors" in state and ("leave" in state or self.config.start.transitions is None)
        return "start" if not begun else "strengths" if "terms" not in state else "outcomes"

    def _contribution(self, state: State, history: History, streams: Streams) -> Arrays:
        heard = sound(history.strengths)
        if not heard.all():
            history = History(history.items[heard], history.times[heard], history.strengths[heard])
        match self._asked(state):
            case "strengths":
                return {"strengths": self._strengths(state, history)}
            case "outcomes":
                return {"outcomes": self._outcomes(state, history)}
        return self.start.contribution(state, history, streams)

    def _partial_sum(self, state: State, histories: Interactions, clip: Clip, randoms: Randoms) -> Arrays:
        if self._asked(state) == "start":  # which runs its people together
            heard = sound(histories.strengths)
            return self.start.partial_sum(state, histories if heard.all() else histories.keep(heard), clip, randoms)
        return super()._partial_sum(state, histories, clip, randoms)

    def apply(self, state: State, noisy_sum: Arrays, divisor: float) -> State:
        if "outcomes" in noisy_sum:
            return {**state, "outcomes": noisy_sum["outcomes"].astype(np.float32)}
        if "strengths" in noisy_sum:
            return {**state, **self._terms(state, noisy_sum["strengths"].astype(np.float64))}
        return self.start.apply(state, noisy_sum, divisor)

    def item_terms(self, state: State) -> ItemTerms:
        """What devices know of items' strengths; flat at the midpoint before that round."""
        if "terms" not in state:
            return ItemTerms.flat(self.config.midpoint, len(self.catalogue))
        return ItemTerms(float(state["mean"]), state["terms"], state["variances"])

    def calibration(self, state: State) -> Calibration:
        """What devices know of scores; nothing before that round, and then a score stands for itself."""
        found = state.get("outcomes", np.zeros((self.config.bins, self.config.levels)))
        return Calibration(found, self.config.outcomes_stddev, self.config.model.scatter)

    def correction(self, state: State) -> Correction | None:
        """What devices add to the linear expectation; nothing, as this learner trains no network."""
        return None

    def _adopted(self, name: str, state: State, place: Int64) -> npt.NDArray[Any]:
        if name in ("mean", "outcomes"):
            return state[name]
        if name not in ("terms", "variances"):
            return super()._adopted(name, state, place)
        moved, known = newcomers.grown(state[name], place, len(self.catalogue))
        if name == "terms":
            return np.clip(newcomers.from_content(moved, known, self.content), -1, 1)
        return np.where(known, moved, np.float32(self.config.spread**2))

    def _strengths(self, state: State, history: History) -> Float32:
        """float32[K, 2]."""
        place = np.full(len(self.catalogue), -1, np.int64)
        place[state["head"]] = np.arange(len(state["head"]))
        own, at = np.unique(place[history.items[::-1]], return_index=True)  # each at its latest
        inside = own >= 0
        apart = 2 * (history.strengths[::-1][at[inside]].astype(np.float64) - self.config.midpoint)
        out = np.zeros((len(state["head"]), 2), np.float32)
        out[own[inside]] = _unit(np.stack([np.ones_like(apart), apart], axis=1))
        return out

    def _intensities(self, state: State, history: History) -> Intensities:
        side, terms = self.item_side(state), self.item_terms(state)
        return Intensities(side, terms, history.items, history.strengths, self.config.model, self.correction(state))

    def _outcomes(self, state: State, history: History) -> Float32:
        """float32[bins, levels]."""
        person = self._intensities(state, history)
        return _unit(outcomes(person.own().mean, history.strengths, self.config.bins, self.config.levels))

    def _terms(self, state: State, total: Float64) -> dict[str, npt.NDArray[Any]]:
        config, counts = self.config, np.maximum(total[:, 0], 0.0)
        whole = float(total[:, 0].sum())
        enough = whole > config.strengths_stddev * math.sqrt(len(total))
        offset = 0.5 * float(total[:, 1].sum()) / whole if enough and whole > 0 else 0.0
        mean = min(1.0, max(0.0, config.midpoint + offset))
        offset = mean - config.midpoint
        noise = config.strengths_stddev**2 * (0.25 + offset**2) / config.spread**2
        kept = counts**2 / np.maximum(counts**2 + config.shrink * counts + noise, 1e-12)
        apart = (0.5 * total[:, 1] - offset * total[:, 0]) / np.maximum(counts, 1e-6)  # kept is 0 where counts are
        features = np.hstack([self.content.astype(np.float64), np.ones((len(self.catalogue), 1))])
        head, own = state["head"], features[state["head"]]
        pull = newcomers.RIDGE * np.eye(own.shape[1])
        terms = features @ np.linalg.solve((own.T * kept) @ own + pull, own.T @ (kept * apart))
        terms[head] += kept * (apart - terms[head])
        variances = np.full(len(terms), config.spread**2)
        variances[head] *= 1 - kept
        return {
            "mean": np.array(mean, np.float32),
            "terms": np.clip(terms, -1, 1).astype(np.float32),
            "variances": variances.astype(np.float32),
        }


def _unit(values: Float64) -> Float32:
    """The values scaled to a length of 1, and never above it in float32; zeros stay."""
    length = float(np.linalg.norm(values))
    scaled: Float32 = (values / (length * (1 + 1e-7)) if length else values).astype(np.float32)
    return scaled


def sound(strengths: Float32) -> Bool:
    """bool[n], which are in [0, 1]; a NaN is not."""
    return np.asarray((strengths >= 0) & (strengths <= 1), np.bool_)
