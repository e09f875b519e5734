"""Who is let in gets one place and keeps it, whatever is killed, replayed, raced or asked of Flower meanwhile."""

from __future__ import annotations

import asyncio
import copy
import io
import json
import logging
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from starlette.applications import Starlette

from penchant.client import Client, _enrolment
from penchant.client._transport import new_node_key
from penchant.common.artifacts import enrolment as proofs
from penchant.common.artifacts.bundle import App, Bundle
from penchant.common.artifacts.distribution_pb2 import EnrolRequest, EnrolResponse, RevokeRequest, RevokeResponse
from penchant.common.errors import (
    InvalidConfig,
    NotServed,
    PenchantError,
    PrivacyRefused,
    Unreachable,
    UntrustedArtifact,
)
from penchant.common.privacy.plan import SumSpec
from penchant.common.privacy.sampling import draw
from penchant.common.streams import Streams
from penchant.server.database import Database
from penchant.server.distribution import MAX_REQUEST, Distribution
from penchant.server.enrol_command import command, enrol, seconds
from penchant.server.enrolment import (
    MAX_BODY,
    SERVICE,
    Limiter,
    NotRunning,
    Reconciled,
    Roster,
    caller,
    handlers,
    mint_route,
)
from penchant.server.folder import Folder
from tests.server.commands import run
from tests.server.operators import NOW, a_plan, an_operator

HOUR = 3600.0


class Killed(BaseException):
    """The process is gone at this point."""


class Fuse:
    """Lets so many points pass and kills at the next; None lets all pass."""

    left: int | None = None

    def point(self) -> None:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                self.left = None
                raise Killed


class Flower:
    """Its nodes, as measured of SuperLink: numbers of 64 bits, and a key that was taken out is never taken again."""

    def __init__(self, fuse: Fuse | None = None) -> None:
        self.live: dict[bytes, int] = {}
        self.burnt: set[bytes] = set()
        self.away, self._next, self._fuse, self._lock = False, 2**63 - 2, fuse or Fuse(), threading.Lock()

    def register(self, node_key: bytes, /) -> int:
        with self._asked():
            if node_key in self.burnt:
                raise UntrustedArtifact("a key that was taken out")
            if node_key not in self.live:
                self._next += 1
                self.live[node_key] = self._next
            return self.live[node_key]

    def unregister(self, node_id: int, /) -> None:
        with self._asked():
            for key in [key for key, node in self.live.items() if node == node_id]:
                self.burnt.add(key)
                del self.live[key]

    def nodes(self) -> Mapping[bytes, int]:
        with self._asked():
            return dict(self.live)

    @contextmanager
    def _asked(self) -> Iterator[None]:
        self._fuse.point()
        if self.away:
            raise Unreachable("Flower is away")
        with self._lock:
            yield
        self._fuse.point()


class Mortal(Database):
    """Can be killed before a transaction, before its commit and after it."""

    fuse: Fuse

    @contextmanager
    def transaction(self) -> Iterator[Any]:
        self.fuse.point()
        with super().transaction() as write:
            yield write
            self.fuse.point()
        self.fuse.point()


class Server:
    """A roster on a database of its own, with a clock that is set and points at which it is killed."""

    def __init__(self, path: Path, *, n_users: int = 4) -> None:
        self.path, self.now_ms, self.fuse = path / "server.db", NOW, Fuse()
        Database.make(self.path)
        self.flower = Flower(self.fuse)
        self.roster = Roster(self.open, n_users=n_users, subjects=b"s" * 32, registry=self.flower)

    def open(self) -> Database:
        made = Mortal(self.path, now_ms=lambda: self.now_ms)
        made.fuse = self.fuse
        return made

    def rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        with Database(self.path) as db:
            return [tuple(row) for row in db.rows(query, *values)]

    def token(self, **fields: Any) -> str:
        return self.roster.mint(**{"ttl_s": HOUR, **fields}).text

    def whole(self) -> None:
        """Flower's nodes are the live places, by key and by number."""
        rows = self.rows("SELECT place, node_key FROM places WHERE left_ms IS NULL")
        assert self.flower.live.keys() == {key for _, key in rows}
        assert self.roster.live() == {place: self.flower.live[key] for place, key in rows}


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return Server(tmp_path)


# ------------------------------------------------------------------------------------------------------ roster


def test_a_token_lets_one_device_in_and_a_lost_answer_is_given_again(server: Server) -> None:
    token = server.token()
    assert server.roster.enrol(token, b"a") == 0
    assert server.roster.enrol(token, b"a") == 0
    with pytest.raises(UntrustedArtifact):
        server.roster.enrol(token, b"b")
    assert server.roster.enrol(server.token(), b"b") == 1
    server.whole()


def test_nothing_of_a_token_or_a_subject_is_kept_but_hashes(server: Server) -> None:
    token = server.token(subject="alice@example.com")
    server.roster.enrol(token, b"a")
    kept = b"".join(path.read_bytes() for path in server.path.parent.iterdir())
    assert b"alice" not in kept
    assert token.encode() not in kept
    assert token.removeprefix("pt_").encode() not in kept
    assert (len(token), token[:3]) == (46, "pt_")


