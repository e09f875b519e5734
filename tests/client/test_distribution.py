"""A device gets what a channel has whole or not at all, goes on where it broke off, and keeps to its deadline."""

from __future__ import annotations

import hashlib
import http.server
import socket
import ssl
import subprocess
import sys
import threading
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from penchant.client._distribution import fetch_blob, fetch_offer
from penchant.common.artifacts.bundle import App, catalogue_bytes
from penchant.common.artifacts.distribution_pb2 import Chunk, GetBlobRequest, GetManifestRequest, GetManifestResponse
from penchant.common.artifacts.manifest import Blob, Seen
from penchant.common.errors import InvalidConfig, MalformedArtifact, NotServed, Unreachable
from scripts.wire_vectors import APP, CATALOGUE, MODEL, NOW_MS, ROOT, offer
from tests.certificates import Tls, tls

MODEL_BYTES, CATALOGUE_BYTES = MODEL.to_bytes(), catalogue_bytes(CATALOGUE)
LARGE = np.random.default_rng(0).bytes(1_000_000)
BLOBS = {"model": MODEL_BYTES, "catalogue": CATALOGUE_BYTES, "large": LARGE, "even": bytes(900_000), "none": b""}
KEYS = tls()
CA = KEYS.ca.decode()


def folder(path: Path) -> Path:
    """A distribution as docs/wire.md says, written by hand: the client knows nothing of the server's code."""
    (path / "channels").mkdir(parents=True)
    (path / "blobs").mkdir()
    (path / "channels/stable.json").write_bytes(offer().to_bytes())
    for data in BLOBS.values():
        (path / "blobs" / hashlib.sha256(data).hexdigest()).write_bytes(data)
    return path


# ----------------------------------------------------------------------------------- servers that do as they like

Answer = Callable[[http.server.BaseHTTPRequestHandler], None]


@contextmanager
def https(answer: Answer, keys: Tls, tmp_path: Path) -> Iterator[App]:
    """An HTTPS server whose answers are ours to spoil, and an app that asks it."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer(self)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            pass  # clients that leave

    pem = tmp_path / "server.pem"
    pem.write_bytes(keys.private_key + keys.chain)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    server = Server(("127.0.0.1", 0), Handler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield replace(APP, distribution=f"https://127.0.0.1:{server.server_port}/releases/", ca=CA)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def static(root: Path, *, ranges: bool = True, asked: list[str] | None = None, cut: int = 0) -> Answer:
    """Serves a folder as web servers do.

    Args:
        asked: gets the Range of each request.
        cut: bytes after which a blob's connection breaks; 0 never.
    """

    def answer(to: http.server.BaseHTTPRequestHandler) -> None:
        path = root / to.path.removeprefix("/releases/")
        if not to.path.startswith("/releases/") or ".." in to.path or not path.is_file():
            to.send_error(404)
            return
        data, span = path.read_bytes(), to.headers.get("Range", "")
        if asked is not None:
            asked.append(span)
        start = int(span.removeprefix("bytes=").removesuffix("-")) if span and ranges else 0
        if start >= len(data) and start:
            to.send_error(416)
            return
        to.send_response(206 if span and ranges else 200)
        if span and ranges:
            to.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        to.send_header("Content-Length", str(len(data) - start))
        to.end_headers()
        to.wfile.write(data[start : start + cut] if cut and path.parent.name == "blobs" else data[start:])
        if cut:
            to.wfile.flush()
            to.connection.shutdown(socket.SHUT_RDWR)

    return answer


Method = Callable[[Any, grpc.ServicerContext], Any]


def unasked(request: Any, context: grpc.ServicerContext) -> Any:
    raise AssertionError("nobody asks this")


@contextmanager
def service(manifest: Method = unasked, blob: Method = unasked, keys: Tls = KEYS) -> Iterator[App]:
    """A gRPC service of one's own making, and an app that asks it."""
    server = grpc.server(ThreadPoolExecutor(8))
    streamed = grpc.unary_stream_rpc_method_handler(blob, GetBlobRequest.FromString, Chunk.SerializeToString)
    single = grpc.unary_unary_rpc_method_handler(
        manifest, GetManifestRequest.FromString, GetManifestResponse.SerializeToString
    )
    handlers = {"GetModel": streamed, "GetCatalogue": streamed, "GetManifest": single}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("penchant.v1.Distribution", handlers),))
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(keys.private_key, keys.chain)]))
    server.start()
    try:
        yield replace(APP, distribution=f"127.0.0.1:{port}", ca=CA)
    finally:
        server.stop(0).wait()


