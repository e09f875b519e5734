"""What a device scores with when a release is a network's weights: the forward pass in NumPy, as PyTorch computes it.

    history ──► scores of every item, float32, of the released weights alone; adapters are worked in when they are read

A release says which network by its manifest's learner and settings; every array is asked for by name and shape, and
what does not fit is refused before it is in use. Retired items are left to whoever makes a list.

Beside the scores a network gives an `ItemSide`, over its own item table by direction, so that what it says nothing
about (topic shares, drift, how sure the device is) is the same Bayesian linear model as for other releases.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np

from penchant.common.arrays import AnyFloat, Arrays, Float32, Int64
from penchant.common.errors import MalformedArtifact
from penchant.common.learners.training import DIM, OPTIONS
from penchant.common.taste import ItemSide, TasteConfig

MAX_SIZE = 1024
"""Of an item vector, and items of a history that are read: a device's work grows with their powers."""
MAX_HIDDEN = 8192
"""Of a layer between others."""
MAX_ARRAY = 1 << 23
"""Numbers in an array that scoring makes. Some six are there at once: 200 MB, beside the release itself."""
LARGEST = np.float32(1e6)
"""Of a weight, and of what is fitted: products of so few and such numbers are finite in float32."""
TASTE = TasteConfig(decay=0.8, popularity=0.2)
"""Of the linear model over a network's item table: mf's."""


class Scorer(ABC):
    """One release's network, ready to score. It keeps nothing of a person.

    Attributes:
        n_items: size of the catalogue.
        max_length: items of the longest history that a release is tried with before it is in use.
        vectors: float32[n_items, d], the network's item table.
        nobody: as `person`, to rank by before there is a history.
    """

    n_items: int
    max_length: int = 63
    vectors: Float32
    nobody: Float32

    @abstractmethod
    def person(self, history: Int64) -> Float32:
        """What the network makes of a person, float32[·]: the state after their history, or a vector fitted to it.

        Args:
            history: int64[n], positions, oldest first; those outside the catalogue are left out.
        """

    @abstractmethod
    def scores_of(self, person: Float32) -> Float32:
        """float32[n_items], the network's logits; the higher, the better."""

    @abstractmethod
    def score_of(self, person: Float32, item: int) -> float:
        """One of them, without the others."""

    def scores(self, history: Int64) -> Float32:
        """float32[n_items], as PyTorch computes them."""
        return self.scores_of(self.person(history))

    def known(self, history: Int64) -> Int64:
        """The history without positions outside the catalogue."""
        return history[(history >= 0) & (history < self.n_items)]

    @cached_property
    def side(self) -> ItemSide:
        """The item table by direction, as mf's; popularity is what it scores nobody, brought to [0, 1]."""
        length = np.linalg.norm(self.vectors, axis=1, keepdims=True)
        directions = (self.vectors / np.maximum(length, 1e-12)).astype(np.float32)
        start = self.scores_of(self.nobody)
        reach = float(np.ptp(start))
        popularity = (start - start.min()) / reach if reach > 0 else np.zeros_like(start)
        return ItemSide(directions, popularity.astype(np.float32), TASTE)


