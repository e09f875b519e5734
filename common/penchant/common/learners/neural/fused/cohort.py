"""Trains a cohort of simulated people with compiled kernels, on several threads.

The result is that of `local.updates` and `sums.Clip` for each person, to float32 rounding of the training. Clipped
changes lie on the clip's grid, so their sums are exact, whichever thread adds them. Memory is the sums once for each
thread, and one person's rows. People are dealt longest first, in chunks that a thread takes when it is free.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from operator import le
from typing import Any, TypeVar

import numpy as np

from penchant.common import streams
from penchant.common.arrays import Arrays, Float64, Int64
from penchant.common.interactions import Interactions
from penchant.common.learners.neural.fused import kernels, private
from penchant.common.learners.neural.fused.simd import WIDTH
from penchant.common.learners.neural.local import closed_form
from penchant.common.learners.neural.models import MF, MLP, InterestModel, NeuMF
from penchant.common.learners.training import LocalTraining
from penchant.common.privacy import sums
from penchant.common.privacy.plan import DeviceNoise
from penchant.common.privacy.sums import Clip, Shapes
from penchant.common.streams import Streams

_Found = TypeVar("_Found")
_FINE = 2.0**-36
"""What changes are multiples of where nothing is clipped: sums up to 2¹⁷ are exact, so that no thread changes a bit."""
_CHUNKS = 8  # for each thread: few enough to cost nothing, enough that threads end together


@dataclass(frozen=True)
class _Part:
    """A part of `dense` is parameter[index], transposed where the kernels keep it so."""

    parameter: str
    index: Any = ...
    turned: bool = False

    def of(self, arrays: Mapping[str, Any]) -> Any:
        values = np.atleast_2d(arrays[self.parameter][self.index])
        return values.T if self.turned else values


@dataclass(frozen=True)
class _Layout:
    """Which parameters are what in the kernels; a table stands beside the person's own vector for it."""

    network: tuple[str, str] | None = None
    product: tuple[str, str] | None = None
    bias: str | None = None
    dense: Mapping[str, _Part] = field(default_factory=dict)


def _layout(model: InterestModel) -> _Layout | None:
    if isinstance(model, MF):
        return _Layout(product=("item.weight", "user.weight"), bias="bias.weight")
    if not isinstance(model, MLP | NeuMF):
        return None
    d = model.first.in_features // 2
    dense = {
        "u1": _Part("first.weight", np.s_[:, :d], turned=True),
        "v1": _Part("first.weight", np.s_[:, d:], turned=True),
        "b1": _Part("first.bias"),
        "b0": _Part("last.bias"),
    }
    if isinstance(model, MLP):
        return _Layout(
            network=("item.weight", "user.weight"), bias="bias.weight", dense={**dense, "wh": _Part("last.weight")}
        )
    return _Layout(
        network=("item_network.weight", "user_network.weight"),
        product=("item_product.weight", "user_product.weight"),
        dense={
            **dense,
            "w2": _Part("second.weight", turned=True),
            "b2": _Part("second.bias"),
            "wp": _Part("last.weight", np.s_[:, :d]),
            "wh": _Part("last.weight", np.s_[:, d:]),
        },
    )


def fits(model: InterestModel, config: LocalTraining) -> bool:
    """Whether there is a kernel for this training, without adapters."""
    return type(model) in (MF, MLP, NeuMF) and not config.proximal


