"""What a person did and what was learned from it, kept on their device, encrypted, and forgotten on their word.

    events    (id, sealed)     one thing the person did
    records   (id, sealed)     one named value: a profile, consent, a node's key; record 0 is the store's own state

Two numbers a row are all that the database `store.db` holds in clear: its place and its size, in steps of 128 bytes. A
record's place is a keyed hash of its name. How a row is sealed: `_seal.py`; where the key comes from: `_keys.py`.

The state holds how many events there are, their last number, a keyed sum over their nonces and each record's newest
nonce, and is sealed again in each transaction. So a row that was changed, moved or swapped fails to open, a record put
back to an older state or removed is refused, and events removed or put back are noticed (`check`). Not noticed: the
whole folder replaced by an older copy of itself, or a log (`store.db-wal`) whose end was cut off.

Retention, at each write and when the store is opened: the oldest events beyond `max_events` go, and those older than
`days`. A clock can be wrong, so time is believed late: an event is too old only if two readings at least a day apart,
with none below the first in between, both say so. A clock that jumps ahead for an hour, or goes back, deletes nothing.

SQLite in WAL mode, synced at each commit, deleted content overwritten. One process at a time, by a lock of the
operating system on `store.lock`, which ends with its process.

Source of the sum: MSet-Add-Hash, Clarke et al. 2003, https://eprint.iacr.org/2003/186, section 5.
"""

from __future__ import annotations

import base64
import contextlib
import copy
import json
import math
import os
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from penchant.client import _keys, _pages
from penchant.client._keys import NONCE_BYTES, Envelope, KeySource
from penchant.client._lock import FolderLock
from penchant.client._seal import Sealer, encoded, packed
from penchant.common.errors import (
    InvalidConfig,
    StoreDamaged,
    StoreError,
    StoreFull,
    StoreLocked,
    StoreNewer,
    WrongKey,
)

SCHEMA_VERSION = 1
MIGRATIONS: Mapping[int, Callable[[sqlite3.Connection, Sealer], None]] = {}
"""What makes a store of version n one of version n + 1; all that a store needs run in one transaction."""
DATABASE, ENVELOPE, TOMBSTONE, DAMAGED = (
    "store.db",
    "store.envelope",
    "tombstone.json",
    "store.damaged.db",
)
POINTS = (
    *(f"create:{point}" for point in ("before", "key", "database", "envelope")),
    *(
        f"{what}:{point}"
        for what in ("append", "put", "delete", "transaction", "open")
        for point in ("before", "written", "committed")
    ),
    *(f"migrate:{point}" for point in ("before", "changed", "committed")),
    *(f"rewrap:{point}" for point in ("before", "made", "half", "wrapped", "destroyed")),
    *(f"salvage:{point}" for point in ("before", "moved", "written", "done")),
    *(f"forget:{point}" for point in ("before", "begun", "key", "envelope", "files", "tombstone", "done")),
)
"""Where a store calls `at`: before, between and after all that it writes."""

DAY_MS = 86_400_000
_STATE = 0
_APPLICATION = 0x50454E43
_COLUMNS = "(id INTEGER PRIMARY KEY, sealed BLOB NOT NULL)"
_SCHEMA = (f"CREATE TABLE events {_COLUMNS}", f"CREATE TABLE records {_COLUMNS}")
_PUT = "INSERT INTO records VALUES (?, ?) ON CONFLICT (id) DO UPDATE SET sealed = excluded.sealed"


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """One thing that the person did, as it is kept.

    Attributes:
        item: identifier in the catalogue.
        kind: what was done, such as "view", "watch", "rate".
        at_ms: UTC milliseconds since 1970.
        strength: how strong a sign of interest, in [0, 1], where the app said so.
        dwell_s: how long, in seconds; None where it was not measured.
        rating: what the person gave; None where there is none.
        context: categories of the moment, such as {"device": "phone"}.
        number: its place in the store, from 1; 0 until it is kept. Events that differ only in it are equal.
    """

    item: str
    kind: str
    at_ms: int
    strength: float | None = None
    dwell_s: float | None = None
    rating: float | None = None
    context: Mapping[str, str] = field(default_factory=dict)
    number: int = field(default=0, compare=False)

    def __post_init__(self) -> None:
        if not all(isinstance(text, str) and text for text in (self.item, self.kind)):
            raise InvalidConfig("item and kind of an event are texts that are not empty")
        if isinstance(self.at_ms, bool) or not isinstance(self.at_ms, int) or not 0 <= self.at_ms < 1 << 63:
            raise InvalidConfig("at_ms of an event is a whole number of milliseconds since 1970")
        numbers = (self.strength, self.dwell_s, self.rating)
        if not all(x is None or (isinstance(x, int | float) and not isinstance(x, bool)) for x in numbers):
            raise InvalidConfig("strength, dwell_s and rating of an event are numbers, or None")
        if self.strength is not None and not 0.0 <= self.strength <= 1.0:  # also refuses NaN
            raise InvalidConfig("strength must be in [0, 1]")
        if not (self.dwell_s is None or 0.0 <= self.dwell_s < math.inf):
            raise InvalidConfig("dwell_s must be ≥ 0 and finite")
        if not (self.rating is None or math.isfinite(self.rating)):
            raise InvalidConfig("a rating must be finite")
        if not all(isinstance(text, str) for pair in self.context.items() for text in pair):
            raise InvalidConfig("a context maps texts to texts")

    def fields(self) -> dict[str, Any]:
        """All but its number and what says nothing, as JSON types."""
        found: dict[str, Any] = {"item": self.item, "kind": self.kind, "at_ms": self.at_ms}
        found |= {} if self.strength is None else {"strength": self.strength}
        found |= {} if self.dwell_s is None else {"dwell_s": self.dwell_s}
        found |= {} if self.rating is None else {"rating": self.rating}
        return found | ({"context": dict(self.context)} if self.context else {})


