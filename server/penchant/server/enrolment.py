"""The roster: who may take part, let in by a token, under a key of their own, in a place that is never another's.

    token   mint ──► SHA-256, expiry, uses, HMAC of a subject ──► used up by the transaction that takes the place
    place   the next of 0 … n_users − 1; a row stays when its profile goes, so that no place is ever another profile's
    key     on one place ──► revoked, and never taken again

A place is a profile: the rounds that it may be drawn for and the count of its participations are the place's. So who
enrols again under the same subject gets the same place and goes on where they were. Without a subject it is another
place, and a person with m places costs m·μ.

First the place is written down, then Flower is told, then Flower's number is written down, and then the device has its
answer. Flower never takes a key again that it took out once, so a key that it knows and we do not would be lost; in
this order a kill leaves at most a place without a number, and the device's next try or `reconcile` goes on from there.

No name of a person is kept: a subject is what the app's backend calls somebody, and is put through HMAC-SHA-256 with a
key of this server before anything else is done with it.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import json
import logging
import secrets
import sqlite3
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import grpc
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from penchant.common import config
from penchant.common.artifacts import enrolment as proofs
from penchant.common.artifacts.bundle import WIRE_VERSIONS
from penchant.common.artifacts.distribution_pb2 import EnrolRequest, EnrolResponse, RevokeRequest, RevokeResponse
from penchant.common.artifacts.signing import from_json
from penchant.common.errors import (
    InvalidConfig,
    MalformedArtifact,
    MalformedData,
    NotServed,
    PrivacyRefused,
    Unreachable,
    UntrustedArtifact,
)
from penchant.server.database import Database
from penchant.server.distribution import told
from penchant.server.folder import Folder, secret

log = logging.getLogger("penchant.server")
SERVICE = "penchant.v1.Enrolment"
MAX_TTL_S = 366 * 86_400.0
MAX_USES = 1 << 24
MAX_FIELD = 256
"""Bytes of a token, a key or a proof: a key on P-521 has 158, its proof 139."""
MAX_BODY = 4096
"""Bytes of a request for a token."""
ADDRESS = "x-real-ip"
"""Metadata in which the edge says who calls; it replaces what a caller sends under that name."""
_NO = "the token is unknown, over or used up, or the key was revoked or is another profile's: ask for a new token"


# ------------------------------------------------------------------------------------------------------ roster


class Registry(Protocol):
    """Flower's own list of nodes. Each call may be made again, and does no more then.

    Every method raises Unreachable where Flower does not answer.
    """

    def register(self, node_key: bytes, /) -> int:
        """The number of the node with this key (SubjectPublicKeyInfo in DER), registered now or earlier.

        Raises:
            UntrustedArtifact: a node with this key was taken out once, and Flower never takes it again.
        """
        ...

    def unregister(self, node_id: int, /) -> None:
        """Takes a node out, also where it is out already."""
        ...

    def nodes(self) -> Mapping[bytes, int]:
        """Number by key of the nodes that are registered now; those that were taken out are not among them."""
        ...


class NotRunning:
    """The registry of a server that is not up: what Flower must hear waits for `Roster.reconcile`."""

    def register(self, node_key: bytes, /) -> int:
        raise Unreachable("Flower is not running")

    def unregister(self, node_id: int, /) -> None:
        raise Unreachable("Flower is not running")

    def nodes(self) -> Mapping[bytes, int]:
        raise Unreachable("Flower is not running")


@dataclass(frozen=True, kw_only=True)
class Grant:
    """What a token is minted for.

    Attributes:
        ttl_s: how long it is taken.
        uses: how many devices it lets in.
        subject: what the app's backend calls one person, opaque to us: whose place it is. None for a new profile.
    """

    ttl_s: float = 86_400.0
    uses: int = 1
    subject: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if type(self.ttl_s) not in (int, float) or not 0 < self.ttl_s <= MAX_TTL_S:
            raise InvalidConfig(f"ttl_s must be seconds in (0, {MAX_TTL_S:.0f}]: at most 366 days")
        if type(self.uses) is not int or not 1 <= self.uses <= MAX_USES:
            raise InvalidConfig(f"uses must be a whole number from 1 to {MAX_USES}")
        if self.subject is not None and not (
            isinstance(self.subject, str) and self.subject.isprintable() and 1 <= len(self.subject) <= MAX_FIELD
        ):
            raise InvalidConfig(f"subject must be 1 to {MAX_FIELD} printable characters")


@dataclass(frozen=True)
class Token:
    """A token, which is nowhere else: what is kept of it is a hash."""

    text: str = field(repr=False)
    expires_ms: int


@dataclass(frozen=True, kw_only=True)
class Funnel:
    """How far enrolment is, in counts.

    Attributes:
        places: the plan's n_users.
        taken: places that were ever given; `live` of them have a device, and those of the others stay empty.
        unregistered: live places that Flower does not know of yet.
        tokens: that would be taken now, and the devices that they would let in.
    """

    places: int
    taken: int
    live: int
    unregistered: int
    tokens: int
    uses: int

    @property
    def revoked(self) -> int:
        return self.taken - self.live

    @property
    def free(self) -> int:
        return self.places - self.taken


@dataclass(frozen=True)
class Reconciled:
    """What `Roster.reconcile` did, in counts of nodes."""

    registered: int
    unregistered: int


class Roster:
    """Any number of threads and processes may use one folder's at once.

    Args:
        open: a new connection to the folder's database; its clock decides what is over.
        n_users: places that the plan has.
        subjects: the key that subjects are hashed with, 32 bytes.
        registry: Flower's.
    """

    def __init__(self, open: Callable[[], Database], *, n_users: int, subjects: bytes, registry: Registry) -> None:
        if len(subjects) < 32:
            raise InvalidConfig("keys/subjects.secret is shorter than 32 bytes: restore it from a backup")
        self._open, self._n_users, self._subjects, self._registry = open, n_users, subjects, registry

    @classmethod
    def of(cls, folder: Folder, registry: Registry, *, open: Callable[[], Database] | None = None) -> Roster:
        """A folder's."""
        return cls(
            open or (lambda: Database(folder.database)),
            n_users=folder.plan.n_users,
            subjects=secret(folder.keys / "subjects.secret"),
            registry=registry,
        )

    def mint(self, *, ttl_s: float, uses: int = 1, subject: str | None = None) -> Token:
        """A new token; those that are over are forgotten with the keys that used them.

        Raises:
            InvalidConfig: as `Grant` says.
        """
        grant, text = Grant(ttl_s=ttl_s, uses=uses, subject=subject), f"pt_{secrets.token_urlsafe(32)}"
        whose = None if subject is None else hmac.digest(self._subjects, subject.encode(), "sha256")
        with self._open() as db, db.transaction() as write:
            now = db.now_ms()
            expires = now + round(grant.ttl_s * 1000)
            write.execute("DELETE FROM uses WHERE hash IN (SELECT hash FROM tokens WHERE expires_ms <= ?)", (now,))
            write.execute("DELETE FROM tokens WHERE expires_ms <= ?", (now,))
            write.execute("INSERT INTO tokens VALUES (?, ?, ?, ?, ?)", (_hash(text), now, expires, grant.uses, whose))
        return Token(text, expires)

    def enrol(self, token: str, node_key: bytes) -> int:
        """The place of a key whose holder proved that they hold it (`check_proof`), registered with Flower.

        The same key with the same token gets its place again, and nothing more is used up.

        Raises:
            UntrustedArtifact: the token or the key is not taken. Why is not said.
            PrivacyRefused: every place of the plan's roster is or was somebody's.
            Unreachable: Flower does not answer. The place is kept; the same call later goes on.
        """
        with self._open() as db:
            with db.transaction() as write:
                place, known, replaced = self._take(write, _hash(token), node_key, db.now_ms())
            if replaced is not None:
                self._unregister(replaced)
            if not known:
                self._register(db, place, node_key)
        return place

    def revoke(self, node_key: bytes) -> bool:
        """Takes the device with this key out, for ever; one that is not in the roster is none to take out.

        Returns:
            Whether Flower knows it too; if not, `reconcile` tells it.
        """
        return self._leave("node_key", node_key)

    def revoke_place(self, place: int) -> bool:
        """As `revoke`, of whoever has the place.

        Raises:
            InvalidConfig: nobody has it.
        """
        with self._open() as db:
            if db.one("SELECT 1 FROM places WHERE place = ? AND left_ms IS NULL", place) is None:
                raise InvalidConfig(f"nobody is on place {place}: penchant enrol ls says how many are taken")
        return self._leave("place", place)

    def live(self) -> dict[int, int]:
        """Flower's number by place, of the devices that may be asked."""
        with self._open() as db:
            found = db.rows("SELECT place, node_id FROM places WHERE left_ms IS NULL AND node_id IS NOT NULL")
        return {row["place"]: _unsigned(row["node_id"]) for row in found}

    def funnel(self) -> Funnel:
        with self._open() as db:
            now = db.now_ms()
            (places,) = db.rows(
                "SELECT COUNT(*) AS taken, COUNT(*) FILTER (WHERE left_ms IS NULL) AS live, "
                "COUNT(*) FILTER (WHERE left_ms IS NULL AND node_id IS NULL) AS unregistered FROM places"
            )
            (tokens,) = db.rows(
                "SELECT COUNT(*) AS tokens, TOTAL(uses) AS uses FROM tokens WHERE uses > 0 AND expires_ms > ?", now
            )
        return Funnel(
            places=self._n_users,
            taken=places["taken"],
            live=places["live"],
            unregistered=places["unregistered"],
            tokens=tokens["tokens"],
            uses=int(tokens["uses"]),
        )

    def reconcile(self) -> Reconciled:
        """Makes Flower's nodes those of the live places. For the start, and after Flower was away.

        A node of no live place is taken out and its key revoked, since Flower would never take it again. A live place
        whose key Flower took out earlier is emptied: its device hears that it is not enrolled, and enrols anew.

        Raises:
            Unreachable: Flower does not answer; what was done stays done.
        """
        nodes = self._registry.nodes()  # before the places: whatever Flower knows was written down earlier
        with self._open() as db:
            rows = db.rows("SELECT place, node_key, node_id FROM places WHERE left_ms IS NULL")
            live = {row["node_key"]: row for row in rows}
            strange = {key: node for key, node in nodes.items() if key not in live}
            for key, node in strange.items():
                with db.transaction() as write:
                    write.execute("INSERT OR IGNORE INTO revoked VALUES (?, ?)", (key, db.now_ms()))
                self._registry.unregister(node)
            registered = 0
            for key, row in live.items():
                if row["node_id"] is not None and _unsigned(row["node_id"]) == nodes.get(key):
                    continue
                try:
                    self._register(db, row["place"], key, nodes.get(key))
                    registered += 1
                except UntrustedArtifact:
                    log.warning("a place was emptied: Flower no longer takes its key")
        return Reconciled(registered, len(strange))

    def _take(self, write: sqlite3.Connection, hash: str, node_key: bytes, now: int) -> tuple[int, bool, int | None]:
        """The key's place, whether Flower knows it, and the number of the node that it takes the place of.

        Everything is read before anything is decided, so that each no has taken the same way.
        """

        def one(query: str, *values: Any) -> Any:
            return write.execute(query, values).fetchone()

        token = one("SELECT uses, subject FROM tokens WHERE hash = ? AND expires_ms > ?", hash, now)
        used = one("SELECT 1 FROM uses WHERE hash = ? AND node_key = ?", hash, node_key)
        mine = one("SELECT place, subject, node_id FROM places WHERE node_key = ?", node_key)
        gone = one("SELECT 1 FROM revoked WHERE node_key = ?", node_key)
        subject = None if token is None else token["subject"]
        theirs = one("SELECT place, node_key, node_id FROM places WHERE subject = ?", subject)  # nothing is = NULL
        again = used is not None and mine is not None
        if token is None or gone is not None or not (again or token["uses"]):
            raise UntrustedArtifact(_NO)
        replaced = None
        if mine is not None:
            if not again and subject not in (None, mine["subject"]):
                if mine["subject"] is not None or theirs is not None:
                    raise UntrustedArtifact(_NO)
                write.execute("UPDATE places SET subject = ? WHERE place = ?", (subject, mine["place"]))
            place, known = mine["place"], mine["node_id"] is not None
        elif theirs is not None:
            place, known, replaced = theirs["place"], False, theirs["node_id"]
            write.execute("INSERT OR IGNORE INTO revoked VALUES (?, ?)", (theirs["node_key"], now))
            write.execute(
                "UPDATE places SET node_key = ?, node_id = NULL, since_ms = ?, left_ms = NULL WHERE place = ?",
                (node_key, now, place),
            )
        else:
            place, known = one("SELECT COALESCE(MAX(place) + 1, 0) FROM places")[0], False
            if place >= self._n_users:
                raise PrivacyRefused(f"the plan's roster of {self._n_users} is full")
            write.execute("INSERT INTO places VALUES (?, ?, NULL, ?, ?, NULL)", (place, node_key, subject, now))
        if not again:
            write.execute("UPDATE tokens SET uses = uses - 1 WHERE hash = ?", (hash,))
            write.execute("INSERT INTO uses VALUES (?, ?)", (hash, node_key))
        return place, known, None if replaced is None else _unsigned(replaced)

    def _register(self, db: Database, place: int, node_key: bytes, node: int | None = None) -> None:
        try:
            node = self._registry.register(node_key) if node is None else node
        except UntrustedArtifact:
            self._leave("node_key", node_key)
            raise
        with db.transaction() as write:
            kept = write.execute(
                "UPDATE places SET node_id = ? WHERE place = ? AND node_key = ? AND left_ms IS NULL",
                (_signed(node), place, node_key),
            ).rowcount
        if not kept:  # revoked, or another device's by now
            self._unregister(node)
            raise UntrustedArtifact(_NO)

    def _leave(self, column: str, value: bytes | int) -> bool:
        with self._open() as db:
            with db.transaction() as write:
                query = f"SELECT place, node_key, node_id FROM places WHERE {column} = ?"
                row = write.execute(query, (value,)).fetchone()
                if row is None:
                    return True
                now = db.now_ms()
                write.execute("INSERT OR IGNORE INTO revoked VALUES (?, ?)", (row["node_key"], now))
                write.execute("UPDATE places SET left_ms = COALESCE(left_ms, ?) WHERE place = ?", (now, row["place"]))
            if row["node_id"] is None:
                return True
            if not self._unregister(_unsigned(row["node_id"])):
                return False
            with db.transaction() as write:
                write.execute(
                    "UPDATE places SET node_id = NULL WHERE place = ? AND node_key = ?", (row["place"], row["node_key"])
                )
        return True

    def _unregister(self, node_id: int) -> bool:
        try:
            self._registry.unregister(node_id)
        except Unreachable:
            log.warning("Flower does not answer: a node that left the roster stays registered until it is reconciled")
            return False
        return True


