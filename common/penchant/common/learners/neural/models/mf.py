"""Matrix factorisation: one vector for the person, one vector and one bias for each item.

    logit(i) = u · vᵢ + bᵢ

The person is a parameter here: u is trained on the device and stays there, and no history is read. v and b are
shared.

Source: Koren, Bell and Volinsky 2009, Matrix Factorization Techniques for Recommender Systems, equation 4, without
the person's bias, which ranks nothing, and with the logistic loss.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from penchant.common.learners.neural.models.base import InterestModel


class MF(InterestModel):
    """Matrix factorisation with item biases.

    Only layers that Opacus can clip without per-sample gradients, each called once in `forward`.
    """

    item_tables: ClassVar[tuple[str, ...]] = ("item.weight", "bias.weight")
    private: ClassVar[tuple[str, ...]] = ("user.weight",)
    linear: ClassVar[str | None] = "item.weight"
    reads_history: ClassVar[bool] = False

    def __init__(self, n_items: int, *, dim: int = 32) -> None:
        super().__init__(n_items)
        self.user = nn.Embedding(1, dim)
        self.item = nn.Embedding(n_items, dim)
        self.bias = nn.Embedding(n_items, 1)
        nn.init.normal_(self.user.weight, std=0.1)  # at 0.01 the product u · v starts too flat to learn from
        nn.init.normal_(self.item.weight, std=0.1)
        nn.init.zeros_(self.bias.weight)

    def forward(self, history: Tensor, candidates: Tensor) -> Tensor:
        user = self.user(candidates.new_zeros(len(candidates), 1))  # [B, 1, d]
        item = self.item(candidates)  # [B, M, d]
        bias = self.bias(candidates)  # [B, M, 1]
        logits: Tensor = (user * item).sum(-1) + bias.squeeze(-1)  # [B, M]
        return logits

    def score_all(self, history: Tensor) -> Tensor:
        scores = self.user.weight @ self.item.weight.T + self.bias.weight.T  # [1, n_items]
        return scores.expand(len(history), -1)
