"""Devices on a real Flower server: TLS, node keys, ServerApps in a process of their own, and a kill in between.

The SuperLink, its SuperExec and each run's ServerApp are processes here, stopped by their own number; the devices are
three `Participation`s in this one, each with its own key, ledger and history. The folder that is submitted holds a
pyproject alone: what runs is the installed package.
"""

from __future__ import annotations

import datetime
import hashlib
import ipaddress
import json
import os
import secrets
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.request
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from flwr.cli.build import build_fab_from_disk
from flwr.proto.control_pb2 import RegisterNodeRequest, StartRunRequest
from flwr.proto.fab_pb2 import Fab
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from safetensors.numpy import load_file

from penchant.client._participation import Conditions, Outcome, Pace, Participation, Policy, Refusal, Report, fleet
from penchant.client._transport import new_node_key, read_node_key
from penchant.common.arrays import Arrays
from penchant.common.artifacts.bundle import App
from penchant.common.artifacts.signing import Certificate, SigningKey
from penchant.common.privacy.ledger import Ledger
from penchant.common.wire import Reply
from tests.system import fleet_app  # a SuperExec imports it under this name too
from tests.system.fleet_app import APP_ID, N_USERS, PEOPLE, PLAN, POPULATION

ROOT = Path(__file__).resolve().parents[2]
OURS, THEIRS = "films/rounds", "somebody/else"
WILLING = Policy(consent=True, trust="server")
HERE = Conditions(idle=lambda: True, charging=lambda: True, unmetered=lambda: True)
PACE = Pace(poll_s=0.3, retry_s=0.2, longest_s=2.0, refused_s=0.5, heartbeat_s=8.0)


# ------------------------------------------------------------------------------------------------------- the server


def certificates(folder: Path) -> None:
    """A certificate authority, and a server's certificate for this machine alone."""
    now = datetime.datetime.now(datetime.UTC)

    def issue(name: str, issuer: str, key: ec.EllipticCurvePrivateKey, signer: ec.EllipticCurvePrivateKey) -> bytes:
        made = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=name == issuer, path_length=None), critical=True)
        )
        if name != issuer:
            local = x509.SubjectAlternativeName(
                [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
            )
            made = made.add_extension(local, critical=False).add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False
            )
        return made.sign(signer, hashes.SHA256()).public_bytes(Encoding.PEM)

    authority, server = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    (folder / "ca.crt").write_bytes(issue("test-ca", "test-ca", authority, authority))
    (folder / "server.crt").write_bytes(issue("localhost", "test-ca", server, authority))
    (folder / "server.key").write_bytes(server.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def within(seconds: float, what: str, holds: Callable[[], object]) -> None:
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until, f"not within {seconds} s: {what}"
        time.sleep(0.05)


@dataclass
class Server:
    """A SuperLink and its SuperExec in a folder."""

    folder: Path
    port: int
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self, program: str, *options: str) -> None:
        parts = ("common", "client", "server", "simulations")
        paths = [*(str(ROOT / part) for part in parts), str(ROOT), os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            "FLWR_HOME": str(self.folder / "flwr"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
            "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", ""))),
            "PENCHANT_FLEET": str(self.folder),
        }
        with (self.folder / f"{program}.log").open("ab") as out:
            self.processes[program] = subprocess.Popen(
                [str(Path(sys.executable).parent / program), *options],
                stdout=out,
                stderr=out,
                env=environment,
                start_new_session=True,  # its children end with it, by the group's number
            )

    def superlink(self) -> None:
        files = {
            name: str(self.folder / name) for name in ("server.crt", "server.key", "ca.crt", "state.db", "sx.secret")
        }
        self.start(
            "flower-superlink",
            *("--host", "127.0.0.1", "--port", str(self.port), "--isolation", "process"),
            *("--ssl-certfile", files["server.crt"], "--ssl-keyfile", files["server.key"]),
            *("--ssl-ca-certfile", files["ca.crt"], "--enable-supernode-auth", "--database", files["state.db"]),
            *("--superexec-auth-secret-file", files["sx.secret"], "--disable-runtime-dependency-installation"),
        )
        within(40, "the SuperLink answers", self.healthy)

    def superexec(self) -> None:
        self.start(
            "flower-superexec",
            *("--runtime-api-address", self.address, "--root-certificates", str(self.folder / "ca.crt")),
            *("--superexec-auth-secret-file", str(self.folder / "sx.secret")),
        )

    def healthy(self) -> bool:
        trusted = ssl.create_default_context(cafile=str(self.folder / "ca.crt"))
        try:
            with urllib.request.urlopen(f"https://{self.address}/health", timeout=1, context=trusted) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def control(self) -> ControlHttpClient:
        return ControlHttpClient.from_server_address(self.address, False, (self.folder / "ca.crt").read_bytes(), [])

    def submit(self, name: str, component: str) -> None:
        """Starts a run of a folder that holds nothing but a pyproject."""
        publisher, _, app = name.partition("/")
        folder = self.folder / app
        folder.mkdir()
        (folder / "pyproject.toml").write_text(
            f'[project]\nname = "{app}"\nversion = "1.0.0"\ndescription = ""\nlicense = "Apache-2.0"\n'
            "dependencies = []\n"
            f'[tool.flwr.app]\npublisher = "{publisher}"\n[tool.flwr.app.components]\nserverapp = "{component}"\n'
            'clientapp = "penchant.client._flower:client_app"\n[tool.flwr.app.config]\n'
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of flwr's own making
            bundle = build_fab_from_disk(folder)
        with self.control() as control:
            fab = Fab(hash_str=hashlib.sha256(bundle).hexdigest(), content=bundle)
            assert control.StartRun(StartRunRequest(fab=fab)).run_id

    def kill(self, program: str) -> None:
        process = self.processes.pop(program)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)

    def logs(self) -> str:
        return "\n".join(f"{p.name}:\n{p.read_text(errors='replace')[-4000:]}" for p in self.folder.glob("*.log"))


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


def an_app(server: Server) -> App:
    """The bundle's record; its release key and certificate go where the ServerApp finds them."""
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
        fleet=server.address,
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
