"""A server's processes are kept up, whatever ends them."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from penchant.common.errors import InvalidConfig
from penchant.server import logs
from penchant.server.supervisor import Part, Supervisor, sweep
from tests.processes import within
from tests.server.operators import an_operator

SLEEPS = (sys.executable, "-c", "import time; time.sleep(600)")


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[Supervisor]:
    """Of a folder whose parts do nothing; nobody wants rounds."""
    made = Supervisor(an_operator(tmp_path / "prod"))
    made._parts = tuple(Part(name, SLEEPS, lambda: True) for name in ("superlink", "services"))
    for part in made._parts:
        made._start(part)
    root = logging.getLogger()
    before = root.handlers[:], root.level, sys.excepthook, logging.raiseExceptions
    logs.configure("supervisor", made.folder.logs / "supervisor.jsonl")
    try:
        yield made
    finally:
        made.down()
        for one in root.handlers:
            one.close()
        root.handlers[:], root.level, sys.excepthook, logging.raiseExceptions = before
        logging.captureWarnings(False)


def test_a_part_that_was_killed_is_started_again_and_the_log_says_which(supervisor: Supervisor) -> None:
    killed, other = supervisor._parts
    assert killed.process is not None
    assert other.process is not None
    first, kept = killed.process.pid, other.process.pid
    os.killpg(first, signal.SIGKILL)

    def again() -> bool:
        supervisor.tick()
        return killed.process is not None and killed.process.pid != first

    within(20, "it is started again", again)
    assert (killed.restarts, other.restarts, other.process.pid) == (1, 0, kept)
    told = json.loads((supervisor.folder.run / "superlink.json").read_text())
    assert killed.process is not None
    assert told["pid"] == killed.process.pid
    lines = [json.loads(line) for line in (supervisor.folder.logs / "supervisor.jsonl").read_text().splitlines()]
    assert [(one["why"], one["code"]) for one in lines if one["level"] == "warning"] == [("superlink ended", -9)]


def test_a_part_that_ends_at_once_is_started_ever_later(supervisor: Supervisor) -> None:
    part = supervisor._parts[0]
    part.command = (sys.executable, "-c", "")
    assert part.process is not None
    os.killpg(part.process.pid, signal.SIGKILL)
    until = time.monotonic() + 20
    while part.restarts < 2 and time.monotonic() < until:
        supervisor.tick()
        time.sleep(0.05)
    assert part.restarts == 2
    assert part.pause_s == 4.0


def test_whatever_goes_wrong_with_the_run_or_the_disk_the_parts_stay_up(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(supervisor, "_see_to_the_run", fails)
    monkeypatch.setattr("penchant.server.supervisor.write_json", fails)
    part = supervisor._parts[0]
    assert part.process is not None
    os.killpg(part.process.pid, signal.SIGKILL)

    def again() -> bool:
        supervisor.tick()
        return part.restarts == 1 and part.process is not None

    within(20, "it is started again", again)
    assert all(one.process is not None and one.process.poll() is None for one in supervisor._parts)


def test_a_folder_has_one_supervisor_and_what_a_killed_one_left_is_ended(supervisor: Supervisor) -> None:
    with pytest.raises(InvalidConfig, match="up already"):
        Supervisor(supervisor.folder)
    pids = [part.process.pid for part in supervisor._parts if part.process is not None]
    assert sweep(supervisor.folder)
    for part in supervisor._parts:
        assert part.process is not None
        within(10, "it ended", lambda process=part.process: process.poll() is not None)  # type: ignore[misc]  # a default
    assert len(pids) == 2
