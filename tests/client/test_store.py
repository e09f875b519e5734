"""The store: what is put in comes out, retention, threads and processes, nothing in clear, and recorded versions."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from penchant.client import _schema
from penchant.client._forget import forget, tombstone
from penchant.client._keys import KeyFile, PassphraseKey
from penchant.client._retention import DAY_MS, Retention
from penchant.client._store import Event, Store
from penchant.common.errors import InvalidConfig, StoreError, StoreFull, StoreLocked, StoreNewer

T0 = 1_760_000_000_000
FIXTURES = Path(__file__).resolve().parent / "fixtures"


def event(item: str = "film:603", at_ms: int = T0, **rest: object) -> Event:
    return Event(item=item, kind="watch", at_ms=at_ms, **rest)  # type: ignore[arg-type]  # of mixed types


def opened(folder: Path, **rest: object) -> Store:
    return Store.open(folder / "s", key=KeyFile(folder / "key"), **{"now_ms": lambda: T0, **rest})  # type: ignore[arg-type]  # of mixed types


def items(store: Store) -> list[str]:
    return [kept.item for kept in store.events()]


class Clock:
    def __init__(self) -> None:
        self.ms = T0

    def __call__(self) -> int:
        return self.ms


# ------------------------------------------------------------------------------------------------- in and out


def test_what_is_kept_comes_out_in_order_also_after_it_was_opened_again(tmp_path: Path) -> None:
    kept = [
        event(dwell_s=5400.0, context={"device": "phone"}),
        event("film:ünï\ud800", rating=4.5, strength=0.25),
        event("x" * 5000, at_ms=0),
    ]
    with opened(tmp_path) as store:
        assert (store.last_id, store.n_events) == (0, 0)
        assert store.append(kept[0]) == 1
        assert store.append_all(kept[1:]) == [2, 3]
        store.put("profile", b"\0" * 100_000)
        store.put("profile", b"\1" * 100_001)
        store.put("consent", b"")
        store.put("gone", b"1")
        store.delete("gone")
        store.delete("never there")
    with opened(tmp_path) as store:
        assert list(store.events()) == kept
        assert [one.number for one in store.events(after=1)] == [2, 3]
        assert (store.get("profile"), store.get("consent"), store.get("gone")) == (b"\1" * 100_001, b"", None)
        assert store.names() == ("consent", "profile")
        assert (store.last_id, store.n_events) == (3, 3)
        assert store.check() == ()
        exported = [json.loads(json.dumps(one)) for one in store.export(without={"profile"})]
        assert exported[0] == {"event": 1, **kept[0].fields()}
        assert exported[3:] == [{"record": "consent", "base64": ""}]
        assert store.append_all([]) == []


def test_events_can_be_kept_while_others_are_read(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        store.append_all(event(f"film:{i}") for i in range(1200))
        seen = 0
        for one in store.events():
            seen += 1
            if one.number == 1:
                store.append(event("film:1200"))
        assert seen == 1201


def test_a_transaction_is_kept_whole_or_not_at_all(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        with store.transaction():
            store.append(event())
            store.put("profile", b"1")
        with contextlib.suppress(ZeroDivisionError), store.transaction():
            store.append(event("film:78"))
            store.put("profile", b"2")
            store.delete("profile")
            assert store.get("profile") is None  # seen inside
            _ = 1 / 0
        assert (items(store), store.get("profile"), store.last_id) == (["film:603"], b"1", 1)
        assert store.append(event("film:79")) == 2
        assert store.check() == ()
        with store.transaction(), pytest.raises(InvalidConfig, match="transaction"):
            store.forget(keep=None)
        with store.transaction(), pytest.raises(InvalidConfig, match="transaction"):
            store.close()


def test_an_error_inside_a_transaction_that_is_swallowed_still_undoes_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise StoreFull("no room")

    def swallows(store: Store) -> None:
        with store.transaction():
            store.append(event())
            monkeypatch.setattr(store, "_run", fails)
            with pytest.raises(StoreFull):
                store.put("profile", b"1")
            with pytest.raises(StoreError, match="begin again"):
                store.append(event())
            monkeypatch.undo()

    with opened(tmp_path) as store:
        with pytest.raises(StoreError, match="nothing of it"):
            swallows(store)
        assert items(store) == []
        store.append(event())
        assert store.check() == ()


@pytest.mark.parametrize(
    "wrong",
    [
        {"item": ""},
        {"kind": ""},
        {"at_ms": -1},
        {"at_ms": True},
        {"at_ms": 1.5},
        {"strength": float("nan")},
        {"strength": 1.1},
        {"dwell_s": -1.0},
        {"dwell_s": float("inf")},
        {"rating": float("nan")},
        {"context": {"hour": 5}},
    ],
)
def test_an_event_that_cannot_be_kept_is_refused_where_it_is_made(wrong: dict[str, object]) -> None:
    with pytest.raises(InvalidConfig):
        Event(**{"item": "a", "kind": "view", "at_ms": 0, **wrong})  # type: ignore[arg-type]  # of mixed types


def test_a_closed_store_says_so(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.close()
    store.close()
    with pytest.raises(StoreError, match="closed"):
        store.append(event())
    with pytest.raises(StoreError, match="closed"):
        list(store.events())


@pytest.mark.skipif(os.name != "posix", reason="POSIX file permissions")
def test_only_its_owner_may_read_the_folder_and_its_files(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir(mode=0o755)
    with opened(tmp_path) as store:
        store.append(event())
        modes = [path.stat().st_mode & 0o777 for path in (tmp_path / "s").iterdir()]
        assert (tmp_path / "s").stat().st_mode & 0o777 == 0o700
        assert set(modes) == {0o600}


# --------------------------------------------------------------------------------------------------- in clear

SECRETS = (b"Zyzzyva", b"gloat-over", b"in-the-bath", b"the profile", b"1766666666666", b"dwell_s")


def leaks(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Files under a folder that hold one of SECRETS."""
    for path in folder.rglob("*"):
        data = path.read_bytes() if path.is_file() else b""
        yield from ((path.name, secret) for secret in SECRETS if secret in data)


