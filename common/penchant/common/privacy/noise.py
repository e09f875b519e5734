"""Gaussian noise and coins from a stream cipher, and how noise is added so that floating point tells nothing.

    key (32 bytes) ──► AES-256 in counter mode ──► 64-bit words ──► coins, or Gaussians by the ziggurat

In production a key comes from the operating system, lives as long as one release, and no seed exists (`Noise.from_os`).
In research it is derived from the run's seed (`Streams.key`); everything after the key is the same code. Who sees the
output cannot find the key, as they could the state of NumPy's generators.

Floating point. A float64 Gaussian takes only some of the floats near any number, so the low bits of `sum + noise` can
tell which sum it was (Mironov 2012, https://doi.org/10.1145/2382196.2382264; Jin et al. 2022,
https://arxiv.org/abs/2112.05307). `add` therefore releases multiples of g, the power of two with s/512 < g ≤ s/256 for
a stddev of s, which costs a variance of at most s²/786,432. Write the sum as k·g + r, k whole and |r| ≤ g/2, exact in
float64; then  k·g + g·⌊(r + N)/g⌉  is the sum plus N, rounded to the grid: a function of what the exact mechanism
would release, so no less private. What is left is how far N is from a Gaussian seen through cells of width g:

- Every step from the cipher's words to N is a uniform choice among 2⁵³ points or more, or a rounding to 53 bits, and so
  is the sum (r + N)/g: together they move N by less than |N| · 2⁻⁵⁰. A cell between −13s and 13s has width 2⁻⁹s or more
  and so its exact probability to a factor 1 ± η with η < 2 · 13 · 2⁻⁵⁰/2⁻⁹ < 2⁻³⁶.
- |N| > 13s has probability below 10⁻³⁷.

For d numbers in one release ε grows by at most 2·d·η, 3 · 10⁻⁵ for a million, and δ by at most d · 10⁻³⁷. Time is not
constant: 1.5 % of draws take longer; which ones depends on noise alone, not on data.

Sources: Marsaglia and Tsang 2000, https://doi.org/10.18637/jss.v005.i08 (ziggurat); Doornik 2005, "An improved ziggurat
method to generate normal random samples" (layer and position from different bits); NIST SP 800-38A, section 6.5 (CTR).
"""

from __future__ import annotations

import math
import secrets
from functools import lru_cache
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from penchant.common.arrays import Float64
from penchant.common.errors import InvalidConfig, PrivacyRefused

KEY_BYTES = 32
GRID_BITS = 8
"""Noise is released on a grid of about its stddev over 2⁸."""
_LAYERS = 256
_BLOCK = 1 << 14  # draws at once: a block fits the cache
_Words = np.ndarray[Any, np.dtype[np.uint64]]


class Noise:
    """One stream of secret randomness.

    Args:
        key: 32 bytes, used for this stream alone. The same key gives the same stream on every machine.

    Raises:
        InvalidConfig: a key of another length.
    """

    def __init__(self, key: bytes) -> None:
        if len(key) != KEY_BYTES:
            raise InvalidConfig(f"a noise key has {KEY_BYTES} bytes, not {len(key)}")
        self._stream = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()

    @classmethod
    def from_os(cls) -> Noise:
        """A stream under a fresh key of the operating system, kept nowhere else."""
        return cls(secrets.token_bytes(KEY_BYTES))

    def uniform(self, size: int) -> Float64:
        """float64[size] in [0, 1), multiples of 2⁻⁵³."""
        out = np.empty(size)
        for start in range(0, size, _BLOCK):
            block = out[start : start + _BLOCK]
            np.multiply(self._words(block.size) >> np.uint64(11), 2.0**-53, out=block)
        return out

    def normal(self, shape: tuple[int, ...] = ()) -> Float64:
        """float64[shape] from N(0, 1)."""
        return self._gaussians(math.prod(shape)).reshape(shape)

    def add(self, total: Float64, stddev: float) -> Float64:
        """`total` plus N(0, stddev²) for each number, rounded to the grid that the module's header explains.

        Raises:
            InvalidConfig: stddev is not positive and finite, or so far from the sum's size that float64 has no grid.
        """
        step = grid(stddev)
        scaled = np.asarray(total, np.float64).ravel() / step  # a power of two: exact
        if not np.abs(scaled).max(initial=0.0) < 2.0**52:
            raise InvalidConfig("the sum is too large for its noise: plan more noise or a smaller clip_norm")
        noise = self._gaussians(scaled.size)
        noise *= stddev / step
        for start in range(0, scaled.size, _BLOCK):
            block = scaled[start : start + _BLOCK]
            whole = np.rint(block)
            block -= whole
            block += noise[start : start + _BLOCK]
            np.rint(block, out=block)
            block += whole
        scaled *= step
        return scaled.reshape(np.shape(total))

    def _words(self, n: int) -> _Words:
        out = bytearray(8 * n + 15)  # the cipher asks for room for one block more
        self._stream.update_into(_zeros(8 * n), out)
        return np.frombuffer(out, "<u8", count=n).astype(np.uint64, copy=False)

    def _gaussians(self, n: int) -> Float64:
        """Draws block by block, and what of all of them fell beside the layer above at the end, together."""
        edges, inner, _ = ziggurat()
        out, places, layers = np.empty(n), [], []
        for start in range(0, n, _BLOCK):
            block = out[start : start + _BLOCK]
            words = self._words(block.size)
            layer = (words & np.uint64(_LAYERS - 1)).astype(np.intp)
            at = (words.view(np.int64) >> 9) * 2.0**-54  # [−1, 1): 55 bits, none of them the layer's
            np.multiply(at, edges[layer], out=block)
            outside = np.flatnonzero(np.abs(at) >= inner[layer])
            places.append(outside + start)
            layers.append(layer[outside])
        if any(map(len, places)):
            beside = np.concatenate(places)
            out[beside] = self._outside(np.concatenate(layers), out[beside])
        return out

    def _outside(self, layer: np.ndarray[Any, np.dtype[np.intp]], x: Float64) -> Float64:
        """What a layer's draw becomes where it fell beside the layer above: kept, from the tail, or drawn anew."""
        edges, _, heights = ziggurat()
        low, high = heights[layer], heights[layer + 1]
        kept = low + self.uniform(len(x)) * (high - low) < np.exp(-x * x / 2)
        kept &= layer > 0
        out = x.copy()
        last = np.flatnonzero(layer == 0)
        if len(last):
            out[last] = np.copysign(self._tail(edges[1], len(last)), x[last])
        again = np.flatnonzero(~kept & (layer > 0))
        if len(again):
            out[again] = self._gaussians(len(again))
        return out

    def _tail(self, start: float, n: int) -> list[float]:
        """n draws above `start`: Marsaglia's exponentials."""
        out: list[float] = []
        while len(out) < n:
            words = map(float, self._words(3 * (n - len(out))).tolist())
            for high, low, other in zip(words, words, words, strict=True):
                a = -math.log((high + (low + 0.5) * 2.0**-64) * 2.0**-64)  # 128 bits: far out 64 would be too few
                b = -math.log((other + 0.5) * 2.0**-64)
                if 2 * b > (a / start) ** 2:
                    out.append(start + a / start)
        return out


