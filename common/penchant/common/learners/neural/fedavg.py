"""Federated averaging of a PyTorch model: the contribution is the weights after local training minus those before.

    server:  w ← w + step( Σ clip(w_u − w) + noise, ÷ divisor )

With unit "interaction" the device trains by DP-SGD (`device_sgd.py`) and what it sends is private by itself. The
server's step is plain or Adam's; both read the private sum only. A person's own vector is never sent and, in the user
side, fitted to their history again: in closed form where the logit is linear in it, else by the same gradient steps as
in training.

Sources: McMahan et al. 2017, https://arxiv.org/abs/1602.05629; Reddi et al. 2021, https://arxiv.org/abs/2003.00295,
Algorithm 2 (FedAdam).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from penchant.common import taste
from penchant.common.arrays import Arrays, Float32, Int64
from penchant.common.catalogue import Catalogue
from penchant.common.errors import InvalidConfig
from penchant.common.interactions import History, Interactions
from penchant.common.learners import newcomers
from penchant.common.learners.contract import Learner, Randoms, State
from penchant.common.learners.neural import local
from penchant.common.learners.neural.device_sgd import DeviceSgd
from penchant.common.learners.neural.local import LocalTraining
from penchant.common.learners.neural.models import ModelConfig, SequenceModel, all_scores, build, pad, seeded
from penchant.common.negatives import negatives
from penchant.common.privacy.plan import DeviceNoise
from penchant.common.privacy.sums import Clip, Shapes
from penchant.common.streams import Streams
from penchant.common.taste import TasteConfig


@dataclass(frozen=True, kw_only=True)
class ServerStep:
    """How the server applies the mean update. Post-processing: it costs no privacy.

    Attributes:
        optimizer: "sgd" adds lr times the mean; "adam" scales each coordinate by its own history.
        lr: step size.
        decay: of lr over the rounds: lr_t = lr / (1 + decay · t); ≥ 0.
        momentum, second, floor: β₁, β₂ and τ of Adam.
    """

    optimizer: Literal["sgd", "adam"] = "adam"
    lr: float = 0.05
    decay: float = 0.0
    momentum: float = 0.9
    second: float = 0.99
    floor: float = 1e-8

    def __post_init__(self) -> None:
        if self.optimizer not in ("sgd", "adam"):
            raise InvalidConfig(f"optimizer must be sgd or adam, not {self.optimizer!r}")
        if not 0 < self.lr < math.inf or not self.decay >= 0:
            raise InvalidConfig("lr must be positive and finite and decay ≥ 0")


@dataclass(frozen=True, kw_only=True)
class FedAvgConfig:
    """Public settings.

    Attributes:
        model: which model, and its size.
        local: what a device does in a round.
        server: what the server does with the mean.
        taste: the user side of linear models; `popularity` weighs the released item biases.
        device: DP-SGD on the device, with unit "interaction".
    """

    model: ModelConfig = field(default_factory=lambda: ModelConfig(name="mf"))
    local: LocalTraining = field(default_factory=LocalTraining)
    server: ServerStep = field(default_factory=ServerStep)
    taste: TasteConfig = field(default_factory=lambda: TasteConfig(decay=0.8, popularity=0.2))
    device: DeviceNoise | None = None


class FedAvg(Learner):
    """Any of `MODELS`, trained in rounds.

    Args:
        where: the torch device that trains and scores, such as "cpu" or "cuda".
    """

    name = "fedavg"

    def __init__(self, catalogue: Catalogue, config: FedAvgConfig, *, where: str = "cpu") -> None:
        super().__init__(catalogue)
        self.config, self.where, self.device_noise = config, torch.device(where), config.device
        self.model = build(config.model, len(catalogue), seed=0).to(self.where)
        if config.device is not None and self.model.reads_history:
            raise InvalidConfig(
                f"unit interaction needs a model whose samples read one interaction; {config.model.name} reads the "
                "history: take --model mf or neumf, or --unit user"
            )
        self._device_sgd = None if config.device is None else DeviceSgd(self.model, config.device, config.local)

    def init(self, streams: Streams) -> State:
        fresh = build(self.config.model, len(self.catalogue), streams.seed("weights"))
        return {name: values.detach().numpy().copy() for name, values in fresh.named_parameters()}

    def shapes(self, state: State) -> Shapes:
        return {n: tuple(p.shape) for n, p in self.model.named_parameters() if n not in self.model.private}

    def _contribution(self, state: State, history: History, random: np.random.Generator) -> Arrays:
        weights = self._weights(state)
        if self._device_sgd is not None:
            return self._device_sgd.train(weights, history, random)
        if isinstance(self.model, SequenceModel):
            return self._train_sequence(self.model, weights, history, random)
        out = {name: np.zeros(shape, np.float32) for name, shape in self.shapes(state).items()}
        for _, update in local.updates(self.model, weights, [history.items], self.config.local, [random]):
            self._add(out, update.rows, update.values)
        return out

    def _partial_sum(self, state: State, histories: Interactions, clip: Clip, randoms: Randoms) -> Arrays:
        if self._device_sgd is not None or isinstance(self.model, SequenceModel):
            return super()._partial_sum(state, histories, clip, randoms)
        total = {name: np.zeros(shape, np.float64) for name, shape in self.shapes(state).items()}
        people = range(histories.n_users)
        trained = local.updates(
            self.model,
            self._weights(state),
            [histories.history(u).items for u in people],
            self.config.local,
            [randoms(u) for u in people],
        )
        seen = 0
        for _, update in trained:
            self._add(total, update.rows, clip(update.values))  # rows that were not touched are zero
            seen += 1
        for _ in range(histories.n_users - seen):  # nothing to train on: a contribution of zeros
            clip({})
        return total

    def apply(self, state: State, noisy_sum: Arrays, divisor: float) -> State:
        rule, after = self.config.server, dict(state)
        step = int(state.get("server/step", np.zeros((), np.int64))) + 1
        lr = rule.lr / (1 + rule.decay * (step - 1))
        for name, values in noisy_sum.items():
            mean = values / np.float32(divisor)
            if rule.optimizer == "sgd":
                after[name] = (state[name] + np.float32(lr) * mean).astype(np.float32)
                continue
            zero = np.zeros_like(mean)
            first = rule.momentum * state.get(f"server/m/{name}", zero) + (1 - rule.momentum) * mean
            second = rule.second * state.get(f"server/v/{name}", zero) + (1 - rule.second) * mean**2
            move = (first / (1 - rule.momentum**step)) / (np.sqrt(second / (1 - rule.second**step)) + rule.floor)
            after[name] = (state[name] + np.float32(lr) * move).astype(np.float32)
            after[f"server/m/{name}"], after[f"server/v/{name}"] = first.astype(np.float32), second.astype(np.float32)
        after["server/step"] = np.array(step, np.int64)
        return after

    def _scores(self, state: State, histories: Interactions) -> Float32:
        if self.model.linear is not None:
            vectors = state[self.model.linear]
            length = np.linalg.norm(vectors, axis=1, keepdims=True)  # by direction: a long vector buys no exposure
            unit = (vectors / np.maximum(length, 1e-12)).astype(np.float32)
            return taste.scores(unit, _to_unit_range(state["bias.weight"][:, 0]), histories, self.config.taste)
        weights = self._weights(state)
        if isinstance(self.model, SequenceModel):
            self._load(weights)
            sequences = pad((h.items for h in histories), self.model.max_length, len(self.catalogue))
            return all_scores(self.model, sequences.to(self.where)).cpu().numpy()
        return local.fitted_scores(self.model, weights, [h.items for h in histories], self.config.local)

    def _adopted(self, name: str, values: np.ndarray[Any, Any], place: Int64) -> np.ndarray[Any, Any]:
        table = name.removeprefix("server/m/").removeprefix("server/v/")
        if table not in self.model.item_tables:
            return values
        n = len(self.catalogue)
        moved, known = newcomers.grown(values[: len(place)], place, n)
        if table == name:
            moved = newcomers.from_content(moved, known, self.catalogue.content)
        return np.concatenate([moved, values[len(place) :]])  # a sequence model has a row for padding

    def _weights(self, state: State) -> dict[str, Tensor]:
        return {n: torch.from_numpy(np.asarray(state[n])).to(self.where) for n, _ in self.model.named_parameters()}

    def _load(self, weights: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(weights[name])

    def _add(self, total: dict[str, np.ndarray[Any, Any]], rows: Int64, values: Arrays) -> None:
        for name, v in values.items():
            if name in self.model.item_tables:
                total[name][rows] += v  # rows are distinct
            else:
                total[name] += v

    def _train_sequence(
        self, model: SequenceModel, weights: dict[str, Tensor], history: History, random: np.random.Generator
    ) -> Arrays:
        """One person's sequence: each epoch a step on the mean loss of its last items."""
        self._load(weights)
        rule = self.config.local
        with seeded(int(random.integers(2**63 - 1)), self.where):  # dropout
            drawable = not model.needs_negatives or local.can_train(history.items, len(self.catalogue))
            if len(history) > 1 and drawable:
                sequence = pad([history.items], model.max_length + 1, len(self.catalogue)).to(self.where)
                optimizer = torch.optim.SGD(model.parameters(), lr=rule.lr)
                model.train()
                for _ in range(rule.epochs):
                    drawn = None
                    if model.needs_negatives:
                        shape = (1, sequence.shape[1], rule.negatives)
                        drawn = torch.from_numpy(negatives(history.items, len(self.catalogue), shape, random)).long()
                        drawn = drawn.to(self.where)
                    optimizer.zero_grad()
                    model.sequence_loss(sequence, drawn).sum().backward()  # type: ignore[no-untyped-call]  # torch's
                    optimizer.step()
        return {
            n: (p.detach() - weights[n]).cpu().numpy() for n, p in model.named_parameters() if n not in model.private
        }


def _to_unit_range(values: Float32) -> Float32:
    low, high = float(values.min()), float(values.max())
    return ((values - low) / (high - low) if high > low else np.zeros_like(values)).astype(np.float32)
