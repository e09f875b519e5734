"""Histories for benchmarks: MovieLens' shape at any size, made in blocks, in memory or straight into files.

    n_u    = 20 + ⌊s · x_u⌋,  x_u log-normal with spread 1, at most 3/5 of the catalogue; s makes the sum exact
    p(r)   ∝ 1 / (r + n_items/8)²,  r = 0, 1, …  (Zipf and Mandelbrot's law with exponent 2)
    items  of one person: drawn one after another from p, and again while one comes that they have

With 6,040 people, 3,706 items and 1,000,000 interactions that is MovieLens-1M's mean of 165.6, its least of 20, nearly
its spread (standard deviation 185; there 193) and its popularity (the median item is with 117 people; there 124),
without its tastes: nothing that depends on who likes what may be read off it. p has an inverse in closed form, so an
item costs one division.

Times count up, each interaction has strength 1, and which item is the popular one is a random order of its own. A block
of people has a stream of its own, so where histories are kept changes none of them.

Source of the figures: Harper and Konstan 2015, The MovieLens Datasets, https://doi.org/10.1145/2827872, table 2.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from penchant.common import columns
from penchant.common.arrays import Int32, Int64
from penchant.common.catalogue import Catalogue
from penchant.common.columns import ColumnWriter
from penchant.common.errors import InvalidConfig
from penchant.common.interactions import Interactions
from penchant.common.streams import Streams

SHORTEST = 20
_SPREAD = 1.0  # stddev of the logarithm of what a person has beyond SHORTEST
_CELLS = 1 << 22  # people times items of one block: which item a person has fits the cache


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How many of everything.

    Attributes:
        users, items, interactions: n; between 20 and 3/5 of the items for each user in the mean.
    """

    users: int
    items: int
    interactions: int

    def __post_init__(self) -> None:
        if self.users < 1 or self.longest < SHORTEST:
            raise InvalidConfig(f"a benchmark needs a user and {-(-SHORTEST * 5 // 3)} items: raise --users or --items")
        least, most = SHORTEST * self.users, self.longest * self.users
        if not least <= self.interactions <= most:
            raise InvalidConfig(
                f"{self.users} users of {self.items} items have {least} to {most} interactions, not "
                f"{self.interactions}: change --items"
            )

    @property
    def longest(self) -> int:
        """Items of the person who has most."""
        return self.items * 3 // 5


def catalogue(n_items: int) -> Catalogue:
    """Items that have nothing but a number."""
    return Catalogue(ids=tuple(map(str, range(n_items))), name="benchmark")


def in_memory(shape: Shape, seed: int) -> Interactions:
    """Everybody's histories."""
    blocks = list(_blocks(shape, seed))
    return Interactions(
        offsets=_offsets(shape, seed),
        items=np.concatenate([block.items for block in blocks]),
        times=np.concatenate([block.times for block in blocks]),
        strengths=np.concatenate([block.strengths for block in blocks]),
        n_items=shape.items,
    )


def on_disk(shape: Shape, seed: int, folder: Path) -> Interactions:
    """The same histories, mapped from a folder; no more than a block of them is ever held."""
    with ColumnWriter(folder, n_items=shape.items) as writer:
        for block in _blocks(shape, seed):
            writer.add(block)
    return columns.load(folder)


def _offsets(shape: Shape, seed: int) -> Int64:
    """int64[n_users + 1], whose last is exactly the interactions asked for."""
    random = Streams(seed).get("bench/lengths")
    beyond, room = random.lognormal(0.0, _SPREAD, shape.users), shape.longest - SHORTEST
    left = shape.interactions - SHORTEST * shape.users
    low, high = 0.0, (room + 1) / beyond.min()  # of s
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if np.minimum(middle * beyond, room).sum() <= left else (low, middle)
    more = np.minimum(low * beyond, room).astype(np.int64)
    short = left - int(more.sum())  # what rounding down left over: less than one for each with room
    more[random.permutation(np.flatnonzero(more < room))[:short]] += 1
    return np.concatenate([[0], np.cumsum(SHORTEST + more)]).astype(np.int64)


def _blocks(shape: Shape, seed: int) -> Iterator[Interactions]:
    """Everybody's histories, block by block."""
    streams, offsets = Streams(seed), _offsets(shape, seed)
    named = streams.get("bench/items").permutation(shape.items).astype(np.int32)
    people = max(1, _CELLS // shape.items)
    holder = np.full(people * shape.items, -1, np.int32)
    for number, first in enumerate(range(0, shape.users, people)):
        own = offsets[first : first + people + 1]
        items = named[_ranks(np.diff(own), shape.items, holder, streams.get("bench/block", number))]
        yield Interactions(
            offsets=own - own[0],
            items=items,
            times=np.arange(own[0], own[-1]),
            strengths=np.ones(len(items), np.float32),
            n_items=shape.items,
        )


def _ranks(lengths: Int64, n_items: int, holder: Int32, random: np.random.Generator) -> Int32:
    """int32[n], so many different ranks for each person in turn.

    Args:
        holder: int32[≥ people · n_items], −1 everywhere, and again afterwards: who has a person's item while they draw.
    """
    n = int(lengths.sum())
    person = np.repeat(np.arange(len(lengths), dtype=np.int32) * np.int32(n_items), lengths)
    out, places = np.empty(n, np.int32), np.arange(n, dtype=np.int32)
    while len(places):
        ranks = _draw(n_items, len(places), random)
        cells = person[places] + ranks
        free = np.flatnonzero(holder[cells] < 0)
        asked = cells[free]
        holder[asked] = places[free]
        has = np.zeros(len(places), bool)
        has[free] = holder[asked] == places[free]  # of two that ask for one cell, the later has it
        out[places[has]] = ranks[has]
        places = places[~has]
    holder[person + out] = -1
    return out


def _draw(n_items: int, n: int, random: np.random.Generator) -> Int32:
    """int32[n], ranks from p: of its continuous form, P(rank < r) = (1/q − 1/(r + q)) / (1/q − 1/(n_items + q))."""
    q = n_items / 8
    below = random.random(n, np.float32)
    ranks = 1 / (np.float32(1 / q) - np.float32(1 / q - 1 / (n_items + q)) * below) - np.float32(q)
    return np.clip(ranks.astype(np.int32), 0, n_items - 1)
