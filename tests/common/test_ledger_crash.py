"""The ledger under a process that is killed, at each point that it names, and under two processes at once."""

from __future__ import annotations

import json
import math
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from penchant.common.errors import PrivacyRefused
from penchant.common.privacy import gaussian
from penchant.common.privacy.events import Gaussian
from penchant.common.privacy.ledger import POINTS, Ledger

DELTA = 1e-5
ROUND = Gaussian(noise_multiplier=10.0)

# Two rounds of the server's life, each with a release that others see, and then a participation on a device. It is
# killed when it comes to a point for the nth time; what it prints last is how far it would have come.
CHILD = """
import os, signal, sys
from pathlib import Path

from penchant.common.privacy.events import Gaussian
from penchant.common.privacy.ledger import Ledger

folder, stop, nth = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
reached = []

def at(point):
    reached.append(point)
    if reached.count(stop) == nth:
        os.kill(os.getpid(), signal.SIGKILL)

event = Gaussian(noise_multiplier=10.0)
ledger = Ledger("readers", delta=1e-5, path=folder / "a.sqlite", at=at)
for number in (1, 2):
    receipt = ledger.charge(number, event, plan="p")
    receipt.spend()
    (folder / f"released-{number}").touch()  # now others have it
    ledger.released(receipt, "abc")
assert ledger.participate(7, 1, 0, event, plan="p") is not None
(folder / "sent").touch()
print(*sorted(set(reached)))
"""

CHARGING = """
import sys
from pathlib import Path

from penchant.common.errors import BudgetExhausted
from penchant.common.privacy.events import Gaussian
from penchant.common.privacy.ledger import Ledger

budget = float(sys.argv[2])
ledger = Ledger("readers", delta=1e-5, path=Path(sys.argv[1]), budget=budget)
print("ready", flush=True)
sys.stdin.readline()
charged = 0
try:
    for number in range(40):
        ledger.charge(number, Gaussian(noise_multiplier=10.0), model=sys.argv[3])
        charged += 1
except BudgetExhausted:
    pass
print(charged)
"""


def child(folder: Path, point: str, nth: int = 1) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", CHILD, str(folder), point, str(nth)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def again(folder: Path) -> Ledger:
    return Ledger("readers", delta=DELTA, path=folder / "a.sqlite")


def test_every_point_is_come_to(tmp_path: Path) -> None:
    done = child(tmp_path, "none")
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == set(POINTS)
    with again(tmp_path) as ledger:
        assert [e.kind for e in ledger.entries] == ["charge", "release", "charge", "release", "participation"]


@pytest.mark.parametrize(
    ("point", "nth"), [(p, n) for p in POINTS for n in (1, 2) if n == 1 or p.startswith(("charge", "release"))]
)
def test_a_process_killed_anywhere_leaves_a_whole_ledger_that_is_never_below_what_was_released(
    point: str, nth: int, tmp_path: Path
) -> None:
    killed = child(tmp_path, point, nth)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    with again(tmp_path) as ledger:
        n = ledger.verify()
        entries = ledger.entries
        assert n == len(entries)
        charged = [e.round for e in entries if e.kind == "charge"]
        seen = [number for number in (1, 2) if (tmp_path / f"released-{number}").exists()]
        assert set(seen) <= set(charged)
        assert not (tmp_path / "sent").exists() or ledger.participations(7) == 1
        noted = [e.round for e in entries if e.kind == "release"]
        assert set(noted) <= set(seen)
        number = nth if point.startswith(("charge", "release")) else 1
        tries = ledger.attempts(number, "p")
        expected = point in ("charge:committed", *POINTS[POINTS.index("release:before") :])
        assert tries == expected
        assert ledger.charge(number, ROUND, plan="p").attempt == tries  # charged again, and as another try
        mu = math.sqrt(len(charged) + ledger.participations(7) + 1) / 10
        assert ledger.spent().epsilon == pytest.approx(gaussian.epsilon_of(mu, DELTA), rel=1e-9)
    done = child(tmp_path, "none")  # and the whole life goes on in the same file
    assert done.returncode == 0, done.stderr
    with again(tmp_path) as ledger:
        assert ledger.verify() == n + 1 + 5


def test_a_release_before_its_charge_would_be_seen(tmp_path: Path) -> None:
    wrong = CHILD.replace("    receipt = ledger", '    (folder / f"released-{number}").touch()\n    receipt = ledger')
    assert wrong != CHILD
    command = [sys.executable, "-c", wrong, str(tmp_path), "charge:counted", "1"]
    assert subprocess.run(command, capture_output=True, timeout=60, check=False).returncode == -signal.SIGKILL
    with again(tmp_path) as ledger:
        assert (tmp_path / "released-1").exists()
        assert ledger.attempts(1, "p") == 0


def test_a_log_that_was_cut_off_holds_whole_entries_only_and_a_head_noted_earlier_shows_it(tmp_path: Path) -> None:
    # What a disk may do that loses its last blocks although it said that they were written.
    assert child(tmp_path, "participation:committed").returncode == -signal.SIGKILL
    whole, log = (tmp_path / "a.sqlite").read_bytes(), (tmp_path / "a.sqlite-wal").read_bytes()
    with again(tmp_path) as ledger:
        records, head = ledger.records(), ledger.head
    cut = tmp_path / "cut"
    cut.mkdir()
    lengths = set()
    for size in range(0, len(log), 1009):
        (cut / "a.sqlite").write_bytes(whole)
        (cut / "a.sqlite-wal").write_bytes(log[:size])
        with again(cut) as ledger:
            assert ledger.records() == records[: ledger.verify() + 1]
            lengths.add(ledger.verify())
            with pytest.raises(PrivacyRefused, match="entries are gone"):
                ledger.verify(head)
    assert lengths == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("room", [None, 50])
def test_two_processes_that_charge_at_once_neither_fork_the_chain_nor_share_the_last_of_a_budget(
    room: int | None, tmp_path: Path
) -> None:
    path = tmp_path / "a.sqlite"
    budget = gaussian.epsilon_of(math.sqrt(room or 1000) / 10, DELTA)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CHARGING, str(path), repr(budget), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in ("one", "two")
    ]
    try:
        for process in processes:  # both have the file open before either charges
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        charged = [int(process.communicate(timeout=60)[0]) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert sum(charged) == (room or 80)
    with Ledger("readers", delta=DELTA, path=path, budget=budget) as ledger:
        assert ledger.verify() == sum(charged)
        assert [sum(e.model == name for e in ledger.entries) for name in ("one", "two")] == charged
        tries = [(e.round, e.attempt) for e in ledger.entries]
        assert len(set(tries)) == len(tries)  # no two charges of a round share their noise


def test_what_a_killed_process_held_does_not_stop_the_next_one(tmp_path: Path) -> None:
    assert child(tmp_path, "charge:counted").returncode == -signal.SIGKILL
    db = sqlite3.connect(tmp_path / "a.sqlite", timeout=0)
    db.execute("BEGIN IMMEDIATE")  # no lock is left behind
    assert json.loads(db.execute("SELECT record FROM header").fetchone()[0])["population"] == "readers"
    db.close()
