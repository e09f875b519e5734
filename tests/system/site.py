"""A real server that faults happen to, the devices that go on through them, and what must hold after each.

The server is an operator's folder over 40 items, run by penchant's own commands; its ServerApp is `fault_app`. The
devices are `Participation`s in this process, each with a key, a ledger and a history of its own, which reach it through
the proxy alone; one more is a whole `Client`, which follows the releases.
"""

from __future__ import annotations

import json
import os
import signal
import ssl
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from penchant.client import Client, PassphraseKey
from penchant.client._conditions import Conditions, Policy
from penchant.client._enrolment import enrol
from penchant.client._outcomes import Outcome, Report
from penchant.client._participation import Pace, Participation, fleet
from penchant.client._transport import new_node_key
from penchant.common.artifacts.bundle import App, Bundle
from penchant.common.interactions import Interactions
from penchant.common.learners import registry as learners
from penchant.common.privacy.ledger import Ledger
from penchant.common.privacy.plan import PrivacyPlan, SumSpec
from penchant.server.database import Database
from penchant.server.enrolment import NotRunning, Roster
from penchant.server.folder import Folder
from penchant.server.registry import Registry
from tests.server.operators import CATALOGUE, an_operator, marker
from tests.system import fault_app
from tests.system.production import Production, free_ports, within

N_PHONES, N_PLACES, DEADLINE_S = 3, 8, 20.0
ALWAYS = Conditions(idle=lambda: True, charging=lambda: True, unmetered=lambda: True)
PACE = Pace(poll_s=0.3, retry_s=0.3, longest_s=2.0, refused_s=0.5, heartbeat_s=8.0, reply_s=DEADLINE_S)


def a_plan(rounds: int) -> PrivacyPlan:
    """Of so many rounds, each profile in all of them, with noise that keeps ε small."""
    return PrivacyPlan(
        unit="user",
        n_users=N_PLACES,
        delta=1e-3,
        sampling="none",
        cohort=N_PLACES,
        sums=(
            SumSpec(name="counts", rounds=1, clip_norm=1.0, noise_multiplier=20.0),
            SumSpec(name="matrix", rounds=rounds - 1, clip_norm=1.0, noise_multiplier=20.0),
        ),
        max_participations=rounds,
    )


class Watched:
    """A learner whose contributions are noted, for the search that must not find them."""

    def __init__(self, learner: Any, sent: list[bytes]) -> None:
        self._learner, self._sent = learner, sent

    def __getattr__(self, name: str) -> Any:
        return getattr(self._learner, name)

    def partial_sum(self, *args: Any) -> Any:
        found = self._learner.partial_sum(*args)
        for values in found.values():
            for kind in (np.float32, np.float64):
                if secret := marker(np.asarray(values, kind)):
                    self._sent.append(secret)
        return found


@dataclass
class Clock:
    """A device's: how far it is ahead of the machine's."""

    ahead_ms: int = 0

    def __call__(self) -> int:
        return time.time_ns() // 1_000_000 + self.ahead_ms


@dataclass
class Phone:
    """A device that takes part in the background.

    Attributes:
        sent: bytes of its contributions, as they would look if they were anywhere.
    """

    key: bytes
    place: int
    part: Participation
    ledger: Ledger
    journal: list[Report]
    outcomes: list[Outcome]
    sent: list[bytes]
    clock: Clock

    def refusals(self, since: int = 0) -> Counter[str]:
        return Counter(str(one.refusal) for one in self.outcomes[since:] if one.refusal is not None)


