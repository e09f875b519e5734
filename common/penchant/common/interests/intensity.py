"""How strong a person's interest in an item is: expected strength in [0, 1], how unsure it is, and its calibration.

    y = μ + b_item + b_person + fᵀw + e,    b_person ~ N(0, τ²),  w ~ N(0, diag τ_f²),  e ~ N(0, s²)
    x = (τ, τ_f f),   A = XᵀX + s²I,   mean = μ + b_item + xᵀA⁻¹Xᵀ(y − μ − b_item),   variance = s² xᵀA⁻¹x + var b_item

μ, b_item and its variance come from one private sum (`learners/strengths.py`) and f are released vectors; the rest is
the person's own and stays on the device. One item speaks of another through xᵀx': it is a Gaussian process with that
kernel. Each own item as the others predict it is exact and free: with h = xᵀA⁻¹x and the m events of that item left
out, which all have the same row x (Cook's identity, m times),

    w₋ = w − A⁻¹x Σ(y − ŷ) / (1 − m h),    xᵀA₋⁻¹x = h / (1 − m h)

Without vectors (τ_f = 0) it is the rating model μ + b_person + b_item.

A `Correction`, where there is one, is added to the mean: what a small released network makes of the parts above and of
the item's content. Its own error is in no variance.

Calibration: counts of (score bin × strength level) say what strength was met where such a score was given; shrunk by
how little was counted, then isotonic regression over the bins. The counts are one private sum, or the device's own for
a long history.

Sources: Bishop 2006, Pattern Recognition and Machine Learning, section 3.3; Koren, Bell and Volinsky 2009, "Matrix
factorization techniques for recommender systems" (μ + b_u + b_i); Zadrozny and Elkan 2002, "Transforming classifier
scores into accurate multiclass probability estimates" (isotonic calibration); Robertson, Wright and Dykstra 1988,
Order Restricted Statistical Inference, section 1.2 (pool adjacent violators).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from penchant.common.arrays import AnyFloat, Float32, Float64, Int32, Int64
from penchant.common.errors import InvalidConfig
from penchant.common.interests.correction import UNIT, Correction
from penchant.common.interests.profile import InterestProfile
from penchant.common.taste import ItemSide

Positions = Int32 | Int64 | list[int]


@dataclass(frozen=True, kw_only=True)
class IntensityConfig:
    """Public settings, in units of strength; chosen on the validation ratings of MovieLens-100K.

    Attributes:
        person: τ ≥ 0, stddev of how far one person's strengths lie from another's.
        learned, content: τ_f ≥ 0, stddev of what a learned and a public column of the vectors is worth to a person.
        scatter: s > 0, stddev of one event's strength about its expectation.
    """

    person: float = 0.12
    learned: float = 0.1
    content: float = 0.1
    scatter: float = 0.24

    def __post_init__(self) -> None:
        for name in ("person", "learned", "content"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InvalidConfig(f"{name} must be finite and ≥ 0, not {getattr(self, name)}")
        if not 0 < self.scatter < math.inf:
            raise InvalidConfig(f"scatter must be positive and finite, not {self.scatter}")


RATING_MODEL = IntensityConfig(learned=0.0, content=0.0)
"""μ + b_person + b_item: no item speaks of another."""


@dataclass(frozen=True)
class ItemTerms:
    """What was released of items' strengths.

    Attributes:
        mean: μ, in [0, 1].
        terms: b_item, float32[n_items].
        variances: of the terms, float32[n_items].
    """

    mean: float
    terms: Float32
    variances: Float32

    @classmethod
    def flat(cls, mean: float, n_items: int) -> ItemTerms:
        """Where nothing is known of the items: with it and `RATING_MODEL` a person's own mean is all there is."""
        return cls(mean, np.zeros(n_items, np.float32), np.zeros(n_items, np.float32))


