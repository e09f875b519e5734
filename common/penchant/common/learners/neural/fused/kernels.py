"""A person's local training, compiled: mf, mlp and neumf in one set of functions, each person on their own rows.

    c = W₁ᵘ uᴺ + b₁,   aᵢ = relu(W₁ᵛ vᴺᵢ + c),   a′ᵢ = relu(W₂ aᵢ + b₂)
    s(i) = w · a′ᵢ + wᴾ · (uᴾ ∘ vᴾᵢ) + b + bᵢ

A part of no width is left out: mf has no network and wᴾ = 1, mlp one layer and no product, neumf no item bias. Widths
are padded with zeros to whole vectors; a padded weight and what it meets are both zero, so neither ever gets a
gradient. The person's half of the first layer is computed once a step and not once an example.

Matrices are kept transposed, [in, out]. All arrays are flat. In the code n counts the examples of a step, e is one of
them, r a row of the person's own copy of the tables: `place[e]` is the row of example e.
"""

# No annotations: numba infers types. Loops stand where NumPy would allocate.
# mypy: allow-untyped-defs, allow-untyped-calls

from __future__ import annotations

import math
from collections import namedtuple

import numpy as np

from penchant.common.learners.neural.fused.compiling import allocating, inline, jit
from penchant.common.learners.neural.fused.simd import (
    add,
    fma,
    load,
    minus,
    narrow,
    splat,
    spread,
    store,
    times,
    total,
    truncate,
    where_positive,
    widen,
)

_LARGEST = float(np.finfo(np.float32).max) * 2.0**-36  # so that a step of the grid of no clip can divide it
_TILE = 8  # rows of a product that stay in registers
Model = namedtuple("Model", "n_items dn dp wide_network wide_product trains_dense h1 h2 hl u1 v1 b1 w2 b2 wh wp b0")
"""Sizes, padded (dn, dp, h1, h2, hl) and not (wide_network, wide_product), and where each part of `dense` starts: W₁ᵘ,
W₁ᵛ, b₁, W₂, b₂, w, wᴾ, b."""
Weights = namedtuple("Weights", "network product bias dense")
"""float32: item tables vᴺ [n_items · dn], vᴾ [n_items · dp], bᵢ [n_items or 0], and `dense`."""
Rates = namedtuple("Rates", "network product bias dense")
"""Step sizes: a float32 for each table, an array like `dense`; 0 where nothing trains and in padding."""
Own = namedtuple("Own", "network product bias dense user_network user_product rows")
"""One person's copies; `rows` names the item of each row."""
Batch = namedtuple("Batch", "vn vp a1 a2 z1 z2 gn gp g c d1 un up grad turned1 turned2")
"""Scratch of one step: gathered rows, activations, gradients of each example and of everything that is not a row."""
Scratch = namedtuple("Scratch", "slot order place own batch")
"""What one thread writes on; `slot` has the row of each item, −1 between people."""
Totals = namedtuple("Totals", "network product bias dense")
"""float64 sums over people."""