def test_a_token_is_over_when_the_clock_says_so_and_is_forgotten_with_who_used_it(server: Server) -> None:
    used, unused = server.token(ttl_s=60), server.token(ttl_s=60)
    server.roster.enrol(used, b"a")
    server.now_ms += 59_999
    assert server.roster.enrol(used, b"a") == 0
    server.now_ms += 1
    for token, key in ((unused, b"b"), (used, b"a")):
        with pytest.raises(UntrustedArtifact):
            server.roster.enrol(token, key)
    assert len(server.rows("SELECT * FROM uses")) == 1
    again = server.token()
    assert server.rows("SELECT COUNT(*) FROM tokens") == [(1,)]
    assert server.rows("SELECT * FROM uses") == []
    assert server.roster.enrol(again, b"a") == 0  # the same key needs a new token, and has its place still


def test_the_same_subject_has_the_same_place_and_the_key_before_never_comes_back(server: Server) -> None:
    server.roster.enrol(server.token(subject="alice"), b"a")
    server.roster.enrol(server.token(subject="bob"), b"b")
    first = server.flower.live[b"a"]
    assert server.roster.enrol(server.token(subject="alice"), b"a2") == 0
    assert server.flower.live.keys() == {b"a2", b"b"}
    assert server.flower.live[b"a2"] != first
    assert server.rows("SELECT node_key FROM revoked") == [(b"a",)]
    for subject in ("alice", "bob", None):
        with pytest.raises(UntrustedArtifact):
            server.roster.enrol(server.token(subject=subject), b"a")
    server.roster.revoke(b"a2")
    assert server.roster.enrol(server.token(subject="alice"), b"a3") == 0
    server.whole()


def test_one_key_is_not_two_profiles(server: Server) -> None:
    server.roster.enrol(server.token(subject="alice"), b"a")
    server.roster.enrol(server.token(subject="bob"), b"b")
    with pytest.raises(UntrustedArtifact):
        server.roster.enrol(server.token(subject="bob"), b"a")
    assert server.roster.enrol(server.token(subject="alice"), b"a") == 0
    assert server.roster.enrol(server.token(), b"a") == 0


def test_a_place_without_a_subject_takes_the_first_that_comes_and_keeps_it(server: Server) -> None:
    server.roster.enrol(server.token(), b"a")
    assert server.roster.enrol(server.token(subject="alice"), b"a") == 0
    assert server.roster.enrol(server.token(subject="alice"), b"a2") == 0
    server.roster.enrol(server.token(), b"b")
    with pytest.raises(UntrustedArtifact):  # alice has a place; b's would be her second under one name
        server.roster.enrol(server.token(subject="alice"), b"b")


def test_a_place_that_was_left_stays_empty_and_a_full_roster_uses_no_token_up(server: Server) -> None:
    for key in (b"a", b"b", b"c", b"d"):
        server.roster.enrol(server.token(), key)
    server.roster.revoke(b"b")
    token = server.token()
    with pytest.raises(PrivacyRefused, match="the plan's roster of 4 is full"):
        server.roster.enrol(token, b"e")
    assert server.rows("SELECT uses FROM tokens ORDER BY uses DESC LIMIT 1") == [(1,)]
    found = server.roster.funnel()
    assert (found.places, found.taken, found.live, found.revoked, found.free) == (4, 4, 3, 1, 0)
    assert (found.tokens, found.uses, found.unregistered) == (1, 1, 0)
    assert server.roster.live().keys() == {0, 2, 3}


def test_whoever_left_stays_out_and_leaving_twice_or_never_having_been_in_is_no_error(server: Server) -> None:
    token = server.token(uses=2)
    server.roster.enrol(token, b"a")
    assert server.roster.revoke(b"a")
    assert server.roster.revoke(b"a")
    assert server.roster.revoke(b"never")
    assert server.flower.live == {}
    for again in (token, server.token()):
        with pytest.raises(UntrustedArtifact):
            server.roster.enrol(again, b"a")
    with pytest.raises(InvalidConfig, match="nobody is on place 0"):
        server.roster.revoke_place(0)
    assert server.roster.enrol(server.token(), b"never") == 1  # was in no roster, so nothing was revoked


@pytest.mark.parametrize("how", ["revoked", "taken over"])
def test_a_device_that_goes_while_flower_registers_it_is_not_left_behind_there(server: Server, how: str) -> None:
    register, late = server.flower.register, server.token(subject="alice")

    def slow(node_key: bytes, /) -> int:
        node = register(node_key)
        if node_key == b"a":
            assert server.roster.revoke(b"a") if how == "revoked" else server.roster.enrol(late, b"b") == 0
        return node

    server.flower.register = slow  # type: ignore[method-assign]  # a slower one
    with pytest.raises(UntrustedArtifact):
        server.roster.enrol(server.token(subject="alice"), b"a")
    assert server.flower.live.keys() == (set() if how == "revoked" else {b"b"})
    server.whole()


def test_what_flower_did_not_hear_it_hears_when_it_is_back(server: Server) -> None:
    token = server.token()
    server.roster.enrol(server.token(), b"gone")
    server.flower.away = True
    with pytest.raises(Unreachable):
        server.roster.enrol(token, b"a")
    assert not server.roster.revoke(b"gone")
    assert server.roster.funnel().unregistered == 1
    assert server.roster.live() == {}
    with pytest.raises(Unreachable):
        server.roster.reconcile()
    server.flower.away = False
    assert server.roster.enrol(token, b"a") == 1  # the device's own next try
    assert server.roster.reconcile() == Reconciled(0, 1)
    assert server.roster.reconcile() == Reconciled(0, 0)
    server.whole()


