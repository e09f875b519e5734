"""The softmax loss of `sequence.py` and its slopes at once, one history after another.

    cost = Σ_t loss_t / √m,    ∂loss_t/∂z(i) = p_t(i) − (1 − ε) [i = next] − ε/n

with p_t the softmax over the new items. Logits of a place and of the whole catalogue are the largest thing in training;
here they stand for one history at a time, stay in the cache, and are turned into slopes where they stand. Places of
padding have none. Under `torch.func.vmap` each person has a table of their own or all share one.

Source of the idea: Hsu et al. 2024, Liger Kernel, https://arxiv.org/abs/2410.10989, section 3.2 (fused linear cross
entropy).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class SoftmaxLoss(torch.autograd.Function):
    """The cost of one history, float32[], and its slopes by states and by table.

    Args, of `apply`:
        states: float32[L, d], after each item but the last.
        table: float32[n + 1, d], the last row for padding, which gets no slope.
        history: int64[L + 1], padded on the left with n.
        smoothing: ε.
    """

    @staticmethod
    def forward(states: Tensor, table: Tensor, history: Tensor, smoothing: float) -> Any:
        return tuple(part[0] for part in _every(states[None], table[None], history[None], smoothing))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*output[1:])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        slope, *_rest = grad_outputs
        by_states, by_table = ctx.saved_tensors
        return slope * by_states, slope * by_table, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        *tensors, smoothing = args
        states, tables, histories = (
            values.expand(info.batch_size, *values.shape) if at is None else values.movedim(at, 0)
            for values, at in zip(tensors, in_dims[:-1], strict=True)
        )
        return _every(states, tables, histories, smoothing), (0, 0, 0)


def _every(states: Tensor, tables: Tensor, histories: Tensor, smoothing: float) -> tuple[Tensor, Tensor, Tensor]:
    """Costs float32[U] and slopes float32[U, L, d] and float32[U, n + 1, d]."""
    n_items = tables.shape[1] - 1
    costs = states.new_zeros(len(states))
    by_states, by_tables = torch.zeros_like(states), tables.new_empty(tables.shape)
    by_tables[:, n_items] = 0
    starts = (histories[:, :-1] == n_items).sum(1).tolist()
    for u, start in enumerate(starts):
        own, vectors, history = states[u, start:], tables[u, :n_items], histories[u, start:]
        m = len(own)
        if not m:
            by_tables[u] = 0
            continue
        before, chosen, weight = history[:-1], history[1:, None], m**-0.5
        met = torch.where(torch.ones_like(before).expand(m, m).tril().bool(), before, before[:, None])  # [m, m]
        mean = vectors.mean(0)
        logits = own @ vectors.T  # [m, n]
        wanted = logits.gather(1, chosen)
        logits.scatter_(1, met, -torch.inf).scatter_(1, chosen, wanted)
        top = logits.amax(1, keepdim=True)
        total = logits.sub_(top).exp_().sum(1, keepdim=True)
        smoothed = smoothing * (wanted[:, 0] - own @ mean)
        costs[u] = ((total.log() + top - wanted)[:, 0] + smoothed).sum() * weight
        slopes = logits.mul_(weight / total).scatter_add_(1, chosen, torch.full_like(top, weight * (smoothing - 1)))
        by_states[u, start:] = torch.addmm(mean, slopes, vectors, beta=-smoothing * weight)
        shift = own.sum(0) * (-smoothing * weight / n_items)
        torch.addmm(shift, slopes.T, own, out=by_tables[u, :n_items])
    return costs, by_states, by_tables
