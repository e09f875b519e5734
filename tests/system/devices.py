"""Devices that take part in rounds of `fleet_app`, each with a key, a ledger and a history of its own."""

from __future__ import annotations

import time
from dataclasses import dataclass

from penchant.client._conditions import Conditions, Policy
from penchant.client._outcomes import Outcome, Report
from penchant.client._participation import Pace, Participation, fleet
from penchant.client._transport import new_node_key
from penchant.common.artifacts.bundle import App
from penchant.common.artifacts.signing import Certificate, SigningKey
from penchant.common.privacy.ledger import Ledger
from tests.system import fleet_app
from tests.system.fleet_app import APP_ID, PEOPLE, PLAN, POPULATION
from tests.system.superlink import Server

OURS, THEIRS = "films/rounds", "somebody/else"
WILLING = Policy(consent=True, trust="server")
HERE = Conditions(idle=lambda: True, charging=lambda: True, unmetered=lambda: True)
PACE = Pace(poll_s=0.3, retry_s=0.2, longest_s=2.0, refused_s=0.5, heartbeat_s=8.0)


def an_app(server: Server, address: str = "") -> App:
    """The bundle's record; its release key and certificate go where the ServerApp finds them.

    Args:
        address: where devices find the server; "" for its own.
    """
    root, release = SigningKey.generate(), SigningKey.generate()
    now = time.time_ns() // 1_000_000
    certificate = Certificate(
        app_id=APP_ID, public_key=release.public, serial=1, not_before_ms=now - 1000, not_after_ms=now + 86_400_000
    )
    (server.folder / "release.key").write_bytes(release.private_bytes())
    (server.folder / "certificate.json").write_bytes(certificate.signed(root).to_bytes())
    return App(
        app_id=APP_ID,
        population=POPULATION,
        root=root.public,
        fleet=address or server.address,
        ca=(server.folder / "ca.crt").read_text(),
        publisher=OURS,
    )


@dataclass
class Device:
    place: int
    key: bytes
    part: Participation
    journal: list[Report]
    outcomes: list[Outcome]


def device(server: Server, app: App, place: int, *, key: bytes = b"", node_id: int | None = None) -> Device:
    key, journal, outcomes = key or new_node_key(), list[Report](), list[Outcome]()
    part = Participation(
        app=app,
        place=place,
        plan=PLAN,
        history=lambda: PEOPLE.select([place]),
        learners=fleet_app.learners,
        ledger=Ledger(POPULATION, delta=PLAN.delta, app_id=APP_ID, path=server.folder / f"device{place}.ledger"),
        transport=fleet(app, key),
        policy=WILLING,
        conditions=HERE,
        journal=journal,
        pace=PACE,
        node_id=node_id,
        on_outcome=outcomes.append,
    )
    return Device(place, key, part, journal, outcomes)