def test_after_flower_lost_its_nodes_all_are_registered_again(server: Server) -> None:
    for key in (b"a", b"b"):
        server.roster.enrol(server.token(), key)
    server.flower.live.clear()
    assert server.roster.reconcile() == Reconciled(2, 0)
    server.whole()


def test_after_an_older_database_was_restored_strange_nodes_go_and_their_keys_use_nothing_up(server: Server) -> None:
    server.roster.enrol(server.token(), b"a")
    before = server.path.read_bytes()
    token = server.token(uses=2)
    server.roster.enrol(token, b"later")
    server.roster.revoke(b"a")  # Flower will never take it again
    with Database(server.path) as db:
        db.rows("PRAGMA wal_checkpoint(TRUNCATE)")
    server.path.write_bytes(before)
    for name in ("server.db-wal", "server.db-shm"):
        server.path.with_name(name).unlink(missing_ok=True)
    assert server.roster.reconcile() == Reconciled(0, 1)
    server.whole()
    assert server.flower.live == {}
    fresh = server.token()
    for key in (b"later", b"a"):
        with pytest.raises(UntrustedArtifact):
            server.roster.enrol(fresh, key)
    assert server.roster.enrol(fresh, b"new") == 1


@pytest.mark.parametrize(
    "fields",
    [
        {"ttl_s": 0},
        {"ttl_s": -1.0},
        {"ttl_s": float("nan")},
        {"ttl_s": 1e12},
        {"ttl_s": True},
        {"uses": 0},
        {"uses": 1.0},
        {"uses": 1 << 40},
        {"subject": ""},
        {"subject": "x" * 257},
        {"subject": "a\nb"},
        {"subject": "\ud800"},
        {"subject": 5},
    ],
    ids=str,
)
def test_a_token_that_cannot_be_is_not_minted(server: Server, fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidConfig, match=next(iter(fields))):
        server.token(**fields)
    assert server.rows("SELECT * FROM tokens") == []


def test_a_key_for_subjects_that_is_cut_short_is_refused(server: Server) -> None:
    with pytest.raises(InvalidConfig, match=r"subjects\.secret"):
        Roster(server.open, n_users=1, subjects=b"s" * 31, registry=server.flower)


def test_of_many_who_race_for_one_token_as_many_get_in_as_it_says(tmp_path: Path) -> None:
    server = Server(tmp_path, n_users=50)
    token, start = server.token(uses=3), threading.Barrier(20)

    def device(key: bytes) -> int | None:
        start.wait(timeout=60)
        try:
            return server.roster.enrol(token, key)
        except UntrustedArtifact:
            return None

    with ThreadPoolExecutor(20) as pool:
        found = list(pool.map(device, [bytes([i]) for i in range(20)]))
        assert sorted(place for place in found if place is not None) == [0, 1, 2]
        same = set(pool.map(lambda _: device(bytes([found.index(0)])), range(20)))
    assert same == {0}
    server.whole()


def test_devices_of_one_subject_that_race_end_as_one_while_it_is_reconciled(tmp_path: Path) -> None:
    server = Server(tmp_path, n_users=50)
    tokens, start = [server.token(subject="alice") for _ in range(12)], threading.Barrier(16)

    def device(i: int) -> int | None:
        start.wait(timeout=60)
        if i >= len(tokens):
            server.roster.reconcile()
            return None
        with suppress(UntrustedArtifact):  # another one took the place over before the answer
            return server.roster.enrol(tokens[i], bytes([i]))
        return None

    with ThreadPoolExecutor(16) as pool:
        found = set(pool.map(device, range(16)))
    assert found - {None} == {0}
    assert len(server.rows("SELECT * FROM places")) == 1
    server.roster.reconcile()
    server.whole()
    assert len(server.flower.live) == 1


@pytest.mark.parametrize("after", range(9))
def test_a_kill_anywhere_in_an_enrolment_or_a_takeover_is_mended_by_the_next_try_or_by_a_start(
    tmp_path: Path, after: int
) -> None:
    for n, mend in enumerate(("try", "start")):
        for m, subject in enumerate((None, "alice")):
            (path := tmp_path / f"{n}{m}").mkdir()
            server = Server(path)
            server.roster.enrol(server.token(subject="alice"), b"old")
            token, want = server.token(subject=subject), 1 if subject is None else 0
            server.fuse.left = after
            with suppress(Killed):
                server.roster.enrol(token, b"a")
            server.fuse.left = None
            if mend == "start":
                server.roster.reconcile()
                server.whole()
            assert server.roster.enrol(token, b"a") == want
            server.roster.reconcile()
            server.whole()
            assert b"a" in server.flower.live
            assert (b"old" in server.flower.live) == (subject is None)


# -------------------------------------------------------------------------------------------------- any history


@dataclass
class Granted:
    """A token, as the model knows it."""

    expires_ms: int
    uses: int
    subject: str | None
    by: set[bytes] = field(default_factory=set)


@dataclass
class Seat:
    """A place, as the model knows it."""

    key: bytes
    subject: str | None
    live: bool = True


