"""A whole server as an operator runs it, by its commands, on free ports of this machine."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from penchant.server.database import Database
from penchant.server.folder import Folder

ROOT = Path(__file__).resolve().parents[2]


def within(seconds: float, what: str, holds: Callable[[], object]) -> None:
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until, f"not within {seconds} s: {what}"
        time.sleep(0.05)


def free_ports(n: int) -> int:
    """The first of n ports in a row that nobody has now."""
    while True:
        with socket.socket() as first:
            first.bind(("127.0.0.1", 0))
            port = int(first.getsockname()[1])
        try:
            for one in range(port, port + n):
                with socket.socket() as found:
                    found.bind(("127.0.0.1", one))
        except OSError:
            continue
        return port


class Production:
    """
    Args:
        path: of the folder, made by `penchant serve init`.
        options: of that command.
    """

    def __init__(self, path: Path, *options: str, up: bool = True) -> None:
        self.path = path
        self.port = free_ports(4)
        self.penchant("serve", "init", str(path), "--port", str(self.port), *options)
        self.folder = Folder(path)
        if up:
            self.up()

    def penchant(self, *argv: str, ok: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
        """Runs a command; what it printed is shown where it fails."""
        parts = (str(ROOT / part) for part in ("common", "client", "server", "simulations", "."))
        path = os.pathsep.join((*parts, os.environ.get("PYTHONPATH", "")))
        done = subprocess.run(
            [sys.executable, "-m", "penchant.common.cli", *argv],
            capture_output=True,
            text=True,
            timeout=180,
            env={**os.environ, "PYTHONPATH": path},
            check=False,
            **options,
        )
        assert not ok or done.returncode == 0, f"{argv}: {done.returncode}\n{done.stdout}{done.stderr}\n{self.logs()}"
        return done

    def up(self) -> None:
        self.penchant("serve", "up", str(self.path), "--detach")

    def down(self) -> None:
        self.penchant("serve", "down", str(self.path), ok=False)

    def toml(self, **changes: object) -> None:
        """Changes keys of server.toml, each by its name alone."""
        place = self.path / "server.toml"
        text = place.read_text()
        for name, value in changes.items():
            line = f"{name} = {json.dumps(value)}"
            text, n = re.subn(rf"(?m)^{name} *=.*$", line, text)
            assert n == 1, f"{name} is in server.toml {n} times"
        place.write_text(text)
        self.folder = Folder(self.path)

    def pid(self, part: str) -> int:
        """Of superlink, services, proxy, superexec or supervisor."""
        return int(json.loads((self.path / "run" / f"{part}.json").read_text())["pid"])

    def kill(self, part: str) -> None:
        """Its whole process group, at once."""
        pid = self.pid(part)
        (os.kill if part == "supervisor" else os.killpg)(pid, signal.SIGKILL)

    def kill_everything(self) -> None:
        for part in ("supervisor", "superexec", "proxy", "services", "superlink"):
            self.kill(part)

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.penchant("round", "status", str(self.path), "--json").stdout)
        return found

    def phases(self) -> list[tuple[int, int, str]]:
        """Every change of a phase so far: round, try, phase."""
        with Database(self.folder.database) as database:
            rows = database.rows("SELECT round, attempt, phase FROM phases ORDER BY number")
        return [(row["round"], row["attempt"], row["phase"]) for row in rows]

    def tries(self) -> list[dict[str, Any]]:
        """Every try at a round, the oldest first."""
        with Database(self.folder.database) as database:
            rows = database.rows("SELECT * FROM rounds ORDER BY round, attempt")
        return [{**dict(row), "refused": json.loads(row["refused"])} for row in rows]

    def logs(self) -> str:
        return "\n".join(
            f"{path.name}:\n{path.read_text(errors='replace')[-3000:]}" for path in sorted(self.path.glob("logs/*"))
        )

    def bytes_of(self, *names: str) -> bytes:
        """All that lies under these parts of the folder."""
        found = b""
        for name in names:
            place = self.path / name
            for path in sorted(place.rglob("*")) if place.is_dir() else sorted(self.path.glob(f"{name}*")):
                found += path.read_bytes() if path.is_file() else b""
        return found
