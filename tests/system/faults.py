"""Every fault that a server must live through: what happens, what must hold, and what was seen when it happened.

A fault is a function of a site (`site.py`) that makes it happen, checks what is its own, and says what it saw, in
figures. After each, `Site.sound` checks the invariants that hold whatever happens. test_faults.py runs the quick ones,
scripts/reliability.py all of them, and writes docs/reliability.md.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import shutil
import signal
import socket
import sqlite3
import ssl
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.oid import NameOID

from penchant.client._conditions import Refusal
from penchant.client._distribution import fetch_offer
from penchant.client._enrolment import enrol, revoke
from penchant.client._transport import new_node_key
from penchant.common.artifacts.bundle import App
from penchant.common.artifacts.manifest import Offer
from penchant.common.artifacts.manifest import Seen as Remembered
from penchant.common.artifacts.signing import Certificate, Envelope, SigningKey
from penchant.common.errors import PenchantError, UntrustedArtifact
from penchant.common.privacy.ledger import Ledger
from penchant.server import keys
from penchant.server._flower import Control
from penchant.server.database import Database
from tests.certificates import tls
from tests.system.fault_app import FULL
from tests.system.hostile import REPLIES, Answer, Hostile
from tests.system.production import within
from tests.system.site import N_PHONES, Site


@dataclass(frozen=True)
class Fault:
    """
    Attributes:
        group, name: what happens.
        must: what must hold, beside the invariants.
        happen: makes it happen, and says what it saw.
        quick: whether `make test` has it.
        whole: whether it is followed by the invariants that need the rounds to pause.
    """

    group: str
    name: str
    must: str
    happen: Callable[[Site], str]
    quick: bool = False
    whole: bool = True


@dataclass(frozen=True)
class Seen:
    """
    Attributes:
        observed: what was seen, or which invariant failed.
    """

    fault: Fault
    holds: bool
    observed: str
    figures: str
    seconds: float


def seen(site: Site, fault: Fault) -> Seen:
    """Has a fault happen, and checks everything."""
    began = time.monotonic()
    holds, observed, figures = True, "", ""
    try:
        observed = fault.happen(site)
        figures = site.sound(whole=fault.whole)
    except Exception as error:  # a failed invariant, whichever way it shows
        holds, observed = False, f"{observed} FAILED: {type(error).__name__}: {error}".strip()
        with contextlib.suppress(Exception):  # so that the next fault meets a server
            site.mend()
    return Seen(fault, holds, observed, figures, time.monotonic() - began)


# ------------------------------------------------------------------------------------------------------------ kills

VICTIMS = {
    "serverapp": "the ServerApp",
    "superlink": "the SuperLink",
    "superexec": "the SuperExec, and the ServerApp with it",
    "services": "the services",
    "proxy": "the proxy",
    "supervisor": "the supervisor",
    "everything": "every process",
}
MOMENTS = {
    "planned:after": "planned",
    "drawn:after": "drawn, nobody asked yet",
    "answering": "training, a device at work",
    "aggregating:after": "aggregating, every answer summed",
    "charged:after": "charged, nothing drawn yet",
    "released:before": "released into the ledger, no checkpoint yet",
    "released:saved": "the state is saved, no checkpoint yet",
    "released:after": "the checkpoint is written, no model yet",
}
QUICK = {("answering", "superlink"), ("charged:after", "serverapp"), ("released:saved", "everything")}


def kills() -> Iterator[Fault]:
    must = "the round that was under way is released, and once only; its model reaches devices"
    for moment, words in MOMENTS.items():
        for victim, whom in VICTIMS.items():
            yield Fault(
                "kill -9",
                f"{whom}: {words}",
                must,
                lambda site, moment=moment, victim=victim: killed(site, moment, victim),  # type: ignore[misc]  # a default
                quick=(moment, victim) in QUICK,
                whole=victim == "everything",  # the last of a moment, and once for all of it
            )


def killed(site: Site, moment: str, victim: str) -> str:
    """One kill, and how the round that it met went on."""
    site.await_round(site.done() + 1)  # the one before is over
    if moment == "answering":
        site.during = lambda: _kill(site, victim)
        within(90, "a device computes", lambda: site.during is None)
    else:
        site.arm(moment, victim)
        within(90, f"a round comes to {moment}", site.fired)
    began, number = time.monotonic(), site.newest()["round"]
    if victim in ("supervisor", "everything"):
        site.up()  # what systemd does
    site.await_round(number)
    seconds = time.monotonic() - began
    within(90, "devices have its model", lambda: site.reader.sync(deadline_s=10.0).version >= 1 + number)
    model = time.monotonic() - began
    tries = site.of_round(number)
    ends = [one["why"] or one["phase"] for one in tries]
    assert ends.count("released") == 1, ends
    return f"tries: {', '.join(ends)}; released after {seconds:.0f} s, its model on a device after {model:.0f} s"


def _kill(site: Site, victim: str) -> None:
    if victim in ("serverapp", "everything") and (pid := site.server_app()):
        os.kill(pid, signal.SIGKILL)
    for part in ("supervisor", "superexec", "superlink", "services", "proxy"):
        if victim in (part, "everything"):
            site.kill(part)


# -------------------------------------------------------------------------------------------------------- full disk


def full_disks() -> Iterator[Fault]:
    told = {
        "aggregating:after": ("at the charge", "nothing is released without its charge; the round is tried again"),
        "charged:after": ("at the ledger's entry of the release", "nothing is released; it is charged anew"),
        "released:before": ("at the checkpoint", "nothing counts as released; it is charged anew"),
        "released:after": ("at publishing", "the checkpoint stands, and its model is published later"),
    }
    for moment, (words, must) in told.items():
        yield Fault(
            "disk",
            f"full, {words} (RLIMIT_FSIZE: each write of the ServerApp's process fails from then on)",
            must,
            lambda site, moment=moment: killed(site, moment, FULL),  # type: ignore[misc]  # a default
            moment == "aggregating:after",
        )


def locked(site: Site, seconds: float = 15.0) -> str:
    """Another process holds server.db's write lock for longer than anybody waits for it."""
    before, errors = site.done(), _errors(site)
    held = sqlite3.connect(site.folder.database, isolation_level=None)
    held.execute("BEGIN IMMEDIATE")
    time.sleep(seconds)
    held.execute("ROLLBACK")
    held.close()
    began = time.monotonic()
    site.await_round(max(before + 1, site.done() + 1))
    more = ", ".join(f"{n} × {name}" for name, n in (_errors(site) - errors).items()) or "none"
    return f"ServerApp's runs that ended by it: {more}; a round is released {time.monotonic() - began:.0f} s after"


