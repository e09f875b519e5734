"""This device's membership in its population's rounds: enrolled once, then part of rounds as often as it may.

What is kept, encrypted: the node key, the place in the roster, the plans, and a report of everything that left. Beside
it, not encrypted and without a word of what the person did, lie the ledger and the plans: how often this device took
part and what that cost. They outlive a `forget`, so that whoever begins anew does not spend the same budget twice.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from penchant.client import _enrolment
from penchant.client._conditions import Conditions, Policy, promise
from penchant.client._outcomes import Outcome, Report
from penchant.client._participation import Participation, fleet
from penchant.client._store import Store
from penchant.client._training import Trainer
from penchant.client._transport import new_node_key
from penchant.client._types import Trust
from penchant.client.node import Learners
from penchant.common.artifacts.bundle import App, write_whole
from penchant.common.errors import PenchantError
from penchant.common.interactions import Interactions
from penchant.common.privacy.ledger import Ledger
from penchant.common.privacy.plan import PrivacyPlan

LEDGER, PLANS = "ledger.sqlite", "plans.json"


class Reports:
    """The journal of what left, kept with the person."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def append(self, report: Report, /) -> None:
        kept = [*self._records(), report.to_record()]
        self._store.put("left", json.dumps(kept).encode())

    def __iter__(self) -> Iterator[Report]:
        return map(Report.from_record, self._records())

    def _records(self) -> list[dict[str, Any]]:
        data = self._store.get("left")
        found: list[dict[str, Any]] = [] if data is None else json.loads(data)
        return found


