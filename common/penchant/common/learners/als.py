"""Item vectors by alternating least squares, from private sums of sufficient statistics, started from co-occurrence.

First the two sums of `cooccurrence.py`: counts, which choose the head, and the matrix, whose factors start the sweeps.
Each sweep then improves the item vectors v of the head. A device cuts its ordered head items, each at its latest, into
m stretches of at most L, and each stretch t has a taste of its own: interests drift. The objective is

    Σ_people s Σ_t [ Σ_{i∈t} wᵢ (1 − u_t·vᵢ)² + a Σ_{i∈head} (u_t·vᵢ)² + ρ‖u_t‖² ] + r Σᵢ ‖vᵢ‖²,   wᵢ = popularityᵢ^−e

with s a weight of the person that no taste depends on. Given v, a taste is exact; given u, so is an item:

    device   u_t = (a Σᵢ vᵢvᵢᵀ + Σ_{i∈t} wᵢ vᵢvᵢᵀ + ρI)⁻¹ Σ_{i∈t} wᵢvᵢ ,  then cut to ‖u_t‖ ≤ c
    server   vᵢ  = (Aᵢ + aG + rI)⁻¹ bᵢ ,   Aᵢ = Σ s wᵢ u uᵀ ,  bᵢ = Σ s wᵢ u ,  G = Σ s Σ_t u_t u_tᵀ

Sensitivity: with h(S) the upper triangle of S, what is off the diagonal times √2, ‖h(u uᵀ)‖ = ‖u‖². A device sends

    z = ( α s Σ_t h(u_t u_tᵀ)/c² ,  β s wᵢ h(u uᵀ)/c² at its items,  γ s wᵢ u/c at its items ),   α² + β² + γ² = 1

with s = min(1/√Σwᵢ², 1/m), so that the three parts are at most α, β and γ long and ‖z‖ ≤ 1, whatever the history. So
the clip at C = 1 never bites an honest device. (Σ(s wᵢ)² ≤ 1 is a person's budget over items; another bound B on it
would be a change of unit, which a and r undo.) One Gaussian σ on z is exactly one of σ/α, one of σ/β and one of σ/γ
on its parts, each over its own sensitivity, and costs the same μ² = 1/σ². The whole is μ-GDP when the shares of μ²
that counts, matrix and T sweeps take sum to 1 (`split`). The head and the weights wᵢ read noised counts only.

Shares: to first order a noisy vᵢ is off by (Aᵢ + aG + rI)⁻¹(δb − δAᵢvᵢ − a δG vᵢ). Released vectors have a mean squared
length of 1, so the variances are near σ²c²/γ², σ²c⁴/2β² and a²σ²c⁴/2α² a coordinate; their sum is least at
α² : β² : γ² = ac : c : √2.

Noise: Aᵢ and G are projected to the positive semidefinite cone, and r grows by the edge of the noise of Aᵢ, σc²√(2d)/β
(Wigner), and by the ridge that a prior of length 1 puts against the noise of bᵢ, σc√d/γ. An item of which the sums say
little gets a short vector.

Sources: Chien et al. 2021, https://arxiv.org/abs/2107.09802 (private ALS from noisy statistics); Krichene et
al. 2023, https://arxiv.org/abs/2302.07975 (weights of items that follow their noised counts);
Hu, Koren and Volinsky 2008, "Collaborative filtering for implicit feedback datasets" (the objective with s = wᵢ = 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from penchant.common.arrays import Arrays, Float32, Float64, Int64
from penchant.common.catalogue import Catalogue
from penchant.common.errors import InvalidConfig
from penchant.common.interactions import History, Interactions
from penchant.common.learners import newcomers
from penchant.common.learners.contract import Randoms, State
from penchant.common.learners.cooccurrence import Continued, CooccurrenceConfig
from penchant.common.privacy.plan import SumSpec
from penchant.common.privacy.sums import Clip, Shapes
from penchant.common.streams import Streams

RAREST = 0.01
"""An item's popularity counts as at least this: a noised count near zero or below must not have all the weight."""