@dataclass
class Model:
    """What the roster must be: lists and sets, and no database."""

    n_users: int
    tokens: dict[str, Granted] = field(default_factory=dict)
    seats: list[Seat] = field(default_factory=list)
    revoked: set[bytes] = field(default_factory=set)

    def enrol(self, token: str, key: bytes, now_ms: int) -> int:
        granted = self.tokens[token]
        if granted.expires_ms <= now_ms or key in self.revoked:
            raise UntrustedArtifact
        mine = next((seat for seat in self.seats if seat.key == key), None)
        theirs = next((seat for seat in self.seats if granted.subject and seat.subject == granted.subject), None)
        if mine is not None and key in granted.by:
            return self.seats.index(mine)
        if granted.uses == 0:
            raise UntrustedArtifact
        if mine is not None and granted.subject not in (None, mine.subject):
            if mine.subject is not None or theirs is not None:
                raise UntrustedArtifact
            mine.subject = granted.subject
        if mine is None and theirs is not None:
            self.revoked.add(theirs.key)
            theirs.key, theirs.live = key, True
            mine = theirs
        if mine is None:
            if len(self.seats) == self.n_users:
                raise PrivacyRefused
            self.seats.append(mine := Seat(key, granted.subject))
        granted.uses -= 1
        granted.by.add(key)
        return self.seats.index(mine)

    def revoke(self, key: bytes) -> None:
        for seat in self.seats:
            if seat.key == key:
                seat.live = False
                self.revoked.add(key)

    def kept(self) -> tuple[Any, ...]:
        seats = [(i, seat.key, seat.subject is not None, seat.live) for i, seat in enumerate(self.seats)]
        return seats, self.revoked, sorted(granted.uses for granted in self.tokens.values())


KEYS = st.sampled_from([bytes([i]) * 4 for i in range(8)])
KILL = st.one_of(st.none(), st.integers(0, 9))


class History(RuleBasedStateMachine):
    """Any order of tokens, enrolments, replays, revocations, kills, clock steps and absences of Flower."""

    def __init__(self) -> None:
        super().__init__()
        self._folder = tempfile.TemporaryDirectory()
        self.server = Server(Path(self._folder.name))
        self.model, self.profiles = Model(4), dict[int, tuple[bytes, bytes | None]]()

    def teardown(self) -> None:
        self._folder.cleanup()

    @rule(subject=st.sampled_from([None, "a", "b"]), uses=st.integers(1, 3), minutes=st.sampled_from([1, 600]))
    def mint(self, subject: str | None, uses: int, minutes: int) -> None:
        now = self.server.now_ms
        self.model.tokens = {text: one for text, one in self.model.tokens.items() if one.expires_ms > now}
        made = self.server.roster.mint(ttl_s=60 * minutes, uses=uses, subject=subject)
        self.model.tokens[made.text] = Granted(now + 60_000 * minutes, uses, subject)

    @precondition(lambda self: self.model.tokens)
    @rule(which=st.integers(0, 1 << 16), key=KEYS, kill=KILL)
    def enrol(self, which: int, key: bytes, kill: int | None) -> None:
        token = list(self.model.tokens)[which % len(self.model.tokens)]
        after, now = copy.deepcopy(self.model), self.server.now_ms
        try:
            expected: int | type[BaseException] = after.enrol(token, key, now)
        except PenchantError as error:
            expected, after = type(error), self.model
        self.either(kill, after, lambda: self.server.roster.enrol(token, key), expected)

    @rule(key=KEYS, kill=KILL)
    def revoke(self, key: bytes, kill: int | None) -> None:
        after = copy.deepcopy(self.model)
        after.revoke(key)
        self.either(kill, after, lambda: self.server.roster.revoke(key), None)

    @rule(kill=KILL)
    def reconcile(self, kill: int | None) -> None:
        self.either(kill, self.model, self.server.roster.reconcile, None)
        if kill is None and not self.server.flower.away:
            self.server.whole()

    @rule(seconds=st.sampled_from([1, 59, 61]))
    def wait(self, seconds: int) -> None:
        self.server.now_ms += 1000 * seconds

    @rule(away=st.booleans())
    def flower(self, away: bool) -> None:
        self.server.flower.away = away

    def either(self, kill: int | None, after: Model, act: Callable[[], Any], expected: Any) -> None:
        """Acts; what is kept is then all of it or, where it was killed, perhaps nothing."""
        self.server.fuse.left = kill
        try:
            got: Any = act()
        except (Killed, PenchantError) as error:
            got = type(error)
        self.server.fuse.left = None
        if got is Killed:
            assert self.kept() in (self.model.kept(), after.kept())
            self.model = after if self.kept() == after.kept() else self.model
        else:
            assert got is Unreachable if self.server.flower.away and got is Unreachable else expected in (None, got)
            self.model = after
        assert self.kept() == self.model.kept()

    def kept(self) -> tuple[Any, ...]:
        rows = self.server.rows
        seats = rows("SELECT place, node_key, subject IS NOT NULL, left_ms IS NULL FROM places ORDER BY place")
        return (
            [(place, key, bool(named), bool(live)) for place, key, named, live in seats],
            {key for (key,) in rows("SELECT node_key FROM revoked")},
            [uses for (uses,) in rows("SELECT uses FROM tokens ORDER BY uses")],
        )

    @invariant()
    def no_place_is_ever_two_profiles(self) -> None:
        for place, key, subject in self.server.rows("SELECT place, node_key, subject FROM places"):
            key_before, subject_before = self.profiles.get(place, (key, subject))
            assert subject_before in (None, subject)
            assert key == key_before or subject_before is not None
            self.profiles[place] = (key, subject)

    @invariant()
    def no_revoked_key_is_live_and_flower_numbers_only_live_places(self) -> None:
        rows = self.server.rows
        assert rows("SELECT 1 FROM places JOIN revoked USING (node_key) WHERE left_ms IS NULL") == []
        gone = {key for (key,) in rows("SELECT node_key FROM revoked")}
        asked = set(self.server.roster.live().values())
        assert not asked & {node for key, node in self.server.flower.live.items() if key in gone}


