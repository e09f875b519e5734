"""The operator's HTTP server: whoever asks may look, only the token acts, and no other site gets in between."""

from __future__ import annotations

import contextlib
import http.client
import json
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import pytest
from starlette.responses import JSONResponse
from starlette.routing import Route

from penchant.common.errors import InvalidConfig, PenchantError
from penchant.server import web
from penchant.server.database import Database
from penchant.server.folder import Folder, write_secret
from tests.server.history import History, serving
from tests.server.operators import DAY, NOW, an_operator


@dataclass
class Registry:
    """Writes down what it is asked for."""

    done: list[Any] = field(default_factory=list)
    error: PenchantError | None = None

    def promote(self, version: int) -> None:
        self._do(version)

    def rollback(self) -> None:
        self._do("rollback")

    def _do(self, what: Any) -> None:
        if self.error:
            raise self.error
        self.done.append(what)


@dataclass
class Server:
    """A started one, whose clock and probe a test sets."""

    folder: Folder
    registry: Registry = field(default_factory=Registry)
    address: str = ""
    now_ms: int = NOW
    probed: str = ""

    @property
    def token(self) -> str:
        return (self.folder.keys / "admin.token").read_text()

    def switch(self) -> str:
        with Database(self.folder.database) as database:
            return database.switch("rounds")

    def ask(
        self, method: str, path: str, body: Any = None, *, token: str = "", **headers: str
    ) -> tuple[int, Any, http.client.HTTPMessage]:
        """Status, answer and headers."""
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        if token:
            sent["Authorization"] = f"Bearer {token}"
        connection = http.client.HTTPConnection(urlsplit(self.address).netloc, timeout=30)
        with contextlib.closing(connection):
            text = body if isinstance(body, str | bytes) or body is None else json.dumps(body)
            connection.request(method, path, text, sent)
            reply = connection.getresponse()
            data = reply.read()
            is_json = reply.headers.get_content_type() == "application/json"
            return reply.status, json.loads(data) if is_json else data.decode(), reply.headers

    @contextlib.contextmanager
    def events(self) -> Iterator[Iterator[str]]:
        """The blocks of the event stream, each as it is sent."""
        connection = http.client.HTTPConnection(urlsplit(self.address).netloc, timeout=30)
        with contextlib.closing(connection):
            connection.request("GET", "/ui/events")
            reply = connection.getresponse()
            assert (reply.status, reply.headers.get_content_type()) == (200, "text/event-stream")

            def blocks() -> Iterator[str]:
                lines: list[str] = []
                while line := reply.readline().decode():
                    if line != "\n":
                        lines.append(line)
                    elif lines:
                        yield "".join(lines)
                        lines = []

            yield blocks()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(web, "BEAT_S", 0.2)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 40, total=1 << 41))  # others write
    one = Server(an_operator(tmp_path / "prod"))
    extra = Route("/v1/tokens", lambda _: JSONResponse({"token": "minted"}), methods=["POST"])

    def made(closing: threading.Event) -> Any:
        return web.application(
            one.folder,
            database_factory=lambda: Database(one.folder.database),
            models=lambda _: one.registry,
            extra_routes=[extra],
            probes={"superlink": lambda: one.probed},
            now_ms=lambda: one.now_ms,
            every_s=0.02,
            closing=closing,
        )

    with serving(made) as one.address:
        yield one


ACTIONS = ("/v1/rounds/start", "/v1/rounds/pause", "/v1/models/promote", "/v1/models/rollback")


