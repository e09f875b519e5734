"""The edge passes on what a device calls, as it was meant and no further, and says and keeps nothing of who calls.

nginx is real here, and so are the distribution service and the client that downloads from it; the SuperLink is a server
that tells what reached it. tests/system/test_edge.py has Flower's own.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import os
import signal
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from penchant.client._distribution import fetch_blob, fetch_offer
from penchant.common.artifacts.bundle import App, Bundle
from penchant.common.artifacts.manifest import Blob
from penchant.common.errors import InvalidConfig, Unreachable
from penchant.server import proxy
from penchant.server.distribution import MAX_REQUEST, Distribution
from penchant.server.folder import Folder
from tests.certificates import Tls, tls
from tests.conftest import Require
from tests.processes import free_port, within
from tests.server import edges
from tests.server.edges import a_folder, an_edge, answer, request

LARGE = np.random.default_rng(0).bytes(64 << 20)
SMALL = LARGE[: 1 << 20]


# ------------------------------------------------------------------------------------------------- what is behind


@dataclass
class Heard:
    """What reached the SuperLink: each request's line, headers and size, and the files of bodies then."""

    port: int
    spool: Path = Path()
    requests: list[tuple[str, dict[str, str], int]] = field(default_factory=list)
    spooled: list[str] = field(default_factory=list)


def open_below(folder: Path) -> list[str]:
    """Files below a folder that any process has open: nginx unlinks those of bodies at once."""
    found = []
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            found += [name for name in [str(descriptor.readlink())] if name.startswith(f"{folder}/")]
    return found


def superlink(keys: Tls, folder: Path, port: int) -> tuple[http.server.ThreadingHTTPServer, Heard]:
    heard = Heard(port)

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            heard.requests.append((self.requestline, {k.lower(): v for k, v in self.headers.items()}, len(body)))
            heard.spooled += open_below(heard.spool / "body")
            self.send_response(200)
            self.send_header("Content-Length", "4")
            self.end_headers()
            self.wfile.write(b"here")

        do_GET = do_POST

        def log_message(self, format: str, *args: Any) -> None:
            pass

    (folder / "chain.pem").write_bytes(keys.chain)
    (folder / "key.pem").write_bytes(keys.private_key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "chain.pem", folder / "key.pem")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, heard


@dataclass(frozen=True)
class Edge(edges.Edge):
    heard: Heard
    app: App


@pytest.fixture(scope="module")
def behind(tmp_path_factory: pytest.TempPathFactory, require: Require) -> Iterator[Edge]:
    """The edge of a folder, with a distribution service of two more blobs and the SuperLink that tells."""
    require("nginx")
    folder = a_folder(tmp_path_factory.mktemp("prod") / "a folder")
    for data in (LARGE, SMALL):
        (folder.distribution / "blobs" / hashlib.sha256(data).hexdigest()).write_bytes(data)
    keys = Tls(
        (folder.tls / "ca.crt").read_bytes(),
        (folder.keys / "server.key").read_bytes(),
        (folder.tls / "server.crt").read_bytes(),
    )
    app = Bundle.app_of(folder.bundle)
    addresses = folder.settings.addresses
    server, heard = superlink(keys, tmp_path_factory.mktemp("superlink"), port_of(addresses.superlink))
    heard.spool = folder.run
    with (
        server,
        Distribution(
            {(app.app_id, app.population): folder.distribution},
            address=addresses.services,
            private_key=keys.private_key,
            chain=keys.chain,
        ),
        an_edge(folder) as port,
    ):
        yield Edge(folder, port, heard, app)
        server.shutdown()


def port_of(address: str) -> int:
    return int(address.rpartition(":")[2])


# ------------------------------------------------------------------------------------------------ what passes, what not


def test_each_call_of_a_device_reaches_the_superlink_by_its_own_name(behind: Edge) -> None:
    for name in proxy.FLEET:
        behind.heard.requests.clear()
        assert behind.post(f"/v1/fleet/{name}", b"ask")[::2] == (200, b"here")
        ((line, _, size),) = behind.heard.requests
        assert (line, size) == (f"POST /v1/fleet/{name} HTTP/1.1", 3)
    assert behind.ask(request("GET", "/health"))[::2] == (200, b"here")