@contextmanager
def real(root: Path, hear: Callable[[subprocess.Popen[str]], None] = lambda process: None) -> Iterator[App]:
    """The service itself, in a process of its own, which `hear` is told of."""
    code = """
import sys
from pathlib import Path
from penchant.server.distribution import Distribution
root, key, chain, app, population = sys.argv[1:]
files = {"private_key": Path(key).read_bytes(), "chain": Path(chain).read_bytes()}
with Distribution({(app, population): Path(root)}, address="127.0.0.1:0", **files) as made:
    print(made.port, flush=True)
    sys.stdin.read()
"""
    key, chain = root / "key.pem", root / "chain.pem"
    key.write_bytes(KEYS.private_key)
    chain.write_bytes(KEYS.chain)
    words = [sys.executable, "-c", code, root, key, chain, APP.app_id, APP.population]
    process = subprocess.Popen([str(word) for word in words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    hear(process)
    try:
        yield replace(APP, distribution=f"127.0.0.1:{int(process.stdout.readline())}", ca=CA)
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


@pytest.fixture(scope="module", params=["grpc", "https", "file"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    """An app of each kind of place that releases come from."""
    root = folder(tmp_path_factory.mktemp("source") / "releases")
    if request.param == "file":
        yield replace(APP, distribution=root.as_uri())
    elif request.param == "https":
        with https(static(root), KEYS, tmp_path_factory.mktemp("tls")) as app:
            yield app
    else:
        with real(root) as app:
            yield app


def get(app: App, data: bytes, part: Path, *, deadline_s: float = 20, kind: Any = "model") -> bytes:
    return fetch_blob(app, Blob.of(data), kind, part, deadline_s=deadline_s)


# --------------------------------------------------------------------------------------------- from any source


def test_a_channel_s_offer_comes_and_can_be_checked(source: App) -> None:
    found = fetch_offer(source, deadline_s=20, have="ab" * 32)
    assert found == offer()
    who = {"app_id": source.app_id, "population": source.population, "channel": source.channel}
    assert found.check(ROOT.public, **who, now_ms=NOW_MS, seen=Seen())[0].version == 1


@pytest.mark.parametrize("kind", ["model", "catalogue"])
@pytest.mark.parametrize("name", BLOBS)
def test_a_blob_comes_whole_and_leaves_no_part_behind(source: App, name: str, kind: str, tmp_path: Path) -> None:
    assert get(source, BLOBS[name], tmp_path / "part", kind=kind) == BLOBS[name]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("have", [1, 400_000, len(LARGE) - 1, len(LARGE)])
@pytest.mark.parametrize("kind", ["model", "catalogue"])
def test_a_download_goes_on_from_what_is_there(source: App, have: int, kind: str, tmp_path: Path) -> None:
    part = tmp_path / "part"
    part.write_bytes(LARGE[:have])
    assert get(source, LARGE, part, kind=kind) == LARGE
    assert not part.exists()


def test_a_part_that_is_too_long_is_begun_again(source: App, tmp_path: Path) -> None:
    part = tmp_path / "part"
    part.write_bytes(LARGE + b"x")
    assert get(source, LARGE, part) == LARGE


def test_what_is_not_there_is_not_served(source: App, tmp_path: Path) -> None:
    with pytest.raises(NotServed):
        fetch_offer(replace(source, channel="candidate"), deadline_s=20)
    part = tmp_path / "part"
    part.write_bytes(b"begun")
    with pytest.raises(NotServed):
        get(source, b"something else", part)
    assert part.exists()


def test_a_channel_s_name_cannot_leave_its_folder(source: App) -> None:
    with pytest.raises((NotServed, InvalidConfig)):
        fetch_offer(replace(source, channel="../blobs/" + hashlib.sha256(MODEL_BYTES).hexdigest()), deadline_s=20)


def test_a_part_of_other_bytes_is_found_out_and_thrown_away(source: App, tmp_path: Path) -> None:
    if source.distribution.startswith("file:"):
        return  # read at once
    part = tmp_path / "part"
    part.write_bytes(bytes(1000))
    with pytest.raises(MalformedArtifact):
        get(source, LARGE, part)
    assert not part.exists()
    assert get(source, LARGE, part) == LARGE


def test_bytes_that_were_changed_at_the_source_are_never_given(tmp_path: Path) -> None:
    root = folder(tmp_path / "releases")
    place = root / "blobs" / hashlib.sha256(LARGE).hexdigest()
    for changed in (LARGE[:-1] + b"x", LARGE + b"x", LARGE[:-1], b""):
        place.write_bytes(changed)
        with pytest.raises(MalformedArtifact):
            get(replace(APP, distribution=root.as_uri()), LARGE, tmp_path / "part")
        with real(root) as app, pytest.raises(MalformedArtifact):
            get(app, LARGE, tmp_path / "part")
        with https(static(root), KEYS, tmp_path) as app, pytest.raises((MalformedArtifact, Unreachable)):
            get(app, LARGE, tmp_path / "part")


# -------------------------------------------------------------------------------------------- broken, on purpose


def test_a_server_gone_in_the_middle_leaves_the_part_and_another_goes_on(tmp_path: Path) -> None:
    root, part = folder(tmp_path / "releases"), tmp_path / "part"
    blob = Blob.of(LARGE)

    def breaks(request: GetBlobRequest, context: grpc.ServicerContext) -> Iterator[Chunk]:
        yield Chunk(data=LARGE[request.offset : request.offset + 300_000], size=len(LARGE))
        context.abort(grpc.StatusCode.UNAVAILABLE, "gone")

    with service(blob=breaks) as app:
        for expected in (300_000, 600_000):
            with pytest.raises(Unreachable):
                fetch_blob(app, blob, "model", part, deadline_s=20)
            assert part.read_bytes() == LARGE[:expected]
    with pytest.raises(Unreachable):  # nobody listens there now
        fetch_blob(app, blob, "model", part, deadline_s=5)
    assert part.stat().st_size == 600_000
    with real(root) as app:
        assert fetch_blob(app, blob, "model", part, deadline_s=20) == LARGE


def test_a_server_killed_in_the_middle_leaves_the_part(tmp_path: Path) -> None:
    """A real one, by SIGKILL, while the device has read some and its disk holds it."""
    root, part = folder(tmp_path / "releases"), tmp_path / "part"
    data = np.random.default_rng(1).bytes(96 << 20)
    blob = Blob.of(data)
    (root / "blobs" / blob.sha256).write_bytes(data)
    processes: list[subprocess.Popen[str]] = []
    with real(root, processes.append) as app, ThreadPoolExecutor(1) as pool:
        running = pool.submit(fetch_blob, app, blob, "model", part, deadline_s=60)
        while not part.exists() or not part.stat().st_size:
            time.sleep(0.001)
        processes[0].kill()
        with pytest.raises(Unreachable):
            running.result(timeout=60)
    got = part.stat().st_size
    assert 0 < got < len(data)
    assert part.read_bytes() == data[:got]
    with real(root) as app:
        assert fetch_blob(app, blob, "model", part, deadline_s=60) == data


def test_an_https_server_gone_in_the_middle_leaves_the_part_and_the_rest_alone_is_asked_for(tmp_path: Path) -> None:
    root, part, asked = folder(tmp_path / "releases"), tmp_path / "part", list[str]()
    with https(static(root, asked=asked, cut=300_000), KEYS, tmp_path) as app:
        for _ in range(3):
            with pytest.raises(Unreachable):
                get(app, LARGE, part)
        assert part.read_bytes() == LARGE[:900_000]
        assert get(app, LARGE, part) == LARGE
    assert asked == ["", "bytes=300000-", "bytes=600000-", "bytes=900000-"]


def test_an_https_server_that_knows_no_ranges_begins_again(tmp_path: Path) -> None:
    root, part = folder(tmp_path / "releases"), tmp_path / "part"
    part.write_bytes(LARGE[:777_777])
    with https(static(root, ranges=False), KEYS, tmp_path) as app:
        assert get(app, LARGE, part) == LARGE
    part.write_bytes(LARGE[:777_777])
    with https(static(root, ranges=False, cut=1000), KEYS, tmp_path) as app, pytest.raises(Unreachable):
        get(app, LARGE, part)
    assert part.read_bytes() == LARGE[:1000]


def slowly(to: http.server.BaseHTTPRequestHandler) -> None:
    to.send_response(200)
    to.end_headers()
    for _ in range(200):
        to.wfile.write(b"x")
        to.wfile.flush()
        time.sleep(0.05)


def headers_slowly(to: http.server.BaseHTTPRequestHandler) -> None:
    to.wfile.write(b"HTTP/1.1 200 OK\r\n")
    for i in range(90):
        to.wfile.write(f"X-{i}: y\r\n".encode())
        to.wfile.flush()
        time.sleep(0.05)


def silent(to: http.server.BaseHTTPRequestHandler) -> None:
    time.sleep(5)


@pytest.mark.parametrize("answer", [slowly, headers_slowly, silent])
def test_an_https_server_that_dribbles_is_left_at_the_deadline(answer: Answer, tmp_path: Path) -> None:
    with https(answer, KEYS, tmp_path) as app:
        part = tmp_path / "part"
        for ask in (lambda: fetch_offer(app, deadline_s=0.5), lambda: get(app, LARGE, part, deadline_s=0.5)):
            started = time.monotonic()
            with pytest.raises(Unreachable):
                ask()
            assert time.monotonic() - started < 2


def test_a_grpc_server_that_dribbles_is_left_at_the_deadline_and_what_came_stays(tmp_path: Path) -> None:
    def drop(request: GetBlobRequest, context: grpc.ServicerContext) -> Iterator[Chunk]:
        yield Chunk(data=LARGE[:1], size=len(LARGE))
        for i in range(1, 100):
            time.sleep(0.05)
            yield Chunk(data=LARGE[i : i + 1])

    def sleeps(request: GetManifestRequest, context: grpc.ServicerContext) -> GetManifestResponse:
        time.sleep(3)
        return GetManifestResponse()

    part = tmp_path / "part"
    with service(manifest=sleeps, blob=drop) as app:
        for ask in (lambda: fetch_offer(app, deadline_s=0.5), lambda: get(app, LARGE, part, deadline_s=0.5)):
            started = time.monotonic()
            with pytest.raises(Unreachable):
                ask()
            assert time.monotonic() - started < 2
    got = part.read_bytes()
    assert got
    assert got == LARGE[: len(got)]


def test_no_time_at_all_is_no_answer(source: App, tmp_path: Path) -> None:
    if source.distribution.startswith("file:"):
        return
    for deadline_s in (0.0, -1.0):
        with pytest.raises(Unreachable):
            fetch_offer(source, deadline_s=deadline_s)
        with pytest.raises(Unreachable):
            get(source, LARGE, tmp_path / "part", deadline_s=deadline_s)


def spoiled(*chunks: Chunk) -> Method:
    return lambda request, context: iter(chunks)


EVEN = BLOBS["even"]
SPOILED = {
    "more than was signed": (Chunk(data=LARGE, size=len(LARGE)), Chunk(data=b"x")),
    "another size": (Chunk(data=LARGE, size=len(LARGE) + 1),),
    "no size": (Chunk(data=LARGE),),
    "an unknown encoding": (Chunk(data=LARGE, size=len(LARGE), encoding="br"),),
    "no zlib stream": (Chunk(data=LARGE, size=len(LARGE), encoding="deflate"),),
    "a zip bomb": (Chunk(data=zlib.compress(bytes(64 << 20), 9), size=len(LARGE), encoding="deflate"),),
    "other bytes": (Chunk(data=bytes(len(LARGE)), size=len(LARGE)),),
}


@pytest.mark.parametrize("chunks", SPOILED.values(), ids=SPOILED.keys())
def test_a_stream_that_is_not_what_was_signed_is_malformed_and_kept_nowhere(
    chunks: tuple[Chunk, ...], tmp_path: Path
) -> None:
    with service(blob=spoiled(*chunks)) as app, pytest.raises(MalformedArtifact):
        get(app, LARGE, tmp_path / "part", kind="catalogue")
    assert list(tmp_path.iterdir()) == []


def test_a_stream_without_end_is_left_once_it_is_more_than_was_signed(tmp_path: Path) -> None:
    def endless(to: http.server.BaseHTTPRequestHandler) -> None:
        to.send_response(200)
        to.end_headers()
        while True:
            to.wfile.write(bytes(1 << 16))

    def stream(request: GetBlobRequest, context: grpc.ServicerContext) -> Iterator[Chunk]:
        while context.is_active():
            yield Chunk(data=bytes(1 << 16), size=len(LARGE))

    (tmp_path / "here").mkdir()
    with https(endless, KEYS, tmp_path) as app, pytest.raises(MalformedArtifact, match="more than"):
        get(app, LARGE, tmp_path / "here/part", deadline_s=5)
    with service(blob=stream) as app, pytest.raises(MalformedArtifact, match="more than"):
        get(app, LARGE, tmp_path / "here/part", deadline_s=5)
    assert list((tmp_path / "here").iterdir()) == []


def test_a_zip_bomb_takes_no_more_memory_than_was_signed(tmp_path: Path) -> None:
    bomb = zlib.compress(bytes(64 << 20), 9)
    with service(blob=spoiled(Chunk(data=bomb, size=1000, encoding="deflate"))) as app:
        tracemalloc.start()
        with pytest.raises(MalformedArtifact):
            get(app, bytes(1000), tmp_path / "part", kind="catalogue")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 8 << 20


def test_an_offer_that_is_none_is_malformed(tmp_path: Path) -> None:
    answers = [GetManifestResponse(), GetManifestResponse(certificate=b"{}", pointer=b"[]", manifest=b"\xff")]
    with service(manifest=lambda request, context: answers.pop()) as app:
        while answers:
            with pytest.raises(MalformedArtifact):
                fetch_offer(app, deadline_s=20)

    def endless(to: http.server.BaseHTTPRequestHandler) -> None:
        to.send_response(200)
        to.end_headers()
        for _ in range(1000):
            to.wfile.write(bytes(1 << 16))

    with https(endless, KEYS, tmp_path) as app, pytest.raises(MalformedArtifact, match="more than"):
        fetch_offer(app, deadline_s=20)


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (grpc.StatusCode.NOT_FOUND, NotServed),
        (grpc.StatusCode.FAILED_PRECONDITION, MalformedArtifact),
        (grpc.StatusCode.INVALID_ARGUMENT, InvalidConfig),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, Unreachable),
        (grpc.StatusCode.UNAVAILABLE, Unreachable),
        (grpc.StatusCode.INTERNAL, Unreachable),
        (grpc.StatusCode.UNKNOWN, Unreachable),
        (grpc.StatusCode.CANCELLED, Unreachable),
        (grpc.StatusCode.UNIMPLEMENTED, Unreachable),
    ],
    ids=str,
)
def test_a_status_is_a_typed_error_without_the_server_s_words(
    status: grpc.StatusCode, error: type[Exception], tmp_path: Path
) -> None:
    def refuses(request: Any, context: grpc.ServicerContext) -> Any:
        context.abort(status, "words of the server\n")

    with service(manifest=refuses, blob=refuses) as app:
        for ask in (lambda: fetch_offer(app, deadline_s=20), lambda: get(app, LARGE, tmp_path / "part")):
            with pytest.raises(error) as caught:
                ask()
            assert type(caught.value) is error
            assert "words of the server" not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (404, NotServed),
        (410, NotServed),
        (416, MalformedArtifact),
        (403, Unreachable),
        (500, Unreachable),
        (503, Unreachable),
    ],
)
def test_an_http_status_is_a_typed_error(status: int, error: type[Exception], tmp_path: Path) -> None:
    with https(lambda to: to.send_error(status), KEYS, tmp_path) as app, pytest.raises(error):
        fetch_offer(app, deadline_s=20)


