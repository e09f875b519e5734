"""Forward passes of the models that read a history: the state after it, and its product with every item vector.

    state = read(√d v₁ … √d v_t),    score(i) = state · vᵢ;    zero everywhere for an empty history

`learners/neural/models/` says what each reader is, and trains it; here is what it computes of one person's last
`max_length` known items, so nothing is padded, turned or masked, and only the last place of the last layer is worked
out where earlier ones do not reach it. Arrays are [B, L, …] only so that many histories of one item are read together.

Before there is a history a network has nothing to read. What it ranks by then is the mean, over items spread evenly
over the catalogue, of the scores after that item alone: what it expects after anything at all.

Sources: those of the models; Cho et al. 2014, https://arxiv.org/abs/1406.1078 (GRU, with PyTorch's reset gate after the
product); Gers et al. 2000 (LSTM); Ba et al. 2016, https://arxiv.org/abs/1607.06450 (layer norm).
"""

from __future__ import annotations

from abc import abstractmethod
from functools import cached_property

import numpy as np

from penchant.common.arrays import Float32, Int64
from penchant.common.errors import MalformedArtifact
from penchant.common.inference.scorer import MAX_HIDDEN, MAX_SIZE, Scorer, Weights, sigmoid

FAR = 64  # distances that attention tells apart
KERNEL = 3  # items in a pattern of the convolution
_PROBES = 512  # items that stand for all before there is a history
_TOGETHER = 128  # of them, read at once
_EPSILON = np.float32(1e-5)  # of a layer norm


class SequenceScorer(Scorer):
    """A reader of histories over one item table."""

    def __init__(self, weights: Weights, n_items: int) -> None:
        self.n_items = n_items
        self.dim, self.max_length = weights.option("dim", MAX_SIZE), weights.option("max_length", MAX_SIZE)
        self.vectors = weights.items("item", n_items + 1, self.dim)[:n_items]  # the last row stands for padding

    @abstractmethod
    def read(self, items: Float32) -> Float32:
        """The state after the last place, float32[B, d], from scaled item vectors, float32[B, L, d], L ≥ 1."""

    @cached_property
    def nobody(self) -> Float32:  # type: ignore[override]  # worked out when first asked for
        probes = np.linspace(0, self.n_items - 1, min(self.n_items, _PROBES)).astype(np.int64)
        starts = range(0, len(probes), _TOGETHER)
        mean: Float32 = np.concatenate([self._read(probes[at : at + _TOGETHER, None]) for at in starts]).mean(0)
        return mean

    def person(self, history: Int64) -> Float32:
        recent = self.known(history)[-self.max_length :]
        return self._read(recent[None])[0] if len(recent) else np.zeros(self.dim, np.float32)

    def scores_of(self, person: Float32) -> Float32:
        return self.vectors @ person

    def score_of(self, person: Float32, item: int) -> float:
        return float(self.vectors[item] @ person)

    def _read(self, items: Int64) -> Float32:
        return self.read(self.vectors[items] * np.float32(self.dim**0.5))


class Gru(SequenceScorer):
    def __init__(self, weights: Weights, n_items: int) -> None:
        super().__init__(weights, n_items)
        hidden = weights.option("hidden", MAX_HIDDEN)
        self._cells = _cells(weights, self.dim, hidden, gates=3)
        self._out = weights.linear("out", self.dim, hidden)

    def read(self, items: Float32) -> Float32:
        for cell in self._cells:
            items = _gru(cell, items)
        return _linear(self._out, items[:, -1])


class Lstm(SequenceScorer):
    def __init__(self, weights: Weights, n_items: int) -> None:
        super().__init__(weights, n_items)
        hidden = weights.option("hidden", MAX_HIDDEN)
        self._cells = _cells(weights, self.dim, hidden, gates=4)
        self._out = weights.linear("out", self.dim, hidden)

    def read(self, items: Float32) -> Float32:
        for cell in self._cells:
            items = _lstm(cell, items)
        return _linear(self._out, items[:, -1])


class ConvLstm(SequenceScorer):
    def __init__(self, weights: Weights, n_items: int) -> None:
        super().__init__(weights, n_items)
        hidden = weights.option("hidden", MAX_HIDDEN)
        patterns, bias = (
            weights.take("patterns.weight", hidden, self.dim, KERNEL),
            weights.take("patterns.bias", hidden),
        )
        self._patterns = patterns.transpose(0, 2, 1).reshape(hidden, KERNEL * self.dim), bias
        self._cells = _cells(weights, hidden, hidden, gates=4)
        self._out = weights.linear("out", self.dim, hidden)

    def read(self, items: Float32) -> Float32:
        n_histories, length, _ = items.shape
        before = np.zeros((n_histories, KERNEL - 1, self.dim), np.float32)
        padded = np.concatenate([before, items], 1)
        windows = np.concatenate([padded[:, s : s + length] for s in range(KERNEL)], 2)  # [B, L, KERNEL · d]
        found = np.maximum(_linear(self._patterns, windows), 0)
        found[:, 1:] = np.maximum(found[:, 1:], found[:, :-1])  # the right side is worked out first
        for cell in self._cells:
            found = _lstm(cell, found)
        return _linear(self._out, found[:, -1])


