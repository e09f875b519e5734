"""What a small network adds to the linear expectation of a strength, from public content and what that model knows.

    e = tanh(E x + b),    z = tanh(H [e | k] + c),    correction = lᵀz + o

x are the item's public features. k is what the linear model of `intensity.py` knows of the person and the item, each a
strength over `UNIT`: the item's term; of the expectation, the parts of the person, of the learned and of the public
columns; the stddev of the last three together and of the item's term; and log(1 + how many other events) / 6.

The network is released and everybody's; k never leaves the device. It is trained in `learners/neural/strengths.py`,
and NumPy is enough to read it.

Source: Cheng et al. 2016, Wide & Deep Learning for Recommender Systems, https://arxiv.org/abs/1606.07792, section 3 (a
linear part and a network, added), here with the linear part fitted by the device alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from penchant.common.arrays import Float32, Float64, Int64

KNOWN = 7
"""Numbers in k."""
UNIT = 0.12


@dataclass(frozen=True)
class Correction:
    """A released network.

    Attributes:
        content: x of each item, float32[n_items, p].
        weights: E and b, H and c, l and o, by the names of `shapes`.
    """

    content: Float32
    weights: Mapping[str, Float32]

    def at(self, items: Int64, known: Float64) -> Float64:
        """float64[n], in units of strength, of these items with what is known of each, float64[n, KNOWN]."""
        w = self.weights
        encoded = np.tanh(self.content[items] @ w["encoder.weight"].T + w["encoder.bias"])
        inner = np.tanh(np.hstack([encoded, known]) @ w["inner.weight"].T + w["inner.bias"])
        return np.asarray((inner @ w["last.weight"].T + w["last.bias"])[:, 0], np.float64)


def shapes(n_features: int, encoded: int, hidden: int) -> dict[str, tuple[int, ...]]:
    """The network's arrays, for so many public features.

    >>> sum(math.prod(shape) for shape in shapes(26, 8, 16).values())
    489
    """
    return {
        "encoder.weight": (encoded, n_features),
        "encoder.bias": (encoded,),
        "inner.weight": (hidden, encoded + KNOWN),
        "inner.bias": (hidden,),
        "last.weight": (1, hidden),
        "last.bias": (1,),
    }


def fresh(n_features: int, encoded: int, hidden: int) -> dict[str, Float32]:
    """Weights that correct nothing yet: the last layer is zero, the others are the same random ones everywhere."""
    random = np.random.default_rng(0)
    out = {}
    for name, shape in shapes(n_features, encoded, hidden).items():
        scale = 0.0 if name.startswith("last") or len(shape) == 1 else 1 / math.sqrt(max(shape[1], 1))
        out[name] = (scale * random.standard_normal(shape)).astype(np.float32)
    return out