def locks() -> Iterator[Fault]:
    yield Fault("disk", "server.db locked for 15 s by another process", "rounds go on afterwards", locked)


# ----------------------------------------------------------------------------------------------------------- clocks

DAY_MS = 86_400_000


def server_ahead(site: Site) -> str:
    """The ServerApp's clock a day ahead for a round, and right again."""
    with _clock(site, DAY_MS):
        site.next_rounds(2)  # so that the first of them is offered
        ahead = site.reader.sync(deadline_s=10.0)
    site.next_rounds(2)
    within(60, "devices have the newest model", site.reader_is_current)
    return f"meanwhile a device's look for a model: {ahead.release} (“{ahead.why}”); after the next release it has it"


def server_behind(site: Site) -> str:
    with _clock(site, -DAY_MS):
        site.next_rounds(2)
        within(60, "devices have the newest model", site.reader_is_current)
    site.next_rounds(1)
    return "rounds and models go on meanwhile and afterwards"


@contextlib.contextmanager
def _clock(site: Site, ahead_ms: int) -> Iterator[None]:
    place = site.path / "clock"
    place.write_text(str(ahead_ms))
    try:
        yield
    finally:
        place.unlink()


def device_clock(ahead_ms: int) -> Callable[[Site], str]:
    def happen(site: Site) -> str:
        phone = site.phones[0]
        since = len(phone.outcomes)
        phone.clock.ahead_ms = ahead_ms
        try:
            numbers = [site.done() + 1, site.done() + 2]
            site.await_round(numbers[-1])
        finally:
            phone.clock.ahead_ms = 0
        last = site.of_round(numbers[-1])[-1]
        why = dict(phone.refusals(since))
        assert last["answered"] >= 2
        site.next_rounds(2)
        within(60, "it takes part again", lambda: phone.outcomes[-1].took_part or phone.outcomes[-2].took_part)
        return f"it {'refuses: ' + ', '.join(why) if why else 'takes part'}; {last['answered']} answers in the round"

    return happen


