"""What the operator should see: one `Status`, read from what the server has written, and the same as metrics.

    server.db, plan.json, the ledger, channels' offers, certificates, the disk ──► Status ──► page, readiness, /metrics

Reading changes nothing, so it needs no process but its own. A part that cannot be read is named among the problems and
the others are still told. Counts of rounds are exact: they are for the operator, and no part of any release. Nothing
here tells one person from another, and labels of metrics come from fixed sets, so that no device can add one.

Source of names: https://prometheus.io/docs/practices/naming/.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self, TypeVar

from cryptography import x509
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from penchant.common.artifacts.manifest import Offer
from penchant.common.artifacts.signing import Envelope, from_json, whole
from penchant.common.errors import InvalidConfig, MalformedData, PenchantError
from penchant.common.privacy.ledger import Ledger
from penchant.common.privacy.plan import Guarantee, PrivacyPlan
from penchant.server.database import Database
from penchant.server.folder import Folder
from penchant.server.rounds import REFUSALS
from penchant.server.wanted import BY_HAND

PHASES = ("planned", "drawn", "training", "aggregating", "charged", "released", "abandoned")
ENDED = ("released", "abandoned")
REASONS = (*REFUSALS, "late", "other")
"""Why an answer was left out, as the round loop says; any other word is "other"."""
CHANNELS = ("stable", "candidate")
CERTIFICATES = ("release key", "TLS", "TLS authority")
PARTS = ("plan", "database", "ledger", "channels", "certificates", "disk")
RECENT = 20
"""Rounds that are told one by one."""
MIN_FREE = 256 << 20
"""Bytes of free disk below which the server does not call itself ready."""
_DISK_STEP = 64 << 20  # so that not every log line is a change
_Value = TypeVar("_Value")


@dataclass(frozen=True, kw_only=True)
class Round:
    """One try at a round.

    Attributes:
        at_ms: when it came to its phase.
        drawn: users in the cohort; `asked` are the nodes that host them, of which `answered` were accepted.
        refused: answers left out, by one of REASONS.
        silent: nodes of which nothing came, or nothing yet.
        why: it was abandoned, in a few fixed words.
    """

    round: int
    attempt: int
    sum: str
    phase: str
    at_ms: int
    drawn: int
    asked: int
    answered: int
    refused: Mapping[str, int]
    silent: int
    seconds: float
    why: str


@dataclass(frozen=True, kw_only=True)
class Totals:
    """Over all tries at all rounds that server.db knows."""

    released: int = 0
    abandoned: int = 0
    drawn: int = 0
    answered: int = 0
    silent: int = 0
    refused: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Privacy:
    """What was promised and what of it is spent.

    Attributes:
        guarantee: ε spent so far, with everything without which it means nothing.
        at_end: ε once every round of the plan is released.
        budget: ε that the ledger refuses to pass; None where the plan alone limits the rounds.
        words: the guarantee as one sentence.
    """

    guarantee: Guarantee
    at_end: float
    budget: float | None
    words: str


@dataclass(frozen=True, kw_only=True)
class Channel:
    """What devices of a channel get now, and until when they take it."""

    name: str
    version: int
    sequence: int
    since_ms: int
    expires_ms: int


@dataclass(frozen=True, kw_only=True)
class Move:
    """A channel was pointed to a model."""

    channel: str
    version: int
    at_ms: int
    why: str


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """One of CERTIFICATES."""

    name: str
    expires_ms: int


@dataclass(frozen=True, kw_only=True)
class Roster:
    """Places of the plan's frozen roster."""

    active: int
    left: int
    free: int


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What cannot be read or is not as it should be, and why; `part` is one of PARTS or a probe's name."""

    part: str
    why: str