class Cohort:
    """The kernels of one model.

    Args:
        model: one that `fits`; its weights are not read.
        config: of the training.
        frozen: names of weights that stay as they are and are in no sum.
        threads: that train at the same time.
    """

    def __init__(self, model: InterestModel, config: LocalTraining, frozen: Set[str], threads: int) -> None:
        layout = _layout(model)
        assert layout is not None  # `fits` was asked
        self._layout, self._config, self._frozen, self._threads = layout, config, frozen, threads
        self._spare: deque[tuple[tuple[int, ...], Any]] = deque(maxlen=threads)
        self._linear, self._n_items, self._tables = model.linear, model.n_items, model.item_tables
        self._shapes: Shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        dn = self._width(layout.network[0]) if layout.network else 0
        dp = self._width(layout.product[0]) if layout.product else 0
        h1 = self._width("first.bias") if "b1" in layout.dense else 0
        h2 = self._width("second.bias") if "b2" in layout.dense else 0
        hl = h2 or h1
        self._blocks = {  # of `dense`, in this order
            "u1": (dn, h1),
            "v1": (dn, h1),
            "b1": (1, h1),
            "w2": (h1, h2),
            "b2": (1, h2),
            "wh": (1, hl),
            "wp": (1, dp),
            "b0": (1, WIDTH),
        }
        ends = np.cumsum([rows * columns for rows, columns in self._blocks.values()]).tolist()
        self._starts = dict(zip(self._blocks, [0, *ends], strict=False))
        self._n_dense = ends[-1]
        self._model = kernels.Model(
            n_items=self._n_items,
            dn=dn,
            dp=dp,
            wide_network=self._shapes[layout.network[0]][1] if layout.network else 0,
            wide_product=self._shapes[layout.product[0]][1] if layout.product else 0,
            trains_dense=bool(layout.dense),
            h1=h1,
            h2=h2,
            hl=hl,
            **self._starts,
        )

    @staticmethod
    def can_clip(clip: Clip) -> bool:
        """Whether the kernels clip as `clip` does: whole contributions, on a grid that float32 can divide by."""
        return clip.row_norm is None and (clip.bound == math.inf or 1e-30 < clip.bound < 1e30)

    def partial_sum(
        self, state: Mapping[str, Any], histories: Interactions, clip: Clip, randoms: Callable[[int], Streams]
    ) -> Arrays:
        """Σ clip(trained − received) over these people, float64 by name.

        Args:
            state: the released weights, float32.
            randoms: the streams of each person, by row.
        """
        config, group, longest = self._config, 1 + self._config.negatives, int(histories.lengths.max(initial=1))
        given = (
            (histories.offsets, histories.items),
            streams.words(randoms, "examples", histories.n_users),
            self._where_vectors_start(state, histories),
            self._model,
            self._packed(state),
            self._rates(config.lr),
            np.float32(config.lr),
            (config.epochs, config.batch, group, self._fold_in_steps, config.fold_in_lr),
            (clip.bound, sums.SAFETY, sums.grid(clip.bound) or _FINE),
        )
        places = config.epochs * longest
        examples = max(min(config.batch, places), longest if self._fold_in_steps else 0)

        def work(people: Int64, scratch: Any, total: Any) -> tuple[int, int]:
            within, refused = kernels.train(people, *given, scratch, total)
            return within, refused

        totals, counts = self._on_threads(
            work,
            histories.lengths,
            (longest, longest + places * config.negatives, places * group, examples * group),
            self._totals,
        )
        clip.count(histories.n_users, within=sum(n for n, _ in counts), refused=sum(n for _, n in counts))
        return self._unpacked(totals)

    def private_sum(
        self,
        state: Mapping[str, Any],
        histories: Interactions,
        clip: Clip,
        rule: DeviceNoise,
        randoms: Callable[[int], Streams],
    ) -> Arrays:
        """Σ (trained − received) over these people by DP-SGD, noise included, float64 by name.

        As `DeviceSgd` for each of them, in law: noise on a row comes when the row is read, and what nobody reads, once
        for the sum. Sums of independent Gaussians are Gaussian with the summed variance, so this sum has the very law
        of the sum of theirs. One person's change alone does not have it: it is for sums that are released as they are,
        and not for what clips, compresses, audits or keeps a single change. Noise is simulated, from no cipher.

        Args:
            clip: an infinite one, which only counts.
            randoms: the streams of each person, by row.
        """
        group, longest, n = 1 + self._config.negatives, int(histories.lengths.max(initial=1)), histories.n_users
        lr, stddev = self._config.lr / rule.divisor, rule.noise_multiplier * rule.clip_norm
        words = np.stack([streams.words(randoms, name, n) for name in ("coins", "pool", "noise")], axis=1)
        given = (
            (histories.offsets, histories.items),
            words,
            self._model,
            self._packed(state),
            self._where_vectors_start(state, histories, fitted=False),
            self._rates(lr),
            (rule.clip_norm * sums.SAFETY, stddev, rule.rate, rule.steps, group, rule.min_history - 1, lr, _FINE),
        )
        rows = longest + rule.steps * longest * self._config.negatives

        def work(chosen: Int64, scratch: Any, total: Any) -> int:
            own, (last, drawn, values) = scratch, total
            refused: int = private.train_private(chosen, *given, own, last, drawn, values)
            return refused

        def totals() -> Any:
            last = np.zeros(min(self._n_items, rows), np.int32)
            return last, np.zeros(self._n_items, np.int64), self._totals()

        (_, drawn, values), refused = self._on_threads(
            work, histories.lengths, (longest, rows, longest * group, longest * group), totals
        )
        clip.count(n, within=n - sum(refused), refused=sum(refused))
        out = self._unpacked(values)
        owed = lr * stddev * np.sqrt(n * rule.steps - drawn)
        for name in (table for table in self._tables if table in out):
            random = randoms(0).get(f"owed/{name}") if n else np.random.default_rng(0)
            out[name] = out[name] + owed[:, None] * random.standard_normal(out[name].shape)
        return out

    @property
    def _fold_in_steps(self) -> int:
        return 0 if self._linear else self._config.fold_in_steps

    def _width(self, name: str) -> int:
        return -(-self._shapes[name][-1] // WIDTH) * WIDTH

    def _where_vectors_start(self, state: Mapping[str, Any], histories: Interactions, *, fitted: bool = True) -> Any:
        """float32[n_users or 1, dn + dp], in closed form where there is one and they are to be `fitted`."""
        sides, dn = (self._layout.network, self._layout.product), self._model.dn
        if self._linear and fitted:
            return _wide(closed_form(state[self._linear], histories), self._model.dp)
        parts = [_wide(state[side[1]], width) for side, width in zip(sides, (dn, self._model.dp), strict=True) if side]
        return np.concatenate(parts, axis=1)

    def _packed(self, state: Mapping[str, Any]) -> Any:
        layout, dense = self._layout, _aligned(self._n_dense, np.float32)
        for name, part in layout.dense.items():
            values = part.of(state)
            self._block(dense, name)[: values.shape[0], : values.shape[1]] = values
        if layout.product and "wp" not in layout.dense:
            self._block(dense, "wp")[:] = 1.0
        network, product = (
            _wide(state[side[0]], width).reshape(-1) if side else np.zeros(0, np.float32)
            for side, width in ((layout.network, self._model.dn), (layout.product, self._model.dp))
        )
        bias = np.ascontiguousarray(state[layout.bias], np.float32)[:, 0] if layout.bias else np.zeros(0, np.float32)
        return kernels.Weights(network=network, product=product, bias=np.ascontiguousarray(bias), dense=dense)

    def _rates(self, lr: float) -> Any:
        layout, dense = self._layout, _aligned(self._n_dense, np.float32)
        rate = {name: np.float32(0.0 if name in self._frozen else lr) for name in self._shapes}
        for name, part in layout.dense.items():
            rows, columns = part.of({part.parameter: np.empty(self._shapes[part.parameter], np.int8)}).shape
            self._block(dense, name)[:rows, :columns] = rate[part.parameter]
        network, product = (rate[side[0]] if side else np.float32(0.0) for side in (layout.network, layout.product))
        bias = rate[layout.bias] if layout.bias else np.float32(0.0)
        return kernels.Rates(network=network, product=product, bias=bias, dense=dense)

    def _block(self, dense: Any, name: str) -> Any:
        (rows, columns), start = self._blocks[name], self._starts[name]
        return dense[start : start + rows * columns].reshape(rows, columns)

    def _totals(self) -> Any:
        m = self._model
        sizes = (m.n_items * m.dn, m.n_items * m.dp, m.n_items if self._layout.bias else 0, self._n_dense)
        return kernels.Totals(*(_aligned(size, np.float64) for size in sizes))

    def _spare_scratch(self, sizes: tuple[int, ...]) -> tuple[tuple[int, ...], Any]:
        """A scratch of at least these sizes that no thread has, and its own."""
        with suppress(IndexError):
            room, own = self._spare.pop()
            if all(map(le, sizes, room)):
                return room, own
        return sizes, self._scratch(*sizes)

    def _scratch(self, longest: int, rows: int, places: int, examples: int) -> Any:
        """Room for one person: items of a history, rows touched, places of examples, examples of one step."""
        m, n, rows = self._model, -(-examples // 8) * 8, min(self._n_items, rows)

        def empty(size: int) -> Any:
            return _aligned(size, np.float32)

        own = kernels.Own(
            network=empty(rows * m.dn),
            product=empty(rows * m.dp),
            bias=empty(rows if self._layout.bias else 0),
            dense=empty(self._n_dense),
            user_network=empty(m.dn),
            user_product=empty(m.dp),
            rows=np.empty(rows, np.int32),
        )
        batch = kernels.Batch(
            vn=empty(n * m.dn),
            vp=empty(n * m.dp),
            a1=empty(n * m.h1),
            a2=empty(n * m.h2),
            z1=empty(n * m.h1),
            z2=empty(n * m.h2),
            gn=empty(n * m.dn),
            gp=empty(n * m.dp),
            g=empty(n),
            c=empty(max(m.h1, m.dp)),
            d1=empty(m.h1),
            un=empty(m.dn),
            up=empty(m.dp),
            grad=_aligned(self._n_dense, np.float32),
            turned1=empty(m.dn * m.h1),
            turned2=empty(m.h1 * m.h2),
        )
        return kernels.Scratch(
            slot=np.full(self._n_items, -1, np.int32),
            order=np.empty(longest, np.int32),
            place=np.empty(places, np.int32),
            own=own,
            batch=batch,
        )

    def _on_threads(
        self,
        work: Callable[[Int64, Any, Any], _Found],
        lengths: Int64,
        sizes: tuple[int, int, int, int],
        totals: Callable[[], Any],
    ) -> tuple[Any, list[_Found]]:
        """Deals people to threads; the sum of the threads' totals, and what `work` returned for each chunk.

        Args:
            sizes: of a thread's `_scratch`, which is kept for the next time it is large enough.
        """
        waiting = deque(_dealt(lengths, self._threads))

        def one_thread() -> tuple[Any, list[_Found]]:
            (room, own), total, found = self._spare_scratch(sizes), totals(), []
            while waiting:
                try:
                    people = waiting.popleft()
                except IndexError:  # another thread was faster
                    break
                found.append(work(people, own, total))
            self._spare.append((room, own))
            return total, found

        if self._threads == 1 or len(waiting) < 2:
            done = [one_thread()]
        else:
            done = [job.result() for job in [_pool(self._threads).submit(one_thread) for _ in range(self._threads)]]
        for other, _ in done[1:]:
            _add(done[0][0], other)
        return done[0][0], [one for _, found in done for one in found]

    def _unpacked(self, totals: Any) -> dict[str, Float64]:
        layout, m, out = self._layout, self._model, {}
        for side, width, total in ((layout.network, m.dn, totals.network), (layout.product, m.dp, totals.product)):
            if side:
                out[side[0]] = total.reshape(self._n_items, width)[:, : self._shapes[side[0]][1]]
        if layout.bias:
            out[layout.bias] = totals.bias[:, None]
        for name, part in layout.dense.items():
            whole = out.setdefault(part.parameter, np.zeros(self._shapes[part.parameter], np.float64))
            view = part.of({part.parameter: whole})
            view[...] = self._block(totals.dense, name)[: view.shape[0], : view.shape[1]]
        return {name: out[name] for name in self._shapes if name in out and name not in self._frozen}


def _wide(table: Any, width: int) -> Any:
    """float32[n, width], padded with zeros."""
    out = _aligned(len(table) * width, np.float32).reshape(len(table), width)
    out[:, : table.shape[1]] = table
    return out


def _aligned(size: int, dtype: Any) -> Any:
    """Zeros that start where a cache line does: a vector across two costs twice."""
    line, item = 64, np.dtype(dtype).itemsize
    raw = np.zeros(size * item + line, np.uint8)
    start = -raw.ctypes.data % line
    return raw[start : start + size * item].view(dtype)


def _add(totals: Any, others: Any) -> None:
    for mine, theirs in zip(totals, others, strict=True):
        if isinstance(mine, tuple):
            _add(mine, theirs)
        else:
            mine += theirs


def _dealt(lengths: Int64, threads: int) -> list[Int64]:
    """People in chunks of much the same work, longest histories first."""
    order = np.argsort(-lengths, kind="stable")
    done = np.cumsum(lengths[order] + 1)
    n = max(1, min(len(order), _CHUNKS * threads))
    cuts = np.searchsorted(done, done[-1] * np.arange(1, n) / n) if len(order) else []
    return [chunk for chunk in np.split(order, cuts) if len(chunk)]


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    """One for the process: nodes that answer at the same time share its threads."""
    return ThreadPoolExecutor(threads, thread_name_prefix="penchant-kernel")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not live on in a child
