"""Federated averaging of a PyTorch model: the contribution is the weights after local training minus those before.

    server:  w ← w + step( Σ clip(w_u − w) + noise, ÷ divisor )

With unit "interaction" the device trains by DP-SGD (`device_sgd.py`) and what it sends is private by itself. The
server's step is plain, with momentum (FedAvgM) or Adam's (FedAdam); all read the private sum only. A person's own
vector is never sent and, in the user side, fitted to their history again: in closed form where the logit is linear in
it, else by the same gradient steps as in training. `inference/` computes the same scores on a device without PyTorch.

What a budget buys falls with how many numbers travel. Weights named in `freeze` stay where they start: they are in no
contribution, take none of the clip and get no noise. With an `adapter` the item tables stay too, and a map of low rank
is trained instead (`adapters.py`). Tables may start from public content or from co-occurrence (`start.py`); then the
first rounds are co-occurrence's own, in the same plan, and the charge of what they released is in the same ε. Until its
vectors are there a state is a state of co-occurrence in every respect, and afterwards one of the model.

Sources: McMahan et al. 2017, https://arxiv.org/abs/1602.05629; Hsu et al. 2019, https://arxiv.org/abs/1909.06335,
section 4.3 (FedAvgM); Reddi et al. 2021, https://arxiv.org/abs/2003.00295, Algorithm 2 (FedAdam).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from penchant.common.arrays import Arrays, Float32, Int64
from penchant.common.catalogue import Catalogue
from penchant.common.config import did_you_mean
from penchant.common.errors import InvalidConfig
from penchant.common.interactions import History, Interactions
from penchant.common.learners import newcomers
from penchant.common.learners.contract import Learner, Randoms, State
from penchant.common.learners.cooccurrence import Cooccurrence, CooccurrenceConfig
from penchant.common.learners.neural import adapters, fused, local, start, together
from penchant.common.learners.neural.models import ModelConfig, SequenceModel, all_scores, build, pad
from penchant.common.learners.training import LocalTraining
from penchant.common.privacy.plan import DeviceNoise
from penchant.common.privacy.sums import Clip, Shapes
from penchant.common.streams import Streams
from penchant.common.taste import ItemSide, TasteConfig

if TYPE_CHECKING:
    from penchant.common.learners.neural.device_sgd import DeviceSgd

Start = Literal["random", "content", "co-occurrence"]
_SEED = "server/weights"  # while co-occurrence runs: where the random weights will come from


@dataclass(frozen=True, kw_only=True)
class ServerStep:
    """How the server applies the mean update. Post-processing: it costs no privacy.

    Attributes:
        optimizer: "sgd" adds lr times the mean (FedAvg); "momentum" adds lr times a sum of means that forgets
            (FedAvgM); "adam" scales each coordinate by its own history (FedAdam).
        lr: step size.
        decay: of lr over the rounds: lr_t = lr / (1 + decay · t); ≥ 0.
        momentum: β of momentum, β₁ of Adam, in [0, 1).
        second, floor: β₂ and τ of Adam.
    """

    optimizer: Literal["sgd", "momentum", "adam"] = "adam"
    lr: float = 0.05
    decay: float = 0.0
    momentum: float = 0.9
    second: float = 0.99
    floor: float = 1e-8

    def __post_init__(self) -> None:
        if self.optimizer not in ("sgd", "momentum", "adam"):
            raise InvalidConfig(f"optimizer must be sgd, momentum or adam, not {self.optimizer!r}")
        for name in ("momentum", "second"):
            if not 0 <= getattr(self, name) < 1:
                raise InvalidConfig(f"{name} must be in [0, 1), not {getattr(self, name)}")
        for name in ("lr", "floor"):
            if not 0 < getattr(self, name) < math.inf:
                raise InvalidConfig(f"{name} must be positive and finite, not {getattr(self, name)}")
        if not 0 <= self.decay < math.inf:
            raise InvalidConfig(f"decay must be finite and ≥ 0, not {self.decay}")

    def taken(self, state: State, noisy_sum: Arrays, divisor: float) -> dict[str, np.ndarray[Any, Any]]:
        """The state with the weights that the sum names moved, and what the next step remembers."""
        after = dict(state)
        step = int(state.get("server/step", np.zeros((), np.int64))) + 1
        lr = self.lr / (1 + self.decay * (step - 1))
        for name, values in noisy_sum.items():
            mean = values / np.float32(divisor)
            if self.optimizer == "sgd":
                after[name] = (state[name] + np.float32(lr) * mean).astype(np.float32)
                continue
            zero = np.zeros_like(mean)
            kept = self.momentum * state.get(f"server/m/{name}", zero)
            if self.optimizer == "momentum":
                after[f"server/m/{name}"] = (kept + mean).astype(np.float32)
                after[name] = (state[name] + np.float32(lr) * after[f"server/m/{name}"]).astype(np.float32)
                continue
            first = kept + (1 - self.momentum) * mean
            second = self.second * state.get(f"server/v/{name}", zero) + (1 - self.second) * mean**2
            move = (first / (1 - self.momentum**step)) / (np.sqrt(second / (1 - self.second**step)) + self.floor)
            after[name] = (state[name] + np.float32(lr) * move).astype(np.float32)
            after[f"server/m/{name}"], after[f"server/v/{name}"] = first.astype(np.float32), second.astype(np.float32)
        after["server/step"] = np.array(step, np.int64)
        return after


@dataclass(frozen=True, kw_only=True)
class FedAvgConfig:
    """Public settings.

    Attributes:
        model: which model, and its size.
        local: what a device does in a round.
        server: what the server does with the mean.
        taste: the user side of linear models; `popularity` weighs the released item biases.
        device: DP-SGD on the device, with unit "interaction".
        freeze: names of weights that are not trained, or of modules that hold them, such as "blocks".
        adapter: rank r of what is trained in place of each item table; 0 trains the tables.
        start: where item tables start; "co-occurrence" first asks for its two sums.
        cooccurrence: its settings, with that start; `content` also weighs features with start "content", and
            `features` says what they are for any start.
    """

    model: ModelConfig = field(default_factory=lambda: ModelConfig(name="mf"))
    local: LocalTraining = field(default_factory=LocalTraining)
    server: ServerStep = field(default_factory=ServerStep)
    taste: TasteConfig = field(default_factory=lambda: TasteConfig(decay=0.8, popularity=0.2))
    device: DeviceNoise | None = None
    freeze: tuple[str, ...] = ()
    adapter: int = 0
    start: Start = "random"
    cooccurrence: CooccurrenceConfig = field(default_factory=CooccurrenceConfig)

    def __post_init__(self) -> None:
        if not isinstance(self.adapter, int) or self.adapter < 0:
            raise InvalidConfig(f"adapter must be a whole number ≥ 0, not {self.adapter}")
        if self.start not in get_args(Start):
            raise InvalidConfig(f"unknown start {self.start!r}{did_you_mean(self.start, get_args(Start))}")
        if self.device is None:
            return
        # Nobody adds noise to co-occurrence's sums there; the others are not what DP-SGD's proof is about.
        for name, asked in (
            ("start co-occurrence", self.start == "co-occurrence"),
            ("adapter", self.adapter > 0),
            ("proximal", self.local.proximal > 0),
        ):
            if asked:
                raise InvalidConfig(f"unit interaction has no {name}: drop it, or take --unit user")


class FedAvg(Learner):
    """Any of `MODELS`, trained in rounds.

    Args:
        where: the torch device that trains and scores, such as "cpu" or "cuda".
        threads: where people are simulated and only sums of them leave, compiled kernels train them on so many threads
            (`fused/`), as far as there is one for the model. None for real people.
    """

    name = "fedavg"

    def __init__(
        self, catalogue: Catalogue, config: FedAvgConfig, *, where: str = "cpu", threads: int | None = None
    ) -> None:
        super().__init__(catalogue, config.cooccurrence.features)
        self.config, self.where, self.device_noise = config, torch.device(where), config.device
        self.model = build(config.model, len(catalogue), seed=0).to(self.where)
        if config.device is not None and self.model.reads_history:
            raise InvalidConfig(
                f"unit interaction needs a model whose samples read one interaction; {config.model.name} reads the "
                "history: take --model mf, mlp or neumf, or --unit user"
            )
        weights = self._fresh(0)
        self._shapes: Shapes = {name: tuple(values.shape) for name, values in weights.items()}
        self.frozen = self._held(config.freeze)
        self._cooccurrence = Cooccurrence(catalogue, config.cooccurrence)
        self._cohort = None
        if threads is not None and self.where.type == "cpu" and not config.adapter:
            self._cohort = fused.compiled(self.model, config.local, self.frozen, threads)
        self._device_sgd = None if config.device is None else self._by_opacus(config.device)

    def _by_opacus(self, noise: DeviceNoise) -> DeviceSgd:
        from penchant.common.learners.neural.device_sgd import DeviceSgd  # Opacus takes as long to load as PyTorch

        return DeviceSgd(self.model, noise, self.config.local, self.frozen)

    def init(self, streams: Streams) -> State:
        seed = streams.seed("weights")
        if self.config.start == "co-occurrence":
            return {**self._cooccurrence.init(streams), _SEED: np.array(seed, np.uint64)}
        return self._fresh(seed) if self.config.start == "random" else self._started(seed, {})

    def shapes(self, state: State) -> Shapes:
        if self._starting(state):
            return self._cooccurrence.shapes(state)
        return {n: shape for n, shape in self._shapes.items() if n not in self.model.private and n not in self.frozen}

    def _contribution(self, state: State, history: History, streams: Streams) -> Arrays:
        if self._starting(state):
            return self._cooccurrence.contribution(state, history, streams)
        weights = self._weights(state)
        if self._device_sgd is not None:
            return self._device_sgd.train(weights, history, streams.get("steps"))
        if isinstance(self.model, SequenceModel):
            return together.alone(self.model, weights, history, self.config.local, streams, self.frozen)
        out = {name: np.zeros(shape, np.float32) for name, shape in self.shapes(state).items()}
        for _, update in local.updates(
            self.model, weights, [history.items], self.config.local, [streams.word("examples")], frozen=self.frozen
        ):
            self._add(out, update.rows, update.values)
        return out

    def _partial_sum(self, state: State, histories: Interactions, clip: Clip, randoms: Randoms) -> Arrays:
        if self._starting(state):
            return self._cooccurrence.partial_sum(state, histories, clip, randoms)
        if self._cohort is not None and self._cohort.can_clip(clip):
            if self.device_noise is None:
                return self._cohort.partial_sum(state, histories, clip, randoms)
            if clip.bound == math.inf and not self.frozen:  # else a change is looked at alone
                return self._cohort.private_sum(state, histories, clip, self.device_noise, randoms)
        if self._device_sgd is not None:
            return super()._partial_sum(state, histories, clip, randoms)
        total = {name: np.zeros(shape, np.float64) for name, shape in self.shapes(state).items()}
        seen = 0
        for rows, values in self._trained(self._weights(state), histories, randoms):
            self._add(total, rows, clip(values))  # rows that were not touched are zero
            seen += 1
        for _ in range(histories.n_users - seen):  # nothing to train on: a contribution of zeros
            clip({})
        return total

    def apply(self, state: State, noisy_sum: Arrays, divisor: float) -> State:
        if self._starting(state):
            after = dict(self._cooccurrence.apply(self.released(state), noisy_sum, divisor))
            return self._started(int(state[_SEED]), after) if "vectors" in after else {**after, _SEED: state[_SEED]}
        return self.config.server.taken(state, noisy_sum, divisor)

    def item_side(self, state: State) -> ItemSide | None:
        if self._starting(state):
            return self._cooccurrence.item_side(state)
        if self.model.linear is None:
            return None
        vectors = self._whole(state)[self.model.linear].cpu().numpy()
        if self.config.start != "co-occurrence":  # there a length tells how much is known of an item
            length = np.linalg.norm(vectors, axis=1, keepdims=True)  # by direction: a long one buys no exposure
            vectors = (vectors / np.maximum(length, 1e-12)).astype(np.float32)
        return ItemSide(vectors, _to_unit_range(state["bias.weight"][:, 0]), self.config.taste)

    def _scores(self, state: State, histories: Interactions) -> Float32:
        if self._starting(state):
            return self._cooccurrence.scores(state, histories)
        if (side := self.item_side(state)) is not None:
            return side.scores(histories)
        weights = self._whole(state)
        if isinstance(self.model, SequenceModel):
            self._load(weights)
            sequences = pad((h.items for h in histories), self.model.max_length, len(self.catalogue))
            return all_scores(self.model, sequences.to(self.where)).cpu().numpy()
        return local.fitted_scores(self.model, weights, [h.items for h in histories], self.config.local)

    def adopt(self, state: State, before: Catalogue) -> State:
        if not self._starting(state):
            return super().adopt(state, before)
        return {**self._cooccurrence.adopt(self.released(state), before), _SEED: state[_SEED]}

    def _adopted(self, name: str, state: State, place: Int64) -> np.ndarray[Any, Any]:
        values = state[name]
        table = name.removeprefix("server/m/").removeprefix("server/v/")
        if table not in self.model.item_tables:
            return values
        n = len(self.catalogue)
        moved, known = newcomers.grown(values[: len(place)], place, n)
        if table == name:
            moved = newcomers.from_content(moved, known, self.content)
        return np.concatenate([moved, values[len(place) :]])  # a sequence model has a row for padding

    def _starting(self, state: State) -> bool:
        """Whether co-occurrence's rounds are not over: the model has no weights yet.

        No state makes a learner with another start send what co-occurrence asks for: on a device with noise of its own
        nobody would add any to that.
        """
        return self.config.start == "co-occurrence" and next(iter(self._shapes)) not in state

    def _fresh(self, seed: int) -> dict[str, Float32]:
        """Random weights, and adapters that change nothing yet."""
        made = build(self.config.model, len(self.catalogue), seed)
        weights = {name: values.detach().numpy().copy() for name, values in made.named_parameters()}
        return weights | (adapters.fresh(made, self.config.adapter, seed) if self.config.adapter else {})

    def _started(self, seed: int, found: State) -> dict[str, Float32]:
        """Weights from content and, where there is one, what co-occurrence released."""
        vectors = np.float32(self.config.cooccurrence.content) * self.content
        if "vectors" in found:
            vectors = np.hstack([found["vectors"], vectors])
        return start.placed(self._fresh(seed), self.model, vectors, found.get("popularity"))

    def _held(self, freeze: tuple[str, ...]) -> frozenset[str]:
        """Names of the weights that no round moves.

        Raises:
            InvalidConfig: a name that the model does not have, a person's own vector, or nothing left to train.
        """
        modules = {name[:at] for name in self._shapes for at, letter in enumerate(name) if letter == "."}
        known = sorted(modules.union(self._shapes))
        out = set(adapters.tables(self.model) if self.config.adapter else ())
        for asked in freeze:
            if asked not in known:
                raise InvalidConfig(f"{self.config.model.name} has no weights {asked!r}{did_you_mean(asked, known)}")
            out |= {name for name in self._shapes if name == asked or name.startswith(f"{asked}.")}
        if own := out.intersection(self.model.private):
            raise InvalidConfig(f"{min(own)} is a person's own and never sent: leave it out of freeze")
        if not self._shapes.keys() - out - {*self.model.private}:
            raise InvalidConfig("freeze leaves nothing to train: take a name out of it")
        return frozenset(out)

    def _weights(self, state: State) -> dict[str, Tensor]:
        return {n: torch.from_numpy(np.asarray(state[n])).to(self.where) for n in self._shapes}

    def _whole(self, state: State) -> dict[str, Tensor]:
        """The model's parameters, the adapters worked into the tables; a state without adapters is as good."""
        weights = {n: torch.from_numpy(np.asarray(state[n])).to(self.where) for n in self._shapes if n in state}
        return adapters.whole(weights, adapters.tables(self.model))

    def _load(self, weights: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(weights[name])

    def _trained(
        self, weights: dict[str, Tensor], histories: Interactions, randoms: Randoms
    ) -> Iterator[tuple[Int64 | slice, Arrays]]:
        """What each person changes, many trained at once: the rows of item tables that it touches, and values."""
        people, rule = range(histories.n_users), self.config.local
        if isinstance(self.model, SequenceModel):
            own = [randoms(u) for u in people]
            for _, change in together.updates(self.model, weights, list(histories), rule, own, self.frozen):
                yield slice(None), change
            return
        items, seeds = [h.items for h in histories], [randoms(u).word("examples") for u in people]
        for _, update in local.updates(self.model, weights, items, rule, seeds, frozen=self.frozen):
            yield update.rows, update.values

    def _add(self, total: dict[str, np.ndarray[Any, Any]], rows: Int64 | slice, values: Arrays) -> None:
        for name, v in values.items():
            if name in self.model.item_tables:
                total[name][rows] += v  # rows are distinct
            else:
                total[name] += v


def _to_unit_range(values: Float32) -> Float32:
    low, high = float(values.min()), float(values.max())
    return ((values - low) / (high - low) if high > low else np.zeros_like(values)).astype(np.float32)
