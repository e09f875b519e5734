"""Item vectors from one noised sum of who-goes-with-what, and no training rounds.

Round 1 asks for item counts, to publish a list of head items; round 2 for pairs of head items that stand close together
in a history. Each device sends a vector of length 1, so the clip at C = 1 never bites an honest one:

    counts   1/√n at each of its n different items
    matrix   over its ordered head items: the q distinct unordered pairs at most w apart, and each item with itself,
             1/√q at each; the K(K+1)/2 unique entries of a symmetric K×K matrix are all that is sent or noised

S = Σ + noise, mirrored. Its noise eigenvalues fill [−t, t] with t = 2 σ √K (Wigner), so the k largest above t are kept
and shrunk, l → l − t²/l; F = Q√l, beside g × public features. The rest is `taste.py`, on the device.

Privacy: adding or removing a person moves each sum by at most 1, so with σ_counts = 1/(μ√s) and σ_matrix = 1/(μ√(1−s))
the two together are exactly μ-GDP (`split`); K, w, k and s are public beforehand.

Sources: Dong et al. 2019, https://arxiv.org/abs/1905.02383 (composition); Benaych-Georges and Nadakuditi 2012,
https://arxiv.org/abs/0910.2120 (shrinking a spiked Wigner matrix: the signal θ behind l = θ + t²/(4θ) is near
l − t²/(4l) and the overlap of its vector is 1 − t²/(4θ²); l − t²/l discounts for both).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from penchant.common import taste
from penchant.common.arrays import Arrays, Float32, Int32, Int64
from penchant.common.catalogue import Catalogue
from penchant.common.errors import InvalidConfig
from penchant.common.interactions import History, Interactions
from penchant.common.learners import newcomers
from penchant.common.learners.contract import Learner, Randoms, State
from penchant.common.privacy.plan import SumSpec
from penchant.common.privacy.sums import Clip, Shapes
from penchant.common.streams import Streams
from penchant.common.taste import TasteConfig


@dataclass(frozen=True, kw_only=True)
class CooccurrenceConfig:
    """Public settings, fixed before anybody takes part.

    Attributes:
        head: K, items that get a vector from the sum; ≥ 2.
        window: w, how far apart two items may stand.
        dims: k, most eigenvectors kept.
        content: g ≥ 0, weight of the public features.
        noise_stddev: of the matrix sum, known from the plan; it sets t. 0 without noise.
        taste: settings of the user side.
    """

    head: int = 800
    window: int = 20
    dims: int = 16
    content: float = 0.5
    noise_stddev: float = 0.0
    taste: TasteConfig = field(default_factory=lambda: TasteConfig(decay=0.8, popularity=0.1))

    def __post_init__(self) -> None:
        if self.head < 2 or self.window < 1 or self.dims < 1:
            raise InvalidConfig("head must be ≥ 2, window and dims ≥ 1")
        if not (self.content >= 0 and 0 <= self.noise_stddev < math.inf):
            raise InvalidConfig("content and noise_stddev must be finite and ≥ 0")


def split(mu: float, counts_share: float = 0.1) -> tuple[SumSpec, SumSpec]:
    """The two sums of a plan with Gaussian budget μ: `counts_share` of μ² for the counts, the rest for the matrix."""
    if not (0.0 < mu < math.inf and 0.0 < counts_share < 1.0):
        raise InvalidConfig("mu must be positive and finite and counts_share in (0, 1)")
    counts, matrix = 1 / (mu * math.sqrt(counts_share)), 1 / (mu * math.sqrt(1 - counts_share))
    return (
        SumSpec(name="counts", rounds=1, clip_norm=1.0, noise_multiplier=counts),
        SumSpec(name="matrix", rounds=1, clip_norm=1.0, noise_multiplier=matrix),
    )


class Cooccurrence(Learner):
    """Two rounds: counts, then the matrix."""

    name = "cooccurrence"

    def __init__(self, catalogue: Catalogue, config: CooccurrenceConfig) -> None:
        super().__init__(catalogue)
        self.config = config
        self.head = min(config.head, len(catalogue))

    def init(self, streams: Streams) -> State:
        return {"popularity": np.zeros(len(self.catalogue), np.float32)}

    def shapes(self, state: State) -> Shapes:
        if "head" not in state:
            return {"counts": (len(self.catalogue),)}
        return {"matrix": (self.head * (self.head + 1) // 2,)}

    def _contribution(self, state: State, history: History, random: np.random.Generator) -> Arrays:
        ((name, (size,)),) = self.shapes(state).items()
        out = np.zeros(size, np.float32)
        at = self._entries(state, history)
        out[at] = self._values(len(at))
        return {name: out}

    def _partial_sum(self, state: State, histories: Interactions, clip: Clip, randoms: Randoms) -> Arrays:
        ((name, (size,)),) = self.shapes(state).items()
        total = np.zeros(size, np.float64)
        for history in histories:
            at = self._entries(state, history)
            total[at] += clip({name: self._values(len(at))})[name]  # what is not zero has the vector's norm
        return {name: total}

    def apply(self, state: State, noisy_sum: Arrays, divisor: float) -> State:
        if "counts" in noisy_sum:
            counts = noisy_sum["counts"]
            head = np.sort(np.argsort(-counts, kind="stable")[: self.head]).astype(np.int32)
            top = float(counts.max())
            popularity = np.clip(counts / top, 0, 1) if top > 0 else np.zeros_like(counts)
            return {"popularity": popularity.astype(np.float32), "head": head}
        upper = noisy_sum["matrix"]
        return {**state, "vectors": self._factors(state["head"], upper)}

    def _scores(self, state: State, histories: Interactions) -> Float32:
        content = np.float32(self.config.content) * self.catalogue.content
        vectors = np.hstack([state["vectors"], content]) if "vectors" in state else content
        return taste.scores(vectors, state["popularity"], histories, self.config.taste)

    def _adopted(self, name: str, values: npt.NDArray[Any], place: Int64) -> npt.NDArray[Any]:
        if name == "head":
            return np.sort(place[values]).astype(np.int32)
        moved, known = newcomers.grown(values, place, len(self.catalogue))
        return moved if name == "popularity" else newcomers.from_content(moved, known, self.catalogue.content)

    @staticmethod
    def _values(n: int) -> Float32:
        """n equal values with an L2 norm of 1."""
        return np.full(n, 1 / math.sqrt(max(n, 1)), np.float32)

    def _entries(self, state: State, history: History) -> Int64:
        """Where this person's vector is not zero: positions in the sum that the state asks for, each once."""
        if "head" not in state:
            return np.unique(history.items).astype(np.int64)
        place = np.full(len(self.catalogue), -1, np.int64)
        place[state["head"]] = np.arange(len(state["head"]))
        return pair_entries(place[history.items], self.config.window, self.head)

    def _factors(self, head: Int32, upper: Float32) -> Float32:
        """float32[n_items, k]: Q√l of the kept eigenvalues; items outside the head have zeros."""
        matrix = np.zeros((self.head, self.head))
        matrix[np.triu_indices(self.head)] = upper
        matrix += np.triu(matrix, 1).T
        values, basis = np.linalg.eigh(matrix)
        values, basis = values[::-1][: self.config.dims], basis[:, ::-1][:, : self.config.dims]
        edge = 2 * self.config.noise_stddev * math.sqrt(self.head)
        kept = values > max(edge, 1e-9)
        values, basis = values[kept], basis[:, kept]
        factors = np.zeros((len(self.catalogue), len(values)), np.float32)
        factors[head] = basis * np.sqrt(values - edge**2 / values)
        return factors


def pair_entries(places: Int64, window: int, head: int) -> Int64:
    """Positions in the upper triangle (row by row) of the distinct unordered pairs at most `window` apart.

    Args:
        places: int64[n], place of each item in the head, oldest first; negative where it is not in the head, and then
            it takes no room in the window either.

    >>> pair_entries(np.array([0, 2, -1, 0]), window=1, head=3).tolist()  # (0,0) (0,2) (2,2)
    [0, 2, 5]
    """
    own = places[places >= 0]
    pairs = [own * head + own]
    for gap in range(1, min(window, len(own) - 1) + 1):
        a, b = own[:-gap], own[gap:]
        pairs.append(np.minimum(a, b) * head + np.maximum(a, b))
    flat = np.unique(np.concatenate(pairs))
    i, j = flat // head, flat % head
    entries: Int64 = i * head - i * (i - 1) // 2 + (j - i)
    return entries