@dataclass(frozen=True)
class Intensity:
    """How strong the interest in each of n items is.

    Attributes:
        mean: expected strength, float64[n] in [0, 1].
        stddev: of that expectation, float64[n]: what is not known yet of this person and item.
        scatter: s, by which one event strays from its expectation besides.
    """

    mean: Float64
    stddev: Float64
    scatter: float

    def at_least(self, strength: float) -> Float64:
        """float64[n], probability that an event is at least so strong; for levels, give the middle below the level."""
        apart = (self.mean - strength) / np.sqrt(2 * (self.stddev**2 + self.scatter**2))
        return np.array([0.5 * (1 + math.erf(z)) for z in apart.tolist()])


@dataclass(frozen=True)
class _Linear:
    """What the linear model says of n items.

    Attributes:
        parts: float64[n, 3], of the expectation: the person's, by learned and by public columns.
        mean: float64[n], the expectation, not cut to [0, 1].
        stddev: float64[n], of the parts' sum.
        n: int64[n], how many events that is from.
    """

    items: Int64
    parts: Float64
    mean: Float64
    stddev: Float64
    n: Int64


class Intensities:
    """One person's intensities.

    Args:
        side: what was released; its vectors are read.
        terms: what was released of strengths.
        items: int[n], positions in the catalogue of what the person had.
        strengths: float[n] in [0, 1].
        correction: a released network to add; None is the linear model.

    Raises:
        InvalidConfig: sizes disagree, or a strength is outside [0, 1].
    """

    def __init__(
        self,
        side: ItemSide,
        terms: ItemTerms,
        items: Positions,
        strengths: AnyFloat | list[float],
        config: IntensityConfig | None = None,
        correction: Correction | None = None,
    ) -> None:
        self.side, self.terms, self.config, self.correction = side, terms, config or IntensityConfig(), correction
        own = self._own = np.asarray(items, np.int64)
        self._strengths = np.asarray(strengths, np.float64)
        if own.shape != self._strengths.shape or len(terms.terms) != len(side.vectors):
            raise InvalidConfig("items and strengths must be equally many, and the item terms those of the release")
        if not ((self._strengths >= 0) & (self._strengths <= 1)).all():  # also refuses NaN
            raise InvalidConfig("strengths must be in [0, 1]")
        learned = side.vectors.shape[1] - side.content
        widths = (1, learned, side.content)
        scale = np.repeat([self.config.person, self.config.learned, self.config.content], widths)
        self._kept = scale[1:] > 0  # a column of weight 0 says nothing
        used = np.concatenate([[True], self._kept])
        self._scale, self._parts = scale[used], np.repeat(np.eye(3), widths, axis=0)[used]
        self._expected = terms.mean + terms.terms[own].astype(np.float64)
        self._x = self._rows(own)
        inner = self._x.T @ self._x + self.config.scatter**2 * np.eye(self._x.shape[1])
        self._inverse = np.asarray(np.linalg.inv(inner), np.float64)
        self._w = self._inverse @ (self._x.T @ (self._strengths - self._expected))

    @classmethod
    def of(
        cls,
        profile: InterestProfile,
        terms: ItemTerms,
        config: IntensityConfig | None = None,
        correction: Correction | None = None,
    ) -> Intensities:
        """From a profile's own history."""
        return cls(profile.side, terms, profile.items, profile.strengths, config, correction)

    def at(self, items: Positions) -> Intensity:
        """Of these items."""
        return self._read(self._from_all(np.asarray(items, np.int64)))

    def own(self) -> Intensity:
        """Of each interaction of the history, as those with all other items predict it: `at` without a refit.

        What calibration needs: a new item has no events of its own either.
        """
        return self._read(self._from_others())

    def examples(self) -> tuple[Float64, Float64]:
        """What a correction is trained on, of each interaction of the history as those with all other items predict it.

        Returns:
            float64[n, KNOWN], what is known of it, and float64[n], what the linear expectation is off by.
        """
        found = self._from_others()
        return self._known(found), self._strengths - found.mean

    def _from_all(self, items: Int64) -> _Linear:
        x = self._rows(items)
        n = np.full(len(items), len(self._own))
        return self._linear(items, x, np.broadcast_to(self._w, x.shape), self._leverage(x), n)

    def _from_others(self) -> _Linear:
        x, h = self._x, self._leverage(self._x)
        _, item, many = np.unique(self._own, return_inverse=True, return_counts=True)
        many = many[item]
        apart = np.bincount(item, self._strengths - self._expected - x @ self._w)[item]
        rest = 1 - many * h
        w = self._w - (x @ self._inverse) * (apart / rest)[:, None]
        return self._linear(self._own, x, w, h / rest, len(self._own) - many)

    def _linear(self, items: Int64, x: Float64, w: Float64, leverage: Float64, n: Int64) -> _Linear:
        parts = (x * w) @ self._parts
        mean = self.terms.mean + self.terms.terms[items].astype(np.float64) + parts.sum(axis=1)
        return _Linear(items, parts, mean, self.config.scatter * np.sqrt(leverage), n)

    def _read(self, found: _Linear) -> Intensity:
        mean = (
            found.mean if self.correction is None else found.mean + self.correction.at(found.items, self._known(found))
        )
        stddev = np.sqrt(found.stddev**2 + self.terms.variances[found.items])
        return Intensity(np.clip(mean, 0, 1), stddev, self.config.scatter)

    def _known(self, found: _Linear) -> Float64:
        """float64[n, KNOWN]."""
        terms, variances = self.terms.terms[found.items], self.terms.variances[found.items]
        strengths = np.column_stack([terms, found.parts, found.stddev, np.sqrt(variances)]) / UNIT
        return np.asarray(np.column_stack([strengths, np.log1p(found.n) / 6]), np.float64)

    def _rows(self, items: Int64) -> Float64:
        """float64[n, 1 + columns in use], x of each item."""
        vectors = self.side.vectors[items][:, self._kept].astype(np.float64)
        rows: Float64 = np.hstack([np.ones((len(items), 1)), vectors]) * self._scale
        return rows

    def _leverage(self, x: Float64) -> Float64:
        """float64[n], xᵀA⁻¹x of each row; below 1 for a row of the history."""
        return np.asarray(np.maximum(((x @ self._inverse) * x).sum(axis=1), 0.0), np.float64)