def test_metrics_and_health_are_there_for_whoever_watches(server: Server) -> None:
    status, text, headers = server.ask("GET", "/metrics")
    assert (status, headers["Content-Type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
    assert 'penchant_model_version{channel="stable"} 1.0' in text
    assert server.ask("GET", "/healthz")[:2] == (200, {"alive": True})
    assert server.ask("GET", "/readyz")[:2] == (200, [])
    assert server.ask("POST", "/v1/tokens")[:2] == (200, {"token": "minted"})


def test_not_ready_says_what_is_missing_and_is_ready_again_once_it_is_back(server: Server) -> None:
    server.probed = "the SuperLink does not answer"
    server.now_ms = NOW + 31 * DAY
    time.sleep(0.05)
    status, missing, _ = server.ask("GET", "/readyz")
    assert status == 503
    assert [one["part"] for one in missing] == ["channels", "superlink"]
    assert server.ask("GET", "/healthz")[0] == 200
    assert "penchant_ready 0.0" in server.ask("GET", "/metrics")[1]
    server.probed, server.now_ms = "", NOW
    whole = server.folder.database.read_bytes()
    server.folder.database.write_bytes(b"damaged" * 999)
    time.sleep(0.05)
    assert [one["part"] for one in server.ask("GET", "/readyz")[1]] == ["database"]
    server.folder.database.write_bytes(whole)
    time.sleep(0.05)
    assert server.ask("GET", "/readyz")[:2] == (200, [])


def test_a_probe_that_fails_is_missing_and_its_words_are_not_shown(tmp_path: Path) -> None:
    def probe() -> str:
        raise OSError("connect 10.0.0.7:8445 refused")

    folder = an_operator(tmp_path / "prod")
    made = web.application(
        folder,
        database_factory=lambda: Database(folder.database),
        probes={"superlink": probe},
        now_ms=lambda: NOW,
    )
    with serving(lambda _: made) as address:
        one = Server(folder, address=address)
        status, missing, _ = one.ask("GET", "/readyz")
        assert (status, missing) == (503, [{"part": "superlink", "why": "it does not answer"}])
        assert one.ask("POST", "/v1/models/rollback", token=one.token)[0] == 404  # no registry was given


# ---------------------------------------------------------------------------------------------------------- actions


def test_the_token_starts_pauses_promotes_and_goes_back(server: Server) -> None:
    for path, body, switch in (
        ("/v1/rounds/start", None, "running"),
        ("/v1/rounds/pause", {}, "paused"),
        ("/v1/models/promote", {"version": 7}, "paused"),
        ("/v1/models/rollback", {}, "paused"),
    ):
        assert server.ask("POST", path, body, token=server.token)[:2] == (200, {"done": path.removeprefix("/v1/")})
        assert server.switch() == switch
    assert server.registry.done == [7, "rollback"]


def test_without_the_token_nothing_is_done_whatever_else_is_sent(server: Server) -> None:
    token, before = server.token, server.switch()
    wrong = [
        {},
        {"Authorization": token},
        {"Authorization": f"Basic {token}"},
        {"Authorization": "Bearer "},
        {"Authorization": f"Bearer {token[:-1]}"},
        {"Authorization": f"Bearer {token}x"},
        {"Authorization": "Bearer é"},
        {"Cookie": f"token={token}"},
    ]
    for path in ACTIONS:
        for headers in wrong:
            status, answer, found = server.ask("POST", path, {"version": 7, "token": token}, **headers)
            assert (status, found["WWW-Authenticate"]) == (401, "Bearer"), headers
            assert token not in json.dumps(answer)
        assert server.ask("POST", f"{path}?token={token}", {"version": 7})[0] == 401
        assert server.ask("GET", path, token=token)[0] == 405
        assert (
            server.ask("OPTIONS", path, Origin="https://films.example", Access_Control_Request_Method="POST")[0] == 405
        )
    assert (server.switch(), server.registry.done) == (before, [])


def test_a_token_that_was_replaced_no_longer_holds_and_one_that_others_may_read_never_does(server: Server) -> None:
    old = server.token
    write_secret(server.folder.keys / "admin.token", b"another")
    assert server.ask("POST", "/v1/rounds/start", token=old)[0] == 401
    assert server.ask("POST", "/v1/rounds/start", token="another")[0] == 200
    write_secret(server.folder.keys / "admin.token", b"\n")
    assert server.ask("POST", "/v1/rounds/pause", Authorization="Bearer ")[0] == 401
    write_secret(server.folder.keys / "admin.token", b"another")
    (server.folder.keys / "admin.token").chmod(0o644)
    status, answer, _ = server.ask("POST", "/v1/rounds/pause", token="another")
    assert (status, "chmod 600" in answer["error"]) == (500, True)
    assert server.switch() == "running"


def test_what_is_no_request_and_what_cannot_be_done_is_said_in_one_line(server: Server) -> None:
    for wrong in (
        "{",
        "[]",
        '"7"',
        "[" * 1000,
        "{}" + " " * 2000,
        b"\xff",
        "{}",
        '{"version": true}',
        '{"version": 0}',
        '{"version": "7"}',
    ):
        status, answer, _ = server.ask("POST", "/v1/models/promote", wrong, token=server.token)
        assert (status, list(answer)) == (400, ["error"]), wrong[:20]
    server.registry.error = InvalidConfig("there is no version 7: promote one of 1 to 6")
    status, answer, _ = server.ask("POST", "/v1/models/promote", {"version": 7}, token=server.token)
    assert (status, answer) == (409, {"error": "there is no version 7: promote one of 1 to 6"})
    assert server.registry.done == []


# ---------------------------------------------------------------------------------------------------- other sites


def test_a_name_that_somebody_else_pointed_here_is_refused(server: Server) -> None:
    port, before = urlsplit(server.address).port, server.switch()
    for path in ("/ui", "/ui/events", "/metrics", "/readyz"):
        for host in ("films.example", f"films.example:{port}", "127.0.0.1.films.example"):
            assert server.ask("GET", path, Host=host)[0] == 400
    assert server.ask("POST", "/v1/rounds/start", token=server.token, Host="films.example")[0] == 400
    assert server.switch() == before
    assert server.ask("GET", "/ui", Host=f"localhost:{port}")[0] == 200


def test_every_answer_forbids_frames_other_sources_and_caches(server: Server) -> None:
    for method, path in (
        ("GET", "/ui"),
        ("GET", "/ui/ui.js"),
        ("GET", "/nothing"),
        ("POST", ACTIONS[0]),
        ("GET", "/metrics"),
    ):
        headers = server.ask(method, path)[2]
        policy = headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'")
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert (headers["Cache-Control"], headers["X-Content-Type-Options"]) == ("no-store", "nosniff")
        assert headers["Set-Cookie"] is headers["Access-Control-Allow-Origin"] is None
    assert server.ask("GET", "/", Host=urlsplit(server.address).netloc)[2]["Location"] == "/ui"


def test_the_page_names_no_other_place(server: Server) -> None:
    for path in ("/ui", "/ui/ui.css", "/ui/ui.js"):
        text = server.ask("GET", path)[1]
        assert "//" not in text.replace("// ", "").replace("// -", ""), path
        assert "style=" not in text
        assert "innerHTML" not in text
    assert server.ask("GET", "/ui/web.py")[0] == server.ask("GET", "/ui/../web.py")[0] == 404


# ----------------------------------------------------------------------------------------------------------- events


def told(blocks: Iterator[str]) -> dict[str, Any]:
    """The next status of a stream."""
    found: dict[str, Any] = json.loads(next(one for one in blocks if one.startswith("data:")).removeprefix("data:"))
    return found


def test_a_page_is_told_at_once_and_again_only_of_changes(server: Server) -> None:
    history = History(server.folder)
    with server.events() as blocks:
        assert next(blocks).startswith("retry:")
        assert told(blocks)["phase"] == ""
        server.now_ms += 1  # time alone is no change
        beats = [next(blocks) for _ in range(3)]
        assert [beat.split()[:2] for beat in beats] == [["event:", "beat"]] * 3
        assert beats[-1] == f"event: beat\ndata: {server.now_ms}\n"
        history.round("training")
        seen = [told(blocks)["phase"]]
        while seen[-1] != "training":
            seen.append(told(blocks)["phase"])
        server.probed = "the SuperLink does not answer"
        assert told(blocks)["missing"] == [{"part": "superlink", "why": "the SuperLink does not answer"}]


def test_only_so_many_pages_watch_and_one_that_goes_makes_room(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "WATCHERS", 2)
    with server.events() as first:
        told(first)
        with server.events() as second:
            told(second)
            assert server.ask("GET", "/ui/events")[0] == 503
            assert server.ask("GET", "/ui")[0] == 200
        until = time.monotonic() + 10
        while server_full(server):
            assert time.monotonic() < until
            time.sleep(0.05)


def server_full(server: Server) -> bool:
    connection = http.client.HTTPConnection(urlsplit(server.address).netloc, timeout=30)
    with contextlib.closing(connection):
        connection.request("GET", "/ui/events")
        return connection.getresponse().status == 503


def test_a_server_that_stops_lets_its_pages_go(tmp_path: Path) -> None:
    folder = an_operator(tmp_path / "prod")
    made = lambda closing: web.application(  # noqa: E731  # passed on, and short
        folder, database_factory=lambda: Database(folder.database), every_s=0.02, closing=closing
    )
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        with serving(made) as address:
            blocks = stack.enter_context(Server(folder, address=address).events())
            told(blocks)
        assert list(blocks) == []
    assert time.monotonic() - started < 5


def test_nothing_that_is_answered_names_a_device_a_place_or_a_key(server: Server) -> None:
    history = History(server.folder)
    for place in range(3):
        history.place(place)
    history.round("abandoned", answered=0, refused={"node 7000000000000000001": 1, "film:7": 2})
    time.sleep(0.05)
    with server.events() as blocks:
        found = [json.dumps(told(blocks))]
    found += [str(server.ask("GET", path)[1]) for path in ("/metrics", "/readyz", "/ui")]
    secrets = [(server.folder.keys / name).read_bytes().hex() for name in ("subjects.secret", "superexec.secret")]
    secrets += [server.token, (server.folder.keys / "release.key").read_text().strip()]
    for text in found:
        for word in ("700000000000000000", "film:", "node-key", "node ", *secrets):
            assert word not in text, word