def flower_clock(site: Site) -> str:
    """Flower refuses a signature whose time is more than 5 minutes off."""
    from flwr.supernode import node_auth_http_interceptor

    signed: Any = node_auth_http_interceptor
    right = signed.now
    since = [len(one.outcomes) for one in site.phones]
    signed.now = lambda: right() + datetime.timedelta(minutes=10)
    try:
        within(60, "devices are refused", lambda: all(_heard(site, since, Refusal.NOT_ENROLLED)))
    finally:
        signed.now = right
    began = time.monotonic()
    site.next_rounds(2)
    return (
        f"every device hears that it is not taken, and takes part again; 2 rounds in {time.monotonic() - began:.0f} s"
    )


def _heard(site: Site, since: Sequence[int], why: Refusal) -> list[bool]:
    return [one.refusals(n)[str(why)] > 0 for one, n in zip(site.phones, since, strict=True)]


def clocks() -> Iterator[Fault]:
    yield Fault(
        "clocks",
        "the server's jumps ahead by a day, and back",
        "rounds go on; devices have the newest model once it is right",
        server_ahead,
    )
    yield Fault("clocks", "the server's falls back by a day", "rounds and models go on", server_behind)
    yield Fault(
        "clocks", "a device's is a day ahead", "rounds go on; it takes part once it is right", device_clock(DAY_MS)
    )
    yield Fault(
        "clocks", "a device's is a day behind", "rounds go on; it takes part once it is right", device_clock(-DAY_MS)
    )
    yield Fault(
        "clocks",
        "all devices' signatures are 10 minutes off",
        "none is taken; all are once they are right",
        flower_clock,
    )


# ----------------------------------------------------------------------------------------------- certificates of TLS


def signed(
    site: Site, *, names: Sequence[str] = ("localhost",), starts_s: float = -3600, ends_s: float = 3600
) -> bytes:
    """A certificate for the edge's key by the folder's authority."""
    folder, now = site.folder, datetime.datetime.now(datetime.UTC)
    issuer = x509.load_pem_x509_certificate((folder.tls / "ca.crt").read_bytes())
    authority: Any = load_pem_private_key((folder.path / "offline" / "ca.key").read_bytes(), None)
    own: Any = load_pem_private_key((folder.keys / "server.key").read_bytes(), None)
    made = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "edge")]))
        .issuer_name(issuer.subject)
        .public_key(own.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + datetime.timedelta(seconds=starts_s))
        .not_valid_after(now + datetime.timedelta(seconds=ends_s))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name) for name in names]), False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.public_key()), False)  # type: ignore[arg-type]  # EC
        .sign(authority, hashes.SHA256())
    )
    from cryptography.hazmat.primitives.serialization import Encoding

    return made.public_bytes(Encoding.PEM)


SHUT = {"releases": "Unreachable", "enrolment": "Unreachable", "rounds": "Unreachable"}
OPEN = {"releases": "open", "enrolment": "UntrustedArtifact", "rounds": "NotEnrolled"}
"""What a stranger with no token and an unknown key meets where the certificate is right."""


def edge(**how: Any) -> Callable[[Site], str]:
    def happen(site: Site) -> str:
        with site.edge_with(signed(site, **how)):
            assert (found := site.doors()) == SHUT, found
        return _open_again(site)

    return happen


def edge_of_another(site: Site) -> str:
    made = tls()
    with site.edge_with(made.chain, made.private_key):
        assert (found := site.doors()) == SHUT, found
    return _open_again(site)


def edge_runs_out(site: Site) -> str:
    with site.edge_with(signed(site, ends_s=12.0)):
        assert (found := site.doors()) == OPEN, found
        time.sleep(12.0)
        assert (found := site.doors()) == SHUT, found
    return "open while it is valid, and shut a second after; " + _open_again(site)


def _open_again(site: Site) -> str:
    assert (found := site.doors()) == OPEN, found
    return f"no connection at any of the 3 services; the next round {site.next_rounds():.0f} s after it was mended"


