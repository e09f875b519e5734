"""The store under a process that is killed, at each point that it names: what was acknowledged is there, whole."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from penchant.client import _pages, _schema
from penchant.client._forget import tombstone
from penchant.client._keys import KeyFile, PassphraseKey
from penchant.client._retention import Retention
from penchant.client._store import POINTS, Event, Store
from penchant.common.errors import StoreDamaged, StoreLocked, StoreNewer, WrongKey

T0, DAY_MS = 1_760_000_000_000, 86_400_000

# A store's life. After each step the child notes how far it came. It is killed when it comes to a point the nth time.
LIFE = """
import os, signal, sys
from pathlib import Path

from penchant.client._keys import KeyFile
from penchant.client._retention import Retention
from penchant.client._store import Event, Store

folder, stop, nth = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
reached = []

def at(point):
    reached.append(point)
    if reached.count(stop) == nth:
        os.kill(os.getpid(), signal.SIGKILL)

def done(step):
    (folder / "steps").write_text(str(step))

def event(name, days=100):
    return Event(item=name, kind="watch", at_ms=1_760_000_000_000 + days * 86_400_000)

clock = [1_760_000_000_000]
arguments = dict(key=KeyFile(folder / "key"), now_ms=lambda: clock[0], retention=Retention(days=30), at=at)
store = Store.open(folder / "s", **arguments); done(1)
store.append(event("a")); done(2)
store.append_all([event("b", 0), event("c")]); done(3)
store.put("profile", b"1" * 9000); done(4)
store.put("consent", b"yes"); done(5)
with store.transaction():
    store.append(event("d"))
    store.put("profile", b"2" * 9000)