@inline
def word(seed, counter):
    """`draws.words` of one counter."""
    z = np.uint64(seed) + (np.uint64(counter) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@inline
def uniform(seed, counter):
    """`draws.uniform` of one counter."""
    return np.float64(word(seed, counter) >> np.uint64(11)) * 2.0**-53


@inline
def below(seed, counter, n):
    """`draws.below` of one counter."""
    return np.int64(uniform(seed, counter) * n)


@jit
def product(m, n, k, a, a_row, a_column, b, b_at, out, out_at):
    """out[m, n] = a[m, k] b[k, n], with m a multiple of 8 and n of 16; `a` is read by its two strides."""
    for i in range(0, m, _TILE):
        for j in range(0, n, 16):
            zero = splat(np.float32(0.0))
            s0, s1, s2, s3, s4, s5, s6, s7 = zero, zero, zero, zero, zero, zero, zero, zero
            at = i * a_row
            for p in range(k):
                right = load(b, b_at + p * n + j)
                s0 = fma(spread(a, at), right, s0)
                s1 = fma(spread(a, at + a_row), right, s1)
                s2 = fma(spread(a, at + 2 * a_row), right, s2)
                s3 = fma(spread(a, at + 3 * a_row), right, s3)
                s4 = fma(spread(a, at + 4 * a_row), right, s4)
                s5 = fma(spread(a, at + 5 * a_row), right, s5)
                s6 = fma(spread(a, at + 6 * a_row), right, s6)
                s7 = fma(spread(a, at + 7 * a_row), right, s7)
                at += a_column
            to = out_at + i * n + j
            store(out, to, s0)
            store(out, to + n, s1)
            store(out, to + 2 * n, s2)
            store(out, to + 3 * n, s3)
            store(out, to + 4 * n, s4)
            store(out, to + 5 * n, s5)
            store(out, to + 6 * n, s6)
            store(out, to + 7 * n, s7)


@jit
def turn(rows, columns, matrix, at, out):
    """out[columns, rows] = matrix[rows, columns] transposed."""
    for i in range(rows):
        for j in range(columns):
            out[j * rows + i] = matrix[at + i * columns + j]


@jit
def gather(model, own, place, at, n, batch):
    """The rows of the examples, with rows of zeros up to a whole tile."""
    dn, dp = model.dn, model.dp
    for e in range(n):
        r = place[at + e]
        for j in range(0, dn, 16):
            store(batch.vn, e * dn + j, load(own.network, r * dn + j))
        for j in range(0, dp, 16):
            store(batch.vp, e * dp + j, load(own.product, r * dp + j))
    zero = splat(np.float32(0.0))
    for e in range(n, whole(n)):
        for j in range(0, dn, 16):
            store(batch.vn, e * dn + j, zero)


@inline
def whole(n):
    """n up to a whole tile."""
    return (n + _TILE - 1) // _TILE * _TILE


@jit
def activate(n, width, values, bias, bias_at):
    """relu(values + bias), in place."""
    for e in range(n):
        for j in range(0, width, 16):
            z = add(load(values, e * width + j), load(bias, bias_at + j))
            store(values, e * width + j, where_positive(z, z))


@jit
def forward(model, own, place, at, n, group, batch):
    """Activations, and g[e] = ∂loss/∂s of each example; a group is one positive and group − 1 negatives."""
    dn, dp, h1, h2, hl = model.dn, model.dp, model.h1, model.h2, model.hl
    dense, last = own.dense, batch.a2 if h2 else batch.a1
    for j in range(0, h1, 16):
        c = load(dense, model.b1 + j)
        for k in range(dn):
            c = fma(spread(own.user_network, k), load(dense, model.u1 + k * h1 + j), c)
        store(batch.c, j, c)
    if h1:
        product(whole(n), h1, dn, batch.vn, dn, 1, dense, model.v1, batch.a1, 0)
        activate(whole(n), h1, batch.a1, batch.c, 0)
    if h2:
        product(whole(n), h2, h1, batch.a1, h1, 1, dense, model.w2, batch.a2, 0)
        activate(whole(n), h2, batch.a2, dense, model.b2)
    for e in range(n):
        sums = splat(np.float32(0.0))
        for j in range(0, hl, 16):
            sums = fma(load(last, e * hl + j), load(dense, model.wh + j), sums)
        for j in range(0, dp, 16):
            pair = times(load(batch.vp, e * dp + j), load(own.user_product, j))
            sums = fma(pair, load(dense, model.wp + j), sums)
        batch.g[e] = total(sums) + dense[model.b0]
    if len(own.bias):
        for e in range(n):
            batch.g[e] += own.bias[place[at + e]]
    share = np.float32(1.0 / group)
    for e in range(n):
        chosen = np.float32(1.0) if e % group == 0 else np.float32(0.0)
        batch.g[e] = (np.float32(1.0) / (np.float32(1.0) + np.exp(-batch.g[e])) - chosen) * share


@jit
def backward(model, own, n, batch, rows):
    """z1, z2: ∂loss/∂(before relu) of each example; with `rows` also gn, gp: ∂loss/∂vᴺ, ∂loss/∂vᴾ."""
    dn, dp, h1, h2, hl = model.dn, model.dp, model.h1, model.h2, model.hl
    dense, last, slope = own.dense, batch.a2 if h2 else batch.a1, batch.z2 if h2 else batch.z1
    for e in range(n):
        for j in range(0, hl, 16):
            g = times(spread(batch.g, e), load(dense, model.wh + j))
            store(slope, e * hl + j, where_positive(load(last, e * hl + j), g))
    if h2:
        turn(h1, h2, dense, model.w2, batch.turned2)
        product(whole(n), h1, h2, batch.z2, h2, 1, batch.turned2, 0, batch.z1, 0)
        for e in range(n):
            for j in range(0, h1, 16):
                store(batch.z1, e * h1 + j, where_positive(load(batch.a1, e * h1 + j), load(batch.z1, e * h1 + j)))
    if rows:
        if h1:
            turn(dn, h1, dense, model.v1, batch.turned1)
            product(whole(n), dn, h1, batch.z1, h1, 1, batch.turned1, 0, batch.gn, 0)
        for e in range(n):
            for j in range(0, dp, 16):
                part = times(load(dense, model.wp + j), load(own.user_product, j))
                store(batch.gp, e * dp + j, times(spread(batch.g, e), part))


@jit
def user_gradient(model, own, n, batch):
    """un, up: ∂loss/∂uᴺ, ∂loss/∂uᴾ; d1 = Σₑ z1 on the way."""
    dn, dp, h1 = model.dn, model.dp, model.h1
    for j in range(0, h1, 16):
        sums = splat(np.float32(0.0))
        for e in range(n):
            sums = add(sums, load(batch.z1, e * h1 + j))
        store(batch.d1, j, sums)
    for k in range(dn):
        sums = splat(np.float32(0.0))
        for j in range(0, h1, 16):
            sums = fma(load(own.dense, model.u1 + k * h1 + j), load(batch.d1, j), sums)
        batch.un[k] = total(sums)
    for j in range(0, dp, 16):
        sums = splat(np.float32(0.0))
        for e in range(n):
            sums = fma(spread(batch.g, e), load(batch.vp, e * dp + j), sums)
        store(batch.c, j, sums)  # Σₑ g vᴾ, also what wᴾ needs
        store(batch.up, j, times(sums, load(own.dense, model.wp + j)))


@jit
def dense_gradient(model, own, n, batch):
    """grad: ∂loss/∂`dense`, after `user_gradient`."""
    dn, dp, h1, h2, hl, grad = model.dn, model.dp, model.h1, model.h2, model.hl, batch.grad
    for k in range(dn):
        for j in range(0, h1, 16):
            store(grad, model.u1 + k * h1 + j, times(spread(own.user_network, k), load(batch.d1, j)))
    if h1:
        product(dn, h1, n, batch.vn, 1, dn, batch.z1, 0, grad, model.v1)
        for j in range(0, h1, 16):
            store(grad, model.b1 + j, load(batch.d1, j))
    if h2:
        product(h1, h2, n, batch.a1, 1, h1, batch.z2, 0, grad, model.w2)
        for j in range(0, h2, 16):
            sums = splat(np.float32(0.0))
            for e in range(n):
                sums = add(sums, load(batch.z2, e * h2 + j))
            store(grad, model.b2 + j, sums)
    last = batch.a2 if h2 else batch.a1
    for j in range(0, hl, 16):
        sums = splat(np.float32(0.0))
        for e in range(n):
            sums = fma(spread(batch.g, e), load(last, e * hl + j), sums)
        store(grad, model.wh + j, sums)
    for j in range(0, dp, 16):
        store(grad, model.wp + j, times(load(batch.c, j), load(own.user_product, j)))
    sums = np.float32(0.0)
    for e in range(n):
        sums += batch.g[e]
    grad[model.b0] = sums


@jit
def step(model, own, place, at, n, rates, lr, batch):
    """One step of SGD on everything that the examples touch."""
    dn, dp = model.dn, model.dp
    for j in range(0, len(own.dense), 16):
        move = times(load(rates.dense, j), load(batch.grad, j))
        store(own.dense, j, fma(splat(np.float32(-1.0)), move, load(own.dense, j)))
    network, product_, bias = splat(-rates.network), splat(-rates.product), rates.bias
    for e in range(n):
        r = place[at + e]
        for j in range(0, dn, 16):
            store(own.network, r * dn + j, fma(network, load(batch.gn, e * dn + j), load(own.network, r * dn + j)))
        for j in range(0, dp, 16):
            store(own.product, r * dp + j, fma(product_, load(batch.gp, e * dp + j), load(own.product, r * dp + j)))
    if len(own.bias):
        for e in range(n):
            own.bias[place[at + e]] -= bias * batch.g[e]
    user_step(model, own, lr, batch)


@jit
def user_step(model, own, lr, batch):
    """One step of SGD on the person's vectors."""
    for k in range(model.dn):
        own.user_network[k] -= lr * batch.un[k]
    for k in range(model.dp):
        own.user_product[k] -= lr * batch.up[k]


@inline
def row_of(item, slot, rows, n_rows):
    """The row of an item, a new one if it has none yet; and how many there are then."""
    r = slot[item]
    if r < 0:
        r = n_rows
        slot[item] = r
        rows[r] = item
        n_rows += 1
    return r, n_rows


@inline
def fetch_row(model, weights, own, r):
    """Copies what row r starts from."""
    dn, dp, item = model.dn, model.dp, own.rows[r]
    for j in range(0, dn, 16):
        store(own.network, r * dn + j, load(weights.network, item * dn + j))
    for j in range(0, dp, 16):
        store(own.product, r * dp + j, load(weights.product, item * dp + j))
    if len(own.bias):
        own.bias[r] = weights.bias[item]


@jit
def fetch(model, weights, own, n_rows):
    """Copies what a person starts from."""
    for r in range(n_rows):
        fetch_row(model, weights, own, r)
    for j in range(0, len(own.dense), 16):
        store(own.dense, j, load(weights.dense, j))


@inline
def change(own, own_at, base, base_at, n, square):
    """own ← own − base over n values, and `square` with the squares of that in float64."""
    for j in range(0, n, 16):
        moved = minus(load(own, own_at + j), load(base, base_at + j))
        store(own, own_at + j, moved)
        square = fma(widen(moved), widen(moved), square)
    return square


@inline
def cut(values, scale, grid, fine):
    """values · scale rounded to float32, then towards zero to the grid; dividing by a power of two is exact."""
    scaled = narrow(times(widen(values), splat(scale)))
    return times(truncate(times(scaled, splat(fine))), splat(grid)) if grid else scaled


@inline
def add_cut(sums, sums_at, values, values_at, n, scale, grid, fine):
    """sums += values, cut as `sums.Clip` does."""
    for j in range(0, n, 16):
        one = cut(load(values, values_at + j), scale, grid, fine)
        store(sums, sums_at + j, add(load(sums, sums_at + j), widen(one)))


@jit
def clip_and_add(model, weights, own, n_rows, bound, safety, grid, sums):
    """Clips what one person's training changed, as `sums.Clip` does, and adds it.

    Returns 1 where it was within the bound, 0 where it was cut, −1 where no scaling can bound it and nothing was added.
    """
    dn, dp = model.dn, model.dp
    squares = change(own.dense, 0, weights.dense, 0, len(own.dense), splat(0.0))
    for r in range(n_rows):
        squares = change(own.network, r * dn, weights.network, own.rows[r] * dn, dn, squares)
        squares = change(own.product, r * dp, weights.product, own.rows[r] * dp, dp, squares)
    square = total(squares)
    if len(own.bias):
        for r in range(n_rows):
            own.bias[r] -= weights.bias[own.rows[r]]
            square += np.float64(own.bias[r]) * np.float64(own.bias[r])
    length = math.sqrt(square)
    within = length <= bound
    scale = 1.0 if within else bound * safety / length
    if not (length < np.inf and length * scale <= _LARGEST):
        return -1
    coarse, fine = np.float32(grid), np.float32(1.0 / grid if grid else 0.0)
    add_cut(sums.dense, 0, own.dense, 0, len(own.dense), scale, coarse, fine)
    for r in range(n_rows):
        item = own.rows[r]
        add_cut(sums.network, item * dn, own.network, r * dn, dn, scale, coarse, fine)
        add_cut(sums.product, item * dp, own.product, r * dp, dp, scale, coarse, fine)
    if len(own.bias):
        for r in range(n_rows):
            one = np.float32(np.float64(own.bias[r]) * scale)
            sums.bias[own.rows[r]] += np.trunc(one * fine) * coarse if grid else one
    return 1 if within else 0


@allocating
def draw_groups(items, seed, epochs, group, model, slot, order, own, place):
    """Writes `training.groups` as rows into `place`; returns how many the person touches, 0 with nothing to train."""
    n, n_rows = len(items), 0
    for i in range(n):
        _, n_rows = row_of(items[i], slot, own.rows, n_rows)
    n_own = n_rows
    few = 2 * n_own <= model.n_items
    below_own = np.sort(own.rows[: 0 if few else n_own])
    below_own = below_own - np.arange(len(below_own))
    if n_own < model.n_items:
        pool = word(seed, 0)
        size = epochs * n * (group - 1)
        for epoch in range(epochs):
            shuffle = word(seed, 1 + epoch)
            for i in range(n):
                order[i] = i
            for i in range(n - 1, 0, -1):
                j = below(shuffle, i, i + 1)
                order[i], order[j] = order[j], order[i]
            for i in range(n):
                at = (epoch * n + i) * group
                place[at] = slot[items[order[i]]]
                for k in range(group - 1):
                    counter = (epoch * n + i) * (group - 1) + k
                    if few:
                        item = below(pool, counter, model.n_items)
                        while 0 <= slot[item] < n_own:
                            counter += size
                            item = below(pool, counter, model.n_items)
                    else:
                        rank = below(pool, counter, model.n_items - n_own)
                        item = rank + np.searchsorted(below_own, rank, side="right")
                    r, n_rows = row_of(item, slot, own.rows, n_rows)
                    place[at + 1 + k] = r
    for r in range(n_rows):
        slot[own.rows[r]] = -1
    return n_rows if n_own < model.n_items else 0


@jit
def train(people, histories, seeds, starts, model, weights, rates, lr, training, clip, scratch, sums):
    """Trains these people one after another, each on their own rows, and adds each clipped change to `sums`.

    `histories` is (offsets, items), `training` (epochs, groups of a step, examples of a group, steps of the fold-in,
    their size), `clip` (C, safety, grid). `starts` float32[n_users or 1, dn + dp] is where a person's vectors start.

    Returns how many were within C, and how many were refused.
    """
    (offsets, items), (epochs, groups, group, fold_in_steps, fold_in_lr) = histories, training
    slot, order, place, own, batch = scratch
    within, refused = 0, 0
    for person in people:
        history = items[offsets[person] : offsets[person + 1]]
        n_rows = draw_groups(history, seeds[person], epochs, group, model, slot, order, own, place)
        if n_rows == 0:
            within += 1  # zeros
            continue
        fetch(model, weights, own, n_rows)
        start = starts[person if len(starts) > 1 else 0]
        for k in range(model.dn):
            own.user_network[k] = start[k]
        for k in range(model.dp):
            own.user_product[k] = start[model.dn + k]
        n = len(history)
        for _ in range(fold_in_steps):
            gather(model, own, place, 0, n * group, batch)
            forward(model, own, place, 0, n * group, group, batch)
            backward(model, own, n * group, batch, False)
            user_gradient(model, own, n * group, batch)
            user_step(model, own, np.float32(fold_in_lr / n), batch)
        for first in range(0, epochs * n, groups):
            at, size = first * group, min(groups, epochs * n - first) * group
            gather(model, own, place, at, size, batch)
            forward(model, own, place, at, size, group, batch)
            backward(model, own, size, batch, True)
            user_gradient(model, own, size, batch)
            dense_gradient(model, own, size, batch)
            step(model, own, place, at, size, rates, lr, batch)
        found = clip_and_add(model, weights, own, n_rows, clip[0], clip[1], clip[2], sums)
        within += found == 1
        refused += found == -1
    return within, refused
