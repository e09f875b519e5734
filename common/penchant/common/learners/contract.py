"""What every learner is: a state, a contribution of one person, and a way to apply a private sum of contributions.

    state ──► device: contribution = f(state, own history) ──► clip to C ──► Σ over the drawn users ──► + noise
    state' = apply(state, noisy sum, divisor) ──► released ──► every device, which scores on its own

Nothing below the learner (rounds, sums, transport) knows which one it carries. A state is named arrays; those whose
name starts with "server/" stay on the server (an optimiser's memory), all others are released. The user side reads the
released state and the person's own history, and nothing of it ever leaves the device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from penchant.common import content
from penchant.common.arrays import Arrays, Float32, Int64
from penchant.common.catalogue import Catalogue
from penchant.common.content import ContentConfig
from penchant.common.errors import InvalidConfig
from penchant.common.interactions import History, Interactions
from penchant.common.privacy.plan import DeviceNoise
from penchant.common.privacy.sums import Clip, Shapes
from penchant.common.streams import Streams
from penchant.common.taste import ItemSide

State = Mapping[str, npt.NDArray[Any]]
Randoms = Callable[[int], Streams]
"""The random streams of each person, by row of the histories at hand."""


class Learner(ABC):
    """A method, with its public settings. Instances hold no data and no state.

    `catalogue` is public and the same on both sides; everything learned is in the state.

    Args:
        features: how the catalogue becomes numbers; None takes the defaults.
    """

    name: str
    device_noise: DeviceNoise | None = None
    """What a device adds before it sends; with unit "interaction" it must be the plan's."""

    def __init__(self, catalogue: Catalogue, features: ContentConfig | None = None) -> None:
        self.catalogue, self._features = catalogue, features

    @cached_property
    def content(self) -> Float32:
        """float32[n_items, ≤ 64], public features of the items, every row at most 1 long."""
        return content.condensed(content.features(self.catalogue, self._features))

    @abstractmethod
    def init(self, streams: Streams) -> State:
        """The state before the first round. It has seen nobody."""

    @abstractmethod
    def shapes(self, state: State) -> Shapes:
        """What a contribution to this state looks like."""

    def contribution(self, state: State, history: History, streams: Streams) -> Arrays:
        """What one person's history adds, before it is clipped. It reads nobody else's data.

        Positions outside the catalogue are left out, here and wherever a learner reads histories.
        """
        return self._contribution(state, history.known(len(self.catalogue)), streams)

    @abstractmethod
    def apply(self, state: State, noisy_sum: Arrays, divisor: float) -> State:
        """The next state. Post-processing: it sees the noised sum and public numbers only."""

    def scores(self, state: State, histories: Interactions) -> Float32:
        """The user side: float32[n_users, n_items], higher is better, from the released state and own histories.

        −∞ for retired items, which are never recommended.
        """
        out = self._scores(state, histories.known(len(self.catalogue)))
        out[:, self.catalogue.is_retired] = -np.inf
        return out

    def partial_sum(self, state: State, histories: Interactions, clip: Clip, randoms: Randoms) -> Arrays:
        """Σ clip(contribution) over these people: what a node that hosts them sends, in float64."""
        return self._partial_sum(state, histories.known(len(self.catalogue)), clip, randoms)

    def adopt(self, state: State, before: Catalogue) -> State:
        """A state of an earlier catalogue, for this one: items keep their numbers, new items are placed by content.

        Post-processing: it reads the state and two public catalogues.

        Raises:
            InvalidConfig: an item of the earlier catalogue is gone; a catalogue grows and retires, and never drops.
        """
        if gone := [item for item in before.ids if item not in self.catalogue.index]:
            raise InvalidConfig(f"item {gone[0]!r} left the catalogue: keep it there and mark it as retired")
        place = np.array([self.catalogue.index[item] for item in before.ids], np.int64)
        return {name: self._adopted(name, state, place) for name in state}

    def item_side(self, state: State) -> ItemSide | None:
        """What devices score with, where that is a taste over item vectors (`taste.py`); None for other models."""
        return None

    @abstractmethod
    def _contribution(self, state: State, history: History, streams: Streams) -> Arrays: ...

    @abstractmethod
    def _scores(self, state: State, histories: Interactions) -> Float32: ...

    @abstractmethod
    def _adopted(self, name: str, state: State, place: Int64) -> npt.NDArray[Any]:
        """One array of an earlier catalogue's state, by its name, for this catalogue.

        Args:
            place: int64[n_items before], where each item of the earlier catalogue stands in this one.
        """

    def _partial_sum(self, state: State, histories: Interactions, clip: Clip, randoms: Randoms) -> Arrays:
        """A learner may override it to run its people together; the result must equal this loop to float tolerance, and
        each person's contribution must pass through `clip` once.
        """
        total = {name: np.zeros(shape, np.float64) for name, shape in self.shapes(state).items()}
        for row, history in enumerate(histories):
            for name, values in clip(self.contribution(state, history, randoms(row))).items():
                total[name] += values
        return total

    @staticmethod
    def released(state: State) -> State:
        """The part of a state that devices get."""
        return {name: values for name, values in state.items() if not name.startswith("server/")}