def _hash(token: str) -> str:
    """What is kept of a token. Who looks one up by it learns nothing of another from how long that takes."""
    return hashlib.sha256(token.encode(errors="surrogatepass")).hexdigest()


def _signed(node_id: int) -> int:
    """Flower's numbers are of 64 bits, and SQLite's have a sign.

    >>> _signed(2**64 - 1), _unsigned(-1) == 2**64 - 1
    (-1, True)
    """
    return node_id - (1 << 64) if node_id >= 1 << 63 else node_id


def _unsigned(node_id: int) -> int:
    return node_id % (1 << 64)


# ----------------------------------------------------------------------------------------------------- limiter


class Limiter:
    """So many calls a minute for each address: a bucket that holds a minute's, and fills evenly.

    Whoever was away may make a minute's calls at once, so in any 60 s an address gets at most twice as many through.
    Of the addresses the latest `remembered` are kept. Who forces theirs out has come from as many others.

    Args:
        now_s: a clock that only goes forward.
    """

    def __init__(
        self, per_minute: int, *, remembered: int = 1 << 16, now_s: Callable[[], float] = time.monotonic
    ) -> None:
        self._size, self._remembered, self._now_s = float(per_minute), remembered, now_s
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()
        self._lock = threading.Lock()

    def allows(self, address: str) -> bool:
        """Whether one more call may be made now; if so, it is counted."""
        with self._lock:
            now = self._now_s()
            left, then = self._buckets.pop(address, (self._size, now))
            left = min(self._size, left + (now - then) * self._size / 60)
            allowed = left >= 1
            self._buckets[address] = (left - 1 if allowed else left, now)
            if len(self._buckets) > self._remembered:
                self._buckets.popitem(last=False)
        return allowed