TRICKS = (
    "/",
    "/v1/fleet",
    "/v1/fleet/",
    "/v1/fleet/register-node",
    "/v1/fleet/unregister-node",
    "/v1/fleet/get-fab",
    "/v1/fleet/pull-messages/",
    "/v1/fleet/pull-messages?x=1",
    "/v1/fleet/pull-messagesX",
    "/v1/fleetX/pull-messages",
    "//v1/fleet/pull-messages",
    "/v1//fleet/pull-messages",
    "/V1/Fleet/Pull-Messages",
    "/v1/fleet/%70ull-messages",
    "/v1/fleet%2fpull-messages",
    "/v1/control/../fleet/pull-messages",
    "/v1/fleet/./pull-messages",
    "/v1/fleet/pull-messages/../../control/start-run",
    "/v1/fleet/../control/start-run",
    "/v1/fleet/%2e%2e/control/start-run",
    "/v1/fleet/..%2fcontrol/start-run",
    "/v1/fleet/pull-messages%00",
    "/v1/fleet/pull-messages#/v1/control/start-run",
    "http://127.0.0.1/v1/control/start-run",
    "https://localhost:8445/v1/runtime/acquire-task",
    "/v1/control/start-run",
    "/v1/runtime/acquire-task",
    "/v1/runtime/responses",
    "/docs",
    "/openapi.json",
    "/metrics",
    "/ui",
    "/healthz",
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    "/grpc.health.v1.Health/Watch",
    "/penchant.v1.Distribution/",
    "/flwr.proto.Control/StartRun",
    "/server.toml",
    "/../keys/release.key",
)


@pytest.mark.parametrize("path", TRICKS)
def test_no_other_path_reaches_anything_and_the_answer_says_nothing(behind: Edge, path: str) -> None:
    behind.heard.requests.clear()
    for headers in (
        (),
        ("X-Forwarded-Host: localhost", "X-Original-URL: /v1/control/start-run", "X-Accel-Redirect: /"),
    ):
        status, head, body = behind.post(path, b"ask", *headers)
        assert status in (400, 404), path
        assert body == b""
        assert head.lower().count(b"nginx") == 1  # "Server: nginx", which it cannot leave out, and no version
        assert b"server: nginx\r\n" in head.lower() + b"\r\n"
    assert not behind.heard.requests


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "OPTIONS", "TRACE", "CONNECT", "post", "PROPFIND"])
def test_a_path_is_open_to_its_own_method_only(behind: Edge, method: str) -> None:
    behind.heard.requests.clear()
    assert behind.ask(request(method, "/v1/fleet/pull-messages"))[0] in (400, 404, 405)
    assert behind.ask(request("POST", "/health"))[0] == 404
    assert not behind.heard.requests


def test_a_host_of_another_name_changes_nothing(behind: Edge) -> None:
    for host in ("superlink", "127.0.0.1:8445", "localhost/../v1/control", ""):
        asked = request("POST", "/v1/control/start-run").replace(b"Host: localhost", f"Host: {host}".encode())
        assert behind.ask(asked)[0] in (400, 404)
        asked = request("POST", "/v1/fleet/get-run").replace(b"Host: localhost", f"Host: {host}".encode())
        assert behind.ask(asked)[0] in (200, 400)
    assert {headers["host"] for _, headers, _ in behind.heard.requests} <= {"localhost"}


def test_two_requests_in_one_body_are_one(behind: Edge) -> None:
    behind.heard.requests.clear()
    inner = request("POST", "/v1/control/start-run")
    for headers in (("Transfer-Encoding: chunked",), ("Transfer-Encoding: identity, chunked",)):
        behind.post("/v1/fleet/get-run", b"0\r\n\r\n" + inner, *headers)
    behind.post("/v1/fleet/get-run", inner)
    assert [line for line, _, _ in behind.heard.requests if "control" in line] == []


@pytest.mark.parametrize(
    "method",
    [
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        "/grpc.health.v1.Health/Watch",
        "/penchant.v1.Distribution/getmanifest",
        "/penchant.v1.Distribution//GetManifest",
        "/penchant.v1.Distribution/../penchant.v1.Distribution/GetManifest",
        "/flwr.proto.Control/StartRun",
        "/flwr.proto.Fleet/PullMessages",
    ],
)
def test_no_other_grpc_method_is_there(behind: Edge, method: str) -> None:
    with pytest.raises(grpc.RpcError) as found:
        behind.call(method)
    assert isinstance(found.value, grpc.Call)
    assert found.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_health_is_there(behind: Edge) -> None:
    assert behind.call("/grpc.health.v1.Health/Check") == b"\x08\x01"  # SERVING


# ------------------------------------------------------------------------------------------------- who calls


FORGED = {
    "X-Real-IP": "10.9.8.7",
    "X-Forwarded-For": "10.9.8.7",
    "X-Forwarded-Proto": "http",
    "X-Forwarded-Host": "elsewhere",
    "Forwarded": "for=10.9.8.7",
}


