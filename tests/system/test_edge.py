"""The edge before a real Flower server: devices take part through it, and of Flower's other APIs none is there."""

from __future__ import annotations

import importlib
import pkgutil
import secrets
from collections.abc import Iterator
from dataclasses import replace

import flwr.proto
import httpx
import pytest
from flwr.proto.control_pb2 import ListNodesRequest, RegisterNodeRequest
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.runtime.runtime_http_client import RuntimeHttpClient
from flwr.superlink.main import create_app
from flwr.supernode.main import app as supernode

from penchant.client._conditions import Refusal
from penchant.client._distribution import fetch_offer
from penchant.client._transport import read_node_key
from penchant.common.artifacts.bundle import Bundle
from penchant.common.errors import NotServed
from penchant.server import proxy
from penchant.server.distribution import Distribution
from penchant.server.folder import Folder
from tests.conftest import Require
from tests.processes import within
from tests.server.edges import Edge, a_folder, an_edge, request
from tests.system.devices import OURS, THEIRS, an_app, device
from tests.system.fleet_app import N_USERS
from tests.system.superlink import Server

OPEN = {f"/v1/fleet/{name}" for name in proxy.FLEET}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, require: Require) -> Iterator[Server]:
    """A SuperLink with the certificate of an operator's folder, that hands out tasks to whoever asks."""
    require("nginx")
    folder = a_folder(tmp_path_factory.mktemp("prod") / "prod")
    flower = tmp_path_factory.mktemp("flower")
    for theirs, ours in (("ca.crt", "tls/ca.crt"), ("server.crt", "tls/server.crt"), ("server.key", "keys/server.key")):
        (flower / theirs).write_bytes((folder.path / ours).read_bytes())
    (flower / "sx.secret").write_bytes(secrets.token_bytes(32))
    (flower / "sx.secret").chmod(0o600)
    (flower / "prod").symlink_to(folder.path)
    made = Server(flower, int(folder.settings.addresses.superlink.rpartition(":")[2]))
    try:
        made.superlink(secret=False)
        yield made
    finally:
        for program in list(made.processes):
            made.kill(program)


@pytest.fixture(scope="module")
def edge(server: Server) -> Iterator[Edge]:
    folder = Folder(server.folder / "prod")
    app = Bundle.app_of(folder.bundle)
    with (
        Distribution(
            {(app.app_id, app.population): folder.distribution},
            address=folder.settings.addresses.services,
            private_key=(folder.keys / "server.key").read_bytes(),
            chain=(folder.tls / "server.crt").read_bytes(),
        ),
        an_edge(folder) as port,
    ):
        yield Edge(folder, port)


def routes() -> set[tuple[str, str]]:
    """Method and path of everything that Flower serves: over HTTP as its own apps say, over gRPC as its files say."""
    found = set[tuple[str, str]]()
    for app in (create_app(), supernode):
        for path, operations in app.openapi()["paths"].items():
            found |= {(method.upper(), path) for method in operations}
        found |= {("GET", path) for path in (app.docs_url, app.openapi_url, app.redoc_url) if path}
    for module in pkgutil.iter_modules(flwr.proto.__path__):
        if module.name.endswith("_pb2"):
            file = importlib.import_module(f"flwr.proto.{module.name}").DESCRIPTOR
            for service in file.services_by_name.values():
                found |= {("POST", f"/{service.full_name}/{method.name}") for method in service.methods}
    return found


def tricks(path: str) -> list[str]:
    """The same path, written so that a proxy and a server may read it differently."""
    rest = path.removeprefix("/v1/")
    return [
        path,
        "/" + path,
        f"/v1/fleet/../{rest}",
        f"/v1/fleet/pull-messages/../../{rest}",
        f"/v1/fleet/%2e%2e/{rest}",
        f"/v1/fleet/..%2f{rest}",
        f"/v1/fleet%2f..%2f{rest}",
        f"/v1/fleetX/../{rest}",
        f"/./{path}",
        path.upper(),
        path.replace("/", "%2f"),
        path.replace("/", "\\"),
        path + "/",
        path + "?x",
        path + ";x",
        f"http://localhost{path}",
        f"https://127.0.0.1:8445{path}",
    ]


def test_of_all_that_flower_serves_a_device_reaches_its_nine_calls_and_health(edge: Edge) -> None:
    every = routes()
    assert {("POST", path) for path in OPEN} <= every
    assert {path.split("/")[2] for _, path in every if path.startswith("/v1/")} >= {"control", "fleet", "runtime"}
    assert len(every) > 100
    wrong = []
    for method, path in sorted(every):
        path = path.replace("{", "").replace("}", "")
        if path in OPEN:
            assert edge.ask(request(method, path, b"x"))[0] not in (403, 404), path  # the SuperLink's to refuse
        elif (method, path) in (("GET", "/health"), ("HEAD", "/health")):
            assert edge.ask(request(method, path))[0] == (200 if method == "GET" else 404)
        else:
            for one in tricks(path):
                status, _, body = edge.ask(request(method, one, b"x"))
                wrong += [(status, method, one, body)] if status not in (400, 403, 404) or body else []
    assert wrong == []


def test_whoever_asks_for_a_task_or_lists_nodes_gets_them_at_the_superlink_and_not_at_the_edge(
    server: Server, edge: Edge
) -> None:
    trusted = (server.folder / "ca.crt").read_bytes()
    server.submit(THEIRS, "tests.system.fleet_app:foreign")  # waits for a SuperExec, and there is none

    def control(port: int) -> ControlHttpClient:
        return ControlHttpClient.from_server_address(f"127.0.0.1:{port}", False, trusted, [])

    def runtime(port: int) -> RuntimeHttpClient:
        return RuntimeHttpClient.from_server_address(f"127.0.0.1:{port}", False, trusted, [])

    with control(edge.port) as there, pytest.raises(httpx.HTTPStatusError, match="404"):
        there.ListNodes(ListNodesRequest())
    with control(server.port) as there:
        there.ListNodes(ListNodesRequest())
    ask = AcquireTaskRequest(supported_task_types=["flwr-serverapp"])
    with runtime(edge.port) as queue, pytest.raises(httpx.HTTPStatusError, match="404"):
        queue.AcquireTask(ask)
    with runtime(server.port) as queue:
        assert queue.AcquireTask(ask).token


def test_devices_take_part_and_get_releases_through_the_edge(server: Server, edge: Edge) -> None:
    app = an_app(server, f"127.0.0.1:{edge.port}")
    devices = [device(server, app, place) for place in range(N_USERS)]
    with server.control() as control:
        for one in devices:
            public = public_key_to_bytes(read_node_key(one.key).public_key())
            control.RegisterNode(RegisterNodeRequest(public_key=public))
    assert device(server, app, 0).part.once(5).refusal is Refusal.NOT_ENROLLED
    server.superexec()
    try:
        for one in devices:
            assert one.part.start()
        server.submit(OURS, "tests.system.fleet_app:app")
        within(60, "two rounds", (server.folder / "done").exists)
    except BaseException:
        print([[str(o) for o in one.outcomes] for one in devices])
        print(server.logs())
        raise
    finally:
        for one in devices:
            assert one.part.stop()
    assert [[str(o) for o in one.outcomes if o.took_part] for one in devices] == [
        ["took part in round 1", "took part in round 2"]
    ] * N_USERS
    assert fetch_offer(Bundle.app_of(edge.folder.bundle), deadline_s=10)
    elsewhere = replace(Bundle.app_of(edge.folder.bundle), app_id="another")
    with pytest.raises(NotServed):
        fetch_offer(elsewhere, deadline_s=10)
