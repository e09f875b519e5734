"""Scores of the models whose person is a vector: it is fitted to the history on the device, all else as released.

    u ← u − lr ∂/∂u mean over groups of ( Σⱼ softplus(sⱼ) − s₀ ) / (1 + k)          `fold_in_steps` times

A group is an interaction and its k negatives, drawn from a stream that the history itself seeds, so that equal
histories score equally; it is what `local.fitted_scores` does in PyTorch. Groups meet few items many times each, so an
item's part of the network is worked out once, and its slopes are counted: with n its places in all groups, p those it
was chosen in and S groups, ∂/∂s = (n σ(s) − p) / (S (1 + k)). `learners/neural/models/` says what the networks are.

Source: Singhal et al. 2021, Federated Reconstruction, https://arxiv.org/abs/2102.03448, Algorithm 1.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from functools import lru_cache

import numpy as np

from penchant.common import config
from penchant.common.arrays import Float32, Int32, Int64
from penchant.common.errors import InvalidConfig, MalformedArtifact
from penchant.common.inference.scorer import LARGEST, MAX_ARRAY, MAX_HIDDEN, MAX_SIZE, Scorer, Weights, sigmoid
from penchant.common.learners.training import LocalTraining, can_train, groups, seed_of

CHUNK = 8192  # items scored at once, so that a large catalogue fits a phone's memory; fewer of a wide network
_MOST = 1024  # steps of a fit, and negatives of an interaction, that a device computes
_DRAWN = 1 << 20  # items in all groups of a fit; of a longer history the latest count

Layer = tuple[Float32, Float32]


class FittedScorer(Scorer):
    """A network over a person's vector and an item's."""

    nobody: Float32
    """float32[·], the vector that every fit starts from: the released one."""

    def __init__(self, weights: Weights, n_items: int) -> None:
        self.n_items = n_items
        try:
            self._training = config.decode(LocalTraining, weights.table("local"))
        except (InvalidConfig, TypeError) as error:
            raise MalformedArtifact(
                f"a release of {weights.name} with settings that cannot be read: {error!s:.100}"
            ) from None
        self._d, self._h = weights.option("dim", MAX_SIZE), weights.option("hidden", MAX_HIDDEN)
        self._chunk = min(CHUNK, MAX_ARRAY // 2 // (self._d + self._h))
        steps, negatives = self._training.fold_in_steps, self._training.negatives
        if type(steps) is not int or type(negatives) is not int or steps > _MOST or negatives > _MOST:
            raise MalformedArtifact(f"a release of {weights.name} whose steps or negatives are no number up to {_MOST}")
        if not self._training.fold_in_lr <= LARGEST:
            raise MalformedArtifact(f"a release of {weights.name} whose fold_in_lr is over {LARGEST:g}")

    @abstractmethod
    def part(self, items: Int64 | slice) -> Float32:
        """What items bring, whoever the person is: float32[M, ·]."""

    @abstractmethod
    def logits(self, person: Float32, part: Float32) -> Float32:
        """float32[M]."""

    @abstractmethod
    def slope(self, person: Float32, part: Float32, weight: Float32) -> Float32:
        """Σᵢ weightᵢ ∂ logitᵢ/∂ person: float32[·].

        Args:
            weight: float32[M].
        """

    def scores_of(self, person: Float32) -> Float32:
        size = self._chunk
        starts = range(0, self.n_items, size)
        return np.concatenate([self.logits(person, self.part(slice(at, at + size))) for at in starts])

    def score_of(self, person: Float32, item: int) -> float:
        return float(self.logits(person, self.part(slice(item, item + 1)))[0])

    def person(self, history: Int64) -> Float32:
        """Nobody's vector where there is nothing to fit it to, or nothing to draw against."""
        own: Int32 = self.known(history)[-(_DRAWN // (1 + self._training.negatives)) :].astype(np.int32)
        if not can_train(own, self.n_items):
            return self.nobody
        once = groups(own, self.n_items, replace(self._training, epochs=1), seed_of(own))  # [S, 1 + k]
        items, at = np.unique(once.reshape(-1), return_inverse=True)
        met = np.bincount(at, minlength=len(items)).astype(np.float32)
        chosen = np.bincount(at.reshape(once.shape)[:, 0], minlength=len(items)).astype(np.float32)
        person, rate, size = self.nobody, np.float32(self._training.fold_in_lr), self._chunk
        part = lru_cache(1)(lambda start: self.part(items[start : start + size].astype(np.int64)))  # mostly one
        for _ in range(self._training.fold_in_steps):
            slope = np.zeros_like(person)
            for start in range(0, len(items), size):
                here = slice(start, start + size)
                weight = (met[here] * sigmoid(self.logits(person, part(start))) - chosen[here]) / np.float32(once.size)
                slope += self.slope(person, part(start), weight)
            person = np.clip(person - rate * slope, -LARGEST, LARGEST).astype(np.float32)
        return person


class Mlp(FittedScorer):
    """logit(i) = w · relu(W [u, vᵢ] + c) + b + bᵢ. An item's part is W vᵢ + c and, last, b + bᵢ."""

    def __init__(self, weights: Weights, n_items: int) -> None:
        super().__init__(weights, n_items)
        d, h = self._d, self._h
        self.vectors = weights.items("item", n_items, d)
        self.nobody = weights.take("user.weight", 1, d)[0]
        self._first, (self._last, bias) = weights.linear("first", h, 2 * d), weights.linear("last", 1, h)
        self._bias = weights.take("bias.weight", n_items, 1) + bias

    def part(self, items: Int64 | slice) -> Float32:
        inner = self.vectors[items] @ self._first[0][:, self._d :].T + self._first[1]
        return np.hstack([inner, self._bias[items]])

    def logits(self, person: Float32, part: Float32) -> Float32:
        out: Float32 = np.maximum(self._inner(person, part), 0) @ self._last[0] + part[:, -1]
        return out

    def slope(self, person: Float32, part: Float32, weight: Float32) -> Float32:
        on = self._inner(person, part) > 0  # [M, h]
        out: Float32 = (weight @ on * self._last[0]) @ self._first[0][:, : self._d]
        return out

    def _inner(self, person: Float32, part: Float32) -> Float32:
        out: Float32 = np.add(part[:, :-1], self._first[0][:, : self._d] @ person, dtype=np.float32)
        return out


class NeuMF(FittedScorer):
    """logit(i) = w · [uᴳ ∘ vᴳᵢ, relu(W₂ relu(W₁ [uᴹ, vᴹᵢ]))] + b. An item's part is vᴳᵢ beside W₁ vᴹᵢ + c.

    The person is [uᴳ, uᴹ].
    """

    def __init__(self, weights: Weights, n_items: int) -> None:
        super().__init__(weights, n_items)
        d, h = self._d, self._h
        self._product, self._network = (weights.items(f"item_{kind}", n_items, d) for kind in ("product", "network"))
        self.vectors = np.hstack([self._product, self._network])
        self.nobody = np.hstack([weights.take(f"user_{kind}.weight", 1, d)[0] for kind in ("product", "network")])
        self._first, self._second = weights.linear("first", h, 2 * d), weights.linear("second", h // 2, h)
        (last,), (self._bias,) = weights.linear("last", 1, d + h // 2)
        self._to_product, self._to_network = last[:d], last[d:]

    def part(self, items: Int64 | slice) -> Float32:
        return np.hstack([self._product[items], self._network[items] @ self._first[0][:, self._d :].T + self._first[1]])

    def logits(self, person: Float32, part: Float32) -> Float32:
        product = part[:, : self._d] @ (person[: self._d] * self._to_product)
        network = np.maximum(self._inner(person, part)[1], 0) @ self._to_network
        out: Float32 = product + network + self._bias
        return out

    def slope(self, person: Float32, part: Float32, weight: Float32) -> Float32:
        first, second = self._inner(person, part)
        back = (weight[:, None] * (second > 0) * self._to_network) @ self._second[0]  # [M, h]
        network = (back * (first > 0)).sum(0) @ self._first[0][:, : self._d]
        return np.hstack([weight @ part[:, : self._d] * self._to_product, network])

    def _inner(self, person: Float32, part: Float32) -> tuple[Float32, Float32]:
        """Both layers before their relu: float32[M, h] and float32[M, h/2]."""
        first: Float32 = np.add(part[:, self._d :], self._first[0][:, : self._d] @ person[self._d :], dtype=np.float32)
        second: Float32 = np.maximum(first, 0) @ self._second[0].T + self._second[1]
        return first, second
