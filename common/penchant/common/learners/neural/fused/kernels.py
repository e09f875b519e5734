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

import hashlib
import math
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit

from penchant.common.learners.neural.fused import simd
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
from penchant.common.privacy import noise

_LAYERS = 256
_EDGES, _UNDER, _HEIGHTS = noise.ziggurat()
_LARGEST = float(np.finfo(np.float32).max) * 2.0**-36  # so that a step of the grid of no clip can divide it
_TILE = 8  # rows of a product that stay in registers
_FAST = {"reassoc", "contract", "nsz", "arcp"}  # and NaN stays NaN
_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": _FAST}
_SOURCES = (__file__, simd.__file__, noise.__file__)
_STAMP = hashlib.sha256(b"".join(Path(source).read_bytes() for source in _SOURCES)).hexdigest()[:12]


def _compiled(function: Any, **options: Any) -> Any:
    """Numba keeps what it compiled by a function's name and its own file; the name says what else is in it."""
    function.__qualname__ += f"-{_STAMP}"
    try:
        return njit(cache=True, **_OPTIONS, **options)(function)
    except RuntimeError:  # nowhere to keep it
        return njit(**_OPTIONS, **options)(function)


def _jit(function: Any) -> Any:
    return _compiled(function)


def _inline(function: Any) -> Any:
    return _compiled(function, forceinline=True)


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


@_inline
def word(seed, counter):
    """`draws.words` of one counter."""
    z = np.uint64(seed) + (np.uint64(counter) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@_inline
def uniform(seed, counter):
    """`draws.uniform` of one counter."""
    return np.float64(word(seed, counter) >> np.uint64(11)) * 2.0**-53


@_inline
def below(seed, counter, n):
    """`draws.below` of one counter."""
    return np.int64(uniform(seed, counter) * n)


@_jit
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


@_jit
def turn(rows, columns, matrix, at, out):
    """out[columns, rows] = matrix[rows, columns] transposed."""
    for i in range(rows):
        for j in range(columns):
            out[j * rows + i] = matrix[at + i * columns + j]


@_jit
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


@_inline
def whole(n):
    """n up to a whole tile."""
    return (n + _TILE - 1) // _TILE * _TILE


@_jit
def activate(n, width, values, bias, bias_at):
    """relu(values + bias), in place."""
    for e in range(n):
        for j in range(0, width, 16):
            z = add(load(values, e * width + j), load(bias, bias_at + j))
            store(values, e * width + j, where_positive(z, z))


@_jit
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


@_jit
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


@_jit
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


@_jit
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


@_jit
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


@_jit
def user_step(model, own, lr, batch):
    """One step of SGD on the person's vectors."""
    for k in range(model.dn):
        own.user_network[k] -= lr * batch.un[k]
    for k in range(model.dp):
        own.user_product[k] -= lr * batch.up[k]


@_inline
def row_of(item, slot, rows, n_rows):
    """The row of an item, a new one if it has none yet; and how many there are then."""
    r = slot[item]
    if r < 0:
        r = n_rows
        slot[item] = r
        rows[r] = item
        n_rows += 1
    return r, n_rows


@_inline
def fetch_row(model, weights, own, r):
    """Copies what row r starts from."""
    dn, dp, item = model.dn, model.dp, own.rows[r]
    for j in range(0, dn, 16):
        store(own.network, r * dn + j, load(weights.network, item * dn + j))
    for j in range(0, dp, 16):
        store(own.product, r * dp + j, load(weights.product, item * dp + j))
    if len(own.bias):
        own.bias[r] = weights.bias[item]


@_jit
def fetch(model, weights, own, n_rows):
    """Copies what a person starts from."""
    for r in range(n_rows):
        fetch_row(model, weights, own, r)
    for j in range(0, len(own.dense), 16):
        store(own.dense, j, load(weights.dense, j))


@_inline
def change(own, own_at, base, base_at, n, square):
    """own ← own − base over n values, and `square` with the squares of that in float64."""
    for j in range(0, n, 16):
        moved = minus(load(own, own_at + j), load(base, base_at + j))
        store(own, own_at + j, moved)
        square = fma(widen(moved), widen(moved), square)
    return square


@_inline
def cut(values, scale, grid, fine):
    """values · scale rounded to float32, then towards zero to the grid; dividing by a power of two is exact."""
    scaled = narrow(times(widen(values), splat(scale)))
    return times(truncate(times(scaled, splat(fine))), splat(grid)) if grid else scaled


@_inline
def add_cut(sums, sums_at, values, values_at, n, scale, grid, fine):
    """sums += values, cut as `sums.Clip` does."""
    for j in range(0, n, 16):
        one = cut(load(values, values_at + j), scale, grid, fine)
        store(sums, sums_at + j, add(load(sums, sums_at + j), widen(one)))


@_jit
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


@_jit
def draw_groups(items, seed, epochs, group, model, slot, order, own, place):
    """Writes `local.groups` as rows into `place`; returns how many rows the person touches, 0 with nothing to train."""
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


@_jit
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


@_inline
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


@_jit
def _tail(seed, counter, positive):
    start = _EDGES[1]
    while True:
        beyond = -math.log(1.0 - uniform(seed, counter)) / start
        other = -math.log(1.0 - uniform(seed, counter + 1))
        counter += 2
        if 2.0 * other > beyond * beyond:
            break
    return (start + beyond if positive else -start - beyond), counter


@_inline
def disturb(values, at, n, stddev, seed, counter):
    """values[at : at + n] += Gaussians; the next counter."""
    for i in range(at, at + n):
        one, counter = normal(seed, counter)
        values[i] += stddev * one
    return counter


@_inline
def dot(a, a_at, b, b_at, n):
    """Σ a b over n values, in float64: what follows may cancel."""
    sums = splat(0.0)
    for j in range(0, n, 16):
        sums = fma(widen(load(a, a_at + j)), widen(load(b, b_at + j)), sums)
    return total(sums)


@_inline
def squared(values):
    """Σ of the squares of a vector's lanes, in float64."""
    return total(times(widen(values), widen(values)))


@_jit
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


@_jit
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


@_jit
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


@_jit
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
