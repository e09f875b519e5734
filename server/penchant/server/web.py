"""The operator's HTTP server: metrics, health, a page to look at, and four actions behind the admin token.

    GET  /metrics /healthz /readyz      Prometheus; whether the process lives; what is missing, as JSON
    GET  /ui /ui/events                 the page, and the same status each time it changed, as server-sent events
    POST /v1/rounds/start, pause        what the operator wants of the rounds; the round under way is finished
    POST /v1/models/promote, rollback   which model channel stable has: {"version": 7}; {} for rollback

It is for the operator's network, not for devices: nothing of one person is in it, and nothing changes without the
token. That travels in a header which no other page can make a browser send, so there is no cookie and nothing to forge;
a name that somebody else pointed here (DNS rebinding) is refused by its `Host`. The page loads nothing from elsewhere.

Source: https://html.spec.whatwg.org/multipage/server-sent-events.html; OAuth's bearer tokens, RFC 6750.
"""

from __future__ import annotations

import contextlib
import functools
import hmac
import json
import logging
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import anyio
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from penchant.common.errors import PenchantError
from penchant.server import monitoring, wanted
from penchant.server.database import Database
from penchant.server.folder import Folder, secret
from penchant.server.monitoring import Problem, Status

log = logging.getLogger("penchant.server")
HERE = Path(__file__).parent
PAGE = {"": ("ui.html", "text/html"), "/ui.css": ("ui.css", "text/css"), "/ui.js": ("ui.js", "text/javascript")}
WATCHERS = 16
"""Pages that are told of changes at the same time."""
BEAT_S = 5.0
"""How often a page is told that nothing changed; after three times that it calls the connection lost."""
MAX_BODY = 1024
_HEADERS = {
    "cache-control": "no-store",
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


class Models(Protocol):
    """What of the registry an operator can do here; either raises a PenchantError where it can't be."""

    def promote(self, version: int) -> object: ...

    def rollback(self) -> object: ...


Probe = Callable[[], str]
"""Why something is not there, in fixed words; "" where it is. It answers within a second or two."""


def application(
    folder: Folder,
    *,
    database_factory: Callable[[], Database],
    models: Callable[[Database], Models] | None = None,
    extra_routes: Sequence[BaseRoute] = (),
    probes: Mapping[str, Probe] | None = None,
    hosts: Sequence[str] = (),
    now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    every_s: float = 1.0,
    closing: threading.Event | None = None,
) -> Starlette:
    """The routes of the header, with what else the same server answers.

    Args:
        database_factory: opens server.db for the thread that calls it.
        models: the registry on such a database; without it no model can be promoted here.
        probes: by name, what else must be there for the server to be ready.
        hosts: names beside the operator's address under which it may be asked.
        every_s: how old a status may be.
        closing: once set, pages that watch are let go, so that the server can stop without breaking off an answer.
    """
    reader = _Reader(folder, database_factory, probes or {}, now_ms, every_s)
    metrics = monitoring.Metrics(reader.now)
    allowed = {folder.settings.addresses.operator.rpartition(":")[0].strip("[]"), "localhost", "127.0.0.1", *hosts}

    def alive(_: Request) -> Response:
        return JSONResponse({"alive": True})

    def ready(_: Request) -> Response:
        missing = reader.now()[1]
        return JSONResponse([vars(one) for one in missing], status_code=503 if missing else 200)

    def scraped(_: Request) -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    def start(_: Mapping[str, Any]) -> None:
        with database_factory() as database:
            wanted.start(database)

    def pause(_: Mapping[str, Any]) -> None:
        with database_factory() as database:
            wanted.pause(database)

    def on_models(act: Callable[[Models], object]) -> None:
        if models is not None:
            with database_factory() as database:
                act(models(database))

    actions: dict[str, Callable[[Mapping[str, Any]], object]] = {"rounds/start": start, "rounds/pause": pause}
    if models is not None:
        actions |= {
            "models/promote": lambda said: on_models(lambda registry: registry.promote(_version(said))),
            "models/rollback": lambda _: on_models(lambda registry: registry.rollback()),
        }
    acts = [
        Route(f"/v1/{name}", _behind_token(folder, functools.partial(_act, name, act)), methods=["POST"])
        for name, act in actions.items()
    ]
    return Starlette(
        routes=[
            Route("/healthz", alive),
            Route("/readyz", ready),
            Route("/metrics", scraped),
            Route("/", lambda _: RedirectResponse("/ui")),
            *(Route(f"/ui{path}", _file(*file)) for path, file in PAGE.items()),
            Route("/ui/events", _Watched(reader, closing or threading.Event()).respond),
            *acts,
            *extra_routes,
        ],
        lifespan=reader.lifespan,
        middleware=[Middleware(_Headers), Middleware(TrustedHostMiddleware, allowed_hosts=sorted(allowed))],
    )


class _Reader:
    """The status, read at most once in `every_s` however many ask, and what is missing for the server to be ready."""

    def __init__(
        self,
        folder: Folder,
        database: Callable[[], Database],
        probes: Mapping[str, Probe],
        now_ms: Callable[[], int],
        every_s: float,
    ) -> None:
        self._folder, self._database, self._probes = folder, database, probes
        self._now_ms, self.every_s = now_ms, every_s
        self._cache, self._lock, self._read_s = monitoring.Cache(), threading.Lock(), -every_s
        self._last: tuple[Status, tuple[Problem, ...]] | None = None

    def now(self) -> tuple[Status, tuple[Problem, ...]]:
        with self._lock:
            if self._last is None or time.monotonic() - self._read_s >= self.every_s:
                status = monitoring.read(
                    self._folder, now_ms=self._now_ms(), database=self._database, cache=self._cache
                )
                missing = [
                    Problem(part=name, why=why) for name, probe in self._probes.items() if (why := _asked(probe))
                ]
                self._last = status, (*monitoring.not_ready(status), *missing)
                self._read_s = time.monotonic()
            return self._last

    @contextlib.asynccontextmanager
    async def lifespan(self, _: Starlette) -> AsyncIterator[None]:
        yield
        self._cache.close()


def _asked(probe: Probe) -> str:
    try:
        return probe()
    except Exception:  # whatever a network does; its words may hold an address
        return "it does not answer"


# --------------------------------------------------------------------------------------------------------- the page


def _file(name: str, kind: str) -> Callable[[Request], Response]:
    text = (HERE / name).read_text(encoding="utf-8")
    return lambda _: Response(text, media_type=kind)


class _Watched:
    """The status to each page that watches: at once, whenever it changed, and a beat in between."""

    def __init__(self, reader: _Reader, closing: threading.Event) -> None:
        self._reader, self._closing = reader, closing
        self.watchers = 0

    async def respond(self, _: Request) -> Response:
        if self.watchers >= WATCHERS:
            return JSONResponse({"error": f"{WATCHERS} pages watch already: close one"}, status_code=503)
        return _Events(self, self._events(), media_type="text/event-stream")

    async def _events(self) -> AsyncIterator[str]:
        told: dict[str, Any] = {}
        told_s = time.monotonic()
        yield "retry: 2000\n\n"
        while not self._closing.is_set():
            status, missing = await run_in_threadpool(self._reader.now)
            record = {**status.to_record(), "missing": [vars(one) for one in missing]}
            at_ms = record.pop("at_ms")
            if record != told:
                told, told_s = record, time.monotonic()
                yield f"data: {json.dumps({**record, 'at_ms': at_ms}, separators=(',', ':'))}\n\n"
            elif time.monotonic() - told_s >= BEAT_S:
                told_s = time.monotonic()
                yield f"event: beat\ndata: {at_ms}\n\n"
            await anyio.sleep(self._reader.every_s)


class _Events(StreamingResponse):
    """Counts its page among the watchers until it is gone, however it goes."""

    def __init__(self, watched: _Watched, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._watched = watched

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._watched.watchers += 1
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._watched.watchers -= 1


# ------------------------------------------------------------------------------------------------------ the actions


class _BadRequest(Exception):
    """What was sent is no request; the message says what is."""


_Endpoint = Callable[[Request], Awaitable[Response]]


def _behind_token(folder: Folder, endpoint: _Endpoint) -> _Endpoint:
    """The endpoint for whoever sends keys/admin.token, which is read each time, so that a new one holds at once."""

    async def guarded(request: Request) -> Response:
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        try:
            token = (await run_in_threadpool(secret, folder.keys / "admin.token")).strip()
        except PenchantError as error:
            return JSONResponse({"error": str(error)}, status_code=500)
        # as UTF-8, since compare_digest takes no other text
        same = hmac.compare_digest(given.strip().encode("utf-8", "surrogateescape"), token)
        if kind.lower() != "bearer" or not token or not same:
            return JSONResponse(
                {"error": "this needs the admin token of keys/admin.token"},
                status_code=401,
                headers={"www-authenticate": "Bearer"},
            )
        return await endpoint(request)

    return guarded


async def _act(name: str, act: Callable[[Mapping[str, Any]], object], request: Request) -> Response:
    try:
        await run_in_threadpool(act, await _said(request))
    except _BadRequest as error:
        return JSONResponse({"error": str(error)}, status_code=400)
    except PenchantError as error:
        log.warning("an operator's action was refused", extra={"action": name.replace("/", " ")}, exc_info=error)
        return JSONResponse({"error": str(error)}, status_code=409)
    log.info("an operator's action", extra={"action": name.replace("/", " ")})
    return JSONResponse({"done": name})


async def _said(request: Request) -> Mapping[str, Any]:
    """The object in the request's body; {} where there is none."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY:
            raise _BadRequest(f"a body of more than {MAX_BODY} bytes")
    try:
        said = json.loads(body or b"{}")
    except (ValueError, RecursionError):
        said = None
    if not isinstance(said, dict):
        raise _BadRequest("the body must be a JSON object")
    return said


def _version(said: Mapping[str, Any]) -> int:
    version = said.get("version")
    if type(version) is not int or version < 1:
        raise _BadRequest('give the version to promote, as {"version": 7}')
    return version


class _Headers:
    """Puts the headers of `_HEADERS` on every answer, refusals included."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers[name] = value
            await send(message)

        await self._app(scope, receive, with_headers)
