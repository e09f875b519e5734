"""Whatever happens and whoever logs it, a line is JSON of known keys, and nothing of one person is in it."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import structlog
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from penchant.common.artifacts.distribution_pb2 import GetBlobRequest, GetManifestRequest
from penchant.common.errors import InvalidConfig
from penchant.common.wire import Order
from penchant.server import logs, web
from penchant.server._flower import server_app
from penchant.server.database import Database
from penchant.server.distribution import SERVICE, Distribution
from penchant.simulations._flower import run_local
from tests.certificates import tls
from tests.server.history import serving
from tests.server.operators import NOW, an_operator
from tests.server.test_web import Server
from tests.system.fleet_app import N_USERS, new_rounds

NODE, ITEM, TOKEN, WHERE = 8198552921648689512, "film:17", "pt_" + "Aq3-x_" * 7 + "w", "203.0.113.7"
KEYS = {"at", "level", "part", "event", "logger", "error", "lines", "why", *logs.ALLOWED}


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Logging is one for the whole process: all that `configure` sets is put back."""
    root = logging.getLogger()
    loggers = [one for one in root.manager.loggerDict.values() if isinstance(one, logging.Logger)]
    kept = [(one, list(one.handlers), one.propagate) for one in (root, *loggers)]
    level = root.level
    for one, _, _ in kept:
        one.handlers = []  # and so not closed
    for module, name in ((sys, "excepthook"), (threading, "excepthook"), (logging, "raiseExceptions")):
        monkeypatch.setattr(module, name, getattr(module, name))
    yield
    logging.captureWarnings(False)
    structlog.reset_defaults()
    for handler in root.handlers:
        handler.close()
    for one, handlers, propagate in kept:
        one.handlers, one.propagate = handlers, propagate
    root.setLevel(level)


@pytest.fixture
def out() -> io.StringIO:
    found = io.StringIO()
    logs.configure("services", found)
    return found


def lines(text: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in text.splitlines()]
    for line in found:
        assert set(line) <= KEYS
        assert {"at", "level", "part", "event"} <= set(line)
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", line["at"])
    return found


def last(out: io.StringIO) -> dict[str, Any]:
    line = lines(out.getvalue())[-1]
    del line["at"]
    return line


LOG = logging.getLogger("penchant.server")


# ------------------------------------------------------------------------------------------------------ what is kept


def test_a_line_is_of_our_words_and_known_values(out: io.StringIO) -> None:
    said = {"round": 3, "attempt": 0, "phase": "released", "plan": "ab" * 32, "seconds": 1.5, "refused": {"late": 2}}
    expected = {"level": "info", "part": "services", "event": "round released", **said}
    LOG.info("round released", extra=said)
    assert last(out) == expected
    structlog.get_logger("penchant.server").info("round released", **said)
    assert last(out) == expected
    LOG.debug("nobody asked for this")
    assert len(lines(out.getvalue())) == 2


@pytest.mark.parametrize(
    "wrong",
    [
        {"node": NODE},
        {"node_id": 3, "place": 4, "user": 5},
        {"round": NODE},
        {"version": "7"},
        {"n": TOKEN},
        {"phase": ITEM},
        {"phase": "alien"},
        {"channel": "alien"},
        {"action": "pt_12"},
        {"plan": TOKEN},
        {"plan": [1]},
        {"seconds": [1.0]},
    ],
)
@pytest.mark.parametrize("way", ["logging", "structlog"])
def test_a_key_that_is_not_known_or_a_value_of_another_kind_is_left_out(
    out: io.StringIO, wrong: dict[str, Any], way: str
) -> None:
    if way == "logging":
        LOG.warning("something", extra=wrong)
    else:
        structlog.get_logger("penchant.server").warning("something", **wrong)
    assert last(out) == {"level": "warning", "part": "services", "event": "something"}


def test_reasons_that_are_none_of_ours_are_counted_and_not_named(out: io.StringIO) -> None:
    LOG.warning("answers left out", extra={"refused": {ITEM: 2, "alien": 1, "late": 3, "error": TOKEN}})
    assert last(out)["refused"] == {"other": 3, "late": 3, "error": 0}


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (f"node {NODE} is gone", "node … is gone"),
        (f"no item '{ITEM}'", "no item …"),
        (f'no item "{ITEM}": take another', "no item …: take another"),
        (f"token {TOKEN} is used up", "token … is used up"),
        ("pt_short", "…"),
        (f"{WHERE}:8443 called", "… called"),
        ("2001:db8::1:2 called", "… called"),
        (f"key {'ab' * 32}", "key …"),
        ("two\nlines\tof it", "two lines of it"),
        ("MalformedContribution of round 3, at most 100 bytes", "MalformedContribution of round 3, at most 100 bytes"),
    ],
)
def test_what_could_name_somebody_is_taken_out_of_every_text(out: io.StringIO, text: str, kept: str) -> None:
    LOG.warning(text)
    assert last(out)["event"] == kept
    LOG.warning("refused", extra={"reason": text})
    assert last(out)["reason"] == kept


