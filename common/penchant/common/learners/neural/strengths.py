"""How strongly items are liked, with a network beside the linear model: rounds of federated averaging in between.

    counts, pairs, transitions   of co-occurrence
    strengths                    item terms, as `strengths` has them
    update, R times              weights after local training minus before, of the network of `interests/correction.py`
    outcomes                     as `strengths` has them, against expectations with the network in

A device takes each of its own n events as those with all other items foretell it, and goes T steps of size η down

    L = Σ (y − ŷ − correction)² / n

from the weights that were released. All people weigh the same, whatever n. Only the difference is sent; it is clipped
and noised in one private sum, as that of any other model (`fedavg.py`), and the server's step is post-processing.

Source: McMahan et al. 2017, https://arxiv.org/abs/1602.05629, Algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.func import grad, vmap

from penchant.common.arrays import Arrays, Int64
from penchant.common.catalogue import Catalogue
from penchant.common.errors import InvalidConfig
from penchant.common.interactions import History, Interactions
from penchant.common.interests import correction
from penchant.common.interests.correction import Correction
from penchant.common.learners import strengths
from penchant.common.learners.contract import Randoms, State
from penchant.common.learners.neural import local
from penchant.common.learners.neural.fedavg import ServerStep
from penchant.common.learners.strengths import Strengths, StrengthsConfig, sound
from penchant.common.privacy.plan import SumSpec
from penchant.common.privacy.sums import Clip, Shapes
from penchant.common.streams import Streams

UPDATES = "updates"
"""Where a state keeps how many rounds of the network are over."""
BLOCK = 16384
"""Events that the people trained at once have at most, each counted as the longest history."""


@dataclass(frozen=True, kw_only=True)
class NeuralStrengthsConfig(StrengthsConfig):
    """Public settings, fixed before anybody takes part: those of the other sums, and the network's.

    Attributes:
        encoded, hidden: widths of the network, ≥ 1.
        rounds: R ≥ 1.
        steps: T ≥ 1, of local training, each on the whole history.
        lr: η > 0.
        server: what the server does with the mean update.
    """

    encoded: int = 8
    hidden: int = 16
    rounds: int = 15
    steps: int = 3
    lr: float = 0.02
    server: ServerStep = field(default_factory=lambda: ServerStep(optimizer="momentum", lr=10.0, momentum=0.5))

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("encoded", "hidden", "rounds", "steps"):
            if not (isinstance(getattr(self, name), int) and getattr(self, name) >= 1):
                raise InvalidConfig(f"{name} must be a whole number ≥ 1, not {getattr(self, name)}")
        if not 0 < self.lr < math.inf:
            raise InvalidConfig(f"lr must be positive and finite, not {self.lr}")


def automatic(
    n_users: int, mu: float, *, share: float = 0.02, clip: float = 0.003
) -> tuple[NeuralStrengthsConfig, tuple[SumSpec, ...]]:
    """Settings and sums for so many people and a Gaussian budget μ; infinite μ is no noise.

    Args:
        share: of μ², for all updates together; the other sums share the rest as `strengths` says.
        clip: of one person's update, with which about half are cut; both, and the steps of device and server, were
            chosen on the validation ratings of MovieLens-100K at ε = 8.
    """
    if not 0 < share < 1:
        raise InvalidConfig(f"share must be in (0, 1), not {share}")
    start, sums = strengths.automatic(n_users, mu * math.sqrt(1 - share))
    config = NeuralStrengthsConfig(**vars(start))
    noise = math.sqrt(config.rounds / share) / mu
    update = SumSpec(name="update", rounds=config.rounds, clip_norm=clip, noise_multiplier=noise)
    return config, (*sums[:-1], update, sums[-1])


class NeuralStrengths(Strengths):
    """The rounds of `Strengths`, and those of the network before the last."""

    name = "neural-strengths"

    def __init__(self, catalogue: Catalogue, config: NeuralStrengthsConfig) -> None:
        super().__init__(catalogue, config)
        self.neural = config
        self._names = tuple(correction.shapes(0, 1, 1))

    def shapes(self, state: State) -> Shapes:
        if self._asked(state) != "update":
            return super().shapes(state)
        return correction.shapes(self.content.shape[1], self.neural.encoded, self.neural.hidden)

    def _asked(self, state: State) -> str:
        asked = super()._asked(state)
        return "update" if asked == "outcomes" and int(state[UPDATES]) < self.neural.rounds else asked

    def _contribution(self, state: State, history: History, streams: Streams) -> Arrays:
        if self._asked(state) != "update":
            return super()._contribution(state, history, streams)
        alone = Interactions.one(history, len(self.catalogue))
        for _, update in self._updates(state, alone):
            return update
        return {name: np.zeros(shape, np.float32) for name, shape in self.shapes(state).items()}

    def _partial_sum(self, state: State, histories: Interactions, clip: Clip, randoms: Randoms) -> Arrays:
        if self._asked(state) != "update":
            return super()._partial_sum(state, histories, clip, randoms)
        total = {name: np.zeros(shape, np.float64) for name, shape in self.shapes(state).items()}
        seen = 0
        for _, update in self._updates(state, histories):
            seen += 1
            for name, values in clip(update).items():
                total[name] += values
        for _ in range(histories.n_users - seen):  # nothing to train on: a contribution of zeros
            clip({})
        return total

    def apply(self, state: State, noisy_sum: Arrays, divisor: float) -> State:
        if "last.bias" in noisy_sum:
            after = self.neural.server.taken(state, noisy_sum, divisor)
            return {**after, UPDATES: np.array(int(state[UPDATES]) + 1, np.int64)}
        after = dict(super().apply(state, noisy_sum, divisor))
        if "strengths" in noisy_sum:
            weights = correction.fresh(self.content.shape[1], self.neural.encoded, self.neural.hidden)
            after |= {**weights, UPDATES: np.array(0, np.int64)}
        return after

    def correction(self, state: State) -> Correction | None:
        if UPDATES not in state:
            return None
        return Correction(self.content, {name: state[name] for name in self._names})

    def adopt(self, state: State, before: Catalogue) -> State:
        """As every learner does; the network's first layer is placed so that items it knows are read as they were.

        Public features of a larger catalogue are other numbers: E becomes what fits the old items' E x best.
        """
        after = dict(super().adopt(state, before))
        if UPDATES in state:
            old = Strengths(before, self.config).content
            place = [self.catalogue.index[item] for item in before.ids]
            now = self.content[place].astype(np.float64)
            fitted, *_ = np.linalg.lstsq(now, old @ state["encoder.weight"].T, rcond=None)
            after["encoder.weight"] = fitted.T.astype(np.float32)
            for name in ("server/m/encoder.weight", "server/v/encoder.weight"):
                if name in after:  # what was remembered is of other columns
                    after[name] = np.zeros_like(after["encoder.weight"])
        return after

    def _adopted(self, name: str, state: State, place: Int64) -> npt.NDArray[Any]:
        network = name.startswith("server/") or name == UPDATES or name in self._names
        return state[name] if network else super()._adopted(name, state, place)

    def _updates(self, state: State, histories: Interactions) -> Iterator[tuple[int, Arrays]]:
        """Trains everybody who has an event of sound strength and yields (row, update), in any order."""
        heard = sound(histories.strengths)
        histories = histories if heard.all() else histories.keep(heard)
        order = sorted(np.flatnonzero(histories.lengths).tolist(), key=lambda row: histories.lengths[row])
        for rows in local.blocks(order, histories.lengths.tolist(), BLOCK):
            yield from zip(rows, self._trained(state, [histories.history(row) for row in rows]), strict=True)

    def _trained(self, state: State, people: Sequence[History]) -> Iterator[Arrays]:
        n, longest = len(people), max(map(len, people))
        x = np.zeros((n, longest, self.content.shape[1]), np.float32)
        k = np.zeros((n, longest, correction.KNOWN), np.float32)
        off, share = np.zeros((n, longest), np.float32), np.zeros((n, longest), np.float32)
        for row, history in enumerate(people):
            own = slice(0, len(history))
            x[row, own] = self.content[history.items]
            k[row, own], off[row, own] = self._intensities(state, history).examples()
            share[row, own] = 1 / len(history)
        data = [torch.from_numpy(values) for values in (x, k, off, share)]
        before = {name: torch.from_numpy(np.array(state[name])) for name in self._names}
        now = {name: values.expand(n, *values.shape).clone() for name, values in before.items()}
        downhill = vmap(grad(loss))
        for _ in range(self.neural.steps):
            slopes = downhill(now, *data)
            now = {name: values - self.neural.lr * slopes[name] for name, values in now.items()}
        change = {name: (now[name] - before[name]).numpy() for name in before}
        for row in range(n):
            yield {name: values[row] for name, values in change.items()}


def loss(weights: dict[str, Tensor], content: Tensor, known: Tensor, off: Tensor, share: Tensor) -> Tensor:
    """L of one person: float32[], from float32[n, p], [n, KNOWN], and [n] of what is left to explain and of weights."""
    return (share * (off - corrected(weights, content, known)) ** 2).sum()


def corrected(weights: dict[str, Tensor], content: Tensor, known: Tensor) -> Tensor:
    """float32[n], what `Correction.at` says, with gradients."""
    encoded = torch.tanh(content @ weights["encoder.weight"].T + weights["encoder.bias"])
    inner = torch.tanh(torch.cat([encoded, known], 1) @ weights["inner.weight"].T + weights["inner.bias"])
    return (inner @ weights["last.weight"].T + weights["last.bias"])[:, 0]