def caller(peer: str, metadata: Mapping[str, str | bytes]) -> str:
    """Whom a call counts for: its address, or where the edge calls from this machine, the one that the edge names.

    Of IPv6 the first 64 bits, which is what one subscriber has at least.

    >>> caller("ipv4:203.0.113.9:4711", {"x-real-ip": "198.51.100.1"})
    '203.0.113.9'
    >>> caller("ipv4:127.0.0.1:4711", {"x-real-ip": "198.51.100.1"})
    '198.51.100.1'
    >>> caller("ipv6:%5B2001:db8::7%5D:4711", {})
    '2001:db8::'
    """
    host = peer.partition(":")[2].rpartition(":")[0].replace("%5B", "").replace("%5D", "").strip("[]")
    found = _address(host)
    if found is not None and found.is_loopback:
        found = _address(str(metadata.get(ADDRESS, ""))) or found
    if found is None:
        return ""
    return str(ipaddress.ip_network((found, 64), strict=False).network_address) if found.version == 6 else str(found)


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        found = ipaddress.ip_address(text)
    except ValueError:
        return None
    return (found.ipv4_mapped or found) if isinstance(found, ipaddress.IPv6Address) else found


# ----------------------------------------------------------------------------------------------------- service


def handlers(roster: Roster, folder: Folder, *, limiter: Limiter | None = None) -> grpc.GenericRpcHandler[Any, Any]:
    """The gRPC service `SERVICE`, for one app and population.

    Args:
        limiter: of calls by address; None for what server.toml says.
    """
    limiter = Limiter(folder.settings.enrolment.per_minute) if limiter is None else limiter
    served = _Enrolment(roster, folder, limiter)
    methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "Enrol": grpc.unary_unary_rpc_method_handler(
            served.enrol, EnrolRequest.FromString, EnrolResponse.SerializeToString
        ),
        "Revoke": grpc.unary_unary_rpc_method_handler(
            served.revoke, RevokeRequest.FromString, RevokeResponse.SerializeToString
        ),
    }
    return grpc.method_handlers_generic_handler(SERVICE, methods)