def test_into_a_message_go_numbers_and_nothing_else(out: io.StringIO) -> None:
    for message, given, kept in (
        ("round %d: %d of %d", (3, 41, 50), "round 3: 41 of 50"),
        ("a node failed: %s", (f"user saw {ITEM}",), "a node failed: …"),
        ("node %s failed", (NODE,), "node … failed"),
        ("node %d failed", (NODE,), "node %d failed"),
        ("%s of %s", (ITEM, 3.5), "… of 3.5"),
        ("refused: %s", ({ITEM: 1, "late": 2},), "refused: {'other': 1, 'late': 2}"),
        ("too few: %s %s", (1,), "too few: %s %s"),
    ):
        LOG.warning(message, *given)
        assert last(out)["event"] == kept


# -------------------------------------------------------------------------------------------------------- exceptions


def test_an_exception_is_its_type_and_its_lines_and_only_ours_say_why(out: io.StringIO) -> None:
    def fail(error: Exception) -> dict[str, Any]:
        try:
            raise error
        except Exception:
            LOG.exception("a call failed")
        return last(out)

    found = fail(KeyError(f"{ITEM} {NODE} {TOKEN}"))
    assert (found["event"], found["error"], "why" in found) == ("a call failed", "KeyError", False)
    assert found["lines"][-1].startswith("test_logs.py:")
    found = fail(InvalidConfig(f"server.db: the disk is full; nothing was written for {NODE}"))
    assert found["why"] == "server.db: the disk is full; nothing was written for …"
    try:
        raise RuntimeError(TOKEN)
    except RuntimeError as error:
        structlog.get_logger("penchant.server").error("a call failed", exc_info=error)
    assert last(out)["error"] == "RuntimeError"
    for secret in (ITEM, str(NODE), TOKEN):
        assert secret not in out.getvalue()


def test_what_ends_a_process_or_a_thread_is_in_its_log_and_its_words_are_nowhere(tmp_path: Path) -> None:
    script = (
        "import sys, threading, warnings; from pathlib import Path; from penchant.server import logs\n"
        "logs.configure('rounds', Path(sys.argv[1]))\n"
        f"def fail(): raise ValueError({TOKEN!r})\n"
        "thread = threading.Thread(target=fail); thread.start(); thread.join()\n"
        f"warnings.warn({TOKEN!r})\n"
        "fail()\n"
    )
    path = tmp_path / "rounds.jsonl"
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")
    found = lines(path.read_text())
    assert [(line["part"], line["event"], line.get("error")) for line in found] == [
        ("rounds", "ended by an error", "ValueError"),
        ("rounds", "a library's message", None),
        ("rounds", "ended by an error", "ValueError"),
    ]
    assert TOKEN not in path.read_text()


# --------------------------------------------------------------------------------------------------------- libraries


@pytest.mark.parametrize("name", ["flwr", "httpx", "uvicorn.access", "uvicorn.error", "grpc._server", "py.warnings"])
def test_a_library_is_named_and_not_quoted(name: str) -> None:
    library = logging.getLogger(name)
    shown = io.StringIO()
    library.addHandler(logging.StreamHandler(shown))  # as Flower brings its own
    library.propagate = False
    out = io.StringIO()
    logs.configure("rounds", out)
    library.info("node %d answered from %s", NODE, WHERE)
    assert out.getvalue() == shown.getvalue() == ""
    library.warning(f"node {NODE} of {WHERE}: {ITEM}", extra={"round": 3, "reason": ITEM})
    assert last(out) == {
        "level": "warning",
        "part": "rounds",
        "event": "a library's message",
        "logger": name.split(".")[0] if "." not in name or name.startswith(("uvicorn", "grpc")) else "py",
    }
    assert shown.getvalue() == ""
    logging.getLogger(f"{NODE}").warning("a name of somebody's making")
    assert last(out)["logger"] == "other"


def test_warnings_go_the_same_way(out: io.StringIO) -> None:
    with warnings.catch_warnings():
        logging.captureWarnings(False)
        logging.captureWarnings(True)
        warnings.simplefilter("always")
        warnings.warn(f"about {ITEM}", UserWarning, stacklevel=1)
    assert ITEM not in out.getvalue()
    assert last(out)["event"] == "a library's message"


# ------------------------------------------------------------------------------------------------------------- files