def probability(strength: AnyFloat, *, steepness: float = 8.0, boundary: float = 0.625) -> Float64:
    """σ(λ (r̂ − boundary)): probability of interest from an expected strength alone, with no variance and no counts.

    Args:
        strength: r̂, float[n] in [0, 1].
        steepness: λ > 0; public. Of 4.5, 5.5, 6.5 and 8, the best calibrated on validation ratings of MovieLens-100K.
        boundary: strength at which interest is as likely as not; public. Midway between 3 and 4 of 5 stars.
    """
    return np.asarray(1 / (1 + np.exp(-steepness * (np.asarray(strength, np.float64) - boundary))), np.float64)


def outcomes(scores: AnyFloat, strengths: AnyFloat, n_bins: int, n_levels: int) -> Float64:
    """float64[n_bins, n_levels], how often each strength was met where each score was given.

    Bins cut [0, 1] evenly and levels are evenly spaced from 0 to 1; a strength between two levels is shared by both, so
    that the table keeps its mean.

    >>> outcomes(np.array([0.1, 0.9, 1.0]), np.array([0.0, 0.75, 1.0]), 2, 3).tolist()
    [[1.0, 0.0, 0.0], [0.0, 0.5, 1.5]]
    """
    table = np.zeros((n_bins, n_levels))
    row = np.minimum((np.asarray(scores, np.float64) * n_bins).astype(np.int64), n_bins - 1)
    place = np.asarray(strengths, np.float64) * (n_levels - 1)
    low = np.minimum(place.astype(np.int64), n_levels - 2)
    np.add.at(table, (row, low), 1 - (place - low))
    np.add.at(table, (row, low + 1), place - low)
    return table


