"""The same neural model trained on everybody's data in one place: what federation and privacy are compared with.

Adam on mini-batches pooled over people; a step size that falls as 1/(1 + decay · epoch), or in a line to 0; early
stopping on validation, which only a row that promises nothing may do. Models whose person is a vector get one for each
person, fitted in closed form before every epoch where there is one, else trained along; sequence models train on each
person's last items, of which those of one time come in a new order every epoch.
Scoring is the learner's own user side, so that only where the weights come from differs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from penchant.common import taste
from penchant.common.arrays import Int32
from penchant.common.config import did_you_mean
from penchant.common.errors import InvalidConfig
from penchant.common.interactions import Interactions
from penchant.common.learners.contract import State
from penchant.common.learners.neural.fedavg import FedAvg
from penchant.common.learners.neural.models import (
    InterestModel,
    SequenceModel,
    build,
    group_loss,
    pad,
    seeded,
    untied,
)
from penchant.common.negatives import negatives
from penchant.common.streams import Streams
from penchant.common.taste import TasteConfig

Schedule = Literal["inverse", "linear"]
PART = 8
"""Sequences whose gradient is taken at once: short ones beside long ones would be read as long."""


@dataclass(frozen=True, kw_only=True)
class CentralTraining:
    """Settings of the central trainer.

    Attributes:
        epochs: passes at most.
        batch: groups (or sequences, at most 64) in one step.
        lr: Adam's step size at first.
        schedule: over E epochs e = 0, 1, … it is lr / (1 + decay · e) ("inverse") or lr · (1 − (e + ½) / E) ("linear").
        decay: of schedule "inverse"; "linear" does not read it.
        weight_decay: L2 pull of Adam.
        negatives: items drawn beside each positive.
        patience: epochs without a better validation after which training stops.
        validate_every: epochs from one validation, the first epoch's, to the next; the last epoch always has one.
    """

    epochs: int = 15
    batch: int = 2048
    lr: float = 0.01
    schedule: Schedule = "inverse"
    decay: float = 0.05
    weight_decay: float = 1e-6
    negatives: int = 4
    patience: int = 6
    validate_every: int = 1

    def __post_init__(self) -> None:
        whole = (self.epochs, self.batch, self.negatives, self.patience, self.validate_every)
        if min(whole) < 1 or not self.lr > 0:
            raise InvalidConfig("epochs, batch, negatives, patience and validate_every must be ≥ 1 and lr positive")
        if self.schedule not in get_args(Schedule):
            raise InvalidConfig(f"unknown schedule {self.schedule!r}{did_you_mean(self.schedule, get_args(Schedule))}")

    def step_size(self, epoch: int) -> float:
        """Adam's in an epoch, from 1.

        >>> [CentralTraining(epochs=2, lr=1.0, schedule="linear").step_size(e) for e in (1, 2)]
        [0.75, 0.25]
        """
        if self.schedule == "linear":
            return self.lr * (1 - (epoch - 0.5) / self.epochs)
        return self.lr / (1 + self.decay * (epoch - 1))


RECIPES: dict[str, CentralTraining] = {
    "transformer": CentralTraining(
        epochs=40, batch=64, lr=8e-3, schedule="linear", weight_decay=0.0, patience=10, validate_every=2
    ),
}
"""Settings of models that have their own, chosen on validation of ML-100K."""


def usual(model: str, epochs: int | None = None) -> CentralTraining:
    """The settings of a key of `MODELS`.

    Args:
        epochs: at most so many; past those of a model's own recipe they change nothing, as its step size ends at 0.
    """
    if model not in RECIPES:
        return CentralTraining(epochs=epochs or CentralTraining.epochs)
    recipe = RECIPES[model]
    return replace(recipe, epochs=min(epochs or recipe.epochs, recipe.epochs))


Validate = Callable[[State], float]


def train(
    learner: FedAvg,
    data: Interactions,
    settings: CentralTraining,
    streams: Streams,
    validate: Validate,
    after_epoch: Callable[[int, float], None],
) -> State:
    """The weights of the best epoch on validation.

    Args:
        learner: whose model is trained, on the device it stands on.
        data: training interactions of everybody.
        validate: higher is better.
        after_epoch: told each epoch (from 1) and the newest validation.
    """
    model = build(learner.config.model, data.n_items, streams.seed("weights")).to(learner.where)
    people: dict[str, nn.Parameter] = {}
    for name in model.private:
        shape = (data.n_users, *model.get_parameter(name).shape)
        start = torch.randn(shape, generator=torch.Generator().manual_seed(streams.seed("people"))) * 0.1
        people[name] = nn.Parameter(start.to(learner.where))
    shared = [p for n, p in model.named_parameters() if n not in model.private]
    optimizer = torch.optim.Adam([*shared, *people.values()], lr=settings.lr, weight_decay=settings.weight_decay)
    best, best_value, best_epoch, value = _state(model), -np.inf, 0, -np.inf
    for number in range(1, settings.epochs + 1):
        for group in optimizer.param_groups:
            group["lr"] = settings.step_size(number)
        random = streams.get("epoch", number)
        model.train()
        with seeded(streams.seed("dropout", number), learner.where):
            if isinstance(model, SequenceModel):
                batches = _sequence_epoch(model, data, settings, random)
            else:
                batches = _point_epoch(model, people, data, settings, random)
            for parts in batches:
                optimizer.zero_grad()
                for loss in parts:
                    loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
                optimizer.step()
        if validated := (number - 1) % settings.validate_every == 0 or number == settings.epochs:
            value = validate(_state(model))
        after_epoch(number, value)
        if validated and value > best_value:
            best, best_value, best_epoch = _state(model), value, number
        elif validated and number - best_epoch >= settings.patience:
            break
    return best


def _point_epoch(
    model: InterestModel,
    people: Mapping[str, nn.Parameter],
    data: Interactions,
    settings: CentralTraining,
    random: np.random.Generator,
) -> Iterator[Iterable[Tensor]]:
    """The loss of each mini-batch of groups, one after another."""
    if model.linear is not None:
        (name,) = model.private
        vectors = model.get_parameter(model.linear).detach().cpu().numpy()
        fitted = taste.tastes(vectors, data, TasteConfig(decay=1.0)).astype(np.float32)
        with torch.no_grad():
            people[name].copy_(torch.from_numpy(fitted)[:, None, :])
    rows = data.rows
    groups = np.empty((len(data), 1 + settings.negatives), np.int32)
    groups[:, 0] = data.items
    for user in range(data.n_users):
        a, b = data.offsets[user], data.offsets[user + 1]
        if a < b:
            groups[a:b, 1:] = negatives(
                data.items[a:b], data.n_items, (b - a, settings.negatives), int(random.integers(2**63))
            )
    where = next(model.parameters()).device
    shared = {n: p for n, p in model.named_parameters() if n not in model.private}

    def logits(own: dict[str, Tensor], candidates: Tensor) -> Tensor:
        """float32[1 + k] for one group, with its own person's vector."""
        both = {**shared, **own}
        out: Tensor = functional_call(model, both, (candidates[None, :0], candidates[None]))
        return out[0]

    order = random.permutation(len(data))
    for start in range(0, len(order), settings.batch):
        at = order[start : start + settings.batch]
        own = {n: p[torch.from_numpy(rows[at]).long().to(where)] for n, p in people.items()}
        candidates = torch.from_numpy(groups[at]).long().to(where)
        yield (group_loss(vmap(logits)(own, candidates)).mean(),)


