"""What sequence models share: a state after each item of a history, and a loss on the item that came next.

    state_t = read(√d v₁ … √d v_t),    logit z(i) = state_t · vᵢ    with the same vectors v read and scored.

A vector v starts short, so that a logit starts small; √d v is near what a layer that reads it was made for.

Without negatives a place t costs the cross-entropy of a softmax over the items that were not met up to t, against a
target q that keeps ε for all n items alike, q(i) = (1 − ε) [i = next] + ε/n:

    loss_t = log Σ_new exp z(i) − Σᵢ q(i) z(i) = log Σ_new exp z(i) − z(next) + ε (z(next) − state_t · v̄)

v̄ is the mean vector of all items, met or not, so that smoothing costs one product. Items met before are never
recommended, so nothing is spent on pushing them down; the next item counts as new even where it repeats one. A history
of m places costs Σ loss_t / √m: between the mean, in which a long history says no more than a short one, and the sum,
in which it outweighs many.

The person is their history and no parameter, so no parameter is private; and one interaction enters many training
samples, so interaction-level privacy is refused.

Histories arrive padded on the left. Columns of padding alone are cut off. Each row is turned until its first item
stands first, read, and turned back. A causal reader then meets padding only after every real item, so nothing has to be
masked inside it; the padding row of the table, which server noise reaches like any other, never matters; and the state
after t items is the one that a history of just those t items gives.

Items of one time have no order (a clock of seconds, a form sent as a whole): training reads them in a new one each
time. In ML-100K that is half of all neighbours, and the order that its file gives them says nothing.

Sources of the loss: a softmax over the catalogue, Klenitskiy and Vasilev 2023, Turning Dross Into Gold Loss,
https://arxiv.org/abs/2309.07602; smoothing, Szegedy et al. 2016, https://arxiv.org/abs/1512.00567, section 7; with
negatives, binary cross-entropy, Kang and McAuley 2018, https://arxiv.org/abs/1808.09781, where few of them make scores
overconfident (Petrov and Macdonald 2023, gSASRec, https://arxiv.org/abs/2308.07192).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from penchant.common.arrays import Float32, Int32
from penchant.common.errors import InvalidConfig
from penchant.common.interactions import History
from penchant.common.learners.neural.models.base import InterestModel, group_loss
from penchant.common.learners.neural.models.softmax import SoftmaxLoss

TOGETHER = 64  # histories that are read at once to be scored


class Dropout(nn.Dropout):
    """Hides a share p of its input in training: what torch draws, or what it is given as the buffer `kept`.

    Given, so that a person's draws come from their own stream, whoever trains beside them.

    Args:
        p: the share.
        sizes: of one history's input, with None for the number of its places.
    """

    kept: Tensor | None

    def __init__(self, p: float, *sizes: int | None) -> None:
        super().__init__(p)
        self._sizes = sizes
        self.register_buffer("kept", None, persistent=False)

    def shape(self, length: int) -> tuple[int, ...]:
        """Of `kept`, for a history of so many places."""
        return tuple(length if size is None else size for size in self._sizes)

    def draw(self, length: int, random: np.random.Generator) -> Float32:
        """0 where a value is hidden, else what makes up for those: float32[shape]; p to a multiple of 2⁻¹⁶."""
        shape, hidden = self.shape(length), round(self.p * 2**16)
        drawn = np.frombuffer(random.bytes(2 * math.prod(shape)), np.uint16).reshape(shape)
        return (drawn >= hidden) * np.float32(2**16 / (2**16 - hidden))

    def forward(self, input: Tensor) -> Tensor:  # torch's name
        return super().forward(input) if self.kept is None else input * self.kept


class SequenceModel(InterestModel):
    """A causal reader of histories over one item table. What it hides in training it hides with `Dropout`.

    Attributes:
        max_length: most items that `encode` reads.
        needs_negatives: `sequence_loss` is defined only with negatives.
        first_norm: of an item vector, before any training.
        smoothing: ε of the softmax loss, in [0, 1).
    """

    item_tables: ClassVar[tuple[str, ...]] = ("item.weight",)
    reads_history: ClassVar[bool] = True
    needs_negatives: ClassVar[bool] = False
    first_norm: ClassVar[float] = 1.0
    smoothing: ClassVar[float] = 0.1

    def __init__(self, n_items: int, *, dim: int, max_length: int) -> None:
        super().__init__(n_items)
        self.max_length = max_length
        self.item = nn.Embedding(n_items + 1, dim, padding_idx=n_items)  # the last row stands for padding
        nn.init.normal_(self.item.weight, std=self.first_norm * dim**-0.5)
        nn.init.zeros_(self.item.weight[n_items].detach())

    @abstractmethod
    def read(self, items: Tensor) -> Tensor:
        """States float32[B, L, d] from scaled item vectors float32[B, L, d]; state t sees places ≤ t only."""

    def read_stacked(self, items: Tensor) -> Tensor:
        """`read` in operations that `torch.func.vmap` can batch: for a reader in which one can't be."""
        return self.read(items)

    def encode(self, history: Tensor) -> Tensor:
        """The state after each item: float32[B, L, d], zero in padded places.

        Args:
            history: int64[B, L], padded on the left, L ≤ max_length.

        Raises:
            InvalidConfig: L > max_length.
        """
        return self._encode(history, self.read)

    def _encode(self, history: Tensor, read: Callable[[Tensor], Tensor]) -> Tensor:
        if history.shape[1] > self.max_length:
            raise InvalidConfig(f"history has {history.shape[1]} places; max_length is {self.max_length}")
        real = history != self.padding  # [B, L]
        n_padded = (~real).sum(1)  # [B]
        items = self.item(history) * self.item.embedding_dim**0.5  # [B, L, d]
        states = read(_turn(items, n_padded))  # [B, L, d]
        return _turn(states, -n_padded).masked_fill(~real[:, :, None], 0.0)

    def forward(self, history: Tensor, candidates: Tensor) -> Tensor:
        last = self._last(history)[:, :, None]  # [B, d, 1]
        logits: Tensor = (self.item(candidates) @ last).squeeze(-1)  # [B, M]
        return logits

    def score_all(self, history: Tensor) -> Tensor:
        order = (history != self.padding).sum(1).argsort()  # like lengths together, so that little is padding
        states = torch.cat([self._last(history[at]) for at in torch.split(order, TOGETHER)])[order.argsort()]  # [B, d]
        return states @ self.item.weight[: self.n_items].T  # [B, n_items]

    def _last(self, history: Tensor) -> Tensor:
        """The state after the whole history: float32[B, d]."""
        return self.encode(history[:, self._empty(history, keep=1) :])[:, -1]

    def _empty(self, history: Tensor, keep: int) -> int:
        """How many leading columns hold padding alone; at least `keep` columns are left."""
        real = (history != self.padding).any(0)  # [L]
        return max(0, min(int(real.int().argmax()), len(real) - keep))

    def sequence_loss(self, history: Tensor, negatives: Tensor | None = None) -> Tensor:
        """The next-item loss of each history over its items but the first: float32[B].

        With negatives the mean over those items, without them the sum over the root of their number. A history of fewer
        than two items costs 0.

        Args:
            history: int64[B, L], padded on the left, L ≤ max_length + 1: the last item is only predicted.
            negatives: int64[B, L, k], drawn against the item in the same place; the first place is not read.
                Without them the loss is the softmax over the catalogue that is described above.

        Raises:
            InvalidConfig: no negatives for a model that needs them, or L > max_length + 1.
        """
        empty = self._empty(history, keep=2)
        history = history[:, empty:]
        states = self.encode(history[:, :-1])  # [B, L-1, d]
        if negatives is not None:
            return self._binary_loss(states, history, negatives[:, empty:])
        self._can_do_without()
        return self._softmax_loss(states, history)

    def stacked_loss(self, history: Tensor, negatives: Tensor | None = None) -> Tensor:
        """`sequence_loss` of one history, float32[], for `torch.func.vmap`: no shape depends on a value.

        Args:
            history: int64[L], as there.
            negatives: int64[L, k], as there.

        Raises:
            InvalidConfig: as there.
        """
        states = self._encode(history[None, :-1], self.read_stacked)  # [1, L-1, d]
        if negatives is not None:
            return self._binary_loss(states, history[None], negatives[None])[0]
        self._can_do_without()
        cost: Tensor
        cost, *_ = SoftmaxLoss.apply(states[0], self.item.weight, history, self.smoothing)  # type: ignore[no-untyped-call]  # torch's
        return cost

    def _can_do_without(self) -> None:
        if self.needs_negatives:
            raise InvalidConfig(f"{type(self).__name__} is trained against negatives; none were given")

    def _binary_loss(self, states: Tensor, history: Tensor, negatives: Tensor) -> Tensor:
        follows = history[:, :-1] != self.padding  # [B, L-1], places with an item before them
        groups = torch.cat([history[:, 1:, None], negatives[:, 1:]], 2)  # [B, L-1, 1+k]
        losses = group_loss((self.item(groups) @ states[..., None]).squeeze(-1))  # [B, L-1]
        return (losses * follows).sum(1) / follows.sum(1).clamp(min=1)

    def _softmax_loss(self, states: Tensor, history: Tensor) -> Tensor:
        before = history[:, :-1]  # [B, L-1]
        follows = before != self.padding  # [B, L-1], places with an item before them
        row, place = follows.nonzero(as_tuple=True)  # int64[P] each, of every such place
        states, chosen = states[row, place], history[row, place + 1]  # [P, d], [P]
        vectors = self.item.weight[: self.n_items]
        wanted = (states * self.item(chosen)).sum(1)  # [P]
        columns = torch.arange(before.shape[1], device=history.device)
        met = torch.where(follows[row] & (columns <= place[:, None]), before[row], before[row, place, None])  # [P, L-1]
        new = (states @ vectors.T).scatter_(1, met, -torch.inf).scatter_(1, chosen[:, None], wanted[:, None])
        losses = F.cross_entropy(new, chosen, reduction="none")  # [P] ← [P, n_items]
        losses = losses + self.smoothing * (wanted - states @ vectors.mean(0))
        costs: Tensor = losses.new_zeros(len(history)).index_add(0, row, losses) / follows.sum(1).clamp(min=1).sqrt()
        return costs


def untied(history: History, random: np.random.Generator) -> Int32:
    """The items, those of one time in an order drawn anew: int32[n].

    A time of 0 is none, and such items stay in the order they came in.

    >>> untied(History.of([3, 1, 2]), np.random.default_rng(0)).tolist()
    [3, 1, 2]
    """
    later = (np.diff(history.times, prepend=-1) != 0) | (history.times == 0)
    return history.items[np.lexsort((random.random(len(history)), np.cumsum(later)))]


def _turn(rows: Tensor, places: Tensor) -> Tensor:
    """Moves row b of float[B, L, d] left by places[b], around the end."""
    length = rows.shape[1]
    at = (torch.arange(length, device=rows.device) + places[:, None]) % length  # [B, L]
    return rows.gather(1, at[:, :, None].expand_as(rows))