class _Enrolment:
    def __init__(self, roster: Roster, folder: Folder, limiter: Limiter) -> None:
        self._roster, self._limiter = roster, limiter
        self._who = (folder.settings.app_id, folder.settings.population)
        self._plan = (folder.path / "plan.json").read_text(encoding="utf-8")  # exactly: its digest is what was signed

    def enrol(self, asked: EnrolRequest, context: grpc.ServicerContext) -> EnrolResponse:
        def answer() -> EnrolResponse:
            if not WIRE_VERSIONS[0] <= asked.wire_version <= WIRE_VERSIONS[1]:
                raise MalformedArtifact(f"wire versions {WIRE_VERSIONS[0]} to {WIRE_VERSIONS[1]} are spoken here")
            self._check(asked, proofs.enrol_message(asked.app_id, asked.population, asked.token), asked.token)
            place = _ours(lambda: self._roster.enrol(asked.token, asked.node_key))
            return EnrolResponse(place=place, plan=self._plan)

        self._count(context)
        return told(SERVICE, answer, context)

    def revoke(self, asked: RevokeRequest, context: grpc.ServicerContext) -> RevokeResponse:
        def answer() -> RevokeResponse:
            self._check(asked, proofs.revoke_message(asked.app_id, asked.population))
            _ours(lambda: self._roster.revoke(asked.node_key))
            return RevokeResponse()

        self._count(context)
        return told(SERVICE, answer, context)

    def _count(self, context: grpc.ServicerContext) -> None:
        if not self._limiter.allows(caller(context.peer(), dict(context.invocation_metadata()))):
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many calls from this address; try again in a minute")

    def _check(self, asked: EnrolRequest | RevokeRequest, message: bytes, token: str = "") -> None:
        """
        Raises:
            InvalidConfig: a field that is too long, or a key that is none.
            NotServed: another app's or population's.
            UntrustedArtifact: the key's holder did not ask for this.
        """
        if max(len(token), len(asked.node_key), len(asked.proof)) > MAX_FIELD:
            raise InvalidConfig(f"a token, a node key and a proof have at most {MAX_FIELD} bytes")
        if (asked.app_id, asked.population) != self._who:
            raise NotServed("no such app or population")
        try:
            proofs.check_proof(asked.node_key, asked.proof, message)
        except MalformedArtifact as error:  # FAILED_PRECONDITION would tell of a wire version
            raise InvalidConfig(str(error)) from None