def test_a_server_that_sends_another_part_than_asked_for_is_found_out(tmp_path: Path) -> None:
    def wrong(to: http.server.BaseHTTPRequestHandler) -> None:
        to.send_response(206)
        to.send_header("Content-Range", f"bytes 0-9/{len(LARGE)}")
        to.end_headers()
        to.wfile.write(LARGE[:10])

    part = tmp_path / "part"
    part.write_bytes(LARGE[:500])
    with https(wrong, KEYS, tmp_path) as app, pytest.raises(MalformedArtifact):
        get(app, LARGE, part)


def test_no_redirect_leads_out_of_tls(tmp_path: Path) -> None:
    for target in ("http://127.0.0.1:1/offer", "file:///etc/passwd", "ftp://127.0.0.1/offer"):

        def away(to: http.server.BaseHTTPRequestHandler, target: str = target) -> None:
            to.send_response(302)
            to.send_header("Location", target)
            to.end_headers()

        with https(away, KEYS, tmp_path) as app, pytest.raises(Unreachable):
            fetch_offer(app, deadline_s=20)


def test_another_authority_s_server_or_none_at_all_is_unreachable(tmp_path: Path) -> None:
    other = tls()
    with service(keys=other) as app:
        for ca in (CA, ""):
            with pytest.raises(Unreachable):
                fetch_offer(replace(app, ca=ca), deadline_s=10)
    with https(static(tmp_path), other, tmp_path) as app:
        for ca in (CA, ""):
            with pytest.raises(Unreachable):
                fetch_offer(replace(app, ca=ca), deadline_s=10)
        with pytest.raises(InvalidConfig, match="not certificates"):
            fetch_offer(replace(app, ca="no certificate"), deadline_s=10)


@pytest.mark.parametrize("place", ["", "http://127.0.0.1/releases", "ftp://host/releases", "://"])
def test_a_bundle_that_names_no_place_says_so(place: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="distribution"):
        fetch_offer(replace(APP, distribution=place), deadline_s=1)
    with pytest.raises(InvalidConfig, match="distribution"):
        get(replace(APP, distribution=place), LARGE, tmp_path / "part")


def test_importing_it_brings_no_grpc_and_no_http() -> None:
    code = (
        "import sys; import penchant.client._distribution; "
        "print([m for m in ('grpc', 'google.protobuf', 'urllib.request', 'ssl', 'flwr') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
