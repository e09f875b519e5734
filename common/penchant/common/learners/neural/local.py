"""Local training of models whose person is a vector (MF, NeuMF), for a block of people at once.

Each person starts from the released weights. First their own vector is fitted alone to their history ("fold-in"): in
closed form where the logit is linear in it (`taste.py`, every age alike), else by gradient steps. Then it and the
shared weights are trained together for some epochs of SGD on groups of one positive and its negatives. What counts
afterwards is the difference of the shared weights; the person's vector is thrown away, as the next round fits it afresh
from newer weights.

A person's training touches only the table rows of their own items and negatives, so a block works on those rows:
weights are stacked float32[U, …] with tables cut to the touched rows, and `torch.func.vmap` runs one gradient for all
U people. Batches are padded with masked groups, whose gradient is zero, so each person's result is that of training
alone, whoever shares the block. All draws come from the person's own stream.

With `proximal` μ each step's loss has  μ/2 ‖w − w_received‖²  beside it, over the shared weights, so that people who
differ pull less far apart.

Sources: McMahan et al. 2017, https://arxiv.org/abs/1602.05629, Algorithm 1 (ClientUpdate), with partial
personalisation as in Singhal et al. 2021, Federated Reconstruction, https://arxiv.org/abs/2102.03448, Algorithm 1; Li
et al. 2020, https://arxiv.org/abs/1812.06127, Algorithm 2 (FedProx).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from penchant.common import taste
from penchant.common.arrays import Float32, Int32, Int64
from penchant.common.interactions import Interactions
from penchant.common.learners.neural import adapters
from penchant.common.learners.neural.models import InterestModel, group_loss
from penchant.common.learners.training import LocalTraining, can_train, groups, seed_of
from penchant.common.taste import TasteConfig

Weights = dict[str, Tensor]
_EVERY_AGE = TasteConfig(decay=1.0)


@dataclass(frozen=True)
class Update:
    """One person's trained minus received shared weights, tables cut to the touched rows.

    Attributes:
        rows: int64[R], item positions of the table rows.
        values: by name; tables float32[R, …], all others whole.
    """

    rows: Int64
    values: dict[str, np.ndarray[Any, np.dtype[np.float32]]]


def updates(
    model: InterestModel,
    weights: Weights,
    histories: Sequence[Int32],
    config: LocalTraining,
    seeds: Sequence[int],
    block: int = 16384,
    frozen: Set[str] = frozenset(),
) -> Iterator[tuple[int, Update]]:
    """Trains everybody and yields (index, update), in any order.

    A history that is empty or holds the whole catalogue, with nothing to draw against, changes nothing and is left out.

    Args:
        weights: the released weights, the person's starting vector and the tables' adapters among them.
        histories: item positions of each person, int32[n].
        seeds: of each person's draws, in [0, 2⁶⁴).
        block: most table rows that the people trained at once touch together, so that a block fits the cache; it
            changes speed and memory, not the result beyond float rounding.
        frozen: names of weights that stay as they are and are left out of what is yielded.
    """
    trainable = (i for i in range(len(histories)) if can_train(histories[i], model.n_items))
    order = sorted(trainable, key=lambda i: len(histories[i]))
    for chosen in blocks(order, [len(h) * (1 + config.negatives) for h in histories], block):
        yield from zip(
            chosen,
            _train([histories[i] for i in chosen], [seeds[i] for i in chosen], model, weights, config, frozen),
            strict=True,
        )


def blocks(order: Sequence[int], rows: Sequence[int], limit: int) -> Iterator[list[int]]:
    """Cuts people, shortest history first, where their number times the longest's rows would pass the limit."""
    block: list[int] = []
    for person in order:
        if block and (len(block) + 1) * rows[person] > limit:
            yield block
            block = []
        block.append(person)
    if block:
        yield block


def fitted_scores(model: InterestModel, weights: Weights, histories: Sequence[Int32], config: LocalTraining) -> Float32:
    """The user side of a model without a closed form: float32[U, n_items], each person's vector fitted, all else fixed.

    The negatives of the fit are drawn from a stream that the history itself seeds: equal histories score equally.
    """
    out = np.zeros((len(histories), model.n_items), np.float32)
    where = next(iter(weights.values())).device
    everything = torch.arange(model.n_items, device=where)
    for row, history in enumerate(histories):
        own = {name: weights[name] for name in model.private}
        if can_train(history, model.n_items):
            once = torch.from_numpy(groups(history, model.n_items, replace(config, epochs=1), seed_of(history)))
            once = once.long().to(where)
            fit = grad(lambda own, once=once: _mean_loss(model, {**weights, **own}, once))
            for _ in range(config.fold_in_steps):
                own = {name: own[name] - config.fold_in_lr * slope for name, slope in fit(own).items()}
        with torch.no_grad():
            for chunk in torch.split(everything, 8192):
                logits = functional_call(model, {**weights, **own}, (chunk[None, :0], chunk[None]))
                out[row, int(chunk[0]) : int(chunk[-1]) + 1] = logits[0].cpu().numpy()
    return out


