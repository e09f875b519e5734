"""A ServerApp as an operator's, that one named fault meets once: a kill, a full disk, or a clock that jumps.

The folder's fault.json says which: {"point", "does", "done"}. Whoever comes to its point, with so many rounds done,
renames it to fault.done, so that it happens once, and then does it. `clock` says how far the clock is ahead, in ms. It
is imported where the SuperExec is, never shipped.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import time
from pathlib import Path

from penchant.server import logs
from penchant.server._flower import operated
from penchant.server.database import Database
from penchant.server.folder import Folder
from penchant.server.operation import Operation

PARTS = ("superlink", "services", "proxy", "superexec")
FULL = "full disk"


def operation() -> Operation:
    folder = Folder(Path(os.environ["PENCHANT_SERVER"]))
    logs.configure("rounds", folder.logs / "rounds.jsonl")
    return Operation(folder, now_ms=lambda: time.time_ns() // 1_000_000 + clock_ms(folder), at=lambda p: at(folder, p))


def at(folder: Folder, point: str) -> None:
    place = folder.path / "fault.json"
    try:
        told = json.loads(place.read_text())
    except FileNotFoundError:
        return
    if told["point"] != point:
        return
    if told.get("done") and _done(folder) < told["done"]:
        return
    place.replace(place.with_suffix(".done"))
    happen(folder, told["does"])


def _done(folder: Folder) -> int:
    with Database(folder.database) as database:
        return int(database.rows("SELECT max(done) AS done FROM progress")[0]["done"])


def happen(folder: Folder, does: str) -> None:
    """Kills what is named, or makes each later write of this process fail as on a full disk."""
    if does == FULL:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))  # SIGXFSZ is ignored by Python
        return
    for victim in ("supervisor", *PARTS) if does == "everything" else (does,):
        if victim != "serverapp":
            kill(folder, victim)
    if does in ("serverapp", "everything"):
        os.kill(os.getpid(), signal.SIGKILL)


def kill(folder: Folder, part: str) -> None:
    """Its whole process group, at once; of the supervisor that process alone, so that its parts are left behind."""
    pid = int(json.loads((folder.run / f"{part}.json").read_text())["pid"])
    (os.kill if part == "supervisor" else os.killpg)(pid, signal.SIGKILL)


def clock_ms(folder: Folder) -> int:
    """How far this server's clock is ahead of the machine's."""
    try:
        return int((folder.path / "clock").read_text())
    except FileNotFoundError:
        return 0


app = operated(operation)
