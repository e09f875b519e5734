"""What a plan says of a network and of its training on a device, and the examples drawn there: all without PyTorch.

A device that only scores (`inference/`) reads these too, and has no PyTorch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from penchant.common import draws
from penchant.common.arrays import Int32
from penchant.common.errors import InvalidConfig
from penchant.common.negatives import negatives

Option = int | float
DIM = 32
"""Size of an item vector, of models whose options name none."""

_RECURRENT: Mapping[str, Option] = {"hidden": 64, "layers": 1, "dropout": 0.2, "max_length": 50}

OPTIONS: Mapping[str, Mapping[str, Option]] = {
    "mf": {},
    "mlp": {"hidden": 32},
    "neumf": {"hidden": 32},
    "gru": _RECURRENT,
    "lstm": _RECURRENT,
    "cnn-lstm": _RECURRENT,
    "transformer": {"dim": 64, "hidden": 128, "layers": 2, "heads": 2, "dropout": 0.3, "max_length": 200},
}
"""The options of each model, with its defaults; what they are: `ModelConfig`."""


@dataclass(frozen=True, kw_only=True)
class LocalTraining:
    """What a device does with the weights it gets. Public.

    Attributes:
        epochs: passes over the own history.
        batch: groups in one step; a step follows the sum of their gradients.
        lr: step size for each group.
        negatives: items drawn beside each positive.
        fold_in_steps: gradient steps that fit the person's vector alone, where there is no closed form.
        fold_in_lr: their size, against the mean over groups.
        proximal: μ ≥ 0 of FedProx, below 1/lr, where a step would leap past the received weights.
    """

    epochs: int = 1
    batch: int = 64
    lr: float = 0.1
    negatives: int = 4
    fold_in_steps: int = 16
    fold_in_lr: float = 5.0
    proximal: float = 0.0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "negatives"):
            if getattr(self, name) < 1:
                raise InvalidConfig(f"{name} must be ≥ 1, not {getattr(self, name)}")
        for name in ("lr", "fold_in_lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise InvalidConfig(f"{name} must be positive and finite, not {getattr(self, name)}")
        if self.fold_in_steps < 0:
            raise InvalidConfig(f"fold_in_steps must be ≥ 0, not {self.fold_in_steps}")
        if not 0 <= self.proximal * self.lr < 1:  # also refuses NaN
            raise InvalidConfig(f"proximal must be ≥ 0 and below 1/lr = {1 / self.lr:g}, not {self.proximal}")


def can_train(history: Int32, n_items: int) -> bool:
    """Whether there is an item to learn from and one to draw against it."""
    return 0 < len(np.unique(history)) < n_items


def groups(history: Int32, n_items: int, config: LocalTraining, seed: int) -> Int32:
    """int32[epochs · n, 1 + k]: each epoch's groups in an order of its own, the positive first."""
    n = len(history)
    pool, *orders = draws.children(seed, 1 + config.epochs)
    order = np.concatenate([draws.permutation(own, n) for own in orders])
    drawn = negatives(history, n_items, (len(order), config.negatives), pool)
    return np.column_stack([history[order], drawn]).astype(np.int32)


def seed_of(history: Int32) -> int:
    """Of the draws of a fit that scores: equal histories score equally."""
    return int.from_bytes(hashlib.sha256(history.astype("<i4").tobytes()).digest()[:8], "little")
