"""Local training of sequence models: a person alone, or many at once where people are simulated.

Each epoch is a step on the loss of a person's last items, those of one time mixed anew (`untied`), with FedProx's pull
where asked:

    w ← w − lr (∇ loss(w) + μ (w − w_received))

All that is drawn (order, negatives, what dropout hides) comes from the person's own streams and is given to the model
as numbers. So a person's update is the same, but for rounding, whoever shares the work and on whichever device.

Together, one `torch.func.vmap(grad(…))` of the model called with each person's weights (`functional_call`) takes a step
of a whole block. In the first epoch all weights are still the same ones and are not stacked. People stand in the order
of their lengths and are cut into blocks of a bounded size, so that little is padding and memory stays bounded; padding
gets no loss and no slope.

How many times as fast that is as one by one, in processor time of a sum over 64 people with 20 to 200 items, clips
included, with models' default sizes on one core (python benchmarks/together.py):

                1,700 items, 1 epoch    2 epochs    3,706 items, 1 epoch    2 epochs
    gru                          3.6         5.1                     3.6         3.7
    lstm                         2.6         2.0                     2.2         1.7
    cnn-lstm                     3.0         2.3                     2.2         2.0
    transformer                  1.8         1.6                     1.8         1.8

Of a block of 3 people only gru gained, of 4 the transformer too, of 7 all. A transformer's long sequences are products
of matrices, which take as long alone. With 200 people and 3,706 items a process grew by 270 to 290 MiB, one by one by
30 to 50.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import grad
from torch.func import functional_call, vmap
from torch.func import grad as slope_of

from penchant.common.arrays import Float32, Int64
from penchant.common.interactions import History
from penchant.common.learners.neural import adapters
from penchant.common.learners.neural.local import Weights, blocks
from penchant.common.learners.neural.models import Dropout, SequenceModel, untied
from penchant.common.learners.training import LocalTraining, can_train
from penchant.common.negatives import negatives
from penchant.common.streams import Streams

BLOCK = 6_000_000
"""Size of what is trained at once: its people times (the model's weights + `PLACE` · the longest sequence)."""
PLACE = 1000
"""Numbers that a place of a sequence holds while it trains, in those that a weight holds."""
FEW = 5
"""A block of fewer people is trained one by one: that is faster, as every operation costs the same for one or many."""

Update = dict[str, Float32]


def alone(
    model: SequenceModel,
    weights: Weights,
    history: History,
    config: LocalTraining,
    streams: Streams,
    frozen: Set[str] = frozenset(),
) -> Update:
    """One person's trained minus received weights, in plain PyTorch: what a real device runs.

    A history without a next item to predict, or with nothing to draw against, changes nothing.

    Args:
        weights: the released weights, the tables' adapters among them.
        frozen: names of weights that stay as they are and are left out of what comes back.
    """
    return _alone(_Lessons(model, history, config, streams), model, weights, config, frozen)


def _alone(
    lessons: _Lessons, model: SequenceModel, weights: Weights, config: LocalTraining, frozen: Set[str]
) -> Update:
    fixed, moved = _parted(weights, frozen)
    tables, loss = adapters.tables(model), _Loss(model).train()
    for epoch in range(config.epochs if lessons.any else 0):
        items, drawn, kept = lessons.of(epoch)
        now = {name: (weights[name] + change).requires_grad_() for name, change in moved.items()}
        whole = {f"model.{name}": values for name, values in adapters.whole({**now, **fixed}, tables).items()}
        inputs = [None if part is None else torch.from_numpy(part)[None].to(_where(weights)) for part in (items, drawn)]
        masks = {name: torch.from_numpy(mask).to(_where(weights)) for name, mask in kept.items()}
        value = functional_call(loss, {**whole, **masks}, tuple(inputs))
        for name, slope in zip(now, grad(value, list(now.values())), strict=True):
            moved[name] = moved[name] - config.lr * (slope + config.proximal * moved[name])
    return {name: change.cpu().numpy() for name, change in moved.items()}


def updates(
    model: SequenceModel,
    weights: Weights,
    histories: Sequence[History],
    config: LocalTraining,
    streams: Sequence[Streams],
    frozen: Set[str] = frozenset(),
    block: int = BLOCK,
    few: int = FEW,
) -> Iterator[tuple[int, Update]]:
    """Trains everybody and yields (index, update) in any order: for each person what `alone` gives, but for rounding.

    Who would change nothing is left out.

    Args:
        block, few: as `BLOCK` and `FEW`; they change speed and memory, not the result beyond rounding.
    """
    lessons = [_Lessons(model, h, config, own) for h, own in zip(histories, streams, strict=True)]
    n_weights = sum(values.numel() for values in weights.values())
    order = sorted((i for i, its in enumerate(lessons) if its.any), key=lambda i: lessons[i].length)
    for chosen in blocks(order, [n_weights + PLACE * its.length for its in lessons], block):
        if len(chosen) < few:
            for person in chosen:
                yield person, _alone(lessons[person], model, weights, config, frozen)
            continue
        changes = _train([lessons[i] for i in chosen], model, weights, config, frozen)
        arrays = {name: change.cpu().numpy() for name, change in changes.items()}
        for row, person in enumerate(chosen):
            yield person, {name: values[row] for name, values in arrays.items()}


def _train(
    lessons: Sequence[_Lessons], model: SequenceModel, weights: Weights, config: LocalTraining, frozen: Set[str]
) -> Weights:
    """What each person's weights moved by: float32[U, …] by name."""
    fixed, moved = _parted(weights, frozen)
    tables, stacked = adapters.tables(model), _StackedLoss(model).train()
    length = max(its.length for its in lessons)
    shapes = {name: site.shape(length - 1) for name, site in lessons[0].sites.items()}

    def loss(own: Weights, items: Tensor, drawn: Tensor | None, kept: Weights) -> Tensor:
        whole = adapters.whole({**own, **fixed}, tables)
        named = {f"model.{name}": values for name, values in whole.items()}
        cost: Tensor = functional_call(stacked, {**named, **kept}, (items, drawn))
        return cost

    for epoch in range(config.epochs):
        parts = [its.of(epoch) for its in lessons]
        items = _stack([part[0] for part in parts], (length,), left=True, fill=model.padding)
        drawn = None
        if model.needs_negatives:
            shape = (length, config.negatives)
            drawn = _stack([part[1] for part in parts], shape, left=True, fill=model.padding).to(_where(weights))
        kept = {
            name: _stack([part[2][name] for part in parts], shape, left=False).to(_where(weights))
            for name, shape in shapes.items()
        }
        now = {name: weights[name] + change if epoch else weights[name] for name, change in moved.items()}
        each = (0 if epoch else None, 0, None if drawn is None else 0, 0)
        slopes = vmap(slope_of(loss), in_dims=each)(now, items.to(_where(weights)), drawn, kept)
        for name, slope in slopes.items():
            if epoch and config.proximal:
                slope = slope + config.proximal * moved[name]
            moved[name] = torch.sub(moved[name], slope, alpha=config.lr)
    return moved


class _Lessons:
    """What one person learns from, epoch by epoch, in order.

    Attributes:
        any: whether there is something.
        length: items of a sequence.
        sites: by the name of its mask, what hides parts of the input.
    """

    def __init__(self, model: SequenceModel, history: History, config: LocalTraining, streams: Streams) -> None:
        self._model, self._history, self._config, self._streams = model, history, config, streams
        self._random = streams.get("sequence")
        self.length = min(len(history), model.max_length + 1)
        self.any = len(history) > 1 and (not model.needs_negatives or can_train(history.items, model.n_items))
        self.sites = {
            f"model.{name}.kept": module
            for name, module in model.named_modules()
            if isinstance(module, Dropout) and module.p
        }

    def of(self, epoch: int) -> tuple[Int64, Int64 | None, dict[str, Float32]]:
        """The items, oldest first, int64[L]; negatives int64[L, k] for a model that needs them; dropout's masks."""
        items = untied(self._history, self._random)[-self.length :].astype(np.int64)
        drawn = None
        if self._model.needs_negatives:
            shape, seed = (self.length, self._config.negatives), self._streams.word("negatives", epoch)
            drawn = negatives(self._history.items, self._model.n_items, shape, seed).astype(np.int64)
        return items, drawn, {name: site.draw(self.length - 1, self._random) for name, site in self.sites.items()}


class _Loss(nn.Module):
    """The loss of a sequence model as a module of its own, so that it can be called with other weights."""

    def __init__(self, model: SequenceModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, items: Tensor, drawn: Tensor | None) -> Tensor:
        return self.model.sequence_loss(items, drawn).sum()


class _StackedLoss(_Loss):
    """The same of one history, in operations that can be batched over people."""

    def forward(self, items: Tensor, drawn: Tensor | None) -> Tensor:
        return self.model.stacked_loss(items, drawn)


def _parted(weights: Weights, frozen: Set[str]) -> tuple[Weights, Weights]:
    """The frozen weights, and for all others how far they have moved: not at all."""
    fixed = {name: values for name, values in weights.items() if name in frozen}
    return fixed, {name: torch.zeros_like(values) for name, values in weights.items() if name not in fixed}


def _where(weights: Mapping[str, Tensor]) -> torch.device:
    return next(iter(weights.values())).device


def _stack(parts: Sequence[Any], shape: tuple[int, ...], *, left: bool, fill: int = 0) -> Tensor:
    """Arrays of different size as one tensor [U, *shape], filled up on the left of the first axis or at every end."""
    out = np.full((len(parts), *shape), fill, parts[0].dtype)
    for row, part in zip(out, parts, strict=True):
        if left:
            row[len(row) - len(part) :] = part
        else:
            row[tuple(slice(size) for size in part.shape)] = part
    return torch.from_numpy(out)