class Site(Production):
    """
    Args:
        path: of the folder.
        rounds: of the plan.
    """

    def __init__(self, path: Path, *, rounds: int = 400, phones: int = N_PHONES) -> None:
        self.path, self.home = path, path.parent
        self.port = port = free_ports(4)
        names = ("edge", "operator", "superlink", "services")
        at = "".join(f'{name} = "127.0.0.1:{port + i}"\n' for i, name in enumerate(names))
        an_operator(
            path,
            plan=a_plan(rounds),
            now_ms=time.time_ns() // 1_000_000,
            toml=f'[addresses]\npublic = "localhost:{port}"\n{at}'
            f"[rounds]\ndeadline_s = {DEADLINE_S}\nminimum = 2\nretry_s = 0.5\npause_s = 0.3\n"
            '[models]\npromote = "automatic"\n[enrolment]\nper_minute = 6000\n',
        )
        app = path / "flower-app" / "pyproject.toml"
        app.write_text(app.read_text().replace("penchant.server.app:app", "tests.system.fault_app:app"))
        self.folder = Folder(path)
        self.bundle = Bundle.read(self.folder.bundle)
        self.phones = list[Phone]()
        self.during: Callable[[], None] | None = None
        self.reader = Client.open(
            self.home / "reader", bundle=self.folder.bundle, trust="nobody", key=PassphraseKey("x", n=1 << 12)
        )
        self.up()
        self.phones += [self.phone() for _ in range(phones)]
        for one in self.phones:
            one.part.start()
        self.penchant("round", "start", str(path))

    def close(self) -> None:
        for one in self.phones:
            one.part.stop()
        self.reader.close()
        self.down()

    # devices

    @property
    def app(self) -> App:
        return self.bundle.app

    def token(self, **grant: Any) -> str:
        return Roster.of(self.folder, NotRunning()).mint(**{"ttl_s": 3600.0, **grant}).text

    def phone(self, *, token: str = "", key: bytes = b"", app: App | None = None) -> Phone:
        """One that is enrolled."""
        key, app = key or new_node_key(), app or self.app
        found = enrol(app, token or self.token(), key, deadline_s=20.0)
        plan, sent = PrivacyPlan.from_json(found.plan), list[bytes]()
        random = np.random.default_rng(found.place)
        person = Interactions.of([random.integers(0, len(CATALOGUE), 60).tolist()], len(CATALOGUE))
        made = learners.build(self.folder.task.learner, self.folder.task.settings, CATALOGUE)
        clock, journal, outcomes = Clock(), list[Report](), list[Outcome]()
        ledger = Ledger(
            plan.population,
            delta=plan.delta,
            app_id=app.app_id,
            path=self.home / f"device{found.place}-{time.monotonic_ns()}.sqlite",
        )

        def history() -> Interactions:
            if (during := self.during) is not None:
                self.during = None
                during()
            return person

        part = Participation(
            app=app,
            place=found.place,
            plan=plan,
            history=history,
            learners=lambda name, settings: Watched(made, sent),  # type: ignore[return-value,arg-type]  # watched
            ledger=ledger,
            transport=fleet(app, key),
            policy=Policy(consent=True, trust="server"),
            conditions=ALWAYS,
            journal=journal,
            pace=PACE,
            now_ms=clock,
            on_outcome=outcomes.append,
        )
        return Phone(key, found.place, part, ledger, journal, outcomes, sent, clock)

    # faults

    def arm(self, point: str, does: str, *, done: int = 0) -> None:
        """Has the ServerApp do this the next time that it comes to this point with so many rounds done."""
        (self.path / "fault.done").unlink(missing_ok=True)
        beside = self.path / "fault.part"
        beside.write_text(json.dumps({"point": point, "does": does, "done": done}))
        beside.replace(self.path / "fault.json")

    def mend(self) -> None:
        """The server is up, wants rounds, and nothing is to happen to it."""
        (self.path / "fault.json").unlink(missing_ok=True)
        self.during = None
        if not self.status()["up"]:
            self.up()
        self.penchant("round", "start", str(self.path))

    def fired(self) -> bool:
        return (self.path / "fault.done").exists()

    def kill(self, part: str) -> None:
        fault_app.kill(self.folder, part)

    def server_app(self) -> int:
        """The number of the ServerApp's process; 0 where there is none."""
        for pid in _below(self.pid("superexec")):
            with suppress(OSError):
                if b"serverapp" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    return pid
        return 0

    def end_server_app(self) -> None:
        within(60, "a ServerApp runs", self.server_app)
        os.kill(self.server_app(), signal.SIGKILL)

    # what is there

    def done(self) -> int:
        with Database(self.folder.database) as database:
            found = database.one("SELECT done FROM progress WHERE plan = ?", self.folder.plan.digest)
        assert found is not None
        return int(found["done"])

    def newest(self) -> dict[str, Any]:
        """The newest try."""
        with Database(self.folder.database) as database:
            row = database.one("SELECT round, attempt FROM phases ORDER BY number DESC LIMIT 1")
        return {"round": 0, "attempt": 0} if row is None else dict(row)

    def await_round(self, number: int, seconds: float = 150.0) -> None:
        within(seconds, f"round {number} is released", lambda: self.done() >= number)

    def next_rounds(self, n: int = 1) -> float:
        """Seconds until so many more rounds are released."""
        began, until = time.monotonic(), self.done() + n
        self.await_round(until)
        return time.monotonic() - began

    def of_round(self, number: int) -> list[dict[str, Any]]:
        return [one for one in self.tries() if one["round"] == number]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """No round is under way inside."""
        self.penchant("round", "pause", str(self.path))
        ended = "SELECT 1 FROM rounds WHERE phase NOT IN ('released', 'abandoned')"
        with Database(self.folder.database) as database:
            within(60, "the round ends", lambda: database.one(ended) is None)
        try:
            yield
        finally:
            self.penchant("round", "start", str(self.path))

    @contextmanager
    def without(self) -> Iterator[None]:
        """The server is down inside, and its folder's files may be exchanged."""
        self.down()
        try:
            yield
        finally:
            self.up()

    # what must hold

    def sound(self, *, whole: bool = True) -> str:
        """Checks every invariant that holds at any moment; the figures.

        Args:
            whole: also what costs a second or more: the registry's bytes, and the search for contributions.
        """
        plan = self.folder.plan
        with Database(self.folder.database) as database:
            held = database.one("SELECT * FROM progress WHERE plan = ?", plan.digest)
            tries = database.rows("SELECT * FROM rounds ORDER BY round, attempt")
            phases = database.rows("SELECT * FROM phases ORDER BY number")
        assert held is not None
        done = int(held["done"])
        out = [row["round"] for row in tries if row["phase"] == "released"]
        assert out == list(range(1, done + 1)), f"released rounds {out}, and {done} are done"
        assert all(row["answered"] >= 2 for row in tries if row["phase"] == "released"), "a release below the minimum"
        order: dict[tuple[int, int], list[str]] = {}
        for row in phases:
            order.setdefault((row["round"], row["attempt"]), []).append(row["phase"])
        for told in order.values():
            assert "released" not in told or told.index("charged") < told.index("released"), told
        with Ledger.open(self.folder.ledger) as ledger:
            n_entries, entries, spent = ledger.verify(), ledger.entries, ledger.spent()
            needed = plan.guarantee(done, ledger.neighbours, ledger.repeated(plan.digest))
        charged, releases, seen = Counter[int](), Counter[int](), set[tuple[int, int]]()
        for entry in entries:
            if entry.kind == "charge":
                charged[entry.round] += 1
                seen.add((entry.round, entry.attempt))
            else:
                assert (entry.round, entry.attempt) in seen, "a release before its charge"
                releases[entry.round] += 1
        assert all(charged[number] and releases[number] for number in out), "a released round that was not charged"
        assert needed is None or spent.epsilon >= needed.epsilon * (1 - 1e-9), f"{spent.epsilon} < {needed}"
        taken = np.frombuffer(held["participations"], "<i8")
        assert taken.max(initial=0) <= plan.max_participations
        for one in self.phones:
            mine = one.ledger.participations(0)
            assert mine <= plan.max_participations, f"{mine} participations"
            one.ledger.verify()
        if whole:
            self._whole()
        lost = sum(charged.values()) - sum(min(1, n) for n in charged.values())
        return (
            f"{done} rounds, {len(order)} tries, {sum(charged.values())} charges ({lost} without effect), "
            f"{n_entries} entries verify, ε = {spent.epsilon:.2f}"
        )

    def _whole(self) -> None:
        with self.paused():
            within(30, "the newest model is offered", self.reader_is_current)
            with Database(self.folder.database) as database:
                problems = Registry(self.folder, database).verify()
            assert not problems, problems
            stored = self.bytes_of("flower", "logs", "run", "server.db", "ledgers", "distribution", "states")
        for one in self.phones:
            assert one.sent, "a device that never took part"
            assert not any(secret in stored for secret in set(one.sent)), "a contribution's bytes are on the server"

    def reader_is_current(self) -> bool:
        """Whether the device that follows releases has the newest model."""
        self.reader.sync(deadline_s=10.0)
        return self.reader_version() == 1 + self.done()

    def reader_version(self) -> int:
        return int(self.reader.export()["release"])

    # the edge

    def doors(self, app: App | None = None) -> Mapping[str, str]:
        """What a device that comes anew meets at each of the edge's three services: an error's name, or "open"."""
        from penchant.client._distribution import fetch_offer
        from penchant.client._flower import Fleet

        app = app or self.app

        def join() -> None:
            line = Fleet(app.fleet, new_node_key(), ca=app.ca)
            try:
                line.join()
            finally:
                line.close()

        asked: dict[str, Callable[[], Any]] = {
            "releases": lambda: fetch_offer(app, deadline_s=5.0),
            "enrolment": lambda: enrol(app, "pt_none", new_node_key(), deadline_s=5.0),
            "rounds": join,
        }
        found = {}
        for name, call in asked.items():
            try:
                call()
                found[name] = "open"
            except Exception as error:
                found[name] = type(error).__name__
        return found

    @contextmanager
    def edge_with(self, certificate: bytes, key: bytes | None = None) -> Iterator[None]:
        """The edge shows another certificate inside."""
        places = {self.folder.tls / "server.crt": certificate}
        if key is not None:
            places[self.folder.keys / "server.key"] = key
        before = {place: place.read_bytes() for place in places}
        try:
            for place, data in places.items():
                place.write_bytes(data)
            self._read_again(certificate)
            yield
        finally:
            for place, data in before.items():
                place.write_bytes(data)
            self._read_again(before[self.folder.tls / "server.crt"])

    def _read_again(self, certificate: bytes) -> None:
        os.kill(self.pid("proxy"), signal.SIGHUP)
        end = "-----END CERTIFICATE-----\n"
        want = ssl.PEM_cert_to_DER_cert(certificate.decode().partition(end)[0] + end)
        within(15, "the edge shows the certificate", lambda: self._shown() == want)

    def _shown(self) -> bytes:
        with suppress(OSError):
            return ssl.PEM_cert_to_DER_cert(ssl.get_server_certificate(("127.0.0.1", self.port), timeout=3))
        return b""


def _below(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children")
    below = children.read_text().split() if children.exists() else []
    return [n for child in below for n in (int(child), *_below(int(child)))]