def certificates() -> Iterator[Fault]:
    must = "no device connects to anything; all go on once it is mended"
    yield Fault("TLS certificates", "expired", must, edge(starts_s=-7200, ends_s=-1), quick=True)
    yield Fault("TLS certificates", "not valid yet", must, edge(starts_s=3600, ends_s=7200))
    yield Fault("TLS certificates", "of another name", must, edge(names=("elsewhere.example",)))
    yield Fault("TLS certificates", "by another authority", must, edge_of_another)
    yield Fault("TLS certificates", "one that runs out while the server is up", must, edge_runs_out)


# --------------------------------------------------------------------------------------------------- release keys


def _root(site: Site) -> SigningKey:
    return keys.read_signing_key((site.path / "offline" / "root.key").read_bytes())


def _certificate(site: Site, root: SigningKey, **changed: Any) -> bytes:
    found = Certificate.read(Envelope.from_bytes(site.folder.certificate.read_bytes()), _root(site).public)
    return replace(found, **changed).signed(root).to_bytes()


@contextlib.contextmanager
def _files(site: Site, **data: bytes) -> Iterator[None]:
    """Other bytes in the folder's certificate or release key; the next ServerApp has them."""
    places = {"certificate": site.folder.certificate, "key": site.folder.keys / "release.key"}
    before = {name: places[name].read_bytes() for name in data}

    def put(files: dict[str, bytes]) -> None:
        with site.paused():
            within(60, "the ServerApp ends", lambda: not site.server_app())
            for name, content in files.items():
                places[name].write_bytes(content)

    put(data)
    try:
        yield
    finally:
        put(before)


def refused_by_all(site: Site, **data: bytes) -> str:
    """Devices refuse to answer a server with this certificate, before they compute anything."""
    charged, number = _charges(site), site.done() + 1
    taken = [one.ledger.participations(0) for one in site.phones]
    with _files(site, **data):
        number = site.done() + 1
        charged, taken = _charges(site), [one.ledger.participations(0) for one in site.phones]
        since = [len(one.outcomes) for one in site.phones]
        within(90, "a round is abandoned", lambda: _abandoned(site, number))
        within(60, "every device says why", lambda: all(_heard(site, since, Refusal.UNTRUSTED_KEY)))
        assert site.done() == number - 1
        assert _charges(site) == charged
        assert [one.ledger.participations(0) for one in site.phones] == taken
    last = [one for one in site.of_round(number) if one["why"] == "too few answers"][-1]
    seconds = site.next_rounds()
    refused = sum(last["refused"].values())
    return f"{refused} devices refuse it, none computes, nothing is charged; the next round {seconds:.0f} s after"


def _abandoned(site: Site, number: int) -> bool:
    return any(one["why"] == "too few answers" for one in site.of_round(number))


def _charges(site: Site) -> int:
    with Ledger.open(site.folder.ledger) as ledger:
        return sum(entry.kind == "charge" for entry in ledger.entries)


def expired_key(site: Site) -> str:
    over = {"not_before_ms": _now_ms() - 2 * DAY_MS, "not_after_ms": _now_ms() - DAY_MS}
    return refused_by_all(site, certificate=_certificate(site, _root(site), **over))


def unknown_key(site: Site) -> str:
    """The server itself refuses to run with a release key that its root does not vouch for."""
    with _files(site, certificate=_certificate(site, SigningKey.generate())):
        before = site.tries()
        errors = _errors(site)
        within(
            90,
            "the ServerApp ends by an error",
            lambda: _errors(site)["UntrustedArtifact"] > errors["UntrustedArtifact"],
        )
        assert site.tries() == before
    return f"the ServerApp does not start a round; the next one {site.next_rounds():.0f} s after"


def _errors(site: Site) -> Counter[str]:
    """Types of the errors by which the ServerApp's runs ended."""
    lines = (site.path / "logs" / "rounds.jsonl").read_text().splitlines()
    return Counter(json.loads(line).get("error", "") for line in lines if '"error"' in line)


def rotated_key(site: Site) -> str:
    """`penchant keys rotate` beside rounds under way; then the old key again, as a thief would."""
    old = {"certificate": site.folder.certificate.read_bytes(), "key": (site.folder.keys / "release.key").read_bytes()}
    site.penchant("keys", "rotate", str(site.path), "--root", str(site.path / "offline" / "root.key"))
    seconds = site.next_rounds(3)
    within(90, "devices have the newest model", site.reader_is_current)
    within(30, "devices know the new key", lambda: all(one.part.serial >= 2 for one in site.phones))
    again = refused_by_all(site, **old)
    return f"3 rounds in {seconds:.0f} s, ε and models go on; of the old key, put back: {again}"


