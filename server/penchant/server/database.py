"""server.db: what the server must still know after it was killed, but for the ledger, which is a file of its own.

    rounds    each try at a round: its phase, who was asked and what became of it, in counts
    phases    every change of a phase, in order
    progress  the checkpoint: rounds done, the state's hash, participations of each place
    places    the roster: a place, the device's public key, Flower's number for it (64 bits, with a sign here)
    tokens    what lets a device enrol, as hashes
    uses      which key used a token up, while the token lasts: so that an answer that got lost can be given again
    revoked   keys that may never come back
    switches  what the operator wants now, such as rounds = "running"
    moves     which model a channel was pointed to, when

SQLite in WAL mode with synchronous = FULL: what a transaction wrote is there after a power cut. Several processes share
it; each writes short transactions, and waits for another's at most BUSY_S.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from penchant.common.errors import InvalidConfig, MalformedData

SCHEMA_VERSION = 1
BUSY_S = 10.0
_SCHEMA = """
CREATE TABLE rounds (
    plan TEXT, round INTEGER, attempt INTEGER, phase TEXT NOT NULL, at_ms INTEGER NOT NULL, sum TEXT NOT NULL,
    drawn INTEGER NOT NULL DEFAULT 0, asked INTEGER NOT NULL DEFAULT 0, answered INTEGER NOT NULL DEFAULT 0,
    refused TEXT NOT NULL DEFAULT '{}', seconds REAL NOT NULL DEFAULT 0, why TEXT NOT NULL DEFAULT '',
    PRIMARY KEY (plan, round, attempt)) WITHOUT ROWID;
CREATE TABLE phases (
    number INTEGER PRIMARY KEY, plan TEXT NOT NULL, round INTEGER NOT NULL, attempt INTEGER NOT NULL,
    phase TEXT NOT NULL, at_ms INTEGER NOT NULL);
CREATE TABLE progress (
    plan TEXT PRIMARY KEY, done INTEGER NOT NULL, state TEXT NOT NULL, catalogue TEXT NOT NULL,
    participations BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE places (
    place INTEGER PRIMARY KEY, node_key BLOB UNIQUE NOT NULL, node_id INTEGER, subject BLOB UNIQUE,
    since_ms INTEGER NOT NULL, left_ms INTEGER);
CREATE TABLE tokens (
    hash TEXT PRIMARY KEY, made_ms INTEGER NOT NULL, expires_ms INTEGER NOT NULL, uses INTEGER NOT NULL,
    subject BLOB) WITHOUT ROWID;
CREATE INDEX tokens_by_end ON tokens (expires_ms);
CREATE TABLE uses (hash TEXT, node_key BLOB, PRIMARY KEY (hash, node_key)) WITHOUT ROWID;
CREATE TABLE revoked (node_key BLOB PRIMARY KEY, at_ms INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE switches (name TEXT PRIMARY KEY, value TEXT NOT NULL, at_ms INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE moves (
    number INTEGER PRIMARY KEY, channel TEXT NOT NULL, sequence INTEGER NOT NULL, version INTEGER NOT NULL,
    manifest TEXT NOT NULL, at_ms INTEGER NOT NULL, why TEXT NOT NULL DEFAULT '');
"""


class Database:
    """A connection; one for each thread.

    Args:
        now_ms: UTC milliseconds.

    Raises:
        InvalidConfig: absent, or it cannot be opened.
        MalformedData: damaged, or of a later version.
    """

    def __init__(self, path: Path, *, now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000) -> None:
        if not path.is_file():
            raise InvalidConfig(f"no {path}: restore it from a backup, or make a folder with penchant serve init")
        self.path, self.now_ms = path, now_ms
        try:
            self._db = _connect(path)
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
        except sqlite3.DatabaseError as error:
            raise MalformedData(f"{path} is damaged ({error}): restore it from a backup") from None
        if version != SCHEMA_VERSION:
            raise MalformedData(f"{path} is of version {version}, and this penchant reads {SCHEMA_VERSION}")

    @staticmethod
    def make(path: Path) -> None:
        """An empty one.

        Raises:
            InvalidConfig: there is one, or no place for it.
        """
        if path.exists():
            raise InvalidConfig(f"{path} is there already")
        try:
            db = _connect(path)
            db.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")
            db.close()
            path.chmod(0o600)
        except (sqlite3.Error, OSError) as error:
            raise InvalidConfig(f"cannot make {path}: {error}") from None

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All that is written inside, or nothing of it.

        Raises:
            InvalidConfig: the disk is full or read only, or another process holds it for longer than BUSY_S.
            MalformedData: damaged.
        """
        try:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")
        except sqlite3.OperationalError as error:
            raise InvalidConfig(f"{self.path}: {error}; nothing was written") from None
        except sqlite3.IntegrityError:
            raise
        except sqlite3.DatabaseError as error:
            raise MalformedData(f"{self.path} is damaged ({error}): restore it from a backup") from None

    def rows(self, query: str, *values: Any) -> list[sqlite3.Row]:
        """What a query finds."""
        try:
            return self._db.execute(query, values).fetchall()
        except sqlite3.OperationalError as error:
            raise InvalidConfig(f"{self.path}: {error}") from None
        except sqlite3.DatabaseError as error:
            raise MalformedData(f"{self.path} is damaged ({error}): restore it from a backup") from None

    def one(self, query: str, *values: Any) -> sqlite3.Row | None:
        found = self.rows(query, *values)
        return found[0] if found else None

    def switch(self, name: str, default: str = "") -> str:
        """What the operator wants of `name`."""
        found = self.one("SELECT value FROM switches WHERE name = ?", name)
        return default if found is None else str(found["value"])

    def set_switch(self, name: str, value: str) -> None:
        self.set_switches({name: value})

    def set_switches(self, values: Mapping[str, str]) -> None:
        """All of them at once."""
        with self.transaction() as db:
            db.executemany(
                "INSERT OR REPLACE INTO switches VALUES (?, ?, ?)",
                [(name, value, self.now_ms()) for name, value in values.items()],
            )

    def close(self) -> None:
        self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _connect(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None)
    db.row_factory = sqlite3.Row
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = FULL")
    return db
