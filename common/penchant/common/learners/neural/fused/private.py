"""DP-SGD of simulated devices, compiled: `kernels.py` with each group's gradient clipped and noise in every step.

`device_sgd.py` says what a device does and why. Here nobody looks at one device's change, and two shortcuts follow: a
group's norm in closed form, and noise where it is read.
"""

# No annotations, as in `kernels.py`.
# mypy: allow-untyped-defs, allow-untyped-calls

from __future__ import annotations

import math

import numpy as np

from penchant.common.learners.neural.fused.compiling import inline, jit
from penchant.common.learners.neural.fused.kernels import (
    backward,
    below,
    clip_and_add,
    dense_gradient,
    fetch_row,
    forward,
    gather,
    row_of,
    step,
    turn,
    uniform,
    user_gradient,
    word,
)
from penchant.common.learners.neural.fused.simd import add, fma, load, splat, spread, store, times, total, widen
from penchant.common.privacy import noise

_LAYERS = 256
_EDGES, _UNDER, _HEIGHTS = noise.ziggurat()


@inline
def normal(seed, counter):
    """A Gaussian from words `counter`, `counter + 1`, … of the seed, and the next counter: `privacy/noise.py` compiled.

    The words are no cipher's: this noise is simulated, and protects nobody.
    """
    while True:
        bits = word(seed, counter)
        counter += 1
        layer = np.int64(bits & np.uint64(_LAYERS - 1))
        share = np.float64(np.int64(bits) >> 11) * 2.0**-52  # in [−1, 1), from other bits than the layer's
        x = share * _EDGES[layer]
        if abs(share) < _UNDER[layer]:
            break
        if layer == 0:
            x, counter = _tail(seed, counter, share > 0)
            break
        height = _HEIGHTS[layer] + uniform(seed, counter) * (_HEIGHTS[layer + 1] - _HEIGHTS[layer])
        counter += 1
        if height < math.exp(-x * x / 2.0):
            break
    return np.float32(x), counter


@jit
def _tail(seed, counter, positive):
    start = _EDGES[1]
    while True:
        beyond = -math.log(1.0 - uniform(seed, counter)) / start
        other = -math.log(1.0 - uniform(seed, counter + 1))
        counter += 2
        if 2.0 * other > beyond * beyond:
            break
    return (start + beyond if positive else -start - beyond), counter


@inline
def disturb(values, at, n, stddev, seed, counter):
    """values[at : at + n] += Gaussians; the next counter."""
    for i in range(at, at + n):
        one, counter = normal(seed, counter)
        values[i] += stddev * one
    return counter


@inline
def dot(a, a_at, b, b_at, n):
    """Σ a b over n values, in float64: what follows may cancel."""
    sums = splat(0.0)
    for j in range(0, n, 16):
        sums = fma(widen(load(a, a_at + j)), widen(load(b, b_at + j)), sums)
    return total(sums)


@inline
def squared(values):
    """Σ of the squares of a vector's lanes, in float64."""
    return total(times(widen(values), widen(values)))