@dataclass(frozen=True, kw_only=True)
class Retention:
    """How long events are kept. Whichever comes first; None is for ever.

    Attributes:
        days: an event goes when it is older, as the header says.
        max_events: with more, the oldest go.
    """

    days: float | None = 365.0
    max_events: int | None = 50_000

    def __post_init__(self) -> None:
        if not (self.days is None or 0 < self.days < math.inf):
            raise InvalidConfig(f"days must be positive and finite, or None for ever, not {self.days}")
        if not (self.max_events is None or self.max_events >= 1):
            raise InvalidConfig(f"max_events must be ≥ 1, or None for all, not {self.max_events}")


@dataclass(frozen=True)
class Damage:
    """What is not what was written, and why it is thought so."""

    where: str
    why: str


@dataclass(frozen=True, kw_only=True)
class Salvaged:
    """What was saved of a damaged store.

    Attributes:
        n_events: how many events.
        records: names of the records.
        lost: what could not be read.
    """

    n_events: int
    records: tuple[str, ...]
    lost: tuple[Damage, ...]


@dataclass
class _State:
    """What the store knows of itself.

    Attributes:
        n, last, total: how many events, number of the last, and the keyed sum over their nonces.
        oldest_ms: no event is older; None where there is none.
        believed_ms, noted_ms: the time that retention goes by, and a reading that may become it a day later.
        records: newest nonce of each, by name.
    """

    noted_ms: int
    n: int = 0
    last: int = 0
    total: int = 0
    oldest_ms: int | None = None
    believed_ms: int = 0
    records: dict[str, str] = field(default_factory=dict)

    def note(self, now_ms: int) -> bool:
        """Takes a reading of the clock; whether anything changed."""
        if now_ms < self.noted_ms:
            self.noted_ms = now_ms  # what was said before is taken back
        elif now_ms - self.noted_ms >= DAY_MS:
            self.believed_ms, self.noted_ms = self.noted_ms, now_ms
        else:
            return False
        return True