def another_app(site: Site) -> str:
    """A device with another app's root key, on this server."""
    app = replace(site.app, root=SigningKey.generate().public)
    offer = fetch_offer(app, deadline_s=10.0)
    try:
        offer.check(
            app.root,
            app_id=app.app_id,
            population=app.population,
            channel=app.channel,
            now_ms=_now_ms(),
            seen=Remembered(),
        )
        raise AssertionError("another app's release was taken")
    except UntrustedArtifact:
        pass
    phone = site.phone(token=site.token(subject="another app"), app=app)
    try:
        outcome = phone.part.once(40.0)
        assert outcome.refusal is Refusal.UNTRUSTED_KEY, outcome
        assert not phone.sent
    finally:
        revoke(app, phone.key, deadline_s=20.0)
    return "it takes no release, and answers no round"


def release_keys() -> Iterator[Fault]:
    yield Fault("release keys", "the certificate is over", "no device computes; nothing is charged", expired_key)
    yield Fault("release keys", "one that the root key does not vouch for", "no round begins", unknown_key)
    yield Fault(
        "release keys", "rotated, and the old one put back", "all follow the new one, none the old", rotated_key
    )
    yield Fault("release keys", "a device of another app's root", "it takes nothing and answers nothing", another_app)


# --------------------------------------------------------------------------------------------------------- enrolment


def tokens(site: Site) -> str:
    token, key, subject = site.token(subject="tokens"), new_node_key(), "tokens"
    first = enrol(site.app, token, key, deadline_s=20.0)
    again = enrol(site.app, token, key, deadline_s=20.0)
    assert first.place == again.place
    over = site.token(subject=subject, ttl_s=0.2)
    time.sleep(0.5)
    cases = {"used up": token, "expired": over, "made up": "pt_" + "x" * 43}
    for name, one in cases.items():
        assert _not_let_in(site.app, one, new_node_key()), name
    revoke(site.app, key, deadline_s=20.0)
    return "the same device with the same token has its place again; used up, expired and made up: refused alike"


def _not_let_in(app: App, token: str, key: bytes) -> bool:
    try:
        enrol(app, token, key, deadline_s=20.0)
    except UntrustedArtifact:
        return True
    return False


def revoked(site: Site) -> str:
    phone = site.phone(token=site.token(subject="revoked"))
    assert phone.part.once(40.0).took_part
    revoke(site.app, phone.key, deadline_s=20.0)
    outcome = phone.part.once(10.0)
    assert outcome.refusal is Refusal.NOT_ENROLLED, outcome
    assert _not_let_in(site.app, site.token(subject="revoked"), phone.key)
    anew = site.phone(token=site.token(subject="revoked"))
    assert anew.place == phone.place
    within(60, "it takes part", lambda: anew.part.once(20.0).took_part)
    revoke(site.app, anew.key, deadline_s=20.0)
    return "its key is refused for ever; with a new one the same person has the same place, and takes part"


def enrolments() -> Iterator[Fault]:
    yield Fault("enrolment", "tokens replayed, used up, expired, made up", "one place for one use", tokens, quick=True)
    yield Fault("enrolment", "a revoked device that comes back", "only by a new enrolment, on the same place", revoked)


# ----------------------------------------------------------------------------------------------- hostile devices

_HOSTILE: dict[int, Hostile] = {}


def hostile(site: Site) -> Hostile:
    """The site's one, enrolled the first time it is wanted; `let_go` takes it out."""
    if id(site) not in _HOSTILE:
        _HOSTILE[id(site)] = Hostile(site)
    return _HOSTILE[id(site)]


def let_go(site: Site) -> None:
    if (one := _HOSTILE.pop(id(site), None)) is not None:
        one.close()


def wrong_reply(name: str) -> Callable[[Site], str]:
    way, why = REPLIES[name]

    def happen(site: Site) -> str:
        them = hostile(site)
        try:
            first = them.asked()
            them.send(first.task, first.honest())
            second = replace(them.asked(), before=first.order)
            them.send(second.task, way(second))
            order = second.order
            site.await_round(order.round)
        finally:
            let_go(site)
        found = next(one for one in site.of_round(order.round) if one["attempt"] == order.attempt)
        assert found["refused"].get(why) == 1, found
        assert 2 <= found["answered"] <= N_PHONES, found
        return f"counted as {why!r}; the round is released with the {found['answered']} others"

    return happen