class Membership:
    """Made with a store that is open; `close` before the store is.

    Args:
        history: the person's interactions, as a population of one.
        learners: over the catalogue in use.
        trainer: for those that train with PyTorch.
        serial: highest of a release key's certificate that was seen.
        released: rounds of a plan, given as JSON, that the release in use is made of; None where it does not say.
    """

    def __init__(
        self,
        folder: Path,
        app: App,
        store: Store,
        *,
        history: Callable[[], Interactions],
        learners: Learners,
        trainer: Trainer,
        trust: Callable[[], Trust],
        serial: Callable[[], int],
        released: Callable[[str], int | None],
        policy: Policy,
        conditions: Conditions,
        now_ms: Callable[[], int],
    ) -> None:
        self._path, self._app, self._store = folder / LEDGER, app, store
        self._history, self._learners, self._trust, self._serial = history, learners, trust, serial
        self._released = released
        self._policy, self._conditions, self._trainer = policy, conditions, trainer
        self._now_ms = now_ms
        self.reports = Reports(store)
        self._part: tuple[str, Participation, Ledger] | None = None

    @property
    def plan(self) -> PrivacyPlan | None:
        """The one enrolled under; None where this device is not."""
        kept = self._kept()
        return None if kept is None else PrivacyPlan.from_json(kept["plan"])

    def key(self) -> bytes:
        """This device's private key: the one it has, or a new one, kept before its public half is anywhere."""
        if (key := self._store.get("node_key")) is None:
            key = new_node_key()
            self._store.put("node_key", key)
        return key

    def joined(self, place: int, plan: str) -> None:
        """This device is in the roster now."""
        self.close()
        plans = [*(one for one in self._plans() if one != plan), plan]
        write_whole(self._path.with_name(PLANS), json.dumps(plans).encode())  # public, and needed after a forget
        self._store.put("member", json.dumps({"place": place, "plan": plan}).encode())

    def ready(self) -> bool:
        """Makes what takes part, where this device is enrolled; whether it is. For one thread at a time."""
        return self._participation() is not None

    def once(self, deadline_s: float) -> Outcome | None:
        """Takes part in the next round that asks; None where it is not `ready`."""
        if (made := self._part) is None:
            return None
        outcome = made[1].once(deadline_s)
        self._note(made[1])
        return outcome

    def start(self) -> bool:
        """Takes part in the background; whether it began."""
        return self._part is not None and self._part[1].start()

    def stop(self) -> None:
        """Ends the background, within a second; nothing leaves from then on."""
        if self._part is not None:
            self._part[1].stop()
            self._note(self._part[1])

    def agreed(self) -> None:
        """Goes by what the person agrees to now; what is under way and no longer allowed is cancelled."""
        if self._part is not None:
            self._part[1].policy = self._allowed()

    def withdraw(self) -> None:
        """Nothing leaves from here on, whatever is written down where."""
        if self._part is not None:
            self._part[1].policy = replace(self._part[1].policy, consent=False)

    def spent(self) -> tuple[int, str]:
        """Rounds taken part in under the plan, and ε of this device's own noise in words; "" where the server's."""
        plan, ledger = self.plan, self._ledger()
        if plan is None or ledger is None:
            return 0, ""
        taken = ledger.participations(0, plan.digest)
        found = promise(plan).guarantee
        if plan.device is None or found is None or not taken:
            return taken, ""
        return taken, str(replace(found, epsilon=ledger.spent(0).epsilon, accountant=ledger.spent(0).accountant))

    def rounds(self) -> list[int]:
        """Every round that this device was in, under whichever plan, also before a forget."""
        ledger = self._ledger()
        return [] if ledger is None else [e.round for e in ledger.entries if e.kind == "participation"]

    def revoke(self, deadline_s: float) -> bool | None:
        """Asks the server to take this device out; None where it never enrolled."""
        key = self._store.get("node_key")
        if key is None or self._kept() is None:
            return None
        try:
            _enrolment.revoke(self._app, key, deadline_s=deadline_s)
        except PenchantError:
            return False
        return True

    def close(self) -> None:
        self.stop()
        if self._part is not None:
            self._part[2].close()
            self._part = None

    def _plans(self) -> list[str]:
        """Every plan that this device enrolled under, also before a forget, as JSON; the newest last."""
        try:
            found = json.loads(self._path.with_name(PLANS).read_bytes())
        except (OSError, ValueError):
            return []
        return [plan for plan in found if isinstance(plan, str)] if isinstance(found, list) else []

    def _kept(self) -> dict[str, Any] | None:
        data = self._store.get("member")
        return None if data is None else json.loads(data)

    def _ledger(self) -> Ledger | None:
        if self._part is not None:
            return self._part[2]
        return Ledger.open(self._path) if self._path.exists() else None

    def _allowed(self) -> Policy:
        trust = self._trust()
        if trust == "nobody":
            return replace(self._policy, consent=False)
        return replace(self._policy, consent=True, trust=trust)

    def _participation(self) -> Participation | None:
        kept, key = self._kept(), self._store.get("node_key")
        if kept is None or key is None:
            return None
        if self._part is not None and self._part[0] == kept["plan"]:
            self._part[1].serial = max(self._part[1].serial, self._serial())
            return self._part[1]
        self.close()
        plan = PrivacyPlan.from_json(kept["plan"])
        earlier = [PrivacyPlan.from_json(one) for one in self._plans()]
        ledger = Ledger(
            plan.population, delta=plan.delta, app_id=self._app.app_id, path=self._path, now_ms=self._now_ms
        )
        part = Participation(
            app=self._app,
            place=kept["place"],
            plan=plan,
            earlier=earlier,
            history=self._history,
            learners=self._learners,
            trainer=self._trainer,
            ledger=ledger,
            transport=fleet(self._app, key),
            policy=self._allowed(),
            conditions=self._conditions,
            journal=self.reports,
            serial=max(kept.get("serial", 0), self._serial()),
            released=lambda: self._released(kept["plan"]),
            node_id=kept.get("node_id"),
            now_ms=self._now_ms,
        )
        self._part = (kept["plan"], part, ledger)
        return part

    def _note(self, part: Participation) -> None:
        """Keeps what the next start needs: the number that the server knows this device by, and the newest key seen."""
        kept = self._kept()
        if kept is None:
            return
        now = {**kept, "serial": max(part.serial, kept.get("serial", 0))}
        now |= {} if part.node_id is None else {"node_id": part.node_id}
        if now != kept:
            self._store.put("member", json.dumps(now).encode())