TestHistory = History.TestCase
TestHistory.settings = settings(max_examples=40, stateful_step_count=25)


# ----------------------------------------------------------------------------------------------------- limiter


def test_an_address_makes_a_minutes_calls_at_once_and_then_as_many_as_fill_in() -> None:
    now = 0.0
    limiter = Limiter(6, now_s=lambda: now)
    assert [limiter.allows("a") for _ in range(8)] == [True] * 6 + [False] * 2
    assert limiter.allows("b")
    now = 9.9
    assert not limiter.allows("a")
    now = 10.0
    assert [limiter.allows("a") for _ in range(2)] == [True, False]
    now = 1e6
    assert [limiter.allows("a") for _ in range(7)] == [True] * 6 + [False]


def test_the_limiter_remembers_so_many_addresses_and_no_more() -> None:
    limiter = Limiter(1, remembered=10, now_s=lambda: 0.0)
    for i in range(1000):
        assert limiter.allows(str(i))
        assert not limiter.allows(str(i))
    assert not limiter.allows("990")
    assert limiter.allows("0")


@pytest.mark.parametrize(
    ("peer", "told", "expected"),
    [
        ("ipv4:203.0.113.9:1", None, "203.0.113.9"),
        ("ipv4:203.0.113.9:1", "198.51.100.1", "203.0.113.9"),  # only the edge may say who calls
        ("ipv4:127.0.0.1:1", "198.51.100.1", "198.51.100.1"),
        ("ipv6:%5B::1%5D:1", "198.51.100.1", "198.51.100.1"),
        ("ipv6:[::1]:1", "2001:db8:1:2:3::4", "2001:db8:1:2::"),
        ("ipv6:[::ffff:127.0.0.1]:1", "::ffff:198.51.100.1", "198.51.100.1"),
        ("ipv6:%5B2001:db8:1:2::7%5D:1", "198.51.100.1", "2001:db8:1:2::"),
        ("ipv4:127.0.0.1:1", None, "127.0.0.1"),
        ("ipv4:127.0.0.1:1", "198.51.100.1, 203.0.113.9", "127.0.0.1"),
        ("unix:/run/x", "198.51.100.1", ""),
    ],
    ids=str,
)
def test_a_call_counts_for_who_made_it(peer: str, told: str | None, expected: str) -> None:
    assert caller(peer, {} if told is None else {"x-real-ip": told}) == expected


# ----------------------------------------------------------------------------------------------------- service


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
    return port


class World:
    """An operator's folder, its services on TLS, and a device's way to them."""

    def __init__(
        self, path: Path, *, per_minute: int | None = 10_000, users: int = 3, toml: str = "", **options: Any
    ) -> None:
        self.port, self.now_ms = free_port(), NOW
        toml += f'[addresses]\npublic = "127.0.0.1:{self.port}"\n'
        self.folder = an_operator(path, users=users, toml=toml, **options)
        self.flower = Flower()
        self.roster = Roster.of(self.folder, self.flower, open=self.open)
        limiter = None if per_minute is None else Limiter(per_minute, now_s=lambda: 0.0)
        self.app: App = Bundle.read(self.folder.bundle).app
        self.served = Distribution(
            {("films", "default"): self.folder.distribution},
            address=f"127.0.0.1:{self.port}",
            private_key=(self.folder.keys / "server.key").read_bytes(),
            chain=(self.folder.tls / "server.crt").read_bytes(),
            services=[(SERVICE, handlers(self.roster, self.folder, limiter=limiter))],
        )

    def open(self) -> Database:
        return Database(self.folder.database, now_ms=lambda: self.now_ms)

    def token(self, **fields: Any) -> str:
        return self.roster.mint(**{"ttl_s": HOUR, **fields}).text

    def enrol(self, token: str, key: bytes | None = None) -> _enrolment.Enrolled:
        return _enrolment.enrol(self.app, token, key or new_node_key(), deadline_s=30)

    def call(self, method: str, asked: Any, metadata: tuple[tuple[str, str], ...] = ()) -> Any:
        answer = EnrolResponse if method == "Enrol" else RevokeResponse
        trusted = grpc.ssl_channel_credentials(self.app.ca.encode())
        with grpc.secure_channel(f"127.0.0.1:{self.port}", trusted) as channel:
            line = channel.unary_unary(f"/{SERVICE}/{method}", type(asked).SerializeToString, answer.FromString)
            return line(asked, timeout=20, metadata=metadata)

    def status(self, method: str, asked: Any, metadata: tuple[tuple[str, str], ...] = ()) -> tuple[str, str]:
        try:
            self.call(method, asked, metadata)
        except grpc.RpcError as error:
            told: Any = error
            return told.code().name, told.details()
        return "OK", ""

    def asked(self, token: str, key: ec.EllipticCurvePrivateKey | None = None, **changes: Any) -> EnrolRequest:
        key = key or ec.generate_private_key(ec.SECP384R1())
        fields = {
            "app_id": "films",
            "population": "default",
            "wire_version": 1,
            "token": token,
            "node_key": der(key),
            "proof": proofs.prove(key, proofs.enrol_message("films", "default", token)),
        }
        return EnrolRequest(**{**fields, **changes})