def test_a_file_is_turned_over_and_the_oldest_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "MAX_BYTES", 1000)
    path = tmp_path / "services.jsonl"
    logs.configure("services", path)
    for n in range(100):
        LOG.info("one", extra={"n": n})
    logs.configure("services", path)  # once more changes nothing
    LOG.info("two")
    found = sorted(tmp_path.iterdir())
    assert [one.name for one in found] == ["services.jsonl", *(f"services.jsonl.{n}" for n in range(1, logs.KEPT + 1))]
    assert all(one.stat().st_size <= 1000 and lines(one.read_text()) for one in found)
    assert [line["event"] for line in lines(path.read_text())].count("two") == 1


# ----------------------------------------------------------------------------------------------------- a server's life


def devices() -> ClientApp:
    """One that answers, one that sends nonsense and one that fails with a person's doings in its words."""
    app = ClientApp()

    @app.query()
    def enrol(message: Message, context: Context) -> Message:
        here = MetricRecord({"partition": int(context.node_config["partition-id"])})
        return Message(RecordDict({"enrolment": here}), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] == 2:
            raise RuntimeError(f"node {context.node_id} of {WHERE} watched {ITEM} with {TOKEN}")
        order = Order.from_flat(dict(message.content.config_records["order"]))
        content = RecordDict(
            {"sum": ArrayRecord({ITEM: Array(message.content.array_records["state"].to_numpy_ndarrays()[0])})}
        )
        content["diagnostics"] = MetricRecord({"round": order.round, "attempt": order.attempt, "users": 1})
        return Message(content, reply_to=message)

    return app


def test_a_life_of_rounds_downloads_and_actions_leaves_nothing_of_anybody_in_the_log(tmp_path: Path) -> None:
    path, folder = tmp_path / "services.jsonl", an_operator(tmp_path / "prod")
    logs.configure("services", path)
    raw = io.StringIO()
    logging.getLogger("penchant").addHandler(logging.StreamHandler(raw))

    # rounds, with Flower
    run_local(server_app(new_rounds, lambda record, run: None, gather_s=0.0), devices(), N_USERS)

    # downloads, one of them from a damaged folder
    (folder.distribution / "channels/candidate.json").write_bytes(f"{ITEM} {TOKEN}".encode())
    authority = tls()
    with Distribution(
        {("films", "default"): folder.distribution},
        address="127.0.0.1:0",
        private_key=authority.private_key,
        chain=authority.chain,
    ) as service:
        trusted = grpc.ssl_channel_credentials(authority.ca)
        with grpc.secure_channel(f"127.0.0.1:{service.port}", trusted) as channel:
            asked = [
                ("GetManifest", GetManifestRequest(app_id="films", population="default", channel=name, wire_version=1))
                for name in ("stable", "candidate", ITEM, TOKEN)
            ]
            for name, request in asked:
                call = channel.unary_unary(f"/{SERVICE}/{name}", GetManifestRequest.SerializeToString, bytes)
                with contextlib.suppress(grpc.RpcError):
                    call(request, timeout=30)
            blob = channel.unary_stream(f"/{SERVICE}/GetModel", GetBlobRequest.SerializeToString, bytes)
            with pytest.raises(grpc.RpcError):
                list(blob(GetBlobRequest(app_id=ITEM, population=TOKEN, sha256="0" * 64), timeout=30))

    # the operator's actions, and strangers'
    class Registry:
        def promote(self, version: int) -> None:
            raise InvalidConfig(f"no version {version} for '{ITEM}'")

        def rollback(self) -> None:
            raise RuntimeError(f"{ITEM} {NODE}")

    made = web.application(
        folder, database_factory=lambda: Database(folder.database), models=lambda _: Registry(), now_ms=lambda: NOW
    )
    with serving(lambda _: made) as address:
        one = Server(folder, address=address)
        for method, asked_path, body, token in (
            ("GET", f"/{ITEM}?token={TOKEN}", None, ""),
            ("POST", "/v1/rounds/start", None, TOKEN),
            ("POST", "/v1/rounds/start", None, one.token),
            ("POST", "/v1/models/promote", {"version": 7}, one.token),
            ("POST", "/v1/models/rollback", None, one.token),
        ):
            one.ask(method, asked_path, body, token=token, X_Real_IP=WHERE)

    text = path.read_text()
    found = lines(text)
    events = [line["event"] for line in found]
    assert {"replies were left out", "an operator's action", "an operator's action was refused"} <= set(events)
    assert any(line.get("logger") == "uvicorn" and line.get("error") == "RuntimeError" for line in found)
    people = {ITEM, "film:", TOKEN, TOKEN[3:20], WHERE, str(NODE), one.token, "127.0.0.1"}
    assert [word for word in people if word in text] == []
    assert re.findall(r"\d{9,}", text) == []  # nor a number that Flower gave a node
    for secret in (ITEM, TOKEN, WHERE):
        assert secret in raw.getvalue()  # what was logged did have it