def twice(site: Site) -> str:
    them = hostile(site)
    try:
        answer = them.asked()
        them.send(answer.task, answer.honest())
        second = _said(them, answer)
        site.await_round(answer.order.round)
    finally:
        let_go(site)
    found = site.of_round(answer.order.round)[-1]
    assert found["answered"] <= N_PHONES + 1, found
    return f"the second {second}; {found['answered']} answers count"


def _said(them: Hostile, answer: Answer) -> str:
    """What the SuperLink says to one more reply."""
    try:
        them.send(answer.task, answer.honest())
        return "is taken in by the SuperLink, and read by nobody"
    except PenchantError as error:
        return f"is refused by the SuperLink ({type(error).__name__})"


def silent(site: Site) -> str:
    """A node that takes an order and says nothing until the round is over."""
    them = hostile(site)
    try:
        answer = them.asked()
        began = time.monotonic()
        site.await_round(answer.order.round)
        seconds = time.monotonic() - began
        late = _said(them, answer)
        site.next_rounds()
    finally:
        let_go(site)
    found = site.of_round(answer.order.round)[-1]
    return f"released {seconds:.0f} s after its order with {found['answered']} answers; its late reply {late}"


def early(site: Site) -> str:
    """A node that confirms an order before its objects are there, which takes them from under the ServerApp."""
    them, said = hostile(site), Counter[str]()
    try:
        for _ in range(3):
            task = them.task(poll_s=0.01)
            with contextlib.suppress(Exception):
                them.confirm(task)
            number = site.newest()["round"]
            site.await_round(number)
            said.update(site.of_round(number)[-1]["refused"] or {"no answer": 1})
    finally:
        let_go(site)
    return "3 rounds, all released with the others; it counts as " + ", ".join(
        f"{why} ({n})" for why, n in said.items()
    )


def half(site: Site) -> str:
    """A node whose answer is announced, and never whole: Flower waits for such up to two hours."""
    them = hostile(site)
    try:
        answer = them.asked()
        began = time.monotonic()
        them.half(answer.task, answer.honest())
        site.await_round(answer.order.round)
        seconds = time.monotonic() - began
    finally:
        let_go(site)
    found = site.of_round(answer.order.round)[-1]
    assert found["answered"] == N_PHONES, found
    assert found["refused"] == {"lost": 1}, found
    return f"released after {seconds:.0f} s with the {N_PHONES} others; it counts as lost"


def garbage(site: Site) -> str:
    them, statuses = hostile(site), Counter[int]()
    try:
        for name in ("pull-messages", "push-messages", "push-object", "activate-node", "get-run", "pull-object"):
            for size in (1, 4096, 1 << 20):
                statuses[them.garbage(f"/v1/fleet/{name}", size)] += 1
    finally:
        let_go(site)
    assert not any(status < 400 for status in statuses), statuses
    seconds = site.next_rounds()
    told = ", ".join(f"{n} × {status}" for status, n in sorted(statuses.items()))
    return f"{told}; the next round {seconds:.0f} s after"


def slow(site: Site, n: int = 200) -> str:
    """Lines that send a byte a second of a request's header."""
    context = ssl.create_default_context(cadata=site.app.ca)
    lines: list[ssl.SSLSocket] = []
    try:
        for _ in range(n):
            plain = socket.create_connection(("127.0.0.1", site.port), 20)
            lines.append(context.wrap_socket(plain, server_hostname="localhost"))
        for letter in b"POST /v1":
            for line in lines:
                line.send(bytes([letter]))
        began = time.monotonic()
        seconds = site.next_rounds(2)
        assert (found := site.doors()) == OPEN, found
        time.sleep(max(0.0, 33.0 - (time.monotonic() - began)))
        cut = sum(_cut(line) for line in lines)
    finally:
        for line in lines:
            line.close()
    assert cut == n, f"{n - cut} slow lines are still open"
    return f"{n} slow lines: 2 rounds meanwhile in {seconds:.0f} s, strangers are answered, all are cut after 30 s"