class Transformer(SequenceScorer):
    def __init__(self, weights: Weights, n_items: int) -> None:
        super().__init__(weights, n_items)
        heads, hidden = weights.option("heads", self.dim), weights.option("hidden", MAX_HIDDEN)
        if self.dim % heads:
            raise MalformedArtifact(f"a release of transformer whose {heads} heads do not share {self.dim} numbers")
        weights.fits(heads, self.max_length, self.max_length)
        weights.fits(self.max_length, hidden)
        layers = range(weights.option("layers"))
        self._blocks = [_Block(weights, f"blocks.{k}", self.dim, heads, hidden) for k in layers]
        self._norm = weights.take("norm.weight", self.dim), weights.take("norm.bias", self.dim)

    def read(self, items: Float32) -> Float32:
        for block in self._blocks[:-1]:
            items = block.read(items, items.shape[1])
        return _normed(self._norm, self._blocks[-1].read(items, 1)[:, -1])


class _Block:
    """Causal self-attention by distance, then two layers at each place."""

    def __init__(self, weights: Weights, name: str, dim: int, heads: int, hidden: int) -> None:
        self._heads = heads
        self._distance = weights.take(f"{name}.distance", heads, FAR)
        self._attention, self._feed = (
            (weights.take(f"{name}.{norm}.weight", dim), weights.take(f"{name}.{norm}.bias", dim))
            for norm in ("norm_attention", "norm_feed")
        )
        self._split = weights.linear(f"{name}.query_key_value", 3 * dim, dim)
        self._mix = weights.linear(f"{name}.mix", dim, dim)
        self._widen, self._narrow = (
            weights.linear(f"{name}.widen", hidden, dim),
            weights.linear(f"{name}.narrow", dim, hidden),
        )

    def read(self, x: Float32, n_last: int) -> Float32:
        """States of the last places only: float32[B, n_last, d] from float32[B, L, d]."""
        n_histories, length, dim = x.shape
        split = _linear(self._split, _normed(self._attention, x)).reshape(n_histories, length, 3, self._heads, -1)
        query, key, value = split.transpose(2, 0, 3, 1, 4)  # [B, heads, L, d/heads] each
        query, x = query[:, :, -n_last:], x[:, -n_last:]
        back = np.arange(length - n_last, length)[:, None] - np.arange(length)  # [n_last, L], places back
        bias = self._distance[:, np.clip(back, 0, FAR - 1)]
        bias[:, back < 0] = -np.inf
        looked = query @ key.swapaxes(2, 3) * np.float32(query.shape[-1] ** -0.5) + bias  # [B, heads, n_last, L]
        looked = np.exp(looked - looked.max(-1, keepdims=True))
        looked /= looked.sum(-1, keepdims=True)
        seen = (looked @ value).transpose(0, 2, 1, 3).reshape(n_histories, n_last, dim)
        x = x + _linear(self._mix, seen)
        wide = np.maximum(_linear(self._widen, _normed(self._feed, x)), 0)
        return x + _linear(self._narrow, wide)


_Cell = tuple[tuple[Float32, Float32], tuple[Float32, Float32]]
"""What a recurrent layer gives its gates of what it reads, and of its own last state."""


def _cells(weights: Weights, size: int, hidden: int, *, gates: int) -> list[_Cell]:
    """The layers of a recurrence, the lowest first."""
    weights.fits(weights.option("max_length", MAX_SIZE), gates, hidden)
    out = []
    for k in range(weights.option("layers")):
        read, own = (
            (
                weights.take(f"cell.weight_{which}_l{k}", gates * hidden, of),
                weights.take(f"cell.bias_{which}_l{k}", gates * hidden),
            )
            for which, of in (("ih", size if k == 0 else hidden), ("hh", hidden))
        )
        out.append((read, own))
    return out


def _gru(cell: _Cell, x: Float32) -> Float32:
    """States float32[B, L, h] of float32[B, L, ·]."""
    given, (carry, bias) = _linear(cell[0], x), cell[1]
    h = carry.shape[1]
    state, out = np.zeros((len(x), h), np.float32), np.empty((*x.shape[:2], h), np.float32)
    for t in range(x.shape[1]):
        own = state @ carry.T + bias
        gates = sigmoid(given[:, t, : 2 * h] + own[:, : 2 * h])
        new = np.tanh(given[:, t, 2 * h :] + gates[:, :h] * own[:, 2 * h :])
        state = new + gates[:, h:] * (state - new)
        out[:, t] = state
    return out


def _lstm(cell: _Cell, x: Float32) -> Float32:
    """States float32[B, L, h] of float32[B, L, ·]."""
    given, (carry, bias) = _linear(cell[0], x), cell[1]
    h = carry.shape[1]
    state, kept = np.zeros((2, len(x), h), np.float32)
    out = np.empty((*x.shape[:2], h), np.float32)
    for t in range(x.shape[1]):
        own = given[:, t] + (state @ carry.T + bias)
        come, forget = sigmoid(own[:, : 2 * h]).reshape(-1, 2, h).swapaxes(0, 1)
        kept = forget * kept + come * np.tanh(own[:, 2 * h : 3 * h])
        state = sigmoid(own[:, 3 * h :]) * np.tanh(kept)
        out[:, t] = state
    return out


def _linear(layer: tuple[Float32, Float32], x: Float32) -> Float32:
    out: Float32 = x @ layer[0].T + layer[1]
    return out


def _normed(layer: tuple[Float32, Float32], x: Float32) -> Float32:
    away = x - x.mean(-1, keepdims=True)
    spread = np.sqrt(np.square(away).mean(-1, keepdims=True) + _EPSILON)
    out: Float32 = away / spread * layer[0] + layer[1]
    return out