@dataclass(frozen=True, kw_only=True)
class AlsConfig:
    """Public settings, fixed before anybody takes part.

    Attributes:
        start: of the two sums before the sweeps, and of the user side; its `dims` is the most that a sweep has.
        exponent: e ≥ 0, how much more a rare item weighs.
        stretch: L ≥ 1, items that share one taste of a person.
        clip: c > 0, L2 bound on a taste; item vectors have a mean squared length of 1.
        unseen: a > 0, weight of every head item as "not chosen".
        ridge, prior: r, ρ > 0, pull of items and of tastes towards zero.
        noise_stddev: of a sweep's sum, known from the plan. 0 without noise.
    """

    start: CooccurrenceConfig = field(default_factory=CooccurrenceConfig)
    exponent: float = 0.25
    stretch: int = 20
    clip: float = 0.6
    unseen: float = 0.1
    ridge: float = 1.0
    prior: float = 0.1
    noise_stddev: float = 0.0

    def __post_init__(self) -> None:
        if self.stretch < 1:
            raise InvalidConfig(f"stretch must be ≥ 1, not {self.stretch}")
        for name in ("clip", "unseen", "ridge", "prior"):
            if not 0 < getattr(self, name) < math.inf:  # also refuses NaN
                raise InvalidConfig(f"{name} must be positive and finite, not {getattr(self, name)}")
        for name in ("exponent", "noise_stddev"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InvalidConfig(f"{name} must be finite and ≥ 0, not {getattr(self, name)}")


def split(
    mu: float, sweeps: int, counts_share: float = 0.05, matrix_share: float = 0.35
) -> tuple[SumSpec, SumSpec, SumSpec]:
    """The sums of a plan with Gaussian budget μ: shares of μ² for counts and matrix, the rest for all sweeps."""
    shares = (counts_share, matrix_share, 1 - counts_share - matrix_share)
    if not (0.0 < mu < math.inf and min(shares) > 0.0):  # also refuses NaN
        raise InvalidConfig("mu must be positive and finite, and shares positive with a sum below 1")
    if sweeps < 1:
        raise InvalidConfig(f"sweeps must be ≥ 1, not {sweeps}")
    counts, matrix, statistics = (
        SumSpec(name=name, rounds=rounds, clip_norm=1.0, noise_multiplier=1 / (mu * math.sqrt(share / rounds)))
        for name, rounds, share in zip(("counts", "matrix", "statistics"), (1, 1, sweeps), shares, strict=True)
    )
    return counts, matrix, statistics


def automatic(n_users: int, mu: float) -> tuple[AlsConfig, tuple[SumSpec, SumSpec, SumSpec]]:
    """Settings and sums for so many people and a Gaussian budget μ, ∞ for exact sums.

    What a sum can tell grows with its signal over its noise, n·μ: K = 10 √(n·μ) head items, d = √(n·μ)/6
    dimensions up to 16 (more take time and noise, and found no more), two sweeps from 9 000 on and three from 100 000
    on, all within bounds. Chosen on ML-100K and 6 000 synthetic people; it reads public numbers only.
    """
    signal = n_users * mu
    sweeps = 1 + (signal >= 9e3) + (signal >= 1e5)
    if math.isinf(mu):
        sums = split(1.0, sweeps)
        counts, matrix, statistics = (replace(spec, noise_multiplier=0.0) for spec in sums)
        head, dims = 2000, max(8, min(16, n_users // 16))
    else:
        counts, matrix, statistics = split(mu, sweeps)
        head, dims = max(50, min(1600, round(10 * math.sqrt(signal)))), max(8, min(16, round(math.sqrt(signal) / 6)))
    start = CooccurrenceConfig(
        head=head, dims=dims, counts_stddev=counts.noise_multiplier, noise_stddev=matrix.noise_multiplier
    )
    return AlsConfig(start=start, noise_stddev=statistics.noise_multiplier), (counts, matrix, statistics)


class Als(Continued):
    """Counts, the matrix, then as many sweeps as the plan has rounds for."""

    name = "als"

    def __init__(self, catalogue: Catalogue, config: AlsConfig) -> None:
        super().__init__(catalogue, config.start)
        self.config = config
        parts = np.sqrt([config.unseen * config.clip, config.clip, math.sqrt(2)])
        self.parts: tuple[float, float, float] = tuple((parts / np.linalg.norm(parts)).tolist())
        """α, β and γ."""

    def shapes(self, state: State) -> Shapes:
        if "vectors" not in state:
            return self.start.shapes(state)
        d = state["vectors"].shape[1]
        triangle = d * (d + 1) // 2
        return {"gram": (triangle,), "items": (len(state["head"]), triangle + d)}

    def _contribution(self, state: State, history: History, streams: Streams) -> Arrays:
        if "vectors" not in state:
            return self.start.contribution(state, history, streams)
        places, gram, rows = self._device(state)(history)
        items = np.zeros(self.shapes(state)["items"], np.float32)
        items[places] = rows
        return {"gram": gram, "items": items}

    def _partial_sum(self, state: State, histories: Interactions, clip: Clip, randoms: Randoms) -> Arrays:
        if "vectors" not in state:
            return self.start.partial_sum(state, histories, clip, randoms)
        total = {name: np.zeros(shape, np.float64) for name, shape in self.shapes(state).items()}
        person = self._device(state)
        for history in histories:
            places, gram, rows = person(history)
            part = clip({"gram": gram, "items": rows})  # what is not zero has the vector's norm
            total["gram"] += part["gram"]
            total["items"][places] += part["items"]
        return total

    def apply(self, state: State, noisy_sum: Arrays, divisor: float) -> State:
        if "gram" not in noisy_sum:
            after = self.start.apply(state, noisy_sum, divisor)
            if "vectors" not in after:
                return after
            vectors = after["vectors"][after["head"]]
            if not vectors.shape[1]:  # nothing stood out of the noise: the first direction is popularity's
                vectors = np.ones((len(vectors), 1), np.float32)
            return {**after, "vectors": self._everywhere(vectors, after["head"])}
        return {**state, "vectors": self._everywhere(self._solved(noisy_sum), state["head"])}

    def _device(self, state: State) -> Callable[[History], tuple[Int64, Float32, Float32]]:
        """How a device with this state answers: places int64[n] in the head, gram float32[T], rows float32[n, T + d].

        T = d(d+1)/2. No other row of "items" is anything but zero.
        """
        config, head, (alpha, beta, gamma) = self.config, state["head"], self.parts
        vectors = state["vectors"][head].astype(np.float64)
        weights = np.clip(state["popularity"][head].astype(np.float64), RAREST, 1.0) ** -config.exponent
        place = np.full(len(self.catalogue), -1, np.int64)
        place[head] = np.arange(len(head))
        d = vectors.shape[1]
        base = config.unseen * (vectors.T @ vectors) + config.prior * np.eye(d)

        def person(history: History) -> tuple[Int64, Float32, Float32]:
            own = _latest(place[history.items])
            if not len(own):
                triangle = d * (d + 1) // 2
                return own, np.zeros(triangle, np.float32), np.zeros((0, triangle + d), np.float32)
            m = -(-len(own) // config.stretch)
            stretch = np.arange(len(own)) * m // len(own)
            first = np.searchsorted(stretch, np.arange(m))
            weight, v = weights[own], vectors[own]
            weighted = weight[:, None] * v
            seen = np.add.reduceat(weighted[:, :, None] * v[:, None, :], first, axis=0)
            tastes = np.linalg.solve(base + seen, np.add.reduceat(weighted, first, axis=0)[:, :, None])[:, :, 0]
            tastes /= np.maximum(config.clip, np.linalg.norm(tastes, axis=1))[:, None]  # u/c, of length ≤ 1
            squares = upper(tastes[:, :, None] * tastes[:, None, :])
            scale = min(1 / float(np.linalg.norm(weight)), 1 / m)
            gram = alpha * scale * squares.sum(axis=0)
            rows = (scale * weight)[:, None] * np.hstack([beta * squares, gamma * tastes])[stretch]
            return own, gram.astype(np.float32), rows.astype(np.float32)

        return person

    def _solved(self, noisy_sum: Arrays) -> Float64:
        """float64[K, d], the head's vectors that fit a sweep's statistics."""
        (alpha, beta, gamma), c, stddev = self.parts, self.config.clip, self.config.noise_stddev
        gram, items = (noisy_sum[name].astype(np.float64) for name in ("gram", "items"))
        triangle = len(gram)
        d = items.shape[1] - triangle
        ridge = self.config.ridge + stddev * (c**2 * math.sqrt(2 * d) / beta + c * math.sqrt(d) / gamma)
        every = self.config.unseen * c**2 / alpha * positive(symmetric(gram, d)) + ridge * np.eye(d)
        own = c**2 / beta * positive(symmetric(items[:, :triangle], d))
        return np.linalg.solve(own + every, c / gamma * items[:, triangle:, None])[:, :, 0].astype(np.float64)

    def _everywhere(self, vectors: Float32 | Float64, head: npt.NDArray[Any]) -> Float32:
        """float32[n_items, d]: the head's, scaled to a mean squared length of 1, and the others' by their content."""
        wide = vectors.astype(np.float64)
        length = math.sqrt(float((wide * wide).sum()) / len(wide))
        out, known = newcomers.grown((wide / (length or 1.0)).astype(np.float32), head, len(self.catalogue))
        return newcomers.from_content(out, known, self.content)


def upper(matrices: Float64) -> Float64:
    """float64[…, d(d+1)/2] of symmetric float64[…, d, d]: the upper triangle row by row, off the diagonal times √2.

    Guarantees:
        The result's L2 norm is the matrix's Frobenius norm; for u uᵀ, ‖u‖².

    >>> upper(np.array([[1.0, 2.0], [2.0, 5.0]])).round(3).tolist()
    [1.0, 2.828, 5.0]
    """
    i, j = np.triu_indices(matrices.shape[-1])
    out: Float64 = matrices[..., i, j] * np.where(i == j, 1.0, math.sqrt(2))
    return out


def symmetric(triangles: Float64, d: int) -> Float64:
    """float64[…, d, d], the matrices of which `upper` made these."""
    i, j = np.triu_indices(d)
    out = np.zeros((*triangles.shape[:-1], d, d))
    out[..., i, j] = out[..., j, i] = triangles / np.where(i == j, 1.0, math.sqrt(2))
    return out


def positive(matrices: Float64) -> Float64:
    """The nearest positive semidefinite matrices, in the Frobenius norm: negative eigenvalues become zero."""
    values, basis = np.linalg.eigh(matrices)
    out: Float64 = (basis * np.maximum(values, 0.0)[..., None, :]) @ np.swapaxes(basis, -1, -2)
    return out


def _latest(places: Int64) -> Int64:
    """Each different place ≥ 0 once, at its latest, oldest first.

    >>> _latest(np.array([3, -1, 0, 3, 2])).tolist()
    [0, 3, 2]
    """
    newest_first = places[places >= 0][::-1]
    _, at = np.unique(newest_first, return_index=True)
    out: Int64 = newest_first[np.sort(at)][::-1]
    return out