def der(key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = World(tmp_path_factory.mktemp("prod"), users=200)
    with made.served:
        yield made


def test_a_device_enrols_and_leaves_over_tls_and_hears_the_plan_as_it_was_signed(world: World) -> None:
    key = new_node_key()
    token = world.token()
    found = world.enrol(token, key)
    assert found.plan == (world.folder.path / "plan.json").read_text()
    assert world.enrol(token, key) == found
    assert world.roster.live()[found.place] in world.flower.live.values()
    _enrolment.revoke(world.app, key, deadline_s=30)
    assert found.place not in world.roster.live()
    _enrolment.revoke(world.app, key, deadline_s=30)
    with pytest.raises(UntrustedArtifact):
        world.enrol(world.token(), key)


def test_every_no_to_a_token_is_the_same_no(world: World) -> None:
    used, over, gone = world.token(), world.token(ttl_s=1), ec.generate_private_key(ec.SECP256R1())
    key = ec.generate_private_key(ec.SECP521R1())
    assert world.status("Enrol", world.asked(used, key))[0] == "OK"
    assert world.status("Enrol", world.asked(world.token(), gone))[0] == "OK"
    world.roster.revoke(der(gone))
    world.now_ms += 1000
    found = {
        world.status("Enrol", world.asked(token, by))
        for token, by in (("pt_" + "A" * 43, None), ("", None), (used, None), (over, None), (world.token(), gone))
    }
    assert {status for status, _ in found} == {"UNAUTHENTICATED"}
    assert len(found) == 1
    assert world.status("Enrol", world.asked(used, key))[0] == "OK"  # who used it up hears its place again


def refused() -> dict[str, tuple[dict[str, Any], str]]:
    other, edwards, odd = (
        ec.generate_private_key(ec.SECP384R1()),
        ed25519.Ed25519PrivateKey.generate(),
        ec.generate_private_key(ec.SECP256K1()),
    )
    message = proofs.enrol_message("films", "default", "t")
    compressed = ec.generate_private_key(ec.SECP256R1()).public_key()
    return {
        "proof by another key": ({"proof": proofs.prove(other, message)}, "UNAUTHENTICATED"),
        "no proof": ({"proof": b""}, "UNAUTHENTICATED"),
        "curve of another kind": ({"node_key": der(edwards)}, "INVALID_ARGUMENT"),
        "curve that Flower lacks": ({"node_key": der(odd), "proof": proofs.prove(odd, message)}, "INVALID_ARGUMENT"),
        "key in PEM": (
            {"node_key": compressed.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)},
            "INVALID_ARGUMENT",
        ),
        "no key": ({"node_key": b""}, "INVALID_ARGUMENT"),
        "long key": ({"node_key": b"k" * 257}, "INVALID_ARGUMENT"),
        "long proof": ({"proof": b"p" * 257}, "INVALID_ARGUMENT"),
        "long token": ({"token": "t" * 257}, "INVALID_ARGUMENT"),
        "oversized": ({"proof": b"p" * (MAX_REQUEST + 1)}, "RESOURCE_EXHAUSTED"),
        "foreign app": ({"app_id": "books"}, "NOT_FOUND"),
        "foreign population": ({"population": "readers"}, "NOT_FOUND"),
        "version 0": ({"wire_version": 0}, "FAILED_PRECONDITION"),
        "version 2": ({"wire_version": 2}, "FAILED_PRECONDITION"),
    }


@pytest.mark.parametrize(("changes", "expected"), refused().values(), ids=refused().keys())
def test_what_is_no_enrolment_is_refused_and_uses_no_token_up(
    world: World, changes: dict[str, Any], expected: str
) -> None:
    before = world.roster.funnel()
    token = world.token()
    assert world.status("Enrol", world.asked(**{"token": token, **changes}))[0] == expected
    after = world.roster.funnel()
    assert (after.taken, after.uses) == (before.taken, before.uses + 1)


def test_a_proof_for_one_token_is_none_for_another_and_a_proof_to_enrol_is_none_to_leave(world: World) -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    seen = world.asked(world.token(), key)
    assert world.status("Enrol", world.asked(world.token(), key, proof=seen.proof))[0] == "UNAUTHENTICATED"
    assert world.status("Enrol", seen)[0] == "OK"
    leave: dict[str, Any] = {"app_id": "films", "population": "default", "node_key": der(key)}
    assert world.status("Revoke", RevokeRequest(**leave, proof=seen.proof))[0] == "UNAUTHENTICATED"
    assert world.status("Revoke", RevokeRequest(**{**leave, "app_id": "books"}, proof=seen.proof))[0] == "NOT_FOUND"
    proof = proofs.prove(key, proofs.revoke_message("films", "default"))
    assert world.status("Revoke", RevokeRequest(**leave, proof=proof)) == ("OK", "")


def test_a_device_hears_each_no_as_a_type_of_ours(tmp_path: Path) -> None:
    made = World(tmp_path / "prod", users=1)
    with made.served:
        with pytest.raises(UntrustedArtifact, match="token"):
            made.enrol("unknown")
        with pytest.raises(NotServed):
            _enrolment.enrol(replace(made.app, app_id="books"), made.token(), new_node_key(), deadline_s=30)
        made.enrol(made.token())
        with pytest.raises(PrivacyRefused, match="room"):
            made.enrol(made.token())
        assert made.status("Enrol", made.asked(made.token())) == (
            "PERMISSION_DENIED",
            "the plan's roster of 1 is full",
        )


