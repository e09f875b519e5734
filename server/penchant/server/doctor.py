"""Looks an operator's folder over: each check for itself, none of which raises or changes anything.

A line says OK, WARN (it works, and should not stay so) or MEND (it does not work, or is not safe), what was found, and
what to do about it. Nothing in a line is secret or of one person.
"""

from __future__ import annotations

import email.utils
import errno
import importlib.metadata
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, Self

from cryptography import x509
from cryptography.exceptions import InvalidSignature

from penchant.common.artifacts.bundle import Bundle
from penchant.common.artifacts.signing import SKEW_MS, Certificate, Envelope
from penchant.common.errors import BudgetExhausted, PenchantError
from penchant.common.privacy.ledger import Ledger
from penchant.server import keys, states, tls
from penchant.server.database import Database
from penchant.server.folder import Folder, secret

FLOWER = "1.41.0"
QUIET: Mapping[str, str] = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}
"""What a process of Flower's must have in its environment, so that it neither calls home nor installs anything."""
SOON_MS = 30 * keys.DAY_MS
OFF_MS = 30_000
"""How far this clock may be from another before it is worth a word; devices allow SKEW_MS."""
PARTS = {"edge": "proxy", "operator": "services", "superlink": "superlink", "services": "services"}
"""Which process listens at each of `Addresses`, by the name of its file in run/."""
BACKUP = "restore it from a backup"
Level = Literal["OK", "WARN", "MEND"]


@dataclass(frozen=True)
class Line:
    """What one check found.

    Attributes:
        fix: what to do; "" where nothing is.
    """

    name: str
    level: Level
    detail: str
    fix: str = ""

    @property
    def ok(self) -> bool:
        """Whether the server may run like this."""
        return self.level != "MEND"