def test_no_file_holds_anything_of_an_event_or_a_record_in_clear_during_use_and_after(tmp_path: Path) -> None:
    secret = Event(item="Zyzzyva", kind="gloat-over", at_ms=1766666666666, dwell_s=3.0, context={"at": "in-the-bath"})
    store = opened(tmp_path)
    store.append_all([secret] * 50)
    store.put("the profile", b"Zyzzyva " * 1000)
    names = {path.name for path in (tmp_path / "s").iterdir()}
    assert {"store.db", "store.db-wal", "store.db-shm"} <= names
    assert list(leaks(tmp_path)) == []
    store.rewrap(PassphraseKey("Zyzzyva", n=2, p=1))
    assert list(leaks(tmp_path)) == []
    store.close()
    assert list(leaks(tmp_path)) == []
    (tmp_path / "s" / "plain").write_bytes(b"a Zyzzyva")
    assert list(leaks(tmp_path)) == [("plain", b"Zyzzyva")]


def test_the_size_of_a_row_does_not_tell_its_item(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        store.append_all(event("x" * n, dwell_s=float(n)) for n in range(1, 60))
        (sizes,) = store._db.execute("SELECT group_concat(DISTINCT length(sealed)) FROM events").fetchone()
    assert sizes == b"156"


# -------------------------------------------------------------------------------------------------- retention


def test_with_more_events_than_may_be_kept_the_oldest_go(tmp_path: Path) -> None:
    with opened(tmp_path, retention=Retention(max_events=3)) as store:
        store.append_all(event(f"film:{i}") for i in range(3))
        store.append_all(event(f"film:{i}") for i in range(3, 5))
        assert items(store) == ["film:2", "film:3", "film:4"]
        assert (store.last_id, store.n_events) == (5, 3)
        assert store.check() == ()
    with opened(tmp_path, retention=Retention(max_events=1)) as store:
        assert items(store) == ["film:4"]


def test_an_old_event_goes_when_two_readings_a_day_apart_say_so_and_no_other_does(tmp_path: Path) -> None:
    clock, thirty = Clock(), Retention(days=30)
    with opened(tmp_path, now_ms=clock, retention=thirty) as store:
        store.append_all([event("late", T0 + 20 * DAY_MS), event("early", T0), event("middle", T0 + 10 * DAY_MS)])
        clock.ms = T0 + 31 * DAY_MS
        store.put("a", b"")
        assert items(store) == ["late", "early", "middle"]  # asked once
        clock.ms += DAY_MS - 1
        store.put("a", b"")
        assert items(store) == ["late", "early", "middle"]
        clock.ms += 1
        store.put("a", b"")
        assert items(store) == ["late", "middle"]
        assert store.check() == ()
    clock.ms = T0 + 41 * DAY_MS
    with opened(tmp_path, now_ms=clock, retention=thirty) as store:
        assert items(store) == ["late", "middle"]
    clock.ms = T0 + 42 * DAY_MS
    with opened(tmp_path, now_ms=clock, retention=thirty) as store:
        assert items(store) == ["late"]
        assert store.check() == ()


def test_a_clock_that_jumps_ahead_or_back_deletes_nothing_but_a_right_one_still_does(tmp_path: Path) -> None:
    clock, thirty = Clock(), Retention(days=30)
    with opened(tmp_path, now_ms=clock, retention=thirty) as store:
        store.append(event(at_ms=T0))
    for jump in (40 * 365 * DAY_MS, -T0, 5 * DAY_MS, 40 * 365 * DAY_MS, 6 * DAY_MS):
        clock.ms = T0 + jump
        for _ in range(2):
            with opened(tmp_path, now_ms=clock, retention=thirty) as store:
                store.put("a", b"")
                clock.ms += DAY_MS // 3
                store.put("a", b"")
                assert items(store) == ["film:603"], jump
    for days in (40, 41):
        clock.ms = T0 + days * DAY_MS
        with opened(tmp_path, now_ms=clock, retention=thirty) as store:
            pass
    with opened(tmp_path, now_ms=clock, retention=thirty) as store:
        assert items(store) == []


@pytest.mark.parametrize("wrong", [{"days": 0.0}, {"days": float("nan")}, {"max_events": 0}])
def test_a_retention_that_keeps_nothing_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InvalidConfig):
        Retention(**wrong)  # type: ignore[arg-type]  # of mixed types


