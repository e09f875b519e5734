"""How long a round takes on a real server: PYTHONPATH=. python benchmarks/fleet.py [--nodes 10,50,100]

A server is made and run by penchant's own commands: SuperLink with TLS and node authentication, the proxy, SQLite. The
devices are `Participation`s, each with a key, a ledger and a thread of its own, all in this process; through the proxy
they enrol and take part as any device does. Co-occurrence over the embedded MovieLens catalogue.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from penchant.client._conditions import Conditions, Policy
from penchant.client._enrolment import enrol
from penchant.client._outcomes import Outcome, Report
from penchant.client._participation import Pace, Participation, fleet
from penchant.client._transport import new_node_key
from penchant.common.artifacts.bundle import Bundle
from penchant.common.interactions import Interactions
from penchant.common.learners import registry
from penchant.common.privacy.ledger import Ledger
from penchant.common.privacy.plan import PrivacyPlan
from penchant.server.enrolment import NotRunning, Roster
from tests.system.production import Production

ALWAYS = Conditions(idle=lambda: True, charging=lambda: True, unmetered=lambda: True)


def devices(production: Production, n: int, folder: Path) -> list[Participation]:
    """So many, enrolled."""
    bundle, random = Bundle.read(production.path / "app.bundle"), np.random.default_rng(0)
    token = Roster.of(production.folder, NotRunning()).mint(ttl_s=3600.0, uses=n).text
    learner = registry.build(production.folder.task.learner, production.folder.task.settings, bundle.catalogue)
    out = []
    for _ in range(n):
        key = new_node_key()
        found = enrol(bundle.app, token, key, deadline_s=30.0)
        plan = PrivacyPlan.from_json(found.plan)
        history = Interactions.of([random.integers(0, len(bundle.catalogue), 200).tolist()], len(bundle.catalogue))
        journal, outcomes = list[Report](), list[Outcome]()
        out.append(
            Participation(
                app=bundle.app,
                place=found.place,
                plan=plan,
                history=lambda history=history: history,  # type: ignore[misc]  # each its own
                learners=lambda name, settings: learner,
                ledger=Ledger(
                    plan.population,
                    delta=plan.delta,
                    app_id=bundle.app.app_id,
                    path=folder / f"{found.place}.sqlite",
                ),
                transport=fleet(bundle.app, key),
                policy=Policy(consent=True, trust="server"),
                conditions=ALWAYS,
                journal=journal,
                pace=Pace(),
                on_outcome=outcomes.append,
            )
        )
    return out


def tree(pid: int) -> list[int]:
    """A process and all below it."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    below = children.read_text().split() if children.exists() else []
    return [pid, *(one for child in below for one in tree(int(child)))]


def used(production: Production, part: str) -> tuple[float, float]:
    """CPU seconds and MiB of a part and all below it."""
    ticks, pages = 0, 0
    for pid in tree(production.pid(part)):
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        except OSError:
            continue
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK"), pages * resource.getpagesize() / (1 << 20)


def measured(n: int, path: Path) -> dict[str, Any]:
    """One fleet of n, all rounds of its plan."""
    production = Production(
        path / "prod",
        *("--users", str(n), "--delta", str(min(1e-3, 0.1 / n)), "--minimum", str(n), "--deadline", "600"),
        up=False,
    )
    production.toml(per_minute=100_000)  # all of them are at one address
    production.up()
    try:
        fleet_of = devices(production, n, path)
        before = {part: used(production, part)[0] for part in ("superlink", "superexec", "proxy", "services")}
        for one in fleet_of:
            one.start()
        until = time.monotonic() + 900
        while production.status()["left"] and time.monotonic() < until:
            time.sleep(2)
        after = {part: used(production, part) for part in before}
        for one in fleet_of:
            one.stop()
        tries = [one for one in production.tries() if one["phase"] == "released"]
        rounds = max(1, len(production.tries()))
        return {
            "nodes": n,
            "rounds": [round(one["seconds"], 1) for one in tries],
            "median": statistics.median(one["seconds"] for one in tries) if tries else float("nan"),
            "answered": [one["answered"] for one in tries],
            **{f"{part} CPU s/round": (after[part][0] - before[part]) / rounds for part in before},
            **{f"{part} MiB": after[part][1] for part in before},
        }
    finally:
        production.down()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", default="10,50,100")
    for n in map(int, parser.parse_args().nodes.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            found = measured(n, Path(folder))
        print(", ".join(f"{k} {v:.1f}" if isinstance(v, float) else f"{k} {v}" for k, v in found.items()), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
