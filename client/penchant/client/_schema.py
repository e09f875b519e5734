"""What a store's folder and database are made of, and what makes an older one of this version.

    events    (id, sealed)     one thing the person did
    records   (id, sealed)     one named value; record 0 is the store's own state

What may be believed of it, and when: `_store.py`.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
STATE = 0
APPLICATION = 0x50454E43
_COLUMNS = "(id INTEGER PRIMARY KEY, sealed BLOB NOT NULL)"
TABLES = (f"CREATE TABLE events {_COLUMNS}", f"CREATE TABLE records {_COLUMNS}")
PUT = "INSERT INTO records VALUES (?, ?) ON CONFLICT (id) DO UPDATE SET sealed = excluded.sealed"


@dataclass(frozen=True)
class Damage:
    """What is not what was written, and why it is thought so."""

    where: str
    why: str


@dataclass
class State:
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


def prepared(folder: Path) -> Path:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_mode & 0o077:
            folder.chmod(0o700)
    except OSError as error:
        if isinstance(refused := _keys.refused(folder, error), StoreFull):
            raise refused from None
        raise InvalidConfig(f"cannot keep a store in {folder}: {error.strerror}; take another place") from None
    return folder


def drop_leftover(folder: Path, key: KeySource) -> None:
    """Removes a key file in the folder that no envelope needs: what made it was cut short."""
    if isinstance(key, _keys.KeyFile) and key.path.parent.absolute() == folder.absolute():
        key.path.unlink(missing_ok=True)


def unlocked(folder: Path, key: KeySource | None) -> tuple[KeySource, dict[str, Any], bytes]:
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


def unused(path: Path) -> bool:
    """Whether a database is ours and holds a state alone."""
    with path.open("rb") as file:
        ours = file.read(100)[68:72] == APPLICATION.to_bytes(4, "big")
    return ours and sum(1 for _ in _pages.rows(path)) <= 1


def fill(folder: Path, sealer: Sealer, state: State, rows: Iterable[tuple[str, int, bytes]]) -> None:
    """A database of these rows, put in its place whole."""
    beside = folder / f"{DATABASE}.new"
    for end in ("", "-wal", "-shm", "-journal"):
        beside.with_name(f"{beside.name}{end}").unlink(missing_ok=True)
    try:
        os.close(os.open(beside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        with typed(folder), contextlib.closing(connect(beside, 0.0)) as db:
            db.execute(f"PRAGMA page_size = {_pages.PAGE}")
            db.execute("PRAGMA journal_mode = WAL")
            db.execute(f"PRAGMA application_id = {APPLICATION}")
            db.execute("BEGIN IMMEDIATE")
            for statement in TABLES:
                db.execute(statement)
            db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            for table, number, sealed in rows:
                db.execute(f"INSERT INTO {table} VALUES (?, ?)", (number, sealed))
            db.execute("INSERT INTO records VALUES (?, ?)", (STATE, sealer.seal("records", STATE, packed(vars(state)))))
            db.execute("COMMIT")
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        os.replace(beside, folder / DATABASE)
    except OSError as error:
        raise _keys.refused(beside, error) from None
    _keys.sync(folder)


def migrated(
    db: sqlite3.Connection, sealer: Sealer, envelope: Envelope, record: dict[str, Any], at: Callable[[str], None]
) -> dict[str, Any]:
    """Brings the database to this version; the envelope's new record.

    The envelope says first what version may be found, so that an older penchant never meets a database it cannot read.
    """
    with typed(envelope.path.parent):
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if not 1 <= version <= SCHEMA_VERSION:  # the envelope would have said so
            where = envelope.path.with_name(DATABASE)
            raise StoreDamaged(f"{where} is damaged in its first page; Client.salvage keeps what is readable")
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


def recount(
    sealer: Sealer,
    events: Iterable[tuple[int, bytes]],
    records: Iterable[tuple[int, bytes]],
    believed: State | None,
    now_ms: int,
) -> State:
    """A state that says what these rows say."""
    state = State(noted_ms=now_ms)
    if believed is not None:
        state.noted_ms, state.believed_ms, state.last = believed.noted_ms, believed.believed_ms, believed.last
    for number, sealed in events:
        state.n, state.last = state.n + 1, max(state.last, number)
        state.total += sealer.mark(number, sealed[:NONCE_BYTES])
        state.oldest_ms = 0  # found out when retention looks
    state.total %= 1 << 128
    for number, sealed in records:
        text = sealer.open("records", number, sealed)
        name = text and name_of(text)
        if name and sealer.number(name) == number:
            state.records[name] = sealed[:NONCE_BYTES].hex()
    return state


def named(name: str, value: bytes) -> bytes:
    """The text of a record."""
    return len(encoded(name)).to_bytes(4, "big") + encoded(name) + value


def name_of(text: bytes) -> str:
    return text[4 : 4 + int.from_bytes(text[:4], "big")].decode("utf-8", "surrogatepass")


def value_of(name: str, text: bytes) -> bytes | None:
    """The value in a record's text, if it is of that name."""
    length = len(encoded(name))
    return text[4 + length :] if name_of(text) == name else None


def connect(path: Path, timeout_s: float) -> sqlite3.Connection:
    with typed(path.parent):
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


def close(db: sqlite3.Connection | None, lock: FolderLock) -> None:
    try:
        if db is not None:
            db.close()
    finally:
        lock.release()


@contextlib.contextmanager
def typed(folder: Path) -> Iterator[None]:
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
        raise StoreDamaged(f"{where} is damaged ({error}); Client.salvage keeps what is readable") from None


_UNWRITTEN = tuple(f"SQLITE_IOERR_{what}" for what in ("WRITE", "FSYNC", "DIR_FSYNC", "TRUNCATE", "SHMSIZE", "SHMOPEN"))