@dataclass(frozen=True, kw_only=True)
class Status:
    """Everything about a server at one moment; what could not be read is at its default and among `problems`.

    Attributes:
        at_ms: the moment, UTC milliseconds like all that ends so.
        phase: of the newest round; "" before the first. `since_ms` is when it came to it.
        steps: when the newest round came to each phase.
        running: whether the operator wants rounds, and there is one left to run.
        why: no round begins; "" where one may. A switch rounds = "paused: WHY" is told as it stands.
        done, rounds: of the plan.
        rounds_left: that the plan has and the budget has room for.
        clock_behind_ms: how far this clock is behind the latest time written down; above 0 it was set back.
    """

    at_ms: int
    software: str
    app_id: str
    population: str
    unit: str = ""
    phase: str = ""
    since_ms: int = 0
    steps: Mapping[str, int] = field(default_factory=dict)
    running: bool = False
    why: str = ""
    deadline_s: float = 0.0
    done: int = 0
    rounds: int = 0
    rounds_left: int = 0
    recent: tuple[Round, ...] = ()
    totals: Totals = field(default_factory=Totals)
    privacy: Privacy | None = None
    channels: tuple[Channel, ...] = ()
    moves: tuple[Move, ...] = ()
    certificates: tuple[Certificate, ...] = ()
    roster: Roster | None = None
    disk_free: int = 0
    disk_size: int = 0
    clock_behind_ms: int = 0
    problems: tuple[Problem, ...] = ()

    def to_record(self) -> dict[str, Any]:
        """As JSON types."""
        return asdict(self)