def test_without_limits_all_is_kept(tmp_path: Path) -> None:
    clock = Clock()
    with opened(tmp_path, now_ms=clock, retention=Retention(days=None, max_events=None)) as store:
        store.append_all(event(at_ms=0) for _ in range(10))
        for _ in range(3):
            clock.ms += 900 * DAY_MS
            store.put("a", b"")
        assert store.n_events == 10


# ---------------------------------------------------------------------------------------- threads and processes


def test_threads_share_a_store_and_lose_nothing(tmp_path: Path) -> None:
    with opened(tmp_path, timeout_s=60.0) as store:
        numbers: list[int] = []

        def work(name: int) -> None:
            for i in range(40):
                numbers.append(store.append(event(f"{name}:{i}")))
                store.put(f"record {name}", str(i).encode())

        threads = [threading.Thread(target=work, args=(name,)) for name in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(numbers) == list(range(1, 161))
        assert sorted(items(store)) == sorted(f"{name}:{i}" for name in range(4) for i in range(40))
        assert [store.get(f"record {name}") for name in range(4)] == [b"39"] * 4
        assert store.check() == ()


def test_a_call_waits_for_another_thread_no_longer_than_its_timeout(tmp_path: Path) -> None:
    with opened(tmp_path, timeout_s=0.05) as store:
        inside, leave = threading.Event(), threading.Event()

        def work() -> None:
            with store.transaction():
                inside.set()
                leave.wait(30)

        thread = threading.Thread(target=work)
        thread.start()
        assert inside.wait(30)
        for call in (lambda: store.append(event()), lambda: store.get("a"), store.close):
            with pytest.raises(StoreLocked, match="another thread"):
                call()
        leave.set()
        thread.join()
        store.append(event())


HOLDS = """
import os, sys, time
from pathlib import Path
from penchant.client._keys import KeyFile
from penchant.client._store import Event, Store
from penchant.common.errors import StoreLocked

folder = Path(sys.argv[1])
store = Store.open(folder / "s", key=KeyFile(folder / "key"))
store.append(Event(item="film:1", kind="watch", at_ms=1))
child = os.fork()
if child == 0:  # it must neither use nor keep its parent's store
    try:
        store.append(Event(item="film:2", kind="watch", at_ms=1))
    except StoreLocked:
        os.write(1, b"refused\\n")
    if sys.argv[2] == "exits":
        sys.exit()
    time.sleep(600)
if sys.argv[2] == "exits":
    os.waitpid(child, 0)
    store.append(Event(item="film:3", kind="watch", at_ms=1))
os.write(1, b"%d\\n" % child)
sys.stdin.readline()
"""


@pytest.mark.parametrize("child", ["exits", "stays"])
def test_a_second_process_is_refused_until_the_first_ends_even_if_a_forked_child_of_it_lives(
    child: str, tmp_path: Path
) -> None:
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", HOLDS, str(tmp_path), child]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = {process.stdout.readline().strip(), process.stdout.readline().strip()}
        try:
            assert "refused" in said
            with pytest.raises(StoreLocked, match=f"process {process.pid} "):
                opened(tmp_path)
            with pytest.raises(StoreLocked):
                Store.salvage(tmp_path / "s")
            with pytest.raises(StoreLocked):
                forget(tmp_path / "s", keep=None)
        finally:
            process.kill()
            process.wait()
            if child == "stays":
                (forked,) = said - {"refused"}
                with opened(tmp_path) as store:
                    assert items(store) == ["film:1"]
                os.kill(int(forked), signal.SIGKILL)
    with opened(tmp_path) as store:
        assert items(store) == (["film:1", "film:3"] if child == "exits" else ["film:1"])
        assert store.check() == ()


def test_a_process_cannot_open_a_store_twice(tmp_path: Path) -> None:
    with opened(tmp_path), pytest.raises(StoreLocked, match="this process"):
        opened(tmp_path)
    opened(tmp_path).close()


# ------------------------------------------------------------------------------------------------- a full disk

FULL = """
import resource, sys
from pathlib import Path
from penchant.client._keys import KeyFile
from penchant.client._forget import tombstone
from penchant.client._store import Event, Store
from penchant.common.errors import StoreFull

folder = Path(sys.argv[1])
event = Event(item="film:1", kind="watch", at_ms=1)
limit = lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
key = KeyFile(folder / "key")

limit(2000)  # no room for a database
try:
    Store.open(folder / "s", key=key)
    sys.exit("opened")
except StoreFull:
    pass
limit(resource.RLIM_INFINITY)
(folder / "key").unlink()

store = Store.open(folder / "s", key=key)
store.append_all([event] * 500)
store.put("profile", b"1")
limit(200_000)
n = store.n_events
refused = 0
while refused < 3:
    try:
        with store.transaction():
            store.append_all([event] * 100)
            store.put("profile", str(n).encode() * 1000)
        n += 100
    except StoreFull:
        refused += 1
    assert store.n_events == sum(1 for _ in store.events()) == n > 500, (store.n_events, n)
assert store.check() == ()
store.close()
store = Store.open(folder / "s", key=key)
assert store.n_events == n and store.check() == ()
limit(resource.RLIM_INFINITY)
store.append(event)
assert store.check() == ()
limit(12_288)  # forgetting needs no more room than the envelope has
assert store.forget(keep={"spent": 3}) == ()
assert tombstone(folder / "s") == {"spent": 3}
assert sorted(p.name for p in folder.rglob("*") if p.is_file()) == ["store.lock", "tombstone.json"]
print("all well")
"""


def test_a_full_disk_loses_nothing_that_was_kept_and_does_not_stop_a_forget(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "all well\n"), done.stderr


# ---------------------------------------------------------------------------------------------------- forget


@pytest.mark.parametrize("way", ["method", "function", "function without the key"])
def test_after_a_forget_nothing_is_left_but_the_tombstone_and_the_folder_begins_anew(way: str, tmp_path: Path) -> None:
    folder, key = tmp_path / "s", KeyFile(tmp_path / "key")
    store = opened(tmp_path)
    store.append(event())
    store.put("profile", b"1")
    saved = [(folder / name).read_bytes() for name in ("store.db", "store.envelope")]
    if way == "method":
        assert store.forget(keep={"population": "readers", "spent": [1]}) == ()
        with pytest.raises(StoreError, match="closed"):
            store.append(event())
    else:
        store.close()
        left = forget(folder, keep={"population": "readers", "spent": [1]}, key=key if way == "function" else None)
        assert left == ()
    assert sorted(path.name for path in folder.iterdir()) == ["store.lock", "tombstone.json"]
    assert key.path.exists() == (way == "function without the key")
    key.path.unlink(missing_ok=True)
    assert tombstone(folder) == {"population": "readers", "spent": [1]}
    with opened(tmp_path) as store:
        assert items(store) == []
        assert store.names() == ()
        assert tombstone(folder) == {"population": "readers", "spent": [1]}
        store.forget(keep=None)
    assert tombstone(folder) is None
    assert sorted(path.name for path in folder.iterdir()) == ["store.lock"]
    for name, data in zip(
        ("store.db", "store.envelope"), saved, strict=True
    ):  # a copy from before opens with no new key
        (folder / name).write_bytes(data)
    key.make()
    with pytest.raises(StoreError):
        opened(tmp_path)


def test_keys_are_overwritten_before_they_are_deleted(tmp_path: Path) -> None:
    store = opened(tmp_path)
    for path in (tmp_path / "key", tmp_path / "s" / "store.envelope"):
        (tmp_path / f"{path.name} under another name").hardlink_to(path)
    old = (tmp_path / "store.envelope under another name").read_bytes()
    assert store.rewrap(KeyFile(tmp_path / "second")) == ()
    assert (tmp_path / "key under another name").read_bytes() == bytes(65)
    new = (tmp_path / "store.envelope under another name").read_bytes()
    assert old[:4096] not in new
    store.forget(keep=None)
    assert (tmp_path / "store.envelope under another name").read_bytes()[:8192] == bytes(8192)


def test_a_tombstone_that_does_not_fit_or_is_no_json_begins_no_forget(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        store.append(event())
        for keep in ({"a": "x" * 5000}, {"a": b"bytes"}, {"a": float("nan")}):
            with pytest.raises(InvalidConfig):
                store.forget(keep=keep)
        assert items(store) == ["film:603"]
    with opened(tmp_path) as store:
        assert items(store) == ["film:603"]


def test_a_damaged_tombstone_is_an_error_and_not_an_empty_one(tmp_path: Path) -> None:
    assert tombstone(tmp_path) is None
    for damaged in ("", "[]", '{"kept": 3}', '{"kept":'):
        (tmp_path / "tombstone.json").write_text(damaged)
        with pytest.raises(StoreError, match="damaged"):
            tombstone(tmp_path)


# -------------------------------------------------------------------------------------------------- versions


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    shutil.copytree(FIXTURES / "store-v1", tmp_path / "s")
    return tmp_path / "s"


def fixture_key() -> PassphraseKey:
    return PassphraseKey("correct horse battery staple")


def test_a_store_recorded_with_version_1_opens_for_ever(recorded: Path) -> None:
    with Store.open(recorded, key=fixture_key(), now_ms=lambda: T0) as store:
        assert [one.fields() for one in store.events()] == [
            {"item": "film:603", "kind": "watch", "at_ms": T0 - 2, "dwell_s": 5400.0, "context": {"device": "phone"}},
            {"item": "film:78", "kind": "rate", "at_ms": T0 - 1, "strength": 0.9, "rating": 4.5},
            {"item": "film:ünïcode", "kind": "view", "at_ms": T0},
        ]
        assert store.get("profile") == bytes(range(256)) * 64
        assert store.get("consent") == b'{"text": 1}'
        assert store.check() == ()


def test_a_later_version_is_refused_and_its_files_are_as_they_were(
    recorded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_schema, "SCHEMA_VERSION", 2)
    monkeypatch.setattr(_schema, "MIGRATIONS", {1: lambda db, sealer: None})
    Store.open(recorded, key=fixture_key()).close()
    monkeypatch.undo()
    before = {path.name: path.read_bytes() for path in recorded.iterdir()}
    for call in (Store.open, Store.salvage):
        with pytest.raises(StoreNewer, match="update penchant"):
            call(recorded, key=fixture_key())
        assert {path.name: path.read_bytes() for path in recorded.iterdir()} == before


def test_a_migration_runs_once_and_one_that_fails_changes_no_row(
    recorded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def broken(db: object, sealer: object) -> None:
        raise StoreFull("no room")

    def mended(db: object, sealer: object) -> None:
        calls.append(1)

    monkeypatch.setattr(_schema, "SCHEMA_VERSION", 2)
    monkeypatch.setattr(_schema, "MIGRATIONS", {1: broken})
    with pytest.raises(StoreFull):
        Store.open(recorded, key=fixture_key())
    monkeypatch.setattr(_schema, "MIGRATIONS", {1: mended})
    for _ in range(2):
        with Store.open(recorded, key=fixture_key(), now_ms=lambda: T0) as store:
            assert store.n_events == 3
            assert store.check() == ()
    assert calls == [1]
