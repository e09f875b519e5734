"""What sequence models share: a state after each item of a history, and a loss on the item that came next.

    state_t = read(√d v₁ … √d v_t),    logit(i) = state_t · vᵢ    with the same vectors v read and scored.

A vector v starts with norm 1, so that a logit starts small; √d v is what a layer that reads it was made for.

The person is their history and no parameter, so no parameter is private; and one interaction enters many training
samples, so interaction-level privacy is refused.

Histories arrive padded on the left. Here each row is turned until its first item stands first, read, and turned back.
A causal reader then meets padding only after every real item, so nothing has to be masked inside it; the padding row
of the table, which server noise reaches like any other, never matters; and the state after t items is the one that a
history of just those t items gives.

Source of the loss: a softmax over the catalogue, Klenitskiy and Vasilev 2023, Turning Dross Into Gold Loss,
https://arxiv.org/abs/2309.07602; with negatives, binary cross-entropy, Kang and McAuley 2018,
https://arxiv.org/abs/1808.09781, where few of them make scores overconfident (Petrov and Macdonald 2023, gSASRec,
https://arxiv.org/abs/2308.07192).
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from penchant.common.errors import InvalidConfig
from penchant.common.learners.neural.models.base import InterestModel, group_loss


class SequenceModel(InterestModel):
    """A causal reader of histories over one item table.

    Attributes:
        max_length: most items that `encode` reads.
        needs_negatives: `sequence_loss` is defined only with negatives.
    """

    item_tables: ClassVar[tuple[str, ...]] = ("item.weight",)
    reads_history: ClassVar[bool] = True
    needs_negatives: ClassVar[bool] = False

    def __init__(self, n_items: int, *, dim: int, max_length: int) -> None:
        super().__init__(n_items)
        self.max_length = max_length
        self.item = nn.Embedding(n_items + 1, dim, padding_idx=n_items)  # the last row stands for padding
        nn.init.normal_(self.item.weight, std=dim**-0.5)  # a vector of norm 1
        nn.init.zeros_(self.item.weight[n_items].detach())

    @abstractmethod
    def read(self, items: Tensor) -> Tensor:
        """States float32[B, L, d] from scaled item vectors float32[B, L, d]; state t sees places ≤ t only."""

    def encode(self, history: Tensor) -> Tensor:
        """The state after each item: float32[B, L, d], zero in padded places.

        Args:
            history: int64[B, L], padded on the left, L ≤ max_length.

        Raises:
            InvalidConfig: L > max_length.
        """
        if history.shape[1] > self.max_length:
            raise InvalidConfig(f"history has {history.shape[1]} places; max_length is {self.max_length}")
        real = history != self.padding  # [B, L]
        n_padded = (~real).sum(1)  # [B]
        items = self.item(history) * self.item.embedding_dim**0.5  # [B, L, d]
        states = self.read(_turn(items, n_padded))  # [B, L, d]
        return _turn(states, -n_padded).masked_fill(~real[:, :, None], 0.0)

    def forward(self, history: Tensor, candidates: Tensor) -> Tensor:
        last = self.encode(history)[:, -1, :, None]  # [B, d, 1]
        logits: Tensor = (self.item(candidates) @ last).squeeze(-1)  # [B, M]
        return logits

    def score_all(self, history: Tensor) -> Tensor:
        return self.encode(history)[:, -1] @ self.item.weight[: self.n_items].T  # [B, n_items]

    def sequence_loss(self, history: Tensor, negatives: Tensor | None = None) -> Tensor:
        """The next-item loss of each history, averaged over its items but the first: float32[B].

        A history of fewer than two items costs 0.

        Args:
            history: int64[B, L], padded on the left, L ≤ max_length + 1: the last item is only predicted.
            negatives: int64[B, L, k], drawn against the item in the same place; the first place is not read.
                Without them the loss is the cross-entropy of a softmax over the catalogue.

        Raises:
            InvalidConfig: no negatives for a model that needs them, or L > max_length + 1.
        """
        states = self.encode(history[:, :-1])  # [B, L-1, d]
        follows = history[:, :-1] != self.padding  # [B, L-1], places with an item before them
        chosen = history[:, 1:]  # [B, L-1]
        if negatives is not None:
            groups = torch.cat([chosen[:, :, None], negatives[:, 1:]], 2)  # [B, L-1, 1+k]
            losses = group_loss((self.item(groups) @ states[..., None]).squeeze(-1))  # [B, L-1]
        elif self.needs_negatives:
            raise InvalidConfig(f"{type(self).__name__} is trained against negatives; none were given")
        else:
            logits = states @ self.item.weight[: self.n_items].T  # [B, L-1, n_items]
            chosen = chosen.masked_fill(~follows, 0)  # any item: masked below
            losses = F.cross_entropy(logits.transpose(1, 2), chosen, reduction="none")  # [B, L-1]
        return (losses * follows).sum(1) / follows.sum(1).clamp(min=1)


def _turn(rows: Tensor, places: Tensor) -> Tensor:
    """Moves row b of float[B, L, d] left by places[b], around the end."""
    length = rows.shape[1]
    at = (torch.arange(length, device=rows.device) + places[:, None]) % length  # [B, L]
    return rows.gather(1, at[:, :, None].expand_as(rows))
