"""Keeps a server's processes up, and a run submitted for as long as the operator wants rounds.

    SuperLink ──► services ──► proxy ──► SuperExec, which starts each run's ServerApp

Each is a process group of its own with its number in run/NAME.json; one that ends is started again, after a pause that
doubles. What an earlier supervisor left behind, killed before it could stop its parts, is stopped first. A run that
ended, or whose process is gone, is submitted again and goes on from the checkpoint; one that fails over and over is
held until the operator has seen why.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import signal
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from penchant.common.errors import InvalidConfig, Unreachable
from penchant.server import proxy, wanted
from penchant.server._flower import Control
from penchant.server.database import Database
from penchant.server.folder import Folder, write_json

log = logging.getLogger("penchant.server")
MOST_FAILURES = 5
"""Runs in a row that may end without a released round."""
LONELY_S = 20.0
"""After which a run whose process does not hold the lock yet is given up. A ServerApp takes about 5 s to start."""
GONE_S = 5.0
"""After which one whose process held the lock and does no more is. Flower takes a second to say that one is over."""


@dataclass
class Part:
    """One of the processes.

    Attributes:
        ready: whether it answers.
    """

    name: str
    command: tuple[str, ...]
    ready: Callable[[], bool]
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    pause_s: float = 1.0
    again: float = 0.0
    restarts: int = 0


@dataclass
class _Run:
    """The run that was submitted last."""

    id: int
    since: float
    done: int
    seen: float
    held: bool = False


class Supervisor:
    """
    Args:
        wait_s: that a part may take until it answers, at the start.

    Raises:
        InvalidConfig: another supervisor runs this folder, nginx is missing, or a part does not come up.
    """

    def __init__(self, folder: Folder, *, wait_s: float = 60.0) -> None:
        self.folder, self._wait_s = folder, wait_s
        self._lock = (folder.run / "supervisor.lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise InvalidConfig(f"{folder.path} is up already: penchant serve down {folder.path}") from None
        self._parts = self._all_parts()
        self._run: _Run | None = None
        self._failures, self._submit_at, self._asked_at = 0, 0.0, 0.0
        self._stopping = False

    # up and down

    def up(self, on_ready: Callable[[], None] = lambda: None) -> None:
        """Starts everything, and keeps it up until `stop` is called."""
        try:
            sweep(self.folder)
            write_json(self.folder.run / "supervisor.json", {"pid": os.getpid(), "started": _started(os.getpid())})
            for part in self._parts:
                self._start(part)
                self._await(part)
            log.info("all parts are up")
            on_ready()
            while not self._stopping:
                self.tick()
                time.sleep(0.5)
        finally:
            self.down()

    def stop(self) -> None:
        """Ends `up` soon; safe to call from a signal."""
        self._stopping = True

    def down(self) -> None:
        """Ends all parts, the last first, and waits for them."""
        for part in reversed(self._parts):
            if part.process is not None:
                end_group(part.process.pid)
                part.process.wait(10)
                part.process = None
            (self.folder.run / f"{part.name}.json").unlink(missing_ok=True)
        (self.folder.run / "supervisor.json").unlink(missing_ok=True)
        self._lock.close()

    def tick(self) -> None:
        """One look at every part, and at the run."""
        now = time.monotonic()
        for part in self._parts:
            if part.process is not None and part.process.poll() is not None:
                code = part.process.returncode
                log.warning("a part is started again", extra={"why": f"{part.name} ended", "code": code})
                end_group(part.process.pid)
                part.process, part.restarts = None, part.restarts + 1
                part.pause_s = 1.0 if now - part.started > 60 else min(2 * part.pause_s, 60.0)
                part.again = now + part.pause_s
            if part.process is None and now >= part.again:
                self._start(part)
        try:
            self._see_to_the_run(now)
        except Unreachable:
            pass  # the SuperLink is starting
        except Exception as error:  # whatever it was, the next look may mend it, and the parts stay up
            log.error("no run", exc_info=error)

    # parts

    def _start(self, part: Part) -> None:
        with (self.folder.logs / f"{part.name}.log").open("ab") as out:
            part.process = subprocess.Popen(
                part.command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=environment(self.folder),
                start_new_session=True,  # so that its own children end with it
            )
        part.started = time.monotonic()
        told = {"pid": part.process.pid, "started": _started(part.process.pid)}
        try:
            write_json(self.folder.run / f"{part.name}.json", told)
        except OSError as error:  # a full disk: only whoever sweeps after a killed supervisor would miss it
            log.warning("a part's number was not written down", exc_info=error)

    def _await(self, part: Part) -> None:
        until = time.monotonic() + self._wait_s
        while not part.ready():
            if part.process is None or part.process.poll() is not None or time.monotonic() > until:
                where = self.folder.logs / f"{part.name}.log"
                raise InvalidConfig(f"{part.name} did not come up: {_last_line(where)} (see {where})")
            if self._stopping:
                return
            time.sleep(0.1)

    def _all_parts(self) -> tuple[Part, ...]:
        folder, at = self.folder, self.folder.settings.addresses
        host, _, port = at.superlink.rpartition(":")
        edge = f"127.0.0.1:{at.edge.rpartition(':')[2]}"
        configuration = folder.run / "nginx.conf"
        configuration.write_text(proxy.configuration(folder))
        home = folder.path / "flower"
        home.mkdir(mode=0o700, exist_ok=True)
        superlink = (
            *(_program("flower-superlink"), "--host", host, "--port", port, "--isolation", "process"),
            *("--ssl-certfile", str(folder.tls / "server.crt"), "--ssl-keyfile", str(folder.keys / "server.key")),
            *("--ssl-ca-certfile", str(folder.tls / "ca.crt"), "--enable-supernode-auth"),
            *("--database", str(home / "state.db"), "--disable-runtime-dependency-installation"),
            *("--superexec-auth-secret-file", str(folder.keys / "superexec.secret")),
        )
        superexec = (
            *(_program("flower-superexec"), "--runtime-api-address", at.superlink),
            *("--root-certificates", str(folder.tls / "ca.crt")),
            *("--superexec-auth-secret-file", str(folder.keys / "superexec.secret")),
        )
        services = (sys.executable, "-m", "penchant.server.services", str(folder.path))
        return (
            Part("superlink", superlink, lambda: self._answers(f"https://{at.superlink}/health")),
            Part("services", services, lambda: self._answers(f"http://{at.operator}/healthz")),
            Part("proxy", tuple(proxy.command(configuration)), lambda: self._answers(f"https://{edge}/health")),
            Part("superexec", superexec, lambda: True),
        )

    def _answers(self, url: str) -> bool:
        trusted = ssl.create_default_context(cafile=str(self.folder.tls / "ca.crt"))
        try:
            with urllib.request.urlopen(url, timeout=1, context=trusted) as answer:  # our own addresses
                return bool(answer.status == 200)
        except OSError:
            return False

    # the run

    def _see_to_the_run(self, now: float) -> None:
        with Database(self.folder.database) as database:
            going = wanted.wanted(database)
            row = database.one("SELECT done FROM progress WHERE plan = ?", self.folder.plan.digest)
            done = 0 if row is None else int(row["done"])
            if self._run is not None:
                self._look_at(self._run, done, now)
            if self._run is None and going and done < self.folder.plan.rounds and now >= self._submit_at:
                if self._failures >= MOST_FAILURES:
                    wanted.pause(database, f"{self._failures} runs ended without a round: see logs/")
                    self._failures = 0
                    return
                with self._control() as control:
                    self._run = _Run(control.start(self.folder.path / "flower-app"), now, done, now)
                log.info("a run was submitted", extra={"round": done + 1})

    def _look_at(self, run: _Run, done: int, now: float) -> None:
        """Whether the run goes on, and when the next one may be submitted if it does not."""
        if held(self.folder.run / "rounds.lock"):
            run.seen, run.held = now, True
        if now - self._asked_at < 2.0:
            return
        self._asked_at = now
        with self._control() as control:
            status = control.status(run.id)
            over = status in ("completed", "failed", "stopped", "")
            if not over and now - run.seen > (GONE_S if run.held else LONELY_S):
                control.stop(run.id)
                status, over = "lost", True
        if over:
            self._failures = 0 if done > run.done or status in ("completed", "stopped") else self._failures + 1
            self._submit_at = now + (min(2.0**self._failures, 60.0) if self._failures else 0.0)
            log.info("the run is over", extra={"why": status or "unknown to the SuperLink"})
            self._run = None

    def _control(self) -> Control:
        return Control(self.folder.settings.addresses.superlink, (self.folder.tls / "ca.crt").read_bytes())


def environment(folder: Folder) -> Mapping[str, str]:
    """What every part runs with: Flower's telemetry, update check and installations off, and where the folder is."""
    return {
        **{
            name: value for name, value in os.environ.items() if name != "PENCHANT_PASSPHRASE"
        },  # a backup's, and no part's
        "FLWR_HOME": str(folder.path / "flower"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_LOG_LEVEL": "ERROR",  # below it, Flower writes down which node did what
        "PENCHANT_SERVER": str(folder.path),
        "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", ""))),
    }


