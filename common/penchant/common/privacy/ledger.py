"""What was spent about one population, charged before anything is released, in a file that outlives the process.

Every release about the same people composes here. Charge, then release: a release needs the receipt, and a budget
refuses the round before any device is called. A round run again is charged again. A device keeps the same ledger of its
participations, with a budget for each profile it hosts.

The file is SQLite in WAL mode, synced at each commit. Entries are only ever appended, each chained to the one before:

    hash of the header   SHA-256(record)
    hash of an entry     SHA-256(hash before it ‖ record)

`record` is the JSON text as it is stored and exported, in UTF-8, and a hash its 64 lower-case hex digits; entry n is
chained to entry n − 1, and entry 0 to the header. A summary is written in the same transaction as an entry: how many
there are, the last hash (the head) and the charges added up. Opening a ledger replays it from zero and refuses one
whose chain breaks or whose replay is not its summary.

What the chain cannot show by itself is a whole file replaced by an older copy, or rewritten without its last entries:
note the head elsewhere, and `verify(head=…)` proves that it is still in the chain.

Composition: with sampling "none" a profile is in at most k of a plan's sums, so of a plan charged with cap k only the k
least noisy first tries count; a repeated try counts always, and so does all that has no cap or was sampled. The k least
noisy so far are never noisier with one entry more, so ε never falls as entries come.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import sqlite3
import tempfile
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NoReturn, Self, final, get_args

from penchant.common.errors import (
    BudgetExhausted,
    InvalidConfig,
    MalformedData,
    PenchantError,
    PrivacyRefused,
    UnknownMechanism,
)
from penchant.common.privacy import accounting
from penchant.common.privacy.accounting import Neighbours
from penchant.common.privacy.events import Event, Gaussian, decode, encode

SCHEMA_VERSION = 1
Kind = Literal["charge", "release", "participation"]
MOST_TRIES = 16
"""Further tries at rounds that it was in, that a profile answers under one plan where the noise is the server's."""
POINTS = (
    *(f"create:{point}" for point in ("before", "inserted", "committed", "linked")),
    *(f"{kind}:{point}" for kind in get_args(Kind) for point in ("before", "inserted", "counted", "committed")),
)
"""Where a ledger calls `at`: before, between and after all that it writes."""