def _sequence_epoch(
    model: SequenceModel, data: Interactions, settings: CentralTraining, random: np.random.Generator
) -> Iterator[Iterable[Tensor]]:
    """Of each mini-batch of sequences, the last items of one person each, the losses whose sum is its mean loss."""
    histories = [untied(h, random) for h in data if len(h) > 1]
    order = random.permutation(len(histories))
    size = min(settings.batch, 64)
    for start in range(0, len(order), size):
        batch = sorted((histories[i] for i in order[start : start + size]), key=len)
        yield (
            _sequence_loss(model, batch[first : first + PART], settings, random).sum() / len(batch)
            for first in range(0, len(batch), PART)
        )


def _sequence_loss(
    model: SequenceModel, histories: Sequence[Int32], settings: CentralTraining, random: np.random.Generator
) -> Tensor:
    """float32[B]."""
    where = next(model.parameters()).device
    sequences = pad(histories, model.max_length + 1, model.n_items).to(where)
    if not model.needs_negatives:
        return model.sequence_loss(sequences)
    shape = (sequences.shape[1], settings.negatives)
    drawn = np.stack([negatives(h, model.n_items, shape, int(random.integers(2**63))) for h in histories])
    return model.sequence_loss(sequences, torch.from_numpy(drawn).long().to(where))


def _state(model: nn.Module) -> State:
    return {name: p.detach().cpu().numpy().copy() for name, p in model.named_parameters()}
