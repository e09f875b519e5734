"""A small network over the person's and the item's vectors, with one bias for each item.

    logit(i) = w · relu(W [u, vᵢ] + c) + b + bᵢ

The person is a parameter, as in `MF`: u stays on the device and no history is read. v, the biases and the network are
shared.

Source: He et al. 2017, Neural Collaborative Filtering, https://arxiv.org/abs/1708.05031, section 3.3, with one hidden
layer and item biases.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from penchant.common.learners.neural.models.base import InterestModel, scored_in_chunks


class MLP(InterestModel):
    """One hidden layer over two vectors.

    Only layers that Opacus can clip without per-sample gradients, each called once in `forward`.

    Args:
        dim: size d of the vectors.
        hidden: width of the layer.
    """

    item_tables: ClassVar[tuple[str, ...]] = ("item.weight", "bias.weight")
    private: ClassVar[tuple[str, ...]] = ("user.weight",)
    reads_history: ClassVar[bool] = False

    def __init__(self, n_items: int, *, dim: int = 32, hidden: int = 32) -> None:
        super().__init__(n_items)
        self.user = nn.Embedding(1, dim)
        self.item = nn.Embedding(n_items, dim)
        self.bias = nn.Embedding(n_items, 1)
        self.first = nn.Linear(2 * dim, hidden)
        self.last = nn.Linear(hidden, 1)
        nn.init.normal_(self.user.weight, std=0.1)
        nn.init.normal_(self.item.weight, std=0.1)
        nn.init.zeros_(self.bias.weight)

    def forward(self, history: Tensor, candidates: Tensor) -> Tensor:
        item = self.item(candidates)  # [B, M, d]
        user = self.user(candidates.new_zeros(len(candidates), 1)).expand_as(item)  # [B, M, d]
        inner = torch.relu(self.first(torch.cat([user, item], -1)))  # [B, M, h]
        logits: Tensor = (self.last(inner) + self.bias(candidates)).squeeze(-1)  # [B, M]
        return logits

    def score_all(self, history: Tensor) -> Tensor:
        return scored_in_chunks(self, history)
