"""The recurrences of PyTorch's GRU and LSTM, in operations that `torch.func.vmap` can batch over people.

    GRU    r, z = σ(x + W h),   n = tanh(x + r ∘ W h),                  h ← n + z ∘ (h − n)
    LSTM   i, f, o = σ(x + W h),   g = tanh(x + W h),   c ← f ∘ c + i ∘ g,   h ← o ∘ tanh c

x is what the layer below gives each gate, biases included; parameters are those of the `nn` module, which has no
batching rule (GRU) or one that follows every operation of every step (LSTM). Slopes are written out: backwards through
time goes only what one step hands to the one before, and the slope of W is one product over all places.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def carried(cell: nn.GRU | nn.LSTM, x: Tensor) -> Tensor:
    """The top layer's states float32[B, L, h] from float32[B, L, d]: what `cell(x)[0]` gives, cells of batch_first."""
    rule = _Gru if isinstance(cell, nn.GRU) else _Lstm
    for layer in range(cell.num_layers):
        to_gates, bias, carry, carry_bias = (
            getattr(cell, f"{name}_l{layer}") for name in ("weight_ih", "bias_ih", "weight_hh", "bias_hh")
        )
        x = rule.apply(F.linear(x, to_gates, bias), carry, carry_bias)[0]  # type: ignore[no-untyped-call]  # torch's
    return x


def _before(states: Tensor) -> Tensor:
    """What each place starts from: float32[B, L, h], zeros in the first."""
    return F.pad(states, (0, 0, 1, 0))[:, :-1]


class _Gru(torch.autograd.Function):
    """States [B, L, h] from gates' inputs [B, L, 3h], W [3h, h] and its bias [3h], and what the slope needs."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Any:
        size = weight.shape[1]
        h = x.new_zeros(len(x), size)
        states, gates = [], []
        for t in range(x.shape[1]):
            into, own = x[:, t], F.linear(h, weight, bias)
            rz = torch.sigmoid(into[:, : 2 * size] + own[:, : 2 * size])
            n = torch.tanh(into[:, 2 * size :] + rz[:, :size] * own[:, 2 * size :])
            h = torch.lerp(n, h, rz[:, size:])
            states.append(h)
            gates.append(torch.cat([rz, n, own[:, 2 * size :]], 1))
        return torch.stack(states, 1), torch.stack(gates, 1)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(inputs[1], *output)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        slope, *_rest = grad_outputs
        weight, states, gates = ctx.saved_tensors
        r, z, n, own = gates.chunk(4, 2)  # [B, L, h] each
        before = _before(states)
        by_n = (1 - z) * (1 - n * n)
        into = torch.stack([by_n * own * r * (1 - r), (before - n) * z * (1 - z), by_n], 2)  # [B, L, 3, h]: ∂h/∂gate
        through = torch.stack([into[:, :, 0], into[:, :, 1], by_n * r], 2)  # the same of W h
        last = states.shape[1] - 1
        h = slope[:, last]
        all_h = [h]
        for t in range(last, 0, -1):
            h = slope[:, t - 1] + h * z[:, t] + (h[:, None] * through[:, t]).flatten(1) @ weight
            all_h.append(h)
        all_h.reverse()
        every = torch.stack(all_h, 1)[:, :, None]  # [B, L, 1, h]
        gated = (every * through).flatten(2).flatten(0, 1)  # [B · L, 3h]
        return (every * into).flatten(2), gated.T @ before.flatten(0, 1), gated.sum(0)


class _Lstm(torch.autograd.Function):
    """States [B, L, h] from gates' inputs [B, L, 4h], W [4h, h] and its bias [4h], and what the slope needs."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Any:
        size = weight.shape[1]
        h = c = x.new_zeros(len(x), size)
        x = x + bias
        states, cells, gates = [], [], []
        for t in range(x.shape[1]):
            both = x[:, t] + h @ weight.T
            i_f, g, o = both[:, : 2 * size], both[:, 2 * size : 3 * size], both[:, 3 * size :]
            i_f, g, o = torch.sigmoid(i_f), torch.tanh(g), torch.sigmoid(o)
            c = i_f[:, size:] * c + i_f[:, :size] * g
            h = o * torch.tanh(c)
            states.append(h)
            cells.append(c)
            gates.append(torch.cat([i_f, g, o], 1))
        return torch.stack(states, 1), torch.stack(cells, 1), torch.stack(gates, 1)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(inputs[1], *output)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        slope, *_rest = grad_outputs
        weight, states, cells, gates = ctx.saved_tensors
        i, f, g, o = gates.chunk(4, 2)  # [B, L, h] each
        squashed = torch.tanh(cells)
        of_c = torch.stack(
            [g * i * (1 - i), _before(cells) * f * (1 - f), i * (1 - g * g)], 2
        )  # [B, L, 3, h]: ∂c/∂gate
        of_h = squashed * o * (1 - o)  # ∂h/∂o
        c_of_h = o * (1 - squashed * squashed)
        last = states.shape[1] - 1
        h, c = slope[:, last], slope[:, last] * c_of_h[:, last]
        parts = []
        for t in range(last, -1, -1):
            gated = torch.cat([(c[:, None] * of_c[:, t]).flatten(1), h * of_h[:, t]], 1)  # [B, 4h]
            parts.append(gated)
            if t:
                h = slope[:, t - 1] + gated @ weight
                c = c * f[:, t] + h * c_of_h[:, t - 1]
        parts.reverse()
        every = torch.stack(parts, 1)  # [B, L, 4h]
        flat = every.flatten(0, 1)
        return every, flat.T @ _before(states).flatten(0, 1), flat.sum(0)
