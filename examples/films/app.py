"""A film app in one process with penchant in it: browse, watch, a list with reasons, what left this device, forget me.

    python examples/films/app.py        prints an address to open; the first time it makes the app's bundle

All that an app does with penchant is `ACTIONS`, `view` and the line that opens a `Client`. The rest is a web server
for this device alone. Any page in the same browser can send it requests and any user of the machine can connect to it,
so it answers under its own name only (a rebound name is another), with an `Origin` of its own or none, and gives what
is a person's only to who sends the token of the printed address, in a header: there is no cookie for another page.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hmac
import json
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from penchant.client import Client, SyncResult
from penchant.common.catalogue import Catalogue
from penchant.common.errors import InvalidConfig, PenchantError

HERE = Path(__file__).parent
CONSENT = "films-1"
"""Version of the text of consent in page.html, kept with the answer. A new text needs a new one, and a new answer."""

Said = Mapping[str, str]

# ------------------------------------------------------------------------------------------------------- penchant

ACTIONS: Mapping[str, Callable[[Client, Said], Any]] = {
    "watch": lambda me, said: me.observe(said["item"], "watch"),
    "like": lambda me, said: me.feedback(said["item"], "like"),
    "not_this_item": lambda me, said: me.feedback(said["item"], "not_this_item"),
    "not_this_topic": lambda me, said: me.feedback(said["item"], "not_this_topic", topic=said["topic"]),
    "allow": lambda me, said: me.allow(said["refused"]),
    "agree": lambda me, said: me.agree(said["trust"], consent=CONSENT),  # type: ignore[arg-type]  # it checks
    "sync": lambda me, said: in_words(me.sync(deadline_s=10), said["language"]),
    "forget": lambda me, said: asdict(me.forget(everything=said["rounds"] == "too")),
}
"""What the person can do. Each is one call, and changes the next `view`."""


def in_words(result: SyncResult, language: str) -> dict[str, Any]:
    return asdict(result) | {"sentence": result.sentence(language)}


def view(me: Client, catalogue: Catalogue, language: str) -> dict[str, Any]:
    """What the page shows of the person: a list with reasons, interests, and what left this device."""
    films = []
    for one in me.recommend(10):
        why = me.explain(one.item)
        films.append(film(catalogue, one.item) | {"why": why.sentence(language), "topic": why.topic})
    privacy = me.privacy()
    said = asdict(privacy) | {"release": str(privacy.release or "")}
    return {"films": films, "interests": asdict(me.interests(8)), "privacy": said}


class Films:
    """The catalogue, and the person until they are forgotten.

    Args:
        folder: of the person's state.
    """

    def __init__(self, folder: Path, bundle: Path) -> None:
        self._folder, self._bundle = folder, bundle
        self._begin()

    def _begin(self) -> None:
        self.me, self.receipt = Client.open(self._folder, bundle=self._bundle), None
        self.catalogue = self.me.catalogue

    def close(self) -> None:
        self.me.close()

    def get(self, name: str, said: Said) -> dict[str, Any]:
        """
        Raises:
            KeyError: no such name, or a field that is not there.
            PenchantError: as the SDK's calls.
        """
        if name == "catalogue":
            topics = {topic for own in self.catalogue.topics for topic in own}
            return {"name": self.catalogue.name, "topics": sorted(topics)}
        if name == "films":
            return self._found(said["words"].casefold().split(), said["topic"], int(said["after"]))
        if name == "kept":
            kept = self.me.export()
            items = {event["item"] for event in kept["events"]} | set(kept["refused_items"])
            return kept | {"titles": {item: film(self.catalogue, item)["title"] for item in items}}
        if name == "me":
            return {"receipt": self.receipt} if self.receipt else view(self.me, self.catalogue, said["language"])
        raise KeyError(name)

    def post(self, name: str, said: Said) -> dict[str, Any]:
        """As `get`, of what changes something; the answer has what came of it, and the new view."""
        result = None
        if name == "begin":
            self._begin()
        else:
            result = ACTIONS[name](self.me, said)
        if name == "forget":
            self.receipt = result
        else:
            self.catalogue = self.me.catalogue  # a sync may have brought another one
        return {"result": result} | self.get("me", said)

    def _found(self, words: Sequence[str], topic: str, after: int) -> dict[str, Any]:
        """Films with all words in their title and the topic, a page of them."""
        listed = zip(self.catalogue.ids, self.catalogue.titles, self.catalogue.topics, strict=True)
        found = [
            item
            for item, title, topics in listed
            if (not topic or topic in topics) and all(word in title.casefold() for word in words)
        ]
        return {"n": len(found), "films": [film(self.catalogue, item) for item in found[after : after + 12]]}


def film(catalogue: Catalogue, item: str) -> dict[str, Any]:
    """Title and topics of an item, also of one that this catalogue does not have."""
    place = catalogue.index.get(item)
    if place is None:
        return {"item": item, "title": item, "topics": ()}
    return {"item": item, "title": catalogue.titles[place], "topics": catalogue.topics[place]}


# ------------------------------------------------------------------------------------------------------------ HTTP

FILES = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/zh.json": ("zh.json", "application/json"),
}
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
MOST_DIGITS = 4
"""Of the length of a request's body in bytes."""