@jit
def group_square(model, own, place, at, first, group, batch):
    """‖∇ loss‖² of one group over everything that trains, the person's vectors among it, without that gradient.

    A layer's gradient over the group's examples is Σₑ aₑ ⊗ zₑ, of square length Σₑ Σₑ′ (aₑ·aₑ′)(zₑ·zₑ′); what does
    not depend on e comes out of the sums, and a table's row has the sum of the examples that name it.

    Source: Goodfellow 2015, https://arxiv.org/abs/1510.01799, for one example a sample; Li et al. 2022,
    https://arxiv.org/abs/2110.05679, section 4.1, for several.
    """
    dn, dp, h1, h2, hl = model.dn, model.dp, model.h1, model.h2, model.hl
    last, end = batch.a2 if h2 else batch.a1, first + group
    square, sum_g = 0.0, 0.0
    for e in range(first, end):
        sum_g += np.float64(batch.g[e])
    if model.trains_dense:
        square += sum_g * sum_g  # b
    for j in range(0, hl, 16):  # w
        sums = splat(np.float32(0.0))
        for e in range(first, end):
            sums = fma(spread(batch.g, e), load(last, e * hl + j), sums)
        square += squared(sums)
    for j in range(0, dp, 16):  # wᴾ and uᴾ
        sums = splat(np.float32(0.0))
        for e in range(first, end):
            sums = fma(spread(batch.g, e), load(batch.vp, e * dp + j), sums)
        on_weights, on_user = times(sums, load(own.user_product, j)), times(sums, load(own.dense, model.wp + j))
        square += squared(on_user)
        if model.trains_dense:
            square += squared(on_weights)
    for j in range(0, h2, 16):  # b₂
        sums = splat(np.float32(0.0))
        for e in range(first, end):
            sums = add(sums, load(batch.z2, e * h2 + j))
        square += squared(sums)
    for j in range(0, h1, 16):
        sums = splat(np.float32(0.0))
        for e in range(first, end):
            sums = add(sums, load(batch.z1, e * h1 + j))
        store(batch.d1, j, sums)
    square += dot(batch.d1, 0, batch.d1, 0, h1) * (1.0 + dot(own.user_network, 0, own.user_network, 0, dn))  # b₁, W₁ᵘ
    for k in range(0, dn, 16):  # uᴺ
        sums = splat(np.float32(0.0))
        for j in range(h1):
            sums = fma(spread(batch.d1, j), load(batch.turned1, j * dn + k), sums)
        square += squared(sums)
    for e in range(first, end):
        for f in range(e, end):
            twice = 1.0 if e == f else 2.0
            if h1:  # W₁ᵛ
                square += (
                    twice * dot(batch.z1, e * h1, batch.z1, f * h1, h1) * dot(batch.vn, e * dn, batch.vn, f * dn, dn)
                )
            if h2:  # W₂
                square += (
                    twice * dot(batch.z2, e * h2, batch.z2, f * h2, h2) * dot(batch.a1, e * h1, batch.a1, f * h1, h1)
                )
            if place[at + e] == place[at + f]:  # rows
                square += twice * dot(batch.gn, e * dn, batch.gn, f * dn, dn)
                square += twice * dot(batch.gp, e * dp, batch.gp, f * dp, dp)
                if len(own.bias):
                    square += twice * np.float64(batch.g[e]) * np.float64(batch.g[f])
    return square


@jit
def clip_groups(model, own, place, at, n, group, bound, batch):
    """Scales each group's part of every gradient to at most `bound` in all; one that is not finite counts as 0."""
    dn, dp, h1, h2 = model.dn, model.dp, model.h1, model.h2
    if h1:
        turn(dn, h1, own.dense, model.u1, batch.turned1)
    for first in range(0, n, group):
        square_length = group_square(model, own, place, at, first, group, batch)
        scale = np.float32(0.0)
        if 0.0 <= square_length < np.inf:
            scale = np.float32(min(1.0, bound / math.sqrt(square_length)) if square_length > 0.0 else 1.0)
        scales, none = splat(scale), splat(np.float32(0.0))
        for e in range(first, first + group):
            batch.g[e] = batch.g[e] * scale if scale > 0.0 else np.float32(0.0)
            for values, width in ((batch.z1, h1), (batch.z2, h2), (batch.gn, dn), (batch.gp, dp)):
                for j in range(e * width, (e + 1) * width, 16):
                    store(values, j, times(load(values, j), scales) if scale > 0.0 else none)  # 0 · ∞ is not 0


@jit
def draw_step(items, first, coins, pool, at_step, rate, group, model, slot, own, weights, place, last, n_rows):
    """One step's examples by a coin for each interaction, with negatives from the whole catalogue; rows come as met."""
    n, size = 0, len(items)
    for i in range(first, size):
        if uniform(coins, at_step * size + i) < rate:
            for k in range(group):
                item = np.int64(items[i])
                if k:
                    item = below(pool, (at_step * size + i) * (group - 1) + k - 1, model.n_items)
                before = n_rows
                place[n], n_rows = row_of(item, slot, own.rows, n_rows)
                if n_rows > before:
                    fetch_row(model, weights, own, before)
                    last[before] = 0
                n += 1
    return n, n_rows