class Weights:
    """A release's arrays and settings, each asked for by name, and what is asked for checked.

    Args:
        state: of the release.
        settings: of its manifest.

    Attributes:
        name: of the network, as its settings have it.
    """

    def __init__(self, state: Arrays, settings: Mapping[str, Any]) -> None:
        self._state, self.settings = state, settings
        model = self.table("model")
        self.name = str(model.get("name"))
        self._options = {"dim": DIM, **OPTIONS.get(self.name, {}), **model}

    def table(self, name: str) -> Mapping[str, Any]:
        """One of the settings that are settings themselves.

        Raises:
            MalformedArtifact: it is none.
        """
        found = self.settings.get(name, {})
        if not isinstance(found, Mapping):
            raise MalformedArtifact(f"a release whose setting {name!r} is no table of settings; ask the operator")
        return found

    def option(self, name: str, most: int = 1 << 20) -> int:
        """One of the network's sizes, from 1 to the most.

        Raises:
            MalformedArtifact: it is another.
        """
        value = self._options.get(name)
        if type(value) is not int or not 1 <= value <= most:
            raise MalformedArtifact(f"a release of {self.name} with {name} {value!r:.20}; from 1 to {most} can be read")
        return value

    def fits(self, *sizes: int) -> None:
        """
        Raises:
            MalformedArtifact: an array of these sizes is more than a device makes to score.
        """
        if math.prod(sizes) > MAX_ARRAY:
            raise MalformedArtifact(
                f"a release of {self.name} that makes {' · '.join(map(str, sizes))} numbers of one history, "
                f"over {MAX_ARRAY}: ask the operator for a smaller one"
            )

    def take(self, name: str, *shape: int) -> Float32:
        """float32[shape].

        Raises:
            MalformedArtifact: it is missing, of another type or shape, or has a number over `LARGEST`.
        """
        values = self._state.get(name)
        if values is None:
            raise MalformedArtifact(f"a release of {self.name} without its weights {name!r}; ask the operator")
        if values.shape != shape or values.dtype != np.float32:
            raise MalformedArtifact(
                f"weights {name!r} of {self.name} are {values.dtype}{list(values.shape)}, not float32{list(shape)}"
            )
        return self._small(name, values)

    def _small(self, name: str, values: Float32) -> Float32:
        if not -LARGEST <= values.min(initial=0) <= values.max(initial=0) <= LARGEST:  # also refuses NaN
            raise MalformedArtifact(
                f"weights {name!r} of {self.name} are too large to score with (over {LARGEST:g}), or no numbers"
            )
        return values

    def linear(self, name: str, into: int, outof: int) -> tuple[Float32, Float32]:
        """Of a layer y = W x + b: W and b, float32[into, outof] and float32[into]."""
        return self.take(f"{name}.weight", into, outof), self.take(f"{name}.bias", into)

    def items(self, module: str, rows: int, size: int) -> Float32:
        """float32[rows, size], an item table by its adapter, V + V A B, where it has one."""
        values = self.take(f"{module}.weight", rows, size)
        if (down := self._state.get(f"{module}.down")) is None:
            return values
        rank = min(down.shape[-1], size) if down.ndim else 0  # a higher one says no more
        adapter = self.take(f"{module}.down", size, rank), self.take(f"{module}.up", rank, size)
        return self._small(f"{module}.up", np.asarray(values + values @ adapter[0] @ adapter[1], np.float32))


def sigmoid(x: AnyFloat) -> Float32:
    """float32[…]; by tanh, which does not overflow as exp would."""
    half = np.float32(0.5)
    out: Float32 = half * np.tanh(half * x) + half
    return out


def scorer(learner: str, settings: Mapping[str, Any], state: Arrays, n_items: int) -> Scorer:
    """The network of a release without an `ItemSide` of its own.

    Args:
        learner, settings: of its manifest.
        state: of the release.
        n_items: of its catalogue.

    Raises:
        MalformedArtifact: a learner that this version scores with item vectors only, or weights that do not fit the
            settings and the catalogue, give no finite scores, or take more memory than a device has for them.
    """
    from penchant.common.inference import fitted, sequence

    kinds: dict[str, type[sequence.SequenceScorer | fitted.FittedScorer]] = {
        "gru": sequence.Gru,
        "lstm": sequence.Lstm,
        "cnn-lstm": sequence.ConvLstm,
        "transformer": sequence.Transformer,
        "mlp": fitted.Mlp,
        "neumf": fitted.NeuMF,
    }
    weights = Weights(state, settings)
    if learner != "fedavg" or weights.name not in kinds:
        raise MalformedArtifact(
            f"this release of {learner} has no item vectors to score with, and its network is none that this version "
            f"knows ({', '.join(kinds)}): update penchant, or ask the operator"
        )
    if n_items < 1:
        raise MalformedArtifact("a release whose catalogue is empty")
    try:
        made = kinds[weights.name](weights, n_items)
        probe = np.linspace(0, max(n_items - 2, 0), made.max_length).astype(np.int64)
        with np.errstate(over="ignore", invalid="ignore"):  # found below
            tried = made.side.vectors, made.scores_of(made.nobody), made.scores_of(made.person(probe))
    except MemoryError:
        raise MalformedArtifact(f"a release of {weights.name} that takes more memory than this device has") from None
    if not all(np.isfinite(values).all() for values in tried):
        raise MalformedArtifact(f"a release of {weights.name} with numbers too large to score with")
    return made
