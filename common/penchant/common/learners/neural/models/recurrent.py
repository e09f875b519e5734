"""A recurrent reader: a GRU or an LSTM carries one state from item to item.

    h_t = cell(v_t, h_{t−1}),    state_t = W h_t + b

Source: Hidasi et al. 2016, Session-based Recommendations with Recurrent Neural Networks,
https://arxiv.org/abs/1511.06939, with one item table for reading and scoring.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from penchant.common.learners.neural.models.recurrence import carried
from penchant.common.learners.neural.models.sequence import Dropout, SequenceModel


class Recurrent(SequenceModel):
    """A GRU or LSTM over item vectors.

    Args:
        kind: the cell.
        dim: size d of an item vector.
        hidden: size h of the carried state.
        layers: cells on top of each other.
        dropout: share of each item vector hidden in training.
    """

    def __init__(
        self,
        n_items: int,
        *,
        kind: Literal["gru", "lstm"],
        dim: int = 32,
        hidden: int = 64,
        layers: int = 1,
        dropout: float = 0.2,
        max_length: int = 50,
    ) -> None:
        super().__init__(n_items, dim=dim, max_length=max_length)
        cell = nn.GRU if kind == "gru" else nn.LSTM
        self.dropout = Dropout(dropout, None, dim)
        self.cell = cell(dim, hidden, num_layers=layers, batch_first=True)
        self.out = nn.Linear(hidden, dim)

    def read(self, items: Tensor) -> Tensor:
        hidden, _ = self.cell(self.dropout(items))  # [B, L, h]
        states: Tensor = self.out(hidden)  # [B, L, d]
        return states

    def read_stacked(self, items: Tensor) -> Tensor:
        states: Tensor = self.out(carried(self.cell, self.dropout(items)))  # [B, L, d]
        return states