class Store:
    """One person's store in one folder; `open` makes one. Safe to share between threads, not with a forked child."""

    def __init__(
        self,
        folder: Path,
        lock: FolderLock,
        db: sqlite3.Connection,
        sealer: Sealer,
        source: tuple[KeySource, dict[str, Any], bytes],
        *,
        retention: Retention,
        now_ms: Callable[[], int],
        timeout_s: float,
        at: Callable[[str], None],
    ) -> None:
        self.folder, self.retention = folder, retention
        self._file_lock, self._db, self._sealer = lock, db, sealer
        self._source, self._wrapped, self._data_key = source
        self._now_ms, self._timeout_s, self._at = now_ms, timeout_s, at
        self._lock, self._pid = threading.RLock(), os.getpid()
        self._damaged: dict[str, Damage] = {}
        self._writing = self._failed = False
        self._close = weakref.finalize(self, _close, db, lock)

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        key: KeySource | None = None,
        retention: Retention | None = None,
        now_ms: Callable[[], int] = _now_ms,
        timeout_s: float = 5.0,
        at: Callable[[str], None] = lambda point: None,
    ) -> Self:
        """The store in a folder, made where there is none. A forget or migration that was cut short is finished first.

        Args:
            folder: made readable for its owner alone.
            key: None takes, for a new store, the system's keyring, or where there is none a key file in the folder; for
                an old one what it was made with, where that needs no asking.
            retention: None is `Retention()`.
            now_ms: UTC milliseconds.
            timeout_s: how long a call waits for another thread.
            at: called at each of POINTS; tests stop there.

        Raises:
            StoreLocked: another process has it.
            WrongKey: the key does not open it.
            StoreDamaged: a page or file is damaged; `Store.salvage` keeps what is readable.
            StoreNewer: a later version wrote it.
            StoreFull: no room.
            InvalidConfig: the folder cannot be used.
        """
        folder = Path(folder)
        lock = FolderLock(_prepared(folder))
        db: sqlite3.Connection | None = None
        try:
            envelope = Envelope(folder / ENVELOPE)
            _finish(folder, key, at)
            if not envelope.exists():
                _create(folder, key, now_ms, at)
            source, record, data_key = _unlocked(folder, key)
            if not isinstance(source, _keys.KeyFile):  # what a rewrap left that was cut short
                _keys.KeyFile(folder / _keys.KEY_FILE).destroy({})
            if not (folder / DATABASE).exists():
                raise StoreDamaged(f"{folder / DATABASE} is gone: Store.salvage keeps what is readable")
            sealer = Sealer(data_key)
            db = _connect(folder / DATABASE, timeout_s)
            record = _migrated(db, sealer, envelope, record, at)
            store = cls(
                folder,
                lock,
                db,
                sealer,
                (source, record, data_key),
                retention=retention or Retention(),
                now_ms=now_ms,
                timeout_s=timeout_s,
                at=at,
            )
            store._begin()
            return store
        except BaseException:
            _close(db, lock)
            raise

    def _begin(self) -> None:
        """Reads the state, compares it with what there is, and lets retention do its work."""
        with _typed(self.folder):
            ((problem,),) = self._db.execute("PRAGMA quick_check(1)")  # costs as much as reading the file
            schema = tuple(sql for (sql,) in self._db.execute("SELECT sql FROM sqlite_master ORDER BY rowid"))
            if problem == b"ok" and schema != tuple(map(encoded, _SCHEMA)):
                problem = b"its tables are not what was made"
            if problem != b"ok":
                why = problem.decode("utf-8", "replace").replace("\n", " ")
                raise StoreDamaged(f"{self.folder / DATABASE}: {why}; Store.salvage keeps what is readable")
            n, last = self._db.execute("SELECT count(*), coalesce(max(id), 0) FROM events").fetchone()
        state = self._read_state()
        if state is None or last > state.last:
            self._blame("state", "it is not what was written; counted again")
            state = self._counted(state)
        elif n != state.n:
            self._blame("events", f"{state.n} were kept, {n} are there")
        self._state = state
        due = copy.deepcopy(state).note(self._now_ms()) or state.n > (self.retention.max_events or state.n)
        if due or "state" in self._damaged:
            with self._write("open"):
                pass

    def _read_state(self) -> _State | None:
        found = self._run("SELECT sealed FROM records WHERE id = ?", (_STATE,)).fetchone()
        text = self._sealer.open("records", _STATE, found and found[0])
        return None if text is None else _State(**json.loads(text))

    def _counted(self, believed: _State | None) -> _State:
        """The state as the rows tell it, where what was written of it is lost."""
        events = [(n, s) for n, s in self._run("SELECT id, sealed FROM events ORDER BY id") if isinstance(s, bytes)]
        records = self._run("SELECT id, sealed FROM records").fetchall()
        return _recount(self._sealer, events, records, believed, self._now_ms())

    # giving it back

    def close(self) -> None:
        """Gives the store back; what was kept is on the disk already. Python cannot wipe the key from its memory."""
        with self._alone():
            self._outside()
            self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # what it holds

    @property
    def n_events(self) -> int:
        """How many events there are."""
        with self._hold():
            return self._state.n

    @property
    def first_id(self) -> int:
        """Number of the oldest event; one more than `last_id` where there is none."""
        with self._hold():
            return int(self._run("SELECT min(id) FROM events").fetchone()[0] or self._state.last + 1)

    @property
    def last_id(self) -> int:
        """Number of the newest event that there ever was, 0 before the first; none is used twice.

        `last_id − n_events` is how many were dropped so far: as long as it stays, nothing older went.
        """
        with self._hold():
            return self._state.last

    @property
    def damaged(self) -> tuple[Damage, ...]:
        """What was found so far not to be what was written. `check` looks at everything."""
        return tuple(self._damaged.values())

    def events(self, after: int = 0) -> Iterator[Event]:
        """The events kept after one, in the order they were kept in. A damaged one is left out, named in `damaged`."""
        while page := self._page(after):
            for number, sealed in page:
                event = self._event(number, sealed)
                if event is not None:
                    yield event
            after = page[-1][0]

    def get(self, name: str) -> bytes | None:
        """The value of a record; None where there is none.

        Raises:
            StoreDamaged: it is not what was written last.
        """
        with self._hold():
            number, nonce = self._sealer.number(name), self._state.records.get(name)
            found = self._run("SELECT sealed FROM records WHERE id = ?", (number,)).fetchone()
            if found is None and nonce is None:
                return None
            sealed = found[0] if found else b""
            text = self._sealer.open("records", number, sealed)
            value = None if text is None else _value(name, text)
            if value is None or sealed[:NONCE_BYTES].hex() != nonce:
                why = "it is gone" if found is None else "it was changed" if value is None else "it is an older one"
                self._blame(f"record {name!r}", why)
                raise StoreDamaged(f"record {name!r} is damaged: {why}; put it again, or delete it")
            return value

    def names(self) -> tuple[str, ...]:
        """Names of all records, in order."""
        with self._hold():
            return tuple(sorted(self._state.records))

    def export(self, *, without: Collection[str] = ()) -> Iterator[dict[str, Any]]:
        """All that is readable here, as JSON types, for the person: events, then records (their bytes in base64).

        Args:
            without: names of records that stay here, such as a secret key.
        """
        for event in self.events():
            yield {"event": event.number, **event.fields()}
        for name in self.names():
            if name not in without:
                with contextlib.suppress(StoreDamaged):  # noted by get
                    value = self.get(name)
                    if value is not None:
                        yield {"record": name, "base64": base64.b64encode(value).decode()}

    def check(self) -> tuple[Damage, ...]:
        """Opens everything there is and compares it with the state; what is damaged.

        Raises:
            StoreDamaged: the database itself is.
        """
        with self._hold():
            total = n = 0
            for number, sealed in self._run("SELECT id, sealed FROM events ORDER BY id"):
                n += 1
                if self._event(number, sealed) is not None:
                    total += self._sealer.mark(number, sealed[:NONCE_BYTES])
            if n != self._state.n:
                self._blame("events", f"{self._state.n} were kept, {n} are there")
            elif total % (1 << 128) != self._state.total and not any(w.startswith("event") for w in self._damaged):
                self._blame("events", "some were removed, and older ones put back")
            for name in self._state.records:
                with contextlib.suppress(StoreDamaged):
                    self.get(name)
            return self.damaged

    # keeping and deleting

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """What is kept and deleted inside is there all together, or not at all if an error leaves it."""
        with self._write("transaction"):
            yield

    def append(self, event: Event) -> int:
        """Keeps one event; its number. When this returns it is on the disk."""
        return self.append_all([event])[0]

    def append_all(self, events: Iterable[Event]) -> list[int]:
        """Keeps events in one transaction, which costs one wait for the disk; their numbers."""
        events = list(events)
        texts = [packed(event.fields()) for event in events]  # before anything is written
        with self._write("append"):
            state, rows = self._state, []
            for number, text in enumerate(texts, state.last + 1):
                sealed = self._sealer.seal("events", number, text)
                rows.append((number, sealed))
                state.total = (state.total + self._sealer.mark(number, sealed[:NONCE_BYTES])) % (1 << 128)
            with _typed(self.folder):
                self._db.executemany("INSERT INTO events VALUES (?, ?)", rows)
            state.n, state.last = state.n + len(rows), state.last + len(rows)
            if events:
                oldest = min(event.at_ms for event in events)
                state.oldest_ms = oldest if state.oldest_ms is None else min(oldest, state.oldest_ms)
        return [number for number, _ in rows]

    def put(self, name: str, value: bytes) -> None:
        """Keeps a value under a name, in place of an older one. Meant for dozens of names."""
        if not name:
            raise InvalidConfig("a record needs a name")
        text = len(encoded(name)).to_bytes(4, "big") + encoded(name) + value
        with self._write("put"):
            number = self._sealer.number(name)
            sealed = self._sealer.seal("records", number, text)
            self._run(_PUT, (number, sealed))
            self._state.records[name] = sealed[:NONCE_BYTES].hex()
            self._damaged.pop(f"record {name!r}", None)

    def delete(self, name: str) -> None:
        """Deletes a record; one that is not there stays away."""
        with self._write("delete"):
            self._run("DELETE FROM records WHERE id = ?", (self._sealer.number(name),))
            self._state.records.pop(name, None)
            self._damaged.pop(f"record {name!r}", None)

    # keys, and the end

    def rewrap(self, new: KeySource) -> tuple[str, ...]:
        """Gives the data key to another source and ends the old one; what could not be ended.

        Someone who has an old copy of the envelope and the old key still has the data key: this renews what opens the
        store, not what its rows are sealed with.

        Raises:
            InvalidConfig: `new` is where the key lies already, or cannot keep one.
        """
        with self._hold():
            self._outside()
            self._at("rewrap:before")
            if isinstance(new, _keys.KeyFile):
                here = isinstance(self._source, _keys.KeyFile) and self._source.path.absolute() == new.path.absolute()
                if here:
                    raise InvalidConfig(f"{new.path} is where the key lies: take another place")
                _drop_leftover(self.folder, new)
            wrapping, parameters = new.make()
            record = _keys.wrap(self._data_key, wrapping, new.kind, parameters, SCHEMA_VERSION)
            self._at("rewrap:made")
            Envelope(self.folder / ENVELOPE).write_both(record, lambda: self._at("rewrap:half"))
            self._at("rewrap:wrapped")
            left: list[str] = []
            with _keys.destroying(left):
                self._source.destroy(self._wrapped["parameters"])
            self._source, self._wrapped = new, record
            self._at("rewrap:destroyed")
            return tuple(left)

    def forget(self, *, keep: Mapping[str, Any] | None) -> tuple[str, ...]:
        """Destroys the key, and with it all that is here, deletes the files and closes the store.

        Args:
            keep: JSON types without anything of the person's, at most some 4,000 bytes; stays as the tombstone. None
                keeps nothing, and removes an older tombstone.

        Returns:
            What could not be destroyed and must be by hand; it opens nothing any more.

        Raises:
            StoreError: nothing was begun, and the store is as it was.
        """
        with self._hold():
            self._outside()
            _mark(self.folder, keep, self._at)
            self._data_key = b""
            self._close.detach()
            try:
                with contextlib.suppress(sqlite3.Error):
                    self._db.close()
                return _finish(self.folder, self._source, self._at)
            finally:
                self._file_lock.release()

    @classmethod
    def salvage(
        cls,
        folder: Path,
        *,
        key: KeySource | None = None,
        now_ms: Callable[[], int] = _now_ms,
        at: Callable[[str], None] = lambda point: None,
    ) -> Salvaged:
        """Copies what is readable of a damaged database into a new one, which `open` then takes.

        The damaged one stays beside it as `store.damaged.db`, until `forget`.

        Raises:
            StoreLocked, WrongKey, StoreNewer, StoreFull: as for `open`.
            StoreDamaged: nothing is left to read it with, or to read.
        """
        folder = Path(folder)
        lock = FolderLock(_prepared(folder))
        try:
            if not Envelope(folder / ENVELOPE).exists():
                raise StoreDamaged(f"{folder / ENVELOPE} is gone: without it nothing can be read")
            _, _, data_key = _unlocked(folder, key)
            at("salvage:before")
            _set_aside(folder)
            at("salvage:moved")
            if not (folder / DAMAGED).exists():
                raise StoreDamaged(f"{folder / DATABASE} is gone: there is nothing to read")
            return _salvaged(folder, Sealer(data_key), now_ms(), at)
        finally:
            lock.release()

    # the parts below

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Everything for this thread alone."""
        if os.getpid() != self._pid:
            raise StoreLocked("a forked process cannot use its parent's store: open it after the fork, one at a time")
        if not self._lock.acquire(timeout=self._timeout_s):
            raise StoreLocked(f"another thread has had the store for {self._timeout_s:g} s: try again")
        try:
            yield
        finally:
            self._lock.release()

    @contextlib.contextmanager
    def _hold(self) -> Iterator[None]:
        """The open store for this thread alone."""
        with self._alone():
            if not self._close.alive:
                raise StoreError("the store is closed: open it again")
            yield

    def _outside(self) -> None:
        if self._writing:
            raise InvalidConfig("not inside a transaction: leave it first")

    @contextlib.contextmanager
    def _write(self, what: str) -> Iterator[None]:
        """A transaction of SQLite, or a part of the one that this thread is in."""
        with self._hold():
            if self._failed:
                raise StoreError("a write in this transaction failed: leave it, and begin again")
            if self._writing:
                try:
                    yield
                except BaseException:
                    self._failed = True
                    raise
                return
            before = copy.deepcopy(self._state)
            self._at(f"{what}:before")
            self._writing = True
            try:
                self._run("BEGIN IMMEDIATE")
                yield
                if self._failed:
                    raise StoreError("a write in this transaction failed: nothing of it was kept")
                self._retain()
                sealed = self._sealer.seal("records", _STATE, packed(vars(self._state)))
                self._run(_PUT, (_STATE, sealed))
                self._at(f"{what}:written")
                self._run("COMMIT")
            except BaseException:
                self._state = before
                with contextlib.suppress(sqlite3.Error):
                    if self._db.in_transaction:
                        self._db.execute("ROLLBACK")
                with contextlib.suppress(StoreError):  # interrupted just after the commit, it is a newer one
                    self._state = self._read_state() or before
                raise
            finally:
                self._writing = self._failed = False
            self._at(f"{what}:committed")

    def _retain(self) -> None:
        """Deletes what is kept long enough."""
        state = self._state
        state.note(self._now_ms())
        over = state.n - (self.retention.max_events or state.n)
        if over > 0:
            found = self._run("SELECT id, sealed FROM events ORDER BY id LIMIT ?", (over,)).fetchall()
            self._drop(found)
        if self.retention.days is None or state.oldest_ms is None:
            return
        limit = state.believed_ms - round(self.retention.days * DAY_MS)
        if state.oldest_ms >= limit:
            return
        old, times = [], []
        for number, sealed in self._run("SELECT id, sealed FROM events").fetchall():
            event = self._event(number, sealed)
            if event is None:  # it cannot be dated
                continue
            if event.at_ms < limit:
                old.append((number, sealed))
            else:
                times.append(event.at_ms)
        self._drop(old)
        state.oldest_ms = min(times, default=None)

    def _drop(self, rows: list[tuple[int, bytes]]) -> None:
        for number, sealed in rows:
            mark = self._sealer.mark(number, sealed[:NONCE_BYTES]) if isinstance(sealed, bytes) else 0
            self._state.total = (self._state.total - mark) % (1 << 128)
            self._damaged.pop(f"event {number}", None)
        with _typed(self.folder):
            self._db.executemany("DELETE FROM events WHERE id = ?", [(number,) for number, _ in rows])
        self._state.n -= len(rows)

    def _page(self, after: int) -> list[tuple[int, bytes]]:
        with self._hold():
            ask = "SELECT id, sealed FROM events WHERE id > ? ORDER BY id LIMIT 500"
            return self._run(ask, (after,)).fetchall()

    def _event(self, number: int, sealed: object) -> Event | None:
        text = self._sealer.open("events", number, sealed)
        if text is None:
            self._blame(f"event {number}", "it was changed")
            return None
        return Event(**json.loads(text), number=number)

    def _blame(self, where: str, why: str) -> None:
        self._damaged[where] = Damage(where, why)

    def _run(self, statement: str, values: tuple[object, ...] = ()) -> sqlite3.Cursor:
        with _typed(self.folder):
            return self._db.execute(statement, values)


def forget(folder: Path, *, keep: Mapping[str, Any] | None, key: KeySource | None = None) -> tuple[str, ...]:
    """As `Store.forget`, of a store that need not open: its key is lost, or it is damaged.

    Args:
        key: where the key lies, to destroy it there as well; None finds a keyring and the folder's own key file.
    """
    lock = FolderLock(_prepared(folder))
    try:
        if not Envelope(folder / ENVELOPE).exists():
            Envelope(folder / ENVELOPE).create({"schema_version": SCHEMA_VERSION})
        _mark(folder, keep, lambda point: None)
        return _finish(folder, key, lambda point: None)
    finally:
        lock.release()


def tombstone(folder: Path) -> dict[str, Any] | None:
    """What the last forget kept; None where there was none.

    Raises:
        StoreDamaged: it cannot be read.
    """
    try:
        kept = json.loads((folder / TOMBSTONE).read_bytes())["kept"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        kept = None
    if not isinstance(kept, dict):
        raise StoreDamaged(f"{folder / TOMBSTONE} is damaged: restore it from a copy")
    return kept


# ------------------------------------------------------------------------------------------------------- begin


def _prepared(folder: Path) -> Path:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_mode & 0o077:
            folder.chmod(0o700)
    except OSError as error:
        if isinstance(refused := _keys.refused(folder, error), StoreFull):
            raise refused from None
        raise InvalidConfig(f"cannot keep a store in {folder}: {error.strerror}; take another place") from None
    return folder


def _create(folder: Path, key: KeySource | None, now_ms: Callable[[], int], at: Callable[[str], None]) -> None:
    """A new store: the envelope comes last, and without it what is here is left over from one that never began."""
    at("create:before")
    if (folder / DAMAGED).exists() or ((folder / DATABASE).exists() and not _unused(folder / DATABASE)):
        raise StoreDamaged(
            f"{folder / DATABASE} cannot be read without {ENVELOPE}, which is gone: restore it from a copy, or forget"
        )
    _remove(folder)
    if key is None:
        _drop_leftover(folder, _keys.KeyFile(folder / _keys.KEY_FILE))
        key, wrapping, parameters = _keys.make_default(folder)
    else:
        _drop_leftover(folder, key)
        wrapping, parameters = key.make()
    at("create:key")
    data_key = os.urandom(_keys.KEY_BYTES)
    _fill(folder, Sealer(data_key), _State(noted_ms=now_ms()), [])
    at("create:database")
    Envelope(folder / ENVELOPE).create(_keys.wrap(data_key, wrapping, key.kind, parameters, SCHEMA_VERSION))
    at("create:envelope")


def _unused(path: Path) -> bool:
    """Whether a database is ours and holds a state alone."""
    with path.open("rb") as file:
        ours = file.read(100)[68:72] == _APPLICATION.to_bytes(4, "big")
    return ours and sum(1 for _ in _pages.rows(path)) <= 1


def _drop_leftover(folder: Path, key: KeySource) -> None:
    """Removes a key file in the folder that no envelope needs: what made it was cut short."""
    if isinstance(key, _keys.KeyFile) and key.path.parent.absolute() == folder.absolute():
        key.path.unlink(missing_ok=True)


def _fill(folder: Path, sealer: Sealer, state: _State, rows: Iterable[tuple[str, int, bytes]]) -> None:
    """A database of these rows, put in its place whole."""
    beside = folder / f"{DATABASE}.new"
    for end in ("", "-wal", "-shm", "-journal"):
        beside.with_name(f"{beside.name}{end}").unlink(missing_ok=True)
    try:
        os.close(os.open(beside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        with _typed(folder), contextlib.closing(_connect(beside, 0.0)) as db:
            db.execute(f"PRAGMA page_size = {_pages.PAGE}")
            db.execute("PRAGMA journal_mode = WAL")
            db.execute(f"PRAGMA application_id = {_APPLICATION}")
            db.execute("BEGIN IMMEDIATE")
            for statement in _SCHEMA:
                db.execute(statement)
            db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            for table, number, sealed in rows:
                db.execute(f"INSERT INTO {table} VALUES (?, ?)", (number, sealed))
            db.execute(
                "INSERT INTO records VALUES (?, ?)", (_STATE, sealer.seal("records", _STATE, packed(vars(state))))
            )
            db.execute("COMMIT")
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        os.replace(beside, folder / DATABASE)
    except OSError as error:
        raise _keys.refused(beside, error) from None
    _keys.sync(folder)


def _unlocked(folder: Path, key: KeySource | None) -> tuple[KeySource, dict[str, Any], bytes]:
    """Source, record of the envelope and data key. Both copies are the same afterwards.

    Raises:
        StoreDamaged: no copy is whole.
        StoreNewer: a later version wrote it.
        WrongKey: the key opens neither copy.
    """
    envelope = Envelope(folder / ENVELOPE)
    slots = envelope.slots()
    copies = [record for record in slots[: _keys.FORGETTING] if record and "wrapped" in record]
    if not copies:
        raise StoreDamaged(f"{envelope.path} is damaged in both its copies: restore it from a copy, or forget")
    if any(record.get("schema_version", 0) > SCHEMA_VERSION for record in copies):
        raise StoreNewer(f"{folder} was written by a later version: update penchant")
    wrong: WrongKey | None = None
    for record in copies:
        try:
            source = key or _keys.chosen(record["source"], folder)
            if source.kind != record["source"]:
                raise WrongKey(f"the key of this store is a {record['source']}, not a {source.kind}")
            data_key = _keys.unwrap(record, source.load(record["parameters"]))
        except WrongKey as error:
            wrong = wrong or error
            continue
        if slots[:2] != [record, record]:  # the other was torn, or of a rewrap that was cut short
            with contextlib.suppress(StoreFull):
                envelope.write_both(record)
        return source, record, data_key
    assert wrong is not None
    raise wrong


def _migrated(
    db: sqlite3.Connection, sealer: Sealer, envelope: Envelope, record: dict[str, Any], at: Callable[[str], None]
) -> dict[str, Any]:
    """Brings the database to this version; the envelope's new record.

    The envelope says first what version may be found, so that an older penchant never meets a database it cannot read.
    """
    with _typed(envelope.path.parent):
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if not 1 <= version <= SCHEMA_VERSION:  # the envelope would have said so
            where = envelope.path.with_name(DATABASE)
            raise StoreDamaged(f"{where} is damaged in its first page; Store.salvage keeps what is readable")
        if record["schema_version"] != SCHEMA_VERSION:
            record = {**record, "schema_version": SCHEMA_VERSION}
            envelope.write_both(record)
        if version < SCHEMA_VERSION:
            at("migrate:before")
            db.execute("BEGIN IMMEDIATE")
            for step in range(version, SCHEMA_VERSION):
                MIGRATIONS[step](db, sealer)
            db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            at("migrate:changed")
            db.execute("COMMIT")
            at("migrate:committed")
    return record


# --------------------------------------------------------------------------------------------------------- end


def _mark(folder: Path, keep: Mapping[str, Any] | None, at: Callable[[str], None]) -> None:
    """From here on there is no way back."""
    record = {"forget": True, "kept": None if keep is None else dict(keep)}
    at("forget:before")
    Envelope(folder / ENVELOPE).write(record, _keys.FORGETTING)
    at("forget:begun")


def _finish(folder: Path, key: KeySource | None, at: Callable[[str], None]) -> tuple[str, ...]:
    """Goes on with a forget that was begun, from wherever it came to; what could not be destroyed."""
    envelope = Envelope(folder / ENVELOPE)
    if not envelope.exists():
        return ()
    *copies, mark = envelope.slots()
    if mark is None:
        return ()
    left: list[str] = []
    for record in copies:
        if record and record.get("source", _keys.PassphraseKey.kind) != _keys.PassphraseKey.kind:
            with _keys.destroying(left):
                source = key if key and key.kind == record["source"] else _keys.chosen(record["source"], folder)
                source.destroy(record["parameters"])
    at("forget:key")
    for slot in range(_keys.FORGETTING):
        envelope.write(None, slot)
    at("forget:envelope")
    _remove(folder)
    at("forget:files")
    if mark["kept"] is None:
        (folder / TOMBSTONE).unlink(missing_ok=True)
    else:
        _keys.replace(folder / TOMBSTONE, packed({"schema_version": 1, "kept": mark["kept"]}))
    at("forget:tombstone")
    envelope.path.unlink()
    _keys.sync(folder)
    at("forget:done")
    return tuple(dict.fromkeys(left))


def _remove(folder: Path) -> None:
    for name in (DATABASE, f"{DATABASE}.new", DAMAGED):
        for end in ("", "-wal", "-shm", "-journal"):
            (folder / f"{name}{end}").unlink(missing_ok=True)
    for name in (ENVELOPE, TOMBSTONE):  # one that was cut short
        (folder / f"{name}.new").unlink(missing_ok=True)


# ----------------------------------------------------------------------------------------------------- salvage


def _set_aside(folder: Path) -> None:
    """Moves the database and its log to where it is read from; again moves what is left."""
    moved = (folder / DATABASE).exists()
    for end in ("", "-wal"):
        found, place = folder / f"{DATABASE}{end}", folder / f"{DAMAGED}{end}"
        if found.exists():
            os.replace(found, place)
        elif moved:  # the log of one set aside before
            place.unlink(missing_ok=True)
    _keys.sync(folder)


def _salvaged(folder: Path, sealer: Sealer, now_ms: int, at: Callable[[str], None]) -> Salvaged:
    events, records, changed, state = dict[int, bytes](), dict[int, bytes](), set[int](), None
    for number, sealed in _pages.rows(folder / DAMAGED):
        if sealer.open("events", number, sealed) is not None:
            events[number] = sealed
        elif (text := sealer.open("records", number, sealed)) is not None:
            if number == _STATE:
                state = _State(**json.loads(text))
            else:
                records[number] = sealed
        else:
            changed.add(number)
    last = max(events, default=0) if state is None else state.last
    lost = [
        Damage(f"event {number}", "it was changed") for number in sorted(changed - set(events)) if 0 < number <= last
    ]
    if state is None:
        lost.append(Damage("state", "it cannot be read; counted again"))
    else:
        for name, nonce in state.records.items():
            found = records.get(sealer.number(name))
            if found is None or found[:NONCE_BYTES].hex() != nonce:
                records.pop(sealer.number(name), None)
                lost.append(Damage(f"record {name!r}", "it cannot be read"))
        if len(events) != state.n:
            lost.append(Damage("events", f"{state.n} were kept, {len(events)} can be read"))
    new = _recount(sealer, sorted(events.items()), records.items(), state, now_ms)
    rows = [("events", n, s) for n, s in sorted(events.items())] + [("records", n, s) for n, s in records.items()]
    at("salvage:written")
    _fill(folder, sealer, new, rows)
    at("salvage:done")
    return Salvaged(n_events=new.n, records=tuple(sorted(new.records)), lost=tuple(lost))


def _recount(
    sealer: Sealer,
    events: Iterable[tuple[int, bytes]],
    records: Iterable[tuple[int, bytes]],
    believed: _State | None,
    now_ms: int,
) -> _State:
    """A state that says what these rows say."""
    state = _State(noted_ms=now_ms)
    if believed is not None:
        state.noted_ms, state.believed_ms, state.last = believed.noted_ms, believed.believed_ms, believed.last
    for number, sealed in events:
        state.n, state.last = state.n + 1, max(state.last, number)
        state.total += sealer.mark(number, sealed[:NONCE_BYTES])
        state.oldest_ms = 0  # found out when retention looks
    state.total %= 1 << 128
    for number, sealed in records:
        text = sealer.open("records", number, sealed)
        name = text and _name(text)
        if name and sealer.number(name) == number:
            state.records[name] = sealed[:NONCE_BYTES].hex()
    return state


def _name(text: bytes) -> str:
    return text[4 : 4 + int.from_bytes(text[:4], "big")].decode("utf-8", "surrogatepass")


def _value(name: str, text: bytes) -> bytes | None:
    """The value in a record's text, if it is of that name."""
    length = len(encoded(name))
    return text[4 + length :] if _name(text) == name else None