def _ours(answer: Callable[[], Any]) -> Any:
    """The answer; where the database fails that is the operator's to mend, and no fault of who asks."""
    try:
        return answer()
    except (InvalidConfig, MalformedData) as error:
        raise RuntimeError(str(error)) from None


# ------------------------------------------------------------------------------------------------------ minting


def mint_route(folder: Folder, open: Callable[[], Database], *, per_minute: int = 6000) -> Route:
    """POST /v1/tokens, by which an app's backend gets a token for one of its users.

        Authorization: Bearer (keys/admin.token)        {"ttl_s": 86400, "uses": 1, "subject": "…"}
        201 {"token": "pt_…", "expires_ms": 1700000000000}

    Any other answer is one line of JSON, {"status": …, "title": …}: 400, 401, 413, 429, or 503 where the database is
    the operator's to mend. Who has no right token may try as often as server.toml lets an address enrol.

    Args:
        open: a new connection to the folder's database.
        per_minute: tokens that are minted, of everybody together.
    """
    roster = Roster.of(folder, NotRunning(), open=open)
    admin = secret(folder.keys / "admin.token").strip()
    if len(admin) < 32:
        raise InvalidConfig("keys/admin.token is shorter than 32 characters: write a new one, as docs/operate.md says")
    strangers, minted = Limiter(folder.settings.enrolment.per_minute), Limiter(per_minute)

    async def mint(request: Request) -> Response:
        given = request.headers.get("authorization", "").encode("latin-1")
        if not hmac.compare_digest(given, b"Bearer " + admin):
            if not strangers.allows(request.client.host if request.client else ""):
                return _problem(429, "too many calls; try again in a minute")
            return _problem(401, "this needs Authorization: Bearer and the token in keys/admin.token")
        if not minted.allows(""):
            return _problem(429, f"more than {per_minute} tokens a minute; try again in a minute")
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > MAX_BODY:
                return _problem(413, f"a request has at most {MAX_BODY} bytes")
        try:
            asked = config.decode(Grant, from_json(body))
        except (MalformedArtifact, InvalidConfig) as error:
            return _problem(400, str(error))
        try:
            made = await run_in_threadpool(roster.mint, **config.encode(asked))
        except (InvalidConfig, MalformedData) as error:
            log.error("POST /v1/tokens: %s", error)
            return _problem(503, "no token can be made now; the server's log says why")
        return _json(201, {"token": made.text, "expires_ms": made.expires_ms})

    return Route("/v1/tokens", mint, methods=["POST"])


def _problem(status: int, title: str) -> Response:
    return _json(status, {"status": status, "title": title}, "application/problem+json")


def _json(status: int, record: dict[str, Any], kind: str = "application/json") -> Response:
    headers = {"cache-control": "no-store"}
    headers |= {"www-authenticate": "Bearer"} if status == 401 else {}
    headers |= {"retry-after": "60"} if status == 429 else {}
    return Response(json.dumps(record, ensure_ascii=False) + "\n", status, headers, kind)
