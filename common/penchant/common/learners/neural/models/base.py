"""What every interest model answers: logits of interest in candidate items, given what one person did.

Training compares an item the person chose with items drawn from the catalogue. One choice and its k draws are a
*group*; with logits s₀ of the choice and s₁ … sₖ of the draws, and σ the logistic function, its binary cross-entropy is

    loss = −( log σ(s₀) + Σⱼ₌₁ᵏ log(1 − σ(sⱼ)) ) / (1 + k) = ( Σⱼ₌₀ᵏ softplus(sⱼ) − s₀ ) / (1 + k)

A group is also what interaction-level privacy clips as one sample.

Source: He et al. 2017, Neural Collaborative Filtering, https://arxiv.org/abs/1708.05031, equation 7.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from penchant.common.arrays import Int32, Int64

CHUNK = 8192  # items scored at once, so that a large catalogue fits a phone's memory


class InterestModel(nn.Module, ABC):
    """Logits of interest in candidate items, given what one person did.

    Attributes:
        item_tables: names of parameters whose first axis is the item position. A group of a model that reads
            no history touches only the rows it names; a softmax over the catalogue touches every row.
        private: names of parameters that belong to one person and never leave the device.
        linear: the item table in which logits are linear, up to a term that is the same for everybody; then the
            person's vector has a closed form. None where there is no such table.
        reads_history: a training sample reads other interactions of the person, so interaction-level privacy
            is refused.
        n_items: size of the catalogue.
        padding: index that fills a short history on the left, = n_items.
    """

    item_tables: ClassVar[tuple[str, ...]]
    private: ClassVar[tuple[str, ...]] = ()
    linear: ClassVar[str | None] = None
    reads_history: ClassVar[bool]

    def __init__(self, n_items: int) -> None:
        super().__init__()
        self.n_items = n_items
        self.padding = n_items

    @abstractmethod
    def forward(self, history: Tensor, candidates: Tensor) -> Tensor:
        """Logits float32[B, M].

        Args:
            history: int64[B, L], item positions, oldest first, padded on the left.
            candidates: int64[B, M], item positions.
        """

    @abstractmethod
    def score_all(self, history: Tensor) -> Tensor:
        """Logits float32[B, n_items] of the whole catalogue; nothing of size B × n_items × dim is built."""


def scored_in_chunks(model: InterestModel, history: Tensor) -> Tensor:
    """`score_all` of a model that reads no history, by its `forward`."""
    items = torch.arange(model.n_items, device=history.device)[None]  # [1, n_items]
    scores = torch.cat([model(history, chunk) for chunk in torch.split(items, CHUNK, 1)], 1)  # [1, n_items]
    return scores.expand(len(history), -1)


def group_loss(logits: Tensor) -> Tensor:
    """Binary cross-entropy of each group, its mean over 1 + k places: float32[...] from logits[..., 1 + k].

    >>> round(float(group_loss(torch.tensor([0.0, 0.0]))), 4)  # log 2: knows nothing
    0.6931
    """
    return (F.softplus(logits).sum(-1) - logits[..., 0]) / logits.shape[-1]


def pad(histories: Iterable[Sequence[int] | Int32 | Int64], length: int, n_items: int) -> Tensor:
    """The last `length` known items of each history, padded on the left with `n_items`: int64[B, length].

    Positions outside [0, n_items) are dropped first: a model cannot know an item newer than itself.

    >>> pad([[4, 0, 1, 2], [], [2, 9]], length=3, n_items=5).tolist()
    [[0, 1, 2], [5, 5, 5], [5, 5, 2]]
    """
    rows = []
    for history in histories:
        items = np.asarray(history, np.int64)
        known = items[(items >= 0) & (items < n_items)][-length:]
        rows.append(np.pad(known, (length - len(known), 0), constant_values=n_items))
    return torch.from_numpy(np.array(rows, np.int64).reshape(-1, length))