def increasing(values: AnyFloat, weights: AnyFloat) -> Float64:
    """float64[n], the nearest sequence that nowhere decreases, by weighted squares (pool adjacent violators).

    >>> increasing(np.array([1.0, 3.0, 2.0, 2.0, 4.0]), np.array([1.0, 1.0, 1.0, 2.0, 1.0])).tolist()
    [1.0, 2.25, 2.25, 2.25, 4.0]
    """
    blocks: list[tuple[float, float, int]] = []  # mean, weight, how many
    for value, weight in zip(values.tolist(), weights.tolist(), strict=True):
        n = 1
        while blocks and blocks[-1][0] >= value:
            before, heavy, many = blocks.pop()
            value = (before * heavy + value * weight) / (heavy + weight)
            weight, n = weight + heavy, n + many
        blocks.append((value, weight, n))
    return np.repeat([mean for mean, _, _ in blocks], [n for _, _, n in blocks])


@dataclass(frozen=True)
class Calibration:
    """What strengths are met at each score.

    Of a bin with m counted, noise of stddev σ in each cell and mean worth v (a strength, or 1 where it is high enough):

        value = prior + g (v − prior),    g = t² / (t² + s²/m + σ² Σ(worth − v)²/m²),    and g = 0 where m ≤ 0

    so that few counts or much noise leave what was said before. Then isotonic over bins with weights g, and linear
    in between.

    Attributes:
        table: float[n_bins, n_levels], as `outcomes` counts, summed over people or events, and perhaps noised.
        stddev: σ, of the noise in each cell.
        scatter: s, stddev of one event's strength about its expectation.
        trust: t > 0, how far off a score is thought to be before anything is counted; chosen on validation ratings of
            MovieLens-100K.
        prior: another calibration to fall back on; a score itself, scattered normally, if None.
    """

    table: AnyFloat
    stddev: float = 0.0
    scatter: float = 0.24
    trust: float = 0.06
    prior: Calibration | None = None
    levels: Float64 = field(init=False)

    def __post_init__(self) -> None:
        if self.table.ndim != 2 or self.table.shape[0] < 1 or self.table.shape[1] < 2:
            raise InvalidConfig(f"a table needs bins and at least two levels, not shape {self.table.shape}")
        if not (0 <= self.stddev < math.inf and 0 < self.scatter < math.inf and 0 < self.trust < math.inf):
            raise InvalidConfig("stddev must be ≥ 0, scatter and trust positive, all finite")
        object.__setattr__(self, "levels", np.linspace(0, 1, self.table.shape[1]))

    def strength(self, scores: AnyFloat) -> Float64:
        """float64[n] in [0, 1], the expected strength where such a score is given."""
        middles = self._middles()
        return self._read(scores, self.levels, self.prior.strength(middles) if self.prior else middles)

    def at_least(self, strength: float, scores: AnyFloat) -> Float64:
        """float64[n], probability of an event of at least this level."""
        middles = self._middles()
        if self.prior:
            before = self.prior.at_least(strength, middles)
        else:
            boundary = strength - 0.5 / (len(self.levels) - 1)  # half a level below
            before = Intensity(middles, np.zeros(len(middles)), self.scatter).at_least(boundary)
        return self._read(scores, (self.levels >= strength).astype(np.float64), before)

    def with_own(self, scores: AnyFloat, strengths: AnyFloat) -> Calibration:
        """The person's own events, with this one to fall back on.

        Args:
            scores: float[n], of own events as the others predict them (`Intensities.own`).
            strengths: float[n], what they were.
        """
        own = outcomes(scores, strengths, *self.table.shape)
        return Calibration(own, scatter=self.scatter, trust=self.trust, prior=self)

    def _middles(self) -> Float64:
        return np.asarray((np.arange(len(self.table)) + 0.5) / len(self.table), np.float64)

    def _read(self, scores: AnyFloat, worth: Float64, prior: Float64) -> Float64:
        mass = np.maximum(self.table.sum(axis=1, dtype=np.float64), 1e-9)
        met = np.clip((self.table @ worth) / mass, 0, 1)  # noise may leave it
        noise = self.stddev**2 * ((worth - met[:, None]) ** 2).sum(axis=1) / mass**2
        kept = self.trust**2 / (self.trust**2 + self.scatter**2 / mass + noise)
        values = increasing(prior + kept * (met - prior), np.maximum(kept, 1e-12))
        return np.asarray(np.interp(scores, self._middles(), values), np.float64)
