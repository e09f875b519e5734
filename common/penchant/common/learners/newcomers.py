"""Learned numbers for items that nobody's sum spoke of: new ones, and those too rare to get their own.

    W = (XᵀX + λI)⁻¹ XᵀV over the items that have numbers,    a newcomer's are x W

X are public features with a constant beside them. It reads what was released and the public catalogue, so it costs no
privacy. An item without features gets the average.

Source: Gantner et al. 2010, Learning Attribute-to-Feature Mappings for Cold-Start Recommendations, section IV.B.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from penchant.common.arrays import Bool, Float32, Int64

RIDGE = 10.0
"""λ: as much as the features of ten items, whose rows have a length of 1."""


def from_content(values: Float32, known: Bool, content: Float32, ridge: float = RIDGE) -> Float32:
    """The values with the rows of newcomers filled in: float32[n_items, …].

    Args:
        values: float32[n_items, …]; rows of newcomers are not read.
        known: bool[n_items], False for newcomers.
        content: float32[n_items, n_features], public.
    """
    out = np.array(values, np.float32)
    if known.all() or not known.any():
        return out
    features = np.hstack([content.astype(np.float64), np.ones((len(content), 1))])
    own = out.reshape(len(out), -1)
    x = features[known]
    weights = np.linalg.solve(x.T @ x + ridge * np.eye(x.shape[1]), x.T @ own[known].astype(np.float64))
    own[~known] = features[~known] @ weights
    return out


def grown(values: npt.NDArray[Any], place: Int64, n_items: int) -> tuple[npt.NDArray[Any], Bool]:
    """Rows moved to their places in a larger catalogue, zeros where an item is new, and bool[n_items] of who is known.

    >>> grown(np.array([5, 7]), place=np.array([2, 0]), n_items=3)[0].tolist()
    [7, 0, 5]
    """
    known = np.zeros(n_items, np.bool_)
    known[place] = True
    out = np.zeros((n_items, *values.shape[1:]), values.dtype)
    out[place] = values
    return out, known
