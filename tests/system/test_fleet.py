"""Devices on a real Flower server: TLS, node keys, ServerApps in a process of their own, and a kill in between.

The SuperLink, its SuperExec and each run's ServerApp are processes here, stopped by their own number; the devices are
three `Participation`s in this one, each with its own key, ledger and history. The folder that is submitted holds a
pyproject alone: what runs is the installed package.
"""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.proto.control_pb2 import RegisterNodeRequest
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from safetensors.numpy import load_file

from penchant.client._conditions import Refusal
from penchant.client._outcomes import Outcome
from penchant.client._transport import read_node_key
from penchant.common.arrays import Arrays
from penchant.common.wire import Reply
from tests.processes import free_port, within
from tests.system import fleet_app  # a SuperExec imports it under this name too
from tests.system.devices import OURS, THEIRS, an_app, device
from tests.system.fleet_app import N_USERS, PLAN
from tests.system.superlink import ROOT, Server, certificates


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    certificates(tmp_path)
    (tmp_path / "sx.secret").write_bytes(secrets.token_bytes(32))
    (tmp_path / "sx.secret").chmod(0o600)
    made = Server(tmp_path, free_port())
    try:
        made.superlink()
        made.superexec()
        yield made
    finally:
        for program in list(made.processes):
            made.kill(program)


# ------------------------------------------------------------------------------------------------------ the devices


def by_hand() -> tuple[Mapping[str, Any], list[Arrays], list[Mapping[str, Any]]]:
    """The same rounds without Flower: the last state, every contribution, and the state before each round."""
    run, contributions, states = fleet_app.new_rounds(), list[Arrays](), list[Mapping[str, Any]]()
    hosts = [fleet_app.host(place) for place in range(N_USERS)]
    while run.n_left:
        orders, state = run.open(), run.learner.released(run.state)
        answers = {u: hosts[u].answer(order, state) for u, order in orders.items()}
        contributions += answers.values()
        states.append(state)
        run.close(Reply(node=u, round=orders[u].round, attempt=orders[u].attempt, arrays=a) for u, a in answers.items())
    return run.state, contributions, states


def marker(values: np.ndarray[Any, Any]) -> bytes:
    """What of an array's bytes would tell that they are there: from its first number that is not 0 to its last."""
    flat = np.ascontiguousarray(values).ravel()
    some = np.flatnonzero(flat)
    return b"" if len(some) < 3 else flat[some[0] : some[-1] + 1].tobytes()[:400]


def stored(folder: Path) -> bytes:
    """All that the server's database holds, pages that it no longer uses included."""
    return b"".join(path.read_bytes() for path in sorted(folder.glob("state.db*")))


# -------------------------------------------------------------------------------------------------------------- test


def test_devices_take_part_sealed_and_come_back_after_the_server_is_killed(server: Server) -> None:
    app = an_app(server)
    devices = [device(server, app, place) for place in range(N_USERS)]
    with server.control() as control:
        for one in devices:
            public = public_key_to_bytes(read_node_key(one.key).public_key())
            control.RegisterNode(RegisterNodeRequest(public_key=public))
    stranger = device(server, app, 0)
    assert stranger.part.once(5).refusal is Refusal.NOT_ENROLLED
    (server.folder / "other").mkdir()
    certificates(server.folder / "other")
    elsewhere = replace(app, ca=(server.folder / "other" / "ca.crt").read_text())
    assert device(server, elsewhere, 1, key=devices[1].key).part.once(1).refusal is Refusal.UNREACHABLE

    began = time.monotonic()
    try:
        for one in devices:
            assert one.part.start()
        server.submit(OURS, "tests.system.fleet_app:app")
        within(60, "two rounds", (server.folder / "done").exists)
        print(f"two rounds after {time.monotonic() - began:.1f} s")
        records = [json.loads(line) for line in (server.folder / "records.jsonl").read_text().splitlines()]
        print([round(r["seconds"], 1) for r in records])
        assert [(r["round"], r["drawn"], r["answered"], r["refused"]) for r in records] == [
            (1, 3, 3, {}),
            (2, 3, 3, {}),
        ]
        assert all(r["ran"] == str(ROOT / "server/penchant/server/rounds.py") for r in records)

        expected, contributions, states = by_hand()
        found = load_file(server.folder / "state.safetensors")
        assert found.keys() == expected.keys()
        for name in expected:
            np.testing.assert_array_equal(found[name], expected[name], err_msg=name)

        for one in devices:
            assert [(r.round, r.sealed, r.plan) for r in one.journal] == [
                (1, True, PLAN.digest),
                (2, True, PLAN.digest),
            ]
            assert "trust server" in one.journal[0].guarantee
        database = stored(server.folder)
        assert [1 for values in states[1].values() if (m := marker(values)) and m in database]  # so grep finds them
        secret = [m for sums in contributions for values in sums.values() if (m := marker(values))]
        assert len(secret) >= 2 * N_USERS
        assert not [m for m in secret if m in database]

        nodes = sorted(str(one.part.node_id) for one in devices)
        server.kill("flower-superlink")
        time.sleep(1.0)
        server.superlink()
        server.submit(THEIRS, "tests.system.fleet_app:foreign")
        within(60, "the foreign app heard from everybody", (server.folder / "foreign.json").exists)
        heard = json.loads((server.folder / "foreign.json").read_text())
        assert heard == {"nodes": nodes, "said": ["refused"] * N_USERS}
    except BaseException:
        print([[str(o) for o in one.outcomes] for one in devices])
        print(server.logs())
        raise
    finally:
        for one in devices:
            assert one.part.stop()
    # an app that was killed: the server takes its node for one that is there, and its number brings it back at once
    known = devices[0]
    assert device(server, app, 0, key=known.key).part.once(1).refusal is Refusal.NOT_ENROLLED
    assert device(server, app, 0, key=known.key, node_id=known.part.node_id).part.once(1) == Outcome()
    print(f"all after {time.monotonic() - began:.1f} s")
    assert [[str(o) for o in one.outcomes if o.took_part] for one in devices] == [
        ["took part in round 1", "took part in round 2"]
    ] * N_USERS
    within(5, "no thread is left", lambda: "penchant-rounds" not in [one.name for one in threading.enumerate()])
