"""Each thing that can be wrong with a folder is told by its own line, and by no other."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import shutil
import socket
import sqlite3
import ssl
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from penchant.common.artifacts.signing import SigningKey
from penchant.common.privacy.ledger import Ledger
from penchant.server import doctor, keys, tls
from penchant.server.database import Database
from penchant.server.doctor import Around, Line, check
from penchant.server.doctor_command import doctor as command
from penchant.server.folder import Folder, write_secret
from penchant.server.making import make
from tests.conftest import Require
from tests.server.commands import run
from tests.server.operators import CATALOGUE, DAY, a_plan, an_operator

NOW = 1_900_000_000_000
HOUR = 3_600_000


@pytest.fixture(autouse=True)
def _nginx(require: Require) -> None:
    if shutil.which("nginx", path="/usr/sbin") is None:
        require("nginx")


@pytest.fixture
def around(tmp_path: Path) -> Around:
    return Around(NOW, {"PATH": os.environ["PATH"]}, tmp_path, lambda address, ca: None)


def free_ports(n: int) -> list[int]:
    held = [socket.socket() for _ in range(n)]
    for one in held:
        one.bind(("127.0.0.1", 0))
    ports = [int(one.getsockname()[1]) for one in held]
    for one in held:
        one.close()
    return ports


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """One in which all is well."""
    names = ("edge", "operator", "superlink", "services")
    lines = [f'{name} = "127.0.0.1:{port}"' for name, port in zip(names, free_ports(4), strict=True)]
    made = an_operator(tmp_path / "prod", toml="[addresses]\n" + "\n".join(lines), now_ms=NOW)
    (made.path / "offline").rename(tmp_path / "stick")
    renew(made, NOW)
    return made


def renew(folder: Folder, now_ms: int, **options: object) -> None:
    authority = (folder.path.parent / "stick" / "ca.key").read_bytes()
    keys.renew_server(folder, authority, now_ms=now_ms, **options)  # type: ignore[arg-type]  # of several types


def wrong(folder: Folder, around: Around) -> list[Line]:
    return [line for line in check(folder.path, around) if line.level != "OK"]


def only(folder: Folder, around: Around, name: str, word: str, level: str = "MEND") -> None:
    """One line is not OK, and says this."""
    (line,) = wrong(folder, around)
    assert (line.name, line.level) == (name, level), line
    assert word in line.detail, line
    assert line.ok is (level == "WARN")


def sql(path: Path, *statements: str) -> None:
    with closing(sqlite3.connect(path)) as db:
        for statement in statements:
            db.execute(statement)
        db.commit()


# ------------------------------------------------------------------------------------------------------ all is well


def test_of_a_folder_in_order_every_line_is_ok(folder: Folder, around: Around) -> None:
    before = {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}
    lines = check(folder.path, around)
    assert [line for line in lines if line.level != "OK"] == []
    assert len(lines) == 14
    assert all(line.detail and not line.fix for line in lines)
    after = {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}
    assert {path: after[path] for path in before} == before
    said = " ".join(f"{line.detail} {line.fix}" for line in lines).encode()
    for path in folder.keys.iterdir():
        assert path.read_bytes().strip() not in said


def test_a_folder_that_is_nearly_gone_has_a_line_for_each_check_all_the_same(folder: Folder, around: Around) -> None:
    names = {line.name for line in check(folder.path, around)}
    for path in folder.path.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    lines = check(folder.path, around)
    assert {line.name for line in lines} == names
    assert all(line.fix for line in lines if line.level != "OK")
    assert {line.name for line in lines if line.ok} == {"offline keys", "disk", "versions", "Flower's calls home"}


def test_a_check_that_fails_itself_hides_no_other(
    folder: Folder, around: Around, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> Iterator[object]:
        raise ZeroDivisionError

    monkeypatch.setattr(shutil, "disk_usage", broken)
    only(folder, around, "disk", "ZeroDivisionError")


def test_the_command_says_each_line_and_its_exit_code_tells_what_is_to_be_mended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    an_operator(tmp_path / "prod", now_ms=int(datetime.datetime.now().timestamp() * 1000))
    (tmp_path / "prod" / "server.db").chmod(0o644)
    assert run(command, str(tmp_path / "prod")) == 1
    said = capsys.readouterr().out.splitlines()
    assert f"MEND file modes: server.db can be used by others → chmod 600 {tmp_path / 'prod' / 'server.db'}" in said
    assert any(line.startswith("WARN offline keys: ") for line in said)
    assert any(line.startswith("OK   ledger: 0 entries") for line in said)
    assert run(command, str(tmp_path / "prod"), "--json") == 1
    told = json.loads(capsys.readouterr().out)
    assert {"OK", "WARN", "MEND"} == {line["level"] for line in told}
    assert run(command, str(tmp_path / "nowhere")) == 2


# --------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("file", "text", "word"),
    [("plan.json", "{}", "plan"), ("task.json", "[]", "task.json"), ("server.toml", "app_id", "server.toml")],
)
def test_settings_that_cannot_be_read(folder: Folder, around: Around, file: str, text: str, word: str) -> None:
    (folder.path / file).write_text(text)
    found = {line.name: line for line in wrong(folder, around)}
    assert word in found["settings"].detail


def test_a_plan_of_another_population(folder: Folder, around: Around) -> None:
    (folder.path / "plan.json").write_text(replace(a_plan(3), population="others").to_json())
    found = {line.name: line for line in wrong(folder, around)}
    assert "another population" in found["settings"].detail


# ------------------------------------------------------------------------------------------------------ certificates


def test_a_certificate_by_another_authority(folder: Folder, around: Around) -> None:
    other = tls.new_server(tls.new_authority("films", now_ms=NOW), [], now_ms=NOW)
    (folder.tls / "server.crt").write_bytes(other.certificate)
    write_secret(folder.keys / "server.key", other.key)
    only(folder, around, "server certificate", "not by the authority")


def test_a_key_that_is_not_the_certificates(folder: Folder, around: Around) -> None:
    write_secret(folder.keys / "server.key", tls.new_authority("x", now_ms=NOW).key)
    only(folder, around, "server certificate", "keys/server.key is not the key")


def test_a_certificate_that_lacks_a_name(folder: Folder, around: Around) -> None:
    text = (folder.path / "server.toml").read_text()
    (folder.path / "server.toml").write_text(text.replace("localhost:8443", "films.example:8443"))
    found = {line.name: line for line in wrong(folder, around)}
    assert "not for films.example" in found["server certificate"].detail
    assert "--names films.example" in found["server certificate"].fix
    renew(folder, NOW, names=["films.example"])
    assert "server certificate" not in {line.name for line in wrong(folder, around)}


@pytest.mark.parametrize(
    ("at", "days", "level", "word"),
    [
        (0, 29, "WARN", "expires in 29 days"),
        (-20 * DAY, 19, "MEND", "has expired"),
        (2 * HOUR, 300, "MEND", "not valid before"),
    ],
)
def test_a_certificate_outside_its_time(
    folder: Folder, around: Around, at: int, days: int, level: str, word: str
) -> None:
    renew(folder, NOW + at, days=days)
    only(folder, around, "server certificate", word, level)


# -------------------------------------------------------------------------------------------------------- release key


def test_a_release_key_that_is_not_the_certificates(folder: Folder, around: Around) -> None:
    keys.write_signing_key(folder.keys / "release.key", SigningKey.generate())
    only(folder, around, "release key", "not the key that certificate.json names")


def test_a_release_key_and_a_channel_whose_time_is_over(folder: Folder, around: Around) -> None:
    renew(folder, NOW + 340 * DAY)
    found = wrong(folder, replace(around, now_ms=NOW + 340 * DAY))
    assert [(line.name, line.level) for line in found] == [("release key", "WARN"), ("release key", "MEND")]
    assert "expires in 25 days" in found[0].detail
    assert "channel stable has expired" in found[1].detail
    found = wrong(folder, replace(around, now_ms=NOW + 370 * DAY))
    assert [line.level for line in found] == ["MEND", "MEND"]
    assert "certificate.json has expired" in found[0].detail


class Killed(BaseException):
    """Not an error: nothing may catch it."""


@pytest.mark.parametrize("stop", ["key", "certificate", "named", "channel"])
def test_a_change_of_the_release_key_that_was_not_finished(folder: Folder, around: Around, stop: str) -> None:
    root = keys.read_signing_key((folder.path.parent / "stick" / "root.key").read_bytes())

    def at(point: str) -> None:
        if point == stop:
            raise Killed

    with pytest.raises(Killed):
        keys.rotate(folder, root, now_ms=NOW, at=at)
    found = wrong(folder, around)
    assert {line.name for line in found} == {"release key"}
    assert any("was not finished" in line.detail for line in found)
    assert all("keys rotate" in line.fix for line in found)
    keys.rotate(folder, root, now_ms=NOW)
    assert wrong(folder, around) == []


def test_a_channel_of_a_newer_key_than_the_one_that_was_restored(folder: Folder, around: Around) -> None:
    root = keys.read_signing_key((folder.path.parent / "stick" / "root.key").read_bytes())
    before = {path: path.read_bytes() for path in (folder.certificate, folder.keys / "release.key", folder.bundle)}
    keys.rotate(folder, root, now_ms=NOW)
    for path, data in before.items():
        path.write_bytes(data)
    only(folder, around, "release key", "newer key, serial 2")


def test_keys_that_lie_here_and_should_not(folder: Folder, around: Around) -> None:
    (folder.path.parent / "stick").rename(folder.path / "offline")
    only(folder, around, "offline keys", "root.key and ca.key", "WARN")


# --------------------------------------------------------------------------------------------------------- the machine


@pytest.mark.parametrize("name", ["keys", "keys/admin.token", "server.db", "ledgers/default.sqlite"])
def test_a_file_that_others_may_use(folder: Folder, around: Around, name: str) -> None:
    (folder.path / name).chmod(0o755)
    only(folder, around, "file modes", f"{name} can be used by others")


def test_a_file_of_another_user(folder: Folder, around: Around, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.stat

    def given_away(self: Path, **options: bool) -> os.stat_result:
        found = list(real(self, **options))
        if self.name == "admin.token":
            found[4] += 1
        return os.stat_result(found)

    monkeypatch.setattr(Path, "stat", given_away)
    only(folder, around, "file modes", "another user's")


def test_a_secret_that_is_gone(folder: Folder, around: Around) -> None:
    (folder.keys / "subjects.secret").unlink()
    only(folder, around, "file modes", "keys/subjects.secret is gone")


def test_a_clock_that_went_back(folder: Folder, around: Around) -> None:
    renew(folder, NOW - 2 * DAY)
    sql(folder.database, "UPDATE moves SET at_ms = 0", "UPDATE switches SET at_ms = 0")
    early = replace(around, now_ms=NOW - HOUR // 2)  # within what a certificate is dated back
    only(folder, early, "clock", "the ledger was written 1800 s from now on")
    sql(folder.database, f"INSERT INTO phases VALUES (1, '', 1, 0, 'open', {NOW + HOUR})")
    only(folder, around, "clock", "server.db was written 3600 s from now on")


def test_a_clock_that_another_server_disagrees_with(folder: Folder, around: Around) -> None:
    asked = list[str]()

    def other(address: str, ca: str) -> int:
        asked.append(address)
        return NOW + off

    off = 60_000
    only(folder, replace(around, date_ms=other), "clock", "60 s from this clock's", "WARN")
    off = -HOUR
    only(folder, replace(around, date_ms=other), "clock", "3600 s from this clock's")
    off = 2_000
    assert wrong(folder, replace(around, date_ms=other)) == []
    assert set(asked) == {folder.settings.addresses.public}


def test_a_disk_that_is_nearly_full(folder: Folder, around: Around, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(folder.path)
    for total, free, well in (
        (100 << 30, 1 << 30, True),
        (100 << 30, (1 << 30) - 1, False),
        (1 << 30, 60 << 20, True),
        (1 << 30, 40 << 20, False),
    ):
        now = usage._replace(total=total, free=free)
        monkeypatch.setattr(shutil, "disk_usage", lambda path, now=now: now)
        if well:
            assert wrong(folder, around) == []
        else:
            only(folder, around, "disk", f"{free >> 20} MB are free")


def test_a_disk_that_cannot_be_written(folder: Folder, around: Around, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(**_: object) -> None:
        raise OSError(30, "Read-only file system", str(folder.path))

    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    only(folder, around, "disk", "Read-only file system")


@contextmanager
def listening(address: str) -> Iterator[None]:
    host, _, port = address.rpartition(":")
    with socket.create_server((host, int(port))):
        yield


def told_running(folder: Folder, part: str, pid: int) -> None:
    started = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    (folder.run / f"{part}.json").write_text(json.dumps({"pid": pid, "started": started}))


def test_a_port_that_is_anothers(folder: Folder, around: Around) -> None:
    with listening(folder.settings.addresses.superlink):
        only(folder, around, "ports", "(superlink) is another program's")
        told_running(folder, "superlink", os.getpid())
        assert "ports" not in {line.name for line in wrong(folder, around)}
        (folder.run / "superlink.json").write_text(
            json.dumps({"pid": os.getpid(), "started": 1})
        )  # a number used again
        only(folder, around, "ports", "(superlink) is another program's")


def test_a_part_that_runs_and_does_not_listen(folder: Folder, around: Around) -> None:
    told_running(folder, "proxy", os.getpid())
    only(folder, around, "ports", "proxy runs and does not listen", "WARN")


def test_an_address_that_is_not_this_machines(folder: Folder, around: Around) -> None:
    text = (folder.path / "server.toml").read_text()
    edge = folder.settings.addresses.edge
    (folder.path / "server.toml").write_text(text.replace(edge, "192.0.2.1:9999"))
    only(folder, around, "ports", "cannot listen on 192.0.2.1:9999")


# ------------------------------------------------------------------------------------------------------- what is kept


def charged(folder: Folder, *rounds: int) -> None:
    plan = folder.plan
    with Ledger("default", delta=plan.delta, app_id="films", path=folder.ledger, now_ms=lambda: NOW) as ledger:
        for number in rounds:
            event = plan.event(number)
            assert event is not None
            ledger.charge(number, event, plan=plan.digest, cap=plan.charged_cap)


def test_a_release_that_is_not_charged(folder: Folder, around: Around) -> None:
    charged(folder, 1)
    sql(folder.database, "UPDATE progress SET done = 1")
    assert wrong(folder, around) == []
    sql(folder.database, "UPDATE progress SET done = 2")
    only(folder, around, "ledger", "round 2 was released and is not charged")
    sql(
        folder.database,
        "UPDATE progress SET done = 1",
        f"INSERT INTO rounds (plan, round, attempt, phase, at_ms, sum) "
        f"VALUES ('{folder.plan.digest}', 3, 0, 'released', 0, '')",
    )
    only(folder, around, "ledger", "round 3 was released and is not charged")


def test_a_ledger_that_was_changed_or_is_gone(folder: Folder, around: Around) -> None:
    charged(folder, 1)
    sql(folder.ledger, "DROP TRIGGER entries_UPDATE", "UPDATE entries SET record = replace(record, '0.5', '5.0')")
    assert {line.name for line in wrong(folder, around)} == {"clock", "ledger"}  # the clock's check reads it too
    folder.ledger.unlink()
    assert {line.name for line in wrong(folder, around)} == {"clock", "ledger"}


def test_a_ledger_of_another_budget(folder: Folder, around: Around) -> None:
    text = (folder.path / "server.toml").read_text()
    (folder.path / "server.toml").write_text(text.replace("schema_version", "budget = 3.0\nschema_version"))
    only(folder, around, "ledger", "another population, app, delta or budget")


def test_a_budget_without_room_for_the_next_round(tmp_path: Path, around: Around) -> None:
    names = ("edge", "operator", "superlink", "services")
    ports = [f'{name} = "127.0.0.1:{port}"' for name, port in zip(names, free_ports(4), strict=True)]
    made = an_operator(tmp_path / "a", toml="budget = 10.0\n[addresses]\n" + "\n".join(ports), now_ms=NOW)
    (made.path / "offline").rename(tmp_path / "stick")
    renew(made, NOW)
    assert wrong(made, around) == []
    plan, event = made.plan, made.plan.event(1)
    assert event is not None
    with Ledger(
        "default", delta=plan.delta, app_id="films", budget=10.0, path=made.ledger, now_ms=lambda: NOW
    ) as open_:
        open_.charge(1, event, plan=plan.digest, cap=plan.charged_cap)
    only(made, around, "ledger", "of a budget of 10: the next round has no room", "WARN")


def test_a_database_with_a_damaged_page(folder: Folder, around: Around) -> None:
    with Database(folder.database) as database, database.transaction() as db:
        db.executemany("INSERT INTO tokens VALUES (?, 0, 0, 1, NULL)", [(f"{i:064x}",) for i in range(400)])
    sql(folder.database, "PRAGMA wal_checkpoint(TRUNCATE)")
    data = bytearray(folder.database.read_bytes())
    page = data.rindex(f"{399:064x}".encode()) // 4096 * 4096
    data[page : page + 64] = b"\xff" * 64
    folder.database.write_bytes(data)
    only(folder, around, "database", "damaged")


def test_a_state_that_is_gone_damaged_or_of_another_plan(folder: Folder, around: Around) -> None:
    (path,) = folder.states.iterdir()
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    only(folder, around, "state", "damaged")
    path.unlink()
    only(folder, around, "state", "No such file")
    path.write_bytes(data)
    sql(folder.database, "UPDATE progress SET participations = x'00'")
    only(folder, around, "state", "another roster")
    sql(folder.database, "UPDATE progress SET plan = 'other'")
    only(folder, around, "state", "no checkpoint")


# ------------------------------------------------------------------------------------------------ versions and Flower


def test_another_version_of_flower(folder: Folder, around: Around, monkeypatch: pytest.MonkeyPatch) -> None:
    def other(name: str) -> str:
        if name == "flwr":
            return "1.42.0"
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", other)
    only(folder, around, "versions", "flwr 1.42.0")


def program(where: Path, told: str) -> str:
    where.mkdir()
    (where / "nginx").write_text(f"#!/bin/sh\necho '{told}' >&2\n")
    (where / "nginx").chmod(0o755)
    return str(where)


@pytest.mark.parametrize(
    ("told", "word"),
    [
        ("nginx version: nginx/1.22.1 --with-http_ssl_module", "without http_v2_module"),
        ("nginx version: nginx/1.22.1 --with-http_v2_module", "without http_ssl_module"),
        ("nginx version: nginx/1.10.3 --with-http_ssl_module --with-http_v2_module", "gRPC"),
        ("nginx/1.22.1 --with-http_ssl_module --with-http_v2_module --without-http_grpc_module", "gRPC"),
    ],
)
def test_an_nginx_that_cannot_be_the_edge(folder: Folder, around: Around, tmp_path: Path, told: str, word: str) -> None:
    only(folder, replace(around, environment={"PATH": program(tmp_path / "bin", told)}), "versions", word)


def test_no_nginx(folder: Folder, around: Around, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name, path: None)
    only(folder, around, "versions", "nginx is not installed")


def test_an_environment_that_lets_flower_call_home(folder: Folder, around: Around) -> None:
    loud = {**around.environment, "FLWR_TELEMETRY_ENABLED": "1"}
    only(folder, replace(around, environment=loud), "Flower's calls home", "FLWR_TELEMETRY_ENABLED", "WARN")
    quiet = {**around.environment, **doctor.QUIET}
    assert wrong(folder, replace(around, environment=quiet)) == []


def test_a_process_of_flowers_that_was_started_loud(folder: Folder, around: Around) -> None:
    def started(environment: dict[str, str]) -> subprocess.Popen[bytes]:
        process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, env=environment)
        told_running(folder, "superexec", process.pid)
        return process

    for environment, well in ((dict(doctor.QUIET), True), ({**doctor.QUIET, "FLWR_TELEMETRY_ENABLED": "1"}, False)):
        with started(environment) as process:
            if well:
                assert wrong(folder, around) == []
            else:
                only(folder, around, "Flower's calls home", "superexec runs without FLWR_TELEMETRY_ENABLED=0")
            process.communicate(b"\n")
    assert wrong(folder, around) == []  # it ended, and the file speaks of nobody


def test_a_configuration_of_flowers_in_the_users_home(folder: Folder, around: Around) -> None:
    (around.home / ".flwr").mkdir()
    (around.home / ".flwr" / "config.toml").touch()
    only(folder, around, "Flower's calls home", "config.toml", "WARN")


# ------------------------------------------------------------------------------------------------------------- bundle


def test_a_bundle_of_another_server(folder: Folder, around: Around, tmp_path: Path) -> None:
    text = (folder.path / "server.toml").read_text()
    (folder.path / "server.toml").write_text(text.replace("localhost:8443", "localhost:9443"))
    only(folder, around, "bundle", "another fleet, enrolment, distribution")
    (folder.path / "server.toml").write_text(text)
    other = make(
        tmp_path / "other",
        settings=folder.settings,
        catalogue=CATALOGUE,
        plan=folder.plan,
        task=folder.task,
        now_ms=NOW,
    )
    shutil.copy(other.bundle, folder.bundle)
    found = {line.name: line for line in wrong(folder, around)}
    assert set(found) == {"bundle", "release key"}
    assert "no valid signature" in found["bundle"].detail


# --------------------------------------------------------------------------------------------------------------- date


@pytest.fixture
def web(folder: Folder) -> Iterator[Callable[[str], int]]:
    """A TLS server with the folder's certificate of today, which says another date; its port."""
    servers = list[HTTPServer]()

    def serve(date: str) -> int:
        class Answer(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response_only(404)
                self.send_header("Date", date)
                self.end_headers()

            def log_message(self, format: str, *_: object) -> None:
                pass

        server = HTTPServer(("127.0.0.1", 0), Answer)
        trusted = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        trusted.load_cert_chain(folder.tls / "server.crt", folder.keys / "server.key")
        server.socket = trusted.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return int(server.server_address[1])

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def test_the_date_of_a_server_is_read_over_tls_and_only_of_the_right_one(
    tmp_path: Path, web: Callable[[str], int], folder: Folder
) -> None:
    today = int(datetime.datetime.now().timestamp() * 1000)
    authority = tls.new_authority("films", now_ms=today)
    server = tls.new_server(authority, [], now_ms=today)
    (folder.tls / "server.crt").write_bytes(server.certificate)
    write_secret(folder.keys / "server.key", server.key)
    port = web("Sun, 06 Nov 1994 08:49:37 GMT")
    trusted = authority.certificate.decode()
    assert doctor.date_ms(f"127.0.0.1:{port}", trusted) == 784_111_777_000
    assert doctor.date_ms(f"127.0.0.1:{port}", (folder.tls / "ca.crt").read_text()) is None
    assert doctor.date_ms(f"127.0.0.1:{free_ports(1)[0]}", trusted) is None
    assert doctor.date_ms(f"127.0.0.1:{web('yesterday')}", trusted) is None
