"""Rounds as the round loop writes them into server.db and the ledger, without running one."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette

from penchant.common.privacy.ledger import Ledger
from penchant.server.database import Database
from penchant.server.folder import Folder
from tests.server.operators import NOW

ORDER = ("planned", "drawn", "training", "aggregating", "charged", "released")


@dataclass
class History:
    """Writes rounds of an operator's folder, each phase a second after the one before.

    Attributes:
        now_ms: the time that the next phase is written with.
    """

    folder: Folder
    now_ms: int = NOW
    done: int = 0
    tries: dict[int, int] = field(default_factory=dict)

    def round(
        self,
        last: str = "released",
        *,
        drawn: int = 3,
        answered: int = 3,
        asked: int | None = None,
        refused: Mapping[str, int] | None = None,
        after: str = "aggregating",
        why: str = "",
    ) -> None:
        """The next round up to a phase, charged as it comes to "charged"; "abandoned" comes `after` another."""
        plan, number = self.folder.plan, self.done + 1
        attempt = self.tries.get(number, 0)
        self.tries[number] = attempt + 1
        phases = list(ORDER[: ORDER.index(after if last == "abandoned" else last) + 1])
        counts: dict[str, Any] = {}
        for phase in [*phases, "abandoned"] if last == "abandoned" else phases:
            if phase == "drawn":
                counts |= {"drawn": drawn, "asked": drawn if asked is None else asked}
            if phase == "aggregating":
                counts |= {"answered": answered, "refused": refused}
            if phase == "charged" and (event := plan.event(number)) is not None:
                with self.ledger() as ledger:
                    ledger.charge(number, event, plan=plan.digest, cap=plan.charged_cap)
            if phase in ("released", "abandoned"):
                counts |= {"seconds": len(phases) * 1.0, "why": why}
            self.write(phase, number, attempt, **counts)
            if phase == "released":
                self.done = number

    def write(
        self,
        phase: str,
        number: int,
        attempt: int = 0,
        *,
        drawn: int = 0,
        asked: int = 0,
        answered: int = 0,
        refused: Mapping[str, int] | None = None,
        seconds: float = 0.0,
        why: str = "",
    ) -> None:
        """One change of phase."""
        plan = self.folder.plan
        known = (drawn, asked, answered, json.dumps(dict(refused or {})), seconds, why)
        with Database(self.folder.database) as database, database.transaction() as db:
            db.execute(
                f"INSERT OR REPLACE INTO rounds VALUES ({', '.join('?' * 12)})",
                (plan.digest, number, attempt, phase, self.now_ms, plan.spec(number).name, *known),
            )
            db.execute(
                "INSERT INTO phases (plan, round, attempt, phase, at_ms) VALUES (?, ?, ?, ?, ?)",
                (plan.digest, number, attempt, phase, self.now_ms),
            )
            if phase == "released":
                db.execute("INSERT OR REPLACE INTO progress VALUES (?, ?, '', '', x'')", (plan.digest, number))
        self.now_ms += 1000

    def ledger(self) -> Ledger:
        plan, settings = self.folder.plan, self.folder.settings
        return Ledger(
            plan.population,
            delta=plan.delta,
            budget=settings.budget,
            app_id=settings.app_id,
            path=self.folder.ledger,
            now_ms=lambda: self.now_ms,
        )

    def want(self, rounds: str, *, hold: str = "") -> None:
        with Database(self.folder.database) as database:
            database.set_switches({"rounds": rounds, "hold": hold})

    def place(self, place: int, *, left: bool = False) -> None:
        with Database(self.folder.database) as database, database.transaction() as db:
            key = f"node-key-{place}".encode()
            db.execute(
                "INSERT INTO places VALUES (?, ?, ?, NULL, ?, ?)",
                (place, key, 7_000_000_000_000_000_000 + place, NOW, NOW if left else None),
            )


@contextlib.contextmanager
def serving(make: Callable[[threading.Event], Starlette], *, port: int = 0) -> Iterator[str]:
    """An application on a port of this machine, a free one if 0: its address. It is told before it ends."""
    closing = threading.Event()
    config = uvicorn.Config(
        make(closing),
        host="127.0.0.1",
        port=port,
        log_config=None,
        access_log=False,
        ws="none",
        timeout_graceful_shutdown=5,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until = time.monotonic() + 30
    while not server.started:
        assert time.monotonic() < until
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        taken = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{taken}"
    finally:
        closing.set()
        server.should_exit = True
        thread.join(30)