def test_the_superlink_is_told_no_address_whatever_a_client_says(behind: Edge) -> None:
    behind.heard.requests.clear()
    signed = ("flwr-public-key: k", "flwr-signature: s", "flwr-timestamp: t")
    behind.post("/v1/fleet/get-run", b"", *(f"{k}: {v}" for k, v in FORGED.items()), *signed)
    ((_, headers, _),) = behind.heard.requests
    assert not {name.lower() for name in FORGED} & headers.keys()
    assert "127.0.0.1" not in str(headers)
    assert [headers[f"flwr-{name}"] for name in ("public-key", "signature", "timestamp")] == ["k", "s", "t"]


def test_the_services_are_told_the_address_that_nginx_sees(tmp_path: Path, require: Require) -> None:
    require("nginx")
    folder = a_folder(tmp_path / "prod")

    def told(message: bytes, context: grpc.ServicerContext) -> bytes:
        return json.dumps([[k, v] for k, v in context.invocation_metadata() or () if isinstance(v, str)]).encode()

    handler = grpc.method_handlers_generic_handler(
        "penchant.v1.Enrolment", {name: grpc.unary_unary_rpc_method_handler(told) for name in ("Enrol", "Revoke")}
    )
    server = grpc.server(ThreadPoolExecutor(2), handlers=[handler])
    pair = ((folder.keys / "server.key").read_bytes(), (folder.tls / "server.crt").read_bytes())
    server.add_secure_port(folder.settings.addresses.services, grpc.ssl_server_credentials([pair]))
    server.start()
    with an_edge(folder) as port:
        edge = Edge(folder, port, Heard(0), Bundle.app_of(folder.bundle))
        forged = [(k.lower(), v) for k, v in FORGED.items()] * 2
        for name in ("Enrol", "Revoke"):
            found = json.loads(edge.call(f"/penchant.v1.Enrolment/{name}", metadata=forged))
            assert [v for k, v in found if k == "x-real-ip"] == ["127.0.0.1"]
            assert [v for k, v in found if k == "x-forwarded-for"] == ["127.0.0.1"]
            assert "10.9.8.7" not in str(found)
            assert "elsewhere" not in str(found)
    server.stop(None)


# ------------------------------------------------------------------------------------------------- how much


def test_a_body_over_the_limit_is_refused_and_one_at_the_limit_never_lies_on_the_disk(behind: Edge) -> None:
    for name, most in (("push-object", proxy.MAX_OBJECT), ("push-messages", proxy.MAX_CALL)):
        behind.heard.requests.clear()
        behind.heard.spooled.clear()
        assert behind.post(f"/v1/fleet/{name}", bytes(most))[0] == 200
        assert behind.heard.requests[0][2] == most
        assert behind.heard.spooled == []
        status, _, body = behind.post(f"/v1/fleet/{name}", bytes(most + 1))
        assert (status, body) == (413, b"")
        head = request("POST", f"/v1/fleet/{name}", b"", "Transfer-Encoding: chunked")
        head = head.replace(b"Content-Length: 0\r\n", b"")
        assert behind.ask(head + b"%x\r\n" % (most + 1) + bytes(most + 1) + b"\r\n0\r\n\r\n")[0] == 413
        assert len(behind.heard.requests) == 1
    with pytest.raises(grpc.RpcError):
        behind.call("/penchant.v1.Distribution/GetManifest", bytes(MAX_REQUEST + 2048))


def test_the_limit_of_an_object_is_what_flower_cuts_arrays_to() -> None:
    from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE

    assert FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE <= proxy.MAX_OBJECT - (32 << 10)


def test_who_asks_too_often_or_too_much_at_once_waits(tmp_path: Path, behind: Edge) -> None:
    folder = a_folder(tmp_path / "prod", superlink=behind.heard.port)
    share_keys(behind.folder, folder)
    with an_edge(folder, per_s=1) as port:
        with edge_of(behind, port).line() as line:
            line.sendall(b"".join([request("GET", "/health").replace(b"close", b"keep-alive")] * 8))
            line.sendall(request("GET", "/nothing"))
            said = everything(line)
        assert said.count(b"HTTP/1.1 200") == 3  # one and a burst of two
        assert said.count(b"HTTP/1.1 429") == 5
        assert b"<html>" not in said
    with an_edge(folder, at_once=1) as port:
        edge = edge_of(behind, port)
        with edge.line() as slow:
            slow.sendall(request("POST", "/v1/fleet/get-run", b"123456")[:-1])
            time.sleep(0.3)
            assert edge.post("/v1/fleet/get-run")[0] == 429
            slow.sendall(b"6")
            assert answer(slow)[0] == 200
        assert edge.post("/v1/fleet/get-run")[0] == 200