done(6)
store.delete("consent"); done(7)
store.close()
clock[0] += 50 * 86_400_000
Store.open(folder / "s", **arguments).close(); done(8)
clock[0] += 86_400_000
store = Store.open(folder / "s", **arguments); done(9)
store.rewrap(KeyFile(folder / "s" / "second")); done(10)
store.forget(keep={"spent": 7}); done(11)
print(*sorted(set(reached)))
"""

# What is there after each step: events and records.
BEGUN: list[tuple[str, dict[str, bytes]]] = [("", {}), ("", {}), ("a", {}), ("abc", {})]
BEGUN += [("abc", {"profile": b"1" * 9000}), ("abc", {"profile": b"1" * 9000, "consent": b"yes"})]
BEGUN += [("abcd", {"profile": b"2" * 9000, "consent": b"yes"})] + [("abcd", {"profile": b"2" * 9000})] * 2
AFTER = [*BEGUN, *[("acd", {"profile": b"2" * 9000})] * 2, ("", {})]


def child(code: str, *args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def again(folder: Path) -> Store:
    """The store with whichever of its keys is the one."""
    with contextlib.suppress(WrongKey):
        return open_with(folder, folder / "s" / "second")
    return open_with(folder, folder / "key")


def open_with(folder: Path, key: Path) -> Store:
    retention = Retention(days=30)
    return Store.open(folder / "s", key=KeyFile(key), now_ms=lambda: T0 + 51 * DAY_MS, retention=retention)


def holds(store: Store) -> tuple[str, dict[str, bytes]]:
    records: dict[str, Any] = {name: store.get(name) for name in store.names()}
    return "".join(event.item for event in store.events()), records


ALIVE = [point for point in POINTS if not point.startswith(("forget", "migrate", "salvage"))]
REPEATED = {"append:": 2, "put:": 2, "open:": 2}
KILLS = [(p, n) for p in ALIVE for n in range(1, 1 + next((k for s, k in REPEATED.items() if p.startswith(s)), 1))]


def test_every_point_is_come_to(tmp_path: Path) -> None:
    done = child(LIFE, tmp_path, "none", 1)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == {p for p in POINTS if not p.startswith(("migrate", "salvage"))}
    assert len(AFTER) == 12


@pytest.mark.parametrize(("point", "nth"), KILLS)
def test_a_process_killed_anywhere_leaves_all_that_was_acknowledged_and_nothing_by_half(
    point: str, nth: int, tmp_path: Path
) -> None:
    killed = child(LIFE, tmp_path, point, nth)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    steps = int((tmp_path / "steps").read_text()) if (tmp_path / "steps").exists() else 0
    if point in ("create:key", "create:database"):
        (tmp_path / "key").unlink()  # outside the folder it might be another store's: the error says so
    with again(tmp_path) as store:
        expected = AFTER[steps + 1] if point.endswith(":committed") else AFTER[steps]
        if point.startswith("open") and (steps == 8 or point == "open:committed"):  # it is a day later by now
            expected = AFTER[9]
        assert holds(store) == expected
        assert store.check() == ()
        assert store.last_id == {"": 0, "a": 1, "abc": 3}.get(expected[0], 4)
        store.put("after", b"1")
    with again(tmp_path) as store:
        assert holds(store) == (expected[0], expected[1] | {"after": b"1"})
        raw = (tmp_path / "s" / "store.envelope").read_bytes()
        assert raw[:4096] == raw[4096:8192]  # also if it was killed between its two copies


@pytest.mark.parametrize("point", [point for point in POINTS if point.startswith("forget")])
def test_a_forget_that_is_killed_has_not_begun_or_is_finished_by_whoever_comes_next(point: str, tmp_path: Path) -> None:
    killed = child(LIFE, tmp_path, point, 1)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    if point == "forget:before":
        with again(tmp_path) as store:
            assert holds(store) == AFTER[10]
        assert tombstone(tmp_path / "s") is None
        return
    key_was_there = (tmp_path / "s" / "second").exists()
    assert key_was_there == (point == "forget:begun")
    if point in ("forget:envelope", "forget:files", "forget:tombstone"):
        assert (tmp_path / "s" / "store.envelope").read_bytes()[:8192] == bytes(8192)
    rows = [path.read_bytes() for path in (tmp_path / "s").glob("store.db")]
    with Store.open(tmp_path / "s", key=KeyFile(tmp_path / "s" / "second")) as store:
        assert holds(store) == ("", {})
        assert store.last_id == 0
        assert tombstone(tmp_path / "s") == {"spent": 7}
        assert all(path.read_bytes() != row for path in (tmp_path / "s").iterdir() for row in rows)


def test_a_forget_of_a_keyless_copy_is_irrevocable_once_the_key_is_gone(tmp_path: Path) -> None:
    # What a thief of the disk has after a kill just behind that point: everything but the key, which is zeros by then.
    assert child(LIFE, tmp_path, "forget:key", 1).returncode == -signal.SIGKILL
    shutil.copytree(tmp_path / "s", tmp_path / "stolen")
    raw = bytearray((tmp_path / "stolen" / "store.envelope").read_bytes())
    raw[8192:] = bytes(4096)  # as if no forget had begun
    (tmp_path / "stolen" / "store.envelope").write_bytes(raw)
    for key in (None, KeyFile(tmp_path / "key"), KeyFile(tmp_path / "stolen" / "second")):
        with pytest.raises(WrongKey):
            Store.open(tmp_path / "stolen", key=key)


MIGRATES = """
import os, signal, sys
from pathlib import Path

from penchant.client import _schema, _store
from penchant.client._keys import PassphraseKey

def step(db, sealer):
    db.execute("INSERT INTO events VALUES (4, (SELECT sealed FROM events WHERE id = 1))")
    db.execute("DELETE FROM events WHERE id = 4")

def at(point):
    if point == sys.argv[2]:
        os.kill(os.getpid(), signal.SIGKILL)

_schema.SCHEMA_VERSION, _schema.MIGRATIONS = 2, {1: step}
_store.Store.open(Path(sys.argv[1]), key=PassphraseKey("correct horse battery staple"), at=at)
"""


@pytest.mark.parametrize("point", [point for point in POINTS if point.startswith("migrate")])
def test_a_migration_that_is_killed_is_done_again_and_an_older_penchant_keeps_off(
    point: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(Path(__file__).resolve().parent / "fixtures" / "store-v1", tmp_path / "s")
    killed = child(MIGRATES, tmp_path / "s", point)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    key = PassphraseKey("correct horse battery staple")
    with pytest.raises(StoreNewer):
        Store.open(tmp_path / "s", key=key)
    calls: list[int] = []
    monkeypatch.setattr(_schema, "SCHEMA_VERSION", 2)
    monkeypatch.setattr(_schema, "MIGRATIONS", {1: lambda db, sealer: calls.append(1)})
    with Store.open(tmp_path / "s", key=key, now_ms=lambda: T0) as store:
        assert holds(store)[0] == "film:603film:78film:ünïcode"
        assert store.check() == ()
    assert len(calls) == (point != "migrate:committed")


SALVAGES = """
import os, signal, sys
from pathlib import Path