_SCHEMA = (
    "CREATE TABLE header (one INTEGER PRIMARY KEY CHECK (one = 1), record TEXT NOT NULL, hash TEXT NOT NULL)",
    "CREATE TABLE entries (number INTEGER PRIMARY KEY, record TEXT NOT NULL, hash TEXT NOT NULL)",
    "CREATE TABLE summary (one INTEGER PRIMARY KEY CHECK (one = 1), entries INTEGER NOT NULL, head TEXT NOT NULL)",
    "CREATE TABLE charges (record TEXT PRIMARY KEY, n INTEGER NOT NULL) WITHOUT ROWID",
    *(
        f"CREATE TRIGGER {table}_{verb} BEFORE {verb} ON {table} BEGIN SELECT RAISE(ABORT, 'a ledger only grows'); END"
        for table in ("header", "entries")
        for verb in ("UPDATE", "DELETE")
    ),
    # INSERT OR REPLACE deletes without calling the triggers above.
    "CREATE TRIGGER header_INSERT BEFORE INSERT ON header WHEN (SELECT count(*) FROM header) > 0 "
    "BEGIN SELECT RAISE(ABORT, 'a ledger only grows'); END",
    "CREATE TRIGGER entries_INSERT BEFORE INSERT ON entries "
    "WHEN NEW.number IS NOT (SELECT coalesce(max(number) + 1, 0) FROM entries) "
    "BEGIN SELECT RAISE(ABORT, 'a ledger only grows'); END",
)
_WRITTEN = object()


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of a ledger.

    Attributes:
        number: its place, from 0.
        kind: "charge" before a release about the population, "release" for what then left, "participation" for one
            hosted profile on a device.
        round, attempt: what it was for, and which try at that round it was (from 0).
        event: what was charged; None for a release, and for a participation whose noise is the server's.
        plan: digest of the plan; "" where there is none.
        cap: k, rounds of that plan that one profile may be in.
        model: version that the round started from.
        profile: whose participation; None for a population's entries.
        content: digest of what was released.
        at_ms: UTC milliseconds; tells nothing about what was charged, so entries that differ in it are equal.
    """

    number: int
    kind: Kind
    round: int
    attempt: int
    event: Event | None
    plan: str = ""
    cap: int | None = None
    model: str = ""
    profile: int | None = None
    content: str = ""
    at_ms: int = field(default=0, compare=False)

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise UnknownMechanism(f"entry {self.kind!r} is unknown here; update penchant")
        if not all(isinstance(n, int) and n >= 0 for n in (self.number, self.round, self.attempt, self.at_ms)):
            raise InvalidConfig("number, round, attempt and time of an entry must be whole numbers ≥ 0")
        if not (self.cap is None or (isinstance(self.cap, int) and self.cap >= 1)):
            raise InvalidConfig(f"cap must be a whole number ≥ 1, not {self.cap}")
        if not (self.profile is None or isinstance(self.profile, int)):
            raise InvalidConfig("a profile is named by a whole number")
        if self.kind == "charge" and (self.event is None or self.profile is not None):
            raise InvalidConfig("a charge needs an event, and is of the whole population")
        if self.kind == "charge" and self.cap is not None and not self.plan:
            raise InvalidConfig("a cap counts within one plan: give the plan's digest with it")
        if (self.kind == "participation") and self.profile is None:
            raise InvalidConfig("a participation needs its profile")


@final
class Receipt:
    """Proof that a ledger holds the charge for one release. Only a ledger makes one, and it is good for one release."""

    def __init__(self, entry: Entry, event: Event, hash: str, *, written: object) -> None:
        if written is not _WRITTEN:
            raise InvalidConfig("a receipt comes from a ledger, as proof of the charge that it wrote")
        self._entry, self._event, self._hash = entry, event, hash
        self._unspent = threading.Lock()  # taken once and never given back: two threads cannot both have it

    @property
    def entry(self) -> Entry:
        return self._entry

    @property
    def event(self) -> Event:
        return self._event

    @property
    def attempt(self) -> int:
        """Which try at its round was charged."""
        return self._entry.attempt

    def spend(self) -> None:
        """Marks it used.

        Raises:
            InvalidConfig: it was used before.
        """
        if not self._unspent.acquire(blocking=False):
            raise InvalidConfig("a receipt is good for one release: charge again for another")

    def __reduce_ex__(self, protocol: object) -> NoReturn:  # what copy, deepcopy and pickle all ask for
        raise InvalidConfig("a receipt cannot be copied or kept: it is good for one release")


class Ledger:
    """The charges of one population, in order. Safe to share between threads, and a file between processes.

    Args:
        population: whose releases these are.
        delta: δ of the guarantee, < 1/n.
        budget: ε that must not be passed; None where the plan alone limits the rounds. On a device, of each profile.
        app_id: whose app it is.
        path: of the file, made where there is none; None keeps all in memory.
        now_ms: UTC milliseconds.
        at: called at each of POINTS; tests stop there.

    Raises:
        InvalidConfig: δ outside (0, 1), a budget that is not positive and finite, a file of another population, app,
            δ, budget or relation between neighbours, or one that cannot be written.
        MalformedData: the file is torn, or no ledger.
        UnknownMechanism: a version, event or field that is not known here.
        PrivacyRefused: the chain is broken, or the summary is not what the entries add up to.
    """

    def __init__(
        self,
        population: str,
        *,
        delta: float,
        budget: float | None = None,
        neighbours: Neighbours = "add/remove",
        app_id: str = "",
        path: Path | None = None,
        now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
        at: Callable[[str], None] = lambda point: None,
    ) -> None:
        if not 0.0 < delta < 1.0 or (budget is not None and not 0.0 < budget < math.inf):  # also refuses NaN
            raise InvalidConfig(f"delta must be in (0, 1) and a budget positive and finite, not {delta} and {budget}")
        if neighbours not in get_args(Neighbours):
            raise UnknownMechanism(f"neighbours {neighbours!r} are unknown")
        asked = {
            "population": population,
            "app_id": app_id,
            "delta": float(delta),
            "budget": None if budget is None else float(budget),
            "neighbours": neighbours,
        }
        header = _canonical({"schema_version": SCHEMA_VERSION, **asked, "created": now_ms()})
        if path is None:
            db = _connect(":memory:")
            _fill(db, header, at)
        else:
            if not path.exists():
                _make(path, header, at)
            with _typed(path):
                db = _connect(_uri(path, "mode=rw"))
        self._attach(db, path, now_ms, at)
        if differs := [name for name, value in asked.items() if getattr(self, name) != value]:
            self.close()
            raise InvalidConfig(
                f"{path} is a ledger with "
                + ", ".join(f"{name} {getattr(self, name)!r}, not {asked[name]!r}" for name in differs)
                + ": take another file, or what it was made with"
            )

    @classmethod
    def open(cls, path: Path) -> Self:
        """An existing ledger, whatever it is of, to read only.

        Raises:
            InvalidConfig: no such file.
            MalformedData, UnknownMechanism, PrivacyRefused: as for the ledger.
        """
        if not path.is_file():
            raise InvalidConfig(f"no ledger {path}")
        untouched = not os.access(path.parent, os.W_OK) and not Path(f"{path}-wal").exists()
        with _typed(path):
            db = _connect(_uri(path, "mode=ro&immutable=1" if untouched else "mode=rw"))
            db.execute("PRAGMA query_only = ON")
        ledger = cls.__new__(cls)
        ledger._attach(db, path, lambda: 0, lambda point: None)
        return ledger

    def _attach(
        self, db: sqlite3.Connection, path: Path | None, now_ms: Callable[[], int], at: Callable[[str], None]
    ) -> None:
        self.path, self._db, self._now_ms, self._at = path, db, now_ms, at
        self._where = "the ledger" if path is None else str(path)
        self._lock = threading.RLock()
        self._close = weakref.finalize(self, db.close)
        try:
            with self._transaction("BEGIN", catch_up=False):
                header = self._read_header()
                self.population: str = header["population"]
                self.app_id: str = header["app_id"]
                self.delta: float = header["delta"]
                self.budget: float | None = header["budget"]
                self.neighbours: Neighbours = header["neighbours"]
                self.created_ms: int = header["created"]
                self._seen = self._replayed()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Gives the file back; what was charged is in it already."""
        with self._lock:
            self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # what it holds

    @property
    def head(self) -> str:
        """Hash of the last entry, or of the header where there is none; noted elsewhere it proves what was here."""
        with self._transaction("BEGIN"):
            return self._seen.head

    @property
    def entries(self) -> tuple[Entry, ...]:
        with self._transaction("BEGIN"):
            found = self._db.execute("SELECT record FROM entries ORDER BY number").fetchall()
        return tuple(_entry(record) for (record,) in found)

    @property
    def events(self) -> tuple[Event, ...]:
        """Everything charged, in order."""
        return tuple(entry.event for entry in self.entries if entry.event is not None)

    def records(self) -> list[tuple[str, str]]:
        """Record and hash of the header and of each entry, in order: enough to verify the chain elsewhere."""
        with self._transaction("BEGIN"):
            header = self._db.execute("SELECT record, hash FROM header").fetchall()
            return [*header, *self._db.execute("SELECT record, hash FROM entries ORDER BY number").fetchall()]

    def attempts(self, round: int, plan: str = "") -> int:
        """How often this round of this plan was charged before."""
        with self._transaction("BEGIN"):
            return self._seen.tries[plan, round]

    def repeated(self, plan: str | None = None) -> tuple[Event, ...]:
        """What tries after the first were charged, of one plan or (None) of all; equal events are counted together."""
        with self._transaction("BEGIN"):
            found: Counter[Event] = Counter()
            for charge, n in self._seen.charges(None).items():
                if charge.repeat and plan in (None, charge.plan):
                    found[charge.event] += n
        return tuple(replace(event, count=n) for event, n in found.items())

    def participations(self, profile: int, plan: str | None = None) -> int:
        """How often a hosted profile took part, under one plan or (None) under all.

        Further tries at a round whose noise is the server's are one with the first.
        """
        with self._transaction("BEGIN"):
            taken = self._seen.taken.get(int(profile), {})
            return sum(len(tries) for its, tries in taken.items() if plan in (None, its))

    def rounds(self, profile: int, plan: str) -> frozenset[int]:
        """The rounds of a plan that a hosted profile took part in."""
        with self._transaction("BEGIN"):
            return frozenset(round for round, _ in self._seen.taken.get(int(profile), {}).get(plan, ()))

    def is_further(self, profile: int, plan: str, round: int, attempt: int) -> bool:
        """Whether this would be a later try at a round that the profile answered, with the noise the server's."""
        with self._transaction("BEGIN"):
            return self._seen.is_further((int(profile), plan, round), attempt)

    def further(self, profile: int, plan: str) -> int:
        """How many such tries the profile answered under a plan; at most MOST_TRIES."""
        with self._transaction("BEGIN"):
            return self._seen.further[int(profile), plan]

    def spent(self, profile: int | None = None) -> accounting.Bound:
        """ε of everything charged so far.

        Args:
            profile: of one hosted profile; None for the population, which is as much as any of its profiles spent.
        """
        with self._transaction("BEGIN"):
            return self._bound(profile)

    def after(self, rounds: Mapping[int, Event], *, plan: str = "", cap: int | None = None) -> accounting.Bound:
        """ε if these rounds of a plan were charged as well, each once more. Nothing is written.

        Args:
            rounds: what each would be charged.
            cap: k, as for `charge`.
        """
        with self._transaction("BEGIN"):
            more: Counter[_Charge] = Counter()
            for number, event in rounds.items():
                repeat = self._seen.tries[plan, number] > 0
                more[_Charge(event=replace(event, count=1), plan=plan, cap=cap, repeat=repeat)] += event.count
            return self._bound(None, more)

    def verify(self, head: str | None = None) -> int:
        """Replays every entry from zero; how many there are.

        Args:
            head: one that was noted earlier, which must be in the chain.

        Raises:
            PrivacyRefused: a hash does not follow from what stands before it, the replay is not the summary, or `head`
                is not in the chain.
        """
        with self._transaction("BEGIN", catch_up=False):
            self._read_header()
            seen = self._replayed()
            if head is not None:
                either = "SELECT hash FROM header UNION ALL SELECT hash FROM entries"
                if self._db.execute(f"SELECT 1 FROM ({either}) WHERE hash = ?", (head,)).fetchone() is None:
                    raise PrivacyRefused(f"{self._where}: the head noted earlier is not in the chain: entries are gone")
        return seen.n

    # what is written

    def check(self, event: Event, *, plan: str = "", cap: int | None = None, round: int | None = None) -> None:
        """Refuses an event that the budget has no room for. Call it before any device is.

        Args:
            round: the one to be charged, which may have been charged before; None takes it for a new one.

        Raises:
            BudgetExhausted: the charge would pass the budget.
        """
        with self._transaction("BEGIN"):
            repeat = round is not None and self._seen.tries[plan, round] > 0
            self._check_room(None, event, _Charge(event=replace(event, count=1), plan=plan, cap=cap, repeat=repeat))

    def charge(self, round: int, event: Event, *, plan: str = "", cap: int | None = None, model: str = "") -> Receipt:
        """Writes the charge down. Only then may the release be drawn.

        Args:
            plan: digest of the plan that the round is of.
            cap: k, where the plan holds every profile to k of its rounds and claims no sampling.
            model: version that the round starts from.

        Raises:
            BudgetExhausted: it would pass the budget; nothing was written.
            InvalidConfig: the file cannot be written (read only, disk full, in use); nothing was charged.
        """

        def make() -> Entry:
            return self._entry("charge", round, self._seen.tries[plan, round], event, plan=plan, cap=cap, model=model)

        entry, hash = self._append("charge", make)
        return Receipt(entry, event, hash, written=_WRITTEN)

    def released(self, receipt: Receipt, content: str) -> None:
        """Writes down what left under a charge.

        Args:
            content: digest of what was released.

        Raises:
            InvalidConfig: a receipt of another ledger, or one whose release was written down before.
        """

        def make() -> Entry:
            entry, hash = receipt.entry, receipt._hash
            found = self._db.execute("SELECT hash FROM entries WHERE number = ?", (entry.number,)).fetchone()
            if found != (hash,):
                raise InvalidConfig("the receipt is of another ledger")
            if not self._seen.unreleased[_release(entry)]:
                raise InvalidConfig("what left under this charge was written down before: charge again for another")
            kept = {name: getattr(entry, name) for name in ("plan", "cap", "model", "profile")}
            return self._entry("release", entry.round, entry.attempt, None, **kept, content=content)

        self._append("release", make)

    def participate(
        self, profile: int, round: int, attempt: int, event: Event | None, *, plan: str = "", cap: int | None = None
    ) -> Receipt | None:
        """Writes down that a hosted profile takes part, before anything of it leaves.

        A further try at a round that the profile was in already, as after a server was killed, is no further
        participation where the noise is the server's: nothing of the lost try was released, or its charge is in the
        server's ledger beside the next one's, which a device has to believe. The same or an earlier try is one, as from
        a server whose count of tries began again, and so is every answer where the device adds the noise: it has left.

        Args:
            event: what this participation costs where the device adds the noise; None where the server does.
            cap: how often a profile may take part under this plan, whatever an order says.

        Raises:
            PrivacyRefused: the profile took part that often, or in MOST_TRIES further tries; nothing was written.
            BudgetExhausted: it would pass the profile's budget; nothing was written.
            InvalidConfig: the file cannot be written; nothing was charged.
        """
        profile = int(profile)

        def make() -> Entry:
            taken = self._seen.taken.get(profile, {}).get(plan, Counter())
            further = event is None and self._seen.is_further((profile, plan, round), attempt)
            if cap is not None and not further and len(taken) >= cap:
                raise PrivacyRefused(f"the plan's cap of {cap} participations is reached for a profile")
            if further and self._seen.further[profile, plan] >= MOST_TRIES:
                raise PrivacyRefused(f"a profile answered {MOST_TRIES} further tries under the plan already")
            return self._entry("participation", round, attempt, event, plan=plan, cap=cap, profile=profile)

        entry, hash = self._append("participation", make)
        return None if event is None else Receipt(entry, event, hash, written=_WRITTEN)

    def _entry(self, kind: Kind, round: int, attempt: int, event: Event | None, **more: Any) -> Entry:
        return Entry(
            number=self._seen.n,
            kind=kind,
            round=int(round),
            attempt=int(attempt),
            event=event,
            at_ms=self._now_ms(),
            **more,
        )

    def _append(self, kind: Kind, make: Callable[[], Entry]) -> tuple[Entry, str]:
        """Makes, checks and writes an entry in one transaction, on the head that the file has then."""
        self._at(f"{kind}:before")
        with self._transaction("BEGIN IMMEDIATE"):  # no other process can come between check and charge
            entry = make()
            charge = _charge(entry)
            if charge is not None and entry.event is not None:
                self._check_room(entry.profile, entry.event, charge)
            record = _canonical({**vars(entry), "event": entry.event and encode(entry.event)})
            hash = _hash(self._seen.head, record)
            self._db.execute("INSERT INTO entries VALUES (?, ?, ?)", (entry.number, record, hash))
            self._at(f"{kind}:inserted")
            if charge is not None and entry.event is not None:
                self._db.execute(
                    "INSERT INTO charges VALUES (?, ?) ON CONFLICT (record) DO UPDATE SET n = n + excluded.n",
                    (_canonical(charge.to_record(entry.profile)), entry.event.count),
                )
            self._db.execute("UPDATE summary SET entries = ?, head = ?", (entry.number + 1, hash))
            self._at(f"{kind}:counted")
        self._at(f"{kind}:committed")
        return entry, hash

    def _check_room(self, profile: int | None, event: Event, charge: _Charge) -> None:
        if self.budget is None:
            return
        after = self._bound(profile, Counter({charge: event.count})).epsilon
        if after > self.budget * (1 + 1e-9):
            raise BudgetExhausted(f"population {self.population}: epsilon would pass the budget of {self.budget:g}")

    def _bound(self, profile: int | None, more: Counter[_Charge] | None = None) -> accounting.Bound:
        """ε of the population's charges with a profile's own; None is the profile that spent most."""
        shared = self._seen.charges(None) + (more or Counter())
        profiles = self._seen.profiles if profile is None else [int(profile)]
        each = {tuple(_composed(shared + self._seen.charges(p))) for p in profiles} or {tuple(_composed(shared))}
        bounds = [accounting.epsilon(events, self.delta, self.neighbours) for events in each]
        return max(bounds, key=lambda bound: bound.epsilon)

    # reading the file

    @contextlib.contextmanager
    def _transaction(self, begin: str, *, catch_up: bool = True) -> Iterator[None]:
        """One view of the file; what other processes wrote since the last is taken in first."""
        with self._lock, _typed(self._where):
            self._db.execute(begin)
            try:
                if catch_up:
                    self._catch_up(self._seen)
                yield
                self._db.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):  # SQLite may have rolled back by itself
                    self._db.execute("ROLLBACK")
                raise

    def _read_header(self) -> dict[str, Any]:
        found = dict(self._db.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall())
        if "header" not in found:
            raise MalformedData(f"{self._where} is no ledger, or was cut off: restore it from a copy")
        record, hash = self._one("SELECT record, hash FROM header")
        if not isinstance(record, str) or _hash("", record) != hash:
            raise PrivacyRefused(f"{self._where}: the header is not the one it was made with")
        header: dict[str, Any] = json.loads(record)
        if header.get("schema_version") != SCHEMA_VERSION:
            version = header.get("schema_version")
            raise UnknownMechanism(f"{self._where}: ledger version {version!r} is unknown here; update penchant")
        if sorted(found.values()) != sorted(_SCHEMA):
            raise PrivacyRefused(f"{self._where}: its tables or the triggers that keep it append-only were changed")
        return header

    def _replayed(self) -> _Replay:
        """Everything from zero, held against the summary."""
        seen = _Replay(self._one("SELECT hash FROM header")[0])
        self._catch_up(seen)
        try:
            stored: Counter[tuple[int | None, _Charge]] = Counter()
            for record, n in self._db.execute("SELECT record, n FROM charges"):
                stored[_Charge.from_record(json.loads(record))] += n
        except (KeyError, TypeError, ValueError, PenchantError):
            stored = Counter({(None, _NOTHING): 1})
        if stored != seen.charged:
            raise PrivacyRefused(f"{self._where}: the charges of its summary are not what its entries add up to")
        return seen

    def _catch_up(self, seen: _Replay) -> None:
        """Adds the entries after those seen, each as it follows from the one before it."""
        summary = self._one("SELECT entries, head FROM summary")
        if summary == (seen.n, seen.head):
            return
        after = "SELECT number, record, hash FROM entries WHERE number >= ? ORDER BY number"
        for number, record, hash in self._db.execute(after, (seen.n,)):
            if number != seen.n or not isinstance(record, str) or _hash(seen.head, record) != hash:
                raise PrivacyRefused(f"{self._where}: entry {seen.n} does not follow from what stands before it")
            entry = _entry(record)
            if fault := seen.fault(entry):
                raise PrivacyRefused(f"{self._where}: entry {seen.n} {fault}")
            seen.add(entry, hash)
        if summary != (seen.n, seen.head):
            raise PrivacyRefused(f"{self._where}: its summary tells of other entries than it holds: some are gone")

    def _one(self, query: str) -> tuple[Any, ...]:
        found: tuple[Any, ...] | None = self._db.execute(query).fetchone()
        if found is None:
            raise PrivacyRefused(f"{self._where}: its header or summary is gone")
        return found


