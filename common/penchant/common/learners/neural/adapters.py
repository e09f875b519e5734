"""Low-rank adapters: an item table V₀ stays as it is; what is trained is a map of rank r in the space of its vectors.

    V = V₀ + V₀ A B,    A float32[d, r] with entries of variance 1/r,    B float32[r, d], zero at first

A round then carries 2·d·r numbers for the table instead of n·d, whatever the catalogue's size, and everybody's
contribution speaks of the same ones: noise of a given σC spreads over few coordinates. An item that is new or rare
moves with the others. A and B are named after the table's module ("item.weight" → "item.down", "item.up"); with `down`
frozen too, V is linear in what is trained, and no product of two noised matrices arises.

Sources: Hu et al. 2021, LoRA, https://arxiv.org/abs/2106.09685, section 4.1; Sun et al. 2024, FFA-LoRA,
https://arxiv.org/abs/2403.12313 (freezing A under federated privacy).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from torch import Tensor

from penchant.common.arrays import Float32
from penchant.common.errors import InvalidConfig
from penchant.common.learners.neural.models import InterestModel


def fresh(model: InterestModel, rank: int, seed: int) -> dict[str, Float32]:
    """A and B of every table of vectors; a table of one number for each item has none.

    Raises:
        InvalidConfig: a rank above the vectors' size, which saves nothing.
    """
    random, out = np.random.default_rng(seed), {}
    for table in tables(model):
        size = model.get_parameter(table).shape[1]
        if rank > size:
            raise InvalidConfig(f"adapter must be at most the size of an item vector, {size}, not {rank}")
        down, up = _names(table)
        out[down] = (random.standard_normal((size, rank)) / rank**0.5).astype(np.float32)
        out[up] = np.zeros((rank, size), np.float32)
    return out


def tables(model: InterestModel) -> list[str]:
    """Names of the item tables that hold vectors."""
    return [name for name in model.item_tables if model.get_parameter(name).shape[1] > 1]


def whole(weights: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """The model's own parameters, by these tables' adapters where there are any: what it computes with."""
    out = dict(weights)
    for table in names:
        down, up = _names(table)
        if up in out:
            out[table] = out[table] + out[table] @ out.pop(down) @ out.pop(up)
    return out


def _names(table: str) -> tuple[str, str]:
    module, _, _ = table.rpartition(".")
    return f"{module}.down", f"{module}.up"
