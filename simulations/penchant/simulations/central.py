"""The same neural model trained on everybody's data in one place: what federation and privacy are compared with.

Adam on mini-batches pooled over people; a step size that falls as 1/(1 + decay · epoch); early stopping on validation,
which only a row that promises nothing may do. Models whose person is a vector get one for each person, fitted in closed
form before every epoch where there is one, else trained along; sequence models train on each person's last items.
Scoring is the learner's own user side, so that only where the weights come from differs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from penchant.common import taste
from penchant.common.errors import InvalidConfig
from penchant.common.interactions import Interactions
from penchant.common.learners.contract import State
from penchant.common.learners.neural.fedavg import FedAvg
from penchant.common.learners.neural.models import InterestModel, SequenceModel, build, group_loss, pad, seeded
from penchant.common.negatives import negatives
from penchant.common.streams import Streams
from penchant.common.taste import TasteConfig


@dataclass(frozen=True, kw_only=True)
class CentralTraining:
    """Settings of the central trainer.

    Attributes:
        epochs: passes at most.
        batch: groups (or sequences) in one step.
        lr, decay: Adam's step size is lr / (1 + decay · epoch).
        weight_decay: L2 pull of Adam.
        negatives: items drawn beside each positive.
        patience: epochs without a better validation after which training stops.
    """

    epochs: int = 15
    batch: int = 2048
    lr: float = 0.01
    decay: float = 0.05
    weight_decay: float = 1e-6
    negatives: int = 4
    patience: int = 6

    def __post_init__(self) -> None:
        if min(self.epochs, self.batch, self.negatives, self.patience) < 1 or not self.lr > 0:
            raise InvalidConfig("epochs, batch, negatives and patience must be ≥ 1 and lr positive")


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
        validate: higher is better; called after each epoch.
        after_epoch: told the epoch (from 1) and its validation.
    """
    model = build(learner.config.model, data.n_items, streams.seed("weights")).to(learner.where)
    people: dict[str, nn.Parameter] = {}
    for name in model.private:
        shape = (data.n_users, *model.get_parameter(name).shape)
        start = torch.randn(shape, generator=torch.Generator().manual_seed(streams.seed("people"))) * 0.1
        people[name] = nn.Parameter(start.to(learner.where))
    shared = [p for n, p in model.named_parameters() if n not in model.private]
    optimizer = torch.optim.Adam([*shared, *people.values()], lr=settings.lr, weight_decay=settings.weight_decay)
    best, best_value, since = _state(model), -np.inf, 0
    for number in range(1, settings.epochs + 1):
        for group in optimizer.param_groups:
            group["lr"] = settings.lr / (1 + settings.decay * (number - 1))
        random = streams.get("epoch", number)
        model.train()
        with seeded(streams.seed("dropout", number), learner.where):
            if isinstance(model, SequenceModel):
                losses = _sequence_epoch(model, data, settings, random)
            else:
                losses = _point_epoch(model, people, data, settings, random)
            for loss in losses:
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
                optimizer.step()
        value = validate(_state(model))
        after_epoch(number, value)
        if value > best_value:
            best, best_value, since = _state(model), value, 0
        elif (since := since + 1) >= settings.patience:
            break
    return best


def _point_epoch(
    model: InterestModel,
    people: Mapping[str, nn.Parameter],
    data: Interactions,
    settings: CentralTraining,
    random: np.random.Generator,
) -> Iterator[Tensor]:
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
            groups[a:b, 1:] = negatives(data.items[a:b], data.n_items, (b - a, settings.negatives), random)
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
        yield group_loss(vmap(logits)(own, candidates)).mean()


def _sequence_epoch(
    model: SequenceModel, data: Interactions, settings: CentralTraining, random: np.random.Generator
) -> Iterator[Tensor]:
    """The loss of each mini-batch of sequences, the last items of one person each."""
    histories = [h.items for h in data if len(h) > 1]
    where = next(model.parameters()).device
    order = random.permutation(len(histories))
    size = min(settings.batch, 64)
    for start in range(0, len(order), size):
        chosen = [histories[i] for i in order[start : start + size]]
        sequences = pad(chosen, model.max_length + 1, data.n_items).to(where)
        drawn = None
        if model.needs_negatives:
            shape = (sequences.shape[1], settings.negatives)
            parts = [negatives(h, data.n_items, shape, random) for h in chosen]
            drawn = torch.from_numpy(np.stack(parts)).long().to(where)
        yield model.sequence_loss(sequences, drawn).mean()


def _state(model: nn.Module) -> State:
    return {name: p.detach().cpu().numpy().copy() for name, p in model.named_parameters()}
