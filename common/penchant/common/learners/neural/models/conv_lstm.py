"""A convolution finds short patterns of items, an LSTM carries them along.

    p_t = max(c_{t−1}, c_t)  with  c_t = relu(Σₛ Wₛ v_{t−s} + b), s = 0 … 2
    state_t = W h_t + b      with  h_t = LSTM(p_t, h_{t−1}),    interest in i = σ(state_t · vᵢ)

Convolution and pooling look back only and move one place at a time, so that each item keeps a state. σ makes each
item a yes or no of its own: the loss is binary cross-entropy against negatives, never a softmax.

Source: Zhou et al. 2015, A C-LSTM Neural Network for Text Classification, https://arxiv.org/abs/1511.08630,
section 3. They leave pooling out because it breaks the order; with stride 1 it keeps it.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from penchant.common.learners.neural.models.recurrence import carried
from penchant.common.learners.neural.models.sequence import Dropout, SequenceModel

KERNEL = 3  # items in one pattern
POOL = 2  # neighbouring patterns merged


class ConvLstm(SequenceModel):
    """A causal convolution and pooling under an LSTM.

    Args:
        dim: size d of an item vector.
        hidden: number h of patterns and size of the carried state.
        layers: LSTM cells on top of each other.
        dropout: share of each item vector hidden in training.
    """

    needs_negatives: ClassVar[bool] = True

    def __init__(
        self,
        n_items: int,
        *,
        dim: int = 32,
        hidden: int = 64,
        layers: int = 1,
        dropout: float = 0.2,
        max_length: int = 50,
    ) -> None:
        super().__init__(n_items, dim=dim, max_length=max_length)
        self.dropout = Dropout(dropout, None, dim)
        self.patterns = nn.Conv1d(dim, hidden, KERNEL)
        self.cell = nn.LSTM(hidden, hidden, num_layers=layers, batch_first=True)
        self.out = nn.Linear(hidden, dim)

    def read(self, items: Tensor) -> Tensor:
        hidden, _ = self.cell(self._pooled(items))  # [B, L, h]
        states: Tensor = self.out(hidden)  # [B, L, d]
        return states

    def read_stacked(self, items: Tensor) -> Tensor:
        states: Tensor = self.out(carried(self.cell, self._pooled(items)))  # [B, L, d]
        return states

    def _pooled(self, items: Tensor) -> Tensor:
        """The strongest of each two neighbouring patterns: float32[B, L, h]."""
        x = self.dropout(items).transpose(1, 2)  # [B, d, L]
        x = torch.relu(self.patterns(F.pad(x, (KERNEL - 1, 0))))  # [B, h, L]
        x = F.max_pool1d(F.pad(x, (POOL - 1, 0)), POOL, stride=1)  # [B, h, L]; the zeros added lose to any pattern
        return x.transpose(1, 2)
