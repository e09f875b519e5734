"""Item tables that do not start from nothing: from the public catalogue, and from what co-occurrence released.

    F = [ Q√l | g X ],    V₀ = c F W_d

Q√l are the released factors (`cooccurrence.py`; items outside its head get theirs from content, `newcomers.py`), X the
public features, W_d the d leading directions of FᵀF. c gives V₀ the mean length of the model's own random vectors, or 1
where the model reads histories: so the latest item is heard through layers that are not trained yet. Columns that F
does not fill keep a tenth of their random values: at zero a product u · v never moves them. Item biases start at
log((p + p̄) / 2p̄) of released popularity p and its mean p̄: near log-odds, and finite at 0.

Public features cost no privacy. Co-occurrence's sums cost what they cost, in the same plan as the rounds that follow;
everything here is post-processing of them.

Source: Curmei et al. 2023, Private Matrix Factorization with Public Item Features, https://arxiv.org/abs/2309.11516
(public features in the item side of a private factorisation).
"""

from __future__ import annotations

import numpy as np

from penchant.common.arrays import Arrays, Float32
from penchant.common.learners.neural import adapters
from penchant.common.learners.neural.models import InterestModel

SMALL = 0.1  # of the random values that stay where F has no column


def placed(weights: Arrays, model: InterestModel, vectors: Float32, popularity: Float32 | None) -> dict[str, Float32]:
    """The weights, with tables and biases that start from what is known of the items.

    Args:
        weights: random ones.
        vectors: F, float32[n_items, k]; of rank 0, it leaves tables as they are.
        popularity: float32[n_items] in [0, 1], released; None leaves biases as they are.
    """
    out = {name: np.array(values, np.float32) for name, values in weights.items()}
    for table in adapters.tables(model):
        out[table] = _table(out[table], vectors, 1.0 if model.reads_history else None)
    if popularity is not None and "bias.weight" in out and popularity.any():
        mean = popularity.mean()
        out["bias.weight"][:, 0] = np.log((popularity + mean) / (2 * mean))
    return out


def _table(random: Float32, vectors: Float32, length: float | None) -> Float32:
    """float32[n_items or one more, d], of that mean length, or the random one's; a row for padding stays as it is."""
    n = len(vectors)
    wide = vectors.astype(np.float64)
    values, basis = np.linalg.eigh(wide.T @ wide)
    kept = (values > 1e-9 * max(values.max(initial=0.0), 1e-9))[::-1][: random.shape[1]]
    lead = wide @ basis[:, ::-1][:, : len(kept)][:, kept]
    if not lead.shape[1]:
        return random
    out = SMALL * random
    length = length or np.linalg.norm(random[:n], axis=1).mean()
    out[:n, : lead.shape[1]] = lead * (length / np.linalg.norm(lead, axis=1).mean())
    return out.astype(np.float32)