@dataclass(frozen=True, kw_only=True)
class _Charge:
    """What tells charges apart when they are added up; `event` has count 1."""

    event: Event
    plan: str = ""
    cap: int | None = None
    repeat: bool = False

    def to_record(self, profile: int | None) -> dict[str, Any]:
        return {**vars(self), "event": encode(self.event), "profile": profile}

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> tuple[int | None, _Charge]:
        profile = record.pop("profile")
        return profile, cls(**{**record, "event": decode(record["event"])})


_NOTHING = _Charge(event=Gaussian(noise_multiplier=1.0))


class _Replay:
    """What the entries so far add up to."""

    def __init__(self, genesis: str) -> None:
        self.n, self.head = 0, genesis
        self.tries: Counter[tuple[str, int]] = Counter()
        self.taken: dict[int, dict[str, Counter[tuple[int, int | None]]]] = {}
        self.attempts: dict[tuple[int, str, int], int] = {}  # the latest answered, where the noise is the server's
        self.further: Counter[tuple[int, str]] = Counter()
        self.unreleased: Counter[tuple[Any, ...]] = Counter()
        self._charged: dict[int | None, Counter[_Charge]] = {}

    @property
    def charged(self) -> Counter[tuple[int | None, _Charge]]:
        return Counter({(p, charge): n for p, charges in self._charged.items() for charge, n in charges.items()})

    @property
    def profiles(self) -> list[int]:
        return [profile for profile in self._charged if profile is not None]

    def charges(self, profile: int | None) -> Counter[_Charge]:
        return self._charged.get(profile, Counter())

    def fault(self, entry: Entry) -> str:
        """Why this cannot be the next entry, whatever its hash says; "" where it can."""
        if entry.number != self.n:
            return "has the number of another"
        if entry.kind == "charge" and entry.attempt != self.tries[entry.plan, entry.round]:
            return "is not the next try at its round"
        if entry.kind == "release" and not self.unreleased[_release(entry)]:
            return "is a release that was not charged"
        return ""

    def is_further(self, which: tuple[int, str, int], attempt: int) -> bool:
        return which in self.attempts and attempt > self.attempts[which]

    def add(self, entry: Entry, hash: str) -> None:
        charge = _charge(entry)
        if charge is not None and entry.event is not None:
            self._charged.setdefault(entry.profile, Counter())[charge] += entry.event.count
        self.unreleased[_release(entry)] += -1 if entry.kind == "release" else 1
        if entry.kind == "charge":
            self.tries[entry.plan, entry.round] += 1
        if entry.kind == "participation" and entry.profile is not None:
            which, own = (entry.profile, entry.plan, entry.round), entry.event is not None
            if not own and self.is_further(which, entry.attempt):
                self.further[entry.profile, entry.plan] += 1
            elif which in self.attempts:
                own = True  # the same or an earlier try: a participation beside that of the round's tries
            if entry.event is None:
                self.attempts[which] = max(entry.attempt, self.attempts.get(which, -1))
            each = entry.number if own else None
            self.taken.setdefault(entry.profile, {}).setdefault(entry.plan, Counter())[entry.round, each] += 1
        self.n, self.head = entry.number + 1, hash