def grid(stddev: float) -> float:
    """The power of two to whose multiples noise of this stddev is released; in (stddev/512, stddev/256].

    Raises:
        InvalidConfig: stddev is not positive and finite, or its grid is below float64's range.
    """
    if not 1e-280 < stddev < 1e280:  # also refuses NaN
        raise InvalidConfig(f"noise needs a stddev that is positive and finite, not {stddev:g}")
    return math.ldexp(0.5, math.frexp(stddev)[1] - GRID_BITS)


def self_test() -> None:
    """What a server or device runs before its first release.

    The cipher is compared with NIST's vector; a fresh stream's Gaussians must have the moments of a Gaussian, and two
    fresh streams must differ. A sound generator fails for fewer than 1 start in 10⁹.

    Raises:
        PrivacyRefused: this machine's noise is not fit for a release.
    """
    cipher = Cipher(algorithms.AES256(bytes.fromhex(_NIST_KEY)), modes.CTR(bytes.fromhex(_NIST_COUNTER))).encryptor()
    if cipher.update(bytes.fromhex(_NIST_PLAIN)).hex() != _NIST_CIPHER:
        raise PrivacyRefused("the stream cipher does not give NIST's test vector: repair the cryptography package")
    n = 1 << 16
    one, other = Noise.from_os().normal((n,)), Noise.from_os().normal((n,))
    moments = (one.mean(), (one**2).mean() - 1, (one**3).mean(), (one**4).mean() - 3, (one * other).mean())
    for value, variance in zip(moments, (1, 2, 15, 96, 1), strict=True):  # of x, x², x³, x⁴ and x·y for a Gaussian
        if not abs(value) < 7 * math.sqrt(variance / n):
            raise PrivacyRefused(
                "noise from the operating system's key is not Gaussian: do not release on this machine"
            )


# NIST SP 800-38A, F.5.5 (CTR-AES256.Encrypt), block 1
_NIST_KEY = "603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4"
_NIST_COUNTER = "f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff"
_NIST_PLAIN = "6bc1bee22e409f96e93d7e117393172a"
_NIST_CIPHER = "601ec313775789a5b7a7f504bbf3d228"


@lru_cache(maxsize=1)
def ziggurat() -> tuple[Float64, Float64, Float64]:
    """Edges x₀ … x₂₅₆ = 0 of the layers, the share of each that lies under the next, and exp(−x²/2) at the edges.

    x₁ is where the tail begins, x₀ the width of a rectangle of the tail's layer; every layer has the same area.
    """

    def stack(start: float) -> tuple[list[float], float]:
        area = start * math.exp(-start * start / 2) + math.sqrt(math.pi / 2) * math.erfc(start / math.sqrt(2))
        edges = [area / math.exp(-start * start / 2), start]
        for _ in range(_LAYERS - 2):
            height = area / edges[-1] + math.exp(-(edges[-1] ** 2) / 2)
            if height >= 1:
                return edges, 1.0  # the stack passes the top: start lies too low
            edges.append(math.sqrt(-2 * math.log(height)))
        return edges, area / edges[-1] + math.exp(-(edges[-1] ** 2) / 2) - 1

    low, high = 3.0, 4.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if stack(middle)[1] > 0 else (low, middle)
    found = np.array([*stack(high)[0], 0.0])
    heights = np.exp(-found * found / 2)
    return found, found[1:] / found[:-1], heights


@lru_cache(maxsize=8)
def _zeros(n: int) -> bytes:
    return bytes(n)