def down(folder: Folder, *, wait_s: float = 30.0) -> bool:
    """Ends a server that runs in the background, and whatever one that was killed left; whether there was any."""
    running = _known(folder.run / "supervisor.json")
    if running is not None:
        os.kill(running, signal.SIGTERM)
        until = time.monotonic() + wait_s
        while _known(folder.run / "supervisor.json") == running and time.monotonic() < until:
            time.sleep(0.1)
    return sweep(folder) or running is not None


def sweep(folder: Folder) -> bool:
    """Ends parts that a supervisor left behind; whether there were any."""
    found = False
    for path in folder.run.glob("*.json"):
        pid = _known(path)
        if pid is not None and pid != os.getpid():
            end_group(pid)
            found = True
        path.unlink(missing_ok=True)
    return found


def held(path: Path) -> bool:
    """Whether some process holds this lock."""
    if not path.exists():
        return False
    with path.open("r") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def end_group(pid: int, *, grace_s: float = 5.0) -> None:
    """Ends a process group: asked first, made to after the grace."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(pid, number)
        except (ProcessLookupError, PermissionError):
            return
        until = time.monotonic() + grace_s
        while time.monotonic() < until:
            with suppress(ChildProcessError):
                os.waitpid(-pid, os.WNOHANG)
            try:
                os.killpg(pid, 0)
            except (ProcessLookupError, PermissionError):
                return
            time.sleep(0.05)


def _known(path: Path) -> int | None:
    """The process that a file speaks of, if it is still that one."""
    try:
        told = json.loads(path.read_text())
        pid = int(told["pid"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return pid if _started(pid) == told.get("started") and told.get("started") else None


def _started(pid: int) -> int:
    """When a process began, in ticks since the machine did, so that a number used again tells; 0 for none."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if after_name[0] == "Z" else int(after_name[19])


def _program(name: str) -> str:
    path = Path(sys.executable).parent / name
    if not path.is_file():
        raise InvalidConfig(f"{name} is not installed: pip install 'penchant[server]'")
    return str(path)


def _last_line(path: Path) -> str:
    try:
        lines = path.read_text(errors="replace").strip().splitlines()
    except OSError:
        lines = []
    return lines[-1][:200] if lines else "it said nothing"