def _charge(entry: Entry) -> _Charge | None:
    """How an entry counts; None where it costs nothing here."""
    if entry.event is None:
        return None
    one = replace(entry.event, count=1)
    if entry.kind == "participation":  # every one is this profile's own: nothing to leave out
        return _Charge(event=one)
    return _Charge(event=one, plan=entry.plan, cap=entry.cap, repeat=entry.attempt > 0)


def _release(entry: Entry) -> tuple[Any, ...]:
    """What a release and its charge share."""
    return entry.profile, entry.plan, entry.round, entry.attempt


def _composed(charges: Counter[_Charge]) -> list[Event]:
    """The events that bound what one profile was in, equal ones merged: accountants compose a count far faster."""
    counts: Counter[Event] = Counter()
    capped: dict[tuple[str, int], Counter[Gaussian]] = {}
    for charge, n in charges.items():
        if charge.cap is None or charge.repeat or not isinstance(charge.event, Gaussian):
            counts[charge.event] += n
        else:
            capped.setdefault((charge.plan, charge.cap), Counter())[charge.event] += n
    for (_, left), events in capped.items():
        for event in sorted(events, key=lambda event: event.noise_multiplier):
            counts[event] += min(left, events[event])
            left -= min(left, events[event])
    return [replace(event, count=n) for event, n in counts.items() if n]