class Cache:
    """What need not be read again: the ledger stays open and is asked for its head, files are known by their times.

    It may be used by several threads.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._ledger: tuple[Ledger, int] | None = None
        self._spent: tuple[tuple[Any, ...], tuple[Privacy, int]] | None = None
        self._files: dict[Path, tuple[tuple[int, ...], Any]] = {}

    def file(self, path: Path, read: Callable[[bytes], _Value]) -> _Value:
        """What `read` makes of a file's bytes.

        Raises:
            OSError: as `read_bytes`.
        """
        found = path.stat()
        key = (found.st_ino, found.st_mtime_ns, found.st_size)
        with self._lock:
            known = self._files.get(path)
            if known is None or known[0] != key:
                self._files[path] = known = (key, read(path.read_bytes()))
        value: _Value = known[1]
        return value

    def spent(self, path: Path, plan: PrivacyPlan, done: int) -> tuple[Privacy, int]:
        """What the ledger says was spent, and how many more rounds it has room for.

        Raises:
            PenchantError: as `Ledger.open`; asked again, it is read anew.
        """
        with self._lock:
            try:
                ledger = self._opened(path)
                key = (ledger.head, plan.digest, done)
                if self._spent is None or self._spent[0] != key:
                    self._spent = (key, _spent(ledger, plan, done))
                return self._spent[1]
            except PenchantError:
                self.close()
                raise

    def _opened(self, path: Path) -> Ledger:
        inode = path.stat().st_ino if path.is_file() else -1
        if self._ledger is None or self._ledger[1] != inode:
            self.close()  # another file stands there now, as after a restore
            self._ledger = (Ledger.open(path), inode)
        return self._ledger[0]

    def close(self) -> None:
        with self._lock:
            if self._ledger is not None:
                self._ledger[0].close()
            self._ledger = self._spent = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read(
    folder: Folder, *, now_ms: int, database: Callable[[], Database] | None = None, cache: Cache | None = None
) -> Status:
    """What is so now. It takes milliseconds with a cache, and without one as long as the ledger's replay.

    Args:
        database: opens server.db; the folder's own if None.
    """
    settings = folder.settings
    problems: list[Problem] = []
    known: dict[str, Any] = {"deadline_s": settings.rounds.deadline_s}

    @contextlib.contextmanager
    def part(name: str) -> Iterator[None]:
        try:
            yield
        except PenchantError as error:
            problems.append(Problem(part=name, why=str(error)))
        except OSError as error:
            problems.append(Problem(part=name, why=f"{error.filename or folder.path}: {error.strerror}"))

    with contextlib.ExitStack() as stack:
        cache = cache or stack.enter_context(Cache())
        plan, switch, hold = None, "paused", ""
        with part("plan"):
            plan = folder.plan
            known |= {"unit": plan.unit, "rounds": plan.rounds, "rounds_left": plan.rounds}
        with part("database"), (database or (lambda: Database(folder.database)))() as db:
            switch, hold = db.switch("rounds", "not started"), db.switch("hold")
            known |= _of_history(db, now_ms)
            if plan is not None:
                known |= _of_plan(db, plan)
                known["rounds_left"] = plan.rounds - known["done"]
        if plan is not None:
            with part("ledger"):
                known["privacy"], known["rounds_left"] = _privacy(cache, folder.ledger, plan, known.get("done", 0))
        with part("channels"):
            known["channels"] = _channels(cache, folder.distribution)
        with part("certificates"):
            known["certificates"] = _certificates(cache, folder)
        with part("disk"):
            disk = shutil.disk_usage(folder.path)
            known |= {"disk_free": disk.free // _DISK_STEP * _DISK_STEP, "disk_size": disk.total}
    why = _halted(switch, hold, known)
    return Status(
        at_ms=now_ms,
        software=version("penchant"),
        app_id=settings.app_id,
        population=settings.population,
        running=not why,
        why=why,
        problems=tuple(problems),
        **known,
    )


def not_ready(status: Status) -> tuple[Problem, ...]:
    """What keeps devices from being served or a round from being run; nothing where the server is ready."""
    found = list(status.problems)
    stable = next((channel for channel in status.channels if channel.name == "stable"), None)
    if stable is None:
        found.append(Problem(part="channels", why="channel stable has no model: promote one"))
    elif stable.expires_ms <= status.at_ms:
        found.append(Problem(part="channels", why="the pointer of channel stable is expired: promote its model again"))
    found += [
        Problem(part="certificates", why=f"the certificate of the {one.name} is expired: renew it")
        for one in status.certificates
        if one.expires_ms <= status.at_ms
    ]
    if status.disk_size > 0 and status.disk_free < MIN_FREE:
        found.append(Problem(part="disk", why=f"less than {MIN_FREE >> 20} MiB are free: make room"))
    return tuple(found)


def _halted(switch: str, hold: str, known: Mapping[str, Any]) -> str:
    """Why no round begins; "" where one may."""
    if known.get("rounds") and known.get("done", 0) >= known["rounds"]:
        return "every round of the plan is released"
    if known.get("rounds") and not known["rounds_left"]:
        return "the budget has no room for another round"
    if switch == "running":
        return ""
    if switch == "not started":
        return "not started yet"
    return f"paused: {hold}" if hold and hold != BY_HAND else "paused by the operator"


def _of_history(db: Database, now_ms: int) -> dict[str, Any]:
    """Newest first as they were written, whatever the clock did meanwhile."""
    last = f"SELECT * FROM phases ORDER BY number DESC LIMIT {RECENT * len(PHASES)}"
    rows = db.rows(
        f"SELECT rounds.*, changes.* FROM rounds JOIN (SELECT plan, round, attempt, max(number) AS newest, "
        f"max(at_ms) AS latest_ms, json_group_object(phase, at_ms) AS steps FROM ({last}) GROUP BY 1, 2, 3) AS changes "
        f"USING (plan, round, attempt) ORDER BY newest DESC LIMIT {RECENT}"
    )
    moves = db.rows(f"SELECT channel, version, at_ms, why FROM moves ORDER BY number DESC LIMIT {RECENT}")
    recent = tuple(_round(row) for row in rows)
    known: dict[str, Any] = {
        "recent": recent,
        "totals": _totals(db),
        "moves": tuple(Move(**dict(row)) for row in moves if row["channel"] in CHANNELS),
    }
    if rows:
        steps = json.loads(rows[0]["steps"])
        known |= {
            "phase": recent[0].phase,
            "since_ms": recent[0].at_ms,
            "steps": {phase: steps[phase] for phase in PHASES if phase in steps},
            "clock_behind_ms": max(0, max(row["latest_ms"] for row in rows) - now_ms),
        }
    return known


def _round(row: Any) -> Round:
    refused = _refused(json.loads(row["refused"]))
    return Round(
        refused=refused,
        silent=max(0, row["asked"] - row["answered"] - sum(refused.values())),
        **{name: row[name] for name in _PLAIN},
    )


_PLAIN = ("round", "attempt", "sum", "phase", "at_ms", "drawn", "asked", "answered", "seconds", "why")


def _refused(counts: Mapping[str, int]) -> dict[str, int]:
    found: dict[str, int] = {}
    for reason, n in counts.items():
        known = reason if reason in REASONS else "other"
        found[known] = found.get(known, 0) + int(n)
    return found


def _totals(db: Database) -> Totals:
    ends = {phase: n for phase, n in db.rows("SELECT phase, count(*) FROM rounds GROUP BY 1") if phase in ENDED}
    over = "FROM rounds WHERE phase IN ('released', 'abandoned')"
    sums = db.one(f"SELECT total(drawn), total(asked), total(answered) {over}")
    refused = _refused(
        dict(
            tuple(row)
            for row in db.rows(f"SELECT key, sum(value) FROM (SELECT refused {over}), json_each(refused) GROUP BY 1")
        )
    )
    drawn, asked, answered = (0, 0, 0) if sums is None else (int(n) for n in sums)
    silent = max(0, asked - answered - sum(refused.values()))
    return Totals(**ends, drawn=drawn, answered=answered, silent=silent, refused=refused)


def _of_plan(db: Database, plan: PrivacyPlan) -> dict[str, Any]:
    progress = db.one("SELECT done FROM progress WHERE plan = ?", plan.digest)
    counted = db.one("SELECT count(*), count(left_ms) FROM places")
    taken, left = (0, 0) if counted is None else counted
    roster = Roster(active=taken - left, left=left, free=max(0, plan.n_users - taken))
    return {"done": 0 if progress is None else progress["done"], "roster": roster}


def _privacy(cache: Cache, ledger: Path, plan: PrivacyPlan, done: int) -> tuple[Privacy | None, int]:
    """The ledger's word with unit user; with unit interaction devices have ledgers, and the plan bounds them."""
    left = plan.rounds - done
    if plan.unit == "user":
        return cache.spent(ledger, plan, done)
    so_far, at_end = plan.guarantee(done), plan.guarantee()
    if so_far is None or at_end is None:
        return None, left
    return Privacy(guarantee=so_far, at_end=at_end.epsilon, budget=None, words=str(so_far)), left