@jit
def train_private(people, histories, seeds, model, weights, starts, rates, rule, scratch, last, drawn, sums):
    """DP-SGD of these people (`device_sgd.py`), each on the rows that they read; adds each change to `sums`.

    A row that a step does not read gets no noise yet. When it is read it gets all that it is owed, one Gaussian of the
    summed variance: the steps' noise is independent and nothing looked at the row in between, so its law is the same.
    What is owed at the end nobody reads but the sum: `Cohort` adds it there, less the steps that are paid in `drawn`.

    Source for rows: Lim et al. 2024, LazyDP, https://arxiv.org/abs/2404.08847.

    `rule` is (C, σ C, rate, steps, examples of a group, interactions left out at the start, step size, grid). `seeds`
    uint64[n_users, 3]: of coins, negatives, noise.

    Returns how many were refused: a change that is not finite counts as noise alone.
    """
    (offsets, items), (bound, stddev, rate, steps, group, left_out, lr, grid) = histories, rule
    slot, _, place, own, batch = scratch
    refused = 0
    for person in people:
        history = items[offsets[person] : offsets[person + 1]]
        coins, pool, noise_seed = seeds[person, 0], seeds[person, 1], seeds[person, 2]
        counter, n_rows = 0, 0
        for j in range(0, len(own.dense), 16):
            store(own.dense, j, load(weights.dense, j))
        for k in range(model.dn):
            own.user_network[k] = starts[0, k]
        for k in range(model.dp):
            own.user_product[k] = starts[0, model.dn + k]
        move = np.float32(lr * stddev)
        for at_step in range(steps):
            n, n_rows = draw_step(
                history, left_out, coins, pool, at_step, rate, group, model, slot, own, weights, place, last, n_rows
            )
            for e in range(n):
                r = place[e]
                if last[r] < at_step:
                    owed = np.float32(move * math.sqrt(np.float64(at_step - last[r])))
                    counter = disturb(own.network, r * model.dn, model.wide_network, owed, noise_seed, counter)
                    counter = disturb(own.product, r * model.dp, model.wide_product, owed, noise_seed, counter)
                    if len(own.bias):
                        counter = disturb(own.bias, r, 1, owed, noise_seed, counter)
                    last[r] = at_step
            if n:
                gather(model, own, place, 0, n, batch)
                forward(model, own, place, 0, n, group, batch)
                backward(model, own, n, batch, True)
                clip_groups(model, own, place, 0, n, group, bound, batch)
                user_gradient(model, own, n, batch)
                dense_gradient(model, own, n, batch)
                step(model, own, place, 0, n, rates, np.float32(lr), batch)
            for i in range(len(own.dense)):
                if rates.dense[i] > 0.0:
                    one, counter = normal(noise_seed, counter)
                    own.dense[i] += move * one
            counter = disturb(own.user_network, 0, model.wide_network, move, noise_seed, counter)
            counter = disturb(own.user_product, 0, model.wide_product, move, noise_seed, counter)
        sound = clip_and_add(model, weights, own, n_rows, np.inf, 1.0, grid, sums) >= 0
        refused += not sound
        for r in range(n_rows):
            if sound:
                drawn[own.rows[r]] += last[r]
            slot[own.rows[r]] = -1
        if not sound:  # noise alone, as much as anybody's; of the rows it is all owed
            for i in range(len(own.dense)):
                if rates.dense[i] > 0.0:
                    one, counter = normal(noise_seed, counter)
                    owed_noise = np.float64(move) * math.sqrt(np.float64(steps)) * np.float64(one)
                    sums.dense[i] += np.trunc(owed_noise / grid) * grid
    return refused