# ------------------------------------------------------------------------------------------------------- files


def _connect(path: Path, timeout_s: float) -> sqlite3.Connection:
    with _typed(path.parent):
        db = sqlite3.connect(
            f"{path.absolute().as_uri()}?mode=rw",
            uri=True,
            timeout=timeout_s,
            isolation_level=None,
            check_same_thread=False,
        )
        try:
            db.text_factory = bytes  # a damaged type must not stop a reader
            for setting in ("synchronous = FULL", "secure_delete = ON", "journal_size_limit = 1048576"):
                db.execute(f"PRAGMA {setting}")
        except BaseException:
            db.close()
            raise
        return db


def _close(db: sqlite3.Connection | None, lock: FolderLock) -> None:
    try:
        if db is not None:
            db.close()
    finally:
        lock.release()


@contextlib.contextmanager
def _typed(folder: Path) -> Iterator[None]:
    """SQLite's errors as ours."""
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT)
        name, where = getattr(error, "sqlite_errorname", ""), folder / DATABASE
        if code == sqlite3.SQLITE_FULL or name.startswith(_UNWRITTEN):
            raise StoreFull(f"{where}: the disk is full, or cannot be written; nothing that was kept is lost") from None
        if code & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise StoreLocked(f"another program has {where} open: close it there, or wait") from None
        if code & 0xFF in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM):
            raise StoreError(f"{where} cannot be opened to write") from None
        raise StoreDamaged(f"{where} is damaged ({error}); Store.salvage keeps what is readable") from None


_UNWRITTEN = tuple(f"SQLITE_IOERR_{what}" for what in ("WRITE", "FSYNC", "DIR_FSYNC", "TRUNCATE", "SHMSIZE", "SHMOPEN"))
