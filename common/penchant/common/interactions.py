"""What people did: one interaction, one person's history, a population's histories.

An app speaks in `Interaction`. Everything below the first call is columnar: items are positions in a `Catalogue`, and
a population is one set of columns with an offset per person (the CSR layout), in each person's own order of time.

A population larger than memory lies in a folder (`columns.py`) and is read from there page by page; nothing here copies
a column for a whole population unless its docstring says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from penchant.common.arrays import Bool, Float32, Int32, Int64
from penchant.common.errors import InvalidConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Interaction:
    """One thing that one person did.

    Attributes:
        item: identifier in the catalogue.
        event: what was done, such as "view", "watch", "rate".
        time: UTC milliseconds since 1970.
        strength: how strong a sign of interest, in [0, 1].
        context: categories of the moment, such as {"device": "phone"}.
    """

    item: str
    event: str = "view"
    time: int = 0
    strength: float = 1.0
    context: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0.0 <= self.strength <= 1.0:  # also refuses NaN
            raise InvalidConfig(f"strength must be in [0, 1], not {self.strength}")


@dataclass(frozen=True, slots=True)
class History:
    """One person's interactions, oldest first.

    Attributes:
        items: int32[n], positions in the catalogue.
        times: int64[n], UTC milliseconds.
        strengths: float32[n], in [0, 1].
    """

    items: Int32
    times: Int64
    strengths: Float32

    def __len__(self) -> int:
        return len(self.items)

    def known(self, n_items: int) -> History:
        """Only what is in a catalogue of so many items: itself where that is all.

        >>> History.of([3, 9, 1]).known(4).items.tolist()
        [3, 1]
        """
        if _within(self.items, n_items):
            return self
        inside = (self.items >= 0) & (self.items < n_items)
        return History(self.items[inside], self.times[inside], self.strengths[inside])

    @classmethod
    def of(cls, items: Sequence[int]) -> History:
        """A history of these items one after another, each at full strength.

        >>> History.of([3, 1]).items.tolist()
        [3, 1]
        """
        n = len(items)
        return cls(np.asarray(items, np.int32), np.arange(n, dtype=np.int64), np.ones(n, np.float32))


@dataclass(frozen=True, slots=True)
class Interactions:
    """A population's histories as columns; read-only, so that no user of them can reorder what others read.

    Attributes:
        offsets: int64[n_users + 1]; person u owns rows offsets[u] to offsets[u + 1].
        items: int32[n], positions in the catalogue.
        times: int64[n], UTC milliseconds.
        strengths: float32[n], in [0, 1].
        n_items: size of the catalogue the positions point into.
        users: their names in the data, one each; empty when they have none.
        events: uint8[n], positions in `event_names`; None when every event is the same.
        context: a column of categories for each name, each object[n].
    """

    offsets: Int64
    items: Int32
    times: Int64
    strengths: Float32
    n_items: int
    users: tuple[str, ...] = ()
    events: np.ndarray | None = None
    event_names: tuple[str, ...] = ("view",)
    context: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("offsets", "items", "times", "strengths"):
            view = getattr(self, name).view()
            view.flags.writeable = False
            object.__setattr__(self, name, view)

    @property
    def n_users(self) -> int:
        return len(self.offsets) - 1

    def __len__(self) -> int:
        return len(self.items)

    @property
    def lengths(self) -> Int64:
        """int64[n_users], interactions of each person."""
        return np.diff(self.offsets)

    @property
    def rows(self) -> Int32:
        """int32[n], the person of each interaction."""
        return np.repeat(np.arange(self.n_users, dtype=np.int32), self.lengths)

    def history(self, user: int) -> History:
        """One person's history; views, not copies."""
        a, b = self.offsets[user], self.offsets[user + 1]
        return History(self.items[a:b], self.times[a:b], self.strengths[a:b])

    def __iter__(self) -> Iterator[History]:
        return (self.history(u) for u in range(self.n_users))

    def keep(self, mask: Bool) -> Interactions:
        """The same people with only the interactions that `mask` (bool[n]) marks."""
        counts = np.bincount(self.rows[mask], minlength=self.n_users)
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        return self._take(offsets, np.flatnonzero(mask), self.users)

    def known(self, n_items: int) -> Interactions:
        """Only what is in a catalogue of so many items: itself where that is all."""
        if _within(self.items, n_items):
            return self
        return self.keep((self.items >= 0) & (self.items < n_items))

    def select(self, users: Int32 | Int64 | Sequence[int]) -> Interactions:
        """The histories of these people, in the order given: views where they stand one after another here."""
        users = np.asarray(users, np.int64)
        if len(users) and users[0] >= 0 and (np.diff(users) == 1).all():
            first, end = int(users[0]), int(users[-1]) + 1
            rows = slice(int(self.offsets[first]), int(self.offsets[end]))
            return self._take(self.offsets[first : end + 1] - self.offsets[first], rows, tuple(self.users[first:end]))
        lengths = self.offsets[users + 1] - self.offsets[users]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        starts = np.repeat(self.offsets[users] - offsets[:-1], lengths)
        names = tuple(self.users[u] for u in users) if self.users else ()
        return self._take(offsets, np.arange(offsets[-1]) + starts, names)

    def counts(self) -> Int64:
        """int64[n_items], how many interactions each item has."""
        return np.bincount(self.items, minlength=self.n_items).astype(np.int64)

    def _take(self, offsets: Int64, at: Int64 | slice, users: tuple[str, ...]) -> Interactions:
        return Interactions(
            offsets=offsets,
            items=self.items[at],
            times=self.times[at],
            strengths=self.strengths[at],
            n_items=self.n_items,
            users=users,
            events=None if self.events is None else self.events[at],
            event_names=self.event_names,
            context={name: column[at] for name, column in self.context.items()},
        )

    @classmethod
    def one(cls, history: History, n_items: int) -> Interactions:
        """A population of one person; views."""
        offsets = np.array([0, len(history)], np.int64)
        return cls(offsets, history.items, history.times, history.strengths, n_items)

    @classmethod
    def of(cls, histories: Sequence[Sequence[int]], n_items: int) -> Interactions:
        """A population written out by hand, for tests and examples.

        >>> Interactions.of([[2, 0], [], [1]], n_items=3).lengths.tolist()
        [2, 0, 1]
        """
        lengths = [len(h) for h in histories]
        n = sum(lengths)
        return cls(
            offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            items=np.array([i for h in histories for i in h], np.int32),
            times=np.concatenate([np.arange(k) for k in lengths] or [np.zeros(0, np.int64)]).astype(np.int64),
            strengths=np.ones(n, np.float32),
            n_items=n_items,
        )


def runs(lengths: Int64, size: int) -> Iterator[slice]:
    """Cuts people into runs, one after another, of at most `size` rows each; one with more stands alone.

    A person counts for one row more than their history has, so that a run's people are bounded too.

    Args:
        lengths: int64[n], interactions of each person. Nobody at all is one empty run.

    >>> [(run.start, run.stop) for run in runs(np.array([2, 2, 9, 0, 1]), size=6)]
    [(0, 2), (2, 3), (3, 5)]
    """
    ends, first = np.cumsum(lengths + 1), 0
    while True:
        before = int(ends[first - 1]) if first else 0
        end = max(int(np.searchsorted(ends, before + size, side="right")), min(first + 1, len(ends)))
        yield slice(first, end)
        if end == len(ends):
            return
        first = end


def _within(items: Int32, n_items: int) -> bool:
    return not len(items) or bool(items.min() >= 0 and items.max() < n_items)