def _spent(ledger: Ledger, plan: PrivacyPlan, done: int) -> tuple[Privacy, int]:
    events = {number: event for number in range(done + 1, plan.rounds + 1) if (event := plan.event(number)) is not None}

    def after(n: int) -> float:
        """ε once n more rounds are charged."""
        some = dict(list(events.items())[:n])
        return ledger.after(some, plan=plan.digest, cap=plan.charged_cap).epsilon

    bound, at_end, left = ledger.spent(), after(len(events)), len(events)
    if ledger.budget is not None and at_end > (most := ledger.budget * (1 + 1e-9)):  # as the ledger itself compares
        low, high = -1, len(events)  # ε never falls: the largest n that fits lies in [low, high)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if after(middle) <= most else (low, middle)
        left = max(0, low)
    words = plan.guarantee(0, ledger.neighbours)
    if words is None:
        raise InvalidConfig("a plan without a guarantee has nothing to spend")
    guarantee = replace(words, epsilon=bound.epsilon, accountant=bound.accountant, delta=ledger.delta)
    return Privacy(guarantee=guarantee, at_end=at_end, budget=ledger.budget, words=str(guarantee)), left


def _channels(cache: Cache, distribution: Path) -> tuple[Channel, ...]:
    paths = ((name, distribution / "channels" / f"{name}.json") for name in CHANNELS)
    return tuple(replace(cache.file(path, _channel), name=name) for name, path in paths if path.is_file())


def _channel(data: bytes) -> Channel:
    """What an offer says itself; devices and the doctor check its signatures."""
    offer = Offer.from_bytes(data)
    pointer, manifest = from_json(offer.pointer.payload), from_json(offer.manifest.payload)
    return Channel(
        name="",
        version=whole(manifest, "version"),
        sequence=whole(pointer, "sequence"),
        since_ms=whole(pointer, "created_ms"),
        expires_ms=whole(pointer, "expires_ms"),
    )


def _certificates(cache: Cache, folder: Folder) -> tuple[Certificate, ...]:
    found = (
        cache.file(
            folder.certificate, lambda data: whole(from_json(Envelope.from_bytes(data).payload), "not_after_ms")
        ),
        cache.file(folder.tls / "server.crt", _x509_until),
        cache.file(folder.tls / "ca.crt", _x509_until),
    )
    return tuple(Certificate(name=name, expires_ms=until) for name, until in zip(CERTIFICATES, found, strict=True))


def _x509_until(data: bytes) -> int:
    try:
        return int(min(one.not_valid_after_utc.timestamp() for one in x509.load_pem_x509_certificates(data)) * 1000)
    except ValueError:
        raise MalformedData("tls/ holds a certificate that is none: restore it from a backup") from None


# --------------------------------------------------------------------------------------------------------- metrics