class Handler(BaseHTTPRequestHandler):
    """One request. `token` is what the page must send as X-Films."""

    protocol_version = "HTTP/1.1"
    timeout = 60  # of a connection that nothing is asked on
    disable_nagle_algorithm = True  # else each answer's body waits 40 ms for its headers to be acknowledged

    def __init__(self, films: Films, token: str, *args: Any) -> None:
        self._films, self._token = films, token
        super().__init__(*args)

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        if url.path in FILES and self._is_our_name():
            name, kind = FILES[url.path]
            self._send(200, (HERE / name).read_bytes(), kind)
        else:
            self._answer(url.path, self._films.get, lambda: dict(parse_qsl(url.query, keep_blank_values=True)))

    def do_POST(self) -> None:
        size = self.headers.get("Content-Length", "")
        self.close_connection = not size.isdecimal() or len(size) > MOST_DIGITS  # or the rest would be a request
        body = b"" if self.close_connection else self.rfile.read(int(size))
        self._answer(self.path, self._films.post, lambda: read(body))

    def _answer(self, path: str, call: Callable[[str, Said], Any], said: Callable[[], Said]) -> None:
        """A call's answer as JSON; what is wrong with a request as one sentence and a 4xx."""
        sent = self.headers.get("X-Films", "").encode()
        if not self._is_our_name() or not hmac.compare_digest(sent, self._token.encode()):
            status, answer = 403, {"error": "Open the whole address that the app printed when it started."}
        else:
            try:
                status, answer = 200, call(path.removeprefix("/api/"), said())
            except PenchantError as error:
                status, answer = 409, {"error": str(error)}
            except (KeyError, ValueError, RecursionError):
                status, answer = 400, {"error": "This app has no such request."}
        self._send(status, json.dumps(answer).encode(), "application/json")

    def _is_our_name(self) -> bool:
        port = self.connection.getsockname()[1]
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        return host in (f"127.0.0.1:{port}", f"localhost:{port}") and origin in (None, f"http://{host}")

    def _send(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Keeps no log: a search is the person's own."""


def read(body: bytes) -> Said:
    """
    Raises:
        ValueError, RecursionError: it is no JSON object of strings.
    """
    said = json.loads(body)
    if not isinstance(said, dict) or not all(isinstance(value, str) for value in said.values()):
        raise ValueError
    return said


@contextlib.contextmanager
def serving(films: Films, port: int = 0) -> Iterator[str]:
    """The address of the page, served by threads of this process until the end.

    Raises:
        OSError: the port is taken.
    """
    token = secrets.token_urlsafe(16)
    with ThreadingHTTPServer(("127.0.0.1", port), functools.partial(Handler, films, token)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/#token={token}"
        finally:
            server.shutdown()


# ----------------------------------------------------------------------------------------------------- the command


def made(folder: Path) -> Path:
    """The app's bundle, made once: a small private co-occurrence of MovieLens where it is installed, else synthetic.

    Raises:
        InvalidConfig: it could not be made; why is on standard error.
    """
    bundle = folder / "films.bundle"
    if not bundle.exists():
        print("Making the app's model, this once: some 10 seconds.", flush=True)
        with tempfile.TemporaryDirectory() as scratch:
            run = Path(scratch) / "run"
            penchant("simulate", "--quiet", "--learner", "cooccurrence", "--out", run)
            penchant("bundle", "--run", run, "--app-id", "films", "--keys", folder / "keys", "--out", bundle)
    return bundle


def penchant(*words: str | Path) -> None:
    command = [sys.executable, "-m", "penchant.common.cli", *map(str, words)]
    if subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode:
        raise InvalidConfig(f"penchant {words[0]} failed; give a bundle that you have with --bundle")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="A film app that keeps what you like on this device.")
    parser.add_argument("--state", type=Path, default=HERE / "state", metavar="DIR", help="default: beside this file")
    parser.add_argument("--bundle", type=Path, metavar="FILE", help="what the app ships with (default: made once)")
    parser.add_argument("--port", type=int, default=0, help="default: one that is free")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        options.state.mkdir(mode=0o700, parents=True, exist_ok=True)
        films = Films(options.state / "person", options.bundle or made(options.state))
        with contextlib.closing(films), serving(films, options.port) as address:
            print(f"Open {address}   (Ctrl-C stops it)", flush=True)
            while True:
                time.sleep(3600)
    except KeyboardInterrupt:
        print("\nStopped; what you did is kept.")
    except (PenchantError, OSError) as error:
        print(f"films: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
