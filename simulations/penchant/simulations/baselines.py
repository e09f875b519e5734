"""What can be had without privacy or federation: popularity, neighbours, and EASE, each a `Scorer`.

They are fitted on training interactions and score any history (fold-in), so a person outside training is no special
case. An interaction is a 1 however often it happened or how strong it was.

Source: Sarwar et al. 2001 (item neighbours); Steck, "Embarrassingly Shallow Autoencoders for Sparse Data", WWW 2019.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import linalg, sparse

from penchant.common.arrays import Float32, Float64
from penchant.common.errors import InvalidConfig
from penchant.common.interactions import Interactions
from penchant.common.metrics import best

Csr = Any  # a scipy.sparse.csr_matrix; scipy ships no types
_BLOCK = 512  # columns of items × items at a time


class Popularity:
    """score(item) = how many people of the training set have it."""

    def __init__(self, train: Interactions) -> None:
        self._counts: Float32 = np.asarray(_binary(train).sum(axis=0), np.float32).ravel()

    def scores(self, histories: Interactions) -> Float32:
        """float32[histories.n_users, n_items], the same row for everybody."""
        return np.tile(self._counts, (histories.n_users, 1))


class ItemKnn:
    """Sum over the history of cosine similarities, each item listening to its k nearest only.

        s_ij = c_ij / (√(c_ii c_jj) + shrink),    score(j) = Σ s_ij over i in the history among j's k nearest

    c_ij counts the people who have both. Similarities are made a block of items at a time and only k an item are kept.
    """

    def __init__(self, train: Interactions, k: int = 100, shrink: float = 0.0) -> None:
        if k < 1 or not 0 <= shrink < np.inf:
            raise InvalidConfig("ItemKnn: k must be ≥ 1, shrink ≥ 0 and finite")
        x = _binary(train)
        n = train.n_items
        size = np.sqrt(np.asarray(x.sum(axis=0), np.float32).ravel())
        by_item = x.T.tocsr()
        kept = []
        for start in range(0, n, _BLOCK):
            at = np.arange(start, min(start + _BLOCK, n))
            similar = (by_item[at] @ x).toarray()
            similar /= np.maximum(size[at, None] * size + np.float32(shrink), 1e-12)  # 0 ÷ 0 of unused items
            similar[at - start, at] = 0.0
            similar[similar == 0] = -np.inf
            near = best(similar, min(k, n))
            rows, places = np.nonzero(near >= 0)
            columns = near[rows, places]
            kept.append(sparse.csr_matrix((similar[rows, columns], (rows, columns)), (len(at), n), np.float32))
        self._near = sparse.vstack(kept).T.tocsr()  # column j holds j's neighbours

    def scores(self, histories: Interactions) -> Float32:
        """float32[histories.n_users, n_items]."""
        out: Float32 = (_binary(histories) @ self._near).toarray()
        return out


class Ease:
    """Linear autoencoder with a zero diagonal, in closed form.

        P = (XᵀX + λI)⁻¹,    B = I − P diag(1 / diag P),    scores = x B

    With fewer people than items the dual is exact and never forms items × items: L Lᵀ = X Xᵀ + λI, Z = L⁻¹ X,
    P = (I − Zᵀ Z) / λ, so scores = x − (x − (x Zᵀ) Z) / (λ diag P).
    """

    def __init__(self, train: Interactions, l2: float = 300.0) -> None:
        if not 0 < l2 < np.inf:
            raise InvalidConfig(f"Ease: l2 must be positive and finite, not {l2}")
        x = _binary(train, np.float64)
        self._dual = train.n_users < train.n_items
        if self._dual:
            self._z, self._scale = _dual(x, l2)
        else:
            self._b = _primal(x, l2)

    def scores(self, histories: Interactions) -> Float32:
        """float32[histories.n_users, n_items]."""
        x = _binary(histories)
        out: Float32
        if not self._dual:
            out = x @ self._b
            return out
        dense: Float32 = x.toarray()
        out = dense - (dense - (x @ self._z.T) @ self._z) * self._scale
        return out


def _primal(x: Csr, l2: float) -> Float32:
    """float32[n_items, n_items], B."""
    gram: Float64 = (x.T @ x).toarray()
    gram[np.diag_indices_from(gram)] += l2
    p = linalg.inv(gram, overwrite_a=True)
    b: Float32 = (p / -np.diag(p)).astype(np.float32)
    np.fill_diagonal(b, 0.0)
    return b


def _dual(x: Csr, l2: float) -> tuple[Float32, Float32]:
    """Z as float32[n_users, n_items] and 1 / (λ diag P) as float32[n_items]."""
    kernel = (x @ x.T).toarray()
    kernel[np.diag_indices_from(kernel)] += l2
    lower = linalg.cholesky(kernel, lower=True, overwrite_a=True)
    z = np.empty(x.shape, np.float32)
    scale = np.empty(x.shape[1], np.float32)
    columns = x.tocsc()
    for start in range(0, x.shape[1], _BLOCK):
        at = slice(start, start + _BLOCK)
        part = linalg.solve_triangular(lower, columns[:, at].toarray(), lower=True)
        scale[at] = 1.0 / (1.0 - (part * part).sum(axis=0))  # in float64: the difference can be small
        z[:, at] = part
    return z, scale


def _binary(interactions: Interactions, dtype: npt.DTypeLike = np.float32) -> Csr:
    """csr[n_users, n_items] of ones."""
    ones = np.ones(len(interactions), dtype)
    shape = (interactions.n_users, interactions.n_items)
    x = sparse.csr_matrix((ones, interactions.items, interactions.offsets), shape, copy=True)
    x.sum_duplicates()  # in place: without the copy it would sort everybody's history
    x.data[:] = 1.0
    return x