@dataclass(frozen=True)
class Around:
    """The machine around a folder, so that a test can have another.

    Attributes:
        now_ms: UTC milliseconds.
        environment: of this process.
        home: of its user.
        date_ms: the time that a server at "host:port" says, by its certificates that a PEM text vouches for; None where
            none answers.
    """

    now_ms: int
    environment: Mapping[str, str]
    home: Path
    date_ms: Callable[[str, str], int | None]

    @classmethod
    def here(cls) -> Self:
        """This machine, now."""
        return cls(time.time_ns() // 1_000_000, os.environ, Path.home(), date_ms)


def check(path: Path, around: Around) -> list[Line]:
    """Every check, in the order in which to mend."""
    return [line for name, of in _CHECKS for line in _told(name, of, Looked(path.resolve(), around))]


Found = tuple[Level, str, str]


class Looked:
    """What checks look at; whatever of it cannot be had raises, and is then that check's line."""

    def __init__(self, path: Path, around: Around) -> None:
        self.path, self.around = path, around

    @cached_property
    def folder(self) -> Folder:
        return Folder(self.path)

    @cached_property
    def bundle(self) -> Bundle:
        return Bundle.read(self.path / "app.bundle")

    def certificate(self, name: str) -> x509.Certificate:
        return tls.read_certificate((self.path / "tls" / name).read_bytes())

    def running(self, part: str) -> bool:
        """Whether the process that run/PART.json speaks of is there."""
        return self.pid(part) is not None

    def pid(self, part: str) -> int | None:
        try:
            told = json.loads((self.path / "run" / f"{part}.json").read_text())
            pid = int(told["pid"])
            after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return pid if after_name[0] != "Z" and int(after_name[19]) == told.get("started") else None


def _told(name: str, of: Callable[[Looked], Iterator[Found]], looked: Looked) -> list[Line]:
    """What a check found, and where that is nothing wrong, that it is well."""
    found = list[Found]()
    try:
        found += of(looked)
    except PenchantError as error:
        found.append(("MEND", *_parted(str(error))))
    except OSError as error:
        found.append(("MEND", f"{error.filename or 'the disk'}: {error.strerror}", BACKUP))
    except Exception as error:  # one that is wrong must not hide the others
        found.append(("MEND", f"this check failed with {type(error).__name__}", "penchant --debug doctor says where"))
    wrong = [line for line in found if line[0] != "OK"]
    return [Line(name, *line) for line in wrong or found]


def _parted(text: str) -> tuple[str, str]:
    """An error's message as what is wrong and how to mend it, which ours end with."""
    for sign in ("; ", ": "):
        detail, found, fix = text.rpartition(sign)
        if found:
            return detail, fix
    return text, BACKUP


# ------------------------------------------------------------------------------------------------------ the checks


def _settings(looked: Looked) -> Iterator[Found]:
    plan, task = looked.folder.plan, looked.folder.task
    if plan.population != looked.folder.settings.population:
        yield "MEND", "plan.json is of another population than server.toml", "restore both from a backup"
        return
    yield "OK", f"{task.learner}, {plan.rounds} rounds of up to {plan.n_users:,} people", ""


def _server_certificate(looked: Looked) -> Iterator[Found]:
    renew = f"penchant keys renew-server {looked.path} --ca FILE"
    own, authority = looked.certificate("server.crt"), looked.certificate("ca.crt")
    try:
        own.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        yield "MEND", "tls/server.crt is not by the authority of tls/ca.crt", renew
    if not tls.fits(secret(looked.path / "keys" / "server.key"), own):
        yield "MEND", "keys/server.key is not the key of tls/server.crt", f"{renew} --new-key"
    host = looked.folder.settings.addresses.public.rpartition(":")[0].strip("[]")
    if missing := [name for name in (host, *tls.LOCAL) if name not in tls.names_of(own)]:
        yield "MEND", f"tls/server.crt is not for {', '.join(missing)}", f"{renew} --names {host}"
    now = looked.around.now_ms
    for what, certificate, fix in (
        ("tls/server.crt", own, renew),
        ("tls/ca.crt", authority, "make a new folder, and ship its bundle with the app"),
    ):
        yield from _time(what, _ms(certificate.not_valid_before_utc.timestamp()), _until(certificate), now, fix)
    yield "OK", f"for {', '.join(tls.names_of(own))}, until {_day(_until(own))}", ""


def _release_key(looked: Looked) -> Iterator[Found]:
    rotate = f"penchant keys rotate {looked.path} --root FILE"
    now = looked.around.now_ms
    key, envelope = keys.release_key(looked.folder)
    certificate = Certificate.read(envelope, looked.bundle.app.root)
    if certificate.app_id != looked.folder.settings.app_id:
        yield "MEND", "certificate.json is for another app than server.toml", "restore both from a backup"
    yield from _time(
        "certificate.json", certificate.not_before_ms, certificate.not_after_ms, looked.around.now_ms, rotate
    )
    offered = [shown for shown in keys.show(looked.folder) if shown["what"].startswith("channel ")]
    for channel in offered:
        if channel["serial"] > certificate.serial:
            yield "MEND", f"{channel['what']} is signed by a newer key, serial {channel['serial']}", "restore a backup"
        elif channel["serial"] < certificate.serial:
            yield "MEND", f"{channel['what']} is still signed by the key before, serial {channel['serial']}", rotate
        if channel["until_ms"] < now:
            yield (
                "MEND",
                f"{channel['what']} has expired: devices refuse it",
                f"penchant serve up {looked.path} signs it anew",
            )
    if looked.bundle.seen.serial != certificate.serial or list((looked.path / "keys").glob("release.*.key")):
        yield "MEND", "a change of the release key was not finished", rotate
    yield "OK", f"{key.public.id[:16]}, serial {certificate.serial}, until {_day(certificate.not_after_ms)}", ""


def _offline(looked: Looked) -> Iterator[Found]:
    here = [name for name in keys.OFFLINE if (looked.path / "offline" / name).exists()]
    if here:
        yield "WARN", f"{' and '.join(here)} lie on this machine: who breaks in has them", "move offline/ to a stick"
    else:
        yield "OK", "root and authority keys are elsewhere", ""


def _modes(looked: Looked) -> Iterator[Found]:
    at = looked.path
    private = [at / "keys", at / "offline", at / "server.db", *(at / "ledgers").glob("*.sqlite")]
    private += [*(at / "keys").iterdir(), *(at / "offline").glob("*")]
    owner = at.stat().st_uid
    found = {path: path.stat() for path in private if path.exists()}
    for path, stat in found.items():
        name = path.relative_to(looked.path)
        if stat.st_mode & 0o077:
            yield "MEND", f"{name} can be used by others", f"chmod {'700' if path.is_dir() else '600'} {path}"
        if stat.st_uid != owner:
            yield "MEND", f"{name} is another user's than the folder", f"chown {owner} {path}"
    for secret_name in keys.SECRETS:
        if not (at / "keys" / secret_name).is_file():
            yield "MEND", f"keys/{secret_name} is gone", BACKUP
    yield "OK", f"{len(found)} private files and folders are their owner's alone", ""


def _clock(looked: Looked) -> Iterator[Found]:
    now, fix = looked.around.now_ms, "set this machine's clock, and keep it right by NTP"
    public = looked.folder.settings.addresses.public
    there = looked.around.date_ms(public, (looked.path / "tls" / "ca.crt").read_text())
    if there is not None and abs(there - now) > OFF_MS:
        level: Level = "MEND" if abs(there - now) > SKEW_MS else "WARN"
        yield level, f"{public} says a time {abs(there - now) // 1000} s from this clock's", fix
    with Database(looked.folder.database) as database, Ledger.open(looked.folder.ledger) as ledger:
        newest = (database.one(f"SELECT max({column}) AS at FROM {table}") for table, column in _TIMES)
        written = {
            "server.db": max(int(row["at"] or 0) for row in newest if row is not None),
            "the ledger": max([ledger.created_ms, *(entry.at_ms for entry in ledger.entries)]),
        }
    for what, at in written.items():
        if at > now + SKEW_MS:
            yield "MEND", f"{what} was written {(at - now) // 1000} s from now on", fix
    yield "OK", "as the public address says" if there is not None else "nothing here is from the future", ""


_TIMES = (("phases", "at_ms"), ("moves", "at_ms"), ("switches", "at_ms"), ("places", "since_ms"))


def _disk(looked: Looked) -> Iterator[Found]:
    usage = shutil.disk_usage(looked.path)
    if usage.free < 1 << 30 and usage.free < 0.05 * usage.total:
        yield "MEND", f"{usage.free >> 20} MB are free", "make room: a round that cannot be written stops"
    with tempfile.TemporaryFile(dir=looked.path) as file:
        file.write(b"penchant")
        file.flush()
        os.fsync(file.fileno())
    yield "OK", f"{usage.free / (1 << 30):.1f} GB are free", ""


def _ports(looked: Looked) -> Iterator[Found]:
    held = []
    for name, part in PARTS.items():
        host, _, port = str(getattr(looked.folder.settings.addresses, name)).rpartition(":")
        number = _refused(host.strip("[]"), int(port))
        if number == 0 and looked.running(part):
            yield "WARN", f"{part} runs and does not listen on {port} ({name})", f"see logs/{part}.log"
        elif number == errno.EADDRINUSE and looked.running(part):
            held.append(port)
        elif number == errno.EADDRINUSE:
            yield "MEND", f"port {port} ({name}) is another program's", f"stop it, or change addresses.{name}"
        elif number:
            yield "MEND", f"cannot listen on {host}:{port} ({name}): {os.strerror(number)}", f"change addresses.{name}"
    yield "OK", f"this server listens on {', '.join(held)}" if held else "all are free", ""


def _refused(host: str, port: int) -> int:
    """The error number of listening there, 0 for none."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: a closed connection holds no port
        try:
            one.bind((host, port))
        except OSError as error:
            return error.errno or errno.EINVAL
    return 0


def _ledger(looked: Looked) -> Iterator[Found]:
    folder, plan, restore = looked.folder, looked.folder.plan, "stop: restore ledger and server.db from one backup"
    with Ledger.open(folder.ledger) as ledger:
        entries, spent = ledger.verify(), ledger.spent().epsilon
        asked = (folder.settings.population, folder.settings.app_id, plan.delta, folder.settings.budget)
        if (ledger.population, ledger.app_id, ledger.delta, ledger.budget) != asked:
            yield "MEND", "it is of another population, app, delta or budget than server.toml", restore
        with Database(folder.database) as database:
            row = database.one("SELECT done FROM progress WHERE plan = ?", plan.digest)
            released = {int(found["round"]) for found in database.rows(_RELEASED, plan.digest)}
        done = 0 if row is None else int(row["done"])
        released |= set(range(1, done + 1))
        missing = [r for r in sorted(released) if plan.event(r) is not None and not ledger.attempts(r, plan.digest)]
        if missing:
            yield "MEND", f"round {missing[0]} was released and is not charged in it", restore
        if done < plan.rounds and (event := plan.event(done + 1)) is not None:
            try:
                ledger.check(event, plan=plan.digest, cap=plan.charged_cap, round=done + 1)
            except BudgetExhausted:
                full = f"ε = {spent:.3g} is spent of a budget of {ledger.budget:g}: the next round has no room"
                yield "WARN", full, "the rounds end here: what was promised is used up"
    left = "the plan alone limits the rounds" if ledger.budget is None else f"of a budget of {ledger.budget:g}"
    yield "OK", f"{entries} entries, each chained to the one before; ε = {spent:.3g} is spent, {left}", ""


_RELEASED = "SELECT DISTINCT round FROM rounds WHERE plan = ? AND phase = 'released'"


def _database(looked: Looked) -> Iterator[Found]:
    with Database(looked.path / "server.db") as database:
        (first, *_) = [str(row[0]) for row in database.rows("PRAGMA integrity_check")]
    if first != "ok":
        yield "MEND", f"server.db is damaged: {first[:100]}", BACKUP
        return
    yield "OK", "server.db is whole", ""


def _state(looked: Looked) -> Iterator[Found]:
    folder = looked.folder
    with Database(folder.database) as database:
        row = database.one("SELECT * FROM progress WHERE plan = ?", folder.plan.digest)
    if row is None:
        yield "MEND", "server.db has no checkpoint of plan.json", "restore both from a backup"
        return
    if len(row["participations"]) != 8 * folder.plan.n_users:
        yield "MEND", "the checkpoint is of another roster than plan.json", "restore both from a backup"
    states.load(folder, row["state"])
    yield "OK", f"after {row['done']} of {folder.plan.rounds} rounds, its bytes are those of its name", ""


def _versions(looked: Looked) -> Iterator[Found]:
    try:
        flower = importlib.metadata.version("flwr")
    except importlib.metadata.PackageNotFoundError:
        flower = "none"
    if flower != FLOWER:
        yield "MEND", f"flwr {flower}, where exactly {FLOWER} is needed", "pip install 'penchant[server]'"
    program = shutil.which("nginx", path=f"{looked.around.environment.get('PATH', '')}{os.pathsep}/usr/sbin")
    if program is None:
        yield "MEND", "nginx is not installed", "install it, such as apt install nginx-light"
        return
    said = subprocess.run([program, "-V"], capture_output=True, text=True, timeout=10, check=False).stderr
    number = re.search(r"nginx/(\d+)\.(\d+)\S*", said)
    for part in ("http_ssl_module", "http_v2_module"):
        if f"--with-{part}" not in said:
            yield "MEND", f"nginx was built without {part}", "install another build, such as apt install nginx-light"
    if number is None or (int(number[1]), int(number[2])) < (1, 14) or "--without-http_grpc_module" in said:
        yield "MEND", "nginx does not speak gRPC", "install nginx 1.14 or later"
    yield "OK", f"Python {sys.version.split()[0]}, flwr {flower}, {number[0] if number else 'nginx'}", ""


def _quiet(looked: Looked) -> Iterator[Found]:
    asked = 0
    for part in ("superlink", "superexec"):
        if (pid := looked.pid(part)) is not None:
            text = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
            its = {name: value for name, _, value in (one.partition("=") for one in text.split("\0"))}
            asked += 1
            for name in (name for name, value in QUIET.items() if its.get(name) != value):
                yield "MEND", f"{part} runs without {name}={QUIET[name]}", "start it with penchant serve up alone"
    for name in (name for name, value in QUIET.items() if looked.around.environment.get(name, value) != value):
        yield "WARN", f"{name} is set otherwise here: other programs of Flower's would not be quiet", f"unset {name}"
    if (own := looked.around.home / ".flwr" / "config.toml").exists():
        yield (
            "WARN",
            f"{own} is there; this server does not read it",
            "delete it, unless you use Flower beside penchant",
        )
    what = "the processes of Flower's that run" if asked else "penchant serve up starts Flower's"
    yield "OK", f"{what} without telemetry, update check and installations", ""


def _bundle(looked: Looked) -> Iterator[Found]:
    app, settings, again = looked.bundle.app, looked.folder.settings, "restore app.bundle, or make a new folder"
    Certificate.read(Envelope.from_bytes(looked.folder.certificate.read_bytes()), app.root)
    asked = {
        "app_id": settings.app_id,
        "population": settings.population,
        "publisher": settings.publisher,
        "ca": (looked.path / "tls" / "ca.crt").read_text(),
        **dict.fromkeys(("fleet", "enrolment", "distribution"), settings.addresses.public),
    }
    if wrong := [name for name, value in asked.items() if getattr(app, name) != value]:
        yield "MEND", f"app.bundle has another {', '.join(wrong)} than this server: its devices go elsewhere", again
    yield "OK", f"version {looked.bundle.manifest.version}, {len(looked.bundle.catalogue):,} items", ""


_CHECKS: tuple[tuple[str, Callable[[Looked], Iterator[Found]]], ...] = (
    ("settings", _settings),
    ("server certificate", _server_certificate),
    ("release key", _release_key),
    ("offline keys", _offline),
    ("file modes", _modes),
    ("clock", _clock),
    ("disk", _disk),
    ("ports", _ports),
    ("ledger", _ledger),
    ("database", _database),
    ("state", _state),
    ("versions", _versions),
    ("Flower's calls home", _quiet),
    ("bundle", _bundle),
)


def _time(what: str, from_ms: int, until_ms: int, now_ms: int, fix: str) -> Iterator[Found]:
    if now_ms < from_ms:
        yield "MEND", f"{what} is not valid before {_day(from_ms)}", "set this machine's clock"
    elif now_ms >= until_ms:
        yield "MEND", f"{what} has expired on {_day(until_ms)}", fix
    elif until_ms - now_ms < SOON_MS:
        yield "WARN", f"{what} expires in {(until_ms - now_ms) // keys.DAY_MS} days", fix


def _until(certificate: x509.Certificate) -> int:
    return _ms(certificate.not_valid_after_utc.timestamp())


def _ms(seconds: float) -> int:
    return int(seconds * 1000)


def _day(at_ms: int) -> str:
    return email.utils.formatdate(at_ms / 1000, usegmt=True)[5:16]


def date_ms(address: str, ca: str, *, timeout_s: float = 2.0) -> int | None:
    """What time a server says it is, in the Date of its answer; None where none answers.

    It tells of this machine's clock only where something else answers at the address, such as a balancer of load.
    """
    try:
        trusted = ssl.create_default_context(cadata=ca)
        with urllib.request.urlopen(f"https://{address}/health", timeout=timeout_s, context=trusted) as answer:
            said = answer.headers["Date"]
    except urllib.error.HTTPError as error:
        said = error.headers["Date"]
    except (OSError, ValueError, ssl.SSLError):
        return None
    try:
        return _ms(email.utils.parsedate_to_datetime(said).timestamp())
    except (TypeError, ValueError):
        return None