def test_flower_or_a_database_that_is_away_means_try_again_and_says_nothing_of_this_machine(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made, key = World(tmp_path / "prod"), new_node_key()
    token = made.token()
    with made.served:
        made.flower.away = True
        with pytest.raises(Unreachable):
            made.enrol(token, key)
        made.flower.away = False
        assert made.enrol(token, key).place == 0
        made.folder.database.rename(tmp_path / "away.db")
        with pytest.raises(Unreachable):
            made.enrol(token, key)
        status, words = made.status("Enrol", made.asked("t"))
        assert (status, words) == ("INTERNAL", "")
        assert "restore it from a backup" in caplog.text


def test_one_address_is_told_to_wait_and_another_is_not(tmp_path: Path) -> None:
    made = World(tmp_path / "prod", per_minute=3)
    with made.served:
        asked = made.asked("unknown")
        behind = (("x-real-ip", "198.51.100.1"),)
        assert [made.status("Enrol", asked, behind)[0] for _ in range(4)] == ["UNAUTHENTICATED"] * 3 + [
            "RESOURCE_EXHAUSTED"
        ]
        assert made.status("Revoke", RevokeRequest(), behind)[0] == "RESOURCE_EXHAUSTED"
        assert made.status("Enrol", asked, (("x-real-ip", "198.51.100.2"),))[0] == "UNAUTHENTICATED"
        for _ in range(3):
            with pytest.raises(UntrustedArtifact):
                made.enrol("unknown")
        with pytest.raises(Unreachable):  # which a device takes for: later
            made.enrol("unknown")


def test_what_server_toml_says_is_the_limit(tmp_path: Path) -> None:
    made = World(tmp_path / "prod", per_minute=None, toml="[enrolment]\nper_minute = 2\n")
    with made.served:
        found = [made.status("Revoke", RevokeRequest())[0] for _ in range(3)]  # sooner than one call more fills in
    assert found == ["NOT_FOUND", "NOT_FOUND", "RESOURCE_EXHAUSTED"]


def test_who_forgets_everything_and_enrols_again_under_the_same_name_has_no_new_participations(tmp_path: Path) -> None:
    plan = replace(
        a_plan(4),
        sums=(SumSpec(name="counts", rounds=6, clip_norm=1.0, noise_multiplier=2.0),),
        cohort=1,
        max_participations=2,
    )
    made = World(tmp_path / "prod", plan=plan)
    participations, took = np.zeros(4, np.int64), []

    def device(subject: str | None) -> int:
        me = Client.open(tmp_path / "state", bundle=made.folder.bundle, trust="server", now_ms=lambda: NOW)
        me.enrol(made.token(subject=subject))
        (place,) = made.roster.live()
        assert me.forget(everything=True).revoked
        assert made.roster.live() == {}
        return place

    with made.served:
        for round in range(1, 7):  # a new device for every round
            place = device("alice")
            if place in draw(plan, round, 0, participations, Streams(7)):
                took.append(place)
        assert took == [0, 0]
        assert participations[0] == 2
        assert device(None) == 1  # of one person nobody knows that it is the same one: m places cost m·μ
        assert device(None) == 2
    assert len(made.flower.burnt) == 8


# ------------------------------------------------------------------------------------------------------ minting


class Minting:
    def __init__(self, folder: Folder, **options: Any) -> None:
        self.folder, self.now_ms = folder, NOW
        self.bearer = {"authorization": f"Bearer {(folder.keys / 'admin.token').read_text()}"}
        self.http = httpx.ASGITransport(Starlette(routes=[mint_route(folder, self.open, **options)]))

    def open(self) -> Database:
        return Database(self.folder.database, now_ms=lambda: self.now_ms)

    def post(self, body: bytes | dict[str, Any], headers: dict[str, str] | None = None) -> tuple[int, dict[str, Any]]:
        sent = body if isinstance(body, bytes) else json.dumps(body).encode()

        async def asked() -> httpx.Response:
            async with httpx.AsyncClient(transport=self.http, base_url="http://operator") as http:
                return await http.post("/v1/tokens", content=sent, headers=self.bearer if headers is None else headers)

        answer = asyncio.run(asked())
        assert answer.text.count("\n") == 1
        assert answer.headers["cache-control"] == "no-store"
        return answer.status_code, answer.json()


@pytest.fixture
def minting(tmp_path: Path) -> Minting:
    return Minting(an_operator(tmp_path / "prod", toml="[enrolment]\nper_minute = 5\n"))


def test_an_apps_backend_gets_tokens_and_the_log_says_nothing_of_whom_they_are_for(
    minting: Minting, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    status, made = minting.post({"subject": "user-4711", "ttl_s": 60, "uses": 2})
    assert (status, made["expires_ms"], set(made)) == (201, NOW + 60_000, {"token", "expires_ms"})
    roster = Roster.of(minting.folder, Flower(), open=minting.open)
    assert roster.enrol(made["token"], b"a") == 0
    status, made = minting.post({"subject": "user-4711"})
    assert (status, made["expires_ms"]) == (201, NOW + 86_400_000)
    assert roster.enrol(made["token"], b"b") == 0
    assert roster.enrol(minting.post({})[1]["token"], b"c") == 1
    assert "user-4711" not in caplog.text
    assert made["token"] not in caplog.text


def test_who_has_no_right_token_mints_nothing_and_may_not_try_for_long(minting: Minting) -> None:
    right = minting.bearer["authorization"]
    for wrong in ("", "Bearer", "Bearer ", right[:-1], right + "x", right.removeprefix("Bearer "), "Bearer \x7f"):
        status, told = minting.post({}, {"authorization": wrong} if wrong else {})
        assert (status, told["status"]) in ((401, 401), (429, 429))
    assert minting.post({}, {})[0] == 429
    assert minting.post({})[0] == 201  # who has it is not kept out by others
    assert Roster.of(minting.folder, NotRunning()).funnel().tokens == 0  # all over by the real clock
    with minting.open() as db:
        assert len(db.rows("SELECT * FROM tokens")) == 1


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"", 400),
        (b"[]", 400),
        (b"\xff", 400),
        (b'{"ttl_s": 60, "ttl_s": 61}', 400),
        (b'{"ttl_s": NaN}', 400),
        ({"ttl_s": 0}, 400),
        ({"ttl_s": "60"}, 400),
        ({"uses": 0}, 400),
        ({"uses": [1]}, 400),
        ({"subject": ""}, 400),
        ({"subject": {"name": "x"}}, 400),
        ({"sub": "x"}, 400),
        ({"subject": "x" * MAX_BODY}, 413),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_no_request_for_a_token_is_one_line(minting: Minting, body: Any, expected: int) -> None:
    status, told = minting.post(body)
    assert (status, told["status"]) == (expected, expected)
    assert told["title"]
    with minting.open() as db:
        assert db.rows("SELECT * FROM tokens") == []


def test_a_backend_that_runs_wild_and_a_database_that_is_away_are_told_apart(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    minting = Minting(an_operator(tmp_path / "prod"), per_minute=2)
    assert minting.post({})[0] == 201
    minting.folder.database.rename(tmp_path / "away.db")
    status, told = minting.post({"subject": "user-4711"})
    assert status == 503
    assert str(tmp_path) not in told["title"]
    assert "restore it from a backup" in caplog.text
    assert minting.post({})[0] == 429


def test_a_short_admin_token_is_refused(minting: Minting) -> None:
    (minting.folder.keys / "admin.token").write_text("secret\n")
    with pytest.raises(InvalidConfig, match=r"admin\.token"):
        mint_route(minting.folder, minting.open)


# ------------------------------------------------------------------------------------------------- command line


def test_the_command_prints_a_token_and_nothing_else_on_stdout(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, flower = an_operator(tmp_path / "prod"), Flower()
    roster = Roster.of(folder, flower)
    assert run(enrol, "token", str(folder.path), "--ttl", "15m", "--uses", "2") == 0
    out, err = capsys.readouterr()
    assert err == "it is taken 2 times within 15m, and shown only here\n"
    assert [roster.enrol(out.strip(), key) for key in (b"a", b"b")] == [0, 1]
    for key in (b"c", b"d"):
        monkeypatch.setattr("sys.stdin", io.StringIO("user-4711\n"))
        assert run(enrol, "token", str(folder.path), "--subject-stdin") == 0
        out, err = capsys.readouterr()
        assert "user-4711" not in out + err
        assert "once within 24h" in err
        assert roster.enrol(out.strip(), key) == 2
    monkeypatch.chdir(folder.path)
    assert run(enrol, "token") == 0


def test_the_command_counts_and_takes_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, flower = an_operator(tmp_path / "prod"), Flower()
    roster = Roster.of(folder, flower)
    for key in (b"a", b"b"):
        roster.enrol(roster.mint(ttl_s=HOUR).text, key)
    roster.mint(ttl_s=HOUR, uses=5)
    assert run(command(lambda _: flower), "revoke", str(folder.path), "--place", "0") == 0
    assert "Flower took the node out" in capsys.readouterr().err
    assert flower.live.keys() == {b"b"}
    assert run(enrol, "revoke", str(folder.path), "--place", "1") == 0
    assert "when it starts" in capsys.readouterr().err
    assert flower.live.keys() == {b"b"}
    assert roster.reconcile() == Reconciled(0, 1)
    assert run(enrol, "ls", str(folder.path)) == 0
    assert capsys.readouterr().out == (
        "places   2 of 3 taken, 1 free\ndevices  0 enrolled, 2 revoked\ntokens   1 open, for 5 devices\n"
    )
    assert run(enrol, "ls", str(folder.path), "--json") == 0
    assert json.loads(capsys.readouterr().out) == {
        "places": 3,
        "taken": 2,
        "live": 0,
        "unregistered": 0,
        "tokens": 1,
        "uses": 5,
        "revoked": 2,
        "free": 1,
    }


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (("token", "{}", "--ttl", "1 day"), "such as 24h"),
        (("token", "{}", "--ttl", "0h"), "such as 24h"),
        (("token", "{}", "--ttl", "400d"), "366 days"),
        (("token", "{}", "--uses", "0"), "uses"),
        (("token", "{}", "--subject-stdin"), "stdin held no subject"),
        (("revoke", "{}", "--place", "0"), "nobody is on place 0"),
        (("ls", "{}/keys"), "penchant serve init"),
    ],
    ids=str,
)
def test_a_mistake_on_the_command_line_is_one_line_and_exit_code_2(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    argv: tuple[str, ...],
    word: str,
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    folder = an_operator(tmp_path / "prod")
    assert run(enrol, *(part.format(folder.path) for part in argv)) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert word in err


@pytest.mark.parametrize("text", ["", "24", "h", "-1h", "1.5h", "24H", "1w", "١h", "1h ", "0s"])
def test_a_duration_is_a_whole_number_and_a_unit(text: str) -> None:
    assert seconds("36h") == seconds("2160m") == 129_600
    with pytest.raises(InvalidConfig, match="duration"):
        seconds(text)