def edge_of(behind: Edge, port: int) -> Edge:
    """Another edge with the same certificate, before the same SuperLink."""
    return replace(behind, port=port)


def everything(line: ssl.SSLSocket) -> bytes:
    said = bytearray()
    while piece := line.recv(1 << 16):
        said += piece
    return bytes(said)


def test_a_client_that_sends_a_byte_a_second_is_cut_off(tmp_path: Path, behind: Edge) -> None:
    folder = a_folder(tmp_path / "prod", superlink=behind.heard.port)
    share_keys(behind.folder, folder)
    with an_edge(folder, timeout_s=1.5) as port:
        edge, asked = edge_of(behind, port), request("POST", "/v1/fleet/get-run", b"12")
        for given in (b"", asked[:40], asked[:-1]):  # nothing; a header that goes on; a body that does not
            with edge.line(10) as line:
                line.sendall(given)
                began = time.monotonic()
                said = drip(line, b"abcdefgh" if given == asked[:40] else b"")
                assert 1 < time.monotonic() - began < 6, given
                assert said in (b"", b"HTTP/1.1 408"), given
        assert edge.post("/v1/fleet/get-run")[0] == 200


def drip(line: ssl.SSLSocket, data: bytes) -> bytes:
    """Sends a byte a second until the other side ends the line; the first words of its answer."""
    line.settimeout(1.0)
    said = b""
    for byte in [*data, *[None] * 6]:
        try:
            if byte is not None:
                line.sendall(bytes([byte]))
            piece = line.recv(1 << 12)
            said += piece
            if not piece:
                break
        except TimeoutError:
            continue
        except (OSError, ssl.SSLError):
            break
    else:
        raise AssertionError("the line was never cut")
    return said[:12]


def share_keys(there: Folder, here: Folder) -> None:
    for name in ("tls/ca.crt", "tls/server.crt", "keys/server.key"):
        (here.path / name).write_bytes((there.path / name).read_bytes())


# ------------------------------------------------------------------------------------------------- TLS


def test_a_superlink_or_service_that_the_authority_does_not_vouch_for_gets_nothing(
    tmp_path: Path, behind: Edge
) -> None:
    services = port_of(behind.folder.settings.addresses.services)
    folder = a_folder(tmp_path / "prod", superlink=behind.heard.port, services=services)  # of another authority
    behind.heard.requests.clear()
    with an_edge(folder) as port:
        edge = Edge(folder, port, behind.heard, behind.app)
        status, _, body = edge.post("/v1/fleet/push-object", bytes(3 << 20))
        assert (status, body) == (502, b"")
        with pytest.raises(grpc.RpcError) as found:
            edge.call("/grpc.health.v1.Health/Check")
        assert isinstance(found.value, grpc.Call)
        assert found.value.code() is grpc.StatusCode.UNAVAILABLE
    assert not behind.heard.requests
    share_keys(behind.folder, folder)
    with an_edge(folder) as port:
        assert Edge(folder, port, behind.heard, behind.app).post("/v1/fleet/push-object", b"contribution")[0] == 200


def test_old_tls_is_refused(behind: Edge) -> None:
    for version, taken in ((ssl.TLSVersion.TLSv1_1, False), (ssl.TLSVersion.TLSv1_2, True)):
        context = ssl.create_default_context(cafile=behind.folder.tls / "ca.crt")
        context.set_ciphers("ALL:@SECLEVEL=0")
        with pytest.warns() if not taken else contextlib.nullcontext():
            context.minimum_version = context.maximum_version = version
        with socket.create_connection(("127.0.0.1", behind.port), 10) as plain:
            if taken:
                with context.wrap_socket(plain, server_hostname="localhost") as line:
                    assert line.version() == "TLSv1.2"
            else:
                with pytest.raises(ssl.SSLError, match="ALERT_PROTOCOL_VERSION"):  # the other side's word
                    context.wrap_socket(plain, server_hostname="localhost")
    with socket.create_connection(("127.0.0.1", behind.port), 10) as plain:
        plain.sendall(request("POST", "/v1/fleet/get-run"))
        said = plain.recv(1 << 16)
    assert said.startswith(b"HTTP/1.1 400")
    assert said.endswith(b"\r\n\r\n")


