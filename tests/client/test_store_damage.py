"""A store whose files are not what was written: a typed error or a row left out, and never a wrong value."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from penchant.client import _pages
from penchant.client._forget import forget
from penchant.client._keys import KeyFile
from penchant.client._retention import Retention
from penchant.client._store import Event, Store
from penchant.common.errors import StoreDamaged, StoreError

T0 = 1_760_000_000_000
EVENTS = [Event(item=f"film:{i}", kind="watch", at_ms=T0 + i, context={"n": str(i)}) for i in range(150)]
RECORDS = {"profile": bytes(range(256)) * 80, "consent": b"yes", "preferences": b"{}"}


def opened(folder: Path, **rest: object) -> Store:
    return Store.open(folder / "s", key=KeyFile(folder / "key"), now_ms=lambda: T0, **rest)  # type: ignore[arg-type]  # of mixed types


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    with opened(folder) as store:
        store.append_all(EVENTS)
        for name, value in RECORDS.items():
            store.put(name, value)
    return folder


@pytest.fixture
def copied(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path, dirs_exist_ok=True)


def change(folder: Path, *statements: str) -> None:
    """What someone does who has the file and no key."""
    with closing(sqlite3.connect(folder / "s" / "store.db", isolation_level=None)) as db:
        for statement in statements:
            db.execute(statement)


def places(store: Store) -> dict[str, int]:
    return {name: store._sealer.number(name) for name in RECORDS}


# ------------------------------------------------------------------------------------------------ single rows


def test_a_changed_event_is_left_out_and_named_and_the_rest_is_read(copied: Path) -> None:
    change(copied, "UPDATE events SET sealed = zeroblob(156) WHERE id = 17")
    change(copied, "UPDATE events SET sealed = 3 WHERE id = 20")
    with opened(copied) as store:
        assert not store.damaged
        assert list(store.events()) == EVENTS[:16] + EVENTS[17:19] + EVENTS[20:]
        assert [damage.where for damage in store.damaged] == ["event 17", "event 20"]
        assert len(list(store.export())) == 148 + 3
        store.append(EVENTS[0])
        assert len(store.check()) == 2
    with opened(copied, retention=Retention(max_events=20)) as store:  # they go when their time comes
        assert [event.number for event in store.events()] == list(range(132, 152))


def test_events_that_changed_places_are_not_believed(copied: Path) -> None:
    change(copied, "UPDATE events SET id = 1000 WHERE id = 5", "UPDATE events SET id = 5 WHERE id = 6")
    change(copied, "UPDATE events SET id = 6 WHERE id = 1000")
    with opened(copied) as store:
        assert list(store.events()) == EVENTS[:4] + EVENTS[6:]
        assert {damage.where for damage in store.damaged} == {"event 5", "event 6"}


def test_a_record_that_was_changed_moved_removed_or_put_back_is_refused_and_the_others_are_read(
    copied: Path, tmp_path: Path
) -> None:
    database = copied / "s" / "store.db"
    with opened(copied) as store:
        at = places(store)
    with closing(sqlite3.connect(database)) as db:
        (old,) = db.execute("SELECT hex(sealed) FROM records WHERE id = ?", (at["consent"],)).fetchone()
    with opened(copied) as store:
        store.put("consent", b"no")
    good = database.read_bytes()
    consent, other = at["consent"], at["preferences"]
    attacks = {
        "changed": f"UPDATE records SET sealed = zeroblob(200) WHERE id = {consent}",
        "older": f"UPDATE records SET sealed = x'{old}' WHERE id = {consent}",
        "gone": f"DELETE FROM records WHERE id = {consent}",
        "moved": f"UPDATE records SET sealed = (SELECT sealed FROM records WHERE id = {other}) WHERE id = {consent}",
    }
    for name, attack in attacks.items():
        database.write_bytes(good)
        change(copied, attack)
        with opened(copied) as store:
            with pytest.raises(StoreDamaged, match=rf"'consent'.*{'changed' if name == 'moved' else name}"):
                store.get("consent")
            assert [damage.where for damage in store.damaged] == ["record 'consent'"]
            assert store.get("profile") == RECORDS["profile"]
            assert list(store.events()) == EVENTS
            store.put("consent", b"asked again")
            assert (store.get("consent"), store.damaged) == (b"asked again", ())
            assert store.check() == ()


def test_a_deleted_record_that_is_put_back_is_refused(copied: Path) -> None:
    with opened(copied) as store:
        at = places(store)["consent"]
        (old,) = store._db.execute("SELECT sealed FROM records WHERE id = ?", (at,)).fetchone()
        store.delete("consent")
    change(copied, f"INSERT INTO records VALUES ({at}, x'{old.hex()}')")
    with opened(copied) as store, pytest.raises(StoreDamaged, match="older"):
        store.get("consent")


def test_events_that_were_removed_are_noticed_at_once_and_ones_put_back_in_their_stead_by_a_check(copied: Path) -> None:
    with closing(sqlite3.connect(copied / "s" / "store.db")) as db:
        (first,) = db.execute("SELECT hex(sealed) FROM events WHERE id = 1").fetchone()
    with opened(copied, retention=Retention(max_events=149)) as store:
        assert next(store.events()).number == 2
    change(copied, "DELETE FROM events WHERE id = 9")
    with opened(copied) as store:
        assert [damage.why for damage in store.damaged] == ["149 were kept, 148 are there"]
        assert len(store.check()) == 1
    change(copied, f"INSERT INTO events VALUES (1, x'{first}')")
    with opened(copied) as store:
        assert store.damaged == ()
        assert [damage.why for damage in store.check()] == ["some were removed, and older ones put back"]


def test_a_state_that_is_lost_or_older_than_the_rows_is_counted_again(copied: Path) -> None:
    database = copied / "s" / "store.db"
    with closing(sqlite3.connect(database)) as db:
        (old,) = db.execute("SELECT hex(sealed) FROM records WHERE id = 0").fetchone()
    with opened(copied) as store:
        store.append(EVENTS[0])
    for attack in ("DELETE FROM records WHERE id = 0", f"UPDATE records SET sealed = x'{old}' WHERE id = 0"):
        change(copied, attack)
        with opened(copied) as store:
            assert [damage.where for damage in store.damaged] == ["state"]
            assert list(store.events()) == [*EVENTS, EVENTS[0]]
            assert {name: store.get(name) for name in store.names()} == RECORDS
            assert store.last_id == 151
        with opened(copied) as store:
            assert store.check() == ()


# ------------------------------------------------------------------------------------------------ whole pages


def damaged_in(data: bytes, page: int, random: np.random.Generator) -> list[tuple[int, int]]:
    """Where to flip which bit of a page: in its head, its list of cells, and anywhere."""
    start = page * _pages.PAGE
    heads = [100, 103, 105, 18, 56, 60] if page == 0 else [0, 3, 5, 8]
    anywhere = random.integers(0, _pages.PAGE, 2).tolist()
    return [(start + at, int(random.integers(8))) for at in heads + anywhere if start + at < len(data)]


def test_a_flipped_bit_in_any_page_is_a_typed_error_or_a_row_left_out_and_salvage_keeps_the_rest(
    copied: Path,
) -> None:
    database = copied / "s" / "store.db"
    good, random = database.read_bytes(), np.random.default_rng(0)
    most = max(sum(1 for _ in _pages.rows(part)) for part in single_pages(copied, good))
    assert 20 < most < 60
    refused = noticed = 0
    for page in range(len(good) // _pages.PAGE):
        for at, bit in damaged_in(good, page, random):
            bad = bytearray(good)
            bad[at] ^= 1 << bit
            for path in (copied / "s").glob("store.d*"):
                path.unlink()
            database.write_bytes(bad)
            where = f"page {page + 1}, byte {at % _pages.PAGE}, bit {bit}"
            try:
                with opened(copied) as store:
                    noticed += read(store, where)
            except StoreError:
                refused += 1
            for path in (copied / "s").glob("store.d*"):
                path.unlink()
            database.write_bytes(bad)
            saved = Store.salvage(copied / "s", key=KeyFile(copied / "key"), now_ms=lambda: T0)
            with opened(copied) as store:
                assert read(store, where) == 0, "what is salvaged is whole"
                assert store.n_events == saved.n_events >= len(EVENTS) - most, where
                assert store.names() == saved.records
                assert len(saved.records) >= len(RECORDS) - 3 * bool(page), where
                assert bool(saved.lost) >= (store.n_events < 150 or len(saved.records) < 3), where
    assert refused > 20
    assert noticed > 10


def single_pages(folder: Path, data: bytes) -> list[Path]:
    """A file for each page, so that its rows can be counted."""
    (folder / "pages").mkdir()
    paths = [folder / "pages" / f"{i}" for i in range(len(data) // _pages.PAGE)]
    for i, path in enumerate(paths):
        path.write_bytes(data[: _pages.PAGE] if i == 0 else bytes(_pages.PAGE) + data[i * 4096 : (i + 1) * 4096])
    return paths


def read(store: Store, where: str) -> bool:
    """Reads all; what comes is what was written, and what does not come is named. Whether anything did not."""
    found = {event.number: event for event in store.events()}
    assert all(event == EVENTS[number - 1] for number, event in found.items()), where
    missing = set()
    for name in RECORDS:
        try:
            value = store.get(name)
        except StoreDamaged:
            value = None
            missing.add(name)
        assert value in (RECORDS[name], None), where
    damaged = store.check()
    assert damaged or (len(found) == store.n_events and not missing), where
    return bool(damaged)


def test_a_torn_file_is_a_typed_error_and_salvage_keeps_what_is_on_the_whole_pages(copied: Path) -> None:
    database = copied / "s" / "store.db"
    good = database.read_bytes()
    for size in (0, 1, 4096, len(good) // 2, len(good) - 4096):
        for path in (copied / "s").glob("store.d*"):
            path.unlink()
        database.write_bytes(good[:size])
        with pytest.raises(StoreDamaged, match=r"Client\.salvage"):
            opened(copied)
        saved = Store.salvage(copied / "s", key=KeyFile(copied / "key"), now_ms=lambda: T0)
        with opened(copied) as store:
            assert not read(store, str(size))
            assert store.n_events == saved.n_events
        assert saved.lost


def test_salvage_of_a_store_that_is_whole_loses_nothing_and_brings_nothing_back(copied: Path) -> None:
    with opened(copied, retention=Retention(max_events=60)) as store:
        store.delete("preferences")
        store.put("profile", b"new")
    for _ in range(2):
        saved = Store.salvage(copied / "s", key=KeyFile(copied / "key"), now_ms=lambda: T0)
        assert (saved.n_events, saved.records, saved.lost) == (60, ("consent", "profile"), ())
    with opened(copied) as store:
        assert list(store.events()) == EVENTS[90:]
        assert store.get("profile") == b"new"
        assert store.append(EVENTS[0]) == 151
        assert store.check() == ()


def test_a_second_state_in_a_file_leaves_a_salvage_no_state_to_go_by(copied: Path) -> None:
    old = (copied / "s" / "store.db").read_bytes()
    with opened(copied) as store:
        store.put("consent", b"no")
    database = copied / "s" / "store.db"
    database.write_bytes(database.read_bytes() + old)  # pages that SQLite never reads, and a salvage does
    saved = Store.salvage(copied / "s", key=KeyFile(copied / "key"), instead={"consent": b"nobody"}, now_ms=lambda: T0)
    assert [(damage.where, damage.why) for damage in saved.lost] == [
        ("state", "it is there more than once; counted again")
    ]
    with opened(copied) as store:
        assert store.get("consent") == b"nobody"
        assert list(store.events()) == EVENTS


def test_a_database_that_is_gone_is_not_taken_for_a_new_store(copied: Path) -> None:
    (copied / "s" / "store.db").unlink()
    with pytest.raises(StoreDamaged, match="gone"):
        opened(copied)
    with pytest.raises(StoreDamaged, match="nothing to read"):
        Store.salvage(copied / "s", key=KeyFile(copied / "key"))
    forget(copied / "s", keep=None, key=KeyFile(copied / "key"))
    with opened(copied) as store:
        assert store.n_events == 0


def test_a_damaged_store_and_its_damaged_copy_can_be_forgotten(copied: Path) -> None:
    (copied / "s" / "store.db").write_bytes(b"\0" * 5000)
    Store.salvage(copied / "s", key=KeyFile(copied / "key"))
    assert (copied / "s" / "store.damaged.db").exists()
    with opened(copied) as store:
        store.forget(keep=None)
    assert [path.name for path in (copied / "s").iterdir()] == ["store.lock"]
    assert not (copied / "key").exists()