from penchant.client._keys import KeyFile
from penchant.client._store import Store

def at(point):
    if point == sys.argv[2]:
        os.kill(os.getpid(), signal.SIGKILL)

folder = Path(sys.argv[1])
Store.salvage(folder / "s", key=KeyFile(folder / "key"), at=at)
"""


@pytest.mark.parametrize("point", [point for point in POINTS if point.startswith("salvage")])
def test_a_salvage_that_is_killed_can_be_done_again_and_reads_the_log_too(point: str, tmp_path: Path) -> None:
    events = [Event(item=str(i), kind="watch", at_ms=T0 + 50 * DAY_MS) for i in range(100)]
    with open_with(tmp_path, tmp_path / "key") as store:
        store.append_all(events)
        store.put("consent", b"yes")
    assert child(LIFE, tmp_path, "append:committed", 1).returncode == -signal.SIGKILL  # its event is in the log alone
    database = tmp_path / "s" / "store.db"
    assert database.with_name("store.db-wal").stat().st_size > 0
    raw = bytearray(database.read_bytes())
    raw[first_leaf(raw)] ^= 1
    database.write_bytes(raw)
    killed = child(SALVAGES, tmp_path, point)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    if point != "salvage:done":
        with pytest.raises(StoreDamaged, match=r"Client\.salvage"):
            again(tmp_path)
        assert Store.salvage(tmp_path / "s", key=KeyFile(tmp_path / "key")).lost == ()
    with again(tmp_path) as store:
        assert [event.item for event in store.events()] == [*(event.item for event in events), "a"]
        assert store.get("consent") == b"yes"
        assert store.check() == ()


def first_leaf(database: bytes | bytearray) -> int:
    """Where a page of events begins that a later event does not change."""
    return next(at for at in range(3 * _pages.PAGE, len(database), _pages.PAGE) if database[at] == 13)


def test_what_a_killed_process_held_does_not_stop_the_next_one_but_a_living_one_does(tmp_path: Path) -> None:
    waits = LIFE.replace("os.kill(os.getpid(), signal.SIGKILL)", "print(flush=True) or sys.stdin.readline()")
    command = [sys.executable, "-c", waits, str(tmp_path), "append:written", "1"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(StoreLocked, match=str(process.pid)):
            again(tmp_path)
        process.kill()
    with again(tmp_path) as store:
        assert holds(store) == AFTER[1]


def test_an_acknowledgement_before_the_commit_would_be_seen(tmp_path: Path) -> None:
    wrong = LIFE.replace('store.append(event("a")); done(2)', 'done(2); store.append(event("a"))')
    assert wrong != LIFE
    assert child(wrong, tmp_path, "append:written", 1).returncode == -signal.SIGKILL
    with again(tmp_path) as store:
        assert holds(store) != AFTER[2]


def test_a_log_that_was_cut_off_holds_whole_transactions_only(tmp_path: Path) -> None:
    # What a disk may do that loses its last blocks although it said that they were written.
    assert child(LIFE, tmp_path, "delete:committed", 1).returncode == -signal.SIGKILL
    log = tmp_path / "s" / "store.db-wal"
    size = log.stat().st_size
    seen: list[tuple[str, dict[str, bytes]]] = []
    for length in range(0, size, size // 60):
        cut = tmp_path / "cut"
        shutil.rmtree(cut, ignore_errors=True)
        shutil.copytree(tmp_path / "s", cut / "s")
        shutil.copy(tmp_path / "key", cut / "key")
        os.truncate(cut / "s" / "store.db-wal", length)
        with again(cut) as store:
            assert store.check() == ()
            found = holds(store)
            assert found in AFTER
            seen += [found] if found not in seen else []
    assert len(seen) >= 5
