"""Turns one round's contributions into one private sum.

A round releases  Σᵢ clip(cᵢ, C) + N(0, (σC)² I)  and divides by a fixed, public number only afterwards. The noise is
scaled to the sum's sensitivity C, so nothing here weights a contribution or divides by the number that arrived.
A contribution is a set of named arrays, clipped as one flat vector; a node's partial sum of n clipped contributions is
checked and clipped again to users(node)·C, with users(node) from its enrolment, never from its reply.

The sum is exact. Clipped values are cut to multiples of C/2²⁸ (a power of two, towards zero, so no norm grows), and of
those float64 adds 2²⁴ people's without rounding: one person moves the computed sum by what they contributed and nothing
else, in whichever order and through whichever nodes it came. A sum that rounds may move by far more than its terms
(Casacuberta et al. 2022, https://arxiv.org/abs/2207.10635).

Source: McMahan et al. 2018, https://arxiv.org/abs/1710.06963, section 2 and Algorithm 1 with the fixed-denominator
estimator and every user weight w_k = 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from penchant.common.arrays import AnyFloat, Arrays, Float32, Float64, Int64
from penchant.common.errors import InvalidConfig, MalformedContribution
from penchant.common.privacy.accounting import Neighbours
from penchant.common.privacy.events import Event
from penchant.common.privacy.ledger import Receipt
from penchant.common.privacy.noise import Noise
from penchant.common.privacy.plan import SumSpec

_BLOCK = 1 << 14  # numbers added at once: a block fits the cache
_Float = TypeVar("_Float", bound=np.floating[Any])
Shapes = Mapping[str, tuple[int, ...]]
"""What a contribution must look like: the shape of each named array."""
WITHIN = "clip/within"
"""Name of the number beside a contribution that a quantile clip asks for: +½ within C, else −½."""
SAFETY = 1 - 2.0**-22
"""What rounding to float32 can add to a norm is taken off first."""


def norm(contribution: Arrays) -> float:
    """The L2 norm of all arrays together, summed in float64.

    Raises:
        MalformedContribution: a NaN or an infinity, which no scaling can bound.
    """
    square = 0.0
    with np.errstate(over="ignore"):  # refused below
        for values in contribution.values():
            flat = np.asarray(values, np.float64).ravel()
            square += float(flat @ flat)
    if not math.isfinite(square):  # also when float64 overflows: 1e200² is not a norm
        raise MalformedContribution("contribution has a non-finite norm")
    return math.sqrt(square)


class Clip:
    """Clips one person's contribution at a time, all its arrays together, to an L2 norm of at most `bound`.

    Adding or removing a person moves a sum of what it returns by at most `bound`, replacing one by at most twice that.

    Args:
        bound: C > 0; infinite only where nothing is promised, and then nothing is cut.
        row_norm: L2 bound on each row (all under one index of an array's first axis), applied first.

    Attributes:
        n, within: contributions clipped so far, and those among them whose norm was within `bound` before.
        refused: those that no scaling can bound (a NaN, an infinity). Each counts as zeros: one person's must not take
            with it what others on the same node send, or it would move the sum by more than `bound`.

    Raises:
        InvalidConfig: a bound that is not positive.
    """

    def __init__(self, bound: float, row_norm: float | None = None) -> None:
        if not bound > 0 or (row_norm is not None and not row_norm > 0):  # also refuses NaN
            raise InvalidConfig(f"a clip's bounds must be positive, not {bound} and {row_norm}")
        self.bound, self.row_norm = bound, row_norm
        self.n = self.within = self.refused = 0

    def sensitivity(self, neighbours: Neighbours) -> float:
        """How far one person can move the sum, in L2."""
        return self.bound * (2.0 if neighbours == "replace" else 1.0)

    def __call__(self, contribution: Arrays) -> dict[str, Float32]:
        """The clipped contribution, or zeros of its shapes where it cannot be bounded.

        Guarantees:
            ‖result‖₂ ≤ bound, and every value is a multiple of `grid(bound)`.
        """
        self.n += 1
        try:
            return self._clipped(contribution)
        except MalformedContribution:
            self.refused += 1
            return {name: np.zeros(np.shape(values), np.float32) for name, values in contribution.items()}

    def count(self, n: int, *, within: int, refused: int) -> None:
        """Counts contributions that compiled code clipped as this does."""
        self.n, self.within, self.refused = self.n + n, self.within + within, self.refused + refused

    def repeated(self, values: Float32, times: Int64) -> Float32:
        """Clips many people at once, where each sends one array of few different values: what those values become.

        As `__call__` would make of each person's array, written out, but for the order in which its norm is summed.

        Args:
            values: float32[n, L], what each person sends.
            times: int64[n, L], at how many places of their array each value stands.

        Returns:
            float32[n, L], zeros for a person who cannot be bounded.

        Guarantees:
            √(Σ times · result²) ≤ bound for each person, and every value is a multiple of `grid(bound)`.
        """
        wide, slack = np.where(times > 0, values, np.float32(0)).astype(np.float64), 1.0
        if self.row_norm is not None:  # a row is one value
            wide, slack = wide * np.minimum(1.0, self.row_norm / np.maximum(np.abs(wide), 1e-300)), SAFETY
        with np.errstate(over="ignore", invalid="ignore"):
            length = np.sqrt((times * wide * wide).sum(axis=1))
            scale = np.where(length <= self.bound * slack, 1.0, self.bound * SAFETY / np.maximum(length, 1e-300))
            sound = np.isfinite(length) & (length * scale <= float(np.finfo(np.float32).max))
        self.n += len(values)
        self.refused += int((~sound).sum())
        self.within += int((np.isfinite(length) & (length <= self.bound)).sum())
        kept = np.where(sound[:, None], wide, 0.0) * np.where(sound, scale, 0.0)[:, None]
        return on_grid(kept.astype(np.float32), self.bound).astype(np.float32)

    def _clipped(self, contribution: Arrays) -> dict[str, Float32]:
        """The clipped contribution; one within the bound comes back unchanged but for the grid (and float32).

        Guarantees:
            ‖result‖₂ ≤ bound, and every value is a multiple of `grid(bound)`.

        Raises:
            MalformedContribution: a NaN, an infinity, or what is too large for float32 even within the bound.
        """
        length = norm(contribution)
        if self.row_norm is not None:
            contribution = _clip_rows(contribution, self.row_norm)
            length = norm(contribution)
        self.within += length <= self.bound
        exact = all(np.can_cast(np.asarray(v).dtype, np.float32) for v in contribution.values())
        within = length <= self.bound * (1.0 if exact else SAFETY)
        scale = 1.0 if within else self.bound * SAFETY / length
        if length * scale > float(np.finfo(np.float32).max):
            raise MalformedContribution("contribution is too large for float32")
        return {
            name: on_grid((np.asarray(v, np.float64) * scale).astype(np.float32), self.bound).astype(np.float32)
            for name, v in contribution.items()
        }


def clip(contribution: Arrays, bound: float) -> dict[str, Float32]:
    """One contribution clipped, as by `Clip`.

    Raises:
        MalformedContribution: a NaN, an infinity, or what is too large for float32 even within the bound.
    """
    return Clip(bound)._clipped(contribution)


def grid(bound: float) -> float:
    """What clipped values are multiples of: a power of two near C/2²⁸; 0, so nothing is cut, where C is infinite."""
    return math.ldexp(0.5, math.frexp(bound)[1] - 28) if bound < math.inf else 0.0


def on_grid(values: AnyFloat, bound: float) -> Float64:
    """Values cut towards zero to multiples of `grid(bound)`."""
    step, wide = grid(bound), np.asarray(values, np.float64)
    return np.trunc(wide / step) * step if step else wide


def check(contribution: Arrays, shapes: Shapes) -> None:
    """Refuses what is not exactly what the round asked for.

    Raises:
        MalformedContribution: other names, another shape, a type that is not floating point, or a value not finite.
    """
    if contribution.keys() != shapes.keys():
        raise MalformedContribution("contribution has other arrays than the round asks for")
    for name, shape in shapes.items():
        values = contribution[name]
        if values.shape != tuple(shape):
            raise MalformedContribution(f"{name}: shape is not the round's {tuple(shape)}")
        if not np.issubdtype(values.dtype, np.floating):
            raise MalformedContribution(f"{name}: values are not floating point")
        if not np.isfinite(values).all():
            raise MalformedContribution(f"{name}: a value is not finite")


class PrivateSum:
    """One round's sum: add partial sums one at a time, then release once.

    Its memory does not depend on who takes part.

    Args:
        shapes: of one contribution, as the learner gives them.
        spec: noise, clip and, with a quantile, the count beside them.
        clip_norm: C of this round, where it is not the spec's first.
        event: what the release is charged as, where that is known: a receipt of any other is refused.
    """

    def __init__(
        self, shapes: Shapes, spec: SumSpec, clip_norm: float | None = None, event: Event | None = None
    ) -> None:
        self._event = event
        self._spec, self._bound = spec, spec.clip_norm if clip_norm is None else clip_norm
        self._stddev = spec.noise_multiplier * self._bound if spec.noise_multiplier else 0.0
        if not self._bound > 0 or not math.isfinite(self._stddev):
            raise InvalidConfig("clip_norm must be positive, and finite where there is noise to scale to it")
        self._shapes = {**shapes, WITHIN: ()} if spec.quantile else dict(shapes)
        self._names = sorted(shapes)
        self._flat = np.zeros(sum(math.prod(shape) for shape in shapes.values()))
        self._total = self._split(self._flat)
        if spec.quantile:
            self._total[WITHIN] = np.zeros(())

    def add(self, partial: Arrays, *, users: int) -> None:
        """Adds one node's sum of clipped contributions.

        Args:
            partial: as `shapes`, and `WITHIN` with a quantile.
            users: how many people the node was enrolled with.

        Raises:
            MalformedContribution: not what the round asked for; nothing was added.
        """
        check(partial, self._shapes)
        values = {name: np.asarray(v, np.float64) for name, v in partial.items()}
        within = values.pop(WITHIN, None)
        if self._spec.row_norm is not None:
            values = _clip_rows(values, users * self._spec.row_norm)
        flat = np.concatenate([np.zeros(0), *(values[name].ravel() for name in self._names)])
        length, bound = norm({"": flat}), users * self._bound
        over = length > bound * (1 + 2.0**-30)  # a norm of honest people's sum may round to just above their bound
        scale = bound * SAFETY / length if over else 1.0
        for start in range(0, flat.size, _BLOCK):
            block = slice(start, start + _BLOCK)
            self._flat[block] += on_grid(flat[block] * scale, self._bound)
        if within is not None:
            self._total[WITHIN] += np.clip(np.trunc(2 * within) / 2, -users / 2, users / 2)

    def release(self, noise: Noise, receipt: Receipt | None) -> dict[str, Float32]:
        """The noised sum; with nobody in it, noise alone: that nobody came is private too.

        Args:
            noise: a stream used for nothing else.
            receipt: proof that the ledger was charged for this release, good for one. None only without noise, where
                nothing is promised here.

        Raises:
            InvalidConfig: a release without its receipt, with the receipt of other noise, or a receipt for the second
                time.
        """
        charged = 0.0 if receipt is None else receipt.event.noise_multiplier
        if charged != self._spec.charged_multiplier:
            raise InvalidConfig("a noised release needs the receipt of its own noise, and only that one has any")
        if receipt is not None:
            if receipt.entry.kind != "charge" or self._event not in (None, receipt.event):
                raise InvalidConfig("this receipt is not of the charge for this release")
            receipt.spend()

        def noised(total: Float64, stddev: float) -> Float32:
            return (noise.add(total, stddev) if receipt else total).astype(np.float32)

        out = self._split(noised(self._flat, self._stddev))
        if self._spec.quantile:
            stddev = self._spec.quantile.noise_multiplier / 2  # its sensitivity is ½
            out[WITHIN] = noised(self._total[WITHIN], stddev)
        return out

    def _split(self, flat: npt.NDArray[_Float]) -> dict[str, npt.NDArray[_Float]]:
        """Views of a contribution's arrays, one after the other in the order of names."""
        ends = np.cumsum([math.prod(self._shapes[name]) for name in self._names], dtype=np.int64)[:-1]
        parts = np.split(flat, ends) if self._names else []
        return {name: part.reshape(self._shapes[name]) for name, part in zip(self._names, parts, strict=True)}


def _clip_rows(contribution: Arrays, bound: float) -> dict[str, Float64]:
    out = {}
    for name, values in contribution.items():
        wide = np.asarray(values, np.float64)
        rows = wide.reshape(wide.shape[0] if wide.ndim else 1, math.prod(wide.shape[1:]))
        with np.errstate(over="ignore"):
            length = np.sqrt((rows * rows).sum(axis=1, keepdims=True))
        if not np.isfinite(length).all():
            raise MalformedContribution("contribution has a non-finite norm")
        out[name] = (rows * np.minimum(1.0, bound / np.maximum(length, 1e-300))).reshape(wide.shape)
    return out
