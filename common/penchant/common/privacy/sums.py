"""Turns one round's contributions into one private sum.

A round releases  Σᵢ clip(cᵢ, C) + N(0, (σC)² I)  and divides by a fixed, public number only afterwards. The noise is
scaled to the sum's sensitivity C, so nothing here weights a contribution or divides by the number that arrived.
A contribution is a set of named arrays, clipped as one flat vector; a node's partial sum of n clipped contributions is
checked and clipped again to users(node)·C, with users(node) from its enrolment, never from its reply.

Source: McMahan et al. 2018, https://arxiv.org/abs/1710.06963, section 2 and Algorithm 1 with the fixed-denominator
estimator and every user weight w_k = 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from penchant.common.arrays import Arrays, Float32
from penchant.common.errors import InvalidConfig, MalformedContribution
from penchant.common.privacy.ledger import Receipt

Shapes = Mapping[str, tuple[int, ...]]
"""What a contribution must look like: the shape of each named array."""


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


def clip(contribution: Arrays, bound: float) -> dict[str, Float32]:
    """Scales a contribution, all its arrays together, to an L2 norm of at most `bound`.

    Guarantees:
        ‖result‖₂ ≤ bound · (1 + 1e-6). One within the bound comes back unchanged (as float32).
        Adding or removing a contribution moves a sum of such results by at most that; replacing one by twice that.

    Raises:
        InvalidConfig: a bound that is not positive.
        MalformedContribution: a NaN, an infinity, or what is too large for float32 even within the bound.
    """
    if not bound > 0:  # also refuses NaN
        raise InvalidConfig(f"bound must be positive, not {bound}")
    length = norm(contribution)
    scale = 1.0 if length <= bound else bound / length
    if length * scale > float(np.finfo(np.float32).max):
        raise MalformedContribution("contribution is too large for float32")
    return {k: (np.asarray(v, np.float64) * scale).astype(np.float32) for k, v in contribution.items()}


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

    Its memory does not depend on who takes part. Not guaranteed: resistance to floating-point attacks,
    https://arxiv.org/abs/2112.05307.

    Args:
        shapes: of one contribution.
        clip_norm: C, the L2 bound on one person's contribution; infinite only where nothing is promised.
        noise_multiplier: σ, noise stddev over C; 0 only where nothing is promised at this place.
    """

    def __init__(self, shapes: Shapes, *, clip_norm: float, noise_multiplier: float) -> None:
        if not clip_norm > 0 or not noise_multiplier >= 0:  # also refuses NaN
            raise InvalidConfig("clip_norm must be positive and noise_multiplier ≥ 0")
        if noise_multiplier > 0 and not math.isfinite(clip_norm * noise_multiplier):
            raise InvalidConfig("noise needs a finite clip_norm to scale to")
        self._shapes = dict(shapes)
        self._clip_norm, self._noise_multiplier, self._released = clip_norm, noise_multiplier, False
        self._total: dict[str, np.ndarray[Any, np.dtype[np.float64]]] = {
            name: np.zeros(shape, np.float64) for name, shape in self._shapes.items()
        }

    def add(self, partial: Arrays, *, users: int) -> None:
        """Adds one node's sum of clipped contributions.

        Args:
            partial: as `shapes`.
            users: how many people the node was enrolled with.

        Raises:
            MalformedContribution: not what the round asked for; nothing was added.
        """
        check(partial, self._shapes)
        length = norm(partial)
        bound = users * self._clip_norm
        scale = 1.0 if length <= bound * (1 + 1e-6) else bound / length
        for name, total in self._total.items():
            total += partial[name] if scale == 1.0 else np.asarray(partial[name], np.float64) * scale

    def release(self, noise: np.random.Generator, receipt: Receipt | None) -> dict[str, Float32]:
        """The noised sum; with nobody in it, noise alone: that nobody came is private too.

        Args:
            noise: stream of the Gaussian; seeded only in research.
            receipt: proof that the ledger was charged for this release. None only without noise, where nothing is
                promised here.

        Raises:
            InvalidConfig: a release without its receipt, with the receipt of other noise, or for the second time.
        """
        charged = 0.0 if receipt is None else receipt.event.noise_multiplier
        if charged != self._noise_multiplier:
            raise InvalidConfig("a noised release needs the receipt of its own noise, and only that one has any")
        if self._released:
            raise InvalidConfig("a sum is released once: the same sum under fresh noise is another release")
        self._released = True
        stddev = self._noise_multiplier * self._clip_norm if receipt else 0.0
        out = {}
        for name in sorted(self._total):
            total = self._total[name]
            noised = total + stddev * noise.standard_normal(total.shape) if stddev else total
            out[name] = noised.astype(np.float32)
        return out
