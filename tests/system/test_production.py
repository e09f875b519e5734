"""Start to end: a server made and run by an operator's commands, real devices and histories, and kills in it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from penchant.common.artifacts.bundle import Bundle
from penchant.common.interactions import Interactions
from penchant.common.learners import registry
from penchant.common.privacy.ledger import Ledger
from penchant.common.streams import Streams
from penchant.simulations.data.loaders import load
from penchant.simulations.fleet import Device, DeviceProcess, people, server_at, spec
from tests.server.operators import marker
from tests.system.production import Production, within

N = 3


@pytest.fixture
def production(tmp_path: Path) -> Iterator[Production]:
    made = Production(
        tmp_path / "prod",
        *("--users", str(N), "--minimum", "2", "--deadline", "20", "--promote", "automatic", "--delta", "1e-3"),
    )
    try:
        yield made
    finally:
        made.down()


def released(production: Production) -> list[int]:
    return [number for number, _, phase in production.phases() if phase == "released"]


def test_devices_follow_rounds_through_kills_of_a_device_and_of_the_whole_server(
    production: Production, tmp_path: Path
) -> None:
    began = time.monotonic()
    bundle = Bundle.read(production.path / "app.bundle")
    plan = production.folder.plan
    server, data = server_at(str(production.path), bundle=None, token=None), load("embedded")
    lines: list[tuple[str, dict[str, Any]]] = []

    def told(device: Device, line: dict[str, Any]) -> None:
        lines.append((device.user, line))

    chosen = list(people(data, bundle, N))
    specs = [
        spec(server, events, tmp_path / f"device{i}", rounds=99, version=99) for i, (_, events) in enumerate(chosen)
    ]
    devices = [DeviceProcess(user, one, told) for (user, _), one in zip(chosen, specs, strict=True)]
    try:
        within(90, "the first round trains", lambda: (1, 0, "training") in production.phases())
        victim = devices[-1]
        os.kill(victim.process.pid, signal.SIGKILL)  # in the middle of the round
        victim.end()
        within(60, "the first round is released", lambda: 1 in released(production))
        production.kill_everything()
        charged = Ledger.open(production.folder.ledger).spent().epsilon
        assert charged > 0
        production.up()
        devices[-1] = DeviceProcess(victim.device.user, {**specs[-1], "events": []}, told)
        within(120, "every round is released", lambda: len(released(production)) == plan.rounds)
        newest = 1 + plan.rounds
        within(60, "every device has the newest model", lambda: all(one.device.version == newest for one in devices))
        print(f"all after {time.monotonic() - began:.0f} s")
    except BaseException:
        print(lines)
        print(production.phases())
        print(production.logs())
        raise
    finally:
        for one in devices:
            one.end()
    check(production, [one.device for one in devices], lines)
    nothing_of_a_person_is_there(production, bundle, chosen)


def check(production: Production, devices: list[Device], lines: list[tuple[str, dict[str, Any]]]) -> None:
    plan = production.folder.plan
    assert all(device.changed > 0 for device in devices), devices
    assert all(not device.error for device in devices), devices
    assert all(device.rounds for device in devices[:2])
    tries = production.tries()
    assert sorted({one["round"] for one in tries if one["phase"] == "released"}) == list(range(1, plan.rounds + 1))
    assert all(one["answered"] >= 2 for one in tries if one["phase"] == "released")
    with Ledger.open(production.folder.ledger) as ledger:
        ledger.verify()
        charges = [entry for entry in ledger.entries if entry.kind == "charge"]
        assert len(charges) >= plan.rounds
        assert {entry.round for entry in charges} == set(range(1, plan.rounds + 1))
        assert ledger.spent().epsilon >= plan.guarantee(plan.rounds).epsilon * (1 - 1e-9)  # type: ignore[union-attr]  # unit user has one
    listed = [line for _, line in lines if line["said"] == "list"]
    assert max(line["version"] for line in listed) == 1 + plan.rounds
    assert all("trust server" in line["guarantee"] for line in listed)
    assert production.penchant("privacy", "verify", str(production.path)).stdout.startswith("OK")
    assert production.penchant("model", "verify", str(production.path)).returncode == 0


def nothing_of_a_person_is_there(
    production: Production, bundle: Bundle, chosen: list[tuple[str, list[dict[str, Any]]]]
) -> None:
    """No contribution's bytes in what the server stores and logs, and no item of anybody in its logs."""
    learner = registry.build(production.folder.task.learner, production.folder.task.settings, bundle.catalogue)
    index = bundle.catalogue.index
    state = bundle.release.state
    everything = production.bytes_of("flower", "logs", "run", "server.db", "ledgers")
    logs = production.bytes_of("logs", "run")
    for _, events in chosen:
        history = next(iter(Interactions.of([[index[event["item"]] for event in events]], len(bundle.catalogue))))
        for values in learner.contribution(state, history, Streams(0)).values():
            if secret := marker(np.asarray(values)):
                assert secret not in everything
        for event in events:
            assert f'"{event["item"]}"'.encode() not in logs