class Metrics(Collector):
    """A status in Prometheus' format.

    Args:
        now: the status and what is missing for the server to be ready, asked for at each scrape.
    """

    def __init__(self, now: Callable[[], tuple[Status, Sequence[Problem]]]) -> None:
        self._now = now
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def text(self) -> bytes:
        """What /metrics answers, in the text format 0.0.4."""
        return generate_latest(self._registry)

    def describe(self) -> list[Metric]:
        return []  # so that nothing is read before the first scrape

    def collect(self) -> Iterator[Metric]:
        now, missing = self._now()
        yield InfoMetricFamily("penchant_build", "The software that runs.", {"version": now.software})
        yield _one("penchant_ready", not missing, "1 where /readyz finds nothing missing.")
        yield _each(
            "penchant_part_readable", "part", PARTS, _readable(now), "1 where this part of the folder can be read."
        )
        yield _one("penchant_rounds_running", now.running, "1 where rounds are wanted and one is left to run.")
        yield _one("penchant_rounds_planned", now.rounds, "Rounds of the plan.")
        yield _one("penchant_rounds_done", now.done, "Rounds of the plan that are released.")
        yield _one("penchant_rounds_left", now.rounds_left, "Rounds that the plan has and the budget has room for.")
        phase = {now.phase: 1.0} if now.phase else {}
        yield _each("penchant_round_phase", "phase", PHASES, phase, "1 for the newest round's phase.")
        yield _one("penchant_round_phase_start_timestamp_seconds", now.since_ms / 1000, "When it came to its phase.")
        yield _one("penchant_round_deadline_seconds", now.deadline_s, "How long a round waits for answers.")
        ended = next((one.seconds for one in now.recent if one.phase == "released"), 0.0)
        yield _one("penchant_round_duration_seconds", ended, "From draw to release, of the newest released round.")
        totals = now.totals
        ends = {"released": totals.released, "abandoned": totals.abandoned}
        yield _each("penchant_rounds", "outcome", ENDED, ends, "Tries at rounds that ended.", CounterMetricFamily)
        answers = {"accepted": totals.answered, "refused": sum(totals.refused.values()), "silent": totals.silent}
        yield _each("penchant_round_answers", "outcome", tuple(answers), answers, "Nodes asked.", CounterMetricFamily)
        yield _each(
            "penchant_round_refusals", "reason", REASONS, totals.refused, "Answers left out.", CounterMetricFamily
        )
        yield _one("penchant_users_drawn", totals.drawn, "Users drawn into cohorts.", CounterMetricFamily)
        if now.privacy is not None:
            yield _one(
                "penchant_epsilon_spent", now.privacy.guarantee.epsilon, f"Spent: {_without_epsilon(now.privacy)}."
            )
            yield _one(
                "penchant_epsilon_at_end", now.privacy.at_end, "The same once every round of the plan is released."
            )
            if now.privacy.budget is not None:
                yield _one("penchant_epsilon_budget", now.privacy.budget, "What the ledger refuses to pass.")
        versions = {channel.name: channel.version for channel in now.channels}
        pointers = {channel.name: channel.expires_ms / 1000 for channel in now.channels}
        names = tuple(versions)
        yield _each("penchant_model_version", "channel", names, versions, "Version that devices of a channel get.")
        yield _each("penchant_pointer_expiry_timestamp_seconds", "channel", names, pointers, "Until when they take it.")
        until = {one.name: one.expires_ms / 1000 for one in now.certificates}
        yield _each("penchant_certificate_expiry_timestamp_seconds", "certificate", tuple(until), until, "Its end.")
        places = {} if now.roster is None else asdict(now.roster)
        yield _each("penchant_places", "state", tuple(places), places, "Places of the roster.")
        yield _one("penchant_disk_free_bytes", now.disk_free, "Free where the folder lies.")
        yield _one("penchant_disk_size_bytes", now.disk_size, "Size of that disk.")
        yield _one("penchant_clock_behind_seconds", now.clock_behind_ms / 1000, "Above 0 the clock was set back.")


_Family = type[GaugeMetricFamily] | type[CounterMetricFamily]


def _one(name: str, value: float, about: str, family: _Family = GaugeMetricFamily) -> Metric:
    return family(name, about, value=float(value))


def _each(
    name: str,
    label: str,
    values: tuple[str, ...],
    known: Mapping[str, float],
    about: str,
    family: _Family = GaugeMetricFamily,
) -> Metric:
    """One sample for each value of a label, 0 where nothing is known of it."""
    found = family(name, about, labels=(label,))
    for value in values:
        found.add_metric((value,), float(known.get(value, 0)))
    return found


def _readable(status: Status) -> dict[str, float]:
    broken = {problem.part for problem in status.problems}
    return {part: float(part not in broken) for part in PARTS}


def _without_epsilon(privacy: Privacy) -> str:
    return privacy.words.partition(" at ")[2]
