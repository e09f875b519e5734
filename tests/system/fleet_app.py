"""The ServerApps that test_fleet.py runs on a real SuperLink: it is imported where the SuperExec is, never shipped.

What they need is in the folder that PENCHANT_FLEET names: the release key and its certificate, and where to leave the
state, the records and what nodes answered.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Context, Message, MessageType, RecordDict
from flwr.serverapp import Grid, ServerApp
from safetensors.numpy import save_file

from penchant.client.node import Node
from penchant.common.artifacts.signing import Envelope, SigningKey
from penchant.common.catalogue import Catalogue
from penchant.common.interactions import Interactions
from penchant.common.learners import registry
from penchant.common.learners.contract import Learner
from penchant.common.privacy.ledger import Ledger
from penchant.common.privacy.plan import PrivacyPlan, SumSpec
from penchant.common.streams import Streams
from penchant.server import rounds as rounds_module
from penchant.server._flower import Sealing, server_app
from penchant.server.rounds import RoundRecord, Rounds

APP_ID, POPULATION = "films", "everybody"
N_ITEMS, N_USERS = 40, 3
CATALOGUE = Catalogue(ids=tuple(f"film:{i}" for i in range(N_ITEMS)))
PEOPLE = Interactions.of(
    [np.random.default_rng(u).integers(0, N_ITEMS, 25 + 5 * u).tolist() for u in range(N_USERS)], N_ITEMS
)
SETTINGS = {"head": 16, "window": 3, "dims": 3}
PLAN = PrivacyPlan(
    unit="user",
    n_users=N_USERS,
    delta=1e-3,
    sampling="none",
    cohort=N_USERS,
    sums=(
        SumSpec(name="counts", rounds=1, clip_norm=1.0, noise_multiplier=0.5),
        SumSpec(name="matrix", rounds=2, clip_norm=1.0, noise_multiplier=0.3),
    ),
    max_participations=3,
    population=POPULATION,
)


def learners(name: str, settings: Mapping[str, Any]) -> Learner:
    return registry.build(name, settings, CATALOGUE)


def host(place: int) -> Node:
    """The device at this place, in a process that has it at hand."""
    return Node(PEOPLE.select([place]), learners, Streams(1), plan=PLAN)


class FirstTwo(Rounds):
    """Stops one round before the plan ends, so that devices go on waiting for it."""

    @property
    def n_left(self) -> int:
        return 2 - self.progress.done


def new_rounds() -> Rounds:
    """The rounds under test; their noise is seeded, so that the same sums give the same state."""
    return FirstTwo(
        learner=learners("cooccurrence", SETTINGS),
        settings=SETTINGS,
        plan=PLAN,
        roster=(1,) * N_USERS,
        ledger=Ledger(POPULATION, delta=PLAN.delta),
        streams=Streams(4),
    )


def _folder() -> Path:
    return Path(os.environ["PENCHANT_FLEET"])


def _after(record: RoundRecord, rounds: Rounds) -> None:
    with (_folder() / "records.jsonl").open("a") as out:
        out.write(json.dumps({**asdict(record), "at": time.time(), "ran": rounds_module.__file__}) + "\n")
    save_file({name: np.ascontiguousarray(v) for name, v in rounds.state.items()}, _folder() / "state.safetensors")
    if not rounds.n_left:
        (_folder() / "done").touch()


def _sealing() -> Sealing:
    key = SigningKey((_folder() / "release.key").read_bytes())
    certificate = Envelope.from_bytes((_folder() / "certificate.json").read_bytes())
    return Sealing(app_id=APP_ID, key=key, certificate=certificate)


app = ServerApp()
foreign = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    server_app(new_rounds, _after, timeout_s=60.0, gather_s=30.0, sealing=_sealing())(grid, context)


@foreign.main()
def ask_everybody(grid: Grid, context: Context) -> None:
    """Somebody else's app on the same server: asks every node to train, and writes down what they say."""
    until = time.monotonic() + 40
    while len(nodes := list(grid.get_node_ids())) < N_USERS and time.monotonic() < until:
        time.sleep(0.2)
    asked = [Message(RecordDict({}), dst_node_id=node, message_type=MessageType.TRAIN) for node in nodes]
    replies = list(grid.send_and_receive(asked, timeout=40))
    said = [reply.error.reason if reply.has_error() else "answered" for reply in replies]
    (_folder() / "foreign.json").write_text(json.dumps({"nodes": sorted(map(str, nodes)), "said": said}))
