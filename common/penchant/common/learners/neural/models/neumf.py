"""Neural matrix factorisation: a generalised product beside a small network, each with vectors of its own.

    product(i) = uᴳ ∘ vᴳᵢ
    network(i) = relu(W₂ relu(W₁ [uᴹ, vᴹᵢ]))
    logit(i)   = w · [product(i), network(i)] + b

The person is a parameter, as in `MF`: uᴳ and uᴹ stay on the device and no history is read.

Source: He et al. 2017, Neural Collaborative Filtering, https://arxiv.org/abs/1708.05031, section 3.4, trained
from random weights rather than from two models trained apart.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from penchant.common.learners.neural.models.base import InterestModel, scored_in_chunks


class NeuMF(InterestModel):
    """Neural matrix factorisation.

    Only layers that Opacus can clip without per-sample gradients, each called once in `forward`.

    Args:
        dim: size d of each of the four kinds of vectors.
        hidden: width h of the network's first layer, even; its second has half of it.
    """

    item_tables: ClassVar[tuple[str, ...]] = ("item_product.weight", "item_network.weight")
    private: ClassVar[tuple[str, ...]] = ("user_product.weight", "user_network.weight")
    reads_history: ClassVar[bool] = False

    def __init__(self, n_items: int, *, dim: int = 32, hidden: int = 32) -> None:
        super().__init__(n_items)
        self.user_product = nn.Embedding(1, dim)
        self.user_network = nn.Embedding(1, dim)
        self.item_product = nn.Embedding(n_items, dim)
        self.item_network = nn.Embedding(n_items, dim)
        self.first = nn.Linear(2 * dim, hidden)
        self.second = nn.Linear(hidden, hidden // 2)
        self.last = nn.Linear(dim + hidden // 2, 1)
        for table in (self.user_product, self.user_network, self.item_product, self.item_network):
            nn.init.normal_(table.weight, std=0.1)

    def forward(self, history: Tensor, candidates: Tensor) -> Tensor:
        person = candidates.new_zeros(len(candidates), 1)  # [B, 1], the only row
        product = self.user_product(person) * self.item_product(candidates)  # [B, M, d]
        item = self.item_network(candidates)  # [B, M, d]
        user = self.user_network(person).expand_as(item)  # [B, M, d]
        network = torch.relu(self.first(torch.cat([user, item], -1)))  # [B, M, h]
        network = torch.relu(self.second(network))  # [B, M, h/2]
        logits: Tensor = self.last(torch.cat([product, network], -1)).squeeze(-1)  # [B, M]
        return logits

    def score_all(self, history: Tensor) -> Tensor:
        return scored_in_chunks(self, history)