def _cut(line: ssl.SSLSocket) -> bool:
    line.settimeout(1.0)
    try:
        while data := line.recv(4096):
            del data
        return True
    except TimeoutError:
        return False
    except OSError:
        return True


def hostiles() -> Iterator[Fault]:
    must = "it is counted by its reason, and the round is released with the others"
    for name in REPLIES:
        yield Fault("replies over the wire", name, must, wrong_reply(name), quick=name == "NaN")
    yield Fault("replies over the wire", "twice", "it counts once", twice)
    yield Fault("replies over the wire", "none, and late", "the round ends at its deadline without it", silent)
    yield Fault(
        "hostile devices", "an order confirmed before all of it is there", "it spoils its own message alone", early
    )
    yield Fault("hostile devices", "an answer of which one piece never comes", "the others' answers count", half)
    yield Fault("hostile devices", "random bytes to the fleet's paths", "an error each, and rounds go on", garbage)
    yield Fault("hostile devices", "slow lines at the edge", "rounds go on, and the lines are cut", slow)


# -------------------------------------------------------------------------------------------------- back in time


def older_offer(site: Site) -> str:
    """An earlier pointer, and an earlier manifest under the newest pointer, from the server's own folder."""
    place = site.folder.distribution / "channels" / "stable.json"
    within(60, "a device has the newest model", site.reader_is_current)
    old = place.read_bytes()
    site.next_rounds()
    with site.paused():
        within(60, "a device has the newest model", site.reader_is_current)
        new, version, told = place.read_bytes(), site.reader_version(), []
        newest = Offer.from_bytes(new)
        mixed = replace(newest, manifest=Offer.from_bytes(old).manifest)
        try:
            for data in (old, mixed.to_bytes()):
                place.write_bytes(data)
                found = site.reader.sync(deadline_s=10.0)
                assert (found.release, site.reader_version()) == ("failed", version), found
                told.append(found.why)
        finally:
            place.write_bytes(new)
    return f"the device keeps version {version}: " + "; ".join(f"“{why}”" for why in told)


def older_ledger(site: Site) -> str:
    """A ledger that lacks charges of what was released, in place of the newest."""
    kept = site.home / "ledgers.old"
    with site.paused():
        pass
    with site.without():
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(site.path / "ledgers", kept)
    site.next_rounds(2)
    done, newest = site.done(), site.home / "ledgers.new"
    with site.without():
        done = site.done()
        shutil.rmtree(newest, ignore_errors=True)
        shutil.copytree(site.path / "ledgers", newest)
        _exchange(site.path / "ledgers", kept)
    within(120, "rounds are held", lambda: site.status()["wanted"] != "running")
    hold = site.status()["hold"]
    assert site.done() == done, "released under an older ledger"
    with site.without():
        _exchange(site.path / "ledgers", newest)
    site.penchant("round", "start", str(site.path))
    site.next_rounds()
    return f"held, nothing released: “{hold}”; with the newest ledger back rounds go on"


def older_database(rounds: int) -> Callable[[Site], str]:
    """A server.db of so many rounds ago with the newest ledger: a folder that was not restored as a whole."""

    def happen(site: Site) -> str:
        kept, newest = site.home / "db.old", site.home / "db.new"
        with site.paused():
            within(60, "the ServerApp ends", lambda: not site.server_app())
            with site.without():
                shutil.copy(site.folder.database, kept)
            began = site.done()
            site.arm("planned:before", "everything", done=began + rounds)
        within(150, "so many rounds are over", site.fired)
        charged, version = _charges(site), 1 + site.done()
        assert site.done() == began + rounds
        time.sleep(1.0)
        with Database(site.folder.database) as database:  # takes the log of the killed processes in
            database.rows("PRAGMA wal_checkpoint(TRUNCATE)")
        shutil.copy(site.folder.database, newest)
        _put(kept, site.folder.database)
        site.up()
        try:
            site.penchant("round", "start", str(site.path))
            within(240, "the server holds the rounds", lambda: site.status()["wanted"] != "running")
            hold, tried, more = site.status()["hold"], site.done() - began, _charges(site) - charged
            assert more >= tried, "released again without a charge of its own"
            assert site.reader.sync(deadline_s=10.0).version == version
        finally:
            site.down()
            _put(newest, site.folder.database)
            site.up()
        site.penchant("round", "start", str(site.path))
        site.next_rounds()
        why = _last_error(site)
        return (
            f"{tried} of {rounds} rounds were run again, under {more} more charges, and no model was made of them; "
            f"held: “{hold}”, the log says “{why}”; with the newest server.db back rounds go on"
        )

    return happen


