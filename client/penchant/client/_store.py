"""What a person did and what was learned from it, kept on their device, encrypted, and forgotten on their word.

    events    (id, sealed)     one thing the person did
    records   (id, sealed)     one named value: a profile, consent, a node's key; record 0 is the store's own state

Two numbers a row are all that the database `store.db` holds in clear: its place and its size, in steps of 128 bytes. A
record's place is a keyed hash of its name. How a row is sealed: `_seal.py`; where the key comes from: `_keys.py`.

The state holds how many events there are, their last number, a keyed sum over their nonces and each record's newest
nonce, and is sealed again in each transaction. So a row that was changed, moved or swapped fails to open, a record put
back to an older state or removed is refused, and events removed or put back are noticed (`check`). Not noticed: the
whole folder replaced by an older copy of itself, or a log (`store.db-wal`) whose end was cut off.

How long events are kept, and by which clock: `_retention.py`. A store that is damaged: `_salvage.py`. Its end:
`_forget.py`. What its folder is made of: `_schema.py`.

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

from penchant.client import _keys, _salvage, _schema
from penchant.client._forget import finish, mark, remove
from penchant.client._keys import NONCE_BYTES, Envelope, KeySource
from penchant.client._lock import FolderLock
from penchant.client._retention import Retention, note
from penchant.client._salvage import Salvaged
from penchant.client._schema import (
    DAMAGED,
    DATABASE,
    ENVELOPE,
    PUT,
    STATE,
    Damage,
    State,
    close,
    connect,
    drop_leftover,
    fill,
    migrated,
    named,
    prepared,
    recount,
    typed,
    unlocked,
    unused,
    value_of,
)
from penchant.client._seal import Sealer, encoded, packed
from penchant.common.errors import InvalidConfig, StoreDamaged, StoreError, StoreLocked

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
        self._close = weakref.finalize(self, close, db, lock)

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        key: KeySource | None = None,
        retention: Retention | None = None,
        now_ms: Callable[[], int] = _now_ms,
        instead: Mapping[str, bytes] | None = None,
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
            instead: values of records by name, each put where the state is lost or older than an event: which record is
                the newest of its name is not known then.
            timeout_s: how long a call waits for another thread.
            at: called at each of POINTS; tests stop there.

        Raises:
            StoreLocked: another process has it.
            WrongKey: the key does not open it.
            StoreDamaged: a page or file is damaged; `salvage` keeps what is readable.
            StoreNewer: a later version wrote it.
            StoreFull: no room.
            InvalidConfig: the folder cannot be used.
        """
        folder = Path(folder)
        lock = FolderLock(prepared(folder))
        db: sqlite3.Connection | None = None
        try:
            envelope = Envelope(folder / ENVELOPE)
            finish(folder, key, at)
            if not envelope.exists():
                _create(folder, key, now_ms, at)
            source, record, data_key = unlocked(folder, key)
            if not isinstance(source, _keys.KeyFile):  # what a rewrap left that was cut short
                _keys.KeyFile(folder / _keys.KEY_FILE).destroy({})
            if not (folder / DATABASE).exists():
                raise StoreDamaged(f"{folder / DATABASE} is gone: Client.salvage keeps what is readable")
            sealer = Sealer(data_key)
            db = connect(folder / DATABASE, timeout_s)
            record = migrated(db, sealer, envelope, record, at)
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
            store._begin(instead or {})
            return store
        except BaseException:
            close(db, lock)
            raise

    def _begin(self, instead: Mapping[str, bytes]) -> None:
        """Reads the state, compares it with what there is, and lets retention do its work."""
        with typed(self.folder):
            ((problem,),) = self._db.execute("PRAGMA quick_check(1)")  # costs as much as reading the file
            schema = tuple(sql for (sql,) in self._db.execute("SELECT sql FROM sqlite_master ORDER BY rowid"))
            if problem == b"ok" and schema != tuple(map(encoded, _schema.TABLES)):
                problem = b"its tables are not what was made"
            if problem != b"ok":
                why = problem.decode("utf-8", "replace").replace("\n", " ")
                raise StoreDamaged(f"{self.folder / DATABASE}: {why}; Client.salvage keeps what is readable")
            n, last = self._db.execute("SELECT count(*), coalesce(max(id), 0) FROM events").fetchone()
        state = self._read_state()
        if state is None or last > state.last:
            self._blame("state", "it is not what was written; counted again")
            state = self._counted(state)
        elif n != state.n:
            self._blame("events", f"{state.n} were kept, {n} are there")
        self._state = state
        due = note(copy.deepcopy(state), self._now_ms()) or self.retention.over(state) > 0
        if due or "state" in self._damaged:
            with self._write("open"):  # all together: the next to open it finds a state that fits
                if "state" in self._damaged:
                    for name, value in instead.items():
                        self.put(name, value)

    def _read_state(self) -> State | None:
        found = self._run("SELECT sealed FROM records WHERE id = ?", (STATE,)).fetchone()
        text = self._sealer.open("records", STATE, found and found[0])
        return None if text is None else State(**json.loads(text))

    def _counted(self, believed: State | None) -> State:
        """The state as the rows tell it, where what was written of it is lost."""
        events = [(n, s) for n, s in self._run("SELECT id, sealed FROM events ORDER BY id") if isinstance(s, bytes)]
        records = self._run("SELECT id, sealed FROM records").fetchall()
        return recount(self._sealer, events, records, believed, self._now_ms())

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
            value = None if text is None else value_of(name, text)
            if value is None or sealed[:NONCE_BYTES].hex() != nonce:
                why = "it is gone" if found is None else "it was changed" if value is None else "it is an older one"
                self._blame(f"record {name!r}", why)
                raise StoreDamaged(f"record {name!r} is damaged: {why}; put it again, or delete it")
            return value

    def names(self) -> tuple[str, ...]:
        """Names of all records, in order."""
        with self._hold():
            return tuple(sorted(self._state.records))

    def key_for(self, use: str) -> bytes:
        """32 bytes, the same as long as this store lives: to tell a file made on this device from any other.

        Args:
            use: names what for; keys of two uses tell nothing of each other, nor of the store's.
        """
        return self._sealer.key_for(use)

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
            with typed(self.folder):
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
        text = named(name, value)
        with self._write("put"):
            number = self._sealer.number(name)
            sealed = self._sealer.seal("records", number, text)
            self._run(PUT, (number, sealed))
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
                drop_leftover(self.folder, new)
            wrapping, parameters = new.make()
            record = _keys.wrap(self._data_key, wrapping, new.kind, parameters, _schema.SCHEMA_VERSION)
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
            mark(self.folder, keep, self._at)
            self._data_key = b""
            self._close.detach()
            try:
                with contextlib.suppress(sqlite3.Error):
                    self._db.close()
                return finish(self.folder, self._source, self._at)
            finally:
                self._file_lock.release()

    @classmethod
    def salvage(
        cls,
        folder: Path,
        *,
        key: KeySource | None = None,
        instead: Mapping[str, bytes] | None = None,
        now_ms: Callable[[], int] = _now_ms,
        at: Callable[[str], None] = lambda point: None,
    ) -> Salvaged:
        """Copies what is readable of a damaged database into a new one, which `open` then takes.

        The damaged one stays beside it as `store.damaged.db`, until `forget`.

        Args:
            instead: values of records by name, each for one that is lost, and where the state is for any.

        Raises:
            StoreLocked, WrongKey, StoreNewer, StoreFull: as for `open`.
            StoreDamaged: nothing is left to read it with, or to read.
        """
        return _salvage.salvage(Path(folder), key, instead or {}, now_ms, at)

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
                sealed = self._sealer.seal("records", STATE, packed(vars(self._state)))
                self._run(PUT, (STATE, sealed))
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
        note(state, self._now_ms())
        if over := self.retention.over(state):
            found = self._run("SELECT id, sealed FROM events ORDER BY id LIMIT ?", (over,)).fetchall()
            self._drop(found)
        if (limit := self.retention.too_old_ms(state)) is None:
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
        with typed(self.folder):
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
        with typed(self.folder):
            return self._db.execute(statement, values)


def _create(folder: Path, key: KeySource | None, now_ms: Callable[[], int], at: Callable[[str], None]) -> None:
    """A new store: the envelope comes last, and without it what is here is left over from one that never began."""
    at("create:before")
    if (folder / DAMAGED).exists() or ((folder / DATABASE).exists() and not unused(folder / DATABASE)):
        raise StoreDamaged(
            f"{folder / DATABASE} cannot be read without {ENVELOPE}, which is gone: restore it from a copy, or forget"
        )
    remove(folder)
    if key is None:
        drop_leftover(folder, _keys.KeyFile(folder / _keys.KEY_FILE))
        key, wrapping, parameters = _keys.make_default(folder)
    else:
        drop_leftover(folder, key)
        wrapping, parameters = key.make()
    at("create:key")
    data_key = os.urandom(_keys.KEY_BYTES)
    fill(folder, Sealer(data_key), State(noted_ms=now_ms()), [])
    at("create:database")
    Envelope(folder / ENVELOPE).create(_keys.wrap(data_key, wrapping, key.kind, parameters, _schema.SCHEMA_VERSION))
    at("create:envelope")