def test_new_certificates_are_taken_at_sighup_and_calls_go_on(tmp_path: Path, behind: Edge) -> None:
    folder, new = a_folder(tmp_path / "prod", superlink=behind.heard.port), tls()
    share_keys(behind.folder, folder)
    with an_edge(folder) as port, replace(behind, port=port).line() as old:
        old.sendall(request("POST", "/v1/fleet/get-run", b"12")[:-1])
        (folder.keys / "server.key").write_bytes(new.private_key)
        (folder.tls / "server.crt").write_bytes(new.chain)
        os.kill(int((folder.run / "nginx.pid").read_text()), signal.SIGHUP)

        def renewed() -> bool:
            return ssl.get_server_certificate(("127.0.0.1", port)) == new.chain.decode()

        within(10, "the new certificate", renewed)
        old.sendall(b"2")
        assert answer(old)[0] == 200


# ------------------------------------------------------------------------------------------------- downloads


def test_a_large_model_comes_through_the_edge_and_goes_on_where_it_broke_off(tmp_path: Path, behind: Edge) -> None:
    offer = fetch_offer(behind.app, deadline_s=10)
    assert offer.to_bytes() == (behind.folder.distribution / "channels/stable.json").read_bytes()
    part, blob = tmp_path / "part", Blob.of(LARGE)
    began = time.monotonic()
    assert fetch_blob(behind.app, blob, "model", part, deadline_s=120) == LARGE
    print(f"64 MiB in {time.monotonic() - began:.1f} s")
    with pytest.raises(Unreachable):  # the time is over on its way
        fetch_blob(behind.app, blob, "model", part, deadline_s=0.15)
    part.write_bytes(LARGE[: 40 << 20])
    assert fetch_blob(behind.app, blob, "model", part, deadline_s=120) == LARGE


def test_fifty_devices_download_at_once(tmp_path: Path, behind: Edge) -> None:
    def one(number: int) -> bool:
        kind = "model" if number % 2 else "catalogue"  # one as it is, one compressed
        return fetch_blob(behind.app, Blob.of(SMALL), kind, tmp_path / str(number), deadline_s=120) == SMALL  # type: ignore[arg-type]  # kind

    began = time.monotonic()
    with ThreadPoolExecutor(50) as pool:
        assert all(pool.map(one, range(50)))
    print(f"50 of 1 MiB in {time.monotonic() - began:.1f} s")


# ------------------------------------------------------------------------------------------------- what it keeps


def test_nothing_of_who_called_is_on_the_disk(behind: Edge) -> None:
    behind.post("/v1/fleet/get-run", b"x", "User-Agent: somebody")
    behind.post("/v1/nothing", b"x", "User-Agent: somebody")
    behind.post("/v1/fleet/push-messages", bytes(proxy.MAX_CALL + 1))
    with behind.line() as line:
        line.sendall(b"\x16\x03\x01garbage\r\n\r\n")
        answer(line)
    written = [path for name in ("run", "logs") for path in (behind.folder.path / name).rglob("*") if path.is_file()]
    assert {path.name for path in written} >= {"nginx.conf", "edge.log", "nginx.out"}
    for path in written:
        text = path.read_bytes()
        assert b"somebody" not in text
        if path.name != "nginx.conf":
            assert b"127.0.0.1" not in text
            assert b"/v1/" not in text


# --------------------------------------------------------------------------------------------- what an operator sees


def test_what_nginx_does_not_take_is_one_line(tmp_path: Path, require: Require) -> None:
    require("nginx")
    folder = a_folder(tmp_path / "prod")
    path = proxy.write(folder)
    path.write_text(path.read_text() + "nonsense;\n")
    with pytest.raises(InvalidConfig, match=r"nonsense") as found:
        proxy.check(path)
    assert len(str(found.value).splitlines()) == 1
    proxy.check(proxy.write(folder))
    (folder.keys / "server.key").write_bytes(tls().private_key)  # of another certificate
    with pytest.raises(InvalidConfig, match="key values mismatch"):
        proxy.check(path)


def test_without_nginx_the_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name, path: None)
    with pytest.raises(InvalidConfig, match="apt-get install nginx-light"):
        proxy.find_nginx()


def test_a_host_that_would_be_a_directive_is_refused(tmp_path: Path) -> None:
    folder = a_folder(tmp_path / "prod")
    for host in ("0.0.0.0; include x", "a b", "[::1", "$x"):
        addresses = replace(folder.settings.addresses, edge=f"{host}:{free_port()}")
        folder.settings = replace(folder.settings, addresses=addresses)
        with pytest.raises(InvalidConfig, match=r"addresses\.edge"):
            proxy.configuration(folder)