def _mean_loss(model: InterestModel, weights: Weights, groups: Tensor) -> Tensor:
    return group_loss(functional_call(model, weights, (groups[:, :0], groups))).mean()


def _train(
    histories: list[Int32],
    seeds: list[int],
    model: InterestModel,
    weights: Weights,
    config: LocalTraining,
    frozen: Set[str],
) -> list[Update]:
    own_groups = [groups(h, model.n_items, config, s) for h, s in zip(histories, seeds, strict=True)]
    touched = [np.unique(g) for g in own_groups]
    places = _stack([np.searchsorted(t, g) for t, g in zip(touched, own_groups, strict=True)])  # [U, S, 1 + k]
    sizes = torch.tensor([len(g) for g in own_groups])
    device = next(iter(weights.values())).device
    places, sizes = places.to(device), sizes.to(device)
    rows = _stack(touched).to(device)  # [U, R], padded with row 0, which no group then names

    stacked: Weights = {}
    for name, value in weights.items():
        if name in model.item_tables:
            stacked[name] = value[rows]
        else:
            stacked[name] = value.expand(len(own_groups), *value.shape).clone()
    private = {name: stacked[name] for name in model.private}
    fixed = {name: value for name, value in stacked.items() if name in frozen}
    before = {name: value.clone() for name, value in stacked.items() if name not in {*private, *fixed}}
    tables, steps = adapters.tables(model), config.fold_in_steps
    if model.linear is not None:
        (name,), steps = model.private, 0
        known = Interactions.of([h.tolist() for h in histories], model.n_items)
        own_vectors = closed_form(adapters.whole(weights, tables)[model.linear].cpu().numpy(), known)
        private[name] = torch.from_numpy(own_vectors)[:, None, :].to(device)
    shared = {name: stacked[name] for name in before}
    empty = places.new_zeros(1, 0)

    def loss(own: Weights, ours: Weights, fixed: Weights, candidates: Tensor, mask: Tensor) -> Tensor:
        """Sum over the real groups of one person's batch; candidates int64[B, 1 + k], mask float32[B]."""
        now = adapters.whole({**own, **ours, **fixed}, tables)
        logits = functional_call(model, now, (empty.expand(len(candidates), 0), candidates))
        return (group_loss(logits) * mask).sum()

    fold_in = vmap(grad(loss))
    joint = vmap(grad(loss, argnums=(0, 1)))
    every = (torch.arange(places.shape[1], device=device) < sizes[:, None]).to(torch.float32)  # [U, S]
    once = sizes // config.epochs  # groups in one pass, enough to fit one vector
    first = int(once.max())
    mean = every[:, :first] * (torch.arange(first, device=device) < once[:, None]) / once[:, None]
    for _ in range(steps):
        for name, slope in fold_in(private, shared, fixed, places[:, :first], mean).items():
            private[name] = private[name] - config.fold_in_lr * slope
    for at in range(0, places.shape[1], config.batch):
        batch = slice(at, at + config.batch)
        own, ours = joint(private, shared, fixed, places[:, batch], every[:, batch])
        for name, slope in own.items():
            private[name] = private[name] - config.lr * slope
        pulled = config.proximal * every[:, batch].amax(1)  # [U], 0 past a person's last step
        for name, slope in ours.items():
            if config.proximal:
                slope = slope + pulled.reshape(-1, *(1,) * (slope.ndim - 1)) * (shared[name] - before[name])
            shared[name] = shared[name] - config.lr * slope

    out = []
    change = {name: (shared[name] - before[name]).cpu().numpy() for name in before}
    for u, own_rows in enumerate(touched):
        cut = {n: v[u, : len(own_rows)] if n in model.item_tables else v[u] for n, v in change.items()}
        out.append(Update(own_rows.astype(np.int64), cut))
    return out


def closed_form(vectors: Float32, histories: Interactions) -> Float32:
    """float32[n_users, d]: the taste vectors of these histories, all their items weighing the same."""
    return taste.tastes(vectors, histories, _EVERY_AGE).astype(np.float32)


def _stack(parts: Sequence[np.ndarray[Any, Any]]) -> Tensor:
    """Parts of different length as one int64 tensor, padded with zeros at the end."""
    longest = max(len(p) for p in parts)
    out = np.zeros((len(parts), longest, *parts[0].shape[1:]), np.int64)
    for row, part in zip(out, parts, strict=True):
        row[: len(part)] = part
    return torch.from_numpy(out)