def _entry(record: str) -> Entry:
    try:
        fields = json.loads(record)
        return Entry(**{**fields, "event": fields["event"] and decode(fields["event"])})
    except (KeyError, TypeError, ValueError):
        raise UnknownMechanism("an entry has missing or unknown fields; update penchant") from None


def _canonical(record: Mapping[str, Any]) -> str:
    """JSON with sorted keys, no spaces and nothing but ASCII."""
    return json.dumps(record, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _hash(before: str, record: str) -> str:
    return hashlib.sha256(f"{before}{record}".encode("utf-8", "surrogateescape")).hexdigest()


# ---------------------------------------------------------------------------------------------------------- files


def _uri(path: Path, how: str) -> str:
    return f"{path.absolute().as_uri()}?{how}"


def _connect(name: str) -> sqlite3.Connection:
    db = sqlite3.connect(name, uri=True, timeout=30, isolation_level=None, check_same_thread=False)
    db.text_factory = lambda text: text.decode("utf-8", "surrogateescape")  # a damaged byte must reach the chain check
    try:
        db.execute("PRAGMA synchronous = FULL")  # in WAL mode less would lose charges when the power fails
    except BaseException:
        db.close()
        raise
    return db


def _fill(db: sqlite3.Connection, header: str, at: Callable[[str], None]) -> None:
    """A ledger without entries."""
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("BEGIN IMMEDIATE")
    for statement in _SCHEMA:
        db.execute(statement)
    db.execute("INSERT INTO header VALUES (1, ?, ?)", (header, _hash("", header)))
    db.execute("INSERT INTO summary VALUES (1, 0, ?)", (_hash("", header),))
    at("create:inserted")
    db.execute("COMMIT")


def _make(path: Path, header: str, at: Callable[[str], None]) -> None:
    """Puts a new ledger at `path`, whole or not at all; where another process was first, its ledger stays."""
    if Path(f"{path}-wal").exists() and not path.exists():
        raise MalformedData(f"{path} is gone but its log {path.name}-wal is here: restore it from a copy")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f"{path.name}.", suffix=".new", dir=path.parent)
        os.close(handle)
    except OSError as error:
        raise InvalidConfig(f"cannot write {path}: {error.strerror}; take another place") from None
    beside = Path(name)
    at("create:before")
    try:
        with _typed(path), contextlib.closing(_connect(_uri(beside, "mode=rw"))) as db:
            _fill(db, header, at)
        at("create:committed")
        _link(beside, path)
        at("create:linked")
    finally:
        beside.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # a folder cannot be synced everywhere
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _link(beside: Path, path: Path) -> None:
    try:
        os.link(beside, path)  # unlike a rename, never over a ledger that came in between
    except FileExistsError:
        return
    except OSError:  # no hard links here, as on Android: the name is claimed first
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            os.replace(beside, path)
        except FileExistsError:
            return
        except OSError as error:
            raise InvalidConfig(f"cannot write {path}: {error.strerror}; take another place") from None


_WHY = {
    sqlite3.SQLITE_FULL: "the disk is full",
    sqlite3.SQLITE_READONLY: "it can only be read",
    sqlite3.SQLITE_BUSY: "another process holds it",
    sqlite3.SQLITE_CANTOPEN: "it cannot be opened",
    sqlite3.SQLITE_IOERR: "the disk fails",
}


@contextlib.contextmanager
def _typed(where: object) -> Iterator[None]:
    """SQLite's errors as ours."""
    try:
        yield
    except UnicodeDecodeError:  # of SQLite's own message, about a name that is not one any more
        raise MalformedData(f"{where} is damaged, or no ledger: restore it from a copy") from None
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # without what extends it
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            raise MalformedData(f"{where} is damaged, or no ledger: restore it from a copy") from None
        raise InvalidConfig(f"{where}: {_WHY.get(code, str(error))}; nothing may be released") from None