def _put(data: Path, place: Path) -> None:
    for suffix in ("-wal", "-shm"):
        place.with_name(place.name + suffix).unlink(missing_ok=True)
    shutil.copy(data, place)


def _last_error(site: Site) -> str:
    lines = map(json.loads, (site.path / "logs" / "rounds.jsonl").read_text().splitlines())
    return [str(line["why"]) for line in lines if line["event"] == "rounds end by an error" and "why" in line][-1]


def _exchange(place: Path, by: Path) -> None:
    shutil.rmtree(place)
    shutil.copytree(by, place)


def downgrades() -> Iterator[Fault]:
    yield Fault(
        "back in time",
        "an earlier pointer, or manifest, offered again",
        "devices keep what they have",
        older_offer,
        True,
    )
    yield Fault("back in time", "an earlier ledger in the folder", "rounds are held; nothing is released", older_ledger)
    for rounds in (1, 3):
        yield Fault(
            "back in time",
            f"the server.db of {rounds} rounds ago in the folder"
            if rounds > 1
            else "the server.db of a round ago in the folder",
            "what is run again is charged again; no version has two models; the rounds are held",
            older_database(rounds),
        )


# ------------------------------------------------------------------------------------------------------ two at once


def two_supervisors(site: Site) -> str:
    done = site.penchant("serve", "up", str(site.path), "--detach", ok=False)
    assert done.returncode != 0
    said = (done.stdout + done.stderr).strip().splitlines()[-1].replace(str(site.home), "…")
    return f"exit code {done.returncode}, “{said}”; the next round {site.next_rounds():.0f} s after"


def two_apps(site: Site) -> str:
    """A second run submitted by hand, while one is under way."""
    within(60, "a ServerApp runs", site.server_app)
    address, ca = site.folder.settings.addresses.superlink, (site.folder.tls / "ca.crt").read_bytes()
    errors = _errors(site)
    with Control(address, ca) as control:
        run = control.start(site.path / "flower-app")
        within(90, "the second run ends", lambda: control.status(run) in ("failed", "completed", "stopped"))
        status = control.status(run)
    assert status == "failed", status
    assert _errors(site)["InvalidConfig"] > errors["InvalidConfig"]
    return f"it {status} at the lock; the next round {site.next_rounds():.0f} s after"


def doubles() -> Iterator[Fault]:
    yield Fault("two at once", "supervisors", "the second ends with a word why", two_supervisors, True)
    yield Fault("two at once", "ServerApps", "the second fails at the lock; the first goes on", two_apps)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def cap(site: Site) -> str:
    """A plan of 3 rounds, each device in all of them, and one try that is lost once the devices have answered."""
    small = Site(site.home / "small" / "prod", rounds=3)
    try:
        small.arm("charged:after", "serverapp")
        within(120, "a round is charged", small.fired)
        began = time.monotonic()
        within(
            300,
            "the third round is released or abandoned",
            lambda: small.done() == 3 or _abandoned(small, 3),
        )
        taken = sorted(one.ledger.participations(0) for one in small.phones)
        why = sorted({why for one in small.phones for why in one.refusals()})
        assert small.done() == 3, (
            f"{small.done()} of 3 rounds are released and the third is abandoned again and again: its devices were in "
            f"{', '.join(map(str, taken))} tries, which is their cap ({', '.join(why)})"
        )
        return f"all 3 rounds after {time.monotonic() - began:.0f} s; devices were in {taken} tries"
    finally:
        small.close()


def caps() -> Iterator[Fault]:
    yield Fault(
        "participation caps",
        "a try is lost after its devices answered, in a plan whose devices are in every round",
        "every round of the plan is released",
        cap,
    )


ALL: tuple[Fault, ...] = (
    *caps(),
    *doubles(),
    *downgrades(),
    *enrolments(),
    *hostiles(),
    *certificates(),
    *release_keys(),
    *clocks(),
    *full_disks(),
    *locks(),
    *kills(),
)
